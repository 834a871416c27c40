"""SupConDistillLoss where inputs are few, huge, tiny, missing or broken."""

import pytest
import torch

import momentum_distill as md
from loss_cases import DTYPES, POSITIVES, assert_close, assert_gradient_close, bits, supcon_case
from momentum_distill import functional as F

pytestmark = pytest.mark.usefixtures("both_ways")

NAN = float("nan")


def run(case, **options):
    """Loss, gradients of queries and keys, after one backward pass."""
    case = case.requires_grad()
    loss = F.supcon_distill_loss(*case.args, **case.momentum, **{"temperature": 0.1, **options})
    loss.sum().backward()
    return loss.detach(), case.query.grad, case.keys.grad


def relabel(case, query_labels, key_labels):
    case.query_labels = torch.tensor(query_labels).expand(len(case.query)).clone()
    case.key_labels = torch.tensor(key_labels).expand(len(case.keys)).clone()
    return case


LEGAL = {
    "batch of zero": lambda **o: supcon_case(0, 0, 9, 4, **o),
    "batch of one": lambda **o: supcon_case(0, 1, 9, 4, **o),
    "no keys": lambda **o: supcon_case(0, 5, 0, 4, **o),
    "nothing at all": lambda **o: supcon_case(0, 0, 0, 4, **o),
    "one key": lambda **o: supcon_case(0, 5, 1, 4, **o),
    "one feature": lambda **o: supcon_case(0, 5, 9, 1, **o),
    "no positive": lambda **o: relabel(supcon_case(0, 5, 9, 4, **o), 0, 1),
    "all positive": lambda **o: relabel(supcon_case(0, 5, 9, 4, **o), 1, 1),
    "one class": lambda **o: supcon_case(0, 5, 9, 4, classes=1, **o),
    "all unlabelled": lambda **o: relabel(supcon_case(0, 5, 9, 4, **o), -2, -2),
    "all queries ignored": lambda **o: relabel(supcon_case(0, 5, 9, 4, **o), -1, 0),
    "all keys ignored": lambda **o: relabel(supcon_case(0, 5, 9, 4, **o), 0, -1),
    "zero vectors": lambda **o: supcon_case(0, 5, 9, 4, **o).map(torch.zeros_like),
    "tiny vectors": lambda **o: supcon_case(0, 5, 9, 4, **o).map(lambda x: 1e-5 * x),
    "features x 1000": lambda **o: supcon_case(0, 5, 9, 4, **o).map(lambda x: 1000 * x),
    "identical rows": lambda **o: supcon_case(0, 5, 9, 4, **o).map(torch.ones_like),
}


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
@pytest.mark.parametrize("name", LEGAL)
def test_legal_inputs_give_finite_losses_and_gradients(name, normalize, dtype):
    for positives in POSITIVES:
        for momentum in (True, False):
            for autocast in (None, torch.bfloat16, torch.float16):
                case = LEGAL[name](dtype=dtype, momentum=momentum)
                options = {"positives": positives, "normalize": normalize}
                with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=bool(autocast)):
                    loss, query_grad, key_grad = run(case, **options)
                assert loss.isfinite()
                assert query_grad.isfinite().all()
                assert key_grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
def test_logits_of_ten_thousand_stay_finite(positives, dtype):
    case = supcon_case(1, 6, 12, 4, dtype=dtype).map(lambda x: 100 * x.sign())
    for sign in (1, -1):
        case.keys = sign * case.keys
        loss, query_grad, key_grad = run(case, positives=positives, normalize=False, temperature=1.0)
        assert loss.isfinite()
        assert query_grad.isfinite().all()
        assert key_grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(dtype):
    def run(autocast):
        case = supcon_case(2, 16, 40, 32, dtype=torch.float32).requires_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.1)
        loss.backward()
        return [bits(x) for x in (loss, case.query.grad, case.keys.grad)]

    assert run(autocast=True) == run(autocast=False)


NO_ROWS = ["batch of zero", "nothing at all", "all queries ignored", "no keys", "all keys ignored"]


@pytest.mark.parametrize("name", NO_ROWS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_no_rows_is_zero_and_connected_to_every_input(name, reduction):
    # A DDP rank with nothing to say must still send zero gradients, not none.
    case = LEGAL[name]().requires_grad()
    loss_fn = md.SupConDistillLoss(reduction=reduction)
    loss = loss_fn(*case.args, **case.momentum)
    assert loss.shape == ()
    assert loss.item() == 0.0
    assert loss.grad_fn is not None
    loss.backward()
    for x in (case.query, case.keys, *loss_fn.parameters()):
        assert x.grad is not None
        assert not x.grad.any()


@pytest.mark.parametrize("n", [0, 5])
def test_reduction_none_has_a_number_for_every_row_and_zero_for_ignored_ones(n):
    case = supcon_case(3, n, 9, 4, ignored=0.5)
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, reduction="none")
    assert loss.shape == (n,)
    assert bits(loss[case.query_labels == -1]) == bits(torch.zeros(n, dtype=loss.dtype)[case.query_labels == -1])
    assert loss[case.query_labels != -1].all()


def test_zero_vectors_get_no_gradient_and_leave_the_others_alone():
    case = supcon_case(4, 5, 9, 4)
    case.query[2] = 0.0
    case.keys[3] = 0.0
    _, query_grad, key_grad = run(case)
    assert not query_grad[2].any()
    assert not key_grad[3].any()
    assert query_grad[[0, 1, 3, 4]].any(dim=1).all()
    assert max(query_grad.abs().max(), key_grad.abs().max()) < 100


BROKEN = ["query", "keys", "momentum_query", "momentum_keys"]


@pytest.mark.grid
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("name", BROKEN)
def test_nan_in_one_present_row_or_key_gives_nan(name, positives, reduction):
    case = supcon_case(5, 5, 9, 4)
    getattr(case, name)[3, 1] = NAN
    options = {"temperature": 0.5, "positives": positives, "reduction": reduction}
    assert F.supcon_distill_loss(*case.args, **case.momentum, **options).isnan()


@pytest.mark.parametrize("name", ["query", "keys"])
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_nan_is_never_a_quiet_zero_where_no_row_has_a_positive(normalize, name):
    case = relabel(supcon_case(5, 5, 9, 4, momentum=False), 0, 1)
    getattr(case, name)[3, 1] = NAN
    loss = F.supcon_distill_loss(*case.args, temperature=0.5, normalize=normalize)
    assert loss.isnan()


@pytest.mark.parametrize("name", ["query", "keys"])
def test_nan_reaches_the_gradient_too(name):
    case = supcon_case(5, 5, 9, 4)
    getattr(case, name)[3, 1] = NAN
    _, query_grad, _ = run(case)
    assert query_grad.isnan().any()


@pytest.mark.grid
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 0.0, 1e30], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_what_an_ignored_row_or_key_holds_changes_no_bit(normalize, positives, garbage):
    case = supcon_case(6, 6, 12, 4, ignored=0.3)
    rows, keys = case.query_labels == -1, case.key_labels == -1
    assert rows.any()
    assert keys.any()
    options = {"normalize": normalize, "positives": positives}
    for reduction in ("mean", "none"):
        expected = run(case, **options, reduction=reduction)
        dirty = case.map(torch.clone)
        for x in (dirty.query, dirty.momentum_query):
            x[rows] = garbage
        for x in (dirty.keys, dirty.momentum_keys):
            x[keys] = garbage
        loss, query_grad, key_grad = run(dirty, **options, reduction=reduction)
        assert bits(loss) == bits(expected[0])
        assert bits(query_grad) == bits(expected[1])
        assert bits(key_grad) == bits(expected[2])
        assert not query_grad[rows].any()
        assert not key_grad[keys].any()


def test_leaving_out_is_the_same_as_ignoring():
    case = supcon_case(7, 6, 12, 4, ignored=0.3)
    rows, keys = case.query_labels != -1, case.key_labels != -1
    loss, query_grad, key_grad = run(case)
    case.query, case.momentum_query = case.query[rows], case.momentum_query[rows]
    case.keys, case.momentum_keys = case.keys[keys], case.momentum_keys[keys]
    case.query_labels, case.key_labels = case.query_labels[rows], case.key_labels[keys]
    cut, cut_query_grad, cut_key_grad = run(case)
    assert_close(cut, loss.item())
    assert_gradient_close(cut_query_grad, query_grad[rows], torch.float64)
    assert_gradient_close(cut_key_grad, key_grad[keys], torch.float64)


def test_no_gradient_flows_into_the_momentum_side():
    case = supcon_case(8).requires_grad()
    case.momentum_query.requires_grad_()
    case.momentum_keys.requires_grad_()
    F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5).backward()
    assert case.query.grad.any()
    assert case.momentum_query.grad is None
    assert case.momentum_keys.grad is None


def test_the_momentum_side_may_be_the_online_tensors_themselves():
    # t -> u uses F_t as query and as momentum query: its gradient is that of the query alone.
    case = supcon_case(9).requires_grad()
    detached = F.supcon_distill_loss(
        *case.args,
        momentum_query=case.query.detach(),
        momentum_keys=case.momentum_keys,
        temperature=0.5,
    )
    shared = F.supcon_distill_loss(
        *case.args, momentum_query=case.query, momentum_keys=case.momentum_keys, temperature=0.5
    )
    (expected,) = torch.autograd.grad(detached, case.query)
    (gradient,) = torch.autograd.grad(shared, case.query)
    assert bits(shared) == bits(detached)
    assert bits(gradient) == bits(expected)


def test_inputs_are_left_as_they_were():
    case = supcon_case(10, ignored=0.3)
    before = [bits(x) for x in (*case.args, *case.momentum.values())]
    run(case)
    assert [bits(x) for x in (*case.args, *case.momentum.values())] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_half_precision_rows_do_not_overflow(dtype):
    case = supcon_case(11, 6, 12, 64, dtype=torch.float64)
    huge = case.map(lambda x: (x / x.abs().max() * 6e4).to(dtype))
    args = [x.double() if x.is_floating_point() else x for x in huge.args]
    momentum = {name: x.double() for name, x in huge.momentum.items()}
    expected = F.supcon_distill_loss(*args, **momentum, temperature=0.1)
    assert_close(run(huge)[0], expected.item(), dtype)


@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_backward_gives_the_same_bits_every_time_under_deterministic_algorithms(normalize):
    case = supcon_case(12, 16, 64, 8, ignored=0.1, unlabelled=0.1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(case, normalize=normalize), run(case, normalize=normalize)
    finally:
        torch.use_deterministic_algorithms(before)
    assert [bits(x) for x in first] == [bits(x) for x in second]


def test_validation_passes_ignored_garbage_and_changes_no_bit():
    case = supcon_case(13, 6, 12, 4, ignored=0.3, unlabelled=0.3)
    expected = run(case)
    case.query[case.query_labels == -1] = NAN
    case.momentum_query[case.query_labels == -1] = NAN
    case.keys[case.key_labels == -1] = NAN
    case.momentum_keys[case.key_labels == -1] = NAN
    assert bits(run(case, validate=True)[0]) == bits(expected[0])


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 3.0), ("alpha", -0.1), ("temperature", 0.0), ("momentum_temperature", torch.nan)]
)
def test_numbers_in_tensors_are_looked_at_with_validate(name, value):
    case = supcon_case(5)
    options = {"temperature": 0.5, **case.momentum, name: torch.tensor(value), "validate": True}
    with pytest.raises(ValueError, match=f"^{name}: expected a finite number in"):
        F.supcon_distill_loss(*case.args, **options)
