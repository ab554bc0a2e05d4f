"""What works together: fastai's callbacks alone and in pairs, tasks of all kinds, in six modes. What wrong calls get.

`pytest tests/test_compatibility.py --all-pairs` tries every pair. `--write-tables nbs/results/compatibility.json`
writes the file that the page of tables is made of."""

import functools
import itertools
import json
import platform
import random
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from compat_calls import CALLS, outcome
from compat_callbacks import CALLBACKS, LOGGERS, MODES, fit, refused
from compat_tasks import REFUSED, TASKS, WHOLE, train

FILE = Path(__file__).parent.parent / "nbs/results/compatibility.json"
PAIRS = [(*names, mode) for names in itertools.combinations(CALLBACKS, 2) for mode in MODES]
SAMPLE = random.Random(0).sample(PAIRS, 60)

seen = dict(callbacks={}, tasks={}, calls={})  # what the tables are made of


@functools.cache
def plain(names):
    "The same without fastsb: whether it works is the measure"
    return fit(names, None, Path(tempfile.mkdtemp()))


def check(names, mode, tmp_path):
    "Fit with these callbacks in this mode; what a table says of it"
    was, now = plain(names), fit(names, mode, tmp_path)
    assert now.restored or not was.restored
    if words := refused(names, mode):
        assert type(now.error) is ValueError and words in str(now.error)
        return "refused"
    assert type(now.error) is type(was.error), now.error
    if now.error is not None:
        return "as plain fastai"
    added = 3 if any(name in LOGGERS for name in names) else 1
    assert now.values == [n and n + added for n in was.values], "as many validations, and columns of fastsb's"
    assert now.validates == was.validates
    assert now.counted, "what was trained is what is counted"
    lost = [name for name in names if was.effects[name] and not now.effects[name]]
    assert not lost, "has done its work"
    assert min(now.selected) < 1, "something was left out"
    return f"{now.share:.2f}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback(name, mode, tmp_path):
    "It works as in plain training, its effect is there, rows are counted right, the learner is as it was"
    assert plain((name,)).error is None and plain((name,)).effects[name]
    seen["callbacks"].setdefault(name, {})[mode] = check((name,), mode, tmp_path)


def pytest_generate_tests(metafunc):
    if "pair" in metafunc.fixturenames:
        pairs = PAIRS if metafunc.config.getoption("--all-pairs") else SAMPLE
        metafunc.parametrize("pair", pairs, ids="-".join)


def test_a_pair_of_callbacks(pair, tmp_path):
    "Whatever each of them does in plain training beside the other, it does"
    *names, mode = pair
    check(tuple(names), mode, tmp_path)


@functools.cache
def plain_task(task):
    return train(task, None)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_a_task(task, mode):
    "It trains and selects; or trains on everything and says so in a line; or is refused in a sentence before it begins"
    assert plain_task(task).error is None and plain_task(task).finite
    got = train(task, mode)
    assert got.restored
    if words := REFUSED.get((task, mode)):
        assert words in got.error and got.trained == 0
        cell = "refused"
    elif words := WHOLE.get((task, mode)):
        assert got.error is None and got.selected == [1.0] * 4
        assert len(got.lines) == 1 and words in got.lines[0]
        cell = "whole"
    else:
        assert got.error is None and got.finite and not got.lines
        assert got.selected[0] == 1 and 0 < got.selected[1] < 1 and 0 < got.selected[2] < 1
        cell = f"{got.share:.2f}"
    says = got.error or "".join(got.lines).removeprefix("fastsb: ")
    seen["tasks"].setdefault(task, {})[mode] = dict(cell=cell, says=says)


@pytest.mark.parametrize("call,error,says", CALLS, ids=[call for call, *_ in CALLS])
def test_a_wrong_call(call, error, says):
    "One sentence, or two, that a user can act on"
    kind, text = outcome(call)
    assert kind is error and says in text
    of_python = "unexpected keyword argument" in text
    assert len(text) < 500 and "\n" not in text and (of_python or text.endswith("."))
    seen["calls"][call] = dict(error=kind.__name__, says=text)


def test_each_call_is_there_once():
    assert len({call for call, *_ in CALLS}) == len(CALLS) >= 120


def listed(tables):
    return {
        "callbacks": {name: sorted(modes) for name, modes in tables["callbacks"].items()},
        "tasks": {name: sorted(modes) for name, modes in tables["tasks"].items()},
        "calls": sorted(tables["calls"]),
    }


def test_the_tables_are_of_these_tests(request):
    "The file that the page shows lists what is tried here; `--write-tables` writes it anew"
    if path := request.config.getoption("--write-tables"):
        packages = {name: version(name) for name in ("fastai", "torch")}
        made = dict(
            command="python -m pytest tests/test_compatibility.py --write-tables nbs/results/compatibility.json"
        )
        Path(path).write_text(
            json.dumps({**made, "versions": packages, "python": platform.python_version(), **seen}, indent=1) + "\n"
        )
    modes = sorted(MODES)
    assert listed(json.loads(FILE.read_text())) == {
        "callbacks": dict.fromkeys(CALLBACKS, modes),
        "tasks": dict.fromkeys(TASKS, modes),
        "calls": sorted(call for call, *_ in CALLS),
    }
