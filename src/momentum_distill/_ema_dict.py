"""Several moving averages of one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from typing_extensions import override

from momentum_distill._checks import check_module, check_number, describe, wrong_type, wrong_value
from momentum_distill._ema import Decay, EMAWrapper, M_co
from momentum_distill._ema_pairs import Buffers
from momentum_distill._ema_plan import JointPlan
from momentum_distill._typing import TypedModule


class EMADict(TypedModule, Generic[M_co]):
    r"""Several averages of one module by name, each an `EMAWrapper`, moved in one pass over its weights.

    $$\theta_{ema}^{(k)} \leftarrow \eta^{(k)}\,\theta_{ema}^{(k)} + (1-\eta^{(k)})\,\theta_{online}$$

    All are of the whole module: two encoders need no two averages, but one module that holds both.

    What one of them does is asked of `averages["fast"]`: its output, `swap`, `copy_to`, `module`. Its state is part of
    this one's under `averages.fast.`, as `EMAWrapper` has it, and each goes on with its own count and schedule.

    Args:
        model: The online module.
        decays: A decay of each average by its name: a number in [0, 1], a schedule or another function, as for
            `EMAWrapper`. A name is one that an attribute could have.
        buffers: `"copy"`, `"ema"`, `"frozen"` or names. All averages have it as an `EMAWrapper` would, as what follows.
        dtype: Floating dtype of the averages, 32 bits or more.
        device: Where they live.
        mode: `"eval"` or `"train"`.
        hooks: `"drop"` or `"keep"`.
        share_frozen: Whether all averages share with the model what is frozen in it.

    Raises:
        TypeError: If an argument has the wrong type, or as for `EMAWrapper`. A model that cannot be deep-copied needs
            an `EMAWrapper` with a `teacher` for each average.
        ValueError: If there is no average, a name cannot be one or a decay is out of range, or as for `EMAWrapper`.

    Example:
        >>> import momentum_distill as md
        >>> model = torch.nn.Linear(2, 2)
        >>> averages = md.EMADict(model, {"fast": 0.9, "slow": md.schedules.Cosine(1000)})
        >>> averages.update(model)  # after optimizer.step()
        >>> sorted(averages(torch.ones(1, 2)))
        ['fast', 'slow']
        >>> with averages["slow"].swap(model):  # evaluate `model` with the slow one
        ...     _ = model(torch.ones(1, 2))

    References:
        MTMD (Lin and Hu, 2023), Eq. 6, for each.
    """

    averages: nn.ModuleDict
    """The averages by name."""

    def __init__(
        self,
        model: M_co,
        decays: Mapping[str, Decay],
        *,
        buffers: Buffers = "copy",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mode: Literal["eval", "train"] = "eval",
        hooks: Literal["drop", "keep"] = "drop",
        share_frozen: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(decays, Mapping):
            wrong_type("decays", "a mapping from names to decays", describe(decays))
        if not decays:
            wrong_value("decays", "at least one name", "none")
        for name, decay in decays.items():
            if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
                wrong_value("decays", "names that an attribute could have", describe(name))
            if not callable(decay):
                check_number(f"decays[{name!r}]", decay, low=0.0, high=1.0)
        self.averages = nn.ModuleDict(
            {
                name: EMAWrapper(
                    model,
                    decay=decay,
                    buffers=buffers,
                    dtype=dtype,
                    device=device,
                    mode=mode,
                    hooks=hooks,
                    share_frozen=share_frozen,
                )
                for name, decay in decays.items()
            }
        )
        self._plans: WeakKeyDictionary[nn.Module, JointPlan] = WeakKeyDictionary()

    def __getitem__(self, name: str) -> EMAWrapper[M_co]:
        return self.averages[name]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.averages)

    def __len__(self) -> int:
        return len(self.averages)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What each average returns, by name, without gradient.

        Args:
            *args: Passed to each averaged module.
            **kwargs: Passed to each averaged module.

        Returns:
            A dictionary.

        Example:
            >>> averages = EMADict(torch.nn.Linear(3, 2), {"fast": 0.9, "slow": 0.99})
            >>> {name: output.shape for name, output in averages(torch.ones(4, 3)).items()}
            {'fast': torch.Size([4, 2]), 'slow': torch.Size([4, 2])}
        """
        return {name: average(*args, **kwargs) for name, average in self.averages.items()}

    @torch.inference_mode()
    def update(self, model: nn.Module, *, decay: float | None = None) -> None:
        """Move every average one step towards `model`; call it once after each optimizer step.

        Args:
            model: The online module, as for `EMAWrapper.update`.
            decay: Overrides all decays for this update, in [0, 1]; 0 copies.

        Raises:
            TypeError: As for `EMAWrapper.update`.
            ValueError: As for `EMAWrapper.update`; no average has moved then.
            RuntimeError: If called inside the `swap` of one of them.

        Example:
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.zeros_(model.weight)
            >>> averages = EMADict(model, {"fast": 0.5, "slow": 0.75})
            >>> _ = torch.nn.init.ones_(model.weight)  # stands for optimizer.step()
            >>> averages.update(model)
            >>> [averages[name].module.weight.item() for name in averages]
            [0.5, 0.25]
        """
        check_module("model", model)
        wrappers = [self[name] for name in self]
        decays = [wrapper._next_decay(decay) for wrapper in wrappers]
        self._match(model, wrappers).move(decays)
        for wrapper in wrappers:
            wrapper._count_update()

    def _match(self, model: nn.Module, wrappers: Sequence[EMAWrapper[Any]]) -> JointPlan:
        """The plan for `model`, made anew when the plan of one of the averages would be."""
        modules = [wrapper.module for wrapper in wrappers]
        plan = self._plans.get(model)
        if plan is not None:
            plan.reshard()
        if plan is None or plan.averages != modules or plan.behind or not plan.is_current():
            plans = [wrapper._match(model, follow=True) for wrapper in wrappers]
            plan = self._plans[model] = JointPlan(plans, modules, model)
        return plan

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": None}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._plans = WeakKeyDictionary()
