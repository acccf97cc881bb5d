"""Requests to the Hub: retried where that helps, and their failures in plain words."""

import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from huggingface_hub import constants, errors

from point_peft.errors import HubError, quoted

T = TypeVar("T")
TIMEOUT = 10.0
"""Seconds that the Hub has to say what a repository holds; its client would wait for ever."""
PAUSES = (1.0, 2.0)
"""Seconds between tries where the Hub fails for a moment."""
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)


class Unreachable(Exception):
    """The Hub gave no answer; the message says how it failed."""


def ask(repo_id: str, revision: str | None, ask: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
    """The answer of the Hub; refusals are `HubError`s that say what to do, failures are tried again."""
    at = f" at revision {quoted(revision)}" if revision else ""
    for pause in (*pauses, None):
        try:
            return ask()
        except errors.GatedRepoError as error:
            raise HubError(
                f"'{repo_id}' is gated: accept its conditions at {constants.ENDPOINT}/{repo_id} and pass a token of "
                "that account"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(
                f"there is no repository '{repo_id}' that can be seen: check the name; if it is private, pass a token "
                "that may read it, or run `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise HubError(
                f"'{repo_id}' has no revision {quoted(revision)}: name a branch, a tag or a commit"
            ) from error
        except errors.LocalTokenNotFoundError as error:
            raise HubError(
                "token=True asks for the token of a login, and there is none: run `hf auth login`"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            # The client tells in what it was raised from why it could not ask.
            failure = _failure(error.__cause__ or error)
        except errors.EntryNotFoundError as error:
            raise HubError(f"'{repo_id}'{at} lacks a file: {first_line(error)}") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise HubError(
                    f"the Hub refuses '{repo_id}' ({status}): the token is wrong or may not do this; pass another, or "
                    "run `hf auth login`"
                ) from error
            if status not in _BUSY:
                raise HubError(f"the Hub answers {status} for '{repo_id}'{at}: {first_line(error)}") from error
            failure = _failure(error)
        except json.JSONDecodeError:
            failure = f"{no_hub()}: its answer is not JSON"
        except RuntimeError as error:
            # So the client wraps whatever happens while it uploads.
            failure = _failure(error.__cause__ or error)
        except (errors.HTTPError, errors.XetDownloadError, OSError) as error:  # type: ignore[attr-defined]
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NETWORK):
                raise HubError(f"'{repo_id}': {error.strerror or error} ({error.filename or 'no file'})") from error
            failure = _failure(error)
        if pause is not None:
            time.sleep(pause)
    raise Unreachable(failure)


def no_hub() -> str:
    return f"what answers at {constants.ENDPOINT} is not a Hub"


def _failure(error: BaseException) -> str:
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answers {error.response.status_code}"
    return f"the Hub cannot be reached ({type(error).__name__}: {first_line(error)})"


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
