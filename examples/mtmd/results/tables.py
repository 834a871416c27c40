"""Tables of results in the column order of the paper: as CSV, Markdown and in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mtmd.files.writing import write_rows, write_text
from mtmd.results.bootstrap import Comparison
from mtmd.results.metrics import columns_of, in_percent, mean_and_std, number
from mtmd.settings.config import MODALITIES

METRICS = ("acc7", "acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "mae", "corr")  # of the paper

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
    mean, std = mean_and_std([in_percent(metrics) for metrics in runs])
    return Row(name, label, len(runs), {metric: (mean[metric], std[metric]) for metric in runs[0]}, **more)


def shown_columns(rows: Sequence[Row]) -> dict[str, tuple[str, ...]]:
    """The columns for the metrics that these rows have; the paper has no Acc5 of CMU-MOSI."""
    columns = columns_of({metric for row in rows for metric in row.values})
    shown = {f"{heading} {'↓' if heading == 'MAE' else '↑'}": names for heading, names in columns.items()}
    if "Acc7 ↑" in shown:
        del shown["Acc5 ↑"]
    return shown


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
    columns = shown_columns(rows)
    pairs = "; Acc2 and F1: negative/non-negative, then negative/positive" if "Acc7 ↑" in columns else ""
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

    write_rows(path, [records[0] if records else [], *(map(text, line.values()) for line in records)])


def write_markdown(
    path: Path, *, title: str, headings: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    bar = "\\|"
    table = [f"| {' | '.join(cell.replace('|', bar) for cell in line)} |" for line in (headings, rule, *lines)]
    text = [f"# {title}", "", *table, "", *(f"- {note}" for note in notes)]
    write_text(path, "\n".join(text) + "\n")


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
                deviations = [number(metric, deviation) for metric, (_, deviation) in zip(metrics, values, strict=True)]
                cell.append(f"[dim]{'/'.join(deviations)}[/]")
            if row.paper:
                cell.append(f"[dim]{paper_cell(row, metrics).replace(' ', '')}[/]")
            cells.append("\n".join(cell))
        shown = row.over_seeds or row.over_utterances
        if shown is not None:
            cells.append(f"{shown.difference:+.3f}\n[dim]{difference_cell(shown, with_difference=False)}[/]")
        table.add_row("\n".join(lines), *cells)
    return table


# What `train` shows


def metric_cells(metrics: Mapping[str, float | None]) -> list[str]:
    """A cell for each of `columns_of`; metrics are shares of 1."""
    metrics = in_percent(metrics)
    return [" / ".join(number(name, metrics[name]) for name in names) for names in columns_of(metrics).values()]


def results_table(title: str, results: dict[str, Any]) -> Table:
    """Test metrics by seed, with mean and spread below."""
    caption = "Epoch chosen on validation MAE. Accuracies and F1 in percent"
    if "acc7" in results["mean"]:
        caption += ";\nAcc2 and F1: negative/non-negative, then negative/positive"
    table = Table("seed", title=f"{title}: test fold", caption=caption)
    for heading in columns_of(results["mean"]):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in results["runs"]:
        table.add_row(str(entry["seed"]), *metric_cells(entry["test"]))
    if len(results["runs"]) > 1:
        table.add_section()
        for name in ("mean", "std"):
            table.add_row(name, *metric_cells(results[name]))
    return table


def branches_line(results: dict[str, Any]) -> str:
    """What each branch does alone, as a mean over the seeds."""
    parts = []
    for name in MODALITIES:
        maes = [entry["test_unimodal"][name]["mae"] for entry in results["runs"] if name in entry["test_unimodal"]]
        if maes:
            parts.append(f"{name} {np.mean(maes):.3f}")
    return f"Test MAE of the branches alone: {', '.join(parts) or 'none'}"
