"""Small aarch64 ELF files made by hand: a static program of a few words, and a shared object with named functions."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

TEXT_ADDRESS = 0x10000
NOP, RET = 0xD503201F, 0xD65F03C0
MOV_X8_EXIT, MOV_X0_ZERO, SVC = 0xD2800BA8, 0xD2800000, 0xD4000001
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)


def static_program(words: Sequence[int]) -> bytes:
    """A static executable that runs the words and then exits with code 0."""
    code = struct.pack(f"<{len(words) + 3}I", *words, MOV_X8_EXIT, MOV_X0_ZERO, SVC)
    base, start = 0x400000, 64 + 56
    header = _HEADER.pack(_IDENT, 2, 183, 1, base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = start + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code


def branch_and_link(source: int, target: int) -> int:
    """The word of `bl` at word index `source` to word index `target`."""
    return 0x94000000 | ((target - source) & 0x03FFFFFF)


def shared_object(
    functions: Mapping[str, Sequence[int]],
    initialisers: Sequence[str] = (),
    *,
    stripped: bool = False,
    data_words: Mapping[str, Sequence[int]] | None = None,
    machine: int = 183,
) -> bytes:
    """A library with these functions back to back in .text, in order, as a linker lays it out.

    initialisers: functions named in .init_array through relocations. stripped: no symbols, bounds only in the
    unwind table. data_words: words after a function, marked `$d` (AAELF64 mapping symbols).
    """
    text, symbols, bounds = b"", [], {}
    for name, words in functions.items():
        start = TEXT_ADDRESS + len(text)
        text += struct.pack(f"<{len(words)}I", *words)
        bounds[name] = (start, 4 * len(words))
        symbols += [(name, 2, start, 4 * len(words)), ("$x", 0, start, 0)]
        if data := (data_words or {}).get(name):
            symbols.append(("$d", 0, TEXT_ADDRESS + len(text), 0))
            text += struct.pack(f"<{len(data)}I", *data)
    array_address = 0x80000
    rela = b"".join(
        struct.pack("<QQq", array_address + 8 * i, 1027, bounds[name][0]) for i, name in enumerate(initialisers)
    )
    frame_address, header_address = 0x90000, 0xA0000
    frame, table = _unwind(list(bounds.values()), frame_address, header_address)
    strings, entries = b"\0", bytes(24)
    for name, kind, value, size in symbols:
        entries += struct.pack("<IBBHQQ", len(strings), kind, 0, 1, value, size)
        strings += name.encode() + b"\0"
    sections = [
        ("", 0, 0, 0, b"", 0, 0),
        (".text", 1, 6, TEXT_ADDRESS, text, 0, 0),
        (".init_array", 14, 3, array_address, bytes(8 * len(initialisers)), 0, 8),
        (".rela.dyn", 4, 2, 0, rela, 0, 24),
        (".eh_frame", 1, 2, frame_address, frame, 0, 0),
        (".eh_frame_hdr", 1, 2, header_address, table, 0, 0),
    ]
    if not stripped:
        sections += [(".strtab", 3, 0, 0, strings, 0, 0), (".symtab", 2, 0, 0, entries, len(sections), 24)]
    return _lay_out(sections, machine)


def _unwind(bounds: list[tuple[int, int]], frame_address: int, header_address: int) -> tuple[bytes, bytes]:
    """.eh_frame with one CIE and an FDE a function, and the sorted table of .eh_frame_hdr."""
    frame = struct.pack("<II", 12, 0) + b"\x01zR\0\x01\x78\x1e\x01\x1b\0\0\0"
    table = bytes([1, 0x1B, 0x03, 0x3B]) + struct.pack("<iI", frame_address - header_address - 4, len(bounds))
    for start, size in bounds:
        place = len(frame)
        frame += struct.pack("<IIiII", 16, place + 4, start - (frame_address + place + 8), size, 0)
        table += struct.pack("<ii", start - header_address, frame_address + place - header_address)
    return frame + bytes(4), table


def _lay_out(sections: list[tuple[str, int, int, int, bytes, int, int]], machine: int) -> bytes:
    names, body, rows = b"\0", b"", []
    for name, *_ in sections:
        names += name.encode() + b"\0"
    names += b".shstrtab\0"
    for name, kind, flags, address, data, link, entry_size in [*sections, (".shstrtab", 3, 0, 0, names, 0, 0)]:
        at = names.index(b"\0" + name.encode() + b"\0") + 1 if name else 0
        rows.append(
            struct.pack("<IIQQQQIIQQ", at, kind, flags, address, 64 + len(body), len(data), link, 0, 8, entry_size)
        )
        body += data + bytes(-len(data) % 8)
    header = _HEADER.pack(_IDENT, 3, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(rows), len(rows) - 1)
    return header + body + b"".join(rows)
