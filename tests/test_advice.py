"Will it pay? Two epochs that leave no trace, and figures that are those of the results."

import numpy as np
import pytest
import torch
from common import digits_learner, quiet_fit, weights
from fastai.callback.core import Callback
from fastai.losses import MSELossFlat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsb.advice
from fastsb.advice import expected_share, measured
from fastsb.callback import SelectiveBackpropCallback
from fastsb.select import TopK


class Entropies(Callback):
    "The doubt of each row, kept as moving averages in NumPy"

    order = 60

    def before_fit(self):
        self.doubt = {}

    def after_loss(self):
        p = torch.softmax(self.pred.detach().double(), 1)
        for i, d in zip(self.learn.sb._rows.tolist(), (-p * p.log()).sum(1).tolist()):
            self.doubt[i] = (self.doubt[i] + d) / 2 if i in self.doubt else d


def test_what_it_says_of_doubt_is_so():
    learn = digits_learner(p=0)
    seen = Entropies()
    learn.add_cb(seen)
    a = learn.sb_advice(lr=0.01)
    d = np.sort(list(seen.doubt.values()))[::-1]
    held = d.cumsum() / d.sum()
    assert a.kept == pytest.approx((d >= 0.7 * d.mean()).mean(), abs=2 / len(d))
    assert a.half_holds == pytest.approx(held[len(d) // 2 - 1], abs=0.01)
    assert a.items == 640 and a.item_s > 0 and 0 < a.loading < 1 and a.scoring > 0
    near, share, (low, high) = expected_share(a.kept, 12)
    assert low <= share <= high and a.share == share and a.pays == (high < 1) and near in a.why


@pytest.mark.parametrize("before", ["new", "trained", "selecting"])
def test_it_leaves_no_trace(before, capsys):
    def made():
        learn = digits_learner(cbs=None)
        if before == "selecting":
            learn.selective_backprop(selector=TopK(0.3))
        return learn if before == "new" else quiet_fit(learn, 2)

    learn, other = made(), made()
    rng, cbs, lrs = torch.get_rng_state(), list(learn.cbs), list(getattr(learn.recorder, "lrs", []))
    learn.sb_advice(epochs=8, lr=0.05)
    assert torch.equal(rng, torch.get_rng_state())
    assert set(map(id, learn.cbs)) == set(map(id, cbs)) and list(getattr(learn.recorder, "lrs", [])) == lrs
    assert (learn.opt is None) == (before == "new") and "fastsb:" not in capsys.readouterr().out
    if before == "selecting":
        assert isinstance(learn.sb.selector, TopK) and learn.sb.log.fit.max() == 0
    learn.dls.rng.setstate(other.dls.rng.getstate()) if hasattr(learn.dls, "rng") else None
    assert torch.equal(weights(learn), weights(other))
    for a, b in zip(learn.model.buffers(), other.model.buffers()):
        assert torch.equal(a, b)
    if before != "new":
        a, b = (o.opt.state_dict()["state"] for o in (learn, other))
        assert all(torch.equal(torch.as_tensor(x[k]), torch.as_tensor(y[k])) for x, y in zip(a, b) for k in x)


def test_it_leaves_no_trace_of_a_failure():
    class Fails(Callback):
        def after_step(self):
            raise KeyError("mine")

    learn = digits_learner(cbs=Fails())
    w = weights(learn)
    with pytest.raises(KeyError, match="mine"):
        learn.sb_advice(lr=0.05)
    assert torch.equal(w, weights(learn)) and not hasattr(learn, "sb")


def test_a_part_of_an_epoch():
    a = digits_learner().sb_advice(lr=0.01, batches=3)
    assert a.items == 3 * 32 and 0 < a.kept <= 1


@pytest.mark.parametrize(
    "learn, kw, says",
    [
        (lambda: digits_learner(), dict(epochs=3), "3 epochs are too few"),
        (lambda: digits_learner(loss_func=MSELossFlat(), model=nn.Linear(64, 1)), {}, "only losses over classes show"),
        (lambda: digits_learner(loss_func=lambda p, y: p.mean()), {}, "only losses over classes show"),
    ],
)
def test_no_is_said_without_training(learn, kw, says, capsys):
    learn = learn()
    w = weights(learn)
    a = learn.sb_advice(**kw)
    out = capsys.readouterr().out
    assert not a.pays and a.share == 1 and says in a.why and out.startswith("No: ") and out.count("\n") == 1
    assert torch.equal(w, weights(learn)) and "pays=False" in repr(a)


def test_a_loader_that_tells_no_items():
    learn = digits_learner()
    x = torch.randn(64, 64)
    dl = DataLoader(TensorDataset(x, torch.zeros(64, dtype=torch.long)), 32)
    dl.device, dl.bs = torch.device("cpu"), 32
    learn.dls.loaders[0] = dl
    assert "nothing can be remembered" in learn.sb_advice().why


class Same(nn.Module):
    "As sure of everything as its weights say"

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return self.w.expand(len(x), 10)


@pytest.mark.parametrize("sure", [0, 1e4])
def test_doubt_that_is_the_same_everywhere(sure):
    "Then all of it is kept; and of none there is nothing to go by"
    a = digits_learner(model=Same(sure * torch.eye(10)[0])).sb_advice(lr=1e-9)
    if sure:
        assert not a.pays and "nothing to go by" in a.why
    else:
        assert a.kept == 1 and a.half_holds == pytest.approx(0.5, abs=0.01)


def test_between_lengths_and_data():
    for m in measured:
        name, share, (low, high) = expected_share(m["kept"], m["epochs"])
        assert (name, share, low, high) == (m["data"], pytest.approx(m["share"]), *map(pytest.approx, m["interval"]))
    first = [m for m in measured if m["data"] == measured[0]["data"]]
    shares = [m["share"] for m in first]
    between = np.sqrt(first[0]["epochs"] * first[1]["epochs"])
    assert expected_share(first[0]["kept"], between)[1] == pytest.approx(np.mean(shares[:2]))
    assert expected_share(first[0]["kept"], 1e4)[1] == shares[-1]


@pytest.mark.parametrize("kw, says", [(dict(epochs=0), "epochs=0"), (dict(batches=1), "batches=1")])
def test_wrong_arguments(kw, says):
    with pytest.raises(ValueError, match=says):
        digits_learner().sb_advice(**kw)
    assert fastsb.advice.SelectiveBackpropCallback is SelectiveBackpropCallback
