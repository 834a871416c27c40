"""How the example is laid out: three files in front, folders behind them, and one file for what is added."""

import ast

import numpy as np
import torch
from torch import nn

from conftest import ROOT
from mtmd import model
from mtmd.data.synthetic import synthetic_dataset
from mtmd.results.metrics import msa_metrics
from mtmd.settings.config import Config
from mtmd.train import prepare, train

MTMD = ROOT / "examples" / "mtmd"
MODULES = {".".join(path.relative_to(MTMD.parent).with_suffix("").parts): path for path in MTMD.rglob("*.py")}
FOLDERS = ["files", "settings", "data", "results", "runs", "study"]  # each may use those before it


def imported(path):
    """The modules of the example that a module imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES or node.module in MODULES:
                    yield whole if whole in MODULES else node.module


def test_three_files_stand_in_front_and_none_is_long():
    assert sorted(path.name for path in MTMD.glob("*.py")) == ["__init__.py", "model.py", "objective.py", "train.py"]
    assert {path.parent.name for path in MTMD.glob("*/*.py")} == set(FOLDERS)
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_no_module_imports_itself_by_way_of_others():
    uses = {name: set(imported(path)) for name, path in MODULES.items()}
    while uses:
        free = {name for name, used in uses.items() if not used & set(uses)}
        assert free, f"a circle among {sorted(uses)}"
        uses = {name: used for name, used in uses.items() if name not in free}


def test_a_folder_uses_those_before_it():
    for name, path in MODULES.items():
        parts = name.split(".")
        for used in imported(path):
            folder = used.split(".")[1]
            if len(parts) > 2 and folder in FOLDERS:
                assert FOLDERS.index(folder) <= FOLDERS.index(parts[1]), (name, used)


class MeanEncoder(nn.Module):
    """A text encoder of one's own: the mean over time."""

    def __init__(self, width, hidden, **_settings):
        super().__init__()
        self.linear, self.width = nn.Linear(width, hidden), hidden

    def forward(self, steps, lengths):
        return self.linear(steps.sum(dim=1) / lengths.clamp(min=1)[:, None])


def test_a_text_encoder_and_a_metric_of_ones_own_are_trained_with(monkeypatch):
    monkeypatch.setitem(model.FEATURE_ENCODERS, "features:mean", MeanEncoder)

    def measure(scores, targets):
        return msa_metrics(scores, targets) | {"rmse": float(np.sqrt(np.square(scores - targets).mean()))}

    config = Config(text_encoder="features:mean", epochs=1, layers=1, audio_hidden=8, vision_hidden=8)
    dataset = synthetic_dataset(seed=5, sizes=(32, 8, 8))
    folds, _ = prepare(dataset, config)
    run = train(config, folds, dataset.widths, 1, torch.device("cpu"), metrics=measure)
    assert isinstance(run.model.branches["text"].encoder, MeanEncoder)
    assert run.metrics["test"]["rmse"] >= run.metrics["test"]["mae"]
