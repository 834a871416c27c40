"""Mistakes seen in other contrastive losses, one test each, named after what went wrong there."""

import math

import pytest
import torch

import reference
from loss_cases import assert_close, assert_gradient_close, bits, lists, supcon_case
from momentum_distill import functional as F

pytestmark = pytest.mark.usefixtures("both_ways")


def with_labels(case, query_labels, key_labels):
    case.query_labels = torch.tensor(query_labels)
    case.key_labels = torch.tensor(key_labels)
    return case


def test_no_positive_at_all_gives_zero_not_nan_with_zero_gradient():
    case = with_labels(supcon_case(1, 2, 3, 3, momentum=False), [0, 1], [2, 3, 4]).requires_grad()
    loss = F.supcon_distill_loss(*case.args, temperature=0.5)
    loss.backward()
    assert loss.item() == 0.0
    assert not case.query.grad.any()


def test_no_positive_at_all_keeps_the_momentum_term():
    case = with_labels(supcon_case(1, 2, 3, 3), [0, 1], [2, 3, 4])
    args, momentum = case.reference
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, alpha=0.5)
    assert loss > 0.01
    assert_close(loss, reference.supcon(*args, **momentum, temperature=0.5, alpha=0.5))


def test_all_positive_is_not_zero_for_want_of_negatives():
    case = with_labels(supcon_case(2, 3, 5, 3, momentum=False), [1] * 3, [1] * 5)
    loss = F.supcon_distill_loss(*case.args, temperature=0.1)
    assert loss > math.log(5)
    assert_close(loss, reference.supcon(*case.reference[0], temperature=0.1))


def test_empty_queue_is_zero_and_brings_no_random_negatives():
    case = supcon_case(3, 3, 4, 3, momentum=False)
    nothing, no_labels = case.keys[:0], case.key_labels[:0]
    args = (case.query, nothing, case.query_labels, no_labels)
    assert F.supcon_distill_loss(*args, temperature=0.1).item() == 0.0
    with_batch = F.supcon_distill_loss(
        case.query,
        (case.keys, nothing),
        case.query_labels,
        (case.key_labels, no_labels),
        temperature=0.1,
    )
    assert_close(with_batch, F.supcon_distill_loss(*case.args, temperature=0.1).item())


def test_one_row_and_one_key_is_no_log_of_zero():
    one = torch.tensor([[0.3, 0.4]], dtype=torch.float64)
    loss = F.supcon_distill_loss(one, one, torch.tensor([0]), torch.tensor([0]), temperature=0.1)
    assert loss.item() == pytest.approx(0.0, abs=1e-14)


def test_nan_key_in_the_queue_part_does_not_switch_the_loss_off():
    case = supcon_case(4, momentum=False)
    case.keys[7] = torch.nan
    assert F.supcon_distill_loss(*case.split(4, 6).args, temperature=0.1).isnan()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e-8])
def test_gradient_of_a_zero_vector_is_not_astronomic(scale):
    case = supcon_case(5, momentum=False)
    case.query[1] *= scale
    case.keys[1] *= scale
    case = case.requires_grad()
    F.supcon_distill_loss(*case.args, temperature=0.1).backward()
    assert case.query.grad.norm() < 1e2
    assert case.keys.grad.norm() < 1e2


def test_smallest_direction_has_a_gradient_bounded_by_its_length():
    # Just above the threshold of 1e-6 the slope of x / |x| is 1e6, and no more.
    case = supcon_case(5, momentum=False)
    case.query[1] *= 2e-6 / case.query[1].abs().max()
    case = case.requires_grad()
    F.supcon_distill_loss(*case.args, temperature=0.1).backward()
    assert 0.0 < case.query.grad[1].norm() < 1e7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_features_a_thousand_times_too_long_do_not_matter(dtype):
    case = supcon_case(7, 6, 12, 4, dtype=dtype)
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.1)
    long = case.map(lambda x: 1000 * x)
    assert_close(F.supcon_distill_loss(*long.args, **long.momentum, temperature=0.1), loss.item(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_keep_loss_and_gradient(dtype):
    case = supcon_case(9, 16, 512, 64, momentum=False, dtype=dtype).requires_grad()
    wide = case.map(torch.Tensor.double).requires_grad()
    loss = F.supcon_distill_loss(*case.args, temperature=0.07)
    loss.backward()
    expected = F.supcon_distill_loss(*wide.args, temperature=0.07)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert_gradient_close(case.query.grad, wide.query.grad, dtype)
    assert_gradient_close(case.keys.grad, wide.keys.grad, dtype)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0, 5.0])
def test_no_hidden_factor_of_temperature_over_base_temperature(temperature):
    x = torch.ones(16, 4, dtype=torch.float64)
    labels = torch.zeros(16, dtype=torch.long)
    loss = F.supcon_distill_loss(x, x[1:], labels, labels[1:], temperature=temperature)
    assert loss.item() == pytest.approx(math.log(15), rel=1e-12)


def test_distill_term_is_a_divergence_not_a_cross_entropy():
    case = supcon_case(10)
    terms = F.supcon_distill_terms(*case.args, momentum_query=case.query, momentum_keys=case.keys, temperature=0.2)
    assert terms.distill.item() == pytest.approx(0.0, abs=1e-13)


def test_distill_term_is_the_kl_of_targets_from_predictions_not_the_reverse():
    case = with_labels(supcon_case(11, 2, 4, 3), [0, 1], [0, 1, 0, 1])
    args, momentum = case.reference
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.2, alpha=1.0)
    forward = reference.supcon(*args, **momentum, temperature=0.2, alpha=1.0)
    swapped = (momentum["momentum_query"], momentum["momentum_keys"], *args[2:])
    online = {"momentum_query": args[0], "momentum_keys": args[1]}
    reverse = reference.supcon(*swapped, **online, temperature=0.2, alpha=1.0)
    assert abs(forward - reverse) > 1e-3
    assert_close(loss, forward)


def test_soft_targets_run_over_the_keys_not_over_the_batch():
    # Shifting one query's momentum logits changes that row alone.
    case = supcon_case(12)
    options = {"temperature": 0.5, "alpha": 1.0, "reduction": "none"}
    before = F.supcon_distill_loss(*case.args, **case.momentum, **options)
    case.momentum_query[2] = -case.momentum_query[2]
    after = F.supcon_distill_loss(*case.args, **case.momentum, **options)
    changed = before != after
    assert changed.tolist() == [i == 2 for i in range(len(before))]


def test_kl_is_averaged_over_rows_not_over_rows_times_keys():
    case = with_labels(supcon_case(14, 3, 8, 4), [-2] * 3, [0] * 8)
    args, momentum = case.reference
    total = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, alpha=1.0)
    rows = [row.distill for row in reference.supcon_rows(*args, **momentum, temperature=0.5)]
    assert_close(total, sum(rows) / 3)
    summed = {"temperature": 0.5, "alpha": 1.0, "reduction": "sum"}
    assert_close(F.supcon_distill_loss(*case.args, **case.momentum, **summed), sum(rows))


def test_labels_with_gaps_and_huge_ids_are_only_compared():
    # Table III's instance policy: sample ids as labels, nothing may be allocated by their size.
    case = supcon_case(15, 6, 12, 4)
    ids = torch.tensor([3, 2**40, 2**62])
    expected = F.supcon_distill_loss(*case.args, temperature=0.5)
    loss = F.supcon_distill_loss(case.query, case.keys, ids[case.query_labels], ids[case.key_labels], temperature=0.5)
    assert_close(loss, expected.item())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_narrow_integer_labels_are_labels_too(dtype):
    case = supcon_case(16, ignored=0.2, unlabelled=0.2)
    expected = F.supcon_distill_loss(*case.args, temperature=0.5)
    narrow = (case.query_labels.to(dtype), case.key_labels.to(dtype))
    loss = F.supcon_distill_loss(case.query, case.keys, *narrow, temperature=0.5)
    assert bits(loss) == bits(expected)


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 254, -2), (torch.uint8, 255, -1), (torch.int16, 32767, -32769)],
    ids=str,
)
def test_labels_are_not_wrapped_onto_the_ignore_index(dtype, label, ignore_index):
    # Compared in eight bits, 255 is -1: a row that is there would be taken for an absent one.
    case = supcon_case(16, momentum=False)
    labels = [x.masked_fill(x == 2, label) for x in (case.query_labels, case.key_labels)]
    options = {"temperature": 0.5, "ignore_index": ignore_index}
    expected = F.supcon_distill_terms(case.query, case.keys, *labels, **options)
    assert int(expected.rows) == 6
    narrow = [x.to(dtype) for x in labels]
    terms = F.supcon_distill_terms(case.query, case.keys, *narrow, **options)
    assert [lists(x) for x in terms] == [lists(x) for x in expected]
