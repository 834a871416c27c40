"""`ablate`: MTMD with one part taken out at a time, Tables II and III of the paper.

    python examples/mtmd_mosi.py ablate --arms all --seeds 1 2 3 --out runs/ablation
    python examples/mtmd_mosi.py ablate --arms full no_reg no_queue --jobs 2 --out runs/ablation

Each arm is an experiment in a folder of its own below --out. What is finished there already is used again, so the
command goes on where it was stopped, and arms can be added.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mtmd.bootstrap import RESAMPLES
from mtmd.compare import SIMS_LIMIT, compare_experiments
from mtmd.config import Config, add_config_arguments, config_from
from mtmd.jobs import LOG, run_many
from mtmd.tables import METRICS, Row, row_of, write_table


@dataclass(frozen=True)
class Arm:
    """One line of the tables."""

    label: str  # as the paper calls it
    without: tuple[str, ...] = ()  # parts taken out: Config.without
    changes: dict[str, Any] = field(default_factory=dict)  # other settings
    paper: tuple[float, ...] = ()  # Acc7, Acc2 and F1 (negative/non-negative, negative/positive), MAE, Corr: CMU-MOSI
    part: str = ""


DMD, MFD = "(1) DMD", "(2) MFD"

# Table II, in its order. The arm of Table III and one of our own stand below.
ARMS = {
    "no_reg": Arm("w/o L_reg", ("reg",), {}, (45.7, 82.4, 84.3, 82.4, 84.3, 0.732, 0.788), DMD),
    "no_cls": Arm("w/o L_cls", ("cls",), {}, (45.4, 82.7, 84.3, 82.6, 84.3, 0.728, 0.791), DMD),
    "no_feat": Arm("w/o L_feat", ("feat",), {}, (45.9, 82.6, 84.6, 82.5, 84.6, 0.727, 0.792), DMD),
    "no_queue": Arm("w/o queue", ("queue",), {}, (46.9, 83.5, 85.5, 83.5, 85.5, 0.716, 0.793), DMD),
    "no_momentum_dmd": Arm("w/o MoM", ("momentum_dmd",), {}, (46.1, 82.7, 84.6, 82.6, 84.6, 0.731, 0.791), DMD),
    "no_fusion_factors": Arm("w/o w_t/a/v", ("fusion_factors",), {}, (45.0, 82.2, 83.8, 82.2, 83.9, 0.737, 0.790), MFD),
    "no_hard_attention": Arm("w/o HardAtt", ("hard_attention",), {}, (46.2, 83.2, 85.4, 83.1, 85.4, 0.715, 0.794), MFD),
    "no_fusion": Arm("w/o L_fusion", ("fusion",), {}, (46.0, 82.5, 84.4, 82.5, 84.4, 0.727, 0.790), MFD),
    "no_momentum_mfd": Arm("w/o MoM", ("momentum_mfd",), {}, (44.8, 81.5, 84.2, 81.7, 84.1, 0.733, 0.785), MFD),
    "no_text_task": Arm("w/o t subtask", ("text_task",), {}, (17.9, 55.0, 53.1, 52.5, 51.2, 1.420, 0.234)),
    "no_audio_task": Arm("w/o a subtask", ("audio_task",), {}, (46.2, 83.2, 85.0, 83.1, 85.0, 0.718, 0.794)),
    "no_vision_task": Arm("w/o v subtask", ("vision_task",), {}, (46.5, 82.9, 84.8, 82.9, 84.8, 0.723, 0.789)),
    "no_distillation": Arm("No Distill", ("distillation",), {}, (44.0, 81.8, 83.2, 81.7, 83.3, 0.749, 0.780)),
    "full": Arm("MTMD", (), {}, (47.5, 84.0, 86.0, 83.9, 86.0, 0.705, 0.799)),
    # Table III, whose other line is the full model; see PAPER_INSTANCE for its numbers.
    "instance_sampling": Arm("i ≠ j", (), {"sampling": "instance"}),
    # Not in the paper: what the audio and vision are worth at all.
    "text_only": Arm("text alone", (), {"modalities": ["text"]}),
}
TABLE_3 = ("instance_sampling", "full")
# Acc7, F1 and MAE of this line could not be read in the copy of the paper that the numbers were taken from.
PAPER_INSTANCE = {"acc2_has0": 83.1, "acc2_non0": 84.8, "corr": 0.791}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ablate`, and those of a run."""
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["all"],
        choices=["all", *ARMS],
        metavar="ARM",
        help=f"all, or of {', '.join(ARMS)}",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="arms that train at the same time (default: 1)"
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=RESAMPLES,
        metavar="N",
        help=f"draws of the paired bootstrap (default: {RESAMPLES})",
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Train what is not trained yet, then write the tables."""
    base = config_from(arguments)
    if "resume" not in arguments:
        base.resume = True
    chosen = list(ARMS) if "all" in arguments.arms else [name for name in ARMS if name in arguments.arms]
    configs = {name: arm_config(base, name) for name in chosen}
    results: dict[str, dict[str, Any]] = {}
    for name, outcome in run_many(configs, console, jobs=arguments.jobs):
        results[name] = outcome
        if "error" in outcome:
            console.print(f"{name} did not train: {outcome['error']}", style="yellow", markup=False, highlight=False)
        else:
            log = f"; see {configs[name].out / LOG}" if arguments.jobs > 1 else ""
            console.print(
                f"{name}: test MAE {outcome['mean']['mae']:.3f} ({len(results)} of {len(configs)} arms){log}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    ordered = {name: results[name] for name in chosen}
    write_tables(base.out, ordered, console, seeds=base.seeds, resamples=arguments.resamples)


def arm_config(base: Config, name: str) -> Config:
    """The settings of an arm: the base with a part taken out."""
    arm = ARMS[name]
    without = [*base.without, *(part for part in arm.without if part not in base.without)]
    return dataclasses.replace(base, out=base.out / name, without=without, **arm.changes)


def write_tables(
    out: Path, results: dict[str, dict[str, Any]], console: Console, *, seeds: list[int], resamples: int
) -> None:
    """Tables II and III, as far as their arms were run, in `out`; of other seeds in the folders they hold nothing."""
    rows = {name: arm_row(out, name, results, seeds, resamples) for name in results}
    dataset = next((outcome["dataset"] for outcome in results.values() if "dataset" in outcome), None)
    where, notes = describe(dataset)
    paths = []
    second = [row for name, row in rows.items() if name != "instance_sampling"]
    if second:
        title = f"Ablation of MTMD on {where} (Table II)"
        own = ["text alone: the same text encoder and training without other modalities; not in the paper."]
        notes_2 = [*(own if "text_only" in rows else []), *notes]
        console.print(write_table(second, out / "table2", title=title, against="MTMD", notes=notes_2))
        paths.append(out / "table2.md")
    if "instance_sampling" in rows:
        third = [dataclasses.replace(rows[name], part="") for name in TABLE_3 if name in rows]
        third = [dataclasses.replace(row, label="cls_i ≠ cls_j") if row.name == "full" else row for row in third]
        title = f"Instance against class sampling on {where} (Table III)"
        meaning = "i ≠ j: other utterances are the negatives; cls_i ≠ cls_j: those of other classes (MTMD)."
        console.print(write_table(third, out / "table3", title=title, against="MTMD", notes=[meaning, *notes]))
        paths.append(out / "table3.md")
    for path in paths:
        console.print(f"Table: {path} and .csv", markup=False, highlight=False, soft_wrap=True)


def arm_row(out: Path, name: str, results: dict[str, dict[str, Any]], seeds: list[int], resamples: int) -> Row:
    """What an arm gave, beside the paper, and its paired difference to the full model."""
    arm, outcome = ARMS[name], results[name]
    paper = PAPER_INSTANCE if name == "instance_sampling" else dict(zip(METRICS, arm.paper, strict=False))
    if "error" in outcome:
        return Row(name, f"{arm.label} (did not train)", paper=paper, part=arm.part)
    runs = [run["test"] for run in outcome["runs"] if run["seed"] in seeds]
    row = row_of(name, arm.label, runs, paper=paper, part=arm.part)
    if name != "full" and "runs" in results.get("full", {}):
        row.over_utterances, row.over_seeds = compare_experiments(
            out / name,
            out / "full",
            seeds=seeds,
            limit=SIMS_LIMIT if "acc3" in row.values else None,
            resamples=resamples,
        )
    return row


def describe(dataset: dict[str, Any] | None) -> tuple[str, list[str]]:
    """What was trained on, for titles, and what to say where that is not the paper's data."""
    if dataset is None:
        return "no data", []
    if dataset["synthetic"]:
        return "synthetic data", ["Measured on synthetic data; the paper's numbers are of CMU-MOSI and no comparison."]
    if dataset["name"].lower() != "mosi":
        where = dataset["name"].upper()
        return where, [f"Measured on {where}; the paper's numbers are of CMU-MOSI and no comparison."]
    return "CMU-MOSI", ["The paper's numbers are of CMU-MOSI with its own features and encoder."]
