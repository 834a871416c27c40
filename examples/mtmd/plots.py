"""The two figures of a run: the terms of the loss (Fig. 5) and the fusion factors (Fig. 7)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mtmd.model import MODALITIES

# Okabe and Ito's colours, which colour-blind readers can tell apart; the line styles differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def plot_losses(steps: list[dict[str, float]], path: Path, *, title: str) -> None:
    """Terms of Eq. 18 over the steps; on the right, L_feat in its two parts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labels = {
        "gt": "ground truth $L_{gt}$",
        "reg": "scores $L_{reg}$",
        "cls": "classes $L_{cls}$",
        "fusion": "fusion $L_{fusion}$",
    }
    draw(left, steps, labels, title="Predictions")
    labels = {"feat_shared": "modality-shared: supervised, Eq. 9", "feat_specific": "modality-specific: KL, Eq. 11"}
    draw(right, steps, labels, title="Features: the parts of $L_{feat}$")
    for axes in (left, right):
        axes.set(xlabel="training step", ylabel="loss")
        axes.set_yscale("log")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_factors(steps: list[dict[str, float]], path: Path, *, title: str) -> None:
    """The fusion factors over the steps."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    draw(axes, steps, {f"factor_{name}": name for name in MODALITIES}, smooth=1)
    axes.axhline(1.0, color="0.8", linewidth=1, zorder=0)
    axes.set(xlabel="training step", ylabel="fusion factor (moving average)", title=title)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(
    axes: plt.Axes, steps: list[dict[str, float]], labels: dict[str, str], *, title: str = "", smooth: int = 5
) -> None:
    """One line per term; as in the paper's Fig. 5, each point is the mean of `smooth` steps."""
    for (name, label), colour, style in zip(labels.items(), COLOURS, STYLES, strict=False):
        values = np.array([step[name] for step in steps])
        starts = np.arange(0, len(values), smooth)
        means = [values[start : start + smooth].mean() for start in starts]
        axes.plot(starts + 1, means, label=label, color=colour, linestyle=style, linewidth=1.6)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
