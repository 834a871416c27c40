"""Train MTMD (Lin and Hu, IEEE TAFFC 2023) on CMU-MOSI, or on data made here, with the blocks of momentum_distill.

    python examples/mtmd_mosi.py
        the synthetic set, about a minute on two CPU cores
    python examples/mtmd_mosi.py --data mosi.pkl --text-encoder bert-base-uncased --seeds 1111 1112 1113 1114 1115
        a pickle in MMSA's layout, five runs, the text encoder by name or local directory

Writes results.json, metrics.jsonl, predictions.csv, figures and a checkpoint per seed to --out. The model and what it
minimises stand in mtmd/model.py and mtmd/objective.py; how the paper is read, in docs/paper_map.md.
"""

import csv
import json
import math
import sys
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mtmd.config import Config, parse_config
from mtmd.data import Dataset, load_mmsa
from mtmd.plots import plot_factors, plot_losses
from mtmd.synthetic import synthetic_dataset
from mtmd.training import Run, finite_or_none, prediction_rows, prepare, save_checkpoint, train

METRICS = ("acc7", "acc5", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr")


def main(arguments: list[str] | None = None) -> int:
    config = parse_config(arguments, __doc__ or "")
    console = Console()
    try:
        run_all(config, console)
    except (ValueError, OSError) as error:  # wrong data or settings: one line, no traceback
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    return 0


def run_all(config: Config, console: Console) -> None:
    """All seeds, then the table and the files."""
    dataset = load_data(config)
    for note in dataset.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    folds, standardizer = prepare(dataset, config)
    device = choose_device(config.device)
    config.out.mkdir(parents=True, exist_ok=True)
    title = describe(dataset, config)
    sizes = ", ".join(f"{len(fold)} {name}" for name, fold in folds.items())
    console.print(f"{title}: {sizes}; training on {device}", markup=False, highlight=False)

    runs: list[Run] = []
    steps = math.ceil(len(folds["train"]) / config.batch_size) * config.epochs
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, open_text(config, "metrics.jsonl") as log:
        for seed in config.seeds:
            bar = progress.add_task(f"seed {seed}", total=steps)

            def on_step(record: dict[str, float], bar: Any = bar, seed: int = seed) -> None:
                progress.update(bar, advance=1, description=f"seed {seed} loss {record['total']:.3f}")

            def on_epoch(record: dict[str, Any]) -> None:
                log.write(json.dumps(finite_or_none(record)) + "\n")
                log.flush()

            run = train(config, folds, dataset.widths, seed, device, on_step, on_epoch)
            progress.update(bar, completed=steps, description=f"seed {seed} best epoch {run.best_epoch}")
            save_checkpoint(config.out / f"checkpoint_seed{seed}", run, config, standardizer, dataset)
            plot_losses(run.steps, config.out / f"losses_seed{seed}.png", title=f"{title}, seed {seed}")
            plot_factors(run.steps, config.out / f"fusion_factors_seed{seed}.png", title=f"{title}, seed {seed}")
            runs.append(run)

    with open_text(config, "predictions.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "split", "id", "target", "score"])
        for run in runs:
            writer.writerows(prediction_rows(run, folds))
    results = summarise(config, dataset, runs)
    with open_text(config, "results.json") as file:
        file.write(json.dumps(results, indent=2, allow_nan=False) + "\n")
    console.print(results_table(title, results))
    console.print(
        f"Results, predictions, figures and checkpoints: {config.out.resolve()}", markup=False, soft_wrap=True
    )


def load_data(config: Config) -> Dataset:
    """The file, or the embedded synthetic set."""
    if config.data is None:
        return synthetic_dataset()
    return load_mmsa(config.data, name=config.dataset)


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device that is there, got cuda without a CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe(dataset: Dataset, config: Config) -> str:
    """What was trained on what, for titles: synthetic numbers are called so."""
    return "MTMD on synthetic data (not CMU-MOSI)" if dataset.synthetic else f"MTMD on {config.dataset.upper()}"


def open_text(config: Config, name: str) -> Any:
    return (config.out / name).open("w", encoding="utf-8", newline="")


def summarise(config: Config, dataset: Dataset, runs: list[Run]) -> dict[str, Any]:
    """The contents of results.json. Accuracies and F1 are shares of 1; null stands for NaN."""
    per_metric = {name: np.array([run.metrics["test"][name] for run in runs]) for name in METRICS}
    return finite_or_none(
        {
            "config": config.as_json(),
            "dataset": {"name": dataset.name, "synthetic": dataset.synthetic, "sha256": dataset.fingerprint},
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            "runs": [
                {
                    "seed": run.seed,
                    "test": run.metrics["test"],
                    "valid": run.metrics["valid"],
                    "best_epoch": run.best_epoch,
                    "epochs": len(run.epochs),
                    "seconds": run.seconds,
                }
                for run in runs
            ],
            "mean": {name: float(values.mean()) for name, values in per_metric.items()},
            # Sample standard deviation (ddof 1); null with one run, which has no spread.
            "std": {name: float(values.std(ddof=1)) if len(runs) > 1 else None for name, values in per_metric.items()},
        }
    )


def results_table(title: str, results: dict[str, Any]) -> Table:
    """Test metrics by seed, with mean and spread below, in the order of the paper's tables."""
    table = Table(
        title=f"{title}: test fold",
        caption="Epoch chosen on validation MAE. Accuracies and F1 in percent;\n"
        "Acc2 and F1: negative/non-negative, then negative/positive",
    )
    table.add_column("seed")
    for heading in ("Acc7", "Acc5", "Acc2", "F1", "MAE", "Corr"):
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(metrics: dict[str, float | None]) -> list[str]:
        def show(name: str) -> str:
            value = metrics[name]
            if value is None:
                return "-"
            return f"{value:.3f}" if name in ("mae", "corr") else f"{100 * value:.1f}"

        pairs = [f"{show(name + '_has0')} / {show(name + '_non0')}" for name in ("acc2", "f1")]
        return [show("acc7"), show("acc5"), *pairs, show("mae"), show("corr")]

    for run in results["runs"]:
        table.add_row(str(run["seed"]), *cells(run["test"]))
    if len(results["runs"]) > 1:
        table.add_section()
        table.add_row("mean", *cells(results["mean"]))
        table.add_row("std", *cells(results["std"]))
    return table


if __name__ == "__main__":
    sys.exit(main())
