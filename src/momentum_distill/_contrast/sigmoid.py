r"""The pairwise sigmoid loss: of every row and key, whether they match; tile by tile, without an N×Q matrix.

No pair knows of the others, so no sum over the keys has to be there first: one pass gives the terms of all rows, and
from $\partial\mathcal L / \partial z_{ij}$ all gradients as well.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from momentum_distill._checks import check_choice, check_number, check_scalar, in_transform, may_ask
from momentum_distill._contrast import engine, operator
from momentum_distill._contrast.autograd import (
    check_versions,
    distinct,
    graph_ends,
    independent,
    second,
    versions,
    view,
)
from momentum_distill._contrast.formulas import Number, Rows, Terms, column, reduce_rows, row_gradients
from momentum_distill._contrast.matrices import hidden_keys, joined, ready
from momentum_distill._contrast.problem import Part, Problem, masked
from momentum_distill._contrast.tiles import Tile, tile_size, tiles
from momentum_distill._group import Group, check_group, errors_shared_by_sum, find_ranks
from momentum_distill._precision import as_variable, full_precision

KeyReduction: TypeAlias = Literal["sum", "mean"]

KEY_REDUCTIONS = ("sum", "mean")


class Sigmoid(NamedTuple):
    """All that the loss is computed from."""

    base: Problem
    bias: Number
    key_reduction: KeyReduction

    def counted(self) -> Problem:
        """The base with what counts: who has no class has a part in the KL term alone, and no say without it."""
        return masked(self.base, classes_alone=self.base.momentum_query is None)

    def inputs(self) -> list[Tensor | None]:
        """What a gradient may be for: alpha, temperature and bias if they are tensors, query, parts of the keys."""
        learned = [x if isinstance(x, Tensor) else None for x in (self.base.alpha, self.base.temperature, self.bias)]
        return [*learned, self.base.query, *[part.online for part in self.base.keys]]


def check_bias(
    bias: object, key_reduction: object, reduction: object, group: Group, query: object, *, validate: bool
) -> None:
    """What `read_problem` does not know, told to all ranks as there."""
    check_group(group)
    with errors_shared_by_sum(find_ranks(group) if reduction != "none" else None, query):
        check_scalar("bias", bias, low=-torch.inf)
        if validate and isinstance(bias, Tensor) and not in_transform():
            check_number("bias", bias.item(), low=-torch.inf)
        check_choice("key_reduction", key_reduction, KEY_REDUCTIONS)


# --------------------------------------------------------------------------------------------------------------------
# A pair
# --------------------------------------------------------------------------------------------------------------------


def _against(logits: Tensor, yes: Tensor) -> Tensor:
    """The logits of the contrary: of no match where it is a match. Nothing small is taken from a 1 then."""
    return torch.where(yes, -logits, logits)


def _softplus(logits: Tensor, into: Tensor | None = None) -> Tensor:
    r"""$\zeta(z) = \log(1 + e^z) = -\log\sigma(-z)$; above the threshold it is $z$ in float64 too."""
    return F.softplus(logits, threshold=40.0, out=into)  # type: ignore[call-arg]  # torch stubs lack `out`


def _divergence(logits: Tensor, targets: Tensor, *into: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\mathrm{KL}(\sigma(z')\Vert\sigma(z)) = \zeta(z) - \zeta(z') - \sigma(z')(z - z')$, exact where $z' \le 0$.

    And $\sigma(z')$. Three matrices are made, `into` these if given, of which the last may be that of $z'$.
    """
    a, b, c = into or (None, None, None)
    curve = torch.sub(_softplus(logits, a), _softplus(targets, b), out=a)
    share = torch.sigmoid(targets, out=b)
    line = torch.mul(torch.sub(logits, targets, out=c), share, out=c)
    return torch.sub(curve, line, out=a), share


# --------------------------------------------------------------------------------------------------------------------
# The loss, connected to autograd
# --------------------------------------------------------------------------------------------------------------------


def sigmoid(problem: Sigmoid) -> Tensor:
    """The loss; by plain formulas for who sees into no autograd.Function, and for a compiler to fuse."""
    inputs = problem.inputs()
    with full_precision(problem.base.query):
        if in_transform():
            return _by_autograd(problem)
        compiling, learns = torch.compiler.is_compiling(), torch.is_grad_enabled()
        wanted = [learns and x is not None and x.requires_grad for x in inputs]
        if compiling and engine.is_fused(problem.base):
            total = _by_autograd(problem)
        else:
            total = _Loss.apply(problem, wanted, *(distinct(inputs) if compiling else inputs))
        if compiling and any(wanted):  # differentiable once: see `_once` in `autograd`
            learned = [x for x in inputs if x is not None and x.requires_grad]
            total = torch.ops.momentum_distill.once([total], learned)[0]
        return total


class _Loss(torch.autograd.Function):
    """The total; the forward pass makes its gradient, so nothing else is kept, and a queue may go on.

    To a compiler all is one operator. A second derivative, and that of single rows for keys, are made from the inputs
    once more, which must not have changed.
    """

    @staticmethod
    def forward(ctx: Any, problem: Sigmoid, wanted: list[bool], *_: Tensor | None) -> Tensor:  # noqa: ANN401
        late = problem.base.choices.reduction == "none" and any(wanted[4:])
        ctx.problem, ctx.wanted, ctx.late, ctx.compiled = problem, wanted, late, torch.compiler.is_compiling()
        ctx.versions = [] if ctx.compiled else versions([*problem.base.tensors(), problem.bias])
        asked = [any(wanted) and not late, *wanted[4:]]
        total, difference, *grads = _answer(problem, asked, None, compiled=ctx.compiled)
        ctx.save_for_backward(difference, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        problem, wanted, seen, scale = ctx.problem, ctx.wanted, ctx.versions, column(upstream)
        difference, *grads = ctx.saved_tensors
        if not ctx.compiled and graph_ends():
            ctx.problem = ctx.versions = None
        with full_precision(problem.base.query):  # backward() may be called under autocast
            if not ctx.compiled and torch.is_grad_enabled():  # create_graph=True: the gradient is to have one itself
                check_versions(seen, "sigmoid_distill")
                apart = problem._replace(base=independent(problem.base), bias=view(problem.bias))
                return None, None, *second([_by_autograd(apart)], [upstream], apart.inputs(), wanted)
            if ctx.late:
                check_versions(seen, "sigmoid_distill")
                grads, scale = _answer(problem, [True, *wanted[4:]], upstream, compiled=ctx.compiled)[2:], 1.0
        temperature, bias, query, *keys = [grad * scale for grad in grads]
        parts = iter(keys)
        each = [next(parts) if want else None for want in wanted[4:]]
        found = [(upstream * difference).sum(), temperature.sum(), bias.sum(), query, *each]
        pairs = zip(problem.inputs(), wanted, found, strict=True)
        return None, None, *[grad.to(x.dtype) if want else None for x, want, grad in pairs]


def _answer(problem: Sigmoid, wanted: list[bool], upstream: Tensor | None, *, compiled: bool) -> list[Tensor]:
    """That of :func:`_solve`, to a compiler by the operator."""
    if not compiled:
        return _solve(problem, wanted, upstream)
    like = problem.base.query.new_empty((), dtype=problem.base.prepare.dtype)
    given = (*operator.arguments(problem.base), wanted, as_variable(problem.bias, like).detach(), problem.key_reduction)
    found: list[Tensor] = torch.ops.momentum_distill.sigmoid(*given, upstream)
    return found


# --------------------------------------------------------------------------------------------------------------------
# All pairs
# --------------------------------------------------------------------------------------------------------------------


def _by_autograd(problem: Sigmoid) -> Tensor:
    """The loss as it is defined, through N×Q matrices."""
    base = problem.counted()
    hidden, key_labels = hidden_keys(base), joined([part.labels for part in base.keys])

    def logits(raw: Tensor, parts: list[Tensor], temperature: Number, bias: Number) -> Tensor:
        keys = joined([ready(rows, part.present, part.prepare) for part, rows in zip(base.keys, parts, strict=True)])
        return ready(raw, base.present, base.prepare) / temperature @ keys.T + bias

    z = logits(base.query, [part.online for part in base.keys], base.temperature, problem.bias)
    pairs = _softplus(_against(z, base.labels[:, None] == key_labels)).masked_fill(key_labels < 0, 0.0)
    supervised = (pairs if hidden is None else pairs.masked_fill(hidden, 0.0)).sum(dim=1)
    distill = torch.zeros_like(supervised)
    if base.momentum_query is not None:
        with torch.no_grad():
            momentum = [part.momentum for part in base.keys if part.momentum is not None]
            targets = logits(base.momentum_query, momentum, base.temperature, problem.bias)
        targets = targets.detach()  # for no_grad() does not stop forward-mode derivatives
        pairs = _divergence(_against(z, targets > 0), -targets.abs())[0]
        distill = (pairs if hidden is None else pairs.masked_fill(hidden, 0.0)).sum(dim=1)
    shares = _shares(problem, base)
    return _reduced(problem, _rows(base, supervised * shares[0], distill * shares[1])).total


def _solve(problem: Sigmoid, wanted: Sequence[bool], upstream: Tensor | None) -> list[Tensor]:
    """The total; KL term less supervised one; and if `wanted[0]` the gradients of the total, or of rows by `upstream`.

    Those are by row (N, 1) for temperature and bias, for the raw query, and for the raw parts of the keys `wanted`.
    """
    base = problem.counted()
    alpha = engine.known(base.alpha)
    alpha = alpha.to(base.prepare.dtype) if isinstance(alpha, Tensor) else alpha  # in which 1 - alpha loses nothing
    terms_share = (1.0, 0.0) if base.momentum_query is None else (1 - alpha, alpha)
    terms_share = terms_share if upstream is None else (terms_share[0] * upstream, terms_share[1] * upstream)
    sweep, shares = _Sweep(problem, base), _shares(problem, base)

    def reduced(supervised: Tensor, distill: Tensor) -> tuple[Rows, Terms]:
        rows = _rows(base, supervised * shares[0], distill * shares[1])
        return rows, _reduced(problem, rows)

    def weights(rows: Rows, terms: Terms) -> tuple[Number, Number]:
        counts = (terms.rows, terms.rows_with_positive)
        by_row = row_gradients(rows, base.choices.reduction, base.ranks, counts, terms_share)
        return column(by_row[0] * shares[0]), column(by_row[1] * shares[1])

    if wanted[0] and base.ranks is None:  # rows are counted without the keys
        nothing = sweep.queries.online.new_zeros(len(base.query))
        supervised, distill, grads = sweep(weights(*reduced(nothing, nothing)), wanted[1:])
        terms = reduced(supervised, distill)[1]
    else:
        rows, terms = reduced(*sweep(None, ())[:2])
        grads = sweep(weights(rows, terms), wanted[1:])[2] if wanted[0] else []
    return [terms.total, terms.distill - terms.supervised, *grads]


class _Sweep:
    """A pass over the keys, in matrices made once: anew for each tile, they took half as long as all the rest."""

    def __init__(self, problem: Sigmoid, base: Problem) -> None:
        self.base, self.bias = base, engine.known(problem.bias)
        self.queries = engine.Queries(base, kernel=False)

    def __call__(
        self, weights: tuple[Number, Number] | None, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Both sums over each row's pairs (N,), and the gradients of `_solve` from their `weights`, if given."""
        online = self.queries.online
        size = max(1, min(tile_size(online), max(len(part.online) for part in self.base.keys)))
        self.scratch = online.new_empty(3 if self.queries.momentum is None else 6, len(online) * size)
        self.supervised, self.distill = online.new_zeros(2, len(online))
        self.pull, self.pull_bias = torch.zeros_like(online), online.new_zeros(len(online), 1)
        grad_keys = []
        for index, part in enumerate(self.base.keys):
            want = weights is not None and wanted[index]
            grads = [self._tile(part, tile, weights, want=want) for tile in tiles(part, size)]
            if want:
                found = [grad for grad in grads if grad is not None]
                grad_keys.append(torch.cat(found) if found else torch.zeros_like(part.online, dtype=online.dtype))
        if weights is None:
            return self.supervised, self.distill, []
        query, temperature = self.queries.backward(self.pull)
        return self.supervised, self.distill, [temperature, self.pull_bias, query, *grad_keys]

    def _tile(self, part: Part, tile: Tile, weights: tuple[Number, Number] | None, *, want: bool) -> Tensor | None:
        """Some keys of a part into all sums; and the gradient (B, d) for them, raw, if there is a `want` of it."""
        online, momentum = self.queries.online, self.queries.momentum
        keys, labels, absent = tile.keys, tile.labels, tile.absent
        shape = (len(self.scratch), len(online), len(keys))
        z, signs, scratch, *more = self.scratch[:, : shape[1] * shape[2]].view(shape)

        def seen(pairs: Tensor, hidden: Tensor | None) -> Tensor:
            pairs = pairs if hidden is None else pairs.masked_fill_(hidden, 0.0)
            return pairs if tile.own is None else pairs.scatter_(0, tile.own, 0.0)

        torch.mm(online, keys.T, out=z).add_(self.bias)
        signs.copy_(self.base.labels[:, None] == labels).mul_(-2).add_(1)
        grad = against = torch.mul(z, signs, out=more[0] if more else z)
        unknown = labels < 0 if absent is None else absent | (labels < 0)
        hidden = None if may_ask(unknown) and not bool(unknown.any()) else unknown
        self.supervised += seen(_softplus(against, scratch), hidden).sum(dim=1)
        if weights is not None:
            seen(against.sigmoid_().mul_(signs), hidden).mul_(weights[0])
        if momentum is not None:
            targets = torch.mm(momentum, tile.momentum.T, out=more[1]).add_(self.bias)
            signs.fill_(1).copysign_(targets.neg_())
            against, targets = z.mul_(signs), targets.abs_().neg_()
            pairs, shares = _divergence(against, targets, scratch, more[2], targets)
            self.distill += seen(pairs, absent).sum(dim=1)
            if weights is not None:
                grad += seen(against.sigmoid_().sub_(shares).mul_(signs), absent).mul_(weights[1])
        if weights is None:
            return None
        self.pull.addmm_(grad, keys)
        self.pull_bias += grad.sum(dim=1, keepdim=True)
        if not want:
            return None
        grad_keys = part.prepare.backward(keys, tile.lengths, grad.T @ online)
        return grad_keys if absent is None else grad_keys.masked_fill_(absent[:, None], 0.0)


def _rows(base: Problem, supervised: Tensor, distill: Tensor) -> Rows:
    """The terms of rows that count: in the supervised one, those of a known class."""
    known = None if base.labelled else base.labels >= 0
    if base.present is not None:
        distill = torch.where(base.present, distill, 0.0)
        known = base.present if known is None else known & base.present
    return Rows(supervised if known is None else torch.where(known, supervised, 0.0), distill, base.present, known)


def _shares(problem: Sigmoid, base: Problem) -> tuple[Number, Number]:
    """What a pair counts in each row's terms, () or (N,): 1, or 1 over the pairs that the row has."""
    if problem.key_reduction == "sum":
        return 1.0, 1.0
    present = [torch.ones_like(part.labels) if part.present is None else part.present.long() for part in base.keys]
    known = [here * (part.labels >= 0) for part, here in zip(base.keys, present, strict=True)]
    counts = [sum((part.sum() for part in parts[1:]), parts[0].sum()) for parts in (known, present)]
    if base.keys[0].own:
        counts = [counts[0] - known[0], counts[1] - present[0]]
    first, second = (1 / count.clamp(min=1).to(base.prepare.dtype) for count in counts)
    return first, second


def _reduced(problem: Sigmoid, rows: Rows) -> Terms:
    base = problem.base
    alpha = None if base.momentum_query is None else base.alpha
    signature = f"{base.signature('SigmoidDistillLoss')}, key_reduction={problem.key_reduction!r}" if base.ranks else ""
    return reduce_rows(rows, base.choices.reduction, alpha, base.ranks, signature)


# --------------------------------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------------------------------


def _operator(*values: Any) -> list[Tensor]:  # noqa: ANN401
    *inputs, wanted, bias, key_reduction, upstream = values
    with full_precision(inputs[0]):
        return _solve(Sigmoid(operator._problem(*inputs), bias, key_reduction), wanted, upstream)


def _fake(*values: Any) -> list[Tensor]:  # noqa: ANN401
    total, difference, _, _, _, *grads = operator._fake_contrast(*values[:-3])  # whose gradients begin with the query's
    if not grads:
        return [total, difference]
    query, temperature, *keys = grads
    return [total, difference, temperature, temperature.new_empty(temperature.shape), query, *keys]


torch.library.define(
    "momentum_distill::sigmoid",
    f"({operator.ARGUMENTS}, Tensor bias, str key_reduction, Tensor? upstream) -> Tensor[]",
)
torch.library.impl("momentum_distill::sigmoid", "CompositeExplicitAutograd", _operator)
torch.library.register_fake("momentum_distill::sigmoid", _fake)
