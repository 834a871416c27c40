"""Every layout of a file through every command: what `check` says of it is what `train` and the others do."""

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import mtmd_mosi
from conftest import ROOT

UNCASED = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
UNCASED |= {"##s": 2015, "good": 2204, "movie": 3185}
OTHER = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "good": 5, "##s": 6, "movie": 7}
TINY = ["--epochs", 1, "--batch-size", 256, "--layers", 1, "--heads", 2, "--device", "cpu"]
TINY += ["--width", 4, "--fused-width", 4, "--audio-hidden", 4, "--vision-hidden", 4, "--seeds", 1]


def write_encoder(folder: Path, *, words: int, vocabulary: dict[str, int] = UNCASED, **settings: int) -> Path:
    """A tiny random BERT of that many words; its tokenizer knows those that are named, at their places."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    lines = [f"[unused{number}]" for number in range(words)]
    for word, number in vocabulary.items():
        lines[number] = word
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    config = transformers.BertConfig(**({"vocab_size": words, "max_position_embeddings": 60} | sizes | settings))
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def process(*arguments: object) -> tuple[int, str, str]:
    """A command as a user gives it: exit code, stdout, stderr."""
    command = [sys.executable, str(ROOT / "examples" / "mtmd_mosi.py"), *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(capsys, monkeypatch):
    """A command in this process, without its figures."""
    monkeypatch.setenv("COLUMNS", "1000")
    for figure in ("plot_losses", "plot_factors"):
        monkeypatch.setattr(f"mtmd.runs.experiment.{figure}", lambda *_, **__: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = mtmd_mosi.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


# The real file


def test_real_mosi_is_trained_and_evaluated_as_the_readme_says(mosi_path, tmp_path, run):
    encoder = write_encoder(tmp_path / "bert", words=30522)
    code, _, error = process("train", "--data", mosi_path, "--text-encoder", encoder, *TINY, "--out", tmp_path / "run")
    assert (code, error) == (0, "")
    for command in (
        ["evaluate", tmp_path / "run" / "checkpoint_seed1", "--data", mosi_path],
        ["check", mosi_path, "--text-encoder", encoder, "--config", ROOT / "examples" / "configs" / "mosi.toml"],
    ):
        code, _, error = run(*command)
        assert (code, error) == (0, ""), command
    assert run("check", mosi_path)[1].endswith("can be trained on with --text-encoder MODEL (a BERT-type one)\n")


@pytest.mark.long
def test_real_mosi_is_evaluated_without_being_named_again(mosi_path, tmp_path, run):
    encoder = write_encoder(tmp_path / "bert", words=30522)
    options = ["--data", mosi_path, "--text-encoder", encoder, *TINY]
    settings = ["--config", ROOT / "examples" / "configs" / "mosi.toml"]
    for command in (
        ["train", *options, *settings, "--out", tmp_path / "run"],
        ["evaluate", tmp_path / "run" / "checkpoint_seed1"],
    ):
        code, _, error = run(*command)
        assert (code, error) == (0, ""), command


# Layouts


class Cell(NamedTuple):
    texts: tuple[str, ...]
    others: tuple[str, ...]
    kind: str  # pickle or folder
    layout: str  # mosi, mosei or sims
    encoder: str  # features, uncased or other
    asked: str  # "all" as is the default, or "there": what the file has

    @property
    def there(self) -> list[str]:
        return ["text", *self.others]


AXES = (
    [texts for size in (1, 2, 3) for texts in itertools.combinations(("text", "text_bert", "raw_text"), size)],
    [("audio", "vision"), ("audio",), ("vision",), ()],
    ["pickle", "folder"],
    ["mosi", "mosei", "sims"],
    ["features", "uncased", "other"],
    ["there", "all"],
)
COMMANDS = ("convert", "evaluate", "predict", "ablate", "search", "advice")  # beside check and train

# Of each pair of texts and other modalities a cell, and of the other axes each value with each of both.
SOME = [
    Cell(texts, others, *(axis[(3 * row + column + place) % len(axis)] for place, axis in enumerate(AXES[2:])))
    for row, texts in enumerate(AXES[0])
    for column, others in enumerate(AXES[1])
]
# A fifth of all, in which any two values of two axes meet: 5 divides the size of no axis.
FIFTH = list(itertools.starmap(Cell, itertools.product(*AXES)))[::5]


def unreadable(cell: Cell) -> str:
    """The first modality that training lacks; empty where it works. From the documentation, not from the code."""
    reads = {"features": {"text"}, "uncased": {"text_bert", "raw_text"}, "other": {"raw_text"}}
    if not reads[cell.encoder] & set(cell.texts):
        return "text"
    missing = [name for name in ("audio", "vision") if name not in cell.others]
    return missing[0] if cell.asked == "all" and missing else ""


def make_fold(name: str, n: int, cell: Cell) -> dict[str, Any]:
    rng = np.random.default_rng(n)
    scores = rng.uniform(-1, 1, size=n)
    fold: dict[str, Any] = {"id": [f"{name}{row}$_$0" for row in range(n)], "regression_labels": scores}
    tokens = np.zeros((n, 3, 5))
    tokens[:, 0, :3], tokens[:, 1, :3] = (101, 2204, 102), 1
    texts = {"text": rng.normal(size=(n, 5, 3)), "text_bert": tokens, "raw_text": ["good movies"] * n}
    fold |= {key: texts[key] for key in cell.texts}
    fold |= {key: rng.normal(size=(n, 4, 2)) for key in cell.others}
    if cell.layout == "mosei":
        return fold  # aligned
    fold |= {f"{key}_lengths": [4] * n for key in cell.others}
    if cell.layout == "sims":
        fold |= {f"regression_labels_{one}": scores for one in "TAV"}
    return fold


def write_data(path: Path, cell: Cell) -> Path:
    sizes = {"train": 12, "valid": 6, "test": 5}
    content = {name: make_fold(name, n, cell) for name, n in sizes.items()}
    if cell.kind == "pickle":
        path.write_bytes(pickle.dumps(content))
        return path
    path.mkdir()
    for name, fold in content.items():
        np.savez(path / f"{name}.npz", **{key: np.array(value) for key, value in fold.items()})
    widths = {key: content["train"][key].shape[2] for key in ("text", "audio", "vision") if key in content["train"]}
    about = {"format": "mtmd dataset", "version": 1, "name": cell.layout, "score_range": [-1, 1], "folds": sizes}
    (path / "dataset.json").write_text(json.dumps(about | {"texts": cell.texts, "widths": widths}))
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "features": "features",
        "uncased": write_encoder(folder / "uncased", words=3200),
        "other": write_encoder(folder / "other", words=9, vocabulary=OTHER),
    }


def complaints(cell: Cell, folder: Path, encoders: dict[str, Any], commands: tuple[str, ...], run: Any) -> list[str]:
    """What differs between what the commands do with a cell and what they should."""
    folder.mkdir()
    data = write_data(folder / "data", cell)
    settings = ["--text-encoder", encoders[cell.encoder]]
    settings += ["--modalities", *cell.there] if cell.asked == "there" else []
    options = ["--data", data, "--dataset", cell.layout, *settings, *TINY]
    lacks, found = unreadable(cell), []

    def expect(command: str, *arguments: object, fails: str = "") -> str:
        """The line that says what became of it; `fails` is the modality that an error has to name, if there is one."""
        code, printed, error = run(command, *arguments)
        wanted = (1 if command == "check" else 2) if fails else 0
        line = (printed if command == "check" or not fails else error).strip().splitlines()[-1:]
        text = " ".join(printed.split()) if command == "check" else error
        if code != wanted or (fails and f"{fails}{'' if command == 'check' else ':'}" not in text):
            found.append(f"{command} ended with {code}: {printed[-300:]} {error}")
        return "".join(line)

    verdict = expect("check", data, *settings, fails=lacks)
    said = expect("train", *options, "--out", folder / "run", fails=lacks)
    if lacks and not said.startswith(f"error: {data}: {lacks}: expected "):
        found.append(f"train said {said}")
    if f"can{'not' if lacks else ''} be trained on with these settings" not in verdict:
        found.append(f"check said {verdict}")
    if "convert" in commands and cell.kind == "pickle":
        expect("convert", data, folder / "converted")
        expect("check", folder / "converted", *settings, fails=lacks)
    checkpoint = folder / "run" / "checkpoint_seed1"
    if not lacks and "evaluate" in commands:
        expect("evaluate", checkpoint)
        expect("evaluate", checkpoint, "--data", data)
    if not lacks and "predict" in commands:
        expect("predict", checkpoint, data, "--out", folder / "predicted.csv")
    if "ablate" in commands:
        expect("ablate", "--arms", "full", *options, "--resamples", 1, "--out", folder / "ablation", fails=lacks)
    if "search" in commands:
        grid = ["--grid", "alpha=0.4", "--trials", 1]
        expect("search", *grid, *options, "--out", folder / "search", fails=lacks)
    # What else the data need is told, with these settings and without any; so trained it works.
    for number, line in enumerate((said, expect("check", data)) if "advice" in commands else ()):
        text = line.partition(" be trained on with ")[2]
        given = re.sub(r"MODEL \(one with.*\)", str(encoders["uncased"]), text)
        given = re.sub(r"MODEL \(a BERT.*\)", str(encoders["other" if number else "uncased"]), given)
        added = [*(settings if number == 0 else []), *given.split()]
        expect("train", "--data", data, *TINY, *added, "--out", folder / f"advised{number}")
    return [f"{cell}: {complaint}" for complaint in found]


def test_commands_agree_on_some_layouts(tmp_path, encoders, run):
    found = []
    for number, cell in enumerate(SOME):
        commands = (COMMANDS[number % len(COMMANDS)],)
        found += complaints(cell, tmp_path / str(number), encoders, commands, run)
    assert found == []
    for axis, values in enumerate(AXES):
        assert {cell[axis] for cell in SOME if not unreadable(cell)} == set(values), "each value once where it works"


@pytest.mark.long
def test_commands_agree_on_a_fifth_of_all_layouts(tmp_path, encoders, run):
    found = []
    for number, cell in enumerate(FIFTH):
        commands = (COMMANDS[number % len(COMMANDS)],)
        found += complaints(cell, tmp_path / str(number), encoders, commands, run)
    assert found == []


def test_in_a_fifth_of_all_layouts_any_two_values_of_two_axes_meet():
    for one, two in itertools.combinations(range(len(AXES)), 2):
        assert {(cell[one], cell[two]) for cell in FIFTH} == set(itertools.product(AXES[one], AXES[two]))


@pytest.mark.long
@pytest.mark.parametrize("encoder", ["uncased", "features"])
def test_commands_agree_as_processes(tmp_path, encoders, encoder):
    cell = Cell(("raw_text",), ("audio",), "pickle", "mosi", encoder, "there")
    assert complaints(cell, tmp_path / "cell", encoders, COMMANDS, process) == []


# What the keys hold


def both(run: Any, data: Path, *settings: object, out: Path) -> str:
    """The error in which training ends, which has to be what `check` finds."""
    code, printed, error = run("train", "--data", data, *settings, *TINY, "--out", out)
    assert (code, error.startswith("error: ")) == (2, True), error
    said = error.removeprefix("error: ").strip()
    code, printed, _ = run("check", data, *settings)
    assert code == 1
    assert said.rpartition(": ")[2] in " ".join(printed.split())
    return said


def test_tokens_that_the_encoder_does_not_know_are_named_before_training(tmp_path, encoders, run):
    encoder = encoders["uncased"]
    cell = Cell(("text_bert",), ("audio", "vision"), "pickle", "mosi", "uncased", "all")
    whole = write_data(tmp_path / "whole.pkl", cell)
    settings = ["--text-encoder", encoder]
    assert run("train", "--data", whole, *settings, *TINY, "--out", tmp_path / "run")[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint_seed1"
    ones = np.ones((5, 70))
    for change, expected in {
        (0, 1, 1): f"expected token ids below 3200, which {encoder} knows, got 3200 in row 1",
        (2, 3, 0): f"expected segment ids below 2, which {encoder} knows, got 3200 in row 3",
        "long": f"expected at most 60 tokens, as {encoder} reads, got 70 in row 0",
        "exchanged": "expected token ids, attention mask, segment ids, in this order; got a mask that begins with 0 "
        "and segments that begin with 1, as if exchanged",
    }.items():
        content = pickle.loads(whole.read_bytes())
        tokens = content["test"]["text_bert"]
        if change == "long":
            content["test"]["text_bert"] = np.stack([ones * 101, ones, ones * 0], axis=1)
        elif change == "exchanged":
            content["test"]["text_bert"] = tokens[:, [0, 2, 1]]
        else:
            part, row, place = change
            tokens[row, part, place] = 3200
        data = tmp_path / "data.pkl"
        data.write_bytes(pickle.dumps(content))
        message = f"{data}: test: text_bert: {expected}"
        assert both(run, data, *settings, out=tmp_path / "not") == message
        for command in ("evaluate", "predict"):
            code, _, error = run(command, checkpoint, *(["--data"] if command == "evaluate" else []), data)
            assert code == 2
            assert error.startswith(f"error: {data}: ")
            assert error.endswith(f"text_bert: {expected}\n")
    # What stands behind the last token that is attended to is never looked up.
    content = pickle.loads(whole.read_bytes())
    content["train"]["text_bert"][:, 0, 4] = 9999
    data.write_bytes(pickle.dumps(content))
    assert run("check", data, *settings)[0] == 0
    assert run("train", "--data", data, *settings, *TINY, "--out", tmp_path / "behind")[0] == 0
    said = both(run, data, *settings, "--max-tokens", 61, out=tmp_path / "not")
    assert said == f"max_tokens: expected at most 60, the positions of {encoder}, got 61"


def test_a_modality_that_every_training_sample_lacks_is_an_error(tmp_path, encoders, run):
    cell = Cell(("text", "text_bert", "raw_text"), ("audio", "vision"), "pickle", "mosi", "features", "all")
    whole = write_data(tmp_path / "whole.pkl", cell)
    data = tmp_path / "data.pkl"
    for key, nothing, encoder, name in (
        ("vision_lengths", [0] * 12, "features", "vision"),
        ("text_lengths", [0] * 12, "features", "text"),
        ("text_bert", np.zeros((12, 3, 5)), "uncased", "text"),
        ("raw_text", [" "] * 12, "other", "text"),
    ):
        content = pickle.loads(whole.read_bytes())
        content["train"][key] = nothing
        data.write_bytes(pickle.dumps(content))
        settings = ["--text-encoder", encoders[encoder]]
        said = both(run, data, *settings, out=tmp_path / "not")
        form = key.removesuffix("_lengths")
        assert said.startswith(f"{data}: {name}: expected samples that have it, got {form} in which it is missing")
    content = pickle.loads(whole.read_bytes())
    content["test"]["vision_lengths"] = [0] * 5  # of the other folds this may be
    data.write_bytes(pickle.dumps(content))
    assert run("train", "--data", data, *TINY, "--out", tmp_path / "run")[0] == 0


def test_predict_reads_one_clip_and_one_fold(tmp_path, encoders, run):
    cell = Cell(("text", "text_bert", "raw_text"), ("audio", "vision"), "pickle", "mosi", "features", "all")
    data = write_data(tmp_path / "data.pkl", cell)
    content = pickle.loads(data.read_bytes())
    for name, encoder in (("features", "features"), ("tokens", encoders["uncased"])):
        settings = ["--text-encoder", encoder]
        assert run("train", "--data", data, *settings, *TINY, "--out", tmp_path / name)[0] == 0
        checkpoint = tmp_path / name / "checkpoint_seed1"

        def predicted(source, *options, checkpoint=checkpoint):
            code, _, error = run("predict", checkpoint, source, *options, "--out", tmp_path / "out.csv")
            assert (code, error) == (0, "")
            rows = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
            return [[one, float(score)] for one, score, *_ in rows[1:]]

        expected = predicted(data)
        assert len(expected) == 5
        fold = content["test"]
        for label in ([np.nan] * 5, ["unknown"] * 5, None):  # labels are not read
            fold["regression_labels"] = label
            for number, part in enumerate(({"test": fold}, fold)):
                path = tmp_path / f"fold{number}.pkl"
                path.write_bytes(pickle.dumps(part))
                assert predicted(path) == expected
        clip = {key: value[2] for key, value in fold.items() if key != "regression_labels"}
        (tmp_path / "clip.pkl").write_bytes(pickle.dumps(clip))
        np.savez(tmp_path / "clip.npz", **clip)
        for path in (tmp_path / "clip.pkl", tmp_path / "clip.npz"):
            ((one, score),) = predicted(path)
            assert one == expected[2][0]
            assert score == pytest.approx(expected[2][1], abs=1e-6)
    code, _, error = run("predict", checkpoint, tmp_path / "fold0.pkl", "--fold", "valid")
    assert (code, error) == (2, f"error: {tmp_path / 'fold0.pkl'}: expected the fold 'valid', there is: test\n")
