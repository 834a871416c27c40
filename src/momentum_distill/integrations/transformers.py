"""A callback for the Trainer of transformers, and those that are made from it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from momentum_distill._checks import wrong_value
from momentum_distill._ema import EMAWrapper
from momentum_distill.integrations._following import NO_AVERAGE, Following, Updates, missing

try:
    from safetensors.torch import load_file, save_file
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ModuleNotFoundError as _error:
    missing(_error, "transformers", "transformers", "safetensors")

__all__ = ["EMACallback"]


class EMACallback(TrainerCallback):
    """A moving average of the model in training, or of a part of it, that follows the optimizer.

    It moves after each step that the optimizer really makes: once however many batches are accumulated, and not after a
    step that a gradient scaler skips. The average is made when training starts, on the device of the model. It is saved
    in each checkpoint of the Trainer as a file of its own, beside the model, which stays what it is, and comes back
    with `trainer.train(resume_from_checkpoint=...)` and with `load_best_model_at_end`.

    Args:
        trainer: The Trainer, which has to get the callback: `trainer.add_callback(EMACallback(trainer))`.
        model: What is averaged: the Trainer's model (default) or a part of it: a part where the whole holds
            averages or queues of its own, which would be averaged once more.
        ema: A ready average in place of a new one. It follows `model`, by default what it was made of. As a part of the
            Trainer's model it is saved with it, and once.
        also: What else has an `update()` to call after the step, as `MomentumFusionFactors` has.
        swap: Evaluate and predict with the averaged weights, within training and after it; of callbacks that average
            the same weights, in one alone. The model gets its own back afterwards, bit for bit and after an exception
            too. Before training there is no average.
        name: What it is saved as, `<name>.safetensors`. Two callbacks of one Trainer need two names.
        **options: `decay` and the others of :class:`~momentum_distill.EMAWrapper`, for the new average.

    Raises:
        TypeError: If an argument has the wrong type or is unknown.
        ValueError: If a number or choice is wrong; when training starts, if `model` is no part of the Trainer's, or two
            callbacks have one name or would put their averages in the place of the same weights.
        RuntimeError: When training starts, if the Trainer did not get the callback.
        ImportError: With the module, if `transformers` is not installed.

    Example:
        >>> import torch
        >>> from transformers import Trainer
        >>> trainer = Trainer(torch.nn.Linear(3, 2))
        >>> ema = EMACallback(trainer, decay=0.999, swap=True)
        >>> trainer.add_callback(ema)
        >>> # trainer.train(), and then: ema.ema.copy_to(trainer.model)
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module | None = None,
        *,
        ema: EMAWrapper | None = None,
        also: Sequence[Updates] = (),
        swap: bool = False,
        name: str = "ema",
        **options: Any,
    ) -> None:
        self.name = name
        self._trainer: Any = trainer
        self._following = Following(model, ema, also, options, swap=swap)
        self._resumed: Path | None = None
        self._trial: Any = None  # of a hyperparameter search
        # No event tells where a run is resumed from, nor that an evaluation begins.
        train, evaluation_loop = trainer.train, trainer.evaluation_loop

        @wraps(train)
        def follow(*args: Any, **kwargs: Any) -> Any:
            if self not in trainer.callback_handler.callbacks:
                raise RuntimeError("EMACallback: expected trainer.add_callback(callback), got a training without it")
            resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
            if resumed is True:
                resumed = get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
            self._resumed, self._trial = Path(resumed) if resumed else None, kwargs.get("trial")
            try:
                return train(*args, **kwargs)
            finally:
                self._following.stop()

        @wraps(evaluation_loop)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self._following.enter(self._trainer.model)
            try:
                return evaluation_loop(*args, **kwargs)
            finally:
                self._following.leave()

        trainer.train, trainer.evaluation_loop = follow, evaluate  # type: ignore[method-assign]

    @property
    def ema(self) -> EMAWrapper:
        """The average, once training has begun."""
        return self._following.average()

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks = [each for each in self._trainer.callback_handler.callbacks if isinstance(each, EMACallback)]
        if [each.name for each in callbacks].count(self.name) > 1:
            wrong_value("name", "another one for each EMACallback of a Trainer", f"{self.name!r} twice")
        self._following.begin(self._trainer.model, [each._following for each in callbacks])
        if self._resumed is not None:
            self._load(self._resumed)
        self._following.watch([self._trainer.optimizer])

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save and not self._following.saved_with_model:
            # Under a hyperparameter search, the folder of the trial.
            run = Path(self._trainer._get_output_dir(self._trial))
            folder = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            tensors = {key: value.detach().clone().contiguous() for key, value in self._following.state_dict().items()}
            save_file(tensors, folder / f"{self.name}.safetensors")

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))

    def _load(self, folder: Path) -> None:
        if self._following.saved_with_model:
            return
        file = folder / f"{self.name}.safetensors"
        if file.exists():
            self._following.load_state_dict(load_file(file))
        else:
            warnings.warn(NO_AVERAGE.format(folder), stacklevel=2)
