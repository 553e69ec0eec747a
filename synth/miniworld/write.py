"""`synth miniworld`: writes the world and its tokenizer to a directory.

    raw/articles.jsonl        {id, text, genre}: the corpus that synthesis may convert
    raw/heldout.jsonl         the same for held-out people: raw text for pre-training only
    tuning/NAME.jsonl         {id, context, qa}: one data set per task format, about other people
    gold/articles.jsonl       {id, context, qa}: raw/articles.jsonl with the world's own pairs
    instructions.jsonl        {id, task, prompt, response}
    heldout/TASK.jsonl        {id, prompt, choices, gold}: see `held_out_tasks`
    heldout/TASK_answers.jsonl  {id, prompt, answer}: the questions of recall and reading without choices
    tokenizer/                a byte-level BPE tokenizer trained on the tuning text
    world.json                the settings, written first, and the figures, written last

Guarantees: equal settings write equal bytes. A complete directory is kept, one with other settings is refused. Memory
does not grow with the world. Any text round-trips through the tokenizer, and `transformers` opens it, with `<s>` and
`</s>` as BOS and EOS. The tags of the wire format are ordinary text that merges into one id each.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ipt_jax.core.errors import UserError
from ipt_jax.core.files import lock_directory, write_whole, writing
from ipt_jax.core.progress import Progress
from synth.format.wire import context_block, pairs_text, wire_pair
from synth.miniworld.questions import TASKS, TUNING_SETS, held_out_tasks, paired_row, tuning_row
from synth.miniworld.world import World, answer_words, write_article, write_instruction

SCHEMA = 2
OURS = {"raw", "tuning", "gold", "heldout", "tokenizer", "instructions.jsonl", "world.json", "world.json.tmp", ".lock"}
TEXTS = 8  # articles per person by default
SPECIAL = ["<unk>", "<s>", "</s>"]
SMALLEST = 256 + len(SPECIAL)
# GPT-2's split, in which a tag of the wire format and a run of line breaks are one part each.
SPLIT = r" ?</?(?:CON|QUE|ANS|END)>|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+(?!\S)|\s+"
# Training text of the tokenizer. The repeated list makes each word of an answer one id.
TOKENIZER_ARTICLES = 1500
TOKENIZER_INSTRUCTIONS = 500
ANSWER_REPEATS = 300


def run_miniworld(
    output: Path | str,
    *,
    articles: int = 4000,
    people: int | None = None,
    paired: float = 0.5,
    seed: int = 0,
    tuning_articles: int = 12_000,
    instructions: int = 2000,
    questions: int = 800,
    tokenizer_size: int = 2000,
) -> dict[str, Any]:
    """Writes the world. `people`: default an eighth of the articles. `questions`: at most so many per held-out task."""
    output = Path(output)
    world = World(seed, articles, people or max(2, articles // TEXTS), tuning_articles, paired)
    sizes = {"instructions": instructions, "questions": questions, "tokenizer_size": tokenizer_size}
    identity = {"schema": SCHEMA, **vars(world), **sizes}
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(output)
        try:
            return _known_figures(output, identity) or _write(output, world, identity)
        finally:
            os.close(lock)


def open_world(directory: Path | str) -> World:
    """The world that `synth miniworld` wrote to `directory`, for `judge`."""
    found = _read_identity(Path(directory))
    return World(**{name: found[name] for name in ("seed", "articles", "people", "tuning_articles", "paired")})


def _read_identity(directory: Path) -> dict[str, Any]:
    path = directory / "world.json"
    if not path.is_file():
        raise UserError(f"{directory}: no world.json; use a directory that synth miniworld wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); delete the directory and rerun synth miniworld") from error


def _known_figures(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a complete directory, None for an unfinished one. Raises UserError for other settings."""
    if not (output / "world.json").exists():
        if foreign := sorted(entry.name for entry in output.iterdir() if entry.name not in OURS):
            raise UserError(f"output {output}: contains {foreign[0]!r} but no world.json; use an empty directory")
        return None
    found = _read_identity(output)
    for name, value in identity.items():
        if found.get(name) != value:
            made = f"made with {name}={found.get(name)!r}, now {value!r}"
            raise UserError(f"output {output}: {made}; use another output, or delete this one")
    return found["figures"]


def _write(output: Path, world: World, identity: dict[str, Any]) -> dict[str, Any]:
    _write_json(output / "world.json", {**identity, "figures": None})
    held_out = pairs = questions = 0
    with contextlib.ExitStack() as stack:

        def json_lines(name: str) -> Callable[[dict[str, Any]], None]:
            return stack.enter_context(_json_lines(output / f"{name}.jsonl"))

        progress = stack.enter_context(Progress(world.articles + world.tuning_articles, "articles", "synth miniworld"))
        raw, gold = {False: json_lines("raw/articles"), True: json_lines("raw/heldout")}, json_lines("gold/articles")
        for index in range(world.articles):
            article, is_held_out = write_article(world, "article", index), world.held_out(index % world.people)
            raw[is_held_out]({"id": article.id, "text": article.text, "genre": article.genre})
            if not is_held_out:
                gold(paired_row(world, "article", index, TUNING_SETS[0]))
            held_out += is_held_out
            progress.advance()
        tuning = {one: json_lines(f"tuning/{one.name}") for one in TUNING_SETS}
        for index in range(world.tuning_articles):
            tuning_set, row = tuning_row(world, index)
            tuning[tuning_set](row)
            pairs += len(row["qa"])
            progress.advance()
        tasks = {name: json_lines(f"heldout/{name}") for name in TASKS}
        answers = {name: json_lines(f"heldout/{name}_answers") for name in ("recall", "reading")}
        for name, row in held_out_tasks(world, identity["questions"]):
            questions += 1
            tasks[name](row)
            if name in answers:
                answer = row["choices"][row["gold"]]
                answers[name]({"id": row["id"], "prompt": row["prompt"], "answer": answer})
        instructions = json_lines("instructions")
        for index in range(identity["instructions"]):
            instructions(write_instruction(world.seed, index))
    figures = {
        "articles": world.articles,
        "people": world.people,
        "heldout_articles": held_out,
        "pairs": pairs,
        "questions": questions,
        "instructions": identity["instructions"],
        "tokenizer_ids": write_tokenizer(_tokenizer_texts(world), identity["tokenizer_size"], output / "tokenizer"),
    }
    _write_json(output / "world.json", {**identity, "figures": figures})
    return figures


@contextlib.contextmanager
def _json_lines(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that writes a row. The file gets its name once it is complete."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write
    os.replace(temporary, path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def _tokenizer_texts(world: World) -> Iterator[str]:
    for index in range(min(world.tuning_articles, TOKENIZER_ARTICLES)):
        _, row = tuning_row(world, index)
        yield context_block(row["context"]) + pairs_text([wire_pair(**pair) for pair in row["qa"]])
        yield "".join(f"Question: {pair['question']}\nAnswer: {pair['answer']}\n\n" for pair in row["qa"])
    for index in range(TOKENIZER_INSTRUCTIONS):
        yield "{prompt} {response}".format(**write_instruction(world.seed, index))
    for _ in range(ANSWER_REPEATS):
        yield f" {' '.join(answer_words())}"


def write_tokenizer(texts: Iterable[str], size: int, directory: Path) -> int:
    """Trains a tokenizer of at most `size` ids, the three control tokens first. Returns its number of ids."""
    if size < SMALLEST:
        raise UserError(f"miniworld: tokenizer_size is {size}; a byte-level tokenizer needs at least {SMALLEST}")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    return tokenizer.get_vocab_size()
