"""openpoints' PointViT, unmodified."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .inputs import clouds, slice_batch
from .operators import supply_openpoints_operators
from .parts import HEADS
from .registry import CLASSES, WIDTH, linear_head, register


@register(
    needs=("openpoints", "torchvision"),
    inputs=clouds,
    slice=slice_batch,
    heads=("prediction",),
    other_head=linear_head(2 * WIDTH),
)
def openpoints_point_vit() -> nn.Module:
    """`encoder` is never called as a module; centres are in a list, beside the points that they were chosen from."""
    supply_openpoints_operators()
    from openpoints.models.classification.cls_base import BaseCls
    from openpoints.utils import EasyConfig

    options = EasyConfig()
    patches = {"NAME": "PointPatchEmbed", "sample_ratio": 1 / 6, "group_size": 8, "subsample": "fps", "group": "knn"}
    options.update(
        {
            "encoder_args": {
                "NAME": "PointViT",
                "embed_dim": WIDTH,
                "depth": 2,
                "num_heads": HEADS,
                "embed_args": {**patches, "feature_type": "dp_fj", "norm_args": {"norm": "bn2d"}},
            },
            "cls_args": {"NAME": "ClsHead", "num_classes": CLASSES, "mlps": [16], "norm_args": {"norm": "bn1d"}},
        }
    )
    model: nn.Module = BaseCls(**options)
    # Its own is a lambda, with which no model can be pickled.
    patch_embed: Any = model.get_submodule("encoder.patch_embed")
    patch_embed.pool = functools.partial(torch.amax, dim=-1, keepdim=True)
    return model
