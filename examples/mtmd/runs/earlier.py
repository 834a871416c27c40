"""What an earlier experiment left in a folder: its finished seeds are gone on with, or it is cleared away."""

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtmd.data.fold import Dataset, Fold
from mtmd.files.reading import read_json
from mtmd.files.tensors import pair
from mtmd.files.writing import file_sha256
from mtmd.results.records import Finished, load_experiment, read_epochs, read_predictions
from mtmd.runs.resume import compare_configs
from mtmd.runs.states import remove_states
from mtmd.settings.config import Config

SEED_FILES = ("checkpoint", "steps", "representations", "losses", "fusion_factors")  # begin so, then _seedS


def read_finished(config: Config, dataset: Dataset, on_note: Callable[[str], None]) -> Finished:
    """The seeds in `config.out` that need not be trained again: of the same settings and data, with all their files.

    `on_note` is told of the seeds that have to be, and of the file that is to blame.
    """
    finished = Finished()
    path = config.out / "results.json"
    if not path.exists():
        return finished
    results = load_experiment(config.out)
    compare_configs(path, Config.from_values(results["config"], source=str(path)).identity(), config.identity())
    if results["dataset"]["sha256"] != dataset.fingerprint:
        raise ValueError(f"--resume: expected the data of {path}, got other data; choose another --out")
    epochs, predictions = read_epochs(config.out), read_predictions(config.out)
    for entry in results["runs"]:
        seed = entry["seed"]
        fault = find_fault(config.out, entry, epochs.get(seed, []), predictions.get(seed, []), dataset.folds)
        if fault is not None:
            outcome = "is trained again" if seed in config.seeds else "is left out"
            on_note(f"seed {seed} was finished before, but {outcome}: {fault}")
            continue
        finished.runs[seed], finished.epochs[seed] = entry, epochs[seed]
        finished.predictions[seed] = predictions[seed]
        remove_states(config.out / f"state_seed{seed}")
    return finished


def find_fault(
    out: Path, entry: dict[str, Any], epochs: list[Any], predictions: list[list[str]], folds: dict[str, Fold]
) -> str | None:
    """What is wrong with the files of a finished seed, and with which of them; None where nothing is."""
    seed = entry["seed"]
    weights, description = pair(out / f"checkpoint_seed{seed}")
    for file in (weights, description, out / f"steps_seed{seed}.csv", out / f"representations_seed{seed}.npz"):
        if not file.exists():
            return f"{file}: expected a file, found none"
    try:
        about = read_json(description)
    except ValueError as error:
        return str(error)
    if not isinstance(about, dict) or about.get("sha256") != file_sha256(weights):
        return f"{weights}: expected the file that {description.name} describes, got another (SHA-256 differs)"
    if len(epochs) != entry["epochs"]:
        return f"{out / 'metrics.jsonl'}: expected {entry['epochs']} epochs of the seed, got {len(epochs)}"
    for split in ("valid", "test"):
        rows = sum(row[1] == split for row in predictions)
        if rows != len(folds[split]):
            return f"{out / 'predictions.csv'}: expected {len(folds[split])} {split} rows of the seed, got {rows}"
    return None


def files_of_earlier(out: Path) -> list[Path]:
    """The files that an earlier experiment has left."""
    if not out.is_dir():
        return []
    own = re.compile(rf"({'|'.join(SEED_FILES)})_seed\d+\.\w+")
    # results.json goes first: while it has a seed, that seed is finished.
    files = [out / name for name in ("results.json", "metrics.jsonl", "predictions.csv") if (out / name).exists()]
    return files + [path for path in sorted(out.iterdir()) if own.fullmatch(path.name)]


def states_of_earlier(out: Path) -> list[Path]:
    """The folders of its seeds that were not finished."""
    return [path for path in sorted(out.glob("state_seed*")) if path.is_dir()]


def clear(out: Path) -> None:
    """Forget an earlier experiment, so that nothing of it is taken for part of the one that begins.

    What may fail comes before the files of finished seeds go.
    """
    files = files_of_earlier(out)
    for path in files:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, "Is a directory, and nothing is deleted", str(path))
    for folder in states_of_earlier(out):
        remove_states(folder)
    for path in files:
        path.unlink()
