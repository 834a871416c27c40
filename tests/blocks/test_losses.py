"""What holds for the losses together: the transforms of torch.func, and the word on a student that learns nothing."""

import warnings

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import momentum_distill as md
from loss_cases import POSITIVES, REDUCTIONS, numbers_alone, supcon_case
from momentum_distill import functional as F
from momentum_distill._contrast import arguments
from momentum_distill._group import Ranks

# Of forward-mode derivatives, and of the compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHARED = ("query", "keys", "query_labels", "key_labels", "momentum_query", "momentum_keys")

# ----------------------------------------------------------------------------------------------------------- torch.func


def near(y, z):
    return 1 / (1 + (y - z).square())


def contrastive(**options):
    """The loss as a function of its learned temperature, query and keys; the keys are the batch and a queue."""
    case = supcon_case(0, 6, 16, 4, ignored=0.2, unlabelled=0.2)
    loss_fn = md.SupConDistillLoss(temperature=0.3, **options)
    with torch.no_grad():
        loss_fn.log_temperature_ratio.fill_(0.2)

    def parts(x):
        return x.split((6, 10))

    given = {"momentum_query": case.momentum_query, "momentum_keys": parts(case.momentum_keys)}
    if "positives_from" in options:
        scores = torch.linspace(-2, 2, 22, dtype=torch.float64)
        given |= {"query_targets": scores[::4], "key_targets": parts(scores[:16])}

    def loss(parameters, query, keys):
        arguments = (query, parts(keys), case.query_labels, parts(case.key_labels))
        return functional_call(loss_fn, parameters, arguments, given).sum()

    return loss, [dict(loss_fn.double().named_parameters()), case.query, case.keys]


def outputs(*names, classes=3):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(5, *[classes] * bool(classes), generator=generator).double() for name in names}


def response(task, **options):
    x = outputs("student", "teacher", "momentum", classes=3 * (task == "classification"))
    loss_fn = md.ResponseDistillLoss(task=task, **options)
    return lambda *x: loss_fn(*x, mask=torch.arange(5) != 2).sum(), [*x.values()]


def hard_sample(**options):
    x = outputs("student_logits", "fused_logits") | outputs("student_scores", "fused_scores", "targets", classes=0)
    loss_fn = md.HardSampleFusionLoss(**options)
    labels = torch.tensor([0, -1, 2, -2, 1])
    return lambda *values: loss_fn(**dict(zip(x, values, strict=True)), labels=labels).sum(), [*x.values()]


LOSSES = {
    **{f"contrastive, {p}": lambda p=p: contrastive(positives=p, reduction="sum") for p in POSITIVES},
    **{f"contrastive, {p}, without self": lambda p=p: contrastive(positives=p, exclude_self=True) for p in POSITIVES},
    "contrastive, by row, unit keys": lambda: contrastive(reduction="none", normalize="query"),
    "contrastive, by distance": lambda: contrastive(positives_from="distance", width=0.5, positives="inside"),
    "contrastive, by a function, hard negatives": lambda: contrastive(positives_from=near, hardness=2.0),
    "contrastive, plain products": lambda: contrastive(normalize=False),
    "scores": lambda: response("regression", detach_teacher=False),
    "logits": lambda: response("classification", temperature=2.0),
    "logits of a teacher that learns": lambda: response("classification", detach_teacher=False),
    **{f"hard samples, {w}": lambda w=w: hard_sample(class_weight=w) for w in F.CLASS_WEIGHTS},
    "hard samples of a teacher that learns": lambda: hard_sample(detach_teacher=False),
    "means": lambda: (lambda x: F.mean_rows(x, mask=torch.arange(5) != 2), [outputs("x", classes=0)["x"]]),
}


def leaves(arguments):
    """The arguments as leaves of autograd, and all of them in a list."""
    flat, tree = torch.utils._pytree.tree_flatten(arguments)
    flat = [x.detach().clone().requires_grad_() for x in flat]
    return flat, torch.utils._pytree.tree_unflatten(flat, tree)


def backward(loss, arguments):
    """Value and gradients by `backward()`."""
    flat, arguments = leaves(arguments)
    value = loss(*arguments)
    gradients = torch.autograd.grad(value, flat, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(flat, gradients, strict=True)]


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_have_value_and_gradient_of_backward(name):
    loss, arguments = LOSSES[name]()
    value, expected = backward(loss, arguments)
    places = tuple(range(len(arguments)))
    torch.testing.assert_close(flat(grad(loss, places)(*arguments)), expected, **EXACT)
    same, pull = vjp(loss, *arguments)
    torch.testing.assert_close(same, value, **EXACT)
    torch.testing.assert_close(flat(pull(torch.ones_like(value))), expected, **EXACT)
    torch.testing.assert_close(flat(jacrev(loss, places)(*arguments)), expected, **EXACT)
    generator = torch.Generator().manual_seed(1)
    tangents = torch.utils._pytree.tree_map(
        lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype), tuple(arguments)
    )
    same, slope = jvp(loss, tuple(arguments), tangents)
    torch.testing.assert_close(same, value, **EXACT)
    by_gradient = sum((t * g).sum() for t, g in zip(flat(tangents), expected, strict=True))
    torch.testing.assert_close(slope, by_gradient, **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_work_over_many_problems_at_once(name):
    loss, arguments = LOSSES[name]()
    many = torch.utils._pytree.tree_map(lambda x: torch.stack([x.detach(), -x.detach(), 0.5 * x.detach()]), arguments)
    each = [torch.utils._pytree.tree_map(lambda x, i=i: x[i], many) for i in range(3)]
    values, gradients = zip(*(backward(loss, one) for one in each), strict=True)
    torch.testing.assert_close(vmap(loss)(*many), torch.stack(values), **EXACT)
    by_problem = vmap(grad(loss, tuple(range(len(arguments)))))(*many)
    expected = [torch.stack(pieces) for pieces in zip(*gradients, strict=True)]
    torch.testing.assert_close(flat(by_problem), expected, **EXACT)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_labels_and_momentum_inputs_may_differ_between_the_problems(reduction):
    cases = [supcon_case(seed, 6, 10, 4, ignored=0.2, unlabelled=0.2) for seed in range(3)]
    cases[2].key_labels.fill_(-1)
    many = [torch.stack([getattr(case, name) for case in cases]) for name in SHARED]

    def loss(*arguments):
        *given, momentum_query, momentum_keys = arguments
        momentum = {"momentum_query": momentum_query, "momentum_keys": momentum_keys}
        return F.supcon_distill_loss(*given, **momentum, temperature=0.3, reduction=reduction)

    expected = torch.stack([loss(*(x[i] for x in many)) for i in range(3)])
    torch.testing.assert_close(vmap(loss)(*many), expected, **EXACT)


def test_per_sample_gradients_are_those_of_the_samples_alone():
    case = supcon_case(3, 5, 8, 4)

    def loss(query, label, momentum):
        arguments = (query[None], case.keys, label[None], case.key_labels)
        return F.supcon_distill_loss(
            *arguments, temperature=0.3, momentum_query=momentum[None], momentum_keys=case.momentum_keys
        )

    rows = (case.query, case.query_labels, case.momentum_query)
    expected = [backward(lambda q, i=i: loss(q, rows[1][i], rows[2][i]), [rows[0][i]])[1][0] for i in range(5)]
    torch.testing.assert_close(vmap(grad(loss))(*rows), torch.stack(expected), **EXACT)


def test_targets_get_no_tangent_even_where_they_are_the_inputs():
    """`no_grad` stops no forward-mode derivative; through momentum inputs, or the temperature, one would come in."""
    case = supcon_case(4, 5, 8, 4)
    tangents = [torch.ones_like(x) for x in (case.query, case.keys)]

    def loss(query, keys, temperature):
        return F.supcon_distill_loss(
            query,
            keys,
            case.query_labels,
            case.key_labels,
            temperature=temperature,
            momentum_query=query.square(),
            momentum_keys=keys,
        )

    inputs = [case.query, case.keys, torch.tensor(0.3, dtype=torch.float64)]
    _, expected = backward(loss, inputs)
    _, slope = jvp(loss, tuple(inputs), (*tangents, torch.ones_like(inputs[2])))
    torch.testing.assert_close(slope, sum(g.sum() for g in expected), **EXACT)


def test_second_derivatives_are_those_of_autograd():
    loss, (parameters, query, keys) = contrastive()
    ours = hessian(lambda query: loss(parameters, query, keys))(query)
    expected = torch.autograd.functional.hessian(lambda query: loss(parameters, query, keys), query)
    torch.testing.assert_close(ours, expected, **EXACT)


@numbers_alone
@pytest.mark.parametrize("ratio", [0.1, 1e4, -1e4])
def test_a_temperature_beyond_its_border_has_the_gradient_that_it_has_on_it_and_is_left_alone(ratio):
    loss, (parameters, query, keys) = contrastive()
    (name,) = parameters
    beyond = torch.tensor(ratio, dtype=torch.float64)
    ours = grad(loss)({name: beyond}, query, keys)[name]
    assert beyond.item() == ratio
    # Outside a transform, too, a tensor that stands in for the parameter is its owner's.
    stand_in = beyond.clone().requires_grad_()
    loss({name: stand_in * 1}, query, keys).backward()
    assert stand_in.item() == ratio
    with torch.no_grad():
        parameters[name].fill_(ratio)
    loss(parameters, query, keys).backward()
    assert (parameters[name].item() == ratio) == (abs(ratio) < 1)  # brought back, being the loss's own
    for gradient in (ours, stand_in.grad):
        torch.testing.assert_close(gradient, parameters[name].grad, **EXACT)


def test_a_jacobian_of_rows_may_be_taken_in_one_backward_pass():
    case = supcon_case(5).requires_grad()
    rows = F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.3, reduction="none")
    inputs = (case.query, case.keys)
    at_once = torch.autograd.grad(rows, inputs, torch.eye(6).double(), is_grads_batched=True, retain_graph=True)
    by_row = [torch.autograd.grad(row, inputs, retain_graph=True) for row in rows]
    torch.testing.assert_close(at_once, tuple(map(torch.stack, zip(*by_row, strict=True))), **EXACT)


def test_a_transform_may_be_compiled():
    torch._dynamo.reset()
    loss, (parameters, query, keys) = contrastive()
    by_query = grad(lambda query: loss(parameters, query, keys))
    compiled = torch.compile(by_query, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), by_query(query), **EXACT)


def test_what_a_transform_cannot_do_is_said_in_one_sentence(monkeypatch):
    student = torch.zeros(2, 3)
    labels = torch.tensor([0, 1])
    calls = {
        "contrastive": lambda x, **o: F.supcon_distill_loss(x, student, labels, labels, temperature=0.5, **o),
        "response": lambda x, **o: F.response_distill_loss(x, student, task="classification", **o),
        "hard sample": lambda x, **o: F.hard_sample_fusion_loss(
            student_logits=x, fused_logits=student, labels=labels, **o
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"^validate: expected False inside a transform of torch.func"):
            vmap(lambda x, call=call: call(x, validate=True))(torch.zeros(4, 2, 3))
        with monkeypatch.context() as patch:
            for module in (F, arguments):
                patch.setattr(module, "find_ranks", lambda _: Ranks(None, 2, 0))
            with pytest.raises(ValueError, match=r"^group: expected None inside a transform .*, got one of 2 proc"):
                grad(call)(student)
        assert grad(call)(student).isfinite().all(), name


# ---------------------------------------------------------------------------------------- a student that learns nothing


def swapped():
    """By name: a loss, and a call of it in which `learner` stands where no gradient goes, and `fixed` where it does."""
    labels = torch.tensor([0, 1, 2])
    contrast = md.SupConDistillLoss()
    scores, logits = md.ResponseDistillLoss(task="regression"), md.ResponseDistillLoss(task="classification")
    fusion = md.HardSampleFusionLoss()

    def contrasted(learner, fixed):
        momentum = {"momentum_query": learner, "momentum_keys": (learner, learner)}
        return contrast(fixed, (fixed, fixed), labels, (labels, labels), **momentum)

    def fused(learner, fixed):
        return fusion(student_logits=fixed, fused_logits=learner, labels=labels)

    def terms(learner, fixed):
        return contrast.terms(fixed, fixed, labels, labels, momentum_query=learner, momentum_keys=fixed)

    return {
        "contrastive": (contrast, contrasted),
        "its terms": (contrast, terms),
        "scores": (scores, lambda learner, fixed: scores(fixed[:, 0], learner[:, 0])),
        "logits": (logits, lambda learner, fixed: logits(fixed, learner, learner)),
        "hard samples": (fusion, fused),
    }


def told(call, *arguments):
    """What a call warns of, and the file that is shown."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        call(*arguments)
    return [(str(warning.message), warning.filename) for warning in caught]


@pytest.mark.parametrize("name", swapped())
def test_a_loss_that_trains_no_model_says_so_once_and_where(name):
    loss_fn, call = swapped()[name]
    learner, fixed = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    ((message, file),) = told(call, learner, fixed)
    assert message.startswith(f"{type(loss_fn).__name__} trains no model: ")
    assert "swapped" in message
    assert file == __file__
    assert told(call, learner, fixed) == []


@pytest.mark.parametrize("name", swapped())
def test_where_nothing_is_to_be_trained_or_something_is_nothing_is_said(name):
    loss_fn, call = swapped()[name]
    learner, fixed = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    assert told(call, fixed, learner) == []
    assert told(torch.no_grad()(call), learner, fixed) == []
    assert told(torch.inference_mode()(call), learner, fixed) == []
    loss_fn.eval()
    assert told(call, learner, fixed) == []
    loss_fn.train()
    assert told(vmap(call), learner[None], fixed[None]) == []
    torch._dynamo.reset()
    assert told(torch.compile(call, backend="eager"), learner, fixed) == []
    assert len(told(call, learner, fixed)) == 1


def test_one_part_of_the_keys_or_a_teacher_that_is_not_detached_is_enough():
    learner, fixed, labels = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3), torch.tensor([0, 1, 2])
    contrast = md.SupConDistillLoss()
    assert told(contrast, fixed, (fixed, learner), labels, (labels, labels)) == []
    assert told(md.ResponseDistillLoss(task="classification", detach_teacher=False), fixed, learner) == []
    fusion = md.HardSampleFusionLoss(detach_teacher=False)
    assert told(lambda: fusion(student_logits=fixed, fused_logits=learner, labels=labels)) == []
    scores = {"student_scores": learner[:, 0], "fused_scores": fixed[:, 0], "targets": fixed[:, 1]}
    logits = {"student_logits": fixed, "fused_logits": fixed, "labels": labels}
    assert told(lambda: md.HardSampleFusionLoss()(**logits, **scores)) == []


# --------------------------------------------------------------------------------------------- labels and probabilities


@numbers_alone
def test_only_logits_that_are_probabilities_in_every_row_that_is_kept_are_refused():
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    loss_fn = md.ResponseDistillLoss(task="classification", validate=True)
    logits = torch.randn(3, 3)
    with pytest.raises(ValueError, match=r"^teacher: expected logits"):
        loss_fn(logits, probabilities)
    for row in ([0.5, 0.6, 0.0], [1.5, -0.5, 0.0], [0.0, 0.0, 0.0]):
        other = torch.cat([probabilities[:2], torch.tensor([row])])
        loss_fn(logits, other)
        with pytest.raises(ValueError, match=r"^student: expected logits"):  # the row is masked
            loss_fn(other, logits, mask=torch.tensor([True, True, False]))
    for dtype in (torch.bfloat16, torch.float16):  # rounding is no proof of logits
        with pytest.raises(ValueError, match=r"^teacher: expected logits"):
            loss_fn(logits, torch.randn(3, 50).softmax(dim=1)[:, :3].softmax(dim=1).to(dtype))
    loss_fn(torch.ones(3, 1), torch.ones(3, 1))  # of one class
    loss_fn(logits, probabilities.log())
    loss_fn(logits[:0], probabilities[:0])
    loss_fn(logits, probabilities, mask=torch.zeros(3, dtype=torch.bool))
    md.ResponseDistillLoss(task="classification")(logits, probabilities)  # only with validate
    md.ResponseDistillLoss(task="regression", validate=True)(logits[:, 0], probabilities[:, 0])


def test_labels_of_rows_that_are_masked_are_not_looked_at():
    logits = torch.zeros(3, 3)
    arguments = {"student_logits": logits, "fused_logits": logits, "labels": torch.tensor([0, 7, -100])}
    with pytest.raises(ValueError, match=r"^labels: .* got 7 in row 1 and 1 more$"):
        F.hard_sample_fusion_loss(**arguments)
    F.hard_sample_fusion_loss(**arguments, mask=torch.tensor([True, False, False]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_every_integer_dtype_are_looked_at(dtype):
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 3]).to(dtype)
    with pytest.raises(ValueError, match=r"^labels: .* got 3 in row 1$"):
        F.hard_sample_fusion_loss(student_logits=logits, fused_logits=logits, labels=labels)
    with pytest.raises(ValueError, match=r"^labels: .* got 3 in row 1$"):
        md.ClassQueue(4, {"t": 3}, num_classes=3).enqueue(labels, {"t": torch.eye(2, 3)})


def test_labels_are_looked_at_where_that_is_free_alone():
    """Not where tensors have no values: inside a transform, a graph, or a fake mode."""
    query, wrong = torch.eye(3), torch.tensor([0, 1, -7])

    def loss(labels):
        return F.supcon_distill_loss(query, query, labels, wrong, temperature=0.5)

    with pytest.raises(ValueError, match=r"^query_labels: .* got -7 in row 2$"):
        loss(wrong)
    assert vmap(loss)(wrong[None]).isfinite().all()
    torch._dynamo.reset()
    assert torch.compile(loss, backend="eager", fullgraph=True)(wrong).isfinite()
    elsewhere = [x.to("meta") for x in (query, query, wrong, wrong)]
    assert F.supcon_distill_loss(*elsewhere, temperature=0.5).is_meta
