"""How much of the suite runs when: a part with `make test`, all of it with `make test-long`, more with `make stress`.

- Marked `long`, a test runs with `make test-long` alone.
- Marked `grid`, a test of many parameters runs with `make test` at points in which any two values of two parameters
  meet, and with `make test-long` at the others.
- Marked `repeated`, a test runs in all three, and repeats `times(...)`.
"""

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256

import pytest

TIERS = ("test", "long", "stress")
TIER = os.environ.get("MOMENTUM_DISTILL_TIER", "test")
STRESS = TIER == "stress"


def times(*repetitions: int) -> int:
    """Of the repetitions with `make test`, `make test-long` and `make stress`, those of the tier that runs."""
    return dict(zip(TIERS, repetitions, strict=True))[TIER]


def mark_long(items: Sequence[pytest.Item]) -> None:
    """Mark as `long` what is left of each grid when the points for `make test` are chosen."""
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid") and not item.get_closest_marker("long"):
            grids[item.nodeid.partition("[")[0]].append(item)
    for points in grids.values():
        # In the order of a hash of their names: a draw that is the same everywhere.
        left = sorted(points, key=lambda item: sha256(item.nodeid.encode()).digest())
        unmet = set().union(*map(meetings, left))
        while unmet:
            best = max(left, key=lambda item: len(meetings(item) & unmet))
            left.remove(best)
            unmet -= meetings(best)
        for item in left:
            item.add_marker("long")


def meetings(item: pytest.Item) -> set[tuple[object, ...]]:
    """Which values of any two of its parameters meet in a test. By the object, for not every one can be compared."""
    callspec = getattr(item, "callspec", None)
    values = [] if callspec is None else [(name, id(value)) for name, value in callspec.params.items()]
    return {*itertools.combinations(values, min(2, len(values)))}
