r"""The contrastive loss as attention: what the loss needs of all keys, without an N×Q matrix.

With $s_{ij} = q_i^\top k_j / \tau$ and $V_i = \mathrm{softmax}_j(s_{ij})$ the loss needs only
$\mathrm{lse}_i = \log\sum_j e^{s_{ij}}$ and the sum of the keys of each class, and its gradient for the query only
$\sum_j V_{ij} k_j$: what attention returns whose values are its keys. The same holds for the momentum targets $U_i$. So
the keys are read once, tile by tile, the gradient for the queries is ready after the forward pass, and nothing of size
N×Q ever exists.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from momentum_distill._checks import is_traced, may_ask

DENSE_SCORES, DENSE_KEYS = 2**18, 2**20
"""Up to so many scores, N times Q, and so many numbers in the keys, Q times d, the loss takes the plain matrices: less
work stands around them than around tiles. Above, they cost memory, and soon time. Measured: `docs/performance.md`."""
TILE_SCORES, TILE_KEYS = 2**18, 2**18
"""Scores, and numbers of the keys, held at a time: larger tiles fall out of the cache."""
LAUNCH_FACTOR = 4
"""By how much larger tiles are on an accelerator without the kernel, where starting an operation is what takes time; by
more would take them past 16 MiB."""
MIN_TILE, MAX_TILE = 256, 8192
"""Fewest and most keys in a tile: smaller ones make the matrix products inefficient."""

SAFE_SUM = (1e-30, 1e30)
"""A sum of plain exponentials in this range lost nothing to underflow or overflow."""


class Prepare(NamedTuple):
    """Makes raw rows ready to be multiplied, and takes the gradient back to the raw ones."""

    dtype: torch.dtype  # to sum in
    normalize: bool  # to unit length

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows (B, d), and the lengths (B, 1) they were divided by."""
        rows = raw.to(self.dtype)
        if not self.normalize:
            return rows, None
        if wants_fused(rows):
            from momentum_distill import _triton

            return _triton.normalize(raw, shortest(raw))
        lengths = row_lengths(rows, shortest(raw))
        return rows / lengths, lengths

    def backward(self, rows: Tensor, lengths: Tensor | None, grad: Tensor) -> Tensor:
        r"""$(g - \bar x\,(\bar x^\top g)) / \lVert x\rVert$ for the gradient $g$ of unit rows $\bar x$."""
        if lengths is None:
            return grad
        return (grad - rows * (rows * grad).sum(dim=1, keepdim=True)) / lengths


def shortest(raw: Tensor) -> float:
    """Rows in which no magnitude reaches this have no direction: their gradient would leave the range of the dtype."""
    return 1e-3 if raw.dtype == torch.float16 else 1e-6


def row_lengths(rows: Tensor, eps: float) -> Tensor:
    """Euclidean lengths (B, 1); infinite for a row in which no magnitude reaches `eps`, so that it becomes zero."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if lengths.numel() and may_ask(lengths):
        low, high = (bound.item() for bound in lengths.aminmax())
        # The largest magnitude is at least the length over the root of the width; squares up to there do not overflow.
        if low >= eps * rows.shape[1] ** 0.5 and high < 1e15:
            return lengths
    largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else lengths
    scaled = largest * torch.linalg.vector_norm(rows / torch.where(largest == 0, 1.0, largest), dim=1, keepdim=True)
    return torch.where(largest < eps, torch.inf, scaled)


class Keys(NamedTuple):
    """One part of the keys, and of those that the momentum model gives for the same samples."""

    online: Tensor  # (Q, d), raw
    momentum: Tensor | None  # (Q, d), raw; the same object as `online` where they are the same keys
    labels: Tensor  # (Q,) int64
    present: Tensor  # (Q,) bool; what an absent row holds does not matter
    prepare: Prepare
    own: bool = False  # key i is row i of the batch, which does not see it: `exclude_self`


class Rows(NamedTuple):
    """The rows of a batch."""

    query: Tensor  # (N, d), prepared and divided by the temperature
    momentum: Tensor | None  # (N, d): the same of the momentum model
    labels: Tensor  # (N,) int64


class LogSum(NamedTuple):
    r"""$\mathrm{lse} = \log\sum_j e^{s_j}$ of each row in two numbers: large logits take digits from their sum."""

    shift: Tensor  # (N,): the largest logit, or what is near enough
    log: Tensor  # (N,): the logarithm of the sum relative to it

    def value(self) -> Tensor:
        """The lse."""
        return self.shift + self.log

    def off(self, logits: Tensor) -> Tensor:
        r"""$s - \mathrm{lse}$, the logarithm of a softmax, of logits `(N,)` or `(N, B)`."""
        shift, log = (self.shift, self.log) if logits.ndim == 1 else (self.shift[:, None], self.log[:, None])
        return (logits - shift) - log


class Statistics(NamedTuple):
    """Sums over the keys that are present; without one, an lse and a mean are 0. What was not asked for is empty.

    The positive keys of a row are weighed by $P_{ij}$: alike, $1 / K_i$, or by the softmax over them.
    """

    lse: LogSum
    mean_key: Tensor  # (N, d): sum_j V_ij k_j
    positive_count: Tensor  # (N,) int64: K_i
    positive_mean_key: Tensor  # (N, d): sum_j P_ij k_j
    positive_lse: LogSum  # over the positive keys; where these are weighed by the softmax
    momentum_lse: LogSum
    momentum_mean_key: Tensor  # (N, d): sum_j U_ij k_j
    momentum_mean_logit: Tensor  # (N,): sum_j U_ij s'_ij


class RowGradients(NamedTuple):
    """What each row passes back to its statistics, on the way to the keys."""

    lse: Tensor  # (N,)
    positive_lse: Tensor  # (N,); inside the logarithm
    positive_mean_key: Tensor  # (N, d), by the number of positive keys; outside it
    momentum_mean_key: Tensor  # (N, d)


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
        if not self.total.numel():
            return True
        low, high = (bound.item() for bound in self.total.aminmax())
        return SAFE_SUM[0] < low and high < SAFE_SUM[1]

    def results(self) -> tuple[LogSum, Tensor, Tensor]:
        """The lse, the mean key (N, d) and the mean logit (N,); zeros where there was no key."""
        if self.shift is None:
            lse = LogSum(torch.zeros_like(self.total), self.total.log())
            return lse, self.keys.div_(self.total[:, None]), self.logits.div_(self.total)
        nothing = self.total == 0
        total = torch.where(nothing, 1.0, self.total)
        lse = LogSum(torch.where(nothing, 0.0, self.shift), total.log())
        return lse, self.keys.div_(total[:, None]), self.logits.div_(total)


def attend(rows: Rows, keys: list[Keys], *, inside: bool) -> Statistics:
    """The statistics, by plain torch operations on any device or, where there is one, by the fused kernel.

    Args:
        rows: The queries.
        keys: The parts of the keys.
        inside: Whether the positive keys are weighed by the softmax over them, and want an lse of their own.
    """
    if takes_kernel(rows.query, keys):
        return _attend_fused(rows, keys, inside=inside)
    if may_ask(rows.query):
        # Moderate logits need no running shift, which costs two passes over each tile. Whether they were is known
        # afterwards.
        result = _run(rows, keys, inside=inside, online=False)
        if result is not None:
            return result
    result = _run(rows, keys, inside=inside, online=True)
    assert result is not None
    return result


def _run(rows: Rows, keys: list[Keys], *, inside: bool, online: bool) -> Statistics | None:
    """One pass over the keys; None if it should have been an `online` one, with a running shift."""
    query, momentum_query = rows.query, rows.momentum
    count, width = query.shape
    student = _Sums(count, query, online=online)
    teacher = _Sums(0 if momentum_query is None else count, query, online=online)
    positive = _Sums(count, query, online=True) if inside else None  # a row may have no positive key
    sorted_labels, row_classes = sort_labels(rows.labels)
    # By index among the sorted labels; the last is of no query's class.
    class_sums = query.new_zeros(0 if inside else count + 1, width)
    class_counts = row_classes.new_zeros(count + 1)
    # By row, in the part that has a key which the row does not see: there, rows of one class differ in their positives.
    own_counts = row_classes.new_zeros(count if keys[0].own else 0)
    own_sums = query.new_zeros(0 if inside else len(own_counts), width)

    # One product serves queries and momentum queries where they meet the same keys.
    same_keys = momentum_query is not None and all(part.momentum is part.online for part in keys)
    stacked = torch.cat([query, momentum_query]) if same_keys and momentum_query is not None else query
    size = tile_size(stacked)
    longest = min(size, max(part.online.shape[0] for part in keys))
    buffer = query.new_empty(stacked.shape[0] * longest)
    scores_buffer = query.new_empty(0 if same_keys else teacher.total.shape[0] * longest)

    for part in keys:
        for tile_keys, tile_momentum, labels, absent, own in _tiles(part, size):
            tile = tile_keys.shape[0]
            classes = class_of(labels, sorted_labels)
            logits = buffer[: stacked.shape[0] * tile].view(stacked.shape[0], tile)
            torch.mm(stacked, tile_keys.T, out=logits)
            if absent is not None:
                logits.masked_fill_(absent, -torch.inf)
            if own is None:
                class_counts.index_add_(0, classes, torch.ones_like(classes))
            else:
                logits.scatter_(0, torch.cat([own, own + count]) if same_keys else own, -torch.inf)
                pairs = _pairs_but_own(row_classes, classes, own)
                own_counts += pairs.sum(dim=1)
            if positive is not None:
                others = row_classes[:, None] != classes
                masked = logits[:count].masked_fill(others, -torch.inf)
                positive.add(positive.exponentials(masked, masked), tile_keys)
            elif own is not None:
                own_sums.addmm_(pairs.to(query.dtype), tile_keys)
            else:
                # By tile first: a long plain sum of float32 loses digits.
                class_sums += torch.zeros_like(class_sums).index_add_(0, classes, tile_keys)
            student.add(student.exponentials(logits[:count], logits[:count]), tile_keys)
            if momentum_query is None:
                continue
            if same_keys:
                teacher.add(teacher.exponentials(logits[count:], logits[count:]), tile_keys)
                continue
            scores = scores_buffer[: count * tile].view(count, tile)
            torch.mm(momentum_query, tile_momentum.T, out=scores)
            masked = scores if absent is None else scores.masked_fill(absent, -torch.inf)
            masked = masked if own is None else masked.scatter(0, own, -torch.inf)
            weights = teacher.exponentials(masked, logits)
            teacher.add(weights, tile_keys)
            teacher.logits += torch.linalg.vecdot(weights, scores)

    if not online and not (student.is_exact() and teacher.is_exact()):
        return None
    if same_keys and momentum_query is not None:
        teacher.logits = torch.linalg.vecdot(momentum_query, teacher.keys)  # sum_j U_ij q'_i.k_j
    lse, mean_key, _ = student.results()
    momentum_lse, momentum_mean_key, momentum_mean_logit = teacher.results()
    positive_count = class_counts[row_classes]
    if keys[0].own:
        positive_count += own_counts
    if positive is None:
        positive_lse = LogSum(query.new_empty(0), query.new_empty(0))
        positive_sums = class_sums[row_classes]
        if keys[0].own:
            positive_sums += own_sums
        positive_mean_key = positive_sums / positive_count.clamp(min=1)[:, None]
    else:
        positive_lse, positive_mean_key, _ = positive.results()
    return Statistics(
        lse,
        mean_key,
        positive_count,
        positive_mean_key,
        positive_lse,
        momentum_lse,
        momentum_mean_key,
        momentum_mean_logit,
    )


def is_small(queries: Tensor, keys: list[Keys]) -> bool:
    """Whether the plain N×Q matrices are the better way to the loss of so many prepared queries and keys."""
    rows, width = queries.shape
    count = sum(part.online.shape[0] for part in keys)
    return rows * count <= DENSE_SCORES and width * count <= DENSE_KEYS and not takes_kernel(queries, keys)


def takes_kernel(queries: Tensor, keys: list[Keys]) -> bool:
    """Whether these go to the Triton kernel, which knows no row with a key that it does not see."""
    return not keys[0].own and wants_fused(queries)


def wants_fused(query: Tensor) -> bool:
    """Whether a Triton kernel takes these rows: float32 on a GPU, unless `MOMENTUM_DISTILL_TRITON=0`.

    With `MOMENTUM_DISTILL_TRITON=1` Triton's interpreter does, on the CPU, where that was chosen.
    """
    asked = os.environ.get("MOMENTUM_DISTILL_TRITON")
    if query.dtype != torch.float32 or asked == "0" or type(query) is not Tensor or is_traced():
        return False
    if query.is_cuda:
        from momentum_distill import _triton  # takes a while to import

        return _triton.works(query.device)
    return asked == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def _attend_fused(rows: Rows, keys: list[Keys], *, inside: bool) -> Statistics:
    """:func:`attend` by the fused kernel."""
    from momentum_distill import _triton

    parts = [
        _triton.Part(
            part.online,
            part.momentum,
            part.labels,
            part.present,
            shortest(part.online) if part.prepare.normalize else None,
        )
        for part in keys
    ]
    return _triton.attend(rows.query, rows.labels, parts, momentum_query=rows.momentum, inside=inside)


def tile_size(queries: Tensor) -> int:
    """How many keys make a tile for these queries (N, d)."""
    rows, width = queries.shape
    factor = 1 if queries.device.type == "cpu" else LAUNCH_FACTOR
    fitting = factor * min(TILE_SCORES // max(rows, 1), TILE_KEYS // max(width, 1))
    return min(max(fitting, MIN_TILE), factor * MAX_TILE)


def sort_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels in order (N,), and where each stands first among them (N,).

    Negative labels, which are no class, become one that no key has.
    """
    labels = torch.where(labels < 0, torch.iinfo(torch.int64).max, labels)
    ordered = labels.sort().values
    return ordered, torch.searchsorted(ordered, labels)


def class_of(labels: Tensor, sorted_labels: Tensor) -> Tensor:
    """Where each label (B,) stands first among the sorted labels of the N queries; N for a key that is no one's.

    The sorted labels hold nothing negative, see :func:`sort_labels`. An absent key may have the class of queries: of
    absent ones, that count for nothing.
    """
    count = sorted_labels.shape[0]
    if count == 0:
        return torch.zeros_like(labels)
    first = torch.searchsorted(sorted_labels, labels.contiguous())
    found = sorted_labels[first.clamp_(max=count - 1)] == labels
    return torch.where(found, first, count)


def _pairs_but_own(row_classes: Tensor, classes: Tensor, own: Tensor) -> Tensor:
    """Which keys of a tile are positive for which rows, bool, (N, B), those that rows do not see left out."""
    return (row_classes[:, None] == classes).scatter_(0, own, False)


def _tiles(part: Keys, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Online keys (B, d), momentum keys (B, d), labels (B,) and which keys to mask (B,), `size` keys at a time.

    The last says which row does not see each key (1, B), if it is so.

    Where one may ask how many there are, absent keys are taken out, and nothing is left to mask. Else their rows become
    zeros, for a NaN times a weight of zero would be NaN.
    """
    momentum = part.online if part.momentum is None else part.momentum
    asking = may_ask(part.online)
    everywhere = asking and bool(part.present.all())
    for start in range(0, part.online.shape[0], size):
        stop = min(start + size, part.online.shape[0])
        chosen: slice | Tensor = slice(start, stop)
        absent = None
        if not everywhere:
            present = part.present[chosen]
            if asking:
                chosen = present.nonzero()[:, 0] + start
                if len(chosen) == 0:
                    continue
            else:
                absent = ~present
        online = part.online[chosen]
        other = online if momentum is part.online else momentum[chosen]
        if absent is not None:
            online = online.masked_fill(absent[:, None], 0.0)
            other = other.masked_fill(absent[:, None], 0.0)
        rows = part.prepare(online)[0]
        own = None
        if part.own:
            own = (chosen if isinstance(chosen, Tensor) else torch.arange(start, stop, device=online.device))[None]
        yield rows, rows if momentum is part.online else part.prepare(other)[0], part.labels[chosen], absent, own


def grad_keys(part: Keys, rows: Rows, statistics: Statistics, grads: RowGradients, *, inside: bool) -> Tensor:
    r"""Gradient (Q, d) for the raw online keys of a part, tile by tile, in the dtype to sum in.

    $$\frac{\partial}{\partial k_j} = \sum_i (g_i V_{ij} + g^+_i P_{ij})\,q_i + \sum_i U_{ij}\, G_i
      + \sum_{i : c_i = c_j} G^+_i$$

    Args:
        part: The keys.
        rows: The queries.
        statistics: What :func:`attend` returned.
        grads: Gradients for `lse` $g$, `positive_lse` $g^+$, `momentum_mean_key` $G$ and the positive keys $G^+$.
        inside: As for :func:`attend`.
    """
    size = tile_size(rows.query)
    grad = torch.empty_like(part.online, dtype=rows.query.dtype)
    sorted_labels, row_classes = sort_labels(rows.labels)
    class_grads = rows.query.new_zeros(len(row_classes) + 1, rows.query.shape[1])
    if not inside:
        class_grads.index_add_(0, row_classes, grads.positive_mean_key)
    for start in range(0, part.online.shape[0], size):
        chosen = slice(start, start + size)
        absent = ~part.present[chosen]
        keys, lengths = part.prepare(part.online[chosen].masked_fill(absent[:, None], 0.0))
        classes = class_of(part.labels[chosen], sorted_labels)
        logits = (rows.query @ keys.T).masked_fill(absent, -torch.inf)
        own = torch.arange(start, start + len(keys), device=keys.device)[None] if part.own else None
        if own is not None:
            logits.scatter_(0, own, -torch.inf)
        weights = statistics.lse.off(logits).exp() * grads.lse[:, None]
        if inside:
            others = row_classes[:, None] != classes
            positive = statistics.positive_lse.off(logits.masked_fill(others, -torch.inf)).exp()
            weights += positive * grads.positive_lse[:, None]
        tile = weights.T @ rows.query
        if not inside:
            if own is None:
                tile += class_grads[classes]
            else:
                pairs = _pairs_but_own(row_classes, classes, own)
                tile.addmm_(pairs.to(tile.dtype).T, grads.positive_mean_key)
        if rows.momentum is not None and part.momentum is not None:
            momentum = part.prepare(part.momentum[chosen].masked_fill(absent[:, None], 0.0))[0]
            scores = (rows.momentum @ momentum.T).masked_fill(absent, -torch.inf)
            scores = scores if own is None else scores.scatter_(0, own, -torch.inf)
            tile += statistics.momentum_lse.off(scores).exp().T @ grads.momentum_mean_key
        grad[chosen] = part.prepare.backward(keys, lengths, tile).masked_fill(absent[:, None], 0.0)
    return grad
