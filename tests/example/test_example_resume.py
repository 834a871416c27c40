"""Killed at any moment, a training goes on and ends with the same bits as one that nobody disturbed."""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch._dynamo  # the optimiser imports it at its first step; the processes below start with it
from rich.console import Console

import mtmd_mosi
import study_cases
from mtmd.data.synthetic import synthetic_dataset
from mtmd.files import tensors
from mtmd.files.writing import replacing
from mtmd.results.records import load_predictions
from mtmd.runs import checkpoint, devices, experiment, resume, states, training
from mtmd.runs.experiment import run_experiment
from mtmd.runs.resume import pack_random, unpack_random
from mtmd.runs.states import load_state, save_state
from mtmd.runs.training import train_and_save
from mtmd.settings.config import Config
from mtmd.train import prepare, train
from tiers import times

CPU = torch.device("cpu")
SCRIPT = Path(mtmd_mosi.__file__)
SMALL = study_cases.SMALL | {"epochs": 2, "batch_size": 16, "queue_size": 40, "seeds": [1, 2]}


def small_dataset():
    return synthetic_dataset(seed=3, sizes=(40, 12, 12))


class Stop(Exception):
    """Stands for the end of a process, where a real one would take too long."""


# A run in this process that stops at a step


def train_until(config, out, *, stop=None, dataset=None):
    """One run with its state in `out`; raises Stop after that many steps of its own."""
    dataset = dataset or small_dataset()
    folds, _ = prepare(dataset, config)
    steps, notes = 0, []

    def on_step(_record):
        nonlocal steps
        steps += 1
        if steps == stop:
            raise Stop

    run = train_and_save(config, folds, dataset.widths, 7, CPU, on_step, state_dir=out, on_note=notes.append)
    return run, notes


def same_weights(first, second):
    there, here = first.state_dict(), second.state_dict()
    return there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)


def without_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_same_run(first, second):
    assert first.steps == second.steps
    # through JSON text: there NaN equals NaN
    assert json.dumps(without_seconds(first.epochs)) == json.dumps(without_seconds(second.epochs))
    assert first.best_epoch == second.best_epoch
    assert same_weights(first.model, second.model)
    for split in ("valid", "test"):
        assert np.array_equal(first.predictions[split], second.predictions[split])
        assert json.dumps(first.metrics[split]) == json.dumps(second.metrics[split])
        for name, scores in first.unimodal_predictions[split].items():
            assert np.array_equal(scores, second.unimodal_predictions[split][name], equal_nan=True)
    for name, features in first.representations.items():
        assert np.array_equal(features, second.representations[name])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"save_every": 1}, marks=pytest.mark.long),
        {"save_every": 2, "batch_size": 8, "accumulate": 2, "drop_text": 0.2, "drop_audio": 0.4, "average": 0.8},
        {"save_every": 0, "epochs": 8, "patience": 1, "schedule": "constant", "unimodal_lr": 0.1, "other_lr": 0.1},
        pytest.param(
            {"save_every": 2, "amp": True, "deterministic": True, "balanced_queue": True}, marks=pytest.mark.long
        ),
    ],
    ids=["each step", "accumulated, dropped", "early stop", "bfloat16, deterministic"],
)
def test_a_run_stopped_after_any_step_ends_as_if_it_had_not_been(settings, tmp_path):
    config = Config(**{**SMALL, **settings})
    whole, _ = train_until(config, tmp_path / "whole")
    steps = len(whole.steps)
    if config.patience == 1:
        assert len(whole.epochs) < config.epochs
    config.resume = True
    # Saved after epochs alone, a run goes on from the same state wherever in an epoch it was stopped.
    for stop in range(1, steps + 1, 1 if config.save_every else steps // len(whole.epochs)):
        out = tmp_path / str(stop)
        with pytest.raises(Stop):
            train_until(config, out, stop=stop)
        # nothing of a random state may come from this process
        torch.manual_seed(stop)
        random.seed(stop)
        run, _ = train_until(config, out)
        assert_same_run(whole, run)


def frozen(value):
    """The bits of nested tensors, arrays and numbers, for comparison: a NaN equals itself."""
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(entry) for entry in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


def all_of(training_now):
    """Whatever training changes: the objective holds the averages and the queue, the model the fusion factors."""
    return frozen(
        {
            "model": training_now.run.model.state_dict(),
            "objective": training_now.objective.state_dict(),
            "average": training_now.average.state_dict(),
            "optimizer": training_now.optimizer.state_dict(),
            "schedule": training_now.schedule.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state(),  # noqa: NPY002
            "python": random.getstate(),
        }
    )


@pytest.mark.long
def test_a_run_resumed_from_any_of_thirty_steps_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Everything live is compared, not what was saved of it: what the state forgets would show."""
    config = Config(**{**SMALL, "batch_size": 4, "epochs": 3}, save_every=1, average=0.9)
    dataset = small_dataset()
    folds, _ = prepare(dataset, config)
    trainings, saved = [], []
    begin, train_step, save = training.begin, training.train_step, resume.save_state

    def remembering(*arguments):
        trainings.append(begin(*arguments))
        return trainings[-1]

    def drawing(*arguments):  # the example draws from torch alone; with this, from all generators
        record = train_step(*arguments)
        record["drawn"] = random.gauss(0, 1) + np.random.standard_normal()  # noqa: NPY002
        return record

    def copying(folder, *arguments):
        save(folder, *arguments)
        saved.append(shutil.copytree(folder, tmp_path / f"copy{len(saved)}"))

    def run_all(state_dir):
        told, ends = [], []

        def on_step(record):
            told.append(record)
            if len(told) == 30:  # afterwards the model gets the weights of the best epoch
                ends.append(all_of(trainings[-1]))

        run = train_and_save(
            config, folds, dataset.widths, 7, CPU, on_step, state_dir=state_dir, on_note=lambda _note: None
        )
        return run, [*ends, all_of(trainings[-1])]

    monkeypatch.setattr(training, "begin", remembering)
    monkeypatch.setattr(training, "train_step", drawing)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_state", copying)
        whole, ends = run_all(tmp_path / "whole")
    assert len(saved) == 30 + 3  # at each step, and again at the end of each epoch
    config.resume, config.save_every = True, 0
    for number, state_dir in enumerate(saved):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        torch.manual_seed(number)
        run, ends_here = run_all(state_dir)
        assert ends_here == ends
        assert_same_run(whole, run)
    names = [*trainings[-1].objective.state_dict(), *run.model.state_dict()]
    assert {"momentum", "queue", "contrast", "fusion"} <= {name.partition(".")[0] for name in names}


def test_a_run_that_is_saved_has_the_numbers_of_one_that_is_not(tmp_path):
    config = Config(**{**SMALL, "patience": 1, "epochs": 4}, drop_audio=0.3, accumulate=2, average=0.9)
    dataset = small_dataset()
    folds, _ = prepare(dataset, config)
    plain = train(config, folds, dataset.widths, 7, CPU)
    saved, _ = train_until(config, tmp_path)
    assert_same_run(plain, saved)


def test_a_run_that_goes_on_tells_first_what_was_restored(tmp_path):
    config = Config(**SMALL, save_every=1, resume=True)
    dataset = small_dataset()
    folds, _ = prepare(dataset, config)
    with pytest.raises(Stop):
        train_until(config, tmp_path, stop=5)
    steps, epochs, notes = [], [], []
    run = train_and_save(
        config, folds, dataset.widths, 7, CPU, steps.append, epochs.append, state_dir=tmp_path, on_note=notes.append
    )
    assert steps == run.steps
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert notes == ["seed 7 goes on in epoch 2, after step 4"]


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
def test_a_run_may_go_on_where_there_is_another_precision_and_says_so(first, tmp_path, monkeypatch):
    if devices.no_bfloat16(CPU):  # what counts here is what is written down
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    second = {"bfloat16": "float32", "float32": "bfloat16"}[first]
    monkeypatch.setattr(devices, "no_bfloat16", lambda _: "" if now == "bfloat16" else "none here")
    config = Config(**SMALL, save_every=1, amp=True, resume=True)
    now = first
    with pytest.raises(Stop):
        train_until(config, tmp_path, stop=3)
    now = second
    run, notes = train_until(config, tmp_path)
    assert notes[0] == f"seed 7 was trained in {first} so far and goes on in {second}"
    assert run.precisions == [first, second]
    assert experiment.run_entry(run)["precision"] == f"{first}, then {second}"
    assert len(run.steps) == 6


def test_random_numbers_of_all_kinds_go_on_where_they_were():
    def draw():
        return (
            [random.random(), random.gauss(0, 1)],
            np.random.standard_normal(3).tolist(),  # noqa: NPY002  the global state is what is tested
            torch.rand(3).tolist(),
        )

    random.gauss(0, 1)  # leaves half of a pair behind, which is part of the state
    np.random.standard_normal(1)  # noqa: NPY002
    tensors, values = {}, {}
    pack_random(CPU, tensors, values)
    values = json.loads(json.dumps(values))
    first = draw()
    draw()
    unpack_random(CPU, tensors, values)
    assert draw() == first


# Damaged and stray files


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.grid
@pytest.mark.parametrize("ending", ["safetensors", "json"])
@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_state_is_named_and_the_one_before_it_is_used(damage, ending, tmp_path):
    config = Config(**SMALL, save_every=1)
    whole, _ = train_until(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train_until(config, tmp_path / "state", stop=6)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    # five steps and the end of an epoch were saved: six states
    states = [f"state_{number:09d}.{kind}" for number in (5, 6) for kind in ("json", "safetensors")]
    assert names == states
    damage(tmp_path / "state" / f"state_{6:09d}.{ending}")
    config.resume = True
    run, notes = train_until(config, tmp_path / "state")
    assert f"state_{6:09d}.{ending}" in notes[0]
    assert notes[1:] == ["seed 7 goes on in epoch 2, after step 4"]
    assert_same_run(whole, run)


def test_where_every_state_is_damaged_the_run_begins_anew(tmp_path):
    config = Config(**SMALL, save_every=1)
    whole, _ = train_until(config, tmp_path / "whole")
    with pytest.raises(Stop):
        train_until(config, tmp_path / "state", stop=6)
    for path in (tmp_path / "state").iterdir():
        cut(path)
    config.resume = True
    run, notes = train_until(config, tmp_path / "state")
    assert len(notes) == 3
    assert all("damaged" in note for note in notes[:2])
    assert notes[2].endswith("no state is left, the run begins anew")
    assert_same_run(whole, run)


def test_a_state_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    for step in (1, 2):
        save_state(tmp_path, step, {"weight": torch.ones(3)}, {"step": step})
    before = sorted(tmp_path.iterdir())

    def refuse(*_arguments):
        raise PermissionError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "file_sha256", refuse)
        with pytest.raises(PermissionError, match="not now"):
            load_state(tmp_path, print)
    assert sorted(tmp_path.iterdir()) == before
    assert load_state(tmp_path, print)[1] == {"step": 2}


@pytest.mark.parametrize("other", [states.STATE_FORMAT - 1, states.STATE_FORMAT + 1], ids=["older", "newer"])
def test_a_state_of_another_format_is_kept_and_named(other, tmp_path):
    save_state(tmp_path, 1, {"weight": torch.ones(3)}, {"step": 1})
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": other}))
    expected = rf"state_000000001\.json: expected a training state of format {states.STATE_FORMAT}, got {other}"
    with pytest.raises(ValueError, match=expected):
        load_state(tmp_path, print)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_whose_tensors_are_gone_is_swept(tmp_path):
    for step in (1, 2):
        save_state(tmp_path, step, {"weight": torch.ones(3)}, {"step": step})
    (tmp_path / "state_000000002.safetensors").unlink()
    notes = []
    assert load_state(tmp_path, notes.append)[1] == {"step": 1}
    assert len(notes) == 1
    assert "state_000000002.safetensors" in notes[0]
    assert not (tmp_path / "state_000000002.json").exists()


def test_the_two_newest_states_are_kept_and_strays_swept(tmp_path):
    for step in range(1, 5):
        save_state(tmp_path, step, {"weight": torch.full((3,), float(step))}, {"step": step})
    (tmp_path / ".state_000000009.safetensors.part").write_bytes(b"half")
    (tmp_path / "state_000000009.safetensors").write_bytes(b"a whole file, but killed before its description")
    notes = []
    tensors, values = load_state(tmp_path, notes.append)
    assert values == {"step": 4}
    assert tensors["weight"].tolist() == [4.0] * 3
    assert notes == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"state_00000000{step}.{ending}" for step in (3, 4) for ending in ("json", "safetensors")
    ]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with replacing(path) as part:
            part.write_text("ne")
            raise Stop

    with pytest.raises(Stop):
        write_half()
    assert path.read_text() == "old"
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# Real processes, really killed


def read_folder(out):
    """All that must agree between two experiments, without times and places."""
    results = json.loads((out / "results.json").read_text())
    for name in ("out", "resume"):
        del results["config"][name]
    results["runs"] = without_seconds(results["runs"])
    epochs = without_seconds(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    files = {}
    for path in sorted(out.iterdir()):
        if path.suffix in (".csv", ".safetensors"):
            files[path.name] = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                files[path.name] = {name: arrays[name].tolist() for name in arrays}
    assert {"predictions.csv", "checkpoint_seed1.safetensors", "steps_seed2.csv"} <= set(files)
    leftover = [path.name for path in out.iterdir() if path.name.startswith((".", "state_"))]
    assert leftover == []
    return results, epochs, files


def experiment_process(out, resume, die_at, log):
    """What runs in the other process; with `die_at`, SIGKILL instead of that operation on the disk."""
    torch.set_num_threads(1)
    operations = 0

    def deadly(function):
        def wrapped(*arguments, **options):
            nonlocal operations
            operations += 1
            if operations == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    saves = (checkpoint, "write_tensors"), (states, "write_tensors")
    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), *saves):
        setattr(owner, name, deadly(getattr(owner, name)))
    # Figures take longer than all the rest, and are written like nothing else is.
    experiment.plot_losses = experiment.plot_factors = lambda *_arguments, **_options: None
    config = Config(**SMALL, save_every=1, out=out, resume=resume)
    with log.open("a", encoding="utf-8") as file:
        run_experiment(config, Console(file=file, width=200), dataset=small_dataset())


@pytest.fixture(scope="module")
def processes():
    """Starts processes from a server that has imported everything once: no second lost for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_example_resume"])
    with pytest.MonkeyPatch.context() as patch:  # before Python 3.13 the server finds modules in no other way
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ensure_running()
    nothing = context.Process(target=int)  # waits until the server has imported all
    nothing.start()
    nothing.join()
    return context


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """The folder of a run that nobody kills, and the seconds that it computed."""
    out = tmp_path_factory.mktemp("undisturbed")
    log = tmp_path_factory.mktemp("log") / "log.txt"
    process = processes.Process(target=experiment_process, args=(out, False, None, log))
    process.start()
    seconds = 0.0
    while process.is_alive():
        seconds = max(seconds, computed(process))
        process.join(0.01)
    assert process.exitcode == 0, log.read_text()
    return read_folder(out), seconds


def computed(process):
    """The seconds that a process has computed: how busy the machine is does not tell in them. 0 when it has ended."""
    try:
        return sum(psutil.Process(process.pid).cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def begun(processes, folder, resume, nth=None):
    """A process that trains, or goes on; it dies at its `nth` operation on the disk."""
    process = processes.Process(target=experiment_process, args=(folder, resume, nth, folder / "log.txt"))
    process.start()
    return process


def has_ended(process, folder):
    """Wait for it: whether it came to its end. Else it was killed, and had no error."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()
    return process.exitcode == 0


@pytest.mark.long
def test_killed_at_random_moments_it_ends_with_the_same_bits(processes, undisturbed, tmp_path):
    expected, seconds = undisturbed
    moments = random.Random(11)
    kills = 0
    for attempt in range(60):
        process = begun(processes, tmp_path, attempt > 0)
        moment = moments.uniform(0.1, 0.4) * seconds * (1 + attempt / 10)  # later, for each begins by restoring
        while process.is_alive() and computed(process) < moment:
            process.join(0.001)
        process.kill()
        if has_ended(process, tmp_path):
            break
        kills += 1
    assert process.exitcode == 0
    assert kills >= 2
    assert read_folder(tmp_path) == expected


@pytest.mark.repeated
def test_killed_at_its_nth_operation_on_the_disk_it_ends_with_the_same_bits(processes, undisturbed, tmp_path):
    """A process dies at its nth write, sync, rename or removal, the next at a later one: while it saves each time."""
    expected, _ = undisturbed
    for attempt in range(1, 200, times(50, 3, 1)):
        process = begun(processes, tmp_path, attempt > 1, attempt)
        if has_ended(process, tmp_path):
            break
    assert process.exitcode == 0
    assert attempt > 10
    assert read_folder(tmp_path) == expected


@pytest.mark.long
def test_the_command_itself_killed_with_kill_9_goes_on(tmp_path):
    widths = [f"--{name}=4" for name in ("width", "fused-width", "audio-hidden", "vision-hidden", "text-hidden")]
    options = [*widths, "--layers=1", "--epochs=2", "--batch-size=128", "--save-every=2", "--seeds", "1", "2"]
    command = [sys.executable, str(SCRIPT), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    states = tmp_path / "killed" / "state_seed2"
    while not list(states.glob("state_*.json")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    output = subprocess.run(
        [*command, "--out", str(tmp_path / "killed"), "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "seed 1 was finished before" in output
    assert "seed 2 goes on in epoch" in output
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert mtmd_mosi.main([*command[2:], "--out", str(tmp_path / "whole")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")


# Experiments of several seeds


def quiet():
    return Console(file=io.StringIO())


@pytest.fixture
def trained_seeds(monkeypatch):
    """The seeds that were trained, in order; figures are left out."""
    seeds = []

    def counting(config, folds, widths, seed, *arguments, **options):
        seeds.append(seed)
        return train_and_save(config, folds, widths, seed, *arguments, **options)

    monkeypatch.setattr(experiment, "train_and_save", counting)
    for name in ("plot_losses", "plot_factors"):
        monkeypatch.setattr(experiment, name, lambda *_arguments, **_options: None)
    return seeds


def test_finished_seeds_are_kept_and_new_ones_added(tmp_path, trained_seeds):
    dataset = small_dataset()
    first = Config(**{**SMALL, "seeds": [1]}, out=tmp_path / "grown")
    run_experiment(first, quiet(), dataset=dataset)
    second = dataclasses.replace(first, seeds=[2, 1], resume=True)
    grown = run_experiment(second, quiet(), dataset=dataset)
    assert trained_seeds == [1, 2]
    whole = run_experiment(dataclasses.replace(second, out=tmp_path / "whole", resume=False), quiet(), dataset=dataset)
    assert without_seconds(grown["runs"]) == without_seconds(whole["runs"])
    assert grown["mean"] == whole["mean"]
    # asked for fewer, the others stay
    again = run_experiment(dataclasses.replace(second, seeds=[1]), quiet(), dataset=dataset)
    assert [entry["seed"] for entry in again["runs"]] == [1, 2]
    assert trained_seeds == [1, 2, 2, 1]


def test_seeds_of_another_precision_are_kept_and_named(tmp_path, trained_seeds, monkeypatch):
    monkeypatch.setattr(devices, "no_bfloat16", lambda _: "none here")
    config = Config(**{**SMALL, "seeds": [1]}, amp=True, out=tmp_path)
    run_experiment(config, quiet(), dataset=small_dataset())
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"precision": "float32"', '"precision": "bfloat16"'))
    printed = quiet()
    results = run_experiment(dataclasses.replace(config, seeds=[1, 2], resume=True), printed, dataset=small_dataset())
    assert [run["precision"] for run in results["runs"]] == ["bfloat16", "float32"]
    assert "note: seed 1 was trained in bfloat16, those that follow are in float32\n" in printed.file.getvalue()
    assert trained_seeds == [1, 2]


def test_a_seed_whose_files_are_gone_is_trained_again(tmp_path, trained_seeds):
    config = Config(**SMALL, out=tmp_path)
    first = run_experiment(config, quiet(), dataset=small_dataset())
    (tmp_path / "checkpoint_seed2.safetensors").unlink()
    config.resume = True
    second = run_experiment(config, quiet(), dataset=small_dataset())
    assert trained_seeds == [1, 2, 2]
    assert without_seconds(first["runs"]) == without_seconds(second["runs"])
    assert (tmp_path / "checkpoint_seed2.safetensors").exists()


def drop_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("checkpoint_seed2.safetensors", flip, r"expected the file that checkpoint_seed2\.json describes"),
        ("checkpoint_seed2.json", cut, "expected a JSON file"),
        ("steps_seed2.csv", Path.unlink, "expected a file, found none"),
        ("metrics.jsonl", drop_last_line, "expected 2 epochs of the seed, got 1"),
        ("predictions.csv", drop_last_line, "expected 12 test rows of the seed, got 11"),
    ],
)
def test_a_seed_whose_files_are_damaged_is_trained_again(name, damage, message, tmp_path, trained_seeds):
    config = Config(**SMALL, out=tmp_path)
    first = run_experiment(config, quiet(), dataset=small_dataset())
    damage(tmp_path / name)
    printed = quiet()
    second = run_experiment(dataclasses.replace(config, resume=True), printed, dataset=small_dataset())
    assert trained_seeds == [1, 2, 2]
    assert without_seconds(first["runs"]) == without_seconds(second["runs"])
    (note,) = [line for line in printed.file.getvalue().splitlines() if line.startswith("note: seed")]
    assert note.startswith(f"note: seed 2 was finished before, but is trained again: {tmp_path / name}: ")
    assert re.search(message, note)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("1,test,b,0.5", 3),
        ("", 3),
        ("1,test,b,0.5,half,,,", 3),
        ("1,train,b,0.5,0.5,,,", 3),
        ("one,test,b,0.5,0.5,,,", 3),
        ("1,test,b,0.5,,,,", 3),
    ],
    ids=["short", "blank", "no number", "no split", "no seed", "no score"],
)
def test_a_damaged_line_of_predictions_is_named(line, number, tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_text(f"seed,split,id,target,score,text,audio,vision\n1,test,a,0.5,0.25,0.5,,\n{line}\n")
    with pytest.raises(ValueError, match=rf"predictions\.csv: expected a prediction in line {number}, got '{line}'"):
        load_predictions(tmp_path)
    path.write_bytes(b"seed,split,id,target,score,text,audio,vision\n1,test,\xff,0.5,0.25,0.5,,\n")
    with pytest.raises(ValueError, match=r"predictions\.csv: expected UTF-8 in line 2"):
        load_predictions(tmp_path)


def test_an_experiment_is_not_replaced_unasked(tmp_path, trained_seeds):
    config = Config(**SMALL, out=tmp_path)
    run_experiment(config, quiet(), dataset=small_dataset())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"results\.json; --resume goes on with it, --no-resume deletes it and begins"):
        run_experiment(config, quiet(), dataset=small_dataset())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert trained_seeds == [1, 2]


def test_with_no_resume_it_begins_anew(tmp_path, trained_seeds):
    config = Config(**SMALL, out=tmp_path, resume=False)
    printed = quiet()
    run_experiment(config, printed, dataset=small_dataset())
    assert "deleted" not in printed.file.getvalue()
    (tmp_path / "losses_seed1.svg").write_bytes(b"a figure")
    (tmp_path / "checkpoint_seed1_mine.json").write_text("{}")
    results = run_experiment(dataclasses.replace(config, seeds=[2]), printed, dataset=small_dataset())
    assert f"note: the earlier results in {tmp_path} are deleted\n" in printed.file.getvalue()
    assert [entry["seed"] for entry in results["runs"]] == [2]
    assert trained_seeds == [1, 2, 2]
    assert [path.name for path in tmp_path.glob("*_seed1*")] == ["checkpoint_seed1_mine.json"]
    assert (tmp_path / "checkpoint_seed2.safetensors").exists()


@pytest.mark.parametrize("name", ["losses_seed1.svg", "state_seed3/state_000000001.json"])
def test_nothing_finished_is_deleted_where_not_all_can_be(name, tmp_path, trained_seeds):
    config = Config(**SMALL, out=tmp_path, resume=False)
    run_experiment(config, quiet(), dataset=small_dataset())
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name / "mine").mkdir(parents=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(IsADirectoryError, match=name):
        run_experiment(config, quiet(), dataset=small_dataset())
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert trained_seeds == [1, 2]


def test_resume_refuses_other_settings_and_other_data(tmp_path, trained_seeds):
    config = Config(**{**SMALL, "seeds": [1]}, out=tmp_path)
    run_experiment(config, quiet(), dataset=small_dataset())
    other = dataclasses.replace(config, alpha=0.3, layers=2, resume=True)
    with pytest.raises(
        ValueError, match=r"--resume: expected the settings of .*layers 2, there 1; alpha 0.3, there 0.4"
    ):
        run_experiment(other, quiet(), dataset=small_dataset())
    same = dataclasses.replace(config, resume=True, save_every=5, device="cpu")
    with pytest.raises(ValueError, match="--resume: expected the data of"):
        run_experiment(same, quiet(), dataset=synthetic_dataset(seed=4, sizes=(40, 12, 12)))
    run_experiment(same, quiet(), dataset=small_dataset())
    assert trained_seeds == [1]


def test_a_state_of_other_settings_or_data_is_refused(tmp_path):
    config = Config(**SMALL, save_every=1, resume=True)
    with pytest.raises(Stop):
        train_until(config, tmp_path, stop=2)
    with pytest.raises(ValueError, match=r"--resume: expected the settings of .*epochs 4, there 2"):
        train_until(dataclasses.replace(config, epochs=4), tmp_path)
    with pytest.raises(ValueError, match="--resume: expected the data of"):
        train_until(config, tmp_path, dataset=synthetic_dataset(seed=4, sizes=(40, 12, 12)))


def test_a_folder_with_a_results_file_of_something_else_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"runs": []}')
    with pytest.raises(
        ValueError, match=r"results\.json: expected the results of `train`, got a file without 'config'"
    ):
        run_experiment(Config(**SMALL, out=tmp_path, resume=True), quiet(), dataset=small_dataset())
    (tmp_path / "results.json").write_text('{"runs": [')
    with pytest.raises(ValueError, match=r"results\.json: expected a JSON file"):
        run_experiment(Config(**SMALL, out=tmp_path, resume=True), quiet(), dataset=small_dataset())
