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
from mtmd.data.batches import Batch
from mtmd.data.fold import ABSENT
from mtmd.model import CLASSES, MTMD, Outputs, Prediction
from mtmd.settings.config import STUDENTS, TEACHER, TERMS, Config


class Objective(nn.Module):
    """The loss of a batch, and what it remembers between batches: momentum models and queue.

    What is off (`Config.off`, Table II) is not computed, and what only that needs is not built.
    """

    def __init__(self, config: Config, model: MTMD) -> None:
        super().__init__()
        off = config.off
        self.modalities = model.modalities
        self.students = tuple(name for name in STUDENTS if name in self.modalities)
        self.gammas = {name: getattr(config, f"gamma_{name}") for name in TERMS if name not in off}

        self.momentum = nn.ModuleDict()
        if "momentum_dmd" not in off:
            # Eq. 6: momentum copies of the audio and vision models, heads included.
            for name in self.students:
                self.momentum[name] = md.EMAWrapper(model.branches[name], decay=config.decay)
        # Section III-E.2: the latest representations of the online and the momentum models, in step.
        self.queue = None
        if "queue" not in off:
            streams = [*self.modalities, *(f"{name}_momentum" for name in self.momentum)]
            self.queue = md.ClassQueue(
                config.queue_size,
                dict.fromkeys(streams, config.width) | ({"scores": 1} if config.sampling == "distance" else {}),
                num_classes=CLASSES if config.sampling != "instance" else None,
                balanced=config.balanced_queue,
                normalize=streams,
            )
        self.by_instance = config.sampling == "instance"
        self.by_distance = config.sampling == "distance"
        self.detach_text = config.detach_text
        self.contrast = md.SupConDistillLoss(
            temperature=config.temperature,
            learnable_temperature="feat" in self.gammas,  # DDP waits for the gradient of whatever may have one
            alpha=config.alpha,
            positives=config.positives,
            positives_from="distance" if self.by_distance else "labels",
            width=config.score_width if self.by_distance else None,
            hardness=config.hardness,
        )
        self.respond_scores = md.ResponseDistillLoss(task="regression", alpha=config.alpha)
        self.respond_classes = md.ResponseDistillLoss(task="classification", alpha=config.alpha)
        self.teach_from_fusion = md.HardSampleFusionLoss(hard_attention="hard_attention" not in off)
        self._since_update: list[tuple[Outputs, dict[str, Prediction], Batch]] = []

    def forward(self, model: MTMD, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss (Eq. 18) and its terms, by name, for the log."""
        outputs = model(batch)
        momentum = {name: ema(*model.inputs(batch, name)) for name, ema in self.momentum.items()}

        terms = {f"gt_{name}": ground_truth_loss(outputs.unimodal[name], batch, name) for name in self.modalities}
        if model.fusion is not None:
            terms["gt_fused"] = ground_truth_loss(outputs.fused, batch, None)
        terms["gt"] = sum(terms.values())  # Eq. 17
        terms |= self.response_terms(outputs, momentum, batch)
        if "feat" in self.gammas:
            terms |= self.feature_terms(outputs, momentum, batch)
        if "fusion" in self.gammas:
            terms["fusion"] = self.fusion_term(outputs, batch)
        total = terms["gt"] + sum(gamma * terms[name] for name, gamma in self.gammas.items())  # Eq. 18

        if self.queue is not None:
            self._since_update.append((outputs, momentum, batch))
        return total, {"total": total.detach()} | {name: term.detach() for name, term in terms.items()}

    def response_terms(self, outputs: Outputs, momentum: dict[str, Prediction], batch: Batch) -> dict[str, Tensor]:
        """L_reg and L_cls: the students' scores and logits follow the text's and their momentum model's (Eq. 7, 10)."""
        losses = {"reg": ("scores", self.respond_scores), "cls": ("logits", self.respond_classes)}
        terms = {}
        for term, (part, loss) in losses.items():
            if term not in self.gammas:
                continue
            terms[term] = sum(
                loss(
                    getattr(outputs.unimodal[name], part),
                    getattr(outputs.unimodal[TEACHER], part),
                    getattr(momentum[name], part) if name in momentum else None,
                    mask=batch.present[name] & batch.present[TEACHER],
                )
                for name in self.students
            )
        return terms

    def feature_terms(self, outputs: Outputs, momentum: dict[str, Prediction], batch: Batch) -> dict[str, Tensor]:
        """L_feat and its modality-shared and modality-specific parts: text and student by class (Eq. 8, 9, 11)."""
        text = outputs.unimodal[TEACHER].features
        if self.detach_text:
            text = text.detach()
        targets = self.contrast_labels(batch)
        # Losses and queue leave out what is labelled ABSENT.
        labels = {name: torch.where(batch.present[name], targets, ABSENT) for name in self.modalities}

        # Keys are the samples of all processes; the queries of each are its own.
        here = {name: outputs.unimodal[name].features for name in self.students} | {TEACHER: text}
        here |= {f"{name}_momentum": prediction.features for name, prediction in momentum.items()}
        here |= {f"{name}_labels": marks for name, marks in labels.items()}
        here = md.gather_rows(here | ({"scores": batch.scores[:, None]} if self.by_distance else {}))

        def keys(stream: str) -> tuple[Tensor, ...]:
            """The batch followed by the queue, as it stood before this batch."""
            now = (here[stream],)
            return now if self.queue is None else (*now, self.queue.read(stream, padded=True)[0])

        def key_labels(name: str) -> tuple[Tensor, ...]:
            now = (here[f"{name}_labels"],)
            return now if self.queue is None else (*now, self.queue.read(name, padded=True)[1])

        # For `--sampling distance` alone, which the paper does not have.
        scores = {"query_targets": batch.scores[:, None], "key_targets": keys("scores")} if self.by_distance else {}
        parts = {"feat": "total", "feat_shared": "supervised", "feat_specific": "distill"}
        sums = dict.fromkeys(parts, 0.0)
        for name in self.students:
            student = outputs.unimodal[name].features
            from_text, from_student = dict(scores), dict(scores)
            if name in momentum:
                # The text has no momentum model: on its side of each pair its own features stand for those.
                from_text |= {"momentum_query": text, "momentum_keys": keys(f"{name}_momentum")}
                from_student |= {"momentum_query": momentum[name].features, "momentum_keys": keys(TEACHER)}
            # Pairs: a query counts where the sample has both modalities, a key where it has its own.
            both = torch.where(batch.present[TEACHER], labels[name], ABSENT)
            text_to_student = self.contrast.terms(text, keys(name), both, key_labels(name), **from_text)
            student_to_text = self.contrast.terms(student, keys(TEACHER), both, key_labels(TEACHER), **from_student)
            for term, part in parts.items():
                sums[term] = sums[term] + (getattr(text_to_student, part) + getattr(student_to_text, part)) / 2
        return sums

    def contrast_labels(self, batch: Batch) -> Tensor:
        """What makes two samples positive: their class (or their scores) or, for Table III, that they are the same."""
        return batch.index if self.by_instance else batch.labels

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
            for name in self.students
        )

    def after_step(self, model: MTMD) -> None:
        """After the optimizer step: move the averages (Eq. 6, 12) and enqueue what was seen since the last call.

        Algorithm 1 updates the momentum models in the middle of a step, before their outputs are used; that is the same
        as here, at the end of the step before.
        """
        for name, ema in self.momentum.items():
            ema.update(model.branches[name])
        if model.fusion is not None and model.fusion.factors is not None:
            model.fusion.factors.update()
        for outputs, momentum, batch in self._since_update:
            features = {name: outputs.unimodal[name].features for name in self.modalities}
            features |= {f"{name}_momentum": prediction.features for name, prediction in momentum.items()}
            valid = {stream: batch.present[stream.removesuffix("_momentum")] for stream in features}
            features |= {"scores": batch.scores[:, None]} if self.by_distance else {}
            self.queue.enqueue(self.contrast_labels(batch), features, valid=valid)
        self._since_update.clear()


def ground_truth_loss(prediction: Prediction, batch: Batch, name: str | None) -> Tensor:
    """MAE plus cross-entropy over the samples that have this modality; None: the fusion (Eq. 5, 13)."""
    there = batch.labels != ABSENT
    keep = there if name is None else there & batch.present[name]
    error = (prediction.scores - batch.scores).abs()
    entropy = F.cross_entropy(prediction.logits, batch.labels, ignore_index=ABSENT, reduction="none")
    return md.functional.mean_rows(error + entropy, mask=keep, group="auto")
