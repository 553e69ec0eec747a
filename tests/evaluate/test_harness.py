"""The harness's interface over a JAX model: tokens, windows, stops, the journal, and the harness itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from extras import need
from hypothesis import given
from hypothesis import strategies as st
from token_shards import save_tokenizer
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

import ipt_jax
from ipt_jax.core.errors import UserError
from ipt_jax.corpus.tokenizer import load_tokenizer
from ipt_jax.evaluate import run_eval
from ipt_jax.evaluate.harness import HarnessLM, RequestJournal, windows
from ipt_jax.evaluate.lm_eval_ import Request
from ipt_jax.inference.language_model import LanguageModel
from ipt_jax.model.config import ModelConfig
from ipt_jax.model.decoder import init_params

CONTEXT = 64
GREEDY = {"until": [], "max_gen_toks": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes and a few words, among them `a b` and `xy`, which cross a seam; BOS is 0, EOS 1."""
    path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet, "xy", "Ġt", "Ġth", "Ġthe"])}
    merges = [("x", "y"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    tokenizer = JsonTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    config = ModelConfig(
        vocab_size=264, hidden_size=32, layers=2, q_heads=4, kv_heads=2, head_dim=8, intermediate_size=48,
        max_positions=CONTEXT, bos_id=0, eos_id=1, initializer_range=0.4,
    )  # fmt: skip
    return LanguageModel(config, init_params(config, jax.random.key(0)), load_tokenizer(folder))


@pytest.fixture(scope="module")
def lm(model: LanguageModel) -> HarnessLM:
    return HarnessLM(model, batch_tokens=64)


def ids_of(lm: HarnessLM, text: str) -> list[int]:
    return lm.model.encode(text, continuing=True)


def logprob(lm: HarnessLM, ids: list[int], count: int) -> float:
    """Of the last `count` ids after those before them."""
    logits = lm.model.logits(ids + [0] * (CONTEXT + 1 - len(ids))).astype(np.float64)
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(ids) - count, len(ids))
    return float(table[at - 1, [ids[i] for i in at]].sum())


def scores(lm: HarnessLM, *pairs: tuple[str, str]) -> list[float]:
    return [found[0] for found in lm.loglikelihood([Request(pair) for pair in pairs])]


def test_a_pair_is_encoded_together_and_cut_after_its_context(lm: HarnessLM) -> None:
    whole = [0, *ids_of(lm, "see the")]
    assert (
        scores(lm, ("see", " the")) == scores(lm, ("see ", "the")) == pytest.approx([logprob(lm, whole, 1)], abs=1e-4)
    )
    (found,) = lm.loglikelihood([Request(("see", " the"))])
    assert (found.tokens, found.truncated, tuple(found)) == (1, False, (found[0], False))


def test_an_empty_context_is_bos_once(lm: HarnessLM) -> None:
    expected = pytest.approx(logprob(lm, [0, *ids_of(lm, "cat")], 3), abs=1e-4)
    assert scores(lm, ("", "cat"))[0] == expected
    assert scores(lm, (" ", "cat"))[0] == pytest.approx(logprob(lm, [0, *ids_of(lm, " cat")], 4), abs=1e-4)
    spelled = HarnessLM(lm.model, read_controls=True, batch_tokens=64)
    assert scores(spelled, ("", "<s>cat"))[0] == expected, "a spelled BOS is the prefix, not a second one"
    assert spelled.tok_encode("<s>cat") == spelled.tok_encode("cat") == [0, *ids_of(lm, "cat")]


def test_bos_can_be_left_out(lm: HarnessLM) -> None:
    """The fault of MMLU-like tasks: with and without BOS differ, and the default is that of training."""
    without = HarnessLM(lm.model, add_bos=False, batch_tokens=64)
    assert scores(without, ("see", " it"))[0] == pytest.approx(logprob(lm, ids_of(lm, "see it"), 3), abs=1e-4)
    assert scores(lm, ("see", " it"))[0] == pytest.approx(logprob(lm, [0, *ids_of(lm, "see it")], 3), abs=1e-4)
    assert scores(without, ("", "it")) == scores(lm, ("", "it")), "an empty context is BOS in both"


def test_a_token_across_the_seam_is_encoded_alone(lm: HarnessLM) -> None:
    """`x` + `y` is one token, so that nothing is left for the continuation."""
    before = lm.counts["encoded alone"]
    assert scores(lm, ("x", "y"))[0] == pytest.approx(logprob(lm, [0, *ids_of(lm, "x"), *ids_of(lm, "y")], 1), abs=1e-4)
    assert lm.counts["encoded alone"] == before + 1
    assert tuple(lm.loglikelihood([Request(("x", ""))])[0]) == (0.0, True), "nothing is certain"


def test_a_long_context_loses_its_start(lm: HarnessLM) -> None:
    text = "".join(chr(97 + i % 26) for i in range(100))
    ids = [0, *ids_of(lm, text + "!?")]
    (found,) = lm.loglikelihood([Request((text, "!?"))])
    assert found[0] == pytest.approx(logprob(lm, ids[-(CONTEXT + 1) :], 2), abs=1e-4) and found.truncated


def test_an_option_longer_than_the_context_is_scored_in_windows(lm: HarnessLM) -> None:
    option = "".join(chr(97 + i * 7 % 26) for i in range(CONTEXT + 30))
    ids = ids_of(lm, "c" + option)
    first, rest = ids[: CONTEXT + 1], ids[-(CONTEXT + 1) :]
    expected = logprob(lm, first, CONTEXT) + logprob(lm, rest, 30)
    (found,) = lm.loglikelihood([Request(("c", option))])
    assert found[0] == pytest.approx(expected, abs=1e-3) and found.tokens == CONTEXT + 30 and found.truncated


def test_a_score_does_not_depend_on_its_company(lm: HarnessLM) -> None:
    contexts = ["Where is it?", "Where is he?", "é 東京", "one two three four five six"]
    pairs = [(context, f" {choice}") for context in contexts for choice in ("A", "B", "the cat", "a long answer")]
    together = scores(lm, *pairs, *pairs)
    assert together[: len(pairs)] == together[len(pairs) :]
    assert [scores(lm, pair)[0] for pair in pairs[:5]] == pytest.approx(together[:5], rel=1e-6)
    larger = HarnessLM(lm.model, batch_tokens=1024)
    assert scores(larger, *pairs) == pytest.approx(together[: len(pairs)], rel=1e-6)


def test_equal_choices_tie(lm: HarnessLM) -> None:
    first, second = lm.loglikelihood([Request(("Where?", " here")), Request(("Where?", " here"))])
    assert first == second


def test_a_rolling_text_has_one_bos(lm: HarnessLM) -> None:
    text = "the cat sat on the mat. " * 6
    ids = ids_of(lm, text)
    expected = sum(logprob(lm, a + b, len(b)) for a, b in windows(ids, 0, CONTEXT))
    assert lm.loglikelihood_rolling([Request((text,)), Request(("",))]) == [pytest.approx(expected, abs=1e-3), 0.0]
    assert lm.loglikelihood_rolling([Request(("", text))]) == [(pytest.approx(expected, abs=1e-3), False)], (
        "lm_eval 0.5"
    )


def greedy(lm: HarnessLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != 1:
        ids.append(int(lm.model.logits(ids + [0] * (CONTEXT + 1 - len(ids)))[len(ids) - 1].argmax()))
    return [token for token in ids[len(prompt) :] if token != 1]


def generated(lm: HarnessLM, prompt: str, **settings: Any) -> str:
    return lm.generate_until([Request((prompt, {**GREEDY, **settings}))])[0]


def test_generation_is_greedy_and_ends_at_a_stop_that_spans_tokens(lm: HarnessLM) -> None:
    prompt = "Where is it"
    text = lm.model.tokenizer.decode(greedy(lm, lm.tok_encode(prompt), 12))  # type: ignore[union-attr]
    assert generated(lm, prompt) == text and len(text) >= 6
    stop = text[3:6]
    assert generated(lm, prompt, until=[stop, "never"]) == text[: text.index(stop)]
    assert generated(lm, prompt, until=stop, max_gen_toks=None, max_new_tokens=12) == text[: text.index(stop)]
    assert generated(lm, f"{prompt}", until=["Where"]) == text, "a stop of the prompt is not one of the answer"
    assert generated(lm, prompt, max_gen_toks=2) == lm.model.tokenizer.decode(greedy(lm, lm.tok_encode(prompt), 2))  # type: ignore[union-attr]


def test_a_prompt_longer_than_the_context_loses_its_start(lm: HarnessLM) -> None:
    prompt = "".join(chr(97 + i * 5 % 26) for i in range(200))
    kept = ids_of(lm, prompt)[-(CONTEXT - 12) :]
    assert generated(lm, prompt) == lm.model.tokenizer.decode(greedy(lm, kept, 12))  # type: ignore[union-attr]
    with pytest.raises(UserError, match="256 new tokens leave no room for a prompt in a context of 64"):
        generated(lm, "x", max_gen_toks=None)


def test_sampling_depends_on_the_request_alone(lm: HarnessLM) -> None:
    warm = {**GREEDY, "do_sample": True, "temperature": 1.0}
    asked = [Request(("Where", warm)), Request(("Where", warm)), Request(("Who", warm))]
    found = lm.generate_until(asked)
    assert found[0] != found[1], "a repeated request draws again"
    assert lm.generate_until(asked[:1]) == found[:1] and lm.generate_until(asked[2:]) == found[2:]
    with pytest.raises(UserError, match="generation setting 'num_beams' is not supported"):
        generated(lm, "x", num_beams=4)
    with pytest.raises(UserError, match="generation setting 'top_p'"):
        generated(lm, "x", do_sample=True, temperature=1.0, top_p=0.9)
    assert generated(lm, "x", do_sample=False, top_p=0.9) == generated(lm, "x")


def test_a_journal_holds_what_is_done(tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out" / "eval.json.journal"
    first = HarnessLM(model, batch_tokens=64, journal=RequestJournal(path, "model 1"))
    pairs, prompts = [("a", " b"), ("a", " c")], [Request(("x", GREEDY)), Request(("y", GREEDY))]
    expected = scores(first, *pairs), first.generate_until(prompts), first.loglikelihood_rolling([Request(("abc",))])
    with pytest.raises(UserError, match="another run is writing here"):
        RequestJournal(path, "model 1")
    first.journal._file.close()  # type: ignore[union-attr]
    with path.open("a") as file:
        file.write("a torn li")
    again = HarnessLM(model, batch_tokens=64, journal=RequestJournal(path, "model 1"))
    assert len(again.journal) == 5
    monkeypatch.setattr(LanguageModel, "scorer", lambda *_: pytest.fail("everything is in the journal"))
    with monkeypatch.context() as patch:
        patch.setattr("ipt_jax.evaluate.harness.pack", lambda pairs: [] if not pairs else pytest.fail("computed again"))
        patch.setattr(LanguageModel, "scorer", lambda *_: type("No", (), {"batches": lambda self, rows: iter(())})())
        assert scores(again, *pairs) == expected[0]
        assert again.loglikelihood_rolling([Request(("abc",))]) == expected[2]
    assert again.generate_until(prompts) == expected[1]
    again.journal.remove()
    assert not path.exists()
    path.write_text("another model\n" + "0" * 64 + " 1\n")
    assert len(RequestJournal(path, "model 1")) == 0


def test_models_that_cannot_be_scored(model: LanguageModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer files"):
        HarnessLM(LanguageModel(model.config, model.params))
    with pytest.raises(UserError, match="max_length is 65; expected 2 to 64"):
        HarnessLM(model, max_length=65)
    broken = LanguageModel(model.config, jax.tree.map(lambda x: x * np.nan, model.params), model.tokenizer)
    with pytest.raises(UserError, match="not numbers; its weights are damaged"):
        scores(HarnessLM(broken, batch_tokens=64), ("a", "b"))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": null}')
    bare = HarnessLM(LanguageModel(model.config, model.params, load_tokenizer(tmp_path)))
    assert bare.tok_encode("ab") == ids_of(bare, "ab")
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        bare.loglikelihood_rolling([Request(("a",))])


def test_whether_transformers_adds_bos(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(folder).hf_rules() == (False, True)
    tokenizer = JsonTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).hf_rules() == (True, True)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "split_special_tokens": true}')
    assert load_tokenizer(tmp_path).hf_rules() == (True, False), "transformers 5 does not read add_bos_token"


@given(st.lists(st.integers(3, 99), min_size=1, max_size=40), st.integers(1, 12))
def test_windows_score_every_token_once(ids: list[int], context: int) -> None:
    pairs = list(windows(ids, 1, context))
    assert [token for _, continuation in pairs for token in continuation] == ids
    joined, end = [1, *ids], 1
    for prompt, continuation in pairs:
        end += len(continuation)
        assert joined[: end - len(continuation)][-len(prompt) :] == prompt, "what precedes it"
        assert len(prompt) + len(continuation) == min(end, context + 1), "as much as the context holds"


def test_the_text_that_windows_show() -> None:
    assert list(windows([5, 6, 7, 8, 9], 1, 3)) == [([1], [5, 6, 7]), ([6, 7], [8, 9])]
    assert list(windows([5, 6, 7], 1, 3)) == [([1], [5, 6, 7])]


# ---- against the harness


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral with a context of 48, as transformers saves it."""
    torch, transformers = need("torch", extra="test"), need("transformers", extra="test")
    directory = save_tokenizer(tmp_path_factory.mktemp("hf") / "model")
    controls = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **controls}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=48, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        sliding_window=None,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(directory)
    return directory


QUESTIONS = [
    {"prompt": f"w{n} and the text number {n % 5}", "choices": [f"w{n + 1}", "the text", "é"], "gold": n % 3}
    for n in range(8)
]
YAML = {
    "pick": {"output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "choices",
             "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt * 4}}",
             "metric_list": [{"metric": "bits_per_byte"}]},
    "tell": {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{choices[0]}}",
             "generation_kwargs": {"until": ["\n", "the"], "max_gen_toks": 8},
             "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


def write_tasks(folder: Path) -> None:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, task in YAML.items():
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        shots = {"fewshot_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **task, **local, **shots}))


@pytest.mark.extra
@pytest.mark.parametrize("shots", [0, 2])
def test_the_harness_gives_the_same_results_with_backend_hf(tmp_path: Path, exported: Path, shots: int) -> None:
    need("lm_eval", extra="evals")
    write_tasks(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": row["prompt"] * 3}) + "\n" for row in QUESTIONS))
    tasks = [*YAML, str(tmp_path / "texts.jsonl")]
    options: dict[str, Any] = {"include_path": tmp_path, "num_fewshot": shots}
    ours, theirs = (
        run_eval(str(exported), tasks, backend=backend, output=tmp_path / f"{backend}.json", **options)
        for backend in ("jax", "hf")
    )
    for name in [*YAML, "texts"]:
        for key, value in ours["results"][name].items():
            other = theirs["results"][name][key]
            same = value == other if isinstance(value, str) else value == pytest.approx(other, rel=1e-5)
            assert same or "," not in key, (name, key, value, other)
    rows = [[json.loads(line) for line in (tmp_path / f"{backend}.rows.jsonl").open()] for backend in ("jax", "hf")]
    assert [row.get("prediction") for row in rows[0]] == [row.get("prediction") for row in rows[1]]
    assert ours["n-shot"] == {"pick": shots, "roll": shots, "tell": shots, "texts": 0}


@pytest.mark.extra
def test_requests_are_those_of_backend_hf(exported: Path) -> None:
    """Texts shorter and longer than the context of 48, one of exactly 48 tokens, and cut contexts."""
    HFLM = need("lm_eval.models.huggingface", extra="evals").HFLM
    Instance = need("lm_eval.api.instance", extra="evals").Instance
    loaded = ipt_jax.load(str(exported))
    ours = HarnessLM(loaded, add_bos=True, read_controls=True, batch_tokens=64)
    theirs = HFLM(str(exported), device="cpu", dtype="float32", batch_size=4)
    words = " ".join(f"w{number % 7} and the text" for number in range(60))
    exact = next(words[:end] for end in range(len(words)) if len(loaded.encode(words[:end])) == 49)
    pairs = [("the", " text"), ("", "text"), (words, " the"), ("and ", "w3 é 東京"), ("w1", " and the"), ("w1", " w2")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
    texts = ["short text", exact, words, words + " é 東京\n more"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    once = HFLM(str(exported), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(once.loglikelihood_rolling(asked, True), rel=1e-5)
    settings = {"until": ["the"], "max_gen_toks": 10}
    asked = [Instance("generate_until", {}, (text, dict(settings)), number) for number, text in enumerate(texts)]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


@pytest.mark.extra
def test_the_harness_takes_the_object(tmp_path: Path, exported: Path) -> None:
    """`lm_eval.simple_evaluate(model=HarnessLM(...))`, with its cache, and samples for its viewers."""
    lm_eval = need("lm_eval", extra="evals")
    manager = need("lm_eval.tasks", extra="evals").TaskManager
    need("sqlitedict", extra="evals")
    write_tasks(tmp_path)
    made = HarnessLM(ipt_jax.load(str(exported)), batch_tokens=64)
    known = manager(include_path=str(tmp_path), include_defaults=False)
    options = {"tasks": ["pick"], "task_manager": known, "use_cache": str(tmp_path / "cache"), "bootstrap_iters": 0}
    first = lm_eval.simple_evaluate(model=made, **options)
    assert first["config"]["model_num_parameters"] > 0 and first["config"]["add_bos_token"] is True
    assert lm_eval.simple_evaluate(model=made, **options)["results"] == first["results"]
    run_eval(str(exported), ["pick"], include_path=tmp_path, output=tmp_path / "o" / "eval.json", log_samples=True)
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names[:2] == ["eval.json", "eval.rows.jsonl"] and names[2].startswith("samples_pick_")
    lines = [json.loads(line) for line in (tmp_path / "o" / names[2]).open()]
    assert len(lines) == 8 and lines[0]["arguments"]["gen_args_0"]["arg_1"] == " w1"
    assert math.isclose(float(lines[0]["resps"][0][0][0]), float(lines[0]["filtered_resps"][0][0]))


@pytest.mark.extra
def test_unknown_tasks_and_data_are_named(tmp_path: Path) -> None:
    need("lm_eval", extra="evals")
    from ipt_jax.evaluate.run import TaskSet

    with pytest.raises(UserError, match="'arc_eazy': neither a file nor a task of lm-evaluation-harness; did you mean"):
        TaskSet.read(["arc_eazy"])
    write_tasks(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="tasks pick: cannot be loaded"):
        TaskSet.read(["pick"], include_path=tmp_path)
