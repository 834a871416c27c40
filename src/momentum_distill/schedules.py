r"""Decays of an average over time, for `EMAWrapper(decay=...)`: functions of $t$, the number of updates made so far.

Each is a small frozen object: it prints as the call that makes it, compares equal, pickles, and is saved with the
average. :func:`post_hoc_average` makes an average of any length from snapshots of averages of other lengths.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import check_int, check_number, describe, wrong_type, wrong_value
from momentum_distill._ema_pairs import STATISTICS

__all__ = ["Cosine", "HalfLife", "PowerFunction", "Scaled", "WarmUp", "post_hoc_average"]

NARROWEST, WIDEST = 1e-6, 12**-0.5
"""Relative widths of power functions; the widest is the mean over the whole training, of power 0."""


class Schedule:
    """What all have in common."""

    def __call__(self, step: float) -> float:
        """The decay of the update before which `step`, at least 0, were made."""
        check_number("step", step, low=0.0)
        return self._at(step)

    def _at(self, step: float) -> float:
        raise NotImplementedError

    def _set(self, **fields: object) -> None:
        """Fields in the type that prints alike for equal ones."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""From `start` to `end` along half a cosine, and `end` from then on: the decay of BYOL and DINO.

    $$\eta_t = \eta_{end} - (\eta_{end} - \eta_{start})\,\tfrac12\big(1 + \cos(\pi \min(t / T, 1))\big)$$

    Args:
        steps: $T$, the updates of the whole training, at least 1. With an `end` of 1 the average stands still after it.
        start: Decay at the first update, in [0, 1].
        end: Decay after `steps` updates, in [0, 1].

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> schedule = Cosine(1000)
        >>> schedule
        Cosine(steps=1000, start=0.996, end=1.0)
        >>> [round(schedule(step), 4) for step in (0, 500, 1000, 2000)]
        [0.996, 0.998, 1.0, 1.0]

    References:
        BYOL (Grill et al., 2020), Section 3.3.
    """

    steps: int
    _: KW_ONLY
    start: float = 0.996
    end: float = 1.0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, minimum=1)
        check_number("start", self.start, low=0.0, high=1.0)
        check_number("end", self.end, low=0.0, high=1.0)
        self._set(start=float(self.start), end=float(self.end))

    def _at(self, step: float) -> float:
        left = (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2
        return self.end - (self.end - self.start) * left


@dataclass(frozen=True)
class WarmUp(Schedule):
    r"""Low at first, so that the average soon forgets the random start, then `decay`.

    $$\eta_t = \min\Big(\eta,\; 1 - \Big(1 + \frac{t + 1}{\gamma}\Big)^{-p}\Big)$$

    The default is TensorFlow's, $(1 + t) / (10 + t)$, which looks back over a ninth of the updates made and so comes to
    0.995 after 1,790. Timm's and ema-pytorch's is `WarmUp(decay, inv_gamma=1, power=2 / 3)`, an
    update later (timm's, counted from step 0, two): they copy before.

    Args:
        decay: $\eta$, in [0, 1], or another schedule of this module.
        inv_gamma: $\gamma$, positive, by the name that it has in those libraries.
        power: $p$, positive. The higher, the sooner it comes to `decay`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> schedule = WarmUp(0.995)
        >>> [round(schedule(step), 3) for step in (0, 10, 100, 10_000)]
        [0.1, 0.55, 0.918, 0.995]

    References:
        TensorFlow (2015), `tf.train.ExponentialMovingAverage(num_updates=...)`.
    """

    decay: float | Schedule
    _: KW_ONLY
    inv_gamma: float = 9.0
    power: float = 1.0

    def __post_init__(self) -> None:
        check_number("inv_gamma", self.inv_gamma, low=0.0, open_low=True)
        check_number("power", self.power, low=0.0, open_low=True)
        self._set(decay=_checked(self.decay), inv_gamma=float(self.inv_gamma), power=float(self.power))

    def _at(self, step: float) -> float:
        return min(_value(self.decay, step), 1 - math.pow(1 + (step + 1) / self.inv_gamma, -self.power))


@dataclass(frozen=True)
class HalfLife(Schedule):
    r"""The constant decay after whose half-life an old weight counts half, whatever the batch size.

    $$\eta = 2^{-B / H}$$

    Args:
        half_life: $H$, positive: in updates, or in samples if `batch_size` says how many an update sees.
        batch_size: $B$, positive: the samples of one update, over all accumulated batches and all processes.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is not positive.

    Example:
        >>> round(HalfLife(1000)(0), 6), round(HalfLife(64_000, batch_size=64)(0), 6)
        (0.999307, 0.999307)
        >>> round(HalfLife(64_000, batch_size=256)(0), 6)  # four times the batch
        0.997231

    References:
        The rule is that of :class:`Scaled`; EDM2 (Karras et al., 2024) and others give half-lives in samples.
    """

    half_life: float
    _: KW_ONLY
    batch_size: float = 1.0

    def __post_init__(self) -> None:
        check_number("half_life", self.half_life, low=0.0, open_low=True)
        check_number("batch_size", self.batch_size, low=0.0, open_low=True)
        self._set(half_life=float(self.half_life), batch_size=float(self.batch_size))

    def _at(self, step: float) -> float:
        del step
        return math.pow(2.0, -self.batch_size / self.half_life)


@dataclass(frozen=True)
class Scaled(Schedule):
    r"""A decay that was chosen for another batch size: the average looks back over as many samples as it did there.

    $$\eta'_t = (\eta_{\kappa t})^{\kappa}$$

    An update here stands for $\kappa$ of those that the decay was chosen for. A :class:`PowerFunction` needs no
    scaling, for its length is a share of the training.

    Args:
        decay: $\eta$ as chosen, in [0, 1], or another schedule of this module, its steps as chosen too.
        kappa: $\kappa$, positive: samples of an update here to those it was chosen for, accumulated ones included.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> Scaled(0.996, kappa=4)(0) == 0.996**4
        True
        >>> Scaled(Cosine(1000), kappa=4)(250)
        1.0

    References:
        How to Scale Your EMA (Busbridge et al., 2023), Definition 1.2.
    """

    decay: float | Schedule
    _: KW_ONLY
    kappa: float

    def __post_init__(self) -> None:
        check_number("kappa", self.kappa, low=0.0, open_low=True)
        self._set(decay=_checked(self.decay), kappa=float(self.kappa))

    def _at(self, step: float) -> float:
        return math.pow(_value(self.decay, self.kappa * step), self.kappa)


@dataclass(frozen=True)
class PowerFunction(Schedule):
    r"""An average whose length grows with the training and is always the same share of it; the first update copies.

    $$\eta_t = \Big(1 - \frac1{t+1}\Big)^{\gamma + 1}, \qquad
      \sigma_{rel}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}$$

    After $n$ updates the weights of the $s$th count $(s^{\gamma+1} - (s-1)^{\gamma+1}) / n^{\gamma+1}$, and the random
    start does not.

    Args:
        sigma_rel: $\sigma_{rel}$, standard deviation of that profile as a share of the training, at least 1e-6 and at
            most $1/\sqrt{12}$, the mean of all. The paper takes snapshots of 0.05 and 0.10.

    Raises:
        TypeError: If `sigma_rel` is not a number.
        ValueError: If it is out of range.

    Example:
        >>> schedule = PowerFunction(0.1)
        >>> [round(schedule(step), 3) for step in (0, 10, 100, 1000)]
        [0.0, 0.469, 0.924, 0.992]
        >>> round(schedule.gamma, 3)
        6.937

    References:
        EDM2 (Karras et al., 2024), Eq. 4 and 5 and Appendix C.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        check_number("sigma_rel", self.sigma_rel, low=NARROWEST, high=WIDEST)
        self._set(sigma_rel=float(self.sigma_rel))

    @property
    def gamma(self) -> float:
        r"""The power $\gamma$, at least 0."""
        return _gamma(self.sigma_rel)

    def _at(self, step: float) -> float:
        return math.pow(step / (step + 1), self.gamma + 1)


def _value(decay: float | Schedule, step: float) -> float:
    return decay._at(step) if isinstance(decay, Schedule) else decay


def _checked(decay: object) -> float | Schedule:
    """A number in [0, 1] or a schedule: what can be saved."""
    if isinstance(decay, Schedule):
        return decay
    if callable(decay):
        wrong_type("decay", "a number or a schedule of momentum_distill.schedules", describe(decay))
    check_number("decay", decay, low=0.0, high=1.0)
    return float(decay)  # type: ignore[arg-type]  # a number


@lru_cache
def _gamma(sigma_rel: float) -> float:
    """The largest root of the cubic that the second equation is, by Newton's method from above, where it is convex."""
    x = sigma_rel**-2
    gamma, last = sigma_rel**-1, math.inf
    while gamma < last:
        value = ((gamma + 7) * gamma + 16 - x) * gamma + 12 - x
        gamma, last = gamma - value / ((3 * gamma + 14) * gamma + 16 - x), gamma
    return max(gamma, 0.0)


# ------------------------------------------------------------------------------------------------------------ state


def pack(step: int, decay: object) -> Tensor:
    """The number of updates, and with a schedule its text, letter by letter: a state stays one of tensors."""
    text = repr(decay) if _is_ours(decay) else ""
    return torch.tensor([step, *text.encode()] if text else step, device="cpu")


def _is_ours(decay: object) -> bool:
    """Whether it prints as a call that can be read again: a subclass of somebody else's is like any function."""
    inner = [each for each in getattr(decay, "__dict__", {}).values() if isinstance(each, Schedule)]
    return isinstance(decay, Schedule) and type(decay).__module__ == __name__ and all(map(_is_ours, inner))


def unpack(state: Tensor) -> tuple[int, Schedule | None]:
    """What was packed."""
    if state.ndim == 0:
        return int(state), None
    step, *letters = state.tolist()
    text = bytes(letters).decode()
    try:
        return step, _read(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError, KeyError, AttributeError) as error:
        raise ValueError(
            f"decay: expected a schedule of momentum_distill.schedules in the state, got {text}"
        ) from error


def _read(call: Any) -> Schedule:  # noqa: ANN401 - a node that has to be a call
    """The call that a schedule prints; no other is made."""
    classes = {each.__name__: each for each in Schedule.__subclasses__()}
    fields = {each.arg: each.value for each in call.keywords}
    return classes[call.func.id](
        **{name: _read(node) if isinstance(node, ast.Call) else ast.literal_eval(node) for name, node in fields.items()}
    )


# --------------------------------------------------------------------------------------------------------- post hoc

Snapshot: TypeAlias = Mapping[str, Any] | str | os.PathLike[str]


def post_hoc_average(snapshots: Sequence[Snapshot], *, sigma_rel: float, step: int | None = None) -> dict[str, Any]:
    r"""The average of any length at any step, from snapshots of averages that followed a :class:`PowerFunction`.

    $$\theta \approx \sum_i x_i \theta_i, \qquad
      x = \arg\min \int \Big(p(\tau) - \sum_i x_i p_i(\tau)\Big)^2 d\tau, \qquad \sum_i x_i = 1$$

    where $p_i(\tau) = (\gamma_i + 1)\,\tau^{\gamma_i} / t_i^{\gamma_i + 1}$ on $[0, t_i]$ is what snapshot $i$, taken
    after $t_i$ updates, holds of the weights of time $\tau$, and $p$ is what is asked for. That the $x_i$ add up to 1,
    which the paper leaves to chance, keeps what never changed as it is.

    From two averages, of 0.05 and 0.10, saved 32 times, those of 0.07 to 0.2 at the time of a snapshot come out to a
    thousandth of their distance from the weights (on a random walk). Between the snapshots some percent are missing.

    Args:
        snapshots: At least one: states of `EMAWrapper`, or of `EMADict`, all of whose power functions are used, or
            files to which `torch.save` has written one. One file is in memory at a time.
        sigma_rel: $\sigma_{rel}$ of the average asked for, at least 1e-6 and at most $1/\sqrt{12}$.
        step: Updates after which it is asked for, at least 1 and at most those of the last snapshot, the default.

    Returns:
        A state for `EMAWrapper.load_state_dict`, on the CPU. Floating tensors are the sum above, in their own dtype.
        Integers, `running_mean` and `running_var` are those of the snapshot taken nearest to `step`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, there is no snapshot, or one has no power function, no update or other
            names than the first.

    Example:
        >>> from momentum_distill import EMAWrapper
        >>> model, snapshots = torch.nn.Linear(2, 2), []
        >>> ema = EMAWrapper(model, decay=PowerFunction(0.1))
        >>> for step in range(1, 101):
        ...     _ = torch.nn.init.normal_(model.weight)  # stands for optimizer.step()
        ...     ema.update(model)
        ...     if step % 10 == 0:
        ...         snapshots.append({k: v.clone() for k, v in ema.state_dict().items()})
        >>> ema.load_state_dict(post_hoc_average(snapshots, sigma_rel=0.15))
        <All keys matched successfully>

    References:
        EDM2 (Karras et al., 2024), Section 3.2 and Appendix C, Algorithm 3.
    """
    wanted = PowerFunction(sigma_rel)
    if isinstance(snapshots, str) or not isinstance(snapshots, Sequence):
        wrong_type("snapshots", "a list of states or files", describe(snapshots))
    found = [each for index, source in enumerate(snapshots) for each in _find(index, _load(source))]
    if not found:
        wrong_value("snapshots", "at least one", "none")
    last = max(each.step for each in found)
    step = last if step is None else step
    check_int("step", step, minimum=1)
    if step > last:
        wrong_value("step", f"at most {last}, the updates of the last snapshot", str(step))
    weights = _mixture(found, step, wanted)
    nearest = min(range(len(found)), key=lambda i: (abs(found[i].step - step), -weights[i]))
    first: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    sums: dict[str, Tensor] = {}
    for i, (each, weight) in enumerate(zip(found, weights, strict=True)):
        state = _load(snapshots[each.place])
        own = {key.removeprefix(each.prefix): value for key, value in state.items() if key.startswith(each.prefix)}
        shapes = {name: getattr(value, "shape", None) for name, value in own.items() if name != "_extra_state"}
        first = first or shapes
        if unlike := {name for name, _ in shapes.items() ^ first.items()}:
            wrong_value(f"snapshots[{each.place}]", "names and shapes of the first", f"others at {min(unlike)!r}")
        for name in shapes:
            value = own[name]
            mixes = isinstance(value, Tensor) and value.is_floating_point() and not name.endswith(STATISTICS)
            if mixes and weight:
                part = weight * value.to("cpu", torch.float64)
                sums[name] = sums[name] + part if name in sums else part
            if i == nearest:
                kept[name] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
    mixed = {name: sums[name].to(value.dtype) if name in sums else value for name, value in kept.items()}
    return {**mixed, "_extra_state": pack(step, wanted)}


class _Found(NamedTuple):
    """An average in a snapshot."""

    place: int  # of the snapshot
    prefix: str  # of its names
    step: int
    decay: PowerFunction


def _load(source: Snapshot) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        wrong_type("snapshots", "states or the names of files", describe(source))
    state: Mapping[str, Any] = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    return state


def _find(index: int, state: Mapping[str, Any]) -> list[_Found]:
    """The averages of a wrapper's state, or of a dictionary's, that follow a power function."""
    found = []
    for key, value in state.items():
        if re.fullmatch(r"(averages\.\w+\.)?_extra_state", key) and isinstance(value, Tensor):
            step, decay = unpack(value)
            if isinstance(decay, PowerFunction) and step:
                found.append(_Found(index, key.removesuffix("_extra_state"), step, decay))
    if not found:
        wrong_value(f"snapshots[{index}]", "the state of an EMAWrapper with a PowerFunction, updated", "none")
    return found


def _mixture(found: list[_Found], step: int, wanted: PowerFunction) -> list[float]:
    """How much of each; all of the one that is just what is asked for."""
    same = [each.step == step and each.decay == wanted for each in found]
    if any(same):
        return [float(i == same.index(True)) for i in range(len(found))]
    times = torch.tensor([each.step for each in found] + [step], dtype=torch.float64, device="cpu") / step
    powers = torch.tensor([each.decay.gamma for each in found] + [wanted.gamma], dtype=torch.float64, device="cpu")
    earlier = times[:, None] <= times
    ratio = torch.where(earlier, times[:, None] / times, times / times[:, None])
    power = torch.where(earlier, powers, powers[:, None])  # that of the later one
    first, second = powers[:, None], powers
    inner = (first + 1) * (second + 1) / (first + second + 1) * ratio**power / torch.maximum(times[:, None], times)
    system, right = torch.ones_like(inner), torch.ones_like(times)  # the last row and column: they add up to 1
    system[:-1, :-1], right[:-1], system[-1, -1] = inner[:-1, :-1], inner[:-1, -1], 0.0
    solution = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution
    return [float(weight) for weight in solution[:-1, 0]]
