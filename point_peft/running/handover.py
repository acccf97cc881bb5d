"""Tensors that parts hand on: from one block to a later one, and from one hook of a call to another."""

from collections.abc import Hashable

import torch
from torch import Tensor

from point_peft.errors import AdapterError
from point_peft.torch_private import graph_task


class Handover:
    """Tensors that the parts of one forward hand on.

    What was left and noted lives until the forward ends; what was taken stays for checkpointing, which may run the
    module that took it again.
    """

    def __init__(self) -> None:
        self.notes: dict[Hashable, Tensor] = {}
        """Tensors of one hook of a module for another of the same call, as of a norm for its block."""
        self.whole = False
        """True while a forward of the model itself runs, false in a direct call of a part of it."""
        self._gradless: set[Hashable] = set()
        self._left: dict[Hashable, Tensor] = {}
        self._taken: dict[tuple[Hashable, str], list[Tensor | None]] = {}
        self._with_gradient = torch.is_grad_enabled()
        self._task = graph_task()

    def leave(self, key: Hashable, value: Tensor, path: str) -> None:
        """Leave a tensor for modules that run later in this forward; it may have a gradient. `path` says who leaves."""
        if self._recomputing:
            return  # those that run later have taken theirs
        if self._with_gradient and self.whole and not torch.is_grad_enabled():
            raise _without_gradient(path)
        self._left[key] = value

    def take(self, key: Hashable, path: str) -> Tensor | None:
        """The tensor that was last left under a key, None if none was; `path` says which module takes it.

        When checkpointing runs the module again, it gets what it got the first time.
        """
        taken = self._taken.setdefault((key, path), [])
        if not self._recomputing:
            taken.append(self._left.get(key))
        elif len(taken) > 1:
            raise AdapterError(
                f"'{path}' runs several times in a forward, and checkpointing runs it again: which of its runs that is "
                "cannot be told, so neither can what the block before it left for it; do without one of the two"
            )
        return taken[-1] if taken else None

    def note(self, key: Hashable, value: Tensor) -> None:
        """Leave a tensor for another hook of the same call of a module; it may have a gradient."""
        self.notes[key] = value
        if torch.is_grad_enabled():
            self._gradless.discard(key)
        else:
            self._gradless.add(key)

    def noted(self, key: Hashable, path: str) -> Tensor:
        """The tensor that was noted under a key, once: it need not be kept until the forward ends. `path` asks."""
        if key in self._gradless and torch.is_grad_enabled():
            raise _without_gradient(path)
        return self.notes.pop(key)

    def left(self, adapter: str, name: str) -> list[Tensor]:
        """The tensors that the methods of an adapter have left under `(adapter, number of the method, name)`."""
        return [value for key, value in self._left.items() if isinstance(key, tuple) and key[::2] == (adapter, name)]

    @property
    def is_empty(self) -> bool:
        """True if nothing has been left."""
        return not self._left

    def end(self) -> None:
        """End with the forward: what was taken stays, what was only left or noted does not."""
        self.whole = False
        self.notes.clear()
        self._left.clear()

    @property
    def _recomputing(self) -> bool:
        return graph_task() != self._task


def _without_gradient(path: str) -> AdapterError:
    return AdapterError(
        f"a method that hands tensors on beside the tokens needs their gradient, and at '{path}' a part of the model "
        "runs without: use torch.utils.checkpoint with use_reentrant=False, and no torch.no_grad() inside the model"
    )
