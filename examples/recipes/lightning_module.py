"""Lightning: the task is a part of the LightningModule, and the blocks need no callback.

    pip install ".[integrations]"
    python examples/recipes/lightning_module.py
    python examples/recipes/lightning_module.py --steps 90 --resume "runs/recipe_lightning/step=60.ckpt"

Takes a few seconds and ends with the accuracy of the weak view alone, about 63 % (chance: 33), and the state of the
blocks. Lightning's checkpoint has the task and the optimizer. What it leaves out, random numbers and the place in an
epoch, is added here, so that a resumed run ends with the same bits. Lightning remarks that modules are in eval mode:
the averaged ones, and they are to be. A model without an average inside gets one by a callback:
`momentum_distill.integrations.lightning.EMACallback`.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from task import Distillation, make_loader, make_optimizer, report
from torch import Tensor
from torch.utils.data import DataLoader


class DistillationModule(lightning.LightningModule):
    def __init__(self, task: Distillation) -> None:
        super().__init__()
        self.task = task
        self.rng: Tensor | None = None

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.task(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.task)  # whose steps move the averages

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if self.rng is not None:
            torch.set_rng_state(self.rng)


class ResumableLoader(DataLoader):
    """A loader that goes on in the middle of an epoch: Lightning saves and restores what has these two methods."""

    done = 0  # batches of this epoch that were handed out

    def __iter__(self) -> Iterator[Any]:
        self.done %= len(self)  # nobody asks an epoch for one batch too many, so this is where the next one starts
        for batch in islice(super().__iter__(), self.done, None):
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def train(
    out: Path, *, steps: int = 60, save_every: int = 20, resume: Path | None = None, dropout: float = 0.1
) -> tuple[Distillation, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = DistillationModule(Distillation(dropout=dropout))
    saver = ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=save_every, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",  # as the toy wants it; a GPU has random numbers of its own to save
        devices=1,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, make_loader(ResumableLoader), ckpt_path=resume, weights_only=True)
    return module.task, trainer.optimizers[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe_lightning"))
    options = parser.parse_args(arguments)
    task, _ = train(options.out, steps=options.steps, resume=options.resume)
    print(report(task))


if __name__ == "__main__":
    main()
