r"""A temperature that is learned and stays inside its range: $\tau = \tau_0 e^{r}$.

The parameter is $r$, the logarithm of the ratio to the initial value $\tau_0$: so the temperature starts at exactly
$\tau_0$ in every precision, equal steps change it by equal factors, and weight decay pulls towards $\tau_0$.
"""

import math

import torch
from torch import Tensor

from momentum_distill._checks import check_number, describe, may_ask, wrong_type, wrong_value


def check_temperature(temperature: float, temperature_range: object) -> tuple[float, float]:
    """Check a temperature and its range; return the range as floats."""
    if not isinstance(temperature_range, (tuple, list)) or len(temperature_range) != 2:
        wrong_type("temperature_range", "a pair (low, high)", describe(temperature_range))
    for bound in temperature_range:
        check_number("temperature_range", bound, low=0.0, open_low=True)
    low, high = (float(bound) for bound in temperature_range)
    if low > high:
        wrong_value("temperature_range", "low <= high", str(tuple(temperature_range)))
    check_number("temperature", temperature, low=0.0, open_low=True)
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
