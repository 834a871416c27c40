"""Decays over time: values against the equations in fractions or float64, what is saved, averages post hoc."""

import copy
import math
import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import momentum_distill as md
from momentum_distill.schedules import Cosine, HalfLife, PowerFunction, Scaled, WarmUp, post_hoc_average

SCHEDULES = [
    Cosine(100),
    Cosine(7, start=0.25, end=0.75),
    WarmUp(0.995),
    WarmUp(0.9, inv_gamma=1.0, power=2 / 3),
    WarmUp(Cosine(50)),
    HalfLife(100),
    HalfLife(64_000, batch_size=64),
    Scaled(0.996, kappa=4),
    Scaled(WarmUp(Cosine(50)), kappa=0.5),
    PowerFunction(0.1),
    PowerFunction(12**-0.5),
]
STEPS = [0, 1, 2, 3, 7, 49, 50, 99, 100, 101, 1000, 123_456]


# ----------------------------------------------------------------------------------------------------------- values


def rational_decay(schedule, step):
    """From the equations, in fractions as far as they go."""
    if isinstance(schedule, int | float):
        return Fraction(schedule)
    if isinstance(schedule, Cosine):
        start, end, whole = Fraction(schedule.start), Fraction(schedule.end), schedule.steps
        cosine = Fraction(np.cos(np.pi * float(min(Fraction(step) / whole, 1))).item())
        return end - (end - start) * (1 + cosine) / 2
    if isinstance(schedule, WarmUp):
        ramp = 1 - (1 + (Fraction(step) + 1) / Fraction(schedule.inv_gamma)) ** -Fraction(schedule.power)
        return min(rational_decay(schedule.decay, step), Fraction(ramp))
    if isinstance(schedule, HalfLife):
        return Fraction(np.exp2(-schedule.batch_size / schedule.half_life).item())
    if isinstance(schedule, Scaled):
        inner = rational_decay(schedule.decay, Fraction(schedule.kappa) * step)
        return Fraction(float(inner) ** schedule.kappa)
    power = max(root.real for root in np.roots([1, 7, 16 - schedule.sigma_rel**-2, 12 - schedule.sigma_rel**-2]))
    return Fraction((1 - 1 / (step + 1)) ** (float(power) + 1))


def test_every_schedule_is_its_equation():
    for schedule in SCHEDULES:
        for step in STEPS:
            assert schedule(step) == pytest.approx(float(rational_decay(schedule, step)), rel=1e-12, abs=1e-13), (
                schedule
            )
            assert 0 <= schedule(step) <= 1


def test_forms_as_others_write_them():
    for t in STEPS:
        byol = 1 - (1 - 0.996) * (math.cos(math.pi * min(t, 100) / 100) + 1) / 2
        assert Cosine(100)(t) == pytest.approx(byol, rel=1e-14)
        assert WarmUp(0.995)(t) == pytest.approx(min(0.995, (1 + t) / (10 + t)), rel=1e-14)  # TensorFlow
        timm = min(0.9, 1 - (1 + (t + 1) / 1.0) ** -(2 / 3))  # its step counts from 1
        assert WarmUp(0.9, inv_gamma=1, power=2 / 3)(t) == pytest.approx(timm, rel=1e-14)


def test_the_cosine_is_exact_at_both_ends_and_beyond():
    schedule = Cosine(10)
    assert (schedule(0), schedule(10), schedule(11), schedule(10**9)) == (0.996, 1.0, 1.0, 1.0)
    ramp = [Cosine(100)(step) for step in range(101)]
    assert ramp == sorted(ramp)


def test_a_scaled_decay_looks_back_over_as_many_samples():
    assert HalfLife(500)(0) ** 500 == pytest.approx(0.5)
    assert HalfLife(64_000, batch_size=256)(3) == pytest.approx(HalfLife(64_000, batch_size=64)(3) ** 4)
    assert HalfLife(64_000, batch_size=64)(0) == pytest.approx(HalfLife(1000)(0))
    for kappa in (0.25, 3, 16):
        assert Scaled(0.996, kappa=kappa)(9) == pytest.approx(0.996**kappa)
    fast, slow = Scaled(Cosine(1000, start=0.9), kappa=10), Cosine(1000, start=0.9)  # over a whole training
    left = [sum(math.log(schedule(step)) for step in range(n)) for schedule, n in ((fast, 100), (slow, 1000))]
    assert left[0] == pytest.approx(left[1], rel=0.02)


def test_the_width_of_the_power_function_is_sigma_rel():
    for sigma_rel in (1e-6, 1e-3, 0.05, 0.1, 0.25, 0.288, 12**-0.5):
        gamma = PowerFunction(sigma_rel).gamma
        assert gamma >= 0
        assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel, rel=1e-9)
    assert PowerFunction(12**-0.5).gamma == pytest.approx(0, abs=1e-12)
    assert [PowerFunction(s).gamma for s in (0.05, 0.1)] == pytest.approx([16.97, 6.94], abs=0.01)  # the paper's
    steps = 4000  # what is left of each step's weights, measured on the average itself
    schedule, profile = PowerFunction(0.1), torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        decay = schedule(step)
        profile *= decay
        profile[step] += 1 - decay
    time = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    mean = (profile * time).sum()
    assert float((profile * (time - mean) ** 2).sum().sqrt()) == pytest.approx(0.1, rel=1e-3)
    assert float(profile.sum()) == pytest.approx(1)


def test_a_power_of_zero_is_the_mean_of_all():
    model = nn.Linear(2, 2, bias=False).double()
    ema, seen = md.EMAWrapper(model, decay=PowerFunction(12**-0.5)), []
    for _ in range(20):
        seen.append(nn.init.normal_(model.weight).detach().clone())
        ema.update(model)
    torch.testing.assert_close(ema.module.weight, torch.stack(seen).mean(0))


def test_a_high_constant_decay_keeps_the_random_start_and_warm_up_does_not():
    torch.manual_seed(0)
    left = {}
    for decay in (0.999, WarmUp(0.999), WarmUp(0.999, inv_gamma=1, power=2 / 3), PowerFunction(0.1)):
        model = nn.Linear(8, 8)
        ema, start = md.EMAWrapper(model, decay=decay), model.weight.detach().clone()
        nn.init.zeros_(model.weight)  # learned at once, so that what is left is the start's share
        for _ in range(300):
            ema.update(model)
        left[decay] = float((ema.module.weight / start).mean())
    constant, *others = left.values()
    assert constant == pytest.approx(0.999**300, rel=1e-3)  # three quarters, after 300 steps
    assert max(others) < 1e-7


# ------------------------------------------------------------------------------------------------- objects and state


def test_they_print_as_the_call_that_makes_them_and_compare_pickle_and_freeze():
    for index, schedule in enumerate(SCHEDULES):
        assert md.schedules.unpack(md.schedules.pack(0, schedule)) == (0, schedule)  # from what it prints
        for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert twin == schedule
            assert hash(twin) == hash(schedule)
        assert [other == schedule for other in SCHEDULES].index(True) == index
        with pytest.raises(AttributeError):
            schedule.decay = 0.5
    assert Cosine(10, start=np.float64(0.5), end=1) == Cosine(10, start=0.5, end=1.0)
    assert repr(Cosine(10, start=np.float64(0.5), end=1)) == "Cosine(steps=10, start=0.5, end=1.0)"


def test_a_step_below_zero_is_refused():
    for schedule in SCHEDULES:
        for step, error in ((-1, ValueError), ("1", TypeError), (True, TypeError), (math.nan, ValueError)):
            with pytest.raises(error, match="step: expected"):
                schedule(step)


def halved(step):
    return 0.5 ** (step + 1)


def trained(decay, updates=3):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = md.EMAWrapper(model, decay=decay)
    go_on(ema, model, updates)
    return ema, model


def go_on(ema, model, updates=1):
    for step in range(updates):
        with torch.no_grad():
            model.weight.fill_(float(ema.step + step))
        ema.update(model)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_travels_with_the_state(schedule, tmp_path):
    ema, _ = trained(schedule)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    state = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    for built in (0.995, copy.deepcopy(schedule)):
        again = md.EMAWrapper(nn.Linear(3, 2), decay=built)
        again.load_state_dict(state)
        assert (again.decay, again.step) == (schedule, 3)
        assert repr(schedule) in repr(again)
    with warnings.catch_warnings(action="error"):
        go_on(again, nn.Linear(3, 2))  # built with the same: nothing to tell


def test_another_schedule_or_function_stays_and_the_next_update_says_so_once():
    state = trained(Cosine(100))[0].state_dict()
    for built in (Cosine(200), HalfLife(10), halved):
        ema, model = md.EMAWrapper(nn.Linear(3, 2), decay=built), nn.Linear(3, 2)
        ema.load_state_dict(state)  # to evaluate nothing has to be said
        assert ema.decay is built
        with pytest.warns(UserWarning, match=r"has Cosine\(steps=100, start=0.996, end=1.0\)"):
            ema.update(model)
        ema.update(model)


def test_a_number_gives_way_and_the_next_update_says_so_once():
    state = trained(Cosine(100))[0].state_dict()
    ema, model = md.EMAWrapper(nn.Linear(3, 2), decay=0.9), nn.Linear(3, 2)
    ema.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"goes on with decay=Cosine\(.*built with 0.9\b"):
        ema.update(model)
    assert ema.decay == Cosine(100)
    ema.update(model)
    chosen = md.EMAWrapper(nn.Linear(3, 2), decay=0.9)
    chosen.load_state_dict(state)
    chosen.decay = 0.9  # on purpose
    chosen.update(model)
    assert chosen.decay == 0.9


def test_states_without_a_schedule_are_what_they_were():
    for decay in (0.9, halved):
        ema, _ = trained(decay)
        assert torch.equal(ema.state_dict()["_extra_state"], torch.tensor(3))
        for built in (Cosine(100), 0.5):  # as states of before load
            again = md.EMAWrapper(nn.Linear(3, 2), decay=built)
            again.load_state_dict(ema.state_dict())
            assert (again.decay, again.step) == (built, 3)
            go_on(again, nn.Linear(3, 2))


def test_a_state_makes_nothing_but_schedules():
    for text in ("print(1)", "Cosine(steps=print(1))", "Cosine(steps=0)", "Cosine", "1", "[", "Schedule()", "A.b(c=1)"):
        with pytest.raises(ValueError, match=r"decay: expected a schedule of momentum_distill\.schedules in"):
            md.EMAWrapper(nn.Linear(3, 2)).set_extra_state(torch.tensor([3, *text.encode()]))


def test_a_resumed_average_is_the_one_that_was_not_stopped():
    for schedule in SCHEDULES:
        whole, model = trained(schedule)
        again = md.EMAWrapper(model, decay=schedule)
        again.load_state_dict(whole.state_dict())
        for step in range(5):
            nn.init.constant_(model.weight, step)
            whole.update(model)
            again.update(model)
        assert torch.equal(again.module.weight, whole.module.weight)
        assert torch.equal(again.get_extra_state(), whole.get_extra_state())


# --------------------------------------------------------------------------------------------------------- post hoc

UPDATES, EVERY = 512, 16


class Walking(nn.Module):
    """Weights on a random walk, one that never changes, statistics and a count."""

    def __init__(self):
        super().__init__()
        self.walk = nn.Parameter(torch.zeros(64, dtype=torch.float64))
        self.still = nn.Parameter(torch.full((3,), 0.1))
        self.norm = nn.BatchNorm1d(2)

    def step(self):
        with torch.no_grad():
            self.walk += torch.randn(64, dtype=torch.float64)
            self.norm.running_var.fill_(float(self.norm.num_batches_tracked + 1))
            self.norm.num_batches_tracked += 1


def clone(state):
    return {name: value.clone() for name, value in state.items()}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Snapshots of two averages, and averages of other widths, at some steps."""
    torch.manual_seed(0)
    model, folder = Walking(), tmp_path_factory.mktemp("snapshots")
    with torch.no_grad():
        model.walk += 100.0  # what is far from 0 shows whether the weights add up to 1
    averages = md.EMADict(model, {"short": PowerFunction(0.05), "long": PowerFunction(0.1)})
    direct = {width: md.EMAWrapper(model, decay=PowerFunction(width)) for width in (0.07, 0.15, 0.2, 0.25)}
    snapshots, files, truth = [], [], {}
    for update in range(1, UPDATES + 1):
        model.step()
        for average in (averages, *direct.values()):
            average.update(model)
        if update % EVERY == 0:
            snapshots.append(clone(averages.state_dict()))
            files.append(folder / f"{update}.pt")
            torch.save(snapshots[-1], files[-1])
        if update in (UPDATES // 2, UPDATES - 5, UPDATES):
            online = model.walk.detach().clone()
            truth |= {(update, width): (clone(ema.state_dict()), online) for width, ema in direct.items()}
    return snapshots, files, truth


def distance(state, truth):
    """Of the weights to those of the direct average, in units of how far that lies from the model."""
    direct, online = truth
    return float((state["module.walk"] - direct["module.walk"]).norm() / (direct["module.walk"] - online).norm())


def test_it_reproduces_direct_averages_of_other_widths(walk):
    snapshots, _, truth = walk
    for (step, width), one in truth.items():
        error = distance(post_hoc_average(snapshots, sigma_rel=width, step=step), one)
        within = {0.07: 1e-3, 0.15: 1e-3, 0.2: 1e-2, 0.25: 0.05}[width]
        assert error < (within if step % EVERY == 0 else 0.05), (step, width, error)


def test_what_was_saved_comes_back_exactly(walk):
    snapshots, files, _ = walk
    for state in (snapshots[-1], snapshots[7]):
        for name, width in (("short", 0.05), ("long", 0.1)):
            own = {key.removeprefix(f"averages.{name}."): value for key, value in state.items() if name in key}
            step = int(own["_extra_state"][0])
            found = post_hoc_average(files, sigma_rel=width, step=step)
            assert found.keys() == own.keys()
            assert all(torch.equal(found[key], own[key]) for key in own)


def test_it_is_a_state_and_leaves_what_is_no_weight(walk):
    snapshots, files, truth = walk
    state = post_hoc_average(snapshots, sigma_rel=0.15)
    again = post_hoc_average([str(file) for file in files], sigma_rel=0.15)
    assert all(torch.equal(state[name], again[name]) for name in state)  # files are what is in memory
    ema = md.EMAWrapper(Walking())
    ema.load_state_dict(state)
    assert (ema.step, ema.decay) == (UPDATES, PowerFunction(0.15))
    assert torch.equal(state["module.still"], torch.full((3,), 0.1))
    assert torch.equal(state["module.norm.running_var"], torch.full((2,), float(UPDATES)))
    assert int(post_hoc_average(snapshots, sigma_rel=0.15, step=257)["module.norm.num_batches_tracked"]) == 256
    single = [{k.removeprefix("averages.long."): v for k, v in one.items() if "long" in k} for one in snapshots]
    lone = post_hoc_average(single, sigma_rel=0.15)  # of one average alone it is less sharp
    assert distance(lone, truth[UPDATES, 0.15]) < 0.05


def test_what_else_a_module_saves_comes_along():
    model = nn.ModuleDict(
        {"queue": md.ClassQueue(4, {"a": 2}), "inner": md.EMAWrapper(nn.Linear(2, 2), decay=WarmUp(0.9))}
    )
    model["said"] = Saying()
    ema, states = md.EMAWrapper(model, decay=PowerFunction(0.1)), []
    for _ in range(3):
        ema.update(model)
        states.append(copy.deepcopy(ema.state_dict()))
    mixed = post_hoc_average(states, sigma_rel=0.2)
    assert mixed.keys() == states[0].keys()
    assert mixed["module.said._extra_state"] == {"word": "so"}
    ema.load_state_dict(mixed)


class Saying(nn.Module):
    def get_extra_state(self):
        return {"word": "so"}

    def set_extra_state(self, state):
        assert state == {"word": "so"}


def test_the_mixture_is_that_of_the_equation():
    """Against the profiles themselves, on a fine grid of times, by least squares in NumPy."""
    found = [(40, 0.05), (40, 0.1), (60, 0.05), (60, 0.1), (100, 0.05), (100, 0.1)]
    states = []
    for step, width in found:
        ema = md.EMAWrapper(nn.Linear(1, 1), decay=PowerFunction(width))
        ema.set_extra_state(md.schedules.pack(step, PowerFunction(width)))
        states.append(clone(ema.state_dict()))
    for index, state in enumerate(states):  # each weight alone 1, so that the sum is its factor
        state["module.weight"] = torch.zeros(1, len(states), dtype=torch.float64)
        state["module.weight"][0, index] = 1.0
    factors = post_hoc_average(states, sigma_rel=0.15, step=90)["module.weight"][0].numpy()

    time = (np.arange(200_000) + 0.5) / 2000  # up to 100

    def profile(step, width):
        gamma = PowerFunction(width).gamma
        return np.where(time <= step, (gamma + 1) * time**gamma / step ** (gamma + 1), 0.0)

    basis = np.stack([profile(*one) for one in found], axis=1)
    differences = basis[:, 1:] - basis[:, :1]  # the first takes what is left of 1
    rest, *_ = np.linalg.lstsq(differences, profile(90, 0.15) - basis[:, 0], rcond=None)
    np.testing.assert_allclose(factors, [1 - rest.sum(), *rest], atol=2e-3)
    assert factors.sum() == pytest.approx(1)


class Own(Cosine):
    """Somebody's own."""


@pytest.mark.parametrize("decay", [Own(10), WarmUp(Own(10))], ids=str)
def test_a_subclass_of_a_schedule_is_saved_as_any_function(decay):
    ema = md.EMAWrapper(nn.Linear(1, 1), decay=decay)
    ema.update(nn.Linear(1, 1))
    again = md.EMAWrapper(nn.Linear(1, 1), decay=decay)
    again.load_state_dict(ema.state_dict())
    assert (again.step, again.decay) == (1, decay)
