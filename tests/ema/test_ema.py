"""EMAWrapper: values against closed forms, decay and its step, state, forward, any module tree.

What other libraries get wrong stands in test_ema_names.py, _plan, _swap, _teacher and _traps.
"""

import copy
import math
import pickle
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import momentum_distill as md
from module_state import assert_same_state, clone_state
from small_models import FLOAT_DTYPES, Normed, fill, flat, redraw, redraw_all, small_model

# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


def closed_form(start, values, decay):
    r"""decay^T start + (1 - decay) sum_t decay^(T-t) values[t-1], in float64 and without recursion."""
    values = torch.stack(values)
    age = torch.arange(len(values) - 1, -1, -1, dtype=torch.float64)
    return decay ** len(values) * start + torch.tensordot((1 - decay) * decay**age, values, dims=1)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_average_of_a_changing_model_is_the_closed_form_after_thousands_of_updates(dtype):
    decay, updates = 0.995, 3000
    model = small_model(dtype)
    ema = md.EMAWrapper(model, decay=decay)
    start, seen = flat(model), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        redraw(model, generator)
        ema.update(model)
        seen.append(flat(model))
    torch.testing.assert_close(flat(ema.module), closed_form(start, seen, decay), rtol=0, atol=1e-6)


EPS32 = torch.finfo(torch.float32).eps


class Scalar(nn.Module):
    """One parameter, so that an expected value can be written down."""

    def __init__(self, value=0.0, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))

    def forward(self, x):
        return x * self.weight


SIXTEEN_BIT = FLOAT_DTYPES[1:]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_average_of_a_16_bit_model_moves_where_a_16_bit_average_stands_still(dtype):
    decay, updates = 0.999, 2000
    model = Scalar(1.0, dtype)
    ema = md.EMAWrapper(model, decay=decay)
    in_16_bit = model.weight.detach().clone()
    fill(model, 1.25)
    for _ in range(updates):
        ema.update(model)
        in_16_bit.lerp_(model.weight.detach(), 1 - decay)
    assert torch.equal(in_16_bit, torch.ones(3, dtype=dtype))
    expected = 1.25 - 0.25 * decay**updates
    assert ema.module.weight.dtype == torch.float32
    assert ema.module.weight.tolist() == pytest.approx([expected] * 3, abs=EPS32 / (1 - decay))


def test_decay_is_the_share_of_the_old_average():
    model = Scalar(0.0)
    ema = md.EMAWrapper(model, decay=0.9)
    fill(model, 1.0)
    ema.update(model)
    assert ema.module.weight.tolist() == pytest.approx([0.1] * 3, rel=1e-6)


def test_default_decay_is_0995():
    model = Scalar(0.0)
    ema = md.EMAWrapper(model)
    fill(model, 1.0)
    ema.update(model)
    assert ema.module.weight.tolist() == pytest.approx([0.005] * 3, rel=1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_decay_zero_copies(dtype):
    model = small_model(dtype)
    ema = md.EMAWrapper(model, decay=0.0)
    for seed in range(3):
        redraw(model, torch.Generator().manual_seed(seed))
        ema.update(model)
        assert torch.equal(flat(ema.module), flat(model))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_decay_one_freezes(dtype):
    model = small_model(dtype)
    ema = md.EMAWrapper(model, decay=1.0)
    start = flat(ema.module)
    for seed in range(3):
        redraw(model, torch.Generator().manual_seed(seed))
        ema.update(model)
    assert torch.equal(flat(ema.module), start)
    assert not torch.equal(flat(model), start)


def test_constructor_and_update_leave_the_online_model_alone():
    model = Normed()
    before = clone_state(model)
    ema = md.EMAWrapper(model, decay=0.5)
    redraw_all(ema.module, torch.Generator().manual_seed(0))
    ema.update(model)
    assert_same_state(clone_state(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_float64_model_keeps_a_float64_average():
    model = Scalar(0.0, torch.float64)
    ema = md.EMAWrapper(model, decay=1 / 3)
    fill(model, 1.0)
    ema.update(model)
    assert ema.module.weight.dtype == torch.float64
    assert ema.module.weight.tolist() == pytest.approx([2 / 3] * 3, rel=1e-14)


@pytest.mark.parametrize("average", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtype_argument_sets_the_dtype_of_the_average(dtype, average):
    model = Scalar(0.0, dtype)
    ema = md.EMAWrapper(model, decay=0.75, dtype=average)
    fill(model, 1.0)
    ema.update(model)
    assert ema.module.weight.dtype == average
    assert ema.module.weight.tolist() == [0.25] * 3


# ---------------------------------------------------------------------------------------------
# The decay and its step
# ---------------------------------------------------------------------------------------------


class Recorder:
    """A decay schedule that remembers the steps it was asked for."""

    def __init__(self, schedule=lambda _: 0.5):
        self.steps = []
        self.schedule = schedule

    def __call__(self, step):
        self.steps.append(step)
        return self.schedule(step)


def test_callable_decay_gets_the_number_of_updates_made_before():
    model, decay = Scalar(), Recorder()
    ema = md.EMAWrapper(model, decay=decay)
    asked_by_the_constructor = len(decay.steps)
    for _ in range(4):
        ema.update(model)
    assert decay.steps[asked_by_the_constructor:] == [0, 1, 2, 3]
    assert all(isinstance(step, int) for step in decay.steps)
    assert ema.step == 4


def cosine(step, total=10):
    return 1 - 0.1 * (math.cos(math.pi * min(step, total) / total) + 1) / 2


def test_callable_decay_follows_its_schedule():
    model = Scalar(0.0)
    ema = md.EMAWrapper(model, decay=cosine)
    expected = 0.0
    for step in range(25):
        fill(model, float(step))
        ema.update(model)
        expected = cosine(step) * expected + (1 - cosine(step)) * step
    assert ema.module.weight.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_saved_step_goes_on_after_a_reload():
    model, decay = Scalar(0.0), Recorder(cosine)
    ema = md.EMAWrapper(model, decay=cosine)
    for _ in range(7):
        ema.update(model)
    restored = md.EMAWrapper(Scalar(), decay=decay)
    restored.load_state_dict(ema.state_dict())
    assert restored.step == 7
    decay.steps.clear()
    restored.update(model)
    assert decay.steps == [7]
    assert restored.step == 8


def test_per_call_decay_overrides_once():
    model = Scalar(0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    fill(model, 8.0)
    ema.update(model, decay=0.0)
    assert ema.module.weight.tolist() == [8.0] * 3
    fill(model, 0.0)
    ema.update(model, decay=1.0)
    assert ema.module.weight.tolist() == [8.0] * 3
    ema.update(model)
    assert ema.module.weight.tolist() == [4.0] * 3


def test_per_call_decay_counts_as_a_step_of_the_schedule():
    model, decay = Scalar(), Recorder()
    ema = md.EMAWrapper(model, decay=decay)
    ema.update(model, decay=0.9)
    decay.steps.clear()
    ema.update(model)
    assert decay.steps == [1]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (2.0, ValueError),
        (-1e-9, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("x", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
    ids=repr,
)
def test_wrong_value_of_a_callable_decay_is_refused_and_nothing_moves(value, error):
    model = Normed()
    ema = md.EMAWrapper(model, decay=lambda step: 0.5 if step == 0 else value)
    redraw_all(model, torch.Generator().manual_seed(0))
    ema.update(model)
    redraw_all(model, torch.Generator().manual_seed(1))
    before = clone_state(ema)
    with pytest.raises(error, match=r"^decay.*: expected .*, got "):
        ema.update(model)
    assert_same_state(clone_state(ema), before)
    assert ema.step == 1


# ---------------------------------------------------------------------------------------------
# State: save, load, copy
# ---------------------------------------------------------------------------------------------


def trained(steps, seed=0, **kwargs):
    torch.manual_seed(0)
    model = Normed()
    ema = md.EMAWrapper(model, **({"decay": 0.9} | kwargs))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        redraw_all(model, generator)
        ema.update(model)
    return model, ema


def through_state_dict(ema):
    fresh = md.EMAWrapper(Normed(), decay=0.9)
    fresh.load_state_dict(copy.deepcopy(ema.state_dict()))
    return fresh


def through_torch_save(ema, tmp_path):
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    fresh = md.EMAWrapper(Normed(), decay=0.9)
    fresh.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True), strict=True)
    return fresh


COPIES = {
    "deepcopy": lambda ema, _: copy.deepcopy(ema),
    "pickle": lambda ema, _: pickle.loads(pickle.dumps(ema)),
    "state_dict": lambda ema, _: through_state_dict(ema),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_copy_goes_on_bit_for_bit_and_by_itself(way, steps, tmp_path):
    model, ema = trained(steps)
    before = clone_state(ema)
    twin = COPIES[way](ema, tmp_path)
    assert_same_state(clone_state(twin), before)
    assert twin.step == ema.step == steps
    assert not twin.module.training
    assert not any(p.requires_grad for p in twin.parameters())

    def go_on(wrapper):
        online, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
        for _ in range(3):
            redraw_all(online, generator)
            wrapper.update(online)

    go_on(twin)
    assert_same_state(clone_state(ema), before)  # the two share nothing
    go_on(ema)
    assert_same_state(clone_state(twin), clone_state(ema))
    assert twin.step == ema.step


def test_state_dict_holds_the_average_once_and_nothing_of_the_online_model():
    model, ema = trained(2)
    saved = ema.state_dict()
    tensors = {k: v for k, v in saved.items() if isinstance(v, torch.Tensor)}
    for name, value in ema.module.state_dict().items():
        assert torch.equal(tensors[f"module.{name}"], value)
    extra = [k for k in saved if k.removeprefix("module.") not in model.state_dict()]
    assert len(saved) == len(model.state_dict()) + len(extra)
    assert len(extra) <= 2  # the step, and room for one more number
    assert sum(tensors[k].numel() for k in extra if k in tensors) <= 2


@pytest.mark.parametrize("decay", [0.75, cosine], ids=["number", "callable"])
def test_repr_shows_the_settings_and_the_step(decay):
    model, ema = trained(2, decay=decay, buffers="ema")
    shown = repr(ema)
    assert "step=2" in shown
    assert "buffers='ema'" in shown
    assert ("0.75" if decay == 0.75 else "cosine") in shown
    assert shown.count("BatchNorm1d") == repr(model).count("BatchNorm1d")


def test_loading_a_checkpoint_of_another_model_is_refused():
    ema = md.EMAWrapper(Normed())
    with pytest.raises(RuntimeError, match="lin"):
        ema.load_state_dict(md.EMAWrapper(Scalar()).state_dict())


# ---------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------


def test_forward_is_the_averaged_module():
    model, ema = trained(3)
    reference = copy.deepcopy(model)
    reference.load_state_dict(ema.module.state_dict())
    x = torch.randn(5, 3)
    with torch.no_grad():  # another kernel may run where a gradient is asked for
        assert torch.equal(ema(x), reference.eval()(x))


def test_forward_has_no_gradient_but_its_output_can_be_a_target():
    model = small_model()
    ema = md.EMAWrapper(model)
    x = torch.randn(5, 3, requires_grad=True)
    with torch.enable_grad():
        target = ema(x)
    assert not target.requires_grad
    assert not target.is_inference()
    ((model(x) - target) * target).sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in ema.parameters())


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Echo(nn.Module):
    """Returns what it was given, the dtypes as they arrived."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, *args, **kwargs):
        return args, kwargs


def echo_inputs(dtype):
    x = torch.randn(2, dtype=dtype)
    args = (x, [x, {"deep": (x, None, "text", 3, 2.5)}], Pair(x, torch.arange(2)))
    kwargs = {"mask": torch.tensor([True, False]), "named": {"x": x}, "wide": x.double()}
    return args, kwargs


def leaf_dtypes(tree):
    (x, (y, mapping), pair), kwargs = tree
    deep = mapping["deep"]
    assert deep[1:] == (None, "text", 3, 2.5)
    assert isinstance(pair, Pair)
    floats = [x, y, deep[0], pair.left, kwargs["named"]["x"]]
    assert pair.right.dtype == torch.int64
    assert kwargs["mask"].dtype == torch.bool
    assert kwargs["wide"].dtype == torch.float64
    return {t.dtype for t in floats}


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_forward_widens_16_bit_inputs_in_nested_containers_and_keywords(dtype):
    ema = md.EMAWrapper(Echo(dtype))
    args, kwargs = echo_inputs(dtype)
    assert leaf_dtypes(ema(*args, **kwargs)) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_changes_no_input_of_32_bits_or_more(dtype):
    ema = md.EMAWrapper(Echo(torch.float32))
    args, kwargs = echo_inputs(dtype)
    assert leaf_dtypes(ema(*args, **kwargs)) == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_of_an_average_of_another_dtype_takes_the_inputs_of_the_model(dtype):
    model = small_model(dtype)
    ema = md.EMAWrapper(model, dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    x = torch.randn(5, 3, dtype=dtype)
    torch.testing.assert_close(ema(x).to(dtype), model(x).detach(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Any module tree
# ---------------------------------------------------------------------------------------------


# `module` and `_orig` are ordinary names of ordinary submodules here.
NAMES = st.sampled_from(["a", "b", "weight", "module", "modules_", "_orig", "mean"])


LEAVES = st.tuples(
    st.sampled_from(["parameter", "frozen", "tied", "buffer", "volatile", "counter", "none"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([(), (0,), (1,), (3,), (2, 3)]),
)


TREES = st.dictionaries(
    NAMES,
    LEAVES | st.dictionaries(NAMES, LEAVES | st.dictionaries(NAMES, LEAVES, max_size=3), max_size=3),
    min_size=1,
    max_size=4,
)


def build(tree, generator, first=None):
    """A module tree; a `tied` leaf is the same Parameter object as the first parameter made."""
    first = [] if first is None else first
    module = nn.Module()
    for name, node in tree.items():
        if isinstance(node, dict):
            module.add_module(name, build(node, generator, first))
            continue
        kind, dtype, shape = node
        value = torch.randn(shape, generator=generator).to(dtype)
        if kind == "tied" and first:
            module.register_parameter(name, first[0])
        elif kind in ("parameter", "frozen", "tied"):
            first.append(nn.Parameter(value, requires_grad=kind != "frozen"))
            module.register_parameter(name, first[-1])
        elif kind == "none":
            module.register_buffer(name, None)
        elif kind == "counter":
            module.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        else:
            module.register_buffer(name, value, persistent=kind == "buffer")
    return module


def every_name(module):
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters, dict(module.named_buffers(remove_duplicate=False))


@settings(max_examples=60)
@given(
    tree=TREES,
    buffers=st.sampled_from(["copy", "ema", "frozen"]),
    decay=st.floats(0, 1),
    updates=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_tensor_of_any_module_tree_follows_its_own_closed_form(tree, buffers, decay, updates, seed):
    generator = torch.Generator().manual_seed(seed)
    model = build(tree, generator)
    parameters, model_buffers = every_name(model)
    if not parameters | model_buffers:
        with pytest.raises(TypeError, match="with parameters or buffers"):
            md.EMAWrapper(model)
        return
    floats = [name for name, b in model_buffers.items() if b.is_floating_point()]
    ema = md.EMAWrapper(model, decay=decay, buffers=floats if buffers == "ema" else buffers)
    expected = {n: t.detach().double().clone() for n, t in (parameters | model_buffers).items()}
    for _ in range(updates):
        with torch.no_grad():
            for t in {id(t): t for t in (parameters | model_buffers).values()}.values():
                if t.is_floating_point():
                    t.copy_(torch.randn(t.shape, generator=generator))
                else:
                    t.add_(1)
        ema.update(model)
        for name, online in (parameters | model_buffers).items():
            online = online.detach().double().clone()
            averaged = name in parameters or buffers == "ema"
            if name in model_buffers and not model_buffers[name].is_floating_point():
                expected[name] = online
            elif averaged:
                expected[name] = decay * expected[name] + (1 - decay) * online
            elif buffers == "copy":
                expected[name] = online
    averages = every_name(ema.module)
    actual = averages[0] | averages[1]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-12 if actual[name].dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual[name].detach().double(), value, rtol=0, atol=atol)


def test_the_type_of_the_model_can_be_named_and_changes_nothing():
    import typed_average  # what type checkers are asked there is true at run time

    model = Scalar(1.0)
    for make in (md.EMAWrapper, md.EMAWrapper[Scalar]):
        ema = make(model, decay=0.5)
        assert type(ema) is md.EMAWrapper
        assert isinstance(ema, md.EMAWrapper)
        assert ema.state_dict().keys() == {"module.weight", "_extra_state"}
        for again in (ema, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
            assert torch.equal(again(torch.ones(3)), torch.ones(3))
            again.update(Scalar(0.0))
            assert torch.equal(again.module.weight, torch.full((3,), 0.5))
    assert isinstance(typed_average.named, md.EMAWrapper)


def test_the_wrong_module_is_called_by_its_class():
    model = nn.Sequential(nn.Linear(2, 2))
    average = md.EMAWrapper(model)
    for call in (average.update, average.copy_to):
        with pytest.raises(ValueError, match=r"^model: .*; the average is of Sequential, the model is Linear: "):
            call(model[0])
