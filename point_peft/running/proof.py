"""Facts about an adapter that only a forward can show: that its parts run, and that a gradient comes to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

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
    """The part of an autograd graph that some of its nodes come from, and these."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._leaves: set[int] = set()
        # Kept, and not by number: an object that autograd makes for a node lives as long as somebody holds it.
        self._nodes = set(nodes)
        self.replays = False
        """True if reentrant gradient checkpointing ran modules for it: what they did is not in the graph."""
        ahead = list(self._nodes)
        while ahead:
            node = ahead.pop()
            self.replays = self.replays or node.name() == "CheckpointFunctionBackward"
            leaf = leaf_of(node)
            if leaf is not None:
                self._leaves.add(id(leaf))
            fresh = sources(node) - self._nodes
            self._nodes |= fresh
            ahead += fresh

    def reaches(self, tensor: Tensor) -> bool:
        """Tell whether a gradient of the results comes to a tensor."""
        return id(tensor) in self._leaves or tensor.grad_fn in self._nodes


def sources(node: Node) -> set[Node]:
    """The nodes whose results one takes."""
    return {child for child, _ in node.next_functions if child is not None}
