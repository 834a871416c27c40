"""A run that is saved as it goes, goes on after a kill with the same bits, and is shared among processes.

The steps are those of train.py. What is added: a folder with the state of the run; several processes, each with its
rows of every batch, of which the first alone scores and talks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtmd.data.fold import Fold, data_sha256
from mtmd.results.metrics import msa_metrics
from mtmd.results.scores import Measure
from mtmd.runs.devices import deterministic_mode
from mtmd.runs.processes import from_leader, in_parallel, leads, place
from mtmd.runs.resume import restore_training, save_training
from mtmd.runs.states import remove_states
from mtmd.settings.config import Config
from mtmd.train import Run, Training, begin, derived_seed, end_epoch, finish, groups, train_step, validate


def train_and_save(
    config: Config,
    folds: dict[str, Fold],
    widths: dict[str, int],
    seed: int,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None] = lambda _: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    state_dir: Path,
    on_note: Callable[[str], None] = print,
    metrics: Measure = msa_metrics,
) -> Run:
    """`mtmd.train.train`, with the state of the run in a folder. All processes call it; only the leader's run is whole.

    Args, beside those of `train`:
        on_step: Gets the terms of Eq. 18 and the fusion factors of each step.
        on_epoch: Gets the record of each epoch. In a run that goes on, both get first what was restored.
        state_dir: Where to save the state of the run, at each epoch's end and every `config.save_every` steps. With
            `config.resume` a run goes on from what is there; without, what is there is deleted.
        on_note: Is told, in a line, where the run goes on and which files are damaged.

    Raises:
        FloatingPointError: If the loss or a prediction is not finite.
        ValueError: If the state is one of other settings or data.
    """
    with deterministic_mode(config.deterministic):
        training = shared(begin(config, folds, widths, seed, device, metrics))
        run = training.run
        identity = {"config": config.identity(), "seed": seed, "data": data_sha256(folds)}
        if not config.resume:
            if leads():
                remove_states(state_dir)
        elif restore_training(state_dir, training, identity, on_note):
            on_note(f"seed {seed} goes on in epoch {training.epoch}, after step {len(run.steps)}")
            for records, tell in ((run.steps, on_step), (run.epochs, on_epoch)):
                for record in records:
                    tell(record)

        while training.goes_on:
            for group in groups(training, place()):
                on_step(train_step(training, group))
                if config.save_every and len(run.steps) % config.save_every == 0:
                    save_training(state_dir, training, identity)
            mae = 0.0
            if leads():
                mae = validate(training)
                on_epoch(run.epochs[-1])
            end_epoch(training, from_leader(mae))  # all stop at the same epoch
            save_training(state_dir, training, identity)
        return finish(training) if leads() else run


def shared(training: Training) -> Training:
    """The training as one of several processes does it, or alone."""
    rank, processes = place()
    if processes > 1:
        training.step_module = in_parallel(training.step_module)
    if rank:  # all have the same weights, but not the same dropout
        torch.manual_seed(derived_seed(training.run.seed, rank, "rank"))
    return training
