"""The engine as an operator of PyTorch: `torch.compile` takes it whole, and makes no N×Q matrix of it.

Two operators, for autograd.Function to connect: `contrast` gives the terms and the gradient of their total, and
`contrast_gradients` that of any sum of the terms' rows. Defined by `define` and `impl`, which start in a tenth of
the time of `custom_op`. They have no derivative of their own, and a second one is an error by a third, `once`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from momentum_distill._checks import bounds, may_ask
from momentum_distill._contrast import engine
from momentum_distill._contrast.problem import Bounds, Choices, Problem, problem_of
from momentum_distill._group import find_ranks
from momentum_distill._precision import as_variable, full_precision, sum_dtype

ARGUMENTS = (
    "Tensor query, Tensor[] keys, Tensor query_labels, Tensor[] key_labels, Tensor? momentum_query, "
    "Tensor[] momentum_keys, bool same_keys, Tensor temperature, Tensor? momentum_temperature, Tensor alpha, "
    "str positives, str reduction, int ignore_index, str positives_from, float width, float hardness, "
    "bool normalize, bool normalize_keys, bool exclude_self, Tensor? query_targets, Tensor[] key_targets, "
    "str group, bool[] wanted"
)
torch.library.define("momentum_distill::contrast", f"({ARGUMENTS}) -> Tensor[]")
torch.library.define(
    "momentum_distill::contrast_gradients",
    f"({ARGUMENTS}, Tensor rows, Tensor rows_with_positive, Tensor grad_supervised, Tensor grad_distill) -> Tensor[]",
)
torch.library.define("momentum_distill::once", "(Tensor[] terms, Tensor[] inputs) -> Tensor[]")


def arguments(problem: Problem) -> tuple[Any, ...]:
    """Those of both operators but the last, `wanted`: whether gradients are to be made at all, and for each part."""
    query, momentum_query = problem.query.detach(), problem.momentum_query
    like = query.new_empty((), dtype=problem.prepare.dtype)
    same = momentum_query is not None and all(part.momentum is part.online for part in problem.keys)
    momentum = [] if same else [part.momentum.detach() for part in problem.keys if part.momentum is not None]
    own_temperature = problem.momentum_temperature is not problem.temperature
    return (
        query,
        [part.online.detach() for part in problem.keys],
        problem.labels,
        [part.labels for part in problem.keys],
        None if momentum_query is None else momentum_query.detach(),
        momentum,
        same,
        as_variable(problem.temperature, like).detach(),
        as_variable(problem.momentum_temperature, like).detach() if own_temperature else None,
        as_variable(problem.alpha, like).detach(),
        *problem.choices,
        problem.prepare.normalize,
        problem.keys[0].prepare.normalize,
        problem.keys[0].own,
        problem.targets,
        [part.targets for part in problem.keys if part.targets is not None],
        "" if problem.ranks is None else problem.ranks.group.group_name,
    )


def _problem(
    query: Tensor,
    keys: list[Tensor],
    labels: Tensor,
    key_labels: list[Tensor],
    momentum_query: Tensor | None,
    momentum_keys: list[Tensor],
    same_keys: bool,
    temperature: Tensor,
    momentum_temperature: Tensor | None,
    alpha: Tensor,
    *others: Any,  # noqa: ANN401 - what they are stands in ARGUMENTS
) -> Problem:
    """What the :func:`arguments` stand for, once there are numbers."""
    *choices, normalize, normalize_keys, exclude_self, targets, key_targets, group = others
    ranks = None
    if group:
        from torch.distributed import distributed_c10d as c10d

        ranks = find_ranks(c10d._resolve_process_group(group))  # type: ignore[attr-defined] # by its name

    def look(labels: Tensor) -> Bounds:
        return bounds(labels) if labels.numel() and may_ask(labels) else None

    return problem_of(
        query,
        keys,
        labels,
        key_labels,
        momentum_query,
        keys if same_keys else momentum_keys,
        temperature,
        temperature if momentum_temperature is None else momentum_temperature,
        engine.known(alpha),
        Choices(*choices),
        normalize,
        normalize_keys,
        exclude_self,
        ranks,
        look(labels),
        [look(part) for part in key_labels],
        targets,
        key_targets,
    )


def _contrast(*values: Any) -> list[Tensor]:  # noqa: ANN401
    """Total, supervised, KL term, rows, rows with a positive; gradients for query, temperature by row, and parts."""
    *inputs, wanted = values
    with full_precision(inputs[0]):
        problem = _problem(*inputs)
        solved = engine.Solved(problem)
        terms = solved.terms()
        found = list(terms.tensors())
        if not wanted[0]:
            return found
        alpha = 0.0 if problem.momentum_query is None else problem.alpha
        return found + _listed(solved.gradients(terms[3:], (1 - alpha, alpha), wanted[1:]))


def _contrast_gradients(*values: Any) -> list[Tensor]:  # noqa: ANN401
    """Gradients for query, temperature by row, and parts, of the sum of rows or terms with these gradients."""
    *inputs, wanted, rows, rows_with_positive, grad_supervised, grad_distill = values
    with full_precision(inputs[0]):
        upstream = (grad_supervised, grad_distill)
        solved = engine.Solved(_problem(*inputs))
        return _listed(solved.gradients((rows, rows_with_positive), upstream, wanted[1:]))


def _listed(found: engine.Gradients) -> list[Tensor]:
    return [found.query, found.temperature, *(grad for grad in found.keys if grad is not None)]


def _fake_contrast(*values: Any) -> list[Tensor]:  # noqa: ANN401
    count_flops()
    query, reduction, wanted = values[0], values[11], values[-1]
    wide = query.new_empty((), dtype=_dtype(values))
    term = (query.shape[0],) if reduction == "none" else ()
    counts = [query.new_empty((), dtype=torch.int64) for _ in range(2)]
    terms = [wide.new_empty(term) for _ in range(3)]
    return [*terms, *counts, *(_fake_contrast_gradients(*values, None, None, None, None) if wanted[0] else [])]


def _fake_contrast_gradients(*values: Any) -> list[Tensor]:  # noqa: ANN401
    query, keys, wanted, dtype = values[0], values[1], values[-5], _dtype(values)
    grads = [query.new_empty(query.shape, dtype=dtype), query.new_empty((query.shape[0], 1), dtype=dtype)]
    return grads + [
        part.new_empty(part.shape, dtype=dtype) for part, want in zip(keys, wanted[1:], strict=True) if want
    ]


def _flops(query: torch.Size, keys: list[torch.Size], *others: Any, **_: Any) -> int:  # noqa: ANN401
    """N Q d multiplications and additions for each product, from the shapes of the arguments of an operator.

    The logits, those of the momentum model, the gradient for the query, and for each part of the keys that wants one.
    """
    momentum_query, wanted = others[2], others[20]
    rows, width = query
    everything = sum(part[0] for part in keys)
    products: int = everything * (1 + (momentum_query is not None) + wanted[0])
    products += sum(part[0] for part, want in zip(keys, wanted[1:], strict=True) if wanted[0] and want)
    return 2 * rows * width * products


@functools.cache
def count_flops() -> None:
    """Tell the counter of PyTorch, which takes longer to import than all of this package."""
    from torch.utils.flop_counter import register_flop_formula

    for operator in (torch.ops.momentum_distill.contrast, torch.ops.momentum_distill.contrast_gradients):
        register_flop_formula(operator)(_flops)


def _dtype(values: Sequence[Any]) -> torch.dtype:
    query, keys, momentum_query, momentum_keys = values[0], values[1], values[4], values[5]
    return sum_dtype(query, *keys, momentum_query, *momentum_keys)


def _backward_of_once(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], list[None]]:  # noqa: ANN401
    """What comes from above, of which every gradient is made; no compiler may think it independent of the inputs."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "contrastive loss: expected no derivative of a gradient (create_graph=True) under torch.compile, which "
            "sees no way from it to the inputs; without torch.compile the loss has second derivatives"
        )
    given = torch.ops.momentum_distill.once([grad for grad in grads if grad is not None], ctx.inputs)
    passed = iter(given)
    return [None if grad is None else next(passed) for grad in grads], [None] * len(ctx.inputs)


def _inputs_of_once(ctx: Any, inputs: tuple[list[Tensor], list[Tensor]], output: Any) -> None:  # noqa: ANN401, ARG001
    ctx.set_materialize_grads(False)
    ctx.inputs = inputs[1]


for _name, _impl, _fake in (
    ("contrast", _contrast, _fake_contrast),
    ("contrast_gradients", _contrast_gradients, _fake_contrast_gradients),
    ("once", lambda terms, _: [term.clone() for term in terms], lambda terms, _: [term.clone() for term in terms]),
):
    torch.library.impl(f"momentum_distill::{_name}", "CompositeExplicitAutograd", _impl)
    torch.library.register_fake(f"momentum_distill::{_name}", _fake)
torch.library.register_autograd("momentum_distill::once", _backward_of_once, setup_context=_inputs_of_once)
