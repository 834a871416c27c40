"""Values of the losses that one can check with pencil and paper, and values others published."""

import math

import pytest
import torch

import reference
from loss_cases import POSITIVES, assert_close, lists
from momentum_distill import diagnostics
from momentum_distill import functional as F

pytestmark = pytest.mark.usefixtures("both_ways")

E = math.e
LN2, LN3 = math.log(2.0), math.log(3.0)


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def ids(*labels):
    return torch.tensor(labels)


def supcon(query, keys, query_labels, key_labels, temperature=1.0, **options):
    return F.supcon_distill_loss(
        t(*query), t(*keys), ids(*query_labels), ids(*key_labels), temperature=temperature, **options
    )


def distilled(query, keys, momentum_query, momentum_keys, query_labels, key_labels, **options):
    momentum = {"momentum_query": t(*momentum_query), "momentum_keys": t(*momentum_keys)}
    return supcon(query, keys, query_labels, key_labels, **momentum, **options)


X, Y = (1.0, 0.0), (0.0, 1.0)
MINUS_X = (-1.0, 0.0)
L = math.log(3.0), math.log(1.0)  # logits with probabilities 3/4 and 1/4
EVEN = 0.0, 0.0
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # of (3/4, 1/4) from (1/2, 1/2)
H_EVEN = 2 * LN2 - LN3 / 2  # of (1/2, 1/2) to (3/4, 1/4)
INSIDE = {"positives": "inside"}
PER_POSITIVE = {"positives": "inside_per_positive"}
RAW = {"normalize": False}

CLOSED_FORMS = {
    "one key, its own positive": (lambda: supcon([X], [X], [0], [0]), 0.0),
    "one positive, one orthogonal negative": (
        lambda: supcon([X], [X, Y], [0], [0, 1]),
        math.log(1 + 1 / E),
    ),
    "one positive, one opposite negative": (
        lambda: supcon([X], [X, MINUS_X], [0], [0, 1]),
        math.log(1 + E**-2),
    ),
    "half the temperature, twice the logit": (
        lambda: supcon([X], [X, Y], [0], [0, 1], temperature=0.5),
        math.log(1 + E**-2),
    ),
    "the length of a row is no matter": (
        lambda: supcon([(5.0, 0.0)], [(0.1, 0.0), (0.0, 9.0)], [0], [0, 1]),
        math.log(1 + 1 / E),
    ),
    "without normalisation the length is the logit": (
        lambda: supcon([(2.0, 0.0)], [X, Y], [0], [0, 1], **RAW),
        math.log(1 + E**-2),
    ),
    "normalising the query alone keeps the keys": (
        lambda: supcon([(7.0, 0.0)], [(3.0, 0.0), Y], [0], [0, 1], normalize="query"),
        math.log(1 + E**-3),
    ),
    "wrong pair": (lambda: supcon([X], [X, Y], [0], [1, 0]), math.log(1 + E)),
    "two equal positives, outside": (lambda: supcon([X], [X, X], [0], [0, 0]), LN2),
    "two equal positives, inside": (lambda: supcon([X], [X, X], [0], [0, 0], **INSIDE), 0.0),
    "two of three, outside": (lambda: supcon([X], [Y, Y, Y], [0], [0, 0, 1]), LN3),
    "two of three, inside": (
        lambda: supcon([X], [Y, Y, Y], [0], [0, 0, 1], **INSIDE),
        math.log(1.5),
    ),
    "two of three, inside per positive": (
        lambda: supcon([X], [Y, Y, Y], [0], [0, 0, 1], **PER_POSITIVE),
        math.log(1.5) / 2,
    ),
    "unequal positives, outside": (
        lambda: supcon([X], [X, Y], [0], [0, 0]),
        math.log(E + 1) - 0.5,
    ),
    "an ignored key is not in the denominator": (
        lambda: supcon([X], [X, Y, X], [0], [0, 1, -1]),
        math.log(1 + 1 / E),
    ),
    "an unlabelled key is": (
        lambda: supcon([X], [X, Y], [0], [0, -2]),
        math.log(1 + 1 / E),
    ),
    "two unlabelled are no pair": (lambda: supcon([X], [X, Y], [-2], [-2, -2]), 0.0),
    "mean of a row at log 2 and a row at log(1 + 1/e), one row without positive": (
        lambda: supcon([X, (0.0, 0.0), Y], [X, Y], [0, 0, 5], [0, 1]),
        (math.log(1 + 1 / E) + LN2) / 2,
    ),
    "their sum": (
        lambda: supcon([X, (0.0, 0.0), Y], [X, Y], [0, 0, 5], [0, 1], reduction="sum"),
        math.log(1 + 1 / E) + LN2,
    ),
    "true KL of (3/4, 1/4) from (1/2, 1/2)": (
        lambda: distilled([EVEN], [X, Y], [L], [X, Y], [5], [0, 1], alpha=1.0, **RAW),
        KL,
    ),
    "a row without positive keeps its KL, weighted": (
        lambda: distilled([EVEN], [X, Y], [L], [X, Y], [5], [0, 1], alpha=0.25, **RAW),
        0.25 * KL,
    ),
    "both parts": (
        lambda: distilled([EVEN], [X, Y], [L], [X, Y], [0], [0, 1], alpha=0.25, **RAW),
        0.75 * LN2 + 0.25 * KL,
    ),
    "momentum keys of their own": (
        lambda: distilled([EVEN], [X, X], [X], [(LN3, 1.0), Y], [5], [0, 1], alpha=1.0, **RAW),
        KL,
    ),
    "regression: absolute differences": (
        lambda: F.response_distill_loss(t(1.0, -2.0), t(2.0, 1.0), task="regression"),
        2.0,
    ),
    "regression: 1/4 from the momentum model": (
        lambda: F.response_distill_loss(t(1.0, -2.0), t(2.0, 1.0), t(1.0, 0.0), task="regression", alpha=0.25),
        0.75 * 2.0 + 0.25 * 1.0,
    ),
    "cross-entropy of (1/2, 1/2) to (3/4, 1/4)": (
        lambda: F.response_distill_loss(t(L), t(EVEN), task="classification"),
        H_EVEN,
    ),
    "cross-entropy of (3/4, 1/4) to itself is its entropy": (
        lambda: F.response_distill_loss(t(L), t(L), task="classification"),
        math.log(4.0) - 0.75 * LN3,
    ),
    "temperature 2: softer logits and the factor 4": (
        lambda: F.response_distill_loss(t((2 * LN3, 0.0)), t(EVEN), task="classification", temperature=2.0),
        4 * H_EVEN,
    ),
    "a certain teacher": (
        lambda: F.response_distill_loss(t(L), t((0.0, -math.inf)), task="classification"),
        math.log(4 / 3),
    ),
    "fusion: tanh of the error times the distance": (
        lambda: F.hard_sample_fusion_loss(student_scores=t(0.0), fused_scores=t(2.0), targets=t(1.0)),
        2 * math.tanh(1.0),
    ),
    "fusion: no attention, no weight": (
        lambda: F.hard_sample_fusion_loss(
            student_scores=t(0.0), fused_scores=t(2.0), targets=t(1.0), hard_attention=False
        ),
        2.0,
    ),
    "fusion: classes two apart weigh two": (
        lambda: F.hard_sample_fusion_loss(
            student_logits=t((0.0, 0.0, 0.0)), fused_logits=t((9.0, 0.0, 0.0)), labels=ids(2)
        ),
        2 * LN3,
    ),
    "fusion: a mistake weighs one": (
        lambda: F.hard_sample_fusion_loss(
            student_logits=t((0.0, 0.0, 0.0)),
            fused_logits=t((9.0, 0.0, 0.0)),
            labels=ids(2),
            class_weight="error_rate",
        ),
        LN3,
    ),
    "bound on the information": (
        lambda: diagnostics.mutual_information_bound(t(LN2)[0], 8),
        math.log(4.0),
    ),
    "gap of two opposite clouds": (lambda: diagnostics.modality_gap(t(X, X), t(MINUS_X)), 2.0),
    "alignment of orthogonal pairs": (lambda: diagnostics.alignment(t(X, X), t(Y, Y)), 2.0),
    "uniformity of an orthogonal pair": (lambda: diagnostics.uniformity(t(X, Y)), -4.0),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_pencil_and_paper(name):
    compute, expected = CLOSED_FORMS[name]
    assert compute().item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [[0] * 7, [0, 1, 2, 0, 1, 2, 0], [0, -2, -2, 5, 5, 5, -2]], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_equal_similarities_give_log_of_the_number_of_keys(temperature, labels, alpha):
    x = torch.ones(2, 3, dtype=torch.float64)
    keys = torch.ones(7, 3, dtype=torch.float64)
    momentum = {"momentum_query": x, "momentum_keys": keys}
    args = (x, keys, torch.zeros(2, dtype=torch.long), torch.tensor(labels))
    terms = F.supcon_distill_terms(*args, **momentum, temperature=temperature, alpha=alpha)
    assert terms.supervised.item() == pytest.approx(math.log(7), rel=1e-12)
    # Cross-entropy to U is log Q for any alpha; the KL takes U's entropy, which is log Q, off.
    assert terms.distill.item() == pytest.approx(0.0, abs=1e-13)
    assert terms.total.item() == pytest.approx((1 - alpha) * math.log(7), rel=1e-12, abs=1e-13)


def test_tetrahedron_gives_log_three():
    corner = [
        [0.0, 0.0, 1.0],
        [0.0, 2 * math.sqrt(2) / 3, -1 / 3],
        [math.sqrt(6) / 3, -math.sqrt(2) / 3, -1 / 3],
        [-math.sqrt(6) / 3, -math.sqrt(2) / 3, -1 / 3],
    ]
    x = torch.tensor(corner, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    for temperature in (0.1, 1.0):  # no factor temperature / base_temperature
        losses = [
            F.supcon_distill_loss(
                x[i : i + 1],
                torch.cat([x[:i], x[i + 1 :]]),
                labels[i : i + 1],
                torch.cat([labels[:i], labels[i + 1 :]]),
                temperature=temperature,
            )
            for i in range(4)
        ]
        assert_close(torch.stack(losses), [LN3] * 4)


# From the tests of google-research/supcon (losses_test.py): two views of three samples.
VIEWS = [
    [[0.01, 0.02, 0.14], [0.38, 0.61, 0.50]],
    [[0.86, 0.97, 0.33], [0.26, 0.68, 0.45]],
    [[0.32, 0.64, 0.28], [0.45, 0.74, 0.73]],
]
VIEW_LABELS = [0, 0, 1]


def multi_view_loss(views, labels, positives):
    """Every view against all other views, then the mean over a sample's views."""
    x = torch.tensor(views, dtype=torch.float64)
    samples, count, d = x.shape
    x = x.reshape(-1, d)
    labels = torch.tensor(labels).repeat_interleave(count)
    losses = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        losses.append(
            F.supcon_distill_loss(
                x[i : i + 1],
                x[others],
                labels[i : i + 1],
                labels[others],
                temperature=1.0,
                positives=positives,
                normalize=False,
            )
        )
    return torch.stack(losses).reshape(samples, count).mean(dim=1)


def test_published_value_of_the_sum_outside_the_logarithm():
    loss = multi_view_loss(VIEWS, VIEW_LABELS, "outside")
    published = torch.tensor([1.6755852, 1.7973773, 1.58471], dtype=torch.float64)
    torch.testing.assert_close(loss, published, rtol=0.0, atol=1e-6)


def test_published_value_of_the_sum_inside_the_logarithm():
    # There the positives are averaged inside the logarithm, here summed: log K apart.
    loss = multi_view_loss(VIEWS, VIEW_LABELS, "inside") + torch.tensor([LN3, LN3, 0.0])
    published = torch.tensor([1.6356678, 1.7135872, 1.58471], dtype=torch.float64)
    torch.testing.assert_close(loss, published, rtol=0.0, atol=1e-6)


def test_published_value_of_orthogonal_samples_with_a_shared_label():
    views = [[[0.0, 0.0, 1.0]] * 2, [[0.0, 1.0, 0.0]] * 2, [[1.0, 0.0, 0.0]] * 2]
    loss = multi_view_loss(views, [0, 0, 1], "outside")
    closed = [math.log(E + 4) - 1 / 3, math.log(E + 4) - 1 / 3, math.log(E + 4) - 1]
    assert_close(loss, closed)
    published = torch.tensor([1.5714991, 1.5714991, 0.90483244], dtype=torch.float64)
    torch.testing.assert_close(loss, published, rtol=0.0, atol=1e-6)


# From the tests of pytorch/torchtune (test_kd_losses.py): eight rows of four logits.
STUDENT = [
    [1.1250, -0.4102, -0.0879, -2.5000],
    [0.2676, 0.3535, 0.8711, -1.4688],
    [-0.1084, 1.6641, 0.0084, 0.1196],
    [0.5000, -0.6406, -0.2236, -1.5938],
    [-1.5312, -1.9219, 0.0000, -0.5039],
    [-1.5391, 1.5312, 0.5820, 0.2695],
    [-0.3887, 1.2188, 0.0000, 0.6055],
    [0.5000, 1.3828, 0.1309, -1.0312],
]
TEACHER = [
    [-0.0381, -1.2578, -1.2031, 0.0947],
    [-0.7852, 0.4492, 1.5547, 0.0972],
    [0.8203, 0.0012, 0.7656, 0.3477],
    [-1.5781, 0.4297, 0.5977, 0.3926],
    [1.5156, 0.1641, 2.0781, -0.7734],
    [-0.5898, 0.4453, -0.7969, 0.6328],
    [0.6289, -0.8359, 0.9258, 0.2109],
    [0.0006, 0.5195, 3.2344, -1.5781],
]


def test_published_cross_entropy_to_a_teacher():
    loss = F.response_distill_loss(t(*STUDENT), t(*TEACHER), task="classification")
    assert loss.item() == pytest.approx(1.7209, abs=5e-5)


def test_published_logits_as_similarities_give_the_true_kl():
    eye = torch.eye(4, dtype=torch.float64)
    labels = torch.full((8,), -2), torch.zeros(4, dtype=torch.long)
    momentum = {"momentum_query": t(*TEACHER), "momentum_keys": eye}
    options = {"temperature": 1.0, "alpha": 1.0, "normalize": False}
    loss = F.supcon_distill_loss(t(*STUDENT), eye, *labels, **momentum, **options)
    assert loss.item() == pytest.approx(0.62929, abs=5e-6)


@pytest.mark.parametrize("positives", POSITIVES)
def test_the_reference_reproduces_the_published_values_too(positives):
    # Whoever breaks the reference learns of it here, not from the library's tests.
    views = [row for sample in VIEWS for row in sample]
    labels = [0, 0, 0, 0, 1, 1]
    values = [
        reference.supcon(
            [views[i]],
            views[:i] + views[i + 1 :],
            [labels[i]],
            labels[:i] + labels[i + 1 :],
            temperature=1.0,
            positives=positives,
            normalize=False,
        )
        for i in range(6)
    ]
    assert_close(multi_view_loss(VIEWS, VIEW_LABELS, positives), lists(t(*values).view(3, 2).mean(1)))
