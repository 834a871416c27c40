"""The door to the Triton kernel: whether it takes a problem, and its call. Triton takes a while to import."""

import os

import torch
from torch import Tensor

from momentum_distill._checks import is_plain
from momentum_distill._contrast.formulas import by_softmax
from momentum_distill._contrast.problem import Problem
from momentum_distill._contrast.statistics import Statistics
from momentum_distill._rows import shortest


def takes(problem: Problem) -> bool:
    """Whether a Triton kernel takes it: sums in float32, on a GPU, unless `MOMENTUM_DISTILL_TRITON=0`.

    With `MOMENTUM_DISTILL_TRITON=1` Triton's interpreter does, on the CPU, where that was chosen. The kernel knows no
    row with a key that it does not see.
    """
    asked = os.environ.get("MOMENTUM_DISTILL_TRITON")
    if problem.keys[0].own or problem.prepare.dtype != torch.float32 or asked == "0" or not is_plain(problem.query):
        return False
    if problem.query.is_cuda:
        from momentum_distill._contrast import kernel

        return kernel.works(problem.query.device)
    return asked == "1" and os.environ.get("TRITON_INTERPRET") == "1"


def attend(problem: Problem, queries: Tensor, momentum: Tensor | None) -> Statistics:
    """The statistics of prepared queries (N, d), divided by the temperature."""
    from momentum_distill._contrast import kernel

    parts = [
        kernel.Part(
            part.online,
            part.momentum,
            part.labels,
            part.present,
            shortest(part.online) if part.prepare.normalize else None,
        )
        for part in problem.keys
    ]
    inside = by_softmax(problem.positives)
    return kernel.attend(queries, problem.labels, parts, momentum_query=momentum, inside=inside)


def normalize(raw: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows (N, d) and lengths (N, 1) of raw ones, in one launch; as `row_lengths`."""
    from momentum_distill._contrast import kernel

    return kernel.normalize(raw, eps)
