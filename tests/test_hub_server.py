"""The Hub of the tests against the real client: what it must answer, in LFS, multipart and Xet mode."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    RepoFile,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import HubServer

pytest_plugins = ["tests.hub_fixture"]

REPO = "alice/adapter"
CONFIG = b'{"peft_type": "LORA"}'
WEIGHTS = bytes(range(256)) * 40
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
CARD = "---\nlicense: mit\n---\n\n# Adapter\n"

every_mode = pytest.mark.parametrize("hub", ["lfs", "multipart", "xet"], indirect=True)
lfs_mode = pytest.mark.parametrize("hub", ["lfs"], indirect=True)
xet_mode = pytest.mark.parametrize("hub", ["xet"], indirect=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(CARD)
    return folder


def api() -> HfApi:
    return HfApi()


def without_hub_files(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


# Repositories


@lfs_mode
def test_whoami_names_the_user_of_the_token(hub: HubServer) -> None:
    assert api().whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        api().whoami(token="hf_nobody")


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


@lfs_mode
def test_data_sets_are_repositories_of_their_own(hub: HubServer) -> None:
    api().create_repo(REPO, repo_type="dataset")
    api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="clouds.npz", repo_id=REPO, repo_type="dataset")
    assert hub.files(REPO, kind="datasets")["clouds.npz"] == WEIGHTS
    assert Path(hf_hub_download(REPO, "clouds.npz", repo_type="dataset")).read_bytes() == WEIGHTS
    assert not api().repo_exists(REPO)


@lfs_mode
def test_delete_repo(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="403"):
        api().delete_repo(REPO, token="hf_bob")
    api().delete_repo(REPO)
    assert not api().repo_exists(REPO)


@lfs_mode
def test_exists(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    assert api().repo_exists(REPO) and not api().repo_exists("alice/none")
    assert api().file_exists(REPO, "adapter_config.json") and not api().file_exists(REPO, "none")
    assert api().revision_exists(REPO, "main") and not api().revision_exists(REPO, "none")


@lfs_mode
def test_settings(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    api().update_repo_settings(REPO, private=True, gated="manual")
    assert (hub.repo(REPO).private, hub.repo(REPO).gated) == (True, "manual")
    info = api().model_info(REPO)
    assert (info.private, info.gated) == (True, "manual")


# Sending


@every_mode
def test_upload_folder(hub: HubServer, folder: Path) -> None:
    api().create_repo(REPO)
    info = api().upload_folder(repo_id=REPO, folder_path=folder, commit_message="Push")
    assert without_hub_files(hub.files(REPO)) == {**FILES, "README.md": CARD.encode()}
    newest = hub.commits(REPO)[0]
    assert (newest.oid, newest.title, newest.author) == (info.oid, "Push", "alice")


@every_mode
def test_upload_file_of_a_path_of_bytes_and_of_an_open_file(hub: HubServer, folder: Path) -> None:
    api().create_repo(REPO)
    weights = folder / "adapter_model.safetensors"
    api().upload_file(path_or_fileobj=weights, path_in_repo="a.safetensors", repo_id=REPO)
    api().upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="b.safetensors", repo_id=REPO)
    with weights.open("rb") as opened:
        api().upload_file(path_or_fileobj=opened, path_in_repo="c/d.safetensors", repo_id=REPO)
    sent = {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[::-1], "c/d.safetensors": WEIGHTS}
    assert without_hub_files(hub.files(REPO)) == sent


@every_mode
def test_create_commit_adds_and_deletes(hub: HubServer, folder: Path) -> None:
    hub.put(REPO, {"old.json": b"{}", "logs/1.txt": b"1", "logs/2.txt": b"2"})
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd("adapter_model.safetensors", folder / "adapter_model.safetensors"),
        CommitOperationAdd("adapter_config.json", CONFIG),
        CommitOperationDelete("old.json"),
        CommitOperationDelete("logs/"),
    ]
    api().create_commit(REPO, operations, commit_message="Replace", commit_description="All of it")
    assert without_hub_files(hub.files(REPO)) == FILES
    assert hub.commits(REPO)[0].message == "All of it"


def test_parent_commit_must_be_the_newest(hub: HubServer) -> None:
    first = hub.put(REPO, FILES)
    add = [CommitOperationAdd("adapter_config.json", b"{}")]
    second = api().create_commit(REPO, add, commit_message="Second", parent_commit=first.oid)
    add = [CommitOperationAdd("adapter_config.json", b"[]")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api().create_commit(REPO, add, commit_message="Third", parent_commit=first.oid)
    assert hub.commits(REPO)[0].oid == second.oid


def test_what_has_not_changed_is_not_sent_again(hub: HubServer, folder: Path) -> None:
    hub.put(REPO, {**FILES, "README.md": CARD.encode()})
    before = hub.commits(REPO)[0].oid
    assert api().upload_folder(repo_id=REPO, folder_path=folder).oid == before
    assert not hub.seen("POST", "/commit/")


@lfs_mode
def test_a_large_file_that_the_hub_has_is_not_uploaded_again(hub: HubServer) -> None:
    hub.put("alice/other", FILES)
    api().create_repo(REPO)
    api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="adapter_model.safetensors", repo_id=REPO)
    assert not hub.seen("PUT", "/upload/")
    assert hub.files(REPO)["adapter_model.safetensors"] == WEIGHTS


@pytest.mark.parametrize("hub", ["multipart"], indirect=True)
def test_multipart_sends_parts(hub: HubServer) -> None:
    api().create_repo(REPO)
    api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="adapter_model.safetensors", repo_id=REPO)
    assert len(hub.seen("PUT", "/upload/")) == 3
    assert len(hub.seen("POST", "/multipart/")) == 1


@lfs_mode
def test_xet_client_needs_xet_tokens(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    api().create_repo(REPO)
    with pytest.raises(ConnectionError, match="xet-write-token"):
        api().upload_file(path_or_fileobj=WEIGHTS, path_in_repo="adapter_model.safetensors", repo_id=REPO)


def test_pull_requests(hub: HubServer, folder: Path) -> None:
    hub.put(REPO, {"adapter_config.json": b"{}"})
    info = api().upload_folder(repo_id=REPO, folder_path=folder, create_pr=True, token="hf_bob")
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    assert hub.files(REPO)["adapter_config.json"] == b"{}"
    assert hub.files(REPO, "refs/pr/1")["adapter_model.safetensors"] == WEIGHTS
    assert Path(hf_hub_download(REPO, "adapter_config.json", revision="refs/pr/1")).read_bytes() == CONFIG
    details = api().get_discussion_details(REPO, 1)
    assert (details.author, details.status, details.is_pull_request) == ("bob", "open", True)
    assert [ref.ref for ref in api().list_repo_refs(REPO, include_pull_requests=True).pull_requests or []] == [
        "refs/pr/1"
    ]
    with pytest.raises(HfHubHTTPError, match="403"):
        api().merge_pull_request(REPO, 1, token="hf_bob")
    api().merge_pull_request(REPO, 1)
    assert hub.files(REPO)["adapter_config.json"] == CONFIG
    assert api().get_discussion_details(REPO, 1).status == "merged"


def test_create_commit_and_create_pull_request_open_pull_requests(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    add = [CommitOperationAdd("adapter_model.safetensors", WEIGHTS[::-1])]
    assert api().create_commit(REPO, add, commit_message="Better", create_pr=True).pr_revision == "refs/pr/1"
    assert api().create_pull_request(REPO, title="Empty").num == 2
    api().change_discussion_status(REPO, 2, "closed")
    assert api().get_discussion_details(REPO, 2).status == "closed"
    add = [CommitOperationAdd("notes.txt", b"more")]
    api().create_commit(REPO, add, commit_message="More", revision="refs/pr/1")
    changed = {"notes.txt": b"more", "adapter_model.safetensors": WEIGHTS[::-1]}
    assert hub.files(REPO, "refs/pr/1") == {**hub.files(REPO), **changed}


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
    api().delete_branch(REPO, branch="exp/a")
    api().delete_tag(REPO, tag="v1")
    assert not api().revision_exists(REPO, "v1")


@lfs_mode
def test_list_repo_commits_goes_through_the_pages(hub: HubServer) -> None:
    oids = [hub.put(REPO, {"step.txt": b"%d" % step}).oid for step in range(5)]
    assert [commit.commit_id for commit in api().list_repo_commits(REPO)][:-1] == oids[::-1]
    assert len(hub.seen("GET", "/commits/")) == 2


@lfs_mode
def test_revision_that_does_not_exist(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    for ask in (api().model_info, api().list_repo_files, snapshot_download):
        with pytest.raises(RevisionNotFoundError):
            ask(REPO, revision="none")
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


@lfs_mode
def test_list_repo_files_goes_through_the_pages(hub: HubServer) -> None:
    names = [f"folder/{number}.json" for number in range(8)]
    hub.put(REPO, dict.fromkeys(names, b"{}"))
    assert api().list_repo_files(REPO) == [".gitattributes", *names]
    assert len(hub.seen("GET", "/tree/")) == 4
    assert [entry.path for entry in api().list_repo_tree(REPO)] == [".gitattributes", "folder"]
    assert [entry.path for entry in api().list_repo_tree(REPO, "folder")] == names
    with pytest.raises(RemoteEntryNotFoundError):
        list(api().list_repo_tree(REPO, "none"))


def test_get_paths_info(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    (found,) = api().get_paths_info(REPO, ["adapter_model.safetensors", "none"])
    assert isinstance(found, RepoFile)
    assert (found.path, found.size) == ("adapter_model.safetensors", len(WEIGHTS))
    assert bool(found.xet_hash) == (hub.xet is not None)


@every_mode
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


def test_dry_run_tells_the_size_and_writes_nothing(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    info = hf_hub_download(REPO, "adapter_model.safetensors", dry_run=True)
    assert (info.file_size, info.is_cached) == (len(WEIGHTS), False)
    assert [request.method for request in hub.log] == ["HEAD"]
    assert not Path(info.local_path).exists()


def test_snapshot_download(hub: HubServer, tmp_path: Path) -> None:
    hub.put(REPO, {**FILES, "logs/1.txt": b"1"})
    path = Path(snapshot_download(REPO, allow_patterns=["adapter_*"]))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES
    snapshot_download(REPO, local_dir=tmp_path / "local")
    assert (tmp_path / "local/logs/1.txt").read_bytes() == b"1"
    assert [repo.repo_id for repo in scan_cache_dir().repos] == [REPO]


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


def test_model_card(hub: HubServer) -> None:
    api().create_repo(REPO)
    ModelCard(CARD).push_to_hub(REPO)
    assert hub.files(REPO)["README.md"].decode() == CARD
    assert ModelCard.load(REPO).data.license == "mit"


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
        assert not api().repo_exists(REPO, token=token)


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


@every_mode
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
    hub.fault("GET", "/tree/main", times=2, status=503)
    assert "adapter_config.json" in api().list_repo_files(REPO)
    assert naps == [1, 2]


@lfs_mode
def test_a_hub_that_says_when_to_come_again(hub: HubServer, naps: list[float]) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "/tree/main", status=429, headers={"Retry-After": "30"})
    api().list_repo_files(REPO)
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
def test_corrupt_body_of_the_same_size_goes_unnoticed_until_verified(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "adapter_model", corrupt=True)
    path = Path(hf_hub_download(REPO, "adapter_model.safetensors"))
    assert (path.stat().st_size, path.read_bytes() == WEIGHTS) == (len(WEIGHTS), False)
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    hf_hub_download(REPO, "adapter_config.json")
    checked = api().verify_repo_checksums(REPO)
    assert [mismatch["path"] for mismatch in checked.mismatches] == ["adapter_model.safetensors"]


def test_tampered_content(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    for name, content in FILES.items():
        hub.tamper(REPO, name, content[::-1])
        assert Path(hf_hub_download(REPO, name)).read_bytes() == content[::-1]
    checked = api().verify_repo_checksums(REPO)
    assert {mismatch["path"] for mismatch in checked.mismatches} == set(FILES)


@lfs_mode
def test_delay(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "/api/models/", delay=60)
    with pytest.raises(httpx2.ReadTimeout):
        api().model_info(REPO, timeout=0.1)


@lfs_mode
def test_headers(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("HEAD", "adapter_config", times=2, headers={"X-Repo-Commit": None})
    with pytest.raises(LocalEntryNotFoundError, match="X-Repo-Commit"):
        hf_hub_download(REPO, "adapter_config.json")


# The server itself


def test_stop_is_quick_and_closes_what_clients_keep_open(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fault("GET", "/refs", delay=60)
    ended = []

    def wait() -> None:
        try:
            httpx2.get(f"{hub.url}/api/models/{REPO}/refs")
        except httpx2.TransportError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    api().model_info(REPO)
    while not hub.seen("GET", "/refs"):
        time.sleep(0.001)
    start = time.monotonic()
    hub.stop()
    waiting.join()
    assert time.monotonic() - start < 1
    assert ended
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
def test_hostile_names_reach_the_client(hub: HubServer) -> None:
    hub.put(REPO, {"../../evil": b"x", "é\r\nX: y": b"{}"})
    assert not api().file_exists(REPO, "é\r\nX: z")
    with pytest.raises(ValueError, match="evil"):
        snapshot_download(REPO)


@lfs_mode
def test_every_test_has_a_home_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    hub.put(REPO, FILES)
    assert Path(hf_hub_download(REPO, "adapter_config.json")).is_relative_to(tmp_path)
    assert os.environ["HF_HOME"] == str(tmp_path / "home")
    assert os.environ["HF_ENDPOINT"] == hub.url
    assert not {"HTTP_PROXY", "https_proxy"} & set(os.environ)
