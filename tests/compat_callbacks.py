"The callbacks that fastai ships: how each is used, and by what one sees that it has done its work."

import contextlib
import io
import re
from types import SimpleNamespace

import fastai.callback.all  # noqa: F401
import pandas as pd
import torch
from common import digits, own_methods
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import (
    EarlyStoppingCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
    TrackerCallback,
)
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.torch_core import find_bs
from torch import nn

from fastsb.all import Autocast, SelectiveBackpropCallback, TopK

MODES = {
    "default": lambda learn: learn.selective_backprop(),
    "beta=1": lambda learn: learn.selective_backprop(beta=1),
    "TopK(.5)": lambda learn: learn.selective_backprop(selector=TopK(0.5)),
    "infobatch": lambda learn: learn.infobatch(),
    "stale=2": lambda learn: learn.selective_backprop(beta=1, stale=2),
    "batch_loss_filter": lambda learn: learn.batch_loss_filter(),
}


def chooser(learn):
    return learn.cbs.filter(lambda cb: isinstance(cb, SelectiveBackpropCallback))[0]


# what is trained


class Net(nn.Module):
    "A small network for images, which can look like one for text to callbacks"

    def __init__(self, several):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2)
        self.lin = nn.Linear(4 * 36, 10)
        self.several, self.resets, self.dtypes, self.last = several, 0, set(), None

    def reset(self):
        self.resets += 1

    def forward(self, x):
        h = self.drop(self.bn(self.conv(x)).relu())
        out = self.lin(h.flatten(1))
        self.dtypes.add(out.dtype)
        self.last = x.is_contiguous(memory_format=torch.channels_last)
        return (out, h.flatten(2), h.flatten(2)) if self.several else out


class Watch(Callback):
    "Looks on, after all others"

    order = 100

    def before_fit(self):
        self.rows = self.batches = self.valid_batches = self.steps = 0
        self.inputs, self.epochs, self.norms, self.lrs, self.added = [], [], [], [], []

    def before_batch(self):
        if not self.training:
            self.valid_batches += 1
            return
        self.rows, self.batches = self.rows + find_bs(self.yb), self.batches + 1
        self.inputs.append(self.xb[0].detach().flatten(1))
        self.epochs.append(self.epoch)
        self.lrs.append(self.opt.hypers[-1]["lr"])

    def after_loss(self):
        if self.training:
            self.added.append((self.learn.loss_grad - self.learn.loss).item())

    def before_step(self):
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.norms.append(torch.cat(grads).norm().item())

    def after_step(self):
        self.steps += 1


class Poison(Callback):
    "From the third epoch on, predictions are NaN"

    order = 5

    def after_pred(self):
        if self.training and self.epoch == 2 and not hasattr(self.learn, "lr_finder"):
            self.learn.pred = self.learn.pred * float("nan")


class Writer:
    "In place of TensorBoard's"

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, at):
        self.scalars.append((name, at))

    def add_graph(self, *args):
        pass

    def close(self):
        pass


class Board(TensorBoardCallback):
    def _setup_writer(self):
        self.writer = Writer()


def mixed(learn, w):
    "Do the inputs differ from all that the data set has?"
    data = torch.stack([learn.dls.train_ds[i][0] for i in range(len(learn.dls.train_ds))]).flatten(1)
    return (torch.cdist(torch.cat(w.inputs), data).min(1).values > 1e-3).float().mean() > 0.2


def entry(make, effect, prepare=None, after=None, **fit):
    return SimpleNamespace(make=make, effect=effect, prepare=prepare or (lambda learn: None), fit=fit)


def find_lr(learn):
    with learn.no_bar():
        learn.found = learn.lr_find(num_it=12, show_plot=False)


def freeze_bn(learn):
    learn.model.bn.requires_grad_(False)


# beside these the progress table has what was held and the seconds as well as `selected`
LOGGERS = ("CSVLogger", "TensorBoardCallback")
never = dict(monitor="valid_loss", min_delta=100.0)  # no epoch is better by so much
rows_of = lambda learn: len(learn.recorder.values)

# by name: callbacks for a folder; has it done its work (learner, what was watched)?; what comes before the fit
CALLBACKS = {
    "MixUp": entry(lambda p: [MixUp(0.4)], mixed),
    "CutMix": entry(lambda p: [CutMix()], mixed),
    "SaveModelCallback": entry(lambda p: [SaveModelCallback()], lambda l, w: (l.path / "models/model.pth").exists()),
    "EarlyStoppingCallback": entry(
        lambda p: [EarlyStoppingCallback(patience=2, **never)], lambda l, w: rows_of(l) == 3
    ),
    "ReduceLROnPlateau": entry(
        lambda p: [ReduceLROnPlateau(patience=1, **never)], lambda l, w: w.lrs[-1] < 0.2 * w.lrs[0]
    ),
    "TrackerCallback": entry(lambda p: [TrackerCallback()], lambda l, w: l.tracker.best < 100),
    "TerminateOnNaNCallback": entry(
        lambda p: [TerminateOnNaNCallback(), Poison()], lambda l, w: w.epochs[-1] == 2 and w.epochs.count(2) == 1
    ),
    "CSVLogger": entry(
        lambda p: [CSVLogger(p / "h.csv")],
        lambda l, w: len(pd.read_csv(l.path / "h.csv")) == rows_of(l),
    ),
    "GradientAccumulation": entry(lambda p: [GradientAccumulation(32)], lambda l, w: 0 < w.steps <= w.rows / 32),
    "GradientClip": entry(lambda p: [GradientClip(0.01)], lambda l, w: max(w.norms) < 0.0101),
    "MixedPrecision": entry(lambda p: [MixedPrecision()], lambda l, w: l.model.dtypes == {torch.float32}),
    "Autocast": entry(lambda p: [Autocast()], lambda l, w: torch.bfloat16 in l.model.dtypes),
    "ShowGraphCallback": entry(
        lambda p: [ShowGraphCallback()],
        lambda l, w: l.show_graph.nb_batches[-1] == w.batches and len(l.show_graph.nb_batches) == len(set(w.epochs)),
    ),
    "FetchPredsCallback": entry(lambda p: [FetchPredsCallback()], lambda l, w: tuple(l.fetched[0].shape) == (32, 10)),
    "ParamScheduler": entry(
        lambda p: [ParamScheduler({"lr": SchedCos(5e-2, 5e-4)})],
        lambda l, w: w.lrs == sorted(w.lrs)[::-1] and w.lrs[-1] < 3e-3,
    ),
    "LRFinder": entry(
        lambda p: [], lambda l, w: 0 < l.found.valley < 10 and not hasattr(l, "lr_finder"), prepare=find_lr
    ),
    "ActivationStats": entry(lambda p: [ActivationStats()], lambda l, w: len(l.activation_stats.stats) == w.batches),
    "BnFreeze": entry(lambda p: [BnFreeze()], lambda l, w: l.model.bn.running_mean.abs().max() == 0, prepare=freeze_bn),
    "ModelResetter": entry(lambda p: [ModelResetter()], lambda l, w: l.model.resets > 2 * rows_of(l)),
    "RNNRegularizer": entry(
        lambda p: [RNNCallback(), RNNRegularizer(0.2, 0.1)], lambda l, w: len(w.added) > 0 and min(w.added) > 0.001
    ),
    "ChannelsLast": entry(
        lambda p: [ChannelsLast()],
        lambda l, w: l.model.conv.weight.is_contiguous(memory_format=torch.channels_last),
    ),
    "ShortEpochCallback": entry(
        lambda p: [ShortEpochCallback(0.5)],
        lambda l, w: 0 < w.epochs.count(0) <= 5 and w.valid_batches < 2 * rows_of(l) + 1,
    ),
    "GatherPredsCallback": entry(lambda p: [], lambda l, w: tuple(l.get_preds()[0].shape) == (32, 10)),
    "MCDropoutCallback": entry(
        lambda p: [], lambda l, w: not l.get_preds(cbs=[MCDropoutCallback()])[0].equal(l.get_preds()[0])
    ),
    "CollectDataCallback": entry(
        lambda p: [CollectDataCallback()], lambda l, w: len(l.collect_data.data) == w.batches + w.valid_batches
    ),
    "TensorBoardCallback": entry(
        lambda p: [Board(trace_model=False, log_preds=False)],
        lambda l, w: [at for n, at in l.board.writer.scalars if n == "train_loss"][-1] == w.batches,
    ),
    "ProgressCallback": entry(lambda p: [], lambda l, w: len(re.findall(r"\d\d:\d\d +\n", l.printed)) == rows_of(l)),
    "Recorder": entry(lambda p: [], lambda l, w: len(l.recorder.losses) == len(l.recorder.lrs) == w.batches),
    "SkipToEpoch": entry(lambda p: [], lambda l, w: min(w.epochs) == 1, start_epoch=1),
}


def learner(names, path):
    set_seed(1)
    x, y = digits(160)
    x = torch.stack([x, 1 - x], 1).reshape(-1, 2, 8, 8)
    of = lambda a, b: Items(x[a:b], y[a:b])
    dls = DataLoaders.from_dsets(of(0, 128), of(128, 160), bs=16, device="cpu", num_workers=0)
    return Learner(
        dls,
        Net("RNNRegularizer" in names),
        loss_func=CrossEntropyLossFlat(),
        metrics=accuracy,
        path=path,
        cbs=[cb for name in names for cb in CALLBACKS[name].make(path)],
    )


class Items(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]

    def new_empty(self):
        return Items(self.x[:0], self.y[:0])


def fit(names, mode, path):
    "Fit with these callbacks, in one of MODES or plainly (None); what was seen of it"
    learn, out = learner(names, path), io.StringIO()
    res = SimpleNamespace(error=None, share=1.0, learn=learn)
    if mode:
        MODES[mode](learn)
    watch = Watch()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            for name in names:
                CALLBACKS[name].prepare(learn)
            before = own_methods(learn), learn.loss_func, len(learn.dls.train)
            kwargs = {k: v for name in names for k, v in CALLBACKS[name].fit.items()}
            learn.fit(4, 0.07, cbs=watch, **kwargs)
        except Exception as e:
            res.error = e
        res.restored = before == (own_methods(learn), learn.loss_func, len(learn.dls.train))
        learn.printed = out.getvalue()
        take_off(learn)
        with learn.no_bar(), learn.no_logging():
            if res.error is None:
                res.values = [len(v) for v in learn.recorder.values]
                res.effects = {name: works(CALLBACKS[name].effect, learn, watch) for name in names}
            res.validates = validates(learn)
    if mode and res.error is None:
        counts = chooser(learn).counts
        res.counted = counts["bp"] == watch.rows
        res.share = counts["bp"] / max(counts["candidates"], 1)
        res.selected = chooser(learn).log.selected.tolist()
    return res


def take_off(learn):
    """What ends badly outside of a fit, in plain fastai too: a `FetchPredsCallback` fetches without end,
    a `TerminateOnNaNCallback` looks at what the poison has left"""
    learn.remove_cb(TerminateOnNaNCallback)
    if hasattr(learn, "fetch_preds"):
        learn.fetched = getattr(learn.fetch_preds, "preds", None)
        learn.remove_cb(FetchPredsCallback)


def validates(learn):
    "How many numbers a validation gives, or how it ends"
    try:
        return len(learn.validate())
    except Exception as e:
        return type(e).__name__


def works(effect, learn, watch):
    try:
        return bool(effect(learn, watch))
    except (AttributeError, IndexError, ValueError):  # what it looks at is not there
        return False


def refused(names, mode):
    "What the sentence must hold where a mode cannot work with these callbacks; None where it can"
    mixes = [name for name in names if name in ("MixUp", "CutMix")]
    return f"{mixes[0]} mixes them" if mixes and mode == "infobatch" else None
