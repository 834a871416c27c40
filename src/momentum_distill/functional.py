r"""Every formula of the library, once: pure functions, tensors in, tensors out, no state.

The equation numbers are those of MTMD (Lin and Hu, *Multi-Task Momentum Distillation for Multimodal Sentiment
Analysis*, IEEE Transactions on Affective Computing, 2023). Shapes: `N` rows of a batch, `Q` keys, `d` features, `C`
classes. Sums run in float32 or wider whatever the inputs are, with autocast switched off inside. Shapes, dtypes and
Python numbers are checked, and labels where looking is free, on the CPU outside `torch.compile`; values of tensors
otherwise with `validate=True` alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from momentum_distill import _streaming
from momentum_distill._checks import (
    REDUCTIONS,
    check_bool,
    check_choice,
    check_classes,
    check_device,
    check_finite,
    check_floating,
    check_int,
    check_labels,
    check_number,
    check_scalar,
    check_shape,
    check_validate,
    describe,
    is_traced,
    may_ask,
    wrong_type,
    wrong_value,
)
from momentum_distill._group import Group, Ranks, check_group, errors_shared_by_sum, find_ranks, sum_over_ranks
from momentum_distill._outputs import (
    CLASS_WEIGHTS,
    TASKS,
    check_fusion,
    check_outputs,
    keep_rows,
    row_mask,
    validate_outputs,
)
from momentum_distill._precision import full_precision, sum_dtype
from momentum_distill._streaming import Keys, Prepare, RowGradients, Rows, Statistics, shortest

__all__ = [
    "SupConTerms",
    "contrast_logits",
    "ema_update",
    "hard_sample_fusion_loss",
    "l2_normalize",
    "mean_rows",
    "response_distill_loss",
    "straight_through",
    "supcon_distill_loss",
    "supcon_distill_terms",
]

Parts: TypeAlias = Tensor | Sequence[Tensor]
Positives: TypeAlias = Literal["outside", "inside", "inside_per_positive"]
Reduction: TypeAlias = Literal["none", "mean", "sum"]
Task: TypeAlias = Literal["regression", "classification"]
ClassWeight: TypeAlias = Literal["distance", "error_rate", "per_sample"]
Normalize: TypeAlias = Literal["query"] | bool

POSITIVES = ("outside", "inside", "inside_per_positive")


class SupConTerms(NamedTuple):
    """What :func:`supcon_distill_terms` returns, for logs and for Fig. 5(b) of the paper."""

    total: Tensor
    """$(1-\\alpha)\\cdot$ `supervised` $+\\,\\alpha\\cdot$ `distill`; shape `()`, or `(N,)` with `reduction="none"`."""
    supervised: Tensor
    """The modality-shared part, Eq. 9, reduced over the rows that have a positive key; shape as `total`."""
    distill: Tensor
    """The modality-specific part, the KL divergence of Eq. 11, reduced over all rows; shape as `total`."""
    rows: Tensor
    """How many rows count (label not `ignore_index`), int64, shape `()`."""
    rows_with_positive: Tensor
    """How many of them have at least one positive key, int64, shape `()`."""


# --------------------------------------------------------------------------------------------------------------------
# Similarities
# --------------------------------------------------------------------------------------------------------------------


def l2_normalize(x: Tensor, *, eps: float | None = None) -> Tensor:
    r"""Rows divided by their Euclidean length, with a bounded gradient.

    $$\bar x = x / \lVert x \rVert_2$$

    Each row is first divided by its largest magnitude, so squares neither overflow nor underflow. A row in which no
    magnitude reaches `eps` has no direction to speak of: it becomes the zero row, with zero gradient (a plain division
    by `max(norm, 1e-12)` sends a gradient of 1e12 there).

    Args:
        x: Features, shape `(N, d)`, floating.
        eps: Smallest largest-magnitude of a row that has a direction. Default: 1e-6; 1e-3 for a float16 `x`, whose
            gradient would overflow below.

    Returns:
        Unit rows (or zero rows), shape `(N, d)`, in float32 or wider.

    Raises:
        TypeError: If `x` is not a floating tensor, or `eps` not a number.
        ValueError: If `x` is not a matrix, or `eps` not positive.

    Example:
        >>> import torch
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    check_floating("x", x, shape=("N", "d"))
    if eps is not None:
        check_number("eps", eps, low=0.0, open_low=True)
    return normalize_rows(x.to(_sum_dtype(x)), shortest(x) if eps is None else eps)


def normalize_rows(x: Tensor, eps: float) -> Tensor:
    """:func:`l2_normalize` without checks, of the rows of any stack of matrices."""
    if x.shape[-1] == 0:
        return x
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    largest.masked_fill_(largest < eps, torch.inf)  # makes zeros of a row that is too short; NaN stays NaN
    scaled = x / largest
    squares = scaled.square().sum(dim=-1, keepdim=True)  # at least 1, or 0 in a row of zeros
    return scaled * squares.clamp(min=0.5).rsqrt_()


def contrast_logits(query: Tensor, keys: Tensor, *, temperature: float | Tensor, normalize: Normalize = True) -> Tensor:
    r"""Similarity of every query to every key, divided by the temperature: the exponents of Eq. 8.

    $$s_{ij} = \bar q_i^\top \bar k_j / \tau$$

    Args:
        query: Features $q$, shape `(N, d)`.
        keys: Features $k$, shape `(Q, d)`.
        temperature: $\tau > 0$, a number or a tensor of shape `()`; smaller is sharper.
        normalize: L2-normalise the rows of both (True), of `query` alone (`"query"`, for keys that are unit rows
            already) or of neither (False: plain dot products).

    Returns:
        Logits, shape `(N, Q)`, in float32 or wider.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the widths differ, or `temperature` is a number that is not positive and finite.

    Example:
        >>> import torch
        >>> contrast_logits(torch.eye(2), torch.eye(2), temperature=0.5)
        tensor([[2., 0.],
                [0., 2.]])
    """
    check_floating("query", query, shape=("N", "d"))
    check_floating("keys", keys, shape=("Q", query.shape[1]))
    check_device("keys", keys, query.device, like="query")
    check_scalar("temperature", temperature, low=0.0, open_low=True)
    check_normalize(normalize)
    dtype = _sum_dtype(query, keys)
    with full_precision(query):
        query_rows, key_rows = query.to(dtype), keys.to(dtype)
        if normalize:
            query_rows = normalize_rows(query_rows, shortest(query))
        if normalize is True:
            key_rows = normalize_rows(key_rows, shortest(keys))
        return query_rows @ key_rows.T / temperature


# --------------------------------------------------------------------------------------------------------------------
# Feature-based distillation: Eq. 8, 9, 11 (and 22, 23)
# --------------------------------------------------------------------------------------------------------------------


def supcon_distill_loss(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    *,
    temperature: float | Tensor,
    momentum_query: Tensor | None = None,
    momentum_keys: Parts | None = None,
    momentum_temperature: float | Tensor | None = None,
    alpha: float | Tensor = 0.4,
    positives: Positives = "outside",
    reduction: Reduction = "mean",
    normalize: Normalize = True,
    ignore_index: int = -1,
    exclude_self: bool = False,
    group: Group = None,
    validate: bool = False,
) -> Tensor:
    r"""Supervised contrastive loss of one direction, with soft targets from a momentum model.

    With $s_{ij} = \bar q_i^\top \bar k_j / \tau$, $V_i = \mathrm{softmax}_j(s_{ij})$, labels $c$ and the
    $K_i = \#\{j : c_j = c_i \ge 0\}$ positive keys of row $i$,

    $$\mathcal L_i = (1-\alpha)\,\mathcal S_i + \alpha\, \mathrm{KL}(U_i \,\Vert\, V_i), \qquad
      U_i = \mathrm{softmax}_j(\bar q_i'^\top \bar k_j' / \tau)$$

    where $\mathcal S_i$ is, by `positives`,

    - `"outside"`: $-\frac1{K_i}\sum_{j:c_j=c_i}\log V_{ij}$ (Eq. 9 with targets that sum to 1),
    - `"inside"`: $-\log\sum_{j:c_j=c_i} V_{ij}$ (Eq. 8 put into Eq. 9),
    - `"inside_per_positive"`: $-\frac1{K_i}\log\sum_{j:c_j=c_i} V_{ij}$ (Eq. 22 as printed).

    No gradient flows through $U$, nor through the temperature inside it. Without momentum inputs the loss is
    $\mathcal S_i$ alone.

    A row or key whose label is `ignore_index` is left out of everything, whatever it holds. A row without a positive
    key adds 0 to the supervised sum and does not count in its mean; its KL term stands. With no row or no key left
    the loss is 0 and still connected to the graph. NaN in a row or key that counts makes the loss NaN.

    A batch that is query and keys at once counts each row as its own positive, unlike SupCon; `exclude_self=True` takes
    the row out, of $V$, $U$ and the positives.

    More than $2^{18}$ scores (N·Q), or those of more than $2^{20}$ numbers in the keys (Q·d), are made tile by tile,
    and nothing of size N×Q is kept, forward or backward. Four cases take the N×Q matrices: fewer of both, which is
    faster so; `torch.compile`, which fuses them; the transforms of `torch.func` (grad, jvp, vmap); and a backward pass
    with `create_graph=True`. On an NVIDIA GPU a fused kernel (Triton) takes all sizes, but in float64 and with
    `exclude_self`: keys in 16 bits are multiplied as they are, and queries rounded to their dtype.

    Args:
        query: Features $q$ of the batch, shape `(N, d)`.
        keys: Features $k$ to compare with, shape `(Q, d)`; or a tuple of such parts, taken as concatenated (the keys
            of the batch, then a queue). Gradient is computed only for the parts that require it.
        query_labels: Classes of the rows, integer, shape `(N,)`: at least 0; `ignore_index` = absent; -2 = there but
            unlabelled: nobody's positive, while the KL term stands. Other numbers are refused on the CPU, outside
            `torch.compile` and `torch.func`; on an accelerator with `validate`.
        key_labels: Classes of the keys, integer, shape `(Q,)`; a tuple of parts where `keys` is one.
        temperature: $\tau > 0$, a number or a tensor of shape `()` (with gradient if it requires it).
        momentum_query: $q'$ from the momentum model, shape `(N, d)`. Given together with `momentum_keys`.
        momentum_keys: $k'$, shape `(Q, d)`, in parts like `keys`; key $j$ is the same sample in both.
        momentum_temperature: Temperature inside $U$; by default `temperature`, detached.
        alpha: Weight $\alpha$ of the momentum targets, in [0, 1]. Paper: 0.2 to 0.6.
        positives: Where the sum over the positive keys stands, see above.
        reduction: `"mean"`: the mean of $\mathcal S_i$ over rows with a positive and the mean of the KL terms over
            rows, weighted; `"sum"`; or `"none"`: one value per row, 0 where a row is left out.
        normalize: True: rows of queries and keys are L2-normalised here; `"query"`: only those of the queries, the keys
            (every part) are unit rows as a `ClassQueue` stores them; False: plain dot products.
        ignore_index: Label of what is absent.
        exclude_self: The keys, or their first part, are the batch itself: key $i$ (and momentum key $i$) is not there
            for row $i$. With several ranks that part is this rank's rows, and those of others are further parts.
        group: Whose rows the sums and means run over: None (this process), `"auto"` (torch.distributed's default group
            where there is one) or a process group. One collective of 64 bytes; none with `"none"`, which returns the
            rows of this rank. The keys are those given: a queue that all ranks share, the batch's through
            :func:`~momentum_distill.gather_rows`.
        validate: Also check values: finite features, labels wherever they are, unit rows where keys must have them.
            Makes the host wait for the device.

    Returns:
        The loss in nats, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device, range, choice or label is wrong, or only one momentum input is given.

    Example:
        >>> import torch
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> supcon_distill_loss(
        ...     query, keys, torch.tensor([0, 1]), torch.tensor([0, 1, 0]), temperature=1.0
        ... )
        tensor(0.7067)

    References:
        MTMD, Eq. 8, 9, 11, 22 and 23. Eq. 9 and 11 average two directions: call once for each. The sum over the
        positives stands outside the logarithm by default, as in SupCon (Khosla et al., 2020): `docs/paper_map.md`.
    """
    return supcon_distill_terms(
        query,
        keys,
        query_labels,
        key_labels,
        temperature=temperature,
        momentum_query=momentum_query,
        momentum_keys=momentum_keys,
        momentum_temperature=momentum_temperature,
        alpha=alpha,
        positives=positives,
        reduction=reduction,
        normalize=normalize,
        ignore_index=ignore_index,
        exclude_self=exclude_self,
        group=group,
        validate=validate,
    ).total


def supcon_distill_terms(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    *,
    temperature: float | Tensor,
    momentum_query: Tensor | None = None,
    momentum_keys: Parts | None = None,
    momentum_temperature: float | Tensor | None = None,
    alpha: float | Tensor = 0.4,
    positives: Positives = "outside",
    reduction: Reduction = "mean",
    normalize: Normalize = True,
    ignore_index: int = -1,
    exclude_self: bool = False,
    group: Group = None,
    validate: bool = False,
) -> SupConTerms:
    r"""The parts of :func:`supcon_distill_loss`, same arguments.

    Returns:
        `total`, `supervised` (the modality-shared part), `distill` (the modality-specific KL part, 0 without momentum
        inputs), `rows` and `rows_with_positive`.

    Example:
        >>> import torch
        >>> eye, labels = torch.eye(3), torch.tensor([0, 1, 5])
        >>> terms = supcon_distill_terms(eye, eye[:2], labels, labels[:2], temperature=1.0)
        >>> int(terms.rows), int(terms.rows_with_positive)
        (3, 2)
    """
    check_group(group)
    ranks = find_ranks(group) if reduction != "none" else None
    with errors_shared_by_sum(ranks, query):
        _check_choices(
            temperature,
            momentum_temperature,
            alpha,
            positives,
            reduction,
            normalize,
            ignore_index,
            exclude_self,
            validate,
        )
        keys, key_labels, momentum_keys = _check_features(
            query, keys, query_labels, key_labels, momentum_query, momentum_keys, exclude_self
        )
        # Narrow integers would wrap when compared with ignore_index: 255 is -1 in eight bits.
        query_labels = query_labels.to(torch.int64)
        key_labels = tuple(part.to(torch.int64) for part in key_labels)
        for name, labels in [("query_labels", query_labels), *_named("key_labels", key_labels)]:
            check_classes(name, labels, absent=ignore_index, validate=validate)
        if validate:
            _validate_contrast(query, keys, query_labels, key_labels, normalize, ignore_index)
            if momentum_query is not None:
                # The momentum rows stand for the same samples.
                _validate_contrast(
                    momentum_query, momentum_keys, query_labels, key_labels, normalize, ignore_index, "momentum_"
                )

    present = query_labels != ignore_index  # (N,)
    dtype = _sum_dtype(query, *keys, *momentum_keys, *(() if momentum_query is None else (momentum_query,)))
    prepare_keys = Prepare(dtype, normalize is True)
    problem = _Problem(
        momentum_query,
        temperature if momentum_temperature is None else momentum_temperature,
        [
            Keys(
                part,
                momentum_keys[index] if momentum_keys else None,
                labels,
                labels != ignore_index,
                prepare_keys,
                own=exclude_self and index == 0,
            )
            for index, (part, labels) in enumerate(zip(keys, key_labels, strict=True))
        ],
        query_labels,
        present,
        Prepare(dtype, bool(normalize)),
        positives,
        positives != "outside",
        reduction,
        ranks,
    )
    weights = alpha if momentum_query is not None else 0.0
    with full_precision(query):
        if is_traced():
            return _reduce_terms(_dense_rows(problem, query, temperature), problem, weights)
        needs_grad = torch.is_grad_enabled()
        learned = [value if isinstance(value, Tensor) else None for value in (weights, temperature)]
        terms = _Contrast.apply(problem, weights, temperature, needs_grad, *learned, query, *keys)
    return SupConTerms(*terms)


class _Problem(NamedTuple):
    """All that a contrastive loss is computed from but its query, temperature and the keys' gradients."""

    momentum_query: Tensor | None  # (N, d), raw
    momentum_temperature: float | Tensor
    keys: list[Keys]
    query_labels: Tensor  # (N,) int64
    present: Tensor  # (N,) bool
    prepare: Prepare  # of the queries
    positives: Positives
    inside: bool  # whether the sum over the positive keys stands inside the logarithm
    reduction: Reduction
    ranks: Ranks | None

    def tensors(self) -> list[Tensor]:
        """All that is read again if the gradient cannot be made at once."""
        momentum = [part.momentum for part in self.keys if part.momentum is not None]
        labels = [self.query_labels, *(part.labels for part in self.keys)]
        query = [] if self.momentum_query is None else [self.momentum_query]
        return [*(part.online for part in self.keys), *momentum, *labels, *query]

    def signature(self) -> str:
        """What has to be the same on all ranks, in words."""
        targets = "without" if self.momentum_query is None else "with"
        return (
            f"SupConDistillLoss of width {self.keys[0].online.shape[1]}, {self.prepare.dtype}, {targets} momentum, "
            f"positives={self.positives!r}, exclude_self={self.keys[0].own}, reduction={self.reduction!r}"
        )


def _supervised_rows(positive_log: Tensor, positive_count: Tensor, positives: Positives) -> Tensor:
    r"""$\mathcal S_i$ of :func:`supcon_distill_loss`, shape `(N,)`; 0 (NaN if the row is) without a positive key.

    `positive_log` is the mean of $\log V_{ij}$ over the positive keys, or the log of their sum; 0 without any.
    """
    supervised = -positive_log
    if positives == "inside_per_positive":
        supervised = supervised / positive_count.clamp(min=1)
    return supervised


def _positive_log(rows: Rows, statistics: Statistics, *, inside: bool) -> Tensor:
    r"""What :func:`_supervised_rows` starts from, by $\log V_{ij} = s_{ij} - \mathrm{lse}_i$."""
    if inside:
        positive = statistics.lse.off(statistics.positive_lse.shift) + statistics.positive_lse.log
    else:
        positive = statistics.lse.off((rows.query * statistics.positive_mean_key).sum(dim=1))
    return torch.where(statistics.positive_count > 0, positive, statistics.lse.value() * 0)


def _kl_rows(rows: Rows, statistics: Statistics) -> Tensor:
    r"""$\mathrm{KL}(U_i\Vert V_i) = \sum_j U_{ij}\,((s'_{ij} - lse'_i) - (s_{ij} - lse_i))$, shape `(N,)`, Eq. 11."""
    if rows.momentum is None:
        return torch.zeros_like(statistics.lse.log)
    mean_logit = (rows.query * statistics.momentum_mean_key).sum(dim=1)
    return statistics.momentum_lse.off(statistics.momentum_mean_logit) - statistics.lse.off(mean_logit)


def _reduce_terms(rows: tuple[Tensor, Tensor, Tensor], problem: _Problem, alpha: float | Tensor) -> SupConTerms:
    """Both terms and the number of positive keys, each `(N,)`, the terms 0 in rows left out: reduced, and weighted."""
    supervised, distill, positive_count = rows
    row_count, positive_rows = problem.present.sum(), ((positive_count > 0) & problem.present).sum()
    if problem.reduction != "none":
        signature = "" if problem.ranks is None else problem.signature()
        supervised, distill, row_count, positive_rows = sum_over_ranks(
            problem.ranks, signature, supervised.sum(), distill.sum(), row_count, positive_rows
        )
    if problem.reduction == "mean":
        supervised, distill = supervised / positive_rows.clamp(min=1), distill / row_count.clamp(min=1)
    # A copy: an autograd.Function must not return one tensor as two of its outputs.
    total = supervised.clone() if problem.momentum_query is None else _blend(supervised, distill, alpha)
    return SupConTerms(total, supervised, distill, row_count, positive_rows)


class _Contrast(torch.autograd.Function):
    r"""The terms of the loss; the forward pass makes the gradient of the total as well, while all is at hand.

    $$\frac{\partial\mathcal S_i}{\partial s_{ij}} = V_{ij} - P_{ij}, \qquad
      \frac{\partial\,\mathrm{KL}_i}{\partial s_{ij}} = V_{ij} - U_{ij}$$

    with $P_{ij} = [c_j = c_i] / K_i$ or, inside the logarithm, the softmax over the positive keys. Few scores take
    the N×Q matrices $V$, $P$ and $U$; many take the keys tile by tile, which gives $\sum_j V_{ij} k_j$ and so on.

    So nothing is kept but that gradient, and a queue may go on. Only who asks for that of one term alone, or for a
    second derivative, has everything made once more, from inputs that must not have changed.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context object has no public type
        problem: _Problem,
        alpha: float | Tensor,
        temperature: float | Tensor,
        needs_grad: bool,
        *learned: Tensor | None,  # alpha and temperature if tensors, query, parts of the keys: for autograd to see
    ) -> tuple[Tensor, ...]:
        query = learned[2]
        assert query is not None
        solved = _Solved.of(problem, temperature, query)
        rows = (solved.supervised, solved.distill, solved.way.positive_count)
        terms = _reduce_terms(rows, problem, alpha)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms.rows, terms.rows_with_positive)
        ctx.problem, ctx.alpha, ctx.temperature, ctx.counts = problem, alpha, temperature, terms[3:]
        ctx.save_for_backward(*(tensor if tensor is not None and tensor.requires_grad else None for tensor in learned))
        ctx.query = query.detach()
        ctx.versions = [(tensor, _version(tensor)) for tensor in [query, *problem.tensors()]]
        ctx.grads = None
        wanted = ctx.needs_input_grad[4:]
        # Row by row, gradients for the keys are not known before the backward pass.
        if needs_grad and any(wanted) and not (problem.reduction == "none" and any(wanted[3:])):
            share = _share(alpha, problem.prepare.dtype)
            ctx.grads = solved.gradients(problem, temperature, 1 - share, share, ctx.counts, wanted[3:])
        ctx.difference = terms.distill - terms.supervised if wanted[0] else None
        return tuple(terms)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        grad_total: Tensor | None,
        grad_supervised: Tensor | None,
        grad_distill: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        upstream = (grad_total, grad_supervised, grad_distill)
        if all(grad is None for grad in upstream):
            return (None,) * len(ctx.needs_input_grad)
        with full_precision(ctx.problem.query_labels):  # backward() may be called under autocast
            if torch.is_grad_enabled():  # create_graph=True: the gradient is to have one itself
                return _dense_backward(ctx, upstream)
            wanted = ctx.needs_input_grad[4:]
            if ctx.grads is not None and grad_supervised is None and grad_distill is None:
                assert grad_total is not None
                grads, scale = ctx.grads, grad_total
            else:
                _check_versions(ctx.versions)
                alpha = _share(ctx.alpha, ctx.problem.prepare.dtype)
                nothing = torch.zeros((), dtype=ctx.problem.prepare.dtype, device=ctx.query.device)
                total, supervised, distill = (nothing if grad is None else grad for grad in upstream)
                solved = _Solved.of(ctx.problem, ctx.temperature, ctx.query)
                weights = (supervised + (1 - alpha) * total, distill + alpha * total)
                grads = solved.gradients(ctx.problem, ctx.temperature, *weights, ctx.counts, wanted[3:])
                scale = torch.ones_like(nothing)
            grad_queries, grad_temperatures, grad_keys = grads
            grad_alpha = grad_temperature = grad_query = None
            if wanted[0] and grad_total is not None:
                grad_alpha = (grad_total * ctx.difference).sum().to(ctx.alpha.dtype)
            if wanted[1]:
                grad_temperature = (scale * grad_temperatures).sum().to(ctx.temperature.dtype)
            if wanted[2]:
                grad_query = (scale[:, None] if scale.ndim else scale) * grad_queries
                grad_query = grad_query.to(ctx.query.dtype)
            parts = [
                None if grad is None else (scale * grad).to(part.online.dtype)
                for grad, part in zip(grad_keys, ctx.problem.keys, strict=True)
            ]
        return None, None, None, None, grad_alpha, grad_temperature, grad_query, *parts


class _Solved(NamedTuple):
    """The rows of the loss, and what their gradient is made from."""

    supervised: Tensor  # (N,), 0 in rows left out
    distill: Tensor  # (N,), the same
    way: "_Tiles | _Matrices"
    queries: Tensor  # (N, d), divided by the temperature
    unit: Tensor  # (N, d), before
    lengths: Tensor | None  # (N, 1) that the raw queries were divided by
    absent: Tensor | None  # (N,) bool: rows left out, if there are any

    @classmethod
    def of(cls, problem: _Problem, temperature: float | Tensor, query: Tensor) -> Self:
        """Take the way that is best for the number of scores."""
        everyone = may_ask(query) and bool(problem.present.all())
        absent = None if everyone else ~problem.present

        def ready(raw: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            # Zeros for rows that are left out, whatever they held: NaN times a weight of zero would be NaN.
            unit, lengths = problem.prepare(raw if absent is None else raw.masked_fill(absent[:, None], 0.0))
            return unit / tau, unit, lengths

        queries, unit, lengths = ready(query, temperature)
        momentum = None
        if problem.momentum_query is not None:
            momentum = ready(problem.momentum_query, problem.momentum_temperature)[0]
        solve = _Matrices.solve if _streaming.is_small(queries, problem.keys) else _Tiles.solve
        way = solve(problem, queries, momentum)
        supervised, distill = way.supervised, way.distill
        if absent is not None:
            supervised, distill = supervised.masked_fill(absent, 0.0), distill.masked_fill(absent, 0.0)
        return cls(supervised, distill, way, queries, unit, lengths, absent)

    def gradients(
        self,
        problem: _Problem,
        temperature: float | Tensor,
        grad_supervised: float | Tensor,
        grad_distill: float | Tensor,
        counts: tuple[Tensor, Tensor],
        wanted: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Gradients for the raw queries (N, d), the temperature by row (N,), and the parts of the keys `wanted`.

        `grad_supervised` and `grad_distill` are of the reduced terms, `counts` the rows that both were divided by.
        """
        zero = torch.zeros_like(self.supervised)
        grad_supervised, grad_distill = zero + grad_supervised, zero + grad_distill
        if problem.reduction == "mean":
            rows, positive_rows = counts
            grad_supervised = grad_supervised / positive_rows.clamp(min=1)
            grad_distill = grad_distill / rows.clamp(min=1)
        if problem.ranks is not None:  # as in sum_over_ranks
            grad_supervised, grad_distill = grad_supervised * problem.ranks.size, grad_distill * problem.ranks.size
        # A row without positive key has no part in the supervised term, one that is left out in none.
        grad_supervised = torch.where(self.way.positive_count > 0, grad_supervised, 0.0)
        if self.absent is not None:
            grad_supervised = grad_supervised.masked_fill(self.absent, 0.0)
            grad_distill = grad_distill.masked_fill(self.absent, 0.0)
        grad, grad_keys = self.way.backward(problem, grad_supervised, grad_distill, wanted)
        grad_temperatures = -(self.queries * grad).sum(dim=1) / temperature
        grad = problem.prepare.backward(self.unit, self.lengths, grad / temperature)
        if self.absent is not None:
            grad = grad.masked_fill(self.absent[:, None], 0.0)
        return grad, grad_temperatures, grad_keys


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; an inference tensor does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _check_versions(versions: list[tuple[Tensor, int]]) -> None:
    """Refuse what autograd would refuse, had it kept these inputs itself."""
    if any(_version(tensor) != version for tensor, version in versions):
        raise RuntimeError(
            "supcon_distill: keys, momentum inputs or labels were changed in place (by ClassQueue.enqueue?) before the "
            "gradient of a single term, or a second derivative, was taken; that needs them. Call backward() first, "
            "differentiate `total`, or read the queue without padded=True"
        )


class _Tiles(NamedTuple):
    r"""The rows of the loss through sums over the keys, made tile by tile.

    With $O_i = \sum_j V_{ij} k_j$, $O^m_i = \sum_j U_{ij} k_j$ and $\kappa_i = \sum_j P_{ij} k_j$,

    $$\frac{\partial\mathcal S_i}{\partial (q_i/\tau)} = O_i - \kappa_i, \qquad
      \frac{\partial\,\mathrm{KL}_i}{\partial (q_i/\tau)} = O_i - O^m_i$$
    """

    supervised: Tensor  # (N,)
    distill: Tensor  # (N,)
    positive_count: Tensor  # (N,) int64
    rows: Rows
    statistics: Statistics

    @classmethod
    def solve(cls, problem: _Problem, queries: Tensor, momentum: Tensor | None) -> Self:
        """From prepared queries (N, d), divided by the temperature."""
        rows = Rows(queries, momentum, problem.query_labels)
        statistics = _streaming.attend(rows, problem.keys, inside=problem.inside)
        positive_log = _positive_log(rows, statistics, inside=problem.inside)
        supervised = _supervised_rows(positive_log, statistics.positive_count, problem.positives)
        return cls(supervised, _kl_rows(rows, statistics), statistics.positive_count, rows, statistics)

    def backward(
        self, problem: _Problem, grad_supervised: Tensor, grad_distill: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients for the queries (N, d) and for the raw keys of the parts that want one."""
        rows, statistics = self.rows, self.statistics
        per_positive = grad_supervised / self.positive_count.clamp(min=1)
        if problem.positives == "inside_per_positive":
            grad_supervised = per_positive
        pull = statistics.mean_key - statistics.positive_mean_key
        # Not 0 * pull: of a row without positives, that may be infinite.
        grad_queries = torch.where(self.positive_count[:, None] > 0, grad_supervised[:, None] * pull, 0.0)
        if rows.momentum is not None:
            push = statistics.mean_key - statistics.momentum_mean_key
            grad_queries = torch.addcmul(grad_queries, grad_distill[:, None], push)
        if not any(wanted):
            return grad_queries, [None] * len(wanted)
        grads = RowGradients(
            lse=grad_supervised if rows.momentum is None else grad_supervised + grad_distill,
            positive_lse=-grad_supervised,
            positive_mean_key=-per_positive[:, None] * rows.query,
            momentum_mean_key=-grad_distill[:, None] * rows.query,
        )
        return grad_queries, [
            _streaming.grad_keys(part, rows, statistics, grads, inside=problem.inside) if want else None
            for part, want in zip(problem.keys, wanted, strict=True)
        ]


class _Matrices(NamedTuple):
    r"""The rows of the loss as they are defined, through the N×Q matrices $V$, $P$ and $U$."""

    supervised: Tensor  # (N,)
    distill: Tensor  # (N,)
    positive_count: Tensor  # (N,)
    v: Tensor  # (N, Q): log V until the forward pass has ended
    positive: Tensor  # (N, Q): 1 for a positive key, else 0; inside the logarithm in the end P, their softmax
    positive_log: Tensor  # (N,)
    u: Tensor | None  # (N, Q)
    absent: Tensor | None  # (Q,) bool, or (N, Q) where each row has one of its own, see `_hidden`
    queries: Tensor  # (N, d)
    keys: Tensor  # (Q, d)
    lengths: list[Tensor | None]  # (Q, 1) by part: of the raw keys

    @classmethod
    def solve(cls, problem: _Problem, queries: Tensor, momentum: Tensor | None) -> Self:
        """From prepared queries (N, d), divided by the temperature."""
        everyone = may_ask(queries) and all(bool(part.present.all()) for part in problem.keys)

        def ready(part: Keys, raw: Tensor) -> tuple[Tensor, Tensor | None]:
            return part.prepare(raw if everyone else raw.masked_fill(~part.present[:, None], 0.0))

        online = [ready(part, part.online) for part in problem.keys]
        keys = momentum_keys = _joined([rows for rows, _ in online])
        if momentum is not None and not all(part.momentum is part.online for part in problem.keys):
            momentum_keys = _joined(
                [ready(part, part.momentum)[0] for part in problem.keys if part.momentum is not None]
            )
        absent = None if everyone and not problem.keys[0].own else _hidden(problem)
        solved = cls.define(problem, queries, keys, momentum, momentum_keys, absent)
        positive = solved.positive
        if problem.inside:
            log_share = solved.v - solved.positive_log[:, None]
            positive = torch.where(positive > 0, log_share, -torch.inf).exp_()
        solved.v.exp_()
        return solved._replace(positive=positive, lengths=[lengths for _, lengths in online])

    @classmethod
    def define(
        cls,
        problem: _Problem,
        queries: Tensor,
        keys: Tensor,
        momentum: Tensor | None,
        momentum_keys: Tensor,
        absent: Tensor | None,
    ) -> Self:
        r"""$\mathcal S_i$ and $\mathrm{KL}(U_i\Vert V_i) = \sum_j U_{ij}(\log U_{ij} - \log V_{ij})$."""

        def log_softmax(logits: Tensor) -> Tensor:
            if absent is None:
                return logits.log_softmax(dim=1)
            return logits.masked_fill(absent, -torch.inf).log_softmax(dim=1).masked_fill(absent, 0.0)

        log_v = log_softmax(queries @ keys.T)
        labels = problem.query_labels
        pairs = labels[:, None] == _joined([part.labels for part in problem.keys])
        labelled = labels >= 0
        if not (may_ask(labels) and bool(labelled.all())):
            pairs = pairs & labelled[:, None]
        if absent is not None and problem.keys[0].own:
            pairs = pairs & ~absent
        positive = pairs.to(log_v.dtype)
        positive_count = positive.sum(dim=1)
        if problem.inside:
            positive_log = _logsumexp(log_v, pairs)
        else:
            positive_log = torch.linalg.vecdot(positive, log_v) / positive_count.clamp(min=1)
        supervised = _supervised_rows(positive_log, positive_count, problem.positives)
        if momentum is None:
            u, distill = None, torch.zeros_like(positive_log)
        else:
            with torch.no_grad():
                # Detached as well, for no_grad() does not stop forward-mode derivatives.
                log_u = log_softmax(momentum.detach() @ momentum_keys.detach().T)
                u = log_u.exp() if absent is None else log_u.exp().masked_fill_(absent, 0.0)
                mean_log_u = torch.linalg.vecdot(u, log_u)
            distill = mean_log_u - torch.linalg.vecdot(u, log_v)
        return cls(supervised, distill, positive_count, log_v, positive, positive_log, u, absent, queries, keys, [])

    def backward(
        self, problem: _Problem, grad_supervised: Tensor, grad_distill: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients for the queries (N, d) and for the raw keys of the parts that want one."""
        pull = grad_supervised[:, None]
        if problem.positives != "inside":
            per_positive = pull / self.positive_count.clamp(min=1)[:, None]
        if problem.positives == "inside_per_positive":
            pull = per_positive
        grad = self.v * (pull if self.u is None else pull + grad_distill[:, None])  # for the logits, (N, Q)
        grad.addcmul_(self.positive, pull if problem.inside else per_positive, value=-1)
        if self.u is not None:
            grad.addcmul_(self.u, grad_distill[:, None], value=-1)
        if self.absent is not None:
            grad.masked_fill_(self.absent, 0.0)
        grad_keys: list[Tensor | None] = []
        start = 0
        for part, lengths, want in zip(problem.keys, self.lengths, wanted, strict=True):
            count = part.online.shape[0]
            whole = None
            if want:
                keys = self.keys[start : start + count]
                whole = part.prepare.backward(keys, lengths, grad.narrow(1, start, count).T @ self.queries)
            grad_keys.append(whole)
            start += count
        return grad @ self.keys, grad_keys


def _dense_rows(problem: _Problem, query: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Supervised term, KL term and number of positives of each row (N,), all by plain autograd.

    What `torch.compile` fuses, for it cannot see into the tiles, what the transforms of `torch.func` go through, and
    what has a second derivative.
    """

    def ready(raw: Tensor, present: Tensor, prepare: Prepare) -> Tensor:
        rows = torch.where(present[:, None], raw.to(prepare.dtype), 0.0)
        return normalize_rows(rows, shortest(raw)) if prepare.normalize else rows

    queries = ready(query, problem.present, problem.prepare) / temperature
    keys = momentum_keys = _joined([ready(part.online, part.present, part.prepare) for part in problem.keys])
    momentum = None
    if problem.momentum_query is not None:
        with torch.no_grad():
            momentum = ready(problem.momentum_query, problem.present, problem.prepare) / problem.momentum_temperature
            others = [part.online if part.momentum is None else part.momentum for part in problem.keys]
            momentum_keys = _joined(
                [ready(raw, part.present, part.prepare) for raw, part in zip(others, problem.keys, strict=True)]
            )
    solved = _Matrices.define(problem, queries, keys, momentum, momentum_keys, _hidden(problem))
    kept = [torch.where(problem.present, rows, 0.0) for rows in (solved.supervised, solved.distill)]
    return kept[0], kept[1], solved.positive_count


def _dense_backward(ctx: Any, upstream: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The gradients of :class:`_Contrast` with a graph of their own."""
    _check_versions(ctx.versions)
    problem, inputs, wanted = ctx.problem, ctx.saved_tensors, ctx.needs_input_grad[4:]
    alpha, temperature = (
        old if new is None else new for old, new in zip((ctx.alpha, ctx.temperature), inputs[:2], strict=True)
    )
    query = ctx.query if inputs[2] is None else inputs[2]
    keys = [
        part if saved is None else part._replace(online=saved)
        for part, saved in zip(problem.keys, inputs[3:], strict=True)
    ]
    problem = problem._replace(keys=keys)
    terms = _reduce_terms(_dense_rows(problem, query, temperature), problem, alpha)
    pairs = [
        (term, grad)
        for term, grad in zip(terms[:3], upstream, strict=True)
        if grad is not None and term.requires_grad  # the KL term does not without momentum inputs
    ]
    grads = torch.autograd.grad(
        [term for term, _ in pairs],
        [tensor for tensor, want in zip(inputs, wanted, strict=True) if want],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    found = iter(grads)
    return None, None, None, None, *(next(found) if want else None for want in wanted)


def _hidden(problem: _Problem) -> Tensor:
    """The keys that no row sees, bool, (Q,); with `exclude_self` which keys each row does not see, (N, Q)."""
    absent = ~_joined([part.present for part in problem.keys])
    if not problem.keys[0].own:
        return absent
    return absent | torch.eye(len(problem.query_labels), len(absent), dtype=torch.bool, device=absent.device)


def _logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over the keys that `mask` (N, Q) keeps, 0 where it keeps none; the gradient is finite either way."""
    if logits.shape[1] == 0:
        return logits.sum(dim=1)
    some = mask.any(dim=1, keepdim=True)
    masked = torch.where(some, logits.masked_fill(~mask, -torch.inf), logits * 0)
    return torch.where(some[:, 0], masked.logsumexp(dim=1), masked.sum(dim=1))


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# --------------------------------------------------------------------------------------------------------------------
# Response-based distillation: Eq. 7 and 10
# --------------------------------------------------------------------------------------------------------------------


def response_distill_loss(
    student: Tensor,
    teacher: Tensor,
    momentum: Tensor | None = None,
    *,
    task: Task,
    mask: Tensor | None = None,
    alpha: float | Tensor = 0.4,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
    group: Group = None,
    validate: bool = False,
) -> Tensor:
    r"""A student's outputs drawn to those of a teacher and of its own momentum model.

    $$\mathcal L_{reg} = \tfrac1N\sum_i \big[(1-\alpha)\,|\hat y_t^i - \hat y_u^i|
        + \alpha\,|\hat y_{u,m}^i - \hat y_u^i|\big]$$
    $$\mathcal L_{cls} = \tfrac{T^2}N\sum_i \big[(1-\alpha)\,H(p_t^i, p_u^i) + \alpha\,H(p_{u,m}^i, p_u^i)\big],
        \qquad p = \mathrm{softmax}(\text{logits} / T)$$

    Without `momentum` the teacher term stands alone, with weight 1.

    Args:
        student: $\hat y_u$, by `task` scores of shape `(N,)` or logits of shape `(N, C)`.
        teacher: $\hat y_t$, shape as `student`. Logits may be $-\infty$: probability 0.
        momentum: Outputs of the student's momentum model, shape as `student`. Never gets a gradient.
        task: `"regression"` or `"classification"`.
        mask: True keeps a row, bool, shape `(N,)`. What a masked row holds changes nothing.
        alpha: Weight $\alpha$ of the momentum term, in [0, 1]; without `momentum` there is none.
        temperature: $T > 0$ of Hinton et al. (2015), for classification alone; both terms get the factor $T^2$.
        reduction: `"mean"` over the rows kept, `"sum"`, or `"none"`: `(N,)`, 0 where masked.
        detach_teacher: Stop the gradient at `teacher`.
        group: Whose rows sum and mean run over, as in :func:`supcon_distill_loss`.
        validate: Also check values: finite (a teacher's logits free of NaN), logits no probabilities (in every row).
            Makes the host wait for the device.

    Returns:
        The loss (nats for classification), shape `()`, or `(N,)` with `reduction="none"`; float32 or wider. With no row
        kept: 0, connected to the graph.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device, range or choice is wrong; `(N, 1)` beside `(N,)` is never broadcast.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
        >>> response_distill_loss(student, teacher, task="regression")
        tensor(2.)

    References:
        MTMD, Eq. 7 and 10. The paper has no temperature here: 1 is its setting.
    """
    check_group(group)
    ranks = find_ranks(group) if reduction != "none" else None
    with errors_shared_by_sum(ranks, student):
        check_choice("task", task, TASKS)
        check_scalar("alpha", alpha, low=0.0, high=1.0)
        check_number("temperature", temperature, low=0.0, open_low=True)
        check_choice("reduction", reduction, REDUCTIONS)
        check_bool("detach_teacher", detach_teacher)
        check_validate(validate)
        outputs = [("student", student), ("teacher", teacher)]
        if momentum is not None:
            outputs.append(("momentum", momentum))
        check_outputs(("N",) if task == "regression" else ("N", "C"), *outputs)
        mask = row_mask(mask, ("student", student))
        if validate:
            validate_outputs(mask, *outputs)

    dtype = sum_dtype(student, teacher, momentum)
    scale = 1.0 if task == "regression" else 1.0 / temperature

    def distance(teacher: Tensor, *, learns: bool) -> Tensor:
        teacher = keep_rows((teacher if learns else teacher.detach()).to(dtype), mask)
        if task == "regression":
            return (teacher - student).abs()
        return _soft_cross_entropy(teacher, student, scale, teacher_learns=learns)

    with full_precision(student):
        student = keep_rows(student.to(dtype), mask)
        rows = distance(teacher, learns=not detach_teacher)
        if momentum is not None:
            rows = _blend(rows, distance(momentum, learns=False), alpha)
        rows = torch.where(mask, rows / scale**2, 0.0)
        if reduction == "none":
            return rows
        total, kept = sum_over_ranks(ranks, f"ResponseDistillLoss, {task=}, {reduction=}", rows.sum(), mask.sum())
        return total if reduction == "sum" else total / kept.clamp(min=1)


def _soft_cross_entropy(
    teacher_logits: Tensor, student_logits: Tensor, scale: float = 1.0, *, teacher_learns: bool
) -> Tensor:
    r"""$H(p, q) = -\sum_c p_c \log q_c$ of scaled logits by row, `(N,)`; $0 \log 0 = 0$ in value and gradient."""
    probs = _scaled(teacher_logits, scale).softmax(dim=1)
    log_probs = _scaled(student_logits, scale).log_softmax(dim=1)
    rows = -(probs.detach() * torch.where(probs == 0, 0.0, log_probs)).sum(dim=1)
    if teacher_learns:
        # The gradient for the teacher's logits, by a term that is 0. It is p times the student's logits off their mean,
        # which are much smaller than log q where log q has lost most in rounding.
        logits = torch.where(probs == 0, 0.0, student_logits)
        off = scale * (logits - (probs * logits).sum(dim=1, keepdim=True).detach())
        rows = rows - ((probs - probs.detach()) * off).sum(dim=1)
    return rows


def _scaled(logits: Tensor, scale: float) -> Tensor:
    """Scaled logits for a softmax: it is made of their differences, and to scale those rounds less."""
    return logits if scale == 1.0 else (logits - logits.detach().amax(dim=1, keepdim=True)) * scale


# --------------------------------------------------------------------------------------------------------------------
# Fusion distillation with attention to hard samples: Eq. 14 and 15
# --------------------------------------------------------------------------------------------------------------------


def hard_sample_fusion_loss(
    *,
    student_scores: Tensor | None = None,
    student_logits: Tensor | None = None,
    fused_scores: Tensor | None = None,
    fused_logits: Tensor | None = None,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    hard_attention: bool = True,
    class_weight: ClassWeight = "distance",
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
    ignore_index: int = -1,
    group: Group = None,
    validate: bool = False,
) -> Tensor:
    r"""The fused prediction teaches one modality, most where the fusion itself is still wrong.

    $$\mathcal L = \tfrac1N\sum_i w_{reg}^i\,|\hat y_f^i - \hat y_u^i|
        + w_{cls}\,\tfrac1N\sum_i H(\hat p_f^i, \hat p_u^i)$$
    $$w_{reg}^i = \tanh|y^i - \hat y_f^i|, \qquad w_{cls} = \tfrac1N\sum_i |p^i - \arg\max \hat p_f^i|$$

    The weights carry no gradient. Either part alone is allowed: give its student, its fused output and its truth.

    Args:
        student_scores: $\hat y_u$, shape `(N,)`.
        student_logits: Logits of $\hat p_u$, shape `(N, C)`.
        fused_scores: $\hat y_f$, shape `(N,)`.
        fused_logits: Logits of $\hat p_f$, shape `(N, C)`.
        targets: Ground truth $y$, floating, shape `(N,)`. Not needed without `hard_attention`, not used without scores.
        labels: Ground truth classes $p$ in [0, C), integer, shape `(N,)`. Not needed without `hard_attention`.
            `ignore_index`: the row is absent, from both parts; -2: unlabelled, it has no say in $w_{cls}$ while its
            cross-entropy stands. Other numbers in rows that are kept are refused, as by :func:`supcon_distill_loss`.
        mask: True keeps a row, bool, shape `(N,)`. What a masked row holds changes nothing.
        hard_attention: False sets all weights to 1 (Table II, "w/o HardAtt").
        class_weight: `"distance"`: $w_{cls}$ as printed, class indices taken as numbers (order them by sentiment);
            `"error_rate"`: the share of mistakes, for classes without an order; `"per_sample"`: $|p^i - \arg\max
            \hat p_f^i|$ for each sample by itself, an unlabelled one taking the mean.
        reduction: `"mean"` over the rows kept, `"sum"`, or `"none"`: `(N,)`, 0 where masked.
        detach_teacher: Stop the gradient at the fused outputs.
        ignore_index: Label of a row that is absent.
        group: Whose rows sum, mean and $w_{cls}$ run over, as in :func:`supcon_distill_loss`; with `"none"`, $w_{cls}$.
        validate: Also check values: finite, labels wherever they are, logits no probabilities. Makes the host wait.

    Returns:
        The loss, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider. With no row kept 0, with a graph.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device, choice or label is wrong, a part is incomplete, or both are missing.

    Example:
        >>> import torch
        >>> student, fused, targets = torch.tensor([[0.0], [1.0], [2.0]])
        >>> hard_sample_fusion_loss(student_scores=student, fused_scores=fused, targets=targets)
        tensor(0.7616)

    References:
        MTMD, Eq. 14 and 15; the sum over modalities of Eq. 16 is the caller's.
    """
    check_group(group)
    ranks = find_ranks(group)
    with errors_shared_by_sum(ranks, student_logits if student_scores is None else student_scores):
        check_bool("hard_attention", hard_attention)
        check_choice("class_weight", class_weight, CLASS_WEIGHTS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_bool("detach_teacher", detach_teacher)
        check_int("ignore_index", ignore_index)
        check_validate(validate)
        labels, mask = check_fusion(
            (student_scores, fused_scores, targets),
            (student_logits, fused_logits, labels),
            mask,
            hard_attention=hard_attention,
            ignore_index=ignore_index,
            validate=validate,
        )

    dtype = sum_dtype(student_scores, student_logits, fused_scores, fused_logits, targets)
    with full_precision(mask):
        # Rows with a weight of their own, rows that wait for w_cls, and what w_cls is the mean of, over which rows.
        weighted = waiting = distance = torch.zeros(len(mask), dtype=dtype, device=mask.device)
        labelled = torch.zeros_like(mask)
        if student_scores is not None and fused_scores is not None:
            student, fused = (keep_rows(scores.to(dtype), mask) for scores in (student_scores, fused_scores))
            weighted = ((fused.detach() if detach_teacher else fused) - student).abs()
            if hard_attention and targets is not None:
                weighted = (keep_rows(targets.to(dtype), mask) - fused).detach().abs().tanh() * weighted
        if student_logits is not None and fused_logits is not None:
            student, fused = (keep_rows(logits.to(dtype), mask) for logits in (student_logits, fused_logits))
            teacher = fused.detach() if detach_teacher else fused
            rows = torch.where(mask, _soft_cross_entropy(teacher, student, teacher_learns=not detach_teacher), 0.0)
            if not hard_attention or labels is None:
                weighted = weighted + rows
            else:
                labelled = mask & (labels >= 0)
                steps = (labels - fused.detach().argmax(dim=1)).abs()
                distance = torch.where(labelled, steps > 0 if class_weight == "error_rate" else steps, 0).to(dtype)
                waiting = rows
                if class_weight == "per_sample":
                    weighted, waiting = weighted + distance * rows, torch.where(labelled, 0.0, rows)
        signature = ""
        if ranks is not None:
            parts = [] if student_scores is None else ["scores"]
            parts += [] if student_logits is None else [f"logits of {student_logits.shape[1]} classes"]
            choices = f"{hard_attention=}, {class_weight=}, {reduction=}"
            signature = f"HardSampleFusionLoss of {' and '.join(parts)}, {choices}"
        sums = [distance.sum(), labelled.sum(), mask.sum()]
        if reduction == "none":
            distance, count, kept = sum_over_ranks(ranks, signature, *sums)
        else:
            sums += [weighted.sum(), waiting.sum()]
            distance, count, kept, weighted, waiting = sum_over_ranks(ranks, signature, *sums)
        loss = weighted + distance / count.clamp(min=1) * waiting
        return loss / kept.clamp(min=1) if reduction == "mean" else loss


# --------------------------------------------------------------------------------------------------------------------
# Means over the rows of all ranks
# --------------------------------------------------------------------------------------------------------------------


def mean_rows(values: Tensor, *, mask: Tensor | None = None, group: Group = None) -> Tensor:
    r"""The mean over the rows of all ranks, for losses of one's own beside those of this library.

    $$\frac{\sum_r\sum_{i\in r} m_i v_i}{\sum_r\sum_{i\in r} m_i}$$

    The mean of the ranks' means, which DDP makes of a local mean, is another number wherever ranks have different
    numbers of rows. This one is the same on all ranks, and gradients after DDP's averaging are those of one process.

    Args:
        values: One value per row, say `cross_entropy(..., reduction="none")`, floating, shape `(N,)`.
        mask: True keeps a row, bool, shape `(N,)`. What a masked row holds changes nothing.
        group: None (this process), `"auto"` (torch.distributed's default group where there is one) or a process group.

    Returns:
        The mean, shape `()`, float32 or wider; with no row kept 0, connected to the graph.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or device is wrong.

    Example:
        >>> import torch
        >>> mean_rows(torch.tensor([1.0, 2.0, 9.0]), mask=torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    check_group(group)
    ranks = find_ranks(group)
    with errors_shared_by_sum(ranks, values):
        check_floating("values", values, shape=("N",))
        mask = row_mask(mask, ("values", values))
    kept = keep_rows(values.to(sum_dtype(values)), mask)
    total, count = sum_over_ranks(ranks, "mean_rows", kept.sum(), mask.sum())
    return total / count.clamp(min=1)


# --------------------------------------------------------------------------------------------------------------------
# Averages: Eq. 6 and 12
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ema_update(average: Sequence[Tensor], online: Sequence[Tensor], *, decay: float) -> None:
    r"""One step of the exponential moving average, in place.

    $$\theta_{ema} \leftarrow \eta\,\theta_{ema} + (1-\eta)\,\theta_{online}$$

    As printed, Eq. 6 gives the *new* weights the factor $\eta = 0.995$; its text, and ALBEF which it follows, mean the
    share that the old average keeps. That is `decay` here.

    Args:
        average: Tensors of any shapes, to update in place; their storage stays where it is.
        online: As many tensors of the same shapes, in any floating dtype.
        decay: $\eta$ in [0, 1]: 0 copies, 1 changes nothing.

    Raises:
        TypeError: If `decay` is not a number, or an entry is not a floating tensor.
        ValueError: If `decay` is not in [0, 1], or number or shapes of the tensors differ.

    Example:
        >>> import torch
        >>> average = [torch.zeros(2)]
        >>> ema_update(average, [torch.ones(2)], decay=0.75)
        >>> average
        [tensor([0.2500, 0.2500])]
    """
    check_number("decay", decay, low=0.0, high=1.0)
    for name, tensors in (("average", average), ("online", online)):
        if not isinstance(tensors, (list, tuple)):
            wrong_type(name, "a list or tuple of tensors", describe(tensors))
    if len(average) != len(online):
        wrong_value("online", f"{len(average)} tensors as average", f"{len(online)}")
    for index, (old, new) in enumerate(zip(average, online, strict=True)):
        for name, tensor in ((f"average[{index}]", old), (f"online[{index}]", new)):
            if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
                wrong_type(name, "a floating tensor", describe(tensor))
        check_shape(f"online[{index}]", new, tuple(old.shape))
    if average:
        lerp_(list(average), [new.to(old) for old, new in zip(average, online, strict=True)], decay)


def lerp_(average: list[Tensor], online: list[Tensor], decay: float) -> None:
    """:func:`ema_update` without checks, of at least one tensor, all of one dtype and device; 0 and 1 take any."""
    if decay == 0:
        torch._foreach_copy_(average, online)
    elif decay != 1:
        torch._foreach_lerp_(average, online, weight=1 - decay)


def straight_through(average: Tensor, online: Tensor) -> Tensor:
    r"""Value of `average`, gradient to `online`: the fusion factors of Eq. 12.

    $$y = \bar w, \qquad \frac{\partial \mathcal L}{\partial w} = \frac{\partial \mathcal L}{\partial y}$$

    Args:
        average: What the forward pass uses, any shape. Gets no gradient.
        online: The learnable counterpart, same shape. Gets the gradient as if it had been used.

    Returns:
        A tensor equal to `average`.

    Raises:
        TypeError: If an argument is not a floating tensor.
        ValueError: If shapes or devices differ.

    Example:
        >>> import torch
        >>> online = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> straight_through(torch.tensor([0.5, 2.0]), online).sum().backward()
        >>> online.grad
        tensor([1., 1.])
    """
    check_floating("average", average)
    check_floating("online", online, shape=average.shape, like=("average", average))
    return average.detach() + (online - online.detach())


# --------------------------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------------------------


def check_normalize(normalize: object) -> None:
    """True, "query" or False."""
    if not isinstance(normalize, bool) and normalize != "query":
        wrong_value("normalize", "True, 'query' or False", describe(normalize))


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 if anything is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _parts(name: str, value: Parts) -> tuple[Tensor, ...]:
    """A tensor or a sequence of at least one tensor, as a tuple."""
    if isinstance(value, Tensor):
        return (value,)
    if not isinstance(value, (tuple, list)):
        wrong_type(name, "a tensor or a tuple of tensors", describe(value))
    if not value:
        wrong_value(name, "at least one part", "an empty tuple")
    return tuple(value)


def _blend(first: Tensor, second: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - alpha) first + alpha second, in the dtype of `first`."""
    alpha = _share(alpha, first.dtype)
    return (1 - alpha) * first + alpha * second


def _share(alpha: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """`alpha` in a dtype in which 1 - alpha loses nothing."""
    return alpha.to(dtype) if isinstance(alpha, Tensor) else alpha


def _named(name: str, parts: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    """Each part with the name that error messages use."""
    if len(parts) == 1:
        return [(name, parts[0])]
    return [(f"{name}[{index}]", part) for index, part in enumerate(parts)]


def _check_choices(
    temperature: float | Tensor,
    momentum_temperature: float | Tensor | None,
    alpha: float | Tensor,
    positives: Positives,
    reduction: Reduction,
    normalize: Normalize,
    ignore_index: int,
    exclude_self: bool,
    validate: bool,
) -> None:
    """The hyperparameters of the contrastive loss."""
    check_scalar("temperature", temperature, low=0.0, open_low=True)
    if momentum_temperature is not None:
        check_scalar("momentum_temperature", momentum_temperature, low=0.0, open_low=True)
    check_scalar("alpha", alpha, low=0.0, high=1.0)
    check_choice("positives", positives, POSITIVES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_normalize(normalize)
    check_int("ignore_index", ignore_index)
    check_bool("exclude_self", exclude_self)
    check_validate(validate)


def _check_features(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    momentum_query: Tensor | None,
    momentum_keys: Parts | None,
    exclude_self: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of the contrastive loss; returns keys, their labels and the momentum keys as tuples of parts."""
    check_floating("query", query, shape=("N", "d"))
    rows, width = query.shape
    check_labels("query_labels", query_labels, shape=(rows,))
    check_device("query_labels", query_labels, query.device, like="query")
    keys, key_labels = _parts("keys", keys), _parts("key_labels", key_labels)
    for name, part in _named("keys", keys):
        check_floating(name, part, shape=("Q", width))
        check_device(name, part, query.device, like="query")
    if exclude_self and keys[0].shape[0] != rows:
        wrong_value(_named("keys", keys)[0][0], f"{rows} rows as query, with exclude_self=True", f"{keys[0].shape[0]}")
    if len(key_labels) != len(keys):
        wrong_value("key_labels", f"as many parts as keys ({len(keys)})", f"{len(key_labels)}")
    for (name, part), key_part in zip(_named("key_labels", key_labels), keys, strict=True):
        check_labels(name, part, shape=(key_part.shape[0],))
        check_device(name, part, query.device, like="query")
    if (momentum_query is None) != (momentum_keys is None):
        missing = "momentum_query" if momentum_query is None else "momentum_keys"
        wrong_value(missing, "both momentum inputs or neither", "None beside the other")
    if momentum_query is None or momentum_keys is None:
        return keys, key_labels, ()
    check_floating("momentum_query", momentum_query, shape=(rows, width))
    check_device("momentum_query", momentum_query, query.device, like="query")
    momentum_keys = _parts("momentum_keys", momentum_keys)
    if len(momentum_keys) != len(keys):
        wrong_value("momentum_keys", f"as many parts as keys ({len(keys)})", f"{len(momentum_keys)}")
    for (name, part), key_part in zip(_named("momentum_keys", momentum_keys), keys, strict=True):
        check_floating(name, part, shape=tuple(key_part.shape))
        check_device(name, part, query.device, like="query")
    return keys, key_labels, momentum_keys


def _validate_contrast(
    query: Tensor,
    keys: tuple[Tensor, ...],
    query_labels: Tensor,
    key_labels: tuple[Tensor, ...],
    normalize: Normalize,
    ignore_index: int,
    prefix: str = "",
) -> None:
    """Value checks of the contrastive loss; `prefix` stands before the names of the features."""
    check_finite(f"{prefix}query", query, query_labels != ignore_index)
    for (name, part), labels in zip(_named(f"{prefix}keys", keys), key_labels, strict=True):
        check_finite(name, part, labels != ignore_index)
        if normalize == "query":
            lengths = part.detach()[labels != ignore_index].float().square().sum(dim=1).sqrt()
            wrong = ((lengths - 1).abs() > 0.01) & (lengths > 0)
            if bool(wrong.any()):
                wrong_value(name, "unit rows with normalize='query'", f"a length of {lengths[wrong][0]:.3g}")
