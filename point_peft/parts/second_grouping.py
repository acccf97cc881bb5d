"""Further tokens of a cloud, from groupings of a method's own: made in the stem, carried through all blocks."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Stage
from point_peft.errors import AdapterError, AnatomyError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone, Names
from point_peft.parts.base import Call, Part, SharedState
from point_peft.parts.sequence import BlockTokens, SequencePart
from point_peft.parts.tuned import first_layers
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs

Init = Literal["identity", "published"]
"""The start of the last layer of a `token_mlp`: at zero, or as torch begins linear layers."""


def stage_to_group(backbone: Backbone, method: str) -> Stage:
    """The one stage of a backbone whose clouds can be grouped again; `AnatomyError` says why they cannot."""
    anatomy, name = backbone.known_anatomy(method), type(backbone.model).__name__
    if len(anatomy.stages) > 1:
        raise AnatomyError(
            f"{method} carries tokens of its own through all blocks, and {name} has {len(anatomy.stages)} stages with "
            "other tokens each: use POINT_PEFT, LORA or another method that acts block by block"
        )
    (stage,) = anatomy.stages
    needed: dict[str, object] = {
        "where the clouds are seen that it groups (points)": stage.points,
        "what makes tokens of neighbourhoods (tokenizer)": stage.tokenizer,
        "what makes positions of coordinates alone (position_embedding)": stage.position_embedding,
        "where its tokens lie in space (coordinates)": stage.coordinates,
    }
    unknown = [what for what, known in needed.items() if not known]
    if unknown:
        raise AnatomyError(
            f"{method} groups the clouds again, as {name} does, and of this backbone it is not known "
            f"{', nor '.join(unknown)}: state it in config.anatomy, or use a method that does without, such as "
            "POINT_PEFT or LORA"
        )
    values = values_read(backbone, stage)
    if values != 3:
        raise AnatomyError(
            f"{method} groups the clouds again by their coordinates alone, and '{stage.tokenizer[0]}' reads "
            f"{values} values of a point: use a method that does without, such as POINT_PEFT or LORA"
        )
    if not stage.takes_prompts:
        raise AnatomyError(
            f"{method} puts tokens of its own among those of '{stage.blocks[0].path}', which has no place for them: "
            f"{stage.why_no_prompts}. Use LORA or BITFIT"
        )
    return stage


def values_read(backbone: Backbone, stage: Stage) -> int:
    """The number of values that the tokenizer of a stage, which is known, reads of a point: 3 without features."""
    return next(backbone.modules[stage.tokenizer[0]].parameters()).shape[1]


def modules_to_tune(backbone: Backbone, stage: Stage, names: Names) -> list[str]:
    """The modules of those names; None: the positional embedding and the first layers of the tokenizer."""
    if names is not None:
        return list(match_names(names, list(backbone.modules), field="tuned_modules"))
    assert stage.position_embedding is not None  # `stage_to_group` has seen to it
    return [stage.position_embedding, first_layers(backbone, stage.tokenizer[0])]


class GroupingPart(Part):
    """At the last module of the tokenizer, which does not change: makes further tokens for the blocks to come.

    In each block, a `CarryingPart` takes them and leaves what the block makes of them for the next. They need the
    clouds; where a part of the model is called that has not seen any, there are none.
    """

    def __init__(self, stage: Stage, number: int) -> None:
        super().__init__()
        self.stage = stage
        self.number = number

    def make(self, call: Call, points: Tensor) -> tuple[Tensor, Tensor]:
        """The further tokens (b, p, c) of clouds (b, n, 3), and their coordinates (b, p, 3)."""
        raise NotImplementedError

    def tokens(self, forward: Forward, points: Tensor, centres: Tensor, size: int) -> Tensor:
        """Tokens (b, g, c) of the `size` points of clouds (b, n, 3) nearest to each centre (b, g, 3).

        Of a cloud that has fewer points, all.
        """
        near = geometry.gather(points, geometry.knn(centres, points, min(size, points.shape[1])))
        return run_apart(forward, self.stage.tokenizer, near - centres[:, :, None])

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        forward = call.forward
        if forward.apart or self.number not in forward.seen.points:
            return output
        tokens, coordinates = self.make(call, forward.seen.points[self.number])
        assert self.stage.position_embedding is not None  # `stage_to_group` has seen to it
        positions = run_apart(forward, [self.stage.position_embedding], coordinates)
        if self.stage.position == "once":
            tokens = tokens + positions
        else:
            forward.handover.leave(self.key(call, "positions"), positions, call.path)
        forward.handover.leave(self.key(call, "prompts"), tokens, call.path)
        return output


def farthest_points(points: Tensor, count: int) -> Tensor:
    """The `count` farthest points (b, g, 3) of clouds (b, n, 3) in the order of their choice; of a smaller one, all."""
    return geometry.gather(points, geometry.farthest_point_sample(points, min(count, points.shape[1])))


def run_apart(forward: Forward, paths: Sequence[str], x: Tensor) -> Tensor:
    """Run modules of the backbone, one after another, on x, with whatever the adapters have changed there."""
    with forward.running_apart():
        for path in paths:
            module = forward.root.base_model.get_submodule(path)
            own = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
            x = module(x.to(own))
    return x


def token_mlp(inputs: int, width: int, outputs: int, init: Init) -> nn.Sequential:
    """M(x) = W2 GELU(W1 x + b1) + b2"""
    last = nn.Linear(width, outputs)
    if init == "identity":
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), last)


class TokenMlps(SharedState):
    """M1 for the patch tokens and M2 for the further ones, the same for all blocks."""

    def __init__(self, prefix: str, channels: int, width: int, init: Init) -> None:
        super().__init__()
        self.prefix = prefix
        self.patches = token_mlp(channels, width, channels, init)
        self.further = token_mlp(channels, width, channels, init)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its tensors, in replicas too, which have no parameters."""
        weight: Tensor = getattr(self.further[0], "weight")  # noqa: B009
        return weight.dtype


class CarryingPart(SequencePart):
    """At a block: t <- t + M1(t) for the patch tokens, f <- f + M2(f) for the further ones, which attend with them.

    A block gets what the one before has made of them, with their positions where the base adds its own again. They
    come out after it. After the last, heads that pool prompts read them.
    """

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        further = self._take(call, "prompts")
        if self.stage.position == "every_block":
            further = further + self._take(call, "positions")
        mlps = call.state("token_mlps", TokenMlps)
        further = further + mlps.further(further)
        call.forward.handover.notes[call.adapter, self.tuner, call.path] = further
        got = self.received(call, args, kwargs)
        patches = got.patches + mlps.patches(got.patches).to(got.patches.dtype)
        args, kwargs = self.with_tokens(args, kwargs, got.prefix, patches)
        return self.with_prompts(call, args, kwargs, further)

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        count = call.forward.handover.notes[call.adapter, self.tuner, call.path].shape[1]
        made = self.finish(call, self.returned(call, output, prompts=count))
        call.forward.handover.leave(self.key(call, "prompts"), made.prompts, call.path)
        return self.without_prompts(output, made.prefix, made.patches, prompts=count)

    def finish(self, call: Call, tokens: BlockTokens) -> BlockTokens:
        """The tokens that the method makes of those that the block has returned."""
        return tokens

    def _take(self, call: Call, what: str) -> Tensor:
        taken = call.forward.handover.take(self.key(call, what), call.path)
        if taken is None:
            raise AdapterError(
                f"block '{call.path}' gets further tokens, which are made of the clouds at the {self.stage.points} "
                f"when '{self.stage.tokenizer[-1]}' runs, and in this forward none were: call the model, or a method "
                "that runs its tokenizer too"
            )
        return taken.to(call.state("token_mlps", TokenMlps).dtype)
