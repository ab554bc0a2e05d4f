"Which items an epoch loads: the choice by what is remembered, and the sampler for any PyTorch loader."

import math
import pickle
import random
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from test_memory import make_memory, of_kind, save
from torch import nn
from torch.utils.data import DataLoader

from fastsb.memory import ItemMemory
from fastsb.sampler import SelectiveSampler, WithItems, choose
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
    Percentile,
    Random,
    ReducibleLoss,
    Selection,
    Selector,
    Threshold,
    TopK,
    Uncertainty,
    bernoulli,
)


def some_memory(n=1000, unseen=100, kind="exact"):
    memory, g = make_memory(n, kind), torch.Generator().manual_seed(3)
    order = torch.randperm(n, generator=g)[: n - unseen]
    for epoch, part in enumerate(order.chunk(4)):
        memory.update(part, torch.empty(len(part)).exponential_(generator=g), epoch=epoch)
    return memory


@of_kind
@pytest.mark.parametrize(
    "make",
    [
        lambda: Percentile(1, seed=5),
        lambda: Percentile(3, seed=5),
        lambda: Hybrid(2, 0.3, seed=5),
        lambda: Random(0.2, seed=5),
        lambda: Capped(Percentile(1, seed=5), 0.8),
    ],
    ids=["p1", "p3", "hybrid", "random", "capped"],
)
def test_choice_does_not_depend_on_the_chunks(make, kind):
    "It is what `select` gives with the same draws for the known; the unknown are there; no global random state moves"
    memory, states = some_memory(kind=kind), (torch.get_rng_state(), random.getstate())
    l = memory.losses(epoch=5, max_age=3)
    known = l.isfinite().nonzero().flatten()
    s = make().select(l[known], memory)
    want_p, want = (
        torch.ones(1000).scatter(0, known, s.p),
        torch.cat([known[s.idx], l.isnan().nonzero().flatten()]).sort().values,
    )
    assert 0 < len(s.idx) < len(known) < 1000
    for chunk in (1, 17, 1000, 2**18):
        idx, p, w = choose(memory, make(), 5, max_age=3, chunk=chunk)
        assert w is None and idx.dtype == torch.long and torch.equal(idx, want) and torch.equal(p, want_p[want])
    assert choose(memory, make(), 5, max_age=3, probs=False)[1] is None
    assert set(l.isnan().nonzero().flatten().tolist()) <= set(idx.tolist())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


def test_choice_among_some():
    memory = some_memory()
    items = torch.tensor([5, 900, 3, 3, 77, 412, 5])
    for sel in (Percentile(0), Threshold(-1), TopK(1.0)):
        assert choose(memory, sel, 0, items=items)[0].tolist() == [3, 5, 77, 412, 900]
    assert [len(o) for o in choose(memory, Percentile(), 0, items=[])[:2]] == [0, 0]
    items = torch.randperm(1000)[:300]
    l = memory.losses(items)
    idx, *_ = choose(memory, Percentile(1, seed=1), 0, items=items, chunk=50)
    share = torch.where(l.isnan(), 1.0, memory.percentile(l)).mean()
    assert (
        abs(len(idx) / 300 - share) < 0.1
        and set(idx.tolist()) <= set(items.tolist())
        and idx.tolist() == sorted(idx.tolist())
    )
    known = (~l.isnan()).nonzero().flatten()
    k = math.floor(0.25 * len(known) + 0.5)
    want = torch.cat([items[known][l[known].topk(k).indices], items[l.isnan()]]).sort().values
    idx, p, _ = choose(memory, TopK(0.25), 0, items=items)  # a number is of those that are known
    assert torch.equal(idx, want) and (p == 1).all()
    assert len(choose(memory, Percentile(3, exact=True), 0, items=items)[0]) == k + 300 - len(known)


def test_choice_of_fixed_numbers_and_by_item():
    memory = some_memory(unseen=0)
    l = memory.losses()
    assert torch.equal(choose(memory, TopK(0.1), 9, chunk=10)[0], l.topk(100).indices.sort().values)
    assert len(choose(memory, Percentile(1, exact=True), 9, chunk=7)[0]) == 500
    for make in (lambda: LossShare(0.7), lambda: InfoBatch(seed=1)):
        idx, p, w = choose(memory, make(), 9, chunk=7)
        want = make().select(l, memory)
        assert (
            torch.equal(idx, want.idx)
            and torch.equal(p, want.p[idx])
            and (w is None if want.w is None else torch.equal(w, want.w))
        )
    assert choose(memory, Threshold(1.0), 9, chunk=10)[0].tolist() == (l > 1).nonzero().flatten().tolist()
    low = torch.rand(1000)
    assert torch.equal(choose(memory, ReducibleLoss(low, 0.1), 9)[0], (l - low).topk(100).indices.sort().values)
    for sel in (TopK(0.1), Percentile(9), InfoBatch(), Percentile(3, exact=True)):  # all of them too old
        idx, p, w = choose(memory, sel, 9, max_age=0)
        assert idx.tolist() == list(range(1000)) and (p == 1).all() and (w is None or (w == 1).all())


class Weighing(Selector):
    "Halves at random, and weighs each by its item's number"

    weighted, keep = True, 0.5

    def select(self, losses, history=None, u=None, items=None, **context):
        idx = bernoulli(torch.full_like(losses, 0.5), self.uniform(len(losses), losses.device)).flip(0)
        return Selection(idx, torch.full_like(losses, 0.5), items[idx].float())


def test_weights_stay_with_their_items():
    memory = some_memory()
    for items in (None, torch.randperm(1000)[:400]):
        idx, p, w = choose(memory, Weighing(seed=0), 0, items=items, chunk=64)
        known = memory.losses(idx).isfinite()
        assert torch.equal(torch.where(known, idx, 1).float(), w) and torch.equal(p, torch.where(known, 0.5, 1.0))
        assert not known.all() and idx.tolist() == sorted(idx.tolist()) and len(idx) > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_choice_on_the_gpu():
    memory = ItemMemory(1000, device="cuda")
    memory.load_state_dict(some_memory().state_dict())
    for sel in (Percentile(1), TopK(0.3), Percentile(1, exact=True)):
        idx, *_ = choose(memory, sel, 3, chunk=100)
        assert idx.device.type == "cpu" and abs(len(idx) / 1000 - (0.3 if isinstance(sel, TopK) else 0.55)) < 0.1


def test_a_fixed_number_of_items_is_any_of_them():
    "Also if all are equally likely: which two go together does not depend on where they stand in the data set"
    n, k, together, memory = 40, 20, np.zeros((40, 40)), ItemMemory(40)
    memory.update(torch.arange(n), torch.ones(n), epoch=0)
    sel = Random(0.5, exact=True, seed=0)
    for _ in range(4000):
        idx, p, _ = choose(memory, sel, 1)
        assert len(idx) == k and torch.equal(idx, idx.unique()) and torch.allclose(p, torch.full((k,), 0.5))
        together[np.ix_(idx, idx)] += 1
    share = together[~np.eye(n, dtype=bool)] / 4000
    expect = k * (k - 1) / n / (n - 1)
    assert np.abs(np.diag(together) / 4000 - 0.5).max() < 5 * 0.5 / 4000**0.5
    assert np.abs(share - expect).max() < 5 * (expect * (1 - expect) / 4000) ** 0.5


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: choose("c", Percentile(), 0), TypeError, "memory='c'"),
        (lambda: choose(ItemMemory(3), 1, 0), TypeError, "selector=1"),
        (lambda: choose(ItemMemory(3), Percentile(), "a"), TypeError, "epoch='a'"),
        (lambda: choose(ItemMemory(3), Percentile(), 0, chunk=0), ValueError, "chunk=0"),
        (lambda: choose(ItemMemory(3), Percentile(), 0, items=[5]), ValueError, "items holds 5"),
        (lambda: choose(ItemMemory(3), Absolute(), 0), ValueError, "looks at predictions"),
        (lambda: choose(ItemMemory(3), GradNorm(), 0), ValueError, "score='model'"),
        (lambda: choose(ItemMemory(3), Capped(Absolute()), 0), ValueError, "looks at predictions"),
    ],
)
def test_errors_name_the_argument(call, error, says):
    with pytest.raises(error, match=says):
        call()


# the sampler in a plain loop


class Plain:
    "What the sampler is defined to do, in NumPy: moving averages, their ages, and which items an epoch is made of"

    def __init__(self, n, epochs, start, end, max_age, momentum, chosen_of):
        self.n, self.epochs, self.start, self.end = n, epochs, start, end
        self.max_age, self.m, self.chosen_of = max_age, np.float32(momentum), chosen_of
        self.value, self.last = np.full(n, np.nan, np.float32), np.full(n, -1)

    def reached(self, t, epoch):
        return epoch >= t if isinstance(t, int) else epoch / self.epochs + 1e-9 >= t

    def items(self, epoch):
        before_end = self.end is None or not self.reached(self.end, epoch)
        last_is_whole = isinstance(self.end, float) and self.end < 1 and epoch == self.epochs - 1
        if not (self.reached(self.start, epoch) and before_end) or last_is_whole:
            return set(range(self.n))
        recent = (self.last >= 0) & (epoch - self.last <= self.max_age)
        known = np.flatnonzero(recent)
        return set(np.flatnonzero(~recent)) | set(known[self.chosen_of(self.value[known])] if len(known) else [])

    def observe(self, items, values, epoch):
        for i, v in zip(items, values.astype(np.float32)):
            seen = self.last[i] >= 0
            self.value[i] = self.m * self.value[i] + (np.float32(1) - self.m) * v if seen else v
            self.last[i] = epoch


def highest(keep, sign=1):
    return lambda v: np.argsort(-sign * v, kind="stable")[: max(1, math.floor(keep * len(v) + 0.5))]


def fewest(share, floor=0.1):
    "The fewest of the highest that together hold a share of all"

    def chosen_of(v):
        order = np.argsort(-v, kind="stable")
        held = np.cumsum(v[order].astype(np.float64))
        k = np.searchsorted(held, share * held[-1] * (1 - 1e-7)) + 1
        return order[: max(1, math.ceil(floor * len(v) - 1e-9), k)]

    return chosen_of


def above(part, floor=0.1):
    "Those of at least a part of the mean, and the highest if these are too few"

    def chosen_of(v):
        v = v.astype(np.float32)
        least = max(1, math.ceil(floor * len(v) - 1e-9))
        return np.flatnonzero(v >= min(np.float32(part) * v.mean(dtype=np.float32), np.sort(v)[-least]))

    return chosen_of


def entropy(logits):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1)


ways_to_choose = {
    "topk": (lambda: TopK(0.3), highest(0.3), "loss"),
    "few": (lambda: TopK(0.001), highest(0.001), "loss"),
    "lowk": (lambda: LowK(0.4), highest(0.4, -1), "loss"),
    "threshold": (lambda: Threshold(1.0), lambda v: np.flatnonzero(v > 1), "loss"),
    "doubt": (lambda: Uncertainty(0.5), highest(0.5), "doubt"),
    "share of doubt": (lambda: DoubtShare(0.6, floor=0.5), fewest(0.6, 0.5), "doubt"),
    "few by doubt": (lambda: DoubtAbove(3.0, floor=0.2), above(3.0, 0.2), "doubt"),
    "default": (lambda: None, above(0.7), "doubt"),
}
windows = [(1, None), (0, 5), (2, 6), (0.1, 0.9), (0.3, 1.0), (1, 0.5)]


@pytest.mark.parametrize("way", ways_to_choose)
@pytest.mark.parametrize("start, end", windows)
def test_each_epoch_is_made_of_what_the_reference_says(way, start, end):
    make, chosen_of, by = ways_to_choose[way]
    n, epochs, classes = 53, 8, 5
    rng = np.random.default_rng(1)
    for max_age, momentum in ((1, 0.0), (2, 0.5), (5, 0.75)):
        ref = Plain(n, epochs, start, end, max_age, momentum, chosen_of)
        s = SelectiveSampler(
            n, make(), nn.CrossEntropyLoss(), epochs=epochs, start=start, end=end, max_age=max_age, momentum=momentum
        )
        for epoch in range(epochs):
            logits, y = rng.normal(size=(n, classes)).astype(np.float32) * 2, rng.integers(0, classes, n)
            want, got = ref.items(epoch), []
            for items in DataLoader(range(n), 7, sampler=s):
                at = items.numpy()
                s.observe(items, pred=torch.tensor(logits[at]), yb=torch.tensor(y[at]))
                got += items.tolist()
            assert len(got) == len(set(got)) and set(got) >= want
            if len(want) > 1:  # a single row is never trained on alone
                assert set(got) == want
            else:
                assert len(got) == 2
            loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(n), y]
            values = entropy(logits) if by == "doubt" else loss
            ref.observe(got, values[got], epoch)
            remembered = s.memory.doubts() if by == "doubt" else s.memory.losses()
            np.testing.assert_allclose(remembered.numpy(), ref.value, rtol=2e-4, atol=2e-6)
            ref.value = remembered.numpy().copy()  # so that rounding turns no tie


def loop(sampler, n, epochs, bs=8, losses=None, data=None, told=False, **kwargs):
    "The items of each batch of each epoch, in a plain loop"
    seen = []
    for epoch in range(epochs):
        if told:
            sampler.set_epoch(epoch)
        seen.append([])
        for items in DataLoader(range(n) if data is None else data, bs, sampler=sampler, **kwargs):
            sampler.observe(items, torch.rand(len(items)) if losses is None else losses[items])
            seen[-1].append(items.tolist())
    return seen


def flat(batches):
    return [i for b in batches for i in b]


every_selector = {
    "percentile": lambda n: Percentile(1, seed=1),
    "exact": lambda n: Percentile(2, exact=True, seed=1),
    "random": lambda n: Random(0.4, seed=1),
    "hybrid": lambda n: Hybrid(1, 0.5, seed=1),
    "threshold": lambda n: Threshold(0.5),
    "topk": lambda n: TopK(0.3),
    "lowk": lambda n: LowK(0.3),
    "few": lambda n: TopK(0.001),
    "capped": lambda n: Capped(Percentile(1, seed=1), 0.8),
    "infobatch": lambda n: InfoBatch(0.5, seed=1),
    "share": lambda n: LossShare(0.5),
    "pool": lambda n: OrderedPool(0.6, 0.3, seed=1),
    "rho": lambda n: ReducibleLoss(torch.rand(n), 0.3),
    "like": lambda n: Uncertainty(0.4, like=nn.CrossEntropyLoss()),
    "doubt": lambda n: DoubtShare(0.5, like=nn.CrossEntropyLoss()),
    "mean doubt": lambda n: DoubtAbove(0.7, like=nn.CrossEntropyLoss()),
}


@pytest.mark.parametrize("name", every_selector)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 61])
def test_every_selector_that_can_remember(name, n):
    "Counts add up, nothing comes twice, a batch has one row only if plain training has one, nobody waits for too long"
    selector = every_selector[name](n)
    s, bs = SelectiveSampler(n, selector, start=1, end=None, max_age=2, bs=5, seed=0), 5
    last = np.zeros(n, int)
    for epoch in range(7):
        seen = []
        for items in DataLoader(range(n), bs, sampler=s):
            s.observe(items, torch.rand(len(items)), pred=torch.randn(len(items), 4))
            w = s.weights(items)
            assert (w is not None) == (selector.weighted and epoch > 0) and (w is None or (w >= 1).all())
            seen.append(len(items))
            assert last[items].max() < epoch or epoch == 0
            last[items] = epoch
        assert epoch == 0 or n < 2 or min(seen) > 1
        rest = [k for k in seen[:-1] if k != bs]
        assert not rest and (len(seen) == 1 or epoch == 0 or seen[-1] >= bs / 2)
        assert epoch - last.min() <= 2 + 1 + (name not in ("few", "exact", "topk", "lowk", "pool", "rho", "like"))
    for row in s.log:
        assert row["candidates"] == n and row["bp"] == row["loads"] <= n and row["fp"] == 0
        assert 0 <= row["selected"] <= 1 and row["selected"] == row["bp"] / n
    assert int(s.memory.times().sum()) == sum(row["bp"] for row in s.log)
    assert len(s.log) == 7 and [row["epoch"] for row in s.log] == list(range(7))


def test_weights_of_infobatch_are_the_reference():
    n, losses = 40, torch.rand(40)
    s = SelectiveSampler(n, InfoBatch(0.5, seed=1), start=1, end=None, momentum=0.0)
    loop(s, n, 1, losses=losses)
    order = list(s)
    low = losses.numpy() < losses.numpy().mean()
    assert set(np.flatnonzero(~low)) <= set(order) and sum(low[order]) == low.sum() // 2
    assert s.weights(order).tolist() == [2.0 if low[i] else 1.0 for i in order]


def test_rescale_by_share_and_by_probability():
    n, losses = 500, torch.rand(500)
    for rescale in ("sum", "inverse"):
        s = SelectiveSampler(n, Percentile(1, seed=1), start=1, end=None, rescale=rescale)
        loop(s, n, 1, losses=losses)
        order = torch.tensor(list(s))
        p = (losses[None] < losses[:, None]).float().mean(1)
        share = len(order) / n
        want = torch.full((len(order),), share) if rescale == "sum" else share / p[order]
        assert torch.allclose(s.weights(order), want, rtol=1e-5)
        s.observe(order, losses[order])
        s.begin_epoch(2, select=False)
        assert s.weights(order) is None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("told", [False, True])
def test_len_is_that_of_the_epoch(workers, told):
    n, bs = 60, 8
    s = SelectiveSampler(n, TopK(0.5), start=1, end=None, bs=bs, seed=0)
    dl = DataLoader(WithItems(range(n)), bs, sampler=s, num_workers=workers)
    for epoch in range(3):
        if told:
            s.set_epoch(epoch)
        long, many = (n, 8) if epoch == 0 else (30, 4)
        assert (len(s), len(dl)) == (long, many)
        assert len(next(iter(dl))[1]) == bs  # a look does no harm
        count = 0
        for _, items in dl:
            assert (len(s), len(dl)) == (long, many)
            s.observe(items, torch.rand(len(items)))
            count += 1
        assert count == many and (len(s), len(dl)) == (30, 4)
        assert len(s.log) == epoch + 1
    assert [row["candidates"] for row in s.log] == [n] * 3 and s.record.counts["bp"] == 60 + 30 + 30


def test_workers_make_no_difference():
    runs = []
    for kw in (
        {},
        dict(num_workers=2),
        dict(num_workers=2, persistent_workers=True),
        dict(num_workers=1, prefetch_factor=9),
    ):
        s = SelectiveSampler(60, TopK(0.5), start=1, end=None, bs=8, seed=0)
        dl, seen, losses = DataLoader(WithItems(range(60)), 8, sampler=s, **kw), [], torch.linspace(0, 1, 60)
        for _ in range(3):
            for x, items in dl:
                assert torch.equal(x, items)
                s.observe(items, losses[items])
                seen.append(items.tolist())
        runs.append((seen, [{k: v for k, v in row.items() if not k.endswith("_s")} for row in s.log]))
    assert all(str(r) == str(runs[0]) for r in runs) and len(runs[0][0]) == 8 + 4 + 4


@pytest.mark.parametrize("bs", [None, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last_and_unknown_batch_size(bs, drop_last):
    "With drop_last and an unknown batch size the end of an epoch is known when the next one begins"
    n = 60
    s = SelectiveSampler(
        n, TopK(0.55), start=1, end=None, max_age=9, bs=bs, drop_last=drop_last and bs is not None, seed=0
    )
    seen = loop(s, n, 3, drop_last=drop_last)
    s.set_epoch(3)
    sizes = [[len(b) for b in e] for e in seen]
    if drop_last:
        assert sizes == [[8] * 7, [8] * 4, [8] * 4]
    else:
        assert [sum(e) for e in sizes][0] == 60 and sizes[1] == ([8] * 4 if bs else [8] * 4 + [1])
    if bs:
        assert [row["candidates"] for row in s.log] == [56 if drop_last else 60] * 3
    assert [row["bp"] for row in s.log] == [sum(e) for e in sizes]
    assert int(s.memory.times().sum()) == sum(map(sum, sizes))


def test_drop_last_still_has_a_batch():
    s = SelectiveSampler(60, TopK(0.001), start=1, end=None, bs=8, drop_last=True, seed=0)
    assert [[len(b) for b in e] for e in loop(s, 60, 3, drop_last=True)] == [[8] * 7, [8], [8]]


def test_the_order_is_new_each_epoch_and_the_same_with_the_same_seed():
    losses = torch.linspace(0, 1, 50)
    a, b, c = (
        loop(SelectiveSampler(50, TopK(0.5), start=1, end=None, seed=k), 50, 3, losses=losses) for k in (0, 0, 1)
    )
    assert a == b and a != c and sorted(flat(a[1])) == sorted(flat(a[2])) == list(range(25, 50)) and a[1] != a[2]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    s = SelectiveSampler(50, TopK(0.5), start=1, end=None)
    first = list(s)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert list(SelectiveSampler(50, TopK(0.5), start=1, end=None)) == first != list(range(50))
    s = SelectiveSampler(50, TopK(0.5), start=1, end=None, shuffle=False)
    a = loop(s, 50, 2, losses=losses.flip(0))
    assert flat(a[0]) == list(range(50)) and flat(a[1]) == list(range(25))


def test_a_broken_off_epoch_is_over_with_the_next():
    s = SelectiveSampler(40, TopK(0.5), start=1, end=None, bs=4, seed=0)
    dl = DataLoader(range(40), 4, sampler=s)
    for k, items in enumerate(dl):
        s.observe(items, torch.rand(4))
        if k == 2:
            break
    assert s.log == [] and len(s) == 40 and 0.29 < s._part() < 0.31
    second = flat(loop(s, 40, 1, bs=4)[0])
    seen = set(s.memory.losses().isfinite().nonzero().flatten().tolist())
    assert len(second) == 6 + 28 and len(seen) == 34 + 6  # half of the 12 that are known, and all 28 others
    assert [(r["epoch"], r["bp"], r["candidates"]) for r in s.log] == [(0, 12, 12), (1, 34, 40)]


def test_frameworks_say_which_epoch_it_is():
    s = SelectiveSampler(20, TopK(0.5), start=2, end=None, seed=0)
    s.set_epoch(1)  # resumed
    assert len(s) == 20
    loop(s, 20, 1)
    s.set_epoch(2)
    s.set_epoch(2)  # twice does no harm
    assert len(s) == 10
    next(iter(DataLoader(range(20), 8, sampler=s)))
    s.set_epoch(2)
    items = next(iter(DataLoader(range(20), 8, sampler=s)))
    s.observe(items, torch.rand(8))
    s.set_epoch(2)  # begun again
    assert s.epoch == 2 and s._seen == 0
    loop(s, 20, 1)
    s.set_epoch(0)  # another fit
    assert (s.epoch, s.past) == (0, 3) and len(s) == 20
    loop(s, 20, 1)
    assert [(r["fit"], r["epoch"], r["bp"]) for r in s.log] == [(0, 1, 20), (0, 2, 8), (0, 2, 10), (1, 0, 20)]
    assert s.memory.ages(None, 3).max() == 0


def test_progress_goes_from_none_to_all():
    for kw, n in ((dict(), 50), (dict(bs=8), 50), (dict(bs=8, drop_last=True), 50)):
        s = SelectiveSampler(n, TopK(0.5), epochs=5, start=1, end=4, seed=0, **kw)
        p = [s.progress]
        for _ in range(5):
            for items in DataLoader(range(n), 8, sampler=s, drop_last=kw.get("drop_last", False)):
                s.observe(items, torch.rand(len(items)))
                p.append(s.progress)
        assert p[0] == 0 and p[-1] == 1 and all(a < b for a, b in zip(p, p[1:]))
        assert all(abs(k / 5 - min(p, key=lambda v: abs(v - k / 5))) < 1e-9 for k in range(6))


class OfAGoal(Selector):
    "Is told the progress of the fit, and what the loss is"

    sure, keep, told, asked = True, 0.5, (), None

    def at(self, pct):
        self.told = (*self.told, pct)

    def check(self, loss_func):
        self.asked = loss_func

    def probs(self, losses, history=None, **context):
        return (losses > 0.5).float()


def test_selectors_are_told_what_they_want_to_know():
    selector, loss_func = OfAGoal(), nn.CrossEntropyLoss()
    s = SelectiveSampler(10, selector, loss_func, start=1, end=None, epochs=4)
    loop(s, 10, 4)
    assert selector.told == (0.25, 0.5, 0.75) and selector.asked is loss_func
    shrinking = LossShare(lambda p: 1 - p)
    s = SelectiveSampler(100, shrinking, start=1, end=None, epochs=4, max_age=9)
    loaded = [len(flat(e)) for e in loop(s, 100, 4, losses=torch.ones(100))]
    assert loaded == [100, 75, 50, 25]  # the fewest that hold the share


class AsDict(torch.utils.data.Dataset):
    "As a Hugging Face data set: dicts, many at a time"

    asked = ()

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"x": torch.tensor([i, i]), "label": -i}

    def __getitems__(self, idxs):
        self.asked = idxs
        return [self[i] for i in idxs]

    def extra(self):
        return "mine"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(9))


Pair = namedtuple("Pair", "a b")
samples = {
    "tuple": (lambda i: (i * 2, i), lambda s: (s[0], s[-1])),
    "list": (lambda i: [i * 2, i], lambda s: (s[0], s[-1])),
    "triple": (lambda i: (i * 2, i, 5), lambda s: (s[0], s[-1])),
    "named": (lambda i: Pair(i * 2, i), lambda s: (s[0].a, s[1])),
    "number": (lambda i: i * 2, lambda s: s),
    "tensor": (lambda i: torch.tensor([i * 2]), lambda s: (s[0][..., 0], s[1])),
    "dict": (lambda i: {"a": i * 2}, lambda s: (s["a"], s["items"])),
    "mapping": (lambda i: UserDict(a=i * 2), lambda s: (s["a"], s["items"])),
}


@pytest.mark.parametrize("kind", samples)
def test_samples_of_all_kinds_say_whose_they_are(kind):
    make, read = samples[kind]
    ds = WithItems([make(i) for i in range(12)])
    assert len(ds) == 12
    for d in (ds, pickle.loads(pickle.dumps(ds)), torch.utils.data.Subset(ds, range(11, -1, -1))):
        for batch in DataLoader(d, 5, shuffle=True):
            doubled, items = read(batch)
            assert torch.equal(torch.as_tensor(doubled), 2 * items)


def test_data_sets_of_dicts_that_give_many_at_a_time():
    ds = WithItems(AsDict(9))
    assert ds.extra() == "mine" and not hasattr(ds, "what") and hasattr(ds, "__getitems__")
    assert not hasattr(WithItems([1]), "__getitems__")
    batch = next(iter(DataLoader(ds, 4, sampler=[3, 1, 8, 0])))
    assert batch["items"].tolist() == [3, 1, 8, 0] == batch["x"][:, 0].tolist() and ds.dataset.asked == [3, 1, 8, 0]
    batch = next(iter(DataLoader(WithItems(AsDict(9), key="idx"), 4, num_workers=1)))
    assert batch["idx"].tolist() == [0, 1, 2, 3] and set(batch) == {"x", "label", "idx"}
    with pytest.raises(ValueError, match="entry 'label' already"):
        WithItems(AsDict(9), key="label")[0]
    with pytest.raises(TypeError, match="must have indices"):
        WithItems(Stream())


def state_of(s):
    return (
        s.memory.losses().nan_to_num(-1).tolist(),
        s.memory.times().tolist(),
        dict(s.record.counts),
        s._seen,
        len(s.record.log),
    )


@pytest.mark.parametrize(
    "kw, error, says",
    [
        (dict(items=[0, 1]), ValueError, "needs losses="),
        (dict(items=[0, 1], pred=torch.zeros(2, 3)), ValueError, "pred= and yb="),
        (dict(items=[0, 1], yb=torch.zeros(2).long()), ValueError, "pred= and yb="),
        (dict(items=[0, 1], losses=[1.0, 2.0]), ValueError, "pass pred="),
        (dict(items=[0, 1, 2], pred=torch.zeros(2, 3), yb=torch.zeros(2).long()), ValueError, "3 items, but 2 losses"),
        (dict(items=[0, 10], pred=torch.zeros(2, 3), yb=torch.zeros(2).long()), ValueError, "items holds 10"),
        (dict(items=[0.5], pred=torch.zeros(1, 3), yb=torch.zeros(1).long()), TypeError, "whole numbers"),
        (dict(items=[0, 1], losses=[1, 2], pred=torch.zeros(2, 3), loss="x"), TypeError, "invalid data type 'str'"),
    ],
)
def test_what_cannot_be_observed_changes_nothing(kw, error, says):
    s = SelectiveSampler(10, loss_func=nn.CrossEntropyLoss(), epochs=3)
    s.observe(torch.arange(10), pred=torch.randn(10, 3), yb=torch.zeros(10).long())
    before = state_of(s)
    with pytest.raises(error, match=says):
        s.observe(**kw)
    assert state_of(s) == before


def test_observe_takes_what_a_loop_has():
    "Lists, half precision, gradients, several targets, a loss of one's own"
    s = SelectiveSampler(4, TopK(0.5), epochs=3)
    s.observe([0, 1], [1, 2.5])
    s.observe(np.array([2]), torch.tensor([[3.0]], dtype=torch.bfloat16, requires_grad=True), loss=7.0)
    assert s.memory.losses().nan_to_num(-1).tolist() == [1, 2.5, 3, -1] and s.record.counts == dict(
        candidates=3, fp=0, bp=3
    )
    s.observe([3, 0], [5.0, 9.0], sure=[True, False])
    s.observe([1], [9.0], sure=False)
    assert s.memory.losses().tolist() == [1, 2.5, 3, 5] and s.memory.times().tolist() == [2, 2, 1, 1]
    two = SelectiveSampler(2, TopK(0.5), epochs=3, per_item=lambda pred, a, b: (pred - a - b).abs())
    two.observe([0, 1], pred=torch.tensor([1.0, 5.0]), yb=(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0])))
    assert two.memory.losses().tolist() == [2, 3]
    alone = SelectiveSampler(2, TopK(0.5), epochs=3, per_item=lambda pred: pred**2)
    alone.observe([0, 1], pred=torch.tensor([1.0, 5.0]))
    assert alone.memory.losses().tolist() == [1, 25]


def test_a_pass_without_observations_is_an_error():
    s = SelectiveSampler(10, TopK(0.5), start=1, end=None)
    first = list(s)
    with pytest.raises(RuntimeError, match="Nothing was observed in epoch 0"):
        s.set_epoch(1)
    assert list(s) == first  # a loader with workers may have looked at all of it for its first batches
    with pytest.raises(RuntimeError, match="Nothing was observed in epoch 0"):
        list(s)


def test_fractions_need_the_length_of_the_fit():
    s = SelectiveSampler(10, TopK(0.5))
    for call in (lambda: list(s), lambda: len(s)):
        with pytest.raises(ValueError, match="pass epochs="):
            call()
    s.epochs = 3
    assert len(list(s)) == 10


def test_unusual_losses_come_back_at_once():
    "An item whose loss is not finite counts as not seen"
    losses = torch.linspace(0, 1, 20)
    losses[3], losses[7] = np.nan, np.inf
    s = SelectiveSampler(20, TopK(0.5), start=1, end=None)
    with pytest.warns(UserWarning, match="2 losses of epoch 0 were NaN or infinite"):
        seen = loop(s, 20, 3, losses=losses)
    assert {3, 7} <= set(flat(seen[1])) & set(flat(seen[2])) and len(flat(seen[1])) == 9 + 2


@pytest.mark.parametrize("name", every_selector)
def test_state_goes_on_bit_for_bit(name):
    "After every epoch, whether the next one has been planned or not"
    torch.manual_seed(0)
    low, losses = torch.rand(61), torch.rand(6, 61)

    def make():
        selector = ReducibleLoss(low, 0.3) if name == "rho" else every_selector[name](61)
        return SelectiveSampler(61, selector, start=1, end=None, max_age=2, bs=5, seed=0)

    def go_on(s, k):
        seen = []
        for epoch in range(s.epoch, k):
            for items in DataLoader(range(61), 5, sampler=s):
                s.observe(
                    items, losses[epoch][items], pred=torch.stack([losses[epoch][items], -losses[epoch][items]], 1)
                )
                seen.append(items.tolist())
        return seen

    whole = make()
    want = go_on(whole, 6)
    for k in range(6):
        for planned in (False, True):
            a, b = make(), make()
            first = go_on(a, k)
            if planned:
                len(a)
            state = torch.load(save(a.state_dict()), weights_only=True)
            b.load_state_dict(state)
            assert first + go_on(b, 6) == want
            rows = [[{k: v for k, v in r.items() if not k.endswith("_s")} for r in s.log] for s in (whole, b)]
            assert str(rows[0]) == str(rows[1]) and whole.record.counts == b.record.counts
            assert torch.equal(whole.memory.losses(), b.memory.losses()) and torch.equal(
                whole.memory.times(), b.memory.times()
            )


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda s: s.pop("seed"), "lacks"),
        (lambda s: s.update(who="TopK(keep=0.1)"), "chooses by"),
        (lambda s: s.update(epoch=-1), "saved epoch"),
        (lambda s: s.update(past=-1), "saved past"),
        (lambda s: s["memory"].update(n_items=9), "of 9 items"),
        (lambda s: s["memory"].update(loss=torch.zeros(3)), "loss must be"),
        (lambda s: s["record"].pop("log"), "lacks"),
        (lambda s: s["record"].update(counts=dict(candidates=1)), "counts="),
    ],
)
def test_a_spoilt_state_changes_nothing(spoil, says):
    s = SelectiveSampler(10, TopK(0.5), start=1, end=None, seed=0)
    loop(s, 10, 2)
    state = s.state_dict()
    spoil(state)
    before = state_of(s)
    with pytest.raises(ValueError, match=says):
        s.load_state_dict(state)
    assert state_of(s) == before and s.epoch == 2


@pytest.mark.parametrize("n, replicas, bs", [(97, 2, 8), (97, 3, 8), (10, 3, None), (7, 4, 4), (100, 3, 10), (5, 8, 2)])
def test_shares_of_several_processes(n, replicas, bs):
    "All the same number, together all that was chosen, at most so many twice as are needed"
    losses = torch.rand(n)
    for keep in (0.001, 0.3, 0.5, 1.0):
        samplers = [
            SelectiveSampler(n, TopK(keep), start=1, end=None, bs=bs, seed=0, num_replicas=replicas, rank=r)
            for r in range(replicas)
        ]
        for epoch in range(2):
            shares = [list(s) for s in samplers]
            each = len(shares[0])
            assert {len(s) for s in shares} == {len(s) for s in samplers} == {each}
            together = [i for s in shares for i in s]
            assert len(together) - len(set(together)) < max(replicas, 1 if n >= replicas else replicas)
            want = n if epoch == 0 else max(min(2 * replicas, n), math.floor(keep * n + 0.5), 1)
            assert want - replicas * (bs or 0) / 2 <= len(set(together)) <= want
            if epoch and len(set(together)) > 2 * replicas:
                assert set(together) <= set(losses.topk(want).indices.tolist())
            if bs and epoch and n >= 2 * replicas:
                assert each <= bs or each % bs == 0 or each % bs >= bs / 2
                assert each % bs != 1
            for s, share in zip(samplers, shares):
                s.observe(torch.tensor(share), losses[share])
                s.memory.update(torch.arange(n), losses, trained=False, epoch=s.epoch)  # as if it had been shared
        for s in samplers:
            assert [row["candidates"] for row in s.log] == [-(-n // replicas)] * 2
