"""How often a test of chance repeats: a little in every run of the suite, much more under `make stress`."""

import os

STRESS = bool(os.environ.get("MOMENTUM_DISTILL_STRESS"))


def times(usual: int, stress: int) -> int:
    """`usual` repetitions, or `stress` of them under `make stress`. Mark such a test `@pytest.mark.stress`."""
    return stress if STRESS else usual
