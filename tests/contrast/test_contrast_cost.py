"""What one small call of the contrastive loss starts: operations, which are what its time goes to."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import momentum_distill as md
from loss_cases import supcon_case


class Operations(TorchDispatchMode):
    """Counts every operation of PyTorch, views and reads of values as well."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(n, q, **options):
    """Forward and backward pass of the module, with a learned temperature and both momentum inputs."""
    loss_fn = md.SupConDistillLoss(**options)
    case = supcon_case(0, n, q, 128, dtype=torch.float32)
    case.query.requires_grad_()
    for _ in range(2):  # the first gradients of parameters are another matter
        case.query.grad = None
        loss_fn.zero_grad()
        with Operations() as counted:
            loss_fn(*case.args, **case.momentum).backward()
    return counted.names


SPARE = 0 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) else 5
"""Older versions dispatch one call as two here and there."""


@pytest.mark.parametrize(("n", "q", "most"), [(16, 64, 60), (64, 1024, 70)])
def test_a_small_call_starts_few_operations(n, q, most):
    names = operations(n, q)
    assert 30 < len(names) <= most + SPARE, names


def test_every_reading_takes_about_as_many():
    for positives in ("inside", "inside_per_positive"):
        assert len(operations(16, 64, positives=positives)) <= 80 + SPARE
    assert len(operations(16, 64, exclude_self=False, reduction="sum")) <= 62 + SPARE
