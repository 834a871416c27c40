"""A contrastive loss and its gradient at once: by matrices, by tiles or by the Triton kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from momentum_distill._checks import may_ask
from momentum_distill._contrast import fused, matrices, tiles
from momentum_distill._contrast.formulas import Counts, Number, Rows, Terms, reduce_rows, row_gradients, weights
from momentum_distill._contrast.problem import Problem, masked, negated
from momentum_distill._rows import row_lengths, shortest

DENSE_SCORES, DENSE_KEYS = 2**18, 2**20
"""Up to so many scores, N times Q, and so many numbers in the keys, Q times d, the loss takes the plain matrices: less
work stands around them than around tiles. Above, they cost memory, and soon time. See `docs/performance_figures.md`."""


FUSED_SCORES = 2**14
"""Up to so many scores a compiler makes of the plain formulas what is faster than the operator, of which it sees
nothing: the fixed cost of a compiled call is a tenth of a millisecond."""


class Gradients(NamedTuple):
    """Of one number, or of the sum of the rows' values, for what the loss is computed from."""

    query: Tensor  # (N, d), raw
    temperature: Tensor  # (N, 1): by row
    keys: list[Tensor | None]  # (Q, d), raw; of the parts that were asked for


class Solved:
    """The rows of a loss, and what their gradient is made from, which is there once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem = masked(problem)
        kernel = fused.takes(problem)
        self.queries = Queries(problem, kernel=kernel)
        rows = self.queries.online, self.queries.momentum
        small = is_small(problem) and not kernel
        self.way = matrices.Way(problem, *rows) if small else tiles.Way(problem, *rows, kernel=kernel)
        self.rows = Rows.of(self.way.sums, problem.choices.positives, problem.present)

    def terms(self) -> Terms:
        """The loss; the one collective, where there are ranks."""
        return _reduced(self.problem, self.rows)

    def gradients(self, counts: Counts, upstream: tuple[Number, Number], wanted: Sequence[bool]) -> Gradients:
        """From those `upstream` of the supervised and the KL term, for the query and the parts of the keys `wanted`.

        `counts` are the rows, and the rows with a positive, of `Terms`.
        """
        problem = self.problem
        by_row = row_gradients(self.rows, problem.choices.reduction, problem.ranks, counts, upstream)
        pull = weights(*by_row, self.way.sums.positive_count, problem.choices.positives)
        grad, grad_keys = self.way.backward(pull, wanted)
        return Gradients(*self.queries.backward(grad), grad_keys)


class Queries:
    r"""The queries as every way takes them, $\bar q_i / \tau$, and those of the momentum model."""

    def __init__(self, problem: Problem, *, kernel: bool) -> None:
        self.problem, self.kernel = problem, kernel
        self.absent = negated(problem.present)
        self.temperature = known(problem.temperature)
        raw, other = problem.query, problem.momentum_query
        self.momentum: Tensor | None = None
        together = other is not None and other.dtype == raw.dtype
        if other is not None and together and problem.momentum_temperature is problem.temperature:
            both, divisor = self._divided(torch.cat([raw, other]), self.temperature, twice=True)
            self.online, self.momentum = both.split_with_sizes([raw.shape[0]] * 2)
            self.divisor = divisor[: raw.shape[0]] if isinstance(divisor, Tensor) and divisor.ndim else divisor
            return
        self.online, self.divisor = self._divided(raw, self.temperature)
        if other is not None:
            self.momentum = self._divided(other, known(problem.momentum_temperature))[0]

    def _divided(self, raw: Tensor, temperature: Number, *, twice: bool = False) -> tuple[Tensor, Number]:
        """Rows (N, d), or `twice` as many, and what the raw ones were divided by: a number, or (N, 1)."""
        if self.absent is not None:
            raw = raw.masked_fill((self.absent.repeat(2) if twice else self.absent)[:, None], 0.0)
        if self.kernel and self.problem.prepare.normalize:
            unit, lengths = fused.normalize(raw, shortest(raw))
            return unit.div_(temperature), lengths.mul_(temperature)
        rows = raw.to(self.problem.prepare.dtype)
        if not self.problem.prepare.normalize:
            return rows / temperature, temperature
        divisor = row_lengths(rows, shortest(raw)) * temperature
        return rows / divisor, divisor

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        r"""Gradients for the raw queries (N, d) and, by row (N, 1), for the temperature.

        Of unit rows $\bar q$, $(g - \bar q\,(\bar q^\top g)) / \lVert q\rVert$.
        """
        temperature = self.temperature
        along = (self.online * grad).sum(dim=1, keepdim=True)
        if self.problem.prepare.normalize:
            grad = grad.addcmul_(self.online, along * (temperature * temperature), value=-1)
        grad = grad.div_(self.divisor)
        if self.absent is not None:
            grad = grad.masked_fill_(self.absent[:, None], 0.0)
        return grad, along.div_(-temperature)


def known(value: Number) -> Number:
    """A tensor of shape () as a Python number where that is free."""
    if isinstance(value, Tensor) and may_ask(value):
        number: float = value.tolist()  # type: ignore[assignment] # of shape ()
        return number
    return value


def is_small(problem: Problem) -> bool:
    """Whether the plain N×Q matrices are the better way."""
    rows, width = problem.query.shape
    count = sum(part.online.shape[0] for part in problem.keys)
    return 0 < rows * count <= DENSE_SCORES and width * count <= DENSE_KEYS


def is_fused(problem: Problem) -> bool:
    """Whether a compiler gets the plain formulas to fuse."""
    return 0 < problem.query.shape[0] * sum(part.online.shape[0] for part in problem.keys) <= FUSED_SCORES


def by_autograd(problem: Problem) -> Terms:
    """The terms by plain autograd through the N×Q matrices."""
    problem = masked(problem)
    return _reduced(problem, Rows.of(matrices.by_autograd(problem), problem.choices.positives, problem.present))


def _reduced(problem: Problem, rows: Rows) -> Terms:
    alpha = None if problem.momentum_query is None else problem.alpha
    signature = "" if problem.ranks is None else problem.signature()
    return reduce_rows(rows, problem.choices.reduction, alpha, problem.ranks, signature)
