"""The benchmarks run at tiny sizes and leave what they promise. Times are never asserted."""

import json
import math
from pathlib import Path

import pytest
import torch

import bench_ema
import bench_queue
import bench_step
import bench_supcon
import common
import report

pytestmark = pytest.mark.filterwarnings("default")  # other libraries may warn

METADATA = {"block", "size", "date", "commit", "versions", "device", "threads", "clock", "load_average", "skipped"}
FIELDS = {"case", "parameters", "contender", "role", "computes", "median_s", "iqr_s", "best_s", "rounds"}
FIELDS |= {"ratio_to_bound", "peak_extra_mib"}

SCRIPTS = {
    "supcon": (bench_supcon, ["--only", "momentum-distill", "eager"]),
    "ema": (bench_ema, ["--only", "momentum-distill", "foreach"]),
    "queue": (bench_queue, ["--only", "momentum-distill", "MoCo"]),
    "step": (bench_step, []),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with the files of one quick run of every script."""
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
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


@pytest.mark.parametrize("block", SCRIPTS)
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


def test_inference_has_the_same_parameters_with_and_without_distillation(results):
    content = json.loads((results / "step-cpu-quick.json").read_text(encoding="utf-8"))
    rows = [row for row in content["results"] if row["case"].startswith("inference")]
    assert len(rows) == 2
    assert rows[0]["model_parameters"] == rows[1]["model_parameters"]


def test_the_report_writes_table_and_chart_between_the_marks(results, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nend\n", encoding="utf-8")
    for _ in range(2):  # the second time replaces what the first wrote
        assert report.main(["--results", str(results), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n")
    assert text.endswith("\nend\n")
    assert "old" not in text
    assert text.count("## All figures") == 1
    for contender in ("momentum-distill", "dense formula (ALBEF), eager", "MoCo / ALBEF pattern", "queue *"):
        assert f"| {contender}" in text or f"**{contender}**" in text
    assert (tmp_path / "images" / "performance.png").stat().st_size > 10_000


def test_the_report_of_the_results_that_are_kept_is_what_the_page_says(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(report.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    assert report.main(["--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == report.PAGE.read_text(encoding="utf-8")


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
