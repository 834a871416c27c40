"""What the studies among the examples share: options, paired intervals, runs that go on, results and figures."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

from mtmd.files.writing import write_text
from mtmd.settings.options import at_least

PACKAGES = ("torch", "numpy", "scikit-learn")
Row = TypeVar("Row")


class StudyParser(argparse.ArgumentParser):
    """The options that every study has; each adds its own. The folder is there once they are parsed."""

    def __init__(self, description: str | None, out: str, *, figure: bool = False) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--seeds", type=at_least(2), default=10, help="how many, two or more for a deviation")
        self.add_argument("--out", type=Path, default=Path(out))
        if figure:
            self.add_argument("--format", choices=["svg", "pdf", "png"], default="svg", help="of the figure")

    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        options = super().parse_args(arguments)
        options.out.mkdir(parents=True, exist_ok=True)
        return options


def paired_interval(values: ArrayLike, baseline: ArrayLike) -> tuple[float, float]:
    """Mean difference of runs with the same seeds, and half the width of its 95 % interval (Student's t)."""
    difference = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    half = student_t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), float(half)


def summary(values: ArrayLike) -> str:
    """Mean ± sample standard deviation, as in `46.7 ± 0.3`."""
    array = np.asarray(values, dtype=float)
    return f"{array.mean():.1f} ± {array.std(ddof=1):.1f}"


def signed(interval: tuple[float, float], digits: int = 1) -> str:
    """A difference and half the width of its interval, as `+0.3 ± 0.5`, more digits where one hides which is more."""
    mean, half = interval
    while f"{abs(mean):.{digits}f}" == f"{half:.{digits}f}" and abs(mean) != half:
        digits += 1
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


class RunLog:
    """Finished runs by what they are runs of, a line each in a file; what a killed one left of a line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
        self.runs: dict[str, Any] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                key, found = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}: expected a run in line {number}, got {line[:80]!r}") from error
            self.runs[json.dumps(key)] = found

    def __contains__(self, key: Any) -> bool:
        return json.dumps(key) in self.runs

    def __getitem__(self, key: Any) -> Any:
        return self.runs[json.dumps(key)]

    def add(self, key: Any, found: Any) -> None:
        """Both as JSON holds them."""
        self.runs[json.dumps(key)] = found
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key, found]) + "\n")

    def items(self) -> Iterator[tuple[Any, Any]]:
        """In the order of the keys."""
        return iter(sorted((json.loads(key), found) for key, found in self.runs.items()))

    def of(self, settings: Iterable[str], arms: Iterable[str], seeds: range) -> Iterator[tuple[Any, Any]]:
        """Those of these settings, arms and seeds, by (setting, arm, seed, fold)."""
        for key, found in self.items():
            if key[0] in settings and key[1] in arms and key[2] in seeds:
                yield key, found


def write_results(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """JSON with the command that was given, the versions and the settings, and a line for each row."""
    head = {
        "command": " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "settings": settings,
    }
    body = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    start = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f'{start},\n "rows": [\n  {body}\n ]\n}}\n')


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote: command, versions, settings, rows."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Its rows, as what they were before they were written."""
    return [kind(**row) for row in read_results(path)["rows"]]
