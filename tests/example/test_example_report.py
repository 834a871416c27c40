"""`report`, and the tables of all studies: cells, figures with their numbers, what cannot be shown, the page."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest

import mtmd_mosi
from conftest import ROOT
from full_disk import file_size_limit
from mtmd.results.bootstrap import Comparison
from mtmd.results.compare import compare_experiments
from mtmd.results.tables import Row, difference_cell, own_cell, p_cell, row_of, write_table
from mtmd.settings.config import Config
from mtmd.study import report
from pages import rows, section
from study_cases import fails, fake_experiment, read

# Tables


RUN = {"acc7": 0.4, "acc2_has0": 0.8, "acc2_non0": 0.82, "f1_has0": 0.8, "f1_non0": 0.82, "mae": 0.7, "corr": 0.79}


def test_cells_have_percent_with_one_decimal_and_mae_and_corr_with_three():
    runs = [
        RUN | {"acc7": 0.451},
        RUN | {"acc7": 0.469, "acc2_has0": 0.84, "acc2_non0": 0.86, "mae": 0.73, "corr": None},
    ]
    row = row_of("full", "MTMD", runs)
    assert own_cell(row, ["acc7"]) == "46.0 ± 1.3"
    assert own_cell(row, ["acc2_has0", "acc2_non0"]) == "82.0 ± 2.8 / 84.0 ± 2.8"
    assert own_cell(row, ["mae"]) == "0.715 ± 0.021"
    assert own_cell(row, ["corr"]) == "-"
    assert own_cell(row_of("one", "one seed", runs[:1]), ["mae"]) == "0.700"


def test_a_table_with_intervals_says_what_they_leave_out(tmp_path):
    row, warning = row_of("a", "a", [RUN]), "Clips of one speaker are correlated"
    shown = write_table([row], tmp_path / "plain", title="Title")
    assert warning not in (tmp_path / "plain.md").read_text(encoding="utf-8") + str(shown.caption)
    row.over_utterances = Comparison(0.01, -0.01, 0.03, 0.3)
    shown = write_table([row], tmp_path / "compared", title="Title", against="b")
    assert (tmp_path / "compared.md").read_text(encoding="utf-8").count(warning) == 1
    assert str(shown.caption).count(warning) == 1


def test_a_table_has_the_papers_columns_in_the_papers_order(tmp_path):
    rows = [row_of("a", "a | b", [RUN], paper={"acc7": 47.5}), Row("c", "c (did not train)")]
    write_table(rows, tmp_path / "table", title="Title")
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Title"
    assert lines[2] == "|  | runs | Acc7 ↑ | paper | Acc2 ↑ | paper | F1 ↑ | paper | MAE ↓ | paper | Corr ↑ | paper |"
    assert lines[4].startswith("| a \\| b | 1 | 40.0 | 47.5 | 80.0 / 82.0 | - |")
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
    rows = [row for row in read(experiments / "full" / "predictions.csv") if row["split"] == "test"]

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
    line = fails(capsys, ["report", experiments])
    assert line.endswith("without results.json; experiments in it: full, no_distillation, text_only")
    assert "--seed: expected one of 1, 2, 3" in fails(capsys, ["report", full, "--seed", "9", "--out", tmp_path / "r"])
    fake_experiment(Config(out=tmp_path / "other", seeds=[1]), utterances=24)
    message = fails(capsys, ["report", full, tmp_path / "other", "--out", tmp_path / "r"])
    assert "compare experiments on the same data" in message


def test_experiments_of_the_same_name_are_told_apart():
    names = report.short_names([Path("/runs/a/full"), Path("/runs/b/full")])
    assert names == ["a_full", "b_full"]
    assert report.short_names([Path("/runs/a/full"), Path("/runs/b/none")]) == ["full", "none"]


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
        "epochs_12": "the same, `--epochs 12`",
        "text_only_epochs_12": "text alone, `--epochs 12`",
    },
}


@pytest.mark.parametrize("file", OF_BASE_SIZE)
def test_the_tables_of_the_encoder_of_base_size_are_those_of_its_results(file):
    path, names = ROOT / "docs" / "results" / f"{file}.json", OF_BASE_SIZE[file]
    content = json.loads(path.read_text(encoding="utf-8"))
    shown = rows(section("results.md", "## CMU-MOSI with an encoder of BERT-base's size"))
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


def test_text_alone_stands_beside_the_model_of_as_many_epochs():
    path = ROOT / "docs" / "results" / "mosi_mpnet_float32.json"
    beside = json.loads(path.read_text(encoding="utf-8"))["arms"]["text_only_epochs_12"]["minus_epochs_12"]
    utterances, seeds = (Comparison(**beside[f"mae_over_{kind}"]) for kind in ("utterances", "seeds"))
    said = f"{difference_cell(utterances)}, seeds too {difference_cell(seeds, with_difference=False)}"
    assert said in " ".join(section("results.md", "### In float32, Tables II and III, and context").split())
