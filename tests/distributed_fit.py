"Run by torchrun in two processes: a fastai fit with selection must take the same steps in both, and end with the same weights."
import sys

import torch
import torch.distributed as dist
from common import Spy, digits_learner, fresh, weights
from fastai.distributed import DistributedDL

torch.set_num_threads(1)


def broadcast(self, t, rank):  # fastai's own moves to CUDA, which is not here
    t = torch.LongTensor(t)
    dist.broadcast(t, rank)
    return t.tolist()


DistributedDL._broadcast = broadcast
spy = Spy()
learn = digits_learner(n=640, cbs=spy).selective_backprop(**fresh(beta=1))
with learn.distrib_ctx(cpu=True, sync_bn=False), learn.no_bar(), learn.no_logging():
    learn.fit_one_cycle(3, 1e-2)
    w = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    both = [torch.zeros_like(w) for _ in range(2)]
    dist.all_gather(both, w)
    steps = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(steps, torch.tensor([float(spy.steps)]))
    first = [torch.zeros(32, 64) for _ in range(2)]
    dist.all_gather(first, spy.batches[-1][0][0].contiguous())
    assert torch.equal(*both) and torch.equal(*steps), "the processes went apart"
    assert not torch.equal(*first), "both processes trained on the same examples"
    assert learn.sb.log.selected.tolist() == [1.0, 0.5, 0.5], learn.sb.log
    assert spy.steps == 10 + 5 + 5
    learn.selective_backprop(**fresh(beta=1, exact=False))
    try:
        learn.fit(1)
    except ValueError as e:
        assert "exact=True" in str(e)
    else:
        sys.exit("random counts should have been refused")
    learn.selective_backprop()  # losses cannot be remembered here: it scores
    learn.fit_one_cycle(10, 1e-2)
    w = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    dist.all_gather(both, w)
    assert torch.equal(*both) and learn.sb.counts["fp"] == 8 * 320 and learn.sb.log.selected.tolist() == [1.0] + [0.5] * 8 + [1.0], learn.sb.log
print(f"rank {dist.get_rank()} fine {len(weights(learn))}")
