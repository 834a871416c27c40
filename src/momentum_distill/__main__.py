"""`python -m momentum_distill`: what a bug report should say about the machine and the fast paths in use."""

import os
import platform

import torch
import torch.distributed as dist

from momentum_distill import __version__
from momentum_distill._contrast import engine


def describe_machine() -> str:
    """Versions, devices and fast paths, a line each."""
    devices = [f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index} ({torch.cuda.get_device_name(index)}, capability {major}.{minor})")
    if torch.backends.mps.is_available():
        devices.append("mps")
    backends = [
        name for name in ("gloo", "nccl", "mpi") if dist.is_available() and getattr(dist, f"is_{name}_available")()
    ]
    lines = {
        "momentum-distill": __version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "devices": ", ".join(devices),
        "distributed": ", ".join(backends) or "not available",
        "contrastive loss": f"matrices up to {engine.DENSE_SCORES:,} scores, tiles above",
        "Triton kernel": _triton_state(),
        "deterministic": str(torch.are_deterministic_algorithms_enabled()),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _triton_state() -> str:
    """Whether the kernel is used for float32 sums on CUDA."""
    from momentum_distill._contrast import kernel

    if not kernel.available():
        return "off: the package triton is not installed"
    if not torch.cuda.is_available():
        return "off: no CUDA device"
    if os.environ.get("MOMENTUM_DISTILL_TRITON") == "0":
        return "off: MOMENTUM_DISTILL_TRITON=0"
    if not kernel.works(torch.device("cuda", torch.cuda.current_device())):
        return "off: it does not work on this GPU"
    return "on"


if __name__ == "__main__":
    print(describe_machine())
