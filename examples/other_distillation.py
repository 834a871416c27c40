"""Distillation by other rules beside the blocks: relations between rows, correlation, and decoupled classes.

    python examples/other_distillation.py                        # three minutes on one CPU core
    python examples/other_distillation.py --seeds 2 --epochs 2   # seconds, to see it run

The two halves of a digit of `two_views_digits.py`, ten labels a class; each rule is added to, or put in the place of, a
block, by hand. Expect, in percent of the test digits, mean ± deviation of ten seeds, and paired differences:

| weak view alone, trained with | accuracy | beyond the response | beyond all blocks |
|---|---|---|---|
| response | 80.0 ± 1.5 |  |  |
| all blocks | 83.7 ± 1.4 | +3.7 ± 0.8 |  |
| and distances | 83.7 ± 1.7 | +3.7 ± 0.8 | -0.0 ± 0.3 |
| and distances, angles | 83.6 ± 1.5 | +3.6 ± 0.7 | -0.1 ± 0.3 |
| and correlation | 83.5 ± 1.4 | +3.5 ± 1.1 | -0.3 ± 0.5 |
| correlation for response | 80.9 ± 1.7 | +0.9 ± 1.1 | -2.8 ± 1.0 |
| decoupled for response | 77.1 ± 1.8 | -2.9 ± 1.0 | -6.6 ± 1.0 |

So none is in the library.
"""

from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import two_views_digits as study
from mtmd.settings.options import at_least
from study_tools import StudyParser, write_results


@dataclass(frozen=True)
class Arm(study.Arm):
    """An arm of the study with weights of what is added."""

    distances: float = 0.0
    angles: float = 0.0
    correlation: float = 0.0
    decoupled: float = 0.0


def relational_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances between rows, each by their mean, drawn to the teacher's (Park et al., 2019, RKD-D)."""

    def relations(rows: Tensor) -> Tensor:
        distances = F.pdist(rows)
        return distances / distances.mean().clamp(min=1e-6)

    return F.smooth_l1_loss(relations(student), relations(teacher))


def relational_angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosines of the angles in all triples of rows, drawn to the teacher's (Park et al., 2019, RKD-A)."""

    def relations(rows: Tensor) -> Tensor:
        lines = F.normalize(rows[None] - rows[:, None], dim=2, eps=1e-6)  # from the second to the first
        return lines @ lines.mT

    return F.smooth_l1_loss(relations(student), relations(teacher))


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """One less Pearson's correlation of the probabilities, by row and by class (Huang et al., 2022, DIST)."""

    def distance(first: Tensor, second: Tensor) -> Tensor:
        centred = (x - x.mean(dim=1, keepdim=True) for x in (first, second))
        return 1 - F.cosine_similarity(*centred, dim=1).mean()

    first, second = student.softmax(dim=1), teacher.softmax(dim=1)
    return distance(first, second) + distance(first.T, second.T)


def decoupled(student: Tensor, teacher: Tensor, beta: float = 8.0) -> Tensor:
    """The divergence of the target class from the rest, and `beta` times that among the rest (Zhao et al., 2022).

    The target is the class that the teacher takes: most rows have no label.
    """
    target = F.one_hot(teacher.argmax(dim=1), study.CLASSES).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (logits.softmax(dim=1) * target).sum(dim=1, keepdim=True).clamp(1e-6, 1 - 1e-6)
        return torch.cat([chosen, 1 - chosen], dim=1).log(), logits.masked_fill(target, -1e4).log_softmax(dim=1)

    divergences = [
        F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        for ours, theirs in zip(parts(student), parts(teacher), strict=True)
    ]
    return divergences[0] + beta * divergences[1]


class Objective(study.Objective):
    """The blocks of an arm and what is added."""

    def forward(self, output: study.Output, batch: study.Digits) -> Tensor:
        arm, loss = self.arm, super().forward(output, batch)
        slow = self.momentum(batch.strong, batch.weak)
        if arm.distances:
            loss = loss + arm.distances * relational_distances(output.weak, slow.strong)
        if arm.angles:
            loss = loss + arm.angles * relational_angles(output.weak, slow.strong)
        if arm.correlation:
            loss = loss + arm.correlation * correlation(output.weak_logits, slow.strong_logits)
        if arm.decoupled:
            loss = loss + arm.decoupled * decoupled(output.weak_logits, slow.strong_logits)
        return loss


RESPONSE = Arm("response", "", response=3.0, momentum_teacher=True)
BLOCKS = Arm("all blocks", "", response=3.0, momentum_teacher=True, alpha=0.2, fusion=3.0, features=1.0)
ARMS = (
    RESPONSE,
    BLOCKS,
    replace(BLOCKS, name="and distances", distances=1.0),
    replace(BLOCKS, name="and distances, angles", distances=1.0, angles=0.5),
    replace(BLOCKS, name="and correlation", correlation=0.5),
    replace(RESPONSE, name="correlation for response", response=0.0, correlation=1.0),
    replace(RESPONSE, name="decoupled for response", response=0.0, decoupled=0.3),
)
FEW = list(study.SETTINGS)[1]


def main(arguments: list[str] | None = None) -> list[study.Result]:
    parser = StudyParser(__doc__, "runs/other_distillation")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=at_least(1), default=50)
    parser.add_argument("--valid", action="store_true", help="score the validation rows, to choose settings")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    more = {"seeds": seeds, "epochs": options.epochs, "valid": options.valid}
    results = list(study.runs("halves", ARMS, [FEW], **more, objective_of=Objective))
    rows = "validation" if options.valid else "test"
    title = f"{study.PAIRS['halves']}: {rows} accuracy, %, {options.seeds} seeds"
    Console().print(study.table_of(results, title, ARMS, ["response", "all blocks"], [FEW]))
    given = {"rows": rows, "seeds": options.seeds, "epochs": options.epochs}
    path = options.out / "other_distillation.json"
    write_results(path, given, [result._asdict() for result in results])
    print(f"results: {path}")
    return results


if __name__ == "__main__":
    main()
