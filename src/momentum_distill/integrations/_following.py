"""What the frameworks have in common: an average that follows an optimizer, and takes the model's place for a while."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from momentum_distill._checks import check_bool, describe, wrong_type, wrong_value
from momentum_distill._ema import EMAWrapper


@runtime_checkable
class Updates(Protocol):
    """What is updated after a step of the optimizer, as `MomentumFusionFactors` is."""

    def update(self) -> None:
        """Move."""


Model: TypeAlias = nn.Module | str | None
Also: TypeAlias = Sequence[Updates | str]

NO_AVERAGE = "{} has no average to go on with: it begins anew as a copy of the model"
OWN_WEIGHTS = "swap: expected a model that has an average, got a {} without: it is evaluated with its own weights"


class Following:
    """An average that moves after each step of an optimizer."""

    def __init__(
        self, model: Model, ema: EMAWrapper | str | None, also: Also, options: Mapping[str, Any], *, swap: bool = False
    ) -> None:
        if not isinstance(model, nn.Module | str | None):
            wrong_type("model", "a torch.nn.Module, the name of one or None", describe(model))
        if not isinstance(ema, EMAWrapper | str | None):
            wrong_type("ema", "an EMAWrapper, the name of one or None", describe(ema))
        if isinstance(also, str) or not isinstance(also, Sequence):
            wrong_type("also", "a sequence of modules with update()", describe(also))
        for each in also:
            _check_updates(each)
        if ema is not None and options:
            wrong_value("ema", f"None where {', '.join(options)} is given for a new one", describe(ema))
        check_bool("swap", swap)
        _check_options(options)
        self.model, self.also, self.options, self.swap = model, also, options, swap
        self.given = ema
        self.ema = ema if isinstance(ema, EMAWrapper) else None
        self.online: nn.Module | None = None
        self.saved_with_model = False  # a part of the model that the framework saves
        self.loaded = False
        self._updated: list[Updates] = []
        self._state: Mapping[str, Any] | None = None  # loaded before there is an average
        self._handle: Any = None
        self._swapped = ExitStack()

    def begin(self, root: nn.Module) -> None:
        """Find what is averaged in the model that is trained, and make the average where none is there."""
        if isinstance(self.given, str):
            self.ema = _find("ema", self.given, root, EMAWrapper)
        online = _find("model", self.model, root, nn.Module) if isinstance(self.model, str) else self.model
        if online is None and self.given is not None and self.ema is not None:
            online = self.ema._online()
            if online is None:
                wrong_value("model", "the module that the average is of, which a copied average does not know", "None")
        online = online or root
        self._updated = [_find("also", each, root, Updates) if isinstance(each, str) else each for each in self.also]
        if self.ema is None or (self.given is None and online is not self.online):
            self.ema = EMAWrapper(online, **self.options)
        self.online = online
        self.saved_with_model = any(module is self.ema for module in root.modules())
        if self._state is not None:
            self.ema.load_state_dict(self._state)
            self._state = None

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Move the average after each step of the last optimizer that trains a part of what it averages."""
        if self._handle is not None:
            self.stop()
        assert self.online is not None
        trained = set(map(id, self.online.parameters()))
        owners = []
        for optimizer in optimizers:
            while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer  # of Accelerate's wrapper
            if not hasattr(optimizer, "_optimizer_step_post_hooks"):
                wrong_type("optimizer", "a torch.optim.Optimizer", describe(optimizer))
            if any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
                owners.append(optimizer)
        if not owners:
            wrong_value("optimizer", "one that has parameters of the averaged model", "none")
        self._handle = owners[-1].register_step_post_hook(self._follow)

    def stop(self) -> None:
        """Move the average no more."""
        self.loaded = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _follow(self, optimizer: Optimizer, *_: object) -> None:
        # A GradScaler does not call the step that it skips. Only a fused optimizer is called, and told.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not bool(skipped):
            assert self.ema is not None
            assert self.online is not None
            self.ema.update(self.online)
            for each in self._updated:
                each.update()

    # ---------------------------------------------------------------------------------------------- evaluation

    @property
    def swapped(self) -> bool:
        """Whether the model carries the average."""
        return self.ema is not None and self.ema._swapped

    def enter(self, root: nn.Module) -> None:
        """Let the model carry the average, where there is one and that is asked for."""
        if self.swap and self._state is not None:
            self.begin(root)
        if not self.swap or self.swapped:
            return
        if self.ema is None or self.online is None or all(module is not self.online for module in root.modules()):
            warnings.warn(OWN_WEIGHTS.format(type(root).__name__), stacklevel=2)
            return
        with torch.inference_mode(False):  # the model's tensors are to be those of a training afterwards
            self._swapped.enter_context(self.ema.swap(self.online))

    def leave(self) -> None:
        """Give the model its own weights back."""
        with torch.inference_mode(False):
            self._swapped.close()

    @contextmanager
    def averaged(self, root: nn.Module) -> Iterator[None]:
        """Evaluate with the average inside the context; the model's own weights come back after an exception too."""
        outermost = not self.swapped
        self.enter(root)
        try:
            yield
        finally:
            if outermost:
                self.leave()

    # --------------------------------------------------------------------------------------------------- state

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


def missing(framework: str, package: str) -> NoReturn:
    """The line for who has not installed a framework."""
    raise ImportError(
        f"momentum_distill.integrations.{framework}: expected the package {package}, got none: pip install {package}"
    ) from None


def _check_updates(each: object) -> None:
    if isinstance(each, str):
        return
    if isinstance(each, EMAWrapper) or not isinstance(each, Updates):
        wrong_type("also", "modules whose update() takes no argument, or names of them", describe(each))


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse at once what `EMAWrapper` refuses, though there is no model yet."""
    inspect.signature(EMAWrapper).bind(None, **options)
    # Where the average lives, and what has to fit the model, is looked at with the model.
    later = (
        ("device", "teacher", "buffers")
        if not isinstance(options.get("buffers", "copy"), str)
        else ("device", "teacher")
    )
    EMAWrapper(nn.LayerNorm(1), **{name: value for name, value in options.items() if name not in later})


def _find(argument: str, name: str, root: nn.Module, kind: Any) -> Any:
    """The part of the model that has the name."""
    try:
        found = root.get_submodule(name)
    except AttributeError:
        wrong_value(argument, f"the name of a module of {type(root).__name__}", repr(name))
    if not isinstance(found, kind):
        wrong_type(argument, f"the name of a {kind.__name__}", f"{name!r}, a {type(found).__name__}")
    return found
