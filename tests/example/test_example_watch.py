"""The study of the watch: its data, its arms, its command at a tiny size, and the figures on the page."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import watch
import watch_data
from conftest import ROOT
from pages import page, rows, section
from study_tools import read_rows

needs_recordings = pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="no seglearn")


@pytest.fixture(scope="module")
def windows():
    return watch.load()


def made_up(rows=96, people=2):
    """Windows of noise, of all exercises and so many people."""
    torch.manual_seed(0)
    count = torch.arange(rows)
    return watch.Windows(torch.randn(rows, 3, 50), torch.randn(rows, 3, 50), count % 7, count % people)


# The data


@needs_recordings
def test_recordings_are_those_that_numpy_reads(windows):
    """With numpy's own unpickling, which the example does without; the file is of the test's own environment."""
    theirs = np.load(watch_data.find_recordings(), allow_pickle=True).item()
    assert theirs["X_labels"] == ["ax", "ay", "az", "wx", "wy", "wz"]
    start = (len(theirs["X"][139]) - 100) // 50 * 50
    recording = torch.tensor(theirs["X"][139][start : start + 100], dtype=torch.float32)
    assert torch.equal(windows.strong[-1], recording[:, :3].T)
    assert torch.equal(windows.weak[-1], recording[:, 3:].T)
    assert windows.labels[-1] == int(theirs["y"][139])
    assert windows.people[-1] == int(theirs["subject"][139]) - 1


@needs_recordings
def test_windows_are_two_seconds_of_ten_people(windows):
    assert windows.strong.shape == windows.weak.shape == (4677, 3, 100)
    assert windows.labels.unique().tolist() == list(range(7))
    assert windows.people.unique().tolist() == list(range(10))
    assert torch.equal(windows.weak[0][:, 50:], windows.weak[1][:, :50])  # a new one every second


# Who is trained with


@needs_recordings
def test_every_person_is_held_out_once_and_never_trained_with(windows):
    held_out = []
    for fold in range(watch.FOLDS):
        train, test = watch.split(windows, fold, valid=False)
        fewer, valid = watch.split(windows, fold, valid=True)
        people = [set(part.people.tolist()) for part in (train, test, fewer, valid)]
        assert [len(part) for part in people] == [8, 2, 6, 2]
        assert people[0] | people[1] == set(range(10))
        assert people[2] | people[3] == people[0]  # nobody of the test has a say in the validation
        held_out += sorted(people[1])
        assert train.weak.mean(dim=(0, 2)).abs().max() < 1e-4  # standardised by those to train with
    assert sorted(held_out) == list(range(10))


def test_few_labels_are_so_many_of_each_exercise_and_hang_on_the_seed():
    labels = torch.arange(700) % 7
    few = [watch.with_labels(labels, 5, seed) for seed in (0, 0, 1)]
    assert torch.equal(few[0], few[1])
    assert not torch.equal(few[0], few[2])
    for given in few:
        assert torch.bincount(given[given >= 0]).tolist() == [5] * 7
        assert set(given[given < 0].tolist()) == {watch.UNLABELLED}
    assert torch.equal(watch.with_labels(labels, None, 0), labels)


def test_labels_alone_see_no_unlabelled_row_and_the_other_arms_do():
    labels = watch.with_labels(torch.arange(700) % 7, 5, 0)
    for unlabelled in (False, True):
        rows = torch.cat(list(watch.batches(labels, 5, unlabelled=unlabelled)))
        assert bool((labels[rows] < 0).any()) == unlabelled


# The arms


def few_labels():
    windows = made_up()
    return windows._replace(labels=watch.with_labels(windows.labels, 2, 0))


def test_arms_train_what_they_promise():
    given = few_labels()
    trained, queued = {}, []
    for arm in watch.ARMS:
        torch.manual_seed(0)
        model = watch.Model()
        objective = watch.objective_of(arm, model)
        objective(model, given).backward()
        trained[arm.name] = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        queued += [arm.name] if isinstance(objective, watch.Blocks) and len(objective.queue) > 0 else []
    by_hand = {arm.name: {"weak"} for arm in watch.ARMS if arm.by_hand}  # the gyroscope alone
    assert trained == {name: {"strong", "weak", "fuse", "fused"} for name in trained} | by_hand
    assert queued == [watch.BLOCKS.name]


def test_each_block_is_used_where_it_is_added_and_nowhere_before():
    given = few_labels()
    calls = {"response": [], "fusion": [], "contrast": []}
    for arm in watch.ARMS:
        torch.manual_seed(0)
        model = watch.Model()
        objective = watch.objective_of(arm, model)
        for name, called in calls.items():
            if isinstance(objective, watch.Blocks):
                getattr(objective, name).register_forward_hook(lambda *_, c=called, a=arm: c.append(a.name))
        objective(model, given)
    *_, one, two, three = (arm.name for arm in watch.ARMS)
    assert calls == {"response": [one, two, three], "fusion": [two, two, three, three], "contrast": [three, three]}


def test_plain_distillation_calls_no_block_and_its_teacher_stands_still(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a block")

    windows = made_up()
    for arm in (one for one in watch.ARMS if one.by_hand):
        torch.manual_seed(0)
        model = watch.Model()
        objective = watch.objective_of(arm, model)
        before = [p.clone() for p in objective.teacher.parameters()]
        with monkeypatch.context() as patched:
            for name in watch.md.__all__:
                if isinstance(getattr(watch.md, name), type):
                    patched.setattr(watch.md, name, refuse)
            watch.train(model, objective, windows, steps=2)
        assert all(torch.equal(one, two) for one, two in zip(objective.teacher.parameters(), before, strict=True))
        assert not objective.teacher.training


def test_arms_begin_with_the_same_weights_and_leave_them_alone():
    windows = made_up()
    torch.manual_seed(0)
    start = watch.Model().eval()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    for arm in (watch.PLAIN, watch.BLOCKS):
        once = [watch.run(arm, start, windows, windows, seed=3, steps=2) for _ in range(2)]
        assert once[0] == once[1]  # the seed decides
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


# The figures


def fake_results():
    """Accuracies that rise by one from arm to arm, from seed to seed and from person to person."""
    return [
        watch.Result(setting, arm.name, seed, person, 50.0 + place + seed + person, 60.0, 70.0)
        for setting in watch.SETTINGS
        for place, arm in enumerate(watch.ARMS)
        for seed in range(3)
        for person in (1, 2, 3)
    ]


def test_the_table_has_paired_differences():
    results = fake_results()
    assert watch.scores(results, "5", "labels", "weak", "seed").tolist() == [52.0, 53.0, 54.0]
    assert watch.scores(results, "5", "labels", "weak", "person").tolist() == [52.0, 53.0, 54.0]
    rows = {tuple(row[:2]): row[2:] for row in watch.lines(results)}
    assert rows["5", "labels"] == ["53.0 ± 1.0", "-1.0 ± 0.0", "-1.0 ± 0.0", "-2.0 ± 0.0", "60.0", "70.0"]


def test_with_a_sensor_missing_accuracy_goes_from_the_fusion_to_the_other_sensor():
    curve = watch.missing_curve(fake_results(), "5", "labels", np.array([0.0, 0.5, 1.0]), "strong")
    assert curve.tolist() == [70.0, 65.0, 60.0]


@needs_recordings
@pytest.mark.long
def test_the_command_gives_table_results_and_figure_and_goes_on_where_it_was(tmp_path, capsys):
    options = ["--seeds=2", "--steps=1", "--labels=5", f"--out={tmp_path}"]
    first = ["--arms", "labels", "plain distillation"]
    command = [sys.executable, str(ROOT / "examples" / "watch.py"), *options, *first]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    watch.main([*options, *first, "all blocks", "--format=pdf"])
    for arms, said in ((2, printed), (3, capsys.readouterr().out)):
        assert all(arm.name in said for arm in watch.MAIN[:arms])
    logged = (tmp_path / "test_1_steps.jsonl").read_text().splitlines()
    assert len({str(json.loads(line)[0]) for line in logged}) == len(logged) == 3 * 2 * watch.FOLDS  # none twice
    results = read_rows(tmp_path / "watch.json", watch.Result)
    assert len(results) == 3 * 2 * watch.PEOPLE
    assert all(0 <= accuracy <= 100 for result in results for accuracy in result[4:])
    assert (tmp_path / "watch.svg").stat().st_size > 5_000
    assert (tmp_path / "watch.pdf").read_bytes().startswith(b"%PDF")
    other = watch.main(["--seeds=2", "--steps=1", "--labels=20", "--arms=all blocks", f"--out={tmp_path}"])
    assert {(one.labels, one.arm) for one in other} == {("20", "all blocks")}  # not what else lies there


RESULTS = ROOT / "docs" / "results" / "watch.json"


def test_the_tables_of_the_page_are_those_of_the_results():
    results = read_rows(RESULTS, watch.Result)
    computed = watch.lines(results)
    shown = rows(section("results.md", "## A weak sensor taught by a strong one"))
    assert [row for row in shown if row[0] in watch.SETTINGS] == computed
    short = {(row[0], row[1]): row for row in computed}
    glance = [row for row in rows(section("results.md", "## At a glance")) if row[0].startswith("watch, ")]
    for row in glance:
        setting = row[0].removeprefix("watch, ").removesuffix(" labels a class").removesuffix(" labels")
        arms = [short.get((setting, arm.name), ["", "", ""])[2] for arm in watch.DRAWN]
        difference = short[setting, watch.BLOCKS.name][3]
        assert row[2:] == [*arms, difference, "`python examples/watch.py`"]
    assert len(glance) == len({result.labels for result in results})


def test_the_differences_that_the_page_names_are_in_the_results():
    results = read_rows(RESULTS, watch.Result)
    text = " ".join(page("results.md").split())

    def difference(setting, ours, theirs, what="weak", by="person"):
        pair = (watch.scores(results, setting, arm.name, what, by) for arm in (ours, theirs))
        return watch.signed(watch.paired_interval(*pair))

    def by_fold(setting, theirs):
        pair = (watch.scores(results, setting, arm.name, "weak", "person") for arm in (blocks, theirs))
        return watch.signed(watch.paired_interval(*(each[watch.folds().numpy()].mean(axis=1) for each in pair)))

    labels, plain, by_fusion, response, fusion, blocks = watch.ARMS
    few, more = "5", "20"
    better = [difference(few, blocks, labels, what) for what in ("strong", "fused")]
    then = [difference(more, blocks, labels, what) for what in ("strong", "fused")]
    teacher = [difference(setting, by_fusion, plain) for setting in (few, more)]
    learns = [difference(setting, blocks, by_fusion, by=by) for setting in (few, more) for by in ("person", "seed")]
    contrast = [difference(setting, blocks, fusion) for setting in (few, more)]
    for said in (
        f"accelerometer and fusion get better too ({better[0]} and {better[1]} on labels alone)",
        f"with twenty the accelerometer ({then[0]}), the fusion not ({then[1]})",
        f"the better teacher ({teacher[0]} with five labels, {teacher[1]} with twenty, not beyond",
        f"with five labels {learns[0]} over people, {learns[1]} over seeds; with twenty {learns[2]} and {learns[3]}.",
        f"level with plain distillation: {difference(few, response, plain)} with five labels",
        f"({difference('all', blocks, labels)}), and the fusion loses ({difference('all', blocks, labels, 'fused')})",
        f"queue add nothing: {contrast[0]} with five labels, {contrast[1]} with twenty",
        f"the blocks are {learns[0]} (over folds ± {by_fold(few, by_fusion).split()[-1]}) and {learns[2]} beyond",
        f"{difference('all', blocks, labels)} on the watch",
        f"the blocks are {by_fold(few, plain)} and {by_fold(more, plain)} beyond plain",
        f"and {by_fold(few, by_fusion)} beyond the fusion by hand",
    ):
        assert said in text, said


def test_results_are_of_all_people_and_ten_seeds_and_small():
    results = read_rows(RESULTS, watch.Result)
    assert RESULTS.stat().st_size < 200_000
    for setting, arm in {(result.labels, result.arm) for result in results}:
        runs = {(one.seed, one.person) for one in results if (one.labels, one.arm) == (setting, arm)}
        assert runs == {(seed, person) for seed in range(10) for person in range(10)}
