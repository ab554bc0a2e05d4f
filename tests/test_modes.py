"Remembered losses: stale, cached and two-stage scores, InfoBatch. What is dropped is not loaded, and all comes back."

import re

import numpy as np
import pytest
import torch
from common import FirstColumn, Spy, digits, digits_learner, digits_model, fresh, quiet_fit
from fastai.basics import DataLoaders, Learner
from fastai.callback.all import CutMix, MixUp
from fastai.callback.core import Callback
from torch import nn

from fastsb.all import *
from fastsb.select import InfoBatch, LowK, OrderedPool, Percentile, Random, TopK, Uncertainty


class Counted(torch.utils.data.Dataset):
    "Input and target carry the item's index; counts what is loaded"

    def __init__(self, n):
        self.n, self.loaded = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.loaded.append(i)
        return torch.full((2,), float(i)), torch.tensor(i)


def planted_learner(n=600, bs=32, cbs=None, losses=None, drop_last=False, **kwargs):
    "The loss of item i is `losses[i]`, whatever the model"
    losses = torch.arange(n).float() if losses is None else losses
    ds = Counted(n)
    dls = DataLoaders.from_dsets(ds, Counted(20), bs=bs, device="cpu", num_workers=0)
    dls[0].drop_last = drop_last
    learn = Learner(dls, FirstColumn(), loss_func=lambda p, t: (p * 0).mean(), cbs=cbs)
    learn.selective_backprop(**fresh(per_item=lambda p, t: losses[t] + 0 * p, **kwargs))
    return learn, ds


def loader_state(learn):
    return {
        k: v
        for k, v in vars(learn.dls.train).items()
        if k not in ("_DataLoader__idxs", "rng", "it", "_n_inp", "_types")
    }  # what fastai itself adds


def same_loader(learn, before, dl):
    now = loader_state(learn)
    assert learn.dls.train is dl and now.keys() == before.keys()
    assert all(now[k] is before[k] or now[k] == before[k] for k in now)


modes = [
    dict(stale=3),
    dict(score="cached"),
    dict(score="two_stage"),
    dict(score="cached", selector=InfoBatch()),
    dict(score="cached", selector=OrderedPool()),
    dict(score="cached", exact=True),
    dict(stale=2, batching="prune"),
    dict(score="cached", rescale="inverse"),
]


@pytest.mark.parametrize("kw", modes, ids=str)
@pytest.mark.parametrize("drop_last", [True, False])
def test_what_is_dropped_is_not_loaded_and_counts_add_up(kw, drop_last):
    n, per_epoch, trained = 600, [], []

    class Watch(Spy):
        def before_batch(self):
            if self.training:
                super().before_batch()
                (x,), (y,) = self.xb, self.yb
                assert torch.equal(x[:, 0].long(), y)
                trained.append((self.epoch, y.tolist()))

        def before_train(self):
            self.seen = len(self.dls.train_ds.loaded)
            self.n_batches = len(self.learn.dl)

        def after_train(self):
            per_epoch.append((len(self.dls.train_ds.loaded) - self.seen, self.n_batches, self.iter + 1))

    spy = Watch()
    learn, ds = planted_learner(n, cbs=spy, drop_last=drop_last, seed=None if "selector" in kw else 0, **kw)
    dl, before = learn.dls.train, loader_state(learn)
    quiet_fit(learn, 8)
    log = learn.sb.log
    full = n // 32 * 32 if drop_last else n
    assert log.candidates.tolist() == [full] * 8 and log.loads[0] == full
    assert all(
        loaded >= row.loads and loaded - row.loads < 32 for (loaded, *_), row in zip(per_epoch, log.itertuples())
    )  # drop_last leaves some
    assert all(n == ran for _, n, ran in per_epoch)  # the length that the schedules and the progress bar were told
    assert [sum(len(ids) for e, ids in trained if e == i) for i in range(8)] == log.bp.tolist()
    assert spy.pcts == sorted(spy.pcts) and learn.pct_train == pytest.approx(1)
    same_loader(learn, before, dl)
    assert log.score_age[0] == 0 and (log.loading_s > 0).all()
    if kw.get("stale"):
        k = kw["stale"]
        assert log.fp.tolist() == [0] + [full if (i % k == 0) else 0 for i in range(7)]
        assert (log.loads[1:][[i % k != 0 for i in range(7)]] < 0.65 * n).all()
    elif kw["score"] == "cached":
        assert (log.fp == 0).all() and (log.loads == log.bp).all()
    else:
        assert (
            log.loads[1:].between(0.7 * n, 0.9 * n).all()
            and (log.fp[1:] == log.loads[1:]).all()
            and (log.bp[1:] < 0.7 * n).all()
        )


def test_cached_choices_are_the_papers_on_all_items():
    "percentile**beta over the remembered losses of the data set: item i of n has percentile i/n"
    n = 500
    counts = np.zeros(n)

    class Watch(Spy):
        def before_batch(self):
            if self.training and self.epoch:
                np.add.at(counts, self.yb[0].numpy(), 1)

    learn, _ = planted_learner(n, cbs=Watch(), score="cached", beta=2, seed=0, max_age=1000)
    quiet_fit(learn, 301)
    p = (np.arange(n) / n) ** 2
    z = (counts / 300 - p) / np.sqrt(np.maximum(p * (1 - p), 1e-9) / 300 + 1e-9)
    assert np.abs(z).max() < 5 and (z**2).mean() < 1.3
    assert learn.sb.log.selected[1:].mean() == pytest.approx(1 / 3, abs=0.02)


def test_the_memory_holds_the_moving_average_of_training_losses():
    learn, _ = planted_learner(300, score="cached", momentum=0.5, beta=1, seed=1)
    seen = {}

    class Watch(Spy):
        def before_batch(self):
            if self.training:
                for i in self.yb[0].tolist():
                    seen.setdefault(i, []).append(self.epoch)

    quiet_fit(learn, 6, cbs=Watch())
    memory = learn.sb.sampler.memory
    assert torch.equal(memory.losses(), torch.arange(300.0))  # losses do not change here
    assert memory.times().tolist() == [len(seen[i]) for i in range(300)]
    assert torch.equal(memory.ages(None, 6), torch.tensor([6.0 - seen[i][-1] for i in range(300)]))


def test_old_items_come_back():
    learn, ds = planted_learner(200, score="cached", selector=TopK(0.1), max_age=3)
    seen = {i: [] for i in range(200)}

    class Watch(Spy):
        def before_batch(self):
            if self.training:
                for i in self.yb[0].tolist():
                    seen[i].append(self.epoch)

    quiet_fit(learn, 30, cbs=Watch())
    waits = [np.diff([*s, 29]) for s in seen.values()]
    assert (
        max(w.max() for w in waits) == 4 and learn.sb.log.loads.min() <= 20
    )  # not loaded for 3 epochs, then all of them
    learn, ds = planted_learner(200, score="cached", beta=8, max_age=3, seed=0)
    seen.update({i: [] for i in range(200)})
    quiet_fit(learn, 30, cbs=Watch())
    waits = [np.diff([*s, 29]).max() for s in seen.values()]  # drawn each by itself: back after 3 epochs of absence...
    assert (
        max(waits) <= 5 and np.mean(np.array(waits) > 4) < 0.05
    )  # ...or one more, for one that would have been alone in the last batch


def test_weights_of_dropped_items():
    "InfoBatch: below the mean 1/(1-r), above 1; inverse: share of the epoch over the probability"
    got = []

    class Watch(Spy):
        order = 0

        def after_loss(self):
            if self.training and self.epoch:
                got.append((self.yb[0].clone(), learn.sb.sampler.weights(learn.sb._rows).clone()))

    learn, _ = planted_learner(400, cbs=Watch(), score="cached", selector=InfoBatch(0.6))
    quiet_fit(learn, 4)
    y, w = (torch.cat(o) for o in zip(*got))
    assert torch.allclose(w, torch.where(y < 199.5, 2.5, 1.0))
    got.clear()
    learn, _ = planted_learner(400, cbs=Watch(), score="cached", selector=Random(0.25, exact=True), rescale="inverse")
    quiet_fit(learn, 3)
    assert torch.allclose(torch.cat([w for _, w in got]), torch.ones(1))


def test_infobatch_preset():
    learn = digits_learner(n=1400).infobatch(r=0.5, delta=0.75)
    quiet_fit(learn, 8)
    log = learn.sb.log
    assert (log.fp == 0).all() and log.selected[0] == 1 and log.selected[6:].tolist() == [1, 1]
    assert log.selected[1:6].between(0.5, 0.9).all() and learn.recorder.values[-1][2] > 0.85
    with pytest.raises(ValueError, match="r=1"):
        learn.infobatch(r=1)


def learn_state(learn):
    "Methods of the learner that are replaced on this one"
    return {k: vars(learn).get(k) for k in ("_with_events", "one_batch", "_call_one")}


@pytest.mark.parametrize("how", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("when", ["before_batch", "after_step", "before_validate", "after_epoch"])
def test_all_is_put_back_after_an_exception(how, when):
    class Stop(Callback):
        order = 70

        def stop(self):
            if self.epoch == 2 and (self.training or "batch" not in when):
                raise how(when)

    setattr(Stop, when, Stop.stop)
    learn = digits_learner().selective_backprop(**fresh(score="cached"))
    dl, before, metrics, own = learn.dls.train, loader_state(learn), list(learn.metrics), learn_state(learn)
    with pytest.raises(how):
        quiet_fit(learn, 4, cbs=Stop())
    same_loader(learn, before, dl)
    assert list(learn.metrics) == metrics and learn_state(learn) == own
    assert len(list(learn.dls.train)) == 20
    quiet_fit(learn, 2)
    same_loader(learn, before, dl)
    assert learn_state(learn) == own and list(learn.metrics) == metrics
    learn.remove_cb(SelectiveBackpropCallback)
    assert "_with_events" not in vars(learn) and "one_batch" not in vars(learn)


def test_cancelled_fits_put_all_back():
    from fastai.callback.core import CancelFitException

    class Stop(Callback):
        order = 70

        def after_step(self):
            if self.epoch == 2:
                raise CancelFitException

    learn = digits_learner().selective_backprop(**fresh(score="two_stage"))
    dl, before = learn.dls.train, loader_state(learn)
    quiet_fit(learn, 4, cbs=Stop())
    same_loader(learn, before, dl)
    assert len(learn.sb.log) == 3 and len(learn.metrics) == 1


@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_weights_are_not_for_mixtures(mix):
    name = mix.__name__
    for kw, who, what in (
        (dict(score="cached", rescale="inverse"), "rescale='inverse'", "leave rescale='mean'"),
        (dict(rescale="sum"), "rescale='sum'", "leave rescale='mean'"),
        (dict(score="cached", selector=InfoBatch()), "InfoBatch(r=0.5)", "choose by selector=TopK(.5)"),
    ):
        learn = digits_learner(cbs=mix()).selective_backprop(**fresh(**kw))
        says = f"{who} weighs the loss of each example, and {name} mixes them: {what}, or train without {name}."
        with pytest.raises(ValueError, match=re.escape(says)):
            quiet_fit(learn, 1)


def test_loaders_that_do_not_tell_are_refused_before_the_fit():
    x, y = digits(64)
    ds = torch.utils.data.TensorDataset(x, y)
    torch_dls = DataLoaders(
        torch.utils.data.DataLoader(ds, batch_size=32), torch.utils.data.DataLoader(ds, batch_size=32)
    )
    spy = Spy()
    learn = Learner(torch_dls, digits_model(), loss_func=nn.CrossEntropyLoss(), cbs=spy).selective_backprop(
        **fresh(score="cached")
    )
    with pytest.raises(ValueError, match="score='model'"):
        quiet_fit(learn, 1)
    assert not getattr(spy, "batches", None)
    quiet_fit(learn.selective_backprop(**fresh()), 1)


@pytest.mark.parametrize(
    "kw,words",
    [
        (dict(score="cache"), "score='cache'"),
        (dict(stale=0), "stale=0"),
        (dict(stale=1.5), "stale=1.5"),
        (dict(stale=2, score="cached"), "stale=2"),
        (dict(max_age=0), "max_age=0"),
        (dict(momentum=2), "momentum=2"),
        (dict(pool=3), "pool=3"),
    ],
    ids=str,
)
def test_wrong_arguments(kw, words):
    with pytest.raises((ValueError, TypeError), match=words):
        digits_learner().selective_backprop(**fresh(**kw))


def test_predictions_are_not_remembered():
    from fastsb.select import Absolute, GradNorm

    for sel in (Absolute(), GradNorm()):
        for kw in (dict(score="cached"), dict(stale=2), dict(score="two_stage")):
            with pytest.raises(ValueError, match="looks at predictions"):
                digits_learner().selective_backprop(**fresh(selector=sel, **kw))


def test_they_all_learn():
    accs = {}
    for name, kw in dict(
        plain=None, stale=dict(stale=3), cached=dict(score="cached"), two=dict(score="two_stage")
    ).items():
        learn = digits_learner(n=1400)
        if kw is not None:
            learn.selective_backprop(**fresh(**kw))
        quiet_fit(learn, 8)
        accs[name] = learn.recorder.values[-1][2]
    assert min(accs.values()) > accs["plain"] - 0.06, accs


def test_schedule_and_resume(tmp_path):
    spy = Spy()
    learn = digits_learner(cbs=spy, path=tmp_path).selective_backprop(**fresh(score="cached"))
    quiet_fit(learn, 4)
    assert learn.recorder.hps["lr"] == learn.recorder.lrs and learn.recorder.lrs[-1] < 1e-3
    learn.save("m")
    again = digits_learner(path=tmp_path).selective_backprop(**fresh(score="cached"))
    again.load("m")
    quiet_fit(again, 6, start_epoch=4)
    assert (
        again.sb.log.selected.tolist()[0] == 1 and again.sb.log.selected.tolist()[1] < 0.7
    )  # nothing remembered yet: everything is loaded once


def test_beta_0_loads_everything():
    learn = digits_learner().selective_backprop(**fresh(score="cached", beta=0))
    quiet_fit(learn, 2)
    assert learn.sb.log.loads.tolist() == [640, 640] and learn.sb.sampler is None


def test_several_processes_are_refused_where_they_would_go_apart(monkeypatch):
    from fastsb.select import GradNorm

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 0)
    for kw in (dict(selector=GradNorm()), dict(exact=False)):
        learn = digits_learner().selective_backprop(**fresh(**kw))
        with pytest.raises(ValueError, match="exact=True"):
            quiet_fit(learn, 1)
        assert len(learn.metrics) == 1 and "do_item" not in vars(learn.dls.train)


@pytest.mark.parametrize(
    "kw, who",
    [
        (dict(keep=0.4), Uncertainty(0.4)),
        (dict(selector="topk"), TopK()),
        (dict(selector="topk", keep=0.3), TopK(0.3)),
        (dict(selector="infobatch"), InfoBatch()),
        (dict(selector="percentile", seed=3), Percentile()),
        (dict(paper=True, selector="lowk"), LowK()),
    ],
)
def test_a_selector_by_name(kw, who):
    learn = quiet_fit(digits_learner(320).selective_backprop(start=1, end=1.0, **kw), 2)
    assert str(learn.sb.selector) == str(who) and learn.sb.log.selected[1] < 1


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(selector="tpok"), "selector='tpok' must be one of 'percentile'.*'topk'"),
        (dict(selector="infobatch", keep=0.3), "keep=0.3 is not for selector='infobatch', only for .*topk"),
        (dict(selector=TopK(0.3), keep=0.3), r"keep=0.3: TopK\(keep=0.3\) says itself"),
        (dict(selector="topk", beta=2.0), "beta=2.0 chooses by loss: leave keep and selector out"),
        (dict(keep=0.3, beta=2.0), "beta=2.0 chooses by loss"),
        (dict(keep=0), "keep=0 must be"),
        (dict(keep=1.5), "keep=1.5 must be"),
    ],
)
def test_names_that_are_none(kw, says):
    with pytest.raises((ValueError, TypeError), match=says):
        digits_learner(320).selective_backprop(**kw)
