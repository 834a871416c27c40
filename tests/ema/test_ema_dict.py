"""Several averages of one model in one pass: each is to the bit what a wrapper by itself is."""

import copy
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn

import momentum_distill as md
from momentum_distill._ema_plan import CACHED, SCRATCH
from momentum_distill.schedules import Cosine, PowerFunction, WarmUp
from small_models import redraw_all

DECAYS = {"fast": 0.9, "slow": 0.999, "cosine": Cosine(20), "power": PowerFunction(0.1), "lazy": 0.3, "still": 1.0}


class Net(nn.Module):
    """Tied weights, statistics, an integer, a buffer that grows, a frozen weight, layouts that no kernel fuses."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.turned = nn.Parameter(torch.randn(4, 5).t())
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def assert_same(averages, singles):
    assert list(averages) == list(singles)
    for name, single in singles.items():
        ours, alone = averages[name].state_dict(), single.state_dict()
        assert ours.keys() == alone.keys()
        for key in ours:
            assert ours[key].dtype == alone[key].dtype
            assert torch.equal(ours[key], alone[key]), (name, key)


def test_each_wrapper_gets_every_option(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "momentum_distill._ema_dict.EMAWrapper", lambda _, **given: asked.append(given) or nn.Identity()
    )
    options = {"buffers": "ema", "dtype": torch.float64, "device": "meta", "mode": "train", "hooks": "keep"}
    options["share_frozen"] = True
    md.EMADict(nn.Linear(2, 2), {"fast": 0.9, "slow": 0.999}, **options)
    assert asked == [{"decay": 0.9, **options}, {"decay": 0.999, **options}]
    alone = set(inspect.signature(md.EMAWrapper).parameters) - {"teacher"}
    assert set(inspect.signature(md.EMADict).parameters) - {"decays"} | {"decay"} == alone  # none is left out


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("buffers", ["copy", "ema", "frozen"])
def test_each_is_the_wrapper_that_stands_alone(dtype, buffers, threads):
    torch.manual_seed(0)
    model, generator = Net().to(dtype), torch.Generator().manual_seed(0)
    averages = md.EMADict(model, DECAYS, buffers=buffers)
    singles = {name: md.EMAWrapper(model, decay=decay, buffers=buffers) for name, decay in DECAYS.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(6):
            redraw_all(model, generator)
            if step == 2:
                model.cache = torch.randn(3)  # of another shape
            if step == 4:
                model.first.bias = nn.Parameter(torch.randn(3, dtype=dtype))  # another tensor
            averages.update(model, decay=0.25 if step == 3 else None)
            for single in singles.values():
                single.update(model, decay=0.25 if step == 3 else None)
            assert_same(averages, singles)
    finally:
        torch.set_num_threads(before)
    outputs = averages(torch.ones(4, 3, dtype=dtype))
    assert all(torch.equal(outputs[name], single(torch.ones(4, 3, dtype=dtype))) for name, single in singles.items())


def test_a_plan_is_made_once_and_read_in_parts():
    model = nn.ParameterList([torch.randn(size) for size in (3, CACHED, CACHED + 1, 2, 5)])
    averages = md.EMADict(model, {"fast": 0.9, "slow": 0.99})
    averages.update(model)
    (plan,) = averages._plans.values()
    sizes = [[tensor.numel() for tensor in groups[0][0].online] for _, _, groups in plan._rows]
    assert sizes == [[3], [CACHED], [CACHED + 1], [2, 5]]
    averages.update(model)
    assert list(averages._plans.values()) == [plan]
    model[0].data = torch.randn(3)
    averages.update(model)
    assert plan not in averages._plans.values()


def test_a_16_bit_model_is_converted_once_for_all(monkeypatch):
    model = nn.ParameterList([torch.randn(size, dtype=torch.bfloat16) for size in (3, SCRATCH, 5)])
    averages = md.EMADict(model, {"fast": 0.9, "slow": 0.99, "slower": 0.999})
    averages.update(model)
    copies, foreach_copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: (copies.append(len(lists[0])), foreach_copy(*lists)))
    averages.update(model)
    assert copies == [1, 1, 1]  # parts of one tensor each; not three times as many


def test_an_average_may_go_its_own_way():
    model = nn.Linear(3, 3)
    averages = md.EMADict(model, {"fast": 0.9, "slow": 0.99})
    singles = {name: md.EMAWrapper(model, decay=decay) for name, decay in (("fast", 0.9), ("slow", 0.99))}
    for change in (
        lambda ema: ema.double(),
        lambda ema: ema.update(model, decay=0.5),
        lambda ema: ema.load_state_dict(md.EMAWrapper(nn.Linear(3, 3).requires_grad_(False)).state_dict()),
    ):
        torch.manual_seed(1)
        change(averages["slow"])
        torch.manual_seed(1)
        change(singles["slow"])
        nn.init.normal_(model.weight)
        averages.update(model)
        for single in singles.values():
            single.update(model)
        assert_same(averages, singles)
    averages.averages["slow"] = singles["slow"] = md.EMAWrapper(model, decay=0.5)
    nn.init.normal_(model.weight)
    averages.update(model)
    singles["fast"].update(model)
    assert_same(averages, singles)


def test_swap_and_update_inside_it():
    model = nn.Linear(2, 2)
    averages = md.EMADict(model, {"fast": 0.9, "slow": 0.99})
    nn.init.zeros_(model.weight)
    averages.update(model)
    with averages["fast"].swap(model):
        assert torch.equal(model.weight, averages["fast"].module.weight)
        state = copy.deepcopy(averages.state_dict())
        with pytest.raises(RuntimeError, match="update: expected a call outside swap"):
            averages.update(model)
    assert not model.weight.any()
    assert all(torch.equal(value, averages.state_dict()[name]) for name, value in state.items())


def test_nothing_moves_if_one_decay_is_wrong():
    model = nn.Linear(2, 2)
    averages = md.EMADict(model, {"fast": 0.9, "wrong": lambda step: 2.0 - step})
    state = copy.deepcopy(averages.state_dict())
    nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="decay: expected a finite number"):
        averages.update(model)
    assert all(torch.equal(value, averages.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("way", ["state", "pickle", "deepcopy"])
def test_a_copy_goes_on_bit_for_bit(way, tmp_path):
    torch.manual_seed(0)
    decays = {"fast": 0.9, "slow": WarmUp(Cosine(10))}
    model, generator = Net(), torch.Generator().manual_seed(0)
    averages = md.EMADict(model, decays)
    for _ in range(3):
        redraw_all(model, generator)
        averages.update(model)
    if way == "state":
        torch.save(averages.state_dict(), tmp_path / "averages.pt")
        twin = md.EMADict(Net(), {"fast": 0.9, "slow": 0.995})
        twin.load_state_dict(torch.load(tmp_path / "averages.pt", weights_only=True))
        with pytest.warns(UserWarning, match="goes on with decay=WarmUp"):
            copy.deepcopy(twin).update(model)
        twin["slow"].decay = decays["slow"]
        twin["slow"]._differing = None
    else:
        twin = copy.deepcopy(averages) if way == "deepcopy" else pickle.loads(pickle.dumps(averages))
    for _ in range(3):
        redraw_all(model, generator)
        averages.update(model)
        twin.update(model)
    assert_same(averages, {name: twin[name] for name in twin})
    assert [twin[name].step for name in twin] == [6, 6]


def test_it_belongs_to_a_model_as_a_wrapper_does():
    model = nn.Linear(2, 2)
    averages = md.EMADict(model, {"fast": 0.9, "slow": 0.99})
    averages.train()
    assert len(averages) == 2
    assert not any(parameter.requires_grad for parameter in averages.parameters())
    assert not any(average.module.training for average in averages.averages.values())
    assert averages.half()["fast"].module.weight.dtype == torch.float32
    averages.update(model)
    gone = weakref.ref(model)
    del model
    assert gone() is None
    assert not averages._plans


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_layouts_beside_plain_ones_are_averaged_number_by_number(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv2d(4, 8, 3)).to(dtype).to(memory_format=torch.channels_last)
    single, averages = md.EMAWrapper(model, decay=0.9), md.EMADict(model, {"a": 0.9})
    redraw_all(model, torch.Generator().manual_seed(0))
    single.update(model)
    averages.update(model)
    assert_same(averages, {"a": single})
