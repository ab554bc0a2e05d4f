"The buffer against a Python list of examples: any structure, layout and choice, saved and resumed at any time."
import io
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, fields, is_dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsb.buffer import BatchBuffer, leaves, n_rows, rebuild, take

given_few = settings(derandomize=True, suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=200)
Pair = namedtuple("Pair", "first second")


@dataclass
class Sample:
    first: object
    second: object


# Containers have two parts, and no batch has two rows: then a list of two things would be names of its rows.
# A structure is a nested list of what it is made of; in a batch that `make` builds of it each column carries the ids.
COLUMNS = ("vector", "matrix", "image", "channels_last", "one_channel", "transposed", "int8", "bool", "strings",
           "tuple", "objects", "array", "sparse")
WHOLE = (None, "text", 3, 2.5, True, b"bytes")
containers = st.sampled_from(["list", "tuple", "dict", "ordered", "default", "user", "named", "dataclass"])
column = st.sampled_from(COLUMNS).map(lambda c: ("column", c))
whole = st.sampled_from(WHOLE).map(lambda w: ("whole", w))
two_of = lambda kids: st.tuples(containers, st.lists(kids, min_size=2, max_size=2))
structures = st.recursive(column | whole, two_of, max_leaves=6)
batches = structures.map(lambda s: ("list", [("column", "vector"), s]))  # one tensor at least


def make_column(kind, ids):
    x = torch.tensor(ids, dtype=torch.float32)
    grow = x[:, None, None, None] + torch.arange(24.0).view(2, 3, 4) / 100
    return {
        "vector": lambda: x, "matrix": lambda: x[:, None] + torch.arange(3), "image": lambda: grow,
        "channels_last": lambda: grow.to(memory_format=torch.channels_last),
        "one_channel": lambda: grow[:, :1].contiguous().to(memory_format=torch.channels_last),
        "transposed": lambda: grow.transpose(1, 3), "int8": lambda: (x % 100).to(torch.int8),
        "bool": lambda: x % 2 == 0, "strings": lambda: [f"{i}.png" for i in ids],
        "tuple": lambda: tuple(ids), "objects": lambda: [{"id": i} for i in ids], "array": lambda: np.array(ids),
        "sparse": lambda: torch.sparse_coo_tensor(torch.arange(len(x))[None], x + 1, (len(x),), check_invariants=False),
    }[kind]()


def make(structure, ids):
    kind, what = structure
    if kind == "column":
        return make_column(what, ids)
    if kind == "whole":
        return what
    a, b = (make(s, ids) for s in what)
    named = dict(a=a, b=b)
    made = dict(list=[a, b], tuple=(a, b), dict=named, ordered=OrderedDict(named), default=defaultdict(list, named),
                user=UserDict(named), named=Pair(a, b), dataclass=Sample(a, b))
    return made[kind]


def same(a, b):
    "Are two batches equal in structure, types, values and, for tensors, in the way their rows lie in memory?"
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.is_sparse:
            return torch.equal(a.to_dense(), b.to_dense())
        return a.dtype == b.dtype and torch.equal(a, b) and a.stride()[1:] == b.stride()[1:]
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def through_a_file(state):
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return torch.load(f, weights_only=True)


rows = st.integers(1, 9).filter(lambda n: n != 2)
steps = st.lists(st.tuples(rows, st.floats(0, 1), st.sampled_from(["put", "all", "resume"])), min_size=1, max_size=12)


@given_few
@given(batches, st.integers(1, 9), steps, st.integers(0, 10**6))
def test_as_a_list_of_examples(structure, bs, steps, seed):
    "First in, first out; full batches only; each as one built from the very examples; also if saved at any time"
    draw, buf, waiting, count = torch.Generator().manual_seed(seed), BatchBuffer(bs), [], 0
    for n, share, how in steps:
        if how == "resume":
            old, buf = buf, BatchBuffer(bs)
            buf.load_state_dict(through_a_file(old.state_dict()))
        ids = list(range(count, count + n))
        count += n
        idx = None if how == "all" else torch.randperm(n, generator=draw)[: round(share * n)]
        batch = make(structure, ids)
        waiting += ids if idx is None else [ids[i] for i in idx.tolist()]
        for got in buf.put(batch, idx):
            want, waiting = waiting[:bs], waiting[bs:]
            assert same(got, make(structure, want))
        assert same(batch, make(structure, ids))  # what is offered stays as it was
        assert len(buf) == len(waiting) < bs
    rest = buf.rest()
    assert (rest is None) == (not waiting)
    assert rest is None or same(rest, make(structure, waiting))
    assert len(buf) == 0


@given_few
@given(batches, rows, st.data())
def test_take_is_a_batch_of_the_very_examples(structure, n, data):
    ids = list(range(n))
    batch = make(structure, ids)
    assert n_rows(batch) == n
    idx = data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n))
    assert same(take(batch, torch.tensor(idx, dtype=torch.long)), make(structure, idx))
    assert same(take(batch, slice(2)), make(structure, ids[:2]))


@given_few
@given(batches, st.integers(2, 9))
def test_leaves_and_rebuild_are_inverse(structure, n):
    batch = make(structure, list(range(n)))
    assert same(rebuild(batch, (t for _, t in leaves(batch))), batch)
    doubled = rebuild(batch, (t.float() * 2 for _, t in leaves(batch)))
    for (_, a), (_, b) in zip(leaves(batch), leaves(doubled)):
        assert torch.equal(2 * a.to_dense().float(), b.to_dense())


@given_few
@given(batches, rows.map(lambda n: n + 1), st.sampled_from(["shape", "dtype", "structure"]), st.booleans())
def test_rows_that_do_not_fit_change_nothing(structure, bs, how, saved):
    "Neither in a buffer in which rows wait, nor in one that was resumed"
    buf = BatchBuffer(bs)
    buf.put(make(structure, [0]))
    if saved:
        state, buf = through_a_file(buf.state_dict()), BatchBuffer(bs)
        buf.load_state_dict(state)
    first, other = make(structure, [1, 2, 3])
    first = dict(shape=torch.zeros(3, 5), dtype=torch.zeros(3).long(), structure=[torch.zeros(3), torch.zeros(3)])[how]
    before = str(buf.state_dict())
    try:
        buf.put([first, other])
    except ValueError as e:
        assert "batch[0]" in str(e) or "structure" in str(e)
    else:
        raise AssertionError("rows of another kind were taken")
    assert str(buf.state_dict()) == before and len(buf) == 1
    assert same(buf.put(make(structure, list(range(1, bs))))[0], make(structure, list(range(bs))))
