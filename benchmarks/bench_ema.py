"""EMAWrapper: one update, and swapping the averaged weights in and out, against other libraries' averages.

    python benchmarks/bench_ema.py            both models, a minute; 6 GiB
    python benchmarks/bench_ema.py --full     the same, more rounds

Then, in a file of its own (block "averages"): EMADict against an EMAWrapper for each of its averages, an update whose
decay is a schedule against one whose decay is a number, and averages of a model of which little is trained.

Where little is trained, each average is compared with Eq. 6 after an update, and with adapters it is weighed: the
memory that is its own and not the model's.

An update reads two numbers per parameter and writes one, so the bound is three streams of four bytes at the bandwidth
of `add_` on arrays of 128 MB, timed in the same rounds. The small model fits into the cache and can be faster than
that. The bound of a swap is one copy of the parameters.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import momentum_distill as md
from common import MIB, Case, Check, Contender, Options, Run, import_part, parse_options, run_cases, write_results
from momentum_distill.schedules import Cosine, HalfLife, PowerFunction, Scaled, Schedule, WarmUp

DECAY = 0.995
TRIAD_ELEMENTS = 2**25  # float32: 128 MB per array


# ------------------------------------------------------------------------------------------------------- models


class BertLayer(nn.Module):
    """The sixteen tensors of a layer of BERT-base."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def bert_base() -> nn.Module:
    """Tensors like those of BERT-base: 199, with 109.5 M numbers."""
    embeddings = [nn.Embedding(30522, 768), nn.Embedding(512, 768), nn.Embedding(2, 768), nn.LayerNorm(768)]
    return nn.Sequential(*embeddings, nn.Sequential(*(BertLayer() for _ in range(12))), nn.Linear(768, 768))


def sequence_pair() -> nn.Module:
    """An audio and a vision branch of an MSA model, LSTM then Transformer: 100 tensors, 0.44 M numbers."""

    def branch(width: int, hidden: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, batch_first=True)
        transformer = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        heads = nn.ModuleList([nn.Linear(hidden, 128), nn.Linear(128, 1), nn.Linear(128, 3)])
        return nn.ModuleList([nn.LSTM(width, hidden, num_layers=2), transformer, heads])

    return nn.ModuleList([branch(33, 64), branch(64, 64)])


class Adapted(nn.Module):
    """A linear layer that is frozen, beside two small ones that are trained: LoRA of rank 8."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)


def adapted_bert() -> nn.Module:
    """BERT-base with adapters at queries and values: 199 tensors are frozen, 48 with 0.29 M numbers trained."""
    model = bert_base().requires_grad_(False)
    for layer in list(model.modules()):
        if isinstance(layer, BertLayer):
            layer.query, layer.value = Adapted(layer.query), Adapted(layer.value)
    return model


WITH_ADAPTERS = "adapters in a frozen BERT-base shape"
MODELS = {"LSTM+Transformer pair": sequence_pair, "BERT-base shape": bert_base, WITH_ADAPTERS: adapted_bert}


@functools.lru_cache(maxsize=1)
def online_model(model: str, device: str, dtype: str = "float32") -> nn.Module:
    """The same for all contenders of a case."""
    torch.manual_seed(0)
    return MODELS[model]().to(device, getattr(torch, dtype))


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


@functools.cache
def count(model: str) -> int:
    """The numbers that are trained."""
    with torch.device("meta"):
        weights = MODELS[model]().parameters()
    return sum(weight.numel() for weight in weights if weight.requires_grad)


# ------------------------------------------------------------------------------------------------------- update

Average = nn.Module | list[Tensor]


def updating(update: Callable[[], object], average: Average) -> Run:
    """A run that returns what is averaged, for the check."""

    def run() -> Average:
        update()
        return average

    return run


def build_triad(*, device: str, **_: str) -> Run:
    written, read = torch.ones(TRIAD_ELEMENTS, device=device), torch.ones(TRIAD_ELEMENTS, device=device)
    return lambda: written.add_(read, alpha=1e-9)


def reckon_triad(seconds: float, *, model: str, **_: str) -> float:
    return seconds * count(model) / TRIAD_ELEMENTS


def build_ours(model: str, device: str, *, decay: float | Schedule = DECAY, share_frozen: bool = False) -> Run:
    online = online_model(model, device)
    ema = md.EMAWrapper(online, decay=decay, share_frozen=share_frozen)
    return updating(lambda: ema.update(online), ema.module)


def build_foreach(model: str, device: str) -> Run:
    weights = [weight for weight in online_model(model, device).parameters() if weight.requires_grad]
    new, old = [weight.detach() for weight in weights], [weight.detach().clone() for weight in weights]
    return updating(lambda: torch._foreach_lerp_(old, new, 1 - DECAY), old)


def build_flat(model: str, device: str) -> Run:
    new = torch.cat([parameter.detach().flatten() for parameter in online_model(model, device).parameters()])
    old = new.clone()
    return updating(lambda: old.lerp_(new, 1 - DECAY), [old])


def build_timm(version: str, model: str, device: str) -> Run:
    module = import_part("timm.utils.model_ema", bare=("timm", "timm.utils"))
    online = online_model(model, device)
    ema = getattr(module, f"ModelEma{version}")(online, decay=DECAY)
    return updating(lambda: ema.update(online), ema.module)


def build_averaged_model(function: str, model: str, device: str) -> Run:
    online = online_model(model, device)
    average = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY), "avg_fn": get_ema_avg_fn(DECAY)}[function]
    ema = AveragedModel(online, **{function: average})
    ema.update_parameters(online)  # the first one copies
    return updating(lambda: ema.update_parameters(online), ema.module)


def build_ema_pytorch(model: str, device: str, *, foreach: bool, ignore_frozen: bool = False) -> Run:
    from ema_pytorch import EMA

    options = {"update_after_step": -1, "update_every": 1, "include_online_model": False, "min_value": DECAY}
    online = online_model(model, device)
    frozen = {name for name, weight in online.named_parameters() if not weight.requires_grad}
    ema = EMA(online, beta=DECAY, use_foreach=foreach, ignore_names=frozen if ignore_frozen else set(), **options)
    ema.update()  # the first one copies
    return updating(ema.update, ema.ema_model)


def build_lightly(model: str, device: str) -> Run:
    module = import_part("lightly.models.utils", bare=("lightly.models",))
    online = online_model(model, device)
    average = frozen_copy(online)
    return updating(lambda: module.update_momentum(online, average, m=DECAY), average)


def build_albef(model: str, device: str) -> Run:
    """As ALBEF and MoCo do it: a loop that rebinds `.data`."""
    online = online_model(model, device)
    average = frozen_copy(online)

    def update() -> None:
        for new, old in zip(online.parameters(), average.parameters(), strict=True):
            old.data = old.data * DECAY + new.data * (1 - DECAY)

    return updating(update, average)


def check_average(contender: Contender, parameters: dict[str, Any], average: object) -> dict[str, Any]:
    """How far an update is from Eq. 6 where little is trained; with adapters, the MiB that are not the model's."""
    if contender.role == "bound":
        return {}
    online = online_model(parameters["model"], parameters["device"])  # as the contenders do, or it is another
    row: dict[str, Any] = {"average_error": None}
    if parameters["model"] == WITH_ADAPTERS:
        weights = list(average.parameters()) if isinstance(average, nn.Module) else average
        shared = {weight.untyped_storage().data_ptr() for weight in online.parameters()}
        own = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
        row["own_mib"] = sum(size for place, size in own.items() if place not in shared) / MIB
    if count(parameters["model"]) > 10**6 or contender is FLAT:
        return row
    learned = [weight for weight in online.parameters() if weight.requires_grad]
    kept = [weight.detach().clone() for weight in learned]
    run = contender.build(**parameters)
    with torch.no_grad():
        for weight in learned:
            weight.add_(torch.randn_like(weight))
    averaged = run()
    if isinstance(averaged, nn.Module):
        trained = [weight.requires_grad for weight in online.parameters()]
        averaged = [weight for weight, learns in zip(averaged.parameters(), trained, strict=True) if learns]
    with torch.no_grad():
        far = [
            (ours - (DECAY * old + (1 - DECAY) * new)).abs().max()
            for ours, old, new in zip(averaged, kept, learned, strict=True)
        ]
        for weight, old in zip(learned, kept, strict=True):
            weight.copy_(old)
    return row | {"average_error": float(torch.stack(far).max())}


FLAT = Contender("one flat lerp_", build_flat, role="reference")
UPDATE = (
    Contender("three streams at the bandwidth of add_", build_triad, role="bound", reckon=reckon_triad),
    Contender("momentum-distill", build_ours, role="ours"),
    Contender("torch._foreach_lerp_, lists cached", build_foreach, role="reference"),
    FLAT,
    Contender("timm ModelEmaV3", functools.partial(build_timm, "V3"), needs="timm"),
    Contender("timm ModelEmaV2", functools.partial(build_timm, "V2"), needs="timm"),
    Contender("torch AveragedModel, multi_avg_fn", functools.partial(build_averaged_model, "multi_avg_fn")),
    Contender("torch AveragedModel, avg_fn", functools.partial(build_averaged_model, "avg_fn")),
    Contender("ema-pytorch", functools.partial(build_ema_pytorch, foreach=False), needs="ema_pytorch"),
    Contender("ema-pytorch, foreach", functools.partial(build_ema_pytorch, foreach=True), needs="ema_pytorch"),
    Contender("lightly update_momentum", build_lightly, needs="lightly"),
    Contender("ALBEF / MoCo loop", build_albef, role="reference"),
)


# ------------------------------------------------------------------------------------------- several averages of one

DECAYS = {"fast": 0.99, "slow": 0.995, "slower": 0.999}


def reckon_several(seconds: float, *, model: str, dtype: str, **_: str) -> float:
    """Each average is read and written, the model read once."""
    streams = 2 * len(DECAYS) + getattr(torch, dtype).itemsize / 4
    return seconds * count(model) / TRIAD_ELEMENTS * streams / 3


def build_together(**parameters: str) -> Run:
    online = online_model(**parameters)
    averages = md.EMADict(online, DECAYS)
    return lambda: averages.update(online)


def build_apart(**parameters: str) -> Run:
    online = online_model(**parameters)
    averages = [md.EMAWrapper(online, decay=decay) for decay in DECAYS.values()]

    def run() -> None:
        for average in averages:
            average.update(online)

    return run


def build_foreach_each(**parameters: str) -> Run:
    new = [weight.detach() for weight in online_model(**parameters).parameters()]
    averages = [(decay, [weight.float().clone() for weight in new]) for decay in DECAYS.values()]

    def run() -> None:
        wide = [weight.float() for weight in new]
        for decay, old in averages:
            torch._foreach_lerp_(old, wide, 1 - decay)

    return run


SEVERAL = (
    Contender("two streams for each, one for the model", build_triad, role="bound", reckon=reckon_several),
    Contender("momentum-distill EMADict", build_together, role="ours"),
    Contender("momentum-distill, one EMAWrapper each", build_apart, role="reference"),
    Contender("torch._foreach_lerp_ each, lists cached", build_foreach_each, role="reference"),
)


# ---------------------------------------------------------------------------------------------------- schedules

SCHEDULES = {
    "PowerFunction": PowerFunction(0.1),
    "Cosine": Cosine(10**6, start=DECAY),
    "WarmUp": WarmUp(DECAY),
    "HalfLife": HalfLife(138),
    "Scaled": Scaled(DECAY, kappa=2),
}


SCHEDULED = (
    UPDATE[0],
    *(
        Contender(f"momentum-distill, {name}", functools.partial(build_ours, decay=decay), role="ours")
        for name, decay in SCHEDULES.items()
    ),
    Contender("momentum-distill, a number as decay", build_ours, role="reference"),
)


# ----------------------------------------------------------------------------------------------- little is trained

ADAPTERS = (
    Contender("three streams for what is trained", build_triad, role="bound", reckon=reckon_triad),
    Contender("momentum-distill, share_frozen=True", functools.partial(build_ours, share_frozen=True), role="ours"),
    Contender("momentum-distill, share_frozen=False", build_ours, role="reference"),
    Contender("torch._foreach_lerp_ of what is trained, lists cached", build_foreach, role="reference"),
    Contender("timm ModelEmaV3", functools.partial(build_timm, "V3"), needs="timm"),
    Contender("torch AveragedModel, multi_avg_fn", functools.partial(build_averaged_model, "multi_avg_fn")),
    Contender("ema-pytorch, foreach", functools.partial(build_ema_pytorch, foreach=True), needs="ema_pytorch"),
    Contender(
        "ema-pytorch, foreach, ignore_names",
        functools.partial(build_ema_pytorch, foreach=True, ignore_frozen=True),
        needs="ema_pytorch",
    ),
)


# --------------------------------------------------------------------------------------------------------- swap


def build_memcpy(model: str, device: str) -> Run:
    source = torch.cat([parameter.detach().flatten() for parameter in online_model(model, device).parameters()])
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def swapping(context: Callable[[], Any]) -> Run:
    """In and out again."""

    def run() -> None:
        with context():
            pass

    return run


def build_swap(model: str, device: str) -> Run:
    online = online_model(model, device)
    ema = md.EMAWrapper(online, decay=DECAY)
    return swapping(lambda: ema.swap(online))


@contextmanager
def store_copy_restore(new: list[Tensor], old: list[Tensor]) -> Iterator[None]:
    own = [parameter.clone() for parameter in new]
    for parameter, average in zip(new, old, strict=True):
        parameter.copy_(average)
    yield
    for parameter, value in zip(new, own, strict=True):
        parameter.copy_(value)


def build_store_copy_restore(model: str, device: str) -> Run:
    """As torch-ema's `average_parameters` and diffusers' `store`, `copy_to`, `restore` do it."""
    online = online_model(model, device)
    new, old = [p.detach() for p in online.parameters()], list(frozen_copy(online).parameters())
    return swapping(lambda: store_copy_restore(new, old))


@contextmanager
def exchange(new: list[Tensor], old: list[Tensor]) -> Iterator[None]:
    exchange_once(new, old)
    yield
    exchange_once(new, old)


def exchange_once(new: list[Tensor], old: list[Tensor]) -> None:
    for parameter, average in zip(new, old, strict=True):
        parameter.data, average.data = average.data, parameter.data


def build_exchange(model: str, device: str) -> Run:
    online = online_model(model, device)
    new, old = list(online.parameters()), list(frozen_copy(online).parameters())
    return swapping(lambda: exchange(new, old))


SWAP = (
    Contender("one copy of the parameters", build_memcpy, role="bound"),
    Contender("momentum-distill swap", build_swap, role="ours"),
    Contender("store, copy, restore (torch-ema, diffusers)", build_store_copy_restore, role="reference"),
    Contender("exchange of .data", build_exchange, role="reference"),
)


# --------------------------------------------------------------------------------------------------------- main


def make_cases(options: Options) -> list[Case]:
    models = list(MODELS)[: 1 if options.size == "quick" else 2]
    cases = []

    def add(what: str, contenders: tuple[Contender, ...], model: str, check: Check | None = None, **dtype: str) -> None:
        name = ", ".join((what, model, *dtype.values(), f"{count(model) / 1e6:.2f} M parameters"))
        cases.append(Case(name, contenders, {"model": model, "device": options.device, **dtype}, check))

    for model in models:
        add("update", UPDATE, model, check_average)
        add("swap", SWAP, model)
        add("update by a schedule", SCHEDULED, model)
        for dtype in ("float32", "bfloat16"):
            add("three averages", SEVERAL, model, dtype=dtype)
    if options.size != "quick":
        add("update", ADAPTERS, WITH_ADAPTERS, check_average)
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(__doc__ or "", arguments)
    cases = [case for case in make_cases(options) if options.cases.search(case.name)]
    for block, parts in (("ema", (UPDATE, SWAP)), ("averages", (SEVERAL, SCHEDULED, ADAPTERS))):
        of_block = [case for case in cases if case.contenders in parts]
        if of_block:
            write_results(block, *run_cases(of_block, options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
