"""One process, with and without torch.distributed: the losses are the same."""

import pytest
import torch
import torch.distributed as dist

import momentum_distill as md
from loss_cases import bits, numbers_alone, supcon_case
from momentum_distill import _group

pytestmark = numbers_alone


def losses(group):
    """Value and gradient of each loss built with this `group`."""
    case = supcon_case(0, ignored=0.2).requires_grad()
    g = torch.Generator().manual_seed(1)
    scores = [torch.randn(6, generator=g).requires_grad_(i == 0) for i in range(3)]
    logits = [torch.randn(6, 3, generator=g).requires_grad_(i == 0) for i in range(2)]
    supcon = md.SupConDistillLoss(group=group)
    regression = md.ResponseDistillLoss(task="regression", group=group)
    fusion = md.HardSampleFusionLoss(group=group)
    values = [
        supcon(*case.args, **case.momentum),
        supcon.terms(*case.args, **case.momentum).total,
        regression(*scores),
        fusion(
            student_scores=scores[0],
            fused_scores=scores[1],
            targets=scores[2],
            student_logits=logits[0],
            fused_logits=logits[1],
            labels=torch.tensor([0, 1, 2, -1, -2, 0]),
        ),
    ]
    leaves = [case.query, case.keys, scores[0], logits[0], *supcon.parameters()]
    return [bits(x) for x in (*values, *torch.autograd.grad(sum(values), leaves))]


def test_auto_and_none_agree_without_a_process_group():
    assert not dist.is_initialized()
    assert losses("auto") == losses(None)


@pytest.mark.usefixtures("process_group")
def test_a_world_of_one_changes_no_bit():
    assert losses("auto") == losses(dist.group.WORLD) == losses(None)


def test_a_loss_built_before_the_process_group_follows_it(tmp_path):
    loss_fn = md.SupConDistillLoss(group="auto")
    case = supcon_case(1)
    before = loss_fn(*case.args)
    store = (tmp_path / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        assert bits(loss_fn(*case.args)) == bits(before)
    finally:
        dist.destroy_process_group()
    assert bits(loss_fn(*case.args)) == bits(before)


@pytest.mark.parametrize(
    "build",
    [
        md.SupConDistillLoss,
        lambda **group: md.ResponseDistillLoss(task="regression", **group),
        md.HardSampleFusionLoss,
        lambda **group: md.ClassQueue(4, {"a": 2}, **group),
    ],
    ids=["contrast", "response", "hard samples", "queue"],
)
def test_what_is_in_force_is_shown(build):
    assert "group='auto' (this process alone)" in repr(build())
    assert "group=None (this process alone)" in repr(build(group=None))


def test_losses_are_told_apart_by_numbers_that_float64_holds():
    numbers = {_group._checksum(f"a loss of width {width}") for width in range(1000)}
    assert len(numbers) == 1000
    assert all(float(number) == number for number in numbers)


def test_tensors_of_the_same_bytes_are_told_apart():
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(6, dtype=torch.int32)]
    assert len({_group._digest(tensor) for tensor in tensors}) == 4
    assert _group._digest(torch.zeros(2, 3).T) == _group._digest(tensors[1])
