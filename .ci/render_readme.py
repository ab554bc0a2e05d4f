"Render README.md from nbs/index.ipynb, its pictures to nbs/images/. `--check` only tells whether they are stale."
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent


def alternative_text(cell) -> str:
    "What the pictures of `cell` show, by its line `#| fig-alt: ...`"
    if not (found := re.search(r"^#\| *fig-alt: *(.+)", cell.source, re.M)):
        cell_begins = cell.source[:60]
        sys.exit(f"nbs/index.ipynb: a cell with a picture needs a line '#| fig-alt: what it shows': {cell_begins!r}")
    return found[1].strip()


def has_picture(cell) -> bool:
    return any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))


def without_runs_of_blank_lines(text: str) -> str:
    "`text` with at most one blank line in a row; code is left as it is"
    lines, in_code = [], False
    for line in text.strip().splitlines():
        line = line.rstrip()
        in_code ^= line.startswith("```")
        if line or in_code or lines[-1]:
            lines.append(line)
    return "\n".join(lines) + "\n"


def render(notebook: Path = ROOT / "nbs/index.ipynb") -> dict[Path, bytes]:
    "The files that `notebook` stands for: {path: content}"
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *hide$", c.source, re.M)]
    shows = {i: alternative_text(c) for i, c in enumerate(nb.cells) if has_picture(c)}
    for c in nb.cells:
        if re.search(r"^#\| *echo: *false", c.source, re.M):
            c.metadata["tags"] = ["no-input"]
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    exporter = MarkdownExporter()
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"no-input"}), enabled=True)
    text, res = exporter.from_notebook_node(nb, resources={"unique_key": "index", "output_files_dir": "nbs/images"})
    # nbconvert names a picture by the number of its cell
    text = re.sub(r"!\[png\](?=\(\S*index_(\d+)_\d+\.png\))", lambda m: f"![{shows[int(m[1])]}]", text)
    text = re.sub(r"\]\((images|results)/", r"](nbs/\1/", text)  # paths are relative to nbs/ in the notebook
    text = re.sub(r"\]\(((?:bench/|tutorials/)?[\w.-]+\.ipynb)", r"](nbs/\1", text)
    text = text.replace("](../", "](")
    pictures = {ROOT / k: v for k, v in res["outputs"].items()}
    return {ROOT / "README.md": without_runs_of_blank_lines(text).encode(), **pictures}


def stale() -> list[str]:
    "Names of the files that are not what the notebook says"
    return [str(p.relative_to(ROOT)) for p, content in render().items() if not p.exists() or p.read_bytes() != content]


if __name__ == "__main__":
    if "--check" in sys.argv:
        if names := stale():
            sys.exit(f"stale: {', '.join(names)}; run python .ci/render_readme.py")
    else:
        for path, content in render().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
