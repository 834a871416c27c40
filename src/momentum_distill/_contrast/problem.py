"""What one contrastive loss is computed from."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import may_ask
from momentum_distill._contrast.formulas import Positives, PositivesFrom, Reduction, pair_weights
from momentum_distill._group import Ranks
from momentum_distill._precision import sum_dtype
from momentum_distill._rows import keep_rows, row_lengths, shortest


class Prepare(NamedTuple):
    """Makes raw rows ready to be multiplied."""

    dtype: torch.dtype  # to sum in
    normalize: bool  # to unit length

    def __call__(self, raw: Tensor, absent: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows (B, d), and the lengths (B, 1) they were divided by; zeros for rows that are `absent`, bool, (B,)."""
        # Whatever those held: NaN times a weight of zero would be NaN.
        rows = (raw if absent is None else raw.masked_fill(absent[:, None], 0.0)).to(self.dtype)
        if not self.normalize:
            return rows, None
        lengths = row_lengths(rows, shortest(raw))
        return rows / lengths, lengths

    def backward(self, rows: Tensor, lengths: Tensor | None, grad: Tensor) -> Tensor:
        r"""$(g - \bar x\,(\bar x^\top g)) / \lVert x\rVert$ for that of unit rows, $g$, which is written over."""
        if lengths is None:
            return grad
        return grad.addcmul_(rows, (rows * grad).sum(dim=1, keepdim=True), value=-1).div_(lengths)


class Part(NamedTuple):
    """One part of the keys, and of those that the momentum model gives for the same samples."""

    online: Tensor  # (Q, d), raw
    momentum: Tensor | None  # (Q, d), raw; the same object as `online` where they are the same keys
    labels: Tensor  # (Q,) int64
    prepare: Prepare
    own: bool  # key i is row i of the batch, which does not see it: `exclude_self`
    targets: Tensor | None  # (Q,) or (Q, C), in the dtype to sum in; None: classes say what is positive
    present: Tensor | None = None  # (Q,) bool, None if all are; what an absent row holds does not matter


EXACT = 2**24
"""Whole numbers up to this are float32."""

Bounds: TypeAlias = tuple[float, float] | None
"""The smallest and the largest label, where somebody looked."""


class Choices(NamedTuple):
    """What a loss is, but for its tensors, and for how these are prepared."""

    positives: Positives
    reduction: Reduction
    ignore_index: int
    positives_from: PositivesFrom
    width: float
    hardness: float


class Problem(NamedTuple):
    """All that a contrastive loss is computed from. Tensors as they were given, and with their graph."""

    query: Tensor  # (N, d), raw
    keys: list[Part]
    labels: Tensor  # (N,) int64
    labelled: bool  # whether every row is known to have a class
    whole: bool  # whether no row and no key is known to be absent
    small_labels: bool  # whether all labels are known to be exact in float32
    momentum_query: Tensor | None  # (N, d), raw
    temperature: float | Tensor
    momentum_temperature: float | Tensor
    alpha: float | Tensor
    prepare: Prepare  # of the queries
    choices: Choices
    ranks: Ranks | None
    targets: Tensor | None  # (N,) or (N, C), in the dtype to sum in; None: classes say what is positive
    present: Tensor | None = None  # (N,) bool, None if all rows are

    @property
    def same_keys(self) -> bool:
        """Whether the momentum model has the very keys of the online one, so that one product serves both."""
        return self.momentum_query is not None and all(part.momentum is part.online for part in self.keys)

    @property
    def weighs(self) -> bool:
        """Whether something else than counting keys by class asks for the weights of pairs."""
        return self.targets is not None or self.choices.hardness > 0

    def tensors(self) -> list[Tensor]:
        """All that is read again if the gradient cannot be made at once."""
        momentum = [part.momentum for part in self.keys if part.momentum is not None]
        query = [] if self.momentum_query is None else [self.momentum_query]
        targets = [self.targets, *(part.targets for part in self.keys)]
        numbers = (self.temperature, self.momentum_temperature, self.alpha)
        return [
            *(given for given in (*targets, *numbers) if isinstance(given, Tensor)),
            self.query,
            *(part.online for part in self.keys),
            *momentum,
            self.labels,
            *(part.labels for part in self.keys),
            *query,
        ]

    def signature(self, loss: str = "SupConDistillLoss") -> str:
        """What has to be the same on all ranks, in words."""
        targets, choices = "without" if self.momentum_query is None else "with", self.choices
        words = (
            f"{loss} of width {self.query.shape[1]}, {self.prepare.dtype}, {targets} momentum, "
            f"positives={choices.positives!r}, exclude_self={self.keys[0].own}, reduction={choices.reduction!r}"
        )
        if choices.positives_from != "labels":
            kind = "a function" if callable(choices.positives_from) else repr(choices.positives_from)
            words += f", positives_from={kind}, width={choices.width:g}"
        return f"{words}, hardness={choices.hardness:g}" if choices.hardness else words


def problem_of(
    query: Tensor,
    keys: Sequence[Tensor],
    labels: Tensor,
    key_labels: Sequence[Tensor],
    momentum_query: Tensor | None,
    momentum_keys: Sequence[Tensor],  # none, or as many as `keys`
    temperature: float | Tensor,
    momentum_temperature: float | Tensor,
    alpha: float | Tensor,
    choices: Choices,
    normalize: bool,  # the rows of the queries
    normalize_keys: bool,
    exclude_self: bool,
    ranks: Ranks | None,
    seen: Bounds,
    seen_keys: Sequence[Bounds],
    targets: Tensor | None,
    key_targets: Sequence[Tensor],  # none, or as many as `keys`
) -> Problem:
    """From checked arguments and int64 labels."""
    dtype = sum_dtype(query, *keys, *momentum_keys, momentum_query)
    prepare_keys = Prepare(dtype, normalize_keys)
    every = (seen, *seen_keys)
    parts = [
        Part(
            part,
            momentum_keys[index] if momentum_keys else None,
            key_labels[index],
            prepare_keys,
            own=exclude_self and index == 0,
            targets=key_targets[index].detach().to(dtype) if key_targets else None,
        )
        for index, part in enumerate(keys)
    ]
    return Problem(
        query,
        parts,
        labels,
        seen is not None and seen[0] >= 0,
        all(pair is not None and pair[0] > choices.ignore_index for pair in every),
        all(pair is not None and pair[0] >= -EXACT and pair[1] <= EXACT for pair in every),
        momentum_query,
        temperature,
        momentum_temperature,
        0.0 if momentum_query is None else alpha,
        Prepare(dtype, normalize),
        choices,
        ranks,
        None if targets is None else targets.detach().to(dtype),
    )


def least_weight(problem: Problem) -> float:
    """The least that the weights of a row with a positive key sum to."""
    # Neither this nor the next is a property: the compiler of torch 2.8 does not look into those of a NamedTuple.
    return 1 if problem.targets is None else torch.finfo(problem.prepare.dtype).tiny


def penalty_scale(problem: Problem) -> float | Tensor:
    """What a logit is to be multiplied by for the penalty of a hard negative; 0.0 without."""
    if not problem.choices.hardness:
        return 0.0
    tau = problem.temperature
    return problem.choices.hardness * (tau.detach() if isinstance(tau, Tensor) else tau)


def masked(problem: Problem, *, classes_alone: bool = False) -> Problem:
    """The same with what is present, in rows and keys; or of that what has a class."""
    if problem.whole and not classes_alone:
        return problem
    absent = problem.choices.ignore_index
    parts = [
        Part(
            *(part.online, part.momentum, part.labels, part.prepare, part.own, part.targets),
            _present(part.labels, absent, classes_alone),
        )
        for part in problem.keys
    ]
    present = _present(problem.labels, absent, classes_alone)
    return changed(problem, problem.query, parts, problem.momentum_query, problem.prepare, present)


def changed(
    problem: Problem,
    query: Tensor,
    keys: list[Part],
    momentum_query: Tensor | None,
    prepare: Prepare,
    present: Tensor | None = None,
) -> Problem:
    """The same with these: field by field, for the compiler of torch 2.8 looks neither into _replace nor at a slice."""
    return Problem(
        query,
        keys,
        problem.labels,
        problem.labelled,
        problem.whole,
        problem.small_labels,
        momentum_query,
        problem.temperature,
        problem.momentum_temperature,
        problem.alpha,
        prepare,
        problem.choices,
        problem.ranks,
        problem.targets,
        present,
    )


def _present(labels: Tensor, ignore_index: int, classes_alone: bool) -> Tensor | None:
    """Which labels (N,) are not `ignore_index`, nor without a class where those do not count; None: all."""
    present = labels != ignore_index
    present = present & (labels >= 0) if classes_alone else present
    return None if may_ask(present) and bool(present.all()) else present


class PairWeights:
    """How positive keys are for rows, for as many keys at a time as are at hand: by targets, or by class alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.labelled = self._labelled(problem.labels)
        self.rows = None if problem.targets is None else keep_rows(problem.targets, self.labelled)

    def of(self, labels: Tensor, targets: Tensor | None, own: Tensor | None = None) -> Tensor:
        """w_ij (N, B) of keys, in the dtype to sum in.

        0 where a row or a key is absent or unlabelled, whatever its target holds, and where row `own` (1, B) does not
        see the key.
        """
        choices, labelled = self.problem.choices, self._labelled(labels)
        if self.rows is None or targets is None:
            weights = (self.problem.labels[:, None] == labels).to(self.problem.prepare.dtype)
        else:
            weights = pair_weights(self.rows, keep_rows(targets, labelled), choices.positives_from, choices.width)
        weights = weights.masked_fill(~(self.labelled[:, None] & labelled), 0.0)
        return weights if own is None else weights.scatter_(0, own, 0.0)

    def _labelled(self, labels: Tensor) -> Tensor:
        return (labels >= 0) & (labels != self.problem.choices.ignore_index)


def negated(present: Tensor | None) -> Tensor | None:
    """Which are absent, or None if none is."""
    return None if present is None else ~present
