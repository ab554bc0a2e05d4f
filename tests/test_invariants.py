"What always holds, in the order of the design: each test fails when its invariant is broken on purpose."

import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import FirstColumn, Spy, digits, digits_learner, digits_model, everything, fresh, quiet_fit, same, weights
from fastai.callback.hook import Hook
from fastai.callback.tracker import TerminateOnNaNCallback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsb.all import *


# 1. Off means off
# ------------------------------------------------------------------------------------------------------
class KeepAll(Selector):
    "Scores and draws like any other, and keeps everything"

    def probs(self, losses, history=None, **context):
        return torch.ones_like(losses)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(
    "kw",
    [
        dict(beta=0),
        dict(beta=0, batching="prune"),
        dict(beta=0, exact=True),
        dict(beta=3, start=2),
        dict(beta=3, start=0, end=1e-9),
        dict(selector=KeepAll(), start=0),
        dict(selector=KeepAll(), start=0, batching="prune"),
    ],
    ids=str,
)
def test_off_is_bit_identical(kw, drop_last):
    if drop_last is False and "selector" in kw and kw.get("batching") != "prune":
        pytest.skip("a short last batch waits for the next epoch, as it should")
    want = quiet_fit(digits_learner(n=650, drop_last=drop_last))
    state = torch.get_rng_state(), random.getstate()
    got = quiet_fit(digits_learner(n=650, drop_last=drop_last).selective_backprop(**fresh(**kw)))
    assert torch.equal(weights(want), weights(got))
    assert same(state, (torch.get_rng_state(), random.getstate()))
    assert want.recorder.losses == got.recorder.losses and want.recorder.lrs == got.recorder.lrs
    assert want.recorder.hps == got.recorder.hps


def test_on_is_not():
    want = quiet_fit(digits_learner())
    got = quiet_fit(digits_learner().selective_backprop(**fresh(start=0)))
    assert not torch.equal(weights(want), weights(got))


class Rude(nn.Module):
    "Draws from every global generator in its forward pass, and may fail half-way"

    def __init__(self, fail=False):
        super().__init__()
        self.net, self.fail = digits_model(), fail

    def forward(self, x):
        random.random(), np.random.rand(), torch.rand(1)
        x = self.net(x)
        if self.fail:
            raise RuntimeError("half-way")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_scoring_leaves_no_trace(fail):
    x, y = digits(64)
    model, lf = Rude(), nn.CrossEntropyLoss()
    model.net[4].weight.requires_grad_(False)
    model.net[1].eval()  # somebody froze a layer
    lf(model(x), y).backward()
    model.fail = fail
    stored = Hook(model.net[2], lambda m, i, o: o.clone())
    stored.stored = "what it had"
    before, python = everything(model), random.getstate()
    sb = SelectiveBackprop(model, lf, 64)
    if fail:
        with pytest.raises(RuntimeError, match="half-way"):
            sb.score((x, y))
    else:
        sb.score((x, y))
    assert same(before, everything(model)) and python == random.getstate()
    assert stored.stored == "what it had" and lf.reduction == "mean"
    assert model.training and not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def test_scores_are_those_of_eval_mode():
    x, y = digits(64)
    model = digits_model(p=0.5)
    got = SelectiveBackprop(model, nn.CrossEntropyLoss(), 64).score((x, y))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(got, F.cross_entropy(model(x), y, reduction="none"))


def test_a_network_that_lives_by_its_hooks():
    "A U-Net's skip connections come from hooks: they must run when scoring"

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(128, 10)
            self.hook = Hook(self.a, lambda m, i, o: o, detach=False)

        def forward(self, x):
            h = self.b(self.a(x).relu())
            return self.c(torch.cat([h, self.hook.stored], 1))

    learn = digits_learner(model=Skip()).selective_backprop(**fresh(start=0))
    x, y = digits(32)
    sb = SelectiveBackprop(learn.model, nn.CrossEntropyLoss(), 32)
    with torch.no_grad():
        want = F.cross_entropy(learn.model(x), y, reduction="none")
        learn.model(x + 1)
    torch.testing.assert_close(sb.score((x, y)), want)
    quiet_fit(learn)
    assert learn.recorder.values[-1][2] > 0.5


def test_scoring_inside_autocast_does_not_freeze_the_weights():
    "Weights that autocast has cast under no_grad must not be reused by the training pass"
    x, y = digits(64)
    model, lf = nn.Linear(64, 10), nn.CrossEntropyLoss()
    sb = SelectiveBackprop(model, lf, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = sb.score((x, y))
        loss = lf(model(x), y)
    loss.backward()
    assert model.weight.grad is not None and model.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(scores, F.cross_entropy(model(x).float(), y, reduction="none"))
    assert not torch.equal(scores, sb.score((x, y)))  # outside, it is float32


# 2. Nothing lost, nothing twice
# ------------------------------------------------------------------------------------------
class Planted(Spy):
    "Each input carries its own number, and so does its target"

    def before_batch(self):
        if self.training:
            super().before_batch()
            (x,), (y,) = self.xb, self.yb
            assert torch.equal(x[:, 0].long(), y), "input and target came apart"
            self.events.append(y.tolist())


class Chosen(Percentile):
    "Notes the numbers of those that it is offered and those that it chooses"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.offered, self.chosen = [], []

    def select(self, losses, history=None, **kwargs):
        s = super().select(losses, history, **kwargs)
        ids = losses.round().long()
        self.offered += ids.tolist()
        self.chosen += ids[s.idx].tolist()
        return s


@pytest.mark.parametrize("batching", ["accumulate", "prune"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("drop_last", [True, False])
def test_nothing_lost_nothing_twice(batching, exact, drop_last):
    from fastai.basics import DataLoaders, Learner

    n, bs, epochs = 777, 32, 4
    ids = torch.arange(n)
    ds = list(zip(ids[:, None].float() * torch.ones(2), ids))
    dls = DataLoaders.from_dsets(ds, ds[:50], bs=bs, device="cpu", num_workers=0)
    dls[0].drop_last = drop_last
    sel, spy = Chosen(2, exact=exact, seed=0), Planted()
    learn = Learner(dls, FirstColumn(), loss_func=lambda p, t: (p * 0).mean(), cbs=spy)
    learn.selective_backprop(**fresh(selector=sel, batching=batching, per_item=lambda p, t: p))
    quiet_fit(learn, epochs)
    log = learn.sb.log
    per_epoch = n // bs * bs if drop_last else n
    assert log.candidates.tolist() == [per_epoch] * epochs and log.fp.tolist() == [0] + [per_epoch] * (epochs - 1)
    whole = -(-n // bs) if not drop_last else n // bs
    trained = [i for b in spy.events[whole:] for i in b]  # after the first epoch, which trains everything
    first = [i for b in spy.events[:whole] for i in b]
    assert len(set(first)) == len(first) == per_epoch
    assert len(trained) + log.left.iloc[-1] == len(sel.chosen)
    assert trained == sel.chosen[: len(trained)]  # first in, first out: none lost, none twice
    assert log.bp.sum() == len(trained) + per_epoch == learn.sb.counts["bp"]
    if not drop_last:
        assert sorted(sel.offered[:n]) == list(range(n))
    if batching == "accumulate":
        assert {len(b) for b in spy.events[whole:]} == {bs} and 0 <= log.left.iloc[-1] < bs
        assert (log.left[1:].to_numpy() > 0).any()  # leftovers did carry over
    else:
        assert (log.left == 0).all()


# 3. Schedules stay right
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kw",
    [dict(beta=1), dict(beta=3, exact=True), dict(beta=2, batching="prune"), dict(beta=3, start=0.3, end=0.8)],
    ids=str,
)
def test_schedule_ends_at_its_end(kw):
    spy = Spy()
    learn = digits_learner(cbs=spy).selective_backprop(**fresh(**kw))
    quiet_fit(learn, 5)
    steps = len(learn.recorder.lrs)
    assert (
        spy.steps
        == steps
        == len(learn.recorder.losses)
        == len(learn.recorder.hps["lr"])
        == len(learn.recorder.hps["mom"])
    )
    assert learn.recorder.hps["lr"] == learn.recorder.lrs
    assert spy.pcts == sorted(spy.pcts) and spy.pcts[0] < 0.1 and spy.pcts[-1] > 0.9
    assert learn.pct_train == pytest.approx(1)
    # one-cycle, from its definition: 25 % up from lr/25, then down to lr/1e5, by cosine
    cos = lambda a, b, t: a + (b - a) * (1 - np.cos(np.pi * t)) / 2
    want = [cos(1e-2 / 25, 1e-2, p / 0.25) if p < 0.25 else cos(1e-2, 1e-7, (p - 0.25) / 0.75) for p in spy.pcts]
    np.testing.assert_allclose(learn.recorder.lrs, want, rtol=1e-4, atol=1e-9)


def test_start_and_end():
    learn = digits_learner().selective_backprop(**fresh(beta=1, start=0.25, end=0.75))
    quiet_fit(learn, 4)
    s = np.array(learn.sb.engine.record.points.y).reshape(4, -1)
    assert (s[[0, 3]] == 1).all() and s[1:3].max() < 1
    learn.selective_backprop(**fresh(beta=1, start=2, end=3))
    quiet_fit(learn, 4)
    assert learn.sb.log.fp.tolist() == [0, 0, 640, 0]


# 4. The record is honest
# -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batching", ["accumulate", "prune"])
def test_train_loss_is_of_what_was_trained(batching):
    spy = Spy()
    learn = digits_learner(cbs=spy).selective_backprop(**fresh(beta=2, batching=batching))
    quiet_fit(learn, 3)
    smooth, val = [], 0.0
    for i, (loss, _) in enumerate(spy.losses, 1):  # fastai's smoothed loss, over the trained batches only
        val = 0.98 * val + 0.02 * loss
        smooth.append(val / (1 - 0.98**i))
    np.testing.assert_allclose([float(o) for o in learn.recorder.losses], smooth, rtol=1e-4)
    assert learn.recorder.iters[-1] == len(spy.losses)
    rows, i = learn.sb.log, 0
    for r in rows.itertuples():
        n = 0
        total = 0
        while n < r.bp:
            total, n, i = total + spy.losses[i][0] * spy.losses[i][1], n + spy.losses[i][1], i + 1
        assert n == r.bp and r.trained_loss == pytest.approx(total / n, rel=1e-4)
        assert r.selected == pytest.approx(r.bp / r.candidates)


def test_candidate_loss_is_over_all_candidates():
    class Frozen(Spy):
        def before_backward(self):  # no step: the losses of all epochs are of one model
            from fastai.callback.core import CancelBackwardException

            raise CancelBackwardException

        def before_step(self):
            from fastai.callback.core import CancelStepException

            raise CancelStepException

    learn = digits_learner(noise=0, p=0, model=nn.Linear(64, 10), cbs=Frozen()).selective_backprop(**fresh(beta=3))
    x, y = digits(640)
    with torch.no_grad():
        want = F.cross_entropy(learn.model(x), y).item()
    quiet_fit(learn, 3)
    np.testing.assert_allclose(learn.sb.log.candidate_loss, [want] * 3, rtol=1e-4)
    assert (learn.sb.log.trained_loss[1:] > want).all() and learn.sb.log.trained_loss[0] == pytest.approx(
        want, rel=1e-4
    )


# 5. The paper's numbers
# --------------------------------------------------------------------------------------------------------
def test_a_whole_fit_against_the_paper():
    "Algorithm 1 in NumPy, fed with the losses and draws of a fit, chooses the same examples in every batch"

    class Seen(Percentile):
        def select(self, losses, history=None, **kwargs):
            u = self.uniform(len(losses), losses.device)
            s = super().select(losses, history, u=u)
            record.append((losses.numpy().copy(), u.numpy().copy(), s.idx.tolist()))
            return s

    record, R, beta = [], 200, 2
    learn = digits_learner().selective_backprop(**fresh(selector=Seen(beta, seed=3), history=R, start=0))
    quiet_fit(learn, 3)
    hist, n = np.zeros(0, np.float32), 0
    for losses, u, chosen in record:
        hist = np.concatenate([hist, losses])[-R:]
        prob = np.array([((hist < l).sum() / len(hist)) ** beta for l in losses])
        assert chosen == [i for i in range(len(losses)) if u[i] < prob[i]]
        n += len(chosen)
    assert len(record) == 60 and n > 100


def test_training_losses_fill_the_history_before_selection():
    spy = Spy()
    learn = digits_learner(cbs=spy).selective_backprop(**fresh(start=1, history=100))
    per_item = []

    class Fill(Spy):
        order = -4

        def after_loss(self):
            if self.training and self.epoch == 0:
                per_item.append(F.cross_entropy(self.pred.detach(), self.yb[0], reduction="none"))
                values.append(learn.sb.engine.history.values())

    values = []
    quiet_fit(learn, 1, cbs=Fill())
    assert learn.sb.counts["fp"] == 0
    torch.testing.assert_close(values[-1], torch.cat(per_item)[-100:])


# 6. Nothing waits
# -----------------------------------------------------------------------------------------------------------------
class Counter(TorchDispatchMode):
    "Counts the operations, and those that make the host wait for a device"

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.ops, self.waiting = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops += 1
        indexed_by_mask = name in ("index", "index_put_", "index_put") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in (args[1] if len(args) > 1 else ())
        )
        to_host = name in ("_to_copy", "copy_") and self._moves_to_host(args, kwargs or {})
        if any(name.startswith(w) for w in self.waits) or indexed_by_mask or to_host:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _moves_to_host(args, kwargs):
        src = args[1] if len(args) > 1 and isinstance(args[1], torch.Tensor) else args[0]
        dst = kwargs.get("device") or (args[0].device if src is not args[0] else None)
        return src.device.type != "cpu" and dst is not None and torch.device(dst).type == "cpu"


def test_the_counter_counts():
    with Counter() as c:
        t = torch.arange(4)
        t[t > 1], t.sum().item(), t.nonzero(), bool(t.sum())
    assert len(c.waiting) == 4


@pytest.mark.parametrize("exact,allowed", [(True, 0), (False, 1)])
@pytest.mark.parametrize("batching", ["accumulate", "prune"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_steady_step_does_not_wait(exact, allowed, batching, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x, y = (t.to(device) for t in digits(64))
    sb = SelectiveBackprop(digits_model().to(device), nn.CrossEntropyLoss(), 64, exact=exact, batching=batching)
    ops = []
    for i in range(10):
        with Counter() as c:
            ready = sb.offer((x, y))
            for _ in ready:
                sb.trained(torch.zeros((), device=device), 64)
        ops.append(c.ops)
        if i > 2:
            assert len(c.waiting) <= allowed, c.waiting
    assert max(ops[3:]) < 200
    with Counter() as c:  # before selection: the losses of the training pass are noted
        sb.offer((x, y), select=False)
        sb.fill(per_item_loss(sb.loss_func, sb.model(x).detach(), y))
    assert c.waiting == []


def test_no_loop_over_examples():
    def n_ops(B):
        x, y = torch.randn(B, 64), torch.zeros(B, dtype=torch.long)
        sb = SelectiveBackprop(digits_model(), nn.CrossEntropyLoss(), B, exact=True)
        sb.offer((x, y))
        with Counter() as c:
            sb.offer((x, y))
        return c.ops

    assert abs(n_ops(16) - n_ops(2048)) <= 4


@pytest.mark.parametrize("exact,allowed", [(True, 0), (False, 1)])
def test_the_callback_does_not_wait(exact, allowed):
    learn = digits_learner().selective_backprop(**fresh(exact=exact))
    cb, seen = learn.sb, []

    def counted(f, event, *args):
        with Counter() as c:
            try:
                return f(*args)
            finally:
                seen.append((learn.epoch, event, c.waiting))

    for event in ("_candidates", "before_batch", "after_loss", "after_batch"):
        object.__setattr__(cb, event, partial(counted, getattr(cb, event), event))
    quiet_fit(learn, 3)
    assert len(seen) > 150
    assert all(len(w) <= (allowed if event == "_candidates" and epoch else 0) for epoch, event, w in seen), seen


# 7. Errors come at the start
# --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kw,words",
    [
        (dict(beta=-0.5), "beta=-0.5"),
        (dict(beta="2"), "beta='2'"),
        (dict(beta=float("nan")), "beta=nan"),
        (dict(beta=True), "beta=True"),
        (dict(history=0), "history=0"),
        (dict(history=2.5), "history=2.5"),
        (dict(start=-1), "start=-1"),
        (dict(start="1"), "start='1'"),
        (dict(start=1.0), "start=1.0"),
        (dict(start=True), "start=True"),
        (dict(end=0), "end=0"),
        (dict(end=1.2), "end=1.2"),
        (dict(start=0.6, end=0.5), "end=0.5"),
        (dict(exact="yes"), "exact='yes'"),
        (dict(batching="drop"), "batching='drop'"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(selector="none such"), "selector='none such'"),
        (dict(selector=Percentile(1), beta=2), "not both"),
        (dict(per_item=1), "per_item=1"),
        (dict(bata=1), "bata"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_the_call(kw, words):
    learn = digits_learner()
    learn.selective_backprop(**fresh(beta=2.5))
    with pytest.raises((ValueError, TypeError), match=words.replace("(", r"\(")):
        learn.selective_backprop(**fresh(**kw))
    assert learn.sb.selector.beta == 2.5  # bad input changes nothing


def test_a_loss_that_cannot_be_split_is_refused_before_the_fit():
    def mine(p, t):
        return F.cross_entropy(p, t)

    spy = Spy()
    learn = digits_learner(loss_func=mine, cbs=spy).selective_backprop(**fresh())
    with pytest.raises(TypeError, match="per_item="):
        quiet_fit(learn)
    assert not getattr(spy, "batches", None)
    learn.selective_backprop(**fresh(per_item=lambda p, t: F.cross_entropy(p, t, reduction="none")))
    quiet_fit(learn)
    assert learn.sb.counts["fp"] == 640
    quiet_fit(digits_learner(loss_func=mine).selective_backprop(**fresh(beta=0)))  # keeps everything: any loss will do


def test_a_loss_that_turns_out_not_to_split_is_refused_on_the_first_batch():
    class Ignores(nn.Module):
        reduction = "mean"

        def forward(self, p, t):
            return F.cross_entropy(p, t)

    spy = Spy()
    learn = digits_learner(loss_func=Ignores(), cbs=spy).selective_backprop(**fresh(start=1))
    with pytest.raises(TypeError, match="per_item="):
        quiet_fit(learn, 3)
    assert len(spy.batches) <= 1 and spy.steps == 0  # before anything is trained on


def test_rows_that_do_not_fit_together_are_pruned_and_it_is_said_once():
    "Nothing stops: what waits is trained on, and from then on what is kept of each batch by itself"
    from fastai.basics import DataLoaders, Learner

    class Padded:
        "Batches padded to their own longest"

        def __init__(self):
            self.bs, self.n_inp = 8, 1

        def __iter__(self):
            for i in range(6):
                yield torch.rand(8, 5 + i), torch.zeros(8, 1)

        def __len__(self):
            return 6

        def to(self, device):
            self.device = device

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.mean(1, keepdim=True) * self.w

    def learner():
        dls = DataLoaders(Padded(), Padded())
        dls.device = torch.device("cpu")
        return Learner(dls, Mean(), loss_func=nn.MSELoss())

    for kw in (dict(), dict(batching="prune"), dict(beta=0), dict(start=9)):
        learn = learner().selective_backprop(**fresh(**{"start": 1, **kw}))
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter("always")
            quiet_fit(learn, 3)
        said = [str(o.message) for o in w if "by itself from now on" in str(o.message)]
        assert len(said) == (kw == {}) and all(f"shape ({6},), those before had ({5},)" in o for o in said)
        log = learn.sb.log
        assert (log.bp == log.fp // 2)[log.fp > 0].all() and (log.bp == 48)[log.fp == 0].all() and (log.left == 0).all()


# 8. Non-finite losses are never swallowed
# -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("batching", ["accumulate", "prune"])
def test_non_finite_losses(exact, batching):
    "One bad example an epoch: always trained on, never in the history, one warning"
    from fastai.basics import DataLoaders, Learner

    x, y = digits(320)
    x[77] = float("nan")
    bad = []

    class Watch(Spy):
        def before_batch(self):
            if self.training:
                bad.append(int(self.xb[0].isnan().any(1).sum()))

    class Survives(nn.Sequential):
        def forward(self, x):
            return super().forward(x.nan_to_num() if self.training else x)

    dls = DataLoaders.from_dsets(list(zip(x, y)), list(zip(x[:9], y[:9])), bs=32, device="cpu", num_workers=0)
    learn = Learner(dls, Survives(*digits_model()), loss_func=nn.CrossEntropyLoss(), cbs=Watch())
    learn.selective_backprop(**fresh(beta=3, start=0, exact=exact, batching=batching))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always")
        quiet_fit(learn, 4)
    ours = [o for o in w if "NaN or infinite" in str(o.message)]
    assert len(ours) == 1
    waiting = 0 if batching == "prune" else 1
    assert 4 - waiting <= sum(bad) <= 4
    assert learn.sb.engine.history.values().isfinite().all()
    assert learn.sb.log.candidate_loss.notna().all()


def test_terminate_on_nan_sees_it():
    learn = digits_learner(cbs=TerminateOnNaNCallback()).selective_backprop(**fresh(start=0, beta=3))
    x = learn.dls.train_ds.x
    x[:] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet_fit(learn, 3)
    assert learn.epoch == 0 and learn.sb.counts["bp"] == 32
