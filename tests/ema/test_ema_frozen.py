"""EMAWrapper(share_frozen=True): the average has what is frozen in common with the model, and averages the rest."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import momentum_distill as md
from module_state import assert_same_state, clone_state


class LoRA(nn.Module):
    """A frozen linear layer with a trained correction of low rank, in float32 whatever the layer has."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float32)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x):
        out = self.base(x)
        return out + self.up(self.down(x.to(self.down.weight.dtype))).to(out.dtype)


class Tagger(nn.Module):
    """A frozen encoder with everything that is awkward about one, and a trained head."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.encoder = nn.LSTM(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.back = nn.Linear(4, 5, bias=False)
        self.back.weight = self.words.weight
        self.requires_grad_(False)
        self.head = LoRA(nn.Linear(4, 4))

    def forward(self, words):
        hidden, _ = self.encoder(self.words(words))
        return self.back(self.head(self.norm(hidden.flatten(0, 1))))


WORDS = torch.tensor([[0, 1], [2, 3], [4, 0]]).T


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lora():
    return nn.Sequential(LoRA(nn.Linear(4, 4)), nn.ReLU(), LoRA(nn.Linear(4, 3)))


def is_one(one, other):
    return one.data_ptr() == other.data_ptr()


def shared(model, ema):
    """The names of the parameters that are one memory."""
    own = dict(ema.module.named_parameters(remove_duplicate=False))
    return {name for name, p in model.named_parameters(remove_duplicate=False) if is_one(p, own[name])}


def frozen(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def step(model):
    """An optimizer step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype))


@pytest.mark.parametrize("make", [lora, Tagger])
def test_what_is_frozen_is_one_memory_and_the_average_is_the_same(make):
    model = make()
    ema, whole = md.EMAWrapper(model, decay=0.5, share_frozen=True), md.EMAWrapper(model, decay=0.5)
    assert shared(model, ema) == frozen(model) != set()
    assert not shared(model, whole)
    for _ in range(3):
        step(model)
        ema.update(model)
        whole.update(model)
    assert shared(model, ema) == frozen(model)
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert not any(mine is parameter for mine in ema.parameters() for parameter in model.parameters())
    for (name, value), (other, expected) in zip(ema.state_dict().items(), whole.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, expected), name
    x = WORDS if make is Tagger else torch.randn(2, 4)
    assert torch.equal(ema(x), whole(x))


@pytest.mark.parametrize("average_first", [False, True])
def test_model_and_average_in_one_file_of_safetensors(average_first, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            model = lora()
            average = md.EMAWrapper(model, share_frozen=True)
            parts = {"model": model, "average": average}
            for name in sorted(parts, reverse=not average_first):
                self.add_module(name, parts[name])

    saved, loaded = Whole(), Whole()
    step(saved.model)
    saved.average.update(saved.model)
    assert shared(saved.model, saved.average) == frozen(saved.model)
    safetensors.save_file(saved.state_dict(), tmp_path / "file")
    safetensors.save_model(saved, tmp_path / "model")
    safetensors.load_model(loaded, tmp_path / "model")
    for name, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert is_one(saved.average.state_dict()["module.0.base.weight"], saved.model[0].base.weight)  # by itself, no copy


def test_an_update_does_not_touch_what_is_shared():
    class Touched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            places.update(x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    model, places = lora(), set()
    ema = md.EMAWrapper(model, share_frozen=True)
    ema.update(model)
    with Touched():
        ema.update(model)
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert trained <= places
    assert not places & {p.data_ptr() for p in model.parameters() if not p.requires_grad}


def test_what_is_written_into_the_model_is_there_in_the_average():
    model, x = lora(), torch.randn(2, 4)
    ema = md.EMAWrapper(model, share_frozen=True)
    model.load_state_dict({name: torch.ones_like(value) for name, value in model.state_dict().items()})
    assert bool((ema.module[0].base.weight == 1).all())
    ema.update(model, decay=0)
    assert torch.equal(ema(x), model(x))


def replace(model):
    model[0].base.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)


def give_data(model):
    model[0].base.weight.data = torch.randn(4, 4)


def cast_there_and_back(model):
    model.double().float()


def assign(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    model[0].base.requires_grad_(False)
    model[2].base.requires_grad_(False)


def transpose(model):
    model[0].base.weight.data = model[0].base.weight.data.T


@pytest.mark.parametrize("change", [replace, give_data, cast_there_and_back, assign, transpose])
def test_what_was_replaced_is_taken_anew_at_the_next_update(change):
    model, x = lora(), torch.randn(2, 4)
    ema = md.EMAWrapper(model, decay=0.5, share_frozen=True)
    ema.update(model)
    change(model)
    assert change is transpose or shared(model, ema) != frozen(model)  # else this test says nothing
    for _ in range(2):
        ema.update(model)
        assert shared(model, ema) == frozen(model)
    ema.update(model, decay=0)
    assert torch.equal(ema(x), model(x))


def test_the_average_too_may_be_moved_and_is_one_with_the_model_after_the_next_update():
    model = Tagger()
    both = nn.ModuleList([model, md.EMAWrapper(model, share_frozen=True)])
    both.double().float()
    assert not shared(model, both[1])
    both[1].update(model)
    assert shared(model, both[1]) == frozen(model)
    assert all(map(is_one, model.encoder._flat_weights, both[1].module.encoder._flat_weights))
    assert both[1].module.back.weight is both[1].module.words.weight


def test_on_another_device_the_average_has_its_own():
    model = lora()
    ema = md.EMAWrapper(model, device="meta", share_frozen=True)
    ema.update(model)
    assert all(parameter.is_meta for parameter in ema.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_average_without_numbers_gets_them_from_a_state(dtype):
    def model():
        return nn.Sequential(nn.Linear(2, 2).to(dtype).requires_grad_(False), nn.Linear(2, 2))

    source = md.EMAWrapper(model(), share_frozen=True)
    with torch.device("meta"):
        ema = md.EMAWrapper(model(), share_frozen=True)
    ema.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert_same_state(clone_state(ema.module), clone_state(source.module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_trained_later_is_averaged_from_then_on(dtype):
    model = nn.Sequential(LoRA(nn.Linear(4, 4).to(dtype)), nn.ReLU(), LoRA(nn.Linear(4, 3).to(dtype)))
    ema = md.EMAWrapper(model, decay=0.75, share_frozen=True)
    ema.update(model)
    model[2].base.weight.requires_grad_(True)
    for value in (1.0, 2.0):
        nn.init.constant_(model[2].base.weight, value)
        ema.update(model)
    weight = ema.module[2].base.weight
    assert weight.dtype == torch.float32
    assert not weight.requires_grad
    assert weight.unique().tolist() == [1.25]  # from 1.0, where it was when it was found to be trained
    assert shared(model, ema) == frozen(model)

    model[2].base.weight.requires_grad_(False)  # what was averaged once stays an average
    ema.update(model)
    assert ema.module[2].base.weight.unique().tolist() == [1.4375]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_lay_apart_or_elsewhere_in_16_bits_is_averaged_in_32(device):
    model = nn.Sequential(nn.Linear(2, 2).bfloat16().requires_grad_(False), nn.Linear(2, 2))
    ema = md.EMAWrapper(model, decay=0.5, share_frozen=True, device=device)
    ema.update(model)
    if device == "cpu":
        ema.load_state_dict(ema.state_dict())  # after which it has its own
    model[0].requires_grad_(True)
    ema.update(model)
    assert all(parameter.dtype == torch.float32 for parameter in ema.parameters())


def test_what_became_a_buffer_is_copied():
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    ema = md.EMAWrapper(model, share_frozen=True)
    weight = model[0].weight.detach() + 1
    del model[0].weight
    model[0].register_buffer("weight", weight)
    ema.update(model, decay=0.0)
    assert torch.equal(ema.module[0].weight, weight)
    assert not is_one(ema.module[0].weight, weight)


def test_a_swap_while_something_is_trained_for_a_moment_changes_nothing():
    model = lora()
    ema = md.EMAWrapper(model, share_frozen=True)
    replace(model)
    model[0].base.weight.requires_grad_(True)
    with ema.swap(model):
        pass
    model[0].base.weight.requires_grad_(False)
    ema.update(model)
    assert shared(model, ema) == frozen(model)


def test_a_swap_before_the_update_does_not_hide_what_is_trained():
    model = lora()
    ema = md.EMAWrapper(model, decay=0.5, share_frozen=True)
    replace(model)
    model[0].base.weight.requires_grad_(True)
    nn.init.ones_(model[0].base.weight)
    with ema.swap(model):
        pass
    ema.update(model)
    model[0].base.weight.requires_grad_(False)
    nn.init.zeros_(model[0].base.weight)
    model[2].up = nn.Linear(2, 3, bias=False)  # something else that is to be looked at anew
    ema.update(model, decay=1.0)
    assert not bool((ema.module[0].base.weight == 0).any())


def test_loading_writes_nothing_into_the_model():
    model = Tagger()
    before = copy.deepcopy(model.state_dict())
    ema = md.EMAWrapper(model, share_frozen=True)
    ema.load_state_dict({name: value + 1 for name, value in ema.state_dict().items()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(ema.module.words.weight, model.words.weight + 1)
    assert ema.module.back.weight is ema.module.words.weight
    ema.update(model)
    assert shared(model, ema) == frozen(model)
    assert torch.equal(ema.module.words.weight, model.words.weight)


def test_an_average_that_was_loaded_keeps_what_the_model_trains_by_now():
    model = lora()
    ema = md.EMAWrapper(model, decay=0.5, share_frozen=True)
    ema.load_state_dict(
        {name: value * 0 for name, value in ema.state_dict().items() if "extra" not in name}, strict=False
    )
    model[0].base.weight.requires_grad_(True)
    nn.init.ones_(model[0].base.weight)
    ema.update(model)
    assert ema.module[0].base.weight.unique().tolist() == [0.5]


def test_a_copy_and_a_pickle_are_one_with_the_model_after_an_update():
    model = lora()
    ema = md.EMAWrapper(model, share_frozen=True)
    file = io.BytesIO()
    torch.save((model, ema), file)
    file.seek(0)
    loaded, its_ema = torch.load(file, weights_only=False)
    assert shared(loaded, its_ema) == frozen(loaded)
    again, again_ema = copy.deepcopy((model, ema))
    for one, average in ((loaded, its_ema), (again, again_ema), (model, ema)):
        step(one)
        average.update(one)
        assert shared(one, average) == frozen(one)
    assert not shared(model, its_ema) | shared(model, again_ema)


def test_swap_and_copy_to():
    model, x = lora(), torch.randn(2, 4)
    ema = md.EMAWrapper(model, decay=0.5, share_frozen=True)
    step(model)
    ema.update(model)
    before, expected = copy.deepcopy(model.state_dict()), ema(x)
    with ema.swap(model):
        assert torch.equal(model(x), expected)
        assert shared(model, ema) == frozen(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = lora()
    ema.copy_to(other)
    assert torch.equal(other(x), expected)
    assert not shared(other, ema)
    assert frozen(other) == frozen(model)
    ema.copy_to(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("inside", [nn.Module.bfloat16, give_data, cast_there_and_back])
def test_what_is_cast_or_exchanged_inside_swap_is_the_model_s_own_afterwards(inside):
    model = lora()
    ema = md.EMAWrapper(model, share_frozen=True)
    before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with ema.swap(model):
        inside(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert [p.data_ptr() for p in model.parameters()] == places
    assert shared(model, ema) == frozen(model)


def test_a_swap_with_a_model_that_was_moved_since_the_last_update():
    model, x = lora(), torch.randn(2, 4)
    ema = md.EMAWrapper(model, share_frozen=True)
    expected = ema(x)
    replace(model)
    before = copy.deepcopy(model.state_dict())
    with ema.swap(model):
        assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_update_by_another_model_shares_with_that():
    model, other = lora(), lora()
    ema = md.EMAWrapper(model, share_frozen=True)
    for one in (other, model, other):
        ema.update(one)
        assert shared(one, ema) == frozen(one)


def test_a_base_of_16_bits_keeps_them_and_gets_inputs_as_they_come():
    model, x = nn.Sequential(LoRA(nn.Linear(4, 4).bfloat16())), torch.randn(2, 4, dtype=torch.bfloat16)
    ema = md.EMAWrapper(model, decay=0.5, share_frozen=True)
    assert shared(model, ema) == frozen(model)
    assert ema(x).dtype == torch.bfloat16
    assert torch.equal(ema(x), model(x))
    ema.load_state_dict(ema.state_dict())
    assert torch.equal(ema(x), model(x))
    wide = md.EMAWrapper(lora(), share_frozen=True)
    assert wide(torch.randn(2, 4).bfloat16()).dtype == torch.float32  # as without the option


class Encoded(nn.Module):
    """A frozen encoder in 16 bits, with buffers of its own and of what has no parameter, and a trained head in 32."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Identity()).bfloat16()
        self.encoder[2].register_buffer("place", torch.ones(4, dtype=torch.bfloat16))
        self.encoder.requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.head((self.encoder(x) + self.encoder[2].place).float())


def test_buffers_of_what_is_frozen_in_16_bits_keep_them():
    model, x = Encoded().eval(), torch.randn(3, 4, dtype=torch.bfloat16)
    ema = md.EMAWrapper(model, share_frozen=True)
    for _ in range(2):
        assert torch.equal(ema(x), model(x))
        assert [b.dtype for b in ema.module.buffers()] == [b.dtype for b in model.buffers()]
        model.encoder[2].place = torch.ones(1, 4, dtype=torch.bfloat16)  # of another shape
        ema.update(model)
    ema.float()  # a user's own cast lasts until the next update
    ema.update(model)
    assert [b.dtype for b in ema.module.buffers()] == [b.dtype for b in model.buffers()]
    model.encoder[1].requires_grad_(True)
    ema.update(model)
    norm = ema.module.encoder[1]
    assert {norm.weight.dtype, norm.running_mean.dtype} == {torch.float32}


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_call():
    model, x = lora(), torch.randn(2, 4)
    ema = md.EMAWrapper(model, share_frozen=True)
    assert torch.equal(torch.compile(ema, backend="eager", fullgraph=True)(x), ema(x))


def test_wrappers_around_the_model_do_not_matter():
    model = lora()
    wrapped = nn.DataParallel(model)
    ema = md.EMAWrapper(wrapped, share_frozen=True)
    assert shared(model, ema) == frozen(model)
    ema.update(wrapped)
    ema.update(torch.compile(model, backend="eager"))
    assert shared(model, ema) == frozen(model)


def test_several_averages_share_with_the_model_and_so_with_one_another():
    model = lora()
    averages = md.EMADict(model, {"fast": 0.5, "slow": 0.75}, share_frozen=True)
    whole = md.EMADict(model, {"fast": 0.5, "slow": 0.75})
    for change in (step, step, cast_there_and_back, step):
        change(model)
        averages.update(model)
        whole.update(model)
    for name in averages:
        assert shared(model, averages[name]) == frozen(model)
        for value, expected in zip(averages[name].parameters(), whole[name].parameters(), strict=True):
            assert torch.equal(value, expected)
    model[0].base.requires_grad_(True)
    step(model)
    averages.update(model)
    assert shared(model, averages["fast"]) == shared(model, averages["slow"]) == frozen(model)
