"""Recordings of a smart watch: accelerometer and gyroscope of ten people at seven shoulder exercises.

The data are a file of the package `seglearn` (BSD licence; Burns et al., 2018), which is looked for but not imported:
`pip install seglearn`, or `pip install ".[examples]"` in the repository, brings it. The file is a pickle, so it is read
with a list of the four names that it may ask for.
"""

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

STEPS, HOP = 100, 50  # of a window and between windows, at 50 Hz

_RECONSTRUCT = np.ndarray(0).__reduce__()[0]  # what makes a blank array; its module's name changed with NumPy 2
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): str.encode,
}


class Windows(NamedTuple):
    accelerometer: np.ndarray  # (N, steps, 3)
    gyroscope: np.ndarray  # (N, steps, 3)
    exercise: np.ndarray  # (N,), 0 to 6
    person: np.ndarray  # (N,), 0 to 9


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _NAMES:
            raise ValueError(f"expected numpy arrays alone, got a file that asks for {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, _id: object) -> NoReturn:
        raise ValueError("expected numpy arrays alone, got a file that refers to objects outside it")


def find_recordings() -> Path:
    """Where the package has its file."""
    package = find_spec("seglearn")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("the watch's recordings come with a package: pip install seglearn")
    return Path(package.submodule_search_locations[0]) / "data" / "watch_dataset.npy"


def load_windows() -> Windows:
    """Every window of 100 steps (two seconds), each beginning 50 after the one before, in 140 recordings."""
    with find_recordings().open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        content = _Reader(file).load().item()
    windows, exercise, person = [], [], []
    people = sorted(set(content["subject"].tolist()))
    for recording, label, who in zip(content["X"], content["y"], content["subject"], strict=True):
        for start in range(0, len(recording) - STEPS + 1, HOP):
            windows.append(recording[start : start + STEPS])
            exercise.append(int(label))
            person.append(people.index(who))
    both = np.stack(windows).astype(np.float32)
    return Windows(both[:, :, :3], both[:, :, 3:], np.array(exercise), np.array(person))
