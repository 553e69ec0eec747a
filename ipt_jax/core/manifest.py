"""The manifest of an output directory: its shards, its inputs, what made it, and why another recipe is refused."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from ipt_jax.core.errors import UserError
from ipt_jax.core.hashing import digest

SCHEMA = 1


class ShardEntry(msgspec.Struct):
    name: str
    records: int
    tokens: int
    bytes: int
    sha256: str
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    side_files: dict[str, str] = msgspec.field(default_factory=dict, name="sides")  # SHA-256, by name


class InputEntry(msgspec.Struct, array_like=True, frozen=True):
    """A file that a stage reads: number of its source, default source of its rows, name in ids, contents' hash."""

    source: int
    origin: str
    name: str
    contents: str


class Inputs(msgspec.Struct):
    """What a stage reads. `ids`: how the documents of each source get their ids."""

    ids: list[str]
    files: list[InputEntry]


class Extension(msgspec.Struct):
    """New inputs in an output: the shards from `first_shard` on are of them. The others had another fingerprint."""

    first_shard: int
    earlier_fingerprint: str


class Manifest(msgspec.Struct):
    schema: int
    stage: str
    fingerprint: str
    identity: dict[str, Any]
    complete: bool = False
    records: int = 0
    tokens: int = 0
    counts: dict[str, int] = {}
    dropped: dict[str, int] = {}
    summary: dict[str, Any] = {}
    shards: list[ShardEntry] = []
    checksum: str = ""
    inputs: Inputs | msgspec.UnsetType = msgspec.UNSET
    extensions: list[Extension] | msgspec.UnsetType = msgspec.UNSET

    def digest(self) -> str:
        """Digest of all fields except the checksum."""
        return digest(msgspec.to_builtins(msgspec.structs.replace(self, checksum="")))

    def count(self, name: str) -> int:
        return self.counts.get(name, 0)


def load_manifest(path: Path) -> Manifest:
    """The manifest of a directory. The caller compares its checksum."""
    file = path / "manifest.json"
    try:
        manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: damaged ({error}); restore it from a backup, or rerun the stage into a new directory: without "
            "the manifest the shards cannot be verified"
        ) from error
    if manifest.schema != SCHEMA:
        raise UserError(f"{file}: schema {manifest.schema}, this version reads {SCHEMA}; rerun its stage")
    return manifest


def edited(path: Path) -> str:
    return f"{path / 'manifest.json'}: was edited (checksum mismatch); undo the edit, restore it from a backup"


def changed_fields(found: Manifest, expected: Manifest) -> list[str]:
    """Names of what differs in two identities; those of contents last."""
    before, now = flatten(found.identity), flatten(expected.identity)
    changed = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    return sorted(changed, key=lambda key: (_is_contents(key), key))


def _is_contents(field: str) -> bool:
    return "contents" in field.split(".")


def is_extension(found: Manifest, expected: Manifest) -> bool:
    """Whether the two differ in contents alone."""
    changed = changed_fields(found, expected)
    return found.stage == expected.stage and bool(changed) and all(map(_is_contents, changed))


def with_earlier_names(
    path: Path, before: Inputs | msgspec.UnsetType, now: Inputs | msgspec.UnsetType
) -> Inputs | msgspec.UnsetType:
    """The new inputs, in which renamed files have their earlier names: their ids do not change."""
    if before is msgspec.UNSET or now is msgspec.UNSET:
        return now
    old, new = ({(one.source, one.name, one.contents): one for one in each.files} for each in (before, now))
    left = {(one.source, one.contents): one for key, one in old.items() if key not in new}
    files = [one if key in old else left.pop((one.source, one.contents), one) for key, one in new.items()]
    names = Counter(one.name for one in files)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"output {path}: {twice[0]} was renamed, and another file has its name now; give that file another name"
        )
    return Inputs(now.ids, files)


def refuse_other(path: Path, found: Manifest, expected: Manifest, cure: str = "") -> None:
    """Raises UserError, naming the field or the files, if another stage or other settings made a directory."""
    if found.stage != expected.stage:
        raise UserError(f"output {path}: made by stage {found.stage!r}, not {expected.stage!r}; set another output")
    if found.fingerprint == expected.fingerprint:
        return
    changed = changed_fields(found, expected)
    name = changed[0] if changed else "settings"
    files = changed_files(found.inputs, expected.inputs) if all(map(_is_contents, changed)) else []
    if files:
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise UserError(
            f"output {path}: made of other files: {', '.join(files[:3])}{more}; restore the input{cure}, or set "
            "another output"
        )
    changes = change(name, found.identity, expected.identity)
    raise UserError(f"output {path}: made with {changes}; set another output, or delete this one")


def changed_files(before: Inputs | msgspec.UnsetType, now: Inputs | msgspec.UnsetType) -> list[str]:
    """What became of the files of an input, in words. Renamed files have not changed."""
    if before is msgspec.UNSET or now is msgspec.UNSET:
        return []
    old, new = ({(one.source, one.name): one.contents for one in each.files} for each in (before, now))
    gone, come = set(old.values()) - set(new.values()), set(new.values()) - set(old.values())
    words = [f"{key[1]} has changed" for key in old if key in new and old[key] != new[key]]
    words += [f"{key[1]} is missing" for key, contents in old.items() if key not in new and contents in gone]
    return words + [f"{key[1]} is new" for key, contents in new.items() if key not in old and contents in come]


def change(name: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    """`seed=2, now 3`. A field that one of the identities lacks is compared as a block, without the hashes in it."""
    before, now = flatten(found), flatten(expected)
    if name not in before or name not in now:
        name = name.split(".")[0]
        return f"{name}={without_hashes(found.get(name))!r}, now {without_hashes(expected.get(name))!r}"
    return f"{name}={difference(before[name], now[name])}"


def without_hashes(value: Any) -> Any:
    """A value without the SHA-256 in it."""
    if isinstance(value, dict):
        return {key: without_hashes(one) for key, one in value.items() if not _is_hash(one)}
    return [without_hashes(one) for one in value if not _is_hash(one)] if isinstance(value, list) else value


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def difference(before: Any, now: Any) -> str:
    """`2, now 3`. Digests are cut to 12 digits, and what they are of has changed."""
    if _is_hash(before) and _is_hash(now):
        return f"{before[:12]}…, now {now[:12]}…: the contents of this input have changed since"
    return f"{before!r}, now {now!r}"


def flatten(value: Any, separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """{'corpus': {'path': 'a', 'splits': [1]}} -> {'corpus.path': 'a', 'corpus.splits.0': 1}"""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    flat = [flatten(one, separator, f"{prefix}{separator}{key}" if prefix else str(key)) for key, one in inner]
    return {key: one for part in flat for key, one in part.items()} if flat else {prefix: value}
