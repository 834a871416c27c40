r"""The statistics of :mod:`momentum_distill._contrast.tiles` as one fused GPU kernel, where Triton is installed.

For a query $q$ with logits $s_j = q^\top k_j$ over the present keys, attention with the keys as values gives
$\mathrm{lse} = \log\sum_j e^{s_j}$ and $O = \sum_j V_j k_j$, $V = \mathrm{softmax}(s)$. The loss wants three kinds
of it, over the *same* values: of the student; over the positive keys, with equal weights or the softmax over them;
and of the momentum model, with weights $U$ from $q'$ and $k'$.

**Launches**: `_first_kernel` and `_merge_kernel` once, `_state_kernel` and `_attend_kernel` for each part of the keys.

1. `_first_kernel` finds for each query the first one of its class: what rows of a class share is made once.
2. `_state_kernel` says which keys count, and whether those that do not hold anything that could reach a sum.
3. `_attend_kernel`, over (blocks of queries) x (splits of the keys) x (kinds and slices of the output columns). A batch
   has few queries, 512 of them make 8 blocks for the 132 multiprocessors of an H100, so the keys are cut into as many
   splits as fill the chip. Each program goes through the keys of its split with a running maximum (online softmax).
4. `_merge_kernel` weighs the splits of a row by their share $e^{\mathrm{lse}_\text{split} - \mathrm{lse}}$.

Raw keys are not normalised into a copy (only those in float16 are): `_normalize_kernel` finds one number for each, by
which its logits and its share are multiplied.

Nothing of size N x Q is ever stored, nothing is added atomically (equal inputs give equal bits) and the host never
waits for the device.

**Precision.** 16-bit keys are multiplied on the tensor cores: queries and softmax weights are rounded to the dtype of
the keys they meet, products are summed in float32. Products of float32 keys are made of three of TF32, which loses
nothing that float32 has. Each query is first divided by a power of two near its largest number, so that none leaves the
range of float16.

**Absent keys** get the logit -inf. Where one holds NaN or huge numbers, absent keys are not even loaded, for a weight
of 0 times NaN is NaN; that is slower, for a load that waits for another cannot begin early. A NaN in a present key
makes every row NaN, a NaN in a query its own row.
"""

# Triton reads the annotation `constexpr` as text; without Triton nothing may look it up.
from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import describe, wrong_type
from momentum_distill._contrast.problem import Part
from momentum_distill._contrast.statistics import LogSum, Statistics
from momentum_distill._rows import shortest


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


def available() -> bool:
    """Whether Triton can be imported. Says nothing about a GPU."""
    return triton is not None


# --------------------------------------------------------------------------------------------------------------------
# Launch parameters: all of them, in one place.
# --------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one call is cut into programs."""

    block_q: int
    """Queries of a program."""
    block_k: int
    """Keys per step of its loop."""
    block_d: int
    """Output columns of a program: its float32 accumulators have `block_q * block_d` numbers, in registers."""
    chunk: int
    """Features per step of the dot products that make the logits."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline: how many steps' loads are in flight, in shared memory."""
    num_splits: int
    keys_per_split: int


# Widest d and the KiB of shared memory that it takes, then block_q, block_k, block_d, chunk, num_warps and num_stages.
# The first that fits is taken; the last of each width fits every GPU since 2020. Up to d = 128 a program holds whole
# rows: a tile of keys is loaded once and serves the logits and the means. Beyond, tiles of whole rows would not leave
# room in shared memory, so logits sum over chunks of features and the tile of values is a second load (a hit in the
# cache). Wide rows are cut into slices of columns, which all compute the logits anew.
_TABLE_16_BIT = (
    (64, 99, (64, 32, 64, 64, 4, 3)),
    (128, 99, (64, 32, 128, 128, 4, 3)),
    (256, 99, (64, 32, 256, 64, 8, 2)),
    (None, 99, (32, 32, 512, 64, 8, 2)),
)
_TABLE_32_BIT = (
    (64, 99, (64, 32, 64, 64, 4, 1)),
    (128, 192, (128, 64, 128, 128, 8, 1)),
    (128, 99, (64, 32, 128, 128, 4, 1)),
    (None, 99, (64, 32, 128, 32, 4, 2)),
)
# Three products of TF32 numbers for one of float32: as exact as the ordinary cores ("ieee"), and three times as fast.
_FLOAT32_PRODUCTS = "tf32x3"
# Warps that run on a multiprocessor at once: the compiler takes up to 255 registers a thread.
_WARPS_PER_SM = 8
# Below this many keys a split is not worth its start and its share of the merge.
_MIN_KEYS_PER_SPLIT = 128
# Unmerged results of all splits together, float32.
_MAX_PART_BYTES = 12 * 2**20
# The other kernels: small programs, as it is all memory traffic.
_MERGE_ROWS, _MERGE_COLUMNS, _MERGE_WARPS = 8, 128, 4
_NORMALIZE_NUMBERS, _NORMALIZE_COLUMNS = 4096, 1024
_FIRST_ROWS = 64


def _plan(
    n: int,
    q: int,
    d: int,
    dtype: torch.dtype,
    *,
    kinds: int,
    inside: bool,
    num_sms: int,
    shared: int,
    parts: int = 1,
    num_splits: int | None = None,
) -> Plan:
    """The launch parameters for `n` queries and `q` keys of width `d`; `num_splits` overrides the number of splits."""
    table = _TABLE_32_BIT if dtype == torch.float32 else _TABLE_16_BIT
    block_q, block_k, block_d, chunk, num_warps, num_stages = next(
        row for widest, needed, row in table if (widest is None or d <= widest) and needed * 1024 <= shared
    )
    block_d = min(block_d, max(16, 1 << (d - 1).bit_length()))  # tl.dot wants at least 16
    chunk = min(chunk, block_d)
    if num_splits is None:
        # All programs at once: one that has to wait for another to end doubles the time. Of equal weights, few blocks
        # of queries have anything to do, mostly one.
        blocks, slices = -(-n // block_q), max(1, -(-d // block_d))
        busy = slices * (blocks * kinds if inside else blocks * (kinds - 1) + 1)
        num_splits = min(
            num_sms * (_WARPS_PER_SM // num_warps) // busy,
            q // _MIN_KEYS_PER_SPLIT,
            _MAX_PART_BYTES // (parts * 4 * kinds * n * (d + 1)),
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
    shrink: Block,
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
        q = _load_rows(query, WIDTH, rows, rows_ok, columns, WIDTH)  # (BLOCK_Q, CHUNK)
        dots = _dot((q * shrink[:, None]).to(k.dtype), tl.trans(k), dots, PRODUCTS, INTERPRETED)
    return dots


@_jit()
def _online_softmax(dots: Block, top: Block, log2_scale: Block, SHIFT: constexpr) -> tuple[Block, Block, Block]:
    """Weights of a new block of keys under a running maximum.

    Takes `dots` (BLOCK_Q, BLOCK_K), -inf for keys that do not count, and the largest so far, `top` (BLOCK_Q,). Returns
    the new `top`, the factor by which everything summed so far shrinks, and the weights, 2**SHIFT for the largest.
    Subtracting before scaling costs an operation more than a fused multiply-add, and keeps the digits.
    """
    new_top = tl.maximum(top, tl.max(dots, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: -inf - -inf would be NaN
    shrink = tl.exp2((top - base) * log2_scale)
    weights = tl.exp2((dots - base[:, None]) * log2_scale[:, None] + SHIFT)
    return new_top, shrink, weights


# The kinds, in the order of their results; kernels, which see no variables, write the numbers.
_STUDENT, _POSITIVE, _MOMENTUM = 0, 1, 2


@_jit()
def _attend_kind(
    query: Pointer,
    keys: Pointer,
    key_stride: Scalar,
    key_scale: Pointer,
    values: Pointer,
    value_stride: Scalar,
    value_scale: Pointer,
    state: Pointer,
    query_labels: Pointer,
    key_labels: Pointer,
    lse: Pointer,
    mean: Pointer,
    mean_logit: Pointer,
    count: Pointer,
    split: Scalar,
    splits: Scalar,
    N: Scalar,
    first: Scalar,
    last: Scalar,
    rows: Block,
    columns: Block,
    first_slice: Scalar,
    WIDTH: constexpr,
    KIND: constexpr,
    EQUAL: constexpr,
    SAME: constexpr,
    GUARDED: constexpr,
    SCALED: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_K: constexpr,
    BLOCK_D: constexpr,
    CHUNK: constexpr,
    PRODUCTS: constexpr,
    INTERPRETED: constexpr,
) -> None:
    """One kind of attention: a block of queries, one split of the keys, one slice of the output columns.

    KIND: 0 the student, 1 the positive keys, 2 the momentum model, whose mean logit is made as well. EQUAL: equal
    weights instead of a softmax, which needs no logits. SAME: `keys` and `values` are the same. GUARDED: absent keys
    are not loaded.
    """
    rows_ok = rows < N
    WHOLE: constexpr = CHUNK >= WIDTH
    # In float16 a weight below 3e-8 is 0, and a long queue has many of these: let the largest weight be 2**14, not 1.
    SHIFT: constexpr = 14.0 if values.dtype.element_ty == tl.float16 and not EQUAL else 0.0

    if not EQUAL:
        # A power of two near the largest magnitude of each query: dividing by it loses nothing.
        if WHOLE:
            q = _load_rows(query, WIDTH, rows, rows_ok, columns, WIDTH)  # (BLOCK_Q, BLOCK_D), once for all keys
            largest = tl.max(tl.abs(q), axis=1)
        else:
            largest = tl.zeros((BLOCK_Q,), tl.float32)
            for start in range(0, WIDTH, CHUNK):
                some = _load_rows(query, WIDTH, rows, rows_ok, start + tl.arange(0, CHUNK), WIDTH)
                largest = tl.maximum(largest, tl.max(tl.abs(some), axis=1))
        size = tl.exp2(tl.floor(tl.log2(largest)))
        size = tl.where(size > 0.0, size, 1.0)
        log2_scale = size * 1.4426950408889634  # log2 e: the hardware's exponential is base 2
        if WHOLE:
            q = (q / size[:, None]).to(keys.dtype.element_ty)  # both sides of a tensor-core product have one dtype
    else:
        size = tl.full((BLOCK_Q,), 1.0, tl.float32)
        log2_scale = size
    if KIND == 1:
        row_labels = tl.load(query_labels + rows, mask=rows_ok, other=-1)

    # What is kept of the keys seen so far: largest dot product, sum of weights, weighted sum of keys.
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    dots_sum = tl.zeros((BLOCK_Q,), tl.float32)  # of the momentum model
    positives = tl.zeros((BLOCK_Q,), tl.int32)

    for start in range(first, last, BLOCK_K):
        key_rows = start + tl.arange(0, BLOCK_K)
        keys_ok = key_rows < last
        absence = tl.load(state + key_rows, mask=keys_ok, other=float("-inf"))  # 0, or -inf of an absent key
        loaded = keys_ok & (absence == 0.0) if GUARDED else keys_ok
        value = _load_rows(values, value_stride, key_rows, loaded, columns, WIDTH)  # (BLOCK_K, BLOCK_D)
        if KIND == 1:  # equal labels, and a label at all
            column_labels = tl.load(key_labels + key_rows, mask=keys_ok, other=-1)
            counted = (column_labels >= 0) & (absence == 0.0)
            counts = (row_labels[:, None] == column_labels[None, :]) & counted[None, :]
            positives += tl.sum(counts.to(tl.int32), axis=1)
        if EQUAL:
            weights = tl.where(counts, 1.0, 0.0)
        else:
            if WHOLE:
                key = value if SAME else _load_rows(keys, key_stride, key_rows, loaded, columns, WIDTH)
                dots = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
                dots = _dot(q, tl.trans(key), dots, PRODUCTS, INTERPRETED)
            else:
                dots = _dot_in_chunks(
                    query, 1.0 / size, rows, rows_ok, keys, key_stride, key_rows, loaded,
                    WIDTH, BLOCK_Q, BLOCK_K, CHUNK, PRODUCTS, INTERPRETED,
                )  # fmt: skip
            if SCALED:
                dots *= tl.load(key_scale + key_rows, mask=loaded, other=0.0)[None, :]
            counting = tl.where(counts, dots, float("-inf")) if KIND == 1 else dots + absence[None, :]
            top, shrink, weights = _online_softmax(counting, top, log2_scale, SHIFT)
            total = total * shrink + tl.sum(weights, axis=1)
            weighted = weighted * shrink[:, None]
            if KIND == 2:
                # `dots`, not `counting`: 0 * -inf is NaN.
                dots_sum = dots_sum * shrink + tl.sum(weights * dots, axis=1)
        if SCALED:
            weights *= tl.load(value_scale + key_rows, mask=loaded, other=0.0)[None, :]
        weighted = _dot(weights.to(value.dtype), value, weighted, PRODUCTS, INTERPRETED)

    if EQUAL:
        total = positives.to(tl.float32)
        top = tl.where(positives > 0, 0.0, float("-inf"))
    safe = tl.where(total == 0.0, 1.0, total)  # no key: lse -inf (as `top` is), mean 0
    at = split.to(tl.int64) * N + rows
    kind_at = (KIND * splits).to(tl.int64) * N + at
    value_of_lse = top * size + (tl.log2(safe) - SHIFT) * 0.6931471805599453  # log 2
    tl.store(lse + kind_at, value_of_lse, mask=rows_ok & first_slice)
    ok = rows_ok[:, None] & (columns < WIDTH)[None, :]
    tl.store(mean + kind_at[:, None] * WIDTH + columns[None, :], weighted / safe[:, None], mask=ok)
    if KIND == 1:
        tl.store(count + at, positives, mask=rows_ok & first_slice)
    if KIND == 2:
        tl.store(mean_logit + at, dots_sum / safe * size, mask=rows_ok & first_slice)


@_jit("N", "Q", "keys_per_split", "first_split", "splits")
def _attend_kernel(
    query: Pointer,  # (N, d), contiguous
    momentum_query: Pointer,  # (N, d), contiguous
    query_labels: Pointer,  # (N,)
    first_rows: Pointer,  # (N,): the first row of the same class
    keys: Pointer,  # (Q, d)
    key_stride: Scalar,
    key_scale: Pointer,  # (Q,): what the keys are to be multiplied by
    momentum_keys: Pointer,  # (Q, d)
    momentum_key_stride: Scalar,
    momentum_key_scale: Pointer,  # (Q,)
    state: Pointer,  # (Q + 1,): 0, or -inf of absent keys; at the end not 0 if these must not be loaded
    key_labels: Pointer,  # (Q,)
    lse: Pointer,  # out: (kinds, splits, N)
    mean: Pointer,  # out: (kinds, splits, N, d)
    mean_logit: Pointer,  # out: (splits, N)
    count: Pointer,  # out: (splits, N)
    N: Scalar,
    Q: Scalar,
    keys_per_split: Scalar,
    first_split: Scalar,  # of this part, among those of all parts
    splits: Scalar,  # of all parts
    WIDTH: constexpr,
    KINDS: constexpr,
    INSIDE: constexpr,
    SAME_KEYS: constexpr,
    SCALED: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_K: constexpr,
    BLOCK_D: constexpr,
    CHUNK: constexpr,
    PRODUCTS: constexpr,
    INTERPRETED: constexpr,
) -> None:
    """One kind, one block of queries against one split of the keys, one slice of the output columns."""
    # Neighbouring programs differ in the queries: they run at the same time and share the keys in the cache.
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    split = first_split + tl.program_id(1)
    first = tl.program_id(1) * keys_per_split
    last = tl.minimum(first + keys_per_split, Q)
    kind = tl.program_id(2) % KINDS
    columns = tl.program_id(2) // KINDS * BLOCK_D + tl.arange(0, BLOCK_D)
    first_slice = tl.program_id(2) < KINDS
    guarded = tl.load(state + Q) != 0.0
    for GUARDED in tl.static_range(2):
        if guarded == (GUARDED == 1):
            if kind == 0:
                _attend_kind(
                    query, keys, key_stride, key_scale, keys, key_stride, key_scale, state, query_labels, key_labels,
                    lse, mean, mean_logit, count, split, splits, N, first, last, rows, columns, first_slice,
                    WIDTH, 0, False, True, GUARDED, SCALED, BLOCK_Q, BLOCK_K, BLOCK_D, CHUNK, PRODUCTS, INTERPRETED,
                )  # fmt: skip
            if kind == 1:
                # Equal weights are shared by a class: blocks of rows that are no class's first have nothing to do.
                firsts = tl.load(first_rows + rows, mask=rows < N, other=-1) == rows
                if INSIDE or tl.max(firsts.to(tl.int32), axis=0) > 0:
                    _attend_kind(
                        query, keys, key_stride, key_scale, keys, key_stride, key_scale, state, query_labels,
                        key_labels,
                        lse, mean, mean_logit, count, split, splits, N, first, last, rows, columns, first_slice,
                        WIDTH, 1, not INSIDE, True, GUARDED, SCALED, BLOCK_Q, BLOCK_K, BLOCK_D, CHUNK, PRODUCTS,
                        INTERPRETED,
                    )  # fmt: skip
            if KINDS == 3:  # noqa: SIM102 - one is known when the kernel is compiled, the other when it runs
                if kind == 2:
                    _attend_kind(
                        momentum_query, momentum_keys, momentum_key_stride, momentum_key_scale, keys, key_stride,
                        key_scale, state, query_labels, key_labels,
                        lse, mean, mean_logit, count, split, splits, N, first, last, rows, columns, first_slice,
                        WIDTH, 2, False, SAME_KEYS, GUARDED, SCALED, BLOCK_Q, BLOCK_K, BLOCK_D, CHUNK, PRODUCTS,
                        INTERPRETED,
                    )  # fmt: skip


@_jit("N")
def _first_kernel(labels: Pointer, first: Pointer, N: Scalar, BLOCK: constexpr, INSIDE: constexpr) -> None:
    """For each row the first one of the same class, (N,); itself if it has no class, or with INSIDE."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = rows
    if not INSIDE:
        own = tl.load(labels + rows, mask=rows < N, other=-1)
        for start in range(0, N, BLOCK):
            others = start + tl.arange(0, BLOCK)
            theirs = tl.load(labels + others, mask=others < N, other=-1)
            same = (own[:, None] == theirs[None, :]) & (theirs >= 0)[None, :]
            found = tl.minimum(found, tl.min(tl.where(same, others[None, :], N), axis=1))
    tl.store(first + rows, found, mask=rows < N)


@_jit("Q")
def _state_kernel(
    present: Pointer,  # (Q,) bool
    keys: Pointer,
    key_stride: Scalar,
    momentum_keys: Pointer,
    momentum_key_stride: Scalar,
    state: Pointer,  # out: (Q + 1,), zeros; as in _attend_kernel
    Q: Scalar,
    WIDTH: constexpr,
    SAME_KEYS: constexpr,
    BLOCK_K: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """0 for keys that count, -inf for the others, of which those are read."""
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    absent = (rows < Q) & (tl.load(present + rows, mask=rows < Q, other=1) == 0)
    tl.store(state + rows, tl.where(absent, float("-inf"), 0.0), mask=rows < Q)
    if tl.max(absent.to(tl.int32), axis=0) > 0:
        harmless = tl.full((BLOCK_K,), 1, tl.int1)
        for start in range(0, WIDTH, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            x = _load_rows(keys, key_stride, rows, absent, columns, WIDTH).to(tl.float32)
            harmless = harmless & (tl.sum((tl.abs(x) < 1e15).to(tl.int32), axis=1) == BLOCK_D)
            if not SAME_KEYS:
                x = _load_rows(momentum_keys, momentum_key_stride, rows, absent, columns, WIDTH).to(tl.float32)
                harmless = harmless & (tl.sum((tl.abs(x) < 1e15).to(tl.int32), axis=1) == BLOCK_D)
        if tl.min(harmless.to(tl.int32), axis=0) == 0:
            tl.store(state + Q, 1.0)  # every program that writes it writes the same


@_jit("N", "splits")
def _merge_kernel(
    part_lse: Pointer,  # (kinds, splits, N)
    part_mean: Pointer,  # (kinds, splits, N, d)
    part_mean_logit: Pointer,  # (splits, N)
    part_count: Pointer,  # (splits, N)
    first_rows: Pointer,  # (N,): where the positive keys' share of each row stands
    lse: Pointer,  # out: (kinds, N)
    mean: Pointer,  # out: (kinds, N, d)
    mean_logit: Pointer,  # out: (N,)
    count: Pointer,  # out: (N,)
    N: Scalar,
    splits: Scalar,
    WIDTH: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """Some rows and columns of one kind, over all splits: the mean of means by the weights exp(lse_split - lse)."""
    kind = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows_ok = rows < N
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = rows_ok[:, None] & (columns < WIDTH)[None, :]
    source = tl.load(first_rows + rows, mask=rows_ok & (kind == 1), other=0)
    source = tl.where(kind == 1, source, rows)

    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for split in range(splits):
        at = (kind * splits + split) * N + source
        top = tl.maximum(top, tl.load(part_lse + at, mask=rows_ok, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)

    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    logits = tl.zeros((BLOCK_Q,), tl.float32)
    counts = tl.zeros((BLOCK_Q,), tl.int64)
    for split in range(splits):
        at = (kind * splits + split) * N + source
        weight = tl.exp(tl.load(part_lse + at, mask=rows_ok, other=float("-inf")) - base)  # 0: a split without keys
        total += weight
        weighted += weight[:, None] * tl.load(part_mean + at[:, None] * WIDTH + columns[None, :], mask=ok, other=0.0)
        split_at = split * N + source
        logits += weight * tl.load(part_mean_logit + split_at, mask=rows_ok & (kind == 2), other=0.0)
        counts += tl.load(part_count + split_at, mask=rows_ok & (kind == 1), other=0)

    safe = tl.where(total == 0.0, 1.0, total)
    at = kind * N + rows
    rows_ok = rows_ok & (tl.program_id(1) == 0)
    tl.store(lse + at, tl.where(total == 0.0, 0.0, top + tl.log(safe)), mask=rows_ok)
    tl.store(mean + at[:, None] * WIDTH + columns[None, :], weighted / safe[:, None], mask=ok)
    tl.store(mean_logit + rows, logits / safe, mask=rows_ok & (kind == 2))
    tl.store(count + rows, counts, mask=rows_ok & (kind == 1))


@_jit("N")
def _normalize_kernel(
    raw: Pointer,  # (N, d)
    stride: Scalar,
    lengths: Pointer,  # out: (N,), or with INVERSE one over them
    unit: Pointer,  # out: (N, d), without INVERSE
    N: Scalar,
    shortest: Scalar,
    WIDTH: constexpr,
    INVERSE: constexpr,
    BLOCK_N: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """Lengths of rows, infinite for a row in which no magnitude reaches `shortest`; and the rows divided by them."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_ok = rows < N
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        x = _load_rows(raw, stride, rows, rows_ok, start + tl.arange(0, BLOCK_D), WIDTH).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    by = tl.where(largest == 0.0, 1.0, largest)  # so that squares neither overflow nor underflow
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        x = _load_rows(raw, stride, rows, rows_ok, start + tl.arange(0, BLOCK_D), WIDTH).to(tl.float32) / by[:, None]
        squares += tl.sum(x * x, axis=1)
    length = tl.where(largest < shortest, float("inf"), by * tl.sqrt_rn(squares))
    if INVERSE:
        tl.store(lengths + rows, 1.0 / length, mask=rows_ok)
    else:
        tl.store(lengths + rows, length, mask=rows_ok)
        for start in range(0, WIDTH, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            x = _load_rows(raw, stride, rows, rows_ok, columns, WIDTH).to(tl.float32)
            at = unit + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            tl.store(
                at, tl.div_rn(x, length[:, None] + tl.zeros_like(x)), mask=rows_ok[:, None] & (columns < WIDTH)[None, :]
            )


# --------------------------------------------------------------------------------------------------------------------
# The calls
# --------------------------------------------------------------------------------------------------------------------


def attend(
    query: Tensor,
    query_labels: Tensor,
    parts: Sequence[Part],
    *,
    momentum_query: Tensor | None = None,
    inside: bool = False,
    num_splits: int | None = None,
) -> Statistics:
    """The statistics of all parts of the keys, forward only: a launch for each part, and one for the merge.

    The caller has checked shapes and devices; all tensors are on one device. A query is rounded to the dtype of the
    keys it meets.

    Args:
        query: Queries, divided by the temperature, float32, shape `(N, d)`.
        query_labels: int64, shape `(N,)`. Positive for a query: a present key of the same label, not negative.
        parts: The keys, in float32, bfloat16 or float16; dtypes may differ.
        momentum_query: Queries of the momentum model, float32, shape `(N, d)`; then every part has momentum keys.
        inside: Whether the positive keys are weighed by the softmax over them; else alike.
        num_splits: Into how many splits to cut each part, about; by default as many as fill the GPU.

    Returns:
        The statistics, float32.

    Raises:
        RuntimeError: If Triton is not installed.
        TypeError: If features have another dtype.
    """
    if triton is None:
        raise RuntimeError("attend: expected Triton to be installed, got an ImportError; `pip install triton`")
    for part in parts:
        for x in (part.online, part.momentum):
            if x is not None and x.dtype not in DTYPES:
                wrong_type("keys", "float32, bfloat16 or float16", describe(x))

    n, d = query.shape
    taught = momentum_query is not None
    kinds = 3 if taught else 2
    parts = [part for part in parts if part.online.shape[0]]
    new = query.new_empty if n and parts else query.new_zeros
    lse, mean = new((kinds, n)), new((kinds, n, d))
    mean_logit, count = new(n), new(n, dtype=torch.int64)
    if n and parts:
        query = query.contiguous()
        momentum_query = None if momentum_query is None else momentum_query.contiguous()
        num_sms, shared = _multiprocessors(query.device)
        plans = [
            _plan(
                n,
                len(part.online),
                d,
                _widest(part),
                kinds=kinds,
                inside=inside,
                num_sms=num_sms,
                shared=shared,
                parts=len(parts),
                num_splits=num_splits,
            )
            for part in parts
        ]
        splits = sum(plan.num_splits for plan in plans)
        part_lse, part_mean = lse.new_empty((kinds, splits, n)), mean.new_empty((kinds, splits, n, d))
        part_mean_logit, part_count = lse.new_empty((splits, n)), lse.new_empty((splits, n), dtype=torch.int32)
        first_rows = lse.new_empty(n, dtype=torch.int32)
        with _current(query.device):
            _first_kernel[(triton.cdiv(n, _FIRST_ROWS),)](query_labels, first_rows, n, BLOCK=_FIRST_ROWS, INSIDE=inside)
            first_split = 0
            for part, plan in zip(parts, plans, strict=True):
                (keys, scale), (momentum, momentum_scale) = _readable(part)
                state = _state(part.present, keys, momentum)
                _attend_kernel[
                    (triton.cdiv(n, plan.block_q), plan.num_splits, kinds * max(1, triton.cdiv(d, plan.block_d)))
                ](
                    query,
                    momentum_query,
                    query_labels,
                    first_rows,
                    keys,
                    keys.stride(0),
                    scale,
                    momentum,
                    momentum.stride(0),
                    momentum_scale,
                    state,
                    part.labels,
                    part_lse,
                    part_mean,
                    part_mean_logit,
                    part_count,
                    n,
                    len(keys),
                    plan.keys_per_split,
                    first_split,
                    splits,
                    WIDTH=d,
                    KINDS=kinds,
                    INSIDE=inside,
                    SAME_KEYS=momentum is keys,
                    SCALED=scale is not None,
                    BLOCK_Q=plan.block_q,
                    BLOCK_K=plan.block_k,
                    BLOCK_D=plan.block_d,
                    CHUNK=plan.chunk,
                    PRODUCTS=_FLOAT32_PRODUCTS,
                    INTERPRETED=_interpreted(),
                    num_warps=plan.num_warps,
                    num_stages=plan.num_stages,
                )
                first_split += plan.num_splits
            _merge_kernel[(triton.cdiv(n, _MERGE_ROWS), max(1, triton.cdiv(d, _MERGE_COLUMNS)), kinds)](
                part_lse,
                part_mean,
                part_mean_logit,
                part_count,
                first_rows,
                lse,
                mean,
                mean_logit,
                count,
                n,
                splits,
                WIDTH=d,
                BLOCK_Q=_MERGE_ROWS,
                BLOCK_D=_MERGE_COLUMNS,
                num_warps=_MERGE_WARPS,
            )
    nothing, no_rows, zeros = lse.new_empty(0), lse.new_empty((0, d)), torch.zeros_like(mean_logit)
    unasked = LogSum(nothing, nothing)
    return Statistics(
        lse=LogSum(lse[_STUDENT], zeros),
        mean_key=mean[_STUDENT],
        positive_count=count,
        positive_mean_key=mean[_POSITIVE],
        positive_lse=LogSum(lse[_POSITIVE], zeros) if inside else unasked,
        momentum_lse=LogSum(lse[_MOMENTUM], zeros) if taught else unasked,
        momentum_mean_key=mean[_MOMENTUM] if taught else no_rows,
        momentum_mean_logit=mean_logit if taught else nothing,
    )


def normalize(raw: Tensor, shortest: float) -> tuple[Tensor, Tensor]:
    """Unit rows (N, d) and lengths (N, 1) of raw ones, float32; as `row_lengths`, in one launch."""
    unit, lengths = raw.new_empty(raw.shape, dtype=torch.float32), raw.new_empty((len(raw), 1), dtype=torch.float32)
    _normalize(raw, shortest, lengths, unit)
    return unit, lengths


def _normalize(raw: Tensor, shortest: float, lengths: Tensor, unit: Tensor | None) -> None:
    """Into `lengths` and `unit`; without `unit` one over the lengths, 0 for a row without direction."""
    n, d = raw.shape
    if n == 0:
        return
    raw = _rows_contiguous(raw)
    rows, columns = _block(d)
    with _current(raw.device):
        _normalize_kernel[(triton.cdiv(n, rows),)](
            raw,
            raw.stride(0),
            lengths,
            unit,
            n,
            shortest,
            WIDTH=d,
            INVERSE=unit is None,
            BLOCK_N=rows,
            BLOCK_D=columns,
        )


def _block(width: int) -> tuple[int, int]:
    """Rows and columns of a program that is all memory traffic."""
    columns = min(_NORMALIZE_COLUMNS, max(16, 1 << (width - 1).bit_length()))
    return _NORMALIZE_NUMBERS // columns, columns


def _state(present: Tensor | None, keys: Tensor, momentum: Tensor) -> Tensor:
    """Which keys count, (Q + 1,), as the kernel reads it."""
    q, d = keys.shape
    state = keys.new_zeros(q + 1, dtype=torch.float32)
    if present is not None:
        rows, columns = _block(d)
        _state_kernel[(triton.cdiv(q, rows),)](
            present,
            keys,
            keys.stride(0),
            momentum,
            momentum.stride(0),
            state,
            q,
            WIDTH=d,
            SAME_KEYS=momentum is keys,
            BLOCK_K=rows,
            BLOCK_D=columns,
        )
    return state


def _readable(part: Part) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Keys and momentum keys as the kernel reads them, each with what to multiply its rows by."""

    def ready(raw: Tensor) -> tuple[Tensor, Tensor | None]:
        raw = _rows_contiguous(raw)
        if not part.prepare.normalize:
            return raw, None
        inverse = raw.new_empty(len(raw), dtype=torch.float32)
        _normalize(raw, shortest(raw), inverse, None)
        if raw.dtype != torch.float16:
            return raw, inverse
        # A softmax weight over a length may leave the range of float16: a copy takes the power of two, losing nothing.
        power = torch.where(inverse > 0, inverse.log2().floor_().exp2_(), 1.0)
        return (raw * power[:, None]).to(raw.dtype), inverse / power

    keys = ready(part.online)
    if part.momentum is None or part.momentum is part.online:
        return keys, keys
    return keys, ready(part.momentum)


def _widest(part: Part) -> torch.dtype:
    """float32 where a part has any: its tiles take the most room."""
    dtypes = [part.online.dtype] if part.momentum is None else [part.online.dtype, part.momentum.dtype]
    return torch.float32 if torch.float32 in dtypes else dtypes[0]


@functools.cache
def works(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run there; if not, says why, once.

    Triton may be missing, or what it compiles with, or the GPU may be older than it takes.
    """
    if triton is None or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        normalize(torch.ones(1, 16, device=device), 1e-6)
    except Exception as error:  # whatever Triton or its compiler raise
        warnings.warn(
            f"momentum_distill goes without its fused kernel on {device}, which is slower: Triton does not work there "
            f"({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _rows_contiguous(x: Tensor) -> Tensor:
    """`x`, or a copy where the numbers of a row are not neighbours in memory; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not isinstance(_attend_kernel, triton.JITFunction)


@functools.cache
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """How many the GPU has, and the bytes of shared memory that a program may have on one; on the CPU any will do."""
    if device.type != "cuda":
        return 4, 2**20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
