r"""A temperature that is learned and stays inside its range: $\tau = \tau_0 e^{r}$.

The parameter is $r$, the logarithm of the ratio to the initial value $\tau_0$: so the temperature starts at exactly
$\tau_0$ in every precision, equal steps change it by equal factors, and weight decay pulls towards $\tau_0$.
"""

from typing import Any

import torch
from torch import Tensor

from momentum_distill._checks import check_number, describe, wrong_type, wrong_value


def check_temperature(temperature: float, temperature_range: object) -> tuple[float, float]:
    """Check a temperature and its range; return the range as floats."""
    if not isinstance(temperature_range, tuple | list) or len(temperature_range) != 2:
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


class _ExpInRange(torch.autograd.Function):
    """See :func:`exp_in_range`."""

    @staticmethod
    def forward(log_ratio: Tensor, initial: float, low: float, high: float) -> Tensor:
        return (initial * log_ratio.exp()).clamp(low, high)

    @staticmethod
    def setup_context(
        ctx: Any,  # noqa: ANN401 - torch's context object has no public type
        inputs: tuple[Tensor, float, float, float],
        output: Tensor,
    ) -> None:
        _, _, ctx.low, ctx.high = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (temperature,) = ctx.saved_tensors
        outward = ((temperature <= ctx.low) & (grad > 0)) | ((temperature >= ctx.high) & (grad < 0))
        return torch.where(outward, 0.0, grad * temperature), None, None, None


def exp_in_range(log_ratio: Tensor, initial: float, low: float, high: float) -> Tensor:
    r"""$\mathrm{clamp}(\tau_0 e^{r}, low, high)$ that does not get stuck at a border.

    A plain clamp has no gradient outside its range, so a parameter that overshot the border once would never come
    back. Here the gradient $\partial\tau/\partial r = \tau$ is dropped only where a descent step would push further
    out.

    Args:
        log_ratio: $r$, shape `()`.
        initial: $\tau_0$, inside the range.
        low: Smallest temperature.
        high: Largest temperature.

    Returns:
        The temperature, shape `()`, in the dtype of `log_ratio`.
    """
    temperature: Tensor = _ExpInRange.apply(log_ratio, initial, low, high)  # type: ignore[no-untyped-call]
    return temperature
