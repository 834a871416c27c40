"""A disk that is full, for what writes files."""

import contextlib
import resource


@contextlib.contextmanager
def file_size_limit(size):
    """No file can grow beyond `size` bytes: a disk that is full to the byte, made by the system itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
