"The benchmark command: its result file, its faults, its accounts. Nothing here looks at how long anything took."

import gc
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsb.bench import command, overhead
from fastsb.bench import epoch as epochs

root = Path(__file__).parent.parent
PARTS = {
    "beta",
    "exact",
    "batching",
    "select",
    "gather",
    "rest",
    "kept",
    "cycle",
    "expected",
    "select_share",
    "cycle_ratio",
}


def run(*args, cwd=None):
    return subprocess.run([sys.executable, "-m", "fastsb.bench", *args], capture_output=True, text=True, cwd=cwd)


def check_result(res, bs, names):
    "A result file has all its parts, its figures are positive, and its ratios follow from its medians"
    assert res["command"].startswith("python -m fastsb.bench overhead")
    assert set(res["versions"]) == {"fastsb", "torch", "fastai", "python"} and all(res["versions"].values())
    assert {"cpu", "cores", "threads", "platform", "load_before", "malloc", "device"} == set(res["machine"])
    assert res["date"].count("-") == 2
    assert (res["config"]["bs"], res["config"]["models"]) == (bs, names)
    assert [(r["model"], r["precision"]) for r in res["runs"]] == [(n, p) for n in names for p in ("fp32", "bf16")]
    for r in res["runs"]:
        assert r["score_share"] == pytest.approx(r["score"]["median"] / r["train"]["median"], abs=1e-3)
        assert [(v["beta"], v["exact"], v["batching"]) for v in r["variants"]] == [
            tuple(v.values()) for v in overhead.variants
        ]
        for v in r["variants"]:
            assert set(v) == PARTS and 0 < v["kept"] <= 1
            assert v["select_share"] == pytest.approx(
                (v["select"]["median"] + v["gather"]["median"]) / r["train"]["median"], abs=1e-4
            )
            assert v["cycle_ratio"] == pytest.approx(v["cycle"]["median"] / v["expected"]["median"], abs=1e-3)
        for q in [
            r["train"],
            r["score"],
            *(v[k] for v in r["variants"] for k in ("select", "gather", "cycle", "expected")),
        ]:
            lo, hi = q["iqr"]
            assert 0 < lo <= q["median"] <= hi
    for r in res["runs"][::2]:
        m = r["memory"]
        assert m["batch"] == bs * (3 * 32 * 32 * 4 + 8) and m["allowed"] == 2 * m["batch"] + 64 * 1024
        assert len(m["variants"]) == len(overhead.variants)
        for v in m["variants"]:
            assert v["extra"] == v["peak"] - m["plain_peak"] and v["extra_batches"] == pytest.approx(
                v["extra"] / m["batch"], abs=1e-3
            )


def test_command_writes_a_result(tmp_path):
    p = run(
        "overhead", "--device", "cpu", "--bs", "4", "--reps", "1", "--threads", "1", "--out", "o.json", cwd=tmp_path
    )
    assert p.returncode == 0, p.stderr
    assert "selection" in p.stdout and "Wrote o.json" in p.stdout
    res = json.loads((tmp_path / "o.json").read_text())
    check_result(res, 4, ["small"])
    assert res["command"] == "python -m fastsb.bench overhead --device cpu --bs 4 --reps 1 --threads 1 --out o.json"
    assert res["machine"]["threads"] == 1 and res["config"]["reps"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["o.json"]
    assert len(overhead.overhead_table(res)) == 2 * len(overhead.variants) and len(overhead.memory_table(res)) == len(
        overhead.variants
    )
    ax = overhead.plot_overhead(res)
    run0 = res["runs"][0]
    ends = [
        max(b.get_x() + b.get_width() for b in ax.patches if round(b.get_y() + b.get_height() / 2) == i)
        for i in range(1 + len(overhead.variants))
    ]
    v = run0["variants"][0]
    assert ends[0] == pytest.approx(run0["train"]["median"])
    assert ends[1] == pytest.approx(
        run0["score"]["median"] + v["select"]["median"] + v["gather"]["median"] + v["kept"] * run0["train"]["median"]
    )
    with pytest.raises(ValueError, match="no resnet18 in fp32"):
        overhead.plot_overhead(res, model="resnet18")


def test_committed_result():
    text = (root / "nbs" / "results" / "overhead.json").read_text()
    res = json.loads(text)
    check_result(res, 128, res["config"]["models"])
    assert res["config"]["models"][0] == "small" and res["config"]["reps"] >= 10
    for v in res["runs"][0]["variants"]:
        assert v["select"]["median"] + v["gather"]["median"] <= 0.03 * res["runs"][0]["train"]["median"]
    for v in (v for r in res["runs"] for v in r["variants"] if v["batching"] == "accumulate"):
        assert v["cycle_ratio"] <= 1.05
    for r in res["runs"][::2]:
        assert max(v["extra"] for v in r["memory"]["variants"]) <= r["memory"]["allowed"]
    assert "/home" not in text and "/tmp" not in text


@pytest.mark.parametrize(
    "args,says",
    [
        ([], "a command is missing; choose from advice, beyond, cache"),
        (["speed"], "no command 'speed'"),
        (["overhead", "--fast"], "--fast"),
        (["overhead", "extra"], "extra"),
        (["overhead", "--bs", "many"], "'many'"),
        (["overhead", "--bs", "1"], "bs must be a whole number of at least 2, not 1"),
        (["overhead", "--reps", "0"], "reps must be a whole number of at least 1, not 0"),
        (["overhead", "--reps", "1.5"], "'1.5'"),
        (["overhead", "--threads", "-1"], "threads must be"),
        (["overhead", "--model", "vgg"], "model must be one of small, resnet18"),
        (["overhead", "--device", "tpu"], "device must be cpu or cuda, not 'tpu'"),
        (["overhead", "--device", "cuda:99"], "cuda:99"),
        (["overhead", "--out", "no/such/folder.json"], "no folder 'no/such'"),
        (["overhead", "--out", "."], "is a folder"),
    ],
)
def test_faults(args, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        command.main(args)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert says in err and err.startswith("fastsb.bench: ") and err.count("\n") == 1 and err.endswith(".\n")
    assert not list(tmp_path.iterdir())


def test_fault_from_the_shell(tmp_path):
    p = run("overhead", "--reps", "none", cwd=tmp_path)
    assert p.returncode == 2 and p.stdout == "" and p.stderr.count("\n") == 1 and "none" in p.stderr


def test_faults_from_python_are_exceptions(tmp_path):
    with pytest.raises(ValueError, match="reps"):
        overhead.overhead(reps=True, out=tmp_path / "o.json")


def test_help(capsys):
    command.main(["--help"])
    assert "overhead" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        command.main(["overhead", "--help"])
    assert e.value.code == 0 and "--threads" in capsys.readouterr().out


def test_peak_bytes_of_known_work():
    n = 100_000

    def work():
        x = torch.ones(n, requires_grad=True)  # 1
        a = x.exp()  # 2: kept for the backward pass
        b = a.exp()  # 3
        b.sum().backward()  # 5 at most: the gradients of b and of a. And a few bytes for the sum and its gradient
        return x.grad

    assert 5 * n * 4 <= overhead.peak_bytes(work) <= 5 * n * 4 + 64


def test_peak_bytes_of_random_work():
    "Allocations and releases in random order, against a count of our own"
    rng = random.Random(0)
    peaks = []
    old = [
        torch.empty(rng.randrange(1, 5000), dtype=torch.uint8) for _ in range(20)
    ]  # neither they nor their release count

    def work():
        held, now, peak = [], 0, 0
        for i in range(300):
            if held and rng.random() < 0.45:
                now -= len(held.pop(rng.randrange(len(held))))
            else:
                held.append(torch.empty(rng.randrange(1, 5000), dtype=torch.uint8))
                now += len(held[-1])
            if i % 10 == 0 and old:
                old.pop()
            if held:
                held[0][:5].view(-1)  # a view holds nothing of its own
            peak = max(peak, now)
        left.extend(held)  # outlives the account, and is released where nobody counts
        peaks.append(peak)

    for _ in range(3):
        left = []
        assert overhead.peak_bytes(work) == peaks[-1]
        left.clear()


def test_the_peak_is_not_what_remains():
    def work():
        for _ in range(3):
            torch.empty(1_000_000, dtype=torch.uint8)
        torch.empty(10, dtype=torch.uint8)

    assert overhead.peak_bytes(work) == 1_000_000


@pytest.mark.parametrize("collect", [True, False], ids=["collected", "with garbage"])
def test_memory_beyond_a_plain_fit(collect):
    "At most two batches and 64 KiB; also if Python never collects garbage, so the callback leaves none"
    bs = 32
    allowed = 2 * bs * (3 * 32 * 32 * 4 + 8) + 64 * 1024
    plain = overhead.fit_peak_bytes(bs=bs, collect=collect)
    assert plain == overhead.fit_peak_bytes(bs=bs, collect=collect) > bs * 3 * 32 * 32 * 4
    extra = [
        overhead.fit_peak_bytes(bs=bs, collect=collect, **kw) - plain for kw in (dict(seed=2), dict(exact=True, beta=2))
    ]
    assert max(extra) <= allowed
    if collect:
        assert max(extra) > bs * 3 * 32 * 32 * 4  # it does see the batches that are held
    assert gc.isenabled()


def test_memory_account_sees_a_hoarder():
    "The account would notice a callback that keeps batches"
    from fastsb.callback import SelectiveBackpropCallback as SB

    bs, hoard, before_batch = 32, [], SB.before_batch

    def keep(self):
        hoard.append(self.learn.xb[0].clone())
        before_batch(self)

    plain = overhead.fit_peak_bytes(bs=bs)
    SB.before_batch = keep
    try:
        extra = overhead.fit_peak_bytes(bs=bs, exact=True) - plain
    finally:
        SB.before_batch = before_batch
    assert len(hoard) == 6 and extra > 5 * bs * 3 * 32 * 32 * 4 > 2 * bs * (3 * 32 * 32 * 4 + 8) + 64 * 1024


def test_epoch(tmp_path, capsys):
    out = tmp_path / "e.json"
    command.main(["epoch", "--dataset", "digits", "--items", "330", "--bs", "32", "--rounds", "1", "--out", str(out)])
    res = json.loads(out.read_text())
    assert [r["workers"] for r in res["runs"]] == [0, 2]
    for r in res["runs"]:
        m = {o["method"]: o for o in r["methods"]}
        assert list(m) == list(epochs.epoch_methods) and all(
            o["lowest"] <= o["seconds"] <= o["highest"] and o["seconds"] > 0 for o in m.values()
        )
        assert all(o["ratio"] == pytest.approx(o["seconds"] / m["plain"]["seconds"]) for o in m.values())
        assert (
            m["plain"]["loaded"] == m["sb"]["loaded"] == 1
            and m["sb"]["scored"] == 1
            and m["cached"]["scored"] == m["plain"]["scored"] == 0
        )
        assert m["cached"]["loaded"] == m["cached"]["trained"] == pytest.approx(0.5, abs=0.1) and m["cached, beta=2"][
            "loaded"
        ] == pytest.approx(1 / 3, abs=0.1)
        assert m["stale=3"]["scored"] == pytest.approx(1 / 3, abs=0.02) and m["two_stage"]["loaded"] == pytest.approx(
            0.75, abs=0.1
        )
    assert "of plain" in capsys.readouterr().out


def test_the_committed_epochs():
    "What the README quotes is what its file says, and holds what was asked of it"
    res = json.loads((Path(__file__).parent.parent / "nbs/results/epoch.json").read_text())
    assert res["config"]["data"] != "digits" and res["command"].startswith("python -m fastsb.bench epoch")
    for r in res["runs"]:
        m = {o["method"]: o for o in r["methods"]}
        assert all(o["ratio"] == pytest.approx(o["seconds"] / m["plain"]["seconds"]) for o in m.values())
        assert m["cached"]["ratio"] <= 0.55 and m["cached, beta=2"]["ratio"] <= 0.40


def test_files(tmp_path, capsys):
    "Fits from files: plain and the default, for the same time"
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("val", 8)):
        for dark, c in enumerate("abc"):
            (tmp_path / part / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(80 * dark, 80 * dark + 90, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / c / f"{i}.png")
    out, how = tmp_path / "files.json", ["--workers", "0", "--size", "8", "--width", "4", "--bs", "16", "--epochs", "6"]
    command.main(["files", "--data", str(tmp_path), *how, "--seeds", "2", "--out", str(out)])
    res = json.loads(out.read_text())
    assert [(r["method"], r["seed"]) for r in res["runs"]] == [(m, s) for s in (0, 1) for m in ("plain", "default")]
    for r in res["runs"]:
        batch = 112 // 16 * 16  # whole batches of 120 items
        assert r["trained"] < 6 * batch + 16 and r["training_s"] > 0
        if r["method"] == "plain":
            assert r["trained"] == 6 * batch and r["epochs"] == 6 and r["kept"] > 0.9
        else:
            assert r["trained"] > 2 * batch  # less than plain training by what selection itself costs
    assert min(r["kept"] for r in res["runs"]) < 0.9
    for wrong, says in (
        (["--data", str(tmp_path / "train")], "must hold the folders train and valid"),
        ([], "data must name a folder"),
        (["--data", str(tmp_path), "--workers", "x"], "workers must be numbers"),
    ):
        with pytest.raises(SystemExit):
            command.main(["files", *wrong, "--out", str(out)])
        assert says in capsys.readouterr().err
# a GPU ----------------------------------------------------------------------------------------------------------------
def test_gpu_runs_dry_and_goes_on_where_it_stood(tmp_path):
    out = tmp_path / "gpu.json"
    r = run("gpu", "--dry", "--device", "cpu", "--minutes", "0", "--out", str(out))
    assert r.returncode == 0 and "still to do" in r.stdout and json.loads(out.read_text())["parts"] == {}
    r = run("gpu", "--dry", "--device", "cpu", "--out", str(out))
    assert r.returncode == 0 and "still to do" not in r.stdout, r.stderr
    res = json.loads(out.read_text())
    assert list(res["parts"]) == ["choices", "memory", "batch of 16", "epoch"]
    assert res["parts"]["choices"]["same"] == dict.fromkeys(res["parts"]["choices"]["same"], 3)
    assert res["parts"]["memory"]["wrong"] == 0
    assert set(res["parts"]["epoch"]) == {"seconds", "plain", "fresh", "default"}
    lines = [json.loads(l) for l in out.with_suffix(".jsonl").read_text().splitlines()]
    assert {l["method"] for l in lines if l["kind"] == "run"} == {"plain", "default"}
    again = run("gpu", "--dry", "--device", "cpu", "--out", str(out))
    assert again.returncode == 0 and "batch of 16" not in again.stdout and "0 runs added" in again.stdout
    assert json.loads(out.read_text()) == res


def test_gpu_goes_on_with_its_own_file_only(tmp_path):
    out = tmp_path / "gpu.json"
    for old in ("[]", "{}", '{"parts": {}, "dry": false, "machine": {"device": "another"}, "versions": {}}'):
        out.write_text(old)
        r = run("gpu", "--dry", "--device", "cpu", "--out", str(out))
        assert r.returncode == 2 and "result of something else" in r.stderr and out.read_text() == old
    for args, says in (
        (["--device", "cpu"], "none here"),
        (["--dry", "--device", "cpu", "--out", str(tmp_path / "x.jsonl")], "jsonl"),
        (["--dry", "--device", "cpu", "--minutes", "-1", "--out", str(tmp_path / "x.json")], "minutes"),
    ):
        r = run("gpu", *args, cwd=root)
        assert r.returncode == 2 and says in r.stderr, r.stderr


def test_a_part_that_fails_is_made_again(tmp_path, monkeypatch):
    from fastsb.bench import gpu

    def fails(*args, **kwargs):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(gpu, "equal_time", lambda **kwargs: 0)
    out = str(tmp_path / "gpu.json")
    with monkeypatch.context() as m:
        m.setattr(gpu, "same_choices", fails)
        r = gpu.gpu(dry=True, device="cpu", out=out)
    assert "synchronizing" in r["parts"]["choices"]["failed"] and "failed" not in r["parts"]["memory"]
    assert len(gpu.gpu_table(r)) == 1
    again = gpu.gpu(dry=True, device="cpu", out=out)
    assert again["parts"]["choices"]["batches"] == 3 and again["parts"]["epoch"] == r["parts"]["epoch"]
