"""Averages within Lightning, transformers and Accelerate, each framework run for a few steps."""

import copy
import doctest
import importlib
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import get_type_hints

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import momentum_distill as md
from pinned import read_lines
from public_names import PINNED, found

pytestmark = [
    pytest.mark.xdist_group("integrations"),  # so that one process imports the frameworks
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),  # within Lightning
    pytest.mark.filterwarnings("ignore:Found .* in eval mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

FRAMEWORKS = ("lightning", "transformers", "accelerate")
DECAY = 0.8
ROWS, BATCH = 48, 4  # twelve batches in an epoch


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: int = ROWS) -> None:
        self.x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[row], "labels": self.x[row, :2]}


class Net(nn.Module):
    """Two layers, factors and statistics; it notes the weights that it is evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.fuse = md.MomentumFusionFactors(["body"])
        self.seen: list[torch.Tensor] = []
        self.fail = False

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training:
            self.seen.append(self.head.weight.detach().clone())
            if self.fail:
                raise OSError("while it is evaluated")
        logits = self.head(self.fuse({"body": self.body(x)})["body"])
        return {"loss": F.mse_loss(logits, labels), "logits": logits}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def loaded(module: nn.Module, state: dict) -> md.EMAWrapper:
    """A new average with this state."""
    ema = md.EMAWrapper(module)
    ema.load_state_dict(state)
    return ema


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Record:
    """The model after each step of the optimizer, and by them the average that there should be."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net, self.steps, self.average = net, 0, net.head.weight.detach().double().clone()
        self.history = [self.average]
        optimizer.register_step_post_hook(self)

    def __call__(self, *_: object) -> None:
        self.steps += 1
        self.average = DECAY * self.average + (1 - DECAY) * self.net.head.weight.detach().double()
        self.history.append(self.average)


# ------------------------------------------------------------------------------------------------ Lightning


def lightning_module(flavour: str = "lightning.pytorch"):
    pl = importlib.import_module(flavour)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            del index
            return self.net(**batch)["loss"]

        def validation_step(self, batch, index):
            del index
            self.log("val", self.net(**batch)["loss"])

        test_step = validation_step

        def predict_step(self, batch, index):
            del index
            return self.net(**batch)["logits"]

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
            self.record = Record(self.net, optimizer)
            return optimizer

    return Module()


def lightning_trainer(callbacks, out=None, flavour: str = "lightning.pytorch", **options):
    pl = importlib.import_module(flavour)
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=out is not None,
        default_root_dir=out,
        **options,
    )


def loader() -> DataLoader:
    return DataLoader(Rows(), batch_size=BATCH, generator=torch.Generator())


@pytest.fixture
def lightning_callback():
    pytest.importorskip("lightning")
    from momentum_distill.integrations.lightning import EMACallback

    return EMACallback


@pytest.mark.parametrize("flavour", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_moves_the_average_once_in_a_step(lightning_callback, flavour):
    pytest.importorskip(flavour)
    module = lightning_module(flavour)
    callback = lightning_callback(module.net, decay=DECAY, also=[module.net.fuse])
    trainer = lightning_trainer([callback], flavour=flavour, max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(module, loader())
    assert callback.ema.step == module.record.steps == 4
    torch.testing.assert_close(callback.ema.module.head.weight.double(), module.record.average, rtol=0, atol=1e-6)
    assert module.net.fuse.factors()["body"] != 1
    assert torch.equal(callback.ema.module.fuse.average, module.net.fuse.average)  # which moved first
    module.record.steps = 0
    trainer.optimizers[0].step()  # a loop that goes on elsewhere is none of its business
    assert (module.record.steps, callback.ema.step) == (1, 4)


def test_lightning_evaluates_with_the_average(lightning_callback):
    callback, module = lightning_callback(decay=DECAY, swap=True), lightning_module()
    trainer = lightning_trainer([callback], max_epochs=2, val_check_interval=5, num_sanity_val_steps=1)
    averages, own = [], []
    pl = importlib.import_module("lightning.pytorch")

    class Look(pl.Callback):
        def on_validation_batch_start(self, *_):
            averages.append(callback.ema.module.net.head.weight.clone() if callback._following.ema else None)

        def on_validation_end(self, _, pl_module):
            own.append(pl_module.net.head.weight.detach().clone())

    trainer.callbacks.append(Look())
    trainer.fit(module, loader(), loader())
    assert module.net.training
    assert averages[0] is None
    pairs = list(zip(module.net.seen, averages, strict=True))[1:]
    assert len(pairs) == 12 * 4
    assert all(torch.equal(seen, average) for seen, average in pairs)
    assert all(not torch.equal(seen, weight) for seen, weight in zip(module.net.seen[12::12], own[1:], strict=False))
    assert all(not tensor.is_inference() for tensor in [*module.parameters(), *module.buffers()])
    before = weights(module)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        module.net.seen.clear()
        evaluate(module, loader())
        assert all(torch.equal(seen, callback.ema.module.net.head.weight) for seen in module.net.seen)
        assert same(weights(module), before)
    module.net.fail = True
    with pytest.raises(OSError, match="while it is evaluated"):
        trainer.validate(module, loader())
    assert same(weights(module), before)
    module.net.fail = False
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader(), loader())  # it can be trained further
    assert callback.ema.step == 36
    with pytest.warns(UserWarning, match="got a Module without: it is evaluated with its own weights"):
        trainer.validate(lightning_module(), loader())


def test_lightning_resumes_to_the_same_bits(lightning_callback, tmp_path):
    pl = importlib.import_module("lightning.pytorch")

    class SaveAsWell(pl.Callback):
        def on_validation_epoch_end(self, trainer, _):
            trainer.save_checkpoint(tmp_path / "meanwhile.ckpt")

    def run(epochs, ckpt=None, callbacks=()):
        module = lightning_module()
        callback = lightning_callback(module.net, decay=DECAY, also=[module.net.fuse], swap=True)
        saver = pl.callbacks.ModelCheckpoint(
            tmp_path, "{epoch}", monitor="val", save_top_k=-1, enable_version_counter=False
        )
        options = {"max_epochs": epochs, "accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
        trainer = lightning_trainer([callback, *callbacks, saver], tmp_path, **options)
        trainer.fit(module, loader(), loader(), ckpt_path=ckpt, weights_only=True)
        return trainer, callback, module

    _, _, first = run(1, callbacks=[SaveAsWell()])
    for name in ("epoch=0.ckpt", "meanwhile.ckpt"):  # saved after a validation and within it: the weights are its own
        saved = torch.load(tmp_path / name, weights_only=True)
        assert same(saved["state_dict"], weights(first))
        assert int(saved["callbacks"]["EMACallback{'name': 'ema'}"]["_extra_state"]) == 4
    _, callback, module = run(3)
    trainer, again, resumed = run(3, tmp_path / "epoch=0.ckpt")
    assert again.ema.step == callback.ema.step == 12
    assert same(weights(again.ema), weights(callback.ema))
    assert same(weights(resumed), weights(module))
    state = torch.load(tmp_path / "epoch=2.ckpt")["callbacks"]["EMACallback{'name': 'ema'}"]  # docs/api/integrations.md
    assert same(weights(loaded(Net(), state)), weights(callback.ema))
    other = lightning_module()
    fresh = lightning_callback(other.net, decay=DECAY, swap=True)
    trainer = lightning_trainer([fresh])
    trainer.test(other, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True)
    assert all(torch.equal(seen, callback.ema.module.head.weight) for seen in other.net.seen)
    assert same(weights(other), weights(module))


def test_lightning_says_that_a_checkpoint_has_no_average(lightning_callback, tmp_path):
    trainer = lightning_trainer([], tmp_path, max_epochs=1)
    trainer.fit(lightning_module(), loader())
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    again = lightning_trainer([lightning_callback()], max_epochs=2)
    with pytest.warns(UserWarning, match="without.ckpt has no average to go on with: it begins anew"):
        again.fit(lightning_module(), loader(), ckpt_path=tmp_path / "without.ckpt", weights_only=True)


def test_lightning_warns_of_each_checkpoint_without_an_average(lightning_callback, tmp_path):
    for callbacks, name in (([], "without"), ([lightning_callback(decay=DECAY)], "with")):
        trainer = lightning_trainer(callbacks, tmp_path, max_epochs=1)
        trainer.fit(lightning_module(), loader())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    trainer = lightning_trainer([lightning_callback(decay=DECAY)], max_epochs=2)
    trainer.fit(lightning_module(), loader(), ckpt_path=tmp_path / "with.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="without.ckpt has no average to go on with"):
        trainer.fit(lightning_module(), loader(), ckpt_path=tmp_path / "without.ckpt", weights_only=True)


def test_lightning_puts_the_averages_of_two_parts_in_their_places_and_saves_neither(lightning_callback, tmp_path):
    pl = importlib.import_module("lightning.pytorch")
    module = lightning_module()
    parts = {"body": module.net.body, "head": module.net.head}
    callbacks = {name: lightning_callback(part, decay=DECAY, swap=True, name=name) for name, part in parts.items()}
    found = []

    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, _):
            found.append(all(same(weights(parts[name]), weights(callbacks[name].ema.module)) for name in parts))
            trainer.save_checkpoint(tmp_path / "meanwhile.ckpt")

    options = {"max_epochs": 1, "num_sanity_val_steps": 0}
    trainer = lightning_trainer([*callbacks.values(), Look()], tmp_path, **options)
    trainer.fit(module, loader(), loader())
    assert found == [True]
    saved = torch.load(tmp_path / "meanwhile.ckpt", weights_only=True)["state_dict"]
    assert same(saved, weights(module))
    torch.testing.assert_close(callbacks["head"].ema.module.weight.double(), module.record.average, rtol=0, atol=1e-6)
    assert not torch.equal(callbacks["head"].ema.module.weight, module.net.head.weight)


def test_two_averages_do_not_take_the_place_of_the_same_weights(lightning_callback, make_trainer, trainer_callback):
    error = "swap: expected True for one average of the same weights, which alone can be in their place, got two"
    module = lightning_module()
    callbacks = [lightning_callback(swap=True), lightning_callback(module.net.head, swap=True, name="head")]
    with pytest.raises(ValueError, match=error):
        lightning_trainer(callbacks, max_epochs=1).fit(module, loader(), loader())
    callbacks[1] = lightning_callback(module.net.head, name="head")
    lightning_trainer(callbacks, max_epochs=1).fit(module, loader(), loader())
    assert callbacks[0].ema.step == callbacks[1].ema.step == 12

    trainer = make_trainer(Net(), max_steps=1)
    for name in ("one", "two"):
        trainer.add_callback(trainer_callback(trainer, swap=True, name=name))
    with pytest.raises(ValueError, match=error):
        trainer.train()


def test_lightning_saves_an_average_inside_the_module_once(lightning_callback):
    module = lightning_module()
    module.momentum = md.EMAWrapper(module.net, decay=DECAY)
    callbacks = [lightning_callback(ema=module.momentum), lightning_callback(module.net.head, name="head", decay=DECAY)]
    trainer = lightning_trainer(callbacks, max_epochs=1)
    trainer.fit(module, loader())
    assert callbacks[0].ema is module.momentum
    assert module.momentum.step == callbacks[1].ema.step == 12
    assert same(weights(module.momentum.module.head), weights(callbacks[1].ema.module))
    assert callbacks[0].state_dict() == {}


def test_lightning_follows_the_last_optimizer_that_trains_the_model_and_no_skipped_step(lightning_callback):
    pl = importlib.import_module("lightning.pytorch")
    module = lightning_module()
    module.automatic_optimization = False

    def configure_optimizers():
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (module.net.head, module.net.body)]

    def training_step(batch, batch_idx):
        head, body = module.optimizers()
        loss = module.net(**batch)["loss"] * (float("inf") if batch_idx == 3 else 1)
        module.manual_backward(loss)
        for optimizer in (head, body) if batch_idx % 2 else (head,):
            optimizer.step()
            optimizer.zero_grad()

    module.configure_optimizers, module.training_step = configure_optimizers, training_step
    callbacks = [lightning_callback(decay=DECAY), lightning_callback(module.net.head, name="head", decay=DECAY)]
    amp = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    lightning_trainer(callbacks, max_epochs=1, plugins=[amp]).fit(module, loader())
    assert [callback.ema.step for callback in callbacks] == [5, 11]


# --------------------------------------------------------------------------------------------- transformers


@pytest.fixture
def make_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(net=None, *, out=tmp_path / "run", optimizer=None, **options):
        net = net or Net()
        settings = {
            "output_dir": str(out),
            "use_cpu": True,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "gradient_accumulation_steps": 3,
            "learning_rate": 0.05,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "label_names": ["labels"],
        }
        arguments = transformers.TrainingArguments(**settings | options)
        data = {"train_dataset": Rows(), "eval_dataset": {"one": Rows(8), "two": Rows(12)}}
        return transformers.Trainer(net, arguments, **data, optimizers=(optimizer, None))

    return make


@pytest.fixture
def trainer_callback():
    pytest.importorskip("transformers")
    from momentum_distill.integrations.transformers import EMACallback

    return EMACallback


def test_trainer_moves_the_average_once_in_a_step_and_evaluates_with_it(make_trainer, trainer_callback):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    record = Record(net, optimizer)
    trainer = make_trainer(net, optimizer=optimizer, num_train_epochs=2, eval_strategy="steps", eval_steps=3)
    callback = trainer_callback(trainer, decay=DECAY, also=[net.fuse], swap=True)
    with pytest.raises(RuntimeError, match=r"expected trainer.add_callback\(callback\), got a training without it"):
        trainer.train()
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError, match="ema: expected to be asked for once training has begun"):
        _ = callback.ema
    with pytest.warns(UserWarning, match="got a Net without: it is evaluated with its own weights"):
        trainer.predict(Rows(4))
    net.seen.clear()
    trainer.train()
    assert callback.ema.step == record.steps == 8
    torch.testing.assert_close(callback.ema.module.head.weight.double(), record.average, rtol=0, atol=1e-6)
    assert net.fuse.factors()["body"] != 1
    expected = [record.history[step] for step in (3, 6, 8) for _ in range(2 + 3)]
    torch.testing.assert_close(torch.stack(net.seen).double(), torch.stack(expected), rtol=0, atol=1e-6)
    before = weights(net)
    for evaluate in (trainer.evaluate, lambda: trainer.predict(Rows(8))):
        net.seen.clear()
        evaluate()
        assert len(net.seen) in (5, 2)
        assert all(torch.equal(seen, callback.ema.module.head.weight) for seen in net.seen)
        assert same(weights(net), before)
    net.fail = True
    with pytest.raises(OSError, match="while it is evaluated"):
        trainer.evaluate()
    assert same(weights(net), before)


def test_trainer_resumes_to_the_same_bits(make_trainer, trainer_callback, tmp_path):
    def run(out, epochs, resume=None):
        options = {"save_strategy": "epoch", "eval_strategy": "epoch", "lr_scheduler_type": "constant"}
        trainer = make_trainer(out=out, num_train_epochs=epochs, **options)
        callback = trainer_callback(trainer, decay=DECAY, also=[trainer.model.fuse], swap=True)
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return callback, trainer

    first, trainer = run(tmp_path / "first", 1)
    saved = importlib.import_module("safetensors.torch").load_file(tmp_path / "first/checkpoint-4/model.safetensors")
    assert same(saved, weights(trainer.model))
    whole, trainer = run(tmp_path / "whole", 3)
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    again, resumed = run(tmp_path / "again", 3, moved / "checkpoint-4")
    last, _ = run(moved, 3, True)
    assert first.ema.step == 4
    assert again.ema.step == last.ema.step == whole.ema.step == 12
    assert same(weights(again.ema), weights(whole.ema))
    assert same(weights(last.ema), weights(whole.ema))
    assert same(weights(resumed.model), weights(trainer.model))
    safetensors = importlib.import_module("safetensors.torch")  # as in docs/api/integrations.md
    taken = loaded(Net(), safetensors.load_file(tmp_path / "whole/checkpoint-12/ema.safetensors"))
    assert same(weights(taken), weights(whole.ema))
    safetensors.save_model(taken.module, tmp_path / "averaged.safetensors")
    assert same(safetensors.load_file(tmp_path / "averaged.safetensors"), weights(whole.ema.module))
    (tmp_path / "whole/checkpoint-8/ema.safetensors").unlink()
    with pytest.warns(UserWarning, match="checkpoint-8 has no average to go on with: it begins anew"):
        run(tmp_path / "without", 3, str(tmp_path / "whole/checkpoint-8"))


def test_trainer_saves_an_average_inside_the_model_that_shares_what_is_frozen(make_trainer, trainer_callback, tmp_path):
    def run(out, epochs, resume=None):
        net = Net()
        net.body[0].requires_grad_(False)
        net.average = md.EMAWrapper(net.body, decay=DECAY, share_frozen=True)
        trainer = make_trainer(net, out=out, num_train_epochs=epochs, save_strategy="epoch")
        trainer.add_callback(trainer_callback(trainer, ema=net.average, swap=True))
        trainer.train(resume_from_checkpoint=resume)
        return net

    whole = run(tmp_path / "whole", 2)
    again = run(tmp_path / "again", 2, str(tmp_path / "whole/checkpoint-4"))
    assert same(weights(again), weights(whole))
    assert again.average.step == whole.average.step == 8
    assert again.average.module[0].weight.data_ptr() == again.body[0].weight.data_ptr()


def test_trainer_ends_with_the_average_of_the_best_checkpoint(make_trainer, trainer_callback):
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make_trainer(num_train_epochs=3, metric_for_best_model="eval_one_loss", greater_is_better=True, **options)
    callback = trainer_callback(trainer, decay=DECAY, swap=True)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.best_global_step == callback.ema.step == 4
    assert trainer.evaluate()["eval_one_loss"] == trainer.state.best_metric


def test_trainer_saves_in_the_folder_of_a_trial(make_trainer, trainer_callback, tmp_path, monkeypatch):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.add_callback(trainer_callback(trainer))
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # which knows the trials of optuna and others
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / f"run-{trial['number']}"))
    trainer.train(trial={"number": 7})
    assert (tmp_path / "run-7/checkpoint-1/ema.safetensors").exists()


def test_two_callbacks_of_a_trainer_need_two_names(make_trainer, trainer_callback):
    trainer = make_trainer(Net(), max_steps=1)
    first, second = (trainer_callback(trainer, decay=decay) for decay in (0.5, 0.99))
    trainer.add_callback(first)
    trainer.add_callback(second)
    with pytest.raises(ValueError, match="name: expected another one for each EMACallback of a Trainer, got 'ema'"):
        trainer.train()
    second.name = "slow"
    trainer.train()
    assert first.ema.step == second.ema.step == 1


# ----------------------------------------------------------------------------------------------- Accelerate


def test_accelerate_moves_saves_and_resumes_the_average(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from momentum_distill.integrations.accelerate import add_ema

    def run(epochs, resume=None):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
        net = Net()
        net.momentum = md.EMAWrapper(net.head, decay=DECAY)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        record = Record(net, optimizer)
        model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
        ema = add_ema(accelerator, model.body, optimizer, decay=DECAY, also=[net.fuse])
        assert add_ema(accelerator, model.head, optimizer, ema=net.momentum) is net.momentum
        if resume:
            accelerator.load_state(resume)
        for epoch in range(1 if resume else 0, epochs):
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    optimizer.zero_grad()
            accelerator.save_state(tmp_path / f"{epochs}_{epoch}")
        return ema, net, record

    ema, net, record = run(3)
    assert ema.step == net.momentum.step == record.steps == 12
    torch.testing.assert_close(net.momentum.module.weight.double(), record.average, rtol=0, atol=1e-6)
    assert len(list((tmp_path / "3_0").glob("custom_checkpoint_*"))) == 1  # the other is a part of the model
    taken = loaded(net.body, torch.load(tmp_path / "3_2/custom_checkpoint_0.pkl"))  # docs/api/integrations.md
    assert same(weights(taken), weights(ema))
    again, resumed, _ = run(3, tmp_path / "3_0")
    assert same(weights(again), weights(ema))
    assert same(weights(resumed), weights(net))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_moves_no_average(fused):
    from momentum_distill.integrations._following import Following

    net, scaler = Net(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
    following = Following(None, None, [], {})
    following.begin(net)
    following.watch([optimizer])
    batch = next(iter(loader()))
    for factor, updates in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(net(**batch)["loss"] * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert following.average().step == updates


# -------------------------------------------------------------------------------------------------- all three


def test_no_framework_is_imported_before_it_is_asked_for():
    code = "import sys, momentum_distill, momentum_distill.integrations as i; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'momentum_distill.integrations'" in done.stdout
    assert not any(f"'{name}'" in done.stdout for name in ("pytorch_lightning", *FRAMEWORKS))


def modules() -> list[ModuleType]:
    return [importlib.import_module(f"momentum_distill.integrations.{name}") for name in FRAMEWORKS]


def test_names_and_arguments_are_those_that_were_promised():
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    pinned = [line for line in read_lines(PINNED) if ".integrations." in line]
    assert found(modules()) == pinned
    for module in modules():
        examples = sum(len(each.examples) for each in doctest.DocTestFinder().find(module))
        assert examples >= 3
        assert doctest.testmod(module) == (0, examples)
        for public in (getattr(module, name) for name in module.__all__):
            assert get_type_hints(public.__init__ if isinstance(public, type) else public)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_missing_framework_is_named_in_one_line(framework, monkeypatch):
    for name in [*sys.modules]:
        if name.partition(".")[0] in (framework, "pytorch_lightning") or name.endswith(f"integrations.{framework}"):
            monkeypatch.delitem(sys.modules, name)
    for name in (framework, "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"momentum_distill.integrations.{framework}")
    module, install = f"momentum_distill.integrations.{framework}", f"pip install {framework}"
    assert str(caught.value) == f"{module}: expected the package {framework}, got none: {install}"


def test_bad_arguments_are_refused_at_once():
    from momentum_distill.integrations._following import Following

    net = Net()
    ema = md.EMAWrapper(net)
    cases = [
        ((3, None, [], {}), TypeError, "model: expected a torch.nn.Module or None, got"),
        ((None, net, [], {}), TypeError, "ema: expected an EMAWrapper or None, got"),
        ((None, None, net.fuse, {}), TypeError, "also: expected a sequence of what has an update"),
        ((None, None, [ema], {}), TypeError, "also: expected a sequence of what has an update"),
        ((None, None, [net], {}), TypeError, "also: expected a sequence of what has an update"),
        ((None, None, [md.EMADict(net, {"a": 0.9})], {}), TypeError, "also: expected a sequence of what has an update"),
        ((None, ema, [], {"decay": 0.9}), ValueError, "ema: expected None where decay is given for a new one, got"),
        ((None, None, [], {"decay": 1.5}), ValueError, "decay: expected"),
        ((None, None, [], {"momentum": 0.9}), TypeError, "momentum"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            Following(*arguments)
    with pytest.raises(TypeError, match="swap: expected"):
        Following(None, None, [], {}, swap="yes")
    for following, message in (
        (Following(Net(), None, [], {}), "model: expected the Net in training, or a part of it, got"),
        (
            Following(None, copy.deepcopy(ema), [], {}),
            "model: expected what `ema` is an average of, which a copied",
        ),
        (Following(net, md.EMAWrapper(net.head), [], {}), "the average is of Linear, the model is Net: pass what was"),
    ):
        with pytest.raises(ValueError, match=message):
            following.begin(net)
    following = Following(None, None, [], {})
    following.begin(net)
    with pytest.raises(ValueError, match="optimizer: expected one that has parameters of the averaged model, got none"):
        following.watch([torch.optim.SGD(Net().parameters())])
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got"):
        following.watch([SimpleNamespace()])
