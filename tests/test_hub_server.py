"""The Hub of the tests against the real client: what it must answer, in LFS and in Xet mode."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hanging import LONG, until
from tests.hub_server import HubServer

pytest_plugins = ["tests.hub_fixture"]

REPO = "alice/adapter"
CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 40
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
LISTING = "^/api/models([?]|$)"

lfs_mode = pytest.mark.parametrize("hub", ["lfs"], indirect=True)


def api() -> HfApi:
    return HfApi()


# Repositories


@lfs_mode
def test_create_repo(hub: HubServer) -> None:
    created = api().create_repo("adapter", private=True)
    assert (created.repo_id, str(created)) == (REPO, f"{hub.url}/{REPO}")
    assert hub.repo(REPO).private
    assert api().create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409") as refused:
        api().create_repo(REPO)
    assert refused.value.response.status_code == 409
    assert not hub.repo(api().create_repo("alice/open").repo_id).private
    with pytest.raises(HfHubHTTPError, match="403"):
        api().create_repo("bob/adapter")
    assert [commit.title for commit in hub.commits(REPO)] == ["initial commit"]


# Sending


def test_a_commit_adds_and_replaces(hub: HubServer) -> None:
    hub.put(REPO, {"adapter_config.json": b"{}"})
    operations = [CommitOperationAdd(name, content) for name, content in FILES.items()]
    info = api().create_commit(REPO, operations, commit_message="Replace", commit_description="All of it")
    assert hub.files(REPO) == {".gitattributes": hub.files(REPO)[".gitattributes"], **FILES}
    newest = hub.commits(REPO)[0]
    assert (newest.oid, newest.title, newest.message, newest.author) == (info.oid, "Replace", "All of it", "alice")


def test_parent_commit_must_be_the_newest(hub: HubServer) -> None:
    first = hub.put(REPO, FILES)
    add = [CommitOperationAdd("adapter_config.json", b"{}")]
    second = api().create_commit(REPO, add, commit_message="Second", parent_commit=first.oid)
    add = [CommitOperationAdd("adapter_config.json", b"[]")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api().create_commit(REPO, add, commit_message="Third", parent_commit=first.oid)
    assert hub.commits(REPO)[0].oid == second.oid


@lfs_mode
def test_a_large_file_that_the_hub_has_is_not_uploaded_again(hub: HubServer) -> None:
    hub.put("alice/other", FILES)
    api().create_repo(REPO)
    api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="adapter_model.safetensors", repo_id=REPO)
    assert not hub.seen("PUT", "/upload/")
    assert hub.files(REPO)["adapter_model.safetensors"] == WEIGHTS


def test_pull_requests(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    add = [CommitOperationAdd("adapter_model.safetensors", WEIGHTS[::-1])]
    made = api().create_commit(REPO, add, commit_message="Better", create_pr=True, token="hf_bob")
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    add = [CommitOperationAdd("notes.txt", b"more")]
    api().create_commit(REPO, add, commit_message="More", revision="refs/pr/1", token="hf_bob")
    changed = {**hub.files(REPO), "notes.txt": b"more", "adapter_model.safetensors": WEIGHTS[::-1]}
    assert hub.files(REPO)["adapter_model.safetensors"] == WEIGHTS
    assert hub.files(REPO, "refs/pr/1") == changed
    assert Path(hf_hub_download(REPO, "notes.txt", revision="refs/pr/1")).read_bytes() == b"more"
    with pytest.raises(HfHubHTTPError, match="403"):
        api().merge_pull_request(REPO, 1, token="hf_bob")
    api().merge_pull_request(REPO, 1)
    assert hub.files(REPO) == changed


# Revisions


def test_branches_and_tags(hub: HubServer) -> None:
    first = hub.put(REPO, FILES)
    api().create_branch(REPO, branch="exp/a")
    api().create_tag(REPO, tag="v1")
    api().upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id=REPO, revision="exp/a")
    read = {
        revision: Path(hf_hub_download(REPO, "adapter_config.json", revision=revision)).read_bytes()
        for revision in ("main", "exp/a", "v1", first.oid)
    }
    assert read == {"main": CONFIG, "exp/a": b"{}", "v1": CONFIG, first.oid: CONFIG}
    refs = api().list_repo_refs(REPO)
    assert ([branch.name for branch in refs.branches], refs.tags[0].target_commit) == (["exp/a", "main"], first.oid)
    with pytest.raises(HfHubHTTPError, match="409"):
        api().create_branch(REPO, branch="exp/a")
    with pytest.raises(HfHubHTTPError, match="409"):
        api().create_tag(REPO, tag="v1")
    with pytest.raises(BadRequestError):
        api().create_branch(REPO, branch="refs/pr/5")


@lfs_mode
def test_revision_that_does_not_exist(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with pytest.raises(RevisionNotFoundError):
        api().model_info(REPO, revision="none")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "adapter_config.json", revision="none")
    with pytest.raises(RevisionNotFoundError):
        api().upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id=REPO, revision="none")


# Reading


def test_model_info(hub: HubServer) -> None:
    commit = hub.put(REPO, FILES)
    info = api().model_info(REPO, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (REPO, commit.oid, False, False)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert siblings["adapter_config.json"].size == len(CONFIG)
    lfs = siblings["adapter_model.safetensors"].lfs
    assert lfs and (lfs.size, lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert api().model_info(REPO, revision=commit.oid).sha == commit.oid


def test_hf_hub_download_keeps_files(hub: HubServer) -> None:
    commit = hub.put(REPO, FILES)
    for name, content in FILES.items():
        path = Path(hf_hub_download(REPO, name))
        assert path.read_bytes() == content
        assert path.parent.name == commit.oid
    asked = len(hub.log)
    hf_hub_download(REPO, "adapter_config.json", revision=commit.oid)
    assert len(hub.log) == asked
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "none.json")


@lfs_mode
def test_range_of_a_file(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    for name, content in FILES.items():
        url = f"{hub.url}/{REPO}/resolve/main/{name}"
        part = httpx2.get(url, headers={"Range": "bytes=3-7"}, follow_redirects=True)
        assert (part.status_code, part.content) == (206, content[3:8])
        assert part.headers["Content-Range"] == f"bytes 3-7/{len(content)}"
        assert httpx2.get(url, headers={"Range": "bytes=99999-"}, follow_redirects=True).status_code == 416


def test_a_client_without_xet_reads_what_one_with_it_has_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    api().create_repo(REPO)
    api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="adapter_model.safetensors", repo_id=REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    assert Path(hf_hub_download(REPO, "adapter_model.safetensors")).read_bytes() == WEIGHTS


# The card


@lfs_mode
def test_card_with_bad_metadata_is_refused(hub: HubServer, tmp_path: Path) -> None:
    api().create_repo(REPO)
    bad = b"---\nlicense:\n\tmit\n---\n"
    with pytest.raises(ValueError, match="tabs must not be used"):
        api().upload_file(path_or_fileobj=bad, path_in_repo="README.md", repo_id=REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api().upload_file(path_or_fileobj=b"# Adapter", path_in_repo="README.md", repo_id=REPO)


# Who may what


@lfs_mode
def test_private_repository(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.repo(REPO).private = True
    assert api().model_info(REPO).private
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            api().model_info(REPO, token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, "adapter_config.json", token=token)


def test_gated_repository(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.repo(REPO).gated = "auto"
    for token in (False, "hf_bob"):
        assert api().model_info(REPO, token=token).gated == "auto"
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "adapter_model.safetensors", token=token)
    hub.repo(REPO).granted.add("bob")
    assert Path(hf_hub_download(REPO, "adapter_model.safetensors", token="hf_bob")).read_bytes() == WEIGHTS


@lfs_mode
def test_wrong_token(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        api().model_info(REPO, token="hf_nobody")
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_only_the_owner_writes(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="403"):
        api().upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="a.bin", repo_id=REPO, token="hf_bob")
    with pytest.raises(HfHubHTTPError, match="401"):
        api().upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="a.bin", repo_id=REPO, token=False)
    assert "a.bin" not in hub.files(REPO)


def test_token_stays_at_the_hub(hub: HubServer) -> None:
    api().create_repo(REPO, private=True)
    api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="adapter_model.safetensors", repo_id=REPO)
    hf_hub_download(REPO, "adapter_model.safetensors")
    elsewhere = [request for request in hub.log if request.origin == "cdn"]
    assert bool(elsewhere) == (hub.xet is None)
    assert {request.token for request in elsewhere} <= {None}
    assert {request.who for request in hub.seen("POST|HEAD", "/api/|/resolve/")} == {"alice"}


# Faults


@lfs_mode
def test_503_is_tried_again(hub: HubServer, naps: list[float]) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", LISTING, times=2, status=503)
    assert [model.id for model in api().list_models()] == [REPO]
    assert naps == [1, 2]


@lfs_mode
def test_a_hub_that_says_when_to_come_again(hub: HubServer, naps: list[float]) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", LISTING, status=429, headers={"Retry-After": "30"})
    assert [model.id for model in api().list_models()] == [REPO]
    assert naps == [31]


@lfs_mode
def test_500_of_a_download_is_raised_at_once(hub: HubServer, naps: list[float]) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "/files/.*/adapter_model", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        hf_hub_download(REPO, "adapter_model.safetensors")
    assert not naps


def test_dropped_connection(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", f"/api/models/{REPO}$", drop=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        api().model_info(REPO)
    assert api().model_info(REPO).id == REPO


def test_lost_answer_of_a_commit(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("POST", "/commit/", truncate=0)
    with pytest.raises(httpx2.RemoteProtocolError):
        api().upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id=REPO)
    assert hub.files(REPO)["adapter_config.json"] == b"{}"


@lfs_mode
def test_truncated_body(hub: HubServer, naps: list[float]) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "adapter_model", times=2, truncate=100)
    assert Path(hf_hub_download(REPO, "adapter_model.safetensors")).read_bytes() == WEIGHTS
    assert naps == [1, 1]
    hub.fault("GET", "adapter_config", times=99, truncate=3)
    with pytest.raises(httpx2.RemoteProtocolError):
        hf_hub_download(REPO, "adapter_config.json")


@lfs_mode
def test_corrupt_body_of_the_same_size_goes_unnoticed(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "adapter_model", corrupt=True)
    path = Path(hf_hub_download(REPO, "adapter_model.safetensors"))
    assert (path.stat().st_size, path.read_bytes() == WEIGHTS) == (len(WEIGHTS), False)
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()


def test_tampered_content(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    for name, content in FILES.items():
        hub.tamper(REPO, name, content[::-1])
        assert Path(hf_hub_download(REPO, name)).read_bytes() == content[::-1]


@lfs_mode
def test_delay(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "/api/models/", delay=2 * LONG)
    with pytest.raises(httpx2.ReadTimeout):
        api().model_info(REPO, timeout=0.1)


@lfs_mode
def test_headers(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("HEAD", "adapter_config", times=2, headers={"X-Repo-Commit": None})
    with pytest.raises(LocalEntryNotFoundError, match="X-Repo-Commit"):
        hf_hub_download(REPO, "adapter_config.json")


# The server itself


def test_stop_closes_what_clients_keep_open(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "/refs", delay=2 * LONG)
    ended = []

    def wait() -> None:
        try:
            httpx2.get(f"{hub.url}/api/models/{REPO}/refs", timeout=LONG)
        except httpx2.TransportError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    api().model_info(REPO)
    until(lambda: bool(hub.seen("GET", "/refs")))
    hub.stop()
    waiting.join(LONG)
    assert ended, "the client waits for the answer that comes late"
    with pytest.raises(httpx2.ConnectError):
        api().model_info(REPO)


@lfs_mode
def test_commits_at_the_same_time_are_all_kept(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send_step, step) for step in range(16)]
        oids = {commit.result().oid for commit in sent}
    assert {commit.oid for commit in hub.commits(REPO)[:16]} == oids
    assert hub.files(REPO) == {
        **hub.files(REPO, hub.commits(REPO)[16].oid),
        **{f"{n}.txt": b"%d" % n for n in range(16)},
    }


def send_step(step: int) -> CommitInfo:
    return api().upload_file(path_or_fileobj=b"%d" % step, path_in_repo=f"{step}.txt", repo_id=REPO)


@lfs_mode
def test_every_test_has_a_home_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    hub.put(REPO, FILES)
    assert Path(hf_hub_download(REPO, "adapter_config.json")).is_relative_to(tmp_path)
    assert os.environ["HF_HOME"] == str(tmp_path / "home")
    assert os.environ["HF_ENDPOINT"] == hub.url
    assert not {"HTTP_PROXY", "https_proxy"} & set(os.environ)
