"""Hugging Face Accelerate: the plain loop, prepared, with the state saved and loaded by Accelerate.

    pip install ".[integrations]"
    python examples/recipes/accelerate_loop.py
    python examples/recipes/accelerate_loop.py --steps 90 --resume runs/recipe_accelerate/step_60

Takes a few seconds and ends with the accuracy of the weak view alone, about 63 % (chance: 33), and the state of the
blocks. `save_state` has the task, the optimizer and the random numbers; the number of the step is registered beside
them. A model without an average inside gets one by `momentum_distill.integrations.accelerate.add_ema`.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from task import Distillation, make_loader, make_optimizer, report


class Progress:
    """How many steps were made, for `register_for_checkpointing`."""

    step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def train(
    out: Path, *, steps: int = 60, save_every: int = 20, resume: Path | None = None, dropout: float = 0.1
) -> tuple[Distillation, torch.optim.Optimizer]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)  # as the toy wants it
    task = Distillation(dropout=dropout)
    model, optimizer, loader = accelerator.prepare(task, make_optimizer(task), make_loader())
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if resume is not None:
        accelerator.load_state(resume)

    model.train()
    while progress.step < steps:
        epoch, done = divmod(progress.step, len(loader))
        rest = skip_first_batches(loader, done) if done else loader
        rest.set_epoch(epoch)
        for batch in rest:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()  # and with it the averages: see `make_optimizer`
                optimizer.zero_grad()
            progress.step += 1
            if progress.step % save_every == 0:
                accelerator.save_state(out / f"step_{progress.step}")
            if progress.step == steps:
                break
    return task, optimizer.optimizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe_accelerate"))
    options = parser.parse_args(arguments)
    task, _ = train(options.out, steps=options.steps, resume=options.resume)
    print(report(task))


if __name__ == "__main__":
    main()
