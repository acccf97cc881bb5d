"""The Hub of the tests as a fixture: `pytest_plugins = ["tests.hub_fixture"]` in a test module, `hub` as an argument.

huggingface_hub reads its environment once, when it is imported; after that only `huggingface_hub.constants` counts, and
some names were copied from there. Two sorts of defaults were fixed even earlier, when the functions were defined, and
cannot be switched: `etag_timeout` of hf_hub_download and snapshot_download and `timeout` of get_hf_file_metadata. All
functions take `cache_dir` from the constants when they are called.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub import close_session, constants, file_download, hf_api
from huggingface_hub.utils import _cache_assets, _cache_manager, _http, _xet

from tests.hanging import LONG
from tests.hub_server import HubServer

# The package has a class of the same name.
progress_bars = import_module("huggingface_hub.utils.tqdm")
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}


def go_to(server: HubServer, home: Path, xet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, and processes that a test starts, to a server, with an empty home and hf_alice's token."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.upper() in PROXIES or name == "TRANSFORMERS_OFFLINE":
            monkeypatch.delenv(name)
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_alice",
        "HF_HUB_DISABLE_XET": str(int(not xet)),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    read = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_SYMLINKS": False,
        "HF_HUB_DISABLE_SHARED_BLOBS": False,
        "HF_HUB_ETAG_TIMEOUT": constants.DEFAULT_ETAG_TIMEOUT,
        "HF_HUB_DOWNLOAD_TIMEOUT": constants.DEFAULT_DOWNLOAD_TIMEOUT,
    }
    for name, constant in read.items():
        monkeypatch.setattr(constants, name, constant)
    # Copies: of the module-level functions' HfApi, of scan_cache_dir, of cached_assets_path, of the progress bars.
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(hf_api.api, "_whoami_cache", {})
    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr(progress_bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # A port comes again, and with it the address under which the tokens of Xet are kept.
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())


def wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client wait for an answer for as long as a busy machine may take, but where a test says how long."""
    send = httpx2.HTTPTransport.handle_request

    def patient(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        stated = request.extensions["timeout"]
        request.extensions["timeout"] = {
            of: seconds if (seconds or LONG) < 5 else LONG for of, seconds in stated.items()
        }
        return send(transport, request)

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", patient)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have slept between its attempts; it does not."""
    asked: list[float] = []
    clock = SimpleNamespace(sleep=asked.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    return asked


@pytest.fixture(params=["lfs", "xet"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> Iterator[HubServer]:
    """A Hub with the users alice, who is logged in, and bob; `parametrize("hub", ["xet"], indirect=True)`."""
    # The client's own, when it sends a file to the LFS store.
    warnings.filterwarnings("ignore", message="Use 'content=", category=DeprecationWarning)
    xet = request.param == "xet"
    tokens = {"hf_alice": "alice", "hf_bob": "bob"}
    with HubServer(tmp_path / "hub", tokens, xet=xet) as server:
        go_to(server, tmp_path / "home", xet, monkeypatch)
        wait_long(monkeypatch)
        # The client takes the proxies when it is made.
        close_session()
        yield server
        close_session()
