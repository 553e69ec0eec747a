"""Reads a compiled program's text (XLA's HLO): which collectives run, how often, over how many bytes; which kernels.

Guarantees that loops count: what stands in the body of a scan over 20 layers counts 20 times. An asynchronous
collective counts once, however many pieces the text has for it. Bytes are what one device sends: of S bytes over n
devices, S (n - 1) / n for an all-gather (S gathered), a reduce-scatter (S before it is cut) or an all-to-all, twice
that for an all-reduce, S for a permute. Both of XLA's dialects are read, that of GPUs and that of TPUs.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "s4": 1, "u4": 1, "token": 0}

INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
OPERANDS = re.compile(r"(?:[^()]+|\((?:[^()]+|\([^()]*\))*\))*")  # up to the parenthesis that closes them
WRAPPED = re.compile(r"\n(?=\"|\}\})")  # a Pallas kernel's attributes go over several lines


@dataclass(frozen=True)
class HloInstruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that this one reads."""
        found = OPERANDS.match(self.rest)
        return tuple(re.findall(r"%([\w.\-]+)", found[0])) if found and self.opcode != "parameter" else ()


@dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    dtype: str
    size: int  # bytes: gathered, or before they are reduced
    devices: int  # that take part
    times: int  # a step
    loops: tuple[int, ...]  # trips of the loops around it, outermost first

    @property
    def sent(self) -> int:
        """Bytes that one device sends a step."""
        part = {"all-reduce": 2, "collective-permute": 0}.get(self.kind, 1) * self.size * (self.devices - 1)
        return self.times * (self.size if self.kind == "collective-permute" else part // self.devices)


Computations = dict[str, list[HloInstruction]]


def parse(text: str) -> tuple[Computations, str]:
    """Instructions by computation, and the entry's name."""
    computations: Computations = {}
    entry, current = "", None
    for line in WRAPPED.sub("", re.sub(r"/\*.*?\*/", "", text)).splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            current.append(HloInstruction(found[2], found[3], found[4], found[5], bool(found[1])))
    assert entry, "the program's text has no entry"
    return computations, entry


def collectives(text: str) -> list[Collective]:
    """All collectives of a program."""
    computations, entry = parse(text)
    found = []
    for instruction, loops in _walk(computations, entry, ()):
        if instruction.opcode == "fusion" or is_collective(instruction):
            found += collectives_of(instruction, computations, loops)
    return found


def is_collective(instruction: HloInstruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def collectives_of(
    instruction: HloInstruction, computations: Computations, loops: tuple[int, ...] = ()
) -> list[Collective]:
    """The arrays that one collective moves; of a fusion, that of a TPU's reduce-scatter in one piece."""
    kind = instruction.opcode.removesuffix("-start")
    if instruction.opcode == "fusion":
        kind, inner = "reduce-scatter", computations[attribute(instruction, "calls")]
        instruction = next(one for one in inner if one.opcode.startswith("all-reduce"))
    devices = len(group(instruction.rest))
    sizes = _sizes(instruction, kind, devices)
    return [Collective(kind, dtype, size, devices, math.prod(loops), loops) for dtype, size in sizes]


def _walk(
    computations: Computations, name: str, loops: tuple[int, ...]
) -> Iterator[tuple[HloInstruction, tuple[int, ...]]]:
    """Each instruction that runs, and the trips of the loops around it."""
    for one in computations[name]:
        callee = attribute(one, "calls") or attribute(one, "to_apply")
        if one.opcode == "while":
            trips = trips_of(one, computations, computations[name])
            yield from _walk(computations, attribute(one, "body"), (*loops, trips))
        elif one.opcode == "fusion" and callee.startswith("all-reduce-scatter"):
            yield one, loops
        elif one.opcode == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", braced(one, "branch_computations")):
                yield from _walk(computations, branch, loops)
        elif one.opcode in ("fusion", "call", "async-start") and not goes_on(callee, computations):
            yield from _walk(computations, callee, loops)
        elif one.opcode not in ("fusion", "call", "async-start"):
            yield one, loops


def goes_on(callee: str, computations: Computations) -> bool:
    """Whether a fusion of a TPU's program only goes on with a collective that another one has started."""
    done = any('"AsyncCollectiveDone"' in one.rest for one in computations[callee])
    return done or callee.startswith("async_collective_fusion")


def attribute(instruction: HloInstruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)
    return found[1] if found else ""


def braced(instruction: HloInstruction, name: str) -> str:
    found = re.search(rf"\b{name}=\{{([^}}]*)\}}", instruction.rest)
    return found[1] if found else ""


def trips_of(loop: HloInstruction, computations: Computations, around: list[HloInstruction]) -> int:
    """How often a loop runs: what the compiler noted, else the bound that its counter is compared with."""
    if noted := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(noted[1])
    condition = {one.name: one for one in computations[attribute(loop, "condition")]}
    compare = next(one for one in condition.values() if one.root)
    counter, bound = re.findall(r"%([\w.\-]+)", compare.rest)[:2]
    assert compare.opcode == "compare" and "direction=LT" in compare.rest, f"loop {loop.name} ends by {compare}"
    end = int(condition[bound].rest.split(")")[0])
    place = re.search(r"index=(\d+)", condition[counter].rest)
    assert place is not None
    return end - _start(loop, int(place[1]), {one.name: one for one in around})


def _start(loop: HloInstruction, place: int, around: dict[str, HloInstruction]) -> int:
    """A loop's counter before its first turn: 0 unless a constant says otherwise."""
    state = around.get(re.findall(r"%([\w.\-]+)", loop.rest)[0])
    if state is None or state.opcode != "tuple":
        return 0
    value = around.get(re.findall(r"%([\w.\-]+)", state.rest)[place])
    while value is not None and value.opcode == "copy":
        value = around.get(re.findall(r"%([\w.\-]+)", value.rest)[0])
    return int(value.rest.split(")")[0]) if value is not None and value.opcode == "constant" else 0


def group(rest: str) -> tuple[int, ...]:
    """Devices of a collective's first group, from any of the four ways in which groups are written."""
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
    """Devices in the order that `[8,8]T(1,0)` stands for: counted up over the dims, which are then transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, f"devices in an unknown form: {text}"
    dims = _numbers(found[1])
    return np.arange(math.prod(dims)).reshape(dims).transpose(_numbers(found[2]) if found[2] else None).ravel()


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _sizes(instruction: HloInstruction, kind: str, devices: int) -> list[tuple[str, int]]:
    """(dtype, bytes) of each array of a collective: gathered, or before it is reduced."""
    shapes = [(dtype, _size(dtype, dims)) for dtype, dims in SHAPE.findall(re.sub(r"\{[^}]*\}", "", instruction.shape))]
    if instruction.opcode.endswith("-start"):
        if kind in ("all-gather", "reduce-scatter"):  # operands, then results
            shapes = shapes[len(shapes) // 2 :]
        elif kind == "collective-permute":
            shapes = shapes[:1]
    scale = devices if kind == "reduce-scatter" and not instruction.opcode.startswith("all-reduce") else 1
    return [(dtype, size * scale) for dtype, size in shapes]


def _size(dtype: str, dims: str) -> int:
    size = BYTES[dtype]
    for dim in dims.split(","):
        size *= int(dim) if dim else 1
    return size


def attention_kernels(text: str) -> dict[str, dict[str, int]]:
    """Calls of fused attention that stand in the program, forward and backward; empty where XLA's own runs."""
    targets = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
    splash = re.findall(r'%(splash_mha_(?:fwd|dq|dkv)[\w.]*) = [^\n]*custom_call_target="tpu_custom_call"', text)
    found = {
        "cudnn": {"forward": sum("Backward" not in one for one in targets)},
        "splash": {"forward": sum("_fwd" in one for one in splash)},
    }
    found["cudnn"]["backward"] = len(targets) - found["cudnn"]["forward"]
    found["splash"]["backward"] = len(splash) - found["splash"]["forward"]
    return {name: calls for name, calls in found.items() if any(calls.values())}
