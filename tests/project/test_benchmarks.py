"""The benchmarks run at tiny sizes and leave what they promise. Times are never asserted."""

import argparse
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_ema
import bench_queue
import bench_sigmoid
import bench_step
import bench_supcon
import common
import report
from conftest import ROOT

pytestmark = [
    pytest.mark.filterwarnings("default"),  # other libraries may warn
    pytest.mark.xdist_group("benchmarks"),  # so that `results` are made once
]

METADATA = {"block", "size", "date", "commit", "versions", "device", "threads", "clock", "load_average", "skipped"}
FIELDS = {"case", "parameters", "contender", "role", "computes", "median_s", "iqr_s", "best_s", "rounds"}
FIELDS |= {"ratio_to_bound", "peak_extra_mib"}

SCRIPTS = {
    "supcon": (bench_supcon, ["--only", "momentum-distill", "eager"]),
    "sigmoid": (bench_sigmoid, ["--only", "momentum-distill", "eager"]),
    "ema": (bench_ema, ["--only", "momentum-distill", "foreach"]),
    "queue": (bench_queue, ["--only", "momentum-distill", "MoCo"]),
    "step": (bench_step, []),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with the files of one quick run of every script, uncompiled; `make test-long` has them compiled."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        for block, (script, arguments) in SCRIPTS.items():
            if block != "queue":  # a process for each contender takes time; one script is enough
                patch.setattr(common, "cpu_peak_extra_mib", lambda *_: 1.0)
            assert script.main(["--quick", "--out", str(folder), *arguments]) == 0
            patch.undo()
    assert torch.get_num_threads() == threads
    return folder


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("block", SCRIPTS)
def test_a_script_runs_on_cuda(block, tmp_path):
    script, arguments = SCRIPTS[block]
    assert script.main(["--quick", "--device", "cuda", "--out", str(tmp_path), *arguments]) == 0
    assert json.loads((tmp_path / f"{block}-cuda-quick.json").read_text(encoding="utf-8"))["results"]


def run_alone(script, *options):
    """A benchmark as a process."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


@pytest.mark.long
def test_all_scripts_run_one_after_the_other(tmp_path):
    run_alone("run_all.py", "--quick", "--out", str(tmp_path), "--only", "momentum-distill")
    assert {f"{block}-cpu-quick.json" for block in (*SCRIPTS, "averages")} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.long
def test_ranks_are_counted_and_timed(tmp_path):
    run_alone("bench_ranks.py", "--processes", "1", "2", "--rows", "4", "--out", str(tmp_path))
    one, two = json.loads((tmp_path / "ranks-cpu.json").read_text(encoding="utf-8"))["results"]
    assert (one["processes"], one["collectives"]) == (1, {})
    assert two["processes"] == 2
    assert two["collectives"].keys() == two["bytes_sent"].keys() >= {"sum", "rows", "gradients (DDP)"}


@pytest.mark.parametrize("block", [*SCRIPTS, "averages"])
def test_a_script_writes_metadata_and_results(results, block):
    content = json.loads((results / f"{block}-cpu-quick.json").read_text(encoding="utf-8"))
    assert set(content) == {"metadata", "results"}
    assert set(content["metadata"]) == METADATA
    assert content["metadata"]["versions"]["torch"] == torch.__version__
    assert content["results"]
    for row in content["results"]:
        assert set(row) >= FIELDS
        assert row["role"] in ("ours", "bound", "reference", "rival", "part")
        assert min(row["median_s"], row["best_s"], row["ratio_to_bound"]) > 0
        assert row["iqr_s"] >= 0
        assert row["rounds"] >= 2
    assert {"ours", "bound"} <= {row["role"] for row in content["results"]}


def test_ours_and_the_dense_formula_agree_with_float64(results):
    content = json.loads((results / "supcon-cpu-quick.json").read_text(encoding="utf-8"))
    compared = [row for row in content["results"] if row["role"] != "bound"]
    assert compared
    for row in compared:
        assert row["loss_error"] < 1e-5
        assert row["gradient_error"] < 1e-5


def test_the_module_is_measured_with_raw_keys_and_the_gradient_of_its_temperature(results):
    content = json.loads((results / "supcon-cpu-quick.json").read_text(encoding="utf-8"))
    rows = [row for row in content["results"] if row["case"].startswith("module")]
    assert {row["contender"] for row in rows} == {
        "four products at the full rate",
        "momentum-distill",
        "momentum-distill, under torch.compile",
        "dense formula (ALBEF), eager",
    }
    (side,) = bench_supcon.make_sides(**rows[0]["parameters"])
    assert not torch.allclose(side.keys.norm(dim=1), torch.ones(()), atol=0.1)
    _, (of_query, of_temperature) = bench_supcon.build_module(**rows[0]["parameters"])()
    assert of_query.shape == side.query.shape
    assert of_temperature.shape == ()
    assert of_temperature != 0


def test_the_bound_of_the_loss_is_its_multiplications_at_the_full_rate(monkeypatch):
    case = {"rows": 512, "keys": 262144, "directions": 1}
    assert bench_supcon.flops(**case) == 4 * 2 * 512 * 262144 * 128
    monkeypatch.setattr(bench_supcon, "device_name", lambda _: "NVIDIA H200")
    half = bench_supcon.reckon_bound(1.0, **case, device="cuda", dtype="bfloat16")
    assert half == pytest.approx(0.139e-3, rel=1e-3)  # whatever the timed product took
    assert bench_supcon.reckon_bound(1.0, **case, device="cuda", dtype="float32") == pytest.approx(6 * half, rel=1e-2)
    monkeypatch.setattr(bench_supcon, "device_name", lambda _: "a new one")
    square = 2 * 8192**3
    unknown = bench_supcon.reckon_bound(square / 500e12, **case, device="cuda", dtype="bfloat16")
    assert unknown == pytest.approx(half * 989 / 500)
    on_cpu = bench_supcon.reckon_bound(2 * 512**3 / 100e9, **case, device="cpu", dtype="float32")
    assert on_cpu == pytest.approx(bench_supcon.flops(**case) / 100e9)


def test_the_formula_by_chunks_is_the_formula():
    """At sizes that eight divides and does not, and smaller ones."""
    for rows, script, settings in ((19, bench_supcon, {}), (5, bench_sigmoid, {"momentum": True})):
        (side,) = bench_supcon.make_sides(rows, 64, 1, "cpu", "float32")
        loss = functools.partial(script.dense_loss, **settings)
        value, gradients = bench_supcon.by_chunks(loss, side)
        expected = loss(side)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, side.query))


def test_every_average_is_that_of_eq_6_after_an_update(results):
    content = json.loads((results / "ema-cpu-quick.json").read_text(encoding="utf-8"))
    checked = {row["contender"]: row["average_error"] for row in content["results"] if "average_error" in row}
    assert checked.keys() >= {"momentum-distill", "torch._foreach_lerp_, lists cached"}
    assert max(checked.values()) < 1e-6


def test_an_average_that_does_nothing_is_found_out():
    parameters = {"model": "LSTM+Transformer pair", "device": "cpu"}
    idle = common.Contender("idle", build_idle)
    row = bench_ema.check_average(idle, parameters, build_idle(**parameters)())
    assert row["average_error"] > 1e-3


def build_idle(model, device):
    average = bench_ema.frozen_copy(bench_ema.online_model(model, device))
    return lambda: average


def test_every_row_of_the_short_table_is_measured():
    scripts = {"supcon": bench_supcon, "supcon_bfloat16": bench_supcon, "ema": bench_ema, "queue": bench_queue}
    scripts |= {"averages": bench_ema, "step": bench_step, "sigmoid": bench_sigmoid}
    for block, promises in itertools.groupby(report.PROMISES, key=lambda promise: promise.block):
        device = "cuda" if block == "supcon_bfloat16" else "cpu"  # the other blocks have the same cases on both
        rest = argparse.Namespace(dtype="bfloat16" if device == "cuda" else "float32", text_encoder="features")
        options = common.Options("full", device, 1, Path(), [], rest=rest)
        cases = {case.name: case for case in scripts[block].make_cases(options)}
        for promise in promises:
            assert promise.ours in {contender.name for contender in cases[promise.case].contenders}


def test_inference_has_the_same_parameters_with_and_without_distillation(results):
    content = json.loads((results / "step-cpu-quick.json").read_text(encoding="utf-8"))
    rows = [row for row in content["results"] if row["case"].startswith("inference")]
    assert len(rows) == 2
    assert rows[0]["model_parameters"] == rows[1]["model_parameters"]


def test_the_report_writes_tables_and_chart_between_the_marks(results, tmp_path, monkeypatch):
    pages = tmp_path / "performance.md", tmp_path / report.FIGURES
    for page in pages:
        page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nend\n", encoding="utf-8")
    ours = report.Promise("loss", "supcon", "cpu", "loss, N=4, Q=32, 1 direction")
    ours = ours._replace(line="contrastive loss")
    memory = ours._replace(what="memory", field="peak_extra_mib")
    absent = ours._replace(what="absent", case="no such case")
    monkeypatch.setattr(report, "PROMISES", (ours, memory, absent))
    for _ in range(2):  # the second time replaces what the first wrote
        assert report.main(["--results", str(results), "--page", str(pages[0])]) == 0
    few, all_figures = (page.read_text(encoding="utf-8") for page in pages)
    for text in few, all_figures:
        assert text.startswith("# Title\n")
        assert text.endswith("\nend\n")
        assert "old" not in text
    assert re.search(
        r"^\| loss \| CPU \| [\d.]+ ms \| dense formula \(ALBEF\), eager: [\d.]+ ms \| .*(faster|slower).* \| .* % \|$",
        all_figures,
        flags=re.MULTILINE,
    )
    less = "as much memory |"
    assert f"| memory | CPU | 1.0 MiB | dense formula (ALBEF), eager: 1.0 MiB | {less}  |" in all_figures
    line = rf"^\| contrastive loss \| dense .* \| .*x (faster|slower).*, {re.escape(less)} not measured on a GPU \|$"
    assert re.search(line, few, flags=re.MULTILINE)
    assert "absent" not in few + all_figures
    assert all_figures.count("## All figures") == 1
    assert "images/performance.png" in all_figures
    for contender in ("momentum-distill", "dense formula (ALBEF), eager", "MoCo / ALBEF pattern", "queue *"):
        assert f"| {contender}" in all_figures or f"**{contender}**" in all_figures
    assert (tmp_path / "images" / "performance.png").stat().st_size > 10_000


def test_the_report_of_the_results_that_are_kept_is_what_the_pages_say(tmp_path):
    pages = report.PAGE, report.PAGE.with_name(report.FIGURES)
    for page in pages:
        (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert report.main(["--page", str(tmp_path / report.PAGE.name)]) == 0
    for page in pages:
        assert (tmp_path / page.name).read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


def test_the_page_on_performance_fits_one_screen():
    assert len(report.PAGE.read_text(encoding="utf-8").splitlines()) <= 50


def test_the_report_wants_marks_and_results(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="expected the lines"):
        report.main(["--results", str(results), "--page", str(page)])
    with pytest.raises(SystemExit, match="expected results, got none"):
        report.main(["--results", str(tmp_path), "--page", str(page)])


def test_the_fullest_run_of_a_block_counts(tmp_path):
    for size in ("small", "full", "quick"):
        metadata = {"block": "ema", "device": "a cpu", "size": size}
        (tmp_path / f"ema-cpu-{size}.json").write_text(json.dumps({"metadata": metadata, "results": []}))
    assert [run["metadata"]["size"] for run in report.read_runs(tmp_path)] == ["full"]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_fitted_exponent_is_the_power_of_the_large_end(power):
    rows = [{"parameters": {"keys": 2**k}, "median_s": 1e-3 * max(8.0, 2.0**k) ** power} for k in range(10)]
    assert report.exponent(rows, "Q", "median_s") == pytest.approx(power, abs=1e-9)


def test_the_worst_moment_of_a_call_is_measured():
    peak = common.cpu_peak_extra_mib(build_sixteen_mib, {}, threads=1)
    if peak is None:
        pytest.skip("the system does not tell")
    assert math.isclose(peak, 16, abs_tol=2)


def build_sixteen_mib():
    def run():
        for _ in range(2):  # one after the other, so the peak is that of one
            torch.ones(16 * common.MIB // 4)

    return run


def test_a_contender_that_fails_is_skipped_by_name(capsys):
    case = common.Case("case", (common.Contender("ours", build_sixteen_mib, role="ours"), BROKEN, ABSENT), {})
    options = common.Options(size="quick", device="cpu", threads=1, out=Path(), only=[])
    results, skipped = common.run_cases([case], options)
    assert [row["contender"] for row in results] == ["ours"]
    assert [(entry["contender"], entry["reason"]) for entry in skipped] == [
        ("broken", "RuntimeError: out of order"),
        ("absent", "not installed"),
    ]
    assert "skipped: absent (not installed)" in capsys.readouterr().out


def build_broken():
    raise RuntimeError("out of order")


BROKEN = common.Contender("broken", build_broken)
ABSENT = common.Contender("absent", build_broken, needs="no_such_package")
