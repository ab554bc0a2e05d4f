"What is written for a GPU, run without one: nothing waits, all is as on the CPU. On a real one too, where there is one"

import copy
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn

from fastsb.buffer import BatchBuffer
from fastsb.data import image_dls
from fastsb.engine import SelectiveBackprop
from fastsb.history import LossHistory
from fastsb.memory import ItemMemory
from fastsb.sampler import SelectiveSampler
from fastsb.score import Doubtful, Proxy, Scorer
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
    Threshold,
    TopK,
    Uncertainty,
)
from pretend_cuda import HostWaits, OnGpu, PretendCuda, TwoDevices

import fastsb.all  # noqa: F401  (patches Learner)


@pytest.fixture
def gpu():
    with PretendCuda() as g:
        yield g


def net(seed=0):
    torch.manual_seed(seed)
    head = nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 10)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), *head)


def batch(seed=0, n=32):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=g), torch.randint(10, (n,), generator=g)


# the make-believe itself ----------------------------------------------------------------------------------------------
def test_what_waits_raises(gpu):
    x, i = torch.rand(8, device="cuda"), torch.arange(2)
    for f in (
        lambda: x.sum().item(),
        lambda: bool(x.sum()),
        lambda: x.nonzero(),
        lambda: x[x > 0.5],
        lambda: x.cpu(),
        lambda: x.tolist(),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.as_tensor(0, device="cuda"),
        lambda: i.to("cuda"),
        lambda: i.to("cuda", non_blocking=True),
        lambda: x.unique(),
        lambda: x.repeat_interleave((x > 0.5).long()),
        lambda: x[i],
        lambda: x.to("cpu", non_blocking=True),
        torch.cuda.synchronize,
    ):
        with pytest.raises(HostWaits):
            f()
    for f in (lambda: x + torch.rand(8), lambda: x.gather(0, i), lambda: x.index_select(0, i)):
        with pytest.raises(TwoDevices):
            f()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device="cuda")
    y = i.pin_memory().to("cuda", non_blocking=True)
    assert y.is_cuda and (x * torch.tensor(2.0)).is_cuda  # neither waits; nor does a single number of the host's
    gpu.ops.clear()
    assert (x + 1).sum().is_cuda and x[2:].is_cuda and gpu.launches == {"add": 1, "sum": 1}


# history, selectors ---------------------------------------------------------------------------------------------------
def some_losses(draw, n):
    l = torch.rand(n) ** draw.choice([1, 4]) * draw.choice([1, 1e-30, 1e30])
    if draw.random() < 0.3:
        l = (l * 4).round()
    bad = torch.rand(n) < draw.choice([0, 0, 0.1, 1.0])
    return torch.where(bad, torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, (n,))], l)


SELECTORS = {  # and how often the host waits in `select`
    "Percentile": (lambda b: Percentile(b, True), 0),
    "Hybrid": (lambda b: Hybrid(b, 0.7, True), 0),
    "Random": (lambda b: Random(0.3, True), 0),
    "TopK": (lambda b: TopK(0.5), 0),
    "LowK": (lambda b: LowK(0.3), 0),
    "OrderedPool": (lambda b: OrderedPool(0.75, 0.4), 0),
    "Uncertainty": (lambda b: Uncertainty(0.4), 0),
    "Capped(Percentile)": (lambda b: Capped(Percentile(b, True)), 0),
    "ReducibleLoss": (lambda b: ReducibleLoss(torch.zeros(200), 0.4), 0),
    "GradNorm": (lambda b: GradNorm(3.0), 0),
    "Capped(TopK)": (lambda b: Capped(TopK(0.5)), 1),
    "coins": (lambda b: Percentile(b), 1),
    "Absolute": (lambda b: Absolute(), 1),
    "Threshold": (lambda b: Threshold(0.5), 1),
    "LossShare": (lambda b: LossShare(0.8), 1),
    "DoubtShare": (lambda b: DoubtShare(0.8), 1),
    "DoubtAbove": (lambda b: DoubtAbove(0.7), 1),
    "InfoBatch": (lambda b: InfoBatch(0.5), 1),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_chooses_as_on_the_cpu(name, gpu):
    "Of losses of all kinds, with the same draws: the same rows; and it waits as often as it says"
    draw, (make, waits) = random.Random(name), SELECTORS[name]
    gpu.strict = False
    for n in range(25):
        torch.manual_seed(n)
        size, B, beta = draw.choice([1, 3, 50, 100]), draw.choice([1, 2, 7, 64, 130]), draw.choice([0.5, 1.0, 3.0])
        here, there = LossHistory(size), LossHistory(size)
        a, b = make(beta), make(beta)
        for i in range(3):
            l, pred, y, us = some_losses(draw, B), torch.randn(B, 10), torch.randint(10, (B,)), torch.rand(B)
            for sel in (a, b, getattr(a, "selector", a), getattr(b, "selector", b)):  # also where equals are drawn
                sel.uniform = lambda n, d, us=us: us[:n] if d.type == "cpu" else gpu.put(us[:n])
            one = a.exact and not a.sure and name != "GradNorm"  # a single draw, which on a GPU is made ahead
            u, ug = (us[:1], gpu.put(us[:1])) if one else (None, None)
            known = dict(pred=pred, yb=(y,), loss_func=nn.CrossEntropyLoss(), items=torch.arange(B))
            here.update(l)
            there.update(lg := gpu.put(l))
            on_gpu = known | dict(pred=gpu.put(pred), yb=gpu.put((y,)), items=gpu.put(known["items"]))
            with gpu.allowed():
                b.select(lg, there, u=ug, **on_gpu)  # what is made once is there now
            gpu.waits.clear()
            s, t = a.select(l, here, u=u, **known), b.select(lg, there, u=ug, **on_gpu)
            assert len(gpu.waits) == waits, gpu.waits
            assert torch.equal(s.idx, t.idx.host), (n, i, s.idx, t.idx.host)
            torch.testing.assert_close(s.p, t.p.host, rtol=1e-5, atol=1e-6)
            assert (s.w is None) == (t.w is None)
            with gpu.allowed():
                assert torch.equal(here.values(), there.values().host)
                assert torch.equal(here.percentile(l), there.percentile(lg).host)


def test_a_history_goes_from_one_to_the_other(gpu):
    "Back and forth, on a state of either, and it says how many it holds"
    here, there = LossHistory(20), LossHistory(20)
    for i in range(12):
        l = some_losses(random.Random(i), 7)
        here.update(l)
        with gpu.allowed():
            if i % 3 == 2:
                state = there.state_dict()
                there = LossHistory(20)
                there.load_state_dict(state)
            there.update(gpu.put(l) if i % 5 else l)
            values = there.values()
            assert torch.equal(here.values(), values.host if i % 5 else values) and len(here) == len(there)


def test_a_history_knows_what_is_not_finite_only_while_it_is_so(gpu):
    h, l = LossHistory(8), gpu.put(torch.tensor([1.0, torch.nan, 2.0]))
    h.update(l)
    gpu.ops.clear()
    assert h.bad(l).host.tolist() == [False, True, False] and not gpu.launches
    l[:1].fill_(torch.inf)
    assert h.bad(l).host.tolist() == [True, True, False]
    assert h.bad(gpu.put(torch.tensor([torch.inf]))).host.tolist() == [True]


def exact():
    return Percentile(1.0, exact=True, seed=3)


def test_draws_made_ahead_are_uniform_and_go_on(gpu):
    "Also from a saved state, a copy, and when batches of another size come between"
    losses, h, sel = gpu.put(torch.rand(10)), LossHistory(50), exact()
    small = gpu.put(torch.rand(7))
    h.update(losses)
    u = torch.cat([sel.draws.grid(sel.draws.places(10, 5, losses.device))[:1].host for _ in range(2000)])
    assert len(u.unique()) > 1990 and abs(u.mean() - 0.5) < 0.03 and 0 <= u.min() < 0.01 and 0.99 < u.max() < 1

    def some(sel, n):
        return [sel.select(small if i % 5 == 4 else losses, h).idx.host.tolist() for i in range(n)]

    for used in (0, 1, 40, 64, 65, 130):
        a = exact()
        some(a, used)
        if used == 40:
            a.uniform(3, losses.device)  # draws of another kind
        state, copied, want = a.state_dict(), copy.deepcopy(a), some(a, 100)
        b = exact()
        b.load_state_dict(state)
        assert some(b, 100) == want and some(copied, 100) == want
        c = exact()
        c.load_state_dict(state)
        d = exact()
        d.load_state_dict(c.state_dict())  # before anything was drawn
        assert some(d, 100) == want
    state["draws"]["cuda ahead"] = state["draws"]["cuda ahead"][:-1]
    with pytest.raises(ValueError, match="23 bytes"):
        exact().load_state_dict(state)


# buffer, memory, sampler ----------------------------------------------------------------------------------------------
def test_the_buffer(gpu):
    here, there = BatchBuffer(20), BatchBuffer(20)
    for i in range(6):
        b, idx = batch(i), torch.randperm(32)[: 5 + 3 * i].sort().values
        if i == 3:
            with gpu.allowed():  # a state that was saved elsewhere: its rows follow to where the next ones are
                state = there.state_dict()
                state["rows"] = [r.cpu() for r in state["rows"]]
                there.load_state_dict(state)
                there.put(gpu.put(b), gpu.put(idx[:0]))
        a, g = here.put(b, idx), there.put(gpu.put(b), gpu.put(idx))
        assert len(a) == len(g)
        for x, y in zip(a, g, strict=True):
            assert all(torch.equal(s, t.host) for s, t in zip(x, y, strict=True))


def test_images_that_are_kept_on_the_gpu(gpu):
    x, y = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), dtype=np.uint8), np.arange(96) % 10
    with gpu.allowed():
        dls = image_dls(x, y, x[:32], y[:32], bs=32, augment=True, device=torch.device("cuda"))
    for dl in dls.loaders:
        assert all(t.is_cuda for b in dl for t in b)


def on_host(t):
    return t.host if isinstance(t, OnGpu) else t


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("items_on", ["cpu", "cuda"])
def test_a_memory_fed_from_the_gpu(gpu, device, items_on):
    "One update after the other, each read at once, is what waiting and writing many together comes to, bit for bit"
    draw, n = random.Random(device + items_on), 300
    at_once, together = ItemMemory(n), ItemMemory(n, device=device)
    at_once.updates = 1
    together.updates = 5
    for i in range(80):
        B = draw.choice([0, 1, 8, 40])
        items = torch.randint(n, (B,)) if i % 4 == 0 else torch.randperm(n)[:B]
        l, d = some_losses(draw, B), some_losses(draw, B)
        given = draw.choice([dict(losses=l), dict(losses=l, doubt=d), dict(losses=l, doubt=d), dict(doubt=d), {}])
        how = dict(epoch=i // 9, trained=draw.random() < 0.8)
        at_once.update(items, **given, **how)
        waits = device == "cpu"  # who remembers on the host has to fetch what it is given
        with gpu.allowed() if waits else gpu.makes(False):
            on_gpu = {k: gpu.put(v) for k, v in given.items()}
            together.update(gpu.put(items) if items_on == "cuda" else items, **on_gpu, **how)
        for v in on_gpu.values():
            v.fill_(-7.0)  # what was given may be written to
        if i % 7 == 6:
            with gpu.allowed() if waits else gpu.makes(False):
                together.flush()
            for read in ("losses", "doubts", "times"):
                a, b = getattr(at_once, read)(), on_host(getattr(together, read)())
                assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), read
            assert torch.equal(at_once.ages(None, 20).nan_to_num(-1), on_host(together.ages(None, 20)).nan_to_num(-1))
            q = torch.rand(9)
            assert torch.equal(at_once.percentile(q), on_host(together.percentile(q if waits else gpu.put(q))))


def test_a_sampler(gpu):
    "Its steps wait for nothing, and the epochs that it makes are those of the CPU"
    chosen = []
    for device in ("cpu", "cuda"):
        s, pred = SelectiveSampler(200, loss_func=nn.CrossEntropyLoss(), epochs=6, seed=1, device=device), batch
        for epoch in range(6):
            with gpu.allowed():
                order = torch.tensor([*s])
            for i, items in enumerate(order.split(32)):
                torch.manual_seed(100 * epoch + i)
                pred = 5 * torch.rand(len(items), 1) * torch.randn(len(items), 10)  # some are in doubt, some are sure
                y = torch.randint(10, (len(items),))
                if device == "cuda":
                    pred, y = gpu.put((pred, y))
                s.observe(items, pred=pred, yb=y)
            chosen.append(order.tolist())
        with gpu.allowed():
            chosen.append([r["selected"] for r in s.log])
    assert chosen[:7] == chosen[7:] and min(chosen[6]) < 0.9


# engine ---------------------------------------------------------------------------------------------------------------
ENGINES = {
    "beta=1": dict,
    "beta=2, inverse": lambda: dict(beta=2.0, rescale="inverse"),
    "sum, prune": lambda: dict(rescale="sum", batching="prune"),
    "interrupt": lambda: dict(interrupt=3),
    "TopK": lambda: dict(selector=TopK(0.5)),
    "Hybrid": lambda: dict(selector=Hybrid(exact=True)),
    "OrderedPool": lambda: dict(selector=OrderedPool()),
    "Uncertainty": lambda: dict(selector=Uncertainty(0.5)),
    "size": lambda: dict(score=Scorer(size=0.75)),
    "bf16, channels_last": lambda: dict(score=Scorer(precision="bf16", channels_last=True)),
    "Doubtful": lambda: dict(score=Doubtful(0.4), selector=TopK(0.5)),
    "function": lambda: dict(score=lambda m, b: m(b[0]).square().mean(1)),
    "Proxy": lambda: dict(score=Proxy(net(1), every=2, opt_func=partial(torch.optim.SGD, lr=0.01))),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine(name, gpu):
    "After the first batch nothing waits; it trains as many as on the CPU, and on the same where no draw decides"
    res = []
    for device in ("cpu", "cuda"):
        model, put = net().to(device), gpu.put if device == "cuda" else lambda b: b
        sb = SelectiveBackprop(model, nn.CrossEntropyLoss(), 32, start=0, **ENGINES[name]())
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        for i in range(10):
            with gpu.allowed() if i == 0 else gpu.makes(False):
                remembered = put(torch.rand(32, generator=torch.Generator().manual_seed(i)))
                for (x, y), w in sb.offer(put(batch(i)), remembered=remembered):
                    l = nn.functional.cross_entropy(model(x), y, reduction="none")
                    l = (l if w is None else l * w).mean()
                    l.backward()
                    opt.step()
                    opt.zero_grad()
                    sb.trained(l, 32)
        with gpu.allowed():
            res.append(sb.end_epoch())
    assert res[0]["bp"] == res[1]["bp"] > 0 and res[0]["fp"] == res[1]["fp"]
    if name in ("TopK", "Doubtful", "function", "size", "Uncertainty"):
        assert res[0]["trained_loss"] == pytest.approx(res[1]["trained_loss"], rel=1e-5)


def moved(o, device):
    if isinstance(o, dict | list | tuple):
        many = {k: moved(v, device) for k, v in o.items()} if isinstance(o, dict) else [moved(v, device) for v in o]
        return many if isinstance(o, dict) else type(o)(many)
    return o.to(device) if isinstance(o, torch.Tensor) and device else o


@pytest.mark.parametrize("kw", [{}, dict(score="proxy")], ids=str)
@pytest.mark.parametrize("a,b", [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("to", [None, "cpu", "cuda"])
def test_going_on_elsewhere(gpu, a, b, to, kw):
    "Saved on one device, loaded with any `map_location`, gone on with on the other"
    with gpu.allowed():

        def make(device):
            how = dict(score=Proxy(net(1), every=1)) if kw else {}
            return SelectiveBackprop(net().to(device), nn.CrossEntropyLoss(), 32, start=0, beta=2.0, **how)

        one, two = make(a), make(b)
        for i in range(3):
            one.offer(tuple(t.to(a) for t in batch(i)))
        two.load_state_dict(moved(one.state_dict(), to))
        for i in range(4):
            two.offer(tuple(t.to(b) for t in batch(i)))
        assert two.counts["bp"] > 0 and len(two.buffer) < 32


# launches -------------------------------------------------------------------------------------------------------------
class Scale(nn.Module):
    "A model of one operation"

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.flatten(1)[:, :10] * self.w


def test_launches_of_a_batch_that_is_scored_afresh(gpu):
    "Score (1 is the model's), history, choice and rows of a batch: as they are, so that whoever adds one says so"
    sb = SelectiveBackprop(Scale().to("cuda"), nn.CrossEntropyLoss(), 128, start=0)
    b, counts = gpu.put(batch(n=128)), []
    with torch.no_grad(), gpu.allowed():
        for _ in range(4):
            sb.offer(b)
        for _ in range(16):
            gpu.ops.clear()
            sb.offer(b)
            counts.append(gpu.launches.total())
        l, idx, parts = sb.score(b), torch.arange(64, device="cuda"), {}
        for name, f, *args in (
            ("score", sb.score, b),
            ("history", sb.history.update, l),
            ("choice", sb.selector.select, l, sb.history),
            ("rows", sb.buffer.put, b, idx),
        ):
            gpu.ops.clear()
            f(*args)
            parts[name] = gpu.launches.total()
    assert parts == dict(score=3, history=5, choice=20, rows=2) and set(counts) == {30}


def test_launches_that_the_default_adds_to_a_step(gpu):
    "Loss and doubt of each row, and their share of what is written for 32 batches together"
    s = SelectiveSampler(50_000, loss_func=nn.CrossEntropyLoss(), epochs=5, device="cuda")
    s.begin_epoch(0, select=False)
    s.chosen = torch.arange(9)  # as in an epoch that was chosen
    pred, y, loss = gpu.put((torch.randn(128, 10), torch.randint(10, (128,)), torch.rand(())))
    items = torch.randperm(50_000)[: 128 * 96].split(128)
    for i in items[:32]:
        s.observe(i, pred=pred, yb=y, loss=loss)
    counts = []
    for i in items[32:]:
        gpu.ops.clear()
        s.observe(i, pred=pred, yb=y, loss=loss)
        counts.append(gpu.launches.total())
    assert Counter(counts) == {12: 62, 49: 2} and sum(counts) / 64 < 15


# a Learner ------------------------------------------------------------------------------------------------------------
class Images(torch.utils.data.Dataset):
    def __init__(self, n):
        self.x, self.y = batch(n=n)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Waits(Callback):
    "What waits in each epoch's training, from the end of its first step to that of its last"

    order = 1000

    def __init__(self, gpu):
        self.gpu, self.by_epoch = gpu, []

    def before_train(self):
        self.begun = None

    def after_batch(self):
        if self.training:
            self.begun = len(self.gpu.waits) if self.begun is None else self.begun
            self.ended = len(self.gpu.waits)

    def after_train(self):
        self.by_epoch.append(Counter(self.gpu.waits[self.begun : self.ended]))


def fit(device, gpu, select=None, epochs=4, cbs=()):
    "Waits by epoch, losses, log of a fit of 320 images"
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    dls = DataLoaders.from_dsets(Images(320), Images(64), bs=32, device=torch.device(device), num_workers=0)
    waits = Waits(gpu)
    learn = Learner(dls, net().to(device), loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[waits, *cbs])
    if select is not None:
        select(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 0.1)
    with gpu.allowed():
        return waits.by_epoch, [float(l) for l in learn.recorder.losses], learn.sb.log if select else None


def settings(**kw):
    return lambda learn: learn.selective_backprop(**{k: v() if callable(v) else v for k, v in kw.items()})


LEARNERS = {
    "default": settings(selector=lambda: DoubtAbove(1.0), start=1, end=1.0),
    "beta=1": settings(beta=1.0, start=1, end=1.0),
    "model": settings(beta=1.0, score="model", start=1, end=1.0),
    "two_stage": settings(beta=1.0, score="two_stage", start=1, end=1.0),
    "topk": settings(selector=lambda: TopK(0.5), score="model", start=1, end=1.0),
    "topk, remembered": settings(selector=lambda: TopK(0.5), start=1, end=1.0),
    "infobatch": lambda learn: learn.infobatch(delta=1.0),
    "stale": settings(beta=1.0, score="model", stale=2, start=1, end=1.0),
    "inverse": settings(beta=1.0, score="model", rescale="inverse", start=1, end=1.0),
    "doubtful": settings(score=lambda: Doubtful(0.4), start=1, end=1.0),
    "fp16": settings(selector=lambda: DoubtAbove(1.0), start=1, end=1.0),
    "mixup": settings(selector=lambda: DoubtAbove(1.0), start=1, end=1.0),
    "cutmix": settings(beta=1.0, start=1, end=1.0),
}
BESIDE = {  # other callbacks, with and without fastsb
    "fp16": lambda: [MixedPrecision(amp_mode=AMPMode.BF16)],
    "mixup": lambda: [MixUp()],
    "cutmix": lambda: [CutMix()],
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_waits_only_where_plain_fastai_does(name):
    """fastai waits in each step for the smooth loss and for the copies of a batch. With fastsb it waits there, at most
    once for each batch that is loaded, and nowhere else; and it learns what it would on the CPU"""
    with PretendCuda(strict=False) as gpu:
        beside = BESIDE.get(name, list)
        plain, *_ = fit("cuda", gpu, cbs=beside())
        waits, losses, log = fit("cuda", gpu, LEARNERS[name], cbs=beside())
        _, on_cpu, log_cpu = fit("cpu", gpu, LEARNERS[name])
    assert len(waits) == len(plain) == 4 and plain[2].total() > 9
    for epoch in (1, 2, 3):
        more = waits[epoch] - plain[epoch]
        assert not more, more
    assert log.selected.tolist()[0] == 1 and log.selected.min() < 0.9
    np.testing.assert_allclose(log.selected[:2], log_cpu.selected[:2], atol=0.1)  # draws differ on a GPU
    if name in ("default", "doubtful"):
        np.testing.assert_allclose(losses, on_cpu, rtol=1e-3)


WAITS = {
    "paper": settings(paper=True),
    "GradNorm": settings(selector=lambda: GradNorm(tau=1.0), score="model", start=1),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_learner_waits_once_a_batch_where_the_selector_says_so(name):
    with PretendCuda(strict=False) as gpu:
        plain, *_ = fit("cuda", gpu)
        waits, *_ = fit("cuda", gpu, WAITS[name])
    for epoch in (1, 2, 3):
        more = waits[epoch] - plain[epoch]
        assert len(more) == 1 and 1 <= more.total() <= 10, more


class Launches(Callback):
    "The launches of each training step, from the end of the one before"

    order = 1000

    def __init__(self, gpu):
        self.gpu, self.by_epoch = gpu, []

    def before_train(self):
        self.by_epoch.append([])

    def after_batch(self):
        if self.training:
            self.by_epoch[-1].append(self.gpu.launches.total())
            self.gpu.ops.clear()


@pytest.mark.parametrize("name,more", [("default", 12), ("beta=1", 4)])
def test_launches_that_a_learner_adds_to_a_step(name, more):
    "The same in each step of an epoch but its first"
    steps = []
    with PretendCuda(strict=False) as gpu:
        for select in (None, LEARNERS[name]):
            counter = Launches(gpu)
            fit("cuda", gpu, select, cbs=[counter])
            steps.append({n for epoch in counter.by_epoch for n in epoch[1:]})
    (plain,), (selecting,) = steps
    assert selecting - plain == more


def test_what_is_to_be_measured_on_a_real_one(gpu):
    "As far as it can run here: the same choices and a memory on the host, with waits as errors where they are to be"
    from fastsb.bench.gpu import same_choices, wrong_memories

    gpu.strict = False
    res = same_choices(torch.device("cuda"), 6)
    assert set(res["same"].values()) == {6}
    assert wrong_memories(torch.device("cuda"), 64, 4, 3)["wrong"] == 0


# a real one -----------------------------------------------------------------------------------------------------------
on_hardware = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_waits():
    "A function that makes every wait an error from there on"
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@on_hardware
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_on_hardware(name, no_waits):
    model = net().cuda()
    sb = SelectiveBackprop(model, nn.CrossEntropyLoss(), 32, start=0, **ENGINES[name]())
    batches = [tuple(t.cuda() for t in batch(i)) for i in range(8)]
    remembered = torch.rand(32, device="cuda")
    for i, b in enumerate(batches):
        if i == 2:
            no_waits()
        sb.offer(b, remembered=remembered)
    torch.cuda.set_sync_debug_mode("default")
    assert sb.end_epoch()["fp"] > 0


@on_hardware
@pytest.mark.parametrize("name", [k for k, (_, waits) in SELECTORS.items() if not waits])
def test_a_selector_on_hardware(name, no_waits):
    "The same rows as on the CPU, and no wait"
    draw, make = random.Random(name), SELECTORS[name][0]
    here, there, a, b = LossHistory(100), LossHistory(100), make(1.0), make(1.0)
    for i in range(20):
        l, pred, y, us = some_losses(draw, 64), torch.randn(64, 10), torch.randint(10, (64,)), torch.rand(64)
        dev = us.cuda()
        for sel in (a, b):
            sel.uniform = lambda n, d, us=us, dev=dev: (us if d.type == "cpu" else dev)[:n]
        one = a.exact and not a.sure and name != "GradNorm"
        known = dict(pred=pred, yb=(y,), loss_func=nn.CrossEntropyLoss(), items=torch.arange(64))
        on_gpu = known | dict(pred=pred.cuda(), yb=(y.cuda(),), items=known["items"].cuda())
        lg = l.cuda()
        here.update(l)
        s = a.select(l, here, u=us[:1] if one else None, **known)
        if i:
            no_waits()
        there.update(lg)
        t = b.select(lg, there, u=dev[:1] if one else None, **on_gpu)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(here.values(), there.values().cpu()) and torch.equal(s.idx, t.idx.cpu())


@on_hardware
def test_a_sampler_on_hardware(no_waits):
    s = SelectiveSampler(2000, loss_func=nn.CrossEntropyLoss(), epochs=4, device="cuda")
    pred, y = torch.randn(32, 10, device="cuda"), torch.randint(10, (32,), device="cuda")
    parts = torch.tensor([*s]).split(32)
    for i, items in enumerate(parts[:62]):
        if i == 2:
            no_waits()
        s.observe(items, pred=pred, yb=y)
    torch.cuda.set_sync_debug_mode("default")
    assert s.memory.summary(0)["seen"] == 62 * 32
