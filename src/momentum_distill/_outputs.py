"""What the losses over outputs, scores `(N,)` and logits `(N, C)`, are given: checked, masked rows made harmless."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import (
    check_classes,
    check_device,
    check_finite,
    check_floating,
    check_labels,
    check_logits,
    check_mask,
    check_shape,
    wrong_value,
)

TASKS = ("regression", "classification")
CLASS_WEIGHTS = ("distance", "error_rate", "per_sample")

Named: TypeAlias = tuple[str, Tensor]
"""An argument: its name and its value."""
Part: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""A part of the fusion loss: output of the student, fused output and truth."""


def check_outputs(shape: tuple[str, ...], student: Named, *teachers: Named) -> None:
    """Outputs of a student, of shape `("N",)` or `("N", "C")`, and those of teachers, alike."""
    name, outputs = student
    check_floating(name, outputs, shape=shape)
    if outputs.ndim == 2 and outputs.shape[1] == 0:  # the softmax of nothing is nothing
        wrong_value(name, "at least one class", f"shape {tuple(outputs.shape)}")
    for other_name, other in teachers:
        check_floating(other_name, other, shape=tuple(outputs.shape))
        check_device(other_name, other, outputs.device, like=name)


def validate_outputs(mask: Tensor, student: Named, *teachers: Named) -> None:
    """The values of checked outputs: finite, and logits no probabilities."""
    logits = student[1].ndim == 2
    check_finite(*student, mask)
    for name, outputs in teachers:
        # Minus infinity, probability 0, is legal in the logits of a teacher.
        check_finite(name, outputs.clamp(min=0.0) if logits else outputs, mask)
    if logits:
        for name, outputs in (student, *teachers):
            check_logits(name, outputs, mask)


def row_mask(mask: Tensor | None, name: str, values: Tensor) -> Tensor:
    """The checked mask of the rows of the argument called `name`, or one that keeps every row."""
    rows = values.shape[0]
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=values.device)
    check_mask("mask", mask, shape=(rows,))
    check_device("mask", mask, values.device, like=name)
    return mask


def keep_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Zeros in masked rows, before any arithmetic: a NaN there must reach neither the value nor a gradient."""
    return torch.where(mask if values.ndim == 1 else mask[:, None], values, 0.0)


def check_fusion(
    scores: Part, logits: Part, mask: Tensor | None, *, hard_attention: bool, ignore_index: int, validate: bool
) -> tuple[Tensor | None, Tensor]:
    """What the fusion loss is given; returns the labels as int64 and the mask of the rows that count."""
    given: list[tuple[Named, Named]] = []
    for kind, shape, (student, fused, truth), truth_name in (
        ("scores", ("N",), scores, "targets"),
        ("logits", ("N", "C"), logits, "labels"),
    ):
        student_name, fused_name = f"student_{kind}", f"fused_{kind}"
        if student is None and fused is None:
            continue
        if student is None:
            wrong_value(student_name, f"a tensor beside {fused_name}", "None")
        if fused is None:
            wrong_value(fused_name, f"a tensor beside {student_name}", "None")
        check_outputs(shape, (student_name, student), (fused_name, fused))
        if hard_attention and truth is None:
            wrong_value(truth_name, f"a tensor beside {student_name} with hard_attention", "None")
        given.append(((student_name, student), (fused_name, fused)))
    if not given:
        wrong_value("student_scores", "scores, logits or both (student and fused)", "neither part")

    like, first = given[0][0]
    rows = first.shape[0]
    name, last = given[-1][0]
    check_shape(name, last, (rows, *last.shape[1:]))
    check_device(name, last, first.device, like=like)
    targets, labels = scores[2], logits[2]
    if targets is not None:
        check_floating("targets", targets, shape=(rows,))
        check_device("targets", targets, first.device, like=like)
    mask = row_mask(mask, like, first)
    if labels is not None:
        check_labels("labels", labels, shape=(rows,))
        check_device("labels", labels, first.device, like=like)
        labels = labels.to(torch.int64)
        classes = last.shape[1] if last.ndim == 2 else math.inf
        check_classes("labels", labels, absent=ignore_index, classes=classes, keep=mask, validate=validate)
        mask = mask & (labels != ignore_index)
    if validate:
        for part in given:
            validate_outputs(mask, *part)
        if targets is not None:
            check_finite("targets", targets, mask)
    return labels, mask
