"""Runs the cells of a notebook from top to bottom, as Jupyter does, and writes it again with what they show.

    python tests/run_notebook.py examples/tour.ipynb

Cells show things by `print` and `plt.show`. In place of a kernel of Jupyter, which thirty packages would come with, a
script made of all cells runs in this process; what the file says of who edited it and with what is left out.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

plt.switch_backend("Agg")  # now, as it would put its own `show` in place of ours

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NEXT_CELL = "__next_cell__"  # a call between two cells of the script


class Recorder(io.TextIOBase):
    """What each cell has shown so far."""

    def __init__(self) -> None:
        self.cells: list[list[dict[str, Any]]] = []

    def next_cell(self) -> None:
        self.show()  # what it has drawn and not shown, Jupyter shows at its end
        self.cells.append([])

    def write(self, text: str) -> int:
        outputs = self.cells[-1]
        if not outputs or outputs[-1]["output_type"] != "stream":
            outputs.append({"name": "stdout", "output_type": "stream", "text": []})
        lines = outputs[-1]["text"]
        lines[-1:] = ("".join(lines[-1:]) + text).splitlines(keepends=True)
        return len(text)

    def show(self) -> None:
        for figure in map(plt.figure, plt.get_fignums()):
            file = io.BytesIO()
            figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
            data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": [repr(figure)]}
            self.cells[-1].append({"data": data, "metadata": {}, "output_type": "display_data"})
        plt.close("all")


def run(notebook: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """The outputs of each cell with code, run in the folder of the notebook."""
    recorder = Recorder()
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as temporary:
        script = Path(temporary, "cells.py")
        script.write_text("".join(f"{NEXT_CELL}()\n{source}\n" for source in sources), encoding="utf-8")
        os.chdir(folder)
        sys.path[0], plt.show = str(folder), lambda: recorder.show()
        try:
            with contextlib.redirect_stdout(recorder):
                runpy.run_path(str(script), {NEXT_CELL: recorder.next_cell}, run_name="__main__")
        except Exception:
            traceback.print_exc()  # while the script is there to be quoted
            sys.exit(f"in cell {len(recorder.cells)} of those with code")
    recorder.show()
    return recorder.cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="where to write it, in place of itself")
    options = parser.parse_args()
    path, out = options.notebook.resolve(), (options.out or options.notebook).resolve()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run(notebook, path.parent), strict=True), start=1):
        cell |= {"execution_count": number, "outputs": outputs}
    notebook["metadata"] = METADATA
    for cell in notebook["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "tolerance"}
    out.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
