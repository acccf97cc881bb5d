"""Failures between a model and the Hub, row by row: the input, the error, and the state afterwards.

Of every row: the error is one sentence of this package, the model is as it was bit for bit, and once nothing is wrong
any more, the same call works and gives the right logits: the cache and the repository are right.
"""

from __future__ import annotations

import json
import pickle
import re
import signal
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelInfo, constants
from torch import Tensor, nn

from point_peft import AdapterFileError, HubError, LoraConfig, PointPeftError, PointPeftModel, list_adapters
from point_peft.files.format import CARD_FILE, CONFIG_FILE, KEY_PREFIX, TENSOR_FILE
from point_peft.hub import asking
from tests.adapting import ONE_BLOCK, adapt, assert_same_values, fingerprint, run, values, without_search
from tests.hanging import LONG, must_end
from tests.hub_server import HubServer
from tests.zoo import BACKBONES

pytest_plugins = ["tests.hub_fixture"]

SIMPLE = without_search(ONE_BLOCK)
"""Enough of a backbone: what goes wrong on the way of two files does not depend on what is in them."""
REPO = "alice/adapter"
ALWAYS = 10_000
NEVER = 2 * LONG
"""Seconds after which nobody waits for an answer any more."""
INFO, CONFIG, TENSORS = "/api/models/alice/adapter", f"/resolve/.*{CONFIG_FILE}", f"/files/.*{TENSOR_FILE}"

Files = dict[str, bytes]
lfs = pytest.mark.parametrize("hub", ["lfs"], indirect=True)
both = pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)


@pytest.fixture(autouse=True)
def naps_of_ours(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the package would have slept between its tries; it does not."""
    slept: list[float] = []
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=slept.append))
    return slept


@pytest.fixture(scope="module")
def trained() -> PointPeftModel:
    """The adapter that is pulled. No test changes it."""
    return adapt(SIMPLE, "LORA")


@pytest.fixture(scope="module")
def files(trained: PointPeftModel, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("trained")
    trained.save_pretrained(folder, format="point_peft")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(trained: PointPeftModel) -> Tensor:
    return run(trained, SIMPLE)


@pytest.fixture(scope="module")
def model() -> PointPeftModel:
    """A model that adapters are loaded into; each test leaves it as it was."""
    return adapt(SIMPLE, "BITFIT")


def refused(
    model: PointPeftModel, match: str, error: type[PointPeftError] = HubError, source: str = REPO, **options: Any
) -> None:
    """The load is refused in one sentence and leaves the model as it was."""
    before = fingerprint(model)
    with pytest.raises(error, match=match) as caught:
        model.load_adapter(source, "new", **options)
    one_sentence(caught.value)
    assert fingerprint(model) == before


def one_sentence(error: Exception) -> None:
    assert "\n" not in str(error) and 20 < len(str(error)) < 800, str(error)
    assert "hf_" not in str(error).replace("hf_hub_download", ""), "a token in an error"


def logits(**options: Any) -> Tensor:
    return run(PointPeftModel.from_pretrained(SIMPLE.build(), REPO, **options).eval(), SIMPLE)


def cached(tmp_path: Path) -> set[str]:
    """The files in the snapshots of the cache that can be opened."""
    hub = tmp_path / "home" / "hub"
    return {path.name for path in hub.glob("models--*/snapshots/*/*") if path.exists()}


# ---- the network, pulling --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """`how` is what `HubServer.fault` takes; `match` is the error, None where the load works all the same."""

    method: str
    path: str
    how: Mapping[str, Any]
    match: str | None = None

    def __str__(self) -> str:
        part = {INFO: "info", CONFIG: "config", TENSORS: "tensors"}.get(self.path, self.path)
        what = " ".join(f"{name} {value}" for name, value in self.how.items() if name != "times")
        return f"{self.method} {part} {what} {'always' if self.how.get('times', 1) > 1 else 'once'}"


def provoke(hub: HubServer, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it go wrong. Nobody waits for long for an answer that never comes, and everybody for the others."""
    send, left = httpx2.HTTPTransport.handle_request, [fault.how.get("times", 1)]

    def handle(transport: httpx2.HTTPTransport, request: httpx2.Request) -> httpx2.Response:
        target = request.url.raw_path.decode()
        late = left[0] > 0 and re.fullmatch(fault.method, request.method) and re.search(fault.path, target)
        left[0] -= bool(late)
        read = 0.3 if late else LONG
        request.extensions["timeout"] = {"connect": LONG, "write": LONG, "pool": LONG, "read": read}
        return send(transport, request)

    if "delay" in fault.how:
        monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", handle)
    hub.fault(fault.method, fault.path, **fault.how)


def once(method: str, path: str, **how: Any) -> Fault:
    return Fault(method, path, how)


def always(method: str, path: str, match: str, **how: Any) -> Fault:
    return Fault(method, path, {"times": ALWAYS, **how}, match)


NOT_CACHED = f"'{CONFIG_FILE}' of 'alice/adapter' is not in the cache, and was not asked for on the Hub: "
PULLING = [
    once("GET", INFO, status=500),
    once("GET", INFO, status=503),
    once("GET", INFO, status=429),
    once("GET", INFO, drop=True),
    once("GET", INFO, truncate=20),
    once("GET", INFO, delay=NEVER),
    once("HEAD", CONFIG, status=503),
    once("HEAD", TENSOR_FILE, status=500),
    once("HEAD", TENSOR_FILE, drop=True),
    once("HEAD", TENSOR_FILE, delay=NEVER),
    once("GET", CONFIG, status=500),
    once("GET", CONFIG, drop=True),
    once("GET", CONFIG, truncate=100),
    once("GET", CONFIG, corrupt=True),
    once("GET", TENSORS, status=502),
    once("GET", TENSORS, drop=True),
    once("GET", TENSORS, truncate=1000),
    once("GET", TENSORS, corrupt=True),
    once("GET", TENSORS, delay=NEVER),
    always("GET", INFO, NOT_CACHED + "the Hub answers 500", status=500),
    always("GET", INFO, NOT_CACHED + "the Hub answers 504", status=504),
    always("GET", INFO, "the Hub answers 418 for 'alice/adapter'", status=418),
    always("GET", INFO, NOT_CACHED + "the Hub cannot be reached", drop=True),
    always("GET", INFO, NOT_CACHED + "the Hub cannot be reached", truncate=20),
    always("GET", INFO, NOT_CACHED + "the Hub cannot be reached .*[Tt]imeout", delay=NEVER),
    always("GET", INFO, NOT_CACHED + "what answers at .* is not a Hub", corrupt=True),
    always("HEAD", CONFIG, f"'{CONFIG_FILE}' of 'alice/adapter' could not be downloaded: .*500", status=500),
    always("HEAD", CONFIG, f"'{CONFIG_FILE}' of 'alice/adapter' could not be downloaded", drop=True),
    always("HEAD", CONFIG, f"'{CONFIG_FILE}' of .* could not be downloaded", headers={"X-Repo-Commit": None}),
    always("HEAD", CONFIG, f"'{CONFIG_FILE}' of .* could not be downloaded", headers={"ETag": None}),
    always("HEAD", CONFIG, f"'{CONFIG_FILE}' of .* could not be downloaded: the Hub answers 404", status=404),
    always("GET", CONFIG, f"'{CONFIG_FILE}' of .* could not be downloaded: the Hub answers 500", status=500),
    always("GET", CONFIG, f"'{CONFIG_FILE}' of .* could not be downloaded", truncate=100),
    always("GET", CONFIG, f"'{CONFIG_FILE}' of 'alice/adapter' arrived damaged twice", corrupt=True),
    always("HEAD", TENSOR_FILE, f"'{TENSOR_FILE}' of .* could not be downloaded", headers={"X-Linked-Size": "77"}),
    always("GET", TENSORS, f"'{TENSOR_FILE}' of .* could not be downloaded: the Hub answers 503", status=503),
    always("GET", TENSORS, f"'{TENSOR_FILE}' of .* could not be downloaded: the Hub cannot be reached", drop=True),
    always("GET", TENSORS, f"'{TENSOR_FILE}' of .* could not be downloaded", truncate=1000),
    always("GET", TENSORS, f"'{TENSOR_FILE}' of 'alice/adapter' arrived damaged twice.* try again", corrupt=True),
    always("GET", TENSORS, "the Hub answers 410|could not be downloaded", status=410),
]


@lfs
@pytest.mark.parametrize("fault", PULLING, ids=str)
def test_pulling(
    hub: HubServer,
    fault: Fault,
    files: Files,
    model: PointPeftModel,
    expected: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.put(REPO, files)
    provoke(hub, fault, monkeypatch)
    if fault.match is not None:
        refused(model, fault.match)
        broken = {CONFIG_FILE, TENSOR_FILE} if CONFIG_FILE in fault.path or fault.path == INFO else {TENSOR_FILE}
        assert not cached(tmp_path) & broken, "what did not arrive is in the cache"
        hub.mend()
    assert torch.equal(logits(), expected)
    assert torch.equal(logits(local_files_only=True), expected), "and the cache is right"


@lfs
def test_the_pauses_between_tries(hub: HubServer, model: PointPeftModel, naps_of_ours: list[float]) -> None:
    hub.fault("GET", INFO, ALWAYS, status=500)
    refused(model, "the Hub answers 500")
    assert len(hub.seen("GET", INFO)) == 3 and naps_of_ours == [1.0, 2.0]


@lfs
def test_what_the_storage_has_lost_is_refused_until_it_is_pushed_again(
    hub: HubServer, files: Files, model: PointPeftModel, expected: Tensor, tmp_path: Path
) -> None:
    hub.put(REPO, files)
    hub.tamper(REPO, TENSOR_FILE, files[TENSOR_FILE][:-1] + b"\1")
    refused(model, "arrived damaged twice: it is not what the Hub states.* ask the owner to push it again")
    assert cached(tmp_path) == {CONFIG_FILE}
    hub.tamper(REPO, TENSOR_FILE, files[TENSOR_FILE])
    assert torch.equal(logits(), expected)


@pytest.mark.parametrize("hub", ["xet"], indirect=True)
@pytest.mark.parametrize("path", ["xet-read-token", TENSOR_FILE])
@pytest.mark.parametrize("times", [1, ALWAYS])
def test_pulling_with_xet(
    hub: HubServer, path: str, times: int, files: Files, model: PointPeftModel, expected: Tensor
) -> None:
    hub.put(REPO, files)
    hub.fault("GET|HEAD", path, times, status=500)
    if times > 1:
        refused(model, f"'{TENSOR_FILE}' of 'alice/adapter' could not be downloaded")
        hub.mend()
    assert torch.equal(logits(), expected)


# ---- who may, what is there, what is cached --------------------------------------------------------------------------


@dataclass
class Case:
    """A repository with an adapter, that may have been pulled before, and what a row does to all this."""

    hub: HubServer
    files: Files
    home: Path
    monkeypatch: pytest.MonkeyPatch
    victim: Path

    def entry(self, name: str) -> Path:
        """A file in the cache, which is a link."""
        (found,) = self.home.glob(f"hub/models--alice--adapter/snapshots/*/{name}")
        return found

    def poison(self, name: str) -> None:
        blob = self.entry(name).resolve()
        blob.write_bytes(blob.read_bytes()[:-2] + b"\1\1")

    def trick(self, name: str) -> None:
        self.entry(name).unlink()
        self.entry_at(name).symlink_to(self.victim)

    def entry_at(self, name: str) -> Path:
        (folder,) = self.home.glob("hub/models--alice--adapter/snapshots/*")
        return folder / name

    def delete(self) -> None:
        HfApi().delete_repo(REPO)

    def gate(self) -> None:
        self.hub.put("bob/adapter", self.files)
        self.hub.repo("bob/adapter").gated = "manual"

    def hide(self) -> None:
        self.hub.repo(REPO).private = True

    def log_out(self) -> None:
        self.monkeypatch.delenv("HF_TOKEN")

    def nothing(self) -> None:
        pass

    def offline(self) -> None:
        self.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """`match` is the error; None: the load works, with what `warns` if anything."""

    do: Callable[[Case], None] = Case.nothing
    match: str | None = None
    warns: str | None = None
    cached: bool = False
    source: str = REPO
    options: Mapping[str, Any] | None = None


def offline_and_poisoned(name: str) -> Callable[[Case], None]:
    def do(case: Case) -> None:
        case.poison(name)
        case.offline()

    return do


def offline_and_tricked(case: Case) -> None:
    case.trick(TENSOR_FILE)
    case.offline()


def with_a_directory(case: Case) -> None:
    case.entry(TENSOR_FILE).unlink()
    case.entry_at(TENSOR_FILE).mkdir()


def offline_and_incomplete(case: Case) -> None:
    case.entry(TENSOR_FILE).unlink()
    case.offline()


NO_REPO = "there is no repository '.*' that can be seen: check the name; if it is private, pass a token"
WRONG_TOKEN = "the Hub refuses 'alice/adapter' .401.: the token is wrong"
TAKEN = "is taken from the cache, commit [0-9a-f]{40}"
STATES = {
    "deleted": Row(do=Case.delete, match=NO_REPO),
    "deleted, cached": Row(do=Case.delete, match=NO_REPO, cached=True),
    "never there": Row(source="alice/nothing", match=NO_REPO),
    "gated": Row(do=Case.gate, source="bob/adapter", match="'bob/adapter' is gated: accept its conditions at http"),
    "private, no token": Row(do=Case.hide, match=NO_REPO, options={"token": False}),
    "private, another's token": Row(do=Case.hide, match=NO_REPO, options={"token": "hf_bob"}),
    "private, no token, cached": Row(do=Case.hide, match=NO_REPO, cached=True, options={"token": False}),
    "wrong token": Row(match=WRONG_TOKEN, options={"token": "hf_mallory"}),
    "wrong token, cached": Row(match=WRONG_TOKEN, cached=True, options={"token": "hf_mallory"}),
    "token with a line end": Row(match="the token has characters that no token has", options={"token": "hf_a\n"}),
    "empty token": Row(match="the token has characters that no token has", options={"token": ""}),
    "not logged in": Row(do=Case.log_out, match="nobody is logged in|there is none", options={"token": True}),
    "no such branch": Row(match="'alice/adapter' has no revision 'dev': name a branch", options={"revision": "dev"}),
    "no such commit": Row(match="'alice/adapter' has no revision 'd{40}'", options={"revision": "d" * 40}),
    "no such subfolder": Row(match=f"has no file 'runs/{CONFIG_FILE}' at commit", options={"subfolder": "runs"}),
    "no network": Row(do=lambda case: case.hub.stop(), match=NOT_CACHED + "the Hub cannot be reached .ConnectError"),
    "no network, cached": Row(do=lambda case: case.hub.stop(), warns=f"cannot be reached.*{TAKEN}", cached=True),
    "no network, cached, forced": Row(
        do=lambda case: case.hub.stop(),
        match="could not be downloaded: the Hub cannot be reached",
        cached=True,
        options={"force_download": True},
    ),
    "no network, cached, another revision": Row(
        do=lambda case: case.hub.stop(), match="at revision 'v2' is not in the cache", cached=True,
        options={"revision": "v2"},
    ),
    "busy, cached": Row(
        do=lambda case: case.hub.fault("GET", INFO, ALWAYS, status=503), warns=f"answers 503: .*{TAKEN}", cached=True
    ),
    "captive portal, cached": Row(
        do=lambda case: case.hub.fault("GET", INFO, ALWAYS, corrupt=True), warns=f"not a Hub.*{TAKEN}", cached=True
    ),
    "offline, not cached": Row(do=Case.offline, match=NOT_CACHED + "local_files_only or HF_HUB_OFFLINE is set"),
    "offline, cached": Row(do=Case.offline, cached=True),
    "offline, one file is missing": Row(do=offline_and_incomplete, match="not in the cache", cached=True),
    "offline, poisoned config": Row(
        do=offline_and_poisoned(CONFIG_FILE), match=f"'{CONFIG_FILE}' of .* is damaged in the cache", cached=True
    ),
    "offline, poisoned tensors": Row(
        do=offline_and_poisoned(TENSOR_FILE),
        match=f"'{TENSOR_FILE}' of .* is damaged in the cache .* force_download=True",
        cached=True,
    ),
    "offline, a link out of the cache": Row(do=offline_and_tricked, match="is damaged in the cache", cached=True),
    "poisoned config": Row(do=lambda case: case.poison(CONFIG_FILE), cached=True),
    "poisoned tensors": Row(do=lambda case: case.poison(TENSOR_FILE), cached=True),
    "a link out of the cache": Row(do=lambda case: case.trick(TENSOR_FILE), cached=True),
    "a directory in place of a file": Row(
        do=with_a_directory,
        match="'alice/adapter': Is a directory ./",
        cached=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hub"),
    [(name, mode) for name, row in STATES.items() for mode in ("lfs", "xet") if mode == "lfs" or row.cached],
    indirect=["hub"],
)
def test_states(
    hub: HubServer,
    name: str,
    files: Files,
    model: PointPeftModel,
    expected: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = STATES[name]
    victim = tmp_path / "victim"
    victim.write_bytes(files[TENSOR_FILE][:-2] + b"\1\1")
    hub.put(REPO, files)
    if row.cached:
        logits()
    row.do(Case(hub, files, tmp_path / "home", monkeypatch, victim))
    options = row.options or {}
    if row.match is not None:
        refused(model, row.match, source=row.source, **options)
    else:
        warned: AbstractContextManager[object] = nullcontext()
        if row.warns:
            warned = pytest.warns(UserWarning, match=row.warns)
        with warned:
            assert torch.equal(logits(**options), expected)
    assert victim.read_bytes() == files[TENSOR_FILE][:-2] + b"\1\1", "nothing outside the cache is changed"


@both
def test_what_is_refused_offline_is_healed_online(
    hub: HubServer, files: Files, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPO, files)
    logits()
    case = Case(hub, files, tmp_path / "home", monkeypatch, tmp_path / "victim")
    case.poison(CONFIG_FILE)
    case.poison(TENSOR_FILE)
    assert torch.equal(logits(), expected)
    assert torch.equal(logits(local_files_only=True), expected)


# ---- the network, pushing --------------------------------------------------------------------------------------------

FAILED = "the push to 'alice/adapter' failed: .*Push again; nothing is committed twice"
COMMIT = "/api/models/alice/adapter/commit/main"
PUSHING = [
    once("POST", "/api/repos/create", status=500),
    once("POST", "/api/repos/create", drop=True),
    once("POST", "/api/repos/create", truncate=0),
    once("GET", INFO, status=502),
    once("HEAD", CARD_FILE, status=500),
    once("POST", "/api/validate-yaml", status=500),
    once("POST", "/preupload/", status=500),
    once("POST", "/preupload/", drop=True),
    once("POST", "/objects/batch", status=503),
    once("PUT", "/upload/", status=500),
    once("PUT", "/upload/", drop=True),
    once("PUT", "/upload/", truncate=0),
    once("POST", "/objects/verify", status=500),
    once("POST", COMMIT, status=500),
    once("POST", COMMIT, status=412),
    once("POST", COMMIT, drop=True),
    once("POST", COMMIT, truncate=0),
    always("POST", "/api/repos/create", FAILED, status=500),
    always("POST", "/api/repos/create", FAILED, corrupt=True),
    always("POST", COMMIT, FAILED, status=500, corrupt=True),
    always("GET", INFO, FAILED, status=500),
    always("GET", INFO, FAILED, corrupt=True),
    always("GET", INFO, FAILED, drop=True),
    always("GET", INFO, FAILED, delay=NEVER),
    always("HEAD|GET", CARD_FILE, f"'{CARD_FILE}' of 'alice/adapter' could not be downloaded", status=500),
    always("GET", CARD_FILE, f"'{CARD_FILE}' of 'alice/adapter' arrived damaged twice", corrupt=True),
    always("POST", "/preupload/", FAILED, status=500),
    always("POST", "/objects/batch", FAILED, status=500),
    always("POST", "/objects/batch", "the Hub refuses 'alice/adapter' .403.", status=403),
    always("PUT", "/upload/", FAILED, status=500),
    always("PUT", "/upload/", FAILED, drop=True),
    always("POST", COMMIT, FAILED, status=503),
    always("POST", COMMIT, FAILED, drop=True),
    always("POST", COMMIT, "others commit to it all the time. Push again", status=412),
    always("POST", COMMIT, "the Hub answers 400 for 'alice/adapter'", status=400),
    always("POST", COMMIT, "the Hub answers 413 for 'alice/adapter'", status=413),
]


@lfs
@pytest.mark.parametrize("fault", PUSHING, ids=str)
def test_pushing(
    hub: HubServer,
    fault: Fault,
    files: Files,
    model: PointPeftModel,
    trained: PointPeftModel,
    expected: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is an adapter that is pushed over; the old one is complete until the new one is."""
    hub.put(REPO, files)
    before, old = hub.files(REPO), values(model)
    provoke(hub, fault, monkeypatch)
    if fault.match is not None:
        with pytest.raises(HubError, match=fault.match) as caught:
            model.push_to_hub(REPO)
        one_sentence(caught.value)
        assert hub.files(REPO) == before
        assert len(hub.commits(REPO)) == 2
        hub.mend()
        assert torch.equal(logits(), expected)
    model.push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 3, "one commit, whatever got lost"
    assert torch.equal(logits(), run(model, SIMPLE))
    assert_same_values(values(model), old)


@pytest.mark.parametrize("hub", ["xet"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    [
        once("GET", "xet-write-token", drop=True),
        once("POST", COMMIT, status=500),
        once("POST", COMMIT, truncate=0),
        always("GET", "xet-write-token", "the Hub (refuses|cannot be reached)", status=403),
        always("GET", "xet-write-token", "the Hub (refuses|cannot be reached)", status=404),
        always("POST", COMMIT, FAILED, status=500),
    ],
    ids=str,
)
def test_pushing_with_xet(hub: HubServer, fault: Fault, files: Files, model: PointPeftModel, expected: Tensor) -> None:
    """hf_xet itself tries again for minutes where a server fails; here it is refused."""
    hub.put(REPO, files)
    before = hub.files(REPO)
    hub.fault(fault.method, fault.path, **fault.how)
    if fault.match is not None:
        with pytest.raises(HubError, match=fault.match) as caught:
            model.push_to_hub(REPO)
        one_sentence(caught.value)
        assert hub.files(REPO) == before
        hub.mend()
    model.push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 3
    assert torch.equal(logits(), run(model, SIMPLE))


@lfs
@pytest.mark.parametrize("how", [{"truncate": 0}, {"drop": True}, {"status": 500}], ids=str)
def test_a_pull_request_is_not_opened_twice(hub: HubServer, how: dict[str, Any], model: PointPeftModel) -> None:
    hub.put(REPO, {})
    hub.fault("POST", COMMIT, **how)
    with pytest.raises(HubError, match="whether a pull request was opened is not known: .* Look at http.*/discussions"):
        model.push_to_hub(REPO, create_pr=True)
    assert len(hub.repo(REPO).pulls) == ("truncate" in how)
    assert len(hub.commits(REPO)) == 2


@lfs
@pytest.mark.parametrize("method, path", [("GET", "/refs"), ("POST", "/branch/dev"), ("POST", "/commit/dev")])
@pytest.mark.parametrize("how", [{"status": 500}, {"drop": True}, {"truncate": 0}], ids=str)
def test_pushing_to_a_new_branch(
    hub: HubServer, method: str, path: str, how: dict[str, Any], files: Files, model: PointPeftModel, expected: Tensor
) -> None:
    hub.put(REPO, files)
    hub.fault(method, path, ALWAYS, **how)
    done = method == "POST" and "truncate" in how
    if not done:
        with pytest.raises(HubError, match=FAILED) as caught:
            model.push_to_hub(REPO, revision="dev")
        one_sentence(caught.value)
        hub.mend()
    model.push_to_hub(REPO, revision="dev")
    assert (len(hub.commits(REPO)), len(hub.commits(REPO, "dev"))) == (2, 3)
    assert torch.equal(logits(revision="dev"), run(model, SIMPLE))
    assert torch.equal(logits(), expected)


@lfs
@pytest.mark.parametrize(
    "fault",
    [
        once("GET", "/api/models[?]", status=500),
        once("GET", "/api/models[?]", truncate=1),
        always("GET", "/api/models[?]", "of 'alice/point-mae' could not be listed: the Hub answers 503", status=503),
        always("GET", "/api/models[?]", "could not be listed: the Hub cannot be reached", drop=True),
        always("GET", "/api/models[?]", "could not be listed: what answers at .* is not a Hub", corrupt=True),
        always("GET", "/api/models[?]", "the Hub refuses 'alice/point-mae' .401.", status=401),
    ],
    ids=str,
)
def test_listing(hub: HubServer, fault: Fault) -> None:
    hub.fault(fault.method, fault.path, **fault.how)
    if fault.match is not None:
        with pytest.raises(HubError, match=fault.match) as caught:
            list_adapters("alice/point-mae")
        one_sentence(caught.value)
        hub.mend()
    assert list_adapters("alice/point-mae") == []


PUSH_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "tag": ({"revision": "v1"}, "nothing was pushed to 'alice/adapter': 'v1' is a tag; push to a branch or refs/pr/N"),
    "full name of a tag": ({"revision": "refs/tags/v1"}, "is neither a branch nor a pull request"),
    "full name of a branch": ({"revision": "refs/heads/main"}, "is neither a branch nor a pull request"),
    "commit": ({"revision": "d" * 40}, "'d{40}' is a commit; push to a branch"),
    "no such pull request": ({"revision": "refs/pr/7"}, "has no revision 'refs/pr/7'"),
    "pull request from nowhere": ({"revision": "dev", "create_pr": True}, "has no revision 'dev'"),
    "another's token": ({"token": "hf_bob"}, "the Hub refuses 'alice/adapter' .403."),
    "wrong token": ({"token": "hf_mallory"}, "the Hub refuses 'alice/adapter' .401."),
    "no token": ({"token": False}, "the Hub refuses 'alice/adapter' .401."),
    "token with a space": ({"token": "hf_a b"}, "the token has characters that no token has"),
    "private, though public": ({"private": True}, "private is asked for, and 'alice/adapter' exists and is public"),
}


@lfs
@pytest.mark.parametrize("name", PUSH_REFUSALS)
def test_push_refusals(hub: HubServer, name: str, files: Files, model: PointPeftModel) -> None:
    options, match = PUSH_REFUSALS[name]
    hub.put(REPO, files)
    HfApi().create_tag(REPO, tag="v1")
    refs, before = dict(hub.repo(REPO).refs), hub.files(REPO)
    with pytest.raises(HubError, match=match) as caught:
        model.push_to_hub(REPO, **options)
    one_sentence(caught.value)
    assert (hub.files(REPO), hub.repo(REPO).refs) == (before, refs)


CARDS = {
    "not UTF-8": (b"caf\xe9\n", f"the repository's {CARD_FILE} is not in UTF-8"),
    "YAML without an end": (b"---\nlicense: mit\n", "the card begins with '---'"),
    "broken YAML": (b"---\na: [b\n---\n", "the YAML at the beginning of the card cannot be read"),
    "YAML that the Hub refuses": (b"---\na: |\n  b\n\tc: 1\n---\n", "YAML|the Hub refuses it: .*tabs"),
}


@lfs
@pytest.mark.parametrize("name", CARDS)
def test_cards_that_are_not_pushed_over(hub: HubServer, name: str, model: PointPeftModel) -> None:
    card, match = CARDS[name]
    hub.put(REPO, {CARD_FILE: card})
    with pytest.raises(PointPeftError, match=match) as caught:
        model.push_to_hub(REPO)
    one_sentence(caught.value)
    assert hub.files(REPO)[CARD_FILE] == card
    assert len(hub.commits(REPO)) == 2


# ---- hostile names ---------------------------------------------------------------------------------------------------

PATHS = [
    "../x",
    "a/../../x",
    "..",
    ".",
    "a/./b",
    "/etc",
    "a//b",
    "a/",
    "",
    "a\\b",
    "a b",
    "a\nb",
    "a\0b",
    "é",
    "a" * 300,
]
REPOS = [
    "../x",
    "/etc/passwd",
    "~/x",
    "./x",
    "a/b/c",
    "a\\b",
    "alice/ad apter",
    "alice/x\t",
    "alice/..",
    "",
    "alice/--x",
]


@lfs
@pytest.mark.parametrize("field", ["revision", "subfolder"])
@pytest.mark.parametrize("value", PATHS, ids=lambda value: repr(value)[:20])
def test_hostile_paths(hub: HubServer, field: str, value: str, model: PointPeftModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {field: value}
    refused(model, f"{field} is .*; allowed: letters, digits", **options)
    with pytest.raises(HubError, match=f"{field} is .*; allowed: letters, digits"):
        model.push_to_hub(REPO, **options)
    assert hub.log == [] and not (tmp_path / "home").exists()


@lfs
@pytest.mark.parametrize("value", REPOS, ids=repr)
def test_hostile_repositories(hub: HubServer, value: str, model: PointPeftModel, tmp_path: Path) -> None:
    """To a pull these are paths of folders that are not there."""
    refused(model, "there is no folder|not a folder|there is no file", AdapterFileError, source=value)
    with pytest.raises(HubError, match="is not a repository of the Hub: write 'owner/name'"):
        model.push_to_hub(value)
    assert hub.log == [] and not (tmp_path / "home").exists()


@lfs
@pytest.mark.parametrize("sha", ["../../../x", "main", "", None, "d" * 39, "D" * 40], ids=repr)
def test_a_hub_that_names_no_commit(
    hub: HubServer,
    sha: str | None,
    files: Files,
    model: PointPeftModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.put(REPO, files)
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **options: ModelInfo(id=REPO, sha=sha, siblings=[]))
    refused(model, "what answers at .* is not a Hub: its commit is ")
    assert hub.seen(".*", "resolve") == [] and not (tmp_path / "home" / "hub").exists()


# ---- hostile files ---------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Files], None]:
    """Fields of the configuration at other values."""

    def change(files: Files) -> None:
        files[CONFIG_FILE] = json.dumps({**json.loads(files[CONFIG_FILE]), **changes}).encode()

    return change


def tuner(**changes: Any) -> Callable[[Files], None]:
    """Fields of the method at other values."""

    def change(files: Files) -> None:
        about = json.loads(files[CONFIG_FILE])
        about["tuners"][0] |= changes
        files[CONFIG_FILE] = json.dumps(about).encode()

    return change


def text(content: bytes) -> Callable[[Files], None]:
    """The whole configuration."""

    def change(files: Files) -> None:
        files[CONFIG_FILE] = content

    return change


def twice(files: Files) -> None:
    files[CONFIG_FILE] = files[CONFIG_FILE].replace(b"{", b'{"revision": "a", "revision": "b",', 1)


def raw(edit: Callable[[bytes], bytes]) -> Callable[[Files], None]:
    """The file of the tensors."""

    def change(files: Files) -> None:
        files[TENSOR_FILE] = edit(files[TENSOR_FILE])

    return change


def tensors(edit: Callable[[dict[str, Tensor], str], Any]) -> Callable[[Files], None]:
    """The tensors; `edit` gets them, and the name of the first of rank 2."""

    def change(files: Files) -> None:
        found = safetensors.torch.load(files[TENSOR_FILE])
        edit(found, next(name for name in sorted(found) if found[name].ndim == 2))
        files[TENSOR_FILE] = safetensors.torch.save(found)

    return change


def added(name: str) -> Callable[[Files], None]:
    return tensors(lambda found, first: found.update({name: torch.zeros(3)}))


def set_first(edit: Callable[[Tensor], Tensor]) -> Callable[[Files], None]:
    return tensors(lambda found, first: found.update({first: edit(found[first]).contiguous()}))


def moved(new: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        files[new] = files.pop(TENSOR_FILE)

    return change


def into(folder: str) -> Callable[[Files], None]:
    return lambda files: files.update({f"{folder}/{name}": files.pop(name) for name in list(files)})


def lost(name: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        del files[name]

    return change


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor(0), value)


NO_JSON, NO_MATCH = f"{CONFIG_FILE}' is not JSON", "does not fit this model: no module matches '.*' .target_modules."
DEEP = b'{"peft_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD_HEADER = (2**62).to_bytes(8, "little") + b"{}"
HOSTILE: dict[str, tuple[Callable[[Files], None], str]] = {
    "no config": (lost(CONFIG_FILE), f"no file '{CONFIG_FILE}'"),
    "no tensors": (lost(TENSOR_FILE), f"no file '{TENSOR_FILE}'"),
    "only pytorch_model.bin": (moved("adapter_model.bin"), "it has 'adapter_model.bin', but only safetensors are read"),
    "only in a subfolder": (into("a"), "it has adapters in the subfolders 'a'"),
    "empty config": (text(b""), NO_JSON),
    "config is no JSON": (text(b"peft_type: LORA"), NO_JSON),
    "config is not UTF-8": (text(b'{"peft_type": "\xff"}'), NO_JSON),
    "config is a list": (text(b"[]"), "must hold a JSON object, not a list"),
    "config is a number": (text(b"1"), "must hold a JSON object, not a int"),
    "config is deep": (text(DEEP), NO_JSON),
    "config has a key twice": (twice, "a key stands twice"),
    "config has NaN": (tuner(lora_alpha=float("nan")), "NaN is not a value of JSON"),
    "config has infinity": (text(b'{"peft_type": 1e999}'), "peft_type is inf"),
    "config has a huge number": (text(b'{"peft_type": ' + b"9" * 10_000 + b"}"), NO_JSON),
    "unknown peft_type": (config(peft_type="ADALORA"), "peft_type is 'ADALORA'; this version reads"),
    "peft_type is a list": (config(peft_type=["LORA"]), "peft_type is .*; this version reads"),
    "no peft_type": (text(b"{}"), "peft_type is None; this version reads"),
    "future version": (config(format_version=99), "format version 99; .* a newer point_peft is needed"),
    "version is true": (config(format_version=True), "format version True"),
    "unknown field": (config(trust_remote_code=True), "trust_remote_code"),
    "unknown method": (tuner(method="NEWEST"), "method 'NEWEST' is unknown; known methods"),
    "unknown field of a method": (tuner(quantum=True), "quantum"),
    "no methods": (config(tuners=[]), "tuners"),
    "methods are a string": (config(tuners="LORA"), "tuners must be a list of objects"),
    "no heads": (config(heads=None), "lacks heads or adapted_modules"),
    "heads are a list": (config(heads=[]), "lacks heads or adapted_modules"),
    "a head outside": (config(heads={"../../x": {}}), "the adapter has its own '../../x', this model has not"),
    "other adapted modules": (config(adapted_modules=["blocks.0"]), "made for other modules"),
    "fingerprint of no kind": (config(base_fingerprint=7), "base_fingerprint is not one that"),
    "rank 0": (tuner(r=0), "LoraConfig.r is 0; allowed"),
    "huge rank": (tuner(r=2**23), "is .* this model needs|too large|allowed"),
    "rank beyond all": (tuner(r=10**30), "r is "),
    "rank is a string": (tuner(r="8"), "r is '8'"),
    "targets nothing": (tuner(target_modules=["nothing"]), "nothing"),
    "regex that hangs": (tuner(target_modules="((a|[a-z.0-9_])+)+!"), NO_MATCH),
    "regex that hangs otherwise": (tuner(target_modules="(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!|(.+)+!"), NO_MATCH),
    "broken regex": (tuner(target_modules="("), "target_modules"),
    "huge regex": (tuner(target_modules="(a{60000}){60000}"), "target_modules"),
    "very long regex": (tuner(target_modules="(a|b)" * 50_000), "expression is longer than 1000 characters"),
    "pickle": (raw(lambda _: pickle.dumps({"a": 1})), "not a safetensors file"),
    "torch's zip": (raw(lambda _: b"PK\3\4" + bytes(500)), "not a safetensors file|header"),
    "empty tensors": (raw(lambda data: b""), "not a safetensors file"),
    "truncated": (raw(lambda data: data[:-10]), "not a safetensors file"),
    "truncated header": (raw(lambda data: data[:20]), "not a safetensors file"),
    "bytes at the end": (raw(lambda data: data + bytes(8)), "not a safetensors file"),
    "huge header": (raw(lambda _: BAD_HEADER), "not a safetensors file, or it is cut off"),
    "HTML": (raw(lambda _: b"<!DOCTYPE html><html>"), "not a safetensors file"),
    "extra tensor": (added(KEY_PREFIX + "extra"), "has a tensor 'extra' that the adapter has not"),
    "base key": (added(KEY_PREFIX + "blocks.0.attn.qkv.weight"), "a tensor 'blocks.0.attn.qkv.weight' that"),
    "name out of the grammar": (added("weights"), "does not begin with 'base_model.model.'"),
    "name is a path": (added("../../x"), "the tensor name '../../x' does not begin with"),
    "name is a path behind the prefix": (added(KEY_PREFIX + "../../x"), "a tensor '../../x' that the adapter has not"),
    "name has line ends": (added(KEY_PREFIX + "a\nb"), "has a tensor 'a.nb' that"),
    "very long name": (added(KEY_PREFIX + "a" * 5000), "has a tensor 'a+"),
    "missing tensor": (tensors(lambda found, first: found.pop(first)), "lacks the tensor"),
    "no tensor at all": (tensors(lambda found, first: found.clear()), "lacks the tensor"),
    "wrong shape": (set_first(lambda tensor: tensor[:, 1:]), "is .*, this model needs"),
    "wrong order of a shape": (set_first(lambda tensor: tensor.T), "is .*, this model needs"),
    "no values": (set_first(lambda tensor: tensor[:0]), "is .*, this model needs"),
    "wrong type": (set_first(lambda tensor: tensor.to(torch.int32)), "is int32, this model needs float32"),
    "complex": (set_first(lambda tensor: tensor.to(torch.complex64)), "complex64|unknown type"),
    "8-bit floats": (set_first(lambda tensor: tensor.to(torch.float8_e4m3fn)), "is float8_e4m3fn, this model needs"),
    "NaN": (set_first(with_value(float("nan"))), "holds values that are not finite"),
    "infinity": (set_first(with_value(float("-inf"))), "holds values that are not finite"),
}  # fmt: skip


@lfs
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(hub: HubServer, name: str, files: Files, model: PointPeftModel, expected: Tensor) -> None:
    """Both an adapted model and a plain backbone refuse; the repository with the right files loads afterwards."""
    change, match = HOSTILE[name]
    hostile = dict(files)
    change(hostile)
    hub.put(REPO, hostile)
    base = SIMPLE.build()
    before = fingerprint(base)
    with must_end(LONG, signal.ITIMER_REAL):
        refused(model, match, PointPeftError)
        with pytest.raises((AdapterFileError, HubError), match=match) as caught:
            PointPeftModel.from_pretrained(base, REPO)
    one_sentence(caught.value)
    assert fingerprint(base) == before
    hub.put(REPO, files)
    assert torch.equal(logits(), expected)


@lfs
@pytest.mark.parametrize(("name", "size"), [(CONFIG_FILE, 1 << 30), (TENSOR_FILE, 5 << 30), (TENSOR_FILE, None)])
def test_too_large_is_refused_before_anything_is_downloaded(
    hub: HubServer, name: str, size: Any, files: Files, model: PointPeftModel, tmp_path: Path
) -> None:
    hub.put(REPO, files)
    listed: Any = hub.repo(REPO).commit("main").files
    listed[name] = replace(listed[name], size=size)
    refused(model, f"'{name}' of 'alice/adapter' has .* bytes, at most .* are read: nothing was downloaded")
    assert hub.seen(".*", "resolve") == [] and not (tmp_path / "home" / "hub").exists()


def another_size() -> nn.Module:
    return BACKBONES["point_bert"].build()


def other_values() -> nn.Module:
    base = SIMPLE.build()
    with torch.no_grad():
        next(base.parameters()).view(-1)[0] += 1
    return base


def other_classes() -> nn.Module:
    base = SIMPLE.build()
    head = base.get_submodule("cls_head_finetune")
    assert isinstance(head, nn.Sequential)
    last = head[-1]
    assert isinstance(last, nn.Linear)
    head[-1] = nn.Linear(last.in_features, last.out_features + 2)
    return base


def no_point_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another backbone": (another_size, "does not fit|another backbone|has not|needs|made for other modules"),
    "other weights of the backbone": (other_values, "belongs to other weights of the backbone: .* load the checkpoint"),
    "no backbone at all": (no_point_model, "the adapter has its own 'cls_head_finetune', this model has not"),
}


@lfs
@pytest.mark.parametrize("name", BASES)
def test_wrong_bases(hub: HubServer, name: str, files: Files) -> None:
    build, match = BASES[name]
    hub.put(REPO, files)
    base = build()
    before = fingerprint(base)
    with pytest.raises(AdapterFileError, match=match) as caught:
        PointPeftModel.from_pretrained(base, REPO)
    one_sentence(caught.value)
    assert fingerprint(base) == before


@lfs
def test_an_adapter_without_a_head_needs_the_bases_classes(hub: HubServer) -> None:
    adapt(SIMPLE, LoraConfig(modules_to_save=[])).push_to_hub(REPO)
    base = other_classes()
    before = fingerprint(base)
    with pytest.raises(
        AdapterFileError, match="this adapter belongs to another backbone: .* names or shapes"
    ) as caught:
        PointPeftModel.from_pretrained(base, REPO)
    one_sentence(caught.value)
    assert fingerprint(base) == before


@lfs
def test_an_adapter_with_a_head_brings_its_own_classes(hub: HubServer, files: Files, expected: Tensor) -> None:
    hub.put(REPO, files)
    assert torch.equal(run(PointPeftModel.from_pretrained(other_classes(), REPO).eval(), SIMPLE), expected)
