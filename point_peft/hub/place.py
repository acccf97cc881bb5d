"""Names on the Hub, and what may be read from it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from point_peft.errors import HubError, quoted
from point_peft.files.format import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_TENSOR_BYTES, TENSOR_FILE

Token = str | bool | None
LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, TENSOR_FILE: MAX_TENSOR_BYTES}
"""The files of an adapter that are read, and how large they may be."""
_PATH = re.compile(r"[A-Za-z0-9._\-][A-Za-z0-9._/\-]{0,249}")
PULL_REQUEST = re.compile(r"refs/pr/[0-9]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"[!-~]+")
LIBRARY = "point-peft"


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file as the Hub states it."""

    name: str
    size: int
    sha256: str | None
    """Of a large file."""
    blob: str | None
    """Its git digest, of any file."""


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
    return (
        isinstance(value, str)
        and _PATH.fullmatch(value) is not None
        and ".." not in value
        and all(part.strip(".") for part in value.split("/"))
    )
