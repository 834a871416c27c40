"""What must not matter does not: order, scale, absent rows, parts of the keys, and the way the loss is computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import momentum_distill as md
from property_cases import (
    PROPERTY,
    WAYS,
    assert_accurate,
    contrast_scales,
    contrasts,
    numbers,
    outputs,
    unit,
    way,
    wide,
)

pytestmark = pytest.mark.repeated

GARBAGE = st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e300, 0.0])
CASES = contrasts().map(lambda case: case._replace(features=wide(case.features)))


def order(draw, count):
    """A permutation, which Hypothesis shrinks to none."""
    return numbers(draw, count).argsort(stable=True)


# --- the contrastive loss ---------------------------------------------------------------------------------------------


def contrast(case, *, named="matrices", cuts=None):
    """Terms, and the gradients of the total; by default through the matrices, the keys in as few parts as can be."""
    x = {name: t.detach().requires_grad_("momentum" not in name) for name, t in case.features.items()}
    loss_fn = md.SupConDistillLoss(**case.options)
    with way(named):
        terms = case.call(loss_fn, x, case.fewest_cuts if cuts is None else cuts)._asdict()
        leaves = {"query": x["query"], "keys": x["keys"], "ratio": loss_fn.log_temperature_ratio}
        gradients = torch.autograd.grad(terms["total"].sum(), [*leaves.values()])
    values = {name: t.detach().double() for name, t in terms.items()}
    return values, dict(zip(leaves, gradients, strict=True))


def mapped(case, *, rows=lambda x: x, keys=lambda x: x):
    """The case with functions applied to what there is by row, and by key."""
    return case._replace(
        features={name: (keys if "keys" in name else rows)(x) for name, x in case.features.items()},
        query_labels=rows(case.query_labels),
        key_labels=keys(case.key_labels),
    )


def assert_same(case, actual, expected):
    """Within 1e-12 of one another, in the measure of :func:`assert_accurate`; `case` belongs to `expected`."""
    floors, lengths = contrast_scales(case)
    assert_accurate(actual, expected, sums=torch.float64, floors=floors, lengths=lengths)


@given(case=CASES, data=st.data(), name=st.sampled_from(WAYS))
@PROPERTY
def test_the_order_of_rows_and_of_keys_does_not_matter(case, data, name):
    n, q = len(case.query_labels), len(case.key_labels)
    rows = order(data.draw, n)
    keys = torch.cat([rows, n + order(data.draw, q - n)]) if case.options["exclude_self"] else order(data.draw, q)
    shuffled = mapped(case, rows=lambda x: x[rows], keys=lambda x: x[keys])
    values, gradients = contrast(case, named=name)
    values = {key: x[rows] if x.ndim else x for key, x in values.items()}
    gradients = {**gradients, "query": gradients["query"][rows], "keys": gradients["keys"][keys]}
    assert_same(shuffled, contrast(shuffled, named=name), (values, gradients))


@given(case=CASES, data=st.data(), name=st.sampled_from(WAYS))
@PROPERTY
def test_the_length_of_what_is_normalised_does_not_matter(case, data, name):
    case.options["normalize"] = normalize = case.options["normalize"] or True  # "query" has unit keys
    factors, long = {}, {}  # by identity: the momentum keys may be the keys themselves

    def stretched(x):  # up to a hundred times, if it has a direction; down, or if not, it might lose or gain one
        if id(x) not in long:
            factors[id(x)] = 1 + 99 * numbers(data.draw, len(x))[:, None] / 255 * unit(x, 1e-6).any(dim=1, keepdim=True)
            long[id(x)] = x * factors[id(x)]
        return long[id(x)]

    features = {key: x if "keys" in key and normalize == "query" else stretched(x) for key, x in case.features.items()}
    values, gradients = contrast(case, named=name)
    for side in ("query", "keys"):
        gradients[side] = gradients[side] / factors.get(id(case.features[side]), 1.0)
    long_case = case._replace(features=features)
    assert_same(long_case, contrast(long_case, named=name), (values, gradients))


@given(case=CASES, data=st.data(), name=st.sampled_from(WAYS), garbage=GARBAGE)
@PROPERTY
def test_absent_rows_and_keys_do_not_matter_whatever_they_hold(case, data, name, garbage):
    absent, n, q = case.options["ignore_index"], len(case.query_labels), len(case.key_labels)
    rows = order(data.draw, n + data.draw(st.integers(0, 2)))  # the last ones are absent, and go anywhere
    if case.options["exclude_self"]:  # an absent row has an absent key
        keys = torch.cat([torch.where(rows < n, rows, rows - n + q), n + order(data.draw, q - n)])
    else:
        keys = order(data.draw, q + data.draw(st.integers(0, 2)))

    def more(count, places, fill):
        def extended(x):
            extra = x.new_full((len(places) - count, *x.shape[1:]), fill if x.is_floating_point() else absent)
            return torch.cat([x, extra])[places]

        return extended

    def extended(fill):
        return contrast(mapped(case, rows=more(n, rows, fill), keys=more(q, keys, fill)), named=name)

    (values, gradients), (clean_values, clean_gradients) = extended(garbage), extended(0.0)
    for actual, clean in ((values, clean_values), (gradients, clean_gradients)):
        assert all(torch.equal(actual[key], x) for key, x in clean.items())
    assert not gradients["query"][rows >= n].any()
    assert not gradients["keys"][keys >= q].any()
    values = {key: x[rows.argsort()[:n]] if x.ndim else x for key, x in values.items()}
    gradients["query"] = gradients["query"][rows.argsort()[:n]]
    gradients["keys"] = gradients["keys"][keys.argsort()[:q]]
    assert_same(case, (values, gradients), contrast(case, named=name))


@pytest.mark.parametrize("name", WAYS)
@given(case=CASES)
@PROPERTY
def test_every_way_and_any_parts_of_the_keys_give_the_same(name, case):
    assert_same(case, contrast(case, named=name, cuts=case.cuts), contrast(case))


# --- the other losses -------------------------------------------------------------------------------------------------

SCORES = ("student_scores", "fused_scores", "targets")
LOGITS = ("student_logits", "fused_logits")
LOSSES = {
    "regression": (SCORES, False, md.ResponseDistillLoss(task="regression")),
    "classification": (
        ("student_logits", "fused_logits", "momentum_logits"),
        True,
        md.ResponseDistillLoss(task="classification"),
    ),
    "hard scores": (SCORES, False, md.HardSampleFusionLoss()),
    "hard logits": (LOGITS, True, md.HardSampleFusionLoss()),
    "hard logits by sample": (LOGITS, True, md.HardSampleFusionLoss(class_weight="per_sample")),
}


def other_loss(loss_fn, x, labels, keep):
    """The loss of outputs by name, and their gradients."""
    x = {name: t.detach().requires_grad_() for name, t in x.items()}
    if isinstance(loss_fn, md.ResponseDistillLoss):
        loss = loss_fn(*x.values(), mask=keep)
    else:
        loss = loss_fn(**x, labels=labels, mask=keep)
    gradients = torch.autograd.grad(loss, [*x.values()], allow_unused=True)
    gradients = {
        name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(x.items(), gradients, strict=True)
    }
    return {"loss": loss.detach()}, gradients


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), garbage=GARBAGE)
@PROPERTY
def test_order_and_masked_rows_do_not_matter_to_the_other_losses(name, data, garbage):
    names, classes, loss_fn = LOSSES[name]
    x = wide(data.draw(outputs(torch.float64, names, classes=classes)))
    keep, labels = x.pop("mask").bool(), x.pop("labels").long().clamp(max=0)
    values, gradients = other_loss(loss_fn, x, labels, keep)

    dirty = {name: torch.where(keep if t.ndim == 1 else keep[:, None], t, garbage) for name, t in x.items()}
    dirty_labels = torch.where(keep, labels, 2**40)
    for actual, clean in zip(other_loss(loss_fn, dirty, dirty_labels, keep), (values, gradients), strict=True):
        assert all(torch.equal(actual[key], t) for key, t in clean.items())

    rows = order(data.draw, len(keep))
    rows = rows[keep[rows]]  # in another order, and only those that are kept
    cut = other_loss(loss_fn, {name: t[rows] for name, t in x.items()}, labels[rows], None)
    assert not any(g[~keep].any() for g in gradients.values())
    assert_accurate(cut, (values, {name: g[rows] for name, g in gradients.items()}), sums=torch.float64)
