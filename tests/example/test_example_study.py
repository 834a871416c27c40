"""`ablate`, `search` and `report`: what they run, what they judge by, and what they write."""

import argparse
import csv
import dataclasses
import json
import os
import re
import types
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import mtmd_mosi
from conftest import ROOT
from full_disk import file_size_limit
from mtmd.files.reading import read_toml
from mtmd.results.bootstrap import Comparison
from mtmd.results.compare import compare_experiments
from mtmd.results.tables import Row, difference_cell, own_cell, p_cell, row_of, write_table
from mtmd.runs.experiment import run_experiment
from mtmd.settings import cli
from mtmd.settings.config import NOT_IDENTITY, PARTS, Config
from mtmd.settings.options import add_config_arguments, config_from
from mtmd.study import jobs, report, search
from mtmd.study.ablation import ARMS, arm_config
from study_cases import TINY, fake_experiment


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fails(capsys, arguments):
    """Run a command that must fail: the message on its one line."""
    assert mtmd_mosi.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = (captured.err or captured.out).strip().splitlines()
    return line


# Tables


def test_cells_have_percent_with_one_decimal_and_mae_and_corr_with_three():
    runs = [
        {"acc7": 0.451, "acc2_has0": 0.8, "acc2_non0": 0.82, "f1_has0": 0.8, "f1_non0": 0.82, "mae": 0.7, "corr": 0.79},
        {
            "acc7": 0.469,
            "acc2_has0": 0.84,
            "acc2_non0": 0.86,
            "f1_has0": 0.8,
            "f1_non0": 0.8,
            "mae": 0.73,
            "corr": None,
        },
    ]
    row = row_of("full", "MTMD", runs)
    assert own_cell(row, ["acc7"]) == "46.0 ± 1.3"
    assert own_cell(row, ["acc2_has0", "acc2_non0"]) == "82.0 ± 2.8 / 84.0 ± 2.8"
    assert own_cell(row, ["mae"]) == "0.715 ± 0.021"
    assert own_cell(row, ["corr"]) == "-"
    assert own_cell(row_of("one", "one seed", runs[:1]), ["mae"]) == "0.700"


def test_a_table_with_intervals_says_what_they_leave_out(tmp_path):
    runs = [{"acc7": 0.4, "acc2_has0": 0.8, "acc2_non0": 0.8, "f1_has0": 0.8, "f1_non0": 0.8, "mae": 0.7, "corr": 0.7}]
    row, warning = row_of("a", "a", runs), "Clips of one speaker are correlated"
    shown = write_table([row], tmp_path / "plain", title="Title")
    assert warning not in (tmp_path / "plain.md").read_text(encoding="utf-8") + str(shown.caption)
    row.over_utterances = Comparison(0.01, -0.01, 0.03, 0.3)
    shown = write_table([row], tmp_path / "compared", title="Title", against="b")
    assert (tmp_path / "compared.md").read_text(encoding="utf-8").count(warning) == 1
    assert str(shown.caption).count(warning) == 1


def test_a_table_has_the_papers_columns_in_the_papers_order(tmp_path):
    runs = [{"acc7": 0.4, "acc2_has0": 0.8, "acc2_non0": 0.8, "f1_has0": 0.8, "f1_non0": 0.8, "mae": 0.7, "corr": 0.7}]
    rows = [row_of("a", "a | b", runs, paper={"acc7": 47.5}), Row("c", "c (did not train)")]
    write_table(rows, tmp_path / "table", title="Title")
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Title"
    assert lines[2] == "|  | runs | Acc7 ↑ | paper | Acc2 ↑ | paper | F1 ↑ | paper | MAE ↓ | paper | Corr ↑ | paper |"
    assert lines[4].startswith("| a \\| b | 1 | 40.0 | 47.5 | 80.0 / 80.0 | - |")
    assert lines[5].startswith("| c (did not train) |  | - |")
    assert read(tmp_path / "table.csv")[0]["acc7_mean"] == "40"
    assert read(tmp_path / "table.csv")[0]["acc7_sd"] == ""


def test_tiny_p_values_are_not_called_zero():
    comparison = Comparison(0.0123, -0.001, 0.0256, 0.0002)
    assert p_cell(comparison) == "< 0.001"
    assert difference_cell(comparison) == "+0.012 [-0.001, +0.026]"


# report


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """Three experiments of three seeds, two of them with a part switched off, and the report on them."""
    base = tmp_path_factory.mktemp("study")
    for name, noise, changes in (
        ("full", 0.4, {}),
        ("no_distillation", 0.9, {"without": ["distillation", "fusion_factors"]}),
        ("text_only", 0.8, {"modalities": ["text"]}),
    ):
        fake_experiment(Config(out=base / name, seeds=[1, 2, 3], **changes), noise=noise)
    names = ["full", "no_distillation", "text_only"]
    arguments = ["report", *(str(base / name) for name in names), "--before", str(base / "no_distillation")]
    assert mtmd_mosi.main([*arguments, "--resamples", "300"]) == 0
    return base


FIGURES = ("losses", "fusion_factors", "tsne", "confusion", "error_by_class")


def test_report_draws_every_figure_with_its_numbers_beside(experiments):
    out = experiments / "full" / "report"
    for name in ("full", "text_only"):
        for figure in FIGURES:
            assert (out / name / f"{figure}.svg").read_bytes().startswith(b"<?xml")
            assert len(read(out / name / f"{figure}.csv")) > 2
    assert not (out / "no_distillation" / "fusion_factors.svg").exists()  # it has none


def test_report_md_shows_exactly_the_figures_that_there_are(experiments):
    out = experiments / "full" / "report"
    text = (out / "report.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(shown) == sorted(str(path.relative_to(out)) for path in out.rglob("*.svg"))
    linked = re.findall(r"\]\(([^)]*csv)\)", text)
    assert sorted(linked) == sorted(str(path.relative_to(out)) for path in out.rglob("*.csv") if path.stem != "results")
    assert "| full | 3 |" in text


def test_report_md_says_what_it_was_made_with(experiments, tmp_path):
    text = (experiments / "full" / "report" / "report.md").read_text(encoding="utf-8")
    folders = ", ".join(f"`{experiments / name}`" for name in ("full", "no_distillation", "text_only"))
    assert text[text.index("## Made with") :].splitlines()[2:] == [
        f"- experiments: {folders}",
        f"- before, in Fig. 6: `{experiments / 'no_distillation'}`",
        "- seed, in Fig. 6: the first of each experiment",
        "- resamples of the bootstrap: 300",
    ]
    arguments = ["report", str(experiments / "text_only"), "--out", str(tmp_path), "--seed", "2", "--resamples", "10"]
    assert mtmd_mosi.main(arguments) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- before, in Fig. 6: the same model before training\n- seed, in Fig. 6: 2\n" in text


def test_report_compares_with_the_first_experiment_branch_by_branch(experiments):
    rows = {(row["part"], row["name"]): row for row in read(experiments / "full" / "report" / "results.csv")}
    assert [name for part, name in rows if part == "audio branch"] == ["full", "no_distillation"]
    assert rows["fused prediction", "full"]["mae_difference_over_utterances"] == ""
    folders = [experiments / name for name in ("no_distillation", "full")]
    for part, column in (("fused prediction", "score"), ("vision branch", "vision")):
        row = rows[part, "no_distillation"]
        for kind, found in zip(
            ("utterances", "seeds"), compare_experiments(*folders, column=column, resamples=300), strict=True
        ):
            assert float(row[f"mae_low_over_{kind}"]) == pytest.approx(found.low, rel=1e-4)
            assert float(row[f"mae_p_over_{kind}"]) == pytest.approx(found.p, rel=1e-4)
        assert float(row["mae_difference_over_utterances"]) == pytest.approx(
            float(row["mae_mean"]) - float(rows[part, "full"]["mae_mean"]), abs=1e-5
        )


def test_confusion_and_error_by_class_are_those_of_the_predictions(experiments):
    with (experiments / "full" / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]

    def kind(score):
        return round(min(3.0, max(-3.0, float(score))))  # half to even, as numpy does

    confusion = {
        (int(row["true"]), int(row["predicted"])): float(row["count"])
        for row in read(experiments / "full" / "report" / "full" / "confusion.csv")
    }
    for true in range(-3, 4):
        for predicted in range(-3, 4):
            count = sum(kind(row["target"]) == true and kind(row["score"]) == predicted for row in rows)
            assert confusion[true, predicted] == pytest.approx(count / 3, rel=1e-5)
    for line in read(experiments / "full" / "report" / "full" / "error_by_class.csv"):
        by_seed = {}
        for row in rows:
            if kind(row["target"]) == int(line["class"]):
                by_seed.setdefault(row["seed"], []).append(abs(float(row["score"]) - float(row["target"])))
        maes = [np.mean(errors) for errors in by_seed.values()]
        if maes:
            assert float(line["mae_mean"]) == pytest.approx(np.mean(maes), rel=1e-4)
            assert float(line["mae_sd"]) == pytest.approx(np.std(maes, ddof=1), rel=1e-4)


def test_before_shows_the_other_experiment_and_else_the_start(experiments, tmp_path, monkeypatch):
    embedded = []
    monkeypatch.setattr(report, "embed", lambda features: embedded.append(features) or features[:, :2])
    folder, other = experiments / "full", experiments / "no_distillation"
    arguments = ["report", str(folder), "--out", str(tmp_path), "--seed", "2", "--resamples", "10"]
    arrays = [np.load(path / "representations_seed2.npz") for path in (folder, other)]
    assert mtmd_mosi.main([*arguments, "--before", str(other)]) == 0
    assert np.array_equal(embedded[0], arrays[1]["features"])
    assert np.array_equal(embedded[1], arrays[0]["features"])
    assert mtmd_mosi.main(arguments) == 0
    assert np.array_equal(embedded[2], arrays[0]["initial"])
    assert "before training" in (tmp_path / "report.md").read_text()


def test_another_seed_of_the_other_experiment_is_named(experiments, tmp_path):
    fake_experiment(Config(out=tmp_path / "other", seeds=[7]))
    arguments = ["report", str(experiments / "full"), "--out", str(tmp_path), "--resamples", "10"]
    assert mtmd_mosi.main([*arguments, "--before", str(tmp_path / "other")]) == 0
    assert "before: other, seed 7 and after: full, seed 1 (Fig. 6)" in (tmp_path / "report.md").read_text()


def test_one_utterance_has_no_plane(tmp_path):
    one = types.SimpleNamespace(representations={1: {"ids": np.array(["test0"]), "scores": np.ones(1)}})
    assert report.draw_embedding(one, None, 1, tmp_path / "tsne.svg") == ""


def test_a_disk_that_is_full_leaves_the_report_before(experiments, tmp_path, capsys):
    arguments = ["report", str(experiments / "text_only"), "--out", str(tmp_path), "--resamples", "10"]
    assert mtmd_mosi.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with file_size_limit(1000):
        assert fails(capsys, arguments).startswith("error: [Errno 27] File too large: ")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.keys() == before.keys()
    assert all(left[name] == content for name, content in before.items() if len(content) > 1000)


def test_a_report_of_one_experiment_on_sims_has_five_classes_and_its_own_metrics(tmp_path):
    config = Config(out=tmp_path / "run", seeds=[1], data=tmp_path / "sims.pkl", dataset="sims")
    fake_experiment(config, dataset="sims")
    (config.out / "steps_seed1.csv").unlink()
    (config.out / "representations_seed1.npz").unlink()
    assert mtmd_mosi.main(["report", str(config.out), "--resamples", "10", "--format", "pdf"]) == 0
    out = config.out / "report"
    assert sorted(path.name for path in out.glob("*.pdf")) == ["confusion.pdf", "error_by_class.pdf"]
    assert len(read(out / "confusion.csv")) == 25
    results = json.loads((config.out / "results.json").read_text())
    (row,) = [row for row in read(out / "results.csv") if row["part"] == "fused prediction"]
    assert float(row["acc5_mean"]) == pytest.approx(100 * results["mean"]["acc5"], rel=1e-4)
    mae = sum(float(row["mae_mean"]) * int(row["n"]) for row in read(out / "error_by_class.csv")) / 40
    assert mae == pytest.approx(results["mean"]["mae"], rel=1e-4)  # clipped to [-1, 1] there and here


def test_the_papers_line_stands_below_results_on_its_data_only(tmp_path, experiments):
    config = Config(out=tmp_path / "run", seeds=[1], data=tmp_path / "mosi.pkl")
    fake_experiment(config, dataset="mosi")
    experiment = report.Experiment.load(config.out, "run")
    table = report.write_results([experiment], tmp_path / "results", resamples=10)
    (paper,) = [row for row in read(tmp_path / "results.csv") if row["name"] == "paper"]
    assert (paper["acc7_mean"], paper["mae_mean"], paper["corr_mean"]) == ("47.5", "0.705", "0.799")
    assert "CMU-MOSI" in str(table.title)
    assert "paper" not in {row["name"] for row in read(experiments / "full" / "report" / "results.csv")}


def test_what_cannot_be_reported_is_told_on_one_line(experiments, tmp_path, capsys):
    full = experiments / "full"
    expected = "expected the folder of one experiment, got"
    assert fails(capsys, ["report", tmp_path]).endswith(f"{expected} one without results.json")
    assert fails(capsys, ["report", tmp_path / "none"]).endswith(f"{expected} no folder")
    line = fails(capsys, ["report", experiments])
    assert line.endswith("without results.json; experiments in it: full, no_distillation, text_only")
    assert expected in fails(capsys, ["report", full, "--before", tmp_path, "--out", tmp_path / "r"])
    assert fails(capsys, ["report", full, full]) == "error: report: expected each folder once"
    assert "--seed: expected one of 1, 2, 3" in fails(capsys, ["report", full, "--seed", "9", "--out", tmp_path / "r"])
    assert "at most 7 folders, got 8" in fails(capsys, ["report", *[full] * 8])
    fake_experiment(Config(out=tmp_path / "other", seeds=[1]), utterances=24)
    message = fails(capsys, ["report", full, tmp_path / "other", "--out", tmp_path / "r"])
    assert "compare experiments on the same data" in message


def test_experiments_of_the_same_name_are_told_apart():
    names = report.short_names([Path("/runs/a/full"), Path("/runs/b/full")])
    assert names == ["a_full", "b_full"]
    assert report.short_names([Path("/runs/a/full"), Path("/runs/b/none")]) == ["full", "none"]


# ablate


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


# search


@pytest.fixture
def tried(monkeypatch):
    """Stands in for training: low alpha is good on validation, and bad on the test fold."""
    configs = []

    def run_experiment(config, _):
        configs.append(config)
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "predictions.csv").write_text("what is known of the test fold")
        if config.alpha == 0.6:
            raise FloatingPointError("seed 1: expected a finite loss, got nan")
        mae = config.alpha + 0.01 * config.gamma_reg
        runs = [
            {
                "seed": seed,
                "valid": {"mae": mae + 0.001 * place, "corr": 0.5},
                "test": {"mae": 1 - mae, "corr": 0.777},
                "best_epoch": 2,
                "epochs": 3,
                "seconds": 1.0,
                "precision": "float32",
            }
            for place, seed in enumerate(config.seeds)
        ]
        return {"dataset": {"sha256": "0" * 64}, "runs": runs}

    monkeypatch.setattr(jobs, "run_experiment", run_experiment)
    return configs


def points_of(configs):
    return [tuple(getattr(config, name) for name in search.PAPER_GRID) for config in configs]


def test_points_are_drawn_without_repetition_from_the_whole_grid_and_more_of_them_go_on():
    grid = {"alpha": (0.2, 0.3), "temperature": (0.1, 0.5, 0.9)}
    points = [tuple(point.values()) for point in search.sample(grid, 0)]
    assert sorted(points) == sorted((alpha, warm) for alpha in (0.2, 0.3) for warm in (0.1, 0.5, 0.9))
    sampler = search.sample(search.PAPER_GRID, 3)
    first = [next(sampler) for _ in range(200)]
    assert len({tuple(point.values()) for point in first}) == 200
    again = search.sample(search.PAPER_GRID, 3)
    assert [next(again) for _ in range(20)] == first[:20]
    assert next(search.sample(search.PAPER_GRID, 4)) != first[0]
    for name, values in search.PAPER_GRID.items():
        assert {point[name] for point in first} == set(values)


def test_the_papers_grid():
    assert {
        **dict.fromkeys(("gamma_reg", "gamma_cls", "gamma_feat", "gamma_fusion"), (0.6, 0.8, 1.0)),
        "alpha": (0.2, 0.3, 0.4, 0.5, 0.6),
        "temperature": (0.1, 0.3, 0.5, 0.7, 0.9),
    } == search.PAPER_GRID


def test_search_judges_on_validation_and_keeps_nothing_of_the_test_fold(tmp_path, tried, capsys):
    assert mtmd_mosi.main(["search", "--trials", "12", "--seeds", "1", "2", "--out", str(tmp_path)]) == 0
    assert len(set(points_of(tried))) == 12
    rows = read(tmp_path / "search.csv")
    maes = [float(row["valid_mae_mean"]) for row in rows if row["valid_mae_mean"]]
    assert maes == sorted(maes)
    assert [row["rank"] for row in rows] == [str(place) for place in range(1, 13)]
    failed = [row for row in rows if row["error"]]
    assert failed == rows[len(rows) - len(failed) :]  # last, and there are some
    assert failed
    best = min(
        (config for config in tried if config.alpha < 0.6), key=lambda config: config.alpha + 0.01 * config.gamma_reg
    )
    assert rows[0]["alpha"] == str(best.alpha)
    assert float(rows[0]["valid_mae_sd"]) == pytest.approx(0.001 / np.sqrt(2), rel=1e-3)
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "test" not in kept
    assert "0.777" not in kept + capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.toml", "search.csv", "trials.jsonl"]


def test_the_best_point_is_a_configuration_for_further_runs(tmp_path, tried):
    arguments = ["search", "--trials", "5", "--width", "24", "--final-seeds", "4", "5", "--out", str(tmp_path)]
    assert mtmd_mosi.main(arguments) == 0
    final = tried[-1]
    assert final.seeds == [4, 5]
    best = read(tmp_path / "search.csv")[0]
    assert final.out == tmp_path / f"best_trial{int(best['trial']):04d}"
    assert all(getattr(final, name) == float(best[name]) for name in search.PAPER_GRID)
    assert final.width == 24
    assert Config.from_values(read_toml(tmp_path / "best.toml"), source="").identity() == final.identity()


def test_each_best_point_is_trained_in_a_folder_of_its_own(tmp_path, tried):
    arguments = ["search", "--out", str(tmp_path), "--final-seeds", "4", "--trials"]
    best = {}
    for trials in ("2", "40"):
        assert mtmd_mosi.main([*arguments, trials]) == 0
        best[int(read(tmp_path / "search.csv")[0]["trial"])] = tried[-1]
    assert len(best) == 2  # more trials found a better one
    assert [config.out for config in best.values()] == [tmp_path / f"best_trial{place:04d}" for place in best]
    assert len({str(config.identity()) for config in best.values()}) == 2


def test_a_store_older_than_a_setting_goes_on(tmp_path, tried, capsys):
    arguments = ["search", "--out", str(tmp_path), "--trials"]
    assert mtmd_mosi.main([*arguments, "2"]) == 0
    store = tmp_path / "trials.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    del header["detach_text"], header["queue_size"]
    store.write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    assert mtmd_mosi.main([*arguments, "3"]) == 0
    assert len(tried) == 3
    line = fails(capsys, [*arguments, "3", "--detach-text"])
    assert "with detach_text False, got True" in line
    assert line.endswith("give another --out, or --no-resume, which deletes the 3 trials there and begins anew")
    store.write_text("[]\n")
    assert "line 1 is damaged; expected the settings of a search" in fails(capsys, [*arguments, "3"])


def test_a_trial_that_was_killed_between_its_line_and_its_deletion_is_deleted(tmp_path, tried):
    assert mtmd_mosi.main(["search", "--out", str(tmp_path), "--trials", "2"]) == 0
    left = tmp_path / "trial0001"
    left.mkdir()
    (left / "predictions.csv").write_text("what is known of the test fold")
    assert mtmd_mosi.main(["search", "--out", str(tmp_path), "--trials", "2"]) == 0
    assert not left.exists()
    assert len(tried) == 2


@pytest.mark.usefixtures("tried")
def test_beginning_anew_deletes_the_search_and_nothing_else(tmp_path):
    arguments = ["search", "--out", str(tmp_path), "--trials", "2", "--no-resume"]
    for name in ("best", "trial_notes", "best_paper"):  # `best` is that of an older version
        (tmp_path / name).mkdir()
    assert mtmd_mosi.main(arguments) == 0
    assert (tmp_path / "best").exists()  # there was no search here
    for name in ("trial0003", "best_trial0003"):
        (tmp_path / name).mkdir()
    assert mtmd_mosi.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("best.toml", "best_paper", "search.csv", "trial_notes", "trials.jsonl")
    ]


def test_a_search_goes_on_where_it_was_killed(tmp_path, tried, capsys):
    arguments = ["search", "--out", str(tmp_path), "--trials"]
    assert mtmd_mosi.main([*arguments, "4"]) == 0
    store = tmp_path / "trials.jsonl"
    whole = store.read_bytes()
    assert mtmd_mosi.main([*arguments, "8"]) == 0  # more trials
    assert len(tried) == 8
    assert store.read_bytes().startswith(whole)
    assert mtmd_mosi.main([*arguments, "8"]) == 0  # nothing left to do
    assert len(tried) == 8
    before = read(tmp_path / "search.csv")
    store.write_bytes(store.read_bytes()[:-30])  # killed in the middle of a line
    assert mtmd_mosi.main([*arguments, "8"]) == 0
    assert points_of(tried[8:]) == [points_of(tried)[7]]
    assert read(tmp_path / "search.csv") == before
    assert "an unfinished last line was taken out" in capsys.readouterr().out
    assert mtmd_mosi.main([*arguments, "2", "--no-resume"]) == 0
    assert len(tried) == 11
    assert len(read(tmp_path / "search.csv")) == 2


def test_an_interrupted_trial_leaves_the_finished_ones_in_the_store(tmp_path, tried, monkeypatch):
    run_experiment = jobs.run_experiment

    def killed(config, console):
        if len(tried) == 3:
            raise KeyboardInterrupt
        return run_experiment(config, console)

    monkeypatch.setattr(jobs, "run_experiment", killed)
    assert mtmd_mosi.main(["search", "--trials", "6", "--out", str(tmp_path)]) == 130
    monkeypatch.setattr(jobs, "run_experiment", run_experiment)
    assert mtmd_mosi.main(["search", "--trials", "6", "--out", str(tmp_path)]) == 0
    assert len(set(points_of(tried))) == len(tried) == 6
    assert tried[3].resume


def test_another_search_in_the_same_folder_is_refused(tmp_path, tried, capsys):
    assert mtmd_mosi.main(["search", "--trials", "2", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    for change, message in (
        (["--layers", "2"], "with layers 3, got 2"),
        (["--search-seed", "5"], "with search_seed 0, got 5"),
        (["--seeds", "7"], "with seeds [1111], got [7]"),
        (["--grid", "alpha=0.1,0.2"], "with "),
    ):
        line = fails(capsys, ["search", "--trials", "2", "--out", tmp_path, *change])
        assert "expected the search that began there" in line
        assert message in line
    lines = (tmp_path / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "trials.jsonl").write_bytes(lines[0] + b"{broken}\n" + lines[2])
    assert "line 2 is damaged" in fails(capsys, ["search", "--trials", "2", "--out", tmp_path])
    assert len(tried) == 2


def test_an_own_grid_takes_settings_of_every_simple_kind(tmp_path, tried):
    grid = ["layers=1,2", "alpha=0.2,0.3", "schedule=constant,cosine", "balanced-queue=true,false"]
    assert mtmd_mosi.main(["search", "--trials", "16", "--out", str(tmp_path), "--grid", *grid]) == 0
    found = {(config.layers, config.alpha, config.schedule, config.balanced_queue) for config in tried}
    assert len(found) == 16
    assert all(type(config.layers) is int and type(config.balanced_queue) is bool for config in tried)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--grid", "alhpa=1"],
            "--grid: expected NAME=V,V with the name of a setting, got 'alhpa=1'; did you mean alpha?",
        ),
        (["--grid", "seeds=1"], "--grid: expected NAME=V,V with the name of a setting, got 'seeds=1'"),
        (["--grid", "alpha"], "--grid: expected NAME=V,V with the name of a setting, got 'alpha'"),
        (["--grid", "without=reg"], "--grid: expected a setting with a number, a word or true and false, got without"),
        (["--grid", "alpha=0.1,high"], "--grid: expected values of type float for alpha, got '0.1,high'"),
        (["--grid", "queue_size=1,"], "--grid: expected values of type int for queue_size, got '1,'"),
        (["--grid", "alpha=0.1,0.10"], "--grid: expected each value of alpha once, got '0.1,0.10'"),
        (
            ["--grid", "queue-size=64", "queue_size=128"],
            "--grid: expected each setting once, with all its values, got queue_size twice",
        ),
        (["--trials", "1", "--grid", "schedule=linear"], "schedule: expected one of cosine, constant, got 'linear'"),
    ],
)
def test_searches_that_cannot_be_meant_are_told_on_one_line(tmp_path, capsys, tried, arguments, message):
    assert fails(capsys, ["search", "--out", tmp_path, *arguments]) == f"error: {message}"
    assert not tried


@pytest.mark.usefixtures("tried")
def test_without_any_trained_trial_there_is_no_best_point(tmp_path, capsys):
    line = fails(capsys, ["search", "--trials", "1", "--grid", "alpha=0.6", "--out", tmp_path])
    assert line.endswith("search: no trial has a validation MAE, so there is no best point")


# The files with the paper's settings

# What says where and how far, what only the synthetic set reads, and what is a matter of speed.
NOT_PINNED = {*NOT_IDENTITY, "data", "synthetic_seed", "wrong_text", "compile", "deterministic"} - {"seeds"}
NOT_PINNED |= {f"signal_{name}" for name in ("text", "audio", "vision")}


@pytest.mark.parametrize("name", ["mosi", "mosei"])
def test_the_papers_settings_do_not_move_with_the_defaults(name):
    """A new setting has to be written into both files, as the paper has it, or be listed above."""
    path = Path(mtmd_mosi.__file__).parent / "configs" / f"{name}.toml"
    assert set(read_toml(path)) == {entry.name for entry in dataclasses.fields(Config)} - NOT_PINNED
    text = path.read_text(encoding="utf-8").replace("\\\n#", "")
    (command,) = re.findall(r"mtmd_mosi\.py (search .*)", text)
    _, arguments, _ = cli.parse(command.split(), "")
    assert (arguments.seeds, arguments.final_seeds) == ([1111], read_toml(path)["seeds"])
    assert arguments.config == Path(f"examples/configs/{name}.toml")


# The page


OF_BASE_SIZE = {
    "mosi_mpnet": {"text_only": "text alone", "no_distillation": "all modalities, no distillation", "full": "MTMD"},
    "mosi_mpnet_float32": {
        "full": "MTMD, in float32",
        "no_reg": "the same, w/o L_reg",
        "no_cls": "the same, w/o L_cls",
        "no_feat": "the same, w/o L_feat",
        "no_queue": "the same, w/o queue",
        "no_momentum_dmd": "the same, w/o MoM of DMD",
        "no_fusion_factors": "the same, w/o w_t/a/v",
        "no_hard_attention": "the same, w/o HardAtt",
        "no_fusion": "the same, w/o L_fusion",
        "no_momentum_mfd": "the same, w/o MoM of MFD",
        "no_text_task": "the same, w/o t subtask",
        "no_audio_task": "the same, w/o a subtask",
        "no_vision_task": "the same, w/o v subtask",
        "instance_sampling": "the same, i ≠ j",
        "context_1": "the same, `--context 1`",
        "decay_0.98": "the same, `--decay 0.98`",
        "layer_decay": "the same, `--layer-decay 0.9`",
    },
}


@pytest.mark.parametrize("file", OF_BASE_SIZE)
def test_the_tables_of_the_encoder_of_base_size_are_those_of_its_results(file):
    path, names = ROOT / "docs" / "results" / f"{file}.json", OF_BASE_SIZE[file]
    content = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    section = page.split("## CMU-MOSI with an encoder of BERT-base's size\n")[1].split("\n## ")[0]
    shown = [
        [cell.strip(" *") for cell in line.split("|")] for line in re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    ]
    assert content["arms"].keys() == names.keys()
    for name, arm in content["arms"].items():
        label = names[name]
        seeds = [run["seed"] for run in arm["runs"]]
        row = row_of(name, label, [run["test"] for run in arm["runs"]])
        text = row_of(name, label, [run["test_unimodal"].get("text", run["test"]) for run in arm["runs"]])
        differences = (arm["minus_full"].get(f"mae_over_{kind}") for kind in ("utterances", "seeds"))
        compared = [None if difference is None else Comparison(**difference) for difference in differences]
        assert [one is None for one in compared] == [name == "full", name == "full" or len(seeds) == 1]
        assert [
            label,
            str(len(seeds)),
            *(own_cell(row, metrics) for metrics in (["acc7"], ["acc2_has0", "acc2_non0"], ["mae"], ["corr"])),
            "" if name == "no_text_task" else own_cell(text, ["mae"]),
            difference_cell(compared[0]),
            difference_cell(compared[1], with_difference=False),
            p_cell(compared[1]),
        ] in shown
        assert seeds == sorted(set(seeds))
    assert path.stat().st_size < 200_000


def test_the_scores_beside_the_results_are_those_of_all_runs():
    folder = ROOT / "docs" / "results"
    arms = json.loads((folder / "mosi_mpnet_float32.json").read_text(encoding="utf-8"))["arms"]
    head, *rows = (folder / "mosi_mpnet_float32_scores.csv").read_text(encoding="utf-8").splitlines()
    assert head.split(",") == [f"{name} {run['seed']}" for name, arm in arms.items() for run in arm["runs"]]
    scores = np.array([row.split(",") for row in rows], dtype=float)
    assert scores.shape == (686, len(head.split(",")))
    assert (np.abs(scores) < 4).all()
