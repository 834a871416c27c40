"""The synthetic dataset is what its docstring says."""

import pickle

import numpy as np
import pytest

from mtmd.data.fold import FOLDS
from mtmd.data.mmsa import load_mmsa
from mtmd.data.scaling import Standardizer
from mtmd.data.synthetic import FILLERS, OPINIONS, STEPS, WIDTHS, make_synthetic, synthetic_dataset

NONE_MISSING = {"audio": 0.0, "vision": 0.0}


def pooled_mean(fold, modality):
    array, lengths = fold.features[modality], fold.lengths[modality]
    inside = np.arange(array.shape[1]) < lengths[:, None]
    return (array * inside[:, :, None]).sum(axis=1) / np.maximum(lengths, 1)[:, None]


def explained(dataset, modalities):
    """Share of the test scores' variance that ridge regression on mean features explains."""
    standardizer = Standardizer.fit(dataset.folds["train"])
    design = {}
    for name in ("train", "test"):
        fold = standardizer.apply(dataset.folds[name])
        columns = [pooled_mean(fold, modality) for modality in modalities]
        design[name] = np.concatenate([*columns, np.ones((len(fold), 1))], axis=1)
    x, y = design["train"], dataset.folds["train"].scores
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    return np.corrcoef(design["test"] @ weights, dataset.folds["test"].scores)[0, 1] ** 2


def test_default_signals_are_ordered_text_audio_vision_and_all_together():
    dataset = synthetic_dataset(sizes=(1500, 1, 1500), missing=NONE_MISSING)
    text, audio, vision = (explained(dataset, [name]) for name in ("text", "audio", "vision"))
    together = explained(dataset, ["text", "audio", "vision"])
    assert 0.1 < vision < audio < text < together - 0.05
    assert text < 0.8
    assert audio < 0.45
    assert vision < 0.35


@pytest.mark.parametrize("modality", ["text", "audio", "vision"])
def test_more_signal_explains_more_and_none_explains_nothing(modality):
    shares = []
    for signal in (0.0, 0.3, 0.6, 1.0):
        dataset = synthetic_dataset(sizes=(1500, 1, 1500), signal={modality: signal}, missing=NONE_MISSING)
        shares.append(explained(dataset, [modality]))
        assert shares[-1] <= signal + 0.02
    assert shares[0] < 0.02
    assert shares == sorted(shares)
    assert np.diff(shares).min() > 0.1


@pytest.mark.parametrize("signal", [0.25, 0.5, 0.8, 1.0])
def test_perfect_reader_explains_the_share_that_was_set(signal):
    test = make_synthetic(sizes=(1, 1, 6000), signal={"text": signal})["test"]
    level = {word: number - 3 for number, word in enumerate(OPINIONS)}
    read = [np.mean([level[word] for word in text.split() if word in level]) for text in test["raw_text"]]
    opinion = np.arctanh(np.clip(test["regression_labels"] / 3.3, -0.95, 0.95)) / 0.6
    share = np.corrcoef(read, opinion)[0, 1] ** 2
    assert share == pytest.approx(signal, abs=0.06)  # seven words are not a number


def test_scores_look_like_those_of_mosi():
    scores = make_synthetic(sizes=(8000, 1, 1))["train"]["regression_labels"]
    assert scores.dtype == np.float32
    assert scores.min() == -3
    assert scores.max() == 3
    np.testing.assert_allclose(scores * 5, np.round(scores * 5), atol=1e-5)
    assert 0.03 < (scores == 0).mean() < 0.05
    assert not np.signbit(scores[scores == 0]).any()
    assert abs(scores.mean()) < 0.1
    assert 1.4 < scores.std() < 1.8


def test_layout_is_that_of_an_unaligned_mmsa_file():
    content = make_synthetic(sizes=(40, 20, 30))
    assert list(content) == list(FOLDS)
    for fold, n in zip(FOLDS, (40, 20, 30), strict=True):
        made = content[fold]
        assert len(made["id"]) == len(set(made["id"])) == len(made["raw_text"]) == n
        assert all(one.count("$_$") == 1 for one in made["id"])
        for modality, width in WIDTHS.items():
            array, lengths = made[modality], made[f"{modality}_lengths"]
            assert array.shape == (n, STEPS[modality], width)
            assert array.dtype == np.float32
            assert len(set(lengths)) > 5
            for row, length in zip(array, lengths, strict=True):
                assert not row[length:].any()
                assert row[:length].all()
        sign = np.sign(made["regression_labels"])
        np.testing.assert_array_equal(made["classification_labels"], sign + 1)
        names = {-1: "Negative", 0: "Neutral", 1: "Positive"}
        assert made["annotations"].tolist() == [names[int(one)] for one in sign]


def test_text_has_one_word_for_each_step_and_says_what_the_features_say():
    train = make_synthetic(sizes=(50, 1, 1))["train"]
    for text, length in zip(train["raw_text"], train["text_lengths"], strict=True):
        words = text.split()
        assert len(words) == length
        assert len(set(words) - set(FILLERS)) == 1


def test_no_video_is_in_two_folds():
    content = make_synthetic()
    videos = [{one.split("$_$")[0] for one in content[fold]["id"]} for fold in FOLDS]
    assert not videos[0] & videos[1]
    assert not videos[0] & videos[2]
    assert not videos[1] & videos[2]


def test_missing_samples_come_at_the_rate_that_was_set():
    train = make_synthetic(sizes=(4000, 1, 1), missing={"audio": 0.3, "vision": 1.0})["train"]
    assert (train["audio_lengths"] == 0).mean() == pytest.approx(0.3, abs=0.03)
    assert not train["audio"][train["audio_lengths"] == 0].any()
    assert not train["vision_lengths"].any()
    assert not train["vision"].any()
    assert train["text_lengths"].all()


def test_same_seed_same_data_to_the_bit():
    assert pickle.dumps(make_synthetic(seed=3)) == pickle.dumps(make_synthetic(seed=3))
    first, again, other = (synthetic_dataset(seed=seed).fingerprint for seed in (3, 3, 4))
    assert first == again != other


def test_size_of_one_fold_changes_no_other():
    small, large = make_synthetic(sizes=(10, 20, 30)), make_synthetic(sizes=(99, 20, 30))
    for fold in ("valid", "test"):
        assert pickle.dumps(small[fold]) == pickle.dumps(large[fold])


def test_missing_rate_changes_nothing_else():
    whole = make_synthetic(missing=NONE_MISSING)["train"]
    holes = make_synthetic(missing={"audio": 0.5})["train"]
    here = holes["audio_lengths"] > 0
    np.testing.assert_array_equal(whole["audio"][here], holes["audio"][here])
    np.testing.assert_array_equal(whole["regression_labels"], holes["regression_labels"])


def test_dataset_says_that_it_is_synthetic():
    dataset = synthetic_dataset()
    assert dataset.synthetic
    assert dataset.name == "synthetic"
    assert [len(fold) for fold in dataset.folds.values()] == [600, 150, 300]
    assert dataset.widths == WIDTHS
    assert all("missing (length 0)" in note for note in dataset.notes)


def test_pickled_it_is_an_mmsa_file(tmp_path):
    path = tmp_path / "synthetic.pkl"
    path.write_bytes(pickle.dumps(make_synthetic()))
    read, made = load_mmsa(path, name="x"), synthetic_dataset()
    for fold in FOLDS:
        assert read.folds[fold].ids == made.folds[fold].ids
        for modality in WIDTHS:
            np.testing.assert_array_equal(read.folds[fold].features[modality], made.folds[fold].features[modality])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": {"smell": 0.1}}, "signal: expected names among .*, got 'smell'"),
        ({"signal": {"text": 1.1}}, r"signal: expected a number in \[0, 1\] for text, got 1.1"),
        ({"missing": {"text": 0.1}}, "missing: expected names among .*, got 'text'"),
        ({"missing": {"audio": float("nan")}}, r"missing: expected a number in \[0, 1\] for audio"),
        ({"sizes": (0, 1, 1)}, "sizes: expected three numbers of at least 1"),
        ({"noise": -1.0}, "noise: expected a number of at least 0, got -1.0"),
    ],
    ids=["name", "range", "missing name", "missing range", "sizes", "noise"],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic(**options)


def test_a_share_of_wrong_texts_reads_nothing_and_leaves_the_rest_as_it_is():
    plain = make_synthetic(seed=4, sizes=(400, 20, 20))
    wrong = make_synthetic(seed=4, sizes=(400, 20, 20), wrong={"text": 0.5})
    assert make_synthetic(seed=4, sizes=(400, 20, 20), wrong={"text": 0.0}).keys() == plain.keys()
    for key in ("regression_labels", "audio", "vision", "text_lengths"):
        assert np.array_equal(plain["train"][key], wrong["train"][key])
    same = (plain["train"]["text"] == wrong["train"]["text"]).all(axis=(1, 2))
    assert 0.4 < same.mean() < 0.6
    with pytest.raises(ValueError, match="wrong: expected a number in"):
        make_synthetic(wrong={"text": 1.5})
