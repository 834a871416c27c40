"""MTMD trained from a seed: the epoch chosen on validation MAE, the test fold scored once.

    config = Config(data=Path("mosi.pkl"), text_encoder=DIR)  # of mtmd.settings.config
    dataset = open_dataset(config.data, name="mosi")  # of mtmd.data.own_format
    folds, standardizer = prepare(dataset, config)
    run = train(config, folds, dataset.widths, seed=1, device=torch.device("cpu"))
    print(run.metrics["test"])

Nothing is written here, and nothing can be resumed: runs/training.py makes the same steps, saves them, goes on after a
kill, and shares them among processes.
"""

import copy
import hashlib
import itertools
import math
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import momentum_distill as md
from mtmd.data.batches import Batch, batches
from mtmd.data.fold import Dataset, Fold, drop_modalities
from mtmd.data.needs import as_read
from mtmd.data.scaling import Standardizer
from mtmd.model import MTMD
from mtmd.objective import Objective
from mtmd.results.metrics import msa_metrics
from mtmd.results.scores import Measure, Metrics, check_finite, score_fold, unimodal_metrics
from mtmd.runs.devices import check_compiler, deterministic_mode, precision_of
from mtmd.settings.config import Config

WARM_UP = 0.1  # share of the steps of a cosine schedule in which the rates rise


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


def prepare(dataset: Dataset, config: Config) -> tuple[dict[str, Fold], Standardizer]:
    """The folds as the model reads them: features standardised with training statistics, texts as tokens.

    Raises:
        DataError: If the model cannot be trained on them; see data/needs.py.
        ValueError: If the text encoder is none.
    """
    folds = as_read(dataset.folds, config, str(config.data or dataset.name))
    standardizer = Standardizer.fit(dataset.folds["train"])
    return {name: standardizer.apply(fold) for name, fold in folds.items()}, standardizer


def train(
    config: Config,
    folds: dict[str, Fold],
    widths: dict[str, int],
    seed: int,
    device: torch.device,
    *,
    metrics: Measure = msa_metrics,
) -> Run:
    """Train one model; its weights at the end are those of the epoch with the lowest validation MAE.

    Args:
        config: The settings.
        folds: What `prepare` made.
        widths: Feature width of each modality.
        seed: Of weights, order, dropout and dropped modalities.
        device: Where to train.
        metrics: Compares scores with targets; must give "mae", by which the epoch is chosen.

    Raises:
        FloatingPointError: If the loss or a prediction is not finite.
    """
    with deterministic_mode(config.deterministic):
        training = begin(config, folds, widths, seed, device, metrics)
        while training.goes_on:
            for group in groups(training):
                train_step(training, group)
            end_epoch(training, validate(training))
        return finish(training)


@dataclass
class Training:
    """A run while it is under way."""

    # What it is about
    config: Config
    folds: dict[str, Fold]
    device: torch.device
    metrics: Measure
    precision: str
    started: float  # on the clock of time.perf_counter
    # What training changes
    run: Run
    objective: Objective
    step_module: nn.Module  # model and objective in one
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: md.EMAWrapper | None  # of the model, where one is asked for: validated and kept in its place
    epoch: int = 1
    step: int = 0  # optimiser steps made in this epoch
    best_mae: float = math.inf
    best_weights: dict[str, Tensor] | None = None

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch."""
        return self.epoch <= min(self.config.epochs, self.run.best_epoch + self.config.patience)

    @property
    def kept(self) -> MTMD:
        """What is validated, and in the end the model."""
        return self.run.model if self.average is None else self.average.module


def begin(
    config: Config,
    folds: dict[str, Fold],
    widths: dict[str, int],
    seed: int,
    device: torch.device,
    metrics: Measure = msa_metrics,
) -> Training:
    """Model, objective, optimiser and schedule before the first step."""
    started = time.perf_counter()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global state, for whatever uses it
    torch.manual_seed(seed)
    model = MTMD(config, widths).to(device)
    objective = Objective(config, model).to(device)
    run = Run(seed, model)
    run.representations["initial"] = score_fold(model, folds["test"], config.batch_size, device).representations

    rates = model.parameter_groups(config)
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]  # the temperature
    if learned:
        rates.append({"params": learned, "lr": config.other_lr})
    optimizer = torch.optim.Adam(rates)
    if config.compile:
        check_compiler(device)
        model.compile()
    return Training(
        config,
        folds,
        device,
        metrics,
        precision_of(config, device),
        started,
        run,
        objective,
        Step(model, objective),
        optimizer,
        make_schedule(optimizer, config, steps_per_epoch(config, folds["train"]) * config.epochs),
        md.EMAWrapper(model, decay=config.average) if config.average else None,
    )


class Step(nn.Module):
    """The loss of a batch in one forward pass, for several processes to wrap (DDP)."""

    def __init__(self, model: MTMD, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch)


def groups(training: Training, place: tuple[int, int] = (0, 1)) -> Iterator[list[Batch]]:
    """The batches of each optimiser step that is left in this epoch; `place` is rank and number of processes.

    Order and dropped modalities follow from seed and epoch, so that an epoch can be taken up in its middle.
    """
    config, seed, fold = training.config, training.run.seed, training.folds["train"]
    training.run.model.train()
    rates = {name: getattr(config, f"drop_{name}") for name in training.run.model.modalities}
    if any(rates.values()):
        fold = drop_modalities(fold, rates, derived_seed(seed, training.epoch, "drop"))
    order = torch.Generator().manual_seed(derived_seed(seed, training.epoch, "order"))
    stream = batches(fold, config.batch_size, generator=order, device=training.device, place=place)
    stream = itertools.islice(stream, training.step * config.accumulate, None)
    while group := list(itertools.islice(stream, config.accumulate)):
        yield group


def train_step(training: Training, group: list[Batch]) -> dict[str, float]:
    """One optimiser step on a group of batches, each with the weight of its samples; the mean terms."""
    config, run, objective = training.config, training.run, training.objective
    model, optimizer = run.model, training.optimizer
    samples = sum(batch.total for batch in group)
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for batch in group:
        share = batch.total / samples
        # Where processes share the batches (DDP), gradients travel once per optimiser step.
        with nullcontext() if batch is group[-1] else getattr(training.step_module, "no_sync", nullcontext)():
            with torch.autocast(training.device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
                loss, terms = training.step_module(batch)
            (loss * share).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term.float() * share
    if config.clip:
        learned = [parameter for part in optimizer.param_groups for parameter in part["params"]]
        nn.utils.clip_grad_norm_(learned, config.clip)
    optimizer.step()
    objective.after_step(model)
    if training.average is not None:
        training.average.update(model)
    training.schedule.step()

    # One transfer for all terms: each one that waits for the device costs a step its head start.
    record = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    if "feat" in objective.gammas:
        record["temperature"] = objective.contrast.temperature.item()
    if model.fusion is not None and model.fusion.factors is not None:
        record |= {f"factor_{name}": value for name, value in model.fusion.factors.factors().items()}
    if not math.isfinite(record["total"]):
        raise FloatingPointError(
            f"seed {run.seed}, epoch {training.epoch}, step {len(run.steps) + 1}: expected a finite loss, got "
            f"{record['total']}; lower learning rates or a smaller --clip may help"
        )
    run.steps.append(record)
    training.step += 1
    if run.precisions[-1:] != [training.precision]:
        run.precisions.append(training.precision)
    return record


def validate(training: Training) -> float:
    """The MAE on the validation fold; all else that is known of the epoch is noted as well."""
    run, fold = training.run, training.folds["valid"]
    said = score_fold(training.kept, fold, training.config.batch_size, training.device)
    check_finite(said, f"seed {run.seed}, epoch {training.epoch}")
    valid = training.metrics(said.scores, fold.scores)
    records = run.steps[-steps_per_epoch(training.config, training.folds["train"]) :]
    run.epochs.append(
        {
            "seed": run.seed,
            "epoch": training.epoch,
            "seconds": time.perf_counter() - training.started,
            **{name: float(np.mean([record[name] for record in records])) for name in records[0]},
            "valid": valid,
            "valid_unimodal": unimodal_metrics(said, fold, training.metrics),
        }
    )
    return valid["mae"]


def end_epoch(training: Training, mae: float) -> None:
    """Keep the weights if they are the best so far."""
    if mae < training.best_mae:
        training.best_mae, training.run.best_epoch = mae, training.epoch
        training.best_weights = copy.deepcopy(training.kept.state_dict())
    training.epoch, training.step = training.epoch + 1, 0


def finish(training: Training) -> Run:
    """The best weights, and what they say about the validation and the test fold."""
    run = training.run
    run.model.load_state_dict(training.best_weights)
    for name in ("valid", "test"):
        fold = training.folds[name]
        said = score_fold(run.model, fold, training.config.batch_size, training.device)
        check_finite(said, f"seed {run.seed}, {name} fold, epoch {run.best_epoch}")
        run.predictions[name], run.unimodal_predictions[name] = said.scores, said.branch_scores
        run.metrics[name] = training.metrics(said.scores, fold.scores)
        run.unimodal_metrics[name] = unimodal_metrics(said, fold, training.metrics)
        run.representations["features"] = said.representations  # in the end those of the test fold
    run.seconds = time.perf_counter() - training.started
    return run


def steps_per_epoch(config: Config, fold: Fold) -> int:
    """Optimiser steps."""
    return math.ceil(math.ceil(len(fold) / config.batch_size) / config.accumulate)


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
