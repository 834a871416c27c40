"""Data of your own: what is written is read again, what is odd is told, nothing is run."""

import argparse
import dataclasses
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from rich.console import Console

from mtmd.data import check
from mtmd.data.fold import AXES, FOLDS, DataError, drop_modalities, presence
from mtmd.data.mmsa import examine_mmsa, from_mmsa, load_mmsa
from mtmd.data.own_format import load_dataset, load_fold, open_dataset, save_dataset
from mtmd.data.synthetic import make_synthetic
from mtmd.results.metrics import metrics_for, msa_metrics, sims_metrics
from mtmd.runs.experiment import load_data
from mtmd.settings.config import Config
from mtmd.train import prepare


@pytest.fixture
def content():
    """A small unaligned file with every form of text."""
    made = make_synthetic(seed=1, sizes=(12, 5, 6))
    for fold in made.values():
        tokens = np.zeros((len(fold["id"]), 3, 7), np.float32)
        tokens[:, 0, :3], tokens[:, 1, :3] = (101, 2204, 102), 1
        fold["text_bert"] = tokens
    return made


@pytest.fixture
def sims(content):
    """The same as CH-SIMS would be: scores in [-1, 1], labels for each modality."""
    for fold in content.values():
        fold["regression_labels"] = fold["regression_labels"] / 3
        for number, one in enumerate("TAV"):
            fold[f"regression_labels_{one}"] = np.roll(fold["regression_labels"], number)
            fold[f"classification_labels_{one}"] = np.zeros(len(fold["id"]))
    return content


def read(content, name="toy", **options):
    return from_mmsa(content, name=name, source="toy.pkl", **options)


def command(name, *arguments):
    """Run a command as the command line does; its exit code and what it printed."""
    parser = argparse.ArgumentParser()
    getattr(check, f"add_{name}_arguments")(parser)
    printed = io.StringIO()
    parsed = parser.parse_args([str(one) for one in arguments])
    code = getattr(check, f"run_{name}")(parsed, Console(file=printed, width=200))
    return code, printed.getvalue()


def pickled(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def assert_same(one, other):
    assert (one.name, one.synthetic, one.score_range, one.classes) == (
        other.name,
        other.synthetic,
        other.score_range,
        other.classes,
    )
    for name in FOLDS:
        a, b = one.folds[name], other.folds[name]
        assert a.ids == b.ids
        assert a.raw_text == b.raw_text
        np.testing.assert_array_equal(a.scores, b.scores)
        for kind in ("features", "lengths", "unimodal_scores"):
            assert list(getattr(a, kind)) == list(getattr(b, kind))
            for key, array in getattr(a, kind).items():
                np.testing.assert_array_equal(array, getattr(b, kind)[key])
                assert array.dtype == getattr(b, kind)[key].dtype
        assert (a.text_bert is None) == (b.text_bert is None)
        if a.text_bert is not None:
            np.testing.assert_array_equal(a.text_bert, b.text_bert)
            assert b.text_bert.dtype == np.int64


# The folder


@pytest.mark.parametrize(
    "kept",
    [{"text"}, {"text_bert"}, {"raw_text"}, {"text", "text_bert", "raw_text"}],
    ids=lambda kept: "+".join(sorted(kept)),
)
def test_what_is_saved_is_loaded_to_the_bit(content, tmp_path, kept):
    for fold in content.values():
        for key in {"text", "text_bert", "raw_text"} - kept:
            del fold[key]
        fold["audio"][0, 0, :2] = np.nan, -np.inf
    dataset = read(content, synthetic=True)
    save_dataset(dataset, tmp_path / "new" / "folder")
    again = load_dataset(tmp_path / "new" / "folder")
    assert_same(dataset, again)
    assert again.fingerprint == dataset.fingerprint
    assert {path.name for path in tmp_path.rglob("*")} == {
        *("new", "folder", "dataset.json", "train.npz", "valid.npz", "test.npz")
    }


def test_scores_of_modalities_range_and_classes_are_kept(sims, tmp_path):
    dataset = read(sims, classes=("schlecht", "mittel", "gut"))
    assert dataset.score_range == (-1, 1)
    save_dataset(dataset, tmp_path / "sims")
    again = load_dataset(tmp_path / "sims")
    assert_same(dataset, again)
    assert list(again.folds["train"].unimodal_scores) == ["text", "audio", "vision"]
    about = json.loads((tmp_path / "sims" / "dataset.json").read_text())
    assert about["score_range"] == [-1, 1]
    assert about["texts"] == ["raw_text", "text_bert", "text"]
    assert about["widths"] == {"text": 32, "audio": 12, "vision": 16}
    assert about["folds"] == {"train": 12, "valid": 5, "test": 6}


def test_data_may_have_fewer_modalities(content, tmp_path):
    for fold in content.values():
        del fold["vision"], fold["vision_lengths"]
    dataset = read(content)
    save_dataset(dataset, tmp_path / "toy")
    assert load_dataset(tmp_path / "toy").widths == {"text": 32, "audio": 12}


def test_a_folder_made_by_hand_is_read(tmp_path):
    """With nothing but numpy and json, as docs/your_data.md says."""
    for fold, n in (("train", 4), ("valid", 2), ("test", 2)):
        np.savez(
            tmp_path / f"{fold}.npz",
            id=np.array([f"{fold}{row}" for row in range(n)]),
            raw_text=np.array(["so so"] * n),
            regression_labels=np.linspace(-5, 5, n),
            audio=np.ones((n, 3, 2)),
        )
    about = {"format": "mtmd dataset", "version": 1, "name": "mine", "score_range": [-5, 5], "texts": ["raw_text"]}
    about |= {"widths": {"audio": 2}, "folds": {"train": 4, "valid": 2, "test": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    dataset = open_dataset(tmp_path, name="not used")
    assert dataset.name == "mine"
    assert dataset.score_range == (-5, 5)
    assert dataset.classes == ("negative", "neutral", "positive")
    assert not any("outside" in note for note in dataset.notes)
    assert dataset.folds["train"].lengths["audio"].tolist() == [3] * 4


def test_open_dataset_reads_a_pickle_too(content, tmp_path):
    path = pickled(tmp_path / "toy.pkl", content)
    assert_same(open_dataset(path, name="toy"), load_mmsa(path, name="toy"))


def test_a_pickle_may_lack_a_modality_that_is_not_asked_for(content, tmp_path):
    for fold in content.values():
        for key in [key for key in fold if key.startswith("audio")]:
            del fold[key]
    path = pickled(tmp_path / "toy.pkl", content)
    config = Config(data=path, modalities=["text", "vision"])
    assert "audio" not in prepare(load_data(config), config)[0]["train"].features
    config = dataclasses.replace(config, modalities=["text", "audio"])
    with pytest.raises(DataError, match=r"toy\.pkl: audio: expected audio; there is: .* with --modalities text$"):
        prepare(load_data(config), config)


def test_saving_leaves_nothing_behind_when_it_fails(content, tmp_path):
    content["test"]["raw_text"][0] = "a\0"
    with pytest.raises(DataError, match="zero character"):
        save_dataset(read(content), tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_is_no_obstacle(content, tmp_path):
    (tmp_path / ".toy.partial").mkdir()
    (tmp_path / ".toy.partial" / "train.npz").write_text("half")
    save_dataset(read(content), tmp_path / "toy")
    assert load_dataset(tmp_path / "toy").folds["test"].ids == list(content["test"]["id"])
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_nothing_is_overwritten(content, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_dataset(read(content), tmp_path)
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_dataset(read(content), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture
def folder(content, tmp_path):
    save_dataset(read(content), tmp_path / "toy")
    return tmp_path / "toy"


ABOUT = {
    "another format": ({"format": "x"}, r"format: expected 'mtmd dataset', got 'x'"),
    "version": ({"version": 2}, "version: expected 1, got 2"),
    "no name": ({"name": " "}, "name: expected a name"),
    "range above 0": ({"score_range": [1, 5]}, "two numbers, one below 0 and one above"),
    "range of words": ({"score_range": ["a", "b"]}, "two numbers"),
    "range without end": ({"score_range": [-1, float("inf")]}, "two numbers"),
    "two classes": ({"classes": ["a", "b"]}, "three names"),
    "texts": ({"texts": ["words"]}, "some of raw_text, text_bert, text, got"),
    "smell": ({"widths": {"smell": 3}}, "a width for some of text, audio, vision"),
    "no test": ({"folds": {"train": 12, "valid": 5}}, "a number of samples for train, valid, test"),
    "other size": ({"folds": {"train": 12, "valid": 4, "test": 6}}, "valid: expected 4 samples as dataset.json says"),
    "other width": ({"widths": {"text": 32, "audio": 5, "vision": 16}}, "train: expected the feature widths"),
    "other texts": ({"texts": ["raw_text"]}, "train: expected texts as raw_text"),
    "fewer modalities": ({"widths": {"text": 32, "audio": 12}}, "train: expected the feature widths"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ABOUT.values(), ids=ABOUT.keys())
def test_a_wrong_description_is_refused(folder, change, message):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        load_dataset(folder)
    code, printed = command("check", folder)
    assert code == 1
    assert "cannot be trained on" in printed


@pytest.mark.parametrize("change", [{"version": 2}, None], ids=["version", "none"])
def test_a_wrong_description_is_no_fault_of_the_folds(content, tmp_path, change):
    """That the set has no vision stands in the description alone."""
    for fold in content.values():
        del fold["vision"], fold["vision_lengths"]
    save_dataset(read(content), tmp_path / "toy")
    path = tmp_path / "toy" / "dataset.json"
    about = json.loads(path.read_text())
    path.unlink() if change is None else path.write_text(json.dumps(about | change))
    folds, errors, _ = check.examine(tmp_path / "toy")
    assert list(folds) == list(FOLDS)
    assert len(errors) == 1
    assert "dataset.json" in errors[0]


def damage(path):
    """Ways in which a file can be no archive of plain arrays, as functions of its path."""
    content = path.read_bytes()

    def object_array():
        np.savez(path, id=np.array([print, len], dtype=object))

    return {
        "empty": lambda: path.write_bytes(b""),
        "cut": lambda: path.write_bytes(content[: len(content) // 2]),
        "changed": lambda: path.write_bytes(content[:300] + bytes(60) + content[360:]),
        "text": lambda: path.write_text("hello"),
        "pickle": lambda: path.write_bytes(pickle.dumps({"a": 1})),
        "one array": lambda: path.write_bytes(npy(np.ones(3))),
        "objects": object_array,
        "not numpy": lambda: zip_of(path, "id.npy", b"hello"),
        "huge": lambda: zip_of(path, "id.npy", npy(np.ones(3)).replace(b"(3,), }", b"(99999999999999,), }"[:20])),
    }


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zip_of(path, name, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize(
    "how", ["empty", "cut", "changed", "text", "pickle", "one array", "objects", "not numpy", "huge"]
)
def test_a_damaged_file_is_named_and_not_run(folder, how):
    damage(folder / "valid.npz")[how]()
    with pytest.raises(DataError, match=r"valid\.npz: expected a file of numpy\.savez"):
        load_dataset(folder)
    code, printed = command("check", folder)
    assert code == 1
    assert "valid.npz: expected a file of numpy.savez" in printed.replace("\n", "")


def test_a_missing_file_is_named(folder):
    (folder / "test.npz").unlink()
    with pytest.raises(OSError, match=r"test\.npz"):
        load_dataset(folder)
    assert command("check", folder)[0] == 1
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"expected a folder with dataset\.json"):
        load_dataset(folder)


def test_every_fault_of_every_array_is_told_with_key_and_what_stands_there(sims, tmp_path):
    """What lists can hold has its tests in test_example_data.py; arrays are read alike."""
    save_dataset(read(sims), tmp_path / "toy")
    path = tmp_path / "toy" / "valid.npz"
    with np.load(path) as archive:
        whole = dict(archive)
    assert set(whole) == set(AXES)
    for key, value in whole.items():
        faults = {"got 4": value[:4], "got shape": value.reshape(1, *value.shape)}
        if value.dtype.kind == "U":
            faults = {"got 4": value[:4], "got 1": value[None], "got 7 in row 0" if key == "raw_text" else "": [7] * 5}
            faults |= {"got b'.*' in row 0; decode it": value.astype("S")}
        elif value.ndim == 1:
            faults |= {"got dtype <U2, '-1' in row 0": np.array(["-1"] * 5)}
            faults |= {"got nan in row 3": np.array([0.0, 0, 0, np.nan, 0])} if key[-1] not in "TAV" else {}
        else:
            faults = {"got shape": value[:4], f"got dtype {value.astype(str).dtype}": value.astype(str)}
        faults |= {
            "Python objects; .* and pad what is of different lengths": np.array([*value[:4], None], dtype=object)
        }
        for got, given in faults.items():
            np.savez(path, **(whole | {key: given}))
            if not got:
                assert load_dataset(tmp_path / "toy")  # numbers are ids too
                continue
            named = f"'{key}.npy': an array of {got}" if "Python" in got else f"valid: {key}: expected .*, {got}"
            with pytest.raises(DataError, match=named):
                load_dataset(tmp_path / "toy")
            *_, errors, _ = check.examine(tmp_path / "toy")
            assert len(errors) == 1, (key, got, errors)
            if not key.startswith("regression_labels"):
                with pytest.raises(DataError, match=key):
                    load_fold(path)


def test_a_single_fold_needs_neither_ids_nor_labels(folder, tmp_path):
    audio = np.ones((3, 4, 12), np.float32)
    np.savez(tmp_path / "new.npz", audio=audio, audio_lengths=[4, 0, 2])
    fold = load_fold(tmp_path / "new.npz")
    assert fold.ids == ["0", "1", "2"]
    assert fold.scores.tolist() == [0, 0, 0]
    assert presence(fold) == {"audio": pytest.approx([True, False, True])}
    assert load_fold(folder / "test.npz").ids == load_dataset(folder).folds["test"].ids
    np.savez(tmp_path / "bad.npz", audio=audio, raw_text=np.array(["a"]))
    with pytest.raises(DataError, match=r"audio: expected \(1, T, d\) numbers, got shape \(3, 4, 12\)"):
        load_fold(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", smell=audio)
    with pytest.raises(DataError, match=r"expected at least one of .* there is: smell$"):
        load_fold(tmp_path / "bad.npz")


# convert and check


def test_convert_makes_a_folder_of_a_pickle(content, tmp_path):
    path = pickled(tmp_path / "toy.pkl", content)
    code, printed = command("convert", path, tmp_path / "out")
    assert not code
    assert "with vision" in printed
    assert "missing (length 0)" in printed
    assert_same(load_dataset(tmp_path / "out"), load_mmsa(path, name="toy"))
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        command("convert", path, tmp_path / "out")


def test_convert_takes_a_name_and_a_range(content, tmp_path):
    path = pickled(tmp_path / "toy.pkl", content)
    command("convert", path, tmp_path / "out", "--name", "mine", "--score-range", "-2", "2.5")
    dataset = load_dataset(tmp_path / "out")
    assert (dataset.name, dataset.score_range) == ("mine", (-2, 2.5))
    with pytest.raises(ValueError, match="--score-range: expected a number below 0 and one above"):
        command("convert", path, tmp_path / "other", "--score-range", "0", "5")


def test_check_passes_what_can_be_trained_on(content, tmp_path):
    for fold in content.values():
        fold["audio_lenghts"] = fold["id"]
    code, printed = command("check", pickled(tmp_path / "toy.pkl", content))
    assert code == 0
    assert "0 errors" in printed
    assert "not read: audio_lenghts" in printed


def test_check_counts_and_names_every_oddity_at_once(content, tmp_path):
    train, valid, test = (content[name] for name in FOLDS)
    train["audio"][1, 0, :3], train["audio"][2, 0, 0] = -np.inf, np.nan
    train["regression_labels"][:2] = 3.5, -7
    train["vision_lengths"][:], train["vision"][:] = 0, 0
    valid["audio"] = np.ones((5, 4, 11))
    valid["audio_lengths"] = np.array([4, 4, 4, 4, 5])
    valid["regression_labels"][0] = np.nan
    valid["raw_text"] = valid["raw_text"][:-1]
    test["id"][0] = train["id"][0]
    test["text_bert"][0, 1, 0] = 2
    test["vision"], test["vision_lengths"] = np.ones((6, 4, 3)), np.full(6, 4)
    code, printed = command("check", pickled(tmp_path / "toy.pkl", content))
    assert code == 1
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.splitlines()]
    for expected in (
        "note train/audio 3 -inf, 1 nan in 2 samples",
        "note train/regression_labels 2 outside [-3, 3], from -7 to 3.5",
        "note train/vision missing (length 0) in 12 of 12 samples",
        "error valid/regression_labels expected finite numbers, got nan in row 0, 1 NaN or infinite in all",
        "error valid/audio_lengths expected 5 integers from 0 to 4, got 5 in row 4",
        "error valid/raw_text expected 5 strings, got 4",
        "error test/text_bert expected token ids, attention mask, segment ids, in this order, with a mask of",
        "error test/vision expected 16 features as in train, got 3",
        "note train and test share 1 ids, the first is",
        "note train and test share clips of 1 videos, the first is",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, printed)
    assert lines[-1].endswith("cannot be trained on")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("valid"), "'valid' is missing"),
        (lambda content: content["valid"].pop("regression_labels"), "'regression_labels' is missing"),
        (lambda content: content["valid"].update(id=[1.5] * 5), "expected 5 strings, got 1.5 in row 0"),
        (lambda content: content["valid"].pop("audio"), "audio is in train and test, but not in valid"),
        (
            lambda content: content["valid"].update(regression_labels_T=np.zeros(5)),
            "regression_labels_T is in valid, but not in train and test",
        ),
    ],
)
def test_check_and_reading_agree_on_what_is_an_error(content, tmp_path, spoil, message):
    spoil(content)
    with pytest.raises(DataError, match=message):
        read(content)
    folds, errors, _ = examine_mmsa(content, source="toy.pkl")
    assert any(message in error for error in errors)
    assert "train" in folds
    assert command("check", pickled(tmp_path / "toy.pkl", content))[0] == 1


def test_check_takes_the_settings_of_a_training(content, tmp_path):
    for fold in content.values():
        del fold["vision"], fold["vision_lengths"]
    path = pickled(tmp_path / "toy.pkl", content)
    assert command("check", path)[1].endswith(": can be trained on with --modalities text audio\n")
    (tmp_path / "all.toml").write_text('dataset = "sims"\nmodalities = ["text", "vision"]\nepochs = 3\n')
    code, printed = command("check", path, "--config", tmp_path / "all.toml")
    assert code == 1
    assert "expected vision; there is: text (features), text_bert (token ids), raw_text (words), audio" in printed
    assert "outside [-1, 1]" in printed  # as the set of that name
    assert printed.endswith("cannot be trained on with these settings\n")
    code, printed = command("check", path, "--config", tmp_path / "all.toml", "--without", "vision_task")
    assert code == 0
    assert printed.endswith(": can be trained on with these settings\n")
    assert "outside [-1, 1]" not in command("check", path, "--dataset", "other")[1]


def test_check_does_not_run_a_pickle(tmp_path):
    code, printed = command("check", pickled(tmp_path / "bad.pkl", {"train": print}))
    assert code == 1
    assert "builtins.print" in printed
    code, printed = command("check", pickled(tmp_path / "list.pkl", [1, 2]))
    assert code == 1
    assert "expected a dictionary of the folds" in printed
    with pytest.raises(OSError, match="nowhere"):
        command("check", tmp_path / "nowhere.pkl")


def test_names_in_a_file_are_not_taken_for_markup(content, tmp_path):
    content["train"]["[red]x[/]"] = np.zeros(1)
    content["train"]["id"][0] = content["test"]["id"][0] = "[bold]$_$1"
    _, printed = command("check", pickled(tmp_path / "toy.pkl", content))
    assert "[red]x[/]" in printed
    assert "[bold]" in printed


def test_real_mosi_is_converted_and_checked(mosi_path, tmp_path):
    command("convert", mosi_path, tmp_path / "mosi", "--name", "mosi")
    assert_same(load_dataset(tmp_path / "mosi"), load_mmsa(mosi_path, name="mosi"))
    code, printed = command("check", tmp_path / "mosi")
    assert code == 0
    assert "0 errors, 3 notes" in printed


# CH-SIMS


def test_sims_is_known_by_its_labels_or_its_name(sims):
    assert read(sims).score_range == (-1, 1)
    wider = {name: fold | {"regression_labels": fold["regression_labels"] * 3} for name, fold in sims.items()}
    assert read(wider).score_range == (-3, 3)
    wider["test"]["regression_labels"] = "not numbers"
    with pytest.raises(DataError, match=r"test: regression_labels: expected 6 numbers"):
        read(wider)
    train = read(sims).folds["train"]
    np.testing.assert_array_equal(train.unimodal_scores["audio"], sims["train"]["regression_labels_A"])
    assert train.unimodal_scores["audio"].dtype == np.float32
    for fold in sims.values():
        for one in "TAV":
            del fold[f"regression_labels_{one}"]
    assert read(sims).score_range == (-3, 3)
    assert read(sims, name="CH-SIMS v2").score_range == (-1, 1)
    assert read(sims, name="sims", score_range=(-2, 2)).score_range == (-2, 2)


def test_sims_scores_are_held_against_their_own_range(sims):
    sims["train"]["regression_labels"][0] = 1.2
    sims["train"]["regression_labels_V"][:2] = -1.5, np.nan
    notes = read(sims, name="sims").notes
    assert any(note.startswith("train/regression_labels: 1 outside [-1, 1]") for note in notes)
    assert any(note.startswith("train/regression_labels_V: 1 outside [-1, 1], from -1.5") for note in notes)
    assert "train/regression_labels_V: 1 NaN or infinite" in notes
    sims["train"]["regression_labels_V"] = np.zeros(3)
    with pytest.raises(DataError, match="train: regression_labels_V: expected 12 numbers, got 3"):
        read(sims)


def test_the_fingerprint_knows_the_labels_of_modalities(sims):
    before = read(sims).fingerprint
    sims["test"]["regression_labels_T"][0] += 0.1
    assert read(sims).fingerprint != before


def mmsa_sims(predictions, targets):
    """MMSA's formulas for CH-SIMS, bin by bin."""
    p, y = np.clip(np.float32(predictions), -1, 1), np.clip(np.float32(targets), -1, 1)

    def classes(values, borders):
        found = values.copy()
        for number in range(len(borders) - 1):
            found[np.logical_and(values > borders[number], values <= borders[number + 1])] = number
        return found

    bins = {2: [-1.01, 0, 1.01], 3: [-1.01, -0.1, 0.1, 1.01], 5: [-1.01, -0.7, -0.1, 0.1, 0.7, 1.01]}
    metrics = {f"acc{n}": np.mean(classes(p, borders) == classes(y, borders)) for n, borders in bins.items()}
    sklearn = pytest.importorskip("sklearn.metrics")
    metrics["f1"] = sklearn.f1_score(classes(y, bins[2]), classes(p, bins[2]), average="weighted")
    return metrics | {"mae": np.mean(np.abs(p - y)), "corr": np.corrcoef(p, y)[0, 1]}


@pytest.mark.parametrize("seed", range(5))
def test_sims_metrics_are_those_of_mmsa(seed):
    rng = np.random.default_rng(seed)
    targets = np.round(rng.uniform(-1, 1, 60) * 5) / 5
    predictions = targets + rng.normal(0, 0.5, 60)
    predictions[:6] = 0, 0.1, -0.1, 0.7, -0.7, 3
    targets[6:10] = 0, 0.1, -0.1, -0.7
    found = sims_metrics(predictions, targets)
    assert list(found) == ["acc2", "acc3", "acc5", "f1", "mae", "corr"]
    for name, value in mmsa_sims(predictions, targets).items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_zero_is_negative_in_sims():
    assert sims_metrics([0.0, 0.0], [-0.2, 0.2])["acc2"] == 0.5
    assert sims_metrics([2.0], [1.0])["mae"] == 0
    assert metrics_for((-1.0, 1.0)) is sims_metrics
    assert metrics_for((-3.0, 3.0)) is msa_metrics
    with pytest.raises(ValueError, match=r"predictions: expected shape \(1,\), got \(2,\)"):
        sims_metrics([1.0, 0.0], [1.0])


# Dropping modalities


def test_dropping_makes_length_no_tokens_and_no_words(content):
    fold = read(content).folds["train"]
    dropped = drop_modalities(fold, {"text": 0.5, "audio": 0.5}, 0)
    gone = [text == "" for text in dropped.raw_text]
    assert 0 < sum(gone) < len(fold)
    assert (dropped.lengths["text"] == 0).tolist() == gone
    assert (~dropped.text_bert.any(axis=(1, 2))).tolist() == gone
    kept = ~np.array(gone)
    np.testing.assert_array_equal(dropped.text_bert[kept], fold.text_bert[kept])
    np.testing.assert_array_equal(dropped.lengths["text"][kept], fold.lengths["text"][kept])
    np.testing.assert_array_equal(dropped.lengths["vision"], fold.lengths["vision"])
    assert dropped.features["audio"] is fold.features["audio"]  # nothing of this size is copied
    assert dropped.scores is fold.scores
    assert (presence(dropped)["text"] == kept).all()


def test_dropping_is_seeded_nested_and_independent():
    fold = read(make_synthetic(sizes=(2000, 2, 2), missing={"audio": 0, "vision": 0})).folds["train"]

    def gone(name, seed=0, **rates):
        return drop_modalities(fold, rates, seed).lengths[name] == 0

    few, many = gone("audio", audio=0.2), gone("audio", audio=0.6)
    assert abs(few.mean() - 0.2) < 0.03
    assert abs(many.mean() - 0.6) < 0.04
    assert not (few & ~many).any()
    np.testing.assert_array_equal(few, gone("audio", audio=0.2, vision=0.9, text=1))
    assert (few != gone("audio", seed=1, audio=0.2)).any()
    both = gone("audio", audio=0.5, vision=0.5) & gone("vision", audio=0.5, vision=0.5)
    assert abs(both.mean() - 0.25) < 0.04
    assert gone("audio", audio=1.0).all()
    assert not gone("audio", audio=0.0).any()


def test_what_cannot_be_dropped_is_refused(content):
    fold = read(content).folds["train"]
    with pytest.raises(ValueError, match=r"rates: expected a number in \[0, 1\] for audio, got 1.5"):
        drop_modalities(fold, {"audio": 1.5}, 0)
    with pytest.raises(ValueError, match=r"modalities of the data \(text, audio, vision\), got 'smell'"):
        drop_modalities(fold, {"smell": 0.5}, 0)
    for one in content.values():
        for key in ("text", "text_bert", "vision"):
            del one[key]
    words = read(content).folds["train"]
    assert drop_modalities(words, {"text": 1, "vision": 0}, 0).raw_text == [""] * 12
