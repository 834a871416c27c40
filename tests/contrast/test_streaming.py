"""The contrastive loss in tiles: the same numbers as the N×Q matrices, and never anything as large as they."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import momentum_distill as md
import reference
from loss_cases import POSITIVES, Largest, assert_close, assert_gradient_close, by_autograd, supcon_case, without_asking
from momentum_distill import functional as F
from momentum_distill._contrast import engine, tiles

WAYS = ["plain sums", "running shift", "without asking the device"]

CHANGED = (
    r"^supcon_distill: an input was changed in place \(keys or labels by ClassQueue.enqueue\?\) before the gradient of "
    "a single term, or a second derivative, was taken; that needs it. Call backward\\(\\) first, "
    "differentiate `total`, or read the queue without padded=True$"
)


def small_tiles(patch, way):
    """Tiles of five keys, and which of the passes over them is taken."""
    patch.setattr(engine, "DENSE_SCORES", -1)
    patch.setattr(tiles, "MIN_TILE", 5)
    patch.setattr(tiles, "MAX_TILE", 5)
    if way != "plain sums":
        patch.setattr(tiles, "SAFE_SUM", (1.0, 0.0))  # no sum is in this range
    if way == "without asking the device":
        without_asking(patch)


def dense_terms(case, *, temperature, alpha, positives, normalize):
    """In the dtype of the case: plain autograd through the N×Q matrices."""
    with pytest.MonkeyPatch.context() as patch:
        by_autograd(patch)
        return F.supcon_distill_terms(
            *case.args, **case.momentum, temperature=temperature, alpha=alpha, positives=positives, normalize=normalize
        )


@settings(max_examples=60)
@example(  # where a device is not asked, and some keys are absent: the draws of the default tier miss it
    seed=0,
    n=6,
    q=23,
    ignored=0.4,
    momentum=True,
    way="without asking the device",
    positives="outside",
    normalize=True,
    temperature=0.5,
    split=11,
)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 6),
    q=st.integers(0, 23),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    momentum=st.booleans(),
    way=st.sampled_from(WAYS),
    positives=st.sampled_from(POSITIVES),
    normalize=st.sampled_from([True, "query", False]),
    temperature=st.sampled_from([0.05, 0.5]),
    split=st.integers(0, 23),
)
def test_tiles_give_the_values_of_the_loop_reference(
    seed, n, q, ignored, momentum, way, positives, normalize, temperature, split
):
    case = supcon_case(seed, n, q, 3, ignored=ignored, unlabelled=0.2, momentum=momentum)
    options = {"positives": positives, "normalize": normalize, "temperature": temperature, "alpha": 0.3}
    args, momentum_args = case.reference
    expected = reference.supcon_terms(*args, **momentum_args, **options)
    split = min(split, q)
    case = case.split(split, q - split)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, way)
        terms = F.supcon_distill_terms(*case.args, **case.momentum, **options)
    assert_close(terms.supervised, expected.supervised)
    assert_close(terms.distill, expected.distill)
    assert_close(terms.total, expected.total)
    assert int(terms.rows) == expected.rows
    assert int(terms.rows_with_positive) == expected.rows_with_positive


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "supervised alone"])
def test_tiles_give_the_loss_and_the_gradients_of_the_dense_form(positives, normalize, way, momentum, dtype):
    """Query, keys and temperature, against plain autograd in float64 on the same rounded numbers."""
    case = supcon_case(7, 9, 23, 6, ignored=0.2, unlabelled=0.2, momentum=momentum, dtype=dtype)
    options = {"alpha": 0.3, "positives": positives, "normalize": normalize}
    exact = case.map(lambda x: x.double()).requires_grad()
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    expected = dense_terms(exact, temperature=tau, **options).total
    expected.backward()

    case = case.requires_grad()
    own_tau = torch.tensor(0.5, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, way)
        loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=own_tau, **options)
        loss.backward()
    assert_close(loss, expected.detach(), dtype)
    assert_gradient_close(case.query.grad, exact.query.grad, dtype)
    assert_gradient_close(case.keys.grad, exact.keys.grad, dtype)
    assert_gradient_close(own_tau.grad, tau.grad, dtype)


@pytest.mark.parametrize("positives", POSITIVES)
def test_the_same_keys_on_both_sides_are_read_once_and_give_the_same(positives, monkeypatch):
    """One object for keys and momentum keys takes a shorter way than two equal ones."""
    small_tiles(monkeypatch, "plain sums")
    case = supcon_case(3, 8, 21, 4)
    results = []
    for momentum_keys in (case.keys, case.keys.clone()):
        query, keys = case.query.clone().requires_grad_(), case.keys
        loss = F.supcon_distill_loss(
            query,
            keys,
            case.query_labels,
            case.key_labels,
            momentum_query=case.momentum_query,
            momentum_keys=momentum_keys,
            temperature=0.3,
            positives=positives,
        )
        loss.backward()
        results.append((loss.detach(), query.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exclude_self", [False, True], ids=["", "without self"])
@pytest.mark.parametrize("normalize", [True, "query"], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
def test_nothing_of_the_size_of_the_similarities_is_made(positives, normalize, exclude_self):
    n, q, d = 64, 40_000, 8
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, d, generator=generator, requires_grad=True)
    momentum_query = torch.randn(n, d, generator=generator)
    keys, momentum_keys = (torch.nn.functional.normalize(torch.randn(q, d, generator=generator)) for _ in range(2))
    labels, key_labels = torch.randint(3, (n,), generator=generator), torch.randint(3, (q,), generator=generator)
    batch = keys[:n].clone().requires_grad_()
    with Largest() as largest:
        loss = F.supcon_distill_loss(
            query,
            (batch, keys[n:]),
            labels,
            (key_labels[:n], key_labels[n:]),
            temperature=0.5,
            momentum_query=momentum_query,
            momentum_keys=(momentum_keys[:n], momentum_keys[n:]),
            positives=positives,
            normalize=normalize,
            exclude_self=exclude_self,
        )
        loss.backward()
    assert largest.numel <= max(2 * tiles.TILE_SCORES, q)  # labels and masks have q entries
    assert largest.numel < n * q / 8


@pytest.mark.parametrize("way", WAYS)
def test_a_tile_without_a_key_that_is_present_hides_none_of_those_after_it(way, monkeypatch):
    case = supcon_case(3, n=4, q=16)
    case.key_labels[:10] = -1
    options = {"temperature": 0.5, "alpha": 0.4}
    expected = F.supcon_distill_loss(*case.args, **case.momentum, **options)
    small_tiles(monkeypatch, way)
    assert_close(F.supcon_distill_loss(*case.args, **case.momentum, **options), expected)


@pytest.mark.parametrize("width", [2, 16])
@pytest.mark.parametrize("way", ["plain sums", "without asking the device"])
def test_a_row_that_is_longer_than_each_of_its_numbers_may_still_have_no_direction(way, width, monkeypatch):
    case = supcon_case(4, n=3, q=12, d=width)
    case.query[1] = 0.9e-6
    options = {"temperature": 0.5, "alpha": 0.4, "reduction": "none"}
    rows, momentum = case.reference
    expected = reference.supcon(*rows, **momentum, **options)
    assert_close(F.supcon_distill_loss(*case.args, **case.momentum, **options), expected)
    small_tiles(monkeypatch, way)
    assert_close(F.supcon_distill_loss(*case.args, **case.momentum, **options), expected)


def test_logits_too_large_for_plain_sums_are_noticed():
    """exp(200) is no float32; the second pass, with a running shift, must be taken and be exact."""
    case = supcon_case(4, 5, 30, 4, dtype=torch.float32)
    exact = case.map(lambda x: x.double())
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.005)
    assert_close(
        loss, dense_terms(exact, temperature=0.005, alpha=0.4, positives="outside", normalize=True).total, torch.float32
    )


@pytest.mark.parametrize("positives", POSITIVES)
def test_the_logarithm_of_the_sum_is_not_lost_beside_logits_of_a_billion(positives, monkeypatch):
    """Two equal keys share the weight: log 2 is no digit of 1.4e9 in float32, and without it both got all of it."""
    monkeypatch.setattr(engine, "DENSE_SCORES", -1)
    query = torch.full((1, 1), 3700.0)
    keys = torch.full((2, 1), 3700.0, dtype=torch.float16, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    options = {"temperature": 0.01, "alpha": 0.4, "positives": positives, "normalize": False}
    loss = F.supcon_distill_loss(query, keys, *zeros, momentum_query=query, momentum_keys=keys.detach(), **options)
    loss.backward()
    assert loss.item() == pytest.approx(0.6 * math.log(2) if positives == "outside" else 0.0)
    assert keys.grad.abs().max() < 1e-6 * 3700.0 / 0.01  # of the two halves of a query that cancel


@pytest.mark.parametrize("scores", [-1, 2**20], ids=["tiles", "matrices"])
def test_a_queue_may_be_written_between_forward_and_backward(scores, monkeypatch):
    """Live views of the queue are no part of the graph."""
    monkeypatch.setattr(engine, "DENSE_SCORES", scores)
    queue = md.ClassQueue(20, {"text": 4})
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20, 4, generator=generator)
    queue.enqueue(torch.arange(20) % 3, {"text": rows})
    grads = []
    for write in (False, True):
        query = rows[:5].clone().requires_grad_()
        keys, labels = queue.read("text", padded=True)
        loss = md.SupConDistillLoss()(query, keys, torch.arange(5) % 3, labels)
        if write:
            queue.enqueue(torch.zeros(20, dtype=torch.int64), {"text": -rows})
        loss.backward()
        grads.append(query.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("scores", [-1, 2**20], ids=["tiles", "matrices"])
@pytest.mark.parametrize("what", ["one term", "second derivative"])
def test_a_gradient_that_needs_keys_which_were_overwritten_is_refused(what, scores, monkeypatch):
    monkeypatch.setattr(engine, "DENSE_SCORES", scores)
    queue = md.ClassQueue(20, {"text": 4})
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(20) % 3
    queue.enqueue(labels, {"text": rows})
    query = rows[:5].clone().requires_grad_()
    keys, key_labels = queue.read("text", padded=True)
    terms = md.SupConDistillLoss().terms(query, keys, labels[:5], key_labels)
    one_term = terms.supervised if what == "one term" else terms.total
    torch.autograd.grad(one_term, query, create_graph=what != "one term", retain_graph=True)
    queue.enqueue(labels, {"text": -rows})
    with pytest.raises(RuntimeError, match=CHANGED):
        torch.autograd.grad(one_term, query, create_graph=what != "one term")


@pytest.mark.parametrize("name", ["keys", "query_labels", "key_labels", "momentum_query", "momentum_keys"])
def test_whatever_is_overwritten_before_a_single_term_has_its_gradient_is_noticed(name):
    case = supcon_case(5)
    case.query.requires_grad_()
    terms = F.supcon_distill_terms(*case.args, **case.momentum, temperature=0.5)
    getattr(case, name).mul_(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        terms.supervised.backward()


@pytest.mark.parametrize("name", ["temperature", "momentum_temperature", "alpha"])
def test_a_number_that_is_overwritten_before_a_single_term_has_its_gradient_is_noticed(name):
    case = supcon_case(5)
    case.query.requires_grad_()
    numbers = {each: torch.tensor(0.5) for each in ("temperature", "momentum_temperature", "alpha")}
    terms = F.supcon_distill_terms(*case.args, **case.momentum, **numbers)
    terms.total.backward(retain_graph=True)
    numbers[name].mul_(2)
    terms.total.backward(retain_graph=True)  # which the forward pass has made
    with pytest.raises(RuntimeError, match=CHANGED):
        terms.supervised.backward()


@pytest.mark.parametrize("scores", [-1, 2**20], ids=["tiles", "matrices"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("learned_alpha", [True, False])
@pytest.mark.parametrize("rows", [6, 1])
def test_gradients_of_all_terms_at_once_are_those_of_autograd(rows, scores, reduction, learned_alpha, monkeypatch):
    """Total, both terms and a learned alpha: what is ready after the forward pass, and what is made on demand."""
    monkeypatch.setattr(engine, "DENSE_SCORES", scores)
    left_out = {"ignored": 0.2, "unlabelled": 0.2} if rows > 1 else {}
    case = supcon_case(5, rows, 9, 3, **left_out).requires_grad()
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True) if learned_alpha else 0.3
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = [case.query, case.keys, tau, *([alpha] if learned_alpha else [])]
    generator = torch.Generator().manual_seed(0)
    for weights in ([1, 0, 0], [0.5, 2, 0], [0, 0, 3], [1, -1, 2]):

        def combined(weights=weights):
            terms = F.supcon_distill_terms(
                *case.args, **case.momentum, temperature=tau, alpha=alpha, reduction=reduction
            )
            noise = [torch.randn(terms.total.shape, generator=generator.manual_seed(1), dtype=torch.float64)] * 3
            chosen = [(w * n * t).sum() for w, n, t in zip(weights, noise, terms[:3], strict=True) if w]
            return sum(chosen)

        grads = torch.autograd.grad(combined(), inputs, allow_unused=True)
        with monkeypatch.context() as patch:
            by_autograd(patch)
            expected = torch.autograd.grad(combined(), inputs, allow_unused=True)
        for got, want in zip(grads, expected, strict=True):
            assert (got is None) == (want is None) or not want.any()
            if want is not None and got is not None:
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "supervised alone"])
@pytest.mark.parametrize("positives", POSITIVES)
def test_second_derivatives_are_right(positives, momentum):
    case = supcon_case(5, 4, 7, 3, ignored=0.2, unlabelled=0.2).requires_grad()
    queue, queue_labels = supcon_case(6, 4, 5, 3).keys, torch.tensor([0, 1, 2, 0, -1])
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(query, keys, temperature):
        return F.supcon_distill_loss(
            query,
            (keys, queue),
            case.query_labels,
            (case.key_labels, queue_labels),
            momentum_query=case.momentum_query if momentum else None,
            momentum_keys=(case.momentum_keys, queue) if momentum else None,
            temperature=temperature,
            momentum_temperature=0.4,
            positives=positives,
        )

    assert torch.autograd.gradgradcheck(loss, (case.query, case.keys, tau))


@pytest.mark.parametrize("weights", [(3, 0, 0), (0, 2, 0), (0, 0, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
def test_a_gradient_that_is_to_have_one_itself_is_the_gradient(positives, weights):
    """`gradgradcheck` compares such gradients only with one another."""
    case = supcon_case(5, 4, 7, 3, ignored=0.2, unlabelled=0.2).requires_grad()
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = case.query, case.keys, tau
    terms = F.supcon_distill_terms(*case.args, **case.momentum, temperature=tau, positives=positives)
    loss = sum(weight * term for weight, term in zip(weights, terms[:3], strict=True) if weight)
    with_graph = torch.autograd.grad(loss, leaves, create_graph=True)
    for ours, expected in zip(with_graph, torch.autograd.grad(loss, leaves), strict=True):
        assert ours.requires_grad
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("positives", POSITIVES)
def test_no_value_is_read_from_tensors_that_have_none(positives):
    """As on an accelerator: what asked for a value would raise here."""
    loss_fn = md.SupConDistillLoss(positives=positives)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, keys = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
        labels = torch.zeros(4, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)
        loss = loss_fn(query, keys, *labels, momentum_query=query.detach(), momentum_keys=keys.detach())
        loss.backward()
        assert query.grad.shape == (4, 8)
        assert keys.grad.shape == (30, 8)
