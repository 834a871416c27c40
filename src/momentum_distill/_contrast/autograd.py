"""The door to the engine: a loss whose gradient autograd finds ready."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from momentum_distill._checks import in_transform
from momentum_distill._contrast import engine, operator
from momentum_distill._contrast.formulas import Counts, Number, Terms
from momentum_distill._contrast.problem import Problem
from momentum_distill._precision import as_variable, full_precision


def contrast(problem: Problem, *, only_total: bool) -> Terms:
    """The terms of the loss, connected to autograd; with `only_total` the others need no gradient."""
    inputs = _inputs(problem)
    with full_precision(problem.query):
        if in_transform():  # which sees into no autograd.Function
            return engine.by_autograd(problem)
        if torch.compiler.is_compiling():
            return _once(_compiled(problem, inputs, only_total=only_total), inputs, only_total=only_total)
        call = _Call(problem, torch.is_grad_enabled())
        total, supervised, distill = _Contrast.apply(call, *inputs)
        return Terms(total, supervised, distill, *call.counts)


def _compiled(problem: Problem, inputs: list[Tensor | None], *, only_total: bool) -> Terms:
    """As formulas that the compiler fuses, or as an operator."""
    if engine.is_fused(problem) or callable(problem.choices.positives_from):  # an operator takes no function
        return engine.by_autograd(problem)
    learns = torch.is_grad_enabled()
    wanted = [learns and x is not None and x.requires_grad for x in inputs]
    return Terms(*_Compiled.apply(problem, wanted, only_total, *distinct(inputs)))


def _once(terms: Terms, inputs: list[Tensor | None], *, only_total: bool) -> Terms:
    """Differentiable once: compilers drop a second derivative without a word where a gradient keeps no input."""
    learned = [x for x in inputs if x is not None and x.requires_grad]
    if not learned or not torch.is_grad_enabled():
        return terms
    shown = [terms.total] if only_total else [terms.total, terms.supervised, terms.distill]
    total, *others = torch.ops.momentum_distill.once(shown, learned)
    supervised, distill = others or (terms.supervised, terms.distill)
    return Terms(total, supervised, distill, terms.rows, terms.rows_with_positive)


class _Call:
    """One call: what goes in beside the tensors that may be learned, and comes out beside those with a gradient."""

    def __init__(self, problem: Problem, needs_grad: bool) -> None:
        self.problem = problem
        self.needs_grad = needs_grad
        self.counts: Counts = (0, 0)
        self.gradients: engine.Gradients | None = None
        self.versions = versions(problem.tensors())


class _Contrast(torch.autograd.Function):
    """Total, supervised and KL term; the forward pass makes the gradient of the total as well, while all is at hand.

    So nothing is kept but that gradient, and a queue may go on. Only who asks for that of one term alone, or for a
    second derivative, has everything made once more, from inputs that must not have changed.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context object has no public type
        call: _Call,
        *_: Tensor | None,  # alpha and temperature if tensors, query, parts of the keys: for autograd to see
    ) -> tuple[Tensor, ...]:
        problem, wanted = call.problem, ctx.needs_input_grad[1:]
        ctx.set_materialize_grads(False)
        ctx.call, ctx.difference = call, None
        solved = engine.Solved(problem)
        terms = solved.terms()
        call.counts = terms[3:]
        # Row by row, gradients for the keys are not known before the backward pass.
        if call.needs_grad and any(wanted) and not (problem.choices.reduction == "none" and any(wanted[3:])):
            call.gradients = solved.gradients(call.counts, _shares(problem, 1.0, 0.0, 0.0), wanted[3:])
        ctx.difference = terms.distill - terms.supervised if wanted[0] else None
        return terms[:3]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        _ = ctx.saved_tensors  # there are none, but here torch refuses to go through a graph a second time
        call, difference, wanted = ctx.call, ctx.difference, ctx.needs_input_grad[1:]
        if graph_ends():
            ctx.call = ctx.difference = None
        problem = call.problem
        if all(grad is None for grad in upstream):
            return (None,) * len(ctx.needs_input_grad)
        with full_precision(problem.query):  # backward() may be called under autocast
            if torch.is_grad_enabled():  # create_graph=True: the gradient is to have one itself
                check_versions(call.versions)
                apart = independent(problem)
                return None, *second(engine.by_autograd(apart)[:3], upstream, _inputs(apart), wanted)
            grads, scale = call.gradients, upstream[0]
            if grads is None or any(grad is not None for grad in upstream[1:]):
                check_versions(call.versions)
                shares = _shares(problem, *(0.0 if grad is None else grad for grad in upstream))
                grads, scale = engine.Solved(problem).gradients(call.counts, shares, wanted[3:]), None
            return None, *_delivered(problem, difference, grads, scale, upstream[0], wanted)


class _Compiled(torch.autograd.Function):
    """All terms, by the operators: what a compiler traces, which sees no values and has to be told what is kept.

    Where the gradient of the total is all that is asked for, the forward pass makes it; else all is made once more.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        problem: Problem,
        wanted: list[bool],  # of what follows, which is for a gradient to be
        only_total: bool,
        *_: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ready = only_total and not (problem.choices.reduction == "none" and any(wanted[3:]))
        given = operator.arguments(problem)
        found = torch.ops.momentum_distill.contrast(*given, [ready and any(wanted), *wanted[3:]])
        total, supervised, distill, rows, rows_with_positive, *grads = found
        ctx.mark_non_differentiable(*((supervised, distill) if only_total else ()), rows, rows_with_positive)
        ctx.ready, ctx.wanted, ctx.problem, ctx.given = ready, wanted, problem, given
        ctx.save_for_backward(distill - supervised if wanted[0] else None, rows, rows_with_positive, *grads)
        return total, supervised, distill, rows, rows_with_positive

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        problem, wanted = ctx.problem, ctx.wanted
        difference, rows, rows_with_positive, *grads = ctx.saved_tensors
        scale = upstream[0]
        if not ctx.ready:
            like = problem.query.new_empty((), dtype=problem.prepare.dtype)
            upstream_terms = (like.new_zeros(()) if grad is None else grad for grad in upstream[:3])
            shares = (as_variable(share, like) for share in _shares(problem, *upstream_terms))
            counts = (rows, rows_with_positive)
            grads = torch.ops.momentum_distill.contrast_gradients(*ctx.given, [True, *wanted[3:]], *counts, *shares)
            scale = None
        query, temperature, *keys = grads
        parts = iter(keys)
        gradients = engine.Gradients(query, temperature, [next(parts) if want else None for want in wanted[3:]])
        return None, None, None, *_delivered(problem, difference, gradients, scale, upstream[0], wanted)


def _shares(problem: Problem, total: Number, supervised: Number, distill: Number) -> tuple[Number, Number]:
    """The gradients of supervised and KL term, from those of all three."""
    if problem.momentum_query is None:
        return supervised + total, 0.0
    alpha = problem.alpha
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(problem.prepare.dtype)  # in which 1 - alpha loses nothing
    return supervised + (1 - alpha) * total, distill + alpha * total


def _delivered(
    problem: Problem,
    difference: Tensor | None,
    grads: engine.Gradients,
    scale: Tensor | None,
    grad_total: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients, times `scale` where it is to come, in the dtypes of what they are for."""
    by_row = scale[:, None] if scale is not None and scale.ndim else scale

    def scaled(grad: Tensor) -> Tensor:
        return grad if by_row is None else grad * by_row

    found = [
        None if difference is None or grad_total is None else (grad_total * difference).sum(),
        scaled(grads.temperature).sum() if wanted[1] else None,
        scaled(grads.query) if wanted[2] else None,
        *(None if grad is None else scaled(grad) for grad in grads.keys),
    ]
    inputs = zip(_inputs(problem), found, strict=True)
    return [None if x is None or grad is None else grad.to(x.dtype) for x, grad in inputs]


def _inputs(problem: Problem) -> list[Tensor | None]:
    """What a gradient may be for: alpha and temperature if they are tensors, query, parts of the keys."""
    learned = [x if isinstance(x, Tensor) else None for x in (problem.alpha, problem.temperature)]
    return [*learned, problem.query, *(part.online for part in problem.keys)]


def graph_ends() -> bool:
    """Whether autograd lets go of a graph when it has gone through it: then what is kept for it is to go, too."""
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return not keeps


def independent(problem: Problem) -> Problem:
    """The same of views of what may be learned: none is made of another, as a key that is a query, or made of queries.

    Else what such a tensor does to the loss by way of another would be counted as its own, and once more for that one.
    """
    parts = [
        part._replace(online=online, momentum=online if part.momentum is part.online else part.momentum)
        for part in problem.keys
        for online in [part.online.view_as(part.online)]
    ]
    return problem._replace(
        query=problem.query.view_as(problem.query),
        keys=parts,
        temperature=view(problem.temperature),
        alpha=view(problem.alpha),
    )


def view(number: Number) -> Number:
    """A number, or a view of its tensor."""
    return number.view_as(number) if isinstance(number, Tensor) else number


def distinct(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each tensor once, and views of it after that: compilers want no input twice."""
    found: list[Tensor | None] = []
    for x in inputs:
        again = x is not None and any(x is other for other in found)
        found.append(x.view_as(x) if x is not None and again else x)
    return found


def second(
    terms: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients with a graph of their own."""
    pairs = [
        (term, grad)
        for term, grad in zip(terms, upstream, strict=True)
        if grad is not None and term.requires_grad  # the KL term does not without momentum inputs
    ]
    grads = torch.autograd.grad(
        [term for term, _ in pairs],
        [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    found = iter(grads)
    return [next(found) if want else None for want in wanted]


def versions(inputs: Iterable[object]) -> list[tuple[Tensor, int]]:
    """The tensors, each with how often it was changed in place; an inference tensor does not count."""
    return [(x, 0 if x.is_inference() else x._version) for x in inputs if isinstance(x, Tensor)]


def check_versions(before: list[tuple[Tensor, int]], loss: str = "supcon_distill") -> None:
    """Refuse what autograd would refuse, had it kept these inputs itself."""
    if any(now[1] != then[1] for now, then in zip(versions(x for x, _ in before), before, strict=True)):
        raise RuntimeError(
            f"{loss}: an input was changed in place (keys or labels by ClassQueue.enqueue?) before the gradient of a "
            "single term, or a second derivative, was taken; that needs it. Call backward() first, differentiate "
            "`total`, or read the queue without padded=True"
        )
