"""The learned scalars of the blocks, and how they reach the optimizer."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from momentum_distill._checks import check_number, describe, wrong_type, wrong_value


def param_groups(*modules: nn.Module, weight_decay: float, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Parameters in two groups for an optimizer: with weight decay, and the learned scalars of the blocks without.

    Decay would pull a learned temperature towards its initial value and fusion factors towards 0, which nobody means by
    it. Parameters that do not require a gradient (averages, frozen layers) are left out, and each stands once.

    Args:
        *modules: Models and losses that are trained, at least one.
        weight_decay: Of everything that is not such a scalar, at least 0.
        **options: For both groups, say `lr=1e-3`.

    Returns:
        At most two groups, in the form that `torch.optim` takes; an empty one is left out.

    Raises:
        TypeError: If a module is not one, or `weight_decay` not a number.
        ValueError: If `weight_decay` is negative, or nothing requires a gradient.

    Example:
        >>> import torch
        >>> import momentum_distill as md
        >>> model, contrast = torch.nn.Linear(4, 2), md.SupConDistillLoss()
        >>> groups = md.param_groups(model, contrast, weight_decay=0.01, lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(2, 0.01), (1, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            wrong_type(f"modules[{index}]", "a torch.nn.Module", describe(module))
    check_number("weight_decay", weight_decay, low=0.0)
    together = nn.ModuleList(modules)
    learned = [parameter for parameter in together.parameters() if parameter.requires_grad]
    if not learned:
        wrong_value("modules", "something that requires a gradient", "nothing")
    scalars = {
        id(parameter)
        for module in together.modules()
        for name in getattr(module, "undecayed", ())
        if (parameter := getattr(module, name)) is not None
    }
    groups = [
        {"params": [p for p in learned if (id(p) in scalars) == without], "weight_decay": decay, **options}
        for without, decay in ((False, float(weight_decay)), (True, 0.0))
    ]
    return [group for group in groups if group["params"]]


class IdleWatch:
    """Warns, once, of a learned parameter that gets gradients and is moved by nobody."""

    def __init__(self, name: str, patience: int) -> None:
        self.name = name
        self.patience = patience  # looks
        self.looks = 0
        self.version = -1

    def look(self, parameter: nn.Parameter) -> None:
        """Before it is used: has it been written to since `left`, although it has a gradient?"""
        if torch.compiler.is_compiling() or self.looks > self.patience or parameter.grad is None:
            return
        self.looks = self.looks + 1 if parameter._version == self.version else 0
        if self.looks > self.patience:
            warnings.warn(
                f"{self.name} has a gradient and nothing has changed it in {self.patience} calls: give it to the "
                "optimizer, as momentum_distill.param_groups(model, loss_fn, weight_decay=...) does, or freeze it",
                stacklevel=4,
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
        self.done = False

    def look(self, weights: Iterable[Tensor], *, training: bool = False) -> None:
        """Before the average is used: is this a training, or have the weights changed since the last call?"""
        if torch.compiler.is_compiling() or self.done:
            return
        if not training:
            versions = [weight._version for weight in weights if not weight.is_inference()]
            training = self.versions is not None and versions != self.versions
            self.versions = versions
        self.calls += training
        if self.calls > self.patience:
            self.stop()
            warnings.warn(self.message.format(self.patience), stacklevel=5)

    def stop(self) -> None:
        """The average was updated, or is not meant to be; or it was said once."""
        self.done = True
