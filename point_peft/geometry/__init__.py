"""Pure batched functions on point clouds: distances, sampling, neighbours, interpolation.

Every function treats each cloud of the batch on its own, so a sample's result does not depend on its batch mates.
Distances are taken from coordinate differences: the expanded form `|a|^2 - 2ab + |b|^2` is wrong by 0.026 on a cloud
that lies 100 units from the origin. Half precision inputs are widened to float32 first.
"""

from point_peft.geometry.dense import gather, interpolate, inverse_distance_weights, rows_of_all, squared_distance
from point_peft.geometry.morton import interleaved, morton_order, ragged_morton_order
from point_peft.geometry.neighbours import farthest_point_sample, feature_knn, knn, nearest_interpolate
from point_peft.geometry.offsets import as_offset, counts_of, gathered, offset_of, rows_of, samples_of
from point_peft.geometry.packed import nearest_weights, ragged_farthest_point_sample, ragged_interpolate, ragged_knn

__all__ = [
    "as_offset",
    "counts_of",
    "farthest_point_sample",
    "feature_knn",
    "gather",
    "gathered",
    "interleaved",
    "interpolate",
    "inverse_distance_weights",
    "knn",
    "morton_order",
    "nearest_interpolate",
    "nearest_weights",
    "offset_of",
    "ragged_farthest_point_sample",
    "ragged_interpolate",
    "ragged_knn",
    "ragged_morton_order",
    "rows_of",
    "rows_of_all",
    "samples_of",
    "squared_distance",
]
