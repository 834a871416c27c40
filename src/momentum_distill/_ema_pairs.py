"""Which tensor of an average goes with which of its online model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from momentum_distill._checks import wrong_type, wrong_value
from momentum_distill.functional import lerp_

Buffers: TypeAlias = Literal["copy", "ema", "frozen"] | list[str] | tuple[str, ...]

STATISTICS = ("running_mean", "running_var")
"""The buffers that `"ema"` averages: the moments that BatchNorm and its like gather."""


class Slot(NamedTuple):
    """A place among the parameters or buffers of a module; None where one is registered without a tensor."""

    owner: nn.Module
    key: str
    tensor: Tensor | None

    def put(self, tensor: Tensor) -> None:
        """Hold another tensor there."""
        if self.key in self.owner._parameters:
            setattr(self.owner, self.key, tensor)  # so that an RNN, which keeps a list of them, hears of it
        else:
            self.owner._buffers[self.key] = tensor


class Tree:
    """What a module and its submodules hold, by names without the prefixes that wrappers add; tied ones by each name.

    Paths of modules end with a dot. Where all parameters are below submodules called `module`, as in a wrapper of
    another library, names begin there; `^.` is one step up.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, Slot] = {}
        self.buffers: dict[str, Slot] = {}
        self.derived: set[str] = set()
        """Buffers that belong to a parametrised weight: singular vectors of a spectral norm, masks of pruning."""
        found = _unwrapped(root)
        held = [path + key for path, module, _ in found for key, t in module._parameters.items() if t is not None]
        held = held or [path + key for path, module, _ in found for key, _ in module._buffers.items()]
        depth = 0
        while held and all(name.startswith("module." * (depth + 1)) for name in held):
            depth += 1
        for outer, module, parametrised in found:
            path = _seen_from(outer, depth)
            self.modules[path] = module
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.parameters[path + key] = Slot(module, key, parameter)
            stems = tuple(key.removesuffix("orig") for key, _ in module._parameters.items() if key.endswith("_orig"))
            for key, buffer in module._buffers.items():
                self.buffers[path + key] = Slot(module, key, buffer)
                if parametrised or key.startswith(stems):
                    self.derived.add(path + key)

    def find(self, name: str) -> Slot | None:
        """The parameter of that name, or else the buffer."""
        return self.parameters.get(name) or self.buffers.get(name)

    def frozen(self, parameters: Collection[str]) -> set[str]:
        """These parameters, and the buffers of modules, or of modules around them, that have no others."""
        inside = {path for name in self.parameters for path in _around(name)}
        trained = {path for name in self.parameters if name not in parameters for path in _around(name)}
        nearest = {name: next((path for path in _around(name) if path in inside), "") for name in self.buffers}
        return {*parameters, *(name for name, path in nearest.items() if path not in trained and parameters)}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return {name: slot.tensor for name, slot in (self.parameters | self.buffers).items() if slot.tensor is not None}


def _around(name: str) -> Iterator[str]:
    """The paths of the modules that a tensor stands in, its own first and "" last."""
    while name:
        name = name[: name.rstrip(".").rfind(".") + 1]
        yield name


def _unwrapped(root: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """All modules with their paths, less what wrappers add, and whether they are part of a parametrised weight."""
    paths, wrappers, parametrised = {"": ""}, set(), set()
    found = []
    for path, module in root.named_modules(remove_duplicate=False):
        parent, _, name = path.rpartition(".")
        if path:
            skipped = name == "_orig_mod" or (name == "module" and parent in wrappers)
            paths[path] = paths[parent] if skipped else f"{paths[parent]}{name}."
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            wrappers.add(path)
        if isinstance(module, ParametrizationList) or (path and parent in parametrised):
            parametrised.add(path)
        found.append((paths[path], module, path in parametrised))
    return found


def _seen_from(path: str, depth: int) -> str:
    """The path, seen from below `depth` submodules called `module`."""
    while depth and path.startswith("module."):
        path, depth = path.removeprefix("module."), depth - 1
    return "^." * depth + path


def _is_one(old: Tensor, new: Tensor) -> bool:
    """Whether two plain tensors are one memory, seen alike."""
    return old.data_ptr() == new.data_ptr() and old.shape == new.shape and old.stride() == new.stride()


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where its numbers lie; its own name where that is not to be asked."""
    known = is_plain(tensor) and not tensor.is_meta and tensor.numel()
    return (tensor.data_ptr(), tensor.numel()) if known else (id(tensor), 0)


class Pairing:
    """An average beside an online module, tensor by tensor. It holds both, so it is made for the moment only.

    A parameter has its counterpart of the same shape, or it is an error. A buffer need not: forward passes let caches
    grow, size masks to the batch and register what was not there. `unlike` are the buffers that the average takes over
    at its next update, `lent` what the online model takes over where it is to carry the average.

    Parameters named in `common` were frozen when the average was made (`untrained`), and are one memory as long as they
    are (`frozen`). `trained` are those that no longer are; `astray` those that lie apart although frozen, or together
    although trained.
    """

    def __init__(
        self, average: nn.Module, online: nn.Module, buffers: Buffers, common: Collection[str] = (), *, blame: str
    ) -> None:
        self.sharded = [*_sharded_modules(average), *_sharded_modules(online)]
        for module in self.sharded:
            # A forward pass may leave whole weights in the place of shards. Those are copies: what is written there is
            # lost, and what is read there may be old.
            module.reshard()
        _check_initialised(blame, average)
        _check_initialised("model", online)
        self.average, self.online = Tree(average), Tree(online)
        self.averaged: list[tuple[Tensor, Tensor]] = []
        self.copied: list[tuple[Tensor, Tensor]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        self.shared: dict[str, Shared] = {}
        self.frozen: list[tuple[Tensor, Tensor]] = []
        self.untrained: list[Tensor] = []
        self.trained: set[str] = set()
        self.astray: list[str] = []
        self.unlike: list[str] = []
        self.lent: list[str] = []
        self._common = common
        self._frozen = buffers == "frozen"
        self._statistics: tuple[str, ...] = ()
        if buffers not in ("copy", "frozen"):
            self._statistics = tuple(f".{name}" for name in (*STATISTICS, *(() if buffers == "ema" else buffers)))
        self._pair_parameters(blame)
        self._pair_buffers(blame)
        # What is one memory moves once, as what is one tensor.
        self.averaged = list({(_memory(old), _memory(new)): (old, new) for old, new in self.averaged}.values())

    def _pair_parameters(self, blame: str) -> None:
        seen: dict[int, tuple[str, Tensor]] = {}
        for name in self.online.parameters | self.average.parameters:
            mine, theirs = self.average.find(name), self.online.find(name)
            old, new = mine and mine.tensor, theirs and theirs.tensor
            if mine is None or old is None:
                self._name_mismatch(blame, name, in_average=False)
            if theirs is None or new is None:
                self._name_mismatch(blame, name, in_average=True)
            if old.shape != new.shape:
                shapes = (tuple(old.shape), tuple(new.shape))
                expected, got = shapes if blame == "model" else shapes[::-1]
                wrong_value(blame, f"shape {expected} for {name!r}", str(got))
            if new.is_meta and not old.is_meta:
                wrong_value(blame, f"numbers in {name!r}", "none: it is on the device meta")
            common = name in self._common and self._in_common(name, old, new)
            if id(old) in seen:
                first, tied = seen[id(old)]
                if tied is not new:
                    wrong_value(blame, f"{name!r} and {first!r} tied as in the average", "two tensors")
                if first in self.shared:
                    self.shared[first].places.append((mine, theirs))
                continue
            if old is new:
                wrong_value(blame, "tensors of its own", f"{name!r} shared with the {_other(blame)}")
            seen[id(old)] = (name, new)
            if common:
                (self.frozen if _is_one(old, new) else self.written).append((old, new))
            elif self._place(name, old, new, "ema" if name in self.online.parameters else self._treatment(name)):
                self.written.append((old, new))
            else:
                self.shared[name] = Shared(old, new, [(mine, theirs)])
                self.lent.append(name)

    def _in_common(self, name: str, old: Tensor, new: Tensor) -> bool:
        """Whether a parameter that was frozen when the average was made is to be one memory now."""
        can = is_plain(old) and is_plain(new) and old.device == new.device
        can = can and name in self.average.parameters and name in self.online.parameters  # one may be a buffer by now
        self.untrained.append(new)
        if new.requires_grad:
            self.trained.add(name)
        if can and _is_one(old, new) == new.requires_grad:
            self.astray.append(name)
        return can and not new.requires_grad

    def _name_mismatch(self, blame: str, name: str, *, in_average: bool) -> NoReturn:
        """Say which of the two has the tensor `name` and which has not; `blame` is the argument that came."""
        other = _other(blame)
        average, online = (type(tree.root).__name__ for tree in (self.average, self.online))
        kinds = f"; the average is of {average}, the model is {online}: pass what was wrapped"
        if average == online:
            kinds = "; a model that was changed since needs a new average" if blame == "model" else ""
        if in_average == (blame == "model"):
            wrong_value(blame, f"a tensor {name!r} as in the {other}", f"none{kinds}")
        wrong_value(blame, f"no tensor {name!r}, which the {other} does not have", f"one{kinds}")

    def _pair_buffers(self, blame: str) -> None:
        for tree, argument in ((self.average, blame), (self.online, "model")):
            if not tree.tensors():
                wrong_type(argument, "a module with parameters or buffers", f"{type(tree.root).__name__} without any")
        seen: dict[int, tuple[str, Tensor]] = {}
        written: set[int] = set()
        for name in self.online.buffers | self.average.buffers:
            if name in self.online.parameters or name in self.average.parameters:
                continue
            mine, theirs = self.average.buffers.get(name), self.online.buffers.get(name)
            old, new = mine and mine.tensor, theirs and theirs.tensor
            treatment = self._treatment(name)
            if mine is None or theirs is None or old is None or new is None:
                path = name[: name.rfind(".") + 1]
                followed = path in self.average.modules and path in self.online.modules  # modules are each side's own
                if followed and (mine is None or theirs is None or old is not new):
                    self.lent.append(name)
                    self.unlike += [] if treatment == "frozen" else [name]
                continue
            if mine.owner is theirs.owner:
                wrong_value(blame, "tensors of its own", f"{name!r} shared with the {_other(blame)}")
            first, tied = seen.setdefault(id(old), (name, new))
            if tied is not new or not _fits(old, new):
                self.unlike += [] if treatment == "frozen" and old is not new else [name]
            elif first == name and not self._place(name, old, new, treatment):
                self.shared[name] = Shared(old, new, [(mine, theirs)])
            elif first in self.shared:
                self.shared[first].places.append((mine, theirs))
            if first in self.shared or not _fits(new, old) or not works("copy", new, old):
                self.lent.append(name)
            elif id(new) not in written:
                written.add(id(new))
                self.written.append((old, new))

    def _treatment(self, name: str) -> str:
        """What an update does with a floating buffer of this name."""
        if f".{name}".endswith(self._statistics):
            return "ema"
        # What belongs to a parametrised weight has to be of the same time as the parameters, which move.
        derived = name in self.average.derived or name in self.online.derived
        return "frozen" if self._frozen and not derived else "copy"

    def _place(self, name: str, old: Tensor, new: Tensor, treatment: str) -> bool:
        """Put a pair where an update finds it; False if no operation can write the one into the other."""
        if treatment == "ema" and is_averageable(old):
            if works("average", old, new):
                self.averaged.append((old, new))
                return True
            if new.requires_grad or name not in self.online.parameters:
                refuse_to_average(name, new, old)
            return False
        if treatment == "frozen" and is_averageable(old):
            return True
        if not works("copy", old, new):
            return False
        self.copied.append((old, new))
        return True

    def follow(self, dtype: Callable[[str, Tensor], torch.dtype], shares: dict[str, Share]) -> dict[str, Share]:
        """Give the average buffers like those of the online model, and anew what it shares with it and has changed."""
        devices = {new.device: old.device for old, new in self.averaged}

        def kind(name: str, old: Tensor | None, new: Tensor) -> tuple[torch.device, torch.dtype]:
            device = devices.get(new.device, new.device) if old is None else old.device
            return device, dtype(name, new)

        _take_over(self.average, self.online, self.unlike, kind)
        made: dict[int, Tensor] = {}
        for name in self.astray:
            new = self.online.parameters[name].tensor
            assert new is not None
            if id(new) not in made:
                own = new.detach().clone() if new.requires_grad else new.detach()
                made[id(new)] = nn.Parameter(own, requires_grad=False)
            self.average.parameters[name].put(made[id(new)])
        result = {}
        for name, shared in self.shared.items():
            share = shares.get(name)
            if share is None or not share.is_current(shared.old, shared.new):
                alias = _alias(shared.new, *kind(name, shared.old, shared.new))
                for mine, _ in shared.places:
                    mine.put(alias)
                share = Share(alias, shared.new)
            result[name] = share
        return result

    def lend(self) -> None:
        """Give the online model what of the average cannot be written into its own tensors."""
        devices = {old.device: new.device for old, new in self.averaged}
        dtypes = {old.dtype: new.dtype for old, new in self.averaged}

        def kind(_: str, new: Tensor | None, old: Tensor) -> tuple[torch.device, torch.dtype]:
            device = devices.get(old.device, old.device) if new is None else new.device
            return device, new.dtype if new is not None and _same_kind(new, old) else dtypes.get(old.dtype, old.dtype)

        _take_over(self.online, self.average, [name for name in self.lent if name not in self.shared], kind)
        for name, shared in self.shared.items():
            alias = _alias(shared.old, *kind(name, shared.new, shared.old))
            for _, theirs in shared.places:
                theirs.put(alias)


def _take_over(
    target: Tree,
    source: Tree,
    names: list[str],
    kind: Callable[[str, Tensor | None, Tensor], tuple[torch.device, torch.dtype]],
) -> None:
    """Give `target` buffers of its own like those of `source`, or none where that has none."""
    made: dict[int, Tensor] = {}
    for name in names:
        path, dot, key = name.rpartition(".")
        mine, theirs = target.buffers.get(name), source.buffers.get(name)
        owner = target.modules[path + dot] if mine is None else mine.owner
        if theirs is None:
            owner._buffers.pop(key, None)
            owner._non_persistent_buffers_set.discard(key)
            continue
        old, new = mine and mine.tensor, theirs.tensor
        if new is not None and id(new) not in made:
            own = old.detach().clone() if old is not None and _alike(old, new) else None
            if own is not None and works("copy", own, new):
                made[id(new)] = own  # its own values go on, in a tensor that can be written to
            else:
                made[id(new)] = cast(new.detach(), *kind(name, old, new)).clone()
        vars(owner).pop(key, None)  # a plain attribute, which would hide the buffer
        owner._buffers[key] = None if new is None else made[id(new)]
        change = owner._non_persistent_buffers_set
        (change.add if key in theirs.owner._non_persistent_buffers_set else change.discard)(key)


class Shared(NamedTuple):
    """Two tensors that no operation can average or write into, and where they are held: in places that tie them."""

    old: Tensor
    new: Tensor
    places: list[tuple[Slot, Slot]]


class Share:
    """What the average has from the online model as it is, and the state of that when it took it."""

    def __init__(self, tensor: Tensor, online: Tensor) -> None:
        self.tensor = tensor
        self._parts = parts(online)  # held, for what is gone could lend its address to something new
        self._state = _state(online)

    def is_current(self, average: Tensor, online: Tensor) -> bool:
        """Whether the average still holds it, and nobody has replaced or written to what it came from."""
        return self.tensor is average and _state(online) == self._state


def parts(tensor: Tensor) -> list[Tensor]:
    """The tensor and, of a subclass such as a quantised one, the tensors that it is made of."""
    inner = [value for value in vars(tensor).values() if isinstance(value, Tensor)]
    return [tensor, *(part for value in inner for part in parts(value))]


def _state(tensor: Tensor) -> list[tuple[int, ...]]:
    def state(part: Tensor) -> tuple[int, ...]:
        version = 0 if part.is_inference() else part._version
        return id(part), version, part.data_ptr() if is_plain(part) else 0, part.requires_grad

    return [state(part) for part in parts(tensor)]


def _alias(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Another tensor over the same memory, or over a copy where it is to have another device or dtype."""
    alias = copy.copy(tensor if (tensor.device, tensor.dtype) == (device, dtype) else cast(tensor, device, dtype))
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def cast(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """`tensor.to`; a quantised tensor that knows no other dtype keeps its own."""
    try:
        return tensor.to(device=device, dtype=dtype)
    except (NotImplementedError, TypeError):
        return tensor.to(device=device)


def is_plain(tensor: Tensor) -> bool:
    """Neither a subclass, such as a DTensor, nor sparse."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def is_averageable(tensor: Tensor) -> bool:
    """Of numbers that have a mean of their own dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


_TRIED: dict[tuple[object, ...], bool] = {}


def works(operation: Literal["average", "copy"], old: Tensor, new: Tensor) -> bool:
    """Whether an update can write to an average's tensor: many subclasses do not know how.

    It is tried once for each kind of tensors, with a copy.
    """
    if is_plain(old) and is_plain(new):
        return not _overlaps(old)
    kind = (operation, *((type(tensor), tensor.dtype, tensor.layout) for tensor in (old, new)))
    if kind not in _TRIED:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if operation == "copy":
                    torch._foreach_copy_([old.clone()], [new])
                else:
                    lerp_([old.clone()], [new.to(device=old.device, dtype=old.dtype)], 0.5)
                _TRIED[kind] = True
            except torch.OutOfMemoryError:
                raise
            except Exception:  # each subclass has its own
                _TRIED[kind] = False
    return _TRIED[kind]


def refuse_to_average(name: str, tensor: Tensor, average: Tensor | None = None) -> NoReturn:
    """Say which tensor has no average, or none of that type."""
    got = f"{name!r} of type {type(tensor).__name__}"
    if average is not None and type(average) is not type(tensor):  # a shard, and one that is whole
        got += f" beside an average of type {type(average).__name__}"
    wrong_type("model", "tensors that can be averaged or that require no gradient", got)


def _fits(target: Tensor, source: Tensor) -> bool:
    """Whether a buffer can take the values of another where it is."""
    return target is not source and not target.is_inference() and not _overlaps(target) and _alike(target, source)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Of the same shape and kind, so that one can have the values of the other."""
    return (
        one.shape == other.shape
        and _same_kind(one, other)
        and one.layout == other.layout
        and (one.layout == torch.strided or one._nnz() == other._nnz())
    )


def _same_kind(one: Tensor, other: Tensor) -> bool:
    """Both floating, both complex, or of the same dtype: an average has its own precision."""
    if is_averageable(one):
        return is_averageable(other) and one.is_complex() == other.is_complex()
    return one.dtype == other.dtype


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements lie in one place, as after `expand`, so that nothing can be written there."""
    layout = zip(tensor.shape, tensor.stride(), strict=True) if is_plain(tensor) else ()
    return any(size > 1 and step == 0 for size, step in layout)


def _check_initialised(name: str, module: nn.Module) -> None:
    """A module whose tensors all exist."""
    for path, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            wrong_value(name, "initialised parameters (run a forward pass first)", f"lazy {path!r}")


def _sharded_modules(module: nn.Module) -> list[Any]:
    """Those that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # an import would take a second, for nothing if none was made
    return [] if fsdp is None else [child for child in module.modules() if isinstance(child, fsdp.FSDPModule)]


def _other(blame: str) -> str:
    """The side of a comparison that is not the argument `blame`."""
    return "average" if blame == "model" else "model"
