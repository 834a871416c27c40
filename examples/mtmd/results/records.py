"""What an experiment leaves in its folder: results, epochs, predictions, steps. Others read it with distrust."""

import csv
import importlib.metadata
import io
import itertools
import json
import math
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtmd.data.fold import Dataset, Fold
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
from mtmd.files.writing import finite_or_none, replacing, write_rows, write_text
from mtmd.results.metrics import columns_of, mean_and_std
from mtmd.settings.config import MODALITIES, Config
from mtmd.train import Run

PREDICTION_COLUMNS = ("seed", "split", "id", "target", "score", *MODALITIES)

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
    if not {name for column in columns_of(names).values() for name in column} <= names:
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


# Writing


@dataclass
class Finished:
    """What a folder holds of each seed that is done."""

    runs: dict[int, dict[str, Any]] = field(default_factory=dict)  # entries of results.json
    epochs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # lines of metrics.jsonl
    predictions: dict[int, list[list[Any]]] = field(default_factory=dict)  # rows of predictions.csv


def run_entry(run: Run) -> dict[str, Any]:
    """A seed in results.json."""
    return finite_or_none(
        {
            "seed": run.seed,
            "test": run.metrics["test"],
            "valid": run.metrics["valid"],
            "test_unimodal": run.unimodal_metrics["test"],
            "valid_unimodal": run.unimodal_metrics["valid"],
            "best_epoch": run.best_epoch,
            "epochs": len(run.epochs),
            "seconds": run.seconds,
            "precision": ", then ".join(run.precisions),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
    )


def summarise(config: Config, dataset: Dataset, finished: Finished) -> dict[str, Any]:
    """The contents of results.json. Accuracies and F1 are shares of 1; null stands for NaN."""
    seeds = [*config.seeds, *(seed for seed in finished.runs if seed not in config.seeds)]
    runs = [finished.runs[seed] for seed in seeds if seed in finished.runs]
    mean, std = mean_and_std([run["test"] for run in runs])
    return {
        "config": {**config.as_json(), "seeds": seeds},
        "dataset": {"name": dataset.name, "synthetic": dataset.synthetic, "sha256": dataset.fingerprint},
        "runs": runs,
        "mean": mean,
        "std": std,
    }


def versions() -> dict[str, str]:
    """Of what the numbers came out of, as far as it is installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("momentum-distill", "torch", "transformers", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_epochs(out: Path, finished: Finished) -> None:
    lines = [json.dumps(record, allow_nan=False) for records in finished.epochs.values() for record in records]
    write_text(out / "metrics.jsonl", "".join(line + "\n" for line in lines))


def prediction_rows(run: Run, folds: dict[str, Fold]) -> list[list[Any]]:
    """The lines of predictions.csv; a branch's score is empty where there is none."""
    rows = []
    for split in ("valid", "test"):
        fold, none = folds[split], np.full(len(folds[split]), math.nan)
        branches = [run.unimodal_predictions[split].get(name, none) for name in MODALITIES]
        columns = zip(fold.ids, fold.scores, run.predictions[split], *branches, strict=True)
        for name, *values in columns:
            rows.append([run.seed, split, name, *("" if math.isnan(value) else float(value) for value in values)])
    return rows


def write_predictions(out: Path, finished: Finished) -> None:
    rows = itertools.chain.from_iterable(finished.predictions.values())
    write_rows(out / "predictions.csv", [PREDICTION_COLUMNS, *rows])


def write_steps(path: Path, steps: list[dict[str, float]]) -> None:
    write_rows(
        path, [["step", *steps[0]], *([number, *record.values()] for number, record in enumerate(steps, start=1))]
    )


def write_representations(path: Path, run: Run, fold: Fold) -> None:
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **run.representations, scores=fold.scores, ids=np.array(fold.ids, dtype=np.str_))
