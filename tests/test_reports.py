"What people do to a learner, from reports about this package and its neighbours: each works as it does without fastsb."

from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from common import NoisyRows, Spy, digits, digits_learner, digits_model, own_methods, quiet_fit
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, load_learner
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.data import PartialDL
from fastai.callback.hook import ActivationStats
from fastai.callback.progress import ShowGraphCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.load import DataLoader
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from torch import nn

from fastsb.callback import SelectiveBackpropCallback
from fastsb.select import TopK, Uncertainty

MODES = {
    "default": {},
    "beta=1": dict(beta=1),
    "model": dict(beta=1, score="model"),
    "paper": dict(paper=True),
    "two_stage": dict(beta=1, score="two_stage"),
}
modes = pytest.mark.parametrize("kw", MODES.values(), ids=MODES)


# doubt that is none


class FocalLoss(nn.Module):
    "Binary, with the name of another"

    reduction = "mean"

    def forward(self, pred, y):
        p = pred.squeeze(1).sigmoid()
        l = -(y * (1 - p) ** 2 * p.log() + (1 - y) * p**2 * (1 - p).log())
        return l.mean() if self.reduction == "mean" else l


class Twice(nn.Linear):
    def forward(self, x):
        o = super().forward(x)
        return o, o


class OfTwo(CrossEntropyLossFlat):
    "A loss over classes that gets two predictions"

    def __call__(self, pred, y):
        return super().__call__(pred[0], y) + 0.4 * super().__call__(pred[1], y)


@pytest.mark.parametrize(
    "loss_func,model,says",
    [
        (FocalLoss(), nn.Linear(8, 1), "FocalLoss is not known as one"),
        (OfTwo(), Twice(8, 2), "goes by the model's doubt, and the model gives a tuple"),
        (CrossEntropyLossFlat(), nn.Linear(8, 1), "have one column"),
    ],
)
def test_where_doubt_is_none_everything_is_trained_each_equally_often(loss_func, model, says, capsys):
    x = torch.randn(160, 8)
    y = (x[:, 0] > 0).float() if isinstance(loss_func, FocalLoss) else (x[:, 0] > 0).long() * (model.out_features - 1)
    seen = []

    class Spy(Callback):
        order = 60

        def before_batch(self):
            if self.training:
                seen.extend(self.xb[0][:, 0].tolist())

    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x[:9], y[:9])), bs=16, device="cpu", num_workers=0)
    learn = Learner(dls, model, loss_func=loss_func, cbs=Spy()).selective_backprop()
    with learn.no_bar():
        learn.fit(4, 1e-3)
    out = capsys.readouterr().out
    assert out.count("fastsb:") == 1 and "everything is trained on" in out and says in out
    assert set(np.unique(seen, return_counts=True)[1]) == {4} and learn.sb.log.selected.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="goes by doubt"):
        quiet_fit(learn.selective_backprop(selector=Uncertainty(0.5)), 4)


# the loss's own mean


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_do_not_change_the_scale_of_the_gradient(reduction):
    "Class weights and sums, when InfoBatch begins to weigh"
    x, y = digits(640)
    norms = {}

    class Norms(Callback):
        order = 90

        def before_step(self):
            total = torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm().item()
            norms.setdefault(self.epoch, []).append(total)

    weight = torch.rand(10) * 0.01
    dls = DataLoaders.from_dsets(NoisyRows(x, y, 0), NoisyRows(x[:50], y[:50], 0), bs=32, device="cpu", num_workers=0)
    loss = nn.CrossEntropyLoss(weight=weight, reduction=reduction)
    learn = Learner(dls, nn.Linear(64, 10), loss_func=loss, cbs=Norms()).infobatch()
    quiet_fit(learn, 4, lr=1e-4)
    means = [np.mean(v) for _, v in sorted(norms.items())]
    assert learn.sb.log.selected[1] < 1 and max(means) / min(means) < 2.5


class RunningMean(nn.Module):
    "A loss with a state of its own, which each call changes"

    reduction = "mean"

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.calls = 0

    def forward(self, pred, y):
        l = nn.functional.cross_entropy(pred, y, reduction="none")
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * l.detach().mean())
        return l.mean() / self.mean if self.reduction == "mean" else l / self.mean


@pytest.mark.parametrize("how", ["beta=0", "beta=1", "doubt", "infobatch", "model", "stale", "filter"])
def test_a_loss_with_a_state_is_called_as_often_as_without(how):
    "Where losses of examples are wanted too, it has the state afterwards that it had before"
    hows = dict(
        infobatch=lambda learn: learn.infobatch(),
        filter=lambda learn: learn.batch_loss_filter(),
        doubt=lambda learn: learn.selective_backprop(selector=Uncertainty(0.5, like=nn.CrossEntropyLoss())),
        model=lambda learn: learn.selective_backprop(beta=1, score="model"),
        stale=lambda learn: learn.selective_backprop(beta=1, stale=2),
    )
    by_beta = lambda learn: learn.selective_backprop(beta=int(how[-1]))
    loss = RunningMean()
    learn = hows.get(how, by_beta)(digits_learner(loss_func=loss, noise=0, p=0))
    quiet_fit(learn, 4)
    validated = 4 * len(learn.dls.valid)
    assert loss.calls == len(learn.recorder.losses) + validated
    assert (learn.sb.log if how != "filter" else learn.blf.log).selected[1] < 1 or how == "beta=0"
    if how == "beta=0":
        plain = RunningMean()
        quiet_fit(digits_learner(loss_func=plain, noise=0, p=0), 4)
        assert loss.mean == plain.mean and loss.calls == plain.calls


# loaders


@pytest.mark.parametrize("how", ["selective_backprop", "infobatch", "beta"])
def test_padded_text_trains_and_selects(how):
    r = np.random.RandomState(0)
    texts = [" ".join(r.choice([f"w{j}" for j in range(9)], r.randint(5, 60))) for _ in range(160)]
    df = pd.DataFrame(dict(text=texts, label=[i % 2 for i in range(160)]))
    dls = TextDataLoaders.from_df(df, text_col="text", label_col="label", bs=16, seq_len=24, num_workers=0)
    config = {**awd_lstm_clas_config, "emb_sz": 8, "n_hid": 8, "n_layers": 1}
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config)
    learn = learn.selective_backprop(beta=1) if how == "beta" else getattr(learn, how)()
    quiet_fit(learn, 3, how="fit")
    assert learn.sb.log.selected[1] < 1 and learn.sb.log.selected[2] == 1 and learn.sb.counts["fp"] == 0


def in_memory(by):
    "A loader with batches of its own, the usual speed-up"
    x, y = digits(320)
    ds = list(zip(x, y))

    class ByIter(DataLoader):
        def __iter__(self):
            for c in torch.tensor(self.get_idxs()).split(self.bs):
                yield x[c], y[c]

    class ByBatches(DataLoader):
        def create_batches(self, samps):
            for c in torch.tensor(list(samps)).split(self.bs):
                yield x[c], y[c]

    cls = dict(iter=ByIter, batches=ByBatches)[by]
    return DataLoaders(cls(ds, bs=32, shuffle=True), cls(ds, bs=32), device="cpu")


@pytest.mark.parametrize("by", ["iter", "batches"])
def test_loaders_with_batches_of_their_own(by, capsys):
    learn = Learner(in_memory(by), digits_model(), loss_func=CrossEntropyLossFlat()).selective_backprop()
    with learn.no_bar():
        learn.fit(3)
    out = capsys.readouterr().out
    assert out.count("fastsb:") == 1 and "of its own" in out and learn.sb.log.selected.tolist() == [1.0] * 3
    learn = Learner(in_memory(by), digits_model(), loss_func=CrossEntropyLossFlat())
    assert quiet_fit(learn.selective_backprop(paper=True), 3).sb.log.selected[2] < 1


def test_a_data_set_without_a_length():
    x, y = digits(320)

    class Endless:
        def __getitem__(self, i):
            return x[i], y[i]

    dls = DataLoaders(
        DataLoader(Endless(), bs=32, n=320, indexed=True, shuffle=True), DataLoader(list(zip(x, y)), bs=32)
    )
    learn = Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat()).selective_backprop()
    assert (quiet_fit(learn, 4, 0.1).sb.log.selected == 1).tolist() == [True, False, False, True]


def test_a_loader_of_a_part_offers_that_part():
    x, y = digits(320)
    train = PartialDL(NoisyRows(x, y, 0), bs=20, shuffle=True, partial_n=100)
    dls = DataLoaders(train, DataLoader(NoisyRows(x[:40], y[:40], 0), bs=20))
    log = quiet_fit(Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat()).selective_backprop(), 6).sb.log
    assert log.candidates.tolist() == [100] * 6 and (log.selected <= 1).all() and (log.loads == log.bp).all()


@pytest.mark.parametrize("n", [256, 160])
@pytest.mark.parametrize("place", ["loader", "dls"])
def test_a_loader_that_is_replaced_in_mid_fit(n, place):
    "The items of the new one are trained, and remembered from then on"
    x, y = digits(512)
    new = lambda a, b: DataLoaders.from_dsets(
        list(zip(x[a:b], y[a:b])), list(zip(x[:9], y[:9])), bs=32, device="cpu", num_workers=0
    )
    seen = {}

    class Replace(Callback):
        order = -50

        def before_epoch(self):
            if self.epoch != 3:
                return
            if place == "dls":
                self.learn.dls = new(256, 256 + n)
            else:
                self.learn.dls.loaders[0] = new(256, 256 + n).train

    class Spy(Callback):
        order = 60

        def before_batch(self):
            if self.training:
                seen.setdefault(self.epoch, set()).update(self.xb[0].sum(1).tolist())

    learn = Learner(new(0, 256), digits_model(), loss_func=CrossEntropyLossFlat(), cbs=[Replace(), Spy()])
    quiet_fit(learn.selective_backprop(), 10)
    of_new = set(x[256 : 256 + n].sum(1).tolist())
    assert all(seen[e] <= of_new for e in range(3, 10)) and set.union(*(seen[e] for e in range(3, 10))) == of_new
    memory = learn.sb.sampler.memory
    assert len(memory) == n and memory.losses().isfinite().all() and (learn.sb.log.selected[4:9] < 1).any()
    assert own_methods(learn)[1] == []


def test_no_batch_size_is_needed_where_no_batch_is_rebuilt():
    x, y = digits(320)
    ds = torch.utils.data.TensorDataset(x, y)
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(ds), 32, False)
    dl = torch.utils.data.DataLoader(ds, batch_sampler=sampler)
    for kw, words in (
        (dict(beta=0), None),
        (dict(beta=1, score="model", batching="prune"), None),
        (dict(beta=1, score="model", bs=32), None),
        (dict(beta=1, score="model"), "pass bs="),
    ):
        learn = Learner(DataLoaders(dl, dl), digits_model(), loss_func=CrossEntropyLossFlat()).selective_backprop(**kw)
        if words:
            with pytest.raises(ValueError, match=words):
                quiet_fit(learn, 2)
        else:
            quiet_fit(learn, 2)


# batches


class Sums(nn.Module):
    "Reads a dict of inputs"

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(64, 10)

    def forward(self, b, *others):
        return self.l(b["x"] if isinstance(b, (dict, UserDict)) else b)


@modes
def test_dict_inputs_file_names_and_dict_targets(kw):
    x, y = digits(160)
    loss = CrossEntropyLossFlat()

    def of_dict(pred, t, reduction="mean"):
        return nn.functional.cross_entropy(pred, t["label"], reduction=reduction)

    for items, n_inp, loss_func in (
        ([({"x": a}, b) for a, b in zip(x, y)], 1, loss),
        ([(a, f"file {i}", b) for i, (a, b) in enumerate(zip(x, y))], 2, loss),
        ([(a, {"label": b}) for a, b in zip(x, y)], 1, of_dict),
    ):
        dls = DataLoaders.from_dsets(items, items[:32], bs=16, device="cpu", num_workers=0)
        for dl in dls.loaders:
            dl._n_inp = n_inp
        own = dict(selector=Uncertainty(0.5, like=nn.CrossEntropyLoss())) if loss_func is of_dict and not kw else {}
        learn = Learner(dls, Sums(), loss_func=loss_func).selective_backprop(**kw, **own)
        assert quiet_fit(learn, 4, 0.1).sb.log.selected[1:3].min() < 1, (kw, n_inp)


# other callbacks


class Unpack(Callback):
    def after_pred(self):
        self.learn.pred = self.pred.logits


class Prepare(Callback):
    def before_batch(self):
        self.learn.xb = (self.x / 2,)


class Wrapped(nn.Linear):
    def forward(self, x):
        assert x.abs().max() <= 0.5, "not what Prepare has prepared"
        return SimpleNamespace(logits=super().forward(x))


@modes
def test_a_score_is_of_what_training_sees(kw):
    x, y = digits(320)
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x, y)), bs=32, device="cpu", num_workers=0)
    learn = Learner(dls, Wrapped(64, 10), loss_func=CrossEntropyLossFlat(), cbs=[Unpack(), Prepare()])
    learn.selective_backprop(**kw)
    assert quiet_fit(learn, 4, 1.0).sb.log.selected[1:3].min() < 1
    assert "_call_one" not in vars(learn)


def test_who_prepares_must_be_known_before_the_first_score():
    learn = digits_learner(cbs=Prepare()).selective_backprop(beta=1, score="model", start=0)
    with pytest.raises(ValueError, match="Prepare changes in `before_batch`.*any start above 0"):
        quiet_fit(learn, 2)


@modes
def test_others_see_only_batches_that_are_trained_on(kw):
    class TrainAccuracy(Callback):
        def before_fit(self):
            self.seen, self.began = 0, 0

        def before_batch(self):
            self.began += self.training

        def after_batch(self):
            if self.training:
                self.acc = (self.pred.argmax(1) == self.y).float().mean()
                self.seen += len(self.y)

    learn = digits_learner(cbs=[TrainAccuracy(), ActivationStats()]).selective_backprop(**kw)
    quiet_fit(learn, 4)
    n = len(learn.recorder.losses)
    assert learn.train_accuracy.seen == learn.sb.counts["bp"] and learn.train_accuracy.began == n
    assert len(learn.activation_stats.stats) == n == len(learn.recorder.hps["lr"])
    assert learn.sb.counts["bp"] < learn.sb.counts["candidates"]


@modes
def test_hyper_parameters_stay_in_step_where_epochs_are_cut_short(kw):
    learn = quiet_fit(digits_learner(cbs=ShortEpochCallback(0.5)).selective_backprop(**kw), 4)
    np.testing.assert_allclose(learn.recorder.hps["lr"], learn.recorder.lrs)


@modes
def test_a_graph_shows_the_validation_where_it_was(kw, monkeypatch):
    "Among the batches that were trained on"
    monkeypatch.setattr(ShowGraphCallback, "after_epoch", lambda self: None)  # nothing is drawn here
    learn = digits_learner(cbs=ShowGraphCallback()).selective_backprop(**kw)
    ends = []

    class Ends(Callback):
        def after_train(self):
            ends.append(len(self.recorder.losses))

    with learn.no_logging():
        learn.fit_one_cycle(4, 1e-2, cbs=Ends())
    assert learn.show_graph.nb_batches == ends and ends[-1] == len(learn.recorder.losses) < 80


@pytest.mark.parametrize("bs", [8, 16, 64])
def test_progress_is_of_candidates_whatever_batches_are_built_of_them(bs):
    spy = Spy()
    learn = digits_learner(cbs=spy, drop_last=False, n=650).selective_backprop(beta=1, score="model", bs=bs, end=1.0)
    quiet_fit(learn, 4)
    assert learn.pct_train == pytest.approx(1) and len(set(spy.pcts)) == len(spy.pcts) == spy.steps
    assert spy.pcts == sorted(spy.pcts) and spy.pcts[-1] < 1
    gaps = np.diff(spy.pcts) * 4 * 21
    np.testing.assert_allclose(np.median(gaps[8:]), bs / 16, rtol=1e-4)


@pytest.mark.parametrize("kw", [dict(momentum=1.0), dict(pool=0.0), dict(pool=0), dict(beta=1, selector=TopK(0.5))])
def test_settings_are_checked_at_the_call(kw):
    with pytest.raises(ValueError, match=next(iter(kw))):
        SelectiveBackpropCallback(**kw)


# what is no fit


@modes
def test_what_is_no_fit_leaves_the_log_alone(kw, tmp_path):
    learn = quiet_fit(digits_learner(path=tmp_path).selective_backprop(**kw), 4)
    log, own = learn.sb.log, own_methods(learn)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(show_plot=False)
        with learn:
            pass
    assert learn.sb.log.equals(log) and own_methods(learn) == own


@modes
def test_exported_in_mid_fit(kw, tmp_path):
    class ExportEachEpoch(Callback):
        order = 80

        def after_epoch(self):
            self.learn.export("mid.pkl")

    learn = digits_learner(path=tmp_path, cbs=ExportEachEpoch()).selective_backprop(**kw)
    quiet_fit(learn, 3)
    loaded = load_learner(tmp_path / "mid.pkl")
    assert loaded.metrics.attrgot("name") == ["accuracy"]
    with loaded.no_bar(), loaded.no_logging():
        assert loaded.get_preds(dl=learn.dls[1])[0].shape == (100, 10)
        assert len(loaded.validate(dl=learn.dls[1])) == 2
    learn.metrics = [accuracy]


# whatever happens


ERRORS = (
    RuntimeError,
    KeyboardInterrupt,
    CancelFitException,
    CancelEpochException,
    CancelTrainException,
    CancelBatchException,
    CancelValidException,
)


@pytest.mark.parametrize("kw", [{}, dict(beta=1, score="model"), dict(beta=1, score="two_stage")])
@pytest.mark.parametrize("order", [-20, 70])
@pytest.mark.parametrize(
    "event",
    "before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward "
    "before_step "
    "after_step after_batch after_train before_validate after_validate after_epoch after_fit".split(),
)
def test_the_learner_is_as_it_was_whatever_happens(event, order, kw):
    "By an error, Ctrl-C or a cancellation in another callback; the fit ends as plain fastai's does"

    class Raise(Callback):
        error = None

        def raises(self):
            if event == "before_fit" or (getattr(self.learn, "epoch", 0) or 0) >= 2:
                raise self.error("on purpose")

    setattr(Raise, event, Raise.raises)
    cb = Raise()
    cb.order = order

    def ends(learn):
        try:
            quiet_fit(learn, 4, cbs=cb)
        except BaseException as e:
            return type(e)

    for cb.error in ERRORS:
        learn = digits_learner(n=96).selective_backprop(**kw)
        before = own_methods(learn)
        assert ends(learn) == ends(digits_learner(n=96)), (event, cb.error)
        assert own_methods(learn) == before, (event, cb.error)
    quiet_fit(learn, 3)
    assert own_methods(learn) == before
    learn.remove_cb(SelectiveBackpropCallback)
    assert set(own_methods(learn)[0].values()) == {None} and not hasattr(learn, "sb")


def test_somebody_elses_patch_stays():
    learn = digits_learner().selective_backprop()
    was, calls = learn._with_events, []

    def timed(f, event_type, ex, final=lambda: None):
        calls.append(event_type)
        return was(f, event_type, ex, final)

    learn._with_events = timed
    for _ in range(2):
        quiet_fit(learn, 2)
        assert learn._with_events is timed
    assert calls.count("batch") > 60 and calls.count("fit") == 2
    learn.remove_cb(SelectiveBackpropCallback)
    quiet_fit(learn, 1)
    assert learn._with_events is timed and calls.count("fit") == 3


def test_ties_are_not_for_the_first():
    "All are in equal doubt: each is trained about equally often"
    x, y = digits(320)
    dls = DataLoaders.from_dsets(list(zip(x * 0, y)), list(zip(x, y)), bs=32, device="cpu", num_workers=0)
    learn = Learner(dls, nn.Linear(64, 10, bias=False), loss_func=CrossEntropyLossFlat())
    learn.selective_backprop(selector=Uncertainty(0.5), max_age=1000)
    quiet_fit(learn, 40, lr=0.0)
    times = learn.sb.sampler.memory.times().float()
    first, last = times[:160].mean(), times[160:].mean()
    assert abs(first - last) < 2 and times.min() > 8
