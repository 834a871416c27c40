"""The contrastive loss under torch.compile: as operators, and as plain formulas where those are fused."""

import itertools
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, jacrev, vmap

import momentum_distill as md
from loss_cases import POSITIVES, REDUCTIONS, Largest, numbers_alone, supcon_case
from momentum_distill import functional as F
from momentum_distill._contrast import engine, operator, tiles
from momentum_distill._contrast.arguments import read_problem

# The compiler's own, about what it does itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
    numbers_alone,
]

EXACT = {"rtol": 1e-12, "atol": 1e-13}
CONTRAST, GRADIENTS = torch.ops.momentum_distill.contrast.default, torch.ops.momentum_distill.contrast_gradients.default


@pytest.fixture(params=["operator", pytest.param("formulas", marks=pytest.mark.long)])
def way(request, monkeypatch):
    """How the compiler gets the loss: as operators it sees nothing of, or as the formulas that few scores take."""
    if request.param == "operator":
        monkeypatch.setattr(engine, "FUSED_SCORES", -1)
    return request.param


@pytest.fixture
def as_operator(monkeypatch):
    monkeypatch.setattr(engine, "FUSED_SCORES", -1)


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, backend=backend, fullgraph=True, **options)


class Counted:
    """A backend that counts its graphs, and compiles as another does."""

    def __init__(self, backend="aot_eager"):
        self.backend, self.graphs = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


# -------------------------------------------------------------------------------------------------- the same numbers

LEARNED = ["query", "temperature", "alpha", "keys[0]", "keys[1]"]


def case_of(parts=2, momentum="other", dtype=torch.float64, seed=0, n=5, q=11):
    """All arguments by name; the first part has as many keys as there are queries."""
    case = supcon_case(seed, n, q, 4, ignored=0.2, unlabelled=0.2, momentum=momentum == "other", dtype=dtype)
    if momentum == "same":
        case.momentum_query = case.query + 0.1
    given = vars(case.split(*((n, q - n) if parts == 2 else (q,))))
    if momentum == "same":
        given["momentum_keys"] = given["keys"]
    return given | {name: torch.tensor(x, dtype=torch.float64) for name, x in (("temperature", 0.4), ("alpha", 0.3))}


def with_leaves(given, learned):
    """The same with fresh leaves, those in `learned` with a gradient; momentum keys stay the keys where they are."""
    same = given["momentum_keys"] is given["keys"]

    def leaf(name, x):
        return x.detach().clone().requires_grad_(name in learned)

    given = dict(given)
    for name in ("query", "temperature", "alpha"):
        given[name] = leaf(name, given[name])
    given["keys"] = tuple(leaf(f"keys[{index}]", part) for index, part in enumerate(given["keys"]))
    if same:
        given["momentum_keys"] = given["keys"]
    return given


def learned_of(given):
    return [x for x in (given["query"], given["temperature"], given["alpha"], *given["keys"]) if x.requires_grad]


def value_and_gradients(f, given, learned):
    """Of the loss, weighed row by row; momentum keys that are the keys get none."""
    given = with_leaves(given, learned)
    value = f(**given)
    weighed = (value * torch.linspace(1, 2, value.numel()).to(value).view_as(value)).sum()
    leaves = learned_of(given)
    unused = given["momentum_query"] is None  # alpha then plays no part
    return [value.detach(), *(torch.autograd.grad(weighed, leaves, allow_unused=unused) if leaves else ())]


def compare(given, learned, *, dynamic=None, tolerance=EXACT, backend="aot_eager", call=None, **options):
    def f(**given):
        return (call or F.supcon_distill_loss)(**given, **options)

    ours = value_and_gradients(compiled(f, backend, dynamic=dynamic), given, learned)
    for one, other in zip(ours, value_and_gradients(f, given, learned), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def subsets(names):
    return itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(len(names) + 1))


class Point(NamedTuple):
    parts: int
    momentum: str
    positives: str
    reduction: str
    exclude_self: bool
    dynamic: bool | None
    learned: tuple[str, ...]

    def name(self):
        return "-".join(map(str, self[:4]))

    @property
    def options(self):
        return {"positives": self.positives, "reduction": self.reduction, "exclude_self": self.exclude_self}


POINTS = [  # in which any two values of two columns meet, but for some of the gradients
    Point(1, "none", "outside", "mean", False, None, ()),
    Point(2, "other", "inside", "sum", True, True, ("query",)),
    Point(2, "same", "inside_per_positive", "none", False, None, ("query", "keys[0]")),
    Point(2, "other", "outside", "none", False, True, ("query", "temperature", "alpha", "keys[0]", "keys[1]")),
    Point(2, "same", "outside", "sum", True, None, ("temperature", "keys[1]")),
    Point(1, "same", "inside", "mean", False, True, ("temperature", "alpha")),
    Point(1, "other", "inside_per_positive", "sum", False, None, ("keys[0]",)),
    Point(2, "none", "inside", "none", True, None, ("query", "temperature")),
    Point(2, "none", "inside_per_positive", "mean", True, True, ("keys[0]", "keys[1]")),
    Point(2, "other", "outside", "mean", True, None, ("alpha",)),
]


@pytest.mark.parametrize("point", POINTS, ids=Point.name)
@pytest.mark.usefixtures("as_operator")
def test_value_and_gradients_are_those_without_a_compiler(point):
    compare(case_of(point.parts, point.momentum), point.learned, dynamic=point.dynamic, **point.options)


@pytest.mark.parametrize("point", [POINTS[3], pytest.param(POINTS[4], marks=pytest.mark.long)], ids=Point.name)
def test_value_and_gradients_of_fused_formulas(point):
    compare(case_of(point.parts, point.momentum), point.learned, dynamic=point.dynamic, **point.options)


@pytest.mark.long
@pytest.mark.parametrize("momentum", ["none", "same", "other"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.usefixtures("way")
def test_value_and_gradients_of_the_grid(parts, momentum):
    names = LEARNED[: 3 + parts]
    every = itertools.product(POSITIVES, REDUCTIONS, [False, True] if parts == 2 else [False], subsets(names))
    for index, (positives, reduction, exclude_self, learned) in enumerate(every):
        if index % 101:  # no divisor of any number of values: a few points from all over the grid
            continue
        if momentum == "none" and set(learned) <= {"alpha"}:  # nothing has a gradient
            continue
        torch._dynamo.reset()
        options = {"positives": positives, "reduction": reduction, "exclude_self": exclude_self}
        dynamic = True if index % 2 else None
        compare(case_of(parts, momentum, seed=index), learned, dynamic=dynamic, **options)


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
@pytest.mark.parametrize("point", POINTS[::2], ids=Point.name)
@pytest.mark.usefixtures("way")
def test_the_default_compiler_gives_the_same(point, dynamic):
    given = case_of(point.parts, point.momentum)
    compare(given, point.learned, dynamic=dynamic, backend="inductor", **point.options)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
@pytest.mark.usefixtures("way")
def test_features_of_16_bits_and_autocast(dtype, backend):
    given = case_of(dtype=dtype)
    given["temperature"], given["alpha"] = given["temperature"].float(), given["alpha"].float()
    # A gradient is one of the numbers of 16 bits, the neighbour if the last digit before rounding differs.
    near = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    compare(given, LEARNED, tolerance=near, backend=backend)

    def under_autocast(**given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.supcon_distill_loss(**given)

    compare(given, LEARNED, tolerance=near, backend=backend, call=under_autocast)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "reversed in steps": lambda x: torch.cat([x, x])[::2][: len(x)],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("tiled", [False, pytest.param(True, marks=pytest.mark.long)], ids=["matrices", "tiles"])
@pytest.mark.usefixtures("as_operator")
def test_inputs_of_any_strides(tiled, backend, monkeypatch):
    if tiled:
        monkeypatch.setattr(engine, "DENSE_SCORES", -1)
    for name, layout in LAYOUTS.items():
        given = case_of()
        made = {key: given[key] for key in ("query", "momentum_query")}
        made |= {key: [layout(part) for part in given[key]] for key in ("keys", "momentum_keys")}
        made |= {key: layout(given[key]) for key in ("query", "momentum_query")}
        if name != "transposed":
            made["query_labels"] = layout(given["query_labels"][:, None])[:, 0]
            made["key_labels"] = [layout(part[:, None])[:, 0] for part in given["key_labels"]]
        learned = [made["query"].requires_grad_(), *(part.requires_grad_() for part in made["keys"])]
        given |= made | {"temperature": 0.4, "alpha": 0.3}

        def f(given=given):
            return F.supcon_distill_loss(**given)

        answers = []
        for call in (compiled(f, backend), f):
            value = call()
            answers.append([value.detach(), *torch.autograd.grad(value, learned)])
        for one, other in zip(*answers, strict=True):
            torch.testing.assert_close(one, other, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


# ----------------------------------------------------------------------------------------------------- the operators


def operands(given, **options):
    """The arguments of `contrast` but the last."""
    choices = {"positives": "outside", "reduction": "mean", "normalize": True, "ignore_index": -1}
    choices |= {"exclude_self": False, "group": None, "validate": False, "momentum_temperature": None}
    choices |= {"query_targets": None, "key_targets": None, "positives_from": "labels", "width": None, "hardness": 0.0}
    choices |= options
    return operator.arguments(read_problem(**given, **choices))


def graded(n=5, q=11, dtype=torch.float64):
    """Scores of the rows and of the keys of `case_of`, which say what is positive."""
    scores = torch.linspace(-2, 2, n + q, dtype=dtype)
    keys = (scores[n : 2 * n], scores[2 * n :])
    return {"query_targets": scores[:n], "key_targets": keys, "positives_from": "distance", "width": 0.7}


@pytest.mark.parametrize(
    ("positives_from", "call"),
    [("distance", F.supcon_distill_loss), pytest.param("function", F.supcon_distill_terms, marks=pytest.mark.long)],
)
@pytest.mark.usefixtures("way")
def test_graded_positives_and_hard_negatives_are_those_without_a_compiler(positives_from, call):
    """A function is traced with the formula, whatever the size."""
    options = graded() | {"hardness": 2.0, "exclude_self": True}
    if positives_from == "function":
        options |= {"positives_from": lambda y, z: (y - z).abs() < 1, "width": None}

    def f(**given):
        found = call(**given, **options)
        return found if call is F.supcon_distill_loss else torch.stack([found.total, found.supervised, found.distill])

    compare(case_of(), ("query", "temperature", "alpha", "keys[0]", "keys[1]"), call=f)


def permuted(given):
    """Dense, but column by column."""
    features = ("query", "momentum_query", "keys", "momentum_keys")

    def column_major(x):
        return tuple(map(column_major, x)) if isinstance(x, tuple) else x.T.contiguous().T

    return given | {name: column_major(given[name]) for name in features if given[name] is not None}


OPERANDS = {
    "momentum": lambda: (operands(case_of()), [True, True, False]),
    "no gradient": lambda: (operands(case_of(), positives="inside"), [False, False, False]),
    "one part, alone": lambda: (operands(case_of(1, "none"), positives="inside_per_positive"), [True, True]),
    "by row, the same keys": lambda: (operands(case_of(2, "same"), reduction="none"), [True, True, True]),
    "permuted": lambda: (operands(permuted(case_of())), [True, True, True]),
    "permuted, as they are": lambda: (operands(permuted(case_of()), normalize=False), [True, True, True]),
    "permuted, unit keys": lambda: (operands(permuted(case_of(1)), normalize="query"), [True, True]),
    "without self, bfloat16": lambda: (
        operands(case_of(dtype=torch.bfloat16), exclude_self=True, momentum_temperature=0.5),
        [True, True, True],
    ),
    "graded, hard negatives": lambda: (
        operands(case_of(), **graded(), hardness=2.0, positives="inside"),
        [True, True, True],
    ),
    "no keys": lambda: (operands(case_of(1, q=0)), [True, True]),
    "no queries": lambda: (operands(case_of(1, n=0)), [True, True]),
}


@pytest.mark.parametrize("tiled", [False, True], ids=["matrices", "tiles"])
@pytest.mark.parametrize("name", OPERANDS)
def test_the_operators_are_what_they_tell_the_compiler(name, tiled, monkeypatch):
    if tiled:
        monkeypatch.setattr(engine, "DENSE_SCORES", -1)
    given, wanted = OPERANDS[name]()
    torch.library.opcheck(CONTRAST, (*given, wanted))
    dtype = torch.float32 if "bfloat16" in name else torch.float64
    shape = (len(given[0]),) if "by row" in name else ()
    shares = (torch.full(shape, share, dtype=dtype) for share in (0.6, 0.4))
    torch.library.opcheck(GRADIENTS, (*given, wanted, torch.tensor(3), torch.tensor(2), *shares))


def test_the_operator_that_is_to_be_differentiated_once_is_what_it_tells_the_compiler():
    terms = [torch.randn(3), torch.tensor(2.0, dtype=torch.float64)]
    torch.library.opcheck(torch.ops.momentum_distill.once.default, (terms, [torch.randn(2)]))


# ------------------------------------------------------------------------------------------------ shapes and graphs


@pytest.mark.parametrize("padded", [False, True], ids=["as full as it is", "padded"])
def test_a_queue_that_fills_makes_at_most_three_graphs(padded):
    queue = md.ClassQueue(4096, {"t": 8}, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    loss_fn, counted = md.SupConDistillLoss(), Counted()
    call = torch.compile(loss_fn, backend=counted, fullgraph=True)
    for _ in range(10):  # from 300 x 8 scores, which are fused, to 3000 x 8, which are not
        rows, labels = torch.randn(300, 8, generator=generator).double(), torch.randint(4, (300,), generator=generator)
        queue.enqueue(labels, {"t": rows})
        keys, key_labels = queue.read("t", padded=padded)
        query = torch.randn(8, 8, generator=generator).double().requires_grad_()
        labels = torch.randint(4, (8,), generator=generator)
        inputs = (query, keys, labels, key_labels)
        momentum = {"momentum_query": query.detach() + 0.1, "momentum_keys": keys}
        ours = torch.autograd.grad(call(*inputs, **momentum), query)
        torch.testing.assert_close(ours, torch.autograd.grad(loss_fn(*inputs, **momentum), query), **EXACT)
    assert counted.graphs <= (1 if padded else 3)


def test_fused_formulas_are_for_few_scores_alone():
    def has_operator(n, q):
        torch._dynamo.reset()
        programs = []

        def backend(graph, _):
            programs.append(graph.print_readable(print_output=False))
            return graph.forward

        case = supcon_case(0, n, q, 4)
        torch.compile(F.supcon_distill_loss, backend=backend, fullgraph=True)(*case.args, temperature=0.5)
        return any("momentum_distill.contrast" in program for program in programs)

    assert not has_operator(4, engine.FUSED_SCORES // 4)
    assert has_operator(4, engine.FUSED_SCORES // 4 + 1)
    assert has_operator(4, 0)


# ----------------------------------------------------------------------------------------------- second derivatives


NO_SECOND = r"no derivative of a gradient|does not currently support double backward"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.usefixtures("way")
def test_a_second_derivative_is_an_error(backend):
    """Of a gradient for any one input, for any other: also where it does not depend on what comes from above."""
    given = case_of(1)
    given["temperature"], given["alpha"] = given["temperature"].requires_grad_(), given["alpha"].requires_grad_()
    names = ("query", "temperature", "alpha", "keys[0]")
    call = compiled(
        lambda *learned: F.supcon_distill_loss(
            **given | dict(zip(("query", "keys", "temperature", "alpha"), learned, strict=True))
        ),
        backend,
    )

    def second_derivative(loss, first, second):
        """As a penalty beside the loss: a gradient that is missing would go unnoticed."""
        (slope,) = torch.autograd.grad(loss, first, create_graph=True)
        return torch.autograd.grad(loss + slope.sin().sum(), second)

    for first, second, square in itertools.product(names, names, (False, True)):
        leaves = dict(zip(names, learned_of(with_leaves(given, names)), strict=True))
        loss = call(leaves["query"], (leaves["keys[0]"],), leaves["temperature"], leaves["alpha"])
        loss = loss.square() if square else loss
        torch.autograd.grad(loss, leaves[first], retain_graph=True)
        with pytest.raises(RuntimeError, match=NO_SECOND):
            second_derivative(loss, leaves[first], leaves[second])


@pytest.mark.usefixtures("way")
def test_what_is_said_where_a_second_derivative_is_asked_for():
    case = supcon_case().requires_grad()
    loss = compiled(F.supcon_distill_loss, "eager")(*case.args, temperature=0.5)
    with pytest.raises(RuntimeError, match=r"^contrastive loss: expected no derivative of a gradient \(create_graph"):
        torch.autograd.grad(loss, case.query, create_graph=True)


@pytest.mark.usefixtures("way")
def test_a_backward_pass_may_be_repeated():
    case = supcon_case().requires_grad()
    loss = compiled(F.supcon_distill_loss)(*case.args, **case.momentum, temperature=0.5)
    first = torch.autograd.grad(loss, (case.query, case.keys), retain_graph=True)
    again = torch.autograd.grad(2 * loss, (case.query, case.keys))
    torch.testing.assert_close(again, tuple(2 * one for one in first), **EXACT)


# ------------------------------------------------------------------------------------------------------- transforms


@pytest.mark.long
def test_transforms_inside_a_compiler():
    case = supcon_case(0, 4, 6, 3)
    queries = torch.stack([case.query, 2 * case.query, case.query - 1])

    def loss(query, labels=case.query_labels, momentum=case.momentum, **options):
        return F.supcon_distill_loss(query, case.keys, labels, case.key_labels, **momentum, temperature=0.5, **options)

    transformed = {
        "gradient": (grad(loss), case.query),
        "gradients of several problems": (vmap(grad(loss)), queries),
        "jacobian of rows": (jacrev(lambda query: loss(query, reduction="none")), case.query),
        "gradients by sample": (
            vmap(grad(lambda row, label: loss(row[None], label[None], {}))),
            case.query,
            case.query_labels,
        ),
    }
    for name, (f, query, *others) in transformed.items():
        torch._dynamo.reset()
        answers = []
        for call in (compiled(f), f):
            query = query.detach().requires_grad_()
            value = call(query, *others)
            answers.append((value.detach(), *torch.autograd.grad(value.square().sum(), query)))
        torch.testing.assert_close(*answers, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.usefixtures("way")
def test_a_transform_of_compiled_code_is_an_error_or_right():
    case = supcon_case(0, 4, 6, 3)
    by_query = compiled(lambda query: F.supcon_distill_loss(query, *case.args[1:], temperature=0.5))
    for transform in (grad, vmap):
        with pytest.raises(Exception, match="functorch"):
            transform(by_query)(case.query if transform is grad else case.query[None])


# ------------------------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("field", ["total", "supervised", "distill"])
@pytest.mark.usefixtures("way")
def test_a_single_term_may_be_differentiated(field):
    def f(**given):
        return getattr(F.supcon_distill_terms(**given), field)

    given = case_of()
    names = ["query", "temperature", "keys[0]"]
    compare(given, names, call=f)


@pytest.mark.usefixtures("way")
def test_terms_are_those_without_a_compiler():
    loss_fn, case = md.SupConDistillLoss(), supcon_case(ignored=0.2, unlabelled=0.2)
    for one, other in zip(
        compiled(loss_fn.terms)(*case.args, **case.momentum), loss_fn.terms(*case.args, **case.momentum), strict=True
    ):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.usefixtures("way")
def test_a_whole_module_and_its_optimizer(backend):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = torch.nn.Linear(4, 4).double()
            self.loss = md.SupConDistillLoss()

        def forward(self, case):
            query = self.encoder(case.query)
            return self.loss(query, case.keys, case.query_labels, case.key_labels, **case.momentum)

    trained = []
    for compile_it in (False, True):
        model = Model()
        call = compiled(model, backend) if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            call(supcon_case(step)).backward()
            optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
    # The temperature is learned in float32.
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------- memory and FLOPs


def test_nothing_of_the_size_of_the_similarities_is_made(monkeypatch):
    n, q, d = 64, 40_000, 8
    generator = torch.Generator().manual_seed(0)
    query, momentum_query = (torch.randn(n, d, generator=generator) for _ in range(2))
    keys, momentum_keys = (torch.randn(q, d, generator=generator) for _ in range(2))
    batch = keys[:n].clone().requires_grad_()
    labels, key_labels = torch.randint(3, (n,), generator=generator), torch.randint(3, (q,), generator=generator)
    largest = Largest()

    class Watched(engine.Solved):
        """The inside of the operators, which is hidden from what watches the graph."""

        def __init__(self, problem):
            with largest:
                super().__init__(problem)

        def gradients(self, *arguments):
            with largest:
                return super().gradients(*arguments)

    def watched(graph, _):
        """Runs the graph itself, operation by operation."""

        def run(*args):
            with largest:
                return graph.forward(*args)

        return run

    def f(query):
        return F.supcon_distill_loss(
            query,
            (batch, keys[n:]),
            labels,
            (key_labels[:n], key_labels[n:]),
            temperature=0.5,
            momentum_query=momentum_query,
            momentum_keys=(momentum_keys[:n], momentum_keys[n:]),
        )

    monkeypatch.setattr(engine, "Solved", Watched)
    loss = torch.compile(f, backend=watched, fullgraph=True)(query.requires_grad_())
    with largest:
        loss.backward()
    assert query.grad is not None
    assert batch.grad is not None
    assert tiles.TILE_SCORES / 2 < largest.numel <= max(2 * tiles.TILE_SCORES, q * d)
    assert largest.numel < n * q / 4


@pytest.mark.long
def test_compiled_code_needs_no_more_memory_than_eager():
    peaks = {way: float(in_a_process(PEAK, way)) for way in ("eager", "compiled")}
    assert peaks["compiled"] <= peaks["eager"] + 1, peaks


PEAK = """
import sys, torch, momentum_distill as md
torch.set_num_threads(1)
n, q, d = 512, 65_536, 128
query, momentum_query = torch.randn(n, d, requires_grad=True), torch.randn(n, d)
keys, momentum_keys = torch.randn(q, d), torch.randn(q, d)
labels, key_labels = torch.randint(3, (n,)), torch.randint(3, (q,))
loss_fn = md.SupConDistillLoss()
call = torch.compile(loss_fn, fullgraph=True) if sys.argv[1] == "compiled" else loss_fn

def step():
    call(query, keys, labels, key_labels, momentum_query=momentum_query, momentum_keys=momentum_keys).backward()

step()
from torch.profiler import profile
with profile(profile_memory=True) as profiled:
    step()
now = peak = 0
for event in profiled.profiler.kineto_results.events():
    if event.name() == "[memory]":
        now += event.nbytes()
        peak = max(peak, now)
print(peak / 2**20)
"""


def in_a_process(program, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_flops_of_the_operators_are_those_of_their_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    given = case_of(n=5, q=11)
    larger = case_of(n=64, q=512)
    compiled(lambda: F.supcon_distill_loss(**larger))()  # from then on they are counted
    product = 2 * 5 * 11 * 4

    def flops(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    assert flops(lambda: CONTRAST(*operands(given), [False, False, False])) == 2 * product
    assert flops(lambda: CONTRAST(*operands(given), [True, False, False])) == 3 * product
    assert flops(lambda: CONTRAST(*operands(case_of(2, "none")), [True, False, False])) == 2 * product
    whole = 4 * product
    assert flops(lambda: CONTRAST(*operands(given), [True, True, True])) == whole
    shares = [torch.tensor(share, dtype=torch.float64) for share in (0.6, 0.4)]
    assert (
        flops(lambda: GRADIENTS(*operands(given), [True, True, True], torch.tensor(3), torch.tensor(2), *shares))
        == whole
    )
    # As without a compiler, through the matrices.
    leaves = with_leaves(given, LEARNED)
    assert flops(lambda: F.supcon_distill_loss(**leaves).backward()) == whole


@pytest.mark.parametrize("kind", [md.SupConDistillLoss, md.SigmoidDistillLoss])
def test_a_batch_that_is_its_own_keys_is_one_graph(kind):
    """Of more scores than are taken as formulas."""
    loss = kind(exclude_self=True)
    rows = torch.randn(160, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(160) % 5
    expected = loss(rows, rows, labels, labels)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(rows, rows, labels, labels)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, rows)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
