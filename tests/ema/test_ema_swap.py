"""EMAWrapper.swap and copy_to: the average in the place of the model, which gets its own back bit for bit."""

import copy
import pickle

import pytest
import torch
from torch import nn

import momentum_distill as md
from module_state import assert_same_state, clone_state
from small_models import (
    FLOAT_DTYPES,
    Branches,
    Normed,
    fill,
    flat,
    known,
    number_parameters,
    pointers,
    redraw_all,
    small_model,
    values,
)


def swapped(dtype=torch.float32, **kwargs):
    """A model and an average that differ in every parameter and buffer."""
    torch.manual_seed(0)
    model = Normed().to(dtype)
    ema = md.EMAWrapper(model, **({"decay": 0.5, "buffers": "ema"} | kwargs))
    redraw_all(model, torch.Generator().manual_seed(3))
    ema.update(model)
    redraw_all(model, torch.Generator().manual_seed(4))
    return model, ema


def as_dtypes_of(state, like):
    return {name: value.to(like[name].dtype) for name, value in state.items()}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_swap_puts_the_average_in_and_restores_bit_for_bit(dtype):
    model, ema = swapped(dtype)
    online, average = clone_state(model), clone_state(ema.module)
    assert not torch.equal(online["lin.weight"].float(), average["lin.weight"])
    assert not torch.equal(online["norm.running_mean"].float(), average["norm.running_mean"])
    with ema.swap(model):
        assert_same_state(clone_state(model), as_dtypes_of(average, online))
    assert_same_state(clone_state(model), online)
    assert_same_state(clone_state(ema.module), average)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_swap_restores_bit_for_bit_after_an_exception(dtype):
    model, ema = swapped(dtype)
    online = clone_state(model)
    with pytest.raises(KeyError, match="inside"), ema.swap(model):
        raise KeyError("inside")
    assert_same_state(clone_state(model), online)
    with ema.swap(model):  # and the wrapper can be used again
        pass
    ema.update(model)


def test_autocast_sees_the_weights_that_are_there():
    """It keeps 16-bit copies of weights until its region ends."""
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    ema = md.EMAWrapper(model)
    nn.init.ones_(model.weight)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own = model(x)
        with ema.swap(model):
            assert torch.equal(model(x), ema(x))
        assert torch.equal(model(x), own)
        ema.copy_to(model)
        assert torch.equal(model(x), ema(x))
        assert not torch.equal(model(x), own)


def test_the_wrapper_itself_is_unchanged_inside_swap():
    model, ema = swapped()
    before, x = copy.deepcopy(ema.state_dict()), torch.randn(4, 3)
    expected = ema(x)
    with ema.swap(model):
        inside = copy.deepcopy(ema.state_dict())
        assert torch.equal(ema(x), expected)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), expected)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(inside[name], value), name


def test_swap_keeps_the_parameter_objects_and_their_flags():
    model, ema = swapped()
    model.lin.bias.requires_grad_(False)
    objects = list(model.parameters())
    with ema.swap(model):
        inside = list(model.parameters())
    assert all(a is b is c for a, b, c in zip(objects, inside, model.parameters(), strict=True))
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert not any(p.requires_grad for p in ema.parameters())


def test_training_goes_on_after_swap_as_if_it_had_not_been():
    def train(with_swap):
        torch.manual_seed(0)
        model = small_model()
        ema = md.EMAWrapper(model, decay=0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
            ema.update(model)
            if with_swap:
                with ema.swap(model), torch.no_grad():
                    model(torch.zeros(1, 3))
        return flat(model), flat(ema.module)

    plain, interrupted = train(False), train(True)
    assert torch.equal(plain[0], interrupted[0])
    assert torch.equal(plain[1], interrupted[1])


def test_swap_inside_swap_is_refused_and_the_model_is_still_restored():
    model, ema = swapped()
    online, average = clone_state(model), clone_state(ema.module)
    with ema.swap(model):
        with pytest.raises(RuntimeError, match="swap"), ema.swap(model):
            pass
        assert_same_state(clone_state(model), average)
    assert_same_state(clone_state(model), online)


def test_update_inside_swap_is_refused_and_nothing_moves():
    model, ema = swapped()
    online, average, step = clone_state(model), clone_state(ema.module), ema.step
    with ema.swap(model), pytest.raises(RuntimeError, match="swap"):
        ema.update(model)
    assert_same_state(clone_state(model), online)
    assert_same_state(clone_state(ema.module), average)
    assert ema.step == step


def test_swap_with_a_model_that_does_not_fit_changes_nothing():
    _, ema = swapped()
    other = Normed()
    other.extra = nn.Parameter(torch.ones(2))
    before = clone_state(other)
    with pytest.raises(ValueError, match="extra"), ema.swap(other):
        pytest.fail("the body must not run")
    assert_same_state(clone_state(other), before)
    with ema.swap(Normed()):  # a refused swap is not an open one
        pass


def test_swap_of_tied_weights_keeps_the_tie():
    model = nn.Module()
    model.a, model.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model.b.weight = model.a.weight
    ema = md.EMAWrapper(model, decay=0.5)
    fill(model, 7.0)
    with ema.swap(model):
        assert model.b.weight is model.a.weight
        assert torch.equal(model.a.weight, ema.module.a.weight)
    assert model.b.weight is model.a.weight
    assert torch.equal(model.a.weight, torch.full((2, 2), 7.0))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_copy_to_writes_the_average_into_the_model(dtype):
    model, ema = swapped(dtype)
    objects = list(model.parameters())
    average = clone_state(ema.module)
    ema.copy_to(model)
    assert_same_state(clone_state(model), as_dtypes_of(average, clone_state(model)))
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    redraw_all(model, torch.Generator().manual_seed(8))  # no storage is shared
    assert_same_state(clone_state(ema.module), average)


@torch.no_grad()
def test_lstm_computes_with_the_swapped_weights_inside_swap_and_its_own_after():
    model = nn.LSTM(3, 4)
    ema = md.EMAWrapper(model)
    fill(model, 0.125)
    x = torch.randn(2, 1, 3)
    own, average = model(x)[0], ema(x)[0]
    assert not torch.equal(own, average)
    with ema.swap(model):
        assert torch.equal(model(x)[0], average)
    assert torch.equal(model(x)[0], own)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_made_inside_swap_is_not_inside_one(way):
    model = Branches()
    ema = md.EMAWrapper(model)
    with ema.swap(model):
        twin = way(ema)
    twin.update(model)
    with twin.swap(model):
        pass
    assert twin.step == 1


def test_swap_on_cpu_sets_the_storage_of_the_model_aside():
    model = known()
    ema = md.EMAWrapper(model)
    own, average = pointers(model), pointers(ema.module)
    with ema.swap(model):
        assert not set(pointers(model)) & {*own, *average}
        assert pointers(ema.module) == average
    assert pointers(model) == own


def test_what_is_done_to_the_model_inside_swap_reaches_no_average_and_is_undone():
    model = known()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = md.EMAWrapper(model, decay=0.5)
    fill(model, 3.0)
    ema.update(model)
    online, average, other = clone_state(model), clone_state(ema.module), known().state_dict()
    with ema.swap(model):
        model.running(model.last(model.first(torch.randn(4, 2)))).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model.first.weight, average["first.weight"])
        assert_same_state(clone_state(ema.module), average)
        model.load_state_dict(other)
        fill(model, 9.0)
        model.running.running_mean.fill_(9.0)
        assert_same_state(clone_state(ema.module), average)
    assert_same_state(clone_state(model), online)
    assert_same_state(clone_state(ema.module), average)


@torch.no_grad()
def test_tensors_that_are_replaced_inside_swap_are_replaced_by_the_own_ones_again():
    model = nn.Sequential(nn.LSTM(2, 2), nn.BatchNorm1d(2))
    ema, other = md.EMAWrapper(model), nn.Sequential(nn.LSTM(2, 2), nn.BatchNorm1d(2)).state_dict()
    held, x = [*model.parameters(), *model.buffers()], torch.randn(3, 1, 2)
    expected = model[0](x)[0]
    with ema.swap(model):
        model.load_state_dict(other, assign=True)
        assert not torch.equal(model[0](x)[0], expected)
    assert all(now is own for now, own in zip([*model.parameters(), *model.buffers()], held, strict=True))
    assert torch.equal(model[0](x)[0], expected)


def with_flat_weights(model):
    """All parameters are views of one flat tensor, as those of an RNN that cuDNN runs."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    pieces = flat.split([p.numel() for p in model.parameters()])
    for p, piece in zip(model.parameters(), pieces, strict=True):
        p.data = piece.view_as(p)
    return model, flat


def test_swap_keeps_the_place_of_weights_that_share_their_storage():
    model, flat = with_flat_weights(Branches())
    ema = md.EMAWrapper(model, decay=0.5)
    number_parameters(model)
    ema.update(model, decay=0.0)
    fill(model, 7.0)
    places = pointers(model)
    with ema.swap(model):
        assert pointers(model) == places
        assert flat.tolist() == [1.0] * 4 + [2.0] * 2 + [3.0] * 4 + [4.0] * 2
    assert pointers(model) == places
    assert flat.tolist() == [7.0] * 12


def test_swap_of_parameters_tied_by_their_data_keeps_the_tie():
    model = Branches()
    model.last.weight.data = model.first.weight.data
    ema = md.EMAWrapper(model, decay=0.0)
    fill(model, 5.0)
    with ema.swap(model), torch.no_grad():
        model.first.weight.add_(1)
        assert torch.equal(model.first.weight, model.last.weight)
    assert values(model) == [5.0] * 4


@pytest.mark.usefixtures("process_group")
def test_swap_of_a_sharded_model():
    from torch.distributed.fsdp import fully_shard

    model, teacher = fully_shard(Branches()), fully_shard(Branches())
    ema = md.EMAWrapper(model, teacher=teacher)
    for p, q in zip(model.parameters(), teacher.parameters(), strict=True):
        p.detach().to_local().fill_(1.0)
        q.detach().to_local().fill_(2.0)
    with ema.swap(model):
        assert all(torch.equal(p.full_tensor(), torch.full(p.shape, 2.0)) for p in model.parameters())
    assert all(torch.equal(p.full_tensor(), torch.full(p.shape, 1.0)) for p in model.parameters())


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_graph_does_not_go_on_with_other_weights_than_it_was_made_with(inside):
    model, x = Branches(), torch.randn(4, 2)
    ema = md.EMAWrapper(model)
    loss = model(x).square().sum()
    with ema.swap(model):
        if inside:
            loss = model(x).square().sum()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tied", ["memory of other processes", "storage"])
@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.double(), lambda m: setattr(m[0].weight, "data", torch.zeros(3))]
)
def test_weights_that_are_copied_come_back_whatever_was_done_inside(cast, tied):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    fill(model, 1 / 3)
    if tied == "storage":
        model[1].weight.data = model[0].weight.data.t()
    else:
        model.share_memory()
    ema = md.EMAWrapper(model, decay=0.5)
    before = [(p.data_ptr(), p.dtype, p.shape, p.detach().clone()) for p in model.parameters()]
    with ema.swap(model):
        fill(model, 7.0)
        cast(model)
    for p, (place, dtype, shape, value) in zip(model.parameters(), before, strict=True):
        assert (p.data_ptr(), p.dtype, p.shape) == (place, dtype, shape)
        assert torch.equal(p, value)
    ema.update(model)


def test_the_average_takes_the_place_of_a_buffer_made_in_inference_mode():
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(3))
    ema = md.EMAWrapper(model)
    with torch.inference_mode():
        model.cache = torch.ones(3)
    ema.update(model)
    with torch.inference_mode():
        model.cache = torch.full((3,), 7.0)
        with ema.swap(model):
            assert model.cache.tolist() == [1.0] * 3
    assert model.cache.tolist() == [7.0] * 3


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("gradients", [False, True])
def test_shards_that_were_cast_inside_swap_come_back(gradients):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh, model = DeviceMesh("cpu", [0]), nn.Linear(4, 4)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))
    if gradients:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    ema = md.EMAWrapper(model, decay=0.5)
    before = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    with ema.swap(model):
        model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.full_tensor(), before[name])
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    ema.update(model)
