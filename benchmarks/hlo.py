"""The work of an optimized program, read from its text: each kernel's bytes and FLOPs, loops multiplied out."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Operations without a cost of their own.
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "opt-barrier", "partition-id"}
_SLICES = {"slice", "dynamic-slice", "gather"}
# Operations that need all of their operands for any entry of the result; the others are taken to go entry by entry.
_WHOLE = {"dot", "convolution", "reduce", "reduce-window", "scatter", "sort", "custom-call", "cholesky", "fft", "while"}
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `name = type op(inner), attributes`, whose operands are the names in `inner`."""

    name: str
    type: str
    op: str
    inner: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.inner)

    def attribute(self, pattern: str) -> str | None:
        """Returns what the pattern's group finds among the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def callee(self) -> str | None:
        """The computation that a fusion or a call runs."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A part of a program that reads its operands from memory and writes its results there.

    Attributes:
        name: its name in the program.
        source: its place in the source, as JAX names it.
        times: how often it runs.
        bytes: read and written each time.
        flops: of products of matrices and of cuDNN's attention, each time.
    """

    name: str
    source: str
    times: int
    bytes: float
    flops: float


def shapes(type_: str) -> list[tuple[float, tuple[int, ...]]]:
    """Returns the arrays of an instruction's type: bytes of an entry, and the dimensions."""
    found = []
    for kind, bits, dimensions in _ARRAY.findall(type_):
        size = 1.0 if kind == "pred" else int(bits or 0) / 8
        found.append((size, tuple(int(n) for n in dimensions.split(",") if n)))
    return found


def size(type_: str) -> float:
    """Returns the bytes of all arrays of an instruction's type."""
    return sum(entry * math.prod(dimensions) for entry, dimensions in shapes(type_))


def entries(type_: str) -> float:
    """Returns how many entries the arrays of an instruction's type have."""
    return float(sum(math.prod(dimensions) for _, dimensions in shapes(type_)))


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def _instruction(line: str) -> Instruction | None:
    """Returns the instruction on a line, or None if there is none."""
    name, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opening = rest.find("(", end)
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    bare = name.removeprefix("ROOT ").removeprefix("%")
    op, inner = rest[end:opening].strip(), rest[opening + 1 : closing]
    return Instruction(bare, rest[:end], op, inner, rest[closing + 1 :], name.startswith("ROOT "))


class Program:
    """An optimized program, from the text that `compiled.as_text()` gives.

    Attributes:
        unknown: the loops whose length the compiler does not know.
    """

    def __init__(self, text: str, unknown_trips: int = 1) -> None:
        """Reads a program; a loop of unknown length is taken to run `unknown_trips` times."""
        self.unknown: set[str] = set()
        self._trips, self._entry = unknown_trips, ""
        self._computations: dict[str, dict[str, Instruction]] = {}
        inside: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                inside = self._computations.setdefault(header.group(2), {})
                self._entry = header.group(2) if header.group(1) else self._entry
            elif found := _instruction(line):
                inside[found.name] = found

    def kernels(self) -> list[Kernel]:
        """Returns every kernel that runs; of a conditional, the branch that moves more bytes."""
        return list(self._kernels(self._entry, 1))

    def _kernels(self, computation: str, times: int) -> Iterator[Kernel]:
        inside = self._computations[computation]
        for it in inside.values():
            if it.op in _FREE or it.op.endswith("-done"):
                continue
            if it.op == "while":
                trip_count = it.attribute(r'known_trip_count":?\s*\{"n":\s*"(\d+)"')
                if trip_count is None:
                    self.unknown.add(it.name)
                yield from self._kernels(it.attribute(r"body=%?([\w.\-]+)"), times * int(trip_count or self._trips))
            elif it.op == "conditional":
                sides = [list(self._kernels(side, times)) for side in self._branches(it)]
                yield from max(sides, key=lambda side: sum(kernel.bytes * kernel.times for kernel in side))
            elif it.op in ("call", "async-start"):
                yield from self._kernels(it.callee, times)
            else:
                yield Kernel(it.name, it.attribute(r'op_name="([^"]*)"') or "", times, *self._cost(it, inside))

    def _branches(self, it: Instruction) -> list[str]:
        listed = it.attribute(r"branch_computations=\{([^}]*)\}")
        if listed is not None:
            return [name.strip().lstrip("%") for name in listed.split(",")]
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", it.attributes)

    def _cost(self, it: Instruction, inside: dict[str, Instruction]) -> tuple[float, float]:
        """Returns a kernel's bytes and FLOPs."""
        full = [size(inside[name].type) if name in inside else 0.0 for name in it.operands]
        if it.op == "fusion":
            read = sum(whole * self._read(it.callee, i) for i, whole in enumerate(full))
            return read + self._written(it.callee), self._flops_within(it.callee)
        if it.op == "dynamic-update-slice":
            return 2 * full[1], 0.0
        if it.op in _SLICES:
            return 2 * size(it.type), 0.0
        if it.op.endswith("-start"):  # its type has its operands beside its results
            return 2 * sum(full), 0.0
        written = it.type
        if it.op == "custom-call":  # a library's workspace is untyped bytes, which may stay unused
            written = re.sub(r"[su]8\[\d+\]", "", written)
        return sum(full) + size(written), self._flops(it, inside)

    def _read(self, computation: str, index: int) -> float:
        """Returns the share of one operand that a fusion reads: only the slices, if it is only sliced."""
        for it in self._computations[computation].values():
            if it.op == "parameter" and it.inner == str(index):
                return self._entries(computation, it) / max(entries(it.type), 1)
        return 1.0

    @functools.cache  # noqa: B019  a program lives as long as its command
    def _entries(self, computation: str, it: Instruction) -> float:
        """Returns how many entries of an instruction's result are needed inside a fusion."""
        whole = entries(it.type)
        needed = whole if it.root else 0.0
        for user in self._computations[computation].values():
            for place, operand in enumerate(user.operands):
                if operand != it.name or (user.op == "dynamic-update-slice" and place == 0):
                    continue
                if user.op == "fusion":
                    needed += whole * self._read(user.callee, place)
                elif (user.op in _SLICES and place == 0) or (user.op not in _WHOLE and entries(user.type) == whole):
                    needed += self._entries(computation, user)
                else:
                    needed += whole
        return min(needed, whole)

    def _written(self, computation: str) -> float:
        """Returns the bytes that a fusion writes: of an array that it updates in place, the new part."""
        inside = self._computations[computation]

        def of(it: Instruction) -> float:
            if it.op == "tuple":
                return sum(of(inside[name]) for name in it.operands)
            if it.op == "dynamic-update-slice":
                return size(inside[it.operands[1]].type)
            if it.op == "bitcast" and inside[it.operands[0]].op == "dynamic-update-slice":
                return of(inside[it.operands[0]])
            return size(it.type)

        return sum(of(it) for it in inside.values() if it.root)

    def _flops_within(self, computation: str) -> float:
        inside = self._computations[computation]
        return sum(
            self._flops_within(it.callee) if it.op == "fusion" else self._flops(it, inside) for it in inside.values()
        )

    def _flops(self, it: Instruction, inside: dict[str, Instruction]) -> float:
        """Returns the FLOPs of a product of matrices, by XLA or cuBLAS, or of cuDNN's attention; 0 for anything else."""
        target = it.attribute(r'custom_call_target="([^"]*)"') or ""
        if it.op == "dot" or "cublas" in target:
            listed = it.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
            if listed is None:
                listed = (it.attribute(r'lhs_contracting_dimensions":\s*\[([^\]]*)\]') or "").replace('"', "")
            left = shapes(inside[it.operands[0]].type)[0][1]
            summed = math.prod(left[int(i)] for i in listed.split(",") if i)
            return 2.0 * summed * math.prod(shapes(it.type)[0][1])
        if "fmha" in target:
            scores = it.attribute(r'intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]') or ""
            batch, heads, queries, keys = (int(n) for n in scores.replace('"', "").split(","))
            head_dim = math.prod(shapes(inside[it.operands[0]].type)[0][1]) / (batch * heads * queries)
            products = 5 if "Backward" in target else 2
            return products * 2.0 * batch * heads * queries * keys * head_dim
        return 0.0
