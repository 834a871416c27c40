"""MomentumFusionFactors: Eq. 12 with factors that are moving averages of what is learned."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import momentum_distill as md
import reference
from loss_cases import assert_close, bits, lists

NAMES = ("t", "a", "v")


def features(seed=0, n=5, dtype=torch.float64, widths=(4, 3, 2)):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
        for name, d in zip(NAMES, widths, strict=True)
    }


def averages(fuse):
    return list(fuse.factors().values())


def moved(decay=0.5, updates=1):
    """A module whose factors are no longer one."""
    fuse = md.MomentumFusionFactors(NAMES, decay=decay)
    for k in range(updates):
        with torch.no_grad():
            fuse.weight.copy_(torch.tensor([2.0 + k, 0.5, -1.0]))
        fuse.update()
    return fuse


def test_factors_are_one_at_first_and_change_nothing():
    fuse = md.MomentumFusionFactors(NAMES)
    assert fuse.factors() == dict.fromkeys(NAMES, 1.0)
    x = features()
    out = fuse(x)
    assert list(out) == list(NAMES)
    assert all(torch.equal(out[name], x[name]) for name in NAMES)


def test_init_sets_all_factors_or_each_its_own():
    assert averages(md.MomentumFusionFactors(NAMES, init=0.25)) == [0.25] * 3
    each = {"t": 1.0, "a": 0.5, "v": 0.25}
    assert md.MomentumFusionFactors(NAMES, init=each).factors() == each


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_forward_multiplies_by_the_average_not_by_the_parameter(dtype):
    fuse = moved()  # averages 1.5, 0.75, 0.0; parameter 2, 0.5, -1
    x = features(1, dtype=dtype)
    factors = {"t": 1.5, "a": 0.75, "v": 0.0}
    assert fuse.factors() == factors
    expected = reference.weighted_modalities({k: lists(v) for k, v in x.items()}, factors)
    for name, out in fuse(x).items():
        assert out.dtype == dtype
        assert_close(out, expected[name], dtype)


def test_the_gradient_goes_straight_through_to_the_parameter():
    fuse = moved()
    x = {name: value.requires_grad_() for name, value in features(2).items()}
    upstream = features(3)
    out = fuse(x)
    sum((out[name] * upstream[name]).sum() for name in NAMES).backward()
    expected = [(x[name] * upstream[name]).sum().item() for name in NAMES]
    torch.testing.assert_close(fuse.weight.grad, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    for name, factor in fuse.factors().items():
        assert_close(x[name].grad, lists(factor * upstream[name]))


@settings(max_examples=30)
@given(
    values=st.lists(st.floats(-3, 3, width=32), max_size=30),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.995, 1.0]),
    init=st.sampled_from([1.0, 0.5]),
)
def test_average_follows_the_closed_form(values, decay, init):
    fuse = md.MomentumFusionFactors(["only"], init=init, decay=decay)
    for value in values:
        with torch.no_grad():
            fuse.weight.fill_(value)
        fuse.update()
    expected = reference.ema(init, values, decay)
    assert fuse.factors()["only"] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_forward_alone_moves_nothing():
    fuse = md.MomentumFusionFactors(NAMES)
    with torch.no_grad():
        fuse.weight.fill_(3.0)
    fuse(features())
    fuse.eval()(features())
    assert fuse.factors() == dict.fromkeys(NAMES, 1.0)


def test_update_needs_no_graph_and_leaves_none():
    fuse = md.MomentumFusionFactors(NAMES)
    fuse(features())["t"].sum().backward()
    gradient = fuse.weight.grad.clone()
    fuse.update()
    assert not fuse.average.requires_grad
    assert torch.equal(fuse.weight.grad, gradient)


def test_update_between_forward_and_backward_is_harmless():
    # The average is written in place; what backward needs must have been kept.
    fuse = moved()
    x = {name: value.requires_grad_() for name, value in features(4).items()}
    before = fuse.factors()
    total = sum(out.sum() for out in fuse(x).values())
    with torch.no_grad():
        fuse.weight.fill_(9.0)
    fuse.update()
    total.backward()
    for name, factor in before.items():
        assert_close(x[name].grad, lists(torch.full_like(x[name], factor)))


def test_training_turns_the_helpful_modality_up_slowly():
    torch.manual_seed(0)
    fuse = md.MomentumFusionFactors(NAMES, decay=0.9)
    optimizer = torch.optim.SGD(fuse.parameters(), lr=0.05)
    x = features(5, dtype=torch.float32)
    for _ in range(50):
        optimizer.zero_grad()
        out = fuse(x)
        ((out["t"] - 2 * x["t"]).square().mean() + out["v"].square().mean()).backward()
        optimizer.step()
        fuse.update()
    factors = fuse.factors()
    assert factors["t"] > 1.3
    assert factors["a"] == 1.0
    assert factors["v"] < 0.7


def test_any_names_and_any_number_of_modalities():
    names = ["video.rgb", "1", "module"]
    fuse = md.MomentumFusionFactors(names)
    assert list(fuse({name: torch.ones(2, 3) for name in names})) == names
    assert list(fuse.factors()) == names


@pytest.mark.parametrize("n", [0, 1])
def test_tiny_batches_pass_and_stay_connected(n):
    fuse = md.MomentumFusionFactors(NAMES)
    out = fuse(features(6, n))
    sum(x.sum() for x in out.values()).backward()
    assert fuse.weight.grad.isfinite().all()
    assert fuse.weight.grad.any() == bool(n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_features_keep_their_dtype_and_finite_gradients(dtype):
    fuse = moved().to(dtype)
    assert fuse.average.dtype == torch.float32
    x = {name: value.requires_grad_() for name, value in features(7, dtype=dtype).items()}
    out = fuse(x)
    sum(value.float().sum() for value in out.values()).backward()
    for name, value in out.items():
        assert value.dtype == dtype
        assert x[name].grad.isfinite().all()
    assert fuse.weight.grad.isfinite().all()


def test_many_small_updates_are_not_lost_under_half_precision():
    fuse = md.MomentumFusionFactors(["only"], decay=0.999).half()
    with torch.no_grad():
        fuse.weight.fill_(2.0)
    for _ in range(1000):
        fuse.update()
    expected = reference.ema(1.0, [2.0] * 1000, 0.999)
    assert fuse.factors()["only"] == pytest.approx(expected, rel=1e-4)


def test_nan_features_give_nan_in_their_own_row_and_modality_alone():
    x = features(8)
    x["a"][2, 1] = torch.nan
    out = md.MomentumFusionFactors(NAMES)(x)
    assert out["a"].isnan().sum() == 1
    assert not out["t"].isnan().any()


def test_state_dict_goes_on_bit_for_bit():
    fuse = moved(0.9, 3)
    other = md.MomentumFusionFactors(NAMES, decay=0.9)
    other.load_state_dict(fuse.state_dict())
    for module in (fuse, other):
        module.update()
    assert bits(other.average) == bits(fuse.average)
    assert bits(other.weight) == bits(fuse.weight)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_bit_for_bit_and_on_their_own(copy_of):
    fuse = moved(0.9, 3)
    other = copy_of(fuse)
    before = fuse.factors()
    other.update()
    assert fuse.factors() == before
    fuse.update()
    assert other.factors() == fuse.factors()


def test_average_is_a_buffer_and_weight_the_only_parameter():
    fuse = md.MomentumFusionFactors(NAMES)
    assert [name for name, _ in fuse.named_parameters()] == ["weight"]
    assert [name for name, _ in fuse.named_buffers()] == ["average"]


def test_factors_inside_an_average_have_nothing_to_update():
    """They follow the model's own, through the wrapper: no warning that `update()` was never called."""
    model = Fused()
    average = md.EMAWrapper(model, decay=0.9)
    for _ in range(150):
        with torch.no_grad():
            model.fuse.weight.add_(0.01)
        model.fuse.update()
        average.update(model)
        average(torch.ones(2, 3))


class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fuse = md.MomentumFusionFactors(["text"])

    def forward(self, text):
        return self.fuse({"text": text})["text"]


@pytest.mark.parametrize("names", [["a", "t"], ["t", "v"], ["t", "a", "v"]], ids=str)
def test_a_state_of_other_modalities_or_in_another_order_is_refused(names):
    state = md.MomentumFusionFactors(["t", "a"], init={"t": 2.0, "a": 0.5}).state_dict()
    fuse = md.MomentumFusionFactors(names)
    with pytest.raises(ValueError, match=r"^state_dict: expected modalities \[.*\], got \['t', 'a'\]"):
        fuse.load_state_dict(state)
    assert set(averages(fuse)) == {1.0}


def test_a_state_from_before_names_were_saved_is_loaded():
    state = md.MomentumFusionFactors(["t", "a"], init={"t": 2.0, "a": 0.5}).state_dict()
    del state["_extra_state"]
    fuse = md.MomentumFusionFactors(["t", "a"])
    fuse.load_state_dict(state)
    assert averages(fuse) == [2.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_learned_in_small_steps_is_never_in_16_bits(dtype):
    torch.set_default_dtype(dtype)
    try:
        made = [md.MomentumFusionFactors(["t"]), md.SupConDistillLoss(), md.SigmoidDistillLoss()]
    finally:
        torch.set_default_dtype(torch.float32)
    for module in made:
        narrow = {name: x.to(dtype) if x.is_floating_point() else x for name, x in module.state_dict().items()}
        for _ in range(2):
            tensors = [*module.parameters(), *module.buffers()]
            assert all(x.dtype in (torch.float32, torch.int64) for x in tensors)
            module.load_state_dict(narrow, assign=True)
        assert all(isinstance(x, torch.nn.Parameter) for x in module.parameters())
