"""Profiles of training for a label at every point: each function is a line that says which modules are trained.

    model = per_point(encoder, num_classes=13, example_inputs=scene)   # of an encoder without decoder
    model = adapter(model, LoraConfig())

| profile                | trained                                                     |
| ---------------------- | ----------------------------------------------------------- |
| `linear_probe`         | the head                                                    |
| `decoder_probe`        | decoder and head                                            |
| `adapter`              | the adapter's parts and the head                            |
| `adapter_with_decoder` | the adapter's parts in the encoder, decoder and head        |
| `full`                 | everything                                                  |

Decoder and head belong to the adapter: they are saved and swapped with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import Anatomy
from point_peft.config import PeftConfig, TunerConfig
from point_peft.errors import AdapterError, nearest_names, quoted
from point_peft.model import PointPeftModel, get_peft_model
from point_peft.tracing import understand
from point_peft.tuners.linear_probe import LinearProbeConfig

DECODER = "decoder"


class Level(NamedTuple):
    """One stage of an encoder that pools."""

    features: Tensor
    """(n, c)"""
    inverse: Tensor | None
    """(n,): which token of the next, coarser level each token was pooled into; None of the coarsest."""


def levels_of(output: Any) -> list[Level]:
    """The stages of an encoder's output, the finest first.

    It is either what Sonata, Concerto and Utonia of Pointcept return, a mapping with `feat`, `pooling_parent` and
    `pooling_inverse`, or what torch-pointcloud's encoders return with `return_intermediates=True`: features first, and
    last a list of mappings with `x` and `pooling_inverse`. Raises `AdapterError` for anything else.
    """
    if isinstance(output, Mapping) and "feat" in output:
        return list(_by_parents(output))[::-1]
    if isinstance(output, (tuple, list)) and isinstance(output[-1], (tuple, list)):
        finer = [own for own in output[-1] if isinstance(own, Mapping)]
        if len(finer) == len(output[-1]) and all("pooling_inverse" in own and "x" in own for own in finer):
            return [*(Level(own["x"], own["pooling_inverse"]) for own in finer), Level(output[0], None)]
    raise AdapterError(
        f"the encoder returned a {type(output).__name__} without its stages; needed: a mapping with 'feat' and, of "
        "pooled points, 'pooling_parent' and 'pooling_inverse', or a tuple that ends with a list of mappings with 'x' "
        "and 'pooling_inverse' (torch-pointcloud's encoders: call the model with return_intermediates=True)"
    )


def _by_parents(point: Mapping[str, Any]) -> Iterator[Level]:
    yield Level(point["feat"], None)
    while "pooling_parent" in point:
        point, inverse = point["pooling_parent"], point["pooling_inverse"]
        yield Level(point["feat"], inverse)


class Concatenated(nn.Module):
    """Features (n, sum of c) of the finest tokens: each one's own beside those of what it was pooled into."""

    def forward(self, levels: Sequence[Level]) -> Tensor:
        x = levels[-1].features
        for features, inverse in levels[-2::-1]:
            x = torch.cat([features, x[inverse]], dim=1)
        return x


class Decoder(nn.Module):
    """Un-pooling without attention: x <- f(x)[inverse] + g(features) at each finer level; f and g are small layers.

    It is the un-pooling of Point Transformer V3 (X. Wu et al., CVPR 2024, https://arxiv.org/abs/2312.10035), with a
    LayerNorm in place of its BatchNorm, so that nothing depends on other clouds, and without blocks after it.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        *finer, coarsest = channels
        self.first = _layer(coarsest, width)
        self.coarser = nn.ModuleList(_layer(width, width) for _ in finer)
        self.finer = nn.ModuleList(_layer(c, width) for c in finer)

    def forward(self, levels: Sequence[Level]) -> Tensor:
        """Features (n, width) of the finest tokens."""
        x: Tensor = self.first(levels[-1].features)
        steps = zip(levels[:-1], self.coarser, self.finer, strict=True)
        for (features, inverse), coarser, finer in reversed(list(steps)):
            x = coarser(x)[inverse] + finer(features)
        return x


def _layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU())


class PerPoint(nn.Module):
    """An encoder that pools, its stages un-pooled, and a linear head: logits (n, classes) of the tokens it is given."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits; the arguments are those of the encoder."""
        logits: Tensor = self.head(self.decoder(levels_of(self.encoder(*args, **kwargs))))
        return logits


def per_point(
    encoder: nn.Module, num_classes: int, *, example_inputs: Any, decoder_width: int | None = None
) -> PerPoint:
    """A model with a head at every point, of an encoder that has none.

    `example_inputs` (a tensor, a tuple of positional or a dict of named arguments) tell the widths of its stages. The
    head reads all stages concatenated, as their authors probe Sonata and its like, or a `Decoder` of `decoder_width`.
    """
    args, kwargs = _arguments(example_inputs)
    training = encoder.training
    try:
        with torch.no_grad():
            levels = levels_of(encoder.eval()(*args, **kwargs))
    finally:
        encoder.train(training)
    like = levels[0].features
    channels = [level.features.shape[1] for level in levels]
    decoder = Concatenated() if decoder_width is None else Decoder(channels, decoder_width)
    head = nn.Linear(sum(channels) if decoder_width is None else decoder_width, num_classes)
    return PerPoint(encoder, decoder.to(like), head.to(like)).train(training)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def linear_probe(model: nn.Module, *, example_inputs: Any = None) -> PointPeftModel:
    """Train the head; a decoder, if there is one, stays as it is."""
    return adapter(model, LinearProbeConfig(), example_inputs=example_inputs)


def decoder_probe(model: nn.Module, *, decoder: str = DECODER, example_inputs: Any = None) -> PointPeftModel:
    """Train the head and the module `decoder`."""
    heads = _with_decoder(model, decoder, understand(model, example_inputs))
    return get_peft_model(model, LinearProbeConfig(modules_to_save=heads), example_inputs=example_inputs)


def adapter(
    model: nn.Module, config: TunerConfig | PeftConfig, *, adapter_name: str = "default", example_inputs: Any = None
) -> PointPeftModel:
    """Train the parts of a method, or of several, and the head; a decoder, if there is one, stays as it is."""
    heads = [head for head in _heads(model, understand(model, example_inputs)) if head != DECODER]
    return get_peft_model(model, _saving(config, heads), adapter_name, example_inputs=example_inputs)


def adapter_with_decoder(
    model: nn.Module,
    config: TunerConfig | PeftConfig,
    *,
    decoder: str = DECODER,
    adapter_name: str = "default",
    example_inputs: Any = None,
) -> PointPeftModel:
    """Train the parts of a method, or of several, in the encoder's blocks, the head and the module `decoder`."""
    anatomy = understand(model, example_inputs)
    heads = _with_decoder(model, decoder, anatomy)
    outside = [number for number, block in enumerate(anatomy.blocks) if not block.path.startswith(f"{decoder}.")]
    layers = None if len(outside) == len(anatomy.blocks) else outside
    return get_peft_model(model, _saving(config, heads, layers), adapter_name, example_inputs=example_inputs)


def full(model: nn.Module) -> nn.Module:
    """Train everything: the model itself, which no adapter shares."""
    return model.requires_grad_(True)


def _heads(model: nn.Module, anatomy: Anatomy) -> Sequence[str]:
    if not anatomy.heads:
        raise AdapterError(
            f"no head was found in the {type(model).__name__}: make one by point_peft.profiles.per_point"
        )
    return anatomy.heads


def _with_decoder(model: nn.Module, decoder: str, anatomy: Anatomy) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    if decoder not in modules:
        near = nearest_names(decoder, list(modules), what="module")
        raise AdapterError(f"no module is called {quoted(decoder)}; nearest: {near}; name the decoder by decoder=")
    if not any(True for _ in modules[decoder].parameters()):
        raise AdapterError(
            f"{quoted(decoder)} has nothing to train: make one by point_peft.profiles.per_point(decoder_width=...)"
        )
    return list(dict.fromkeys([decoder, *_heads(model, anatomy)]))


def _saving(config: TunerConfig | PeftConfig, heads: Sequence[str], layers: Sequence[int] | None = None) -> PeftConfig:
    """The configuration with these modules saved, and its methods kept to these blocks; None: to those that it says."""
    whole = PeftConfig.of(config)
    return replace(whole, tuners=[_kept(own, layers) for own in whole.tuners], modules_to_save=heads)


def _kept(config: TunerConfig, layers: Sequence[int] | None) -> TunerConfig:
    if layers is None:
        return config
    stated = config.layers_to_transform
    return replace(config, layers_to_transform=[n for n in layers if stated is None or n in stated])
