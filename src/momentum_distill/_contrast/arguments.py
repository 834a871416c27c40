"""The arguments of the contrastive loss: checked, and put together to a :class:`Problem`."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import (
    REDUCTIONS,
    check_bool,
    check_choice,
    check_classes,
    check_finite,
    check_floating,
    check_int,
    check_labels,
    check_scalar,
    check_validate,
    describe,
    wrong_type,
    wrong_value,
)
from momentum_distill._contrast.formulas import POSITIVES, Positives, Reduction
from momentum_distill._contrast.problem import Choices, Problem, problem_of
from momentum_distill._contrast.targets import TARGETS, Targets, balanced, centred
from momentum_distill._group import Group, check_group, errors_shared_by_sum, find_ranks
from momentum_distill._precision import full_precision

Parts: TypeAlias = Tensor | Sequence[Tensor]
Normalize: TypeAlias = Literal["query"] | bool


def read_problem(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    momentum_query: Tensor | None,
    momentum_keys: Parts | None,
    temperature: float | Tensor,
    momentum_temperature: float | Tensor | None,
    alpha: float | Tensor,
    positives: Positives,
    reduction: Reduction,
    normalize: Normalize,
    ignore_index: int,
    exclude_self: bool,
    group: Group,
    validate: bool,
    momentum_targets: Targets = "softmax",
    centre: Tensor | None = None,
) -> Problem:
    """The arguments of :func:`momentum_distill.functional.supcon_distill_loss`, or the errors it promises."""
    check_group(group)
    everyone = find_ranks(group)
    ranks = everyone if reduction != "none" else None
    with errors_shared_by_sum(ranks if momentum_targets in ("softmax", "centred") else everyone, query):
        check_scalar("temperature", temperature, low=0.0, open_low=True)
        if momentum_temperature is not None:
            check_scalar("momentum_temperature", momentum_temperature, low=0.0, open_low=True)
        check_scalar("alpha", alpha, low=0.0, high=1.0)
        check_choice("positives", positives, POSITIVES)
        check_choice("reduction", reduction, REDUCTIONS)
        check_normalize(normalize)
        check_int("ignore_index", ignore_index)
        check_bool("exclude_self", exclude_self)
        check_validate(validate)
        parts, labels, momentum_parts = _check_features(
            query, keys, query_labels, key_labels, momentum_query, momentum_keys, exclude_self
        )
        check_choice("momentum_targets", momentum_targets, TARGETS)
        if centre is not None:
            if momentum_targets != "centred":
                wrong_value("centre", f"None with {momentum_targets=}", describe(centre))
            check_floating("centre", centre, shape=(query.shape[1],), like=("query", query))
        if momentum_targets == "sinkhorn" and exclude_self and everyone is not None:
            wrong_value(
                "exclude_self", "False with momentum_targets='sinkhorn' on several ranks, whose keys are shared", "True"
            )
        # Narrow integers would wrap when compared with ignore_index: 255 is -1 in eight bits.
        query_labels = query_labels.to(torch.int64)
        labels = tuple(part.to(torch.int64) for part in labels)
        seen = check_classes("query_labels", query_labels, absent=ignore_index, validate=validate)
        seen_keys = [
            check_classes(name, part, absent=ignore_index, validate=validate)
            for name, part in _named("key_labels", labels)
        ]
        if validate:
            _check_values(query, parts, query_labels, labels, normalize, ignore_index)
            if momentum_query is not None:  # of the same samples
                _check_values(
                    momentum_query, momentum_parts, query_labels, labels, normalize, ignore_index, "momentum_"
                )

    choices = Choices(positives, reduction, bool(normalize), normalize is True, ignore_index, exclude_self)
    momentum_temperature = temperature if momentum_temperature is None else momentum_temperature
    problem = problem_of(
        query,
        parts,
        query_labels,
        labels,
        momentum_query,
        momentum_parts,
        temperature,
        momentum_temperature,
        alpha,
        choices,
        ranks,
        seen,
        seen_keys,
    )
    if momentum_query is None or (momentum_targets != "sinkhorn" and centre is None):
        return problem
    with full_precision(query):
        return balanced(problem, everyone) if centre is None else centred(problem, centre)


def check_normalize(normalize: object) -> None:
    """True, "query" or False."""
    if not isinstance(normalize, bool) and normalize != "query":
        wrong_value("normalize", "True, 'query' or False", describe(normalize))


def _check_features(
    query: Tensor,
    keys: Parts,
    query_labels: Tensor,
    key_labels: Parts,
    momentum_query: Tensor | None,
    momentum_keys: Parts | None,
    exclude_self: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors of the contrastive loss; returns keys, their labels and the momentum keys as tuples of parts."""
    check_floating("query", query, shape=("N", "d"))
    rows, width = query.shape
    like = ("query", query)
    check_labels("query_labels", query_labels, shape=(rows,), like=like)
    keys, key_labels = _parts("keys", keys), _parts("key_labels", key_labels)
    for name, part in _named("keys", keys):
        check_floating(name, part, shape=("Q", width), like=like)
    if exclude_self and keys[0].shape[0] != rows:
        wrong_value(_named("keys", keys)[0][0], f"{rows} rows as query, with exclude_self=True", f"{keys[0].shape[0]}")
    if len(key_labels) != len(keys):
        wrong_value("key_labels", f"as many parts as keys ({len(keys)})", f"{len(key_labels)}")
    for (name, part), key_part in zip(_named("key_labels", key_labels), keys, strict=True):
        check_labels(name, part, shape=(key_part.shape[0],), like=like)
    if (momentum_query is None) != (momentum_keys is None):
        missing = "momentum_query" if momentum_query is None else "momentum_keys"
        wrong_value(missing, "both momentum inputs or neither", "None beside the other")
    if momentum_query is None or momentum_keys is None:
        return keys, key_labels, ()
    check_floating("momentum_query", momentum_query, shape=(rows, width), like=like)
    momentum_keys = _parts("momentum_keys", momentum_keys)
    if len(momentum_keys) != len(keys):
        wrong_value("momentum_keys", f"as many parts as keys ({len(keys)})", f"{len(momentum_keys)}")
    for (name, part), key_part in zip(_named("momentum_keys", momentum_keys), keys, strict=True):
        check_floating(name, part, shape=key_part.shape, like=like)
    return keys, key_labels, momentum_keys


def _check_values(
    query: Tensor,
    keys: tuple[Tensor, ...],
    query_labels: Tensor,
    key_labels: tuple[Tensor, ...],
    normalize: Normalize,
    ignore_index: int,
    prefix: str = "",
) -> None:
    """Value checks of the contrastive loss; `prefix` stands before the names of the features."""
    check_finite(f"{prefix}query", query, query_labels != ignore_index)
    for (name, part), labels in zip(_named(f"{prefix}keys", keys), key_labels, strict=True):
        check_finite(name, part, labels != ignore_index)
        if normalize == "query":
            lengths = part.detach()[labels != ignore_index].float().square().sum(dim=1).sqrt()
            wrong = ((lengths - 1).abs() > 0.01) & (lengths > 0)
            if bool(wrong.any()):
                wrong_value(name, "unit rows with normalize='query'", f"a length of {lengths[wrong][0]:.3g}")


def _parts(name: str, value: Parts) -> tuple[Tensor, ...]:
    """A tensor or a sequence of at least one tensor, as a tuple."""
    if isinstance(value, Tensor):
        return (value,)
    if not isinstance(value, (tuple, list)):
        wrong_type(name, "a tensor or a tuple of tensors", describe(value))
    if not value:
        wrong_value(name, "at least one part", "an empty tuple")
    return tuple(value)


def _named(name: str, parts: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    """Each part with the name that error messages use."""
    if len(parts) == 1:
        return [(name, parts[0])]
    return [(f"{name}[{index}]", part) for index, part in enumerate(parts)]
