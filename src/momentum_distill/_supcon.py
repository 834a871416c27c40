"""Feature-based distillation: the supervised contrastive loss with momentum targets."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from typing_extensions import override

from momentum_distill import functional
from momentum_distill._checks import (
    COLDEST,
    HOTTEST,
    REDUCTIONS,
    check_bool,
    check_choice,
    check_int,
    check_number,
    in_transform,
)
from momentum_distill._contrast.arguments import Normalize, Parts, check_normalize, check_pairs
from momentum_distill._contrast.formulas import POSITIVES, Positives, PositivesFrom, Reduction
from momentum_distill._contrast.targets import TARGETS, Targets
from momentum_distill._group import Group, check_group, describe_group, errors_shared_by_sum, find_ranks
from momentum_distill._precision import sum_dtype
from momentum_distill._temperature import TemperatureModule
from momentum_distill._watch import StudentWatch
from momentum_distill.functional import SupConTerms

Answer = TypeVar("Answer", Tensor, SupConTerms)

Inputs: TypeAlias = tuple[Tensor, Parts, Tensor, Parts, Tensor | None, Parts | None, Tensor | None, Parts | None]
"""Query, keys and the labels of both; the momentum model's query and keys; the targets of both."""


class SupConDistillLoss(TemperatureModule):
    r"""Draw each row to the keys of its class and to the similarities its momentum model sees (Eq. 8, 9, 11).

    $$\mathcal L_i = (1-\alpha)\,\mathcal S_i + \alpha\,\mathrm{KL}(U_i \,\Vert\, V_i), \qquad
      \mathcal S_i = -\frac{1}{K_i} \sum_{j : c_j = c_i} \log V_{ij}$$
    $$V_i = \mathrm{softmax}_j(\bar q_i^\top \bar k_j / \tau), \qquad
      U_i = \mathrm{softmax}_j(\bar q_i'^\top \bar k_j' / \tau' + b_j)$$

    This is one direction. For a teacher modality t and a student modality u the paper averages two: query $F_t$
    against the keys of u, and query $F_u$ against the keys of t (`docs/quickstart.md` shows both). The mathematics,
    and what happens to ignored, unlabelled and positive-less rows, stands in
    :func:`momentum_distill.functional.supcon_distill_loss`.

    Gradient goes wherever the inputs require it, into a teacher's features too: detach what should stand still.

    The loss owns one parameter, the learned temperature: give `loss_fn.parameters()` to the optimizer, best without
    weight decay.

    Args:
        temperature: $\tau$ at the start, inside `temperature_range`. Paper: 0.1 to 0.9.
        learnable_temperature: Learn $\tau$ (as in the paper), or keep it fixed.
        temperature_range: Smallest and largest $\tau$. A learned one that an optimizer step took outside is brought
            back to the border, in place, at the next call.
        momentum_temperature: $\tau'$ inside $U$: None (the paper: $\tau$, without gradient), a positive number, or a
            function that returns one for the number of calls so far, for a warm-up. Counted are calls in training
            mode with gradients enabled; where several make an optimizer step (two directions, say), these are more
            than the steps. The count is part of the state, and 0 after loading one from before there was any. The
            function runs between the graphs of `torch.compile`, so that `fullgraph=True` needs
            `momentum_temperature=torch.tensor(...)` in the call instead.
        alpha: Weight $\alpha$ of the momentum targets, in [0, 1]. Paper: 0.2 to 0.6.
        momentum_targets: `"softmax"` (the paper: all $b_j = 0$), `"centred"` (DINO: $b_j$ takes the mean momentum logit
            of key j away, by a running mean that this loss keeps) or `"sinkhorn"` (SwAV, DINOv2: all keys get nearly
            the same share of $U$). A centre is of one direction: give each a loss of its own. It is updated after each
            call that counts as above, outside of the transforms of `torch.func`, and a batch is centred by what came
            before it.
            Sinkhorn-Knopp makes the loss take about three times as long, and holds a copy of the keys in float32.
        positives: `"outside"`, `"inside"` or `"inside_per_positive"`: how Eq. 8, 9 and 22 are read.
        positives_from: What makes a key positive: `"labels"` (its class); or, from the targets that the call is given,
            `"distance"` (scores of a regression, shape `(N,)`), `"overlap"` (several labels, or soft ones, shape
            `(N, C)`) or a function of them.
        width: For `"distance"`, positive, in the unit of the targets: the standard deviation of the Gaussian by which
            keys weigh.
        hardness: How much the similarity of a negative adds to its weight, at least 0; 0: nothing.
        reduction: `"mean"`, `"sum"` or `"none"`.
        normalize: L2-normalise query and keys here (True), only the query (`"query"`: the keys, every part
            of them, are unit rows as a `ClassQueue` stores them), or neither (False).
        ignore_index: Label of a row or key that is absent. A padded read of a `ClassQueue` marks empty slots with -1.
        exclude_self: The keys, or their first part, are the batch itself, and no row is its own key: the loss of
            SupCon. Otherwise a row that is among the keys counts as its own positive.
        group: Whose rows the sums and means run over: `"auto"` (torch.distributed's default group where there is one,
            else this process), None (this process) or a process group. Then the value is that of the whole batch, the
            same bits on every rank, and gradients after DDP's averaging are those of one process.
        validate: Also check tensor values at every call, labels on an accelerator too (on the CPU they always are);
            makes the host wait for the device.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range or a choice is unknown, or choices do not go together.

    Example:
        >>> import torch
        >>> loss_fn = SupConDistillLoss(temperature=0.5, alpha=0.4)
        >>> text, audio = torch.eye(2), torch.eye(2).flip(0).requires_grad_()
        >>> labels = torch.tensor([0, 1])
        >>> loss = loss_fn(audio, text, labels, labels, momentum_query=text, momentum_keys=text)
        >>> loss.shape, float(loss_fn.temperature)
        (torch.Size([]), 0.5)
        >>> warm_up = lambda call: min(0.04 + call * 1e-4, 0.07)  # named, it could be pickled
        >>> dino = SupConDistillLoss(
        ...     temperature=0.1, momentum_temperature=warm_up, momentum_targets="centred"
        ... )

    References:
        MTMD (Lin and Hu, 2023), Eq. 8, 9, 11, 22 and 23; SupCon (Khosla et al., 2020). How the paper is read:
        `docs/paper_map.md`. Targets: DINO (Caron et al., 2021), SwAV (Caron et al., 2020), DINOv2 (Oquab et al., 2023).
    """

    undecayed: ClassVar[tuple[str, ...]] = ("log_temperature_ratio",)
    """Learned scalars, for `param_groups`."""

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        learnable_temperature: bool = True,
        temperature_range: tuple[float, float] = (0.01, 10.0),
        momentum_temperature: float | Callable[[int], float] | None = None,
        alpha: float = 0.4,
        momentum_targets: Targets = "softmax",
        positives: Positives = "outside",
        positives_from: PositivesFrom = "labels",
        width: float | None = None,
        hardness: float = 0.0,
        reduction: Reduction = "mean",
        normalize: Normalize = True,
        ignore_index: int = -1,
        exclude_self: bool = False,
        group: Group = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__(temperature, temperature_range, learnable=learnable_temperature)
        if momentum_temperature is not None and not callable(momentum_temperature):
            check_number("momentum_temperature", momentum_temperature, low=COLDEST, high=HOTTEST)
        check_number("alpha", alpha, low=0.0, high=1.0)
        check_choice("momentum_targets", momentum_targets, TARGETS)
        check_choice("positives", positives, POSITIVES)
        check_choice("reduction", reduction, REDUCTIONS)
        check_normalize(normalize)
        check_int("ignore_index", ignore_index)
        check_bool("exclude_self", exclude_self)
        check_pairs(positives_from, width, hardness, positives)
        check_group(group)
        check_bool("validate", validate)
        self._students = StudentWatch("neither query nor keys requires a gradient")
        self.momentum_temperature = momentum_temperature
        # That train, where momentum_temperature is a function of them; a compiler would take a number for a constant.
        self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        self.alpha: float = float(alpha)
        self.momentum_targets: Targets = momentum_targets
        # As wide as the features turn out to be, with momentum_targets="centred".
        self.centre: Tensor | None
        self.register_buffer("centre", None)
        self.positives: Positives = positives
        self.positives_from: PositivesFrom = positives_from
        self.width = width
        self.hardness = hardness
        self.reduction: Reduction = reduction
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
        query_targets: Tensor | None = None,
        key_targets: Parts | None = None,
        momentum_temperature: float | Tensor | None = None,
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
            query_targets: What `positives_from` reads of the rows, floating, shape `(N,)` or `(N, C)`.
            key_targets: The same of the keys, shape `(Q,)` or `(Q, C)`, in parts like `keys`.
            momentum_temperature: Overrides the temperature inside $U$ for this call: a positive number or a tensor of
                shape `()`.
            alpha: Overrides the weight of the momentum targets for this call (a ramp, say): a number in [0, 1] or a
                tensor of shape `()`.

        Returns:
            The loss in nats, shape `()`, or `(N,)` with `reduction="none"`; float32 or wider.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If a shape, device or label is wrong, only one momentum input is given, or the function
                `momentum_temperature` returns no positive number.

        Warns:
            UserWarning: Once, if in training mode neither query nor keys requires a gradient: student and teacher, or
                momentum model, may be swapped.

        Example:
            >>> import torch
            >>> loss_fn = SupConDistillLoss(temperature=1.0)
            >>> audio, text, labels = torch.eye(2).requires_grad_(), torch.eye(2), torch.arange(2)
            >>> past, past_labels = torch.eye(2), torch.tensor([0, -1])  # its second slot is empty
            >>> loss = loss_fn(audio, (text, past), labels, (labels, past_labels))
            >>> f"{loss.item():.4f}"
            '0.7067'
        """
        inputs = (query, keys, query_labels, key_labels, momentum_query, momentum_keys, query_targets, key_targets)
        return self._call(functional.supcon_distill_loss, inputs, momentum_temperature, alpha)

    def terms(
        self,
        query: Tensor,
        keys: Parts,
        query_labels: Tensor,
        key_labels: Parts,
        *,
        momentum_query: Tensor | None = None,
        momentum_keys: Parts | None = None,
        query_targets: Tensor | None = None,
        key_targets: Parts | None = None,
        momentum_temperature: float | Tensor | None = None,
        alpha: float | Tensor | None = None,
    ) -> SupConTerms:
        """The loss with its parts; arguments as in the call.

        Returns:
            `total`, `supervised` (modality-shared), `distill` (modality-specific), `rows`, `rows_with_positive`.

        Example:
            >>> import torch
            >>> loss_fn = SupConDistillLoss().eval()
            >>> terms = loss_fn.terms(
            ...     torch.eye(2), torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 2])
            ... )
            >>> int(terms.rows), int(terms.rows_with_positive)
            (2, 1)
        """
        inputs = (query, keys, query_labels, key_labels, momentum_query, momentum_keys, query_targets, key_targets)
        return self._call(functional.supcon_distill_terms, inputs, momentum_temperature, alpha)

    def _call(
        self,
        function: Callable[..., Answer],
        inputs: Inputs,
        momentum_temperature: float | Tensor | None,
        alpha: float | Tensor | None,
    ) -> Answer:
        """One of the two functions, with the settings, and what is to follow a call."""
        query, keys, query_labels, key_labels, momentum_query, momentum_keys, query_targets, key_targets = inputs
        inside = self._inside(momentum_temperature)
        centre = self.centre if self.momentum_targets == "centred" else None
        if centre is not None and isinstance(query, Tensor) and centre.device != query.device:
            self.centre = centre = centre.to(query.device)  # of a state that was loaded where there is no parameter
        with self._errors_shared_by_centre(query, momentum_query):
            answer = function(
                query,
                keys,
                query_labels,
                key_labels,
                temperature=self._temperature(query, keys, momentum_query, momentum_keys),
                momentum_query=momentum_query,
                momentum_keys=momentum_keys,
                query_targets=query_targets,
                key_targets=key_targets,
                momentum_temperature=inside,
                momentum_targets=self.momentum_targets,
                centre=centre,
                alpha=self.alpha if alpha is None else alpha,
                positives=self.positives,
                positives_from=self.positives_from,
                width=self.width,
                hardness=self.hardness,
                reduction=self.reduction,
                normalize=self.normalize,
                ignore_index=self.ignore_index,
                exclude_self=self.exclude_self,
                group=self.group,
                validate=self.validate,
            )
        self._learned(query, keys, momentum_query, query_labels)
        return answer

    def _errors_shared_by_centre(self, query: object, momentum_query: object) -> AbstractContextManager[None]:
        """Row by row the loss makes no sum over the ranks, in which they would learn of an error; the centre does."""
        moves = self._trains() and self.momentum_targets == "centred" and momentum_query is not None
        ranks = find_ranks(self.group) if moves and self.reduction == "none" else None
        width = query.shape[-1] if isinstance(query, Tensor) and query.ndim else 0
        return errors_shared_by_sum(ranks, query, slots=width + 1)

    def _trains(self) -> bool:
        """Whether a call is one of training."""
        return self.training and torch.is_grad_enabled() and not in_transform()

    def _inside(self, momentum_temperature: float | Tensor | None) -> float | Tensor | None:
        """The temperature inside U; None for that of V."""
        if momentum_temperature is not None:
            return momentum_temperature
        if not callable(self.momentum_temperature):
            return self.momentum_temperature
        if not torch.compiler.is_compiling():
            return self._scheduled()
        return self._scheduled_outside_graphs()

    def _scheduled(self) -> float:
        """What the function says of the calls so far."""
        assert callable(self.momentum_temperature)
        value = self.momentum_temperature(int(self._calls))
        check_number("momentum_temperature", value, low=COLDEST, high=HOTTEST)
        return float(value)

    @_disable_dynamo  # torch.compiler.disable would load the compiler, seconds, with this module
    def _scheduled_outside_graphs(self) -> Tensor:
        """The same, of which a compiler would make a constant."""
        return torch.tensor(self._scheduled(), dtype=torch.float64, device="cpu")

    def _learned(self, query: Tensor, keys: Parts, momentum_query: Tensor | None, query_labels: Tensor) -> None:
        """After a call that went well, if it trains."""
        self._students.look(self, query, keys)
        if not self._trains():
            return
        if callable(self.momentum_temperature):
            self._calls = self._calls + 1
        if self.momentum_targets == "centred" and momentum_query is not None:
            if self.centre is None:
                self.centre = momentum_query.new_zeros(momentum_query.shape[1], dtype=sum_dtype(momentum_query))
            functional.centre_update(
                self.centre,
                momentum_query,
                query_labels,
                normalize=bool(self.normalize),
                ignore_index=self.ignore_index,
                group=self.group,
            )

    @override
    def get_extra_state(self) -> Tensor:
        """The initial temperature, without which the saved ratio means nothing; with a warm-up the calls so far."""
        state = [self.initial_temperature, int(self._calls)]
        return torch.tensor(
            state if callable(self.momentum_temperature) else state[0], dtype=torch.float64, device="cpu"
        )

    @override
    def set_extra_state(self, state: Tensor) -> None:
        initial, *calls = state.flatten().tolist()
        self.initial_temperature: float = initial
        self._calls = torch.tensor(int(calls[0]) if calls else 0, device="cpu")

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A centre of any width, or of none: that of a loss that has not been trained."""
        if self.momentum_targets == "centred" and f"{prefix}_extra_state" in state_dict:  # else this loss has no part
            centre = state_dict.get(f"{prefix}centre")
            home = self.log_temperature_ratio
            device = None if home is None else home.device
            self.centre = None if centre is None else torch.empty_like(centre, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def extra_repr(self) -> str:
        pairs = "" if self.positives_from == "labels" else f"positives_from={self.positives_from!r}, "
        pairs += "" if self.width is None else f"width={self.width:g}, "
        pairs += f"hardness={self.hardness:g}, " if self.hardness else ""
        given = self.momentum_temperature
        inside = "" if given is None else f"momentum_temperature={given if callable(given) else f'{given:g}'}, "
        targets = "" if self.momentum_targets == "softmax" else f"momentum_targets={self.momentum_targets!r}, "
        return (
            f"temperature={self._describe_temperature()}, {inside}alpha={self.alpha:g}, {targets}"
            f"positives={self.positives!r}, {pairs}reduction={self.reduction!r}, "
            f"normalize={self.normalize!r}, ignore_index={self.ignore_index}, "
            f"exclude_self={self.exclude_self}, group={describe_group(self.group)}"
        )
