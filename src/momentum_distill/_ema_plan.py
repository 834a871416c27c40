"""What an update of an average by one online model does, and whether that is still what it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import chain, pairwise, starmap
from operator import attrgetter, call
from typing import Any, TypeAlias
from weakref import proxy, ref

import torch
from torch import Tensor, nn

from momentum_distill._ema_pairs import Pairing, Share, is_plain
from momentum_distill.functional import lerp_


class _Checked:
    """Whether what a plan was made from is still what it was."""

    def __init__(self, contents: _Contents, asked: list[Any], shared: list[tuple[Tensor, Tensor, Share]]) -> None:
        self._contents = contents
        self._asked = asked
        self._shared = shared
        self._layout = self._find_layout()

    def is_current(self) -> bool:
        """Whether the module trees still hold the very tensors and submodules this plan was made from, as they were.

        `tensor.data = ...`, which `model.to()` does too, leaves the tensor the same object. It shows in the address and
        the number of elements, which take less time to ask for than dtype and device; where there are several
        dimensions, the shape and the order in memory are asked for instead. Buffers are resized in place as well, those
        of the average by its own forward pass.
        """
        return (
            self._contents.are_unchanged()
            and self._find_layout() == self._layout
            and all(share.is_current(average, online) for average, online, share in self._shared)
        )

    def _find_layout(self) -> list[object]:
        return list(chain.from_iterable(starmap(map, self._asked)))


class Plan(_Checked):
    """What an update of the average by one online module does: `averages` and `copies`.

    Walking two module trees and comparing names costs more than the update itself, so it is done once. The plan holds
    tensors, and of modules only weak references and the dictionaries of their tensors: nothing that holds the online
    module, so a plan goes when its model does.
    """

    def __init__(self, pairing: Pairing, shares: dict[str, Share]) -> None:
        self.averages = _grouped(pairing.averaged)
        self.copies = _grouped(pairing.copied)
        self.written = pairing.written
        self.frozen = [new for _, new in pairing.frozen]
        self.lends = bool(pairing.lent)
        self.shares = shares
        shared = pairing.shared.items()
        taken = [name in shares and shares[name].is_current(old, new) for name, (old, new, _) in shared]
        self.behind = bool(pairing.unlike or pairing.trained or pairing.astray) or not all(taken)
        online = pairing.online.root
        self._online = [ref(module) for module in online.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self._sharded = [ref(module) for module in pairing.sharded]
        parameters, buffers, own_buffers = (
            list({id(tensor): tensor for slot in slots.values() if (tensor := slot.tensor) is not None}.values())
            for slots in (pairing.online.parameters, pairing.online.buffers, pairing.average.buffers)
        )
        averaged = list({id(new): new for _, new in pairing.averaged}.values())
        own = [old for old, _ in pairing.averaged]  # which .to() gives other memory
        others = [t for t in parameters + buffers if not is_plain(t) or t.is_meta]
        asked = [
            (Tensor.data_ptr, [t for t in own + averaged if is_plain(t) and not t.is_meta]),
            (Tensor.data_ptr, [t for pair in pairing.frozen for t in pair]),
            (_requires_grad, pairing.untrained),
            (Tensor.numel, [t for t in parameters + own_buffers if t.dim() < 2]),
            (_shape, buffers + [t for t in parameters + own_buffers if t.dim() > 1]),
            (Tensor.is_contiguous, [t for t in averaged + self.frozen if t.dim() > 1]),
            (_form, others),
            (_kind, [t for t in own if not is_plain(t) or t.is_meta]),
        ]
        super().__init__(
            _Contents([pairing.average.root], online),
            [(question, tensors) for question, tensors in asked if tensors],
            [(old, new, Share(old, new)) for _, (old, new, _) in shared],
        )

    def reshard(self) -> None:
        """Let the modules of FSDP2 hold their shards again."""
        for module in self._sharded:
            if (alive := module()) is not None:
                alive.reshard()

    def online_modules(self) -> list[nn.Module]:
        """Those of Python, as long as the plan is current."""
        return [alive for module in self._online if (alive := module()) is not None]


class JointPlan(_Checked):
    """Plans of several averages of one online module, checked together and carried out in one pass over its weights."""

    def __init__(self, plans: list[Plan], averages: list[nn.Module], online: nn.Module) -> None:
        self.plans = plans
        self.averages = averages
        self.behind = any(plan.behind for plan in plans)
        asked: dict[Any, dict[int, Tensor]] = {}
        for question, tensors in chain.from_iterable(plan._asked for plan in plans):
            asked.setdefault(question, {}).update({id(tensor): tensor for tensor in tensors})
        super().__init__(
            _Contents(averages, online),
            [(question, list(tensors.values())) for question, tensors in asked.items()],
            [shared for plan in plans for shared in plan._shared],
        )
        alike = [[(_kind(group.average[0]), *map(id, group.online)) for group in plan.averages] for plan in plans]
        if all(each == alike[0] for each in alike):
            groups = zip(*(plan.averages for plan in plans), strict=True)
            self._rows = [row for each in groups for row in _rows(each)]
        else:
            self._rows = [([], [], [(group, k)]) for k, plan in enumerate(plans) for group in plan.averages]

    def reshard(self) -> None:
        """Let the modules of FSDP2 hold their shards again."""
        for plan in self.plans:
            plan.reshard()

    def move(self, decays: list[float]) -> None:
        """Move all averages."""
        for online, scratch, groups in self._rows:
            if scratch:
                torch._foreach_copy_(scratch, online)
            for group, k in groups:
                group.lerp(decays[k])
        for group in chain.from_iterable(plan.copies for plan in self.plans):
            group.copy()


_shape = attrgetter("shape")
_form = attrgetter("shape", "dtype", "device")
_kind = attrgetter("dtype", "device")
_requires_grad = attrgetter("requires_grad")


class _Group:
    """Tensors of one dtype on one device with their online counterparts of one dtype on one device.

    Grouped so, the multi-tensor kernels of an accelerator take them in one launch.
    """

    def __init__(self, average: list[Tensor], online: list[Tensor]) -> None:
        self.average = average
        self.online = online
        self.converts = _kind(average[0]) != _kind(online[0])
        self.fuses = all(map(_fuses, average, online))

    def lerp(self, decay: float) -> None:
        """Move the average towards the online tensors."""
        if self.fuses and 0.5 < decay < 1 and torch.get_num_threads() == 1 and not torch.compiler.is_compiling():
            # A step of gradient descent on half the squared distance, at the rate `1 - decay`: the same operations on
            # the same numbers, in a kernel that saves a third of the time where tensors are small. With several threads
            # it would start all of them for each tensor; and torch.compile cannot trace it.
            _descend(self.average, self.online, [], lr=1 - decay)
        elif not self.converts or decay in (0, 1):
            lerp_(self.average, self.online, decay)
        elif not is_plain(self.average[0]):  # of shards no other shards can be cut
            for old, new in zip(self.average, self.online, strict=True):
                lerp_([old], [new.to(device=old.device, dtype=old.dtype)], decay)
        else:
            for average, online, scratch in self._parts:
                torch._foreach_copy_(scratch, online)
                lerp_(average, scratch, decay)

    def copy(self) -> None:
        """Copy the online tensors into the average."""
        if is_plain(self.average[0]):
            torch._foreach_copy_(self.average, self.online)
        else:
            lerp_(self.average, self.online, 0.0)

    @cached_property
    def _parts(self) -> list[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Parts of at most SCRATCH elements (or one tensor), each with the same scratch memory to convert in.

        A part at a time: the conversion needs no more memory than the largest tensor or SCRATCH elements.
        """
        parts = _slices(self.average, SCRATCH)
        averages, onlines = [self.average[part] for part in parts], [self.online[part] for part in parts]
        sizes = [[tensor.numel() for tensor in some] for some in averages]
        memory = self.average[0].new_empty(max(map(sum, sizes)))
        pieces = [torch.split(memory[: sum(numbers)], numbers) for numbers in sizes]
        scratch = [
            [piece.view_as(average) for piece, average in zip(split, some, strict=True)]
            for some, split in zip(averages, pieces, strict=True)
        ]
        return list(zip(averages, onlines, scratch, strict=True))


_descend = partial(
    torch._fused_sgd_, weight_decay=1.0, maximize=True, momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False
)

SCRATCH = 2**22
"""Elements converted at a time where the online model has another dtype or device than the average."""


CACHED = 2**20
"""Elements of the online model that are moved towards at a time: they are still in the cache for the next average."""

_Row: TypeAlias = tuple[list[Tensor], list[Tensor], list[tuple["_Group", int]]]
"""Online tensors, where they are converted to if they have to be, and what then moves towards them by which decay."""


def _rows(groups: Sequence[_Group]) -> Iterator[_Row]:
    """The same group of several averages, part by part."""
    first = groups[0]
    if first.converts and is_plain(first.average[0]):
        start = 0
        for averages, online, scratch in first._parts:
            part = slice(start, start := start + len(averages))
            yield online, scratch, [(_Group(group.average[part], scratch), k) for k, group in enumerate(groups)]
    else:
        parts = _slices(first.average, CACHED) if first.average[0].is_cpu else [slice(None)]
        for part in parts:
            yield [], [], [(_Group(group.average[part], group.online[part]), k) for k, group in enumerate(groups)]


def _slices(tensors: list[Tensor], most: int) -> list[slice]:
    """Consecutive tensors of together at most so many elements, or a larger one by itself."""
    starts, left = [0], most
    for index, tensor in enumerate(tensors):
        if tensor.numel() > left and index:
            starts.append(index)
            left = most
        left -= tensor.numel()
    return [slice(*ends) for ends in pairwise([*starts, len(tensors)])]


def _grouped(pairs: list[tuple[Tensor, Tensor]]) -> list[_Group]:
    """The pairs by dtype and device; what is not plain apart."""
    groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for old, new in pairs:
        kind = (_fuses(old, new), *((is_plain(t) or type(t), t.dtype, t.device) for t in (old, new)))
        average, online = groups.setdefault(kind, ([], []))
        average.append(old)
        online.append(new)
    return [_Group(average, online) for average, online in groups.values()]


def _fuses(old: Tensor, new: Tensor) -> bool:
    """Whether a kernel can take the two that asks for address and length alone."""
    known = old.dtype == new.dtype and old.dtype in (torch.float32, torch.float64)
    return known and all(is_plain(t) and t.is_cpu and t.is_contiguous() for t in (old, new))


class _Contents:
    """What the modules of an average and of an online module hold, compared by identity.

    This runs at every update, so each comparison is one loop inside the interpreter.
    """

    def __init__(self, averages: list[nn.Module], online: nn.Module) -> None:
        own = [module for average in averages for module in average.modules()]
        modules = [*own, *online.modules()]
        tensors = [entries for module in modules for entries in (module._parameters, module._buffers)]
        submodules = [module._modules for module in modules]
        own_submodules = [module._modules for module in own]
        self._empty = [entries for entries in tensors + submodules if not entries]
        # Dictionaries compare their values by identity first, in half the time of a loop over them, then by `==`. For
        # two tensors that is an error, which is answer enough, unless they hold a single number: it may be equal.
        self._filled = [entries for entries in tensors + own_submodules if entries]
        self._before = [dict(entries) for entries in self._filled]
        self._singles = [
            (entries, name, tensor)
            for entries in tensors
            for name, tensor in entries.items()
            if tensor is not None and tensor.numel() == 1
        ]
        # The online modules are held weakly: the dictionary of a submodule may lead back to the whole model.
        parents = [module for module in online.modules() if module._modules]
        self._parents = [ref(module) for module in parents]
        self._children = [
            {name: child if child is None else proxy(child) for name, child in module._modules.items()}
            for module in parents
        ]

    def are_unchanged(self) -> bool:
        """Whether every module holds the very tensors and submodules it held."""
        try:
            return (
                not any(self._empty)
                and all(entries[name] is tensor for entries, name, tensor in self._singles)
                and self._filled == self._before
                and list(map(_submodules, map(call, self._parents))) == self._children
            )
        except (AttributeError, KeyError, ReferenceError, RuntimeError, TypeError):
            return False


_submodules = attrgetter("_modules")
