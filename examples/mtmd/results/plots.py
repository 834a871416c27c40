"""The figures: losses (Fig. 5), representations (Fig. 6), fusion factors (Fig. 7), confusion and error by class.

Each function draws a picture, in the format that the name of the file says, and writes what is drawn as a CSV of the
same name beside it. What a picture is about stands in the caption, not in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from mtmd.files.writing import replacing
from mtmd.results.tables import write_csv
from mtmd.settings.config import MODALITIES

matplotlib.use("Agg")

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles, markers and hatches differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
plt.rcParams |= {"svg.hashsalt": "mtmd", "pdf.fonttype": 42}  # the same bytes each time; letters, not outlines
SMOOTH = 5  # as in the paper's Fig. 5, each point of a loss is the mean of so many steps

Steps = Sequence[Mapping[str, float]]  # the records of one run, one per optimiser step


def plot_losses(steps: Steps | Sequence[Steps], path: Path, *, chosen: Sequence[float] = ()) -> None:
    """Terms of Eq. 18 over the steps; on the right, L_feat in its two parts.

    Of several runs: their mean, with a band of one standard deviation, as far as the shortest goes. `chosen` are the
    steps after which the runs' weights were kept.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    labels = {
        "gt": "ground truth $L_{gt}$",
        "reg": "scores $L_{reg}$",
        "cls": "classes $L_{cls}$",
        "fusion": "fusion $L_{fusion}$",
    }
    drawn = draw(left, steps, labels, title="Predictions")
    labels = {"feat_shared": "modality-shared:\nsupervised, Eq. 9", "feat_specific": "modality-specific:\nKL, Eq. 11"}
    drawn |= draw(right, steps, labels, title="Features: the parts of $L_{feat}$")
    for axes in (left, right):
        axes.set(xlabel="training step", ylabel="loss (logarithmic)")
        if axes.get_lines():
            logarithmic(axes)
            mark_chosen(axes, chosen)
            label_lines(axes)
        else:
            say_switched_off(axes)
    save_figure(figure, path)
    write_columns(path, drawn)


def plot_factors(steps: Steps | Sequence[Steps], path: Path, *, chosen: Sequence[float] = ()) -> None:
    """The fusion factors over the steps; of several runs as in `plot_losses`."""
    figure, axes = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    drawn = draw(axes, steps, {f"factor_{name}": name for name in MODALITIES}, smooth=1)
    axes.set(xlabel="training step", ylabel="fusion factor (moving average)")
    if axes.get_lines():
        axes.axhline(1.0, color="0.8", linewidth=1, zorder=0)
        mark_chosen(axes, chosen)
        axes.ticklabel_format(axis="y", useOffset=False)
        label_lines(axes)
    else:
        say_switched_off(axes)
    save_figure(figure, path)
    write_columns(path, drawn)


def draw(
    axes: plt.Axes, steps: Steps | Sequence[Steps], labels: Mapping[str, str], *, title: str = "", smooth: int = SMOOTH
) -> dict[str, np.ndarray]:
    """One line per term that there is; each point is the mean of `smooth` steps. Returns what was drawn."""
    runs = [steps] if steps and isinstance(steps[0], Mapping) else list(steps)
    length = min(len(run) for run in runs)
    starts = np.arange(0, length, smooth)
    drawn: dict[str, np.ndarray] = {"step": starts + 1}
    for (name, label), colour, style in zip(labels.items(), COLOURS, STYLES, strict=False):
        if not all(name in run[0] for run in runs):
            continue
        values = np.array([[step[name] for step in run[:length]] for run in runs], dtype=np.float64)
        if not values.any():  # a part that is switched off may be logged as 0
            continue
        points = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, length])
        drawn[name] = mean = points.mean(axis=0)
        marker = "o" if len(starts) == 1 else None  # a line has no length then
        axes.plot(starts + 1, mean, label=label, color=colour, linestyle=style, linewidth=1.6, marker=marker)
        if len(runs) > 1:
            drawn[f"{name}_sd"] = spread = points.std(axis=0, ddof=1)
            # No 0 on a logarithmic axis.
            low = np.where(mean > 0, np.maximum(mean - spread, 0.05 * mean), mean - spread)
            axes.fill_between(starts + 1, low, mean + spread, color=colour, alpha=0.18, linewidth=0)
    axes.set_title(title, pad=16)  # between them stands what `mark_chosen` says
    tidy(axes)
    return drawn


def logarithmic(axes: plt.Axes) -> None:
    """A logarithmic y axis that is labelled with plain numbers, also where it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 4 * low else range(1, 10)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def mark_chosen(axes: plt.Axes, chosen: Sequence[float]) -> None:
    """Where the weights that are kept were reached."""
    for step in chosen:
        axes.axvline(step, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    if chosen:
        text = "chosen epoch" if len(chosen) == 1 else "chosen epochs"
        place = (float(np.mean(chosen)), 1.01)
        axes.text(*place, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=8, color="0.35")


def label_lines(axes: plt.Axes, *, apart: float = 0.055) -> None:
    """The name of each line at its right end, at least `apart` of the height from the next."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    last = max(line.get_xdata()[-1] for line in lines)
    if last > min(line.get_xdata()[0] for line in lines):
        axes.set_xlim(right=last)  # so that the names stand beside the frame, and over no line of it
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.get_xdata()[-1], line.get_ydata()[-1])) for line in lines]
    order = np.argsort([height for _, height in ends])
    heights = np.array([height for _, height in ends])[order]
    for _ in range(100):  # neighbours push each other away
        overlap = apart - np.diff(heights)
        if (overlap <= 1e-9).all():
            break
        for place in np.flatnonzero(overlap > 0):
            heights[place : place + 2] += np.array([-0.5, 0.5]) * (apart - (heights[place + 1] - heights[place]))
    for number, height in zip(order, heights, strict=True):
        axes.annotate(
            lines[number].get_label(),
            xy=(ends[number][0], height),
            xytext=(6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=lines[number].get_color(),
        )


def plot_embedding(panels: Mapping[str, np.ndarray], scores: np.ndarray, ids: Sequence[str], path: Path) -> None:
    """Points of the plane by sentiment, a panel each: `{heading: (n, 2)}`. The paper's colours and signs (Fig. 6)."""
    kinds = {
        "negative": (scores < 0, COLOURS[4], "x"),
        "neutral": (scores == 0, "#7F7F7F", "D"),
        "positive": (scores > 0, COLOURS[0], "o"),
    }
    figure, every = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 5.2), layout="constrained", squeeze=False)
    for axes, (heading, points) in zip(every[0], panels.items(), strict=True):
        for name, (chosen, colour, marker) in kinds.items():
            outline = {} if marker == "x" else {"edgecolors": "white", "linewidths": 0.4}
            axes.scatter(
                *points[chosen].T, s=26, color=colour, marker=marker, label=f"{name} ({chosen.sum()})", **outline
            )
        axes.set_title(heading)
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = every[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
    records = []
    for place, name in enumerate(ids):
        record = {"id": name, "target": float(scores[place])}
        for number, points in enumerate(panels.values(), start=1):
            record |= {f"panel{number}_x": float(points[place, 0]), f"panel{number}_y": float(points[place, 1])}
        records.append(record)
    write_csv(path.with_suffix(".csv"), records)


def plot_confusion(counts: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """How often each true class (row) is predicted as each class (column): counts (C, C), averaged over runs."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = 100 * np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    figure, axes = plt.subplots(figsize=(6.6, 5.6), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(shares.shape):
        if totals[row] > 0:
            colour = "white" if shares[row, column] > 55 else "black"
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=colour)
    places = np.arange(len(classes))
    axes.set_xticks(places, classes)
    axes.set_yticks(places, [f"{name}\n(n = {total:.0f})" for name, total in zip(classes, totals[:, 0], strict=True)])
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="share of the true class (%)", shrink=0.85)
    save_figure(figure, path)
    write_csv(
        path.with_suffix(".csv"),
        [
            {"true": classes[row], "predicted": classes[column], "count": counts[row, column], "percent": share}
            for (row, column), share in np.ndenumerate(shares)
        ],
    )


def plot_errors(errors: Mapping[str, np.ndarray], classes: Sequence[str], sizes: Sequence[int], path: Path) -> None:
    """MAE by true class: `{experiment: (runs, C)}`; bars are means over the runs, whiskers one standard deviation."""
    width = 0.8 / len(errors)
    figure, axes = plt.subplots(
        figsize=(min(16, max(6.5, 2.5 + 0.35 * len(classes) * len(errors))), 4.4), layout="constrained"
    )
    places, records = np.arange(len(classes)), []
    for number, (name, values) in enumerate(errors.items()):
        mean = values.mean(axis=0)
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
        axes.bar(
            places + (number - (len(errors) - 1) / 2) * width,
            mean,
            0.92 * width,
            yerr=spread,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            linewidth=0,
            error_kw={"elinewidth": 1.1, "capsize": 3, "ecolor": "0.15"},
        )
        for place, (kind, size) in enumerate(zip(classes, sizes, strict=True)):
            record = {"experiment": name, "class": kind, "n": size, "mae_mean": float(mean[place])}
            records.append(record | {"mae_sd": None if spread is None else float(spread[place])})
    axes.set_xticks(places, [f"{name}\nn = {size}" for name, size in zip(classes, sizes, strict=True)])
    axes.set(xlabel="true class", ylabel="mean absolute error (score)")
    tidy(axes)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    if len(errors) > 1:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(4, len(errors)))
    save_figure(figure, path)
    write_csv(path.with_suffix(".csv"), records)


def say_switched_off(axes: plt.Axes) -> None:
    """In place of lines that an experiment does not have."""
    axes.text(0.5, 0.5, "switched off in this experiment", transform=axes.transAxes, ha="center", color="0.4")
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")


def tidy(axes: plt.Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """In the format that the name says, with the same bytes each time."""
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=150, metadata=dated.get(path.suffix))
    plt.close(figure)


def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """The drawn lines as a CSV beside the figure."""
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    write_csv(path.with_suffix(".csv"), [dict(zip(columns, row, strict=True)) for row in rows])
