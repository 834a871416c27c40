"""`convert` makes a folder of the own format of an MMSA pickle; `check` counts and names what is odd about either."""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmd.data.fold import FOLDS, FORMS, KEYS, MODALITIES, DataError, Fold, class_labels
from mtmd.data.mmsa import examine_mmsa, load_mmsa
from mtmd.data.needs import TextReader, advice, as_read, check_encoder, keys_of, lack, text_reader
from mtmd.data.own_format import check_new, contradictions, read_about, read_arrays, save_dataset
from mtmd.files import safe_pickle
from mtmd.files.writing import check_writable
from mtmd.settings.cli import note, say
from mtmd.settings.config import Config
from mtmd.settings.options import a_number, a_path, add_config_arguments, config_from

SETTINGS = ("modalities", "text_encoder", "max_tokens", "without")  # on which it depends what a model needs


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
    say(console, f"Written: {arguments.target.resolve()}")


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
    say(console, f"{len(errors)} errors, {len(notes)} notes: {verdict}")
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
            about = read_about(path)
        except DataError as error:
            errors.append(str(error))
        for fold in FOLDS:
            try:
                content[fold] = read_arrays(path / f"{fold}.npz")
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
        errors += contradictions(about, content, folds)
    if config is not None and "train" in folds:
        there = {key: True for key in KEYS if key in content["train"]}  # where some of it could not be read
        try:
            if not errors:
                as_read(folds, config, str(path))
            elif fault := lack(config.used, there, text_reader(config)):
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
