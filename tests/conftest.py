"What all tests share: no data of the shell's, and a few images of digits."

import os
from pathlib import Path

import pytest
import torch

from rcka.data.datasets import load_dataset

REAL = os.environ.get("RCKA_DATA")  # the folder of real images, for tests marked real_data alone


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session", autouse=True)
def repository_alone():
    "No test depends on what lies beside the checkout or in the environment of the shell."
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RCKA_DATA", raising=False)
        patch.delenv("RCKA_RUNS", raising=False)
        yield


@pytest.fixture
def real_data(monkeypatch):
    "The folder of real images, which the package finds, too. Tests that take it are marked real_data."
    if not REAL:
        pytest.skip("set RCKA_DATA to the folder of real images")
    monkeypatch.setenv("RCKA_DATA", REAL)
    return Path(REAL)


@pytest.fixture(scope="session")
def images():
    "200 training and 100 test digits, as `load_dataset` gives them."
    return load_dataset("digits", limit=200, test_limit=100)
