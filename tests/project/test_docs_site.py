"""The documentation site: built strictly, no link leads nowhere, nothing comes from elsewhere, formulas are set."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import util
from urllib.parse import unquote, urlsplit

import pytest
import torch

import momentum_distill as md
from conftest import ROOT

pytestmark = pytest.mark.xdist_group("site")  # so that it is built once

DOCS = ROOT / "docs"
NEEDED = ("zensical", "mkdocstrings_handlers.python")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE = 390  # pixels
# What the Makefile takes from CITATION.cff. The theme would ask this host for stars and forks.
ADDRESSES = {"REPOSITORY_URL": "https://github.com/owner/name", "SITE_URL": "https://pages.example/name"}

# What a browser fetches without being asked, by element: its attributes with addresses.
FETCHED = {
    "script": ["src"],
    "link": ["href"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "object": ["data"],
    "embed": ["src"],
    "use": ["href", "xlink:href"],
}


class Page(HTMLParser):
    """Addresses, ids, formulas and the text outside code of one built page."""

    def __init__(self, path):
        super().__init__()
        self.fetched, self.links, self.ids, self.formulas, self.text = [], [], set(), [], ""
        self.open = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in ("meta", "link", "img", "br", "hr", "input", "path", "source"):
            self.open.append((tag, values.get("class") or ""))
        if (values.get("class") or "") == "arithmatex":
            self.formulas.append("")
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if not (tag == "link" and values.get("rel") in ("prev", "next", "canonical")):
            self.fetched += [values[name] for name in FETCHED.get(tag, []) if values.get(name)]
        self.fetched += re.findall(r"url\(([^)]*)\)", values.get("style") or "")

    def handle_endtag(self, tag):
        for index in range(len(self.open) - 1, -1, -1):
            if self.open[index][0] == tag:
                del self.open[index:]
                return

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if any(kind == "arithmatex" for _, kind in self.open):
            self.formulas[-1] += data
        elif not {"script", "style", "code", "pre", "title"} & set(tags):
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in NEEDED:
        try:
            found = util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"no {name}: the group `docs` is not installed")
    folder = tmp_path_factory.mktemp("built") / "site"
    built = subprocess.run(
        [sys.executable, str(DOCS / "build.py"), "--out", str(folder)],
        env=os.environ | ADDRESSES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html"))}


def is_elsewhere(address):
    return bool(re.match(r"(?:[a-z][a-z0-9+.-]*:)?//", address.strip(" \"'"), flags=re.IGNORECASE))


# ------------------------------------------------------------------------------------------------------- the pages


def test_every_markdown_file_is_a_page(pages):
    sources = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    assert sources | {"changelog.html", "contributing.html", "security.html"} <= set(pages)


def test_every_block_has_a_page_of_its_own(pages):
    titles = {page: names for page, names in ((page, pages[page].ids) for page in pages) if page.startswith("api/")}
    for name in md.__all__:
        if name in ("functional", "diagnostics", "schedules"):
            for member in getattr(md, name).__all__:
                assert any(f"momentum_distill.{name}.{member}" in ids for ids in titles.values()), member
        else:
            assert sum(f"momentum_distill.{name}" in ids for ids in titles.values()) == 1, name


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for name, page in pages.items():
        assert [address for address in page.fetched if is_elsewhere(address)] == [], name
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        addresses = re.findall(r"url\(([^)]*)\)", text) + re.findall(r"@import\s+[\"']([^\"']*)", text)
        assert [address for address in addresses if is_elsewhere(address)] == [], style


def test_what_is_fetched_is_there(site, pages):
    for name, page in pages.items():
        if name != "404.html":  # its addresses begin at the root of the site
            for address in page.fetched:
                if not address.startswith("data:"):
                    assert (site / name).parent.joinpath(urlsplit(address).path).exists(), (name, address)
    for style in (site / "assets").rglob("*.css"):
        for address in re.findall(r"url\(([^)]*)\)", style.read_text(encoding="utf-8")):
            if not address.strip("\"'").startswith("data:"):
                assert style.parent.joinpath(urlsplit(address.strip("\"'")).path).exists(), (style.name, address)


def test_links_lead_to_pages_and_headings(site, pages):
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            if name == "404.html" or is_elsewhere(link) or re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (site / name).parent.joinpath(unquote(path)).resolve() if path else site / name
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target.relative_to(site).as_posix())
            if not target.exists() or (anchor and known is not None and unquote(anchor) not in known.ids):
                wrong.append((name, link))
    assert wrong == []


def test_no_markdown_is_left_over(pages):
    """Such as a list without an empty line before it, a formula that was not found, or a power taken for bold print."""
    marks = [
        r"\]\(",
        r"^:::",
        r"```",
        r":(?:meth|func|class):`",
        r"^ *\|.*\|",
        r"\$\$?[^$\n]+\$",
        r"^- \w",
        r"\*\*[a-z]",
    ]
    for name, page in pages.items():
        found = [match for mark in marks for match in re.findall(mark, page.text, flags=re.MULTILINE)]
        assert found == [], name
        assert re.findall(r"[\w.]<(?:em|strong)>.{20}", page.source) == [], name


@pytest.fixture(scope="module")
def search(site):
    """What the search may show, by place."""
    text = (site / "search.json").read_text(encoding="utf-8")
    assert (site / "search.js").read_text(encoding="utf-8") == f"var __index = {text}"
    return {item["location"]: f"{item['title']}\n{item['text']}" for item in json.loads(text)["items"]}


def test_the_search_knows_every_page_but_source_files(pages, search):
    expected = {name for name in pages if name != "404.html" and not name.startswith("files/")}
    assert {place.partition("#")[0] for place in search} == expected


def test_the_search_shows_neither_tex_nor_source_code(search):
    for place, text in search.items():
        assert re.findall(r".{0,40}(?:\\[()\[\]]|\\[A-Za-z]{2,}).{0,40}", text) == [], place
        prose = re.sub(r"<(code|pre)>.*?</\1>", "", text, flags=re.DOTALL)
        assert re.findall(r"\$[^$\n]+\$", prose) == [], place
        assert "Source code in" not in text, place
    assert "τ" in search["api/formulas.html#momentum_distill.functional.contrast_logits"]
    assert "\n".join(search.values()).count("…") < 200  # formulas that no line of text can show


def test_the_notebook_is_a_page_with_what_it_printed_and_drew(pages):
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert pages["tour.html"].source.count("data:image/png;base64,") == sum("data" in output for output in outputs) > 0
    shown = html.unescape(pages["tour.html"].source)
    for output in outputs:
        assert "".join(output.get("text", ["a picture"])).splitlines()[0] in shown or "data" in output


def test_other_sites_can_link_to_every_name(site):
    head, body = (site / "objects.inv").read_bytes().split(b"zlib.\n")
    assert head.startswith(b"# Sphinx inventory version 2\n# Project: momentum-distill\n")
    known = {line.split(" ")[0]: line.split(" ")[-2] for line in zlib.decompress(body).decode().splitlines()}
    for name in md.__all__:
        if name in ("functional", "diagnostics", "schedules"):
            for member in getattr(md, name).__all__:
                assert known[f"momentum_distill.{name}.{member}"].startswith("api/"), member
        else:
            assert known[f"momentum_distill.{name}"].startswith("api/"), name


def test_the_site_leads_to_the_repository(pages):
    assert ADDRESSES["REPOSITORY_URL"] in pages["index.html"].links
    assert f'rel="canonical" href="{ADDRESSES["SITE_URL"]}/' in pages["index.html"].source
    assert 'data-md-component="source"' not in pages["index.html"].source  # what the script looks for that asks


# ---------------------------------------------------------------------------------------------------- the formulas


def test_formulas_are_left_to_katex_in_its_form(pages):
    counts = {}
    for name, page in pages.items():
        for formula in page.formulas:
            text = formula.strip()
            assert re.fullmatch(r"\\\(.+\\\)|\\\[.+\\\]", text, flags=re.DOTALL), (name, text)
        counts[name] = len(page.formulas)
    assert counts["paper_map.html"] > 100
    for name in ("concepts.html", "mutual_information.html", "api/supcon_distill_loss.html", "api/measures.html"):
        assert counts[name] > 3, name


def test_katex_is_whole_and_carries_its_licence():
    folder = DOCS / "assets" / "katex"
    assert "MIT" in (folder / "LICENSE").read_text(encoding="utf-8")
    style = (folder / "katex.min.css").read_text(encoding="utf-8")
    fonts = {path.name for path in (folder / "fonts").iterdir()}
    assert set(re.findall(r"fonts/([\w.-]+)", style)) == fonts
    used = (folder / "README.txt").read_text(encoding="utf-8")
    version = re.search(r'katex-version:after\{content:"([\d.]+)"', style)
    assert version is not None
    assert f"KaTeX {version[1]} " in used


MEASURE = """<!doctype html><title>measure</title>
%s
<pre id="result"></pre>
<script>
addEventListener("load", () => {
  const result = {}
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument
    const all = (selector) => [...page.querySelectorAll(selector)]
    const fetched = frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name)
    result[frame.getAttribute("src")] = {
      formulas: all(".arithmatex").length,
      set: all(".arithmatex > .katex, .arithmatex > .katex-display").length,
      errors: all(".formula-error, .katex-error").map((error) => error.title),
      foreign: fetched.filter((name) => !name.startsWith(location.origin)),
      pictures: all("img").filter((image) => image.naturalWidth === 0).map((image) => image.src),
      width: page.documentElement.scrollWidth,
    }
  }
  document.getElementById("result").textContent = JSON.stringify(result)
})
</script>
"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site, but for what the search of two dozen pages at once would take most of the time with."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if "/workers/" in self.path or "/search/" in self.path:
            self.send_error(404)
        else:
            super().do_GET()


class Searched(SimpleHTTPRequestHandler):
    """Serves the site with its search; `wait` is answered when `found` was asked for, which holds back `load`."""

    def __init__(self, *args, found, **kwargs):
        self.found = found
        super().__init__(*args, **kwargs)

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/wait":
            self.found.wait(60)
        elif self.path == "/found":
            self.found.set()
        else:
            return super().do_GET()
        self.send_response(204)
        self.end_headers()
        return None


def browse(address, folder, *options):
    """The document that a browser without a network makes of a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium")
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    always = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", rules, "--dump-dom"]
    ran = subprocess.run([browser, *always, *options, address], capture_output=True, text=True, timeout=900, check=True)
    return ran.stdout


def result_of(page, site, handler, folder):
    """What a page beside those of the site has in its element `result` once it is loaded."""
    (site / "own.html").write_text(page, encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        document = browse(f"http://127.0.0.1:{server.server_port}/own.html", folder)
    finally:
        server.shutdown()
        server.server_close()
        (site / "own.html").unlink()
    return result_in(document)


def result_in(document):
    result = re.search(r'<pre id="result">(.*?)</pre>', document, flags=re.DOTALL)
    assert result is not None
    return json.loads(html.unescape(result[1]))


@pytest.fixture(scope="module")
def measured(site, pages, tmp_path_factory):
    """What a browser as narrow as a phone makes of each page."""
    frames = [f'<iframe width="{PHONE}" height="800" src="{name}"></iframe>' for name in pages if name != "404.html"]
    return result_of(MEASURE % "\n".join(frames), site, Quiet, tmp_path_factory.mktemp("browser"))


def test_a_browser_sets_every_formula(pages, measured):
    assert set(measured) == set(pages) - {"404.html"}
    for name, seen in measured.items():
        assert seen["errors"] == [], name
        assert seen["formulas"] == seen["set"] == len(pages[name].formulas), name


def test_a_browser_fetches_nothing_from_elsewhere_and_shows_every_picture(measured):
    assert {name: seen["foreign"] for name, seen in measured.items() if seen["foreign"]} == {}
    assert {name: seen["pictures"] for name, seen in measured.items() if seen["pictures"]} == {}


def test_no_page_is_wider_than_a_phone(measured):
    assert {name: seen["width"] for name, seen in measured.items() if seen["width"] > PHONE} == {}


SEARCH = """<img src="wait" alt="" hidden><pre id="result">[]</pre>
<script>
const timer = setInterval(() => {
  const dialog = [...document.querySelectorAll("*")].find((element) => element.shadowRoot)?.shadowRoot
  const input = dialog?.querySelector("input")
  if (input && !input.value) {
    input.value = "temperature"
    input.dispatchEvent(new Event("input", { bubbles: true }))
  }
  const found = dialog ? [...dialog.querySelectorAll("ol a")] : []
  if (found.length === 0) return
  clearInterval(timer)
  document.getElementById("result").textContent = JSON.stringify(found.map((link) => link.innerText))
  fetch("found").catch(() => {})
}, 50)
</script>
</body>"""
FOUND = ("SigmoidDistillLoss", "How we read it")  # a block and the page on the paper


@pytest.fixture(scope="module")
def start(site):
    """The start page, in which somebody searches."""
    return (site / "index.html").read_text(encoding="utf-8").replace("</body>", SEARCH)


def test_the_search_finds_pages_in_a_browser(site, start, tmp_path):
    found = "\n".join(result_of(start, site, partial(Searched, found=threading.Event()), tmp_path))
    assert [title for title in FOUND if title not in found] == []


def test_the_search_finds_pages_where_the_site_is_opened_as_a_file(site, start, tmp_path):
    (site / "own.html").write_text(start, encoding="utf-8")
    try:
        document = browse((site / "own.html").as_uri(), tmp_path, "--virtual-time-budget=10000")
    finally:
        (site / "own.html").unlink()
    found = result_in(document)
    assert [title for title in FOUND if title not in "\n".join(found)] == []


# ---------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.long
def test_the_pictures_are_those_that_the_script_draws(tmp_path):
    pytest.importorskip("matplotlib")
    spec = util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of small operations
    try:
        with torch.random.fork_rng():
            pictures.main(tmp_path)
    finally:
        torch.set_num_threads(threads)
    drawn = {path.name: path for path in tmp_path.iterdir()}
    kept = {path.name: path for path in (DOCS / "images").glob("*.svg") if not path.name.startswith("results_")}
    assert drawn.keys() == kept.keys()
    assert drawn["blocks.svg"].read_bytes() == kept["blocks.svg"].read_bytes()
    for name, path in drawn.items():  # the words, of which another CPU changes none
        words = [re.findall(r"<text[^>]*>(.*?)</text>", each.read_text()) for each in (path, kept[name])]
        assert words[0] == words[1], name


def test_every_picture_is_used():
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    assert [path.name for path in (DOCS / "images").iterdir() if f"images/{path.name}" not in text] == []
