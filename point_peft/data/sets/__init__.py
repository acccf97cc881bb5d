"""The field's own data sets, in the forms that people have on their disks; nothing is downloaded or written.

The readers of torch_geometric do not fit: they take meshes for ModelNet and blocks for S3DIS, know no ScanObjectNN,
download what is missing and keep tensors in a folder `processed`. Those of torch_pointcloud know most forms here, but
neither few-shot tasks, ScanObjectNN's mask nor parts in HDF5, and most of them write into `processed`, too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from point_peft.data.cloud_set import CloudSet
from point_peft.data.options import DataOptions
from point_peft.data.sets.few_shot import read_few_shot, recognises_few_shot
from point_peft.data.sets.modelnet import read_modelnet, recognises_modelnet
from point_peft.data.sets.s3dis import read_s3dis, recognises_s3dis
from point_peft.data.sets.scanobjectnn import read_scanobjectnn, recognises_scanobjectnn
from point_peft.data.sets.shapenetpart import read_shapenetpart, recognises_shapenetpart


class KnownSet(NamedTuple):
    """One of the field's sets: how its folder is told, and read."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, DataOptions], CloudSet]


SETS: dict[str, KnownSet] = {
    "modelnet40": KnownSet(recognises_modelnet, read_modelnet),
    "scanobjectnn": KnownSet(recognises_scanobjectnn, read_scanobjectnn),
    "shapenetpart": KnownSet(recognises_shapenetpart, read_shapenetpart),
    "s3dis": KnownSet(recognises_s3dis, read_s3dis),
    "few_shot": KnownSet(recognises_few_shot, read_few_shot),
}
"""Name -> the set."""
