"""Columns of points matched by name, where the model is called."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Steps, spell_steps
from point_peft.errors import AdapterError
from point_peft.parts.base import SharedState
from point_peft.running.nested import Args, Kwargs, all_arguments, fetch_argument, put_argument

FEATURES = ("feat", "features", "x")
"""The names that tensors of features have, where others are as wide."""


class InputColumns(SharedState):
    """The columns of the data, and where the backbone's are among them."""

    prefix = "input_adapter"

    def __init__(self, channels: tuple[str, ...], wanted: tuple[str, ...], argument: str | int | None) -> None:
        super().__init__()
        self.channels = channels
        self.argument = argument
        # Behind the columns of the data lies one of zeros.
        self.order = tuple(channels.index(name) if name in channels else len(channels) for name in wanted)
        self.new = tuple(number for number, name in enumerate(channels) if name not in wanted)
        self.takes: Hashable = (channels, wanted, argument)

    def fit(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        steps = self._place(args, kwargs)
        columns = fetch_argument(args, kwargs, steps)
        if self.order == tuple(range(len(self.channels))):
            return args, kwargs
        for end in range(1, len(steps)):  # what the caller has is not changed
            holder = copy.copy(fetch_argument(args, kwargs, steps[:end]))
            args, kwargs = put_argument(args, kwargs, steps[:end], holder)
        filled = nn.functional.pad(columns, (0, 1)) if len(self.channels) in self.order else columns
        return put_argument(args, kwargs, steps, _chosen(filled, self.order))

    def extra(self, given: tuple[Args, Kwargs]) -> Tensor:
        """The new columns (..., e) of what the model was called with."""
        return _chosen(fetch_argument(*given, self._place(*given)), self.new)

    def _place(self, args: Args, kwargs: Kwargs) -> Steps:
        """The steps to the tensor with the columns of the data."""
        floating = {steps: value for steps, value in all_arguments(args, kwargs) if value.is_floating_point()}
        count = len(self.channels)
        fitting = [steps for steps, value in floating.items() if value.ndim in (2, 3) and value.shape[-1] == count]
        if self.argument is not None:
            choices = [[steps for steps in fitting if steps[-1] == self.argument]]
        else:
            named = [steps for steps in fitting if steps[-1] in FEATURES]
            choices = [fitting, named, [steps for steps in fitting if floating[steps].ndim == 3]]
        for found in choices:
            if len(found) == 1:
                return found[0]
        asked = "" if self.argument is None else f" called {self.argument!r}"
        given = ", ".join(f"{spell_steps(steps)} {tuple(value.shape)}" for steps, value in floating.items()) or "none"
        raise AdapterError(
            f"the adapter takes clouds with {count} columns, {', '.join(self.channels)}, in one tensor{asked} (b, n, "
            f"{count}) or (n, {count}) among the arguments of the model; {len(choices[0])} are such of those "
            f"given: {given}. Name it in InputAdapterConfig.argument, or choose an adapter for these columns"
        )


def _chosen(columns: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some columns (..., e) of (..., c)."""
    return columns.index_select(-1, torch.tensor(numbers, device=columns.device))
