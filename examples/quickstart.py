"""All six blocks in one small model: the machines of `docs/quickstart.md`, which explains every line.

    python examples/quickstart.py
    python examples/quickstart.py --epochs 40 --state run.pt

On a GPU where there is one. The second writes its whole state to a file after each epoch; the same command again goes
on from there, on a CPU with the numbers of one training. The first takes about four seconds on one CPU core: the loss
of an epoch falls from about 9.5 to 5.5 (the rest is mostly the entropy of the contrastive term); then a line for each
block tells what it did.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import momentum_distill as md

CLASSES = ("good", "worn", "broken")
TRAIN, BATCH, WIDTH = 512, 64, 32  # rows for training, rows in a batch, features of a modality


class Machines(NamedTuple):
    """A technician's note, which says almost everything, and a noisy sensor; how worn the machine is."""

    note: Tensor  # (N, 20)
    sensor: Tensor  # (N, 8)
    wear: Tensor  # scores in [-1, 1], (N,)
    labels: Tensor  # classes, (N,)

    def rows(self, chosen: Tensor | slice) -> "Machines":
        return Machines(*(tensor[chosen] for tensor in self))


def make_machines(count: int = 1024) -> Machines:
    wear = 2 * torch.rand(count) - 1
    note = wear[:, None] * torch.randn(20) + 0.3 * torch.randn(count, 20)
    sensor = torch.tanh(wear[:, None] * torch.randn(8)) + torch.randn(count, 8)
    return Machines(note, sensor, wear, torch.bucketize(wear, torch.tensor([-0.4, 0.4])))


class Output(NamedTuple):
    features: Tensor  # (N, d)
    scores: Tensor  # (N,)
    logits: Tensor  # (N, C)


class Branch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH))
        self.score, self.classify = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, len(CLASSES))

    def forward(self, x: Tensor) -> Output:
        features = self.encoder(x)
        return Output(features, self.score(features).squeeze(1), self.classify(features))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.note, self.sensor, self.fused = Branch(20), Branch(8), Branch(2 * WIDTH)
        self.fuse = md.MomentumFusionFactors(["note", "sensor"])

    def forward(self, note: Tensor, sensor: Tensor) -> tuple[Output, Output, Output]:
        n, s = self.note(note), self.sensor(sensor)
        weighted = self.fuse({"note": n.features, "sensor": s.features})
        return n, s, self.fused(torch.cat(list(weighted.values()), dim=1))


class Trainer:
    """The model, the blocks, their training. What has tensors goes to the device; an average is where its model was."""

    def __init__(self, device: torch.device) -> None:
        self.model = Model().to(device)
        self.momentum = md.EMAWrapper(self.model.sensor, decay=0.98)  # 0.995 is for longer runs
        self.queue = md.ClassQueue(256, {"note": WIDTH, "sensor": WIDTH, "sensor_momentum": WIDTH}).to(device)
        self.contrast = md.SupConDistillLoss(temperature=0.5).to(device)
        self.regress = md.ResponseDistillLoss(task="regression")
        self.classify = md.ResponseDistillLoss(task="classification")
        self.fusion = md.HardSampleFusionLoss()
        # The temperature and the fusion factors are learned too, but without weight decay.
        self.optimizer = torch.optim.AdamW(md.param_groups(self.model, self.contrast, weight_decay=1e-2, lr=3e-3))
        self.history: list[dict[str, float]] = []  # the loss of each epoch, and its terms

    def losses(self, batch: Machines) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of the loss, and the rows for the queue."""
        n, s, f = self.model(batch.note, batch.sensor)
        m = self.momentum(batch.sensor)
        past_note, past_labels = self.queue.read("note")
        past_sensor, _ = self.queue.read("sensor")
        past_momentum, _ = self.queue.read("sensor_momentum")
        key_labels = (batch.labels, past_labels)
        note_to_sensor = self.contrast.terms(
            n.features,
            (s.features, past_sensor),
            batch.labels,
            key_labels,
            momentum_query=n.features,
            momentum_keys=(m.features, past_momentum),
        )
        sensor_to_note = self.contrast.terms(
            s.features,
            (n.features, past_note),
            batch.labels,
            key_labels,
            momentum_query=m.features,
            momentum_keys=(n.features, past_note),
        )
        truth = [F.l1_loss(o.scores, batch.wear) + F.cross_entropy(o.logits, batch.labels) for o in (n, s, f)]
        terms = {
            "truth": torch.stack(truth).sum(),
            "features": (note_to_sensor.total + sensor_to_note.total) / 2,
            "scores": self.regress(s.scores, n.scores, m.scores),
            "classes": self.classify(s.logits, n.logits, m.logits),
            "fusion": self.fusion(
                student_scores=s.scores,
                student_logits=s.logits,
                fused_scores=f.scores,
                fused_logits=f.logits,
                targets=batch.wear,
                labels=batch.labels,
            ),
        }
        return terms, {"note": n.features, "sensor": s.features, "sensor_momentum": m.features}

    def train(self, train: Machines, test: Machines, *, epochs: int, state: Path | None = None) -> None:
        """The training loop, each thing in its place."""
        if state is not None and state.exists():
            self.load(state)
        for epoch in range(len(self.history) + 1, epochs + 1):
            records = []
            for chosen in torch.randperm(TRAIN).split(BATCH):
                batch = train.rows(chosen.to(train.wear.device))
                terms, rows = self.losses(batch)
                loss = torch.stack(list(terms.values())).sum()

                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()

                self.momentum.update(self.model.sensor)  # the averages follow the step
                self.model.fuse.update()
                self.queue.enqueue(batch.labels, rows)  # the queue takes the batch after its loss
                records.append({"loss": loss.item()} | {name: term.item() for name, term in terms.items()})

            self.history.append({name: sum(record[name] for record in records) / len(records) for name in records[0]})
            if epoch % max(1, epochs // 4) == 0 or epoch == 1:
                with self.momentum.swap(self.model.sensor):  # the sensor's average in its place
                    averaged = look(self, test)["fused"]
                means = "  ".join(f"{name} {value:.3f}" for name, value in self.history[-1].items())
                print(f"epoch {epoch:2}  {means}  error of the fusion {averaged:.3f}")
            if state is not None:
                self.save(state)

    def save(self, path: Path) -> None:
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        part = path.with_suffix(".part")  # a save that is cut off leaves the one before it whole
        torch.save(parts | {"history": self.history, "rng": torch.get_rng_state()}, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.history = state["history"]
        torch.set_rng_state(state["rng"])  # shuffling, and dropout on the CPU

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What changes in training."""
        modules = {"model": self.model, "momentum": self.momentum, "queue": self.queue, "contrast": self.contrast}
        return {**modules, "optimizer": self.optimizer}


@torch.no_grad()
def look(trainer: Trainer, test: Machines) -> dict[str, float]:
    """What the blocks work on, measured on new machines."""
    trainer.model.eval()
    n, s, f = trainer.model(test.note, test.sensor)
    trainer.model.train()
    m = trainer.momentum(test.sensor)
    return {
        "sensor": float((s.scores - test.wear).abs().mean()),
        "averaged": float((m.scores - test.wear).abs().mean()),
        "fused": float((f.scores - test.wear).abs().mean()),
        "agreement": float((s.logits.argmax(dim=1) == n.logits.argmax(dim=1)).float().mean()),
        "gap": float(md.diagnostics.modality_gap(s.features, n.features)),
        "hardness": float(torch.tanh((test.wear - f.scores).abs()).mean()),
    }


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--state", type=Path, help="a file to go on from, where it is there, and to save to")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machines = Machines(*(tensor.to(device) for tensor in make_machines()))
    train, test = machines.rows(slice(TRAIN)), machines.rows(slice(TRAIN, None))
    trainer = Trainer(device)
    before = look(trainer, test)
    trainer.train(train, test, epochs=options.epochs, state=options.state)
    after = look(trainer, test)
    kept = torch.bincount(trainer.queue.read("note")[1], minlength=len(CLASSES)).tolist()
    holds = ", ".join(f"{count} {name}" for count, name in zip(kept, CLASSES, strict=True))
    factors = ", ".join(f"{name} {value:.3f}" for name, value in trainer.model.fuse.factors().items())

    def change(name: str) -> str:
        return f"{before[name]:.3f} → {after[name]:.3f}"

    print(f"\nOn {len(test.wear)} new machines, before → after training:")
    print(f"EMAWrapper             {trainer.momentum.step} updates; error of the averaged sensor {change('averaged')}")
    print(f"ClassQueue             holds {len(trainer.queue)} machines: {holds}")
    print(f"SupConDistillLoss      gap between the modalities {change('gap')}, temperature 0.500 → ", end="")
    print(f"{trainer.contrast.temperature:.3f}")
    print(f"ResponseDistillLoss    the sensor's classes are the note's for {change('agreement')} of the machines")
    print(f"HardSampleFusionLoss   mean weight {change('hardness')}: what the fusion knows is hard no more")
    print(f"MomentumFusionFactors  1.000 → {factors}; error of the fusion {change('fused')}")
    print(f"Error of the sensor alone {change('sensor')}")
    return [means["loss"] for means in trainer.history]


if __name__ == "__main__":
    main()
