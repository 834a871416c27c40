"""EMAWrapper: the module that holds the average, copied or ready made, is never trained and never of 16 bits."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import momentum_distill as md
from module_state import assert_same_state, clone_state
from small_models import Branches, all_modes, fill, float_dtypes, known, values

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
# Modules that cannot be copied, lazy modules
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
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
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
