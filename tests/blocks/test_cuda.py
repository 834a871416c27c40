"""The blocks on a GPU: the numbers of the CPU, no wait for the device, little memory, and a step that can be captured.

Skipped where there is none. Those of several ranks: `MOMENTUM_DISTILL_DEVICE=cuda python -m pytest
tests/blocks/test_distributed.py tests/blocks/test_distributed_blocks.py`.
"""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import momentum_distill as md
from loss_cases import DTYPES, POSITIVES, assert_close, assert_gradient_close, by_autograd, supcon_case
from momentum_distill import functional as F
from momentum_distill._contrast import engine, kernel

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WAYS = ["kernel", "tiles", "matrices"]
SCALE = 128.0


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The ways to the contrastive loss."""
    monkeypatch.setenv("MOMENTUM_DISTILL_TRITON", "1" if request.param == "kernel" else "0")
    monkeypatch.setattr(engine, "DENSE_SCORES", 2**62 if request.param == "matrices" else -1)
    return request.param


@contextmanager
def never_waiting():
    """An operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def dense(case, *, temperature, **options):
    """Plain autograd through the matrices, on the CPU, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        by_autograd(patch)
        return F.supcon_distill_loss(*case.args, **case.momentum, temperature=temperature, **options)


def assert_as_on_the_cpu(case, dtype, **options):
    """Value and gradients for query, keys and temperature; scaled, for small gradients have few digits in 16 bits."""
    exact = case.map(lambda x: x.double()).requires_grad()
    tau = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    expected = dense(exact, temperature=tau, **options)
    (SCALE * expected).backward()
    case = to_cuda(case).requires_grad()
    own_tau = torch.tensor(0.25, device="cuda", dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    with never_waiting():
        loss = F.supcon_distill_loss(*case.args, **case.momentum, temperature=own_tau, **options)
        (SCALE * loss).backward()
    assert_close(loss.cpu(), expected.detach(), dtype)
    assert_gradient_close(case.query.grad.cpu(), exact.query.grad, dtype)
    assert_gradient_close(case.keys.grad.cpu(), exact.keys.grad, dtype)
    if dtype not in (torch.bfloat16, torch.float16):  # a sum of many numbers of both signs, rounded to 16 bits each
        assert_close(own_tau.grad.cpu(), tau.grad, dtype)


def to_cuda(case):
    moved = {name: value if value is None else value.cuda() for name, value in vars(case).items()}
    return type(case)(**moved)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, "query", False], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "supervised alone"])
def test_the_contrastive_loss_is_that_of_the_cpu(positives, normalize, momentum, dtype):
    case = supcon_case(7, 37, 301, 24, ignored=0.2, unlabelled=0.2, momentum=momentum, dtype=dtype)
    options = {"alpha": 0.3, "positives": positives, "normalize": normalize}
    assert_as_on_the_cpu(case, dtype, **options)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positives", POSITIVES)
def test_a_batch_that_excludes_itself_is_that_of_the_cpu(positives, dtype):
    case = supcon_case(9, 301, 301, 24, ignored=0.2, unlabelled=0.2, dtype=dtype)
    assert_as_on_the_cpu(case, dtype, alpha=0.3, positives=positives, exclude_self=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [3, 64, 128, 200, 384, 768, 1024])
def test_any_width(d, dtype, monkeypatch):
    monkeypatch.setattr(engine, "DENSE_SCORES", -1)
    case = supcon_case(3, 130, 1111, d, ignored=0.1, dtype=dtype)
    assert_as_on_the_cpu(case, dtype, positives="inside", normalize=True)


def test_the_kernel_is_what_runs(monkeypatch):
    monkeypatch.delenv("MOMENTUM_DISTILL_TRITON", raising=False)
    calls = []
    monkeypatch.setattr(kernel, "attend", lambda *args, real=kernel.attend, **kw: calls.append(1) or real(*args, **kw))
    case = to_cuda(supcon_case(1, dtype=torch.float32))
    F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5)
    assert calls


def test_a_gpu_on_which_triton_fails_goes_without_and_says_so_once(monkeypatch):
    def broken(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(kernel, "normalize", broken)
    device = torch.device("cuda", torch.cuda.current_device())
    kernel.works.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"goes without its fused kernel on cuda:0.*OSError: no compiler"):
            assert not kernel.works(device)
        case = to_cuda(supcon_case(1, dtype=torch.float32))
        with warnings.catch_warnings(action="error"):
            assert F.supcon_distill_loss(*case.args, **case.momentum, temperature=0.5).isfinite()
    finally:
        kernel.works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, "query"], ids=str)
@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_memory_does_not_grow_with_the_scores(positives, normalize, dtype):
    n, q, d = 512, 262_144, 128
    unit = nn.functional.normalize
    query = torch.randn(n, d, device="cuda").to(dtype).requires_grad_()
    keys, momentum_keys = (unit(torch.randn(q, d, device="cuda"), dim=1).to(dtype) for _ in range(2))
    labels = torch.randint(3, (n,), device="cuda"), torch.randint(3, (q,), device="cuda")
    momentum = {"momentum_query": query.detach() + 0.1, "momentum_keys": momentum_keys}

    def step():
        F.supcon_distill_loss(
            query, keys, *labels, temperature=0.1, positives=positives, normalize=normalize, **momentum
        ).backward()
        query.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 16 * 2**20 + 8 * n * d * 4


class Study(nn.Module):
    """Every block in one step: a teacher, a student with its momentum model, a fusion."""

    def __init__(self, *, balanced: bool = False) -> None:
        super().__init__()
        self.text, self.audio = nn.Linear(24, 16), nn.Linear(12, 16)
        self.heads = nn.ModuleDict({name: nn.Linear(16, 4) for name in ("text", "audio", "fused")})
        self.average = md.EMAWrapper(self.audio)
        self.queue = md.ClassQueue(40, {"text": 16, "audio": 16, "momentum": 16}, num_classes=3, balanced=balanced)
        self.factors = md.MomentumFusionFactors(["text", "audio"])
        self.contrast = md.SupConDistillLoss()
        self.scores = md.ResponseDistillLoss(task="regression")
        self.classes = md.ResponseDistillLoss(task="classification", temperature=2.0)
        self.fusion = md.HardSampleFusionLoss()

    def loss(self, x, y, targets, labels, mask):
        text, audio, momentum = self.text(x), self.audio(y), self.average(y)
        weighted = self.factors({"text": text, "audio": audio})
        out = {"text": text, "audio": audio, "fused": weighted["text"] + weighted["audio"]}
        out = {name: self.heads[name](rows) for name, rows in out.items()}
        keys, key_labels = self.queue.read("text", padded=True)
        contrast = self.contrast(
            audio, (text, keys), labels, (labels, key_labels), momentum_query=momentum, momentum_keys=(text, keys)
        )
        features = {"text": text.detach(), "audio": audio.detach(), "momentum": momentum}
        return features, (
            contrast
            + self.scores(out["audio"][:, 0], out["text"][:, 0], momentum[:, 0], mask=mask)
            + self.classes(out["audio"][:, 1:], out["text"][:, 1:], mask=mask)
            + self.fusion(
                student_scores=out["audio"][:, 0],
                student_logits=out["audio"][:, 1:],
                fused_scores=out["fused"][:, 0],
                fused_logits=out["fused"][:, 1:],
                targets=targets,
                labels=labels,
                mask=mask,
            )
        )

    def step(self, optimizer, batch):
        optimizer.zero_grad()
        features, loss = self.loss(*batch)
        loss.backward()
        optimizer.step()
        self.average.update(self.audio)
        self.factors.update()
        *_, labels, mask = batch
        self.queue.enqueue(labels, features, valid={"audio": mask, "momentum": mask})
        return loss.detach()


def batches(count, rows=17):
    g = torch.Generator().manual_seed(0)

    def one():
        numbers = [torch.randn(rows, *shape, generator=g) for shape in ((24,), (12,), ())]
        return [*numbers, torch.randint(-2, 3, (rows,), generator=g), torch.rand(rows, generator=g) > 0.2]

    return [[x.cuda() for x in one()] for _ in range(count)]


def make_study(**options):
    torch.manual_seed(1)
    study = Study(**options).cuda()
    learned = [p for p in study.parameters() if p.requires_grad]
    return study, torch.optim.SGD(learned, lr=0.05)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("balanced", [False, True])
def test_a_whole_step_never_waits_for_the_device(balanced):
    study, optimizer = make_study(balanced=balanced)
    first, *others = batches(6)
    study.step(optimizer, first)  # kernels are compiled, plans and gradients made
    with never_waiting():
        losses = [study.step(optimizer, batch) for batch in others]
    assert torch.stack(losses).isfinite().all()


@pytest.mark.usefixtures("way")
def test_a_whole_step_trains_as_on_the_cpu():
    study, optimizer = make_study()
    alone = copy.deepcopy(study).cpu()
    own_optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.05)
    for batch in batches(8):
        loss = study.step(optimizer, batch)
        expected = alone.step(own_optimizer, [x.cpu() for x in batch])
        torch.testing.assert_close(loss.cpu(), expected, rtol=2e-4, atol=2e-5)
    for (name, mine), theirs in zip(study.state_dict().items(), alone.state_dict().values(), strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(
                mine.cpu(), theirs, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(autocast):
    study, _ = make_study()
    first, second = batches(2)
    with torch.autocast("cuda", autocast):
        features, loss = study.loss(*first)
        study.queue.enqueue(first[3], {name: rows.float() for name, rows in features.items()})
        _, loss = study.loss(*second)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in study.parameters() if p.grad is not None)


@pytest.mark.long
def test_the_losses_compile_into_one_graph():
    case = to_cuda(supcon_case(3, 33, 200, 16, dtype=torch.float32))

    def loss(query):
        return F.supcon_distill_loss(
            query, case.keys, case.query_labels, case.key_labels, **case.momentum, temperature=0.3
        )

    query = case.query.requires_grad_()
    (expected_grad,) = torch.autograd.grad(loss(query), query)
    with warnings.catch_warnings(action="ignore"):
        value = torch.compile(loss, fullgraph=True)(query)
    (grad,) = torch.autograd.grad(value, query)
    torch.testing.assert_close(value, loss(query))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_queue_is_that_of_the_cpu(balanced, dtype):
    queues = [
        md.ClassQueue(11, {"a": 5, "b": 3}, num_classes=3, balanced=balanced, dtype=dtype).to(device)
        for device in ("cpu", "cuda")
    ]
    g = torch.Generator().manual_seed(0)
    for rows in (3, 0, 11, 25, 7):
        labels = torch.randint(-2, 3, (rows,), generator=g)
        features = {"a": torch.randn(rows, 5, generator=g), "b": torch.randn(rows, 3, generator=g)}
        valid = {"b": torch.rand(rows, generator=g) > 0.3}
        for queue, device in zip(queues, ("cpu", "cuda"), strict=True):
            rows_there = {name: x.to(device) for name, x in features.items()}
            queue.enqueue(labels.to(device), rows_there, valid={"b": valid["b"].to(device)})
        for stream in ("a", "b"):
            (keys, key_labels), (own, own_labels) = (queue.read(stream) for queue in queues)
            assert torch.equal(key_labels, own_labels.cpu())
            torch.testing.assert_close(own.cpu(), keys, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_is_its_closed_form_and_goes_from_device_to_device(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.LSTM(7, 3)).cuda().to(dtype)
    ema = md.EMAWrapper(model, decay=0.9)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for _ in range(50):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        with never_waiting():
            ema.update(model)
        for name, p in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach().double()
    for name, p in ema.module.named_parameters():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-6)
    there = md.EMAWrapper(copy.deepcopy(model).cpu(), decay=0.9)
    there.load_state_dict(ema.state_dict())
    before = [p.clone() for p in model.parameters()]
    with ema.swap(model):
        torch.testing.assert_close(model[0].weight, ema.module[0].weight.to(dtype))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(there.module[0].weight, ema.module[0].weight.cpu(), rtol=0, atol=0)


def test_a_whole_step_can_be_captured_in_a_graph():
    """Replayed, it does what it does step by step; the loss of each replay is that of its batch."""
    eager, eager_optimizer = make_study()
    captured, optimizer = make_study()
    data = batches(9)
    still = [x.clone() for x in data[0]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in data[:3]:
            for x, new in zip(still, batch, strict=True):
                x.copy_(new)
            captured.step(optimizer, still)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured.step(optimizer, still)
    for index, batch in enumerate(data):
        expected = eager.step(eager_optimizer, batch)
        if index >= 3:
            for x, new in zip(still, batch, strict=True):
                x.copy_(new)
            graph.replay()
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(captured.audio.weight, eager.audio.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(captured.average.module.weight, eager.average.module.weight, rtol=1e-5, atol=1e-6)
