"""The study of missing sensors: who sees what, the arms, the command at a tiny size, and the figures on the page."""

import importlib.util
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import missing_modalities as synthetic
import missing_sensors as study
import watch
from conftest import ROOT
from pages import page, rows, section
from study_tools import read_rows

needs_recordings = pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="no seglearn")


def few_labels():
    """Windows of noise, of all exercises and two people; two of each exercise have a label."""
    torch.manual_seed(0)
    count = torch.arange(96)
    labels = watch.with_labels(count % 7, 2, 0)
    return watch.Windows(torch.randn(96, 3, 50), torch.randn(96, 3, 50), labels, count % 2)


# Who sees what


def test_what_a_missing_sensor_holds_changes_nothing_and_what_is_there_does():
    windows, model = few_labels(), study.Model().eval()
    for subset in study.SUBSETS:
        there = subset.expand(96, 2)
        logits = model(windows, there)
        for name, known in zip(("strong", "weak"), subset.tolist(), strict=True):
            for filling in (0.0, math.nan):
                changed = windows._replace(**{name: torch.full_like(windows.strong, filling)})
                assert torch.equal(model(changed, there), logits) == (not known)


def test_each_subset_is_as_likely_and_no_window_is_without_sensors():
    torch.manual_seed(0)
    drawn = study.drawn_subsets(30_000)
    shares = [(drawn == subset).all(dim=1).double().mean().item() for subset in study.SUBSETS]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    assert drawn.any(dim=1).all()


def test_student_sees_drawn_subsets_and_teacher_both_sensors_or_the_same():
    windows = few_labels()
    for arm in study.ARMS:
        torch.manual_seed(1)
        model, seen = study.Model(), {"student": [], "teacher": []}
        objective = study.objective_of(arm, model)
        model.register_forward_hook(lambda _m, inputs, _o, to=seen["student"]: to.append(inputs[1]))
        if arm.teacher:
            objective.teacher.register_forward_hook(lambda _m, inputs, _o, to=seen["teacher"]: to.append(inputs[1]))
        watch.train(model, objective, windows, steps=3)
        assert len(seen["student"]) == 3
        assert all(there.all() for there in seen["student"]) == (not arm.dropping)
        taught = seen["student"] if not arm.sees_all else [torch.ones_like(there) for there in seen["student"]]
        for ours, expected in zip(seen["teacher"], taught if arm.teacher else [], strict=True):
            assert torch.equal(ours, expected)


def test_unlabelled_windows_are_distilled_and_have_no_part_without_teacher():
    windows = few_labels()
    unlabelled = windows.rows(windows.labels < 0)
    for arm in study.ARMS:
        torch.manual_seed(0)
        model = study.Model()
        study.objective_of(arm, model)(model, unlabelled).backward()
        learned = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
        assert (learned > 0) == arm.teacher, arm


def test_the_teacher_is_the_average_of_the_student():
    windows = few_labels()
    torch.manual_seed(0)
    model = study.Model()
    objective = study.Taught(model, sees_all=True)
    average = [p.detach().clone() for p in model.parameters()]
    for updates in range(3):
        watch.train(model, objective, windows, steps=1)
        decay = min(study.DECAY, (1 + updates) / (10 + updates))
        average = [decay * old + (1 - decay) * p.detach() for old, p in zip(average, model.parameters(), strict=True)]
    for ours, theirs in zip(objective.teacher.parameters(), average, strict=True):
        torch.testing.assert_close(ours, theirs)


# The figures


def fake_results():
    """Nothing missing: full 80, dropping 70, taught 78, 74; a sensor missing: 40 less without the accelerometer."""
    there = dict(zip((arm.name for arm in study.ARMS), (80.0, 70.0, 78.0, 74.0), strict=True))
    return [
        study.Result(
            setting, name, seed, person, both + seed + person, both - 40 + seed + person, both - 20 + seed + person
        )
        for setting in study.LABELS
        for name, both in there.items()
        for seed in (-1, 0, 1)
        for person in (-1, 0, 1)
    ]


def test_accuracy_at_a_share_is_the_mean_of_windows_drawn_by_it():
    """Against windows that are drawn: half of them miss a sensor."""
    results = fake_results()
    rng = np.random.default_rng(0)
    for missing, cases in study.MISSING.items():
        found = study.accuracy(results, "all", study.FULL, missing, 0.5, "person")
        for person, expected in zip((-1, 0, 1), found, strict=True):
            rows = {case: getattr(study.Result("", "", 0, 0, 80, 40, 60), case) + person for case in study.CASES}
            drawn = [rows["both"] if rng.random() < 0.5 else rows[rng.choice(cases)] for _ in range(4_000)]
            assert np.mean(drawn) == pytest.approx(expected, abs=1.0)


def test_what_is_won_back_is_of_the_cost_of_missing():
    results = fake_results()
    cost, won, beyond, half = study.won_back(results, "20", study.TAUGHT, "either")
    assert (cost, won) == pytest.approx((80 - (70 - 15), 8))
    assert (beyond, half) == pytest.approx((8 - 25 / 2, 0))
    rows = {tuple(row[:3]): row[3:] for row in study.lines(results)}
    row = rows["20", "either", study.TAUGHT.name]
    assert row[0] == "78.0 ± 1.0"
    assert row[-3:] == ["+8.0 ± 0.0", "+8.0 ± 0.0", "8.0 of 25.0"]


@needs_recordings
@pytest.mark.long
def test_the_command_gives_table_results_and_figure_and_goes_on_where_it_was(tmp_path, capsys):
    options = ["--seeds=2", "--steps=1", "--labels=20", f"--out={tmp_path}"]
    first = ["--arms", study.FULL.name, study.DROPPING.name]
    command = [sys.executable, str(ROOT / "examples" / "missing_sensors.py"), *options, *first]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    results = study.main([*options, "--format=pdf"])
    for arms, said in ((study.ARMS[:2], printed), (study.ARMS, capsys.readouterr().out)):
        assert all(arm.name in said for arm in arms)
    logged = (tmp_path / "test_1_steps.jsonl").read_text().splitlines()
    assert len({str(json.loads(line)[0]) for line in logged}) == len(logged) == 4 * 2 * watch.FOLDS  # none twice
    read = read_rows(tmp_path / "missing_sensors.json", study.Result)
    assert len(read) == len(results) == 4 * 2 * watch.PEOPLE
    assert all(0 <= value <= 100 for result in read for value in result[4:])
    assert (tmp_path / "missing_sensors.svg").stat().st_size > 5_000
    assert (tmp_path / "missing_sensors.pdf").read_bytes().startswith(b"%PDF")


SEEDS = 10
RESULTS = ROOT / "docs" / "results" / "missing_sensors.json"
SHORT = (0, 2, 3, 5, 7, 8, 10)  # labels, trained with, at 0, 50 and 100 %, against dropping, won back


def test_the_tables_of_page_and_docstring_are_those_of_the_results():
    computed = study.lines(read_rows(RESULTS, study.Result))
    for text, wanted in (
        (section("results.md", "## Missing sensors").partition("\n### ")[0], computed),
        (study.__doc__, [[row[i] for i in SHORT] for row in computed if row[1] == "either"]),
    ):
        assert [row for row in rows(text) if row[0] in study.LABELS] == wanted


def test_the_figures_that_page_and_docstring_name_are_in_the_results():
    results = read_rows(RESULTS, study.Result)

    def won(setting, arm):
        cost, back, *_ = study.won_back(results, setting, arm, "either")
        return f"wins back {back:.1f} of {cost:.1f}"

    def beyond(setting):
        *_, mean, half = study.won_back(results, setting, study.TAUGHT, "either")
        return f"({mean:+.1f} ± {half:.1f} beyond half of it"

    def versus(setting, ours, theirs, missing="either", share=0.5, by="person"):
        pair = (study.accuracy(results, setting, arm, missing, share, by) for arm in (ours, theirs))
        return study.signed(study.paired_interval(*pair))

    full, alone, ours, no_more = study.ARMS
    few = ("20", ours, alone)
    for text in (page("results.md"), study.__doc__):
        said = " ".join(text.split())
        for figure in (
            f"{won('20', ours)} points at 50 % missing {beyond('20')}, paired by person)",
            f"{versus(*few)} on dropping alone over people, {versus(*few, by='seed')} over seeds",
            f"where the accelerometer is missing from every window {versus(*few, 'accelerometer', 1.0)}, "
            f"where the gyroscope is {versus(*few, 'gyroscope', 1.0)}, where nothing is {versus(*few, share=0.0)}.",
            f"sees no more has {versus('20', no_more, alone, share=0.0)} of it.",
            f"sees no more than its student {won('20', no_more).partition(' of')[0]}, and the one that sees both is "
            f"{versus('20', ours, no_more)} from it over people, {versus('20', ours, no_more, by='seed')} over seeds.",
            f"{won('all', ours)} {beyond('all')}; {versus('all', ours, alone)} on dropping alone)",
            f"by {versus('20', full, alone)} with 20 labels, by {versus('all', full, alone)} with all.",
        ):
            assert figure in said, figure


def test_results_are_of_all_people_and_seeds_and_small():
    results = read_rows(RESULTS, study.Result)
    assert RESULTS.stat().st_size < 200_000
    for setting in study.LABELS:
        for arm in study.ARMS:
            runs = [(one.seed, one.person) for one in results if (one.labels, one.arm) == (setting, arm.name)]
            assert sorted(runs) == [(seed, person) for seed in range(SEEDS) for person in range(10)]


# The same where the answer is known


def made_samples():
    """Noise of 64 samples, of which every fourth has no score and every fifth no audio; vision ends early."""
    torch.manual_seed(0)
    steps = {name: torch.randn(64, 9, width) for name, width in synthetic.WIDTHS.items()}
    lengths = torch.tensor([9, 9, 4]).repeat(64, 1)
    lengths[::5, 1] = 0
    scores = torch.randn(64)
    scores[::4] = math.nan
    return synthetic.Samples(steps, lengths, scores)


def test_no_score_depends_on_what_is_missing_or_beyond_the_end():
    samples, model = made_samples(), synthetic.Model().eval()
    for case, subset in zip(synthetic.CASES, synthetic.SUBSETS, strict=True):
        seen = subset.expand(64, 3)
        scores = model(samples, seen)
        for place, name in enumerate(synthetic.MODALITIES):
            steps = samples.steps[name].clone()
            hidden = ~seen[:, [place]] | (torch.arange(9) >= samples.lengths[:, [place]])
            steps[hidden] = 7.0
            assert torch.equal(model(samples._replace(steps={**samples.steps, name: steps}), seen), scores)
            steps[:, 0] = 9.0
            changed = model(samples._replace(steps={**samples.steps, name: steps}), seen) != scores
            assert changed.any() == (case != f"no_{name}")


def test_the_synthetic_arms_see_what_they_say():
    samples = made_samples()
    known = ~samples.scores.isnan()
    for arm in synthetic.ARMS:
        seen = {"student": [], "teacher": []}

        class Watched(synthetic.Model):
            def forward(self, batch, subset, seen=seen):
                seen["student" if torch.is_grad_enabled() else "teacher"].append((batch.scores, subset))
                return super().forward(batch, subset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic, "Model", Watched)
            synthetic.train(arm, samples, seed=0, steps=3)
        assert all(subset.all() for _, subset in seen["student"]) == (not arm.dropping)
        assert len(seen["teacher"]) == (3 if arm.teacher else 0)
        assert all(subset.all() for _, subset in seen["teacher"])
        assert any(scores.isnan().any() for scores, _ in seen["student"]) == arm.teacher
    said = torch.zeros(64)
    assert synthetic.error(said, samples.scores) == pytest.approx(float(samples.scores[known].abs().mean()))


def test_the_synthetic_study_runs_as_a_command_and_goes_on(tmp_path, capsys):
    options = ["--seeds=2", "--steps=2", f"--out={tmp_path}"]
    command = [sys.executable, str(ROOT / "examples" / "missing_modalities.py"), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    logged = (tmp_path / "test_2_steps.jsonl").read_text()
    results = synthetic.main(options)
    assert (tmp_path / "test_2_steps.jsonl").read_text() == logged
    for said in (printed, capsys.readouterr().out):
        assert all(arm.name in said for arm in synthetic.ARMS)
    read = read_rows(tmp_path / "missing_modalities.json", synthetic.Result)
    assert [one[:3] for one in read] == [one[:3] for one in results]
    assert len(read) == 2 * 2 * len(synthetic.ARMS)


def test_the_synthetic_table_of_the_page_is_that_of_the_results():
    results = read_rows(ROOT / "docs" / "results" / "missing_modalities.json", synthetic.Result)
    assert {(one.labels, one.arm, one.seed) for one in results} == {
        (labels, arm.name, seed) for labels in synthetic.LABELS for arm in synthetic.ARMS for seed in range(SEEDS)
    }
    text = section("results.md", "### On the synthetic set")
    assert [row for row in rows(text) if row[0] in synthetic.LABELS] == synthetic.lines(results)
    for setting in synthetic.LABELS:
        cost, won = synthetic.won_back(results, setting, "any")
        assert f"{won:.3f} of {cost:.3f}" in " ".join(text.split("|\n\n")[-1].split())
