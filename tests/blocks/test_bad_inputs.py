"""Bad calls over the whole public API: each ends in one clear error, and nothing has changed after it.

A case changes some arguments of a call that works. The error has to be a plain ValueError (shape, range, device,
choice, name) or TypeError (type, dtype) that reads ``argument: expected X, got Y``; parts of an argument may be named
too (``features['a']``, ``keys[1]``). What each says stands word for word in ``error_messages.json``, which
``python tests/pin.py`` writes.
"""

import inspect
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import momentum_distill as md
from loss_cases import numbers_alone
from momentum_distill import diagnostics, functional, schedules
from pinned import read

pytestmark = numbers_alone

V, T = ValueError, TypeError
EITHER = (ValueError, TypeError)  # where a value is wrong in type and in range alike
NAN, INF = math.nan, math.inf

MESSAGES = Path(__file__).with_name("error_messages.json")


def real(*shape, **kwargs):
    """A floating tensor that is the same every time."""
    n = math.prod(shape)
    return (torch.arange(n, dtype=torch.float32).reshape(shape) / (n + 1) + 0.1).to(**kwargs)


def ints(*shape, **kwargs):
    return torch.zeros(shape, dtype=torch.int64, **kwargs)


def bools(*shape, **kwargs):
    return torch.ones(shape, dtype=torch.bool, **kwargs)


def with_value(tensor, value):
    """The tensor, with one wrong value in its second row."""
    tensor = tensor.clone()
    tensor[1] = value
    return tensor


# ---------------------------------------------------------------------------------------------
# The calls, as they work
# ---------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call that works: what is called, with which arguments, and which modules it could disturb."""

    function: Any
    arguments: dict = field(default_factory=dict)
    watched: tuple = ()


def supcon_arguments():
    return {
        "query": real(4, 3),
        "keys": real(5, 3),
        "query_labels": ints(4),
        "key_labels": ints(5),
        "momentum_query": real(4, 3),
        "momentum_keys": real(5, 3),
    }


def supcon_function(function):
    return Call(function, supcon_arguments() | {"temperature": 0.5})


def supcon_module(method, **kwargs):
    loss_fn = md.SupConDistillLoss(**kwargs)
    return Call(getattr(loss_fn, method), supcon_arguments(), (loss_fn,))


def sigmoid_module():
    loss_fn = md.SigmoidDistillLoss()
    return Call(loss_fn, supcon_arguments(), (loss_fn,))


def unit_keys_module():
    call = supcon_module("__call__", normalize="query", validate=True)
    keys = functional.l2_normalize(real(5, 3))
    return Call(call.function, call.arguments | {"keys": keys, "momentum_keys": keys}, call.watched)


def response_arguments(*shape):
    return {"student": real(*shape), "teacher": real(*shape), "momentum": real(*shape), "mask": bools(4)}


def hard_arguments():
    return {
        "student_scores": real(4),
        "fused_scores": real(4),
        "targets": real(4),
        "student_logits": real(4, 3),
        "fused_logits": real(4, 3),
        "labels": ints(4),
        "mask": bools(4),
    }


def ema_method(name):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = md.EMAWrapper(model, decay=0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    method = getattr(ema, name)
    function = method if name != "swap" else lambda model: method(model).__enter__()
    return Call(function, {"model": model}, (ema, model))


def averages_update():
    model = nn.Linear(2, 2)
    averages = md.EMADict(model, {"fast": 0.5, "slow": 0.9})
    with torch.no_grad():
        model.weight.add_(1.0)
    return Call(averages.update, {"model": model}, (*averages.averages.values(), model))


def snapshot(decay, updates=1, model=None):
    model = model or nn.Linear(2, 2)
    ema = md.EMAWrapper(model, decay=decay)
    for _ in range(updates):
        ema.update(model)
    return ema.state_dict()


SNAPSHOT = snapshot(schedules.PowerFunction(0.1))


def queue_method(name, **kwargs):
    queue = md.ClassQueue(4, {"t": 3, "a": 2}, **kwargs)
    batch = {"labels": ints(3), "features": {"t": real(3, 3), "a": real(3, 2)}}
    queue.enqueue(**batch)
    if name == "read":
        return Call(queue.read, {"stream": "t"}, (queue,))
    return Call(queue.enqueue, batch | {"valid": {"a": bools(3)}}, (queue,))


def parameters():
    return {"modules": [nn.Linear(2, 2), md.SupConDistillLoss()], "weight_decay": 0.01}


def fuse_forward():
    fuse = md.MomentumFusionFactors(["t", "a"])
    return Call(fuse, {"features": {"t": real(3, 3), "a": real(3, 2)}}, (fuse,))


CALLS = {
    "l2_normalize": lambda: Call(functional.l2_normalize, {"x": real(3, 2)}),
    "contrast_logits": lambda: Call(
        functional.contrast_logits, {"query": real(4, 3), "keys": real(5, 3), "temperature": 0.5}
    ),
    "supcon_distill_loss": lambda: supcon_function(functional.supcon_distill_loss),
    "supcon_distill_terms": lambda: supcon_function(functional.supcon_distill_terms),
    "sigmoid_distill_loss": lambda: Call(
        functional.sigmoid_distill_loss, supcon_arguments() | {"temperature": 0.5, "bias": -1.0}
    ),
    "response_distill_loss(regression)": lambda: Call(
        functional.response_distill_loss, response_arguments(4) | {"task": "regression"}
    ),
    "response_distill_loss(classification)": lambda: Call(
        functional.response_distill_loss, response_arguments(4, 3) | {"task": "classification"}
    ),
    "hard_sample_fusion_loss": lambda: Call(functional.hard_sample_fusion_loss, hard_arguments()),
    "mean_rows": lambda: Call(functional.mean_rows, {"values": real(4), "mask": bools(4)}),
    "straight_through": lambda: Call(functional.straight_through, {"average": real(2), "online": real(2)}),
    "centre_update": lambda: Call(
        functional.centre_update, {"centre": real(3), "momentum_query": real(4, 3), "query_labels": ints(4)}
    ),
    "ema_update": lambda: Call(
        functional.ema_update,
        {"average": [real(2), real(3, 2)], "online": [real(2) + 1, real(3, 2) + 1], "decay": 0.5},
    ),
    "SupConDistillLoss()": lambda: Call(md.SupConDistillLoss),
    "SupConDistillLoss.forward": lambda: supcon_module("__call__"),
    "SupConDistillLoss.terms": lambda: supcon_module("terms"),
    "SupConDistillLoss(centred).forward": lambda: supcon_module("__call__", momentum_targets="centred"),
    "SupConDistillLoss(query, validate).forward": unit_keys_module,
    "SupConDistillLoss(validate).forward": lambda: supcon_module("__call__", validate=True),
    "SigmoidDistillLoss()": lambda: Call(md.SigmoidDistillLoss),
    "SigmoidDistillLoss.forward": sigmoid_module,
    "ResponseDistillLoss()": lambda: Call(md.ResponseDistillLoss, {"task": "regression"}),
    "ResponseDistillLoss(regression).forward": lambda: Call(
        md.ResponseDistillLoss(task="regression"), response_arguments(4)
    ),
    "ResponseDistillLoss(classification).forward": lambda: Call(
        md.ResponseDistillLoss(task="classification"), response_arguments(4, 3)
    ),
    "ResponseDistillLoss(validate).forward": lambda: Call(
        md.ResponseDistillLoss(task="regression", validate=True), response_arguments(4)
    ),
    "ResponseDistillLoss(classification, validate).forward": lambda: Call(
        md.ResponseDistillLoss(task="classification", validate=True), response_arguments(4, 3)
    ),
    "HardSampleFusionLoss()": lambda: Call(md.HardSampleFusionLoss),
    "HardSampleFusionLoss.forward": lambda: Call(md.HardSampleFusionLoss(), hard_arguments()),
    "HardSampleFusionLoss(validate).forward": lambda: Call(md.HardSampleFusionLoss(validate=True), hard_arguments()),
    "gather_rows": lambda: Call(md.gather_rows, {"tensors": {"t": real(3, 3), "a": real(3, 2)}}),
    "param_groups": lambda: Call(lambda modules, **options: md.param_groups(*modules, **options), parameters()),
    "MomentumFusionFactors()": lambda: Call(md.MomentumFusionFactors, {"modalities": ["t", "a"]}),
    "MomentumFusionFactors.forward": fuse_forward,
    "EMAWrapper()": lambda: Call(md.EMAWrapper, {"model": nn.Linear(2, 2)}),
    "EMAWrapper.update": lambda: ema_method("update"),
    "EMAWrapper.swap": lambda: ema_method("swap"),
    "EMAWrapper.copy_to": lambda: ema_method("copy_to"),
    "EMAWrapper.check_in_sync": lambda: Call(md.EMAWrapper(nn.Linear(2, 2)).check_in_sync),
    "EMADict()": lambda: Call(md.EMADict, {"model": nn.Linear(2, 2), "decays": {"fast": 0.5, "slow": 0.9}}),
    "EMADict.update": averages_update,
    "Cosine()": lambda: Call(schedules.Cosine, {"steps": 10}),
    "WarmUp()": lambda: Call(schedules.WarmUp, {"decay": 0.5}),
    "HalfLife()": lambda: Call(schedules.HalfLife, {"half_life": 10}),
    "Scaled()": lambda: Call(schedules.Scaled, {"decay": 0.5, "kappa": 2}),
    "PowerFunction()": lambda: Call(schedules.PowerFunction, {"sigma_rel": 0.1}),
    "post_hoc_average": lambda: Call(schedules.post_hoc_average, {"snapshots": [SNAPSHOT], "sigma_rel": 0.1}),
    "ClassQueue()": lambda: Call(md.ClassQueue, {"size": 4, "dims": {"t": 3, "a": 2}}),
    "ClassQueue.enqueue": lambda: queue_method("enqueue"),
    "ClassQueue(num_classes).enqueue": lambda: queue_method("enqueue", num_classes=2),
    "ClassQueue(balanced).enqueue": lambda: queue_method("enqueue", balanced=True, num_classes=2),
    "ClassQueue(validate).enqueue": lambda: queue_method("enqueue", balanced=True, num_classes=2, validate=True),
    "ClassQueue.read": lambda: queue_method("read"),
    "mutual_information_bound": lambda: Call(diagnostics.mutual_information_bound, {"loss": 1.0, "num_keys": 8}),
    "modality_gap": lambda: Call(diagnostics.modality_gap, {"x": real(3, 2), "y": real(4, 2)}),
    "alignment": lambda: Call(diagnostics.alignment, {"x": real(3, 2), "y": real(3, 2)}),
    "uniformity": lambda: Call(diagnostics.uniformity, {"x": real(3, 2)}),
}


# ---------------------------------------------------------------------------------------------
# The bad values: (what is wrong, changed arguments, error), the first changed one is named unless `named` says so
# ---------------------------------------------------------------------------------------------


@dataclass
class Case:
    call: str
    what: str
    changes: dict
    error: type | tuple
    named: str

    @property
    def id(self):
        return f"{self.call}: {self.what}"


CASES = []


def bad(calls, argument, values, *, named=None, **also):
    """One case per call and value: `argument` takes the value, `also` what it needs beside it."""
    for call in [calls] if isinstance(calls, str) else calls:
        for what, value, error in values:
            changes = {argument: value} | also
            CASES.append(Case(call, f"{argument} {what}", changes, error, named or argument))


def wrong_numbers(low=0.0, high=INF, *, optional=False):
    """What is no finite number in [low, high]."""
    values = [
        ("is NaN", NAN, V),
        ("is infinite", INF, V),
        ("is minus infinity", -INF, V),
        ("is a string", "0.5", T),
        ("is a bool", True, T),
        ("is a list", [0.5], T),
        ("is complex", 0.5j, T),
    ]
    values += [("is too small", low - 0.1, V)] if low > -INF else []
    values += [("is too large", high + 0.1, V)] if high < INF else []
    values += [] if optional else [("is None", None, T)]
    return values


FLAGS = [("is an int", 1, T), ("is a string", "yes", T), ("is None", None, T)]
WHOLE_NUMBERS = [("is a float", 1.5, T), ("is a bool", True, T), ("is a string", "1", T), ("is a list", [1], T)]
COLD_AND_HOT = [("is zero", 0.0, V), ("is too cold for 32 bits", 1e-13, V), ("is too hot for 32 bits", 1e13, V)]
GROUPS = [("is another string", "all", EITHER), ("is a rank", 0, T), ("is a bool", True, T)]


def choices(*, none=True):
    values = [("is unknown", "sideways", V), ("is a number", 3, EITHER), ("is a list", ["mean"], EITHER)]
    return values + ([("is None", None, EITHER)] if none else [])


def no_floats(*shape):
    """What is no floating tensor, whatever the shape."""
    return [
        ("is a list", real(*shape).tolist(), T),
        ("is a NumPy array", real(*shape).numpy(), T),
        ("is of integers", ints(*shape), T),
        ("is of bools", bools(*shape), T),
        ("is complex", real(*shape, dtype=torch.complex64), T),
    ]


def no_labels(rows):
    return [
        ("are floats", real(rows), T),
        ("are bools", bools(rows), T),
        ("are a list", [0] * rows, EITHER),  # a list may stand for parts, then of a wrong number
        ("are None", None, T),
        ("are a column", ints(rows, 1), V),
        ("are one number", ints(), V),
        ("are on another device", ints(rows, device="meta"), V),
    ]


def no_mask(rows):
    return [
        ("is of floats", real(rows), T),
        ("is of integers", ints(rows), T),
        ("is a list", [True] * rows, T),
        ("is a bool", True, T),
        ("is a column", bools(rows, 1), V),
        ("is too short", bools(rows - 1), V),
        ("would broadcast", bools(1), V),
        ("is on another device", bools(rows, device="meta"), V),
    ]


# ---- functions on features -------------------------------------------------------------------

bad("l2_normalize", "x", [*no_floats(3, 2), ("is None", None, T)])
bad(
    "l2_normalize",
    "x",
    [("is a vector", real(3), V), ("has three dimensions", real(3, 2, 2), V), ("is a scalar", real(), V)],
)
bad("l2_normalize", "eps", [*wrong_numbers(optional=True), ("is zero", 0.0, V), ("is beyond any float", 10**309, V)])

bad("contrast_logits", "query", [*no_floats(4, 3), ("is a vector", real(3), V), ("is None", None, T)])
bad("contrast_logits", "query", [("is of another width", real(4, 2), V)], named="query|keys")
bad("contrast_logits", "keys", [*no_floats(5, 3), ("are a vector", real(3), V), ("are None", None, T)])
bad("contrast_logits", "keys", [("are on another device", real(5, 3, device="meta"), V)])
bad(
    "contrast_logits",
    "temperature",
    [*wrong_numbers(), *COLD_AND_HOT, ("is a vector", real(1), V), ("is an int tensor", ints(), T)],
)
bad("contrast_logits", "normalize", [("is 'keys'", "keys", V), ("is None", None, EITHER), ("is a number", 1, EITHER)])

# ---- the contrastive loss --------------------------------------------------------------------

SUPCON_CALLS = ["supcon_distill_loss", "SupConDistillLoss.forward"]
ALL_SUPCON_CALLS = [*SUPCON_CALLS, "supcon_distill_terms", "SupConDistillLoss.terms"]

bad(SUPCON_CALLS, "query", [*no_floats(4, 3), ("is None", None, T)])
bad(SUPCON_CALLS, "query", [("is a vector", real(3), V), ("has three dimensions", real(4, 1, 3), V)])
bad(ALL_SUPCON_CALLS, "query", [("is of another width", real(4, 2), V)], named="query|keys|momentum_query")
bad(
    ALL_SUPCON_CALLS,
    "query",
    [("has another number of rows", real(3, 3), V)],
    named="query|query_labels|momentum_query",
)
bad(SUPCON_CALLS, "keys", [*no_floats(5, 3), ("are None", None, T), ("are no part at all", (), V)])
bad(SUPCON_CALLS, "keys", [("are a vector", real(3), V), ("have three dimensions", real(5, 1, 3), V)])
bad(SUPCON_CALLS, "keys", [("are on another device", real(5, 3, device="meta"), V)])
bad(SUPCON_CALLS, "keys", [("are of another number", real(4, 3), V)], named="keys|key_labels|momentum_keys")
bad(SUPCON_CALLS, "keys", [("are in more parts", (real(2, 3), real(3, 3)), V)], named="keys|key_labels|momentum_keys")
bad(
    SUPCON_CALLS,
    "keys",
    [
        ("have a part of another width", (real(2, 3), real(3, 2)), V),
        ("have a part that is None", (real(2, 3), None), T),
    ],
    key_labels=(ints(2), ints(3)),
    momentum_keys=(real(2, 3), real(3, 3)),
)
bad(ALL_SUPCON_CALLS, "query_labels", [*no_labels(4), ("are too many", ints(5), V)])
bad(SUPCON_CALLS, "query_labels", [("would broadcast", ints(1), V)])
bad(ALL_SUPCON_CALLS, "key_labels", [*no_labels(5), ("are too few", ints(4), V)])
bad(SUPCON_CALLS, "key_labels", [("are in more parts than the keys", (ints(2), ints(3)), V), ("are no part", (), V)])
bad(
    SUPCON_CALLS,
    "key_labels",
    [("are split elsewhere", (ints(3), ints(2)), V), ("are in one part", ints(5), V)],
    keys=(real(2, 3), real(3, 3)),
    momentum_keys=(real(2, 3), real(3, 3)),
)
bad(SUPCON_CALLS, "momentum_query", [*no_floats(4, 3), ("has another number of rows", real(3, 3), V)])
bad(
    SUPCON_CALLS,
    "momentum_query",
    [("is a vector", real(3), V), ("is on another device", real(4, 3, device="meta"), V)],
)
bad(
    ALL_SUPCON_CALLS,
    "momentum_query",
    [("is missing beside momentum_keys", None, V)],
    named="momentum_query|momentum_keys",
)
bad(SUPCON_CALLS, "momentum_keys", [(what, value, EITHER) for what, value, _ in no_floats(5, 3)])
bad(SUPCON_CALLS, "momentum_keys", [("are of another number", real(4, 3), V), ("are no part", (), V)])
bad(
    SUPCON_CALLS,
    "momentum_keys",
    [("are of another width", real(5, 2), V), ("are on another device", real(5, 3, device="meta"), V)],
)
bad(SUPCON_CALLS, "momentum_keys", [("are in more parts than the keys", (real(2, 3), real(3, 3)), V)])
bad(
    ALL_SUPCON_CALLS,
    "momentum_keys",
    [("are missing beside momentum_query", None, V)],
    named="momentum_query|momentum_keys",
)
bad(ALL_SUPCON_CALLS, "alpha", wrong_numbers(0, 1, optional=True))
bad(SUPCON_CALLS, "alpha", [("is a vector", real(1), V), ("is an int tensor", ints(), T)])
bad(
    "supcon_distill_loss",
    "temperature",
    [*wrong_numbers(), *COLD_AND_HOT, ("is a vector", real(1), V), ("is an int tensor", ints(), T)],
)
bad(
    SUPCON_CALLS,
    "momentum_temperature",
    [*wrong_numbers(optional=True), *COLD_AND_HOT, ("is a vector", real(2), V)],
)
bad(
    "supcon_distill_loss",
    "centre",
    [*no_floats(3), ("is of another width", real(2), V), ("is on another device", real(3, device="meta"), V)],
    momentum_targets="centred",
)
bad("supcon_distill_loss", "centre", [("is without a use", real(3), V)], momentum_targets="sinkhorn")
bad("SupConDistillLoss(centred).forward", "momentum_query", [("is of another width", real(4, 2), V)])
bad("centre_update", "centre", [*no_floats(3), ("is None", None, T), ("is a matrix", real(1, 3), V)])
bad("centre_update", "momentum_query", [*no_floats(4, 3), ("is of another width", real(4, 2), V)])
bad("centre_update", "momentum_query", [("is on another device", real(4, 3, device="meta"), V)])
bad("centre_update", "query_labels", [*no_labels(4), ("are of another number", ints(3), V)])
bad("centre_update", "decay", wrong_numbers(0, 1))
bad("centre_update", "normalize", FLAGS)
bad("centre_update", "ignore_index", WHOLE_NUMBERS)
bad("centre_update", "group", GROUPS)
bad("supcon_distill_loss", "validate", FLAGS)
bad(
    SUPCON_CALLS,
    "query_labels",
    [("hold -3", with_value(ints(4), -3), V), ("hold torch's ignore_index", with_value(ints(4), -100), V)],
)
bad(
    SUPCON_CALLS,
    "key_labels",
    [("hold -100 in two rows", torch.tensor([0, -100, 0, -2, -100]), V), ("hold -3", with_value(ints(5), -3), V)],
)
bad(
    SUPCON_CALLS,
    "key_labels",
    [("hold -3 in their second part", (ints(2), with_value(ints(3), -3)), V)],
    keys=(real(2, 3), real(3, 3)),
    momentum_keys=(real(2, 3), real(3, 3)),
)
bad(
    "supcon_distill_loss",
    "key_labels",
    [("mark what is absent by another number", with_value(ints(5), -1), V)],
    ignore_index=-100,
)
bad("supcon_distill_loss", "exclude_self", FLAGS)
bad("supcon_distill_loss", "keys", [("are not the batch", real(5, 3), V)], exclude_self=True)
bad(
    "supcon_distill_loss",
    "keys",
    [("have a first part that is not the batch", (real(3, 3), real(4, 3)), V)],
    key_labels=(ints(3), ints(4)),
    momentum_keys=(real(3, 3), real(4, 3)),
    exclude_self=True,
)

BY_DISTANCE = {"positives_from": "distance", "width": 1.0}
bad(ALL_SUPCON_CALLS, "query_targets", [("are read by nothing", real(4), V)])
bad(ALL_SUPCON_CALLS, "key_targets", [("are read by nothing", real(5), V)])
for call in ["supcon_distill_loss"]:
    bad(call, "positives_from", [("lacks targets", "overlap", V)], named="query_targets")
    bad(call, "key_targets", [("are missing", None, V)], query_targets=real(4), **BY_DISTANCE)
    wrong = [("are integers", ints(4), T), ("have another N", real(3), V), ("have no column", real(4, 0), V)]
    wrong += [("are on another device", real(4, device="meta"), V), ("are a cube", real(4, 1, 1), V)]
    bad(call, "query_targets", wrong, key_targets=real(5), **BY_DISTANCE)
    wrong = [("are integers", ints(5), T), ("have another Q", real(4), V), ("have columns", real(5, 1), V)]
    wrong += [("are in parts", (real(2), real(3)), V), ("are a dict", {}, T)]
    bad(call, "key_targets", wrong, query_targets=real(4), **BY_DISTANCE)
    bad(call, "query_targets", [("are no rows", real(4), V)], key_targets=real(5), positives_from="overlap")
    for name, function in {
        "returns a number": lambda *_: 1.0,
        "returns the keys alone": lambda *both: both[1],
        "returns them turned round": lambda y, z: (y - z).T,
    }.items():
        bad(call, "positives_from", [(name, function, V)], query_targets=real(4), key_targets=real(5))

SUPCON_OPTIONS = ["supcon_distill_loss", "supcon_distill_terms", "SupConDistillLoss()"]
bad(SUPCON_OPTIONS, "positives", choices())
bad(SUPCON_OPTIONS, "positives_from", choices())
bad(SUPCON_OPTIONS, "width", [*wrong_numbers(), ("is zero", 0, V)], positives_from="distance")
bad(SUPCON_OPTIONS, "width", [("is read by nothing", 1.0, V)])
bad(SUPCON_OPTIONS, "hardness", wrong_numbers())
bad(SUPCON_OPTIONS, "positives", [("counts keys", "inside_per_positive", V)], positives_from="overlap")
bad(SUPCON_OPTIONS, "reduction", choices())
bad(SUPCON_OPTIONS, "momentum_targets", choices())
bad(SUPCON_OPTIONS, "normalize", [("is 'keys'", "keys", V), ("is None", None, EITHER), ("is a number", 1, EITHER)])
bad(SUPCON_OPTIONS, "ignore_index", [*WHOLE_NUMBERS, ("is None", None, T)])

bad(
    "SupConDistillLoss()",
    "temperature",
    [*wrong_numbers(), *COLD_AND_HOT, ("is above its range", 11.0, V), ("is below its range", 0.001, V)],
)
bad(
    "SupConDistillLoss()",
    "temperature_range",
    [
        ("is one number", 0.5, T),
        ("is None", None, T),
        ("has one bound", (0.1,), EITHER),
        ("has three bounds", (0.1, 0.5, 1.0), EITHER),
        ("starts at zero", (0.0, 1.0), V),
        ("starts below zero", (-1.0, 1.0), V),
        ("is upside down", (1.0, 0.1), V),
        ("holds a string", ("0.1", 1.0), T),
        ("holds NaN", (NAN, 1.0), V),
        ("ends at infinity", (0.1, INF), V),
        ("starts too cold for 32 bits", (1e-13, 1.0), V),
    ],
)
bad("SupConDistillLoss()", "momentum_temperature", [*wrong_numbers(optional=True), *COLD_AND_HOT])
bad("SupConDistillLoss()", "learnable_temperature", FLAGS)
bad("SupConDistillLoss()", "exclude_self", FLAGS)
bad("SupConDistillLoss()", "alpha", wrong_numbers(0, 1))
bad("SupConDistillLoss()", "group", GROUPS)
bad("supcon_distill_loss", "group", GROUPS)
bad("SupConDistillLoss()", "validate", FLAGS)

VALIDATED = "SupConDistillLoss(validate).forward"
bad(
    VALIDATED,
    "query",
    [("holds NaN", with_value(real(4, 3), NAN), V), ("holds infinity", with_value(real(4, 3), INF), V)],
)
bad(
    VALIDATED,
    "keys",
    [("hold NaN", with_value(real(5, 3), NAN), V), ("hold -infinity", with_value(real(5, 3), -INF), V)],
)
bad(VALIDATED, "momentum_query", [("holds NaN", with_value(real(4, 3), NAN), V)])
bad(VALIDATED, "momentum_keys", [("hold NaN", with_value(real(5, 3), NAN), V)])

bad(
    "SupConDistillLoss(query, validate).forward",
    "keys",
    [("are no unit rows", real(5, 3), V), ("hold a row of another length", with_value(real(5, 3), 0.1), V)],
)
bad("SupConDistillLoss(query, validate).forward", "momentum_keys", [("are no unit rows", real(5, 3), V)])

# ---- the sigmoid loss: by the checks of the contrastive loss, and its own ----------------------

SIGMOID_CALLS = ["sigmoid_distill_loss", "SigmoidDistillLoss.forward"]
SIGMOID_OPTIONS = ["sigmoid_distill_loss", "SigmoidDistillLoss()"]

for argument, rows in (("query", 4), ("keys", 5), ("momentum_query", 4), ("momentum_keys", 5)):
    bad(SIGMOID_CALLS, argument, [("is of integers", ints(rows, 3), T), ("is a vector", real(3), V)])
bad(SIGMOID_CALLS, "query_labels", [("are floats", real(4), T), ("hold -3", with_value(ints(4), -3), V)])
bad(SIGMOID_CALLS, "key_labels", [("are floats", real(5), T), ("are too few", ints(4), V)])
bad("SigmoidDistillLoss.forward", "alpha", [("is too large", 1.1, V), ("is a bool", True, T)])
bad(
    "sigmoid_distill_loss",
    "bias",
    [*wrong_numbers(-INF), ("is a vector", real(1), V), ("is an int tensor", ints(), T)],
)
bad("SigmoidDistillLoss()", "bias", wrong_numbers(-INF))
bad(SIGMOID_OPTIONS, "temperature", [*COLD_AND_HOT, ("is a string", "0.1", T)])
bad("SigmoidDistillLoss()", "temperature_range", [("is upside down", (1.0, 0.1), V), ("is one number", 0.5, T)])
bad(SIGMOID_OPTIONS, "alpha", [("is too large", 1.1, V), ("is a bool", True, T)])
bad(SIGMOID_OPTIONS, "reduction", choices())
bad(SIGMOID_OPTIONS, "key_reduction", [*choices(), ("is 'none'", "none", V)])
bad(SIGMOID_OPTIONS, "normalize", [("is 'keys'", "keys", V)])
bad(SIGMOID_OPTIONS, "ignore_index", WHOLE_NUMBERS)
bad(SIGMOID_OPTIONS, "group", GROUPS)
for argument in ("exclude_self", "validate"):
    bad(SIGMOID_OPTIONS, argument, FLAGS)
for argument in ("learnable_temperature", "learnable_bias"):
    bad("SigmoidDistillLoss()", argument, FLAGS)

# ---- the response loss -----------------------------------------------------------------------

SCORES = ["response_distill_loss(regression)", "ResponseDistillLoss(regression).forward"]
LOGITS = ["response_distill_loss(classification)", "ResponseDistillLoss(classification).forward"]

bad(
    SCORES,
    "student",
    [*no_floats(4), ("is None", None, T), ("is a column", real(4, 1), V), ("is one number", real(), V)],
)
for argument in ("teacher", "momentum"):
    bad(SCORES, argument, no_floats(4))
    bad(
        SCORES,
        argument,
        [("is a column", real(4, 1), V), ("is too short", real(3), V), ("would broadcast", real(1), V)],
    )
    bad(SCORES, argument, [("is on another device", real(4, device="meta"), V)])
    bad(
        LOGITS,
        argument,
        [("is of scores", real(4), V), ("has other classes", real(4, 2), V), ("has another N", real(5, 3), V)],
    )
bad(SCORES, "teacher", [("is None", None, T)])
bad(
    LOGITS,
    "student",
    [("is of scores", real(4), V), ("has three dimensions", real(4, 3, 1), V), ("is of integers", ints(4, 3), T)],
)
bad(
    LOGITS,
    "student",
    [("has no class", real(4, 0), V)],
    teacher=real(4, 0),
    momentum=real(4, 0),
    named="student|teacher",
)
bad(SCORES, "mask", no_mask(4))
bad(LOGITS, "mask", [("has a column per class", bools(4, 3), V), ("is of floats", real(4), T)])
bad([*SCORES, LOGITS[0]], "alpha", wrong_numbers(0, 1, optional=True))
bad(SCORES, "alpha", [("is a vector", real(4), V), ("is an int tensor", ints(), T)])

RESPONSE_OPTIONS = ["response_distill_loss(regression)", "ResponseDistillLoss()"]
bad(RESPONSE_OPTIONS, "task", choices())
bad(RESPONSE_OPTIONS, "reduction", choices())
bad(RESPONSE_OPTIONS, "temperature", [*wrong_numbers(), *COLD_AND_HOT])
bad(RESPONSE_OPTIONS, "detach_teacher", FLAGS)
bad(RESPONSE_OPTIONS, "validate", FLAGS)
bad("ResponseDistillLoss()", "alpha", wrong_numbers(0, 1))
bad("ResponseDistillLoss()", "group", GROUPS)
bad("response_distill_loss(regression)", "group", GROUPS)
for argument in ("student", "teacher", "momentum"):
    bad("ResponseDistillLoss(validate).forward", argument, [("holds NaN", with_value(real(4), NAN), V)])
    bad("ResponseDistillLoss(validate).forward", argument, [("holds -infinity", with_value(real(4), -INF), V)])

PROBABILITIES = real(4, 3).softmax(dim=1)
for argument in ("student", "teacher", "momentum"):
    bad(
        "ResponseDistillLoss(classification, validate).forward",
        argument,
        [("holds probabilities", PROBABILITIES, V), ("holds one-hot rows", torch.eye(3)[[0, 2, 1, 0]], V)],
    )

# ---- the fusion loss -------------------------------------------------------------------------

FUSION = ["hard_sample_fusion_loss", "HardSampleFusionLoss.forward"]

for argument in ("student_scores", "fused_scores", "targets"):
    bad(FUSION, argument, no_floats(4))
    bad(FUSION, argument, [("is None beside the others", None, V)])
    bad(FUSION, argument, [("is a column", real(4, 1), V)])
for argument in ("fused_scores", "targets"):
    bad(FUSION, argument, [("would broadcast", real(1), V), ("is on another device", real(4, device="meta"), V)])
for argument in ("student_logits", "fused_logits"):
    bad(FUSION, argument, no_floats(4, 3))
    bad(FUSION, argument, [("is None beside the others", None, V)])
    bad(FUSION, argument, [("is of scores", real(4), V)])
bad(
    FUSION,
    "student_logits",
    [("has no class", real(4, 0), V)],
    fused_logits=real(4, 0),
    named="student_logits|fused_logits",
)
bad(
    FUSION,
    "fused_logits",
    [("has other classes", real(4, 2), V), ("is on another device", real(4, 3, device="meta"), V)],
)
ELSEWHERE = real(4, 3, device="meta")
bad(FUSION, "student_logits", [("is on another device than the scores", ELSEWHERE, V)], fused_logits=ELSEWHERE)
NO_SCORES = dict.fromkeys(("student_scores", "fused_scores", "targets"))
bad(FUSION, "fused_logits", [("is elsewhere, without scores", ELSEWHERE, V)], **NO_SCORES)
bad(
    FUSION,
    "student_logits",
    [("has another N than the scores", real(5, 3), V)],
    fused_logits=real(5, 3),
    named="student_logits|fused_logits|labels",
)
bad(FUSION, "labels", [("are floats", real(4), T), ("are bools", bools(4), T), ("are a list", [0] * 4, T)])
bad(
    FUSION,
    "labels",
    [
        ("are a column", ints(4, 1), V),
        ("are too many", ints(5), V),
        ("are on another device", ints(4, device="meta"), V),
    ],
)
bad(FUSION, "labels", [("are None beside the logits", None, V)])
bad(FUSION, "mask", no_mask(4))
bad(
    FUSION,
    "student_scores",
    [("and all other outputs are missing", None, V)],
    fused_scores=None,
    student_logits=None,
    fused_logits=None,
    named=r"student_scores|student_logits",
)

FUSION_OPTIONS = ["hard_sample_fusion_loss", "HardSampleFusionLoss()"]
bad(FUSION_OPTIONS, "class_weight", choices())
bad(FUSION_OPTIONS, "reduction", choices())
bad(FUSION_OPTIONS, "hard_attention", FLAGS)
bad(FUSION_OPTIONS, "detach_teacher", FLAGS)
bad(FUSION_OPTIONS, "validate", FLAGS)
bad(FUSION_OPTIONS, "ignore_index", WHOLE_NUMBERS)
bad("HardSampleFusionLoss()", "group", GROUPS)
bad("hard_sample_fusion_loss", "group", GROUPS)
for argument in ("student_scores", "fused_scores", "targets"):
    bad("HardSampleFusionLoss(validate).forward", argument, [("holds NaN", with_value(real(4), NAN), V)])
bad("HardSampleFusionLoss(validate).forward", "student_logits", [("holds NaN", with_value(real(4, 3), NAN), V)])
bad(
    FUSION,
    "labels",
    [
        ("hold C", with_value(ints(4), 3), V),
        ("hold -3", with_value(ints(4), -3), V),
        ("hold -100 in two rows", torch.tensor([0, -100, -2, -100]), V),
    ],
)
bad(FUSION, "labels", [("hold -3, without logits", with_value(ints(4), -3), V)], student_logits=None, fused_logits=None)
for argument in ("student_logits", "fused_logits"):
    bad("HardSampleFusionLoss(validate).forward", argument, [("hold probabilities", PROBABILITIES, V)])

# ---- rows ------------------------------------------------------------------------------------

bad("mean_rows", "values", [*no_floats(4), ("is None", None, T), ("is a column", real(4, 1), V)])
bad("mean_rows", "mask", no_mask(4))
bad("mean_rows", "group", GROUPS)

bad("gather_rows", "tensors", [("are one tensor", real(3), T), ("are a list", [real(3)], T), ("are none", {}, V)])
bad("gather_rows", "tensors", [("have a name that is no string", {0: real(3)}, T), ("hold a list", {"t": [1.0]}, T)])
bad(
    "gather_rows",
    "tensors",
    [
        ("hold a number", {"t": real()}, V),
        ("hold another number of rows", {"t": real(3), "a": real(4)}, V),
        ("are partly on another device", {"t": real(3), "a": real(3, device="meta")}, V),
    ],
)
bad("gather_rows", "group", GROUPS)

# ---- averages --------------------------------------------------------------------------------

bad("ema_update", "decay", wrong_numbers(0, 1))
bad("ema_update", "online", [("has fewer tensors", [real(2)], V), ("has none", [], V)], named="online|average")
bad(
    "ema_update",
    "online",
    [("has another shape", [real(2), real(2, 3)], V), ("would broadcast", [real(2), real(1)], V)],
)
bad("ema_update", "online", [("holds a number", [1.0, real(3, 2)], T), ("holds None", [real(2), None], T)])
bad(
    "ema_update",
    "online",
    [("holds integers", [ints(2), real(3, 2)], T), ("is one number", 1.0, T), ("is None", None, T)],
)
bad(
    "ema_update",
    "average",
    [("holds integers", [ints(2), real(3, 2)], T), ("holds a number", [real(2), 1.0], T), ("is None", None, T)],
)
bad("ema_update", "average", [("has more tensors", [real(2)] * 3, V)], named="online|average")

bad("straight_through", "average", [*no_floats(2), ("is None", None, T)])
bad("straight_through", "online", [*no_floats(2), ("is None", None, T), ("is of another shape", real(3), V)])
bad("straight_through", "online", [("is on another device", real(2, device="meta"), V)])

bad("param_groups", "modules", [("hold a tensor", [real(2)], T), ("are none", [], V)])
bad("param_groups", "weight_decay", wrong_numbers())

bad("MomentumFusionFactors()", "modalities", [("is one string", "ta", T), ("is None", None, T), ("is a number", 2, T)])
bad(
    "MomentumFusionFactors()",
    "modalities",
    [("is a set without order", {"t"}, T), ("holds a number", ["t", 3], T)],
)
bad(
    "MomentumFusionFactors()",
    "modalities",
    [("is told whole", "a" * 78, T), ("is too long to be told whole", "a" * 79, T)],
)
bad("MomentumFusionFactors()", "modalities", [("is empty", [], V), ("has a name twice", ["t", "a", "t"], V)])
bad("MomentumFusionFactors()", "init", wrong_numbers(-INF))
bad(
    "MomentumFusionFactors()",
    "init",
    [("lacks a name", {"t": 1.0}, V), ("has a name too many", {"t": 1.0, "a": 1.0, "v": 1.0}, V)],
)
bad(
    "MomentumFusionFactors()",
    "init",
    [("maps to a string", {"t": 1.0, "a": "1"}, T), ("maps to NaN", {"t": NAN, "a": 1.0}, V)],
)
bad("MomentumFusionFactors()", "decay", wrong_numbers(0, 1))


def features(**changes):
    return {"t": real(3, 3), "a": real(3, 2)} | changes


BAD_FEATURES = [
    ("are a tensor", real(3, 3), T),
    ("are a list", [real(3, 3), real(3, 2)], T),
    ("are None", None, T),
    ("lack a name", {"t": real(3, 3)}, V),
    ("have a name too many", features(v=real(3, 2)), V),
    ("have a number for a name", {"t": real(3, 3), 3: real(3, 2)}, V),
    ("hold None", features(a=None), T),
    ("hold a list", features(a=[[0.0] * 2] * 3), T),
    ("hold integers", features(a=ints(3, 2)), T),
    ("hold bools", features(a=bools(3, 2)), T),
    ("hold complex numbers", features(a=real(3, 2, dtype=torch.complex64)), T),
    ("hold a vector", features(a=real(3)), V),
    ("hold three dimensions", features(a=real(3, 2, 1)), V),
    ("hold another number of rows", features(a=real(2, 2)), V),
    ("hold one row that would broadcast", features(a=real(1, 2)), V),
    ("are partly on another device", features(a=real(3, 2, device="meta")), V),
]
bad("MomentumFusionFactors.forward", "features", BAD_FEATURES)

NO_MODULES = [
    ("is None", None, T),
    ("is a tensor", real(2), T),
    ("is a class", nn.Linear, T),
    ("is a state dict", {}, T),
]


def other_model(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for name, module in changes.items():
        setattr(model, name, module)
    return model


OTHER_MODELS = [
    ("has another layer in the middle", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)), V),
    ("lacks a layer", nn.Sequential(nn.Linear(2, 2)), V),
    ("lacks a bias", nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)), V),
    ("has another shape", nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(2)), V),
    ("has a parameter more", other_model(extra=nn.Parameter(real(2))), V),
    ("is empty", nn.Sequential(), V),
]
bad("EMAWrapper()", "model", NO_MODULES)
bad("EMAWrapper()", "model", [("is lazy", nn.LazyLinear(2), V), ("has nothing to average", nn.ReLU(), T)])
bad(
    "EMAWrapper()",
    "teacher",
    [*NO_MODULES[1:], ("has another shape", nn.Linear(2, 3), V), ("lacks a bias", nn.Linear(2, 2, bias=False), V)],
)
ONE = nn.Linear(2, 2)
bad("EMAWrapper()", "teacher", [("is the model", ONE, V)], model=ONE)
bad(
    "EMAWrapper()",
    "teacher",
    [("is tied elsewhere", nn.Sequential(ONE, ONE), V)],
    model=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
)
bad("EMAWrapper()", "decay", wrong_numbers(0, 1))
bad("EMAWrapper()", "buffers", [*choices(), ("is 'none'", "none", V), ("is a list of numbers", [1], T)])
bad("EMAWrapper()", "mode", [*choices(), ("is a bool", True, EITHER)])
bad("EMAWrapper()", "hooks", [*choices(), ("is 'none'", "none", V), ("is a bool", True, EITHER)])
bad(["EMAWrapper()", "EMADict()"], "share_frozen", FLAGS)
bad(["EMAWrapper()", "EMADict()"], "share_frozen", [("stands beside dtype", True, V)], dtype=torch.float64)
bad("EMAWrapper()", "share_frozen", [("stands beside teacher", True, V)], teacher=nn.Linear(2, 2))
bad(
    "EMAWrapper()",
    "dtype",
    [
        ("is float16", torch.float16, V),
        ("is bfloat16", torch.bfloat16, V),
        ("is an integer dtype", torch.int64, EITHER),
        ("is complex", torch.complex64, EITHER),
        ("is a string", "float32", T),
        ("is a type", float, T),
    ],
)
NO_DEVICES = [("is unknown", "nowhere", V), ("is a float", 0.5, T), ("is a list", ["cpu"], T)]
bad("EMAWrapper()", "device", NO_DEVICES)
for call in ("EMAWrapper.update", "EMAWrapper.swap", "EMAWrapper.copy_to"):
    bad(call, "model", [*NO_MODULES, *OTHER_MODELS, ("is lazy", nn.LazyLinear(2), V)])
bad("EMAWrapper.update", "decay", wrong_numbers(0, 1, optional=True))

bad("EMAWrapper.check_in_sync", "group", GROUPS)

bad("EMADict()", "model", [*NO_MODULES, ("is lazy", nn.LazyLinear(2), V)])
bad("EMADict()", "decays", [("is a number", 0.5, T), ("is None", None, T), ("is empty", {}, V)])
bad("EMADict()", "decays", [(f"is named {name!r}", {name: 0.5}, V) for name in ("", "a.b", "keys", 3)])
bad(
    "EMADict()",
    "decays",
    [(f"{what} for one", {"fast": 0.5, "slow": value}, e) for what, value, e in wrong_numbers(0, 1)],
)
bad("EMADict()", "buffers", [("is 'none'", "none", V)])
bad("EMADict()", "mode", choices())
bad("EMADict()", "hooks", choices())
bad("EMADict()", "dtype", [("is a string", "float32", T), ("is narrow", torch.bfloat16, V)])
bad("EMADict()", "device", NO_DEVICES)
bad("EMADict.update", "model", [*NO_MODULES, ("is another", nn.Linear(2, 3), V)])
bad("EMADict.update", "decay", wrong_numbers(0, 1, optional=True))

# ---- schedules -------------------------------------------------------------------------------

NO_DECAYS = [*wrong_numbers(0, 1), ("is a function", max, T), ("is a class", schedules.Cosine, T)]

bad("Cosine()", "steps", [*WHOLE_NUMBERS, ("is zero", 0, V), ("is negative", -1, V), ("is None", None, T)])
bad("Cosine()", "start", wrong_numbers(0, 1))
bad("Cosine()", "end", wrong_numbers(0, 1))
bad("WarmUp()", "decay", NO_DECAYS)
bad("Scaled()", "decay", NO_DECAYS)
for call, argument in (
    ("WarmUp()", "inv_gamma"),
    ("WarmUp()", "power"),
    ("HalfLife()", "half_life"),
    ("HalfLife()", "batch_size"),
    ("Scaled()", "kappa"),
):
    bad(call, argument, [*wrong_numbers(), ("is zero", 0, V)])
bad("PowerFunction()", "sigma_rel", [*wrong_numbers(0, 0.3), ("is zero", 0, V), ("is next to nothing", 1e-200, V)])
bad("post_hoc_average", "sigma_rel", [*wrong_numbers(0, 0.3), ("is zero", 0, V), ("is next to nothing", 1e-200, V)])
bad(
    "post_hoc_average",
    "step",
    [*WHOLE_NUMBERS, ("is zero", 0, V), ("is after the last snapshot", 2, V)],
)
bad(
    "post_hoc_average",
    "snapshots",
    [
        ("are none", [], V),
        ("are numbers", [1], T),
        ("are a state", SNAPSHOT, EITHER),
        ("have another schedule", [SNAPSHOT, snapshot(0.5)], V),
        ("have no update", [snapshot(schedules.PowerFunction(0.1), updates=0)], V),
        ("are of other modules", [SNAPSHOT, snapshot(schedules.PowerFunction(0.1), model=nn.PReLU())], V),
        ("are of other shapes", [SNAPSHOT, snapshot(schedules.PowerFunction(0.1), model=nn.Linear(3, 2))], V),
        ("are of the model", [nn.Linear(2, 2).state_dict()], V),
    ],
)

# ---- the queue -------------------------------------------------------------------------------

bad("ClassQueue()", "size", [*WHOLE_NUMBERS, ("is None", None, T), ("is zero", 0, V), ("is negative", -4, V)])
bad(
    "ClassQueue()",
    "dims",
    [
        ("is a number", 3, T),
        ("is None", None, T),
        ("is a list", ["t"], T),
        ("is empty", {}, V),
        ("has a name that is no string", {0: 3}, T),
        ("has an empty name", {"": 3}, V),
        ("has a name that no buffer can have", {"t.x": 3}, V),
        ("has width zero", {"t": 3, "a": 0}, V),
        ("has a negative width", {"t": -3}, V),
        ("has a float width", {"t": 3.0}, T),
        ("has a bool width", {"t": True}, T),
        ("has no width", {"t": None}, T),
    ],
)
bad("ClassQueue()", "num_classes", [*WHOLE_NUMBERS, ("is zero", 0, V), ("is negative", -1, V)])
bad("ClassQueue()", "num_classes", [("is missing", None, V)], balanced=True)
bad("ClassQueue()", "num_classes", [("is more than the size", 5, V)], balanced=True, named="num_classes|size")
bad("ClassQueue()", "balanced", FLAGS, num_classes=2)
bad("ClassQueue()", "normalize", [*FLAGS, ("is 'query'", "query", EITHER), ("names no stream", ("t", "z"), V)])
bad(
    "ClassQueue()",
    "dtype",
    [
        ("is a string", "float32", T),
        ("is None", None, T),
        ("is an integer dtype", torch.int64, EITHER),
        ("is complex", torch.complex64, EITHER),
    ],
)
bad("ClassQueue()", "device", NO_DEVICES)
bad("ClassQueue()", "group", GROUPS)
bad("ClassQueue()", "validate", FLAGS)

for call in ("ClassQueue.enqueue", "ClassQueue(balanced).enqueue"):
    bad(call, "labels", no_labels(3))
    bad(call, "labels", [("are too few", ints(2), V), ("would broadcast", ints(1), V)], named="labels|features|valid")
    bad(call, "features", BAD_FEATURES)
    bad(
        call,
        "features",
        [
            ("are of another width", features(a=real(3, 3)), V),
            ("are transposed", features(t=real(3, 3).T, a=real(2, 3)), V),
        ],
    )
    bad(call, "valid", [(what, {"a": value}, error) for what, value, error in no_mask(3)])
    bad(call, "valid", [("is a tensor", bools(3), T), ("is a list of names", ["a"], T)])
    bad(call, "valid", [("has an unknown stream", {"v": bools(3)}, V), ("maps to None", {"a": None}, T)])
for call in ("ClassQueue(num_classes).enqueue", "ClassQueue(balanced).enqueue"):
    bad(call, "labels", [("hold num_classes", with_value(ints(3), 2), V)])
for call in ("ClassQueue.enqueue", "ClassQueue(balanced).enqueue"):
    bad(call, "labels", [("hold -3", with_value(ints(3), -3), V), ("hold -100", with_value(ints(3), -100), V)])
bad(
    "ClassQueue(validate).enqueue",
    "features",
    [
        ("hold NaN", features(t=with_value(real(3, 3), NAN)), V),
        ("hold infinity", features(a=with_value(real(3, 2), INF)), V),
    ],
)
bad(
    "ClassQueue.read",
    "stream",
    [
        ("is unknown", "v", V),
        ("is empty", "", V),
        ("is None", None, EITHER),
        ("is a number", 0, EITHER),
        ("is a list", ["t"], EITHER),
    ],
)
bad("ClassQueue.read", "padded", FLAGS)

# ---- diagnostics -----------------------------------------------------------------------------

bad(
    "mutual_information_bound",
    "loss",
    [("is a string", "1", T), ("is None", None, T), ("is a bool", True, T)],
)
bad("mutual_information_bound", "loss", [("is a vector", real(3), V), ("is an int tensor", ints(), T)])
bad(
    "mutual_information_bound",
    "num_keys",
    [*WHOLE_NUMBERS, ("is zero", 0, V), ("is negative", -1, V), ("is None", None, T)],
)
for call in ("modality_gap", "alignment"):
    for argument in ("x", "y"):
        bad(call, argument, [*no_floats(3, 2), ("is None", None, T)])
        bad(call, argument, [("is a vector", real(2), V), ("is of another width", real(3, 4), V)], named="x|y")
    bad(call, "y", [("is on another device", real(3, 2, device="meta"), V)])
bad("modality_gap", "x", [("has no row", real(0, 2), V)])
bad("modality_gap", "y", [("has no row", real(0, 2), V)])
bad("alignment", "x", [("has no row", real(0, 2), V)], y=real(0, 2), named="x|y")
bad("alignment", "y", [("has another number of rows", real(4, 2), V), ("would broadcast", real(1, 2), V)])
bad("alignment", "exponent", [*wrong_numbers(), ("is zero", 0, V)])
bad(
    "uniformity",
    "x",
    [*no_floats(3, 2), ("is a vector", real(2), V), ("has no row", real(0, 2), V), ("has one row", real(1, 2), V)],
)
bad("uniformity", "scale", [*wrong_numbers(), ("is zero", 0, V)])


# ---------------------------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------------------------


def tensors_of(value):
    """Every tensor in an argument or module, the step of an average included."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        own = [t.detach() for t in tensors if not is_lazy(t)]
        return [*own, torch.tensor(getattr(value, "step", 0))]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors_of(item)]
    return []


def test_the_calls_work_as_they_stand(subtests):
    """Otherwise a bad case could fail for another reason than the one it is about."""
    for name, make in CALLS.items():
        with subtests.test(name):
            call = make()
            call.function(**call.arguments)


def messages():
    """What each bad call says, by the case."""
    said = {}
    for case in CASES:
        call = CALLS[case.call]()
        with pytest.raises(EITHER) as caught:
            call.function(**call.arguments | case.changes)
        said[case.id] = str(caught.value)
    return said


@pytest.fixture(scope="module")
def pinned():
    return read(MESSAGES)


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_are_refused_by_name_and_nothing_changes(name, pinned, subtests):
    for case in CASES:
        if case.call == name:
            with subtests.test(case.id):
                check_refusal(case, pinned)


def check_refusal(case, pinned):
    call = CALLS[case.call]()
    arguments = call.arguments | case.changes
    watched = [t for t in tensors_of([*call.watched, arguments]) if t.device.type != "meta"]
    before = [t.clone() for t in watched]
    with pytest.raises(case.error) as caught:
        call.function(**arguments)
    message = str(caught.value)
    pattern = rf"(?s)({case.named})(\[[^\]]+\])*: expected .+, got .+"
    assert re.fullmatch(pattern, message), message
    assert message == pinned.get(case.id), "if that is meant: `python tests/pin.py`, and read the difference"
    assert type(caught.value) in (ValueError, TypeError)
    after = [t for t in tensors_of([*call.watched, arguments]) if t.device.type != "meta"]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.nan_to_num(7.0))


def test_there_are_at_least_200_distinct_bad_calls():
    ids = Counter(case.id for case in CASES)
    assert [name for name, count in ids.items() if count > 1] == []
    assert len(CASES) >= 200
    # as many even where the function and the class that share a check count once
    shared = {(tuple(case.changes), case.what, case.named) for case in CASES}
    assert len(shared) >= 200


def test_every_public_block_has_bad_calls():
    covered = {re.split(r"[.(]", case.call)[0] for case in CASES}
    blocks = {name for name in md.__all__ if name[0].isupper()}
    assert blocks - covered == set(), "give each its calls that work, in CALLS, and its wrong values, by `bad(...)`"
    assert CALLS.keys() == {case.call for case in CASES}, "each call of CALLS has a `bad(...)`"


def test_every_argument_has_a_bad_case():
    """Whatever the options of the module; the terms of a loss go through the checks of the loss."""

    def callee(name):
        return re.sub(r"\(.*?\)", "", name).replace(".terms", ".forward").replace("_terms", "_loss")

    arguments, tried = {}, defaultdict(set)
    for name, call in CALLS.items():
        function = call().function
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if name.endswith(".forward"):
            function = owner.forward
        parameters = inspect.signature(function).parameters
        arguments[callee(name)] = {key for key, value in parameters.items() if value.kind != value.VAR_KEYWORD}
    for case in CASES:
        tried[callee(case.call)] |= case.changes.keys()
    untried = {name: names - tried[name] for name, names in arguments.items() if names - tried[name]}
    assert untried == {}, "give each a `bad(...)`"


def test_every_message_that_is_pinned_is_said(pinned):
    assert pinned.keys() == {case.id for case in CASES}, "`python tests/pin.py`, and read the difference"
