"""The Trainer of transformers: it takes the task as it is, for the call returns a dictionary with the loss.

    pip install ".[integrations]"
    python examples/recipes/trainer_transformers.py
    python examples/recipes/trainer_transformers.py --steps 90 --resume runs/recipe_trainer/checkpoint-60

Takes a few seconds and ends with the accuracy of the weak view alone, about 62 % (chance: 33; the Trainer orders the
rows otherwise than the other recipes), and the state of the blocks. The optimizer is given: that of the Trainer puts
the temperature and the fusion factors, which are neither biases nor norms to it, among what weight decay shrinks, and
nobody would move the averages. A model without an average inside gets one by a callback:
`momentum_distill.integrations.transformers.EMACallback`.
"""

import argparse
from pathlib import Path

import torch
from task import BATCH, Distillation, TwoViews, make_optimizer, report
from transformers import Trainer, TrainingArguments


def train(
    out: Path, *, steps: int = 60, save_every: int = 20, resume: Path | None = None, dropout: float = 0.1
) -> tuple[Distillation, torch.optim.Optimizer]:
    torch.manual_seed(0)
    task = Distillation(dropout=dropout)
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        use_cpu=True,  # as the toy wants it
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=save_every,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    trainer = Trainer(task, settings, train_dataset=TwoViews(), optimizers=(make_optimizer(task), None))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return task, trainer.optimizer.optimizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe_trainer"))
    options = parser.parse_args(arguments)
    task, _ = train(options.out, steps=options.steps, resume=options.resume)
    print(report(task))


if __name__ == "__main__":
    main()
