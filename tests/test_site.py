"The site: it builds, its links lead somewhere, and each page opens in a browser that reaches nothing else."

import functools
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import chromium
import pytest

root = Path(__file__).parent.parent
needs = ("mkdocs", "material", "mkdocs_jupyter", "mkdocstrings")
missing = [name for name in needs if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"the site needs pip install .[docs]: {missing} not there")
in_a_browser = pytest.mark.skipif(chromium.program is None, reason="no chromium here")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of a site that was built with warnings as errors"
    to = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(to)]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return to


class Seen(HTMLParser):
    "What a page links to, loads from anywhere, and can be linked to by"

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if attrs.get("src"):
            self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("href") and attrs.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loads.append(attrs["href"])


@functools.cache
def pages(site):
    return {p.relative_to(site).as_posix(): Seen(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}


def dead_links(site, home="http://site/"):
    "Links between pages, and to parts of pages, that lead nowhere: 'page: link'"
    seen, dead = pages(site), []
    for name, page in seen.items():
        if name == "404.html":
            continue  # its links are from the root of the published site
        for link in page.links + page.loads:
            url, anchor = urldefrag(urljoin(home + name, link))
            if not url.startswith(home):
                continue
            path = unquote(urlparse(url).path).lstrip("/")
            path += "index.html" if not path or path.endswith("/") else ""
            there = (site / path).is_file()
            if not there or (path in seen and unquote(anchor) not in seen[path].ids):
                dead.append(f"{name}: {link}")
    return dead


def test_links_lead_somewhere(site):
    assert dead_links(site) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/index.html").write_text('<h1 id="top">A</h1><img src="../no.png"><a href="../#part">B</a>')
    (tmp_path / "index.html").write_text('<p id="part"><a href="a/#top">A</a><a href="a/#no">A</a><a href="b/">B</a>')
    assert dead_links(tmp_path) == ["a/index.html: ../no.png", "index.html: a/#no", "index.html: b/"]


def test_each_notebook_and_module_has_a_page(site):
    names = pages(site)
    for nb in (root / "nbs").rglob("*.ipynb"):
        name = nb.relative_to(root / "nbs").with_suffix("")
        page = "index.html" if name.name == "index" else f"{name.as_posix()}/index.html"
        assert ".ipynb_checkpoints" in nb.parts or page in names, page
    for module in (root / "fastsb").glob("*.py"):
        assert module.stem in ("__init__", "_modidx", "all") or f"api/{module.stem}/index.html" in names, module.stem
    assert {"changelog/index.html", "contributing/index.html", "method/index.html"} <= names.keys()


def test_nothing_is_loaded_from_elsewhere(site):
    for name, page in pages(site).items():
        assert not [src for src in page.loads if urlparse(src).netloc], name


def test_arguments_have_their_comments(site):
    text = (site / "api/way/index.html").read_text(encoding="utf-8")
    assert "When selection begins: an int is epochs" in text
    callback = (site / "api/callback/index.html").read_text(encoding="utf-8")
    assert "Further arguments are those of" in callback and 'href="../way/#fastsb.way.Way"' in callback
    assert "A method of" in (site / "api/fit_for/index.html").read_text(encoding="utf-8")


def test_the_search_index_holds_the_one_liner(site):
    docs = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {d["location"].split("#")[0] for d in docs if "selective_backprop" in d["text"] + d["title"]}
    assert {"", "12_learner/", "api/learner/"} <= found


def test_notebooks_are_shown_without_what_is_no_part_of_the_story(site):
    "Numbers of cells, cells that nbdev hides, and other packages' warnings with paths of somebody's machine"
    for path in site.rglob("index.html"):
        text = path.read_text(encoding="utf-8")
        for unwanted in ("jp-InputPrompt", "#| hide", "default_exp", "/site-packages/"):
            assert unwanted not in text, f"{path.relative_to(site)}: {unwanted}"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def served(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    b = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


missing_images = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 100))"
too_wide = "document.scrollingElement.scrollWidth > innerWidth"


@in_a_browser
def test_each_page_opens(site, served, browser):
    "Without errors in the console or missing images, and on a narrow window without scrolling sideways"
    narrow = dict(width=400, height=800, deviceScaleFactor=1, mobile=True)
    browser.ask("Emulation.setDeviceMetricsOverride", **narrow)
    faults = {}
    for name in pages(site):
        if name == "404.html":
            continue
        browser.open(served + name.removesuffix("index.html"))
        missing, wide = browser.value(missing_images), browser.value(too_wide)
        if found := [*browser.complaints, *missing, *["wider than the window"] * wide]:
            faults[name] = found
    browser.ask("Emulation.clearDeviceMetricsOverride")
    assert not faults


@in_a_browser
def test_the_browser_notices(tmp_path, browser):
    text = '<img src="no.png"><script>console.error("oh")</script><script>no_such()</script><p style="width:9999px">x'
    (tmp_path / "page.html").write_text(text)
    browser.open((tmp_path / "page.html").as_uri())
    said = " ".join(browser.complaints)
    assert "oh" in said and "Uncaught" in said and "FILE_NOT_FOUND" in said
    assert len(browser.value(missing_images)) == 1 and browser.value(too_wide)


@in_a_browser
def test_search_finds_the_one_liner(served, browser):
    browser.open(served + "?q=selective_backprop")
    results = """new Promise(done => {
        let links = [], since = Date.now()
        const look = () => {
            links = [...document.querySelectorAll('.md-search-result__link')].map(a => a.href)
            links.length || Date.now() - since > 30000 ? done(links) : setTimeout(look, 100)
        }
        look()
    })"""
    assert any("learner" in link for link in browser.value(results))
    assert browser.complaints == []
