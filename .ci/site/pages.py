"Hook of mkdocs: pages that are made from other files than notebooks, their order, and the links between all."

import json
import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from mkdocs.structure.toc import get_toc

ROOT = Path(__file__).resolve().parents[2]
log = logging.getLogger("mkdocs.hooks.pages")
# files of the repository that become pages
copied = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
as_page = {**copied, "nbs/index.ipynb": "index.md"}


def story(nb: Path) -> tuple[str, str]:
    "The title of a notebook, and the question it answers"
    first = "".join(json.loads(nb.read_text(encoding="utf-8"))["cells"][0]["source"])
    return re.search(r"^# (.+)", first)[1], re.search(r"^> (.+)", first, re.M)[1]


def notebooks(folder: str) -> list[str]:
    "Those in a folder of nbs/, by number"
    return sorted(str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs" / folder).glob("*.ipynb"))


rooms = [nb for nb in notebooks(".") if nb[0].isdigit()]
tutorials = notebooks("tutorials")
evidence = [nb for nb in notebooks("bench") if "default_exp" not in (ROOT / "nbs" / nb).read_text(encoding="utf-8")]
measuring = [nb for nb in notebooks("bench") if nb not in evidence]
modules = [p.stem for p in sorted((ROOT / "fastsb").glob("*.py")) if not p.stem.startswith("_") and p.stem != "all"]


def listing(title: str, about: str, nbs: list[str], folder: str) -> str:
    "A page that lists notebooks with their questions"
    lines = [f"# {title}", "", about, ""]
    for nb in nbs:
        name, question = story(ROOT / "nbs" / nb)
        lines.append(f"- [{name}]({posixpath.relpath(nb, folder)}): {question}")
    return "\n".join(lines) + "\n"


def api_of(module: str) -> str:
    "The page of a module: what is in it, from its docstrings and its arguments' comments"
    source = (ROOT / f"fastsb/{module}.py").read_text(encoding="utf-8")
    nb = re.search(r"File to edit: \.\./nbs/(.+\.ipynb)", source)[1]
    return f"# fastsb.{module}\n\nExported from the notebook [{nb}](../{nb}).\n\n::: fastsb.{module}\n"


def api_index() -> str:
    "The page that lists the modules"
    lines = ["# API", "", "`from fastsb.all import *` gives the public names.", ""]
    for module in modules:
        source = (ROOT / f"fastsb/{module}.py").read_text(encoding="utf-8")
        question = re.match(r'"""(.+?)"""', source, re.S)[1]
        lines.append(f"- [fastsb.{module}]({module}.md): {question}")
    return "\n".join(lines) + "\n"


def elsewhere(path: str, config) -> str:
    "Where a file of the repository that is no page can be read"
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    repository = config.extra["social"][0]["link"]
    return f"{repository}/{kind}/main/{path}"


def copy_of(name: str, config) -> str:
    "A markdown file of the repository as a page: its links lead to pages, and badges are left out"

    def target(found):
        path, anchor = found[1], found[2] or ""
        if path in as_page:
            return f"]({as_page[path]}{anchor})"
        if path.startswith("nbs/"):
            return f"]({path.removeprefix('nbs/')}{anchor})"
        return f"]({elsewhere(path, config)}{anchor})"

    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\[!\[[^\]]*\]\(https?:[^)]*\)\]\([^)]*\)[ \t]*\n?|!\[[^\]]*\]\(https?:[^)]*\)[ \t]*\n?", "", text)
    return re.sub(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", target, text)


def on_config(config):
    how = "Each notebook answers one question, and is the source of a module. They read from top to bottom."
    seconds = "Short stories, each runs in seconds on a CPU."
    how_measured = "How it is measured: each notebook is the source of a module of `fastsb.bench`."
    config.made = {
        **{page: copy_of(name, config) for name, page in copied.items()},
        "how.md": listing("How it works", how, rooms, "."),
        "tutorials/index.md": listing("Tutorials", seconds, tutorials, "tutorials"),
        "bench/index.md": listing("How it is measured", how_measured, measuring, "bench"),
        "api/index.md": api_index(),
        **{f"api/{module}.md": api_of(module) for module in modules},
        "site.css": (ROOT / ".ci/site/site.css").read_text(encoding="utf-8"),
    }
    config.nav = [
        {"Home": ["index.md", {"What, when, when not": "method.ipynb"}]},
        {"Tutorials": ["tutorials/index.md", *tutorials]},
        {"How it works": ["how.md", *rooms]},
        {"Evidence": ["evidence.ipynb", *evidence, {"How it is measured": ["bench/index.md", *measuring]}]},
        {"API": ["api/index.md", *({module: f"api/{module}.md"} for module in modules)]},
        {"Project": [{"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]},
    ]
    return config


def on_files(files, config):
    for path, content in config.made.items():
        files.append(File.generated(config, path, content=content))
    return files


def headings(html: str) -> list[dict]:
    "The headings of a page, as mkdocs wants them for its table of contents"
    top = dict(level=0, children=[])
    above = [top]
    for level, anchor, name in re.findall(r'<h([1-6])[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\1>', html, re.S):
        name = re.sub(r'<a class="anchor-link".*?</a>|<[^>]+>', "", name, flags=re.S)
        heading = dict(level=int(level), id=anchor, name=name, children=[])
        while above[-1]["level"] >= heading["level"]:
            above.pop()
        above[-1]["children"].append(heading)
        above.append(heading)
    return top["children"]


def without_directives(html: str) -> str:
    "As nbdev has it: what is marked `#| hide` or `#| echo: false` is not shown, nor are marks but `#| export`"
    kind = r'<div class="jp-Cell jp-(?:Code|Markdown|Raw)Cell jp-Notebook-cell[^"]*"(?: id="[^"]*")?>'
    # a code cell is a `div` in another
    cells = re.split(rf"(?={kind})(?<!jp-mod-noOutputs\">\n)(?<!jp-Notebook-cell\">\n)|(?=</div> <!-- jp-)", html)
    shown = []
    for cell in cells:
        said = set(re.findall(r'<span class="c1">#\| *([\w-]+)', cell))
        if "hide" in said or "default_exp" in said:
            continue
        if "echo" in said:
            cell = re.sub(r'<div class="jp-Cell-inputWrapper".*?(?=<div class="jp-Cell-out)', "", cell, flags=re.S)
        shown.append(re.sub(r'<span class="c1">#\| *(?!export\b)[\w-]+.*?</span>\n', "", cell))
    return "".join(shown)


def on_page_content(html, page, config, files):
    "What mkdocs-jupyter makes of a notebook, without scripts and styles of its own, and with links that lead to pages"
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)
    html = re.sub(r"<div class=\"zeroclipboard-container\">.*?</clipboard-copy>\s*</div>", "", html, flags=re.S)
    html = re.sub(r'<div class="[^"]*clipboard-copy-txt[^"]*".*?</div>', "", html, flags=re.S)
    html = re.sub(r'<div class="jp-(?:In|Out)putPrompt[^>]*>[^<]*</div>', "", html)
    # warnings of other packages about each other
    stderr = r'<div class="[^"]*" data-mime-type="application/vnd.jupyter.stderr"[^>]*>\s*<pre>'
    html = re.sub(stderr + r"(?:(?!</pre>).)*?\bsite-packages\b.*?</pre>\s*</div>", "", html, flags=re.S)
    html = without_directives(html.replace("highlight-ipynb", "highlight"))
    page.toc = get_toc(headings(html))
    # a picture from elsewhere, such as a badge, is named instead of loaded
    html = re.sub(r'<img\b(?=[^>]*\bsrc="https?:)[^>]*\balt="([^"]*)"[^>]*>', r"\1", html)
    return re.sub(r'\b(href|src)="(?!https?:|#|data:|mailto:|attachment:)([^"#]+)(#[^"]*)?"',
                  lambda found: f'{found[1]}="{resolved(found[2], page, config, files)}{found[3] or ""}"', html)


def resolved(path: str, page, config, files) -> str:
    "Where a link that stands in a notebook leads to on the site"
    whole = os.path.normpath(posixpath.join("nbs", posixpath.dirname(page.file.src_uri), path))
    at = as_page.get(whole, whole.removeprefix("nbs/"))
    if (file := files.get_file_from_path(at)) and (whole.startswith("nbs/") or whole in as_page):
        return file.url_relative_to(page.file)
    if not (ROOT / whole).exists():
        log.warning(f"{page.file.src_uri} links to {path}, which is not there")
    return elsewhere(whole, config)
