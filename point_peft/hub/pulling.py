"""Adapters on the Hugging Face Hub: where they may lie, what one load downloads and checks.

The client is huggingface_hub's. What it does not check is checked here: that a revision is a name and not a path, that
files have the size and the digest that the Hub states, that both come from one commit, and that they are small enough
before a byte is fetched. What can be tried again is tried again; all else is a `HubError` that says what to do.
"""

from __future__ import annotations

import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from point_peft.errors import HubError, PointPeftError, quoted
from point_peft.files.format import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_TENSOR_BYTES, TENSOR_FILE
from point_peft.hub.asking import TIMEOUT, Unreachable, ask, first_line, no_hub
from point_peft.version import __version__

if TYPE_CHECKING:  # the client itself is loaded when it is used
    from huggingface_hub.hf_api import RepoSibling

Token = str | bool | None
LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, TENSOR_FILE: MAX_TENSOR_BYTES}
"""The files of an adapter that are read, and how large they may be."""
_PATH = re.compile(r"[A-Za-z0-9._\-][A-Za-z0-9._/\-]{0,249}")
PULL_REQUEST = re.compile(r"refs/pr/[0-9]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]+")
LIBRARY = "point-peft"


@dataclass(frozen=True)
class Place:
    """Where in a repository an adapter lies, and how it is got from there."""

    subfolder: str | None = None
    revision: str | None = None
    token: Token = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    @property
    def prefix(self) -> str:
        """The beginning of the paths of the adapter's files in the repository."""
        return f"{self.subfolder}/" if self.subfolder else ""


def is_repo_id(name: object) -> bool:
    """True if a string is a repository's name, and not a path: one or two words without a leading dot."""
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
        if value is not None and not is_path(value):
            raise HubError(
                f"{what} is {quoted(value)}; allowed: letters, digits, '.', '_', '-' and, in between, '/', but no '..'"
            )
    if isinstance(token, str) and not _TOKEN.fullmatch(token):
        raise HubError("the token has characters that no token has: copy it again, without spaces or line ends")


def is_path(value: object) -> bool:
    """True if a string names something within a repository, and nothing outside."""
    if not isinstance(value, str) or not _PATH.fullmatch(value) or ".." in value:
        return False
    return all(part.strip(".") for part in value.split("/"))


def folder_of(source: str | Path, place: Place) -> Path:
    """The folder with the files of an adapter: one that is there, or that of a repository of the Hub, downloaded."""
    if isinstance(source, str) and not Path(source).exists() and is_repo_id(source):
        return download(source, place)
    if place.revision is not None or place.force_download:
        raise PointPeftError(f"revision and force_download are for repositories of the Hub; '{source}' is a path")
    return Path(source) / place.subfolder if place.subfolder else Path(source)


def download(repo_id: str, place: Place) -> Path:
    """A folder of the cache with the files of an adapter, all of the same commit, checked against what the Hub states.

    Where the Hub cannot be reached, what the cache holds is used, with a warning; where it refuses, nothing is.
    """
    revision, token = place.revision, place.token
    check_names(repo_id, revision, place.subfolder, token)
    if place.local_files_only or constants.HF_HUB_OFFLINE:
        return _cached(repo_id, place, "local_files_only or HF_HUB_OFFLINE is set")
    try:
        info = ask(repo_id, revision, lambda: model_info(repo_id, revision, token))
    except Unreachable as error:
        if place.force_download:
            raise HubError(f"'{repo_id}' could not be downloaded: {error}. Try again") from error
        folder = _cached(repo_id, place, str(error))
        sha = _snapshot(folder, place.prefix).name
        warnings.warn(f"{error}: '{repo_id}' is taken from the cache, commit {sha}", stacklevel=5)
        return folder
    files = _files(info, repo_id, place.prefix)
    paths = [fetched(repo_id, str(info.sha), file, place) for file in files]
    _remember(_snapshot(paths[0].parent, place.prefix), revision)
    return paths[0].parent


def client(token: Token) -> huggingface_hub.HfApi:
    """A client of the Hub, which says for which library it asks."""
    return huggingface_hub.HfApi(token=token, library_name=LIBRARY, library_version=__version__)


def model_info(repo_id: str, revision: str | None, token: Token) -> huggingface_hub.ModelInfo:
    """The Hub's answer about a repository at a revision, which may be any."""
    try:
        info = client(token).model_info(repo_id, revision=revision, timeout=TIMEOUT, files_metadata=True)
    except (LookupError, TypeError, AttributeError) as error:
        raise Unreachable(f"{no_hub()}: its answer lacks {first_line(error)}") from error
    if not COMMIT.fullmatch(str(info.sha)):
        raise Unreachable(f"{no_hub()}: its commit is {quoted(info.sha)}")
    return info


def _files(info: huggingface_hub.ModelInfo, repo_id: str, prefix: str) -> list[RepoSibling]:
    """The files that are read as the Hub states them, which must be there and small enough."""
    stated = {entry.rfilename: entry for entry in info.siblings or ()}
    files = []
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
        files.append(entry)
    return files


def fetched(repo_id: str, sha: str, file: RepoSibling, place: Place) -> Path:
    """A file in the cache, of the commit `sha`; what is there and is not what the Hub states is fetched again, once."""

    def fetch(again: bool) -> Path | None:
        held = client(place.token).hf_hub_download(
            repo_id, file.rfilename, revision=sha, cache_dir=place.cache_dir, force_download=again, etag_timeout=TIMEOUT
        )
        path = Path(held)
        if _is_what_is_stated(path, file):
            return path
        _forget(path, cache=Path(place.cache_dir or constants.HF_HUB_CACHE))
        return None

    for again in (place.force_download, True):
        try:
            path = ask(repo_id, sha, partial(fetch, again))
        except Unreachable as error:
            raise HubError(f"'{file.rfilename}' of '{repo_id}' could not be downloaded: {error}. Try again") from error
        if path is not None:
            return path
    raise HubError(
        f"'{file.rfilename}' of '{repo_id}' arrived damaged twice: it is not what the Hub states at commit {sha}. It "
        "was taken out of the cache; try again, or ask the owner to push it again"
    )


def _is_what_is_stated(path: Path, file: RepoSibling) -> bool:
    stated = file.blob_id if file.lfs is None else file.lfs.sha256
    return path.stat().st_size == file.size and (stated is None or _digest(path, stated) == stated)


def _digest(path: Path, like: str) -> str:
    """The digest of a file of the kind that `like` is of: SHA-256 or git's."""
    if len(like) == 40:
        return git_hash(path.read_bytes())
    with path.open("rb") as opened:
        return sha_fileobj(opened).hex()


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


def _cached(repo_id: str, place: Place, why: str) -> Path:
    """The folder of the cache that holds both files of one commit; they must be what their names in it say."""
    revision, prefix = place.revision, place.prefix
    got = [huggingface_hub.try_to_load_from_cache(repo_id, prefix + name, place.cache_dir, revision) for name in LIMITS]
    paths = [Path(path) for path in got if isinstance(path, str)]
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
        if _digest(path, name) != name:
            raise HubError(
                f"'{prefix}{path.name}' of '{repo_id}' is damaged in the cache ('{path}'), and the Hub was not asked: "
                f"{why}. Load it with force_download=True once the Hub can be reached"
            )
    return paths[0].parent


def list_adapters(base_model: str, *, token: Token = None) -> list[huggingface_hub.ModelInfo]:
    """The repositories of the Hub with adapters of point_peft for a base, those most downloaded first.

    A base is named as the adapters name it: `base_model_name_or_path`, a repository of the Hub. An adapter's own name
    finds nothing.
    """
    check_names(base_model, None, None, token)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"adapters of '{base_model}' cannot be listed: HF_HUB_OFFLINE is set")
    tags = [LIBRARY, f"base_model:adapter:{base_model}"]
    try:
        return ask(base_model, None, lambda: list(client(token).list_models(filter=tags, sort="downloads")))
    except Unreachable as error:
        raise HubError(f"adapters of '{base_model}' could not be listed: {error}. Try again") from error
