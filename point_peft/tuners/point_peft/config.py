"""The configuration of Point-PEFT and how it lays its parts out over a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from point_peft.anatomy.description import Anatomy, Block, Stage
from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint
from point_peft.parts.bottleneck import Bottleneck, quick_bottleneck
from point_peft.parts.prefix import keep_prefix, tune_prefix
from point_peft.parts.propagation import GeometryAwareAdapter
from point_peft.parts.tuned import block_biases, tuned_biases, tuned_norms
from point_peft.schema import Count, Dropout, Factor, Limit, at_least
from point_peft.tuners.point_peft.adapter import MlpPart
from point_peft.tuners.point_peft.block import BlockPart
from point_peft.tuners.point_peft.local_attention import LocalAttention, StageGeometry
from point_peft.tuners.point_peft.neighbourhood import NeighbourhoodEncoder
from point_peft.tuners.point_peft.prior import MemoryBank
from point_peft.tuners.point_peft.prompt import Prompt

NEIGHBOURHOOD_WIDTH = 64
PROMPTS = 10


@dataclass(frozen=True, kw_only=True)
class PointPEFTConfig(TunerConfig):
    """Point-PEFT in the later blocks; `published()` is that of the paper. `target_modules` and the like choose blocks.

    The fields that are lists of names follow the rule of `target_modules`; None means what was published.
    """

    method: ClassVar[str] = "POINT_PEFT"
    earlier: ClassVar[Mapping[str, Any]] = {
        "num_prompts": PROMPTS,
        "adapted_share": 1.0,
        "prior": "backbone",
        "standardised": False,
        "temperature": 1.0,
        "memory_bank": True,
        "neighbourhood_width": 0,
    }

    adapted_share: Annotated[float | None, Limit("more than 0 and at most 1", lambda share: 0 < share <= 1)] = None
    """Share of the blocks that is adapted, the last ones, where nothing else chooses blocks; None: half, packed: all.

    The blocks ahead of them then are the plain frozen backbone, without gradient; what they give is the query of a
    memory bank, if there is one.
    """

    num_prompts: Annotated[int | None, at_least(0)] = None
    """Prompts p that each of the prompt layers gets; None: 10, but none where they have no place (packed tokens)."""
    prompt_layers: Annotated[int | None, at_least(0)] = None
    """Adapted blocks that get prompts, counted from the first.

    None: half of them; all of them where stages differ in width, as published for Point-M2AE.
    """
    prompt_dropout: Dropout = 0.1
    """Dropout of the learned prompts."""
    memory_bank: bool = False
    """Enhance the prompts by the prior that a memory bank of training features gives; published: True.

    Where stages differ in width: the prompts of the blocks that are as wide as the features.
    """
    bank_dtype: Literal["float16", "float32"] = "float16"
    """Type in which the rows of the bank are kept and saved."""
    bank_size: int | None = 1800
    """Rows that the bank is reduced to where it is built of more clouds, by k-means in each class; None: all are kept.

    With 1800 rows the file of an adapter with a head is at most 5 % of that of Point-MAE's base.
    """
    top_k: int | None = None
    """Rows retrieved from the bank; they enhance the first 2 + top_k prompts. None: num_prompts - 2."""
    leave_nearest_out: bool = False
    """While training, skip the nearest row: for a training cloud it is most likely the cloud itself."""
    prior: Literal["block", "backbone", "stem"] = "block"
    """The tokens whose feature queries the bank: ahead of the first adapted block, or of the patch embedding.

    "backbone": those after the frozen backbone, as published; they take a second pass.
    """
    standardised: bool = True
    """Compare features channel by channel as deviations from the bank's mean, in its standard deviations.

    As they are, features of any two clouds point nearly the same way.
    """
    temperature: Factor = 20.0
    """Factor of the likenesses of the retrieved rows ahead of their softmax."""
    neighbourhood_width: Annotated[int | None, at_least(0)] = None
    """Channels inside the encoder of the points around each token, ahead of the first adapted block; 0: none.

    None: 64, but none where it is not known where the model sees its clouds, or where tokens are packed.
    """
    neighbourhood_points: Count = 16
    """Points in the neighbourhood of a token, at most as many as a cloud has."""
    neighbourhood_dilation: Count = 8
    """Of so many times as many nearest points, the neighbourhood has each of that number: 16 of the 128 nearest.

    Scans that are resampled to a number of points hold many of them twice.
    """
    prior_adapter_width: Count = 8
    """Channels in the middle of the adapter of the prior, CPA."""
    adapter_width: Count = 16
    """Channels in the middle of the adapters after the MLP and after the block."""
    adapter_dropout: Dropout = 0.1
    """Dropout in the middle of all these adapters."""
    adapter_scale: Annotated[float, at_least(0)] = 0.7
    """Scale of the adapter after the MLP; 0: no adapter there."""
    centre_ratio: Annotated[float, Limit("more than 0 and at most 1", lambda ratio: 0 < ratio <= 1)] = 0.5
    """Centres of neighbourhoods per patch token."""
    neighbours: Count = 16
    """Tokens in a neighbourhood, at most as many as there are tokens."""
    local_attention_width: Count = 18
    """Channels of query, key and value in a neighbourhood, all heads together."""
    local_attention_heads: Count = 6
    """Heads of the local attention."""
    local_attention_drop_path: Dropout = 0.1
    """Share of neighbourhoods that go without their local attention while training."""
    propagation_scale: Annotated[float, at_least(0)] = 0.3
    """Scale of what the centres propagate to the tokens."""
    centre_scale: Annotated[float, at_least(0)] = 0.3
    """Scale of the centre's own token in what it propagates."""
    pooling_norm: Literal["batch", "layer"] = "batch"
    """The norm of pooled neighbourhoods; "layer" for training with batches of one."""
    tuned_biases: str | Sequence[str] | None = None
    """Modules whose bias is trained; None: norms, attention projection and MLP of every adapted block."""
    tuned_norms: str | Sequence[str] | None = None
    """LayerNorms that are trained; None: the final norm."""
    tuned_tokens: str | Sequence[str] | None = None
    """Prefix tokens and positions that are trained; None: all, because checkpoints of Point-MAE lack them."""
    init: Literal["identity", "published"] = "identity"
    """Start as the backbone, or as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bank_size is None or self.bank_size >= 1, self, "bank_size", "1 or more, or None")
        heads = self.local_attention_heads
        divides = self.local_attention_width % heads == 0
        require(divides, self, "local_attention_width", f"a multiple of local_attention_heads={heads}")
        if self.top_k is not None:
            limit = max(0, self._prompts - 2)
            require(1 <= self.top_k <= limit, self, "top_k", f"1 to num_prompts - 2 = {limit}, or None")
        elif self.memory_bank and self._prompts:
            require(self._prompts >= 3, self, "num_prompts", "0, or 3 or more with a memory bank (2 + top_k)")

    @classmethod
    def published(cls) -> PointPEFTConfig:
        """The method of the paper: every block, the prior of a second pass, no temperature, and no gates."""
        return cls(**cls.earlier, init="published")

    @property
    def identity_at_init(self) -> bool:
        """A fresh adapter is the backbone plus its prompts, which not every backbone has a place for."""
        return self.init == "identity" and (self.num_prompts == 0 or self.prompt_layers == 0)

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        chosen = self._adapted(backbone)
        left_open = self.num_prompts is None
        without = [b for b in chosen if left_open and not anatomy.stages[anatomy.stage_of(b)].takes_prompts]
        prompted = self._prompted(anatomy, [block for block in chosen if block not in without])
        queried = self._queried(anatomy, chosen[0])
        source = chosen[0].path if self.prior == "block" else self.prior
        # Where the prediction is made from the prefix tokens alone, nothing reads the last block's patches.
        unread = None if anatomy.patches_read else anatomy.blocks[-1]
        plan = Blueprint()
        if without:
            where = f"{len(without)} of its {len(chosen)} blocks, which have no place for them ('{without[0].path}' …)"
            why = anatomy.stages[anatomy.stage_of(without[0])].why_no_prompts
            alone = "the geometry-aware adapter acts alone"
            plan.choices.append(f"{self.method} has no prompts in {where}: {alone}. Why: {why}")
        for number, stage in enumerate(anatomy.stages):
            blocks = [block for block in chosen if block in stage.blocks]
            if not blocks:
                continue
            with_prompts = [block for block in blocks if block in prompted]
            self._check_stage(anatomy, stage, blocks, with_prompts=bool(with_prompts))
            # A prior has the width of the features that query it, so it fits only the blocks of that width.
            prior = source if self.memory_bank and stage.width == queried.width else None
            if prior is not None and with_prompts and "memory_bank" not in plan.shared:
                plan.shared["memory_bank"] = self._bank(queried, source)
            aware = [block for block in blocks if block != unread]
            if aware:
                plan.shared[f"stage_{number}"] = self._stage_geometry(number, stage, any(b in prompted for b in aware))
            for block in blocks:
                part = BlockPart(
                    stage=stage,
                    number=number,
                    prompt=self._prompt(stage, prior) if block in prompted else None,
                    geometry=self._geometry(stage) if block in aware else None,
                    adapter=self._adapter(stage, self.adapter_width),
                    prior=prior if block in prompted else None,
                    neighbourhood=self._neighbourhood(anatomy, stage) if block is chosen[0] else None,
                    prefix=self._shifted_tokens(backbone, anatomy, block) if block is chosen[0] else 0,
                    centre_ratio=self.centre_ratio,
                    neighbours=self.neighbours,
                )
                plan.parts.append((block.path, part))
                if self.adapter_scale:
                    after_mlp = MlpPart(self._adapter(stage, self.adapter_width), self.adapter_scale)
                    plan.parts.append((self._mlp(block), after_mlp))
        self._build_tuned(plan, backbone, anatomy, chosen)
        return plan

    def _adapted(self, backbone: Backbone) -> list[Block]:
        """The blocks that are adapted, in order."""
        chosen = [block for _, block in self.chosen_blocks(backbone)]
        if self.target_modules is not None or self.layers_to_transform is not None:
            return chosen
        packed = any(stage.layout == "packed" for stage in backbone.known_anatomy(self.method).stages)
        share = self.adapted_share or (1.0 if packed else 0.5)
        return chosen[-max(1, round(share * len(chosen))) :]

    def _shifted_tokens(self, backbone: Backbone, anatomy: Anatomy, first: Block) -> int:
        """The number of prefix tokens that are trained as they enter the first adapted block: none at the very first.

        There the tokens themselves are, and where `tuned_tokens` names none, none is trained.
        """
        if first is anatomy.blocks[0] or first not in anatomy.stages[0].blocks or self.tuned_tokens is not None:
            return 0
        tokens = [parameter for parameter in anatomy.prefix_parameters if parameter.role == "token"]
        return sum(backbone.model.get_parameter(token.name).numel() for token in tokens) // anatomy.stages[0].width

    def _queried(self, anatomy: Anatomy, first: Block) -> Stage:
        """The stage whose tokens the query of the bank is of."""
        number = {"stem": 0, "block": anatomy.stage_of(first), "backbone": anatomy.queried}[self.prior]
        return anatomy.stages[number]

    def _prompted(self, anatomy: Anatomy, chosen: Sequence[Block]) -> Sequence[Block]:
        """The blocks that get prompts, of those that may."""
        if self.num_prompts == 0:
            return []
        several = len({stage.width for stage in anatomy.stages}) > 1
        half = len(chosen) if several else max(1, len(chosen) // 2)
        return chosen[: half if self.prompt_layers is None else self.prompt_layers]

    @property
    def _prompts(self) -> int:
        """Prompts in a block that has a place for them."""
        return PROMPTS if self.num_prompts is None else self.num_prompts

    def _adapter(self, stage: Stage, width: int) -> Bottleneck:
        return quick_bottleneck(stage.width, width, self.adapter_dropout, identity=self.init == "identity")

    def _prompt(self, stage: Stage, prior: str | None) -> Prompt:
        prior_adapter = None if prior is None else self._adapter(stage, self.prior_adapter_width)
        return Prompt(self._prompts, stage.width, self.prompt_dropout, prior_adapter)

    def _geometry(self, stage: Stage) -> GeometryAwareAdapter:
        return GeometryAwareAdapter(
            stage.width,
            batch_norm=self.pooling_norm == "batch",
            scale=self.propagation_scale,
            centre_scale=self.centre_scale,
            gated=self.init == "identity",
        )

    def _neighbourhood(self, anatomy: Anatomy, stage: Stage) -> NeighbourhoodEncoder | None:
        """The encoder of the points around the tokens of a stage, whose clouds are those of the first that sees any."""
        seen = [number for number, one in enumerate(anatomy.stages) if one.points is not None]
        if self.neighbourhood_width == 0:
            return None
        if seen and stage.layout != "packed":
            width = NEIGHBOURHOOD_WIDTH if self.neighbourhood_width is None else self.neighbourhood_width
            points, dilation = self.neighbourhood_points, self.neighbourhood_dilation
            return NeighbourhoodEncoder(stage.width, width, points, dilation, seen[0])
        if self.neighbourhood_width is None:
            return None
        known = "these are packed" if stage.layout == "packed" else "where they are seen is not known"
        raise AnatomyError(
            f"{self.method} with neighbourhood_width={self.neighbourhood_width} needs the clouds that the tokens of "
            f"'{stage.blocks[0].path}' were made of, and {known}: state it in config.anatomy (Stage.points), or leave "
            "the field out"
        )

    def _stage_geometry(self, number: int, stage: Stage, prompted: bool) -> StageGeometry:
        width, heads, drop_path = self.local_attention_width, self.local_attention_heads, self.local_attention_drop_path
        return StageGeometry(
            "point_peft" if number == 0 else f"point_peft.stage_{number}",
            LocalAttention(stage.width, width, heads, drop_path),
            self._prompts if prompted else 0,
        )

    def _bank(self, queried: Stage, source: str) -> MemoryBank:
        if self.prior == "stem" and queried.patch_tokens is None:
            raise AnatomyError(
                f'{self.method} with prior="stem" needs the patch embedding, and where it is seen is not known: '
                'use prior="backbone"'
            )
        return MemoryBank(
            queried.width,
            self._prompts - 2 if self.top_k is None else self.top_k,
            source,
            torch.float16 if self.bank_dtype == "float16" else torch.float32,
            leave_nearest_out=self.leave_nearest_out,
            standardised=self.standardised,
            temperature=self.temperature,
            size=self.bank_size,
        )

    def _mlp(self, block: Block) -> str:
        if block.mlp is None:
            raise AnatomyError(
                f"{self.method} adapts the MLP of every block, and '{block.path}' has none that was found: set "
                "adapter_scale=0.0 to do without, or name it in config.anatomy"
            )
        return block.mlp

    def _check_stage(self, anatomy: Anatomy, stage: Stage, blocks: Sequence[Block], *, with_prompts: bool) -> None:
        """Raise `AnatomyError` unless it is known where the tokens lie, and prompts that they get have a place."""
        path = blocks[0].path
        if stage.coordinates is None:
            located = [other.blocks[0].path for other in anatomy.stages if other.coordinates is not None]
            choice = f"; target_modules can choose blocks of which it is known, as '{located[0]}'" if located else ""
            raise AnatomyError(
                f"{self.method} needs to know where the tokens of '{path}' lie in space: "
                f"{stage.unknown or 'config.anatomy states no coordinates'}. LORA, BITFIT and LINEAR_PROBE do without"
                f"{choice}"
            )
        if with_prompts and not stage.takes_prompts:
            raise AnatomyError(
                f"{self.method} puts prompts among the tokens of '{path}', which has no place for them "
                f"({stage.why_no_prompts}): leave num_prompts out, or set it to 0, to keep its geometry-aware adapter, "
                "or use LORA or BITFIT"
            )

    def _build_tuned(self, plan: Blueprint, backbone: Backbone, anatomy: Anatomy, blocks: Sequence[Block]) -> None:
        names = list(backbone.modules)
        biases = block_biases(backbone, blocks)
        if self.tuned_biases is not None:
            biases = list(match_names(self.tuned_biases, names, field="tuned_biases"))
        plan.parts += tuned_biases(backbone, biases)
        norms: Sequence[str] = anatomy.final_norms
        if self.tuned_norms is not None:
            norms = match_names(self.tuned_norms, names, field="tuned_norms")
        plan.parts += tuned_norms(backbone, norms)
        if blocks[0] is not anatomy.blocks[0] and not self.tuned_tokens:
            keep_prefix(plan, backbone, self.method)
            return
        second_pass = "memory_bank" in plan.shared and self.prior != "stem"
        tune_prefix(plan, backbone, self.method, self.tuned_tokens, keep_base=second_pass)
