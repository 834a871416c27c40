"""EMAWrapper and buffers: those that forward passes make, resize and drop, and which of the others are averaged."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import momentum_distill as md
from momentum_distill import _ema_plan
from small_models import fill

MODES = ("copy", "ema", "frozen")


class Caching(nn.Module):
    """A weight that is trained, and a buffer that `change` does something to."""

    def __init__(self, cache=None, persistent=True):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.inner = nn.Module()
        if cache is not None:
            self.inner.register_buffer("cache", cache[0], persistent=persistent)
        self.inner.register_buffer("last", torch.zeros(1))


def buffers_of(module):
    """All buffers by name, None included, in their order."""
    return {f"{path}.{key}": b for path, child in module.named_modules() for key, b in child._buffers.items()}


def equal(one, other):
    """The same bits, or both None."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one.to_dense(), other.to_dense())


def remembered(module):
    """The buffers, what they hold, and which of them are saved."""
    held = buffers_of(module)
    values = {name: b if b is None else b.clone() for name, b in held.items()}
    return list(held.items()), values, [set(child._non_persistent_buffers_set) for child in module.modules()]


def assert_as_remembered(module, then):
    (held, values, passing), (before, values_before, passing_before) = remembered(module), then
    assert [name for name, _ in held] == [name for name, _ in before]
    assert all(now is old for (_, now), (_, old) in zip(held, before, strict=True))
    for name, value in values_before.items():
        assert equal(values[name], value), name
    assert passing == passing_before


def assert_alike(one, other):
    """The same buffers, of the same values, none of them in the other's memory."""
    held, expected = buffers_of(one), buffers_of(other)
    assert held.keys() == expected.keys()
    for name, value in expected.items():
        assert equal(held[name], value), name
        if value is not None:
            assert not held[name].is_inference()
            assert value.is_sparse or value.numel() == 0 or held[name].data_ptr() != value.data_ptr()
    assert [m._non_persistent_buffers_set for m in one.modules()] == [
        m._non_persistent_buffers_set for m in other.modules()
    ]


def replace(value):
    def change(module):
        module.cache = value.clone()

    return change


def register(module):
    module.register_buffer("cache", torch.arange(6.0), persistent=module.saved)


def in_inference_mode(module):
    with torch.inference_mode():
        module.cache = torch.arange(6.0)


def from_an_attribute(module):
    del module.cache
    module.cache = nn.Buffer(torch.arange(6.0), persistent=module.saved)


# What a forward pass does to a buffer: the buffer before, in a tuple, or None if there is none; and the change.
CHANGES = {
    "grows": ((torch.arange(4.0),), replace(torch.arange(8.0))),
    "shrinks": ((torch.arange(4.0),), replace(torch.arange(2.0))),
    "becomes a number": ((torch.arange(4.0),), replace(torch.tensor(3.0))),
    "was a number": ((torch.tensor(3.0),), replace(torch.arange(2.0))),
    "was one number": ((torch.ones(1),), replace(torch.tensor(3.0))),
    "becomes empty": ((torch.arange(4.0),), replace(torch.zeros(0, 3))),
    "gets another dimension": ((torch.arange(4.0),), replace(torch.ones(4, 1))),
    "positions grow": ((torch.arange(4),), replace(torch.arange(8))),
    "positions become floats": ((torch.arange(4),), replace(torch.arange(4.0))),
    "a mask becomes one of bools": ((torch.ones(4),), replace(torch.tensor([True, False, True, True]))),
    "wider integers": ((torch.ones(2, dtype=torch.int32),), replace(torch.tensor([2**40, 1]))),
    "complex numbers": ((torch.ones(2),), replace(torch.tensor([1j, 2.0]))),
    "resized in place": ((torch.arange(4.0),), lambda m: m.cache.resize_(9).fill_(2.0)),
    "reshaped in place": ((torch.arange(4.0),), lambda m: m.cache.unsqueeze_(0)),
    "turned in place": ((torch.ones(2, 3),), lambda m: m.cache.t_()),
    "other data": ((torch.arange(4.0),), lambda m: setattr(m.cache, "data", torch.ones(3, 2))),
    "expanded": ((torch.arange(4.0),), lambda m: setattr(m, "cache", torch.ones(1).expand(5))),
    "expanded, of one shape": ((torch.arange(5.0),), lambda m: setattr(m, "cache", torch.ones(1).expand(5))),
    "a part of a graph": ((torch.arange(4.0),), lambda m: setattr(m, "cache", torch.ones(5, requires_grad=True) * 2)),
    "in inference mode": ((torch.arange(4.0),), in_inference_mode),
    "in inference mode, of one shape": ((torch.arange(6.0),), in_inference_mode),
    "was None": ((None,), replace(torch.arange(3.0))),
    "becomes None": ((torch.arange(3.0),), lambda m: setattr(m, "cache", None)),
    "goes": ((torch.arange(3.0),), lambda m: delattr(m, "cache")),
    "comes": (None, register),
    "comes instead of an attribute": (None, from_an_attribute),
    "sparse, of more numbers": (
        (torch.eye(3).to_sparse(),),
        lambda m: setattr(m, "cache", torch.ones(3, 3).to_sparse()),
    ),
}


def changing(name, persistent):
    cache, change = CHANGES[name]
    model = Caching(cache if cache is None or cache[0] is None else (cache[0].clone(),), persistent)
    model.inner.saved = persistent
    if name == "comes instead of an attribute":
        model.inner.cache = None
    return model, change


@pytest.mark.parametrize("name", CHANGES)
def test_a_forward_pass_may_change_a_buffer(name):
    for buffers, persistent in itertools.product(MODES, (True, False)):
        model, change = changing(name, persistent)
        fill(model, 0.0)
        ema = md.EMAWrapper(model, decay=0.5, buffers=buffers)
        ema.update(model)
        own = remembered(ema.module)
        change(model.inner)
        fill(model, 1.0)
        ema.update(model)
        model.inner.last.fill_(7.0)
        ema.update(model)
        assert {p.item() for p in ema.module.lin.weight.flatten()} == {0.75}, (buffers, persistent)
        if buffers == "frozen":
            assert_as_remembered(ema.module, own)
            continue
        assert ema.module.inner.last.item() == 7.0
        assert_alike(ema.module, model)


@pytest.mark.parametrize("name", CHANGES)
def test_swap_and_copy_to_give_the_model_the_buffers_of_the_average(name):
    for updated, persistent in itertools.product((False, True), (True, False)):
        model, change = changing(name, persistent)
        ema = md.EMAWrapper(model)
        ema.update(model)
        change(model.inner)
        if updated:
            ema.update(model)
        average, own = remembered(ema.module), remembered(model)
        with ema.swap(model):
            assert_alike(model, ema.module)
        assert_as_remembered(model, own)
        with ema.swap(model):  # what is done inside is undone
            model.inner.cache = torch.ones(11)
            model.lin.register_buffer("late", torch.ones(1), persistent=False)
        assert_as_remembered(model, own)
        assert_as_remembered(ema.module, average)
        ema.copy_to(model)
        assert_alike(model, ema.module)
        assert_as_remembered(ema.module, average)
        ema.update(model)


def test_a_buffer_that_was_taken_over_stays_in_its_place_as_long_as_its_shape_stays():
    model = Caching((torch.zeros(2),))
    ema = md.EMAWrapper(model)
    for size in (2, 5, 3):
        model.inner.cache = torch.ones(size)
        ema.update(model)
        cache = ema.module.inner.cache
        place = cache.data_ptr()
        for value in (3.0, 4.0):
            model.inner.cache = torch.full((size,), value)  # another object of the same shape
            ema.update(model)
            assert ema.module.inner.cache is cache
            assert cache.data_ptr() == place
            assert cache.tolist() == [value] * size


def test_a_statistic_is_averaged_and_begins_anew_where_its_shape_is_new():
    model = Caching((torch.zeros(2),))
    ema = md.EMAWrapper(model, decay=0.5, buffers=["inner.cache"])
    model.inner.cache.fill_(4.0)
    ema.update(model)
    assert ema.module.inner.cache.tolist() == [2.0, 2.0]
    model.inner.cache = torch.full((3,), 8.0)
    ema.update(model)
    assert ema.module.inner.cache.tolist() == [8.0] * 3
    model.inner.cache.fill_(0.0)
    ema.update(model)
    assert ema.module.inner.cache.tolist() == [4.0] * 3


@pytest.mark.parametrize("buffers", MODES)
def test_a_forward_pass_of_the_average_may_change_its_buffers(buffers):
    """Its own caches grow as those of the model do."""
    for change in ("grows", "resized in place", "turned in place", "becomes None", "goes", "in inference mode"):
        model, _ = changing(change, False)
        fill(model, 0.0)
        ema = md.EMAWrapper(model, decay=0.5, buffers=buffers)
        ema.update(model)
        CHANGES[change][1](ema.module.inner)
        own = remembered(ema.module)
        fill(model, 1.0)
        ema.update(model)
        assert ema.module.lin.bias.tolist() == [0.5, 0.5]
        if buffers == "frozen":
            assert_as_remembered(ema.module, own)
        else:
            assert_alike(ema.module, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [None, torch.float64], ids=str)
def test_a_new_buffer_has_the_precision_of_the_average_and_back_that_of_the_model(dtype, given):
    model = Caching((torch.zeros(2),)).to(dtype)
    ema = md.EMAWrapper(model, dtype=given)
    model.inner.cache = torch.ones(3, dtype=dtype)
    model.inner.register_buffer("late", torch.ones(4, dtype=dtype))
    model.inner.register_buffer("count", torch.tensor(3))
    ema.update(model)
    wide = given or torch.float32
    assert {n: b.dtype for n, b in ema.module.named_buffers()} == {
        "inner.cache": wide,
        "inner.last": wide,
        "inner.late": wide,
        "inner.count": torch.int64,
    }
    fresh = Caching((torch.zeros(2),)).to(dtype)
    with ema.swap(fresh):
        assert {b.dtype for n, b in fresh.named_buffers() if n != "inner.count"} == {dtype}
        assert fresh.inner.late.tolist() == [1.0] * 4
    assert [name for name, _ in fresh.named_buffers()] == ["inner.cache", "inner.last"]


def test_swap_gives_a_plain_attribute_back_that_stands_where_the_average_has_a_buffer():
    model = Caching()
    model.inner.cache = None
    ema = md.EMAWrapper(model, buffers="frozen")
    del ema.module.inner.cache
    ema.module.inner.register_buffer("cache", torch.ones(2))
    with ema.swap(model):
        assert model.inner.cache.tolist() == [1.0, 1.0]
    assert model.inner.cache is None
    assert "cache" in vars(model.inner)


def test_a_buffer_of_one_number_seen_many_times_can_be_averaged_and_swapped():
    """After `expand`, nothing can be written into it."""
    for buffers in (*MODES, ["cache"]):
        model = Caching()
        model.register_buffer("cache", torch.ones(1).expand(3))
        ema = md.EMAWrapper(model, decay=0.5, buffers=buffers)
        model.cache = torch.full((1,), 5.0).expand(3)
        for _ in range(2):
            ema.update(model)
        expected = {"frozen": 1.0, "copy": 5.0, "ema": 5.0}.get(str(buffers), 4.0)
        assert ema.module.cache.tolist() == [expected] * 3
        with ema.swap(model):
            assert model.cache.tolist() == [expected] * 3
        assert model.cache.tolist() == [5.0] * 3


def test_an_average_elsewhere_gets_its_new_buffers_there():
    model = Caching((torch.zeros(2),))
    ema = md.EMAWrapper(model, device="meta")
    model.inner.cache = torch.ones(3)
    model.inner.register_buffer("late", torch.ones(4))
    ema.update(model)
    assert {(n, b.device.type, tuple(b.shape)) for n, b in ema.module.named_buffers()} == {
        ("inner.cache", "meta", (3,)),
        ("inner.late", "meta", (4,)),
        ("inner.last", "meta", (1,)),
    }


@pytest.mark.parametrize("buffers", MODES)
def test_ties_of_buffers_follow_the_model(buffers):
    model = Caching((torch.zeros(2),))
    model.register_buffer("same", model.inner.cache)
    ema = md.EMAWrapper(model, decay=0.5, buffers=["same", "cache"] if buffers == "ema" else buffers)
    assert ema.module.same is ema.module.inner.cache
    model.same = model.inner.cache = torch.ones(3)
    ema.update(model)
    if buffers != "frozen":
        assert ema.module.same is ema.module.inner.cache
        assert ema.module.same.tolist() == [1.0] * 3
    model.same = torch.full((3,), 5.0)  # no tie any more
    ema.update(model)
    if buffers != "frozen":
        assert ema.module.inner.cache.tolist() == [1.0] * 3
        assert ema.module.same.tolist() == [3.0 if buffers == "ema" else 5.0] * 3
    with ema.swap(model):
        assert torch.equal(model.same, ema.module.same)
        assert torch.equal(model.inner.cache, ema.module.inner.cache)
    assert model.same.tolist() == [5.0] * 3


@pytest.mark.parametrize("buffers", MODES)
def test_an_average_never_keeps_a_buffer_of_the_model(buffers):
    """Caches in a global dictionary: the forward passes of both leave the same tensor in both."""
    model = Caching((torch.zeros(2),))
    ema = md.EMAWrapper(model, buffers=buffers)
    model.inner.cache = ema.module.inner.cache = torch.ones(3)
    ema.update(model)
    model.inner.cache.fill_(9.0)
    assert ema.module.inner.cache.tolist() == [1.0] * 3


def test_a_ready_teacher_whose_buffers_differ_takes_them_over_at_the_first_update():
    model, teacher = Caching((torch.ones(3),)), Caching((torch.zeros(2),))
    teacher.register_buffer("surplus", torch.zeros(1))
    ema = md.EMAWrapper(model, decay=0.5, teacher=teacher)
    assert ema.module.inner.cache.tolist() == [0.0, 0.0]
    ema.update(model)
    assert_alike(ema.module, model)


def test_a_wrapped_model_gives_its_new_buffers_by_their_own_names():
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: nn.ModuleDict({"module": m})):
        model = Caching()
        ema = md.EMAWrapper(model)
        wrapped = wrap(model)
        ema.update(wrapped)
        model.inner.register_buffer("cache", torch.ones(3))
        model.register_buffer("top", torch.ones(2))
        ema.update(wrapped)
        assert_alike(ema.module, model)
        with ema.swap(wrapped):
            assert_alike(ema.module, model)


def test_a_model_whose_parameters_are_all_in_a_child_called_module_may_have_buffers_outside():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    ema = md.EMAWrapper(model, decay=0.0)
    for size in (2, 3):
        model.register_buffer("cache", torch.ones(size))
        model["module"].register_buffer("cache", torch.zeros(size))
        for online in (model, nn.DataParallel(model), nn.ModuleDict({"module": model})):
            fill(model, size)
            ema.update(online)
            assert_alike(ema.module, model)
            assert torch.equal(ema.module["module"].weight, model["module"].weight)
        del model.cache, model["module"].cache


def test_a_module_that_one_side_alone_has_keeps_its_buffers():
    model = Caching()
    ema = md.EMAWrapper(model, decay=0.0)
    model.made_late = nn.Module()
    model.made_late.register_buffer("cache", torch.ones(2))
    ema.module.own = nn.Module()
    ema.module.own.register_buffer("cache", torch.zeros(3))
    fill(model, 3.0)
    for _ in range(2):
        ema.update(model)
    with ema.swap(model):
        assert model.made_late.cache.tolist() == [1.0, 1.0]
    assert ema.module.own.cache.tolist() == [0.0] * 3
    assert ema.module.lin.bias.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_state_and_copies_after_a_buffer_has_changed(way):
    model = Caching((torch.zeros(2),))
    ema = md.EMAWrapper(model)
    before = copy.deepcopy(ema.state_dict())
    model.inner.cache = torch.ones(4)
    ema.update(model)
    twin = way(ema)
    assert_alike(twin.module, ema.module)
    twin.load_state_dict(copy.deepcopy(ema.state_dict()))
    md.EMAWrapper(model).load_state_dict(ema.state_dict())
    twin.update(model)
    for module, state in ((ema, before), (model, Caching((torch.zeros(2),)).state_dict())):
        with pytest.raises(RuntimeError, match=r"size mismatch for (module\.)?inner\.cache"):  # as torch has it
            module.load_state_dict(state)


@pytest.mark.parametrize("buffers", MODES)
def test_a_parameter_of_another_shape_is_refused_whatever_the_buffers_do(buffers):
    model = Caching((torch.zeros(2),))
    ema = md.EMAWrapper(model, buffers=buffers)
    ema.update(model)
    before = remembered(ema.module)
    model.inner.cache = torch.ones(3)
    model.lin = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"^model: expected shape \(2, 2\) for 'lin.weight', got \(3, 2\)$"):
        ema.update(model)
    assert_as_remembered(ema.module, before)
    assert ema.step == 1


def test_fake_quantisation_may_find_its_scales_in_the_first_forward_pass():
    from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver

    with warnings.catch_warnings(action="ignore"):
        fake = FakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )
    for buffers in MODES:
        model = nn.Sequential(nn.Linear(3, 5), copy.deepcopy(fake))
        ema = md.EMAWrapper(model, buffers=buffers)
        ema.update(model)
        model(torch.randn(5, 3))
        assert model[1].scale.shape == (5,)
        ema.update(model)
        with ema.swap(model):
            assert model[1].scale.shape == ema.module[1].scale.shape
        assert model[1].scale.shape == (5,)
        assert ema.module[1].scale.shape == ((1,) if buffers == "frozen" else (5,))
        ema(torch.randn(5, 3))
        ema.update(model)


def test_a_plan_is_made_anew_only_where_something_has_changed(monkeypatch):
    made = []
    init = _ema_plan.Plan.__init__
    monkeypatch.setattr(_ema_plan.Plan, "__init__", lambda *a: (made.append(1), init(*a))[1])
    for buffers in MODES:
        model = Caching((torch.zeros(2),))
        ema = md.EMAWrapper(model, buffers=buffers)
        ema.update(model)
        model.inner.cache = torch.zeros(3)
        ema.update(model)
        model.late, ema.module.own = nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(3, affine=False)
        ema.update(model)
        made.clear()
        for _ in range(3):
            model.inner.cache.add_(1)
            ema.update(model)
        assert not made, buffers


# ---------------------------------------------------------------------------------------------
# What is averaged: statistics. What is never frozen: parts of a parametrised weight
# ---------------------------------------------------------------------------------------------


def old(norm, **kwargs):
    """Those that hang on a hook before the forward pass; copied before there is a graph."""

    def make(layer):
        with warnings.catch_warnings(action="ignore", category=FutureWarning), torch.no_grad():
            return norm(layer, "weight", **kwargs)

    return make


class WithConstant(nn.Module):
    """A parametrisation with a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, weight):
        return weight / self.scale


def custom(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", WithConstant())
    return layer


PARAMETRISED = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "orthogonal, without trivialization": lambda m: nn.utils.parametrizations.orthogonal(m, use_trivialization=False),
    "own": custom,
    "old spectral_norm": old(nn.utils.spectral_norm),
    "old weight_norm": old(nn.utils.weight_norm),
    "pruning": old(prune.random_unstructured, amount=0.5),
}


def weight_of(layer, x):
    """The weight a layer computes with, as it is, without an iteration of the power method."""
    was = layer.training
    layer.eval()
    with torch.no_grad():
        layer(x)
        weight = layer.weight.clone()
    layer.train(was)
    return weight


@torch.no_grad()
def move(layer, x, generator, by):
    """A training step of a parametrised layer, and whatever its forward pass does to its buffers."""
    for p in layer.parameters():
        p.add_(by * torch.randn(p.shape, generator=generator))
    layer(x)
    for name, b in layer.named_buffers():
        if name.endswith("weight_mask"):
            b.copy_(b.flip(0))
        if name.endswith("scale"):
            b.mul_(1.5)


@pytest.mark.parametrize("name", PARAMETRISED)
def test_a_parametrised_weight_of_the_average_is_that_of_the_model_but_for_the_averaging(name):
    for buffers, mode in itertools.product(MODES, ("eval", "train")):
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 6), torch.randn(3, 6)
        model = PARAMETRISED[name](layer)
        ema = md.EMAWrapper(model, decay=0.9, buffers=buffers, mode=mode)
        generator = torch.Generator().manual_seed(1)
        for _ in range(30):
            move(model, x, generator, by=0.05)
            ema.update(model)
            with torch.no_grad():
                ema(x)
            lag = max((p - q).norm() / q.norm() for p, q in zip(ema.parameters(), model.parameters(), strict=True))
            weight = weight_of(model, x)
            off = (weight_of(ema.module, x) - weight).norm() / weight.norm()
            assert off < 3 * lag, (buffers, mode, off, lag)
        ema.update(model, decay=0.0)
        torch.testing.assert_close(weight_of(ema.module, x), weight_of(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["spectral_norm", "old spectral_norm"])
def test_a_stack_of_spectral_norms_does_not_grow_louder_in_the_average(norm):
    for buffers in MODES:
        torch.manual_seed(0)
        model = nn.Sequential(*(PARAMETRISED[norm](nn.Linear(8, 8, bias=False)) for _ in range(30)))
        ema = md.EMAWrapper(model, decay=0.9, buffers=buffers)
        generator, x = torch.Generator().manual_seed(1), torch.randn(4, 8)
        for _ in range(100):
            move(model, x, generator, by=0.02)
            ema.update(model)
        largest = [torch.linalg.matrix_norm(weight_of(layer, x), 2).item() for layer in ema.module]
        assert largest == pytest.approx([1.0] * 30, abs=0.05), buffers  # averaged vectors: 1.3, those of the start: 180


class Centring(nn.Module):
    """A running mean of its own name, as DINO has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("temperature", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("later", None)


def test_ema_averages_moments_of_normalisation_and_what_is_named_and_copies_the_rest():
    def halves(buffers, names):
        model = nn.Sequential(nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True), Centring())
        model.head = Centring()
        ema = md.EMAWrapper(model, decay=0.5, buffers=buffers)
        before = {name: b.clone() for name, b in ema.module.named_buffers()}
        with torch.no_grad():
            for b in model.buffers():
                b.add_(4)
        ema.update(model)
        for name, b in ema.module.named_buffers():
            step = 2 if name in names else 4
            assert torch.equal(b, before[name] + step), name

    moments = {"0.running_mean", "0.running_var", "1.running_mean", "1.running_var"}
    halves("copy", set())
    halves("ema", moments)
    halves([], moments)
    halves(["center"], moments | {"2.center", "head.center"})
    halves(("head.center", "2.temperature"), moments | {"head.center", "2.temperature"})


def test_names_of_buffers_that_are_none_are_refused():
    for names, error, message in (
        (["centre"], ValueError, r"^buffers: expected names of floating buffers of the model, got 'centre'$"),
        (["enter"], ValueError, "names of floating buffers"),
        (["seen"], ValueError, "names of floating buffers"),
        (["weight"], ValueError, "names of floating buffers"),
        (["center", 3], TypeError, r"^buffers: expected names that are strings, got 3"),
    ):
        with pytest.raises(error, match=message):
            md.EMAWrapper(Centring(), buffers=names)
    md.EMAWrapper(Centring(), buffers=["later"])
    assert "buffers=('center',)" in repr(md.EMAWrapper(Centring(), buffers=["center"]))


def test_buffers_may_be_named_as_a_wrapped_model_names_them():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("center", torch.zeros(2))

    inner = Centred()
    for model in (inner, nn.DataParallel(inner), torch.compile(inner), nn.ModuleDict({"module": inner})):
        (name,) = dict(model.named_buffers())
        ema = md.EMAWrapper(model, decay=0.5, buffers=[name])
        with torch.no_grad():
            inner.center.fill_(1.0)
        ema.update(model)
        (average,) = dict(ema.module.named_buffers()).values()
        assert average.tolist() == [0.5, 0.5]
        inner.center.zero_()
