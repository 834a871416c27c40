"""Files that a kill at any moment leaves whole.

A file is written beside its place under another name, synced to disk, then renamed: there is the old one or the new
one, never half of one. The old one stays as well where the disk is full or may not be written to; the error names it. A
link in place of a file is replaced and what it points to left alone; a link in place of a folder is followed.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def naming(error: OSError, path: Path) -> OSError:
    """The same about `path`: a full disk names no file."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written to inside the context; it becomes `path` at the end, or never.

    Raises:
        OSError: If the disk refuses, with `path` in it and nothing changed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        part.unlink(missing_ok=True)  # of a killed writer; and were it a link, its target would be written to
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is what to tell
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(part)):
            raise naming(error, path) from error
        raise
    sync_folder(path.parent)


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Whether a file, or a folder of files, can be written at `path`, tried before any work. Nothing is left there.

    Raises:
        OSError: If not, with `path` in it.
    """
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        places = [path, *path.parents] if folder else path.parents
        there = next(place for place in places if os.path.lexists(place))  # the others would be made
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise naming(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut, where the system lets one: the new file is there in any case."""
    if os.name == "posix":
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_rows(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """A CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")


def sweep(folder: Path) -> None:
    """Remove what a killed writer left under temporary names."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite_or_none(value: Any) -> Any:
    """The value for JSON, which has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
