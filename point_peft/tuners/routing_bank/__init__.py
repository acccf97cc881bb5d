"""Routing bank: what a router needs to know of an adapter's training clouds; it changes no output.

P. C. Mahalanobis: "On the generalised distance in statistics", Proceedings of the National Institute of Sciences of
India 2, 1936; K. Lee, K. Lee, H. Lee, J. Shin: "A Simple Unified Framework for Detecting Out-of-Distribution Samples
and Adversarial Attacks", NeurIPS 2018, https://arxiv.org/abs/1807.03888

The bank holds a feature of each training cloud, or of as many prototypes as `size` says. With the patch tokens t_i that
the frozen backbone has after its last block and norm:

    u = n(max_i t_i)                n(v) = v / |v|

`model.build_memory_bank(batches)` fills it, and so does `point_peft.training.fit`. `model.route(clouds)` then tells
whose bank each cloud fits best, and `model(clouds, adapter_names="auto")` lets that adapter answer.
`point_peft.routing` has the equations.

When to use it: beside any other method, `PeftConfig(tuners=(LoraConfig(), RoutingBankConfig()))`, where several
adapters of one backbone serve a stream of clouds and nobody says which of them a cloud is for. No forward reads it, so
it costs nothing there, and an adapter that merges without it merges with it. 1,800 rows take 1.4 MB where c is 384.

Deviations from the paper of 2018, each with its reason:

- One mean and one covariance for an adapter, not a mean for each of its classes: regression and segmentation have none.
- The features are of unit length and of one layer, as those of Point-PEFT's memory bank are, which routes too.
- Distances are told relative to those of the bank's own rows, each left out, as banks differ in extent.
- Packed tokens (PTv3 and the like) are refused: a scene of many objects is of no one task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from point_peft.config import TunerConfig, require
from point_peft.errors import AnatomyError
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import FEWEST_ROWS, Blueprint
from point_peft.schema import at_least
from point_peft.tuners.routing_bank.bank import RoutingBank


@dataclass(frozen=True, kw_only=True)
class RoutingBankConfig(TunerConfig):
    """A bank and no parts: what is trained are the modules of `modules_to_save`, by default the heads."""

    method: ClassVar[str] = "ROUTING_BANK"

    size: Annotated[int | None, at_least(FEWEST_ROWS)] = 1800
    """Rows that a bank is reduced to, by k-means in each class; None: a row for each cloud."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "layers_to_transform"):
            require(getattr(self, name) is None, self, name, "None, because a routing bank adapts no module")

    def build(self, backbone: Backbone) -> Blueprint:
        anatomy = backbone.known_anatomy(self.method)
        stage = anatomy.stages[anatomy.queried]
        if stage.layout == "packed" or stage.coordinates is None:
            why = "they are packed" if stage.layout == "packed" else stage.unknown or "config.anatomy states none"
            raise AnatomyError(
                f"{self.method} compares whole clouds by the patch tokens of '{stage.blocks[-1].path}', and needs "
                f"those of each cloud apart and where they lie: {why}"
            )
        return Blueprint(shared={"routing_bank": RoutingBank(stage.width, self.size)})
