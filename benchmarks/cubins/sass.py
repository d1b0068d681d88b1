"""Reads the machine code of a kernel: its instructions, and its loops."""

from __future__ import annotations

import re
from typing import NamedTuple

LINE = re.compile(
    r"^\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
TARGET = re.compile(r"(?:^|[\s,])`?\(?(0x[0-9a-f]+)\)?")
LEAVES = {"EXIT", "RET", "BPT", "KILL"}


class Instruction(NamedTuple):
    """One machine instruction. name: with its suffixes, as `LDGSTS.E.BYPASS.128`."""

    address: int
    conditional: bool
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """The name without suffixes."""
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.kind not in ("BRA", "BRX", "JMP"):
            return None
        found = TARGET.findall(self.operands)
        return int(found[-1], 16) if found else None


class Loop(NamedTuple):
    """Instructions that repeat, by their place in the program."""

    head: int
    body: frozenset[int]


def parse(text: str) -> list[Instruction]:
    """Read what `cuobjdump -sass` prints; the padding after the program's end is left out."""
    found = [
        Instruction(int(address, 16), bool(predicate), name, operands.strip())
        for address, predicate, name, operands in LINE.findall(text)
    ]
    while found and found[-1].kind == "NOP":
        found.pop()
    return found


def loops(program: list[Instruction]) -> list[Loop]:
    """Return the natural loops: a branch back to a place that every way to it passes."""
    place = {instruction.address: i for i, instruction in enumerate(program)}
    starts = {0}
    for i, instruction in enumerate(program):
        if instruction.target in place:
            starts.add(place[instruction.target])
        if instruction.target is not None or instruction.kind in LEAVES:
            starts.add(i + 1)
    first = sorted(start for start in starts if start < len(program))
    last = [start - 1 for start in first[1:]] + [len(program) - 1]
    block_at = {start: block for block, start in enumerate(first)}
    after = [_followers(program, end, place, block_at) for end in last]
    before: list[list[int]] = [[] for _ in first]
    for block, followers in enumerate(after):
        for follower in followers:
            before[follower].append(block)
    above = _dominators(after, before)
    bodies: dict[int, set[int]] = {}
    for block, followers in enumerate(after):
        for head in followers:
            if above[block] is not None and head in above[block]:
                bodies.setdefault(head, {head}).update(_reaching(block, head, before))
    return [
        Loop(first[head], frozenset(i for b in body for i in range(first[b], last[b] + 1)))
        for head, body in sorted(bodies.items())
    ]


def innermost(program: list[Instruction], matter: set[int]) -> list[Loop]:
    """Return the loops that touch `matter` and hold no other such loop."""
    touching = [loop for loop in loops(program) if not loop.body.isdisjoint(matter)]
    return [a for a in touching if not any(b.body < a.body for b in touching)]


def spills_in_loops(program: list[Instruction]) -> int:
    """Return how many registers are spilled or read back in loops that hold no other loop."""
    inner: set[int] = set()
    for loop in innermost(program, set(range(len(program)))):
        inner |= loop.body
    return sum(program[place].kind in ("STL", "LDL") for place in inner)


def _followers(
    program: list[Instruction], end: int, place: dict[int, int], block_at: dict[int, int]
) -> list[int]:
    instruction = program[end]
    found = []
    # `BRA.U UP0` and `BRA P0` are conditional without a predicate in front
    sure = not instruction.conditional and not re.search(r"\bU?P\d", instruction.operands)
    leaves = instruction.kind in LEAVES or instruction.target is not None
    if instruction.target in place:
        found.append(block_at[place[instruction.target]])
    if not (leaves and sure) and end + 1 in block_at:
        found.append(block_at[end + 1])
    return found


def _dominators(after: list[list[int]], before: list[list[int]]) -> list[set[int] | None]:
    """Return for every block those that all ways to it pass; None where none leads there."""
    above: list[set[int] | None] = [None] * len(after)
    above[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in range(1, len(after)):
            ways = [above[b] for b in before[block] if above[b] is not None]
            if ways:
                passed = set.intersection(*ways) | {block}
                changed |= passed != above[block]
                above[block] = passed
    return above


def _reaching(block: int, head: int, before: list[list[int]]) -> set[int]:
    found, waiting = {head}, [block]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.add(at)
            waiting += before[at]
    return found
