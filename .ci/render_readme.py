"Render README.md from nbs/index.ipynb; its plots go to nbs/images/. `--check` writes nothing and fails when either is stale."
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent


def render() -> dict[Path, bytes]:
    "The files that `nbs/index.ipynb` stands for: {path: content}"
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not re.search(r"^#\| *hide$", c.source, re.M)]
    for c in nb.cells:
        if re.search(r"^#\| *echo: *false", c.source, re.M):
            c.metadata["tags"] = ["no-input"]
        c.source = re.sub(r"^#\|.*\n", "", c.source, flags=re.M)
    exporter = MarkdownExporter()
    exporter.register_preprocessor(TagRemovePreprocessor(remove_input_tags={"no-input"}), enabled=True)
    text, res = exporter.from_notebook_node(nb, resources={"unique_key": "index", "output_files_dir": "nbs/images"})
    text = text.replace("![png]", "![The selected fraction over a fit]")
    text = re.sub(r"\]\((images|results)/", r"](nbs/\1/", text)  # paths are relative to nbs/ in the notebook
    text = re.sub(r"\]\(((?:bench/)?[\w.-]+\.ipynb)", r"](nbs/\1", text)
    text = text.replace("](../", "](")
    text = "\n".join(l.rstrip() for l in text.strip().splitlines()) + "\n"
    return {ROOT / "README.md": text.encode(), **{ROOT / k: v for k, v in res["outputs"].items()}}


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
