"""One sensor missing: a student that sees some of a watch's sensors learns from a momentum teacher that sees both.

    python examples/missing_sensors.py                    # half an hour on one CPU core; goes on where it was
    python examples/missing_sensors.py --seeds 2 --steps 2    # in a minute, to see it run

The watch of `watch.py`: its windows, people, folds and labels; what counts is the exercise of people who were not
trained with, by the share of their windows that miss a sensor. "Both sensors" never sees one missing in training. With
"dropping" each window of a step keeps both sensors, or either alone, as likely; zeros take the place of the features
that are missing. The momentum teacher, an average of the student itself, is asked about the same windows with both
sensors, those without a label too; the one that "sees no more" about what its student sees of them. All begin with the
same weights.

Expect, in percent, mean ± deviation of ten seeds, a sensor missing in 0, 50 and 100 % of the windows, either as likely.
The difference from dropping alone is paired by person, with the 95 % interval about other people. "Won back" is of what
the missing costs: both sensors at 0 % less dropping alone at 50 %.

| labels a class | trained with | 0 % | 50 % | 100 % | at 50 %, vs dropping: people | won back |
|---|---|---|---|---|---|---|
| 20 | both sensors | 77.0 ± 1.3 | 61.5 ± 1.6 | 45.9 ± 2.4 | -10.6 ± 2.0 |  |
| 20 | dropping | 77.8 ± 1.1 | 72.0 ± 0.9 | 66.2 ± 1.0 |  |  |
| 20 | dropping, momentum teacher | 79.5 ± 1.4 | 75.7 ± 1.2 | 71.9 ± 1.2 | +3.7 ± 1.4 | 3.7 of 5.0 |
| 20 | the same, teacher sees no more | 79.0 ± 1.0 | 72.9 ± 1.0 | 66.9 ± 1.4 | +0.92 ± 0.86 | 0.9 of 5.0 |
| all | both sensors | 85.0 ± 0.6 | 67.8 ± 1.3 | 50.5 ± 2.4 | -12.2 ± 2.4 |  |
| all | dropping | 83.7 ± 0.7 | 80.0 ± 0.4 | 76.3 ± 0.3 |  |  |
| all | dropping, momentum teacher | 82.9 ± 0.8 | 79.5 ± 0.6 | 76.1 ± 0.5 | -0.5 ± 1.0 | -0.5 of 5.0 |
| all | the same, teacher sees no more | 83.7 ± 0.5 | 79.8 ± 0.3 | 75.8 ± 0.3 | -0.2 ± 0.3 | -0.2 of 5.0 |

- With 20 labels a class the momentum teacher wins back 3.7 of 5.0 points at 50 % missing (+1.2 ± 1.5 beyond half of
  it, paired by person): +3.7 ± 1.4 on dropping alone over people, +3.7 ± 1.0 over seeds. That is the aim in the mean,
  not beyond the interval.
- It is what the teacher sees that does it, not the unlabelled windows: one that sees no more than its student wins back
  0.9, and the one that sees both is +2.8 ± 1.0 from it over people, +2.8 ± 0.8 over seeds.
- Most of that is the weak sensor's: where the accelerometer is missing from every window +8.8 ± 2.9, where the
  gyroscope is +2.6 ± 1.4, where nothing is +1.7 ± 1.4. The last has nothing to do with missing sensors; the teacher
  that sees no more has +1.2 ± 1.1 of it.
- With all labels it wins back -0.5 of 5.0 (-3.0 ± 1.6 beyond half of it; -0.5 ± 1.0 on dropping alone). The aim is
  missed there: nothing is won back.
- Dropping itself is needed: at 50 % a model that always saw both sensors in training differs from dropping alone by
  -10.6 ± 2.0 with 20 labels, by -12.2 ± 2.4 with all.

Which windows miss a sensor is not drawn: a share of them drawn at random has the mean of the cases as its expectation,
which is what stands here. Steps, weight, ramp, temperature, sharpness and decay were chosen with `--valid`'s people and
other seeds, in eight settings of two folds and two seeds. One choice matters for dropping alone too: 400 steps, not
200.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import momentum_distill as md
import watch
from mtmd.results.plots import save_figure
from mtmd.settings.options import at_least
from study_tools import RunLog, StudyParser, paired_interval, signed, summary, write_results
from watch import CLASSES, FOLDS, WIDTH, Windows, scores

STEPS = 400
DECAY = 0.98  # of the momentum teacher
RAMP = 50  # steps in which the teacher comes to its full weight: at first it knows nothing
LABELS = {"20": 20, "all": None}  # labels per class
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the test windows, with a sensor missing


@dataclass(frozen=True)
class Arm:
    """How a model is trained."""

    name: str
    colour: str
    dropping: bool = True  # a sensor of some windows, drawn anew at each step
    teacher: bool = False  # a momentum model of the student
    sees_all: bool = True  # the teacher, both sensors of every window; else what its student sees


FULL = Arm("both sensors", "#000000", dropping=False)
DROPPING = Arm("dropping", "#0072B2")
TAUGHT = Arm("dropping, momentum teacher", "#D55E00", teacher=True)
SAME_VIEW = Arm("the same, teacher sees no more", "#009E73", teacher=True, sees_all=False)
ARMS = (FULL, DROPPING, TAUGHT, SAME_VIEW)


class Model(nn.Module):
    """Both sensors' features, zeros for those that are missing, and the exercise by what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([watch.Branch(), watch.Branch()])
        for branch in self.branches:
            branch.classify = nn.Identity()  # the fusion alone predicts
        self.fused = nn.Sequential(nn.ReLU(), nn.Linear(2 * WIDTH, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, windows: Windows, there: Tensor) -> Tensor:
        """Logits (N, C); `there` says which sensors there are, (N, 2), accelerometer first."""
        signals = zip(self.branches, (windows.strong, windows.weak), there.unbind(dim=1), strict=True)
        features = [torch.where(known.unsqueeze(1), branch(signal)[0], 0.0) for branch, signal, known in signals]
        return self.fused(torch.cat(features, dim=1))


SUBSETS = torch.tensor([[True, True], [False, True], [True, False]])  # both; no accelerometer; no gyroscope


def drawn_subsets(rows: int) -> Tensor:
    """For each row the sensors that are there, (N, 2): each of the three subsets as likely."""
    return SUBSETS[torch.randint(len(SUBSETS), (rows,))]


def all_sensors(rows: int) -> Tensor:
    return SUBSETS[:1].expand(rows, 2)


class Labels(watch.Labels):
    """Labels alone, with or without dropping."""

    def __init__(self, *, dropping: bool) -> None:
        super().__init__()
        self.dropping = dropping

    def forward(self, model: Model, batch: Windows) -> Tensor:
        there = (drawn_subsets if self.dropping else all_sensors)(len(batch.labels))
        return watch.truth(model(batch, there), batch.labels)

    def update(self, model: Model) -> None:
        pass


class Taught(nn.Module):
    """Labels, and for every window, labelled or not, what the momentum model says, of both sensors or of the same."""

    def __init__(self, model: Model, *, sees_all: bool) -> None:
        super().__init__()
        self.sees_all = sees_all
        self.teacher = md.EMAWrapper(model, decay=lambda updates: min(DECAY, (1 + updates) / (10 + updates)))
        self.response = md.ResponseDistillLoss(task="classification")
        self.steps = 0

    def forward(self, model: Model, batch: Windows) -> Tensor:
        rows = len(batch.labels)
        there = drawn_subsets(rows)
        student = model(batch, there)
        teacher = self.teacher(batch, all_sensors(rows) if self.sees_all else there)
        ramp = min(1.0, (self.steps + 1) / RAMP)
        return watch.truth(student, batch.labels) + ramp * self.response(student, teacher)

    def update(self, model: Model) -> None:
        self.steps += 1
        self.teacher.update(model)


def objective_of(arm: Arm, model: Model) -> Labels | Taught:
    return Taught(model, sees_all=arm.sees_all) if arm.teacher else Labels(dropping=arm.dropping)


class Result(NamedTuple):
    """Accuracies on the windows of one person who was not trained with, by what is missing; %."""

    labels: str
    arm: str
    seed: int
    person: int
    both: float  # nothing
    no_strong: float  # the accelerometer
    no_weak: float  # the gyroscope


CASES = ("both", "no_strong", "no_weak")


@torch.no_grad()
def accuracies(model: Model, windows: Windows) -> dict[int, list[float]]:
    """By person, one for each of the subsets."""
    found = [model(windows, subset.expand(len(windows.labels), 2)).argmax(dim=1) for subset in SUBSETS]
    right = torch.stack([(one == windows.labels).float() for one in found])
    people = windows.people.unique()
    return {int(person): (100 * right[:, windows.people == person].mean(dim=1)).tolist() for person in people}


def run(arm: Arm, given: Windows, test_set: Windows, *, seed: int, steps: int) -> dict[int, list[float]]:
    """An arm for one fold, seed and number of labels; all begin with the same weights."""
    torch.manual_seed(seed)
    model = Model()
    return accuracies(watch.train(model, objective_of(arm, model), given, steps), test_set)


def study(out: Path, settings: list[str], arms: list[Arm], *, seeds: range, steps: int, valid: bool) -> list[Result]:
    """All runs of these. Each is written down when it ends; one that stands there already is not made again."""
    windows = watch.load()
    log = RunLog(out / f"{'valid' if valid else 'test'}_{steps}_steps.jsonl")
    for setting, seed, fold in itertools.product(settings, seeds, range(FOLDS)):
        left = [arm for arm in arms if (setting, arm.name, seed, fold) not in log]
        if not left:
            continue
        train_set, test_set = watch.split(windows, fold, valid=valid)
        given = train_set._replace(labels=watch.with_labels(train_set.labels, LABELS[setting], seed))
        for arm in left:
            log.add((setting, arm.name, seed, fold), run(arm, given, test_set, seed=seed, steps=steps))
    return [
        Result(setting, arm, seed, int(person), *scored)
        for (setting, arm, seed, _), people in log.of(settings, [arm.name for arm in arms], seeds)
        for person, scored in people.items()
    ]


# Accuracy by who is missing: what each case has beside "both", and their share
MISSING = {"either": ("no_strong", "no_weak"), "accelerometer": ("no_strong",), "gyroscope": ("no_weak",)}


def accuracy(results: list[Result], setting: str, arm: Arm, missing: str, share: float, by: str) -> np.ndarray:
    """With a sensor missing in a share of the windows: for each person or each seed (`by`).

    Which windows these are is drawn without looking at them, so the expectation is exact: a mean of the cases.
    """
    there = scores(results, setting, arm.name, "both", by)
    less = np.mean([scores(results, setting, arm.name, case, by) for case in MISSING[missing]], axis=0)
    return (1 - share) * there + share * less


def won_back(results: list[Result], setting: str, arm: Arm, missing: str) -> tuple[float, float, float, float]:
    """At 50 % missing: what it costs, what is won back of that, and what that is beyond half of it, with its interval.

    The cost: the full model's accuracy with nothing missing less that of dropping alone. All paired by person.
    """
    whole = accuracy(results, setting, FULL, missing, 0.0, "person")
    alone, ours = (accuracy(results, setting, one, missing, 0.5, "person") for one in (DROPPING, arm))
    beyond = paired_interval(ours, (whole + alone) / 2)
    return float((whole - alone).mean()), float((ours - alone).mean()), *beyond


SHARE_NAMES = tuple(f"{100 * share:.0f} %" for share in SHARES)
HEAD = ("labels a class", "missing", "trained with", *SHARE_NAMES, "at 50 %, vs dropping: people", "seeds", "won back")


def lines(results: list[Result]) -> list[list[str]]:
    """Accuracies by seed; the differences from dropping alone by person and by seed; and the share of the cost."""
    there = {(result.labels, result.arm) for result in results}
    rows = []
    for setting, missing, arm in itertools.product(LABELS, MISSING, ARMS):
        if (setting, arm.name) not in there:
            continue
        row = [setting, missing, arm.name]
        row += [summary(accuracy(results, setting, arm, missing, share, "seed")) for share in SHARES]
        if arm != DROPPING and (setting, DROPPING.name) in there:
            for by in ("person", "seed"):
                ours, theirs = (accuracy(results, setting, one, missing, 0.5, by) for one in (arm, DROPPING))
                row.append(signed(paired_interval(ours, theirs)))
        else:
            row += ["", ""]
        if arm.teacher and {(setting, FULL.name), (setting, DROPPING.name)} <= there:
            cost, won, *_ = won_back(results, setting, arm, missing)
            row.append(f"{won:.1f} of {cost:.1f}")
        else:
            row.append("")
        rows.append(row)
    return rows


def table_of(results: list[Result], title: str) -> Table:
    table = Table(*HEAD, title=title, box=SIMPLE_HEAD)
    for row in lines(results):
        table.add_row(*row, end_section=row[2] == ARMS[-1].name)
    return table


def plot(results: list[Result], path: Path) -> None:
    """Accuracy against the share of windows that miss a sensor, either at random; a panel for each number of labels."""
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10})
    settings = [name for name in LABELS if name in {result.labels for result in results}]
    figure, panels = plt.subplots(1, len(settings), figsize=(5.6 * len(settings), 4.2), layout="constrained")
    shares = np.array(SHARES)
    for axes, setting in zip(np.atleast_1d(panels), settings, strict=True):
        ends = []
        for arm in (one for one in ARMS if (setting, one.name) in {(result.labels, result.arm) for result in results}):
            seeds = np.stack([accuracy(results, setting, arm, "either", share, "seed") for share in shares])
            mean, spread = seeds.mean(axis=1), seeds.std(axis=1, ddof=1)
            axes.fill_between(100 * shares, mean - spread, mean + spread, color=arm.colour, alpha=0.12, linewidth=0)
            axes.plot(100 * shares, mean, arm.colour, marker="o", markersize=4)
            ends.append((mean[-1], arm))
        watch.label_ends(axes, 104, ends, "left")
        axes.set(
            xlim=(-4, 195),
            xticks=100 * shares,
            ylabel=f"accuracy %, labels: {setting if setting == 'all' else f'{setting} a class'}",
        )
        axes.set_xlabel("windows that miss a sensor, %", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines["bottom"].set_bounds(-4, 100)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = StudyParser(__doc__, "runs/missing_sensors", figure=True)
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS), help="labels per class")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="but these")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=at_least(1), default=STEPS)
    parser.add_argument("--valid", action="store_true", help="score people of the training folds")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    arms = [arm for arm in ARMS if options.arms is None or arm.name in options.arms]
    results = study(options.out, options.labels, arms, seeds=seeds, steps=options.steps, valid=options.valid)
    people = "people held out for validation" if options.valid else "new people"
    title = f"Accuracy on {people} by the share of windows that miss a sensor, %, {options.seeds} seeds x {FOLDS} folds"
    Console(width=190).print(table_of(results, title))
    settings = {name: getattr(options, name) for name in ("seeds", "first_seed", "steps", "valid")}
    rounded = [one._replace(**{case: round(getattr(one, case), 2) for case in CASES}) for one in results]
    write_results(options.out / "missing_sensors.json", settings, [one._asdict() for one in rounded])
    plot(results, options.out / f"missing_sensors.{options.format}")
    print(f"results and figure: {options.out / 'missing_sensors'}.json, .{options.format}")
    return results


if __name__ == "__main__":
    main()
