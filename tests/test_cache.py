"The cache against plain Python, and the items of a batch against indices that are planted in the data."
import copy
import math
import pickle
import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from common import NoisyRows, digits, digits_model
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.all import CategoryBlock, DataBlock, DataLoader, Datasets, IndexSplitter, RegressionBlock, SkipItemException, TfmdDL
from fastai.distributed import DistributedDL
from fastai.tabular.core import Categorify, TabularPandas
from fastai.text.data import LMDataLoader, SortedDL, pad_input
from fastai.vision.all import Flip, ImageBlock, IntToFloatTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsb.cache import ItemTracker, LossCache, choose, shortened
from fastsb.data import ArrayDL, ArrayDS
from fastsb.select import (Absolute, Capped, GradNorm, Hybrid, InfoBatch, LossShare, Percentile, Random, ReducibleLoss, Selection, Selector, Threshold, TopK,
                           bernoulli)

devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
on = pytest.mark.parametrize("device", devices)
kinds = {"exact": {}, "counted": {"exact_up_to": 0}, "chunked": {"exact_up_to": 0, "chunk": 77}}
of_kind = pytest.mark.parametrize("kind", kinds)


def make_cache(n, kind="exact", **kwargs):
    cache = LossCache(n, **kwargs)
    for k, v in kinds[kind].items():
        setattr(cache, k, v)
    return cache


# The cache ---------------------------------------------------------------------------------------------------------------
class Reference:
    "What the cache is defined to be, item by item"

    def __init__(self, n, momentum):
        self.n, self.m, self.d, self.times = n, np.float32(momentum), {}, [0] * n

    def update(self, items, losses, epoch, trained):
        last = {i: x for i, x in zip(items.tolist(), losses) if np.isfinite(x)}
        for i, x in last.items():
            self.d[i] = (self.m * self.d[i][0] + (np.float32(1) - self.m) * x if i in self.d else x, epoch)
        for i in items if trained else ():
            self.times[i] += 1

    def losses(self, epoch=None, max_age=None):
        known = [i in self.d and (max_age is None or epoch - self.d[i][1] <= max_age) for i in range(self.n)]
        return np.array([self.d[i][0] if k else np.nan for i, k in enumerate(known)], dtype=np.float32)

    def percentile(self, losses):
        seen = np.array([x for x, _ in self.d.values()], dtype=np.float32)
        return np.array([1 if np.isnan(x) or not len(seen) else np.float32((seen < x).sum()) / np.float32(len(seen)) for x in losses], dtype=np.float32)


@on
@pytest.mark.parametrize("momentum", [0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cache_is_what_a_dict_would_be(momentum, dtype, device):
    r = np.random.default_rng(int(momentum * 100))
    n = 25
    cache, ref = LossCache(n, momentum, device), Reference(n, momentum)
    test = torch.tensor([-np.inf, -1, 0, 0.5, 1, 2, 3.3, np.inf, np.nan])
    for step in range(150):
        size = int(r.integers(0, 14))
        items = r.integers(0, n, size)
        losses = r.choice([r.exponential(size=size), r.integers(0, 4, size) - 1.0])
        losses[r.random(size) < 0.2] = r.choice([np.nan, np.inf, -np.inf])
        losses, epoch, trained = torch.tensor(losses, dtype=dtype), step // 3, bool(r.random() < 0.7)
        cache.update(torch.tensor(items, device=device), losses.to(device), epoch, trained)
        ref.update(items, losses.float().numpy(), epoch, trained)
        got = cache.losses().cpu().numpy()
        np.testing.assert_allclose(got, ref.losses(), rtol=1e-6, atol=1e-7)
        assert cache.times().tolist() == ref.times
        np.testing.assert_array_equal(cache.ages(None, epoch + 2).cpu(), [epoch + 2 - ref.d[i][1] if i in ref.d else np.nan for i in range(n)])
        summary, age = cache.summary(epoch + 2), cache.ages(None, epoch + 2).nanmean().item()
        assert summary["seen"] == len(ref.d)
        np.testing.assert_allclose([summary["loss"], summary["age"]], [np.nanmean(got) if ref.d else np.nan, age], rtol=1e-4, atol=1e-5)
        for age in (0, 1, 5):
            aged = cache.losses(epoch=epoch + 3, max_age=age).cpu().numpy()
            np.testing.assert_array_equal(np.isnan(aged), np.isnan(ref.losses(epoch + 3, age)))
        ref.d = {i: (got[i], e) for i, (_, e) in ref.d.items()}  # so that rounding does not add up
        np.testing.assert_array_equal(cache.percentile(test.to(device)).cpu(), ref.percentile(test.numpy()))
        np.testing.assert_array_equal(cache.percentile(cache.losses()).cpu(), ref.percentile(got))
    some = torch.tensor([3, 3, 0, 24])
    np.testing.assert_array_equal(cache.losses(some).cpu(), got[some])
    assert cache.times(some).tolist() == [ref.times[i] for i in some]


def test_bits_are_kept():
    "Momentum 0 is the last loss, and any momentum the first one, bit for bit"
    for momentum in (0, 0.9):
        cache = LossCache(1, momentum)
        for x in (0.1, 1e-42, 3e38, -0.7):
            x = torch.tensor([x])
            if momentum:
                cache = LossCache(1, momentum)
            cache.update([0], x, 0)
            assert torch.equal(cache.losses(), x)


def test_what_overflows_float32_is_not_finite():
    cache = LossCache(2)
    cache.update([0, 1], torch.tensor([1e300, 1.0], dtype=torch.float64), 0)
    assert cache.losses().isnan().tolist() == [True, False]


def test_other_forms_of_items_and_losses():
    cache = LossCache(5)
    cache.update(np.array([1, 2]), torch.tensor([[1.0], [2.0]], requires_grad=True), 0)
    cache.update([3], [3.0], 0)
    cache.update(torch.tensor([4], dtype=torch.uint8), torch.ones(1, dtype=torch.float16), 0)
    cache.update([], torch.zeros(0), 0)
    assert cache.losses().nan_to_num(-1).tolist() == [-1, 1, 2, 3, 1]
    assert not cache.losses().requires_grad and len(cache) == 5 and repr(cache) == "LossCache(n_items=5, momentum=0.5), 4 of them seen"
    cache.losses()[:] = 9  # a copy
    assert cache.losses([1]).tolist() == [1]


def test_epochs_and_times_beyond_int16():
    cache = LossCache(2)
    for epoch in (0, 32767, 32768, 65535, 65536, 100000):
        cache.update([0], torch.ones(1), epoch)
        assert cache.ages([0], epoch + 5).tolist() == [5] and cache.ages([0], epoch + 30000).tolist() == [30000]
    cache = LossCache(3)
    cache._times[1] = 32766
    for _ in range(3):
        cache.update([1, 1, 2], torch.ones(3), 0)
    assert cache.times().tolist() == [0, 32767, 3]


class Writes(TorchDispatchMode):
    "Notes where `scatter_` writes"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "scatter_" and args[0].is_floating_point():
            self.at = args[2].tolist()
        return func(*args, **(kwargs or {}))


def test_no_item_is_written_twice():
    "Of several writes to one place a GPU lets any win; the last loss in the batch is to"
    cache, losses = LossCache(3, momentum=0), torch.rand(5000)
    items = torch.randint(3, (5000,))
    losses[torch.rand(5000) < 0.1] = torch.nan
    with Writes() as w:
        cache.update(items, losses, 0)
    assert sorted(i for i in w.at if i < 3) == [0, 1, 2]
    for i in range(3):
        assert cache.losses([i]) == losses[(items == i) & losses.isfinite()][-1]


def test_eight_bytes_an_item():
    assert sum(v.nbytes for v in vars(LossCache(1000)).values() if isinstance(v, torch.Tensor)) == 8 * 1001


def test_update_reads_nothing_on_the_host():
    "On the meta device there is nothing to read: whatever would wait for a device raises"
    cache = LossCache(1000, device="meta")
    cache.update(torch.zeros(64, dtype=torch.long, device="meta"), torch.zeros(64, device="meta"), 3)
    assert cache.percentile(cache.losses(torch.zeros(9, dtype=torch.long, device="meta"), epoch=5, max_age=2)).shape == (9,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        repr(cache)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_does_not_wait_for_the_gpu():
    cache = LossCache(1000, device="cuda")
    items, losses = torch.arange(64, device="cuda"), torch.rand(64, device="cuda")
    cache.update(items, losses, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.update(items, losses, 1)
        cache.percentile(cache.losses(items, epoch=5, max_age=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")


rng = np.random.default_rng(0)
distributions = {
    "exponential": rng.exponential(size=3000), "wide": rng.exponential(size=3000) ** 6, "normal": rng.normal(size=3000), "one": np.array([0.7]),
    "tied": rng.integers(-2, 4, 3000).astype(float), "constant": np.full(500, 0.3), "zeros": np.array([0.0, -0.0] * 50), "tiny": rng.random(500) * 1e-39,
    "huge": rng.normal(size=500) * 1e38, "close": 1 + rng.random(2000) * 1e-4, "neighbours": np.float32(1) + np.arange(-9, 9) * np.float32(2**-23),
}


@pytest.mark.parametrize("name", distributions)
@of_kind
def test_percentile_within_its_bound(name, kind):
    l = distributions[name].astype(np.float32)
    cache = make_cache(2 * len(l), kind)  # half of them are never seen
    cache.update(torch.randperm(2 * len(l))[: len(l)], torch.tensor(l), 0)
    q = np.concatenate([l, np.nextafter(l, np.float32(9)), [0, -1, np.inf, -np.inf, np.nan]]).astype(np.float32)
    got, want = cache.percentile(torch.tensor(q)).numpy(), np.searchsorted(np.sort(l), q) / len(l)
    assert got[-1] == 1 and got[-2] == 0 and got[-3] == 1
    if kind == "exact":
        np.testing.assert_array_equal(got[:-1], want[:-1].astype(np.float32))
        assert cache.error == 0
        return
    width = np.maximum(np.abs(q[:-3]) * 2.0**-11, 2.0**-137)  # no bin is wider
    near = np.array([(np.abs(l.astype(float) - x) <= w).mean() for x, w in zip(q[:-3].astype(float), width)])
    low = want[:-3] - got[:-3]
    assert (low >= -1e-6).all() and (low <= near + 1e-6).all() and (low <= cache.error + 1e-6).all()
    assert cache.error <= near.max() + 1e-6
    if name in ("tied", "constant", "zeros"):  # a bin of one value makes no error
        np.testing.assert_allclose(got[: len(l)], want[: len(l)], atol=1e-6)
    order = np.argsort(q[:-3], kind="stable")
    assert (np.diff(got[order]) >= 0).all()


@of_kind
def test_percentile_before_and_after_updates(kind):
    cache = make_cache(10, kind)
    q = torch.tensor([1.0, np.nan, -np.inf])
    assert cache.percentile(q).tolist() == [1, 1, 1]  # nothing seen: keep
    assert cache.error == 0
    cache.update([0, 1], torch.tensor([0.5, 2.0]), 0)
    rank = cache._ranked()
    assert cache.percentile(q).tolist() == [0.5, 1, 0] and cache._ranked() is rank  # made once
    cache.update([2, 3], torch.tensor([0.1, 0.2]), 0)
    assert cache.percentile(q.half()).tolist() == [0.75, 1, 0]  # and again


@of_kind
def test_state_goes_on(kind):
    a = make_cache(20, kind)
    a.update(torch.arange(15), torch.rand(15), 2)
    a.update(torch.arange(5), torch.rand(5), 3)
    b = make_cache(20, kind)
    b.update([19], torch.ones(1), 0)
    b.percentile(torch.ones(1))
    state = torch.load(save(a.state_dict()), weights_only=True)
    b.load_state_dict(state)
    for c in (b, pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert torch.equal(c.times(), a.times())
        for x, y in ((c.losses(), a.losses()), (c.ages(None, 5), a.ages(None, 5)), (c.percentile(torch.rand(9)[:1]), a.percentile(torch.rand(9)[:1] * 0 + 2))):
            assert x.shape == y.shape and (x is None or x.shape != a.losses().shape or torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)))
        q = torch.rand(30)
        assert torch.equal(c.percentile(q), a.percentile(q))
    b.update([0], torch.tensor([9.0]), 4)
    assert a.losses([0]) != b.losses([0]) and state["loss"][0] == a.losses([0])[0]  # copies
    c = make_cache(21, kind)
    with pytest.raises(ValueError, match="of 20 items, this one of 21"):
        c.load_state_dict(state)
    assert c.losses().isnan().all() and not c.times().any()


def save(o):
    import io
    f = io.BytesIO()
    torch.save(o, f)
    f.seek(0)
    return f


@pytest.mark.parametrize("call, error, says", [
    (lambda: LossCache(0), ValueError, "n_items=0"), (lambda: LossCache(2.5), TypeError, "n_items=2.5"), (lambda: LossCache(True), TypeError, "n_items=True"),
    (lambda: LossCache(3, 1), ValueError, "momentum=1"), (lambda: LossCache(3, -0.1), ValueError, "momentum=-0.1"),
    (lambda: LossCache(3, "a"), TypeError, "momentum='a'"), (lambda: LossCache(3, math.nan), ValueError, "momentum=nan"),
    (lambda: LossCache(3).update([3], torch.ones(1), 0), ValueError, "items holds 3"),
    (lambda: LossCache(3).update([-1], torch.ones(1), 0), ValueError, "holds -1"),
    (lambda: LossCache(3).update([0.5], torch.ones(1), 0), TypeError, "whole numbers"),
    (lambda: LossCache(3).update([True, False, True], torch.ones(3), 0), TypeError, "whole numbers"),
    (lambda: LossCache(3).update([0, 1], torch.ones(3), 0), ValueError, "2 items, but 3 losses"),
    (lambda: LossCache(3).update([0], torch.ones(1), -1), ValueError, "epoch=-1"),
    (lambda: LossCache(3).update([0], torch.ones(1), 1.5), TypeError, "epoch=1.5"),
    (lambda: LossCache(3).losses([7]), ValueError, "items holds 7"), (lambda: LossCache(3).losses(max_age=1), ValueError, "pass epoch="),
    (lambda: LossCache(3).losses(epoch=1, max_age=-1), ValueError, "max_age=-1"), (lambda: LossCache(3).ages([0], None), TypeError, "epoch=None"),
    (lambda: choose("c", Percentile(), 0), TypeError, "cache='c'"), (lambda: choose(LossCache(3), 1, 0), TypeError, "selector=1"),
    (lambda: choose(LossCache(3), Percentile(), "a"), TypeError, "epoch='a'"), (lambda: choose(LossCache(3), Percentile(), 0, chunk=0), ValueError, "chunk=0"),
    (lambda: choose(LossCache(3), Percentile(), 0, items=[5]), ValueError, "items holds 5"),
    (lambda: choose(LossCache(3), Absolute(), 0), ValueError, "looks at predictions"),
    (lambda: choose(LossCache(3), GradNorm(), 0), ValueError, "score='model'"),
    (lambda: choose(LossCache(3), Capped(Absolute()), 0), ValueError, "looks at predictions"),
])
def test_errors_name_the_argument(call, error, says):
    with pytest.raises(error, match=says):
        call()


# Choosing ----------------------------------------------------------------------------------------------------------------
def some_cache(n=1000, unseen=100, kind="exact"):
    cache, g = make_cache(n, kind), torch.Generator().manual_seed(3)
    order = torch.randperm(n, generator=g)[: n - unseen]
    for epoch, part in enumerate(order.chunk(4)):
        cache.update(part, torch.empty(len(part)).exponential_(generator=g), epoch)
    return cache


@of_kind
@pytest.mark.parametrize("make", [lambda: Percentile(1, seed=5), lambda: Percentile(3, seed=5), lambda: Hybrid(2, 0.3, seed=5), lambda: Random(0.2, seed=5),
                                  lambda: Capped(Percentile(1, seed=5), 0.8)], ids=["p1", "p3", "hybrid", "random", "capped"])
def test_choice_does_not_depend_on_the_chunks(make, kind):
    "It is what `select` gives with the same draws for the known ones; unknown items are always there; no global random state moves"
    cache, states = some_cache(kind=kind), (torch.get_rng_state(), random.getstate())
    l = cache.losses(epoch=5, max_age=3)
    known = l.isfinite().nonzero().flatten()
    s = make().select(l[known], cache)
    want_p, want = torch.ones(1000).scatter(0, known, s.p), torch.cat([known[s.idx], l.isnan().nonzero().flatten()]).sort().values
    assert 0 < len(s.idx) < len(known) < 1000
    for chunk in (1, 17, 1000, 2**18):
        idx, p, w = choose(cache, make(), 5, max_age=3, chunk=chunk)
        assert w is None and idx.dtype == torch.long and torch.equal(idx, want) and torch.equal(p, want_p[want])
    assert choose(cache, make(), 5, max_age=3, probs=False)[1] is None
    assert set(l.isnan().nonzero().flatten().tolist()) <= set(idx.tolist())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


def test_choice_among_some():
    cache = some_cache()
    items = torch.tensor([5, 900, 3, 3, 77, 412, 5])
    for sel in (Percentile(0), Threshold(-1), TopK(1.0)):
        assert choose(cache, sel, 0, items=items)[0].tolist() == [3, 5, 77, 412, 900]
    assert [len(o) for o in choose(cache, Percentile(), 0, items=[])[:2]] == [0, 0]
    items = torch.randperm(1000)[:300]
    l = cache.losses(items)
    idx, *_ = choose(cache, Percentile(1, seed=1), 0, items=items, chunk=50)
    share = torch.where(l.isnan(), 1.0, cache.percentile(l)).mean()
    assert abs(len(idx) / 300 - share) < 0.1 and set(idx.tolist()) <= set(items.tolist()) and idx.tolist() == sorted(idx.tolist())
    known = (~l.isnan()).nonzero().flatten()
    k = math.floor(0.25 * len(known) + 0.5)
    want = torch.cat([items[known][l[known].topk(k).indices], items[l.isnan()]]).sort().values
    idx, p, _ = choose(cache, TopK(0.25), 0, items=items)  # a number is of those that are known
    assert torch.equal(idx, want) and (p == 1).all()
    assert len(choose(cache, Percentile(3, exact=True), 0, items=items)[0]) == k + 300 - len(known)


def test_choice_of_fixed_numbers_and_by_item():
    cache = some_cache(unseen=0)
    l = cache.losses()
    assert torch.equal(choose(cache, TopK(0.1), 9, chunk=10)[0], l.topk(100).indices.sort().values)
    assert len(choose(cache, Percentile(1, exact=True), 9, chunk=7)[0]) == 500
    for make in (lambda: LossShare(0.7), lambda: InfoBatch(seed=1)):
        idx, p, w = choose(cache, make(), 9, chunk=7)
        want = make().select(l, cache)
        assert torch.equal(idx, want.idx) and torch.equal(p, want.p[idx]) and (w is None if want.w is None else torch.equal(w, want.w))
    assert choose(cache, Threshold(1.0), 9, chunk=10)[0].tolist() == (l > 1).nonzero().flatten().tolist()
    low = torch.rand(1000)
    assert torch.equal(choose(cache, ReducibleLoss(low, 0.1), 9)[0], (l - low).topk(100).indices.sort().values)
    for sel in (TopK(0.1), Percentile(9), InfoBatch(), Percentile(3, exact=True)):  # all of them too old
        idx, p, w = choose(cache, sel, 9, max_age=0)
        assert idx.tolist() == list(range(1000)) and (p == 1).all() and (w is None or (w == 1).all())


class Weighing(Selector):
    "Halves at random, and weighs each by its item's number"
    weighted, keep = True, 0.5

    def select(self, losses, history=None, u=None, items=None, **context):
        idx = bernoulli(torch.full_like(losses, 0.5), self.uniform(len(losses), losses.device)).flip(0)
        return Selection(idx, torch.full_like(losses, 0.5), items[idx].float())


def test_weights_stay_with_their_items():
    cache = some_cache()
    for items in (None, torch.randperm(1000)[:400]):
        idx, p, w = choose(cache, Weighing(seed=0), 0, items=items, chunk=64)
        known = cache.losses(idx).isfinite()
        assert torch.equal(torch.where(known, idx, 1).float(), w) and torch.equal(p, torch.where(known, 0.5, 1.0))
        assert not known.all() and idx.tolist() == sorted(idx.tolist()) and len(idx) > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_choice_on_the_gpu():
    cache = LossCache(1000, device="cuda")
    cache.load_state_dict(some_cache().state_dict())
    for sel in (Percentile(1), TopK(0.3), Percentile(1, exact=True)):
        idx, *_ = choose(cache, sel, 3, chunk=100)
        assert idx.device.type == "cpu" and abs(len(idx) / 1000 - (0.3 if isinstance(sel, TopK) else 0.55)) < 0.1


# Which items is a batch made of? --------------------------------------------------------------------------------------------
class Rows:
    "Item i is (a float row with 1000+i in it, 1000+i); every `skip`-th cannot be loaded"

    def __init__(self, n, skip=0):
        self.n, self.skip = n, skip

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if self.skip and i % self.skip == 1:
            raise SkipItemException()
        return torch.full((3,), 1000.0 + i), 1000 + int(i)


class Numbers(Rows):
    def __getitem__(self, i):
        return super().__getitem__(i)[1]


class Named(Rows):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return {"x": x, "y": y}


class Texts:
    "Item i is 1000+i followed by a random number of zeros"

    def __init__(self, n, r):
        self.n, self.lens = n, r.integers(1, 9, n)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor([1000 + int(i)] + [0] * self.lens[i]), 1000 + int(i)


def number(i):
    return i + 1000


def image(i):
    return np.full((6, 6, 3), i, dtype=np.uint8)


def second(b):
    return b[1].flatten().long() - 1000


def tabular(n, r, **kwargs):
    df = pd.DataFrame({"a": r.normal(size=n), "c": r.choice(list("xy"), n), "y": np.arange(n) + 1000.0})
    to = TabularPandas(df, procs=[Categorify], cat_names=["c"], cont_names=["a"], y_names="y", y_block=RegressionBlock(), splits=(list(range(n)), [0]))
    return to.dataloaders(**kwargs)[0]


def blocks(n, r, bs, **kwargs):
    "An image DataBlock whose training set is every other of some pictures; picture i is of colour i"
    dls = DataBlock((ImageBlock, RegressionBlock), get_x=image, get_y=number, splitter=IndexSplitter(list(range(1, 2 * n, 2))),
                    batch_tfms=[Flip(p=1.0)]).dataloaders(range(2 * n), bs=bs, device="cpu", **kwargs)
    return dls[0]


def block_items(b):
    x, y = b
    assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y.long() - 1000)
    return (y.long() - 1000) // 2


def array_dl(n, r, **kwargs):
    ds = ArrayDS(torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 4, 4, 1), torch.arange(n) + 1000, 0)
    return ArrayDL(ds, after_batch=[IntToFloatTensor()], **kwargs)


def subset(n, r, **kwargs):
    "The second of two subsets of a Datasets; its loader counts from 0 again"
    dss = Datasets(list(range(-n, n)), [[number]], splits=(list(range(n)), list(range(n, 2 * n))))
    return TfmdDL(dss.subset(1), **kwargs)


zoo = {  # how to make a loader of n items; how to read the items off its batch
    "plain": (lambda n, r, **k: DataLoader(Rows(n), **k), second),
    "numbers": (lambda n, r, **k: DataLoader(Numbers(n), **k), lambda b: b - 1000),
    "dicts": (lambda n, r, **k: DataLoader(Named(n), **k), lambda b: b["y"] - 1000),
    "skipping": (lambda n, r, **k: DataLoader(Rows(n, 5), **k), second),
    "skipping tfmd": (lambda n, r, **k: TfmdDL(Rows(n, 3), **k), second),
    "tfmd": (lambda n, r, **k: TfmdDL(Rows(n), **k), second),
    "weighted": (lambda n, r, **k: WeightedDL(Rows(n), wgts=r.exponential(size=n), **k), second),
    "partial": (lambda n, r, **k: PartialDL(Rows(n), partial_n=max(1, n // 2), **k), second),
    "subset": (subset, lambda b: b[0] - 1000),
    "tabular": (lambda n, r, **k: tabular(n, r, **k), lambda b: b[2].flatten().long() - 1000),
    "text": (lambda n, r, **k: SortedDL(Texts(n, r), before_batch=pad_input, **k), second),
    "images": (blocks, block_items),
    "arrays": (array_dl, second),
    "own get_idxs": (lambda n, r, **k: DataLoader(Rows(n), get_idxs=lambda: [n - 1, 0, n // 2, 0], n=4, **k), second),
    "own functions": (lambda n, r, **k: DataLoader(Rows(n), after_batch=lambda b: (b[0], b[1] + 1), after_item=lambda o: o, **k), lambda b: second(b) - 1),
}


def plain_state(dl):
    "All attributes but those that any iteration changes; and where the random numbers are"
    changing = "rng", "_DataLoader__idxs", "it", "_types", "_n_inp"
    return {k: id(v) for k, v in vars(dl).items() if k not in changing}, dl.rng.getstate(), np.random.get_state()[1].tolist()


def rewind(dl, seed):
    dl.rng = random.Random(seed)
    np.random.seed(seed)


def same(a, b):
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and torch.equal(torch.Tensor(a), torch.Tensor(b))


def check_loader(dl, items_of, r, seed):
    "Every batch with and without tracking, and shortened; the loader afterwards as it was before"
    rewind(dl, seed)
    want = list(dl)
    before = plain_state(dl)
    rewind(dl, seed)
    with ItemTracker(dl) as t:
        got = []
        for b in dl:
            assert t.items.dtype == torch.long and torch.equal(t.items, torch.Tensor(items_of(b)).long())
            got.append(b)
    assert same(want, got) and plain_state(dl) == before

    # shortened: the loader's own order without the others
    n, n_batches = ItemTracker(dl).n_items, len(dl)
    chosen = torch.tensor(r.permutation(n)[: int(r.integers(1, n + 1))])
    for items in (chosen, torch.arange(n)):
        rewind(dl, seed)
        dl.randomize()
        order = [int(i) for i in dl.get_idxs() if int(i) in set(items.tolist())]
        after = dl.rng.getstate()
        order = order or items.sort().values.tolist()
        n_order, bs, drop = len(order), dl.bs, dl.drop_last and len(order) >= dl.bs
        sizes = [bs] * (n_order // bs) + [n_order % bs] * (not drop and n_order % bs > 0)
        if len(sizes) > 1 and bs > sizes[-1] < max(bs / 2, 2):  # no small last batch: smaller ones, or without the last
            even = math.ceil(n_order / len(sizes))
            last = n_order - even * (len(sizes) - 1)
            sizes = [even] * (len(sizes) - 1) + [last] if last >= max(even / 2, 2) else sizes[:-1]
        rewind(dl, seed)
        with shortened(dl, items), ItemTracker(dl) as t:
            assert dl.drop_last == drop and len(dl) == len(sizes) > 0
            got = []
            for b in dl:
                assert torch.equal(t.items, torch.Tensor(items_of(b)).long())
                got.append(t.items.tolist())
        skip = getattr(dl.dataset, "skip", 0)
        flat = sum(got, [])
        expect = [i for i in order if not (skip and i % skip == 1)]
        if not skip:
            assert [len(b) for b in got] == sizes
        if dl.fake_l.num_workers < 2 or not skip:
            rest = iter(expect)
            assert all(i in rest for i in flat)  # the loader's own order...
        assert not Counter(flat) - Counter(expect)
        if sum(sizes) == n_order and not drop:
            assert sorted(flat) == sorted(expect)  # ...of all
        assert dl.rng.getstate() == after and plain_state(dl)[0] == before[0] and len(dl) == n_batches
    rewind(dl, seed)
    assert same(want, list(dl))


@pytest.mark.parametrize("name", zoo)
def test_items_of_many_random_loaders(name):
    make, items_of = zoo[name]
    for seed in range(8):
        r = np.random.default_rng(seed)
        n, bs = int(r.integers(1, 40)), int(r.integers(1, 9))
        shuffle = bool(r.integers(2))
        dl = make(n, r, bs=bs, shuffle=shuffle, drop_last=bool(r.integers(2)), num_workers=0)
        check_loader(dl, items_of, r, seed)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["plain", "dicts", "skipping", "weighted", "text", "images", "arrays", "tabular"])
def test_items_from_worker_processes(name, workers):
    make, items_of = zoo[name]
    r = np.random.default_rng(workers)
    dl = make(23, r, bs=4, shuffle=True, drop_last=bool(r.integers(2)), num_workers=workers)
    if name == "images":  # augmentation would differ in each process
        with ItemTracker(dl) as t:
            assert all([torch.equal(t.items, block_items(b)) for b in dl])
        return
    check_loader(dl, items_of, r, workers)


def test_tracking_survives_breaks_exceptions_and_other_uses():
    dl = TfmdDL(Rows(23), bs=4, shuffle=True, drop_last=True, num_workers=0)
    before = plain_state(dl)[0]
    tracker = ItemTracker(dl)
    with pytest.raises(ZeroDivisionError), tracker as t, shortened(dl, range(11)):
        for i, _ in enumerate(dl):
            1 / (1 - i)
    assert plain_state(dl)[0] == before and len(dl) == 5
    with tracker as t:  # again; with half an epoch, and items that were asked for by hand
        for b in dl:
            dl.do_item(3)
            dl.dataset[2]
            assert torch.equal(t.items, second(b))
            break
        assert t.items is not None
        for b in dl:
            assert torch.equal(t.items, second(b))
        for b in dl:
            kept = t.items
            b2 = dl.one_batch()
            assert torch.equal(t.items, second(b2)) and torch.equal(kept, second(b))
    t.stop()
    assert plain_state(dl)[0] == before


def test_any_order_of_ending():
    dl = DataLoader(Rows(9), bs=2)
    before = plain_state(dl)[0]
    t, s = ItemTracker(dl).start(), shortened(dl, [1, 2, 5, 6]).start()
    t.stop()
    assert [second(b).tolist() for b in dl] == [[1, 2], [5, 6]]
    s.stop()
    assert plain_state(dl)[0] == before and len(dl) == 5
    dl = DataLoader(Rows(9), bs=2, shuffle=True)
    before = plain_state(dl)
    with ItemTracker(dl), shortened(dl, [3]):
        pass
    assert plain_state(dl) == before


def test_a_fixed_epoch_may_be_looked_at_twice():
    dl = DataLoader(Rows(30), bs=4, shuffle=True)
    with shortened(dl, range(10)), ItemTracker(dl) as t:
        first = [t.items.tolist() for _ in dl]
        dl.one_batch()
        assert first == [t.items.tolist() for _ in dl]


def test_a_fixed_number_of_items_is_any_of_them():
    "Also if all are equally likely: which two go together does not depend on where they stand in the data set"
    n, k, together, cache = 40, 20, np.zeros((40, 40)), LossCache(40)
    cache.update(torch.arange(n), torch.ones(n), 0)
    sel = Random(0.5, exact=True, seed=0)
    for _ in range(4000):
        idx, p, _ = choose(cache, sel, 1)
        assert len(idx) == k and torch.equal(idx, idx.unique()) and torch.allclose(p, torch.full((k,), 0.5))
        together[np.ix_(idx, idx)] += 1
    share = together[~np.eye(n, dtype=bool)] / 4000
    expect = k * (k - 1) / n / (n - 1)
    assert np.abs(np.diag(together) / 4000 - 0.5).max() < 5 * 0.5 / 4000**0.5
    assert np.abs(share - expect).max() < 5 * (expect * (1 - expect) / 4000) ** 0.5


def test_nothing_chosen_and_too_few_chosen():
    dl = DataLoader(Rows(30), bs=8, drop_last=True)
    with shortened(dl, []):
        assert len(dl) == 0 and list(dl) == []
    with shortened(dl, [4, 20]):  # less than a batch: it is not dropped
        assert len(dl) == 1 and [second(b).tolist() for b in dl] == [[4, 20]]
    with shortened(dl, range(9)):
        assert len(dl) == 1 and dl.drop_last
    assert dl.drop_last
    dl = DataLoader(Rows(30), bs=4)
    for k, sizes in ((3, [3]), (1, [1]), (5, [3, 2]), (9, [3, 3, 3]), (10, [4, 4, 2]), (13, [4, 4, 4]), (30, [4] * 7 + [2])):  # no small last batch
        with shortened(dl, range(k)):
            assert [len(b[1]) for b in dl] == sizes and len(dl) == len(sizes)
    assert dl.bs == 4
    waiting = Counter()
    for _ in range(300):
        with shortened(dl, range(13)), ItemTracker(dl) as t:
            waiting.update(set(range(13)) - {i for _ in dl for i in t.items.tolist()})
    assert sum(waiting.values()) == 300 and len(waiting) == 13 and max(waiting.values()) < 60  # nobody always, though this loader does not shuffle
    dl = WeightedDL(Rows(30), wgts=[1.0] + [0.0] * 29, bs=8, shuffle=True, num_workers=0)
    with shortened(dl, [7, 8]):  # it never draws these
        assert [second(b).tolist() for b in dl] == [[7, 8]]


def test_sorted_loader_stays_sorted():
    ds = Texts(200, np.random.default_rng(0))
    dl = SortedDL(ds, before_batch=pad_input, bs=10, shuffle=True, num_workers=0)
    with shortened(dl, torch.randperm(200)[:90]), ItemTracker(dl) as t:
        assert np.mean(np.concatenate([np.diff(ds.lens[t.items]) <= 0 for _ in dl])) > 0.8
    dl = SortedDL(ds, before_batch=pad_input, bs=10, shuffle=False, num_workers=0)
    with shortened(dl, torch.randperm(200)[:90]), ItemTracker(dl) as t:
        assert (np.diff(np.concatenate([ds.lens[t.items] for _ in dl])) <= 0).all()


def test_a_tracked_loader_can_be_copied_and_sent():
    "A copy is of the loader as it was; what is sent to another process goes on tracking there"
    dl = TfmdDL(Rows(9), bs=2, num_workers=0, after_batch=[Flip(p=0.0)])
    with ItemTracker(dl) as t, shortened(dl, [0, 5, 7, 8]):
        n = dl.new(shuffle=False)
        assert type(n) is TfmdDL and "do_item" not in vars(n) and len(n) == 5 and [second(b).tolist() for b in n][0] == [0, 1]
        assert [b[0].shape for b in n] == [(2, 3)] * 4 + [(1, 3)] and t.items is None
        for sent in (pickle.loads(pickle.dumps(dl)), copy.deepcopy(dl)):
            other = sent.do_item.__self__
            assert other is not t
            for b in sent:
                assert torch.equal(other.items, second(b))
            assert second(b).tolist() == [7, 8] and t.items is None
        assert [t.items.tolist() for _ in dl] == [[0, 5], [7, 8]]
    d2 = DataLoader(Rows(9), bs=2, after_batch=lambda b: (b[0], b[1] * 2), do_batch=lambda b: (torch.stack([o[0] for o in b]), torch.tensor([o[1] for o in b])))
    with ItemTracker(d2) as t:
        assert [(t.items + 1000).mul(2).tolist() for _ in d2] == [b[1].tolist() for b in d2.new()]


def test_the_pipeline_is_still_a_pipeline():
    "Training transforms run in training only, decoding works, and transforms can be added, while items are tracked"
    dl = blocks(8, None, 4, num_workers=0)
    with ItemTracker(dl) as t:
        dl.after_batch.split_idx = 1
        b = next(iter(dl))
        assert dl.after_batch.split_idx == 0  # set by `before_iter`, since it takes it for a Pipeline
        kept = t.items
        assert dl.decode(b)[0].shape == b[0].shape and len(dl.decode_batch(b)) == 4 and repr(dl.after_batch).startswith("Pipeline")
        dl.to("cpu")
        assert t.items is kept and any(isinstance(f, Flip) for f in dl.after_batch.fs)


def test_pinning_turns_tuples_to_lists():
    dl = DataLoader(Rows(4), bs=2)
    with ItemTracker(dl) as t:
        dl.pin_memory = True
        assert dl.after_batch({"_items": torch.tensor([1, 2]), "_batch": [torch.ones(2), torch.ones(2)]})[0].shape == (2,)
        assert type(dl.after_batch({"_items": torch.tensor([1, 2]), "_batch": [torch.ones(2)]})) is tuple and t.items.tolist() == [1, 2]


# Loaders that it cannot work with ---------------------------------------------------------------------------------------------
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Endless:
    def __getitem__(self, i):
        return i


class OwnLength(TfmdDL):
    def __len__(self):
        return 7


class OwnBatches(TfmdDL):
    def create_batches(self, samps):
        yield from ([torch.ones(2)] for _ in samps)


class Doubling(TfmdDL):
    def create_batch(self, b):
        return super().create_batch(list(b) * 2)


def lm_loader():
    return LMDataLoader([(torch.arange(50),)], lens=[50], bs=2, seq_len=5)


def distributed():
    dl = DistributedDL.__new__(DistributedDL)
    dl.__dict__.update(vars(TfmdDL(Rows(8), bs=2, num_workers=0)))
    return dl


@pytest.mark.parametrize("make, says", [
    (lambda: torch.utils.data.DataLoader([1, 2, 3]), "only fastai's DataLoaders"), (lambda: [torch.ones(2)], "only fastai's DataLoaders"),
    (lambda: DataLoader(Stream(), bs=2), "no indices or no length"), (lambda: DataLoader(Endless(), bs=2), "no indices or no length"),
    (lambda: DataLoader([torch.ones(2)], bs=None), "bs=None"), (lm_loader, "one long text"), (distributed, "shares them out"),
    (lambda: DataLoaders(DataLoader(Rows(3), bs=1), DataLoader(Rows(3), bs=1)), "such as dls.train"),
])
def test_refused_at_the_start(make, says):
    dl = make()
    before = dict(vars(dl)) if hasattr(dl, "__dict__") else None
    for f in (lambda: ItemTracker(dl).start(), lambda: shortened(dl, [0]).start()):
        with pytest.raises(ValueError, match=says) as e:
            f()
        assert "score='model'" in str(e.value) or "dls.train" in str(e.value)
    assert before is None or vars(dl) == before


def test_refused_on_the_first_batch():
    for cls, says in ((OwnBatches, "a way of its own"), (Doubling, "8 rows was made of 4 items")):
        dl = cls(Rows(8), bs=4, num_workers=0)
        with pytest.raises(ValueError, match=says), ItemTracker(dl):
            list(dl)
        assert "do_item" not in vars(dl)
    dl = OwnLength(Rows(8), bs=4, num_workers=0)
    with pytest.raises(ValueError, match="counts its batches"):
        shortened(dl, [1]).start()
    assert "get_idxs" not in vars(dl) and dl.n == 8
    with pytest.raises(ValueError, match="items holds 8"):
        shortened(dl, [8])
    with ItemTracker(dl), pytest.raises(ValueError, match="already"):
        ItemTracker(dl).start()
    assert "do_item" not in vars(dl)


# In a Learner ---------------------------------------------------------------------------------------------------------------
class Watch(Callback):
    "Compares the items with the data in each training batch, and shortens every other epoch"

    def __init__(self, x):
        self.x, self.seen, self.pcts = x, [], []

    def before_fit(self):
        self.tracker = ItemTracker(self.dls.train).start()

    def before_train(self):
        self.short = shortened(self.dls.train, range(0, 200, 3)).start() if self.epoch % 2 else None

    def before_batch(self):
        if not self.training:
            return
        assert torch.equal(self.x[self.tracker.items], self.xb[0])
        self.seen.append((self.epoch, len(self.yb[0])))
        self.pcts.append(self.pct_train)

    def after_train(self):
        if self.short:
            self.short.stop()

    def after_epoch(self):
        self.learn.n_valid = len(self.learn.dls.train.new(shuffle=False, drop_last=False))

    def after_fit(self):
        self.tracker.stop()


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_learner(workers):
    x, y = digits(300)
    dls = DataLoaders.from_dsets(NoisyRows(x[:200], y[:200], 0), NoisyRows(x[200:], y[200:], 0), bs=32, device="cpu", num_workers=workers)
    before = plain_state(dls.train)[0]
    learn = Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat(), cbs=Watch(x))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3 if workers == 0 else 2, 1e-2)
    w = learn.watch
    assert sum(k for e, k in w.seen if e == 0) == 192 and sum(k for e, k in w.seen if e == 1) == 64 and learn.n_valid == 7
    n = len(w.seen)
    assert w.pcts[0] == 0 and (np.diff(w.pcts) > 0).all() and max(w.pcts) < 1 and n == (14 if workers == 0 else 8)
    assert plain_state(dls.train)[0] == before


def test_category_blocks_too():
    dls = DataBlock((ImageBlock, CategoryBlock), get_x=image, get_y=lambda i: "ab"[i % 2], splitter=IndexSplitter([0, 1])).dataloaders(
        range(20), bs=4, device="cpu", num_workers=0)
    with ItemTracker(dls.train) as t:
        for x, y in dls.train:
            assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), t.items + 2) and torch.equal(torch.Tensor(y).long(), t.items % 2)
