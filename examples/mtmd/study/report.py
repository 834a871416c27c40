"""`report`: figures and tables of finished experiments.

    python examples/mtmd_mosi.py report runs/full
    python examples/mtmd_mosi.py report runs/full --before runs/no_distillation
    python examples/mtmd_mosi.py report runs/full runs/no_distillation runs/text_only --out runs/report

Each figure has its numbers as CSV beside it, and report.md shows all of them and says what it was made with. Several
experiments are compared with the first one by a paired bootstrap; they must have been run on the same data.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from mtmd.files.writing import check_writable, write_text
from mtmd.results.bootstrap import RESAMPLES
from mtmd.results.compare import SIMS_LIMIT, Scores, compare_experiments, read_scores
from mtmd.results.metrics import SIMS_BORDERS
from mtmd.results.plots import plot_confusion, plot_embedding, plot_errors, plot_factors, plot_losses
from mtmd.results.records import load_experiment, read_representations, read_steps
from mtmd.results.tables import METRICS, Row, row_of, write_table
from mtmd.settings.cli import say
from mtmd.settings.config import MODALITIES
from mtmd.settings.options import a_path, add_format, at_least

# What the paper reports for MTMD (Table I): Acc7, Acc2 and F1 (negative/non-negative, negative/positive), MAE, Corr.
PAPER = {"mosi": (47.5, 84.0, 86.0, 83.9, 86.0, 0.705, 0.799), "mosei": (53.7, 84.8, 86.1, 84.9, 85.9, 0.531, 0.767)}
SEVEN = ("-3", "-2", "-1", "0", "+1", "+2", "+3")
SIMS_FIVE = ("≤ -0.7", "≤ -0.1", "≤ 0.1", "≤ 0.7", "> 0.7")
ERRORS = (
    "Mean absolute error of the fused prediction by true class, {}; whiskers: one standard deviation over the seeds, "
    "where there are several."
)
MOST = 7  # experiments in a report: more colours cannot be told apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `report`."""
    data = parser.add_argument_group("data")
    data.add_argument("folders", type=a_path, nargs="+", metavar="DIR", help="--out of a finished experiment")
    data.add_argument(
        "--before",
        type=a_path,
        metavar="DIR",
        help="experiment without distillation, the 'before' of Fig. 6; default: the same model before any training",
    )
    data.add_argument("--seed", type=at_least(0), metavar="SEED", help="run that Fig. 6 shows (default: the first)")
    data.add_argument(
        "--resamples",
        type=at_least(1),
        default=RESAMPLES,
        metavar="N",
        help=f"draws of the bootstrap (default: {RESAMPLES})",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=a_path, metavar="DIR", help="where to write (default: 'report' in the first DIR)")
    add_format(output)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Draw and write everything that the folders have."""
    if len(arguments.folders) > MOST:
        raise ValueError(f"report: expected at most {MOST} folders, got {len(arguments.folders)}")
    names = short_names(arguments.folders)
    out = arguments.out or arguments.folders[0] / "report"
    check_writable(out, folder=True)
    experiments = [Experiment.load(folder, name) for folder, name in zip(arguments.folders, names, strict=True)]
    before = Experiment.load(arguments.before, arguments.before.resolve().name) if arguments.before else None
    out.mkdir(parents=True, exist_ok=True)

    parts = []
    table = write_results(experiments, out / "results", resamples=arguments.resamples)
    parts.append((out / "results.md").read_text(encoding="utf-8"))
    console.print(table)
    if len(experiments) > 1:
        errors = {one.name: one.error_by_class() for one in experiments}
        first = experiments[0]
        name = f"error_by_class.{arguments.format}"
        plot_errors(errors, first.class_names, first.class_sizes(), out / name)
        parts.append(picture(name, ERRORS.format(first.where)))
    for one in experiments:
        folder = out / one.name if len(experiments) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{one.name}/" if len(experiments) > 1 else ""
        parts.append(f"## {one.name}\n")
        parts += [
            picture(f"{prefix}{name}.{arguments.format}", text)
            for name, text in draw_figures(one, before, folder, arguments.seed, arguments.format)
        ]
    parts.append(made_with(arguments))
    write_text(out / "report.md", "\n".join(parts))
    say(console, f"Report: {out / 'report.md'}")


def made_with(arguments: argparse.Namespace) -> str:
    """The end of report.md: what the same report is made from, paths as they were given."""
    lines = [
        f"experiments: {', '.join(f'`{folder}`' for folder in arguments.folders)}",
        f"before, in Fig. 6: {f'`{arguments.before}`' if arguments.before else 'the same model before training'}",
        f"seed, in Fig. 6: {'the first of each experiment' if arguments.seed is None else arguments.seed}",
        f"resamples of the bootstrap: {arguments.resamples}",
    ]
    return "\n".join(["## Made with", "", *(f"- {line}" for line in lines)]) + "\n"


def picture(name: str, text: str) -> str:
    """A figure and a link to its numbers, in Markdown."""
    return f"![{text}]({name})\n\n{text} Numbers: [{Path(name).stem}.csv]({Path(name).with_suffix('.csv')})\n"


def short_names(folders: Sequence[Path]) -> list[str]:
    """What to call each experiment: the last part of its path, or more of it where two are the same."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise ValueError("report: expected each folder once")
    for parts in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["_".join(part for part in path.parts[-parts:] if part != path.anchor) for path in whole]
        if len(set(names)) == len(names):
            break
    return names


# An experiment folder


@dataclass
class Experiment:
    """What a finished experiment left, as the figures need it."""

    name: str
    folder: Path
    results: dict[str, Any]
    test: Scores
    steps: dict[int, list[dict[str, float]]] = field(default_factory=dict)  # by seed
    representations: dict[int, dict[str, np.ndarray] | None] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Experiment":
        """Read all of it, so that a damaged file is told before anything is written."""
        if not (folder / "results.json").is_file():
            inside = ", ".join(sorted(path.parent.name for path in folder.glob("*/results.json")))
            got = "one without results.json" if folder.is_dir() else "no folder"
            raise ValueError(
                f"{folder}: expected the folder of one experiment, got {got}"
                + (f"; experiments in it: {inside}" if inside else "")
            )
        one = cls(name, folder, load_experiment(folder), read_scores(folder))
        if one.is_sims:
            one.test = replace(one.test, scores=np.clip(one.test.scores, -SIMS_LIMIT, SIMS_LIMIT))
        for seed in one.seeds:
            one.steps[seed] = read_steps(folder / f"steps_seed{seed}.csv")
            one.representations[seed] = read_representations(folder / f"representations_seed{seed}.npz", one.test.ids)
        return one

    @property
    def seeds(self) -> list[int]:
        return [one["seed"] for one in self.results["runs"]]

    @property
    def is_sims(self) -> bool:
        return "acc3" in self.results["runs"][0]["test"]

    @property
    def where(self) -> str:
        """What it was trained on, for titles."""
        dataset = self.results["dataset"]
        known = {"mosi": "CMU-MOSI", "mosei": "CMU-MOSEI", "sims": "CH-SIMS"}
        return "synthetic data" if dataset["synthetic"] else known.get(dataset["name"].lower(), dataset["name"])

    @property
    def branches(self) -> list[str]:
        """The modalities whose branches predict by themselves."""
        every = [one["test_unimodal"] for one in self.results["runs"]]
        return [name for name in MODALITIES if all(name in one for one in every)]

    @property
    def class_names(self) -> tuple[str, ...]:
        return SIMS_FIVE if self.is_sims else SEVEN

    def classes(self, scores: np.ndarray) -> np.ndarray:
        """The class of each score, counted from 0, as Acc7 has it (CH-SIMS: Acc5)."""
        if self.is_sims:
            return np.digitize(scores.astype(np.float32), np.float32(SIMS_BORDERS[5]), right=True)
        return np.round(np.clip(scores, -3, 3)).astype(int) + 3

    def class_sizes(self) -> list[int]:
        return np.bincount(self.classes(self.test.targets), minlength=len(self.class_names)).tolist()

    def confusion(self) -> np.ndarray:
        """How often a true class (row) is predicted as each class (column), mean over the runs."""
        size = len(self.class_names)
        true = np.broadcast_to(self.classes(self.test.targets), self.test.scores.shape)
        pairs = true * size + self.classes(self.test.scores)
        return np.bincount(pairs.ravel(), minlength=size * size).reshape(size, size) / len(self.test.seeds)

    def error_by_class(self) -> np.ndarray:
        """MAE by true class, (runs, C); NaN where there is no utterance of a class."""
        true, errors = self.classes(self.test.targets), np.abs(self.test.scores - self.test.targets)
        return np.stack(
            [
                errors[:, true == kind].mean(axis=1) if (true == kind).any() else np.full(len(errors), np.nan)
                for kind in range(len(self.class_names))
            ],
            axis=1,
        )


# Tables


def write_results(experiments: Sequence[Experiment], path: Path, *, resamples: int) -> Any:
    """Fused predictions and branches of all experiments, compared with the first one."""
    first = experiments[0]
    rows: list[Row] = []
    for branch in (None, *MODALITIES):
        having = [one for one in experiments if branch is None or branch in one.branches]
        part = "fused prediction" if branch is None else f"{branch} branch"
        for one in having:
            metrics = [
                entry["test"] if branch is None else entry["test_unimodal"][branch] for entry in one.results["runs"]
            ]
            row = row_of(one.name, one.name, metrics, part=part)
            if one is not first and first in having:
                row.over_utterances, row.over_seeds = compare_experiments(
                    one.folder,
                    first.folder,
                    column=branch or "score",
                    limit=SIMS_LIMIT if one.is_sims else None,
                    resamples=resamples,
                )
            rows.append(row)
        if branch is None and not first.results["dataset"]["synthetic"]:
            printed = PAPER.get(first.results["dataset"]["name"].lower())
            if printed:
                values = dict(zip(METRICS, ((value, None) for value in printed), strict=True))
                rows.append(Row("paper", "MTMD (paper)", values=values, part=part))
    title = f"Results on {first.where}"
    return write_table(
        rows,
        path,
        title=title,
        against=first.name,
        notes=["A branch predicts alone, on the samples that have its modality."],
    )


# Figures


def draw_figures(
    one: Experiment, before: Experiment | None, folder: Path, seed: int | None, ending: str
) -> list[tuple[str, str]]:
    """All figures of an experiment; name, to which a file adds the ending, and caption of each one drawn."""
    drawn = []
    logged = [(entry, steps) for entry in one.results["runs"] if (steps := one.steps[entry["seed"]])]
    if logged:
        runs = [steps for _, steps in logged]
        over = f"mean of {len(runs)} seeds" if len(runs) > 1 else f"seed {logged[0][0]['seed']}"
        chosen = [entry["best_epoch"] * len(steps) / entry["epochs"] for entry, steps in logged]
        about = (
            f"over the training steps, {one.where}, {over}{'; bands: one standard deviation' if len(runs) > 1 else ''}"
        )
        plot_losses(runs, folder / f"losses.{ending}", chosen=chosen)
        drawn.append(("losses", f"Terms of the loss {about} (Fig. 5)."))
        if any(name.startswith("factor_") for name in runs[0][0]):
            plot_factors(runs, folder / f"fusion_factors.{ending}", chosen=chosen)
            drawn.append(("fusion_factors", f"Momentum fusion factors {about} (Fig. 7)."))
    shown = one.seeds[0] if seed is None else seed
    if shown not in one.seeds:
        raise ValueError(
            f"--seed: expected one of {', '.join(map(str, one.seeds))}, the runs of {one.name}, got {seed}"
        )
    text = draw_embedding(one, before, shown, folder / f"tsne.{ending}")
    if text:
        drawn.append(("tsne", text))
    over = f"mean of {len(one.seeds)} seeds" if len(one.seeds) > 1 else f"seed {one.seeds[0]}"
    kinds = "five" if one.is_sims else "seven"
    plot_confusion(one.confusion(), one.class_names, folder / f"confusion.{ending}")
    drawn.append(("confusion", f"Confusion of the {kinds} classes on the test fold, {one.where}, {over}."))
    errors = {one.name: one.error_by_class()}
    plot_errors(errors, one.class_names, one.class_sizes(), folder / f"error_by_class.{ending}")
    drawn.append(("error_by_class", ERRORS.format(one.where)))
    return drawn


def draw_embedding(one: Experiment, before: Experiment | None, seed: int, path: Path) -> str:
    """Fig. 6: representations of the test fold before and after distillation. Returns the caption; empty: no file."""
    after = one.representations[seed]
    if after is None or len(after["ids"]) < 2:  # t-SNE makes no plane of one
        return ""
    ids, scores = [str(name) for name in after["ids"]], after["scores"]
    if before is None or before.folder.resolve() == one.folder.resolve():
        earlier, headings = after["initial"], ("before training", "after training")
    else:
        other_seed = seed if seed in before.seeds else before.seeds[0]
        other = before.representations[other_seed]
        if other is None:
            raise ValueError(f"--before: expected a file representations_seed{other_seed}.npz in {before.folder}")
        if [str(name) for name in other["ids"]] != ids:
            raise ValueError(f"--before: expected the test utterances of {one.folder}, got others in {before.folder}")
        which = before.name if other_seed == seed else f"{before.name}, seed {other_seed}"
        earlier, headings = other["features"], (f"before: {which}", f"after: {one.name}")
    panels, apart = {}, []
    for heading, features in zip(headings, (earlier, after["features"]), strict=True):
        apart.append(round(separation(features, scores), 2) + 0.0)  # + 0.0: no negative zero
        panels[f"{heading}\nseparation of the three classes: {apart[-1]:.2f}"] = embed(features)
    plot_embedding(panels, scores, ids, path)
    return (
        f"t-SNE of the fused representations of the test fold, {one.where}, {' and '.join(headings)}, seed {seed} "
        f"(Fig. 6). Separation: mean silhouette in all dimensions, {apart[0]:.2f} and {apart[1]:.2f}; 1: best, 0: none."
    )


def embed(features: np.ndarray) -> np.ndarray:
    """The plane of t-SNE, (n, 2)."""
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)


def separation(features: np.ndarray, scores: np.ndarray) -> float:
    """Mean silhouette of the signs of the scores, in the space that t-SNE starts from; NaN with a single sign."""
    signs = np.sign(scores)
    return float(silhouette_score(features, signs)) if 1 < len(set(signs)) < len(signs) else float("nan")
