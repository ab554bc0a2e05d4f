"Memory and sampler against models of them made of dicts, for whatever happens to them."

import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from fastsb.memory import ItemMemory
from fastsb.sampler import SelectiveSampler, choose, without_small_rest
from fastsb.select import TopK

often = settings(derandomize=True, deadline=None, max_examples=300)
numbers = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))


@st.composite
def updates(draw):
    "How many items, and batches of (items, losses or None, doubts or None, epoch, trained)"
    n, epoch, steps = draw(st.integers(1, 9)), 0, []
    for _ in range(draw(st.integers(0, 8))):
        epoch += draw(st.integers(0, 2))
        items = draw(st.lists(st.integers(0, n - 1), max_size=12))
        column = st.one_of(st.none(), st.lists(numbers, min_size=len(items), max_size=len(items)))
        steps.append((items, draw(column), draw(column), epoch, draw(st.booleans())))
    return n, steps


class Model:
    "What is remembered of each item: {item: (loss, doubt, epoch)}, and how often it was trained"

    def __init__(self, momentum):
        self.m, self.of, self.times = np.float32(momentum), {}, {}

    def average(self, old, new):
        if new is None:
            return old
        return np.float32(new) if old is None else np.float32(self.m * old + (np.float32(1) - self.m) * np.float32(new))

    def update(self, items, losses, doubts, epoch, trained):
        for i in items if trained else ():
            self.times[i] = self.times.get(i, 0) + 1
        if losses is None and doubts is None:
            return
        last = {}
        for k, i in enumerate(items):
            given_ = [None if v is None else v[k] for v in (losses, doubts)]
            if all(v is None or math.isfinite(v) for v in given_):
                last[i] = given_
        for i, (loss, doubt) in last.items():
            old = self.of.get(i, (None, None, 0))
            self.of[i] = (self.average(old[0], loss), self.average(old[1], doubt), epoch)

    def column(self, which, n, epoch=None, max_age=None):
        def value(i):
            known = i in self.of and self.of[i][which] is not None
            nothing = which == 1 and known and self.of[i][0] == self.of[i][1] == 0  # without a target: of any age
            recent = known and (max_age is None or epoch - self.of[i][2] <= max_age or nothing)
            return self.of[i][which] if recent else np.nan

        return np.array([value(i) for i in range(n)], np.float32)


@often
@given(updates(), st.sampled_from([0.0, 0.5, 0.75]), st.integers(0, 4))
def test_the_memory_is_what_a_dict_would_be(case, momentum, max_age):
    n, steps = case
    memory, model, now = ItemMemory(n, momentum), Model(momentum), 0
    for items, losses, doubts, now, trained in steps:
        memory.update(items, losses, doubts, epoch=now, trained=trained)
        model.update(items, losses, doubts, now, trained)
    for which, remembered in enumerate((memory.losses, memory.doubts)):
        np.testing.assert_allclose(remembered().numpy(), model.column(which, n), rtol=1e-4, atol=1e-4)
        aged = remembered(epoch=now + 2, max_age=max_age).numpy()
        np.testing.assert_array_equal(np.isnan(aged), np.isnan(model.column(which, n, now + 2, max_age)))
    assert memory.times().tolist() == [model.times.get(i, 0) for i in range(n)]
    ages = [now + 2 - model.of[i][2] if i in model.of else np.nan for i in range(n)]
    np.testing.assert_array_equal(memory.ages(None, now + 2).numpy(), np.array(ages, np.float32))
    known, summary = [a for a in ages if not np.isnan(a)], memory.summary(now + 2)
    assert summary["seen"] == len(model.of) == len(known) and summary["oldest"] == max(known, default=0)
    l = memory.losses().numpy()
    seen = l[~np.isnan(l)]
    want = [1.0 if np.isnan(x) or not len(seen) else np.float32((seen < x).sum() / np.float32(len(seen))) for x in l]
    np.testing.assert_allclose(memory.percentile(memory.losses()).numpy(), np.array(want, np.float32), rtol=1e-6)
    other = ItemMemory(n, momentum)
    other.load_state_dict(memory.state_dict())
    for a, b in ((memory.losses(), other.losses()), (memory.doubts(), other.doubts()), (memory.times(), other.times())):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


@often
@given(updates(), st.data())
def test_what_is_refused_changes_nothing(case, data):
    n, steps = case
    memory = ItemMemory(n)
    for items, losses, doubts, epoch, trained in steps:
        memory.update(items, losses, doubts, epoch=epoch, trained=trained)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in memory.state_dict().items()}
    wrong = data.draw(st.sampled_from(["high", "low", "losses", "doubt", "epoch", "kind"]))
    kw = dict(items=[0], losses=[1.0], doubt=[1.0], epoch=3)
    kw.update(
        {
            "high": dict(items=[n]),
            "low": dict(items=[-1]),
            "losses": dict(losses=[1.0, 2.0]),
            "doubt": dict(doubt=[]),
            "epoch": dict(epoch=-1),
            "kind": dict(items=[0.5]),
        }[wrong]
    )
    with pytest.raises((ValueError, TypeError)):
        memory.update(**kw)
    after = memory.state_dict()
    assert all(
        torch.equal(v.nan_to_num(-1), after[k].nan_to_num(-1)) if isinstance(v, torch.Tensor) else v == after[k]
        for k, v in before.items()
    )


@often
@given(updates(), st.floats(0.01, 1), st.integers(0, 4), st.integers(1, 20))
def test_the_choice_is_the_highest_and_the_unknown(case, keep, max_age, chunk):
    n, steps = case
    memory, now = ItemMemory(n), 0
    for items, losses, doubts, now, trained in steps:
        memory.update(items, losses, doubts, epoch=now, trained=trained)
    l = memory.losses(epoch=now + 1, max_age=max_age).numpy()
    known = np.flatnonzero(~np.isnan(l))
    k = max(1, math.floor(keep * len(known) + 0.5)) if len(known) else 0
    idx, p, w = choose(memory, TopK(keep), now + 1, max_age=max_age, chunk=chunk)
    chosen = set(idx.tolist())
    assert (
        idx.tolist() == sorted(chosen)
        and chosen >= set(range(n)) - set(known)
        and len(chosen) == n - len(known) + k
        and w is None
    )
    if 0 < k < len(known):
        assert min(l[i] for i in known if i in chosen) >= max(l[i] for i in known if i not in chosen)


@often
@given(st.integers(1, 300), st.integers(1, 40))
def test_no_small_rest(n, bs):
    k = without_small_rest(n, bs)
    assert k == n or n - bs / 2 < k < n and k % bs == 0 or n - 2 < k < n
    assert k <= bs or k % bs == 0 or k % bs >= bs / 2 and k % bs > 1


happenings = st.lists(
    st.sampled_from(["pass", "broken", "len", "look", "log", "save", "told"]), min_size=1, max_size=14
)


@often
@given(
    st.integers(2, 30),
    st.integers(2, 8),
    st.floats(0.05, 1),
    st.integers(1, 3),
    st.integers(1, 3),
    happenings,
    st.integers(0, 9),
)
def test_whatever_is_done_with_a_sampler(n, bs, keep, max_age, ways, happenings, seed):
    "Passes, broken ones, looks, `len` and states in any order: each pass is of what a dict would choose, counts add up"

    def make():
        return [
            SelectiveSampler(
                n, TopK(keep), start=1, end=None, bs=bs, max_age=max_age, seed=seed, num_replicas=ways, rank=r
            )
            for r in range(ways)
        ]

    each, samplers, g = -(-n // ways), make(), torch.Generator().manual_seed(seed)
    last, epoch, trained, open_ = {}, 0, [0] * ways, False
    for what in happenings:
        if what == "len":
            assert len({len(s) for s in samplers}) == 1
        elif what == "look":
            if not open_ and all(len(s) > 1 for s in samplers):  # of one item, it would be the whole pass
                assert all(isinstance(next(iter(s)), int) for s in samplers)
        elif what == "log":
            assert all(len(s.log) == len([r for r in s.log if r["candidates"] >= r["bp"]]) for s in samplers)
        elif what == "save":
            if not open_:
                states, samplers = [s.state_dict() for s in samplers], make()
                for s, state in zip(samplers, states):
                    s.load_state_dict(state)
        elif what == "told":
            if not open_:
                for s in samplers:
                    s.set_epoch(epoch)
        else:
            epoch, open_ = epoch + open_, False
            shares = [list(s) for s in samplers]
            got, known = {i for share in shares for i in share}, [i for i in last if epoch - last[i] <= max_age]
            must = n if epoch == 0 else n - len(known) + (max(1, math.floor(keep * len(known) + 0.5)) if known else 0)
            assert len({len(s) for s in shares}) == 1 and len(got) <= max(must, min(2 * ways, n))
            assert len(got) > must - ways * bs / 2 - 1 and (epoch or len(got) == n)
            assert n < 2 * ways or epoch == 0 or len(shares[0]) % bs != 1
            if what == "broken" and len(shares[0]) > 1:
                shares, open_ = [s[:1] for s in shares], True
            losses = torch.rand(n, generator=g)
            for r, (s, share) in enumerate(zip(samplers, shares)):
                s.observe(share, losses[share])
                trained[r] += len(share)
            for r, share in enumerate(shares):
                for q, s in enumerate(samplers):  # as if memories had been brought together
                    if q != r:
                        s.memory.update(share, losses[share], epoch=s.past + s.epoch, trained=False)
                last.update({i: epoch for i in share})
            if not open_:
                epoch += 1
    for s, count in zip(samplers, trained):
        if not open_:
            assert s.record.counts["bp"] == sum(r["bp"] for r in s.log) == count and all(
                r["candidates"] <= each for r in s.log
            )
        assert int(s.memory.times().sum()) == count
