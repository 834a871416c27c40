"""Plain PyTorch: a loop of one's own that can be stopped after any step and goes on to the same bits.

    python examples/recipes/plain_loop.py
    python examples/recipes/plain_loop.py --steps 90 --resume runs/recipe_plain/step_60.pt

Takes a second and ends with the accuracy of the weak view alone, about 63 % (chance: 33), and the state of the blocks.
A checkpoint is the state of the task (averages, queue and temperature are in it), of the optimizer and of the random
numbers.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from task import Distillation, make_loader, make_optimizer, report


def train(
    out: Path, *, steps: int = 60, save_every: int = 20, resume: Path | None = None, dropout: float = 0.1
) -> tuple[Distillation, torch.optim.Optimizer]:
    torch.manual_seed(0)
    task = Distillation(dropout=dropout)
    optimizer = make_optimizer(task)
    loader = make_loader()
    step = 0
    if resume is not None:
        state = torch.load(resume, weights_only=True)
        task.load_state_dict(state["task"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step = state["step"]

    out.mkdir(parents=True, exist_ok=True)
    while step < steps:
        epoch, done = divmod(step, len(loader))
        loader.sampler.set_epoch(epoch)
        for batch in islice(loader, done, done + steps - step):
            optimizer.zero_grad()
            task(**batch)["loss"].backward()
            optimizer.step()  # and with it the averages: see `make_optimizer`
            step += 1
            if step % save_every == 0:
                state = {"task": task.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "rng": torch.get_rng_state(), "step": step}, out / f"step_{step}.pt")
    return task, optimizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe_plain"))
    options = parser.parse_args(arguments)
    task, _ = train(options.out, steps=options.steps, resume=options.resume)
    print(report(task))


if __name__ == "__main__":
    main()
