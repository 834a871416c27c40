"""Every block on anything legal: finite, and as accurate as its dtype allows, in value and gradients."""

import functools
import math
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import momentum_distill as md
import reference
from loss_cases import DTYPES, REDUCTIONS, lists, numbers_alone
from momentum_distill import functional as F
from property_cases import (
    LAYOUTS,
    PROPERTY,
    WAYS,
    assert_accurate,
    contrast_scales,
    contrast_terms,
    contrasts,
    hard_sample_loss,
    no_direction,
    outcome,
    outputs,
    plain_contrasts,
    plain_outputs,
    response_loss,
    teacher_lengths,
    unit,
    way,
    wide,
)

pytestmark = [
    pytest.mark.repeated,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),  # of the compiler's own making
    numbers_alone,
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)

THREE_FLAGS = st.tuples(st.booleans(), st.booleans(), st.booleans())


def summed_in(*tensors):
    """What the contract promises to sum in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def cast_to_16_bits(enabled):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


# --- the contrastive loss ---------------------------------------------------------------------------------------------

CALLS = st.fixed_dictionaries(
    {
        "way": st.sampled_from(WAYS),
        "ratio": st.sampled_from([None, 0.0, 0.3, -0.3]),  # log of the learned temperature over that at the start
        "alpha": st.sampled_from([None, None, *(torch.tensor(0.4, dtype=dtype) for dtype in DTYPES)]),
        "wanted": st.sampled_from([(), ("query",), ("keys",), ("query", "keys")]),
        "live": st.tuples(st.booleans(), st.booleans(), st.booleans()),  # parts of the keys with a gradient
        "by_term": st.booleans(),
        "autocast": st.booleans(),
        "validate": st.booleans(),
    }
)


@dtypes
@layouts
@given(data=st.data())
@PROPERTY
def test_contrastive_loss(dtype, layout, data):
    case, call = data.draw(contrasts(dtype, layout)), data.draw(CALLS)
    loss_fn = md.SupConDistillLoss(
        **case.options,
        learnable_temperature=call["ratio"] is not None,
        temperature_range=(0.001, 100.0),
        validate=call["validate"],
    )
    own = {}
    if call["ratio"] is not None:
        own["ratio"] = torch.nn.init.constant_(loss_fn.log_temperature_ratio, call["ratio"])
    if call["alpha"] is not None:
        own["alpha"] = call["alpha"].clone().requires_grad_()

    def taken(terms):
        return dict(zip(["total", "supervised", "distill"], terms[: 3 if call["by_term"] else 1], strict=False))

    def ours(x):
        with cast_to_16_bits(call["autocast"]):
            return taken(case.call(loss_fn, x, case.cuts, call["live"], own.get("alpha")))

    twins = {name: x.detach().double().requires_grad_() for name, x in own.items()}
    live = torch.tensor(call["live"][: len(case.cuts)]).repeat_interleave(torch.tensor(case.cuts))

    def theirs(x):
        x["keys"] = torch.where(live[:, None], x["keys"], x["keys"].detach())
        temperature = torch.tensor(case.options["temperature"], dtype=torch.float64)
        if "ratio" in twins:
            temperature = temperature * twins["ratio"].exp()
        return taken(contrast_terms(case, x, temperature, twins.get("alpha")))

    with way(call["way"]):
        actual = outcome(ours, case.features, call["wanted"], own)
    expected = outcome(theirs, wide(case.features), call["wanted"], twins)
    sums = summed_in(*case.features.values())
    floors, lengths = contrast_scales(case, call["ratio"] or 0.0)
    assert_accurate(actual, expected, sums=sums, floors=floors, lengths=lengths)
    assert {x.dtype for x in actual[0].values()} == {sums}


# --- the other losses -------------------------------------------------------------------------------------------------

RESPONSES = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.0, 0.4, 1.0]),
        "temperature": st.sampled_from([0.5, 1.0, 3.0]),
        "reduction": st.sampled_from(REDUCTIONS),
    }
)


@dtypes
@pytest.mark.parametrize("task", ["regression", "classification"])
@given(data=st.data())
@PROPERTY
def test_response_loss(dtype, task, data):
    names = ("student", "teacher", "momentum")[: data.draw(st.sampled_from([2, 3]))]
    x = data.draw(outputs(dtype, names, classes=task == "classification"))
    options, (masked, cast, detached) = {"task": task, **data.draw(RESPONSES)}, data.draw(THREE_FLAGS)
    keep = x.pop("mask") if masked else None
    x = {name: x[name] for name in names}
    loss_fn = md.ResponseDistillLoss(**options, detach_teacher=detached)

    def ours(x):
        with cast_to_16_bits(cast):
            return {"loss": loss_fn(*x.values(), mask=keep)}

    def theirs(x):
        x["teacher"] = x["teacher"].detach() if detached else x["teacher"]
        everyone = torch.ones(len(x["student"]), dtype=torch.bool)
        return {"loss": response_loss(x, everyone if keep is None else keep, **options)}

    actual, expected = (outcome(f, y, ["student", "teacher"]) for f, y in ((ours, x), (theirs, wide(x))))
    lengths = {"teacher": teacher_lengths(expected[1]["teacher"])} if task == "classification" else None
    assert_accurate(actual, expected, sums=summed_in(*x.values()), lengths=lengths)
    assert actual[0]["loss"].dtype == summed_in(*x.values())


FUSIONS = st.fixed_dictionaries(
    {
        "hard_attention": st.booleans(),
        "class_weight": st.sampled_from(["distance", "error_rate", "per_sample"]),
        "reduction": st.sampled_from(REDUCTIONS),
    }
)
PARTS = st.sampled_from([("scores",), ("logits",), ("scores", "logits")])


@dtypes
@given(data=st.data())
@PROPERTY
def test_hard_sample_loss(dtype, data):
    logits = data.draw(outputs(dtype, ("student_logits", "fused_logits"), classes=True))
    n, classes = logits["student_logits"].shape
    scores = data.draw(outputs(dtype, ("student_scores", "fused_scores", "targets"), classes=False, rows=n))
    options, (masked, cast, detached) = data.draw(FUSIONS), data.draw(THREE_FLAGS)
    ignore_index, parts = data.draw(st.sampled_from([-1, 0])), data.draw(PARTS)
    x = {name: t for name, t in (logits | scores).items() if name.endswith((*parts, "targets"))}
    keep, labels = logits["mask"] if masked else None, logits["labels"].clamp(max=classes - 1)
    labels = torch.where(labels == -1, ignore_index, labels)
    loss_fn = md.HardSampleFusionLoss(**options, detach_teacher=detached, ignore_index=ignore_index)

    def ours(x):
        with cast_to_16_bits(cast):
            return {"loss": loss_fn(**x, labels=labels, mask=keep)}

    def theirs(x):
        kept = (labels != ignore_index) & (True if keep is None else keep)
        x = {name: t.detach() if detached and "fused" in name else t for name, t in x.items()}
        return {"loss": hard_sample_loss(x, kept, labels, **options)}

    actual, expected = outcome(ours, x, x), outcome(theirs, wide(x), x)
    lengths = {name: teacher_lengths(g) for name, g in expected[1].items() if name == "fused_logits"}
    assert_accurate(actual, expected, sums=summed_in(*x.values()), lengths=lengths)
    assert not actual[1]["targets"].any()


# --- pieces -----------------------------------------------------------------------------------------------------------


@dtypes
@given(data=st.data())
@PROPERTY
def test_similarities(dtype, data):
    case = data.draw(contrasts(dtype))
    x = {name: case.features[name] for name in ("query", "keys")}
    normalize = case.options["normalize"]
    temperature = torch.tensor(case.options["temperature"], dtype=summed_in(*x.values()), requires_grad=True)
    twin = temperature.detach().double().requires_grad_()
    cast = data.draw(st.booleans())

    def ours(x):
        with cast_to_16_bits(cast):
            return {"logits": F.contrast_logits(**x, temperature=temperature, normalize=normalize)}

    def theirs(y):
        query = unit(y["query"], no_direction(x["query"])) if normalize else y["query"]
        keys = unit(y["keys"], no_direction(x["keys"])) if normalize is True else y["keys"]
        return {"logits": query @ keys.T / twin}

    actual = outcome(ours, x, x, {"temperature": temperature})
    expected = outcome(theirs, wide(x), x, {"temperature": twin})
    floors, lengths = contrast_scales(case)
    assert_accurate(actual, expected, sums=summed_in(*x.values()), floors=floors, lengths=lengths)


@dtypes
@given(data=st.data())
@PROPERTY
def test_unit_rows(dtype, data):
    x, cast = {"x": data.draw(contrasts(dtype)).features["query"]}, data.draw(st.booleans())

    def ours(x):
        with cast_to_16_bits(cast):
            return {"unit": F.l2_normalize(x["x"])}

    def theirs(y):
        return {"unit": unit(y["x"], no_direction(x["x"]))}

    actual, expected = outcome(ours, x, x), outcome(theirs, wide(x), x)
    lengths = {"x": x["x"].double().norm(dim=1, keepdim=True).clamp_min(no_direction(x["x"]))}
    assert_accurate(actual, expected, sums=summed_in(*x.values()), lengths=lengths)


@dtypes
@given(data=st.data())
@PROPERTY
def test_fusion_factors(dtype, data):
    x = data.draw(outputs(dtype, ("t", "a"), classes=True))
    x = {name: x[name] for name in "ta"}
    averages = torch.tensor(data.draw(st.tuples(*[st.floats(-2, 2, width=32)] * 2)))
    fuse = md.MomentumFusionFactors(["t", "a"])
    fuse.average.copy_(averages)  # the parameter stays where it was: the values are the averages'
    twin = averages.double().requires_grad_()

    cast = data.draw(st.booleans())

    def ours(x):
        with cast_to_16_bits(cast):
            return fuse(x)

    def theirs(x):
        return {name: factor * x[name] for name, factor in zip("ta", twin, strict=True)}

    actual, expected = outcome(ours, x, x, {"factors": fuse.weight}), outcome(theirs, wide(x), x, {"factors": twin})
    # The sum for a factor may cancel: it is held to the size of its terms.
    largest = max([1.0, *(float(t.abs().max()) for t in wide(x).values() if t.numel())])
    assert_accurate(actual, expected, sums=torch.float64, floors=(1.0, largest))
    assert {name: t.dtype for name, t in actual[0].items()} == {name: t.dtype for name, t in x.items()}


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@PROPERTY
def test_straight_through_passes_both_ways_unchanged(dtype, data):
    x = data.draw(outputs(dtype, ("average", "online"), classes=True))
    average, online = x["average"], x["online"].to(x["average"].dtype).requires_grad_()
    out = F.straight_through(average, online)
    assert torch.equal(out, average)
    (gradient,) = torch.autograd.grad(out, online, average)
    assert torch.equal(gradient, average)


@dtypes
@given(data=st.data())
@PROPERTY
def test_diagnostics(dtype, data):
    case = data.draw(contrasts(dtype))
    x = {name: case.features[name] for name in ("query", "keys")}
    both = min(map(len, x.values()))
    units = {name: unit(t, no_direction(x[name])) for name, t in wide(x).items()}
    exponent, scale = data.draw(st.sampled_from([1.0, 2.0, 3.0])), data.draw(st.sampled_from([0.5, 2.0]))
    actual, expected = {}, {}
    if both >= 1:
        actual["gap"] = md.diagnostics.modality_gap(**dict(zip("xy", x.values(), strict=True)))
        expected["gap"] = torch.dist(*(t.mean(dim=0) for t in units.values()))
        actual["alignment"] = md.diagnostics.alignment(*(t[:both] for t in x.values()), exponent=exponent)
        distances = (units["query"][:both] - units["keys"][:both]).norm(dim=1)
        expected["alignment"] = distances.pow(exponent).mean()
    if len(x["keys"]) >= 2:
        actual["uniformity"] = md.diagnostics.uniformity(x["keys"], scale=scale)
        pairs = torch.triu_indices(len(x["keys"]), len(x["keys"]), offset=1)
        squares = (units["keys"][pairs[0]] - units["keys"][pairs[1]]).square().sum(dim=1)
        expected["uniformity"] = torch.log((-scale * squares).exp().mean())
    loss = x["query"].abs().amax() if x["query"].numel() else torch.zeros(())
    actual["bound"] = md.diagnostics.mutual_information_bound(loss, num_keys=7)
    expected["bound"] = math.log(7) - loss.double()
    every = {t.dtype for t in x.values()}
    assert_accurate((actual, {}), (expected, {}), sums=torch.float64 if every == {torch.float64} else torch.float32)


# --- compiled ---------------------------------------------------------------------------------------------------------

SHAPES = [(5, 8, 3), (6, 4, 2)]  # compiled once, with sizes that may vary
CONTRASTS = {
    torch.float32: {"positives": "outside", "reduction": "mean", "normalize": True},
    torch.bfloat16: {"positives": "inside", "reduction": "none", "normalize": "query"},
}


@functools.cache
def compiled(loss_fn_class, **options):
    loss_fn = loss_fn_class(**options)
    return torch.compile(lambda *args, **kwargs: loss_fn(*args, **kwargs), fullgraph=True, dynamic=True)


needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler: inductor needs one"
)


@pytest.mark.long
@needs_a_compiler
@pytest.mark.parametrize("dtype", CONTRASTS, ids=str)
@given(data=st.data())
@PROPERTY
def test_compiled_contrastive_loss(dtype, data):
    options = {"temperature": 0.1, "alpha": 0.4, "ignore_index": -1, "exclude_self": False, **CONTRASTS[dtype]}
    case = data.draw(plain_contrasts(dtype, SHAPES, options))
    loss_fn = compiled(md.SupConDistillLoss, **options, learnable_temperature=False)

    def ours(x):
        momentum = {name: t for name, t in x.items() if "momentum" in name}
        return {"loss": loss_fn(x["query"], x["keys"], case.query_labels, case.key_labels, **momentum)}

    def theirs(x):
        return {"loss": contrast_terms(case, x, torch.tensor(options["temperature"], dtype=torch.float64))[0]}

    actual, expected = (
        outcome(f, x, ["query", "keys"]) for f, x in ((ours, case.features), (theirs, wide(case.features)))
    )
    floors, lengths = contrast_scales(case)
    assert_accurate(actual, expected, sums=torch.float32, floors=floors, lengths=lengths)


@pytest.mark.long
@needs_a_compiler
@given(data=st.data())
@PROPERTY
def test_compiled_response_loss(data):
    x = data.draw(plain_outputs(torch.float16, ("student", "teacher", "momentum"), SHAPES))
    keep = x.pop("mask")
    options = {"task": "classification", "alpha": 0.4, "temperature": 2.0, "reduction": "mean"}
    loss_fn = compiled(md.ResponseDistillLoss, **options, detach_teacher=False)

    def ours(x):
        return {"loss": loss_fn(*x.values(), mask=keep)}

    def theirs(x):
        return {"loss": response_loss(x, keep, **options)}

    actual, expected = (outcome(f, y, ["student", "teacher"]) for f, y in ((ours, x), (theirs, wide(x))))
    lengths = {"teacher": teacher_lengths(expected[1]["teacher"])}
    assert_accurate(actual, expected, sums=torch.float32, lengths=lengths)


# --- the formulas that all this is measured by ------------------------------------------------------------------------


def loops(value):
    """What a loop reference returns, as :func:`outcome` returns it."""
    return {"loss": torch.tensor(value, dtype=torch.float64)}, {}


@given(case=contrasts())
@PROPERTY
def test_the_contrastive_formula_equals_the_loops(case):
    case = case._replace(features=wide(case.features))
    x = {name: lists(t) for name, t in case.features.items()}
    momentum = {name: t for name, t in x.items() if "momentum" in name}
    arguments = x["query"], x["keys"], lists(case.query_labels), lists(case.key_labels)
    expected = reference.supcon(*arguments, **momentum, **case.options)
    total = contrast_terms(case, case.features, torch.tensor(case.options["temperature"], dtype=torch.float64))[0]
    floors, _ = contrast_scales(case)
    assert_accurate(({"loss": total}, {}), loops(expected), sums=torch.float64, floors=floors)


@pytest.mark.parametrize("task", ["regression", "classification"])
@given(data=st.data())
@PROPERTY
def test_the_response_formula_equals_the_loops(task, data):
    x = data.draw(outputs(torch.float64, ("student", "teacher", "momentum"), classes=task == "classification"))
    options, keep, _ = {"task": task, **data.draw(RESPONSES)}, x.pop("mask"), x.pop("labels")
    expected = reference.response(*map(lists, x.values()), mask=keep.tolist(), **options)
    actual = response_loss(wide(x), keep, **options)
    assert_accurate(({"loss": actual}, {}), loops(expected), sums=torch.float64)


@given(data=st.data())
@PROPERTY
def test_the_hard_sample_formula_equals_the_loops(data):
    x = data.draw(outputs(torch.float64, ("student_logits", "fused_logits"), classes=True))
    n, classes = x["student_logits"].shape
    keep, labels = x.pop("mask"), x.pop("labels").clamp(max=classes - 1)
    scores = data.draw(outputs(torch.float64, ("student_scores", "fused_scores", "targets"), classes=False, rows=n))
    x |= {name: scores[name] for name in ("student_scores", "fused_scores", "targets")}
    options = data.draw(FUSIONS)
    named = {name: lists(t) for name, t in x.items()}
    expected = reference.hard_sample_fusion(**named, labels=lists(labels), mask=keep.tolist(), **options)
    actual = hard_sample_loss(wide(x), keep & (labels != -1), labels, **options)
    assert_accurate(({"loss": actual}, {}), loops(expected), sums=torch.float64)
