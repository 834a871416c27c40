import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from momentum_distill import _streaming
from ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent

# The compiler's cache does not tell code for some vector instructions from code for others, and mixed they end the
# process: to each setting its own.
capability = os.environ.get("ATEN_CPU_CAPABILITY", "native")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".pytest_cache" / f"inductor_{capability}"))


@pytest.fixture(scope="session")
def mosi_path() -> Path:
    """The real CMU-MOSI pickle, where there is one."""
    beside = ROOT.parent / "shared" / "data" / "mosi.pkl"
    path = Path(os.environ.get("MOMENTUM_DISTILL_MOSI") or beside)
    if not path.is_file():
        pytest.skip("no CMU-MOSI: neither ../shared/data/mosi.pkl nor $MOMENTUM_DISTILL_MOSI")
    return path


@pytest.fixture(scope="module", params=["matrices", "tiles"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """The contrastive loss through the N×Q matrices, as it takes small problems, and tile by tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_streaming, "DENSE_SCORES", 2**62 if request.param == "matrices" else -1)
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for `ranks.run(world, "module:function", ...)`."""
    pool = Ranks()
    yield pool
    pool.close()
