"""What an experiment leaves in its folder, read by others with distrust: results, epochs, predictions, steps."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from mtmd.data.values import key_names
from mtmd.files.checks import (
    COUNT,
    MEASURES,
    NAME,
    NUMBER,
    OBJECT,
    SWITCH,
    Rule,
    check_layout,
    is_number,
    is_plain,
    reason,
    shown,
)
from mtmd.files.reading import parse_json, read_json, read_npz, read_table
from mtmd.settings.config import MODALITIES

PREDICTION_COLUMNS = ("seed", "split", "id", "target", "score", *MODALITIES)
PAPER_COLUMNS = {
    "Acc7": ("acc7",),
    "Acc5": ("acc5",),
    "Acc2": ("acc2_has0", "acc2_non0"),
    "F1": ("f1_has0", "f1_non0"),
    "MAE": ("mae",),
    "Corr": ("corr",),
}
SIMS_COLUMNS = {
    "Acc2": ("acc2",),
    "Acc3": ("acc3",),
    "Acc5": ("acc5",),
    "F1": ("f1",),
    "MAE": ("mae",),
    "Corr": ("corr",),
}

BY_MODALITY = Rule(
    "numbers by modality",
    lambda value: OBJECT.fits(value) and set(value) <= set(MODALITIES) and all(map(MEASURES.fits, value.values())),
)
RESULTS = {
    "config": OBJECT,
    "dataset": {"name": NAME, "synthetic": SWITCH, "sha256": NAME},
    "runs": [
        {
            "seed": COUNT,
            "best_epoch": COUNT,
            "seconds": NUMBER,
            "epochs": Rule("a whole number above 0", lambda value: COUNT.fits(value) and value > 0),
            "valid": MEASURES,
            "test": MEASURES,
            "valid_unimodal": BY_MODALITY,
            "test_unimodal": BY_MODALITY,
        }
    ],
    "mean": MEASURES,
    "std": MEASURES,
}


def load_experiment(folder: Path) -> dict[str, Any]:
    """The contents of results.json in the folder of an experiment.

    Raises:
        ValueError: If it is not one.
        OSError: If it cannot be read.
    """
    path = Path(folder) / "results.json"
    results = read_json(path)
    for key in ("config", "dataset", "runs", "mean", "std"):
        if not isinstance(results, dict) or key not in results:
            raise ValueError(f"{path}: expected the results of `train`, got a file without {key!r}")
    check_layout(results, RESULTS, str(path))
    runs, names = results["runs"], results["mean"].keys()
    if not runs:
        raise ValueError(f"{path}: runs: expected at least one, got none")
    columns = PAPER_COLUMNS if "acc7" in names else SIMS_COLUMNS
    if not {name for column in columns.values() for name in column} <= names:
        raise ValueError(f"{path}: mean: expected the metrics of a score, got {shown(list(names))}")
    for entry in (*runs, {"std": results["std"]}):
        measured = [entry[key] for key in ("valid", "test", "std") if key in entry]
        measured += [*entry.get("valid_unimodal", {}).values(), *entry.get("test_unimodal", {}).values()]
        if any(metrics.keys() != names for metrics in measured):
            raise ValueError(f"{path}: expected the same metrics in each place, got others in {shown(entry)}")
    seeds = [entry["seed"] for entry in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: runs: expected each seed once, got {shown(seeds)}")
    return results


def read_epochs(out: Path) -> dict[int, list[dict[str, Any]]]:
    """The records of metrics.jsonl by seed; none if there is no such file."""
    path = out / "metrics.jsonl"
    records: dict[int, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        where = f"{path}: expected a record of an epoch in line {number}"
        record = parse_json(line, where)
        check_layout(record, {"seed": COUNT}, where)
        records.setdefault(record["seed"], []).append(record)
    return records


def read_predictions(out: Path) -> dict[int, list[list[str]]]:
    """The rows of predictions.csv by seed; none if there is no such file."""
    path = out / "predictions.csv"
    rows: dict[int, list[list[str]]] = {}
    if not path.exists():
        return rows
    content = path.read_bytes()
    try:
        reader = csv.reader(io.StringIO(content.decode("utf-8"), newline=""))
        if tuple(next(reader, ())) != PREDICTION_COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(PREDICTION_COLUMNS)}")
        for row in reader:
            if not is_prediction(row):
                got = ",".join(row)[:60]
                raise ValueError(f"{path}: expected a prediction in line {reader.line_num}, got {got!r}")
            rows.setdefault(int(row[0]), []).append(row)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: expected UTF-8 in line {line}, got the byte {content[error.start]:#x}") from error
    except csv.Error as error:
        raise ValueError(f"{path}: expected a CSV file, got {error} in line {reader.line_num}") from error
    return rows


def is_prediction(row: list[str]) -> bool:
    """Whether a row of predictions.csv is whole; a branch may have no score."""
    if len(row) != len(PREDICTION_COLUMNS) or row[1] not in ("valid", "test"):
        return False
    try:
        numbers = [float(value) for value in (*row[3:5], *filter(None, row[5:]))]
        return int(row[0]) >= 0 and is_plain(row[2]) and all(map(is_number, numbers))
    except ValueError:
        return False


def load_predictions(folder: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """The predictions of an experiment: `[seed][split][column]`.

    The column "id" is a list of strings, the others are float64 arrays (n,), NaN where a branch has no prediction.
    """
    loaded: dict[int, dict[str, dict[str, Any]]] = {}
    for seed, rows in read_predictions(Path(folder)).items():
        loaded[seed] = {}
        for split in ("valid", "test"):
            chosen = [dict(zip(PREDICTION_COLUMNS, row, strict=True)) for row in rows if row[1] == split]
            loaded[seed][split] = {"id": [row["id"] for row in chosen]} | {
                name: np.array([float(row[name] or "nan") for row in chosen]) for name in PREDICTION_COLUMNS[3:]
            }
    return loaded


def read_steps(path: Path) -> list[dict[str, float]]:
    """The terms of the loss and the fusion factors by optimiser step; empty if there is no such file."""
    if not path.is_file():
        return []
    records = []
    for line in read_table(path)[1]:
        try:
            records.append({name: float(value) for name, value in line.items()})
        except ValueError as error:
            raise ValueError(f"{path}: expected a table of numbers: {reason(error)}") from error
        if not all(map(is_number, records[-1].values())):
            raise ValueError(f"{path}: expected a table of finite numbers, got {shown(line)}")
    return records


def read_representations(path: Path, ids: list[str]) -> dict[str, np.ndarray] | None:
    """Fused representations of the test fold, which has these ids; None if there is no such file."""
    if not path.is_file():
        return None
    arrays = read_npz(path)
    for name, kind, ndim in (("features", "f", 2), ("initial", "f", 2), ("scores", "f", 1), ("ids", "U", 1)):
        if name not in arrays:
            raise ValueError(f"{path}: expected an array {name!r}, got {key_names(arrays)}")
        array = arrays[name]
        if array.dtype.kind != kind or array.ndim != ndim or len(array) != len(ids) or 0 in array.shape:
            expected = f"{name} of {len(ids)} utterances, {ndim}-dimensional, of kind {kind!r}"
            raise ValueError(f"{path}: expected {expected}, got {array.dtype} of shape {array.shape}")
        if kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or infinite ones")
    if arrays["ids"].tolist() != ids:
        raise ValueError(f"{path}: ids: expected the test utterances of predictions.csv, got others")
    return arrays
