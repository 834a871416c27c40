"""A moving average of any module, kept as a module of its own."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain, starmap
from operator import attrgetter, call, eq, getitem, is_
from typing import Any, Literal, NoReturn, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
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
from momentum_distill._group import Group, check_group, find_ranks, require_in_sync
from momentum_distill._precision import WideModule, is_16_bit
from momentum_distill.functional import lerp_

Decay: TypeAlias = float | Callable[[int], float]
Buffers: TypeAlias = Literal["copy", "ema", "frozen"]

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
        self._plans: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()
        check_device_name(device)
        self.dtype = dtype
        if teacher is None:
            name, average = "model", _deepcopy(model)
        else:
            _check_module("teacher", teacher)
            name, average = "teacher", teacher
        _Plan(average, model, buffers, blame=name)  # refuses a mismatch before anything is changed
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
        local = {name: _local(tensor) for name, tensor in _tensors(self.module).items()}
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

    def _match(self, model: nn.Module) -> _Plan:
        """The plan for `model`, made anew when one of its or our tensors is another object than before."""
        plan = self._plans.get(model)
        if plan is not None:
            plan.reshard()  # whole weights are other tensors, for which the plan would not be current
        if plan is None or not plan.is_current():
            plan = _Plan(self.module, model, self.buffers_mode, blame="model")
            self._plans[model] = plan
        return plan

    def _recast(self, device: torch.device | str | None = None) -> None:
        """Give every floating tensor of the average the dtype it is to have, and move it where `device` says."""
        tensors = _tensors(self.module).values()
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


class _Plan:
    """Which tensor of the average goes with which of one online module, matched by name.

    Walking two module trees and comparing names costs more than the update itself, so it is done once: `averages` and
    `copies` list what an update does. The plan holds tensors, and of modules only weak references and the dictionaries
    of their tensors: nothing that holds the online module, so a plan goes when its model does.
    """

    def __init__(self, average: nn.Module, online: nn.Module, buffers: Buffers, *, blame: str) -> None:
        _check_initialised(blame, average)
        _check_initialised("model", online)
        self._sharded = [ref(module) for tree in (average, online) for module in _sharded_modules(tree)]
        self.reshard()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        parameters = {id(parameter) for parameter in online.parameters()}
        seen: dict[int, tuple[str, Tensor]] = {}
        averaged, copied = [], []
        for name, (old, new) in _matched(_tensors(average), _tensors(online), blame).items():
            if id(old) in seen:
                first, tied = seen[id(old)]
                if tied is not new:
                    wrong_value(blame, f"{name!r} and {first!r} tied as in the average", "two tensors")
                continue
            if old is new:
                wrong_value(blame, "tensors of its own", f"{name!r} shared with the {_other(blame)}")
            seen[id(old)] = (name, new)
            self.pairs.append((old, new))
            averageable = old.is_floating_point() or old.is_complex()
            if averageable and (id(new) in parameters or buffers == "ema"):
                averaged.append((old, new))
            elif not averageable or buffers == "copy":
                copied.append((old, new))
        self.averages = _grouped(averaged)
        self.copies = _grouped(copied)
        self._contents = _Contents(average, online)
        online_tensors = [new for _, new in self.pairs]
        self._addressed = [new for new in online_tensors if _is_plain(new) and not new.is_meta]
        self._others = [new for new in online_tensors if not _is_plain(new) or new.is_meta]
        self._layout = self._find_layout()

    def reshard(self) -> None:
        """Let the modules of FSDP2 hold their shards again.

        A forward pass may leave whole weights in their place. Those are copies: what is written there is lost, and what
        is read there may be old.
        """
        for module in self._sharded:
            alive: Any = module()
            if alive is not None:
                alive.reshard()

    def is_current(self) -> bool:
        """Whether both module trees still hold the very tensors and submodules this plan was made from, as they were.

        `tensor.data = ...`, which `model.to()` does too, leaves the tensor the same object: it shows in the address and
        the number of elements, which take less time to ask for than shape, dtype and device.
        """
        return (
            self._contents.are_unchanged()
            and self._find_layout() == self._layout
            and all(group.is_current() for group in self.averages)
        )

    def _find_layout(self) -> list[object]:
        return [
            *map(Tensor.data_ptr, self._addressed),
            *map(Tensor.numel, self._addressed),
            *map(_form, self._others),
        ]


_form = attrgetter("shape", "dtype", "device")


class _Group:
    """Tensors of one dtype on one device with their online counterparts of one dtype on one device.

    Grouped so, the multi-tensor kernels of an accelerator take them in one launch.
    """

    def __init__(self, average: list[Tensor], online: list[Tensor]) -> None:
        self.average = average
        self.online = online
        self.kind = average[0].dtype, average[0].device
        self.converts = self.kind != (online[0].dtype, online[0].device)

    def is_current(self) -> bool:
        """Whether the average is where it was, by its first tensor: `.to()` moves all."""
        return (self.average[0].dtype, self.average[0].device) == self.kind

    def lerp(self, decay: float) -> None:
        """Move the average towards the online tensors."""
        if not self.converts or decay in (0, 1):
            lerp_(self.average, self.online, decay)
            return
        if not _is_plain(self.average[0]):  # of shards no other shards can be cut
            for old, new in zip(self.average, self.online, strict=True):
                lerp_([old], [new.to(device=old.device, dtype=old.dtype)], decay)
            return
        for average, online, scratch in self._parts:
            torch._foreach_copy_(scratch, online)
            lerp_(average, scratch, decay)

    def copy(self) -> None:
        """Copy the online tensors into the average."""
        torch._foreach_copy_(self.average, self.online)

    @cached_property
    def _parts(self) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Parts of at most SCRATCH elements (or one tensor), each with the same scratch memory to convert in.

        A part at a time: the conversion needs no more memory than the largest tensor or SCRATCH elements.
        """
        parts: list[list[int]] = []
        left = 0
        for index, tensor in enumerate(self.average):
            if not parts or tensor.numel() > left:
                parts.append([])
                left = SCRATCH
            parts[-1].append(index)
            left -= tensor.numel()
        sizes = [[self.average[index].numel() for index in part] for part in parts]
        memory = self.average[0].new_empty(max(map(sum, sizes)))
        result = []
        for part, numbers in zip(parts, sizes, strict=True):
            average = [self.average[index] for index in part]
            pieces = torch.split(memory[: sum(numbers)], numbers)
            scratch = [piece.view_as(tensor) for piece, tensor in zip(pieces, average, strict=True)]
            result.append((average, [self.online[index] for index in part], scratch))
        return result


SCRATCH = 2**22
"""Elements converted at a time where the online model has another dtype or device than the average."""


def _grouped(pairs: list[tuple[Tensor, Tensor]]) -> list[_Group]:
    """The pairs by dtype and device; what is not plain apart."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for old, new in pairs:
        kind = tuple((_is_plain(t) or type(t), t.dtype, t.device) for t in (old, new))
        average, online = groups.setdefault(kind, ([], []))
        average.append(old)
        online.append(new)
    return [_Group(average, online) for average, online in groups.values()]


class _Contents:
    """What the modules of an average and of an online module hold, compared by identity.

    This runs at every update, so each comparison is one loop inside the interpreter.
    """

    def __init__(self, average: nn.Module, online: nn.Module) -> None:
        modules = [*average.modules(), *online.modules()]
        held = [entries for module in modules for entries in (module._parameters, module._buffers)]
        self._empty = [entries for entries in [*held, *(module._modules for module in modules)] if not entries]
        self._filled = [entries for entries in held if entries]
        self._before = [dict(entries) for entries in self._filled]
        # Dictionaries compare their values by identity first, in half the time of a loop over them, then by `==`. For
        # two tensors that is an error, which is answer enough, unless they hold a single number: it may be equal.
        single = [
            (entries, name, tensor)
            for entries in self._filled
            for name, tensor in entries.items()
            if tensor is not None and tensor.numel() == 1
        ]
        self._singles = [entries for entries, _, _ in single]
        self._names = [name for _, name, _ in single]
        self._tensors = [tensor for _, _, tensor in single]
        self._average_children = [
            (module._modules, dict(module._modules)) for module in average.modules() if module._modules
        ]
        # The online modules are held weakly: the dictionary of a submodule may lead back to the whole model.
        parents = [module for module in online.modules() if module._modules]
        children = [child for module in parents for child in module._modules.values()]
        self._gone: list[object] = []
        self._online_parents = [ref(module) for module in parents]
        self._online_children = [type(None) if child is None else ref(child, self._gone.append) for child in children]

    def are_unchanged(self) -> bool:
        """Whether every module holds the very tensors and submodules it held."""
        try:
            submodules = map(dict.values, map(_submodules, map(call, self._online_parents)))
            return (
                not self._gone
                and not any(self._empty)
                and all(map(is_, map(getitem, self._singles, self._names), self._tensors))
                and self._filled == self._before
                and all(starmap(eq, self._average_children))
                and list(chain.from_iterable(submodules)) == list(map(call, self._online_children))
            )
        except (AttributeError, KeyError, RuntimeError):
            return False


_submodules = attrgetter("_modules")


def _matched(average: dict[str, Tensor], online: dict[str, Tensor], blame: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors of the same name in pairs, or a ValueError that names the first mismatch."""
    for name, new in online.items():
        if name not in average:
            _name_mismatch(blame, name, in_average=False)
        if average[name].shape != new.shape:
            shapes = (tuple(average[name].shape), tuple(new.shape))
            expected, got = shapes if blame == "model" else shapes[::-1]
            wrong_value(blame, f"shape {expected} for {name!r}", str(got))
    for name in average:
        if name not in online:
            _name_mismatch(blame, name, in_average=True)
    return {name: (average[name], online[name]) for name in online}


def _other(blame: str) -> str:
    """The side of a comparison that is not the argument `blame`."""
    return "average" if blame == "model" else "model"


def _name_mismatch(blame: str, name: str, *, in_average: bool) -> NoReturn:
    """Say which of the two has the tensor `name` and which has not; `blame` is the argument that came."""
    other = _other(blame)
    if in_average == (blame == "model"):
        wrong_value(blame, f"a tensor {name!r} as in the {other}", "none")
    wrong_value(blame, f"no tensor {name!r}, which the {other} does not have", "one")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, without the prefixes that wrappers add; tied ones under each name."""
    wrapped = {
        f"{path}.module".lstrip(".")
        for path, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        kept, path = [], ""
        for component in name.split("."):
            path = f"{path}.{component}".lstrip(".")
            if component != "_orig_mod" and path not in wrapped:
                kept.append(component)
        tensors[".".join(kept)] = tensor
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


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


def _check_initialised(name: str, module: nn.Module) -> None:
    """A module whose parameters all exist."""
    for path, parameter in module.named_parameters():
        if is_lazy(parameter):
            wrong_value(name, "initialised parameters (run a forward pass first)", f"lazy {path!r}")


def _local(tensor: Any) -> Tensor | None:  # noqa: ANN401 - a Tensor, or a DTensor, whose import takes a second
    """The tensor as this process holds it, or None where that is a part of it, as of a sharded DTensor."""
    local: Tensor | None = tensor
    if hasattr(tensor, "placements"):
        local = tensor.to_local() if all(placement.is_replicate() for placement in tensor.placements) else None
    return local


def _sharded_modules(module: nn.Module) -> list[nn.Module]:
    """Those that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # an import would take a second, for nothing if none was made
    return [] if fsdp is None else [child for child in module.modules() if isinstance(child, fsdp.FSDPModule)]


def _is_plain(tensor: Tensor) -> bool:
    """Neither a subclass, such as a DTensor, nor sparse."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _movable(tensors: list[Tensor]) -> list[bool]:
    """Which tensors can be given another storage: plain ones on CPU, each alone in its own."""
    plain = [_is_plain(tensor) and tensor.device.type == "cpu" for tensor in tensors]
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
