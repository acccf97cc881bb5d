"""LoRA at a layer: two factors, with DoRA a magnitude, for all rows of its weight or for some of q, k and v.

With PiSSA the factors begin as the principal ones of the weight, and what they begin with is taken away again.
"""

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from point_peft.anatomy.structure import sparse_convolution
from point_peft.errors import AnatomyError
from point_peft.parts.base import Call, Narrow, Part
from point_peft.running.nested import Args, Kwargs

Layer = nn.Linear | nn.Conv1d


class LoraPart(Part):
    """y <- y + s B A dropout(x); where the module is not called, W <- W + s B A for whoever reads W.

    With a magnitude m, the rows of W + s B A have the lengths m. Of a fused projection (3 c, in), some of query, key
    and value may be `chosen`, each with its own A and B: `lora_A` then holds the factors one below the other,
    (chosen * r, in), and so does `lora_B`, (chosen * c, r).

    With `pissa`, y <- y + s B A dropout(x) - s B0 A0 x, where s B0 A0 is the best approximation of the weight of rank
    r, and A and B begin as A0 and B0, which stay what they are.
    """

    mergeable = True
    lora_magnitude_vector: Tensor | None
    """(out,), of a convolution (1, out, 1)"""
    pissa_A: Tensor | None
    pissa_B: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        weight: str,
        r: int,
        scale: float,
        dropout: float,
        dora: bool,
        chosen: tuple[int, ...],
        pissa: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.r = 2 * r if pissa else r
        """The rank of the change."""
        self.scale = scale
        self.chosen = chosen
        """The numbers of those of query, key and value that are adapted, if not all rows of the weight."""
        self.slices = max(1, len(chosen))
        self.dropout = nn.Dropout(dropout)
        whole: Tensor = getattr(module, weight)
        rows = self.rows(whole, 0)
        self.lora_A, self.lora_B = _factors(module, rows.shape[0], whole.shape[1], r, self.slices)
        nn.init.zeros_(self.lora_B.weight)
        if pissa and not self.lora_A.weight.is_meta:  # what is only planned needs no values
            self._take_principal(rows.detach(), r)
        for name, factor in (("pissa_A", self.lora_A), ("pissa_B", self.lora_B)):
            self.register_buffer(name, factor.weight.detach().clone() if pissa else None)
        magnitude = _lengths(rows.detach()) if dora else None
        if magnitude is not None and rows.ndim == 3:
            magnitude = rearrange(magnitude, "out -> 1 out 1")
        self.register_parameter("lora_magnitude_vector", None if magnitude is None else nn.Parameter(magnitude))

    def rows(self, whole: Tensor, dim: int) -> Tensor:
        """The part that is adapted of a weight (dim 0) or an output (its last dimension)."""
        if not self.chosen:
            return whole
        thirds = whole.chunk(3, dim)
        return torch.cat([thirds[index] for index in self.chosen], dim)

    def put(self, whole: Tensor, rows: Tensor, dim: int) -> Tensor:
        """`whole` with `rows` in the place of what is adapted."""
        if not self.chosen:
            return rows
        thirds = list(whole.chunk(3, dim))
        for index, third in zip(self.chosen, rows.chunk(len(self.chosen), dim), strict=True):
            thirds[index] = third
        return torch.cat(thirds, dim)

    @property
    def narrow(self) -> Narrow | None:
        return Narrow(self.lora_A, self.lora_B, self.slices)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (slices, out, r) and A (slices, r, in) of the change, a convolution's kernel being part of `in`."""
        up, down = self._by_slice(self.lora_B.weight, self.lora_A.weight)
        if self.pissa_A is None or self.pissa_B is None:
            return up, down
        up0, down0 = self._by_slice(self.pissa_B, self.pissa_A)
        return torch.cat([up, -up0], dim=2), torch.cat([down, down0], dim=1)

    def _by_slice(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return (
            rearrange(up, "(n out) r ... -> n out (r ...)", n=self.slices),
            rearrange(down, "(n r) ... -> n r (...)", n=self.slices),
        )

    def _take_principal(self, rows: Tensor, r: int) -> None:
        """Let s B A be the best approximation of rank r of each slice of the weight (slices * out, in, ...)."""
        wide = rearrange(
            rows.to(torch.promote_types(rows.dtype, torch.float32)), "(n out) ... -> n out (...)", n=self.slices
        )
        left, lengths, right = torch.linalg.svd(wide, full_matrices=False)
        roots = (lengths[:, :r] / self.scale).sqrt()
        up = einsum(left[..., :r], roots, "n out r, n r -> n out r")
        down = einsum(roots, right[:, :r], "n r, n r i -> n r i")
        with torch.no_grad():
            self.lora_B.weight.copy_(up.reshape(self.lora_B.weight.shape))
            self.lora_A.weight.copy_(down.reshape(self.lora_A.weight.shape))

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        given = args[0] if args else kwargs["input"]
        x = self.dropout(given)
        update = self._up(self.lora_A(x), self.lora_B.weight)
        if self.pissa_A is not None and self.pissa_B is not None:
            update = update - self._up(_without_bias(self.lora_A, given, self.pissa_A), self.pissa_B)
        update = self.scale * update
        if self.lora_magnitude_vector is not None:
            weight = self.rows(getattr(call.module, self.weight), 0)
            ratio = self._ratio(self.lora_magnitude_vector, weight)
            if weight.ndim == 3:
                ratio = rearrange(ratio, "out -> out 1")
            update = ratio * update + (ratio - 1) * _without_bias(call.module, x, weight.to(x.dtype))
        return self.put(output, self.rows(output, -1) + update.to(output.dtype), -1)

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        whole: Tensor = getattr(module, self.weight)
        wide = torch.promote_types(whole.dtype, torch.float32)
        rows = self.rows(whole.to(wide), 0)
        changed = rows + self._delta(rows)
        if self.lora_magnitude_vector is not None:
            ratio = self._ratio(self.lora_magnitude_vector.to(wide), rows)
            changed = torch.einsum("o,o...->o...", ratio, changed)
        return {self.weight: self.put(whole, changed.to(whole.dtype), 0)}

    def act_by_weight(self, path: str) -> None:
        if self.dropout.p:
            raise AnatomyError(
                f"'{path}' is not called, its weight is read by another module, so lora_dropout={self.dropout.p} "
                "cannot act on its input: set lora_dropout=0.0 or leave it out with exclude_modules"
            )
        super().act_by_weight(path)

    def _up(self, down: Tensor, weight: Tensor) -> Tensor:
        """B A x, of A x and the weight of B"""
        if self.slices == 1:
            return _without_bias(self.lora_B, down, weight)
        up = rearrange(weight, "(n out) r -> n out r", n=self.slices)
        down = rearrange(down, "... (n r) -> ... n r", n=self.slices)
        return rearrange(torch.einsum("...nr,ncr->...nc", down, up), "... n c -> ... (n c)")

    def _delta(self, weight: Tensor) -> Tensor:
        """s B A, in the shape and type of what is adapted of the weight."""
        up, down = (factor.to(weight.dtype) for factor in self.factors())
        product = einsum(up, down, "n out r, n r i -> n out i")
        return self.scale * rearrange(product, "n out i -> (n out) i").reshape(weight.shape)

    def _ratio(self, magnitude: Tensor, weight: Tensor) -> Tensor:
        """m / |V|, (out,): by how much longer a row gets. The length of V takes no part in the gradient."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        # In the weight's type, in which the magnitude was taken, so that a fresh adapter changes nothing.
        lengths = _lengths(wide + self._delta(wide).detach()).to(weight.dtype)
        return magnitude.flatten() / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


class SparseLoraPart(LoraPart):
    """y <- y + s B A dropout(x) at a convolution of spconv: A is one on the same cells, of r channels, and B linear."""

    @property
    def narrow(self) -> None:
        return None

    def after(self, call: Call, args: Args, kwargs: Kwargs, output: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        # The output lies on the cells of the input, and holds already which of them are neighbours.
        update = self.lora_B(self.lora_A(output.replace_feature(self.dropout(x.features))).features)
        return output.replace_feature(output.features + (self.scale * update).to(output.features.dtype))


def _factors(module: nn.Module, out: int, width: int, r: int, slices: int) -> tuple[Layer, Layer]:
    """A and B for a layer, as torch makes such layers; of a convolution, A moves over the input as the layer does."""
    sparse = sparse_convolution(module)
    if sparse is not None:
        like: Any = module
        moves = (like.kernel_size, like.stride, like.padding, like.dilation)
        down: Any = sparse(like.in_channels, r, *moves, bias=False, indice_key=like.indice_key, algo=like.algo)
        return down, nn.Linear(r, out, bias=False)
    if not isinstance(module, nn.Conv1d):
        return nn.Linear(width, slices * r, bias=False), nn.Linear(r, out, bias=False)
    (kernel,), (stride,), (dilation,) = module.kernel_size, module.stride, module.dilation
    padding = module.padding if isinstance(module.padding, str) else module.padding[0]
    like = nn.Conv1d(width, r, kernel, stride, padding, dilation, bias=False, padding_mode=module.padding_mode)
    return like, nn.Conv1d(r, out, 1, bias=False)


def _without_bias(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The output of a layer for x with some weight and no bias."""
    if isinstance(module, nn.Conv1d):
        made: Tensor = module._conv_forward(x, weight, None)
        return made
    return nn.functional.linear(x, weight)


def _lengths(weight: Tensor) -> Tensor:
    """The Euclidean length of each row of a weight (out, ...), in its type."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    lengths: Tensor = torch.linalg.vector_norm(rearrange(wide, "out ... -> out (...)"), dim=1)
    return lengths.to(weight.dtype)
