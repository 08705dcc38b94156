"""The cost of a compiled program on one device, counted in its HLO text: flops, collectives, memory traffic.

XLA's own `cost_analysis` counts the body of a loop once; here it counts for every iteration, whose number is read from
the comparison in the loop's condition. A collective that the compiler made asynchronous is several instructions, and
counts where it starts. A custom call, such as a Pallas kernel, counts what its own cost estimate says.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota"),
    *("async-start", "async-update"),  # what they run is counted
)
# Custom calls of the TPU's compiler that compute nothing.
_NO_WORK = (
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"),
    *("AsyncCollectiveStart", "AsyncCollectiveDone", "PrepareAsyncCallStart", "PrepareAsyncCallDone"),
)
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*S\([15]\)\})?")  # S(1), S(5): in the core, of the host


@dataclasses.dataclass
class Cost:
    """The cost of one execution on one device.

    `flops` of matrix products and convolutions, where a multiplication and an addition are two; `traffic`, the bytes
    read from and written to main memory, by fusions as by one operation; `collectives`, how often each one runs, and
    `sent`, the bytes that it sends in a ring of its group. `unknown`, how often each custom call runs that states no
    cost, by target or kernel: its flops are not among `flops`.
    """

    flops: float = 0.0
    traffic: float = 0.0
    collectives: Counter[str] = dataclasses.field(default_factory=Counter)
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str

    def dims(self) -> list[int]:
        """The shape of the (first) array."""
        found = _ARRAY.search(self.type)
        return [int(n) for n in found[2].split(",") if n] if found else []

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


_Computation = dict[str, _Instruction]


def count(text: str) -> Cost:
    """The cost of a compiled program, `jax.stages.Compiled.as_text()`."""
    computations, entry = _parse(text)
    cost = Cost()
    for name, times, inside in _runs(computations, entry, 1.0, False):
        computation = computations[name]
        going_on = _chained(computation) if inside else {}
        for instruction in computation.values():
            op = instruction.op.removesuffix("-start")
            if instruction.name in going_on:
                continue
            if op in COLLECTIVES:
                _count_collective(cost, name, instruction, computation, times)
            elif op == "convolution":
                cost.flops += times * _convolution_flops(instruction, computation)
            elif op == "dot":
                cost.flops += times * _dot_flops(instruction, computation)
            elif op == "custom-call":
                _count_custom_call(cost, instruction, times)
            if not inside and instruction.op not in _FREE:
                cost.traffic += times * _traffic(instruction, computation, computations)
    return cost


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    text = re.sub(r"\n(?=\"|\}[},])", "", text)  # attributes of a Pallas kernel are on lines of their own
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (found := _LINE.match(line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", found[4]))
            current[found[1]] = _Instruction(found[1], found[2], found[3], operands, found[4] + found[5])
    return computations, entry


def _runs(
    computations: dict[str, _Computation], name: str, times: float, inside: bool
) -> Iterator[tuple[str, float, bool]]:
    """Every computation that runs, how often, and whether it is inside a fusion."""
    yield name, times, inside
    for instruction in computations[name].values():
        if instruction.op in ("async-update", "async-done"):
            continue  # it names the computation that async-start runs
        if instruction.op == "while":
            body, condition = instruction.called("body"), instruction.called("condition")
            trips = _trips(computations, computations[name], instruction, str(body), str(condition))
            yield from _runs(computations, str(body), times * trips, inside)
        elif instruction.op == "conditional":
            for branch in re.findall(r"%([\w.\-]+)", instruction.rest.partition("branch_computations=")[2]):
                if branch in computations:
                    yield from _runs(computations, branch, times, inside)
        elif called := instruction.called("calls") or (instruction.op == "call" and instruction.called("to_apply")):
            yield from _runs(computations, called, times, inside or instruction.op == "fusion")


def _chained(computation: _Computation) -> _Computation:
    """The collectives of a fusion that began in another one.

    The TPU's compiler overlaps a collective with other work by fusing parts of it with that: a chain of fusions, each
    of which has the whole collective with the chain's number in it, and the first its start too.
    """
    if any('custom_call_target="AsyncCollectiveStart"' in i.rest for i in computation.values()):
        return {}
    return {i.name: i for i in computation.values() if i.op in COLLECTIVES and "chain_id=" in i.rest}


def _trips(
    computations: dict[str, _Computation], around: _Computation, loop: _Instruction, body: str, condition: str
) -> int:
    """Iterations of a loop, whose counter stays below a constant; 1 where there is no such counter.

    It starts at 0, or at another constant where the compiler took the first iterations out of the loop.
    """
    names = [condition] + [str(i.called("calls")) for i in computations[condition].values() if i.called("calls")]
    instructions = [i for name in names for i in computations[name].values()]
    counters = [i for i in computations[condition].values() if i.op == "get-tuple-element" and _whole_number(i)]
    limits = [number for i in instructions if (number := _constant(i)) is not None]
    if not counters or not limits or not any(i.op == "compare" and "direction=LT" in i.rest for i in instructions):
        return 1
    place = re.search(r"index=(\d+)", counters[0].rest)
    after = computations[body]
    next_value, step = after[list(after.values())[-1].operands[int(place[1])]] if place else None, 0
    while next_value is not None and next_value.op in ("add", "copy"):  # by more than 1 where the loop was unrolled
        operands = [after[name] for name in next_value.operands]
        step += sum(number for i in operands if (number := _constant(i)) is not None)
        next_value = next((i for i in operands if _constant(i) is None), None)
    state = around.get(loop.operands[0])
    first = None
    if place is not None and state is not None and state.op == "tuple":
        first = around.get(state.operands[int(place[1])])
    while first is not None and first.op == "copy":
        first = around.get(first.operands[0])
    start = _constant(first) if first is not None else None
    return math.ceil((max(limits) - (start or 0)) / max(step, 1))


def _whole_number(instruction: _Instruction) -> bool:
    return instruction.type.startswith(("s32[]", "u32[]"))


def _constant(instruction: _Instruction) -> int | None:
    found = re.match(r"\d+", instruction.rest) if instruction.op == "constant" and _whole_number(instruction) else None
    return int(found[0]) if found else None


def _bytes(type_: str) -> float:
    """The size of the arrays of a type, without those outside main memory."""
    total = 0.0
    for dtype, dims, elsewhere in _ARRAY.findall(type_):
        digits = re.sub(r"\D", "", dtype.split("e")[0])
        bits = _BITS.get(dtype) or int(digits or 0)
        total += 0 if elsewhere else bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _count_collective(
    cost: Cost, name: str, instruction: _Instruction, computation: _Computation, times: float
) -> None:
    size = sum(_bytes(computation[o].type.replace("S(1)", "")) for o in instruction.operands if o in computation)
    op, group = instruction.op.removesuffix("-start"), _group_size(instruction.rest)
    if name.startswith("all-reduce-scatter"):  # as the TPU's compiler names it
        op = "reduce-scatter"
    factor = {
        "all-gather": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
    }.get(op, (group - 1) / group)
    cost.collectives[op] += round(times)
    cost.sent[op] += round(times * factor * size)


def _count_custom_call(cost: Cost, instruction: _Instruction, times: float) -> None:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    target = found[1] if found else ""
    estimate = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', instruction.rest)
    if estimate:
        cost.flops += times * int(estimate[1])
    elif target not in _NO_WORK:
        kernel = target in ("", "tpu_custom_call")  # of Pallas: instructions have its name
        cost.unknown[instruction.name.split(".")[0] if kernel else target] += round(times)


def _group_size(rest: str) -> int:
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", rest):
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        return math.prod(int(sizes[axis]) for axis in found[2].split(","))
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(found[1].split(",")) if found else 1


def _dot_flops(instruction: _Instruction, computation: _Computation) -> float:
    left = computation[instruction.operands[0]].dims()
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    contracted = [left[int(i)] for i in found[1].split(",") if i] if found else []
    return 2.0 * math.prod(instruction.dims()) * math.prod(contracted)


def _convolution_flops(instruction: _Instruction, computation: _Computation) -> float:
    """2 × outputs × inputs of each output that are neither padding nor holes of a dilation.

    The TPU's compiler writes every matrix product as a convolution, batch axes as dilated windows.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {instruction.rest[:200]}")
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    left, right = (computation[o].dims() for o in instruction.operands[:2])
    out = dict(zip(labels[3], instruction.dims(), strict=True))
    inputs = dict(zip(labels[1], left, strict=True))
    kernel = dict(zip(labels[2], right, strict=True))
    rank = len(left) - 2

    def option(name: str, default: str) -> list[str]:
        return options[name].split("x") if name in options else [default] * rank

    pads = [[int(n) for n in pad.split("_")] for pad in option("pad", "0_0")]
    strides, spread, holes = ([int(n) for n in option(name, "1")] for name in ("stride", "lhs_dilate", "rhs_dilate"))
    products = 2.0 * out["b"] * out["f"] * kernel["i"]
    for i in range(rank):
        reach = (inputs[str(i)] - 1) * spread[i] + 1
        outs = np.arange(out[str(i)]) * strides[i] - pads[i][0]
        places = (outs + k * holes[i] for k in range(kernel[str(i)]))
        products *= sum(int(((p >= 0) & (p < reach) & (p % spread[i] == 0)).sum()) for p in places)
    return products


def _traffic(instruction: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> float:
    """Bytes read and written; of sliced operands and results, those of the slice."""
    if instruction.op.endswith("-done"):
        return 0
    if instruction.op == "slice-start":  # ((array), slice, context), from main memory into the core
        _, part = list(_ARRAY.finditer(instruction.type))[:2]
        return _bytes(part[0].replace("S(1)", "")) + _bytes(part[0])
    if instruction.op.endswith("-start") and instruction.type.startswith("("):  # operands and results
        return _bytes(instruction.type)
    if instruction.op in ("dynamic-slice", "slice"):
        return 2 * _bytes(instruction.type)
    if instruction.op == "dynamic-update-slice":
        return 2 * _bytes(computation[instruction.operands[1]].type)
    called = instruction.called("calls") if instruction.op == "fusion" else None
    if called is None:
        return _bytes(instruction.type) + sum(_bytes(computation[o].type) for o in instruction.operands)
    inner = computations[called]
    total, updated = 0.0, set()
    root = list(inner.values())[-1]
    if "AsyncCollective" in root.rest:  # AsyncCollectiveDone moves nothing
        gather = inner[root.operands[0]]
        started = "AsyncCollectiveStart" in root.rest
        return _bytes(gather.type) + sum(_bytes(inner[o].type) for o in gather.operands) if started else 0
    chained = _chained(inner)
    passed = {o for i in chained.values() for o in i.operands}
    for result in [inner[o] for o in root.operands] if root.op == "tuple" else [root]:
        if result.name in chained or (result.op == "parameter" and chained):
            passed.add(result.name)
        elif result.op == "dynamic-update-slice":
            updated.add(result.operands[0])
            total += _bytes(inner[result.operands[1]].type)
        else:
            total += _bytes(result.type)
    readers: dict[str, list[_Instruction]] = {}
    for i in inner.values():
        for operand in i.operands:
            readers.setdefault(operand, []).append(i)
    for i in inner.values():
        if i.op == "parameter" and i.name not in updated | passed:
            users = readers.get(i.name, [])
            sliced = users and all(u.op in ("dynamic-slice", "slice") for u in users)
            total += min(_bytes(i.type), sum(_bytes(u.type) for u in users)) if sliced else _bytes(i.type)
    return total
