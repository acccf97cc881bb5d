"""Adapters of a library as a table for people."""

from collections.abc import Iterable, Iterator, Mapping

from point_peft.library.entry import LibraryEntry

_HEADER = ("name", "method", "base", "task", "classes", "parameters", "bytes")
_NUMBERS = slice(5, 7)
_MAX_WIDTH = 48


def library_table(entries: Iterable[LibraryEntry], skipped: Mapping[str, str]) -> Iterator[str]:
    """The lines of a table, then those that cannot be loaded and those that are no adapters, each with the reason.

    What stands in a file is shown on its line, and cannot steer a terminal.
    """
    every = list(entries)
    rows = [_HEADER, *(_row(entry) for entry in every if entry.broken is None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.rjust(width) if place in range(*_NUMBERS.indices(len(row))) else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    for entry in every:
        if entry.broken is not None:
            yield f"{_shown(entry.name)}  NOT in order: {_shown(entry.broken, 400)}"
    for name, reason in skipped.items():
        yield f"{_shown(name)}  no adapter: {_shown(reason, 400)}"


def _row(entry: LibraryEntry) -> tuple[str, ...]:
    base = entry.base if entry.base_revision is None else f"{entry.base}@{entry.base_revision}"
    return (
        _shown(entry.name),
        _shown("+".join(entry.methods)),
        _shown(base or "-"),
        entry.task or "-",
        "-" if entry.num_classes is None else str(entry.num_classes),
        f"{entry.parameters:,}",
        f"{entry.bytes:,}",
    )


def _shown(text: str, most: int = _MAX_WIDTH) -> str:
    """A stranger's words on one line, cut at the front, where names of files differ least."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return plain if len(plain) <= most else "…" + plain[1 - most :]
