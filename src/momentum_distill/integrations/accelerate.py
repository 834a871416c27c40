"""One call for loops with Accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from momentum_distill._ema import EMAWrapper
from momentum_distill.integrations._following import Following, Updates, missing

try:
    from accelerate import Accelerator
except ModuleNotFoundError as _error:
    missing(_error, "accelerate", "accelerate")

__all__ = ["add_ema"]

M = TypeVar("M", bound=nn.Module)


def add_ema(
    accelerator: Accelerator,
    model: M,
    optimizer: Any,
    *,
    ema: EMAWrapper[M] | None = None,
    also: Sequence[Updates] = (),
    **options: Any,
) -> EMAWrapper[M]:
    """A moving average of the model that follows the optimizer, and is saved and loaded with the accelerator's state.

    It moves after each step that the optimizer really makes: once however many batches are accumulated, and not after a
    step that a gradient scaler skips. Call it after `accelerator.prepare`, when the model is on its device, and before
    `accelerator.load_state`. Accelerate numbers what it saves: averages come back in the order of the calls, and a
    checkpoint that has none is refused.

    Args:
        accelerator: Saves and loads the average with `save_state` and `load_state`.
        model: What is averaged: the prepared model, or a part of it.
        optimizer: The prepared optimizer, or the one of torch within.
        ema: A ready average of `model` in place of a new one. As a part of a prepared model it is saved with it, and
            once.
        also: What else has an `update()` to call after the step, as `MomentumFusionFactors` has.
        **options: `decay` and the others of :class:`~momentum_distill.EMAWrapper`, for the new average.

    Returns:
        The average. Evaluate within `with ema.swap(model):`.

    Raises:
        TypeError: If an argument has the wrong type or is unknown.
        ValueError: If a number or choice is wrong, `ema` is an average of another module, or the optimizer has no
            parameter of the model.
        ImportError: With the module, if `accelerate` is not installed.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator, model = Accelerator(cpu=True), torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> ema = add_ema(accelerator, model, optimizer, decay=0.999)
        >>> accelerator.backward(model(torch.ones(1, 3)).sum())
        >>> optimizer.step()
        >>> ema.step
        1
    """
    following = Following(model, ema, also, options)
    average: EMAWrapper[Any] = following.begin(model)
    following.watch([optimizer])
    if all(module is not average for prepared in accelerator._models for module in prepared.modules()):
        accelerator.register_for_checkpointing(average)
    return average
