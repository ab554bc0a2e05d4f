"What scores cost and how they agree: the account, the result file, faults. Nothing here looks at how long it took."

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, Learner, set_seed
from fastai.callback.core import Callback
from scipy.stats import rankdata

from fastsb.bench import agreement
from fastsb.bench.agreement import Compare, agreement_table, overlap
from fastsb.data import image_dls
from fastsb.score import Doubtful, Scorer


def images(n=64, size=32, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    return (rng.integers(0, 60, (n, size, size, 3)) + 45 * y[:, None, None, None]).astype(np.uint8), y


def test_overlap_is_that_of_sets():
    torch.manual_seed(0)
    for n in (2, 7, 128):
        a, b = torch.rand(n), torch.rand(n)
        high = [set(np.argsort(-v.numpy())[: n // 2].tolist()) for v in (a, b)]
        assert overlap(a, b) == pytest.approx(len(high[0] & high[1]) / (n // 2))


def test_rows_are_what_they_say():
    "True losses, those of a scorer, and the remembered ones, followed from outside through a small fit"
    set_seed(0)
    x, y = images()
    dls = image_dls(x, y, x, y, bs=16, device="cpu")
    memory, seen = np.full(64, np.nan), []
    watched = Scorer(size=0.5)
    compare = Compare({"half": watched, "doubtful": Doubtful(0.5)}, dict(all=(1, 1)), every=2)

    class Follow(Callback):
        order, run_valid = -4, False  # just after Compare

        def before_batch(self):
            if self.epoch == 1 and self.iter % 2 == 0:
                self.model.eval()
                with torch.no_grad():
                    xb, yb = self.x.as_subclass(torch.Tensor), self.y.as_subclass(torch.Tensor)
                    true = torch.nn.functional.cross_entropy(self.model(xb), yb, reduction="none").numpy()
                self.model.train()
                seen.append((true, memory[compare.items.numpy()].copy()))

        def after_loss(self):
            losses = torch.nn.functional.cross_entropy(
                self.pred.detach().as_subclass(torch.Tensor), self.y.as_subclass(torch.Tensor), reduction="none"
            ).numpy()
            i = compare.items.numpy()
            memory[i] = np.where(np.isnan(memory[i]), losses, (memory[i] + losses) / 2)

    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 4),
    )
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[compare, Follow()])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
    rows = [r for r in compare.rows if r["scorer"] == "remembered"]
    assert len(rows) == len(seen) == 2 and {r["scorer"] for r in compare.rows} == {
        "half",
        "doubtful",
        "remembered",
        "remembered doubt",
        "mirror image",
    }
    for r, (true, known) in zip(rows, seen):
        top = lambda v: set(np.argsort(-v)[:8].tolist())
        assert r["overlap"] == pytest.approx(len(top(true) & top(known)) / 8)
        assert r["spearman"] == pytest.approx(np.corrcoef(rankdata(true), rankdata(known))[0, 1], abs=1e-6)


def test_result_file_and_faults(tmp_path):
    x, y = images(96)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:32], y_test=y[:32])
    small, _ = images(16, 8)
    np.savez(tmp_path / "small.npz", x_train=small, y_train=np.arange(16) % 4, x_test=small, y_test=np.arange(16) % 4)
    run = lambda *a: subprocess.run(
        [sys.executable, "-m", "fastsb.bench", "scorers", *a], capture_output=True, text=True, cwd=tmp_path
    )
    args = "--data d.npz --items 64 --epochs 4 --bs 16 --every 1 --reps 1 --threads 1 --out s.json"
    p = run(*args.split())
    assert p.returncode == 0, p.stderr
    res = json.loads((tmp_path / "s.json").read_text())
    assert res["command"] == f"python -m fastsb.bench scorers {args}" and res["config"]["when"] == dict(
        early=2, midway=3, late=4
    )
    names = set(agreement.scorers_to_compare())
    assert all(set(res["prices"][k]["price"]) == names and res["prices"][k]["step_ms"] > 0 for k in ("fp32", "bf16"))
    free = {"remembered", "remembered doubt", "mirror image"}
    assert {a["scorer"] for a in res["agreement"]} == names | free and all(
        0 <= a["overlap"] <= 1 for a in res["agreement"]
    )
    t = agreement_table(res)
    assert (
        t.index[0] == "model"
        and t.loc["model", "overlap, late"] > 0.8
        and np.isnan(t.loc["remembered", "price (fp32 training)"])
    )
    for args, word in (
        (("--data", "none.npz"), "none.npz"),
        (("--data", "small.npz", "--items", "4"), "items"),
        (("--data", "d.npz", "--epochs", "3"), "epochs"),
        (("--data", "d.npz", "--model", "big"), "model"),
        (("--data", "small.npz", "--items", "16", "--bs", "8"), "32x32"),
    ):
        p = run(*args, "--out", "t.json")
        assert p.returncode == 2 and word in p.stderr and p.stderr.count("\n") == 1, p.stderr
