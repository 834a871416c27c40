"""torchrun: several processes train as one would."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

import example_rank_cases
from conftest import ROOT
from mtmd.results.records import load_predictions
from mtmd.runs.checkpoint import load_checkpoint
from mtmd.runs.processes import started
from study_cases import TINY

pytestmark = pytest.mark.xdist_group("ranks")

# The momentum models start where their students are: |student - momentum| is at its kink, and the gradient of rounding.
ALONE = [*TINY, "--dropout=0", "--without", "momentum_dmd", "--batch-size=9"]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "options",
    [[], ["--sampling=instance"], ["--sampling=distance"], ["--detach-text"]],
    ids=["class", "instance", "distance", "detach"],
)
def test_gradients_are_those_of_one_process(ranks, world, options):
    expected, terms, _ = example_rank_cases.gradients([*ALONE, *options], 4)
    for grads, seen, _ in ranks.run(world, "example_rank_cases:gradients", [*ALONE, *options], 4):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            scale = float(expected[name].abs().max())
            np.testing.assert_allclose(grad, expected[name], rtol=0, atol=1e-5 * max(scale, 1e-3), err_msg=name)
        for here, there in zip(seen, terms, strict=True):
            assert here == pytest.approx(there, rel=1e-5, abs=1e-6)


def test_a_process_for_which_no_row_is_left_keeps_step(ranks):
    options = [*ALONE[:-1], "--batch-size=2"]
    expected, _, _ = example_rank_cases.gradients(options, 2)
    answers = ranks.run(3, "example_rank_cases:gradients", options, 2)
    assert [rows for _, _, rows in answers] == [[1, 1], [1, 1], [0, 0]]
    for grads, _, _ in answers:
        for name, grad in grads.items():
            scale = float(expected[name].abs().max())
            np.testing.assert_allclose(grad, expected[name], rtol=0, atol=1e-5 * max(scale, 1e-3), err_msg=name)


def command(processes, *options):
    """Run the example as a user does; what it printed."""
    start = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    done = subprocess.run(
        [*start, "examples/mtmd_mosi.py", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One process and two, of the same settings."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        code, said = command(processes, *TINY, "--dropout=0", "--out", str(folders[processes]), "--seeds", "1")
        assert code == 0, said
        assert said.count("Results, predictions") == 1  # one talks
        assert "Warning" not in said
    return folders


@pytest.mark.long
def test_two_processes_get_the_metrics_of_one(trained):
    predictions = {n: load_predictions(folder)[1]["test"]["score"] for n, folder in trained.items()}
    np.testing.assert_allclose(predictions[2], predictions[1], atol=0.02)
    maes = {n: json.loads((folder / "results.json").read_text())["mean"]["mae"] for n, folder in trained.items()}
    assert maes[2] == pytest.approx(maes[1], abs=0.005)


@pytest.mark.long
def test_what_two_processes_wrote_is_what_one_would(trained):
    names = {n: sorted(path.name for path in folder.iterdir()) for n, folder in trained.items()}
    assert names[2] == names[1]
    shapes = {}
    for n, folder in trained.items():
        model, _, _ = load_checkpoint(folder / "checkpoint_seed1")
        shapes[n] = [(name, tensor.shape) for name, tensor in model.state_dict().items()]
    assert shapes[2] == shapes[1]


def test_a_state_goes_on_at_another_number_of_processes(ranks, tmp_path):
    """Saved by two after three steps; one, two and three processes go on from it and end alike."""
    saved = ranks.run(2, "example_rank_cases:train_three_steps", [*TINY, "--dropout=0"], str(tmp_path))
    assert saved == [3, 3]
    ends = {1: [example_rank_cases.go_on([*TINY, "--dropout=0"], str(tmp_path))]}
    for world in (2, 3):
        ends[world] = ranks.run(world, "example_rank_cases:go_on", [*TINY, "--dropout=0"], str(tmp_path))
    for end in [end for group in ends.values() for end in group]:
        assert end[:4] == ends[1][0][:4]  # where it goes on, and with what queue and averages, to the bit
        assert end[4] == pytest.approx(ends[1][0][4], rel=1e-4)  # the loss of the next step


def test_all_train_in_what_each_of_them_can(ranks):
    assert ranks.run(2, "example_rank_cases:precision", True) == ["bfloat16"] * 2
    assert ranks.run(2, "example_rank_cases:precision", False) == ["float32"] * 2


@pytest.mark.parametrize(("gpus", "backends"), [(0, "cpu:gloo"), (2, "cpu:gloo,cuda:nccl")])
def test_numbers_travel_between_cpus_also_where_there_are_gpus(gpus, backends, monkeypatch):
    """Named, for torch 2.11 takes nccl alone, which has no way for the seed that rank 0 gives out."""
    asked = []

    def stop(backend):
        asked.append(backend)
        raise ConnectionError("far enough")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", asked.append)
    monkeypatch.setattr("torch.distributed.init_process_group", stop)
    with pytest.raises(ConnectionError, match="far enough"), started("train"):
        pass
    assert asked == ([1, backends] if gpus else [backends])


def test_other_commands_want_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^torchrun: expected the command train"), started("check"):
        pass


@pytest.mark.long
def test_other_commands_end_in_that_error_under_torchrun():
    code, said = command(2, "check", "absent")
    assert code != 0
    assert "torchrun: expected the command train" in said
