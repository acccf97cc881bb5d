"""A forward, watched: where its tokens lie, how much their attention goes to prompts, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from point_peft.anatomy.description import Anatomy
from point_peft.model import describe
from point_peft.running.nested import fetch, fetch_argument
from point_peft.running.tokens import block_tokens, token_dim
from point_peft.training.state import adapters_of


@dataclass
class Notes:
    """The facts that were seen of one task in a forward."""

    seconds: float = 0.0
    """The time of the task's own forward. The first of several also runs the stem, which the others then share."""
    centres: dict[int, Tensor] = field(default_factory=dict)
    """Stage -> where its patch tokens lie (b, g, 3)."""
    attention: Tensor | None = None
    """The share (b, g) of each patch token's attention that goes to prompts, the mean over heads; None: no prompts."""
    block: int = 0
    """The number of the block that it is of, the last one with prompts."""
    stage: int = 0
    """The number of the stage of that block."""


class Recorder(TorchFunctionMode):
    """Watches the forwards of one model, adapted or not; what it sees is under the name of the active adapter.

    A block is called with its own tokens, prefix and patches, and its attention with the prompts between the two. So
    there are as many prompts as the attention has tokens more, and the patches are as many as their coordinates.
    """

    def __init__(self, anatomy: Anatomy, names: Any) -> None:
        super().__init__()
        self.anatomy = anatomy
        self.names = names
        """A function that gives the active adapters."""
        self.notes: dict[str | None, Notes] = {}
        self.now = Notes()
        self.began = 0.0
        self.stage, self.block, self.plain = 0, 0, 0
        """Of the block that runs: its stage, its number, and how many tokens it was called with."""
        self.attending = False

    def begin(self, module: nn.Module, args: Any) -> None:
        active = self.names()
        self.now = self.notes.setdefault(active[0] if active else None, Notes())
        self.began = time.perf_counter()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.now.seconds += time.perf_counter() - self.began

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.attending and func is F.scaled_dot_product_attention:
            self._see_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _see_attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
        """Note how much of the attention goes to prompts: what comes out if they have value 1 and all others 0."""
        centres = self.now.centres.get(self.stage)
        prompts = key.shape[2] - self.plain
        if centres is None or prompts <= 0:
            return
        prefix = self.plain - centres.shape[1]
        is_prompt = key.new_zeros(*key.shape[:3], 1)
        is_prompt[:, :, prefix : prefix + prompts] = 1
        to_prompts = F.scaled_dot_product_attention(query, key, is_prompt, *args, **kwargs)
        self.now.attention = reduce(to_prompts[:, :, prefix + prompts :], "b h g 1 -> b g", "mean")
        self.now.block, self.now.stage = self.block, self.stage


@contextmanager
def recording(model: nn.Module) -> Iterator[Mapping[str | None, Notes]]:
    """Within the block, the forwards of a model are watched: adapter -> what was seen of it, None without one.

    Attention is seen where the backbone computes it by torch's own function.
    """
    held = adapters_of(model)
    recorder = Recorder(describe(model), lambda: () if held is None else held.active_adapters)
    base = model if held is None else held.base_model
    handles = [base.register_forward_pre_hook(recorder.begin, prepend=True), base.register_forward_hook(recorder.end)]
    for number, stage in enumerate(recorder.anatomy.stages):
        if stage.coordinates is not None and stage.layout != "packed":
            handles.append(_see_centres(base, recorder, number))
        for block in stage.blocks:
            handles += _see_block(base, recorder, number, recorder.anatomy.blocks.index(block))
    try:
        with recorder, torch.no_grad():
            yield recorder.notes
    finally:
        for handle in handles:
            handle.remove()


def _see_centres(base: nn.Module, recorder: Recorder, number: int) -> Any:
    stage = recorder.anatomy.stages[number]
    tap = stage.coordinates
    assert tap is not None

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        source = fetch(output, tap.steps) if tap.side == "output" else fetch_argument(args, kwargs, tap.steps)
        if isinstance(source, Tensor) and source.ndim == 3:
            recorder.now.centres[number] = source[:, : source.shape[1] - stage.dropped].float()

    return base.get_submodule(tap.module).register_forward_hook(see, with_kwargs=True)


def _see_block(base: nn.Module, recorder: Recorder, stage: int, number: int) -> list[Any]:
    own, block = recorder.anatomy.stages[stage], recorder.anatomy.blocks[number]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = block_tokens(own, block.path, args, kwargs)
        recorder.stage, recorder.block, recorder.plain = stage, number, tokens.shape[token_dim(own.layout)]

    def attend(module: nn.Module, args: Any) -> None:
        recorder.attending = True

    def rest(module: nn.Module, args: Any, output: Any) -> None:
        recorder.attending = False

    # Ahead of the library's own hooks, which put the prompts in.
    handles = [base.get_submodule(block.path).register_forward_pre_hook(enter, with_kwargs=True, prepend=True)]
    if block.attention is not None:
        attention = base.get_submodule(block.attention)
        handles += [attention.register_forward_pre_hook(attend), attention.register_forward_hook(rest)]
    return handles
