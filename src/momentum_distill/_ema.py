"""A moving average of any module, kept as a module of its own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from momentum_distill._checks import (
    check_choice,
    check_device_name,
    check_number,
    describe,
    wrong_type,
    wrong_value,
)
from momentum_distill._ema_plan import Buffers, Plan, is_plain, named_tensors
from momentum_distill._group import Group, check_group, find_ranks, require_in_sync
from momentum_distill._precision import WideModule, is_16_bit

Decay: TypeAlias = float | Callable[[int], float]

BUFFERS = ("copy", "ema", "frozen")
MODES = ("eval", "train")


class EMAWrapper(WideModule):
    r"""An exponential moving average of a module: the momentum model (Eq. 6). Buffers are copied by default.

    $$\theta_{ema} \leftarrow \eta\,\theta_{ema} + (1-\eta)\,\theta_{online}$$

    The average starts as a copy of `model` and moves at each :meth:`update`. It never requires grad, stays in `mode`
    whatever `.train()` a parent module gets, is updated in place, and keeps no hold on `model`: optimizers, DDP and
    `state_dict` see the averaged tensors only. Tensors are matched by name; prefixes that wrappers add (`module.`,
    `_orig_mod.`) do not count, and tied tensors are averaged once.

    Args:
        model: The online module; may be wrapped by DDP, DataParallel or torch.compile.
        decay: Share $\eta$ that the average keeps at an update, a number in [0, 1], or a function from the number of
            updates made so far (0 at the first) to such a number, for warm-up or a cosine. Paper and ALBEF: 0.995.
        buffers: What happens to floating buffers at an update, BatchNorm statistics for one: `"copy"` (default),
            `"ema"` or `"frozen"`. Integer and bool buffers are always copied.
        dtype: Floating dtype of the average, 32 bits or more. By default that of the model, and float32 where the model
            has 16 bits: in 16 bits an average stands still, for its steps are smaller than the spacing of the numbers.
        device: Where the average lives; by default beside the model.
        mode: `"eval"` (default: no dropout, BatchNorm uses its statistics) or `"train"`.
        teacher: A ready module to hold the average in, for models that cannot be deep-copied (FSDP2: build a second one
            and shard it alike). Its weights are where the average starts; `update(model, decay=0.0)` copies.

    Raises:
        TypeError: If an argument has the wrong type, or `model` cannot be deep-copied and no `teacher` is given.
        ValueError: If a number or choice is wrong, `model` has uninitialised (lazy) parameters, or `teacher` does not
            match it by names and shapes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> ema = EMAWrapper(model, decay=0.9)
        >>> _ = nn.init.zeros_(model.weight)  # stands for optimizer.step()
        >>> ema.update(model)
        >>> ema(torch.ones(1, 2)).requires_grad
        False
        >>> with ema.swap(model):  # evaluate `model` with the averaged weights
        ...     bool((model.weight == ema.module.weight).all())
        True

    References:
        MTMD (Lin and Hu, 2023), Eq. 6 and Section III-D. As printed, Eq. 6 gives the new weights the factor 0.995; its
        text means the old average: `docs/paper_map.md`.
    """

    module: nn.Module
    """The averaged module."""

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: Decay = 0.995,
        buffers: Buffers = "copy",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mode: Literal["eval", "train"] = "eval",
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_module("model", model)
        if not callable(decay):
            check_number("decay", decay, low=0.0, high=1.0)
        check_choice("buffers", buffers, BUFFERS)
        check_choice("mode", mode, MODES)
        if dtype is not None:
            if not isinstance(dtype, torch.dtype):
                wrong_type("dtype", "a torch.dtype or None", describe(dtype))
            if not dtype.is_floating_point or is_16_bit(dtype):
                wrong_value("dtype", "a floating dtype of 32 bits or more", str(dtype))
        self.decay = decay
        self.buffers_mode: Buffers = buffers
        self.mode: Literal["eval", "train"] = mode
        self._step = 0
        self._swapped = False
        self._plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()
        check_device_name(device)
        self.dtype = dtype
        if teacher is None:
            name, average = "model", _deepcopy(model)
        else:
            _check_module("teacher", teacher)
            name, average = "teacher", teacher
        Plan(average, model, buffers, blame=name)  # refuses a mismatch before anything is changed
        self.module = average
        self._recast(device)
        self.module.requires_grad_(False)
        self.module.zero_grad(set_to_none=True)
        self.train()
        self.register_load_state_dict_post_hook(_restore_precision)  # type: ignore[no-untyped-call]

    @property
    def step(self) -> int:
        """How many updates were made; part of the state."""
        return self._step

    @override
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's output, without gradient.

        The average is never in 16 bits, so 16-bit floating inputs are widened to float32; with a `dtype` given,
        floating inputs are cast to it.

        Args:
            *args: Passed to the averaged module.
            **kwargs: Passed to the averaged module.

        Returns:
            What the averaged module returns.

        Example:
            >>> import torch
            >>> ema = EMAWrapper(torch.nn.Linear(3, 2))
            >>> ema(torch.ones(4, 3)).shape
            torch.Size([4, 2])
        """
        args, kwargs = tree_map(partial(_recast_input, dtype=self.dtype), (args, kwargs))
        return self.module(*args, **kwargs)

    @torch.inference_mode()
    def update(self, model: nn.Module, *, decay: float | None = None) -> None:
        """Move the average one step towards `model`; call it once after each optimizer step.

        Args:
            model: The online module, as at construction or another of the same names and shapes.
            decay: Overrides the decay for this update, in [0, 1]; 0 copies.

        Raises:
            TypeError: If `model` is not a module, or a decay not a number.
            ValueError: If a decay is not in [0, 1], or a tensor of `model` is missing, unexpected or of another shape;
                the message names the first. The average is then unchanged.
            RuntimeError: If called inside :meth:`swap`, where `model` carries the average itself.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.zeros_(model.weight)
            >>> ema = EMAWrapper(model, decay=0.9)
            >>> _ = torch.nn.init.ones_(model.weight)  # stands for optimizer.step()
            >>> ema.update(model)
            >>> ema.module.weight
            Parameter containing:
            tensor([[0.1000]])
        """
        _check_module("model", model)
        if self._swapped:
            raise RuntimeError("update: expected a call outside swap(), got one inside it")
        if decay is None:
            decay = self.decay(self._step) if callable(self.decay) else self.decay
        check_number("decay", decay, low=0.0, high=1.0)
        plan = self._match(model)
        for group in plan.averages:
            group.lerp(float(decay))
        for group in plan.copies:
            group.copy()
        self._step += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into `model`, in the dtypes and on the devices of `model`.

        Args:
            model: A module of the same names and shapes.

        Raises:
            TypeError: If `model` is not a module.
            ValueError: If a tensor of `model` is missing, unexpected or of another shape.

        Example:
            >>> import torch
            >>> ema, deployed = EMAWrapper(torch.nn.Linear(3, 2)), torch.nn.Linear(3, 2)
            >>> ema.copy_to(deployed)
            >>> bool((deployed.weight == ema.module.weight).all())
            True
        """
        _check_module("model", model)
        plan = self._match(model)
        for average, online in plan.pairs:
            online.copy_(average)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Inside the context `model` carries the averaged weights and buffers; its own come back on exit, bit for bit.

        They come back after an exception too. `model.state_dict()` inside holds the averaged weights.

        What `model` carries is a copy: the average is still there for `ema(...)`, and whatever is done to `model`
        inside (a step of an optimizer, `load_state_dict`) does not reach it and is undone on exit. On CPU the model's
        own storage is set aside meanwhile, which takes one copy instead of three; views of its weights made outside
        keep showing the model's own values then. Tensors on other devices keep their place, for captured graphs and
        flattened RNN weights, and so do tensor subclasses and tensors that share their storage: all these are copied
        back and forth.

        Args:
            model: The online module.

        Raises:
            TypeError: If `model` is not a module.
            ValueError: If a tensor of `model` is missing, unexpected or of another shape.
            RuntimeError: If called inside another `swap` of the same average.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.zeros_(model.weight)
            >>> ema = EMAWrapper(model)
            >>> _ = torch.nn.init.ones_(model.weight)
            >>> with ema.swap(model):
            ...     model.weight.item()
            0.0
            >>> model.weight.item()
            1.0
        """
        _check_module("model", model)
        if self._swapped:
            raise RuntimeError("swap: expected a call outside swap(), got one inside it")
        plan = self._match(model)
        with torch.no_grad():
            movable = _movable([online for _, online in plan.pairs])
            own = [
                online.detach() if moves else online.clone()
                for (_, online), moves in zip(plan.pairs, movable, strict=True)
            ]
            values = [
                torch.empty_like(online).copy_(average) if moves else average
                for (average, online), moves in zip(plan.pairs, movable, strict=True)
            ]
        tensors = [online for _, online in plan.pairs]
        self._swapped = True
        try:
            _assign(tensors, values, movable)
            yield
        finally:
            plan.reshard()
            _assign(tensors, own, movable)
            self._swapped = False

    def check_in_sync(self, *, group: Group = "auto") -> None:
        """Refuse an average that is not the same, bit for bit, on all ranks; all of them have to call it.

        Averages need no traffic: they stay the same as long as the online models do, which DDP sees to. This finds out
        whether they did (other seeds, another checkpoint on one rank). Reads all of it: for tests, and after loading.
        Sharded tensors (FSDP2) are left out, for each rank holds another part of them.

        Args:
            group: `"auto"`, None (nothing to compare with) or a process group.

        Raises:
            TypeError: If `group` is something else.
            RuntimeError: On all ranks, naming the first tensor that differs.

        Example:
            >>> import torch
            >>> EMAWrapper(
            ...     torch.nn.Linear(3, 2)
            ... ).check_in_sync()  # one process: nothing to compare with
        """
        check_group(group)
        local = {name: _local(tensor) for name, tensor in named_tensors(self.module).items()}
        whole = {name: tensor for name, tensor in local.items() if tensor is not None}
        require_in_sync(find_ranks(group), {**whole, "number of updates": torch.tensor(self._step)}, what="EMAWrapper")

    @override
    def train(self, mode: bool = True) -> EMAWrapper:
        """Keep the averaged module in `mode`, whatever a parent's `.train()` or `.eval()` asks for."""
        del mode
        keep = self.mode == "train"
        self.training = keep
        self.module.train(keep)
        return self

    def _match(self, model: nn.Module) -> Plan:
        """The plan for `model`, made anew when one of its or our tensors is another object than before."""
        plan = self._plans.get(model)
        if plan is not None:
            plan.reshard()  # whole weights are other tensors, for which the plan would not be current
        if plan is None or not plan.is_current():
            plan = Plan(self.module, model, self.buffers_mode, blame="model")
            self._plans[model] = plan
        return plan

    def _recast(self, device: torch.device | str | None = None) -> None:
        """Give every floating tensor of the average the dtype it is to have, and move it where `device` says."""
        tensors = named_tensors(self.module).values()
        if device is not None or any(_target_dtype(t, self.dtype) != t.dtype for t in tensors):

            def recast(tensor: Tensor) -> Tensor:
                return tensor.to(device=device, dtype=_target_dtype(tensor, self.dtype))

            self.module._apply(recast)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------------------------------------- state

    @override
    def get_extra_state(self) -> Tensor:
        """The number of updates, without which a decay schedule would start again."""
        return torch.tensor(self._step)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self._step = int(state)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": None, "_swapped": False}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plans = WeakKeyDictionary()

    @override
    def extra_repr(self) -> str:
        decay = self.decay if callable(self.decay) else f"{self.decay:g}"
        return f"decay={decay}, buffers={self.buffers_mode!r}, mode={self.mode!r}, step={self._step}"


def _deepcopy(model: nn.Module) -> nn.Module:
    """A copy of the module that wrappers hold."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            break
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"model: expected a module that copy.deepcopy can copy, got {type(model).__name__}, for which it says: "
            f"{str(error).rstrip('.')}. Build a second module of the same kind and pass it as teacher=."
        ) from error


def _check_module(name: str, module: object) -> None:
    """Any module."""
    if not isinstance(module, nn.Module):
        wrong_type(name, "a torch.nn.Module", describe(module))


def _local(tensor: Any) -> Tensor | None:  # noqa: ANN401 - a Tensor, or a DTensor, whose import takes a second
    """The tensor as this process holds it, or None where that is a part of it, as of a sharded DTensor."""
    local: Tensor | None = tensor
    if hasattr(tensor, "placements"):
        local = tensor.to_local() if all(placement.is_replicate() for placement in tensor.placements) else None
    return local


def _movable(tensors: list[Tensor]) -> list[bool]:
    """Which tensors can be given another storage: plain ones on CPU, each alone in its own."""
    plain = [is_plain(tensor) and tensor.device.type == "cpu" for tensor in tensors]
    storages = [tensor.untyped_storage() if moves else None for tensor, moves in zip(tensors, plain, strict=True)]
    users = Counter(storage.data_ptr() for storage in storages if storage is not None)
    return [
        storage is not None
        and users[storage.data_ptr()] == 1
        and storage.nbytes() == tensor.nbytes
        and not storage.is_shared()
        for tensor, storage in zip(tensors, storages, strict=True)
    ]


@torch.no_grad()
def _assign(tensors: list[Tensor], values: list[Tensor], movable: list[bool]) -> None:
    """Give each tensor its value, by storage where it is movable, else by copying."""
    for tensor, value, moves in zip(tensors, values, movable, strict=True):
        if moves:
            tensor.data = value
            torch.autograd.graph.increment_version(tensor)  # a graph made before or inside must not go on with it
        else:
            tensor.copy_(value)


def _target_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is averaged in."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return dtype or (torch.float32 if is_16_bit(tensor.dtype) else tensor.dtype)


def _recast_input(value: Any, *, dtype: torch.dtype | None) -> Any:  # noqa: ANN401 - a leaf of any pytree
    """A floating tensor in the dtype the average reads; anything else as it is."""
    return value.to(_target_dtype(value, dtype)) if isinstance(value, Tensor) else value


def _restore_precision(ema: EMAWrapper, incompatible_keys: object) -> None:
    """After `load_state_dict(..., assign=True)` the tensors are the checkpoint's own: widen and freeze them again."""
    del incompatible_keys
    ema._recast()
    ema.module.requires_grad_(False)
