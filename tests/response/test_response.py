"""ResponseDistillLoss: Eq. 7 and 10 against the loop reference, and its edges."""

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
from loss_cases import (
    DTYPES,
    REDUCTIONS,
    assert_close,
    assert_gradient_close,
    bits,
    lists,
    logits_case,
    numbers_alone,
)
from momentum_distill import functional as F

pytestmark = numbers_alone

TASKS = {"regression": 0, "classification": 3}  # task -> width of the logits, 0 for scores
NAN, INF = math.nan, math.inf


def inputs(task, seed=0, n=6, dtype=torch.float64):
    """Student, teacher and momentum predictions."""
    return tuple(logits_case(seed, n, TASKS[task], dtype))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 7),
    classes=st.integers(0, 5),
    momentum=st.booleans(),
    masked=st.sampled_from([None, 0.0, 0.5, 1.0]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_loss_equals_the_loop_reference(seed, n, classes, momentum, masked, temperature, **options):
    student, teacher, target = logits_case(seed, n, classes)
    target = target if momentum else None
    mask = None
    if masked is not None:
        mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) >= masked
    options["task"] = "classification" if classes else "regression"
    if classes:
        options["temperature"] = temperature
    expected = reference.response(lists(student), lists(teacher), lists(target), mask=lists(mask), **options)
    assert_close(F.response_distill_loss(student, teacher, target, mask=mask, **options), expected)
    alpha = options.pop("alpha")
    loss_fn = md.ResponseDistillLoss(**options, alpha=0.9)
    assert_close(loss_fn(student, teacher, target, mask=mask, alpha=alpha), expected)
    loss_fn = md.ResponseDistillLoss(**options, alpha=alpha)
    assert_close(loss_fn(student, teacher, target, mask=mask), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_every_dtype_keeps_its_bar_in_value_and_gradient(task, dtype):
    student, teacher, momentum = inputs(task, 1, 32, dtype)
    args = [lists(x) for x in (student, teacher, momentum)]
    student.requires_grad_()
    loss = F.response_distill_loss(student, teacher, momentum, task=task)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, reference.response(*args, task=task), dtype)
    loss.backward()
    wide = torch.tensor(args[0], dtype=torch.float64, requires_grad=True)
    F.response_distill_loss(wide, teacher.double(), momentum.double(), task=task).backward()
    assert student.grad.dtype == dtype
    assert_gradient_close(student.grad, wide.grad, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_gradcheck(task, detach_teacher, momentum, reduction):
    student, teacher, target = (x.requires_grad_() for x in inputs(task, 2))
    mask = torch.tensor([True, True, False, True, True, False])
    options = {"task": task, "reduction": reduction, "mask": mask}
    if task == "classification":
        options["temperature"] = 2.0
    target = target.detach() if momentum else None

    def f(student, teacher):
        return F.response_distill_loss(student, teacher, target, **options, detach_teacher=detach_teacher)

    if detach_teacher:
        assert gradcheck(lambda s: f(s, teacher), (student,), atol=1e-8)
    else:
        assert gradcheck(f, (student, teacher), atol=1e-8)


@pytest.mark.parametrize("task", TASKS)
def test_teacher_gets_a_gradient_only_when_asked_and_momentum_never(task):
    for detach_teacher in (True, False):
        student, teacher, momentum = (x.requires_grad_() for x in inputs(task, 3))
        loss_fn = md.ResponseDistillLoss(task=task, detach_teacher=detach_teacher)
        loss_fn(student, teacher, momentum).backward()
        assert student.grad.any()
        assert momentum.grad is None
        if detach_teacher:
            assert teacher.grad is None
        else:
            assert teacher.grad.any()


def test_temperature_squared_applies_to_both_terms():
    student, teacher, momentum = inputs("classification", 5)
    options = {"task": "classification", "temperature": 3.0}
    for alpha, target in ((0.0, teacher), (1.0, momentum)):
        loss = F.response_distill_loss(student, teacher, momentum, **options, alpha=alpha)
        rows = zip(lists(target), lists(student), strict=True)
        entropies = [reference.cross_entropy(t, s, 3.0) for t, s in rows]
        assert_close(loss, 9.0 * sum(entropies) / 6)


@pytest.mark.parametrize("task", TASKS)
def test_mask_is_the_same_as_leaving_the_rows_out(task):
    student, teacher, momentum = inputs(task, 6)
    mask = torch.tensor([True, False, True, True, False, True])
    expected = F.response_distill_loss(student[mask], teacher[mask], momentum[mask], task=task)
    assert_close(F.response_distill_loss(student, teacher, momentum, mask=mask, task=task), expected.item())


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 0.0])
@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_what_a_masked_row_holds_changes_no_bit(task, detach_teacher, garbage):
    mask = torch.tensor([True, False, True, True, False, True])

    def run(dirt):
        tensors = [x.clone() for x in inputs(task, 7)]
        if dirt is not None:
            for x in tensors:
                x[~mask] = dirt
        student, teacher, momentum = tensors
        student.requires_grad_()
        teacher.requires_grad_(not detach_teacher)
        options = {"task": task, "mask": mask, "detach_teacher": detach_teacher}
        loss = F.response_distill_loss(student, teacher, momentum, **options)
        loss.backward()
        grads = [x.grad for x in (student, teacher) if x.requires_grad]
        assert not any(grad[~mask].any() for grad in grads)
        return [bits(x) for x in (loss, *grads)]

    assert run(garbage) == run(None)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["student", "teacher", "momentum"])
@pytest.mark.parametrize("task", TASKS)
def test_nan_in_a_row_that_is_kept_gives_nan(task, which):
    tensors = inputs(task, 8)
    tensors[which][2] = NAN
    mask = torch.tensor([True] * 5 + [False])
    assert F.response_distill_loss(*tensors, task=task).isnan()
    assert F.response_distill_loss(*tensors, task=task, mask=mask).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("task", TASKS)
def test_no_row_kept_is_zero_and_connected(task, n, reduction):
    student, teacher, momentum = inputs(task, 9, n)
    student.requires_grad_()
    mask = torch.zeros(n, dtype=torch.bool)
    loss = F.response_distill_loss(student, teacher, momentum, task=task, mask=mask, reduction=reduction)
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad.shape == student.shape
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_give_finite_loss_and_gradient(autocast, temperature, dtype):
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4]], dtype=dtype)
    certain = torch.tensor([[0.0, -INF, -INF], [-INF, 0.0, 0.0], [1e4, -INF, -1e4]], dtype=dtype)
    options = {"task": "classification", "temperature": temperature}
    for teacher in (extreme, certain, extreme.flip(1)):
        student = extreme.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=bool(autocast)):
            loss = F.response_distill_loss(student, teacher, certain, **options)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_large_logits_lose_no_more_digits_than_small_ones(temperature):
    logits = torch.tensor([[0.1, 37.2, 9963.3], [8123.4, 8124.1, 8120.2]])
    teacher = torch.tensor([[0.2, 0.1, -INF], [5001.3, 5002.2, 5000.4]])

    def outcome(dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (logits, teacher)]
        options = {"task": "classification", "temperature": temperature, "detach_teacher": False}
        rows = F.response_distill_loss(*leaves, **options, reduction="none")
        return [rows, *torch.autograd.grad(rows.sum(), leaves)]

    for single, double in zip(outcome(torch.float32), outcome(torch.float64), strict=True):
        torch.testing.assert_close(single.double(), double, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("detach_teacher", [True, False])
def test_certain_teacher_against_a_soft_student_is_exact(detach_teacher):
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-INF, 2.0, 2.0, -INF]], dtype=torch.float64, requires_grad=True)
    loss = F.response_distill_loss(student, teacher, task="classification", detach_teacher=detach_teacher)
    loss.backward()
    assert_close(loss, math.log(4))
    torch.testing.assert_close(student.grad, torch.tensor([[0.25, -0.25, -0.25, 0.25]], dtype=torch.float64))
    if not detach_teacher:
        assert teacher.grad.isfinite().all()


def test_equal_scores_have_a_finite_gradient():
    student = torch.ones(3, dtype=torch.float64, requires_grad=True)
    F.response_distill_loss(student, torch.ones(3).double(), task="regression").backward()
    assert not student.grad.any()


@pytest.mark.parametrize("task", TASKS)
def test_strided_inputs_give_the_same_loss(task):
    tensors = inputs(task, 11)
    expected = F.response_distill_loss(*tensors, task=task)
    strided = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in tensors]
    assert_close(F.response_distill_loss(*strided, task=task), expected.item())
    expanded = tensors[1][:1].expand_as(tensors[1])
    copied = F.response_distill_loss(tensors[0], expanded.contiguous(), task=task)
    assert_close(F.response_distill_loss(tensors[0], expanded, task=task), copied.item())


@pytest.mark.parametrize("task", TASKS)
def test_copies_and_pickles_give_the_same_loss(task):
    student, teacher, momentum = inputs(task, 12)
    loss_fn = md.ResponseDistillLoss(task=task, alpha=0.7, reduction="sum")
    expected = bits(loss_fn(student, teacher, momentum))
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert bits(other(student, teacher, momentum)) == expected
        assert repr(other) == repr(loss_fn)
    assert not list(loss_fn.parameters())


def test_a_class_that_both_sides_rule_out_adds_nothing():
    student = torch.tensor([[0.0, 0.0, -INF]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0, -INF]], dtype=torch.float64)
    loss = F.response_distill_loss(student, teacher, task="classification")
    loss.backward()
    assert_close(loss, math.log(2))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_alpha_may_be_a_tensor_of_any_precision_without_widening_the_loss(dtype, task):
    student, teacher, momentum = inputs(task, 13, dtype=torch.float32)
    expected = F.response_distill_loss(student, teacher, momentum, task=task, alpha=0.25)
    alpha = torch.tensor(0.25, dtype=dtype)
    loss = F.response_distill_loss(student, teacher, momentum, task=task, alpha=alpha)
    assert loss.dtype == torch.float32
    assert_close(loss, expected.item(), torch.float32)


def test_validation_passes_masked_garbage_and_certain_teachers_and_changes_no_bit():
    student, teacher, momentum = inputs("classification", 14)
    mask = torch.tensor([True, True, False, True, True, True])
    for x in (student, teacher, momentum):
        x[2] = NAN
    teacher[0, 1] = momentum[1, 0] = -INF
    options = {"task": "classification", "mask": mask}
    expected = F.response_distill_loss(student, teacher, momentum, **options)
    assert expected.isfinite()
    assert bits(F.response_distill_loss(student, teacher, momentum, **options, validate=True)) == bits(expected)


def test_scores_have_no_temperature():
    student, teacher, momentum = inputs("regression")
    plain = F.response_distill_loss(student, teacher, momentum, task="regression")
    assert torch.equal(F.response_distill_loss(student, teacher, momentum, task="regression", temperature=3.0), plain)


@pytest.mark.parametrize("wide", ["teacher", "momentum"])
@pytest.mark.parametrize("task", TASKS)
def test_one_wide_input_makes_the_sum_wide(task, wide):
    narrow = dict(zip(("student", "teacher", "momentum"), inputs(task, dtype=torch.float32), strict=True))
    loss = F.response_distill_loss(**narrow | {wide: narrow[wide].double()}, task=task)
    assert loss.dtype == torch.float64
    exact = F.response_distill_loss(**{name: x.double() for name, x in narrow.items()}, task=task)
    assert_close(loss, exact)
