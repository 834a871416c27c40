"""What the studies among the examples share: intervals of paired differences, and results that can be read again."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student_t

PACKAGES = ("torch", "numpy", "scikit-learn")


def paired_interval(values: ArrayLike, baseline: ArrayLike) -> tuple[float, float]:
    """Mean difference of runs with the same seeds, and half the width of its 95 % interval (Student's t)."""
    difference = np.asarray(values, dtype=float) - np.asarray(baseline, dtype=float)
    half = student_t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean()), float(half)


def summary(values: ArrayLike) -> str:
    """Mean ± sample standard deviation, as in `46.7 ± 0.3`."""
    array = np.asarray(values, dtype=float)
    return f"{array.mean():.1f} ± {array.std(ddof=1):.1f}"


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
