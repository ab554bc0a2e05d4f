"""A fit that saves after each epoch and kills its process at a given batch; and how one goes on from what was saved
last."""

import os
import signal
from pathlib import Path

import torch
from common import digits_learner
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback

from fastsb.select import GradNorm, InfoBatch

torch.set_num_threads(1)
FRESH = dict(beta=1, score="model", start=1, end=1.0)
MODES = {
    "default": {},
    "beta=1": dict(beta=1),
    "model": dict(beta=1, score="model"),
    "paper": dict(paper=True, seed=3),
    "two_stage": dict(beta=1, score="two_stage", start=1),
    "infobatch": dict(selector=lambda: InfoBatch(seed=1), score="cached", momentum=0.0, start=1, end=0.875),
    "stale": dict(FRESH, stale=2),
    "gradnorm": dict(selector=lambda: GradNorm(2, tau=1.0, seed=1), score="model", start=1, end=1.0),
    "interrupt": dict(FRESH, interrupt=3),
}
EPOCHS = 6


class Kill(Callback):
    "SIGKILL after so many batches"

    order = 80

    def __init__(self, batches):
        self.left = batches

    def after_batch(self):
        if not self.training:
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def learner(mode, path):
    kw = {k: v() if k == "selector" else v for k, v in MODES[mode].items()}
    return digits_learner(n=333, p=0.2, path=path, drop_last=False).selective_backprop(**kw)


def fit(learn, start_epoch=0, cbs=()):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(
            EPOCHS, 1e-2, start_epoch=start_epoch, cbs=[SaveModelCallback(every_epoch=True, with_opt=True), *cbs]
        )
    return learn


def resume(mode, path, epoch):
    "Go on after `epoch`, -1 for the beginning"
    learn = learner(mode, path)
    if epoch < 0:
        return fit(learn)
    learn.load(f"model_{epoch}", with_opt=True)
    learn.sb.load(f"model_{epoch}")
    return fit(learn, epoch + 1)


def saved(path):
    "The last epoch of which model and state are there, -1 if none"
    models = Path(path) / "models"
    return max(
        (e for e in range(EPOCHS) if (models / f"model_{e}.pth").exists() and (models / f"model_{e}.sb.pth").exists()),
        default=-1,
    )
