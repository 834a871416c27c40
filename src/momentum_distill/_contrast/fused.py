"""The door to Triton: whether a problem goes there, and the calls. Triton takes a while to import, so only they do."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from momentum_distill._checks import is_plain
from momentum_distill._contrast.formulas import by_softmax
from momentum_distill._contrast.problem import Problem
from momentum_distill._contrast.statistics import Statistics

if TYPE_CHECKING:
    from momentum_distill._contrast.lean import Answer


def takes(problem: Problem) -> bool:
    """Whether a Triton kernel takes it: sums in float32, on a GPU, unless `MOMENTUM_DISTILL_TRITON=0`.

    With `MOMENTUM_DISTILL_TRITON=1` or `lean` Triton's interpreter does, on the CPU, where that was chosen. The kernels
    know no row with a key that it does not see, no weight of a pair and no hard negative: matrices and tiles do.
    """
    asked = os.environ.get("MOMENTUM_DISTILL_TRITON")
    if problem.keys[0].own or problem.weighs or problem.prepare.dtype != torch.float32:
        return False
    if asked == "0" or not is_plain(problem.query):
        return False
    if problem.query.is_cuda:
        from momentum_distill._contrast import kernel

        return kernel.works(problem.query.device)
    return asked in ("1", "lean") and os.environ.get("TRITON_INTERPRET") == "1"


def lean(problem: Problem) -> "Answer | None":
    """Terms and gradient of the total by the lean kernels, where `MOMENTUM_DISTILL_TRITON=lean` and they take it."""
    if os.environ.get("MOMENTUM_DISTILL_TRITON") != "lean" or problem.ranks is not None or not takes(problem):
        return None
    choices = problem.choices
    if choices.normalize_keys and not choices.normalize:  # centred targets
        return None
    from momentum_distill._contrast import lean

    parts = [lean.Part(part.online, part.momentum, part.labels) for part in problem.keys]
    rows = (problem.query, problem.momentum_query, parts, problem.labels)
    if not lean.takes(*rows, problem.temperature, problem.momentum_temperature, problem.alpha):
        return None
    return lean.contrast(
        *rows,
        temperature=problem.temperature,
        momentum_temperature=problem.momentum_temperature,
        alpha=problem.alpha,
        positives=choices.positives,
        reduction=choices.reduction,
        normalize=choices.normalize_keys or ("query" if choices.normalize else False),
        ignore_index=choices.ignore_index,
    )


def scaled(answer: "Answer", problem: Problem, upstream: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients for alpha, temperature, query and the parts of the keys, which have none."""
    from momentum_distill._contrast import lean

    assert upstream is not None
    learned = {"temperature": problem.temperature, "alpha": problem.alpha}
    dtypes = {name: x.dtype for name, x in learned.items() if isinstance(x, Tensor)}
    query, temperature, alpha = lean.scale(answer, upstream, query=problem.query.dtype, **dtypes)
    found = [alpha, temperature, query]
    return [x if want else None for x, want in zip(found, wanted, strict=False)] + [None] * len(problem.keys)


def attend(problem: Problem, queries: Tensor, momentum: Tensor | None) -> Statistics:
    """The statistics of prepared queries (N, d), divided by the temperature."""
    from momentum_distill._contrast import kernel

    parts = [
        kernel.Part(part.online, part.momentum, part.labels, part.present, part.prepare.normalize)
        for part in problem.keys
    ]
    inside = by_softmax(problem.choices.positives)
    return kernel.attend(queries, problem.labels, parts, momentum_query=momentum, inside=inside)


def normalize(raw: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows (N, d) and lengths (N, 1) of raw ones, in one launch; as `row_lengths`."""
    from momentum_distill._contrast import kernel

    return kernel.normalize(raw, eps)
