"""The arguments of the contrastive loss: checked, and put together to a :class:`Problem`."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import (
    COLDEST,
    HOTTEST,
    REDUCTIONS,
    check_bool,
    check_choice,
    check_classes,
    check_finite,
    check_floating,
    check_int,
    check_labels,
    check_number,
    check_scalar,
    check_validate,
    describe,
    wrong_type,
    wrong_value,
)
from momentum_distill._contrast.formulas import (
    POSITIVES,
    POSITIVES_FROM,
    Positives,
    PositivesFrom,
    Reduction,
    pair_weights,
)
from momentum_distill._contrast.problem import Choices, Problem, problem_of
from momentum_distill._contrast.targets import TARGETS, Targets, balanced, centred
from momentum_distill._group import Group, check_group, errors_shared_by_sum, find_ranks
from momentum_distill._precision import full_precision

Parts: TypeAlias = Tensor | Sequence[Tensor]
Normalize: TypeAlias = Literal["query"] | bool

TILE = 4096
"""Keys whose weights are looked at at a time."""


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
    query_targets: Tensor | None = None,
    key_targets: Parts | None = None,
    positives_from: PositivesFrom = "labels",
    width: float | None = None,
    hardness: float = 0.0,
    momentum_targets: Targets = "softmax",
    centre: Tensor | None = None,
) -> Problem:
    """The arguments of :func:`momentum_distill.functional.supcon_distill_loss`, or the errors it promises."""
    check_group(group)
    everyone = find_ranks(group)
    ranks = everyone if reduction != "none" else None
    exchange = momentum_query is not None and momentum_targets not in ("softmax", "centred")  # whatever the reduction
    with errors_shared_by_sum(everyone if exchange else ranks, query):
        check_scalar("temperature", temperature, low=COLDEST, high=HOTTEST)
        if momentum_temperature is not None:
            check_scalar("momentum_temperature", momentum_temperature, low=COLDEST, high=HOTTEST)
        check_scalar("alpha", alpha, low=0.0, high=1.0)
        check_choice("positives", positives, POSITIVES)
        check_choice("reduction", reduction, REDUCTIONS)
        check_normalize(normalize)
        check_int("ignore_index", ignore_index)
        check_bool("exclude_self", exclude_self)
        check_pairs(positives_from, width, hardness, positives)
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
        target_parts = _check_targets(query_targets, key_targets, query, parts, positives_from)
        # Narrow integers would wrap when compared with ignore_index: 255 is -1 in eight bits.
        query_labels = query_labels.to(torch.int64)
        labels = tuple(part.to(torch.int64) for part in labels)
        seen = check_classes("query_labels", query_labels, absent=ignore_index, validate=validate)
        seen_keys = [
            check_classes(name, part, absent=ignore_index, validate=validate)
            for name, part in _named("key_labels", labels)
        ]
        if validate:
            for name, value, low, high in (
                ("temperature", temperature, COLDEST, HOTTEST),
                ("momentum_temperature", momentum_temperature, COLDEST, HOTTEST),
                ("alpha", alpha, 0.0, 1.0),
            ):
                if isinstance(value, Tensor):
                    check_number(name, value.item(), low=low, high=high)
            _check_values(query, parts, query_labels, labels, normalize, ignore_index)
            if momentum_query is not None:  # of the same samples
                _check_values(
                    momentum_query, momentum_parts, query_labels, labels, normalize, ignore_index, "momentum_"
                )

        if query_targets is not None:
            every_label = (query_labels, *labels)
            _check_weights(query_targets, target_parts, every_label, ignore_index, positives_from, validate=validate)

    sigma = 1.0 if width is None else float(width)
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
        Choices(positives, reduction, ignore_index, positives_from, sigma, float(hardness)),
        bool(normalize),
        normalize is True,
        exclude_self,
        ranks,
        seen,
        seen_keys,
        query_targets,
        target_parts,
    )
    if momentum_query is None or (momentum_targets != "sinkhorn" and centre is None):
        return problem
    with full_precision(query):
        return balanced(problem, everyone) if centre is None else centred(problem, centre)


def check_normalize(normalize: object) -> None:
    """True, "query" or False."""
    if not isinstance(normalize, bool) and normalize != "query":
        wrong_value("normalize", "True, 'query' or False", describe(normalize))


def check_pairs(positives_from: object, width: object, hardness: object, positives: str) -> None:
    """What says how positive a pair is, and how much a hard negative weighs."""
    if not callable(positives_from) and not (isinstance(positives_from, str) and positives_from in POSITIVES_FROM):
        choices = ", ".join(repr(choice) for choice in POSITIVES_FROM)
        wrong_value("positives_from", f"one of {choices} or a function", describe(positives_from))
    if positives_from == "distance":
        if width is None:
            wrong_type("width", "a number above 0 with positives_from='distance'", "None")
        check_number("width", width, low=0.0, open_low=True)
    elif width is not None:
        wrong_value("width", "None without positives_from='distance'", describe(width))
    if positives_from != "labels" and positives == "inside_per_positive":
        wrong_value("positives", "'outside' or 'inside' with positives_from, which counts no keys", repr(positives))
    check_number("hardness", hardness, low=0.0)


def _check_targets(
    query_targets: Tensor | None,
    key_targets: Parts | None,
    query: Tensor,
    keys: tuple[Tensor, ...],
    positives_from: PositivesFrom,
) -> tuple[Tensor, ...]:
    """The targets that `positives_from` reads; returns those of the keys as a tuple of parts."""
    kind = "a function" if callable(positives_from) else repr(positives_from)
    for name, given in (("query_targets", query_targets), ("key_targets", key_targets)):
        if (given is None) != (positives_from == "labels"):
            expected = "targets" if given is None else "None"
            wrong_value(name, f"{expected} with positives_from={kind}", describe(given))
    if query_targets is None or key_targets is None:
        return ()
    check_floating("query_targets", query_targets)
    several = positives_from == "overlap" or query_targets.ndim == 2
    shape = (len(query), "C") if several else (len(query),)
    check_floating("query_targets", query_targets, shape=shape, like=("query", query))
    if several and query_targets.shape[1] == 0:
        wrong_value("query_targets", "at least one column", f"shape {tuple(query_targets.shape)}")
    parts = _parts("key_targets", key_targets)
    if len(parts) != len(keys):
        wrong_value("key_targets", f"as many parts as keys ({len(keys)})", f"{len(parts)}")
    for (name, part), key_part in zip(_named("key_targets", parts), keys, strict=True):
        check_floating(name, part, shape=(len(key_part), *query_targets.shape[1:]), like=("query", query))
    return parts


def _check_weights(
    query_targets: Tensor,
    key_targets: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    ignore_index: int,
    positives_from: PositivesFrom,
    *,
    validate: bool,
) -> None:
    """What targets and a function that weighs them return; their values with `validate` alone."""
    if callable(positives_from):  # before other ranks wait for this one
        pair_weights(query_targets.detach()[:2], key_targets[0].detach()[:3], positives_from, 1.0)
    if not validate:
        return
    labelled = [(marks >= 0) & (marks != ignore_index) for marks in labels]
    every = [("query_targets", query_targets), *_named("key_targets", key_targets)]
    for (name, targets), keep in zip(every, labelled, strict=True):
        check_finite(name, targets, keep)
        if positives_from == "overlap" and bool((targets.detach()[keep] < 0).any()):
            wrong_value(name, "shares of at least 0", f"{float(targets.detach()[keep].min()):.3g}")
    if callable(positives_from):
        rows = query_targets.detach()[labelled[0]]
        every_key = torch.cat([part.detach()[keep] for part, keep in zip(key_targets, labelled[1:], strict=True)])
        for keys in every_key.split(TILE):  # type: ignore[no-untyped-call]
            weights = positives_from(rows[:, None], keys[None])
            if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
                wrong_value("positives_from", "a function of finite weights of at least 0", describe(weights))


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
