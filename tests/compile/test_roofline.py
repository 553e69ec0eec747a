"""The roofline over compiled programs: what each kernel needs, by hand; what a step is predicted to take; and that the
products of a really compiled step are the model's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from trainkit import model_of, recipe_of

from ipt_jax.compile.command import search
from ipt_jax.compile.hlo import group
from ipt_jax.compile.roofline import PEAKS, Kernel, Rates, kernels, predict, predict_step
from ipt_jax.model.flops import model_flops, recomputed_flops_per_token, visible_pairs
from ipt_jax.parallel.mesh import make_mesh
from ipt_jax.parallel.topology import parse_topology
from ipt_jax.train.step import build_program, lower

FMHA = (
    '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "8", "1024", "1024"]}, '
    '"mask_type": "CAUSAL", "sliding_window_length": 256'
)
GPU = """
HloModule jit_step, is_scheduled=true

%gemm_computation (p0: bf16[512,64], p1: bf16[64,128]) -> bf16[512,128] {
  %p0 = bf16[512,64]{1,0} parameter(0)
  %p1 = bf16[64,128]{1,0} parameter(1)
  %d = f32[512,128]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/jvp()/feed_forward/dot_general"}
  ROOT %c = bf16[512,128]{1,0} convert(%d)
}

%cut_computation (p: f32[20,64,128], i: s32[]) -> bf16[64,128] {
  %p = f32[20,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = f32[1,64,128]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,64,128}
  %b = f32[64,128]{1,0} bitcast(%slice)
  ROOT %c = bf16[64,128]{1,0} convert(%b)
}

%put_computation (p: f32[20,64,128], u: f32[64,128], i: s32[]) -> f32[20,64,128] {
  %p = f32[20,64,128]{2,1,0} parameter(0)
  %u = f32[64,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %b = f32[1,64,128]{2,1,0} bitcast(%u)
  ROOT %put = f32[20,64,128]{2,1,0} dynamic-update-slice(%p, %b, %i, %i, %i)
}

%sliced_gemm (x: bf16[512,64], w: bf16[20,64,128], i: s32[]) -> bf16[512,128] {
  %x = bf16[512,64]{1,0} parameter(0)
  %w = bf16[20,64,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,64,128}
  %b = bf16[64,128]{1,0} bitcast(%slice)
  ROOT %gemm = bf16[512,128]{1,0} custom-call(%x, %b), custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/jvp()/attention/dot_general"}, backend_config={"gemm_backend_config": {"dot_dimension_numbers": {"lhs_contracting_dimensions": ["1"]}}}
}

%async_computation (p: bf16[8,64]) -> bf16[1,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %rs = bf16[1,64]{1,0} reduce-scatter(%p), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}

%body (state: (s32[], bf16[512,64], f32[20,64,128])) -> (s32[], bf16[512,64], f32[20,64,128]) {
  %state = (s32[], bf16[512,64]{1,0}, f32[20,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[512,64]{1,0} get-tuple-element(%state), index=1
  %w = f32[20,64,128]{2,1,0} get-tuple-element(%state), index=2
  %gather = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%part), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %cut = bf16[64,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%cut_computation, metadata={op_name="jit(train_step)/jvp()/while/body/dynamic_slice"}
  %gemm = bf16[512,128]{1,0} fusion(%x, %cut), kind=kCustom, calls=%gemm_computation
  %gathered = bf16[64,128]{1,0} all-gather-done(%gather)
  %call = (bf16[512,128]{1,0}, s8[4096]{0}) custom-call(%x, %gathered), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/transpose(jvp(loss))/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %next = (s32[], bf16[512,64]{1,0}, f32[20,64,128]{2,1,0}) tuple(%i, %x, %w)
}

%condition (state: (s32[], bf16[512,64], f32[20,64,128])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[512,64], w: f32[20,64,128]) -> bf16[512,64] {
  %x = bf16[512,64]{1,0} parameter(0)
  %w = f32[20,64,128]{2,1,0} parameter(1)
  %q = bf16[2,1024,8,64]{3,2,1,0} parameter(2)
  %k = bf16[2,1024,2,64]{3,2,1,0} parameter(3)
  %i = s32[] constant(0)
  %u = f32[64,128]{1,0} parameter(4)
  %stack = bf16[20,64,128]{2,1,0} parameter(5)
  %init = (s32[], bf16[512,64]{1,0}, f32[20,64,128]{2,1,0}) tuple(%i, %x, %w)
  %loop = (s32[], bf16[512,64]{1,0}, f32[20,64,128]{2,1,0}) while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"20"}}
  %attend = (bf16[2,8,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={FMHA}
  %back = (bf16[2,8,1024,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={FMHA}
  %sliced = bf16[512,128]{1,0} fusion(%x, %stack, %i), kind=kCustom, calls=%sliced_gemm
  %put = f32[20,64,128]{2,1,0} fusion(%w, %u, %i), kind=kLoop, calls=%put_computation, metadata={op_name="jit(train_step)/optimizer/add"}
  %cast = bf16[64,128]{1,0} convert(%u), metadata={op_name="jit(train_step)/jvp(embedding)/convert"}
  %start = ((bf16[8,64]{1,0}), bf16[1,64]{1,0}) async-start(%grads), calls=%async_computation
  %copied = f32[64,128]{0,1} copy(%u)
  %done = bf16[1,64]{1,0} async-done(%start)
  ROOT %out = bf16[512,64]{1,0} get-tuple-element(%loop), index=1
}
""".replace("FMHA", FMHA)  # fmt: skip
TPU = """
HloModule jit_step, is_scheduled=true

%conv_computation (p0: bf16[8,32,64], p1: bf16[16,4,64]) -> bf16[8,32,4,16] {
  %p0 = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %lhs = bf16[8,32,64,1]{2,1,3,0:T(8,128)(2,1)} bitcast(%p0)
  %rhs = bf16[4,16,64,1]{2,1,0,3:T(8,128)(2,1)} bitcast(%p1)
  ROOT %conv = bf16[8,32,4,16]{1,3,2,0:T(8,128)(2,1)} convolution(%lhs, %rhs), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f, metadata={op_name="jit(train_step)/jvp()/attention/dot_general"}
}

ENTRY %main (x: bf16[8,32,64]) -> bf16[8,32,64] {
  %x = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %a = bf16[256,64]{1,0:T(8,128)(2,1)} parameter(2)
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(3)
  %next = s8[1,16,5]{2,1,0:T(4,128)(4,1)} parameter(4)
  %q = bf16[8,2048,64]{2,1,0:T(8,128)(2,1)} parameter(5)
  %k = bf16[2,2048,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(6)
  %fetch = (bf16[4,16,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[4,16,64]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %plain = bf16[256,128]{1,0:T(8,128)(2,1)} convolution(%a, %b), dim_labels=bf_io->bf, metadata={op_name="jit(train_step)/jvp()/feed_forward/dot_general"}
  %fetched = bf16[4,16,64]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %heads = bf16[8,32,4,16]{1,3,2,0:T(8,128)(2,1)} fusion(%x, %fetched), kind=kOutput, calls=%conv_computation
  %splash_mha_dkv_no_residuals.1 = (bf16[2,2048,64]{2,1,0:T(8,128)(2,1)S(1)}) custom-call(%next, %next, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(train_step)/splash"}
  %kept = bf16[256,128]{1,0:S(1)} copy(%plain)
  %room = bf16[256,128]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = bf16[8,32,64]{2,1,0:T(8,128)(2,1)} bitcast(%x)
}
"""
CPU = """
HloModule jit_step, is_scheduled=true

%wrapped (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  ROOT %exp = f32[64,32]{1,0} exponential(%p), metadata={op_name="jit(train_step)/attention/exp"}
}

%branch (p: f32[64,32]) -> f32[64,32] {
  %p = f32[64,32]{1,0} parameter(0)
  ROOT %parallel = f32[64,32]{1,0} fusion(%p), kind=kLoop, calls=%wrapped
}

ENTRY %main (a: f32[4,16,8], t: f32[100,8]) -> f32[64,32] {
  %a = f32[4,16,8]{2,1,0} parameter(0)
  %b = f32[4,8,32]{2,1,0} parameter(1)
  %t = f32[100,8]{1,0} parameter(2)
  %at = s32[5]{0} parameter(3)
  %grad = f32[5,8]{1,0} parameter(4)
  %dot = f32[4,16,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_contracting_dims={1}
  %flat = f32[64,32]{1,0} bitcast(%dot)
  %looked = f32[5,8]{1,0} gather(%t, %at), offset_dims={1}, slice_sizes={1,8}
  %added = f32[100,8]{1,0} scatter(%t, %at, %grad), update_window_dims={1}, to_apply=%add
  ROOT %call = f32[64,32]{1,0} call(%flat), to_apply=%branch
}
"""


def test_the_kernels_of_a_gpu_program() -> None:
    """20 turns; a slice of a stack is read, not the stack; an update is read and written; workspaces cost their bytes."""
    gemm = 2 * 512 * 128 * 64
    pairs = visible_pairs([1024], 256)
    assert pairs == 256 * 257 // 2 + 768 * 256
    heads = 2 * 8 * 64 * pairs
    attended = 2 * (2 * 1024 * 8 * 64 + 2 * 1024 * 2 * 64) + 2 * 2 * 1024 * 8 * 64  # k is v here: read once
    assert attended == 2 * (1_048_576 + 262_144) + 2_097_152
    assert kernels(GPU) == [
        Kernel("gather", "other", "collective", 0.0, 7 / 8 * 64 * 128 * 2, 20, during=2),
        Kernel("cut", "other", "memory", 0.0, 64 * 128 * (4 + 2) + 4, 20),
        Kernel("gemm", "feed_forward", "product", gemm, 2 * (512 * 64 + 64 * 128 + 512 * 128), 20),
        Kernel("call", "loss", "product", gemm, 2 * (512 * 64 + 64 * 128 + 512 * 128) + 4096, 20),
        Kernel("attend", "attention", "attention", 2 * 2 * heads, attended, 1),
        Kernel("back", "attention", "attention_backward", 5 * 2 * heads, attended, 1),
        Kernel("sliced", "attention", "product", gemm, 2 * (512 * 64 + 64 * 128 + 512 * 128) + 4, 1),
        Kernel("put", "optimizer", "memory", 0.0, 2 * 64 * 128 * 4 + 4, 1),
        Kernel("cast", "embedding", "memory", 0.0, 64 * 128 * (4 + 2), 1),
        Kernel("start", "other", "collective", 0.0, 7 / 8 * 8 * 64 * 2, 1, during=1),
        Kernel("copied", "other", "memory", 0.0, 2 * 64 * 128 * 4, 1),
    ]


def test_the_kernels_of_a_tpu_program() -> None:
    """A convolution's padding is no work; vector memory is no traffic; five of 16 blocks of keys are a window of 512."""
    pairs = visible_pairs([2048], 512)
    assert kernels(TPU) == [
        Kernel("fetch", "other", "memory", 0.0, 4 * 16 * 64 * 2, 1, during=1),
        Kernel("plain", "feed_forward", "product", 2 * 256 * 128 * 64, 2 * (256 * 64 + 64 * 128 + 256 * 128), 1),
        Kernel("heads", "attention", "product", 2 * 8 * 32 * 64 * 4 * 16, 2 * (8 * 32 * 64 + 8 * 32 * 4 * 16), 1),
        Kernel(
            "splash_mha_dkv_no_residuals.1",
            "attention",
            "attention_backward",
            4 * 2 * 8 * 64 * pairs,
            2 * 8 * 2048 * 64 + 80,
            1,
        ),
        Kernel("kept", "other", "memory", 0.0, 2 * 2 * 256 * 128, 1),  # as on a GPU: not tiled
    ]


def test_the_kernels_of_a_cpu_program() -> None:
    """Rows that are looked up or added to count, tables do not; a called computation's fusion is a kernel."""
    assert kernels(CPU) == [
        Kernel("dot", "other", "product", 2 * 4 * 16 * 32 * 8, 4 * (4 * 16 * 8 + 4 * 8 * 32 + 4 * 16 * 32), 1),
        Kernel("looked", "other", "memory", 0.0, 2 * 5 * 8 * 4, 1),
        Kernel("added", "other", "memory", 0.0, 5 * 4 + 3 * 5 * 8 * 4, 1),
        Kernel("parallel", "attention", "memory", 0.0, 2 * 64 * 32 * 4, 1),
    ]


@pytest.mark.parametrize(
    ("written", "devices"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
    ],
)
def test_groups_of_devices(written: str, devices: tuple[int, ...]) -> None:
    assert group(f"%x), channel_id=1, replica_groups={written}, dimensions={{0}}") == devices


# ---- predictions: 100 FLOP/s, 10 bytes/s of memory


def memory(size: float, **fields: Any) -> Kernel:
    return Kernel("m", "optimizer", "memory", 0.0, size, 1, **fields)


def collective(size: float, **fields: Any) -> Kernel:
    return Kernel("c", "other", "collective", 0.0, size, 1, **fields)


def test_a_kernel_takes_the_longer_of_its_products_and_its_bytes() -> None:
    products = Kernel("p", "attention", "product", 300.0, 10.0, 2)
    starved = Kernel("s", "attention", "product", 100.0, 40.0, 1)
    found = predict([products, starved, memory(50)], Rates(100, 10))
    assert found == {
        "seconds": 6 + 4 + 5,
        "products_seconds": 6,
        "memory_seconds": 9,
        "collective_seconds": 0,
        "exposed_collective_seconds": 0,
        "limit": "memory",
        "parts": {
            "attention": {"seconds": 10, "flops": 700, "bytes": 60},
            "optimizer": {"seconds": 5, "flops": 0, "bytes": 50},
        },
    }


@pytest.mark.parametrize(
    ("found", "seconds", "exposed"),
    [
        ([collective(6), memory(50)], 2 + 5, 2),  # nothing runs beside a synchronous one
        ([collective(6, during=1), memory(50)], 5, 0),
        ([collective(24, during=1), memory(50)], 8, 3),
        ([collective(24, during=1), memory(50), memory(10)], 9, 3),  # what follows its end hides nothing
        ([collective(9, during=2), collective(9, during=1), memory(50)], 6, 1),  # two share the link
        ([collective(9, during=1), dataclasses.replace(memory(1), times=20)], 3, 1),  # 20 turns beside one
        ([memory(30, during=1), Kernel("p", "loss", "product", 200.0, 0.0, 1)], 3, 0),  # an asynchronous copy
    ],
)
def test_asynchronous_kernels_are_hidden_by_what_runs_before_their_end(
    found: list[Kernel], seconds: float, exposed: float
) -> None:
    """Links of 3 bytes/s."""
    predicted = predict(found, Rates(100, 10, 3))
    assert (predicted["seconds"], predicted["exposed_collective_seconds"]) == (seconds, exposed)
    assert sum(part["seconds"] for part in predicted["parts"].values()) == seconds
    whole = sum(one.bytes for one in found if one.kind == "collective") / 3
    assert predicted["collective_seconds"] == whole


def test_collectives_between_nodes_share_the_network_of_their_node() -> None:
    near, rails, alone = collective(24), collective(24, neighbours=4), collective(24, neighbours=1)
    assert [predict([one], Rates(1, 1, 8, 2))["seconds"] for one in (near, rails, alone)] == [3, 3, 12]
    text = "HloModule m\n\nENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %s = f32[8]{0} all-reduce(%a), GROUPS\n}\n"
    found = {
        groups: kernels(text.replace("GROUPS", f"replica_groups={groups}"))[0].neighbours
        for groups in ("[2,8]<=[16]", "[1,16]<=[16]", "[8,2]<=[2,8]T(1,0)")
    }
    assert list(found.values()) == [0, 8, 1]


def test_every_topology_has_its_peaks() -> None:
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "TPU v5 lite", "TPU v5", "TPU v6 lite"):
        assert PEAKS[name].products and PEAKS[name].memory and PEAKS[name].link


def test_a_predicted_step_by_hand() -> None:
    """The CPU program above as if on an A100 and an H100, of whose bandwidth 85.7% were measured: bytes decide."""
    size = sum(one.bytes for one in kernels(CPU))
    for kind, bandwidth, peak, measured in (
        ("NVIDIA A100-SXM4-80GB", 2039e9, 312e12, False),
        ("NVIDIA H100 80GB HBM3", 0.857 * 3352e9, 989.4e12, True),
    ):
        found = predict_step(CPU, kind, 2, 100, 1e6)
        assert found["predicted_step_seconds"] == pytest.approx(size / bandwidth)
        assert found["predicted_tokens_per_second"] == pytest.approx(100 * bandwidth / size)
        assert found["predicted_tokens_per_second_per_device"] == pytest.approx(50 * bandwidth / size)
        assert found["predicted_mfu"] == pytest.approx(100 * 1e6 / (size / bandwidth) / (2 * peak))
        assert found["predicted_limit"] == "memory" and all(name.startswith("predicted_") for name in found)
        assert found["predicted_from"]["measured"] == measured


def test_fused_attention_has_rates_of_its_own() -> None:
    found = [
        Kernel("f", "attention", "attention", 300.0, 10.0, 2),
        Kernel("b", "attention", "attention_backward", 300.0, 10.0, 1),
        Kernel("p", "attention", "product", 300.0, 10.0, 1),
    ]
    assert predict(found, Rates(100, 10))["seconds"] == 6 + 3 + 3
    assert predict(found, Rates(100, 10, attention=50, attention_backward=25))["seconds"] == 12 + 12 + 3


def test_the_search_ranks_what_fits_by_predicted_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to 4 rows fit, all with `full`; 1 row without recomputation is the fastest, not the largest."""

    def compile_recipe(recipe: Any, *_: Any) -> dict[str, Any]:
        rows, remat = recipe.train.microbatch, recipe.train.remat
        fits = rows <= 4 or remat == "full"
        speed = {"none": 9 - rows, "full": 2}.get(remat, 1) if fits else 100
        return {
            "microbatch": rows, "remat": remat, "fits": fits, "predicted_tokens_per_second": speed,
            "peak_bytes_per_device": 0, "compile_seconds": 0,
        }  # fmt: skip

    frontier, compilations = search(recipe_of(), model_of(), parse_topology("h100:8"), 1, compile_recipe)
    speeds = [one["predicted_tokens_per_second"] for one in frontier]
    assert speeds == sorted(speeds, reverse=True)
    assert (frontier[0]["remat"], frontier[0]["microbatch"]) == ("none", 4)
    printed = capsys.readouterr().err.splitlines()
    assert compilations == len(printed) > len(speeds)
    said = "ipt compile: remat none, microbatch"
    assert f"{said} 4: 0.00 GiB, fits, predicted 5 tokens/s (compiled in 0 s)" in printed
    assert f"{said} 8: 0.00 GiB, does not fit (compiled in 0 s)" in printed


# ---- a compiled step


def step_text(layers: int, **train: Any) -> str:
    """The optimized program of a step over 16 rows of 64 tokens on this CPU."""
    recipe = recipe_of(data={"seq_len": 64}, train={"batch_tokens": 16 * 64, **train})
    program = build_program(recipe, model_of(layers=layers), make_mesh(devices=jax.devices()[:1]), total_steps=30)
    return lower(program).compile({"xla_backend_optimization_level": 0}).as_text()


@pytest.mark.parametrize(
    ("layers", "train"),
    [
        (2, {"remat": "none"}),
        (10, {"remat": "none"}),  # more layers than are unrolled: a loop
        (10, {"remat": "full"}),
        (2, {"remat": "none", "microbatch": 4}),
    ],
    ids=["unrolled", "scanned", "recomputed", "accumulated"],
)
def test_the_products_of_a_compiled_step_are_the_models(layers: int, train: dict[str, Any]) -> None:
    """Exactly, once the pairs are those of a row's only block of 64 queries and 64 keys: XLA's attention masks."""
    model, tokens = model_of(layers=layers), 16 * 64
    found = kernels(step_text(layers, **train))
    again = tokens * recomputed_flops_per_token(model, 64, train["remat"])
    if again:  # all pairs of a row, not only those that a causal mask leaves
        again += 2 * 2 * layers * model.q_heads * model.head_dim * 16 * (64 * 64 - visible_pairs([64], None))
    assert sum(one.flops * one.times for one in found) == model_flops(model, tokens, 16 * 64 * 64) + again
    assert {one.part for one in found} == {"attention", "feed_forward", "loss", "optimizer", "embedding", "other"}
    assert all(one.part == "attention" or one.part in ("feed_forward", "loss") for one in found if one.flops)
    assert all(one.bytes for one in found)
