"""Which tensor of an average goes with which of its online model, and whether they still are the same."""

from __future__ import annotations

import sys
from functools import cached_property
from itertools import chain, starmap
from operator import attrgetter, call, eq, getitem, is_
from typing import Any, Literal, NoReturn, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from momentum_distill._checks import wrong_value
from momentum_distill.functional import lerp_

Buffers: TypeAlias = Literal["copy", "ema", "frozen"]


class Plan:
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
        for name, (old, new) in _matched(named_tensors(average), named_tensors(online), blame).items():
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
        self._contents = Contents(average, online)
        online_tensors = [new for _, new in self.pairs]
        self._addressed = [new for new in online_tensors if is_plain(new) and not new.is_meta]
        self._others = [new for new in online_tensors if not is_plain(new) or new.is_meta]
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


class Group:
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
        if not is_plain(self.average[0]):  # of shards no other shards can be cut
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


def _grouped(pairs: list[tuple[Tensor, Tensor]]) -> list[Group]:
    """The pairs by dtype and device; what is not plain apart."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for old, new in pairs:
        kind = tuple((is_plain(t) or type(t), t.dtype, t.device) for t in (old, new))
        average, online = groups.setdefault(kind, ([], []))
        average.append(old)
        online.append(new)
    return [Group(average, online) for average, online in groups.values()]


class Contents:
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


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
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


def _check_initialised(name: str, module: nn.Module) -> None:
    """A module whose parameters all exist."""
    for path, parameter in module.named_parameters():
        if is_lazy(parameter):
            wrong_value(name, "initialised parameters (run a forward pass first)", f"lazy {path!r}")


def _sharded_modules(module: nn.Module) -> list[nn.Module]:
    """Those that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # an import would take a second, for nothing if none was made
    return [] if fsdp is None else [child for child in module.modules() if isinstance(child, fsdp.FSDPModule)]


def is_plain(tensor: Tensor) -> bool:
    """Neither a subclass, such as a DTensor, nor sparse."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
