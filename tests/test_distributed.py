"Two processes that train together."
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_two_processes_take_the_same_steps():
    pytest.importorskip("accelerate")
    here = Path(__file__).parent
    cmd = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(here / "distributed_fit.py")]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join([str(here), str(here.parent)]))
    r = subprocess.run(cmd, capture_output=True, text=True, env=env, timeout=300, cwd=here)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
    assert "rank 0 fine" in r.stdout and "rank 1 fine" in r.stdout
