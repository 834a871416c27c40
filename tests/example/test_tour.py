"""The notebook `examples/tour.ipynb`: all blocks are in it, and what it shows is what its cells show when they run."""

import ast
import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest

import momentum_distill as md
from conftest import ROOT
from run_notebook import METADATA

TOUR = ROOT / "examples" / "tour.ipynb"
AGAIN = "run `make tour`, which runs all cells and stores what they show"


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


CELLS = cells_of(TOUR)


def code_of(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


NUMBER = r"[-+]?\d+(?:\.\d+)?"


def test_every_block_is_on_the_tour():
    code = "\n".join(source(cell) for cell in code_of(CELLS))
    names = [*md.__all__, *(f"diagnostics.{name}" for name in md.diagnostics.__all__)]
    assert [name for name in names if f"md.{name}" not in code] == [], f"give each a cell that shows it; then {AGAIN}"


def test_every_cell_is_short_and_has_words_before_it():
    assert [source(cell) for cell in CELLS if cell["cell_type"] == "code" and len(cell["source"]) > 25] == []
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds[0] == "markdown"
    assert ("code", "code") not in pairwise(kinds)


def test_jupyter_would_show_no_more_than_is_printed_and_drawn():
    """Of a cell that ends with an expression it shows the value, which `run_notebook.py` does not."""
    for cell in code_of(CELLS):
        last = ast.parse(source(cell)).body[-1]
        if isinstance(last, ast.Expr):
            assert ast.unparse(last.value.func) in ("print", "plt.show"), f"ends with {ast.unparse(last)}"


def test_the_outputs_are_stored():
    for number, cell in enumerate(code_of(CELLS), start=1):
        assert cell["execution_count"] == number, AGAIN
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert set(kinds) <= {"stream", "display_data"}, AGAIN
        drawn = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert ("plt.show()" in source(cell), "print(" in source(cell)) == (drawn, "stream" in kinds), AGAIN


def test_the_file_says_nothing_of_who_ran_it():
    text = TOUR.read_text(encoding="utf-8")
    assert len(text) < 600_000
    notebook = json.loads(text)
    assert notebook["metadata"] == METADATA, AGAIN
    assert {key for cell in CELLS for key in cell["metadata"]} <= {"tolerance"}, AGAIN
    for cell in CELLS:
        shown = [output.get("text", "") for output in cell.get("outputs", [])]
        assert re.search(r"/(home|root|tmp|usr|work|Users)/|[A-Z]:\\", source(cell) + str(shown)) is None


@pytest.mark.long
def test_the_cells_show_what_is_stored(tmp_path):
    """To the letter; where a cell trains, other CPUs come to other numbers, by no more than its `tolerance`."""
    command = [sys.executable, "-W", "error", ROOT / "tests" / "run_notebook.py", TOUR, "--out", tmp_path / "new.ipynb"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    for stored, new in zip(CELLS, cells_of(tmp_path / "new.ipynb"), strict=True):
        if stored["cell_type"] == "code":
            tolerance = stored["metadata"].get("tolerance", 0)
            before, after = printed(stored), printed(new)
            assert re.split(NUMBER, after.replace(" ", "")) == re.split(NUMBER, before.replace(" ", "")), AGAIN
            for old, number in zip(re.findall(NUMBER, before), re.findall(NUMBER, after), strict=True):
                assert abs(float(old) - float(number)) <= tolerance, f"{AGAIN}:\n{before}{after}"


def test_the_last_words_are_true():
    """That the gyroscope gains much over labels alone, and little over plain distillation, for all that is known."""
    gains = re.findall(r"over (\w+).* \+(\S+) ± (\S+),", "\n".join(map(printed, code_of(CELLS))))
    (over_labels, half), (over_plain, other_half) = (map(float, numbers) for _, *numbers in gains)
    assert [name for name, *_ in gains] == ["labels", "plain"]
    assert over_labels > 2 * half
    assert over_plain < other_half
