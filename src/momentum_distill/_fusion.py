"""Fusion weights that are learned and move smoothly."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from momentum_distill._checks import (
    check_floating,
    check_names,
    check_number,
    check_shape,
    describe,
    wrong_type,
    wrong_value,
)
from momentum_distill._precision import WideModule, default_wide
from momentum_distill._watch import IdleWatch, UpdateWatch
from momentum_distill.functional import lerp_, straight_through

NEVER_UPDATED = (
    "the weight of MomentumFusionFactors has changed before each of {} calls and its average never followed: call "
    "update() after each optimizer step, or pass decay=1.0 if the factors are to stay as they are"
)


class MomentumFusionFactors(WideModule):
    r"""One learnable weight per modality; what multiplies the features is its moving average (Eq. 12).

    $$F_f' = \mathrm{concat}_u(\bar w_u F_u), \qquad \bar w_u \leftarrow \eta\,\bar w_u + (1-\eta)\,w_u$$

    The forward pass uses $\bar w_u$ while the gradient goes to $w_u$ (straight through). Call :meth:`update` after each
    optimizer step; a warning, once, tells of weights that have changed before 100 calls while nobody did.

    Args:
        modalities: Names, each once, in a fixed order.
        init: First value of every factor, any finite number, or a mapping from name to value. Paper: 1.
        decay: Share $\eta$ that the average keeps at an update, in [0, 1]; 0 copies the weights. Paper: 0.995.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there is no name, a name twice, or a number out of its range.

    Example:
        >>> import torch
        >>> fuse = MomentumFusionFactors(["text", "audio"])
        >>> weighted = fuse({"text": torch.ones(2, 3), "audio": torch.ones(2, 3)})
        >>> fuse.update()
        >>> fuse.factors()
        {'text': 1.0, 'audio': 1.0}

    References:
        MTMD (Lin and Hu, 2023), Eq. 12, Fig. 4 and Fig. 7.
    """

    average: Tensor

    undecayed: ClassVar[tuple[str, ...]] = ("weight",)
    """Learned scalars, for `param_groups`."""

    def __init__(
        self, modalities: Sequence[str], *, init: float | Mapping[str, float] = 1.0, decay: float = 0.995
    ) -> None:
        super().__init__()
        if isinstance(modalities, str) or not isinstance(modalities, Sequence):
            wrong_type("modalities", "a sequence of names", describe(modalities))
        for name in modalities:
            if not isinstance(name, str):
                wrong_type("modalities", "names that are strings", describe(name))
        if not modalities or len(set(modalities)) < len(modalities):
            wrong_value("modalities", "at least one name, each once", describe(list(modalities)))
        check_number("decay", decay, low=0.0, high=1.0)
        self.modalities: tuple[str, ...] = tuple(modalities)
        self.decay: float = float(decay)
        if not isinstance(init, Mapping):
            init = dict.fromkeys(self.modalities, init)
        check_names("init", init, self.modalities)
        for value in init.values():
            check_number("init", value, low=-math.inf)
        first = torch.tensor([float(init[name]) for name in self.modalities], dtype=default_wide())
        self.weight: nn.Parameter = nn.Parameter(first)
        self._watch = IdleWatch("the weight of MomentumFusionFactors", patience=100)
        self._updates = UpdateWatch(NEVER_UPDATED, patience=100)
        if self.decay == 1:
            self._updates.stop()
        self.register_buffer("average", self.weight.detach().clone())

    @override
    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply each modality's features by its factor.

        Args:
            features: `{name: (N, d)}` with exactly the modalities; the widths may differ.

        Returns:
            `{name: (N, d)}` in the order of `modalities`, in the dtype of the features.

        Raises:
            TypeError: If `features` is not a mapping, or an entry not a floating tensor.
            ValueError: If the names are not the modalities, an entry is not a matrix, or their N differ.

        Example:
            >>> import torch
            >>> fuse = MomentumFusionFactors(["text", "audio"], init={"text": 2.0, "audio": 1.0})
            >>> fuse({"text": torch.ones(1, 3), "audio": torch.ones(1, 2)})["text"].tolist()
            [[2.0, 2.0, 2.0]]
        """
        if not isinstance(features, Mapping):
            wrong_type("features", "a mapping from name to tensor", describe(features))
        check_names("features", features, self.modalities)
        for name in self.modalities:
            check_floating(f"features[{name!r}]", features[name], shape=("N", "d"), like=("the factors", self.weight))
        self._updates.look([self.weight] if self.weight.requires_grad else [])  # an average of these has its own update
        rows = features[self.modalities[0]].shape[0]
        factors = straight_through(self.average, self.weight).unbind()
        weighted = {}
        for name, factor in zip(self.modalities, factors, strict=True):
            check_shape(f"features[{name!r}]", features[name], (rows, features[name].shape[1]))
            # In the wider of both dtypes: the factor's gradient is a sum over all numbers, lost in 16 bits.
            wide = torch.promote_types(features[name].dtype, factor.dtype)
            weighted[name] = (features[name].to(wide) * factor).to(features[name].dtype)
        return weighted

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the learned weights (Eq. 6); call it after the optimizer step.

        Example:
            >>> import torch
            >>> fuse = MomentumFusionFactors(["text"], decay=0.75)
            >>> _ = torch.nn.init.zeros_(fuse.weight)  # stands for optimizer.step()
            >>> fuse.update()
            >>> fuse.factors()
            {'text': 0.75}
        """
        self._watch.look(self.weight)
        self._watch.left(self.weight)
        self._updates.stop()
        lerp_([self.average], [self.weight.to(self.average)], self.decay)

    def factors(self) -> dict[str, float]:
        """The factors in use, by modality (Fig. 7). Makes the host wait for the device.

        Example:
            >>> MomentumFusionFactors(["text", "audio"], init=0.5).factors()
            {'text': 0.5, 'audio': 0.5}
        """
        return dict(zip(self.modalities, self.average.tolist(), strict=True))

    @override
    def get_extra_state(self) -> Tensor:
        """The names, in whose order the weights stand."""
        return torch.tensor(list(json.dumps(self.modalities).encode()), dtype=torch.uint8, device="cpu")

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is to be set: what has other names was refused."""

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())  # older states have none
        if (names := tuple(json.loads(bytes(saved.tolist())))) != self.modalities:
            wrong_value("state_dict", f"modalities {list(self.modalities)}", str(list(names)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @override
    def extra_repr(self) -> str:
        return f"modalities={list(self.modalities)}, decay={self.decay:g}"
