"""The plan: exact amounts, refusals that name the number to change, order by arithmetic, packing, what is left out."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from token_shards import documents_in_memory, random_documents, row_fields, write_tokens

from ipt_jax.core.errors import UserError
from ipt_jax.corpus.records import Parent
from ipt_jax.data.exclude_converted import token_ranges_outside
from ipt_jax.data.mixture import DataSettings, SourceMix, check_sources, solve_mix
from ipt_jax.data.packing import CHUNK_ROWS, BestFit, Concat
from ipt_jax.data.plan import Plan, build_plan, plan_summary_table
from ipt_jax.data.shuffle import MergedOrder, Stream

# Many short, a few very long, all of one length, one alone: what breaks packers.
awkward = st.one_of(
    st.lists(st.integers(1, 30), min_size=1, max_size=60),
    st.lists(st.sampled_from([1, 2, 16, 17, 400]), min_size=1, max_size=40),
    st.integers(1, 40).flatmap(lambda length: st.integers(1, 30).map(lambda count: [length] * count)),
)


def mix(seq_len: int = 16, tokens: int | None = None, **sources: dict) -> DataSettings:
    listed = [SourceMix.model_validate({"name": name, "path": name} | one) for name, one in sources.items()]
    return DataSettings(seq_len=seq_len, tokens=tokens, sources=listed)


class Order(NamedTuple):
    """A merged order in full, made of lengths alone."""

    merged: MergedOrder
    source: np.ndarray
    document: np.ndarray
    length: np.ndarray

    @property
    def counted(self) -> list[tuple[int, int]]:
        """Documents, and tokens that are cut from the last one, of each source."""
        return [stream.count() for stream in self.merged.streams]


def order_of(data: DataSettings, lengths: Sequence[Sequence[int]], amounts: Sequence[int]) -> Order:
    streams = [
        Stream(documents_in_memory(tokens), amount, data.seed, one.name)
        for one, tokens, amount in zip(data.sources, lengths, amounts, strict=True)
    ]
    merged = MergedOrder(streams, CHUNK_ROWS * data.seq_len)
    chunks = [merged.chunk(i) for i in range(merged.chunks)]
    documents = np.concatenate([chunk.documents for chunk in chunks])
    source = np.concatenate([chunk.source for chunk in chunks])
    return Order(merged, source, documents["record"], documents["length"])


def one_source(lengths: Sequence[int], seq_len: int) -> MergedOrder:
    return order_of(mix(seq_len, a={"epochs": 1}), [lengths], [sum(lengths)]).merged


# ---- amounts


@given(st.lists(awkward, min_size=3, max_size=3), st.floats(0.05, 5), st.floats(0.05, 0.6), st.integers(1, 500))
def test_each_source_gives_what_was_asked(lengths: list[list[int]], epochs: float, share: float, tokens: int) -> None:
    data = mix(a={"epochs": epochs}, b={"share": share}, c={"tokens": tokens})
    held = [sum(one) for one in lengths]
    assume(share * (tokens + epochs * held[0]) > 1)
    amounts = solve_mix(data, held)
    total = sum(amounts)
    assert amounts[0] == max(int(epochs) * held[0] + round((epochs - int(epochs)) * held[0]), 1)
    assert amounts[2] == tokens
    assert abs(amounts[1] - share * total) <= 2
    order = order_of(data, lengths, amounts)
    assert [int(order.length[order.source == i].sum(dtype=np.int64)) for i in range(3)] == amounts


@given(awkward, st.integers(1, 4), awkward)
def test_every_document_as_often_as_epochs_says(lengths: list[int], epochs: int, others: list[int]) -> None:
    data = mix(a={"epochs": epochs}, b={"epochs": 1})
    order = order_of(data, [lengths, others], solve_mix(data, [sum(lengths), sum(others)]))
    mine = order.source == 0
    assert Counter(order.document[mine].tolist()) == dict.fromkeys(range(len(lengths)), epochs)
    assert (order.length[mine] == np.array(lengths)[order.document[mine]]).all()
    assert order.counted == [(len(lengths) * epochs, 0), (len(others), 0)]


def test_a_part_of_an_epoch_cuts_its_last_document_alone() -> None:
    lengths = [7] * 40
    data = mix(a={"epochs": 0.55})
    order = order_of(data, [lengths], solve_mix(data, [280]))
    assert order.length.tolist() == [7] * 22 and order.counted == [(22, 0)]  # 154 tokens are 22 documents
    order = order_of(data, [lengths], [157])
    assert order.length.tolist() == [7] * 22 + [3] and order.counted == [(23, 4)]
    assert len(set(order.document.tolist())) == 23  # none twice within an epoch


def test_shares_of_one_fill_the_budget_to_the_token() -> None:
    data = mix(tokens=100, a={"share": 0.335}, b={"share": 0.335}, c={"share": 0.33})
    assert solve_mix(data, [50, 500, 500]) == [34, 33, 33]
    assert solve_mix(mix(tokens=1000, a={}, b={"epochs": 2}, c={"share": 0.25}), [500, 200, 10]) == [350, 400, 250]
    assert solve_mix(mix(a={"epochs": 1}, b={"share": 0.5}), [730, 11]) == [730, 730]  # 1:1 in tokens


@pytest.mark.parametrize(
    ("data", "held", "message"),
    [
        (mix(tokens=900, a={}, b={"epochs": 1}), [500, 300], "short by 100; lower data.tokens to 800"),
        (
            mix(tokens=900, a={}, b={"epochs": 3}),
            [500, 300],
            "already ask for 900 of the 900.*raise data.tokens above 900",
        ),
        (
            mix(tokens=900, a={"epochs": 1}, b={"epochs": 1}),
            [500, 300],
            "ask for 800 .* 100 short of .*set data.tokens to 800",
        ),
        (mix(tokens=700, a={"epochs": 1}, b={"epochs": 1}), [500, 300], "100 more than the budget of 700"),
        (mix(tokens=900, a={"share": 0.7}, b={"share": 0.4}), [500, 300], "sum to 1.1, 0.1 more than 1"),
        (mix(a={"share": 0.7}, b={"share": 0.3}), [500, 300], "data.tokens is missing.*set data.tokens"),
        (mix(a={}, b={"epochs": 1}), [500, 300], "the rest for source 'a' is unknown.*epochs: 1"),
        (
            mix(tokens=900, a={"share": 0.5, "max_epochs": 4}, b={}),
            [100, 800],
            "share 0.5 is 450 tokens, 4.5 epochs of its 100; max_epochs 4 allows 400, short by 50; raise max_epochs",
        ),
        (mix(a={"tokens": 900, "max_epochs": 2}), [100], "allows 200, short by 700; .* lower its tokens"),
        (mix(a={"epochs": 1}), [0], "no token is left"),
        (mix(tokens=900, a={}, b={"share": 0.0001}), [900, 300], "'b': share 0.0001 of 900 is less than a token"),
    ],
)
def test_what_cannot_be_met_is_refused(data: DataSettings, held: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        solve_mix(data, held)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "held", "message"),
    [
        (mix(tokens=1000, a={"share": 0.5}), [400], r"raise the shares \(sum 0.5\) to 1, or let one source"),
        (mix(tokens=1000, a={"share": 1.0}, b={"epochs": 1}), [400, 90], "lower the shares, which sum to 1"),
        (mix(tokens=100, a={}, b={"epochs": 1}, c={"share": 0.2}), [900, 400, 9], "raise data.tokens above 500,"),
        (mix(tokens=10**9, a={}, b={"epochs": 1}, c={"share": 0.5}), [900, 400, 9], "lower data.tokens to 2600,"),
        (mix(tokens=900, a={}, b={"share": 1.0}), [500, 300], "ask for 900 of the 900 tokens; lower those"),
    ],
)
def test_a_budget_is_named_where_shares_leave_one(data: DataSettings, held: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        solve_mix(data, held)


asked = st.one_of(
    st.just({}),
    st.floats(0.05, 5).map(lambda epochs: {"epochs": epochs}),
    st.floats(0.001, 1).map(lambda share: {"share": share}),
    st.integers(1, 5000).map(lambda tokens: {"tokens": tokens}),
)
capped = st.one_of(st.just({}), st.floats(0.5, 8).map(lambda most: {"max_epochs": most}))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(asked, capped, st.integers(1, 100_000)), min_size=1, max_size=4),
    st.one_of(st.integers(1, 10**9), st.integers(1, 10_000)),
)
def test_the_budget_that_a_refusal_names_is_accepted(parts: list[tuple[dict, dict, int]], tokens: int) -> None:
    assume(sum(not one for one, _, _ in parts) <= 1 and sum(one.get("share", 0) for one, _, _ in parts) <= 1)
    sources = {f"s{i}": one | cap for i, (one, cap, _) in enumerate(parts)}
    held = [one for _, _, one in parts]
    try:
        solve_mix(mix(tokens=tokens, **sources), held)
    except UserError as error:
        named = re.search(r"data.tokens (to|above) (\d+)", str(error))
        if named:
            solve_mix(mix(tokens=int(named[2]) + (named[1] == "above"), **sources), held)


def test_names_are_checked() -> None:
    with pytest.raises(UserError, match="'a' and 'b' state no amount"):
        check_sources(mix(a={}, b={}).sources)
    with pytest.raises(UserError, match="names 'x', which is not a source"):
        check_sources(mix(a={"exclude_converted": "x"}).sources)
    with pytest.raises(UserError, match="two sources have the name 'a'"):
        check_sources([*mix(a={}).sources, *mix(a={}).sources])
    with pytest.raises(pydantic.ValidationError, match="states epochs and share; keep one"):
        SourceMix(name="a", path="a", epochs=1, share=0.5)


# ---- order


@pytest.mark.parametrize("seed", [0, 1])
def test_any_window_of_rows_holds_the_shares(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = [np.clip(draw.lognormal(6, 1.2, n), 5, 20_000).astype(int) for n in (20_000, 9000, 500)]
    data = mix(2048, a={"epochs": 1}, b={"epochs": 2}, c={"epochs": 4})
    amounts = solve_mix(data, [int(one.sum()) for one in lengths])
    order = order_of(data, [one.tolist() for one in lengths], amounts)
    packings: list[BestFit | Concat] = [Concat(order.merged, 2048), BestFit(order.merged, 2048)]
    for packing in packings:
        held = np.zeros((packing.rows, 3))
        pieces = packing.pieces(0, packing.rows)
        np.add.at(held, (pieces["row"], pieces["source"]), pieces["length"])
        windows = np.cumsum(held, axis=0)[1000:-1] - np.cumsum(held, axis=0)[:-1001]  # without the padded last row
        shares = windows / windows.sum(axis=1, keepdims=True)
        assert np.abs(shares - np.array(amounts) / sum(amounts)).max() < 0.02


# ---- packing


@given(awkward, st.integers(2, 40))
def test_concat_puts_every_token_in_its_place(lengths: list[int], seq_len: int) -> None:
    order = one_source(lengths, seq_len)
    packing = Concat(order, seq_len)
    pieces = packing.pieces(0, packing.rows)
    assert packing.rows == -(-sum(lengths) // seq_len)
    assert (pieces["row"] * seq_len + pieces["at"]).tolist() == [0, *np.cumsum(pieces["length"])[:-1].tolist()]
    tokens = [(p["document"]["record"], p["offset"] + i) for p in pieces for i in range(p["length"])]
    documents = np.concatenate([order.chunk(i).documents for i in range(order.chunks)])
    assert tokens == [(d["record"], i) for d in documents for i in range(d["length"])]
    for row in range(packing.rows):
        assert packing.pieces(row, row + 1).tolist() == pieces[pieces["row"] == row].tolist()


@given(awkward, st.integers(2, 40))
def test_best_fit_keeps_documents_whole(lengths: list[int], seq_len: int) -> None:
    packing = BestFit(one_source(lengths, seq_len), seq_len)
    pieces = packing.pieces(0, packing.rows)
    filled = np.bincount(pieces["row"], pieces["length"], minlength=packing.rows)
    assert filled.min() > 0 and filled.max() <= seq_len
    for row in range(packing.rows):
        here = pieces[pieces["row"] == row]
        assert here["at"].tolist() == [0, *np.cumsum(here["length"])[:-1].tolist()]
        assert packing.pieces(row, row + 1).tolist() == here.tolist()
    found = sorted((int(p["document"]["record"]), int(p["offset"]), int(p["length"])) for p in pieces)
    wanted = [(d, at, min(seq_len, n - at)) for d, n in enumerate(lengths) for at in range(0, n, seq_len)]
    assert found == wanted


# ---- the plan over shards


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three texts of ten tokens' characters; the first is converted whole, of the second its middle."""
    root = tmp_path_factory.mktemp("corpora")
    write_tokens(root / "raw", random_documents([12, 12, 12, 7]), ids=["a", "b", "c", "d"], shards=2)
    spans = [[Parent("a", 0, 20), Parent("b", 6, 13)], [Parent("elsewhere", 0, 5)]]
    write_tokens(root / "augmented", random_documents([9, 5], 1), kind="augmented", parents=spans)
    write_tokens(root / "tasks", random_documents([30, 8, 11], 2), kind="task")
    write_tokens(root / "foreign", random_documents([4]), tokenizer="another")
    return root


def plan_of(root: Path, seq_len: int = 8, rows_per_step: int = 2, **changes: object) -> Plan:
    sources = changes.pop("sources", [{"name": "raw", "path": str(root / "raw"), "epochs": 1}])
    data = DataSettings.model_validate({"seq_len": seq_len, "sources": sources} | changes)
    return build_plan(data, rows_per_step=rows_per_step)


def test_converted_spans_drop_out_and_the_rest_stays(corpora: Path) -> None:
    sources = [
        {"name": "raw", "path": str(corpora / "raw"), "epochs": 1, "exclude_converted": "augmented"},
        {"name": "augmented", "path": str(corpora / "augmented"), "epochs": 2},
    ]
    plan = plan_of(corpora, seq_len=16, packing="best_fit", sources=sources)
    raw, augmented = plan.summary()["sources"]
    # b has BOS, ten tokens of two characters, EOS; [6, 13) ends tokens 4 to 6: BOS 1 2 3 and 7 8 9 10 EOS stay
    assert (raw["documents"], raw["tokens"]) == (4, 4 + 5 + 12 + 7)
    assert (raw["converted_documents"], raw["converted_tokens"], raw["converted_elsewhere"]) == (2, 12 + 3, 1)
    assert augmented["tokens"] == 2 * 14
    documents = random_documents([12, 12, 12, 7])
    wanted = {tuple(one) for one in (documents[1][:4], documents[1][7:], documents[2], documents[3])}
    found = set()
    for row in (row_fields(plan, row) for row in range(plan.rows)):
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            if row["kinds"][here][0] == 1:
                found.add(tuple(row["tokens"][here].tolist()))
                assert row["loss_mask"][here].tolist() == [True] * (here.sum() - 1) + [False]
    assert found == wanted


def test_what_stays_around_spans() -> None:
    ends = np.array([0, 3, 6, 9, 9])  # BOS, three words, EOS
    assert token_ranges_outside(ends, [(0, 3)]) == [(2, 5)]
    assert token_ranges_outside(ends, [(3, 6)]) == [(0, 2), (3, 5)]
    assert token_ranges_outside(ends, [(6, 9)]) == [(0, 3)]
    assert token_ranges_outside(ends, [(0, 9)]) == token_ranges_outside(ends, [(0, 3), (3, 9)]) == []
    assert token_ranges_outside(ends, [(2, 4)]) == [(2, 5)]  # a token goes when its last character does
    assert token_ranges_outside(ends, [(0, 3), (1, 5), (7, 9)]) == [(2, 3)]
    assert token_ranges_outside(np.array([0, 1, 2, 2, 2, 3, 3]), [(0, 2)]) == [
        (5, 7)
    ]  # the later bytes of a character go with it
    assert token_ranges_outside(np.array([0, 1, 2, 2, 2, 3, 3]), [(2, 3)]) == [(0, 5)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=15), st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9))))
def test_no_character_is_lost_or_kept_by_mistake(sizes: list[int], drawn: list[tuple[int, int]]) -> None:
    ends = np.cumsum([0, *sizes, 0])
    spans = sorted((start, start + size) for start, size in drawn)
    begins = np.concatenate([[0], ends[:-1]])
    gone = [any(a < end <= b for a, b in spans) for end in ends]
    kept = {token for low, high in token_ranges_outside(ends, spans) for token in range(low, high)}
    with_characters = [token for token in range(len(ends)) if ends[token] > begins[token]]
    assert [token for token in with_characters if not gone[token]] == [t for t in with_characters if t in kept]


def test_ids_that_cannot_be_matched(corpora: Path, tmp_path: Path) -> None:
    def excluding(raw: Path, augmented: Path) -> Plan:
        first = {"name": "raw", "path": str(raw), "epochs": 1, "exclude_converted": "augmented"}
        return plan_of(corpora, sources=[first, {"name": "augmented", "path": str(augmented), "epochs": 1}])

    twice = write_tokens(tmp_path / "twice", random_documents([5, 5]), ids=["a", "a"])
    with pytest.raises(UserError, match="several of its documents share"):
        excluding(twice, corpora / "augmented")
    with pytest.raises(UserError, match="none of the 3 texts to exclude is among its ids"):
        excluding(write_tokens(tmp_path / "other", random_documents([5])), corpora / "augmented")


def table_lines(summary: dict[str, Any], width: int = 200) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(plan_summary_table(summary))
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_summary_fingerprint_and_table(corpora: Path) -> None:
    sources = [
        {"name": "raw", "path": str(corpora / "raw")},
        {"name": "[/tasks]", "path": str(corpora / "tasks"), "epochs": 0.5},
    ]
    plan = plan_of(corpora, tokens=60, sources=sources)
    summary = plan.summary()
    assert [s["asked"] for s in summary["sources"]] == ["the rest", "epochs 0.5"]
    assert [s["kind"] for s in summary["sources"]] == ["raw", "task"]
    assert [s["tokens"] for s in summary["sources"]] == [36, 24]
    assert sum(s["share"] for s in summary["sources"]) == 1
    assert (summary["rows"], summary["steps"], summary["tokens"], summary["seq_len"]) == (8, 4, 60, 8)
    assert summary["padding_fraction"] == pytest.approx(4 / 64)
    assert summary["fingerprint"] == plan_of(corpora, tokens=60, sources=sources).fingerprint
    others: list[dict] = [{"seed": 1}, {"packing": "best_fit"}, {"rows_per_step": 4}, {"tokens": 59}]
    prints = {plan_of(corpora, **({"tokens": 60, "sources": sources} | change)).fingerprint for change in others}
    assert len(prints | {plan.fingerprint}) == 5
    lines = table_lines(summary)
    assert lines[0] == "60 tokens in 8 rows of 8 (concat)"
    assert lines[4:6] == ["raw raw the rest 3 36 60.00% 0.8372 of 1", "[/tasks] task epochs 0.5 2 24 40.00% 0.4898"]
    assert lines[7].startswith("4 steps of 2 rows, padding 6.250%, 17 tokens cut from last documents")
    repeated = {"name": "raw", "path": str(corpora / "raw"), "tokens": 86}
    assert table_lines(plan_of(corpora, sources=[repeated]).summary())[4] == "raw raw tokens 86 8 86 100.00% 2 (no cap)"
    assert (plan.vocab_size, plan.tokenizer_dir) == (100, corpora / "raw" / "tokenizer")


def test_a_plan_of_100b_tokens_fits_a_narrow_terminal(corpora: Path) -> None:
    summary = plan_of(corpora).summary()
    large = {"tokens": 80_000_000_000, "documents": 160_000_000, "epochs": 1.25, "max_epochs": 16}
    summary["sources"] = [summary["sources"][0] | large | {"asked": "tokens 80,000,000,000"}]
    assert "160,000,000 80,000,000,000 100.00% 1.25 of 16" in "\n".join(table_lines(summary, width=80))


def test_another_tokenizer_is_refused(corpora: Path) -> None:
    listed = [{"name": name, "path": str(corpora / name), "epochs": 1} for name in ("raw", "foreign")]
    with pytest.raises(UserError, match="sources 'raw' .* and 'foreign' .* different tokenizers"):
        plan_of(corpora, sources=listed)


@pytest.mark.parametrize("damage", ["cut", "side flip", "side gone"])
def test_damaged_input_is_named(tmp_path: Path, damage: str) -> None:
    root = write_tokens(tmp_path / "raw", random_documents([50] * 40), shards=2).parent
    name = "tokens-00001-of-00002" + (".index.npy" if damage.startswith("side") else ".array_record")
    file = tmp_path / "raw" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "side gone":
        file.unlink()
    else:
        file.write_bytes(data[:-7] if damage == "cut" else data)
    with pytest.raises(UserError, match=name):
        plan_of(root)


@st.composite
def documents_with_loss(draw: st.DrawFn) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Documents, and target ranges in each: in order, some touching, some empty lists."""
    documents = random_documents(draw(st.lists(st.integers(2, 40), min_size=1, max_size=20)), draw(st.integers(0, 9)))
    runs = []
    for document in documents:
        cuts = draw(st.lists(st.integers(0, len(document)), max_size=6, unique=True).map(sorted))
        runs.append(list(zip(cuts[0::2], cuts[1::2], strict=False)))
    return documents, runs


@settings(max_examples=20)
@given(
    documents_with_loss(),
    st.integers(2, 24),
    st.sampled_from(["concat", "best_fit"]),
    st.integers(1, 3),
    st.sampled_from([1, 64, 1 << 17]),
)
def test_no_token_or_target_is_lost_on_the_way_to_the_rows(
    tmp_path_factory: pytest.TempPathFactory,
    given_documents: tuple[list[list[int]], list[list[tuple[int, int]]]],
    seq_len: int,
    packing: str,
    epochs: int,
    block_tokens: int,
) -> None:
    """Through cuts, epochs, blocks over shards and many windows."""
    documents, runs = given_documents
    root = tmp_path_factory.mktemp("p")
    write_tokens(root / "raw", documents, loss_runs=runs, shards=min(len(documents), 3))
    sources = [{"name": "raw", "path": str(root / "raw"), "epochs": epochs}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipt_jax.data.block_table.BLOCK_TOKENS", block_tokens)
        patch.setattr("ipt_jax.data.block_table.MIN_BLOCKS", 1)
        patch.setattr("ipt_jax.data.shuffle.WINDOW_DOCUMENTS", 3)
        patch.setattr("ipt_jax.data.plan.CHUNK_ROWS", 3)
        plan = plan_of(root, seq_len, packing=packing, sources=sources)
        rows = plan.batch(range(plan.rows + 2))
        assert all((row_fields(plan, 1)[name] == rows[name][1]).all() for name in rows)
    tokens = Counter(token for document in documents for token in document for _ in range(epochs))
    assert Counter(rows["tokens"][rows["segment_ids"] > 0].tolist()) == tokens
    targets = Counter(
        document[t]
        for document, mine in zip(documents, runs, strict=True)
        for a, b in mine
        for t in range(max(a, 1), b)
        for _ in range(epochs)
    )
    assert Counter(rows["targets"][rows["loss_mask"]].tolist()) == targets
    assert not rows["kinds"][rows["segment_ids"] == 0].any() and not rows["segment_ids"][-2:].any()


def test_the_block_table_is_kept_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tokens(tmp_path / "raw", random_documents([30] * 40)).parent
    first = plan_of(root).fingerprint
    (kept,) = (tmp_path / "raw").glob("blocks-*.npz")
    assert plan_of(root).fingerprint == first
    kept.write_bytes(kept.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"blocks-.*\.npz: damaged .*delete it"):
        plan_of(root)
    kept.unlink()
    assert plan_of(root).fingerprint == first and kept.is_file()
    assert not capsys.readouterr().err


def test_a_kept_table_is_for_everybody_and_a_closed_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tokens(tmp_path / "raw", random_documents([30] * 40)).parent
    before = os.umask(0o022)
    try:
        first = plan_of(root).fingerprint
    finally:
        os.umask(before)
    (kept,) = (tmp_path / "raw").glob("blocks-*.npz")
    assert kept.stat().st_mode & 0o777 == 0o644
    read = Path.read_bytes

    def closed(path: Path) -> bytes:
        if path == kept:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", closed)
    assert plan_of(root).fingerprint == first
    assert [path.name for path in kept.parent.glob("blocks-*")] == [kept.name]


def test_a_table_that_cannot_be_kept_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    plan_of(write_tokens(tmp_path / "raw", random_documents([30] * 40)).parent)
    assert "cannot save the block table (No space left on device)" in capsys.readouterr().err
    assert not list((tmp_path / "raw").glob("blocks-*"))
