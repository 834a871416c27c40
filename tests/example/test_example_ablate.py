"""`ablate`: which arms it runs, into which folders, and what its tables leave out."""

import argparse
import dataclasses
import json
import os
import re

import pytest
from rich.console import Console

import mtmd_mosi
from mtmd.results.compare import compare_experiments
from mtmd.runs.experiment import run_experiment
from mtmd.settings.config import PARTS, Config
from mtmd.settings.options import add_config_arguments, config_from
from mtmd.study import jobs
from mtmd.study.ablation import ARMS, arm_config
from study_cases import TINY, fake_experiment, read


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: every configuration that was run, with made-up results."""
    configs = []

    def run_experiment(config, console):
        configs.append(config)
        console.print("trained")
        if "queue" in config.without:
            raise FloatingPointError("seed 1: expected a finite loss, got nan")
        return fake_experiment(config, noise=0.5 + 0.1 * len(config.without))

    monkeypatch.setattr(jobs, "run_experiment", run_experiment)
    return configs


def test_the_arms_switch_off_every_part_once_and_the_numbers_are_the_papers():
    assert sorted(part for arm in ARMS.values() for part in arm.without) == sorted(PARTS)
    printed = {arm.label: arm.paper for name, arm in ARMS.items() if name not in ("no_momentum_mfd",)}
    assert printed["MTMD"] == (47.5, 84.0, 86.0, 83.9, 86.0, 0.705, 0.799)
    assert printed["w/o t subtask"] == (17.9, 55.0, 53.1, 52.5, 51.2, 1.420, 0.234)
    assert printed["No Distill"] == (44.0, 81.8, 83.2, 81.7, 83.3, 0.749, 0.780)
    for name, arm in ARMS.items():
        assert len(arm.paper) == (0 if name in ("instance_sampling", "text_only") else 7)


def test_all_arms_are_run_into_folders_of_their_own_and_the_tables_are_the_papers(tmp_path, trained, capsys):
    arguments = ["ablate", "--out", str(tmp_path), "--seeds", "1", "2", "--resamples", "100", "--alpha", "0.3"]
    assert mtmd_mosi.main(arguments) == 1  # no_queue did not train
    assert [config.out.name for config in trained] == list(ARMS)
    assert all(config.alpha == 0.3 and config.seeds == [1, 2] and config.resume for config in trained)
    by_name = {config.out.name: config for config in trained}
    assert by_name["no_reg"].without == ["reg"]
    assert by_name["full"].without == []
    assert by_name["instance_sampling"].sampling == "instance"
    assert by_name["text_only"].modalities == ["text"]

    second = {row["name"]: row for row in read(tmp_path / "table2.csv")}
    assert list(second) == [name for name in ARMS if name != "instance_sampling"]
    assert [row["part"] for row in second.values()] == ["(1) DMD"] * 5 + ["(2) MFD"] * 4 + [""] * 6
    assert float(second["no_cls"]["mae_paper"]) == 0.728
    results = json.loads((tmp_path / "no_cls" / "results.json").read_text())
    assert float(second["no_cls"]["mae_mean"]) == pytest.approx(results["mean"]["mae"], rel=1e-5)
    assert float(second["no_cls"]["acc7_sd"]) == pytest.approx(100 * results["std"]["acc7"], rel=1e-5)
    expected, _ = compare_experiments(tmp_path / "no_cls", tmp_path / "full", resamples=100)
    assert float(second["no_cls"]["mae_high_over_utterances"]) == pytest.approx(expected.high, rel=1e-4)
    assert second["full"]["mae_difference_over_utterances"] == ""
    assert second["no_queue"]["label"] == "w/o queue (did not train)"
    assert second["no_queue"]["mae_mean"] == ""

    kept = json.loads((tmp_path / "ablation.json").read_text())["arms"]
    assert list(kept) == [name for name in ARMS if name != "no_queue"]
    assert [run["test"] for run in kept["no_cls"]["runs"]] == [run["test"] for run in results["runs"]]
    assert kept["no_cls"]["minus_full"]["mae_over_utterances"]["high"] == expected.high
    assert kept["full"]["minus_full"] == {}

    third = read(tmp_path / "table3.csv")
    assert [row["label"] for row in third] == ["i ≠ j", "cls_i ≠ cls_j"]
    assert (third[0]["acc2_has0_paper"], third[0]["mae_paper"], third[1]["mae_paper"]) == ("83.1", "", "0.705")
    shown = (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert "no comparison" in shown  # synthetic data beside numbers on CMU-MOSI
    assert "| w/o L_reg | 2 |" in shown
    assert "no_queue did not train: seed 1: expected a finite loss" in capsys.readouterr().out


def test_a_subset_of_arms_gives_the_tables_that_it_can_fill(tmp_path, trained):
    arguments = ["ablate", "--out", str(tmp_path), "--seeds", "1", "--resamples", "20", "--arms"]
    assert mtmd_mosi.main([*arguments, "no_feat", "full"]) == 0
    assert [row["name"] for row in read(tmp_path / "table2.csv")] == ["no_feat", "full"]
    assert not (tmp_path / "table3.csv").exists()
    assert read(tmp_path / "table2.csv")[0]["mae_low_over_seeds"] == ""  # a single seed
    assert mtmd_mosi.main([*arguments, "no_reg", "--no-resume", "--without", "cls"]) == 0
    assert trained[-1].without == ["reg", "cls"]
    assert not trained[-1].resume
    assert "mae_low_over_utterances" not in read(tmp_path / "table2.csv")[0]  # nothing to compare with


def test_arms_can_be_added_by_later_calls(tmp_path, trained, capsys):
    arguments = ["ablate", "--out", str(tmp_path), "--resamples", "20", "--seeds", "1", "2", "--arms"]
    assert mtmd_mosi.main([*arguments, "full"]) == 0
    assert mtmd_mosi.main([*arguments, "no_reg"]) == 0
    assert mtmd_mosi.main([*arguments, "instance_sampling"]) == 0
    assert [config.out.name for config in trained] == ["full", "no_reg", "instance_sampling"]
    second = read(tmp_path / "table2.csv")
    assert [row["name"] for row in second] == ["no_reg", "full"]
    expected, _ = compare_experiments(tmp_path / "no_reg", tmp_path / "full", resamples=20)
    assert float(second[0]["mae_low_over_utterances"]) == pytest.approx(expected.low, rel=1e-4)
    assert [row["name"] for row in read(tmp_path / "table3.csv")] == ["instance_sampling", "full"]
    capsys.readouterr()

    assert mtmd_mosi.main([*arguments, "no_cls", "--alpha", "0.3"]) == 0  # another ablation in the same place
    assert [row["name"] for row in read(tmp_path / "table2.csv")] == ["no_cls"]
    assert "no_reg is not in the tables" in (shown := capsys.readouterr().out)
    assert "expected the settings of this call, got other ones (alpha)" in shown
    arguments[arguments.index("2")] = "3"
    assert mtmd_mosi.main([*arguments, "no_feat"]) == 0
    assert [row["name"] for row in read(tmp_path / "table2.csv")] == ["no_feat"]
    assert "expected seeds 1, 3, got 1, 2" in capsys.readouterr().out


def test_arms_of_other_data_and_damaged_ones_stay_out_of_the_tables(tmp_path, trained, capsys):
    arguments = ["ablate", "--out", str(tmp_path), "--resamples", "20", "--seeds", "1", "--arms"]
    assert mtmd_mosi.main([*arguments, "full", "no_reg", "no_cls"]) == 0
    path = tmp_path / "full" / "results.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))
    (tmp_path / "no_reg" / "results.json").write_text("{}")
    (tmp_path / "no_cls" / "predictions.csv").unlink()
    assert mtmd_mosi.main([*arguments, "no_feat"]) == 0
    assert [row["name"] for row in read(tmp_path / "table2.csv")] == ["no_feat"]
    assert len(trained) == 4
    shown = capsys.readouterr().out
    assert "expected the data of the other arms, got other data" in shown
    assert "expected the results of `train`, got a file without 'config'" in shown
    assert "predictions.csv: expected the predictions of a finished experiment, got no such file" in shown


@pytest.mark.parametrize("jobs_", [1, pytest.param(2, marks=pytest.mark.long)])
def test_an_arm_with_wrong_settings_or_data_does_not_lose_the_others(tmp_path, capsys, jobs_):
    """The real thing, small: one folder holds another experiment."""
    fake_experiment(Config(out=tmp_path / "no_reg", seeds=[1], alpha=0.2))
    arguments = ["ablate", *TINY, "--seeds", "1", "--resamples", "20", "--out", str(tmp_path), "--jobs", str(jobs_)]
    assert mtmd_mosi.main([*arguments, "--arms", "full", "no_reg"]) == 1
    assert [(row["label"], row["runs"]) for row in read(tmp_path / "table2.csv")] == [
        ("w/o L_reg (did not train)", "0"),
        ("MTMD", "1"),
    ]
    assert "no_reg did not train: --resume: expected the settings of" in capsys.readouterr().out


def test_where_no_arm_trains_there_are_no_tables(tmp_path, trained, capsys):
    assert mtmd_mosi.main(["ablate", "--arms", "no_queue", "--out", str(tmp_path)]) == 2
    assert "ablate: no arm trained; no_queue: seed 1: expected a finite loss, got nan" in capsys.readouterr().err
    assert trained
    assert not list(tmp_path.iterdir())


def test_instance_sampling_is_trained_with_a_plain_queue(tmp_path, trained):
    arguments = ["ablate", "--arms", "full", "instance_sampling", "--balanced-queue", "--resamples", "20"]
    assert mtmd_mosi.main([*arguments, "--out", str(tmp_path)]) == 0
    assert {config.out.name: config.balanced_queue for config in trained} == {"full": True, "instance_sampling": False}
    assert "has a balanced queue" in (tmp_path / "table3.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "left_out", "note"),
    [
        ([], set(), ""),
        (["--modalities", "text", "audio"], {"no_vision_task"}, "--modalities text audio"),
        (["--without", "vision_task"], {"no_vision_task"}, "--without vision_task"),
        (["--sampling", "instance"], {"instance_sampling"}, "--sampling instance"),
        (["--without", "feat"], {"no_feat", "no_queue", "instance_sampling"}, "--without feat"),
        (["--modalities", "text"], set(ARMS) - {"full"}, "--modalities text"),
        (
            ["--modalities", "audio", "vision"],
            {"no_text_task", "text_only", "no_reg", "no_cls", "no_feat", "no_queue", "no_momentum_dmd"}
            | {"instance_sampling"},
            "--modalities audio vision",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arms_that_cannot_differ_from_full_are_left_out(tmp_path, trained, capsys, arguments, left_out, note):
    mtmd_mosi.main(["ablate", "--out", str(tmp_path), "--resamples", "5", *arguments])
    assert {config.out.name for config in trained} == set(ARMS) - left_out
    shown = capsys.readouterr().out
    assert set(re.findall(r"note: (\w+) is left out", shown)) == left_out
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert ("Every line, MTMD too, was trained with" in text) == bool(note)
    assert note in text


@pytest.mark.long
@pytest.mark.parametrize(
    ("base", "arms"),
    [
        (["--without", "feat"], ["no_queue", "instance_sampling"]),
        (["--modalities", "audio", "vision"], ["no_reg", "no_momentum_dmd"]),
        (["--modalities", "text"], ["no_distillation", "no_momentum_mfd"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_arms_that_are_left_out_train_what_full_trains(tmp_path, base, arms):
    """The real thing, small."""
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    config = config_from(parser.parse_args([*TINY, "--seeds", "1", "--out", str(tmp_path), *base]))
    for name in ("full", *arms):
        run_experiment(arm_config(config, name), Console(quiet=True))
    full, *others = (read(tmp_path / name / "predictions.csv") for name in ("full", *arms))
    assert others == [full] * len(others)


def test_without_any_arm_that_differs_there_is_nothing_to_do(tmp_path, capsys):
    arguments = ["ablate", "--out", str(tmp_path), "--modalities", "audio", "--arms", "no_audio_task"]
    assert mtmd_mosi.main(arguments) == 2
    captured = capsys.readouterr()
    assert "note: no_audio_task is left out: no modality is left" in captured.out
    assert "--arms: expected an arm that can be told from full with these settings, got no_audio_task" in captured.err


def test_seeds_that_were_not_asked_for_stay_out_of_the_table(tmp_path, monkeypatch, capsys):
    def run_experiment(config, _):
        every = dataclasses.replace(config, seeds=[1, 2, 3])  # as when two of them were there before
        return fake_experiment(every, offset={1: 0.0, 2: 0.5, 3: 1.0})

    monkeypatch.setattr(jobs, "run_experiment", run_experiment)
    assert mtmd_mosi.main(["ablate", "--arms", "full", "no_reg", "--seeds", "2", "--out", str(tmp_path)]) == 0
    (no_reg, full) = read(tmp_path / "table2.csv")
    results = json.loads((tmp_path / "full" / "results.json").read_text())
    assert full["runs"] == "1"
    assert f"full: test MAE {results['runs'][1]['test']['mae']:.3f}" in capsys.readouterr().out
    assert float(full["mae_mean"]) == pytest.approx(results["runs"][1]["test"]["mae"], rel=1e-5)
    assert no_reg["mae_low_over_seeds"] == ""


def test_an_arm_that_was_trained_is_used_again(tmp_path, capsys):
    """The real thing, small."""
    arguments = ["ablate", *TINY, "--seeds", "1", "--resamples", "50", "--out", str(tmp_path), "--arms"]
    assert mtmd_mosi.main([*arguments, "full"]) == 0
    weights = tmp_path / "full" / "checkpoint_seed1.safetensors"
    before = weights.stat().st_mtime_ns
    assert mtmd_mosi.main([*arguments, "full", "no_distillation"]) == 0
    assert weights.stat().st_mtime_ns == before
    full, other = (read(tmp_path / name / "steps_seed1.csv") for name in ("full", "no_distillation"))
    assert full[-1]["gt"] != other[-1]["gt"]
    assert "Ablation of MTMD on synthetic data" in capsys.readouterr().out
    (row, _) = read(tmp_path / "table2.csv")
    assert float(row["mae_low_over_utterances"]) < float(row["mae_high_over_utterances"])


@pytest.mark.long
def test_arms_train_in_processes_side_by_side(tmp_path):
    arguments = ["ablate", *TINY, "--arms", "full", "no_fusion", "--seeds", "1", "--resamples", "50"]
    assert mtmd_mosi.main([*arguments, "--out", str(tmp_path), "--jobs", "2"]) == 0
    assert [row["name"] for row in read(tmp_path / "table2.csv")] == ["no_fusion", "full"]
    for name in ("full", "no_fusion"):
        assert "test fold" in (tmp_path / name / "log.txt").read_text(encoding="utf-8")


class Dies:
    """Ends the process that unpickles it, as the system does when memory runs out."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.long
def test_a_process_that_ends_early_is_told(capsys):
    with pytest.raises(OSError, match="--jobs: a process ended before its experiment did"):
        list(jobs.run_many({"arm": Dies()}, None, jobs=2))
    capsys.readouterr()


def test_wrong_settings_of_an_experiment_name_it(monkeypatch):
    def run_experiment(*_):
        raise ValueError("width: expected at least 1, got 0")

    monkeypatch.setattr(jobs, "run_experiment", run_experiment)
    with pytest.raises(ValueError, match=r"^no_reg: width: expected at least 1, got 0$"):
        list(jobs.run_many({"no_reg": Config()}, None))
    assert list(jobs.run_many({"no_reg": Config(), "no_cls": Config()}, None, keep_going=True)) == [
        (name, {"error": "width: expected at least 1, got 0"}) for name in ("no_reg", "no_cls")
    ]
