"""The fused kernel: what needs no GPU, and `triton_cases.py` in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from momentum_distill import _triton

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
needs_triton = pytest.mark.skipif(not _triton.available(), reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param("1", id="interpreter", marks=pytest.mark.slow),
        pytest.param(
            "0",
            id="gpu",
            marks=[
                pytest.mark.cuda,
                pytest.mark.slow,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_the_kernel_equals_the_formulas(interpret):
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests / "triton_cases.py")]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@needs_triton
def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"^keys: expected float32, bfloat16 or float16, got a torch.float64 tensor"):
        _triton.attend(torch.zeros(1, 2), torch.zeros(3, 2, dtype=torch.float64), None, scale=torch.tensor(1.0))


def test_without_triton_the_module_imports_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    spec = importlib.util.spec_from_file_location("momentum_distill._triton_without", _triton.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.available()
    with pytest.raises(RuntimeError, match=r"^attend: expected Triton to be installed"):
        module.attend(torch.zeros(1, 2), torch.zeros(3, 2), None, scale=torch.tensor(1.0))


@given(
    n=st.integers(1, 100_000),
    q=st.integers(1, 10**7),
    d=st.integers(1, 2048),
    dtype=st.sampled_from([F32, BF16]),
    kinds=st.integers(1, 3),
)
def test_the_plan_covers_every_key_within_its_memory(n, q, d, dtype, kinds):
    plan = _triton._plan(n, q, d, dtype, kinds=kinds, num_sms=132)
    assert plan.num_splits * plan.keys_per_split >= q > (plan.num_splits - 1) * plan.keys_per_split
    assert plan.num_splits == 1 or 4 * kinds * plan.num_splits * n * (d + 1) <= 16 * 2**20
    assert all(size >= 16 and size & (size - 1) == 0 for size in plan[:4])
    assert plan.chunk <= plan.block_d
    assert plan.chunk >= d or plan.block_d % plan.chunk == 0


def test_few_queries_fill_the_gpu():
    plan = _triton._plan(512, 262_144, 128, BF16, kinds=2, num_sms=132)
    assert 0.9 * 132 <= 512 // plan.block_q * plan.num_splits <= 132


@needs_triton
@pytest.mark.parametrize(
    ("d", "dtype", "capability"),
    [(128, BF16, 80), (128, BF16, 90), (384, F16, 90), (100, F32, 90)],
    ids=["bfloat16 on 8.0", "bfloat16 on 9.0", "wide float16", "float32"],
)
def test_the_kernels_compile_for_a_gpu_that_is_not_here(d, dtype, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = _triton._plan(512, 65_536, d, dtype, kinds=3, num_sms=132)
    pointers = {F32: "*fp32", BF16: "*bf16", F16: "*fp16"}
    types = dict.fromkeys(("query", "momentum_query", "scale", "momentum_scale"), "*fp32")
    types |= dict.fromkeys(("lse", "mean", "mean_logit", "part_lse", "part_mean", "part_mean_logit"), "*fp32")
    types |= {"keys": pointers[dtype], "momentum_keys": pointers[dtype], "present": "*i1"}
    types |= {"query_labels": "*i64", "key_labels": "*i64"}

    def compile(kernel, constants, **options):
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): x for name, x in constants.items()})
        return _triton.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    constants = {"WIDTH": d, "MOMENTUM": True, "SAME_KEYS": False, "POSITIVE": True, "MASKED": True}
    constants |= {"BLOCK_Q": plan.block_q, "BLOCK_K": plan.block_k, "BLOCK_D": plan.block_d, "CHUNK": plan.chunk}
    constants |= {"PRODUCTS": _triton._FLOAT32_PRODUCTS, "INTERPRETED": False}
    compiled = compile(_triton._attend_kernel, constants, num_warps=plan.num_warps, num_stages=plan.num_stages)
    tensor_cores = "wgmma" if capability == 90 and plan.block_q >= 64 else "mma.sync"
    assert (tensor_cores in compiled.asm["ptx"]) == (dtype != F32)
    assert compiled.metadata.shared <= 99 * 1024  # what a program gets on every GPU since 2020
    compile(_triton._merge_kernel, {"WIDTH": d, "MOMENTUM": True, "BLOCK_Q": 8, "BLOCK_D": 128})
