"""The errors of the package; all of them are `ValueError`s, so a caller may catch that alone."""


class PointPeftError(ValueError):
    """Base of every error that point_peft raises on purpose."""


class MatchError(PointPeftError):
    """A name or pattern matches nothing, matches the wrong thing, or is not a pattern at all."""


class AnatomyError(PointPeftError):
    """The parts of the backbone cannot be established, or do not fit what was asked for."""


class AdapterError(PointPeftError):
    """An adapter name is unknown, duplicate or invalid, or the adapter is in the wrong state for the call."""


class AdapterFileError(PointPeftError):
    """A file cannot be read, or what it holds does not fit the model."""


class HubError(PointPeftError):
    """The Hub refuses or fails, or what it holds is not what it states."""


def quoted(value: object, limit: int = 80) -> str:
    """Words of a stranger's file, fit for an error: quoted, on one line, cut if they are long."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[: limit - 3] + "..." + (text[0] if isinstance(value, str) else "")
