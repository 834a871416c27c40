"""The lean kernels against the formulas in float64, on the GPU or in Triton's interpreter.

`test_triton.py` runs this file in a process of its own: the interpreter must be chosen before Triton is imported, and
for the whole process. By hand, from the root of the repository:

    python -m pytest tests/contrast/lean_cases.py                      # on the GPU
    TRITON_INTERPRET=1 python -m pytest tests/contrast/lean_cases.py   # without one
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from loss_cases import POSITIVES, REDUCTIONS, RTOL, bits, lists, without_asking
from momentum_distill import functional
from momentum_distill._contrast import lean, lean_kernels
from momentum_distill._contrast.lean import Part
from tiers import times

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TERMS = ("total", "supervised", "distill", "rows", "rows_with_positive")

# NumPy, by which the interpreter computes, speaks of every NaN and of -inf - -inf, and of how Triton 3.5 calls it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


class Problem:
    """Arguments of one call; what is absent holds NaN. Rows are rounded to 16 bits already, as the kernel would."""

    def __init__(
        self, n=5, parts=(70,), d=16, dtype=F32, *, momentum="other", classes=3, ignored=0.2, seed=0, lengths=False
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.query, self.query_labels = self.rows(n, d, lengths), self.labels(n, classes, ignored)
        self.query[self.query_labels == -1] = torch.nan
        self.momentum_query = None if momentum == "none" else self.rows(n, d, lengths)
        self.parts = []
        for count in parts:
            keys, labels = self.rows(count, d, lengths), self.labels(count, classes, ignored)
            keys[labels == -1] = torch.nan
            other = {"none": None, "same": keys, "other": self.rows(count, d, lengths)}[momentum]
            if momentum == "other":
                other[labels == -1] = torch.inf
            self.parts.append(Part(keys, other, labels))

    def rows(self, count, d, lengths):
        unit = torch.nn.functional.normalize(torch.randn(count, d, generator=self.generator), dim=1)
        if lengths:  # of any length, and one without direction
            scale = torch.logspace(-2, 3, count)[:, None]
            scale[count // 2] = 0.0
            unit = unit * scale
        return unit.to(self.dtype).to(DEVICE)

    def labels(self, count, classes, ignored):
        labels = torch.randint(classes, (count,), generator=self.generator)
        fate = torch.rand(count, generator=self.generator)
        labels[fate < 0.1 + ignored] = -2
        labels[fate < ignored] = -1
        return labels.to(DEVICE)

    def options(self, **options):
        given = {"positives": "outside", "reduction": "mean", "normalize": "query", "ignore_index": -1}
        return given | {"temperature": 0.25, "momentum_temperature": 0.5, "alpha": 0.4} | options


def answer(problem, upstream=None, num_splits=None, **options):
    """The terms, and the three gradients times `upstream`."""
    options = problem.options(**options)
    alpha, reduction = options.pop("alpha"), options.pop("reduction")
    solved = lean.solve(
        problem.query, problem.momentum_query, problem.parts, problem.query_labels, num_splits=num_splits, **options
    )
    taught = problem.momentum_query is not None
    found = lean.finish(solved, solved.sums, alpha=alpha, taught=taught, reduction=reduction)
    if upstream is None:
        upstream = torch.ones_like(found.total)
    return found, lean.scale(found, upstream, query=F32)


def formulas(problem, upstream=None, **options):
    """The same by plain autograd, in float64."""
    options = problem.options(**options)
    leaves = [problem.query.double().cpu().requires_grad_()]
    for name in ("temperature", "alpha"):
        leaves.append(torch.tensor(float(options.pop(name)), dtype=torch.float64, requires_grad=True))
    options["momentum_temperature"] = float(options["momentum_temperature"])
    momentum = {}
    if problem.momentum_query is not None:
        momentum["momentum_query"] = problem.momentum_query.double().cpu()
        momentum["momentum_keys"] = tuple(part.momentum.double().cpu() for part in problem.parts)
    terms = functional.supcon_distill_terms(
        leaves[0],
        tuple(part.keys.double().cpu() for part in problem.parts),
        problem.query_labels.cpu(),
        tuple(part.labels.cpu() for part in problem.parts),
        temperature=leaves[1],
        alpha=leaves[2],
        **momentum,
        **options,
    )
    upstream = torch.ones_like(terms.total) if upstream is None else upstream.double().cpu()
    grads = torch.autograd.grad((terms.total * upstream).sum(), leaves, allow_unused=True)
    return terms, [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def assert_equal(actual, expected, dtype, taught, upstream):
    """Numbers relative, below 0.1 absolute; gradients, times an upstream of this length, as vectors over all rows."""
    (terms, grads), (exact_terms, exact_grads) = actual, expected
    for name in TERMS:
        x, y = getattr(terms, name).double().cpu(), getattr(exact_terms, name).double()
        assert x.shape == y.shape, name
        torch.testing.assert_close(
            x, y, rtol=RTOL[dtype], atol=0.1 * RTOL[dtype], equal_nan=True, msg=f"{name}\n{x}\n{y}"
        )
    for name, x, y in zip(("query", "temperature", "alpha"), grads, exact_grads, strict=True):
        if name == "alpha" and not taught:
            continue
        x, y = x.double().cpu(), y.detach()
        assert x.shape == y.shape, name
        assert torch.equal(x.isnan(), y.isnan()), name
        x, y = x.nan_to_num(), y.nan_to_num()
        # A gradient is a difference of means of keys: what rounding costs is seen beside these, not beside itself.
        # A scalar's is a sum over rows that may cancel, each with the rounding of logits up to 4.
        size = y.norm().clamp_min(0.1) if name == "query" else y.norm().clamp_min(max(0.1, upstream))
        bound = 3 * RTOL[dtype] * size
        assert (x - y).norm() <= bound, f"{name}: error {(x - y).norm()}, bound {bound}"


def check(problem, upstream=None, num_splits=None, **options):
    actual = answer(problem, upstream, num_splits, **options)
    taught = problem.momentum_query is not None
    length = 1.0 if upstream is None else upstream.norm().item()
    assert_equal(actual, formulas(problem, upstream, **options), problem.dtype, taught, length)
    return actual


@settings(max_examples=times(6, 40, 300))
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 70),
    parts=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    d=st.integers(1, 40),
    dtype=st.sampled_from([F32, BF16, F16]),
    momentum=st.sampled_from(["none", "same", "other"]),
    classes=st.sampled_from([1, 3, 1000]),
    ignored=st.sampled_from([0.0, 0.3]),
    num_splits=st.sampled_from([None, 1, 3]),
    positives=st.sampled_from(POSITIVES),
    reduction=st.sampled_from(REDUCTIONS),
    normalize=st.sampled_from([True, "query", False]),
)
def test_the_terms_and_gradients_equal_their_formulas(num_splits, positives, reduction, normalize, seed, **sizes):
    problem = Problem(**sizes, seed=seed, lengths=normalize is True)
    upstream = torch.randn(len(problem.query), generator=problem.generator).to(DEVICE)
    upstream = upstream if reduction == "none" else upstream[0]
    check(problem, upstream, num_splits, positives=positives, reduction=reduction, normalize=normalize)


def test_the_terms_equal_slow_loops():
    """`reference.py` shares no line with the library; it leaves out absent rows, but multiplies them before."""

    def numbers(x):
        return lists(x.nan_to_num(0.0, 0.0) if x.is_floating_point() else x)

    for positives, reduction in zip(POSITIVES, REDUCTIONS, strict=True):
        problem = Problem(seed=3)
        terms, _ = answer(problem, positives=positives, reduction=reduction, momentum_temperature=0.25)
        part = problem.parts[0]
        expected = reference.supcon_terms(
            *map(numbers, (problem.query, part.keys, problem.query_labels, part.labels)),
            temperature=0.25,
            momentum_query=numbers(problem.momentum_query),
            momentum_keys=numbers(part.momentum),
            positives=positives,
            reduction=reduction,
            normalize="query",
        )
        for x, y in zip(terms[:5], expected, strict=True):
            torch.testing.assert_close(x.cpu().double(), torch.tensor(y).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.grid
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("d", [1, 100, 128])
@pytest.mark.parametrize("n", [1, 65])
def test_any_width_and_any_block_of_rows(n, d, dtype):
    check(Problem(n, (140,), d, dtype, seed=d))


@pytest.mark.long
@pytest.mark.parametrize("normalize", ["query", True], ids=str)
def test_dtypes_may_differ_and_parts_may_share_their_momentum_keys(normalize):
    problem = Problem(9, (40, 150, 30), 20, lengths=normalize is True)
    dtypes = [(BF16, F32), (F32, F16), (F16, None)]
    for index, (own, other) in enumerate(dtypes):
        keys, momentum, labels = problem.parts[index]
        keys = keys.to(own)
        problem.parts[index] = Part(keys, keys if other is None else momentum.to(other), labels)
    problem.query, problem.momentum_query = problem.query.to(BF16), problem.momentum_query.to(F16)
    problem.dtype = BF16
    check(problem, normalize=normalize)


def test_one_class_for_each_row():
    problem = Problem(70, (200,), momentum="same", ignored=0.0)
    problem.query_labels = torch.randperm(70, generator=problem.generator).to(DEVICE)
    labels = torch.randint(90, (200,), generator=problem.generator).to(DEVICE)
    problem.parts = [problem.parts[0]._replace(labels=labels)]
    check(problem)


@pytest.mark.long
def test_labels_of_64_bits_stay_apart():
    problem = Problem(4, (6,), momentum="none", ignored=0.0)
    problem.query_labels = torch.tensor([0, 2**32, 2**62, 1]).to(DEVICE)
    problem.parts = [problem.parts[0]._replace(labels=torch.tensor([2**32, 0, 2**62, 2**31, 1, 1]).to(DEVICE))]
    for positives in POSITIVES:
        check(problem, positives=positives, reduction="none")


@pytest.mark.long
def test_a_label_to_ignore_may_be_a_class():
    problem = Problem(ignored=0.0)
    for positives in POSITIVES:
        check(problem, positives=positives, ignore_index=2)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**12])
def test_huge_and_tiny_rows(scale, dtype):
    """Without normalisation logits are as large as they are, and a query may leave the range of float16."""
    problem = Problem(6, (80,), 24, F32 if dtype == F32 else dtype)
    problem.query, problem.momentum_query = problem.query.float() * scale, problem.momentum_query.float() * scale
    options = {"normalize": False, "temperature": 0.5, "reduction": "none", "positives": "inside"}
    if scale < 1:
        check(problem, **options)
    else:  # one key takes it all: differences of logits of 8000 have few digits
        terms, grads = answer(problem, **options)
        exact, exact_grads = formulas(problem, **options)
        for name in TERMS:
            x, y = getattr(terms, name).double().cpu(), getattr(exact, name).double()
            torch.testing.assert_close(x, y, rtol=RTOL[dtype], atol=8000 * RTOL[dtype])
        assert all(x.isfinite().all() for x in grads)
        assert exact_grads[0].isfinite().all()


def test_float16_keeps_many_faint_weights():
    # 1000 keys of weight 2e-8 each, which float16 rounds to 0.
    problem = Problem(1, (1001,), 2, F16, momentum="none", ignored=0.0)
    keys = torch.zeros(1001, 2, dtype=F16, device=DEVICE)
    keys[0, 0], keys[1:, 1] = 1.0, 1.0
    problem.query = torch.tensor([[1.0, 0.0]], device=DEVICE)
    problem.query_labels = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    problem.parts = [Part(keys, None, torch.tensor([0] + [-2] * 1000).to(DEVICE))]
    _, (grad, *_) = answer(problem, normalize=False, temperature=1 / 17.75)
    torch.testing.assert_close(grad[0, 1].item(), 17.75 * 1000 * 2.71828182845905**-17.75, rtol=RTOL[F16], atol=0)


def test_without_a_key_or_a_row_the_loss_is_0():
    for rows, keys, positives in ((-1, 0, "outside"), (0, -1, "inside"), (-1, -1, "inside_per_positive")):
        problem = Problem(ignored=0.0)
        problem.query_labels = torch.full_like(problem.query_labels, rows)
        labels = torch.full_like(problem.parts[0].labels, keys)
        problem.parts = [problem.parts[0]._replace(labels=labels)]
        if rows < 0:
            problem.query.fill_(torch.nan)
        if keys < 0:
            problem.parts[0].keys.fill_(torch.nan)
            problem.parts[0].momentum.fill_(torch.inf)
        terms, grads = check(problem, positives=positives, num_splits=3)
        assert all(x == 0 for x in terms[:3])
        assert all((x == 0).all() for x in grads)


@pytest.mark.long
@pytest.mark.parametrize("at", [50, 3])
def test_nan_in_a_present_key_makes_every_row_nan(at):
    problem = Problem(5, (200,), ignored=0.0, momentum="other")
    problem.parts[0].labels[199] = -1  # so that tiles with and without a mask are met
    problem.parts[0].keys[at] = torch.nan
    terms, (grad, *_) = answer(problem, reduction="none", num_splits=2)
    assert terms.supervised.isnan().all()
    assert grad.isnan().all()
    problem = Problem(5, (200,), ignored=0.0, momentum="other")
    problem.parts[0].momentum[at] = torch.nan
    terms, (grad, *_) = answer(problem, reduction="none")
    assert terms.supervised.isfinite().all()
    assert terms.distill.isnan().all()
    assert grad.isnan().all()


@pytest.mark.long
def test_nan_in_a_query_stays_in_its_row():
    problem = Problem(5, (70,), ignored=0.0)
    clean, (clean_grad, *_) = answer(problem, reduction="none")
    for name in ("query", "momentum_query"):
        dirty = Problem(5, (70,), ignored=0.0)
        getattr(dirty, name)[2, 0] = torch.nan
        terms, (grad, *_) = answer(dirty, reduction="none")
        others = [0, 1, 3, 4]
        assert torch.equal(terms.total[others], clean.total[others])
        assert torch.equal(grad[others], clean_grad[others])
        assert terms.distill[2].isnan()
        assert terms.supervised[2].isnan() == (name == "query")
        assert grad[2].isnan().all()


@pytest.mark.long
def test_splits_agree_with_the_whole_and_equal_inputs_give_equal_bits():
    problem = Problem(3, (300,), 20)
    for positives in ("outside", "inside"):
        whole = answer(problem, num_splits=1, positives=positives)
        once, again = (answer(problem, num_splits=3, positives=positives) for _ in range(2))
        assert [bits(x) for x in [*once[0], *once[1]]] == [bits(x) for x in [*again[0], *again[1]]]
        for x, y in zip([*once[0], *once[1]], [*whole[0], *whole[1]], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_tensor_descriptors_load_the_same_keys(dtype, monkeypatch):
    """Widths with padding, strides, a last tile that is not full; unaligned rows go without."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has none")
    results = []
    for tma in (True, False):
        monkeypatch.setattr(lean, "TMA", tma)
        results.append(answer(Problem(5, (300,), 48, dtype, ignored=0.002), num_splits=2))
    for x, y in zip([*results[0][0], *results[0][1]], [*results[1][0], *results[1][1]], strict=True):
        assert bits(x) == bits(y)
    monkeypatch.setattr(lean, "TMA", True)
    check(Problem(5, (70,), 17, dtype))  # rows of 34 or 68 bytes


@pytest.mark.long
def test_rows_may_lie_apart_or_across():
    problem = Problem()
    expected = answer(problem)
    apart = torch.full((70, 40), torch.nan, device=DEVICE)
    keys, momentum, labels = problem.parts[0]
    apart[:, :16] = keys
    spread = torch.stack([labels, labels], 1)[:, 0]
    problem.parts = [Part(apart[:, :16], momentum.T.contiguous().T, spread)]
    problem.query = problem.query.T.contiguous().T
    found = answer(problem)
    assert [bits(x) for x in [*found[0], *found[1]]] == [bits(x) for x in [*expected[0], *expected[1]]]


@pytest.mark.long
def test_learned_numbers_are_read_on_the_device():
    problem = Problem()
    numbers = {"temperature": 0.25, "momentum_temperature": 0.5, "alpha": 0.375}
    expected = answer(problem, **numbers)
    for dtype in (torch.float64, BF16):
        tensors = {name: torch.tensor(x, device=DEVICE, dtype=dtype) for name, x in numbers.items()}
        found = answer(problem, **tensors)
        assert [bits(x) for x in [*found[0], *found[1]]] == [bits(x) for x in [*expected[0], *expected[1]]]


@pytest.mark.long
def test_sums_of_several_processes_make_their_common_terms():
    """Two halves of a batch, each finished with the sums of both: terms as of all, gradients as DDP averages them."""
    whole = Problem(12, (70,), d=16, seed=5)
    expected, (grad, *_) = answer(whole)
    halves = []
    for chosen in (slice(0, 6), slice(6, 12)):
        half = Problem(12, (70,), d=16, seed=5)
        half.query, half.momentum_query = half.query[chosen], half.momentum_query[chosen]
        half.query_labels = half.query_labels[chosen]
        halves.append(half)
    options = whole.options()
    alpha, reduction = options.pop("alpha"), options.pop("reduction")
    solved = [lean.solve(x.query, x.momentum_query, x.parts, x.query_labels, **options) for x in halves]
    together = sum(x.sums.sum(0, keepdim=True) for x in solved)
    answers = [lean.finish(x, together, alpha=alpha, taught=True, reduction=reduction, world=2) for x in solved]
    for found in answers:
        for x, y in zip(found[:5], expected[:5], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([x.grad_query for x in answers]) / 2, grad, rtol=1e-5, atol=1e-7)
    mean = sum(x.grad_temperature for x in answers) / 2
    torch.testing.assert_close(mean, expected.grad_temperature, rtol=1e-5, atol=1e-6)


def test_gradients_come_in_the_dtypes_of_what_they_are_for():
    problem = Problem()
    found, (expected, *_) = answer(problem, reduction="none")
    upstream = torch.ones((), device=DEVICE).expand(5)  # as from sum().backward()
    grads = lean.scale(found, upstream, query=BF16, temperature=torch.float64, alpha=F16)
    assert [x.dtype for x in grads] == [BF16, torch.float64, F16]
    torch.testing.assert_close(grads[0], expected.to(BF16))


class Starts(TorchDispatchMode):
    """Counts operations that start something on a device: no views, no memory alone."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.arguments)
        if not (view or "empty" in str(function) or "detach" in str(function)):
            self.names.append(str(function))
        return function(*args, **kwargs or {})


class Counted:
    """A kernel that writes down that it was launched."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launched.append(self.name)
            # What the interpreter does with its copies is not part of the call.
            with torch.utils._python_dispatch._disable_current_modes():
                return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.long
def test_few_launches_and_no_operation_besides(monkeypatch):
    launched = []
    names = ("prologue", "attend", "sum_classes", "merge", "finish", "scale")
    for name in names:
        monkeypatch.setattr(lean_kernels, name, Counted(name, getattr(lean_kernels, name), launched))
    problem = Problem(64, (1024,), 128, BF16)
    options = problem.options(temperature=torch.tensor(0.25, device=DEVICE), alpha=torch.tensor(0.4, device=DEVICE))
    arguments = (problem.query, problem.momentum_query, problem.parts, problem.query_labels)
    with Starts() as starts:
        found = lean.contrast(*arguments, **options)
        lean.scale(found, found.total, query=BF16)
    assert starts.names == []
    assert launched == list(names)
    launched.clear()
    lean.contrast(*arguments, **options | {"positives": "inside"})
    assert launched == ["prologue", "attend", "merge", "finish"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_loss_takes_this_way_where_it_is_asked_for(reduction, monkeypatch):
    """Value and gradients, through the public function, and those that other ways have to make."""
    problem = Problem(9, (70,), 16, F32)
    launched, answers = [], []
    monkeypatch.setattr(lean_kernels, "scale", Counted("scale", lean_kernels.scale, launched))
    for way in ("lean", "0"):
        monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", way)
        temperature, alpha = (x.to(DEVICE).requires_grad_() for x in (torch.tensor(0.25), torch.tensor(0.3)))
        query, keys = problem.query.clone().requires_grad_(), problem.parts[0].keys.clone()
        terms = functional.supcon_distill_terms(
            query, keys, problem.query_labels, problem.parts[0].labels, temperature=temperature, alpha=alpha,
            momentum_query=problem.momentum_query, momentum_keys=problem.parts[0].momentum, reduction=reduction,
        )  # fmt: skip
        inputs = [query, temperature, alpha]
        weights = torch.linspace(0.5, 2, 9, device=DEVICE) if reduction == "none" else torch.tensor(2.0, device=DEVICE)
        total = torch.autograd.grad(terms.total, inputs, weights, retain_graph=True)
        term = torch.autograd.grad(terms.supervised, query, weights)
        answers.append([*terms, *total, *term])
        counted = list(launched)
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counted == ["scale"]


def test_a_whole_call_starts_at_most_eight_times(monkeypatch):
    """Checks, terms, backward pass and what autograd itself does, as on a device whose values nobody looks at."""
    monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", "lean")
    without_asking(monkeypatch)
    launched = []
    for name in ("prologue", "attend", "sum_classes", "merge", "finish", "scale"):
        monkeypatch.setattr(lean_kernels, name, Counted(name, getattr(lean_kernels, name), launched))
    problem = Problem(64, (1024,), 128, BF16)
    query, temperature = problem.query.clone().requires_grad_(), torch.tensor(0.25, device=DEVICE, requires_grad=True)
    momentum = {"momentum_query": problem.momentum_query, "momentum_keys": problem.parts[0].momentum}
    labels = (problem.query_labels, problem.parts[0].labels)
    with Starts() as starts:
        loss = functional.supcon_distill_loss(
            query, problem.parts[0].keys, *labels, temperature=temperature, **momentum
        )
        loss.backward()
    assert len(launched) == 6
    assert len(launched + starts.names) <= 8, starts.names


def test_what_this_way_does_not_take_goes_the_older(monkeypatch):
    monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", "lean")
    problem = Problem(5, (40,), 16, F32)
    keys = problem.parts[0].keys.nan_to_num().requires_grad_()
    query = problem.query.nan_to_num()
    labels = (problem.query_labels, problem.parts[0].labels)
    functional.supcon_distill_loss(query, keys, *labels, temperature=0.3).backward()
    assert keys.grad.isfinite().all()
    same = functional.supcon_distill_loss(query, query, labels[0], labels[0], temperature=0.3, exclude_self=True)
    assert same.isfinite()


def test_what_is_taken():
    problem = Problem()

    def takes(**changes):
        arguments = {
            "query": problem.query, "momentum_query": problem.momentum_query, "keys": problem.parts,
            "query_labels": problem.query_labels, "temperature": 0.1,
        }  # fmt: skip
        return lean.takes(*(arguments | changes).values(), 0.1, 0.5)

    part = problem.parts[0]
    assert takes()
    assert takes(momentum_query=None, keys=[part._replace(momentum=None)])
    assert not takes(query=problem.query.double())
    assert not takes(keys=[part._replace(keys=part.keys.double())])
    assert not takes(keys=[part, part._replace(keys=part.keys[:0], labels=part.labels[:0])])
    assert not takes(query=problem.query[:0])
    assert not takes(query=torch.zeros(5, 129, device=DEVICE))
    assert not takes(query=problem.query[:, :0])
    assert not takes(temperature=torch.tensor(1.0, device="meta"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_host_does_not_wait():
    problem = Problem(70, (5000,), 64, BF16)
    numbers = {name: torch.tensor(0.5, device=DEVICE) for name in ("temperature", "momentum_temperature", "alpha")}
    answer(problem, **numbers)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        answer(problem, **numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
