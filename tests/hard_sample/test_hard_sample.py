"""HardSampleFusionLoss: Eq. 14 and 15 against the loop reference, and its edges."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import momentum_distill as md
import reference
from loss_cases import DTYPES, REDUCTIONS, assert_close, assert_gradient_close, bits, lists, numbers_alone
from momentum_distill import functional as F

pytestmark = numbers_alone

CLASS_WEIGHTS = ["distance", "error_rate", "per_sample"]
PARTS = {
    "scores": ("student_scores", "fused_scores", "targets"),
    "logits": ("student_logits", "fused_logits", "labels"),
}
FLOATS = ["student_scores", "fused_scores", "targets", "student_logits", "fused_logits"]
NAN, INF = math.nan, math.inf


def inputs(seed=0, n=8, classes=4, *, parts=("scores", "logits"), absent=0.0, unlabelled=0.0, masked=None):
    """Keyword arguments of the loss; labels are in for either part where some are absent."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(classes, (n,), generator=generator)
    fate = torch.rand(n, generator=generator)
    labels[fate < absent + unlabelled] = -2
    labels[fate < absent] = -1
    everything = {
        "student_scores": normal(n),
        "fused_scores": normal(n),
        "targets": normal(n),
        "student_logits": normal(n, classes),
        "fused_logits": normal(n, classes),
        "labels": labels,
    }
    kwargs = {name: everything[name] for part in parts for name in PARTS[part]}
    if masked is not None:
        kwargs["mask"] = torch.rand(n, generator=generator) >= masked
    return kwargs


def cast(kwargs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}


def expect(kwargs, **options):
    return reference.hard_sample_fusion(**{k: lists(v) for k, v in kwargs.items()}, **options)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 8),
    classes=st.integers(1, 5),
    parts=st.sampled_from([("scores",), ("logits",), ("scores", "logits")]),
    absent=st.sampled_from([0.0, 0.3]),
    unlabelled=st.sampled_from([0.0, 0.3, 1.0]),
    masked=st.sampled_from([None, 0.4, 1.0]),
    hard_attention=st.booleans(),
    class_weight=st.sampled_from(CLASS_WEIGHTS),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_loss_equals_the_loop_reference(seed, n, classes, parts, absent, unlabelled, masked, **options):
    kwargs = inputs(seed, n, classes, parts=parts, absent=absent, unlabelled=unlabelled, masked=masked)
    expected = expect(kwargs, **options)
    assert_close(F.hard_sample_fusion_loss(**kwargs, **options), expected)
    assert_close(md.HardSampleFusionLoss(**options)(**kwargs), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
def test_every_dtype_keeps_its_bar_in_value_and_gradient(class_weight, dtype):
    kwargs = cast(inputs(1, 32), dtype)
    wide = cast(kwargs, torch.float64)
    students = ("student_scores", "student_logits")
    for name in students:
        kwargs[name].requires_grad_()
        wide[name].requires_grad_()
    loss = F.hard_sample_fusion_loss(**kwargs, class_weight=class_weight)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, expect(kwargs, class_weight=class_weight), dtype)
    loss.backward()
    F.hard_sample_fusion_loss(**wide, class_weight=class_weight).backward()
    for name in students:
        assert kwargs[name].grad.dtype == dtype
        assert_gradient_close(kwargs[name].grad, wide[name].grad, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
@pytest.mark.parametrize("hard_attention", [True, False])
def test_gradcheck_in_the_students_predictions(hard_attention, class_weight, reduction):
    kwargs = inputs(2, absent=0.2, unlabelled=0.2, masked=0.2)
    options = {
        "hard_attention": hard_attention,
        "class_weight": class_weight,
        "reduction": reduction,
    }

    def f(scores, logits):
        new = kwargs | {"student_scores": scores, "student_logits": logits}
        return F.hard_sample_fusion_loss(**new, **options)

    students = (kwargs["student_scores"], kwargs["student_logits"])
    assert gradcheck(f, tuple(x.requires_grad_() for x in students), atol=1e-8)


def test_gradient_to_the_teacher_holds_the_weights_constant():
    kwargs = inputs(3, n := 8)
    kwargs["fused_scores"].requires_grad_()
    kwargs["fused_logits"].requires_grad_()
    F.hard_sample_fusion_loss(**kwargs, detach_teacher=False).backward()
    fixed = torch.tanh((kwargs["targets"] - kwargs["fused_scores"]).abs()).detach()
    side = torch.sign(kwargs["fused_scores"] - kwargs["student_scores"]).detach()
    assert_close(kwargs["fused_scores"].grad, lists(fixed * side / n))

    teacher = kwargs["fused_logits"].detach().clone().requires_grad_()

    def unweighted(logits):
        return F.hard_sample_fusion_loss(
            student_logits=kwargs["student_logits"],
            fused_logits=logits,
            hard_attention=False,
            detach_teacher=False,
        )

    assert gradcheck(unweighted, (teacher,), atol=1e-8)
    (plain,) = torch.autograd.grad(unweighted(teacher), teacher)
    weight = (kwargs["labels"] - teacher.argmax(1)).abs().double().mean()
    assert_close(kwargs["fused_logits"].grad, lists(weight * plain))


def test_neither_teacher_nor_weights_carry_gradient_by_default():
    kwargs = inputs(4)
    for name in FLOATS:
        kwargs[name].requires_grad_()
    md.HardSampleFusionLoss()(**kwargs).backward()
    assert kwargs["student_scores"].grad.any()
    assert kwargs["student_logits"].grad.any()
    assert all(kwargs[name].grad is None for name in ("fused_scores", "fused_logits", "targets"))


def test_without_attention_it_is_the_plain_distillation_and_needs_no_ground_truth():
    kwargs = inputs(5)
    bare = {k: v for k, v in kwargs.items() if k not in ("targets", "labels")}
    loss = md.HardSampleFusionLoss(hard_attention=False)(**bare)
    assert_close(loss, expect(bare, hard_attention=False))
    assert_close(md.HardSampleFusionLoss(hard_attention=False)(**kwargs), loss.item())


def test_mistakes_of_one_and_of_three_classes_weigh_differently_only_by_distance():
    logits = 9 * torch.eye(4, dtype=torch.float64)  # predicts 0, 1, 2, 3
    labels = torch.tensor([0, 2, 2, 0])  # off by 0, 1, 0, 3
    student = torch.zeros(4, 4, dtype=torch.float64)
    entropy = math.log(4)  # of a uniform student, whatever the teacher says
    args = {"student_logits": student, "fused_logits": logits, "labels": labels}
    for class_weight, weights in (
        ("distance", [1.0, 1.0, 1.0, 1.0]),
        ("error_rate", [0.5, 0.5, 0.5, 0.5]),
        ("per_sample", [0.0, 1.0, 0.0, 3.0]),
    ):
        loss = F.hard_sample_fusion_loss(**args, class_weight=class_weight, reduction="none")
        assert_close(loss, [w * entropy for w in weights])


def test_unlabelled_rows_take_the_mean_weight_of_the_others():
    logits = 9 * torch.eye(4, dtype=torch.float64)
    labels = torch.tensor([0, 3, -2, -1])  # off by 0 and 2, unlabelled, absent
    student = torch.zeros(4, 4, dtype=torch.float64)
    args = {"student_logits": student, "fused_logits": logits, "labels": labels}
    for class_weight, weights in (
        ("distance", [1.0, 1.0, 1.0, 0.0]),
        ("error_rate", [0.5, 0.5, 0.5, 0.0]),
        ("per_sample", [0.0, 2.0, 1.0, 0.0]),
    ):
        options = {"class_weight": class_weight}
        loss = F.hard_sample_fusion_loss(**args, **options, reduction="none")
        assert_close(loss, [w * math.log(4) for w in weights])
        mean = F.hard_sample_fusion_loss(**args, **options)
        assert_close(mean, sum(weights) * math.log(4) / 3)


def test_absent_labels_leave_rows_out_of_the_scores_alone():
    kwargs = inputs(7, parts=("scores",))
    labels = torch.tensor([0, -1, 1, -2, 0, -1, 2, 0])
    keep = labels != -1
    expected = F.hard_sample_fusion_loss(**{k: v[keep] for k, v in kwargs.items()})
    assert_close(F.hard_sample_fusion_loss(**kwargs, labels=labels), expected.item())


def test_label_of_ignore_index_is_free_to_choose():
    kwargs = inputs(18, absent=0.3)
    renamed = kwargs | {"labels": kwargs["labels"].masked_fill(kwargs["labels"] == -1, 9)}
    loss = F.hard_sample_fusion_loss(**renamed, ignore_index=9)
    assert_close(loss, F.hard_sample_fusion_loss(**kwargs).item())
    assert bits(md.HardSampleFusionLoss(ignore_index=9)(**renamed)) == bits(loss)


def test_mask_and_absent_label_are_the_same_as_leaving_the_rows_out():
    kwargs = inputs(8, absent=0.3, masked=0.3)
    keep = kwargs.pop("mask") & (kwargs["labels"] != -1)
    assert 0 < keep.sum() < 8
    expected = F.hard_sample_fusion_loss(**{k: v[keep] for k, v in kwargs.items()})
    labels = kwargs["labels"].masked_fill(~keep, -1)
    assert_close(F.hard_sample_fusion_loss(**kwargs | {"labels": labels}), expected.item())
    assert_close(F.hard_sample_fusion_loss(**kwargs, mask=keep), expected.item())


@pytest.mark.parametrize("by", ["mask", "label"])
@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
def test_what_a_left_out_row_holds_changes_no_bit(garbage, class_weight, by):
    out = torch.tensor([False, True, False, False, True, False, False, False])

    def run(dirt):
        kwargs = inputs(9)
        if by == "mask":
            kwargs["mask"] = ~out
            kwargs["labels"][out] = 0 if dirt is None else 3
        else:
            kwargs["labels"][out] = -1
        if dirt is not None:
            for x in kwargs.values():
                if x.is_floating_point():
                    x[out] = dirt
        students = kwargs["student_scores"], kwargs["student_logits"]
        for x in students:
            x.requires_grad_()
        loss = F.hard_sample_fusion_loss(**kwargs, class_weight=class_weight)
        loss.backward()
        assert not any(x.grad[out].any() for x in students)
        return [bits(loss), *(bits(x.grad) for x in students)]

    assert run(garbage) == run(None)


@pytest.mark.parametrize("name", FLOATS)
def test_nan_in_a_row_that_is_kept_gives_nan(name):
    kwargs = inputs(10)
    kwargs[name][3] = NAN
    assert F.hard_sample_fusion_loss(**kwargs).isnan()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("n", [0, 5])
def test_no_row_kept_is_zero_and_connected(n, part):
    kwargs = inputs(11, n, parts=(part,))
    student = kwargs[PARTS[part][0]].requires_grad_()
    loss = F.hard_sample_fusion_loss(**kwargs, mask=torch.zeros(n, dtype=torch.bool))
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad.shape == student.shape
    assert not student.grad.any()


def test_no_weight_at_all_still_gives_a_zero_gradient():
    # The fused predictions are all right: nothing is hard, but DDP must see every parameter.
    kwargs = inputs(12, parts=("logits",))
    kwargs["labels"] = kwargs["fused_logits"].argmax(1)
    kwargs["student_logits"].requires_grad_()
    loss = F.hard_sample_fusion_loss(**kwargs)
    loss.backward()
    assert loss.item() == 0.0
    assert not kwargs["student_logits"].grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("class_weight", CLASS_WEIGHTS)
def test_extreme_predictions_give_finite_loss_and_gradient(class_weight, autocast, dtype):
    scores = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    fused = torch.tensor([[-INF, 0.0, -INF], [1e4, -1e4, -INF], [0.0, 1.0, 2.0]], dtype=dtype)
    for teacher in (fused, logits.flip(1)):
        students = scores.clone().requires_grad_(), logits.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=bool(autocast)):
            loss = F.hard_sample_fusion_loss(
                student_scores=students[0],
                fused_scores=-scores,
                targets=scores,
                student_logits=students[1],
                fused_logits=teacher,
                labels=torch.tensor([0, 1, -2]),
                class_weight=class_weight,
            )
        loss.backward()
        assert loss.isfinite()
        assert all(x.grad.isfinite().all() for x in students)


def test_strided_inputs_give_the_same_loss():
    kwargs = inputs(14)
    strided = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in kwargs.items()}
    expected = F.hard_sample_fusion_loss(**kwargs)
    assert_close(F.hard_sample_fusion_loss(**strided), expected.item())


def test_copies_and_pickles_give_the_same_loss():
    kwargs = inputs(15)
    loss_fn = md.HardSampleFusionLoss(class_weight="per_sample", reduction="sum")
    expected = bits(loss_fn(**kwargs))
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert bits(other(**kwargs)) == expected
        assert repr(other) == repr(loss_fn)
    assert not list(loss_fn.parameters())


def test_validation_passes_left_out_garbage_and_certain_teachers_and_changes_no_bit():
    kwargs = inputs(19, unlabelled=0.3)
    kwargs["labels"][0], kwargs["labels"][2] = kwargs["student_logits"].shape[1] - 1, -1  # the top class is legal
    kwargs["fused_logits"][0, 1] = -INF
    for name in FLOATS:
        kwargs[name][2] = NAN
    expected = F.hard_sample_fusion_loss(**kwargs)
    assert expected.isfinite()
    assert bits(F.hard_sample_fusion_loss(**kwargs, validate=True)) == bits(expected)


@pytest.mark.parametrize("name", FLOATS)
def test_one_float64_input_is_enough_for_a_loss_in_float64(name):
    scores, logits = torch.linspace(0, 1, 12).view(3, 4), torch.linspace(-1, 2, 24).view(2, 4, 3)
    tensors = {
        "student_scores": scores[0],
        "fused_scores": scores[1],
        "targets": scores[2],
        "student_logits": logits[0],
        "fused_logits": logits[1].flip(1),
    }
    loss_fn, labels = md.HardSampleFusionLoss(), torch.tensor([0, 1, 2, -2])
    loss = loss_fn(**tensors | {name: tensors[name].double()}, labels=labels)
    assert loss.dtype == torch.float64
    expected = loss_fn(**{key: x.double() for key, x in tensors.items()}, labels=labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)


def test_logits_without_attention_are_validated_without_labels():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    loss_fn = md.HardSampleFusionLoss(hard_attention=False, validate=True)
    loss = loss_fn(student_logits=logits, fused_logits=logits.flip(1))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, logits.flip(1).softmax(dim=1)))
