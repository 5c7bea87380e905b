"""The little of ELF that a check of machine code needs: executable sections and the functions in them.

Layouts are the System V gABI's (Elf64_Ehdr, Elf64_Shdr, Elf64_Sym) and the LSB's (.eh_frame_hdr). Names of
functions come from the symbol tables; where a library is stripped, their bounds still come from the unwind table.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.records import SlimpiError

MAGIC = b"\x7fELF"
EM_AARCH64 = 183
SHT_SYMTAB, SHT_RELA, SHT_NOBITS, SHT_DYNSYM, SHT_INIT_ARRAY = 2, 4, 8, 11, 14
SHF_EXECINSTR = 4
STT_NOTYPE, STT_FUNC, STT_GNU_IFUNC = 0, 2, 10

# Sums of two addresses stay within int64.
_ADDRESS_LIMIT = 1 << 48

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("addr", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("align", "<u8"),
        ("entsize", "<u8"),
    ]
)
_SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)

_RELA = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])

# Version 1, then the DW_EH_PE encodings every GNU and LLVM linker writes: pcrel|sdata4, udata4, datarel|sdata4.
_EH_FRAME_HDR = bytes([1, 0x1B, 0x03, 0x3B])


@dataclass(frozen=True)
class Section:
    name: str
    address: int
    data: bytes


@dataclass(frozen=True)
class Functions:
    """Address ranges [start, end), sorted by start; `name` is empty where only the unwind table knows the function."""

    start: NDArray[np.uint64]
    end: NDArray[np.uint64]
    name: list[str]


@dataclass(frozen=True)
class Library:
    """An aarch64 shared object.

    data_ranges: (n, 2) [start, end) inside the code that mapping symbols call data.
    initialisers: addresses of the functions that the loader calls (.init_array).
    """

    code: tuple[Section, ...]
    functions: Functions
    data_ranges: NDArray[np.uint64]
    initialisers: tuple[int, ...]


def is_elf(data: bytes) -> bool:
    return data[:4] == MAGIC


def parse(data: bytes, origin: str) -> Library:
    """Read a 64-bit little-endian aarch64 ELF file. SlimpiError if it is another kind, cut short or section-less."""
    try:
        return _parse(data, origin)
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise SlimpiError(f"{origin} is not a whole ELF file: {error}. Download its wheel again.") from error


def _parse(data: bytes, origin: str) -> Library:
    header = _HEADER.unpack_from(data)
    ident, machine, table_offset, count, names_index = header[0], header[2], header[6], header[12], header[13]
    if ident[4:6] != b"\x02\x01" or machine != EM_AARCH64:
        raise SlimpiError(f"{origin} is not code for aarch64 (ELF machine {machine}). Use the wheel for aarch64.")
    if not table_offset or not count:
        raise SlimpiError(f"{origin} has no section table, so its code cannot be checked. Use another build of it.")
    table = np.frombuffer(data, _SECTION, count, table_offset)
    if max(table["addr"].max(), table["size"].max(), table["offset"].max()) > _ADDRESS_LIMIT:
        raise ValueError("a section lies beyond any address space")
    names = _bytes_of(data, table[names_index])
    sections = [(_string(names, int(row["name"])), row) for row in table]
    code = tuple(
        Section(name, int(row["addr"]), _bytes_of(data, row))
        for name, row in sections
        if row["flags"] & SHF_EXECINSTR and row["type"] != SHT_NOBITS
    )
    symbols = [s for _, row in sections if row["type"] in (SHT_SYMTAB, SHT_DYNSYM) for s in _symbols(data, table, row)]
    by_name = {name: (int(row["addr"]), _bytes_of(data, row)) for name, row in sections}
    unwound = _unwind_ranges(by_name)
    return Library(code, _functions(symbols, unwound), _data_ranges(symbols, code), _initialisers(data, table))


def _bytes_of(data: bytes, row: Any) -> bytes:
    if row["type"] == SHT_NOBITS:
        return b""
    end = int(row["offset"]) + int(row["size"])
    if end > len(data):
        raise ValueError(f"a section ends at byte {end} of {len(data)}")
    return data[int(row["offset"]) : end]


def _initialisers(data: bytes, table: NDArray[np.void]) -> tuple[int, ...]:
    """Targets of .init_array: addends of the relocations that fill it, and what the linker wrote there itself."""
    found: set[int] = set()
    relocations = [np.frombuffer(_bytes_of(data, row), _RELA) for row in table if row["type"] == SHT_RELA]
    for row in table[table["type"] == SHT_INIT_ARRAY]:
        low, high = int(row["addr"]), int(row["addr"]) + int(row["size"])
        found.update(np.frombuffer(_bytes_of(data, row), "<u8").tolist())
        for rela in relocations:
            inside = (rela["offset"] >= low) & (rela["offset"] < high)
            found.update(rela["addend"][inside].tolist())
    return tuple(sorted(address for address in found if 0 < address <= _ADDRESS_LIMIT))


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode(errors="replace")


def _symbols(data: bytes, table: NDArray[np.void], row: Any) -> list[tuple[str, int, int, int]]:
    """(name, type, value, size) of the defined symbols that are code, or mark where code and data begin."""
    strings = _bytes_of(data, table[int(row["link"])])
    symbols = np.frombuffer(_bytes_of(data, row), _SYMBOL)
    kinds = symbols["info"] & 0xF
    wanted = symbols[(symbols["shndx"] != 0) & np.isin(kinds, (STT_NOTYPE, STT_FUNC, STT_GNU_IFUNC))]
    return [(_string(strings, int(s["name"])), int(s["info"] & 0xF), int(s["value"]), int(s["size"])) for s in wanted]


def _unwind_ranges(sections: dict[str, tuple[int, bytes]]) -> NDArray[np.uint64]:
    """(n, 2) [start, end) of every function in .eh_frame, found through the table of .eh_frame_hdr."""
    header_address, header = sections.get(".eh_frame_hdr", (0, b""))
    frame_address, frame = sections.get(".eh_frame", (0, b""))
    if header[:4] != _EH_FRAME_HDR or not frame:
        return np.zeros((0, 2), dtype=np.uint64)
    count = int(np.frombuffer(header, "<u4", 1, 8)[0])
    table = np.frombuffer(header, "<i4", 2 * count, 12).reshape(-1, 2).astype(np.int64) + header_address
    entry = table[:, 1] - frame_address
    if count and (entry.min() < 0 or entry.max() + 16 > len(frame)):
        raise ValueError(".eh_frame_hdr points outside .eh_frame")
    # Entry: length u4, CIE pointer u4, start i4, size u4.
    words = np.lib.stride_tricks.sliding_window_view(np.frombuffer(frame, np.uint8), 4)
    size = np.ascontiguousarray(words[entry + 12]).view("<u4")[:, 0].astype(np.int64)
    return np.stack([table[:, 0], table[:, 0] + size], axis=1).astype(np.uint64)


def _functions(symbols: list[tuple[str, int, int, int]], unwound: NDArray[np.uint64]) -> Functions:
    """Named ranges first; the unwind table fills what no symbol names."""
    found: dict[int, tuple[int, str]] = {int(s): (int(e), "") for s, e in unwound}
    for name, kind, value, size in symbols:
        if kind == STT_NOTYPE and (not name or name.startswith("$") or not size):
            continue
        end = value + size if size else found.get(value, (0, ""))[0]
        found[value] = (end, name)
    starts = sorted(found)
    # Assembly that gives its functions no size: they reach to the next one.
    ends = [found[start][0] or following for start, following in zip(starts, [*starts[1:], 0], strict=True)]
    return Functions(
        np.array(starts, dtype=np.uint64), np.array(ends, dtype=np.uint64), [found[start][1] for start in starts]
    )


def _data_ranges(symbols: list[tuple[str, int, int, int]], code: tuple[Section, ...]) -> NDArray[np.uint64]:
    """(n, 2) [start, end) from each `$d` mapping symbol to the next `$x` or the end of its section (AAELF64 5.5.4)."""
    plain = [(value, name[:2]) for name, kind, value, _ in symbols if kind == STT_NOTYPE]
    marks = sorted({(value, mark == "$d") for value, mark in plain if mark in ("$d", "$x")})
    ranges: list[tuple[int, int]] = []
    for section in code:
        end = section.address + len(section.data)
        inside = [(value, is_data) for value, is_data in marks if section.address <= value < end]
        for index, (value, is_data) in enumerate(inside):
            if is_data:
                ranges.append((value, inside[index + 1][0] if index + 1 < len(inside) else end))
    return np.array(ranges, dtype=np.uint64).reshape(-1, 2)
