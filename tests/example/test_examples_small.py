"""The small examples at tiny sizes: they run, and say what their docstrings promise."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import image_text_streams
import other_distillation as other
import quickstart
import two_views_digits
from conftest import ROOT
from pages import section
from study_tools import paired_interval, read_results, signed, summary


def test_quickstart_has_a_loss_that_falls_and_a_line_for_each_block(capsys):
    history = quickstart.main(["--epochs=4"])
    assert history[-1] < 0.8 * history[0]
    printed = capsys.readouterr().out
    blocks = ["EMAWrapper", "ClassQueue", "SupConDistillLoss", "ResponseDistillLoss", "HardSampleFusionLoss"]
    assert all(f"\n{block}" in printed for block in [*blocks, "MomentumFusionFactors"])


def test_quickstart_goes_on_from_its_file_with_the_numbers_of_one_training(tmp_path):
    whole, _, parts = (
        quickstart.main([f"--epochs={epochs}", f"--state={tmp_path / name}"])
        for epochs, name in ((4, "one"), (2, "two"), (4, "two"))
    )
    assert parts == whole
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys() == {"model", "momentum", "queue", "contrast", "optimizer", "history", "rng"}
    for name in ("model", "momentum", "queue", "contrast"):
        for key, value in one[name].items():
            torch.testing.assert_close(two[name][key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keys", ["momentum", "online"])
def test_recall_rises_in_every_direction(keys, capsys):
    recalls = image_text_streams.main(["--epochs=2", f"--keys={keys}"])
    assert len(recalls) == 3
    for direction, before in recalls[0].items():
        assert before < 0.02
        assert recalls[-1][direction] > 0.2
    assert "Recall@1, %, by query → key" in capsys.readouterr().out


@pytest.mark.parametrize("views", two_views_digits.PAIRS)
def test_digits_give_a_table_a_figure_and_every_result(views, tmp_path, capsys):
    results = two_views_digits.main(["--seeds=2", "--epochs=1", f"--views={views}", f"--out={tmp_path}"])
    assert len(results) == 2 * len(two_views_digits.SETTINGS) * len(two_views_digits.ARMS)
    rows = read_results(tmp_path / f"{views}.json")["rows"]
    assert [two_views_digits.Result(**row) for row in rows] == results
    assert (tmp_path / f"{views}.svg").stat().st_size > 10_000
    assert "all blocks" in capsys.readouterr().out


def test_the_page_has_what_the_results_beside_it_say():
    docs = ROOT / "docs"
    found = read_results(docs / "results" / "two_views_digits.json")
    results = [two_views_digits.Result(**row) for row in found["rows"]]
    assert len(results) == found["settings"]["seeds"] * len(two_views_digits.SETTINGS) * len(two_views_digits.ARMS)
    page = (docs / "results.md").read_text(encoding="utf-8")
    for place, arm in enumerate(two_views_digits.ARMS):
        weak = {setting: two_views_digits.scores(results, setting, arm.name) for setting in two_views_digits.SETTINGS}
        cells = [summary(values) for values in weak.values()]
        if place > 1:
            few = list(weak)[-1]
            cells.append(signed(paired_interval(weak[few], two_views_digits.scores(results, few, "response"))))
        assert f"| {' | '.join(cells)} |" in page, arm.name


def test_digits_by_decay_give_every_result(tmp_path, capsys):
    results = two_views_digits.main(["--decays", "--seeds=2", "--epochs=1", f"--out={tmp_path}"])
    assert len(results) == 2 * len(two_views_digits.decays(1))
    rows = read_results(tmp_path / "halves_decays.json")["rows"]
    assert [two_views_digits.Result(**row) for row in rows] == results
    assert "warm-up" in capsys.readouterr().out


def test_the_page_has_what_the_results_of_the_decays_say():
    docs = ROOT / "docs"
    found = read_results(docs / "results" / "two_views_digits_decays.json")
    results = [two_views_digits.Result(**row) for row in found["rows"]]
    arms = [arm.name for arm in two_views_digits.decays(found["settings"]["epochs"])]
    assert len(results) == found["settings"]["seeds"] * len(arms)
    page = (docs / "when.md").read_text(encoding="utf-8")
    weak = {arm: two_views_digits.scores(results, results[0].setting, arm) for arm in arms}
    said = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", section("when.md", "## The decay of the momentum model"))
    for arm in arms:
        apart = [paired_interval(weak[arm], weak[base]) if arm != base else None for base in arms[:2]]
        cells = [arm, summary(weak[arm]), *("" if one is None else signed(one) for one in apart)]
        assert f"| {' | '.join(cells)} |" in page, arm
        said = [figure for figure in said if figure not in cells]
    assert said == []
    for arm, left in zip(two_views_digits.decays(50)[1:], (13, 0, 45), strict=True):
        decay = arm.decay if callable(arm.decay) else lambda _, constant=arm.decay: constant
        assert round(100 * math.prod(decay(step) for step in range(400))) == left


def test_digits_of_the_test_set_are_never_trained_on():
    _, pool, test = two_views_digits.load_views("halves")
    assert len(test) == two_views_digits.TEST
    assert not set(pool.tolist()) & set(test.tolist())


def test_few_labels_are_so_many_of_each_class():
    labels = two_views_digits.with_labels(torch.arange(1000) % 10, 10)
    assert torch.bincount(labels[labels >= 0]).tolist() == [10] * 10
    assert set(labels[labels < 0].tolist()) == {two_views_digits.UNLABELLED}


def test_paired_interval_is_that_of_a_t_test():
    mean, half = paired_interval(np.array([3.0, 4.0, 5.0]), np.array([1.0, 1.0, 1.0]))
    assert mean == pytest.approx(3.0)
    assert half == pytest.approx(4.302652729911275 / 3**0.5)  # t of two degrees of freedom


def test_a_difference_shows_whether_its_interval_holds_0():
    assert signed((0.31, 0.52)) == "+0.3 ± 0.5"
    assert signed((-0.69, 0.72)) == "-0.69 ± 0.72"
    assert signed((0.3222, 0.3217), digits=2) == "+0.3222 ± 0.3217"
    assert signed((0.0, 0.0)) == "+0.0 ± 0.0"


def test_arms_without_a_block_train_without_it():
    digits, pool, _ = two_views_digits.load_views("halves")
    rows = digits.rows(pool[:64])
    labels_alone, *_, blocks = two_views_digits.ARMS
    torch.manual_seed(0)
    model = two_views_digits.Model(32, 32)
    for arm, trained in ((labels_alone, False), (blocks, True)):
        objective = two_views_digits.Objective(arm, model)
        model.zero_grad()
        objective(model(rows.strong, rows.weak), rows).backward()
        assert (model.fuse.weight.grad is not None) == trained
        assert (objective.contrast.log_temperature_ratio.grad is not None) == trained
        assert (len(objective.queue) > 0) == trained


# Other rules of distillation


def test_other_rules_are_what_their_papers_define():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)

    def distances(rows):
        found = [float((rows[i] - rows[j]).norm()) for i in range(6) for j in range(i + 1, 6)]
        return [x / (sum(found) / len(found)) for x in found]

    def angles(rows):
        lines = {(i, j): F.normalize(rows[i] - rows[j], dim=0) for i in range(6) for j in range(6)}
        return [float(lines[i, j] @ lines[k, j]) for j in range(6) for i in range(6) for k in range(6)]

    def huber(first, second):
        apart = [abs(a - b) for a, b in zip(first, second, strict=True)]
        return sum(x - 0.5 if x > 1 else x * x / 2 for x in apart) / len(apart)

    for rule, relations in ((other.relational_distances, distances), (other.relational_angles, angles)):
        assert float(rule(student, teacher)) == pytest.approx(huber(relations(student), relations(teacher)))
    assert float(other.relational_angles(student, 3 * student + 1)) == pytest.approx(0, abs=1e-12)

    def pearson(first, second):
        return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(first.numpy(), second.numpy(), strict=True)])

    first, second = student.softmax(dim=1), teacher.softmax(dim=1)
    by_hand = 2 - pearson(first, second) - pearson(first.T, second.T)
    assert float(other.correlation(student, teacher)) == pytest.approx(by_hand)


def test_decoupled_with_the_rest_weighed_by_its_share_is_the_divergence(monkeypatch):
    """Zhao et al., Eq. 6: KL = TCKD + (1 - p_t) NCKD."""
    monkeypatch.setattr(two_views_digits, "CLASSES", 4)
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, dtype=torch.float64)
    rest = 1 - float(teacher.softmax(dim=1).max())
    whole = F.kl_div(student.log_softmax(dim=1), teacher.softmax(dim=1), reduction="batchmean")
    assert float(other.decoupled(student, teacher, beta=rest)) == pytest.approx(float(whole))


def test_other_rules_train_as_a_command_and_the_page_has_their_figures(tmp_path, capsys):
    results = other.main(["--seeds=2", "--epochs=1", f"--out={tmp_path}"])
    assert len(results) == 2 * len(other.ARMS)
    assert "decoupled" in capsys.readouterr().out
    docs = ROOT / "docs"
    found = read_results(docs / "results" / "other_distillation.json")
    results = [two_views_digits.Result(**row) for row in found["rows"]]
    assert len(results) == 10 * len(other.ARMS)
    weak = {arm.name: two_views_digits.scores(results, other.FEW, arm.name) for arm in other.ARMS}
    page = (docs / "when.md").read_text(encoding="utf-8")
    for place, arm in enumerate(other.ARMS):
        apart = [paired_interval(weak[arm.name], weak[base]) if place > at else None
                 for at, base in enumerate(("response", "all blocks"))]  # fmt: skip
        cells = [arm.name, summary(weak[arm.name]), *("" if x is None else signed(x) for x in apart)]
        assert f"| {' | '.join(cells)} |" in page, arm.name
