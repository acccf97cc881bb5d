"""Push adapters: one commit."""

from __future__ import annotations  # the client is loaded when it is used

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from point_peft.errors import HubError, quoted
from point_peft.files.format import CARD_FILE, CONFIG_FILE
from point_peft.hub.asking import T, Unreachable, ask, first_line
from point_peft.hub.card import base_licence, carried, merged, with_base_licence
from point_peft.hub.licences import check_licence, licence_on_hub
from point_peft.hub.pulling import COMMIT, PULL_REQUEST, Place, Token, check_names, client, fetched, is_path, model_info


@dataclass(frozen=True)
class Upload:
    """A commit that is to be made."""

    files: Mapping[str, bytes]
    """By their paths in the repository."""
    repo_id: str
    message: str
    description: str | None = None
    private: bool | None = None
    token: Token = None
    revision: str | None = None
    create_pr: bool = False
    base_license: str | None = None
    """Of the weights that the adapters need; None: what their cards say, or else the base's own on the Hub."""

    def __post_init__(self) -> None:
        check_licence(self.base_license)


def push(upload: Upload) -> str:
    """Make one commit and return its address.

    The repository and the branch are made if need be. A model card that is there already keeps what its owner
    wrote. A commit that came in between is taken in, so that nothing of it is lost.
    """
    repo_id, revision = upload.repo_id, upload.revision
    check_names(repo_id, revision, None, upload.token)
    for name in upload.files:
        if not is_path(name):
            raise HubError(
                f"{quoted(name)} cannot be a path in a repository: name the adapter with letters, digits, '.', '_', '-'"
            )
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"nothing was pushed to '{repo_id}': HF_HUB_OFFLINE is set")
    api = client(upload.token)
    _asked(upload, lambda: api.create_repo(repo_id, private=upload.private, exist_ok=True))
    if revision is not None and not upload.create_pr:
        _asked(upload, lambda: _make_branch(api, repo_id, revision))
    licensed, licences = _licensed(upload)
    for _ in range(3):
        try:
            # A commit is prepared anew each time: if only the answer was lost, nothing is left to commit.
            if upload.create_pr:
                return _open_request(licensed, licences)
            return _asked(upload, lambda: _send(upload, *_prepare(licensed, licences)))
        except HubError as error:
            # 412: somebody else has committed since; what is there now is read again.
            if not isinstance(error.__cause__, HfHubHTTPError) or error.__cause__.response.status_code != 412:
                raise
    raise HubError(f"nothing was pushed to '{repo_id}': others commit to it all the time. Push again")


def _asked(upload: Upload, request: Callable[[], T]) -> T:
    """The answer to a request, which is sent again where the Hub fails for a moment."""
    try:
        return ask(upload.repo_id, upload.revision, request)
    except Unreachable as error:
        raise HubError(
            f"the push to '{upload.repo_id}' failed: {error}. Push again; nothing is committed twice"
        ) from error


def _licensed(upload: Upload) -> tuple[Upload, list[str]]:
    """The upload whose card says under which licences the weights are that its adapters need, and these licences."""
    if CARD_FILE not in upload.files:
        return upload, []
    card, licences = upload.files[CARD_FILE].decode("utf-8"), []
    for path in sorted(path for path in upload.files if path.rpartition("/")[2] == CONFIG_FILE):
        about, adapter = json.loads(upload.files[path]), path.rpartition("/")[0]
        base, revision = about.get("base_model_name_or_path"), about.get("revision")
        licence = upload.base_license or base_licence(card, adapter) or licence_on_hub(base, revision, upload.token)
        if licence is not None:
            card = with_base_licence(card, adapter, base, licence)
            licences.append(licence)
    return replace(upload, files={**upload.files, CARD_FILE: card.encode("utf-8")}), licences


def _open_request(upload: Upload, licences: Sequence[str]) -> str:
    """Open a pull request. It is not sent again: one whose answer is lost would be opened twice."""
    prepared = _asked(upload, lambda: _prepare(upload, licences))
    try:
        return ask(upload.repo_id, upload.revision, lambda: _send(upload, *prepared), pauses=())
    except Unreachable as error:
        raise HubError(
            f"whether a pull request was opened is not known: {error}. Look at "
            f"{constants.ENDPOINT}/{upload.repo_id}/discussions before you push again"
        ) from error


def _prepare(upload: Upload, licences: Sequence[str]) -> tuple[str, list[huggingface_hub.CommitOperationAdd]]:
    """The commit that is there, and what goes on top of it."""
    info = model_info(upload.repo_id, upload.revision, upload.token)
    if upload.private and info.private is False:
        raise HubError(f"nothing was pushed: private is asked for, and '{upload.repo_id}' exists and is public")
    contents = dict(upload.files)
    for entry in info.siblings or ():
        name = entry.rfilename
        if name not in contents or name.rpartition("/")[2] != CARD_FILE:
            continue
        path = fetched(upload.repo_id, str(info.sha), entry, Place(token=upload.token))
        contents[name] = _over(path.read_bytes(), contents[name])
    if licences:
        contents[CARD_FILE] = carried(contents[CARD_FILE].decode("utf-8"), licences).encode("utf-8")
    added = [huggingface_hub.CommitOperationAdd(name, contents[name]) for name in sorted(contents)]
    return str(info.sha), added


def _send(upload: Upload, parent: str, added: list[huggingface_hub.CommitOperationAdd]) -> str:
    try:
        made = client(upload.token).create_commit(
            upload.repo_id,
            added,
            commit_message=upload.message,
            commit_description=upload.description,
            revision=upload.revision,
            create_pr=upload.create_pr,
            parent_commit=parent,
        )
    except (HfHubHTTPError, json.JSONDecodeError):  # some are ValueErrors, but say nothing of what is pushed
        raise
    except ValueError as error:
        raise HubError(f"nothing was pushed to '{upload.repo_id}': the Hub refuses it: {first_line(error)}") from error
    return str(made.pr_url or made.commit_url)


def files_below(folder: Path, subfolder: str | None) -> dict[str, bytes]:
    """Every file in a folder and below it, by its path in a repository, there within `subfolder`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {"/".join(filter(None, [subfolder, *path.relative_to(folder).parts])): path.read_bytes() for path in paths}


def _make_branch(api: huggingface_hub.HfApi, repo_id: str, revision: str) -> None:
    """Make a branch if need be; what is none and cannot become one is refused."""
    if PULL_REQUEST.fullmatch(revision):
        return
    refs = api.list_repo_refs(repo_id)
    if revision in {ref.name for ref in refs.branches}:
        return
    tag = revision in {ref.name for ref in refs.tags}
    if tag or COMMIT.fullmatch(revision) or revision.startswith("refs/"):
        kind = "a tag" if tag else "a commit" if COMMIT.fullmatch(revision) else "neither a branch nor a pull request"
        raise HubError(
            f"nothing was pushed to '{repo_id}': {quoted(revision)} is {kind}; push to a branch or refs/pr/N"
        )
    api.create_branch(repo_id, branch=revision, exist_ok=True)


def _over(present: bytes, new: bytes) -> bytes:
    """The card that goes over the present one."""
    try:
        text = present.decode("utf-8")
    except UnicodeDecodeError as error:
        # The client sends no other card, and what its owner wrote is not to be lost.
        raise HubError(f"nothing was pushed: the repository's {CARD_FILE} is not in UTF-8; save it so first") from error
    return merged(text, new.decode("utf-8")).encode("utf-8")
