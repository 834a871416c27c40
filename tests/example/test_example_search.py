"""`search`: what it tries and judges by, how it goes on, and the files with the paper's settings."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import mtmd_mosi
from mtmd.files.reading import read_toml
from mtmd.settings import cli
from mtmd.settings.config import NOT_IDENTITY, Config
from mtmd.study import jobs, search
from study_cases import fails, read


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
