"""What the ranks of the tests in test_example_processes.py do."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from mtmd.data.batches import batches
from mtmd.data.fold import data_sha256, drop_modalities
from mtmd.data.synthetic import synthetic_dataset
from mtmd.runs import devices, resume
from mtmd.runs.processes import place
from mtmd.runs.training import shared
from mtmd.settings import cli
from mtmd.settings.config import Config
from mtmd.settings.options import config_from
from mtmd.train import begin, groups, prepare, train_step


def gradients(options: list[str], steps: int) -> tuple[dict[str, Tensor], list[dict[str, float]], list[int]]:
    """The gradients of the first batches added up, the terms of each, and how many rows this process had of them."""
    _, parsed, _ = cli.parse(["train", *options], "")
    config = config_from(parsed)
    dataset = synthetic_dataset(seed=0)
    folds, _ = prepare(dataset, config)
    fold = drop_modalities(folds["train"], {"audio": 0.3, "text": 0.2}, seed=7)
    state = shared(begin(config, folds, dataset.widths, 1, torch.device("cpu")))
    state.run.model.train()
    seen, rows = [], []
    stream = batches(fold, config.batch_size, place=place())
    for _, batch in zip(range(steps), stream, strict=False):
        loss, terms = state.step_module(batch)
        loss.backward()
        state.objective.after_step(state.run.model)
        seen.append({name: float(term) for name, term in terms.items()})
        rows.append(int((batch.labels >= 0).sum()))
    named = [*state.run.model.named_parameters(), *state.objective.named_parameters(prefix="objective")]
    return {name: p.grad for name, p in named if p.grad is not None}, seen, rows


def train_three_steps(options: list[str], folder: str) -> int:
    """Train, save, and say after how many steps."""
    state, identity = _begin(options)
    for _, group in zip(range(3), groups(state, place()), strict=False):
        train_step(state, group)
    resume.save_training(Path(folder), state, identity)
    return len(state.run.steps)


def go_on(options: list[str], folder: str) -> list[object]:
    """Where a restored run goes on, digests of what it holds, and the loss of its next step."""
    state, identity = _begin(options)
    assert resume.restore_training(Path(folder), state, identity, print)
    state.objective.queue.check_in_sync()
    held = [digest(module) for module in (state.run.model, state.objective)]
    record = train_step(state, next(groups(state, place())))
    return [state.epoch, state.step, *held, record["total"]]


def precision(last_can: bool) -> str:
    """What is trained in where rank 1 may have no bfloat16."""
    has = devices.no_bfloat16
    devices.no_bfloat16 = lambda _: "" if last_can or place()[0] == 0 else "none here"
    try:
        return devices.precision_of(Config(amp=True), torch.device("cpu"))
    finally:
        devices.no_bfloat16 = has


def _begin(options: list[str]):
    _, parsed, _ = cli.parse(["train", *options], "")
    config = config_from(parsed)
    dataset = synthetic_dataset(seed=0)
    folds, _ = prepare(dataset, config)
    identity = {"config": config.identity(), "seed": 1, "data": data_sha256(folds)}
    return shared(begin(config, folds, dataset.widths, 1, torch.device("cpu"))), identity


def digest(module: torch.nn.Module) -> str:
    """Of all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(repr((name, tensor.tolist() if isinstance(tensor, Tensor) else tensor)).encode())
    return found.hexdigest()
