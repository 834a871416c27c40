"""Ways to spoil a file, each the same for the same `random.Random`.

`spoiled` knows what a file is by the ending of its name: half of the time it spoils the bytes, as a bad disk or a cut
download does, else what they say, as a program with a mistake or somebody with bad intent does.
"""

import ast
import functools
import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

Change = Callable[[Random, bytes], bytes]


def spoiled(rng: Random, name: str, content: bytes) -> bytes:
    """The content of a file of that name with one to three changes."""
    knowing = rng.random() < 0.5
    if knowing:  # first, while the file can be taken apart
        content = rng.choice(KNOWING[name.rpartition(".")[2]])(rng, content)
    for change in rng.choices(BLIND, k=rng.choice((0, 0, 0, 1, 2) if knowing else (1, 1, 1, 2, 3))):
        content = change(rng, content)
    return content


# Bytes


def flip_bits(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 20)) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: Random, content: bytes) -> bytes:
    end = rng.randrange(len(content) + 1)
    return rng.choice((content[:end], content[end:], content[: max(0, len(content) - rng.randrange(1, 30))]))


def stretch(rng: Random, content: bytes) -> tuple[int, int]:
    first, last = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return first, min(last, first + rng.choice((1, 4, 64, 4096)))


def leave_out(rng: Random, content: bytes) -> bytes:
    first, last = stretch(rng, content)
    return content[:first] + content[last:]


def repeat(rng: Random, content: bytes) -> bytes:
    first, last = stretch(rng, content)
    return content[:last] + content[first:last] * rng.choice((1, 2, 10)) + content[last:]


def swap(rng: Random, content: bytes) -> bytes:
    first, last = stretch(rng, content)
    size = last - first
    other = rng.randrange(last, len(content) + 1)
    end = other + size
    return content[:first] + content[other:end] + content[last:other] + content[first:last] + content[end:]


def insert(rng: Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    size = rng.choice((1, 2, 8, 500))
    what = rng.choice((rng.randbytes(size), b"\0" * size, b"\xff" * size, b"\xc3\x28", b"\xed\xa0\x80", b"\r", b'"'))
    return content[:place] + what + content[place:]


def overwrite(rng: Random, content: bytes) -> bytes:
    first, last = stretch(rng, content)
    return content[:first] + rng.choice((b"\0", b"\xff", b" ", rng.randbytes(1))) * (last - first) + content[last:]


def claim_a_huge_number(rng: Random, content: bytes) -> bytes:
    """Where a length or an offset may stand."""
    number = rng.choice((2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)).to_bytes(8, "little")
    place, size = rng.randrange(len(content) + 1), rng.choice((2, 4, 8))
    return content[:place] + number[:size] + content[place + size :]


OTHER_FILES = (b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b\x08gzip", b"PK\x05\x06" + b"\0" * 18)
OTHER_FILES += (b"\x93NUMPY\x01\x00", b"\x89PNG\r\n\x1a\n", b"\x80\x04.", b"null", b"{}", b"[]", b"id,text\n")
OTHER_FILES += (b"a = 1\n", b"\0" * 10_000, b"[" * 10_000, b'"' * 999)


def be_another_file(rng: Random, _content: bytes) -> bytes:
    return rng.choice((*OTHER_FILES, *map(rng.randbytes, (10, 1000, 10_000))))


BLIND: tuple[Change, ...] = (
    *(flip_bits, cut, leave_out, repeat, swap, insert, overwrite, claim_a_huge_number, be_another_file),
)


# Texts

DEEP = 50_000
DIGITS = "9" * 5_000  # more than Python turns into a number
ODD_TEXTS = ("", " ", "x", "a\0b", "\x1b[31m", "two\nlines", "\u2028", "\ud800", "../x", "/", "x" * 10_000)
ODD_VALUES = (None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), -1e308)
ODD_VALUES += (*ODD_TEXTS, [], {}, [[]], [None], [-1, 1], {"a": 1}, {"": None})
ODD_JSON = ("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, DIGITS, "1e999", "[" * DEEP, "NaN", "1.", "'x'")


def places_in(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in the tree with each of its keys."""
    found, waiting = [], [tree]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys]
    return found


def change_tree(rng: Random, tree: Any, odd: tuple[Any, ...]) -> Any:
    """The tree with one place changed, in place; where it has none, something odd."""
    places = places_in(tree)
    if not places:
        return rng.choice(odd)
    container, key = rng.choice(places)
    way = rng.randrange(6)
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[rng.choice(("x", "", "a\nb", "\x1b[31m"))] = container[key]
    elif way == 2:
        other, other_key = rng.choice(places)
        container[key] = other[other_key] if not isinstance(other[other_key], list | dict) else None
    else:
        container[key] = rng.choice(odd)
    return tree


def change_json(rng: Random, content: bytes) -> bytes:
    tree = change_tree(rng, json.loads(content), (*ODD_VALUES, "RAW", "RAW", "RAW"))
    return json.dumps(tree).replace('"RAW"', rng.choice(ODD_JSON)).encode()


def change_json_lines(rng: Random, content: bytes) -> bytes:
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = change_json(rng, lines[place])
    return b"\n".join(lines) + b"\n"


def change_table(rng: Random, content: bytes) -> bytes:
    """A cell, or a line of CSV."""
    lines = [line.split(",") for line in content.decode().splitlines()]
    place = rng.randrange(len(lines)) if rng.random() < 0.8 else 0
    cells = lines[place]
    cell = rng.randrange(len(cells))
    way = rng.randrange(7)
    if way == 0:
        del cells[cell]
    elif way == 1:
        cells.insert(cell, rng.choice(cells))
    elif way == 2:
        lines.insert(place, cells)
    elif way == 3:
        del lines[place]
    else:
        odd = ("nan", "inf", "1e999", "1_0", "-", "٣", '"', DIGITS, "x" * 200_000, *ODD_TEXTS)
        cells[cell] = rng.choice(odd)
    return "\n".join(",".join(line) for line in lines).encode(errors="surrogatepass") + b"\n"


def change_toml(rng: Random, content: bytes) -> bytes:
    lines = content.decode().splitlines()
    places = [place for place, line in enumerate(lines) if "=" in line]
    place = rng.choice(places)
    name, _, value = lines[place].partition("=")
    odd = (
        *("nan", "-inf", "-1", "0", "1e400", "1.5", "true", "1979-05-27", '"x"', '""', '"""', "[]", "[[1], 'a']"),
        *("{a.b.c = 1}", r'"a\u0000b"', r'"\u001b[31m"', "9" * 400, DIGITS, "0x" + "f" * 5000, "[" * DEEP),
        *("{a=" * 2000, "'" + "x" * 10_000 + "'"),
    )
    lines[place] = rng.choice(
        (
            *[f"{name} = {rng.choice(odd)}"] * 4,
            *(f"unknown = {value}", f"[{name}]", f"[[{name}]]", f"{name}{'.a' * 3000} = 1", f"{name}{name} ={value}"),
            *(lines[place] + "\n" + lines[place], f"\ud800 = {value}"),
        )
    )
    return "\n".join(lines).encode(errors="surrogatepass")


# Arrays

ODD_DTYPES = ("|O", "<U3", "<U300000000", "|S7", "|V4", "|V2000000000", "<c16", "<M8[s]", ">f4", "<f2", "<f8", "<i8")
ODD_DTYPES += ("|i1", "|b1", "<f16", "x", "", [("a", "<f4")], None)
ODD_SHAPES = ((), (0,), (1,), (-1,), (2**40,), (2**62, 2**62), (2**31, 0), (3, 2, 2), (1,) * 70, None, "3", (1.5,))
ODD_SHAPES += ((True,), (10**30,))


def change_npy(rng: Random, content: bytes) -> bytes:
    """What the header says of the array: it is a Python dictionary of dtype, order and shape."""
    (size,) = struct.unpack("<H", content[8:10])
    header = ast.literal_eval(content[10 : 10 + size].decode())
    way = rng.randrange(8)
    if way <= 2:
        header["descr"] = rng.choice(ODD_DTYPES)
    elif way <= 4:
        header["shape"] = rng.choice((*ODD_SHAPES, header["shape"][::-1], (*header["shape"], 1)))
    elif way == 5:
        header["fortran_order"] = rng.choice((True, None, "x"))
    elif way == 6:
        del header[rng.choice(list(header))]
    text = repr(header)
    if way == 7:
        text = rng.choice(("__import__('os')", "(" * 5000, "[" * 70_000, "{}", text + "x", text[:-1], "1" * 5000))
    version, length = (b"\x01\x00", "<H") if len(text) < 2**16 else (b"\x02\x00", "<I")
    return content[:6] + version + struct.pack(length, len(text)) + text.encode() + content[10 + size :]


def change_npz(rng: Random, content: bytes) -> bytes:
    """A member of the archive, or what its directory says. Unlike a flipped bit this leaves the check sums right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    way = rng.randrange(8)
    if way == 0:
        del members[name]
    elif way == 1:
        members[rng.choice(("x.npy", "../x.npy", "audio_lengths.npy", "id.npy", "x"))] = members.pop(name)
    elif way == 2:
        members[name] = rng.choice(BLIND)(rng, members[name])
    elif way == 3:
        return bomb(name)
    elif way <= 5:
        members[name] = change_npy(rng, members[name])
    elif way == 6:
        members[name] = npy(change_array(rng, np.load(io.BytesIO(members[name]))))
    file = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(file, "w", method) as archive:
        for key, member in members.items():
            archive.writestr(key, member)
    content = file.getvalue()
    if way == 7:  # the size of a member, compressed or not, in the directory at the end
        entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
        place = rng.choice(entries) + rng.choice((8, 10, 20, 24, 42))
        number = rng.choice((0, 1, 99, 2**26, 2**31 - 1, 2**32 - 2))
        content = content[:place] + struct.pack("<I", number) + content[place + 4 :]
    return content


@functools.cache
def bomb(name: str) -> bytes:
    """An archive of 65 kB that holds an array of 64 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, npy(np.zeros((2**24, 1, 1), np.float32)))
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def change_array(rng: Random, array: np.ndarray) -> np.ndarray:
    array = array.copy()
    way = rng.randrange(8)
    if way == 0 and array.dtype.kind == "f" and array.size:
        array.flat[rng.randrange(array.size)] = rng.choice((np.nan, np.inf, -np.inf, 1e30, -0.0))
    elif way == 1 and array.dtype.kind in "iu" and array.size:
        array.flat[rng.randrange(array.size)] = rng.choice((-1, 10**6, -(2**31)))
    elif way == 2 and array.dtype.kind == "U" and array.size:
        array.view(np.uint32).flat[rng.randrange(array.size)] = rng.choice((0xFFFFFFFF, 0xD800, 0x1B, 10))
    elif way == 3:
        array = array[:-1]
    elif way == 4:
        array = array[..., None]
    elif way == 5:
        array = array.T
    elif way == 6 and array.dtype.kind != "U":
        with np.errstate(all="ignore"):
            array = array.astype(rng.choice(("f8", "f2", "i1", "u4", "?", "S3", "c8", ">f4")))
    else:
        array = array[:0]
    return array


# Pickles


def many_times() -> list[Any]:
    """A list of 10**12 numbers in a hundred bytes."""
    one: list[Any] = [0.0]
    for _ in range(12):
        one = [one] * 10
    return one


def itself() -> list[Any]:
    one: list[Any] = []
    one += [one, one]
    return one


def one_long_text() -> list[str]:
    """As an array it takes the longest for every entry: 4 × 20,000 × 20,000 bytes."""
    return ["x" * 20_000, *["y"] * 20_000]


def change_content(rng: Random, content: bytes) -> bytes:
    """A value of a pickle, written again as any Python may write it."""
    tree = pickle.loads(content)
    container, key = rng.choice(places_in(tree)[3:] or [(tree, "train")])
    value = container[key]
    if isinstance(value, np.ndarray) and rng.random() < 0.5:
        container[key] = change_array(rng, value) if rng.random() < 0.7 else value.tolist()
    else:
        made = (many_times(), itself(), one_long_text(), [10**5000], [print], np.array([None]), np.datetime64(1, "s"))
        tree = change_tree(rng, tree, (*ODD_VALUES, *made, *made))
    return pickle.dumps(tree, rng.choice((2, 3, 4, 5)))


def change_opcodes(rng: Random, content: bytes) -> bytes:
    """An opcode taken out, doubled or put in."""
    places = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    at = rng.randrange(len(places) - 1)
    first, last = places[at], places[at + 1]
    odd = (*(bytes([code]) for code in b"]}()NtRbu02"), b"]" * 10_000, b"\x85" * 10_000, b"\x94" * 99)
    new = rng.choice((b"", content[first:last] * 2, rng.choice(odd), rng.choice(odd) + content[first:last]))
    return content[:first] + new + content[last:]


# Weights


def change_safetensors(rng: Random, content: bytes) -> bytes:
    """The header: eight bytes of length, then JSON of dtype, shape and offsets of each tensor."""
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    tree = json.loads(header)
    entry = tree[rng.choice(list(tree))]
    way = rng.randrange(6)
    if way == 0:
        entry["dtype"] = rng.choice(("I32", "F16", "F64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "BF16", "x"))
    elif way == 1:
        entry["shape"] = rng.choice(([], [1], [2**62, 2**62], [2**63], [0], entry["shape"][::-1], [*entry["shape"], 1]))
    elif way == 2:
        entry["data_offsets"] = rng.choice(([0, 2**60], [4, 0], [0, 4], [-1, 4], [0]))
    elif way == 3:
        tree["x"] = tree.pop(rng.choice(list(tree)))
    elif way == 4:
        place = rng.randrange(0, max(4, len(data)), 4)
        data = data[:place] + struct.pack("<f", rng.choice((np.nan, np.inf, 1e30))) + data[place + 4 :]
    text = change_json(rng, header) if way == 5 else json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + data


KNOWING: dict[str, tuple[Change, ...]] = {
    "pkl": (change_content, change_content, change_opcodes),
    "json": (change_json,),
    "jsonl": (change_json_lines,),
    "npz": (change_npz,),
    "npy": (change_npy,),
    "csv": (change_table,),
    "toml": (change_toml,),
    "safetensors": (change_safetensors,),
}
