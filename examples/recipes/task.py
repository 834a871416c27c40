"""What the four recipes train: two views of one thing, a model with the blocks inside, and its optimizer.

The recipes beside this file show the same training under plain PyTorch, Lightning, Accelerate and transformers. All
that the blocks need stands here, for a framework changes nothing of it: the moving average, the queue and the learned
temperature are parts of one module, so that whatever saves, moves or wraps the module takes them along.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

import momentum_distill as md

CLASSES, STRONG, WEAK = 3, 20, 8  # classes, widths of the two views
ROWS, TEST_ROWS, BATCH = 300, 1000, 32  # ten batches in an epoch, the last of 12 rows
FEATURES = 16


class TwoViews(Dataset):
    """A strong view that tells the classes apart and a weak one that hardly does."""

    def __init__(self, rows: int = ROWS, *, seed: int = 0) -> None:
        world = torch.Generator().manual_seed(0)  # where the classes lie: the same for training and test
        strong, weak = torch.randn(CLASSES, STRONG, generator=world), torch.randn(CLASSES, WEAK, generator=world)
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (rows,), generator=draw)
        self.strong = strong[self.labels] + torch.randn(rows, STRONG, generator=draw)
        self.weak = weak[self.labels] + 2 * torch.randn(rows, WEAK, generator=draw)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        # The names are those of the model's arguments: transformers wants them so.
        return {"strong": self.strong[row], "weak": self.weak[row], "labels": self.labels[row]}


class Shuffle(Sampler[int]):
    """A new order in every epoch that depends on the number of the epoch alone, so that a resumed run has the same.

    Lightning, Accelerate and transformers call `set_epoch` by themselves.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.epoch)).tolist()


def make_loader(kind: type[DataLoader] = DataLoader) -> DataLoader:
    """Batches of an epoch. With a generator of its own, a loader draws no number from torch's, which is dropout's."""
    data = TwoViews()
    return kind(data, batch_size=BATCH, sampler=Shuffle(len(data)), generator=torch.Generator())


class Branch(nn.Module):
    """One view: inputs (N, width) to features (N, d) and logits (N, C)."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, FEATURES))
        self.classify = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(x)
        return features, self.classify(features)


class Distillation(nn.Module):
    """The model and the blocks; the call returns the loss, and fills the queue while training."""

    def __init__(self, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.strong, self.weak = Branch(STRONG, dropout), Branch(WEAK, dropout)
        self.fuse = md.MomentumFusionFactors(["strong", "weak"])
        self.fused = nn.Linear(2 * FEATURES, CLASSES)
        self.momentum = md.EMAWrapper(self.weak, decay=0.98)
        self.queue = md.ClassQueue(100, {"strong": FEATURES, "weak": FEATURES, "momentum": FEATURES})
        self.contrast = md.SupConDistillLoss(temperature=0.5)
        self.response = md.ResponseDistillLoss(task="classification")

    def forward(self, strong: Tensor, weak: Tensor, labels: Tensor) -> dict[str, Tensor]:
        strong_features, strong_logits = self.strong(strong)
        weak_features, weak_logits = self.weak(weak)
        fused_logits = self.fused(
            torch.cat(list(self.fuse({"strong": strong_features, "weak": weak_features}).values()), dim=1)
        )
        momentum_features, momentum_logits = self.momentum(weak)

        past_strong, past_labels = self.queue.read("strong")
        past_weak, _ = self.queue.read("weak")
        past_momentum, _ = self.queue.read("momentum")
        key_labels = (labels, past_labels)
        strong_to_weak = self.contrast(
            strong_features,
            (weak_features, past_weak),
            labels,
            key_labels,
            momentum_query=strong_features,
            momentum_keys=(momentum_features, past_momentum),
        )
        weak_to_strong = self.contrast(
            weak_features,
            (strong_features, past_strong),
            labels,
            key_labels,
            momentum_query=momentum_features,
            momentum_keys=(strong_features, past_strong),
        )
        truth = sum(F.cross_entropy(logits, labels) for logits in (strong_logits, weak_logits, fused_logits))
        response = self.response(weak_logits, strong_logits, momentum_logits)
        loss = truth + response + (strong_to_weak + weak_to_strong) / 2

        # What was read above is a copy, so the batch may enter here. Under activation checkpointing, which calls
        # `forward` twice, the training loop would have to do it.
        if self.training:
            rows = {"strong": strong_features, "weak": weak_features, "momentum": momentum_features}
            self.queue.enqueue(labels, rows)
        return {"loss": loss}

    def update(self) -> None:
        """Move the averages; after every step of the optimizer."""
        self.momentum.update(self.weak)
        self.fuse.update()


def make_optimizer(task: Distillation) -> torch.optim.Optimizer:
    """The optimizer, whose every step moves the averages. Temperature and fusion factors are in it, undecayed.

    Hung on the optimizer, the update follows its real steps under every framework: once however many batches are
    accumulated, and not after one that a GradScaler skips.
    """
    optimizer = torch.optim.AdamW(md.param_groups(task, weight_decay=1e-2, lr=3e-3))
    optimizer.register_step_post_hook(lambda *_: task.update())
    return optimizer


@torch.no_grad()
def report(task: Distillation) -> str:
    """How the weak view does alone on rows it never saw, and where the blocks are."""
    test = TwoViews(TEST_ROWS, seed=1)
    training = task.training
    task.eval()
    right = task.weak(test.weak)[1].argmax(dim=1) == test.labels
    task.train(training)
    return (
        f"weak view alone {100 * right.float().mean():.1f} %, average after {task.momentum.step} updates, "
        f"{len(task.queue)} rows in the queue, temperature {task.contrast.temperature:.3f}, "
        f"factors {', '.join(f'{name} {value:.3f}' for name, value in task.fuse.factors().items())}"
    )
