"""Roofline of a compiled XLA program: the kernels of one step, and its predicted time on a device.

Guarantees: every instruction that runs is a kernel; loops count; products count at top level, in fusions, in library
calls and as a TPU's convolutions; fused attention counts the visible pairs only. Bytes are those of device memory: a
slice of a large operand counts as the slice, an update in place as the update, a TPU's vector memory as nothing.

Does not guarantee the time of a real step, which is longer: kernels are assumed to reach the peaks, one after another
and without a gap. Bytes that stay in a cache between kernels are counted too, which outweighs on a CPU. Rates are those
of data sheets, so a prediction is a lower bound on seconds; for an H100, measured shares make it an estimate.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from ipt_jax.compile.hlo import (
    Computations,
    HloArray,
    HloInstruction,
    arrays_of,
    braced,
    callee_of,
    collectives_of,
    is_collective,
    parse,
    walk,
)
from ipt_jax.model.flops import PEAK_FLOPS, visible_pairs
from ipt_jax.parallel.topology import GPUS_PER_NODE

PART = re.compile(r"(?:^|[/(])(attention|feed_forward|loss|optimizer|embedding)(?=[/)]|$)")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "domain",
}  # fmt: skip
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
SLICES = ("slice", "dynamic-slice", "gather")
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products that a splash kernel computes for each visible pair


@dataclass(frozen=True)
class Kernel:
    """One instruction that runs on the device, and the work of one run."""

    name: str  # of the instruction; a profile's kernel events carry it as hlo_op
    part: str  # attention | feed_forward | loss | optimizer | embedding | other, from metadata op_name scopes
    kind: str  # product | attention | attention_backward | memory | collective; attention is a fused call
    flops: float
    bytes: float  # read + written in device memory; of a collective: sent by one device
    times: int  # runs per step
    during: int = 0  # of an asynchronous kernel: how many of the next kernels run before it is done
    neighbours: int = 0  # of a collective over several nodes: its devices in one node; 0 within a node


@dataclass(frozen=True)
class Rates:
    """FLOP/s and bytes per second that the kernels of one device reach."""

    products: float
    memory: float  # read + written
    link: float = 0.0  # sent to neighbours: NVLink, one direction; ICI along one axis of the torus, both directions
    network: float = 0.0  # sent to other nodes by each device; 0 where all devices share one network
    attention: float = 0.0  # products of fused attention, forward; 0: as other products
    attention_backward: float = 0.0

    def seconds(self, kernel: Kernel) -> tuple[str, float]:
        """What limits a kernel, and its seconds per step when it runs alone: the longer of its products and bytes."""
        if kernel.kind == "collective":
            assert self.link, f"the program sends data ({kernel.name}): the rate of the link must be given"
            link = min(self.link, kernel.neighbours * self.network or self.link)
            return "collectives", kernel.times * kernel.bytes / link
        flops = {"attention": self.attention, "attention_backward": self.attention_backward}.get(kernel.kind)
        products, memory = kernel.flops / (flops or self.products), kernel.bytes / self.memory
        return ("products", kernel.times * products) if products >= memory else ("memory", kernel.times * memory)


INFINIBAND = 50e9  # assumed: 400 Gb/s of InfiniBand per GPU between nodes
# Memory, link and network of devices by their names in JAX. NVIDIA: data sheets of A100 80GB SXM and H100 SXM; 600 and
# 900 GB/s of NVLink count both directions. Google: "System architecture" pages of Cloud TPU; ICI of 1,600, 4,800 and
# 3,584 Gb/s per chip over 4, 6 and 4 links. A collective runs along one axis at a time, and an axis has two links.
BANDWIDTHS = {
    "NVIDIA A100-SXM4-80GB": (2039e9, 300e9, INFINIBAND),
    "NVIDIA H100 80GB HBM3": (3352e9, 450e9, INFINIBAND),
    "TPU v5 lite": (819e9, 100e9, 0.0),
    "TPU v5": (2765e9, 200e9, 0.0),  # v5p
    "TPU v6 lite": (1640e9, 224e9, 0.0),
}
PEAKS = {kind: Rates(PEAK_FLOPS[kind], *bandwidths) for kind, bandwidths in BANDWIDTHS.items()}

# Shares of the peaks: products, memory, fused attention with heads of 64 forward and backward. From a profile of the
# 1.3B step, 16 rows of 2,048, one GPU, 2026-11-28 (docs/log.md): 734, 316 and 231 TFLOP/s, 2,872 GB/s.
MEASURED = {"NVIDIA H100 80GB HBM3": (0.742, 0.857, 0.319, 0.234)}
PREDICTION_ERROR = "four steps of one GPU were predicted within 3.3% (docs/reference/compile.md)"


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program (its HLO text after optimizations), in the order in which they are scheduled."""
    computations, entry = parse(text)
    program = _Program(computations)
    found: list[Kernel] = []
    starts: dict[tuple[str, str], int] = {}  # places of asynchronous kernels that are not done
    for one, loops in walk(computations, entry):
        if (started := (one.computation, _started(one))) in starts:
            place = starts.pop(started)
            found[place] = dataclasses.replace(found[place], during=len(found) - 1 - place)
        elif kernel := program.kernel(one, math.prod(loops)):
            starts[one.computation, one.name] = len(found)
            found.append(kernel)
    return found


def _started(one: HloInstruction) -> str:
    """The name of the asynchronous instruction that this one completes."""
    if one.opcode.endswith("-done"):
        return one.operands[0]
    return one.name.replace("-done", "-start") if one.name.startswith("async-collective-done") else ""


def predict(found: list[Kernel], rates: Rates) -> dict[str, Any]:
    """Seconds of one step on a device with these rates.

    An asynchronous kernel costs the time that the kernels between its start and its end do not cover. Returns seconds
    (products + memory + exposed collectives), collective_seconds (exposed or not), limit (the largest of the three) and
    parts {part: seconds, flops, bytes}.
    """
    spent = {"products": 0.0, "memory": 0.0, "collectives": 0.0}
    parts: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "flops": 0.0, "bytes": 0.0})
    clock, collective_seconds = 0.0, 0.0
    free = {"collectives": 0.0, "memory": 0.0}  # when a link or a copy engine is idle
    ends: dict[int, list[tuple[float, str, str]]] = defaultdict(list)

    def wait(until: float, limit: str, part: str) -> None:
        nonlocal clock
        spent[limit] += max(0.0, until - clock)
        parts[part]["seconds"] += max(0.0, until - clock)
        clock = max(clock, until)

    for place, kernel in enumerate(found):
        for due in ends.pop(place, []):
            wait(*due)
        limit, seconds = rates.seconds(kernel)
        parts[kernel.part]["flops"] += kernel.flops * kernel.times
        if kernel.kind == "collective":
            collective_seconds += seconds
        else:
            parts[kernel.part]["bytes"] += kernel.bytes * kernel.times
        end = max(clock, free.get(limit, 0.0) if kernel.during or limit == "collectives" else 0.0) + seconds
        if kernel.during:
            free[limit] = end
            ends[place + kernel.during + 1].append((end, limit, kernel.part))
        else:
            wait(end, limit, kernel.part)
    for due in (one for place in sorted(ends) for one in ends[place]):
        wait(*due)
    return {
        "seconds": clock,
        "limit": max(spent, key=lambda name: spent[name]),
        "products_seconds": spent["products"],
        "memory_seconds": spent["memory"],
        "collective_seconds": collective_seconds,
        "exposed_collective_seconds": spent["collectives"],
        "parts": dict(parts),
    }


def predict_step(
    text: str, device_kind: str, devices: int, tokens: int, model_flops_per_token: float
) -> dict[str, Any]:
    """The predicted step of a program (HLO text) that trains on `tokens` tokens over `devices` devices of one kind.

    Launches, gaps, the loader and stragglers are not counted.
    """
    peaks = PEAKS[device_kind]
    products, memory, forward, backward = MEASURED.get(device_kind, (1.0, 1.0, 1.0, 1.0))
    peak, bandwidth = peaks.products, peaks.memory * memory
    rates = Rates(peak * products, bandwidth, peaks.link, peaks.network, peak * forward, peak * backward)
    found = predict(kernels(text), rates)
    seconds = found.pop("seconds")
    return {
        "predicted_step_seconds": seconds,
        "predicted_tokens_per_second": tokens / seconds,
        "predicted_tokens_per_second_per_device": tokens / seconds / devices,
        "predicted_mfu": tokens * model_flops_per_token / (seconds * devices * peak),
        **{f"predicted_{name}": value for name, value in found.items()},
        "predicted_from": {
            "measured": device_kind in MEASURED,
            "flops_per_second": rates.products,
            "attention_flops_per_second": [rates.attention, rates.attention_backward],
            "memory_bytes_per_second": rates.memory,
            "link_bytes_per_second": rates.link,
            "network_bytes_per_second": rates.network,
        },
    }


class _Program:
    """The computations of a program, and its instructions by name and by operand."""

    def __init__(self, computations: Computations):
        self.computations = computations
        self.tables = {name: {one.name: one for one in body} for name, body in computations.items()}
        self.users: dict[str, dict[str, list[HloInstruction]]] = {}
        for name, body in computations.items():
            users = self.users[name] = defaultdict(list)
            for one in body:
                for operand in dict.fromkeys(one.operands):
                    users[operand].append(one)

    def kernel(self, one: HloInstruction, times: int) -> Kernel | None:
        """The kernel of an instruction; None where it does no work."""
        if one.opcode in FREE or one.opcode.endswith("-done") or _target(one) in FREE_CALLS:
            return None
        part = self._part(one)
        if moved := collectives_of(one, self.computations):
            sent, near = sum(each.sent for each in moved), _neighbours(moved[0].group)
            return Kernel(one.name, part, "collective", 0.0, sent, times, neighbours=near) if sent else None
        inner = self._root(callee_of(one)) if one.opcode == "async-start" else one
        flops, size = self._flops(inner), self._bytes(inner)
        if _is_attention(inner):
            backward = "Backward" in _target(inner) or "_dq" in inner.name or "_dkv" in inner.name
            kind = "attention_backward" if backward else "attention"
            return Kernel(one.name, "attention", kind, flops, size, times)
        return Kernel(one.name, part, "product" if flops else "memory", flops, size, times) if flops or size else None

    def _root(self, name: str) -> HloInstruction:
        return next(one for one in self.computations[name] if one.root)

    def _part(self, one: HloInstruction) -> str:
        """The scope in the op_name of the instruction, else of the products, else of the others that it holds."""
        body = self.computations.get(callee_of(one), [])
        inner = sorted(body, key=lambda each: each.opcode not in ("dot", "convolution"))
        for each in (one, *inner):
            op_name = re.search(r'op_name="([^"]*)"', each.rest)
            if op_name and (scope := PART.search(op_name[1])):
                return scope[1]
        return "other"

    # ---- products

    def _flops(self, one: HloInstruction) -> float:
        """Multiplications and additions of an instruction, those in fusions included."""
        if one.opcode == "fusion":
            return sum(self._flops(inner) for inner in self.computations[callee_of(one)])
        if one.opcode == "dot":
            return self._product_flops(one, braced(one, "lhs_contracting_dims"))
        if one.opcode == "convolution":
            return _convolution_flops(one, *map(_dims, self._operands(one)[:2]))
        if one.opcode != "custom-call":
            return 0.0
        if _target(one).startswith("__cublas$"):
            config = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', one.rest)
            assert config is not None, f"{one.name}: a product without its contracting dims"
            return self._product_flops(one, config[1].replace('"', ""))
        return self._attention_flops(one) if _is_attention(one) else 0.0

    def _product_flops(self, one: HloInstruction, contracting: str) -> float:
        left = _dims(self._operands(one)[0])
        summed = math.prod(left[int(dim)] for dim in contracting.split(",") if dim.strip())
        return 2.0 * math.prod(_dims(one)) * summed

    def _attention_flops(self, one: HloInstruction) -> float:
        """Of a fused call: two products per visible pair forward, five backward; seven in splash's two kernels."""
        if one.name.startswith("splash_mha"):
            return self._splash_flops(one)
        shape = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', one.rest)
        assert shape is not None, f"{one.name}: attention without its shape"
        rows, heads, length, keys = (int(size.strip(' "')) for size in shape[1].split(","))
        width = math.prod(_dims(self._operands(one)[0])) // (rows * heads * length)
        limited = re.search(r'"sliding_window_length":\s*"?([1-9]\d*)', one.rest)
        causal = re.search(r'"mask_type":\s*"\w*CAUSAL', one.rest)
        pairs = visible_pairs([length], int(limited[1]) if limited else None)
        products = 5 if "Backward" in _target(one) else 2
        return 2.0 * products * rows * heads * width * (pairs if causal else length * keys)

    def _splash_flops(self, one: HloInstruction) -> float:
        """The first operand lists the next block of keys [heads, blocks of queries, blocks of keys], or transposed.

        With a window the shorter side counts the blocks that a block of queries reads.
        """
        products = next(count for key, count in SPLASH.items() if key in one.name)
        operands = self._operands(one)
        blocks = _dims(operands[0])[-2:]
        arrays = (arrays_of(operand.shape)[0] for operand in operands)
        heads, length, width = next(array.dims for array in arrays if array.dtype in ("bf16", "f32"))  # q
        window = None if len(set(blocks)) == 1 else (min(blocks) - 1) * length // max(blocks)
        return 2.0 * products * heads * width * visible_pairs([length], window)

    def _operands(self, one: HloInstruction) -> list[HloInstruction]:
        table = self.tables[one.computation]
        return [table[operand] for operand in one.operands if operand in table]

    # ---- bytes

    def _bytes(self, one: HloInstruction) -> float:
        """Device memory that one run of an instruction reads and writes."""
        operands, size = self._operands(one), _size(one.shape)
        if one.opcode == "fusion":
            callee = callee_of(one)
            sizes = [_size(operand.shape) for operand in operands]
            read = sum(min(each, self._read(callee, place)) for place, each in enumerate(sizes) if each)
            return read + self._written(callee, arrays_of(one.shape))
        if one.opcode in SLICES:
            return (_elements(one.shape) if _size(operands[0].shape) else 0) + size
        if one.opcode == "dynamic-update-slice":
            return _size(operands[1].shape) + (_elements(operands[1].shape) if size else 0)
        if one.opcode == "scatter":  # in place: the rows that are added to are read and written
            return sum(_size(operand.shape) for operand in operands[1:]) + 2 * _elements(operands[-1].shape)
        if one.opcode == "copy-start":
            return size  # source and destination
        return sum(_size(operand.shape) for operand in {each.name: each for each in operands}.values()) + size

    def _read(self, name: str, place: int) -> float:
        """Bytes that a fusion reads of its parameter number `place`, at most."""
        parameters = (one for one in self.computations[name] if one.opcode == "parameter")
        return self._touched(next(one for one in parameters if one.rest.startswith(f"{place})")))

    def _touched(self, value: HloInstruction) -> float:
        """Bytes of `value` that its users in a fusion need: slices of it, or all."""
        total = 0.0
        for user in self.users[value.computation].get(value.name, []):
            first = user.operands[0] == value.name
            if user.root and user.opcode in ("tuple", "bitcast") or _moved(user):
                continue
            if user.opcode in SLICES and first:
                total += _elements(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                continue  # in place
            elif user.opcode in ("bitcast", "reshape"):
                total += self._touched(user)
            elif user.opcode == "fusion":
                places = [place for place, operand in enumerate(user.operands) if operand == value.name]
                total += sum(self._read(callee_of(user), place) for place in places)
            else:
                return _elements(value.shape)
        return min(total, _elements(value.shape))

    def _written(self, name: str, arrays: list[HloArray]) -> float:
        """Bytes that a fusion writes to its results `arrays`."""
        root = self._root(name)
        results = self._operands(root) if root.opcode == "tuple" else [root]
        if len(results) != len(arrays):  # a root that returns several arrays itself
            return sum(array.size for array in arrays if array.in_memory)
        pairs = zip(results, arrays, strict=True)
        return sum(min(array.size, self._new(result)) for result, array in pairs if array.in_memory)

    def _new(self, result: HloInstruction) -> float:
        """Bytes of a fusion's result that differ from an operand of its own buffer."""
        while result.opcode in ("bitcast", "reshape", "get-tuple-element"):
            result = self._operands(result)[0]
        if result.opcode in ("dynamic-update-slice", "scatter"):
            return _elements(self._operands(result)[1 if result.opcode == "dynamic-update-slice" else -1].shape)
        if result.opcode == "parameter" or _moved(result):
            return 0.0
        if result.opcode == "fusion":
            return self._written(callee_of(result), arrays_of(result.shape))
        return _elements(result.shape)


def _target(one: HloInstruction) -> str:
    """The library function that an instruction calls."""
    found = re.search(r'custom_call_target="([^"]*)"', one.rest) if one.opcode == "custom-call" else None
    return found[1] if found else ""


def _is_attention(one: HloInstruction) -> bool:
    target = _target(one)
    return target.startswith("__cudnn$fmha") or (target == "tpu_custom_call" and one.name.startswith("splash_mha"))


def _moved(one: HloInstruction) -> bool:
    """Whether a collective, counted where it starts, moves the data."""
    return is_collective(one) or _target(one) in FREE_CALLS


def _convolution_flops(one: HloInstruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Of a convolution as libtpu writes products. Places of the window on padding or holes do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None, f"{one.name}: a convolution without labels"
    inputs, filters, outputs = labels.groups()
    out = _dims(one)
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_\-]+)", braced(one, "window"))}
    total = 2.0 * out[outputs.index("b")] * out[outputs.index("f")] * right[filters.index("i")]
    for place, dim in enumerate(sorted(label for label in outputs if label.isdigit())):
        low = int(window["pad"][place].split("_")[0]) if "pad" in window else 0
        stride, holes, spread = (
            int(window[key][place]) if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        total *= _meetings(
            left[inputs.index(dim)], right[filters.index(dim)], out[outputs.index(dim)], low, stride, holes, spread
        )
    return total


@functools.cache
def _meetings(size: int, window: int, out: int, low: int, stride: int, holes: int, spread: int) -> int:
    """(output, window) places along one dim that fall on an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(window) * spread - low
    return int(((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)).sum())


def _neighbours(devices: tuple[int, ...]) -> int:
    """Devices of a collective in the node of its first device; 0 where all are in that node."""
    near = sum(one // GPUS_PER_NODE == devices[0] // GPUS_PER_NODE for one in devices)
    return near if near < len(devices) else 0


def _dims(one: HloInstruction) -> tuple[int, ...]:
    return arrays_of(one.shape)[0].dims


def _size(shape: str) -> int:
    """Bytes of a shape in device memory."""
    return sum(array.size for array in arrays_of(shape) if array.in_memory)


def _elements(shape: str) -> int:
    """Bytes of a shape, in any memory."""
    return sum(array.size for array in arrays_of(shape))
