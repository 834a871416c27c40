"""The values of one key of a fold, checked: what is not as it should be is named with its row."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtmd.data.fold import AXES, MODALITIES, DataError
from mtmd.files.checks import is_plain, is_text, shown


def axes(value: Any) -> int:
    """Of an array, or of nested lists as far as their first entries tell."""
    axes = 0
    while isinstance(value, list | tuple) and value:
        value, axes = value[0], axes + 1
    return axes + (value.ndim if isinstance(value, np.ndarray) else 0)


def count_samples(content: Mapping[str, Any]) -> int:
    """How many samples a fold has: as many as most of its keys have entries."""
    values = [content[key] for key in AXES if key in content]
    arrays = [value for value in values if isinstance(value, list | tuple) or getattr(value, "ndim", 0)]
    counts = [len(array) for array in arrays]
    return max(counts, key=counts.count, default=0)


def read_scores(content: Mapping[str, Any], key: str, where: str, n: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return numbers(content, key, where, n, (), f"{n} numbers").astype(np.float32)


def read_tokens(content: Mapping[str, Any], where: str, n: int) -> np.ndarray:
    parts = ("token ids", "attention mask", "segment ids")
    expected = f"({n}, 3, L) {parts[0]}, {parts[1]} and {parts[2]}"
    array = numbers(content, "text_bert", where, n, (3, "L"), expected)
    # The files store them as float32, which is exact far beyond any vocabulary.
    odd = np.argwhere(~(np.isfinite(array) & (array >= 0) & (array < 2**24) & (array == np.floor(array))))
    if len(odd):
        row, part, _ = odd[0]
        got = f"{array[tuple(odd[0])]} among the {parts[part]} of row {row}"
        raise DataError(f"{where}: text_bert: expected {expected}, whole numbers from 0 on, got {got}")
    ids, mask, segments = tokens = array.astype(np.int64).transpose(1, 0, 2)
    order = f"{where}: text_bert: expected {', '.join(parts)}, in this order"
    if mask.max() > 1:
        row = int(mask.max(axis=1).argmax())
        raise DataError(f"{order}, with a mask of 0 and 1; got {mask.max()} in the mask of row {row}")
    used = ids.any(axis=1)
    if used.any() and not mask[used, 0].any() and (segments[used, 0] == 1).all():
        raise DataError(f"{order}; got a mask that begins with 0 and segments that begin with 1, as if exchanged")
    return np.ascontiguousarray(tokens.transpose(1, 0, 2))


def read_lengths(content: Mapping[str, Any], key: str, where: str, n: int, longest: int) -> np.ndarray:
    expected = f"{n} integers from 0 to {longest}"
    array = numbers(content, key, where, n, (), expected)
    bad = ~((array >= 0) & (array <= longest) & (array == np.floor(array)))
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{where}: {key}: expected {expected}, got {array[row]} in row {row}")
    return array.astype(np.int64)


def lengths_from_padding(array: np.ndarray) -> np.ndarray:
    used = (array != 0).any(axis=2)  # (n, T); NaN is not 0
    last = array.shape[1] - used[:, ::-1].argmax(axis=1)
    return np.where(used.any(axis=1), last, 0).astype(np.int64)


def numbers(
    content: Mapping[str, Any], key: str, where: str, n: int, row: tuple[int | str, ...], expected: str
) -> np.ndarray:
    """The array (n, *row) at a key; in `row` a letter stands for any size but 0. For () a column (n, 1) will do."""
    value = _value(content, key, where)
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    fault = _fault(value, n, row)
    if fault:
        lengths = f", and give {key}_lengths" if PAD in fault and key in MODALITIES else ""
        raise DataError(f"{where}: {key}: expected {expected}, got {fault}{lengths}")
    array = np.asarray(value)
    return array if row else array.reshape(n)


PAD = "; pad with zeros at the end to the longest"  # and give the lengths, adds who knows the key


def _fault(value: Any, n: int, row: tuple[int | str, ...]) -> str:
    """What stands there instead of (n, *row) numbers; empty where it is these."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iuf":
            return f"dtype {value.dtype}" + (f", {shown(value.flat[0])} in row 0" if value.ndim and value.size else "")
        got = str(len(value)) if value.ndim == 1 and not row else f"shape {value.shape}"
        return "" if value.shape[:1] == (n,) and _fits(value.shape[1:], row) else got
    if not isinstance(value, list | tuple):
        return shown(value)
    if len(value) != n:
        return f"{len(value)} rows" if row else str(len(value))
    shapes = []
    for place, one in enumerate(value):  # before numpy, which gives each text in a list the room of the longest
        odd = _no_number(one)
        if odd:
            return f"{odd} in row {place}" + (PAD if one is None and row else "")  # a sample that misses it
        shapes.append(_shape(one))
        if shapes[-1] is None:
            return f"lists of different lengths within row {place}"
        if not _fits(shapes[-1], row):
            got = f"shape {shapes[-1]}" if shapes[-1] else shown(one)
            return f"{got} in row {place}" + (PAD if 0 in shapes[-1] else "")
    for place, shape in enumerate(shapes):
        if shape != shapes[0]:
            if not row:
                return f"{shown(value[place])} in row {place}"
            same = [here == first for here, first in zip(shape, shapes[0], strict=True)]
            if same[-1] or row[-1] == "L":
                hint = PAD
            else:  # the width differs, or time stands where the width should
                hint = f"; transpose what is (d, T){PAD}" if same[0] else "; all need the same width d"
            return f"shape {shapes[0]} in row 0 and {shape} in row {place}{hint}"
    return ""


def _fits(shape: tuple[int, ...], row: tuple[int | str, ...]) -> bool:
    sizes = (1,) if shape == (1,) and not row else row
    return len(shape) == len(sizes) and all(
        size > 0 if isinstance(wanted, str) else size == wanted for size, wanted in zip(shape, sizes, strict=True)
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    """That of nested lists; None where these are ragged."""
    try:
        return np.shape(value)
    except (ValueError, TypeError, RecursionError):
        return None


def _no_number(value: Any) -> str:
    """The first thing in nested lists that is no number; empty where all are."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | tuple):
            waiting.extend(reversed(one))
        elif isinstance(one, np.ndarray):
            if one.dtype.kind not in "iuf":
                return f"dtype {one.dtype}"
        elif type(one) is int and abs(one) < 2**63:
            continue
        elif not isinstance(one, float | np.integer | np.floating):
            return shown(one)
    return ""


def strings(content: Mapping[str, Any], key: str, where: str, n: int) -> list[str]:
    value = _value(content, key, where)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or len(value) != n:
        got = len(value) if isinstance(value, list | tuple) else shown(value)
        raise DataError(f"{where}: {key}: expected {n} strings, got {got}")
    fits = is_plain if key == "id" else is_text  # an id stands in tables and messages, a text holds what it likes
    for row, one in enumerate(value):
        number = key == "id" and isinstance(one, int | np.integer) and not isinstance(one, bool) and abs(one) < 2**63
        if number or fits(one):
            continue
        written = " that can be written" if isinstance(one, str) else ""
        raise DataError(
            f"{where}: {key}: expected {n} strings{written}, got {shown(one)} in row {row}{_hint(key, one)}"
        )
    return [str(one) for one in value]


def _hint(key: str, one: Any) -> str:
    """What to do with what stands in place of a text."""
    if isinstance(one, bytes):
        return "; decode it"
    if key == "id" and isinstance(one, list | tuple):
        return "; join its parts to one text, as VIDEO$_$CLIP"
    missing = one is None or (isinstance(one, float) and np.isnan(one))
    return "; a text that is missing is ''" if key == "raw_text" and missing else ""


def _value(content: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in content:
        raise DataError(f"{where}: the key {key!r} is missing, there is: {key_names(content)}")
    return content[key]


def key_names(content: Iterable[Any]) -> str:
    """The keys of a dictionary, for a message."""
    names = [str(key) if is_plain(key) and len(key) < 40 else shown(key) for key in content]
    return ", ".join(names[:30] + ["..."] * (len(names) > 30)) or "nothing"
