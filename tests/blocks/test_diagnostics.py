"""What one watches while training, against the loop reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from loss_cases import DTYPES, assert_close, lists
from momentum_distill import diagnostics
from momentum_distill import functional as F


def rows(seed=0, n=6, d=4, dtype=torch.float64, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) + shift).to(dtype)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 8),
    d=st.integers(1, 5),
    exponent=st.sampled_from([1.0, 2.0, 3.0]),
    scale=st.sampled_from([0.5, 2.0]),
)
def test_geometry_equals_the_loop_reference(seed, n, d, exponent, scale):
    x, y = rows(seed, n, d), rows(seed + 1, n, d, shift=0.5)
    a, b = lists(x), lists(y)
    assert_close(diagnostics.modality_gap(x, y), reference.modality_gap(a, b))
    assert_close(diagnostics.alignment(x, y, exponent=exponent), reference.alignment(a, b, exponent))
    assert_close(diagnostics.uniformity(x, scale=scale), reference.uniformity(a, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bar(dtype):
    x, y = rows(1, 16, 8, dtype), rows(2, 16, 8, dtype, shift=1.0)
    a, b = lists(x), lists(y)
    assert_close(diagnostics.modality_gap(x, y), reference.modality_gap(a, b), dtype)
    assert_close(diagnostics.alignment(x, y), reference.alignment(a, b), dtype)
    assert_close(diagnostics.uniformity(x), reference.uniformity(a), dtype)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_bound_on_the_information_is_log_of_keys_minus_loss(as_tensor):
    loss = torch.tensor(1.25, dtype=torch.float64) if as_tensor else 1.25
    bound = diagnostics.mutual_information_bound(loss, 1024)
    assert bound.shape == ()
    expected = reference.mutual_information_bound(1.25, 1024)
    assert bound.item() == pytest.approx(expected, rel=1e-12 if as_tensor else 1e-6)


def test_a_loss_that_is_no_number_stops_no_log():
    for loss in (math.nan, math.inf):
        bounds = [diagnostics.mutual_information_bound(given, 8).item() for given in (loss, torch.tensor(loss))]
        assert str(bounds[0]) == str(bounds[1]) == str(-loss)


def test_a_loss_that_knows_nothing_gives_a_bound_of_zero():
    x = torch.ones(3, 4, dtype=torch.float64)
    labels = torch.arange(3)
    loss = F.supcon_distill_loss(x, x, labels, labels, temperature=0.5)
    assert diagnostics.mutual_information_bound(loss, 3).item() == pytest.approx(0.0, abs=1e-14)


def test_equal_clouds_have_no_gap_and_perfect_alignment():
    x = rows(5)
    assert diagnostics.modality_gap(x, x).item() == 0.0
    assert diagnostics.alignment(x, 3 * x).item() == pytest.approx(0.0, abs=1e-14)


def test_collapsed_features_are_not_uniform_at_all():
    assert diagnostics.uniformity(torch.ones(5, 3, dtype=torch.float64)).item() == pytest.approx(0.0, abs=1e-14)


def test_length_of_the_rows_does_not_matter():
    x, y = rows(6), rows(7)
    for f in (diagnostics.modality_gap, diagnostics.alignment):
        assert_close(f(1000 * x, 0.01 * y), f(x, y).item())
    assert_close(diagnostics.uniformity(1000 * x), diagnostics.uniformity(x).item())


@pytest.mark.parametrize("name", ["modality_gap", "alignment", "uniformity"])
def test_nan_stays_nan(name):
    x = rows(8)
    x[2, 1] = math.nan
    args = (x,) if name == "uniformity" else (x, rows(9))
    assert getattr(diagnostics, name)(*args).isnan()
