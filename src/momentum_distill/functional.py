r"""Every formula of the library, once: pure functions, tensors in, tensors out, no state.

The equation numbers are those of MTMD (Lin and Hu, *Multi-Task Momentum Distillation for Multimodal Sentiment
Analysis*, IEEE Transactions on Affective Computing, 2023). Shapes: `N` rows of a batch, `Q` keys, `d` features, `C`
classes. Sums run in float32 or wider whatever the inputs are, with autocast switched off inside. Shapes, dtypes and
Python numbers are checked, and labels where looking is free, on the CPU outside `torch.compile`; values of tensors
otherwise with `validate=True` alone.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import (
    COLDEST,
    HOTTEST,
    REDUCTIONS,
    check_bool,
    check_choice,
    check_floating,
    check_int,
    check_labels,
    check_number,
    check_scalar,
    check_shape,
    check_validate,
    describe,
    wrong_type,
    wrong_value,
)
from momentum_distill._contrast.arguments import Normalize, Parts, check_normalize, read_problem
from momentum_distill._contrast.autograd import contrast
from momentum_distill._contrast.formulas import Positives, PositivesFrom, Reduction
from momentum_distill._contrast.sigmoid import KeyReduction, Sigmoid, check_bias, sigmoid
from momentum_distill._contrast.targets import Targets
from momentum_distill._group import (
    Group,
    check_group,
    errors_shared_by_sum,
    find_ranks,
    sum_over_ranks,
    sum_vector_over_ranks,
)
from momentum_distill._outputs import (
    CLASS_WEIGHTS,
    TASKS,
    check_fusion,
    check_outputs,
    row_mask,
    validate_outputs,
)
from momentum_distill._precision import blend, full_precision, sum_dtype
from momentum_distill._rows import keep_rows, normalize_rows, shortest

__all__ = [
    "SupConTerms",
    "centre_update",
    "contrast_logits",
    "ema_update",
    "hard_sample_fusion_loss",
    "l2_normalize",
    "mean_rows",
    "response_distill_loss",
    "sigmoid_distill_loss",
    "straight_through",
    "supcon_distill_loss",
    "supcon_distill_terms",
]

Task: TypeAlias = Literal["regression", "classification"]
ClassWeight: TypeAlias = Literal["distance", "error_rate", "per_sample"]


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
    return normalize_rows(x.to(sum_dtype(x)), shortest(x) if eps is None else eps)


def contrast_logits(query: Tensor, keys: Tensor, *, temperature: float | Tensor, normalize: Normalize = True) -> Tensor:
    r"""Similarity of every query to every key, divided by the temperature: the exponents of Eq. 8.

    $$s_{ij} = \bar q_i^\top \bar k_j / \tau$$

    Args:
        query: Features $q$, shape `(N, d)`.
        keys: Features $k$, shape `(Q, d)`.
        temperature: $\tau$ in [1e-12, 1e12], a number or a tensor of shape `()`; smaller is sharper.
        normalize: L2-normalise the rows of both (True), of `query` alone (`"query"`, for keys that are unit rows
            already) or of neither (False: plain dot products).

    Returns:
        Logits, shape `(N, Q)`, in float32 or wider.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If the widths differ, or `temperature` is a number outside [1e-12, 1e12].

    Example:
        >>> import torch
        >>> contrast_logits(torch.eye(2), torch.eye(2), temperature=0.5)
        tensor([[2., 0.],
                [0., 2.]])
    """
    check_floating("query", query, shape=("N", "d"))
    check_floating("keys", keys, shape=("Q", query.shape[1]), like=("query", query))
    check_scalar("temperature", temperature, low=COLDEST, high=HOTTEST)
    check_normalize(normalize)
    dtype = sum_dtype(query, keys)
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
    query_targets: Tensor | None = None,
    key_targets: Parts | None = None,
    momentum_temperature: float | Tensor | None = None,
    momentum_targets: Targets = "softmax",
    centre: Tensor | None = None,
    alpha: float | Tensor = 0.4,
    positives: Positives = "outside",
    positives_from: PositivesFrom = "labels",
    width: float | None = None,
    hardness: float = 0.0,
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
      U_i = \mathrm{softmax}_j(\bar q_i'^\top \bar k_j' / \tau' + b_j)$$

    where $\mathcal S_i$ is, by `positives`,

    - `"outside"`: $-\frac1{K_i}\sum_{j:c_j=c_i}\log V_{ij}$ (Eq. 9 with targets that sum to 1),
    - `"inside"`: $-\log\sum_{j:c_j=c_i} V_{ij}$ (Eq. 8 put into Eq. 9),
    - `"inside_per_positive"`: $-\frac1{K_i}\log\sum_{j:c_j=c_i} V_{ij}$ (Eq. 22 as printed).

    and $b_j$, so that $U$ does not gather on a few keys, is by `momentum_targets`

    - `"softmax"`: 0, with $\tau' = \tau$ unless `momentum_temperature` is given (the paper's);
    - `"centred"`: $-c^\top \bar k_j' / \tau'$, which takes the mean momentum logit of each key away (DINO): $c$ is the
      running mean of the momentum queries, see :func:`centre_update`;
    - `"sinkhorn"`: what three iterations of Sinkhorn-Knopp make of it (SwAV, DINOv2), so that all keys get nearly the
      same share of $\sum_i U_{ij}$. The sum runs over the rows of all ranks, whatever the reduction; they must have the
      same keys in the same order. Keys are normalised into a copy.

    No gradient flows through $U$, nor through the temperature inside it. Without momentum inputs the loss is
    $\mathcal S_i$ alone.

    **Positives that are not classes.** `positives_from` gives each pair a weight $w_{ij} \ge 0$ instead, made from the
    targets $y$ of row and key:

    - `"distance"`: $e^{-\lVert y_i - y_j\rVert^2 / 2\sigma^2}$ with $\sigma$ = `width`, for the scores of a regression,
    - `"overlap"`: the cosine $y_i^\top y_j / \lVert y_i\rVert \lVert y_j\rVert$, for several labels (0 or 1) or soft
      ones (probabilities): 1 for the same, 0 for nothing in common; of one-hot rows that is the class,
    - a function of targets `(N, 1)` and `(1, B)`, or `(N, 1, C)` and `(1, B, C)`, that returns weights `(N, B)`.

    With $P_{ij} = w_{ij} / \sum_j w_{ij}$, $\mathcal S_i$ is then $-\sum_j P_{ij} \log V_{ij}$ (`"outside"`) or
    $-\log\sum_j w_{ij} V_{ij}$ (`"inside"`). The labels still say who is there; a row or a key without a class (-2) has
    weight 0, and so has a weight below the smallest normal number. No gradient flows through weights.

    **Hard negatives.** With `hardness` $\beta > 0$ the supervised term has a $V$ of its own, in whose sum over the keys

    $$s_{ij} + \beta\,(1 - w_{ij})_+\,\mathrm{sg}(\bar q_i^\top \bar k_j)$$

    stands for $s_{ij}$ (sg: no gradient; of classes $w_{ij} = [c_j = c_i]$): the more similar a negative, the more it
    weighs. What stands above the fraction, and the KL term, stay as they are. A key that is nobody's positive (-2) is a
    negative; a row without a positive has no supervised term.

    A row or key whose label is `ignore_index` is left out of everything, whatever it holds. A row without a positive
    key adds 0 to the supervised sum and does not count in its mean; its KL term stands. With no row or no key left
    the loss is 0 and still connected to the graph. NaN in a row or key that counts makes the loss NaN.

    A batch that is query and keys at once counts each row as its own positive, unlike SupCon; `exclude_self=True` takes
    the row out, of $V$, $U$ and the positives.

    More than $2^{18}$ scores (N·Q), or those of more than $2^{20}$ numbers in the keys (Q·d), are made tile by tile,
    and nothing of size N×Q is kept, forward or backward, no weights of pairs either. Four cases take the N×Q matrices:
    fewer of both, which is faster so; the transforms of `torch.func` (grad, jvp, vmap); a backward pass with
    `create_graph=True`; and a function as `positives_from` under `torch.compile`.
    `torch.compile` fuses the formula of up to $2^{14}$ scores and takes more as one operator, which does the same;
    neither has a second derivative. On an NVIDIA GPU a fused kernel (Triton) takes all sizes, but in float64 and with
    `exclude_self`, `positives_from` or `hardness`: keys in 16 bits are multiplied as they are, and queries rounded to
    their dtype.

    Args:
        query: Features $q$ of the batch, shape `(N, d)`.
        keys: Features $k$ to compare with, shape `(Q, d)`; or a tuple of such parts, taken as concatenated (the keys
            of the batch, then a queue). Gradient is computed only for the parts that require it.
        query_labels: Classes of the rows, integer, shape `(N,)`: at least 0; `ignore_index` = absent; -2 = there but
            unlabelled: nobody's positive, while the KL term stands. Other numbers are refused on the CPU, outside
            `torch.compile` and `torch.func`; on an accelerator with `validate`.
        key_labels: Classes of the keys, integer, shape `(Q,)`; a tuple of parts where `keys` is one.
        temperature: $\tau$ in [1e-12, 1e12], a number or a tensor of shape `()` (with gradient if it requires it).
        momentum_query: $q'$ from the momentum model, shape `(N, d)`. Given together with `momentum_keys`.
        momentum_keys: $k'$, shape `(Q, d)`, in parts like `keys`; key $j$ is the same sample in both.
        query_targets: What `positives_from` reads of the rows: floating, shape `(N,)` or `(N, C)` (`"overlap"`:
            `(N, C)`). Given together with `key_targets`. Rows without a class may hold anything.
        key_targets: The same of the keys, shape `(Q,)` or `(Q, C)`, in parts like `keys`.
        momentum_temperature: $\tau'$, the temperature inside $U$; by default `temperature`, detached.
        momentum_targets: How $U$ is made of the momentum logits: `"softmax"`, `"centred"` or `"sinkhorn"`, see above.
        centre: $c$ of centred targets, shape `(d,)`; None stands for zeros, with which they begin.
        alpha: Weight $\alpha$ of the momentum targets, in [0, 1]. Paper: 0.2 to 0.6.
        positives: Where the sum over the positive keys stands, see above.
        positives_from: What makes a key positive: `"labels"` (its class), `"distance"`, `"overlap"` or a function that
            gives weights `(N, B)`, see above. Not with `"inside_per_positive"`, which counts keys.
        width: $\sigma > 0$, for `"distance"`, in the unit of the targets: at that distance a weight is 0.61.
        hardness: Weight $\beta$ of hard negatives, at least 0, see above; 0: none.
        reduction: `"mean"`: the mean of $\mathcal S_i$ over rows with a positive and the mean of the KL terms over
            rows, weighted; `"sum"`; or `"none"`: one value per row, 0 where a row is left out.
        normalize: True: rows of queries and keys are L2-normalised here; `"query"`: only those of the queries, the keys
            (every part) are unit rows as a `ClassQueue` stores them; False: plain dot products.
        ignore_index: Label of what is absent.
        exclude_self: The keys, or their first part, are the batch itself: key $i$ (and momentum key $i$) is not there
            for row $i$. With several ranks that part is this rank's rows, and those of others are further parts.
        group: Whose rows the sums and means run over: None (this process), `"auto"` (torch.distributed's default group
            where there is one) or a process group. One collective of 64 bytes; none with `"none"`, which returns the
            rows of this rank (`momentum_targets="sinkhorn"`: one more, and three of a number for each key). The keys
            are those given: a queue that all ranks share, the batch's through :func:`~momentum_distill.gather_rows`.
        validate: Also check values: finite features, numbers in tensors, labels wherever they are, unit rows where keys
            must have them. Makes the host wait for the device.

    Returns:
        The loss in nats, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device, range, choice or label is wrong, if only one momentum input is given, or targets
            are missing or read by nothing.

    Example:
        >>> import torch
        >>> query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> supcon_distill_loss(
        ...     query, keys, torch.tensor([0, 1]), torch.tensor([0, 1, 0]), temperature=1.0
        ... )
        tensor(0.7067)
        >>> scores = {
        ...     "query_targets": torch.tensor([2.0, -1.0]),
        ...     "key_targets": torch.tensor([2.0, 0.0, -1.5]),
        ... }
        >>> there = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        >>> supcon_distill_loss(
        ...     query, keys, *there, temperature=1.0, positives_from="distance", width=1.0, **scores
        ... )
        tensor(1.0640)

    References:
        MTMD, Eq. 8, 9, 11, 22 and 23. Eq. 9 and 11 average two directions: call once for each. The sum over the
        positives stands outside the logarithm by default, as in SupCon (Khosla et al., 2020): `docs/paper_map.md`.
        Centres: DINO (Caron et al., 2021), Eq. 4. Sinkhorn-Knopp: SwAV (Caron et al., 2020); DINOv2 (Oquab et al.,
        2023).
        Positives by a Gaussian of the distance: Dufumier et al., *Contrastive Learning with Continuous Proxy
        Meta-data*, 2021; by the cosine of labels: Kim et al., *A Generalized Supervised Contrastive Learning
        Framework*, 2022. Hard negatives: Lan et al., *LLaVE*, 2025, Eq. 5, which sentence-transformers has too (its
        pull request 3667); graded positives are ours.
    """
    tensors = (query, keys, query_labels, key_labels, momentum_query, momentum_keys)
    numbers = (temperature, momentum_temperature, alpha)
    choices = (positives, reduction, normalize, ignore_index, exclude_self, group, validate)
    pairs = (query_targets, key_targets, positives_from, width, hardness)
    problem = read_problem(*(*tensors, *numbers, *choices, *pairs), momentum_targets, centre)
    return contrast(problem, only_total=True).total


def supcon_distill_terms(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    *,
    temperature: float | Tensor,
    momentum_query: Tensor | None = None,
    momentum_keys: Parts | None = None,
    query_targets: Tensor | None = None,
    key_targets: Parts | None = None,
    momentum_temperature: float | Tensor | None = None,
    momentum_targets: Targets = "softmax",
    centre: Tensor | None = None,
    alpha: float | Tensor = 0.4,
    positives: Positives = "outside",
    positives_from: PositivesFrom = "labels",
    width: float | None = None,
    hardness: float = 0.0,
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
    tensors = (query, keys, query_labels, key_labels, momentum_query, momentum_keys)
    numbers = (temperature, momentum_temperature, alpha)
    choices = (positives, reduction, normalize, ignore_index, exclude_self, group, validate)
    pairs = (query_targets, key_targets, positives_from, width, hardness)
    problem = read_problem(*(*tensors, *numbers, *choices, *pairs), momentum_targets, centre)
    return SupConTerms(*contrast(problem, only_total=False).tensors())


def sigmoid_distill_loss(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    *,
    temperature: float | Tensor,
    bias: float | Tensor,
    momentum_query: Tensor | None = None,
    momentum_keys: Parts | None = None,
    alpha: float | Tensor = 0.4,
    reduction: Reduction = "mean",
    key_reduction: KeyReduction = "sum",
    normalize: Normalize = True,
    ignore_index: int = -1,
    exclude_self: bool = False,
    group: Group = None,
    validate: bool = False,
) -> Tensor:
    r"""Pairwise sigmoid loss (SigLIP) of one direction, with soft targets from a momentum model.

    Each pair of a row and a key is asked for itself whether it matches. With
    $z_{ij} = \bar q_i^\top \bar k_j / \tau + b$, the sigmoid $\sigma$, and $y_{ij} = 1$ where $c_j = c_i$, else $-1$,

    $$\mathcal L_i = (1-\alpha)\,\mathcal S_i + \alpha \sum_j \mathrm{KL}(p'_{ij} \Vert p_{ij}), \qquad
      \mathcal S_i = -\sum_j \log \sigma(y_{ij} z_{ij})$$

    where $p_{ij} = \sigma(z_{ij})$ and $p'_{ij} = \sigma(\bar q_i'^\top \bar k_j' / \tau + b)$ are chances of a match,
    whose KL divergence is $p' \log\frac{p'}{p} + (1 - p') \log\frac{1 - p'}{1 - p}$. No gradient flows through $p'$.
    Without momentum inputs the loss is $\mathcal S_i$ alone. A row may have any number of matches, or none.

    SigLIP divides the sum over all pairs by the number of rows alone, as `reduction="mean"` does here: the loss grows
    with the keys, and a queue multiplies it. `key_reduction="mean"` divides each row's sums by its number of pairs.

    A row or key whose label is `ignore_index` is left out of everything. Of one that is -2 nobody knows what it
    matches: its pairs have no part in $\mathcal S$ (nor the row in its mean), while their KL terms stand; without
    momentum inputs it is left out too. NaN in a row or key that counts makes the loss NaN.

    All keys are met tile by tile, once, and nothing of size N×Q is kept, forward or backward; but by the transforms of
    `torch.func`, a backward pass with `create_graph=True`, and up to $2^{14}$ scores by `torch.compile`, which takes
    more as one operator; compiled, there is no second derivative.

    Args:
        query: Features $q$ of the batch, shape `(N, d)`.
        keys: Features $k$ to compare with, shape `(Q, d)`, or a tuple of parts taken as concatenated. Gradient is
            computed only for the parts that require it.
        query_labels: Classes of the rows, integer, shape `(N,)`: at least 0, `ignore_index` = absent, -2 = unlabelled.
            Without classes number the samples: each matches itself.
        key_labels: Classes of the keys, integer, shape `(Q,)`; a tuple of parts where `keys` is one.
        temperature: $\tau$ in [1e-12, 1e12], a number or a tensor of shape `()`: 1 / `t` of SigLIP.
        bias: $b$, a finite number or a tensor of shape `()`.
        momentum_query: $q'$ from the momentum model, shape `(N, d)`. Given together with `momentum_keys`.
        momentum_keys: $k'$, shape `(Q, d)`, in parts like `keys`; key $j$ is the same sample in both.
        alpha: Weight $\alpha$ of the momentum targets, in [0, 1].
        reduction: `"mean"`: that of $\mathcal S_i$ over rows with a class and that of the KL terms over rows, weighted;
            `"sum"`; or `"none"`: one value per row, 0 where a row is left out.
        key_reduction: `"sum"`, or `"mean"` over the pairs that each row has in each of the two terms.
        normalize: True: rows of queries and keys are L2-normalised here; `"query"`: only those of the queries; False:
            plain dot products. This and what follows as in :func:`supcon_distill_loss`.
        ignore_index: Label of what is absent.
        exclude_self: The keys, or their first part, are the batch itself: key $i$ is not there for row $i$.
        group: Whose rows the sums and means run over: None (this process), `"auto"` (torch.distributed's default group
            where there is one) or a process group.
        validate: Also check values: finite features, numbers in tensors, labels wherever they are, unit rows where keys
            must have them.

    Returns:
        The loss in nats, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device, range, choice or label is wrong, or only one momentum input is given.

    Example:
        >>> import torch
        >>> eye, labels = torch.eye(2), torch.arange(2)
        >>> loss = sigmoid_distill_loss(eye, eye, labels, labels, temperature=1.0, bias=0.0)
        >>> f"{loss:.4f}"  # log(1 + 1/e) + log(2)
        '1.0064'

    References:
        SigLIP (Zhai et al., 2023, arXiv:2303.15343), algorithm 1. With the batch as keys its loss is the same in both
        directions: one call is all of it. Targets from a momentum model as in ALBEF (Li et al., 2021), pair by pair.
    """
    check_bias(bias, key_reduction, reduction, group, query, validate=validate)
    tensors = (query, keys, query_labels, key_labels, momentum_query, momentum_keys)
    choices = (reduction, normalize, ignore_index, exclude_self, group, validate)
    problem = read_problem(*tensors, temperature, None, alpha, "outside", *choices)
    return sigmoid(Sigmoid(problem, bias, key_reduction))


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
        temperature: $T$ of Hinton et al. (2015) in [1e-12, 1e12], for classification alone; both terms get the factor
            $T^2$.
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
        check_number("temperature", temperature, low=COLDEST, high=HOTTEST)
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
            rows = blend(rows, distance(momentum, learns=False), alpha)
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
def centre_update(
    centre: Tensor,
    momentum_query: Tensor,
    query_labels: Tensor,
    *,
    decay: float = 0.9,
    normalize: bool = True,
    ignore_index: int = -1,
    group: Group = None,
) -> None:
    r"""One step of the running mean of the momentum queries, in place: the centre of `momentum_targets="centred"`.

    $$c \leftarrow m c + (1 - m)\,\frac1N\sum_i \bar q_i'$$

    DINO's is the running mean of the momentum logits, which for key $j$ is $c^\top \bar k_j'$: so this one serves all
    keys, whichever come and go. Call it after the loss, as DINO does. A batch of absent rows alone changes nothing, nor
    does one whose mean is not finite: one bad batch would be in every centre to come.

    Args:
        centre: $c$, shape `(d,)`, to update in place; zeros at first.
        momentum_query: $q'$ of the batch, shape `(N, d)`.
        query_labels: Integer, shape `(N,)`: rows of `ignore_index` are absent.
        decay: $m$ in [0, 1], what the old mean keeps. DINO's is 0.9.
        normalize: L2-normalise the rows, as the loss does.
        ignore_index: Label of what is absent.
        group: Whose rows the mean runs over, as in :func:`supcon_distill_loss`: one collective of d + 3 numbers, the
            same bits on all ranks.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or range is wrong.

    Example:
        >>> import torch
        >>> centre = torch.zeros(2)
        >>> centre_update(centre, torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.tensor([0, -1]))
        >>> centre
        tensor([0.0000, 0.1000])

    References:
        DINO (Caron et al., 2021), Eq. 4.
    """
    check_group(group)
    check_floating("centre", centre, shape=("d",))
    width, ranks = centre.shape[0], find_ranks(group)
    with errors_shared_by_sum(ranks, centre, slots=width + 1):
        check_floating("momentum_query", momentum_query, shape=("N", width), like=("centre", centre))
        like = ("momentum_query", momentum_query)
        check_labels("query_labels", query_labels, shape=(momentum_query.shape[0],), like=like)
        check_number("decay", decay, low=0.0, high=1.0)
        check_bool("normalize", normalize)
        check_int("ignore_index", ignore_index)
    present = query_labels.to(torch.int64) != ignore_index
    rows = keep_rows(momentum_query.to(sum_dtype(momentum_query, centre)), present)
    rows = normalize_rows(rows, shortest(momentum_query)) if normalize else rows
    sums = torch.cat([rows.sum(dim=0), present.sum()[None].to(rows.dtype)])
    sums = sum_vector_over_ranks(ranks, f"centre_update, {width=}, {decay=}, {normalize=}", sums)
    mean = sums[:-1] / sums[-1].clamp(min=1)
    counts = (sums[-1] > 0) & mean.isfinite().all()
    centre.lerp_(torch.where(counts, mean, centre).to(centre.dtype), 1 - decay)


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
    """:func:`ema_update` without checks, of at least one pair, each of one dtype and device; 0 and 1 take any."""
    if decay == 0:
        for old, new in zip(average, online, strict=True):  # for shards there is no _foreach_copy_
            old.copy_(new)
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
