"""A small corpus, a byte-level tokenizer and the recipe of a scripted run, for the tests of `synth run`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer

from ipt_jax.core.settings import check_settings
from ipt_jax.corpus.sources import Corpus
from ipt_jax.corpus.tokenizer import load_tokenizer
from synth.config import RunSettings
from synth.generate.work_list import form_groups, list_work
from synth.groups import Group

BOS, EOS = 1, 2
WORDS = ["river", "mill", "Anna", "stone", "bread", "walks", "sees", "the", "old", "green", "hill", "and", "boat"]


def write_tokenizer(folder: Path) -> Path:
    """One id a byte: <unk> <s> </s>, then byte b is 3 + its place in the byte-level alphabet."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = JsonTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def write_corpus(path: Path, texts: int, seed: int = 0) -> Path:
    rng = Random(seed)
    with path.open("w") as file:
        for number in range(texts):
            sentences = [" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) + "." for _ in range(rng.randint(2, 6))]
            row = {"id": f"t{number}", "text": " ".join(sentences), "source": rng.choice("ab")}
            file.write(json.dumps(row) + "\n")
    return path


def recipe(folder: Path, texts: int = 30, **changes: Any) -> dict[str, Any]:
    """A recipe over files in `folder`, made where they are missing; `synthesizer__field=…` changes a block's field."""
    if not (folder / "model").exists():
        write_tokenizer(folder / "model")
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl", texts)
    plain: dict[str, Any] = {
        "synthesizer": {
            "model": str(folder / "model"),
            "engine": "scripted",
            "max_model_len": 2000,
            "max_new_tokens": 600,
            "max_num_seqs": 4,
        },
        "corpus": {"path": str(folder / "corpus.jsonl")},
        "rounds": 3,
        "groups_per_shard": 3,
        "output": str(folder / "groups"),
    }
    for name, value in changes.items():
        block, _, field = name.partition("__")
        if field:
            plain[block][field] = value
        else:
            plain[block] = value
    return plain


def settings(folder: Path, **changes: Any) -> RunSettings:
    return check_settings(RunSettings, recipe(folder, **changes), where="recipe")


def groups_of(settings: RunSettings) -> list[Group]:
    """All groups of a run, by its work list."""
    tokenizer = load_tokenizer(settings.synthesizer.model)
    work = list_work(settings, tokenizer, "run", Corpus(settings.corpus))
    return list(form_groups(settings, tokenizer, work, range(len(work.shards))))


def shard_bytes(output: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(output).glob("*.array_record"))}


def damage_shard(output: str | Path, index: int) -> None:
    """Flips a bit in the middle of a shard."""
    file = sorted(Path(output).glob("*.array_record"))[index]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def descendants(parent: int, title: str) -> list[psutil.Process]:
    """The processes below `parent`, children of children included, whose command line begins with `title`."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found
