"""Which A64 instruction words a Cortex-A72 without the crypto option cannot execute, as one table.

The Raspberry Pi 4's cores implement ARMv8.0-A with floating point, Advanced SIMD and CRC32, nothing more. A row
of TABLE is an encoding of the Arm Architecture Reference Manual (DDI 0487, "A64 instruction set encoding"), bit 31
first: `0` and `1` are fixed, `.` is any operand bit, spaces are for the eye. A word that fits no row is taken as
executable. Hints (BTI, PACIASP, AUTIASP, ESB, CSDB ...) execute as NOP there and so are in no row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

# fmt: off
TABLE: tuple[tuple[str, str, str], ...] = (
    # extension, instructions, encoding
    ("lse", "cas", "..001000 1.1..... .11111.. ........"),
    ("lse", "casp", "0.001000 0.1..... .11111.. ........"),
    ("lse", "ldadd/ldclr/ldeor/ldset/ldmax/ldmin", "..111000 ..1..... 0...00.. ........"),
    ("lse", "swp", "..111000 ..1..... 100000.. ........"),
    ("lse128", "ldclrp/ldsetp", "00011001 ..1..... 00.100.. ........"),
    ("lse128", "swpp", "00011001 ..1..... 100000.. ........"),
    ("lor", "ldlar/stllr", "..001000 1.0..... 011111.. ........"),
    ("rcpc", "ldapr", "..111000 101..... 110000.. ........"),
    ("rcpc2", "ldapur/stlur", "..011001 ..0..... ....00.. ........"),
    ("rcpc3", "ldapur/stlur (SIMD)", "..011101 ..0..... ....10.. ........"),
    ("rcpc3", "ldiapp/stilp", "1.011001 0.0..... 000.10.. ........"),
    ("ls64", "ld64b/st64b", "11111000 001..... ..0100.. ........"),
    ("ls64", "st64bv", "11111000 001..... 101.00.. ........"),
    ("mte", "stg/ldg", "11011001 ..1..... ........ ........"),
    ("mte", "addg/subg", "1.010001 10...... 00...... ........"),
    ("mte", "irg/gmi", "10011010 110..... 00010... ........"),
    ("mte", "subp/subps", "10.11010 110..... 000000.. ........"),
    ("mte", "stgp", "0110100. .0...... ........ ........"),
    ("mops", "cpy/set", "..011.01 ..0..... ....01.. ........"),
    ("rdm", "sqrdmlah/sqrdmlsh", "0.101110 010..... 1000.1.. ........"),
    ("rdm", "sqrdmlah/sqrdmlsh", "0.101110 100..... 1000.1.. ........"),
    ("rdm", "sqrdmlah/sqrdmlsh (scalar)", "01111110 ..0..... 1000.1.. ........"),
    ("rdm", "sqrdmlah/sqrdmlsh (element)", "0.101111 01...... 11.1.0.. ........"),
    ("rdm", "sqrdmlah/sqrdmlsh (element)", "0.101111 10...... 11.1.0.. ........"),
    ("rdm", "sqrdmlah/sqrdmlsh (scalar, element)", "01111111 ........ 11.1.0.. ........"),
    ("dotprod", "sdot/udot", "0..01110 100..... 100101.. ........"),
    ("dotprod", "sdot/udot (element)", "0..01111 10...... 1110.0.. ........"),
    ("i8mm", "usdot", "0.001110 100..... 100111.. ........"),
    ("i8mm", "usdot/sudot (element)", "0.001111 .0...... 1111.0.. ........"),
    ("i8mm", "smmla/ummla", "01.01110 100..... 101001.. ........"),
    ("i8mm", "usmmla", "01001110 100..... 101011.. ........"),
    ("bf16", "bfdot/bfmlal", "0.101110 .10..... 111111.. ........"),
    ("bf16", "bfdot/bfmlal (element)", "0.001111 .1...... 1111.0.. ........"),
    ("bf16", "bfmmla", "01101110 010..... 111011.. ........"),
    ("bf16", "bfcvtn", "0.001110 10100001 011010.. ........"),
    ("bf16", "bfcvt", "00011110 01100011 010000.. ........"),
    ("fp16", "fmov/fabs", "00011110 11100000 .10000.. ........"),
    ("fp16", "fneg/fsqrt", "00011110 11100001 .10000.. ........"),
    ("fp16", "frint", "00011110 1110010. .10000.. ........"),
    ("fp16", "frint", "00011110 11100110 .10000.. ........"),
    ("fp16", "frint", "00011110 11100111 .10000.. ........"),
    ("fp16", "fmul/fdiv/fadd/fsub/fmax/fmin", "00011110 111..... 0...10.. ........"),
    ("fp16", "fnmul", "00011110 111..... 100010.. ........"),
    ("fp16", "fmadd/fmsub/fnmadd/fnmsub", "00011111 11...... ........ ........"),
    ("fp16", "fcmp", "00011110 111..... 001000.. .....000"),
    ("fp16", "fccmp", "00011110 111..... ....01.. ........"),
    ("fp16", "fcsel", "00011110 111..... ....11.. ........"),
    ("fp16", "fmov (immediate)", "00011110 111..... ...10000 000....."),
    ("fp16", "fcvt/scvtf/ucvtf/fmov (integer)", ".0011110 111..... 000000.. ........"),
    ("fp16", "fcvtz (fixed point)", ".0011110 1101100. ........ ........"),
    ("fp16", "scvtf/ucvtf (fixed point)", ".0011110 1100001. ........ ........"),
    ("fp16", "three same", "0..01110 .10..... 00...1.. ........"),
    ("fp16", "three same (scalar)", "01.11110 .10..... 00...1.. ........"),
    ("fp16", "two register", "0..01110 .111100. ....10.. ........"),
    ("fp16", "two register (scalar)", "01.11110 .111100. ....10.. ........"),
    ("fp16", "fmaxnmv/fminnmv", "0.001110 .0110000 110010.. ........"),
    ("fp16", "fmaxv/fminv", "0.001110 .0110000 111110.. ........"),
    ("fp16", "fmaxnmp/fminnmp (scalar)", "01011110 .0110000 110010.. ........"),
    ("fp16", "faddp (scalar)", "01011110 00110000 110110.. ........"),
    ("fp16", "fmaxp/fminp (scalar)", "01011110 .0110000 111110.. ........"),
    ("fp16", "fmla/fmls (element)", "0.001111 00...... 0.01.0.. ........"),
    ("fp16", "fmul/fmulx (element)", "0..01111 00...... 1001.0.. ........"),
    ("fp16", "fmla/fmls (scalar, element)", "01011111 00...... 0.01.0.. ........"),
    ("fp16", "fmul/fmulx (scalar, element)", "01.11111 00...... 1001.0.. ........"),
    ("fp16", "scvtf/ucvtf (vector, fixed point)", "0..01111 0001.... 111001.. ........"),
    ("fp16", "fcvtz (vector, fixed point)", "0..01111 0001.... 111111.. ........"),
    ("fp16", "scvtf/ucvtf (scalar, fixed point)", "01.11111 0001.... 111001.. ........"),
    ("fp16", "fcvtz (scalar, fixed point)", "01.11111 0001.... 111111.. ........"),
    ("fp16", "fmov (vector, immediate)", "0.001111 00000... 111111.. ........"),
    ("fhm", "fmlal/fmlsl", "0.001110 .01..... 111011.. ........"),
    ("fhm", "fmlal2/fmlsl2", "0.101110 .01..... 110011.. ........"),
    ("fhm", "fmlal/fmlsl (element)", "0.001111 10...... 0.00.0.. ........"),
    ("fhm", "fmlal2/fmlsl2 (element)", "0.101111 10...... 1.00.0.. ........"),
    ("fcma", "fcmla", "0.101110 ..0..... 110..1.. ........"),
    ("fcma", "fcadd", "0.101110 ..0..... 111.01.. ........"),
    ("fcma", "fcmla (element)", "0.101111 01...... 0..1.0.. ........"),
    ("fcma", "fcmla (element)", "0.101111 10...... 0..1.0.. ........"),
    ("jscvt", "fjcvtzs", "00011110 01111110 000000.. ........"),
    ("frintts", "frint32/frint64", "00011110 0.10100. .10000.. ........"),
    ("frintts", "frint32/frint64 (vector)", "0..01110 0.100001 111.10.. ........"),
    ("flagm", "cfinv", "11010101 00000000 01000000 00011111"),
    ("flagm", "rmif", "10111010 000..... .00001.. ...0...."),
    ("flagm", "setf8/setf16", "00111010 00000000 0.0010.. ...01101"),
    ("flagm2", "xaflag", "11010101 00000000 01000000 00111111"),
    ("flagm2", "axflag", "11010101 00000000 01000000 01011111"),
    ("ssbs", "msr ssbs (immediate)", "11010101 00000011 0100.... 00111111"),
    ("ssbs", "mrs/msr ssbs", "11010101 00.11011 01000010 110....."),
    ("dit", "msr dit (immediate)", "11010101 00000011 0100.... 01011111"),
    ("dit", "mrs/msr dit", "11010101 00.11011 01000010 101....."),
    ("ecv", "mrs cntpctss/cntvctss", "11010101 00111011 11100000 101....."),
    ("ecv", "mrs cntpctss/cntvctss", "11010101 00111011 11100000 110....."),
    ("sb", "sb", "11010101 00000011 00110000 11111111"),
    ("dpb", "dc cvap/cvadp", "11010101 00001011 0111110. 001....."),
    ("rng", "mrs rndr/rndrrs", "11010101 00111011 00100100 00......"),
    ("wfxt", "wfet/wfit", "11010101 00000011 00010000 00......"),
    ("hbc", "bc.cond", "01010100 ........ ........ ...1...."),
    ("tme", "tstart/ttest", "11010101 00100011 0011000. 011....."),
    ("tme", "tcommit", "11010101 00000011 00110000 01111111"),
    ("tme", "tcancel", "11010100 011..... ........ ...00000"),
    ("pauth", "pac/aut/xpac", "11011010 11000001 0....... ........"),
    ("pauth", "pacga", "10011010 110..... 001100.. ........"),
    ("pauth", "ldraa/ldrab", "11111000 ..1..... .....1.. ........"),
    ("pauth", "braa/blraa/retaa/eretaa", "1101011. ...11111 00001... ........"),
    ("cssc", "cnt/ctz", ".1011010 11000000 00011... ........"),
    ("cssc", "abs", ".1011010 11000000 001000.. ........"),
    ("cssc", "smax/smin/umax/umin", ".0011010 110..... 0110.... ........"),
    ("cssc", "smax/smin/umax/umin (immediate)", ".0010001 1100.... ........ ........"),
    ("aes", "aese/aesd/aesmc/aesimc", "01001110 00101000 01..10.. ........"),
    ("aes", "pmull (64-bit)", "0.001110 111..... 111000.. ........"),
    ("sha1/sha2", "sha1/sha256 (three registers)", "01011110 000..... 0...00.. ........"),
    ("sha1/sha2", "sha1/sha256 (two registers)", "01011110 00101000 00..10.. ........"),
    ("sha3", "eor3/bcax", "11001110 00...... 0....... ........"),
    ("sha3", "xar", "11001110 100..... ........ ........"),
    ("sha3", "rax1", "11001110 011..... 100011.. ........"),
    ("sha512", "sha512h/sha512su1", "11001110 011..... 1000.0.. ........"),
    ("sha512", "sha512h2", "11001110 011..... 100001.. ........"),
    ("sha512", "sha512su0", "11001110 11000000 100000.. ........"),
    ("sm3", "sm3ss1", "11001110 010..... 0....... ........"),
    ("sm3", "sm3tt", "11001110 010..... 10...... ........"),
    ("sm3", "sm3partw", "11001110 011..... 11000... ........"),
    ("sm4", "sm4e", "11001110 11000000 100001.. ........"),
    ("sm4", "sm4ekey", "11001110 011..... 110010.. ........"),
    ("sve", "any", "...0010. ........ ........ ........"),
    ("sme", "mrs/msr tpidr2_el0", "11010101 00.11011 11010000 101....."),
    ("sme", "smstart/smstop", "11010101 00000011 0100.... 01111111"),
    ("sme", "any", "1..0000. ........ ........ ........"),
)
# fmt: on


@dataclass(frozen=True)
class Encoding:
    """A row of TABLE compiled: a word belongs to it if `word & mask == value`."""

    extension: str
    name: str
    mask: int
    value: int


def compile_row(extension: str, name: str, bits: str) -> Encoding:
    """An encoding from its 32 bits, `.` where any bit will do. ValueError if they are not that."""
    digits = bits.replace(" ", "")
    if len(digits) != 32 or set(digits) - set("01."):
        raise ValueError(f"{extension} {name}: {bits!r} is not 32 of `0`, `1`, `.`")
    mask = int("".join("0" if b == "." else "1" for b in digits), 2)
    return Encoding(extension, name, mask, int(digits.replace(".", "0"), 2))


@cache
def encodings() -> tuple[Encoding, ...]:
    return tuple(compile_row(*row) for row in TABLE)


@cache
def _possible_upper_halves() -> NDArray[np.bool_]:
    """Per upper half-word, whether any encoding can have it: drops most words before the row by row test."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    possible = np.zeros(1 << 16, dtype=np.bool_)
    for row in encodings():
        possible |= (upper & (row.mask >> 16)) == row.value >> 16
    return possible


def classify(words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Positions in `words` (n,) of words the Pi 4 cannot execute, and for each its row in `encodings()`."""
    positions = np.flatnonzero(_possible_upper_halves()[words >> np.uint32(16)])
    candidates = words[positions]
    rows = np.full(len(positions), -1, dtype=np.int16)
    for index, row in enumerate(encodings()):
        rows[(rows < 0) & ((candidates & np.uint32(row.mask)) == row.value)] = index
    found = rows >= 0
    return positions[found], rows[found]
