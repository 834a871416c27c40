"""The learned scalars of the blocks, and how they reach the optimizer."""

from typing import Any

from torch import nn

from momentum_distill._checks import check_module, check_number, wrong_value


def param_groups(*modules: nn.Module, weight_decay: float, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Parameters in two groups for an optimizer: with weight decay, and the learned scalars of the blocks without.

    Decay would pull a learned temperature towards its initial value and fusion factors towards 0, which nobody means by
    it. Parameters that do not require a gradient (averages, frozen layers) are left out, and each stands once.

    Args:
        *modules: Models and losses that are trained, at least one.
        weight_decay: Of everything that is not such a scalar, at least 0.
        **options: For both groups, say `lr=1e-3`.

    Returns:
        At most two groups, in the form that `torch.optim` takes; an empty one is left out.

    Raises:
        TypeError: If a module is not one, or `weight_decay` not a number.
        ValueError: If `weight_decay` is negative, or nothing requires a gradient.

    Example:
        >>> import torch
        >>> import momentum_distill as md
        >>> model, contrast = torch.nn.Linear(4, 2), md.SupConDistillLoss()
        >>> groups = md.param_groups(model, contrast, weight_decay=0.01, lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(2, 0.01), (1, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    for index, module in enumerate(modules):
        check_module(f"modules[{index}]", module)
    check_number("weight_decay", weight_decay, low=0.0)
    together = nn.ModuleList(modules)
    learned = [parameter for parameter in together.parameters() if parameter.requires_grad]
    if not learned:
        wrong_value("modules", "something that requires a gradient", "nothing")
    scalars = {
        id(parameter)
        for module in together.modules()
        for name in getattr(module, "undecayed", ())
        if (parameter := getattr(module, name)) is not None
    }
    groups = [
        {"params": [p for p in learned if (id(p) in scalars) == without], "weight_decay": decay, **options}
        for without, decay in ((False, float(weight_decay)), (True, 0.0))
    ]
    return [group for group in groups if group["params"]]
