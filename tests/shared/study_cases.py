"""Checkpoints and experiment folders as `train` leaves them, made up: what other commands read, in a moment."""

import csv
import json
import types
from pathlib import Path

import numpy as np
import torch

import mtmd_mosi
from mtmd.data.fold import Dataset
from mtmd.data.scaling import Standardizer
from mtmd.model import MTMD
from mtmd.results.metrics import msa_metrics, sims_metrics
from mtmd.runs.checkpoint import save_checkpoint
from mtmd.settings.config import Config

MODALITIES = ("text", "audio", "vision")

# The least that a command trains: options of one epoch of a small model.
TINY = ["--epochs=1", "--width=16", "--fused-width=16", "--layers=1"]
TINY += ["--audio-hidden=8", "--vision-hidden=8", "--text-hidden=8"]

# The same as settings, and smaller.
SMALL = {"width": 8, "fused_width": 8, "audio_hidden": 4, "vision_hidden": 4, "text_hidden": 4, "layers": 1, "heads": 2}


def fake_checkpoint(path: Path, dataset: Dataset, /, *, encoder_config: dict | None = None, **settings) -> MTMD:
    """A checkpoint of a model that was not trained: what it says is as good as any for tests. The model."""
    torch.manual_seed(0)
    config = Config(**SMALL, **settings)
    model = MTMD(config, dataset.widths, encoder_config=encoder_config)
    if model.fusion is not None:  # spread the scores over both signs
        torch.nn.init.normal_(model.fusion.heads.score.weight, std=2)
        torch.nn.init.zeros_(model.fusion.heads.score.bias)
    run = types.SimpleNamespace(seed=1, model=model, best_epoch=1, metrics={"valid": {"mae": 1.0}})
    save_checkpoint(path, run, config, Standardizer.fit(dataset.folds["train"]), dataset)
    return model


def fake_experiment(
    config: Config,
    *,
    noise: float = 0.9,
    utterances: int = 40,
    steps: int = 23,
    dataset: str = "synthetic",
    offset: dict[int, float] | None = None,
) -> dict:
    """Write the files of an experiment into `config.out` and return the contents of results.json.

    `noise` is how far predictions lie from the targets; `offset` shifts those of a seed.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    limit = 1 if dataset == "sims" else 3
    metrics = sims_metrics if dataset == "sims" else msa_metrics
    rng = np.random.default_rng(0)  # the same targets in every experiment
    folds = {}
    for split, size in (("valid", utterances // 2), ("test", utterances)):
        targets = np.clip(np.round(rng.normal(0, limit / 1.9, size) * 5) / 5, -limit, limit) + 0.0
        targets[: size // 20] = 0
        missing = {"text": np.zeros(size, bool), "audio": rng.random(size) < 0.1, "vision": rng.random(size) < 0.4}
        folds[split] = targets.astype(np.float32), missing, rng.normal(0, 0.5, size)
    runs, rows = [], []
    for seed in config.seeds:
        rng = np.random.default_rng([seed, int(1000 * noise)])
        entry = {"seed": seed, "best_epoch": 2, "epochs": 3, "seconds": 1.5, "precision": "float32"}
        for split, (targets, missing, hard) in folds.items():
            scale, shift = limit / 3, (offset or {}).get(seed, 0.0)
            score = 0.8 * targets + scale * (hard + noise * rng.normal(size=len(targets))) + shift
            score = score.astype(np.float32).astype(float)
            entry[split] = metrics(score, targets)
            branches, unimodal = {}, {}
            for place, name in enumerate(MODALITIES):
                guess = (0.8 - 0.3 * place) * targets + scale * (1 + 0.2 * place) * rng.normal(size=len(targets))
                there = ~missing[name] if name in config.modalities else np.zeros(len(targets), bool)
                if there.any():
                    unimodal[name] = metrics(guess[there], targets[there])
                branches[name] = [
                    f"{value!r}" if keep else "" for value, keep in zip(guess.tolist(), there, strict=True)
                ]
            entry[f"{split}_unimodal"] = unimodal
            for number in range(len(targets)):
                rows.append(
                    [seed, split, f"{split}{number}", float(targets[number]), float(score[number])]
                    + [branches[name][number] for name in MODALITIES]
                )
        runs.append(entry)
        fake_steps(out / f"steps_seed{seed}.csv", config, rng, steps + 3 * len(runs))
        targets = folds["test"][0]
        directions, initial = rng.normal(size=(2, 8)), rng.normal(size=(len(targets), 8))
        pulled = np.stack([np.sign(targets), targets], axis=1) @ directions + 1.2 * noise * initial
        np.savez(
            out / f"representations_seed{seed}.npz",
            features=np.maximum(pulled, 0).astype(np.float32),
            initial=(np.maximum(initial, 0) + 0.1 * targets[:, None]).astype(np.float32),
            scores=targets,
            ids=np.array([f"test{number}" for number in range(len(targets))]),
        )
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "split", "id", "target", "score", *MODALITIES])
        writer.writerows(rows)
    values = {name: [entry["test"][name] for entry in runs] for name in runs[0]["test"]}
    results = {
        "config": config.as_json(),
        "dataset": {"name": dataset, "synthetic": dataset == "synthetic", "sha256": "0" * 64},
        "runs": runs,
        "mean": {name: float(np.mean(of)) for name, of in values.items()},
        "std": {name: float(np.std(of, ddof=1)) if len(runs) > 1 else None for name, of in values.items()},
    }
    (out / "results.json").write_text(json.dumps(results))
    return results


def fake_steps(path: Path, config: Config, rng: np.random.Generator, steps: int) -> None:
    """Terms that fall, factors that part; those that are switched off are left out."""
    time = np.arange(steps) / steps
    columns = {"total": 12 - 6 * time, "gt": 6 * np.exp(-2 * time), "temperature": 0.5 - 0.2 * time}
    if "distillation" not in config.without:
        columns |= {
            "reg": 0.9 + 0.5 * np.sin(4 * time),
            "cls": 1.6 - 0.4 * time,
            "fusion": 0.7 + 0.3 * np.cos(3 * time),
            "feat": 12 - 6 * time,
            "feat_shared": 6.5 - 1.5 * time,
            "feat_specific": 2.5 * np.exp(-3 * time) + 0.4,
        }
    columns = {name: values * rng.lognormal(0, 0.06, steps) for name, values in columns.items()}
    if "fusion_factors" not in config.without:
        ends = {"text": 0.06, "audio": -0.05, "vision": -0.08}
        columns |= {
            f"factor_{name}": 1 + ends[name] * (1 - np.exp(-3 * time)) + 0.004 * rng.normal() * time
            for name in config.modalities
        }
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *columns])
        writer.writerows(
            [number, *values] for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
        )


def read(path):
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fails(capsys, arguments):
    """Run a command that must fail: the message on its one line."""
    assert mtmd_mosi.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = (captured.err or captured.out).strip().splitlines()
    return line
