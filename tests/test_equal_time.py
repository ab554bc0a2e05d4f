"The equal-time protocol: its accounts, budgets, file and tables. Nothing here looks at how long anything took."

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from common import Spy, everything, fresh, same
from fastai.basics import set_seed
from fastai.callback.core import Callback
from scipy import stats

from fastsb.bench import budget as budgets
from fastsb.bench import command, contestants, intervals, pictures, prices, regression, tables
from fastsb.bench import runs as bench_runs
from fastsb.bench import task as tasks
from fastsb.callback import SelectiveBackpropCallback
from fastsb.score import Proxy, Scorer

NAMES = [prices.price_name(s) for s in (Scorer(), Scorer(size=0.5))]
COSTS = dict(train={"8": 0.4, "16": 0.6, "32": 1.0}, load=0.01, select=0.05, observe=0.02, remember=0.03, choose=0.001,
             score={k: dict(item=0.005, learn=0.0) for k in NAMES})  # fmt: skip
SMALL = dict(width=4, bs=32)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def task(items=160, seed=0, **kw):
    return tasks.Task(tasks.configuration(items=items, **SMALL, **kw), seed, "cpu")


class Noted:
    "A loader that tells what it gives"

    def __init__(self, dl, note):
        self.dl, self.note = dl, note

    def __len__(self):
        return len(self.dl)

    def __getattr__(self, name):
        return getattr(self.dl, name)

    def __iter__(self):
        for b in self.dl:
            self.note(b)
            yield b


class Count(Callback):
    "An account of our own: what the model was given, from hooks of the model and of the loader"

    order, run_valid = -100, False

    def before_fit(self):
        self.scored_rows, self.trained_rows, self.loaded, self.pcts, self.lrs = [], [], [], [], []
        self.handle = self.model.register_forward_pre_hook(self.hook)

    def before_train(self):
        self.learn.dl = Noted(self.learn.dl, self.note)

    def note(self, b):
        self.loaded.append(len(b[-1]))
        self.pcts.append(self.learn.pct_train)

    def hook(self, model, args):
        if model.training:
            self.trained_rows.append(len(args[0]))
        elif (
            self.learn.training and len(args[0]) > 2
        ):  # an eval pass in the training part of an epoch; two rows are a trial
            self.scored_rows.append(len(args[0]))

    def after_step(self):
        self.lrs.append(self.opt.hypers[-1]["lr"])

    def after_fit(self):
        self.handle.remove()


METHODS = {
    "plain": None,
    "sb": dict(exact=False),
    "cached": dict(score="cached", start=0.1, end=0.9),
    "prune": dict(selector=contestants.TopK(0.5), batching="prune"),
    "stale": dict(stale=3),
    "two_stage": dict(score="two_stage"),
}


def fit(kw, budget, d=None, seed=0, cbs=()):
    d = d or task()
    set_seed(seed)
    learn = d.learner()
    if kw is not None:
        learn.selective_backprop(**fresh(**kw))
    count = Count()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(budgets.endless, 0.1, cbs=[budget, count, prices.NoValidation(), *cbs])
    return learn, count


# the accounts


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_counts_what_is_done_and_ends_within_a_step(name):
    kw, d = METHODS[name], task()
    plain = prices.epoch_seconds(COSTS, len(d.x), 32)
    budget = budgets.Budget(5.3 * plain, COSTS)
    learn, seen = fit(kw, budget, d)
    c = budget.counts
    assert {int(k): v for k, v in c["steps"].items()} == pd.Series(seen.trained_rows).value_counts().to_dict()
    assert c["fp"] == sum(seen.scored_rows) and c["scored"] == len(seen.scored_rows)
    uncharged = seen.loaded[:-1] if sum(seen.loaded) > c["loads"] else seen.loaded  # the batch that the fit ends before
    assert c["loads"] == sum(uncharged)
    price = dict(zip((8, 16, 32), (0.4, 0.6, 1.0)))
    mine = sum(
        np.interp(r, [0, *price], [0.2, *price.values()]) for r in seen.trained_rows
    )  # the first segment, drawn to no rows at all, ends at 0.2
    mine += 0.01 * sum(uncharged) + 0.005 * sum(seen.scored_rows) + 0.05 * len(seen.scored_rows)
    extra = 0.02 * c["observed"] + 0.03 * c["remembered"] + 0.001 * c["chosen"]
    assert budget.spent == pytest.approx(mine + extra)
    assert budget.spent == pytest.approx(prices.spent(json.loads(json.dumps(c)), COSTS)), (
        "recomputed from what is in a file"
    )
    step = 1.0 + 32 * 0.015 + 0.05 + 0.02 + 2 * 0.03 + 0.001 * len(d.x)
    assert budget.seconds * (1 - 1e-9) <= budget.spent < budget.seconds + step
    if name == "plain":
        assert extra == 0 and not seen.scored_rows and c["offered"] == 0
    elif name in ("cached", "stale", "two_stage"):
        assert c["chosen"] and c["chosen"] % len(d.x) == 0 and c["remembered"] >= len(seen.trained_rows)
        assert sum(uncharged) < (learn.epoch + 1) * len(d.x) - 32
    else:
        assert (
            c["chosen"] == c["remembered"] == 0 and c["observed"] == 5 and c["offered"] == len(uncharged)
        )  # the first epoch trains on everything
    if name == "cached":
        assert c["fp"] == 0 and learn.epoch > 5


def test_a_choice_is_charged_where_one_was_made():
    "Not in the first epoch, and not in the last ones, which are whole"
    budget = budgets.Budget(1e9, COSTS, examples=1600)
    learn, _ = fit(dict(score="cached", start=0.2, end=0.7), budget)
    short = (learn.sb.log.loads < learn.sb.log.candidates).sum()
    assert budget.counts["chosen"] == short * 160 and 0 < short < len(learn.sb.log)


@pytest.mark.parametrize("name", METHODS)
def test_schedules_follow_the_budget(name):
    budget = budgets.Budget(20.0, COSTS)
    learn, seen = fit(METHODS[name], budget)
    pcts = seen.pcts[1:]  # the first comes before fastai has set it
    assert all(a <= b + 1e-12 for a, b in zip(pcts, pcts[1:])) and 0 < pcts[0] < 0.2
    assert learn.pct_train == pytest.approx(1, abs=1e-5)
    top = int(np.argmax(seen.lrs))
    assert 0.15 < top / len(seen.lrs) < 0.5 and max(seen.lrs) > 0.08
    assert seen.lrs[0] == pytest.approx(0.1 / 25)
    last = [p for p in seen.pcts if p < 1][-1]
    assert last > 0.85 and seen.lrs[-1] < 0.1 * 0.06  # what cosine annealing leaves at the last step
    assert min(seen.lrs[top:]) == seen.lrs[-1]


def test_a_fixed_number_of_examples():
    budget = budgets.Budget(1e9, COSTS, examples=400)
    _, seen = fit(dict(exact=True), budget)
    assert sum(seen.trained_rows[:-1]) < 400 <= sum(seen.trained_rows) == budget.trained


@pytest.mark.parametrize("name", METHODS)
def test_the_learner_is_left_clean(name):
    d, kw = task(), METHODS[name]
    budget = budgets.Budget(7.7, COSTS)
    learn, seen = fit(kw, budget, d)
    dl, metrics = learn.dls.train, list(learn.metrics)
    assert "get_idxs" not in vars(dl) and len(dl) == 5 and dl.n == 160 and not metrics
    assert not [cb for cb in learn.cbs if isinstance(cb, (budgets.Budget, Count))] and "all_batches" not in vars(learn)
    with learn.no_bar(), learn.no_logging():
        learn.remove_cb(SelectiveBackpropCallback)
        spy = Spy()
        learn.fit(2, 0.01, cbs=spy)
    assert sum(len(y[0]) for _, y in spy.batches) == 320 and spy.pcts[-1] == pytest.approx(1 - 1 / 10)
    assert np.isfinite(learn.recorder.values[-1][1])


def test_every_callback_has_finished_with_the_last_batch():
    budget = budgets.Budget(7.7, COSTS)
    learn, seen = fit(None, budget)
    assert (
        len(learn.recorder.losses) == len(learn.recorder.lrs) == len(seen.trained_rows) == len(learn.recorder.hps["lr"])
    )


def test_what_was_spent_before_counts():
    before = dict(prices.no_counts(), steps={32: 3}, loads=96)
    budget = budgets.Budget(20.0, COSTS, counts=before)
    _, seen = fit(None, budget)
    assert budget.spent == pytest.approx(3 + 0.96 + sum(1.0 + 0.32 for _ in seen.trained_rows))
    assert seen.lrs[0] == pytest.approx(0.1 / 25) and 20 <= budget.spent < 21.4
    assert before["steps"] == {32: 3}, "what is passed is not changed"
    with pytest.raises(ValueError, match="nothing is left of seconds=2"):
        budgets.Budget(2.0, COSTS, counts=before)


def test_a_learning_rate_search_is_not_limited():
    learn = task().learner()
    learn.add_cb(budgets.Budget(0.5, COSTS))
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=8, show_plot=False, stop_div=False)
    assert len(learn.recorder.lrs) == 8


def test_train_seconds():
    rows = [4, 8, 12, 16, 24, 32, 40]
    assert prices.train_seconds(COSTS, rows) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2])
    noisy = dict(train={"8": 0.7, "16": 0.6, "32": 1.0})  # fewer rows never cost more
    assert prices.train_seconds(noisy, [8, 16, 24]) == pytest.approx([0.7, 0.7, 0.85])
    steep = dict(train={"8": 0.1, "16": 0.4})  # a straight line would go below nothing
    assert prices.train_seconds(steep, [2, 4, 8]) == pytest.approx([0.025, 0.05, 0.1])
    assert prices.train_seconds(dict(train={"8": 0.4}), [4, 16]) == pytest.approx([0.2, 0.8])


def test_epoch_seconds_is_what_plain_training_costs():
    for items in (160, 170, 161):  # 161: a last batch of one row is left out
        d = task(items)
        budget = budgets.Budget(2 * prices.epoch_seconds(COSTS, items, 32), COSTS)
        learn, _ = fit(None, budget, d)
        assert (
            budget.spent == pytest.approx(budget.seconds)
            and learn.epoch == 1
            and budget.counts["loads"] == 2 * (items - (items == 161))
        )


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(seconds=0), "seconds=0 must be above 0"),
        (dict(seconds=-1), "seconds=-1"),
        (dict(examples=0), "examples must be a whole number of at least 1"),
        (dict(costs=dict(train={"8": 1.0})), "no 'score' in it"),
        (dict(costs=dict(COSTS, train={"8": 0.0})), "must cost something"),
        (dict(counts=dict(steps={})), "no 'scorer' in it"),
    ],
)
def test_wrong_budgets(kw, says):
    with pytest.raises(ValueError, match=says):
        budgets.Budget(**{**dict(seconds=1.0, costs=COSTS), **kw})


def test_a_scorer_without_a_price():
    with pytest.raises(
        ValueError, match=r"no price of Scorer\(precision='bf16'\), only of Scorer\(\), Scorer\(size=0.5\)"
    ):
        fit(dict(score=Scorer(precision="bf16")), budgets.Budget(10.0, COSTS))


def test_measured_prices():
    d = task()
    proxy = Proxy(tasks.small_resnet(1, 10, 4), every=2)
    c = prices.measure_costs(d.dls(), d.model(), "fp32", (Scorer(), proxy, contestants.Doubtful(0.4)), reps=2)
    assert list(c["train"]) == ["8", "16", "32"] and set(c) == set(COSTS)
    assert set(c["score"]) == {
        "Scorer()",
        prices.price_name(proxy),
        "Doubtful(share=0.4)",
    } and "parameters" in prices.price_name(proxy)
    assert all(v > 0 for v in c["train"].values()) and all(
        c[k] > 0 for k in ("load", "select", "observe", "remember", "choose")
    )
    assert all(v["item"] > 0 for v in c["score"].values())
    assert [v["learn"] > 0 for v in c["score"].values()] == [False, True, False]
    with pytest.raises(ValueError, match="20 training images do not fill a batch of bs=32"):
        prices.measure_costs(d.dls(range(20)), d.model())


def test_validating_leaves_no_trace():
    learn = task().learner()
    learn.model.train()
    state = everything(learn.model)
    loss, acc = budgets.evaluate(learn)
    assert same(state, everything(learn.model))
    learn.model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = [(learn.model(x).float(), y) for x, y in learn.dls.valid]
    pred, y = (torch.cat([o[i] for o in out]).as_subclass(torch.Tensor) for i in (0, 1))
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(pred, y).item(), rel=1e-4)
    assert acc == pytest.approx((pred.argmax(1) == y).float().mean().item())


# runs


def test_each_method_runs_and_they_are_pairs(capsys):
    "Every method of the table: the same initial weights, the budget kept to, and recomputable from its line"
    config = dict(tasks.configuration(items=320, **SMALL), augment=True, flip=True)  # for who flips by visits
    d = tasks.Task(config, 0, "cpu")
    scorers = [s for m in contestants.methods if (s := contestants.method_settings(m, d)[1]) is not None]
    costs = dict(
        COSTS,
        score={prices.price_name(s): dict(item=0.004, learn=0.01 if s.learns else 0.0) for s in scorers},
        small={f"{size:g}": size**2 for m in contestants.methods for size in contestants.sizes_of(m)},
    )
    lines = {}
    for m in contestants.methods:
        r = json.loads(json.dumps(bench_runs.run(config, m, 0, 3, costs, "cpu")))
        lines[m] = r
        assert r["budget_s"] * 0.999999 <= r["spent_s"] < r["budget_s"] + 2.0, m
        assert prices.spent(r["counts"], costs) == pytest.approx(r["spent_s"]), m
        assert (
            r["curve"][-1][2:] == [r["loss"], r["accuracy"]]
            and r["curve"][-1][0] == r["spent_s"]
            and len(r["curve"]) <= 8
        ), m
        assert [c[0] for c in r["curve"]] == sorted({c[0] for c in r["curve"]})
        assert set(r["versions"]) and set(r["machine"]) and r["wall_s"] > 0
    assert len({r["init"] for r in lines.values()}) == 1
    assert bench_runs.run(config, "plain", 1, 1, costs, "cpu")["init"] != lines["plain"]["init"]
    assert (
        lines["plain"]["kept"] == lines["plain"]["loaded"] == 1
        and lines["plain"]["scored"] == 0
        and lines["plain"]["epochs"] == 3
    )
    assert lines["random"]["scored"] == 0 and lines["random"]["loaded"] < 0.8
    assert lines["random_scores"]["scored"] == 0 and lines["random_scores"]["settings"] == dict(
        selector="RandomScores(keep=0.5)"
    )
    assert lines["rho"]["counts"]["fp"] > 288 and lines["rho"]["loaded"] == 1 and lines["rho"]["scored"] > 0.5
    assert "UserWarning" not in capsys.readouterr().err


@pytest.mark.parametrize("method", ["plain_flips", "default_flips"])
def test_flips_by_visits_need_flips(method):
    with pytest.raises(ValueError, match=f"{method} flips images by visits, but these are not to be flipped"):
        contestants.check_method(method, task())


def test_what_is_held_out():
    "A tenth is not trained on; the model that was trained on it, and its pass over the others, are charged"
    d = task(items=320)
    trained = []
    learner = d.learner
    d.learner = lambda items: trained.append(items) or learner(items)
    selector, rest, counts = contestants.HeldOut(keep=0.5, share=0.1).prepare(d, 60.0, COSTS)
    assert (
        len(rest) == len(selector.irreducible) == 288
        and len(trained[0]) == 32
        and set(trained[0]) | set(rest) == set(range(320))
    )
    assert (
        counts["fp"] == 288
        and counts["steps"] == {32: counts["loads"] // 32}
        and 6 <= prices.spent(dict(counts, fp=0), COSTS) < 6 + 1.32
    )
    learn = learner(rest)
    learn.selective_backprop(**fresh(selector=selector, batching="prune"))
    budget = budgets.Budget(60.0, COSTS, counts=counts)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(budgets.endless, 0.1, cbs=budget)
    assert 60 <= budget.spent < 62 and budget.counts["fp"] > 288 and counts["fp"] == 288


def test_two_halves_that_judge_each_other():
    "Irreducible losses are of the model that did not train on the item; all items are trained on, nothing is charged"
    d = task(items=320, precision="fp32")
    made, learner = [], d.learner
    d.learner = lambda items: made.append((items, learner(items))) or made[-1][1]
    selector, rest, counts = contestants.CrossFitted(keep=0.5).prepare(d, 30.0, COSTS)
    (a, first), (b, second) = made
    assert rest is None and counts is None and len(a) == len(b) == 160 and sorted([*a, *b]) == list(range(320))
    for items, learn in ((b, first), (a, second)):
        with torch.no_grad():
            batches = list(d.dls(items).train.new(shuffle=False, drop_last=False))
            x, y = (torch.cat([b[i].as_subclass(torch.Tensor) for b in batches]) for i in (0, 1))
            ref = torch.nn.functional.cross_entropy(learn.model.eval()(x), y, reduction="none")
        assert torch.allclose(selector.irreducible[items], ref, atol=1e-4)
    r = bench_runs.run(tasks.configuration(items=320, **SMALL), "rho_free", 0, 3, COSTS, "cpu")
    assert r["items"] == 320 and r["loaded"] == 1 and r["settings"]["selector"] == "CrossFitted(keep=0.5)"
    assert r["counts"]["fp"] == r["counts"]["loads"] - 320 and prices.spent(r["counts"], COSTS) == pytest.approx(
        r["spent_s"]
    )


def test_the_same_run_again_is_the_same():
    config = tasks.configuration(items=160, **SMALL, noise=0.1)
    a, b = (bench_runs.run(config, "cached", 3, 2, COSTS, "cpu") for _ in range(2))
    assert [a[k] for k in ("accuracy", "loss", "counts", "curve", "init")] == [
        b[k] for k in ("accuracy", "loss", "counts", "curve", "init")
    ]


def test_random_scores_are_random_and_their_own():
    state, losses = torch.get_rng_state(), torch.arange(64.0)
    a, again = contestants.RandomScores(0.5), contestants.RandomScores(0.5)
    first, second = a.measure(losses), a.measure(losses)
    assert (
        (first != second).all()
        and torch.equal(again.measure(losses), first)
        and torch.equal(state, torch.get_rng_state())
    )
    assert torch.equal(a.select(first).idx.sort().values, first.topk(32).indices.sort().values)  # as remembered


def test_batchnorm_statistics_of_all_candidates():
    "In between stand training steps, which the statistics forget; scores are those of training mode"
    model, alone, g = (
        torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)),
        torch.nn.BatchNorm1d(3),
        torch.Generator().manual_seed(0),
    )
    scorer, loss = contestants.BatchNormOfAll(), torch.nn.CrossEntropyLoss()
    for i in range(4):
        x, y = torch.randn(8, 3, generator=g) + i, torch.arange(8) % 2
        scores, *_ = scorer((x, y), model, loss)
        ref = torch.nn.functional.cross_entropy(model[1](alone(x)), y, reduction="none")
        assert (
            torch.allclose(scores, ref, atol=1e-6)
            and all(m.training for m in model.modules())
            and not scores.requires_grad
        )
        assert torch.equal(model[0].running_mean, alone.running_mean) and torch.equal(
            model[0].running_var, alone.running_var
        )
        model(x[:4] + 9)  # a training step
        assert not torch.equal(model[0].running_mean, alone.running_mean)


def test_a_method_is_one_line(monkeypatch):
    monkeypatch.setitem(contestants.methods, "mine", lambda d: dict(beta=3.0, lr_times=0.5))
    d = task()
    kw, scorer, times = contestants.method_settings("mine", d)
    assert kw == dict(beta=3.0) and prices.price_name(scorer) == "Scorer()" and times == 0.5
    assert contestants.settings_of("mine", d) == dict(beta=3.0, lr_times=0.5)
    lrs = []

    class Rates(budgets.Curve):
        def after_batch(self):
            super().after_batch()
            lrs.append(self.opt.hypers[-1]["lr"])

    monkeypatch.setattr(bench_runs, "Curve", Rates)
    bench_runs.run(d.config, "mine", 0, 2, COSTS, "cpu")
    assert 0.03 < max(lrs) <= 0.05


def test_wrong_labels():
    y = np.arange(1000) % 10
    for share in (0, 0.1, 0.25, 1):
        z = tasks.wrong_labels(y, share, 10, seed=1)
        assert (z != y).sum() == 1000 * share and z.min() >= 0 and z.max() <= 9
    z = tasks.wrong_labels(y, 1, 10, seed=1)
    assert (
        stats.chisquare(np.bincount((z - y) % 10, minlength=10)[1:]).pvalue > 0.01
    )  # uniform over the other nine classes
    assert (y == np.arange(1000) % 10).all()
    with pytest.raises(ValueError, match="at least 2 classes"):
        tasks.wrong_labels(y * 0, 0.1, 1, seed=1)


def test_wrong_labels_are_in_the_training_set_only():
    clean, noisy, other = task(), task(noise=0.25), task(noise=0.25, seed=1)
    assert (noisy.y != clean.y).sum() == 40 and (clean.yt == noisy.yt).all() and (clean.x == noisy.x).all()
    assert (noisy.y != other.y).any() and (task(noise=0.25).y == noisy.y).all()
    assert (noisy.dls().valid.dataset.y.numpy() == clean.yt).all() and (
        noisy.dls().train.dataset.y.numpy() == noisy.y
    ).all()
    assert noisy.n_out == noisy.dls().c == 10


def npz(**more):
    rng = np.random.default_rng(0)
    x = lambda n: rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    np.savez("a.npz", x_train=x(96), y_train=np.arange(96) % 3, x_test=x(30), y_test=np.arange(30) % 3, **more)
    tasks.arrays.cache_clear()


def test_other_labels():
    npz(worse=(np.arange(96) + 1) % 3, short=np.zeros(5, int))
    config = tasks.configuration(data="a.npz", labels="worse", **SMALL)
    d = tasks.Task(config, 0, "cpu", data="a.npz")
    assert (
        (d.y == (np.arange(96) + 1) % 3).all()
        and (d.yt == np.arange(30) % 3).all()
        and config["data"] == "a.npz"
        and config["augment"]
    )
    assert config["checksum"] != tasks.configuration(data="a.npz", **SMALL)["checksum"]
    with pytest.raises(ValueError, match="no 'best' among the arrays of a.npz"):
        tasks.configuration(data="a.npz", labels="best", **SMALL)
    with pytest.raises(ValueError, match="'short' must be 96 integers"):
        tasks.configuration(data="a.npz", labels="short", **SMALL)


def test_the_items_are_those_of_a_fixed_permutation():
    few, more = task(items=64), task(items=128)
    assert (more.x[:64] == few.x).all() and len(few.x) == 64


# the file

GRID = dict(**SMALL, items=96, budgets="1,2", seeds=2, methods="sb", device="cpu", out="o.jsonl")


def lines(name="o.jsonl"):
    return [json.loads(line) for line in open(name)]


def test_resumable(capsys, monkeypatch):
    assert bench_runs.equal_time(**GRID) == 8
    first = capsys.readouterr().out
    runs = [r for r in lines() if r["kind"] == "run"]
    # all seeds and methods of a budget come before the next budget
    assert [(r["budget"], r["seed"], r["method"]) for r in runs] == [
        (b, s, m) for b in (1, 2) for s in (0, 1) for m in ("plain", "sb")
    ]
    assert "[8/8]" in first and "to go" in first and [r["kind"] for r in lines()].count("costs") == 1
    before = open("o.jsonl").read()
    monkeypatch.setattr(bench_runs, "run", None)  # nothing may run any more
    monkeypatch.setattr(bench_runs, "measure_costs", None)
    assert bench_runs.equal_time(**GRID) == 0 and open("o.jsonl").read() == before
    assert "8 runs, 8 of them done already" in capsys.readouterr().out


def test_what_is_new_is_run(capsys):
    bench_runs.equal_time(**{**GRID, "budgets": "1", "seeds": 1})
    assert bench_runs.equal_time(**{**GRID, "budgets": "1,1.5", "seeds": 1}) == 2
    assert bench_runs.equal_time(**{**GRID, "budgets": "1", "seeds": 2}) == 2
    assert bench_runs.equal_time(**{**GRID, "budgets": "1", "seeds": 1, "lr": 0.05}) == 2
    assert bench_runs.equal_time(**{**GRID, "budgets": "1", "seeds": 1, "methods": "sb,cached"}) == 1
    costs = [r for r in lines() if r["kind"] == "costs"]
    assert len(costs) == 1  # prices do not depend on the learning rate, and cached asks for the same
    bench_runs.equal_time(**{**GRID, "budgets": "1", "seeds": 1, "methods": "topk_half_50"})
    costs = [r["costs"] for r in lines() if r["kind"] == "costs"]
    assert len(costs) == 2 and set(costs[1]["score"]) == {"Scorer()", "Scorer(size=0.5)"}
    assert {**costs[1], "score": 0} == {**costs[0], "score": 0} and costs[1]["score"]["Scorer()"] == costs[0]["score"][
        "Scorer()"
    ]


def test_a_broken_line_is_told_of_and_done_again(capsys):
    grid = {**GRID, "budgets": "1", "seeds": 1}
    bench_runs.equal_time(**grid)
    text = open("o.jsonl").read()
    open("o.jsonl", "w").write(text[:-200])  # as if a write had been cut off
    capsys.readouterr()
    assert bench_runs.equal_time(**grid) == 1
    assert "o.jsonl: line 3 is broken" in capsys.readouterr().out
    good = [r for r in bench_runs.read_lines("o.jsonl") if r["kind"] == "run"]
    assert [r["method"] for r in good] == ["plain", "sb"] and len(open("o.jsonl").read().splitlines()) == 4
    assert len(bench_runs.load_runs("o.jsonl")) == 2


def test_two_processes(capsys):
    assert bench_runs.equal_time(**{**GRID, "budgets": "1", "seeds": 1, "jobs": 2}) == 2
    par = {r["method"]: r for r in lines() if r["kind"] == "run"}
    costs = next(r["costs"] for r in lines() if r["kind"] == "costs")
    alone = bench_runs.run(par["sb"]["config"], "sb", 0, 1, costs, "cpu")
    assert (alone["init"], alone["counts"]["loads"]) == (par["sb"]["init"], par["sb"]["counts"]["loads"])
    assert alone["loss"] == pytest.approx(par["sb"]["loss"], rel=1e-3) and par["sb"]["machine"]["threads"] == 1


def test_the_papers_protocol():
    bench_runs.equal_time(**{**GRID, "budgets": "4", "seeds": 1, "methods": None, "protocol": "paper"})
    runs = {r["method"]: r for r in lines() if r["kind"] == "run"}
    assert list(runs) == contestants.usual["paper"]
    assert runs["plain"]["epochs"] == 4 and len(runs["plain"]["curve"]) == 4  # validated after each epoch
    for r in runs.values():
        trained = sum(int(k) * n for k, n in r["counts"]["steps"].items())
        assert 4 * 96 <= trained < 4 * 96 + 32
    assert runs["sb_beta3_stale"]["epochs"] > runs["sb"]["epochs"] > 5


def test_the_papers_schedule(monkeypatch):
    seen = []

    class Rates(budgets.Curve):
        def after_batch(self):
            super().after_batch()
            seen.append((self.learn.budget.trained, self.opt.hypers[-1]["lr"]))

    monkeypatch.setattr(bench_runs, "Curve", Rates)
    d = task(items=320, protocol="paper")
    bench_runs.run(d.config, "plain", 0, 10, COSTS, "cpu")
    at = {n: lr for n, lr in seen}
    for n, lr in at.items():  # n rows have been trained on after the step with this rate
        begun = (n - 32) / 3200
        assert lr == pytest.approx(0.1 * 0.2 ** ((begun >= 0.3) + (begun >= 0.6) + (begun >= 0.8))), n
    assert len(set(at.values())) == 4


@pytest.mark.parametrize(
    "args,says",
    [
        (["--methods", "plain,magic"], "methods must be names among plain, default, random,"),
        (["--methods", ","], "methods must be names among plain,"),
        (["--budgets", "3,x"], "budgets must be positive numbers, separated by commas, not '3,x'"),
        (["--budgets", "0"], "budgets must be positive"),
        (["--budgets", "inf"], "budgets must be positive"),
        (["--seeds", "0"], "seeds must be a whole number of at least 1, not 0"),
        (["--jobs", "0"], "jobs must be"),
        (["--threads", "0"], "threads must be"),
        (["--noise", "1.5"], "noise=1.5 must be between 0 and 1"),
        (["--lr", "0"], "lr=0 would train nothing"),
        (["--wd", "-1"], "wd=-1.0"),
        (["--momentum", "2"], "momentum=2.0"),
        (["--model", "vgg"], "model must be one of small"),
        (["--model", "resnet18", "--width", "8"], "width=8 is for model='small'"),
        (["--width", "0"], "width must be"),
        (["--precision", "fp8"], "precision must be one of fp32, bf16, not 'fp8'"),
        (["--protocol", "other"], "protocol must be one of equal_time, paper, not 'other'"),
        (["--bs", "1"], "bs must be a whole number of at least 2"),
        (["--bs", "5000"], "bs=5000 is more than the 1437 training images"),
        (["--items", "5"], "items must be a whole number of at least 128"),
        (["--items", "5000"], "items must be at most 1437"),
        (["--labels", "worse"], "labels='worse' is the name of an array in an .npz file: pass data"),
        (["--data", "none.npz"], "none.npz: no such file"),
        (["--dataset", "mnist"], "dataset must be one of digits"),
        (["--device", "tpu"], "device must be cpu or cuda"),
        (["--out", "no/such.jsonl"], "no folder 'no'"),
        (["--out", "."], "is a folder"),
    ],
)
def test_faults(args, says, capsys, tmp_path):
    faulty("equal_time", args, says, capsys, tmp_path)


def faulty(name, args, says, capsys, tmp_path):
    "The command ends with one sentence, and has written nothing"
    with pytest.raises(SystemExit) as e:
        command.main([name, "--out", "o.jsonl", *args])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert says in err and err.startswith("fastsb.bench: ") and err.count("\n") == 1 and err.endswith(".\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args,says",
    [(["--files", "none.jsonl"], "there is no file 'none.jsonl'"), (["--files", "empty.jsonl"], "no finished run")],
)
def test_faults_of_the_report(args, says, capsys):
    open("empty.jsonl", "w").write(json.dumps(dict(kind="costs")) + "\n")
    with pytest.raises(SystemExit) as e:
        command.main(["report", *args])
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_noise_and_labels_together():
    npz(worse=np.arange(96) % 3)
    with pytest.raises(ValueError, match="pass one of them"):
        tasks.configuration(data="a.npz", labels="worse", noise=0.1, **SMALL)


# statistics


def line(method, budget, seed, accuracy, protocol="equal_time", noise=0.0, curve=None, loss=0.5):
    config = dict(tasks.configuration(**SMALL), protocol=protocol, noise=noise)
    curve = curve or [[budget, budget, loss, accuracy]]
    return dict(kind="run", config=config, method=method, settings=None, seed=seed, budget=float(budget),
                budget_s=float(budget), spent_s=2.0 * budget, wall_s=3.0 * budget, accuracy=accuracy, loss=loss,
                epochs=budget, kept=0.5, scored=1.0, loaded=1.0, curve=curve)  # fmt: skip


PLAIN = {3: [0.70, 0.72, 0.71], 6: [0.80, 0.81, 0.79], 12: [0.85, 0.86, 0.84]}
FAST = {3: [0.75, 0.77, 0.76], 6: [0.83, 0.84, 0.82], 12: [0.86, 0.87, 0.85]}


def synthetic():
    return [
        line(m, b, s, a)
        for m, accs in (("plain", PLAIN), ("fast", FAST))
        for b, xs in accs.items()
        for s, a in enumerate(xs)
    ]


def test_tables_of_known_runs():
    df = bench_runs.runs_table(synthetic())
    t = tables.equal_time_table(df).set_index(["budget", "method"])
    row = t.loc[(6, "fast")]
    assert (
        row["accuracy"] == pytest.approx(83)
        and row["to plain"] == pytest.approx(3)
        and row["to plain ±"] == pytest.approx(0, abs=1e-9)
    )
    assert (
        row["accuracy ±"] == pytest.approx(stats.t.ppf(0.975, 2) * 1 / 3**0.5, abs=1e-3)
        and row["seeds"] == 3
        and row["wall/ref"] == 1.5
    )
    assert math.isnan(t.loc[(6, "plain")]["to plain"])
    assert set(tables.equal_time_table(df, budget=3).budget) == {3}


def test_differences_are_by_seed():
    runs = [line("plain", 3, s, a) for s, a in enumerate([0.5, 0.6, 0.9])] + [
        line("m", 3, s, a) for s, a in [(2, 0.91), (0, 0.52), (7, 0.1)]
    ]
    row = tables.equal_time_table(bench_runs.runs_table(runs)).set_index("method").loc["m"]
    d = [2.0, 1.0]  # of seeds 0 and 2
    assert (
        row["to plain"] == pytest.approx(1.5)
        and row["to plain ±"] == pytest.approx(intervals.t_interval(d)[1], abs=1e-3)
        and row["seeds"] == 3
    )


def test_time_to_plain():
    t = tables.time_to_plain(bench_runs.runs_table(synthetic())).set_index("plain budget")
    assert t.loc[6]["ratio"] == pytest.approx(3 * 2 ** (4 / 7) / 6)  # 80 %, between 76 % at 3 and 83 % at 6
    assert t.loc[12]["ratio"] == pytest.approx(6 * 2 ** (2 / 3) / 12)  # 85 %, between 83 % at 6 and 86 % at 12
    assert t.loc[3]["ratio"] == 0 and t.loc[3]["time to plain"] == "< 1.00" and t.loc[3]["verdict"] == "faster"
    for b in (6, 12):
        assert t.loc[b]["low"] <= t.loc[b]["ratio"] <= t.loc[b]["high"] < 1 and t.loc[b]["seeds"] == 3
        assert t.loc[b]["verdict"] == "faster"
    slow = [dict(r, accuracy=r["accuracy"] - 0.2) if r["method"] == "fast" else r for r in synthetic()]
    t = tables.time_to_plain(bench_runs.runs_table(slow)).set_index("plain budget")
    assert t.loc[12]["ratio"] == math.inf and t.loc[12]["time to plain"] == "> 1.00" and t.loc[12]["95 %"] == "> 1.00"
    assert t.loc[12]["verdict"] == "slower" and t.loc[3]["verdict"] == "slower"
    short = [r for r in synthetic() if r["method"] == "plain" or r["budget"] < 12 and r["seed"] == 0]
    t = tables.time_to_plain(bench_runs.runs_table(short)).set_index("plain budget")
    # up to half of the time it was tried; one seed has no interval, and so nothing is said of it
    assert t.loc[12]["time to plain"] == "> 0.50" and t.loc[12]["95 %"] == "" and t.loc[12]["verdict"] == ""


def test_a_verdict_needs_its_interval():
    "The same mean lead, once with little scatter and once with much"
    for scatter, says in ((0.002, "ahead"), (0.02, "–")):
        runs = [line("plain", 6, s, 0.8) for s in range(3)]
        runs += [line("fast", 6, s, 0.81 + scatter * (s - 1)) for s in range(3)]
        t = tables.equal_time_table(bench_runs.runs_table(runs)).set_index("method")
        assert t.loc["fast"]["verdict"] == says and t.loc["plain"]["verdict"] == ""
        assert t.loc["fast"]["to plain"] == pytest.approx(1)
    t = tables.equal_time_table(bench_runs.runs_table([line(m, 6, 0, 0.8) for m in ("plain", "fast")]))
    assert t.set_index("method").loc["fast"]["verdict"] == ""  # one seed says nothing


def test_incomplete_grids():
    """Where a budget lacks a seed the others answer, if only with it the answer lies between two budgets; there is no
    row without seeds in common with plain, or for a single budget"""
    runs = [r for r in synthetic() if not (r["method"] == "fast" and r["budget"] == 12 and r["seed"] == 1)]
    runs += [line("odd", b, 9, 0.9) for b in (3, 6)] + [line("once", 6, s, 0.9) for s in (0, 1)]
    t = tables.time_to_plain(bench_runs.runs_table(runs)).set_index(["method", "plain budget"])
    two = tables.time_to_plain(bench_runs.runs_table([r for r in synthetic() if r["seed"] != 1]))
    two = two.set_index("plain budget").loc[12]
    assert t.loc[("fast", 12)][["ratio", "low", "high", "seeds"]].equals(two[["ratio", "low", "high", "seeds"]])
    assert two["seeds"] == 2 and two["ratio"] == pytest.approx(6 * 2 ** (2 / 3) / 12)
    assert t.loc[("fast", 6)]["ratio"] == pytest.approx(3 * 2 ** (4 / 7) / 6) and t.loc[("fast", 6)]["seeds"] == 3
    assert set(t.index.get_level_values(0)) == {"fast"}


def test_what_a_lead_is_worth():
    lucky = [line("lucky", 6, 0, 0.99)]  # one pair is not compared with three
    t = tables.lead_table(bench_runs.runs_table(synthetic() + lucky)).set_index("plain budget")
    assert list(t.index) == [6, 12] and list(t.best) == ["fast"] * 2 and list(t.seeds) == [3, 3]
    assert t.loc[6]["lead"] == pytest.approx(3) and t.loc[6]["a doubling brings plain"] == pytest.approx(9)
    assert t.loc[12]["share of the time"] == pytest.approx(2 ** (-1 / 5), abs=1e-3)
    wide = [r for r in synthetic() if r["budget"] != 6]  # two doublings
    assert tables.lead_table(bench_runs.runs_table(wide)).loc[0, "a doubling brings plain"] == pytest.approx(7)
    assert tables.lead_table(bench_runs.runs_table([r for r in synthetic() if r["budget"] == 6])).empty
    flat = [dict(r, accuracy=0.8) for r in synthetic()]
    assert tables.lead_table(bench_runs.runs_table(flat))["share of the time"].isna().all()


def test_noise_table():
    runs = synthetic() + [
        line(m, 6, s, a, noise=0.2)
        for m, xs in (("plain", [0.6, 0.62]), ("fast", [0.58, 0.59]))
        for s, a in enumerate(xs)
    ]
    t = tables.noise_table(bench_runs.runs_table(runs)).set_index("method")
    assert list(t.columns[-2:]) == ["0% wrong", "20% wrong"] and set(t.budget) == {6}
    mean, half = intervals.t_interval([-2.0, -3.0])
    assert t.loc["fast"]["20% wrong"] == f"58.50 ± {intervals.t_interval([58, 59])[1]:.2f} ({mean:+.2f} ± {half:.2f})"
    assert t.loc["plain"]["20% wrong"].startswith("61.00 ±") and "(" not in t.loc["plain"]["20% wrong"]
    assert tables.noise_table(bench_runs.runs_table(synthetic())).empty


def test_paper_table():
    curve = lambda *accs: [[10.0 * (i + 1), i + 1, 0.5, a] for i, a in enumerate(accs)]
    runs = [
        line("plain", 4, s, 0.9, "paper", curve=curve(0.5, 0.8, 0.86, 0.9)) for s in (0, 1)
    ]  # errors .5 .2 .14 .1; target .14, at 30 s
    runs += [
        line("sb", 4, 0, 0.92, "paper", curve=curve(0.6, 0.87, 0.9, 0.92)),
        line("sb", 4, 1, 0.8, "paper", curve=curve(0.5, 0.6, 0.7, 0.8)),
    ]
    t = tables.paper_table(bench_runs.runs_table(runs)).set_index("method")
    assert (
        t.loc["plain"]["seconds to 1.4x"] == 30
        and t.loc["plain"]["times faster"] == 1
        and t.loc["plain"]["reached"] == "2 of 2"
    )
    assert (
        t.loc["sb"]["seconds to 1.4x"] == 20
        and t.loc["sb"]["times faster"] == 1.5
        and t.loc["sb"]["reached"] == "1 of 2"
    )
    assert t.loc["sb"]["final error, %"] == pytest.approx(14)
    assert (
        tables.equal_time_table(bench_runs.runs_table(runs)).empty
        and tables.time_to_plain(bench_runs.runs_table(runs)).empty
    )


def test_report(capsys, tmp_path):
    extra = [line(m, 6, s, 0.5, noise=0.2) for m in ("plain", "fast") for s in (0, 1)]
    extra += [line(m, 4, 0, 0.9, "paper") for m in ("plain", "sb")]
    for i, part in enumerate((synthetic(), extra)):
        for r in part:
            bench_runs.append_line(f"part{i}.jsonl", r)
    (tmp_path / "rep").mkdir()
    # an earlier report's plot goes, what is someone else's stays
    for old in ("equal_time_3.png", "equal_time_mine.png"):
        (tmp_path / "rep" / old).touch()
    command.main(["report", "--files", "part*.jsonl", "--out", "rep"])
    pictures = {"equal_time_1.png", "equal_time_2.png"}  # curves, and shares of the time
    assert {f.name for f in (tmp_path / "rep").iterdir()} == {"report.md", "equal_time_mine.png", *pictures}
    text = (tmp_path / "rep" / "report.md").read_text()
    assert "What the best lead is worth" in text
    for part in (
        "| fast | 83 |",
        "## digits, small 4",
        "Budget: 12 epochs",
        "< 1.00",
        "## Wrong labels",
        "## The paper's protocol",
        "(equal_time_1.png)",
    ):
        assert part in text, part
    assert (
        text.count("| fast |") == 4 + 3 + 2 + 1
    )  # four tables of a budget, three times to plain's accuracy, two leads, a table of labels
    assert "24 runs" in capsys.readouterr().out and str(tmp_path) not in text


def test_plot():
    df = bench_runs.runs_table(synthetic())
    ax = pictures.plot_equal_time(df)
    y = ax.containers[1].lines[0].get_ydata()
    assert list(y) == pytest.approx([76, 83, 86]) and [t.get_text() for t in ax.get_xticklabels()] == ["3", "6", "12"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain", "fast"]
    with pytest.raises(ValueError, match="what must be accuracy or loss"):
        pictures.plot_equal_time(df, what="f1")
    with pytest.raises(ValueError, match="there is no 'x' among the runs"):
        pictures.plot_equal_time(df, setting="x")
    pictures.plt.close("all")


def test_the_command_is_listed(capsys):
    command.main(["--help"])
    out = capsys.readouterr().out
    assert "equal_time" in out and "report" in out


# numbers instead of classes


@pytest.mark.parametrize(
    "args,says",
    [
        (["--epochs", "0"], "epochs must be a whole number of at least 1, not 0"),
        (["--seeds", "0"], "seeds must be a whole number of at least 1, not 0"),
        (["--threads", "0"], "threads must be a whole number of at least 1, not 0"),
        (["--lr", "0"], "lr=0.0 must be above 0"),
        (["--noise", "a"], "noise must be numbers from 0 to 1, separated by commas, not 'a'"),
        (["--noise", "0,1.5"], "noise=1.5 must be between 0 and 1"),
        (["--out", "."], "is a folder"),
    ],
)
def test_faults_of_regression(args, says, capsys, tmp_path):
    faulty("regression", args, says, capsys, tmp_path)


def test_regression_trains_on_as_many_examples(monkeypatch, capsys):
    "Whatever is left out: the budgets are equal, wrong targets are in training alone, and the error is of right ones"
    fits, fit = [], regression.fit_cycle

    def spy(learn, cbs, lr):
        wrong = torch.tensor(learn.dls.train.dataset.tensors[1] != numbers(0)).float().mean().item()
        right = torch.equal(learn.dls.valid.dataset.tensors[1], numbers(2))
        fit(learn, cbs, lr)
        fits.append(
            (
                cbs[0].trained,
                learn.sb.counts["bp"] / learn.sb.counts["candidates"] if hasattr(learn, "sb") else 1.0,
                wrong,
                right,
                learn,
            )
        )

    def numbers(i):
        return torch.tensor(tasks.load_arrays("digits")[i + 1 if i else 1])[:, None] / 4.5 - 1

    monkeypatch.setattr(regression, "fit_cycle", spy)
    command.main("regression --epochs 4 --seeds 1 --noise 0,0.25 --out r.json".split())
    n = len(numbers(0))
    assert len(fits) == 6 and all(4 * n <= f[0] < 4 * n + 64 and f[3] for f in fits)
    assert [f[1] < 0.8 for f in fits] == [False, True, True] * 2
    assert [f[2] for f in fits] == pytest.approx([0] * 3 + [round(n / 4) / n] * 3, abs=1e-6)
    saved = json.load(open("r.json"))
    assert (
        saved["command"] == "python -m fastsb.bench regression --epochs 4 --seeds 1 --noise 0,0.25 --out r.json"
        and "machine" in saved
    )
    for f, r in zip(fits, saved["runs"]):
        x, y = f[4].dls.valid.dataset.tensors
        with torch.no_grad():
            pred = f[4].model.eval()(x)
        assert r["error"] == pytest.approx(((pred - y) ** 2).mean().item() / y.var().item(), abs=1e-4)


def test_regression_table():
    errors = {("plain", 0): 0.2, ("plain", 1): 0.3, ("random", 0): 0.25, ("random", 1): 0.31}
    json.dump(
        dict(runs=[dict(noise=0.2, method=m, seed=s, error=e) for (m, s), e in errors.items()]), open("t.json", "w")
    )
    t = regression.regression_table("t.json").set_index("method")
    assert (
        t.wrong.tolist() == ["20%"] * 2 and t.error.tolist() == [0.25, 0.28] and math.isnan(t.loc["plain", "to plain"])
    )
    assert t.loc["random", "to plain"] == 0.03
    assert t.loc["random", "to plain ±"] == pytest.approx(
        stats.t.ppf(0.975, 1) * np.std([0.05, 0.01], ddof=1) / math.sqrt(2), abs=1e-4
    )


def test_each_at_its_best_learning_rate(capsys):
    "The best mean among the learning rates with enough seeds, a tie to the lower, and nothing mixed"
    best = {("plain", 6): 0.2, ("fast", 6): 0.4, ("plain", 12): 0.2, ("fast", 12): 0.2}
    runs = []
    for m, b in best:
        for lr in (0.2, 0.4, 0.8):
            for s in range(3 if lr < 0.8 else 1):  # 0.8 looks best but has one seed
                acc = 0.99 if lr == 0.8 else 0.5 + 0.01 * s + 0.1 * (m == "fast") + 0.02 * b + 0.1 * (lr == best[m, b])
                runs.append(line(m, b, s, acc))
                runs[-1]["config"] = dict(runs[-1]["config"], lr=lr)
    df = tables.at_best_lr(bench_runs.runs_table(runs))
    assert {(m, b): lr for m, b, lr in zip(df.method, df.budget, df.lr)} == best and len(df) == 12
    assert df.setting.nunique() == 1 and "each at its best lr" in df.setting.iloc[0] and "0.2" not in df.setting.iloc[0]
    assert tables.at_best_lr(bench_runs.runs_table(runs), seeds=1).lr.unique().tolist() == [0.8]
    assert tables.at_best_lr(bench_runs.runs_table(runs), seeds=4).empty and "setting" in tables.at_best_lr(
        bench_runs.runs_table(runs), seeds=4
    )
    same = [dict(r, accuracy=0.5) for r in runs]
    assert tables.at_best_lr(bench_runs.runs_table(same)).lr.unique().tolist() == [0.2]
    t = tables.time_to_plain(df).set_index("plain budget")
    assert t.loc[6, "time to plain"] == "< 1.00" and t.loc[12, "seeds"] == 3
    for r in runs:
        bench_runs.append_line("lr.jsonl", r)
    command.main(["report", "--files", "lr.jsonl", "--out", "rep"])
    text = open("rep/report.md").read()
    assert "each at its best lr" in text and "| 6 | 0.2 | 0.4 |" in text and "| 12 | 0.2 | 0.2 |" in text
