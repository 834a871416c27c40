"""README and docs: their Python blocks run, their links lead somewhere, their names and options exist."""

import argparse
import importlib
import inspect
import json
import re

import numpy as np
import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import momentum_distill as md
import watch
from conftest import ROOT
from mtmd.settings.cli import COMMANDS
from study_tools import paired_interval, read_results, read_rows, summary

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
EQUATIONS = range(1, 24)

every_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


@pytest.fixture(scope="module")
def paper_map():
    return (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")


def functions_of(module):
    """The public functions a module defines itself."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    return [name for name in names if name in vars(module) and inspect.isfunction(vars(module)[name])]


def without_code(text):
    """Markdown without its fenced blocks, in which brackets and hashes mean something else."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The names that headings get as link targets: lower case, blanks to hyphens, other punctuation dropped."""
    titles = re.findall(r"^#+ +(.*?)\s*$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page, text):
    """The relative links of a page to files or headings that are not there."""
    broken = []
    # [text](target) and ![alt](target); then <a href="target"> and <img src="target">
    prose = re.sub(r"`[^`\n]*`", "", without_code(text))
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r'(?:href|src)="([^"]+)"', prose)
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue  # another site
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            broken.append(target)
        elif anchor and file.suffix == ".md":
            there = text if file == page else file.read_text(encoding="utf-8")
            if anchor not in anchors(there):
                broken.append(target)
    return broken


# Of the compiler of torch 2.8, about what it does itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_page
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a block writes does not stay
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    torch._dynamo.reset()
    with torch.random.fork_rng():
        for example in document.examples():
            example.evaluate()


def test_the_first_example_prints_what_is_said_of_it_and_starts_the_site_too(capsys):
    told, code = [], []
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        told += [re.search(r"this prints (\d+)% for the weak one alone, (\d+)% for it taught:\n", text).groups()]
        code += [re.search(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)[1]]
    assert code[0] == code[1]
    assert told[0] == told[1]
    with torch.random.fork_rng():
        exec(compile(code[0], "README.md", "exec"), {})  # nosec B102 - a page of this repository
    printed = dict(re.findall(r"^weak sensor (\w+): (\d+)%$", capsys.readouterr().out, flags=re.MULTILINE))
    assert [int(printed[name]) for name in ("alone", "taught")] == pytest.approx([int(x) for x in told[0]], abs=2)


def test_the_figures_of_the_readme_are_those_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    arms = read_json("docs/results/mosi_mpnet.json")["arms"]
    arms["float32"] = read_json("docs/results/mosi_mpnet_float32.json")["arms"]["full"]
    error = {name: [run["test"]["mae"] for run in arm["runs"]] for name, arm in arms.items()}
    mae = {name: f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for name, x in error.items()}
    assert {len(error[name]) for name in ("full", "no_distillation", "text_only")} == {5}
    assert (
        f"with `all-mpnet-base-v2`, five seeds: test error (MAE) | **{mae['full']}**; in float32 {mae['float32']} |"
        in text
    )
    assert f"| no distillation {mae['no_distillation']}, text alone {mae['text_only']}: level" in text

    results = read_rows(ROOT / "docs" / "results" / "watch.json", watch.Result)
    labels, plain, fusion, blocks = (
        summary(watch.scores(results, "5", arm.name, "weak", "seed")) for arm in watch.DRAWN
    )
    assert f"five labels a class: accuracy, % | **{blocks}** | labels alone {labels}; " in text
    assert f"; plain distillation {plain}, from the fusion of both {fusion} |" in text

    rows = read_json("benchmarks/results/supcon-cpu-full.json")["results"]
    rows = {row["contender"]: row for row in rows if row["case"] == "loss, N=256, Q=65536, 1 direction"}
    ours, dense = (
        (rows[name]["median_s"], rows[name]["peak_extra_mib"])
        for name in ("momentum-distill", "dense formula (ALBEF), torch.compile")
    )
    assert f"{1000 * ours[0]:.0f} ms, {ours[1]:.1f} MiB" in text
    assert f"dense formula, compiled: {1000 * dense[0]:.0f} ms, {dense[1]:.1f} MiB" in text


def read_json(path):
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def test_the_quickstart_holds_the_blocks_of_a_first_training():
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python$(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    blocks = "EMAWrapper ClassQueue SupConDistillLoss ResponseDistillLoss HardSampleFusionLoss MomentumFusionFactors"
    first = [*blocks.split(), "param_groups", "gather_rows", "diagnostics"]  # what a first training has
    assert [name for name in first if f"md.{name}" not in code] == []


@every_page
def test_relative_links_lead_to_files_and_headings(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    links = "[a](#one-title-here) [b](none.md) [c](page.md#none) [d](https://example.org/x) `[e](x.md)`"
    text = f"# One title, *here*\n{links}\n"
    page.write_text(text, encoding="utf-8")
    assert broken_links(page, text) == ["none.md", "page.md#none"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_paper_map_has_a_row_for_every_equation(paper_map, equation):
    rows = re.findall(rf"^\| {equation} \|.*\|.*\|$", paper_map, flags=re.MULTILINE)
    assert len(rows) == 1


@pytest.mark.parametrize(
    "name",
    [
        *md.__all__,
        *(f"functional.{name}" for name in functions_of(md.functional)),
        *(f"diagnostics.{name}" for name in functions_of(md.diagnostics)),
    ],
)
def test_paper_map_mentions_every_public_name(paper_map, name):
    assert re.search(rf"\b{re.escape(name)}\b", paper_map), f"docs/paper_map.md: a row for {name}"


TORCHRUN = ("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint")


@pytest.mark.parametrize(
    "module", [md.functional, md.diagnostics, md.schedules], ids=["functional", "diagnostics", "schedules"]
)
@every_page
def test_functions_that_the_pages_name_exist(page, module):
    short = module.__name__.rpartition(".")[2]
    named = re.findall(rf"(?<!\.nn\.)(?<!nn import )\b{short}\.(\w+)", page.read_text(encoding="utf-8"))
    assert [name for name in named if name != "py" and not hasattr(module, name)] == []


def test_places_that_paper_map_names_exist(paper_map):
    """Every `file.py`: `name`, `name` of the table of equations."""
    folders = [ROOT / "src" / "momentum_distill", ROOT / "examples" / "mtmd"]
    places = re.findall(r"`(\w+\.py)`(?:(?::| has)? ((?:`[\w.]+`(?:, | and )?)+))?", paper_map)
    assert places
    for file, names in places:
        paths = [folder / file for folder in folders if (folder / file).is_file()]
        assert len(paths) == 1, file
        source = paths[0].read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^\s*(?:class|def) {part}\b", source, flags=re.MULTILINE), (file, name)


@every_page
def test_options_of_the_example_that_the_pages_name_exist(page):
    options = set()
    for command in COMMANDS.values():
        parser = argparse.ArgumentParser()
        getattr(importlib.import_module(command.module), command.add_arguments)(parser)
        options |= set(re.findall(r"(?<!\S)\[?(--[a-z][a-z0-9-]*)", parser.format_help()))
    text = page.read_text(encoding="utf-8")
    # in prose, all options are the example's; in shell blocks, those on its command line
    named = re.findall(r"`(--[a-z][a-z0-9-]*)", without_code(text))
    named = [option for option in named if option not in TORCHRUN]
    for line in re.findall(r"(?<!\w)(mtmd_mosi\.py.*)$", text.replace("\\\n", " "), flags=re.MULTILINE):
        named += re.findall(r"(?<!\S)(--[a-z][a-z0-9-]*)", line)
    unknown = {option for option in named if option not in options and f"--{option[5:]}" not in options}
    assert unknown == set()


@pytest.mark.parametrize(
    ("data", "sampling", "hardness"),
    [
        ("synthetic", "distance", 0.0),
        ("mosi", "distance", 0.0),
        ("synthetic", "class", 1.0),
        ("synthetic", "class", 5.0),
    ],
)
def test_what_the_page_says_of_scores_and_of_hard_negatives_is_what_was_measured(data, sampling, hardness):
    rows = [row for row in read_results(ROOT / "docs" / "results" / "scores.json")["rows"] if row["data"] == data]
    page = (ROOT / "docs" / "when.md").read_text(encoding="utf-8")
    arms = [
        sorted((row for row in rows if (row["sampling"], row["hardness"]) == arm), key=lambda row: row["seed"])
        for arm in (("class", 0.0), (sampling, hardness))
    ]
    assert [[row["seed"] for row in arm] for arm in arms] == [[1111, 1112, 1113, 1114, 1115]] * 2
    for output in ("fused", "text", "audio", "vision"):
        before, after = ([row[output] for row in arm] for arm in arms)
        cells = [f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for x in (before, after)]
        mean, half = paired_interval(after, before)
        assert f"| {output} | {' | '.join(cells)} | {mean:+.3f} ± {half:.3f} |" in page
        assert (abs(mean) < half) is ((hardness, output) != (5.0, "vision"))  # as the page says


def test_files_that_texts_name_are_there():
    """History may name what is gone."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    texts += [path for folder in ("src", "examples", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    named = {
        (path.relative_to(ROOT).as_posix(), file)
        for path in texts
        if path.name != "CHANGELOG.md"
        for file in re.findall(
            r"(?<![\w./])(?:src|examples|tests|docs|benchmarks)/[\w/]+\.(?:py|md|toml|json|txt|ipynb)\b",
            path.read_text(encoding="utf-8"),
        )
    }
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).is_file()] == []
    assert len(named) > 100
