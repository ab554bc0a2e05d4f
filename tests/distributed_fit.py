"Run by torchrun: fastai fits with selection take the same steps in all processes, and end with the same weights."

import gc
import sys

import torch
import torch.distributed as dist
from common import Spy, digits_learner
from fastai.distributed import DistributedDL

from fastsb.select import TopK

torch.set_num_threads(1)


def broadcast(self, t, rank):  # fastai's own moves to CUDA, which is not here
    t = torch.LongTensor(t)
    dist.broadcast(t, rank)
    return t.tolist()


DistributedDL._broadcast = broadcast


def gathered(o):
    res = [None] * dist.get_world_size()
    dist.all_gather_object(res, o)
    return res


def same_everywhere(o):
    first, *others = gathered(o)
    return all(x == first for x in others)


def selecting(**kwargs):
    return lambda learn: learn.selective_backprop(**kwargs)


epochs = 8
# how it is chosen, items, drop_last; where it selects: least and most share that is trained on, share that is scored
fits = {
    "default": (selecting(), 640, True, 0.4, 0.9, 0),
    "default, uneven": (selecting(), 650, False, 0.4, 0.9, 0),
    "default, few items": (selecting(), 97, False, 0.4, 0.9, 0),
    "percentile": (selecting(beta=1), 650, False, 0.35, 0.8, 0),
    "topk": (selecting(selector=TopK(0.3), score="cached"), 650, False, 0.28, 0.8, 0),
    "hardly any": (selecting(selector=TopK(0.001)), 97, False, 0.0, 1.0, 0),
    "infobatch": (lambda learn: learn.infobatch(), 650, False, 0.5, 0.9, 0),
    "model": (selecting(beta=1, score="model", start=1, end=0.85), 640, True, 0.4, 0.6, 1.0),
    "stale": (selecting(beta=1, stale=2, start=1, end=0.85), 640, True, 0.3, 0.7, 0.5),
    "two_stage": (selecting(beta=1, score="two_stage", start=1, end=0.85), 640, True, 0.2, 0.6, 0.75),
}


def run(name):
    how, n, drop_last, least, most, fp = fits[name]
    spy = Spy()
    learn = how(digits_learner(n=n, bs=30, cbs=spy, drop_last=drop_last))
    with learn.distrib_ctx(cpu=True, sync_bn=False), learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2)
        check(name, learn, spy, drop_last, least, most, fp)


def check(name, learn, spy, drop_last, least, most, fp):
    last = spy.batches[-1][0][0].tolist()
    assert same_everywhere(torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()), (
        f"{name}: the processes went apart"
    )
    assert same_everywhere([len(y[0]) for _, y in spy.batches]) and same_everywhere(spy.steps), (
        f"{name}: not the same batches"
    )
    assert len(set(map(str, gathered(last)))) == dist.get_world_size(), (
        f"{name}: the processes trained on the same examples"
    )
    assert min(len(y[0]) for _, y in spy.batches) > 1, f"{name}: a batch of one row"
    log, sampler = learn.sb.log, learn.sb.sampler
    selected = [s for s in log.selected if s < 1]
    assert (
        log.selected[0] == log.selected[epochs - 1] == 1
        and len(selected) >= 3
        and all(least <= s <= most for s in selected)
    ), log
    scored = log.fp[log.selected < 1].sum() / log.candidates[log.selected < 1].sum()
    assert abs(scored - fp) <= 0.1 * (fp > 0) and log.candidates.nunique() == 1, log
    assert spy.pcts == sorted(spy.pcts) and abs(spy.pcts[-1] - 1) < 0.2
    if sampler is None:
        return
    sampler.memory.share()
    assert same_everywhere(sampler.memory.losses().nan_to_num(-1).tolist()) and same_everywhere(
        sampler.memory.times().tolist()
    )
    assert drop_last or not sampler.memory.losses().isnan().any(), f"{name}: items that nobody has seen"


if __name__ == "__main__":
    for name in sys.argv[1:] or fits:
        run(name)
    print(f"rank {dist.get_rank()} fine", flush=True)
    dist.barrier()
    gc.collect()  # DDP holds on to the process group; if the interpreter takes it down, that may be exit -6
    dist.destroy_process_group()
