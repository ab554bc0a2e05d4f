"Tasks: small data of each kind, a model and a loss for it, as one would train it with fastai."

import contextlib
import io
from types import SimpleNamespace

import fastai.callback.all  # noqa: F401
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import digits, own_methods
from compat_callbacks import MODES, chooser
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, MSELossFlat, set_seed
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (
    AWD_LSTM,
    TextDataLoaders,
    awd_lstm_clas_config,
    awd_lstm_lm_config,
    language_model_learner,
    text_classifier_learner,
)
from torch import nn


def of_items(items, model, loss, n_inp=1, bs=16):
    dls = DataLoaders.from_dsets(items[:96], items[96:128], bs=bs, device="cpu", num_workers=0)
    for dl in dls.loaders:
        dl._n_inp = n_inp
    return Learner(dls, model, loss_func=loss)


def images(n=128):
    x, y = digits(n)
    return x.reshape(-1, 1, 8, 8), y


def dense(*sizes):
    return nn.Sequential(nn.Flatten(), *(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))


def classification():
    return of_items(list(zip(*images())), dense(64, 10), CrossEntropyLossFlat())


def multi_label():
    x, y = images()
    return of_items(list(zip(x, F.one_hot(y, 10).float())), dense(64, 10), BCEWithLogitsLossFlat())


def segmentation():
    x, _ = images()
    y = (x[:, 0] > 0.5).long()
    y[::2, :5] = 255  # void
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return of_items(list(zip(x, y)), model, CrossEntropyLossFlat(axis=1, ignore_index=255))


def points():
    x, _ = images()
    grid = torch.linspace(-1, 1, 8)
    mass = x[:, 0] / x[:, 0].sum((1, 2), keepdim=True)
    y = torch.stack([(mass.sum(1) * grid).sum(1), (mass.sum(2) * grid).sum(1)], 1)
    return of_items(list(zip(x, y)), dense(64, 2), MSELossFlat())


def tabular():
    r = np.random.RandomState(0)
    df = pd.DataFrame(dict(kind=r.choice(list("abc"), 160), size=r.randn(160), weight=r.randn(160)))
    df.loc[::9, "weight"] = np.nan
    df["good"] = np.where((df["size"] > 0) ^ (df.kind == "a"), "yes", "no")
    dls = TabularDataLoaders.from_df(
        df, procs=[Categorify, FillMissing, Normalize], cat_names=["kind"], cont_names=["size", "weight"],
        y_names="good", valid_idx=list(range(128, 160)), bs=16, num_workers=0,
    )  # fmt: skip
    return tabular_learner(dls, layers=[8])


def collab():
    r = np.random.RandomState(0)
    df = pd.DataFrame(dict(user=r.randint(0, 12, 160), item=r.randint(0, 12, 160), rating=r.randint(1, 6, 160)))
    return collab_learner(CollabDataLoaders.from_df(df, bs=16, num_workers=0), n_factors=4, y_range=(0, 5.5))


def text():
    r = np.random.RandomState(0)
    texts = [" ".join(r.choice([f"w{j}" for j in range(9)], r.randint(4, 30))) for _ in range(128)]
    df = pd.DataFrame(dict(text=texts, label=[i % 2 for i in range(128)]))
    dls = TextDataLoaders.from_df(df, text_col="text", label_col="label", bs=16, seq_len=16, num_workers=0)
    config = {**awd_lstm_clas_config, "emb_sz": 4, "n_hid": 4, "n_layers": 1}
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config)


def language_model():
    r = np.random.RandomState(0)
    df = pd.DataFrame(dict(text=[" ".join(r.choice([f"w{j}" for j in range(9)], 40)) for _ in range(20)]))
    dls = TextDataLoaders.from_df(df, text_col="text", is_lm=True, bs=4, seq_len=16, num_workers=0)
    config = {**awd_lstm_lm_config, "emb_sz": 4, "n_hid": 4, "n_layers": 1}
    return language_model_learner(dls, AWD_LSTM, pretrained=False, config=config)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = dense(64, 8), nn.Linear(16, 2)

    def forward(self, a, b):
        return self.head(torch.cat([self.body(a), self.body(b)], 1))


def siamese():
    x, y = images()
    pairs = [(x[i], x[(7 * i) % 128], (y[i] == y[(7 * i) % 128]).long()) for i in range(128)]
    return of_items(pairs, Siamese(), CrossEntropyLossFlat(), n_inp=2)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.digit, self.ink = dense(64, 10), dense(64, 1)

    def forward(self, x):
        return self.digit(x), self.ink(x)


def two_losses(pred, digit, ink, reduction="mean"):
    l = F.cross_entropy(pred[0], digit, reduction="none") + F.mse_loss(pred[1][:, 0], ink, reduction="none")
    return l.mean() if reduction == "mean" else l


def several_targets():
    x, y = images()
    return of_items(list(zip(x, y, x.mean((1, 2, 3)))), TwoHeads(), two_losses)


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = dense(64, 10)

    def forward(self, b):
        return self.body(b["image"])


def dict_batches():
    x, y = images()
    items = [({"image": a, "name": f"{i}.png"}, b) for i, (a, b) in enumerate(zip(x, y))]
    return of_items(items, OfDict(), CrossEntropyLossFlat())


def time_series():
    t = torch.linspace(0, 6, 24)
    kind = torch.arange(128) % 3
    height = torch.tensor([1.0, 1.0, 4.0])  # one kind is easier to tell, so that doubt is uneven
    x = torch.stack([height[k] * torch.sin((k + 1) * t) + 0.3 * torch.randn(24) for k in kind])[:, None]
    model = nn.Sequential(nn.Conv1d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    return of_items(list(zip(x, kind)), model, CrossEntropyLossFlat())


TASKS = {
    "classification": classification,
    "multi-label": multi_label,
    "segmentation with ignored pixels": segmentation,
    "points": points,
    "tabular": tabular,
    "collaborative filtering": collab,
    "padded text": text,
    "language model": language_model,
    "siamese": siamese,
    "several targets": several_targets,
    "batches with dicts and names": dict_batches,
    "time series": time_series,
}

# where the default cannot choose: everything is trained on, and a line holds this
WHOLE = {
    ("points", "default"): "The default goes by doubt, which only losses over classes show, and MSELoss is not",
    (
        "collaborative filtering",
        "default",
    ): "The default goes by doubt, which only losses over classes show, and MSELoss",
    ("several targets", "default"): "The default goes by doubt, which only losses over classes show",
    ("language model", "default"): "The batches of an LMDataLoader are stretches of one long text",
    ("language model", "beta=1"): "The batches of an LMDataLoader are stretches of one long text",
    ("language model", "TopK(.5)"): "The batches of an LMDataLoader are stretches of one long text",
}
# what cannot be done, and is told before anything is trained
REFUSED = {
    ("language model", "infobatch"): "The batches of an LMDataLoader are stretches of one long text",
    ("language model", "stale=2"): "The batches of an LMDataLoader are stretches of one long text",
    ("language model", "batch_loss_filter"): "The batches of an LMDataLoader are stretches of one long text",
}


def train(task, mode):
    "Train a task in one of MODES, or plainly (None); what was seen of it"
    set_seed(1)
    learn, out = TASKS[task](), io.StringIO()
    if mode:
        MODES[mode](learn)
    before = own_methods(learn)
    res = SimpleNamespace(learn=learn, error=None)
    with contextlib.redirect_stdout(out), learn.no_bar():
        try:
            learn.fit(4, 0.1)
        except (TypeError, ValueError) as e:
            res.error = str(e).split(":\n\t", 1)[-1]
    res.lines = [l for l in out.getvalue().splitlines() if l.startswith("fastsb: everything is trained on")]
    res.restored = before == own_methods(learn)
    res.trained = len(getattr(learn.recorder, "losses", []))
    res.finite = res.error is None and all(np.isfinite(v).all() for v in learn.recorder.values)
    if mode and res.error is None:
        counts = chooser(learn).counts
        res.share, res.selected = counts["bp"] / counts["candidates"], chooser(learn).log.selected.tolist()
    return res
