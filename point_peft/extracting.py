"""An adapter out of the difference of two models: a fully fine-tuned checkpoint, or what another method has merged.

    D = W_full - W_base = U S V^T,    W_full ~ W_base + B A,    B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T

at every linear layer and nn.Conv1d (`LoraConfig`), r being the smallest rank that keeps a share `energy` of |D|^2, the
sum of the squared singular values. With batches of clouds, directions count by how much what the layer gets varies in
them, with its covariance C:

    D R = U S V^T,  R = C^(1/8),    B = U_r sqrt(S_r),  A = sqrt(S_r) V_r^T R^-1

C^(1/2) would measure the change of the outputs among these clouds. It drops rare directions that other clouds need: at
the same size it loses more than R = 1. The power was chosen on the validation clouds of digits and mars. Biases
(`BitFitConfig`), norms (`NormTuningConfig`) and prefix tokens are taken as they are. Whole are taken heads, layers so
small that two factors would be larger, modules with other tensors, such as a BatchNorm whose statistics have moved, and
what holds a layer that is not called, but whose weight it reads. Which layers are called, one forward on example inputs
tells; without them, all are that no preset knows to be read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.adapting.adding import check_unmerged, named_adapter
from point_peft.adapting.site import backbone_modules
from point_peft.adapting.weights import folded
from point_peft.anatomy.description import Anatomy
from point_peft.anatomy.structure import linear_shape, weight_to_adapt
from point_peft.bank import model_inputs
from point_peft.config import PeftConfig, TunerConfig
from point_peft.errors import AdapterError, PointPeftError, nearest_names, quoted
from point_peft.model import PointPeftModel, get_peft_model, understood
from point_peft.running.nested import call_arguments
from point_peft.running.second import eval_mode
from point_peft.starting import Variance, watching
from point_peft.torch_private import BatchNorm
from point_peft.tuners.bitfit import BitFitConfig
from point_peft.tuners.linear_probe import LinearProbeConfig
from point_peft.tuners.lora import LoraConfig, scale_of_one
from point_peft.tuners.lora.peft_format import exactly
from point_peft.tuners.norm_tuning import NormTuningConfig

Tensors = Mapping[str, Tensor]
NORMS = (nn.LayerNorm, nn.RMSNorm, BatchNorm)
BIASED = (nn.Linear, nn.Conv1d, *NORMS)
"""Modules that add their bias to the channels of their output."""
EXPONENT = 1 / 8
LEAST = 1e-6
"""The least variance of a direction of inputs, beside the largest."""


@dataclass(frozen=True)
class Layer:
    """A layer whose change became two factors."""

    path: str
    shape: tuple[int, ...]
    rank: int
    residual: float
    """The part of its change that they leave out: |D - B A| / |D|."""


@dataclass(frozen=True)
class Extraction:
    """The difference of two models, by the ways in which an adapter holds it."""

    layers: tuple[Layer, ...]
    as_they_are: tuple[str, ...]
    """Tensors that were taken as they are: biases, norms, prefix tokens."""
    whole: tuple[str, ...]
    """Modules that were taken as a whole."""

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.path) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'shape':>12}  rank  residual"]
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            lines.append(f"{layer.path:<{width}}  {shape:>12}  {layer.rank:>4}  {layer.residual:8.3f}")
        lines.append(f"as they are: {len(self.as_they_are)} biases, norms and prefix tokens")
        lines.append(f"whole: {', '.join(self.whole) or 'none'}")
        return "\n".join(lines)


def extract(
    base: nn.Module,
    full: nn.Module | Tensors,
    *,
    energy: float = 0.9,
    adapter_name: str = "default",
    example_inputs: Any = None,
    batches: Iterable[Any] | None = None,
    to_inputs: Callable[[Any], Any] | None = None,
    base_model_name_or_path: str | None = None,
) -> tuple[PointPeftModel, Extraction]:
    """Turn a fully fine-tuned model, or its state dict, into an adapter of the base that it began as.

    The base is adapted in place, as by `get_peft_model`, and has the one adapter, which can be saved, swapped and
    trained on. `energy` is the share of each layer's squared change that its rank keeps, more than 0, at most 1. With
    `batches` of training clouds, as `build_memory_bank` takes them, directions count by what layers get on these, which
    keeps more of the accuracy at less of the size. `base_model_name_or_path` is that of the adapter's `PeftConfig`. On
    any error the base is as it was.

    >>> import torch
    >>> from point_peft.backbones import PointTransformer
    >>> from point_peft.extracting import extract
    >>> sizes = {"trans_dim": 24, "depth": 2, "num_heads": 2, "encoder_dims": 24, "num_group": 8, "group_size": 8}
    >>> base, full = PointTransformer(**sizes).eval(), PointTransformer(**sizes).eval()  # full began as another, here
    >>> model, extraction = extract(base, full, energy=1.0)
    >>> clouds = torch.rand(2, 64, 3)
    >>> bool(torch.allclose(model(clouds), full(clouds), atol=1e-4))
    True
    """
    _check_energy(energy)
    before = {name: tensor.detach() for name, tensor in base.state_dict().items()}
    after = full.state_dict() if isinstance(full, nn.Module) else full
    _check_same_form(before, after)
    changed = {name: after[name].detach().to(was.device) for name, was in before.items() if _differs(was, after[name])}
    if not changed:
        raise AdapterError("the two models are the same, bit for bit: there is nothing to extract")
    found = understood(base, example_inputs)
    anatomy = found if isinstance(found, Anatomy) else None
    covariances = {} if batches is None else _covariances(base, after, batches, to_inputs)
    plan = Plan.of(base, anatomy, changed, energy, called=_called(base, example_inputs), covariances=covariances)
    config = replace(plan.config(backbone_modules_of(base)), base_model_name_or_path=base_model_name_or_path)
    model = get_peft_model(base, config, adapter_name, example_inputs=example_inputs)
    plan.fill(get_adapter(model, adapter_name), after)
    return model, plan.report()


def convert_to_lora(model: AdapterSet, source: str, adapter_name: str, *, energy: float = 0.99) -> Extraction:
    """Add LoRA, with biases and norms as they are, that does what another adapter does; it is frozen and not active.

    For methods whose changes can be merged, such as SSF, IA3, DoRA, PiSSA and weights that another LoRA has; where one
    cannot, an error names it. Heads are copied. `energy` as for `extract`.
    """
    _check_energy(energy)
    adapter = named_adapter(model.adapters, source)
    check_unmerged(model.merged, "adapters cannot be converted")
    base = model.base_model
    merged = folded(base, source, adapter, beside_own=True)
    changed = {name: value for name, value in merged.items() if _differs(base.get_parameter(name), value)}
    if not changed:
        raise AdapterError(f"adapter '{source}' changes no tensor of the backbone: there is nothing to convert")
    plan = Plan.of(base, None, changed, energy, smaller=False)
    if plan.whole:
        raise AdapterError(
            f"'{plan.whole[0]}' is changed by adapter '{source}' in a way that neither factors nor biases and norms "
            "say: merge it, or keep the method"
        )
    heads = dict(adapter.own_modules())
    config = replace(plan.config(backbone_modules(model)), modules_to_save=list(heads))
    model.add_adapter(adapter_name, config, heads={path: copy.deepcopy(head) for path, head in heads.items()})
    converted = get_adapter(model, adapter_name)
    plan.fill(converted, {**base.state_dict(), **merged})
    converted.requires_grad_(False)
    return plan.report()


# ---- what there is between two models --------------------------------------------------------------------------------


@dataclass
class Plan:
    """The changed tensors of a model, by the way in which an adapter can hold them."""

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Layer -> B (out, r) and A (r, in), the kernel of a convolution being part of `in`."""
    layers: dict[str, Layer] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        base: nn.Module,
        anatomy: Anatomy | None,
        changed: Tensors,
        energy: float,
        *,
        called: Callable[[str], bool] = lambda path: True,
        covariances: Tensors | None = None,
        smaller: bool = True,
    ) -> Plan:
        """Sort the new values of changed tensors; factors only where they are `smaller` than the weight, or anyway.

        `called` tells whether a module runs; another's tensors go with what holds it. `covariances` (in, in) are
        of what layers get, by path.
        """
        plan, modules = cls(), backbone_modules_of(base)
        tokens = {parameter.name for parameter in (() if anatomy is None else anatomy.prefix_parameters)}
        heads = () if anatomy is None else anatomy.heads
        read = {read.module for read in (() if anatomy is None else anatomy.reads)}
        whole = {path for path in heads if any(name.startswith(path + ".") for name in changed)}
        for name in changed:
            path, _, own = name.rpartition(".")
            if name in tokens or (_says(modules[path], own) and (called(path) or path in read)):
                continue
            while path and not called(path):
                path = path.rpartition(".")[0]
            if not path:
                raise AdapterError(
                    f"'{name}' has changed, and it belongs to no layer that is called and is none of the prefix tokens "
                    f"that are known ({', '.join(sorted(tokens)) or 'none'}): name it in an anatomy, or extract from a "
                    "checkpoint that keeps it"
                )
            whole.add(path)
        for name, value in changed.items():
            path, _, own = name.rpartition(".")
            if _inside(path, whole):
                continue
            if name in tokens:
                plan.tokens.append(name)
            elif isinstance(modules[path], NORMS):
                plan.norms += [] if path in plan.norms else [path]
            elif own == "bias":
                plan.biases.append(path)
            else:
                before, spread = base.get_parameter(name).detach(), (covariances or {}).get(path)
                if not plan.factor(path, before, value, energy, spread, smaller=smaller and path not in read):
                    whole.add(path)
        if whole:
            whole.update(heads)  # where modules are named, a head that is not stays the base's
        plan.whole = sorted(path for path in whole if not _inside(path, whole - {path}))
        plan.biases = [path for path in plan.biases if not _inside(path, whole)]
        return plan

    def factor(
        self, path: str, before: Tensor, after: Tensor, energy: float, covariance: Tensor | None, *, smaller: bool
    ) -> bool:
        """Take the change of a layer's weight as two factors, unless they must be smaller than it and are not."""
        change = rearrange(after.double() - before.double(), "out ... -> out (...)")
        root, inverse = (None, None) if covariance is None else _roots(covariance)
        left, lengths, right = torch.linalg.svd(change if root is None else change @ root, full_matrices=False)
        squares = lengths.square().cumsum(0)
        share = squares / squares[-1]
        rank = min(int((share < energy - 1e-12).sum()) + 1, len(lengths))
        if smaller and rank * sum(change.shape) >= change.numel():
            return False
        roots = lengths[:rank].sqrt()
        down = roots[:, None] * right[:rank]
        self.factors[path] = left[:, :rank] * roots, down if inverse is None else down @ inverse
        residual = float((1 - share[rank - 1]).clamp_min(0).sqrt())
        self.layers[path] = Layer(path, tuple(change.shape), rank, residual)
        return True

    def config(self, modules: Mapping[str, nn.Module]) -> PeftConfig:
        """The configuration of the adapter."""
        names, tuners = list(modules), list[TunerConfig]()
        if self.factors or self.tokens:
            tuners.append(self._lora(names))
        if self.biases:
            tuners.append(BitFitConfig(target_modules=exactly(self.biases, names)))
        if self.norms:
            tuners.append(NormTuningConfig(target_modules=exactly(self.norms, names)))
        if not tuners:
            tuners.append(LinearProbeConfig())
        return PeftConfig(tuners=tuners, modules_to_save=exactly(self.whole, names) if self.whole else [])

    def _lora(self, names: Sequence[str]) -> LoraConfig:
        ranks = {path: layer.rank for path, layer in self.layers.items()}
        targets, tokens = exactly(list(ranks), names), tuple(sorted(self.tokens))
        return LoraConfig(target_modules=targets, tuned_tokens=tokens, **scale_of_one(ranks))

    def fill(self, adapter: Adapter, after: Tensors) -> None:
        """Give an adapter of this plan its values; `after` holds all tensors of the other model."""
        values: list[tuple[Tensor, Tensor]] = []
        for path, part in adapter.all_parts():
            if part.own_module is not None:
                if path in self.whole:
                    own = part.own_module.state_dict(keep_vars=True)
                    values += [(tensor, after[f"{path}.{name}"]) for name, tensor in own.items()]
            elif part.narrow is not None:
                up, down = self.factors[path]
                values += [(part.narrow.up.weight, up), (part.narrow.down.weight, down)]
            else:
                values += [(part.get_parameter(name), after[f"{path}.{name}"]) for name in part.tuned]
        for state in adapter.shared_states():
            tensors = dict(state.named_parameters())
            values += [(tensors[name.replace(".", "/")], after[name]) for name in state.tuned_tokens]
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value.reshape(tensor.shape))

    def report(self) -> Extraction:
        """The plan in words and figures."""
        tuned = [f"{path} (bias)" for path in self.biases] + [f"{path} (norm)" for path in self.norms]
        return Extraction(tuple(self.layers.values()), (*tuned, *self.tokens), tuple(self.whole))


def _called(base: nn.Module, example_inputs: Any) -> Callable[[str], bool]:
    """A function that tells whether a module is called in a forward on example inputs; without any, all are."""
    if example_inputs is None:
        return lambda path: True
    seen: set[nn.Module] = set()

    def note(module: nn.Module, _: Any) -> None:
        seen.add(module)

    handles = [module.register_forward_pre_hook(note) for module in base.modules()]
    args, kwargs = call_arguments(example_inputs)
    try:
        with eval_mode(base.modules()), torch.no_grad():
            base(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return lambda path: base.get_submodule(path) in seen


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """R = C^(1/8) and R^-1 (in, in) of a covariance; directions that do not occur count a little."""
    values, vectors = torch.linalg.eigh(covariance)
    lengths = values.clamp_min(LEAST * float(values[-1])) ** EXPONENT
    return vectors * lengths, (vectors / lengths).T


def _covariances(
    base: nn.Module, after: Tensors, batches: Iterable[Any], to_inputs: Callable[[Any], Any] | None
) -> dict[str, Tensor]:
    """The covariances (in, in) of what the layers of the fine-tuned model get on batches, by path."""
    model, seen = copy.deepcopy(base), dict[str, Variance]()
    model.load_state_dict(after)
    layers = [(path, path, module) for path, module in model.named_modules() if _watched(module)]
    with watching(layers, seen), eval_mode(model.modules()), torch.no_grad():
        for batch in batches:
            args, kwargs = model_inputs(batch, to_inputs)
            model(*args, **kwargs)
    if not seen:
        raise AdapterError("extract got no batches, or none that reach a linear layer: leave batches out, or give some")
    return {path: variance.scatter / variance.count for path, variance in seen.items()}


def _watched(module: nn.Module) -> bool:
    """Tell whether a module's inputs are rows: those of a linear layer, or of a convolution of kernel one."""
    if isinstance(module, nn.Conv1d):
        return module.kernel_size == (1,) and module.groups == 1
    return linear_shape(module) is not None


def backbone_modules_of(base: nn.Module) -> dict[str, nn.Module]:
    """Every module of a plain backbone by path, under each of its names."""
    return dict(base.named_modules(remove_duplicate=False))


def _says(module: nn.Module, own: str) -> bool:
    """Tell whether factors, a bias or a norm can say a change of a module's tensor of that name."""
    if own == "bias":
        return isinstance(module, BIASED)
    if isinstance(module, NORMS):
        return own == "weight"
    if isinstance(module, nn.Conv1d):
        return own == "weight" and module.groups == 1
    known = weight_to_adapt(module)
    return known is not None and known[0] == own


def _inside(path: str, others: Iterable[str]) -> bool:
    return any((path + ".").startswith(other + ".") for other in others)


def _differs(before: Tensor, after: Tensor) -> bool:
    return not torch.equal(before, after.to(before.device, before.dtype))


def _check_energy(energy: float) -> None:
    if type(energy) not in (int, float) or not 0 < energy <= 1:
        raise PointPeftError(f"energy is {quoted(energy)}; allowed: a share of the change, more than 0 and at most 1")


def _check_same_form(before: Tensors, after: Tensors) -> None:
    """Refuse a checkpoint of another model, or with values that are none."""
    for name, tensor in before.items():
        if name not in after:
            near = nearest_names(name, list(after), what="tensor")
            raise AdapterError(f"the fine-tuned checkpoint has no {quoted(name)}; nearest: {near}")
        if after[name].shape != tensor.shape:
            ours, theirs = tuple(tensor.shape), tuple(after[name].shape)
            raise AdapterError(
                f"{quoted(name)} has shape {theirs} in the fine-tuned checkpoint and {ours} in the base: they are not "
                "the same model; if it is the head, make the base with as many classes"
            )
        if not bool(torch.isfinite(after[name]).all()):
            raise AdapterError(f"{quoted(name)} of the fine-tuned checkpoint has values that are not finite")
    more = sorted(set(after) - set(before))
    if more:
        near = nearest_names(more[0], list(before), what="tensor")
        raise AdapterError(f"the base has no {quoted(more[0])}, the fine-tuned checkpoint has; nearest: {near}")
