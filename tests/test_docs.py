"""Links between pages, and the site of `make docs`.

The site is built, opened from file:// in a browser at the widths of a desk and of a phone, and every link in it is
followed."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def prose_of(path):
    "The text of a Markdown file, or of a notebook's Markdown cells."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("page", [*sorted(root.glob("*.md")), *notebooks], ids=lambda page: str(page.relative_to(root)))
def test_links_to_files_of_the_repository(page):
    text = re.sub(r"```.*?```", "", prose_of(page), flags=re.S)
    for url in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(url)
        if not parts.scheme and parts.path:
            assert (page.parent / unquote(parts.path)).exists(), url
    for path in re.findall(r"`(nbs/[\w/]+\.ipynb)`", text):
        assert (root / path).is_file(), path


@pytest.mark.parametrize("page", notebooks, ids=lambda page: str(page.relative_to(root)))
def test_a_page_begins_with_a_title_and_a_sentence(page):
    title, _, rest = prose_of(page).partition("\n")
    assert title.startswith("# ") and re.match(r"\s*[A-Z[`].*[.:]", rest), f"{page.name} begins with {title!r}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx", reason="pip install rcka[docs]")
    out = tmp_path_factory.mktemp("site") / "html"
    run = subprocess.run([sys.executable, root / "docs" / "build", "--out", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get("id"), attrs.get("name")}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon"):
            self.loads.append(attrs["href"])


@pytest.mark.slow
def test_every_local_link_leads_somewhere_and_nothing_is_loaded_from_a_network(site):
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in site.rglob("*.html") if "_static" not in p.parts}
    assert len(pages) > 20
    for page, found in pages.items():
        for url in found.links + found.loads:
            parts = urlsplit(url)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                assert url not in found.loads, f"{page.name} loads {url}"
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.relative_to(site)} links to {url}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page.relative_to(site)}: no {url}"


@pytest.mark.slow
def test_every_notebook_and_every_public_name_is_there(site):
    for notebook in notebooks:
        assert (site / notebook.relative_to(root / "nbs")).with_suffix(".html").is_file()
    text = "".join(p.read_text(encoding="utf-8") for p in (site / "reference").glob("*.html"))
    ids = set(re.findall(r'id="(rcka[\w.]+)"', text))
    for module in (root / "rcka").rglob("*.py"):
        name = ".".join(module.relative_to(root).with_suffix("").parts)
        exports = re.search(r"__all__ = (\[[^\]]*\])", module.read_text(encoding="utf-8"))
        if exports and "_" != module.stem[0]:
            for public in re.findall(r"'(\w+)'", exports[1]):
                assert f"{name}.{public}" in ids


@pytest.mark.slow
def test_the_navigation_has_groups_that_hold_every_page(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    groups = re.findall(r'class="toctree-l1 has-children"><a class="reference internal" href="([^"]+)"', front)
    alone = re.findall(r'class="toctree-l1"><a class="reference internal" href="([^"]+)"', front)
    assert alone == ["reference/by-task.html"] and len(groups) + 1 == front.count('class="toctree-l1') < 30
    listed = {(site / group).parent / link for group in groups for link in Links((site / group).read_text()).links}
    listed = {path.resolve() for path in listed}
    for page in notebooks:
        if page.stem != "index":
            assert (site / page.relative_to(root / "nbs")).with_suffix(".html").resolve() in listed


# what a reader's browser finds: errors on the console, formulas, formulas that failed, and what sticks out of the page
probe = """<script>
window.errors = []; addEventListener("error", e => errors.push(e.message || e.target.src || e.target.href), true);
console.error = (...a) => errors.push(a.join(" ")); console.warn = console.error;
</script>"""
report = """<script>addEventListener("load", () => setTimeout(tell, 4000));
addEventListener("message", () => setTimeout(tell, 500));
const tell = () => parent.postMessage(JSON.stringify({errors, width: innerWidth,
  drawn: document.querySelectorAll(".math svg").length,
  failed: all(".math").filter(e => !e.querySelector("svg") || e.querySelector("[data-mml-node=merror]"))
    .map(e => e.textContent.slice(0, 80)),
  found: document.querySelectorAll("#search-results li").length,
  wide: all("article *").filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e))
    .map(e => e.outerHTML.slice(0, 80)),
  broken: [...document.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src),
  dark: (document.body.dataset.theme = "dark", all("article img").filter(e => !light(e)).map(e => e.src))
  }), "*");
const all = selector => [...document.querySelectorAll(selector)];
const light = e => getComputedStyle(e).backgroundColor.match(/\\d+/g).every(x => x > 200);
const scrolls = e => e.tagName != "ARTICLE" &&
  (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));</script>"""
frame = """<body></body><script>
const seen = [], pages = %s; const f = document.createElement("iframe"); f.height = 800;
const load = () => { if (seen.length == pages.length) { document.body.textContent = JSON.stringify(seen); return; }
  f.width = 390; f.src = pages[seen.length]; document.body.replaceChildren(f); seen.push([]); };
addEventListener("message", e => {
  seen.at(-1).push(JSON.parse(e.data));
  if (seen.at(-1).length == 2) load(); else { f.width = 1280; f.contentWindow.postMessage("", "*"); }
});
load();
</script>"""


def browse(site, urls):
    """Open pages at the width of a phone, 390 pixels, and widen them to 1280: (address, what the page reports) for each
    width."""
    opened = []
    for url in urls:
        path, _, query = url.partition("?")
        text = (site / path).read_text(encoding="utf-8")
        copy = Path(path).with_name(f"probe-{Path(path).name}")
        (site / copy).write_text(
            text.replace("<head>", "<head>" + probe, 1).replace("</body>", report + "</body>", 1), encoding="utf-8"
        )
        opened.append(str(copy) + ("?" + query if query else ""))
    (site / "probe.html").write_text(frame % json.dumps(opened), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={site.parent / 'profile'}",
        "--timeout=400000",
        f"--virtual-time-budget={30000 * len(urls)}",
        "--window-size=1400,1000",
        "--dump-dom",
    ]
    run = subprocess.run(
        [chromium, *flags, (site / "probe.html").as_uri()], capture_output=True, text=True, timeout=400
    )
    for copy in site.rglob("probe*.html"):
        copy.unlink()
    body = re.search(r"<body>(\[.*\])</body>", run.stdout, re.S)
    assert body, run.stdout[-500:] + run.stderr[-500:]
    return [(url, saw) for url, both in zip(urls, json.loads(html.unescape(body[1]))) for saw in both]


@pytest.mark.slow
@pytest.mark.skipif(not chromium, reason="no Chromium")
def test_in_a_browser(site):
    pages = sorted(
        str(p.relative_to(site)) for p in site.rglob("*.html") if "_static" not in p.parts and p.name != "search.html"
    )
    for page, saw in browse(site, pages + ["search.html?q=debiased", "search.html?q=MinibatchCKA"]):
        assert not saw["errors"], (page, saw)
        assert not saw["wide"], (page, saw)
        assert not saw["failed"], (page, saw)
        assert not saw["broken"], (page, saw)
        assert not saw["dark"], (page, saw)  # figures are drawn on white: they need a light card
        if page.startswith("theory"):
            assert saw["drawn"] > 10, (page, saw)
        if page.startswith("search"):
            assert saw["found"] > 0, (page, saw)
