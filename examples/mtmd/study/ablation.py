"""`ablate`: MTMD with one part taken out at a time, Tables II and III of the paper.

    python examples/mtmd_mosi.py ablate --arms all --seeds 1 2 3 --out runs/ablation
    python examples/mtmd_mosi.py ablate --arms full no_reg no_queue --jobs 2 --out runs/ablation

Each arm is an experiment in a folder of its own below --out. What is finished there already is used again, so the
command goes on where it was stopped. The tables hold every arm that --out has with these settings and seeds: arms can
be added by later calls, or by several at the same time, of which the last to end writes them all.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mtmd.files.writing import write_text
from mtmd.results.bootstrap import RESAMPLES
from mtmd.results.compare import SIMS_LIMIT, compare_experiments, read_scores
from mtmd.results.metrics import mean_and_std
from mtmd.results.records import load_experiment
from mtmd.results.tables import METRICS, Row, row_of, write_table
from mtmd.runs.experiment import check_before
from mtmd.settings.cli import note, say
from mtmd.settings.config import MODALITIES, Config
from mtmd.settings.options import add_config_arguments, at_least, config_from, one_of
from mtmd.study.jobs import LOG, run_many


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
    # A queue without classes cannot give them shares.
    "instance_sampling": Arm("i ≠ j", (), {"sampling": "instance", "balanced_queue": False}),
    # Not in the paper: what the audio and vision are worth at all.
    "text_only": Arm("text alone", (), {"modalities": ["text"]}),
}
TABLE_3 = ("instance_sampling", "full")
# Acc7, F1 and MAE of this line could not be read in the copy of the paper that the numbers were taken from.
PAPER_INSTANCE = {"acc2_has0": 83.1, "acc2_non0": 84.8, "corr": 0.791}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ablate`, and those of a run."""
    group = parser.add_argument_group("ablation")
    group.add_argument(
        "--arms",
        nargs="+",
        default=["all"],
        type=one_of("all", *ARMS),
        metavar="ARM",
        help=f"all, or of {', '.join(ARMS)}; no_PART is --without PART, instance_sampling --sampling instance",
    )
    group.add_argument(
        "--jobs", type=at_least(1), default=1, metavar="N", help="arms that train at the same time (default: 1)"
    )
    group.add_argument(
        "--resamples",
        type=at_least(1),
        default=RESAMPLES,
        metavar="N",
        help=f"draws of the paired bootstrap (default: {RESAMPLES})",
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Train what is not trained yet, then write the tables. The exit code is 1 if an arm did not train."""
    base = config_from(arguments)
    base.resume = base.resume is not False
    asked = list(ARMS) if "all" in arguments.arms else [name for name in ARMS if name in arguments.arms]
    left_out = {name: why for name in ARMS if (why := why_left_out(base, name))}
    for name in asked:
        if name in left_out:
            note(console, f"{name} is left out: {left_out[name]}")
    configs = {name: arm_config(base, name) for name in asked if name not in left_out}
    if not configs:
        raise ValueError(
            f"--arms: expected an arm that can be told from full with these settings, got {' '.join(asked)}"
        )
    check_before(base, console)

    done, errors = {}, {}
    for name, outcome in run_many(configs, console, jobs=arguments.jobs, keep_going=True):
        if "error" in outcome:
            errors[name] = outcome["error"]
            say(console, f"{name} did not train: {outcome['error']}", "yellow")
            continue
        done[name] = outcome
        mae = mean_and_std(asked_runs(outcome, base.seeds))[0]["mae"]
        log = f"; see {configs[name].out / LOG}" if arguments.jobs > 1 else ""
        say(console, f"{name}: test MAE {mae:.3f} ({len(done) + len(errors)} of {len(configs)} arms){log}")

    results = done | read_others(base, {*configs, *left_out}, done, console)
    if not results:
        name, why = next(iter(errors.items()))
        raise ValueError(f"ablate: no arm trained; {name}: {why}")
    write_tables(base, results, errors, console, resamples=arguments.resamples)
    return 1 if errors else 0


def asked_runs(results: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """Test metrics of the seeds asked for; a folder may hold more."""
    return [run["test"] for run in results["runs"] if run["seed"] in seeds]


# The arms


def arm_config(base: Config, name: str) -> Config:
    """The settings of an arm: the base with a part taken out."""
    arm = ARMS[name]
    without = [*base.without, *(part for part in arm.without if part not in base.without)]
    return dataclasses.replace(base, out=base.out / name, without=without, **arm.changes)


def why_left_out(base: Config, name: str) -> str:
    """Why an arm says nothing with these settings; empty if it does."""
    arm = ARMS[name]
    gone = {f"{modality}_task" for modality in MODALITIES} & {*base.without, *arm.without}
    kept = set(base.modalities) & set(arm.changes.get("modalities", MODALITIES))
    if not kept - {part.removesuffix("_task") for part in gone}:
        return "no modality is left"
    if name != "full" and in_effect(arm_config(base, name)) == in_effect(arm_config(base, "full")):
        return "with these settings it is the same as full"
    return ""


def in_effect(config: Config) -> dict[str, Any]:
    """The settings, with what has no effect beside the others switched off: equal ones train the same model."""
    off = config.off
    return config.identity() | {
        "modalities": config.used,
        "without": {part for part in off if not part.endswith("_task")},
        "sampling": "class" if "feat" in off else config.sampling,
        "balanced_queue": config.balanced_queue and "queue" not in off,
    }


def read_others(base: Config, not_these: set[str], done: dict[str, Any], console: Console) -> dict[str, Any]:
    """What --out has of arms that other calls trained: of the same settings and data, with all seeds asked for."""
    found: dict[str, Any] = {}
    for name in sorted(ARMS, key=lambda name: name != "full"):  # first the one that others are compared with
        if name in not_these or not (base.out / name / "results.json").exists():
            continue
        known = next(iter((done | found).values()), None)
        try:
            found[name] = load_arm(arm_config(base, name), known)
        except (ValueError, OSError) as error:
            note(console, f"{name} is not in the tables: {error}")
    return found


def load_arm(config: Config, known: dict[str, Any] | None) -> dict[str, Any]:
    """Contents of results.json of a finished arm; `known`: of another arm, whose data it has to share.

    Raises:
        ValueError: If it has other settings or data, or not all seeds.
        OSError: If it cannot be read.
    """
    results = load_experiment(config.out)
    source = str(config.out / "results.json")
    theirs, ours = Config.from_values(results["config"], source=source).identity(), config.identity()
    differing = [setting for setting in ours if theirs[setting] != ours[setting]]
    if differing:
        raise ValueError(f"{config.out}: expected the settings of this call, got other ones ({', '.join(differing)})")
    if known is not None and results["dataset"]["sha256"] != known["dataset"]["sha256"]:
        raise ValueError(f"{config.out}: expected the data of the other arms, got other data")
    finished = [run["seed"] for run in results["runs"]]
    if not set(config.seeds) <= set(finished):
        expected, got = (", ".join(map(str, seeds)) for seeds in (config.seeds, finished))
        raise ValueError(f"{config.out}: expected seeds {expected}, got {got}")
    read_scores(config.out, seeds=config.seeds)  # whether the comparison can read them
    return results


# The tables


def write_tables(
    base: Config, results: dict[str, dict[str, Any]], errors: dict[str, str], console: Console, *, resamples: int
) -> None:
    """Tables II and III, as far as there are arms for them, in `base.out`.

    Args:
        base: Where the arms lie, and the seeds to show of them.
        results: Contents of results.json by arm.
        errors: Arms that did not train.
        console: Shows the tables.
        resamples: Draws of the bootstrap.
    """
    out = base.out
    rows = {name: arm_row(base, name, results, resamples) for name in ARMS if name in {*results, *errors}}
    where, notes = describe(next(iter(results.values()))["dataset"])
    notes += base_notes(base)
    precisions = {run["precision"] for one in results.values() for run in one["runs"] if "precision" in run}
    if len(precisions) > 1:
        notes.append(f"Not all trained in the same: {' and '.join(sorted(precisions))}; each results.json says which.")
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
        meaning = ["i ≠ j: other utterances are the negatives; cls_i ≠ cls_j: those of other classes (MTMD)."]
        if base.balanced_queue:
            meaning.append("cls_i ≠ cls_j has a balanced queue; that of i ≠ j knows no classes, so that it cannot.")
        console.print(write_table(third, out / "table3", title=title, against="MTMD", notes=[*meaning, *notes]))
        paths.append(out / "table3.md")
    write_json(out / "ablation.json", rows, results, base.seeds)
    for path in paths:
        say(console, f"Table: {path} and .csv")


def write_json(path: Path, rows: dict[str, Row], results: dict[str, dict[str, Any]], seeds: list[int]) -> None:
    """What the tables are made of, numbers as they are: every arm's runs, and its differences to the full model."""
    kept = ("seed", "test", "test_unimodal", "valid", "best_epoch", "precision", "versions")
    arms = {}
    for name, row in rows.items():
        if name in results:
            runs = [{key: run.get(key) for key in kept} for run in results[name]["runs"] if run["seed"] in seeds]
            compared = {"mae_over_utterances": row.over_utterances, "mae_over_seeds": row.over_seeds}
            differences = {kind: dataclasses.asdict(one) for kind, one in compared.items() if one is not None}
            arms[name] = {"label": row.label, "runs": runs, "minus_full": differences}
    content = {"dataset": next(iter(results.values()))["dataset"], "arms": arms}
    write_text(path, json.dumps(content, indent=1) + "\n")


def arm_row(base: Config, name: str, results: dict[str, dict[str, Any]], resamples: int) -> Row:
    """What an arm gave, beside the paper, and its paired difference to the full model."""
    arm = ARMS[name]
    paper = PAPER_INSTANCE if name == "instance_sampling" else dict(zip(METRICS, arm.paper, strict=False))
    if name not in results:
        return Row(name, f"{arm.label} (did not train)", paper=paper, part=arm.part)
    row = row_of(name, arm.label, asked_runs(results[name], base.seeds), paper=paper, part=arm.part)
    if name != "full" and "full" in results:
        row.over_utterances, row.over_seeds = compare_experiments(
            base.out / name,
            base.out / "full",
            seeds=base.seeds,
            limit=SIMS_LIMIT if "acc3" in row.values else None,
            resamples=resamples,
        )
    return row


def base_notes(base: Config) -> list[str]:
    """What to say where even the line MTMD is not all of MTMD."""
    changed = []
    if base.without:
        changed.append(f"--without {' '.join(base.without)}")
    if base.sampling != "class":
        changed.append(f"--sampling {base.sampling}")
    if len(base.modalities) < len(MODALITIES):
        changed.append(f"--modalities {' '.join(base.modalities)}")
    return [f"Every line, MTMD too, was trained with {' '.join(changed)}; the paper's were not."] if changed else []


def describe(dataset: dict[str, Any]) -> tuple[str, list[str]]:
    """What was trained on, for titles, and what to say where that is not the paper's data."""
    if dataset["synthetic"]:
        return "synthetic data", ["Measured on synthetic data; the paper's numbers are of CMU-MOSI and no comparison."]
    if dataset["name"].lower() != "mosi":
        where = dataset["name"].upper()
        return where, [f"Measured on {where}; the paper's numbers are of CMU-MOSI and no comparison."]
    return "CMU-MOSI", ["The paper's numbers are of CMU-MOSI with its own features and encoder."]
