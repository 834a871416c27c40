r"""The way of many scores: the loss as attention, without an N×Q matrix.

With $s_{ij} = q_i^\top k_j / \tau$ and $V_i = \mathrm{softmax}_j(s_{ij})$ the loss needs only
$\mathrm{lse}_i = \log\sum_j e^{s_{ij}}$ and the sum of the keys of each class, and its gradient for the query only
$\sum_j V_{ij} k_j$: what attention returns whose values are its keys. The same holds for the momentum targets $U_i$. So
the keys are read once, tile by tile, the gradient for the queries is ready after the forward pass, and nothing of size
N×Q ever exists.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from momentum_distill._checks import may_ask, within
from momentum_distill._contrast import fused
from momentum_distill._contrast.formulas import Sums, Weights, by_softmax, column, penalty
from momentum_distill._contrast.problem import PairWeights, Part, Problem, least_weight, negated, penalty_scale
from momentum_distill._contrast.statistics import LogSum, Statistics

TILE_SCORES, TILE_KEYS = 2**18, 2**18
"""Scores, and numbers of the keys, held at a time: larger tiles fall out of the cache."""
LAUNCH_FACTOR = 4
"""By how much larger tiles are on an accelerator without the kernel, where starting an operation is what takes time; by
more would take them past 16 MiB."""
MIN_TILE, MAX_TILE = 256, 8192
"""Fewest and most keys in a tile: smaller ones make the matrix products inefficient."""

SAFE_SUM = (1e-30, 1e30)
"""A sum of plain exponentials in this range lost nothing to underflow or overflow."""


class Way:
    r"""The engine's way through sums over the keys.

    With $O_i = \sum_j V_{ij} k_j$, $O^m_i = \sum_j U_{ij} k_j$ and $\kappa_i = \sum_j P_{ij} k_j$,

    $$\frac{\partial\mathcal L}{\partial (q_i/\tau)} = v_i O_i - p_i \kappa_i - u_i O^m_i$$

    where $v_i = p_i + u_i$; with a weight on hard negatives $p_i$ has an $O_i$ of its own.
    """

    def __init__(self, problem: Problem, queries: Tensor, momentum: Tensor | None, *, kernel: bool) -> None:
        """From prepared queries (N, d), divided by the temperature; with the `kernel`, or by plain operations."""
        self.problem, self.queries, self.momentum = problem, queries, momentum
        self.softmax = by_softmax(problem.choices.positives)
        self.statistics = (fused.attend if kernel else attend)(problem, queries, momentum)
        self.sums = self._sums(self.statistics)

    def _sums(self, found: Statistics) -> Sums:
        r"""By $\log V_{ij} = s_{ij} - \mathrm{lse}_i$, which for a mean of keys is the mean."""
        lse, _ = found.supervised()
        if self.softmax:
            positive_log = lse.off(found.positive_lse.shift) + found.positive_lse.log
        else:
            positive_log = lse.off((self.queries * found.positive_mean_key).sum(dim=1))
        positive_log = torch.where(found.positive_count != 0, positive_log, lse.value() * 0)
        count = found.positive_count.to(positive_log.dtype)  # whose root, or half, is no whole number
        if self.momentum is None:
            return Sums(count, positive_log, None)
        log_v = found.lse.off((self.queries * found.momentum_mean_key).sum(dim=1))
        return Sums(count, positive_log, found.momentum_lse.off(found.momentum_mean_logit) - log_v)

    def backward(self, weights: Weights, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients for the queries (N, d) and for the raw keys of the parts that want one."""
        found, rows = self.statistics, self.queries.new_zeros(len(self.queries), 1)
        v, p, u = (rows + column(weight) for weight in weights)  # (N, 1)
        # Not 0 * pull: of a row without positives, that may be infinite.
        _, mean_key = found.supervised()
        pull = torch.where(found.positive_count[:, None] != 0, p * (mean_key - found.positive_mean_key), 0.0)
        if self.momentum is not None:
            pull = torch.addcmul(pull, u, found.mean_key - found.momentum_mean_key)
        grad_keys = [
            self._grad_keys(part, v, p, u) if want else None
            for part, want in zip(self.problem.keys, wanted, strict=True)
        ]
        return pull, grad_keys

    def _grad_keys(self, part: Part, v: Tensor, p: Tensor, u: Tensor) -> Tensor:
        r"""Gradient (Q, d) for the raw online keys of a part, tile by tile, in the dtype to sum in.

        $$\frac{\partial\mathcal L}{\partial k_j} = \sum_i (v_i V_{ij} - p_i P_{ij} - u_i U_{ij})\, q_i$$
        """
        queries, found, problem, hard_p = self.queries, self.statistics, self.problem, p
        grads = []  # out of place, for weights may be a batch of them: torch.func.vmap
        classes = _Classes(problem.labels)
        pairs = PairWeights(problem) if problem.weighs else None
        if not self.softmax:
            p = p / found.positive_count.clamp(min=least_weight(problem))[:, None]
        class_pulls = queries.new_zeros(len(queries) + 1, queries.shape[1]).index_add(0, classes.rows, p * queries)
        for tile in tiles(part, tile_size(queries)):
            labels = classes.of(tile.labels)
            logits = _hide(queries @ tile.keys.T, tile.absent, tile.own)
            weights = None if pairs is None else pairs.of(tile.labels, tile.targets, tile.own)
            if weights is not None and found.hard_lse is not None:
                harder = logits + penalty(logits, weights, penalty_scale(problem))
                scores = found.lse.off(logits).exp_() * u + found.hard_lse.off(harder).exp_() * hard_p
            else:
                scores = found.lse.off(logits).exp_() * v
            if weights is not None and problem.targets is not None:
                shares = found.positive_lse.off(logits + weights.log()).exp_() if self.softmax else weights
                scores = scores - shares * p
            elif self.softmax:
                others = classes.rows[:, None] != labels
                scores = scores - found.positive_lse.off(logits.masked_fill(others, -torch.inf)).exp_() * p
            elif tile.own is not None:
                scores = scores - classes.pairs(labels, tile.own) * p
            if self.momentum is not None:
                seen = _hide(self.momentum @ tile.momentum.T, tile.absent, tile.own)
                scores = scores - found.momentum_lse.off(seen).exp_() * u
            grad = scores.T @ queries
            if not self.softmax and tile.own is None and problem.targets is None:
                grad = grad - class_pulls[labels]
            grad = part.prepare.backward(tile.keys, tile.lengths, grad)
            grads.append(grad if tile.absent is None else grad.masked_fill_(tile.absent[:, None], 0.0))
        return torch.cat(grads) if grads else torch.zeros_like(part.online, dtype=queries.dtype)


def attend(problem: Problem, queries: Tensor, momentum: Tensor | None) -> Statistics:
    """The statistics of prepared queries (N, d), divided by the temperature, by plain torch operations."""
    if may_ask(queries):
        # Moderate logits need no running shift, which costs two passes over each tile. Whether they were is known
        # afterwards.
        result = _run(problem, queries, momentum, online=False)
        if result is not None:
            return result
    result = _run(problem, queries, momentum, online=True)
    assert result is not None
    return result


def _run(problem: Problem, queries: Tensor, momentum: Tensor | None, *, online: bool) -> Statistics | None:
    """One pass over the keys; None if it should have been an `online` one, with a running shift."""
    count = len(queries)
    student = _Sums(count, queries, online=online)
    teacher = _Sums(0 if momentum is None else count, queries, online=online)
    pairs = PairWeights(problem) if problem.weighs else None
    positives = _Positives(problem, queries) if problem.targets is None else _GradedPositives(problem, queries)
    hard = _Sums(count if problem.choices.hardness else 0, queries, online=online)
    # One product serves queries and momentum queries where they meet the same keys.
    same_keys = problem.same_keys
    stacked = torch.cat([queries, momentum]) if same_keys and momentum is not None else queries
    size = tile_size(stacked)
    longest = min(size, max(len(part.online) for part in problem.keys))
    buffer = queries.new_empty(len(stacked) * longest)
    scores_buffer = queries.new_empty(0 if same_keys else len(teacher.total) * longest)
    for part in problem.keys:
        for tile in tiles(part, size, present_alone=True):
            width = len(tile.keys)
            logits = buffer[: len(stacked) * width].view(len(stacked), width)
            torch.mm(stacked, tile.keys.T, out=logits)
            own = torch.cat([tile.own, tile.own + count]) if tile.own is not None and same_keys else tile.own
            logits = _hide(logits, tile.absent, own)
            weights = None if pairs is None else pairs.of(tile.labels, tile.targets, tile.own)
            positives.add(tile, logits[:count], weights)
            if weights is not None and len(hard.total):
                harder = logits[:count] + penalty(logits[:count], weights, penalty_scale(problem))
                hard.add(hard.exponentials(harder, harder), tile.keys)
            student.add(student.exponentials(logits[:count], logits[:count]), tile.keys)
            if momentum is None:
                continue
            if same_keys:
                teacher.add(teacher.exponentials(logits[count:], logits[count:]), tile.keys)
                continue
            scores = scores_buffer[: count * width].view(count, width)
            torch.mm(momentum, tile.momentum.T, out=scores)
            seen = scores if tile.absent is None and own is None else _hide(scores.clone(), tile.absent, own)
            weights = teacher.exponentials(seen, logits)
            teacher.add(weights, tile.keys)
            teacher.logits += torch.linalg.vecdot(weights, scores)  # not `seen`: 0 * -inf is NaN

    if not online and not (student.is_exact() and teacher.is_exact() and hard.is_exact()):
        return None
    if same_keys and momentum is not None:
        teacher.logits = torch.linalg.vecdot(momentum, teacher.keys)  # sum_j U_ij q'_i.k_j
    lse, mean_key, _ = student.results()
    hard_lse, hard_mean_key, _ = hard.results() if problem.choices.hardness else (None, None, None)
    return Statistics(lse, mean_key, *positives.results(), *teacher.results(), hard_lse, hard_mean_key)


class _Sums:
    """Sums of exponentials (N,), and of exponentials times keys (N, d), all relative to e^shift."""

    def __init__(self, rows: int, like: Tensor, *, online: bool) -> None:
        self.total = like.new_zeros(rows)
        self.keys = like.new_zeros(rows, like.shape[1])
        self.logits = like.new_zeros(rows)
        self.shift = like.new_full((rows,), -torch.inf) if online else None

    def exponentials(self, logits: Tensor, out: Tensor) -> Tensor:
        """Exponentials of logits (N, B) in `out`; with a running shift, the sums so far follow it."""
        if self.shift is None:
            return torch.exp(logits, out=out)
        shift = torch.maximum(self.shift, logits.amax(dim=1))
        finite = torch.where(shift == -torch.inf, 0.0, shift)  # -inf - -inf is NaN
        shrink = (self.shift - finite).exp_()
        self.total *= shrink
        self.logits *= shrink
        self.keys *= shrink[:, None]
        self.shift = shift
        return torch.sub(logits, finite[:, None], out=out).exp_()

    def add(self, weights: Tensor, keys: Tensor) -> None:
        """Take in the exponentials (N, B) of some keys (B, d)."""
        self.total += weights.sum(dim=1)
        self.keys.addmm_(weights, keys)

    def is_exact(self) -> bool:
        """Whether going without a shift cost no precision. Waits for the device."""
        return not self.total.numel() or within(self.total, *SAFE_SUM)

    def results(self) -> tuple[LogSum, Tensor, Tensor]:
        """The lse, the mean key (N, d) and the mean logit (N,); zeros where there was no key."""
        if self.shift is None:
            lse = LogSum(torch.zeros_like(self.total), self.total.log())
            return lse, self.keys.div_(self.total[:, None]), self.logits.div_(self.total)
        nothing = self.total == 0
        total = torch.where(nothing, 1.0, self.total)
        lse = LogSum(torch.where(nothing, 0.0, self.shift), total.log())
        return lse, self.keys.div_(total[:, None]), self.logits.div_(total)


class _Positives:
    """Counts and means of the positive keys of each row."""

    def __init__(self, problem: Problem, queries: Tensor) -> None:
        count, width = queries.shape
        self.classes = _Classes(problem.labels)
        # A row may have no positive key, so a plain sum of exponentials may well be 0.
        self.softmax = _Sums(count, queries, online=True) if by_softmax(problem.choices.positives) else None
        # By index among the sorted labels; the last is of no query's class.
        self.counts = problem.labels.new_zeros(count + 1)
        self.sums = queries.new_zeros(0 if self.softmax else count + 1, width)
        # By row, in the part that has a key which the row does not see: there, rows of one class differ.
        own = count if problem.keys[0].own else 0
        self.own_counts = self.counts.new_zeros(own)
        self.own_sums = queries.new_zeros(0 if self.softmax else own, width)

    def add(self, tile: "Tile", logits: Tensor, _: Tensor | None) -> None:
        """Take in the keys of a tile, whose logits are (N, B)."""
        labels = self.classes.of(tile.labels)
        pairs = None if tile.own is None else self.classes.pairs(labels, tile.own)
        if pairs is None:
            self.counts.index_add_(0, labels, torch.ones_like(labels))
        else:
            self.own_counts += pairs.sum(dim=1)
        if self.softmax is not None:
            masked = logits.masked_fill(self.classes.rows[:, None] != labels, -torch.inf)
            self.softmax.add(self.softmax.exponentials(masked, masked), tile.keys)
        elif pairs is not None:
            self.own_sums.addmm_(pairs.to(logits.dtype), tile.keys)
        else:
            # By tile first: a long plain sum of float32 loses digits.
            self.sums += torch.zeros_like(self.sums).index_add_(0, labels, tile.keys)

    def results(self) -> tuple[Tensor, Tensor, LogSum]:
        """How many, (N,); their mean (N, d); and the lse, where they are weighed by the softmax."""
        count = self.counts[self.classes.rows]
        if len(self.own_counts):
            count += self.own_counts
        if self.softmax is not None:
            lse, mean, _ = self.softmax.results()
            return count, mean, lse
        sums = self.sums[self.classes.rows]
        if len(self.own_sums):
            sums += self.own_sums
        nothing = sums.new_empty(0)
        return count, sums / count.clamp(min=1)[:, None], LogSum(nothing, nothing)


class _GradedPositives:
    """Sums of the weights of the keys for each row, and the means of the keys by them."""

    def __init__(self, problem: Problem, queries: Tensor) -> None:
        count, width = queries.shape
        self.softmax = _Sums(count, queries, online=True) if by_softmax(problem.choices.positives) else None
        self.total = queries.new_zeros(count)
        self.sums = queries.new_zeros(0 if self.softmax else count, width)
        self.least = least_weight(problem)

    def add(self, tile: "Tile", logits: Tensor, weights: Tensor | None) -> None:
        """Take in the keys of a tile, whose logits and weights are (N, B)."""
        assert weights is not None
        self.total += weights.sum(dim=1)
        if self.softmax is None:
            self.sums.addmm_(weights, tile.keys)
        else:
            weighted = logits + weights.log()
            self.softmax.add(self.softmax.exponentials(weighted, weighted), tile.keys)

    def results(self) -> tuple[Tensor, Tensor, LogSum]:
        """As of :class:`_Positives`, the sum of the weights for how many."""
        if self.softmax is not None:
            lse, mean, _ = self.softmax.results()
            return self.total, mean, lse
        nothing = self.sums.new_empty(0)
        return self.total, self.sums / self.total.clamp(min=self.least)[:, None], LogSum(nothing, nothing)


class _Classes:
    """The classes of the rows, as places among their sorted labels: what rows of a class share is made once."""

    def __init__(self, labels: Tensor) -> None:
        # Negative labels, which are no class, become one that no key has.
        labels = torch.where(labels < 0, torch.iinfo(torch.int64).max, labels)
        self.ordered = labels.sort().values
        self.rows = torch.searchsorted(self.ordered, labels)  # (N,): where each label stands first

    def of(self, labels: Tensor) -> Tensor:
        """The classes of keys (B,); N for a key that is of no row's.

        An absent key may have the class of rows: of absent ones, that count for nothing.
        """
        count = len(self.ordered)
        if count == 0:
            return torch.zeros_like(labels)
        first = torch.searchsorted(self.ordered, labels.contiguous())
        found = self.ordered[first.clamp_(max=count - 1)] == labels
        return torch.where(found, first, count)

    def pairs(self, classes: Tensor, own: Tensor) -> Tensor:
        """Which keys of a tile are positive for which rows, bool, (N, B), those that rows do not see left out."""
        return (self.rows[:, None] == classes).scatter_(0, own, False)


class Tile(NamedTuple):
    """Some keys of a part, prepared."""

    keys: Tensor  # (B, d)
    lengths: Tensor | None  # (B, 1): by which these were divided
    momentum: Tensor  # (B, d)
    labels: Tensor  # (B,)
    targets: Tensor | None  # (B,) or (B, C)
    absent: Tensor | None  # (B,) bool: to mask
    own: Tensor | None  # (1, B): which row does not see each key


def tiles(part: Part, size: int, *, present_alone: bool = False) -> Iterator[Tile]:
    """The keys of a part, `size` at a time.

    With `present_alone`, where one may ask how many there are, absent keys are taken out, and nothing is left to mask.
    Else their rows become zeros.
    """
    for start in range(0, len(part.online), size):
        chosen: slice | Tensor = slice(start, start + size)
        absent = negated(None if part.present is None else part.present[chosen])
        if present_alone and absent is not None and may_ask(absent):
            chosen, absent = (~absent).nonzero()[:, 0] + start, None
            if len(chosen) == 0:
                continue
        keys, lengths = part.prepare(part.online[chosen], absent)
        momentum = keys
        if part.momentum is not None and part.momentum is not part.online:
            momentum = part.prepare(part.momentum[chosen], absent)[0]
        own = None
        if part.own:
            places = torch.arange(start, start + len(keys), device=keys.device) if isinstance(chosen, slice) else chosen
            own = places[None]
        targets = None if part.targets is None else part.targets[chosen]
        yield Tile(keys, lengths, momentum, part.labels[chosen], targets, absent, own)


def tile_size(queries: Tensor) -> int:
    """How many keys make a tile for these queries (N, d)."""
    rows, width = queries.shape
    factor = 1 if queries.device.type == "cpu" else LAUNCH_FACTOR
    fitting = factor * min(TILE_SCORES // max(rows, 1), TILE_KEYS // max(width, 1))
    return min(max(fitting, MIN_TILE), factor * MAX_TILE)


def _hide(logits: Tensor, absent: Tensor | None, own: Tensor | None) -> Tensor:
    """Minus infinity, in place, for absent keys (B,), and for the row that does not see each key (rows, B)."""
    if absent is not None:
        logits.masked_fill_(absent, -torch.inf)
    return logits if own is None else logits.scatter_(0, own, -torch.inf)
