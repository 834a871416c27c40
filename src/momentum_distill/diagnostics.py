r"""What one watches while training: how far apart the modalities are, and what the contrastive loss says about them."""

import math
from numbers import Real

import torch
from torch import Tensor

from momentum_distill._checks import check_floating, check_int, check_number, describe, wrong_type, wrong_value
from momentum_distill.functional import l2_normalize

__all__ = ["alignment", "modality_gap", "mutual_information_bound", "uniformity"]


def mutual_information_bound(loss: float | Tensor, num_keys: int) -> Tensor:
    r"""Lower bound on the mutual information that an InfoNCE loss proves (Eq. 20).

    $$I(T; S) \ge \log K - \mathcal L_{NCE}$$

    Args:
        loss: Contrastive loss in nats over `num_keys` keys, a number or a tensor `()`: the `supervised` term of
            `SupConDistillLoss` with `reduction="mean"`. With one positive per row this is a bound; with several (Eq.
            21) the figure is the paper's, and `"outside"` cannot fall below the mean of $\log K_i$.
        num_keys: $K$, at least 1. The bound cannot exceed $\log K$.

    Returns:
        The bound in nats, shape `()`, detached. Negative where the loss is worse than chance.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `loss` is not a scalar, or `num_keys` is below 1.

    Example:
        >>> mutual_information_bound(0.0, num_keys=1024)
        tensor(6.9315)

    References:
        MTMD (Lin and Hu, 2023), Eq. 20 and 21, after CPC (van den Oord et al., 2018).
    """
    check_int("num_keys", num_keys, minimum=1)
    if not isinstance(loss, Tensor):
        if isinstance(loss, bool) or not isinstance(loss, (float, Real)):
            wrong_type("loss", "a number or a floating tensor", describe(loss))
        loss = torch.tensor(float(loss))  # NaN as well: a line of a log stops no training
    check_floating("loss", loss, shape=())
    return math.log(num_keys) - loss.detach()


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    r"""Distance between the centres of two modalities on the unit sphere.

    $$\Big\Vert \tfrac1N\sum_i \bar x_i - \tfrac1M\sum_i \bar y_i \Big\Vert_2$$

    Args:
        x: Features of one modality, shape `(N, d)`, N at least 1.
        y: Features of another, shape `(M, d)`, M at least 1.

    Returns:
        The gap in [0, 2], shape `()`, detached.

    Raises:
        TypeError: If an argument is not a floating tensor.
        ValueError: If a shape is wrong or an argument has no row.

    Example:
        >>> import torch
        >>> modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]))
        tensor(2.)

    References:
        Liang et al., *Mind the Gap*, NeurIPS 2022.
    """
    x, y = _unit_rows("x", x), _unit_rows("y", y, like=x)
    return (x.mean(dim=0) - y.mean(dim=0)).square().sum().sqrt()


def alignment(x: Tensor, y: Tensor, *, exponent: float = 2.0) -> Tensor:
    r"""Mean distance of matching rows on the unit sphere; smaller is better aligned.

    $$\tfrac1N \sum_i \lVert \bar x_i - \bar y_i \rVert_2^{a}$$

    Args:
        x: Features, shape `(N, d)`, N at least 1.
        y: The matching features, shape `(N, d)`.
        exponent: $a > 0$.

    Returns:
        The alignment, at least 0, shape `()`, detached. Near 0 with a :func:`uniformity` near 0 the rows have
        collapsed: all are alike, not only those that match.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape is wrong, there is no row, or `exponent` is not positive.

    Example:
        >>> import torch
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        tensor(2.)

    References:
        Wang and Isola, *Understanding contrastive representation learning*, ICML 2020.
    """
    check_number("exponent", exponent, low=0.0, open_low=True)
    unit_x = _unit_rows("x", x)
    check_floating("y", y, shape=x.shape, like=("x", x))
    squares = (unit_x - l2_normalize(y.detach())).square().sum(dim=1)
    return squares.pow(exponent / 2).mean()


def uniformity(x: Tensor, *, scale: float = 2.0) -> Tensor:
    r"""How evenly rows spread over the unit sphere; smaller (more negative) is more even.

    $$\log \frac{2}{N(N-1)} \sum_{i<j} e^{-t \lVert \bar x_i - \bar x_j \rVert_2^2}$$

    Args:
        x: Features, shape `(N, d)`, N at least 2. Builds N(N-1)/2 distances.
        scale: $t > 0$.

    Returns:
        The uniformity, at most 0, shape `()`, detached. Near 0 all rows are alike, which is collapse; random rows of
        16 to 128 numbers have -3.5 to -3.9.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape is wrong, there are fewer than two rows, or `scale` is not positive.

    Example:
        >>> import torch
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        tensor(-8.)

    References:
        Wang and Isola, *Understanding contrastive representation learning*, ICML 2020.
    """
    check_number("scale", scale, low=0.0, open_low=True)
    unit = _unit_rows("x", x, minimum=2)
    distances = torch.pdist(unit).square()
    return torch.logsumexp(-scale * distances, dim=0) - math.log(len(distances))


def _unit_rows(name: str, x: Tensor, *, like: Tensor | None = None, minimum: int = 1) -> Tensor:
    """Checked, detached unit rows; as wide as those of the argument `x`, if it is given as `like`."""
    if like is None:
        check_floating(name, x, shape=("N", "d"))
    else:
        check_floating(name, x, shape=("N", like.shape[1]), like=("x", like))
    if x.shape[0] < minimum:
        wrong_value(name, f"at least {minimum} rows", f"shape {tuple(x.shape)}")
    return l2_normalize(x.detach())
