"""EMAWrapper: an update writes in place and costs little, and notices whatever has changed since the one before."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import momentum_distill as md
from module_state import assert_same_state, clone_state
from momentum_distill import _ema_plan
from small_models import Branches, fill, float_dtypes, known, number_parameters, pointers, values

# ---------------------------------------------------------------------------------------------
# In place: storages, LSTM, plans
# ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "other",
    [lambda data: data[:1], lambda _: torch.zeros(1, 3), lambda data: data.view(3, 2)],
    ids=["cut", "broadcasts", "as many elements"],  # the first and the last lie at the same address
)
def test_data_of_another_shape_under_the_same_parameter_are_refused(other):
    model = nn.Linear(3, 2, bias=False)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    before = clone_state(ema.module)
    model.weight.data = other(model.weight.data)
    with pytest.raises(ValueError, match=r"^model: expected shape \(2, 3\) for 'weight', got \(\d, \d\)$"):
        ema.update(model)
    assert_same_state(clone_state(ema.module), before)


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


# ---------------------------------------------------------------------------------------------
# What makes a plan old
# ---------------------------------------------------------------------------------------------


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
