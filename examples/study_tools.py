"""What the studies among the examples share: options, paired intervals, runs that go on, results and figures."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

PACKAGES = ("torch", "numpy", "scikit-learn")
Row = TypeVar("Row")


class StudyParser(argparse.ArgumentParser):
    """The options that every study has; each adds its own. The folder is there once they are parsed."""

    def __init__(self, description: str | None, out: str, *, figure: bool = False) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--seeds", type=int, default=10, help="how many")
        self.add_argument("--out", type=Path, default=Path(out))
        if figure:
            self.add_argument("--format", choices=["svg", "pdf", "png"], default="svg", help="of the figure")

    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        options = super().parse_args(arguments)
        if options.seeds < 2:
            self.error("--seeds: expected 2 or more, for a deviation")
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


class RunLog:
    """Finished runs by what they are runs of, a line each in a file; what a killed one left of a line is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        path.write_text("".join(whole), encoding="utf-8")
        self.runs = {json.dumps(key): found for key, found in map(json.loads, whole)}

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

    def complete(self, seeds: range, folds: int) -> Iterator[tuple[Any, Any]]:
        """Those of these seeds, by (setting, arm, seed, fold), of the arms that have all of them and can be paired."""
        found = [(key, value) for key, value in self.items() if key[2] in seeds]
        counts = Counter((setting, arm) for (setting, arm, _, _), _ in found)
        return ((key, value) for key, value in found if counts[key[0], key[1]] == len(seeds) * folds)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """In the format that the name says, with the same bytes each time."""
    with plt.rc_context({"svg.hashsalt": "momentum-distill"}):
        dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=150, metadata=dated.get(path.suffix))
    plt.close(figure)


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
    path.write_text(f'{start},\n "rows": [\n  {body}\n ]\n}}\n', encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """What `write_results` wrote: command, versions, settings, rows."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Its rows, as what they were before they were written."""
    return [kind(**row) for row in read_results(path)["rows"]]
