"""Files that nobody vouches for: what they hold, or one ValueError that names the file and says why.

Whatever size a file claims is held against the bytes that are there before memory is taken. Pickles have a reader of
their own, safe_pickle.py.
"""

import csv
import io
import json
import math
import re
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from mtmd.files.checks import reason, shown

DEEPEST = 50  # levels of nesting: more than any file of ours has, and far from what Python's stack bears
LARGEST_UNFOLDING = 100  # times its size that an archive may hold; CMU-MOSI in the own format: 20
SMALL = 2**20  # bytes that any archive may hold: a few utterances, all of them missing, are zeros
LONGEST_HEADER = 2_000  # characters that describe an array: more than 64 sizes of any length
BEGINNING = 512  # bytes that tell what a file is
CHUNK = 2**18  # bytes of an array that are read at a time


OTHER_FILES = {
    "empty": (rb"\Z", "an empty file"),
    "zeros": (rb"\x00{64}", "zeros, which a copy or download leaves that did not end"),
    "lfs": (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    "html": (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page; the download gave it in place of the file"),
    "gzip": (rb"\x1f\x8b", "a gzip file; unpack it first"),
    "bzip2": (rb"BZh[1-9]1AY&SY", "a bzip2 file; unpack it first"),
    "xz": (rb"\xfd7zXZ\x00", "an xz file; unpack it first"),
    "7z": (rb"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    "zip": (rb"PK(\x03\x04|\x05\x06)", "a zip archive, as .npz, .xlsx and .pt files are too; unpack what is packed"),
    "hdf5": (rb"\x89HDF", "an HDF5 file"),
    "numpy": (rb"\x93NUMPY", "an array of numpy.save"),
    "pickle": (rb"\x80[\x02-\x05]", "a pickle"),
    "utf16": (rb"\xff\xfe|\xfe\xff", "a text in UTF-16; save it as UTF-8"),
}
"""What else a file may be than what it is taken for: its first bytes, and what to call it in an error message."""


def other_kind(start: bytes, *, but: str = "") -> str:
    """What a file that begins so is, if it is one of `OTHER_FILES` other than `but`; else empty."""
    return next((kind for name, (first, kind) in OTHER_FILES.items() if name != but and re.match(first, start)), "")


def refuse_others(start: bytes, complaint: str, *, but: str = "") -> None:
    """Raise ValueError if a file that begins so is another one; `complaint` begins the error."""
    kind = other_kind(start, but=but)
    if kind:
        raise ValueError(f"{complaint}, got {kind}")


# Texts


def read_json(path: Path) -> Any:
    """The contents of a JSON file."""
    content, expected = path.read_bytes(), f"{path}: expected a JSON file"
    refuse_others(content[:BEGINNING], expected)
    return parse_json(content, f"{expected}, got one that cannot be read")


def parse_json(content: bytes, complaint: str) -> Any:
    """A value in JSON; `complaint` begins the error."""
    try:
        return check_depth(json.loads(content.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{complaint}: {reason(error)}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file."""
    content = path.read_bytes()
    refuse_others(content[:BEGINNING], f"{path}: expected a TOML file", but="empty")
    try:
        if any(line.count(b".") > DEEPEST for line in content.splitlines()):
            raise ValueError(f"more than {DEEPEST} dots in a line")  # a key of n parts takes tomllib n**2 memory
        return check_depth(tomllib.loads(content.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a TOML file, got one that cannot be read: {reason(error)}") from error


def check_depth(value: Any) -> Any:
    """The value, unless it is nested so deep that whoever walks it would fail."""
    level = [value]
    for _ in range(DEEPEST):
        containers = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for container in containers for one in container]
        if not level:
            return value
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The headings in the first line of a CSV file in UTF-8, and the other lines by heading, each with all cells."""
    content = path.read_bytes()
    refuse_others(content[:BEGINNING], f"{path}: expected a CSV file in UTF-8", but="empty")
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        headings, lines = next(reader, []), []
        if len(set(headings)) < len(headings):
            raise ValueError(f"two columns of the same name in {shown(headings)}")
        for cells in filter(None, reader):
            if len(cells) != len(headings):
                where = f"line {reader.line_num}"
                raise ValueError(f"expected {len(headings)} cells in each line, got {len(cells)} in {where}")
            lines.append(dict(zip(headings, cells, strict=True)))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: expected a CSV file in UTF-8, got something else: {reason(error)}") from error
    return headings, lines


# Arrays


def read_npy(path: Path) -> np.ndarray:
    """The array in a file of numpy.save."""
    with path.open("rb") as file:
        refuse_others(file.read(BEGINNING), f"{path}: expected a file of numpy.save", but="numpy")
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        try:
            return read_array(file, size)
        except Exception as error:  # a damaged file can provoke nearly any of them
            raise ValueError(f"{path}: expected a file of numpy.save, got something else: {reason(error)}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file of numpy.savez or numpy.savez_compressed."""
    with path.open("rb") as file:
        refuse_others(file.read(BEGINNING), f"{path}: expected a file of numpy.savez", but="zip")
        size = file.seek(0, io.SEEK_END)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                check_members(members, size)
                return {info.filename.removesuffix(".npy"): read_member(archive, info) for info in members}
        except Exception as error:
            raise ValueError(f"{path}: expected a file of numpy.savez, got something else: {reason(error)}") from error


def check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse what an archive of `size` bytes by numpy never is."""
    if len({info.filename for info in members}) < len(members):
        raise ValueError("two arrays of the same name")
    for info in members:
        # Of other methods a few bytes may stand for megabytes, which zipfile unfolds at once.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"compression method {info.compress_type}")
    unfolded = sum(info.file_size for info in members)
    if unfolded > SMALL + LARGEST_UNFOLDING * size:
        raise ValueError(f"{size} bytes unfold to {unfolded}; where they should, use numpy.savez, uncompressed")


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        try:
            return read_array(file, info.file_size)
        except Exception as error:
            raise ValueError(f"{shown(info.filename)}: {reason(error)}") from error


def read_array(file: IO[bytes], size: int) -> np.ndarray:
    """An array in numpy's format, which with its header takes up all of `size` bytes."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another format than 1.0, in which numpy writes plain arrays")
    with warnings.catch_warnings(action="error"):  # numpy warns where it begins to repair
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=LONGEST_HEADER)
    if dtype.hasobject:
        raise ValueError(
            "an array of Python objects; save texts as `np.array(list_of_str)`, and pad what is of different lengths "
            "with zeros"
        )
    if dtype.kind not in "biufUS":
        raise ValueError(f"dtype {dtype}; read are booleans, real numbers and texts")
    left = size - file.tell()
    empty_but_huge = math.prod(max(1, length) for length in shape) > max(left, SMALL)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left or empty_but_huge:
        raise ValueError(f"{left} bytes for an array of shape {shown(shape)} and dtype {dtype}")
    content, filled = np.empty(left, np.uint8), 0
    while filled < left:
        count = file.readinto(content[filled : filled + CHUNK])
        if not count:
            raise ValueError(f"{filled} bytes where {left} should be")
        filled += count
    if dtype.kind == "U" and left and content.view(f"{dtype.byteorder}u4").max() > sys.maxunicode:
        raise ValueError("a text with impossible characters")
    array = np.ndarray(shape, dtype, content, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
