"""A moving average of any module, kept as a module of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import TypeVar, override

from momentum_distill._checks import (
    check_bool,
    check_choice,
    check_device_name,
    check_module,
    check_number,
    describe,
    wrong_type,
    wrong_value,
)
from momentum_distill._ema_copy import check_python, deepcopy, unshare
from momentum_distill._ema_pairs import Buffers, Pairing, Tree, cast, is_averageable, is_plain, parts
from momentum_distill._ema_plan import Plan
from momentum_distill._group import Group, check_group, find_ranks, require_in_sync
from momentum_distill._precision import WideModule, is_16_bit, wide_dtype
from momentum_distill._typing import HasForward, P, R_co
from momentum_distill._watch import UpdateWatch, warn
from momentum_distill.schedules import Schedule, pack, unpack

Decay: TypeAlias = float | Callable[[int], float]

BUFFERS = ("copy", "ema", "frozen")

M_co = TypeVar("M_co", bound=nn.Module, covariant=True, default=nn.Module)


class EMAWrapper(WideModule, Generic[M_co]):
    r"""An exponential moving average of a module: the momentum model (Eq. 6). Buffers are copied by default.

    $$\theta_{ema} \leftarrow \eta\,\theta_{ema} + (1-\eta)\,\theta_{online}$$

    The average starts as a copy of `model` and moves at each :meth:`update`. It never requires grad, stays in `mode`
    whatever `.train()` a parent module gets, is updated in place, and keeps no hold on `model`: optimizers, DDP and
    `state_dict` see the averaged tensors only. Tensors are matched by name; prefixes that wrappers add (`module.`,
    `_orig_mod.`) do not count, and tied tensors are averaged once.

    Parameters that cannot be averaged and require no gradient, as those of a quantised base, are shared with `model`
    and taken anew at the first update after a change. Buffers may change in any way between updates, as caches do.

    Generic in the type of the model: to a type checker `module` is an `Encoder` in an `EMAWrapper[Encoder]`, and a call
    takes and returns what `Encoder.forward` does.

    An average that is called 500 times in training and never updated warns once. A training is where gradients are
    enabled and `model` is in training mode, or where `model` has changed since the last call.

    Args:
        model: The online module; may be wrapped by DDP, DataParallel or torch.compile.
        decay: Share $\eta$ that the average keeps at an update, a number in [0, 1], or a function from the number of
            updates made so far (0 at the first) to such a number, for warm-up or a cosine. Paper and ALBEF: 0.995.
            1.0 says that the average is to stay as it is. A schedule of `momentum_distill.schedules` is saved with the
            average; where it is loaded, a number gives way to it, another function stays, and the next update warns.
        buffers: What an update does with floating buffers. `"copy"` (default): they become those of `model`, in shape
            and absence too. `"ema"`: statistics are averaged, that is those called `running_mean` or `running_var`, as
            normalisation layers have them; the rest is copied, for the mean of two unit vectors is shorter than they.
            A list of names, such as `["center"]` or `["head.center"]`: these are averaged as well. An average begins
            anew where a shape is new. `"frozen"`: those of the average stay, but for what belongs to a parametrised
            weight (spectral norm, pruning), which has to follow the parameters and is copied. Integers and bools are
            always copied, under `"frozen"` as long as they keep their shape.
        dtype: Floating dtype of the average, 32 bits or more. By default that of the model, and float32 where the model
            has 16 bits: in 16 bits an average stands still, for its steps are smaller than the spacing of the numbers.
        device: Where the average lives; by default beside the model.
        mode: `"eval"` (default: no dropout, BatchNorm uses its statistics) or `"train"`.
        teacher: A ready module to hold the average in, for models that cannot be deep-copied (FSDP2: build a second one
            and shard it alike). Its weights are where the average starts; `update(model, decay=0.0)` copies.
        hooks: Which forward and backward hooks of `model` the copy gets. `"drop"` (default): none that is a function of
            yours. It would be the very same function: one that keeps features of `model` would fire for the average as
            well, and keep those instead. `"keep"`: all, as `copy.deepcopy` does; needed where such a function changes
            an output. Pre-forward hooks come along either way, for they make weights (older norms, pruning) and inputs;
            so do methods and objects, each copied, and the hooks of torch itself. Hooks for the average alone are
            registered on `ema.module`.
        share_frozen: Whether parameters of `model` that require no gradient now, as those of a frozen encoder or of
            the base below LoRA adapters, are shared with it: one memory, in the dtype of the model, which no update
            reads or writes. Buffers beside them keep their dtype, too. What is written there reaches both, inside a
            `swap` as well. Where the two were moved, cast or loaded apart, they are one again at the next update. (Load
            into the average, not its `module`.) One that is trained later becomes the average's own at the next update,
            from its value then. Where some have 16 bits, inputs are not widened, and what is averaged meets them in
            float32: a model that does not cast between them needs autocast. Tensor subclasses, and an average on
            another device, have copies. Excludes `teacher` and `dtype`.

    Raises:
        TypeError: If an argument has the wrong type; `model` cannot be deep-copied and no `teacher` is given; it is a
            `torch.jit.ScriptModule`, or has no parameter and no buffer (as after `quantize_dynamic`); or a parameter
            that requires a gradient is of a tensor type that cannot be averaged.
        ValueError: If a number or choice is wrong, a name in `buffers` is none, `model` has uninitialised (lazy)
            parameters or buffers, `teacher` does not match its parameters by names and shapes, or `share_frozen` stands
            beside `teacher` or `dtype`.

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

    module: M_co
    """The averaged module."""

    _common: frozenset[str] = frozenset()
    """Names of the parameters that the average has in common with the model as long as that does not train them."""

    _differing: tuple[Schedule, Decay, Decay] | None = None
    """The schedule that was loaded, the decay it was built with, and which of the two it has, until that is told."""

    if TYPE_CHECKING:

        def __call__(  # `HasForward` is no nn.Module, and need not be one for the types to be found
            self: EMAWrapper[HasForward[P, R_co]],  # type: ignore[type-var] # pyright: ignore[reportInvalidTypeArguments]
            *args: P.args,
            **kwargs: P.kwargs,
        ) -> R_co: ...

    def __init__(
        self,
        model: M_co,
        *,
        decay: Decay = 0.995,
        buffers: Buffers = "copy",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mode: Literal["eval", "train"] = "eval",
        teacher: nn.Module | None = None,
        hooks: Literal["drop", "keep"] = "drop",
        share_frozen: bool = False,
    ) -> None:
        super().__init__()
        check_python("model", model)
        if not callable(decay):
            if decay is None or isinstance(decay, str):
                wrong_type("decay", "a number, a schedule of momentum_distill.schedules or a function", describe(decay))
            check_number("decay", decay, low=0.0, high=1.0)
        buffers = _checked_buffers(buffers, model)
        check_choice("mode", mode, ("eval", "train"))
        check_choice("hooks", hooks, ("drop", "keep"))
        check_bool("share_frozen", share_frozen)
        if share_frozen and (teacher is not None or dtype is not None):
            wrong_value("share_frozen", "False beside `teacher` and `dtype`", "True")
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
        self._online: Callable[[], nn.Module | None] = ref(model)
        self._watch = UpdateWatch(NEVER_UPDATED, patience=500)  # several calls make a step
        if decay == 1:
            self._watch.stop()
        check_device_name(device)
        self.dtype = dtype
        if share_frozen:
            slots = Tree(model).parameters.items()
            self._common = frozenset(name for name, slot in slots if (t := slot.tensor) is not None and _is_frozen(t))
        average: Any
        if teacher is None:
            name, average = "model", deepcopy(model, hooks, self._common)
        else:
            check_python("teacher", teacher)
            name, average = "teacher", teacher
        # Refuses a mismatch before anything is changed.
        Pairing(average, model, self.buffers_mode, self._common, blame=name)
        self.module = average
        self._recast(device)
        self.module.requires_grad_(False)
        self.module.zero_grad(set_to_none=True)
        self.train()
        self.register_load_state_dict_pre_hook(_unshare)  # type: ignore[no-untyped-call]
        self.register_state_dict_post_hook(_save_apart)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_restore_precision)  # type: ignore[no-untyped-call]

    @property
    def step(self) -> int:
        """How many updates were made; part of the state."""
        return self._step

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's output, without gradient.

        The average is never in 16 bits, so 16-bit floating inputs are widened to float32, but where it shares 16-bit
        weights (`share_frozen`); with a `dtype` given, floating inputs are cast to it.

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
        if not torch.compiler.is_compiling() and not self._watch.done and (model := self._online()) is not None:
            trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
            self._watch.look(trained, training=model.training and torch.is_grad_enabled())
        with torch.no_grad():
            args, kwargs = tree_map(self._recast_input, (args, kwargs))
            return self.module(*args, **kwargs)

    def _recast_input(self, value: Any) -> Any:  # noqa: ANN401 - a leaf of any pytree
        """A floating tensor in the dtype the average reads; anything else as it is."""
        if not isinstance(value, Tensor) or (dtype := wide_dtype(value, self.dtype)) == value.dtype:
            return value
        narrow = self._common and any(is_16_bit(parameter.dtype) for parameter in self.module.parameters())
        return value if narrow else value.to(dtype)

    @torch.inference_mode()
    def update(self, model: nn.Module, *, decay: float | None = None) -> None:
        """Move the average one step towards `model`; call it once after each optimizer step.

        Args:
            model: The online module, as at construction or another of the same names and shapes.
            decay: Overrides the decay for this update, in [0, 1]; 0 copies.

        Raises:
            TypeError: If `model` is not a module, or a decay not a number.
            ValueError: If a decay is not in [0, 1], or a parameter of `model` is missing, unexpected or of another
                shape; the message names the first. The average is then unchanged.
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
        check_module("model", model)
        decay = self._next_decay(decay)
        plan = self._match(model, follow=True)
        for group in plan.averages:
            group.lerp(decay)
        for group in plan.copies:
            group.copy()
        self._count_update()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averaged weights and buffers into `model`, in the dtypes and on the devices of `model`.

        Buffers that do not fit become others: `model` has those of the average afterwards.

        Args:
            model: A module of the same names and shapes.

        Raises:
            TypeError: If `model` is not a module.
            ValueError: If a parameter of `model` is missing, unexpected or of another shape.

        Example:
            >>> import torch
            >>> ema, deployed = EMAWrapper(torch.nn.Linear(3, 2)), torch.nn.Linear(3, 2)
            >>> ema.copy_to(deployed)
            >>> bool((deployed.weight == ema.module.weight).all())
            True
        """
        check_module("model", model)
        plan = self._match(model)
        with torch.inference_mode(False), torch.no_grad():
            pairs = self._lend(model, plan)
        for average, online in pairs:
            online.copy_(average)
        torch.clear_autocast_cache()

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Inside the context `model` carries the averaged weights and buffers; its own come back on exit, bit for bit.

        They come back after an exception too. `model.state_dict()` inside holds the averaged weights.

        What `model` carries is a copy: the average is still there for `ema(...)`, and whatever is done to the tensors
        of `model` inside (a step of an optimizer, `load_state_dict`, a cache that grows) does not reach it and is
        undone on exit, but for what is written into memory that the two share (`share_frozen`). On CPU the model's own
        storage is set aside meanwhile, which takes one copy instead of three; views of its weights made outside keep
        showing the model's own values then. Tensors on other devices keep their place, for captured graphs and
        flattened RNN weights, and so do tensor subclasses and tensors that share their storage: all these are copied
        back and forth. Buffers of another shape than the average's, and quantised weights, are exchanged for other
        tensors.

        Args:
            model: The online module.

        Raises:
            TypeError: If `model` is not a module.
            ValueError: If a parameter of `model` is missing, unexpected or of another shape.
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
        check_module("model", model)
        if self._swapped:
            raise RuntimeError("swap: expected a call outside swap(), got one inside it")
        plan = self._match(model)
        registries = [_Registry(module, lends=plan.lends) for module in plan.online_modules()]
        moved, apart, copied = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor, Tensor | None]]()
        self._swapped = True
        try:
            with torch.inference_mode(False), torch.no_grad():
                pairs = self._lend(model, plan)
            with torch.no_grad():
                movable = _movable([online for _, online in pairs])
                moving = [pair for pair, moves in zip(pairs, movable, strict=True) if moves]
                others = [pair for pair, moves in zip(pairs, movable, strict=True) if not moves]
                values = [torch.empty_like(online) for _, online in moving]
                if values:
                    torch._foreach_copy_(values, [average for average, _ in moving])
                apart = [online.detach() for _, online in moving]
                copied = [(online, online.detach(), online.clone()) for _, online in others]
                copied += [(online, online.detach(), None) for online in plan.frozen]
                moved = [online for _, online in moving]
                _move(moved, values)
                for average, online in others:
                    online.copy_(average)
            torch.clear_autocast_cache()  # of the model's own weights in 16 bits, and below of these
            yield
        finally:
            self._swapped = False
            plan.reshard()
            _move(moved, apart)
            torch.clear_autocast_cache()
            _cast_back(model, [(online, place) for online, place, _ in copied])
            with torch.no_grad():
                for online, place, value in copied:
                    if is_plain(online) and _place(online) != _place(place):  # it was cast or moved meanwhile
                        online.data = place
                    if value is not None:
                        online.copy_(value)
            for registry in registries:
                registry.restore()

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
        whole = {}
        for name, tensor in Tree(self.module).tensors().items():
            for index, part in enumerate(_local_parts(tensor)):
                whole[f"{name}, part {index}" if index else name] = part
        step = torch.tensor(self._step, device="cpu")
        require_in_sync(find_ranks(group), {**whole, "number of updates": step}, what="EMAWrapper")

    @override
    def train(self, mode: bool = True) -> EMAWrapper[M_co]:
        """Keep the averaged module in `mode`, whatever a parent's `.train()` or `.eval()` asks for."""
        del mode
        keep = self.mode == "train"
        self.training = keep
        self.module.train(keep)
        return self

    def _next_decay(self, decay: float | None) -> float:
        """That of the update that is to be made."""
        if self._swapped:
            raise RuntimeError("update: expected a call outside swap(), got one inside it")
        if decay is None:
            decay = self.decay(self._step) if callable(self.decay) else self.decay
        check_number("decay", decay, low=0.0, high=1.0)
        return float(decay)

    def _count_update(self) -> None:
        self._step += 1
        self._watch.stop()
        if self._differing is not None:
            saved, given, chosen = self._differing
            self._differing = None
            if self.decay is chosen:
                warn(
                    f"EMAWrapper goes on with decay={chosen}: the state that was loaded has {saved}, and it was built "
                    f"with {given}. Build it with the one that is meant, or assign it to `decay` after loading"
                )

    def _match(self, model: nn.Module, *, follow: bool = False) -> Plan:
        """The plan for `model`, made anew when one of its or our tensors is another object than before.

        With `follow` the average first gets what it is to take over from `model` as it is: see `Pairing`.
        """
        plan = self._plans.get(model)
        if plan is not None:
            plan.reshard()  # whole weights are other tensors, for which the plan would not be current
        if plan is None or not plan.is_current() or (follow and plan.behind):
            pairing = self._pair(model)
            shares = plan.shares if plan is not None else {}
            if follow and (pairing.unlike or pairing.shared or pairing.trained or pairing.astray):
                with torch.inference_mode(False), torch.no_grad():
                    self._common -= pairing.trained
                    shares = pairing.follow(self._dtypes(), shares)
                    if pairing.trained or pairing.astray:
                        self._recast(like=model)
                pairing = self._pair(model)
            plan = self._plans[model] = Plan(pairing, shares)
        return plan

    def _lend(self, model: nn.Module, plan: Plan) -> list[tuple[Tensor, Tensor]]:
        """Pairs of average and online tensors to write into; what cannot be written is in its place by then."""
        if not plan.lends:
            return plan.written
        self._pair(model).lend()
        return self._pair(model).written

    def _pair(self, model: nn.Module) -> Pairing:
        """The average and `model`, tensor by tensor."""
        return Pairing(self.module, model, self.buffers_mode, self._common, blame="model")

    def _dtypes(self, like: nn.Module | None = None) -> Callable[[str, Tensor], torch.dtype]:
        """Which dtype a tensor of the average is to have, by its name and what it is of."""
        kept, theirs = Tree(self.module).frozen(self._common), {} if like is None else Tree(like).tensors()
        return lambda name, own: theirs.get(name, own).dtype if name in kept else wide_dtype(own, self.dtype)

    def _recast(self, device: torch.device | str | None = None, like: nn.Module | None = None) -> None:
        """Give every floating tensor of the average the dtype it is to have, and move it where `device` says.

        What stands with shared weights has that of the model `like`, or if there is none its own.
        """
        dtype_of, tensors = self._dtypes(like), Tree(self.module).tensors()
        dtypes = {id(tensor): dtype_of(name, tensor) for name, tensor in tensors.items()}
        if device is not None or any(dtypes[id(tensor)] != tensor.dtype for tensor in tensors.values()):

            def recast(tensor: Tensor) -> Tensor:
                return cast(tensor, device, dtypes.get(id(tensor), wide_dtype(tensor, self.dtype)))

            self.module._apply(recast)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------------------------------------- state

    @override
    def get_extra_state(self) -> Tensor:
        """The number of updates, without which a decay schedule would start again, and the schedule if it has one."""
        return pack(self._step, self.decay)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self._step, saved = unpack(state)
        if self._step:
            self._watch.stop()
        self._differing = None
        if saved is not None and saved != self.decay:
            given = self.decay
            self.decay = given if callable(given) else saved
            self._differing = saved, given, self.decay

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": None, "_online": None, "_swapped": False}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plans = WeakKeyDictionary()
        self._online = type(None)

    @override
    def extra_repr(self) -> str:
        decay = self.decay if callable(self.decay) else f"{self.decay:g}"
        return f"decay={decay}, buffers={self.buffers_mode!r}, mode={self.mode!r}, step={self._step}"


NEVER_UPDATED = (
    "EMAWrapper was called {} times in training and never updated: call update(model) after each optimizer step, "
    "or pass decay=1.0 if it is to stay as it is"
)


def _checked_buffers(buffers: object, model: nn.Module) -> Buffers:
    """One of the three words, or names of floating buffers that `model` has, without what wrappers put before them."""
    if isinstance(buffers, str) or not isinstance(buffers, Sequence):
        if buffers not in BUFFERS:
            wrong_value("buffers", "'copy', 'ema', 'frozen' or a list of names of buffers", describe(buffers))
        return buffers  # type: ignore[return-value]  # one of the words
    slots = Tree(model).buffers
    averageable = [f".{name}" for name, slot in slots.items() if slot.tensor is None or is_averageable(slot.tensor)]
    names = []
    for each in buffers:
        if not isinstance(each, str):
            wrong_type("buffers", "names that are strings", describe(each))
        name = ".".join(part for part in each.split(".") if part != "_orig_mod")
        while name and not any(known.endswith(f".{name}") for known in averageable):
            name = name.removeprefix("module.") if name.startswith("module.") else ""
        if not name:
            wrong_value("buffers", "names of floating buffers of the model", repr(each))
        names.append(name)
    return tuple(names)


def _local_parts(tensor: Any) -> list[Tensor]:  # noqa: ANN401 - a Tensor, or a DTensor, whose import takes a second
    """What this process holds of the tensor, none if that is a part of it only, as of a sharded DTensor."""
    if hasattr(tensor, "placements"):
        return [tensor.to_local()] if all(placement.is_replicate() for placement in tensor.placements) else []
    return [part for part in parts(tensor) if is_plain(part)] or [tensor.to_dense()]


def _cast_back(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Give subclasses their dtype and device again, which a cast exchanges in place, the way that took them."""
    kinds: dict[int, tuple[torch.device, torch.dtype]] = {}
    for online, place in pairs:
        kind = place.device, place.dtype
        if not is_plain(online) and (online.device, online.dtype) != kind:
            kinds |= {id(tensor): kind for tensor in (online, online.grad) if tensor is not None}
    if kinds:
        model._apply(lambda x: x.to(*kinds[id(x)]) if id(x) in kinds else x)  # type: ignore[no-untyped-call]


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr()


class _Registry:
    """What a module holds by which names, and which of its buffers are not saved.

    Its plain attributes too where the model is lent buffers, for one may stand in the place of an attribute.
    """

    def __init__(self, module: nn.Module, *, lends: bool) -> None:
        self.module = module
        self.attributes = vars(module).copy() if lends else {}
        self.parameters: dict[str, Any] = module._parameters.copy()
        self.buffers: dict[str, Any] = module._buffers.copy()
        self.passing = module._non_persistent_buffers_set.copy()

    def restore(self) -> None:
        """Let the module hold the tensors of then, in the order of then."""
        module = self.module
        for name, parameter in self.parameters.items():
            if module._parameters.get(name) is not parameter:
                setattr(module, name, parameter)  # so that an RNN, which keeps a list of them, hears of it
        pairs: Any = ((module._parameters, self.parameters), (module._buffers, self.buffers))
        for now, before in pairs:
            if now or before:
                now.clear()
                now.update(before)
        if module._non_persistent_buffers_set != self.passing:
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(self.passing)
        if self.attributes:
            vars(module).update({name: self.attributes[name] for name in self.attributes.keys() - vars(module).keys()})


def _movable(tensors: list[Tensor]) -> list[bool]:
    """Which tensors can be given another storage: plain ones on CPU, each alone in its own."""
    storages = [tensor.untyped_storage() if is_plain(tensor) and tensor.is_cpu else None for tensor in tensors]
    places = [None if storage is None else storage.data_ptr() for storage in storages]
    users = Counter(places)
    return [
        storage is not None and users[place] == 1 and storage.nbytes() == tensor.nbytes and not storage.is_shared()
        for tensor, storage, place in zip(tensors, storages, places, strict=True)
    ]


def _move(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Give each tensor the storage of its value."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = value
    torch.autograd.graph.increment_version(tensors)  # a graph made before or inside must not go on with them


def _is_frozen(tensor: Tensor) -> bool:
    """Of a kind that the average can have in common with the model."""
    return is_plain(tensor) and not tensor.requires_grad


def _unshare(ema: EMAWrapper, *_: object) -> None:
    """Before `load_state_dict` writes into the average."""
    unshare(ema.module, ema._common)


def _save_apart(ema: EMAWrapper, state: dict[str, Any], prefix: str, _: object) -> None:
    """In the state of model and average together: of what is one memory, safetensors drops a name, or refuses it."""
    if prefix and ema._common:
        shared = {t.data_ptr() for name, t in Tree(ema.module).tensors().items() if name in ema._common}
        for key, value in state.items():
            if key.startswith(prefix) and type(value) is Tensor and value.data_ptr() in shared:
                state[key] = value.clone()


def _restore_precision(ema: EMAWrapper, _: object) -> None:
    """After `load_state_dict(..., assign=True)` the tensors are the checkpoint's own: widen and freeze them again."""
    ema._recast()
    ema.module.requires_grad_(False)
