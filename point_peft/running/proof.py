"""Facts about an adapter that only a forward can show: that its parts run, and that a gradient comes to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from point_peft.torch_private import leaf_of


@dataclass
class Unproven:
    """Facts about an adapter that no forward has shown yet."""

    silent: set[str]
    """The sites whose parts have not run."""
    unlearned: set[str]
    """The sites of which it is not known that a gradient comes to their parts."""
    watched: set[bool] = field(default_factory=set)
    """Modes, True for training, of the forwards in which it was watched who reads the weights of silent sites."""
    patience: int = 10
    """Forwards that may pass until what gets no gradient is told, though it may be that its reader did not run."""


@dataclass
class Ran:
    """A site whose parts ran in a forward."""

    with_gradient: bool = False
    """True if they ran where autograd sees it, at least once."""
    tensors: list[Tensor] = field(default_factory=list)
    """Their parameters, as they were at the time: sharded training puts others in their places afterwards."""


class Graph:
    """The part of an autograd graph that tensors come from."""

    def __init__(self, results: Iterable[Tensor]) -> None:
        ends = [result for result in results if result.requires_grad]
        self._leaves = {id(end) for end in ends if end.is_leaf}
        # Kept, and not by number: an object that autograd makes for a node lives as long as somebody holds it.
        self._nodes = {end.grad_fn for end in ends if end.grad_fn is not None}
        self.replays = False
        """True if reentrant gradient checkpointing ran modules for it: what they did is not in the graph."""
        ahead = list(self._nodes)
        while ahead:
            node = ahead.pop()
            self.replays = self.replays or node.name() == "CheckpointFunctionBackward"
            leaf = leaf_of(node)
            if leaf is not None:
                self._leaves.add(id(leaf))
            fresh = {child for child, _ in node.next_functions if child is not None} - self._nodes
            self._nodes |= fresh
            ahead += fresh

    def reaches(self, tensor: Tensor) -> bool:
        """Tell whether a gradient of the results comes to a tensor."""
        return id(tensor) in self._leaves or tensor.grad_fn in self._nodes
