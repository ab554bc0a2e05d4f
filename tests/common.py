"What several test files share: a small learner on scikit-learn's digits, and spies."
import numpy as np
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, set_seed
from fastai.callback.core import Callback
from sklearn.datasets import load_digits
from torch import nn

import fastsb.all  # noqa: F401  (patches Learner)


def digits(n=1000):
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:n] / 16, dtype=torch.float32), torch.tensor(y[:n])


class NoisyRows(torch.utils.data.Dataset):
    "Rows with random augmentation from torch's global generator"

    def __init__(self, x, y, noise=0.05):
        self.x, self.y, self.noise = x, y, noise

    def __len__(self):
        return len(self.x)

    def new_empty(self):
        return NoisyRows(self.x[:0], self.y[:0], self.noise)

    def __getitem__(self, i):
        return self.x[i] + self.noise * torch.randn(self.x[i].shape), self.y[i]


class FirstColumn(nn.Module):
    "Predicts the first input, where tests plant a number; has something to train"

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x[:, 0] + 0 * self.w


def digits_model(p=0.2, width=50):
    return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, 10))


def digits_learner(n=640, bs=32, noise=0.05, p=0.2, cbs=None, model=None, loss_func=None, metrics=accuracy, seed=1, drop_last=True, **kwargs):
    set_seed(seed)
    x, y = digits(n + 100)
    dls = DataLoaders.from_dsets(NoisyRows(x[:n], y[:n], noise), NoisyRows(x[n:], y[n:], 0), bs=bs, device="cpu", num_workers=0)
    if not drop_last:
        dls[0].drop_last = False
    return Learner(dls, model or digits_model(p), loss_func=loss_func or CrossEntropyLossFlat(), metrics=metrics, cbs=cbs, **kwargs)


def quiet_fit(learn, n=2, lr=1e-2, cbs=None, how="fit_one_cycle", **kwargs):
    with learn.no_bar(), learn.no_logging():
        getattr(learn, how)(n, lr, cbs=cbs, **kwargs)
    return learn


def weights(learn):
    return torch.cat([v.detach().flatten().double() for v in learn.model.state_dict().values()])


def everything(model):
    "All that a scoring pass could change: parameters, buffers, gradients, flags, random states"
    state = [v.clone() for v in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    return state, grads, flags, torch.get_rng_state(), np.random.get_state()[1].tolist()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(i, j) for i, j in zip(a, b))
    return a == b


class Spy(Callback):
    "Writes down, from outside, what is trained on"

    order = 55

    def before_fit(self):
        self.pcts, self.steps, self.batches, self.losses, self.events = [], 0, [], [], []

    def before_batch(self):
        if self.training:
            self.pcts.append(self.pct_train)
            self.batches.append((self.xb, self.yb))

    def after_loss(self):
        if self.training:
            self.losses.append((self.learn.loss.item(), len(self.yb[0])))

    def after_step(self):
        self.steps += 1
