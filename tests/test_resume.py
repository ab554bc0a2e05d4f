"A fit that was killed goes on bit for bit as one that was not."

import multiprocessing as mp
import os
import signal

import numpy as np
import pytest
import torch
from common import Spy, digits_learner, quiet_fit, weights
from killed_fit import EPOCHS, MODES, Kill, fit, learner, resume, saved

from fastsb.resume import load_plain, save_whole

whole = {}


def uninterrupted(mode, tmp_path_factory):
    if mode not in whole:
        spy = Spy()
        learn = learner(mode, tmp_path_factory.mktemp("whole"))
        fit(learn, cbs=[spy])
        whole[mode] = weights(learn), learn.sb.log, spy.steps, learn.path
    return whole[mode]


@pytest.mark.parametrize("mode", MODES)
def test_resumed_is_as_uninterrupted(mode, tmp_path_factory):
    "After any epoch; weights and the log, but for seconds"
    want, log, steps, path = uninterrupted(mode, tmp_path_factory)
    assert 0 < log.bp.sum() < log.candidates.sum() and steps > 20
    columns = [c for c in log.columns if not c.endswith("_s")]
    for epoch in (0, 2, 4):
        again = resume(mode, path, epoch)
        assert torch.equal(weights(again), want), (mode, epoch)
        assert again.sb.log[columns].equals(log[columns])


def killed(mode, path, batches):
    fit(learner(mode, path), cbs=[Kill(batches)])


@pytest.mark.parametrize("seed", range(20))
def test_killed_by_sigkill(seed, tmp_path_factory):
    "At a random batch, in each mode twice and more"
    mode = list(MODES)[seed % len(MODES)]
    want, _, steps, _ = uninterrupted(mode, tmp_path_factory)
    path = tmp_path_factory.mktemp("killed")
    batch = int(np.random.default_rng(seed).integers(1, steps + 1))
    p = mp.get_context("fork").Process(target=killed, args=(mode, path, batch))
    p.start()
    p.join(120)
    assert p.exitcode == -signal.SIGKILL
    models = path / "models"
    assert not models.exists() or all(load_plain(f) for f in models.glob("*.sb.pth"))  # whole, all of them
    assert torch.equal(weights(resume(mode, path, saved(path))), want), (mode, batch, saved(path))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    f = save_whole(dict(a=torch.ones(3)), tmp_path / "a.pth")

    class Bad:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError):
        save_whole(dict(a=Bad()), f)
    assert load_plain(f)["a"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["a.pth"]


def test_nothing_is_loaded_that_does_not_fit(tmp_path):
    "One sentence each, and nothing has changed: the fit goes on as if it had not been tried"
    a = quiet_fit(digits_learner(n=320, path=tmp_path).selective_backprop(), 4)
    a.sb.save("a")
    state = load_plain(tmp_path / "models" / "a.sb.pth")
    memory = state["sampler"]["memory"]
    other = {
        "of 320 items, this one of 640": (digits_learner(n=640, path=tmp_path).selective_backprop(), state),
        "is of SelectiveBackpropCallback\\(DoubtAbove": (digits_learner(n=320).selective_backprop(beta=1), state),
        "lacks \\['rng'\\]": (
            digits_learner(n=320).selective_backprop(),
            {k: v for k, v in state.items() if k != "rng"},
        ),
        "has a sampler|has no engine": (digits_learner(n=320).selective_backprop(), dict(state, sampler=None)),
        "loss must be a torch.float32 tensor of shape": (
            digits_learner(n=320).selective_backprop(),
            dict(state, sampler=dict(state["sampler"], memory=dict(memory, loss=memory["loss"][:5]))),
        ),
        "less than 0 times": (
            digits_learner(n=320).selective_backprop(),
            dict(state, sampler=dict(state["sampler"], memory=dict(memory, times=-memory["times"]))),
        ),
        "counts": (
            digits_learner(n=320).selective_backprop(),
            dict(state, record=dict(state["record"], counts=dict(candidates=-1, fp=0, bp=0))),
        ),
    }
    for words, (learn, bad) in other.items():
        want = weights(
            quiet_fit(
                digits_learner(n=len(learn.dls.train_ds.x)).selective_backprop(
                    **({"beta": 1} if "DoubtAbove" in words else {})
                ),
                3,
            )
        )
        with pytest.raises(ValueError, match=words if "sampler|" not in words else "saved state has"):
            learn.sb.load_state_dict(bad)
        torch.manual_seed(0)
        fresh = digits_learner(n=len(learn.dls.train_ds.x))
        learn.model.load_state_dict(fresh.model.state_dict())
        learn.dls = fresh.dls
        assert torch.equal(weights(quiet_fit(learn, 3)), want), words
        assert len(learn.sb.log) == 3
    (tmp_path / "models" / "b.sb.pth").write_bytes(b"no state")
    with pytest.raises(ValueError, match="no state that fastsb has saved"):
        a.sb.load("b")
    with pytest.raises(FileNotFoundError, match="no saved state"):
        a.sb.load("c")
    with pytest.raises(ValueError, match="fit first"):
        digits_learner().selective_backprop().sb.state_dict()


def test_a_memory_goes_on_from_fit_to_fit_on_the_same_items_only():
    learn = digits_learner(n=320).selective_backprop()
    quiet_fit(learn, 4)
    memory = learn.sb.sampler.memory
    quiet_fit(learn, 4)
    assert learn.sb.sampler.memory is memory and learn.sb.sampler.past == 4
    assert memory.times().sum() == learn.sb.log.bp.sum()
    learn.dls = digits_learner(n=320).dls
    quiet_fit(learn, 4)
    assert learn.sb.sampler.memory is not memory and learn.sb.log.fit.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_fine_tune_is_quiet_and_ends_whole(capsys):
    learn = digits_learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())]).selective_backprop()
    with learn.no_bar():
        learn.fine_tune(4, 0.1)
    log = learn.sb.log
    assert (
        log.fit.tolist() == [0, 1, 1, 1, 1]
        and (log.selected == 1).tolist() == [True, True, False, False, True]
        and "fastsb" not in capsys.readouterr().out
    )
    assert EPOCHS == 6
