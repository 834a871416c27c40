"""A copy of a module that an average is kept in."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from momentum_distill._checks import check_module, wrong_type
from momentum_distill._ema_pairs import Tree, is_averageable, refuse_to_average, works


def check_python(name: str, module: object) -> None:
    """A module that is of Python throughout, whose tensors can be taken and exchanged."""
    check_module(name, module)
    assert isinstance(module, nn.Module)
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            where = f" as {path!r}" if path else ""
            wrong_type(name, "a module of Python, no torch.jit.ScriptModule", f"{type(child).__name__}{where}")


def deepcopy(model: nn.Module, hooks: str, common: Collection[str]) -> nn.Module:
    """A copy of the module that wrappers hold.

    Parameters named in `common` are shared with it, and those that cannot be averaged and are not trained.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            break
    memo: dict[int, Any] = {}
    for name, slot in Tree(model).parameters.items():
        parameter = slot.tensor
        if parameter is None or is_lazy(parameter) or (_has_average(parameter) and name not in common):
            continue
        if parameter.requires_grad:
            refuse_to_average(name, parameter)
        memo[id(parameter)] = copy.copy(parameter)
    if hooks == "drop":
        memo |= {id(hook): hook for module in model.modules() for _, _, hook in _taps(module)}
    try:
        average = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"model: expected a module that copy.deepcopy can copy, got {type(model).__name__}, for which it says: "
            f"{str(error).rstrip('.')}. Build a second module of the same kind and pass it as teacher=."
        ) from error
    if hooks == "drop":
        for module in average.modules():
            for kind, key, _ in _taps(module):
                for entries in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                    getattr(module, entries, {}).pop(key, None)
    return average


def _taps(module: nn.Module) -> list[tuple[str, int, object]]:
    """The hooks on outputs and gradients that are functions of the user: a copy would share them with the original.

    Methods and objects are copied along. So are the hooks of torch itself, which prune and quantise.
    """
    found = []
    for kind in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        for key, hook in getattr(module, kind).items():
            function = hook
            while isinstance(function, partial):
                function = function.func
            if isinstance(function, FunctionType) and (function.__module__ or "").partition(".")[0] != "torch":
                found.append((kind, key, hook))
    return found


def _has_average(tensor: Tensor) -> bool:
    """Whether a tensor can be averaged, or copied if it is of integers."""
    return works("average" if is_averageable(tensor) else "copy", tensor, tensor)


def unshare(average: nn.Module, common: Collection[str]) -> None:
    """Give an average its own copy of what it shares with the online model, where `load_state_dict` would write."""
    tree = Tree(average)
    memo: dict[int, Any] = {}
    for name, slot in (tree.parameters | tree.buffers).items():
        if slot.tensor is not None and (name in common or not _has_average(slot.tensor)):
            slot.put(copy.deepcopy(slot.tensor, memo))
