"""Momentum targets that are centred, or balanced by Sinkhorn-Knopp, and their temperature."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.func import functional_call, grad, jvp, vmap

import momentum_distill as md
import reference
from loss_cases import (
    POSITIVES,
    REDUCTIONS,
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
from momentum_distill._contrast import engine, targets, tiles

# Of forward-mode derivatives, and of the compiler.
pytestmark = [pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"), numbers_alone]

TARGETS = ("centred", "sinkhorn")
WAYS = ("matrices", "tiles", "asking nothing", "autograd")


def take(patch, way):
    """One of the ways of the engine; in tiles of three keys."""
    patch.setattr(engine, "DENSE_SCORES", 2**62 if way == "matrices" else -1)
    for name in ("MIN_TILE", "MAX_TILE"):
        patch.setattr(tiles, name, 3)
    if way == "asking nothing":
        without_asking(patch)
    if way == "autograd":
        by_autograd(patch)


def centre_of(case, kind, dtype=torch.float64):
    width = case.query.shape[1]
    return torch.linspace(-0.4, 0.6, width, dtype=dtype) if kind == "centred" else None


def both(case, kind, *, split=None, **options):
    """The library's terms, and those of the loops."""
    centre = centre_of(case, kind)
    args, momentum = case.reference
    expected = reference.supcon_terms(*args, **momentum, momentum_targets=kind, centre=lists(centre), **options)
    case = case if split is None else case.split(*split)
    return F.supcon_distill_terms(
        *case.args, **case.momentum, momentum_targets=kind, centre=centre, **options
    ), expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TARGETS)
def test_terms_are_those_of_the_loops(kind, way, monkeypatch):
    take(monkeypatch, way)
    temperatures = {"temperature": 0.5, "momentum_temperature": 0.2}
    grid = itertools.product(POSITIVES, REDUCTIONS, (True, "query", False), (False, True))
    for seed, (positives, reduction, normalize, exclude_self) in enumerate(grid):
        case = supcon_case(seed, 5, 5 if exclude_self else 8, 4, ignored=0.2, unlabelled=0.2)
        options = {"positives": positives, "reduction": reduction, "normalize": normalize, "alpha": 0.7}
        found, expected = both(case, kind, **options, **temperatures, exclude_self=exclude_self)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TARGETS)
def test_parts_few_rows_and_nothing_at_all(kind, way, monkeypatch):
    take(monkeypatch, way)
    for n, split, options in [
        (5, (5, 4), {}),
        (5, (5, 4, 0), {"exclude_self": True}),
        (1, (1,), {"exclude_self": True}),
        (0, (6,), {}),
        (3, (0,), {}),
    ]:
        for ignored in (0.0, 0.3, 1.0):
            case = supcon_case(n, n, sum(split), 3, ignored=ignored)
            found, expected = both(case, kind, split=split, temperature=0.5, **options)
            for ours, theirs in zip(found, expected, strict=True):
                assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", TARGETS)
def test_narrow_features_lose_what_they_lose_with_the_plain_softmax(kind, dtype):
    case = supcon_case(1, 6, 12, 16, ignored=0.2, dtype=dtype).requires_grad()
    centre = centre_of(case, kind, torch.float32)
    options = {"temperature": 0.1, "momentum_temperature": 0.04, "momentum_targets": kind}
    terms = F.supcon_distill_terms(*case.args, **case.momentum, **options, centre=centre)
    args, momentum = case.reference
    expected = reference.supcon_terms(*args, **momentum, **options, centre=lists(centre))
    assert terms.total.dtype == torch.float32
    for ours, theirs in zip(terms[:3], expected[:3], strict=True):
        assert_close(ours, theirs, torch.float32)
    terms.total.backward()
    wide = case.map(lambda x: x.detach().double()).requires_grad()
    F.supcon_distill_loss(*wide.args, **wide.momentum, **options, centre=centre).backward()
    assert_gradient_close(case.query.grad, wide.query.grad, dtype)
    assert_gradient_close(case.keys.grad, wide.keys.grad, dtype)


@pytest.mark.parametrize("way", ["matrices", "tiles"])
@pytest.mark.parametrize("kind", TARGETS)
def test_gradients(kind, way, monkeypatch):
    take(monkeypatch, way)
    for normalize, same in itertools.product((True, "query", False), (False, True)):
        case = supcon_case(2, 4, 6, 3, ignored=0.2, unlabelled=0.1).requires_grad()
        numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.4)]
        frozen = case.keys.detach().clone()  # what U is made of stands still

        def f(query, keys, temperature, alpha, case=case, normalize=normalize, momentum_keys=None):
            return F.supcon_distill_loss(
                query,
                keys,
                case.query_labels,
                case.key_labels,
                momentum_query=case.momentum_query,
                momentum_keys=case.momentum_keys if momentum_keys is None else momentum_keys,
                temperature=temperature,
                momentum_temperature=0.3,
                alpha=alpha,
                momentum_targets=kind,
                centre=centre_of(case, kind),
                normalize=normalize,
            )

        inputs = (case.query, case.keys, *numbers)
        if not same:
            assert torch.autograd.gradcheck(f, inputs, atol=1e-8)
            assert normalize is not True or torch.autograd.gradgradcheck(f, inputs, atol=1e-7)
            continue
        ours = torch.autograd.grad(f(*inputs, momentum_keys=case.keys), inputs)
        for one, other in zip(ours, torch.autograd.grad(f(*inputs, momentum_keys=frozen), inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TARGETS)
def test_what_absent_rows_and_keys_hold_changes_nothing(kind, way, monkeypatch):
    take(monkeypatch, way)
    answers = []
    for held in (0.0, math.nan, math.inf):
        case = supcon_case(3, 6, 9, 4, ignored=0.3)
        for name, labels in (("query", case.query_labels), ("keys", case.key_labels)):
            assert (labels == -1).any()
            for prefix in ("", "momentum_"):
                getattr(case, prefix + name)[labels == -1] = held
        case = case.requires_grad()
        loss_fn = md.SupConDistillLoss(momentum_targets=kind).double()
        loss_fn(*case.args, **case.momentum).backward()
        loss = loss_fn(*case.args, **case.momentum)
        loss.backward()
        answers.append([bits(x) for x in (loss, case.query.grad, case.keys.grad)])
        assert case.query.grad.isfinite().all()
        assert case.keys.grad.isfinite().all()
    assert answers[0] == answers[1] == answers[2]


def test_sinkhorn_gives_all_keys_nearly_the_same_share():
    case = supcon_case(4, 64, 20, 8)
    logits = F.contrast_logits(case.momentum_query, case.momentum_keys, temperature=0.2)
    shares = []
    for iterations in (0, 3, 200):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(targets, "ITERATIONS", iterations)
            problem = md.functional.read_problem(
                *case.args, *case.momentum.values(), 0.2, 0.2, 0.4, "outside", "mean", True, -1, False, None, False,
                momentum_targets="sinkhorn",
            )  # fmt: skip
        bias = problem.keys[0].momentum[:, -1] / 0.2
        shares.append((logits + bias).softmax(dim=1).mean(dim=0))
    plain, three, many = ((share * 20 - 1).abs().max() for share in shares)
    assert three < plain / 10
    assert many < 1e-12


def test_memory_is_flat_and_a_tile_is_as_large_as_ever():
    n, q, d = 64, 40_000, 8
    g = torch.Generator().manual_seed(0)
    query, momentum_query = (torch.randn(n, d, generator=g).requires_grad_(i == 0) for i in range(2))
    keys, momentum_keys = (torch.randn(q, d, generator=g) for _ in range(2))
    labels, key_labels = (torch.randint(3, (rows,), generator=g) for rows in (n, q))
    momentum = {"momentum_query": momentum_query, "momentum_keys": momentum_keys}
    for kind in TARGETS:
        centre = torch.zeros(d) if kind == "centred" else None
        options = {"temperature": 0.5, "momentum_targets": kind, "centre": centre}
        with Largest() as largest:
            F.supcon_distill_loss(query, keys, labels, key_labels, **momentum, **options).backward()
        assert largest.numel <= max(2 * tiles.TILE_SCORES, q * (d + 1))
        assert largest.numel < n * q / 4


# The loss with its state


def loss_and_case(**options):
    return md.SupConDistillLoss(temperature=0.3, **options).double(), supcon_case(
        5, 6, 8, 4, ignored=0.2
    ).requires_grad()


def test_the_temperature_of_the_targets():
    case = supcon_case(6)
    plain = md.SupConDistillLoss(temperature=0.3)
    assert bits(plain(*case.args, **case.momentum)) == bits(
        F.supcon_distill_loss(*case.args, **case.momentum, temperature=plain._temperature(case.query))
    )

    def expected(tau):
        return F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3, momentum_temperature=tau).item()

    fixed = md.SupConDistillLoss(temperature=0.3, momentum_temperature=0.1)
    assert_close(fixed(*case.args, **case.momentum), expected(0.1))
    assert_close(fixed.terms(*case.args, **case.momentum).total, expected(0.1))
    assert_close(fixed(*case.args, **case.momentum, momentum_temperature=0.2), expected(0.2))
    assert_close(
        plain(*case.args, **case.momentum, momentum_temperature=torch.tensor(0.2, dtype=torch.float64)), expected(0.2)
    )
    assert "momentum_temperature=0.1, " in repr(fixed)
    assert "momentum_temperature" not in repr(plain)


def warm_up(call):
    return 0.1 + 0.05 * call


def test_a_function_gets_the_number_of_calls_that_train():
    loss_fn, case = loss_and_case(momentum_temperature=warm_up)

    def call(**override):
        return loss_fn(*case.args, **case.momentum, **override).item()

    def expected(tau):
        return F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3, momentum_temperature=tau).item()

    close = pytest.approx
    assert call() == close(expected(0.1), rel=1e-9)
    assert loss_fn.terms(*case.args, **case.momentum).total.item() == close(expected(0.15), rel=1e-9)
    with torch.no_grad():
        assert call() == close(expected(0.2), rel=1e-9)
    loss_fn.eval()
    assert call() == close(expected(0.2), rel=1e-9)
    loss_fn.train()
    assert call(momentum_temperature=0.5) == close(expected(0.5), rel=1e-9)  # which counts
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert other(*case.args, **case.momentum).item() == close(expected(0.25), rel=1e-9)
    fresh, _ = loss_and_case(momentum_temperature=warm_up)
    fresh.load_state_dict(loss_fn.state_dict())
    assert fresh(*case.args, **case.momentum).item() == call() == close(expected(0.25), rel=1e-9)

    old = md.SupConDistillLoss(temperature=0.4).state_dict()
    assert old["_extra_state"].shape == ()  # as it always was
    fresh.load_state_dict(old)
    assert (fresh._calls, fresh.initial_temperature) == (0, 0.4)
    plain, _ = loss_and_case()
    plain.load_state_dict(loss_fn.state_dict())
    assert plain.initial_temperature == 0.3


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "0.1", None])
def test_a_function_that_returns_no_temperature_is_refused_and_nothing_counts(value):
    loss_fn, case = loss_and_case(momentum_temperature=lambda _: value, momentum_targets="centred")
    with pytest.raises((TypeError, ValueError), match=r"^momentum_temperature: expected a"):
        loss_fn(*case.args, **case.momentum)
    assert (loss_fn._calls, loss_fn.centre) == (0, None)


@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
def test_a_batch_is_centred_by_what_came_before_it(normalize):
    loss_fn, _ = loss_and_case(momentum_targets="centred", normalize=normalize, momentum_temperature=0.2)
    centre = [0.0] * 4
    for step in range(4):
        case = supcon_case(step, 6, 8, 4, ignored=0.3).requires_grad()
        args, momentum = case.reference
        options = {"temperature": 0.3, "momentum_temperature": 0.2, "momentum_targets": "centred"}
        options["normalize"] = normalize
        expected = reference.supcon(*args, **momentum, **options, centre=centre)
        assert_close(loss_fn(*case.args, **case.momentum), expected)
        rows = momentum["momentum_query"]
        if normalize is False:
            centre = [0.9 * c + 0.1 * x for c, x in zip(centre, mean(rows, args[2]), strict=True)]
        else:
            centre = reference.centre_update(centre, rows, args[2])
        assert_close(loss_fn.centre, centre)


def mean(rows, labels):
    kept = [row for row, label in zip(rows, labels, strict=True) if label != -1]
    return [math.fsum(column) / len(kept) for column in zip(*kept, strict=True)]


def test_a_centre_stands_where_nothing_is_learned():
    loss_fn, case = loss_and_case(momentum_targets="centred")
    loss_fn(*case.args)  # without momentum inputs
    assert loss_fn.centre is None
    loss_fn(*case.args, **case.momentum)
    before = bits(loss_fn.centre)
    with torch.no_grad():
        loss_fn(*case.args, **case.momentum)
    query, keys, labels, key_labels = case.args
    loss_fn(query, keys, torch.full_like(labels, -1), key_labels, **case.momentum)
    broken = torch.full_like(case.momentum_query, torch.inf)
    assert loss_fn(*case.args, momentum_query=broken, momentum_keys=case.momentum_keys).isnan()
    with pytest.raises(ValueError, match=r"^centre: expected shape \(3,\), got \(4,\)"):
        loss_fn(*supcon_case(0, d=3).args, **supcon_case(0, d=3).momentum)
    loss_fn.eval()(*case.args, **case.momentum)
    parameters = dict(loss_fn.train().named_parameters())
    grad(lambda p: functional_call(loss_fn, p, case.args, case.momentum))(parameters)
    assert bits(loss_fn.centre) == before


def test_a_centre_is_saved_loaded_copied_and_never_narrow():
    loss_fn, case = loss_and_case(momentum_targets="centred")
    empty = loss_fn.state_dict()
    loss_fn(*case.args, **case.momentum)
    fresh, _ = loss_and_case(momentum_targets="centred")
    fresh.load_state_dict(loss_fn.state_dict())
    copies = [fresh, copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))]
    fixed = md.SupConDistillLoss(momentum_targets="centred", learnable_temperature=False)
    fixed.load_state_dict({k: v for k, v in loss_fn.state_dict().items() if k != "log_temperature_ratio"})
    assert bits(fixed.centre) == bits(loss_fn.centre)
    expected = loss_fn(*case.args, **case.momentum)
    for other in copies:
        assert bits(other(*case.args, **case.momentum)) == bits(expected)
        assert bits(other.centre) == bits(loss_fn.centre)
    loss_fn.load_state_dict(empty)  # of before any training
    assert loss_fn.centre is None
    with pytest.raises(RuntimeError, match="centre"):
        md.SupConDistillLoss().load_state_dict(fresh.state_dict())
    assert fresh.half().centre.dtype == torch.float64
    assert "momentum_targets='centred'" in repr(fresh)
    narrow = md.SupConDistillLoss(momentum_targets="centred")
    half = supcon_case(0, dtype=torch.bfloat16)
    narrow(*half.args, **half.momentum)
    assert narrow.centre.dtype == torch.float32


@pytest.mark.parametrize("kind", TARGETS)
def test_the_module_is_the_function(kind):
    for normalize, exclude_self, ignore_index in itertools.product((True, "query", False), (False, True), (-1, 2)):
        case = supcon_case(7, 6, 6, 4)
        case.query_labels[1] = case.key_labels[3] = ignore_index
        options = {"normalize": normalize, "exclude_self": exclude_self, "ignore_index": ignore_index}
        options["momentum_targets"] = kind
        loss_fn = md.SupConDistillLoss(temperature=0.3, **options)
        loss_fn(*case.args, **case.momentum)
        centre = loss_fn.centre.clone() if kind == "centred" else None
        expected = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3, centre=centre, **options)
        assert_close(loss_fn(*case.args, **case.momentum), expected.item())


# Compilers and transforms


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fused_scores", [2**14, -1], ids=["formulas", "operator"])
@pytest.mark.parametrize("kind", [pytest.param("softmax", marks=pytest.mark.long), *TARGETS])
@pytest.mark.grid
def test_compiled_code_gives_the_same_and_compiles_no_more_after_step_two(kind, fused_scores, monkeypatch):
    monkeypatch.setattr(engine, "FUSED_SCORES", fused_scores)
    tau = warm_up if kind == "softmax" else 0.2
    loss_fn, _ = loss_and_case(momentum_targets=kind, momentum_temperature=tau)
    eager = copy.deepcopy(loss_fn)
    # A function is called between two graphs.
    compiled = torch.compile(loss_fn, fullgraph=kind != "softmax", backend="aot_eager")
    for step in range(5):
        case = supcon_case(step, 6, 12, 4, ignored=0.2).requires_grad()
        grads = []
        with torch.compiler.set_stance("fail_on_recompile" if step > 2 else "default"):
            value = compiled(*case.args, **case.momentum)
        for loss in (value, eager(*case.args, **case.momentum)):
            assert_close(loss, value.item())
            case.query.grad = case.keys.grad = None
            loss.backward()
            grads.append([case.query.grad, case.keys.grad])
        torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    if kind == "centred":
        torch.testing.assert_close(loss_fn.centre, eager.centre, rtol=1e-13, atol=0)
    assert loss_fn._calls == eager._calls


@pytest.mark.usefixtures("fresh_compiler")
def test_batches_of_any_size_compile_twice():
    """How many tiles there are is all that a compiler takes for a constant."""
    loss_fn, _ = loss_and_case(momentum_targets="sinkhorn")
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for step, rows in enumerate((40, 41, 64, 33, 100)):
        case = supcon_case(step, rows, 70, 4, ignored=0.2)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            assert_close(compiled(*case.args, **case.momentum), loss_fn(*case.args, **case.momentum).item())


@pytest.mark.parametrize("kind", TARGETS)
def test_transforms_give_what_backward_gives(kind):
    case = supcon_case(8, 5, 7, 4, ignored=0.2).requires_grad()
    centre = centre_of(case, kind)

    def loss(query, momentum_query=case.momentum_query):
        return F.supcon_distill_loss(
            query, *case.args[1:], momentum_query=momentum_query, momentum_keys=case.momentum_keys,
            temperature=0.5, momentum_targets=kind, centre=centre,
        )  # fmt: skip

    (expected,) = torch.autograd.grad(loss(case.query), case.query)
    torch.testing.assert_close(grad(loss)(case.query.detach()), expected, rtol=1e-11, atol=1e-13)
    still = torch.ones_like(case.momentum_query)
    _, slope = jvp(lambda m: loss(case.query.detach(), m), (case.momentum_query,), (still,))
    assert slope.abs().max() == 0
    queries = torch.stack([case.query.detach(), case.query.detach() + 1])
    rows = vmap(grad(loss))(queries, torch.stack([case.momentum_query, case.momentum_query + 1]))
    torch.testing.assert_close(rows[0], expected, rtol=1e-11, atol=1e-13)


def test_a_state_without_this_loss_leaves_its_centre():
    system = torch.nn.ModuleDict(
        {"backbone": torch.nn.Linear(1, 1), "loss": md.SupConDistillLoss(momentum_targets="centred")}
    )
    system["loss"].centre = torch.tensor([1.0, 2.0])
    part = {name: value for name, value in system.state_dict().items() if name.startswith("backbone")}
    system.load_state_dict(part, strict=False)
    assert system["loss"].centre.tolist() == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
def test_a_distributed_checkpoint_reads_the_centre_into_one_that_is_there(tmp_path):
    """As docs/recipes.md says."""
    saved, loaded = (md.SupConDistillLoss(momentum_targets="centred") for _ in range(2))
    saved.centre, loaded.centre = torch.tensor([1.0, 2.0]), torch.zeros(2)
    dcp.save(saved.state_dict(), checkpoint_id=tmp_path)
    state = loaded.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    loaded.load_state_dict(state)
    assert loaded.centre.tolist() == [1.0, 2.0]
