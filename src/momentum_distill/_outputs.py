"""What the losses over outputs, scores `(N,)` and logits `(N, C)`, are given: checked, masked rows made harmless."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import (
    Named,
    check_classes,
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

Part: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""A part of the fusion loss: output of the student, fused output and truth."""


def check_outputs(shape: tuple[str, ...], student: Named, *teachers: Named) -> None:
    """Outputs of a student, of shape `("N",)` or `("N", "C")`, and those of teachers, alike."""
    name, outputs = student
    check_floating(name, outputs, shape=shape)
    if outputs.ndim == 2 and outputs.shape[1] == 0:  # the softmax of nothing is nothing
        wrong_value(name, "at least one class", f"shape {tuple(outputs.shape)}")
    for other_name, other in teachers:
        check_floating(other_name, other, shape=outputs.shape, like=student)


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


def row_mask(mask: Tensor | None, like: Named) -> Tensor:
    """The checked mask of the rows of the argument `like`, or one that keeps every row."""
    rows = like[1].shape[:1]
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=like[1].device)
    check_mask("mask", mask, shape=rows, like=like)
    return mask


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

    first, last = given[0][0], given[-1][0]
    rows = first[1].shape[:1]
    check_shape(*last, (*rows, *last[1].shape[1:]), like=first)
    targets, labels = scores[2], logits[2]
    if targets is not None:
        check_floating("targets", targets, shape=rows, like=first)
    mask = row_mask(mask, first)
    if labels is not None:
        check_labels("labels", labels, shape=rows, like=first)
        labels = labels.to(torch.int64)
        classes = math.inf if logits[0] is None else logits[0].shape[1]
        check_classes("labels", labels, absent=ignore_index, classes=classes, keep=mask, validate=validate)
        mask = mask & (labels != ignore_index)
    if validate:
        for part in given:
            validate_outputs(mask, *part)
        if targets is not None:
            check_finite("targets", targets, mask)
    return labels, mask
