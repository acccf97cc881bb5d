"""Tiny backbones that every method is tested on. One enters by being registered; the suite takes it from there.

Each family has its file, which is imported here. A backbone of a package that is not installed is not registered.
"""

from __future__ import annotations

# In the order in which they register.
# isort: off
from .registry import BACKBONES, CLASSES, WIDTH, Args, Mould, TinyBackbone, enliven, register
from .inputs import LABELS, POINTS, clouds, labelled_clouds, labels, packed_clouds, packed_labelled_clouds
from .operators import supply_pyg_operators
from . import library as library
from . import torch_pointcloud as torch_pointcloud
from . import torch_pointcloud_scenes as torch_pointcloud_scenes
from .compact import Checkpointing, Compact, compact_like
from . import timm as timm
from . import torch_geometric as torch_geometric
from . import openpoints as openpoints
from . import torch_transformer as torch_transformer
from . import pointgpt as pointgpt
from . import recon as recon
from . import pointcept as pointcept
from . import vector_attention as vector_attention
from . import variants as variants
# isort: on

__all__ = [
    "BACKBONES",
    "CLASSES",
    "LABELS",
    "POINTS",
    "WIDTH",
    "Args",
    "Checkpointing",
    "Compact",
    "Mould",
    "TinyBackbone",
    "clouds",
    "compact_like",
    "enliven",
    "labelled_clouds",
    "labels",
    "packed_clouds",
    "packed_labelled_clouds",
    "register",
    "supply_pyg_operators",
]
