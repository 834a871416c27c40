"""Positives from targets that are no classes, and hard negatives: in every way of the engine the formula of the loops."""

import itertools

import pytest
import torch

import momentum_distill as md
import reference
from loss_cases import (
    Largest,
    assert_close,
    assert_gradient_close,
    bits,
    by_autograd,
    lists,
    numbers_alone,
    supcon_case,
    without_asking,
)
from momentum_distill import functional as F
from momentum_distill._contrast import engine, tiles

pytestmark = numbers_alone


def apart(y, z):
    """A function of the user's own: scores of the same sign, the more the nearer."""
    return ((y * z) > 0) / (1 + (y - z).abs())


def targets_of(kind, n, q, seed=0, dtype=torch.float64):
    """Options for `positives_from`, but for NaN where nobody may look: see `pairs_case`."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "labels":
        return {}
    shape = {"overlap": (3,), "soft": (3,), "plane": (2,)}.get(kind, ())
    y = 2 * torch.randn(n + q, *shape, generator=generator, dtype=torch.float64)
    if kind == "overlap":
        y = (y > 0).double()  # some rows have no label at all
    if kind == "soft":
        y = y.softmax(dim=1)
    y = y.to(dtype)
    names = {"soft": "overlap", "plane": "distance", "function": apart}
    options = {"query_targets": y[:n], "key_targets": y[n:], "positives_from": names.get(kind, kind)}
    return options | ({"width": 0.8} if options["positives_from"] == "distance" else {})


KINDS = ["distance", "plane", "overlap", "soft", "function"]


def pairs_case(kind, seed=0, n=6, q=13, d=4, **options):
    """Features, labels of which some are -1 and -2, and targets that are NaN there."""
    case = supcon_case(seed, n, q, d, **{"ignored": 0.2, "unlabelled": 0.2, **options})
    pairs = targets_of(kind, n, q, seed, case.query.dtype)
    if pairs:
        pairs["query_targets"][case.query_labels < 0] = torch.nan
        pairs["key_targets"][case.key_labels < 0] = torch.nan
    return case, pairs


def way(patch, name):
    """Matrices, tiles of five keys by each of their passes, or plain autograd."""
    patch.setattr(engine, "DENSE_SCORES", 2**62 if name == "matrices" else -1)
    for bound in ("MIN_TILE", "MAX_TILE"):
        patch.setattr(tiles, bound, 5)
    if name in ("running shift", "without asking"):
        patch.setattr(tiles, "SAFE_SUM", (1.0, 0.0))
    if name in ("without asking", "matrices without asking"):
        without_asking(patch)
    if name == "matrices without asking":
        patch.setattr(engine, "DENSE_SCORES", 2**62)
    if name == "autograd":
        by_autograd(patch)


WAYS = ["matrices", "matrices without asking", "tiles", "running shift", "without asking", "autograd"]


def contrast(case, pairs, **options):
    """Terms of the case, in two parts of the keys."""
    n = len(case.query)

    def parts(x):
        return None if x is None else (x[:n], x[n:])

    pairs = pairs | ({"key_targets": parts(pairs["key_targets"])} if pairs else {})
    return F.supcon_distill_terms(
        case.query,
        parts(case.keys),
        case.query_labels,
        parts(case.key_labels),
        momentum_query=case.momentum_query,
        momentum_keys=parts(case.momentum_keys),
        **pairs,
        **{"temperature": 0.3, "alpha": 0.3, **options},
    )


def every_case():
    """What this file is about; classes alone, without hard negatives, are tested elsewhere."""
    for kind, positives, hardness, exclude_self, momentum in itertools.product(
        ["labels", *KINDS], ["outside", "inside"], [0.0, 3.0], [False, True], [True, False]
    ):
        if kind != "labels" or hardness:
            yield kind, momentum, {"positives": positives, "hardness": hardness, "exclude_self": exclude_self}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_the_values_of_the_loops(name, monkeypatch):
    way(monkeypatch, name)
    for seed, (kind, momentum, options) in enumerate(every_case()):
        case, pairs = pairs_case(kind, seed, momentum=momentum)
        args, momentum_args = case.reference
        own = {"function": lambda y, z: (y * z > 0) / (1 + abs(y - z))}.get(kind, pairs.get("positives_from", "labels"))
        plain = {key: lists(x) if isinstance(x, torch.Tensor) else x for key, x in pairs.items()}
        plain["positives_from"] = own
        expected = reference.supcon_terms(*args, **momentum_args, **plain, temperature=0.3, alpha=0.3, **options)
        terms = contrast(case, pairs, **options)
        for ours, theirs in zip(terms[:3], expected[:3], strict=True):
            assert_close(ours, theirs)
        assert (int(terms.rows), int(terms.rows_with_positive)) == expected[3:], (kind, options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WAYS[:-1])
def test_every_way_gives_the_gradients_of_plain_autograd(name, dtype, monkeypatch):
    for seed, (kind, momentum, options) in enumerate(every_case()):
        reduction = ["mean", "sum", "none"][seed % 3]
        case, pairs = pairs_case(kind, seed, momentum=momentum, dtype=dtype)
        found = []
        for exact in (True, False):
            leaves = (case.map(lambda x: x.double()) if exact else case).requires_grad()
            tau = torch.tensor(0.3, dtype=leaves.query.dtype, requires_grad=True)
            given = {key: x.double() if exact and isinstance(x, torch.Tensor) else x for key, x in pairs.items()}
            with monkeypatch.context() as patch:
                way(patch, "autograd" if exact else name)
                terms = contrast(leaves, given, temperature=tau, reduction=reduction, **options)
                every = terms.total.sum() + (2 * terms.supervised.sum() if seed % 2 else 0.0)
                every.backward()
            found.append((every.detach(), torch.cat([leaves.query.grad.flatten(), tau.grad[None]]), leaves.keys.grad))
        expected, ours = found
        assert_close(ours[0] / 10, expected[0] / 10, dtype)
        for actual, exact in zip(ours[1:], expected[1:], strict=True):
            assert_gradient_close(actual, exact, dtype)


@pytest.mark.parametrize("name", ["matrices", "tiles"])
def test_gradcheck(name, monkeypatch):
    """Of hard negatives with the penalty as it is at this place: no gradient flows through it."""
    way(monkeypatch, name)
    for kind, positives in itertools.product(["distance", "overlap", "function"], ["outside", "inside"]):
        case, pairs = pairs_case(kind, 2, 4, 7, 3)
        case = case.requires_grad()
        tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def loss(query, keys, tau, case=case, pairs=pairs, positives=positives):
            return F.supcon_distill_loss(
                *(query, keys, case.query_labels, case.key_labels),
                **case.momentum,
                **pairs,
                temperature=tau,
                momentum_temperature=0.5,
                positives=positives,
                exclude_self=False,
            )

        assert torch.autograd.gradcheck(loss, (case.query, case.keys, tau), atol=1e-8)
    assert torch.autograd.gradgradcheck(loss, (case.query, case.keys, tau))
