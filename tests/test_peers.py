"Other packages' rules: each against its definition, the result file, faults. Nothing here looks at how long it took."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsb.bench import peers


def batch(n, seed=0):
    torch.manual_seed(seed)
    return torch.empty(n).exponential_(), torch.randn(n, 3, 8, 8), torch.arange(n)


def test_the_loop_is_the_papers_definition():
    "Percentiles over the last R losses, those of the batch among them; the same coins"
    loop, rng, recent = peers.Loop(beta=2.0, size=100, seed=3), np.random.default_rng(3), np.zeros(0)
    for i in range(5):
        losses, x, y = batch(40, i)
        recent = np.concatenate([recent, losses.numpy()])[-100:]
        want = [j for j, v in enumerate(losses.numpy()) if rng.random() < np.mean(recent < v) ** 2]
        xs, ys = loop(losses, x, y)
        assert ys.tolist() == want and torch.equal(xs, x[want])


def test_composers_rule_draws_a_fixed_number_by_rank():
    rule, counts = peers.ComposerRule(keep=0.25, seed=0), np.zeros(8)
    losses, x, y = batch(8)
    for _ in range(3000):
        xs, ys = rule(losses, x, y)
        assert len(ys) == 2 == len(set(ys.tolist())) and torch.equal(xs, x[ys])
        counts[ys.numpy()] += 1
    p = (np.arange(8) / 8) ** 3
    p = (p / p.sum())[losses.argsort().argsort()]  # of the first draw; the second is from those that are left
    incl = p + [sum(p[j] * p[i] / (1 - p[j]) for j in range(8) if j != i) for i in range(8)]
    np.testing.assert_allclose(counts / 3000, incl, atol=0.04)


def test_tsais_rule_stops_before_the_share_is_reached():
    losses, x, y = torch.tensor([1.0, 5.0, 2.0, 2.0]), torch.randn(4, 3), torch.arange(4)
    assert peers.TsaiRule(0.9)(losses, x, y)[1].tolist()[0] == 1 and len(peers.TsaiRule(0.9)(losses, x, y)[1]) == 3
    assert peers.TsaiRule(0.1)(losses, x, y)[1].tolist() == [1]


@pytest.mark.parametrize(
    "name", ["fastsb, Percentile", "fastsb, Percentile, exact", "fastsb, TopK", "fastsb, LossShare"]
)
def test_ours_keeps_rows_and_targets_together(name):
    f, (losses, x, y) = peers.rules()[name], batch(64)
    for _ in range(3):
        xs, ys = f(losses, x, y)
        assert torch.equal(xs, x[ys]) and 0 < len(ys) < 64 and losses[ys].mean() > losses.mean()


def test_the_committed_result_is_what_is_claimed():
    res = json.loads((Path(__file__).parent.parent / "nbs" / "results" / "peers.json").read_text())
    ms = {r["rows"]: {k: v["median"] for k, v in r["ms"].items()} for r in res["runs"]}
    assert list(ms) == [128, 1024, 8192] and res["machine"]["threads"] == 1
    for rows, m in ms.items():
        ours = m["fastsb, Percentile"]
        assert (
            max(ours, m["fastsb, Percentile, exact"]) < m["Composer's rule"]
            and m["loop (reference)"] >= (40 if rows == 128 else 100) * ours
        )
        assert m["fastsb, LossShare"] <= m["tsai's rule"]


def test_result_file_and_faults(tmp_path):
    run = lambda *a: subprocess.run(
        [sys.executable, "-m", "fastsb.bench", "peers", *a], capture_output=True, text=True, cwd=tmp_path
    )
    p = run("--sizes", "8,16", "--reps", "3", "--out", "p.json")
    assert p.returncode == 0, p.stderr
    res = json.loads((tmp_path / "p.json").read_text())
    assert (
        res["command"] == "python -m fastsb.bench peers --sizes 8,16 --reps 3 --out p.json"
        and res["machine"]["threads"] == 1
    )
    assert [r["rows"] for r in res["runs"]] == [8, 16] and all(set(r["ms"]) == set(peers.rules()) for r in res["runs"])
    assert all(0 < v["iqr"][0] <= v["median"] <= v["iqr"][1] for r in res["runs"] for v in r["ms"].values())
    t = peers.peers_table(res, "fastsb, TopK")
    assert t.loc["fastsb, TopK"].tolist() == [1.0, 1.0] and list(t.columns) == ["8 rows", "16 rows"]
    for args, word in (
        (("--sizes", "8,x"), "sizes"),
        (("--sizes", "1"), "sizes"),
        (("--reps", "0"), "reps"),
        (("--out", "none/p.json"), "out"),
    ):
        p = run(*args)
        assert p.returncode == 2 and word in p.stderr and p.stderr.count("\n") == 1
