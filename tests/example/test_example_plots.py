"""The figures: what is drawn, that it is labelled, and the numbers beside it."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mtmd.results import plots
from study_cases import read


@pytest.fixture
def figures(monkeypatch):
    """The figures that were finished, kept open to be looked at."""
    kept = []

    def keep(figure, path):
        figure.savefig(path, dpi=50)
        kept.append(figure)

    monkeypatch.setattr(plots, "save_figure", keep)
    yield kept
    for figure in kept:
        plt.close(figure)


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def make_steps(count, *, start=0.0):
    names = ("gt", "reg", "cls", "fusion", "feat_shared", "feat_specific")
    return [
        {name: start + number + 10.0 * place + 1 for place, name in enumerate(names)}
        | {"factor_text": 1 + number / 100, "factor_audio": 1 - number / 100, "factor_vision": 1 - number / 50}
        for number in range(count)
    ]


def labels(axes):
    """The names beside the lines, in the order of the lines."""
    found = {text.get_text() for text in axes.texts}
    return [line.get_label() for line in axes.get_lines() if line.get_label() in found]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_losses_are_means_of_five_steps_with_the_numbers_beside(tmp_path, figures):
    plots.plot_losses(make_steps(12), tmp_path / "losses.png")
    assert is_png(tmp_path / "losses.png")
    rows = read(tmp_path / "losses.csv")
    assert [row["step"] for row in rows] == ["1", "6", "11"]
    assert [float(row["gt"]) for row in rows] == [3.0, 8.0, 11.5]  # of 1..5, 6..10 and 11, 12
    assert [float(row["feat_specific"]) for row in rows] == [53.0, 58.0, 61.5]
    (figure,) = figures
    left, right = figure.axes
    assert left.get_yscale() == right.get_yscale() == "log"
    assert left.get_xlabel() == right.get_xlabel() == "training step"
    assert labels(left) == ["ground truth $L_{gt}$", "scores $L_{reg}$", "classes $L_{cls}$", "fusion $L_{fusion}$"]
    assert labels(right) == ["modality-shared:\nsupervised, Eq. 9", "modality-specific:\nKL, Eq. 11"]


def test_several_runs_give_mean_and_band_up_to_the_shortest(tmp_path, figures):
    runs = [make_steps(12), make_steps(7, start=4.0)]
    plots.plot_losses(runs, tmp_path / "losses.png", chosen=[5, 6])
    rows = read(tmp_path / "losses.csv")
    assert [row["step"] for row in rows] == ["1", "6"]
    assert [float(row["gt"]) for row in rows] == [5.0, 8.5]  # (3 + 7) / 2, and of the steps 6 and 7 alone
    assert float(rows[0]["gt_sd"]) == pytest.approx(np.std([3.0, 7.0], ddof=1), rel=1e-5)
    left, _ = figures[0].axes
    assert len(left.collections) == 4  # bands
    assert "chosen epochs" in [text.get_text() for text in left.texts]


def test_terms_that_were_switched_off_are_left_out_and_an_empty_panel_says_so(tmp_path, figures):
    steps = [{"gt": 1.0 + number, "feat_specific": 0.0} for number in range(6)]
    plots.plot_losses(steps, tmp_path / "losses.png", chosen=[3])
    left, right = figures[0].axes
    assert [text.get_text() for text in left.texts] == ["chosen epoch", "ground truth $L_{gt}$"]
    assert [text.get_text() for text in right.texts] == ["switched off in this experiment"]
    assert list(read(tmp_path / "losses.csv")[0]) == ["step", "gt"]


def test_a_narrow_range_of_losses_still_has_labels_on_its_axis(tmp_path, figures):
    steps = [{"gt": 5.2 + 0.3 * number} for number in range(11)]
    plots.plot_losses(steps, tmp_path / "losses.png")
    axes = figures[0].axes[0]
    low, high = axes.get_ylim()
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len(shown) >= 2
    assert all(label == f"{float(label):g}" for label in shown)


def test_factors_are_drawn_step_by_step(tmp_path, figures):
    plots.plot_factors(make_steps(8), tmp_path / "factors.png")
    rows = read(tmp_path / "factors.csv")
    assert [float(row["factor_audio"]) for row in rows] == pytest.approx([1 - number / 100 for number in range(8)])
    (axes,) = figures[0].axes
    assert labels(axes) == ["text", "audio", "vision"]
    assert axes.get_ylabel() == "fusion factor (moving average)"
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()[:3]}
    assert len(styles) == 3


def test_a_model_of_text_alone_has_one_factor_and_without_factors_none(tmp_path, figures):
    text = [{"gt": 1.0, "factor_text": 1.0} for _ in range(4)]
    plots.plot_factors(text, tmp_path / "factors.png")
    assert labels(figures[0].axes[0]) == ["text"]
    plots.plot_factors([{"gt": 1.0} for _ in range(4)], tmp_path / "none.png")
    assert [text.get_text() for text in figures[1].axes[0].texts] == ["switched off in this experiment"]


def test_the_embedding_has_a_panel_each_and_the_papers_signs(tmp_path, figures):
    scores = np.array([-1.0, -0.2, 0.0, 0.4, 3.0])
    points = {"before": np.arange(10.0).reshape(5, 2), "after": -np.arange(10.0).reshape(5, 2)}
    plots.plot_embedding(points, scores, list("abcde"), tmp_path / "tsne.png")
    rows = read(tmp_path / "tsne.csv")
    assert [row["id"] for row in rows] == list("abcde")
    assert (rows[4]["panel1_x"], rows[4]["panel1_y"], rows[4]["panel2_y"]) == ("8", "9", "-9")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "negative (2)",
        "neutral (1)",
        "positive (2)",
    ]
    for axes, values in zip(figure.axes, points.values(), strict=True):
        shown = [collection.get_offsets().tolist() for collection in axes.collections]
        assert shown == [values[:2].tolist(), values[2:3].tolist(), values[3:].tolist()]


def test_confusion_gives_shares_of_the_true_class(tmp_path, figures):
    counts = np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.5, 1.0]])
    plots.plot_confusion(counts, ["low", "none", "high"], tmp_path / "confusion.png")
    rows = read(tmp_path / "confusion.csv")
    assert len(rows) == 9
    assert rows[0] == {"true": "low", "predicted": "low", "count": "3", "percent": "75"}
    assert rows[7] == {"true": "high", "predicted": "none", "count": "0.5", "percent": "25"}
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == [
        "75",
        "25",
        "0",
        "25",
        "25",
        "50",
    ]  # a class without n: no share
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low\n(n = 4)", "none\n(n = 0)", "high\n(n = 2)"]
    assert figures[0].axes[1].get_ylabel() == "share of the true class (%)"


def test_errors_by_class_have_whiskers_over_runs(tmp_path, figures):
    errors = {"one": np.array([[1.0, 2.0], [3.0, np.nan]]), "two": np.array([[0.5, 0.25]])}
    plots.plot_errors(errors, ["low", "high"], [7, 5], tmp_path / "errors.png")
    rows = read(tmp_path / "errors.csv")
    assert rows[0] == {"experiment": "one", "class": "low", "n": "7", "mae_mean": "2", "mae_sd": "1.4142136"}
    assert rows[1]["mae_mean"] == ""  # not a number
    assert rows[3] == {"experiment": "two", "class": "high", "n": "5", "mae_mean": "0.25", "mae_sd": ""}
    (axes,) = figures[0].axes
    assert legend(axes) == ["one", "two"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["low\nn = 7", "high\nn = 5"]


def test_names_of_lines_that_end_at_one_height_stand_apart(tmp_path, figures):
    steps = [{f"factor_{name}": 1.0 for name in ("text", "audio", "vision")} | {"gt": 1.0} for _ in range(3)]
    plots.plot_factors(steps, tmp_path / "factors.svg")
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_the_name_says_the_format_and_the_same_numbers_give_the_same_bytes(ending, start, tmp_path):
    paths = [tmp_path / f"{number}.{ending}" for number in range(2)]
    for path in paths:
        plots.plot_factors(make_steps(3), path)
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(start)
    assert first == second


def test_colours_are_those_that_colour_blind_readers_can_tell_apart():
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(plots.COLOURS) <= okabe_ito
    assert len(set(plots.COLOURS)) == len(plots.COLOURS) == len(set(plots.HATCHES))
