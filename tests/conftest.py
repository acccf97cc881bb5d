"""Settings that hold for every test."""

from __future__ import annotations

import functools
import gc
import ssl
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from point_peft.training import flags
from tests.forks import Server
from tests.zoo import TinyBackbone

# The models are tiny: a second thread only waits for the first, and for ever where the cores are busy.
torch.set_num_threads(1)
# Examples take as long as they take: no test depends on how fast the machine is.
settings.register_profile("any machine", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# Attached hooks keep torch.nn's layers from their fused inference path, which rounds otherwise; comparisons go without.
torch.backends.mha.set_fastpath_enabled(False)
# A client of the Hub reads the machine's certificates, 50 ms each time, though the one on loopback speaks no TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]
# Whoever calls the command once reads the source of its flags once; the tests call it a thousand times.
flags.field_docs = functools.cache(flags.field_docs)  # type: ignore[assignment]
# A seed is kept for devices that may yet appear, each time with the text of the whole stack, a millisecond.
for device, there in ((torch.cuda, torch.cuda.is_available()), (torch.xpu, torch.xpu.is_available())):
    if not there:
        vars(device)["manual_seed_all"] = lambda seed: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the models of other packages first, so that of two workers only one has to import these and make them."""
    items.sort(key=_needs_no_other_package)


def _needs_no_other_package(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and "[" in item.name else {}
    backbone = parameters.get("backbone")
    return not (isinstance(backbone, TinyBackbone) and backbone.needs)


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
