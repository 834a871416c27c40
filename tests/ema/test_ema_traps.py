"""EMAWrapper: mistakes found in other implementations: ties, buffers, modes, the place of the update."""

import warnings

import pytest
import torch
from torch import nn

import momentum_distill as md
from module_state import assert_same_state, clone_state
from small_models import Branches, all_modes, fill, known, values

# ---------------------------------------------------------------------------------------------
# Tied weights, buffers, BatchNorm
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # of which the average is a float32 copy
def test_tied_weights_are_averaged_once(dtype):
    model = Branches().to(dtype)
    model.last.weight = model.first.weight
    fill(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.9)
    assert ema.module.last.weight is ema.module.first.weight
    fill(model, 1.0)
    ema.update(model)
    assert values(ema.module) == pytest.approx([0.1] * 3)  # 0.19 where it is done twice
    assert ema.module.last.weight is ema.module.first.weight


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


# ---------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------


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
# Where update may stand in a training step
# ---------------------------------------------------------------------------------------------


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
# Beside other things of PyTorch
# ---------------------------------------------------------------------------------------------


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
