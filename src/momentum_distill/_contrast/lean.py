"""The contrastive loss and its gradient in few Triton launches: what stands around :mod:`.lean_kernels`.

The second fused way. It makes the terms and the gradient of their weighted sum in five launches (three more for each
further part of the keys), scales the gradient in a sixth, whatever the size, and no other operation starts anything on
the device. The mathematics is that of :func:`momentum_distill.functional.supcon_distill_terms`.

:func:`contrast` is :func:`solve`, which ends in sums over the rows, and :func:`finish`, which starts from them: between
the two stands what several processes have to add up.
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momentum_distill._contrast import lean_kernels as kernels
from momentum_distill._contrast.kernel import (
    DTYPES,
    _current,
    _import,
    _multiprocessors,
    _rows_contiguous,
    available,
    triton,
)
from momentum_distill._rows import shortest

MAX_WIDTH = 128
"""A program holds whole rows; wider ones are for the older kernel."""
_TILE = 128  # keys that share a flag: splits begin at such a tile
_MIN_KEYS_PER_SPLIT = 128  # fewer are not worth their start and their share of the merge
_MAX_SPLIT_BYTES = 12 * 2**20  # unmerged results of all splits, float32
_MIN_TMA_NUMBERS = 2**20  # to encode a tensor descriptor takes the host longer than it saves on fewer keys
TMA: bool | None = None
"""Whether whole tiles are loaded through tensor descriptors where strides allow it; None: on GPUs that have them."""

_descriptors = _import("triton.tools.tensor_descriptor")


class Part(NamedTuple):
    """One part of the keys, raw; dtypes may differ."""

    keys: Tensor  # (Q, d)
    momentum: Tensor | None  # (Q, d); the same object as `keys` where they are the same keys
    labels: Tensor  # (Q,) int64


class Answer(NamedTuple):
    """The terms and the gradient of `total`, float32; with `reduction="none"` terms and gradients of scalars by row."""

    total: Tensor  # (), or (N,)
    supervised: Tensor
    distill: Tensor
    rows: Tensor  # () int64
    rows_with_positive: Tensor  # () int64
    grad_query: Tensor  # (N, d)
    grad_temperature: Tensor  # (), or (N,)
    grad_alpha: Tensor


class Solved(NamedTuple):
    """What is known before the rows of all processes are counted."""

    sums: Tensor  # (blocks, 8) float64: supervised, distill, rows, rows with a positive key; zeros. To be added up
    temperature_sums: Tensor  # (blocks, 2) float64, of this process
    terms: Tensor  # (2, N)
    grads: Tensor  # (2, N, d)
    grad_temperatures: Tensor  # (2, N)


class Tiling(NamedTuple):
    """How a kernel goes through the keys."""

    block_q: int
    block_k: int
    masked_k: int
    num_warps: int
    num_stages: int


# By the bytes of the widest keys and the generation of the GPU (9: Hopper, 10: B200, 8: all others): `attend` for few
# queries and for many, and `sum_classes`. As large as registers hold.
_TILINGS = {
    (2, 8): (Tiling(64, 64, 32, 4, 2), Tiling(128, 32, 16, 8, 3), Tiling(64, 64, 64, 4, 3)),
    (2, 9): (Tiling(64, 64, 32, 4, 2), Tiling(128, 128, 32, 8, 3), Tiling(64, 64, 64, 4, 3)),
    (2, 10): (Tiling(64, 64, 32, 4, 2), Tiling(128, 64, 32, 8, 3), Tiling(64, 64, 64, 4, 3)),
    (4, 8): (Tiling(32, 32, 16, 4, 1), Tiling(32, 32, 16, 4, 1), Tiling(64, 32, 32, 4, 1)),
    (4, 9): (Tiling(64, 32, 16, 4, 1), Tiling(128, 64, 32, 8, 1), Tiling(64, 32, 32, 4, 2)),
    (4, 10): (Tiling(64, 32, 16, 4, 1), Tiling(128, 64, 32, 8, 1), Tiling(64, 32, 32, 4, 2)),
}
_WARPS_PER_SM = 8  # that run at once: the compiler takes up to 255 registers a thread
_ROWS, _TILES = 16, 16  # of a program that goes through rows, and through the labels of keys
_MERGE_ROWS, _MERGE_CHUNK = 4, 8  # rows of a program that merges, and splits that it takes at a time


def takes(
    query: Tensor,
    momentum_query: Tensor | None,
    keys: Sequence[Part],
    query_labels: Tensor,
    *numbers: float | Tensor,
) -> bool:
    """Whether :func:`contrast` can take this problem, `numbers` being temperatures and alpha; shapes are checked."""
    features = [query, momentum_query, *(x for part in keys for x in (part.keys, part.momentum))]
    others = [query_labels, *(part.labels for part in keys), *numbers]
    tensors = [x for x in [*features, *others] if isinstance(x, Tensor)]
    return (
        available()
        and query.shape[0] > 0
        and 0 < query.shape[1] <= MAX_WIDTH
        and all(len(part.keys) > 0 for part in keys)
        and all(x.dtype in DTYPES for x in features if x is not None)
        and all(x.device == query.device for x in tensors)
    )


def contrast(
    query: Tensor,
    momentum_query: Tensor | None,
    keys: Sequence[Part],
    query_labels: Tensor,
    *,
    temperature: float | Tensor,
    momentum_temperature: float | Tensor,
    alpha: float | Tensor,
    positives: str,
    reduction: str,
    normalize: str | bool,
    ignore_index: int,
) -> Answer:
    """The terms of the loss and the gradient of the total, as `functional.supcon_distill_terms` defines them.

    Args:
        query: (N, d), raw.
        momentum_query: (N, d), raw; then every part has momentum keys. Else `alpha` counts for nothing.
        keys: The parts of the keys.
        query_labels: (N,) int64.
        temperature: A number or a tensor of shape `()`, which is read on the device, like the next two.
        momentum_temperature: Of the targets.
        alpha: Weight of the KL term.
        positives: `"outside"`, `"inside"` or `"inside_per_positive"`.
        reduction: `"mean"`, `"sum"` or `"none"`.
        normalize: True, `"query"` or False.
        ignore_index: Label of rows and keys that are left out.
    """
    solved = solve(
        query, momentum_query, keys, query_labels, temperature=temperature, momentum_temperature=momentum_temperature,
        positives=positives, normalize=normalize, ignore_index=ignore_index,
    )  # fmt: skip
    return finish(solved, solved.sums, alpha=alpha, taught=momentum_query is not None, reduction=reduction)


def solve(
    query: Tensor,
    momentum_query: Tensor | None,
    keys: Sequence[Part],
    query_labels: Tensor,
    *,
    temperature: float | Tensor,
    momentum_temperature: float | Tensor,
    positives: str,
    normalize: str | bool,
    ignore_index: int,
    num_splits: int | None = None,
) -> Solved:
    """All but what the number of rows decides. `num_splits`: of each part, about; by default what fills the GPU."""
    n, d = query.shape
    taught, inside = momentum_query is not None, positives != "outside"
    new, integers = partial(query.new_empty, dtype=torch.float32), partial(query.new_empty, dtype=torch.int32)
    rows = _Rows(
        _rows_contiguous(query), query if momentum_query is None else _rows_contiguous(momentum_query), taught,
        query_labels.contiguous(), _number(temperature), _number(momentum_temperature), ignore_index, normalize,
        new((n, d)), new(n), integers(n),
    )  # fmt: skip
    # Of parts whose momentum keys are the keys, the mean logit of the momentum model is q' times its mean key.
    logit = taught and not all(part.momentum is part.keys for part in keys)
    kinds = 1 + taught + inside
    share, num_sms = len(keys), _multiprocessors(query.device)[0]
    plans = [tilings(n, part, generation(query.device)) for part in keys]
    cut = partial(_cut, n, d, num_sms=num_sms, num_splits=num_splits)
    spans = [cut(len(part.keys), plan[0], kinds, share) for part, plan in zip(keys, plans, strict=True)]
    class_spans = [cut(len(part.keys), plan[1], 1, share) for part, plan in zip(keys, plans, strict=True)]
    splits = sum(span.splits for span in spans)
    class_splits = splits if inside else sum(span.splits for span in class_spans)
    slots = 3 if inside else kinds
    found = _Splits(new((slots, splits, n)), new((slots, splits, n, d)), new((splits if logit else 1, n)))
    class_sums, count = new((1 if inside else class_splits, n, d)), integers((class_splits, n))
    blocks = -(-n // _MERGE_ROWS)
    solved = Solved(
        new((blocks, 8), dtype=torch.float64), new((blocks, 2), dtype=torch.float64),
        new((2, n)), new((2, n, d)), new((2, n)),
    )  # fmt: skip
    with _current(query.device):
        first = class_first = 0
        met: _Ready | None = None
        for part, plan, span, class_span in zip(keys, plans, spans, class_spans, strict=True):
            ready = _prologue(rows, part)
            _attend(rows, ready, plan[0], span, first, found, count, inside=inside, logit=logit)
            if not inside:
                _sum_classes(rows, ready, plan[1], class_span, class_first, class_sums, count)
            # Where dtypes differ, the part that rounds most.
            met = ready if met is None or ready.query.element_size() < met.query.element_size() else met
            first += span.splits
            class_first += class_span.splits
        assert met is not None
        kernels.merge[(blocks,)](
            *found, class_sums, count, met.query, met.momentum_query, met.sizes,
            rows.unit, rows.lengths, rows.first, rows.labels, rows.temperature,
            solved.terms, solved.grads, solved.grad_temperatures, solved.sums, solved.temperature_sums,
            n, splits, class_splits, ignore_index,
            TAUGHT=taught, LOGIT=logit, INSIDE=inside, PER_POSITIVE=positives == "inside_per_positive",
            NORMALIZE=bool(normalize), BLOCK_N=_MERGE_ROWS, CHUNK=_MERGE_CHUNK, **_widths(d),
        )  # fmt: skip
    return solved


def finish(
    solved: Solved, sums: Tensor, *, alpha: float | Tensor, taught: bool, reduction: str, world: int = 1
) -> Answer:
    """The answer from sums of one or more rows of 8 numbers; of `world` processes, whose rows they count."""
    _, n, d = solved.grads.shape
    new = partial(solved.terms.new_empty, dtype=torch.float32)
    by_row = reduction == "none"
    reduced, counts, grad_query = new((5, n) if by_row else (5,)), sums.new_empty(2, dtype=torch.int64), new((n, d))
    with _current(sums.device):
        kernels.finish[(-(-n // _ROWS),)](
            solved.terms, solved.grads, solved.grad_temperatures, sums, solved.temperature_sums,
            _number(alpha), reduced, counts, grad_query, n, len(solved.temperature_sums), len(sums), world,
            TAUGHT=taught, MEAN=reduction == "mean", BY_ROW=by_row, BLOCK_N=_ROWS, **_widths(d),
        )  # fmt: skip
    total, supervised, distill, grad_temperature, grad_alpha = reduced.unbind()
    rows, with_positive = counts.unbind()
    return Answer(total, supervised, distill, rows, with_positive, grad_query, grad_temperature, grad_alpha)


def scale(
    answer: Answer,
    upstream: Tensor,
    *,
    query: torch.dtype,
    temperature: torch.dtype = torch.float32,
    alpha: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the queries (N, d), the temperature () and alpha () in their dtypes, in one launch.

    `upstream` is the gradient of the total: (), or (N,) where that is by row.
    """
    n, d = answer.grad_query.shape
    new = answer.grad_query.new_empty
    grads = new((n, d), dtype=query), new((), dtype=temperature), new((), dtype=alpha)
    by_row = upstream.ndim == 1
    with _current(upstream.device):
        kernels.scale[(-(-n // _ROWS),)](
            answer.grad_query, answer.grad_temperature, answer.grad_alpha,
            upstream, upstream.stride(0) if by_row else 0, *grads, n,
            BY_ROW=by_row, BLOCK_N=_ROWS, **_widths(d),
        )  # fmt: skip
    return grads


# --------------------------------------------------------------------------------------------------------------------
# Launches
# --------------------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The batch, as all launches read it."""

    query: Tensor
    momentum_query: Tensor
    taught: bool
    labels: Tensor
    temperature: float | Tensor
    momentum_temperature: float | Tensor
    ignore_index: int
    normalize: str | bool
    unit: Tensor  # (N, d)
    lengths: Tensor  # (N,)
    first: Tensor  # (N,)


class _Ready(NamedTuple):
    """A part of the keys as the kernels read it, and the queries as they meet it."""

    query: Tensor  # (N, d)
    momentum_query: Tensor  # (N, d)
    sizes: Tensor  # (2, N), or anything
    keys: Tensor
    momentum: Tensor  # the same object where they are the same keys, or there is no momentum model
    labels: Tensor
    flags: Tensor
    inverse: Tensor  # (2, Q), or anything where keys are as they should be
    scaled: bool


class _Splits(NamedTuple):
    """What the splits of the keys leave, see `lean_kernels.attend`."""

    lse: Tensor
    mean: Tensor
    mean_logit: Tensor


def _prologue(rows: _Rows, part: Part) -> _Ready:
    """The first launch: of the rows, as they meet one part of the keys, and of that part."""
    n, d = rows.query.shape
    keys, labels, raw = _rows_contiguous(part.keys), part.labels.contiguous(), rows.normalize is True
    momentum = keys if part.momentum is part.keys or part.momentum is None else _rows_contiguous(part.momentum)
    count, tiles = len(keys), 1 if raw else _TILES
    inverse = rows.lengths.new_empty((2, count)) if raw else rows.lengths
    copied = raw and torch.float16 in (keys.dtype, momentum.dtype)
    copies = keys.new_empty((2, count, d), dtype=torch.float16) if copied else inverse
    flags = labels.new_empty(-(-count // _TILE), dtype=torch.int32)
    ready_query, ready_momentum = keys.new_empty((n, d)), momentum.new_empty((n if rows.taught else 1, d))
    sizes = rows.lengths.new_empty((2, n)) if torch.float16 in (keys.dtype, momentum.dtype) else rows.lengths
    sides = [(x, x.stride(0), shortest(x)) for x in (rows.query, rows.momentum_query, keys, momentum)]
    kernels.prologue[(-(-n // _ROWS) + -(-count // (_TILE * tiles)),)](
        *sides[0], *sides[1], rows.labels, rows.temperature, rows.momentum_temperature,
        rows.unit, rows.lengths, ready_query, ready_momentum, sizes, rows.first,
        *sides[2], *sides[3], labels, flags, inverse, copies, n, count, rows.ignore_index,
        TAUGHT=rows.taught, NORMALIZE=bool(rows.normalize), RAW_KEYS=raw, SAME=momentum is keys,
        BLOCK_N=_ROWS, TILE=_TILE, TILES=tiles, **_widths(d),
    )  # fmt: skip
    if copied:
        same = momentum is keys
        keys = copies[0] if keys.dtype == torch.float16 else keys
        momentum = keys if same else copies[1] if momentum.dtype == torch.float16 else momentum
    return _Ready(ready_query, ready_momentum, sizes, keys, momentum, labels, flags, inverse, raw)


def _attend(
    rows: _Rows, part: _Ready, plan: Tiling, span: "_Span", first: int, found: _Splits, count: Tensor,
    *, inside: bool, logit: bool,
) -> None:  # fmt: skip
    """All kinds of attention over one part of the keys."""
    n, d = rows.query.shape
    same = part.momentum is part.keys
    tma, (key_tiles, momentum_tiles) = _tiles(plan.block_k, part.keys, part.momentum)
    kernels.attend[(-(-n // plan.block_q), span.splits, 1 + rows.taught + inside)](
        part.query, part.momentum_query, part.sizes, rows.labels,
        part.keys, key_tiles, part.keys.stride(0), part.inverse[0],
        part.momentum, momentum_tiles, part.momentum.stride(0), part.inverse[-1 if part.scaled and not same else 0],
        part.labels, part.flags, *found, count, n, len(part.keys), span.keys, first, found.lse.shape[1],
        rows.ignore_index,
        TAUGHT=rows.taught, INSIDE=inside, SAME=same, LOGIT=logit, SCALED=part.scaled, TMA=tma,
        MASKED_K=plan.masked_k, **_loop(plan), **_widths(d),
    )  # fmt: skip


def _sum_classes(
    rows: _Rows, part: _Ready, plan: Tiling, span: "_Span", first: int, sums: Tensor, count: Tensor
) -> None:
    """Sums of the positive keys of one part."""
    n, d = rows.query.shape
    tma, (key_tiles,) = _tiles(plan.block_k, part.keys)
    kernels.sum_classes[(-(-n // plan.block_q), span.splits)](
        rows.labels, rows.first, part.keys, key_tiles, part.keys.stride(0), part.inverse[0], part.labels, part.flags,
        sums, count, n, len(part.keys), span.keys, first, rows.ignore_index,
        SCALED=part.scaled, TMA=tma, **_loop(plan), **_widths(d),
    )  # fmt: skip


def _loop(plan: Tiling) -> dict[str, Any]:
    """What kernels that go through the keys are compiled for."""
    sizes = {"BLOCK_Q": plan.block_q, "BLOCK_K": plan.block_k, "TILE": _TILE}
    how = {"INTERPRETED": not isinstance(kernels._product, triton.JITFunction)}
    return sizes | how | {"num_warps": plan.num_warps, "num_stages": plan.num_stages}


def _widths(d: int) -> dict[str, int]:
    return {"WIDTH": d, "BLOCK_D": max(16, 1 << (d - 1).bit_length())}  # tl.dot wants at least 16


def _number(x: float | Tensor) -> float | Tensor:
    """As kernels take it: the integer 1 would be part of the code."""
    return x if isinstance(x, Tensor) else float(x)


# --------------------------------------------------------------------------------------------------------------------
# Launch parameters
# --------------------------------------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """How one part of the keys is cut."""

    keys: int  # of a split, whole tiles
    splits: int


def tilings(n: int, part: Part, gpu: int) -> tuple[Tiling, Tiling]:
    """Of `attend`, and of `sum_classes`."""
    width = max(x.element_size() for x in (part.keys, part.momentum) if x is not None)
    few, many, classes = _TILINGS[width, gpu]
    return few if n <= few.block_q else many, classes


def _cut(
    n: int, d: int, count: int, plan: Tiling, kinds: int, share: int, *, num_sms: int, num_splits: int | None
) -> _Span:
    """As many splits as fill the chip at once: a program that waits for another to end doubles the time."""
    if num_splits is None:
        programs = num_sms * (_WARPS_PER_SM // plan.num_warps)
        num_splits = min(
            programs // (-(-n // plan.block_q) * kinds), count // _MIN_KEYS_PER_SPLIT,
            _MAX_SPLIT_BYTES // (4 * n * d * kinds * share),
        )  # fmt: skip
    keys = _TILE * -(-count // (_TILE * max(1, num_splits)))
    return _Span(keys, -(-count // keys))


def _tiles(block_k: int, *matrices: Tensor) -> tuple[bool, list[Any]]:
    """Tensor descriptors of keys, or themselves where not all can have one."""
    wanted = generation(matrices[0].device) > 8 and matrices[0].numel() >= _MIN_TMA_NUMBERS if TMA is None else TMA
    fit = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in matrices)
    if not (wanted and fit):
        return False, list(matrices)
    return True, [
        _descriptors.TensorDescriptor.from_tensor(x, [block_k, _widths(x.shape[1])["BLOCK_D"]]) for x in matrices
    ]


@functools.cache
def generation(device: torch.device) -> int:
    """9 or 10 where a GPU has the shared memory, the tensor cores and the copy engine of Hopper or a B200, else 8."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return major if major in (9, 10) else 8
