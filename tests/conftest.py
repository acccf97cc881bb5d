"""Settings that hold for every test."""

from __future__ import annotations

import functools
import gc
import ssl
from collections.abc import Iterator

import pytest
import torch

from tests.forks import Server

# The models are tiny: a second thread only waits for the first, and for ever where the cores are busy.
torch.set_num_threads(1)
# Attached hooks keep torch.nn's layers from their fused inference path, which rounds otherwise; comparisons go without.
torch.backends.mha.set_fastpath_enabled(False)
# A client of the Hub reads the machine's certificates, 50 ms each time, though the one on loopback speaks no TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking again and again at what was imported, a fifth of the suite's time.

    And from looking often: models are freed without it, but for what tests of cycles collect themselves.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(params=[1, 2, 3])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as torch then uses, for what works in several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A process that forks, one for all modules: it takes 3 s to import what they need."""
    server = Server()
    yield server
    server.close()
