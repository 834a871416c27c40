"""Feature-based distillation: the pairwise sigmoid loss with momentum targets."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from momentum_distill import functional
from momentum_distill._checks import (
    REDUCTIONS,
    check_bool,
    check_choice,
    check_int,
    check_number,
    has_numbers,
    in_transform,
)
from momentum_distill._contrast.arguments import Normalize, Parts, check_normalize
from momentum_distill._contrast.formulas import Reduction
from momentum_distill._contrast.sigmoid import KEY_REDUCTIONS, KeyReduction
from momentum_distill._group import Group, check_group, describe_group
from momentum_distill._temperature import TemperatureModule
from momentum_distill._watch import IdleWatch, StudentWatch


class SigmoidDistillLoss(TemperatureModule):
    r"""Ask of each row and key for itself whether they match, and draw it to what the momentum model answers.

    $$\mathcal L_i = -(1-\alpha) \sum_j \log \sigma(y_{ij} z_{ij}) + \alpha \sum_j \mathrm{KL}(p'_{ij} \Vert p_{ij}),
      \qquad z_{ij} = \bar q_i^\top \bar k_j / \tau + b$$

    with $y_{ij} = 1$ for a key of the row's class, else $-1$, and the chances of a match $p_{ij} = \sigma(z_{ij})$ and,
    of the momentum features, $p'_{ij}$. The loss of SigLIP with any number of matches, a queue and momentum targets;
    the mathematics stands in :func:`momentum_distill.functional.sigmoid_distill_loss`.

    The loss owns two parameters, the learned temperature and bias: give `loss_fn.parameters()` to the optimizer, best
    by :func:`~momentum_distill.param_groups`, without weight decay.

    Args:
        temperature: $\tau$ at the start, inside `temperature_range`. SigLIP: 0.1, its `t` = 10.
        learnable_temperature: Learn $\tau$, or keep it fixed.
        temperature_range: Smallest and largest $\tau$; a learned one is brought back as in `SupConDistillLoss`. Models
            that SigLIP trained for long are below 0.01.
        bias: $b$ at the start, finite. SigLIP: -10, for thousands of keys of which one matches: set it for fewer. Where
            a share $\pi$ of the pairs match, $\log\frac{\pi}{1-\pi}$ starts at that share, -4 for one in 64.
        learnable_bias: Learn $b$, or keep it fixed.
        alpha: Weight $\alpha$ of the momentum targets, in [0, 1].
        reduction: `"mean"`, `"sum"` or `"none"`, over rows.
        key_reduction: `"sum"` as in SigLIP, where more keys make a larger loss, or `"mean"` over the pairs of a row:
            for beside other losses, or with a queue that fills.
        normalize: L2-normalise query and keys here (True), only the query (`"query"`: the keys, every part
            of them, are unit rows as a `ClassQueue` stores them), or neither (False).
        ignore_index: Label of a row or key that is absent.
        exclude_self: The keys, or their first part, are the batch itself, and no row is its own key.
        group: Whose rows the sums and means run over: `"auto"`, None (this process) or a process group, as in
            `SupConDistillLoss`.
        validate: Also check tensor values at every call; makes the host wait for the device.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range or a choice is unknown.

    Example:
        >>> import torch
        >>> loss_fn = SigmoidDistillLoss(alpha=0.4)
        >>> text, audio = torch.eye(2), torch.eye(2).flip(0).requires_grad_()
        >>> samples = torch.arange(2)  # each matches itself alone
        >>> loss = loss_fn(audio, text, samples, samples, momentum_query=text, momentum_keys=text)
        >>> loss.shape, float(loss_fn.temperature), loss_fn.bias.item()
        (torch.Size([]), 0.1, -10.0)

    References:
        SigLIP (Zhai et al., 2023, arXiv:2303.15343).
    """

    undecayed: ClassVar[tuple[str, ...]] = ("log_temperature_ratio", "bias")
    """Learned scalars, for `param_groups`."""

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        learnable_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.001, 10.0),
        bias: float = -10.0,
        learnable_bias: bool = True,
        alpha: float = 0.4,
        reduction: Reduction = "mean",
        key_reduction: KeyReduction = "sum",
        normalize: Normalize = True,
        ignore_index: int = -1,
        exclude_self: bool = False,
        group: Group = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__(temperature, temperature_range, learnable=learnable_temperature)
        check_number("bias", bias, low=-torch.inf)
        check_bool("learnable_bias", learnable_bias)
        check_number("alpha", alpha, low=0.0, high=1.0)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("key_reduction", key_reduction, KEY_REDUCTIONS)
        check_normalize(normalize)
        check_int("ignore_index", ignore_index)
        check_bool("exclude_self", exclude_self)
        check_group(group)
        check_bool("validate", validate)
        start = torch.tensor(float(bias), dtype=torch.float32)
        self.bias: nn.Parameter = nn.Parameter(start, requires_grad=learnable_bias)
        self._watch_bias = IdleWatch("the bias of SigmoidDistillLoss", patience=500)
        self._students = StudentWatch("neither query nor keys requires a gradient")
        self.alpha: float = float(alpha)
        self.reduction: Reduction = reduction
        self.key_reduction: KeyReduction = key_reduction
        self.normalize: Normalize = normalize
        self.ignore_index = ignore_index
        self.exclude_self = exclude_self
        self.group = group
        self.validate = validate

    @override
    def forward(
        self,
        query: Tensor,
        keys: Parts,
        query_labels: Tensor,
        key_labels: Parts,
        *,
        momentum_query: Tensor | None = None,
        momentum_keys: Parts | None = None,
        alpha: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of one direction.

        Args:
            query: Features of the batch, shape `(N, d)`.
            keys: Features to compare with, shape `(Q, d)`, or a tuple of parts taken as concatenated (the keys of the
                batch, then a queue); gradient is computed only for the parts that require it.
            query_labels: Integer, shape `(N,)`: class of at least 0, `ignore_index` (absent) or -2 (unlabelled).
            key_labels: Integer, shape `(Q,)`, a tuple of parts where `keys` is one.
            momentum_query: The query from the momentum model, shape `(N, d)`. Together with `momentum_keys`.
            momentum_keys: Keys that stand for the same samples as `keys`, shape `(Q, d)`, in parts like `keys`.
            alpha: Overrides the weight of the momentum targets for this call: a number in [0, 1] or a tensor of shape
                `()`. 0 gives the supervised part alone, 1 the KL part.

        Returns:
            The loss in nats, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If a shape, device or label is wrong, or only one momentum input is given.

        Warns:
            UserWarning: Once, if in training mode neither query nor keys requires a gradient: student and teacher, or
                momentum model, may be swapped.

        Example:
            >>> import torch
            >>> loss_fn = SigmoidDistillLoss(temperature=1.0, bias=0.0, key_reduction="mean")
            >>> audio, text, labels = torch.eye(2).requires_grad_(), torch.eye(2), torch.arange(2)
            >>> past, past_labels = torch.eye(2), torch.tensor([0, -1])  # its second slot is empty
            >>> loss = loss_fn(audio, (text, past), labels, (labels, past_labels))
            >>> f"{loss.item():.4f}"
            '0.5032'
        """
        features = (query, keys, momentum_query, momentum_keys)
        loss = functional.sigmoid_distill_loss(
            query,
            keys,
            query_labels,
            key_labels,
            temperature=self._temperature(*features),
            bias=self._bias(),
            momentum_query=momentum_query,
            momentum_keys=momentum_keys,
            alpha=self.alpha if alpha is None else alpha,
            reduction=self.reduction,
            key_reduction=self.key_reduction,
            normalize=self.normalize,
            ignore_index=self.ignore_index,
            exclude_self=self.exclude_self,
            group=self.group,
            validate=self.validate,
        )
        self._students.look(self, query, keys)
        return loss

    def _bias(self) -> Tensor:
        """The bias, watched where it is our parameter."""
        if isinstance(self.bias, nn.Parameter) and not in_transform():
            self._watch_bias.look(self.bias)
            self._watch_bias.left(self.bias)
        return self.bias

    @override
    def get_extra_state(self) -> Tensor:
        """The initial temperature, without which the saved ratio means nothing."""
        return torch.tensor(self.initial_temperature, dtype=torch.float64, device="cpu")

    @override
    def set_extra_state(self, state: Tensor) -> None:
        self.initial_temperature: float = float(state)

    @override
    def extra_repr(self) -> str:
        bias = f"{self.bias.item():g}" if has_numbers(self.bias) else "?"
        return (
            f"temperature={self._describe_temperature()}, "
            f"bias={bias} ({'learned' if self.bias.requires_grad else 'fixed'}), alpha={self.alpha:g}, "
            f"reduction={self.reduction!r}, key_reduction={self.key_reduction!r}, normalize={self.normalize!r}, "
            f"ignore_index={self.ignore_index}, exclude_self={self.exclude_self}, group={describe_group(self.group)}"
        )
