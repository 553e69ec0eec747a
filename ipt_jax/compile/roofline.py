"""A roofline over a compiled XLA program: the kernels of one step, and the time that a device's peaks allow for them.

Guarantees: every instruction that runs is a kernel, loops count, products count at top level, in fusions, in library
calls and as a TPU's convolutions, and fused attention counts the pairs that causality and the window leave. Bytes are
those of device memory: a slice of a large operand counts as the slice, an update in place as the update, what a TPU
keeps in its vector memory as nothing. Programs of CPUs, GPUs and TPUs are read.

Does not guarantee a time that is reached: kernels are taken to reach the peaks, one after another and without a gap, so
a step takes longer. Bytes that stay in a cache from one kernel to the next are counted all the same: on a CPU, whose
cache holds more of a small step, this outweighs.
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
    BYTES,
    Computations,
    HloInstruction,
    attribute,
    braced,
    collectives_of,
    goes_on,
    group,
    is_collective,
    parse,
    trips_of,
)
from ipt_jax.model.flops import visible_pairs
from ipt_jax.parallel.topology import GPUS_PER_NODE

PART = re.compile(r"(?:^|[/(])(attention|feed_forward|loss|optimizer|embedding)(?=[/)]|$)")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "partition-id",
    "replica-id", "opt-barrier", "optimization-barrier", "domain",
}  # fmt: skip
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
SLICES = ("slice", "dynamic-slice", "gather")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One instruction that runs on the device, and what a run of it needs."""

    name: str  # of the instruction; a profile's kernel events carry it as hlo_op
    part: str  # attention | feed_forward | loss | optimizer | embedding | other, from metadata op_name scopes
    kind: str  # product | attention | attention_backward | memory | collective; attention is a fused call
    flops: float  # one run
    bytes: float  # read + written in device memory, one run; of a collective: sent by one device
    times: int  # runs a step
    during: int = 0  # how many of the kernels that follow run before an asynchronous one is done
    neighbours: int = 0  # of a collective over several nodes: its devices in one node; 0 within a node


def kernels(text: str) -> list[Kernel]:
    """The kernels of a program (its HLO text after optimizations), in the order in which they are scheduled."""
    computations, entry = parse(text)
    return _Program(computations).kernels(entry, 1)


def predict(
    found: list[Kernel],
    peak_flops: float,
    bandwidth: float,
    link_bandwidth: float = 0.0,
    network_bandwidth: float = 0.0,
    attention_flops: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Seconds of one step on a device of `peak_flops` FLOP/s and `bandwidth` bytes/s of memory.

    A kernel takes the longer of its products and its bytes. Fused attention has FLOP/s of its own, forward and
    backward, where `attention_flops` gives them. A collective sends `link_bandwidth` bytes/s, or between nodes
    `network_bandwidth` bytes/s through each device that it has in a node. Asynchronous kernels cost what the kernels
    between their start and end do not cover. Returns seconds (products + memory + exposed collectives),
    collective_seconds (exposed or not), limit (the largest of the three) and parts {part: seconds, flops, bytes}.
    """
    spent = {"products": 0.0, "memory": 0.0, "collectives": 0.0}
    parts: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "flops": 0.0, "bytes": 0.0})
    clock, collective_seconds = 0.0, 0.0
    free = {"collectives": 0.0, "memory": 0.0}  # when a link or a copy engine has done what it was given
    ends: dict[int, list[tuple[float, str, str]]] = defaultdict(list)
    forward, backward = attention_flops or (peak_flops, peak_flops)
    flops = {"product": peak_flops, "attention": forward, "attention_backward": backward}

    def wait(until: float, limit: str, part: str) -> None:
        nonlocal clock
        spent[limit] += max(0.0, until - clock)
        parts[part]["seconds"] += max(0.0, until - clock)
        clock = max(clock, until)

    for place, kernel in enumerate(found):
        for due in ends.pop(place, []):
            wait(*due)
        limit, seconds = _seconds(
            kernel, flops.get(kernel.kind, peak_flops), bandwidth, link_bandwidth, network_bandwidth
        )
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
        "products_seconds": spent["products"],
        "memory_seconds": spent["memory"],
        "collective_seconds": collective_seconds,
        "exposed_collective_seconds": spent["collectives"],
        "limit": max(spent, key=lambda name: spent[name]),
        "parts": dict(parts),
    }


def _seconds(
    kernel: Kernel, peak_flops: float, bandwidth: float, link_bandwidth: float, network_bandwidth: float
) -> tuple[str, float]:
    """What limits a kernel, and its seconds a step, alone."""
    if kernel.kind == "collective":
        assert link_bandwidth, f"the program sends data ({kernel.name}): link_bandwidth must be given"
        link = min(link_bandwidth, kernel.neighbours * network_bandwidth or link_bandwidth)
        return "collectives", kernel.times * kernel.bytes / link
    products, memory = kernel.flops / peak_flops, kernel.bytes / bandwidth
    return ("products", kernel.times * products) if products >= memory else ("memory", kernel.times * memory)


class _Program:
    """Computations of a program and what was worked out about them."""

    def __init__(self, computations: Computations):
        self.computations = computations
        self.tables = {name: {one.name: one for one in body} for name, body in computations.items()}
        self.users = {name: _users(body) for name, body in computations.items()}

    # ---- which instructions run

    def kernels(self, name: str, times: int) -> list[Kernel]:
        found: list[Kernel] = []
        starts: dict[str, int] = {}  # asynchronous instructions that are not done
        for one in self.computations[name]:
            if one.opcode == "while":
                trips = trips_of(one, self.computations, self.computations[name])
                found += self.kernels(attribute(one, "body"), times * trips)
            elif one.opcode == "call":
                found += self.kernels(attribute(one, "to_apply"), times)
            elif one.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", braced(one, "branch_computations")):
                    found += self.kernels(branch, times)
            elif (started := self._started(one)) in starts:
                place = starts.pop(started)
                found[place] = dataclasses.replace(found[place], during=len(found) - 1 - place)
            elif kernel := self._kernel(one, name, times):
                starts[one.name] = len(found)
                found.append(kernel)
        return found

    def _started(self, one: HloInstruction) -> str:
        """The name of the asynchronous instruction that this one completes."""
        if one.opcode.endswith("-done"):
            return one.operands[0]
        return one.name.replace("-done", "-start") if one.name.startswith("async-collective-done") else ""

    def _kernel(self, one: HloInstruction, name: str, times: int) -> Kernel | None:
        if one.opcode in FREE or one.opcode.endswith("-done") or self._target(one) in FREE_CALLS:
            return None
        part = self._part(one)
        if (moved := self._collective(one)) is not None:
            sent = sum(each.sent for each in collectives_of(moved, self.computations))
            kernel = Kernel(
                one.name, part, "collective", 0.0, sent, times, neighbours=_neighbours(self._grouped(moved))
            )
            return kernel if sent else None
        inner, where = (self._root(one), self._callee(one)) if one.opcode == "async-start" else (one, name)
        flops, size = self._flops(inner, where), self._bytes(inner, where)
        if self._attention(inner):
            backward = "Backward" in self._target(inner) or "_dq" in inner.name or "_dkv" in inner.name
            kind = "attention_backward" if backward else "attention"
            return Kernel(one.name, "attention", kind, flops, size, times)
        return Kernel(one.name, part, "product" if flops else "memory", flops, size, times) if flops or size else None

    def _callee(self, one: HloInstruction) -> str:
        return attribute(one, "calls") if one.opcode in ("fusion", "async-start") else ""

    def _root(self, one: HloInstruction) -> HloInstruction:
        """The root of what a fusion or an asynchronous start calls."""
        return next(inner for inner in self.computations[self._callee(one)] if inner.root)

    def _target(self, one: HloInstruction) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', one.rest) if one.opcode == "custom-call" else None
        return found[1] if found else ""

    def _part(self, one: HloInstruction) -> str:
        """The scope in the instruction's op_name, else in those of the products and the others that it holds."""
        body = self.computations.get(self._callee(one), [])
        inner = sorted(body, key=lambda each: each.opcode not in ("dot", "convolution"))
        for each in (one, *inner):
            op_name = re.search(r'op_name="([^"]*)"', each.rest)
            if op_name and (scope := PART.search(op_name[1])):
                return scope[1]
        return "other"

    def _collective(self, one: HloInstruction) -> HloInstruction | None:
        """The collective that an instruction is or starts."""
        if is_collective(one):
            return one
        callee = self._callee(one)
        if callee.startswith("all-reduce-scatter"):
            return one
        if not callee or goes_on(callee, self.computations):
            return None
        return next((inner for inner in self.computations[callee] if is_collective(inner)), None)

    def _grouped(self, moved: HloInstruction) -> tuple[int, ...]:
        inner = self.computations[self._callee(moved)] if moved.opcode == "fusion" else [moved]
        return group(next(one for one in inner if is_collective(one)).rest)

    # ---- products

    def _flops(self, one: HloInstruction, name: str) -> float:
        """Multiplications and additions of an instruction of computation `name`, those in fusions included."""
        if one.opcode == "fusion":
            callee = self._callee(one)
            return sum(self._flops(inner, callee) for inner in self.computations[callee])
        if one.opcode == "dot":
            return self._product_flops(one, name, braced(one, "lhs_contracting_dims"))
        if one.opcode == "convolution":
            return _convolution_flops(one, *(self._dims(operand, name) for operand in one.operands[:2]))
        if one.opcode != "custom-call":
            return 0.0
        target = self._target(one)
        if target.startswith("__cublas$"):
            config = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', one.rest)
            assert config is not None, f"{one.name}: a product without its contracting dims"
            return self._product_flops(one, name, config[1].replace('"', ""))
        return self._attention_flops(one, name) if self._attention(one) else 0.0

    def _product_flops(self, one: HloInstruction, name: str, contracting: str) -> float:
        left = self._dims(one.operands[0], name)
        summed = math.prod(left[int(dim)] for dim in contracting.split(",") if dim.strip())
        return 2.0 * math.prod(_arrays(one.shape)[0][1]) * summed

    def _attention(self, one: HloInstruction) -> bool:
        target = self._target(one)
        return target.startswith("__cudnn$fmha") or (target == "tpu_custom_call" and one.name.startswith("splash_mha"))

    def _attention_flops(self, one: HloInstruction, name: str) -> float:
        """Of a fused call: two products a visible pair forward, five backward; seven in splash's two kernels."""
        if one.name.startswith("splash_mha"):
            return self._splash_flops(one, name)
        shape = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', one.rest)
        assert shape is not None, f"{one.name}: attention without its shape"
        rows, heads, length, keys = (int(size.strip(' "')) for size in shape[1].split(","))
        width = math.prod(self._dims(one.operands[0], name)) // (rows * heads * length)
        limited = re.search(r'"sliding_window_length":\s*"?([1-9]\d*)', one.rest)
        causal = re.search(r'"mask_type":\s*"\w*CAUSAL', one.rest)
        pairs = visible_pairs([length], int(limited[1]) if limited else None)
        products = 5 if "Backward" in self._target(one) else 2
        return 2.0 * products * rows * heads * width * (pairs if causal else length * keys)

    def _splash_flops(self, one: HloInstruction, name: str) -> float:
        """The first operand says which block of keys comes next [heads, blocks of queries, blocks of keys], or turned.

        With a window the shorter side is the blocks that a query's block meets.
        """
        products = next(count for key, count in SPLASH.items() if key in one.name)
        blocks = self._dims(one.operands[0], name)[-2:]
        arrays = (_arrays(self.tables[name][operand].shape)[0] for operand in one.operands)
        heads, length, width = next(dims for dtype, dims, _ in arrays if dtype in ("bf16", "f32"))  # q
        window = None if len(set(blocks)) == 1 else (min(blocks) - 1) * length // max(blocks)
        return 2.0 * products * heads * width * visible_pairs([length], window)

    def _dims(self, instruction: str, name: str) -> Dims:
        return _arrays(self.tables[name][instruction].shape)[0][1]

    # ---- bytes

    def _bytes(self, one: HloInstruction, name: str) -> float:
        """Device memory that one run of an instruction of computation `name` reads and writes."""
        table = self.tables[name]
        operands = [table[operand] for operand in one.operands if operand in table]
        if one.opcode == "fusion":
            callee = self._callee(one)
            read = sum(
                min(_size(operand.shape), self._read(callee, place))
                for place, operand in enumerate(operands)
                if _size(operand.shape)
            )
            return read + self._written(callee, _arrays(one.shape))
        if one.opcode in SLICES:
            return (_elements(one.shape) if _size(operands[0].shape) else 0) + _size(one.shape)
        if one.opcode == "dynamic-update-slice":
            return _size(operands[1].shape) + (_elements(operands[1].shape) if _size(one.shape) else 0)
        if one.opcode == "scatter":  # in place: what is added to is read and written
            return sum(_size(operand.shape) for operand in operands[1:]) + 2 * _elements(operands[-1].shape)
        if one.opcode == "copy-start":
            return _size(one.shape)  # source and destination
        return sum(_size(operand.shape) for operand in {each.name: each for each in operands}.values()) + _size(
            one.shape
        )

    def _read(self, name: str, place: int) -> float:
        """Bytes that a fusion reads of its parameter number `place`, at most."""
        marker = f"{place})"
        parameter = next(
            one for one in self.computations[name] if one.opcode == "parameter" and one.rest.startswith(marker)
        )
        return self._touched(name, parameter)

    def _touched(self, name: str, value: HloInstruction) -> float:
        """Bytes of `value` that its users in a fusion need: slices of it, or all."""
        total = 0.0
        for user in self.users[name].get(value.name, []):
            first = user.operands[0] == value.name
            if (
                user.root
                and user.opcode in ("tuple", "bitcast")
                or is_collective(user)
                or self._target(user) in FREE_CALLS
            ):
                continue  # handed on, or moved by a collective that is counted where it starts
            if user.opcode in SLICES and first:
                total += _elements(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and first:
                continue  # in place
            elif user.opcode in ("bitcast", "reshape"):
                total += self._touched(name, user)
            elif user.opcode == "fusion":
                places = [place for place, operand in enumerate(user.operands) if operand == value.name]
                total += sum(self._read(self._callee(user), place) for place in places)
            else:
                return _elements(value.shape)
        return min(total, _elements(value.shape))

    def _written(self, name: str, arrays: list[tuple[str, Dims, bool]]) -> float:
        """Bytes that a fusion writes to its results, of which `arrays` tells where they are."""
        root = next(one for one in self.computations[name] if one.root)
        results = [self.tables[name][operand] for operand in root.operands] if root.opcode == "tuple" else [root]
        if len(results) != len(arrays):  # a root that gives several arrays itself
            return sum(_array_size(array) for array in arrays)
        return sum(
            min(_array_size(array), self._new(name, result)) for result, array in zip(results, arrays, strict=True)
        )

    def _new(self, name: str, result: HloInstruction) -> float:
        """Bytes of a fusion's result that differ from an operand of its own buffer."""
        while result.opcode in ("bitcast", "reshape", "get-tuple-element"):
            result = self.tables[name][result.operands[0]]
        if result.opcode in ("dynamic-update-slice", "scatter"):
            update = self.tables[name][result.operands[1 if result.opcode == "dynamic-update-slice" else -1]]
            return _elements(update.shape)
        if result.opcode == "parameter" or is_collective(result) or self._target(result) in FREE_CALLS:
            return 0.0
        if result.opcode == "fusion":
            return self._written(self._callee(result), _arrays(result.shape))
        return _elements(result.shape)


SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products that a splash kernel computes for each visible pair


def _users(body: list[HloInstruction]) -> dict[str, list[HloInstruction]]:
    """The instructions that read each instruction."""
    users: dict[str, list[HloInstruction]] = defaultdict(list)
    for one in body:
        for operand in dict.fromkeys(one.operands):
            users[operand].append(one)
    return users


def _convolution_flops(one: HloInstruction, left: Dims, right: Dims) -> float:
    """Of a convolution as libtpu writes products: the window's places that fall on padding or holes do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None, f"{one.name}: a convolution without labels"
    inputs, filters, outputs = labels.groups()
    out = _arrays(one.shape)[0][1]
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
    """Devices of a collective that share the first one's node, where the collective goes beyond it; else 0."""
    near = sum(one // GPUS_PER_NODE == devices[0] // GPUS_PER_NODE for one in devices)
    return near if near < len(devices) else 0


@functools.lru_cache(maxsize=100_000)
def _arrays(shape: str) -> list[tuple[str, Dims, bool]]:
    """(dtype, dims, whether in device memory) of each array.

    S(n) names another memory space. A GPU's S(1) is device memory that collectives use; a TPU's, whose arrays are
    tiled, is vector memory.
    """
    return [
        (
            dtype,
            tuple(int(dim) for dim in dims.split(",") if dim),
            "S(" not in layout or ("S(1)" in layout and "T(" not in layout),
        )
        for dtype, dims, layout in ARRAY.findall(shape)
    ]


def _array_size(array: tuple[str, Dims, bool]) -> int:
    return BYTES[array[0]] * math.prod(array[1]) if array[2] else 0


def _size(shape: str) -> int:
    """Bytes of a shape in device memory."""
    return sum(_array_size(array) for array in _arrays(shape))


def _elements(shape: str) -> int:
    """Bytes of a shape, wherever it is."""
    return sum(BYTES[dtype] * math.prod(dims) for dtype, dims, _ in _arrays(shape))
