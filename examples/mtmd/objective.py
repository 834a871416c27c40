"""What MTMD minimises (Eq. 5, 7-11, 13-18), put together from the blocks of momentum_distill.

One step, in the order of Algorithm 1:

    loss, terms = objective(model, batch)   # forward passes and all losses
    loss.backward(); optimizer.step()
    objective.after_step(model)             # momentum models, fusion factors, queue
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import momentum_distill as md
from mtmd.config import Config
from mtmd.data import Batch
from mtmd.model import CLASSES, MODALITIES, MTMD, STUDENTS, TEACHER, Outputs, Prediction

ABSENT = -1  # the label of a row or key that is not there


class Objective(nn.Module):
    """The loss of a batch, and what it remembers between batches: momentum models and queue."""

    def __init__(self, config: Config, model: MTMD) -> None:
        super().__init__()
        self.gammas = {
            "reg": config.gamma_reg,
            "cls": config.gamma_cls,
            "feat": config.gamma_feat,
            "fusion": config.gamma_fusion,
        }
        # Eq. 6: momentum copies of the audio and vision models, heads included.
        self.momentum = nn.ModuleDict(
            {name: md.EMAWrapper(model.branches[name], decay=config.decay) for name in STUDENTS}
        )
        # Section III-E.2: the latest representations of the online and the momentum models, in step.
        streams = [*MODALITIES, *(f"{name}_momentum" for name in STUDENTS)]
        self.queue = md.ClassQueue(
            config.queue_size,
            dict.fromkeys(streams, config.width),
            num_classes=CLASSES,
            balanced=config.balanced_queue,
        )
        self.contrast = md.SupConDistillLoss(
            temperature=config.temperature, alpha=config.alpha, positives=config.positives
        )
        self.respond_scores = md.ResponseDistillLoss(task="regression", alpha=config.alpha)
        self.respond_classes = md.ResponseDistillLoss(task="classification", alpha=config.alpha)
        self.teach_from_fusion = md.HardSampleFusionLoss()

    def forward(self, model: MTMD, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss (Eq. 18) and its terms, by name, for the log."""
        outputs = model(batch)
        momentum = {name: self.momentum[name](*model.inputs(batch, name)) for name in STUDENTS}

        terms = {f"gt_{name}": ground_truth_loss(outputs.unimodal[name], batch, name) for name in MODALITIES}
        terms["gt_fused"] = ground_truth_loss(outputs.fused, batch, None)
        terms["gt"] = sum(terms.values())  # Eq. 17
        terms["reg"], terms["cls"] = self.response_terms(outputs, momentum, batch)
        terms["feat"], terms["feat_shared"], terms["feat_specific"] = self.feature_terms(outputs, momentum, batch)
        terms["fusion"] = self.fusion_term(outputs, batch)
        total = terms["gt"] + sum(gamma * terms[name] for name, gamma in self.gammas.items())  # Eq. 18

        self._latest = (outputs, momentum, batch)
        return total, {"total": total.detach()} | {name: term.detach() for name, term in terms.items()}

    def response_terms(self, outputs: Outputs, momentum: dict[str, Prediction], batch: Batch) -> tuple[Tensor, Tensor]:
        """L_reg and L_cls: the students' scores and logits follow the text's and their momentum model's (Eq. 7, 10)."""
        teacher = outputs.unimodal[TEACHER]
        reg = cls = torch.zeros(())
        for name in STUDENTS:
            student, both = outputs.unimodal[name], batch.present[name] & batch.present[TEACHER]
            reg = reg + self.respond_scores(student.scores, teacher.scores, momentum[name].scores, mask=both)
            cls = cls + self.respond_classes(student.logits, teacher.logits, momentum[name].logits, mask=both)
        return reg, cls

    def feature_terms(
        self, outputs: Outputs, momentum: dict[str, Prediction], batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """L_feat and its modality-shared and modality-specific parts: text and student by class (Eq. 8, 9, 11)."""
        text = outputs.unimodal[TEACHER].features
        labels = {name: torch.where(batch.present[name], batch.labels, ABSENT) for name in MODALITIES}

        def keys(stream: str, features: Tensor) -> tuple[Tensor, Tensor]:
            """The batch followed by the queue, as it stood before this batch."""
            return features, self.queue.read(stream, padded=True)[0]

        def key_labels(name: str) -> tuple[Tensor, Tensor]:
            return labels[name], self.queue.read(name, padded=True)[1]

        sums = [torch.zeros(()), torch.zeros(()), torch.zeros(())]
        for name in STUDENTS:
            student, student_momentum = outputs.unimodal[name].features, momentum[name].features
            # Pairs: a query counts where the sample has both modalities, a key where it has its own.
            both = torch.where(batch.present[TEACHER], labels[name], ABSENT)
            text_to_student = self.contrast.terms(
                text,
                keys(name, student),
                both,
                key_labels(name),
                momentum_query=text,
                momentum_keys=keys(f"{name}_momentum", student_momentum),
            )
            student_to_text = self.contrast.terms(
                student,
                keys(TEACHER, text),
                both,
                key_labels(TEACHER),
                momentum_query=student_momentum,
                momentum_keys=keys(TEACHER, text),
            )
            for index, part in enumerate(("total", "supervised", "distill")):
                sums[index] = sums[index] + (getattr(text_to_student, part) + getattr(student_to_text, part)) / 2
        return sums[0], sums[1], sums[2]

    def fusion_term(self, outputs: Outputs, batch: Batch) -> Tensor:
        """L_fusion: the students follow the fused prediction, most on hard samples (Eq. 14-16)."""
        return sum(
            self.teach_from_fusion(
                student_scores=outputs.unimodal[name].scores,
                student_logits=outputs.unimodal[name].logits,
                fused_scores=outputs.fused.scores,
                fused_logits=outputs.fused.logits,
                targets=batch.scores,
                labels=batch.labels,
                mask=batch.present[name],
            )
            for name in STUDENTS
        )

    def after_step(self, model: MTMD) -> None:
        """After the optimizer step: move the averages (Eq. 6, 12) and enqueue the batch.

        Algorithm 1 updates the momentum models in the middle of a step, before their outputs are used; that is the same
        as here, at the end of the step before.
        """
        for name in STUDENTS:
            self.momentum[name].update(model.branches[name])
        model.fusion.factors.update()
        outputs, momentum, batch = self._latest
        features = {name: outputs.unimodal[name].features for name in MODALITIES}
        features |= {f"{name}_momentum": momentum[name].features for name in STUDENTS}
        valid = {stream: batch.present[stream.removesuffix("_momentum")] for stream in features}
        self.queue.enqueue(batch.labels, features, valid=valid)
        self._latest = None


def ground_truth_loss(prediction: Prediction, batch: Batch, name: str | None) -> Tensor:
    """MAE plus cross-entropy over the samples that have this modality; None: the fusion (Eq. 5, 13)."""
    keep = torch.ones_like(batch.labels, dtype=torch.bool) if name is None else batch.present[name]
    error = torch.where(keep, (prediction.scores - batch.scores).abs(), 0.0)
    entropy = F.cross_entropy(
        prediction.logits, torch.where(keep, batch.labels, ABSENT), ignore_index=ABSENT, reduction="none"
    )
    return (error + entropy).sum() / keep.sum().clamp(min=1)
