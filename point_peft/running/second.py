"""Where a second pass begins, and the random numbers that it repeats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from point_peft.running.nested import Args, Kwargs, all_arguments
from point_peft.running.stem import versions


@dataclass(frozen=True)
class RandomNumbers:
    """What the generators of torch, of the CPU and of some GPUs, give next."""

    states: dict[torch.device, Tensor]

    @staticmethod
    def of(devices: Iterable[torch.device]) -> RandomNumbers:
        """The numbers that come next. Nothing is waited for: the states lie on the CPU."""
        states = {torch.device("cpu"): torch.get_rng_state()}
        states.update({device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"})
        return RandomNumbers(states)

    @property
    def drawn(self) -> bool:
        """Whether others come next by now."""
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
    """How often each tensor among the arguments had been changed in place by then."""
    random: RandomNumbers | None
    """What the call began with; None in compiled code, which does not know."""

    @staticmethod
    def of(path: str, args: Args, kwargs: Kwargs) -> Start:
        """The call that is about to begin."""
        if torch.compiler.is_compiling():
            return Start(path, args, kwargs, (), None)
        tensors = [tensor for _, tensor in all_arguments(args, kwargs)]
        return Start(path, args, kwargs, versions(tensors), RandomNumbers.of({tensor.device for tensor in tensors}))

    @property
    def intact(self) -> bool:
        """Whether the arguments are as they were."""
        if torch.compiler.is_compiling():
            return True
        return versions([tensor for _, tensor in all_arguments(self.args, self.kwargs)]) == self.versions
