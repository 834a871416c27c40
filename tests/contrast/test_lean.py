"""The lean kernels: what the compiler makes of them for GPUs not here. `test_triton.py` runs `lean_cases.py`.

Of each kernel that goes through the keys `kernel_budget.json` holds what it may take: registers, bytes of spilled ones,
KiB of shared memory, and lane instructions for each score in its loops over whole tiles. After a change for the
better, `python tests/pin.py --kernels` writes it anew; read the difference.
"""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import pinned
from conftest import ROOT
from momentum_distill._contrast import kernel as present
from momentum_distill._contrast import lean, lean_kernels
from momentum_distill._contrast.lean import Part

BUDGET = Path(__file__).with_name("kernel_budget.json")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED = {80: 99, 90: 227, 100: 227}  # KiB that a program may have; the least of 8.x
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Kernel, dtype of the keys, queries, compute capability. The first is what a step of training meets on a Hopper.
VARIANTS = [
    (kernel, dtype, n, capability)
    for capability in (90, 80, 100)
    for kernel in ("attend", "sum_classes")
    for dtype in (torch.bfloat16, torch.float32)
    for n in ((512, 64) if kernel == "attend" else (512,))
]


def name_of(variant):
    kernel, dtype, n, capability = variant
    return f"{kernel}, {str(dtype).removeprefix('torch.')}, N={n}, sm_{capability}"


def test_without_triton_the_kernels_import_and_take_nothing(monkeypatch):
    monkeypatch.setattr(present, "triton", None)
    monkeypatch.setattr(present, "tl", None)
    spec = importlib.util.spec_from_file_location("lean_kernels_without", lean_kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row, label = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    assert not lean.takes(row, None, [Part(row, None, label)], label, 1.0, 1.0, 0.5)


@pytest.mark.skipif(not present.available(), reason="Triton is not installed")
@pytest.mark.long
def test_the_plan_for_a_gpu_runs_without_one(tmp_path):
    """Every step of it but the tests, at tiny sizes."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_plan.sh"), "--tiny"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = [line.split(":")[0] for line in run.stdout.splitlines() if ": exit 0" in line]
    assert steps == ["correct", "small", "large", "kernels", "yardstick", "classes", "small32", "large32", "tilings"]
    for name in steps:
        content = json.loads((tmp_path / f"gpu_plan-{name}.json").read_text(encoding="utf-8"))
        assert content["results"]
        assert content["metadata"]["versions"]["torch"] == torch.__version__


def tools():
    """The folder with NVIDIA's disassemblers, which Triton brings; or why there is none."""
    if not present.available():
        return None, "Triton is not installed"
    if tuple(map(int, present.triton.__version__.split(".")[:2])) < (3, 7):
        return None, "what an older compiler makes of the kernels is not held fast"
    folder = Path(present.triton.__file__).parent / "backends" / "nvidia" / "bin"
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if not (folder / tool).is_file()]
    return folder, f"Triton without {missing}" if missing else ""


FOLDER, WHY_NOT = tools()
compiles = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


def compile(kernel, types, constants, capability, **options):
    """A kernel for a GPU that need not be there; pointers and strides are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, signature, {(names.index(name),): x for name, x in constants.items()}, aligned)
    return present.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_variant(kernel, dtype, n, capability):
    """The kernel as `lean` launches it for 128 features, other momentum keys, outside the logarithm."""
    keys = torch.empty(1, 128, dtype=dtype)
    attending, classes = lean.tilings(n, Part(keys, keys, keys), capability // 10)
    plan = attending if kernel == "attend" else classes
    descriptor = f"tensordesc<{POINTERS[dtype][1:]}[{plan.block_k},128]>" if capability >= 90 else POINTERS[dtype]
    features = ("query", "momentum_query", "keys", "momentum_keys")
    types = dict.fromkeys(("sizes", "key_inverse", "momentum_inverse", "lse", "mean", "mean_logit", "sums"), "*fp32")
    types |= dict.fromkeys(features, POINTERS[dtype]) | dict.fromkeys(("key_tiles", "momentum_tiles"), descriptor)
    types |= {"query_labels": "*i64", "key_labels": "*i64", "flags": "*i32", "count": "*i32", "first_rows": "*i32"}
    options = lean._loop(plan)
    stages = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = options | lean._widths(128) | {"SCALED": False, "TMA": capability >= 90, "INTERPRETED": False}
    if kernel == "attend":
        constants |= {"TAUGHT": True, "INSIDE": False, "SAME": False, "LOGIT": True, "MASKED_K": plan.masked_k}
    return compile(getattr(lean_kernels, kernel), types, constants, capability, **stages), plan


def printed(compiled, folder):
    """What NVIDIA's tools say that a compiled kernel takes, and its machine code."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    commands = [("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")]
    return [
        subprocess.run([str(FOLDER / tool), option, str(file)], capture_output=True, text=True, check=True).stdout
        for tool, option in commands
    ]


def loops(code, needed):
    """How often each instruction stands in each innermost loop that has one of those `needed`, in order."""
    labels, instructions, back = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line):
            instructions.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2]) if found[1] == "BRA" else None
            if target and target[0] in labels:
                back.append((labels[target[0]], len(instructions)))
    back = sorted({(a, b) for a, b in back if needed in instructions[a:b]}, key=lambda ends: ends[1] - ends[0])
    inner = []
    for a, b in back:  # from the shortest: waiting for a barrier jumps out of a loop and back into it
        if not any(a < d and c < b for c, d in inner):
            inner.append((a, b))
    return [collections.Counter(instructions[a:b]) for a, b in sorted(inner)]


def measured(variant, folder):
    """What `kernel_budget.json` holds of a variant."""
    kernel, _, _, capability = variant
    compiled, plan = compile_variant(*variant)
    usage, code = printed(compiled, folder)
    whole_and_masked = loops(code, TENSOR_CORES[capability])
    kinds = 2 if kernel == "attend" else 1
    assert len(whole_and_masked) == 2 * kinds, "a loop over whole tiles and one over others for each kind"
    whole = whole_and_masked[::2]
    scores = plan.block_q * plan.block_k / (32 * plan.num_warps)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills in loops over whole tiles": sum(loop["LDL"] + loop["STL"] for loop in whole),
        "shared KiB": -(-compiled.metadata.shared // 1024),
        "instructions per score": [round(loop.total() / scores, 2) for loop in whole],
        # Each product of 16 bits starts and ends once, or the compiler makes every instruction wait for the one before.
        "starts and waits of products": [loop["WARPGROUP"] for loop in whole],
        "tensor core instructions": [loop[TENSOR_CORES[capability]] for loop in whole],
    }


@compiles
@pytest.mark.parametrize(
    "variant",
    [pytest.param(x, marks=[] if index == 0 else [pytest.mark.long]) for index, x in enumerate(VARIANTS)],
    ids=name_of,
)
def test_kernels_stay_within_their_budget(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found, budget = measured(variant, tmp_path), pinned.read(BUDGET)[name_of(variant)]
    assert found.keys() == budget.keys()
    assert found["shared KiB"] <= SHARED[variant[3]]
    for name, value in found.items():
        if isinstance(value, list):
            assert all(x <= y for x, y in zip(value, budget[name], strict=True)), (name, value, budget[name])
        else:
            assert value <= budget[name], name


def test_what_keys_in_16_bits_may_take():
    """The budget itself: nothing spilled on a Hopper, and what makes a score in at most 11 instructions."""
    budget = pinned.read(BUDGET)
    assert set(budget) == set(map(name_of, VARIANTS))
    for variant in VARIANTS:
        entry = budget[name_of(variant)]
        assert min(entry["tensor core instructions"]) > 0
        if torch.bfloat16 in variant:
            assert entry["spills in loops over whole tiles"] == 0
            assert entry["spilled bytes"] == 0
    per_score = budget[name_of(VARIANTS[0])]["instructions per score"]
    assert sum(per_score) / len(per_score) <= 11


@compiles
@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_the_kernels_around_compile_and_spill_nothing(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("query", "momentum_query", "keys", "momentum_keys", "ready", "momentum_ready"), "*bf16")
    floats = "temperature momentum_temperature alpha unit lengths sizes inverse lse mean mean_logit positive_sum terms"
    floats += (
        " grads grad_temperatures reduced grad_query grad_temperature grad_alpha upstream temperature_out alpha_out"
    )
    types |= dict.fromkeys(floats.split(), "*fp32") | {"copies": "*fp16", "query_out": "*bf16", "counts": "*i64"}
    types |= {"query_labels": "*i64", "key_labels": "*i64", "sums": "*fp64", "temperature_sums": "*fp64"}
    types |= dict.fromkeys(("flags", "first_rows", "positive_count"), "*i32")
    types |= {f"{name}_shortest": "fp32" for name in ("query", "momentum_query", "key", "momentum_key")}
    rows = lean._widths(128) | {"TAUGHT": True, "NORMALIZE": True, "BLOCK_N": lean._ROWS}
    keys = {"RAW_KEYS": True, "SAME": False, "TILE": lean._TILE, "TILES": 1}
    splits = {"LOGIT": True, "INSIDE": False, "PER_POSITIVE": False, "CHUNK": lean._MERGE_CHUNK}
    ends = {"MEAN": True, "BY_ROW": False}
    merged = rows | splits | {"BLOCK_N": lean._MERGE_ROWS}
    constants = {"prologue": rows | keys, "merge": merged, "finish": rows | ends, "scale": rows | ends}
    for name, given in constants.items():
        kernel = getattr(lean_kernels, name)
        own = {constant: value for constant, value in given.items() if constant in kernel.arg_names}
        compiled = compile(kernel, types, own, capability)
        assert "STACK:0" in printed(compiled, tmp_path)[0], name


def write() -> None:
    """All budgets, as they are now."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        budget = {name_of(variant): measured(variant, Path(folder)) for variant in VARIANTS}
    pinned.write(BUDGET, budget, command="python tests/pin.py --kernels", indent=1)
