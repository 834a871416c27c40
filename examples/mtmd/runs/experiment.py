"""`train`: all seeds of a configuration into a folder; results/records.py reads what is there.

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
import functools
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mtmd.data.fold import Dataset, Fold
from mtmd.data.needs import check_encoder
from mtmd.data.own_format import open_dataset
from mtmd.data.synthetic import WIDTHS, synthetic_dataset
from mtmd.files.writing import check_writable, finite_or_none, sweep, write_json
from mtmd.results.metrics import metrics_for
from mtmd.results.plots import plot_factors, plot_losses
from mtmd.results.records import (
    Finished,
    prediction_rows,
    run_entry,
    summarise,
    write_epochs,
    write_predictions,
    write_representations,
    write_steps,
)
from mtmd.results.tables import branches_line, results_table
from mtmd.runs.checkpoint import save_checkpoint
from mtmd.runs.devices import check_compiler, choose_device, no_bfloat16, precision_of
from mtmd.runs.earlier import clear, files_of_earlier, read_finished, states_of_earlier
from mtmd.runs.processes import from_leader, leads
from mtmd.runs.states import remove_states
from mtmd.runs.training import train_and_save
from mtmd.settings.cli import note, say
from mtmd.settings.config import Config
from mtmd.settings.options import add_config_arguments, config_from
from mtmd.train import prepare, steps_per_epoch


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

    earlier = [*files_of_earlier(config.out), *states_of_earlier(config.out)]
    if leads() and earlier and config.resume is None:
        raise ValueError(
            f"--out: expected a folder without an experiment, got {config.out}, which has {earlier[0].name}; "
            "--resume goes on with it, --no-resume deletes it and begins anew"
        )
    dataset = load_data(config) if dataset is None else dataset
    for text in dataset.notes:
        note(console, text)
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
        finished = read_finished(config, dataset, functools.partial(note, console))
        for seed, entry in finished.runs.items():
            if entry.get("precision", precision) != precision:
                note(console, f"seed {seed} was trained in {entry['precision']}, those that follow are in {precision}")
    elif earlier:
        clear(config.out)
        note(console, f"the earlier results in {config.out} are deleted")
    title = describe(dataset)
    sizes = ", ".join(f"{len(fold)} {name}" for name, fold in folds.items())
    say(console, f"{title}: {sizes}; training on {device} in {precision}")

    steps = steps_per_epoch(config, folds["train"]) * config.epochs
    with progress_bars(console) as progress:
        for seed in config.seeds:
            bar = progress.add_task(f"seed {seed}", total=steps)
            if seed in finished.runs:
                progress.update(bar, completed=steps, description=f"seed {seed} was finished before")
                continue
            epochs = finished.epochs[seed] = []
            clock: list[float] = []

            def on_step(record: dict[str, float], bar: Any = bar, seed: int = seed, clock: list[float] = clock) -> None:
                progress.update(bar, advance=1, description=f"seed {seed} loss {record['total']:.3f}")
                if not console.is_terminal and len(clock) < FIRST_STEPS:  # a log, in which bars do not move
                    clock.append(time.monotonic())
                    minutes = (clock[-1] - clock[0]) / (FIRST_STEPS - 1) * steps / 60
                    if len(clock) == FIRST_STEPS and minutes > 1:
                        say(console, f"seed {seed}: {config.epochs} epochs will take about {minutes:.0f} minutes")

            def on_epoch(record: dict[str, Any], epochs: list[dict[str, Any]] = epochs, seed: int = seed) -> None:
                epochs.append(finite_or_none(record))
                write_epochs(config.out, finished)
                if not console.is_terminal:
                    where = f"seed {seed}, epoch {record['epoch']} of {config.epochs}"
                    mae = f"validation MAE {record['valid']['mae']:.3f}"
                    console.print(f"{where}: loss {record['total']:.3f}, {mae}", highlight=False)

            def on_note(text: str) -> None:
                say(progress.console, text, "yellow")

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
            write_predictions(config.out, finished)
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


FIRST_STEPS = 4
"""From so many steps a log tells how long a seed will take."""

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
        signal = {name: getattr(config, f"signal_{name}") for name in WIDTHS}
        return synthetic_dataset(seed=config.synthetic_seed, signal=signal, wrong={"text": config.wrong_text})
    return open_dataset(config.data, name=config.dataset)


def describe(dataset: Dataset) -> str:
    """What was trained on what, for titles: synthetic numbers are called so."""
    return "MTMD on synthetic data (not CMU-MOSI)" if dataset.synthetic else f"MTMD on {dataset.name.upper()}"


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
