"""The fused kernels: what needs no GPU, and `triton_cases.py` in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from momentum_distill._contrast import kernel
from momentum_distill._contrast.problem import Part, Prepare
from tiers import TIER

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
needs_triton = pytest.mark.skipif(not kernel.available(), reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param("1", id="interpreter", marks=pytest.mark.repeated),
        pytest.param(
            "0",
            id="gpu",
            marks=[
                pytest.mark.cuda,
                pytest.mark.long,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_the_kernels_equal_the_formulas(interpret):
    chosen = ["-m", "not long"] if TIER == "test" else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *chosen,
        str(Path(__file__).with_name("triton_cases.py")),
    ]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def one_part(dtype):
    """One query, and a part of three keys."""
    labels, prepare = torch.zeros(3, dtype=torch.int64), Prepare(F32, normalize=False)
    return torch.zeros(1, 2), labels[:1], [Part(torch.zeros(3, 2, dtype=dtype), None, labels, prepare, False, None)]


@needs_triton
def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"^keys: expected float32, bfloat16 or float16, got a torch.float64 tensor"):
        kernel.attend(*one_part(torch.float64))


def test_without_triton_the_module_imports_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    spec = importlib.util.spec_from_file_location("momentum_distill._contrast.kernel_without", kernel.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.available()
    with pytest.raises(RuntimeError, match=r"^attend: expected Triton to be installed"):
        module.attend(*one_part(F32))
    assert not module.works(torch.device("cuda"))


@given(
    n=st.integers(1, 100_000),
    q=st.integers(1, 10**7),
    d=st.integers(1, 2048),
    dtype=st.sampled_from([F32, BF16]),
    kinds=st.sampled_from([2, 3]),
    inside=st.booleans(),
    shared=st.sampled_from([99, 163, 227]),
    parts=st.integers(1, 3),
)
def test_the_plan_covers_every_key_within_its_memory(n, q, d, dtype, kinds, inside, shared, parts):
    plan = kernel._plan(n, q, d, dtype, kinds=kinds, inside=inside, num_sms=132, shared=shared * 1024, parts=parts)
    assert plan.num_splits * plan.keys_per_split >= q > (plan.num_splits - 1) * plan.keys_per_split
    assert plan.num_splits == 1 or 4 * kinds * parts * plan.num_splits * n * (d + 1) <= 16 * 2**20
    assert all(size >= 16 and size & (size - 1) == 0 for size in plan[:4])
    assert plan.chunk <= plan.block_d
    assert plan.chunk >= d or plan.block_d % plan.chunk == 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_few_queries_fill_the_gpu_and_no_program_waits_for_another(dtype, inside):
    plan = kernel._plan(256, 262_144, 128, dtype, kinds=3, inside=inside, num_sms=132, shared=227 * 1024)
    blocks = 256 // plan.block_q
    programs = plan.num_splits * (3 * blocks if inside else 2 * blocks + 1)
    slots = 132 * (kernel._WARPS_PER_SM // plan.num_warps)
    assert 0.9 * slots <= programs <= slots


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize(
    ("d", "dtype", "capability"),
    [(128, BF16, 90), (384, F16, 80), (100, F32, 80)],
    ids=["bfloat16", "wide float16", "float32"],
)
def test_the_kernels_compile_for_a_gpu_that_is_not_here(d, dtype, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared = 99 * 1024  # what a program gets on every GPU since 2020
    plan = kernel._plan(512, 65_536, d, dtype, kinds=3, inside=True, num_sms=132, shared=shared)
    stored = {F32: "*fp32", BF16: "*bf16", F16: "*fp16"}[dtype]
    names = [
        (stored, "keys momentum_keys raw"),
        ("*fp32", "query momentum_query key_scale momentum_key_scale state lengths unit"),
        ("*fp32", "lse mean mean_logit part_lse part_mean part_mean_logit"),
        ("fp32", "shortest"),
        ("*i32", "first first_rows part_count"),
        ("*i64", "query_labels key_labels labels"),
        ("*i1", "present"),
    ]
    types = {name: kind for kind, several in names for name in several.split()}

    def compile(function, constants, **options):
        count = {"count": "*i32" if function is kernel._attend_kernel else "*i64"}
        kinds = defaultdict(lambda: "i32", types | count | dict.fromkeys(constants, "constexpr"))
        source = ASTSource(
            function,
            {name: kinds[name] for name in function.arg_names},
            {(function.arg_names.index(name),): value for name, value in constants.items()},
        )
        return kernel.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    kinds = 3 if capability == 90 else 2  # compiling takes as long as the code is
    constants = {"WIDTH": d, "KINDS": kinds, "INSIDE": kinds == 3, "SAME_KEYS": False, "SCALED": dtype != F16}
    constants |= {"BLOCK_Q": plan.block_q, "BLOCK_K": plan.block_k, "BLOCK_D": plan.block_d, "CHUNK": plan.chunk}
    constants |= {"PRODUCTS": kernel._FLOAT32_PRODUCTS, "INTERPRETED": False}
    compiled = compile(kernel._attend_kernel, constants, num_warps=plan.num_warps, num_stages=plan.num_stages)
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]  # the tensor cores
    assert compiled.metadata.shared <= shared
    compile(kernel._merge_kernel, {"WIDTH": d, "BLOCK_Q": 8, "BLOCK_D": 128})
    compile(kernel._first_kernel, {"BLOCK": 64, "INSIDE": False})
    compile(kernel._state_kernel, {"WIDTH": d, "SAME_KEYS": False, "BLOCK_K": 32, "BLOCK_D": 128})
    compile(kernel._normalize_kernel, {"WIDTH": d, "INVERSE": False, "BLOCK_N": 32, "BLOCK_D": 128})
