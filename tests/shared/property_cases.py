"""What the property tests share: drawn inputs, the formulas once more with gradients, and how errors are measured.

The formulas here are dense, in float64 and differentiated by autograd, which the loops of `reference.py` cannot be;
`test_properties.py` compares the two first.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings, target
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from torch import Tensor

import momentum_distill as md
from loss_cases import DTYPES, POSITIVES, REDUCTIONS, RTOL, by_autograd, without_asking
from momentum_distill._contrast import engine, tiles
from tiers import STRESS, times

PROPERTY = settings(max_examples=times(25, 200, 10_000))
"""Examples of a property: the same in every run of CI, new ones under `make stress`."""

LAYOUTS = ["contiguous", "strided", "expanded", "zero-size"]

Named = dict[str, Tensor]


# --- drawn inputs -----------------------------------------------------------------------------------------------------

# One byte a number, so that Hypothesis draws a matrix at one stroke, shrinks it to zeros and can find the worst one.
_QUANTILES = math.sqrt(2) * torch.erfinv((torch.arange(253, dtype=torch.float64) - 126) / 127)
NUMBERS = torch.cat([torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), _QUANTILES])
# And one byte a row: usual; zero; without direction; tiny (in float16 without direction); small; up to ±1e4. What is
# left repeats the row before.
SCALES = torch.tensor([1.0] * 6 + [0.0, 1e-9, 3e-5, 3e-3, 3.7e3], dtype=torch.float64)

# Hypothesis takes longer to make a strategy than to draw from it.
byte_strings = functools.cache(lambda size: st.binary(min_size=size, max_size=size))


def numbers(draw: st.DrawFn, size: int) -> Tensor:
    """So many bytes, as int64."""
    return torch.tensor(list(draw(byte_strings(size))), dtype=torch.int64)


def matrix(draw: st.DrawFn, rows: int, width: int, *, wild: bool = True) -> Tensor:
    """A float64 matrix with every kind of row or, not `wild`, with usual ones."""
    codes = numbers(draw, rows * (width + 1)).view(rows, width + 1)
    kinds = codes[:, 0] % (len(SCALES) + 1) * wild
    repeats = (kinds == len(SCALES)) & (torch.arange(rows) > 0)
    values = NUMBERS[codes[:, 1:]] * SCALES[kinds.clamp(max=len(SCALES) - 1)][:, None]
    return values[torch.arange(rows) - repeats.long()]


def labels(draw: st.DrawFn, rows: int, absent: int = -1) -> Tensor:
    """Three classes, unlabelled (-2) and `absent`."""
    return torch.tensor([0, 1, 2, 0, 1, 2, -2, absent])[numbers(draw, rows) % 8]


def mask(draw: st.DrawFn, rows: int) -> Tensor:
    """Which rows to keep: three of four."""
    return numbers(draw, rows) % 4 < 3


def laid(x: Tensor, layout: str) -> Tensor:
    """The tensor in a layout; expanded, it is its first row over and over."""
    if layout == "strided":  # what lies in between would show
        between = torch.full_like(x, torch.nan if x.is_floating_point() else 1)
        return torch.stack([x, between], dim=-1)[..., 0]
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x


ROWS_AND_CLASSES = st.tuples(st.integers(1, 6), st.integers(1, 4))
LAYOUT = st.sampled_from(LAYOUTS)


@functools.cache
def dtypes_around(dtype: torch.dtype, count: int) -> st.SearchStrategy[tuple[torch.dtype, ...]]:
    """Mostly one dtype for all tensors of a call, else each has its own."""
    return st.one_of(*[st.just((dtype,) * count)] * 3, st.tuples(*[st.sampled_from(DTYPES)] * count))


@st.composite
def outputs(
    draw: st.DrawFn, dtype: torch.dtype, names: tuple[str, ...], *, classes: bool, rows: int | None = None
) -> Named:
    """Outputs of models: scores (N,), or logits (N, C) of some `classes`; also `labels` (N,) and a `mask` (N,)."""
    n, c = draw(ROWS_AND_CLASSES)
    layout = draw(LAYOUT)
    n = (0 if layout == "zero-size" else n) if rows is None else rows
    wild = draw(st.booleans())
    raw = [matrix(draw, n, c if classes else 1, wild=wild) for _ in names]
    raw = raw if classes else [x[:, 0] for x in raw]
    kinds = draw(dtypes_around(dtype, len(names)))
    tensors = {name: laid(x.to(kind), layout) for name, x, kind in zip(names, raw, kinds, strict=True)}
    return tensors | {"mask": laid(mask(draw, n), layout), "labels": laid(labels(draw, n), layout)}


class Contrast(NamedTuple):
    """One call of the contrastive loss."""

    features: Named  # query, keys and, unless there is no momentum model, momentum_query and momentum_keys
    query_labels: Tensor
    key_labels: Tensor
    cuts: tuple[int, ...]  # lengths of the parts of the keys
    options: dict[str, Any]  # of the loss

    @property
    def momentum(self) -> bool:
        return "momentum_query" in self.features

    @property
    def fewest_cuts(self) -> tuple[int, ...]:
        """One part; two where the first has to be the batch."""
        n, q = len(self.query_labels), len(self.key_labels)
        return (n, q - n) if self.options["exclude_self"] else (q,)

    def call(
        self,
        loss_fn: md.SupConDistillLoss,
        x: Named,
        cuts: Sequence[int],
        live: Sequence[bool] = (True, True, True),
        alpha: Tensor | None = None,
    ) -> Any:
        """The terms of the loss with `x` for the features; the keys in parts, of which those `live` have a gradient."""
        parts = {name: t.split(cuts) for name, t in x.items() if "keys" in name}
        parts["keys"] = tuple(
            part if alive else part.detach() for part, alive in zip(parts["keys"], live, strict=False)
        )
        if self.features["keys"] is self.features.get("momentum_keys"):
            parts["momentum_keys"] = parts["keys"]  # the very same tensors, which is a way of its own
        return loss_fn.terms(
            x["query"],
            parts["keys"],
            self.query_labels,
            self.key_labels.split(cuts),
            momentum_query=x.get("momentum_query"),
            momentum_keys=parts.get("momentum_keys"),
            alpha=alpha,
        )


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 4))
NO_SIZES = SIZES.flatmap(lambda nqd: st.sampled_from([(0, *nqd[1:]), (nqd[0], 0, nqd[2]), (*nqd[:2], 0)]))
CUTS = st.lists(st.integers(0, 9), max_size=2)
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0, 7.0]),
        "alpha": st.sampled_from([0.0, 0.4, 0.75, 1.0]),
        "positives": st.sampled_from(POSITIVES),
        "reduction": st.sampled_from(REDUCTIONS),
        "normalize": st.sampled_from([True, "query", False]),
        "ignore_index": st.sampled_from([-1, -1, 2]),
        "exclude_self": st.sampled_from([False, False, True]),
    }
)
MOMENTUM = st.sampled_from(["none", "own", "the keys"])


@st.composite
def contrasts(draw: st.DrawFn, dtype: torch.dtype = torch.float64, layout: str | None = None) -> Contrast:
    """Any legal call of the contrastive loss, in any layout unless one is given."""
    layout = draw(LAYOUT) if layout is None else layout
    n, q, d = draw(NO_SIZES if layout == "zero-size" else SIZES)
    options, momentum, wild = draw(OPTIONS), draw(MOMENTUM), draw(st.booleans())
    q = max(n, q) if options["exclude_self"] else q
    raw = {"query": matrix(draw, n, d, wild=wild), "keys": matrix(draw, q, d, wild=wild)}
    if draw(st.booleans()):  # the batch is among the keys, as its own part of them is
        raw["keys"][: min(n, q)] = raw["query"][: min(n, q)]
    if momentum != "none":
        raw["momentum_query"] = matrix(draw, n, d, wild=wild)
        raw["momentum_keys"] = matrix(draw, q, d, wild=wild) if momentum == "own" else raw["keys"]
    if options["normalize"] == "query":  # unit rows are what is legal then
        raw = {name: unit(x, 1e-6) if "keys" in name else x for name, x in raw.items()}
    dtypes = draw(dtypes_around(dtype, 4))
    features = {name: laid(x.to(kind), layout) for (name, x), kind in zip(raw.items(), dtypes, strict=False)}
    if momentum == "the keys":
        features["momentum_keys"] = features["keys"]
    stops = [*sorted(min(cut, q) for cut in draw(CUTS)), q]
    if options["exclude_self"]:
        stops = [n, *(max(n, stop) for stop in stops[-2:])]
    return Contrast(
        features=features,
        query_labels=laid(labels(draw, n, options["ignore_index"]), layout),
        key_labels=laid(labels(draw, q, options["ignore_index"]), layout),
        cuts=tuple(stop - start for start, stop in zip([0, *stops], stops, strict=False)),
        options=options,
    )


@st.composite
def plain_outputs(
    draw: st.DrawFn, dtype: torch.dtype, names: tuple[str, ...], sizes: list[tuple[int, int, int]]
) -> Named:
    """Logits (N, C) in one dtype, contiguous, and a `mask` (N,)."""
    n, _, c = draw(st.sampled_from(sizes))
    return {name: matrix(draw, n, c).to(dtype) for name in names} | {"mask": mask(draw, n)}


@st.composite
def plain_contrasts(
    draw: st.DrawFn, dtype: torch.dtype, sizes: list[tuple[int, int, int]], options: dict[str, Any]
) -> Contrast:
    """Calls that `torch.compile` takes for one another: momentum, one dtype, contiguous, in one part."""
    n, q, d = draw(st.sampled_from(sizes))
    features = {
        name: matrix(draw, n if "query" in name else q, d)
        for name in ("query", "keys", "momentum_query", "momentum_keys")
    }
    if options["normalize"] == "query":
        features = {name: unit(x, 1e-6) if "keys" in name else x for name, x in features.items()}
    features = {name: x.to(dtype) for name, x in features.items()}
    return Contrast(features, labels(draw, n), labels(draw, q), (q,), options)


WAYS = ["matrices", "matrices, not asking", "by autograd", "tiles", "tiles, running shift", "tiles, not asking"]


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """The contrastive loss by one of the ways it has, tiles being four keys wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "DENSE_SCORES", -1 if name.startswith("tiles") else 2**62)
        patch.setattr(tiles, "MIN_TILE", 4)
        patch.setattr(tiles, "MAX_TILE", 4)
        if name.endswith("running shift"):
            patch.setattr(tiles, "SAFE_SUM", (1.0, 0.0))  # no sum is in this range
        if name.endswith("not asking"):
            without_asking(patch)
        if name == "by autograd":
            by_autograd(patch)
        yield


# --- the formulas, dense, in float64 ----------------------------------------------------------------------------------


def unit(x: Tensor, eps: float) -> Tensor:
    """Rows at length one, and zeros where no magnitude reaches `eps`."""
    if x.shape[1] == 0:
        return x
    has_direction = x.detach().abs().amax(dim=1, keepdim=True) >= eps
    safe = torch.where(has_direction, x, 1.0)
    return torch.where(has_direction, safe / safe.norm(dim=1, keepdim=True), 0.0)


def reduced(rows: Tensor, keep: Tensor, reduction: str) -> Tensor:
    """Rows (N,) reduced over those to `keep`; the others are zeros with "none"."""
    if reduction == "none":
        return torch.where(keep, rows, 0.0)
    total = rows[keep].sum()
    return total if reduction == "sum" else total / max(int(keep.sum()), 1)


def contrast_terms(
    case: Contrast, features: Named, temperature: Tensor, alpha: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, supervised and KL term of Eq. 9 and 11, for the case's features in float64."""
    options = case.options
    here = case.query_labels != options["ignore_index"]
    there = case.key_labels != options["ignore_index"]

    def scores(query: str, keys: str) -> Tensor:
        q, k = features[query][here], features[keys][there]
        if options["normalize"]:
            q = unit(q, no_direction(case.features[query]))
        if options["normalize"] is True:
            k = unit(k, no_direction(case.features[keys]))
        return q @ k.T / temperature

    kept = case.query_labels[here]
    hidden = torch.eye(len(here), len(there), dtype=torch.bool)[here][:, there] & options["exclude_self"]
    # A row that sees no key at all adds nothing.
    none = hidden.all(dim=1, keepdim=True)

    def log_softmax(scores: Tensor) -> Tensor:
        seen = torch.where(none, 0.0, scores.masked_fill(hidden, -torch.inf))
        return torch.where(hidden, 0.0, seen.log_softmax(dim=1))

    same = (kept[:, None] == case.key_labels[there]) & (kept >= 0)[:, None] & ~hidden
    count = same.sum(dim=1)
    if there.any():
        log_v = log_softmax(scores("query", "keys"))
        if options["positives"] == "outside":
            supervised = -torch.where(same, log_v, 0.0).sum(dim=1) / count.clamp(min=1)
        else:
            some = torch.where(count[:, None] > 0, log_v.masked_fill(~same, -torch.inf), 0.0)
            supervised = -torch.where(count > 0, some.logsumexp(dim=1), 0.0)
        if options["positives"] == "inside_per_positive":
            supervised = supervised / count.clamp(min=1)
        distill = torch.zeros_like(supervised)
        if case.momentum:
            log_u = log_softmax(scores("momentum_query", "momentum_keys")).detach()
            distill = torch.where(hidden, 0.0, log_u.exp() * (log_u - log_v)).sum(dim=1)
    else:
        supervised = distill = features["query"][here].sum(dim=1) * 0.0

    def spread(rows: Tensor) -> Tensor:
        return torch.zeros(len(here), dtype=torch.float64).index_put((here.nonzero()[:, 0],), rows)

    positive = here.clone()
    positive[here] = count > 0
    supervised = reduced(spread(supervised), positive, options["reduction"])
    distill = reduced(spread(distill), here, options["reduction"])
    if not case.momentum:
        alpha = 0.0
    elif alpha is None:
        alpha = options["alpha"]
    return (1 - alpha) * supervised + alpha * distill, supervised, distill


def distance(teacher: Tensor, student: Tensor, task: str, temperature: float = 1.0) -> Tensor:
    """By row, Eq. 7: of scores, or of the softmax of logits."""
    if task == "regression":
        return (teacher - student).abs()
    # Float64 has to be as good as exact here: of the logits, differences before all else. Off the largest, a softmax is
    # made of them; off the mean by the teacher, its gradient.
    largest = student.detach().amax(dim=1, keepdim=True)
    p = ((teacher - teacher.detach().amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)
    mean = (p * student).sum(dim=1, keepdim=True).detach()
    log_sum = ((student - largest) / temperature).logsumexp(dim=1) + (largest - mean)[:, 0] / temperature
    return temperature**2 * (log_sum - (p * (student - mean)).sum(dim=1) / temperature)


def response_loss(x: Named, keep: Tensor, *, task: str, alpha: float, temperature: float, reduction: str) -> Tensor:
    """Eq. 10, of `student`, `teacher` and `momentum`."""
    rows = distance(x["teacher"], x["student"], task, temperature)
    if "momentum" in x:
        rows = (1 - alpha) * rows + alpha * distance(x["momentum"].detach(), x["student"], task, temperature)
    return reduced(rows, keep, reduction)


def hard_sample_loss(
    x: Named, keep: Tensor, labels: Tensor | None, *, hard_attention: bool, class_weight: str, reduction: str
) -> Tensor:
    """Eq. 15, of what it takes by its own names."""
    total = torch.zeros(len(keep), dtype=torch.float64)
    if "student_scores" in x:
        off = (x["targets"] - x["fused_scores"]).detach().abs() if hard_attention else None
        total = total + (1.0 if off is None else off.tanh()) * distance(
            x["fused_scores"], x["student_scores"], "regression"
        )
    if "student_logits" in x:
        weight = torch.ones(len(keep), dtype=torch.float64)
        if hard_attention:
            known = keep & (labels >= 0)
            off = (labels - x["fused_logits"].detach().argmax(dim=1)).abs()[known].double()
            off = off.clamp(max=1.0) if class_weight == "error_rate" else off
            weight = weight * off.sum() / max(len(off), 1)
            if class_weight == "per_sample":
                weight[known] = off
        total = total + weight * distance(x["fused_logits"], x["student_logits"], "classification")
    return reduced(total, keep, reduction)


# --- errors -----------------------------------------------------------------------------------------------------------


def wide(tensors: Named) -> Named:
    """The same numbers in float64."""
    return {name: x.double() for name, x in tensors.items()}


def no_direction(x: Tensor) -> float:
    """Rows in which no magnitude reaches this have no direction, as `l2_normalize` says."""
    return 1e-3 if x.dtype == torch.float16 else 1e-6


def contrast_scales(case: Contrast, ratio: float = 0.0) -> tuple[tuple[float, float], Named]:
    """Floors of value and gradients, and lengths of the rows, for :func:`assert_accurate`.

    A gradient is a difference of scores, so its floor is the largest score there can be, S: 1/temperature for unit
    rows. A score of size S also carries an error of S times the unit roundoff u into the softmax, which no arithmetic
    can mend, so beyond 20, a temperature of 0.05, the floor of gradients grows with S once more. The KL term is a mean
    of differences of scores by such weights, with an error of a few u S²: beyond 7 the floor of values is (S/7)², which
    allows 3.4 u S² in float32. And a sum has the errors of all its rows. `ratio` is that of a learned temperature.
    """
    normalize, temperature = case.options["normalize"], case.options["temperature"] * math.exp(ratio)
    norms = {name: x.double().norm(dim=1, keepdim=True) for name, x in case.features.items()}
    if normalize is False:
        # One length for all rows of a side: a short row's gradient is made of the long ones.
        lengths = {
            side: max(1.0, 1.0, *(float(length) for name, x in norms.items() if side in name for length in x))
            for side in ("query", "keys")
        }
        score = lengths["query"] * lengths["keys"] / temperature
    else:
        lengths = {name: x.clamp_min(no_direction(case.features[name])) for name, x in norms.items()}
        lengths["keys"] = 1.0 if normalize == "query" else lengths["keys"]
        score = 1 / temperature
    rows = len(case.query_labels) if case.options["reduction"] == "sum" else 1
    floors = max(1.0, score / 7) ** 2, max(1.0, score) * max(1.0, score / 20)
    return tuple(max(1, rows) * floor for floor in floors), lengths


def outcome(
    f: Callable[[Named], Named], inputs: Named, wanted: Iterable[str], parameters: Named | None = None
) -> tuple[Named, Named]:
    """What `f` returns for `inputs`, and the gradients of its weighted sum for those `wanted` and for `parameters`."""
    inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    leaves = {name: inputs[name] for name in wanted} | (parameters or {})
    values = f(inputs)
    total = sum((x.double() * weights(x)).sum() for x in values.values())
    grads = dict.fromkeys(leaves)
    if leaves and total.requires_grad:
        grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True))
    zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
    values = {name: x.detach() for name, x in values.items()}
    return values, {name: zeros[name] if grad is None else grad for name, grad in grads.items()}


def teacher_lengths(gradient: Tensor) -> Tensor:
    """For :func:`assert_accurate`: the gradient for a teacher's logits is held to the size of the largest in its row.

    It is p (E log q - log q): what rounding does to p, a share of it, is a share of all that cancels in the mean E.
    """
    return 1 / gradient.abs().amax(dim=1, keepdim=True).clamp_min(1.0)


def weights(x: Tensor) -> Tensor:
    """One, two or three over about the number of elements: numbers that 16 bits can hold."""
    count = x.numel()
    return ((1.0 + torch.arange(count, dtype=torch.float64) % 3) / 2 ** count.bit_length()).view(x.shape)


def assert_accurate(
    ours: tuple[Named, Named],
    reference: tuple[Named, Named],
    *,
    sums: torch.dtype,
    floors: tuple[float, float] = (1.0, 1.0),
    lengths: Named | None = None,
) -> None:
    r"""Everything finite, and within `RTOL` of the reference.

    The error of a number $a$ that should be $e$ is $|a - e| / \max(f, |e|)$ with a floor $f$ of 1 unless `floors` give
    others to values and gradients. It is held to the bar of the dtype that $a$ has or, where that is coarser, of
    `sums`, the dtype summed in: a float32 loss of bfloat16 features is held to the bar of float32. Gradients count
    times their `lengths`, most often those of the rows: what the loss changes by as a row changes by its own length,
    whatever its unit.
    A gradient that its dtype cannot hold, 1e5 in float16, is none of our doing.
    """
    worst: dict[tuple[str, torch.dtype], float] = {}
    for kind, floor, actual, expected in zip(("value", "gradient"), floors, ours, reference, strict=True):
        assert actual.keys() == expected.keys()
        for name in actual:
            a, e = actual[name], expected[name]
            assert a.shape == e.shape, f"{kind} {name}: shape {tuple(a.shape)}, not {tuple(e.shape)}"
            holds = e.abs() < 0.99 * torch.finfo(a.dtype).max
            assert a[holds].isfinite().all(), f"{kind} {name}: {a.tolist()}, expected {e.tolist()}"
            length = (lengths or {}).get(name, 1.0) if kind == "gradient" else 1.0
            errors = ((a.double() - e) * length).abs() / (e * length).abs().clamp_min(floor)
            error = errors[holds].max().item() if holds.any() else 0.0
            dtype = max(a.dtype, sums, key=RTOL.__getitem__)
            assert error <= RTOL[dtype], f"{kind} {name}: error {error:.2g}, {a.tolist()}, expected {e.tolist()}"
            worst[kind, dtype] = max(worst.get((kind, dtype), 0.0), error)
    if STRESS:  # let Hypothesis climb towards the worst; --hypothesis-show-statistics tells it
        for (kind, dtype), error in worst.items():
            with contextlib.suppress(InvalidArgument):  # a test that comes here twice climbs by the first
                target(error, label=f"{kind}, {dtype}")
