"""Every loss under torch.compile: one graph, the same numbers, no compilation after step two."""

import contextlib
import os
import shutil

import pytest
import torch

import momentum_distill as md
from loss_cases import bits, numbers_alone, supcon_case
from momentum_distill import _group

# The compiler's own, about what it does itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
    numbers_alone,
]

N, C = 6, 3
COMPILERS = [os.environ.get("CXX", "c++"), "g++", "clang++"]


def generator(step):
    return torch.Generator().manual_seed(step)


def contrast_inputs(step):
    """Query, the whole case, and alpha."""
    case = supcon_case(step, N, 12, 4, ignored=0.2, dtype=torch.float32)
    return case.query.requires_grad_(), case, 0.1 * (step + 1)


def supcon(**options):
    loss_fn = md.SupConDistillLoss(**options)

    def loss(query, case, alpha):
        return loss_fn(query, *case.args[1:], **case.momentum, alpha=alpha)

    return loss_fn, contrast_inputs, loss


def supcon_with_parts():
    loss_fn = md.SupConDistillLoss()

    def loss(query, case, alpha):
        return loss_fn(
            query,
            case.keys.split((4, 8)),
            case.query_labels,
            case.key_labels.split((4, 8)),
            momentum_query=case.momentum_query,
            momentum_keys=case.momentum_keys.split((4, 8)),
            alpha=alpha,
        )

    return loss_fn, contrast_inputs, loss


def supcon_without_momentum():
    loss_fn = md.SupConDistillLoss(learnable_temperature=False, reduction="sum")

    def loss(query, case, _):
        return loss_fn(query, *case.args[1:])

    return loss_fn, contrast_inputs, loss


def supcon_terms():
    loss_fn = md.SupConDistillLoss()

    def loss(query, case, alpha):
        terms = loss_fn.terms(query, *case.args[1:], **case.momentum, alpha=alpha)
        return terms.total + 0 * (terms.supervised + terms.distill)

    return loss_fn, contrast_inputs, loss


def response(task):
    loss_fn = md.ResponseDistillLoss(task=task)
    shape = (N,) if task == "regression" else (N, C)

    def inputs(step):
        g = generator(step)
        student, teacher, momentum = (torch.randn(shape, generator=g) for _ in range(3))
        mask = torch.rand(N, generator=g) > 0.3
        return student.requires_grad_(), teacher, momentum, mask, 0.1 * (step + 1)

    def loss(student, teacher, momentum, mask, alpha):
        return loss_fn(student, teacher, momentum, mask=mask, alpha=alpha)

    return loss_fn, inputs, loss


def hard_sample(class_weight):
    loss_fn = md.HardSampleFusionLoss(class_weight=class_weight)

    def inputs(step):
        g = generator(step)
        student = torch.randn(N, C, generator=g).requires_grad_()
        fused = torch.randn(N, C, generator=g)
        labels = torch.randint(-2, C, (N,), generator=g)
        return student, fused, labels, *(torch.randn(N, generator=g) for _ in range(3))

    def loss(student, fused, labels, student_scores, fused_scores, targets):
        return loss_fn(
            student_logits=student,
            fused_logits=fused,
            labels=labels,
            student_scores=student_scores,
            fused_scores=fused_scores,
            targets=targets,
        )

    return loss_fn, inputs, loss


def fusion():
    fuse = md.MomentumFusionFactors(["t", "a"])

    def inputs(step):
        g = generator(step)
        return torch.randn(N, 4, generator=g).requires_grad_(), torch.randn(N, 4, generator=g)

    def loss(t, a):
        out = fuse({"t": t, "a": a})
        return (out["t"] * out["a"]).sum()

    return fuse, inputs, loss


LOSSES = {
    "supcon outside": supcon,
    "supcon inside": lambda: supcon(positives="inside"),
    "supcon by row, unit keys": lambda: supcon(reduction="none", normalize="query"),
    "supcon, key parts": supcon_with_parts,
    "supcon, no momentum, fixed temperature": supcon_without_momentum,
    "supcon terms": supcon_terms,
    "response, regression": lambda: response("regression"),
    "response, classification": lambda: response("classification"),
    **{f"hard sample, {w}": lambda w=w: hard_sample(w) for w in ("distance", "per_sample")},
    "fusion factors": fusion,
}

MORE = ("supcon inside", "supcon by row, unit keys", "supcon, no momentum, fixed temperature", "supcon terms")
"""What is traced as its neighbour is, but for a branch."""


def compiling_ends(step):
    """From the third step on a compilation is an error; `set_stance` acts when it is called."""
    return torch.compiler.set_stance("fail_on_recompile") if step >= 2 else contextlib.nullcontext()


def run(module, loss, args):
    """Loss and all gradients."""
    module.zero_grad()
    query = args[0].detach().clone().requires_grad_()
    value = loss(query, *args[1:])
    value.sum().backward()
    return [value.detach(), query.grad, *(p.grad.clone() for p in module.parameters())]


def check(name, backend, steps):
    module, inputs, loss = LOSSES[name]()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for step in range(steps):
        args = inputs(step)
        with compiling_ends(step):
            ours = run(module, compiled, args)
        for compiled_value, eager in zip(ours, run(module, loss, args), strict=True):
            torch.testing.assert_close(compiled_value, eager, rtol=1e-5, atol=1e-6)
        # What an optimizer does between steps must not compile anything either.
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.01)
        if isinstance(module, md.MomentumFusionFactors):
            module.update()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in MORE else name for name in LOSSES]
)
def test_one_graph_and_no_recompilation_from_the_third_step_on(name):
    check(name, "aot_eager", steps=5)


@pytest.mark.long
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler: inductor needs one")
@pytest.mark.parametrize(
    "name",
    [
        "supcon outside",
        "response, regression",
        "response, classification",
        "hard sample, distance",
        "fusion factors",
    ],
)
def test_the_default_compiler_gives_the_same_numbers(name):
    check(name, "inductor", steps=3)


def test_batches_of_another_size_compile_at_most_once_more():
    loss_fn = md.SupConDistillLoss()
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for step, n in enumerate((6, 8, 5, 7, 11)):  # never 0 or 1: those torch specialises
        case = supcon_case(step, n, 2 * n, 4, dtype=torch.float32)
        with compiling_ends(step):
            ours = compiled(*case.args, **case.momentum)
        torch.testing.assert_close(ours, loss_fn(*case.args, **case.momentum))


def test_compiling_leaves_the_eager_result_alone():
    loss_fn = md.SupConDistillLoss()
    case = supcon_case(0, dtype=torch.float32)
    before = loss_fn(*case.args, **case.momentum)
    torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(*case.args, **case.momentum)
    assert bits(loss_fn(*case.args, **case.momentum)) == bits(before)


def test_a_compiled_rank_and_an_eager_one_know_each_others_losses_by_the_same_number():
    signature = "a loss of width 5 over the streams 'text', 'Stimmfärbung'"
    compiled = torch.compile(lambda value: value + _group._checksum(signature), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1, dtype=torch.float64)).item() == _group._checksum(signature)
