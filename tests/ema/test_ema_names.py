"""EMAWrapper: tensors go together by name, whatever wraps the model, and what does not fit is refused by name."""

import copy
import re

import pytest
import torch
from torch import distributed as dist
from torch import nn

import momentum_distill as md
from module_state import assert_same_state, clone_state
from small_models import Branches, fill, known, number_parameters, values

# ---------------------------------------------------------------------------------------------
# Names and wrappers
# ---------------------------------------------------------------------------------------------


class DistributedLike(nn.Module):
    """What DDP and its relatives look like from outside: one child, called `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def compiled(model):
    return torch.compile(model, backend="eager")


def nested_compiled(model):
    model.last = compiled(model.last)
    return model


def nested_data_parallel(model):
    model.last = nn.DataParallel(model.last)
    return model


WRAPPERS = {
    "torch.compile": compiled,
    "torch.compile nested": nested_compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel nested": nested_data_parallel,
    "DDP-like": DistributedLike,
    "compile of DDP-like": lambda model: compiled(DistributedLike(model)),
    "DDP-like of compile": lambda model: DistributedLike(compiled(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_online_model_wrapped_after_the_ema_was_made(wrap):
    model = Branches()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    wrapped = wrap(model)
    number_parameters(model)
    ema.update(wrapped)
    assert values(ema.module) == [0.5, 1.0, 1.5, 2.0]
    with ema.swap(wrapped):
        assert values(wrapped) == [0.5, 1.0, 1.5, 2.0]
    assert values(wrapped) == [1.0, 2.0, 3.0, 4.0]
    ema.copy_to(wrapped)
    assert values(wrapped) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_ema_made_of_a_wrapped_model_takes_the_plain_one_and_the_wrapped_one(wrap):
    plain = Branches()
    fill(plain, 0.0)
    wrapped = wrap(copy.deepcopy(plain))
    ema = md.EMAWrapper(wrapped, decay=0.5)
    number_parameters(plain)
    number_parameters(wrapped)
    ema.update(plain)
    assert values(ema.module) == [0.5, 1.0, 1.5, 2.0]
    ema.update(wrapped)
    assert values(ema.module) == [0.75, 1.5, 2.25, 3.0]
    x = torch.randn(3, 2)
    with ema.swap(plain), torch.no_grad():
        expected = plain(x)
    assert torch.equal(ema(x), expected)


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel], ids=["torch.compile", "DataParallel"])
def test_no_prefix_of_a_wrapper_reaches_the_saved_names(wrap):
    plain, wrapped = md.EMAWrapper(Branches()), md.EMAWrapper(wrap(Branches()))
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(wrapped.state_dict(), strict=True)
    assert_same_state(clone_state(plain), clone_state(wrapped))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_hides_no_mismatch(wrap):
    ema = md.EMAWrapper(Branches())
    other = wrap(Branches(("first", "middle", "last")))
    with pytest.raises(ValueError, match=r"middle\.(weight|bias)"):
        ema.update(other)


def test_a_wrapper_that_stands_twice_in_a_model_is_unwrapped_twice():
    inner = nn.Linear(2, 2)
    wrapped = nn.DataParallel(inner)
    ema = md.EMAWrapper(nn.ModuleDict({"a": inner, "b": inner}), decay=0.0)
    with torch.no_grad():
        inner.weight.add_(1.0)
    ema.update(nn.ModuleDict({"a": wrapped, "b": wrapped}))
    assert torch.equal(ema.module["b"].weight, inner.weight)


class OwnModule(nn.Module):
    """A real submodule called `module`, and parameters that stripping its name would hit."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.module = nn.Linear(2, 2)

    def forward(self, x):
        return self.module(x) + x @ self.weight + self.bias


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, DistributedLike], ids=["plain", "compile", "ddp"])
@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
def test_a_real_submodule_called_module_is_no_wrapper(wrap, nested):
    model = nn.Sequential(OwnModule(), nn.Linear(2, 2)) if nested else OwnModule()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    number_parameters(model)
    ema.update(wrap(model))
    expected = [0.5 * (k + 1) for k in range(len(list(model.parameters())))]
    assert values(ema.module) == expected


def test_a_model_whose_only_child_is_called_module():
    model = DistributedLike(DistributedLike(nn.Linear(2, 2)))
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    number_parameters(model)
    ema.update(model)
    ema.update(model.module)
    ema.update(model.module.module)
    assert values(ema.module) == [0.875, 1.75]


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_in_every_order():
    plain = Branches()
    fill(plain, 0.0)
    before = md.EMAWrapper(plain, decay=0.5)
    ddp = nn.parallel.DistributedDataParallel(plain)
    after = md.EMAWrapper(ddp, decay=0.5)
    inner = md.EMAWrapper(ddp.module, decay=0.5)
    parent = nn.ModuleDict({"a": nn.Linear(2, 2), "b": ddp})
    fill(parent["a"], 0.0)
    nested = md.EMAWrapper(nn.ModuleDict({"a": nn.Linear(2, 2), "b": Branches()}), decay=0.5)
    fill(nested.module, 0.0)
    number_parameters(plain)
    for ema in (before, after, inner):
        ema.update(ddp)
        assert values(ema.module) == [0.5, 1.0, 1.5, 2.0]
        assert not any(p.requires_grad for p in ema.parameters())
    nested.update(parent)
    assert values(nested.module) == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    x = torch.randn(3, 2)
    assert torch.equal(after(x), before(x))
    assert after.state_dict().keys() == before.state_dict().keys()


@pytest.mark.usefixtures("process_group")
def test_the_wrapper_inside_a_ddp_module_does_not_disturb_it():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.online = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
            self.ema = md.EMAWrapper(self.online)

        def forward(self, x):
            return (self.online(x) - self.ema(x)).square().sum()

    ddp = nn.parallel.DistributedDataParallel(Student())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        ddp(torch.randn(4, 2)).backward()  # an unused parameter would raise at the second turn
        optimizer.step()
        ddp.module.ema.update(ddp.module.online)
    assert ddp.module.ema.step == 3


@pytest.mark.usefixtures("process_group")
def test_shards_of_a_fully_sharded_model_are_averaged_with_a_ready_teacher():
    from torch.distributed.fsdp import fully_shard

    plain, teacher = Branches(), Branches()
    fill(plain, 0.0)
    fill(teacher, 0.0)
    fully_shard(plain)
    fully_shard(teacher)
    ema = md.EMAWrapper(plain, decay=0.5, teacher=teacher)
    assert ema.module is teacher
    for p in plain.parameters():
        p.detach().to_local().fill_(1.0)
    ema.update(plain)
    ema.update(plain)
    for p in ema.module.parameters():
        assert isinstance(p, dist.tensor.DTensor)
        assert torch.equal(p.full_tensor(), torch.full(p.shape, 0.75))
        assert not p.requires_grad


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_without_a_teacher_is_a_type_error_that_names_teacher():
    from torch.distributed.fsdp import fully_shard

    model = Branches()
    fully_shard(model)
    with pytest.raises(TypeError, match="teacher"):
        md.EMAWrapper(model)
    with pytest.raises(TypeError, match=r"got 'first.weight' of type DTensor beside an average of type Parameter$"):
        md.EMAWrapper(model, teacher=Branches())


# ---------------------------------------------------------------------------------------------
# Mismatches: by name, before anything moves
# ---------------------------------------------------------------------------------------------


def other_shape(model):
    model.last = nn.Linear(2, 3)
    return model


def with_parameter(model):
    model.extra = nn.Parameter(torch.zeros(2, 2))
    return model


def without_last(model):
    del model.last
    return model


def buffer_of_other_shape(model):
    model.running = nn.BatchNorm1d(3)
    return model


MISMATCHES = {
    "a parameter inserted in the middle": (
        lambda: Branches(("first", "middle", "last", "running")),
        r"middle\.(weight|bias)",
    ),
    "a parameter added late": (lambda: with_parameter(known()), r"\bextra\b"),
    "a submodule missing": (lambda: without_last(known()), r"last\.(weight|bias)"),
    "a parameter of another shape": (lambda: other_shape(known()), r"\(2, 2\) for 'last\.weight', got \(3, 2\)"),
    "a buffer of another shape": (lambda: buffer_of_other_shape(known()), r"running\.\w+"),
}


@pytest.mark.parametrize(("make", "name"), MISMATCHES.values(), ids=MISMATCHES)
@pytest.mark.parametrize("planned", [False, True], ids=["first update", "later update"])
def test_a_mismatch_is_an_error_that_names_the_tensor_and_nothing_moves(make, name, planned):
    model = known()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    if planned:
        ema.update(model)
    before, step = clone_state(ema), ema.step
    other = make()
    fill(other, 1.0)
    with pytest.raises(ValueError, match=r"(?s)^model: expected .*got .*") as error:
        ema.update(other)
    assert re.search(name, str(error.value)), str(error.value)
    assert_same_state(clone_state(ema), before)
    assert ema.step == step


def test_a_parameter_added_to_the_very_model_after_an_update_is_noticed():
    model = known()
    ema = md.EMAWrapper(model)
    ema.update(model)
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="extra"):
        ema.update(model)


def test_a_model_without_numbers_is_refused_by_name():
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    ema = md.EMAWrapper(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^model: expected numbers in 'weight', got none: it is on the device meta"):
        ema.update(empty)
