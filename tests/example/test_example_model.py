"""The example's model and objective: each term is the paper's, and what is missing changes nothing."""

from dataclasses import replace

import pytest
import torch

import reference
from mtmd.data.batches import batches
from mtmd.data.scaling import Standardizer
from mtmd.data.synthetic import synthetic_dataset
from mtmd.model import MTMD, PretrainedTextEncoder
from mtmd.objective import Objective
from mtmd.settings.config import MODALITIES, STUDENTS, Config
from mtmd.train import make_schedule

SMALL = {"width": 16, "fused_width": 12, "audio_hidden": 8, "vision_hidden": 8, "text_hidden": 8, "layers": 1}


@pytest.fixture(scope="module")
def dataset():
    return synthetic_dataset(seed=3, sizes=(96, 24, 24))


@pytest.fixture
def parts(dataset):
    """A small model in double precision with its objective, and a batch with missing audio and vision."""

    def build(**settings):
        torch.manual_seed(0)
        config = Config(**{**SMALL, "dropout": 0.0, "queue_size": 50, **settings})
        model = MTMD(config, dataset.widths).double()
        return config, model, Objective(config, model).double()

    fold = Standardizer.fit(dataset.folds["train"]).apply(dataset.folds["train"])
    batch = next(batches(fold, 40))
    doubled = {name: values.double() for name, values in batch.features.items()}
    return build, replace(batch, features=doubled, scores=batch.scores.double())


def warm_up(model, objective, batch, steps=2):
    """A few steps, so that the momentum models differ from the online ones and the queue holds something."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        loss, _ = objective(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(model)


def test_the_batch_has_missing_audio_and_vision(parts):
    _, batch = parts
    for name in STUDENTS:
        assert 0 < int(batch.present[name].sum()) < len(batch.labels)


def test_total_is_equation_18_over_the_terms(parts):
    build, batch = parts
    config, model, objective = build(gamma_reg=0.6, gamma_cls=0.7, gamma_feat=0.9, gamma_fusion=1.1)
    loss, terms = objective(model, batch)
    expected = terms["gt"] + 0.6 * terms["reg"] + 0.7 * terms["cls"] + 0.9 * terms["feat"] + 1.1 * terms["fusion"]
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    four = terms["gt_text"] + terms["gt_audio"] + terms["gt_vision"] + terms["gt_fused"]
    torch.testing.assert_close(terms["gt"], four, rtol=1e-12, atol=0)
    del config


def test_every_term_equals_the_slow_reference(parts):
    """Eq. 5, 7-11 and 13-16 once more, sample by sample."""
    build, batch = parts
    config, model, objective = build()
    warm_up(model, objective, batch)
    queue = {stream: objective.queue.read(stream) for stream in objective.queue.streams}
    tau = float(objective.contrast.temperature)
    _, terms = objective(model, batch)
    outputs = model(batch)
    momentum = {name: objective.momentum[name](*model.inputs(batch, name)) for name in STUDENTS}

    reg = cls = feat = fusion = 0.0
    for name in STUDENTS:
        keep = batch.present[name]
        student, teacher = outputs.unimodal[name], outputs.unimodal["text"]
        for part, task in (("scores", "regression"), ("logits", "classification")):
            value = reference.response(
                getattr(student, part)[keep].tolist(),
                getattr(teacher, part)[keep].tolist(),
                getattr(momentum[name], part)[keep].tolist(),
                task=task,
                alpha=config.alpha,
            )
            reg, cls = (reg + value, cls) if task == "regression" else (reg, cls + value)
        fusion += reference.hard_sample_fusion(
            student_scores=student.scores[keep].tolist(),
            student_logits=student.logits[keep].tolist(),
            fused_scores=outputs.fused.scores[keep].tolist(),
            fused_logits=outputs.fused.logits[keep].tolist(),
            targets=batch.scores[keep].tolist(),
            labels=batch.labels[keep].tolist(),
        )
        labels = torch.where(keep, batch.labels, -1)

        def keys(stream, features, of):
            return torch.cat([features, queue[stream][0]]).tolist(), torch.cat([of, queue[stream][1]]).tolist()

        text_keys, text_labels = keys("text", teacher.features, batch.labels)
        student_keys, student_labels = keys(name, student.features, labels)
        momentum_keys, _ = keys(f"{name}_momentum", momentum[name].features, labels)
        common = {"temperature": tau, "alpha": config.alpha, "positives": "outside"}
        feat += reference.supcon(
            teacher.features.tolist(),
            student_keys,
            labels.tolist(),
            student_labels,
            momentum_query=teacher.features.tolist(),
            momentum_keys=momentum_keys,
            **common,
        )
        feat += reference.supcon(
            student.features.tolist(),
            text_keys,
            labels.tolist(),
            text_labels,
            momentum_query=momentum[name].features.tolist(),
            momentum_keys=text_keys,
            **common,
        )
    for name, expected in (("reg", reg), ("cls", cls), ("fusion", fusion), ("feat", feat / 2)):
        assert float(terms[name]) == pytest.approx(expected, rel=1e-9), name


def test_padding_and_what_a_missing_modality_holds_change_no_output_bit(parts):
    build, batch = parts
    _, model, _ = build()
    model.eval()
    noisy = {}
    for name, values in batch.features.items():
        steps = torch.arange(values.shape[1])
        padding = (steps >= batch.lengths[name][:, None])[..., None]
        noisy[name] = torch.where(padding, 1e3, values)
    clean, spoiled = model.predict(batch), model.predict(replace(batch, features=noisy))
    assert torch.equal(clean.scores, spoiled.scores)
    assert torch.equal(clean.logits, spoiled.logits)


def test_missing_samples_give_no_gradient_to_their_branch(parts):
    build, batch = parts
    _, model, objective = build()
    absent = replace(
        batch,
        lengths=batch.lengths | {"vision": torch.zeros_like(batch.lengths["vision"])},
        present=batch.present | {"vision": torch.zeros_like(batch.present["vision"])},
    )
    warm_up(model, objective, batch, steps=1)
    model.zero_grad()
    objective(model, absent)[0].backward()
    for parameter in model.branches["vision"].parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert any(parameter.grad.any() for parameter in model.branches["audio"].parameters())


def test_missing_samples_enter_the_queue_in_the_other_streams_only(parts):
    build, batch = parts
    _, model, objective = build()
    warm_up(model, objective, batch, steps=1)
    for stream in objective.queue.streams:
        name = stream.removesuffix("_momentum")
        stored = len(objective.queue.read(stream)[1])
        assert stored == int(batch.present[name].sum())


def test_losses_see_the_queue_as_it_stood_before_the_batch(parts):
    build, batch = parts
    _, model, objective = build()
    objective(model, batch)
    assert len(objective.queue) == 0
    objective.after_step(model)
    assert len(objective.queue) == len(batch.labels)


def test_momentum_models_and_factors_follow_equation_6(parts):
    build, batch = parts
    config, model, objective = build(decay=0.9)
    before = {name: value.clone() for name, value in objective.momentum["audio"].module.state_dict().items()}
    factors = model.fusion.factors.average.clone()
    warm_up(model, objective, batch, steps=1)
    online = model.branches["audio"].state_dict()
    for name, value in objective.momentum["audio"].module.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * online[name], rtol=1e-12, atol=1e-12)
    moved = 0.9 * factors + 0.1 * model.fusion.factors.weight.detach()
    torch.testing.assert_close(model.fusion.factors.average, moved, rtol=1e-6, atol=0)
    assert not torch.equal(moved, factors)
    del config


def test_distillation_adds_nothing_to_the_model_that_predicts(parts):
    build, batch = parts
    _, model, _ = build()
    _, bare, _ = build(gamma_reg=0.0, gamma_cls=0.0, gamma_feat=0.0, gamma_fusion=0.0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in bare.parameters())
    assert set(model.state_dict()) == set(bare.state_dict())
    model.eval()
    assert torch.equal(model.predict(batch).scores, model(batch).fused.scores)


def test_teachers_get_no_gradient_from_response_and_fusion_terms(parts):
    build, batch = parts
    _, model, objective = build()
    outputs = model(batch)
    momentum = {name: objective.momentum[name](*model.inputs(batch, name)) for name in STUDENTS}
    terms = objective.response_terms(outputs, momentum, batch)
    (terms["reg"] + terms["cls"] + objective.fusion_term(outputs, batch)).backward()
    assert all(p.grad is None for p in model.branches["text"].parameters())
    assert all(p.grad is None for p in model.fusion.parameters())
    assert all(p.grad is not None for p in model.branches["audio"].parameters())


@pytest.mark.parametrize(("kind", "longest"), [("Bert", 18), ("Roberta", 16)])
def test_texts_longer_than_the_encoder_has_positions_are_refused(kind, longest):
    transformers = pytest.importorskip("transformers")
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=18,
    ).to_dict()
    encoder = PretrainedTextEncoder("tiny", settings, max_tokens=longest)
    assert encoder(torch.ones(1, 3, longest, dtype=torch.int64)).isfinite().all()
    config = Config(**SMALL, text_encoder="tiny", max_tokens=longest + 1)
    with pytest.raises(
        ValueError, match=f"max_tokens: expected at most {longest}, the positions of tiny, got {longest + 1}"
    ):
        MTMD(config, {"audio": 4, "vision": 4}, encoder_config=settings)


def test_relu_heads_predict_no_negative_score_and_the_default_does(parts):
    build, batch = parts
    for relu, expected in ((True, False), (False, True)):
        _, model, _ = build(relu_heads=relu)
        scores = torch.cat([model(batch).unimodal[name].scores for name in MODALITIES])
        assert bool((scores < 0).any()) is expected


def test_each_parameter_has_one_of_the_three_learning_rates_once(parts):
    build, _ = parts
    config, model, _ = build()
    groups = model.parameter_groups(config)
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert {rates[id(p)] for name in STUDENTS for p in model.branches[name].parameters()} == {5e-3}
    assert {rates[id(p)] for p in model.fusion.parameters()} == {1e-3}


@pytest.mark.parametrize("modalities", [["text", "audio", "vision"], ["text", "vision"]])
def test_a_fusion_that_starts_from_text_says_what_the_text_branch_says(parts, modalities):
    build, batch = parts
    _, model, objective = build(fusion_start="text", fused_width=16, modalities=modalities)
    outputs = model(batch)
    text = outputs.unimodal["text"]
    for fused, own in zip(outputs.fused, text, strict=True):
        torch.testing.assert_close(fused, own, rtol=1e-12, atol=1e-15)
    warm_up(model, objective, batch)  # and learns from there, from every branch
    columns = model.fusion.mix[0].weight.detach().split(16, dim=1)
    assert all(block.abs().sum(dim=1).min() < block.abs().sum(dim=1).max() for block in columns[1:])
    with pytest.raises(ValueError, match=r"fused_width: expected width \(16\) with fusion_start 'text', got 12"):
        build(fusion_start="text")


def test_layers_of_a_text_encoder_have_rates_that_fall_towards_the_words():
    from transformers import BertConfig

    small = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8)
    encoder = PretrainedTextEncoder("bert", small.to_dict())
    groups = encoder.parameter_groups(0.1, 0.5)
    assert [rate for _, rate in groups] == pytest.approx([0.1 / 8, 0.1 / 4, 0.1 / 2, 0.1])
    rates = {id(parameter): rate for parameters, rate in groups for parameter in parameters}
    assert rates[id(encoder.bert.get_input_embeddings().weight)] == pytest.approx(0.1 / 8)
    assert rates[id(encoder.bert.encoder.layer[1].output.dense.weight)] == 0.1 / 2
    listed = [id(parameter) for parameters, _ in groups for parameter in parameters]
    assert sorted(listed) == sorted(map(id, encoder.parameters()))
    assert [rate for _, rate in encoder.parameter_groups(0.1, 1.0)] == [0.1]


def test_the_mean_of_a_text_behind_others_is_over_the_text_alone():
    from transformers import BertConfig

    torch.manual_seed(0)
    small = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    encoder = PretrainedTextEncoder("bert", small.to_dict(), pooling="mean").eval()
    ids = torch.tensor([[1, 5, 6, 2, 7, 8, 2], [1, 7, 8, 2, 0, 0, 0]])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0] * 7])
    tokens = torch.stack([ids, (ids > 0).long(), segments], dim=1)
    states = encoder.bert(ids, attention_mask=tokens[:, 1], token_type_ids=segments).last_hidden_state
    expected = torch.stack([states[0, 4:].mean(dim=0), states[1, :4].mean(dim=0)])
    torch.testing.assert_close(encoder(tokens), expected)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule(schedule):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_schedule(optimizer, Config(schedule=schedule), steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    if schedule == "constant":
        assert rates == [1.0] * 100
    else:
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == rates[9] == pytest.approx(1.0)
        assert rates[-1] < 1e-3
        assert rates[10:] == sorted(rates[10:], reverse=True)
