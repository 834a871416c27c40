"""The study of the sigmoid loss: what its arms train with, and that the page says what the runs gave."""

import re

import pytest
import torch

import momentum_distill as md
import retrieval
import sigmoid_pairs
import study_tools
from conftest import ROOT
from pages import section
from retrieval import Pairs


def made_up(size=32):
    draw = torch.Generator().manual_seed(0)
    views = (torch.randn(size, width, generator=draw) for width in (6, 5))
    return Pairs(*views, torch.arange(size) % 3)


@pytest.fixture
def _made_up_digits(monkeypatch):
    monkeypatch.setattr(retrieval, "split", lambda *_: dict.fromkeys(("train", "valid", "test"), made_up()))


@pytest.mark.usefixtures("_made_up_digits")
def test_tables_and_results_come_out_and_no_run_is_repeated(tmp_path, monkeypatch, capsys):
    options = ["--seeds=2", "--epochs=1", "--train=32", f"--out={tmp_path}"]
    results = sigmoid_pairs.main(options)
    said = capsys.readouterr().out
    assert all(name in said for name in sigmoid_pairs.ARMS)
    found = study_tools.read_results(tmp_path / "sigmoid_pairs.json")
    assert found["settings"] == {"seeds": 2, "epochs": 1, "train": 32}
    assert sigmoid_pairs.from_rows(found["rows"]) == results
    monkeypatch.setattr(retrieval, "train", None)
    assert sigmoid_pairs.main(options) == results
    with pytest.raises(SystemExit):
        sigmoid_pairs.main(["--seeds=1"])


def test_each_arm_has_the_loss_that_it_names():
    for name in sigmoid_pairs.ARMS:
        for setting in sigmoid_pairs.grid(name):
            objective = sigmoid_pairs.PairObjective(setting, retrieval.Encoders(6, 5))
            kind = md.SupConDistillLoss if name == sigmoid_pairs.BASELINE else md.SigmoidDistillLoss
            losses = objective.losses.values()
            assert [type(loss) for loss in losses] == [kind, kind]
            assert float(objective.losses["first"].temperature) == setting.temperature
            if kind is md.SigmoidDistillLoss:
                assert objective.losses["first"].bias.item() == setting.bias
            assert (objective.queue is not None) == name.endswith("queue")
            assert not [p for p in objective.losses.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def results():
    found = study_tools.read_results(ROOT / "docs" / "results" / "sigmoid_pairs.json")
    results = sigmoid_pairs.from_rows(found["rows"])
    assert list(results) == [setting for name in sigmoid_pairs.ARMS for setting in sigmoid_pairs.grid(name)]
    assert {len(scores) for scored in results.values() for scores in scored.values()} == {found["settings"]["seeds"]}
    return results


def test_the_page_says_what_the_runs_gave(results):
    tables = [sigmoid_pairs.table_of_grid(results), sigmoid_pairs.table(results)]
    lines = section("when.md", "## A sigmoid instead of the softmax").splitlines()
    for rows in tables:
        assert [row for row in rows if "| " + " | ".join(row) + " |" not in lines] == []
    prose = " ".join(line for line in lines if not line.startswith("|"))
    cells = {cell for rows in tables for row in rows for cell in row}
    taught, plain = (sigmoid_pairs.best(results, name) for name in ("sigmoid and targets", "sigmoid"))
    cells.add(study_tools.signed(study_tools.paired_interval(results[taught]["map"], results[plain]["map"])))
    said = re.findall(r"[+-]?\d+\.\d(?: ± \d+\.\d)?(?= percent|,|;| \(|\.? )", prose)
    assert len(said) > 3
    assert [figure for figure in said if figure not in cells | {"0.1", "0.2", "0.4", "0.8"}] == []
