"Selectors and history against simple models in NumPy, on whatever inputs hypothesis finds."

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsb.history import LossHistory
from fastsb.losses import per_item_loss, prediction_entropy, weighted_loss
from fastsb.select import (
    Capped,
    DoubtAbove,
    DoubtShare,
    InfoBatch,
    LossShare,
    LowK,
    OrderedPool,
    Percentile,
    Random,
    ReducibleLoss,
    Threshold,
    TopK,
    Uncertainty,
    inclusion,
    systematic,
)

property_test = settings(max_examples=200, derandomize=True, deadline=None)
ordinary = st.floats(-1e6, 1e6, width=32)
few_values = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0])  # many equals
extreme = st.floats(width=32)  # NaN and infinities among them
seeds = st.integers(0, 2**32 - 1)
fractions = st.floats(0.01, 1.0)


def batches(*kinds, least=1, most=40):
    return st.one_of(*(st.lists(k, min_size=least, max_size=most) for k in kinds)).map(
        lambda v: np.array(v, dtype=np.float32)
    )


any_losses = batches(ordinary, few_values, extreme)
doubts = batches(st.floats(0, 10, width=32), st.sampled_from([0.0, 0.5, 0.5, 1.0]))


def ranked(key, draws):
    "The lowest `key` first; of equals the one whose number in `draws` is lower"
    return np.lexsort((draws, key))


def first_draws(sel, n):
    return sel.uniform(n, "cpu").numpy()


def count(keep, n):
    return max(1, math.floor(keep * n + 0.5))


class Ring:
    "A history as a list"

    def __init__(self, size):
        self.size, self.v = size, []

    def update(self, l):
        self.v = (self.v + [x for x in l.tolist() if math.isfinite(x)])[-self.size :]

    def percentile(self, l):
        return np.array(
            [
                np.float32(sum(v < x for v in self.v)) / np.float32(len(self.v)) if self.v and x == x else 1.0
                for x in l.tolist()
            ],
            dtype=np.float32,
        )


@property_test
@given(st.integers(1, 30), st.lists(any_losses, max_size=8), any_losses)
def test_history(size, stream, asked):
    h, model = LossHistory(size), Ring(size)
    for i, l in enumerate(stream):
        h.update(torch.from_numpy(l))
        model.update(l)
        if i % 2:  # go on in another one
            state, h = h.state_dict(), LossHistory(size)
            h.load_state_dict(state)
        assert h.values().tolist() == model.v and len(h) == len(model.v)
        np.testing.assert_array_equal(h.percentile(torch.from_numpy(asked)).numpy(), model.percentile(asked))


@property_test
@given(any_losses, fractions, seeds)
def test_those_who_rank(l, keep, seed):
    n, k, bad = len(l), count(keep, len(l)), ~np.isfinite(l)
    irreducible = np.linspace(-1, 1, n, dtype=np.float32)
    for make, key in (
        (lambda: TopK(keep, seed), -l),
        (lambda: LowK(keep, seed), l),
        (lambda: Uncertainty(keep, seed=seed), -l),
        (lambda: ReducibleLoss(torch.from_numpy(irreducible), keep, seed), -(l - irreducible)),
    ):
        s = make().select(torch.from_numpy(l), items=torch.arange(n))
        want = ranked(np.where(bad, -np.inf, key), first_draws(make(), n))[:k]  # what is not finite comes first
        assert s.idx.tolist() == sorted(want) == s.p.nonzero().flatten().tolist() and s.w is None


@property_test
@given(any_losses, st.floats(0, 1), st.floats(0, 1), seeds)
def test_loss_share(l, share, least, seed):
    n, bad = len(l), ~np.isfinite(l)
    with np.errstate(over="ignore"):
        held = np.where(bad, 0, l - min(np.float32(0), l[~bad].min() if (~bad).any() else np.float32(0)))
    kept = LossShare(share, least, seed).select(torch.from_numpy(l)).idx.tolist()
    assert set(np.flatnonzero(bad)) <= set(kept) and len(kept) >= max(1, math.ceil(least * n - 1e-9))
    if not np.isfinite(held).all():
        return
    order = ranked(-held, first_draws(LossShare(seed=seed), n))
    cum = held[order].cumsum(dtype=np.float64)
    k = n if share == 1 else max(1, math.ceil(least * n - 1e-9), min(int((cum < share * cum[-1]).sum()) + 1, n))
    assert kept == sorted({*order[:k], *np.flatnonzero(bad)})


@property_test
@given(doubts, st.floats(0.01, 1), st.floats(0, 1), st.floats(0.01, 1), seeds)
def test_doubt_share(d, share, floor, ceiling, seed):
    floor = min(floor, ceiling)
    n = len(d)
    kept = DoubtShare(share, floor, ceiling, seed=seed).select(torch.from_numpy(d)).idx.tolist()
    least = max(1, math.ceil(floor * n - 1e-9))
    most = max(least, math.floor(ceiling * n + 1e-9))
    assert least <= len(kept) <= most
    order = ranked(-d, first_draws(DoubtShare(seed=seed), n))
    assert kept == sorted(order[: len(kept)])  # the highest, whatever their number
    held = d.astype(np.float64)
    if share < 1 and len(kept) < most:
        assert held[kept].sum() >= share * held.sum() * (1 - 1e-12)
    if share < 1 and len(kept) > least:  # the fewest: one less would not hold it
        assert held[order[: len(kept) - 1]].sum() < share * held.sum() * (1 + 1e-12)


@property_test
@given(doubts, st.just(0.0) | st.floats(0.01, 3), st.floats(0, 1), seeds)
def test_doubt_above(d, part, floor, seed):
    kept = DoubtAbove(part, floor, seed=seed).select(torch.from_numpy(d)).idx.tolist()
    order, held = np.argsort(-d, kind="stable"), d.astype(np.float64)
    least = max(1, math.ceil(floor * len(d) - 1e-9))
    enough = min(part * held.mean(), held[order[least - 1]])
    surely, perhaps = held >= enough * (1 + 1e-5), held >= enough * (1 - 1e-5)  # the mean is taken in float32
    assert {*np.flatnonzero(surely)} <= {*kept} <= {*np.flatnonzero(perhaps)}
    assert len(kept) >= least and len({d[i] for i in kept} & {x for i, x in enumerate(d) if i not in kept}) == 0


@property_test
@given(any_losses, st.floats(0.05, 1), seeds)
def test_capped(l, cap, seed):
    h, model = LossHistory(50), Ring(50)
    h.update(torch.from_numpy(l))
    model.update(l)
    capped, bad = model.percentile(l) > np.float32(cap), ~np.isfinite(l)
    s = Capped(TopK(0.5, seed), cap).select(torch.from_numpy(l), h)
    order = ranked(np.where(capped | (l != l), np.inf, -l), first_draws(TopK(0.5, seed), len(l)))
    want = {i for i in order[: count(0.5, len(l))] if not capped[i]} | set(np.flatnonzero(bad))
    assert set(s.idx.tolist()) == want


@property_test
@given(any_losses, st.floats(0, 0.95), seeds)
def test_infobatch(l, r, seed):
    ok = np.isfinite(l)
    low = ok & (l.astype(np.float64) < (l[ok].astype(np.float64).sum() / max(ok.sum(), 1)))
    s = InfoBatch(r, seed).select(torch.from_numpy(l))
    u = first_draws(InfoBatch(r, seed), len(l))
    order = [i for i in np.argsort(u, kind="stable") if low[i]]
    assert s.idx.tolist() == sorted({*np.flatnonzero(~low), *order[: int(len(order) * (1 - r) + 1e-9)]})
    np.testing.assert_allclose(s.w, np.where(low, 1 / (1 - r), 1.0)[s.idx], rtol=1e-5)


@property_test
@given(any_losses, fractions, fractions, seeds)
def test_ordered_pool(l, a, b, seed):
    keep, pool, n = min(a, b), max(a, b), len(l)
    s = OrderedPool(pool, keep, seed).select(torch.from_numpy(l))
    other = OrderedPool(pool, keep, seed)
    drawn, ties = first_draws(other, n), first_draws(other, n)
    k = count(keep, n)
    in_pool = np.isin(np.arange(n), np.argsort(drawn, kind="stable")[: max(math.floor(pool * n + 0.5), k)])
    key = np.where(np.isfinite(l), np.where(in_pool, -l, np.inf), -np.inf)
    assert s.idx.tolist() == sorted(ranked(key, ties)[:k])


@property_test
@given(any_losses, st.integers(0, 50).map(lambda i: i / 10), seeds)
def test_drawn_one_by_one(l, beta, seed):
    h, model = LossHistory(50), Ring(50)
    h.update(torch.from_numpy(l))
    model.update(l)
    bad = ~np.isfinite(l)
    for make, p in (
        (lambda: Percentile(beta, seed=seed), model.percentile(l) ** np.float32(beta)),
        (lambda: Random(0.4, seed=seed), np.full(len(l), 0.4)),
        (lambda: Threshold(beta), l > np.float32(beta)),
    ):
        s = make().select(torch.from_numpy(l), h)
        np.testing.assert_allclose(s.p, np.where(bad, 1, p), rtol=1e-5, atol=1e-7)
        u = 0.5 if isinstance(make(), Threshold) else first_draws(make(), len(l))
        assert s.idx.tolist() == np.flatnonzero(u < s.p.numpy()).tolist()


@property_test
@given(batches(st.floats(0, 1e6, width=32), few_values.map(abs)), st.data())
def test_exact_draws(p, data):
    k = data.draw(st.integers(1, len(p)))
    pi = inclusion(torch.from_numpy(p), k)
    assert abs(float(pi.sum()) - k) < 1e-6 * k and 0 <= float(pi.min()) and float(pi.max()) <= 1
    order = np.argsort(p, kind="stable")
    assert (np.diff(pi.numpy()[order]) >= -1e-12).all()  # in the order of p
    idx = systematic(pi, k, torch.tensor(data.draw(st.floats(0, 0.9990234375, width=32)))).tolist()
    assert len(set(idx)) == k and idx == sorted(idx) and 0 <= idx[0] and idx[-1] < len(p)


@property_test
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 4), seeds, st.sampled_from(["mean", "sum"]), st.booleans())
def test_losses_with_ignored_elements(B, T, C, seed, reduction, weighted):
    r = np.random.default_rng(seed)
    p, t = r.normal(size=(B, C, T)), r.integers(0, C, (B, T))
    t[r.random((B, T)) < 0.4] = -100
    cw, w = r.random(C) + 0.1 if weighted else np.ones(C), r.random(B) * 3
    logp = p - np.log(np.exp(p).sum(1, keepdims=True))
    there = t >= 0
    y = np.where(there, t, 0)
    l = np.where(there, -cw[y] * np.take_along_axis(logp, y[:, None], 1)[:, 0], 0)
    lf = torch.nn.CrossEntropyLoss(weight=torch.tensor(cw) if weighted else None, reduction=reduction)
    args = torch.tensor(p), torch.tensor(t)

    each = l.sum(1) if reduction == "sum" and T > 1 else l.sum(1) / np.maximum(there.sum(1), 1)
    np.testing.assert_allclose(per_item_loss(lf, *args), each, rtol=1e-9)
    doubt = np.where(there, -(np.exp(logp) * logp).sum(1), 0).sum(1) / np.maximum(there.sum(1), 1)
    np.testing.assert_allclose(prediction_entropy(lf, *args), doubt, rtol=1e-4, atol=1e-6)
    same, own = weighted_loss(lf, *args, w=torch.ones(B))
    assert same.item() == own.item() == lf(*args).item() or not there.any() and reduction == "mean"
    if there.any():
        by = cw[t[there]].sum() if reduction == "mean" else 1
        np.testing.assert_allclose(weighted_loss(lf, *args, w=torch.tensor(w))[0], (w * l.sum(1)).sum() / by, rtol=1e-9)
