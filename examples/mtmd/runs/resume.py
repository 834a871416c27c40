"""All that a training changes, put into a state and taken out of it again, to the bit."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import momentum_distill as md
from mtmd.files.tensors import section
from mtmd.runs.processes import from_leader, leads, place
from mtmd.runs.states import load_state, save_state
from mtmd.train import Training


def save_training(folder: Path, training: Training, identity: dict[str, Any]) -> None:
    """Store all that training changes; what is not in here follows from the settings and the seed.

    All processes call it, for each has random numbers of its own; the leader writes.
    """
    run = training.run
    run.seconds = time.perf_counter() - training.started
    weights = {
        "model": run.model.state_dict(),
        "objective": training.objective.state_dict(),
        "best": training.best_weights or {},
        "average": {} if training.average is None else training.average.state_dict(),
    }
    tensors = {f"{part}.{name}": value for part, state in weights.items() for name, value in state.items()}
    values = {
        **identity,
        "position": [training.epoch, training.step],
        "best": [training.best_mae, run.best_epoch],
        "schedule": training.schedule.state_dict(),
        "epochs": run.epochs,
        "steps": run.steps,
        "seconds": run.seconds,
        "precisions": run.precisions,
    }
    pack_optimizer(training.optimizer, tensors, values)
    pack_random(training.device, tensors, values)
    if leads():
        save_state(folder, len(run.steps), tensors, values)


def restore_training(
    folder: Path, training: Training, identity: dict[str, Any], on_note: Callable[[str], None]
) -> bool:
    """Go back to the newest state in the folder; False if there is none."""
    found = load_state(folder, on_note) if leads() else None
    step = int(from_leader(-1 if found is None else len(found[1]["steps"])))  # the others read what the leader left
    if step < 0:
        return False
    found = load_state(folder, on_note) if found is None else found
    if found is None or len(found[1]["steps"]) != step:
        raise ValueError(f"--out: expected a folder that all processes see, got {folder}, where they find other states")
    tensors, values = found
    check_identity(folder, values, identity)
    run = training.run
    run.model.load_state_dict(section(tensors, "model."))
    training.objective.load_state_dict(section(tensors, "objective."))
    if training.average is not None:
        training.average.load_state_dict(section(tensors, "average."))
    training.best_weights = {
        name: value.to(training.device) for name, value in section(tensors, "best.").items()
    } or None
    training.schedule.load_state_dict(values["schedule"])
    unpack_optimizer(training.optimizer, tensors, values)
    training.epoch, training.step = values["position"]
    training.best_mae, run.best_epoch = values["best"]
    run.epochs, run.steps, run.seconds = values["epochs"], values["steps"], values["seconds"]
    run.precisions = values.get("precisions") or ["bfloat16" if values["config"]["amp"] else "float32"]  # as of 0.1.0
    if run.precisions[-1] != training.precision:
        on_note(f"seed {run.seed} was trained in {run.precisions[-1]} so far and goes on in {training.precision}")
    training.started -= run.seconds
    unpack_random(training.device, tensors, values)
    return True


def check_identity(state_dir: Path, values: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse to go on with another experiment than the one that was begun."""
    compare_configs(state_dir, values["config"], identity["config"])
    for name in ("seed", "data"):
        if values[name] != identity[name]:
            raise ValueError(f"--resume: expected the {name} of {state_dir}, got another; choose another --out")


def compare_configs(where: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise if two identities of configurations differ, and say in what."""
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        shown = "; ".join(f"{name} {here.get(name)}, there {there.get(name)}" for name in differing)
        raise ValueError(f"--resume: expected the settings of {where}, got {shown}; choose another --out")


def pack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Its tensors into `tensors` as optimizer.INDEX.NAME, the rest into `values`."""
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entries.items()}
    values["optimizer"] = state["param_groups"]


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in section(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in values["optimizer"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def pack_random(device: torch.device, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """The states of all random number generators; torch's, which dropout uses, of each process."""
    states = {"random.torch": torch.get_rng_state()[None]}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)[None]
    tensors |= md.gather_rows(states)
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    tensors["random.numpy"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    gauss = [numpy_state["has_gauss"], numpy_state["gauss"]]
    values["random"] = {"numpy": [numpy_state["state"]["pos"], *gauss], "python": random.getstate()}


def unpack_random(device: torch.device, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    rank, _ = place()
    if rank < len(tensors["random.torch"]):  # one more process than before keeps what `begin` gave it
        torch.set_rng_state(tensors["random.torch"][rank].clone())  # of a view it would read the whole
        if device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"][rank].clone(), device)
    position, has_gauss, gauss = values["random"]["numpy"]
    key = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, gauss))  # noqa: NPY002
    version, numbers, gauss_next = values["random"]["python"]
    random.setstate((version, tuple(numbers), gauss_next))
