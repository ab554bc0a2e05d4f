"Run by torchrun in several processes: plain loops with a SelectiveSampler, each checked against a reference in NumPy."

import datetime
import gc
import math
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from fastsb.sampler import SelectiveSampler, WithItems
from fastsb.select import InfoBatch, Percentile, TopK, Uncertainty

torch.set_num_threads(1)


def gathered(o):
    "What each process has"
    res = [None] * dist.get_world_size()
    dist.all_gather_object(res, o)
    return res


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def same_everywhere(o):
    first, *others = gathered(o)
    return all(x == first for x in others)


class Reference:
    "What all are to remember: each process's moving averages, and their mean where several have seen an item"

    def __init__(self, n, momentum):
        self.v, self.m, self.times = np.full(n, np.nan, np.float32), np.float32(momentum), np.zeros(n, int)

    def epoch(self, seen_by_each):
        values = {}
        for seen in seen_by_each:
            own = {}
            for items, measures in seen:
                for i, x in zip(items, np.array(measures, np.float32)):
                    before = own.get(i, self.v[i])
                    own[i] = x if np.isnan(before) else self.m * before + (np.float32(1) - self.m) * x
                    self.times[i] += 1
            for i, x in own.items():
                values.setdefault(i, []).append(x)
        for i, x in values.items():
            self.v[i] = np.mean(np.array(x, np.float64))


def data(n):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=g)
    return TensorDataset(x, (x.sum(1) > 0).long())


def a_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def doubt_of(pred):
    p = pred.detach().double().softmax(1)
    return -(p * p.log()).sum(1)


cases = {  # selector, items, rows of a batch, how many are chosen of those known; None: it is drawn
    "default": (lambda: Uncertainty(0.5), 97, 9, 0.5),
    "uneven": (lambda: TopK(0.3), 97, 10, 0.3),
    "few": (lambda: TopK(0.001), 97, 9, 0.001),
    "even": (lambda: TopK(0.5), 96, 8, 0.5),
    "small": (lambda: TopK(0.5), 7, 4, 0.5),
    "percentile": (lambda: Percentile(seed=1), 97, 9, None),
    "infobatch": (lambda: InfoBatch(seed=1), 97, 9, None),
}


def run(name, accelerate=False):
    make, n, bs, keep = cases[name]
    ways, ds, epochs, forwards = dist.get_world_size(), data(n), 6, 0
    model = a_model()
    torch.manual_seed(dist.get_rank())  # the sampler's order is to be the same all the same
    loss_func, per_row = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")
    s = SelectiveSampler(n, make(), loss_func, start=1, end=5, max_age=3, bs=bs, num_replicas=1 if accelerate else None)
    dl, opt = DataLoader(WithItems(ds), bs, sampler=s), torch.optim.SGD(model.parameters(), 0.1)
    if accelerate:
        from accelerate import Accelerator

        acc = Accelerator(cpu=True)
        model, opt, dl = acc.prepare(model, opt, dl)
        backward = acc.backward
    else:
        model, backward = DistributedDataParallel(model), torch.Tensor.backward
    model.register_forward_hook(lambda *_: counted.append(1))
    ref, last, counted = Reference(n, 0.5), np.full(n, -1), []
    for epoch in range(epochs):
        seen, sizes = [], []
        for xb, yb, items in dl:
            pred = model(xb)
            losses = per_row(pred, yb)
            s.observe(items, pred=pred, yb=yb)
            w = s.weights(items)
            backward(losses.mean() if w is None else (losses * w).mean())
            opt.step()
            opt.zero_grad()
            forwards += 1
            measured = losses.detach() if s.selector.by_loss else doubt_of(pred)
            seen.append((items.tolist(), measured.tolist()))
            sizes.append(len(items))
        assert same_everywhere(sizes), f"{name}: the processes do not have the same batches"
        by_each = gathered(seen)
        items = [i for own in by_each for b, _ in own for i in b]
        trained, selects = set(items), 1 <= epoch < 5
        known = np.flatnonzero((last >= 0) & (epoch - last <= 3))
        if not selects:
            assert trained == set(range(n)), f"{name}: {n - len(trained)} items are missing in a whole epoch"
        elif keep is not None:
            k = max(1, math.floor(keep * len(known) + 0.5))
            chosen = set(known[np.argsort(-ref.v[known], kind="stable")[:k]]) | (set(range(n)) - set(known))
            least = min(2 * ways, n)
            assert trained <= chosen or len(trained) == least, f"{name}: trained on what was not chosen"
            assert len(trained) >= min(len(chosen), least) and len(chosen - trained) < ways * bs / 2 + 1
        if selects and not accelerate and n > 2 * ways:
            assert min(sizes) > 1, f"{name}: a batch of one row"
        twice = len(items) - len(trained)
        assert twice < (ways * bs if accelerate else ways), f"{name}: {twice} items came twice"
        ref.epoch(by_each)
        last[list(trained)] = epoch
        s.memory.share()
        remembered = (s.memory.losses() if s.selector.by_loss else s.memory.doubts()).numpy()
        np.testing.assert_allclose(remembered, ref.v, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(s.memory.times().numpy(), ref.times)
        assert same_everywhere(remembered.tolist()) and same_everywhere(s.memory.ages(None, epoch).tolist())
        ref.v = remembered.copy()
    assert same_everywhere(flat_weights(model)), f"{name}: the processes went apart"
    assert not np.isnan(ref.v).any() and len(counted) == forwards
    assert all(row["fp"] == 0 for row in s.log) and sum(row["bp"] for row in s.log) == s.record.counts["bp"]
    if not accelerate:
        assert [row["candidates"] for row in s.log] == [-(-n // ways)] * epochs
    return s


def resume():
    "What the first process saves is enough for all"
    n, losses, make = (
        97,
        torch.rand(97, generator=torch.Generator().manual_seed(0)),
        lambda: SelectiveSampler(97, TopK(0.4), start=1, end=None, bs=8),
    )
    s = make()
    for _ in range(3):
        for items in DataLoader(range(n), 8, sampler=s):
            s.observe(items, losses[items])
    state = gathered(s.state_dict())[0]
    other = make()
    other.load_state_dict(state)
    assert list(other) == list(s) and torch.equal(other.memory.losses(), s.memory.losses())
    assert sorted(sum(gathered(list(s)), []))[0] >= 0 and other.epoch == 3


def dies():
    "The last process is killed in the second epoch; the others wait for it in vain"
    ds, s, model = (
        data(64),
        SelectiveSampler(64, TopK(0.5), start=1, end=None, bs=8),
        DistributedDataParallel(a_model()),
    )
    for epoch in range(3):
        for xb, yb, items in DataLoader(WithItems(ds), 8, sampler=s):
            losses = nn.CrossEntropyLoss(reduction="none")(model(xb), yb)
            s.observe(items, losses)
            if epoch == 1 and dist.get_rank() == dist.get_world_size() - 1:
                os._exit(3)
            losses.mean().backward()


if __name__ == "__main__":
    how = sys.argv[1]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    if how == "dies":
        dies()
    elif how == "accelerate":
        for name in ("default", "uneven"):
            run(name, accelerate=True)
    else:
        for name in sys.argv[2:] or cases:
            run(name)
        resume()
    print(f"rank {dist.get_rank()} fine", flush=True)
    dist.barrier()
    gc.collect()  # DDP holds on to the process group; if the interpreter takes it down, that may be exit -6
    dist.destroy_process_group()
