"""Sigmoid or softmax? `SigmoidDistillLoss` against InfoNCE on pairs without classes.

    python examples/sigmoid_pairs.py                       # minutes on one CPU core
    python examples/sigmoid_pairs.py --seeds 2 --epochs 1  # to see it run

The digits of `retrieval.py`, its encoders, rates, batch of 64 and scores; what changes is the loss, its temperature and
its bias, both fixed: in the 160 steps of a training neither would learn much. Every setting has them from a grid, the
ones that are best on the validation rows. Every run is a line of a file in `--out`, and the same command goes on where
it was stopped. Expect, in percent, mean ± deviation of ten seeds: InfoNCE 57.0 ± 0.5, sigmoid 57.4 ± 0.4, with momentum
targets 57.5 ± 0.4, with a queue 55.6 ± 1.1; `docs/when.md` has every setting.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import momentum_distill as md
import retrieval
from mtmd.settings.options import at_least
from retrieval import VIEWS, Encoders, Objective
from study_tools import RunLog, StudyParser, paired_interval, signed, summary, write_results

BASELINE = "InfoNCE"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid and targets": {"loss": "sigmoid", "alpha": 0.4},
    "sigmoid and queue": {"loss": "sigmoid", "slots": 1024},
}
TEMPERATURES = (0.1, 0.2, 0.4, 0.8)
BIASES = {  # SigLIP's is -10; one match in 64 keys has log odds of -4, one in 64 + 1024 of -7
    BASELINE: (0.0,),
    "sigmoid": (-10.0, -4.0, 0.0),
    "sigmoid and targets": (-10.0, -4.0),
    "sigmoid and queue": (-7.0,),
}


@dataclass(frozen=True)
class Setting(retrieval.Setting):
    """One way to train."""

    loss: str = "softmax"  # or "sigmoid"
    bias: float = 0.0  # of the sigmoid


class PairObjective(Objective):
    """That of the study of retrieval, with the loss that the setting names."""

    def __init__(self, setting: Setting, encoders: Encoders) -> None:
        super().__init__(setting, encoders)
        if setting.loss == "sigmoid":
            fixed = {"learnable_temperature": False, "learnable_bias": False}
            loss = md.SigmoidDistillLoss(temperature=setting.temperature, bias=setting.bias, **fixed)
            self.losses = nn.ModuleDict(dict.fromkeys(VIEWS, loss))


def grid(name: str) -> list[Setting]:
    """All that an arm is tried with."""
    temperatures = TEMPERATURES[:3] if "slots" in ARMS[name] else TEMPERATURES  # a queue wants them low
    return [Setting(**ARMS[name], temperature=t, bias=bias) for t in temperatures for bias in BIASES[name]]


Results = dict[Setting, dict[str, list[float]]]  # by score, one number per seed; "valid_map" is of the validation rows


def runs(path: Path, *, seeds: range, epochs: int, size: int) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Every setting with every seed; those that the file at `path` has are not trained again."""
    log = RunLog(path)
    for setting in [setting for name in ARMS for setting in grid(name)]:
        for seed in seeds:
            key = {**asdict(setting), "epochs": epochs, "train": size, "seed": seed}
            if key not in log:
                pieces = retrieval.split("digits", seed, size)
                encoders = retrieval.train(setting, pieces["train"], epochs=epochs, seed=seed, build=PairObjective)
                log.add(key, {name: retrieval.scores(encoders, pieces[name]) for name in ("valid", "test")})
            yield setting, log[key]


def best(results: Results, name: str) -> Setting:
    """That of an arm with the best mAP on the validation rows."""
    return max(grid(name), key=lambda setting: float(np.mean(results[setting]["valid_map"])))


def table(results: Results) -> list[list[str]]:
    """Each arm at its best."""
    rows = [["trained with", "temperature", "bias", "mAP", "recall@1", "own pair first", "mAP beyond InfoNCE"]]
    base = results[best(results, BASELINE)]["map"]
    for name in ARMS:
        setting = best(results, name)
        bias = "" if name == BASELINE else f"{setting.bias:g}"
        found = [summary(results[setting][what]) for what in ("map", "recall1", "pair1")]
        beyond = "" if name == BASELINE else signed(paired_interval(results[setting]["map"], base))
        rows.append([name, f"{setting.temperature:g}", bias, *found, beyond])
    return rows


def table_of_grid(results: Results) -> list[list[str]]:
    """Mean mAP of every setting."""
    rows = [["trained with", "bias", *(f"at {t:g}" for t in TEMPERATURES)]]
    for name in ARMS:
        tried = grid(name)
        for bias in BIASES[name]:
            line = [f"{np.mean(results[setting]['map']):.1f}" for setting in tried if setting.bias == bias]
            line += [""] * (len(TEMPERATURES) - len(line))
            rows.append([name, "" if name == BASELINE else f"{bias:g}", *line])
    return rows


def to_rows(results: Results) -> list[dict[str, Any]]:
    """For `write_results`: of each setting what is not the base."""
    base = asdict(Setting())
    return [
        {"setting": {k: v for k, v in asdict(setting).items() if v != base[k]}, **found}
        for setting, found in results.items()
    ]


def from_rows(rows: list[dict[str, Any]]) -> Results:
    return {Setting(**row["setting"]): {k: v for k, v in row.items() if k != "setting"} for row in rows}


def main(arguments: list[str] | None = None) -> Results:
    parser = StudyParser(__doc__, "runs/sigmoid_pairs")
    parser.add_argument("--epochs", type=at_least(1), default=10)
    parser.add_argument(
        "--train",
        type=at_least(1, most=retrieval.TRAIN),
        default=retrieval.TRAIN,
        metavar="N",
        help="pairs to train with",
    )
    options = parser.parse_args(arguments)
    done = runs(options.out / "digits.jsonl", seeds=range(options.seeds), epochs=options.epochs, size=options.train)
    results = retrieval.collect(done)
    retrieval.show("mAP by temperature and bias, %", table_of_grid(results))
    retrieval.show("each with what is best for it on the validation rows", table(results))
    settings = {"seeds": options.seeds, "epochs": options.epochs, "train": options.train}
    write_results(options.out / "sigmoid_pairs.json", settings, to_rows(results))
    print(f"results: {options.out / 'sigmoid_pairs.json'}")
    return results


if __name__ == "__main__":
    main()
