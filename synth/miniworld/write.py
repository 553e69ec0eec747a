"""`synth miniworld`: writes the world to a directory, streaming.

    raw/articles.jsonl       {id, text, genre}: the corpus that synthesis may convert
    raw/heldout.jsonl        the same for held-out provinces: raw text to pre-train on, never to be converted
    tuning/NAME.jsonl        {id, context, qa}: one data set a task format, over provinces of their own
    instructions.jsonl       {id, task, prompt, response}
    heldout/questions.jsonl  {id, prompt, choices, gold} on what raw/heldout.jsonl tells
    heldout/answers.jsonl    {id, prompt, answer}: the same questions without choices
    tokenizer/               a small tokenizer trained on the tuning text
    world.json               what the world was made from; written first, marked complete last

Equal settings give equal bytes. A complete directory is left as it is; one made with other settings is refused.

A small byte-level BPE tokenizer trained on the world's own text.

Guaranteed: any text round-trips; equal worlds give equal files; `transformers` opens the directory, with `<s>` and
`</s>` as BOS and EOS. The tags of the wire format are ordinary text that happens to merge into one id each.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import lock_directory, write_whole, writing
from ipt_jax.core.progress import Progress
from synth.format.wire import context_block, pairs_text, wire_pair
from synth.miniworld.articles import write_article
from synth.miniworld.instructions import write_instruction
from synth.miniworld.questions import TUNING_SETS, held_out_questions, tuning_row
from synth.miniworld.world import PROVINCE, World, answer_words

SPECIAL = ["<unk>", "<s>", "</s>"]
SMALLEST = 256 + len(SPECIAL)
# GPT-2's split, with a tag of the wire format and a run of line breaks held together.
SPLIT = r" ?</?(?:CON|QUE|ANS|END)>|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of at most `size` ids, the three control tokens first."""
    if size < SMALLEST:
        raise UserError(f"miniworld: tokenizer_size is {size}; a byte-level tokenizer needs at least {SMALLEST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


SCHEMA = 1
OURS = {"raw", "tuning", "heldout", "tokenizer", "instructions.jsonl", "world.json", "world.json.tmp", ".lock"}
# What the tokenizer is trained on. The repeated list makes each word of an answer one id.
TOKENIZER_ARTICLES = 1500
TOKENIZER_INSTRUCTIONS = 500
ANSWER_REPEATS = 300


def run_miniworld(
    output: Path | str,
    *,
    articles: int = 4000,
    entities: int | None = None,
    seed: int = 0,
    tuning_articles: int = 12_000,
    instructions: int = 2000,
    questions: int = 800,
    tokenizer_size: int = 2000,
) -> dict[str, Any]:
    """Writes the world; `entities` defaults to half the articles, so that each fact is told a few times."""
    output = Path(output)
    world = World(seed, articles, entities or max(1, articles // 2), tuning_articles)
    sizes = {"instructions": instructions, "questions": questions, "tokenizer_size": tokenizer_size}
    identity = {"schema": SCHEMA, **vars(world), **sizes}
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(output)
        try:
            return _resume(output, identity) or _write(output, world, identity)
        finally:
            os.close(lock)


def open_world(directory: Path | str) -> World:
    """The world that `synth miniworld` wrote to `directory`, for `judge`."""
    found = _read_identity(Path(directory))
    return World(**{name: found[name] for name in ("seed", "articles", "entities", "tuning_articles")})


def _read_identity(directory: Path) -> dict[str, Any]:
    path = directory / "world.json"
    if not path.is_file():
        raise UserError(f"{directory}: no world.json; give a directory that synth miniworld wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete the directory and run synth miniworld again") from error


def _resume(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a complete directory; None where there is work to do; UserError for other settings."""
    if not (output / "world.json").exists():
        if foreign := sorted(entry.name for entry in output.iterdir() if entry.name not in OURS):
            raise UserError(f"output {output}: holds {foreign[0]!r} but no world.json; give an empty directory")
        return None
    found = _read_identity(output)
    for name, value in identity.items():
        if found.get(name) != value:
            made = f"made with {name}={found.get(name)!r}, now {value!r}"
            raise UserError(f"output {output}: {made}; give another output, or delete this one")
    return found["figures"]


def _write(output: Path, world: World, identity: dict[str, Any]) -> dict[str, Any]:
    _write_json(output / "world.json", {**identity, "figures": None})
    for folder in ("raw", "tuning", "heldout"):
        (output / folder).mkdir(exist_ok=True)
    figures = {"articles": world.articles, "entities": world.provinces * PROVINCE}
    total = world.articles + world.tuning_articles
    with Progress(total, "articles", "synth miniworld") as progress:
        figures["heldout_articles"] = _write_articles(output / "raw", world, progress)
        figures["pairs"] = _write_tuning(output / "tuning", world, progress)
    figures["questions"] = _write_questions(output / "heldout", world, identity["questions"])
    figures["instructions"] = identity["instructions"]
    rows = (write_instruction(world.seed, index)._asdict() for index in range(identity["instructions"]))
    _write_rows(output / "instructions.jsonl", rows)
    tokenizer = train_tokenizer(_tokenizer_texts(world), identity["tokenizer_size"])
    save_tokenizer(tokenizer, output / "tokenizer")
    figures["tokenizer_ids"] = tokenizer.get_vocab_size()
    _write_json(output / "world.json", {**identity, "figures": figures})
    return figures


def _write_articles(folder: Path, world: World, progress: Progress) -> int:
    """Both raw files; returns the number of held-out articles."""
    held_out = 0
    with open_text(folder / "articles.jsonl") as seen, open_text(folder / "heldout.jsonl") as unseen:
        for index in range(world.articles):
            article = write_article(world, "article", index)
            is_held_out = world.held_out(index)
            held_out += is_held_out
            row = {"id": article.id, "text": article.text, "genre": article.genre}
            _write_row(unseen if is_held_out else seen, row)
            progress.advance()
    return held_out


def _write_tuning(folder: Path, world: World, progress: Progress) -> int:
    """One file a data set; returns the number of pairs."""
    pairs = 0
    with contextlib.ExitStack() as stack:
        data_sets = {one: stack.enter_context(open_text(folder / f"{one.name}.jsonl")) for one in TUNING_SETS}
        for index in range(world.tuning_articles):
            tuning_set, row = tuning_row(world, index)
            _write_row(data_sets[tuning_set], row)
            pairs += len(row["qa"])
            progress.advance()
    return pairs


def _write_questions(folder: Path, world: World, count: int) -> int:
    written = 0
    with open_text(folder / "questions.jsonl") as choices, open_text(folder / "answers.jsonl") as answers:
        for question in held_out_questions(world, count):
            _write_row(choices, question._asdict())
            answer = question.choices[question.gold]
            _write_row(answers, {"id": question.id, "prompt": question.prompt, "answer": answer})
            written += 1
    return written


def _tokenizer_texts(world: World) -> Iterator[str]:
    for index in range(min(world.tuning_articles, TOKENIZER_ARTICLES)):
        _, row = tuning_row(world, index)
        yield context_block(row["context"]) + pairs_text([wire_pair(**pair) for pair in row["qa"]])
        yield "".join(f"Question: {pair['question']}\nAnswer: {pair['answer']}\n\n" for pair in row["qa"])
    for index in range(TOKENIZER_INSTRUCTIONS):
        instruction = write_instruction(world.seed, index)
        yield f"{instruction.prompt} {instruction.response}"
    for _ in range(ANSWER_REPEATS):
        yield f" {' '.join(answer_words())}"


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
    os.replace(temporary, path)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open_text(path) as file:
        for row in rows:
            _write_row(file, row)


def _write_row(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())
