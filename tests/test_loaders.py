"The items of a batch against indices that are planted in the data, and epochs of chosen items."

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
from fastai.data.all import (
    CategoryBlock,
    DataBlock,
    DataLoader,
    Datasets,
    IndexSplitter,
    RegressionBlock,
    SkipItemException,
    TfmdDL,
)
from fastai.tabular.core import Categorify, TabularPandas
from fastai.text.data import LMDataLoader, SortedDL, pad_input
from fastai.vision.all import Flip, ImageBlock, IntToFloatTensor

from fastsb.data import ArrayDL, ArrayDS
from fastsb.loaders import ItemTracker, item_count, shortened


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
    to = TabularPandas(
        df,
        procs=[Categorify],
        cat_names=["c"],
        cont_names=["a"],
        y_names="y",
        y_block=RegressionBlock(),
        splits=(list(range(n)), [0]),
    )
    return to.dataloaders(**kwargs)[0]


def blocks(n, r, bs, **kwargs):
    "An image DataBlock whose training set is every other of some pictures; picture i is of colour i"
    dls = DataBlock(
        (ImageBlock, RegressionBlock),
        get_x=image,
        get_y=number,
        splitter=IndexSplitter(list(range(1, 2 * n, 2))),
        batch_tfms=[Flip(p=1.0)],
    ).dataloaders(range(2 * n), bs=bs, device="cpu", **kwargs)
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
    "own functions": (
        lambda n, r, **k: DataLoader(Rows(n), after_batch=lambda b: (b[0], b[1] + 1), after_item=lambda o: o, **k),
        lambda b: second(b) - 1,
    ),
}


def plain_state(dl):
    "All attributes but those that any iteration changes; and where the random numbers are"
    changing = "rng", "_DataLoader__idxs", "it", "_types", "_n_inp"
    return (
        {k: id(v) for k, v in vars(dl).items() if k not in changing},
        dl.rng.getstate(),
        np.random.get_state()[1].tolist(),
    )


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
    n, n_batches = item_count(dl), len(dl)
    chosen = torch.tensor(r.permutation(n)[: int(r.integers(1, n + 1))])
    for items in (chosen, torch.arange(n)):
        rewind(dl, seed)
        dl.randomize()
        drawn = [int(i) for i in dl.get_idxs()]
        after, wanted = dl.rng.getstate(), set(items.tolist())
        others = [at for at, i in enumerate(drawn) if i not in wanted]
        joining = set(others[: min(2, len(drawn)) - (len(drawn) - len(others))] if len(drawn) - len(others) < 2 else [])
        order = [i for at, i in enumerate(drawn) if i in wanted or at in joining]  # never a batch of one
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
        if isinstance(dl, SortedDL) and dl.shuffle:  # sorted again, so that little is padded
            lengths = [[dl.res[i] for i in b] for b in got]
            assert all(b == sorted(b, reverse=True) for b in lengths)
        elif dl.fake_l.num_workers < 2 or not skip:
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


def test_nothing_chosen_and_too_few_chosen():
    dl = DataLoader(Rows(30), bs=8, drop_last=True)
    with shortened(dl, []):  # an epoch needs a batch
        assert len(dl) == 1 and [second(b).tolist() for b in dl] == [[0, 1]]
    with shortened(dl, [4, 20]):  # less than a batch: it is not dropped
        assert len(dl) == 1 and [second(b).tolist() for b in dl] == [[4, 20]]
    with shortened(dl, range(9)):
        assert len(dl) == 1 and dl.drop_last
    assert dl.drop_last
    dl = DataLoader(Rows(30), bs=4)
    for k, sizes in (
        (3, [3]),
        (1, [2]),
        (5, [3, 2]),
        (9, [3, 3, 3]),
        (10, [4, 4, 2]),
        (13, [4, 4, 4]),
        (30, [4] * 7 + [2]),
    ):  # no small last batch
        with shortened(dl, range(k)):
            assert [len(b[1]) for b in dl] == sizes and len(dl) == len(sizes)
    assert dl.bs == 4
    waiting = Counter()
    for _ in range(300):
        with shortened(dl, range(13)), ItemTracker(dl) as t:
            waiting.update(set(range(13)) - {i for _ in dl for i in t.items.tolist()})
    assert (
        sum(waiting.values()) == 300 and len(waiting) == 13 and max(waiting.values()) < 60
    )  # nobody always, though this loader does not shuffle
    dl = WeightedDL(Rows(30), wgts=[1.0] + [0.0] * 29, bs=8, shuffle=True, num_workers=0)
    with shortened(dl, [7, 8]):  # it never draws these: an epoch is made of what it draws
        assert [second(b).tolist() for b in dl] == [[0, 0]]


def test_sorted_loader_stays_sorted():
    ds = Texts(200, np.random.default_rng(0))
    dl = SortedDL(ds, before_batch=pad_input, bs=10, shuffle=True, num_workers=0)
    with shortened(dl, torch.randperm(200)[:90]), ItemTracker(dl) as t:
        assert np.mean(np.concatenate([np.diff(ds.lens[t.items]) <= 0 for _ in dl])) > 0.8


@pytest.mark.parametrize("n", (90, 97, 9))
def test_batches_of_chosen_texts_are_of_one_length(n):
    "The whole epoch's batches stand in any order: cut anew from that, long texts would come with short ones"
    ds = Texts(400, np.random.default_rng(0))
    dl = SortedDL(ds, before_batch=pad_input, bs=10, shuffle=True, num_workers=0)
    chosen, orders = torch.randperm(400)[:n], []
    for _ in range(2):
        with shortened(dl, chosen), ItemTracker(dl) as t:
            batches = [ds.lens[t.items] for _ in dl]
        spread = np.ptp(ds.lens[chosen.numpy()]) + 1
        # n texts sorted by length and cut into batches: the spreads of all batches add up to that of the lengths
        assert sum(np.ptp(b) for b in batches) <= spread and batches[0].max() == ds.lens[chosen.numpy()].max()
        orders.append([b.tolist() for b in batches])
    assert n == 9 or orders[0] != orders[1]


def test_sorted_loader_that_does_not_shuffle_stays_sorted():
    ds = Texts(200, np.random.default_rng(0))
    dl = SortedDL(ds, before_batch=pad_input, bs=10, shuffle=False, num_workers=0)
    with shortened(dl, torch.randperm(200)[:90]), ItemTracker(dl) as t:
        assert (np.diff(np.concatenate([ds.lens[t.items] for _ in dl])) <= 0).all()


def test_a_tracked_loader_can_be_copied_and_sent():
    "A copy is of the loader as it was; what is sent to another process goes on tracking there"
    dl = TfmdDL(Rows(9), bs=2, num_workers=0, after_batch=[Flip(p=0.0)])
    with ItemTracker(dl) as t, shortened(dl, [0, 5, 7, 8]):
        n = dl.new(shuffle=False)
        assert (
            type(n) is TfmdDL
            and "do_item" not in vars(n)
            and len(n) == 5
            and [second(b).tolist() for b in n][0] == [0, 1]
        )
        assert [b[0].shape for b in n] == [(2, 3)] * 4 + [(1, 3)] and t.items is None
        for sent in (pickle.loads(pickle.dumps(dl)), copy.deepcopy(dl)):
            other = sent.do_item.__self__
            assert other is not t
            for b in sent:
                assert torch.equal(other.items, second(b))
            assert second(b).tolist() == [7, 8] and t.items is None
        assert [t.items.tolist() for _ in dl] == [[0, 5], [7, 8]]
    d2 = DataLoader(
        Rows(9),
        bs=2,
        after_batch=lambda b: (b[0], b[1] * 2),
        do_batch=lambda b: (torch.stack([o[0] for o in b]), torch.tensor([o[1] for o in b])),
    )
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
        assert (
            dl.decode(b)[0].shape == b[0].shape
            and len(dl.decode_batch(b)) == 4
            and repr(dl.after_batch).startswith("Pipeline")
        )
        dl.to("cpu")
        assert t.items is kept and any(isinstance(f, Flip) for f in dl.after_batch.fs)


def test_pinning_turns_tuples_to_lists():
    dl = DataLoader(Rows(4), bs=2)
    with ItemTracker(dl) as t:
        dl.pin_memory = True
        assert dl.after_batch({"_items": np.array([1, 2]), "_batch": [torch.ones(2), torch.ones(2)]})[0].shape == (
            2,
        )
        assert type(
            dl.after_batch({"_items": np.array([1, 2]), "_batch": [torch.ones(2)]})
        ) is tuple and t.items.tolist() == [1, 2]


# Loaders that it cannot work with
# ---------------------------------------------------------------------------------------------
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


class ByIter(TfmdDL):
    def __iter__(self):
        yield from torch.tensor(self.get_idxs()).split(self.bs)


class Doubling(TfmdDL):
    def create_batch(self, b):
        return super().create_batch(list(b) * 2)


def lm_loader():
    return LMDataLoader([(torch.arange(50),)], lens=[50], bs=2, seq_len=5)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: torch.utils.data.DataLoader([1, 2, 3]), "only fastai's DataLoaders"),
        (lambda: [torch.ones(2)], "only fastai's DataLoaders"),
        (lambda: DataLoader(Stream(), bs=2), "no indices or no length"),
        (lambda: DataLoader(Endless(), bs=2), "no indices or no length"),
        (lambda: DataLoader([torch.ones(2)], bs=None), "bs=None"),
        (lm_loader, "one long text"),
        (lambda: DataLoaders(DataLoader(Rows(3), bs=1), DataLoader(Rows(3), bs=1)), "such as dls.train"),
        (lambda: OwnBatches(Rows(8), bs=4, num_workers=0), "`create_batches` of its own"),
        (lambda: ByIter(Rows(8), bs=4, num_workers=0), "`__iter__` of its own"),
    ],
)
def test_refused_at_the_start(make, says):
    dl = make()
    before = dict(vars(dl)) if hasattr(dl, "__dict__") else None
    for f in (lambda: ItemTracker(dl).start(), lambda: shortened(dl, [0]).start()):
        with pytest.raises(ValueError, match=says) as e:
            f()
        todo = "score='model'", "dls.train", "train a language model on all of it"
        assert any(words in str(e.value) for words in todo)
    assert before is None or vars(dl) == before


def test_refused_on_the_first_batch():
    for cls, says in ((Doubling, "8 rows was made of 4 items"),):
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


# In a Learner
# ---------------------------------------------------------------------------------------------------------------
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
    dls = DataLoaders.from_dsets(
        NoisyRows(x[:200], y[:200], 0), NoisyRows(x[200:], y[200:], 0), bs=32, device="cpu", num_workers=workers
    )
    before = plain_state(dls.train)[0]
    learn = Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat(), cbs=Watch(x))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3 if workers == 0 else 2, 1e-2)
    w = learn.watch
    assert (
        sum(k for e, k in w.seen if e == 0) == 192 and sum(k for e, k in w.seen if e == 1) == 64 and learn.n_valid == 7
    )
    n = len(w.seen)
    assert w.pcts[0] == 0 and (np.diff(w.pcts) > 0).all() and max(w.pcts) < 1 and n == (14 if workers == 0 else 8)
    assert plain_state(dls.train)[0] == before


def test_category_blocks_too():
    dls = DataBlock(
        (ImageBlock, CategoryBlock), get_x=image, get_y=lambda i: "ab"[i % 2], splitter=IndexSplitter([0, 1])
    ).dataloaders(range(20), bs=4, device="cpu", num_workers=0)
    with ItemTracker(dls.train) as t:
        for x, y in dls.train:
            assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), t.items + 2) and torch.equal(
                torch.Tensor(y).long(), t.items % 2
            )
