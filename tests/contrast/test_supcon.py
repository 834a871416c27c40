"""SupConDistillLoss against the loop reference: values, reductions, dtypes, key parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import momentum_distill as md
import reference
from loss_cases import (
    DTYPES,
    POSITIVES,
    REDUCTIONS,
    assert_close,
    assert_gradient_close,
    bits,
    lists,
    numbers_alone,
    supcon_case,
)
from momentum_distill import functional as F

pytestmark = [pytest.mark.usefixtures("both_ways"), numbers_alone]


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 7),
    q=st.integers(0, 12),
    d=st.integers(1, 5),
    classes=st.integers(1, 4),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    unlabelled=st.sampled_from([0.0, 0.3]),
    momentum=st.booleans(),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    momentum_temperature=st.sampled_from([None, 0.3]),
    alpha=st.sampled_from([0.0, 0.1, 0.4, 0.75, 1.0]),
    positives=st.sampled_from(POSITIVES),
    reduction=st.sampled_from(REDUCTIONS),
    normalize=st.sampled_from([True, "query", False]),
    split=st.integers(0, 12),
)
def test_every_term_equals_the_loop_reference(
    seed, n, q, d, classes, ignored, unlabelled, momentum, momentum_temperature, split, **options
):
    case = supcon_case(seed, n, q, d, classes=classes, ignored=ignored, unlabelled=unlabelled, momentum=momentum)
    if momentum:
        options["momentum_temperature"] = momentum_temperature
    args, momentum_args = case.reference
    expected = reference.supcon_terms(*args, **momentum_args, **options)

    split = min(split, q)  # two parts, one of them empty now and then
    for whole_or_parted in (case, case.split(split, q - split)):
        terms = F.supcon_distill_terms(*whole_or_parted.args, **whole_or_parted.momentum, **options)
        assert_close(terms.total, expected.total)
        assert_close(terms.supervised, expected.supervised)
        assert_close(terms.distill, expected.distill)
        assert int(terms.rows) == expected.rows
        assert int(terms.rows_with_positive) == expected.rows_with_positive


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_every_dtype_keeps_its_bar(dtype, alpha, positives):
    for seed in range(3):
        case = supcon_case(seed, 8, 40, 16, ignored=0.1, unlabelled=0.1, dtype=dtype)
        args, momentum = case.reference
        options = {"temperature": 0.2, "alpha": alpha, "positives": positives}
        loss = F.supcon_distill_loss(*case.args, **case.momentum, **options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(loss, reference.supcon(*args, **momentum, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("momentum", [False, True], ids=["supervised", "distilled"])
def test_query_gradient_equals_the_formula(momentum, positives, dtype):
    case = supcon_case(5, 7, 30, 6, ignored=0.2, unlabelled=0.2, momentum=momentum, dtype=dtype)
    args, momentum_args = case.reference
    options = {"temperature": 0.5, "alpha": 0.3, "positives": positives}
    expected = reference.supcon_query_gradient(*args, **momentum_args, **options)
    case = case.requires_grad()
    F.supcon_distill_loss(*case.args, **case.momentum, **options, normalize=False).backward()
    assert case.query.grad.dtype == dtype
    assert_gradient_close(case.query.grad, expected, dtype)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_query_and_key_gradients_equal_differences_of_the_reference(normalize, positives):
    case = supcon_case(3, 4, 6, 3, ignored=0.2, unlabelled=0.1).requires_grad()
    (query, keys, *labels), momentum = case.reference
    options = {"temperature": 0.7, "positives": positives, "normalize": normalize}
    F.supcon_distill_loss(*case.args, **case.momentum, **options).backward()

    def of_query(q):
        return reference.supcon(q, keys, *labels, **momentum, **options)

    def of_keys(k):
        return reference.supcon(query, k, *labels, **momentum, **options)

    # The differences themselves are good to about 1e-10.
    for grad, f, x in ((case.query.grad, of_query, query), (case.keys.grad, of_keys, keys)):
        expected = torch.tensor(reference.central_differences(f, x), dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9)


def test_temperature_gradient_holds_the_targets_temperature_constant():
    case = supcon_case(4, 5, 9, 3)
    args, momentum = case.reference
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    F.supcon_distill_loss(*case.args, **case.momentum, temperature=temperature).backward()

    def f(x):
        return reference.supcon(*args, **momentum, temperature=x[0][0], momentum_temperature=0.6)

    expected = reference.central_differences(f, [[0.6]])[0][0]
    assert temperature.grad.item() == pytest.approx(expected, rel=1e-8)


def test_targets_use_the_current_temperature_unless_told_otherwise():
    case = supcon_case(6)
    given_twice = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3, momentum_temperature=0.3)
    assert bits(given_twice) == bits(F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3))


@pytest.mark.parametrize("positives", POSITIVES)
def test_key_parts_equal_their_concatenation_and_only_what_requires_gradient_gets_it(positives):
    whole = supcon_case(7, 5, 12, 4, ignored=0.2, unlabelled=0.1).requires_grad()
    options = {"temperature": 0.4, "positives": positives}
    loss = F.supcon_distill_loss(*whole.args, **whole.momentum, **options)
    loss.backward()
    for learned in (0, 2):
        case = whole.requires_grad().split(4, 0, 8)  # batch part, an empty part, queue part
        case.keys = [part.detach().clone() for part in case.keys]
        case.keys[learned].requires_grad_()
        parted = F.supcon_distill_loss(*case.args, **case.momentum, **options)
        parted.backward()
        assert_close(parted, loss.item())
        assert_gradient_close(case.query.grad, whole.query.grad, torch.float64)
        for place, expected in enumerate(whole.keys.grad.split((4, 0, 8))):
            if place == learned:
                assert_gradient_close(case.keys[place].grad, expected, torch.float64)
            else:
                assert case.keys[place].grad is None


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), positives=st.sampled_from(POSITIVES))
def test_the_order_of_the_keys_does_not_matter(seed, positives):
    case = supcon_case(seed, 5, 12, 4, ignored=0.2, unlabelled=0.1).requires_grad()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    options = {"temperature": 0.2, "positives": positives}
    loss = F.supcon_distill_loss(*case.args, **case.momentum, **options)
    (gradient,) = torch.autograd.grad(loss, case.query)
    shuffled = F.supcon_distill_loss(
        case.query,
        case.keys[order],
        case.query_labels,
        case.key_labels[order],
        momentum_query=case.momentum_query,
        momentum_keys=case.momentum_keys[order],
        **options,
    )
    assert_close(shuffled, loss.item())
    (of_shuffled,) = torch.autograd.grad(shuffled, case.query)
    assert_gradient_close(of_shuffled, gradient, torch.float64)


def test_supervised_mean_runs_over_rows_with_a_positive_and_kl_over_all():
    case = supcon_case(9, 4, 8, 3)
    query_labels = torch.tensor([0, 99, -1, -2])  # positives, no positive, absent, unlabelled
    key_labels = torch.tensor([0, 0, 1, 1, 2, 2, -2, -1])
    args = (case.query, case.keys, query_labels, key_labels)
    rows = reference.supcon_rows(*(lists(x) for x in args), **case.reference[1], temperature=0.5)
    terms = F.supcon_distill_terms(*args, **case.momentum, temperature=0.5, alpha=0.25)
    assert int(terms.rows) == 3
    assert int(terms.rows_with_positive) == 1
    assert_close(terms.supervised, rows[0].supervised)
    kl = (rows[0].distill + rows[1].distill + rows[3].distill) / 3
    assert_close(terms.distill, kl)
    assert_close(terms.total, 0.75 * rows[0].supervised + 0.25 * kl)


def test_label_of_ignore_index_is_free_to_choose():
    case = supcon_case(10, 6, 12, 4, ignored=0.3)
    options = {"temperature": 0.5, **case.momentum}
    expected = F.supcon_distill_loss(*case.args, **options)
    renamed = [x.masked_fill(x == -1, 7) for x in (case.query_labels, case.key_labels)]
    loss = F.supcon_distill_loss(case.query, case.keys, *renamed, **options, ignore_index=7)
    assert bits(loss) == bits(expected)


def test_label_minus_one_is_refused_where_ignore_index_is_another():
    """The empty slots of a queue would be negatives."""
    case = supcon_case(11, 6, 12, 4, ignored=0.3)
    with pytest.raises(ValueError, match=r"^query_labels: expected .* -100 \(absent\) .*, got -1 in row 2"):
        F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, ignore_index=-100)


@pytest.mark.parametrize("positives", POSITIVES)
def test_both_directions_with_batch_and_queue_as_keys_equal_the_papers_total(positives):
    text, audio = supcon_case(20, 5, 7, 4, ignored=0.2), supcon_case(21, 5, 7, 4)
    labels, queue_labels = text.query_labels, text.key_labels
    t, u, u_m = text.query.clone().requires_grad_(), audio.query.clone().requires_grad_(), audio.momentum_query
    t_keys, u_keys, u_m_keys = (t, text.keys), (u, audio.keys), (u_m, audio.momentum_keys)
    key_labels = (labels, queue_labels)
    loss_fn = md.SupConDistillLoss(temperature=0.3, alpha=0.6, positives=positives)
    t_to_u = loss_fn(t, u_keys, labels, key_labels, momentum_query=t, momentum_keys=u_m_keys)
    u_to_t = loss_fn(u, t_keys, labels, key_labels, momentum_query=u_m, momentum_keys=t_keys)
    loss = (t_to_u + u_to_t) / 2

    def total(t, u):
        u_m_keys = lists(u_m) + lists(audio.momentum_keys)
        keys = t + lists(text.keys), u + lists(audio.keys), u_m_keys, lists(labels), lists(torch.cat(key_labels))
        return reference.feature_distillation(t, u, lists(u_m), *keys, temperature=0.3, alpha=0.6, positives=positives)

    assert_close(loss, total(lists(t), lists(u)))
    loss.backward()
    # The student's rows act as queries and as keys, but never through a target.
    expected = reference.central_differences(lambda x: total(lists(t), x), lists(u))
    torch.testing.assert_close(u.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("momentum", [False, True], ids=["supervised", "distilled"])
@pytest.mark.parametrize("positives", POSITIVES)
def test_class_equals_function_and_terms_equal_forward(positives, momentum, reduction):
    case = supcon_case(12, 6, 12, 4, ignored=0.2, unlabelled=0.2, momentum=momentum)
    options = {"alpha": 0.3, "positives": positives, "reduction": reduction}
    loss_fn = md.SupConDistillLoss(temperature=0.25, **options)
    loss = loss_fn(*case.args, **case.momentum)
    terms = loss_fn.terms(*case.args, **case.momentum)
    expected = F.supcon_distill_terms(*case.args, **case.momentum, temperature=0.25, **options)
    assert bits(loss) == bits(terms.total)
    for ours, theirs in zip(terms, expected, strict=True):
        assert_close(torch.as_tensor(ours), lists(torch.as_tensor(theirs)))
    if momentum:
        assert_close(terms.total, lists(0.7 * terms.supervised + 0.3 * terms.distill))
    else:
        assert bits(terms.total) == bits(terms.supervised)
        assert not terms.distill.any()


@pytest.mark.parametrize("alpha", [0.0, 0.9, torch.tensor(0.9)], ids=str)
def test_alpha_of_the_call_goes_before_alpha_of_the_class(alpha):
    case = supcon_case(13, momentum=True)
    loss_fn = md.SupConDistillLoss(temperature=0.5, alpha=0.4)
    expected = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, alpha=alpha)
    tolerance = torch.float32 if isinstance(alpha, torch.Tensor) else torch.float64
    for value in (
        loss_fn(*case.args, **case.momentum, alpha=alpha),
        loss_fn.terms(*case.args, **case.momentum, alpha=alpha).total,
    ):
        assert_close(value, expected.item())
    args, momentum = case.reference
    by_loops = reference.supcon(*args, **momentum, temperature=0.5, alpha=float(alpha))
    assert_close(expected, by_loops, tolerance)
    assert bits(loss_fn(*case.args, **case.momentum)) != bits(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_alpha_may_be_a_tensor_of_any_precision_without_widening_the_loss(dtype):
    case = supcon_case(13, dtype=torch.float32)
    expected = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, alpha=0.25)
    alpha = torch.tensor(0.25, dtype=dtype)
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, alpha=alpha)
    assert loss.dtype == torch.float32
    assert_close(loss, expected.item(), torch.float32)


@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_strided_expanded_and_transposed_inputs_give_the_same_loss(normalize):
    case = supcon_case(15, 6, 12, 4)
    options = {"temperature": 0.5, "normalize": normalize}
    one_label = torch.tensor(1).expand(12)
    dense = (case.query, case.keys, case.query_labels, one_label.contiguous())
    expected = F.supcon_distill_loss(*dense, **case.momentum, **options)

    def strided(x):
        return torch.stack([x, x.new_full(x.shape, torch.nan)], dim=-1)[..., 0]

    loss = F.supcon_distill_loss(
        case.query.t().contiguous().t(),
        strided(case.keys),
        torch.stack([case.query_labels, case.query_labels + 1], dim=1)[:, 0],
        one_label,
        momentum_query=strided(case.momentum_query),
        momentum_keys=case.momentum_keys.t().contiguous().t(),
        **options,
    )
    assert_close(loss, expected.item())

    same_row = case.query[:1].expand(6, -1)
    loss = F.supcon_distill_loss(same_row, *case.args[1:], temperature=0.5)
    copied = F.supcon_distill_loss(same_row.contiguous(), *case.args[1:], temperature=0.5)
    assert_close(loss, copied.item())


# ---------------------------------------------------------------------------------------------------- exclude_self


def supcon_of_a_batch(rows, labels, temperature):
    """SupCon as its authors define it: each row against all others, positives outside the logarithm."""
    losses = []
    for i in range(len(rows)):
        others = torch.arange(len(rows)) != i
        logits = rows[others] @ rows[i] / temperature
        if (positive := labels[others] == labels[i]).any():
            losses.append(-logits.log_softmax(dim=0)[positive].mean())
    return torch.stack(losses).mean()


def test_a_batch_that_excludes_itself_is_supcon():
    rows = torch.nn.functional.normalize(supcon_case(30, 24, 1, 5).query, dim=1)
    labels = torch.arange(24) % 5
    labels[7] = 9  # of no one's class
    results = []
    for loss_fn in (
        lambda x: supcon_of_a_batch(x, labels, 0.2),
        lambda x: md.SupConDistillLoss(temperature=0.2, normalize=False, exclude_self=True)(x, x, labels, labels),
    ):
        leaf = rows.clone().requires_grad_()
        loss = loss_fn(leaf)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with_itself = F.supcon_distill_loss(rows, rows, labels, labels, temperature=0.2)
    assert with_itself < results[1][0] - 0.1


@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
def test_each_row_sees_all_keys_but_its_own(positives, normalize):
    """As if it were called alone, with its own key taken out of the batch, beside a queue."""
    case = supcon_case(31, 7, 18, 4, ignored=0.2, unlabelled=0.2)
    options = {"temperature": 0.3, "alpha": 0.3, "positives": positives, "normalize": normalize, "reduction": "none"}

    def at_once(case):
        parted = case.split(7, 11)
        return F.supcon_distill_terms(*parted.args, **parted.momentum, exclude_self=True, **options)

    def row_by_row(case):
        rows = []
        for i in range(7):
            others = torch.arange(18) != i
            arguments = case.query[i : i + 1], case.keys[others], case.query_labels[i : i + 1], case.key_labels[others]
            momentum = {
                "momentum_query": case.momentum_query[i : i + 1],
                "momentum_keys": case.momentum_keys[others],
            }
            rows.append(F.supcon_distill_terms(*arguments, **momentum, **options)[:3])
        return [torch.cat(terms) for terms in zip(*rows, strict=True)]

    results = []
    for terms in (at_once, row_by_row):
        leaves = case.requires_grad()
        total, supervised, distill = terms(leaves)[:3]
        weighted = [total @ torch.arange(7.0).double(), supervised.sum(), 2 * distill.sum()]
        results.append([*weighted, *torch.autograd.grad(sum(weighted), (leaves.query, leaves.keys))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("positives", POSITIVES)
def test_a_row_alone_that_does_not_see_itself_adds_nothing(positives):
    row, label = torch.randn(1, 3, requires_grad=True), torch.tensor([0])
    momentum = {"momentum_query": row.detach(), "momentum_keys": row.detach()}
    options = {"temperature": 0.1, "positives": positives, "exclude_self": True}
    terms = F.supcon_distill_terms(row, row, label, label, **momentum, **options)
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert int(terms.rows_with_positive) == 0
    assert not row.grad.any()


def test_its_own_key_costs_the_others_no_digit():
    """A row a million times as long as its positives: their sum must not be what is left of one with it."""
    rows = torch.tensor([[1e6, 0.0], [0.3, 0.1], [0.2, -0.4]], dtype=torch.float64)
    labels = torch.zeros(3, dtype=torch.int64)
    options = {"temperature": 1e6, "normalize": False, "exclude_self": True}
    losses = [F.supcon_distill_loss(x, x, labels, labels, **options) for x in (rows, rows.float())]
    assert_close(losses[1], losses[0], torch.float32)
