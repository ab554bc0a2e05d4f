"Selective-Backprop beside fastai's own callbacks, loaders and ways to save."

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from common import Spy, digits, digits_learner, digits_model, fresh, quiet_fit, weights
from fastai.basics import DataLoaders, Learner, load_learner, set_seed
from fastai.callback.all import (
    ActivationStats,
    CSVLogger,
    CutMix,
    EarlyStoppingCallback,
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    MixUp,
    ModelResetter,
    RNNCallback,
    SaveModelCallback,
)
from fastai.callback.core import Callback
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from torch import nn

from fastsb.all import *


def ours(learn):
    return [cb for cb in learn.cbs if isinstance(cb, SelectiveBackpropCallback)]


# the one-liner
# ---------------------------------------------------------------------------------------------------------
def test_one_line_replace_and_remove():
    learn = digits_learner()
    cbs, metrics, lf = sorted(map(repr, learn.cbs)), list(learn.metrics), learn.loss_func
    assert learn.selective_backprop(**fresh()) is learn
    learn.selective_backprop(**fresh(beta=3))
    assert len(ours(learn)) == 1 and learn.sb is ours(learn)[0] and learn.sb.selector.beta == 3
    quiet_fit(learn, 2)
    learn.remove_cb(SelectiveBackpropCallback)
    assert (
        sorted(map(repr, learn.cbs)) == cbs
        and list(learn.metrics) == metrics
        and learn.loss_func is lf
        and lf.reduction == "mean"
    )
    assert not hasattr(learn, "sb") and callable(learn.selective_backprop)
    set_seed(5)
    quiet_fit(learn, 1)
    assert "selected" not in learn.recorder.metric_names


def test_as_an_argument_of_fit():
    cb = SelectiveBackpropCallback(**fresh(beta=2))
    learn = quiet_fit(digits_learner(), 2, cbs=cb)
    assert cb.log.fp.tolist() == [0, 640] and not hasattr(learn, "sb")
    learn.selective_backprop(**fresh())
    with pytest.raises(ValueError, match="two SelectiveBackpropCallbacks"):
        quiet_fit(learn, 1, cbs=SelectiveBackpropCallback(**fresh()))


def test_each_fit_starts_afresh():
    learn = digits_learner().selective_backprop(**fresh())
    quiet_fit(learn, 3)
    quiet_fit(learn, 2)
    log = learn.sb.log
    assert (
        log.fit.tolist() == [0, 0, 0, 1, 1]
        and log.epoch.tolist() == [0, 1, 2, 0, 1]
        and log.fp.tolist() == [0, 640, 640, 0, 640]
    )
    assert learn.sb.counts == dict(candidates=1280, fp=640, bp=log.bp[3:].sum())


def test_fine_tune():
    learn = digits_learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())]).selective_backprop(
        **fresh(start=0)
    )
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(2, freeze_epochs=2)
    assert learn.sb.log.fp.tolist() == [640] * 4 and learn.sb.log.fit.tolist() == [0, 0, 1, 1]


def test_progress_table_and_log(capsys):
    learn = digits_learner().selective_backprop(**fresh(beta=2))
    with learn.no_bar():
        learn.fit(3, 1e-2)
    rows = [eval(o) for o in capsys.readouterr().out.strip().splitlines()]
    assert learn.recorder.metric_names[-2] == "selected"
    assert [r[-2] for r in rows] == learn.sb.log.selected.tolist() and rows[0][-2] == 1.0
    assert list(learn.sb.log.columns) == [
        "fit",
        "epoch",
        "candidates",
        "fp",
        "bp",
        "selected",
        "candidate_loss",
        "trained_loss",
        "scoring_s",
        "training_s",
        "left",
        "top_share",
        "loads",
        "score_age",
        "loading_s",
        "held",
        "oldest",
        "selecting_s",
        "forward_s",
        "backward_s",
        "other_s",
    ]
    assert (
        (learn.sb.log.training_s > 0).all()
        and (learn.sb.log.scoring_s[1:] > 0).all()
        and learn.sb.log.scoring_s[0] == 0
    )


def epochs_took(log):
    return log.loading_s + log.scoring_s + log.selecting_s + log.training_s + log.other_s


class TakesTime(Callback):
    "Moves a clock by hand: 1 s for a batch to come, 7 s in the backward pass, 11 s after the last batch of an epoch"

    order, run_valid = -6, False

    def __init__(self, clock):
        self.clock = clock

    def before_fit(self):
        create_batch = self.dls.train.create_batch
        self.dls.train.create_batch = lambda b: (self.clock.passes(1), create_batch(b))[1]

    def after_backward(self):
        self.clock.passes(7)

    def after_train(self):
        self.clock.passes(11)


class Clock:
    now = 0.0

    def passes(self, seconds):
        self.now += seconds


class SlowPercentile(Percentile):
    def select(self, losses, history, **kw):
        self.clock.passes(5)
        return super().select(losses, history, **kw)


def test_seconds_of_an_epoch_by_what_they_went_to(monkeypatch):
    clock, batches = Clock(), 640 // 32
    monkeypatch.setattr("fastsb.record.time.perf_counter", lambda: clock.now)
    SlowPercentile.clock = clock
    learn = digits_learner()
    learn.selective_backprop(selector=SlowPercentile(1.0), score="model", start=1, end=1.0, batching="prune")
    slow_forward = learn.model.register_forward_hook(lambda m, x, y: clock.passes(3 if torch.is_grad_enabled() else 2))
    quiet_fit(learn, 3, cbs=TakesTime(clock))
    slow_forward.remove()
    log = learn.sb.log[1:]
    for column, seconds in dict(
        loading_s=1 * batches,
        scoring_s=2 * batches,
        selecting_s=5 * batches,
        forward_s=3 * batches,
        backward_s=7 * batches,
        training_s=10 * batches,
        other_s=11,
    ).items():
        np.testing.assert_allclose(log[column], seconds, err_msg=column)
    whole = learn.sb.log.iloc[0]
    assert whole.scoring_s == 0 and whole.forward_s == 3 * batches
    assert whole.selecting_s == 2  # the first batch is tried: can it be scored?


def test_progress_bar_and_csv(tmp_path):
    learn = digits_learner(path=tmp_path).selective_backprop(**fresh(start=0, beta=3))
    with learn.no_logging():
        learn.fit(2, 1e-2, cbs=CSVLogger(fname="h.csv"))
    df = pd.read_csv(tmp_path / "h.csv")
    log = learn.sb.log
    np.testing.assert_allclose(df.selected, log.selected)
    np.testing.assert_allclose(df.loss_held, log.held)
    np.testing.assert_allclose(df.seconds, epochs_took(log))


def test_tensorboard_gets_what_selection_did(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn = digits_learner(path=tmp_path).selective_backprop()
    quiet_fit(learn, 4, cbs=TensorBoardCallback(tmp_path / "tb", trace_model=True, log_preds=False))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    log, scalar = learn.sb.log, lambda name: [e.value for e in events.Scalars(name)]
    np.testing.assert_allclose(scalar("selected"), log.selected)
    np.testing.assert_allclose(scalar("doubt_held"), log.held, rtol=1e-6)
    np.testing.assert_allclose(scalar("seconds"), epochs_took(log), rtol=1e-6)
    steps = [e.step for e in events.Scalars("selected")]
    assert steps == np.cumsum(log.bp // 32).tolist() and learn.sb.counts["candidates"] == 4 * 640
    assert learn.metrics.attrgot("name") == ["accuracy"]


def test_wandb_gets_what_selection_did(monkeypatch):
    import sys
    import types

    said, run = [], types.SimpleNamespace(step=0, summary={})
    config = types.SimpleNamespace(update=lambda *a, **k: None)
    fake = types.ModuleType("wandb")
    fake.__dict__.update(run=run, config=config, log=lambda d, step=None: said.append(d), watch=lambda *a, **k: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    from fastai.callback.wandb import WandbCallback

    # with fastcore 2 fastai's own looks for settings in numbers, and fails on any learner
    monkeypatch.setattr(Learner, "gather_args", lambda self: {})
    learn = digits_learner().selective_backprop()
    quiet_fit(learn, 4, cbs=WandbCallback(log_preds=False))
    epochs, log = [d for d in said if "selected" in d], learn.sb.log
    assert [d["selected"] for d in epochs] == log.selected.tolist()
    assert [d["doubt_held"] for d in epochs] == log.held.tolist() and min(d["seconds"] for d in epochs) > 0


def test_nobody_keeps_the_table():
    learn = quiet_fit(digits_learner().selective_backprop(), 2)
    assert list(learn.recorder.metric_names)[2:-1] == ["valid_loss", "accuracy", "selected"]


def test_dir_is_short():
    learn = digits_learner().selective_backprop()
    names = dir(learn.sb)
    assert {"log", "counts", "plot_selected", "plot_losses", "plot_time", "save", "load"} <= set(names)
    assert all(hasattr(learn.sb, n) for n in names) and len(names) < 40
    assert not {"before_fit", "after_loss", "model", "dls", "__init__"} & set(names)


def test_train_metrics():
    learn = digits_learner().selective_backprop(**fresh(beta=1))
    learn.recorder.train_metrics = True
    seen = []

    def acc(p, t):
        seen.append(len(t))
        return (p.argmax(1) == t).float().mean()

    learn.metrics = acc
    quiet_fit(learn, 2)
    trained = sum(n for n in seen) - 2 * len(learn.dls.valid_ds)
    assert trained == learn.sb.counts["bp"]  # only what was trained on counts


# other ways through the loop
# -------------------------------------------------------------------------------------------
def test_lr_find_and_predictions_do_not_select(tmp_path):
    learn = digits_learner(path=tmp_path).selective_backprop(**fresh(start=0))
    with learn.no_bar():
        learn.lr_find(show_plot=False, num_it=40)
    assert learn.sb.counts["fp"] == 0
    quiet_fit(learn, 1)
    before, log = dict(learn.sb.counts), learn.sb.log
    with learn.no_bar():
        p, t = learn.get_preds()
        pt, tt = learn.get_preds(ds_idx=0)
        v = learn.validate()
    assert len(p) == 100 and len(pt) == 640 and learn.sb.counts == before and len(v) == 2
    assert learn.sb.log.equals(log)
    quiet_fit(learn, 1)
    assert learn.sb.counts["fp"] == 640


@pytest.mark.parametrize("n", [1, 2])
def test_interrupt_and_go_on(n):
    class Stop(Callback):
        order = 70

        def after_batch(self):
            if self.training and self.train_iter >= 25:
                raise KeyboardInterrupt

    learn = digits_learner().selective_backprop(**fresh(beta=1))
    for _ in range(n):
        with pytest.raises(KeyboardInterrupt):
            quiet_fit(learn, 3, cbs=Stop())
    assert len([m for m in learn.metrics if m.name == "selected"]) <= 1
    quiet_fit(learn, 2)
    assert learn.sb.log.fp.tolist()[-2:] == [0, 640] and len(learn.metrics) == 1
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(learn, 3, cbs=Stop())
    learn.remove_cb(SelectiveBackpropCallback)
    assert len(learn.metrics) == 1
    quiet_fit(learn, 1)


def test_early_stopping():
    learn = digits_learner(
        cbs=EarlyStoppingCallback(monitor="valid_loss", min_delta=10.0, patience=1)
    ).selective_backprop(**fresh(start=0))
    quiet_fit(learn, 5)
    assert len(learn.sb.log) == 2 and len(learn.metrics) == 1


# saving -------------------------------------------------------------------------------------------------------------
# --------
def test_export_is_small_and_loads(tmp_path):
    sizes = {}
    for name in ("plain", "selective"):
        learn = digits_learner(n=1600, bs=400, path=tmp_path)
        if name == "selective":
            learn.selective_backprop(**fresh(beta=1, history=100_000, start=0))
        quiet_fit(learn, 3)
        learn.export(f"{name}.pkl")
        sizes[name] = (tmp_path / f"{name}.pkl").stat().st_size
    assert sizes["selective"] - sizes["plain"] < 20_000
    loaded = load_learner(tmp_path / "selective.pkl")
    x, _ = digits(8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.eval()(x), learn.model.eval()(x))
    assert loaded.sb.log.empty and loaded.sb.selector.beta == 1
    with pytest.raises(ValueError, match="fit first"):
        loaded.sb.plot_selected()
    quiet_fit(learn, 2)  # and the exported one goes on
    assert len(learn.sb.log) == 5


def test_save_load_and_resume(tmp_path):
    cb = SaveModelCallback(monitor="valid_loss", fname="m", every_epoch=True)
    learn = digits_learner(path=tmp_path).selective_backprop(**fresh(beta=1, seed=0))
    quiet_fit(learn, 4, cbs=cb)
    resumed = digits_learner(path=tmp_path).selective_backprop(**fresh(beta=1, seed=0))
    resumed.load("m_1", with_opt=True)
    spy = Spy()
    quiet_fit(resumed, 4, cbs=spy, start_epoch=2)
    assert resumed.sb.log.epoch.tolist() == [2, 3] and resumed.sb.log.fp.tolist() == [
        640,
        640,
    ]  # past `start`: selecting at once
    assert spy.pcts[0] >= 0.5 and resumed.pct_train == pytest.approx(1)
    assert resumed.recorder.lrs[0] < 0.8e-2 and resumed.recorder.lrs[-1] < 1e-4  # half-way down, then to the end
    assert resumed.recorder.values[-1][2] > 0.8


def test_learner_pickles_in_mid_life():
    learn = digits_learner().selective_backprop(**fresh(beta=2, seed=1))
    quiet_fit(learn, 2)
    again = pickle.loads(pickle.dumps(learn.sb.selector))
    assert torch.equal(again.uniform(3, "cpu"), learn.sb.selector.uniform(3, "cpu"))


# fastai's callbacks
# -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mix", [MixUp, CutMix])
def test_mixup_mixes_what_was_selected(mix):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scored = digits_model(0), []

        def forward(self, x):
            if not self.training and not torch.is_grad_enabled():
                self.scored.append(x.clone())
            return self.net(x.flatten(1))

    x, y = digits(320)
    x = x.view(-1, 1, 8, 8)
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x[:9], y[:9])), bs=32, device="cpu", num_workers=0)
    spy = Spy()
    learn = Learner(dls, Images(), loss_func=CrossEntropyLossFlat(), cbs=[mix(), spy]).selective_backprop(
        **fresh(start=1, history=64)
    )
    quiet_fit(learn, 3)
    originals = {tuple(o.flatten().tolist()) for o in x}
    scored = torch.cat([o for o in learn.model.scored if len(o) == 32])
    assert all(tuple(o.flatten().tolist()) in originals for o in scored)  # what is scored is not mixed
    trained = torch.cat([b[0][0] for b in spy.batches[10:]])
    assert np.mean([tuple(o.flatten().tolist()) in originals for o in trained]) < 0.7  # what is trained is
    assert isinstance(learn.loss_func, CrossEntropyLossFlat) and learn.loss_func.reduction == "mean"
    assert learn.sb.log.selected[1:].between(0.2, 0.8).all()


def test_gradient_accumulation_counts_what_is_trained():
    steps = Spy()
    learn = digits_learner(cbs=[GradientAccumulation(n_acc=64), steps]).selective_backprop(**fresh(beta=1, start=0))
    quiet_fit(learn, 3)
    assert steps.steps == learn.sb.counts["bp"] // 64
    assert len(learn.recorder.losses) == learn.sb.counts["bp"] // 32


def test_callbacks_together():
    learn = digits_learner(cbs=[GradientClip(0.1), ActivationStats(), MixedPrecision()]).selective_backprop(
        **fresh(beta=1, start=0)
    )
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CUDA's autocast says that there is no CUDA
        quiet_fit(learn, 3)
    assert learn.recorder.values[-1][2] > 0.6 and len(learn.activation_stats.stats) > 0


def test_autocast_trains_in_bf16_and_scores_in_it():
    learn = digits_learner(cbs=Autocast()).selective_backprop(**fresh(start=0))
    kinds = []
    learn.model[0].register_forward_hook(lambda m, i, o: kinds.append((m.training, o.dtype)))
    quiet_fit(learn, 2)
    assert set(kinds) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert not torch.is_autocast_enabled("cpu") and learn.recorder.values[-1][2] > 0.6
    with learn.no_bar():
        learn.validate()


# data and models of other kinds
# ------------------------------------------------------------------------------------------------
def test_several_inputs_and_targets():
    x, y = digits(320)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 10), nn.Linear(32, 10)

        def forward(self, u, v):
            return self.a(u) + self.b(v)

    def loss(p, t, w, reduction="mean"):
        items = nn.functional.cross_entropy(p, t, reduction="none") * w
        return items.mean() if reduction == "mean" else items

    ds = [(o[:32], o[32:], t, torch.tensor(1.0)) for o, t in zip(x, y)]
    dls = DataLoaders.from_dsets(ds, ds[:9], bs=32, device="cpu", num_workers=0)
    dls[0]._n_inp = dls[1]._n_inp = 2
    learn = Learner(dls, Two(), loss_func=loss).selective_backprop(**fresh(start=0))
    quiet_fit(learn, 3)
    assert learn.sb.log.bp.sum() > 300


def test_dicts_in_a_batch():
    x, y = digits(320)

    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = digits_model(0)

        def forward(self, b):
            return self.net(b["pixels"])

    ds = [({"pixels": o}, t) for o, t in zip(x, y)]
    dls = DataLoaders.from_dsets(ds, ds[:9], bs=32, device="cpu", num_workers=0)
    learn = Learner(dls, Dict(), loss_func=CrossEntropyLossFlat()).selective_backprop(**fresh(start=0))
    quiet_fit(learn, 2)
    assert learn.sb.log.bp.sum() > 100


def test_multilabel_and_regression():
    x, y = digits(320)
    for t, lf, n in (
        (torch.eye(10)[y], BCEWithLogitsLossFlat(), 10),
        (torch.stack([y, y]).T.float(), MSELossFlat(), 2),
    ):
        ds = list(zip(x, t))
        dls = DataLoaders.from_dsets(ds, ds[:9], bs=32, device="cpu", num_workers=0)
        learn = Learner(dls, nn.Linear(64, n), loss_func=lf).selective_backprop(**fresh(start=0))
        quiet_fit(learn, 3)
        assert learn.sb.log.selected.between(0.05, 0.8).all()


def test_segmentation_keeps_images_whole():
    x, _ = digits(160)
    ds = [(o.view(1, 8, 8), (o.view(8, 8) > 0.5).long()) for o in x]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    spy = Spy()
    learn = Learner(
        DataLoaders.from_dsets(ds, ds[:9], bs=16, device="cpu", num_workers=0),
        model,
        loss_func=CrossEntropyLossFlat(axis=1),
        cbs=spy,
    )
    quiet_fit(learn.selective_backprop(**fresh(start=0)), 3)
    for (xb,), (yb,) in spy.batches:
        assert torch.equal((xb[:, 0] > 0.5).long(), yb)
    assert learn.sb.log.bp.sum() >= 48


def test_tabular():
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner

    x, y = digits(400)
    cont = [f"p{i}" for i in range(20)]
    df = pd.DataFrame(x[:, :20].numpy(), columns=cont).assign(
        kind=[str(int(i) % 3) for i in y], label=[f"d{int(i)}" for i in y]
    )
    dls = TabularDataLoaders.from_df(
        df, y_names="label", cat_names=["kind"], cont_names=cont, procs=[Categorify, Normalize], bs=32, device="cpu"
    )
    learn = tabular_learner(dls, layers=[40]).selective_backprop(**fresh(beta=2))
    quiet_fit(learn, 4)
    assert learn.sb.log.selected[1:].between(0.1, 0.6).all()
    quiet_fit(learn.selective_backprop(**fresh(beta=2, batching="prune")), 2)


def test_recurrent_models_return_more_than_a_prediction():
    """fastai's text classifiers return (prediction, raw, dropped); RNNCallback takes the first. Padding differs from
    batch to batch"""

    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.out = nn.Embedding(17, 16), nn.Linear(16, 10)

        def reset(self):
            pass

        def forward(self, x):
            raw = self.emb(x)
            return self.out(raw.mean(1)), raw, raw

    class Padded:
        bs, n_inp = 32, 1

        def __init__(self):
            self.x, self.y = digits(320)

        def __len__(self):
            return 10

        def to(self, device):
            self.device = device

        def __iter__(self):
            for i, idx in enumerate(torch.arange(320).split(32)):
                yield (self.x[idx, i:] * 16).long(), self.y[idx]

    dls = DataLoaders(Padded(), Padded())
    learn = Learner(dls, Rnn(), loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback()])
    quiet_fit(learn.selective_backprop(**fresh(start=0, batching="prune")), 2)
    assert learn.sb.log.selected.between(0.2, 0.8).all()


def test_a_language_model_is_refused():
    from fastai.text.data import LMDataLoader

    learn = digits_learner().selective_backprop(**fresh())
    lm = LMDataLoader([torch.arange(50)] * 20, bs=4, seq_len=5)
    learn.dls.loaders[0] = lm
    with pytest.raises(ValueError, match="LMDataLoader"):
        quiet_fit(learn, 1)


def test_no_targets_is_refused():
    x, _ = digits(64)
    dls = DataLoaders.from_dsets([(o,) for o in x], [(o,) for o in x], bs=32, device="cpu", num_workers=0)
    learn = Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match="no targets"):
        quiet_fit(learn.selective_backprop(**fresh()), 1)


def test_channels_last_stays():
    x, y = digits(320)
    x = x.view(-1, 1, 8, 8).expand(-1, 3, 8, 8)
    spy = Spy()

    class ToChannelsLast(Callback):
        order = -7

        def before_batch(self):
            self.learn.xb = (self.xb[0].contiguous(memory_format=torch.channels_last),)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)).to(memory_format=torch.channels_last)
    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x[:9], y[:9])), bs=32, device="cpu", num_workers=0)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[spy, ToChannelsLast()]).selective_backprop(
        **fresh(start=0)
    )
    quiet_fit(learn, 2)
    assert spy.batches and all(b[0][0].is_contiguous(memory_format=torch.channels_last) for b in spy.batches)


# it learns
# --------------------------------------------------------------------------------------------------------------------
def test_it_trains_as_well_on_fewer_examples():
    accs = {}
    for name, kw in (("plain", None), ("sb", dict(beta=1)), ("exact", dict(beta=1, exact=True))):
        learn = digits_learner(n=1400)
        if kw:
            learn.selective_backprop(**fresh(**kw))
        quiet_fit(learn, 8)
        accs[name] = learn.recorder.values[-1][2]
        if kw:
            assert learn.sb.counts["bp"] < 0.65 * learn.sb.counts["candidates"]
    assert min(accs["sb"], accs["exact"]) > accs["plain"] - 0.05, accs
    assert len(weights(learn)) > 0
