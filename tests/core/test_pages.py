"""Token shards by the page: documents come back as they were written, damage is named, nothing else is ever read."""

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_shards import random_documents, write_tokens

from ipt_jax.core.errors import UserError
from ipt_jax.core.manifest import Manifest
from ipt_jax.core.stage import NewShard
from ipt_jax.corpus.records import KINDS, Parent, TokenDocument, TokenPage, decode
from ipt_jax.data import token_shards
from ipt_jax.data.loader import batches
from ipt_jax.data.mixture import DataSettings
from ipt_jax.data.plan import Plan, build_plan
from ipt_jax.data.token_shards import Written, documents_of, open_token_shards, read_token_documents


@st.composite
def documents(draw: st.DrawFn) -> list[TokenDocument]:
    made = []
    for number in range(draw(st.integers(1, 30))):
        length = draw(st.integers(1, 40))
        bounds = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        runs = list(zip(bounds[::2], bounds[1::2], strict=False))
        parents = [Parent(f"p{i}", i, i + 5) for i in range(draw(st.integers(0, 2)))]
        tokens = np.arange(number, number + length, dtype="<u4").tobytes()
        kind, source = draw(st.sampled_from(KINDS)), draw(st.sampled_from(["", "web"]))
        made.append(TokenDocument(f"é{number}", kind, "uint32", tokens, runs, parents, source))
    return made


@given(documents(), st.integers(1, 100))
def test_documents_come_back_page_by_page(
    tmp_path_factory: pytest.TempPathFactory, made: list[TokenDocument], page_tokens: int
) -> None:
    shard = NewShard(tmp_path_factory.mktemp("side") / "shard.tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "PAGE_TOKENS", page_tokens)
        records = [decode(one, TokenPage) for one in token_shards.token_pages(map(Written, made), shard)]
    assert [document for page in records for document in documents_of(page)] == made
    sizes = [len(page.tokens) // 4 for page in records]
    assert all(size <= page_tokens or len(page.ids) == 1 for size, page in zip(sizes, records, strict=True))
    after = [sizes[i] + len(next(documents_of(records[i + 1])).tokens) // 4 for i in range(len(records) - 1)]
    assert all(size > page_tokens for size in after)  # none could have held the document that begins the next
    assert [page.first for page in records] == np.cumsum([0] + [len(page.ids) for page in records])[:-1].tolist()


def plan_of(path: Path, rows_per_step: int = 8) -> Plan:
    source = {"name": "r", "path": str(path), "epochs": 1}
    return build_plan(DataSettings.model_validate({"seq_len": 64, "sources": [source]}), rows_per_step=rows_per_step)


def read_all(plan: Plan, hosts: int = 1) -> bytes:
    parts = [list(batches(plan, start_step=0, rows_per_step=8, host=host, hosts=hosts)) for host in range(hosts)]
    return b"".join(part[name].tobytes() for step in zip(*parts, strict=True) for part in step for name in sorted(part))


def test_records_of_another_version_are_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "raw", random_documents([30] * 4))
    file = path / "manifest.json"
    manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
    del manifest.identity["records"]
    manifest.checksum = manifest.digest()
    file.write_bytes(msgspec.json.encode(manifest))
    for read in (plan_of, open_token_shards):
        with pytest.raises(UserError, match="its records are 'single documents', this version reads 'pages 1'; delete"):
            read(path)


def test_a_damaged_page_is_named_with_its_documents(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "raw", random_documents([3000] * 8), shards=2)  # two documents a page
    assert json.loads((path / "manifest.json").read_text())["records"] == 4
    file = path / "tokens-00001-of-00002.array_record"
    data = bytearray(file.read_bytes())
    at = data.find(decode(open_token_shards(path)[3], TokenPage).tokens)
    data[at + 100] ^= 4
    file.write_bytes(data)
    for hosts in (1, 2):
        with pytest.raises(UserError, match=f"{file.name}: record 1 .documents 2 to 3. is damaged "):
            read_all(plan_of(path), hosts)


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_shard_of_other_documents_is_named_by_the_document(tmp_path: Path, hosts: int) -> None:
    """As long and as many: only ids, or lengths, tell."""
    path = write_tokens(tmp_path / "raw", random_documents([50, 60] * 20), shards=2)
    plan = plan_of(path)
    first, second = (path / f"tokens-{shard:05d}-of-00002.array_record" for shard in range(2))
    assert first.stat().st_size == second.stat().st_size
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match="00001-of-00002.array_record: record 0 .*is damaged .*its id is not that"):
        read_all(plan, hosts)
    lengths = write_tokens(tmp_path / "other", random_documents([60, 50] * 20), shards=2)
    (lengths / second.name).replace(second)
    plan = plan_of(path)
    with pytest.raises(UserError, match=r"document \d+: it has \d0 tokens, its index says \d0"):
        read_all(plan, hosts)


def test_a_flipped_bit_never_gives_other_rows(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "raw", random_documents([40] * 60))
    whole = read_all(plan_of(path))
    (file,) = path.glob("*.array_record")
    data, draw, refused = file.read_bytes(), random.Random(0), 0
    for bit in draw.sample(range(8 * len(data)), 150):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            assert read_all(plan_of(path)) == whole
        except UserError as error:
            assert file.name in str(error)
            refused += 1
    assert refused > 0
    file.write_bytes(data)
    assert [len(one.tokens) for one in read_token_documents(path)] == [80] * 60
