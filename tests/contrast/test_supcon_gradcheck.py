"""Derivatives of SupConDistillLoss against finite differences, in double precision."""

import gc
import math
import weakref

import pytest
import torch
from torch.autograd import gradcheck

import momentum_distill as md
from loss_cases import POSITIVES, REDUCTIONS, numbers_alone, supcon_case
from momentum_distill import functional as F

pytestmark = [pytest.mark.usefixtures("both_ways"), numbers_alone]


@pytest.mark.grid
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
@pytest.mark.parametrize("momentum", [False, True], ids=["supervised", "distilled"])
def test_gradcheck_in_queries_keys_and_temperature(momentum, normalize, reduction, positives):
    case = supcon_case(0, 4, 6, 3, ignored=0.2, unlabelled=0.1, momentum=momentum).requires_grad()
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def f(query, keys, temperature):
        return F.supcon_distill_loss(
            query,
            keys,
            case.query_labels,
            case.key_labels,
            **case.momentum,
            temperature=temperature,
            momentum_temperature=0.7 if momentum else None,
            positives=positives,
            reduction=reduction,
            normalize=normalize,
        )

    assert gradcheck(f, (case.query, case.keys, temperature), atol=1e-8)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("momentum", [False, True], ids=["supervised", "distilled"])
def test_gradcheck_in_the_learned_temperature(momentum, positives):
    case = supcon_case(2, 4, 6, 3, unlabelled=0.1, momentum=momentum)
    loss_fn = md.SupConDistillLoss(temperature=0.5, positives=positives)
    ratio = loss_fn.log_temperature_ratio
    with torch.no_grad():
        ratio.fill_(0.25)
    here = loss_fn.temperature.item()
    assert here == pytest.approx(0.5 * math.exp(0.25), rel=1e-7)

    loss_fn(*case.args, **case.momentum).backward()

    def at(temperature):
        # U keeps the temperature of here: nothing flows through it.
        frozen = {"momentum_temperature": here} if momentum else {}
        options = {"temperature": temperature, "positives": positives, **frozen}
        return F.supcon_distill_loss(*case.args, **case.momentum, **options).item()

    step = 1e-5
    slope = (at(here + step) - at(here - step)) / (2 * step)
    assert ratio.grad.item() == pytest.approx(slope * here, rel=1e-6)  # the parameter is float32


def test_gradcheck_next_to_a_zero_row():
    # At the zero row itself there is no derivative; the other rows must not notice it.
    case = supcon_case(4, 4, 6, 3)
    others = case.query[1:].clone().requires_grad_()

    def f(others):
        query = torch.cat([torch.zeros(1, 3, dtype=torch.float64), others])
        return F.supcon_distill_loss(query, *case.args[1:], **case.momentum, temperature=0.5)

    assert gradcheck(f, (others,), atol=1e-8)


def test_gradcheck_with_shared_query_and_keys():
    # Within a batch the same rows may be queries and keys, as in the in-batch form.
    case = supcon_case(5, 5, 5, 3)
    x = case.query.clone().requires_grad_()

    def f(x):
        return F.supcon_distill_loss(x, x, case.query_labels, case.query_labels, temperature=0.5)

    assert gradcheck(f, (x,), atol=1e-8)


def test_gradient_scales_with_what_comes_from_above():
    case = supcon_case(7).requires_grad()
    loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, reduction="none")
    weights = torch.linspace(-1.0, 2.0, len(loss), dtype=torch.float64)
    (together,) = torch.autograd.grad((weights * loss).sum(), case.query)
    alone = []
    for i, weight in enumerate(weights):
        loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5, reduction="none")
        (gradient,) = torch.autograd.grad(weight * loss[i], case.query)
        alone.append(gradient)
    torch.testing.assert_close(together, sum(alone), rtol=1e-12, atol=1e-14)


def made_of(x):
    """Inputs that are made of one another, by what is: `{name: loss of x}`."""
    x = x.detach()
    labels, other, matrix = torch.tensor([0, 0, 1, 1, 2]), x.flip(0), x[:3]
    both = {"momentum_query": other, "momentum_keys": other, "alpha": 0.3}

    def of(loss, query, keys, **options):
        sizes = [labels] * len(keys) if isinstance(keys, tuple) else labels
        return loss(query, keys, labels, sizes, **{"temperature": 0.5, **options})

    supcon, sigmoid = F.supcon_distill_loss, F.sigmoid_distill_loss
    return {
        "the key is the query": lambda x: of(supcon, x, x),
        "the key sees the same memory": lambda x: of(supcon, x, x.view_as(x), **both),
        "the key is made of the query": lambda x: of(supcon, x, x @ matrix),
        "the query is made of the key": lambda x: of(supcon, x @ matrix, (x, other)),
        "temperature and alpha are made of the query": lambda x: of(
            supcon, x, x * 2, **{**both, "alpha": x[0, 0].sigmoid(), "temperature": 0.3 + x.square().mean()}
        ),
        "centred": lambda x: of(supcon, x, x, **both, momentum_targets="centred", centre=other[0]),
        "sinkhorn": lambda x: of(supcon, x, x, **both, momentum_targets="sinkhorn", reduction="none").sum(),
        "sigmoid, the key is the query": lambda x: of(sigmoid, x, x, bias=-1.0, exclude_self=True),
        "sigmoid, the bias is made of the query": lambda x: of(sigmoid, x, x * 2, bias=x[0, 1], **both),
    }


@pytest.mark.parametrize("how", made_of(torch.ones(5, 3)))
def test_inputs_that_are_made_of_one_another_are_counted_once(how):
    """With create_graph=True as well; a penalty on the gradient and a Hessian are made of that one."""
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = made_of(x)[how]
    (plain,) = torch.autograd.grad(loss(x), x)
    (kept,) = torch.autograd.grad(loss(x), x, create_graph=True)
    torch.testing.assert_close(kept, plain, rtol=1e-12, atol=1e-13)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].flatten() for entry in kept.flatten()]
    hessian = torch.func.jacrev(torch.func.grad(loss))(x.detach()).reshape(15, 15)
    torch.testing.assert_close(torch.stack(rows), hessian, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", [md.SupConDistillLoss, md.SigmoidDistillLoss])
def test_a_loss_lets_go_of_its_inputs_when_its_graph_has_gone(kind, reduction):
    """As torch frees what it has saved: a sum of losses that nobody detached does not hold the keys of every step."""
    start = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    query, keys = start.tanh(), torch.randn(6, 3)
    loss = kind(reduction=reduction)(query, keys, labels, labels).sum()
    alive = weakref.ref(query), weakref.ref(keys)
    del query, keys
    (once,) = torch.autograd.grad(loss, start, retain_graph=True)
    (again,) = torch.autograd.grad(loss, start, create_graph=True)
    torch.testing.assert_close(once, again)
    assert all(reference() is not None for reference in alive)
    torch.autograd.grad(again.square().sum(), start, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(start.grad, once)
    del again, once
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
