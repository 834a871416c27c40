"""Data of your own: a folder with one JSON file and a compressed numpy file for each fold.

    my_data/
        dataset.json    name, range of the scores, names of the classes, forms of the text, widths, sizes
        train.npz       the keys of MMSA's files: id, regression_labels, raw_text, audio, audio_lengths, ...
        valid.npz
        test.npz

    dataset = from_mmsa(content, name="mine", source="my content")  # checks what you have; see data.py
    save_dataset(dataset, "my_data")
    dataset = load_dataset("my_data")

Nothing in such a folder can run code when it is read: JSON, and arrays without Python objects. The same page with more
words is docs/your_data.md. Two commands belong to it: `convert` makes such a folder of an MMSA pickle, `check` counts
and names what is odd about either.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmd import safe_pickle
from mtmd.checkpoint import check_writable
from mtmd.cli import note
from mtmd.config import Config, a_number, a_path, add_config_arguments, config_from
from mtmd.data import (
    CLASSES,
    FOLDS,
    FORMS,
    KEYS,
    MODALITIES,
    UNIMODAL_LABELS,
    DataError,
    Dataset,
    Fold,
    class_labels,
    examine_mmsa,
    from_mmsa,
    key_names,
    load_mmsa,
    read_fold,
)
from mtmd.files import is_number, is_plain, read_json, read_npz, shown
from mtmd.model import used_modalities
from mtmd.needs import TextReader, advice, as_read, check_encoder, keys_of, lack, text_reader

__all__ = ["load_dataset", "load_fold", "open_dataset", "save_dataset"]

ABOUT = "dataset.json"
FORMAT, VERSION = "mtmd dataset", 1
TEXT_FORMS = ("raw_text", "text_bert", "text")
SETTINGS = ("modalities", "text_encoder", "max_tokens", "without")  # on which it depends what a model needs


# Reading


def open_dataset(path: str | os.PathLike[str], *, name: str) -> Dataset:
    """Read what `--data` names: an MMSA pickle, or a folder as above.

    Args:
        path: The file or the folder.
        name: What to call the data of a pickle; a folder has its name inside.

    Raises:
        DataError: If the data is not what it should be.
        safe_pickle.UnsafePickleError: If a pickle holds more than plain data, or is damaged.
        OSError: If it cannot be read.
    """
    return load_dataset(path) if Path(path).is_dir() else load_mmsa(path, name=name)


def load_dataset(folder: str | os.PathLike[str]) -> Dataset:
    """Read a folder that `save_dataset` wrote, or that was made by hand in the same way.

    Args:
        folder: Holds dataset.json and an .npz file for each fold.

    Raises:
        DataError: If something is missing, of a wrong shape or kind, or not what dataset.json says.
        OSError: If a file cannot be read.
    """
    folder = Path(folder)
    about = _read_about(folder)
    content = {fold: _read_arrays(folder / f"{fold}.npz") for fold in FOLDS}
    dataset = from_mmsa(
        content,
        name=about["name"],
        source=str(folder),
        synthetic=about["synthetic"],
        score_range=about["score_range"],
        classes=about["classes"],
    )
    for error in _contradictions(about, content, dataset.folds):
        raise DataError(f"{folder}: {error}")
    return dataset


def load_fold(path: str | os.PathLike[str], fold: str = "test") -> Fold:
    """Read utterances to predict from: any of the keys may be missing. Labels are not read, scores are 0.

    Args:
        path: An .npz file or a pickle with a fold in it, or with a single utterance as it is; a pickle of several
            folds; or a folder as above.
        fold: Which of several folds. The others need not be there.

    Raises:
        DataError: As `load_dataset`.
        safe_pickle.UnsafePickleError: If a pickle holds more than plain data, or is damaged.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        _read_about(path)
        path = path / f"{fold}.npz"
    content = _read_arrays(path) if path.suffix.lower() == ".npz" else safe_pickle.load(path)
    if not isinstance(content, Mapping) or not set(content) & set(FOLDS):
        return read_fold(content, source=str(path))
    if fold not in content:
        raise DataError(f"{path}: expected the fold {fold!r}, there is: {key_names(content)}")
    return read_fold(content[fold], source=f"{path}: {fold}")


def _read_about(folder: Path) -> dict[str, Any]:
    """dataset.json, checked."""
    path = folder / ABOUT
    if not path.is_file():
        raise DataError(f"{folder}: expected a folder with {ABOUT}, found none in it")
    try:
        about = read_json(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        got = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise DataError(f"{path}: format: expected {FORMAT!r}, got {shown(got)}")
    if about.get("version") != VERSION:
        raise DataError(f"{path}: version: expected {VERSION}, got {shown(about.get('version'))}")
    about = {"synthetic": False, "classes": list(CLASSES), **about}

    def expect(key: str, what: str, fits: bool) -> None:
        if not fits:
            raise DataError(f"{path}: {key}: expected {what}, got {shown(about.get(key))}")

    def is_list(key: str, fits: Callable[[object], bool]) -> bool:
        return isinstance(about.get(key), list) and all(fits(one) for one in about[key])

    def is_table(key: str, names: tuple[str, ...]) -> bool:
        table = about.get(key)
        return isinstance(table, dict) and set(table) <= set(names) and all(type(n) is int for n in table.values())

    name, scores = about.get("name"), about.get("score_range")
    expect("name", "a name", is_plain(name) and name.strip() != "")
    expect("synthetic", "true or false", isinstance(about["synthetic"], bool))
    expect(
        "score_range",
        "two numbers, one below 0 and one above, for the sign of a score is its class",
        is_list("score_range", is_number) and len(scores) == 2 and scores[0] < 0 < scores[1],
    )
    three = is_list("classes", is_plain) and len(about["classes"]) == 3
    expect("classes", "three names, from low to high scores", three)
    expect(
        "texts",
        f"a list of some of {', '.join(TEXT_FORMS)}",
        is_list("texts", is_plain) and set(about["texts"]) <= set(TEXT_FORMS),
    )
    expect("widths", f"a width for some of {', '.join(MODALITIES)}", is_table("widths", MODALITIES))
    sizes = about.get("folds")
    expect("folds", f"a number of samples for {', '.join(FOLDS)}", is_table("folds", FOLDS) and len(sizes) == 3)
    return {**about, "score_range": (float(scores[0]), float(scores[1])), "classes": tuple(about["classes"])}


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    try:
        return read_npz(path)
    except ValueError as error:
        raise DataError(str(error)) from None


def _contradictions(about: dict[str, Any], content: Mapping[str, Any], folds: Mapping[str, Fold]) -> list[str]:
    """What dataset.json says otherwise than the arrays. What could not be read of these is told elsewhere."""
    errors = []
    for name, fold in folds.items():
        if about["folds"][name] != len(fold):
            errors.append(f"{name}: expected {about['folds'][name]} samples as {ABOUT} says, got {len(fold)}")
    if "train" not in folds:
        return errors
    widths = {key: array.shape[2] for key, array in folds["train"].features.items()}
    expected = {key: width for key, width in about["widths"].items() if key in widths or key not in content["train"]}
    if widths != expected:
        errors.append(f"train: expected the feature widths {shown(expected)} of {ABOUT}, got {widths}")
    texts = [form for form in TEXT_FORMS if form in content["train"]]
    if set(texts) != set(about["texts"]):
        errors.append(f"train: expected texts as {', '.join(about['texts'])} ({ABOUT}), got {', '.join(texts)}")
    return errors


# Writing


def save_dataset(dataset: Dataset, folder: str | os.PathLike[str]) -> None:
    """Write the dataset; the folder appears when all of it is written, or not at all.

    Args:
        dataset: From `from_mmsa`, `load_mmsa` or `synthetic_dataset`.
        folder: A new or empty folder.

    Raises:
        ValueError: If the folder has something in it, or a text cannot be stored.
        OSError: If it cannot be written.
    """
    folder = check_new(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
    partial.mkdir(parents=True)
    try:
        for name, fold in dataset.folds.items():
            np.savez_compressed(partial / f"{name}.npz", **_arrays(fold))
        about = {
            "format": FORMAT,
            "version": VERSION,
            "name": dataset.name,
            "synthetic": dataset.synthetic,
            "score_range": list(dataset.score_range),
            "classes": list(dataset.classes),
            "texts": [form for form in TEXT_FORMS if form in dataset.folds["train"].filled],
            "widths": dataset.widths,
            "folds": {name: len(fold) for name, fold in dataset.folds.items()},
        }
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (partial / ABOUT).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_new(folder: str | os.PathLike[str]) -> Path:
    """The folder, absolute, if there is none yet or an empty one.

    Raises:
        ValueError: If it has something in it.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one that holds something")
    return folder


def _arrays(fold: Fold) -> dict[str, np.ndarray]:
    arrays = {"id": _string_array("id", fold.ids), "regression_labels": fold.scores}
    arrays |= {UNIMODAL_LABELS[name]: scores for name, scores in fold.unimodal_scores.items()}
    if fold.raw_text is not None:
        arrays["raw_text"] = _string_array("raw_text", fold.raw_text)
    if fold.text_bert is not None:
        arrays["text_bert"] = fold.text_bert.astype(np.int32)
    for name, array in fold.features.items():
        arrays |= {name: array, f"{name}_lengths": fold.lengths[name]}
    return arrays


def _string_array(key: str, strings: list[str]) -> np.ndarray:
    array = np.array(strings, dtype=np.str_)
    if array.tolist() != strings:
        raise DataError(f"{key}: expected strings that numpy can hold, got one with a zero character at its end")
    return array


# The commands


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("source", type=a_path, metavar="FILE", help="pickle in the layout of MMSA, aligned or unaligned")
    data.add_argument("--name", default=None, help="what to call the data (default: the name of the file)")
    data.add_argument(
        "--score-range",
        type=a_number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=None,
        help="between which the scores lie (default: -1 1 for CH-SIMS, -3 3 for anything else)",
    )
    parser.add_argument_group("output").add_argument(
        "target", type=a_path, metavar="FOLDER", help="new folder for dataset.json and the .npz files"
    )


def run_convert(arguments: argparse.Namespace, console: Console) -> None:
    """An MMSA pickle becomes a folder; what is odd about it is told."""
    name = arguments.name or arguments.source.stem
    score_range = None if arguments.score_range is None else tuple(arguments.score_range)
    if score_range is not None and not -np.inf < score_range[0] < 0 < score_range[1] < np.inf:
        raise ValueError(f"--score-range: expected a number below 0 and one above, got {score_range}")
    check_new(arguments.target)
    check_writable(arguments.target.parent, folder=True)
    dataset = load_mmsa(arguments.source, name=name, score_range=score_range)
    save_dataset(dataset, arguments.target)
    console.print(_overview(dataset.folds, title=f"{dataset.name}, scores in {_interval(dataset.score_range)}"))
    for text in dataset.notes:
        note(console, text)
    console.print(f"Written: {arguments.target.resolve()}", markup=False, highlight=False, soft_wrap=True)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=a_path, metavar="FILE_OR_FOLDER", help="MMSA pickle, or own format")
    add_config_arguments(parser, only=("dataset", *SETTINGS))


def run_check(arguments: argparse.Namespace, console: Console) -> int:
    """Tell everything that is odd about the data. Returns 1 if it cannot be trained on, else 0.

    With settings it is about a training with these, else about whether there are any with which it can be trained on.
    """
    source = arguments.source
    given = {"config", *SETTINGS} & set(vars(arguments))
    config = config_from(argparse.Namespace(**vars(arguments), data=source))
    check_encoder(config)
    folds, errors, notes = examine(source, name=config.dataset or "", config=config if given else None)
    options = ""
    if not errors and not given:
        there, reader = keys_of(folds["train"]), TextReader("features")
        fault = lack(config.modalities, there, reader)
        options = advice(config.modalities, there, reader) if fault else ""
        errors += [fault] if fault and not options else []
    if folds:
        console.print(_overview(folds, title=str(source)))
    if errors or notes:
        table = Table(title="What is odd", title_justify="left")
        table.add_column("")
        table.add_column("where", no_wrap=True)
        table.add_column("what")
        for kind, style, findings in (("error", "red", errors), ("note", "yellow", notes)):
            for finding in findings:
                where, what = _where_and_what(finding.removeprefix(f"{source}: "))
                table.add_row(f"[{style}]{kind}[/]", escape(where), escape(what))
        console.print(table)
    verdict = "cannot be trained on" if errors else "can be trained on"
    verdict += (" with these settings" if given else "") + (f" with {options}" if options else "")
    console.print(f"{len(errors)} errors, {len(notes)} notes: {verdict}", markup=False, highlight=False, soft_wrap=True)
    return 1 if errors else 0


def examine(
    path: Path, *, name: str = "", config: Config | None = None
) -> tuple[dict[str, Fold], list[str], list[str]]:
    """Look through all of a pickle or folder: the folds that can be read, the errors, the notes.

    Args:
        path: Of the pickle or folder.
        name: What the data of a pickle are called: "sims" means scores in [-1, 1].
        config: What a training would need is looked for too, and lacking it is an error.

    Raises:
        OSError: If the path cannot be read at all.
    """
    errors: list[str] = []
    about: dict[str, Any] | None = None
    content: Any = {}
    if path.is_dir():
        try:
            about = _read_about(path)
        except DataError as error:
            errors.append(str(error))
        for fold in FOLDS:
            try:
                content[fold] = _read_arrays(path / f"{fold}.npz")
            except (DataError, OSError) as error:
                errors.append(f"{fold}: {error}")
    else:
        try:
            content = safe_pickle.load(path)
        except safe_pickle.UnsafePickleError as error:
            return {}, [str(error)], []
    score_range = None if about is None else about["score_range"]
    expected = list(content) if path.is_dir() else FOLDS  # which file is missing or broken is told already
    folds, found, notes = examine_mmsa(content, source=str(path), name=name, score_range=score_range, expected=expected)
    errors += found
    if about is not None:
        errors += _contradictions(about, content, folds)
    if config is not None and "train" in folds:
        there = {key: True for key in KEYS if key in content["train"]}  # where some of it could not be read
        try:
            if not errors:
                as_read(folds, config, str(path))
            elif fault := lack(used_modalities(config), there, text_reader(config)):
                errors.append(fault)
        except ValueError as error:
            errors.append(str(error))
    return folds, errors, notes + _shared_videos(folds)


def _shared_videos(folds: Mapping[str, Fold]) -> list[str]:
    """What does no harm to reading but may not be meant: clips of one video on both sides of a split."""
    notes = []
    # An id is VIDEO$_$CLIP. Clips of one video let a model recognise the speaker.
    videos = {name: {one.split("$_$")[0] for one in fold.ids if "$_$" in one} for name, fold in folds.items()}
    for first, second in itertools.combinations(videos, 2):
        shared = videos[first] & videos[second]
        if shared:
            notes.append(f"{first} and {second} share clips of {len(shared)} videos, the first is {min(shared)}")
    return notes


def _overview(folds: Mapping[str, Fold], *, title: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    present: dict[str, dict[str, np.ndarray]] = {}
    for name, fold in folds.items():
        filled = fold.filled
        forms = {modality: [filled[form] for form in FORMS[modality] if form in filled] for modality in MODALITIES}
        present[name] = {modality: np.any(rows, axis=0) for modality, rows in forms.items() if rows}
    modalities = [name for name in MODALITIES if any(name in one for one in present.values())]
    for column in ("fold", "samples", "below 0", "0", "above 0", *(f"with {name}" for name in modalities)):
        table.add_column(column, justify="left" if column == "fold" else "right")
    for name, fold in folds.items():
        signs = class_labels(fold.scores[np.isfinite(fold.scores)])
        counts = [str(int((signs == sign).sum())) for sign in range(3)]
        there = [
            str(int(present[name][modality].sum())) if modality in present[name] else "-" for modality in modalities
        ]
        table.add_row(name, str(len(fold)), *counts, *there)
    return table


def _where_and_what(finding: str) -> tuple[str, str]:
    """`train/audio: 3 nan` and `train: audio: expected ...` in two columns."""
    where, colon, what = finding.partition(": ")
    if not colon or " " in where:
        return "", finding
    inner, colon, rest = what.partition(": ")
    if where in FOLDS and colon and inner.isidentifier():
        return f"{where}/{inner}", rest
    return where, what


def _interval(score_range: tuple[float, float]) -> str:
    return f"[{score_range[0]:g}, {score_range[1]:g}]"
