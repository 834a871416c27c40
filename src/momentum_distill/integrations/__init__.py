"""One line in a framework: averages that move after each optimizer step, are saved, and swapped in for evaluation.

- `momentum_distill.integrations.lightning`: `Trainer(callbacks=[EMACallback(decay=0.999, swap=True)])`
- `momentum_distill.integrations.transformers`: `trainer.add_callback(EMACallback(trainer, decay=0.999, swap=True))`
- `momentum_distill.integrations.accelerate`: `ema = add_ema(accelerator, model, optimizer, decay=0.999)`

A framework is imported with the module that is named after it, and never before.
"""
