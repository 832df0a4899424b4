"""Read NVIDIA machine code (SASS): instructions, loops, and registers that a running wgmma still reads.

A Hopper wgmma runs on after it is issued. It reads its A operand, where that stands in registers, and writes its
accumulator until a `WARPGROUP.DEPBAR` has retired its group. ptxas before 13.3 can reuse such registers too early in a
software-pipelined loop (Triton issue 9433, pull request 11781); the result is then wrong, perhaps only in some runs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LABEL = re.compile(r"^\s*(\.L_[\w.]+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;")
TARGET = re.compile(r"(\.L_[\w.]+)")
DESTINATION = re.compile(r"(?:U?P[T\d]+, )?R(\d+)")  # after a predicate that is written too, as of SHFL
WITHOUT_DESTINATION = ("BRA", "BRX", "RET", "CALL", "BAR", "WARPSYNC", "WARPGROUP", "NANOSLEEP", "R2UR")
SPECIAL_CLOCKS = 8  # for the 32 threads of a warp, four a clock
A_REGISTERS = 4  # of one wgmma in each thread: 64 rows × 32 bytes over 128 threads
ENDS = ("EXIT", "RET", "BRX")


class Instruction(NamedTuple):
    predicate: str  # "@P0", or "" where it always runs
    opcode: str
    operands: str


class Code(NamedTuple):
    """What a warp needs of its quarter of a multiprocessor to run some instructions once, at full rates."""

    instructions: int  # issued, one a clock
    tensor_clocks: int  # of the tensor core
    special_clocks: int  # of the unit that computes exp2, log2, reciprocals and square roots


# A place in the code, the groups of wgmma in flight, oldest first, and the group not yet committed; of registers.
Path = tuple[int, tuple[frozenset[int], ...], frozenset[int]]


def required_match(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
    """Return the first match of `pattern`, which `text` must have."""
    found = re.search(pattern, text)
    assert found is not None, f"{text!r} has no match of {pattern!r}"
    return found


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The text of nvdisasm or cuobjdump -> instructions, and for each label the place of the next one."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def wgmma_hazards(sass: str) -> int:
    """Count the instructions that write a register of a wgmma which no wait has retired, on any path through the code.

    A path is followed with the groups of wgmma that are in flight, oldest first, and the one not yet committed; the
    same place with the same groups is visited once. Accumulators that a later wgmma adds to are no hazard.
    """
    instructions, labels = parse(sass)
    found: set[int] = set()
    seen: set[Path] = set()
    paths: list[Path] = [(0, (), frozenset())]
    while paths:
        place, in_flight, open_group = paths.pop()
        while place < len(instructions) and (place, in_flight, open_group) not in seen:
            seen.add((place, in_flight, open_group))
            predicate, opcode, operands = instructions[place]
            if "GMMA" in opcode:
                open_group |= registers_of_wgmma(opcode, operands)
                if "gsb0" in operands:
                    in_flight, open_group = (*in_flight, open_group), frozenset()
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                unfinished = int(required_match(r"gsb0, 0x([0-9a-f]+)", operands)[1], 16)
                in_flight = in_flight[len(in_flight) - unfinished :] if unfinished < len(in_flight) else in_flight
                in_flight = in_flight if unfinished else ()
            elif written_registers(opcode, operands) & open_group.union(*in_flight):
                found.add(place)
            if opcode == "BRA" and (target := labels.get(required_match(TARGET, operands)[1])) is not None:
                if not predicate and "P" not in operands.split("`")[0]:
                    place = target
                    continue
                paths.append((target, in_flight, open_group))
            elif opcode in ENDS and not predicate:
                break
            place += 1
    return len(found)


def registers_of_wgmma(opcode: str, operands: str) -> frozenset[int]:
    """Its accumulator, and its A operand where that is not a descriptor of shared memory."""
    accumulator, a = required_match(r"^R(\d+), (?:R(\d+), )?gdesc", operands).groups()
    columns = int(required_match(r"64x(\d+)x", opcode)[1])
    registers = set(range(int(accumulator), int(accumulator) + columns // (2 if ".F32" in opcode else 4)))
    return frozenset(registers | (set(range(int(a), int(a) + A_REGISTERS)) if a else set()))


def written_registers(opcode: str, operands: str) -> set[int]:
    """The registers that an instruction other than a wgmma writes."""
    destination = DESTINATION.match(operands)
    if destination is None or opcode.startswith(WITHOUT_DESTINATION):
        return set()
    return set(range(int(destination[1]), int(destination[1]) + registers_written(opcode)))


def registers_written(opcode: str) -> int:
    if re.search(r"\.128\b|\.MT?88\.4|^HMMA.*\.F32", opcode):
        return 4
    if re.search(r"\.64\b|\.MT?88\.2|\.WIDE|^CS2R$|^HMMA|^D(ADD|MUL|FMA)", opcode):
        return 2
    return 1


def loops(sass: str) -> tuple[list[Code], Code]:
    """Return a step of each innermost loop, in the order of the code, and all that is outside of them."""
    instructions, labels = parse(sass)
    ranges = []
    for end, (_, opcode, operands) in enumerate(instructions):
        start = labels.get(required_match(TARGET, operands)[1]) if opcode == "BRA" else None
        if start is not None and start < end:  # an end that jumps to itself is no loop
            ranges.append((start, end))
    innermost = [(a, b) for a, b in ranges if not any(a <= c and d <= b for c, d in ranges if (c, d) != (a, b))]
    steps = [clocks(instructions[a : b + 1]) for a, b in innermost]
    whole = clocks([x for x in instructions if x.opcode != "NOP"])  # behind the end
    outside = Code(*(of_all - sum(of_loops) for of_all, *of_loops in zip(whole, *steps, strict=True)))
    return steps, outside


def clocks(instructions: list[Instruction]) -> Code:
    return Code(
        len(instructions),
        sum(tensor_clocks(x.opcode) for x in instructions),
        SPECIAL_CLOCKS * sum(x.opcode.startswith("MUFU") for x in instructions),
    )


def tensor_clocks(opcode: str) -> int:
    """Clocks of one tensor core: 512 products of 16-bit numbers a clock on Hopper, half as many of 32 bits. A wgmma
    runs on the four tensor cores of a multiprocessor, an mma.sync of a warp on one."""
    shape = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode)
    cores = 4
    if shape is None:
        shape, cores = re.match(r"HMMA\.(16)(8)(\d+)", opcode), 1
        if shape is None:
            return 0
    m, n, k = map(int, shape.groups())
    return m * n * k * (2 if "TF32" in opcode else 1) // (512 * cores)
