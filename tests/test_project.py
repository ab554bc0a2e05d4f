"The project is of one piece: versions, README, notebooks, what it says of itself."
import ast
import base64
import importlib.util
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml

import fastsb
import fastsb.all

root = Path(__file__).parent.parent
notebooks = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
modules = sorted((root / "fastsb").rglob("*.py"))


def settings():
    cfg = ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(root / "settings.ini")
    return cfg["DEFAULT"]


def test_the_version_is_in_the_changelog():
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


tutorials = [nb for nb in notebooks if nb.parent.name == "tutorials"]


@pytest.mark.parametrize("nb", tutorials, ids=lambda p: p.stem)
def test_tutorials_open_in_colab(nb):
    "A badge that leads to this notebook, and a cell that installs what Colab lacks, before anything is imported"
    cells, repository = nbformat.read(nb, as_version=4).cells, settings()["repository"]
    at = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"]({at}/blob/main/{nb.relative_to(root).as_posix()})" in cells[0].source
    first = next(c.source for c in cells if c.cell_type == "code")
    assert "find_spec('fastsb') is None" in first and f"%pip install -q git+{repository}\n" in first + "\n"


def test_all_tutorials_are_run():
    "`nbdev-test` finds each, and skips none"
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob

    assert set(tutorials) <= {Path(p).resolve() for p in nbglob(get_config(root).nbs_path)}
    for nb in tutorials:
        text = nb.read_text()
        assert "skip_exec" not in text and not re.search(r"#\| *(eval: *false|notest)", text), nb.name


def test_all_holds_the_public_names():
    names = "per_item_loss LossHistory Selector Percentile BatchBuffer SelectiveBackprop SelectiveBackpropCallback"
    for name in (*names.split(), "Autocast"):
        assert hasattr(fastsb.all, name)


def test_public_functions_are_documented():
    "Every public function and class says what it does, and every argument what it is"
    for path in modules:
        src = path.read_text()
        tree, lines = ast.parse(src), src.splitlines()
        defs = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        for d in defs:
            assert ast.get_docstring(d), f"{path.name}: {d.name} has no docstring"
            inits = [m for m in d.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
            fs = [d] if isinstance(d, ast.FunctionDef) else inits
            for f in fs:
                for a in f.args.args + f.args.kwonlyargs:
                    if a.arg not in ("self", "cls"):
                        has_comment = "#" in lines[a.end_lineno - 1]
                        assert has_comment or len(f.args.args) <= 1, f"{path.name}: {d.name}({a.arg}) has no comment"


def test_nothing_of_anybodys_machine():
    "No absolute paths of somebody's home or checkout in what is published"
    results = (root / "nbs/results").rglob("*")
    for path in [*notebooks, *modules, *root.glob("tests/*.py"), *results, *root.glob("*.*")]:
        if path.is_file() and path.name != Path(__file__).name:
            text = path.read_text(errors="ignore")
            assert not re.search(r"/home/\w|/root/|/Users/\w|C:\\Users", text) and str(root) not in text, path
            assert path.suffix != ".ipynb" or "/site-packages/" not in text, path  # warnings of somebody's packages


def toml():
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_pyproject_says_what_settings_say():
    "nbdev reads [project]; `settings.ini` is the one place"
    s, project = settings(), toml()["project"]
    assert project["name"] == s["lib_name"] and project["description"] == s["description"]
    assert project["requires-python"] == f">={s['min_python']}" and project["license"] == s["license"]
    assert project["authors"] == [{"name": s["author"]}] and project["keywords"] == s["keywords"].split()
    assert project["urls"]["Repository"] == s["repository"] and project["urls"]["Homepage"] == s["documentation"]
    assert all(url.startswith((s["repository"], s["documentation"])) for url in project["urls"].values())


def test_nbdev_knows_the_project():
    "What `doc()`, source links and `nbdev-bump-version` go by"
    from nbdev.config import get_config

    cfg, s = get_config(root), settings()
    assert cfg.lib_name == s["lib_name"] and cfg.git_url == s["repository"] and cfg.min_python == s["min_python"]
    assert cfg.version == fastsb.__version__ and cfg.lib_path == root / "fastsb"
    assert (cfg.user, cfg.repo) == tuple(s["repository"].split("/")[-2:])


def test_bumping_the_version_leaves_one_version(tmp_path):
    "nbdev writes `__init__.py`, and the package's version is read from there"
    from nbdev.config import set_version

    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / "fastsb").mkdir()
    shutil.copy(root / "fastsb/__init__.py", tmp_path / "fastsb/__init__.py")
    set_version(tmp_path / "fastsb", "9.8.7")
    assert "version" not in settings()
    command = [sys.executable, "setup.py", "--version"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert built.stdout.split()[-1] == "9.8.7"


def test_pythons_that_are_named_are_those_that_are_tested():
    named = [c.split(" :: ")[-1] for c in settings()["classifiers"].splitlines() if re.search(r":: 3\.\d+$", c)]
    ci = (root / ".github/workflows/test.yml").read_text()
    assert named == re.findall(r'"(3\.\d+)"', ci) and named[0] == settings()["min_python"]


def test_what_is_imported_is_required():
    "Each package that a room imports is required, or comes with fastai; what only bench needs is in its extra"
    s = settings()
    names = lambda key: {re.split("[<>=]", r)[0] for r in s[key].split()}
    with_fastai = {"fastcore", "pandas", "scikit-learn"}
    in_notebooks = {"IPython"}  # imported only where one is running
    package = {"sklearn": "scikit-learn", "PIL": "pillow"}
    bench = {"bench", "agreement", "peers", "equal_time"}
    for path in (root / "fastsb").rglob("*.py"):
        of_bench = path.stem in bench or "bench" in path.relative_to(root).parts
        for_bench = names("bench_requirements") if of_bench else set()
        allowed = names("requirements") | with_fastai | in_notebooks | for_bench
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            else:
                continue
            tops = {package.get(f.split(".")[0], f.split(".")[0]) for f in found}
            assert tops <= allowed | set(sys.stdlib_module_names) | {"fastsb"}, (path.name, tops)
    assert names("bench_requirements") <= names("test_requirements") | names("requirements")


def notebook(path, *cells):
    "A notebook at `path`: text, or code beside the pictures that it has drawn"
    nb = nbformat.v4.new_notebook()
    for c in cells:
        if isinstance(c, str):
            nb.cells.append(nbformat.v4.new_markdown_cell(c))
        else:
            picture = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(b"png").decode()})
            nb.cells.append(nbformat.v4.new_code_cell(c[0], outputs=[picture] * c[1]))
    nbformat.write(nb, path)
    return path


def test_each_picture_of_the_readme_has_its_own_text(tmp_path):
    one, two = ("#| fig-alt: One thing\n1", 1), ("#| echo: false\n#| fig-alt: Two others\n2", 2)
    cells = "# T", ("#| hide\nx", 0), one, "a\n\n\n\nb", two
    out = render().render(notebook(tmp_path / "nb.ipynb", *cells))
    text = out[root / "README.md"].decode()
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    assert [alt for alt, _ in pictures] == ["One thing", "Two others", "Two others"]
    assert {root / path for _, path in pictures} == set(out) - {root / "README.md"} and len(out) == 4
    assert "\n\n\n" not in text and "a\n\nb" in text and "fig-alt" not in text
    with pytest.raises(SystemExit, match="fig-alt"):
        render().render(notebook(tmp_path / "nb.ipynb", ("plot()", 1)))


def test_blank_lines_of_code_stay():
    tidy = render().without_runs_of_blank_lines
    assert tidy("\n\na\n\n\nb  \n```python\nx\n\n\ny\n```\n\n\n\nc\n\n") == "a\n\nb\n```python\nx\n\n\ny\n```\n\nc\n"


def test_the_citation_is_of_this_version():
    cff = yaml.safe_load((root / "CITATION.cff").read_text())
    s = settings()
    assert cff["version"] == fastsb.__version__ and cff["license"] == s["license"]
    assert cff["repository-code"] == s["repository"] and cff["url"] == s["documentation"]
    assert cff["keywords"] == s["keywords"].split()
    assert cff["references"][0]["url"].endswith("1910.00762")


def test_lines_are_short():
    "At most 120 characters; but for `__all__`, which nbdev writes"
    for path in modules:
        if path.name == "_modidx.py":
            continue
        text = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(), flags=re.M | re.S)
        long = [line for line in text.splitlines() if len(line) > 120]
        assert not long, f"{path.name}: {long[0]}"


def test_no_room_imports_anothers_private_names():
    for path in modules:
        for names in re.findall(r"^from \.+[\w.]* import \(?(.*?)\)?$", path.read_text(), re.M | re.S):
            private = re.findall(r"\b_[a-z]\w*", names.split("\n\n")[0])
            assert not private, f"{path.name} imports {private}"


def test_rooms_import_only_what_stands_above_them():
    "By the numbers of their notebooks; the benchmarks are a wing that nobody else imports"
    at = {}
    for nb in notebooks:
        if found := re.search(r"default_exp ([\w.]+)", nb.read_text()):
            at[found.group(1)] = str(nb.relative_to(root / "nbs"))
    for module, place in at.items():
        if module.startswith("bench."):
            continue
        source = (root / "fastsb" / f"{module.replace('.', '/')}.py").read_text()
        for other in re.findall(r"^from \.([\w.]+) import", source, re.M):
            assert other in at and at[other] < place, f"{module} imports {other}, which does not stand above it"


def test_the_site_says_what_settings_say():
    site, s = yaml.safe_load((root / "mkdocs.yml").read_text()), settings()
    assert site["site_name"] == s["lib_name"] and site["site_url"] == s["documentation"]
    assert site["extra"]["social"][0]["link"] == s["repository"]
    assert s["description"].startswith(site["site_description"])
