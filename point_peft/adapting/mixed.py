"""A batch for several forwards, which share the backbone's frozen work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from point_peft.adapting.second_pass import answering, run_plain
from point_peft.running.forward import Forward, Root, close_forward, open_forward, opened, reopen
from point_peft.running.nested import Args, Kwargs


@contextmanager
def sharing(root: Root, args: Args, kwargs: Kwargs, count: int) -> Iterator[Forward]:
    """In here, forwards run parts of one batch, or run it for several tasks, and share the backbone's frozen work.

    `rows` of what this gives says which of its `count` samples the next forward runs.
    """
    before = opened(root)
    batch = open_forward(root, args, kwargs)
    batch.active, batch.shares, batch.samples_in_all = (), True, count
    batch.stem = dict(batch.known_stem)
    try:
        with answering(root):
            yield batch
    finally:
        close_forward(batch)
        reopen(root, before)


def run_stem(root: Root, batch: Forward) -> None:
    """Compute the stem for a whole batch, of which forwards will then run parts."""
    if root.anatomy is not None and root.anatomy.stem:
        run_plain(root, batch, "stem", None)
