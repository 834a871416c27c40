"""Tables of results in the column order of the paper: as CSV, Markdown and in the terminal."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mtmd.results.bootstrap import Comparison

# Where two numbers share a column: negative/non-negative, then negative/positive.
COLUMNS = {
    "Acc7 ↑": ("acc7",),
    "Acc2 ↑": ("acc2_has0", "acc2_non0"),
    "F1 ↑": ("f1_has0", "f1_non0"),
    "MAE ↓": ("mae",),
    "Corr ↑": ("corr",),
}
METRICS = tuple(metric for metrics in COLUMNS.values() for metric in metrics)
# CH-SIMS has other metrics: see metrics.py.
SIMS_COLUMNS = {
    "Acc5 ↑": ("acc5",),
    "Acc3 ↑": ("acc3",),
    "Acc2 ↑": ("acc2",),
    "F1 ↑": ("f1",),
    "MAE ↓": ("mae",),
    "Corr ↑": ("corr",),
}


CAUTION = (
    "Clips of one speaker are correlated, so that intervals over utterances are likely too narrow; with few seeds, "
    "those with the seeds drawn as well are rough."
)


@dataclass
class Row:
    """One line of a table. Accuracies and F1 in percent."""

    name: str
    label: str
    runs: int = 0
    values: dict[str, tuple[float, float | None]] = field(default_factory=dict)  # metric: mean, standard deviation
    paper: dict[str, float] = field(default_factory=dict)
    part: str = ""  # the part of the table that it belongs to
    over_utterances: Comparison | None = None  # of the test MAE with that of the row that the table compares with
    over_seeds: Comparison | None = None


def row_of(name: str, label: str, runs: Sequence[Mapping[str, float | None]], **more: Any) -> Row:
    """The row of some runs; `runs` are their metrics, with shares of 1."""
    return Row(name, label, len(runs), {metric: mean_and_deviation(runs, metric) for metric in runs[0]}, **more)


def columns_of(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The columns for the metrics that these rows have."""
    return SIMS_COLUMNS if any("acc3" in row.values for row in rows) else COLUMNS


def mean_and_deviation(runs: Sequence[Mapping[str, float | None]], metric: str) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof 1; None with one run), in the unit of the tables.

    NaN if a run has no value.
    """
    values = np.array([np.nan if run[metric] is None else run[metric] for run in runs], dtype=np.float64)
    if is_percent(metric):
        values = 100 * values
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def is_percent(metric: str) -> bool:
    return metric not in ("mae", "corr")


def number(metric: str, value: float) -> str:
    """One decimal for percent, three for MAE and Corr; a dash for NaN."""
    if np.isnan(value):
        return "-"
    return f"{value:.1f}" if is_percent(metric) else f"{value:.3f}"


def own_cell(row: Row, metrics: Sequence[str]) -> str:
    """What was measured here, as `45.7 ± 0.4`."""
    parts = []
    for metric in metrics:
        mean, deviation = row.values.get(metric, (np.nan, None))
        spread = "" if deviation is None or np.isnan(deviation) else f" ± {number(metric, deviation)}"
        parts.append(number(metric, mean) + spread)
    return " / ".join(parts)


def paper_cell(row: Row, metrics: Sequence[str]) -> str:
    """What the paper prints."""
    if not any(metric in row.paper for metric in metrics):
        return "-" if row.paper else ""
    return " / ".join(number(metric, row.paper[metric]) for metric in metrics)


def difference_cell(comparison: Comparison | None, *, with_difference: bool = True) -> str:
    """As `+0.012 [-0.003, +0.027]`."""
    if comparison is None:
        return ""
    interval = f"[{comparison.low:+.3f}, {comparison.high:+.3f}]"
    return f"{comparison.difference:+.3f} {interval}" if with_difference else interval


def p_cell(comparison: Comparison | None) -> str:
    """Three decimals; what is smaller is said to be smaller."""
    if comparison is None or np.isnan(comparison.p):
        return ""
    return "< 0.001" if comparison.p < 0.001 else f"{comparison.p:.3f}"


def write_table(rows: Sequence[Row], path: Path, *, title: str, against: str = "", notes: Sequence[str] = ()) -> Table:
    """Write `path` as .csv and .md, and return the table for the terminal.

    Args:
        rows: In the order of the table.
        path: Without a suffix.
        title: Its heading.
        against: What the column of differences compares with, if there is one.
        notes: Lines below the table.
    """
    columns = columns_of(rows)
    pairs = "; Acc2 and F1: negative/non-negative, then negative/positive" if columns is COLUMNS else ""
    notes = [
        "Test fold, epoch chosen on validation MAE; mean ± sample standard deviation over the seeds.",
        f"Accuracies and F1 in percent{pairs}.",
        *notes,
    ]
    with_paper = any(row.paper for row in rows)
    compared = any(row.over_utterances is not None for row in rows)
    shown = terminal_table(rows, columns, title=title, against=against, notes=notes)
    if compared:
        notes.append(
            f"MAE minus {against}: above 0 is worse. 95 % intervals of the paired bootstrap over utterances, then with "
            "the seeds drawn as well; p is of the latter. One seed says nothing about a method, and gets no p."
        )
        notes.append(CAUTION)
    write_csv(
        path.with_suffix(".csv"), [record(row, columns, compared=compared, with_paper=with_paper) for row in rows]
    )

    headings = ["", "runs"]
    for heading in columns:
        headings += [heading, "paper"] if with_paper else [heading]
    if compared:
        headings += [f"MAE minus {against}", "seeds drawn as well", "p"]
    lines, part = [], ""
    for row in rows:
        if row.part != part:
            part = row.part
            lines.append([f"*{part}*" if part else "", *[""] * (len(headings) - 1)])
        cells = [row.label, str(row.runs or "")]
        for metrics in columns.values():
            cells += [own_cell(row, metrics), paper_cell(row, metrics)] if with_paper else [own_cell(row, metrics)]
        lines.append(cells + (comparison_cells(row) if compared else []))
    write_markdown(path.with_suffix(".md"), title=title, headings=headings, lines=lines, notes=notes)
    return shown


def comparison_cells(row: Row) -> list[str]:
    return [
        difference_cell(row.over_utterances),
        difference_cell(row.over_seeds, with_difference=False),
        p_cell(row.over_seeds),
    ]


def record(row: Row, columns: Mapping[str, Sequence[str]], *, compared: bool, with_paper: bool) -> dict[str, Any]:
    """A line of the CSV: numbers as they are, in the unit of the paper."""
    line: dict[str, Any] = {"name": row.name, "part": row.part, "label": row.label, "runs": row.runs}
    for metric in (metric for metrics in columns.values() for metric in metrics):
        line[f"{metric}_mean"], line[f"{metric}_sd"] = row.values.get(metric, (None, None))
        if with_paper:
            line[f"{metric}_paper"] = row.paper.get(metric)
    if compared:
        for kind, comparison in (("utterances", row.over_utterances), ("seeds", row.over_seeds)):
            for key in ("difference", "low", "high", "p"):
                line[f"mae_{key}_over_{kind}"] = None if comparison is None else getattr(comparison, key)
    return line


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Records with the same keys; floats with eight digits, None and NaN as nothing."""

    def text(value: Any) -> Any:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ""
        return f"{value:.8g}" if isinstance(value, float) else value

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0] if records else [])
        writer.writerows([text(value) for value in line.values()] for line in records)


def write_markdown(
    path: Path, *, title: str, headings: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    bar = "\\|"
    table = [f"| {' | '.join(cell.replace('|', bar) for cell in line)} |" for line in (headings, rule, *lines)]
    text = [f"# {title}", "", *table, "", *(f"- {note}" for note in notes)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def terminal_table(
    rows: Sequence[Row], columns: Mapping[str, Sequence[str]], *, title: str, against: str, notes: Sequence[str]
) -> Table:
    """The same in 80 columns: below each number its deviation, below that the paper's."""
    compared = any(row.over_utterances is not None for row in rows)
    if compared:
        drawn = "utterances and seeds" if any(row.over_seeds is not None for row in rows) else "utterances"
        interval = f"MAE minus {against}: above 0 is worse; 95 % interval of the paired bootstrap over {drawn}."
        notes = [*notes, interval, CAUTION]
    table = Table(
        title=escape(title),
        caption=escape("\n".join(notes)),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    if compared:
        table.add_column(f"MAE minus\n{escape(against)}", justify="right", no_wrap=True)
    part = ""
    for row in rows:
        if row.part != part:
            part = row.part
            table.add_section()
            if part:
                table.add_row(f"[italic]{escape(part)}[/]")
        spread = any(deviation is not None for _, deviation in row.values.values())
        lines = [escape(row.label), *(["[dim]±[/]"] if spread else []), *(["[dim]paper[/]"] if row.paper else [])]
        cells = []
        for metrics in columns.values():
            values = [row.values.get(metric, (np.nan, None)) for metric in metrics]
            cell = ["/".join(number(metric, mean) for metric, (mean, _) in zip(metrics, values, strict=True))]
            if spread:
                deviations = [
                    number(metric, np.nan if deviation is None else deviation)
                    for metric, (_, deviation) in zip(metrics, values, strict=True)
                ]
                cell.append(f"[dim]{'/'.join(deviations)}[/]")
            if row.paper:
                cell.append(f"[dim]{paper_cell(row, metrics).replace(' ', '')}[/]")
            cells.append("\n".join(cell))
        shown = row.over_seeds or row.over_utterances
        if shown is not None:
            cells.append(f"{shown.difference:+.3f}\n[dim]{difference_cell(shown, with_difference=False)}[/]")
        table.add_row("\n".join(lines), *cells)
    return table
