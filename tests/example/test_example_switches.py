"""Each switch of `--without`: it changes the gradient that it should change, and no other."""

import json
from dataclasses import replace

import pytest
import torch

import mtmd_mosi
from mtmd.data.batches import batches
from mtmd.data.scaling import Standardizer
from mtmd.data.synthetic import synthetic_dataset
from mtmd.model import MTMD, PretrainedTextEncoder
from mtmd.objective import Objective
from mtmd.settings.config import PARTS, Config
from study_cases import TINY

SMALL = {"width": 16, "fused_width": 12, "audio_hidden": 8, "vision_hidden": 8, "text_hidden": 8, "layers": 1}
DISTILLATION = ["reg", "cls", "feat", "fusion"]


@pytest.fixture(scope="module")
def dataset():
    return synthetic_dataset(seed=3, sizes=(96, 24, 24))


@pytest.fixture(scope="module")
def two_batches(dataset):
    """In double precision, with missing audio and vision."""
    fold = Standardizer.fit(dataset.folds["train"]).apply(dataset.folds["train"])
    return [
        replace(batch, features={k: v.double() for k, v in batch.features.items()}, scores=batch.scores.double())
        for batch in list(batches(fold, 40))[:2]
    ]


@pytest.fixture
def build(dataset, two_batches):
    """A model after one step on the first batch: its averages have moved, and the queue holds something."""

    def build(*without, **settings):
        torch.manual_seed(0)
        config = Config(**{**SMALL, "dropout": 0.0, "queue_size": 50, "without": list(without), **settings})
        model = MTMD(config, dataset.widths).double()
        objective = Objective(config, model).double()
        # The same step for all switches, so that they are compared at the same weights.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            objective(model, two_batches[0])
            for parameter in model.branches.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        objective.after_step(model)
        return model, objective

    return build


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(model.named_parameters(), found, strict=True)
    }


def total_and_terms(model, objective, batch):
    """The loss, and each term before it was detached for the log."""
    kept = {}
    original = torch.Tensor.detach

    def keep(tensor):
        detached = original(tensor)
        kept[id(detached)] = tensor, detached
        return detached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", keep)
        loss, terms = objective(model, batch)
    return loss, {name: kept[id(term)][0] for name, term in terms.items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("term", DISTILLATION)
def test_without_a_term_the_gradient_lacks_that_term_alone(build, two_batches, term):
    model, objective = build()
    loss, terms = total_and_terms(model, objective, two_batches[1])
    part = gradients(model, terms[term])
    expected = {n: g - objective.gammas[term] * part[n] for n, g in gradients(model, loss).items()}
    other_model, other = build(term)
    loss, terms = total_and_terms(other_model, other, two_batches[1])
    assert term not in terms
    assert_same(gradients(other_model, loss), expected)
    assert any(grad.abs().max() > 0 for grad in part.values())


def test_without_distillation_the_ground_truth_is_left(build, two_batches):
    model, objective = build()
    _, terms = total_and_terms(model, objective, two_batches[1])
    expected = gradients(model, terms["gt"])
    model, objective = build("distillation")
    loss, terms = total_and_terms(model, objective, two_batches[1])
    assert set(terms) == {"total", "gt", "gt_text", "gt_audio", "gt_vision", "gt_fused"}
    assert_same(gradients(model, loss), expected)
    assert len(objective.momentum) == 0
    assert objective.queue is None


@pytest.mark.parametrize(
    ("switch", "changed"),
    [
        ("queue", {"feat"}),
        ("momentum_dmd", {"reg", "cls", "feat"}),
        ("hard_attention", {"fusion"}),
    ],
)
def test_a_part_of_a_term_changes_the_gradient_of_that_term_alone(build, two_batches, switch, changed):
    model, objective = build()
    _, full = total_and_terms(model, objective, two_batches[1])
    other_model, other = build(switch)
    _, less = total_and_terms(other_model, other, two_batches[1])
    for name in ("gt", *DISTILLATION):
        before, after = gradients(model, full[name]), gradients(other_model, less[name])
        if name in changed:
            assert max((before[key] - after[key]).abs().max() for key in before) > 1e-6
        else:
            assert_same(after, before)


def test_a_detached_text_learns_nothing_from_the_contrast(build, two_batches):
    model, objective = build()
    _, both = total_and_terms(model, objective, two_batches[1])
    before = gradients(model, both["feat"])
    other_model, other = build(detach_text=True)
    _, terms = total_and_terms(other_model, other, two_batches[1])
    after = gradients(other_model, terms["feat"])
    of_text = [name for name in before if name.startswith("branches.text.")]
    assert any(before[name].any() for name in of_text)
    assert not any(after[name].any() for name in of_text)
    # What audio and vision learn from it stays as it was, and so do the other terms.
    assert_same(*({name: grads[name] for name in grads if name not in of_text} for grads in (after, before)))
    for name in ("gt", "reg", "cls", "fusion"):
        assert_same(gradients(other_model, terms[name]), gradients(model, both[name]))


def test_instances_instead_of_classes_change_the_contrastive_term_alone(build, two_batches):
    model, objective = build()
    _, by_class = total_and_terms(model, objective, two_batches[1])
    other_model, other = build(sampling="instance")
    _, by_instance = total_and_terms(other_model, other, two_batches[1])
    for name in ("gt", "reg", "cls", "fusion"):
        assert_same(gradients(other_model, by_instance[name]), gradients(model, by_class[name]))
    assert by_class["feat"] != by_instance["feat"]
    # A row of the batch is its own only positive: the supervised part is a plain cross-entropy over the keys.
    assert other.queue.read("text")[1].tolist() == two_batches[0].index.tolist()


@pytest.mark.parametrize(
    "change", [{"sampling": "distance", "score_width": 0.5}, {"hardness": 2.0}], ids=["scores", "hard"]
)
def test_near_scores_or_hard_negatives_change_the_contrastive_term_alone(change, build, two_batches):
    model, objective = build()
    _, by_class = total_and_terms(model, objective, two_batches[1])
    other_model, other = build(**change)
    _, terms = total_and_terms(other_model, other, two_batches[1])
    for name in ("gt", "reg", "cls", "fusion"):
        assert_same(gradients(other_model, terms[name]), gradients(model, by_class[name]))
    assert terms["feat_shared"] != by_class["feat_shared"]
    torch.testing.assert_close(terms["feat_specific"], by_class["feat_specific"])
    if "sampling" in change:  # the scores are kept as they are, in step with the features
        (scores, labels), _ = other.queue.read("scores"), other.queue.read("text")
        torch.testing.assert_close(scores[:, 0], two_batches[0].scores)
        assert torch.equal(labels, two_batches[0].labels)


def test_without_fusion_factors_the_features_are_concatenated_as_they_are(build, two_batches):
    model, objective = build("fusion_factors")
    assert model.fusion.factors is None
    names = [name for name, _ in model.named_parameters()]
    assert not any("factors" in name for name in names)
    full_model, full = build()
    # Factors that are still 1 change no value.
    assert torch.equal(objective(model, two_batches[1])[0], full(full_model, two_batches[1])[0])


def test_without_momentum_the_factors_are_the_learned_weights(build, two_batches):
    for switch, moved in (((), 0.005), (("momentum_mfd",), 1.0)):
        model, objective = build(*switch)
        with torch.no_grad():
            model.fusion.factors.weight += 0.2
        objective(model, two_batches[1])
        objective.after_step(model)
        assert model.fusion.factors.factors()["audio"] == pytest.approx(1 + 0.2 * moved, rel=1e-6)


@pytest.mark.parametrize("name", ["text", "audio", "vision"])
def test_without_a_subtask_the_model_does_not_see_the_modality(build, two_batches, name):
    model, objective = build(f"{name}_task")
    assert name not in model.branches
    _, terms = objective(model, two_batches[1])
    assert f"gt_{name}" not in terms
    assert set(terms) & set(DISTILLATION) == ({"fusion"} if name == "text" else set(DISTILLATION))
    batch = two_batches[1]
    if name != "text":
        nothing = torch.zeros_like(batch.features[name])
        features = {**batch.features, name: nothing}
        assert torch.equal(model.predict(batch).scores, model.predict(replace(batch, features=features)).scores)


def test_one_modality_alone_is_its_own_prediction(build, two_batches):
    model, objective = build(modalities=["text"])
    assert model.fusion is None
    loss, terms = total_and_terms(model, objective, two_batches[1])
    assert set(terms) == {"total", "gt", "gt_text"}
    assert torch.equal(loss, terms["gt_text"])
    assert torch.equal(model.predict(two_batches[1]).scores, model(two_batches[1]).unimodal["text"].scores)


def test_what_was_seen_since_the_last_update_is_enqueued_together(build, two_batches):
    model, objective = build()
    objective.queue.reset()
    for batch in two_batches:
        objective(model, batch)
    assert len(objective.queue) == 0
    objective.after_step(model)
    labels = torch.cat([batch.labels for batch in two_batches])
    assert objective.queue.read("text")[1].tolist() == labels.tolist()[-50:]


def test_texts_in_groups_of_like_length_are_encoded_as_all_at_once(monkeypatch):
    transformers = pytest.importorskip("transformers")
    settings = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    ).to_dict()
    torch.manual_seed(0)
    encoder = PretrainedTextEncoder("tiny", settings).double().eval()
    lengths = torch.tensor([3, 9, 1, 0, 12, 5, 5, 12, 2, 7, 11, 4, 6, 8, 10, 3, 2])
    attention = (torch.arange(12) < lengths[:, None]).long()
    tokens = torch.stack([torch.randint(1, 50, attention.shape) * attention, attention, torch.zeros_like(attention)], 1)
    grouped = encoder(tokens)
    grads = torch.autograd.grad(grouped.square().sum(), list(encoder.parameters()))
    monkeypatch.setattr("mtmd.model.ROWS_AT_A_TIME", 1000)
    whole = encoder(tokens)
    torch.testing.assert_close(grouped, whole, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(whole.square().sum(), list(encoder.parameters()))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    assert whole.isfinite().all()
    # What a text is does not depend on what stands behind it.
    alone = encoder(tokens[:1, :, :3])
    torch.testing.assert_close(alone, grouped[:1], rtol=1e-10, atol=1e-12)


SWITCHES = [
    (["--without", "distillation"], {"without": ["distillation"]}),
    (["--sampling", "instance"], {"sampling": "instance"}),
    (
        ["--sampling", "distance", "--balanced-queue", "--hardness", "1"],
        {"sampling": "distance", "balanced_queue": True, "hardness": 1.0},
    ),
    (["--modalities", "text"], {"modalities": ["text"]}),
    *(
        pytest.param(["--without", part], {"without": [part]}, marks=pytest.mark.long)
        for part in PARTS
        if part != "distillation"
    ),
]


@pytest.mark.parametrize(("switch", "settings"), SWITCHES, ids=lambda value: " ".join(value))
def test_every_switch_trains_from_the_command_line(switch, settings, tmp_path):
    assert mtmd_mosi.main([*TINY, *switch, "--out", str(tmp_path)]) == 0
    assert settings.items() <= json.loads((tmp_path / "results.json").read_text())["config"].items()
