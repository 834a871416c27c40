"""A callback for Lightning, `lightning` and `pytorch_lightning` alike."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from momentum_distill._ema import EMAWrapper
from momentum_distill.integrations._following import NO_AVERAGE, Following, Updates, missing

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # The two are the same code twice: that which the user has imported, else that which is installed.
    _names = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch_lightning"}
    _found = [name for name in _names if name in sys.modules] + [name for name in _names if find_spec(_names[name])]
    try:
        _lightning = import_module([*_found, "lightning.pytorch"][0])
    except ModuleNotFoundError as _error:
        missing(_error, "lightning", "lightning", "pytorch_lightning")
    Callback, LightningModule, Trainer = _lightning.Callback, _lightning.LightningModule, _lightning.Trainer

__all__ = ["EMACallback"]


class EMACallback(Callback):
    """A moving average of the module in training, or of a part of it, that follows the optimizer.

    It moves after each step that an optimizer really makes: once however many batches are accumulated, under manual
    optimization too, and not after a step that a gradient scaler skips. Of several optimizers it follows the last that
    has parameters of what is averaged. The average is made when training starts, on the device of the model, and is
    saved in Lightning's checkpoints, whose `state_dict` stays that of the model.

    Args:
        model: What is averaged: the LightningModule (default) or a part of it: a part where the whole holds
            averages or queues of its own, which would be averaged once more.
        ema: A ready average in place of a new one. It follows `model`, by default what it was made of. As a part of the
            LightningModule it is saved with it, and once.
        also: What else has an `update()` to call after the step, as `MomentumFusionFactors` has.
        swap: Validate, test and predict with the averaged weights; of callbacks that average the same weights, in one
            alone. The model gets its own back afterwards, bit for bit and after an exception too, and a checkpoint that
            is saved meanwhile has its own. Before the first training step there is no average; with
            `trainer.test(module, ckpt_path=...)` it is that of the checkpoint.
        name: What it is saved as. Two callbacks of one trainer need two names.
        **options: `decay` and the others of :class:`~momentum_distill.EMAWrapper`, for the new average.

    Raises:
        TypeError: If an argument has the wrong type or is unknown.
        ValueError: If a number or choice is wrong; when training starts, if `model` is no part of the LightningModule,
            no optimizer has a parameter of it, or two callbacks would put their averages in its place.
        ImportError: With the module, if neither `lightning` nor `pytorch_lightning` is installed.

    Example:
        >>> from lightning import Trainer
        >>> ema = EMACallback(decay=0.999, swap=True)
        >>> trainer = Trainer(callbacks=[ema], logger=False, accelerator="cpu")
        >>> # trainer.fit(module), and then: ema.ema.copy_to(module)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        ema: EMAWrapper | None = None,
        also: Sequence[Updates] = (),
        swap: bool = False,
        name: str = "ema",
        **options: Any,
    ) -> None:
        self.name = name
        self._following = Following(model, ema, also, options, swap=swap)

    @property
    def ema(self) -> EMAWrapper:
        """The average, once training has begun."""
        return self._following.average()

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._following.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._following.load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.begin(pl_module, _all_following(trainer))
        if trainer.ckpt_path and not (self._following.loaded or self._following.saved_with_model):
            warnings.warn(NO_AVERAGE.format(trainer.ckpt_path), stacklevel=2)
        self._following.loaded = False
        self._following.watch(trainer.optimizers)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._following.leave()
        self._following.stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._following.enter(pl_module, _all_following(trainer))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.leave()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.enter(pl_module, _all_following(trainer))

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.leave()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.enter(pl_module, _all_following(trainer))

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._following.leave()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        swapped = [each for each in _all_following(trainer) if each.swapped]  # of several parts each has an average
        if self._following.swapped:
            for each in swapped:
                each.leave()
            own = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = tree_map_only(torch.Tensor, torch.clone, own)
            for each in swapped:
                each.enter(pl_module)


def _all_following(trainer: Trainer) -> list[Following]:
    """Of the trainer's callbacks, in their order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # its connector sets it, out of sight of type checkers
    return [each._following for each in callbacks if isinstance(each, EMACallback)]
