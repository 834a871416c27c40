import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def mosi_path() -> Path:
    """The real CMU-MOSI pickle, where there is one."""
    beside = ROOT.parent / "shared" / "data" / "mosi.pkl"
    path = Path(os.environ.get("MOMENTUM_DISTILL_MOSI") or beside)
    if not path.is_file():
        pytest.skip("no CMU-MOSI: neither ../shared/data/mosi.pkl nor $MOMENTUM_DISTILL_MOSI")
    return path
