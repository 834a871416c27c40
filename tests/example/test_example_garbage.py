"""Spoiled files: each file that the example reads ends in honest data or in one error that names it.

A case is a kind of file and a number, and the same whenever it is made: `spoil("pickle", 17, files)` makes it again.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import json
import lzma
import math
import pickle
import re
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

import mtmd_mosi
from mtmd.data.fold import Dataset, Fold
from mtmd.data.mmsa import from_mmsa, load_mmsa
from mtmd.data.own_format import load_dataset, load_fold, save_dataset
from mtmd.data.synthetic import make_synthetic, synthetic_dataset
from mtmd.files import safe_pickle
from mtmd.files.reading import read_json, read_npy, read_npz, read_table, read_toml
from mtmd.files.writing import file_sha256
from mtmd.results.records import read_epochs
from mtmd.runs.predict import read_csv, read_sequence
from mtmd.runs.states import load_state, save_state
from mtmd.runs.trained import Trained, load_trained
from mtmd.settings.config import Config
from mtmd.settings.options import add_config_arguments, config_from
from mtmd.study import report, search
from mutations import bomb, itself, many_times, one_long_text, spoiled
from study_cases import fake_checkpoint, fake_experiment
from tiers import times

SECONDS = 1.0
SLACK = 2**18  # bytes that reading may take beside twice what the whole file takes: messages, tracebacks
PAGES = 2**24  # and as the system counts, which sees torch's memory too, but roughly
LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Kind:
    """How a file is read, when what comes of it is honest, and which command reads it. Paths are relative."""

    file: str
    read: Callable[[Path], Any]
    honest: Callable[[Any], bool]
    command: str = ""


# What each kind leads to


def is_text(value: object) -> bool:
    return isinstance(value, str) and value.encode() is not None  # a lone surrogate has no bytes


def honest_fold(fold: Fold) -> bool:
    n = len(fold.scores)
    texts = [*fold.ids, *(fold.raw_text or [])]
    return (
        all(is_text(text) for text in texts)
        and len(fold.ids) == n > 0
        and len(fold.raw_text or fold.ids) == n
        and fold.scores.dtype == np.float32
        and bool(np.isfinite(fold.scores).all())
        and (fold.text_bert is None or (fold.text_bert.shape[:2] == (n, 3) and fold.text_bert.min() >= 0))
        and list(fold.features) == list(fold.lengths)
        and all(
            array.ndim == 3
            and array.dtype == np.float32
            and length.shape == (n,)
            and length.dtype == np.int64
            and 0 <= length.min() <= length.max() <= array.shape[1]
            for array, length in zip(fold.features.values(), fold.lengths.values(), strict=True)
        )
    )


def honest_dataset(dataset: Dataset) -> bool:
    low, high = dataset.score_range
    return (
        list(dataset.folds) == ["train", "valid", "test"]
        and all(honest_fold(fold) for fold in dataset.folds.values())
        and all({name: a.shape[2] for name, a in f.features.items()} == dataset.widths for f in dataset.folds.values())
        and all(is_text(text) for text in (dataset.name, *dataset.classes, *dataset.notes))
        and -math.inf < low < 0 < high < math.inf
        and len(dataset.classes) == 3
    )


def honest_config(config: Config) -> bool:
    return Config.from_values(json.loads(json.dumps(config.as_json(), allow_nan=False)), source="") == config


def honest_trained(trained: Trained) -> bool:
    scaling = trained.standardizer
    return (
        honest_config(trained.config)
        and all(bool(torch.isfinite(value).all()) for value in trained.model.state_dict().values())
        and all(value.dtype == torch.float32 for value in trained.model.parameters())
        and all(scaling.mean[name].shape == (width,) for name, width in trained.read_widths.items())
        and all(np.isfinite(mean).all() for mean in scaling.mean.values())
        and all((np.isfinite(std) & (std > 0)).all() for std in scaling.std.values())
        and len(trained.classes) == 3
        and all(is_text(name) for name in (*trained.classes, trained.data_sha256))
    )


def honest_experiment(one: report.Experiment) -> bool:
    """What `report` makes of it is finite where there is something to measure."""
    table = report.write_results([one], Path("table"), resamples=1)
    steps = [record for records in one.steps.values() for record in records]
    return (
        len(table.rows) >= 1
        and bool(np.isfinite(one.test.scores).all() and np.isfinite(one.test.targets).all())
        and math.isclose(one.confusion().sum(), len(one.test.ids))
        and one.error_by_class().shape == (len(one.test.seeds), len(one.class_names))
        and all(map(is_text, [*one.test.ids, one.where]))
        and all(math.isfinite(value) for record in steps for value in record.values())
        and all(
            len({len(arrays[name]) for name in ("features", "initial", "scores", "ids")}) == 1
            and arrays["features"].ndim == arrays["initial"].ndim == 2
            and np.isfinite(arrays["features"]).all()
            for arrays in one.representations.values()
            if arrays is not None
        )
    )


def read_experiment(path: Path) -> report.Experiment:
    return report.Experiment.load(path.parent, "run")


def read_config(path: Path) -> Config:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return config_from(parser.parse_args(["--config", str(path)]))


GRID = {"alpha": (0.2, 0.4), "layers": (1, 2)}


def read_store(path: Path) -> list[dict[str, Any]]:
    console = Console(file=io.StringIO())
    trials = search.open_store(path, search.identity(Config(), GRID, 0), console)
    search.check_trials(trials, list(search.sample(GRID, 0)), path)
    return trials


def honest_store(trials: list[dict[str, Any]]) -> bool:
    points = list(search.sample(GRID, 0))
    ranked = search.rank(trials, points)
    return all(
        search.trial_record(1, trial)["trial"] < 4
        and trial["point"] == points[trial["trial"]]
        and (trial["mae"] is None or math.isfinite(trial["mae"]))
        for trial in ranked
    )


def honest_state(found: Any) -> bool:
    return found is None or (found[0]["model.weight"].tolist() == [1, 2, 3] and found[1] == {"position": [1, 0]})


TRAIN = "train --device cpu --out out"
PREDICT = "predict checkpoint_seed1"
REPORT = "report run --resamples 2"
KINDS = {
    "pickle": Kind("toy.pkl", lambda path: load_mmsa(path, name="toy"), honest_dataset, "convert toy.pkl out"),
    "folder": Kind("own/dataset.json", lambda path: load_dataset(path.parent), honest_dataset, f"{TRAIN} --data own"),
    "archive": Kind("own/train.npz", lambda path: load_dataset(path.parent), honest_dataset, f"{TRAIN} --data own"),
    "utterances": Kind("new.npz", load_fold, honest_fold, f"{PREDICT} new.npz"),
    "table": Kind("new.csv", read_csv, honest_fold, f"{PREDICT} new.csv"),
    "array": Kind(
        "audio.npy",
        lambda path: read_sequence(path, "audio"),
        lambda array: array.ndim == 2 and array.dtype == np.float32 and array.shape[1] > 0,
        f"{PREDICT} --audio audio.npy",
    ),
    "weights": Kind("checkpoint_seed1.safetensors", load_trained, honest_trained, f"{PREDICT} new.npz"),
    "signed weights": Kind("checkpoint_seed1.safetensors", load_trained, honest_trained, f"{PREDICT} new.npz"),
    "checkpoint": Kind("checkpoint_seed1.json", load_trained, honest_trained, f"{PREDICT} new.npz"),
    "settings": Kind("settings.toml", read_config, honest_config, "train --config settings.toml"),
    "results": Kind("run/results.json", read_experiment, honest_experiment, REPORT),
    "predictions": Kind("run/predictions.csv", read_experiment, honest_experiment, REPORT),
    "steps": Kind("run/steps_seed1.csv", read_experiment, honest_experiment, REPORT),
    "representations": Kind("run/representations_seed1.npz", read_experiment, honest_experiment, REPORT),
    "epochs": Kind(
        "run/metrics.jsonl",
        lambda path: read_epochs(path.parent),
        lambda records: all(one["seed"] == seed for seed, some in records.items() for one in some),
        "train --resume --device cpu --out run --seeds 1 2",
    ),
    "trials": Kind(
        "search/trials.jsonl",
        read_store,
        honest_store,
        "search --trials 4 --grid alpha=0.2,0.4 layers=1,2 --out search",
    ),
    # Of a training that goes on what is damaged is told and left out, so that no command ends there.
    "state": Kind("state/state_000000001.json", lambda path: load_state(path.parent, str), honest_state),
    "state tensors": Kind("state/state_000000001.safetensors", lambda path: load_state(path.parent, str), honest_state),
}

CASES = times(60, 300, 10_000) // len(KINDS) + 1  # of each kind
COMMANDS = times(2, 4, 50)  # of these, the first go through the command line too if they cannot be read


# The files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Every file, whole: content by path."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        write_files()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files() -> None:
    content = make_synthetic(seed=1, sizes=(6, 3, 4))
    for fold in content.values():
        tokens = np.zeros((len(fold["id"]), 3, 7), np.float32)
        tokens[:, 0, :3], tokens[:, 1, :3] = (101, 2204, 102), 1
        fold |= {"text_bert": tokens, "id": list(fold["id"])}
    Path("toy.pkl").write_bytes(pickle.dumps(content))
    dataset = from_mmsa(content, name="toy", source="toy")
    save_dataset(dataset, "own")
    np.savez_compressed("new.npz", **{key: content["test"][key] for key in ("text", "audio", "vision", "id")})

    fake_checkpoint(Path("checkpoint_seed1"), dataset)
    np.save("audio.npy", content["test"]["audio"][0])
    Path("new.csv").write_text("id,audio,vision\nfirst,audio.npy,\nsecond,,\nthird,audio.npy,\n")
    Path("settings.toml").write_text(
        'dataset = "synthetic"\nseeds = [1, 2]\nepochs = 3\nalpha = 0.4\nlayers = 1\nmodalities = ["text", "audio"]\n'
        'amp = false\nout = "out"\nwithout = ["queue"]\nbert_lr = 5e-5\n'
    )

    results = fake_experiment(Config(out=Path("run"), seeds=[1, 2]), utterances=12, steps=6)
    results["dataset"]["sha256"] = synthetic_dataset().fingerprint
    Path("run/results.json").write_text(json.dumps(results))
    record = {"seed": 1, "epoch": 1, "seconds": 1.5, "total": 2.5, "valid": {"mae": 1.0, "corr": None}}
    Path("run/metrics.jsonl").write_text(
        "".join(json.dumps(record | {"seed": seed, "epoch": epoch}) + "\n" for seed in (1, 2) for epoch in (1, 2))
    )
    Path("search").mkdir()
    trials = [search.identity(Config(), GRID, 0)]
    for place, point in enumerate(search.sample(GRID, 0)):
        entry = {"seed": 1, "valid": {"mae": 1.0 + place, "corr": 0.5}, "best_epoch": 1, "epochs": 2, "seconds": 1.0}
        outcome = {"runs": [entry], "dataset": {"sha256": "0" * 64}}
        trials.append(search.trial_of(place, point, outcome))
    Path("search/trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    save_state(Path("state"), 1, {"model.weight": torch.tensor([1.0, 2, 3])}, {"position": [1, 0]})


def spoil(name: str, number: int, files: dict[str, bytes]) -> None:
    """Write the case into the working directory."""
    rng = Random(f"{name} {number}")
    path = Path(KINDS[name].file)
    path.write_bytes(spoiled(rng, path.name, files[KINDS[name].file]))
    if name == "signed weights":  # as one would who does it on purpose
        about = path.with_suffix(".json")
        about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": file_sha256(path)}))


def restore(files: dict[str, bytes]) -> None:
    for path, content in files.items():
        if not Path(path).is_file() or Path(path).read_bytes() != content:
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_bytes(content)


class Attempt(NamedTuple):
    """What reading gives, or the error in which it ends, and what it takes."""

    outcome: Any
    seconds: float
    traced: int  # bytes at the peak, of Python and numpy
    resident: int  # the same as the system counts, which sees torch's too; 0 where it does not tell


def attempt(kind: Kind) -> Attempt:
    before = resident("VmRSS") if forget_peak() else None
    tracemalloc.start()
    started = time.process_time()
    try:
        outcome = kind.read(Path(kind.file))
    except Exception as error:
        outcome = error
    seconds = time.process_time() - started
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Attempt(outcome, seconds, traced, 0 if before is None else resident("VmHWM") - before)


def forget_peak() -> bool:
    """Let the system count the largest memory anew; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(name: str) -> int:
    """Bytes of memory that this process has (VmRSS), or had at the most (VmHWM)."""
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return 1024 * int(kib)


def complaints_about_error(error: Exception, path: Path) -> Iterator[str]:
    if not isinstance(error, ValueError | TypeError | OSError) or isinstance(error, UnicodeError):
        yield f"ended in {error!r:.200}"
    if path.name not in str(error) and (path.parent.name or path.name) not in str(error):
        yield f"does not name the file: {type(error).__name__}: {error!s:.200}"
    if len(str(error)) > LONGEST_MESSAGE:
        yield f"says it in {len(str(error))} characters: {error!s:.200}"


def complaints_about_outcome(outcome: Any, kind: Kind) -> Iterator[str]:
    try:
        if not kind.honest(outcome):
            yield f"gave what is not honest: {outcome!r:.200}"
    except Exception as error:
        yield f"gave what cannot be used: {error!r:.200}"


def complaints_about_command(kind: Kind) -> Iterator[str]:
    """The same file through the command line: one line on stderr, and no traceback."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = mtmd_mosi.main(kind.command.split())
    except BaseException as error:
        yield f"`{kind.command}` ended in {error!r:.200}"
    else:
        said = errors.getvalue().removesuffix("\n")
        if code != 2 or "\n" in said or not said.startswith("error: "):
            yield f"`{kind.command}` ended with {code} and {said!r:.200}"


def complaints(kind: Kind, whole: Attempt, size: int, *, through_command: bool) -> list[str]:
    """What is wrong with how the file is read that lies there; `whole` is how the whole one of `size` bytes is."""
    path = Path(kind.file)
    growth = max(1.0, path.stat().st_size / size)
    allowed = 2 * growth * whole.traced + SLACK

    def too_much(took: Attempt) -> bool:
        return took.seconds > SECONDS or took.traced > allowed or took.resident > allowed + PAGES

    took = attempt(kind)
    if too_much(took):  # what a process does once (imports for a message, caches) is not what the file takes
        took = attempt(kind)
    found = []
    if too_much(took):
        found.append(
            f"took {took.seconds:.1f} s, {took.traced} bytes, in pages {took.resident}; {allowed:.0f} are allowed"
        )
    outcome = took.outcome
    if not isinstance(outcome, Exception):
        return [*found, *complaints_about_outcome(outcome, kind)]
    found += complaints_about_error(outcome, path)
    return [*found, *complaints_about_command(kind)] if kind.command and through_command else found


def read_whole(kind: Kind) -> Attempt:
    attempt(kind)  # what it imports is not counted
    whole = attempt(kind)
    assert kind.honest(whole.outcome)
    return whole


@pytest.mark.repeated
@pytest.mark.parametrize("name", KINDS)
def test_a_spoiled_file_ends_in_honest_data_or_in_one_error_that_names_it(name, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    restore(files)
    kind = KINDS[name]
    whole = read_whole(kind)
    found = []
    for number in range(CASES):
        spoil(name, number, files)
        size = len(files[kind.file])
        new = complaints(kind, whole, size, through_command=number < COMMANDS)
        found += [f"spoil({name!r}, {number}, files): {one}" for one in new]
        restore(files)
    assert found == []


def test_a_spoiled_file_is_the_same_whenever_it_is_made(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kind in KINDS.items():
        restore(files)
        made = []
        for number in (0, 1, 0):
            spoil(name, number, files)
            made.append(Path(kind.file).read_bytes())
        assert made[0] == made[2] != made[1]


# What has no end, or takes no effort to write and much to read


def pickled(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = make_synthetic(seed=1, sizes=(6, 3, 4))
    change(content["train"])
    return pickle.dumps(content)


def archived(name: str, header: str) -> bytes:
    """An .npz file with one array, whose header says this of four bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.npy", numpy_file(header))
    return file.getvalue()


def numpy_file(header: str, *, version: bytes = b"\x01\x00", claims: int | None = None) -> bytes:
    size = len(header) if claims is None else claims
    return b"\x93NUMPY" + version + size.to_bytes(2 * version[0], "little") + header.encode() + b"\0\0\0\0"


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}"
WIDE = "{'descr': '<U300000000', 'fortran_order': False, 'shape': (1,)}"
ENDLESS = {
    "lists that hold each other": ("pickle", lambda: pickled(lambda fold: fold.update(audio=many_times()))),
    "a list that holds itself": ("pickle", lambda: pickled(lambda fold: fold.update(audio=itself()))),
    "one long text": ("pickle", lambda: pickled(lambda fold: fold.update(regression_labels=one_long_text()))),
    "an id of many digits": ("pickle", lambda: pickled(lambda fold: fold.update(id=[10**5000] * 6))),
    "half a character": ("pickle", lambda: pickled(lambda fold: fold.update(raw_text=["\ud800"] * 6))),
    "an escape in an id": ("pickle", lambda: pickled(lambda fold: fold.update(id=["\x1b[2J"] * 6))),
    "a bomb": ("archive", lambda: bomb("audio.npy")),
    "a bomb by itself": ("utterances", lambda: bomb("audio.npy")),
    "an array that is not there": ("utterances", lambda: archived("audio", HUGE)),
    "a text of a gigabyte": ("utterances", lambda: archived("id", WIDE)),
    "an array of terabytes": ("array", lambda: numpy_file(HUGE)),
    "texts of gigabytes": ("array", lambda: numpy_file(WIDE)),
    "a header of gigabytes": ("array", lambda: numpy_file(HUGE, version=b"\x02\x00", claims=2**31)),
    "a header of brackets": ("array", lambda: numpy_file("(" * 60_000)),
    "a header for Python 2": ("array", lambda: numpy_file(HUGE.replace("99999999999", "1L"))),
    "a key of many parts": ("settings", lambda: b"alpha" + b".a" * 20_000 + b" = 1"),
    "many keys of many parts": ("settings", lambda: b"\n".join(b"a%d" % n + b".a" * 49 + b" = 1" for n in range(300))),
    "brackets in settings": ("settings", lambda: b"seeds = " + b"[" * 100_000),
    "a number without end": ("settings", lambda: b"epochs = 0x" + b"f" * 100_000),
    "brackets in JSON": ("folder", lambda: b"[" * 100_000),
    "nested results": ("results", lambda: b'{"config":' * 900 + b"1" + b"}" * 900),
    "digits in JSON": ("checkpoint", lambda: b'{"sha256": ' + b"9" * 100_000 + b"}"),
    "a cell without end": ("steps", lambda: b'step,total\n1,"' + b"x" * 10**6),
    "a device": ("table", lambda: b"audio\n/dev/zero\n"),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_what_has_no_end_is_refused_at_once(case, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    restore(files)
    name, make = ENDLESS[case]
    kind = KINDS[name]
    whole = read_whole(kind)
    Path(kind.file).write_bytes(make())
    assert isinstance(attempt(kind).outcome, ValueError)
    assert complaints(kind, whole, len(files[kind.file]), through_command=True) == []


# A checkpoint is built by what its description says


@pytest.fixture
def with_encoder(tmp_path):
    """A checkpoint whose text encoder is a BERT, a small one."""
    dataset = from_mmsa(make_synthetic(seed=1, sizes=(6, 3, 4)), name="toy", source="toy")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    encoder = {"model_type": "bert", "vocab_size": 99, "max_position_embeddings": 50, **sizes}
    fake_checkpoint(tmp_path / "checkpoint", dataset, text_encoder="small-bert", encoder_config=encoder)
    return tmp_path / "checkpoint.json"


def change_description(path: Path, key: str, change: dict[str, Any] | None) -> None:
    about = json.loads(path.read_text())
    about[key] = None if change is None else about[key] | change
    path.write_text(json.dumps(about))


UNFIT = [
    *[("encoder", {name: 10**9}) for name in ("num_hidden_layers", "vocab_size", "hidden_size")],
    *[("encoder", {name: "x"}) for name in ("num_hidden_layers", "vocab_size", "model_type", "hidden_act")],
    *[("encoder", {"model_type": None}), ("encoder", None), ("config", {"text_encoder": "features"})],
    *[("config", {name: 10**9}) for name in ("layers", "width", "heads", "audio_hidden", "vision_hidden")],
    *[("widths", {"audio": 10**12}), ("widths", {"audio": 0}), ("widths", {"smell": 3})],
]


def test_a_model_that_the_weights_do_not_fit_is_not_built(with_encoder, subtests):
    kind = Kind(str(with_encoder), load_trained, honest_trained)
    whole = read_whole(kind)
    description = with_encoder.read_text()
    for key, change in UNFIT:
        with subtests.test(key=key, change=change):
            with_encoder.write_text(description)
            change_description(with_encoder, key, change)
            assert isinstance(attempt(kind).outcome, ValueError)
            assert complaints(kind, whole, len(description), through_command=False) == []


def test_a_description_makes_transformers_fetch_nothing(with_encoder, monkeypatch):
    """These settings name code that transformers would look for in a hub."""
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr("socket.getaddrinfo", lambda *arguments, **_: asked.append(arguments) or [])
    code = {"AutoConfig": "someone/model--code.Config", "AutoModel": "someone/model--code.Model"}
    hub = "kernels-community/flash-attn"
    fetched = {"auto_map": code, "attn_implementation": hub, "_attn_implementation": hub, "num_labels": 10**9}
    change_description(with_encoder, "encoder", fetched)
    assert honest_trained(load_trained(with_encoder))
    change_description(with_encoder, "encoder", None)
    with pytest.raises(ValueError, match="text_encoder is 'small-bert', encoder is None"):
        load_trained(with_encoder)
    assert asked == []


# What else a file may be

OTHERS = {
    "zeros": (bytes(1000), "zeros"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "Git LFS .* `git lfs pull`",
    ),
    "a page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
    "a page in capitals": (b"<HTML><HEAD>", "a web page"),
    "gzip": (gzip.compress(b"content"), "a gzip file; unpack it first"),
    "half of a gzip": (gzip.compress(b"content")[:12], "a gzip file"),
    "bzip2": (bz2.compress(b"content"), "a bzip2 file"),
    "xz": (lzma.compress(b"content"), "an xz file"),
    "zip": (b"PK\x03\x04\x14\0\0\0\x08\0", r"a zip archive, as .*\.xlsx"),
    "numpy": (b"\x93NUMPY\x01\x00v\x00{'descr'", r"an array of numpy\.save"),
    "pickle": (pickle.dumps({"train": 1}, 2), "a pickle"),
    "UTF-16": ("id,text\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
    "nothing": (b"", "an empty file"),
    "CSV": (b"id,text\n1,good\n", "a text"),
    "JSON": (b'{"a": 1}', "a text"),
    "a sentence": (b"404: Not Found", "a text"),
}
READERS = {
    # what it reads, what it expects, what it takes for its own
    "pickle": (safe_pickle.load, "a pickle", {"pickle"}),
    "npz": (read_npz, r"a file of numpy\.savez", {"zip", "CSV", "JSON", "a sentence"}),
    "npy": (read_npy, r"a file of numpy\.save", {"numpy", "CSV", "JSON", "a sentence"}),
    "csv": (read_table, "a CSV file in UTF-8", {"CSV", "JSON", "a sentence", "nothing"}),
    "json": (read_json, "a JSON file", {"CSV", "JSON", "a sentence"}),
    "toml": (read_toml, "a TOML file", {"CSV", "JSON", "a sentence", "nothing"}),
}


def test_the_first_bytes_tell_what_a_file_is(tmp_path):
    for ending, (read, expected, own) in READERS.items():
        path = tmp_path / f"file.{ending}"
        for name, (content, kind) in OTHERS.items():
            path.write_bytes(content)
            if name not in own:
                with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: expected {expected}, got .*{kind}"):
                    read(path)


def test_a_file_of_another_kind_is_named_by_the_command(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, kind = OTHERS["a pointer"]
    for name in ("pickle", "folder", "archive", "utterances", "table", "array"):
        restore(files)
        Path(KINDS[name].file).write_bytes(content)
        assert mtmd_mosi.main(KINDS[name].command.split()) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(rf"{KINDS[name].file}: expected a .*, got a {kind}", said), said


def test_a_pickle_names_the_key_that_cannot_be_read(tmp_path):
    path = tmp_path / "file.pkl"
    for protocol in range(6):
        fold = {"id": ["a", "b"], "audio": np.zeros((2, 3, 4)), "raw_text": np.array(["x", None], dtype=object)}
        for content in ({"train": fold}, {"test": {"id": ["c"]}, "train": fold | {"vision": 1}}):
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(
                safe_pickle.UnsafePickleError, match=r"file\.pkl: train: raw_text: holds a numpy array of"
            ):
                safe_pickle.load(path)


def test_a_pickle_of_python_2_is_called_one(tmp_path):
    path = tmp_path / "file.pkl"
    for content in (
        b"(dp0\nS'train'\np1\n(dp2\nS'id'\np3\n(lp4\nS'a'\np5\nass.",
        b"\x80\x02}q\x00U\x05trainq\x01}q\x02U\x02idq\x03]q\x04U\x01aq\x05ass.",
    ):
        path.write_bytes(content)
        with pytest.raises(safe_pickle.UnsafePickleError, match=r"file\.pkl: written by Python 2 .* encoding='latin1'"):
            safe_pickle.load(path)


def test_a_damaged_pickle_shows_nothing_of_the_reader(tmp_path):
    content = pickle.dumps({"train": {"id": ["a", "b"], "audio": np.zeros((2, 3, 4))}})
    path = tmp_path / "file.pkl"
    for spoiled_content in (content[:60] + bytes(200), content[:100], content.replace(b"id", b"\xff\xfe"), bytes(8)):
        path.write_bytes(spoiled_content)
        with pytest.raises(
            safe_pickle.DamagedPickleError, match=r"file\.pkl: truncated, damaged, or not a pickle of"
        ) as e:
            safe_pickle.load(path)
        assert "Error" not in str(e.value)
