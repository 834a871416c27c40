"""What the frameworks have in common: an average that follows an optimizer, and takes the model's place for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from momentum_distill._checks import check_bool, describe, wrong_type, wrong_value
from momentum_distill._ema import EMAWrapper


@runtime_checkable
class Updates(Protocol):
    """What is updated after a step of the optimizer, as `MomentumFusionFactors` is."""

    def update(self) -> None: ...


NO_AVERAGE = "{} has no average to go on with: it begins anew as a copy of the model"
OWN_WEIGHTS = "swap: expected a model that has an average, got a {} without: it is evaluated with its own weights"


class Following:
    """An average that moves after each step of an optimizer."""

    def __init__(
        self,
        model: nn.Module | None,
        ema: EMAWrapper | None,
        also: Sequence[Updates],
        options: Mapping[str, Any],
        *,
        swap: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module | None):
            wrong_type("model", "a torch.nn.Module or None", describe(model))
        if not isinstance(ema, EMAWrapper | None):
            wrong_type("ema", "an EMAWrapper or None", describe(ema))
        if not isinstance(also, Sequence) or not all(map(_is_updated, also)):
            wrong_type("also", "a sequence of what has an update() without arguments", describe(also))
        if ema is not None and options:
            wrong_value("ema", f"None where {', '.join(options)} is given for a new one", describe(ema))
        check_bool("swap", swap)
        fitted = ("device", "teacher", "buffers")  # looked at with the model; the others are refused at once
        EMAWrapper(nn.LayerNorm(1), **{name: value for name, value in options.items() if name not in fitted})
        self.model, self.given, self.also, self.options, self.swap = model, ema, also, options, swap
        self.ema = ema
        self.online: nn.Module | None = None
        self.saved_with_model = False  # as a part of it
        self.loaded = False
        self._state: Mapping[str, Any] | None = None  # loaded before there is an average
        self._handle: Any = None
        self._swapped = ExitStack()

    def begin(self, root: nn.Module, beside: Iterable[Following] = ()) -> EMAWrapper:
        """Find what is averaged in the model that is trained, and make the average where none is there.

        Of those `beside` this one, none may put its average in the place of the same weights.
        """
        online = self.model or (root if self.given is None else self.given._online())
        if online is None:
            wrong_value("model", "what `ema` is an average of, which a copied or unpickled one does not know", "None")
        if all(module is not online for module in root.modules()):
            wrong_value("model", f"the {type(root).__name__} in training, or a part of it", describe(online))
        weights = set(map(id, online.parameters()))
        if self.swap and any(
            each.swap and each.online is not None and not weights.isdisjoint(map(id, each.online.parameters()))
            for each in beside
            if each is not self
        ):
            wrong_value("swap", "True for one average of the same weights, which alone can be in their place", "two")
        if self.given is not None:
            self.given._match(online)
        if self.ema is None or (self.given is None and online is not self.online):
            self.ema = EMAWrapper(online, **self.options)
        self.online = online
        self.saved_with_model = any(module is self.ema for module in root.modules())
        if self._state is not None:
            self.ema.load_state_dict(self._state)
            self._state = None
        return self.ema

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Move the average after each step of the last optimizer that trains a part of what it averages."""
        self.stop()
        assert self.online is not None
        trained = set(map(id, self.online.parameters()))
        owners = []
        for optimizer in optimizers:
            plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
            if not isinstance(plain, Optimizer):
                wrong_type("optimizer", "a torch.optim.Optimizer", describe(plain))
            if any(id(parameter) in trained for group in plain.param_groups for parameter in group["params"]):
                owners.append(plain)
        if not owners:
            wrong_value("optimizer", "one that has parameters of the averaged model", "none")
        self._handle = owners[-1].register_step_post_hook(self._follow)

    def stop(self) -> None:
        """Move the average no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _follow(self, optimizer: Optimizer, *_: object) -> None:
        # A GradScaler does not call the step that it skips. Only a fused optimizer is called, and told.
        if not bool(getattr(optimizer, "found_inf", False)):
            assert self.ema is not None
            assert self.online is not None
            for each in self.also:  # first, for the average may hold what they move
                each.update()
            self.ema.update(self.online)

    @property
    def swapped(self) -> bool:
        """Whether the model carries the average."""
        return self.ema is not None and self.ema._swapped

    def enter(self, root: nn.Module, beside: Iterable[Following] = ()) -> None:
        """Let the model carry the average, if that is asked for and there is one."""
        if not self.swap or self.swapped:
            return
        if self._state is not None:
            self.begin(root, beside)
        if self.ema is None or all(module is not self.online for module in root.modules()):
            warnings.warn(OWN_WEIGHTS.format(type(root).__name__), stacklevel=2)
            return
        assert self.online is not None
        with torch.inference_mode(False):  # what is copied back is to be fit for training
            self._swapped.enter_context(self.ema.swap(self.online))

    def leave(self) -> None:
        """Give the model its own weights back."""
        with torch.inference_mode(False):
            self._swapped.close()

    def average(self) -> EMAWrapper:
        """The average, once training has begun."""
        if self.ema is None:
            raise RuntimeError("ema: expected to be asked for once training has begun, got asked before")
        return self.ema

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint of the model does not have: the average, unless it is a part of the model."""
        if self.ema is None or self.saved_with_model:
            return dict(self._state or {})
        return self.ema.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Into the average, or into the one that is going to be made."""
        self.loaded = True
        if self.ema is None:
            self._state = state
        else:
            self.ema.load_state_dict(state)


def _is_updated(block: object) -> bool:
    """Whether it has an `update()` that is called without arguments; an average wants its model."""
    if not isinstance(block, Updates):
        return False
    try:
        signature(block.update).bind()
    except TypeError:
        return False
    return True


def missing(error: ModuleNotFoundError, framework: str, *packages: str) -> NoReturn:
    """The line for who has not installed a framework."""
    if error.name is None or error.name.partition(".")[0] not in packages:
        raise error
    package = packages[0]
    raise ImportError(
        f"momentum_distill.integrations.{framework}: expected the package {package}, got none: pip install {package}"
    ) from None
