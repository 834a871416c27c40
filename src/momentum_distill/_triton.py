r"""The contrastive statistics of :mod:`momentum_distill._streaming` as one fused GPU kernel, where Triton is installed.

For a query $q$ with logits $s_j = \text{scale}\; q^\top k_j$ over the present keys, attention with the keys as values
gives $\mathrm{lse} = \log\sum_j e^{s_j}$ and $O = \sum_j V_j k_j$, $V = \mathrm{softmax}(s)$. The momentum side is a
second attention with weights $U$ from $q'$ and $k'$ over the *same* values. Both run in one pass over the keys.

**Two launches** per call of :func:`attend`, one if the keys are not split:

1. `_attend_kernel`, over (blocks of queries) x (splits of the keys) x (slices of the output columns). A batch has few
   queries, 512 of them fill 8 of the 132 multiprocessors of an H100, so the keys are cut into as many splits as fill
   the chip. Each program goes through the keys of its split with a running maximum (online softmax).
2. `_merge_kernel` weighs the splits of a row by their share $e^{\mathrm{lse}_\text{split} - \mathrm{lse}}$.

Nothing of size N x Q is ever stored, nothing is added atomically (equal inputs give equal bits) and the host never
waits for the device: `scale` stays a tensor.

**Precision.** 16-bit keys are multiplied on the tensor cores: queries and softmax weights are rounded to the dtype of
the keys they meet, products are summed in float32. float32 keys are multiplied in full float32.

**Absent keys** are not loaded at all, so what they hold cannot reach a sum (0 * NaN is NaN). A NaN in a present key
makes every row NaN, a NaN in a query its own row.
"""

# Triton reads the annotation `constexpr` as text; without Triton nothing may look it up.
from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import describe, wrong_type


def _import(name: str) -> Any:  # noqa: ANN401 - a module without stubs, or None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# Triton is optional, and has no stubs.
triton = _import("triton")
tl = _import("triton.language")

# What the arguments of a kernel are. To Triton all but `constexpr` is a `tl.tensor`, a value of the running kernel; a
# block is a tile of numbers that the threads of one program hold together.
if TYPE_CHECKING:
    Pointer: TypeAlias = Any
    Block: TypeAlias = Any
    Scalar: TypeAlias = Any
    constexpr: TypeAlias = Any
elif triton is not None:
    Pointer = Block = Scalar = tl.tensor
    constexpr = tl.constexpr

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class KeyStatistics(NamedTuple):
    """What the loss needs to know of a part of the keys, one row per query, float32; None: not asked for."""

    lse: Tensor
    """Log-sum-exp of the logits over the present keys, -inf where there is none, shape `(N,)`."""
    mean_key: Tensor
    r"""$O = \sum_j V_j k_j$, 0 where there is no key, shape `(N, d)`."""
    momentum_lse: Tensor | None = None
    """The same of the momentum logits, shape `(N,)`."""
    momentum_mean_key: Tensor | None = None
    r"""$\sum_j U_j k_j$: momentum weights, online keys, shape `(N, d)`."""
    momentum_mean_logit: Tensor | None = None
    r"""$\sum_j U_j s'_j$, shape `(N,)`."""
    positive_lse: Tensor | None = None
    """`lse` over the positive keys alone, shape `(N,)`."""
    positive_mean_key: Tensor | None = None
    """`mean_key` over the positive keys alone, shape `(N, d)`."""


def available() -> bool:
    """Whether Triton can be imported. Says nothing about a GPU."""
    return triton is not None


# --------------------------------------------------------------------------------------------------------------------
# Launch parameters: all of them, in one place. Not yet measured on a GPU: chosen by the registers and the shared memory
# that Triton 3.7 reports when it compiles for compute capability 8.0 and 9.0.
# --------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one call is cut into programs."""

    block_q: int
    """Queries of a program."""
    block_k: int
    """Keys per step of its loop."""
    block_d: int
    """Output columns of a program: its float32 accumulators have `block_q * block_d` numbers each, in registers."""
    chunk: int
    """Features per step of the dot products that make the logits."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline: how many steps' loads are in flight, in shared memory."""
    num_splits: int
    keys_per_split: int


# Widest d, then (block_q, block_k, block_d, chunk, num_warps, num_stages). Up to d = 128 a program holds whole rows: a
# tile of keys is loaded once and serves the logits and the means. Beyond, tiles of whole rows would not leave room in
# shared memory, so logits sum over chunks of 64 features and the tile of values is a second load (a hit in the cache).
# Two accumulators of block_q * block_d = 16,384 numbers over 256 threads take 128 of the 255 registers of a thread:
# hence fewer queries for wider rows, and beyond 512 columns slices, which all compute the logits anew: at d = 1024
# twice, which is 1.5 times the arithmetic.
_TABLE_16_BIT = (
    (64, (64, 64, 64, 64, 4, 2)),
    (128, (64, 64, 128, 128, 8, 2)),
    (256, (64, 32, 256, 64, 8, 2)),
    (None, (32, 32, 512, 64, 8, 2)),
)
# Full float32 products run on the ordinary cores, whose operands live in registers over the whole summed length: both
# summed lengths, `chunk` and `block_k`, are short.
_TABLE_32_BIT = (
    (64, (32, 16, 64, 16, 4, 1)),
    (None, (32, 16, 128, 16, 8, 1)),
)
# "tf32x3" would use the tensor cores and lose perhaps one digit: to be measured.
_FLOAT32_PRODUCTS = "ieee"
# With these blocks the compiler takes 180 to 255 registers a thread: a multiprocessor holds 8 such warps at once.
_WARPS_PER_SM = 8
# Below this many keys a split is not worth its start and its share of the merge.
_MIN_KEYS_PER_SPLIT = 512
# Unmerged results of all splits together, float32.
_MAX_PART_BYTES = 16 * 2**20
# _merge_kernel: small programs, as it is all memory traffic.
_MERGE_ROWS, _MERGE_COLUMNS, _MERGE_WARPS = 8, 128, 4


def _plan(
    n: int, q: int, d: int, dtype: torch.dtype, *, kinds: int, num_sms: int, num_splits: int | None = None
) -> Plan:
    """The launch parameters for `n` queries and `q` keys of width `d`; `num_splits` overrides the number of splits."""
    table = _TABLE_32_BIT if dtype == torch.float32 else _TABLE_16_BIT
    block_q, block_k, block_d, chunk, num_warps, num_stages = next(
        row for widest, row in table if widest is None or d <= widest
    )
    if kinds == 3 and block_q * block_d == 16_384:
        block_q //= 2  # three accumulators
    block_d = min(block_d, max(16, 1 << (d - 1).bit_length()))  # tl.dot wants at least 16
    chunk = min(chunk, block_d)
    if num_splits is None:
        programs = -(-n // block_q) * -(-d // block_d)
        num_splits = min(
            num_sms * (_WARPS_PER_SM // num_warps) // max(1, programs),  # one wave of programs, none left over
            q // _MIN_KEYS_PER_SPLIT,
            _MAX_PART_BYTES // (4 * kinds * n * (d + 1)),
        )
    keys_per_split = block_k * -(-q // (block_k * max(1, num_splits)))
    return Plan(block_q, block_k, block_d, chunk, num_warps, num_stages, -(-q // keys_per_split), keys_per_split)


# --------------------------------------------------------------------------------------------------------------------
# Kernels. Letters as everywhere: N queries, Q keys, d features (here WIDTH); blocks are (BLOCK_Q, BLOCK_K, BLOCK_D).
# --------------------------------------------------------------------------------------------------------------------


def _jit(*plain_numbers: str) -> Callable[[Callable[..., object]], Any]:
    """`triton.jit`, or nothing where there is no Triton. `plain_numbers`: arguments that never cause a compilation."""
    if triton is None:
        return lambda kernel: kernel
    decorator: Callable[[Callable[..., object]], Any] = triton.jit(do_not_specialize=plain_numbers)
    return decorator


@_jit()
def _load_rows(matrix: Pointer, stride: Scalar, rows: Block, rows_ok: Block, columns: Block, WIDTH: constexpr) -> Block:
    """The given rows and columns of a matrix; 0 where `rows_ok` is False, nothing is read there, and beyond `WIDTH`."""
    at = matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=rows_ok[:, None] & (columns < WIDTH)[None, :], other=0.0)


@_jit()
def _dot(a: Block, b: Block, total: Block, PRODUCTS: constexpr, INTERPRETED: constexpr) -> Block:
    """`total + a @ b`, summed in float32."""
    if INTERPRETED:  # Triton's interpreter cannot multiply bfloat16. Rounded numbers have exact products in float32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRODUCTS)


@_jit()
def _dot_in_chunks(
    query: Pointer,
    rows: Block,
    rows_ok: Block,
    keys: Pointer,
    key_stride: Scalar,
    key_rows: Block,
    keys_ok: Block,
    WIDTH: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_K: constexpr,
    CHUNK: constexpr,
    PRODUCTS: constexpr,
    INTERPRETED: constexpr,
) -> Block:
    """Dot products of a block of queries and one of keys, (BLOCK_Q, BLOCK_K), a chunk of the features at a time."""
    dots = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        k = _load_rows(keys, key_stride, key_rows, keys_ok, columns, WIDTH)  # (BLOCK_K, CHUNK)
        q = _load_rows(query, WIDTH, rows, rows_ok, columns, WIDTH).to(k.dtype)  # (BLOCK_Q, CHUNK)
        dots = _dot(q, tl.trans(k), dots, PRODUCTS, INTERPRETED)
    return dots


@_jit()
def _online_softmax(dots: Block, top: Block, log2_scale: Scalar, SHIFT: constexpr) -> tuple[Block, Block, Block]:
    """Weights of a new block of keys under a running maximum.

    Takes `dots` (BLOCK_Q, BLOCK_K), -inf for keys that do not count, and the largest so far, `top` (BLOCK_Q,). Returns
    the new `top`, the factor by which everything summed so far shrinks, and the weights, 2**SHIFT for the largest.
    Subtracting before scaling costs an operation more than a fused multiply-add, and keeps the digits.
    """
    new_top = tl.maximum(top, tl.max(dots, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: -inf - -inf would be NaN
    shrink = tl.exp2((top - base) * log2_scale)
    weights = tl.exp2((dots - base[:, None]) * log2_scale + SHIFT)
    return new_top, shrink, weights


@_jit()
def _store_part(
    lse: Pointer,
    mean: Pointer,
    part: Scalar,
    N: Scalar,
    rows: Block,
    rows_ok: Block,
    columns: Block,
    first_slice: Scalar,
    top: Block,
    total: Block,
    weighted: Block,
    scale: Scalar,
    SHIFT: constexpr,
    WIDTH: constexpr,
) -> None:
    """Write log-sum-exp and mean of one part, a (kind, split): rows `part * N + rows` of the unmerged results."""
    at = part.to(tl.int64) * N + rows
    safe = tl.where(total == 0.0, 1.0, total)  # no key: lse -inf (as `top` is), mean 0
    value = top * scale + (tl.log2(safe) - SHIFT) * 0.6931471805599453  # log 2
    tl.store(lse + at, value, mask=rows_ok & first_slice)
    ok = rows_ok[:, None] & (columns < WIDTH)[None, :]
    tl.store(mean + at[:, None] * WIDTH + columns[None, :], weighted / safe[:, None], mask=ok)


@_jit("N", "Q", "keys_per_split")
def _attend_kernel(
    query: Pointer,  # (N, d), contiguous
    keys: Pointer,  # (Q, d)
    key_stride: Scalar,
    momentum_query: Pointer,  # (N, d), contiguous
    momentum_keys: Pointer,  # (Q, d)
    momentum_key_stride: Scalar,
    scale: Pointer,  # ()
    momentum_scale: Pointer,  # ()
    present: Pointer,  # (Q,) bool
    query_labels: Pointer,  # (N,)
    key_labels: Pointer,  # (Q,)
    lse: Pointer,  # out: (kinds, splits, N); kinds are student, then momentum, then positive, those asked for
    mean: Pointer,  # out: (kinds, splits, N, d)
    mean_logit: Pointer,  # out: (splits, N)
    N: Scalar,
    Q: Scalar,
    keys_per_split: Scalar,
    WIDTH: constexpr,
    MOMENTUM: constexpr,
    SAME_KEYS: constexpr,
    POSITIVE: constexpr,
    MASKED: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_K: constexpr,
    BLOCK_D: constexpr,
    CHUNK: constexpr,
    PRODUCTS: constexpr,
    INTERPRETED: constexpr,
) -> None:
    """One block of queries against one split of the keys; one slice of the output columns."""
    # Neighbouring programs differ in the queries: they run at the same time and share the keys in the cache.
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows_ok = rows < N
    columns = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    first_slice = tl.program_id(2) == 0

    log2_scale = tl.load(scale).to(tl.float32) * 1.4426950408889634  # log2 e: the hardware's exponential is base 2
    # In float16 a weight below 3e-8 is 0, and a long queue has many of these: let the largest weight be 2**14, not 1.
    SHIFT: constexpr = 14.0 if keys.dtype.element_ty == tl.float16 else 0.0

    # Rows that fit are loaded once, before the loop. `.to`: both sides of a tensor-core product have one dtype.
    WHOLE: constexpr = CHUNK >= WIDTH
    if WHOLE:
        q = _load_rows(query, WIDTH, rows, rows_ok, columns, WIDTH).to(keys.dtype.element_ty)  # (BLOCK_Q, BLOCK_D)

    # What is kept of the keys seen so far: largest dot product, sum of weights, weighted sum of keys.
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if MOMENTUM:
        momentum_log2_scale = tl.load(momentum_scale).to(tl.float32) * 1.4426950408889634
        momentum_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        momentum_total = tl.zeros((BLOCK_Q,), tl.float32)
        momentum_weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        momentum_dots_sum = tl.zeros((BLOCK_Q,), tl.float32)
        if WHOLE:
            mq = _load_rows(momentum_query, WIDTH, rows, rows_ok, columns, WIDTH).to(momentum_keys.dtype.element_ty)
    if POSITIVE:
        row_labels = tl.load(query_labels + rows, mask=rows_ok, other=-1)
        positive_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        positive_total = tl.zeros((BLOCK_Q,), tl.float32)
        positive_weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)

    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, Q)
    for start in range(first, last, BLOCK_K):
        key_rows = start + tl.arange(0, BLOCK_K)
        keys_ok = key_rows < last
        if MASKED:
            keys_ok = keys_ok & (tl.load(present + key_rows, mask=keys_ok, other=0) != 0)
        values = _load_rows(keys, key_stride, key_rows, keys_ok, columns, WIDTH)  # (BLOCK_K, BLOCK_D)

        # Student: V and sum_j V_j k_j.
        if WHOLE:
            dots = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
            dots = _dot(q, tl.trans(values), dots, PRODUCTS, INTERPRETED)
        else:
            dots = _dot_in_chunks(
                query, rows, rows_ok, keys, key_stride, key_rows, keys_ok,
                WIDTH, BLOCK_Q, BLOCK_K, CHUNK, PRODUCTS, INTERPRETED,
            )  # fmt: skip
        dots = tl.where(keys_ok[None, :], dots, float("-inf"))  # (BLOCK_Q, BLOCK_K)
        top, shrink, weights = _online_softmax(dots, top, log2_scale, SHIFT)
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = _dot(weights.to(values.dtype), values, weighted * shrink[:, None], PRODUCTS, INTERPRETED)

        # The same over the positive keys: equal labels, and a label at all.
        if POSITIVE:
            column_labels = tl.load(key_labels + key_rows, mask=keys_ok, other=-1)
            positive = (row_labels[:, None] == column_labels[None, :]) & (column_labels >= 0)[None, :]
            positive_dots = tl.where(positive, dots, float("-inf"))
            positive_top, shrink, weights = _online_softmax(positive_dots, positive_top, log2_scale, SHIFT)
            positive_total = positive_total * shrink + tl.sum(weights, axis=1)
            positive_weighted = _dot(
                weights.to(values.dtype), values, positive_weighted * shrink[:, None], PRODUCTS, INTERPRETED
            )

        # Momentum: U from the momentum rows, sum_j U_j k_j over the online keys, and the mean of its own logits.
        if MOMENTUM:
            if WHOLE:
                if SAME_KEYS:
                    mk = values
                else:
                    mk = _load_rows(momentum_keys, momentum_key_stride, key_rows, keys_ok, columns, WIDTH)
                dots = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                dots = _dot(mq, tl.trans(mk), dots, PRODUCTS, INTERPRETED)
            else:
                dots = _dot_in_chunks(
                    momentum_query, rows, rows_ok, momentum_keys, momentum_key_stride, key_rows, keys_ok,
                    WIDTH, BLOCK_Q, BLOCK_K, CHUNK, PRODUCTS, INTERPRETED,
                )  # fmt: skip
            masked_dots = tl.where(keys_ok[None, :], dots, float("-inf"))
            momentum_top, shrink, weights = _online_softmax(masked_dots, momentum_top, momentum_log2_scale, SHIFT)
            momentum_total = momentum_total * shrink + tl.sum(weights, axis=1)
            # `dots`, not `masked_dots`: absent keys have dot product 0 here, and 0 * -inf is NaN.
            momentum_dots_sum = momentum_dots_sum * shrink + tl.sum(weights * dots, axis=1)
            momentum_weighted = _dot(
                weights.to(values.dtype), values, momentum_weighted * shrink[:, None], PRODUCTS, INTERPRETED
            )

    _store_part(
        lse, mean, split, N, rows, rows_ok, columns, first_slice,
        top, total, weighted, tl.load(scale).to(tl.float32), SHIFT, WIDTH,
    )  # fmt: skip
    if MOMENTUM:
        logit_scale = tl.load(momentum_scale).to(tl.float32)
        _store_part(
            lse, mean, splits + split, N, rows, rows_ok, columns, first_slice,
            momentum_top, momentum_total, momentum_weighted, logit_scale, SHIFT, WIDTH,
        )  # fmt: skip
        safe = tl.where(momentum_total == 0.0, 1.0, momentum_total)
        at = split.to(tl.int64) * N + rows
        tl.store(mean_logit + at, momentum_dots_sum / safe * logit_scale, mask=rows_ok & first_slice)
    if POSITIVE:
        _store_part(
            lse, mean, (1 + MOMENTUM) * splits + split, N, rows, rows_ok, columns, first_slice,
            positive_top, positive_total, positive_weighted, tl.load(scale).to(tl.float32), SHIFT, WIDTH,
        )  # fmt: skip


@_jit("N", "splits")
def _merge_kernel(
    part_lse: Pointer,  # (kinds, splits, N)
    part_mean: Pointer,  # (kinds, splits, N, d)
    part_mean_logit: Pointer,  # (splits, N)
    lse: Pointer,  # out: (kinds, N)
    mean: Pointer,  # out: (kinds, N, d)
    mean_logit: Pointer,  # out: (N,)
    N: Scalar,
    splits: Scalar,
    WIDTH: constexpr,
    MOMENTUM: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """Some rows and columns of one kind, over all splits: the mean of means by the weights exp(lse_split - lse)."""
    kind = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows_ok = rows < N
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = rows_ok[:, None] & (columns < WIDTH)[None, :]

    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(part_lse + (kind * splits + split) * N + rows, mask=rows_ok, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)

    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    logits = tl.zeros((BLOCK_Q,), tl.float32)
    for split in range(splits):
        at = (kind * splits + split) * N + rows
        weight = tl.exp(tl.load(part_lse + at, mask=rows_ok, other=float("-inf")) - base)  # 0: a split without keys
        total += weight
        weighted += weight[:, None] * tl.load(part_mean + at[:, None] * WIDTH + columns[None, :], mask=ok, other=0.0)
        if MOMENTUM:
            logit_at = part_mean_logit + (at - splits.to(tl.int64) * N)
            logits += weight * tl.load(logit_at, mask=rows_ok & (kind == 1), other=0.0)

    safe = tl.where(total == 0.0, 1.0, total)
    at = kind * N + rows
    first_slice = tl.program_id(1) == 0
    tl.store(lse + at, top + tl.log(safe), mask=rows_ok & first_slice)
    tl.store(mean + at[:, None] * WIDTH + columns[None, :], weighted / safe[:, None], mask=ok)
    if MOMENTUM:
        tl.store(mean_logit + rows, logits / safe, mask=rows_ok & first_slice & (kind == 1))


# --------------------------------------------------------------------------------------------------------------------
# The call
# --------------------------------------------------------------------------------------------------------------------


def attend(
    query: Tensor,
    keys: Tensor,
    present: Tensor | None,
    *,
    scale: Tensor,
    momentum_query: Tensor | None = None,
    momentum_keys: Tensor | None = None,
    momentum_scale: Tensor | None = None,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    num_splits: int | None = None,
) -> KeyStatistics:
    """KeyStatistics of one part of the keys, forward only: two launches (see the top of this file), one without splits.

    The caller has checked shapes and devices. All tensors are on one device, and rows are used as they come: normalise
    before. Dtypes may differ between arguments. A query is rounded to the dtype of the keys it meets.

    Args:
        query: Queries, float32, bfloat16 or float16, shape `(N, d)`.
        keys: Keys, one of the same dtypes, shape `(Q, d)`.
        present: Which keys count, bool, shape `(Q,)`; None: all. The others are not read.
        scale: Positive factor of the dot products, one over the temperature, shape `()`.
        momentum_query: Queries of the momentum model, shape `(N, d)`; with the next two or not at all.
        momentum_keys: Keys of the momentum model, shape `(Q, d)`. The memory of `keys` itself is read once.
        momentum_scale: Factor of the momentum dot products, shape `()`.
        query_labels: Integers, shape `(N,)`; with `key_labels`, asks for the statistics of the positive keys too.
        key_labels: Integers, shape `(Q,)`. Positive for a query: the same label, not negative.
        num_splits: Into how many splits to cut the keys, about; by default as many as fill the GPU.

    Returns:
        The statistics, float32.

    Raises:
        RuntimeError: If Triton is not installed.
        TypeError: If features have another dtype.
    """
    if triton is None:
        raise RuntimeError("attend: expected Triton to be installed, got an ImportError; `pip install triton`")
    momentum = momentum_query is not None and momentum_keys is not None
    positive = query_labels is not None and key_labels is not None
    features = {"query": query, "keys": keys, "momentum_query": momentum_query, "momentum_keys": momentum_keys}
    for name, x in features.items():
        if x is not None and x.dtype not in DTYPES:
            wrong_type(name, "float32, bfloat16 or float16", describe(x))

    n, d = query.shape
    q = keys.shape[0]
    kinds = 1 + momentum + positive
    lse = query.new_full((kinds, n), -torch.inf, dtype=torch.float32)
    mean = query.new_zeros((kinds, n, d), dtype=torch.float32)
    mean_logit = query.new_zeros(n, dtype=torch.float32) if momentum else None
    if n == 0 or q == 0:
        return _statistics(lse, mean, mean_logit, positive)

    query = query.contiguous()
    keys = _rows_contiguous(keys)
    if momentum_query is not None and momentum_keys is not None:
        momentum_query = momentum_query.contiguous()
        momentum_keys = _rows_contiguous(momentum_keys)
    same_keys = momentum_keys is not None and _same_memory(keys, momentum_keys)
    plan = _plan(n, q, d, keys.dtype, kinds=kinds, num_sms=_num_sms(query.device), num_splits=num_splits)
    splits = plan.num_splits
    slices = max(1, triton.cdiv(d, plan.block_d))
    if splits == 1:  # nothing to merge: the first kernel writes the results
        part_lse, part_mean, part_mean_logit = lse, mean, mean_logit
    else:
        part_lse = lse.new_empty((kinds, splits, n))
        part_mean = mean.new_empty((kinds, splits, n, d))
        part_mean_logit = lse.new_empty((splits, n)) if momentum else None

    with _current(query.device):
        _attend_kernel[(triton.cdiv(n, plan.block_q), splits, slices)](
            query,
            keys,
            keys.stride(0),
            momentum_query if momentum else None,
            momentum_keys if momentum else None,
            momentum_keys.stride(0) if momentum_keys is not None else 0,
            scale,
            momentum_scale if momentum else None,
            present,
            query_labels if positive else None,
            key_labels if positive else None,
            part_lse,
            part_mean,
            part_mean_logit,
            n,
            q,
            plan.keys_per_split,
            WIDTH=d,
            MOMENTUM=momentum,
            SAME_KEYS=same_keys,
            POSITIVE=positive,
            MASKED=present is not None,
            BLOCK_Q=plan.block_q,
            BLOCK_K=plan.block_k,
            BLOCK_D=plan.block_d,
            CHUNK=plan.chunk,
            PRODUCTS=_FLOAT32_PRODUCTS,
            INTERPRETED=not isinstance(_attend_kernel, triton.JITFunction),
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )
        if splits > 1:
            _merge_kernel[(triton.cdiv(n, _MERGE_ROWS), max(1, triton.cdiv(d, _MERGE_COLUMNS)), kinds)](
                part_lse,
                part_mean,
                part_mean_logit,
                lse,
                mean,
                mean_logit,
                n,
                splits,
                WIDTH=d,
                MOMENTUM=momentum,
                BLOCK_Q=_MERGE_ROWS,
                BLOCK_D=_MERGE_COLUMNS,
                num_warps=_MERGE_WARPS,
            )
    return _statistics(lse, mean, mean_logit, positive)


def _statistics(lse: Tensor, mean: Tensor, mean_logit: Tensor | None, positive: bool) -> KeyStatistics:
    """The kinds by name: student, then momentum, then positive."""
    momentum = mean_logit is not None
    return KeyStatistics(
        lse[0],
        mean[0],
        lse[1] if momentum else None,
        mean[1] if momentum else None,
        mean_logit,
        lse[-1] if positive else None,
        mean[-1] if positive else None,
    )


def _rows_contiguous(x: Tensor) -> Tensor:
    """`x`, or a copy where the numbers of a row are not neighbours in memory; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of the same shape are the same numbers in the same place."""
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype


def _num_sms(device: torch.device) -> int:
    """Multiprocessors of the GPU; any number will do where Triton's interpreter runs on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
