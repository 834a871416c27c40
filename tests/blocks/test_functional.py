"""The small pieces: unit rows, similarities, one step of the moving average."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import reference
from loss_cases import DTYPES, RTOL, assert_close, lists
from momentum_distill import functional as F


def rows(seed=0, n=6, d=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 6),
    d=st.integers(1, 6),
    power=st.integers(-5, 150),
)
def test_unit_rows_equal_the_reference_at_any_magnitude(seed, n, d, power):
    x = rows(seed, n, d) * 10.0**power
    expected = [reference.unit(row) for row in lists(x)]
    assert_close(F.l2_normalize(x), torch.tensor(expected, dtype=torch.float64).reshape(n, d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unit_rows_of_every_dtype_are_computed_wide(dtype):
    x = rows(1, 8, 64, dtype)
    expected = [reference.unit(row) for row in lists(x)]
    assert_close(F.l2_normalize(x), expected, dtype)


def test_squares_neither_overflow_nor_vanish():
    for scale in (1e30, 1e-5, 3e38):
        x = torch.tensor([[3.0, 4.0]]) / 5 * scale
        torch.testing.assert_close(F.l2_normalize(x), torch.tensor([[0.6, 0.8]]))
    half = torch.full((1, 4), 6e4, dtype=torch.float16)
    torch.testing.assert_close(F.l2_normalize(half).float(), torch.full((1, 4), 0.5))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 9e-7])
def test_row_without_direction_is_the_zero_row_with_zero_gradient(scale):
    x = torch.tensor([[1.0, -0.5], [2.0, 1.0]], dtype=torch.float64)
    x[0] *= scale
    x.requires_grad_()
    out = F.l2_normalize(x)
    assert not out[0].any()
    (out * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_threshold_is_the_largest_magnitude_against_eps():
    x = torch.tensor([[0.5, 0.0], [0.2, 0.2]], dtype=torch.float64)
    out = F.l2_normalize(x, eps=0.3)
    assert_close(out, [[1.0, 0.0], [0.0, 0.0]])


def test_nan_stays_in_its_row():
    x = rows(2)
    x[1, 2] = torch.nan
    out = F.l2_normalize(x)
    assert out[1].isnan().all()
    assert out[[0, 2, 3, 4, 5]].isfinite().all()


def test_gradcheck_of_unit_rows():
    assert gradcheck(F.l2_normalize, (rows(3).requires_grad_(),), atol=1e-8)


@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_contrast_logits_equal_the_reference(normalize):
    query, keys = rows(4, 5, 3), rows(5, 7, 3)
    expected = reference.similarities(lists(query), lists(keys), 0.3, normalize)
    assert_close(F.contrast_logits(query, keys, temperature=0.3, normalize=normalize), expected)


def test_gradcheck_of_contrast_logits():
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def f(query, keys, temperature):
        return F.contrast_logits(query, keys, temperature=temperature)

    inputs = (rows(6, 3, 2).requires_grad_(), rows(7, 4, 2).requires_grad_(), temperature)
    assert gradcheck(f, inputs, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995, 1.0])
def test_average_of_many_steps_equals_the_closed_form(decay):
    average = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    kept = list(average)
    history = []
    for step in range(20):
        online = [torch.tensor([0.1 * step, -step]), torch.tensor([[2.0 * step]])]
        history.append(online)
        F.ema_update(average, online, decay=decay)
    assert all(a is b for a, b in zip(average, kept, strict=True))
    expected = reference.ema(3.0, [online[1].item() for online in history], decay)
    assert average[1].item() == pytest.approx(expected, rel=RTOL[torch.float32])
    expected = reference.ema(2.0, [online[0][1].item() for online in history], decay)
    assert average[0][1].item() == pytest.approx(expected, rel=RTOL[torch.float32])


def test_average_takes_no_gradient():
    online = torch.ones(3, requires_grad=True)
    average = torch.zeros(3)
    F.ema_update([average], [online], decay=0.5)
    assert not average.requires_grad
    assert average.tolist() == [0.5] * 3


@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_mean_of_rows_is_that_of_the_rows_that_count(kept, dtype):
    values = torch.tensor([1.0, -2.5, 7.0, 0.25], dtype=dtype, requires_grad=True)
    mask = torch.tensor([row in kept for row in range(4)])
    mean = F.mean_rows(values.masked_fill(~mask, float("nan")), mask=mask)
    assert mean.item() == (values[mask].double().mean().item() if kept else 0.0)
    mean.backward()
    assert values.grad.tolist() == [1 / len(kept) if row in kept else 0.0 for row in range(4)]


def test_mean_of_all_rows_needs_no_mask():
    assert F.mean_rows(torch.tensor([3.0])).item() == 3.0
    assert F.mean_rows(torch.tensor([3.0, 5.0])).item() == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mean_of_16_bit_rows_is_summed_in_float32(dtype):
    values = torch.full((1001,), 1.0, dtype=dtype)
    mean = F.mean_rows(values)
    assert mean.dtype == torch.float32
    assert mean.item() == 1.0
