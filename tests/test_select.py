"Every selector against its definition in NumPy, over ordinary and extreme losses."

import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from common import FirstColumn, Spy, digits, digits_learner, fresh, quiet_fit
from fastai.callback.all import MixUp, SchedCos
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    L1LossFlat,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from torch import nn

from fastsb import history, select
from fastsb.all import *
from fastsb.score import Scorer
from fastsb.select import (
    Absolute,
    Capped,
    DoubtAbove,
    DoubtShare,
    GradNorm,
    Hybrid,
    InfoBatch,
    LossShare,
    LowK,
    OrderedPool,
    Random,
    ReducibleLoss,
    Threshold,
    TopK,
    Uncertainty,
    inclusion,
    systematic,
)

devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
rng = np.random.default_rng(0)
inputs = {
    "random": rng.exponential(size=128),
    "tied": rng.integers(0, 4, 128).astype(float),
    "constant": np.full(64, 0.7),
    "zero": np.zeros(32),
    "one": np.array([1.3]),
    "two": np.array([2.0, 1.0]),
    "large": rng.exponential(size=8192),
    "tiny": rng.random(50) * 1e-30,
    "huge": rng.random(50) * 1e30,
    "mixed": np.array([1e-30, 1e30, 0.5, 0.5, 2.0, 1e-30, 3.0]),
    "one holds all": np.array([1e-9] * 40 + [5.0]),
    "negative": rng.normal(size=60),
    "nan": np.where(rng.random(64) < 0.1, np.nan, rng.random(64)),
    "inf": np.array([1.0, np.inf, 2.0, -np.inf, np.nan, 3.0]),
    "all nan": np.full(5, np.nan),
}
names = pytest.mark.parametrize("name", inputs)
on = pytest.mark.parametrize("device", devices)


def losses_of(name, device="cpu"):
    return torch.tensor(inputs[name], dtype=torch.float32, device=device)


def history_of(losses, size=1024):
    h = LossHistory(size)
    h.update(losses)
    return h


def percentile(losses, size=1024):
    "Definition: share of the last `size` finite losses strictly below; 1 for NaN"
    v = losses[np.isfinite(losses)][-size:]
    return np.array([1.0 if np.isnan(x) or not len(v) else (v < x).sum() / len(v) for x in losses])


def bad(losses):
    return ~np.isfinite(losses)


def drawn(sel, p, name, device):
    "With the same uniform draws, exactly those are chosen whose draw is below the expected probability"
    losses = losses_of(name, device)
    u = torch.rand(len(losses), generator=torch.Generator().manual_seed(1)).to(device)
    s = sel.select(losses, history_of(losses), u=u)
    p = np.where(bad(losses.cpu().numpy()), 1.0, p)
    np.testing.assert_allclose(s.p.cpu(), p, rtol=1e-5, atol=1e-7)
    assert s.idx.cpu().tolist() == [i for i in range(len(p)) if u[i] < s.p[i]]
    assert set(np.flatnonzero(bad(losses.cpu().numpy()))) <= set(s.idx.tolist())


@on
@names
def test_percentile_random_hybrid(name, device):
    l = inputs[name].astype(np.float32)
    for beta in (0, 0.5, 1, 3):
        drawn(Percentile(beta), percentile(l) ** beta, name, device)
        drawn(Hybrid(beta, 0.3), 0.3 * percentile(l) ** beta + 0.7 / (beta + 1), name, device)
    drawn(Random(0.3), np.full(len(l), 0.3), name, device)


@on
@names
@pytest.mark.parametrize(
    "make", [lambda: Percentile(2, exact=True), lambda: Random(0.3, exact=True), lambda: Hybrid(1, 0.5, exact=True)]
)
def test_exact_counts(name, make, device):
    losses, sel = losses_of(name, device), make()
    k = max(1, math.floor(sel.keep * len(losses) + 0.5))
    for _ in range(5):
        s = sel.select(losses, history_of(losses))
        assert len(s.idx) == k == len(set(s.idx.tolist())) and s.idx.tolist() == sorted(s.idx.tolist())
        assert float(s.p.double().sum()) == pytest.approx(k, rel=1e-3)
        n_bad = int(bad(inputs[name].astype(np.float32)).sum())
        if n_bad <= k:
            assert set(np.flatnonzero(bad(inputs[name].astype(np.float32)))) <= set(s.idx.tolist())


def reference_inclusion(p, k):
    "Cap at 1 and share out again until nobody is above 1"
    p, sure = p.astype(float), np.zeros(len(p), bool)
    while True:
        rest = p * ~sure
        pi = np.where(sure, 1.0, (k - sure.sum()) * rest / rest.sum() if rest.sum() else 0.0)
        if (pi <= 1 + 1e-12).all():
            return pi
        sure |= pi > 1


@pytest.mark.parametrize("seed", range(20))
def test_inclusion_is_capped_proportional(seed):
    r = np.random.default_rng(seed)
    p = r.exponential(size=r.integers(2, 60)) ** r.choice([0.2, 1, 4]) + 1e-3
    k = int(r.integers(1, len(p) + 1))
    got = inclusion(torch.tensor(p), k)
    np.testing.assert_allclose(got, reference_inclusion(p, k), rtol=1e-6)
    for u in (0.0, 0.5, 1 - 1e-7):
        assert len(set(systematic(got, k, torch.tensor(u)).tolist())) == k


def ranked(key, make, device="cpu"):
    "Candidates by `key`, the lowest first; of equals those first whose number in the first draw is lower"
    return np.lexsort((make().uniform(len(key), device).cpu().numpy(), key))


@on
@names
def test_topk_lowk_threshold(name, device):
    l = inputs[name].astype(np.float32)
    n = len(l)
    for keep in (0.01, 0.3, 0.5, 1.0):
        k = max(1, math.floor(keep * n + 0.5))
        for make, key in ((partial(TopK, keep, seed=4), -l), (partial(LowK, keep, seed=5), l)):
            key = np.where(bad(l), -np.inf, key)  # what is not finite comes first
            want = sorted(ranked(key, make, device)[:k])
            s = make().select(losses_of(name, device), history_of(losses_of(name, device)))
            assert s.idx.tolist() == want and s.p.cpu().nonzero().flatten().tolist() == want
    s = Threshold(0.5).select(losses_of(name, device))
    assert s.idx.tolist() == np.flatnonzero((l > 0.5) | bad(l)).tolist()


def fewest(held, share, least, most, make, device):
    "The first of those with the highest of `held` until they hold `share` of all, from `least` to `most`"
    order, n, total = ranked(-held, make, device), 0, 0.0
    whole = sum(float(held[i]) for i in order)
    while n < most and (total < share * whole or n < least):
        total, n = total + float(held[order[n]]), n + 1
    return order[:n]


def reference_loss_share(l, share, min_samples, make, device):
    lowest = min(0, l[~bad(l)].min()) if (~bad(l)).any() else 0
    held = np.where(bad(l), 0, l - np.float32(lowest))
    least = len(l) if share == 1 else max(1, math.ceil(min_samples * len(l) - 1e-9))
    return sorted({*fewest(held, share, least, len(l), make, device), *np.flatnonzero(bad(l))})


@on
@names
def test_loss_share(name, device):
    l = inputs[name].astype(np.float32)
    for share in (0.0, 0.5, 0.9, 1.0):
        for least in (None, 0.25, 1.0):
            make = partial(LossShare, share, least, seed=1)
            s = make().select(losses_of(name, device))
            assert s.idx.tolist() == reference_loss_share(l, share, least or 0, make, device) and len(s.idx) > 0


@on
@names
def test_doubt_share(name, device):
    "On doubts that are remembered, and that are read from predictions: the fewest that hold the share"
    l = np.abs(inputs[name].astype(np.float32))
    n = len(l)
    for share, floor, ceiling in (
        (0.9, 0.1, 1.0),
        (0.5, 0.0, 1.0),
        (0.95, 0.3, 0.6),
        (0.2, 0.5, 0.5),
        (1.0, 0.1, 0.7),
        (1.0, 0.1, 1.0),
    ):
        make = partial(DoubtShare, share, floor, ceiling, seed=3)
        least = max(1, math.ceil(floor * n - 1e-9))
        most = max(least, math.floor(ceiling * n + 1e-9))
        want = fewest(np.where(bad(l), 0, l), share, most if share == 1 else least, most, make, device)
        s = make().select(torch.tensor(l, device=device))
        assert s.idx.tolist() == sorted({*want, *np.flatnonzero(bad(l))}) and s.w is None
        assert least <= len(want) <= most


def test_doubt_share_of_fresh_predictions():
    pred, y = example(B=200)
    p = pred.double().softmax(1).numpy()
    doubt = -(p * np.log(p)).sum(1)
    falling = np.sort(doubt)[::-1]
    k = int((falling.cumsum() < 0.6 * doubt.sum()).sum()) + 1
    s = DoubtShare(0.6).select(torch.rand(200), loss_func=nn.CrossEntropyLoss(), pred=pred, yb=(y,))
    assert s.idx.tolist() == sorted(np.argsort(-doubt)[:k]) and 20 < k < 120
    assert s.p.nonzero().flatten().tolist() == s.idx.tolist()
    losses = torch.rand(200)
    losses[7] = torch.nan  # what is not finite is kept besides
    assert 7 in DoubtShare(0.6).select(losses, loss_func=nn.CrossEntropyLoss(), pred=pred, yb=(y,)).idx


def test_doubt_share_adapts():
    "Where all are in equal doubt nearly all are kept; where few are, few; where none is, the floor"
    assert len(DoubtShare(0.9).select(torch.ones(1000)).idx) == 900
    assert len(DoubtShare(0.9).select(torch.tensor([1e-6] * 900 + [1.0] * 100)).idx) == 100  # 90 of them hold the share
    assert len(DoubtShare(0.9, floor=0.25).select(torch.zeros(1000)).idx) == 250
    assert (
        repr(DoubtShare(0.9)) == "DoubtShare(share=0.9)"
        and repr(DoubtShare(0.8, 0.2, 0.9)) == "DoubtShare(share=0.8, floor=0.2, ceiling=0.9)"
    )
    assert (
        DoubtShare(1.0).keep == 1 and DoubtShare(0.9).keep is None and not DoubtShare().exact and DoubtShare().global_
    )


@on
@names
def test_doubt_above(name, device):
    "On doubts that are remembered: those of at least a part of the mean; the highest, should these be too few"
    l = np.abs(inputs[name].astype(np.float32))
    doubt = np.where(bad(l), np.float32(0), l)
    for part, floor in ((0.7, 0.1), (1.0, 0.0), (3.0, 0.4), (0.01, 0.1)):
        least = max(1, math.ceil(floor * len(l) - 1e-9))
        enough = min(part * doubt.astype(np.float64).mean(), np.sort(doubt)[-least])
        s = DoubtAbove(part, floor).select(torch.tensor(l, device=device))
        got = set(s.idx.tolist())
        sure = {i for i, d in enumerate(doubt) if d > enough * (1 + 1e-5) or bad(l)[i]}
        assert sure <= got and all(doubt[i] >= enough * (1 - 1e-5) or bad(l)[i] for i in got)
        assert len(got) >= least and s.w is None


def test_doubt_above_of_fresh_predictions():
    pred, y = example(B=200)
    p = pred.double().softmax(1).numpy()
    doubt = -(p * np.log(p)).sum(1)
    s = DoubtAbove(0.7).select(torch.rand(200), loss_func=nn.CrossEntropyLoss(), pred=pred, yb=(y,))
    assert s.idx.tolist() == np.flatnonzero(doubt >= 0.7 * doubt.mean()).tolist() and 50 < len(s.idx) < 190


def test_doubt_above_adapts():
    "Where all are in equal doubt all are kept; where few are, few; where none is, all, as there is nothing to tell"
    assert len(DoubtAbove().select(torch.full((1000,), 0.1)).idx) == 1000
    few = torch.tensor([1e-6] * 880 + [1.0] * 120)
    assert len(DoubtAbove().select(few).idx) == 120 and len(DoubtAbove(floor=0.25).select(few).idx) >= 250
    assert len(DoubtAbove().select(torch.zeros(1000)).idx) == 1000
    assert repr(DoubtAbove()) == "DoubtAbove(part=0.7)" and repr(DoubtAbove(1, 0.2)) == "DoubtAbove(part=1, floor=0.2)"
    assert DoubtAbove(0).keep == 1 and DoubtAbove().keep is None and DoubtAbove().global_
    for kw, says in ((dict(part=-1), "part=-1"), (dict(floor=2), "floor=2"), (dict(like=nn.MSELoss()), "like=")):
        with pytest.raises(ValueError, match=says):
            DoubtAbove(**kw)


@on
@names
def test_capped(name, device):
    l = inputs[name].astype(np.float32)
    capped = percentile(l) > 0.8
    drawn(Capped(Percentile(1), 0.8), np.where(capped, 0, percentile(l)), name, device)
    s = Capped(TopK(0.5), 0.8).select(losses_of(name, device), history_of(losses_of(name, device)))
    assert not set(s.idx.tolist()) & set(np.flatnonzero(capped & ~bad(l)))
    k = max(1, math.floor(0.5 * len(l) + 0.5))
    free = sorted((l[i] for i in range(len(l)) if not capped[i] and not bad(l)[i]), reverse=True)
    kept = sorted((l[i] for i in s.idx.tolist() if not bad(l)[i]), reverse=True)
    assert kept == free[:k]


@on
@pytest.mark.parametrize("B", [1, 7, 8192])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_absolute(B, scale, device):
    r = np.random.default_rng(B)
    pred, y = (r.normal(size=(B, 5)) * scale).astype(np.float32), r.integers(0, 5, B)
    e = np.exp((pred - pred.max(1, keepdims=True)).astype(np.float64))
    want = np.minimum(((e / e.sum(1, keepdims=True) - np.eye(5)[y]) ** 2).sum(1), 1)
    got = Absolute().probs(
        torch.ones(B, device=device), pred=torch.tensor(pred, device=device), yb=(torch.tensor(y, device=device),)
    )
    np.testing.assert_allclose(got.cpu(), want, atol=1e-5)


def test_absolute_is_for_classification():
    for pred, y in (
        (torch.rand(4, 3, 2, 2), torch.zeros(4, 2, 2).long()),
        (torch.rand(4, 3), torch.rand(4, 3)),
        (torch.rand(4, 3), None),
    ):
        with pytest.raises(ValueError, match="classification with one label"):
            Absolute().probs(torch.ones(4), pred=pred, yb=(y,) if y is not None else ())


def example(B=24, C=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, C, generator=g) * 3, torch.randint(C, (B,), generator=g)


def test_gradnorm_bounds_are_gradient_norms():
    pred, y = example()
    t = torch.randn(24, 5)
    cases = [
        (CrossEntropyLossFlat(), y, (pred.softmax(1) - nn.functional.one_hot(y, 5)).norm(dim=1)),
        (nn.MSELoss(), t, 2 / 5 * (pred - t).norm(dim=1)),
        (MSELossFlat(), t, 2 / 5 * (pred - t).norm(dim=1)),
        (BCEWithLogitsLossFlat(), t.sigmoid(), 1 / 5 * (pred.sigmoid() - t.sigmoid()).norm(dim=1)),
        (
            LabelSmoothingCrossEntropyFlat(eps=0.1),
            y,
            (pred.softmax(1) - 0.9 * nn.functional.one_hot(y, 5) - 0.1 / 5).norm(dim=1),
        ),
    ]
    for lf, target, want in cases:
        sel = GradNorm()
        sel.check(lf)
        torch.testing.assert_close(sel.bound(per_item_loss(lf, pred, target), lf, pred, (target,)), want)
    GradNorm().check(FocalLossFlat())
    for lf in (L1LossFlat(), nn.NLLLoss(), nn.KLDivLoss(), lambda p, t: p):
        with pytest.raises(ValueError, match="GradNorm"):
            GradNorm().check(lf)


def test_gradnorm_draws_in_proportion_and_weighs_without_bias():
    pred, y = example()
    lf = nn.CrossEntropyLoss()
    losses = per_item_loss(lf, pred, y)
    sel, n, hits, est = GradNorm(3, seed=0), 4000, torch.zeros(24), []
    q = (pred.softmax(1) - nn.functional.one_hot(y, 5)).norm(dim=1)
    q = q / q.sum()
    for _ in range(n):
        s = sel.select(losses, pred=pred, yb=(y,), loss_func=lf)
        assert len(s.idx) == 8
        hits += torch.bincount(s.idx, minlength=24)
        torch.testing.assert_close(s.w, 1 / (24 * q[s.idx]), rtol=1e-4, atol=1e-5)
        est.append((s.w * losses[s.idx]).mean())
    z = (hits / (8 * n) - q) / (q * (1 - q) / (8 * n)).sqrt().clamp(min=1e-6)
    assert z.abs().max() < 4.5
    est = torch.stack(est)
    assert abs(est.mean() - losses.mean()) < 4 * est.std() / n**0.5


@on
@pytest.mark.parametrize("B", [1, 2, 64, 8192])
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "tiny", "huge", "nan", "inf"])
def test_gradnorm_over_all_inputs(B, kind, device):
    "Squared error, so that the bound is 2/d*||pred-target||: probabilities, draws and weights as in NumPy"
    r = np.random.default_rng(B)
    pred = {
        "random": r.normal(size=(B, 3)),
        "tied": r.integers(0, 3, (B, 3)),
        "constant": np.ones((B, 3)),
        "tiny": r.random((B, 3)) * 1e-30,
        "huge": r.random((B, 3)) * 1e15,
        "nan": r.normal(size=(B, 3)),
        "inf": r.normal(size=(B, 3)),
    }[kind].astype(np.float32)
    if kind in ("nan", "inf"):
        pred[r.random(B) < 0.1] = dict(nan=np.nan, inf=np.inf)[kind]
    target = torch.zeros(B, 3, device=device)
    p, sel, k = torch.tensor(pred, device=device), GradNorm(3), max(1, math.floor(B / 3 + 0.5))
    losses = per_item_loss(nn.MSELoss(), p, target)
    u = torch.rand(k, generator=torch.Generator().manual_seed(5)).to(device)
    s = sel.select(losses, u=u, loss_func=nn.MSELoss(), pred=p, yb=(target,))
    ok = np.isfinite(losses.cpu().numpy())
    g = np.where(ok, 2 / 3 * np.sqrt((pred.astype(np.float64) ** 2).sum(1)), 0)
    if g.max() > 1e-29:
        np.testing.assert_allclose(s.p.cpu().numpy()[ok], (g / g.sum())[ok], rtol=1e-3, atol=1e-6)
    idx, n_bad = s.idx.cpu().numpy(), int((~ok).sum())
    assert len(idx) == k and idx.min() >= 0 and idx.max() < B and s.w.isfinite().all()
    assert list(idx[: min(n_bad, k)]) == list(np.flatnonzero(~ok)[:k]) and (s.w[: min(n_bad, k)] == 1).all()
    q = s.p.cpu().double().numpy()
    rest = idx[n_bad:]
    np.testing.assert_allclose(s.w.cpu().numpy()[n_bad:], 1 / (B * q[rest]), rtol=1e-3)
    cdf = q.cumsum() / max(q.sum(), 1e-30)
    assert all(cdf[i] >= v - 1e-5 and (i == 0 or cdf[i - 1] <= v + 1e-5) for i, v in zip(rest, u.cpu().numpy()[n_bad:]))


@on
@names
def test_reducible_loss_over_all_inputs(name, device):
    l = inputs[name].astype(np.float32)
    r = np.random.default_rng(7)
    items, irr = r.permutation(len(l) + 10)[: len(l)], r.random(len(l) + 10).astype(np.float32)
    for keep in (0.1, 0.5):
        make = partial(ReducibleLoss, torch.tensor(irr), keep, seed=2)
        s = make().select(losses_of(name, device), items=torch.tensor(items, device=device))
        key = np.where(bad(l), -np.inf, -(l - irr[items]))
        assert s.idx.tolist() == sorted(ranked(key, make, device)[: max(1, math.floor(keep * len(l) + 0.5))])


def test_gradnorm_gate():
    "tau from the paper's formula; open when bounds are uneven, closed when they are even; the average forgets by 0.9"
    lf, y = nn.CrossEntropyLoss(), torch.zeros(32).long()
    even, uneven = torch.zeros(32, 5), torch.zeros(32, 5)
    uneven[:30, 0] = 20.0
    sel = GradNorm(3)
    assert sel.tau == 2.0 and not sel.active
    gains = []
    for pred in [even] * 3 + [uneven] * 30 + [even] * 60:
        losses = per_item_loss(lf, pred, y)
        sel.observe(losses, loss_func=lf, pred=pred, yb=(y,))
        g = (pred.softmax(1) - nn.functional.one_hot(y, 5)).norm(dim=1).double().numpy()
        g = g / g.sum()
        one = 1 / np.sqrt(max(1 - ((g - 1 / 32) ** 2).sum() / (g**2).sum(), 1e-12))
        gains.append(one if not gains else 0.9 * gains[-1] + 0.1 * one)
        assert float(sel.gain) == pytest.approx(gains[-1], rel=1e-3) and sel.active == (gains[-1] > 2)
    assert max(gains) > 2 > gains[-1]


def test_gradnorm_in_a_fit_trains_whole_until_the_gate_opens():
    learn = digits_learner(n=1400, noise=0).selective_backprop(**fresh(selector=GradNorm(3, seed=0), start=0))
    quiet_fit(learn, 12)
    log = learn.sb.log
    assert log.fp[0] < log.candidates[0] and log.fp.sum() > 0  # no extra forward pass before
    assert log.selected.iloc[-1] < 0.8 and learn.recorder.values[-1][2] > 0.85


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_reducible_loss_knows_the_items(shuffle, num_workers):
    "The index is planted in the data: what is subtracted is each item's own irreducible loss"
    from fastai.basics import DataLoaders, Learner

    n = 300
    irr, seen = torch.rand(n), []

    class Watch(ReducibleLoss):
        def score(self, losses, items=None, **context):
            seen.append((losses.round().long(), items.clone()))
            return super().score(losses, items=items, **context)

    ds = [(torch.full((2,), float(i)), torch.tensor(i)) for i in range(n)]
    dls = DataLoaders.from_dsets(ds, ds[:20], bs=32, device="cpu", num_workers=num_workers)
    dls.train.shuffle = shuffle
    learn = Learner(dls, FirstColumn(), loss_func=lambda p, t: (p * 0).mean())
    learn.selective_backprop(**fresh(selector=Watch(irr, 0.25), per_item=lambda p, t: p, start=0))
    quiet_fit(learn, 2)
    assert len(seen) == 18 and all(torch.equal(a, b) for a, b in seen)
    assert learn.sb.log.selected.iloc[-1] == pytest.approx(0.25, abs=0.1)


def test_reducible_loss_by_hand():
    losses, irr = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([0.0, 0.0, 4.9, 0.0, 1.9])
    items = torch.tensor([1, 0, 4, 2])
    assert ReducibleLoss(irr, 0.5).select(losses, items=items).idx.tolist() == [0, 1]  # 3-0, 1-0, 2-1.9, 5-4.9
    with pytest.raises(ValueError, match="items="):
        ReducibleLoss(irr).select(losses)


@on
@names
def test_infobatch(name, device):
    l = inputs[name].astype(np.float32)
    ok = ~bad(l)
    low = ok & (l.astype(np.float64) < (l[ok].astype(np.float64).mean() if ok.any() else 0))
    for r in (0.3, 0.5, 0.9):
        u = torch.rand(len(l), generator=torch.Generator().manual_seed(2))
        s = InfoBatch(r).select(losses_of(name, device), u=u.to(device))
        order = [i for i in np.argsort(u.numpy(), kind="stable") if low[i]]
        want = sorted(set(np.flatnonzero(~low)) | set(order[: int(len(order) * (1 - r) + 1e-9)]))
        assert s.idx.tolist() == want
        np.testing.assert_allclose(s.w.cpu(), np.where(low, 1 / (1 - r), 1.0)[want], rtol=1e-6)


def test_infobatch_is_unbiased():
    losses = losses_of("random")
    sel, n = InfoBatch(0.6, seed=0), 3000
    est = torch.stack([(s.w * losses[s.idx]).sum() / len(losses) for _ in range(n) for s in [sel.select(losses)]])
    bias = (int(0.4 * (losses < losses.mean()).sum()) / 0.4 - int((losses < losses.mean()).sum())) / len(
        losses
    )  # int() takes a little less than 1-r
    low = losses[losses < losses.mean()].mean()
    assert abs(est.mean() - losses.mean() - bias * low) < 4 * est.std() / n**0.5


@on
@names
def test_ordered_pool(name, device):
    l = inputs[name].astype(np.float32)
    n, u = len(l), torch.rand(len(l), generator=torch.Generator().manual_seed(3))
    make = lambda: OrderedPool(0.75, 0.4, seed=6)
    s = make().select(losses_of(name, device), u=u.to(device))
    k = max(1, math.floor(0.4 * n + 0.5))
    pool = set(np.argsort(u.numpy(), kind="stable")[: max(math.floor(0.75 * n + 0.5), k)])
    key = np.where(
        bad(l), -np.inf, np.where(np.isin(np.arange(n), list(pool)), -l, np.inf)
    )  # what is not finite comes first
    assert len(s.idx) == k and s.idx.tolist() == sorted(ranked(key, make, device)[:k])
    with pytest.raises(ValueError, match="keep=0.8 must be at most pool=0.5"):
        OrderedPool(0.5, 0.8)


# choosing in a fit ----------------------------------------------------
family = [
    Random(0.5),
    Hybrid(1),
    Absolute(),
    Threshold(0.5),
    TopK(0.5),
    LowK(0.5),
    LossShare(0.9),
    Capped(Percentile(1)),
    GradNorm(2, tau=0),
    Percentile(1, exact=True),
    InfoBatch(),
    OrderedPool(),
]


@pytest.mark.parametrize("batching", ["accumulate", "prune"])
@pytest.mark.parametrize("sel", family, ids=repr)
def test_every_selector_in_a_fit(sel, batching):
    learn = digits_learner().selective_backprop(**fresh(selector=sel, batching=batching, start=1))
    quiet_fit(learn, 3)
    log = learn.sb.log
    assert log.selected[1:].max() < 1 and log.bp.sum() > 640 and log.fp.tolist()[0] == 0
    assert learn.recorder.values[-1][2] > 0.4


@pytest.fixture
def no_host(monkeypatch):
    "Called, it sends everything the way of devices whose memory the host cannot read without waiting"

    def switch():
        for module in (history, select):
            monkeypatch.setattr(module, "host_array", lambda t: None)

    return switch


@names
def test_host_and_device_agree(name, no_host):
    makes = [
        lambda: Percentile(1, seed=1),
        lambda: Percentile(3, exact=True, seed=1),
        lambda: Percentile(0.5, exact=True, seed=2),
        lambda: TopK(0.3, seed=1),
        lambda: LowK(0.3),
        lambda: Random(0.3, exact=True, seed=1),
        lambda: Hybrid(1, 0.5, seed=3),
        lambda: Threshold(0.5),
        lambda: InfoBatch(0.5, seed=1),
        lambda: OrderedPool(0.75, 0.4, seed=1),
        lambda: Capped(TopK(0.3, seed=2), 0.8),
        lambda: LossShare(0.7, seed=3),
        lambda: DoubtShare(0.7, seed=3),
        lambda: Uncertainty(0.4, seed=7),
        lambda: Capped(Percentile(1, exact=True, seed=1), 0.8),
    ]

    def run():
        out = []
        for make in makes:
            h = LossHistory(50)
            for l in (losses_of(name), losses_of("random")[:37], losses_of("nan"), losses_of(name).flip(0)):
                h.update(l)
                s = make().select(
                    l, h
                )  # the device always draws for equals, the host only where there are some: so each begins anew
                out.append((h.values(), h.percentile(l), s.idx, s.p))
        return out

    first = run()
    no_host()
    for (*same, p), (*same2, p2) in zip(first, run(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(same, same2, strict=True))
        torch.testing.assert_close(p, p2, rtol=1e-6, atol=1e-9)


def test_what_numpy_does_not_know():
    "bfloat16, and numbers with a gradient, go the device's way"
    losses = losses_of("mixed").clamp(max=10)
    for l in (losses.bfloat16(), losses.clone().requires_grad_()):
        for make in (lambda: TopK(0.5, seed=1), lambda: LossShare(0.9, seed=1)):
            assert torch.equal(make().probs(l), make().probs(l.detach().float()))
        torch.testing.assert_close(inclusion(l, 3).detach(), inclusion(l.detach().double(), 3))
        h = LossHistory(4)
        h.update(l)
        assert torch.equal(h.percentile(l), h.percentile(l.detach().float()))


def test_the_devices_way_does_not_wait(no_host):
    from test_invariants import Counter

    no_host()
    losses = torch.rand(64)
    for sel, waits in (
        (Percentile(1, exact=True), 0),
        (TopK(0.5), 0),
        (OrderedPool(), 0),
        (Capped(Percentile(1, exact=True)), 0),
        (Percentile(1), 1),
        (Uncertainty(0.5), 0),
        (LossShare(), 1),
        (DoubtShare(), 1),
        (Threshold(0.5), 1),
        (InfoBatch(), 1),
        (Capped(TopK(0.5)), 1),
    ):
        h = LossHistory(100)
        for i in range(5):
            with Counter() as c:
                h.update(losses)
                sel.select(losses, h)
            assert len(c.waiting) == waits or i < 2, (sel, c.waiting)


def test_a_history_moves_between_the_two(no_host, monkeypatch):
    "Either way goes on from the other's state"
    a, b, ls = LossHistory(10), LossHistory(10), losses_of("nan")
    a.update(ls)
    state = a.state_dict()
    no_host()
    b.load_state_dict(state)
    for h in (a, b):
        h.update(ls[:7])
    assert torch.equal(a.values(), b.values()) and b.seen is None
    monkeypatch.undo()
    for h in (a, b):
        h.update(ls[20:26])
    assert torch.equal(a.values(), b.values()) and isinstance(b.seen, int) and a.seen == b.seen and len(b) == 10


def test_no_host_waits_for_counts_that_are_known():
    from test_invariants import Counter

    losses = torch.rand(64)
    h = history_of(losses)
    for sel, waits in (
        (TopK(0.5), 0),
        (LowK(0.5), 0),
        (Percentile(1, exact=True), 0),
        (Random(0.5, exact=True), 0),
        (Percentile(1), 1),
        (LossShare(), 1),
    ):
        sel.select(losses, h)
        with Counter() as c:
            sel.select(losses, h)
        assert len(c.waiting) == waits, (sel, c.waiting)


@pytest.mark.parametrize("rescale", ["sum", "inverse"])
@pytest.mark.parametrize("batching", ["accumulate", "prune"])
def test_the_weighted_loss_of_a_fit_is_the_hand_computed_one(rescale, batching):
    got = []

    class Check(Spy):
        order = 0

        def after_loss(self):
            if not self.training or learn.sb.engine.weights is None:
                return
            w = learn.sb.engine.weights
            items = nn.functional.cross_entropy(self.pred, self.yb[0], reduction="none")
            torch.testing.assert_close(self.learn.loss_grad, (w * items).sum() / len(w))
            torch.testing.assert_close(self.learn.loss, self.learn.loss_grad)
            assert self.learn.loss_grad.requires_grad
            got.append(w)

    learn = digits_learner(cbs=Check()).selective_backprop(
        **fresh(selector=Hybrid(1), rescale=rescale, batching=batching, start=0)
    )
    quiet_fit(learn, 3)
    w = torch.cat(got)
    assert len(got) > 20 and w.std() > 0
    assert w.mean() == pytest.approx(0.5 if rescale == "sum" else 1.0, abs=0.12)


def test_rescale_mean_is_the_loss_itself():
    losses = []
    for kw in (dict(), dict(rescale="mean")):
        learn = quiet_fit(digits_learner().selective_backprop(**fresh(seed=0, **kw)))
        losses.append(learn.recorder.losses)
    assert losses[0] == losses[1]


def test_weights_and_mixed_losses_do_not_go_together():
    learn = digits_learner(cbs=MixUp()).selective_backprop(**fresh(rescale="sum"))
    with pytest.raises(ValueError, match="MixUp"):
        quiet_fit(learn)


def test_interrupt():
    learn = digits_learner().selective_backprop(**fresh(interrupt=4, start=0, batching="prune"))
    quiet_fit(learn, 2)
    f = np.array(learn.sb.engine.record.points.y)
    assert len(f) == 40 and (f[3::4] == 1).all() and np.delete(f, np.arange(3, 40, 4)).max() < 1
    assert learn.sb.counts["fp"] == 1280 * 3 // 4
    for n in (0, 1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="interrupt="):
            learn.selective_backprop(**fresh(interrupt=n))


def test_top_share():
    "Of each batch of candidates, what the highest fifth of their losses holds"
    tops = []

    class Watch(Scorer):
        def __call__(self, batch, model, loss_func, **how):
            if len(batch[0]) > 2:  # two rows are a trial
                with torch.no_grad():
                    l = per_item_loss(loss_func, model.eval()(batch[0]), batch[1])
                model.train()
                tops.append((l.sort(descending=True).values[:7].sum().item(), l.sum().item()))
            return super().__call__(batch, model, loss_func, **how)

    learn = digits_learner(noise=0, p=0).selective_backprop(**fresh(start=1, exact=True, score=Watch()))
    quiet_fit(learn, 2)
    top, total = np.array(tops).sum(0)
    assert len(tops) == 20 and learn.sb.log.top_share[1] == pytest.approx(top / total, rel=1e-4)


def test_it_says_once_when_selection_cannot_pay(capsys):
    learn = digits_learner(n=320).selective_backprop(**fresh(start=0))
    with learn.no_bar():
        learn.fit(1, 1e-6)  # nothing is learnt, so losses stay even
        learn.fit(1, 1e-6)
    out = capsys.readouterr().out
    assert out.count("selection hardly saves time") == 1
    assert learn.sb.log.top_share.max() < 0.5


# which loss is the score? ----------------------------------------------------
def test_the_score_is_the_training_loss_with_its_smoothing_and_weights():
    x, y = digits(64)
    model = nn.Linear(64, 10)
    logp = model(x).log_softmax(1).detach()
    w = torch.arange(1.0, 11.0)
    own = -logp[torch.arange(64), y]
    for lf, want in (
        (nn.CrossEntropyLoss(weight=w), own * w[y]),
        (nn.CrossEntropyLoss(label_smoothing=0.3), 0.7 * own - 0.3 * logp.mean(1)),
        (LabelSmoothingCrossEntropyFlat(eps=0.3), 0.7 * own - 0.3 * logp.mean(1)),
    ):
        torch.testing.assert_close(SelectiveBackprop(model, lf, 64).score((x, y)), want)


# the filter ----------------------------------------------------
def test_batch_loss_filter():
    spy = Spy()
    learn = digits_learner(n=1400, cbs=spy)
    assert (
        learn.batch_loss_filter(min_loss_perc=0.9, min_samples_perc=0.1) is learn
        and type(learn.blf) is BatchLossFilterCallback
    )
    quiet_fit(learn, 8)
    log = learn.blf.log
    assert log.selected[0] == 1 and log.fp.tolist() == [0] + [1376] * 7
    assert log.selected.iloc[-1] < log.selected[1] and log.selected.min() >= 0.1
    assert len(spy.losses) == 43 * 8  # pruned: every batch is trained, never an empty one
    assert len(learn.blf.plot_selected().containers[0]) == 8  # a bar an epoch
    learn.batch_loss_filter(min_loss_perc=0.5)
    assert (
        len([c for c in learn.cbs if isinstance(c, BatchLossFilterCallback)]) == 1
        and learn.blf.selector.min_loss_perc == 0.5
    )
    learn.remove_cb(BatchLossFilterCallback)
    assert not hasattr(learn, "blf")


def test_batch_loss_filter_schedule_and_accumulate():
    spy = Spy()
    learn = digits_learner(cbs=spy).batch_loss_filter(min_loss_perc=SchedCos(1, 0.3), start=0, batching="accumulate")
    seen = []
    old = learn.blf.selector.at
    learn.blf.selector.at = lambda pct: (old(pct), seen.append((pct, learn.blf.selector.min_loss_perc)))
    quiet_fit(learn, 4)
    for pct, share in seen:
        assert share == pytest.approx(0.3 + 0.7 * (1 + math.cos(math.pi * pct)) / 2)
    assert {n for _, n in spy.losses} == {32} and learn.blf.log.selected.is_monotonic_decreasing


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: TopK(0), "keep=0"),
        (lambda: TopK(1.5), "keep=1.5"),
        (lambda: Random("x"), "keep='x'"),
        (lambda: Hybrid(1, 2), "mix=2"),
        (lambda: Threshold(None), "loss=None"),
        (lambda: LossShare(-0.1), "min_loss_perc=-0.1"),
        (lambda: LossShare(0.9, 3), "min_samples_perc=3"),
        (lambda: Capped(Percentile(), 0), "max_percentile=0"),
        (lambda: Capped("sb"), "selector='sb'"),
        (lambda: Capped(GradNorm()), "without weights"),
        (lambda: InfoBatch(1), "r=1"),
        (lambda: InfoBatch(-1), "r=-1"),
        (lambda: OrderedPool(2), "pool=2"),
        (lambda: GradNorm(1), "presample=1"),
        (lambda: GradNorm(3, tau=-1), "tau=-1"),
        (lambda: ReducibleLoss(torch.tensor([])), "irreducible"),
        (lambda: ReducibleLoss(torch.tensor([float("nan")])), "irreducible"),
    ],
    ids=lambda o: o if isinstance(o, str) else "",
)
def test_wrong_arguments(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


# of equals, who is drawn ----------------------------------------------------
ranking = {
    "TopK": lambda i: TopK(0.3, seed=i),
    "LowK": lambda i: LowK(0.3, seed=i),
    "Uncertainty": lambda i: Uncertainty(0.3, seed=i),
    "LossShare": lambda i: LossShare(0.3, seed=i),
    "DoubtShare": lambda i: DoubtShare(0.3, seed=i),
    "InfoBatch": lambda i: InfoBatch(0.7, seed=i),
    "OrderedPool": lambda i: OrderedPool(0.6, 0.3, seed=i),
    "ReducibleLoss": lambda i: ReducibleLoss(torch.zeros(20), 0.3, seed=i),
    "Capped": lambda i: Capped(TopK(0.3, seed=i), 0.9),
    "Capped(OrderedPool)": lambda i: Capped(OrderedPool(0.6, 0.3, seed=i), 0.9),
}


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("name", ranking)
def test_equals_have_equal_chances(name, way, no_host):
    "Equal losses between two higher ones: each is kept equally often, over seeds and over the draws of one selector"
    if way == "device":
        no_host()
    losses, n = torch.tensor([2.0] + [1.0] * 18 + [2.0]), 1500
    one = ranking[name](0)
    for make in (ranking[name], lambda i: one):
        hits = torch.zeros(20)
        for i in range(n):
            h = history_of(torch.full((50,), 5.0))
            hits[make(i).select(losses, h, items=torch.arange(20)).idx] += 1
        p = hits[1:19].mean() / n
        assert 0.05 < p < 0.95
        assert ((hits[1:19] / n - p).abs() < 4.5 * (p * (1 - p) / n) ** 0.5).all()


def test_nothing_is_drawn_without_ties():
    "On the CPU, so that choices without equals are those of before"
    losses = torch.rand(100)
    for sel in (
        TopK(0.3),
        LowK(0.3),
        Uncertainty(0.3),
        LossShare(0.3),
        DoubtShare(0.3),
        ReducibleLoss(torch.zeros(100), 0.3),
        Capped(TopK(0.3), 0.9),
    ):
        sel.select(losses, history_of(losses), items=torch.arange(100))
        assert sel.state_dict()["draws"] == {}


def test_a_pool_always_keeps_what_is_infinite():
    for bad_one in (math.inf, -math.inf, math.nan):
        l = torch.tensor([1.0, 2, 3, bad_one, 5, 6, 7, 8])
        assert all(3 in OrderedPool(0.75, 0.5, seed=s).select(l).idx.tolist() for s in range(200))


def test_a_capped_pool_is_a_pool():
    "Not always the same ones, and nobody above the cap"
    losses = torch.arange(100.0)
    seen = [Capped(OrderedPool(0.5, 0.2, seed=s), 0.8).select(losses, history_of(losses)).idx for s in range(50)]
    assert len({tuple(i.tolist()) for i in seen}) > 40 and max(i.max() for i in seen) <= 80


# losses below 0 ----------------------------------------------------
def test_losses_below_0_are_counted_from_the_lowest():
    losses = torch.linspace(-3, -1, 101)  # evenly spread: 90 % of what lies above the lowest is held by the upper 68
    n = len(LossShare(0.9).select(losses).idx)
    assert n == len(LossShare(0.9).select(losses + 3).idx) and 65 < n < 72
    assert torch.equal(LossShare(0.5).select(losses * 7 - 100).idx, LossShare(0.5).select(losses).idx)


# doubt ----------------------------------------------------
def my_loss(pred, y, reduction="mean"):
    return nn.functional.cross_entropy(pred, y, reduction=reduction)


@pytest.mark.parametrize("make", [lambda **k: Uncertainty(0.5, **k), lambda **k: DoubtShare(0.5, **k)])
def test_doubt_never_falls_back_to_the_loss(make):
    pred, y = example()
    ce = nn.CrossEntropyLoss()
    losses = per_item_loss(ce, pred, y)
    for lf in (my_loss, nn.MSELoss(), nn.GaussianNLLLoss()):
        with pytest.raises(ValueError, match="not known as a loss over classes.*like="):
            make().check(lf)
        make(like=ce).check(lf)
    for kw, words in (
        (dict(loss_func=ce, pred=(pred, pred), yb=(y,)), "gives a tuple"),
        (dict(loss_func=my_loss, pred=pred, yb=(y,)), "not known"),
        (dict(loss_func=ce, pred=None, yb=(y,)), "come without predictions"),
        (dict(loss_func=ce, pred=pred[:5], yb=(y,)), "do not fit"),
        (dict(loss_func=ce, pred=pred[:, :1], yb=(y,)), "one column"),
        (dict(loss_func=ce, pred=pred[:5]), "5 predictions for 24 losses"),
    ):
        for call in (make().measure, make().select):
            with pytest.raises(ValueError, match=words):
                call(losses, **kw)
    want = make().select(losses, loss_func=ce, pred=pred, yb=(y,)).idx
    for t in (y, {"label": y}, (["a"] * 24, y.float())):  # the targets of one's own loss may be anything
        assert torch.equal(make(like=ce).select(losses, loss_func=my_loss, pred=pred, yb=(t,)).idx, want)
    doubt = make().measure(losses, loss_func=ce, pred=pred, yb=(y,))
    assert torch.equal(make().measure(doubt), doubt) and torch.equal(make().select(doubt).idx, want)  # remembered


def test_rows_without_a_target_win_no_places():
    "Though the model is most in doubt about them; and they are remembered as in no doubt at all"
    pred, y = example(B=40)
    pred[::2] = 0.0
    y[::2] = -100
    ce = nn.CrossEntropyLoss()
    losses = per_item_loss(ce, pred, y)
    doubt = Uncertainty().measure(losses, loss_func=ce, pred=pred, yb=(y,))
    assert (doubt[::2] == 0).all() and (doubt[1::2] > 0).all()
    assert Uncertainty(0.5).select(doubt).idx.tolist() == list(range(1, 40, 2))
    assert set(DoubtShare(0.99).select(losses, loss_func=ce, pred=pred, yb=(y,)).idx.tolist()) <= set(range(1, 40, 2))


# states ----------------------------------------------------
stateful = {
    "Percentile": lambda: Percentile(1),
    "Random": lambda: Random(0.4),
    "Hybrid": lambda: Hybrid(1),
    "Absolute": lambda: Absolute(),
    "Threshold": lambda: Threshold(0.5),
    "TopK": lambda: TopK(0.3),
    "LowK": lambda: LowK(0.3),
    "LossShare": lambda: LossShare(0.9),
    "LossShare, scheduled": lambda: LossShare(SchedCos(1, 0.3)),
    "Capped": lambda: Capped(Percentile(1)),
    "Capped, scheduled": lambda: Capped(LossShare(SchedCos(1, 0.3))),
    "GradNorm": lambda: GradNorm(2, tau=0),
    "ReducibleLoss": lambda: ReducibleLoss(torch.zeros(24), 0.3),
    "Uncertainty": lambda: Uncertainty(0.3),
    "DoubtShare": lambda: DoubtShare(0.7),
    "InfoBatch": lambda: InfoBatch(),
    "OrderedPool": lambda: OrderedPool(),
}


def run_on(sel, steps=3, seed=0):
    "What it chooses from batches with many equals, while a fit goes on"
    ce, out = nn.CrossEntropyLoss(), []
    for i in range(steps):
        pred, y = example(seed=seed + i)
        pred = pred.round()
        losses = per_item_loss(ce, pred, y).mul(2).round()
        sel.at(0.1 * i + 0.01 * seed)
        sel.observe(losses, loss_func=ce, pred=pred, yb=(y,))
        out.append(sel.select(losses, history_of(losses), loss_func=ce, pred=pred, yb=(y,), items=torch.arange(24)).idx)
    return out, sel.active


@pytest.mark.parametrize("name", stateful)
def test_a_selector_goes_on_as_if_nothing_had_been_between(name, tmp_path):
    sel = stateful[name]()
    run_on(sel)
    torch.save(sel.state_dict(), tmp_path / "s.pth")
    state = torch.load(tmp_path / "s.pth", weights_only=True)
    new, copied = stateful[name](), pickle.loads(pickle.dumps(sel))
    new.load_state_dict(state)
    assert same_state(new.state_dict(), state) and new.active == sel.active
    if hasattr(sel, "gain"):
        assert float(new.gain) == float(sel.gain)
    want = run_on(sel, seed=5)
    for other in (new, copied):
        got = run_on(other, seed=5)
        assert got[1] == want[1] and all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))


def same_state(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", stateful)
def test_wrong_states_change_nothing(name):
    sel = stateful[name]()
    run_on(sel)
    before = sel.state_dict()
    other = stateful["TopK" if name != "TopK" else "Percentile"]()
    wrong = [
        other.state_dict(),
        None,
        {},
        {**before, "draws": {"cpu": torch.zeros(5056, dtype=torch.uint8)[:9]}},
        {**before, "draws": {"cpu": "abc"}},
        {**before, "draws": None},
        {**before, "draws": {"cuda": torch.zeros(15, dtype=torch.uint8)}},
        {**before, "more": 1},
    ]
    wrong += [{k: v for k, v in before.items() if k != missing} for missing in before]
    for key, bad_ones in (
        ("gain", (-1.0, "much", math.nan)),
        ("min_loss_perc", (2.0, None)),
        ("selector", (None, other.state_dict())),
    ):
        wrong += [{**before, key: v} for v in bad_ones if key in before]
    for state in wrong:
        with pytest.raises(ValueError):
            sel.load_state_dict(state)
        assert same_state(sel.state_dict(), before)


def test_the_message_names_what_differs():
    with pytest.raises(ValueError, match=r"of a Percentile, this is TopK\(keep=0.5\)"):
        TopK().load_state_dict(Percentile(1).state_dict())
    with pytest.raises(ValueError, match=r"differ in \['min_loss_perc'\]"):
        LossShare(SchedCos(1, 0.3)).load_state_dict(LossShare(0.9).state_dict())
    with pytest.raises(ValueError, match=r"7 bytes for 'cpu', where a generator has \d+"):
        TopK().load_state_dict({"kind": "TopK", "draws": {"cpu": torch.zeros(7, dtype=torch.uint8)}})


def test_draws_saved_elsewhere_go_on_repeatably():
    "A state of a GPU's generator (16 bytes) on a CPU: new numbers, the same each time, and others for another state"
    there = lambda i: {"kind": "TopK", "draws": {"cuda": torch.full((16,), i, dtype=torch.uint8)}}
    draws = []
    for i in (1, 1, 2):
        sel = TopK(seed=0)
        sel.load_state_dict(there(i))
        draws.append(sel.uniform(8, "cpu"))
    assert (
        torch.equal(draws[0], draws[1])
        and not torch.equal(draws[0], draws[2])
        and not torch.equal(draws[0], TopK(seed=0).uniform(8, "cpu"))
    )
    assert sel.state_dict()["draws"].keys() == {"cpu", "cuda"}  # what was saved there is still there


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: DoubtShare(0), "share=0"),
        (lambda: DoubtShare(1.1), "share=1.1"),
        (lambda: DoubtShare(0.9, 0.5, 0.2), "floor=0.5 must be at most ceiling=0.2"),
        (lambda: DoubtShare(0.9, floor=-1), "floor=-1"),
        (lambda: DoubtShare(0.9, ceiling=0), "ceiling=0"),
        (lambda: DoubtShare(like=nn.MSELoss()), "like=MSELoss"),
        (lambda: TopK(seed=0.5), "seed=0.5"),
        (lambda: DoubtShare("x"), "share='x'"),
    ],
)
def test_wrong_arguments_of_the_new_ones(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()
