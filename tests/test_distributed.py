"Several processes that train together."

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

here = Path(__file__).parent


def launch(n, script, *args, timeout=300):
    "Run `script` by torchrun in `n` processes: (exit code, what it has printed). None of them is left over"
    cmd = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(n),
        str(here / script),
        *args,
    ]
    paths = os.pathsep.join([str(here), str(here.parent)])
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true", PYTHONPATH=paths)
    p = subprocess.Popen(
        cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=here, start_new_session=True
    )
    try:
        out, _ = p.communicate(timeout=timeout)
    finally:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()
    return p.returncode, out


def all_fine(n, *args):
    code, out = launch(n, *args)
    assert code == 0, out[-6000:]
    assert sorted(re.findall(r"rank (\d+) fine", out)) == [str(r) for r in range(n)], out[-6000:]
    return out


@pytest.mark.parametrize("n", [2, 3])
def test_plain_loops(n):
    all_fine(n, "distributed_loop.py", "loop")


@pytest.mark.parametrize("n", [2, 3])
def test_accelerate(n):
    pytest.importorskip("accelerate")
    all_fine(n, "distributed_loop.py", "accelerate")


@pytest.mark.parametrize("n", [2, 3])
def test_fits(n):
    pytest.importorskip("accelerate")
    out = all_fine(n, "distributed_fit.py")
    notices = [line for line in out.splitlines() if "fastsb:" in line]
    assert len(notices) == len(set(notices)), "not by the first process only"


def test_a_process_that_dies_ends_all():
    code, out = launch(2, "distributed_loop.py", "dies", timeout=120)
    assert code != 0 and "fine" not in out and "exitcode  : 3" in out, out[-4000:]
