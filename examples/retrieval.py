"""Retrieval across two views: when does the queue help, and when do momentum targets?

    python examples/retrieval.py                                      # twenty minutes on one CPU core
    python examples/retrieval.py --seeds 2 --epochs 1 --data digits   # half a minute, to see it run

Two real sets: the lower and the upper half of scikit-learn's digits, and the accelerometer and the gyroscope of a watch
(`pip install seglearn`). 1,000 pairs for training, whose number is their only label; scored is how well a row of one
view finds those of its class among 500 rows of the other: new digits, or windows of two people that no training has
seen. Every run is a line of a file in `--out`, and the same command goes on where it was stopped. Expect, in percent,
mean ± deviation of ten seeds (and the 95 % interval of paired differences, of the watch over its five folds), at a
temperature of 0.1 and a batch of 64:

| mAP, trained with | digits | watch | digits, 40 % of the pairs wrong | watch, 40 % wrong |
|---|---|---|---|---|
| the batch alone, InfoNCE | 52.4 ± 0.3 | 49.1 ± 3.3 | 44.3 | 34.1 |
| and a queue | 54.6 ± 0.6 (+2.1 ± 0.5) | 53.6 ± 4.4 (+4.5 ± 1.7) | +6.2 ± 1.4 | +11.6 ± 2.7 |
| and momentum targets | 54.0 ± 0.2 (+1.5 ± 0.1) | 49.8 ± 3.2 (+0.69 ± 0.72) | +3.8 ± 0.2 | +2.6 ± 0.6 |
| at 0.4, the batch alone | 57.0 ± 0.5 | 55.7 ± 4.3 | 52.1 | 43.7 |

At this temperature the queue helps, and targets do, but for the watch with right pairs (+0.69 ± 0.72), the more pairs
are wrong the more. What does not hold:

- That they are needed: a higher temperature does more (in the last column, at 0.8, as much as the queue: 46.2). At 0.4
  targets are +0.3 ± 0.1, -0.5 ± 0.8, +0.8 ± 0.2 and +0.57 ± 0.60, the queue -10.4 ± 0.7, -9.6 ± 6.9, -10.8 ± 2.0 and
  -6.39 ± 6.42.
- That the queue betters the whole list: recall@1 of the digits falls from 82.3 to 77.0.
- That MoCo's keys will do: with momentum keys of the batch too, the queue is -0.8 ± 0.2 and -1.8 ± 0.9.

`docs/when.md` has all axes: temperature, wrong pairs, batch, length of training, slots, decay, alpha, the teacher's
temperature, kinds of targets. Of the settings, rates and dropout are those of `two_views_digits.py`; the number of
epochs was chosen on validation rows of two other seeds for the batch alone; temperatures in the last table are chosen
on validation rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
from two_views_digits import load_views
from watch_data import load_windows

VIEWS = ("first", "second")
DATA = {"digits": "lower and upper half of a digit", "watch": "accelerometer and gyroscope of a watch"}
TRAIN, TEST = 1000, 500
FOLDS = 5  # of the watch, by two people each
UNLABELLED = -2  # the library's label for a key that is nobody's positive
WIDTH = 64  # of the space that both views share


@dataclass(frozen=True)
class Setting:
    """One way to train. What stands here is the base, from which one thing at a time is changed."""

    data: str = "digits"
    method: str = "library"  # or "InfoNCE", "SupCon": by hand
    batch: int = 64
    wrong: float = 0.0  # share of the training pairs whose views belong to different samples
    temperature: float = 0.1
    longer: int = 1  # times as many epochs
    slots: int = 0  # of the queue; 0: none
    alpha: float = 0.0  # weight of the momentum targets; 0: none
    decay: float = 0.98  # of the momentum models
    teacher_temperature: float | None = None  # inside the momentum targets; None: the same as the student's
    targets: str = "softmax"  # or "centred" or "sinkhorn": what is made of the momentum logits
    batch_keys: str = "online"  # or "momentum"; the keys of the queue are always the momentum models'
    hardness: float = 0.0  # how much more near negatives weigh
    queue_positives: bool = True  # False: a sample's own rows in the queue, of an epoch ago, are keys as any other


ARMS: dict[str, dict[str, Any]] = {
    "InfoNCE by hand": {"method": "InfoNCE"},
    "SupCon by hand": {"method": "SupCon"},
    "batch alone": {},
    "queue": {"slots": 1024},
    "targets": {"alpha": 0.4},
    "queue and targets": {"slots": 1024, "alpha": 0.4},
    "hard negatives": {"hardness": 5.0},
}
COMPARED = ("batch alone", "queue", "targets")  # along every axis
KINDS = ("softmax", "centred", "sinkhorn")  # of momentum targets: on the digits, with these students and teachers
STUDENTS = ({"temperature": 0.1}, {"temperature": 0.4}, {"temperature": 0.1, "wrong": 0.4})
TEACHERS = (0.5, 1.0, 2.0)  # times the student's temperature
TEMPERATURES, WRONG, BATCHES = (0.05, 0.1, 0.2, 0.4, 0.8), (0.0, 0.2, 0.4), (16, 64, 256)


def arm(name: str, data: str, **change: Any) -> Setting:
    return replace(Setting(data), **{**ARMS[name], **change})


def taught(kind: str, student: dict[str, Any], times: float) -> Setting:
    """The arm "targets" of the digits, of one kind, with a teacher of so many times the student's temperature."""
    temperature = None if times == 1.0 else round(times * student["temperature"], 3)
    return arm("targets", "digits", teacher_temperature=temperature, targets=kind, **student)


def grid(data: str) -> list[Setting]:
    """All that is compared: one axis after the other, around the base."""
    settings = [arm(name, data) for name in ARMS]
    settings += [arm(name, data, temperature=t) for t in TEMPERATURES for name in COMPARED]
    settings += [arm(name, data, wrong=wrong) for wrong in WRONG for name in COMPARED]
    settings += [arm(name, data, batch=batch) for batch in BATCHES for name in COMPARED]
    settings += [arm(name, data, wrong=0.4, temperature=t) for t in TEMPERATURES for name in COMPARED]
    settings += [arm(name, data, longer=4) for name in COMPARED]
    settings += [arm("queue", data, queue_positives=False), arm("queue", data, batch_keys="momentum")]
    settings += [arm("queue", data, slots=slots) for slots in (64, 256)]
    settings += [arm("targets", data, alpha=alpha) for alpha in (0.2, 0.8)]
    settings += [arm("targets", data, teacher_temperature=t) for t in (0.05, 0.2)]
    settings += [arm(name, data, decay=decay) for decay in (0.9, 0.995) for name in ("queue", "targets")]
    if data == "digits":
        settings += [taught(kind, student, times) for student in STUDENTS for times in TEACHERS for kind in KINDS]
    return list(dict.fromkeys(settings))


class Pairs(NamedTuple):
    first: Tensor  # (N, numbers)
    second: Tensor  # (N, numbers)
    labels: Tensor  # (N,), for scoring alone

    def rows(self, chosen: Tensor) -> "Pairs":
        return Pairs(*(tensor[chosen] for tensor in self))


def summarised(windows: np.ndarray) -> Tensor:
    """Mean, deviation and the first 16 magnitudes of the spectrum of each axis: (N, steps, 3) to (N, 54)."""
    spectrum = np.log1p(np.abs(np.fft.rfft(windows - windows.mean(axis=1, keepdims=True), axis=1))[:, 1:17])
    numbers = [windows.mean(axis=1), windows.std(axis=1), spectrum.reshape(len(windows), -1)]
    return torch.tensor(np.concatenate(numbers, axis=1), dtype=torch.float32)


@cache
def load_watch() -> tuple[Pairs, Tensor]:
    """Every window, and the person that each is of."""
    windows = load_windows()
    views = summarised(windows.accelerometer), summarised(windows.gyroscope)
    return Pairs(*views, torch.tensor(windows.exercise)), torch.tensor(windows.person)


load_halves = cache(lambda: load_views("halves"))


def split(data: str, seed: int, size: int = TRAIN) -> dict[str, Pairs]:
    """Rows for training, validation and test of a seed; no person of the watch is in two of them."""
    draw = torch.Generator().manual_seed(seed)
    if data == "digits":  # the same test digits for every seed
        digits, pool, test = load_halves()
        pool = pool[torch.randperm(len(pool), generator=draw)]
        rows = {"train": pool[:size], "valid": pool[TRAIN:], "test": test}
        return {name: Pairs(*digits.rows(chosen)) for name, chosen in rows.items()}
    windows, person = load_watch()
    fold = person // 2  # two people each; the test fold goes round with the seeds
    test, valid = seed % FOLDS, (seed + 1) % FOLDS
    of = {"train": (fold != test) & (fold != valid), "valid": fold == valid, "test": fold == test}
    pieces = {}
    for name, chosen in of.items():
        rows = chosen.nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=draw)][: size if name == "train" else TEST]
        pieces[name] = windows.rows(rows)
    mean, scale = [], []
    for view in VIEWS:
        numbers = getattr(pieces["train"], view)
        mean.append(numbers.mean(dim=0))
        scale.append(numbers.std(dim=0) + 1e-6)
    return {
        name: Pairs((piece.first - mean[0]) / scale[0], (piece.second - mean[1]) / scale[1], piece.labels)
        for name, piece in pieces.items()
    }


def with_wrong_pairs(pairs: Pairs, share: float, seed: int) -> Pairs:
    """So many rows, drawn at random, pass their second view on to the next of them."""
    chosen = torch.randperm(len(pairs.labels), generator=torch.Generator().manual_seed(seed))
    chosen = chosen[: round(share * len(chosen))]
    second = pairs.second.clone()
    second[chosen] = pairs.second[chosen.roll(1)]
    return pairs._replace(second=second)


class Encoders(nn.Module):
    """One encoder for each view, into one space."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.of = nn.ModuleDict({"first": encoder(first), "second": encoder(second)})

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"first": self.of["first"](first), "second": self.of["second"](second)}


def encoder(numbers: int) -> nn.Module:
    return nn.Sequential(nn.Linear(numbers, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, WIDTH))


def info_nce(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """By hand: each row finds its pair in the batch, both ways (CLIP's loss)."""
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    pair = torch.arange(len(logits))
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


def sup_con(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """By hand: both views of every sample are keys of each other, all but oneself (Khosla et al., 2020)."""
    rows, ids = F.normalize(torch.cat([first, second]), dim=1), torch.arange(len(first)).repeat(2)
    oneself = torch.eye(len(ids), dtype=torch.bool)
    positive = (ids == ids[:, None]) & ~oneself
    log_probs = (rows @ rows.T / temperature).masked_fill(oneself, -1e9).log_softmax(dim=1)
    return -((log_probs * positive).sum(dim=1) / positive.sum(dim=1)).mean()


BY_HAND = {"InfoNCE": info_nce, "SupCon": sup_con}


class Objective(nn.Module):
    """The blocks that a setting asks for, and the loss of a batch. The number of a sample is its label."""

    def __init__(self, setting: Setting, encoders: Encoders) -> None:
        super().__init__()
        self.setting = setting
        uses_momentum = setting.slots or setting.alpha
        self.momentum = md.EMAWrapper(encoders, decay=setting.decay) if uses_momentum else None
        self.queue = md.ClassQueue(setting.slots, dict.fromkeys(VIEWS, WIDTH)) if setting.slots else None
        # One for each direction: centres are of their queries.
        self.losses = nn.ModuleDict(
            {
                query: md.SupConDistillLoss(
                    temperature=setting.temperature,
                    learnable_temperature=False,
                    momentum_temperature=setting.teacher_temperature,
                    momentum_targets=setting.targets,
                    hardness=setting.hardness,
                )
                for query in VIEWS
            }
        )

    def forward(self, online: dict[str, Tensor], batch: Pairs, ids: Tensor, ramp: float) -> Tensor:
        setting = self.setting
        slow = self.momentum(batch.first, batch.second) if self.momentum is not None else online
        now = online if setting.batch_keys == "online" else slow
        keys, slow_keys = ({view: (rows[view],) for view in VIEWS} for rows in (now, slow))
        key_ids = (ids,)
        if self.queue is not None:
            for view in VIEWS:
                past, past_ids = self.queue.read(view)  # as it stood before this batch
                keys[view] += (past,)
                slow_keys[view] += (past,)
            key_ids += (past_ids if setting.queue_positives else torch.full_like(past_ids, UNLABELLED),)

        losses = []
        for query, key in (VIEWS, VIEWS[::-1]):
            soft = {}
            if setting.alpha:
                soft = {"momentum_query": slow[query], "momentum_keys": slow_keys[key], "alpha": ramp * setting.alpha}
            losses.append(self.losses[query](online[query], keys[key], ids, key_ids, **soft))
        if self.queue is not None:
            self.queue.enqueue(ids, slow)
        return (losses[0] + losses[1]) / 2


def train(setting: Setting, pairs: Pairs, *, epochs: int, seed: int, build: type[Objective] = Objective) -> Encoders:
    """Encoders trained as the setting says. No line of it reads the labels of the pairs."""
    torch.manual_seed(seed)
    encoders = Encoders(pairs.first.shape[1], pairs.second.shape[1])
    objective = build(setting, encoders)
    optimizer = torch.optim.AdamW(encoders.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    batches = -(-len(pairs.labels) // setting.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        for number, ids in enumerate(torch.randperm(len(pairs.labels)).split(setting.batch)):
            batch = pairs.rows(ids)
            online = encoders(batch.first, batch.second)
            if setting.method in BY_HAND:
                loss = BY_HAND[setting.method](**online, temperature=setting.temperature)
            else:
                loss = objective(online, batch, ids, ramp=min(1.0, epoch + number / batches))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if objective.momentum is not None:
                objective.momentum.update(encoders)
    return encoders.eval()


@torch.no_grad()
def scores(encoders: Encoders, pairs: Pairs) -> dict[str, float]:
    """In percent, mean of both directions: of the class, and of the very pair."""
    rows = {view: F.normalize(x, dim=1) for view, x in encoders(pairs.first, pairs.second).items()}
    similarity = rows["first"] @ rows["second"].T
    labels, own = pairs.labels, torch.arange(len(pairs.labels))
    found: dict[str, list[Tensor]] = {"map": [], "recall1": [], "recall10": [], "pair1": []}
    for matrix in (similarity, similarity.T):
        order = matrix.argsort(dim=1, descending=True)
        relevant = labels[order] == labels[:, None]
        precision = relevant.cumsum(dim=1) / (own + 1)
        found["map"].append((precision * relevant).sum(dim=1) / relevant.sum(dim=1))
        found["recall1"].append(relevant[:, 0].float())
        found["recall10"].append(relevant[:, :10].any(dim=1).float())
        found["pair1"].append((order[:, 0] == own).float())
    return {name: round(100 * float(torch.cat(values).mean()), 2) for name, values in found.items()}


Results = dict[Setting, dict[str, list[float]]]  # by score, one number per seed; "valid_map" is of the validation rows


def runs(data: str, path: Path, *, seeds: range, epochs: int, size: int) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Every setting with every seed. A run is a line of the file at `path`; those that it has are not trained again."""
    log = RunLog(path)
    for setting in grid(data):
        for seed in seeds:
            key = {**asdict(setting), "epochs": epochs, "train": size, "seed": seed}
            if key not in log:
                pieces = split(data, seed, size)
                pairs = with_wrong_pairs(pieces["train"], setting.wrong, seed)
                encoders = train(setting, pairs, epochs=epochs * setting.longer, seed=seed)
                log.add(key, {name: scores(encoders, pieces[name]) for name in ("valid", "test")})
            yield setting, log[key]


def collect(run_list: Iterable[tuple[Setting, dict[str, Any]]]) -> Results:
    results: Results = {}
    for setting, run in run_list:
        for name, score in {**run["test"], "valid_map": run["valid"]["map"]}.items():
            results.setdefault(setting, {}).setdefault(name, []).append(score)
    return results


def to_rows(results: Results) -> list[dict[str, Any]]:
    """For `write_results`: of each setting what is not the base."""
    base = asdict(Setting())
    return [
        {"setting": {k: v for k, v in asdict(setting).items() if k == "data" or v != base[k]}, **found}
        for setting, found in results.items()
    ]


def from_rows(rows: list[dict[str, Any]]) -> Results:
    return {Setting(**row["setting"]): {k: v for k, v in row.items() if k != "setting"} for row in rows}


# Tables and figure


class Axis(NamedTuple):
    """A row of the tables of gains: what differs from the base, for which arms."""

    name: str
    value: str
    change: dict[str, Any]
    arms: tuple[str, ...] = ("queue", "targets")


OWN_ROWS = ("positives", "unlabelled")
AXES = (
    *(Axis("temperature", f"{t:g}", {"temperature": t}) for t in TEMPERATURES),
    *(Axis("wrong pairs", f"{wrong:.0%}", {"wrong": wrong}) for wrong in WRONG),
    *(Axis("batch", str(batch), {"batch": batch}) for batch in BATCHES),
    *(Axis("40 % wrong, temperature", f"{t:g}", {"wrong": 0.4, "temperature": t}) for t in TEMPERATURES),
    *(Axis("training", f"{times} times as long", {"longer": times}) for times in (1, 4)),
    *(Axis("slots of the queue", str(slots), {"slots": slots}, ("queue",)) for slots in (64, 256, 1024)),
    *(Axis("keys of the batch", keys, {"batch_keys": keys}, ("queue",)) for keys in ("online", "momentum")),
    *(Axis("own rows in the queue", as_, {"queue_positives": as_ == "positives"}, ("queue",)) for as_ in OWN_ROWS),
    *(Axis("momentum decay", f"{decay:g}", {"decay": decay}) for decay in (0.9, 0.98, 0.995)),
    *(Axis("alpha", f"{alpha:g}", {"alpha": alpha}, ("targets",)) for alpha in (0.2, 0.4, 0.8)),
    *(
        Axis("teacher's temperature", f"{t:g}", {"teacher_temperature": None if t == 0.1 else t}, ("targets",))
        for t in (0.05, 0.1, 0.2)
    ),
)


def alone(setting: Setting) -> Setting:
    """The batch alone, all else as in the setting."""
    same = ("data", "batch", "wrong", "temperature", "longer")
    return Setting(**{field: getattr(setting, field) for field in same})


def beyond(results: Results, setting: Setting, base: Setting, what: str = "map") -> tuple[float, float]:
    """Points ahead of the base, with the 95 % interval: over seeds; on the watch over its folds."""
    difference = np.subtract(results[setting][what], results[base][what])
    if setting.data == "watch":
        difference = np.array([difference[fold::FOLDS].mean() for fold in range(min(FOLDS, len(difference)))])
    return paired_interval(difference, np.zeros_like(difference))


def gain(results: Results, setting: Setting, what: str = "map") -> tuple[float, float]:
    """Points ahead of the batch alone."""
    return beyond(results, setting, alone(setting), what)


def table_of_arms(results: Results, data: str) -> list[list[str]]:
    """The base: every measure of every arm."""
    rows = [["trained with", "mAP", "recall@1", "recall@10", "own pair first", "mAP beyond the batch alone"]]
    for name in ARMS:
        setting = arm(name, data)
        found = [summary(results[setting][what]) for what in ("map", "recall1", "recall10", "pair1")]
        rows.append([name, *found, "" if name == "batch alone" else signed(gain(results, setting))])
    return rows


def table_of_gains(results: Results, data: list[str]) -> list[list[str]]:
    """Along each axis: the batch alone, and what queue and targets add to it."""
    rows = [["changed", "to", *(f"{one}: {column}" for one in data for column in ("alone", "queue", "targets"))]]
    for axis in AXES:
        row = [axis.name, axis.value]
        for one in data:
            row.append(f"{np.mean(results[alone(Setting(one, **axis.change))]['map']):.1f}")
            for name in ("queue", "targets"):
                row.append(signed(gain(results, arm(name, one, **axis.change))) if name in axis.arms else "")
        rows.append(row)
    return rows


def table_of_targets(results: Results) -> list[list[str]]:
    """What each kind of momentum targets adds to the batch alone, and to the plain softmax."""
    plain, *others = KINDS
    rows = [["wrong pairs", "temperature", "teacher's", *KINDS, *(f"{kind} beyond {plain}" for kind in others)]]
    for student in STUDENTS:
        for times in TEACHERS:
            found = {kind: taught(kind, student, times) for kind in KINDS}
            gains = [gain(results, found[kind]) for kind in KINDS]
            gains += [beyond(results, found[kind], found[plain]) for kind in others]
            temperatures = (student["temperature"], times * student["temperature"])
            given = [f"{student.get('wrong', 0):.0%}", *(f"{temperature:g}" for temperature in temperatures)]
            rows.append([*given, *map(signed, gains)])
    return rows


def table_of_choices(results: Results, data: list[str]) -> list[list[str]]:
    """Every arm with the temperature that is best for it on the validation rows."""
    rows = [["views", "wrong pairs", "trained with", "temperature", "mAP", "recall@1", "mAP beyond the batch alone"]]
    for one in data:
        for wrong in (0.0, 0.4):
            best = {}
            for name in COMPARED:
                tried = [arm(name, one, wrong=wrong, temperature=t) for t in TEMPERATURES]
                best[name] = max(tried, key=lambda setting: float(np.mean(results[setting]["valid_map"])))
            for name, setting in best.items():
                measured = [summary(results[setting][what]) for what in ("map", "recall1")]
                ahead = "" if name == "batch alone" else signed(beyond(results, setting, best["batch alone"]))
                rows.append([one, f"{wrong:.0%}", name, f"{setting.temperature:g}", *measured, ahead])
    return rows


def show(title: str, rows: list[list[str]]) -> None:
    table = Table(*rows[0], title=title, box=SIMPLE_HEAD)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=max(120, Console().width)).print(table)


PANELS = {
    "temperature": ("temperature", TEMPERATURES),
    "share of wrong pairs": ("wrong", WRONG),
    "batch size": ("batch", BATCHES),
}
LINES = {"queue": ("#0072B2", "o-", "queue"), "targets": ("#D55E00", "s--", "momentum targets")}


def plot(results: Results, data: list[str], path: Path) -> None:
    """What the queue and momentum targets add to the batch alone, by temperature, wrong pairs and batch size."""
    size = (9, 2.5 * len(data) + 0.6)
    figure, rows = plt.subplots(
        len(data), len(PANELS), figsize=size, sharex="col", sharey=True, squeeze=False, layout="constrained"
    )
    for one, row in zip(data, rows, strict=True):
        for axes, (field, values) in zip(row, PANELS.values(), strict=True):
            places = np.arange(len(values))
            axes.axhline(0.0, color="0.6", linewidth=1, zorder=1)
            for name, (colour, line, _) in LINES.items():
                gains = np.array([gain(results, arm(name, one, **{field: value})) for value in values])
                axes.errorbar(places, *gains.T, fmt=line, color=colour, capsize=3, markersize=4, zorder=2)
            axes.set_xticks(places, [f"{value:.0%}" if field == "wrong" else f"{value:g}" for value in values])
            axes.set_xlim(-0.4, len(values) - 0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(one)
    figure.supylabel("points of mAP beyond the batch alone", fontsize="medium")
    for axes, label in zip(rows[-1], PANELS, strict=True):
        axes.set_xlabel(label)
    write_labels(rows[0, 0])
    save_figure(figure, path)


def write_labels(axes: plt.Axes) -> None:
    """Each line's name in its colour, where the first panel is empty: to its lower left."""
    for place, (colour, _, label) in enumerate(LINES.values()):
        axes.text(0.04, 0.16 - 0.1 * place, label, color=colour, transform=axes.transAxes)
    axes.text(0.04, 0.26, "0: the batch alone", color="0.4", transform=axes.transAxes)


def main(arguments: list[str] | None = None) -> Results:
    parser = StudyParser(__doc__, "runs/retrieval", figure=True)
    parser.add_argument(
        "--data", choices=DATA, nargs="+", default=list(DATA), help="; ".join(map(": ".join, DATA.items()))
    )
    parser.add_argument("--epochs", type=at_least(1), default=10)
    parser.add_argument("--train", type=at_least(1, most=TRAIN), default=TRAIN, metavar="N", help="pairs to train with")
    options = parser.parse_args(arguments)
    seeds, results = range(options.seeds), Results()
    for data in options.data:
        done = runs(data, options.out / f"{data}.jsonl", seeds=seeds, epochs=options.epochs, size=options.train)
        results |= collect(done)
        show(f"{DATA[data]}: retrieval of the class, %, {options.seeds} seeds", table_of_arms(results, data))
    show("mAP of the batch alone, and what is gained beyond it", table_of_gains(results, options.data))
    if "digits" in options.data:
        show("digits: mAP gained by kinds of momentum targets", table_of_targets(results))
    show("each with its temperature, chosen on the validation rows", table_of_choices(results, options.data))
    settings = {"seeds": options.seeds, "epochs": options.epochs, "train": options.train}
    write_results(options.out / "retrieval.json", settings, to_rows(results))
    plot(results, options.data, options.out / f"retrieval.{options.format}")
    print(f"results and figure: {options.out / 'retrieval.json'}, {options.format}")
    return results


if __name__ == "__main__":
    main()
