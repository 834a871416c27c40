"""Killed, refused by the disk, or in the wrong place: what was saved before stays, and nothing is left lying about."""

import contextlib
import ctypes
import errno
import functools
import io
import itertools
import os
import random
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import mtmd_mosi
from full_disk import file_size_limit
from mtmd.data.scaling import Standardizer
from mtmd.files import writing
from mtmd.files.tensors import DTYPES, write_tensors
from mtmd.files.writing import replacing, write_text
from mtmd.model import MTMD
from mtmd.runs import checkpoint, states
from mtmd.runs.checkpoint import load_checkpoint, save_checkpoint
from mtmd.runs.states import load_state, remove_states, save_state
from mtmd.settings.config import Config
from mtmd.train import Run
from study_cases import TINY
from test_example_resume import SMALL, processes, small_dataset  # noqa: F401  the fixture is used by its name
from tiers import times

# Two kinds of save, numbered


class States:
    """States of a training. Each step is saved twice, as it is where it ends an epoch."""

    def __init__(self, folder, *, size=1000):
        self.folder, self.size = folder, size

    def save(self, number):
        weight = torch.full((self.size,), float(number))
        save_state(self.folder, number // 2, {"weight": weight}, {"number": number})

    def load(self, folder=None):
        """The number of the newest that is whole. None may be damaged: a kill is not to be told as damage."""
        found = load_state(folder or self.folder, on_note=pytest.fail)
        if found is None:
            return 0
        tensors, values = found
        assert tensors["weight"].shape == (self.size,)
        assert (tensors["weight"] == values["number"]).all()
        return values["number"]

    def strays(self):
        """What belongs to neither of the two newest."""
        kept = sorted(path.stem for path in self.folder.glob("*.json"))[-2:]
        return [name for name in names_in(self.folder) if name.rpartition(".")[0] not in kept]


class Models:
    """The checkpoint of a model, saved over and over in the same place."""

    def __init__(self, folder, *, size=None):
        self.folder, self.size = folder, size

    def save(self, number):
        model, config, standardizer, dataset = small_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        run = Run(number, model, metrics={"valid": {}})
        self.folder.mkdir(exist_ok=True)
        save_checkpoint(self.folder / "model", run, config, standardizer, dataset)

    def load(self, folder=None):
        try:
            model, _, about = load_checkpoint((folder or self.folder) / "model")
        except FileNotFoundError:  # killed before the first was saved
            return 0
        assert all((parameter == about["seed"]).all() for parameter in model.parameters())
        return about["seed"]

    def strays(self):
        return [name for name in names_in(self.folder) if name not in ("model.json", "model.safetensors")]


@functools.cache
def small_model():
    config, dataset = Config(**SMALL), small_dataset()
    return MTMD(config, dataset.widths), config, Standardizer.fit(dataset.folds["train"]), dataset


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Killed

PHASES = [
    "between two saves",
    "within the tensors",
    "between the tensors and their rename",
    "after the rename of the tensors",
    "within the description",
    "between the description and its rename",
    "after the rename of the description",
]
BEFORE_A_RENAME = {PHASES[2], PHASES[5]}


def save_forever(kind, folder, size, first, board_path):
    """What runs until it is killed. On the board: the phase it is in, and the last number known to be saved."""
    torch.set_num_threads(1)
    board = np.memmap(board_path, dtype=np.int64, mode="r+")

    def enter(phase):
        board[0] = PHASES.index(phase)
        time.sleep(0.001)  # so that even the shortest phase lasts long enough to be hit

    def watched(function, before, after):
        def wrapped(*arguments, **options):
            if before is not None:
                enter(before)
            result = function(*arguments, **options)
            enter(after if isinstance(after, str) else after[Path(arguments[1]).suffix])
            return result

        return wrapped

    checkpoint.write_tensors = states.write_tensors = watched(write_tensors, *PHASES[1:3])
    Path.write_text = watched(Path.write_text, *PHASES[4:6])
    os.replace = watched(os.replace, None, {".safetensors": PHASES[3], ".json": PHASES[6]})
    saver = kind(folder, size=size)
    for number in itertools.count(first):
        saver.save(number)
        board[1] = number
        enter(PHASES[0])


@pytest.mark.long
@pytest.mark.repeated
@pytest.mark.parametrize("kind", [States, Models])
def test_killed_at_random_moments_there_is_the_newest_or_the_one_before(kind, processes, tmp_path):  # noqa: F811
    saver = kind(tmp_path / "folder", size=250_000)
    board_path = tmp_path / "board"
    moments = random.Random(5)
    phases, outcomes = Counter(), Counter()
    last, kills = 0, times(20, 20, 300)
    started = time.perf_counter()
    for kill in range(kills):
        board = np.memmap(board_path, dtype=np.int64, mode="w+", shape=2)
        process = processes.Process(target=save_forever, args=(kind, saver.folder, saver.size, last + 1, board_path))
        process.start()
        while board[1] == 0:
            assert process.exitcode is None
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        if kill % 2:  # at any moment of a chosen phase: some are so short that chance alone would seldom hit them
            while board[0] != kill // 2 % len(PHASES):
                assert process.exitcode is None
                time.sleep(0.0001)
            time.sleep(moments.uniform(0, 0.001))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        phases[PHASES[board[0]]] += 1
        complete = int(board[1])
        outcomes["left strays"] += bool(saver.strays())
        # A copy is loaded as it is. Over the other goes the next save, as if nobody had loaded it.
        found = saver.load(shutil.copytree(saver.folder, tmp_path / "copy"))
        assert found in (complete, complete + 1)
        outcomes["loaded the one before" if found == complete else "loaded the newest"] += 1
        shutil.rmtree(tmp_path / "copy")
        last = complete + 1
        saver.save(last)
        assert saver.strays() == []
        assert saver.load() == last
    print(f"{kind.__name__}: {kills} kills in {time.perf_counter() - started:.0f} s, {dict(outcomes)}, {dict(phases)}")
    assert phases.keys() & BEFORE_A_RENAME
    assert len(phases) >= times(4, 4, len(PHASES))


# Refused by the disk


def refusal(saver, number):
    """The error that a save ends with, if any: in one line, with the file that could not be written."""
    try:
        saver.save(number)
    except OSError as caught:
        error = caught
    else:
        return None
    path = Path(error.filename)
    assert path == saver.folder or path.parent == saver.folder
    assert not path.name.startswith(".")  # not by what it is called until it is whole
    assert "\n" not in str(error)
    return error


class FailingDisk:
    """Every operation on files counts, and from the `first` to the `last` of them they fail."""

    OPERATIONS = (
        (os, "fsync"),
        (os, "replace"),
        (os, "mkdir"),
        (Path, "open"),
        (Path, "unlink"),
        (checkpoint, "write_tensors"),
        (states, "write_tensors"),
    )

    def __init__(self, patch, first, last, error_number):
        self.first, self.last, self.error_number, self.count = first, last, error_number, 0
        self.failed = []
        for owner, name in self.OPERATIONS:
            patch.setattr(owner, name, self.failing(name, getattr(owner, name)))

    def failing(self, name, function):
        def wrapped(*arguments, **options):
            self.count += 1
            if not self.first <= self.count <= self.last:
                return function(*arguments, **options)
            self.failed.append(name)
            if name == "write_tensors":  # half of them are written
                arguments[0].write_bytes(b"half")
            nameless = name in ("fsync", "write_tensors")  # so are the errors of the system
            raise OSError(self.error_number, os.strerror(self.error_number), None if nameless else str(arguments[0]))

        return wrapped


@pytest.mark.parametrize("kind", [States, Models])
@pytest.mark.parametrize(
    ("lasting", "error_number"), [(False, errno.ENOSPC), (True, errno.EACCES)], ids=["once", "from then on"]
)
def test_an_operation_that_fails_is_one_error_and_leaves_the_old(kind, error_number, lasting, tmp_path, monkeypatch):
    saver = kind(tmp_path / "folder")
    for last in (1, 2):
        saver.save(last)
    for nth in itertools.count(1):
        before = names_in(saver.folder)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, nth, 10**6 if lasting else nth, error_number)
            error = refusal(saver, last + 1)
        found = saver.load(shutil.copytree(saver.folder, tmp_path / f"copy{nth}"))
        if error is None:
            assert found == last + 1
        else:
            assert error.errno == error_number
            # Only an older state that could not be removed is an error after the new one was saved.
            assert found == last or (found == last + 1 and "unlink" in disk.failed)
            if not lasting and disk.failed != ["unlink"]:
                assert names_in(saver.folder) == before
        if not disk.failed:
            break
        last += 2
        saver.save(last)
        assert saver.strays() == []
        assert saver.load() == last
    assert nth > 8


@pytest.mark.parametrize("kind", [States, Models])
def test_a_file_that_cannot_grow_is_one_error_and_leaves_the_old(kind, tmp_path):
    saver = kind(tmp_path / "folder")
    saver.save(1)
    before = names_in(saver.folder)
    largest = max(path.stat().st_size for path in saver.folder.iterdir())
    for size in range(0, largest, largest // 40):
        with file_size_limit(size):
            error = refusal(saver, 2)
        assert error.errno == errno.EFBIG
        assert names_in(saver.folder) == before
        assert saver.load() == 1
    with file_size_limit(largest + 1000):
        saver.save(2)
    assert saver.load() == 2


PAGE = 4096
NOT_ALLOWED = 77


class SmallDisk:
    """A disk of its own for this process: in a namespace where it may mount, whoever it is."""

    CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
    MS_RDONLY, MS_REMOUNT = 1, 32

    def __init__(self, folder, size):
        self.folder, self.size = folder, size
        self.libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        self.check(self.libc.unshare(self.CLONE_NEWUSER | self.CLONE_NEWNS))
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            Path("/proc/self", name).write_text(content)
        self.mount(0)

    def check(self, result):
        if result != 0:
            raise OSError(ctypes.get_errno(), "no disk of its own")

    def mount(self, flags):
        options = f"size={self.size}".encode()
        self.check(self.libc.mount(b"none", os.fsencode(self.folder), b"tmpfs", ctypes.c_ulong(flags), options))

    @contextlib.contextmanager
    def read_only(self):
        self.mount(self.MS_REMOUNT | self.MS_RDONLY)
        yield
        self.mount(self.MS_REMOUNT)

    @contextlib.contextmanager
    def left(self, pages):
        """Another file takes all but that many pages."""
        space = os.statvfs(self.folder)
        filler = self.folder / "filler"
        filler.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - pages * PAGE)))
        yield
        filler.unlink()


def run_command(*arguments):
    """Exit code and what was said on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = mtmd_mosi.main([str(argument) for argument in arguments])
    return code, stderr.getvalue()


def save_on_a_small_disk(folder, log):
    """What runs in another process, as its namespace is its own."""
    torch.set_num_threads(1)
    try:
        disk = SmallDisk(folder, 1_000_000)
    except OSError:
        sys.exit(NOT_ALLOWED)
    try:
        for saver in (States(folder / "states", size=10_000), Models(folder / "models")):
            for number in (1, 2):
                saver.save(number)
            before = names_in(saver.folder)
            with disk.read_only():
                assert refusal(saver, 3).errno == errno.EROFS
                assert saver.load() == 2
            for pages in itertools.count():
                with disk.left(pages):
                    error = refusal(saver, 3)
                if error is None:
                    break
                assert error.errno == errno.ENOSPC
                assert names_in(saver.folder) == before
                assert saver.load() == 2
            assert pages > 5
            assert saver.load() == 3
            assert saver.strays() == []
        command = ["train", *TINY, "--batch-size=1000", "--seeds=1", f"--out={folder / 'out'}", "--resume"]
        with disk.left(60):
            code, said = run_command(*command)
        state = folder / "out" / "state_seed1" / "state_000000001.safetensors"
        assert (code, said) == (2, f"error: [Errno {errno.ENOSPC}] No space left on device: '{state}'\n")
        assert names_in(folder / "out" / "state_seed1") == []
    except BaseException:
        log.write_text(traceback.format_exc())
        raise


@pytest.mark.skipif(sys.platform != "linux", reason="needs the namespaces of Linux")
def test_a_full_and_a_read_only_disk_are_one_error_and_leave_the_old(processes, tmp_path):  # noqa: F811
    (tmp_path / "disk").mkdir()
    log = tmp_path / "log.txt"
    process = processes.Process(target=save_on_a_small_disk, args=(tmp_path / "disk", log))
    process.start()
    process.join()
    if process.exitcode == NOT_ALLOWED:
        pytest.skip("this system lets no process mount a disk of its own")
    assert process.exitcode == 0, log.read_text()


# Something else in its place


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
@pytest.mark.parametrize("name", ["link", ".link.part"], ids=["its own name", "its temporary name"])
def test_a_link_in_place_of_a_file_is_replaced_and_its_target_left_alone(target, name, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / name).symlink_to(tmp_path / target)
    write_text(tmp_path / "link", "new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "file").read_text() == "precious"
    assert names_in(tmp_path) == ["file", "folder", "link"]


def test_links_in_place_of_a_checkpoint_are_read_and_replaced(tmp_path):
    first, saver = Models(tmp_path / "elsewhere"), Models(tmp_path / "folder")
    first.save(1)
    saver.folder.mkdir()
    for path in first.folder.iterdir():
        (saver.folder / path.name).symlink_to(path)
    assert saver.load() == 1
    saver.save(2)
    assert not any(path.is_symlink() for path in saver.folder.iterdir())
    assert (first.load(), saver.load()) == (1, 2)


@pytest.mark.parametrize("kind", [States, Models])
def test_a_link_in_place_of_the_folder_is_followed(kind, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    saver = kind(tmp_path / "folder")
    for number in (1, 2, 3):
        saver.save(number)
    assert saver.load() == saver.load(tmp_path / "elsewhere") == 3
    assert saver.strays() == []
    remove_states(tmp_path / "folder")  # what is at its end goes, but not what somebody else put up
    assert (tmp_path / "folder").is_symlink()
    if kind is States:
        assert names_in(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("ending", ["safetensors", "json"])
def test_a_folder_in_place_of_a_file_is_named_and_nothing_changed(ending, tmp_path):
    saver = Models(tmp_path / "folder")
    saver.save(1)
    saved = {path: path.read_bytes() for path in saver.folder.iterdir()}
    path = saver.folder / f"model.{ending}"
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        saver.save(2)
    assert caught.value.filename == str(path)
    path.rmdir()
    path.write_bytes(saved[path])
    assert {path: path.read_bytes() for path in saver.folder.iterdir()} == saved
    assert saver.load() == 1


def test_a_folder_in_place_of_a_state_is_named_and_nothing_changed(tmp_path):
    saver = States(tmp_path / "folder")
    saver.save(1)
    path = saver.folder / "state_000000001.safetensors"
    path.mkdir()
    before = names_in(saver.folder)
    with pytest.raises(IsADirectoryError) as caught:
        saver.save(2)
    assert caught.value.filename == str(path)
    assert names_in(saver.folder) == before
    path.rmdir()
    assert saver.load() == 1


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path.with_name("nowhere"))])
def test_no_folder_in_place_of_the_folder_is_named(make, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(FileExistsError) as caught:
        States(tmp_path / "folder").save(1)
    assert str(tmp_path / "folder") in str(caught.value)
    assert names_in(tmp_path) == ["folder"]


def blocked_out(out):
    out.write_text("a file")
    return out


def blocked_states(out):
    out.mkdir()
    (out / "state_seed1").write_text("a file")
    return out / "state_seed1"


def blocked_state(out):
    (out / "state_seed1" / "state_000000001.json").mkdir(parents=True)
    return out / "state_seed1" / "state_000000001.json"


def blocked_epochs(out):
    (out / "metrics.jsonl").mkdir(parents=True)
    return out / "metrics.jsonl"


@pytest.mark.parametrize("block", [blocked_out, blocked_states, blocked_state, blocked_epochs])
@pytest.mark.parametrize("resume", ["--resume", "--no-resume"])
def test_the_command_names_what_is_in_its_way(block, resume, tmp_path):
    path = block(tmp_path / "out")
    command = ["train", *TINY, "--batch-size=1000", "--seeds=1", f"--out={tmp_path / 'out'}", resume]
    code, said = run_command(*command)
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert f"'{path}'" in said


def test_the_command_names_the_file_that_cannot_grow(tmp_path):
    command = ["train", *TINY, "--batch-size=1000", "--seeds=1", f"--out={tmp_path / 'out'}"]
    with file_size_limit(100_000):
        code, said = run_command(*command)
    state = tmp_path / "out" / "state_seed1" / "state_000000001.safetensors"
    assert (code, said) == (2, f"error: [Errno {errno.EFBIG}] File too large: '{state}'\n")
    assert names_in(state.parent) == []


# What is written


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_may_be_read_by_whom_the_umask_lets(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        for saver in (States(tmp_path / "states"), Models(tmp_path / "models")):
            saver.save(1)
            assert {path.stat().st_mode & 0o777 for path in saver.folder.iterdir()} == {mode}
    finally:
        os.umask(before)


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    tensors = {f'{name} "é': torch.arange(5).to(dtype) for dtype, name in DTYPES.items()}
    tensors |= {"turned": torch.rand(2, 3).T, "scalar": torch.tensor(0.5), "empty": torch.zeros(0, 4)}
    digest = write_tensors(tmp_path / "file", tensors)
    plain = {name: value.contiguous() for name, value in tensors.items()}
    assert (tmp_path / "file").read_bytes() == safetensors.torch.save(plain)
    assert digest == writing.file_sha256(tmp_path / "file")


def test_an_error_without_a_number_names_the_file_too(tmp_path):
    def write():
        with replacing(tmp_path / "file"):
            raise OSError("10 requested and 0 written")  # as NumPy says it

    with pytest.raises(OSError, match=rf"10 requested and 0 written: '{tmp_path}/file'$"):
        write()


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    """What a power cut would show, and a kill does not."""
    done = []

    def sync(descriptor, fsync=os.fsync):
        done.append("sync the folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync the file")
        fsync(descriptor)

    def rename(old, new, replace=os.replace):
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write_text(tmp_path / "file", "content")
    assert done == ["sync the file", "rename", "sync the folder"]
