import os

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--all-pairs", action="store_true", help="every pair of callbacks in every mode, not a sample")
    parser.addoption("--write-tables", metavar="FILE", help="write what test_compatibility has seen into a JSON file")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
