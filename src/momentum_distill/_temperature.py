r"""A temperature that is learned and stays inside its range: $\tau = \tau_0 e^{r}$.

The parameter is $r$, the logarithm of the ratio to the initial value $\tau_0$: so the temperature starts at exactly
$\tau_0$ in every precision, equal steps change it by equal factors, and weight decay pulls towards $\tau_0$.
"""

import math

import torch
from torch import Tensor, nn

from momentum_distill._checks import (
    COLDEST,
    HOTTEST,
    check_bool,
    check_number,
    describe,
    has_numbers,
    in_transform,
    may_ask,
    wrong_type,
    wrong_value,
)
from momentum_distill._precision import WideModule, default_wide
from momentum_distill._watch import IdleWatch


def check_temperature(temperature: float, temperature_range: object) -> tuple[float, float]:
    """Check a temperature and its range; return the range as floats."""
    if not isinstance(temperature_range, (tuple, list)) or len(temperature_range) != 2:
        wrong_type("temperature_range", "a pair (low, high)", describe(temperature_range))
    for bound in temperature_range:
        check_number("temperature_range", bound, low=COLDEST, high=HOTTEST)
    low, high = (float(bound) for bound in temperature_range)
    if low > high:
        wrong_value("temperature_range", "low <= high", str(tuple(temperature_range)))
    check_number("temperature", temperature, low=COLDEST, high=HOTTEST)
    if not low <= float(temperature) <= high:
        wrong_value("temperature", f"a number in temperature_range [{low:g}, {high:g}]", str(temperature))
    return low, high


@torch.no_grad()
def project_(log_ratio: Tensor, initial: float, low: float, high: float) -> None:
    """Bring $r$ back, in place, to where the temperature is inside its range.

    A clamp of the value alone has no gradient outside the range, so a parameter that overshot a border once would never
    come back. Projected, it sits on the border with its gradient alive.
    """
    bounds = math.log(low / initial), math.log(high / initial)
    if not (may_ask(log_ratio) and bounds[0] <= log_ratio.tolist() <= bounds[1]):  # type: ignore[operator]
        log_ratio.clamp_(*bounds)


def project(log_ratio: Tensor, initial: float, low: float, high: float) -> Tensor:
    """:func:`project_` out of place, with the gradient that the projected $r$ has: for an $r$ that is another's."""
    held = log_ratio.detach()
    return held.clamp(math.log(low / initial), math.log(high / initial)) + (log_ratio - held)


def exp_in_range(log_ratio: Tensor, initial: float, low: float, high: float) -> Tensor:
    r"""$\tau_0 e^{r}$, shape `()`, of a projected $r$, in its dtype."""
    temperature = initial * log_ratio.exp()
    if may_ask(temperature) and low <= temperature.tolist() <= high:  # type: ignore[operator] # a number, of shape ()
        return temperature
    # On a border the product may round to just outside; the correction is a constant, so the gradient stays.
    return temperature + (temperature.clamp(low, high) - temperature).detach()


class TemperatureModule(WideModule):
    """A loss with a temperature that is learned, or fixed."""

    log_temperature_ratio: nn.Parameter | None
    """The logarithm of the temperature over its start; None if it is fixed."""

    def __init__(self, temperature: float, temperature_range: tuple[float, float], *, learnable: bool) -> None:
        super().__init__()
        check_bool("learnable_temperature", learnable)
        self.temperature_range: tuple[float, float] = check_temperature(temperature, temperature_range)
        self.initial_temperature: float = float(temperature)
        # Zero now, so the start is exact in every precision.
        self.log_temperature_ratio = nn.Parameter(torch.zeros((), dtype=default_wide())) if learnable else None
        self._watch = IdleWatch(f"the temperature of {type(self).__name__}", patience=500)  # several calls make a step

    @property
    def temperature(self) -> Tensor:
        """The temperature in use, inside its range: detached, float64, shape (), on the CPU (the host waits)."""
        if self.log_temperature_ratio is None:
            return torch.tensor(self.initial_temperature, dtype=torch.float64, device="cpu")
        ratio = self.log_temperature_ratio.detach().cpu().to(torch.float64, copy=True)  # not all devices have it
        bounds = (self.initial_temperature, *self.temperature_range)
        project_(ratio, *bounds)
        return exp_in_range(ratio, *bounds)

    def _describe_temperature(self) -> str:
        """For a `repr`; without numbers, on the device "meta" say, what it starts at."""
        low, high = self.temperature_range
        learned = self.log_temperature_ratio
        if learned is None:
            return f"{self.initial_temperature:g} (fixed)"
        now = float(self.temperature) if has_numbers(learned) else self.initial_temperature
        return f"{now:g} (learned in [{low:g}, {high:g}])"

    def _temperature(self, *features: object) -> float | Tensor:
        """The temperature with its gradient, projected and watched; in float64 where the features are."""
        learned, bounds = self.log_temperature_ratio, (self.initial_temperature, *self.temperature_range)
        if learned is None:
            return self.initial_temperature
        if isinstance(learned, nn.Parameter) and not in_transform():
            self._watch.look(learned)
            project_(learned, *bounds)
            self._watch.left(learned)
            ratio: Tensor = learned
        else:  # what torch.func.functional_call put in its place, or what a transform must not see change
            ratio = project(learned, *bounds)
        return exp_in_range(ratio.to(torch.float64) if any_wide(*features) else ratio, *bounds)


def any_wide(*features: object) -> bool:
    """Whether one of these tensors, or tuples of tensors, is float64."""
    parts = [part for given in features for part in (given if isinstance(given, (tuple, list)) else (given,))]
    return any(getattr(part, "dtype", None) == torch.float64 for part in parts)
