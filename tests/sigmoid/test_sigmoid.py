"""The pairwise sigmoid loss: its values, its gradients, and the block around it."""

import copy
import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import momentum_distill as md
import reference
from loss_cases import (
    REDUCTIONS,
    Largest,
    assert_close,
    assert_gradient_close,
    bits,
    lists,
    numbers_alone,
    supcon_case,
    without_asking,
)
from momentum_distill import functional as F
from momentum_distill._contrast import engine
from momentum_distill._contrast import sigmoid as module
from momentum_distill._contrast.arguments import read_problem

pytestmark = [
    numbers_alone,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
]

N, Q = 6, 11
OPTIONS = [
    {"reduction": reduction, "key_reduction": key_reduction, "exclude_self": exclude_self}
    for reduction, key_reduction, exclude_self in itertools.product(REDUCTIONS, ("sum", "mean"), (False, True))
]


def scalars(dtype=torch.float64):
    """Temperature, bias and alpha, with gradient."""
    return {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name, value in (("temperature", 0.4), ("bias", -1.5), ("alpha", 0.3))
    }


def loss_of(case, **options):
    """Of a case whose keys come in two parts, the first of which has as many as there are rows."""
    case = case.split(N, Q - N)
    return F.sigmoid_distill_loss(*case.args, **case.momentum, **options)


@pytest.fixture(params=["whole", "tiles", "without asking"])
def way(request, monkeypatch):
    """In one tile, in tiles of four keys, and as on an accelerator."""
    if request.param != "whole":
        monkeypatch.setattr(module, "tile_size", lambda _: 4)
    if request.param == "without asking":
        without_asking(monkeypatch)


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.usefixtures("way")
def test_values_are_those_of_the_loops():
    seed = 0
    for options, momentum, normalize in itertools.product(OPTIONS, (True, False), (True, "query", False)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            seed += 1
            case = supcon_case(seed, N, Q, ignored=0.2, unlabelled=0.2, momentum=momentum, dtype=dtype)
            args, named = case.reference
            numbers = {"temperature": 0.4, "bias": -1.5, "alpha": 0.3, "normalize": normalize}
            expected = reference.sigmoid(*args, **named, **numbers, **options)
            # All is summed in float32 or wider, from inputs that are rounded alike.
            bound = torch.float64 if dtype == torch.float64 else torch.float32
            assert_close(loss_of(case, **numbers, **options), expected, bound)


@pytest.mark.usefixtures("way")
def test_gradients_are_those_of_the_loops_by_differences():
    for seed, options in enumerate(OPTIONS):
        case = supcon_case(seed, N, Q, ignored=0.2, unlabelled=0.2).requires_grad()
        numbers, weights = scalars(), torch.linspace(0.5, 2.0, N, dtype=torch.float64)
        loss = loss_of(case, **numbers, **options)
        given = [case.query, case.keys, numbers["temperature"], numbers["bias"]]
        found = torch.autograd.grad((loss * weights).sum() if loss.ndim else loss, [*given, numbers["alpha"]])

        inputs = [x.detach() for x in (*given, numbers["alpha"])]
        for place, gradient in enumerate(found):
            direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            ends = []
            for step in (1e-6, -1e-6):
                moved = list(inputs)
                moved[place] = moved[place] + step * direction
                ends.append(of_loops(case, weights, options, *moved))
            along = (gradient * direction).sum()
            torch.testing.assert_close(along, along.new_tensor((ends[0] - ends[1]) / 2e-6), rtol=1e-6, atol=1e-6)


def of_loops(case, weights, options, query, keys, temperature, bias, alpha):
    """The loss of the loops, weighed row by row, with targets whose temperature and bias stand still."""
    value = reference.sigmoid(
        with_bias(query, temperature, bias),
        with_one(keys),
        *case.reference[0][2:],
        momentum_query=with_bias(case.momentum_query, 0.4, -1.5),
        momentum_keys=with_one(case.momentum_keys),
        temperature=1.0,
        bias=0.0,
        alpha=float(alpha),
        normalize=False,
        **options,
    )
    return math.fsum(w * v for w, v in zip(weights.tolist(), value, strict=True)) if isinstance(value, list) else value


def with_bias(rows, temperature, bias):
    """Rows over the temperature, and the bias as a number more: logits that need neither."""
    unit = F.l2_normalize(rows.detach()) / temperature
    return lists(torch.cat([unit, torch.ones(len(rows), 1, dtype=unit.dtype) * bias], dim=1))


def with_one(rows):
    return lists(torch.cat([F.l2_normalize(rows.detach()), torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1))


def test_gradcheck_first_and_second():
    """Of temperature and bias without momentum inputs, in whose targets they stand still."""
    learned = (("query", "keys", "alpha"), ("query", "keys", "temperature", "bias"))
    for seed, (options, names) in enumerate(zip((OPTIONS[3], OPTIONS[8]), learned, strict=True)):
        case = supcon_case(seed, N, Q, ignored=0.2, unlabelled=0.2, momentum="alpha" in names).requires_grad()
        fixed = {name: value.detach() for name, value in scalars().items()}

        def loss(query, keys, *given, case=case, names=names, options=options, fixed=fixed):
            numbers = {**fixed, **dict(zip(names[2:], given, strict=True))}
            return loss_of(replace(case, query=query, keys=keys), **numbers, **options)

        inputs = [case.query, case.keys, *(scalars()[name] for name in names[2:])]
        assert gradcheck(loss, inputs, fast_mode=True)
        assert gradgradcheck(loss, inputs, fast_mode=True)


def test_narrow_features_get_the_gradients_of_wide_ones():
    for dtype in (torch.float32, torch.bfloat16):
        case = supcon_case(3, N, Q, ignored=0.2, unlabelled=0.2, dtype=dtype).requires_grad()
        wide = case.map(lambda x: x.detach().double()).requires_grad()
        loss_of(case, **scalars()).backward()
        loss_of(wide, **scalars()).backward()
        assert case.query.grad.dtype == dtype
        assert_gradient_close(case.query.grad, wide.query.grad, dtype)
        assert_gradient_close(case.keys.grad, wide.keys.grad, dtype)


def test_only_parts_that_want_a_gradient_get_one():
    case = supcon_case(0, N, Q)
    for wanted in itertools.product((False, True), repeat=3):
        parts = [part.clone() for part in case.keys.split((N, Q - N))]
        leaves = [case.query.clone(), *parts]
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        labels = case.key_labels.split((N, Q - N))
        loss = F.sigmoid_distill_loss(
            leaves[0], tuple(parts), case.query_labels, labels, temperature=0.5, bias=-1.0, reduction="none"
        )
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)


# ----------------------------------------------------------------------------------------------------------- the edges


def test_large_logits_lose_nothing():
    row, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    for keys, label, z in ((row, 0, 100.0), (row, 1, 100.0), (far, 0, -100.0), (far, 1, -100.0)):
        query = row.clone().requires_grad_()
        bias = torch.zeros((), requires_grad=True)
        loss = F.sigmoid_distill_loss(
            query, keys, torch.tensor([0]), torch.tensor([label]), temperature=0.01, bias=bias
        )
        signed = z if label == 0 else -z
        expected = -signed if signed < 0 else math.exp(-signed)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        slope = (-1 if label == 0 else 1) * (1.0 if signed < 0 else math.exp(-signed))
        assert bias.grad.item() == pytest.approx(slope, rel=1e-5)
    for near, other in ((1.0, 2.0), (-1.0, -2.0), (1.0, -1.0)):  # of momentum targets: logits of 60 and 120, say
        given = {"normalize": False, "alpha": 1.0, "temperature": 1 / 60, "bias": 0.0}
        one, zero, far, there = torch.ones(1, 1), torch.tensor([0]), torch.tensor([[near]]), torch.tensor([[other]])
        found = F.sigmoid_distill_loss(one, far, zero, zero, momentum_query=one, momentum_keys=there, **given)
        momentum = {"momentum_query": [[1.0]], "momentum_keys": [[other]]}
        expected = reference.sigmoid([[1.0]], [[near]], [0], [0], **momentum, **given)
        assert found.item() == pytest.approx(expected, rel=1e-4)


def test_targets_that_are_the_students_own_add_nothing():
    case = supcon_case(0, N, Q, dtype=torch.float32)
    same = {"momentum_query": case.query, "momentum_keys": case.keys, "temperature": 0.02, "bias": 3.0}
    query = case.query.requires_grad_()
    loss = F.sigmoid_distill_loss(query, *case.args[1:], **same, alpha=1.0)
    loss.backward()
    assert loss.item() == 0
    assert not query.grad.any()


def test_nothing_to_compare_is_zero_and_connected():
    for rows, keys, label in ((0, 4, 0), (3, 0, 0), (0, 0, 0), (3, 4, -1)):
        for options in OPTIONS:
            if options["exclude_self"]:
                continue
            query = torch.randn(rows, 5).requires_grad_()
            labels, key_labels = torch.full((rows,), label), torch.zeros(keys, dtype=torch.int64)
            loss = F.sigmoid_distill_loss(
                *(query, torch.randn(keys, 5), labels, key_labels), temperature=0.5, bias=-1.0, **options
            )
            assert not loss.any()
            loss.sum().backward()
            assert not query.grad.any()


def test_what_is_absent_may_hold_anything():
    for options in OPTIONS:
        case = supcon_case(7, N, Q, ignored=0.3, unlabelled=0.2)
        whole = loss_of(case.requires_grad(), **scalars(), **options)
        dirty = case.requires_grad()
        with torch.no_grad():
            for rows, labels in ((dirty.query, case.query_labels), (dirty.keys, case.key_labels)):
                rows[labels == -1] = math.nan
            dirty.momentum_query[case.query_labels == -1] = math.inf
            dirty.momentum_keys[case.key_labels == -1] = math.nan
        found = loss_of(dirty, **scalars(), **options)
        assert bits(found) == bits(whole)
        found.sum().backward()
        assert not dirty.query.grad[case.query_labels == -1].any()
        assert dirty.query.grad.isfinite().all()
        assert not dirty.keys.grad[case.key_labels == -1].any()


def test_an_absent_class_may_have_any_number():
    case = supcon_case(4, N, Q, ignored=0.3)
    moved = [labels.masked_fill(labels == -1, 7) for labels in (case.query_labels, case.key_labels)]
    options = {"temperature": 0.4, "bias": -1.0}
    found = F.sigmoid_distill_loss(case.query, case.keys, *moved, **case.momentum, **options, ignore_index=7)
    assert bits(found) == bits(F.sigmoid_distill_loss(*case.args, **case.momentum, **options))


def test_a_queue_may_go_on_before_the_backward_pass_but_for_rows():
    for reduction in REDUCTIONS:
        case = supcon_case(0, N, Q).requires_grad()
        keys = case.keys.detach().clone()
        batch = case.keys.detach()[:N].clone().requires_grad_()
        labels = (case.key_labels[:N], case.key_labels)
        loss = F.sigmoid_distill_loss(
            *(case.query, (batch, keys), case.query_labels, labels),
            temperature=0.5,
            bias=-1.0,
            reduction=reduction,
        )
        keys[0] = 0.0
        if reduction != "none":
            loss.backward()
            continue
        with pytest.raises(RuntimeError, match=r"^sigmoid_distill: an input was changed"):
            loss.sum().backward()


def test_nothing_of_the_size_of_the_similarities_is_made():
    rows, keys, matrices = 256, 8192, 6
    for reduction in ("mean", "none"):
        case = supcon_case(0, rows, keys, 4, ignored=0.1, dtype=torch.float32).requires_grad()
        with Largest() as largest:
            F.sigmoid_distill_loss(
                *case.args, **case.momentum, temperature=0.5, bias=-1.0, reduction=reduction
            ).sum().backward()
        assert largest.numel <= matrices * rows * module.tile_size(case.query) < rows * keys


# ----------------------------------------------------------------------------------------------- transforms, compilers


def test_transforms_give_the_same():
    case = supcon_case(0, N, Q, ignored=0.2)
    options = {"temperature": 0.4, "bias": -1.0, **case.momentum}

    def loss(query):
        return F.sigmoid_distill_loss(query, *case.args[1:], **options)

    query = case.query.clone().requires_grad_()
    value = loss(query)
    (expected,) = torch.autograd.grad(value, query)
    torch.testing.assert_close(grad(loss)(case.query), expected)
    direction = torch.ones_like(case.query)
    found, slope = jvp(loss, (case.query,), (direction,))
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(slope, (expected * direction).sum())
    both = torch.stack([case.query, case.query.flip(0)])
    torch.testing.assert_close(vmap(loss)(both), torch.stack([loss(rows) for rows in both]))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_takes_it_whole_and_gives_the_same(monkeypatch):
    def value_and_gradients(f, case, options):
        case, numbers = case.requires_grad(), scalars()
        loss = f(case, **numbers, **options)
        weights = torch.linspace(1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
        inputs = [case.query, case.keys, *numbers.values()]
        given = [x for x in inputs if not (case.momentum_query is None and x is numbers["alpha"])]
        return [loss, *torch.autograd.grad((loss * weights).sum(), given)]

    by_row, mean = {"reduction": "none"}, {"key_reduction": "mean", "exclude_self": True}
    for seed, (few, options, momentum) in enumerate(((-1, by_row, True), (-1, mean, False), (2**14, mean, True))):
        monkeypatch.setattr(engine, "FUSED_SCORES", few)
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
        case = supcon_case(seed, N, Q, ignored=0.2, unlabelled=0.2, momentum=momentum)
        found, expected = (value_and_gradients(f, case, options) for f in (compiled, loss_of))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_second_derivative_under_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(engine, "FUSED_SCORES", -1)
    case = supcon_case(0, N, Q).requires_grad()
    call = torch.compile(loss_of, backend="aot_eager", fullgraph=True)

    def penalty():
        loss = call(case, temperature=0.5, bias=-1.0)
        (slope,) = torch.autograd.grad(loss, case.query, create_graph=True)
        return torch.autograd.grad(loss + slope.sin().sum(), case.query)

    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        penalty()


def test_the_operator_is_what_it_tells_the_compiler():
    for reduction, momentum in itertools.product(("mean", "none"), (True, False)):
        case = supcon_case(0, N, Q, ignored=0.2, momentum=momentum, dtype=torch.float32)
        arguments = (*case.args, case.momentum_query, case.momentum_keys, 0.5, None, 0.3, "outside", reduction, True)
        problem = read_problem(*arguments, -1, False, None, False)
        upstream = torch.rand(N) if reduction == "none" else None
        given = (*module.operator.arguments(problem), [True, True], torch.tensor(-1.0), "mean", upstream)
        torch.library.opcheck(
            torch.ops.momentum_distill.sigmoid.default,
            given,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


# ----------------------------------------------------------------------------------------------------------- the block


def test_first_loss_uses_what_was_given_and_every_option_reaches_the_function():
    case = supcon_case(2, N, N, ignored=0.2)
    options = {
        "reduction": "sum",
        "key_reduction": "mean",
        "normalize": False,
        "exclude_self": True,
        "alpha": 0.7,
    }
    loss_fn = md.SigmoidDistillLoss(temperature=0.3, bias=-2.0, **options)
    expected = F.sigmoid_distill_loss(*case.args, **case.momentum, temperature=0.3, bias=-2.0, **options)
    torch.testing.assert_close(loss_fn(*case.args, **case.momentum), expected)
    fixed = md.SigmoidDistillLoss(
        temperature=0.3, bias=-2.0, learnable_temperature=False, learnable_bias=False, **options
    )
    assert bits(fixed(*case.args, **case.momentum)) == bits(expected)
    assert not [p for p in fixed.parameters() if p.requires_grad]
    assert "bias=-2 (fixed)" in repr(fixed)
    assert "temperature=0.3 (learned in [0.001, 10]), bias=-2 (learned)" in repr(loss_fn)


def test_defaults_are_those_of_siglip():
    """Its algorithm 1, with t = exp(log 10) and b = -10, from unit rows of image and text."""
    case = supcon_case(0, N, N)
    labels, images, texts = torch.arange(N), F.l2_normalize(case.query), F.l2_normalize(case.keys)
    signs = 2 * torch.eye(N, dtype=torch.float64) - 1
    theirs = -torch.nn.functional.logsigmoid(signs * (10 * images @ texts.T - 10)).sum() / N
    loss_fn = md.SigmoidDistillLoss()
    torch.testing.assert_close(loss_fn(case.query, case.keys, labels, labels), theirs)
    torch.testing.assert_close(loss_fn(case.keys, case.query, labels, labels), theirs)


def test_both_scalars_learn_without_decay_and_stay_wide():
    loss_fn = md.SigmoidDistillLoss(temperature=0.2, bias=-5.0).half()
    model = torch.nn.Linear(4, 4).double()
    groups = md.param_groups(model, loss_fn, weight_decay=0.1, lr=0.05)
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert {p.dtype for p in loss_fn.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(groups)
    case, losses = supcon_case(0, 8, 8), []
    for _ in range(30):
        loss = loss_fn(model(case.query), case.keys, torch.arange(8), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert loss_fn.bias.item() != -5
    assert float(loss_fn.temperature) != 0.2


def test_state_is_restored_to_the_bit():
    case = supcon_case(0, N, Q)
    for learnable in (True, False):
        loss_fn = md.SigmoidDistillLoss(temperature=0.3, bias=-2.0, learnable_bias=learnable)
        with torch.no_grad():
            loss_fn.log_temperature_ratio.add_(0.1)
            loss_fn.bias.add_(0.3)
        other = md.SigmoidDistillLoss(temperature=0.7, learnable_bias=learnable)
        other.load_state_dict(loss_fn.state_dict())
        assert bits(other(*case.args)) == bits(loss_fn(*case.args)) == bits(copy.deepcopy(loss_fn)(*case.args))


def test_a_bias_that_nobody_moves_is_told_once():
    case = supcon_case(0, 3, 3, dtype=torch.float32).requires_grad()
    loss_fn = md.SigmoidDistillLoss(learnable_temperature=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(520):
            loss_fn(*case.args).backward()
    (warning,) = told
    assert str(warning.message).startswith("the bias of SigmoidDistillLoss has a gradient and nothing has changed it")


def test_no_student_is_told():
    case = supcon_case(0, 3, 3)
    with pytest.warns(UserWarning, match="SigmoidDistillLoss trains no model"):
        md.SigmoidDistillLoss()(*case.args)


def test_parameters_may_be_anothers():
    case, loss_fn = supcon_case(0, N, Q), md.SigmoidDistillLoss()
    theirs = {"log_temperature_ratio": torch.tensor(0.5), "bias": torch.tensor(-3.0)}
    expected = F.sigmoid_distill_loss(*case.args, temperature=0.1 * math.exp(0.5), bias=-3.0)
    torch.testing.assert_close(functional_call(loss_fn, theirs, case.args), expected)
    slopes = grad(lambda given: functional_call(loss_fn, given, case.args))(theirs)
    assert all(slope.isfinite() and slope != 0 for slope in slopes.values())


def test_what_counts_for_nothing_may_hold_nan():
    """Without momentum inputs that is who has no class as well; else NaN reaches value and gradient together."""
    for momentum, label in itertools.product((False, True), (-1, -2)):
        case = supcon_case(3, N, Q, momentum=momentum)
        case.query_labels[0] = case.key_labels[1] = label
        whole = F.sigmoid_distill_loss(*case.args, **case.momentum, temperature=0.5, bias=-1.0)
        case.args[0][0] = case.args[1][1] = math.nan
        query, keys = (x.clone().requires_grad_() for x in case.args[:2])
        loss = F.sigmoid_distill_loss(query, keys, *case.args[2:], **case.momentum, temperature=0.5, bias=-1.0)
        loss.backward()
        counts = momentum and label == -2
        assert loss.isnan() == query.grad.isnan().any() == keys.grad.isnan().any() == counts
        assert counts or loss == whole


def test_a_bias_in_a_tensor_is_looked_at_with_validate():
    rows, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"^bias: expected a finite number in \(-inf, inf\), got nan"):
        F.sigmoid_distill_loss(rows, rows, labels, labels, temperature=0.5, bias=torch.tensor(torch.nan), validate=True)
