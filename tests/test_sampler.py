"Which items an epoch loads: the choice by what is remembered, and the sampler for any PyTorch loader."
import math
import random

import numpy as np
import pytest
import torch
from test_memory import make_memory, of_kind

from fastsb.memory import ItemMemory
from fastsb.sampler import choose
from fastsb.select import (Absolute, Capped, GradNorm, Hybrid, InfoBatch, LossShare, Percentile, Random, ReducibleLoss,
                           Selection, Selector, Threshold, TopK, bernoulli)


def some_memory(n=1000, unseen=100, kind="exact"):
    memory, g = make_memory(n, kind), torch.Generator().manual_seed(3)
    order = torch.randperm(n, generator=g)[: n - unseen]
    for epoch, part in enumerate(order.chunk(4)):
        memory.update(part, torch.empty(len(part)).exponential_(generator=g), epoch=epoch)
    return memory


@of_kind
@pytest.mark.parametrize("make", [lambda: Percentile(1, seed=5), lambda: Percentile(3, seed=5), lambda: Hybrid(2, 0.3, seed=5), lambda: Random(0.2, seed=5),
                                  lambda: Capped(Percentile(1, seed=5), 0.8)], ids=["p1", "p3", "hybrid", "random", "capped"])
def test_choice_does_not_depend_on_the_chunks(make, kind):
    "It is what `select` gives with the same draws for the known ones; unknown items are always there; no global random state moves"
    memory, states = some_memory(kind=kind), (torch.get_rng_state(), random.getstate())
    l = memory.losses(epoch=5, max_age=3)
    known = l.isfinite().nonzero().flatten()
    s = make().select(l[known], memory)
    want_p, want = torch.ones(1000).scatter(0, known, s.p), torch.cat([known[s.idx], l.isnan().nonzero().flatten()]).sort().values
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
    assert abs(len(idx) / 300 - share) < 0.1 and set(idx.tolist()) <= set(items.tolist()) and idx.tolist() == sorted(idx.tolist())
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
        assert torch.equal(idx, want.idx) and torch.equal(p, want.p[idx]) and (w is None if want.w is None else torch.equal(w, want.w))
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


@pytest.mark.parametrize("call, error, says", [
    (lambda: choose("c", Percentile(), 0), TypeError, "memory='c'"), (lambda: choose(ItemMemory(3), 1, 0), TypeError, "selector=1"),
    (lambda: choose(ItemMemory(3), Percentile(), "a"), TypeError, "epoch='a'"), (lambda: choose(ItemMemory(3), Percentile(), 0, chunk=0), ValueError, "chunk=0"),
    (lambda: choose(ItemMemory(3), Percentile(), 0, items=[5]), ValueError, "items holds 5"),
    (lambda: choose(ItemMemory(3), Absolute(), 0), ValueError, "looks at predictions"),
    (lambda: choose(ItemMemory(3), GradNorm(), 0), ValueError, "score='model'"),
    (lambda: choose(ItemMemory(3), Capped(Absolute()), 0), ValueError, "looks at predictions"),
])
def test_errors_name_the_argument(call, error, says):
    with pytest.raises(error, match=says):
        call()
