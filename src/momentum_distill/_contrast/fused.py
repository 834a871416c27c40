"""The door to Triton: whether a problem goes there, and the calls. Triton takes a while to import, so only they do."""

import os

import torch
from torch import Tensor

from momentum_distill._checks import has_numbers
from momentum_distill._contrast.formulas import by_softmax
from momentum_distill._contrast.problem import Problem
from momentum_distill._contrast.statistics import Statistics


def takes(problem: Problem) -> bool:
    """Whether a Triton kernel takes it: sums in float32, on a GPU, unless `MOMENTUM_DISTILL_TRITON=0`.

    With `MOMENTUM_DISTILL_TRITON=1` Triton's interpreter does, on the CPU, where that was chosen. The kernels know no
    row with a key that it does not see, no weight of a pair and no hard negative: matrices and tiles do.
    """
    asked = os.environ.get("MOMENTUM_DISTILL_TRITON")
    if problem.keys[0].own or problem.weighs or problem.prepare.dtype != torch.float32:
        return False
    if asked == "0" or not has_numbers(problem.query):
        return False
    if problem.query.is_cuda:
        from momentum_distill._contrast import kernel

        return kernel.works(problem.query.device)
    return asked == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def attend(problem: Problem, queries: Tensor, momentum: Tensor | None) -> Statistics:
    """The statistics of prepared queries (N, d), divided by the temperature."""
    from momentum_distill._contrast import kernel

    inside = by_softmax(problem.choices.positives)
    return kernel.attend(queries, problem.labels, problem.keys, momentum_query=momentum, inside=inside)


def normalize(raw: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows (N, d) and lengths (N, 1) of raw ones, in one launch; as `row_lengths`."""
    from momentum_distill._contrast import kernel

    return kernel.normalize(raw, eps)
