import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

import tiers
from momentum_distill._contrast import engine
from ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
MOSI = Path(os.environ.get("MOMENTUM_DISTILL_MOSI") or ROOT.parent / "shared" / "data" / "mosi.pkl")

# What inductor has compiled for one CPU and kept gives wrong numbers, or corrupts memory, where torch is told that it
# has another (ATEN_CPU_CAPABILITY): the name under which it is kept does not tell of that.
COMPILED = ROOT / ".pytest_cache" / "inductor" / f"{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))


# What decides whether a change lands draws the same examples every time; new ones are what `make stress` is for.
settings.register_profile("momentum_distill", deadline=None, derandomize=not tiers.STRESS)
settings.load_profile("momentum_distill")


@pytest.hookimpl(tryfirst=True)  # before -m chooses by these marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tiers.mark_long(items)


@pytest.fixture(scope="session")
def mosi_path() -> Path:
    """The real CMU-MOSI pickle, where there is one."""
    if not MOSI.is_file():
        pytest.skip("no CMU-MOSI: neither ../shared/data/mosi.pkl nor $MOMENTUM_DISTILL_MOSI")
    return MOSI


@pytest.fixture(scope="session")
def mosi_or_none() -> Path | None:
    """The same for tests that do with something else, but must not skip where there is one."""
    return MOSI if MOSI.is_file() else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What would run on CMU-MOSI and is skipped though that is there fails."""
    report = yield
    if report.skipped and MOSI.is_file() and {"mosi_path", "mosi_or_none"} & set(getattr(item, "fixturenames", ())):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped though {MOSI} is there: {why}"
    return report


@pytest.fixture(scope="module", params=["matrices", "tiles"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """The contrastive loss through the N×Q matrices, as it takes small problems, and tile by tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "DENSE_SCORES", 2**62 if request.param == "matrices" else -1)
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for `ranks.run(world, "module:function", ...)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile, which remembers nothing of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A real process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
