"""`ipt compile`: how a program's text is read, what a topology may be, and the bars of the 1.3B step.

The compilers live in an environment of their own (launch/setup.sh compile-gpu compile-tpu): IPT_COMPILE_VENV, else
.venv-compile. Figures read from compiled programs do not depend on the machine, so they are asserted; times are not.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from extras import ROOT, ask_for_extra, in_ci
from trainkit import model_of, program_of, recipe_of

from ipt_jax.compile.command import search, sizes
from ipt_jax.compile.hlo import attention_kernels, collectives
from ipt_jax.compile.measure import _needed, ideal_fsdp
from ipt_jax.config import Recipe
from ipt_jax.core.errors import UserError
from ipt_jax.hf.config import resolve_model
from ipt_jax.model.config import ModelSettings
from ipt_jax.model.flops import recomputed_flops_per_token, visible_pairs
from ipt_jax.parallel.topology import parse_topology, prepare_environment
from ipt_jax.train.step import _attention

GPU = """
HloModule jit_step

%body (p: (s32[], bf16[256,64])) -> (s32[], bf16[256,64]) {
  %gather = (bf16[32,64]{1,0}, bf16[256,64]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %done = bf16[256,64]{1,0} all-gather-done(%gather)
  %scatter = ((bf16[256,64]{1,0}, f32[64]{0}), (bf16[32,64]{1,0}, f32[8]{0})) reduce-scatter-start(%y, %z), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}
  %attend = (bf16[1], u8[8]) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (s32[], bf16[256,64]) tuple(%i, %done)
}

%condition (p: (s32[], bf16[256,64])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], /*index=1*/bf16[256,64]) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"20"}}
  %back = (bf16[1], u8[8]) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %sum = f32[8]{0} all-reduce(%a), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
TPU = """
HloModule jit_step

%fused.1 (p: bf16[8,128]) -> bf16[64,128] {
  %g = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %s = (bf16[8,128], bf16[64,128]) custom-call(%p, %g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[8,128]) -> bf16[64,128] {
  ROOT %g = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
}

%fused.2 (p: bf16[8,128]) -> bf16[64,128] {
  %g = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %d = bf16[64,128] custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: bf16[64,128]) -> bf16[8,128] {
  %sum = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[8,128]{1,0} dynamic-slice(%sum, %i)
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %start = bf16[64,128]{1,0} fusion(%p), kind=kCustom, calls=%fused.1
  %middle = bf16[64,128]{1,0} fusion(%start), kind=kOutput, calls=%async_collective_fusion.1
  %end = bf16[64,128]{1,0} fusion(%middle), kind=kCustom, calls=%fused.2
  %cut = bf16[8,128]{1,0} fusion(%end), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[8,128]) tuple(%i, %cut)
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(20)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %one = s32[]{:T(128)} constant(1)
  %begun = s32[]{:T(128)} copy(%one)
  %init = (s32[], bf16[8,128]) tuple(%begun, %a)
  %w = (s32[], bf16[8,128]) while(%init), condition=%condition, body=%body
  %move = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %splash_mha_fwd_residuals.4 = (f32[512,128]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %r = bf16[8,128] get-tuple-element(%w), index=1
}
"""


def told(text: str) -> list[tuple[Any, ...]]:
    return [(one.kind, one.dtype, one.size, len(one.group), one.times, one.sent) for one in collectives(text)]


def test_a_gpu_program_is_read() -> None:
    """20 turns of the loop; 32 KiB gathered and scattered over eight, 7/8 of it sent; an all-reduce sends it twice."""
    assert told(GPU) == [
        ("all-gather", "bf16", 32768, 8, 20, 20 * 28672),
        ("reduce-scatter", "bf16", 32768, 8, 20, 20 * 28672),
        ("reduce-scatter", "f32", 256, 8, 20, 20 * 224),
        ("all-reduce", "f32", 32, 4, 1, 48),
    ]
    assert attention_kernels(GPU) == {"cudnn": {"forward": 1, "backward": 1}}


def test_a_tpu_program_is_read() -> None:
    """19 turns from 1 to 20; the three pieces of one asynchronous gather are one; a fused reduce-scatter is one."""
    assert told(TPU) == [
        ("all-gather", "bf16", 16384, 8, 19, 19 * 14336),
        ("reduce-scatter", "bf16", 16384, 8, 19, 19 * 14336),
        ("collective-permute", "bf16", 2048, 2, 1, 2048),
    ]
    assert attention_kernels(TPU) == {"splash": {"forward": 1, "backward": 0}}


def test_the_ideal_schedule_by_hand() -> None:
    """Of 2,048 x 4 bytes split over 8: 7/8 sent, gathers twice, two micro-batches; norms are summed once."""
    model = model_of(
        tie_embeddings=True, layers=1, vocab_size=8, hidden_size=8, q_heads=1, kv_heads=1, intermediate_size=8
    )
    recipe = recipe_of(mesh={"fsdp": 8}, train={"microbatch": 1})
    program = program_of(recipe, model, 8)
    split = 8 * 8 + 4 * 8 * 8 + 3 * 8 * 8  # embedding, attention, feed-forward; head_dim is 8
    norms = 3 * 8
    assert ideal_fsdp(program) == {
        "all-gather": 2 * 2 * sum(size * 4 * 7 // 8 for size in [64] * 8),
        "reduce-scatter": 2 * sum(size * 4 * 7 // 8 for size in [64] * 8),
        "all-reduce": 2 * 4 * norms * 7 // 8,
    }
    assert split == 64 * 8


def test_recomputation_by_hand() -> None:
    model = model_of(layers=1, hidden_size=4, q_heads=2, kv_heads=1, head_dim=2, intermediate_size=8, vocab_size=16)
    attention = 2 * 2 * 2 * (1 + 2) / 2  # 2 heads of 2, scores and sums; a row of 2 has 3 pairs
    products = 4 * (4 + 2 + 2 + 4 + 8 + 8)
    assert recomputed_flops_per_token(model, 2, "none") == 0
    assert recomputed_flops_per_token(model, 2, "dots") == 2 * attention
    assert recomputed_flops_per_token(model, 2, "full") == 2 * (products + attention)
    assert recomputed_flops_per_token(model, 2, ("gate", "up")) == 2 * (products - 4 * 16 + attention)


# ---- topologies


def test_topologies() -> None:
    found = {name: parse_topology(name) for name in ("h100:8", "a100:64", "v5e:4x4", "v5p:4x4x4", "v6e:2x2")}
    assert {name: (one.platform, one.devices) for name, one in found.items()} == {
        "h100:8": ("gpu", 8), "a100:64": ("gpu", 64), "v5e:4x4": ("tpu", 16), "v5p:4x4x4": ("tpu", 64), "v6e:2x2": ("tpu", 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("h100", "use h100:N"),
        ("h100:0", "use h100:N"),
        ("h100:12", "a multiple of 8, the GPUs of a node; use h100:8"),
        ("b200:8", "'b200:8' is unknown"),
        ("v5e:16", "use h100:N"),
        ("v5e:4x4x4", "a v5e slice has 2 sides, as in v5e:4x4"),
        ("v5p:4x4", "a v5p slice has 3 sides"),
    ],
)
def test_other_topologies_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        parse_topology(text)
    assert "\n" not in str(error.value)


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for topology, extra in (("h100:8", "compile-gpu"), ("v5e:4x4", "compile-tpu")):
        with pytest.raises(UserError, match=f"launch/setup.sh {extra}"):
            prepare_environment(parse_topology(topology), "unused")


# ---- the search


def test_sizes_divide_the_rows_of_a_shard() -> None:
    assert sizes(96, 8) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize(("fits", "found"), [(0, None), (1, 1), (5, 4), (6, 6), (99, 12)])
def test_the_largest_that_fits_is_found_with_few_compilations(fits: int, found: int | None) -> None:
    tried: list[int] = []

    def compile_step(recipe: Recipe, *_: object) -> dict[str, Any]:
        size = recipe.train.microbatch
        tried.append(size)
        figures = {"predicted_tokens_per_second": size, "peak_bytes_per_device": 0, "compile_seconds": 0}
        return {"microbatch": size, "fits": size <= fits and recipe.train.remat == "none", **figures}

    recipe = recipe_of(data={"seq_len": 64}, train={"batch_tokens": 96 * 64})
    frontier, _ = search(recipe, model_of(), parse_topology("h100:8"), 8, compile_step)
    assert (frontier[0]["microbatch"] if frontier else None) == found
    assert len(tried) <= 3 * 4  # of six sizes, for each of four ways of recomputing


def test_what_libtpu_says_of_too_large_a_program() -> None:
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.10G of 15.75G hbm. Exceeded hbm capacity by 1.35G."
    assert _needed(said) == int(17.10 * 2**30)
    assert _needed("INTERNAL: something else") is None


# ---- rows that cuDNN gets wrong


def choice(kind: str, seq_len: int, head_dim: int = 128, **train: Any) -> tuple[str, str]:
    """What `build_program` takes for a GPU of this kind: kernel and reason."""
    recipe = recipe_of(data={"seq_len": seq_len, "cross_document": "block"}, train=train)
    return _attention(recipe, model_of(head_dim=head_dim), kind, "gpu")[:2]


@pytest.mark.parametrize("attention", ["auto", "cudnn"])
@pytest.mark.parametrize(
    ("kind", "seq_len", "lengths"),
    [
        ("NVIDIA H100 80GB HBM3", 2000, "1920 or 2048"),
        ("NVIDIA H100 PCIe", 192, "128 or 256"),
        ("NVIDIA H200", 2047, "1920 or 2048"),
        ("NVIDIA GH200 480GB", 64, "128"),
    ],
)
def test_rows_whose_gradients_are_nan_on_hopper_are_refused(
    kind: str, seq_len: int, lengths: str, attention: str
) -> None:
    with pytest.raises(UserError) as refused:
        choice(kind, seq_len, attention=attention)
    assert str(refused.value) == (
        f"data.seq_len must be a multiple of 128 with data.cross_document: block on {kind}, got {seq_len} "
        f"(NaN in cuDNN's backward pass); set data.seq_len to {lengths}, or train.attention to xla"
    )


def test_other_rows_and_kernels_are_not() -> None:
    h100, a100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
    assert choice(h100, 1920)[0] == "cudnn"
    assert choice(h100, 2000, attention="xla")[0] == "xla"
    assert choice(h100, 2000, compute_dtype="float32")[0] == "xla"
    assert choice(a100, 2000)[0] == "cudnn"
    assert choice(a100, 2047) == ("xla", "cuDNN separates documents in rows of an even length, seq_len is 2047")
    allow = recipe_of(data={"seq_len": 2047})
    assert [_attention(allow, model_of(), kind, "gpu")[0] for kind in (h100, a100)] == ["cudnn", "cudnn"]


def test_wide_heads_run_in_cudnn_on_hopper_alone() -> None:
    h100, a100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"
    assert choice(h100, 2048, head_dim=256)[0] == "cudnn"
    for kind, head_dim, bound in ((h100, 264, 256), (h100, 252, 256), (a100, 256, 128), (a100, 132, 128)):
        assert choice(kind, 2048, head_dim=head_dim) == (
            "xla",
            f"cuDNN takes head_dim up to {bound} in multiples of 8 on {kind}, the model has {head_dim}",
        )


# ---- real compilers


def compilers() -> Path:
    """The `ipt` of the environment with the compilers; skips (a reader) or fails (CI) where there is none."""
    ask_for_extra()
    venv = Path(os.environ.get("IPT_COMPILE_VENV", ROOT / ".venv-compile"))
    if not (venv / "bin" / "ipt").exists():
        reason = f"no compilers in {venv.name}: IPT_VENV=.venv-compile launch/setup.sh compile-gpu compile-tpu"
        pytest.fail(reason, pytrace=False) if in_ci() else pytest.skip(reason)
    return venv / "bin" / "ipt"


def compile_ipt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(compilers()), "compile", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


COMPILED: dict[tuple[Any, ...], dict[str, Any]] = {}


def compiled(rows: int, topology: str, *overrides: str) -> dict[str, Any]:
    """The 1.3B recipe with full remat and no accumulation, `rows` of 2,048 tokens a device. Compiled once."""
    compilers()
    devices = {"h100:8": 8, "v5e:4x4": 16}[topology]
    batch = (f"train.batch_tokens={rows * devices * 2048}", f"train.microbatch={rows}")
    if (rows, topology, *overrides) not in COMPILED:
        recipe = ("configs/pretrain/1.3b_vanilla.yaml", "train.remat=full", *batch, *overrides)
        done = compile_ipt(*recipe, "--topology", topology, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        COMPILED[rows, topology, *overrides] = json.loads(done.stdout)
    return COMPILED[rows, topology, *overrides]


BARS = [("h100:8", 16, 8.7, "cudnn"), ("v5e:4x4", 8, 4.4, "splash")]


@pytest.mark.extra
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("topology", "rows", "gib", "kernel"), BARS)
def test_the_bars_of_the_1_3b_step(topology: str, rows: int, gib: float, kernel: str) -> None:
    result = compiled(rows, topology)
    assert result["params"] == 1_347_504_128 and result["remat"] == "full" and result["accumulation"] == 1
    assert result["fits"] and result["peak_bytes_per_device"] <= gib * 2**30
    parts = [result[f"{part}_bytes"] for part in ("argument", "temporary", "output", "aliased")]
    assert result["peak_bytes_per_device"] == sum(parts[:3]) - parts[3]
    calls = result["attention_calls"][kernel]
    assert result["attention"] == kernel and calls["forward"] and calls["backward"]


@pytest.mark.extra
@pytest.mark.timeout(900)
def test_layers_that_keep_their_products_are_written_out_on_gpus() -> None:
    """No loop is left, the bytes sent are those of the scan, and 16 rows fit a GPU twice."""
    result = compiled(16, "h100:8", "train.remat=none")
    assert result["collectives_in_loops"] == {}
    assert result["attention_calls"] == {"cudnn": {"forward": 20, "backward": 20}}
    assert result["peak_bytes_per_device"] <= 38 * 2**30
    assert result["collectives"]["all-gather"]["bytes"] <= 1.05 * result["ideal"]["all-gather"]
    assert result["collectives"]["reduce-scatter"]["bytes"] <= 1.05 * result["ideal"]["reduce-scatter"]


@pytest.mark.extra
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("topology", "rows"), [bar[:2] for bar in BARS])
def test_its_collectives_are_those_of_an_ideal_schedule(topology: str, rows: int) -> None:
    result = compiled(rows, topology)
    found, inside = result["collectives"], result["collectives_in_loops"]
    for kind in ("all-gather", "reduce-scatter"):
        assert found[kind]["bytes"] <= 1.05 * result["ideal"][kind]
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"} and set(inside) == {
        "all-gather",
        "reduce-scatter",
    }
    assert result["reduce_dtypes"] == ["bf16"]


@pytest.mark.extra
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("topology", "rows", "products"), [("h100:8", 16, 1), ("v5e:4x4", 8, 3)])
def test_the_predicted_step_holds_the_models_products(topology: str, rows: int, products: int) -> None:
    """The model's, those recomputed, and of attention those that a backward kernel computes again: scores (cuDNN);
    splash's two kernels three in all."""
    result = compiled(rows, topology)
    model = resolve_model(ModelSettings(preset="mistral-1.3b"))
    again = recomputed_flops_per_token(model, 2048, "full")
    again += products * 2 * model.layers * model.q_heads * model.head_dim * visible_pairs([2048], None) / 2048
    parts = result["predicted_parts"]
    flops = sum(part["flops"] for part in parts.values()) * result["devices"]
    assert flops == pytest.approx(result["batch_tokens"] * (result["model_flops_per_token"] + again), rel=1e-12)
    assert set(parts) == {"attention", "feed_forward", "loss", "optimizer", "embedding", "other"}
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(result["predicted_step_seconds"])
    limits = ("products", "memory", "exposed_collective")
    assert sum(result[f"predicted_{name}_seconds"] for name in limits) == pytest.approx(
        result["predicted_step_seconds"]
    )
    assert result["predicted_limit"] == "products" and 0.3 < result["predicted_mfu"] < 0.8
    assert 0 <= result["predicted_exposed_collective_seconds"] <= result["predicted_collective_seconds"]


@pytest.mark.extra
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("rows", "remat", "seconds", "gib"),
    [(16, "none", 0.5142, 51.15), (8, "none", 0.2732, 34.42), (32, "full", 1.3257, 27.81)],
)
def test_predictions_are_near_what_an_h100_measured(rows: int, remat: str, seconds: float, gib: float) -> None:
    """Seconds within 5%, memory within 2% of the figures of 2026-11-28 in docs/log.md."""
    batch = (f"train.remat={remat}", f"train.microbatch={rows}", f"train.batch_tokens={rows * 2048}")
    done = compile_ipt("configs/pretrain/1.3b_vanilla.yaml", *batch, "--topology", "h100:1", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["predicted_step_seconds"] == pytest.approx(seconds, rel=0.05)
    assert result["peak_bytes_per_device"] == pytest.approx(gib * 2**30, rel=0.02)


@pytest.mark.extra
@pytest.mark.timeout(900)
def test_predicted_stands_in_every_line_on_speed() -> None:
    done = compile_ipt("configs/pretrain/500m_vanilla.yaml", "--topology", "a100:8")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "tokens/s" in line or "MFU" in line or "seconds" in line]
    assert len(lines) == 3 and all("predicted" in line for line in lines)


@pytest.mark.extra
@pytest.mark.timeout(900)
def test_forty_rows_fit_a_v5e_chip() -> None:
    assert compiled(40, "v5e:4x4")["fits"]


@pytest.mark.extra
@pytest.mark.timeout(900)
def test_documents_kept_apart_stay_fused_and_hostile_variables_change_nothing() -> None:
    done = compile_ipt(
        "configs/pretrain/1.3b_vanilla.yaml", "train.remat=full", "train.batch_tokens=262144",
        "data.cross_document=block",
        "--topology", "h100:8", "--json",
        XLA_FLAGS="--no_such_flag=1", JAX_PLATFORMS="tpu,cuda", JAX_ENABLE_X64="1", CUDA_VISIBLE_DEVICES="3",
        LIBTPU_INIT_ARGS="--nonsense", TPU_WORKER_HOSTNAMES="a,b", JAX_NUM_CPU_DEVICES="3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["attention"] == "cudnn" and result["peak_bytes_per_device"] <= 8.7 * 2**30
    assert result["collectives"] == compiled(16, "h100:8")["collectives"]


@pytest.mark.extra
@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.seq_len=2000",
            (
                "data.seq_len must be a multiple of 128 with data.cross_document: block on NVIDIA H100 80GB HBM3, got "
                "2000 (NaN in cuDNN's backward pass); set data.seq_len to 1920 or 2048, or train.attention to xla"
            ),
        ),
        (
            "model.head_dim=256",
            (
                "--topology h100:8: JAX traces cuDNN attention for the GPU of this process, which has none (The head "
                "dim must be <= 128 and a multiple of 8, but got 256); add train.attention=xla to compile without it"
            ),
        ),
    ],
)
def test_what_cannot_be_compiled_for_hopper_is_one_line(override: str, said: str) -> None:
    """`mesh.devices` is about the machine that trains: compiling for another number is not refused for it."""
    done = compile_ipt(
        "configs/pretrain/1.3b_vanilla.yaml", "train.batch_tokens=2048000", "train.microbatch=null", override,
        "data.cross_document=block", "mesh.devices=3", "--topology", "h100:8",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {said}"
