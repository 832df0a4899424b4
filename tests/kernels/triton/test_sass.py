"""Reading machine code, on lines as nvdisasm prints them."""

import pytest

pytest.importorskip("triton")
from lcpt_kernels.triton.report.sass import Code, loops, wgmma_hazards

WGMMA = "HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR8].tnspB, R24, gsb0"  # A in R92 … R95, the sum in R24 … R55
OF_SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0"
WAIT_ALL, WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def code(*lines: str) -> str:
    """Labels end with a colon; all else is an instruction."""
    numbered = enumerate(lines)
    return "\n".join(line if line.endswith(":") else f"        /*{16 * n:04x}*/    {line} ;" for n, line in numbered)


@pytest.mark.parametrize(
    "lines, found",
    [
        ((WGMMA, "HMUL2.BF16_V2 R94, R17.H1_H1, R100", WAIT_ALL), 1),
        ((WGMMA, WAIT_ALL, "HMUL2.BF16_V2 R94, R17.H1_H1, R100"), 0),
        ((WGMMA, "HMUL2.BF16_V2 R96, R94, R95", WAIT_ALL), 0),  # reads A, writes another
        ((WGMMA, "LDSM.16.M88.4 R90, [R20+0x4800]", WAIT_ALL), 1),  # R90 … R93
        ((WGMMA, "LDS.64 R90, [R20]", WAIT_ALL), 0),
        ((WGMMA, "STS [R94], R94", "ISETP.GE.AND P0, PT, R94, R95, PT", "R2UR UR4, R94", WAIT_ALL), 0),
        ((WGMMA, "SHFL.BFLY PT, R94, R10, 0x1, 0x1f", WAIT_ALL), 1),
        ((WGMMA, "FADD R30, R30, R31", WAIT_ALL), 1),  # the sum
        ((OF_SHARED, "HMUL2.BF16_V2 R94, R17, R100", WAIT_ALL), 0),
        ((WGMMA, WGMMA.replace("R92", "R96"), WAIT_ONE, "MOV R93, RZ", WAIT_ALL), 0),  # the first has ended
        ((WGMMA, WGMMA.replace("R92", "R96"), WAIT_ONE, "MOV R97, RZ", WAIT_ALL), 1),
        ((WGMMA.replace(", gsb0", ""), "MOV R93, RZ", WGMMA.replace("R92", "R96"), WAIT_ALL), 1),  # one group of two
    ],
    ids=lambda x: str(x)[:40],
)
def test_registers_of_an_unfinished_wgmma(lines, found):
    assert wgmma_hazards(code(*lines, "EXIT")) == found


def test_a_hazard_that_only_the_next_step_of_a_loop_meets():
    step = (".L_x_1:", "HMUL2.BF16_V2 R92, R17, R100", WGMMA)
    again = ("@P0 BRA `(.L_x_1)", WAIT_ALL, "EXIT")
    assert wgmma_hazards(code(*step, WAIT_ONE, *again)) == 1
    assert wgmma_hazards(code(*step, WAIT_ALL, *again)) == 0


def test_a_hazard_on_one_of_two_paths():
    lines = (WGMMA, "@P0 BRA `(.L_x_1)", WAIT_ALL, ".L_x_1:", "MOV R92, RZ", WAIT_ALL, "EXIT")
    assert wgmma_hazards(code(*lines)) == 1
    assert wgmma_hazards(code(*(line.replace("@P0 BRA", "@P0 MOV R1,") for line in lines))) == 0
    assert wgmma_hazards(code(WGMMA, "BRA `(.L_x_1)", "MOV R92, RZ", ".L_x_1:", WAIT_ALL, "EXIT")) == 0


def test_loops_are_counted_apart_from_what_is_outside():
    """64 x 64 x 16 products take four tensor cores 32 clocks, 16 x 8 x 16 one of them 4; TF32 twice that. A square root
    takes 8."""
    inner = (".L_x_2:", WGMMA, "HMMA.16816.F32.BF16 R4, R8, R10, R4", "FADD R1, R2, R3", "@P1 BRA `(.L_x_2)")
    outer = (".L_x_1:", "MOV R1, RZ", *inner, "@P0 BRA `(.L_x_1)", WGMMA)
    without = (".L_x_3:", "FADD R1, R2, R3", "@P0 BRA `(.L_x_3)", "EXIT", ".L_x_4:", "BRA `(.L_x_4)")
    found = loops(code(*outer, "MUFU.RSQ R1, R2", *without, "NOP"))
    assert found == ([Code(4, 36, 0), Code(2, 0, 0)], Code(6, 32, 8))
    tf32 = (".L_x_1:", "HGMMA.64x16x8.F32.TF32 R8, R4, gdesc[UR4], R8, gsb0", "@P0 BRA `(.L_x_1)")
    assert loops(code(*tf32)) == ([Code(2, 8, 0)], Code(0, 0, 0))
    assert loops("") == ([], Code(0, 0, 0))
