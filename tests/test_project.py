"The project is of one piece: versions, README, notebooks, what it says of itself."
import ast
import importlib.util
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

import fastsb
import fastsb.all

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
modules = sorted((root / "fastsb").rglob("*.py"))


def settings():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(root / "settings.ini")
    return cfg["DEFAULT"]


def test_versions_agree():
    assert settings()["version"] == fastsb.__version__
    assert re.search(rf"^## {re.escape(fastsb.__version__)}", (root / "CHANGELOG.md").read_text(), re.M)


def render():
    spec = importlib.util.spec_from_file_location("render_readme", root / ".ci/render_readme.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


def test_readme_is_what_the_notebook_says(tmp_path):
    mod = render()
    assert mod.stale() == [], "run python .ci/render_readme.py"
    text = mod.render()[root / "README.md"].decode()
    for path in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (root / path).exists(), f"README.md points to {path}"


def test_the_check_notices_a_stale_readme(monkeypatch):
    mod, read = render(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + (b"x" if p.name == "README.md" else b""))
    assert mod.stale() == ["README.md"]


@pytest.mark.parametrize("nb", notebooks, ids=lambda p: p.stem)
def test_notebooks_are_stories(nb):
    cells = nbformat.read(nb, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ") and "\n> " in cells[0].source
    assert any(c.get("outputs") for c in cells), "a notebook carries its outputs"
    assert not [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]


def test_all_holds_the_public_names():
    for name in ("per_item_loss LossHistory Selector Percentile BatchBuffer SelectiveBackprop SelectiveBackpropCallback Autocast").split():
        assert hasattr(fastsb.all, name)


def test_public_functions_are_documented():
    "Every public function and class says what it does, and every argument what it is"
    for path in modules:
        src = path.read_text()
        tree, lines = ast.parse(src), src.splitlines()
        defs = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
        for d in defs:
            assert ast.get_docstring(d), f"{path.name}: {d.name} has no docstring"
            fs = [d] if isinstance(d, ast.FunctionDef) else [m for m in d.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
            for f in fs:
                for a in f.args.args + f.args.kwonlyargs:
                    if a.arg not in ("self", "cls"):
                        assert "#" in lines[a.end_lineno - 1] or len(f.args.args) <= 1, f"{path.name}: {d.name}({a.arg}) has no comment"


def test_nothing_of_anybodys_machine():
    "No absolute paths of somebody's home or checkout in what is published"
    results = (root / "nbs/results").rglob("*")
    for path in [*notebooks, *modules, *root.glob("tests/*.py"), *results, *root.glob("*.*")]:
        if path.is_file() and path.name != Path(__file__).name:
            text = path.read_text(errors="ignore")
            assert not re.search(r"/home/\w|/root/|/Users/\w|C:\\Users", text) and str(root) not in text, path
