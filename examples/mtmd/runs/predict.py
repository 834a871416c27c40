"""`predict`: scores for one utterance or a file of them. What is not given is a missing modality."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmd.data.fold import DataError, Fold, presence
from mtmd.data.own_format import load_fold
from mtmd.data.values import key_names
from mtmd.files.checks import is_plain, shown
from mtmd.files.reading import read_npy, read_table
from mtmd.files.writing import check_writable, write_rows
from mtmd.results.scores import Said
from mtmd.runs.trained import Trained, add_checkpoint_arguments, add_fold_argument, ask, load_trained, prepare_fold
from mtmd.settings.cli import note, say
from mtmd.settings.options import a_path


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "source",
        type=a_path,
        nargs="?",
        default=None,
        metavar="FILE",
        help="utterances: a CSV with any of the columns id, text, text_features, audio, vision (the last three are "
        "paths of .npy files), an .npz with the keys of a fold, an MMSA pickle, or a folder of the own format",
    )
    data.add_argument("--text", action="append", default=None, help="one utterance: its words; again for the next")
    data.add_argument(
        "--text-features", type=a_path, default=None, metavar="FILE.npy", help="one utterance: its text as features"
    )
    data.add_argument("--audio", type=a_path, default=None, metavar="FILE.npy", help="one utterance: (T, d), or (d,)")
    data.add_argument("--vision", type=a_path, default=None, metavar="FILE.npy", help="one utterance: (T, d), or (d,)")
    add_fold_argument(data, None, "of a pickle or folder (default: test)")
    parser.add_argument_group("output").add_argument(
        "--out", type=a_path, default=None, metavar="FILE.csv", help="where to write (default: a table)"
    )


def run_predict(arguments: argparse.Namespace, console: Console) -> None:
    """Print or write a line for each utterance."""
    given = {"text_features": arguments.text_features, "audio": arguments.audio, "vision": arguments.vision}
    single = arguments.text is not None or any(path is not None for path in given.values())
    if single == (arguments.source is not None):
        got = "both" if single else "neither"
        raise ValueError(
            f"predict: expected a FILE of utterances, or one by --text, --text-features, --audio, --vision; got {got}"
        )
    if arguments.fold is not None and (single or arguments.source.suffix.lower() in (".csv", ".npz")):
        raise ValueError("--fold: expected a pickle or folder beside it, got what has no folds")
    if arguments.out is not None:
        for path in (arguments.source, *given.values()):
            if path is not None and path.resolve() == arguments.out.resolve():
                raise ValueError(f"--out: expected another file than the one to read, got {arguments.out}")
        check_writable(arguments.out)
    trained = load_trained(arguments.checkpoint, text_encoder=arguments.text_encoder, device=arguments.device)
    if single:
        texts = [text if text.strip() else None for text in arguments.text or [""]]  # as an empty cell of a CSV
        if len(texts) > 1 and any(path is not None for path in given.values()):
            raise ValueError(f"--text: expected one beside other parts of an utterance, got {len(texts)}")
        fold = build_fold([{"id": str(row), "text": text, **given} for row, text in enumerate(texts)])
    else:
        is_csv = arguments.source.suffix.lower() == ".csv"
        fold = read_csv(arguments.source) if is_csv else load_fold(arguments.source, arguments.fold or "test")
    for text in unread(fold, trained):
        note(console, text)
    said = ask(trained, prepare_fold(fold, trained, source=str(arguments.source or "predict")))
    blind = int((~np.any(list(said.present.values()), axis=0)).sum())
    if blind:
        note(
            console,
            f"{blind} of {len(fold)} utterances have no modality that the model reads; what is predicted for them says "
            "nothing",
        )
    lines = prediction_lines(fold, said, trained.classes)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_rows(arguments.out, lines)
        say(console, f"Written: {arguments.out.resolve()}")
        return
    table = Table(
        caption="score and class (its sign); probabilities of the classes; score of each branch",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, heading in enumerate(lines[0]):
        table.add_column(escape(heading.removeprefix("p_")), justify="left" if number in (0, 2) else "right")
    for line in lines[1:]:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else escape(cell) for cell in line))
    console.print(table)


def read_csv(path: Path) -> Fold:
    """A fold of its lines; paths in them are relative to the folder of the file."""
    known = ("text", "text_features", "audio", "vision")
    headings, lines = read_table(path)
    if not set(known) & set(headings):
        raise DataError(f"{path}: expected a column named {' or '.join(known)}, got {key_names(headings)}")
    if not lines:
        raise DataError(f"{path}: expected at least one utterance, got none")
    utterances = []
    for number, line in enumerate(lines):
        files = {name: path.parent / line[name].strip() for name in known[1:] if line.get(name, "").strip()}
        for name, file in files.items():
            if not os.path.isfile(file):  # what Path.is_file raises for impossible names is False here
                raise DataError(f"{path}: {name}: expected the name of a file, got {shown(line[name])} in row {number}")
        name = line.get("id") or str(number)
        if not is_plain(name):
            raise DataError(f"{path}: id: expected strings that can be written, got {shown(name)} in row {number}")
        utterances.append({"id": name, "text": line.get("text"), **files})
    return build_fold(utterances, unread=[name for name in headings if name not in ("id", *known)])


def build_fold(lines: Sequence[Mapping[str, Any]], *, unread: Sequence[str] = ()) -> Fold:
    """A fold of utterances with `id`, `text` and the paths `text_features`, `audio`, `vision`, where there are any."""
    n = len(lines)
    features, lengths = {}, {}
    for name, key in (("text", "text_features"), ("audio", "audio"), ("vision", "vision")):
        arrays = {row: read_sequence(line[key], name) for row, line in enumerate(lines) if line.get(key) is not None}
        if not arrays:
            continue
        first = next(iter(arrays))
        for row, array in arrays.items():
            here, there = array.shape[1], arrays[first].shape[1]
            if here != there:
                got = f"{there} in {lines[first][key]} and {here} in {lines[row][key]}"
                raise DataError(f"{name}: expected as many features d in each file (T, d), got {got}")
        lengths[name] = np.array([len(arrays[row]) if row in arrays else 0 for row in range(n)], np.int64)
        features[name] = np.zeros((n, max(1, int(lengths[name].max())), arrays[first].shape[1]), np.float32)
        for row, array in arrays.items():
            features[name][row, : len(array)] = array
    texts = [line.get("text") or "" for line in lines]
    return Fold(
        ids=[str(line["id"]) for line in lines],
        scores=np.zeros(n, np.float32),
        raw_text=texts if any(texts) else None,
        text_bert=None,
        features=features,
        lengths=lengths,
        unread=tuple(unread),
    )


def read_sequence(path: Path, name: str) -> np.ndarray:
    """An array (T, d) from an .npy file; (d,) is one step."""
    array = read_npy(path)
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2) or not array.shape[-1]:
        got = f"{array.dtype} of shape {array.shape}"
        raise DataError(f"{path}: expected {name} as numbers (T, d) or (d,), got {got}")
    with np.errstate(over="ignore"):
        return np.atleast_2d(array).astype(np.float32)


def unread(fold: Fold, trained: Trained) -> list[str]:
    """What is there but not read by the model, and what is no number."""
    notes = [f"not read: {key_names(fold.unread)}"] if fold.unread else []
    there = {name for name, present in presence(fold).items() if present.any()}
    if fold.raw_text is not None and any(text.strip() for text in fold.raw_text):
        there.add("text")
    for name in sorted(there - set(trained.modalities)):
        notes.append(f"{name} is not read: the model was trained on {', '.join(trained.modalities)}")
    for name, array in fold.features.items():
        bad = int((~np.isfinite(array)).sum())
        if bad and name in trained.read_widths:
            notes.append(f"{name}: {bad} values are NaN or infinite; the training mean takes their place")
    return notes


def prediction_lines(fold: Fold, said: Said, classes: Sequence[str]) -> list[list[Any]]:
    """Heading and a line for each utterance; the score of a branch is empty where its modality is missing."""
    lines: list[list[Any]] = [["id", "score", "class", *(f"p_{name}" for name in classes), *said.branch_scores]]
    for row, name in enumerate(fold.ids):
        score = float(said.scores[row])
        branches = [
            float(scores[row]) if said.present[modality][row] else "" for modality, scores in said.branch_scores.items()
        ]
        label = classes[int(np.sign(score)) + 1]
        lines.append([name, score, label, *map(float, said.probabilities[row]), *branches])
    return lines
