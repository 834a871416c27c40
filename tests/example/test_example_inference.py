"""A checkpoint scores, predicts from any subset of modalities, and leaves Python with equal outputs."""

import dataclasses
import io
import json
import pickle
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from mtmd.data.batches import batches
from mtmd.data.fold import drop_modalities, presence
from mtmd.data.mmsa import from_mmsa
from mtmd.data.own_format import open_dataset, save_dataset
from mtmd.data.synthetic import make_synthetic, synthetic_dataset
from mtmd.results.metrics import msa_metrics, sims_metrics
from mtmd.runs import evaluate, export
from mtmd.runs.trained import ask, load_trained, prepare_fold, without_modalities
from mtmd.settings import cli
from mtmd.settings.config import Config
from study_cases import fake_checkpoint, read

MODALITIES = ("text", "audio", "vision")


@pytest.fixture(scope="module")
def content():
    made = make_synthetic(seed=2, sizes=(60, 10, 50))
    for fold in made.values():
        fold["text"][::7], fold["text_lengths"][::7] = 0, 0
    return made


@pytest.fixture(scope="module")
def dataset(content):
    return from_mmsa(content, name="toy", source="toy", synthetic=True)


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint_seed1"
    fake_checkpoint(path, dataset)
    return path


@pytest.fixture(scope="module")
def data(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    save_dataset(dataset, folder)
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint):
    return load_trained(checkpoint)


def command(name, *arguments):
    """Run a command as the command line does; what it printed."""
    _, parsed, run = cli.parse([name, *map(str, arguments)], "")
    printed = io.StringIO()
    run(parsed, Console(file=printed, width=200))
    return printed.getvalue()


# evaluate


def test_evaluate_gives_the_metrics_of_the_predictions(checkpoint, data, trained, dataset, tmp_path):
    printed = command("evaluate", checkpoint, "--data", data, "--out", tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    fold = trained.standardizer.apply(dataset.folds["test"])
    with torch.no_grad():
        scores = trained.model.predict(next(batches(fold, 50))).scores.numpy()
    assert report["metrics"]["fused"] == msa_metrics(scores, fold.scores)
    assert report["samples"] == 50
    assert report["fold"] == "test"
    assert report["dataset"]["sha256"] == dataset.fingerprint
    assert "not the data" not in printed
    assert f"{report['metrics']['fused']['mae']:.3f}" in printed


def test_branches_are_scored_where_their_modality_is_there(trained, dataset):
    fold = prepare_fold(dataset.folds["test"], trained)
    said = ask(trained, fold)
    metrics = {row: msa_metrics(*pair) for row, pair in evaluate.by_branch(said, fold).items()}
    assert list(metrics) == ["fused", *MODALITIES]
    for name in MODALITIES:
        there = presence(fold)[name]
        assert 0 < there.sum() < len(fold)
        assert metrics[name] == msa_metrics(said.branch_scores[name][there], fold.scores[there])


def test_evaluate_says_when_the_data_are_others(checkpoint, tmp_path):
    other = tmp_path / "other"
    save_dataset(synthetic_dataset(seed=9, sizes=(20, 10, 10)), other)
    assert "not the data" in command("evaluate", checkpoint, "--data", other)


def test_a_pickle_and_the_folder_made_of_it_are_the_same_data(content, tmp_path):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(content))
    dataset = open_dataset(tmp_path / "data.pkl", name="mosi")
    fake_checkpoint(tmp_path / "checkpoint", dataset, data=tmp_path / "data.pkl", dataset="mosi")
    save_dataset(dataset, tmp_path / "folder")
    for data in ("data.pkl", "folder"):
        assert "not the data" not in command("evaluate", tmp_path / "checkpoint", "--data", tmp_path / data)


def test_a_checkpoint_without_data_is_scored_on_its_synthetic_set(tmp_path):
    signal = {"text": 0.7, "audio": 0.45, "vision": 0.35}
    fake_checkpoint(
        tmp_path / "checkpoint", synthetic_dataset(seed=4, signal=signal), synthetic_seed=4, signal_text=0.7
    )
    assert "not the data" not in command("evaluate", tmp_path / "checkpoint", "--fold", "valid")


def test_a_synthetic_set_with_a_wrong_teacher_is_made_again(tmp_path):
    fake_checkpoint(tmp_path / "checkpoint", synthetic_dataset(wrong={"text": 0.3}), wrong_text=0.3)
    assert "not the data" not in command("evaluate", tmp_path / "checkpoint", "--fold", "valid")


def test_evaluation_json_says_what_was_asked(checkpoint, data, trained, tmp_path):
    command(
        *("evaluate", checkpoint, "--data", data, "--fold", "valid", "--drop", "audio=0.3", "--draws", 2),
        *("--seed", 7, "--out", tmp_path),
    )
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["arguments"] == {
        "checkpoint": str(checkpoint),
        "data": str(data),
        "text_encoder": None,
        "fold": "valid",
        "drop": {"audio": 0.3},
        "rates": None,
        "draws": 2,
        "seed": 7,
    }
    assert Config.from_values(report["config"], source="") == trained.config


def test_a_text_without_features_is_missing_whatever_its_tokens_are(trained, dataset):
    fold = dataset.folds["test"]
    with_tokens = dataclasses.replace(fold, text_bert=np.ones((len(fold), 3, 4), np.int64))
    said, expected = (ask(trained, prepare_fold(one, trained)) for one in (with_tokens, fold))
    assert not expected.present["text"].all()
    assert np.array_equal(said.present["text"], expected.present["text"])
    assert np.array_equal(said.scores, expected.scores)


@pytest.mark.parametrize("rates", [{"audio": 0.5}, {"text": 1.0}, {"text": 0.4, "vision": 0.7}], ids=str)
def test_fusing_again_is_predicting_from_the_dropped_fold(trained, dataset, rates):
    fold = prepare_fold(dataset.folds["test"], trained)
    dropped = drop_modalities(fold, rates, 3)
    again = without_modalities(trained, ask(trained, fold), fold)(presence(dropped))
    np.testing.assert_allclose(again, ask(trained, dropped).scores, rtol=1e-5, atol=1e-6)
    assert np.abs(again - ask(trained, fold).scores).max() > 1e-3


def test_drop_is_measured_over_draws(checkpoint, data, tmp_path):
    arguments = [checkpoint, "--data", data, "--drop", "audio=0.3", "text=0.5", "--draws", 3, "--seed", 7]
    command("evaluate", *arguments, "--out", tmp_path / "one")
    command("evaluate", *arguments, "--out", tmp_path / "two")
    assert (tmp_path / "one" / "evaluation.json").read_bytes() == (tmp_path / "two" / "evaluation.json").read_bytes()
    dropped = json.loads((tmp_path / "one" / "evaluation.json").read_text())["dropped"]
    assert dropped["rates"] == {"audio": 0.3, "text": 0.5}
    maes = [draw["mae"] for draw in dropped["draws"]]
    assert len(set(maes)) == 3
    assert dropped["mean"]["mae"] == pytest.approx(np.mean(maes))
    assert dropped["std"]["mae"] == pytest.approx(np.std(maes, ddof=1))


def test_robustness_curves_start_at_the_whole_and_end_without(checkpoint, data, trained, dataset, tmp_path):
    printed = command(
        "evaluate", checkpoint, "--data", data, "--robustness", "--rates", 0, 0.5, 1, "--draws", 2, "--out", tmp_path
    )
    rows = read(tmp_path / "robustness.csv")
    assert [(row["dropped"], float(row["rate"])) for row in rows] == [
        (name, rate) for name in (*MODALITIES, "all") for rate in (0, 0.5, 1)
    ]
    fold = prepare_fold(dataset.folds["test"], trained)
    whole = msa_metrics(ask(trained, fold).scores, fold.scores)
    for row in rows:
        if row["rate"] == "0.0":
            assert float(row["mae"]) == pytest.approx(whole["mae"], abs=1e-6)
            assert float(row["mae_std"]) == 0
    blind = next(row for row in rows if row["dropped"] == "all" and row["rate"] == "1.0")
    assert blind["corr"] == ""  # one score for all
    without_text = ask(trained, drop_modalities(fold, {"text": 1}, 0)).scores
    assert float(rows[2]["mae"]) == pytest.approx(msa_metrics(without_text, fold.scores)["mae"], abs=1e-6)
    assert (tmp_path / "robustness.svg").read_bytes().startswith(b"<?xml")
    assert "50 %" in printed


def test_sims_is_scored_by_its_own_metrics_and_labels(content, tmp_path):
    made = {}
    for name, fold in content.items():
        scores = fold["regression_labels"] / 3
        made[name] = fold | {"regression_labels": scores}
        made[name] |= {f"regression_labels_{one}": np.roll(scores, shift) for shift, one in enumerate("TAV")}
    dataset = from_mmsa(made, name="sims", source="sims")
    fake_checkpoint(tmp_path / "checkpoint", dataset)
    save_dataset(dataset, tmp_path / "sims")
    command("evaluate", tmp_path / "checkpoint", "--data", tmp_path / "sims", "--out", tmp_path)
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert list(metrics["fused"]) == ["acc2", "acc3", "acc5", "f1", "mae", "corr"]
    trained = load_trained(tmp_path / "checkpoint")
    fold = prepare_fold(dataset.folds["test"], trained)
    said, there = ask(trained, fold), presence(fold)["audio"]
    own = fold.unimodal_scores["audio"]
    assert metrics["audio, own labels"] == sims_metrics(said.branch_scores["audio"][there], own[there])
    assert metrics["audio, own labels"] != metrics["audio"]


def test_a_row_counts_the_samples_that_it_measures(trained, dataset):
    fold = dataset.folds["test"]
    own = np.where(np.arange(len(fold)) < 10, fold.scores, np.nan).astype(np.float32)
    fold = prepare_fold(dataclasses.replace(fold, unimodal_scores={"vision": own}), trained)
    said = ask(trained, fold)
    there = presence(fold)["vision"]
    counts = {row: len(targets) for row, (_, targets) in evaluate.by_branch(said, fold).items()}
    assert counts["fused"] == 50
    assert counts["vision"] == there.sum()
    assert counts["vision, own labels"] == there[:10].sum() < there.sum()


def test_a_file_is_measured_as_the_data_of_the_checkpoint(content, tmp_path):
    """CH-SIMS without labels of its modalities: that its scores lie in [-1, 1] is known by its name alone."""
    made = {name: fold | {"regression_labels": fold["regression_labels"] / 3} for name, fold in content.items()}
    path = tmp_path / "file.pkl"
    path.write_bytes(pickle.dumps(made))
    fake_checkpoint(tmp_path / "checkpoint", from_mmsa(made, name="sims", source="sims"), data=path, dataset="sims")
    for options in ([], ["--data", path]):
        command("evaluate", tmp_path / "checkpoint", *options, "--out", tmp_path)
        report = json.loads((tmp_path / "evaluation.json").read_text())
        assert list(report["metrics"]["fused"]) == ["acc2", "acc3", "acc5", "f1", "mae", "corr"]


# predict


def test_a_fold_is_predicted_from_a_pickle_a_folder_and_an_npz_alike(checkpoint, content, data, dataset, tmp_path):
    path = tmp_path / "toy.pkl"
    path.write_bytes(pickle.dumps(content))
    for number, source in enumerate((path, data, data / "test.npz")):
        command("predict", checkpoint, source, "--out", tmp_path / f"{number}.csv")
    rows = read(tmp_path / "0.csv")
    assert list(rows[0]) == ["id", "score", "class", "p_negative", "p_neutral", "p_positive", *MODALITIES]
    assert [row["id"] for row in rows] == dataset.folds["test"].ids
    assert read(tmp_path / "1.csv") == read(tmp_path / "2.csv") == rows
    for row, there in zip(rows, dataset.folds["test"].lengths["vision"], strict=True):
        assert (row["vision"] != "") == bool(there)
        assert row["class"] == ("negative", "neutral", "positive")[int(np.sign(float(row["score"]))) + 1]
        assert sum(float(row[f"p_{name}"]) for name in ("negative", "neutral", "positive")) == pytest.approx(1)
    assert {row["class"] for row in rows} == {"negative", "positive"}


def test_scores_are_those_of_the_model(checkpoint, data, trained, dataset, tmp_path):
    command("predict", checkpoint, data, "--fold", "valid", "--out", tmp_path / "valid.csv")
    expected = ask(trained, prepare_fold(dataset.folds["valid"], trained)).scores
    assert [float(row["score"]) for row in read(tmp_path / "valid.csv")] == expected.tolist()


@pytest.mark.parametrize("given", [("audio",), ("vision",), ("text",), ("audio", "vision"), MODALITIES], ids="+".join)
def test_any_subset_of_modalities_predicts(checkpoint, trained, dataset, tmp_path, given):
    """One utterance by options gives what the fold gives with the other modalities dropped."""
    fold = dataset.folds["test"]
    row = next(i for i in range(len(fold)) if all(fold.lengths[name][i] for name in MODALITIES))
    options = []
    for name in given:
        np.save(tmp_path / f"{name}.npy", fold.features[name][row, : fold.lengths[name][row]])
        options += ["--text-features" if name == "text" else f"--{name}", tmp_path / f"{name}.npy"]
    command("predict", checkpoint, *options, "--out", tmp_path / "one.csv")
    (found,) = read(tmp_path / "one.csv")
    rates = {name: 1.0 for name in MODALITIES if name not in given}
    expected = ask(trained, drop_modalities(prepare_fold(fold, trained), rates, 0))
    assert float(found["score"]) == pytest.approx(expected.scores[row], abs=1e-5)
    assert {name for name in MODALITIES if found[name]} == set(given)


def test_a_csv_with_paths_predicts_utterances_of_different_modalities(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(size=(5, 12)))
    np.save(tmp_path / "b.npy", rng.normal(size=(9, 12)))
    np.save(tmp_path / "v.npy", rng.normal(size=16))  # one step
    table = "id,audio,vision\nfirst,a.npy,\nsecond,b.npy,v.npy\nthird,,v.npy\nfourth,,\n"
    (tmp_path / "new.csv").write_text(table, encoding="utf-8-sig")
    printed = command("predict", checkpoint, tmp_path / "new.csv", "--out", tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == ["first", "second", "third", "fourth"]
    assert [(bool(row["audio"]), bool(row["vision"]), bool(row["text"])) for row in rows] == [
        (True, False, False),
        (True, True, False),
        (False, True, False),
        (False, False, False),
    ]
    assert "1 of 4 utterances have no modality" in printed
    command("predict", checkpoint, "--audio", tmp_path / "a.npy", "--out", tmp_path / "alone.csv")
    (alone,) = read(tmp_path / "alone.csv")
    assert float(alone["score"]) == pytest.approx(float(rows[0]["score"]), abs=1e-6)


def test_predictions_are_printed_where_no_file_is_named(checkpoint, tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 12), np.nan))
    printed = command("predict", checkpoint, "--audio", tmp_path / "a.npy")
    assert "audio: 48 values are NaN or infinite" in printed
    assert "score of each branch" in " ".join(printed.split())
    assert len([line for line in printed.splitlines() if line.startswith(" 0 ")]) == 1


def test_a_text_only_model_predicts_and_says_what_it_does_not_read(dataset, data, tmp_path):
    fake_checkpoint(tmp_path / "checkpoint", dataset, modalities=["text"])
    printed = command("predict", tmp_path / "checkpoint", data, "--out", tmp_path / "out.csv")
    assert "audio is not read: the model was trained on text" in printed
    assert list(read(tmp_path / "out.csv")[0])[6:] == ["text"]
    command("evaluate", tmp_path / "checkpoint", "--data", data, "--robustness", "--rates", 1, "--out", tmp_path)
    assert [row["dropped"] for row in read(tmp_path / "robustness.csv")] == ["text"]


def test_data_without_a_modality_are_scored_as_missing_it(checkpoint, trained, dataset, tmp_path):
    def less(fold):
        return dataclasses.replace(
            fold,
            features={name: fold.features[name] for name in ("text", "audio")},
            lengths={name: fold.lengths[name] for name in ("text", "audio")},
        )

    smaller = dataclasses.replace(dataset, folds={name: less(fold) for name, fold in dataset.folds.items()})
    save_dataset(smaller, tmp_path / "smaller")
    command("predict", checkpoint, tmp_path / "smaller", "--out", tmp_path / "out.csv")
    expected = ask(trained, drop_modalities(prepare_fold(dataset.folds["test"], trained), {"vision": 1}, 0)).scores
    found = [float(row["score"]) for row in read(tmp_path / "out.csv")]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# With a pretrained text encoder


@pytest.fixture(scope="module")
def with_encoder(dataset, tmp_path_factory):
    """A checkpoint of a model with a tiny BERT, and its directory."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "movie", "a"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder)
    path = folder / "checkpoint"
    fake_checkpoint(path, dataset, text_encoder=str(folder), pooling="cls")
    return path, folder


def test_words_are_tokenised_as_the_checkpoint_says(with_encoder, tmp_path):
    path, _ = with_encoder
    (tmp_path / "new.csv").write_text("text,Vision\na good movie,\na bad movie,\n  ,\n")
    said = command("predict", path, tmp_path / "new.csv", "--out", tmp_path / "out.csv")
    assert "note: not read: Vision" in said
    rows = read(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert [bool(row["text"]) for row in rows] == [True, True, False]
    assert rows[0]["score"] != rows[1]["score"]
    command("predict", path, "--text", "a good movie", "--out", tmp_path / "one.csv")
    (one,) = read(tmp_path / "one.csv")
    assert float(one["score"]) == pytest.approx(float(rows[0]["score"]), abs=1e-6)
    command("predict", path, "--text", "a good movie", "--text", "a bad movie", "--out", tmp_path / "two.csv")
    assert [row["id"] for row in read(tmp_path / "two.csv")] == ["0", "1"]
    for row, other in zip(read(tmp_path / "two.csv"), rows, strict=False):
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=1e-6)
    np.save(tmp_path / "a.npy", np.ones((3, 12)))
    with pytest.raises(ValueError, match=r"^--text: expected one beside other parts of an utterance, got 2$"):
        command("predict", path, "--text", "good", "--text", "bad", "--audio", tmp_path / "a.npy")


def test_the_mean_of_the_tokens_survives_a_checkpoint(with_encoder, dataset, tmp_path):
    path, folder = with_encoder
    model = fake_checkpoint(tmp_path / "checkpoint", dataset, text_encoder=str(folder), pooling="mean").eval()
    trained, other = load_trained(tmp_path / "checkpoint"), load_trained(path)
    fold = prepare_fold(dataset.folds["test"], trained)
    with torch.no_grad():
        expected = model(next(batches(fold, 50)))
    assert np.array_equal(ask(trained, fold).scores, expected.fused.scores.numpy())
    # of the same weights, the first token alone says something else
    assert not np.allclose(ask(other, fold).branch_scores["text"], expected.unimodal["text"].scores.numpy())


def test_words_may_be_missing_for_a_model_with_an_encoder(with_encoder, tmp_path):
    path, folder = with_encoder
    np.save(tmp_path / "a.npy", np.ones((3, 12)))
    options = ["--audio", tmp_path / "a.npy", "--text-encoder", folder]
    command("predict", path, *options, "--out", tmp_path / "one.csv")
    (one,) = read(tmp_path / "one.csv")
    assert np.isfinite(float(one["score"]))
    assert one["text"] == ""
    said = command("predict", path, "--text", " ", "--text-encoder", folder)
    assert "1 of 1 utterances have no modality that the model reads" in said


def test_a_folder_is_no_checkpoint(checkpoint):
    for folder, found in {checkpoint.parent: checkpoint.stem, checkpoint.parent.parent: "none"}.items():
        with pytest.raises(ValueError, match=f"expected a checkpoint, got a folder, which has {found}"):
            load_trained(folder)


# export

can_export = pytest.mark.skipif(
    export.register_lstm_while_loop_decomposition is None, reason="this torch cannot export an LSTM of any length"
)


def test_a_torch_that_cannot_export_is_named(trained, monkeypatch):
    monkeypatch.setattr(export, "register_lstm_while_loop_decomposition", None)
    with pytest.raises(
        ValueError, match=r"^export: expected a torch that .*, got torch " + re.escape(torch.__version__)
    ):
        export.export_program(trained)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    assert "differ from the model's by at most" in command("export", checkpoint, path)
    return path


@can_export
def test_the_exported_program_says_what_the_model_says(exported, trained, dataset):
    files = {"about.json": ""}
    program = torch.export.load(exported, extra_files=files).module()
    about = json.loads(files["about.json"])
    assert about["widths"] == dataset.widths
    assert about["inputs"] == [part for name in MODALITIES for part in (name, f"{name}_lengths")]
    fold = dataset.folds["test"]
    expected = ask(trained, prepare_fold(fold, trained))
    for rows in ([0], [3, 1], list(range(50))):  # the first has no text
        inputs = {name: torch.from_numpy(fold.features[name][rows]) for name in MODALITIES}
        inputs |= {f"{name}_lengths": torch.from_numpy(fold.lengths[name][rows]) for name in MODALITIES}
        said = program(inputs)
        np.testing.assert_allclose(said["scores"].numpy(), expected.scores[rows], rtol=1e-5, atol=1e-6)
        probabilities = said["logits"].softmax(dim=1).numpy()
        np.testing.assert_allclose(probabilities, expected.probabilities[rows], rtol=1e-5, atol=1e-6)


@can_export
def test_the_exported_program_scales_and_cuts_its_inputs_itself(exported, trained):
    program = torch.export.load(exported).module()
    inputs = export.example_inputs(trained, samples=4, steps=6)
    inputs["audio"][0, 0, 0] = torch.nan  # the training mean takes its place
    said = program(inputs)["scores"]
    assert torch.isfinite(said).all()
    inputs["audio"][0, 0, 0] = float(trained.standardizer.mean["audio"][0])
    for name in MODALITIES:
        behind = torch.arange(6) >= inputs[f"{name}_lengths"][:, None]
        inputs[name][behind] = 1e6
    torch.testing.assert_close(program(inputs)["scores"], said, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@can_export
def test_a_text_encoder_is_exported(with_encoder, tmp_path, dataset):
    _, folder = with_encoder
    fake_checkpoint(tmp_path / "checkpoint", dataset, text_encoder=str(folder), modalities=["text"])
    command("export", tmp_path / "checkpoint", tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    trained = load_trained(tmp_path / "checkpoint")
    inputs = export.example_inputs(trained, samples=5, steps=9)
    inputs["tokens"][1] = 0  # a text that is missing
    batch = export.Deployed(trained).eval()(inputs)
    said = program(inputs)
    for name, values in batch.items():
        assert torch.isfinite(values).all()
        torch.testing.assert_close(said[name], values, rtol=1e-5, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["--drop", "audio=0.5"], r"expected modalities of the model \(text, vision\), got 'audio'"),
        (
            "predict",
            ["--text", "good"],
            r"^predict: text: expected text \(features\), .* there is: raw_text",
        ),
        ("predict", ["--text-encoder", "x", "--text", "good"], "--text-encoder: expected none"),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused(dataset, tmp_path, name, arguments, message):
    fake_checkpoint(tmp_path / "checkpoint", dataset, modalities=["text", "vision"])
    with pytest.raises(ValueError, match=message):
        command(name, tmp_path / "checkpoint", *arguments)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 5)), "audio: expected features as in training"),
        (np.ones((2, 5, 12)), r"expected audio as numbers \(T, d\) or \(d,\), got float64 of shape \(2, 5, 12\)"),
        (np.array(["a"]), "got <U1"),
    ],
    ids=["width", "3-D", "words"],
)
def test_arrays_that_do_not_fit_are_refused(checkpoint, tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        command("predict", checkpoint, "--audio", tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words\nhello\n", "expected a column named text or text_features or audio or vision, got words"),
        ("", "got nothing"),
        ("text\n", "expected at least one utterance, got none"),
        ("id,text\n1,a,b\n", "expected 2 cells in each line"),
        ("id,text\n1\n", "expected 2 cells in each line"),
        ("text,audio\nhello,\nhello,no.npy\n", r"new\.csv: audio: expected the name of a file, got 'no\.npy' in row 1"),
        ("id,text\na,b\n\x07,b\n", r"new\.csv: id: expected strings that can be written, got '\\x07' in row 1"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused(checkpoint, tmp_path, text, message):
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        command("predict", checkpoint, tmp_path / "new.csv")


def test_files_of_different_widths_are_both_named(checkpoint, tmp_path):
    for name, width in (("a", 12), ("b", 9)):
        np.save(tmp_path / f"{name}.npy", np.ones((2, width)))
    (tmp_path / "new.csv").write_text("audio\na.npy\n\nb.npy\n")
    with pytest.raises(ValueError, match=r"^audio: expected .*, got 12 in .*a\.npy and 9 in .*b\.npy$"):
        command("predict", checkpoint, tmp_path / "new.csv")


def test_a_pickle_in_an_npy_is_not_run(checkpoint, tmp_path):
    np.save(tmp_path / "a.npy", np.array([print]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"expected a file of numpy\.save"):
        command("predict", checkpoint, "--audio", tmp_path / "a.npy")
