"""Point cloud backbones with the tensor names of public checkpoints."""

from point_peft.backbones.checkpoint import CheckpointReport, default_backbone, load_checkpoint
from point_peft.backbones.hierarchical import HierarchicalPointTransformer
from point_peft.backbones.hierarchical_part_segmentation import HierarchicalPointTransformerPartSeg
from point_peft.backbones.part_segmentation import PointTransformerPartSeg
from point_peft.backbones.point_transformer import PointTransformer

__all__ = [
    "CheckpointReport",
    "HierarchicalPointTransformer",
    "HierarchicalPointTransformerPartSeg",
    "PointTransformer",
    "PointTransformerPartSeg",
    "default_backbone",
    "load_checkpoint",
]
