"""A weak sensor taught by a strong one: a watch's gyroscope learns from its accelerometer, on new people.

    python examples/watch.py                        # about twenty minutes on one CPU core; goes on where it was stopped
    python examples/watch.py --seeds 2 --steps 2    # in a minute, to see it run

Ten people, seven exercises, windows of two seconds (`watch_data.py`). In each of five folds two people are held out.
Of the windows of the other eight 5 or 20 of each exercise have a label, or all; those without are pairs of signals
all the same (label -2). The gyroscope alone is what counts. Every arm begins with the same weights, trained for 100
steps with labels alone, and is trained for 100 more: with labels alone; drawn to what the accelerometer, or the
fusion, has learned by then ("plain", by hand: no block is called); or with the blocks, one added at a time.

Expect, in percent, mean ± deviation of ten seeds, and in brackets what is beyond plain distillation, paired by
person: the 95 % interval is about other people, which is what one wants to know.

| gyroscope alone, trained with | 5 labels a class | 20 labels a class | all labels |
|---|---|---|---|
| labels | 48.6 ± 3.3 | 61.4 ± 2.0 | 74.7 ± 0.7 |
| plain distillation | 56.7 ± 2.6 | 67.1 ± 1.4 | 73.5 ± 0.7 |
| plain, from the fusion | 58.9 ± 3.4 (+2.2 ± 1.4) | 68.2 ± 1.1 (+1.1 ± 1.2) | - |
| response | 57.0 ± 2.9 (+0.3 ± 0.5) | 67.0 ± 1.4 (-0.1 ± 0.7) | - |
| response, fusion | 59.5 ± 3.2 (+2.8 ± 1.7) | 69.0 ± 1.3 (+1.9 ± 1.2) | - |
| all blocks | 59.4 ± 3.2 (+2.7 ± 1.6) | 68.8 ± 1.0 (+1.8 ± 1.1) | 73.9 ± 0.8 (+0.4 ± 0.6) |

What holds and what does not:

- With few labels the blocks together are ahead of plain distillation, beyond the interval over people and over seeds.
  With five labels accelerometer and fusion get better too (+3.0 ± 1.3 and +2.7 ± 0.9 on labels alone); with twenty
  the accelerometer (+2.5 ± 1.1), the fusion not (+0.6 ± 1.3).
- Most of it is who teaches: by hand, too, the fusion is the better teacher (+2.2 ± 1.4 with five labels, +1.1 ± 1.2
  with twenty). The blocks add a teacher that goes on learning. That is worth little: with five labels +0.6 ± 0.4 over
  people, +0.6 ± 0.8 over seeds; with twenty +0.7 ± 0.9 and +0.7 ± 0.4. Neither is beyond both intervals.
- The response loss alone, with the accelerometer's momentum model, is level with plain distillation: +0.3 ± 0.5 with
  five labels.
- The contrastive loss and its queue add nothing: -0.1 ± 0.4 with five labels, -0.2 ± 0.3 with twenty.
- With all labels there is nothing to gain: labels alone 74.7, all blocks 73.9 (-0.8 ± 2.7), and the fusion loses
  (-1.7 ± 1.1).

The settings were chosen on two people of the training folds (what `--valid` scores), with other seeds: nine of the
blocks, seven of plain distillation, in single runs of three or four folds. They are one for all folds, so that a
person who is tested in one fold had a say in another.
"""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import momentum_distill as md
from mtmd.results.plots import save_figure
from mtmd.settings.options import at_least
from study_tools import RunLog, StudyParser, paired_interval, signed, summary, write_results
from watch_data import load_windows

CLASSES, PEOPLE, FOLDS = 7, 10, 5
UNLABELLED = -2  # the library's label for "there, but of unknown class"
WIDTH = 64  # features of a sensor
STEPS = 100  # with labels alone, and as many again in each arm
RATE = 5e-3
LABELLED, UNKNOWN = 40, 64  # rows of a batch: labelled ones, and any
QUEUE = 512
SETTINGS = {"5": 5, "20": 20, "all": None}  # labels per class


@dataclass(frozen=True)
class Arm:
    """What is added to the labels; a weight of 0 leaves a term out."""

    name: str
    colour: str
    by_hand: str = ""  # gyroscope drawn to what this, once trained, says; no block is called
    response: float = 0.0  # gyroscope drawn to the accelerometer's momentum model
    alpha: float = 0.2  # share of the gyroscope's own momentum model in these targets
    fusion: float = 0.0  # both sensors drawn to the fusion's momentum model
    contrast: float = 0.0  # features of the two sensors, with a queue


LABELS = Arm("labels", "#000000")
PLAIN = Arm("plain distillation", "#0072B2", by_hand="accelerometer")
FROM_FUSION = Arm("plain, from the fusion", "#CC79A7", by_hand="fusion")
BLOCKS = Arm("all blocks", "#D55E00", response=1.0, fusion=3.0, contrast=2.0)
ARMS = (
    LABELS,
    PLAIN,
    FROM_FUSION,
    replace(BLOCKS, name="response", colour="#56B4E9", fusion=0.0, contrast=0.0),
    replace(BLOCKS, name="response, fusion", colour="#009E73", contrast=0.0),
    BLOCKS,
)
MAIN = (LABELS, PLAIN, BLOCKS)  # the others where labels are few
DRAWN = (LABELS, PLAIN, FROM_FUSION, BLOCKS)


class Windows(NamedTuple):
    strong: Tensor  # accelerometer, (N, 3, time)
    weak: Tensor  # gyroscope, (N, 3, time)
    labels: Tensor  # exercise, (N,)
    people: Tensor  # 0 to 9, (N,)

    def rows(self, chosen: Tensor) -> "Windows":
        return Windows(*(tensor[chosen] for tensor in self))


def load() -> Windows:
    """All 4,677 windows, in the order of the recordings."""
    found = load_windows()
    sensors = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in (found.accelerometer, found.gyroscope))
    return Windows(*sensors, torch.from_numpy(found.exercise), torch.from_numpy(found.person))


def folds() -> Tensor:
    """The people of each fold, (FOLDS, 2)."""
    return torch.randperm(PEOPLE, generator=torch.Generator().manual_seed(0)).view(FOLDS, -1)


def split(windows: Windows, fold: int, *, valid: bool) -> tuple[Windows, Windows]:
    """The windows of the people to train with and of two others; standardised by those to train with.

    With `valid` the two are the next fold's, and nobody sees the people of this one.
    """
    test, after = folds()[fold], folds()[(fold + 1) % FOLDS]
    held_out = torch.isin(windows.people, test)
    train = ~held_out
    if valid:
        held_out = torch.isin(windows.people, after)
        train &= ~held_out

    def standardised(signal: Tensor) -> Tensor:
        slower = F.avg_pool1d(signal, 2)  # 25 Hz
        known = slower[train]
        return (slower - known.mean(dim=(0, 2), keepdim=True)) / known.std(dim=(0, 2), keepdim=True)

    windows = windows._replace(strong=standardised(windows.strong), weak=standardised(windows.weak))
    return windows.rows(train), windows.rows(held_out)


def with_labels(labels: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Labels for so many windows of each exercise, drawn by the seed; the others are unlabelled."""
    if per_class is None:
        return labels
    kept = torch.full_like(labels, UNLABELLED)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for exercise in range(CLASSES):
        kept[order[labels[order] == exercise][:per_class]] = exercise
    return kept


class Branch(nn.Module):
    """A sensor: convolutions over time, their mean and maximum, features, and the exercise."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Sequential(
            *(nn.Conv1d(3, WIDTH, 8, stride=4, padding=4), nn.GroupNorm(1, WIDTH), nn.ReLU()),
            *(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(1, WIDTH), nn.ReLU()),
        )
        self.project = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
        self.classify = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, CLASSES))

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        frames = self.convolve(signal)  # (N, d, time)
        features = self.project(frames.mean(dim=2) + frames.amax(dim=2))
        return features, self.classify(features)


class Output(NamedTuple):
    strong: Tensor  # features, (N, d)
    weak: Tensor
    strong_logits: Tensor  # (N, C)
    weak_logits: Tensor
    fused_logits: Tensor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strong, self.weak = Branch(), Branch()
        self.fuse = md.MomentumFusionFactors(["strong", "weak"])
        self.fused = nn.Sequential(nn.ReLU(), nn.Linear(2 * WIDTH, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, strong: Tensor, weak: Tensor) -> Output:
        (s, s_logits), (w, w_logits) = self.strong(strong), self.weak(weak)
        joined = torch.cat(list(self.fuse({"strong": s, "weak": w}).values()), dim=1)
        return Output(s, w, s_logits, w_logits, self.fused(joined))


def truth(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labelled rows; 0 where a batch has none."""
    return F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum") / (labels >= 0).sum().clamp(min=1)


class Labels(nn.Module):
    """Labels alone, for both sensors and the fusion: where every arm starts."""

    def forward(self, model: Model, batch: Windows) -> Tensor:
        output = model(batch.strong, batch.weak)
        heads = output.strong_logits, output.weak_logits, output.fused_logits
        return sum((truth(logits, batch.labels) for logits in heads), torch.zeros(()))

    def update(self, model: Model) -> None:
        model.fuse.update()


class ByHand(nn.Module):
    """Plain distillation: what was trained with the labels stands still and gives soft targets to the gyroscope."""

    def __init__(self, arm: Arm, model: Model) -> None:
        super().__init__()
        self.arm = arm
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()

    def forward(self, model: Model, batch: Windows) -> Tensor:
        _, logits = model.weak(batch.weak)
        seen = self.teacher(batch.strong, batch.weak)
        teacher = seen.fused_logits if self.arm.by_hand == "fusion" else seen.strong_logits
        return truth(logits, batch.labels) + F.cross_entropy(logits, teacher.softmax(dim=1))

    def update(self, model: Model) -> None:
        pass


class Blocks(nn.Module):
    """The blocks of an arm and the loss of a batch."""

    def __init__(self, arm: Arm, model: Model) -> None:
        super().__init__()
        self.arm = arm
        self.momentum = md.EMAWrapper(model, decay=0.98)  # of both sensors and the fusion
        self.queue = md.ClassQueue(QUEUE, {"strong": WIDTH, "weak": WIDTH, "weak_momentum": WIDTH})
        self.contrast = md.SupConDistillLoss(temperature=0.1, alpha=0.4)
        self.response = md.ResponseDistillLoss(task="classification", alpha=arm.alpha)
        self.fusion = md.HardSampleFusionLoss(hard_attention=False)

    def forward(self, model: Model, batch: Windows) -> Tensor:
        arm, labels = self.arm, batch.labels
        output, slow = model(batch.strong, batch.weak), self.momentum(batch.strong, batch.weak)
        loss = truth(output.strong_logits, labels) + truth(output.weak_logits, labels)
        loss = loss + truth(output.fused_logits, labels)
        if arm.response:
            loss = loss + arm.response * self.response(output.weak_logits, slow.strong_logits, slow.weak_logits)
        if arm.fusion:
            sharp = 2 * slow.fused_logits  # surer than it is, so that the students are drawn apart
            for logits in (output.weak_logits, output.strong_logits):
                to_fusion = self.fusion(student_logits=logits, fused_logits=sharp, labels=labels)
                loss = loss + arm.fusion * to_fusion
        if arm.contrast:
            loss = loss + arm.contrast * self.between_sensors(output, slow, labels)
        return loss

    def between_sensors(self, output: Output, slow: Output, labels: Tensor) -> Tensor:
        """The contrastive term in both directions; the batch enters the queue after it."""
        past_strong, past_labels = self.queue.read("strong")
        past_weak, _ = self.queue.read("weak")
        past_momentum, _ = self.queue.read("weak_momentum")
        key_labels = (labels, past_labels)
        strong_to_weak = self.contrast(
            output.strong,
            (output.weak, past_weak),
            labels,
            key_labels,
            momentum_query=output.strong,
            momentum_keys=(slow.weak, past_momentum),
        )
        weak_to_strong = self.contrast(
            output.weak,
            (output.strong, past_strong),
            labels,
            key_labels,
            momentum_query=slow.weak,
            momentum_keys=(output.strong, past_strong),
        )
        self.queue.enqueue(labels, {"strong": output.strong, "weak": output.weak, "weak_momentum": slow.weak})
        return (strong_to_weak + weak_to_strong) / 2

    def update(self, model: Model) -> None:
        self.momentum.update(model)
        model.fuse.update()


def batches(labels: Tensor, steps: int, *, unlabelled: bool) -> Iterator[Tensor]:
    """Rows of a batch: of those with a label so many at random, and as many as wanted of all."""
    known = (labels >= 0).nonzero().squeeze(1)
    for _ in range(steps):
        drawn = known[torch.randperm(len(known))[:LABELLED]]
        yield torch.cat([drawn, torch.randint(len(labels), (UNKNOWN,))]) if unlabelled else drawn


def train(model: Model, objective: Labels | ByHand | Blocks, windows: Windows, steps: int) -> Model:
    """The model, trained further; the same optimizer, rate and number of steps for every arm."""
    optimizer = torch.optim.AdamW(md.param_groups(model, objective, weight_decay=0.05, lr=RATE), foreach=True)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    everyone = bool((windows.labels >= 0).all())
    for rows in batches(windows.labels, steps, unlabelled=everyone or not isinstance(objective, Labels)):
        loss = objective(model, windows.rows(rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        objective.update(model)
    return model.eval()


Accuracies = tuple[float, float, float]  # gyroscope alone, accelerometer alone, fusion; %


class Result(NamedTuple):
    """Accuracies on the windows of one person who was not trained with."""

    labels: str
    arm: str
    seed: int
    person: int
    weak: float
    strong: float
    fused: float


SENSORS = ("weak", "strong", "fused")


@torch.no_grad()
def accuracies(model: Model, windows: Windows) -> dict[int, Accuracies]:
    """By person."""
    output = model(windows.strong, windows.weak)
    right = torch.stack(
        [
            (logits.argmax(dim=1) == windows.labels).float()
            for logits in (output.weak_logits, output.strong_logits, output.fused_logits)
        ]
    )
    return {
        int(person): tuple((100 * right[:, windows.people == person].mean(dim=1)).tolist())
        for person in windows.people.unique()
    }


def objective_of(arm: Arm, model: Model) -> Labels | ByHand | Blocks:
    if arm.by_hand:
        return ByHand(arm, model)
    return Blocks(arm, model) if arm.response else Labels()


def run(arm: Arm, start: Model, given: Windows, test_set: Windows, *, seed: int, steps: int) -> dict[int, Accuracies]:
    """An arm for one fold, seed and number of labels: `start`, trained with labels alone, is trained further."""
    torch.manual_seed(seed + 1)
    model = copy.deepcopy(start)
    return accuracies(train(model, objective_of(arm, model), given, steps), test_set)


def scores(results: list[Result], setting: str, arm: str, what: str, by: str) -> np.ndarray:
    """Means over the runs, one for each person or one for each seed (`by`), in order."""
    groups: dict[int, list[float]] = {}
    for result in results:
        if (result.labels, result.arm) == (setting, arm):
            groups.setdefault(getattr(result, by), []).append(getattr(result, what))
    return np.array([np.mean(groups[one]) for one in sorted(groups)])


def lines(results: list[Result]) -> list[list[str]]:
    """The table: accuracies by seed, differences from plain distillation by person and by seed, from both teachers."""
    rows = []
    there = {(result.labels, result.arm) for result in results}
    for setting, arm in itertools.product(SETTINGS, ARMS):
        if (setting, arm.name) not in there:
            continue
        by_seed = scores(results, setting, arm.name, "weak", "seed")
        row = [setting, arm.name, summary(by_seed)]
        for other, by in ((PLAIN, "person"), (PLAIN, "seed"), (FROM_FUSION, "person")):
            if arm == other or (setting, other.name) not in there:
                row.append("")
                continue
            pair = (scores(results, setting, one.name, "weak", by) for one in (arm, other))
            row.append(signed(paired_interval(*pair)))
        for what in ("strong", "fused"):
            seen = f"{scores(results, setting, arm.name, what, 'seed').mean():.1f}"
            row.append("" if arm.by_hand else seen)  # they stand still there
        rows.append(row)
    return rows


HEAD = (
    *("labels a class", "trained with", "gyroscope", "vs plain, people", "vs plain, seeds", "vs from fusion, people"),
    *("accelerometer", "fused"),
)


def table_of(results: list[Result], title: str) -> Table:
    table = Table(*HEAD, title=title, box=SIMPLE_HEAD)
    for row in lines(results):
        table.add_row(*row, end_section=row[1] == ARMS[-1].name)
    return table


def missing_curve(results: list[Result], setting: str, arm: str, shares: np.ndarray, left: str) -> np.ndarray:
    """Accuracy where a share of the windows has but one sensor left: its own head predicts there, else the fusion."""
    one, both = (scores(results, setting, arm, what, "seed").mean() for what in (left, "fused"))
    return (1 - shares) * both + shares * one


def plot(results: list[Result], path: Path) -> None:
    """Left the gyroscope alone against the labels; right both sensors, of which more and more are missing."""
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 10})
    figure, (alone, missing) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    settings = [name for name in SETTINGS if name in {result.labels for result in results}]
    there = {(result.labels, result.arm) for result in results}
    shown = [arm for arm in DRAWN if (settings[0], arm.name) in there]
    ends = []
    for offset, arm in zip((-0.09, -0.03, 0.03, 0.09), shown, strict=False):
        places = [place for place, setting in enumerate(settings) if (setting, arm.name) in there]
        columns = np.stack([scores(results, settings[place], arm.name, "weak", "seed") for place in places])
        means, spread = columns.mean(axis=1), columns.std(axis=1, ddof=1)
        alone.errorbar(np.add(places, offset), means, spread, color=arm.colour, marker="o", capsize=3)
        ends.append((means[0], arm))
    label_ends(alone, -0.2, ends, "right")
    alone.set_xticks(range(len(settings)), [name if name == "all" else f"{name} a class" for name in settings])
    alone.set(xlabel="labels", ylabel="gyroscope alone, accuracy %", xlim=(-1.5, len(settings) - 0.7))

    shares, ends, few = np.linspace(0, 1, 21), [], settings[0]
    for arm in (arm for arm in shown if not arm.by_hand):
        no_strong, no_weak = (missing_curve(results, few, arm.name, shares, left) for left in ("weak", "strong"))
        missing.plot([*-shares[::-1], *shares], [*no_strong[::-1], *no_weak], arm.colour)
        ends.append((no_weak[-1], arm))
    label_ends(missing, 1.05, ends, "left")
    missing.set_xticks([-1, -0.5, 0, 0.5, 1], ["100 %", "50 %", "0", "50 %", "100 %"])
    missing.set(xlabel="no accelerometer  ←  share of windows  →  no gyroscope", xlim=(-1.05, 1.65))
    missing.set_ylabel(f"accuracy %, labels: {few} a class")
    for axes in (alone, missing):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def label_ends(axes: plt.Axes, x: float, ends: list[tuple[float, Arm]], side: str) -> None:
    """Names beside the ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    least, last = 0.055 * (high - low), -np.inf
    for y, arm in sorted(ends, key=lambda end: end[0]):
        last = max(y, last + least)
        axes.annotate(arm.name, (x, last), color=arm.colour, va="center", ha=side, annotation_clip=False)


def study(out: Path, settings: list[str], arms: list[Arm], *, seeds: range, steps: int, valid: bool) -> list[Result]:
    """All runs of these. Each is written down when it ends; one that stands there already is not made again."""
    windows = load()
    log = RunLog(out / f"{'valid' if valid else 'test'}_{steps}_steps.jsonl")
    for setting, seed, fold in itertools.product(settings, seeds, range(FOLDS)):
        wanted = [arm for arm in arms if setting != "all" or arm in MAIN]
        left = [arm for arm in wanted if (setting, arm.name, seed, fold) not in log]
        if not left:
            continue
        train_set, test_set = split(windows, fold, valid=valid)
        given = train_set._replace(labels=with_labels(train_set.labels, SETTINGS[setting], seed))
        torch.manual_seed(seed)
        start = train(Model(), Labels(), given, steps)
        for arm in left:
            log.add((setting, arm.name, seed, fold), run(arm, start, given, test_set, seed=seed, steps=steps))
    return [
        Result(setting, arm, seed, int(person), *scored)
        for (setting, arm, seed, _), people in log.of(settings, [arm.name for arm in arms], seeds)
        for person, scored in people.items()
    ]


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = StudyParser(__doc__, "runs/watch", figure=True)
    parser.add_argument("--labels", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="labels per class")
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="but these")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=at_least(1), default=STEPS, help="with labels alone, and again in each arm")
    parser.add_argument("--valid", action="store_true", help="score people of the training folds")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    arms = [arm for arm in ARMS if options.arms is None or arm.name in options.arms]
    results = study(options.out, options.labels, arms, seeds=seeds, steps=options.steps, valid=options.valid)
    people = "people held out for validation" if options.valid else "new people"
    Console(width=150).print(table_of(results, f"Accuracy on {people}, %, {options.seeds} seeds x {FOLDS} folds"))
    settings = {name: getattr(options, name) for name in ("seeds", "first_seed", "steps", "valid")}
    rounded = [one._replace(**{name: round(getattr(one, name), 2) for name in SENSORS}) for one in results]
    write_results(options.out / "watch.json", settings, [one._asdict() for one in rounded])
    plot(results, options.out / f"watch.{options.format}")
    print(f"results and figure: {options.out / 'watch'}.json, .{options.format}")
    return results


if __name__ == "__main__":
    main()
