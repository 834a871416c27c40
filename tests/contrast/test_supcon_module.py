"""SupConDistillLoss as a module: its temperature, its state, what it refuses."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import momentum_distill as md
from loss_cases import assert_close, bits, numbers_alone, supcon_case
from momentum_distill import _temperature
from momentum_distill import functional as F

LOW, HIGH = 0.01, 10.0  # the default range


pytestmark = [pytest.mark.usefixtures("both_ways"), numbers_alone]


def aligned_case(sign=1.0):
    """Every query beside its own positive (or opposite to it): a smaller (larger) tau is better."""
    x = torch.eye(4)
    return sign * x, x, torch.arange(4), torch.arange(4)


def train(loss_fn, sign, optimizer, steps):
    """Temperatures after each step."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(*aligned_case(sign)).backward()
        optimizer.step()
        seen.append(loss_fn.temperature.item())
    return seen


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1 / 3, LOW, HIGH])
@pytest.mark.parametrize("learnable", [True, False])
def test_temperature_reads_back_to_the_last_digit(learnable, temperature):
    loss_fn = md.SupConDistillLoss(temperature=temperature, learnable_temperature=learnable)
    assert loss_fn.temperature.shape == ()
    assert not loss_fn.temperature.requires_grad
    assert loss_fn.temperature.item() == temperature


@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
@pytest.mark.parametrize("ignore_index", [-1, 2, -100])
def test_every_option_of_the_class_reaches_the_function(ignore_index, normalize):
    case = supcon_case(3, 6, 6, 4, ignored=0.2, unlabelled=0.2)
    for name in ("query_labels", "key_labels"):
        setattr(case, name, getattr(case, name).masked_fill(getattr(case, name) == -1, ignore_index))
    options = {"ignore_index": ignore_index, "normalize": normalize, "alpha": 0.7, "exclude_self": ignore_index == 2}
    loss = md.SupConDistillLoss(temperature=0.3, **options)(*case.args, **case.momentum)
    expected = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3, **options)
    assert_close(loss, expected.item())


def test_one_parameter_where_learnable_and_none_where_not():
    names = [name for name, _ in md.SupConDistillLoss().named_parameters()]
    assert names == ["log_temperature_ratio"]
    assert not list(md.SupConDistillLoss(learnable_temperature=False).parameters())


@pytest.mark.parametrize("name", ["half", "bfloat16", "float", "double"])
def test_casting_the_module_keeps_the_temperature(name):
    loss_fn = md.SupConDistillLoss(temperature=0.07)
    with torch.no_grad():
        loss_fn.log_temperature_ratio.fill_(0.1234567)
    before = loss_fn.temperature.item()
    getattr(loss_fn, name)()
    assert loss_fn.log_temperature_ratio.dtype in (torch.float32, torch.float64)
    assert loss_fn.temperature.item() == before


def test_casting_a_model_that_holds_the_loss_keeps_the_temperature():
    model = torch.nn.ModuleDict({"loss": md.SupConDistillLoss(), "head": torch.nn.Linear(2, 2)})
    model.bfloat16()
    assert model["head"].weight.dtype == torch.bfloat16
    assert model["loss"].log_temperature_ratio.dtype == torch.float32


def test_learning_the_temperature_lowers_the_loss():
    loss_fn = md.SupConDistillLoss(temperature=0.5)
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.1)
    before = loss_fn(*aligned_case()).item()
    seen = train(loss_fn, 1.0, optimizer, 20)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.5
    assert loss_fn(*aligned_case()).item() < before


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["down", "up"])
@pytest.mark.parametrize(("kind", "rate"), [("SGD", 1e3), ("SGD", 10.0), ("Adam", 1.0), ("Adam", 20.0)])
def test_temperature_stays_in_range_and_comes_back_under_large_steps(kind, rate, sign):
    loss_fn = md.SupConDistillLoss(temperature=0.5)
    optimizer = getattr(torch.optim, kind)(loss_fn.parameters(), lr=rate)
    seen = train(loss_fn, sign, optimizer, 8)
    assert all(LOW <= x <= HIGH for x in seen)
    border = LOW if sign > 0 else HIGH
    assert seen[-1] == pytest.approx(border, rel=1e-6)

    # The data turns round: the same optimiser must find the way back.
    seen = train(loss_fn, -sign, optimizer, 60)
    assert all(LOW <= x <= HIGH for x in seen)
    assert any(abs(math.log(x / border)) > 1.0 for x in seen)


@pytest.mark.parametrize("border", [LOW, HIGH])
def test_gradient_at_the_border_is_alive_in_both_directions(border):
    outwards = 1.0 if border == LOW else -1.0
    loss_fn = md.SupConDistillLoss(temperature=border)

    # One orthogonal negative, so that the slope is there even at the smallest temperature.
    def gradient(sign):
        loss_fn.zero_grad()
        query, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.999, 0.0447]])
        labels = torch.tensor([0, 1]) if sign > 0 else torch.tensor([1, 0])
        loss_fn(query, keys, torch.tensor([0]), labels).backward()
        return loss_fn.log_temperature_ratio.grad.item()

    assert gradient(outwards) * outwards > 0.0
    assert gradient(-outwards) * outwards < 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_border_no_rounding_leads_outside(dtype):
    for start in torch.linspace(0.1, 0.9, 200).tolist():
        for ratio in (1e4, -1e4):
            log_ratio = torch.tensor(ratio, dtype=dtype)
            _temperature.project_(log_ratio, start, LOW, HIGH)
            temperature = _temperature.exp_in_range(log_ratio, start, LOW, HIGH)
            low, high = torch.tensor([LOW, HIGH], dtype=dtype)
            assert low <= temperature <= high
            assert temperature.item() == pytest.approx(HIGH if ratio > 0 else LOW, rel=1e-6)


@pytest.mark.parametrize("name", ["query", "keys", "momentum_query", "momentum_keys"])
def test_one_float64_input_is_enough_for_a_loss_in_float64(name):
    """The learned temperature too: its rounding to float32 would show."""
    case = supcon_case(0, dtype=torch.float32)
    arguments = dict(zip(["query", "keys", "query_labels", "key_labels"], case.args, strict=True)) | case.momentum
    arguments[name] = arguments[name].double()
    everything = {key: x.double() if x.is_floating_point() else x for key, x in arguments.items()}
    loss_fn = md.SupConDistillLoss(temperature=0.3)
    with torch.no_grad():
        loss_fn.log_temperature_ratio.fill_(0.123)
    loss = loss_fn(**arguments)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(loss_fn(**everything).item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_alpha_weighs_as_its_number_does(dtype):
    case = supcon_case(0).requires_grad()
    alpha, loss_fn = (
        torch.tensor(0.3, dtype=dtype, requires_grad=True),
        md.SupConDistillLoss(learnable_temperature=False),
    )
    found = []
    for weight in (alpha, alpha.item()):
        loss = loss_fn(*case.args, **case.momentum, alpha=weight)
        found.append([loss, *torch.autograd.grad(loss, [case.query, case.keys], retain_graph=True)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
    terms = loss_fn.terms(*case.args, **case.momentum)
    (gradient,) = torch.autograd.grad(found[0][0], alpha)
    assert gradient == (terms.distill - terms.supervised).to(dtype)


@torch.inference_mode()
def test_a_loss_made_in_inference_mode_works_there():
    assert md.SupConDistillLoss()(*aligned_case()).isfinite()


@pytest.mark.parametrize(("overshoot", "border"), [(1e4, HIGH), (-1e4, LOW)])
def test_a_step_outside_is_taken_back_to_the_border_at_the_next_call(overshoot, border):
    """However far an optimizer overshot, one step inwards is then enough to leave the border."""
    loss_fn = md.SupConDistillLoss(temperature=0.5)
    with torch.no_grad():
        loss_fn.log_temperature_ratio.fill_(overshoot)
    assert loss_fn.temperature.item() == pytest.approx(border, rel=1e-12)
    assert loss_fn.log_temperature_ratio.item() == overshoot  # reading it changes nothing
    loss = loss_fn(*aligned_case())
    loss.backward()
    assert loss_fn.log_temperature_ratio.item() == pytest.approx(math.log(border / 0.5), rel=1e-6)
    assert math.isfinite(loss.item())
    with torch.no_grad():
        loss_fn.log_temperature_ratio.sub_(math.copysign(0.1, overshoot))
    assert abs(math.log(loss_fn.temperature.item() / border)) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.009, 10.1])
def test_temperature_outside_its_range_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        md.SupConDistillLoss(temperature=temperature)
    wide = md.SupConDistillLoss(temperature=temperature, temperature_range=(0.001, 100.0))
    assert wide.temperature.item() == temperature


def trained():
    """A loss whose temperature has moved."""
    loss_fn = md.SupConDistillLoss(temperature=0.07, alpha=0.3, positives="inside", temperature_range=(0.02, 3.0))
    with torch.no_grad():
        loss_fn.log_temperature_ratio.fill_(0.31)
    return loss_fn


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_torch_save(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_go_on_bit_for_bit_and_on_their_own(copy_of):
    case = supcon_case(1)
    loss_fn = trained()
    other = copy_of(loss_fn)
    expected = loss_fn(*case.args, **case.momentum)
    assert bits(other(*case.args, **case.momentum)) == bits(expected)
    assert repr(other) == repr(loss_fn)
    with torch.no_grad():
        other.log_temperature_ratio.add_(1.0)
    assert bits(loss_fn(*case.args, **case.momentum)) == bits(expected)


@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_restores_the_temperature_bit_for_bit(strict):
    loss_fn = trained()
    buffer = io.BytesIO()
    torch.save(loss_fn.state_dict(), buffer)
    buffer.seek(0)
    other = md.SupConDistillLoss(temperature=0.5, alpha=0.3, positives="inside", temperature_range=(0.02, 3.0))
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=strict)
    assert bits(other.temperature) == bits(loss_fn.temperature)
    case = supcon_case(1)
    assert bits(other(*case.args, **case.momentum)) == bits(loss_fn(*case.args, **case.momentum))


def test_state_dict_of_a_fixed_temperature_is_restored_too():
    source = md.SupConDistillLoss(temperature=0.07, learnable_temperature=False)
    other = md.SupConDistillLoss(temperature=0.5, learnable_temperature=False)
    other.load_state_dict(source.state_dict())
    assert other.temperature.item() == 0.07


def test_resumed_training_is_the_same_training():
    def step(loss_fn, optimizer):
        optimizer.zero_grad()
        loss_fn(*aligned_case()).backward()
        optimizer.step()

    loss_fn = md.SupConDistillLoss(temperature=0.2)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.05)
    for _ in range(3):
        step(loss_fn, optimizer)
    saved = copy.deepcopy((loss_fn.state_dict(), optimizer.state_dict()))
    for _ in range(3):
        step(loss_fn, optimizer)

    resumed = md.SupConDistillLoss(temperature=0.5)
    resumed_optimizer = torch.optim.Adam(resumed.parameters(), lr=0.05)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    for _ in range(3):
        step(resumed, resumed_optimizer)
    assert bits(resumed.temperature) == bits(loss_fn.temperature)


@pytest.mark.parametrize("loss", [md.SupConDistillLoss, md.SigmoidDistillLoss])
def test_a_loss_without_numbers_can_be_shown(loss):
    with torch.device("meta"):
        empty = loss(temperature=0.3)
    assert "temperature=0.3 (learned in" in repr(empty)
    with FakeTensorMode():
        assert "temperature=0.3 (learned in" in repr(loss(temperature=0.3))


def test_repr_shows_the_settings():
    text = repr(trained())
    for part in ("temperature", "alpha=0.3", "inside"):
        assert part in text


def test_train_and_eval_give_the_same_loss():
    case = supcon_case(2)
    loss_fn = md.SupConDistillLoss()
    training = loss_fn(*case.args, **case.momentum)
    assert bits(loss_fn.eval()(*case.args, **case.momentum)) == bits(training)


def test_a_range_of_one_temperature_holds_it_there():
    loss_fn = md.SupConDistillLoss(temperature=0.3, temperature_range=(0.3, 0.3))
    with torch.no_grad():
        loss_fn.log_temperature_ratio.fill_(2.0)
    assert loss_fn.temperature.item() == pytest.approx(0.3)
