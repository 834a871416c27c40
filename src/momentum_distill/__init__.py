"""Momentum distillation for multimodal models, as reusable blocks.

>>> import torch
>>> import momentum_distill as md
>>> student = torch.nn.Linear(8, 4)
>>> momentum = md.EMAWrapper(student, decay=0.995)
>>> queue = md.ClassQueue(64, {"teacher": 4})
>>> contrast = md.SupConDistillLoss(temperature=0.5, alpha=0.4)
>>> inputs, teacher, labels = (
...     torch.randn(16, 8),
...     torch.randn(16, 4),
...     torch.randint(3, (16,)),
... )
>>> features, (past, past_labels) = student(inputs), queue.read("teacher")
>>> keys, key_labels = (teacher, past), (labels, past_labels)
>>> loss = contrast(
...     features,
...     keys,
...     labels,
...     key_labels,
...     momentum_query=momentum(inputs),
...     momentum_keys=keys,
... )
>>> loss.backward()  # ... optimizer.step(), then:
>>> momentum.update(student)
>>> queue.enqueue(labels, {"teacher": teacher})
"""

from importlib.metadata import version as _version

from momentum_distill import diagnostics as diagnostics
from momentum_distill import functional as functional
from momentum_distill import schedules as schedules
from momentum_distill._ema import EMAWrapper as EMAWrapper
from momentum_distill._ema_dict import EMADict as EMADict
from momentum_distill._fusion import MomentumFusionFactors as MomentumFusionFactors
from momentum_distill._group import gather_rows as gather_rows
from momentum_distill._hard_sample import HardSampleFusionLoss as HardSampleFusionLoss
from momentum_distill._optim import param_groups as param_groups
from momentum_distill._queue import ClassQueue as ClassQueue
from momentum_distill._response import ResponseDistillLoss as ResponseDistillLoss
from momentum_distill._sigmoid import SigmoidDistillLoss as SigmoidDistillLoss
from momentum_distill._supcon import SupConDistillLoss as SupConDistillLoss

__version__ = _version("momentum-distill")

__all__ = [
    "ClassQueue",
    "EMADict",
    "EMAWrapper",
    "HardSampleFusionLoss",
    "MomentumFusionFactors",
    "ResponseDistillLoss",
    "SigmoidDistillLoss",
    "SupConDistillLoss",
    "diagnostics",
    "functional",
    "gather_rows",
    "param_groups",
    "schedules",
]
