"""`train`: all seeds of a configuration into a folder, and what others read from such a folder.

    results.json                    settings, data, metrics of each seed, mean and standard deviation
    metrics.jsonl                   a record per epoch
    predictions.csv                 every prediction on valid and test, of the fusion and of each branch
    steps_seedS.csv                 the terms of the loss and the fusion factors at each step
    representations_seedS.npz       fused representations of the test fold, before training and at the chosen epoch
    checkpoint_seedS.safetensors    the model, described in the .json beside it
    losses_seedS.svg, fusion_factors_seedS.svg
    state_seedS/                    where --resume goes on, while the seed is not finished

A seed is finished when results.json has it; that is written after all its other files.
"""

import argparse
import csv
import errno
import importlib
import importlib.metadata
import io
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mtmd.data.fold import Dataset, Fold
from mtmd.data.needs import check_encoder
from mtmd.data.own_format import open_dataset
from mtmd.data.synthetic import synthetic_dataset
from mtmd.files.reading import read_json
from mtmd.files.tensors import pair
from mtmd.files.writing import check_writable, file_sha256, finite_or_none, replacing, sweep, write_json, write_text
from mtmd.results.metrics import metrics_for
from mtmd.results.plots import plot_factors, plot_losses
from mtmd.results.records import (
    PAPER_COLUMNS,
    PREDICTION_COLUMNS,
    SIMS_COLUMNS,
    load_experiment,
    read_epochs,
    read_predictions,
)
from mtmd.runs.checkpoint import save_checkpoint
from mtmd.runs.devices import check_compiler, choose_device, no_bfloat16, precision_of
from mtmd.runs.processes import from_leader, leads
from mtmd.runs.resume import compare_configs
from mtmd.runs.states import remove_states
from mtmd.runs.training import train_and_save
from mtmd.settings.cli import note
from mtmd.settings.config import MODALITIES, Config
from mtmd.settings.options import add_config_arguments, config_from
from mtmd.train import Run, prepare, steps_per_epoch

SEED_FILES = ("checkpoint", "steps", "representations", "losses", "fusion_factors")  # begin so, then _seedS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `train`: every setting."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace, console: Console) -> None:
    config = config_from(arguments)
    check_before(config, console)
    try:
        run_experiment(config, console)
    except KeyboardInterrupt:
        console.print("stopped; with --resume the same command goes on", style="yellow", highlight=False)
        raise


@dataclass
class Finished:
    """What a folder holds of each seed that is done."""

    runs: dict[int, dict[str, Any]] = field(default_factory=dict)  # entries of results.json
    epochs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # lines of metrics.jsonl
    predictions: dict[int, list[list[Any]]] = field(default_factory=dict)  # rows of predictions.csv


def run_experiment(config: Config, console: Console, *, dataset: Dataset | None = None) -> dict[str, Any]:
    """Train every seed of `config.seeds` that is not finished, and write the files of `config.out`.

    Of several processes the leader does; the others train along and return {}.

    Args:
        config: The settings. An experiment that the folder holds is gone on with if `config.resume` is True, deleted
            if it is False, and refused if it is None.
        console: Where progress and the table go.
        dataset: What to train on, instead of what `config` says.

    Returns:
        The contents of results.json: the seeds asked for and, with `config.resume`, those there before.

    Raises:
        ValueError: If data and settings do not fit, or the folder holds another experiment than the one to go on with.
        FloatingPointError: If a loss or prediction is not finite.
        OSError: If a file cannot be read or written.
    """

    def say(text: str) -> None:
        note(console, text)

    earlier = [*files_of_earlier(config.out), *states_of_earlier(config.out)]
    if leads() and earlier and config.resume is None:
        raise ValueError(
            f"--out: expected a folder without an experiment, got {config.out}, which has {earlier[0].name}; "
            "--resume goes on with it, --no-resume deletes it and begins anew"
        )
    dataset = load_data(config) if dataset is None else dataset
    for text in dataset.notes:
        say(text)
    folds, standardizer = prepare(dataset, config)
    device = choose_device(config.device)
    precision = precision_of(config, device)
    if not leads():
        follow(config, folds, dataset, device)
        return {}
    config.out.mkdir(parents=True, exist_ok=True)
    sweep(config.out)
    finished = Finished()
    if config.resume:
        finished = read_finished(config, dataset, say)
        for seed, entry in finished.runs.items():
            if entry.get("precision", precision) != precision:
                say(f"seed {seed} was trained in {entry['precision']}, those that follow are in {precision}")
    elif earlier:
        clear(config.out)
        say(f"the earlier results in {config.out} are deleted")
    title = describe(dataset)
    sizes = ", ".join(f"{len(fold)} {name}" for name, fold in folds.items())
    console.print(
        f"{title}: {sizes}; training on {device} in {precision}", markup=False, highlight=False, soft_wrap=True
    )

    steps = steps_per_epoch(config, folds["train"]) * config.epochs
    with progress_bars(console) as progress:
        for seed in config.seeds:
            bar = progress.add_task(f"seed {seed}", total=steps)
            if seed in finished.runs:
                progress.update(bar, completed=steps, description=f"seed {seed} was finished before")
                continue
            epochs = finished.epochs[seed] = []

            def on_step(record: dict[str, float], bar: Any = bar, seed: int = seed) -> None:
                progress.update(bar, advance=1, description=f"seed {seed} loss {record['total']:.3f}")

            def on_epoch(record: dict[str, Any], epochs: list[dict[str, Any]] = epochs, seed: int = seed) -> None:
                epochs.append(finite_or_none(record))
                write_epochs(config.out, finished)
                if not console.is_terminal:  # a log, in which bars do not move
                    where = f"seed {seed}, epoch {record['epoch']} of {config.epochs}"
                    mae = f"validation MAE {record['valid']['mae']:.3f}"
                    console.print(f"{where}: loss {record['total']:.3f}, {mae}", highlight=False)

            def on_note(text: str) -> None:
                progress.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

            state_dir = config.out / f"state_seed{seed}"
            from_leader(seed)
            run = train_and_save(
                config,
                folds,
                dataset.widths,
                seed,
                device,
                on_step,
                on_epoch,
                state_dir=state_dir,
                on_note=on_note,
                metrics=metrics_for(dataset.score_range),
            )
            progress.update(bar, completed=steps, description=f"seed {seed} best epoch {run.best_epoch}")
            save_checkpoint(config.out / f"checkpoint_seed{seed}", run, config, standardizer, dataset)
            write_steps(config.out / f"steps_seed{seed}.csv", run.steps)
            write_representations(config.out / f"representations_seed{seed}.npz", run, folds["test"])
            plot_losses(run.steps, config.out / f"losses_seed{seed}.{config.format}")
            plot_factors(run.steps, config.out / f"fusion_factors_seed{seed}.{config.format}")
            finished.predictions[seed] = prediction_rows(run, folds)
            finished.runs[seed] = run_entry(run)
            write_predictions(config.out / "predictions.csv", finished)
            write_json(config.out / "results.json", summarise(config, dataset, finished))
            remove_states(state_dir)

    from_leader(NO_MORE)
    results = finite_or_none(summarise(config, dataset, finished))
    write_json(config.out / "results.json", results)
    console.print(results_table(title, results))
    console.print(branches_line(results), markup=False, highlight=False)
    console.print(
        f"Results, predictions, figures and checkpoints: {config.out.resolve()}", markup=False, soft_wrap=True
    )
    return results


NO_MORE = -1
"""What the leader says in place of a seed when all are done."""


def follow(config: Config, folds: dict[str, Fold], dataset: Dataset, device: torch.device) -> None:
    """Train along with the leader, seed by seed as it goes."""
    while (seed := int(from_leader(NO_MORE))) != NO_MORE:
        train_and_save(
            config,
            folds,
            dataset.widths,
            seed,
            device,
            state_dir=config.out / f"state_seed{seed}",
            on_note=lambda _: None,
        )


# Before training


def check_before(config: Config, console: Console) -> None:
    """Refuse, before any data are read, what cannot be done here; say where it is done in another way.

    Raises:
        ValueError: If the device, the compiler or the folder of the text encoder is not there.
        OSError: If nothing can be written to `config.out`.
    """
    check_writable(config.out, folder=True)
    device = choose_device(config.device)
    if config.compile:
        check_compiler(device)
    check_encoder(config)
    if config.amp and precision_of(config, device) == "float32":
        why = no_bfloat16(device) or "another process cannot"
        note(console, f"--amp: this {device} cannot train the model in bfloat16, it trains in float32 ({why})")


def load_data(config: Config) -> Dataset:
    """The file or folder, or the embedded synthetic set."""
    if config.data is None:
        signal = {name: getattr(config, f"signal_{name}") for name in MODALITIES}
        return synthetic_dataset(seed=config.synthetic_seed, signal=signal, wrong={"text": config.wrong_text})
    return open_dataset(config.data, name=config.dataset)


def describe(dataset: Dataset) -> str:
    """What was trained on what, for titles: synthetic numbers are called so."""
    return "MTMD on synthetic data (not CMU-MOSI)" if dataset.synthetic else f"MTMD on {dataset.name.upper()}"


def read_finished(config: Config, dataset: Dataset, on_note: Callable[[str], None]) -> Finished:
    """The seeds in `config.out` that need not be trained again: of the same settings and data, with all their files.

    `on_note` is told of the seeds that have to be, and of the file that is to blame.
    """
    finished = Finished()
    path = config.out / "results.json"
    if not path.exists():
        return finished
    results = load_experiment(config.out)
    compare_configs(path, Config.from_json(results["config"], source=str(path)).identity(), config.identity())
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


# Files


def versions() -> dict[str, str]:
    """Of what the numbers came out of, as far as it is installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("momentum-distill", "torch", "transformers", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def summarise(config: Config, dataset: Dataset, finished: Finished) -> dict[str, Any]:
    """The contents of results.json. Accuracies and F1 are shares of 1; null stands for NaN."""
    seeds = [*config.seeds, *(seed for seed in finished.runs if seed not in config.seeds)]
    runs = [finished.runs[seed] for seed in seeds if seed in finished.runs]
    names = list(runs[0]["test"])
    missing = float("nan")
    values = {
        name: np.array([missing if run["test"][name] is None else run["test"][name] for run in runs]) for name in names
    }
    return {
        "config": {**config.as_json(), "seeds": seeds},
        "dataset": {"name": dataset.name, "synthetic": dataset.synthetic, "sha256": dataset.fingerprint},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "runs": runs,
        "mean": {name: float(of.mean()) for name, of in values.items()},
        # Sample standard deviation (ddof 1); null with one run, which has no spread.
        "std": {name: float(of.std(ddof=1)) if len(runs) > 1 else None for name, of in values.items()},
    }


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
        }
    )


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


def write_predictions(path: Path, finished: Finished) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PREDICTION_COLUMNS)
    for rows in finished.predictions.values():
        writer.writerows(rows)
    write_text(path, text.getvalue())


def write_steps(path: Path, steps: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *steps[0]])
    writer.writerows([number, *record.values()] for number, record in enumerate(steps, start=1))
    write_text(path, text.getvalue())


def write_representations(path: Path, run: Run, fold: Fold) -> None:
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **run.representations, scores=fold.scores, ids=np.array(fold.ids, dtype=np.str_))


# What is shown


def progress_bars(console: Console) -> Progress:
    """Bars that say how many of how many, and how long yet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def results_table(title: str, results: dict[str, Any]) -> Table:
    """Test metrics by seed, with mean and spread below, in the order of the paper's tables."""
    columns = PAPER_COLUMNS if "acc7" in results["mean"] else SIMS_COLUMNS
    caption = "Epoch chosen on validation MAE. Accuracies and F1 in percent"
    if columns is PAPER_COLUMNS:
        caption += ";\nAcc2 and F1: negative/non-negative, then negative/positive"
    table = Table(title=f"{title}: test fold", caption=caption)
    table.add_column("seed")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(metrics: dict[str, float | None]) -> list[str]:
        def show(name: str) -> str:
            value = metrics[name]
            if value is None:
                return "-"
            return f"{value:.3f}" if name in ("mae", "corr") else f"{100 * value:.1f}"

        return [" / ".join(show(name) for name in names) for names in columns.values()]

    for entry in results["runs"]:
        table.add_row(str(entry["seed"]), *cells(entry["test"]))
    if len(results["runs"]) > 1:
        table.add_section()
        table.add_row("mean", *cells(results["mean"]))
        table.add_row("std", *cells(results["std"]))
    return table


def branches_line(results: dict[str, Any]) -> str:
    """What each branch does alone, as a mean over the seeds."""
    parts = []
    for name in MODALITIES:
        maes = [entry["test_unimodal"][name]["mae"] for entry in results["runs"] if name in entry["test_unimodal"]]
        if maes:
            parts.append(f"{name} {np.mean(maes):.3f}")
    return f"Test MAE of the branches alone: {', '.join(parts) or 'none'}"
