"""Adapters on the Hugging Face Hub: what one load downloads and checks, what one push commits.

The client is huggingface_hub's. What it does not check is checked here: that a revision is a name and not a path, that
files have the size and the digest that the Hub states, that both come from one commit, and that they are small enough
before a byte is fetched. What can be tried again is tried again; all else is a `HubError` that says what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is of the client's HTTP library
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from point_peft.errors import HubError, quoted
from point_peft.state import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, MAX_TENSOR_BYTES, TENSOR_FILE
from point_peft.version import __version__

T = TypeVar("T")
Token = str | bool | None

LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, TENSOR_FILE: MAX_TENSOR_BYTES}
"""The files of an adapter that are read, and how large they may be."""
TIMEOUT = 10.0
"""Seconds that the Hub has to say what a repository holds; its client would wait for ever."""
PAUSES = (1.0, 2.0)
"""Seconds between tries where the Hub fails for a moment."""
_PATH = re.compile(r"[A-Za-z0-9._\-][A-Za-z0-9._/\-]{0,249}")
_PULL_REQUEST = re.compile(r"refs/pr/[0-9]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]+")
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
LIBRARY = "point-peft"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """What the Hub says of a file."""

    name: str
    size: int
    sha256: str | None
    """Of a large file."""
    blob: str | None
    """Its git digest, of any file."""


# ---- names -----------------------------------------------------------------------------------------------------------


def is_repo_id(name: object) -> bool:
    """Whether a string is a repository's name, and not a path: one or two words without a leading dot."""
    if not isinstance(name, str) or name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_names(repo_id: str, revision: str | None, subfolder: str | None, token: Token = None) -> None:
    """Raise `HubError` for what is no repository, revision, folder in one, or token."""
    if not is_repo_id(repo_id):
        raise HubError(f"{quoted(repo_id)} is not a repository of the Hub: write 'owner/name'")
    for what, value in (("revision", revision), ("subfolder", subfolder)):
        if value is not None and not _is_path(value):
            raise HubError(
                f"{what} is {quoted(value)}; allowed: letters, digits, '.', '_', '-' and, in between, '/', but no '..'"
            )
    if isinstance(token, str) and not _TOKEN.fullmatch(token):
        raise HubError("the token has characters that no token has: copy it again, without spaces or line ends")


def _is_path(value: object) -> bool:
    """Whether a string names something within a repository, and nothing outside."""
    return (
        isinstance(value, str)
        and _PATH.fullmatch(value) is not None
        and ".." not in value
        and all(part.strip(".") for part in value.split("/"))
    )


# ---- pulling ---------------------------------------------------------------------------------------------------------


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A folder of the cache with the files of an adapter, all of the same commit, checked against what the Hub states.

    Where the Hub cannot be reached, what the cache holds is used, with a warning; where it refuses, nothing is.
    """
    check_names(repo_id, revision, subfolder, token)
    prefix = f"{subfolder}/" if subfolder else ""
    if local_files_only or constants.HF_HUB_OFFLINE:
        return _cached(repo_id, revision, prefix, cache_dir, "local_files_only or HF_HUB_OFFLINE is set")
    try:
        info = _asked(repo_id, revision, lambda: _info(repo_id, revision, token))
    except _Unreachable as error:
        if force_download:
            raise HubError(f"'{repo_id}' could not be downloaded: {error}. Try again") from error
        folder = _cached(repo_id, revision, prefix, cache_dir, str(error))
        sha = _snapshot(folder, prefix).name
        warnings.warn(f"{error}: '{repo_id}' is taken from the cache, commit {sha}", stacklevel=3)
        return folder
    files = _files(info, repo_id, prefix)
    paths = [
        _fetched(repo_id, str(info.sha), file, token=token, cache_dir=cache_dir, force=force_download) for file in files
    ]
    _remember(_snapshot(paths[0].parent, prefix), revision)
    return paths[0].parent


def _info(repo_id: str, revision: str | None, token: Token) -> huggingface_hub.ModelInfo:
    """What the Hub says of a repository at a revision; its answer may be any."""
    api = huggingface_hub.HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    try:
        info = api.model_info(repo_id, revision=revision, timeout=TIMEOUT, files_metadata=True)
    except (LookupError, TypeError, AttributeError) as error:
        raise _Unreachable(f"{_no_hub()}: its answer lacks {_first_line(error)}") from error
    if not _COMMIT.fullmatch(str(info.sha)):
        raise _Unreachable(f"{_no_hub()}: its commit is {quoted(info.sha)}")
    return info


def _files(info: huggingface_hub.ModelInfo, repo_id: str, prefix: str) -> list[HubFile]:
    """What the Hub says of the files that are read, which must be there and small enough."""
    stated = {entry.rfilename: entry for entry in info.siblings or ()}
    found = []
    for name, limit in LIMITS.items():
        entry = stated.get(prefix + name)
        if entry is None:
            folders = sorted({path.rpartition("/")[0] for path in stated if path.endswith("/" + CONFIG_FILE)})
            other = f"; it has adapters in the subfolders {', '.join(map(quoted, folders[:10]))}" if folders else ""
            unsafe = sorted(p for p in stated if p.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
            if name == TENSOR_FILE and unsafe:
                other = f"; it has {quoted(unsafe[0])}, but only safetensors are read"
            raise HubError(f"'{repo_id}' has no file '{prefix + name}' at commit {info.sha}{other}")
        if entry.size is None or entry.size > limit:
            size = "an unknown number of" if entry.size is None else f"{entry.size:,}"
            raise HubError(
                f"'{prefix + name}' of '{repo_id}' has {size} bytes, at most {limit:,} are read: nothing was downloaded"
            )
        sha256 = entry.lfs.sha256 if entry.lfs is not None else None
        found.append(HubFile(name=prefix + name, size=entry.size, sha256=sha256, blob=entry.blob_id))
    return found


def _fetched(repo_id: str, sha: str, file: HubFile, *, token: Token, cache_dir: str | Path | None, force: bool) -> Path:
    """A file in the cache; what is there and is not what the Hub states is fetched again, once."""

    def fetch(again: bool) -> Path | None:
        path = Path(
            huggingface_hub.hf_hub_download(
                repo_id,
                file.name,
                revision=sha,
                token=token,
                cache_dir=cache_dir,
                force_download=again,
                etag_timeout=TIMEOUT,
                library_name=LIBRARY,
                library_version=__version__,
            )
        )
        if _is_what_is_stated(path, file):
            return path
        _forget(path, cache=Path(cache_dir or constants.HF_HUB_CACHE))
        return None

    for again in (force, True):
        try:
            path = _asked(repo_id, sha, partial(fetch, again))
        except _Unreachable as error:
            raise HubError(f"'{file.name}' of '{repo_id}' could not be downloaded: {error}. Try again") from error
        if path is not None:
            return path
    raise HubError(
        f"'{file.name}' of '{repo_id}' arrived damaged twice: it is not what the Hub states at commit {sha}. It was "
        "taken out of the cache; try again, or ask the owner to push it again"
    )


def _is_what_is_stated(path: Path, file: HubFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return _sha256(path) == file.sha256
    return file.blob is None or _git_digest(path) == file.blob


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _git_digest(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _forget(path: Path, cache: Path) -> None:
    """Take a file out of the cache: the entry of the snapshot and what it links to, but nothing outside."""
    targets = [path]
    while targets[-1].is_symlink():
        targets.append(targets[-1].parent / os.readlink(targets[-1]))
    for target in targets:
        if target.parent.resolve().is_relative_to(cache.resolve()):
            target.unlink(missing_ok=True)


def _snapshot(folder: Path, prefix: str) -> Path:
    """The folder of the cache, named by its commit, that a folder of an adapter is in."""
    return folder.parents[prefix.count("/") - 1] if prefix else folder


def _remember(snapshot: Path, revision: str | None) -> None:
    """Note in the cache, as the client does, which commit a revision is: there the cache is asked without the Hub.

    The client does so for a revision that it is given; here it is given the commit.
    """
    if revision == snapshot.name:
        return
    note = snapshot.parents[1] / "refs" / (revision or constants.DEFAULT_REVISION)
    # A cache may be read-only.
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.{os.getpid()}.tmp")
        temporary.write_text(snapshot.name, encoding="utf-8")
        os.replace(temporary, note)


def _cached(repo_id: str, revision: str | None, prefix: str, cache_dir: str | Path | None, why: str) -> Path:
    """The folder of the cache that holds both files of one commit; they must be what their names in it say."""
    found = [huggingface_hub.try_to_load_from_cache(repo_id, prefix + name, cache_dir, revision) for name in LIMITS]
    paths = [Path(path) for path in found if isinstance(path, str)]
    if len(paths) < len(LIMITS) or len({path.parent for path in paths}) > 1:
        at = f" at revision {quoted(revision)}" if revision else ""
        raise HubError(
            f"'{prefix}{CONFIG_FILE}' of '{repo_id}'{at} is not in the cache, and was not asked for on the Hub: {why}"
        )
    for path in paths:
        # The cache names what it holds by its digest, so that damage shows without the Hub. Where there are no links,
        # it has copies under the files' own names, of which nothing can be said.
        if not path.is_symlink():
            continue
        name = Path(os.readlink(path)).name
        actual = {64: _sha256, 40: _git_digest}.get(len(name))
        if actual is None or actual(path) != name:
            raise HubError(
                f"'{prefix}{path.name}' of '{repo_id}' is damaged in the cache ('{path}'), and the Hub was not asked: "
                f"{why}. Load it with force_download=True once the Hub can be reached"
            )
    return paths[0].parent


# ---- errors ----------------------------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """The Hub gave no answer; the message says how it failed."""


def _asked(repo_id: str, revision: str | None, ask: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """What the Hub answers; refusals are `HubError`s that say what to do, failures are tried again."""
    at = f" at revision {quoted(revision)}" if revision else ""
    for pause in (*pauses, None):
        try:
            return ask()
        except GatedRepoError as error:
            raise HubError(
                f"'{repo_id}' is gated: accept its conditions at {constants.ENDPOINT}/{repo_id} and pass a token of "
                "that account"
            ) from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"there is no repository '{repo_id}' that can be seen: check the name; if it is private, pass a token "
                "that may read it, or run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise HubError(
                f"'{repo_id}' has no revision {quoted(revision)}: name a branch, a tag or a commit"
            ) from error
        except LocalTokenNotFoundError as error:
            raise HubError(
                "token=True asks for the token of a login, and there is none: run `hf auth login`"
            ) from error
        except LocalEntryNotFoundError as error:
            # The client tells in what it was raised from why it could not ask.
            failure = _failure(error.__cause__ or error)
        except EntryNotFoundError as error:
            raise HubError(f"'{repo_id}'{at} lacks a file: {_first_line(error)}") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise HubError(
                    f"the Hub refuses '{repo_id}' ({status}): the token is wrong or may not do this; pass another, or "
                    "run `hf auth login`"
                ) from error
            if status not in _BUSY:
                raise HubError(f"the Hub answers {status} for '{repo_id}'{at}: {_first_line(error)}") from error
            failure = _failure(error)
        except json.JSONDecodeError:
            failure = f"{_no_hub()}: its answer is not JSON"
        except RuntimeError as error:
            # So the client wraps whatever happens while it uploads.
            failure = _failure(error.__cause__ or error)
        except (HTTPError, XetDownloadError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NETWORK):
                raise HubError(f"'{repo_id}': {error.strerror or error} ({error.filename or 'no file'})") from error
            failure = _failure(error)
        if pause is not None:
            time.sleep(pause)
    raise _Unreachable(failure)


def _no_hub() -> str:
    return f"what answers at {constants.ENDPOINT} is not a Hub"


def _failure(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answers {error.response.status_code}"
    return f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


# ---- pushing ---------------------------------------------------------------------------------------------------------


def push(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: Token = None,
    revision: str | None = None,
    create_pr: bool = False,
    merge_card: Callable[[str | None, str], str] | None = None,
) -> str:
    """Commit files, by their paths in the repository, all in one commit, and return its address.

    The repository and the branch are made if need be. `merge_card(existing, new)` gives the text of a `README.md` that
    goes over an existing one. A commit that came in between is taken in, so that nothing of it is lost.
    """
    check_names(repo_id, revision, None, token)
    for name in files:
        if not _is_path(name):
            raise HubError(
                f"{quoted(name)} cannot be a path in a repository: name the adapter with letters, digits, '.', '_', '-'"
            )
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"nothing was pushed to '{repo_id}': HF_HUB_OFFLINE is set")
    api = huggingface_hub.HfApi(token=token, library_name=LIBRARY, library_version=__version__)

    def asked(ask: Callable[[], T]) -> T:
        try:
            return _asked(repo_id, revision, ask)
        except _Unreachable as error:
            raise HubError(
                f"the push to '{repo_id}' failed: {error}. Push again; nothing is committed twice"
            ) from error

    asked(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if revision is not None and not create_pr:
        asked(lambda: _make_branch(api, repo_id, revision))

    def prepare() -> tuple[str, list[huggingface_hub.CommitOperationAdd]]:
        info = _info(repo_id, revision, token)
        if private and info.private is False:
            raise HubError(f"nothing was pushed: private is asked for, and '{repo_id}' exists and is public")
        contents = dict(files)
        for entry in info.siblings or ():
            name = entry.rfilename
            if merge_card is None or name not in files or name.rpartition("/")[2] != CARD_FILE:
                continue
            sha256 = entry.lfs.sha256 if entry.lfs is not None else None
            present = HubFile(name=name, size=entry.size or 0, sha256=sha256, blob=entry.blob_id)
            path = _fetched(repo_id, str(info.sha), present, token=token, cache_dir=None, force=False)
            contents[name] = _over(path.read_bytes(), files[name], merge_card)
        added = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents[name])
            for name in sorted(contents)
        ]
        return str(info.sha), added

    def send(parent: str, added: list[huggingface_hub.CommitOperationAdd]) -> str:
        try:
            made = api.create_commit(
                repo_id,
                added,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        except (HfHubHTTPError, json.JSONDecodeError):  # some are ValueErrors, but say nothing of what is pushed
            raise
        except ValueError as error:
            raise HubError(f"nothing was pushed to '{repo_id}': the Hub refuses it: {_first_line(error)}") from error
        return str(made.pr_url or made.commit_url)

    for _ in range(3):
        try:
            if not create_pr:
                # Prepared anew each time: if only the answer was lost, nothing is left to commit.
                return asked(lambda: send(*prepare()))
            prepared = asked(prepare)
            try:
                # Not sent again: a pull request whose answer is lost would be opened twice.
                return _asked(repo_id, revision, partial(send, *prepared), pauses=())
            except _Unreachable as error:
                raise HubError(
                    f"whether a pull request was opened is not known: {error}. Look at "
                    f"{constants.ENDPOINT}/{repo_id}/discussions before you push again"
                ) from error
        except HubError as error:
            # 412: somebody else has committed since; what is there now is read again.
            if not isinstance(error.__cause__, HfHubHTTPError) or error.__cause__.response.status_code != 412:
                raise
    raise HubError(f"nothing was pushed to '{repo_id}': others commit to it all the time. Push again")


def _make_branch(api: huggingface_hub.HfApi, repo_id: str, revision: str) -> None:
    """Make a branch if need be; what is none and cannot become one is refused."""
    if _PULL_REQUEST.fullmatch(revision):
        return
    refs = api.list_repo_refs(repo_id)
    if revision in {ref.name for ref in refs.branches}:
        return
    tag = revision in {ref.name for ref in refs.tags}
    if tag or _COMMIT.fullmatch(revision) or revision.startswith("refs/"):
        kind = "a tag" if tag else "a commit" if _COMMIT.fullmatch(revision) else "neither a branch nor a pull request"
        raise HubError(
            f"nothing was pushed to '{repo_id}': {quoted(revision)} is {kind}; push to a branch or refs/pr/N"
        )
    api.create_branch(repo_id, branch=revision, exist_ok=True)


def _over(present: bytes, new: bytes, merge: Callable[[str | None, str], str]) -> bytes:
    """The card that goes over the present one."""
    try:
        text = present.decode("utf-8")
    except UnicodeDecodeError as error:
        # The client sends no other card, and what its owner wrote is not to be lost.
        raise HubError(f"nothing was pushed: the repository's {CARD_FILE} is not in UTF-8; save it so first") from error
    return merge(text, new.decode("utf-8")).encode("utf-8")


# ---- finding ---------------------------------------------------------------------------------------------------------


def list_adapters(base_model: str, *, token: Token = None) -> list[huggingface_hub.ModelInfo]:
    """The repositories of the Hub with adapters of point_peft for a base, those most downloaded first.

    A base is named as the adapters name it: `base_model_name_or_path`, a repository of the Hub.
    """
    check_names(base_model, None, None, token)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"adapters of '{base_model}' cannot be listed: HF_HUB_OFFLINE is set")
    api = huggingface_hub.HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    tags = [LIBRARY, f"base_model:adapter:{base_model}"]
    try:
        return _asked(base_model, None, lambda: list(api.list_models(filter=tags, sort="downloads")))
    except _Unreachable as error:
        raise HubError(f"adapters of '{base_model}' could not be listed: {error}. Try again") from error
