"""The fused kernel against the formulas in float64, on the GPU or in Triton's interpreter.

`test_triton.py` runs this file in a process of its own: the interpreter must be chosen before Triton is imported, and
for the whole process. By hand, from the root of the repository:

    python -m pytest tests/contrast/triton_cases.py                      # on the GPU
    TRITON_INTERPRET=1 python -m pytest tests/contrast/triton_cases.py   # without one
"""

import os
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize as normalize_rows

from loss_cases import RTOL, bits
from momentum_distill import functional
from momentum_distill._contrast import kernel
from momentum_distill._contrast.problem import Part, Prepare
from momentum_distill._contrast.statistics import LogSum, Statistics
from momentum_distill._rows import row_lengths, shortest
from tiers import times

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ids = {"ids": lambda value: str(value).removeprefix("torch.")}

# NumPy, by which the interpreter computes, speaks of every NaN and of -inf - -inf, and of how Triton 3.5 calls it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

Found = namedtuple("Found", Statistics._fields[:-2])


def attend(
    query,
    keys,
    present=None,
    *,
    scale,
    momentum_query=None,
    momentum_keys=None,
    momentum_scale=None,
    query_labels,
    key_labels,
    inside=False,
    normalize=False,
    num_splits=None,
):
    """The kernel over one part of the keys; of each lse its value."""
    taught = momentum_query is not None
    prepare = Prepare(F32, normalize)
    part = Part(keys, momentum_keys if taught else None, key_labels, prepare, own=False, targets=None, present=present)
    statistics = kernel.attend(
        query * scale,
        query_labels,
        [part],
        momentum_query=momentum_query * momentum_scale if taught else None,
        inside=inside,
        num_splits=num_splits,
    )
    assert statistics[len(Found._fields) :] == (None, None)  # of hard negatives, which the kernel declines
    return Found(*(x.value() if isinstance(x, LogSum) else x for x in statistics[: len(Found._fields)]))


def case(n=5, q=70, d=16, dtype=F32, *, seed=0, scale=16.0, momentum="different", inside=False, absent=0.0):
    """Arguments of `attend`: unit rows, already rounded, which scales of powers of two keep; absent keys hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count):
        return normalize_rows(torch.randn(count, d, generator=generator), dim=1).to(dtype)

    query, keys, momentum_query, momentum_keys = rows(n), rows(q), rows(n), rows(q)
    present = torch.rand(q, generator=generator) >= absent
    keys[~present] = momentum_keys[~present] = torch.nan
    query_labels, key_labels = (torch.randint(-2, 4, (rows,), generator=generator) for rows in (n, q))

    keys = keys.to(DEVICE)
    options = {"scale": scale, "inside": inside}
    if momentum != "none":
        options["momentum_query"] = momentum_query.float().to(DEVICE)
        options["momentum_keys"] = keys if momentum == "same" else momentum_keys.to(DEVICE)
        options["momentum_scale"] = 0.5 * scale
    options |= {"query_labels": query_labels.to(DEVICE), "key_labels": key_labels.to(DEVICE)}
    return (query.float().to(DEVICE), keys, present.to(DEVICE) if absent else None), options


def formulas(
    query,
    keys,
    present=None,
    *,
    scale,
    momentum_query=None,
    momentum_keys=None,
    momentum_scale=None,
    query_labels,
    key_labels,
    inside=False,
    normalize=False,
    num_splits=None,  # noqa: ARG001 - makes no difference
):
    """What `attend` returns, in float64 and with everything of size N x Q."""
    count = torch.ones(keys.shape[0], dtype=torch.bool, device=keys.device) if present is None else present

    def ready(raw):
        rows = torch.where(count[:, None], raw.double(), 0.0)
        return rows / row_lengths(rows, shortest(raw)) if normalize else rows

    def attention(q, k, mask, scale):
        logits = q.double() @ ready(k).T * scale
        masked = logits.masked_fill(~mask, -torch.inf)
        # Rows without a key: 0. Elsewhere a NaN stays one.
        some = mask.any(1)
        weights = torch.where(some[:, None], masked.softmax(dim=1), 0.0)
        return torch.where(some, masked.logsumexp(dim=1), 0.0), weights @ values, (weights * logits).sum(dim=1)

    values = ready(keys)
    mask = count.expand(query.shape[0], -1)
    no_rows, nothing = query.double()[:0], query.double().new_empty(0)
    lse, mean_key, _ = attention(query, keys, mask, scale)
    positive = mask & (query_labels[:, None] == key_labels) & (key_labels >= 0)
    positive_lse, positive_mean_key, _ = attention(query, keys, positive, scale if inside else 0 * scale)
    momentum = (nothing, no_rows, nothing)
    if momentum_query is not None:
        momentum = attention(momentum_query, momentum_keys, mask, momentum_scale)
    positive_lse = positive_lse if inside else nothing
    return Found(lse, mean_key, positive.sum(dim=1), positive_mean_key, positive_lse, *momentum)


def assert_equal(actual, expected, dtype):
    """Log-sum-exps number by number, mean keys row by row as vectors; relative, below 0.1 absolute."""
    for name, x, y in zip(Found._fields, actual, expected, strict=True):
        assert x.shape == y.shape, name
        if name == "positive_count":
            assert torch.equal(x, y), name
        x, y = x.double(), y.double()
        assert torch.equal(x.isnan(), y.isnan()), name
        x, y = x.nan_to_num(), y.nan_to_num()
        error, size = ((x - y).abs(), y.abs()) if x.ndim == 1 else ((x - y).norm(dim=1), y.norm(dim=1))
        bound = RTOL[dtype] * size.clamp_min(0.1)
        assert (error <= bound).all(), f"{name}: error {error.tolist()}, bound {bound.tolist()}"


def check(args, options, dtype=F32):
    actual = attend(*args, **options)
    assert_equal(actual, formulas(*args, **options), dtype)
    return actual


@settings(max_examples=times(5, 25, 25))
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 70),
    q=st.integers(1, 200),
    d=st.integers(1, 40),
    dtype=st.sampled_from([F32, BF16, F16]),
    momentum=st.sampled_from(["none", "same", "different"]),
    inside=st.booleans(),
    absent=st.sampled_from([0.0, 0.3, 0.99]),
    num_splits=st.sampled_from([None, 1, 2, 5]),
    raw=st.booleans(),
)
def test_every_statistic_equals_its_formula(dtype, num_splits, raw, **sizes):
    args, options = case(dtype=dtype, **sizes)
    if raw:  # of any length, and one without direction
        lengths = torch.logspace(-2, 3, len(args[1]), device=DEVICE)[:, None]
        lengths[len(lengths) // 2] = 0.0
        args[1].mul_(lengths)
        options["normalize"] = True
    check(args, options | {"num_splits": num_splits}, dtype)


@pytest.mark.parametrize(("dtype", "other"), [(F16, F32), (F32, F16)], **ids)
def test_each_side_has_the_shortest_row_of_its_own_dtype(dtype, other):
    (query, keys, _), options = case(dtype=dtype)
    keys[::2] = keys[::2] * 1e-3  # of which float16 makes rows of zeros, float32 unit rows
    options["momentum_keys"] = keys.to(other)
    check((query, keys, None), options | {"normalize": True}, F16)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [F32, BF16, F16], **ids)
@pytest.mark.parametrize("d", [1, 3, 16, 64, 100, 128, 384, pytest.param(1024, marks=pytest.mark.long)])
def test_any_width(d, dtype):
    args, options = case(2, 17, d, dtype, absent=0.2, inside=d in (16, 384))
    check(args, options, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], **ids)
def test_huge_logits(dtype):
    args, options = case(9, 90, 24, dtype, scale=128.0, inside=True)
    check(args, options, dtype)
    # Far beyond what exp can hold: one key takes it all.
    for name in ("scale", "momentum_scale"):
        options[name] *= 2.0**17
    statistics = attend(*args, **options)
    assert all(x.isfinite().all() for x in (statistics.mean_key, statistics.lse, statistics.momentum_mean_logit))
    torch.testing.assert_close(statistics.mean_key.norm(dim=1), torch.ones(9, device=DEVICE), rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_all_keys_absent(num_splits):
    (query, keys, _), options = case(inside=True)
    keys = torch.full_like(keys, torch.nan)
    options["momentum_keys"] = torch.full_like(keys, torch.inf)
    absent = torch.zeros(keys.shape[0], dtype=torch.bool, device=DEVICE)
    statistics = attend(query, keys, absent, **options, num_splits=num_splits)
    for name, x in statistics._asdict().items():
        assert (x == 0).all(), name


@pytest.mark.parametrize("only", [0, 40, 69])
def test_one_present_key_is_its_own_mean(only):
    (query, keys, _), options = case()
    present = torch.zeros(keys.shape[0], dtype=torch.bool, device=DEVICE)
    present[only] = True
    keys[~present] = torch.nan
    statistics = check((query, keys, present), options | {"num_splits": 3})
    torch.testing.assert_close(statistics.mean_key, keys[only].expand(5, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.momentum_lse, statistics.momentum_mean_logit, rtol=1e-6, atol=0)


def test_one_row_and_one_key():
    check(*case(1, 1, 5, inside=True))


@pytest.mark.parametrize(("n", "q", "d"), [(0, 9, 4), (4, 0, 4), (0, 0, 0), (3, 5, 0)])
def test_nothing_of_something(n, q, d):
    args, options = case(n, q, d, inside=True)
    check(args, options)


def test_splits_agree_with_the_whole():
    args, options = case(6, 300, 20, inside=True, absent=0.1)
    whole = attend(*args, **options, num_splits=1)
    for num_splits in (2, 7, 1000):
        assert_equal(attend(*args, **options, num_splits=num_splits), whole, F32)


def test_equal_inputs_give_equal_bits():
    args, options = case(inside=True)
    once, again = (attend(*args, **options, num_splits=3) for _ in range(2))
    assert [bits(x.cpu()) for x in once] == [bits(x.cpu()) for x in again]


@pytest.mark.parametrize("dtype", [F32, BF16], **ids)
def test_momentum_keys_in_the_memory_of_the_keys_equal_a_copy(dtype):
    args, options = case(dtype=dtype, momentum="same")
    view = attend(*args, **options)
    copy = attend(*args, **options | {"momentum_keys": args[1].clone()})
    for x, y in zip(view, copy, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_a_present_key_makes_every_row_nan(value, num_splits):
    (query, keys, _), options = case()
    keys[50] = torch.nan
    options["momentum_keys"][3] = value
    present = torch.ones(70, dtype=torch.bool, device=DEVICE)
    present[4] = False
    for mask in (None, present):
        statistics = attend(query, keys, mask, **options, num_splits=num_splits)
        assert statistics.lse.isnan().all()
        assert statistics.mean_key.isnan().all()
        for name, x in statistics._asdict().items():
            if name.startswith("momentum"):
                assert not x.isfinite().all(), name
                assert value == torch.inf or x.isnan().all(), name


def test_nan_in_a_query_stays_in_its_row():
    (query, keys, present), options = case(inside=True, absent=0.2)
    clean = attend(query, keys, present, **options)
    for name in ("query", "momentum_query"):
        dirty = {"query": query.clone(), "momentum_query": options["momentum_query"].clone()}
        dirty[name][2, 0] = torch.nan
        statistics = attend(dirty["query"], keys, present, **options | {"momentum_query": dirty["momentum_query"]})
        for field, x, y in zip(Found._fields, statistics, clean, strict=True):
            others = [0, 1, 3, 4]
            assert torch.equal(x[others], y[others])
            no_key = field.startswith("positive") and clean.positive_count[2] == 0
            counted = field == "positive_count"
            if field.startswith("momentum") == (name == "momentum_query") and not no_key and not counted:
                assert x[2].isnan().all(), field


@pytest.mark.grid
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-20, 2.0**14, 2.0**20, 2.0**90])
@pytest.mark.parametrize("d", [16, 200])
def test_queries_beyond_the_range_of_float16(scale, d):
    args, options = case(4, 40, d, F16, scale=scale, inside=True)
    check(args, options, F16)


def test_labels_below_zero_are_nobodys_positive():
    args, options = case()
    labels = {"query_labels": torch.full((5,), -2, device=DEVICE), "key_labels": torch.full((70,), -2, device=DEVICE)}
    statistics = attend(*args, **options | labels)
    assert (statistics.positive_count == 0).all()
    assert (statistics.positive_mean_key == 0).all()


def test_float16_keeps_many_faint_weights():
    # 1000 keys of weight 2e-8 each, which float16 rounds to 0.
    keys = torch.zeros(1001, 2, dtype=F16)
    keys[0, 0], keys[1:, 1] = 1.0, 1.0
    labels = {"query_labels": torch.zeros(1, dtype=torch.int64, device=DEVICE)}
    labels["key_labels"] = torch.zeros(1001, dtype=torch.int64, device=DEVICE)
    query = torch.tensor([[1.0, 0.0]], device=DEVICE)
    mean = attend(query, keys.to(DEVICE), scale=17.75, **labels).mean_key[0, 1]
    torch.testing.assert_close(mean.item(), 1000 * 2.71828182845905**-17.75, rtol=RTOL[F16], atol=0)


@pytest.mark.parametrize("dtype", [BF16, F16], **ids)
def test_float32_queries_meet_16_bit_keys(dtype):
    (query, keys, _), options = case(20, 200, 64, dtype)
    query = normalize_rows(query + 1e-3 * torch.randn_like(query), dim=1)
    options["momentum_keys"] = options["momentum_keys"].float()  # dtypes may differ
    check((query, keys, None), options, dtype)


def test_rows_may_lie_apart_or_across():
    (query, keys, _), options = case()
    expected = attend(query, keys, None, **options)
    apart = torch.full((70, 40), torch.nan, device=DEVICE)
    apart[:, :16] = keys
    across = options["momentum_keys"].T.contiguous().T
    statistics = attend(query.T.contiguous().T, apart[:, :16], None, **options | {"momentum_keys": across})
    assert [bits(x.cpu()) for x in statistics] == [bits(x.cpu()) for x in expected]


def test_no_gradient_is_recorded():
    (query, keys, _), options = case()
    statistics = attend(query.requires_grad_(), keys, None, **options)
    assert not any(x.requires_grad for x in statistics)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_host_does_not_wait():
    args, options = case(inside=True, absent=0.3)
    attend(*args, **options, num_splits=3)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*args, **options, num_splits=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.grid
@pytest.mark.parametrize("positives", ["outside", "inside", "inside_per_positive"])
@pytest.mark.parametrize("normalize", [True, "query"], ids=str)
@pytest.mark.parametrize(("momentum", "ignore_index"), [("different", -1), ("same", 2), ("none", 2)])
@pytest.mark.parametrize("dtype", [F32, BF16], **ids)
def test_the_loss_through_the_kernel_equals_the_loss_without_it(
    dtype, positives, normalize, momentum, ignore_index, monkeypatch
):
    """The public function in two key parts, values and all gradients; keys and rows that are left out hold NaN."""
    generator = torch.Generator().manual_seed(11)

    def rows(count):
        unit = normalize_rows(torch.randn(count, 24, generator=generator), dim=1)
        lengths = 0.5 + torch.rand(count, 1, generator=generator) if normalize is True else 1
        return (lengths * unit).to(DEVICE, dtype)

    def labels(count):
        drawn = torch.randint(-2, 3, (count,), generator=generator)
        return drawn.masked_fill(drawn == -1, ignore_index).to(DEVICE)

    queries, momentum_queries, query_labels = rows(9), rows(9), labels(9)
    batch, momentum_batch, batch_labels = rows(9), rows(9), labels(9)
    queue, momentum_queue, queue_labels = rows(70), rows(70), labels(70)
    for x, y, of_rows in (
        (queries, momentum_queries, query_labels),
        (batch, momentum_batch, batch_labels),
        (queue, momentum_queue, queue_labels),
    ):
        x[of_rows == ignore_index] = y[of_rows == ignore_index] = torch.nan
    results = []
    for wanted in ("0", "1"):
        monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", wanted)
        query = queries.clone().requires_grad_()
        keys = (batch.clone().requires_grad_(), queue)
        tau = torch.tensor(0.2, device=DEVICE, requires_grad=True)
        teacher = {}
        if momentum != "none":
            momentum_keys = keys if momentum == "same" else (momentum_batch, momentum_queue)
            teacher = {"momentum_query": momentum_queries, "momentum_keys": momentum_keys}
        loss = functional.supcon_distill_loss(
            query,
            keys,
            query_labels,
            (batch_labels, queue_labels),
            temperature=tau,
            positives=positives,
            normalize=normalize,
            ignore_index=ignore_index,
            **teacher,
        )
        loss.backward()
        results.append((loss.detach(), query.grad, keys[0].grad, tau.grad))
    for plain, fused in zip(*results, strict=True):
        if dtype == F32:
            torch.testing.assert_close(fused, plain, rtol=2e-5, atol=2e-6)
        else:
            assert (fused - plain).float().norm() <= RTOL[dtype] * plain.float().norm()
    assert any(not torch.equal(*pair) for pair in zip(*results, strict=True))  # it was another way


def test_a_batch_that_excludes_itself_goes_without_the_kernel(monkeypatch):
    """It knows no row with a key that it does not see."""
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(12)).to(DEVICE)
    labels = (torch.arange(40) % 3).to(DEVICE)
    results = []
    for wanted in ("0", "1"):
        monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", wanted)
        leaf = rows.clone().requires_grad_()
        loss = functional.supcon_distill_loss(leaf, leaf, labels, labels, temperature=0.2, exclude_self=True)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
        monkeypatch.setattr(kernel, "attend", None)
    for plain, asked in zip(*results, strict=True):
        torch.testing.assert_close(asked, plain, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("targets", ["centred", "sinkhorn"])
def test_other_targets_go_through_the_kernels(targets, monkeypatch):
    generator = torch.Generator().manual_seed(13)
    query, momentum_query, keys, momentum_keys = (
        torch.randn(count, 24, generator=generator).to(DEVICE) for count in (9, 9, 40, 40)
    )
    labels, key_labels = ((torch.arange(count) % 4 - 1).to(DEVICE) for count in (9, 40))
    centre = torch.linspace(-0.4, 0.6, 24, device=DEVICE) if targets == "centred" else None
    results = []
    for wanted in ("0", "1"):
        monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", wanted)
        leaf = query.clone().requires_grad_()
        loss = functional.supcon_distill_loss(
            leaf,
            keys,
            labels,
            key_labels,
            momentum_query=momentum_query,
            momentum_keys=momentum_keys,
            temperature=0.2,
            momentum_temperature=0.1,
            momentum_targets=targets,
            centre=centre,
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-6)
