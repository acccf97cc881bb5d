"""The state of a second pass: where it begins, what it is run for, and the random numbers that it repeats.

Why there is one, and how it shares the work of the forward around it, is told in `adapting.second_pass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from point_peft.running.nested import Args, Kwargs, all_arguments
from point_peft.running.stem import versions


@dataclass(frozen=True)
class RandomNumbers:
    """Numbers that the generators of torch, of the CPU and of some GPUs, give next."""

    states: dict[torch.device, Tensor]

    @staticmethod
    def of(devices: Iterable[torch.device]) -> RandomNumbers:
        """The numbers that come next. Nothing is waited for: the states lie on the CPU."""
        states = {torch.device("cpu"): torch.get_rng_state()}
        states.update({device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"})
        return RandomNumbers(states)

    @property
    def drawn(self) -> bool:
        """True if others come next by now."""
        now = RandomNumbers.of(self.states).states
        # As bytes, which no mode of torch sees.
        return any(now[device].numpy().tobytes() != state.numpy().tobytes() for device, state in self.states.items())

    def restore(self) -> None:
        """Let the same come again."""
        for device, state in self.states.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


@dataclass(frozen=True)
class Start:
    """A call of a module that runs all blocks: what a second pass repeats. It lives as long as its forward."""

    path: str
    """The module, "" for the model itself."""
    args: Args
    kwargs: Kwargs
    versions: tuple[int, ...]
    """Version of each tensor among the arguments by then: a change in place counts it up."""
    random: RandomNumbers | None
    """The random numbers that came next; None in compiled code, which does not know."""

    @staticmethod
    def of(path: str, args: Args, kwargs: Kwargs) -> Start:
        """The call that is about to begin."""
        if torch.compiler.is_compiling():
            return Start(path, args, kwargs, (), None)
        tensors = [tensor for _, tensor in all_arguments(args, kwargs)]
        return Start(path, args, kwargs, versions(tensors), RandomNumbers.of({tensor.device for tensor in tensors}))

    @property
    def intact(self) -> bool:
        """True if the arguments are as they were."""
        if torch.compiler.is_compiling():
            return True
        return versions([tensor for _, tensor in all_arguments(self.args, self.kwargs)]) == self.versions


class Second:
    """State of a forward that concerns second passes. It lives as long as the forward; `start` and `trunk` end with it.

    A forward that asks for a prior runs a second pass within itself, which is a forward too, its child.
    """

    def __init__(self) -> None:
        self.start: Start | None = None
        """The call of the model itself, if adapters are active in it."""
        self.trunk: Start | None = None
        """The call of the module that runs all blocks, if no adapter has acted before it."""
        self.acted = False
        """True once a part of an adapter has acted."""
        self.wanted: str | None = None
        """While a second pass runs within this forward: its end, "stem", "backbone" or the path of a block."""
        self.asked_for: str | None = None
        """And the adapter that it is run for, if that was made for another base's values of prefix tokens."""
        self.reached: Tensor | None = None
        """The tokens at its end, where it could not end there."""
        self.owner: str | None = None
        """In a second pass itself: the adapter that it is run for, like `asked_for` of the forward around it."""
        self.ended = 0
        """And how often the block that it ends at has run."""

    def forget(self) -> None:
        """Let go of the inputs, at the end of the forward."""
        self.start, self.trunk = None, None


class Stop(Exception):
    """Ends a second pass early; its one argument is the tokens that it was run for."""


def end_second_pass(around: Second, tokens: Tensor | None) -> None:
    """End a second pass within a forward, with the tokens that it was run for, if they are known."""
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        raise Stop(tokens)
    # torch.export loses its place in the model by an exception. The rest of the pass will not be in its graph.
    if around.reached is None:
        around.reached = tokens


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, these modules are in eval mode; then in the mode in which each was."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
