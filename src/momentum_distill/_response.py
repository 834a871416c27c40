"""Response-based distillation: scores or logits drawn to a teacher and to a momentum model."""

from torch import Tensor
from typing_extensions import override

from momentum_distill import functional
from momentum_distill._checks import COLDEST, HOTTEST, REDUCTIONS, check_bool, check_choice, check_number
from momentum_distill._contrast.formulas import Reduction
from momentum_distill._group import Group, check_group, describe_group
from momentum_distill._outputs import TASKS
from momentum_distill._typing import TypedModule
from momentum_distill._watch import StudentWatch
from momentum_distill.functional import Task


class ResponseDistillLoss(TypedModule):
    r"""A student's outputs drawn to those of a teacher and of its own momentum model (Eq. 7, 10).

    $$\mathcal L_{reg} = \tfrac1N\sum_i \big[(1-\alpha)\,|\hat y_t^i - \hat y_u^i|
        + \alpha\,|\hat y_{u,m}^i - \hat y_u^i|\big]$$
    $$\mathcal L_{cls} = \tfrac{T^2}N\sum_i \big[(1-\alpha)\,H(p_t^i, p_u^i) + \alpha\,H(p_{u,m}^i, p_u^i)\big]$$

    Args:
        task: `"regression"` (scores of shape `(N,)`) or `"classification"` (logits of shape `(N, C)`).
        alpha: Weight $\alpha$ of the momentum term, in [0, 1]; unused without momentum outputs. Paper: 0.2 to 0.6.
        temperature: $T$ of Hinton et al. (2015) in [1e-12, 1e12], for classification, with the factor $T^2$; regression
            ignores it. Paper: 1.
        reduction: `"mean"`, `"sum"` or `"none"`.
        detach_teacher: Stop the gradient at the teacher. The momentum outputs never get one.
        group: Whose rows the sums and means run over: None (this process), `"auto"` (torch.distributed's default group
            where there is one) or a process group: the same bits on all ranks, after DDP the gradients of one process.
        validate: Also check tensor values at every call, and that logits are no probabilities; makes the host wait.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range or a choice is unknown.

    Example:
        >>> import torch
        >>> loss_fn = ResponseDistillLoss(task="regression", alpha=0.5)
        >>> student = torch.zeros(2, requires_grad=True)
        >>> teacher, momentum = torch.ones(2), torch.full((2,), 3.0)
        >>> loss_fn(student, teacher, momentum).item()
        2.0

    References:
        MTMD (Lin and Hu, 2023), Eq. 7 and 10; the formula stands in `functional.response_distill_loss`.
    """

    def __init__(
        self,
        *,
        task: Task,
        alpha: float = 0.4,
        temperature: float = 1.0,
        reduction: Reduction = "mean",
        detach_teacher: bool = True,
        group: Group = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__()
        check_choice("task", task, TASKS)
        check_number("alpha", alpha, low=0.0, high=1.0)
        check_number("temperature", temperature, low=COLDEST, high=HOTTEST)
        check_choice("reduction", reduction, REDUCTIONS)
        check_bool("detach_teacher", detach_teacher)
        check_group(group)
        check_bool("validate", validate)
        self.task: Task = task
        self.alpha: float = float(alpha)
        self.temperature: float = float(temperature)
        self.reduction: Reduction = reduction
        self.detach_teacher = detach_teacher
        self.group = group
        self.validate = validate
        self._students = StudentWatch("student requires no gradient")

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        momentum: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        alpha: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of one student.

        Args:
            student: Scores `(N,)` or logits `(N, C)`, by `task`.
            teacher: The teacher's outputs, shape as `student`.
            momentum: The momentum model's outputs, shape as `student`; without them the teacher term stands alone.
            mask: True keeps a row, bool, shape `(N,)`.
            alpha: Overrides the weight of the momentum term for this call: in [0, 1], or a tensor of shape `()`.

        Returns:
            The loss, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If a shape or device is wrong.

        Warns:
            UserWarning: Once, if in training mode the student requires no gradient: it and a teacher may be swapped.

        Example:
            >>> import torch
            >>> loss_fn = ResponseDistillLoss(task="classification")
            >>> student = torch.zeros(2, 3, requires_grad=True)
            >>> teacher = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
            >>> loss = loss_fn(student, teacher, mask=torch.tensor([True, False]))
            >>> f"{loss.item():.4f}"  # log(3)
            '1.0986'
        """
        loss = functional.response_distill_loss(
            student,
            teacher,
            momentum,
            task=self.task,
            mask=mask,
            alpha=self.alpha if alpha is None else alpha,
            temperature=self.temperature,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
            group=self.group,
            validate=self.validate,
        )
        self._students.look(self, student, None if self.detach_teacher else teacher)
        return loss

    @override
    def extra_repr(self) -> str:
        return (
            f"task={self.task!r}, alpha={self.alpha:g}, temperature={self.temperature:g}, "
            f"reduction={self.reduction!r}, detach_teacher={self.detach_teacher}, group={describe_group(self.group)}"
        )
