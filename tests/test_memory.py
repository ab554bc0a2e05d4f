"The memory against plain Python."

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsb.memory import ItemMemory

devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
on = pytest.mark.parametrize("device", devices)
kinds = {"exact": {}, "counted": {"exact_up_to": 0}, "chunked": {"exact_up_to": 0, "chunk": 77}}
of_kind = pytest.mark.parametrize("kind", kinds)


def make_memory(n, kind="exact", **kwargs):
    memory = ItemMemory(n, **kwargs)
    for k, v in kinds[kind].items():
        setattr(memory, k, v)
    return memory


class Reference:
    "What the memory is defined to be, item by item"

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
        return np.array(
            [
                1 if np.isnan(x) or not len(seen) else np.float32((seen < x).sum()) / np.float32(len(seen))
                for x in losses
            ],
            dtype=np.float32,
        )


@on
@pytest.mark.parametrize("momentum", [0, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_cache_is_what_a_dict_would_be(momentum, dtype, device):
    r = np.random.default_rng(int(momentum * 100))
    n = 25
    memory, ref = ItemMemory(n, momentum, device), Reference(n, momentum)
    test = torch.tensor([-np.inf, -1, 0, 0.5, 1, 2, 3.3, np.inf, np.nan])
    for step in range(150):
        size = int(r.integers(0, 14))
        items = r.integers(0, n, size)
        losses = r.choice([r.exponential(size=size), r.integers(0, 4, size) - 1.0])
        losses[r.random(size) < 0.2] = r.choice([np.nan, np.inf, -np.inf])
        losses, epoch, trained = torch.tensor(losses, dtype=dtype), step // 3, bool(r.random() < 0.7)
        memory.update(torch.tensor(items, device=device), losses.to(device), epoch=epoch, trained=trained)
        ref.update(items, losses.float().numpy(), epoch, trained)
        got = memory.losses().cpu().numpy()
        np.testing.assert_allclose(got, ref.losses(), rtol=1e-6, atol=1e-7)
        assert memory.times().tolist() == ref.times
        np.testing.assert_array_equal(
            memory.ages(None, epoch + 2).cpu(), [epoch + 2 - ref.d[i][1] if i in ref.d else np.nan for i in range(n)]
        )
        summary, age = memory.summary(epoch + 2), memory.ages(None, epoch + 2).nanmean().item()
        assert summary["seen"] == len(ref.d)
        np.testing.assert_allclose(
            [summary["loss"], summary["age"]], [np.nanmean(got) if ref.d else np.nan, age], rtol=1e-4, atol=1e-5
        )
        for age in (0, 1, 5):
            aged = memory.losses(epoch=epoch + 3, max_age=age).cpu().numpy()
            np.testing.assert_array_equal(np.isnan(aged), np.isnan(ref.losses(epoch + 3, age)))
        ref.d = {i: (got[i], e) for i, (_, e) in ref.d.items()}  # so that rounding does not add up
        np.testing.assert_array_equal(memory.percentile(test.to(device)).cpu(), ref.percentile(test.numpy()))
        np.testing.assert_array_equal(memory.percentile(memory.losses()).cpu(), ref.percentile(got))
    some = torch.tensor([3, 3, 0, 24])
    np.testing.assert_array_equal(memory.losses(some).cpu(), got[some])
    assert memory.times(some).tolist() == [ref.times[i] for i in some]


def test_bits_are_kept():
    "Momentum 0 is the last loss, and any momentum the first one, bit for bit"
    for momentum in (0, 0.9):
        memory = ItemMemory(1, momentum)
        for x in (0.1, 1e-42, 3e38, -0.7):
            x = torch.tensor([x])
            if momentum:
                memory = ItemMemory(1, momentum)
            memory.update([0], x, epoch=0)
            assert torch.equal(memory.losses(), x)


def test_what_overflows_float32_is_not_finite():
    memory = ItemMemory(2)
    memory.update([0, 1], torch.tensor([1e300, 1.0], dtype=torch.float64), epoch=0)
    assert memory.losses().isnan().tolist() == [True, False]


def test_other_forms_of_items_and_losses():
    memory = ItemMemory(5)
    memory.update(np.array([1, 2]), torch.tensor([[1.0], [2.0]], requires_grad=True), epoch=0)
    memory.update([3], [3.0], epoch=0)
    memory.update(torch.tensor([4], dtype=torch.uint8), torch.ones(1, dtype=torch.float16), epoch=0)
    memory.update([], torch.zeros(0), epoch=0)
    assert memory.losses().nan_to_num(-1).tolist() == [-1, 1, 2, 3, 1]
    assert (
        not memory.losses().requires_grad
        and len(memory) == 5
        and repr(memory) == "ItemMemory(n_items=5, momentum=0.5), 4 of them seen"
    )
    memory.losses()[:] = 9  # a copy
    assert memory.losses([1]).tolist() == [1]


def test_epochs_and_times_beyond_int16():
    memory = ItemMemory(2)
    for epoch in (0, 32767, 32768, 65535, 65536, 100000):
        memory.update([0], torch.ones(1), epoch=epoch)
        assert memory.ages([0], epoch + 5).tolist() == [5] and memory.ages([0], epoch + 30000).tolist() == [30000]
    memory = ItemMemory(3)
    memory._times[1] = 32766
    for _ in range(3):
        memory.update([1, 1, 2], torch.ones(3), epoch=0)
    assert memory.times().tolist() == [0, 32767, 3]


class Writes(TorchDispatchMode):
    "Notes where `scatter_` writes"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "scatter_" and args[0].is_floating_point():
            self.at = args[2].tolist()
        return func(*args, **(kwargs or {}))


def test_no_item_is_written_twice():
    "Of several writes to one place a GPU lets any win; the last loss in the batch is to"
    memory, losses = ItemMemory(3, momentum=0), torch.rand(5000)
    items = torch.randint(3, (5000,))
    losses[torch.rand(5000) < 0.1] = torch.nan
    with Writes() as w:
        memory.update(items, losses, epoch=0)
        memory.flush()
    assert sorted(i for i in w.at if i < 3) == [0, 1, 2]
    for i in range(3):
        assert memory.losses([i]) == losses[(items == i) & losses.isfinite()][-1]


def test_twelve_bytes_an_item():
    assert sum(v.nbytes for v in vars(ItemMemory(1000)).values() if isinstance(v, torch.Tensor)) == 12 * 1001


def test_update_reads_nothing_on_the_host():
    "On the meta device there is nothing to read: whatever would wait for a device raises"
    memory = ItemMemory(1000, device="meta")
    memory.update(torch.zeros(64, dtype=torch.long, device="meta"), torch.zeros(64, device="meta"), epoch=3)
    assert memory.percentile(
        memory.losses(torch.zeros(9, dtype=torch.long, device="meta"), epoch=5, max_age=2)
    ).shape == (9,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        repr(memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_does_not_wait_for_the_gpu():
    memory = ItemMemory(1000, device="cuda")
    items, losses = torch.arange(64, device="cuda"), torch.rand(64, device="cuda")
    memory.update(items, losses, epoch=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.update(items, losses, epoch=1)
        memory.percentile(memory.losses(items, epoch=5, max_age=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")


rng = np.random.default_rng(0)
distributions = {
    "exponential": rng.exponential(size=3000),
    "wide": rng.exponential(size=3000) ** 6,
    "normal": rng.normal(size=3000),
    "one": np.array([0.7]),
    "tied": rng.integers(-2, 4, 3000).astype(float),
    "constant": np.full(500, 0.3),
    "zeros": np.array([0.0, -0.0] * 50),
    "tiny": rng.random(500) * 1e-39,
    "huge": rng.normal(size=500) * 1e38,
    "close": 1 + rng.random(2000) * 1e-4,
    "neighbours": np.float32(1) + np.arange(-9, 9) * np.float32(2**-23),
}


@pytest.mark.parametrize("name", distributions)
@of_kind
def test_percentile_within_its_bound(name, kind):
    l = distributions[name].astype(np.float32)
    memory = make_memory(2 * len(l), kind)  # half of them are never seen
    memory.update(torch.randperm(2 * len(l))[: len(l)], torch.tensor(l), epoch=0)
    q = np.concatenate([l, np.nextafter(l, np.float32(9)), [0, -1, np.inf, -np.inf, np.nan]]).astype(np.float32)
    got, want = memory.percentile(torch.tensor(q)).numpy(), np.searchsorted(np.sort(l), q) / len(l)
    assert got[-1] == 1 and got[-2] == 0 and got[-3] == 1
    if kind == "exact":
        np.testing.assert_array_equal(got[:-1], want[:-1].astype(np.float32))
        assert memory.error == 0
        return
    width = np.maximum(np.abs(q[:-3]) * 2.0**-11, 2.0**-137)  # no bin is wider
    near = np.array([(np.abs(l.astype(float) - x) <= w).mean() for x, w in zip(q[:-3].astype(float), width)])
    low = want[:-3] - got[:-3]
    assert (low >= -1e-6).all() and (low <= near + 1e-6).all() and (low <= memory.error + 1e-6).all()
    assert memory.error <= near.max() + 1e-6
    if name in ("tied", "constant", "zeros"):  # a bin of one value makes no error
        np.testing.assert_allclose(got[: len(l)], want[: len(l)], atol=1e-6)
    order = np.argsort(q[:-3], kind="stable")
    assert (np.diff(got[order]) >= 0).all()


@of_kind
def test_percentile_before_and_after_updates(kind):
    memory = make_memory(10, kind)
    q = torch.tensor([1.0, np.nan, -np.inf])
    assert memory.percentile(q).tolist() == [1, 1, 1]  # nothing seen: keep
    assert memory.error == 0
    memory.update([0, 1], torch.tensor([0.5, 2.0]), epoch=0)
    rank = memory._ranked()
    assert memory.percentile(q).tolist() == [0.5, 1, 0] and memory._ranked() is rank  # made once
    memory.update([2, 3], torch.tensor([0.1, 0.2]), epoch=0)
    assert memory.percentile(q.half()).tolist() == [0.75, 1, 0]  # and again


@of_kind
def test_state_goes_on(kind):
    a = make_memory(20, kind)
    a.update(torch.arange(15), torch.rand(15), epoch=2)
    a.update(torch.arange(5), torch.rand(5), epoch=3)
    b = make_memory(20, kind)
    b.update([19], torch.ones(1), epoch=0)
    b.percentile(torch.ones(1))
    state = torch.load(save(a.state_dict()), weights_only=True)
    b.load_state_dict(state)
    for c in (b, pickle.loads(pickle.dumps(a)), copy.deepcopy(a)):
        assert torch.equal(c.times(), a.times())
        for x, y in (
            (c.losses(), a.losses()),
            (c.ages(None, 5), a.ages(None, 5)),
            (c.percentile(torch.rand(9)[:1]), a.percentile(torch.rand(9)[:1] * 0 + 2)),
        ):
            assert x.shape == y.shape and (
                x is None or x.shape != a.losses().shape or torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))
            )
        q = torch.rand(30)
        assert torch.equal(c.percentile(q), a.percentile(q))
    b.update([0], torch.tensor([9.0]), epoch=4)
    assert a.losses([0]) != b.losses([0]) and state["loss"][0] == a.losses([0])[0]  # copies
    c = make_memory(21, kind)
    with pytest.raises(ValueError, match="of 20 items, this one of 21"):
        c.load_state_dict(state)
    assert c.losses().isnan().all() and not c.times().any()


def save(o):
    import io

    f = io.BytesIO()
    torch.save(o, f)
    f.seek(0)
    return f


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: ItemMemory(0), ValueError, "n_items=0"),
        (lambda: ItemMemory(2.5), TypeError, "n_items=2.5"),
        (lambda: ItemMemory(True), TypeError, "n_items=True"),
        (lambda: ItemMemory(3, 1), ValueError, "momentum=1"),
        (lambda: ItemMemory(3, -0.1), ValueError, "momentum=-0.1"),
        (lambda: ItemMemory(3, "a"), TypeError, "momentum='a'"),
        (lambda: ItemMemory(3, math.nan), ValueError, "momentum=nan"),
        (lambda: ItemMemory(3).update([3], torch.ones(1), epoch=0), ValueError, "items holds 3"),
        (lambda: ItemMemory(3).update([-1], torch.ones(1), epoch=0), ValueError, "holds -1"),
        (lambda: ItemMemory(3).update([0.5], torch.ones(1), epoch=0), TypeError, "whole numbers"),
        (lambda: ItemMemory(3).update([True, False, True], torch.ones(3), epoch=0), TypeError, "whole numbers"),
        (lambda: ItemMemory(3).update([0, 1], torch.ones(3), epoch=0), ValueError, "2 items, but 3 losses"),
        (lambda: ItemMemory(3).update([0], torch.ones(1), epoch=-1), ValueError, "epoch=-1"),
        (lambda: ItemMemory(3).update([0], torch.ones(1), epoch=1.5), TypeError, "epoch=1.5"),
        (lambda: ItemMemory(3).losses([7]), ValueError, "items holds 7"),
        (lambda: ItemMemory(3).losses(max_age=1), ValueError, "pass epoch="),
        (lambda: ItemMemory(3).losses(epoch=1, max_age=-1), ValueError, "max_age=-1"),
        (lambda: ItemMemory(3).ages([0], None), TypeError, "epoch=None"),
    ],
)
def test_errors_name_the_argument(call, error, says):
    with pytest.raises(error, match=says):
        call()
