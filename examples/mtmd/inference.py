"""What a trained model is for: scoring a fold, predicting what is new, leaving Python.

- `evaluate`: metrics of a fold, also with modalities taken away, and the curves over the share taken away.
- `predict`: scores for one utterance or a file of them. What is not given is a missing modality.
- `export`: the model with its feature scaling as a torch.export program, which needs none of this code.

Widths, scaling and what text is read as come from the checkpoint, never from the data.
"""

import argparse
import csv
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from mtmd.checkpoint import check_writable, load_checkpoint, replacing, write_json
from mtmd.cli import note
from mtmd.config import MODALITIES, Config, a_number, a_path, add_format, at_least, one_of
from mtmd.data import (
    FOLDS,
    FORMS,
    Batch,
    DataError,
    Fold,
    Standardizer,
    batches,
    drop_modalities,
    key_names,
    presence,
)
from mtmd.files import is_plain, read_npy, read_table, shown
from mtmd.metrics import metrics_for
from mtmd.model import MTMD, TEACHER
from mtmd.needs import TextReader, check_encoder, keys_of, lack, text_reader, with_text
from mtmd.own_format import load_fold, open_dataset
from mtmd.processes import choose_device

try:
    from torch.export._patches import register_lstm_while_loop_decomposition
except ImportError:  # torch 2.13 has it, 2.9 does not
    register_lstm_while_loop_decomposition = None

BATCH_SIZE = 64
RATES = tuple(round(0.1 * step, 1) for step in range(11))
DRAWS = 5
CHECKPOINT = "checkpoint_seed*.safetensors of an experiment"

# Columns of the table of metrics; two in one are negative/non-negative, then negative/positive.
COLUMNS = {
    "Acc7": ("acc7",),
    "Acc5": ("acc5",),
    "Acc3": ("acc3",),
    "Acc2": ("acc2_has0", "acc2_non0", "acc2"),
    "F1": ("f1_has0", "f1_non0", "f1"),
    "MAE": ("mae",),
    "Corr": ("corr",),
}


# A trained model and what it says


@dataclass(frozen=True)
class Trained:
    """A checkpoint: the model in eval mode and what is needed to feed it."""

    model: MTMD
    standardizer: Standardizer
    config: Config
    widths: dict[str, int]  # of the features in the data it was trained on
    classes: tuple[str, ...]
    data_sha256: str
    device: torch.device

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model has a branch for."""
        return self.model.modalities

    @property
    def reads_tokens(self) -> bool:
        """Whether text comes as tokens for a pretrained encoder; if not, as features."""
        return "text" in self.modalities and self.config.text_encoder != "features"

    @property
    def read_widths(self) -> dict[str, int]:
        """Widths of the features that the model reads."""
        names = [name for name in self.modalities if not (name == "text" and self.reads_tokens)]
        return {name: self.widths[name] for name in names}


@dataclass(frozen=True)
class Said:
    """What the model says about the n samples of a fold."""

    scores: np.ndarray  # (n,) of the fused prediction
    probabilities: np.ndarray  # (n, 3)
    branch_scores: dict[str, np.ndarray]  # (n,) by modality; meaningless where the sample does not have it
    features: dict[str, Tensor]  # (n, d) by modality, what fusion reads
    present: dict[str, np.ndarray]  # (n,) bool by modality


def load_trained(path: Path, *, text_encoder: str | None = None, device: str = "cpu") -> Trained:
    """Load a checkpoint.

    Args:
        path: Of its .safetensors or .json file, or without the ending.
        text_encoder: Where the tokenizer of the text encoder lies now, if not where it lay in training.
        device: "cpu", "cuda" or "auto".
    """
    place = choose_device(device)
    if text_encoder is not None:
        check_encoder(Config(text_encoder=text_encoder))
    model, standardizer, about = load_checkpoint(path)
    config = Config.from_json(about["config"], source=str(path))
    if text_encoder is not None:
        if config.text_encoder == "features":
            raise ValueError("--text-encoder: expected none, for this checkpoint reads text as features")
        config = dataclasses.replace(config, text_encoder=text_encoder)
    return Trained(
        model=model.to(place).requires_grad_(False),
        standardizer=standardizer,
        config=config,
        widths=about["widths"],
        classes=tuple(about["classes"]),
        data_sha256=about["data_sha256"],
        device=place,
    )


def prepare_fold(fold: Fold, trained: Trained, *, source: str = "data", complete: bool = False) -> Fold:
    """The fold as the model reads it: scaled, tokenised, without what it does not know, missing where there is nothing.

    Args:
        fold: What to read.
        trained: The model.
        source: Begins error messages.
        complete: Whether there must be every modality of the model, as in training.

    Raises:
        ValueError: If features have another width than in training, or the text is in a form the model cannot read.
    """
    there, text = keys_of(fold), TextReader("features")
    asked = [name for name in trained.modalities if complete or any(there.get(form) for form in FORMS[name])]
    if trained.reads_tokens and TEACHER in asked:
        text = text_reader(trained.config, trained.model.branches[TEACHER].encoder)
    fault = lack(asked, dict.fromkeys(there, True), text)
    if fault:
        raise DataError(f"{source}: {fault}")
    features, lengths = {}, {}
    for name, width in trained.read_widths.items():
        if name in fold.features:
            features[name], lengths[name] = fold.features[name], fold.lengths[name]
        else:
            features[name] = np.zeros((len(fold), 1, width), np.float32)
            lengths[name] = np.zeros(len(fold), np.int64)
    if TEACHER in asked:
        fold = with_text(fold, text, trained.config.max_tokens, source)
    else:
        no_tokens = np.zeros((len(fold), 3, 1), np.int64)
        fold = dataclasses.replace(fold, text_bert=no_tokens if trained.reads_tokens else None)
    try:
        return trained.standardizer.apply(dataclasses.replace(fold, features=features, lengths=lengths))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


@torch.no_grad()
def ask(trained: Trained, fold: Fold, *, batch_size: int = BATCH_SIZE) -> Said:
    """What the model says about a prepared fold."""
    model = trained.model.eval()
    scores, logits = [], []
    branches: dict[str, list[Tensor]] = {name: [] for name in trained.modalities}
    features: dict[str, list[Tensor]] = {name: [] for name in trained.modalities}
    for batch in batches(fold, batch_size, device=trained.device):
        outputs = model(batch)
        scores.append(outputs.fused.scores)
        logits.append(outputs.fused.logits)
        for name in branches:
            branches[name].append(outputs.unimodal[name].scores)
            features[name].append(outputs.unimodal[name].features)
    present = presence(fold)
    return Said(
        scores=torch.cat(scores).float().cpu().numpy(),
        probabilities=torch.cat(logits).float().softmax(dim=1).cpu().numpy(),
        branch_scores={name: torch.cat(parts).float().cpu().numpy() for name, parts in branches.items()},
        features={name: torch.cat(parts) for name, parts in features.items()},
        present={name: present[name] for name in branches},
    )


def without_modalities(trained: Trained, said: Said, fold: Fold) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """A function of which samples have which modality (n,) that gives the fused scores (n,).

    A missing modality is left out at fusion and changes nothing else, so the branches need not run again.
    """
    if trained.model.fusion is None:  # a single modality: there is what the model says without it, or with it
        (only,) = trained.modalities
        blind = ask(trained, drop_modalities(fold, {only: 1.0}, seed=0)).scores
        return lambda present: np.where(present[only], said.scores, blind)

    @torch.no_grad()
    def fuse(present: Mapping[str, np.ndarray]) -> np.ndarray:
        masks = {name: torch.from_numpy(present[name]).to(trained.device) for name in said.features}
        return trained.model.fusion(said.features, masks).scores.float().cpu().numpy()

    return fuse


# evaluate


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=a_path, default=None, help="pickle or folder of the own format (default: what was trained on)"
    )
    _add_fold_argument(data, "test", "what to score (default: test)")
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
        "--rates",
        type=a_share,
        nargs="+",
        metavar="RATE",
        help="shares for --robustness (default: 0 to 1 in tenths)",
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
    from mtmd.experiment import load_data  # here: it brings matplotlib, which `predict` does without

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
    if dataset.fingerprint != trained.data_sha256:
        note(console, "these are not the data that the checkpoint was trained on")
    source = str(arguments.data or trained.config.data or dataset.name)
    fold = prepare_fold(dataset.folds[arguments.fold], trained, source=f"{source}: {arguments.fold}", complete=True)
    said = ask(trained, fold)
    measure = metrics_for(dataset.score_range)

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
        "metrics": metrics_by_branch(said, fold, measure),
    }
    fuse = without_modalities(trained, said, fold) if rates or arguments.robustness else None
    rows = [(name, said_of(name, said, fold), metrics) for name, metrics in report["metrics"].items()]
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
    console.print(f"Written: {arguments.out.resolve()}", markup=False, highlight=False, soft_wrap=True)


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


def metrics_by_branch(said: Said, fold: Fold, measure: Any) -> dict[str, dict[str, float]]:
    """Metrics of the fused prediction, and of each branch over the samples that have its modality.

    Where the data hold labels of their own for a modality (CH-SIMS), the branch is held against these as well.
    """
    metrics = {"fused": measure(said.scores, fold.scores)}
    for name, scores in said.branch_scores.items():
        there = said.present[name]
        if not there.any():
            continue
        metrics[name] = measure(scores[there], fold.scores[there])
        own = fold.unimodal_scores.get(name)
        if own is not None:
            labelled = there & np.isfinite(own)
            if labelled.any():
                metrics[f"{name}, own labels"] = measure(scores[labelled], own[labelled])
    return metrics


def said_of(row: str, said: Said, fold: Fold) -> int:
    """How many samples stand behind a row of :func:`metrics_by_branch`."""
    if row == "fused":
        return len(said.scores)
    name = row.removesuffix(", own labels")
    there = said.present[name]
    return int(there.sum() if name == row else (there & np.isfinite(fold.unimodal_scores[name])).sum())


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


def mean_and_std(found: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Over the draws; the deviation is that of a sample (ddof 1), None for a single draw."""
    values = {name: np.array([metrics[name] for metrics in found]) for name in found[0]}
    mean = {name: float(array.mean()) for name, array in values.items()}
    return mean, {name: float(array.std(ddof=1)) if len(array) > 1 else None for name, array in values.items()}


def curve_metrics(curves: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The three metrics that are drawn, with their labels."""
    names = curves[0]["mean"]
    accuracy = "acc2_non0" if "acc2_non0" in names else "acc2"
    return {"mae": "mean absolute error", "corr": "correlation", accuracy: "accuracy of two classes (%)"}


def metrics_table(rows: Sequence[tuple[str, int, Mapping[str, float | None]]], *, title: str, caption: str) -> Table:
    """A line for each row: name, samples, metrics."""
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("n", justify="right")
    there = rows[0][2]
    columns = {heading: [name for name in names if name in there] for heading, names in COLUMNS.items()}
    columns = {heading: names for heading, names in columns.items() if names}
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, count, metrics in rows:
        cells = [" / ".join(show(name, metrics[name]) for name in names) for names in columns.values()]
        table.add_row(escape(label), str(count), *cells)
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
            cells.append(show("mae", here[group]["mean"]["mae"]) + ("" if spread is None else f" ± {spread:.3f}"))
        table.add_row(f"{100 * rate:g} %", *cells)
    return table


def show(metric: str, value: float | None) -> str:
    """Percent with one digit, or three digits for MAE and correlation."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:.3f}" if metric in ("mae", "corr") else f"{100 * value:.1f}"


def write_curves(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per modality and rate: means, then deviations. Shares of 1; empty where there is no number."""

    def cell(value: float | None) -> str:
        return "" if value is None or not np.isfinite(value) else repr(float(value))

    names = list(curves[0]["mean"])
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["dropped", "rate", *names, *(f"{name}_std" for name in names)])
        for record in curves:
            numbers = [record["mean"][name] for name in names] + [record["std"][name] for name in names]
            writer.writerow([record["dropped"], record["rate"], *map(cell, numbers)])


def draw_curves(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Three panels over the share of samples that lose a modality, a line for each; bands: standard deviations."""
    from mtmd.plots import COLOURS, STYLES, finish, label_lines, plt, tidy

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
    finish(figure, path)


# predict


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint_arguments(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "source",
        type=a_path,
        nargs="?",
        default=None,
        metavar="FILE",
        help="utterances: a CSV with any of the columns id, text, text_features, audio, vision (the last three are "
        "paths of .npy files), an .npz with the keys of a fold, an MMSA pickle, or a folder of the own format",
    )
    data.add_argument("--text", default=None, help="one utterance: its words")
    data.add_argument(
        "--text-features", type=a_path, default=None, metavar="FILE.npy", help="one utterance: its text as features"
    )
    data.add_argument("--audio", type=a_path, default=None, metavar="FILE.npy", help="one utterance: (T, d), or (d,)")
    data.add_argument("--vision", type=a_path, default=None, metavar="FILE.npy", help="one utterance: (T, d), or (d,)")
    _add_fold_argument(data, None, "of a pickle or folder (default: test)")
    parser.add_argument_group("output").add_argument(
        "--out", type=a_path, default=None, metavar="FILE.csv", help="where to write (default: a table)"
    )


def run_predict(arguments: argparse.Namespace, console: Console) -> None:
    """Print or write a line for each utterance."""
    given = {"text_features": arguments.text_features, "audio": arguments.audio, "vision": arguments.vision}
    single = arguments.text is not None or any(path is not None for path in given.values())
    if single == (arguments.source is not None):
        got = "both" if single else "neither"
        raise ValueError(
            f"predict: expected a FILE of utterances, or one by --text, --text-features, --audio, --vision; got {got}"
        )
    if arguments.fold is not None and (single or arguments.source.suffix.lower() in (".csv", ".npz")):
        raise ValueError("--fold: expected a pickle or folder beside it, got what has no folds")
    if arguments.out is not None:
        for path in (arguments.source, *given.values()):
            if path is not None and path.resolve() == arguments.out.resolve():
                raise ValueError(f"--out: expected another file than the one to read, got {arguments.out}")
        check_writable(arguments.out)
    trained = load_trained(arguments.checkpoint, text_encoder=arguments.text_encoder, device=arguments.device)
    if single:
        text = arguments.text if arguments.text and arguments.text.strip() else None  # as an empty cell of a CSV
        fold = build_fold([{"id": "0", "text": text, **given}])
    else:
        fold = read_utterances(arguments.source, arguments.fold or "test")
    for text in unread(fold, trained):
        note(console, text)
    said = ask(trained, prepare_fold(fold, trained, source=str(arguments.source or "predict")))
    blind = int((~np.any(list(said.present.values()), axis=0)).sum())
    if blind:
        note(
            console,
            f"{blind} of {len(fold)} utterances have no modality that the model reads; what is predicted for them says "
            "nothing",
        )
    lines = prediction_lines(fold, said, trained.classes)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.out) as part, part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        console.print(f"Written: {arguments.out.resolve()}", markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(
        caption="score and class (its sign); probabilities of the classes; score of each branch",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for number, heading in enumerate(lines[0]):
        table.add_column(escape(heading.removeprefix("p_")), justify="left" if number in (0, 2) else "right")
    for line in lines[1:]:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else escape(cell) for cell in line))
    console.print(table)


def read_utterances(path: Path, fold: str) -> Fold:
    """The utterances of a file of any of the four kinds."""
    if path.suffix.lower() == ".csv":
        return build_fold(read_csv(path))
    return load_fold(path, fold)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Lines as `build_fold` takes them; paths in them are relative to the folder of the file."""
    known = ("text", "text_features", "audio", "vision")
    headings, lines = read_table(path)
    if not set(known) & set(headings):
        raise DataError(f"{path}: expected a column named {' or '.join(known)}, got {key_names(headings)}")
    if not lines:
        raise DataError(f"{path}: expected at least one utterance, got none")
    utterances = []
    for number, line in enumerate(lines):
        files = {name: path.parent / line[name].strip() for name in known[1:] if line.get(name, "").strip()}
        for name, file in files.items():
            if not os.path.isfile(file):  # what Path.is_file raises for impossible names is False here
                raise DataError(f"{path}: {name}: expected the name of a file, got {shown(line[name])} in row {number}")
        name = line.get("id") or str(number)
        if not is_plain(name):
            raise DataError(f"{path}: id: expected strings that can be written, got {shown(name)} in row {number}")
        utterances.append({"id": name, "text": line.get("text"), **files})
    return utterances


def build_fold(lines: Sequence[Mapping[str, Any]]) -> Fold:
    """A fold of utterances with `id`, `text` and the paths `text_features`, `audio`, `vision`, where there are any."""
    n = len(lines)
    features, lengths = {}, {}
    for name, key in (("text", "text_features"), ("audio", "audio"), ("vision", "vision")):
        arrays = {row: read_sequence(line[key], name) for row, line in enumerate(lines) if line.get(key) is not None}
        if not arrays:
            continue
        first = next(iter(arrays))
        for row, array in arrays.items():
            here, there = array.shape[1], arrays[first].shape[1]
            if here != there:
                got = f"{there} in {lines[first][key]} and {here} in {lines[row][key]}"
                raise DataError(f"{name}: expected as many features d in each file (T, d), got {got}")
        lengths[name] = np.array([len(arrays[row]) if row in arrays else 0 for row in range(n)], np.int64)
        features[name] = np.zeros((n, max(1, int(lengths[name].max())), arrays[first].shape[1]), np.float32)
        for row, array in arrays.items():
            features[name][row, : len(array)] = array
    texts = [line.get("text") or "" for line in lines]
    return Fold(
        ids=[str(line["id"]) for line in lines],
        scores=np.zeros(n, np.float32),
        raw_text=texts if any(texts) else None,
        text_bert=None,
        features=features,
        lengths=lengths,
    )


def read_sequence(path: Path, name: str) -> np.ndarray:
    """An array (T, d) from an .npy file; (d,) is one step."""
    array = read_npy(path)
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2) or not array.shape[-1]:
        got = f"{array.dtype} of shape {array.shape}"
        raise DataError(f"{path}: expected {name} as numbers (T, d) or (d,), got {got}")
    with np.errstate(over="ignore"):
        return np.atleast_2d(array).astype(np.float32)


def unread(fold: Fold, trained: Trained) -> list[str]:
    """What is there but not read by the model, and what is no number."""
    notes = []
    there = {name for name, present in presence(fold).items() if present.any()}
    if fold.raw_text is not None and any(text.strip() for text in fold.raw_text):
        there.add("text")
    for name in sorted(there - set(trained.modalities)):
        notes.append(f"{name} is not read: the model was trained on {', '.join(trained.modalities)}")
    for name, array in fold.features.items():
        bad = int((~np.isfinite(array)).sum())
        if bad and name in trained.read_widths:
            notes.append(f"{name}: {bad} values are NaN or infinite; the training mean takes their place")
    return notes


def prediction_lines(fold: Fold, said: Said, classes: Sequence[str]) -> list[list[Any]]:
    """Heading and a line for each utterance; the score of a branch is empty where its modality is missing."""
    lines: list[list[Any]] = [["id", "score", "class", *(f"p_{name}" for name in classes), *said.branch_scores]]
    for row, name in enumerate(fold.ids):
        score = float(said.scores[row])
        branches = [
            float(scores[row]) if said.present[modality][row] else "" for modality, scores in said.branch_scores.items()
        ]
        label = classes[int(np.sign(score)) + 1]
        lines.append([name, score, label, *map(float, said.probabilities[row]), *branches])
    return lines


# export


class Deployed(nn.Module):
    """The model with its feature scaling: what a program outside this code is fed is the data as they are."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = trained.model
        self.modalities = list(trained.modalities)
        self.scaled = list(trained.read_widths)
        for name in self.scaled:
            self.register_buffer(f"{name}_mean", torch.from_numpy(np.array(trained.standardizer.mean[name])))
            self.register_buffer(f"{name}_std", torch.from_numpy(np.array(trained.standardizer.std[name])))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scores (N,) and logits (N, 3).

        Args:
            inputs: `audio` (N, T, d) float32 and `audio_lengths` (N,) int64, 0 for missing, likewise `vision` and
                `text`; in place of the latter `tokens` (N, 3, L) int64 where the model has a text encoder.
        """
        features, lengths, present = {}, {}, {}
        for name in self.scaled:
            values, lengths[name] = inputs[name].double(), inputs[f"{name}_lengths"]
            scaled = (values - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")
            inside = torch.arange(values.shape[1], device=values.device) < lengths[name][:, None]
            kept = inside[:, :, None] & torch.isfinite(values)
            features[name] = torch.where(kept, scaled, 0.0).float()
            present[name] = lengths[name] > 0
        tokens = inputs.get("tokens")
        if tokens is not None:
            present["text"] = (tokens[:, 1] > 0).any(dim=1)
        n = present[self.modalities[0]].shape[0]
        nothing = torch.zeros(n, dtype=torch.int64, device=present[self.modalities[0]].device)
        batch = Batch(nothing, nothing.float(), nothing, tokens, features, lengths, present, total=n)
        fused = self.model.predict(batch)
        return {"scores": fused.scores, "logits": fused.logits}


def example_inputs(trained: Trained, *, samples: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Made-up inputs of :class:`Deployed`, at least two steps; the last of several samples misses audio and vision."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, width in trained.read_widths.items():
        lengths = torch.randint(1, steps + 1, (samples,), generator=generator)
        if name != "text" and samples > 1:
            lengths[-1] = 0
        inputs[name] = torch.randn(samples, steps, width, generator=generator)
        inputs[f"{name}_lengths"] = lengths
    if trained.reads_tokens:
        tokens = torch.zeros(samples, 3, steps, dtype=torch.int64)
        lengths = torch.randint(2, steps + 1, (samples, 1), generator=generator)
        tokens[:, 1] = torch.arange(steps) < lengths
        words = trained.model.branches["text"].encoder.bert.config.vocab_size
        tokens[:, 0] = torch.randint(words, (samples, steps), generator=generator) * tokens[:, 1]
        inputs["tokens"] = tokens
    return inputs


def export_program(trained: Trained) -> torch.export.ExportedProgram:
    """The deployed model as a program for any number of samples and steps."""
    if register_lstm_while_loop_decomposition is None:
        raise ValueError(f"export: expected a torch that exports an LSTM of any length, got torch {torch.__version__}")
    deployed = Deployed(trained).eval()
    inputs = example_inputs(trained, samples=3, steps=7)
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {}
    for name in inputs:
        shapes[name] = {0: dynamic} if name.endswith("_lengths") else {0: dynamic, 1: dynamic}
    if "tokens" in inputs:
        shapes["tokens"] = {0: dynamic, 2: dynamic}
    # The usual way to trace an LSTM writes out its steps, as many as there are in the example.
    with torch.no_grad(), register_lstm_while_loop_decomposition(), warnings.catch_warnings():
        # An LSTM keeps its weights in a list beside its parameters, which tracing swaps and puts back.
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights")
        warnings.filterwarnings("ignore", message="_check_is_size", category=FutureWarning)  # torch's own use of it
        return torch.export.export(deployed, (inputs,), dynamic_shapes=(shapes,))


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("model").add_argument("checkpoint", type=a_path, help=CHECKPOINT)
    parser.add_argument_group("output").add_argument(
        "target", type=a_path, metavar="OUT.pt2", help="where to write the program"
    )


def run_export(arguments: argparse.Namespace, console: Console) -> None:
    """Write the program, read it again, and compare with the model."""
    target = arguments.target
    if target.suffix != ".pt2":
        raise ValueError(f"target: expected a file name that ends in .pt2, got {target}")
    check_writable(target)
    trained = load_trained(arguments.checkpoint)
    program = export_program(trained)
    about = {
        "inputs": list(example_inputs(trained, samples=1, steps=2)),
        "widths": trained.read_widths,
        "classes": list(trained.classes),
        "text_encoder": trained.config.text_encoder if trained.reads_tokens else None,
        "max_tokens": trained.config.max_tokens if trained.reads_tokens else None,
        "context": trained.config.context if trained.reads_tokens else None,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        with part.open("wb") as file:  # of a path, torch would want its own ending
            torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
        with part.open("rb") as file:
            again = torch.export.load(file).module()
        deployed = Deployed(trained).eval()
        largest = 0.0
        for samples, steps in ((1, 4), (5, 12)):
            inputs = example_inputs(trained, samples=samples, steps=steps, seed=samples)
            with torch.no_grad():
                expected, got = deployed(inputs), again(inputs)
            largest = max(largest, *(float((got[key] - expected[key]).abs().max()) for key in expected))
        if not largest < 1e-4:
            raise ValueError(f"{target}: expected the outputs of the model, got others, by up to {largest:.2g}")
    console.print(
        f"Written: {target.resolve()}; its outputs differ from the model's by at most {largest:.2g}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("checkpoint", type=a_path, help=CHECKPOINT)
    model.add_argument(
        "--text-encoder",
        default=None,
        help="name or directory of the text encoder whose tokenizer to use (default: as in training)",
    )
    devices = ("cpu", "cuda", "auto")
    model.add_argument(
        "--device",
        default="cpu",
        type=one_of(*devices),
        metavar=f"{{{','.join(devices)}}}",
        help="where to run the model (default: cpu)",
    )


def _add_fold_argument(group: argparse._ArgumentGroup, default: str | None, text: str) -> None:
    group.add_argument("--fold", default=default, type=one_of(*FOLDS), metavar=f"{{{','.join(FOLDS)}}}", help=text)
