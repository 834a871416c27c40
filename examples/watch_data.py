"""The recordings of a smart-watch that seglearn ships, as pairs of windows: accelerometer and gyroscope.

Ten people did seven shoulder exercises with either arm, some twenty repetitions each: 140 recordings at 50 Hz
(Burns et al., 2018, arXiv:1802.01489). `pip install seglearn` brings them; no code of seglearn is imported.
"""

import importlib.util
import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES, PEOPLE, FOLDS = 7, 10, 5
WINDOW, STRIDE = 100, 50  # two seconds, a new window every second


class Windows(NamedTuple):
    strong: Tensor  # accelerometer, (N, 3, WINDOW)
    weak: Tensor  # gyroscope, (N, 3, WINDOW)
    labels: Tensor  # exercise, (N,)
    people: Tensor  # 1 to 10, (N,)

    def rows(self, chosen: Tensor) -> "Windows":
        return Windows(*(tensor[chosen] for tensor in self))


def load_windows() -> Windows:
    """All 4,677 windows, in the order of the recordings."""
    seglearn = importlib.util.find_spec("seglearn")
    if seglearn is None or seglearn.origin is None:
        raise SystemExit("the recordings come with seglearn: pip install seglearn")
    data = read_objects(Path(seglearn.origin).parent / "data" / "watch_dataset.npy")
    windows, labels, people = [], [], []
    for recording, label, person in zip(data["X"], data["y"], data["subject"], strict=True):
        signal = torch.tensor(recording, dtype=torch.float32).T  # (6, time)
        cut = signal.unfold(1, WINDOW, STRIDE).transpose(0, 1)  # (n, 6, WINDOW)
        windows.append(cut)
        labels += [int(label)] * len(cut)
        people += [int(person)] * len(cut)
    strong, weak = torch.cat(windows).split(3, dim=1)
    return Windows(strong.contiguous(), weak.contiguous(), torch.tensor(labels), torch.tensor(people))


class _Dtype:
    """What the file says of the type of an array."""

    def __init__(self, code: str, *_flags: object) -> None:
        self.code, self.order = code, ""


def read_objects(path: Path) -> Any:
    """What an .npy file of Python objects holds, if that is plain data.

    numpy would unpickle it, and that runs whatever a file asks for. Here its opcodes are only looked at: lists,
    dictionaries, strings, numbers and arrays of numbers are put together, and all else is an error.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()

    def to_mark() -> list[Any]:
        place = max(i for i, value in enumerate(stack) if value is mark)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        for opcode, value, _ in pickletools.genops(file):
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(mark)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "GLOBAL":
                    stack.append(value)
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(opcode.name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "TUPLE":
                    stack.append(tuple(to_mark()))
                case "APPEND":
                    item = stack.pop()
                    stack[-1].append(item)
                case "APPENDS":
                    items = to_mark()
                    stack[-1].extend(items)
                case "SETITEMS":
                    items = to_mark()
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(_made(stack.pop(), arguments))
                case "BUILD":
                    state = stack.pop()
                    stack.append(_filled(stack.pop(), state))
                case other:
                    raise ValueError(f"{path}: uses the pickle opcode {other}, which plain data does not need")
    raise ValueError(f"{path}: ends too early")


def _made(name: object, arguments: Any) -> Any:
    """The three functions that numpy's arrays need in a file; none of them is called."""
    if name == "numpy.core.multiarray _reconstruct":
        return "array to be filled"
    if name == "numpy dtype":
        return _Dtype(*arguments)
    if name == "_codecs encode" and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    raise ValueError(f"expected arrays, got a call of {name!r}")


def _filled(blank: Any, state: Any) -> Any:
    if isinstance(blank, _Dtype):
        blank.order = state[1]
        return blank
    _version, shape, dtype, fortran, content = state
    if dtype.code == "O8":
        return content if shape else content[0]
    if dtype.code not in ("f8", "i8"):
        raise ValueError(f"expected arrays of numbers, got the dtype {dtype.code!r}")
    return np.frombuffer(content, dtype.order + dtype.code).reshape(shape, order="F" if fortran else "C")
