"""Reading machine code: the main loop is found, and what is counted in it and outside."""

from eclip.kernels.compile_check.sass import read

# A loop over tiles (.L_x_4 to its branch) around one over channels (.L_x_2), which waits for its copies and, on a
# barrier, spins (.L_x_3); a detour that comes back by an unconditional branch (.L_x_9); the trap after the end.
SASS = """
        .global         some_kernel
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R19], desc[UR14][R8.64], P6 ;
        /*0020*/                   LDGDEPBAR ;
.L_x_4:
        /*0030*/                   MUFU.EX2 R4, R4 ;
.L_x_2:
        /*0040*/                   DEPBAR.LE SB0, 0x4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_3:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0070*/              @!P0 BRA `(.L_x_3) ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x7 ;
        /*00b0*/              @!PT LDS RZ, [RZ] ;
        /*00c0*/               @P1 LDSM.16.M88.4 R4, [R2+UR4] ;
        /*00d0*/                   LDGSTS.E.BYPASS.128 [R19], desc[UR14][R8.64], P6 ;
        /*00e0*/                   LDGDEPBAR ;
        /*00f0*/                   LDGSTS.E.64 [R19+0x1000], desc[UR14][R8.64], P6 ;
        /*0100*/                   LDGDEPBAR ;
.L_x_9:
        /*0110*/              @P6 BRA `(.L_x_2) ;
        /*0120*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
        /*0130*/                   STS.128 [R2], R4 ;
        /*0140*/                   STL [R1], R4 ;
        /*0150*/                   BRA.U UP0, `(.L_x_4) ;
        /*0160*/                   EXIT ;
        /*0170*/                   MUFU.RCP R4, R4 ;
        /*0180*/                   BRA `(.L_x_9);
.L_x_5:
        /*0190*/                   BRA `(.L_x_5);
"""


def test_the_main_loop_is_the_one_whose_own_products_are_most() -> None:
    code = read(SASS, warps=8)
    assert code.loop["HGMMA"] == 2 and code.rest["HGMMA"] == 0
    assert code.loop["BAR"] == 1 and code.rest["BAR"] == 0
    assert code.loop["instructions"] == 13
    assert code.rest["instructions"] == 12


def test_what_is_outside_counts_apart() -> None:
    code = read(SASS, warps=8)
    assert (code.loop["MUFU"], code.rest["MUFU"]) == (0, 2)
    assert (code.loop["SHFL"], code.rest["SHFL"]) == (0, 1)
    # The load that never runs (@!PT) is none.
    assert (code.loop["LDS+STS"], code.rest["LDS+STS"]) == (1, 1)
    assert code.total("local") == 1


def test_bytes_in_flight_are_those_of_all_turns_whose_copies_are_open() -> None:
    """Two groups a turn, four left open: two turns and the one that is waited for, 16 + 8 bytes a thread each."""
    assert read(SASS, warps=8).in_flight == 3 * 24 * 32 * 8
    assert read(SASS.replace("LDGSTS", "LDG"), warps=8).in_flight == 0


def test_a_kernel_without_a_loop() -> None:
    code = read("        /*0000*/                   MUFU.EX2 R4, R4 ;\n        /*0010*/    EXIT ;\n", warps=4)
    assert code.rest["MUFU"] == 1 and code.rest["instructions"] == 2 and not code.loop["instructions"]
