"Fits that last for a time. No test looks at how long anything took: the clock is one that tests wind up themselves."

from types import SimpleNamespace

import pytest
import torch
from common import NoisyRows, digits_learner
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from torch import nn

import fastsb.fit_for
import fastsb.record
from fastsb.fit_for import EndOfFit, Limit, TimeBudget
from fastsb.sampler import SelectiveSampler
from fastsb.select import TopK

N, BS = 640, 32
LOAD, TRAIN, SCORE, VALIDATE = 1.0, 3.0, 0.5, 0.25  # seconds a row, of a clock that is wound up


class Loading(NoisyRows):
    "Rows that take a while to load"

    def __getitem__(self, i):
        self.clock.now += LOAD
        return super().__getitem__(i)


class Rows(Callback):
    "Counts rows on its own account, and winds the clock up for each"

    order = -20

    def __init__(self, clock):
        self.clock, self.trained, self.scored, self.validated, self.rates = clock, 0, 0, 0, []

    def before_fit(self):
        self.handle = self.model.register_forward_pre_hook(self.seen)
        self.dls.train.dataset.__class__ = Loading
        self.dls.train.dataset.clock = self.clock

    def seen(self, model, args):
        n = len(args[0])
        if model.training:
            self.trained, seconds = self.trained + n, TRAIN
        elif self.learn.training:
            self.scored, seconds = self.scored + n, SCORE
        else:
            self.validated, seconds = self.validated + n, VALIDATE
        self.clock.now += seconds * n

    def after_step(self):
        self.rates.append(self.opt.hypers[-1]["lr"])

    def after_fit(self):
        self.handle.remove()


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(now=0.0)
    time = SimpleNamespace(perf_counter=lambda: now.now)
    monkeypatch.setattr(fastsb.fit_for, "time", time)
    monkeypatch.setattr(fastsb.record, "time", time)
    return now


def fit(clock, choose=lambda learn: learn, cbs=(), lr=0.02, **kw):
    learn, rows = choose(digits_learner(N)), Rows(clock)
    with learn.no_bar(), learn.no_logging():
        learn.fit_for(lr_max=lr, cbs=[rows, *cbs], **kw)
    return learn, rows


MODES = dict(
    plain=lambda learn: learn,
    default=lambda learn: learn.selective_backprop(),
    early=lambda learn: learn.selective_backprop(start=0.0),
    fresh=lambda learn: learn.selective_backprop(beta=1, score="model"),
    paper=lambda learn: learn.selective_backprop(paper=True),
    topk=lambda learn: learn.selective_backprop(selector=TopK(0.3), score="model", batching="prune"),
    infobatch=lambda learn: learn.infobatch(),
    stale=lambda learn: learn.selective_backprop(beta=1, stale=3),
    two_stage=lambda learn: learn.selective_backprop(score="two_stage"),
    blf=lambda learn: learn.batch_loss_filter(),
)


@pytest.mark.parametrize("mode", MODES)
def test_the_time_is_that_of_plain_epochs(clock, mode):
    "By a clock that counts each row that is loaded, scored and trained; validation apart"
    learn, rows = fit(clock, MODES[mode], epochs=6)
    spent = clock.now - VALIDATE * rows.validated
    plain = 6 * N * (LOAD + TRAIN)
    step = BS * (LOAD + TRAIN + 3 * SCORE)  # a batch that is trained may have waited for two batches of candidates
    trial = 4 * BS * SCORE  # what is scored before its price is known, and two rows that are tried
    assert plain - step - trial <= spent <= plain + step + trial
    assert rows.rates[-1] < 0.02 / 50 and rows.rates[0] == pytest.approx(0.02 / 25)
    assert max(rows.rates) == pytest.approx(0.02, rel=0.02)
    epochs = len(learn.recorder.values)
    assert learn.n_epoch == epochs == learn.epoch + 1
    assert epochs == 6 if mode == "plain" else epochs > 6
    assert len({len(v) for v in learn.recorder.values}) == 1, "a row of the table lacks a column"
    assert not {"all_batches", "one_batch"} & set(vars(learn))


@pytest.mark.parametrize("remember, choose", [(2.0, 0.0), (0.0, 300.0), (1.0, 100.0)])
def test_selection_pays_for_remembering_and_choosing(clock, monkeypatch, remember, choose):
    "Seconds a row and an epoch: the budget is that of plain training, which does neither"

    def slowly(name, seconds):
        was = getattr(SelectiveSampler, name)

        def f(self, first, *args, **kw):
            clock.now += seconds * (len(first) if name == "observe" else 1)
            return was(self, first, *args, **kw)

        monkeypatch.setattr(SelectiveSampler, name, f)

    slowly("observe", remember)
    slowly("begin_epoch", choose)
    learn, rows = fit(clock, MODES["default"], epochs=6)
    spent = clock.now - VALIDATE * rows.validated
    plain = 6 * N * (LOAD + TRAIN)
    last = BS * (LOAD + TRAIN + remember) + choose  # a step, and choosing for the last epoch, which is counted after it
    dropped = BS * LOAD * learn.n_epoch  # fastai loads what is left of an epoch, and drops it: not of a batch's time
    assert plain <= spent <= plain + last + dropped


@pytest.mark.parametrize("epochs", [0.3, 1, 2.5])
def test_a_fit_may_end_in_the_midst_of_an_epoch(clock, epochs):
    learn, rows = fit(clock, epochs=epochs)
    assert epochs * N <= rows.trained < epochs * N + BS
    assert rows.validated == 100 * -(-epochs // 1), "also the last epoch is validated"
    assert rows.rates[-1] < (0.02 / 50 if epochs >= 1 else 0.02 / 5), "the last of very few steps"


@pytest.mark.parametrize("mode", ["plain", "default"])
def test_so_many_seconds(clock, mode):
    "Of the clock, with all that there is"
    seconds = 5.5 * N * (LOAD + TRAIN)
    learn, rows = fit(clock, MODES[mode], seconds=seconds)
    assert seconds <= clock.now < seconds + BS * (LOAD + TRAIN) + 1
    assert rows.rates[-1] < 0.02 / 50
    assert len(learn.recorder.values) >= (6 if mode == "default" else 5)


def test_a_pause_costs_no_epochs(clock):
    "Whoever stops the clock after the first epoch does not shorten a fit of so many epochs"

    class Pause(Callback):
        def before_batch(self):
            clock.now += 1000.0 * (self.epoch > 0)

    _, rows = fit(clock, MODES["default"], cbs=[Pause()], epochs=4)
    assert 4 * N <= rows.trained < 4 * N + BS


def test_of_one_row_and_of_many(clock):
    "A loader that drops its last batch gives fewer rows, and an epoch is as long as what it gives"
    learn = digits_learner(N - 10)
    rows = Rows(clock)
    with learn.no_bar(), learn.no_logging():
        learn.fit_for(3, 0.02, cbs=rows)
    assert rows.trained == 3 * (N - BS)


def test_as_one_cycle_over_as_many_epochs(clock):
    "Plain training is trained as fastai's one cycle trains it, step for step"
    for_time, _ = fit(clock, epochs=3)
    by_epochs = digits_learner(N)
    with by_epochs.no_bar(), by_epochs.no_logging():
        by_epochs.fit_one_cycle(3, 0.02)
    torch.testing.assert_close(torch.tensor(for_time.recorder.lrs), torch.tensor(by_epochs.recorder.lrs))
    for a, b in zip(for_time.model.parameters(), by_epochs.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["plain", "default", "fresh"])
def test_other_callbacks_see_whole_epochs(clock, tmp_path, mode):
    def choose(learn):
        learn.path = tmp_path
        return MODES[mode](learn)

    cbs = [SaveModelCallback(every_epoch=True), MixUp(), GradientAccumulation(64)]
    learn, _ = fit(clock, choose, cbs, epochs=3.5)
    saved = {f.stem for f in (tmp_path / "models").glob("model_*.pth")}
    assert {f"model_{i}" for i in range(learn.n_epoch)} <= saved


@pytest.mark.parametrize("bs", [8, 16, 64])
def test_progress_never_goes_back(clock, bs):
    "Also where several batches are built of the candidates of one"
    pcts = []

    class Looks(Callback):
        order = 50

        def before_batch(self):
            if self.training:
                pcts.append(self.pct_train)

    fit(clock, lambda learn: learn.selective_backprop(beta=1, score="model", bs=bs, end=1.0), [Looks()], epochs=3)
    assert pcts == sorted(pcts) and pcts[-1] <= 1 and len(pcts) > 3 * N // (2 * bs)


def test_who_ends_earlier_ends_earlier(clock):
    learn, rows = fit(clock, cbs=[EarlyStoppingCallback(monitor="valid_loss", min_delta=1e9, patience=2)], epochs=9)
    assert len(learn.recorder.values) == 3 and rows.trained == 3 * N


def test_the_learner_is_left_as_it_was(clock):
    class Fails(Callback):
        def before_batch(self):
            raise KeyError("mine")

    learn = digits_learner(N)
    before = set(vars(learn)), [type(cb) for cb in learn.cbs]
    with pytest.raises(KeyError, match="mine"), learn.no_bar(), learn.no_logging():
        learn.fit_for(2, cbs=Fails())
    names = set(vars(learn)) - {"all_batches"}
    assert "all_batches" not in vars(learn) and "_with_events" not in vars(learn) and names >= before[0]
    assert sorted(map(str, before[1])) == sorted(str(type(cb)) for cb in learn.cbs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)  # is not limited by what came before
    assert len(learn.recorder.values) == 2


def test_the_line_and_the_bar(clock, capsys):
    learn = digits_learner(N).selective_backprop()
    learn.fit_for(5, 0.02)
    out = capsys.readouterr().out
    assert f"{learn.n_epoch} epochs in the time of 5 plain epochs." in out and "1000000" not in out


@pytest.mark.parametrize(
    "kw, says",
    [
        ({}, "either epochs.*or seconds"),
        (dict(epochs=2, seconds=3), "either epochs.*or seconds"),
        (dict(epochs=0), "epochs=0 must be above 0"),
        (dict(epochs=-1), "epochs=-1 must be"),
        (dict(epochs="2"), "epochs='2' must be a number"),
        (dict(seconds=0), "seconds=0 must be above 0"),
        (dict(seconds=float("nan")), "seconds=nan must be"),
        (dict(epochs=float("inf")), "epochs=inf must be"),
    ],
)
def test_wrong_times(kw, says):
    learn = digits_learner(N)
    w = next(learn.model.parameters()).clone()
    with pytest.raises((ValueError, TypeError), match=says):
        learn.fit_for(**kw)
    assert torch.equal(w, next(learn.model.parameters())) and not hasattr(learn, "time_budget")


def test_several_processes_are_told(monkeypatch):
    monkeypatch.setattr(fastsb.fit_for, "together", lambda: True)
    with pytest.raises(ValueError, match="several would not end together"):
        digits_learner(N).fit_for(2)


def test_a_limit_of_ones_own():
    "It says how much is used up; schedules and the end follow"

    class Steps(Limit):
        def __init__(self, n):
            self.n = n

        def before_fit(self):
            super().before_fit()
            self.done = 0

        def after_step(self):
            self.done += 1

        progress = property(lambda self: min(self.done / self.n, 1.0))

    learn, limit = digits_learner(N), Steps(33)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(100, 0.02, cbs=[limit, EndOfFit(limit)])
    assert limit.done == 33 and len(learn.recorder.values) == 2
    assert learn.recorder.lrs[-1] < 0.02 / 50
    with pytest.raises(NotImplementedError, match="how much is used up"):
        _ = Limit().progress
    assert isinstance(TimeBudget(seconds=3), Limit)


def test_a_loss_without_doubt_and_a_regression(clock):
    "Everything is trained on: then the time is that of so many epochs, no more and no fewer"
    learn = digits_learner(N, model=nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)), metrics=[],
                           loss_func=lambda p, y: (p - y.float()).square().mean())
    rows = Rows(clock)
    learn.selective_backprop()
    with learn.no_bar(), learn.no_logging():
        learn.fit_for(3, 0.001, cbs=rows)
    assert rows.trained == 3 * N
