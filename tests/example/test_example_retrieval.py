"""The study of retrieval: what it trains on, what its arms do, and that the page says what the runs gave."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch

import momentum_distill as md
import retrieval
import study_tools
import watch_data
from conftest import ROOT
from pages import page, section
from retrieval import ARMS, Pairs, Setting


def made_up(size=48, seed=0):
    draw = torch.Generator().manual_seed(seed)
    views = (torch.randn(size, width, generator=draw) for width in (6, 5))
    return Pairs(*views, torch.arange(size) % 3)


# The command


@pytest.mark.long
def test_the_command_runs(tmp_path):
    options = ["--data=digits", "--seeds=2", "--epochs=1", "--train=32", f"--out={tmp_path}"]
    command = [sys.executable, str(ROOT / "examples" / "retrieval.py"), *options]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread).stdout
    assert all(name in said for name in ARMS)
    assert study_tools.read_results(tmp_path / "retrieval.json")["command"] == " ".join(
        ["python examples/retrieval.py", *options]
    )


def test_tables_figure_and_results_come_out_and_no_run_is_repeated(tmp_path, monkeypatch, capsys):
    person = torch.arange(10).repeat_interleave(8)
    small = made_up(80)
    monkeypatch.setattr(retrieval, "load_watch", lambda: (small, person))
    options = ["--data", "watch", "--seeds=2", "--epochs=1", "--train=32", f"--out={tmp_path}"]
    retrieval.main([*options, "--format=pdf"])
    said = capsys.readouterr().out
    assert all(name in said for name in ARMS)
    assert "teacher's temperature" in said
    assert (tmp_path / "retrieval.pdf").read_bytes().startswith(b"%PDF")
    found = study_tools.read_results(tmp_path / "retrieval.json")
    assert found["settings"] == {"seeds": 2, "epochs": 1, "train": 32}
    assert found["versions"]["torch"] == metadata.version("torch")
    assert list(retrieval.from_rows(found["rows"])) == retrieval.grid("watch")

    # What is there is not trained again, and what was cut off is.
    lines = (tmp_path / "watch.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "watch.jsonl").write_text("".join(lines)[:-20])
    trained, train = [], retrieval.train
    monkeypatch.setattr(retrieval, "train", lambda *a, **k: trained.append(a) or train(*a, **k))
    results = retrieval.main([*options, "--format=svg"])
    assert len(trained) == 1
    assert retrieval.to_rows(results) == found["rows"]
    assert "<svg" in (tmp_path / "retrieval.svg").read_text()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--seeds=1", "--seeds: expected a whole number of at least 2, got '1'"),
        ("--epochs=0", "--epochs: expected a whole number of at least 1, got '0'"),
        (
            "--train=1001",
            "--train: expected a whole number of at least 1, at most 1000, got '1001'",
        ),  # the others are for validation
    ],
)
def test_counts_that_cannot_be_are_refused(option, said, capsys):
    with pytest.raises(SystemExit):
        retrieval.main([option])
    assert said in capsys.readouterr().err


# Rows


def test_test_digits_are_the_same_for_every_seed_and_never_trained_on():
    one, other = retrieval.split("digits", 0), retrieval.split("digits", 1)
    assert torch.equal(one["test"].first, other["test"].first)
    assert not torch.equal(one["train"].first, other["train"].first)
    rows = [{row.numpy().tobytes() for row in torch.cat(piece[:2], dim=1)} for piece in one.values()]
    assert [len(piece.labels) for piece in one.values()] == [1000, 297, 500]
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_no_person_is_in_two_parts_and_every_person_is_tested_twice(monkeypatch):
    person = torch.arange(10).repeat_interleave(300)
    numbers = person[:, None].float()  # standardised, persons are still told apart by them
    monkeypatch.setattr(retrieval, "load_watch", lambda: (Pairs(numbers, numbers, person), person))
    tested = []
    for seed in range(10):
        parts = retrieval.split("watch", seed)
        people = {name: set(part.labels.tolist()) for name, part in parts.items()}
        assert {name: len(of) for name, of in people.items()} == {"train": 6, "valid": 2, "test": 2}
        assert len(set.union(*people.values())) == 10
        assert [len(part.labels) for part in parts.values()] == [1000, 500, 500]
        assert torch.allclose(parts["train"].first.mean(dim=0), torch.zeros(1), atol=1e-5)
        tested += people["test"]
    assert sorted(tested) == sorted([*range(10)] * 2)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_so_many_pairs_are_wrong(share):
    numbers = torch.arange(50)[:, None]
    wrong = retrieval.with_wrong_pairs(Pairs(numbers, numbers, numbers[:, 0]), share, seed=3)
    assert int((wrong.first != wrong.second).sum()) == round(50 * share)
    assert sorted(wrong.second[:, 0].tolist()) == list(range(50))
    assert torch.equal(wrong.first, numbers)


def test_training_reads_no_labels():
    pairs, setting = made_up(), Setting(batch=16, slots=32, alpha=0.4)
    one = retrieval.train(setting, pairs, epochs=2, seed=0)
    other = retrieval.train(setting, pairs._replace(labels=pairs.labels.flip(0) + 5), epochs=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Arms


def test_each_arm_calls_the_blocks_that_it_names(monkeypatch):
    called = []

    def note(owner, name):
        real = getattr(owner, name)

        def noted(self, *arguments, **named):
            called.append("soft targets" if named.get("momentum_keys") is not None else owner.__name__)
            return real(self, *arguments, **named)

        monkeypatch.setattr(owner, name, noted)

    note(md.EMAWrapper, "update")
    note(md.ClassQueue, "enqueue")
    note(md.SupConDistillLoss, "forward")
    expected = {
        "InfoNCE by hand": set(),
        "SupCon by hand": set(),
        "batch alone": {"SupConDistillLoss"},
        "hard negatives": {"SupConDistillLoss"},
        "queue": {"SupConDistillLoss", "ClassQueue", "EMAWrapper"},
        "targets": {"soft targets", "EMAWrapper"},
        "queue and targets": {"soft targets", "ClassQueue", "EMAWrapper"},
    }
    for name in ARMS:
        called.clear()
        retrieval.train(retrieval.arm(name, "digits", batch=24), made_up(), epochs=1, seed=0)
        assert set(called) == expected[name], name


def test_every_knob_changes_what_is_trained():
    base = Setting(batch=16, slots=32, alpha=0.4)
    changed = [
        *({"temperature": 0.2}, {"decay": 0.5}, {"alpha": 0.2}, {"slots": 16}, {"slots": 0}, {"alpha": 0.0}),
        *(
            {"teacher_temperature": 0.05},
            {"targets": "centred"},
            {"targets": "sinkhorn"},
            {"batch_keys": "momentum"},
            {"queue_positives": False},
            {"batch": 24},
            {"method": "SupCon"},
        ),
    ]
    weights = [
        torch.cat([p.detach().flatten() for p in retrieval.train(one, made_up(), epochs=3, seed=0).parameters()])
        for one in (base, *(replace(base, **change) for change in changed))
    ]
    for place, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:place]), changed[place - 1]


def test_the_losses_by_hand_are_those_of_the_library():
    first, second, ids = torch.randn(12, 8), torch.randn(12, 8), torch.arange(12)
    loss = md.SupConDistillLoss(temperature=0.1, learnable_temperature=False).eval()
    both_ways = (loss(first, second, ids, ids) + loss(second, first, ids, ids)) / 2
    assert torch.allclose(retrieval.info_nce(first, second, temperature=0.1), both_ways)
    loss = md.SupConDistillLoss(temperature=0.1, learnable_temperature=False, exclude_self=True).eval()
    rows, ids = torch.cat([first, second]), ids.repeat(2)
    assert torch.allclose(retrieval.sup_con(first, second, temperature=0.1), loss(rows, rows, ids, ids))


def test_scores_are_those_of_a_count_by_hand():
    class Given(torch.nn.Module):
        def forward(self, first, second):
            return {"first": first, "second": second}

    # Similarities, up to a factor, of which rows and columns order the keys alike: 0 1 2, 2 0 1 and 1 2 0. The classes
    # then come as 0 1 0 to a query of class 0, 0 0 1 to one of class 1, and 1 0 0 to one of class 0.
    first = torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, 3.0], [1.0, 3.0, 2.0]])
    found = retrieval.scores(Given(), Pairs(first, torch.eye(3), torch.tensor([0, 1, 0])))
    precision = np.mean([(1 + 2 / 3) / 2, 1 / 3, (1 / 2 + 2 / 3) / 2])
    assert found["map"] == pytest.approx(100 * precision, abs=0.01)
    assert (found["recall1"], found["recall10"], found["pair1"]) == (33.33, 100.0, 33.33)
    perfect = Pairs(torch.eye(4), torch.eye(4), torch.arange(4))
    assert set(retrieval.scores(Given(), perfect).values()) == {100.0}


# Reading and writing


def test_a_log_of_runs_goes_on_behind_the_last_whole_line(tmp_path):
    path = tmp_path / "runs.jsonl"
    log = study_tools.RunLog(path)
    log.add(("b", 2), {"1": [0.5]})
    log.add(("a", 1), 3)
    path.write_text(path.read_text() + '[["c", 3], {"1"')
    again = study_tools.RunLog(path)
    assert list(again.items()) == [(["a", 1], 3), (["b", 2], {"1": [0.5]})]
    assert ("a", 1) in again
    assert ("c", 3) not in again
    again.add(("c", 3), 4)
    assert study_tools.RunLog(path)[("c", 3)] == 4


def test_only_runs_that_are_asked_for_are_shown(tmp_path):
    log = study_tools.RunLog(tmp_path / "runs.jsonl")
    for key in itertools.product(("few", "all"), ("labels", "plain"), range(3), range(2)):
        log.add(key, 1)
    found = [tuple(key) for key, _ in log.of(["few"], ["plain"], range(1, 3))]
    assert found == [("few", "plain", seed, fold) for seed in (1, 2) for fold in (0, 1)]


def test_starting_writes_nothing_over_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    study_tools.RunLog(path).add(("a", 1), 3)
    path.chmod(0o400)
    before = path.stat()
    assert ("a", 1) in study_tools.RunLog(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    path.chmod(0o600)
    path.write_text(path.read_text() + "no run\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl: expected a run in line 2, got 'no run'"):
        study_tools.RunLog(path)


def test_the_watch_has_its_windows():
    windows = watch_data.load_windows()
    assert windows.accelerometer.shape == windows.gyroscope.shape == (4677, 100, 3)
    assert (np.bincount(windows.exercise) > 500).all()
    assert len(np.bincount(windows.person)) == 10


def test_a_file_that_asks_for_more_than_arrays_is_refused(tmp_path, monkeypatch):
    class Asks:
        def __reduce__(self):
            return os.system, ("false",)

    path = tmp_path / "watch.npy"
    np.save(path, np.array({"X": Asks()}, dtype=object), allow_pickle=True)
    monkeypatch.setattr(watch_data, "find_recordings", lambda: path)
    with pytest.raises(ValueError, match="numpy arrays alone"):
        watch_data.load_windows()
    monkeypatch.undo()
    monkeypatch.setattr(watch_data, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install seglearn"):
        watch_data.load_windows()


def test_results_are_read_as_they_were_written(tmp_path):
    rows = [{"setting": {"data": "Ziffern ½"}, "map": [1.25, 2.5]}, {"setting": {}, "map": []}]
    study_tools.write_results(tmp_path / "a" / "b.json", {"seeds": 2}, rows)
    found = study_tools.read_results(tmp_path / "a" / "b.json")
    assert (found["settings"], found["rows"]) == ({"seeds": 2}, rows)
    assert study_tools.summary([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


# The page


def test_seeds_of_the_watch_that_test_the_same_people_are_one_number():
    """Five folds, two seeds each: t of four degrees of freedom. The digits have nine."""
    by_seed = [1.0, 2.0, 3.0, 4.0, 5.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    found = {}
    for data in retrieval.DATA:
        base, ours = Setting(data), Setting(data, slots=64)
        found[data] = retrieval.gain({base: {"map": [0.0] * 10}, ours: {"map": by_seed}}, ours)
    assert found["watch"] == pytest.approx((4.0, 2.7764451 * 2.5**0.5 / 5**0.5))
    assert found["digits"] == study_tools.paired_interval(by_seed, [0.0] * 10)


@pytest.fixture(scope="module")
def results():
    return retrieval.from_rows(study_tools.read_results(ROOT / "docs" / "results" / "retrieval.json")["rows"])


@pytest.fixture(scope="module")
def tables(results):
    data = list(retrieval.DATA)
    every = [retrieval.table_of_arms(results, one) for one in data]
    whole = (retrieval.table_of_gains(results, data), retrieval.table_of_choices(results, data))
    return [*every, *whole, retrieval.table_of_targets(results)]


def test_the_page_has_the_tables_of_the_results(tables):
    lines = {line.replace("**", "") for line in page("when.md").splitlines()}
    for rows in tables:
        assert [row for row in rows if "| " + " | ".join(row) + " |" not in lines] == []


def test_what_page_and_docstring_say_of_retrieval_stands_in_its_tables_and_results(tables, results):
    prose = " ".join(
        line for line in section("when.md", "## Retrieval across views").splitlines() if not line.startswith("|")
    )
    cells = {cell for rows in tables for row in rows for cell in row}
    for name, data in itertools.product(("queue", "targets"), retrieval.DATA):
        for wrong, what in ((0.0, "recall1"), (0.0, "pair1"), (0.4, "recall1")):
            cells.add(study_tools.signed(retrieval.gain(results, retrieval.arm(name, data, wrong=wrong), what)))
    for data in retrieval.DATA:
        arm = functools.partial(retrieval.arm, data=data)
        for ours, theirs in (
            (arm("batch alone", temperature=0.8), arm("batch alone", temperature=0.4)),
            (arm("batch alone", temperature=0.8, wrong=0.4), arm("batch alone", temperature=0.4, wrong=0.4)),
            (arm("batch alone", temperature=0.8, wrong=0.4), arm("batch alone", wrong=0.4)),
            (arm("queue", wrong=0.4), arm("batch alone", temperature=0.8, wrong=0.4)),
            (arm("targets", alpha=0.8), arm("targets")),
            (arm("targets", teacher_temperature=0.05), arm("targets")),
            (arm("queue and targets"), arm("queue")),
        ):
            cells.add(study_tools.signed(retrieval.beyond(results, ours, theirs)))
    for text in (prose, retrieval.__doc__):
        said = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", " ".join(text.split()))
        assert len(said) > 5
        assert [figure for figure in said if figure not in cells] == []


def test_the_results_of_the_page_are_whole_and_small():
    path = ROOT / "docs" / "results" / "retrieval.json"
    assert path.stat().st_size < 200_000
    found = json.loads(path.read_text(encoding="utf-8"))
    results = retrieval.from_rows(found["rows"])
    assert set(results) == {*retrieval.grid("digits"), *retrieval.grid("watch")}
    assert {len(scores) for scored in results.values() for scores in scored.values()} == {found["settings"]["seeds"]}
