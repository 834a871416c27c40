"""A modality missing, where the answer is known: `missing_sensors.py` on the synthetic sentiment set.

    python examples/missing_modalities.py                       # six minutes on one CPU core; goes on where it was
    python examples/missing_modalities.py --seeds 2 --steps 2   # in seconds, to see it run

The synthetic set has text, audio and vision, whose signal is set (`mtmd/data/synthetic.py`); what counts is the error
of the score, by the share of samples that miss one of the three. With "dropping" each sample of a step keeps all of
them or loses one, as likely. The momentum teacher, an average of the student itself, is asked about the same samples
with all of them, those without a score too. Expect, MAE, mean ± deviation of ten seeds, each a set of its own; the
difference from dropping alone is paired, with its 95 % interval:

| scores | trained with | 0 % | 50 % | 100 % | at 50 %, vs dropping | won back |
|---|---|---|---|---|---|---|
| 60 | all modalities | 0.662 ± 0.062 | 0.773 ± 0.053 | 0.884 ± 0.047 | +0.011 ± 0.036 |  |
| 60 | dropping | 0.679 ± 0.079 | 0.762 ± 0.069 | 0.844 ± 0.060 |  |  |
| 60 | dropping, momentum teacher | 0.664 ± 0.069 | 0.740 ± 0.059 | 0.817 ± 0.049 | -0.021 ± 0.016 | 0.021 of 0.100 |
| all | all modalities | 0.519 ± 0.016 | 0.638 ± 0.017 | 0.757 ± 0.020 | +0.039 ± 0.009 |  |
| all | dropping | 0.512 ± 0.019 | 0.599 ± 0.014 | 0.687 ± 0.013 |  |  |
| all | dropping, momentum teacher | 0.505 ± 0.012 | 0.593 ± 0.011 | 0.682 ± 0.011 | -0.006 ± 0.005 | 0.006 of 0.081 |

So it helps beyond the interval, and wins back little: without text nobody can know more than audio and vision do.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import momentum_distill as md
from mtmd.data.synthetic import WIDTHS, make_synthetic
from mtmd.settings.options import at_least
from study_tools import RunLog, StudyParser, paired_interval, signed, write_results

MODALITIES = tuple(WIDTHS)
SIZES = (600, 300, 1000)  # samples to train with, for validation and for the test
WIDTH = 32  # features of a modality
BATCH, RATE = 64, 3e-3
STEPS = 400
DECAY = 0.98  # of the momentum teacher
RAMP = 50  # steps in which the teacher comes to its full weight: at first it knows nothing
WEIGHT = 0.5  # of the teacher; 2 and more draw everything to what it says at first
LABELS = {"60": 60, "all": None}  # samples with a score
SHARES = (0.0, 0.5, 1.0)  # of the test samples, with a modality missing


@dataclass(frozen=True)
class Arm:
    """How a model is trained."""

    name: str
    dropping: bool = True  # a modality of some samples, drawn anew at each step
    teacher: bool = False  # a momentum model of the student, which sees all of them


FULL = Arm("all modalities", dropping=False)
DROPPING = Arm("dropping")
TAUGHT = Arm("dropping, momentum teacher", teacher=True)
ARMS = (FULL, DROPPING, TAUGHT)


class Samples(NamedTuple):
    steps: dict[str, Tensor]  # (N, time, width)
    lengths: Tensor  # (N, 3); 0: not there
    scores: Tensor  # (N,); NaN: not known

    def rows(self, chosen: Tensor) -> "Samples":
        steps = {name: array[chosen] for name, array in self.steps.items()}
        return Samples(steps, self.lengths[chosen], self.scores[chosen])


def load(seed: int) -> dict[str, Samples]:
    """The three folds that this seed makes."""

    def samples(fold: dict) -> Samples:
        steps = {name: torch.from_numpy(fold[name]).float() for name in MODALITIES}
        lengths = torch.stack([torch.from_numpy(fold[f"{name}_lengths"]).long() for name in MODALITIES], dim=1)
        return Samples(steps, lengths, torch.from_numpy(fold["regression_labels"]).float())

    return {name: samples(fold) for name, fold in make_synthetic(seed=seed, sizes=SIZES).items()}


class Branch(nn.Module):
    """A modality: what each step says, and how much it counts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, WIDTH + 1))

    def forward(self, steps: Tensor, lengths: Tensor) -> Tensor:
        said = self.read(steps)
        beyond = torch.arange(steps.shape[1]) >= lengths.clamp(min=1)[:, None]
        weight = said[..., -1].masked_fill(beyond, -torch.inf).softmax(dim=1)
        return (weight[..., None] * said[..., :-1]).sum(dim=1)


class Model(nn.Module):
    """The score by the modalities that are there; zeros take the place of the features of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name: Branch(width) for name, width in WIDTHS.items()})
        self.score = nn.Sequential(nn.ReLU(), nn.Linear(len(WIDTHS) * WIDTH, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, samples: Samples, seen: Tensor) -> Tensor:
        """Scores (N,); `seen` says which modalities may be looked at, (N, 3)."""
        there = seen & (samples.lengths > 0)
        features = [
            torch.where(there[:, [place]], branch(samples.steps[name], samples.lengths[:, place]), 0.0)
            for place, (name, branch) in enumerate(self.branches.items())
        ]
        return self.score(torch.cat(features, dim=1)).squeeze(1)


CASES = ("all", *(f"no_{name}" for name in MODALITIES))
SUBSETS = torch.cat([torch.ones(1, 3, dtype=torch.bool), ~torch.eye(3, dtype=torch.bool)])  # all; one missing


def drawn_subsets(rows: int) -> Tensor:
    """For each row the modalities that are seen, (N, 3): each of the four subsets as likely."""
    return SUBSETS[torch.randint(len(SUBSETS), (rows,))]


def everything(rows: int) -> Tensor:
    return SUBSETS[:1].expand(rows, -1)


def error(said: Tensor, scores: Tensor) -> Tensor:
    """Mean absolute error of the rows with a score; 0 where a batch has none."""
    known = ~scores.isnan()
    return (said - scores).abs()[known].sum() / known.sum().clamp(min=1)


def train(arm: Arm, samples: Samples, *, seed: int, steps: int) -> Model:
    """A model, trained; the same start, optimizer, rate and number of steps for every arm."""
    torch.manual_seed(seed)
    model = Model()
    teacher = md.EMAWrapper(model, decay=lambda updates: min(DECAY, (1 + updates) / (10 + updates)))
    response = md.ResponseDistillLoss(task="regression")
    optimizer = torch.optim.AdamW(md.param_groups(model, weight_decay=0.05, lr=RATE), foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    known = (~samples.scores.isnan()).nonzero().squeeze(1)
    for step in range(steps):
        rows = known[torch.randint(len(known), (BATCH,))]
        if arm.teacher:  # and as many of which nobody has said what they mean
            rows = torch.cat([rows, torch.randint(len(samples.scores), (BATCH,))])
        batch = samples.rows(rows)
        student = model(batch, (drawn_subsets if arm.dropping else everything)(len(rows)))
        loss = error(student, batch.scores)
        if arm.teacher:
            ramp = WEIGHT * min(1.0, (step + 1) / RAMP)
            loss = loss + ramp * response(student, teacher(batch, everything(len(rows))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if arm.teacher:
            teacher.update(model)
    return model.eval()


class Result(NamedTuple):
    """Mean absolute errors on the test fold of a seed, by what is missing."""

    labels: str
    arm: str
    seed: int
    all: float
    no_text: float
    no_audio: float
    no_vision: float


@torch.no_grad()
def errors(model: Model, samples: Samples) -> list[float]:
    """One for each of the cases."""
    rows = len(samples.scores)
    return [float(error(model(samples, subset.expand(rows, -1)), samples.scores)) for subset in SUBSETS]


def study(out: Path, settings: list[str], *, seeds: range, steps: int, valid: bool) -> list[Result]:
    """All runs of these. Each is written down when it ends; one that stands there already is not made again."""
    log = RunLog(out / f"{'valid' if valid else 'test'}_{steps}_steps.jsonl")
    for seed, setting in itertools.product(seeds, settings):
        left = [arm for arm in ARMS if (setting, arm.name, seed) not in log]
        if not left:
            continue
        folds = load(seed)
        scores = folds["train"].scores.clone()
        if LABELS[setting] is not None:
            scores[LABELS[setting] :] = torch.nan
        given = folds["train"]._replace(scores=scores)
        for arm in left:
            model = train(arm, given, seed=seed, steps=steps)
            log.add((setting, arm.name, seed), errors(model, folds["valid" if valid else "test"]))
    return [Result(*key, *found) for key, found in log.of(settings, [arm.name for arm in ARMS], seeds)]


MISSING = {"any": CASES[1:], **{name: (f"no_{name}",) for name in MODALITIES}}


def mae(results: list[Result], setting: str, arm: Arm, missing: str, share: float) -> np.ndarray:
    """For each seed, with a modality missing in a share of the samples ("any": one of the three, as likely).

    Which samples these are is drawn without looking at them, so the expectation is exact: a mean of the cases.
    """
    runs = sorted((one for one in results if (one.labels, one.arm) == (setting, arm.name)), key=lambda one: one.seed)
    there = np.array([one.all for one in runs])
    less = np.mean([[getattr(one, case) for one in runs] for case in MISSING[missing]], axis=0)
    return (1 - share) * there + share * less


def won_back(results: list[Result], setting: str, missing: str) -> tuple[float, float]:
    """At 50 % missing: what that costs, and what of it the teacher wins back.

    The cost: the error of dropping alone less that of the model of all modalities with nothing missing.
    """
    whole = mae(results, setting, FULL, missing, 0.0)
    alone, ours = (mae(results, setting, arm, missing, 0.5) for arm in (DROPPING, TAUGHT))
    return float((alone - whole).mean()), float((alone - ours).mean())


HEAD = ("scores", "missing", "trained with", *(f"{100 * share:.0f} %" for share in SHARES), "at 50 %, vs dropping",
        "won back")  # fmt: skip


def lines(results: list[Result]) -> list[list[str]]:
    """Errors, mean ± deviation of the seeds; their paired difference from dropping alone; and the share of the cost."""
    rows = []
    for setting, missing, arm in itertools.product(LABELS, MISSING, ARMS):
        if setting not in {one.labels for one in results}:
            continue
        found = [mae(results, setting, arm, missing, share) for share in SHARES]
        row = [setting, missing, arm.name, *(f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in found), "", ""]
        if arm != DROPPING:
            row[-2] = signed(paired_interval(found[1], mae(results, setting, DROPPING, missing, SHARES[1])), digits=3)
        if arm == TAUGHT:
            cost, won = won_back(results, setting, missing)
            row[-1] = f"{won:.3f} of {cost:.3f}"
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> list[Result]:
    parser = StudyParser(__doc__, "runs/missing_modalities")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS), help="samples with a score")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=at_least(1), default=STEPS)
    parser.add_argument("--valid", action="store_true", help="score the validation fold")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = study(options.out, options.labels, seeds=seeds, steps=options.steps, valid=options.valid)
    table = Table(*HEAD, title=f"MAE by the share of samples that miss a modality, {len(seeds)} seeds", box=SIMPLE_HEAD)
    for row in lines(results):
        table.add_row(*row, end_section=row[2] == TAUGHT.name)
    Console(width=150).print(table)
    settings = {name: getattr(options, name) for name in ("seeds", "first_seed", "steps", "valid")}
    rounded = [one._replace(**{case: round(getattr(one, case), 4) for case in CASES}) for one in results]
    write_results(options.out / "missing_modalities.json", settings, [one._asdict() for one in rounded])
    print(f"results: {options.out / 'missing_modalities.json'}")
    return results


if __name__ == "__main__":
    main()
