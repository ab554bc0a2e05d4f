"The code in README.md does what it says."

import re
from pathlib import Path

import nbformat
import torch
from common import digits, digits_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(words):
    "The Python code in README.md that holds `words`"
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if words in b)


def test_the_loop_of_ones_own():
    "A part of the items between a tenth and nine tenths, each at most once an epoch; and it learns"
    code = block("SelectiveSampler(")
    assert len([l for l in code.splitlines() if l.strip() and "import" not in l]) <= 8
    x, y = digits(1500)
    ds, model = TensorDataset(x[:1408], y[:1408]), digits_model(p=0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scope = dict(ds=ds, model=model, opt=opt, loss_func=nn.CrossEntropyLoss(), DataLoader=DataLoader)
    exec(code, scope)
    log = scope["sampler"].log
    trained = [r["bp"] for r in log]
    assert trained[0] == trained[9] == 1408 and max(trained[1:9]) < 1300 and sum(r["fp"] for r in log) == 0
    assert scope["sampler"].memory.times().sum() == sum(r["bp"] for r in log)
    assert (model.eval()(x[1408:]).argmax(1) == y[1408:]).float().mean() > 0.85


def test_figures_are_those_of_the_result_files(monkeypatch):
    "README's notebook may have been run before the results changed: its tables and texts are made anew"
    monkeypatch.chdir(ROOT / "nbs")
    cells = [c.source for c in nbformat.read("index.ipynb", as_version=4).cells if c.cell_type == "code"]
    imports = next(c for c in cells if c.startswith("#| hide") and "runs_table(" in c)
    table = next(re.search(r"^table = .*$", c, re.M)[0] for c in cells if re.search(r"^table = ", c, re.M))
    *results, text = re.split(r"^(?=Markdown\()", next(c for c in cells if "## Results" in c), flags=re.M)
    scope = {}
    exec("\n".join([imports, table, *results]), scope)
    made = eval(text, scope).data
    figures = [line for line in made.splitlines() if re.search(r"\d\.\d\d", line)]
    assert len(figures) > 7
    without_folder = README.replace("](nbs/", "](")
    for line in figures:
        assert line in without_folder, f"run nbs/index.ipynb and .ci/render_readme.py again: {line}"
