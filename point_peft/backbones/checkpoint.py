"""Read public checkpoints of point transformers into a model: containers and prefixes off, all or nothing."""

import difflib
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from point_peft.backbones.point_transformer import PointTransformer
from point_peft.errors import PointPeftError, quoted

# Where training scripts put the weights inside of what they save; the first that is there counts.
CONTAINERS = ("model", "base_model", "state_dict", "model_state_dict")
# The ways in which the unpickler fails over bytes that are no pickle.
BROKEN = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)
# What wraps a whole model: distributed training, and a container that was flattened into the names.
WRAPPERS = ("module.", "base_model.")
# Pre-training models keep the backbone under a name of their own, beside decoders and teachers. If one of these is
# found, only the names under it are the backbone's, except those that start with the second prefix. Point-M2AE's are
# not among them: its pre-training model calls the encoder `h_encoder.` as the models do that are made from it.
ENCODERS = (("MAE_encoder.", None), ("ACT_encoder.", None), ("transformer_q.", "transformer_q.cls_head"))
# The layers whose shape depends on the number of classes: from another data set they are left out, not refused.
HEADS = ("cls_head_finetune.", "convs3.", "convs4.")
# The parts of a model that every pre-training fills; prefix tokens, which some leave out, are not among them. A model
# that has none of these is counted as a whole.
ENCODER_PARTS = ("encoder.", "reduce_dim.", "pos_embed.", "blocks.", "norm.", "h_encoder.")

EMBEDDED = Path(__file__).parent / "point_mae_small"


@dataclass(frozen=True)
class CheckpointReport:
    """Effect of a checkpoint on a model, in sorted names.

    `loaded` and `missing` are names of the model: filled from the file, and left as they were (noise, if the model is
    fresh). `unexpected` are names of the file that went nowhere.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def encoder_share(self) -> float:
        """The share of the encoder's tensors that were filled, 0 to 1."""
        filled, total = self._encoder
        return filled / total

    @property
    def _encoder(self) -> tuple[int, int]:
        """The number of the encoder's tensors that were filled, and of all that it has."""
        names = (*self.loaded, *self.missing)
        encoder = {name for name in names if name.startswith(ENCODER_PARTS)} or set(names)
        return len(encoder.intersection(self.loaded)), len(encoder)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors"]
        if self.encoder_share < 1:
            lines[0] += ", of the encoder {} of {}, {:.0%}".format(*self._encoder, self.encoder_share)
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        if self.unexpected:
            lines.append(f"in the file but not in the model: {_summary(self.unexpected)}")
        return "\n".join(lines)


class _Ignored:
    """Stands in for numpy scalars among saved metrics, so that files with them pass the weights-only reader."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_METRICS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> CheckpointReport:
    """Fill `model` from a `.safetensors` file or a pickled checkpoint, and report what was and was not filled.

    Names lose the prefixes of the public pre-training code. A head for another number of classes is left out and
    reported as missing; any other difference in shape is an error, and so is, unless `strict=False`, an encoder of
    which less than half would be filled. After an error the model is as it was.
    """
    path = Path(path)
    content = _read(path)
    source, unexpected = _strip(path, _tensors(content))
    own = model.state_dict()
    fitting = {}
    for name, (original, tensor) in source.items():
        if name not in own or (tensor.shape != own[name].shape and name.startswith(HEADS)):
            unexpected.append(original)
        elif tensor.shape != own[name].shape:
            ours, theirs = tuple(own[name].shape), tuple(tensor.shape)
            raise PointPeftError(f"{path}: {original} has shape {theirs} in the file and {ours} in the model")
        else:
            fitting[name] = tensor
    if not fitting:
        raise PointPeftError(f"{path}: no tensor fits the model. {_nearest(source, own)}{_deeper(content)}")
    report = CheckpointReport(
        loaded=tuple(sorted(fitting)),
        missing=tuple(sorted(own.keys() - fitting.keys())),
        unexpected=tuple(sorted(unexpected)),
    )
    if strict and report.encoder_share < 0.5:
        raise PointPeftError(
            f"{path} fills less than half of the encoder, so that most of it would stay noise; pass strict=False if "
            f"that is meant: {report}"
        )
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
    return report


def default_backbone(cls_dim: int) -> PointTransformer:
    """The small pre-trained backbone that comes with the package, with a fresh head for `cls_dim` classes."""
    weights, config = EMBEDDED.with_suffix(".safetensors"), EMBEDDED.with_suffix(".json")
    for file in (weights, config):
        if not file.is_file():
            raise PointPeftError(f"the embedded backbone is not part of this installation: {file} does not exist")
    model = PointTransformer(**{**json.loads(config.read_text(encoding="utf-8")), "cls_dim": cls_dim})
    report = load_checkpoint(model, weights)
    noise = [name for name in report.missing if not name.startswith(HEADS)]
    if noise or report.unexpected:
        raise PointPeftError(f"{weights} and {config.name} do not belong together: {report}")
    return model


def _read(path: Path) -> Mapping[Any, Any]:
    """The content of a file, out of its container: tensors by name, and maybe other things."""
    if not path.is_file():
        raise PointPeftError(f"there is no checkpoint file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise PointPeftError(f"{path} is not a safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _METRICS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        raise PointPeftError(f"{path} cannot be read as tensors only: {_reason(error)}") from error
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    if not isinstance(content, Mapping):
        raise PointPeftError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    """A line of what torch says, which otherwise goes on with how to read whatever is in the file."""
    words = str(error).rpartition("WeightsUnpickler error: ")[2]
    forbidden = re.search(r"GLOBAL (\S+)", words)
    if forbidden is not None:
        return f"it holds {quoted(forbidden[1])} too; save the state dict alone"
    return quoted(words.strip().partition("\n")[0], 200) if words else type(error).__name__


def _strip(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """The tensors of the backbone by their bare name, each with its name in the file; and the names of all others."""
    bare: dict[str, tuple[str, Tensor]] = {}
    for original, tensor in tensors.items():
        name = _unwrapped(original)
        if name in bare:
            raise PointPeftError(f"{path}: {bare[name][0]} and {original} are both called {name} without their wrapper")
        bare[name] = (original, tensor)
    for prefix, excluded in ENCODERS:
        if any(name.startswith(prefix) for name in bare):
            inside = {n for n in bare if n.startswith(prefix) and not (excluded and n.startswith(excluded))}
            outside = [original for name, (original, _) in bare.items() if name not in inside]
            return {name.removeprefix(prefix): bare[name] for name in inside}, outside
    return bare, []


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _nearest(held: Iterable[str], wanted: Iterable[str]) -> str:
    """For the error: what the file calls its tensors and what the model calls the most similar ones."""
    names, targets = sorted(held), sorted(wanted)
    if not names:
        return "It holds no tensors itself."
    pairs = []
    for name in names:
        for near in difflib.get_close_matches(name, targets, n=1, cutoff=0.5):
            pairs.append(f"{name} (model: {near})")
        if len(pairs) == 3:
            break
    if pairs:
        return f"Nearest names: {', '.join(pairs)}."
    return f"It holds {_summary(names)}; the model has {', '.join(targets[:3])}, ..."


def _deeper(content: Mapping[Any, Any]) -> str:
    """For the error: the entries of a file that hold tensors themselves, a container of a name that is not known."""
    counts = {quoted(key): len(_tensors(entry)) for key, entry in content.items() if isinstance(entry, Mapping)}
    held = {key: count for key, count in counts.items() if count}
    if not held:
        return ""
    listed = ", ".join(f"{key} holds {count} tensors" for key, count in held.items())
    return f" In it, {listed}: save the weights alone, torch.save(torch.load(path)[{next(iter(held))}], …)"


def _summary(names: Iterable[str]) -> str:
    """Names counted by their first part within wrappers, such as `MAE_decoder (46), mask_token (1)`."""
    counts = Counter(_unwrapped(name).split(".", 1)[0] for name in names)
    return ", ".join(f"{first} ({count})" for first, count in sorted(counts.items()))
