"""`search`: random points of the paper's grid, judged on the validation fold only (Section V-B).

    python examples/mtmd_mosi.py search --trials 50 --out runs/search
    python examples/mtmd_mosi.py search --trials 50 --out runs/search --final-seeds 1111 1112 1113 1114 1115
    python examples/mtmd_mosi.py search --grid other_lr=0.0005,0.001 alpha=0.2,0.4,0.6 --trials 6 --out runs/small

Every trial is a line of trials.jsonl, written when it ends: the same command goes on where it was stopped, and one with
more trials goes on from there. `--no-resume` deletes the search that --out holds and begins anew. The best point is
that with the lowest validation MAE; what a trial predicts on the test fold is deleted unread. `--final-seeds` then
trains at the best point, test fold included, into a folder named after its trial, as best_trial0007: with more trials
another point may be the best.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtmd.data.values import key_names
from mtmd.files.checks import (
    COUNT,
    MEASURE,
    MEASURES,
    NAME,
    NUMBER,
    OBJECT,
    Rule,
    check_layout,
    did_you_mean,
    is_text,
    shown,
)
from mtmd.files.reading import parse_json
from mtmd.files.writing import write_text
from mtmd.results.tables import write_csv
from mtmd.runs.experiment import check_before, progress_bars
from mtmd.settings.cli import note, say
from mtmd.settings.config import NOT_IDENTITY, Config
from mtmd.settings.options import add_config_arguments, at_least, config_from
from mtmd.study.jobs import run_many

GAMMA = (0.6, 0.8, 1.0)
PAPER_GRID: dict[str, tuple[Any, ...]] = {
    "gamma_reg": GAMMA,
    "gamma_cls": GAMMA,
    "gamma_feat": GAMMA,
    "gamma_fusion": GAMMA,
    "alpha": (0.2, 0.3, 0.4, 0.5, 0.6),
    "temperature": (0.1, 0.3, 0.5, 0.7, 0.9),
}
SYMBOLS = {name: name.replace("gamma", "γ") for name in PAPER_GRID} | {"alpha": "α", "temperature": "τ"}  # noqa: RUF001
KINDS = (int, float, str, bool)  # of settings that a grid may hold
TRIALS = 50  # the paper's number
SHOWN = 10  # best trials in the terminal; search.csv has all
STORE = "trials.jsonl"
RUN = {"seed": COUNT, "valid": MEASURES, "best_epoch": COUNT, "epochs": COUNT, "seconds": NUMBER}
TRIAL = {
    "trial": COUNT,
    "point": OBJECT,
    "mae": MEASURE,
    "sha256": Rule("a text or null", lambda value: value is None or NAME.fits(value)),
    "runs": [RUN],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `search`, and those of a run."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--trials", type=at_least(1), default=TRIALS, metavar="N", help=f"points in all (default: {TRIALS})"
    )
    group.add_argument("--search-seed", type=at_least(0), default=0, metavar="SEED", help="which points (default: 0)")
    group.add_argument(
        "--grid",
        nargs="+",
        metavar="NAME=V,V",
        help="settings and their values in place of the paper's grid, as alpha=0.2,0.4 layers=1,3",
    )
    group.add_argument(
        "--final-seeds",
        type=at_least(0),
        nargs="+",
        default=[],
        metavar="SEED",
        help="train with these at the best point, into best_trialNNNN",
    )
    group.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="trials at the same time (default: 1)")
    add_config_arguments(parser)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Run the trials that are not there yet, write the table, train at the best point."""
    base = config_from(arguments)
    base.resume = base.resume is not False
    grid = parse_grid(arguments.grid) if arguments.grid else PAPER_GRID
    for name in grid:
        if name in vars(arguments):
            option, got = "--" + name.replace("_", "-"), shown(getattr(arguments, name))
            raise ValueError(
                f"{option}: expected none, for the search chooses it among the values of its grid, got {got}"
            )
    if len(set(arguments.final_seeds)) < len(arguments.final_seeds):
        raise ValueError(f"--final-seeds: expected each once, got {' '.join(map(str, arguments.final_seeds))}")
    size = math.prod(len(values) for values in grid.values())
    if arguments.trials > size:
        raise ValueError(f"--trials: expected 1 to {size}, the points of the grid, got {arguments.trials}")
    points = list(itertools.islice(sample(grid, arguments.search_seed), arguments.trials))
    for point in points:  # what a setting refuses is told before anything begins
        dataclasses.replace(base, **point)
    check_before(base, console)
    base.out.mkdir(parents=True, exist_ok=True)
    store = base.out / STORE
    if not base.resume:
        begin_anew(base.out)
    trials = open_store(store, identity(base, grid, arguments.search_seed), console)
    check_trials(trials, points, store)
    run_trials(base, points, trials, store, console, jobs=arguments.jobs)
    ranked = rank(trials, points)
    write_csv(base.out / "search.csv", [trial_record(place, trial) for place, trial in enumerate(ranked, start=1)])
    console.print(table(ranked, base))
    if ranked[0]["mae"] is None:
        raise ValueError("search: no trial has a validation MAE, so there is no best point")
    seeds = arguments.final_seeds or base.seeds
    # A folder for each point: what an earlier best point gave is another experiment, and stays.
    folder = base.out / f"best_{trial_name(ranked[0]['trial'])}"
    best = dataclasses.replace(base, out=folder, seeds=seeds, **ranked[0]["point"])
    best_toml = base.out / "best.toml"
    write_toml(best, best_toml)
    say(console, f"All trials: {base.out / 'search.csv'}; the best point as settings for --config: {best_toml}")
    if arguments.final_seeds:
        for _, outcome in run_many({folder.name: best}, console):
            if "error" in outcome:
                raise ValueError(f"--final-seeds: {outcome['error']}")


def write_toml(config: Config, path: Path) -> None:
    """What is trained, without where and how far."""
    # JSON's numbers, strings, booleans and lists are TOML's too; null is a setting that is not given.
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}"
        for name, value in config.identity().items()
        if value is not None
    ]
    write_text(path, "\n".join(lines) + "\n")


# The grid


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`NAME=V,V` to values of the type of that setting."""
    hints = get_type_hints(Config)
    grid = {}
    for text in texts:
        name, separator, listed = text.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or name not in hints or name in NOT_IDENTITY:
            hint = "" if name in hints else did_you_mean([name], hints)
            raise ValueError(f"--grid: expected NAME=V,V with the name of a setting, got {text!r}{hint}")
        kind = hints[name] if hints[name] in KINDS else get_args(hints[name])[0]  # of T | None, the T
        if get_origin(hints[name]) is list or kind not in KINDS:
            raise ValueError(f"--grid: expected a setting with a number, a word or true and false, got {name}")
        try:
            values = tuple(parse_value(value.strip(), kind) for value in listed.split(","))
        except ValueError as error:
            raise ValueError(f"--grid: expected values of type {kind.__name__} for {name}, got {listed!r}") from error
        if name in grid:
            raise ValueError(f"--grid: expected each setting once, with all its values, got {name} twice")
        if len(set(values)) < len(values):
            raise ValueError(f"--grid: expected each value of {name} once, got {listed!r}")
        grid[name] = values
    return grid


def parse_value(text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    value = kind(text)
    if value == "" or (kind is float and not math.isfinite(value)):
        raise ValueError(text)
    return value


def sample(grid: Mapping[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The points of the grid in random order, each once; more trials go on where fewer ended."""
    shape = [len(values) for values in grid.values()]
    size = math.prod(shape)
    rng = np.random.default_rng(seed)
    seen: set[int] = set()
    while len(seen) < size:
        index = int(rng.integers(size))
        if index not in seen:
            seen.add(index)
            places = np.unravel_index(index, shape)
            yield {name: values[place] for (name, values), place in zip(grid.items(), places, strict=True)}


# The trials and their store


def identity(base: Config, grid: Mapping[str, Sequence[Any]], search_seed: int) -> dict[str, Any]:
    """What must agree for trials to be of one search."""
    fixed = {name: value for name, value in base.identity().items() if name not in grid}
    lists = {name: list(values) for name, values in grid.items()}
    return {"search_seed": search_seed, "grid": lists, "seeds": base.seeds, **fixed}


def trial_name(place: int) -> str:
    return f"trial{place:04d}"


def begin_anew(out: Path) -> None:
    """Delete the search in `out`; its store last, so that after a kill the same command can still tell it is one."""
    if not (out / STORE).exists():
        return
    for path in list(out.iterdir()):
        if path.is_dir() and re.fullmatch(r"(best_)?trial\d{4,}|best", path.name):
            shutil.rmtree(path)
    for name in ("best.toml", "search.csv", STORE):
        (out / name).unlink(missing_ok=True)


def open_store(store: Path, ours: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    """The trials in the store, which begins with what they are trials of.

    A line that was cut off while it was written is taken out; its trial runs again.
    """
    lines = store.read_bytes().splitlines(keepends=True) if store.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        whole = sum(len(line) for line in lines[:-1])
        note(console, f"{store}: an unfinished last line was taken out")
        os.truncate(store, whole)
        lines.pop()
    if not lines:
        append(store, ours)
        return []
    records = []
    for place, line in enumerate(lines, start=1):
        expected, layout = ("a trial", TRIAL) if place > 1 else ("the settings of a search", {"grid": OBJECT})
        where = f"{store}: line {place} is damaged; expected {expected}"
        records.append(parse_json(line, where))
        check_layout(records[-1], layout, where)
    theirs, trials = with_defaults(records[0], store), records[1:]
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{store}: expected the search that began there, with {key_names([name])} {shown(theirs.get(name))}, "
                f"got {shown(ours.get(name))}; give another --out, or --no-resume, which deletes the {len(trials)} "
                "trials there and begins anew"
            )
    return trials


def check_trials(trials: Sequence[Mapping[str, Any]], points: Sequence[dict[str, Any]], store: Path) -> None:
    """Raise if a trial is there twice, or is not that of its point, or has a mean that is not its runs'."""
    numbers = [trial["trial"] for trial in trials]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{store}: expected each trial once, got trials {shown(numbers)}")
    for trial in trials:
        maes = [entry["valid"].get("mae") for entry in trial["runs"]]
        mean = None if not maes or None in maes else float(np.mean(maes))
        whole = (trial["mae"] is None) is (mean is None) and (mean is None or math.isclose(trial["mae"], mean))
        whole &= all("corr" in entry["valid"] for entry in trial["runs"]) and is_text(trial.get("error", ""))
        if not whole or (trial["trial"] < len(points) and trial["point"] != points[trial["trial"]]):
            raise ValueError(f"{store}: trial {trial['trial']} is damaged; expected what was trained at that point")


def with_defaults(header: dict[str, Any], store: Path) -> dict[str, Any]:
    """The first line of a store; settings that are younger than it get their defaults."""
    data = {name: header[name] for name in ("data", "dataset") if name in header}  # on which defaults depend
    defaults = Config.from_values(data, source=str(store)).identity()
    return {name: value for name, value in defaults.items() if name not in header["grid"]} | header


def append(store: Path, record: Mapping[str, Any]) -> None:
    """One line, in one write, on the disk before this returns."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    handle = os.open(store, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(handle, line) != len(line):
            raise OSError(f"{store}: could not write the whole line; is the disk full?")
        os.fsync(handle)
    finally:
        os.close(handle)


def run_trials(
    base: Config,
    points: Sequence[dict[str, Any]],
    trials: list[dict[str, Any]],
    store: Path,
    console: Console,
    *,
    jobs: int,
) -> None:
    """Train the points that are not among `trials`, and add them there and to the store."""
    done = {trial["trial"] for trial in trials}
    for name in map(trial_name, done):
        if (base.out / name).exists():  # a kill came between the line in the store and the end of the deletion
            shutil.rmtree(base.out / name)
    left = {trial_name(place): place for place in range(len(points)) if place not in done}
    configs = {name: dataclasses.replace(base, out=base.out / name, **points[place]) for name, place in left.items()}
    with progress_bars(console) as progress:
        bar = progress.add_task("trials", total=len(points), completed=len(points) - len(configs))
        for name, outcome in run_many(configs, console, jobs=jobs, quiet=True):
            trial = trial_of(left[name], points[left[name]], outcome)
            others = {other["sha256"] for other in trials if other["sha256"]}
            if trial["sha256"] and others - {trial["sha256"]}:
                raise ValueError(f"{store}: the data file has changed since the first trials; give another --out")
            append(store, trial)
            trials.append(trial)
            shutil.rmtree(configs[name].out)  # weights, and all that it knows about the test fold
            maes = [other["mae"] for other in trials if other["mae"] is not None]
            best = f", best validation MAE {min(maes):.4f}" if maes else ""
            progress.update(bar, advance=1, description=f"trials{best}")


def trial_of(place: int, point: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
    """What the store keeps of a trial: nothing of the test fold."""
    trial: dict[str, Any] = {"trial": place, "point": dict(point), "mae": None, "sha256": None, "runs": []}
    if "error" in outcome:
        return trial | {"error": outcome["error"]}
    kept = ("seed", "valid", "best_epoch", "epochs", "seconds", "precision")
    trial["runs"] = [{key: entry[key] for key in kept if key in entry} for entry in outcome["runs"]]
    maes = [entry["valid"]["mae"] for entry in trial["runs"]]
    return trial | {"mae": None if None in maes else float(np.mean(maes)), "sha256": outcome["dataset"]["sha256"]}


def rank(trials: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lowest validation MAE first, the earlier of two equal ones; those that did not train last."""
    asked = [trial for trial in trials if trial["trial"] < len(points)]
    return sorted(asked, key=lambda trial: (trial["mae"] is None, trial["mae"], trial["trial"]))


def trial_record(place: int, trial: Mapping[str, Any]) -> dict[str, Any]:
    """A line of search.csv."""
    runs = trial["runs"]

    def over_runs(values: Sequence[float | None]) -> float | None:
        return float(np.mean(values)) if values and None not in values else None

    maes = [entry["valid"]["mae"] for entry in runs]
    return {
        "rank": place,
        "trial": trial["trial"],
        **trial["point"],
        "seeds": len(runs),
        "valid_mae_mean": trial["mae"],
        "valid_mae_sd": float(np.std(maes, ddof=1)) if len(runs) > 1 and None not in maes else None,
        "valid_corr_mean": over_runs([entry["valid"]["corr"] for entry in runs]),
        "best_epochs": " ".join(str(entry["best_epoch"]) for entry in runs),
        "seconds": sum(entry["seconds"] for entry in runs),
        "error": trial.get("error", ""),
    }


def table(ranked: Sequence[dict[str, Any]], base: Config) -> Table:
    """The best trials."""
    seeds = "seed " + str(base.seeds[0]) if len(base.seeds) == 1 else f"mean of {len(base.seeds)} seeds"
    shown = Table(
        title=escape(f"Search: the best {min(SHOWN, len(ranked))} of {len(ranked)} trials"),
        caption=f"Validation fold only; {seeds}",
        box=SIMPLE_HEAD,
    )
    names = list(ranked[0]["point"])
    measures = {"MAE": "valid_mae_mean", "± sd": "valid_mae_sd", "Corr": "valid_corr_mean"}
    if len(base.seeds) == 1:
        del measures["± sd"]
    for heading in ("rank", *(SYMBOLS.get(name, name) for name in names), *measures):
        shown.add_column(heading, justify="right", no_wrap=True)
    for place, trial in enumerate(ranked[:SHOWN], start=1):
        line = trial_record(place, trial)
        shown.add_row(
            str(place),
            *(escape(str(line[name])) for name in names),
            *("-" if line[key] is None else f"{line[key]:.3f}" for key in measures.values()),
        )
    return shown
