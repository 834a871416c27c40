"""The learned scalars of the blocks: no weight decay, and a warning where no optimizer has them."""

import functools
import warnings

import pytest
import torch
from torch import nn

import momentum_distill as md

TOLD = (
    "^the temperature of SupConDistillLoss has a gradient and nothing has changed it in 500 calls: "
    r"give it to the optimizer, as momentum_distill.param_groups\(model, loss_fn, weight_decay=...\) does, "
    "or freeze it$"
)


def contrast_loss(contrast):
    labels = torch.tensor([0, 1, 0, 1])
    return contrast(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), labels, labels)


def test_scalars_of_blocks_are_not_decayed_wherever_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 2)
            self.fuse = md.MomentumFusionFactors(["a", "b"])
            self.average = md.EMAWrapper(nn.Linear(2, 2))

    model, contrast = Model(), md.SupConDistillLoss()
    fixed = md.SupConDistillLoss(learnable_temperature=False)
    decayed, scalars = md.param_groups(model, contrast, fixed, model, weight_decay=0.1, lr=0.5)
    assert [id(p) for p in decayed["params"]] == [id(p) for p in model.body.parameters()]
    assert [id(p) for p in scalars["params"]] == [id(model.fuse.weight), id(contrast.log_temperature_ratio)]
    assert (decayed["weight_decay"], scalars["weight_decay"]) == (0.1, 0.0)
    assert decayed["lr"] == scalars["lr"] == 0.5
    torch.optim.AdamW([decayed, scalars])


def test_without_scalars_there_is_one_group():
    [group] = md.param_groups(nn.Linear(2, 2), weight_decay=0.1)
    assert len(group["params"]) == 2


def test_with_decay_the_temperature_would_move_and_without_it_stays():
    contrast = md.SupConDistillLoss(temperature=0.5)
    with torch.no_grad():
        contrast.log_temperature_ratio.fill_(1.0)
    optimizer = torch.optim.SGD(md.param_groups(contrast, weight_decay=0.5, lr=0.1))
    contrast.log_temperature_ratio.grad = torch.zeros(())
    optimizer.step()
    assert contrast.log_temperature_ratio.item() == 1.0


def train(contrast, optimizer, steps):
    for _ in range(steps):
        if optimizer is not None:
            optimizer.zero_grad()
        contrast_loss(contrast).backward()
        if optimizer is not None:
            optimizer.step()


def test_a_temperature_that_no_optimizer_has_is_told_once():
    contrast = md.SupConDistillLoss()
    with pytest.warns(UserWarning, match=TOLD) as told:
        train(contrast, None, 1100)
    assert len(told) == 1


FUSED = functools.partial(torch.optim.SGD, fused=True)  # which counts no version of what it writes to


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, FUSED])
def test_a_temperature_that_an_optimizer_has_is_not_told_of(make):
    contrast = md.SupConDistillLoss()
    with warnings.catch_warnings(action="error"):
        train(contrast, make(contrast.parameters(), lr=1e-4), 520)
        for _ in range(300):  # accumulation
            contrast_loss(contrast).backward()
        contrast.log_temperature_ratio.requires_grad_(False)
        contrast.log_temperature_ratio.grad = None
        train(contrast, None, 520)  # frozen on purpose


@pytest.mark.parametrize("make", [torch.optim.SGD, FUSED])
def test_factors_that_no_optimizer_has_are_told_once(make):
    fuse = md.MomentumFusionFactors(["a", "b"])
    features = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}

    def steps(optimizer, number):
        for _ in range(number):
            sum(value.sum() for value in fuse(features).values()).backward()
            if optimizer is not None:
                optimizer.step()
            fuse.update()

    with warnings.catch_warnings(action="error"):
        steps(make(fuse.parameters(), lr=1e-4), 150)
    with pytest.warns(UserWarning, match=r"^the weight of MomentumFusionFactors has a gradient") as told:
        steps(None, 250)
    assert len(told) == 1


@pytest.mark.parametrize("make", [torch.optim.SGD, FUSED])
def test_factors_whose_average_never_follows_are_told_of_once(make):
    def train(fuse, steps, update=False):
        optimizer = make(fuse.parameters(), lr=1e-4)
        for _ in range(steps):
            optimizer.zero_grad()
            fuse({"a": torch.ones(2, 3)})["a"].sum().backward()
            optimizer.step()
            if update:
                fuse.update()

    fuse = md.MomentumFusionFactors(["a"])
    with warnings.catch_warnings(action="error"):
        train(fuse, 100)
        train(md.MomentumFusionFactors(["a"], decay=1.0), 250)
        train(md.MomentumFusionFactors(["a"]), 250, update=True)
        frozen, other = md.MomentumFusionFactors(["a"]).requires_grad_(False), md.MomentumFusionFactors(["a"])
        train(other, 1)
        for _ in range(250):  # and an evaluation
            frozen({"a": torch.ones(2, 3)})
            with torch.no_grad():
                other({"a": torch.ones(2, 3)})
    with pytest.warns(
        UserWarning, match=r"^the weight of MomentumFusionFactors has changed before each of 100"
    ) as told:
        train(fuse, 250)
    assert len(told) == 1
    assert told[0].filename == __file__
