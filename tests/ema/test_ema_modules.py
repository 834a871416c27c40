"""EMAWrapper and what a model can be made of: quantised weights, hooks, TorchScript; and whether anyone updates it."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import momentum_distill as md

# ---------------------------------------------------------------------------------------------
# Weights that cannot be averaged
# ---------------------------------------------------------------------------------------------


class Int8(torch.Tensor):
    """A weight in 8 bits with a scale for each row, which knows the operations that torchao's knows."""

    KNOWN = ("detach", "alias", "clone", "_to_copy", "copy_")

    @staticmethod
    def __new__(cls, rows, scale):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)

    def __init__(self, rows, scale):
        self.rows, self.scale = rows, scale

    def __tensor_flatten__(self):
        return ["rows", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["rows"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name not in cls.KNOWN:
            raise NotImplementedError(f"Int8 dispatch: attempting to run unimplemented operator {func}")
        if name == "copy_":
            for mine, other in zip((args[0].rows, args[0].scale), (args[1].rows, args[1].scale), strict=True):
                mine.copy_(other)
            return args[0]
        rows, scale = args[0].rows, args[0].scale
        if name == "clone":
            rows, scale = rows.clone(), scale.clone()
        if name == "_to_copy":
            device, dtype = kwargs.get("device"), kwargs.get("dtype")
            rows, scale = rows.to(device=device), scale.to(device=device, dtype=dtype)
        return cls(rows, scale)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = (*args, None)[:3]
            return nn.functional.linear(x, weight.rows.to(x.dtype) * weight.scale.to(x.dtype)[:, None], bias)
        return super().__torch_function__(func, types, args, kwargs or {})


class Stubborn(Int8):
    """Knows no other dtype either."""

    KNOWN = ("detach", "alias", "clone")


def quantised(seed, kind=Int8, dtype=torch.float32):
    rows = torch.randint(-100, 100, (4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return nn.Parameter(kind(rows, torch.full((4,), 0.01, dtype=dtype)), requires_grad=False)


def with_base(kind=Int8, dtype=torch.float32):
    """A frozen quantised base beside a head that is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    model[0].weight = quantised(0, kind, dtype)
    model[0].bias.requires_grad_(False)
    return model


def shares(one, other):
    return one[0].weight.rows.data_ptr() == other[0].weight.rows.data_ptr()


@torch.no_grad()
def train(model, value):
    for p in model.parameters():
        if p.requires_grad:
            p.fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Int8, Stubborn])
def test_a_frozen_quantised_base_is_shared_and_the_head_averaged(kind, dtype):
    model, x = with_base(kind, dtype), torch.randn(3, 4).to(dtype)
    with pytest.raises(NotImplementedError), torch.no_grad():
        model[0].weight.lerp_(model[0].weight, 0.5)  # else this test says nothing
    train(model, 0.0)
    ema = md.EMAWrapper(model, decay=0.5)
    assert shares(ema.module, model)
    assert ema.module[0].weight is not model[0].weight
    for value in (1.0, 2.0):
        train(model, value)
        ema.update(model)
    assert ema.module[1].weight.flatten().tolist() == [1.25] * 8
    assert ema.module[1].weight.dtype == torch.float32
    assert shares(ema.module, model)
    hidden = ema.module[0](x.float())
    torch.testing.assert_close(hidden, model[0](x).float(), rtol=0.02, atol=0.02)
    assert ema(x).shape == (3, 2)
    assert not any(p.requires_grad for p in ema.parameters())
    assert ema.step == 2


def test_a_base_that_changes_is_copied_at_the_next_update():
    def replace(model):
        model[0].weight = quantised(1)

    def exchange(model):
        torch.utils.swap_tensors(model[0].weight, quantised(1))

    def write(model):
        model[0].weight.copy_(quantised(1))

    def load(model):
        model.load_state_dict(model.state_dict() | {"0.weight": quantised(1)}, assign=True)

    for device in (None, "cpu"):
        for change in (replace, exchange, write, load):
            model = with_base()
            ema = md.EMAWrapper(model, decay=0.5, device=device, dtype=torch.float64)  # a scale of its own
            ema.update(model)
            with torch.no_grad():
                change(model)
            ema.update(model)
            assert torch.equal(ema.module[0].weight.rows, quantised(1).rows), change
            assert torch.equal(ema.module[0].weight.scale, quantised(1).scale.double()), change
            assert isinstance(ema.module[0].weight, nn.Parameter)


def test_a_shared_base_is_taken_anew_only_where_it_has_changed():
    model = with_base()
    ema = md.EMAWrapper(model, dtype=torch.float64)
    ema.update(model)
    base = ema.module[0].weight
    model.register_buffer("cache", torch.ones(3))
    for _ in range(2):
        ema.update(model)
        assert ema.module[0].weight is base
    model[0].weight.scale.mul_(2)
    ema.update(model)
    assert ema.module[0].weight.scale.tolist() == pytest.approx([0.02] * 4)


def test_swap_and_copy_to_with_a_quantised_base():
    model = with_base()
    train(model, 1.0)
    ema = md.EMAWrapper(model, decay=0.5)
    ema.update(model)
    old, x = model[0].weight, torch.randn(3, 4)
    model[0].weight = quantised(1)  # the average has the old one until the next update
    train(model, 2.0)
    own = list(model.parameters())
    expected = ema(x)
    for _ in range(2):
        with ema.swap(model), torch.no_grad():
            assert torch.equal(model(x), expected)
        assert all(now is before for now, before in zip(model.parameters(), own, strict=True))
        assert model[1].bias.tolist() == [2.0, 2.0]
    ema.copy_to(model)
    assert torch.equal(model[0].weight.rows, old.rows)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["wrapper", "parent"])
def test_loading_the_average_writes_nothing_into_the_base_of_the_model(inside):
    model = with_base()
    ema = md.EMAWrapper(model)
    ema.update(model)
    other = copy.deepcopy(ema.state_dict())
    other["module.0.weight"] = quantised(5).data
    rows = model[0].weight.rows.clone()
    if inside:
        nn.ModuleDict({"ema": ema}).load_state_dict({f"ema.{name}": value for name, value in other.items()})
    else:
        ema.load_state_dict(other)
    assert torch.equal(model[0].weight.rows, rows)
    assert torch.equal(ema.module[0].weight.rows, quantised(5).rows)
    ema.update(model)
    assert shares(ema.module, model)


def test_moving_and_copying_an_average_leaves_the_base_of_the_model_alone():
    model = with_base()
    ema = md.EMAWrapper(model)
    ema.update(model)
    base = model[0].weight
    for way in (copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))):
        twin = way(ema)
        twin.update(model)
        assert twin.step == 2
    parent = nn.ModuleDict({"online": model, "ema": ema})
    ema.to("meta")
    assert base.device.type == base.rows.device.type == "cpu"
    assert ema.module[0].weight.rows.device.type == "meta"
    assert sum(p is base for p in parent.parameters()) == 1
    ema.check_in_sync()


@pytest.mark.parametrize("buffers", ["copy", "frozen"])
def test_a_ready_teacher_gets_the_quantised_base_of_the_model(buffers):
    model, teacher = with_base(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    ema = md.EMAWrapper(model, decay=0.0, teacher=teacher, buffers=buffers)
    ema.update(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(ema(x), model(x))


def test_a_trained_weight_that_cannot_be_averaged_is_refused_by_name():
    message = r"^model: expected tensors that can be averaged or that require no gradient, got '0.weight' of type Int8$"
    model = with_base()
    model[0].weight.requires_grad_(True)
    with pytest.raises(TypeError, match=message):
        md.EMAWrapper(model)
    with pytest.raises(TypeError, match=message):
        md.EMAWrapper(model, teacher=with_base())
    model = with_base()
    ema = md.EMAWrapper(model)
    ema.update(model)
    model[0].weight.requires_grad_(True)
    with pytest.raises(TypeError, match=message):
        ema.update(model)
    assert not any(p.requires_grad for p in ema.parameters())


def test_a_quantised_buffer_is_copied_when_it_changes():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("table", quantised(0).data)
    for buffers in ("copy", "ema"):
        ema = md.EMAWrapper(model, buffers=buffers)
        for seed in (1, 2):
            model.table = quantised(seed).data
            ema.update(model)
            assert torch.equal(ema.module.table.rows, quantised(seed).rows)
        with ema.swap(model):
            assert torch.equal(model.table.rows, quantised(2).rows)
        ema.copy_to(model)
    with pytest.raises(TypeError, match=r"^model: expected tensors that can be averaged .*, got 'table' of type Int8"):
        md.EMAWrapper(model, buffers=["table"])


def test_a_frozen_quantised_buffer_is_lent_for_a_swap():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_buffer("table", quantised(0, Stubborn).data)
    ema = md.EMAWrapper(model, buffers="frozen")
    model.table = quantised(1, Stubborn).data
    ema.update(model)
    with ema.swap(model):
        assert torch.equal(model.table.rows, quantised(0).rows)
    assert torch.equal(model.table.rows, quantised(1).rows)
    assert torch.equal(ema.module.table.rows, quantised(0).rows)


def test_a_tied_quantised_weight_stays_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = model[1].weight = quantised(0)
    model.register_buffer("table", quantised(0, Stubborn).data)
    model[1].register_buffer("table", model.table)
    ema = md.EMAWrapper(model)
    for seed in (0, 1):
        model[0].weight = model[1].weight = quantised(seed)
        model.table = model[1].table = quantised(seed, Stubborn).data
        for online in (None, model):
            if online is not None:
                ema.update(online)
            assert ema.module[0].weight is ema.module[1].weight
            assert ema.module.table is ema.module[1].table
        assert torch.equal(ema.module[0].weight.rows, quantised(seed).rows)
        assert torch.equal(ema.module.table.rows, quantised(seed).rows)
    with ema.swap(model):
        assert model[0].weight is model[1].weight
        assert model.table is model[1].table


def test_a_frozen_expanded_parameter_which_nothing_can_be_written_to_is_shared():
    model = nn.Linear(2, 2)
    model.gain = nn.Parameter(torch.ones(1).expand(4), requires_grad=False)
    ema = md.EMAWrapper(model, decay=0.0)
    model.gain = nn.Parameter(torch.full((1,), 2.0).expand(4), requires_grad=False)
    ema.update(model)
    with ema.swap(model):
        assert model.gain.tolist() == [2.0] * 4
    assert ema.module.gain.tolist() == [2.0] * 4


# ---------------------------------------------------------------------------------------------
# Modules with nothing to average
# ---------------------------------------------------------------------------------------------


def scripted(model):
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(model)


def traced():
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))


def dynamically_quantised():
    with warnings.catch_warnings(action="ignore"):
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: scripted(nn.Linear(2, 2)), "RecursiveScriptModule$"),
        (lambda: nn.Sequential(nn.Linear(2, 2), scripted(nn.Linear(2, 2))), "RecursiveScriptModule as '1'$"),
        (traced, "TopLevelTracedModule$"),
        (lambda: nn.ReLU(), "ReLU without any"),
        (lambda: nn.Sequential(), "Sequential without any"),
        (dynamically_quantised, "Sequential without any"),
    ],
)
def test_a_module_with_nothing_to_average_is_a_type_error_that_says_so(make, got):
    with pytest.raises(TypeError, match=f"^model: expected .*, got {got}"):
        md.EMAWrapper(make())


def test_nothing_to_average_on_either_side_later():
    ema = md.EMAWrapper(nn.BatchNorm1d(2, affine=False))
    for make in (nn.Identity, dynamically_quantised):
        with pytest.raises(
            TypeError, match=r"^model: expected a module with parameters or buffers, got \w+ without any"
        ):
            ema.update(make())
    with pytest.raises(TypeError, match=r"^teacher: expected a module with parameters or buffers, got Identity"):
        md.EMAWrapper(nn.BatchNorm1d(2, affine=False), teacher=nn.Identity())
    with pytest.raises(TypeError, match=r"^teacher: expected .* no torch.jit.ScriptModule, got RecursiveScriptModule"):
        md.EMAWrapper(nn.Linear(2, 2), teacher=scripted(nn.Linear(2, 2)))
    assert ema.module.running_mean.tolist() == [0.0, 0.0]


def test_a_model_that_is_scripted_later_still_updates_its_average():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = md.EMAWrapper(model, decay=0.5)
    script = scripted(copy.deepcopy(model))
    with torch.no_grad():
        script[0].weight.fill_(2.0)
    before = ema.module[0].weight.clone()
    ema.update(script)
    ema.update(script)
    torch.testing.assert_close(ema.module[0].weight, 0.25 * before + 1.5)
    with ema.swap(script):
        assert torch.equal(script[0].weight, ema.module[0].weight)
    assert script[0].weight.flatten().tolist() == [2.0] * 4


# ---------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------


def tapped(register="register_forward_hook", wrap=lambda hook: hook, **options):
    """A model with a hook that leaves what it sees in a dictionary, and the dictionary."""
    model, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}

    def tap(name, *seen_by_hook):
        seen[name] = seen_by_hook[-1]

    getattr(model[0], register)(wrap(functools.partial(tap, "features")), **options)
    return model, seen


WRAPPINGS = {
    "partial": lambda hook: hook,
    "function": lambda hook: lambda *args: hook(*args),
    "partial of a function": lambda hook: functools.partial(lambda *args: hook(*args[1:]), "first"),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("options", [{}, {"always_call": True}, {"prepend": True}], ids=str)
def test_a_tap_on_the_model_sees_the_model_alone(wrap, options):
    model, seen = tapped(wrap=wrap, **options)
    model(torch.ones(1, 2))  # features with a graph, which no deepcopy takes
    ema, x = md.EMAWrapper(model), torch.randn(3, 2)
    model(x)
    features = seen["features"]
    assert features.requires_grad
    ema(2 * x)
    assert seen["features"] is features
    assert len(model[0]._forward_hooks) == 1
    average_sees = {}
    ema.module[0].register_forward_hook(lambda *args: average_sees.update(features=args[-1]))
    ema(2 * x)
    assert seen["features"] is features
    assert torch.equal(average_sees["features"], ema.module[0](2 * x))


def test_hooks_that_are_kept_fire_for_both():
    model, seen = tapped(wrap=WRAPPINGS["function"], with_kwargs=True)
    for hooks, expected in (("drop", {}), ("keep", {"features"})):
        ema = md.EMAWrapper(model, hooks=hooks)
        seen.clear()
        ema(torch.ones(1, 2))
        assert seen.keys() == set(expected), hooks
    with pytest.raises(ValueError, match=r"^hooks: expected one of 'drop', 'keep', got 'none'"):
        md.EMAWrapper(model, hooks="none")


def test_hooks_of_a_ready_teacher_are_its_own():
    teacher, seen = tapped()
    md.EMAWrapper(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), teacher=teacher)(torch.ones(1, 2))
    assert seen


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_taps_on_gradients_do_not_come_along(register):
    model, _ = tapped(register)
    ema = md.EMAWrapper(model)
    assert not any(m._backward_hooks or m._backward_pre_hooks for m in ema.modules())
    assert model[0]._backward_hooks or model[0]._backward_pre_hooks


class Hooked(nn.Module):
    """A model that works by its own hooks, which a copy has to have: bound to the copy."""

    def __init__(self, partial):
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.features = {}
        self.lin.register_forward_hook(functools.partial(self.keep, "lin") if partial else self.keep_lin)
        self.lin.register_forward_pre_hook(lambda _, args: (args[0] * 2,))  # part of what it computes

    def keep(self, name, *seen):
        self.features[name] = seen[-1]

    def keep_lin(self, *args):
        self.keep("lin", *args)

    def forward(self, x):
        self.lin(x)
        return self.features["lin"]


@pytest.mark.parametrize("partial", [False, True])
def test_hooks_that_a_model_works_by_work_in_the_average_on_its_own_state(partial):
    model, x = Hooked(partial), torch.randn(3, 2)
    ema = md.EMAWrapper(model)
    expected = model(x)
    assert torch.equal(ema(x), expected)
    ema(3 * x)
    assert model.features["lin"] is expected


def old_norms():
    with warnings.catch_warnings(action="ignore", category=FutureWarning), torch.no_grad():
        yield nn.utils.weight_norm(nn.Linear(2, 2))
        yield nn.utils.spectral_norm(nn.Linear(2, 2))
        yield nn.utils.weight_norm(nn.LSTM(2, 2), "weight_hh_l0")
        yield prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=2)


@torch.no_grad()
def test_hooks_that_make_the_weights_stay():
    for model in old_norms():
        ema = md.EMAWrapper(model, decay=0.0)
        for p in model.parameters():
            p.mul_(1.5)
        ema.update(model)
        x = torch.randn(3, 2)
        model.eval()
        ours, theirs = ema(x), model(x)
        assert torch.equal(*(out[0] if isinstance(out, tuple) else out for out in (ours, theirs))), type(model)


def test_hooks_of_fake_quantisation_stay():
    from torch.ao import quantization

    with warnings.catch_warnings(action="ignore"):
        model = nn.Sequential(nn.Linear(4, 4))
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        model = quantization.prepare_qat(model.train())
    x = torch.randn(8, 4)
    model(x)
    ema = md.EMAWrapper(model)
    ema.update(model)
    assert torch.equal(ema(x), model(x).detach())
    assert len(ema(x).unique()) < 32  # quantised, or there would be as many as numbers


# ---------------------------------------------------------------------------------------------
# An average that nobody updates
# ---------------------------------------------------------------------------------------------

TOLD = (
    r"^EMAWrapper was called 500 times in training and never updated: call update\(model\) after each optimizer step, "
    r"or pass decay=1.0 if it is to stay as it is$"
)


def called(ema, model, calls, *, grad, steps, fused=False):
    """Calls of the average, beside a training of the model or none, as if by an optimizer."""
    optimizer, x = torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused), torch.ones(1, 2)
    model(x).sum().backward()
    for _ in range(calls):
        with torch.set_grad_enabled(grad):
            ema(x)
        if steps:
            optimizer.step()


@pytest.mark.parametrize(
    ("grad", "steps", "mode"), [(True, False, True), (True, True, True), (False, True, True), (True, True, False)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_an_average_that_is_used_in_training_and_never_updated_is_told_of_once(grad, steps, mode, fused):
    model = nn.Linear(2, 2).train(mode)
    ema = md.EMAWrapper(model)
    with warnings.catch_warnings(action="error"):
        called(ema, model, 500, grad=grad, steps=steps, fused=fused)
    with pytest.warns(UserWarning, match=TOLD) as told:
        called(ema, model, 1500, grad=grad, steps=steps, fused=fused)
    assert len(told) == 1
    assert told[0].filename == __file__


def test_an_average_that_is_updated_or_meant_to_stay_or_only_evaluated_is_not_told_of():
    def updated(model):
        ema = md.EMAWrapper(model)
        ema.update(model)
        return ema

    def loaded(model):
        ema = md.EMAWrapper(model)
        ema.load_state_dict(updated(model).state_dict())
        return ema

    with warnings.catch_warnings(action="error"):
        for make in (
            updated,
            loaded,
            lambda model: copy.deepcopy(updated(model)),
            lambda model: pickle.loads(pickle.dumps(updated(model))),
            lambda model: md.EMAWrapper(model, decay=1.0),
            lambda model: md.EMAWrapper(model, decay=1, teacher=nn.Linear(2, 2)),
        ):
            model = nn.Linear(2, 2)
            called(make(model), model, 600, grad=True, steps=True)
        model = nn.Linear(2, 2)
        for each in (md.EMAWrapper(model), copy.deepcopy(md.EMAWrapper(model))):
            called(each, model, 600, grad=False, steps=False)  # an evaluation
        called(md.EMAWrapper(model.eval()), model, 600, grad=True, steps=False)  # and one that does not say so
        ema = md.EMAWrapper(nn.Linear(2, 2))  # its model is gone
        called(ema, model, 600, grad=False, steps=True)
        for _ in range(100):  # each its own
            called(md.EMAWrapper(model), model, 1, grad=True, steps=True)


def test_the_watch_on_updates_leaves_compiled_code_alone():
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    ema = md.EMAWrapper(model, decay=0.5)
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph

    step = torch.compile(lambda x: (model(x) - ema(x)).sum(), backend=backend, fullgraph=True)
    for _ in range(4):
        step(x).backward()
        ema.update(model)
    assert len(seen) == 1
    assert not any(node.op == "call_function" and "version" in str(node.target) for node in seen[0].graph.nodes)


def test_an_update_may_be_compiled_with_a_single_thread():
    model = nn.Linear(2, 2)
    ema = md.EMAWrapper(model, decay=0.75)
    nn.init.constant_(ema.module.weight, 0.0)
    nn.init.constant_(model.weight, 1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.compile(lambda: ema.update(model), backend="aot_eager")()
    finally:
        torch.set_num_threads(threads)
    assert ema.module.weight.unique().tolist() == [0.25]
