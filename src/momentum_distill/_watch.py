"""What runs and trains nothing, told once: a scalar that no optimizer has, an average never updated, no student."""

import sys
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from momentum_distill._checks import has_numbers, is_traced


def warn(message: str) -> None:
    """Warn at the line outside of this library and torch that led here."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").partition(".")[0] in ("momentum_distill", "torch"):
        level += 1
    warnings.warn(message, stacklevel=level + 1)


WINDOW = 10  # calls after which values are compared where versions stand


class Values:
    """What a tensor held: optimizers with `fused=True` write without counting it in `_version`."""

    def __init__(self, tensor: Tensor) -> None:
        self.kept = tensor.detach().clone()

    def stand(self, tensor: Tensor) -> bool | None:
        """Whether it still holds that; None where one cannot see. Waits for the device."""
        if not has_numbers(tensor) or (tensor.device, tensor.dtype) != (self.kept.device, self.kept.dtype):
            return None
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return torch.equal(tensor, self.kept)


def _is_recorded() -> bool:
    """Whether what is looked at would become a part of a graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class IdleWatch:
    """Warns, once, of a learned parameter that gets gradients and is moved by nobody."""

    def __init__(self, name: str, patience: int) -> None:
        self.name = name
        self.patience = patience  # looks
        self.looks = 0
        self.version = -1
        self.values: Values | None = None  # at the first of these looks

    def look(self, parameter: nn.Parameter) -> None:
        """Before it is used: has it been written to since `left`, although it has a gradient?"""
        if _is_recorded() or self.looks > self.patience or parameter.grad is None:
            return
        self.looks = self.looks + 1 if parameter._version == self.version else 0
        if self.looks == 1:
            self.values = Values(parameter)
        if self.looks > self.patience and self.values is not None and not self.values.stand(parameter):
            self.looks = 0
        if self.looks > self.patience:
            warn(
                f"{self.name} has a gradient and nothing has changed it in {self.patience} calls: give it to the "
                "optimizer, as momentum_distill.param_groups(model, loss_fn, weight_decay=...) does, or freeze it"
            )

    def left(self, parameter: nn.Parameter) -> None:
        """After it was used."""
        if not torch.compiler.is_compiling() and not parameter.is_inference():
            self.version = parameter._version


class UpdateWatch:
    """Warns, once, of an average that is used while what it is to follow is trained, and that nobody updates."""

    def __init__(self, message: str, patience: int) -> None:
        self.message = message
        self.patience = patience  # calls
        self.calls = 0
        self.versions: list[int] | None = None
        self.stood = 0  # calls since a version changed
        self.values: Values | None = None  # of the smallest weight, at the first of these calls
        self.done = False

    def look(self, weights: Iterable[Tensor], *, training: bool = False) -> None:
        """Before the average is used: is this a training, or have the weights changed since the last call?"""
        if _is_recorded() or self.done:
            return
        if not training:
            seen = [weight for weight in weights if not weight.is_inference()]
            versions = [weight._version for weight in seen]
            training = self.versions is not None and versions != self.versions
            self.versions = versions
            self.stood = 0 if training or not seen else self.stood + 1
            if self.stood == 1:
                self.values = Values(min(seen, key=Tensor.numel))
            if self.stood > WINDOW:
                changed = self.values is not None and self.values.stand(min(seen, key=Tensor.numel)) is False
                self.calls, self.stood = self.calls + WINDOW * changed, 0
        self.calls += training
        if self.calls > self.patience:
            self.stop()
            warn(self.message.format(self.patience))

    def stop(self) -> None:
        """The average was updated, or is not meant to be; or it was said once."""
        self.done = True


class StudentWatch:
    """Warns, once, of a loss that is to train and is given nothing to train."""

    def __init__(self, finding: str) -> None:
        self.finding = finding
        self.told = False

    def look(self, loss_fn: nn.Module, *inputs: object) -> None:
        """Does any of these tensors, or tuples of tensors, require a gradient?"""
        if is_traced() or self.told or not loss_fn.training or not torch.is_grad_enabled():
            return
        for given in inputs:
            for part in given if isinstance(given, (tuple, list)) else (given,):
                if isinstance(part, Tensor) and part.requires_grad:
                    return
        self.told = True
        warn(
            f"{type(loss_fn).__name__} trains no model: {self.finding}. Are student and teacher, or "
            "momentum model, swapped, or is the student detached? To evaluate, call .eval() or use torch.no_grad()"
        )
