"The engine in loops of one's own: what costs nothing, what does not grow, what is told at once, and processes."
import random
import warnings

import numpy as np
import pytest
import torch
from common import digits, digits_model, everything, same
from test_invariants import Counter
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader, TensorDataset

from fastsb.buffer import BatchBuffer
from fastsb.engine import Choice, SelectiveBackprop, fixed_count
from fastsb.record import Record, Stopwatch
from fastsb.score import Modules, Proxy, Scorer, scoring
from fastsb.select import GradNorm, InfoBatch, LossShare, Percentile, TopK


def engine(bs=32, model=None, **kwargs):
    return SelectiveBackprop(model or digits_model(), nn.CrossEntropyLoss(), bs, **{"start": 0, **kwargs})


# what it costs -------------------------------------------------------------------------------------
def test_record_and_buffer_cost_a_batch_four_operations():
    "Besides history and selector: two passes over rows (inputs, targets), one copy of a loss a step; nothing to add up"
    x, y = digits(64)
    sb = engine(64)
    for _ in range(4):
        sb.offer((x, y))
    losses, pred, yb = sb._score((x, y))
    with Counter() as c:
        sb.record.scored(losses)
    assert c.ops <= 1  # detach: a view
    with Counter() as c:
        sb.trained(losses.mean(), 64)
    assert c.ops <= 4  # mean, detach, clone
    s = sb._choose(losses, pred, yb, None)
    with Counter() as c:
        sb._keep((x, y), s, 64)
    assert c.ops <= 8  # two `index_select`, and views of the places in the batch
    assert c.waiting == []


def test_nothing_grows_with_the_number_of_batches():
    import pickle

    def size(n):
        x, y = digits(16)
        sb = engine(16, nn.Linear(64, 10), record=Record(limit=64))
        for _ in range(n):
            for _ in sb.offer((x, y)):
                sb.trained(torch.tensor(1.0), 16)
        return len(pickle.dumps({k: v for k, v in vars(sb.record).items() if k != "clock"})), sb

    few, _ = size(2 * Record.every)
    many, sb = size(8 * Record.every)
    assert many < 1.1 * few and len(sb.record.points) <= 64 and sb.end_epoch()["candidates"] == 16 * 8 * Record.every


def test_events_of_a_long_epoch_are_read_as_the_device_passes_them(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            made.append(self)

        def record(self, stream):
            self.t = len(made)

        def query(self):
            return self.t < len(made) - 20  # the device is twenty events behind

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            return 1000.0 * (other.t - self.t)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: None)
    w, gpu = Stopwatch(), torch.device("cuda")
    for _ in range(5 * Stopwatch.limit):
        w.start("a", gpu)
        w.stop("a")
    assert len(w._events) < 2 * Stopwatch.limit and not any(hasattr(e, "waited") for e in made)
    assert w.read() == {"a": 5.0 * Stopwatch.limit} and w.read() == {}


def test_the_record_is_that_of_all_batches():
    "Two engines and a sampler may write into one record; sums are those of NumPy"
    x, y = digits(96)
    record = Record()
    a, b = (engine(record=record, seed=0) for _ in range(2))
    losses = []
    for sb in (a, b):
        for i in range(3):
            batch = x[32 * i : 32 * i + 32], y[32 * i : 32 * i + 32]
            losses.append(sb.score(batch).numpy())
            sb.offer(batch)
    row = a.end_epoch()
    assert row["candidates"] == 192 and a.log is b.log is record.log and b.epoch == 1 and b.counts["fp"] == 192
    assert row["candidate_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    top = sum(np.sort(o)[::-1][:7].sum() for o in losses)
    assert row["top_share"] == pytest.approx(top / np.sum(losses), rel=1e-5)


# scoring -------------------------------------------------------------------------------------------
class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.5))
        self.b = nn.Linear(8, 10)

    def forward(self, x):
        return self.b(self.a(x))


def test_modules_are_walked_once_and_changes_are_noticed(monkeypatch):
    walks, real = [], nn.Module.modules
    monkeypatch.setattr(nn.Module, "modules", lambda self: walks.append(self) or real(self))
    model, known = Twice(), Modules()
    for _ in range(3):
        assert known.of(model) == [*real(model)]
    assert len(walks) == 1
    model.a.append(nn.Dropout(0.9))  # added deep inside
    assert known.of(model) == [*real(model)]
    model.a[0] = nn.Linear(64, 8)  # replaced
    assert known.of(model) == [*real(model)]
    del model.a[1]  # taken away
    assert known.of(model) == [*real(model)]
    other = Twice()
    assert known.of(other) == [*real(other)] and len(walks) == 5


def test_flags_may_change_between_passes_and_what_is_added_is_scored_in_eval_mode():
    x, y = digits(32)
    model = Twice()
    sb = engine(model=model)
    first = sb.score((x, y))
    model.a.append(nn.Dropout(0.99))
    torch.testing.assert_close(sb.score((x, y)), first)  # the new one is off too
    model.a[1].eval()
    model.b.weight.requires_grad_(False)
    before = everything(model)
    sb.score((x, y))
    assert same(before, everything(model)) and not model.a[1].training and model.a[2].training


def test_scripted_modules_keep_their_flags():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Sequential(nn.Linear(64, 10), nn.Dropout(0.5)))
    x, y = digits(32)
    sb = engine(model=model)
    assert torch.equal(sb.score((x, y)), sb.score((x, y)))
    assert model.training and all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_draws_on_any_device_leave_no_trace(kind, monkeypatch):
    "An Apple or Intel GPU, imitated: the state of its random numbers is read before and set after, for it alone"
    calls = []

    class Module:
        @staticmethod
        def get_rng_state(*device):
            calls.append(("get", *device))
            return "state"

        @staticmethod
        def set_rng_state(state, *device):
            calls.append(("set", state, *device))

    monkeypatch.setattr(torch, kind, Module)
    device = torch.device(kind)
    monkeypatch.setattr("fastsb.score._cast", lambda *args: torch.no_grad())
    with pytest.raises(ZeroDivisionError):
        with scoring(nn.Linear(2, 2), device):
            raise ZeroDivisionError
    which = () if kind == "mps" else (device,)
    assert calls == [("get", *which), ("set", "state", *which)]


def test_a_first_batch_that_is_tried_compiles_nothing():
    "Two rows would give a compiled model dynamic shapes for good"
    whole = lambda m, c: torch.compile(m, backend=c)
    part = lambda m, c: nn.Sequential(torch.compile(m, backend=c), nn.Identity())
    for compiled in (whole, part):
        torch._dynamo.reset()
        counter = CompileCounter()
        x, y = digits(64)
        Scorer(precision="bf16").check((x, y), compiled(digits_model(), counter), nn.CrossEntropyLoss(), n_inp=1)
        Scorer().check((x, y), compiled(digits_model(), counter), nn.CrossEntropyLoss())
        assert counter.frame_count == 0
    torch._dynamo.reset()


class Reshapes(nn.Module):
    "Knows batches of 16 rows only"

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(64, 10)

    def forward(self, x):
        return self.l(x.view(16, 64))


def test_a_model_that_cannot_do_two_rows_is_tried_on_all():
    x, y = digits(32)
    assert len(list(engine(16, Reshapes()).batches([(x[:16], y[:16]), (x[16:], y[16:])]))) == 1
    with pytest.raises(ValueError, match="cannot score these batches: RuntimeError"):
        engine(16, Reshapes()).offer((x, y))


class Fixed(nn.Module):
    reduction = property(lambda self: "mean")

    def forward(self, p, y):
        return nn.functional.cross_entropy(p, y)


@pytest.mark.parametrize("kw,words", [
    (dict(loss_func=lambda p, y: nn.functional.cross_entropy(p, y)), "per_item="),
    (dict(forward=lambda m, b: (m(b[0]), b[1])), "targets in a tuple"),
    (dict(forward=lambda m, b: m(b[0])), "targets in a tuple"), (dict(loss_func=Fixed()), "reduction"),
    (dict(model=nn.Linear(3, 10)), "cannot score these batches"),
], ids=["unsplit", "no tuple", "no targets", "no setter", "other model"])
@pytest.mark.parametrize("n", [1, 2, 32])
def test_mistakes_are_told_on_the_first_batch_in_one_sentence(kw, words, n):
    x, y = digits(96)
    torch.manual_seed(0)
    sb = SelectiveBackprop(**{"model": digits_model(), "loss_func": nn.CrossEntropyLoss(), **kw}, bs=32, start=1)
    with pytest.raises((TypeError, ValueError), match=words):
        for _ in sb.batches(DataLoader(TensorDataset(x, y), n)):
            raise AssertionError("a batch was trained on")
    assert sb.log == [] and sb.counts["candidates"] == 0


def test_batches_of_one_row():
    x, y = digits(6)
    for kw in (dict(), dict(start=3), dict(score=Proxy(nn.Linear(64, 10), every=1))):
        sb = engine(2, nn.Linear(64, 10), **kw)
        assert sum(len(b[1]) for b in sb.batches(DataLoader(TensorDataset(x, y), 1))) == 6


# processes -----------------------------------------------------------------------------------------
@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 0)


@pytest.mark.parametrize("how", ["offer", "batches"])
@pytest.mark.parametrize("kw,fine", [
    (dict(), True), (dict(beta=0, exact=False), True), (dict(selector=TopK(0.5)), True),
    (dict(exact=False), False), (dict(selector=GradNorm()), False), (dict(selector=InfoBatch()), False),
    (dict(selector=LossShare()), False)], ids=str)
def test_counts_that_differ_from_rank_to_rank_are_refused(how, kw, fine, two_processes):
    batch = digits(32)
    sb = engine(**kw)
    run = (lambda: sb.offer(batch)) if how == "offer" else (lambda: list(sb.batches([batch])))
    if fine:
        run()
        assert sb.counts["candidates"] == 32
    else:
        with pytest.raises(ValueError, match="exact=True"):
            run()
        assert sb.counts["candidates"] == 0 and len(sb.history) == 0
    assert fixed_count(sb.selector) == fine


def test_no_process_prunes_by_itself(two_processes):
    y = torch.zeros(8, 1)
    sb = SelectiveBackprop(nn.AdaptiveAvgPool1d(1), nn.MSELoss(), 32, start=0)
    sb.offer((torch.rand(8, 5), y))
    with pytest.raises(ValueError, match="batching='prune'"):
        sb.offer((torch.rand(8, 6), y))
    assert sb.batching == "accumulate" and len(sb.buffer) == 4


# arguments -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kw,words", [
    (dict(epochs=0), "epochs=0"), (dict(epochs=1.5), "epochs=1.5"), (dict(n_items=0), "n_items=0"),
    (dict(record=[]), "record="), (dict(start=0.1), "epochs="), (dict(start=0.5, end=0.4, epochs=9), "end=0.4"),
    (dict(start=-1), "start=-1"), (dict(interrupt=1), "interrupt=1"), (dict(rescale="max"), "rescale='max'"),
    (dict(forward=3), "forward=3"), (dict(loss_func=None), "loss_func=None"), (dict(model=3), "model=3")], ids=str)
def test_wrong_arguments(kw, words):
    with pytest.raises((TypeError, ValueError), match=words):
        SelectiveBackprop(**{"model": nn.Linear(2, 2), "loss_func": nn.MSELoss(), "bs": 8, **kw})


def test_a_choice_checks_itself():
    c = Choice(beta=3, exact=False, seed=1, rescale="sum")
    assert isinstance(c.selector, Percentile) and c.weighted and c.selector.beta == 3 and c.scorer.own
    function = lambda m, b: b[1]
    weighs = dict(selector=GradNorm())
    for kw in (dict(selector=TopK(0.5), beta=2), dict(weighs, rescale="sum"), dict(weighs, score=function)):
        with pytest.raises(ValueError):
            Choice(**kw)


def test_shares_of_the_fit():
    batches = [digits(32)] * 4
    sb = engine(start=0.25, end=0.75, epochs=4)
    for _ in range(4):
        list(sb.batches(batches))
    assert [r["fp"] for r in sb.log] == [0, 128, 128, 0]
    sb = engine(start=0.125, end=None, epochs=2)
    list(sb.batches(batches))
    assert sb.log[0]["fp"] == 96  # begins within the epoch


# moves ---------------------------------------------------------------------------------------------
def test_a_proxy_that_is_moved_brings_its_optimiser_along(monkeypatch):
    "Its optimiser goes on from the same state, beside the parameters where they are now"
    x, y = digits(32)
    proxy = Proxy(nn.Linear(64, 10), every=1)
    sb = engine(score=proxy, model=nn.Linear(64, 10))
    for _ in range(4):
        sb.offer((x, y))
    steps = proxy.opt.state_dict()["state"][0]["step"]
    monkeypatch.setattr(proxy.model, "to", lambda device: proxy.model.double())
    proxy._to(torch.device("meta"))
    state = proxy.opt.state_dict()["state"][0]
    assert state["step"] == steps and state["exp_avg"].dtype == torch.float64


def test_rows_of_a_saved_buffer_follow_to_where_the_next_ones_are():
    "A device that is not here is imitated by another layout: the rows that waited are laid out as those that come"
    a, b = BatchBuffer(4), BatchBuffer(4)
    a.put(torch.arange(6.0).view(2, 3, 1, 1))
    b.load_state_dict(a.state_dict())
    (full,) = b.put(torch.arange(6.0, 12.0).view(2, 3, 1, 1).to(memory_format=torch.channels_last))
    assert torch.equal(full.flatten(), torch.arange(12.0)) and full.stride()[1:] == (1, 3, 3)


def test_python_and_numpy_draws_of_a_loop_go_on():
    x, y = digits(32)
    sb = engine(score=lambda m, b: torch.rand(32) + np.random.rand() + random.random())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    sb.offer((x, y))
    got = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert got == (random.random(), np.random.rand(), torch.rand(1).item())


def test_what_waits_at_the_end_of_an_epoch_is_trained_in_the_next():
    "Each row that was kept comes once, in the order in which it was kept"
    x, y = torch.arange(300.0)[:, None], torch.zeros(300, dtype=torch.long)
    data = [(x[i : i + 30], y[i : i + 30]) for i in range(0, 150, 30)]
    score = lambda m, b: b[0][:, 0]  # the last 15 of each 30 rows are kept
    sb = SelectiveBackprop(nn.Linear(1, 2), nn.CrossEntropyLoss(), 32, start=0, selector=TopK(0.5), score=score)
    kept = [float(i) for i in range(150) if i % 30 >= 15]
    got = []
    for epoch in range(3):
        got += [v for xb, _ in sb.batches(data) for v in xb[:, 0].tolist()]
        want = kept * (epoch + 1)
        assert got == want[: len(want) // 32 * 32] and sb.log[-1]["left"] == len(want) % 32
