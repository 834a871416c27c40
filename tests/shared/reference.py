"""Every formula of MTMD once more, slowly: Python floats and loops, to be read beside the paper.

Equation numbers are those of Lin and Hu, "Multi-Task Momentum Distillation for Multimodal
Sentiment Analysis" (2023). Nothing here imports torch or the library: rows are lists of floats, sums
run over explicit indices, and the only trick is the shift by the maximum under each exponential.

Labels: `ignore_index` (-1) is absent, -2 is there but nobody's positive.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Row = Sequence[float]
Rows = Sequence[Row]

EPS = 1e-6  # a row without an entry of at least this magnitude has no direction


# --- pieces ---------------------------------------------------------------------------------------


def dot(x: Row, y: Row) -> float:
    """The product x . y."""
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def unit(row: Row) -> list[float]:
    """The bar of Eq. 8: the row at length one, or zeros where there is no direction."""
    largest = max((abs(x) for x in row), default=0.0)
    if largest < EPS:
        return [0.0 for _ in row]
    scaled = [x / largest for x in row]
    length = math.sqrt(math.fsum(x * x for x in scaled))
    return [x / length for x in scaled]


def logsumexp(scores: Row) -> float:
    """Log of the sum of the exponentials, shifted by the largest score."""
    top = max(scores)
    return top + math.log(math.fsum(math.exp(s - top) for s in scores))


def log_softmax(scores: Row) -> list[float]:
    """Score minus log-sum-exp."""
    normaliser = logsumexp(scores)
    return [s - normaliser for s in scores]


def softmax(scores: Row) -> list[float]:
    """Exponential of the log-softmax."""
    return [math.exp(s) for s in log_softmax(scores)]


def cross_entropy(teacher: Row, student: Row, temperature: float = 1.0) -> float:
    """H(p, q) of Eq. 7 with p and q the softmax of logits over `temperature`; 0 log 0 is 0."""
    # Of differences: logits of 1e4 over 3 would be rounded by 1e-12.
    p = softmax([(x - max(teacher)) / temperature for x in teacher])
    log_q = log_softmax([(x - max(student)) / temperature for x in student])
    return -math.fsum(a * b for a, b in zip(p, log_q, strict=True) if a > 0.0)


def reduce_rows(values: Sequence[float | None], reduction: str) -> float | list[float]:
    """Mean, sum or list of the rows that are kept; a row left out is None."""
    if reduction == "none":
        return [0.0 if v is None else v for v in values]
    kept = [v for v in values if v is not None]
    total = math.fsum(kept)
    return total if reduction == "sum" else total / max(len(kept), 1)


# --- feature-based distillation: Eq. 8, 9, 11, 21, 22, 23 ------------------------------------------


class SupConRow(NamedTuple):
    """What one query adds; `supervised` is None without a positive."""

    supervised: float | None
    distill: float


class SupConTerms(NamedTuple):
    """The same fields as the library's terms."""

    total: float | list[float]
    supervised: float | list[float]
    distill: float | list[float]
    rows: int
    rows_with_positive: int


def similarities(query: Rows, keys: Rows, temperature: float, normalize: bool | str) -> Rows:
    """s(q_i, k_j) / tau, the exponents of Eq. 8."""
    q = [unit(row) for row in query] if normalize in (True, "query") else query
    k = [unit(row) for row in keys] if normalize in (True, "keys") else keys
    return [[dot(qi, kj) / temperature for kj in k] for qi in q]


def sinkhorn(scores: dict[int, dict[int, float]], keys: int, iterations: int = 3) -> dict[int, dict[int, float]]:
    """Sinkhorn-Knopp as SwAV has it, on the matrix itself: every key gets as much, then every row gives 1."""
    top = max((x for row in scores.values() for x in row.values()), default=0.0)
    matrix = {i: {j: math.exp(x - top) for j, x in row.items()} for i, row in scores.items()}
    for _ in range(iterations):
        for j in {j for row in matrix.values() for j in row}:
            total = math.fsum(row[j] for row in matrix.values() if j in row)
            for row in matrix.values():
                if j in row:
                    row[j] *= len(matrix) / keys / total
        for i, row in matrix.items():
            total = math.fsum(row.values())
            matrix[i] = {j: x / total for j, x in row.items()}
    return matrix


def centre_update(centre: Row, momentum_query: Rows, query_labels: Sequence[int], decay: float = 0.9) -> list[float]:
    """DINO's Eq. 4 for the momentum queries, whose labels are not -1."""
    rows = [unit(row) for row, label in zip(momentum_query, query_labels, strict=True) if label != -1]
    if not rows:
        return list(centre)
    return [
        decay * c + (1 - decay) * math.fsum(x) / len(rows) for c, x in zip(centre, zip(*rows, strict=True), strict=True)
    ]


def pair_weight(y: float | Row, z: float | Row, positives_from: str, width: float) -> float:
    """How positive a key of target z is for a row of target y."""
    y, z = ([t] if isinstance(t, float) else t for t in (y, z))
    if positives_from == "distance":
        return math.exp(-math.fsum((a - b) ** 2 for a, b in zip(y, z, strict=True)) / (2 * width**2))
    return dot(unit(y), unit(z))  # "overlap"


def supcon_rows(
    query: Rows,
    keys: Rows,
    query_labels: Sequence[int],
    key_labels: Sequence[int],
    *,
    temperature: float,
    momentum_query: Rows | None = None,
    momentum_keys: Rows | None = None,
    momentum_temperature: float | None = None,
    momentum_targets: str = "softmax",
    centre: Row | None = None,
    positives: str = "outside",
    normalize: bool | str = True,
    ignore_index: int = -1,
    exclude_self: bool = False,
    query_targets: Sequence[float | Row] | None = None,
    key_targets: Sequence[float | Row] | None = None,
    positives_from: str | Callable[[float | Row, float | Row], float] = "labels",
    width: float = 1.0,
    hardness: float = 0.0,
) -> list[SupConRow | None]:
    """Supervised and KL part of every row, None where the row is ignored; key i is not there for row i if asked for."""

    def weight(i: int, j: int) -> float:
        if query_labels[i] < 0 or key_labels[j] < 0:
            return 0.0
        if positives_from == "labels":
            return float(query_labels[i] == key_labels[j])
        if callable(positives_from):
            return positives_from(query_targets[i], key_targets[j])
        return pair_weight(query_targets[i], key_targets[j], positives_from, width)

    everyone = [j for j, label in enumerate(key_labels) if label != ignore_index]
    s = similarities(query, keys, temperature, normalize)
    if momentum_query is not None:
        tau = temperature if momentum_temperature is None else momentum_temperature
        s_m = similarities(momentum_query, momentum_keys, tau, normalize)
        if centre is not None:
            mean = similarities([centre], momentum_keys, tau, normalize is True and "keys")[0]
            s_m = [[x - m for x, m in zip(row, mean, strict=True)] for row in s_m]
        if momentum_targets == "sinkhorn":
            seen = {
                i: [j for j in everyone if not (exclude_self and j == i)]
                for i, label in enumerate(query_labels)
                if label != ignore_index
            }
            balanced = sinkhorn({i: {j: s_m[i][j] for j in keys_of} for i, keys_of in seen.items()}, len(everyone))

    out: list[SupConRow | None] = []
    for i, label in enumerate(query_labels):
        if label == ignore_index:
            out.append(None)
            continue
        present = [j for j in everyone if not (exclude_self and j == i)]
        if not present:
            out.append(SupConRow(None, 0.0))
            continue

        log_v = log_softmax([s[i][j] for j in present])  # Eq. 8, key by key
        w = [weight(i, j) for j in present]
        # LLaVE, Eq. 5: the similarity without its temperature, where a key is no positive.
        harder = [s[i][j] * (1 + hardness * temperature * max(0.0, 1 - x)) for j, x in zip(present, w, strict=True)]
        log_s = [s[i][j] - logsumexp(harder) for j in present]
        same = [n for n, x in enumerate(w) if x > 0]
        if not same:
            supervised = None
        elif positives == "outside":  # Eq. 9 with Y_i summing to one
            supervised = -math.fsum(w[n] * log_s[n] for n in same) / math.fsum(w)
        else:  # Eq. 8 put into Eq. 9, and Eq. 22 with its 1 / K
            supervised = -logsumexp([log_s[n] + math.log(w[n]) for n in same])
            if positives == "inside_per_positive":
                supervised /= len(same)

        distill = 0.0
        if momentum_query is not None:  # KL(U || V) of Eq. 11
            log_u = log_softmax([s_m[i][j] for j in present])
            if momentum_targets == "sinkhorn":
                log_u = [math.log(balanced[i][j]) for j in present]
            distill = math.fsum(math.exp(a) * (a - b) for a, b in zip(log_u, log_v, strict=True) if a > -700.0)
        out.append(SupConRow(supervised, distill))
    return out


def supcon_terms(*args: object, alpha: float = 0.4, reduction: str = "mean", **kwargs: object) -> SupConTerms:
    """Eq. 11, one direction: (1 - alpha) supervised + alpha KL, each with its own mean."""
    rows = supcon_rows(*args, **kwargs)
    present = [row for row in rows if row is not None]
    supervised = reduce_rows([None if row is None else row.supervised for row in rows], reduction)
    distill = reduce_rows([None if row is None else row.distill for row in rows], reduction)
    if kwargs.get("momentum_query") is None:
        total = supervised
    elif reduction == "none":
        total = [(1 - alpha) * a + alpha * b for a, b in zip(supervised, distill, strict=True)]
    else:
        total = (1 - alpha) * supervised + alpha * distill
    with_positive = sum(row.supervised is not None for row in present)
    return SupConTerms(total, supervised, distill, len(present), with_positive)


def sigmoid(
    query: Rows,
    keys: Rows,
    query_labels: Sequence[int],
    key_labels: Sequence[int],
    *,
    temperature: float,
    bias: float,
    momentum_query: Rows | None = None,
    momentum_keys: Rows | None = None,
    alpha: float = 0.4,
    reduction: str = "mean",
    key_reduction: str = "sum",
    normalize: bool | str = True,
    ignore_index: int = -1,
    exclude_self: bool = False,
) -> float | list[float]:
    """SigLIP's algorithm 1 pair by pair, and the KL divergence of each pair from that of the momentum model."""

    def log_chance(z: float) -> float:  # log 1 / (1 + exp(-z)), where exp does not overflow
        return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))

    z = [[s + bias for s in row] for row in similarities(query, keys, temperature, normalize)]
    z_m = None
    if momentum_query is not None:
        z_m = [[s + bias for s in row] for row in similarities(momentum_query, momentum_keys, temperature, normalize)]
    supervised, distill = [], []
    for i, label in enumerate(query_labels):
        present = [j for j, c in enumerate(key_labels) if c != ignore_index and not (exclude_self and j == i)]
        known = [j for j in present if key_labels[j] >= 0]
        pairs = [-log_chance(z[i][j] if key_labels[j] == label else -z[i][j]) for j in known]
        kls = []
        for j in present if z_m is not None else []:
            yes, no = math.exp(log_chance(z_m[i][j])), math.exp(log_chance(-z_m[i][j]))
            kl_yes = yes * (log_chance(z_m[i][j]) - log_chance(z[i][j]))
            kls.append(kl_yes + no * (log_chance(-z_m[i][j]) - log_chance(-z[i][j])))
        over = (max(len(known), 1), max(len(present), 1)) if key_reduction == "mean" else (1, 1)
        absent = label == ignore_index
        supervised.append(None if absent or label < 0 else math.fsum(pairs) / over[0])
        distill.append(None if absent else math.fsum(kls) / over[1])
    first, second = reduce_rows(supervised, reduction), reduce_rows(distill, reduction)
    if z_m is None:
        return first
    if reduction == "none":
        return [(1 - alpha) * a + alpha * b for a, b in zip(first, second, strict=True)]
    return (1 - alpha) * first + alpha * second


def supcon(*args: object, **kwargs: object) -> float | list[float]:
    """The loss alone."""
    return supcon_terms(*args, **kwargs).total


def feature_distillation(
    teacher: Rows,
    student: Rows,
    student_momentum: Rows,
    teacher_queue: Rows,
    student_queue: Rows,
    student_momentum_queue: Rows,
    labels: Sequence[int],
    queue_labels: Sequence[int],
    **options: object,
) -> float:
    """Eq. 11 for one student modality u: half of t to u plus half of u to t."""
    t_to_u = supcon(
        teacher,
        student_queue,
        labels,
        queue_labels,
        momentum_query=teacher,  # U(t): the teacher has no momentum model
        momentum_keys=student_momentum_queue,
        **options,
    )
    u_to_t = supcon(
        student,
        teacher_queue,
        labels,
        queue_labels,
        momentum_query=student_momentum,  # U(u^m)
        momentum_keys=teacher_queue,
        **options,
    )
    return (t_to_u + u_to_t) / 2


def supcon_query_gradient(
    query: Rows,
    keys: Rows,
    query_labels: Sequence[int],
    key_labels: Sequence[int],
    *,
    temperature: float,
    momentum_query: Rows | None = None,
    momentum_keys: Rows | None = None,
    alpha: float = 0.4,
    positives: str = "outside",
    ignore_index: int = -1,
) -> list[list[float]]:
    """Derivative of the mean loss by the queries, rows taken as they are (no normalisation).

    A row's supervised part gives (O - kappa) / tau: O averages the keys by V, kappa the positive
    keys alone (evenly, or by V where the sum stands inside the logarithm). Its KL part gives
    (O - O^m) / tau with O^m the average by U, as Eq. 23 suggests.
    """
    present = [j for j, label in enumerate(key_labels) if label != ignore_index]
    width = len(query[0]) if query else 0
    s = similarities(query, keys, temperature, normalize=False)
    same_of = [[j for j in present if key_labels[j] == label and 0 <= label != ignore_index] for label in query_labels]
    rows = sum(label != ignore_index for label in query_labels)
    with_positive = sum(bool(same) for same in same_of)
    weight = 1.0 if momentum_query is None else 1.0 - alpha

    def average(weights: dict[int, float], c: int) -> float:
        return math.fsum(w * keys[j][c] for j, w in weights.items())

    gradient = [[0.0] * width for _ in query]
    for i, label in enumerate(query_labels):
        if label == ignore_index or not present:
            continue
        v = dict(zip(present, softmax([s[i][j] for j in present]), strict=True))
        if same := same_of[i]:
            mass = math.fsum(v[j] for j in same)
            inside = positives != "outside"
            kappa = {j: v[j] / mass if inside else 1.0 / len(same) for j in same}
            share = weight / with_positive / temperature
            if positives == "inside_per_positive":
                share /= len(same)
            for c in range(width):
                gradient[i][c] += share * (average(v, c) - average(kappa, c))
        if momentum_query is not None:
            s_m = [dot(momentum_query[i], momentum_keys[j]) / temperature for j in present]
            u = dict(zip(present, softmax(s_m), strict=True))
            for c in range(width):
                gradient[i][c] += alpha / rows / temperature * (average(v, c) - average(u, c))
    return gradient


# --- response-based distillation: Eq. 7, 10 -------------------------------------------------------


def response(
    student: Sequence,
    teacher: Sequence,
    momentum: Sequence | None = None,
    *,
    task: str,
    mask: Sequence[bool] | None = None,
    alpha: float = 0.4,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> float | list[float]:
    """(1 - alpha) of the distance to the teacher plus alpha of that to the momentum model."""

    def distance(target: float | Row, prediction: float | Row) -> float:
        if task == "regression":
            return abs(target - prediction)
        return temperature**2 * cross_entropy(target, prediction, temperature)

    rows: list[float | None] = []
    for i in range(len(student)):
        if mask is not None and not mask[i]:
            rows.append(None)
        elif momentum is None:
            rows.append(distance(teacher[i], student[i]))
        else:
            by_teacher = distance(teacher[i], student[i])
            by_momentum = distance(momentum[i], student[i])
            rows.append((1 - alpha) * by_teacher + alpha * by_momentum)
    return reduce_rows(rows, reduction)


# --- hard-sample fusion distillation: Eq. 14, 15 ---------------------------------------------------


def argmax(row: Row) -> int:
    """First index of the largest entry."""
    return max(range(len(row)), key=lambda c: row[c])


def hard_sample_fusion(
    *,
    student_scores: Row | None = None,
    student_logits: Rows | None = None,
    fused_scores: Row | None = None,
    fused_logits: Rows | None = None,
    targets: Row | None = None,
    labels: Sequence[int] | None = None,
    mask: Sequence[bool] | None = None,
    hard_attention: bool = True,
    class_weight: str = "distance",
    reduction: str = "mean",
    ignore_index: int = -1,
) -> float | list[float]:
    """Eq. 15: distance to the fused prediction, heavier where that prediction is wrong (Eq. 14)."""
    given = student_scores if student_scores is not None else student_logits
    keep = [(mask is None or mask[i]) and (labels is None or labels[i] != ignore_index) for i in range(len(given))]
    rows = [0.0 if kept else None for kept in keep]

    if student_scores is not None:
        for i in range(len(rows)):
            if keep[i]:
                w = math.tanh(abs(targets[i] - fused_scores[i])) if hard_attention else 1.0
                rows[i] += w * abs(fused_scores[i] - student_scores[i])

    if student_logits is not None:
        own: dict[int, float] = {}  # |p^i - argmax p_f^i|, or whether they differ
        if hard_attention:
            for i in range(len(rows)):
                if keep[i] and labels[i] >= 0:
                    off = abs(labels[i] - argmax(fused_logits[i]))
                    own[i] = float(off > 0) if class_weight == "error_rate" else float(off)
        shared = math.fsum(own.values()) / max(len(own), 1) if hard_attention else 1.0
        for i in range(len(rows)):
            if keep[i]:
                w = own.get(i, shared) if class_weight == "per_sample" else shared
                rows[i] += w * cross_entropy(fused_logits[i], student_logits[i])

    return reduce_rows(rows, reduction)


# --- moving averages: Eq. 6 with the decay on the old value, and Eq. 12 ----------------------------


def ema(start: float, values: Sequence[float], decay: float) -> float:
    """Closed form of the recursion: decay^n start + (1 - decay) sum_k decay^(n-1-k) value_k."""
    n = len(values)
    new = math.fsum(decay ** (n - 1 - k) * value for k, value in enumerate(values))
    return decay**n * start + (1 - decay) * new


def weighted_modalities(features: dict[str, Rows], factors: dict[str, float]) -> dict[str, Rows]:
    """Eq. 12 before the concatenation: w_u F_u."""
    return {name: [[factors[name] * x for x in row] for row in rows] for name, rows in features.items()}


# --- diagnostics: Eq. 20 and the usual three -------------------------------------------------------


def mutual_information_bound(loss: float, num_keys: int) -> float:
    """Eq. 20."""
    return math.log(num_keys) - loss


def modality_gap(x: Rows, y: Rows) -> float:
    """Distance of the two centres of the unit rows."""
    centres = [
        [math.fsum(row[c] for row in unit_rows) / len(unit_rows) for c in range(len(unit_rows[0]))]
        for unit_rows in ([unit(row) for row in x], [unit(row) for row in y])
    ]
    return math.dist(*centres)


def alignment(x: Rows, y: Rows, exponent: float = 2.0) -> float:
    """Mean distance of the pairs, to the power of `exponent`."""
    distances = [math.dist(unit(a), unit(b)) ** exponent for a, b in zip(x, y, strict=True)]
    return math.fsum(distances) / len(distances)


def uniformity(x: Rows, scale: float = 2.0) -> float:
    """Log of the mean Gaussian potential over the pairs i < j."""
    rows = [unit(row) for row in x]
    potentials = [
        math.exp(-scale * math.dist(rows[i], rows[j]) ** 2) for i in range(len(rows)) for j in range(i + 1, len(rows))
    ]
    return math.log(math.fsum(potentials) / len(potentials))


# --- gradients of any of the above -----------------------------------------------------------------


def central_differences(f: Callable[[list[list[float]]], float], x: Rows, step: float = 1e-5) -> list[list[float]]:
    """Derivative of `f` by every entry of `x`."""
    x = [list(row) for row in x]
    out = [[0.0] * len(row) for row in x]
    for i, row in enumerate(x):
        for c in range(len(row)):
            here = row[c]
            row[c] = here + step
            above = f(x)
            row[c] = here - step
            out[i][c] = (above - f(x)) / (2 * step)
            row[c] = here
    return out
