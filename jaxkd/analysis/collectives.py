"""What a compiled program sends between devices, read from its text.

The compiler decides which collectives a sharded program needs; this module counts them.
It joins several into one instruction where it can, so that the number of instructions
says little: what can be counted by hand are the arrays and their bytes. An instruction
in a loop counts as often as the loop goes round, one in a branch as if it were taken.

Bytes are those of the whole array that a group of devices works on: what an all-reduce
sums, what an all-gather returns, what a reduce-scatter takes, what each device gives to
an all-to-all or a permutation.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(\{\{[\d,]+\}|\[\d+,\d+\]<=|mesh\[.*?\}|\{\})")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One instruction.

    Attributes:
      kind: one of `KINDS`.
      arrays: how many arrays it works on.
      bytes: of these arrays, see the module docstring.
      devices: in each group that exchanges.
      times: how often it runs.
      source: the operation it comes from, as JAX names it; of several one.
    """

    kind: str
    arrays: int
    bytes: int
    devices: int
    times: int
    source: str

    @property
    def sent_bytes(self) -> float:
        """What each device sends in one run of it, if the devices form a ring."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return self.bytes * factor.get(self.kind, share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Sums over collectives, each as often as it runs.

    Attributes:
      instructions: how many.
      arrays: of them.
      bytes: of these arrays.
      sent_bytes: by each device, if the devices form rings.
    """

    instructions: int = 0
    arrays: int = 0
    bytes: int = 0
    sent_bytes: float = 0.0


def read_collectives(program: Any) -> tuple[Collective, ...]:
    """The collectives of a program in the order of its text.

    Args:
      program: what `jax.jit(f).lower(...).compile()` returns, or its `as_text()`.

    Raises:
      ValueError: a collective is in a loop whose number of rounds is unknown, or the
        text cannot be read.
    """
    text = program if isinstance(program, str) else program.as_text()
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    replicas = re.search(r"\breplica_count=(\d+)", text)
    everyone = int(partitions[1]) if partitions else 1
    everyone *= int(replicas[1]) if replicas else 1
    computations = _computations(text)
    times = _executions(computations)
    found = []
    for name, lines in computations.items():
        # A computation that nothing calls does not run.
        for line in lines if times[name] else ():
            collective = _collective(line, everyone, times[name])
            if collective is not None:
                found.append(collective)
    return tuple(found)


def sum_up(collectives: Iterable[Collective]) -> dict[str, Traffic]:
    """The traffic by kind, without kinds that do not occur."""
    sums: dict[str, Traffic] = {}
    for one in collectives:
        before = sums.get(one.kind, Traffic())
        sums[one.kind] = Traffic(
            instructions=before.instructions + one.times,
            arrays=before.arrays + one.times * one.arrays,
            bytes=before.bytes + one.times * one.bytes,
            sent_bytes=before.sent_bytes + one.times * one.sent_bytes,
        )
    return sums


def _computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation, its entry under `""`."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if lines is None:
            start = _COMPUTATION.match(line)
            if start:
                lines = found.setdefault("" if start[1] else start[2], [])
        elif line.startswith("}"):
            lines = None
        else:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                lines.append(instruction[1])
    if "" not in found:
        raise ValueError("the text has no entry computation; is it a compiled program?")
    return found


def _calls(instruction: str) -> Iterator[tuple[str, float]]:
    """The computations an instruction calls, and how often it does."""
    trips = _TRIPS.search(instruction)
    rounds = int(trips[1]) if trips else math.inf
    for role, names in _CALLED.findall(instruction):
        times = {"body": rounds, "condition": rounds + 1}.get(role, 1)
        for name in re.findall(r"[\w.\-]+", names):
            yield name, times


def _executions(computations: dict[str, list[str]]) -> dict[str, float]:
    """How often each computation runs in one run of the program."""
    callers: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for caller, lines in computations.items():
        for line in lines:
            for name, times in _calls(line):
                callers[name].append((caller, times))
    known: dict[str, float] = {"": 1}

    def executions(name: str) -> float:
        if name not in known:
            runs = [(executions(caller), times) for caller, times in callers[name]]
            known[name] = sum(count * times for count, times in runs if count)
        return known[name]

    return {name: executions(name) for name in computations}


def _collective(instruction: str, everyone: int, times: float) -> Collective | None:
    """Reads one instruction, None if it sends nothing."""
    shape, rest = _split_type(instruction)
    opcode = re.match(r"\s*([\w\-]+)\(", rest)
    if opcode is None:
        return None
    kind = opcode[1].removesuffix("-start")
    if kind not in KINDS:
        return None
    if kind != opcode[1] and kind != "all-reduce":
        # A started one returns its operands, its results and some bookkeeping.
        shape = _parts(shape)[1]
    arrays = [_bytes(dtype, sizes) for dtype, sizes in _ARRAY.findall(shape)]
    devices = _group_size(rest, everyone)
    size = sum(arrays) * (devices if kind == "reduce-scatter" else 1)
    pieces = kind == "all-to-all" and "dimensions=" not in rest
    name = re.search(r'op_name="([^"]*)"', rest)
    source = name[1] if name else ""
    if math.isinf(times):
        raise ValueError(
            f"a loop of unknown length runs {kind} ({source}); use jax.lax.scan, or "
            "fori_loop with static bounds"
        )
    return Collective(
        kind=kind,
        arrays=1 if pieces else len(arrays),
        bytes=size,
        devices=devices,
        times=int(times),
        source=source,
    )


def _split_type(instruction: str) -> tuple[str, str]:
    """`"f32[2]{0} add(...)"` or `"(f32[2], s32[]) while(...)"` after the type."""
    if not instruction.startswith("("):
        shape, _, rest = instruction.partition(" ")
        return shape, rest
    depth = 0
    for i, letter in enumerate(instruction):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return instruction[: i + 1], instruction[i + 1 :]
    raise ValueError(f"cannot read {instruction[:80]!r}")


def _parts(shape: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(dtype: str, sizes: str) -> int:
    count = math.prod(int(size) for size in sizes.split(",") if size)
    if dtype == "pred":
        return count
    bits = re.search(r"\d+", dtype)
    if bits is None:
        raise ValueError(f"unknown type {dtype!r}")
    return -(-count * int(bits[0]) // 8)


def _group_size(text: str, everyone: int) -> int:
    """How many devices exchange with each other."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
    if pairs:
        return 2
    groups = _GROUPS.search(text)
    if groups is None or groups[1] == "{}":
        return everyone
    found = groups[1]
    if found.startswith("{{"):
        return found.count(",") + 1
    if found.startswith("["):
        return int(found.partition(",")[2].partition("]")[0])
    # mesh['a'=4,'b'=2] {'a'}, where 'a':(2)2 names a part of an axis.
    mesh, _, used = found.partition("]")
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", used)
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
