"""EMAWrapper: one named test for each mistake found in other implementations."""

import copy
import gc
import pickle
import re
import warnings
import weakref

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import momentum_distill as md
from module_state import assert_same_state, clone_state
from momentum_distill import _ema_plan


class Branches(nn.Module):
    """Several submodules of one shape: matching by position instead of name goes unnoticed."""

    def __init__(self, names=("first", "last")):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class DistributedLike(nn.Module):
    """What DDP and its relatives look like from outside: one child, called `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@torch.no_grad()
def fill(module, value):
    for p in module.parameters():
        p.fill_(value)


@torch.no_grad()
def number_parameters(module):
    """Parameter k is filled with k + 1, so that a mix-up shows."""
    for k, p in enumerate(module.parameters()):
        p.fill_(k + 1.0)


def values(module):
    """One number per parameter."""
    return [p.detach().flatten()[0].item() for p in module.parameters()]


@pytest.fixture
def process_group(tmp_path):
    """A real process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Tied weights, buffers, BatchNorm
# ---------------------------------------------------------------------------------------------


def test_tied_weights_are_averaged_once():
    model = Branches()
    model.last.weight = model.first.weight
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.9)
    assert ema.module.last.weight is ema.module.first.weight
    fill(model, 1.0)
    ema.update(model)
    assert values(ema.module) == pytest.approx([0.1] * 3)  # 0.19 where it is done twice
    assert ema.module.last.weight is ema.module.first.weight


def test_tied_weights_of_a_bf16_model_stay_tied_in_the_float32_average():
    model = Branches().bfloat16()
    model.last.weight = model.first.weight
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.9)
    assert ema.module.last.weight is ema.module.first.weight
    fill(model, 1.0)
    ema.update(model)
    assert values(ema.module) == pytest.approx([0.1] * 3)


def test_tied_buffers_are_averaged_once():
    model = Branches()
    model.register_buffer("scale", torch.zeros(2))
    model.first.register_buffer("scale", model.scale)
    ema = md.EMAWrapper(model, decay=0.9, buffers=["scale"])
    model.scale.fill_(1.0)
    ema.update(model)
    assert ema.module.first.scale.tolist() == pytest.approx([0.1, 0.1])


def test_a_teacher_need_not_tie_the_buffers_that_the_model_ties():
    model, teacher = Branches(), Branches()
    for module in (teacher, teacher.first, model):
        module.register_buffer("scale", torch.zeros(2))
    model.first.register_buffer("scale", model.scale)
    ema = md.EMAWrapper(model, decay=0.9, buffers=["scale"], teacher=teacher)
    model.scale.fill_(1.0)
    ema.update(model)
    for module in (teacher, teacher.first):
        assert module.scale.tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("buffers", ["copy", "ema", "frozen"])
def test_integer_buffers_are_copied_exactly(buffers):
    model = nn.Module()
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.register_buffer("flag", torch.tensor([False, True]))
    ema = md.EMAWrapper(model, decay=0.9, buffers=buffers)
    for _ in range(100):
        model.count += 1
        model.flag.logical_not_()
        ema.update(model)
    assert ema.module.count.item() == 100
    assert ema.module.flag.tolist() == [False, True]
    model.count.fill_(2**60 + 1)  # not a number that a detour over floating point could keep
    ema.update(model)
    assert ema.module.count.item() == 2**60 + 1
    assert ema.module.count.dtype == torch.int64
    assert ema.module.flag.dtype == torch.bool


def batch_norm_statistics(buffers, updates=3):
    torch.manual_seed(0)
    model = nn.BatchNorm1d(2)
    ema = md.EMAWrapper(model, decay=0.5, buffers=buffers)
    average = model.running_mean.clone()
    for _ in range(updates):
        model(torch.randn(8, 2) + 5)
        ema.update(model)
        average = 0.5 * average + 0.5 * model.running_mean
    assert ema.module.num_batches_tracked.item() == updates
    return model.running_mean, average, ema.module.running_mean


def test_batch_norm_statistics_are_copied_by_default():
    online, _, teacher = batch_norm_statistics("copy")
    assert torch.equal(teacher, online)
    assert md.EMAWrapper(nn.BatchNorm1d(2)).module.running_mean.tolist() == [0, 0]
    model = nn.BatchNorm1d(2)
    ema = md.EMAWrapper(model)
    model.running_mean.fill_(3)
    ema.update(model)
    assert ema.module.running_mean.tolist() == [3, 3]


def test_batch_norm_statistics_are_averaged_on_request():
    online, average, teacher = batch_norm_statistics("ema")
    torch.testing.assert_close(teacher, average)
    assert not torch.allclose(teacher, online)


def test_batch_norm_statistics_stay_frozen_on_request():
    online, _, teacher = batch_norm_statistics("frozen")
    assert teacher.tolist() == [0.0, 0.0]
    assert online.abs().min() > 0.5


def test_non_persistent_buffers_are_copied_too():
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.zeros(3), persistent=False)
    ema = md.EMAWrapper(model)
    model.positions.copy_(torch.tensor([1.0, 2.0, 3.0]))
    ema.update(model)
    assert ema.module.positions.tolist() == [1.0, 2.0, 3.0]


def test_buffers_registered_as_none_are_no_obstacle():
    model = nn.BatchNorm1d(2, track_running_stats=False)
    model.register_buffer("later", None)
    ema = md.EMAWrapper(model, decay=0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [2.0, 2.0]
    assert ema.module.later is None


def test_parameter_registered_as_none_is_no_obstacle():
    model = nn.Linear(2, 2, bias=False)
    ema = md.EMAWrapper(model, decay=0.0)
    fill(model, 4.0)
    ema.update(model)
    assert values(ema.module) == [4.0]


def test_a_buffer_that_was_assigned_anew_is_followed():
    model = nn.BatchNorm1d(2)
    ema = md.EMAWrapper(model)
    ema.update(model)
    model.running_mean = torch.full((2,), 5.0)
    ema.update(model)
    assert ema.module.running_mean.tolist() == [5.0, 5.0]


# ---------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------


def all_modes(module):
    return {m.training for m in module.modules()}


def test_parent_train_leaves_the_average_in_eval_mode():
    parent = nn.ModuleDict({"online": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))})
    parent["ema"] = md.EMAWrapper(parent["online"])
    assert parent["online"].training
    assert all_modes(parent["ema"].module) == {False}
    for _ in range(2):
        parent.train()
        assert all_modes(parent["online"]) == {True}
        assert all_modes(parent["ema"]) == {False}
        parent.eval()
    parent["ema"].train()
    assert all_modes(parent["ema"].module) == {False}


def test_mode_train_stays_in_train_mode_when_the_parent_evaluates():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    parent = nn.ModuleDict({"ema": md.EMAWrapper(model, mode="train")})
    assert all_modes(parent["ema"].module) == {True}
    parent.eval()
    assert all_modes(parent["ema"].module) == {True}
    assert all_modes(model) == {False}


def test_dropout_is_off_and_batch_norm_does_not_move_in_the_average():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    ema = md.EMAWrapper(model)
    ema.train()
    before, x = clone_state(ema.module), torch.randn(16, 4) + 3
    assert torch.equal(ema(x), ema(x))
    assert_same_state(clone_state(ema.module), before)


# ---------------------------------------------------------------------------------------------
# Names and wrappers
# ---------------------------------------------------------------------------------------------


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


class OwnModule(nn.Module):
    """A real submodule called `module`, and parameters that stripping its name would hit."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.bias = nn.Parameter(torch.zeros(2))
        self.module = nn.Linear(2, 2)

    def forward(self, x):
        return self.module(x) + x @ self.weight + self.bias


def test_a_wrapper_that_stands_twice_in_a_model_is_unwrapped_twice():
    inner = nn.Linear(2, 2)
    wrapped = nn.DataParallel(inner)
    ema = md.EMAWrapper(nn.ModuleDict({"a": inner, "b": inner}), decay=0.0)
    with torch.no_grad():
        inner.weight.add_(1.0)
    ema.update(nn.ModuleDict({"a": wrapped, "b": wrapped}))
    assert torch.equal(ema.module["b"].weight, inner.weight)


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


def known():
    model = Branches()
    model.running = nn.BatchNorm1d(2)
    return model


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


def test_a_ready_teacher_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"middle\.(weight|bias)"):
        md.EMAWrapper(Branches(), teacher=Branches(("first", "middle", "last")))
    with pytest.raises(ValueError, match=r"^teacher: expected shape \(2, 2\) for 'last\.weight', got \(3, 2\)"):
        md.EMAWrapper(Branches(), teacher=other_shape(Branches()))


# ---------------------------------------------------------------------------------------------
# The teacher: ready made, never trained, never moved to 16 bit
# ---------------------------------------------------------------------------------------------


def test_a_ready_teacher_is_used_as_it_is():
    model, teacher = Branches(), Branches()
    fill(model, 0.0)
    fill(teacher, 1.0)
    storages = [p.data_ptr() for p in teacher.parameters()]
    ema = md.EMAWrapper(model, decay=0.75, teacher=teacher)
    assert ema.module is teacher
    assert values(ema.module) == [1.0] * 4
    ema.update(model)
    assert values(teacher) == [0.75] * 4
    ema.update(model, decay=0.0)
    assert values(teacher) == [0.0] * 4
    assert [p.data_ptr() for p in teacher.parameters()] == storages
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all_modes(teacher) == {False}


def test_a_ready_teacher_with_old_gradients_is_not_moved_by_an_optimizer():
    teacher = Branches()
    teacher(torch.ones(1, 2)).sum().backward()
    parent = nn.ModuleDict({"online": Branches()})
    parent["ema"] = md.EMAWrapper(parent["online"], teacher=teacher)
    before = clone_state(teacher)
    torch.optim.SGD(parent.parameters(), lr=1.0, weight_decay=0.1).step()  # steps whatever has a gradient, 0 too
    assert_same_state(clone_state(teacher), before)


def test_the_online_model_is_refused_as_its_own_teacher():
    model = Branches()
    with pytest.raises(ValueError, match=r"^teacher: expected .*, got "):
        md.EMAWrapper(model, teacher=model)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_a_teacher_that_shares_a_tensor_with_the_online_model_is_refused():
    shared = nn.Linear(2, 2)
    model, teacher = nn.Sequential(shared, nn.Linear(2, 2)), nn.Sequential(shared, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^teacher: expected .*, got .*0\.(weight|bias)"):
        md.EMAWrapper(model, teacher=teacher)
    assert all(p.requires_grad for p in model.parameters())


def test_teacher_never_requires_grad_and_is_not_moved_by_an_optimizer_over_all_parameters():
    parent = nn.ModuleDict({"online": Branches()})
    parent["ema"] = md.EMAWrapper(parent["online"])
    assert not any(p.requires_grad for p in parent["ema"].parameters())
    before = clone_state(parent["ema"])
    optimizer = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.5)
    x = torch.randn(4, 2)
    (parent["online"](x) - parent["ema"](x) + 1).square().sum().backward()
    optimizer.step()
    assert_same_state(clone_state(parent["ema"]), before)
    assert all(p.grad is None for p in parent["ema"].parameters())
    assert all(p.grad is not None for p in parent["online"].parameters())


def test_teacher_never_requires_grad_after_update_load_and_copy():
    model = Branches()
    ema = md.EMAWrapper(model)
    ema.update(model)
    ema.load_state_dict(ema.state_dict(), assign=True)
    for each in (ema, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert not any(p.requires_grad for p in each.parameters())
        assert not each(torch.ones(1, 2)).requires_grad


def test_online_model_is_not_registered_in_the_wrapper():
    model = Branches()
    model.norm = nn.BatchNorm1d(2)
    parent = nn.ModuleDict({"online": model, "ema": md.EMAWrapper(model)})
    parent["ema"].update(model)
    with parent["ema"].swap(model):
        inside = len(list(parent["ema"].parameters()))
    once = len(list(model.parameters()))
    assert inside == once
    assert len(list(parent["ema"].parameters())) == once
    assert len(list(parent.parameters())) == 2 * once
    assert not any(m is model for m in parent["ema"].modules())
    tensors = [v for v in parent["ema"].state_dict().values() if isinstance(v, torch.Tensor)]
    elements = sum(v.numel() for v in model.state_dict().values())
    assert elements <= sum(v.numel() for v in tensors) <= elements + 2


def test_frozen_parameters_take_part_and_do_not_drift():
    model = Branches()
    for p in model.first.parameters():
        p.requires_grad_(False)
    ema = md.EMAWrapper(model, decay=0.995)
    start = clone_state(model.first)
    for _ in range(1000):
        ema.update(model)
    for name, value in start.items():
        torch.testing.assert_close(ema.module.first.get_parameter(name), value, rtol=1e-6, atol=0)
    fill(model.first, 1.0)  # frozen for the optimizer, changed by hand
    ema.update(model, decay=0.0)
    assert values(ema.module.first) == [1.0, 1.0]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def float_dtypes(module):
    tensors = [*module.parameters(), *module.buffers()]
    return {t.dtype for t in tensors if t.is_floating_point()}


def in_bf16(state):
    def cast(value):
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floating else value

    return {name: cast(value) for name, value in state.items()}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("inside", [False, True], ids=["wrapper", "parent"])
def test_float32_average_survives_a_bf16_checkpoint(inside, assign):
    model = known().bfloat16()
    ema = md.EMAWrapper(model, decay=0.999)
    fill(model, 1.0)
    ema.update(model, decay=0.0)
    checkpoint = in_bf16({k: v for k, v in ema.state_dict().items() if k.startswith("module.")})
    checkpoint = dict(ema.state_dict()) | checkpoint
    restored = md.EMAWrapper(known().bfloat16(), decay=0.999)
    restored.update(model)  # a plan made before the load must not survive it
    if inside:
        checkpoint = {f"ema.{name}": value for name, value in checkpoint.items()}
        nn.ModuleDict({"ema": restored}).load_state_dict(checkpoint, assign=assign)
    else:
        restored.load_state_dict(checkpoint, assign=assign)
    assert not any(p.requires_grad for p in restored.parameters())
    assert float_dtypes(restored.module) == {torch.float32}
    assert values(restored.module) == [1.0] * 6
    fill(model, 1.25)
    restored.update(model)
    assert values(restored.module) == pytest.approx([1.00025] * 6, abs=1e-6)
    assert torch.isfinite(restored.module.first(torch.ones(1, 2))).all()


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(device, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("direct", [False, True], ids=["parent", "wrapper"])
def test_float32_average_survives_a_cast_to_16_bit(cast, direct):
    parent = nn.ModuleDict({"online": known()})
    parent["ema"] = md.EMAWrapper(parent["online"], decay=0.999)
    fill(parent["online"], 1.0)
    parent["ema"].update(parent["online"], decay=0.0)
    exact = clone_state(parent["ema"].module)
    exact["running.running_var"] += 1e-4  # a value that 16 bit cannot hold
    parent["ema"].module.running.running_var += 1e-4
    cast(parent["ema"] if direct else parent)
    cast(parent)
    assert float_dtypes(parent["online"]) <= {torch.float16, torch.bfloat16}
    assert float_dtypes(parent["ema"].module) == {torch.float32}
    assert_same_state(clone_state(parent["ema"].module), exact)
    fill(parent["online"], 1.25)
    parent["ema"].update(parent["online"])
    assert values(parent["ema"].module) == pytest.approx([1.00025] * 6, abs=1e-6)
    x = torch.ones(2, 2, dtype=next(parent["online"].parameters()).dtype)
    assert torch.isfinite(parent["ema"].module.first(x.float())).all()


def test_a_parent_cast_to_16_bit_still_runs_the_average_on_its_16_bit_inputs():
    parent = nn.ModuleDict({"online": Branches()})
    parent["ema"] = md.EMAWrapper(parent["online"])
    parent.bfloat16()
    x = torch.randn(3, 2, dtype=torch.bfloat16)
    expected = parent["online"](x).float()
    torch.testing.assert_close(parent["ema"](x).float(), expected, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------------------------------------
# In place: storages, LSTM, plans
# ---------------------------------------------------------------------------------------------


def pointers(module):
    return [t.data_ptr() for t in [*module.parameters(), *module.buffers()]]


def test_update_swap_and_load_keep_every_storage():
    model = known()
    ema = md.EMAWrapper(model, decay=0.5, buffers="ema")
    objects, before = list(ema.module.parameters()), pointers(ema.module)
    for k in range(3):
        fill(model, float(k))
        ema.update(model)
    with ema.swap(model):
        pass
    ema.copy_to(model)
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.update(model, decay=0.0)
    assert pointers(ema.module) == before
    assert all(a is b for a, b in zip(objects, ema.module.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lstm_computes_with_the_averaged_weights_after_updates(dtype):
    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True).to(dtype)
    ema = md.EMAWrapper(model, decay=0.5)
    for value in (0.1, 0.3):
        fill(model, value)
        ema.update(model)
    reference = nn.LSTM(3, 4, batch_first=True)
    reference.load_state_dict(ema.module.state_dict())
    x = torch.randn(2, 5, 3, dtype=dtype)
    output, (hidden, cell) = ema(x)
    with torch.no_grad():  # another kernel runs where a gradient is asked for
        expected, (expected_hidden, expected_cell) = reference(x.float())
    assert torch.equal(output, expected)
    assert torch.equal(hidden, expected_hidden)
    assert torch.equal(cell, expected_cell)


@pytest.mark.parametrize(
    "disturb",
    [
        lambda ema: ema.load_state_dict(copy.deepcopy(ema.state_dict())),
        lambda ema: ema.load_state_dict(copy.deepcopy(ema.state_dict()), assign=True),
        lambda ema: ema.bfloat16(),
        lambda ema: ema.to("cpu"),
    ],
    ids=["load", "load with assign", "cast", "to"],
)
def test_lstm_keeps_its_flat_weights_through(disturb):
    model = nn.LSTM(3, 4)
    ema = md.EMAWrapper(model, decay=0.0)
    x = torch.randn(2, 1, 3)
    disturb(ema)
    for value in (0.25, 0.5):
        fill(model, value)
        ema.update(model)
        with torch.no_grad():
            assert torch.equal(ema(x)[0], model(x)[0])


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


def test_a_replaced_parameter_is_followed():
    model = Branches()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    model.last.weight = nn.Parameter(torch.full((2, 2), 8.0))
    ema.update(model)
    assert values(ema.module) == [0.0, 0.0, 4.0, 0.0]


def test_a_parameter_replaced_by_one_of_another_shape_is_refused():
    model = Branches()
    ema = md.EMAWrapper(model)
    ema.update(model)
    model.last.weight = nn.Parameter(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"last\.weight"):
        ema.update(model)


def test_data_cut_to_a_view_of_itself_under_the_same_parameter_is_refused():
    model = Branches()
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    before = values(ema.module)
    model.last.weight.data = model.last.weight.data[:1]  # the same address; would broadcast
    with pytest.raises(ValueError, match=r"last\.weight"):
        ema.update(model)
    assert values(ema.module) == before


def test_data_replaced_by_another_shape_under_the_same_parameter_is_refused():
    model = Branches()
    fill(model, 1.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    model.last.weight.data = torch.zeros(1, 2)  # would broadcast
    with pytest.raises(ValueError, match=r"last\.weight"):
        ema.update(model)
    assert values(ema.module) == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_an_online_model_that_changes_dtype_between_updates_is_followed(dtype):
    model = known()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    model.to(dtype)  # the same Parameter objects, new storages
    fill(model, 1.0)
    ema.update(model)
    assert values(ema.module) == [0.5] * 6
    assert float_dtypes(ema.module) == {torch.float32}
    with ema.swap(model):
        assert values(model) == [0.5] * 6
        assert float_dtypes(model) == {dtype}
    model.float()
    ema.update(model)
    assert values(ema.module) == [0.75] * 6


class Subclass(torch.Tensor):
    """As quantisation and DTensor have."""


def test_a_tensor_of_another_type_that_changes_dtype_between_updates_is_followed():
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Subclass))
    ema = md.EMAWrapper(model, decay=0.5, teacher=nn.Linear(2, 2, bias=False))
    ema.update(model, decay=0.0)
    model.double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update(model)
    assert ema.module.weight.dtype == torch.float32
    assert ema.module.weight.tolist() == [[0.5, 0.5]] * 2


def test_online_storage_moved_under_the_same_parameters_is_followed():
    model = Branches()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    for p in model.parameters():
        p.data = torch.ones_like(p)
    ema.update(model)
    assert values(ema.module) == [0.5] * 4


def test_a_tie_made_after_the_first_update_is_followed():
    model = Branches()
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    model.last.weight = model.first.weight  # online ties, the average has two tensors
    fill(model, 1.0)
    ema.update(model)
    assert values(ema.module) == [0.5] * 4


def test_a_tie_cut_after_the_first_update_is_refused():
    model = Branches()
    model.last.weight = model.first.weight
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    model.last.weight = nn.Parameter(torch.ones(2, 2))  # one average cannot follow two tensors
    with pytest.raises(ValueError, match=r"(first|last)\.weight"):
        ema.update(model)
    assert values(ema.module) == [0.0] * 3


def test_another_instance_of_the_same_structure_is_followed():
    first, second = Branches(), Branches()
    fill(first, 0.0)
    fill(second, 4.0)
    ema = md.EMAWrapper(first, decay=0.5)
    ema.update(first)
    ema.update(second)
    assert values(ema.module) == [2.0] * 4
    ema.update(first)
    assert values(ema.module) == [1.0] * 4


def test_memory_of_a_deleted_model_reused_by_a_new_one_confuses_no_plan():
    ema = md.EMAWrapper(Branches(), decay=0.0)
    for k in range(100):
        model = Branches()
        fill(model, float(k))
        ema.update(model)
        assert values(ema.module) == [float(k)] * 4
        del model


def test_a_deleted_online_model_is_not_kept_alive():
    model = known()
    ema = md.EMAWrapper(model)
    ema.update(model)
    with ema.swap(model):
        pass
    ema.copy_to(model)
    watched = [weakref.ref(x) for x in (model, model.first, model.first.weight, model.running)]
    watched.append(weakref.ref(model.running.running_mean))
    del model
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


# ---------------------------------------------------------------------------------------------
# Modules that cannot be copied, lazy and parametrized modules
# ---------------------------------------------------------------------------------------------


def test_a_lazy_module_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"(?s)^model: expected .*got .*") as error:
        md.EMAWrapper(model)
    assert "1.weight" in str(error.value)
    model(torch.ones(1, 2))
    md.EMAWrapper(model).update(model)  # after one forward it is a module like any other


def with_live_graph():
    model = Branches()
    model.cache = model.first.weight * 2
    return model


def with_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.utils.weight_norm(nn.Linear(2, 2))
    model(torch.ones(1, 2))
    return model


@pytest.mark.parametrize("make", [with_live_graph, with_old_weight_norm])
def test_a_module_that_cannot_be_copied_is_a_type_error_that_names_the_way_out(make):
    with pytest.raises(RuntimeError):
        copy.deepcopy(make())  # else this test says nothing
    with pytest.raises(TypeError, match=r"(?s)^model: expected .*got .*teacher"):
        md.EMAWrapper(make())


def test_a_module_that_cannot_be_copied_works_with_a_ready_teacher():
    model, teacher = with_live_graph(), Branches()
    fill(teacher, 0.0)
    ema = md.EMAWrapper(model, decay=0.5, teacher=teacher)
    fill(model, 1.0)
    ema.update(model)
    assert values(ema.module) == [0.5] * 4


def test_parametrized_weight_norm_is_averaged_in_its_own_parameters():
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    ema = md.EMAWrapper(model, decay=0.5)
    magnitude, direction = (
        model.parametrizations.weight.original0,
        model.parametrizations.weight.original1,
    )
    average = [magnitude.detach().clone(), direction.detach().clone(), model.bias.detach().clone()]
    model(torch.ones(1, 3)).sum().backward()
    for _ in range(2):
        with torch.no_grad():
            magnitude.add_(0.5)
            direction.mul_(-0.9)
        ema.update(model)
        for a, p in zip(average, (magnitude, direction, model.bias), strict=True):
            a.lerp_(p.detach(), 0.5)
    weight = average[0] * average[1] / average[1].norm(dim=1, keepdim=True)
    torch.testing.assert_close(ema.module.weight, weight)
    x = torch.randn(4, 3)
    torch.testing.assert_close(ema(x), x @ weight.T + average[2])


# ---------------------------------------------------------------------------------------------
# Where update may stand in a training step
# ---------------------------------------------------------------------------------------------


def test_updates_after_the_optimizer_step_average_the_stepped_weights():
    torch.manual_seed(0)
    model = Branches()
    ema = md.EMAWrapper(model, decay=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    expected = [p.detach().double() for p in model.parameters()]
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
        ema.update(model)
        expected = [0.8 * e + 0.2 * p.detach().double() for e, p in zip(expected, model.parameters(), strict=True)]
    for e, p in zip(expected, ema.module.parameters(), strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-5, atol=1e-6)


def test_update_between_forward_and_backward_breaks_no_gradient():
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(4, 2)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ema = md.EMAWrapper(model, decay=0.5)
    loss = (model(x) - 0 * ema(x)).square().sum()
    ema.update(model)
    loss.backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


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


@pytest.mark.parametrize("buffers", ["copy", "ema", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_and_swap_look_at_no_value(dtype, buffers):
    """Tensors without values: anything that waited for a device to hand one over would raise."""
    model = known().to(dtype).to("meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        model.first.weight.sum().item()
    ema = md.EMAWrapper(model, buffers=buffers)
    ema.update(model)
    ema.update(model, decay=0.0)
    with ema.swap(model):
        assert ema(torch.ones(4, 2, device="meta", dtype=dtype)).shape == (4, 2)
    ema.copy_to(model)
    assert {t.device.type for t in [*ema.parameters(), *ema.buffers()]} == {"meta"}
    assert ema.step == 2


def test_update_builds_no_graph():
    model = Branches()
    ema = md.EMAWrapper(model, decay=0.5)
    with torch.enable_grad():
        for _ in range(3):
            ema.update(model)
    for p in ema.module.parameters():
        assert p.is_leaf
        assert p.grad_fn is None
        assert p.grad is None


def test_update_of_a_model_with_unusual_strides_and_sizes():
    model = nn.Module()
    model.transposed = nn.Parameter(torch.zeros(3, 2).T)
    model.channels_last = nn.Parameter(torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.scalar = nn.Parameter(torch.zeros(()))
    ema = md.EMAWrapper(model, decay=0.5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    ema.update(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ema.module.get_parameter(name), p * 0.5, check_stride=False)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (0,)], ids=str)
@pytest.mark.parametrize("side", ["online", "average"])
def test_a_tensor_replaced_by_an_equal_one_is_followed(shape, side):
    """`==` of two tensors says nothing about whether they are the same one."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(shape))
    ema = md.EMAWrapper(model)
    ema.update(model)
    module = model if side == "online" else ema.module
    module.weight = nn.Parameter(torch.ones(shape), requires_grad=side == "online")
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model, decay=0.0)
    assert torch.equal(ema.module.weight, torch.full(shape, 3.0))


def test_a_model_of_buffers_alone_is_legal():
    model = nn.BatchNorm1d(2, affine=False)
    ema = md.EMAWrapper(model)
    model.running_mean.fill_(3.0)
    ema.update(model)
    assert ema.module.running_mean.tolist() == [3.0, 3.0]


# ---------------------------------------------------------------------------------------------
# What an update and a swap cost
# ---------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Which operations run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("buffers", ["copy", "ema", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_later_update_makes_no_tensor(dtype, buffers):
    model = known().to(dtype)
    ema = md.EMAWrapper(model, decay=0.5, buffers=buffers)
    ema.update(model)
    with Operations() as operations:
        ema.update(model)
    assert set(operations.names) <= {"_foreach_copy_", "_foreach_lerp_", "_fused_sgd_"}
    assert len(operations.names) <= 4  # a few for all tensors, not a few for each


def test_one_thread_and_several_give_the_same_bits_whatever_the_layout(monkeypatch):
    """With one thread another kernel averages what lies in memory without gaps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), nn.Linear(4, 4))
    model = nn.ModuleList([model, copy.deepcopy(model).double()])
    averages = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        generator = torch.Generator().manual_seed(0)
        fill(model, 1.0)
        ema = md.EMAWrapper(model)
        for decay in (0.995, 0.3, 0.5, 0.9):
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -1, 1, generator=generator)
            with Operations() as operations:
                ema.update(model, decay=decay)
            assert ("_fused_sgd_" in operations.names) == (threads == 1 and decay > 0.5)
        averages.append(clone_state(ema.module))
    assert_same_state(*averages)


def test_data_turned_in_place_under_the_same_parameter_is_followed(monkeypatch):
    """The same address, shape and number of elements."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = nn.Linear(2, 2, bias=False)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    ema.module.weight.zero_()
    nn.init.eye_(model.weight).data[0, 1] = 4.0
    model.weight.data = model.weight.data.T
    ema.update(model)
    assert ema.module.weight.tolist() == [[0.5, 0.0], [2.0, 0.5]]


def test_data_of_another_shape_and_as_many_elements_is_refused():
    model = nn.Linear(3, 2, bias=False)
    ema = md.EMAWrapper(model)
    ema.update(model)
    model.weight.data = model.weight.data.view(3, 2)
    with pytest.raises(ValueError, match=r"^model: expected shape \(2, 3\) for 'weight', got \(3, 2\)$"):
        ema.update(model)


def test_a_16_bit_model_needs_memory_for_its_largest_tensors_only(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)), nn.Linear(3, 20)).bfloat16()
    whole, parts = md.EMAWrapper(model, decay=0.75), md.EMAWrapper(model, decay=0.75)
    fill(model, 2.0)
    whole.update(model)
    monkeypatch.setattr(_ema_plan, "SCRATCH", 24)
    parts.update(model)
    assert_same_state(clone_state(parts.module), clone_state(whole.module))
    (group,) = parts._match(model).averages
    assert len({scratch.untyped_storage().data_ptr() for _, _, part in group._parts for scratch in part}) == 1
    assert group._parts[0][2][0].untyped_storage().nbytes() == 60 * 4
    assert [[p.numel() for p in part] for part, _, _ in group._parts] == [[9, 3, 9, 3]] * 2 + [[9, 3], [60], [20]]


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


# ---------------------------------------------------------------------------------------------
# What makes a plan old
# ---------------------------------------------------------------------------------------------


def replace_last(model):
    model.last = nn.Linear(2, 2)


def exchange(model):
    model.first.weight, model.last.weight = model.last.weight, model.first.weight


def assign_buffers(model):
    model.load_state_dict(known().state_dict(), assign=True)


@pytest.mark.parametrize("side", ["online", "average"])
@pytest.mark.parametrize("change", [replace_last, exchange, assign_buffers, nn.Module.double])
def test_a_change_on_either_side_is_followed(change, side):
    model = known()
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    change(model if side == "online" else ema.module)
    number_parameters(model)
    fill(ema.module, 0.0)
    ema.update(model)
    assert values(ema.module) == [0.5 * value for value in values(model)]
    assert values(model) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize("side", ["online", "average"])
def test_a_tensor_added_to_a_submodule_that_had_none_is_noticed(side):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = md.EMAWrapper(model)
    ema.update(model)
    (model if side == "online" else ema.module)[1].late = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="late"):
        ema.update(model)


@pytest.mark.parametrize("side", ["online", "average"])
def test_a_submodule_that_goes_is_noticed(side):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = md.EMAWrapper(model)
    ema.update(model)
    (model if side == "online" else ema.module)[1] = None
    with pytest.raises(ValueError, match=r"1\.(weight|bias)"):
        ema.update(model)


def test_a_parameter_under_another_name_is_noticed():
    model = nn.Linear(2, 2, bias=False)
    ema = md.EMAWrapper(model)
    ema.update(model)
    weight = model.weight
    del model.weight
    model.renamed = weight
    with pytest.raises(ValueError, match="renamed"):
        ema.update(model)


def test_a_model_whose_submodule_knows_it_is_not_kept_alive():
    model = Branches()
    model.first.register_forward_hook(lambda *_, root=model: root.last)
    ema = md.EMAWrapper(Branches())
    ema.update(model)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_model_without_numbers_is_refused_by_name():
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    ema = md.EMAWrapper(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^model: expected numbers in 'weight', got none: it is on the device meta"):
        ema.update(empty)


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


def test_an_average_in_another_layout_or_dtype_goes_on():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(2, 2))
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    for change in (lambda m: m.to(memory_format=torch.channels_last), lambda m: m[1].double()):
        change(ema.module)
        expected = [0.5 * old.detach() for old in ema.module.parameters()]
        fill(model, 0.0)
        ema.update(model)
        for new, value in zip(ema.module.parameters(), expected, strict=True):
            torch.testing.assert_close(new, value)


def test_one_memory_under_two_tensors_moves_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.decoder.weight.data = self.encoder.weight.data.t()

    model, teacher = Tied(), Tied()
    fill(model, 1.0), fill(teacher, 0.0)
    md.EMAWrapper(model, teacher=teacher, decay=0.9).update(model)
    torch.testing.assert_close(teacher.encoder.weight.detach(), torch.full((3, 3), 0.1))


def test_a_model_with_an_average_and_factors_inside_is_traced():
    class Taught(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fuse = nn.Linear(3, 3), md.MomentumFusionFactors(["a"])
            self.average = md.EMAWrapper(self.body)

        def forward(self, x):
            return self.fuse({"a": self.body(x)})["a"] + self.average(x)

    model, x = Taught().eval(), torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(2, 3))
    assert torch.equal(traced(x), model(x))


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


def test_states_lie_on_the_cpu_whatever_device_is_the_default():
    blocks = {
        "ema": md.EMAWrapper(nn.Linear(1, 1)),
        "queue": md.ClassQueue(4, {"a": 1}),
        "fuse": md.MomentumFusionFactors(["a"]),
        "supcon": md.SupConDistillLoss(),
        "fixed": md.SupConDistillLoss(learnable_temperature=False),
        "sigmoid": md.SigmoidDistillLoss(),
    }
    with torch.device("meta"):
        states = {name: block.state_dict() for name, block in blocks.items()}
        assert all(blocks[name].temperature.device.type == "cpu" for name in ("supcon", "fixed", "sigmoid"))
    for name, block in blocks.items():
        assert {tensor.device.type for tensor in states[name].values()} == {"cpu"}
        block.load_state_dict(states[name])
