"""The recipes: the same training under each framework, saved, resumed and optimised as it should be."""

import importlib
import re
import sys

import pytest
import torch

from conftest import ROOT

RECIPES = ROOT / "examples" / "recipes"
sys.path.append(str(RECIPES))

import task as toy  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),  # within Lightning
    pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning"),  # Lightning's word on the momentum model
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),  # resumed where it was
]

STEPS, SAVE_EVERY = 13, 5  # ten steps in an epoch: saved in the middle and at the end of one

# module of the recipe, packages it needs, how its checkpoints are called
FRAMEWORKS = {
    "plain": ("plain_loop", [], "step_{}.pt"),
    "lightning": ("lightning_module", ["lightning"], "step={}.ckpt"),
    "accelerate": ("accelerate_loop", ["accelerate"], "step_{}"),
    "transformers": ("trainer_transformers", ["transformers", "accelerate"], "checkpoint-{}"),
}


@pytest.fixture(scope="module", params=FRAMEWORKS)
def recipe(request):
    name, packages, checkpoint = FRAMEWORKS[request.param]
    for package in packages:
        pytest.importorskip(package)
    return importlib.import_module(name), checkpoint


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run that nothing stopped: its folder, task and optimizer."""
    out = tmp_path_factory.mktemp("run")
    return out, *recipe[0].train(out, steps=STEPS, save_every=SAVE_EVERY)


def assert_same_bits(left, right, where="state"):
    """Two nested states, tensor by tensor."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_same_bits(value, right[key], f"{where}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for place, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same_bits(a, b, f"{where}[{place}]")
    else:
        assert left == right, where


@pytest.mark.parametrize("stopped", [5, 10])
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(recipe, finished, stopped, monkeypatch):
    module, checkpoint = recipe
    out, task, optimizer = finished
    made, update = [], toy.Distillation.update
    monkeypatch.setattr(toy.Distillation, "update", lambda self: made.append(self) or update(self))
    start = out / checkpoint.format(stopped)
    again, optimizer_again = module.train(out, steps=STEPS, save_every=SAVE_EVERY, resume=start)
    assert len(made) == STEPS - stopped  # it went on, and did not begin anew
    assert_same_bits(dict(again.state_dict()), dict(task.state_dict()))
    assert_same_bits(optimizer_again.state_dict(), optimizer.state_dict())


def test_every_block_was_at_work(finished):
    _, task, _ = finished
    initial = toy.Distillation()
    assert task.momentum.step == STEPS
    assert len(task.queue) == task.queue.size
    assert task.contrast.temperature != initial.contrast.temperature
    assert set(task.fuse.factors().values()).isdisjoint([1.0])
    assert not task.momentum.module.training


def test_the_optimizer_has_all_that_is_learned_and_decays_no_scalar(finished):
    _, task, optimizer = finished
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-2, 0.0)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    assert {names[id(parameter)] for parameter in spared["params"]} == {"contrast.log_temperature_ratio", "fuse.weight"}
    known = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(known) == sorted(name for name in names.values() if not name.startswith("momentum."))
    assert set(optimizer.state) == {parameter for group in optimizer.param_groups for parameter in group["params"]}


def test_a_framework_changes_no_bit(recipe, tmp_path, monkeypatch):
    """Without dropout, whose random numbers each framework begins elsewhere, all four end with the same weights."""
    if recipe[0].__name__ == "trainer_transformers":  # its own order of the rows is another
        monkeypatch.setattr(
            recipe[0].Trainer, "get_train_dataloader", lambda trainer: trainer.accelerator.prepare(toy.make_loader())
        )
    plain = importlib.import_module("plain_loop")
    expected, _ = plain.train(tmp_path / "plain", steps=STEPS, dropout=0.0)
    task, _ = recipe[0].train(tmp_path / "run", steps=STEPS, dropout=0.0)
    assert_same_bits(dict(task.state_dict()), dict(expected.state_dict()))


def test_a_step_that_a_grad_scaler_skips_moves_no_average():
    task = toy.Distillation()
    optimizer = toy.make_optimizer(task)
    scaler = torch.amp.GradScaler("cpu")
    for factor, updates in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(task(**next(iter(toy.make_loader())))["loss"] * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert task.momentum.step == updates


def test_the_script_ends_as_its_docstring_says(recipe, tmp_path, capsys):
    recipe[0].main([f"--out={tmp_path}"])
    line = capsys.readouterr().out.splitlines()[-1]
    told = re.search(r"about (\d+) %", recipe[0].__doc__)
    got = re.match(r"weak view alone (\d+\.\d) %, average after 60 updates, 100 rows in the queue", line)
    assert float(got[1]) == pytest.approx(float(told[1]), abs=3)  # another torch draws and rounds a little otherwise
