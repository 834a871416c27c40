"""One run from a seed: train, choose the epoch on validation MAE, score the test fold once.

Given a folder for its state, a run that was killed goes on from where it was saved and ends with the same bits.
"""

import copy
import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import momentum_distill as md
from mtmd.data.batches import Batch, batches
from mtmd.data.fold import Dataset, Fold, drop_modalities, presence
from mtmd.data.needs import as_read
from mtmd.data.scaling import Standardizer
from mtmd.model import MTMD
from mtmd.objective import Objective
from mtmd.results.metrics import msa_metrics
from mtmd.runs.devices import check_compiler, deterministic_mode, precision_of
from mtmd.runs.processes import from_leader, in_parallel, leads, place
from mtmd.runs.resume import (
    fingerprint,
    restore_training,
    save_training,
)
from mtmd.runs.states import remove_states
from mtmd.settings.config import Config

WARM_UP = 0.1  # share of the steps of a cosine schedule in which the rates rise

Metrics = dict[str, float]


@dataclass
class Run:
    """What a seed gave."""

    seed: int
    model: MTMD
    best_epoch: int = 0
    seconds: float = 0.0
    precisions: list[str] = field(default_factory=list)  # what it was trained in, in order; evaluation is in float32
    epochs: list[dict[str, Any]] = field(default_factory=list)  # one record of metrics.jsonl each
    steps: list[dict[str, float]] = field(default_factory=list)  # the terms of Eq. 18 and the fusion factors
    predictions: dict[str, np.ndarray] = field(default_factory=dict)  # fused scores of valid and test
    metrics: dict[str, Metrics] = field(default_factory=dict)  # of valid and test
    # The same of each branch, by fold and modality; scores are NaN where a sample misses the modality.
    unimodal_predictions: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    unimodal_metrics: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    # Fused representations of the test fold (n, d_f): "features" at the chosen epoch, "initial" before any training.
    representations: dict[str, np.ndarray] = field(default_factory=dict)


class Scores(NamedTuple):
    """What a model says about a fold of n samples, in its order."""

    fused: np.ndarray  # (n,) float32
    unimodal: dict[str, np.ndarray]  # by modality (n,) float32, NaN where a sample misses it
    features: np.ndarray  # fused representations, (n, d_f) float32


def prepare(dataset: Dataset, config: Config) -> tuple[dict[str, Fold], Standardizer]:
    """The folds as the model reads them: features standardised with training statistics, texts as tokens.

    Raises:
        DataError: If the model cannot be trained on them; see needs.py.
        ValueError: If the text encoder is none.
    """
    folds = as_read(dataset.folds, config, str(config.data or dataset.name))
    standardizer = Standardizer.fit(dataset.folds["train"])
    return {name: standardizer.apply(fold) for name, fold in folds.items()}, standardizer


@dataclass
class Training:
    """A run while it is under way: all that training changes."""

    run: Run
    objective: Objective
    step_module: nn.Module  # model and objective in one, under DDP where there are several processes
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    steps_per_epoch: int
    precision: str
    epoch: int = 1
    step: int = 0  # optimiser steps made in this epoch
    average: md.EMAWrapper | None = None  # of the model, where one is asked for: validated and kept in its place
    best_mae: float = math.inf
    best_weights: dict[str, Tensor] | None = None

    @property
    def kept(self) -> MTMD:
        """What is validated, and in the end the model."""
        return self.run.model if self.average is None else self.average.module


def train(
    config: Config,
    folds: dict[str, Fold],
    widths: dict[str, int],
    seed: int,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    *,
    state_dir: Path | None = None,
    on_note: Callable[[str], None] = print,
    metrics: Callable[[np.ndarray, np.ndarray], Metrics] = msa_metrics,
) -> Run:
    """Train one model; its weights at the end are those of the epoch with the lowest validation MAE.

    Args:
        config: The settings.
        folds: What `prepare` made.
        widths: Feature width of each modality.
        seed: Of weights, order, dropout and dropped modalities.
        device: Where to train.
        on_step: Gets the terms of Eq. 18 and the fusion factors of each step.
        on_epoch: Gets the record of each epoch. In a run that goes on, both get first what was restored.
        state_dir: Where to save the state of the run, at each epoch's end and every `config.save_every` steps. With
            `config.resume` a run goes on from what is there; without, what is there is deleted.
        on_note: Is told, in a line, where the run goes on and which files are damaged.
        metrics: Compares scores with targets; must give "mae", by which the epoch is chosen.

    Raises:
        FloatingPointError: If the loss or a prediction is not finite.
        ValueError: If the state is one of other settings or data.
    """
    with deterministic_mode(config.deterministic):
        started = time.perf_counter()
        training = begin(config, folds, widths, seed, device)
        run = training.run
        identity = {"config": config.identity(), "seed": seed, "data": fingerprint(folds) if state_dir else None}

        def save() -> None:
            if state_dir is not None:  # asks the other processes for their random states
                run.seconds = time.perf_counter() - started
                save_training(state_dir, training, identity, device)

        if state_dir is not None and not config.resume:
            if leads():
                remove_states(state_dir)
        elif state_dir is not None and restore_training(state_dir, training, identity, device, on_note):
            on_note(f"seed {seed} goes on in epoch {training.epoch}, after step {len(run.steps)}")
            started -= run.seconds
            for records, tell in ((run.steps, on_step), (run.epochs, on_epoch)):
                for record in records if tell is not None else []:
                    tell(record)

        while training.epoch <= min(config.epochs, run.best_epoch + config.patience):
            for record in epoch_steps(training, config, folds["train"], device):
                if on_step is not None:
                    on_step(record)
                if config.save_every and len(run.steps) % config.save_every == 0:
                    save()

            mae = math.nan
            if leads():
                scores = score_fold(training.kept, folds["valid"], config.batch_size, device)
                check_finite(scores, folds["valid"], f"seed {seed}, epoch {training.epoch}")
                valid = metrics(scores.fused, folds["valid"].scores)
                records = run.steps[-training.steps_per_epoch :]
                run.epochs.append(
                    {
                        "seed": seed,
                        "epoch": training.epoch,
                        "seconds": time.perf_counter() - started,
                        **{name: float(np.mean([record[name] for record in records])) for name in records[0]},
                        "valid": valid,
                        "valid_unimodal": unimodal_metrics(scores, folds["valid"], metrics),
                    }
                )
                if on_epoch is not None:
                    on_epoch(run.epochs[-1])
                mae = valid["mae"]
            mae = from_leader(mae)  # all stop at the same epoch
            if mae < training.best_mae:
                training.best_mae, run.best_epoch = mae, training.epoch
                training.best_weights = copy.deepcopy(training.kept.state_dict())
            training.epoch, training.step = training.epoch + 1, 0
            save()

        run.model.load_state_dict(training.best_weights)
        for name in ("valid", "test") if leads() else ():
            scores = score_fold(run.model, folds[name], config.batch_size, device)
            check_finite(scores, folds[name], f"seed {seed}, {name} fold, epoch {run.best_epoch}")
            run.predictions[name], run.unimodal_predictions[name] = scores.fused, scores.unimodal
            run.metrics[name] = metrics(scores.fused, folds[name].scores)
            run.unimodal_metrics[name] = unimodal_metrics(scores, folds[name], metrics)
            run.representations["features"] = scores.features  # in the end those of the test fold
        run.seconds = time.perf_counter() - started
        return run


def begin(config: Config, folds: dict[str, Fold], widths: dict[str, int], seed: int, device: torch.device) -> Training:
    """Model, objective, optimiser and schedule before the first step."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global state, for whatever uses it
    torch.manual_seed(seed)
    model = MTMD(config, widths).to(device)
    objective = Objective(config, model).to(device)
    run = Run(seed, model)
    if leads():
        run.representations["initial"] = score_fold(model, folds["test"], config.batch_size, device).features
    else:  # all have the same weights, but not the same dropout
        torch.manual_seed(derived_seed(seed, place()[0], "rank"))

    groups = model.parameter_groups(config)
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]  # the temperature
    if learned:
        groups.append({"params": learned, "lr": config.other_lr})
    optimizer = torch.optim.Adam(groups)
    steps_per_epoch = math.ceil(math.ceil(len(folds["train"]) / config.batch_size) / config.accumulate)
    schedule = make_schedule(optimizer, config, steps_per_epoch * config.epochs)
    if config.compile:
        check_compiler(device)
        model.compile()
    step_module: nn.Module = Step(model, objective)
    if place()[1] > 1:
        step_module = in_parallel(step_module)
    average = md.EMAWrapper(model, decay=config.average) if config.average else None
    precision = precision_of(config, device)
    return Training(run, objective, step_module, optimizer, schedule, steps_per_epoch, precision, average=average)


class Step(nn.Module):
    """The loss of a batch in one forward pass, which is what DDP wraps."""

    def __init__(self, model: MTMD, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch)


def epoch_steps(training: Training, config: Config, fold: Fold, device: torch.device) -> Iterator[dict[str, float]]:
    """Make the steps of an epoch that are left, one for each record that is asked for.

    Order and dropped modalities follow from seed and epoch, so that an epoch can be taken up in its middle.
    """
    run, seed = training.run, training.run.seed
    run.model.train()
    rates = {name: getattr(config, f"drop_{name}") for name in run.model.modalities}
    if any(rates.values()):
        fold = drop_modalities(fold, rates, derived_seed(seed, training.epoch, "drop"))
    order = torch.Generator().manual_seed(derived_seed(seed, training.epoch, "order"))
    stream = batches(fold, config.batch_size, generator=order, device=device, place=place())
    stream = itertools.islice(stream, training.step * config.accumulate, None)
    while group := list(itertools.islice(stream, config.accumulate)):
        record = train_step(training, group, config, device)
        training.schedule.step()
        if not math.isfinite(record["total"]):
            raise FloatingPointError(
                f"seed {seed}, epoch {training.epoch}, step {len(run.steps) + 1}: expected a finite loss, got "
                f"{record['total']}; lower learning rates or a smaller --clip may help"
            )
        run.steps.append(record)
        training.step += 1
        if run.precisions[-1:] != [training.precision]:
            run.precisions.append(training.precision)
        yield record


def train_step(training: Training, group: list[Batch], config: Config, device: torch.device) -> dict[str, float]:
    """One optimiser step on a group of batches, each with the weight of its samples; the mean terms."""
    model, objective, optimizer = training.run.model, training.objective, training.optimizer
    samples = sum(batch.total for batch in group)
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for batch in group:
        share = batch.total / samples
        last = batch is group[-1] or place()[1] == 1
        with nullcontext() if last else training.step_module.no_sync():  # gradients travel once per optimiser step
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
                loss, terms = training.step_module(batch)
            (loss * share).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.float() * share
    if config.clip:
        learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(learned, config.clip)
    optimizer.step()
    objective.after_step(model)
    if training.average is not None:
        training.average.update(model)

    # One transfer for all terms: each one that waits for the device costs a step its head start.
    record = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    if "feat" in objective.gammas:
        record["temperature"] = objective.contrast.temperature.item()
    if model.fusion is not None and model.fusion.factors is not None:
        record |= {f"factor_{name}": value for name, value in model.fusion.factors.factors().items()}
    return record


def make_schedule(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Factor of all learning rates by step."""
    warm_up = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed for one thing in one epoch, the same whenever it is asked for."""
    digest = hashlib.sha256(f"{seed} {epoch} {purpose}".encode()).digest()
    return int.from_bytes(digest[:6])


# Scoring


@torch.no_grad()
def score_fold(model: MTMD, fold: Fold, batch_size: int, device: torch.device) -> Scores:
    """Scores of a fold by the fusion and by each branch."""
    model.eval()
    fused, features, unimodal = [], [], {}
    for batch in batches(fold, batch_size, device=device):
        outputs = model.forward(batch)  # not what --compile made: a checkpoint has to give the same numbers
        fused.append(outputs.fused.scores.float().cpu())
        features.append(outputs.fused.features.float().cpu())
        for name, prediction in outputs.unimodal.items():
            scores = torch.where(batch.present[name], prediction.scores.float(), math.nan)
            unimodal.setdefault(name, []).append(scores.cpu())
    return Scores(
        torch.cat(fused).numpy(),
        {name: torch.cat(parts).numpy() for name, parts in unimodal.items()},
        torch.cat(features).numpy(),
    )


def check_finite(scores: Scores, fold: Fold, where: str) -> None:
    """Raise unless every prediction is finite that should be one: a branch has none where its modality is missing."""
    if not np.isfinite(scores.fused).all():
        raise FloatingPointError(f"{where}: a prediction is NaN or infinite")
    there = presence(fold)
    for name, values in scores.unimodal.items():
        if not np.isfinite(values[there[name]]).all():
            raise FloatingPointError(f"{where}: a prediction of the {name} branch is NaN or infinite")


def unimodal_metrics(
    scores: Scores, fold: Fold, metrics: Callable[[np.ndarray, np.ndarray], Metrics]
) -> dict[str, Metrics]:
    """Metrics of each branch over the samples that have its modality; a branch that no sample has is left out."""
    result = {}
    for name, values in scores.unimodal.items():
        there = ~np.isnan(values)
        if there.any():
            result[name] = metrics(values[there], fold.scores[there])
    return result
