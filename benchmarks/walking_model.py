"""A random Mistral of 19M parameters that writes pairs in the synthesizer's format and stops by itself.

Real: the shape, every matrix product, attention, the tokenizer (Mistral's SentencePiece model from mistral-common),
sampling, EOS, lengths that differ from text to text. Artificial: the tokenizer has the format's three tags as tokens of
their own, and embeddings and output head are drawn so that a question's words follow `<QUE>`, an answer's follow
`<ANS>`, and `</END>` stops or continues. The random layers determine which word, and how many. The output means
nothing. The model has as many key-value heads as query heads, so that a cache of 1 GiB holds 131,072 tokens: less than
a round of a few hundred groups, as a real cache is far smaller than a round of a real corpus.
"""

import shutil
from pathlib import Path

TAGS = ("<QUE>", "<ANS>", "</END>")
WORDS = 1500  # of questions, and as many of answers
STRONG, WEAK = 60.0, 1.0  # logits of what may follow, and the spread among it
LAYERS = 0.1  # scale of what the layers add to the embedding, so that the states stay readable
LEAVING = {"<ANS>": 10.1, "</END>": 11.1, "</s>": -1.2}  # how readily a question, an answer, a list of pairs ends


def write_walking_model(folder: Path) -> Path:
    """Writes the model and its tokenizer as a Hugging Face directory."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32_064, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        sliding_window=None, tie_word_embeddings=False, initializer_range=0.06,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    with torch.no_grad():
        walk(model, tokenizer)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= LAYERS
            layer.mlp.down_proj.weight *= LAYERS
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path):
    import mistral_common
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(source, folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return tokenizer


def walk(model, tokenizer) -> None:
    """Draws new embeddings and a new head, with a direction for each state of the walk."""
    import torch

    pieces = tokenizer.convert_ids_to_tokens(list(range(32_000)))
    words = [i for i, piece in enumerate(pieces) if piece.startswith("▁") and piece[1:].isalpha() and len(piece) > 3]
    asked, answered = words[:WORDS], words[WORDS : 2 * WORDS]
    que, ans, end = tokenizer.convert_tokens_to_ids(list(TAGS))
    newline, eos = tokenizer.convert_tokens_to_ids("<0x0A>"), tokenizer.eos_token_id
    size, width = model.config.vocab_size, model.config.hidden_size
    states = torch.linalg.qr(torch.randn(width, 6))[0].T  # orthonormal: text, <QUE>, question, <ANS>, answer, </END>
    state = torch.zeros(size, dtype=torch.long)
    state[que], state[asked], state[ans], state[answered], state[end] = 1, 2, 3, 4, 5
    embedding = torch.randn(size, width) / width**0.5 + 3 * states[state]
    head = torch.randn(size, width) * WEAK / width**0.5
    head -= head @ states.T @ states  # the choice inside a state is the random layers'
    follows = [(0, [que]), (1, asked), (2, asked), (3, answered), (4, answered), (5, [newline])]
    for origin, targets in follows:
        head[targets] += STRONG * states[origin] / 16
    for origin, target, name in ((2, ans, "<ANS>"), (4, end, "</END>"), (5, eos, "</s>")):
        head[target] += (STRONG + LEAVING[name]) * states[origin] / 16
    model.model.embed_tokens.weight.copy_(embedding)
    model.lm_head.weight.copy_(head)
