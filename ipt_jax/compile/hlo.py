"""Parses the text of a compiled program (XLA's HLO): its instructions, collectives and attention kernels.

Guarantees: loops count, so an instruction in the body of a scan over 20 layers counts 20 times. An asynchronous
collective counts once. Bytes are those that one device sends: of S bytes over n devices, S (n - 1) / n for an
all-gather (S gathered), a reduce-scatter (S before it is cut) or an all-to-all, twice that for an all-reduce, S for a
permute. The dialects of CPUs, GPUs and TPUs are parsed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "s4": 1, "u4": 1, "token": 0}

INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
OPERANDS = re.compile(r"(?:[^()]+|\((?:[^()]+|\([^()]*\))*\))*")  # up to the parenthesis that closes them
NAME = re.compile(r"%([\w.\-]+)")
WRAPPED = re.compile(r"\n(?=\"|\}\})")  # a Pallas kernel's attributes go over several lines


class HloArray(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    in_memory: bool  # of the device

    @property
    def size(self) -> int:
        """Bytes, in any memory."""
        return BYTES[self.dtype] * math.prod(self.dims)


@dataclass(frozen=True)
class HloInstruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool
    computation: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that this one reads."""
        found = OPERANDS.match(self.rest)
        return tuple(NAME.findall(found[0])) if found and self.opcode != "parameter" else ()


@dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    dtype: str
    size: int  # bytes: gathered, or before they are reduced
    group: tuple[int, ...]  # the devices that take part, of the first group
    times: int  # per step
    loops: tuple[int, ...]  # trips of the loops around it, outermost first

    @property
    def sent(self) -> int:
        """Bytes that one device sends per step."""
        if self.kind == "collective-permute":
            return self.times * self.size
        devices = len(self.group)
        return self.times * ((2 if self.kind == "all-reduce" else 1) * self.size * (devices - 1) // devices)


Computations = dict[str, list[HloInstruction]]


def parse(text: str) -> tuple[Computations, str]:
    """Instructions by computation, and the entry's name."""
    computations: Computations = {}
    entry = current = ""
    for line in WRAPPED.sub("", re.sub(r"/\*.*?\*/", "", text)).splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            current = head[2]
            computations.setdefault(current, [])
            entry = current if head[1] else entry
        elif current and (found := INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = found.groups()
            computations[current].append(HloInstruction(name, shape, opcode, rest, bool(root), current))
    assert entry, "the program's text has no entry"
    return computations, entry


def walk(
    computations: Computations, name: str, loops: tuple[int, ...] = ()
) -> Iterator[tuple[HloInstruction, tuple[int, ...]]]:
    """Each instruction that runs, in order, and the trips of the loops around it, outermost first.

    Fusions and asynchronous starts are not entered.
    """
    for one in computations[name]:
        if one.opcode == "while":
            yield from walk(computations, attribute(one, "body"), (*loops, trips_of(one, computations)))
        elif one.opcode == "call":
            yield from walk(computations, attribute(one, "to_apply"), loops)
        elif one.opcode == "conditional":
            for branch in NAME.findall(braced(one, "branch_computations")):
                yield from walk(computations, branch, loops)
        else:
            yield one, loops


def collectives(text: str) -> list[Collective]:
    """All collectives of a program."""
    computations, entry = parse(text)
    return [found for one, loops in walk(computations, entry) for found in collectives_of(one, computations, loops)]


def is_collective(instruction: HloInstruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def collectives_of(
    instruction: HloInstruction, computations: Computations, loops: tuple[int, ...] = ()
) -> list[Collective]:
    """The arrays that an instruction's collective moves; empty where it is, holds or starts none."""
    callee = callee_of(instruction)
    fused = callee.startswith("all-reduce-scatter")  # a TPU's reduce-scatter as one fusion
    moved = instruction if is_collective(instruction) else None
    if callee and (fused or not continues(callee, computations)):
        moved = next((one for one in computations[callee] if is_collective(one)), None)
    if moved is None:
        return []
    kind = "reduce-scatter" if fused else moved.opcode.removesuffix("-start")
    devices = group(moved.rest)
    return [
        Collective(kind, dtype, size, devices, math.prod(loops), loops)
        for dtype, size in _sizes(moved, kind, len(devices))
    ]


def callee_of(instruction: HloInstruction) -> str:
    """The computation of a fusion or an asynchronous start; empty for other instructions."""
    return attribute(instruction, "calls") if instruction.opcode in ("fusion", "async-start") else ""


def continues(callee: str, computations: Computations) -> bool:
    """Whether a fusion of a TPU's program only continues a collective that another one has started."""
    done = any('"AsyncCollectiveDone"' in one.rest for one in computations[callee])
    return done or callee.startswith("async_collective_fusion")


def attribute(instruction: HloInstruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def braced(instruction: HloInstruction, name: str) -> str:
    found = re.search(rf"\b{name}=\{{([^}}]*)\}}", instruction.rest)
    return found[1] if found else ""


def trips_of(loop: HloInstruction, computations: Computations) -> int:
    """How often a loop runs: as the compiler noted, else from the bound that its counter is compared with."""
    if noted := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition = {one.name: one for one in computations[attribute(loop, "condition")]}
    compare = next(one for one in condition.values() if one.root)
    counter, bound = NAME.findall(compare.rest)[:2]
    assert compare.opcode == "compare" and "direction=LT" in compare.rest, f"loop {loop.name} ends by {compare}"
    end = int(condition[bound].rest.split(")")[0])
    place = re.search(r"index=(\d+)", condition[counter].rest)
    assert place is not None
    return end - _start(loop, int(place[1]), {one.name: one for one in computations[loop.computation]})


def _start(loop: HloInstruction, place: int, around: dict[str, HloInstruction]) -> int:
    """A loop's counter before its first iteration: 0 unless it is a constant."""
    state = around.get(NAME.findall(loop.rest)[0])
    if state is None or state.opcode != "tuple":
        return 0
    value = around.get(NAME.findall(state.rest)[place])
    while value is not None and value.opcode == "copy":
        value = around.get(NAME.findall(value.rest)[0])
    return int(value.rest.split(")")[0]) if value is not None and value.opcode == "constant" else 0


def group(rest: str) -> tuple[int, ...]:
    """Devices of a collective's first group. XLA writes groups in four ways."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(_numbers(found[1]))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S+)", rest):
        return tuple(_iota(found[2]).reshape(_numbers(found[1]))[0].tolist())
    if found := re.search(r"replica_groups=\w+\[([^\]]*)\](?:, device_ids=\((\[\S+)\))? \{([^}]*)\}", rest):
        axes = re.findall(r"'(\w+)'=(\d+)", found[1])
        sizes, chosen = [int(size) for _, size in axes], re.findall(r"'(\w+)'", found[3])
        devices = _iota(found[2] or f"[{math.prod(sizes)}]").reshape(sizes)
        return tuple(devices[tuple(slice(None) if name in chosen else 0 for name, _ in axes)].ravel().tolist())
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return tuple(int(one) for one in re.findall(r"\{(\d+)", found[1]))
    raise AssertionError(f"a collective without groups: {rest[:200]}")


def _iota(text: str) -> np.ndarray:
    """Devices in the order that `[8,8]T(1,0)` denotes: counted up over the dims, which are then transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, f"devices in an unknown form: {text}"
    dims = _numbers(found[1])
    return np.arange(math.prod(dims)).reshape(dims).transpose(_numbers(found[2]) if found[2] else None).ravel()


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _sizes(instruction: HloInstruction, kind: str, devices: int) -> list[tuple[str, int]]:
    """(dtype, bytes) of each array of a collective: gathered, or before it is reduced."""
    arrays = arrays_of(instruction.shape)
    if instruction.opcode.endswith("-start"):
        if kind in ("all-gather", "reduce-scatter"):  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        elif kind == "collective-permute":
            arrays = arrays[:1]
    scale = devices if kind == "reduce-scatter" and not instruction.opcode.startswith("all-reduce") else 1
    return [(array.dtype, array.size * scale) for array in arrays]


@functools.lru_cache(maxsize=100_000)
def arrays_of(shape: str) -> list[HloArray]:
    """The arrays of a shape, in order.

    S(n) names another memory space. A GPU's S(1) is device memory that collectives use; a TPU's, whose arrays are
    tiled, is vector memory.
    """
    return [
        HloArray(
            dtype,
            tuple(int(dim) for dim in dims.split(",") if dim),
            "S(" not in layout or ("S(1)" in layout and "T(" not in layout),
        )
        for dtype, dims, layout in ARRAY.findall(shape)
    ]


def attention_kernels(text: str) -> dict[str, dict[str, int]]:
    """Calls of fused attention in the program, forward and backward; empty where XLA's own attention runs."""
    cudnn = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
    splash = re.findall(r'%(splash_mha_(?:fwd|dq|dkv)[\w.]*) = [^\n]*custom_call_target="tpu_custom_call"', text)
    forward = {"cudnn": sum("Backward" not in one for one in cudnn), "splash": sum("_fwd" in one for one in splash)}
    calls = {"cudnn": len(cudnn), "splash": len(splash)}
    return {name: {"forward": forward[name], "backward": calls[name] - forward[name]} for name in calls if calls[name]}
