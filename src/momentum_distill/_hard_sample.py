"""Fusion distillation: the fused prediction teaches a modality, most on hard samples."""

from torch import Tensor
from typing_extensions import override

from momentum_distill import functional
from momentum_distill._checks import REDUCTIONS, check_bool, check_choice, check_int
from momentum_distill._contrast.formulas import Reduction
from momentum_distill._group import Group, check_group, describe_group
from momentum_distill._outputs import CLASS_WEIGHTS
from momentum_distill._typing import TypedModule
from momentum_distill._watch import StudentWatch
from momentum_distill.functional import ClassWeight


class HardSampleFusionLoss(TypedModule):
    r"""The fused prediction teaches one modality, most where the fusion itself is still wrong (Eq. 14, 15).

    $$\mathcal L = \tfrac1N\sum_i w_{reg}^i\,|\hat y_f^i - \hat y_u^i|
        + w_{cls}\,\tfrac1N\sum_i H(\hat p_f^i, \hat p_u^i)$$
    $$w_{reg}^i = \tanh|y^i - \hat y_f^i|, \qquad w_{cls} = \tfrac1N\sum_i |p^i - \arg\max \hat p_f^i|$$

    Args:
        hard_attention: False sets all weights to 1 (Table II, "w/o HardAtt"). Better so where few rows have labels:
            once the fusion is right on these, the weights, and the loss of all others, are 0.
        class_weight: `"distance"` (as printed: class indices taken as numbers), `"error_rate"` (share of mistakes, for
            classes without an order) or `"per_sample"` ($|p^i - \arg\max \hat p_f^i|$ for each sample by itself).
        reduction: `"mean"`, `"sum"` or `"none"`.
        detach_teacher: Stop the gradient at the fused outputs. The weights never carry one.
        ignore_index: Label of a row that is absent.
        group: Whose rows the sums and means run over: None (this process), `"auto"` (torch.distributed's default group
            where there is one) or a process group: the same bits on all ranks, after DDP the gradients of one process.
        validate: Also check values at every call, labels on an accelerator too (on the CPU they always are), and that
            logits are no probabilities; makes the host wait for the device.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a choice is unknown.

    Example:
        >>> import torch
        >>> loss_fn = HardSampleFusionLoss(class_weight="error_rate")
        >>> student, labels = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 2])
        >>> fused = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
        >>> loss = loss_fn(student_logits=student, fused_logits=fused, labels=labels)
        >>> f"{loss.item():.4f}"  # half of the fused predictions are wrong: log(3) / 2
        '0.5493'

    References:
        MTMD (Lin and Hu, 2023), Eq. 14 and 15; the formula stands in `functional.hard_sample_fusion_loss`.
    """

    def __init__(
        self,
        *,
        hard_attention: bool = True,
        class_weight: ClassWeight = "distance",
        reduction: Reduction = "mean",
        detach_teacher: bool = True,
        ignore_index: int = -1,
        group: Group = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__()
        check_bool("hard_attention", hard_attention)
        check_choice("class_weight", class_weight, CLASS_WEIGHTS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_bool("detach_teacher", detach_teacher)
        check_int("ignore_index", ignore_index)
        check_group(group)
        check_bool("validate", validate)
        self.hard_attention = hard_attention
        self.class_weight: ClassWeight = class_weight
        self.reduction: Reduction = reduction
        self.detach_teacher = detach_teacher
        self.ignore_index = ignore_index
        self.group = group
        self.validate = validate
        self._students = StudentWatch("no student output requires a gradient")

    @override
    def forward(
        self,
        *,
        student_scores: Tensor | None = None,
        student_logits: Tensor | None = None,
        fused_scores: Tensor | None = None,
        fused_logits: Tensor | None = None,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one modality; give the scores, the logits or both.

        Args:
            student_scores: The modality's scores, shape `(N,)`.
            student_logits: The modality's logits, shape `(N, C)`.
            fused_scores: The fused scores, shape `(N,)`.
            fused_logits: The fused logits, shape `(N, C)`.
            targets: True scores, floating, shape `(N,)`, not used without scores. Where it is unknown, mask the row.
            labels: True classes in [0, C), integer, shape `(N,)`; `ignore_index` = absent (from both parts), -2 =
                unlabelled (its cross-entropy stands, it has no say in $w_{cls}$).
            mask: True keeps a row, bool, shape `(N,)`.

        Returns:
            The loss, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If a shape, device or label is wrong, or a part is incomplete.

        Warns:
            UserWarning: Once, if in training mode no student output requires a gradient: swapped with the fused ones?

        Example:
            >>> import torch
            >>> loss_fn = HardSampleFusionLoss()
            >>> student = torch.zeros(2, requires_grad=True)
            >>> fused, targets = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0])
            >>> loss = loss_fn(student_scores=student, fused_scores=fused, targets=targets)
            >>> f"{loss.item():.4f}"  # tanh(2) / 2
            '0.4820'
        """
        loss = functional.hard_sample_fusion_loss(
            student_scores=student_scores,
            student_logits=student_logits,
            fused_scores=fused_scores,
            fused_logits=fused_logits,
            targets=targets,
            labels=labels,
            mask=mask,
            hard_attention=self.hard_attention,
            class_weight=self.class_weight,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
            ignore_index=self.ignore_index,
            group=self.group,
            validate=self.validate,
        )
        teachers = () if self.detach_teacher else (fused_scores, fused_logits)
        self._students.look(self, student_scores, student_logits, teachers)
        return loss

    @override
    def extra_repr(self) -> str:
        return (
            f"hard_attention={self.hard_attention}, class_weight={self.class_weight!r}, "
            f"reduction={self.reduction!r}, detach_teacher={self.detach_teacher}, "
            f"ignore_index={self.ignore_index}, group={describe_group(self.group)}"
        )
