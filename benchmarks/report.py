"""Write what was measured into docs/performance.md, docs/performance_figures.md and its picture.

    python benchmarks/report.py

Of each block and device, the fullest run in results/ counts. Everything between the two marks of a page is replaced.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_ema import WITH_ADAPTERS
from bench_supcon import CAPTURED, OURS, OURS_COMPILED
from common import RESULTS, ROOT, show_seconds

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"
BLOCKS = ("supcon", "supcon_bfloat16", "supcon_float16", "sigmoid", "ema", "averages", "queue", "step", "step_encoder")
SIZES = ("quick", "small", "full")
FIGURES = "performance_figures.md"  # the page of all figures, beside that of few

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and line styles differ too.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("x", "o", "s", "^", "v", "D", "P")
STYLES = (":", "-", "--", "-.", "--", "-.", ":")

Row = dict[str, Any]
Run = dict[str, Any]  # the content of a file: metadata and results


def read_runs(folder: Path) -> list[Run]:
    """The fullest run of each block on a CPU and on a GPU, blocks in order."""
    best: dict[tuple[str, str], Run] = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "metadata" not in run:  # what several ranks cost stands in docs/distributed.md
            continue
        key = run["metadata"]["block"], kind_of_device(run)
        if key not in best or SIZES.index(run["metadata"]["size"]) > SIZES.index(best[key]["metadata"]["size"]):
            best[key] = run
    return sorted(best.values(), key=lambda run: (kind_of_device(run), BLOCKS.index(run["metadata"]["block"])))


# ------------------------------------------------------------------------------------------------- what matters


class Promise(NamedTuple):
    """Of one contender of ours in one case, the time or the memory."""

    what: str
    block: str
    device: str
    case: str
    ours: str = OURS.name
    field: str = "median_s"
    line: str = ""  # of the short table


HALF = "supcon_bfloat16"
QUEUE, UNIT = "step of 5 streams, N=64, Q=65536", "momentum-distill, normalize=False"
QUEUE_LINE = "`ClassQueue`, 5 streams, N=64, Q=65,536"
STEP = "training step, text features, batch 64, 50 steps, Q=1024"
LARGE, HUGE = "loss, N=256, Q=65536, 1 direction", "loss, N=512, Q=262144, 1 direction, bfloat16"
SMALL_MODEL, LARGE_MODEL = "LSTM+Transformer pair, 0.44 M parameters", "BERT-base shape, 109.48 M parameters"
TOGETHER, SCHEDULED = "momentum-distill EMADict", "momentum-distill, PowerFunction"
ADAPTERS, SHARING = f"update, {WITH_ADAPTERS}, 0.29 M parameters", "momentum-distill, share_frozen=True"
ADAPTERS_LINE = "`EMAWrapper(share_frozen=True)`, 0.29 M of 110 M trained"
MEDIUM_LOSS = "contrastive loss, N=64, Q=1,024"
LARGE_SIGMOID, SIGMOID_LINE = "sigmoid loss, N=256, Q=65536", "sigmoid loss, N=256, Q=65,536"
LARGE_LOSS = "a large one, N=256, Q=65,536; GPU: N=512, Q=262,144"
PROMISES = (
    Promise("loss, N=16, Q=64", "supcon", "cpu", "loss, N=16, Q=64, 1 direction"),
    Promise("loss, N=64, Q=1024", "supcon", "cpu", "loss, N=64, Q=1024, 1 direction", line=MEDIUM_LOSS),
    Promise("the same, raw keys, learned temperature", "supcon", "cpu", "module, raw keys, N=64, Q=1024"),
    Promise("the same, under torch.compile", "supcon", "cpu", "module, raw keys, N=64, Q=1024", OURS_COMPILED.name),
    Promise("loss, N=128, Q=8192", "supcon", "cpu", "loss, N=128, Q=8192, 1 direction"),
    Promise("loss, N=256, Q=65536", "supcon", "cpu", LARGE, line=LARGE_LOSS),
    Promise("the same, under torch.compile", "supcon", "cpu", LARGE, OURS_COMPILED.name),
    Promise("its memory", "supcon", "cpu", LARGE, field="peak_extra_mib", line=LARGE_LOSS),
    Promise("its memory, under torch.compile", "supcon", "cpu", LARGE, OURS_COMPILED.name, "peak_extra_mib"),
    Promise(
        "loss, N=64, Q=1024, bfloat16", HALF, "cuda", "loss, N=64, Q=1024, 1 direction, bfloat16", line=MEDIUM_LOSS
    ),
    Promise("loss, N=512, Q=262144, bfloat16", HALF, "cuda", HUGE, line=LARGE_LOSS),
    Promise("the same, ours in a CUDA graph, the formula without", HALF, "cuda", HUGE, CAPTURED[0].name),
    Promise("its memory", HALF, "cuda", HUGE, field="peak_extra_mib", line=LARGE_LOSS),
    Promise("sigmoid loss, N=64, Q=1024", "sigmoid", "cpu", "sigmoid loss, N=64, Q=1024"),
    Promise("sigmoid loss, N=256, Q=65536", "sigmoid", "cpu", LARGE_SIGMOID, line=SIGMOID_LINE),
    Promise("its memory", "sigmoid", "cpu", LARGE_SIGMOID, field="peak_extra_mib", line=SIGMOID_LINE),
    Promise(
        "average, 0.44 M parameters", "ema", "cpu", f"update, {SMALL_MODEL}", line="`EMAWrapper`, 0.44 M parameters"
    ),
    Promise("average, 109 M parameters", "ema", "cpu", f"update, {LARGE_MODEL}", line="`EMAWrapper`, 109 M parameters"),
    Promise(
        "average, 0.44 M parameters", "ema", "cuda", f"update, {SMALL_MODEL}", line="`EMAWrapper`, 0.44 M parameters"
    ),
    Promise(
        "average, 109 M parameters", "ema", "cuda", f"update, {LARGE_MODEL}", line="`EMAWrapper`, 109 M parameters"
    ),
    Promise(
        "three averages, 109 M parameters",
        "averages",
        "cpu",
        f"three averages, {LARGE_MODEL.replace(', ', ', float32, ')}",
        TOGETHER,
        line="`EMADict`, three averages of 109 M",
    ),
    Promise(
        "average by a schedule, 0.44 M parameters",
        "averages",
        "cpu",
        f"update by a schedule, {SMALL_MODEL}",
        SCHEDULED,
        line="decay by a schedule, 0.44 M",
    ),
    Promise("average, 0.29 M of 109.8 M trained", "averages", "cpu", ADAPTERS, SHARING, line=ADAPTERS_LINE),
    Promise("its own memory", "averages", "cpu", ADAPTERS, SHARING, "own_mib", ADAPTERS_LINE),
    Promise("queue that normalises, 5 streams, N=64, Q=65536", "queue", "cpu", QUEUE, line=QUEUE_LINE),
    Promise(
        "queue, 5 streams, N=64, Q=65536",
        "queue",
        "cpu",
        QUEUE,
        UNIT,
        line="the same with `normalize=False`",
    ),
    Promise(
        "queue, 5 streams, N=64, Q=65536",
        "queue",
        "cuda",
        QUEUE,
        UNIT,
        line="the same with `normalize=False`",
    ),
    Promise("step of MTMD, text features", "step", "cpu", STEP, "with distillation", line="training step of MTMD"),
)


class Measured(NamedTuple):
    """A promise, ours and the best of the others that do the same; without others, the bound."""

    promise: Promise
    ours: Row
    best: Row | None
    bound: Row | None

    @property
    def other(self) -> Row | None:
        """What it is compared with: the best, or else the bound."""
        return self.best or self.bound

    def comparison(self) -> str:
        field = self.promise.field
        return "" if self.other is None else show_comparison(self.ours[field], self.other[field], field)


def kept(runs: Iterable[Run]) -> list[Measured]:
    """The promises of which there are figures."""
    by_block = {(run["metadata"]["block"], kind_of_device(run).lower()): by_case(run) for run in runs}
    found = []
    for promise in PROMISES:
        rows = by_block.get((promise.block, promise.device), {}).get(promise.case, [])
        rows = [row for row in rows if row.get(promise.field) is not None]
        ours = next((row for row in rows if row["contender"] == promise.ours and row["role"] == "ours"), None)
        same = ours["computes"] if ours else ""
        others = [row for row in rows if row["role"] in ("rival", "reference") and row["computes"] == same]
        best = min(others, key=lambda row: row[promise.field], default=None)
        bound = next((row for row in rows if row["role"] == "bound"), None)
        if ours is not None:
            found.append(Measured(promise, ours, best, bound))
    return found


def short_table(measured: Sequence[Measured]) -> list[str]:
    """Ratios alone, CPU and GPU side by side."""
    lines = ["| | beside | CPU | GPU |", "|---|---|---|---|"]
    for line in dict.fromkeys(one.promise.line for one in measured if one.promise.line):
        of_line = [one for one in measured if one.promise.line == line]
        beside = name_of_other(of_line[0])
        cells = [
            show_cell([one for one in of_line if one.promise.device == device], beside) or NONE[device]
            for device in ("cpu", "cuda")
        ]
        lines.append(f"| {line} | {beside} | {' | '.join(cells)} |")
    return lines


def name_of_other(one: Measured) -> str:
    return "" if one.other is None else full_name(one.other)


def show_cell(measured: Iterable[Measured], beside: str) -> str:
    """Comparisons; with whom, where it is not who stands at the beginning of the line."""
    groups = itertools.groupby(measured, key=name_of_other)
    said = [(name, ", ".join(one.comparison() for one in group)) for name, group in groups]
    return ", ".join(text if name == beside else f"{text} than {name}" for name, text in said)


NONE = {"cpu": "", "cuda": "not measured on a GPU"}


def promise_table(measured: Iterable[Measured]) -> list[str]:
    """Ours, the best of the others, and the share of the bound in our time."""
    lines = [
        "| | | ours | the best other of the same work | ours is | share of the bound |",
        "|---|---|---|---|---|---|",
    ]
    for promise, ours, best, _ in measured:
        show = show_seconds if promise.field == "median_s" else show_mib
        mine = ours[promise.field]
        other = "" if best is None else f"{full_name(best)}: {show(best[promise.field])}"
        ratio = "" if best is None else show_comparison(mine, best[promise.field], promise.field)
        share = "" if promise.field != "median_s" else show_share(1 / ours["ratio_to_bound"])
        lines.append(f"| {promise.what} | {promise.device.upper()} | {show(mine)} | {other} | {ratio} | {share} |")
    return lines


def show_mib(mib: float) -> str:
    return f"{mib:,.1f} MiB"


def show_comparison(mine: float, theirs: float, field: str) -> str:
    less, more = ("faster", "slower") if field == "median_s" else ("less memory", "more memory")
    factor = max(mine, theirs) / min(mine, theirs)
    if f"{factor:.2f}" == "1.00":
        return "level" if field == "median_s" else "as much memory"
    times = f"{factor:.2f}x" if factor < 10 else f"{factor:.0f}x"
    return f"**{times} {less}**" if mine <= theirs else f"{times} {more}"


def show_share(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


# ------------------------------------------------------------------------------------------------------- scaling


def scaling(run: Run, along: str) -> dict[str, list[Row]]:
    """Rows of the cases that scale with "Q" or "N", by contender, small to large."""
    parameter = {"Q": "keys", "N": "rows"}[along]
    series: dict[str, list[Row]] = {}
    for row in run["results"]:
        if row["case"].startswith(f"scaling with {along}"):
            series.setdefault(row["contender"], []).append(row)
    return {name: sorted(rows, key=lambda row: row["parameters"][parameter]) for name, rows in series.items()}


def exponent(rows: list[Row], along: str, field: str) -> float | None:
    """The power with which `field` grows, fitted to the upper half of the points (three at least), in logarithms."""
    parameter = {"Q": "keys", "N": "rows"}[along]
    rows = rows[-max(3, math.ceil(len(rows) / 2)) :]
    if len(rows) < 2 or any(row[field] is None for row in rows):
        return None
    points = [
        (math.log(row["parameters"][parameter]), math.log(max(row[field], 0.1 if "mib" in field else 1e-9)))
        for row in rows
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def exponent_table(runs: Iterable[Run]) -> list[str]:
    """Fitted exponents of time and memory, by contender."""
    lines = []
    for run in runs:
        along_keys, along_rows = scaling(run, "Q"), scaling(run, "N")
        if not along_keys:
            continue
        if not lines:
            lines += ["| grows as a power of | time, Q | memory, Q | time, N | memory, N |", "|---|---|---|---|---|"]
        for name in along_keys:
            cells = [
                show_number(exponent(series.get(name, []), along, field))
                for along, series in (("Q", along_keys), ("N", along_rows))
                for field in ("median_s", "peak_extra_mib")
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def show_number(value: float | None) -> str:
    """Two decimals below a hundred."""
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


# --------------------------------------------------------------------------------------------------------- table


def result_table(runs: Iterable[Run]) -> list[str]:
    """One row per contender and case; the scaling cases are in the chart."""
    lines = [
        "| case | contender | median | IQR | x bound | extra MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for rows in by_case(run).values():
            if rows[0]["case"].startswith("scaling"):
                continue
            case = f"{rows[0]['case']}, {kind_of_device(run)}"
            for row in rows:
                lines.append(result_line(case, row, ahead=row in ahead_of_ours(rows)))
                case = ""
    return lines


def by_case(run: Run) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in run["results"]:
        cases.setdefault(row["case"], []).append(row)
    return cases


def full_name(row: Row) -> str:
    """As Markdown."""
    name = row["contender"] + (f" ({row['computes']})" if row["computes"] else "")
    return name.replace("\\", "").replace("_", "\\_")


def result_line(case: str, row: Row, *, ahead: bool) -> str:
    name = full_name(row)
    name = {"ours": f"**{name}**", "bound": f"*bound: {name}*"}.get(row["role"], name)
    memory, own = row["peak_extra_mib"], row.get("own_mib")
    fields = ("loss_error", "gradient_error", "average_error")
    errors = [f"{row[field]:.0e}" for field in fields if row.get(field) is not None]
    cells = [
        case,
        name + (" ▲" if ahead else ""),
        show_seconds(row["median_s"]),
        show_seconds(row["iqr_s"]),
        show_number(row["ratio_to_bound"]),
        ("" if memory is None else f"{memory:.1f}") + ("" if own is None else f", own {own:.1f}"),
        ", ".join(errors),
    ]
    return f"| {' | '.join(cells)} |"


def ahead_of_ours(rows: list[Row]) -> list[Row]:
    """Contenders of a case with a smaller median than ours; the bound does not count."""
    ours = next((row for row in rows if row["role"] == "ours"), None)
    if ours is None:
        return []
    others = (row for row in rows if row["role"] in ("rival", "reference"))
    return [row for row in others if row["median_s"] < ours["median_s"]]


def losses(runs: Iterable[Run]) -> list[str]:
    """A line for each case in which others are ahead of ours, with their share of our time."""
    lines = []
    for run in runs:
        for case, rows in by_case(run).items():
            ours = next((row for row in rows if row["role"] == "ours"), None)
            shares = [
                f"{full_name(row)} {row['median_s'] / ours['median_s']:.2f}" for row in ahead_of_ours(rows) if ours
            ]
            if shares:
                lines.append(f"- {case}, {kind_of_device(run)}: {'; '.join(shares)}")
    return lines or ["- nothing that was measured"]


def kind_of_device(run: Run) -> str:
    return run["results"][0]["parameters"]["device"].upper() if run["results"] else ""


def provenance(runs: Iterable[Run]) -> list[str]:
    """When, where and with what each block was measured."""
    lines = []
    for run in runs:
        about = run["metadata"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
        lines.append(
            f"- {about['block']}: {about['date'][:10]}, commit {about['commit']}, {about['device']}, "
            f"threads: {about['threads']}, {about['clock']}, load average {about['load_average']}, "
            f"rounds: {spread([row['rounds'] for row in run['results']])}; {versions}"
        )
        reasons = {f"{entry['contender']} ({entry['reason']})" for entry in about["skipped"]}
        lines += [f"    - skipped: {reason}" for reason in sorted(reasons)]
    return lines


def spread(numbers: Sequence[int]) -> str:
    """From the least to the most."""
    return " to ".join(str(number) for number in dict.fromkeys((min(numbers), max(numbers))))


def short_provenance(runs: Iterable[Run]) -> list[str]:
    """A line for each time, commit and machine."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        about = run["metadata"]
        device = about["device"] + (f" ({about['threads']} thread)" if about["clock"] == "processor time" else "")
        where = f"{device}, torch {about['versions']['torch']}, {about['date'][:10]}, commit {about['commit']}"
        seen.setdefault(where, []).append(about["block"])
    return [f"- {where}: {', '.join(blocks)}" for where, blocks in seen.items()]


# --------------------------------------------------------------------------------------------------------- chart


def draw_chart(runs: list[Run], path: Path) -> None:
    """Time and memory against Q, both axes logarithmic, a row of panels per device."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("median_s", 1000.0, "time, forward and backward (ms)"),
        ("peak_extra_mib", 1.0, "memory beyond the inputs (MiB)"),
    )
    figure, grid = plt.subplots(len(runs), 2, figsize=(10, 4.6 * len(runs)), layout="constrained", squeeze=False)
    for run, line in zip(runs, grid, strict=True):
        series = scaling(run, "Q")
        about, case = run["metadata"], next(iter(series.values()))[0]["parameters"]
        for axes, (field, factor, label) in zip(line, panels, strict=True):
            for number, (name, rows) in enumerate(series.items()):
                known = [row for row in rows if row[field] is not None]
                look = number % len(COLOURS)
                if known:
                    axes.plot(
                        [row["parameters"]["keys"] for row in known],
                        [max(factor * row[field], 0.05) for row in known],
                        label=name,
                        color=COLOURS[look],
                        marker=MARKERS[look],
                        linestyle=STYLES[look],
                        linewidth=3 if rows[0]["role"] == "ours" else 1.5,
                    )
            axes.set(xscale="log", yscale="log", xlabel="keys Q")
            axes.set_title(label, loc="left", fontsize=11)
            axes.grid(alpha=0.25, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        threads = f", threads: {about['threads']}" if case["device"] == "cpu" else ""
        line[0].set_ylabel(f"{about['device']}{threads}\nN = {case['rows']}, d = 128, {case['dtype']}")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------- main


def write_report(folder: Path, page: Path) -> None:
    """Replace what stands between the marks of the page and of that of all figures, and the picture."""
    runs = read_runs(folder)
    if not runs:
        raise SystemExit(f"{folder}: expected results, got none; run benchmarks/run_all.py first")
    measured = kept(runs)
    replace(page, [*short_table(measured), "", *short_provenance(runs)])
    lines = ["## Beside the best other", "", *promise_table(measured), ""]
    with_scaling = [run for run in runs if scaling(run, "Q")]
    if with_scaling:
        chart = page.parent / "images" / "performance.png"
        chart.parent.mkdir(parents=True, exist_ok=True)
        draw_chart(with_scaling, chart)
        lines += ["## How time and memory grow", ""]
        lines += ["![Time and memory of the contrastive loss against Q](images/performance.png)", ""]
        lines += [*exponent_table(with_scaling), ""]
    lines += ["## Who is ahead where", "", "Their share of our time:", "", *losses(runs), ""]
    lines += ["## All figures", "", *result_table(runs), ""]
    replace(page.with_name(FIGURES), [*lines, "## Measured when, where, with what", "", *provenance(runs)])


def replace(page: Path, lines: list[str]) -> None:
    """Put lines between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: expected the lines {BEGIN!r} and {END!r}")
    page.write_text(before + "\n".join([BEGIN, "", *lines, "", END]) + after, encoding="utf-8")
    print(f"written: {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files (default: results/)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write into (default: docs/performance.md)")
    given = parser.parse_args(arguments)
    write_report(given.results, given.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
