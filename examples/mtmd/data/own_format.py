"""Data of your own: a folder with one JSON file and a compressed numpy file for each fold.

    my_data/
        dataset.json    name, range of the scores, names of the classes, forms of the text, widths, sizes
        train.npz       the keys of MMSA's files: id, regression_labels, raw_text, audio, audio_lengths, ...
        valid.npz
        test.npz

    dataset = from_mmsa(content, name="mine", source="my content")  # checks what you have; see mmsa.py
    save_dataset(dataset, "my_data")
    dataset = load_dataset("my_data")

Nothing in such a folder can run code when it is read: JSON, and arrays without Python objects. The same page with more
words is docs/your_data.md. Two commands belong to it: `convert` makes such a folder of an MMSA pickle, `check` counts
and names what is odd about either.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtmd.data.fold import CLASSES, FOLDS, MODALITIES, UNIMODAL_LABELS, DataError, Dataset, Fold
from mtmd.data.mmsa import from_mmsa, load_mmsa, read_fold
from mtmd.data.values import key_names
from mtmd.files import safe_pickle
from mtmd.files.checks import SWITCH, Rule, check_layout, is_number, is_plain, shown
from mtmd.files.reading import read_json, read_npz
from mtmd.files.writing import naming

__all__ = ["load_dataset", "load_fold", "open_dataset", "save_dataset"]

ABOUT = "dataset.json"
FORMAT, VERSION = "mtmd dataset", 1
TEXT_FORMS = ("raw_text", "text_bert", "text")


def is_list(value: object, fits: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and all(map(fits, value)) and length in (None, len(value))


def is_table(value: object, names: Collection[str]) -> bool:
    """Whether this has a whole number for some of these names."""
    return isinstance(value, dict) and set(value) <= set(names) and all(type(n) is int for n in value.values())


LAYOUT = {  # of dataset.json
    "name": Rule("a name", lambda value: is_plain(value) and value.strip() != ""),
    "synthetic": SWITCH,
    "score_range": Rule(
        "two numbers, one below 0 and one above, for the sign of a score is its class",
        lambda value: is_list(value, is_number, 2) and value[0] < 0 < value[1],
    ),
    "classes": Rule("three names, from low to high scores", lambda value: is_list(value, is_plain, 3)),
    "texts": Rule(
        f"a list of some of {', '.join(TEXT_FORMS)}",
        lambda value: is_list(value, is_plain) and set(value) <= set(TEXT_FORMS),
    ),
    "widths": Rule(f"a width for some of {', '.join(MODALITIES)}", lambda value: is_table(value, MODALITIES)),
    "folds": Rule(
        f"a number of samples for {', '.join(FOLDS)}", lambda value: is_table(value, FOLDS) and len(value) == 3
    ),
}


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
    about = read_about(folder)
    content = {fold: read_arrays(folder / f"{fold}.npz") for fold in FOLDS}
    dataset = from_mmsa(
        content,
        name=about["name"],
        source=str(folder),
        synthetic=about["synthetic"],
        score_range=about["score_range"],
        classes=about["classes"],
    )
    for error in contradictions(about, content, dataset.folds):
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
        read_about(path)
        path = path / f"{fold}.npz"
    content = read_arrays(path) if path.suffix.lower() == ".npz" else safe_pickle.load(path)
    if not isinstance(content, Mapping) or not set(content) & set(FOLDS):
        return read_fold(content, source=str(path))
    if fold not in content:
        raise DataError(f"{path}: expected the fold {fold!r}, there is: {key_names(content)}")
    return read_fold(content[fold], source=f"{path}: {fold}")


def read_about(folder: Path) -> dict[str, Any]:
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
    try:
        check_layout(about, LAYOUT, str(path))
    except ValueError as error:
        raise DataError(str(error)) from None
    low, high = about["score_range"]
    return {**about, "score_range": (float(low), float(high)), "classes": tuple(about["classes"])}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    try:
        return read_npz(path)
    except ValueError as error:
        raise DataError(str(error)) from None


def contradictions(about: dict[str, Any], content: Mapping[str, Any], folds: Mapping[str, Fold]) -> list[str]:
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
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise naming(error, folder) from error
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
