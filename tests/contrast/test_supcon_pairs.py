"""Positives from targets that are no classes, and hard negatives: in every way of the engine the loops' formula."""

import itertools

import pytest
import torch
from torch import Tensor

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
    sizes = len(case.query), len(case.keys) - len(case.query)
    pairs = pairs | ({"key_targets": pairs["key_targets"].split(sizes)} if pairs else {})
    case = case.split(*sizes)
    return F.supcon_distill_terms(*case.args, **case.momentum, **pairs, **{"temperature": 0.3, "alpha": 0.3, **options})


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


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.long)], ids=str)
def test_every_way_gives_the_gradients_of_plain_autograd(dtype, monkeypatch):
    def answer(name, seed, case, pairs, options):
        """Value, gradients for the queries and the temperature, gradients for the keys."""
        leaves = case.map(Tensor.clone).requires_grad()
        tau = torch.tensor(0.3, dtype=leaves.query.dtype, requires_grad=True)
        with monkeypatch.context() as patch:
            way(patch, name)
            reduction = ["mean", "sum", "none"][seed % 3]
            terms = contrast(leaves, pairs, temperature=tau, reduction=reduction, **options)
            every = terms.total.sum() + (2 * terms.supervised.sum() if seed % 2 else 0.0)
            every.backward()
        return every.detach(), torch.cat([leaves.query.grad.flatten(), tau.grad[None]]), leaves.keys.grad

    for seed, (kind, momentum, options) in enumerate(every_case()):
        case, pairs = pairs_case(kind, seed, momentum=momentum, dtype=dtype)
        in_double = {key: x.double() if isinstance(x, Tensor) else x for key, x in pairs.items()}
        expected = answer("autograd", seed, case.map(Tensor.double), in_double, options)
        for name in WAYS[:-1]:
            ours = answer(name, seed, case, pairs, options)
            assert_close(ours[0] / 10, expected[0] / 10, dtype)
            for actual, exact in zip(ours[1:], expected[1:], strict=True):
                assert_gradient_close(actual, exact, dtype)


@pytest.mark.parametrize("name", WAYS)
def test_a_scaled_loss_has_the_gradient_scaled(name, monkeypatch):
    way(monkeypatch, name)
    for seed, (kind, momentum, options) in enumerate(every_case()):
        case, pairs = pairs_case(kind, seed, momentum=momentum, dtype=torch.float32)
        case.query_labels[0] = -2  # without a positive
        leaves = case.requires_grad()
        total = contrast(leaves, pairs, reduction=["mean", "none"][seed % 2], **options).total.sum()
        one, scaled = (
            torch.autograd.grad(scale * total, (leaves.query, leaves.keys), retain_graph=True) for scale in (1, 2**16)
        )
        for expected, actual in zip(one, scaled, strict=True):
            assert torch.equal(actual, 2**16 * expected)  # a power of two: to the last bit


@pytest.mark.parametrize("name", ["matrices", "tiles"])
def test_gradcheck(name, monkeypatch):
    """In queries, keys and temperature."""
    way(monkeypatch, name)
    for kind, positives in itertools.product(["distance", "overlap"], ["outside", "inside"]):
        case, pairs = pairs_case(kind, 2, 3, 5, 2)
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
    if name == "matrices":  # that is another way, whatever the first gradient came by
        assert torch.autograd.gradgradcheck(loss, (case.query, case.keys, tau))


@pytest.mark.parametrize("name", ["matrices", "tiles"])
def test_gradcheck_of_hard_negatives_whose_penalty_stands_still(name, monkeypatch):
    """No gradient flows through the penalty: beside it, what is differentiated is a loss by hand that keeps it."""
    way(monkeypatch, name)
    case = supcon_case(4, 5, 8, 3, momentum=False).requires_grad()
    with torch.no_grad():
        unit = [torch.nn.functional.normalize(x, dim=1) for x in (case.query, case.keys)]
        fixed = 2.0 * (unit[0] @ unit[1].T) * (case.query_labels[:, None] != case.key_labels)

    def by_hand(query, keys, tau):
        logits = F.contrast_logits(query, keys, temperature=tau)
        same = (case.query_labels[:, None] == case.key_labels).double()
        rows = (logits + fixed).logsumexp(dim=1) - (logits * same).sum(dim=1) / same.sum(dim=1).clamp(min=1)
        return rows[same.any(dim=1)].mean()

    def ours(query, keys, tau):
        return F.supcon_distill_loss(query, keys, *case.args[2:], temperature=tau, hardness=2.0)

    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = case.query, case.keys, tau
    assert torch.autograd.gradcheck(by_hand, leaves)
    assert_close(ours(*leaves), by_hand(*leaves).detach())
    every = [torch.autograd.grad(f(*leaves), leaves, create_graph=graph) for f, graph in ((ours, 0), (ours, 1))]
    for *found, expected in zip(*every, torch.autograd.grad(by_hand(*leaves), leaves), strict=True):
        for gradient in found:
            torch.testing.assert_close(gradient.detach(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["matrices", "tiles"])
def test_classes_are_one_case_of_each(name, monkeypatch):
    """One-hot rows that overlap, numbers of classes that are near, and a function that compares them."""
    way(monkeypatch, name)
    case = supcon_case(7, 9, 20, 4, ignored=0.2, unlabelled=0.2, classes=4)
    marks = [labels.clamp(min=0) for labels in case.args[2:]]
    hot = [torch.nn.functional.one_hot(x, 4).double() for x in marks]
    numbers = [x.double() for x in marks]
    for positives in ("outside", "inside"):
        options = {"temperature": 0.2, "alpha": 0.3, "positives": positives, "hardness": 1.5}
        leaves = case.requires_grad()
        expected = F.supcon_distill_loss(*leaves.args, **leaves.momentum, **options)
        expected.backward()
        for targets, pairs in (
            (hot, {"positives_from": "overlap"}),
            (numbers, {"positives_from": "distance", "width": 0.02}),
            (numbers, {"positives_from": lambda y, z: y == z}),
        ):
            pairs |= dict(zip(("query_targets", "key_targets"), targets, strict=True))
            graded = case.requires_grad()
            loss = F.supcon_distill_loss(*graded.args, **graded.momentum, **options, **pairs)
            loss.backward()
            assert_close(loss, expected.detach())
            assert_gradient_close(graded.query.grad, leaves.query.grad, torch.float64)
            assert_gradient_close(graded.keys.grad, leaves.keys.grad, torch.float64)


def test_a_hard_negative_counts_more_and_an_easy_one_less():
    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    keys, labels = torch.tensor([[0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]]), torch.tensor([0, 1, 2])
    terms = F.supcon_distill_terms(query, keys, label, labels, temperature=1.0, hardness=2.0)
    expected = torch.tensor([0.6, 0.8 + 2 * 0.8, -1.0 - 2 * 1.0]).logsumexp(dim=0) - 0.6
    torch.testing.assert_close(terms.total, expected)


@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_nothing_of_the_size_of_the_similarities_is_made(positives):
    n, q, d = 64, 20_000, 4
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, d, generator=generator, requires_grad=True)
    keys = torch.randn(q, d, generator=generator)
    batch, scores = keys[:n].clone().requires_grad_(), torch.randn(n + q, 1, generator=generator)
    labels = torch.zeros(n + q, dtype=torch.int64)
    with Largest() as largest:
        F.supcon_distill_loss(
            *(query, (batch, keys[n:]), labels[:n], (labels[:n], labels[n:q])),
            query_targets=scores[:n],
            key_targets=(scores[:n], scores[n:q]),
            momentum_query=query.detach(),
            momentum_keys=(keys[:n], keys[n:]),
            temperature=0.5,
            positives=positives,
            positives_from="distance",
            width=1.0,
            hardness=1.0,
            exclude_self=True,
        ).backward()
    assert largest.numel <= max(2 * tiles.TILE_SCORES, q * d)
    assert largest.numel < n * q / 2


def test_without_them_nothing_changes_to_the_bit(monkeypatch):
    for name in WAYS:
        with monkeypatch.context() as patch:
            way(patch, name)
            case = supcon_case(3, 7, 16, 4, ignored=0.2, unlabelled=0.2)
            plain = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3)
            spelt = F.supcon_distill_loss(
                *case.args, **case.momentum, temperature=0.3, positives_from="labels", hardness=0.0, key_targets=None
            )
            assert bits(plain) == bits(spelt)


def test_batches_of_targets_and_of_gradients(monkeypatch):
    case, pairs = pairs_case("distance", 5, 4, 9, 3)
    options = {**case.momentum, "temperature": 0.4, "hardness": 1.0}

    def loss(query, targets):
        given = pairs | {"query_targets": targets}
        return F.supcon_distill_loss(query, case.keys, *case.args[2:], **given, **options)

    shifts = torch.stack([pairs["query_targets"], pairs["query_targets"] + 1])
    several = torch.func.vmap(loss, in_dims=(None, 0))(case.query, shifts)
    torch.testing.assert_close(several, torch.stack([loss(case.query, shift) for shift in shifts]))
    for name in ("matrices", "tiles"):
        way(monkeypatch, name)
        leaves = case.requires_grad()
        rows = F.supcon_distill_loss(*leaves.args, **pairs, **options, reduction="none")
        (batched,) = torch.autograd.grad(
            rows, leaves.keys, torch.eye(len(rows), dtype=rows.dtype), is_grads_batched=True, retain_graph=True
        )
        for i, row in enumerate(rows):
            torch.testing.assert_close(batched[i], torch.autograd.grad(row, leaves.keys, retain_graph=True)[0])


@pytest.mark.parametrize("name", WAYS)
def test_empty_batches_and_rows_without_a_weight(name, monkeypatch):
    way(monkeypatch, name)
    for n, q in ((0, 5), (4, 0), (0, 0)):
        for kind in KINDS:
            case, pairs = pairs_case(kind, 1, n, q, 3)
            case = case.requires_grad()
            loss = F.supcon_distill_loss(*case.args, **case.momentum, **pairs, temperature=0.5, hardness=1.0)
            loss.backward()
            assert loss.item() == 0.0
    case = supcon_case(2, 3, 4, 3, classes=1).requires_grad()
    far = {"query_targets": torch.tensor([0.0, 0.0, 1e6]).double(), "key_targets": torch.zeros(4).double()}
    far |= {"positives_from": "distance", "width": 1.0}  # a weight that is no number but 0
    for positives in ("outside", "inside"):
        terms = F.supcon_distill_terms(*case.args, **case.momentum, **far, temperature=0.5, positives=positives)
        terms.total.backward()
        assert int(terms.rows_with_positive) == 2
        assert case.query.grad.isfinite().all()


@pytest.mark.parametrize("name", WAYS)
def test_a_target_that_counts_and_is_nan_makes_the_loss_nan(name, monkeypatch):
    way(monkeypatch, name)
    for kind, positives, which in itertools.product(KINDS, ["outside", "inside"], ["query_targets", "key_targets"]):
        case, pairs = pairs_case(kind, 3, ignored=0.0, unlabelled=0.0)
        pairs[which][2] = torch.nan
        options = {"temperature": 0.5, "positives": positives, "hardness": 1.0, "reduction": "none"}
        rows = F.supcon_distill_terms(*case.args, **case.momentum, **pairs, **options)
        assert rows.supervised[2].isnan()
        assert not rows.distill.isnan().any()


def test_weights_carry_no_gradient_and_targets_may_not_change_before_it_is_made():
    case, pairs = pairs_case("soft", 5)
    case = case.requires_grad()
    for name in ("query_targets", "key_targets"):
        pairs[name] = pairs[name].nan_to_num().requires_grad_()
    terms = F.supcon_distill_terms(*case.args, **case.momentum, **pairs, temperature=0.5)
    terms.total.backward()
    assert pairs["query_targets"].grad is None
    terms = F.supcon_distill_terms(*case.args, **case.momentum, **pairs, temperature=0.5)
    with torch.no_grad():
        pairs["key_targets"].zero_()
    with pytest.raises(RuntimeError, match="was changed in place"):
        terms.supervised.backward()


def test_values_that_are_no_weights_are_found_with_validate():
    case, pairs = pairs_case("distance", 5)
    options = {**case.momentum, "temperature": 0.5, "validate": True}
    F.supcon_distill_loss(*case.args, **pairs, **options)  # NaN where nobody has a class
    wrong = pairs["key_targets"].clone()
    wrong[(case.key_labels >= 0).nonzero()[0]] = torch.inf
    with pytest.raises(ValueError, match=r"^key_targets: expected finite values"):
        F.supcon_distill_loss(*case.args, **pairs | {"key_targets": wrong}, **options)
    shares = {"query_targets": torch.eye(6, 2).double(), "key_targets": -torch.ones(13, 2).double()}
    with pytest.raises(ValueError, match=r"^key_targets: expected shares of at least 0, got -1"):
        F.supcon_distill_loss(*case.args, **shares, positives_from="overlap", **options)
    del pairs["width"]
    with pytest.raises(ValueError, match=r"^positives_from: expected a function of finite weights of at least 0"):
        F.supcon_distill_loss(*case.args, **pairs | {"positives_from": lambda y, z: y - z}, **options)


def test_the_module_is_the_function_and_tells_what_it_weighs_by():
    case, pairs = pairs_case("distance", 5)
    targets = {name: pairs.pop(name) for name in ("query_targets", "key_targets")}
    loss_fn = md.SupConDistillLoss(temperature=0.5, learnable_temperature=False, **pairs, hardness=2.0)
    assert "positives_from='distance', width=0.8, hardness=2, " in repr(loss_fn)
    expected = F.supcon_distill_terms(*case.args, **case.momentum, **targets, **pairs, hardness=2.0, temperature=0.5)
    assert bits(loss_fn(*case.args, **case.momentum, **targets)) == bits(expected.total)
    assert bits(loss_fn.terms(*case.args, **case.momentum, **targets).supervised) == bits(expected.supervised)
    assert "hardness" not in repr(md.SupConDistillLoss())
    with pytest.raises(ValueError, match=r"^query_targets: expected targets with positives_from='distance', got None"):
        loss_fn(*case.args, **case.momentum)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_queue_carries_scores_beside_unit_rows(balanced):
    """The stream of scores stays in step with the others, and is not normalised."""
    options = {"num_classes": 2, "balanced": balanced, "normalize": ("text",)}
    queue = md.ClassQueue(6, {"text": 2, "score": 1, "raw": 2}, **options)
    assert "normalize=('text',)" in repr(queue)
    for step in range(3):
        scores = torch.tensor([-2.0, 3.0, 0.5]) + step
        rows = scores[:, None] * torch.tensor([[3.0, 4.0]])
        queue.enqueue((scores > 1).long(), {"text": rows, "score": scores[:, None], "raw": rows})
    restored = md.ClassQueue(
        6, {"text": 2, "score": 1, "raw": 2}, num_classes=2, balanced=balanced, normalize=("text",)
    )
    restored.load_state_dict(queue.state_dict())
    for some in (queue, restored):
        (text, labels), (score, _), (raw, _) = (some.read(stream) for stream in ("text", "score", "raw"))
        assert len(labels) == 6
        assert torch.equal(labels, (score[:, 0] > 1).long())
        assert torch.equal(raw, score * torch.tensor([[3.0, 4.0]]))
        torch.testing.assert_close(text, score.sign() * torch.tensor([[0.6, 0.8]]))
