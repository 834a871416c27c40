"""What a value has to be, and how it is shown in an error message."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

short = reprlib.Repr()
short.maxstring = short.maxother = short.maxlong = 80


def shown(value: object) -> str:
    """A value for an error message: on one line, and short whatever it is."""
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return short.repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return f"a huge {type(value).__name__}"


def reason(error: Exception) -> str:
    """What another library said, for an error message: on one line, and short."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) or not str(error) else str(error)
    return "".join(one if one.isprintable() else "?" for one in " ".join(text.split())[:200])


def is_number(value: object) -> bool:
    """Whether this is an int or float that float32 can hold, as which scores are computed; squares then fit float64."""
    largest = float(np.finfo(np.float32).max)
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_text(value: object) -> bool:
    """Whether this is a text that a file can hold: half a surrogate pair, which pickle and JSON know, is none."""
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def is_plain(value: object) -> bool:
    """Whether this is a text that can be shown as it is, on one line: no control characters either."""
    return is_text(value) and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value)


class Rule(NamedTuple):
    """What a value in a JSON file has to be."""

    expected: str
    fits: Callable[[Any], bool]


COUNT = Rule("a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Rule("a number", is_number)
MEASURE = Rule("a number or null", lambda value: value is None or is_number(value))
NAME = Rule("a text on one line", is_plain)
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
MEASURES = Rule("numbers by name", lambda value: OBJECT.fits(value) and all(map(MEASURE.fits, value.values())))


def check_layout(value: Any, layout: Any, where: str) -> None:
    """Raise unless a value from a JSON file is laid out as it should be.

    Args:
        value: What was read.
        layout: A rule; or a dictionary of layouts by key, for an object that has all of these and maybe others; or a
            list of one layout, for a list of such.
        where: Begins the error.
    """
    if isinstance(layout, dict):
        check_layout(value, OBJECT, where)
        for key, below in layout.items():
            if key not in value:
                raise ValueError(f"{where}: expected the key {key!r}, got {shown(list(value))}")
            check_layout(value[key], below, f"{where}: {key}")
    elif isinstance(layout, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {shown(value)}")
        for place, entry in enumerate(value):
            check_layout(entry, layout[0], f"{where}: [{place}]")
    elif not layout.fits(value):
        raise ValueError(f"{where}: expected {layout.expected}, got {shown(value)}")


def did_you_mean(words: Iterable[object], known: Iterable[str]) -> str:
    """The end of an error: what was probably meant by each of the words."""
    names = list(known)
    near: list[str] = []
    for word in map(str, words):
        ends = [name for name in names if name.endswith("-" + word.lstrip("-"))]  # --lr: --bert-lr and two more
        near += ends or difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""


def unknown(word: object, known: Iterable[str]) -> str:
    """What to say of a word that is none of those that are known."""
    names = list(known)
    return f"expected one of {', '.join(names)}, got {shown(word)}{did_you_mean([word], names)}"
