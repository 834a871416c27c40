"""The command line of the example: help in groups, and for whatever is wrong one line, before anything is read."""

import argparse
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtmd_mosi
from mtmd.data import check, own_format
from mtmd.data.synthetic import synthetic_dataset
from mtmd.files.writing import check_writable
from mtmd.runs import evaluate, experiment, export, trained
from mtmd.settings import cli
from mtmd.settings.config import Config
from mtmd.study import report
from study_cases import TINY, fake_checkpoint, fake_experiment

SETTING_GROUPS = ["data", "synthetic", "model", "distillation", "training", "learning", "speed", "output"]
GROUPS = {*SETTING_GROUPS, "ablation", "search"}


def parser_of(name):
    parser = argparse.ArgumentParser()
    module = importlib.import_module(cli.COMMANDS[name].module)
    getattr(module, cli.COMMANDS[name].add_arguments)(parser)
    return parser


def shown(capsys, *arguments):
    """What a command prints before it ends the program."""
    with pytest.raises(SystemExit) as stop:
        mtmd_mosi.main(list(arguments))
    assert stop.value.code == 0
    return capsys.readouterr().out


def complaint(capsys, line):
    """The one line that a command line ends in, without `error: `."""
    assert mtmd_mosi.main(shlex.split(line)) == 2, line
    error = capsys.readouterr().err
    assert error.startswith("error: "), (line, error)
    assert error.count("\n") == 1, (line, error)
    return error.removeprefix("error: ").rstrip("\n")


# Help


def test_help_names_every_command(capsys):
    text = shown(capsys, "--help")
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert command.summary in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_in_groups(name, capsys):
    text = shown(capsys, name, "--help")
    assert cli.COMMANDS[name].summary in " ".join(text.split())
    assert text.index("\n\n") < 200  # usage is a line, not a list of all options
    for group in parser_of(name)._action_groups:
        options = [option for action in group._group_actions for option in action.option_strings or [action.dest]]
        if group.title in ("options", "positional arguments"):
            assert set(options) <= {"-h", "--help", "--config", "source"}
        else:
            assert group.title.partition(" ")[0] in GROUPS
            assert options
            assert f"\n{group.title}:\n" in text


def test_help_explains_every_setting_with_its_default(capsys):
    text = " ".join(shown(capsys, "train", "--help").split())
    groups = [entry.metadata["group"] for entry in dataclasses.fields(Config) if entry.metadata["group"]]
    assert [name.partition(" ")[0] for name in dict.fromkeys(groups)] == SETTING_GROUPS
    for entry in dataclasses.fields(Config):
        assert "--" + entry.name.replace("_", "-") in text
        assert len(entry.metadata["help"]) > 15


# What is wrong with a command line by itself. None of these reads data: what would, fails.

WRONG_OPTIONS = {
    "tain": "command: expected one of train, evaluate, predict, ablate, search, report, convert, check, export, got "
    "'tain'; did you mean train?",
    "--epochs 1 ablate": "train: expected options that it has, got ablate; the command comes first: ablate ...",
    "--epochs two": "--epochs: expected a whole number, got 'two'",
    "--epochs": "--epochs: expected one argument",
    "--alpha high": "--alpha: expected a number, got 'high'",
    "--schedule cosin": "--schedule: expected one of cosine, constant, got 'cosin'; did you mean cosine?",
    "--schedule step": "--schedule: expected one of cosine, constant, got 'step'",
    "--without reg fusions": "--without: expected one of reg, cls,",
    "--batchsize 3": "train: expected options that it has, got --batchsize 3; did you mean --batch-size?",
    "--bert_lr 1 --no-resum --zzz=1": "got --bert_lr 1 --no-resum --zzz=1; did you mean --bert-lr, --no-resume?",
    "--lr 1e-4": "got --lr 1e-4; did you mean --bert-lr, --unimodal-lr, --other-lr?",
    "--zzz": "train: expected options that it has, got --zzz",
    "--out ''": "--out: expected a path, got ''",
    "--device tpu": "--device: expected one of auto, cpu, cuda, got 'tpu'",
    "evaluate": "the following arguments are required: checkpoint",
    "evaluate c --fold tset": "--fold: expected one of train, valid, test, got 'tset'; did you mean test?",
    "evaluate c --drop audio": "--drop: expected MODALITY=RATE, got 'audio'",
    "evaluate c --drop audio=2": "--drop: expected a number in [0, 1], got 2",
    "evaluate c --drop audio=half": "--drop: expected a number, got 'half'",
    "evaluate c --drop smell=0.5": "--drop: expected one of text, audio, vision, got 'smell'",
    "evaluate c --robustness --out o --rates 1.5": "--rates: expected a number in [0, 1], got 1.5",
    "evaluate c --robustness --out o --rates nan": "--rates: expected a number in [0, 1], got nan",
    "evaluate c --drop audio=1 --draws 0": "--draws: expected a whole number of at least 1, got '0'",
    "evaluate c --drop audio=1 --seed -1": "--seed: expected a whole number of at least 0, got '-1'",
    "predict c --fold all x": "--fold: expected one of train, valid, test, got 'all'",
    "ablate --arms no_regg": "--arms: expected one of all, no_reg,",
    "ablate --jobs 0": "--jobs: expected a whole number of at least 1, got '0'",
    "ablate --resamples 0": "--resamples: expected a whole number of at least 1, got '0'",
    "search --trials 0": "--trials: expected a whole number of at least 1, got '0'",
    "search --jobs 0": "--jobs: expected a whole number of at least 1, got '0'",
    "search --search-seed -1": "--search-seed: expected a whole number of at least 0, got '-1'",
    "search --final-seeds -1": "--final-seeds: expected a whole number of at least 0, got '-1'",
    **{
        f"search --grid {given}": f"--grid: expected {said}"
        for given, said in {
            "alhpa=1": "NAME=V,V with the name of a setting, got 'alhpa=1'; did you mean alpha?",
            "seeds=1": "NAME=V,V with the name of a setting, got 'seeds=1'",
            "alpha": "NAME=V,V with the name of a setting, got 'alpha'",
            "without=reg": "a setting with a number, a word or true and false, got without",
            "alpha=0.1,high": "values of type float for alpha, got '0.1,high'",
            "queue_size=1,": "values of type int for queue_size, got '1,'",
            "alpha=0.1,0.10": "each value of alpha once, got '0.1,0.10'",
            "queue-size=64 queue_size=128": "each setting once, with all its values, got queue_size twice",
        }.items()
    },
    "report": "the following arguments are required: DIR",
    "report d --seed one": "--seed: expected a whole number of at least 0, got 'one'",
    "report d --resamples 0": "--resamples: expected a whole number of at least 1, got '0'",
    "convert x": "the following arguments are required: FOLDER",
    "convert x y --score-range -1 high": "--score-range: expected a number, got 'high'",
    "export c model.pt": "target: expected a file name that ends in .pt2, got model.pt",
}
WRONG_VALUES = {
    "--epochs 0": "epochs: expected at least 1, got 0",
    "--drop-audio 1.5": "drop_audio: expected a share in [0, 1], got 1.5",
    "--seeds": "seeds: expected at least one",
    "--seeds 1 1": "seeds: expected each once, got 1 1",
    "--modalities": "modalities: expected at least one",
    "--alpha 1.5": "alpha: expected a finite number in [0, 1], got 1.5",
    "--temperature 0": "temperature: expected a number in [0.01, 10], got 0.0",
    "--decay 1.1": "decay: expected a finite number in [0, 1], got 1.1",
    "--dropout 1": "dropout: expected a share in [0, 1), got 1.0",
    "--wrong-text -0.1": "wrong_text: expected a share in [0, 1], got -0.1",
    "--signal-audio nan": "signal_audio: expected a share in [0, 1], got nan",
    "--gamma-reg -1": "gamma_reg: expected a finite number of at least 0, got -1.0",
    "--gamma-fusion nan": "gamma_fusion: expected a finite number of at least 0, got nan",
    "--unimodal-lr 0": "unimodal_lr: expected a finite number above 0, got 0.0",
    "--bert-lr inf": "bert_lr: expected a finite number of at least 0, got inf",
    "--clip inf": "clip: expected a finite number of at least 0, got inf",
}
CONTRADICTIONS = {
    # where the data come from
    "--dataset mosi": "data: expected a file for dataset 'mosi', got none",
    "--data x --dataset synthetic": "data: expected none for the synthetic set, got x",
    "--data x --synthetic-seed 1": "--synthetic-seed: expected the synthetic set beside it",
    "--data x --wrong-text 0.4": "--wrong-text: expected the synthetic set beside it",
    **{
        f"--data x --signal-{m} 0.5": f"--signal-{m}: expected the synthetic set beside it" for m in Config().modalities
    },
    # what the model reads
    "--max-tokens 40": "--max-tokens: expected a --text-encoder beside it",
    "--pooling cls": "--pooling: expected a --text-encoder beside it",
    "--bert-lr 1e-5": "--bert-lr: expected a --text-encoder beside it",
    "--text-encoder x --text-hidden 32": "--text-hidden: expected --text-encoder features beside it",
    "--modalities audio --drop-text 0.5": "--drop-text: expected text as a modality beside it",
    "--modalities text --drop-audio 0.5": "--drop-audio: expected audio as a modality beside it",
    "--modalities text --drop-vision 0.5": "--drop-vision: expected vision as a modality beside it",
    "--modalities text --without text_task": "modalities: expected at least one that is left, got",
    "--heads 3": "text_hidden: expected a multiple of heads (3), got 64",
    "--audio-hidden 6": "audio_hidden: expected a multiple of heads (4), got 6",
    # what is distilled
    "--balanced-queue --sampling instance": "balanced_queue: expected sampling 'class'",
    "--sampling distance --positives inside_per_positive": "positives: expected 'outside' or 'inside' with sampling",
    "--score-width 2": "--score-width: expected --sampling distance beside it",
    "--score-width 0 --sampling distance": "score_width: expected a finite number above 0",
    "--hardness -1": "hardness: expected a finite number of at least 0",
    "--hardness 1 --without feat": "--hardness: expected L_feat beside it",
    "--queue-size 9 --without queue": "--queue-size: expected a queue beside it",
    "--balanced-queue --without feat": "--balanced-queue: expected a queue beside it",
    **{
        f"--gamma-{term} 1 --without {term}": f"--gamma-{term}: expected L_{term} beside it"
        for term in ("reg", "cls", "feat", "fusion")
    },
    "--gamma-reg 1 --without distillation": "--gamma-reg: expected L_reg beside it",
    **{
        f"{given} {rest}": f"{given.partition(' ')[0]}: expected {beside} beside it"
        for rest, entries in {
            "--modalities text": {
                **{f"--gamma-{term} 1": f"L_{term}" for term in ("reg", "cls", "feat", "fusion")},
                **dict.fromkeys(("--positives inside", "--sampling instance", "--detach-text"), "L_feat"),
                **dict.fromkeys(("--hardness 1", "--temperature 0.1"), "L_feat"),
                "--queue-size 9": "a queue",
                "--balanced-queue": "a queue",
                "--alpha 0": "momentum models",
                "--decay 0.1": "momentum models or factors",
                "--fusion-start text": "text beside other modalities",
            },
            "--without text_task": {
                "--gamma-reg 1": "L_reg",
                "--queue-size 9": "a queue",
                "--alpha 0": "momentum models",
                "--drop-text 0.5": "text as a modality",
                "--text-encoder x": "text as a modality",
                "--fusion-start text": "text beside other modalities",
            },
        }.items()
        for given, beside in entries.items()
    },
    # evaluate and predict
    "evaluate c --robustness": "--out: expected a folder for the curves of --robustness, got none",
    "evaluate c --rates 0.5": "--rates: expected --robustness beside it, got it alone",
    "evaluate c --rates 0.5 --drop audio=1": "--rates: expected --robustness beside it, got it alone",
    "evaluate c --draws 3": "--draws: expected --drop or --robustness beside it, got it alone",
    "evaluate c --seed 3": "--seed: expected --drop or --robustness beside it, got it alone",
    "evaluate c --drop audio=0.3 audio=0.5": "--drop: expected each modality once, got audio audio",
    "predict c": "got neither",
    "predict c x.csv --text good": "got both",
    "predict c x.csv --audio a.npy": "got both",
    "predict c x.csv --fold valid": "--fold: expected a pickle or folder beside it",
    "predict c --text good --fold valid": "--fold: expected a pickle or folder beside it",
    "predict c x.csv --out x.csv": "--out: expected another file than the one to read, got x.csv",
    "predict c --audio a.npy --out ./a.npy": "--out: expected another file than the one to read, got a.npy",
    # the study
    "ablate --modalities audio --arms no_audio_task": "--arms: expected an arm that can be told from full",
    "search --trials 2026": "--trials: expected 1 to 2025, the points of the grid, got 2026",
    "search --alpha 0.3": "--alpha: expected none, for the search chooses it among the values of its grid, got 0.3",
    "search --layers 2 --grid layers=1,3": "--layers: expected none, for the search chooses it",
    "search --trials 1 --grid alpha=2": "alpha: expected a finite number in [0, 1], got 2.0",
    "search --trials 1 --grid schedule=linear": "schedule: expected one of cosine, constant, got 'linear'",
    "search --trials 1 --grid heads=3": "text_hidden: expected a multiple of heads (3), got 64",
    "search --final-seeds 1 2 1": "--final-seeds: expected each once, got 1 2 1",
    "report d d": "report: expected each folder once",
    "report 1 2 3 4 5 6 7 8": "report: expected at most 7 folders, got 8",
    "convert x y --score-range 1 -1": "--score-range: expected a number below 0 and one above",
    "convert x .": "expected a new or empty folder, got one that holds something",
}


@pytest.fixture
def nothing_is_read(monkeypatch, tmp_path):
    """Where one stands there is a file, no CUDA device, and whatever reads data fails."""

    def refuse(*arguments, **_):
        raise AssertionError(f"read: {arguments}")

    for module, names in {
        experiment: ["load_data"],
        check: ["load_mmsa", "examine"],
        own_format: ["load_mmsa", "load_dataset"],
        trained: ["load_checkpoint"],
        evaluate: ["open_dataset"],
        report: ["load_experiment"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    "table", [WRONG_OPTIONS, WRONG_VALUES, CONTRADICTIONS], ids=["option", "value", "contradiction"]
)
def test_what_options_alone_get_wrong_is_one_line_before_anything_is_read_or_made(table, capsys):
    for line, message in table.items():
        assert message in complaint(capsys, line), line
    assert os.listdir() == ["file"]


def test_an_option_at_its_default_contradicts_nothing_and_a_file_may_hold_what_says_nothing(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(experiment, "run_experiment", lambda config, _: started.append(config))
    (tmp_path / "own.toml").write_text('pooling = "cls"\ndrop_audio = 0.5\nmodalities = ["text"]\n')
    lines = ["--pooling mean --drop-audio 0 --modalities text", f"--config {tmp_path}/own.toml"]
    for line in lines:
        assert mtmd_mosi.main([*line.split(), "--out", str(tmp_path / "out")]) == 0
    assert [config.pooling for config in started] == ["mean", "cls"]


# Options that name a path or a device

# What is written to: refused before any work. `file` is a file, so nothing can be below it.
WRITTEN = {
    "--out file/below": "Not a directory: 'file/below'",
    "--out file": "Not a directory: 'file'",
    "ablate --out file/below": "Not a directory: 'file/below'",
    "search --out file/below": "Not a directory: 'file/below'",
    "evaluate c --out file/below": "Not a directory: 'file/below'",
    "predict c x.csv --out file/below.csv": "Not a directory: 'file/below.csv'",
    "predict c x.csv --out .": "Is a directory: '.'",
    "report d --out file/below": "Not a directory: 'file/below'",
    "convert x file/below": "Not a directory: 'file'",
    "export c file/below.pt2": "Not a directory: 'file/below.pt2'",
}
NO_CUDA = "--device: expected a device that is there, got cuda without a CUDA device"
DEVICES = {f"{name} --device cuda": NO_CUDA for name in ("train", "ablate", "search", "evaluate c", "predict c x.csv")}
NO_ENCODER = "--text-encoder: expected a BERT-type model's name or directory, got {}: no such directory"
ENCODERS = {
    f"{line} --text-encoder {name}": NO_ENCODER.format(name)
    for line in ("train", "ablate", "search", "check d", "evaluate c", "predict c x.csv")
    for name in ("./absent", "/absent", "~/absent", "a/b/absent")
}
# What is read: the error names it. `c` is a checkpoint, `d` an experiment.
READ = {
    "--config absent.toml": "No such file or directory: 'absent.toml'",
    "ablate --config absent.toml": "No such file or directory: 'absent.toml'",
    "search --config absent.toml": "No such file or directory: 'absent.toml'",
    "--data absent.pkl": "No such file or directory: 'absent.pkl'",
    "ablate --data absent.pkl --arms full": "No such file or directory: 'absent.pkl'",
    "search --data absent.pkl --trials 1": "No such file or directory: 'absent.pkl'",
    "evaluate absent.safetensors": "absent.safetensors: expected a checkpoint, found no such file",
    "evaluate c --data absent.pkl": "No such file or directory: 'absent.pkl'",
    "predict absent.safetensors --text good": "absent.safetensors: expected a checkpoint, found no such file",
    "predict absent --text good": "absent: expected a checkpoint, found no such file",
    "predict half.json --text good": "half.json: expected a checkpoint, two files, found none called half.safetensors",
    "predict c absent.csv": "No such file or directory: 'absent.csv'",
    "predict c absent.npz": "No such file or directory: 'absent.npz'",
    "predict c absent.pkl": "No such file or directory: 'absent.pkl'",
    "predict c --text-features absent.npy": "No such file or directory: 'absent.npy'",
    "predict c --audio absent.npy": "No such file or directory: 'absent.npy'",
    "predict c --vision absent.npy": "No such file or directory: 'absent.npy'",
    "report absent": "absent: expected the folder of one experiment, got no folder",
    "report d --before absent": "absent: expected the folder of one experiment, got no folder",
    "convert absent.pkl y": "No such file or directory: 'absent.pkl'",
    "check d --config absent.toml": "No such file or directory: 'absent.toml'",
    "check absent.pkl": "No such file or directory: 'absent.pkl'",
    "export absent model.pt2": "absent: expected a checkpoint, found no such file",
}


def test_every_option_that_names_a_path_or_a_device_is_in_the_tables():
    tried = set()
    for line in [*WRITTEN, *DEVICES, *ENCODERS, *READ]:
        name, parsed, _ = cli.parse(line.split(), "")
        tried |= {(name, key) for key, value in vars(parsed).items() if value is not None}
    for name in cli.COMMANDS:
        for action in parser_of(name)._actions:
            is_path = getattr(action.type, "__name__", "") == "a_path"
            if is_path or action.dest in ("device", "text_encoder"):
                assert (name, action.dest) in tried


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("table", [WRITTEN, DEVICES, ENCODERS], ids=["written", "device", "encoder"])
def test_what_is_not_there_or_cannot_be_written_is_told_before_anything_is_read(table, capsys):
    for line, message in table.items():
        assert complaint(capsys, line).endswith(message), line
    assert os.listdir() == ["file"]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake_checkpoint(Path("c"), synthetic_dataset(sizes=(20, 10, 10)))
    Path("half.json").write_text("{}")
    fake_experiment(Config(out=Path("d"), seeds=[1]))
    for line, message in READ.items():
        assert complaint(capsys, line).endswith(message), line


@pytest.mark.usefixtures("nothing_is_read")
def test_a_compiler_that_is_not_there_is_told_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert complaint(capsys, "--compile").startswith("--compile: expected a C++ compiler")


@pytest.mark.usefixtures("nothing_is_read")
def test_a_folder_with_an_experiment_is_refused_before_anything_is_read(capsys):
    Path("out").mkdir()
    Path("out/results.json").write_text("{}")
    assert "--out: expected a folder without an experiment, got out" in complaint(capsys, "--out out")


def test_trying_whether_a_place_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b", folder=True)
    check_writable(tmp_path / "a" / "b.csv")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OSError, match=f"'{tmp_path}/link'"):
        check_writable(tmp_path / "link", folder=True)
    assert os.listdir(tmp_path) == ["link"]


def test_a_program_that_says_something_else_replaces_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake_checkpoint(Path("c"), synthetic_dataset(sizes=(20, 10, 10)))
    Path("model.pt2").write_text("the old one")
    monkeypatch.setattr(export, "export_program", lambda _: None)
    monkeypatch.setattr(torch.export, "save", lambda _program, file, **_: file.write(b"half"))

    class Other:
        def module(self):
            return lambda _: {key: torch.tensor(9.0) for key in ("scores", "logits")}

    monkeypatch.setattr(torch.export, "load", lambda _: Other())
    assert "model.pt2: expected the outputs of the model, got others" in complaint(capsys, "export c model.pt2")
    assert Path("model.pt2").read_text() == "the old one"
    assert sorted(os.listdir()) == ["c.json", "c.safetensors", "model.pt2"]


# What ends while it runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--other-lr", "1e30", "--clip", "0"], "seed 1111, epoch 1"),
        (["--data", "two\nlines.pkl"], "No such file or directory"),
    ],
)
def test_an_error_is_one_line_whatever_it_is_about(arguments, message, tmp_path, capsys):
    assert message in complaint(capsys, shlex.join([*TINY, "--out", str(tmp_path), *arguments]))


def test_a_command_is_imported_when_it_is_chosen(monkeypatch):
    absent = cli.Command("mtmd.no_such_module", "add_arguments", "run", "nothing")
    monkeypatch.setitem(cli.COMMANDS, "absent", absent)
    _, parsed, run = cli.parse(["--epochs", "3"], "")
    assert (parsed.epochs, run) == (3, experiment.run)
    with pytest.raises(ModuleNotFoundError):
        mtmd_mosi.main(["absent"])  # one of ours: no installation would bring it


# What is not installed

# Each is taken away in a process of its own, forked before it or what stands on it was imported.
WITHOUT = """
import os, runpy, sys

def run(script, package, *arguments):
    class Nowhere:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Nowhere())
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

script, cases = sys.argv[1], [line.split() for line in sys.argv[2].splitlines()]
for package, *arguments in cases:
    if package == "momentum_distill":
        import torch  # once for all that follow
    if os.fork() == 0:
        sys.path.insert(0, os.path.dirname(script))
        run(script, package, *arguments)
    os.wait()
"""


def test_a_package_that_is_not_installed_is_one_line_with_what_brings_it(tmp_path):
    cases = {  # in this order: torch is imported for the last ones
        "rich": "--epochs 1",
        "numpy": "--epochs 1",
        "torch": "--epochs 1",
        "momentum_distill": "--epochs 1",
        "safetensors": "--epochs 1",
        "matplotlib": "evaluate absent",
        "transformers": f"--text-encoder {tmp_path}",
        "sklearn": "report absent",
    }
    lines = "\n".join(f"{package} {arguments}" for package, arguments in cases.items())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, mtmd_mosi.__file__, lines], capture_output=True, text=True, cwd=tmp_path
    )
    brings = 'is not installed; pip install "momentum-distill[examples]" brings it'
    assert done.stderr.splitlines() == [f"error: {package} {brings}" for package in cases]
    assert done.stdout == ""


def test_triton_is_asked_for_where_cuda_compiles(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=re.escape('pip install "momentum-distill[triton]" brings it')):
        experiment.check_compiler(torch.device("cuda"))
