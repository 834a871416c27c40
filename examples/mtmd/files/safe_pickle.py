"""Read the pickles that multimodal sentiment data is passed around in, without trusting them.

`pickle.load` runs whatever a file asks for. `load` accepts what dictionaries of numpy arrays need
and nothing else, by three allow-lists: the opcodes, the names a file may import, and the types of
what comes back. Not even those names lead to the real functions: in a file, `numpy.dtype` reaches
`_Dtype` below, and `numpy.core.multiarray._reconstruct` a method of `_Reader`. So a file never gets
hold of anything worth calling or patching, and the size of every array is held against the bytes
that are really there before memory is taken.

The pure-Python unpickler is the base: its opcode table can be replaced, and no five bytes make its
memo grow to gigabytes. Data files are few opcodes and large blocks of bytes, so it is fast enough.
"""

import collections
import itertools
import math
import mmap
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from mtmd.files.checks import is_plain
from mtmd.files.reading import BEGINNING, other_kind

__all__ = ["DamagedPickleError", "UnsafePickleError", "load"]

# JSON, a table or a sentence; the texts among the pickles begin otherwise.
TEXT = re.compile(rb"(?s)(?!.*[\x00-\x08\x0e-\x1f])(\xef\xbb\xbf)?(\s*[{\[]|[^\n]*[,;\t]|\w+:? )")
PYTHON_2 = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # what it writes for str


class UnsafePickleError(ValueError):
    """The file asks for something that is not plain data. Nothing of it was run."""


class DamagedPickleError(UnsafePickleError):
    """The file is cut off, is no pickle, or contradicts itself."""


def load(path: str | os.PathLike[str]) -> object:
    """Return what the pickle at `path` holds.

    The result consists of dict and OrderedDict (keys: str), list, tuple, str, bytes, int, float,
    bool, None, numpy scalars, and numpy arrays of booleans, numbers or fixed-width strings. Pickle
    protocols 0 to 5 are read, as Python 3 and numpy 1 or 2 write them.

    Raises:
        UnsafePickleError: If the file asks for anything else; the message names the file and what.
        DamagedPickleError: If the file is truncated or no pickle. A kind of `UnsafePickleError`.
        OSError: If the file cannot be opened.
    """
    where = os.fspath(path)
    with open(path, "rb") as file:
        start = file.read(BEGINNING)
        kind = other_kind(start, but="pickle") or ("a text" if TEXT.match(start) else "")
        if kind:
            raise DamagedPickleError(f"{where}: expected a pickle, got {kind}") from None
        # A map never hands out more bytes than the file has, whatever length an opcode claims.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = _Reader(content)
            try:
                root = reader.load()
                _check_types(root, len(content))
            except UnsafePickleError as error:
                raise type(error)(f"{where}: {reader.key()}{error}") from None
            except Exception:  # a stream of garbage can provoke nearly any of them
                raise DamagedPickleError(f"{where}: truncated, damaged, or not a pickle of plain data") from None
    return root


class _Dtype:
    """Stands for a `numpy.dtype` during the load: real ones are mutable and shared process-wide."""

    def __init__(self, code: str, *_flags: object) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[US][1-9][0-9]{0,8}|O[48]?", code):
            raise UnsafePickleError(
                f"holds numpy data of dtype {code[:40]!a}; read are booleans, integers, floats and fixed-width strings"
            )
        if code.startswith("O"):
            raise UnsafePickleError(
                "holds a numpy array of Python objects (dtype object), which is not safe to read: "
                "where you trust the file, load it once with pickle and save such fields again as "
                "lists (`array.tolist()`) or as arrays of a numeric or string dtype"
            )
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        _version, order, subdtype, names, fields, itemsize = state[:6]
        if (subdtype, names, fields) != (None, None, None):
            raise UnsafePickleError("holds a structured numpy dtype; only plain ones are read")
        if itemsize not in (-1, self.dtype.itemsize):
            raise DamagedPickleError(f"gives the dtype {self.dtype} a wrong size")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


_NDARRAY = object()  # what the name `numpy.ndarray` leads to: only methods of _Reader make arrays


class _Reader(pickle._Unpickler):
    """An unpickler that knows the names of `find_class` and the opcodes of `_OPCODES`."""

    def __init__(self, content: mmap.mmap) -> None:
        super().__init__(content)
        # Each byte of an honest file ends in at most one encoded string and one array; a file that
        # asks for more uses the same bytes over and over to fill the memory.
        self._budget = 2 * len(content)
        self._names: dict[tuple[str, str], object] = {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytes"): self._empty_bytes,
            ("__builtin__", "bytes"): self._empty_bytes,
            ("collections", "OrderedDict"): self._ordered_dict,
        }
        for core in ("numpy.core", "numpy._core"):  # numpy 1 and numpy 2
            self._names[f"{core}.multiarray", "_reconstruct"] = self._reconstruct
            self._names[f"{core}.multiarray", "scalar"] = self._scalar
            self._names[f"{core}.numeric", "_frombuffer"] = self._frombuffer

    def key(self) -> str:
        """The keys on the way to what is being read, to begin an error with: "train: audio: ". Empty where none are."""
        keys, filling = [], False  # whether the level before ends in a dictionary that this one's items go to
        for level in [*getattr(self, "metastack", []), getattr(self, "stack", [])]:
            if filling and level:  # key, value, key, value, key, and what the last value is made of
                place = 0
                while all(isinstance(one, str) for one in level[place : place + 3 : 2]) and place + 2 < len(level):
                    place += 2
                keys.append(level[place])
            else:
                keys += [one for before, one in itertools.pairwise(level) if isinstance(before, dict)]
            filling = bool(level) and isinstance(level[-1], dict)
        return "".join(f"{key}: " for key in keys if is_plain(key) and len(key) < 40)

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._names:
            asked = ascii(f"{module}.{name}"[:120])
            raise UnsafePickleError(f"asks for {asked}, which is neither numpy data nor a plain container")
        return self._names[module, name]

    def persistent_load(self, _id: object) -> NoReturn:
        raise UnsafePickleError("refers to an object outside the file (persistent id)")

    # What the permitted names do: each takes exactly what pickle and numpy write.

    def _encode(self, text: str, codec: str) -> bytes:
        """Bytes as protocols 0 to 2 spell them."""
        if codec != "latin1":
            raise UnsafePickleError("asks for a codec other than latin1")
        self._spend(len(text))
        return text.encode("latin1")

    def _empty_bytes(self) -> bytes:
        return b""

    def _ordered_dict(self) -> collections.OrderedDict[str, object]:
        return collections.OrderedDict()

    def _reconstruct(self, subtype: object, shape: object, _code: object) -> np.ndarray:
        """An array as protocols 0 to 4 spell it: blank here, filled by BUILD."""
        if subtype is not _NDARRAY or shape != (0,):
            raise UnsafePickleError("holds a subclass of numpy.ndarray; only plain arrays are read")
        return np.ndarray(0, np.int8)

    def _frombuffer(
        self, data: bytes, dtype: _Dtype, shape: tuple, order: str, axes: tuple | None = None
    ) -> np.ndarray:
        """An array as protocol 5 spells it."""
        self._check_array(shape, dtype, data)
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
        if axes is not None:
            array = array.transpose(axes)
        return array.astype(dtype.dtype.newbyteorder("="))

    def _scalar(self, dtype: _Dtype, data: bytes) -> np.generic:
        self._check_array((1,), dtype, data)
        return np.frombuffer(data, dtype.dtype).astype(dtype.dtype.newbyteorder("="))[0]

    def _check_array(self, shape: Any, dtype: Any, data: Any) -> None:
        if type(shape) is not tuple or type(dtype) is not _Dtype or type(data) is not bytes:
            raise DamagedPickleError("describes an array by other than a shape, a dtype and bytes")
        if len(shape) > 32 or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise DamagedPickleError("holds an array of an impossible shape")
        size = math.prod(shape)
        empty_but_huge = size == 0 and max(shape) > 2**20
        if size * dtype.dtype.itemsize != len(data) or empty_but_huge:
            raise DamagedPickleError(f"holds {len(data)} bytes for an array of shape {shape} and dtype {dtype.dtype}")
        if dtype.dtype.kind == "U" and size > 0:
            code_points = np.frombuffer(data, f"{dtype.dtype.byteorder}u4")
            if code_points.max() > 0x10FFFF:
                raise DamagedPickleError("holds an array of strings with impossible characters")
        self._spend(len(data))

    def _spend(self, size: int) -> None:
        self._budget -= size
        if self._budget < 0:
            raise DamagedPickleError("unfolds to far more data than the file holds")

    # The opcodes that are read differently from pickle.

    def load_build(self) -> None:
        """Fill a blank array or dtype. In pickle, BUILD sets any attribute of any object."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is _Dtype:
            target.set_state(state)
        elif type(target) is np.ndarray:
            _version, shape, dtype, fortran, data = state
            self._check_array(shape, dtype, data)
            target.__setstate__((1, shape, dtype.dtype, fortran is True, data))
        else:
            raise UnsafePickleError(f"sets attributes of a {type(target).__name__}")

    def load_global(self) -> None:
        """Ask `find_class`. Pickle would take the beginning of a name for the whole of it."""
        module, name = self.readline(), self.readline()
        if not name.endswith(b"\n"):
            raise DamagedPickleError("ends within a name")
        self.append(self.find_class(module[:-1].decode(), name[:-1].decode()))

    def load_bytearray8(self) -> None:
        """Bytes for `_frombuffer`. Pickle would first allocate whatever size is claimed."""
        size = int.from_bytes(self.read(8), "little")
        data = self.read(size)
        if len(data) != size:
            raise DamagedPickleError("ends within a block of bytes")
        self.append(data)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise DamagedPickleError("sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No data file has other keys, and hashing nested tuples can take for ever or crash.
            if type(key) is not str:
                raise UnsafePickleError(f"has a dictionary key of type {type(key).__name__}; only str is read")
            target[key] = value


# All that Python 3 emits for plain data and numpy arrays. Missing, among others: INST, OBJ, NEWOBJ,
# EXT1, PERSID, DUP, POP, sets, out-of-band buffers, and the 8-bit strings of Python 2.
_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    BYTEARRAY8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT
    DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL
    STACK_GLOBAL REDUCE BUILD
"""


def _refuse_opcode(name: str) -> Callable[[_Reader], NoReturn]:
    def refuse(_reader: _Reader) -> NoReturn:
        if name in PYTHON_2:
            raise UnsafePickleError(
                f"written by Python 2 (opcode {name}), whose strings are bytes or text: where you trust the file, load "
                "it once with `pickle.load(file, encoding='latin1')` and save it again"
            )
        raise UnsafePickleError(f"uses the pickle opcode {name}, which plain data does not need")

    return refuse


_Reader.dispatch = {ord(op.code): _refuse_opcode(op.name) for op in pickletools.opcodes}
for _name in _OPCODES.split():
    _code = getattr(pickle, _name)[0]
    _Reader.dispatch[_code] = pickle._Unpickler.dispatch[_code]
_Reader.dispatch[pickle.BUILD[0]] = _Reader.load_build
_Reader.dispatch[pickle.GLOBAL[0]] = _Reader.load_global
_Reader.dispatch[pickle.BYTEARRAY8[0]] = _Reader.load_bytearray8
_Reader.dispatch[pickle.DICT[0]] = _Reader.load_dict
_Reader.dispatch[pickle.SETITEM[0]] = _Reader.load_setitem
_Reader.dispatch[pickle.SETITEMS[0]] = _Reader.load_setitems


def _check_types(root: object, size: int) -> None:
    """Refuse what stands for a function or a type and was left over in the result, and lists that have no end.

    An entry of a list takes at least one of the `size` bytes of the file. A dozen lists that hold each other ten times
    are 10**12 entries to whoever makes an array of them.
    """
    plain = (str, bytes, int, float, bool, type(None), np.generic, np.ndarray)
    seen: set[int] = set()
    waiting, entries = [root], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, list | tuple):  # each time that it is held
            entries += len(value)
            if entries > size:
                raise DamagedPickleError("unfolds to far more data than the file holds: lists repeat the same lists")
            waiting.extend(value)
        elif isinstance(value, dict):
            if id(value) not in seen:  # may be shared and even hold itself
                seen.add(id(value))
                waiting.extend(value.values())
        elif not isinstance(value, plain):
            raise UnsafePickleError("holds a function or a type by itself, which is no data")
