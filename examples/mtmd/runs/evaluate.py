"""`evaluate`: metrics of a fold, also with modalities taken away, and the curves over the share taken away."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmd.data.fold import Fold, data_sha256, drop_modalities, presence
from mtmd.data.own_format import open_dataset
from mtmd.files.checks import shown
from mtmd.files.writing import check_writable, write_json, write_rows
from mtmd.results.metrics import columns_of, mean_and_std, metrics_for, number
from mtmd.results.scores import Said
from mtmd.results.tables import metric_cells
from mtmd.runs.trained import (
    add_checkpoint_arguments,
    add_fold_argument,
    ask,
    load_trained,
    prepare_fold,
    without_modalities,
)
from mtmd.settings.cli import note, say
from mtmd.settings.config import MODALITIES
from mtmd.settings.options import a_number, a_path, add_format, at_least, one_of

RATES = tuple(round(0.1 * step, 1) for step in range(11))
DRAWS = 5


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=a_path, default=None, help="pickle or folder of the own format (default: what was trained on)"
    )
    add_fold_argument(data, "test", "what to score (default: test)")
    data.add_argument(
        "--drop",
        type=drop_rate,
        nargs="+",
        default=[],
        metavar="MODALITY=RATE",
        help="share of the samples that lose a modality, say audio=0.3 vision=0.5",
    )
    data.add_argument(
        "--robustness", action="store_true", help="drop each modality, and all, at --rates: a table and a figure"
    )
    data.add_argument(
        "--rates", type=a_share, nargs="+", metavar="RATE", help="shares for --robustness (default: 0 to 1 in tenths)"
    )
    data.add_argument(
        "--draws",
        type=at_least(1),
        metavar="N",
        help=f"how often to choose the samples anew; mean and deviation are over them (default: {DRAWS})",
    )
    data.add_argument(
        "--seed", type=at_least(0), metavar="SEED", help="of the first draw; the next ones count up (default: 0)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=a_path, default=None, help="folder for evaluation.json and the curves (default: none is written)"
    )
    add_format(output)


def run_evaluate(arguments: argparse.Namespace, console: Console) -> None:
    """Print the metrics; with --out, write them too."""
    rates = dict(arguments.drop)
    if len(rates) < len(arguments.drop):
        raise ValueError(f"--drop: expected each modality once, got {' '.join(name for name, _ in arguments.drop)}")
    for option, given, beside in (
        ("--rates", arguments.rates, arguments.robustness),
        ("--draws", arguments.draws, arguments.robustness or rates),
        ("--seed", arguments.seed, arguments.robustness or rates),
    ):
        if given is not None and not beside:
            wanted = "--robustness" if option == "--rates" else "--drop or --robustness"
            raise ValueError(f"{option}: expected {wanted} beside it, got it alone")
    if arguments.robustness and arguments.out is None:
        raise ValueError("--out: expected a folder for the curves of --robustness, got none")
    arguments.rates, arguments.draws = arguments.rates or list(RATES), arguments.draws or DRAWS
    arguments.seed = arguments.seed or 0
    if arguments.out is not None:
        check_writable(arguments.out, folder=True)
    from mtmd.runs.experiment import load_data  # here: it brings matplotlib, which `predict` does without

    trained = load_trained(arguments.checkpoint, text_encoder=arguments.text_encoder, device=arguments.device)
    for name in rates:
        if name not in trained.modalities:
            known = ", ".join(trained.modalities)
            raise ValueError(f"--drop: expected modalities of the model ({known}), got {name!r}")
    config = trained.config
    if arguments.data is None:
        dataset = load_data(config)
    else:  # named like the training data: of a file, that says between which numbers the scores lie
        name = "data" if config.data is None else config.dataset
        dataset = open_dataset(arguments.data, name=name)
    if trained.data_sha256 not in (dataset.fingerprint, data_sha256(dataset.folds, labels=True)):
        note(console, "these are not the data that the checkpoint was trained on")
    source = str(arguments.data or trained.config.data or dataset.name)
    fold = prepare_fold(dataset.folds[arguments.fold], trained, source=f"{source}: {arguments.fold}", complete=True)
    said = ask(trained, fold)
    measure = metrics_for(dataset.score_range)
    measured = by_branch(said, fold)

    report: dict[str, Any] = {
        "arguments": {
            "checkpoint": str(arguments.checkpoint),
            "data": None if arguments.data is None else str(arguments.data),
            "text_encoder": arguments.text_encoder,
            "fold": arguments.fold,
            "drop": rates,
            "rates": arguments.rates if arguments.robustness else None,
            "draws": arguments.draws,
            "seed": arguments.seed,
        },
        "config": trained.config.as_json(),  # of the checkpoint
        "dataset": {"name": dataset.name, "synthetic": dataset.synthetic, "sha256": dataset.fingerprint},
        "fold": arguments.fold,
        "samples": len(fold),
        "metrics": {row: measure(*pair) for row, pair in measured.items()},
    }
    fuse = without_modalities(trained, said, fold) if rates or arguments.robustness else None
    rows = [(row, len(measured[row][1]), metrics) for row, metrics in report["metrics"].items()]
    caption = "Accuracies and F1 in percent"
    if rates:
        found = dropped_metrics(fuse, fold, rates, arguments.seed, arguments.draws, measure)
        mean, std = mean_and_std(found)
        report["dropped"] = {"rates": rates, "seed": arguments.seed, "draws": found, "mean": mean, "std": std}
        rows += [("dropped", len(fold), mean), ("  ± sd", len(fold), std)]
        shares = ", ".join(f"{100 * rate:g} % {name}" for name, rate in rates.items())
        caption += f"\ndropped: fused, with {shares} taken away; {arguments.draws} draws"
    console.print(metrics_table(rows, title=f"{dataset.name}, {arguments.fold} fold", caption=caption))
    if arguments.robustness:
        curves = robustness(trained.modalities, fuse, fold, arguments.rates, arguments.seed, arguments.draws, measure)
        console.print(robustness_table(curves, arguments.draws))
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "evaluation.json", report)
    if arguments.robustness:
        write_curves(curves, arguments.out / "robustness.csv")
        draw_curves(curves, arguments.out / f"robustness.{arguments.format}")
    say(console, f"Written: {arguments.out.resolve()}")


def a_share(text: str) -> float:
    """A share, for argparse."""
    value = a_number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
    return value


def drop_rate(text: str) -> tuple[str, float]:
    """`audio=0.3`, for argparse."""
    name, equals, share = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected MODALITY=RATE, got {shown(text)}")
    return one_of(*MODALITIES)(name), a_share(share)


def by_branch(said: Said, fold: Fold) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores and targets: of the fused prediction, and of each branch over the samples that have its modality.

    Where the data hold labels of their own for a modality (CH-SIMS), the branch is held against these as well.
    """
    pairs = {"fused": (said.scores, fold.scores)}
    for name, scores in said.branch_scores.items():
        there = said.present[name]
        pairs[name] = scores[there], fold.scores[there]
        if name in fold.unimodal_scores:
            own = fold.unimodal_scores[name]
            labelled = there & np.isfinite(own)
            pairs[f"{name}, own labels"] = scores[labelled], own[labelled]
    return {row: pair for row, pair in pairs.items() if len(pair[1])}


def dropped_metrics(
    fuse: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    fold: Fold,
    rates: Mapping[str, float],
    seed: int,
    draws: int,
    measure: Any,
) -> list[dict[str, float]]:
    """Metrics of the fused prediction, for each draw of the samples that lose modalities."""
    folds = (drop_modalities(fold, rates, seed + draw) for draw in range(draws))
    return [measure(fuse(presence(dropped)), fold.scores) for dropped in folds]


def robustness(
    names: Sequence[str],
    fuse: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    fold: Fold,
    rates: Sequence[float],
    seed: int,
    draws: int,
    measure: Any,
) -> list[dict[str, Any]]:
    """One record for each modality, and for all of them, at each rate: means and deviations over the draws."""
    groups = {name: [name] for name in names} | ({"all": names} if len(names) > 1 else {})
    records = []
    for group, members in groups.items():
        for rate in sorted(set(rates)):
            found = dropped_metrics(fuse, fold, dict.fromkeys(members, rate), seed, draws, measure)
            mean, std = mean_and_std(found)
            records.append({"dropped": group, "rate": rate, "mean": mean, "std": std})
    return records


def curve_metrics(curves: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The three metrics that are drawn, with their labels."""
    names = curves[0]["mean"]
    accuracy = "acc2_non0" if "acc2_non0" in names else "acc2"
    return {"mae": "mean absolute error", "corr": "correlation", accuracy: "accuracy of two classes (%)"}


def metrics_table(rows: Sequence[tuple[str, int, Mapping[str, float | None]]], *, title: str, caption: str) -> Table:
    """A line for each row: name, samples, metrics."""
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("n", *columns_of(rows[0][2])):
        table.add_column(heading, justify="right", no_wrap=heading != "n")
    for label, count, metrics in rows:
        table.add_row(escape(label), str(count), *metric_cells(metrics))
    return table


def robustness_table(curves: Sequence[Mapping[str, Any]], draws: int) -> Table:
    """MAE by modality and rate."""
    table = Table(title="MAE where samples lose a modality", title_justify="left", caption_justify="left")
    table.caption = f"mean ± standard deviation over {draws} draws" if draws > 1 else "one draw"
    groups = list(dict.fromkeys(record["dropped"] for record in curves))
    table.add_column("rate", justify="right")
    for group in groups:
        table.add_column(group, justify="right", no_wrap=True)
    for rate in dict.fromkeys(record["rate"] for record in curves):
        here = {record["dropped"]: record for record in curves if record["rate"] == rate}
        cells = []
        for group in groups:
            spread = here[group]["std"]["mae"]
            cells.append(number("mae", here[group]["mean"]["mae"]) + ("" if spread is None else f" ± {spread:.3f}"))
        table.add_row(f"{100 * rate:g} %", *cells)
    return table


def write_curves(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per modality and rate: means, then deviations. Shares of 1; empty where there is no number."""

    def cell(value: float | None) -> str:
        return "" if value is None or not np.isfinite(value) else repr(float(value))

    names = list(curves[0]["mean"])
    rows = [["dropped", "rate", *names, *(f"{name}_std" for name in names)]]
    for record in curves:
        numbers = [record[kind][name] for kind in ("mean", "std") for name in names]
        rows.append([record["dropped"], record["rate"], *map(cell, numbers)])
    write_rows(path, rows)


def draw_curves(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Three panels over the share of samples that lose a modality, a line for each; bands: standard deviations."""
    from mtmd.results.plots import COLOURS, STYLES, label_lines, plt, save_figure, tidy

    panels = curve_metrics(curves)
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 4.2), layout="constrained")
    groups = list(dict.fromkeys(record["dropped"] for record in curves))
    for panel, (metric, label) in zip(axes, panels.items(), strict=True):
        factor = 100 if metric.startswith("acc") else 1
        for group, colour, style in zip(groups, COLOURS, STYLES, strict=False):
            chosen = [record for record in curves if record["dropped"] == group]
            rates = np.array([100 * record["rate"] for record in chosen])
            mean = factor * np.array([record["mean"][metric] for record in chosen], float)
            std = factor * np.array([record["std"][metric] or 0.0 for record in chosen], float)
            panel.plot(rates, mean, label=f"without {group}", color=colour, linestyle=style, marker="o", markersize=3)
            panel.fill_between(rates, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        panel.set(xlabel="samples that lose it (%)", ylabel=label)
        tidy(panel)
    label_lines(axes[-1])
    save_figure(figure, path)
