"""LoRA: low-rank updates of linear layers and convolutions, with DoRA, rank stabilisation, EVA, PiSSA, some of q, k, v.

E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen: "LoRA: Low-Rank Adaptation of Large
Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685. With `use_dora`: S.-Y. Liu, C.-Y. Wang, H. Yin,
P. Molchanov, Y.-C. F. Wang, K.-T. Cheng, M.-H. Chen: "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024,
https://arxiv.org/abs/2402.09353. With `use_rslora`: D. Kalajdzievski: "A Rank Stabilization Scaling Factor for
Fine-Tuning with LoRA", https://arxiv.org/abs/2312.03732.

Every adapted weight gets two small factors A (r, in) and B (out, r), whose product is added to it. DoRA also learns the
length of every row of the sum, which begins as the length of the base's row:

    y = W x + s B A dropout(x),   s = alpha / r, or alpha / sqrt(r) with `use_rslora`
    DoRA:  y = W' x,   W'_i = m_i V_i / |V_i|,   V = W + s B A,   m_i = |W_i| at the start

|V_i| takes no part in the gradient (section 4.3 of DoRA). B starts at zero, so a fresh adapter changes nothing. Merged,
the weight becomes W + s B A, or W'. Of an nn.Conv1d with kernel k, A (r, in, k) is a convolution like the layer and
B (out, r, 1) one of kernel 1. Of spconv's SubMConv3d (out, k, k, k, in), which tells positions in PTv3, A (r, k, k, k,
in) is one on the same cells, with a matrix for each offset, and B (out, r) is linear. Of a fused projection, whose rows
are those of the query, the key and the value, `qkv` may choose some: each of these has an A and a B of its own, and the
other rows stay as they are.

When to use it: as the first thing to try where a model must be as fast as before once it is merged, or where PEFT must
read the file. It sees no geometry.

EVA and PiSSA are two other starts: F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter:
"Parameter Efficient Fine-tuning via Explained Variance Adaptation", NeurIPS 2025, https://arxiv.org/abs/2410.07170;
F. Meng, Z. Wang, M. Zhang: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
NeurIPS 2024, https://arxiv.org/abs/2404.02948.

    EVA:    A = the first r principal directions of x, over batches; of all layers' directions, those that explain the
            largest shares of their x's variance are kept, so ranks differ; B = 0
    PiSSA:  W = U S V^T,  B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r^T,  y = (W - s B0 A0) x + s B A dropout(x)

`initialise(model, batches, "eva")` does the first, `init_lora_weights="pissa"` or `initialise(model, how="pissa")` the
second. A PiSSA file holds A0 and B0 beside A and B, so what the layer has learnt is s B A - s B0 A0.

Deviations from the published code, each with its reason:
- PiSSA writes W - s B0 A0 into the base. Here the base keeps W, and A0 and B0 act with their sign turned: the same
  function and gradients, while other adapters on this backbone, and the backbone itself, stay what they are. It costs a
  second pair of factors in the forward; merged, nothing.
- EVA's directions are exact, of the summed covariance, not of an incremental decomposition: they depend neither on the
  order of the batches nor on their size. The paper's own scales at other ranks are kept: alpha / r stays what it was.
- DoRA's own term W x is computed anew and not taken from the layer's output, which other adapters may have changed:
  what is merged is then the same as what ran.
- a row of the base that is zero keeps a magnitude of zero, and is not divided by its length.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from point_peft.anatomy.description import Block
from point_peft.anatomy.structure import projects, sparse_convolution, weight_to_adapt
from point_peft.config import Changes, Combination, TunerConfig, require
from point_peft.errors import AdapterError, AnatomyError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone
from point_peft.parts.base import Blueprint, Part
from point_peft.parts.prefix import tune_prefix
from point_peft.schema import Count, Dropout, Factor, FrozenMapping
from point_peft.tuners.lora.combining import combined_tensors
from point_peft.tuners.lora.parts import LoraPart, SparseLoraPart
from point_peft.tuners.lora.peft_format import SHARED, anchored, exactly, pattern_values, read_fields, why_no_layer

QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")


def scale_of_one(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields that give layers these ranks, by path, and factors that hold all of the change; none: of rank 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {anchored(path): own for path, own in ranks.items() if own != rank}
    return {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TunerConfig):
    """LoRA on linear layers and nn.Conv1d; `target_modules=None` means the query, key and value of every block.

    Sparse convolutions, spconv's SubMConv3d, are adapted where they are named, without DoRA.

    Where such a projection is not called but its weight is read (`nn.MultiheadAttention`, EVA attention), the weight is
    adapted; the fused one of `nn.MultiheadAttention` is meant by the name of the attention itself.

    `qkv` says which of query, key and value are adapted, where one fused projection makes all three, one after the
    other. `rank_pattern` and `alpha_pattern` are for layers of another rank or alpha: a key is a module's path, the end
    of one after a dot, or a regular expression for it; the first that matches counts.
    """

    method: ClassVar[str] = "LORA"
    peft_type: ClassVar[str | None] = "LORA"
    combines: ClassVar[bool] = True

    r: Count = 8
    """The rank of an update."""
    lora_alpha: Factor = 8
    """The scale of an update, over r."""
    lora_dropout: Dropout = 0.0
    """Dropout of an update's input."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps large ranks alive."""
    use_dora: bool = False
    """Train the length of every row of the weight too."""
    qkv: Sequence[Literal["q", "k", "v"]] = QKV
    """Those of query, key and value that are adapted."""
    rank_pattern: Mapping[str, int] = FrozenMapping()
    """Other ranks, by layer."""
    alpha_pattern: Mapping[str, float] = FrozenMapping()
    """Other alphas, by layer."""
    init_lora_weights: Literal["zero", "pissa"] = "zero"
    """Begin with B at zero, or as PiSSA with the principal factors of the weight, which are taken away from it."""
    tuned_tokens: str | Sequence[str] = ()
    """Prefix tokens and positions that are trained too, such as cls_token; with target_modules=[], these alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < len(self.qkv) == len(set(self.qkv)), self, "qkv", "one or more of 'q', 'k', 'v', each once")
        object.__setattr__(self, "qkv", tuple(name for name in QKV if name in self.qkv))
        pissa = self.init_lora_weights == "pissa"
        require(not (pissa and self.use_dora), self, "init_lora_weights", "'zero' with use_dora")
        require(all(r >= 1 for r in self.rank_pattern.values()), self, "rank_pattern", "ranks of 1 or more")
        require(all(a > 0 for a in self.alpha_pattern.values()), self, "alpha_pattern", "values of more than 0")

    def build(self, backbone: Backbone) -> Blueprint:
        without = self.target_modules == () and bool(self.tuned_tokens)
        paths = [] if without else self.chosen_modules(backbone, self._projections)
        blocks = () if self.target_modules is not None else backbone.known_anatomy(self.method).blocks
        split = {path for block in blocks if len(block.qkv) > 1 for path in block.qkv}
        ranks = pattern_values(self.rank_pattern, paths, "rank_pattern")
        alphas = pattern_values(self.alpha_pattern, paths, "alpha_pattern")
        plan = Blueprint()
        for path in paths:
            r, alpha = ranks.get(path, self.r), alphas.get(path, self.lora_alpha)
            part = self._part(path, backbone.modules[path], r, alpha, path not in split)
            if part.weight != "weight":
                part.act_by_weight(path)
            plan.parts.append((path, part))
        if self.tuned_tokens:
            tune_prefix(plan, backbone, self.method, self.tuned_tokens)
        return plan

    def with_ranks(self, ranks: Mapping[str, int], names: Sequence[str]) -> TunerConfig:
        old = pattern_values(self.rank_pattern, list(ranks), "rank_pattern")
        alphas = pattern_values(self.alpha_pattern, list(ranks), "alpha_pattern")
        new_alphas: dict[str, float] = {}
        for path, rank in ranks.items():
            grown = rank / old.get(path, self.r)
            new_alphas[path] = alphas.get(path, self.lora_alpha) * (math.sqrt(grown) if self.use_rslora else grown)
        left_out = {path for path, rank in ranks.items() if rank == 0}
        excluded = self.exclude_modules
        if left_out:
            before = () if excluded is None else match_names(excluded, names, field="exclude_modules")
            excluded = exactly(sorted(left_out.union(before)), names)
        kept = [path for path in ranks if path not in left_out]
        return replace(
            self,
            exclude_modules=excluded,
            rank_pattern={anchored(path): ranks[path] for path in kept if ranks[path] != self.r},
            alpha_pattern={anchored(path): new_alphas[path] for path in kept if new_alphas[path] != self.lora_alpha},
        )

    def principal(self) -> TunerConfig:
        return replace(self, init_lora_weights="pissa")

    def combined(
        self, adapters: Changes, weights: Sequence[float], combination: Combination
    ) -> tuple[TunerConfig, Mapping[str, Mapping[str, Tensor]]]:
        if self.tuned_tokens:
            raise AdapterError(f"prefix tokens are trained too, tuned_tokens={self.tuned_tokens}, and do not add up")
        ranks, tensors = combined_tensors(adapters, weights, combination)
        # Those of the adapters are in the factors.
        return replace(self, use_rslora=False, init_lora_weights="zero", **scale_of_one(ranks)), tensors

    def why_not_peft(self, parts: Mapping[str, Part], modules: Mapping[str, nn.Module]) -> str | None:
        if self.tuned_tokens:
            return "LoraConfig.tuned_tokens: PEFT has no place for tensors that no layer holds"
        reasons = (why_no_layer(path, part, modules[path]) for path, part in parts.items())
        return next(filter(None, reasons), None)

    def to_peft(self, paths: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
        ranks = pattern_values(self.rank_pattern, paths, "rank_pattern")
        alphas = pattern_values(self.alpha_pattern, paths, "alpha_pattern")
        return {
            **{name: getattr(self, name) for name in SHARED},
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "target_modules": exactly(paths, names),
            # By full path: PEFT goes by the first key that matches, in an order that a file does not keep.
            "rank_pattern": {anchored(path): rank for path, rank in ranks.items()},
            "alpha_pattern": {anchored(path): alpha for path, alpha in alphas.items()},
        }

    @staticmethod
    def from_peft(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        return read_fields(fields, names)

    def _projections(self, block: Block) -> Sequence[str]:
        """The layers of a block that make query, key and value, as far as they are chosen; all where there are none."""
        if block.attention is None:
            return block.linears
        if len(block.qkv) <= 1 or self.qkv == QKV:
            return block.qkv or (block.attention,)
        roles = {path: projects(block, path) for path in block.qkv}
        told = "".join(roles.values())
        unclear = [path for path, role in roles.items() if not role or any(told.count(one) > 1 for one in role)]
        if unclear:
            raise AnatomyError(
                f"qkv={self.qkv}: whether '{unclear[0]}' makes the query, the key or the value cannot be told from its "
                "name: leave qkv out and name the layers in target_modules"
            )
        for path, role in roles.items():
            if 0 < len(set(role) & set(self.qkv)) < len(role):
                raise AnatomyError(
                    f"qkv={self.qkv}: '{path}' makes {' and '.join(role)} together: choose both, or leave qkv out and "
                    "name the layers in target_modules"
                )
        return [path for path, role in roles.items() if role[0] in self.qkv]

    def _part(self, path: str, module: nn.Module, r: int, alpha: float, fused: bool) -> LoraPart:
        scale, pissa = alpha / (math.sqrt(r) if self.use_rslora else r), self.init_lora_weights == "pissa"
        if sparse_convolution(module) is not None:
            if self.use_dora or pissa:
                asked, plain = ("use_dora", "DoRA") if self.use_dora else ("init_lora_weights='pissa'", "PiSSA")
                raise AnatomyError(
                    f"{asked}: '{path}' is a {type(module).__name__}, which {self.method} adapts without {plain} only: "
                    "leave it out with exclude_modules, or give it an adapter of its own without"
                )
            return SparseLoraPart(module, "weight", r, scale, self.lora_dropout, False, ())
        known = weight_to_adapt(module)
        if isinstance(module, nn.Conv1d):
            known = ("weight", (module.out_channels, module.in_channels)) if module.groups == 1 else None
        if known is None:
            raise AnatomyError(
                f"'{path}' is a {type(module).__name__}; {self.method} adapts linear layers and nn.Conv1d of one group "
                "and spconv's SubMConv3d"
            )
        weight, shape = known
        chosen: tuple[int, ...] = ()
        if self.qkv != QKV and fused:
            if shape[0] != 3 * shape[1] or isinstance(module, nn.Conv1d):
                raise AnatomyError(
                    f"qkv={self.qkv} chooses rows of a fused projection, and '{path}' {shape} is none: leave it out, "
                    "or leave qkv out and name the layers in target_modules"
                )
            chosen = tuple(QKV.index(name) for name in self.qkv)
        most = min(shape[0] // 3 if chosen else shape[0], getattr(module, weight)[0].numel())
        if pissa and r > most:
            raise AnatomyError(
                f"init_lora_weights='pissa': '{path}' {shape} has {most} principal factors, fewer than r={r}: give it "
                "a smaller rank in rank_pattern"
            )
        return LoraPart(module, weight, r, scale, self.lora_dropout, self.use_dora, chosen, pissa)
