r"""A row's terms from its sums over the keys, the weights of its gradient, and how rows become one loss.

Every way through the keys (matrices, tiles, kernel) finds the :class:`Sums` of each row, and takes the
:class:`Weights` back:

$$\frac{\partial\mathcal L}{\partial s_{ij}} = v_i V_{ij} - p_i P_{ij} - u_i U_{ij}$$

with $P_{ij} = w_{ij} / \sum_j w_{ij}$ or, inside the logarithm, $w_{ij} V_{ij}$ over its sum; of classes
$w_{ij} = [c_j = c_i]$, whose sum is $K_i$. Where hard negatives weigh more, $p_i$ of $v_i = p_i + u_i$ has a softmax of
its own.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import describe, wrong_value
from momentum_distill._group import Ranks, sum_over_ranks
from momentum_distill._precision import blend
from momentum_distill._rows import normalize_rows, shortest

Positives: TypeAlias = Literal["outside", "inside", "inside_per_positive"]
PositivesFrom: TypeAlias = Literal["labels", "distance", "overlap"] | Callable[[Tensor, Tensor], Tensor]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
Number: TypeAlias = float | Tensor  # a tensor of shape () or, of every row, (N,)

Counts: TypeAlias = tuple[int | Tensor, int | Tensor]

POSITIVES = ("outside", "inside", "inside_per_positive")
POSITIVES_FROM = ("labels", "distance", "overlap")


def by_softmax(positives: Positives) -> bool:
    """Whether the sum over the positive keys stands inside the logarithm, where they are weighed by their softmax."""
    return positives != "outside"


def pair_weights(rows: Tensor, keys: Tensor, positives_from: PositivesFrom, width: float) -> Tensor:
    r"""How positive keys are for rows, $w_{ij} \ge 0$, `(N, B)`, from their targets, `(N, ...)` and `(B, ...)`.

    Below the smallest normal number a weight is 0.
    """
    if positives_from == "distance":
        points = [targets if targets.ndim == 2 else targets[:, None] for targets in (rows, keys)]
        # Of products of the points, as it would be by default, a small distance has no digit left.
        distances = torch.cdist(points[0], points[1], compute_mode="donot_use_mm_for_euclid_dist")
        weights = (distances / width).square().mul(-0.5).exp()
    elif positives_from == "overlap":
        weights = normalize_rows(rows, shortest(rows)) @ normalize_rows(keys, shortest(keys)).T
    else:
        assert callable(positives_from)
        weights, shape = positives_from(rows[:, None], keys[None]), (len(rows), len(keys))
        if not isinstance(weights, Tensor) or weights.shape != shape:
            wrong_value("positives_from", f"a function that returns a tensor of shape {shape}", describe(weights))
        weights = weights.detach().to(rows.dtype)
    return weights.masked_fill(weights < torch.finfo(weights.dtype).tiny, 0.0)


def penalty(logits: Tensor, weights: Tensor, scale: Number) -> Tensor:
    r"""Beyond the logits of negatives, $\beta\,(1 - w_{ij})_+\,\mathrm{sg}(\tau s_{ij})$; $\beta\tau$ is `scale`."""
    # Not a plain product: of a hidden key, 0 * -inf would be NaN.
    return torch.where(weights < 1, logits.detach() * ((1 - weights) * scale), 0.0)


class Sums(NamedTuple):
    """What the terms of each row are made from, each (N,), in the dtype to sum in."""

    positive_count: Tensor  # sum_j w_ij: K_i, of classes
    positive_log: Tensor  # sum_j P_ij log V_ij or, inside the logarithm, log sum_j V_ij over the positive keys; or 0
    kl: Tensor | None  # sum_j U_ij (log U_ij - log V_ij)
    all_positive: bool = False  # whether every row is known to have a positive key


class Weights(NamedTuple):
    """How much of V, P and U each row passes back, see above."""

    v: Number
    p: Number
    u: Number


def weights(grad_supervised: Number, grad_distill: Number, positive_count: Tensor, positives: Positives) -> Weights:
    r"""From the gradients of $\mathcal S_i$, 0 in a row without a positive key, and of $\mathrm{KL}_i$."""
    p = grad_supervised / positive_count.clamp(min=1) if positives == "inside_per_positive" else grad_supervised
    return Weights(p + grad_distill, p, grad_distill)


class Rows(NamedTuple):
    """Both terms of every row (N,), 0 in rows left out, and which rows count."""

    supervised: Tensor
    distill: Tensor
    present: Tensor | None  # (N,) bool; None: all count
    positive: Tensor | None  # (N,) bool: those that have a positive key as well; None: all have

    @classmethod
    def of(cls, sums: Sums, positives: Positives, present: Tensor | None) -> "Rows":
        r"""$\mathcal S_i$ of `supcon_distill_loss`, and $\mathrm{KL}(U_i\Vert V_i)$ (Eq. 11), where a row counts."""
        supervised = -sums.positive_log  # 0 (NaN if the row is) without a positive key
        if positives == "inside_per_positive":
            supervised = supervised / sums.positive_count.clamp(min=1)
        distill = torch.zeros_like(supervised) if sums.kl is None else sums.kl
        positive = None if sums.all_positive else sums.positive_count != 0  # NaN counts
        if present is not None:
            supervised, distill = torch.where(present, supervised, 0.0), torch.where(present, distill, 0.0)
            positive = present if positive is None else positive & present
        return cls(supervised, distill, present, positive)


class Terms(NamedTuple):
    """What the loss is, as `SupConTerms` describes it; numbers that are known without a device are int."""

    total: Tensor
    supervised: Tensor
    distill: Tensor
    rows: int | Tensor
    rows_with_positive: int | Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The same as tensors."""
        counts = (torch.as_tensor(count, device=self.total.device) for count in (self.rows, self.rows_with_positive))
        return (self.total, self.supervised, self.distill, *counts)


def reduce_rows(rows: Rows, reduction: Reduction, alpha: Number | None, ranks: Ranks | None, signature: str) -> Terms:
    """The terms of all rows; without `alpha` the total is the supervised one."""
    supervised, distill = rows.supervised, rows.distill
    count = supervised.shape[0] if rows.present is None else rows.present.sum()
    positive = supervised.shape[0] if rows.positive is None else rows.positive.sum()
    if reduction == "mean" and ranks is None and isinstance(count, int) and count == positive > 0:
        supervised, distill = supervised.mean(), distill.mean()
        return Terms(_total(supervised, distill, alpha), supervised, distill, count, positive)
    if reduction != "none":
        supervised, distill = supervised.sum(), distill.sum()
        if ranks is not None:
            counts = (torch.as_tensor(number, device=supervised.device) for number in (count, positive))
            supervised, distill, count, positive = sum_over_ranks(ranks, signature, supervised, distill, *counts)
    if reduction == "mean":
        supervised, distill = (
            supervised / _at_least_one(positive, like=supervised),
            distill / _at_least_one(count, like=supervised),
        )
    return Terms(_total(supervised, distill, alpha), supervised, distill, count, positive)


def _total(supervised: Tensor, distill: Tensor, alpha: Number | None) -> Tensor:
    # A copy: one tensor must not be two outputs of an autograd.Function.
    return supervised.clone() if alpha is None else blend(supervised, distill, alpha)


def row_gradients(
    rows: Rows, reduction: Reduction, ranks: Ranks | None, counts: Counts, upstream: tuple[Number, Number]
) -> tuple[Number, Number]:
    """Gradients of both terms of each row, from those `upstream` of the reduced ones and the `counts` of `Terms`."""
    grad_supervised, grad_distill = upstream
    if reduction == "mean":
        grad_supervised = grad_supervised / _at_least_one(counts[1], like=rows.supervised)
        grad_distill = grad_distill / _at_least_one(counts[0], like=rows.supervised)
    if ranks is not None:  # as in sum_over_ranks
        grad_supervised, grad_distill = grad_supervised * ranks.size, grad_distill * ranks.size
    # A row without positive key has no part in the supervised term, one that is left out in none.
    if rows.positive is not None:
        grad_supervised = _where(rows.positive, grad_supervised, rows.supervised)
    if rows.present is not None:
        grad_distill = _where(rows.present, grad_distill, rows.distill)
    return grad_supervised, grad_distill


def _at_least_one(count: int | Tensor, *, like: Tensor) -> Number:
    """To divide by; in the dtype of `like`, as a whole number would make a float32 of a Python one."""
    return count.clamp(min=1).to(like.dtype) if isinstance(count, Tensor) else max(count, 1)


def column(weight: Number) -> Number:
    """To multiply the rows of a matrix by."""
    return weight[:, None] if isinstance(weight, Tensor) and weight.ndim else weight


def _where(mask: Tensor, value: Number, like: Tensor) -> Tensor:
    """`value` in the rows of the mask, else 0, in the dtype of `like`."""
    return torch.where(mask, torch.as_tensor(value, dtype=like.dtype, device=like.device), 0.0)
