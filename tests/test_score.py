"""Scorers: in the engine and in a fastai fit, against passes written here; compiled models; nothing is recompiled,
nothing waits."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import Spy, digits_learner, digits_model, everything, fresh, quiet_fit, same, weights
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, load_learner, set_seed
from fastai.callback.mixup import MixUp
from test_invariants import Counter
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

from fastsb.all import (
    BatchLossFilterCallback,
    Doubtful,
    GradNorm,
    Percentile,
    Proxy,
    ReducibleLoss,
    Scorer,
    SelectiveBackprop,
    SelectiveBackpropCallback,
    TopK,
    as_scorer,
)
from fastsb.data import image_dls, load_arrays


def conv_net(w=6, c_in=1, pool=1):
    body = nn.Conv2d(c_in, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(), nn.Dropout(0.1)
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(w * pool**2, 10))


def image_learner(n=512, bs=64, model=None, seed=1, cbs=None, device="cpu"):
    set_seed(seed)
    x, y, xt, yt = load_arrays()
    dls = image_dls(x[:n], y[:n], xt[:100], yt[:100], bs=bs, device=device)
    return Learner(dls, model or conv_net(), loss_func=CrossEntropyLossFlat(), cbs=cbs)


class Seen(Percentile):
    "Writes down the scores that it is given"

    def select(self, losses, history=None, **kwargs):
        self.seen = [*getattr(self, "seen", []), losses.clone()]
        return super().select(losses, history, **kwargs)


def drive(score, images=True, **kwargs):
    "Scores of three batches by the engine, the model and the batches"
    torch.manual_seed(0)
    model = conv_net() if images else digits_model()
    x = torch.randn(96, 1, 12, 12) if images else torch.randn(96, 64)
    y, sel = torch.arange(96) % 10, Seen(1, exact=True, seed=0)
    sb = SelectiveBackprop(model, nn.CrossEntropyLoss(), 32, start=0, selector=sel, score=score, **kwargs)
    list(sb.batches(DataLoader(TensorDataset(x, y), 32)))
    return torch.cat(sel.seen), model.eval(), x, y, sb


@torch.no_grad()
def test_scores_are_those_of_a_pass_written_here():
    true, model, x, y, _ = drive("model")
    torch.testing.assert_close(true, F.cross_entropy(model(x), y, reduction="none"))
    small, model, x, y, _ = drive(Scorer(size=0.5))
    # halving with antialiasing, written out: 1,3,3,1 along both axes, what falls off the edge left out
    w = torch.zeros(6, 12)
    for i in range(6):
        for j, v in zip(range(2 * i - 1, 2 * i + 3), (1.0, 3.0, 3.0, 1.0)):
            if 0 <= j < 12:
                w[i, j] = v
    w /= w.sum(1, keepdim=True)
    torch.testing.assert_close(small, F.cross_entropy(model(w @ x @ w.T), y, reduction="none"), rtol=1e-4, atol=1e-5)
    half, model, x, y, _ = drive(Scorer(precision="bf16"), images=False)
    with torch.autocast("cpu", torch.bfloat16):
        pred = model(x)
    torch.testing.assert_close(half, F.cross_entropy(pred.float(), y, reduction="none"), rtol=1e-5, atol=1e-6)
    assert pred.dtype == torch.bfloat16
    mine, _, x, _, _ = drive(lambda m, b: b[0].mean(1), images=False)
    torch.testing.assert_close(mine, x.mean(1))


@pytest.mark.parametrize(
    "score",
    ["model", Scorer(precision="bf16", channels_last=True), Scorer(size=0.75), "proxy", "frozen", "function"],
    ids=str,
)
def test_a_fit_with_each_scorer(score):
    "Trains on exactly half; everything is accounted for; the last epoch's own batch is of full size"
    score = dict(
        proxy=Proxy(conv_net(3), every=2), frozen=Proxy(conv_net(3), every=None), function=lambda m, b: -m(b[0]).amax(1)
    ).get(str(score), score)
    spy = Spy()
    learn = image_learner(cbs=spy).selective_backprop(**fresh(score=score))
    quiet_fit(learn, 3)
    assert learn.sb.counts == dict(candidates=1536, fp=1024, bp=1024) and spy.steps == 16
    assert learn.sb.log.selected.tolist() == [1.0, 0.5, 0.5] and {len(b[1][0]) for b in spy.batches if b[1]} == {64}
    assert spy.pcts[0] == 0 and spy.pcts[-1] == pytest.approx(23 / 24)


def test_the_default_is_the_model_itself():
    fit = lambda **kw: weights(quiet_fit(image_learner().selective_backprop(**fresh(seed=0, **kw))))
    assert same(fit(), fit(score=Scorer()))


@pytest.mark.parametrize("kw", [dict(start=5), dict(beta=0), dict(selector=TopK(1.0), start=0)], ids=str)
def test_off_means_off_with_a_proxy(kw):
    "A proxy, with dropout and BatchNorm, trains beside a model that must not notice"
    proxy = Proxy(conv_net(3), every=1)
    plain = weights(quiet_fit(image_learner()))
    assert same(plain, weights(quiet_fit(image_learner().selective_backprop(**fresh(score=proxy, **kw)))))
    assert (proxy.opt is not None) == (
        "start" in kw and kw["start"] == 5
    )  # where nothing can ever be left out, it need not learn


def test_no_trace_also_when_the_scorer_raises():
    model, calls = digits_model(), []

    def broken(m, b):
        calls.append((torch.rand(3), random.random(), np.random.rand()))
        if len(calls) > 1:
            raise RuntimeError("broken")
        return torch.zeros(len(b[1]))

    sb = SelectiveBackprop(model, nn.CrossEntropyLoss(), 8, start=0, score=broken)
    batch, before = (torch.randn(8, 64), torch.arange(8)), everything(model)
    with pytest.raises(RuntimeError, match="broken"):
        sb.offer(batch)
    assert len(calls) == 2 and same(before, everything(model))


def test_a_proxy_learns_from_what_is_selected():
    "By hand: one AdamW step on every second batch that was ready"
    spy, net = Spy(), conv_net(3)
    net[3] = nn.Identity()  # no dropout, so that the reference needs no draws
    twin = copy.deepcopy(net)
    learn = image_learner(cbs=spy).selective_backprop(**fresh(score=Proxy(net, every=4), start=1))
    quiet_fit(learn, 2)
    opt, since = torch.optim.AdamW(twin.parameters(), lr=2e-3), 0
    for xb, yb in spy.batches[:8]:  # before selection: every fourth
        since += 1
        if since == 4:
            since = 0
            F.cross_entropy(twin(xb[0].as_subclass(torch.Tensor)), yb[0].as_subclass(torch.Tensor)).backward()
            opt.step()
            opt.zero_grad()
    for xb, yb in spy.batches[8:]:  # then half of them are ready: the batches 2, 4, ... of 8 candidates
        since += 2
        if since == 4:
            since = 0
            F.cross_entropy(twin(xb[0].as_subclass(torch.Tensor)), yb[0].as_subclass(torch.Tensor)).backward()
            opt.step()
            opt.zero_grad()
    assert len(spy.batches) == 12
    torch.testing.assert_close([*net.state_dict().values()], [*twin.state_dict().values()], rtol=1e-5, atol=1e-6)


def test_a_proxy_is_trained_on_what_mixup_has_not_mixed():
    seen = []

    class Watch(Proxy):
        def trained(self, batch, *args, **kwargs):
            seen.append(None if batch is None else batch[0].clone())

    spy = Spy()
    learn = image_learner(cbs=[spy, MixUp()]).selective_backprop(**fresh(score=Watch(conv_net(3)), start=0))
    rows = {r.sum().item() for b in learn.dls.train for r in b[0]}
    quiet_fit(learn, 1)
    ready = [s for s in seen if s is not None]
    assert len(ready) == 4 and all(r.sum().item() in rows for b in ready for r in b)
    assert not all(r.sum().item() in rows for b in spy.batches for r in b[0][0])


def test_percentiles_do_not_mix_scales():
    """Losses that training leaves behind are no yardstick for the scores of a smaller network; those of the model
    itself are"""

    def at_start(score):
        held = []

        class First(Percentile):
            def probs(self, losses, history, **context):
                held.append(len(history))
                return super().probs(losses, history, **context)

        quiet_fit(image_learner().selective_backprop(**fresh(selector=First(1, exact=True), score=score)), 2)
        return held[0]

    assert at_start("model") == 512 + 64 and at_start(Scorer(precision="bf16")) == 512 + 64
    assert (
        at_start(Scorer(size=0.75)) == at_start(Proxy(conv_net(3))) == at_start(lambda m, b: b[0].mean((1, 2, 3))) == 64
    )


def test_what_does_not_fit_is_known_on_the_first_batch():
    "Selection would begin in the third epoch; the error comes in the first"
    for learn, score, words in (
        (digits_learner(), Scorer(size=0.5), "Only images"),
        (digits_learner(), Scorer(channels_last=True), "Only images"),
        (
            image_learner(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
            Scorer(size=0.5),
            "cannot score these batches",
        ),
        (image_learner(), Proxy(digits_model()), "cannot score these batches"),
        (image_learner(), lambda m, b: torch.zeros(3), "one number a row"),
        (image_learner(), lambda m, b: 1.0, "one number a row"),
    ):
        learn.selective_backprop(**fresh(score=score, start=2))
        before = weights(learn)
        with pytest.raises(ValueError, match=words):
            quiet_fit(learn, 3)
        assert same(before, weights(learn)) and "one_batch" not in vars(learn)


@pytest.mark.parametrize(
    "kw,words",
    [
        (dict(score="models"), "score='models' must be"),
        (dict(score=None), "score=None must be"),
        (dict(score=nn.Linear(2, 2)), "pass Proxy"),
        (dict(score=Scorer), "is a class"),
        (dict(score=lambda m, b: 0, selector=GradNorm()), "needs predictions"),
        (dict(score=Scorer(size=0.5), stale=2), "stale=2"),
        (dict(score=Proxy(nn.Linear(2, 2)), stale=3), "stale=3"),
    ],
)
def test_refused_at_the_call(kw, words):
    with pytest.raises((ValueError, TypeError), match=words):
        SelectiveBackpropCallback(**fresh(**kw))


def test_scorers_and_other_settings():
    quiet_fit(image_learner().selective_backprop(**fresh(score=Scorer(precision="bf16"), stale=2)), 3)
    learn = quiet_fit(
        image_learner().selective_backprop(**fresh(score=Proxy(conv_net(3)), selector=GradNorm(), rescale="mean")), 2
    )
    assert learn.sb.counts["candidates"] == 1024
    learn = quiet_fit(
        image_learner().selective_backprop(**fresh(score=Scorer(size=0.75), selector=ReducibleLoss(torch.zeros(512)))),
        2,
    )
    assert learn.sb.counts["fp"] == 512


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_net(4), nn.Linear(3, 10)

    def forward(self, image, table):
        return self.a(image) + self.b(table)


def test_several_inputs():
    set_seed(0)
    x, t, y = torch.randn(128, 1, 8, 8), torch.randn(128, 3), torch.arange(128) % 10

    def learner(score):
        data = TensorDataset(x, t, y)
        data.n_inp = 2
        dls = DataLoaders.from_dsets(data, data, bs=32, device="cpu", num_workers=0)
        return Learner(dls, TwoInputs(), loss_func=nn.CrossEntropyLoss()).selective_backprop(
            **fresh(score=score, start=0)
        )

    learn = learner(Scorer(size=0.5, input=0))
    quiet_fit(learn, 1)
    assert learn.sb.counts == dict(candidates=128, fp=128, bp=64)
    with pytest.raises(ValueError, match="2 inputs. Pass input="):
        quiet_fit(learner(Scorer(size=0.5)), 1)
    with pytest.raises(ValueError, match=r"batch\[1\] is a float32 tensor of shape \(2, 3\)"):
        quiet_fit(learner(Scorer(size=0.5, input=1)), 1)


def test_export_stays_small_and_loads(tmp_path):
    learn = quiet_fit(
        image_learner().selective_backprop(
            **fresh(score=Proxy(conv_net(64, pool=2), every=1, compile=dict(backend="eager")))
        ),
        2,
    )
    learn.path = tmp_path
    learn.export("l.pkl")
    proxy_bytes = sum(p.nbytes for p in learn.sb.scorer.model.parameters())
    plain = image_learner()
    plain.path = tmp_path
    plain.export("p.pkl")
    assert (tmp_path / "l.pkl").stat().st_size < (
        tmp_path / "p.pkl"
    ).stat().st_size + 1.5 * proxy_bytes + 20_000  # no optimiser state, no code, no buffers
    loaded = load_learner(tmp_path / "l.pkl")
    assert loaded.sb.scorer.opt is None and same(loaded.sb.scorer.model[0].weight, learn.sb.scorer.model[0].weight)


def test_the_filter_takes_no_scorer():
    with pytest.raises(TypeError):
        BatchLossFilterCallback(score=Scorer())


# compiled -----------------------------------------------------------------------------------------------------------
# ----------------
def test_compiled_models_are_not_compiled_again():
    """50 steps of a compiled, channels_last model with a compiled scorer, after 6 of warm-up; the compiler is
    PyTorch's, its code generation left out"""
    torch._dynamo.reset()
    set_seed(0)
    model = conv_net(c_in=3).to(memory_format=torch.channels_last)
    training, scoring = CompileCounter(), CompileCounter()
    compiled, opt, loss_func = (
        torch.compile(model, backend=training),
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        nn.CrossEntropyLoss(),
    )
    sb = SelectiveBackprop(
        model, loss_func, 32, start=1, score=Scorer(size=0.5, channels_last=True, compile=dict(backend=scoring))
    )
    x, y = torch.randn(64 * 32, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(64 * 32) % 10
    data, frames, steps = [(x[i : i + 32], y[i : i + 32]) for i in range(0, len(x), 32)], [], 0
    for batches in (data[:4], data[:12], data, data):
        for xb, yb in sb.batches(batches):
            model.train()
            loss_func(compiled(xb), yb).backward()
            opt.step()
            opt.zero_grad()
            steps += 1
            assert xb.is_contiguous(memory_format=torch.channels_last)
            frames.append((training.frame_count, scoring.frame_count))
    assert steps == 4 + 6 + 32 + 32
    assert frames[-1] == (1, 1) and len(set(frames[10:])) == 1, frames
    torch._dynamo.reset()


@pytest.mark.parametrize("kw", [dict(), dict(score=Scorer(precision="bf16")), dict(score="cached")], ids=str)
def test_a_learner_with_a_compiled_model(kw):
    """learn.model = torch.compile(...), and a loader that drops the odd last batch: a graph to train, one to score,
    one to validate, and then no more"""
    torch._dynamo.reset()
    counter, frames = CompileCounter(), []
    learn = image_learner(n=640, model=conv_net().to(memory_format=torch.channels_last))
    learn.dls.train.drop_last, learn.dls.valid.bs = True, 50
    learn.model = torch.compile(learn.model, backend=counter)

    class Count(Spy):
        def after_batch(self):
            if self.training:
                frames.append((self.epoch, counter.frame_count))

    quiet_fit(learn.selective_backprop(**fresh(**kw)), 14, cbs=Count())
    after = [f for e, f in frames if e > 2]
    assert len(after) >= 50 and len(set(after)) == 1, frames
    assert after[0] <= 4
    torch._dynamo.reset()


def test_inductor_gives_the_same_scores():
    "With a compiler at hand, real compiled code"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.randn(4))
    except Exception as e:
        pytest.skip(f"torch.compile makes no code here: {type(e).__name__}")
    true, *_ = drive("model")
    fast, *_ = drive(Scorer(compile=True))
    torch.testing.assert_close(fast, true, rtol=1e-4, atol=1e-5)


def test_as_scorer_gives_back_a_scorer():
    s = Scorer(size=0.5)
    assert as_scorer(s) is s and repr(s) == "Scorer(size=0.5)" and as_scorer("model").own and not s.own


# nothing waits ------------------------------------------------------------------------------------------------------
# ------------------
KINDS = [
    None,
    dict(),
    dict(score=Scorer(precision="bf16")),
    dict(score=Scorer(size=0.75, channels_last=True)),
    dict(score=Doubtful(0.5)),
    dict(score="proxy"),
    dict(score="cached"),
    dict(score=lambda m, b: b[0].mean((1, 2, 3))),
]


@pytest.mark.parametrize("kw", KINDS, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_of_the_default_mode_waits_for_nothing(kw, device, monkeypatch):
    """Of the callback's own events in a fit; that an epoch is read out, or chosen, at its end or beginning is not of
    a step"""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if kw and kw.get("score") == "proxy":
        kw = dict(
            score=Proxy(conv_net(3), every=1, opt_func=partial(torch.optim.SGD, lr=0.1))
        )  # AdamW keeps a number on the host, and reads that
    if device == "cpu":
        monkeypatch.setattr(
            "fastsb.memory.as_items", lambda items, n: items
        )  # it looks at indices on the host only, where that is free
    learn = image_learner(device=device).selective_backprop(**({} if kw is None else fresh(**kw)))  # None: the default
    seen, sb = [], learn.sb

    def counted(f, event):
        with Counter() as c:
            try:
                f()
            finally:
                seen.append((sb.epoch, event, c.waiting))

    for event in ("before_batch", "after_loss", "after_batch"):
        object.__setattr__(sb, event, partial(counted, getattr(sb, event), event))
    quiet_fit(learn, 3)
    assert {e for e, _, _ in seen} == {0, 1, 2} and len(seen) > 40
    assert [s for s in seen[3:] if s[2]] == []


# only those in doubt
# ----------------------------------------------------------------------------------------------------------------
def test_doubtful_in_a_fit_against_an_account_kept_here():
    """Which rows are scored afresh, what the others count as, and what is remembered: followed by hand through a
    whole fit"""
    B, share, n = 64, 0.25, 512
    seen, memory = [], torch.full((n,), torch.nan)

    class Watch(Doubtful):
        def check(self, *args, **kwargs):
            "The two rows that are tried are no part of the account"

        def __call__(self, batch, model, loss_func, remembered=None, keep=None, **how):
            items, mem = batch[-1], remembered.clone()
            scores, *rest = super().__call__(batch, model, loss_func, remembered=remembered, keep=keep, **how)
            assert keep == 0.5
            torch.testing.assert_close(mem, memory[items], equal_nan=True)
            order = mem.numpy().argsort()
            nearest = sorted(range(B), key=lambda i: abs(i + 0.5 - B / 2))[: int(share * B)]
            assert set(self.scored.tolist()) == {int(order[i]) for i in nearest}
            model.eval()
            with torch.no_grad():
                x, y = (t.as_subclass(torch.Tensor) for t in batch[:2])
                true = F.cross_entropy(model(x), y, reduction="none")
            model.train()
            want = mem.clone()
            want[self.scored] = true[self.scored]
            torch.testing.assert_close(scores, want)
            memory[items[self.scored]] = 0.5 * memory[items[self.scored]] + 0.5 * true[self.scored]
            seen.append(len(self.scored))
            return scores, *rest

    class Train(Spy):
        order = 60

        def after_loss(self):
            if self.training:
                l = F.cross_entropy(
                    self.pred.detach().as_subclass(torch.Tensor), self.y.as_subclass(torch.Tensor), reduction="none"
                )
                items = self.learn.sb._rows
                memory[items] = torch.where(memory[items].isnan(), l, 0.5 * memory[items] + 0.5 * l)

    learn = image_learner(n, B, cbs=Train()).selective_backprop(**fresh(score=Watch(share)))
    quiet_fit(learn, 3)
    assert seen == [16] * 16 and learn.sb.counts == dict(candidates=3 * n, fp=16 * 16, bp=n + n)
    torch.testing.assert_close(learn.sb.sampler.memory.losses(), memory, rtol=1e-4, atol=1e-5)


def test_doubtful_needs_to_remember():
    with pytest.raises(ValueError, match="remembered="):
        drive(Doubtful())
    torch.manual_seed(0)
    sb = SelectiveBackprop(digits_model(), nn.CrossEntropyLoss(), 16, start=0, score=Doubtful(0.5))
    x, y = torch.randn(32, 64), torch.arange(32) % 10
    assert len(sb.offer((x, y), remembered=torch.rand(32))) == 1 and sb.counts == dict(candidates=32, fp=16, bp=16)
    learn = quiet_fit(
        image_learner(cbs=MixUp()).selective_backprop(**fresh(score=Doubtful())), 2
    )  # what is mixed is booked to the row's own item
    assert learn.sb.sampler.memory.losses().isfinite().all()
