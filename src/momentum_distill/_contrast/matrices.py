r"""The way of few scores: the loss as it is defined, through the N×Q matrices $V$, $P$ and $U$."""

from collections.abc import Sequence

import torch
from torch import Tensor

from momentum_distill._checks import may_ask, within
from momentum_distill._contrast.formulas import Sums, Weights, by_softmax, column, penalty
from momentum_distill._contrast.problem import PairWeights, Prepare, Problem, least_weight, negated, penalty_scale
from momentum_distill._rows import are_ordinary, normalize_rows, shortest


class Way:
    """The engine's way through the matrices: few operations, written over each other."""

    def __init__(self, problem: Problem, queries: Tensor, momentum: Tensor | None) -> None:
        """From prepared queries (N, d), divided by the temperature."""
        self.problem, self.queries = problem, queries
        self.hidden = hidden_keys(problem)  # (Q,) or (N, Q)
        self.keys = _Keys(problem, [part.online for part in problem.keys])
        logits, pairs, extra = self.keys.logits(queries), _pairs(problem, self.hidden), None
        if problem.choices.hardness:
            extra = penalty(logits, pairs, penalty_scale(problem))
            self.log_hard = self._log_softmax(logits + extra)
            extra = extra if self.hidden is None else extra.masked_fill_(self.hidden, 0.0)
        self.log_v = self._log_softmax(logits)
        log_v = self.log_v if extra is None else self.log_hard - extra  # of the supervised term
        count = pairs.sum(dim=1)
        everyone = may_ask(count) and within(count, least_weight(problem), torch.inf)
        kl = self.u = None
        if momentum is not None:
            raw = [part.momentum for part in problem.keys if part.momentum is not None]
            keys = self.keys if problem.same_keys else _Keys(problem, raw)
            logits = keys.logits(momentum)
            log_u = self._log_softmax(logits)
            self.u = logits.softmax(dim=1) if self.hidden is None else log_u.exp().masked_fill_(self.hidden, 0.0)
            kl = log_u.sub_(self.log_v).mul_(self.u).sum(dim=1)
        if by_softmax(problem.choices.positives):
            if problem.targets is not None:
                log_v = log_v + torch.where(pairs != 0, pairs, 1.0).log_()
            positive_log = _logsumexp(log_v, pairs != 0)
            self.p = torch.where(pairs != 0, log_v - positive_log[:, None], -torch.inf).exp_()
        else:
            self.p = pairs.div_(count[:, None] if everyone else count.clamp(min=least_weight(problem))[:, None])
            positive_log = torch.linalg.vecdot(log_v, self.p)
        self.sums = Sums(count, positive_log, kl, everyone)

    def _log_softmax(self, logits: Tensor) -> Tensor:
        """0 where a key is hidden."""
        if self.hidden is None:
            return logits.log_softmax(dim=1)
        return logits.masked_fill_(self.hidden, -torch.inf).log_softmax(dim=1).masked_fill_(self.hidden, 0.0)

    def backward(self, weights: Weights, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients for the queries (N, d) and for the raw keys of the parts that want one. Once only."""
        p, u = column(weights.p), column(weights.u)
        # In place, but for weights of rows, of which there may be a batch: torch.func.vmap.
        targets = self.p * -p if isinstance(p, Tensor) else self.p.mul_(-p)
        # That of log V, for the logits: V times what a row's targets sum to, less the targets.
        supervised = None
        if self.problem.choices.hardness:
            supervised = torch._log_softmax_backward_data(targets, self.log_hard, 1, targets.dtype)
            targets = torch.zeros_like(targets)
        if self.u is not None:
            targets = targets - self.u * u if isinstance(u, Tensor) else targets.sub_(self.u, alpha=u)
        grad = torch._log_softmax_backward_data(targets, self.log_v, 1, targets.dtype)
        grad = grad if supervised is None else grad + supervised
        if self.hidden is not None:
            grad = grad.masked_fill_(self.hidden, 0.0)
        grad_keys = self.keys.backward(grad, self.queries, wanted)
        return self.keys.weighted(grad), grad_keys


class _Keys:
    """The keys of all parts, normalised by dividing their logits, which are fewer numbers, where that is as exact."""

    def __init__(self, problem: Problem, raw: list[Tensor]) -> None:
        self.problem, self.raw = problem, raw
        self.lengths = None  # (Q,), to be divided by
        prepare = problem.keys[0].prepare
        absent = [negated(part.present) for part in problem.keys]
        if prepare.normalize and all(mask is None for mask in absent) and may_ask(raw[0]):
            rows = joined([part.to(prepare.dtype) for part in raw])
            lengths = torch.linalg.vector_norm(rows, dim=1)
            if are_ordinary(lengths, max(shortest(part) for part in raw), rows.shape[1]):
                self.rows, self.lengths = rows, lengths
                return
        self.rows = joined([prepare(part, mask)[0] for part, mask in zip(raw, absent, strict=True)])

    def logits(self, queries: Tensor) -> Tensor:
        """(N, Q), of prepared queries."""
        logits = queries @ self.rows.T
        return logits if self.lengths is None else logits.div_(self.lengths)

    def weighted(self, weights: Tensor) -> Tensor:
        """Sums of the unit keys (N, d) by weights (N, Q), which are written over."""
        return (weights if self.lengths is None else weights.div_(self.lengths)) @ self.rows

    def backward(self, grad: Tensor, queries: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """From the gradient for the logits (N, Q) that for the raw keys of the parts that want one."""
        found: list[Tensor | None] = [None] * len(wanted)
        sizes = [len(raw) for raw in self.raw]
        for index, (part, scores) in enumerate(
            zip(self.problem.keys, grad.split_with_sizes(sizes, dim=1), strict=True)
        ):
            if wanted[index]:
                rows, lengths = part.prepare(part.online, negated(part.present))
                found[index] = part.prepare.backward(rows, lengths, scores.T @ queries)
        return found


def _pairs(problem: Problem, hidden: Tensor | None) -> Tensor:
    """1 for a positive key, else 0, or w_ij, (N, Q)."""
    labels, key_labels = problem.labels, joined([part.labels for part in problem.keys])
    if problem.targets is not None:
        targets = joined([part.targets for part in problem.keys if part.targets is not None])
        weights = PairWeights(problem).of(key_labels, targets)
        return weights if hidden is None else weights.masked_fill(hidden, 0.0)
    if problem.small_labels and len(labels) * len(key_labels) > 2**14:  # as floats, where vector instructions compare
        labels, key_labels = labels.to(torch.float32), key_labels.to(torch.float32)
    pairs = torch.empty(len(labels), len(key_labels), dtype=problem.prepare.dtype, device=labels.device)
    torch.eq(labels[:, None], key_labels, out=pairs)
    if not problem.labelled:
        pairs.masked_fill_((labels < 0)[:, None], 0.0)
    return pairs if hidden is None else pairs.masked_fill_(hidden, 0.0)


def by_autograd(problem: Problem) -> Sums:
    """The sums as they are defined: what autograd, the transforms of `torch.func` and second derivatives go through."""

    def log_softmax(scores: Tensor) -> Tensor:
        if hidden is None:
            return scores.log_softmax(dim=1)
        return scores.masked_fill(hidden, -torch.inf).log_softmax(dim=1).masked_fill(hidden, 0.0)

    hidden = hidden_keys(problem)
    if problem.targets is not None:
        pairs = _pairs(problem, hidden)
    else:
        labels = problem.labels[:, None]
        pairs = (labels == joined([part.labels for part in problem.keys])) & (labels >= 0)
        pairs = pairs if hidden is None else pairs & ~hidden
    queries = ready(problem.query, problem.present, problem.prepare) / problem.temperature
    logits = queries @ joined([ready(part.online, part.present, part.prepare) for part in problem.keys]).T
    shared = log_v = log_softmax(logits)  # of the supervised term, and V
    weights = pairs.to(log_v.dtype)
    if problem.choices.hardness:
        extra = penalty(logits, weights, penalty_scale(problem))
        extra = extra if hidden is None else torch.where(hidden, 0.0, extra)
        shared = log_softmax(logits + extra) - extra
    count = pairs.sum(dim=1)
    if by_softmax(problem.choices.positives):
        by_weight = shared if problem.targets is None else shared + torch.where(pairs != 0, pairs, 1.0).log()
        positive_log = _logsumexp(by_weight, pairs != 0)
    else:
        # The weights, which have no gradient, are divided: one over the smallest number is too large a gradient.
        shares = weights / count.clamp(min=least_weight(problem))[:, None]
        positive_log = torch.linalg.vecdot(shares, shared)
    if problem.momentum_query is None:
        return Sums(count, positive_log, None)
    with torch.no_grad():
        momentum = ready(problem.momentum_query, problem.present, problem.prepare) / problem.momentum_temperature
        parts = [(part, part.momentum) for part in problem.keys if part.momentum is not None]
        seen = momentum @ joined([ready(raw, part.present, part.prepare) for part, raw in parts]).T
        log_u = log_softmax(seen.detach())  # for no_grad() does not stop forward-mode derivatives
        u = log_u.exp() if hidden is None else log_u.exp().masked_fill_(hidden, 0.0)
    return Sums(count, positive_log, torch.linalg.vecdot(u, log_u - log_v))


def ready(raw: Tensor, present: Tensor | None, prepare: Prepare) -> Tensor:
    """Rows prepared, zeros for absent ones, by operations that have derivatives."""
    rows = raw.to(prepare.dtype)
    rows = rows if present is None else torch.where(present[:, None], rows, 0.0)
    return normalize_rows(rows, shortest(raw)) if prepare.normalize else rows


def hidden_keys(problem: Problem) -> Tensor | None:
    """The keys that no row sees, bool, (Q,); with `exclude_self` which keys each row does not see, (N, Q)."""
    hidden = None
    if any(part.present is not None for part in problem.keys):
        hidden = joined(
            [
                torch.zeros_like(part.labels, dtype=torch.bool) if part.present is None else ~part.present
                for part in problem.keys
            ]
        )
    if not problem.keys[0].own:
        return hidden
    count = sum(len(part.online) for part in problem.keys)
    own = torch.eye(len(problem.labels), count, dtype=torch.bool, device=problem.labels.device)
    return own if hidden is None else own | hidden


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the keys that `mask` (N, Q) keeps, 0 where it keeps none; the gradient is finite either way."""
    if logits.shape[1] == 0:
        return logits.sum(dim=1)
    some = mask.any(dim=1, keepdim=True)
    masked = torch.where(some, logits.masked_fill(~mask, -torch.inf), logits * 0)
    return torch.where(some[:, 0], masked.logsumexp(dim=1), masked.sum(dim=1))
