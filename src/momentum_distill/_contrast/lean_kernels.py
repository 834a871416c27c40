r"""The Triton kernels of :mod:`momentum_distill._contrast.lean`, in the order in which they are launched.

For a query $\bar q$ with logits $s_j = \bar q^\top k_j / \tau$ over the present keys, attention with the keys as values
gives $\mathrm{lse} = \log\sum_j e^{s_j}$ and $O = \sum_j V_j k_j$, $V = \mathrm{softmax}(s)$. The loss wants that of
the student, that of the momentum model (weights $U$ from $q'$ and $k'$, the same values $k$) and the mean $\kappa$ of
the positive keys.

1. :func:`prologue` makes unit rows of the queries, as float32 and as they meet the keys, finds the first row of each
   class, one over the lengths of keys that are raw, and for each tile of keys whether it is whole.
2. :func:`attend`, over (blocks of queries) x (splits of the keys) x (kinds: student, momentum model, and inside the
   logarithm the student over its positive keys), as many as fill the chip at once.
3. :func:`sum_classes`: outside the logarithm, sums of the keys of each class. Equal weights need no logits and are
   shared by a class: a block of queries in which no class begins has nothing to do.
4. :func:`merge` weighs the splits of a row by $e^{\mathrm{lse}_\text{split} - \mathrm{lse}}$, and makes its terms and
   their gradients, through the normalisation, not yet divided by the number of rows; and sums over its rows.
5. :func:`finish` adds those sums, has the counts, and writes the terms and the gradient of their weighted sum.
6. :func:`scale`, in the backward pass, multiplies by the upstream gradient.

**The loop** of `attend` has nothing in it that not every tile needs. Logits come in base 2: $\log_2 e / \tau$ is
multiplied into the queries beforehand. A split begins with tiles whose keys are all present, for a queue is filled from
one end: these are loaded without a mask, by the copy engine where there is one (`TMA`), some steps ahead. What follows
them, to the last tile with any present key, goes through a second loop, which loads present keys alone: a weight of 0
times NaN would be NaN.

**Precision**: 16-bit keys meet queries and softmax weights rounded to their dtype on the tensor cores; sums are
float32. Products of float32 keys are three of TF32. Queries for float16 keys are divided by a power of two, so that
none leaves the range, and the largest of their weights is 2**14, so that faint ones do not vanish.

Nothing of size N x Q is stored, nothing is added atomically (equal inputs give equal bits), the host never waits for
the device. A NaN in a present key makes every row NaN, a NaN in a query its own row.
"""

# Triton reads the annotation `constexpr` as text; without Triton nothing may look it up.
from __future__ import annotations

from typing import TYPE_CHECKING

from momentum_distill._contrast.kernel import _jit, tl

if TYPE_CHECKING or tl is not None:
    from momentum_distill._contrast.kernel import Block, Pointer, Scalar, constexpr


@_jit()
def _number(x: Scalar) -> Scalar:
    """A number that was given as it is or, where it is learned, as a tensor."""
    if isinstance(x, float):  # in Triton's interpreter
        return x
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x.to(tl.float32)


@_jit()
def _parts(x: Block) -> tuple[Block, Block]:
    """A float32 number as the sum of two that TF32 holds, but for 2**-22 of it."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF).to(tl.float32, bitcast=True)
    return high, x - high


@_jit()
def _product(a: Block, b: Block, total: Block, INTERPRETED: constexpr) -> Block:
    """`total + a @ b` on the tensor cores, of 16 bits or TF32, summed in float32."""
    if INTERPRETED:  # Triton's interpreter cannot multiply bfloat16. Rounded numbers have exact products in float32.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32")


@_jit()
def _dot(a: Block, b: Block, total: Block, INTERPRETED: constexpr) -> Block:
    """The same of float32 by three products: the fourth, of both rests, is nothing."""
    if a.dtype == tl.float32:
        a, a_rest = _parts(a)
        b, b_rest = _parts(b)
        total = _product(a_rest, b, total, INTERPRETED)
        total = _product(a, b_rest, total, INTERPRETED)
    return _product(a, b, total, INTERPRETED)


@_jit()
def _rows(
    matrix: Pointer, stride: Scalar, rows: Block, ok: Block, BLOCK_D: constexpr, WIDTH: constexpr
) -> tuple[Block, Block, Block]:
    """Some rows of a matrix, 0 where not `ok` and beyond `WIDTH`; where they stand if rows are apart by `WIDTH`."""
    columns = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(matrix + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return x, rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask


@_jit()
def _lengths(x: Block, shortest: Scalar) -> Block:
    """Lengths of rows, infinite where no magnitude reaches `shortest`; squares neither overflow nor underflow."""
    largest = tl.max(tl.abs(x), axis=1)
    scaled = x / tl.where(largest == 0.0, 1.0, largest)[:, None]
    return tl.where(largest < shortest, float("inf"), largest * tl.sqrt_rn(tl.sum(scaled * scaled, axis=1)))


# --------------------------------------------------------------------------------------------------------------------
# 1. Before the keys are read
# --------------------------------------------------------------------------------------------------------------------


@_jit()
def _ready_rows(
    raw: Pointer, stride: Scalar, labels: Pointer, temperature: Scalar, unit: Pointer, lengths: Pointer,
    ready: Pointer, sizes: Pointer, block: Scalar, N: Scalar, ignore_index: Scalar, shortest: Scalar,
    NORMALIZE: constexpr, KEEP: constexpr, WIDTH: constexpr, BLOCK_N: constexpr, BLOCK_D: constexpr,
) -> None:  # fmt: skip
    """Rows of a batch divided by their lengths, zeros for those that are left out: as float32, and as they meet keys.

    Those are `ready`, in the dtype of the keys; logits come out in base 2. For float16 a power of two, `sizes`, is
    divided out.
    """
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = (rows < N) & (tl.load(labels + rows, mask=rows < N, other=ignore_index) != ignore_index)
    x, at, _ = _rows(raw, stride, rows, present, BLOCK_D, WIDTH)
    mask = (rows < N)[:, None] & (tl.arange(0, BLOCK_D) < WIDTH)[None, :]
    x = x.to(tl.float32)
    if NORMALIZE:
        length = _lengths(x, shortest)
        x = tl.div_rn(x, length[:, None] + tl.zeros_like(x))
        if KEEP:
            tl.store(lengths + rows, length, mask=rows < N)
    if KEEP:
        tl.store(unit + at, x, mask=mask)
    x *= 1.4426950408889634 / _number(temperature)  # log2 e
    if ready.dtype.element_ty == tl.float16:
        largest = tl.max(tl.abs(x), axis=1)
        size = tl.where(largest > 0.0, tl.exp2(tl.floor(tl.log2(largest))), 1.0)
        x = x / size[:, None]
        tl.store(sizes + rows, size, mask=rows < N)
    tl.store(ready + at, x.to(ready.dtype.element_ty), mask=mask)


@_jit()
def _ready_keys(
    raw: Pointer, stride: Scalar, inverse: Pointer, copy: Pointer, rows: Block, present: Block, Q: Scalar,
    shortest: Scalar, WIDTH: constexpr, BLOCK_D: constexpr,
) -> None:  # fmt: skip
    """One over the lengths of keys.

    A softmax weight times that may leave the range of float16: a `copy` of such keys takes the power of two.
    """
    x, at, mask = _rows(raw, stride, rows, present, BLOCK_D, WIDTH)
    by = 1.0 / _lengths(x.to(tl.float32), shortest)
    if raw.dtype.element_ty == tl.float16:
        power = tl.where(by > 0.0, tl.exp2(tl.floor(tl.log2(by))), 1.0)
        tl.store(copy + at, (x * power[:, None]).to(tl.float16), mask=mask)
        by = by / power
    tl.store(inverse + rows, by, mask=rows < Q)


@_jit("N", "Q", "ignore_index")
def prologue(
    query: Pointer,  # (N, d), raw
    query_stride: Scalar,
    query_shortest: Scalar,  # in a row in which no magnitude reaches it, the row counts as zeros
    momentum_query: Pointer,  # (N, d), raw
    momentum_query_stride: Scalar, momentum_query_shortest: Scalar,
    query_labels: Pointer,  # (N,) int64
    temperature: Scalar, momentum_temperature: Scalar,
    unit: Pointer,  # out: (N, d) float32: the queries
    lengths: Pointer,  # out: (N,): of the queries
    ready: Pointer,  # out: (N, d): queries as they meet the keys, in the dtype of these
    momentum_ready: Pointer,  # out: (N, d): the same of the momentum model
    sizes: Pointer,  # out: (2, N): what queries for float16 keys were divided by
    first_rows: Pointer,  # out: (N,) int32: the first row of the same class; itself if it has none
    keys: Pointer,  # (Q, d), raw
    key_stride: Scalar, key_shortest: Scalar,
    momentum_keys: Pointer,  # (Q, d), raw
    momentum_key_stride: Scalar, momentum_key_shortest: Scalar,
    key_labels: Pointer,  # (Q,) int64
    flags: Pointer,  # out: (tiles,) int32: 1 if a key of the tile is absent or beyond the last, + 2 if one is present
    inverse: Pointer,  # out: (2, Q): one over the lengths of keys and of momentum keys
    copies: Pointer,  # out: (2, Q, d): of float16 keys that are not unit rows
    N: Scalar, Q: Scalar, ignore_index: Scalar, TAUGHT: constexpr, NORMALIZE: constexpr, RAW_KEYS: constexpr,
    SAME: constexpr, WIDTH: constexpr, BLOCK_N: constexpr, BLOCK_D: constexpr, TILE: constexpr, TILES: constexpr,
) -> None:  # fmt: skip
    """Blocks of rows, then tiles of keys."""
    block = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_N)
    if block < row_blocks:
        _ready_rows(
            query, query_stride, query_labels, temperature, unit, lengths, ready, sizes, block, N, ignore_index,
            query_shortest, NORMALIZE, True, WIDTH, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if TAUGHT:
            _ready_rows(
                momentum_query, momentum_query_stride, query_labels, momentum_temperature,
                unit, lengths, momentum_ready, sizes + N, block, N, ignore_index, momentum_query_shortest,
                NORMALIZE, False, WIDTH, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        own = tl.load(query_labels + rows, mask=rows < N, other=-1)
        found = rows
        for start in range(0, N, 128):
            others = start + tl.arange(0, 128)
            theirs = tl.load(query_labels + others, mask=others < N, other=-1)
            same = (own[:, None] == theirs[None, :]) & (theirs >= 0)[None, :]
            found = tl.minimum(found, tl.min(tl.where(same, others[None, :], N), axis=1))
        tl.store(first_rows + rows, found, mask=rows < N)
    else:
        tile = (block - row_blocks) * TILES
        key_rows = tile * TILE + tl.arange(0, TILES * TILE)
        present = (key_rows < Q) & (
            tl.load(key_labels + key_rows, mask=key_rows < Q, other=ignore_index) != ignore_index
        )
        by_tile = tl.reshape(present.to(tl.int32), (TILES, TILE))
        flag = 1 - tl.min(by_tile, axis=1) + 2 * tl.max(by_tile, axis=1)
        tiles = tile + tl.arange(0, TILES)
        tl.store(flags + tiles, flag, mask=tiles * TILE < Q)
        if RAW_KEYS:
            _ready_keys(keys, key_stride, inverse, copies, key_rows, present, Q, key_shortest, WIDTH, BLOCK_D)
            if TAUGHT and not SAME:
                after = Q.to(tl.int64)
                _ready_keys(
                    momentum_keys, momentum_key_stride, inverse + after, copies + after * WIDTH, key_rows, present, Q,
                    momentum_key_shortest, WIDTH, BLOCK_D,
                )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# 2. and 3. Through the keys
# --------------------------------------------------------------------------------------------------------------------


@_jit()
def _bounds(flags: Pointer, first: Scalar, last: Scalar, TILE: constexpr) -> tuple[Scalar, Scalar]:
    """Of a split that begins at a tile: up to where all keys are present, and up to where any is."""
    begin, end = first // TILE, tl.cdiv(last, TILE)
    whole, some = end, begin
    for start in range(begin, end, 256):
        tiles = start + tl.arange(0, 256)
        flag = tl.load(flags + tiles, mask=tiles < end, other=0)
        whole = tl.minimum(whole, tl.min(tl.where(flag % 2 == 1, tiles, end), axis=0))
        some = tl.maximum(some, tl.max(tl.where(flag >= 2, tiles + 1, begin), axis=0))
    return tl.minimum(whole, some) * TILE, some * TILE


@_jit()
def _tile(
    matrix: Pointer, descriptor: Pointer, stride: Scalar, start: Scalar, ok: Block,
    MASKED: constexpr, TMA: constexpr, WIDTH: constexpr, BLOCK_K: constexpr, BLOCK_D: constexpr,
) -> Block:  # fmt: skip
    """Keys from `start` on, (BLOCK_K, BLOCK_D); MASKED: of those that are `ok`, zeros for the others."""
    if TMA and not MASKED:
        return descriptor.load([start, 0])
    columns = tl.arange(0, BLOCK_D)
    at = matrix + tl.cast(start, tl.int64) * stride + (tl.arange(0, BLOCK_K)[:, None] * stride + columns[None, :])
    if MASKED:
        return tl.load(at, mask=ok[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if WIDTH == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)


@_jit()
def _through(
    state: Block, q: Block, size: Block, own: Block, first: Scalar, end: Scalar,
    keys: Pointer, key_tiles: Pointer, key_stride: Scalar, key_inverse: Pointer,
    values: Pointer, value_tiles: Pointer, value_stride: Scalar, value_inverse: Pointer,
    key_labels: Pointer, Q: Scalar, ignore_index: Scalar,
    KIND: constexpr, SAME: constexpr, LOGIT: constexpr, SCALED: constexpr, MASKED: constexpr, TMA: constexpr,
    WIDTH: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr, BLOCK_D: constexpr,
    INTERPRETED: constexpr,
) -> tuple[Block, Block, Block, Block, Block]:  # fmt: skip
    """The loop: what is kept of the keys so far, `state`, and those from `first` to `end`.

    Subtracting the maximum before anything is multiplied keeps the digits of large logits.
    """
    SIZED: constexpr = keys.dtype.element_ty == tl.float16
    SHIFT: constexpr = 14.0 if values.dtype.element_ty == tl.float16 else 0.0
    top, total, weighted, logit, positives = state
    for start in tl.range(first, end, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        ok = at < Q
        if MASKED:
            theirs = tl.load(key_labels + at, mask=ok, other=ignore_index)
            ok = theirs != ignore_index
        key = _tile(keys, key_tiles, key_stride, start, ok, MASKED, TMA, WIDTH, BLOCK_K, BLOCK_D)
        dots = _dot(q, tl.trans(key), tl.zeros((BLOCK_Q, BLOCK_K), tl.float32), INTERPRETED)
        if SCALED:
            dots *= tl.load(key_inverse + at, mask=ok, other=0.0)[None, :]
        counting = dots
        if KIND == 2:
            chosen = own[:, None] == tl.where(ok & (theirs >= 0), theirs, -1)[None, :]
            positives += tl.sum(chosen.to(tl.int32), axis=1)
            counting = tl.where(chosen, dots, float("-inf"))
        elif MASKED:
            counting = tl.where(ok[None, :], dots, float("-inf"))
        new_top = tl.maximum(top, tl.max(counting, axis=1))
        base = new_top
        if MASKED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: -inf - -inf would be NaN
        shrink, weights = top - base, counting - base[:, None]
        if SIZED:
            shrink, weights = shrink * size, weights * size[:, None]
        if SHIFT > 0.0:
            weights += SHIFT
        shrink, weights = tl.exp2(shrink), tl.exp2(weights)
        top, total = new_top, total * shrink + tl.sum(weights, axis=1)
        if LOGIT:  # `dots`, not `counting`: 0 * -inf is NaN
            logit = logit * shrink + tl.sum(weights * dots, axis=1)
        if SCALED:
            weights *= tl.load(value_inverse + at, mask=ok, other=0.0)[None, :]
        value = key
        if not SAME:  # not before: it would take registers all the while
            value = _tile(values, value_tiles, value_stride, start, ok, MASKED, TMA, WIDTH, BLOCK_K, BLOCK_D)
        weighted = _dot(weights.to(value.dtype), value, weighted * shrink[:, None], INTERPRETED)
    return top, total, weighted, logit, positives


@_jit()
def _attend_kind(
    query: Pointer, sizes: Pointer, query_labels: Pointer,
    keys: Pointer, key_tiles: Pointer, key_stride: Scalar, key_inverse: Pointer,
    values: Pointer, value_tiles: Pointer, value_stride: Scalar, value_inverse: Pointer,
    key_labels: Pointer, flags: Pointer, lse: Pointer, mean: Pointer, mean_logit: Pointer, count: Pointer,
    N: Scalar, Q: Scalar, keys_per_split: Scalar, slot: Scalar, splits: Scalar, ignore_index: Scalar,
    KIND: constexpr, SAME: constexpr, LOGIT: constexpr, SCALED: constexpr, TMA: constexpr, WIDTH: constexpr,
    TILE: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr, MASKED_K: constexpr, BLOCK_D: constexpr,
    INTERPRETED: constexpr,
) -> None:  # fmt: skip
    """One kind of attention: 0 the student, 1 the momentum model, 2 the student over its positive keys."""
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ok = rows < N
    first = tl.program_id(1) * keys_per_split
    whole, end = _bounds(flags, first, tl.minimum(first + keys_per_split, Q), TILE)
    q = _rows(query, WIDTH, rows, ok, BLOCK_D, WIDTH)[0]
    size = tl.full((BLOCK_Q,), 1.0, tl.float32)
    if keys.dtype.element_ty == tl.float16:
        size = tl.load(sizes + rows, mask=ok, other=1.0)
    own = tl.load(query_labels + rows, mask=ok, other=-2)
    own = tl.where(own < 0, -2, own)
    nothing = tl.zeros((BLOCK_Q,), tl.float32)
    state = (nothing + float("-inf"), nothing, tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), nothing, nothing.to(tl.int32))
    for MASKED in tl.static_range(KIND // 2, 2):  # positive keys are always chosen by a mask
        start = whole if MASKED and KIND < 2 else first
        stop = end if MASKED else whole
        # Of a loop that may be left out, registers are set where it is left out, before the wait for the last product:
        # for that the compiler makes every product of 16 bits wait for the one before, unless the wait is left out too.
        if values.dtype.element_ty == tl.float32 or start < stop:
            state = _through(
                state, q, size, own, start, stop,
                keys, key_tiles, key_stride, key_inverse, values, value_tiles, value_stride, value_inverse,
                key_labels, Q, ignore_index, KIND, SAME, LOGIT, SCALED, MASKED, TMA, WIDTH, BLOCK_Q,
                MASKED_K if MASKED else BLOCK_K, BLOCK_D, INTERPRETED,
            )  # fmt: skip
    top, total, weighted, logit, positives = state

    safe = tl.where(total == 0.0, 1.0, total)  # no key: lse -inf (as `top` is), mean 0
    SHIFT: constexpr = 14.0 if values.dtype.element_ty == tl.float16 else 0.0
    at = (slot + tl.program_id(1)).to(tl.int64) * N + rows
    columns = tl.arange(0, BLOCK_D)
    tl.store(lse + at, top * size + (tl.log2(safe) - SHIFT), mask=ok)
    tl.store(
        mean + at[:, None] * WIDTH + columns[None, :], weighted / safe[:, None],
        mask=ok[:, None] & (columns < WIDTH)[None, :],
    )  # fmt: skip
    at -= KIND * splits.to(tl.int64) * N
    if LOGIT:
        tl.store(mean_logit + at, logit / safe * size, mask=ok)
    if KIND == 2:
        tl.store(count + at, positives, mask=ok)


@_jit("N", "Q", "keys_per_split", "first_split", "splits", "ignore_index")
def attend(
    query: Pointer,  # (N, d), ready
    momentum_query: Pointer,  # (N, d), ready
    sizes: Pointer,  # (2, N)
    query_labels: Pointer,  # (N,)
    keys: Pointer,  # (Q, d)
    key_tiles: Pointer,  # its tensor descriptor
    key_stride: Scalar,
    key_inverse: Pointer,  # (Q,): what the keys are to be multiplied by
    momentum_keys: Pointer,  # (Q, d)
    momentum_tiles: Pointer, momentum_stride: Scalar,
    momentum_inverse: Pointer,  # (Q,)
    key_labels: Pointer,  # (Q,)
    flags: Pointer,  # (tiles,), as `prologue` leaves them
    lse: Pointer,  # out: (3, splits, N), in base 2, by kind
    mean: Pointer,  # out: (3, splits, N, d)
    mean_logit: Pointer,  # out: (splits, N), in base 2: of the momentum model
    count: Pointer,  # out: (splits, N) int32: of the positive keys
    N: Scalar, Q: Scalar, keys_per_split: Scalar,
    first_split: Scalar,  # of this part of the keys, among those of all parts
    splits: Scalar,  # of all parts
    ignore_index: Scalar,
    TAUGHT: constexpr,  # whether there is a momentum model
    INSIDE: constexpr,  # whether the student over its positive keys is wanted
    SAME: constexpr,  # the momentum keys are the keys
    LOGIT: constexpr,  # whether the mean logit of the momentum model is wanted
    SCALED: constexpr,  # whether keys are to be multiplied by their `inverse`
    TMA: constexpr, WIDTH: constexpr, TILE: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr,
    MASKED_K: constexpr,  # keys of a step that masks: fewer, for masks and loads that wait for them take registers
    BLOCK_D: constexpr, INTERPRETED: constexpr,
) -> None:  # fmt: skip
    """One kind, a block of queries, one split of the keys."""
    # Neighbouring programs differ in the queries: they run at the same time and share the keys in the cache.
    kind = tl.program_id(2)
    if kind == 0:
        _attend_kind(
            query, sizes, query_labels, keys, key_tiles, key_stride, key_inverse,
            keys, key_tiles, key_stride, key_inverse, key_labels, flags, lse, mean, mean_logit, count,
            N, Q, keys_per_split, first_split, splits, ignore_index, 0, True, False, SCALED, TMA, WIDTH,
            TILE, BLOCK_Q, BLOCK_K, MASKED_K, BLOCK_D, INTERPRETED,
        )  # fmt: skip
    if TAUGHT:  # noqa: SIM102 - one is known when the kernel is compiled, the other when it runs
        if kind == 1:
            _attend_kind(
                momentum_query, sizes + N, query_labels, momentum_keys, momentum_tiles, momentum_stride,
                momentum_inverse, keys, key_tiles, key_stride, key_inverse, key_labels, flags, lse, mean, mean_logit,
                count, N, Q, keys_per_split, splits + first_split, splits, ignore_index, 1, SAME, LOGIT, SCALED, TMA,
                WIDTH, TILE, BLOCK_Q, BLOCK_K, MASKED_K, BLOCK_D, INTERPRETED,
            )  # fmt: skip
    if INSIDE:  # noqa: SIM102
        if kind == 1 + TAUGHT:
            _attend_kind(
                query, sizes, query_labels, keys, key_tiles, key_stride, key_inverse,
                keys, key_tiles, key_stride, key_inverse, key_labels, flags, lse, mean, mean_logit, count,
                N, Q, keys_per_split, 2 * splits + first_split, splits, ignore_index, 2, True, False, SCALED, TMA,
                WIDTH, TILE, BLOCK_Q, BLOCK_K, MASKED_K, BLOCK_D, INTERPRETED,
            )  # fmt: skip


@_jit("N", "Q", "keys_per_split", "first_split", "ignore_index")
def sum_classes(
    query_labels: Pointer,  # (N,)
    first_rows: Pointer,  # (N,)
    keys: Pointer,  # (Q, d)
    key_tiles: Pointer, key_stride: Scalar,
    key_inverse: Pointer,  # (Q,)
    key_labels: Pointer,  # (Q,)
    flags: Pointer,  # (tiles,)
    sums: Pointer,  # out: (splits, N, d), in rows that are the first of a class
    count: Pointer,  # out: (splits, N) int32, the same
    N: Scalar, Q: Scalar, keys_per_split: Scalar, first_split: Scalar, ignore_index: Scalar, SCALED: constexpr,
    TMA: constexpr, WIDTH: constexpr, TILE: constexpr, BLOCK_Q: constexpr, BLOCK_K: constexpr, BLOCK_D: constexpr,
    INTERPRETED: constexpr,
) -> None:  # fmt: skip
    """Sum and number of the positive keys of the rows of a block, of one split of the keys."""
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    firsts = tl.load(first_rows + rows, mask=rows < N, other=-1) == rows
    if tl.max(firsts.to(tl.int32), axis=0) > 0:
        first = tl.program_id(1) * keys_per_split
        whole, end = _bounds(flags, first, tl.minimum(first + keys_per_split, Q), TILE)
        own = tl.load(query_labels + rows, mask=rows < N, other=-2)
        own = tl.where(own < 0, -2, own)
        total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        counts = tl.zeros((BLOCK_Q, 16), tl.float32)  # a product with ones, each column the same
        ones = (tl.zeros((BLOCK_K, 16), tl.float32) + 1.0).to(keys.dtype.element_ty)
        for MASKED in tl.static_range(2):
            begin = whole if MASKED else first
            stop = end if MASKED else whole
            if keys.dtype.element_ty == tl.float32 or begin < stop:  # as in `attend`
                for start in tl.range(begin, stop, BLOCK_K):
                    at = start + tl.arange(0, BLOCK_K)
                    theirs = tl.load(key_labels + at, mask=at < Q, other=ignore_index)
                    ok = theirs != ignore_index
                    value = _tile(keys, key_tiles, key_stride, start, ok, MASKED, TMA, WIDTH, BLOCK_K, BLOCK_D)
                    chosen = own[:, None] == tl.where(ok & (theirs >= 0), theirs, -1)[None, :]
                    weights = tl.where(chosen, 1.0, 0.0).to(value.dtype)
                    counts = _product(weights, ones, counts, INTERPRETED)
                    if SCALED:
                        inverse = tl.load(key_inverse + at, mask=ok, other=0.0)
                        if value.dtype == tl.float32:
                            value *= inverse[:, None]
                        else:
                            weights = tl.where(chosen, inverse[None, :], 0.0).to(value.dtype)
                    if value.dtype == tl.float32:  # TF32 holds 0 and 1: two products are enough
                        value, rest = _parts(value)
                        total = _product(weights, rest, total, INTERPRETED)
                    total = _product(weights, value, total, INTERPRETED)
        at = (first_split + tl.program_id(1)).to(tl.int64) * N + rows
        columns = tl.arange(0, BLOCK_D)
        mask = (rows < N)[:, None] & (columns < WIDTH)[None, :]
        tl.store(sums + at[:, None] * WIDTH + columns[None, :], total, mask=mask)
        tl.store(count + at, tl.max(counts, axis=1).to(tl.int32), mask=rows < N)


# --------------------------------------------------------------------------------------------------------------------
# 4. to 6. After the keys are read
# --------------------------------------------------------------------------------------------------------------------


@_jit()
def _merge_splits(
    lse: Pointer, mean: Pointer, mean_logit: Pointer, rows: Block, ok: Block, N: Scalar, splits: Scalar,
    LOGIT: constexpr, WIDTH: constexpr, BLOCK_D: constexpr, CHUNK: constexpr,
) -> tuple[Block, Block, Block, Block]:  # fmt: skip
    """Some rows over all splits: the lse as two numbers in nats, to be added, the mean key, the mean logit in nats.

    Without a key all are 0.
    """
    top = tl.full((rows.shape[0],), float("-inf"), tl.float32)
    for start in range(0, splits, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        at = chunk.to(tl.int64)[:, None] * N + rows[None, :]
        share = tl.load(lse + at, mask=(chunk < splits)[:, None] & ok[None, :], other=float("-inf"))
        top = tl.maximum(top, tl.max(share, axis=0))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((rows.shape[0],), tl.float32)
    logit = total
    weighted = tl.zeros((rows.shape[0], BLOCK_D), tl.float32)
    columns = tl.arange(0, BLOCK_D)
    for start in range(0, splits, CHUNK):
        chunk = start + tl.arange(0, CHUNK)
        at = chunk.to(tl.int64)[:, None] * N + rows[None, :]
        mask = (chunk < splits)[:, None] & ok[None, :]
        share = tl.exp2(tl.load(lse + at, mask=mask, other=float("-inf")) - top[None, :])  # 0: a split without keys
        total += tl.sum(share, axis=0)
        mask_3d = mask[:, :, None] & (columns < WIDTH)[None, None, :]
        some = tl.load(mean + at[:, :, None] * WIDTH + columns[None, None, :], mask=mask_3d, other=0.0)
        weighted += tl.sum(share[:, :, None] * some, axis=0)
        if LOGIT:
            logit += tl.sum(share * tl.load(mean_logit + at, mask=mask, other=0.0), axis=0)
    safe = tl.where(total == 0.0, 1.0, total)
    log2 = 0.6931471805599453
    return top * log2, tl.log2(safe) * log2, weighted / safe[:, None], logit / safe * log2


@_jit()
def _logit(
    query: Pointer, sizes: Pointer, rows: Block, ok: Block, key: Block, WIDTH: constexpr, BLOCK_D: constexpr
) -> Block:
    """Logits of means of keys in nats, of queries as they met the keys: what rounding did goes out with the lse."""
    logit = tl.sum(_rows(query, WIDTH, rows, ok, BLOCK_D, WIDTH)[0].to(tl.float32) * key, axis=1)
    if query.dtype.element_ty == tl.float16:
        logit *= tl.load(sizes + rows, mask=ok, other=1.0)
    return logit * 0.6931471805599453  # log 2


@_jit()
def _raw_gradient(grad: Block, unit: Block, lengths: Pointer, rows: Block, ok: Block, NORMALIZE: constexpr) -> Block:
    """The gradient for raw rows, from that for rows of length one."""
    if NORMALIZE:
        length = tl.load(lengths + rows, mask=ok, other=1.0)
        grad = (grad - unit * tl.sum(unit * grad, axis=1)[:, None]) / length[:, None]
    return grad


@_jit("N", "splits", "positive_splits", "ignore_index")
def merge(
    lse: Pointer,  # (3, splits, N), in base 2, by kind
    mean: Pointer,  # (3, splits, N, d)
    mean_logit: Pointer,  # (splits, N), in base 2
    positive_sum: Pointer,  # (positive splits, N, d), in the first rows of classes; not INSIDE
    positive_count: Pointer,  # (positive splits, N)
    query: Pointer,  # (N, d), ready
    momentum_query: Pointer,  # (N, d), ready
    sizes: Pointer,  # (2, N)
    unit: Pointer,  # (N, d)
    lengths: Pointer,  # (N,)
    first_rows: Pointer,  # (N,)
    query_labels: Pointer,  # (N,)
    temperature: Scalar,
    terms: Pointer,  # out: (2, N): the supervised and the KL term, 0 in rows left out
    grads: Pointer,  # out: (2, N, d): gradients of both for the raw queries
    grad_temperatures: Pointer,  # out: (2, N)
    sums: Pointer,  # out: (blocks, 8) float64: of both terms, of rows, of those with a positive key; zeros
    temperature_sums: Pointer,  # out: (blocks, 2) float64
    N: Scalar, splits: Scalar, positive_splits: Scalar, ignore_index: Scalar, TAUGHT: constexpr,
    LOGIT: constexpr,  # else the mean logit of the momentum model follows from its mean key
    INSIDE: constexpr, PER_POSITIVE: constexpr, NORMALIZE: constexpr, WIDTH: constexpr, BLOCK_N: constexpr,
    BLOCK_D: constexpr, CHUNK: constexpr,
) -> None:  # fmt: skip
    """Some rows: their statistics over all splits, their terms, and the gradients of these."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < N
    tau = _number(temperature)
    x, at, mask = _rows(unit, WIDTH, rows, ok, BLOCK_D, WIDTH)
    shift, log, mean_key, _ = _merge_splits(
        lse, mean, mean_logit, rows, ok, N, splits, False, WIDTH, BLOCK_D, CHUNK
    )  # fmt: skip

    # The positive keys: those of the first row of the class, where all of a class have the same.
    source = rows if INSIDE else tl.load(first_rows + rows, mask=ok, other=0)
    count = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(positive_splits):
        count += tl.load(positive_count + tl.cast(split, tl.int64) * N + source, mask=ok, other=0)
    some = count > 0
    number = tl.maximum(count, 1).to(tl.float32)
    if INSIDE:
        after = 2 * splits.to(tl.int64) * N
        positive_shift, positive_log, positive_key, _ = _merge_splits(
            lse + after, mean + after * WIDTH, mean_logit, rows, ok, N, splits, False, WIDTH, BLOCK_D, CHUNK
        )
        supervised = (shift - positive_shift) + (log - positive_log)
    else:
        positive_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for split in range(positive_splits):
            from_split = positive_sum + tl.cast(split, tl.int64) * N * WIDTH
            positive_key += _rows(from_split, WIDTH, source, ok, BLOCK_D, WIDTH)[0]
        positive_key = positive_key / number[:, None]
        supervised = (shift - _logit(query, sizes, rows, ok, positive_key, WIDTH, BLOCK_D)) + log
    share = some.to(tl.float32)
    if PER_POSITIVE:
        supervised = supervised / number
        share = share / number
    supervised = tl.where(some, supervised, (shift + log) * 0.0)  # 0, or NaN of a row that is

    distill = tl.zeros((BLOCK_N,), tl.float32)
    push = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if TAUGHT:
        after = splits.to(tl.int64) * N
        other_shift, other_log, other_key, other_logit = _merge_splits(
            lse + after, mean + after * WIDTH, mean_logit, rows, ok, N, splits, LOGIT, WIDTH, BLOCK_D, CHUNK
        )
        if not LOGIT:
            other_logit = _logit(momentum_query, sizes + N, rows, ok, other_key, WIDTH, BLOCK_D)
        log_u = (other_logit - other_shift) - other_log
        log_v = (_logit(query, sizes, rows, ok, other_key, WIDTH, BLOCK_D) - shift) - log
        distill = log_u - log_v
        push = mean_key - other_key

    present = ok & (tl.load(query_labels + rows, mask=ok, other=ignore_index) != ignore_index)
    supervised, distill = tl.where(present, supervised, 0.0), tl.where(present, distill, 0.0)
    # Not 0 * pull: of a row without positives, that may be infinite.
    pull = tl.where((present & some)[:, None], (mean_key - positive_key) * share[:, None], 0.0)
    push = tl.where(present[:, None], push, 0.0)
    # By the logits, to the queries and to the temperature.
    pull_temperature = -tl.sum(x * pull, axis=1) / tau / tau
    push_temperature = -tl.sum(x * push, axis=1) / tau / tau
    pull, push = (
        _raw_gradient(pull / tau, x, lengths, rows, ok, NORMALIZE),
        _raw_gradient(push / tau, x, lengths, rows, ok, NORMALIZE),
    )
    tl.store(terms + rows, supervised, mask=ok)
    tl.store(terms + N + rows, distill, mask=ok)
    tl.store(grads + at, pull, mask=mask)
    tl.store(grads + N.to(tl.int64) * WIDTH + at, push, mask=mask)
    tl.store(grad_temperatures + rows, pull_temperature, mask=ok)
    tl.store(grad_temperatures + N + rows, push_temperature, mask=ok)
    # Rows beyond the last have no terms, for they are not present.
    at = sums + tl.program_id(0) * 8
    tl.store(at, tl.sum(supervised.to(tl.float64), axis=0))
    tl.store(at + 1, tl.sum(distill.to(tl.float64), axis=0))
    tl.store(at + 2, tl.sum(present.to(tl.int32), axis=0).to(tl.float64))
    tl.store(at + 3, tl.sum((present & some).to(tl.int32), axis=0).to(tl.float64))
    tl.store(at + 4 + tl.arange(0, 4), tl.zeros((4,), tl.float64))
    at = temperature_sums + tl.program_id(0) * 2
    tl.store(at, tl.sum(pull_temperature.to(tl.float64), axis=0))
    tl.store(at + 1, tl.sum(push_temperature.to(tl.float64), axis=0))


@_jit()
def _sum_column(matrix: Pointer, column: constexpr, height: Scalar, WIDTH: constexpr) -> Scalar:
    """The sum of a column of a (height, WIDTH) matrix of float64."""
    total = tl.zeros((128,), tl.float64)
    for start in range(0, height, 128):
        rows = start + tl.arange(0, 128)
        total += tl.load(matrix + rows * WIDTH + column, mask=rows < height, other=0.0)
    return tl.sum(total, axis=0)


@_jit("N", "blocks", "sum_rows", "world")
def finish(
    terms: Pointer,  # (2, N)
    grads: Pointer,  # (2, N, d)
    grad_temperatures: Pointer,  # (2, N)
    sums: Pointer,  # (sum_rows, 8) float64
    temperature_sums: Pointer,  # (blocks, 2) float64
    alpha: Scalar,
    reduced: Pointer,  # out: total, supervised, distill, gradients for temperature and alpha; (5,), or by row (5, N)
    counts: Pointer,  # out: (2,) int64: rows, and those with a positive key
    grad_query: Pointer,  # out: (N, d)
    N: Scalar, blocks: Scalar, sum_rows: Scalar,
    world: Scalar,  # how many processes the sums are of: by so much they divide the gradient
    TAUGHT: constexpr, MEAN: constexpr, BY_ROW: constexpr, WIDTH: constexpr, BLOCK_N: constexpr, BLOCK_D: constexpr,
) -> None:  # fmt: skip
    """Terms, counts, and the gradient of the total; each program has the sums, and some rows."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < N
    row_count, positive_rows = _sum_column(sums, 2, sum_rows, 8), _sum_column(sums, 3, sum_rows, 8)
    distill_share = _number(alpha) if TAUGHT else tl.zeros((), tl.float32)
    supervised_share = 1.0 - distill_share
    supervised_weight, distill_weight = supervised_share * world, distill_share * world
    if MEAN:
        supervised_weight /= tl.maximum(positive_rows, 1.0).to(tl.float32)
        distill_weight /= tl.maximum(row_count, 1.0).to(tl.float32)
    pull, at, mask = _rows(grads, WIDTH, rows, ok, BLOCK_D, WIDTH)
    push = _rows(grads + N.to(tl.int64) * WIDTH, WIDTH, rows, ok, BLOCK_D, WIDTH)[0]
    tl.store(grad_query + at, supervised_weight * pull + distill_weight * push, mask=mask)
    if BY_ROW:
        supervised, distill = tl.load(terms + rows, mask=ok, other=0.0), tl.load(terms + N + rows, mask=ok, other=0.0)
        pull_temperature = tl.load(grad_temperatures + rows, mask=ok, other=0.0)
        push_temperature = tl.load(grad_temperatures + N + rows, mask=ok, other=0.0)
        tl.store(reduced + rows, supervised_share * supervised + distill_share * distill, mask=ok)
        tl.store(reduced + N + rows, supervised, mask=ok)
        tl.store(reduced + 2 * N + rows, distill, mask=ok)
        tl.store(
            reduced + 3 * N + rows, supervised_weight * pull_temperature + distill_weight * push_temperature, mask=ok
        )
        tl.store(reduced + 4 * N + rows, distill - supervised, mask=ok)
    if tl.program_id(0) == 0:
        tl.store(counts, row_count.to(tl.int64))
        tl.store(counts + 1, positive_rows.to(tl.int64))
        if not BY_ROW:
            supervised, distill = _sum_column(sums, 0, sum_rows, 8), _sum_column(sums, 1, sum_rows, 8)
            if MEAN:
                supervised /= tl.maximum(positive_rows, 1.0)
                distill /= tl.maximum(row_count, 1.0)
            supervised, distill = supervised.to(tl.float32), distill.to(tl.float32)
            pull_temperature = _sum_column(temperature_sums, 0, blocks, 2).to(tl.float32)
            push_temperature = _sum_column(temperature_sums, 1, blocks, 2).to(tl.float32)
            tl.store(reduced, supervised_share * supervised + distill_share * distill)
            tl.store(reduced + 1, supervised)
            tl.store(reduced + 2, distill)
            tl.store(reduced + 3, supervised_weight * pull_temperature + distill_weight * push_temperature)
            tl.store(reduced + 4, distill - supervised)


@_jit("N")
def scale(
    grad_query: Pointer,  # (N, d)
    grad_temperature: Pointer,  # (), or by row (N,)
    grad_alpha: Pointer,  # the same
    upstream: Pointer,  # the same
    upstream_stride: Scalar,
    query_out: Pointer,  # out: (N, d), in the dtype of the queries
    temperature_out: Pointer,  # out: ()
    alpha_out: Pointer,  # out: ()
    N: Scalar, BY_ROW: constexpr, WIDTH: constexpr, BLOCK_N: constexpr, BLOCK_D: constexpr,
) -> None:  # fmt: skip
    """The gradients times that of the total."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad, at, mask = _rows(grad_query, WIDTH, rows, rows < N, BLOCK_D, WIDTH)
    if BY_ROW:
        by = tl.load(upstream + rows.to(tl.int64) * upstream_stride, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    else:
        by = tl.load(upstream).to(tl.float32)
    tl.store(query_out + at, (grad * by).to(query_out.dtype.element_ty), mask=mask)
    if tl.program_id(0) == 0:
        if BY_ROW:
            temperature, alpha = tl.zeros((BLOCK_N,), tl.float64), tl.zeros((BLOCK_N,), tl.float64)
            for start in range(0, N, BLOCK_N):
                rows = start + tl.arange(0, BLOCK_N)
                ok = rows < N
                by = tl.load(upstream + rows.to(tl.int64) * upstream_stride, mask=ok, other=0.0).to(tl.float64)
                temperature += by * tl.load(grad_temperature + rows, mask=ok, other=0.0)
                alpha += by * tl.load(grad_alpha + rows, mask=ok, other=0.0)
            by_temperature, by_alpha = tl.sum(temperature, axis=0), tl.sum(alpha, axis=0)
        else:
            by = tl.load(upstream).to(tl.float32)
            by_temperature, by_alpha = by * tl.load(grad_temperature), by * tl.load(grad_alpha)
        tl.store(temperature_out, by_temperature.to(temperature_out.dtype.element_ty))
        tl.store(alpha_out, by_alpha.to(alpha_out.dtype.element_ty))
