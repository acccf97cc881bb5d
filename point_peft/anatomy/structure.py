"""Blocks found by their structure: an attention, a norm and a linear layer outside the attention.

Of a model without any attention, they are the items of its lists of modules that have a norm and a linear layer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

from torch import Tensor, nn

from point_peft.anatomy.description import Block
from point_peft.errors import AnatomyError

# In torch_geometric's convolutions an edge goes from a key (`src`) to a query (`dst`).
_WORDS = {
    **dict.fromkeys(("q", "query", "queries", "dst"), "q"),
    **dict.fromkeys(("k", "key", "keys", "src"), "k"),
    **dict.fromkeys(("v", "value", "values"), "v"),
    "qk": "qk",
    "kv": "kv",
}
Modules = Mapping[str, nn.Module]
"""Modules of a model by path."""
VALUES_BESIDE_EDGES = "lin"
"""The name of the layer for the values in torch_geometric's convolutions, beside `lin_src` and `lin_dst`."""


def role_of_name(name: str) -> str:
    """The role that the words of a name tell, in the order of the layer's rows: "k", "kv"; "" if they tell none."""
    words = re.split(r"[._]", name.lower())
    return "".join(dict.fromkeys(_WORDS[word] for word in words if word in _WORDS))


def projects(block: Block, path: str) -> str:
    """The role of one of a block's `qkv` layers, in the order of its rows: "qkv", "kv", "k"; "" if no name tells it."""
    if len(block.qkv) == 1:
        return "qkv"
    name = path.removeprefix(f"{block.attention}.")
    return "v" if name == VALUES_BESIDE_EDGES else role_of_name(name)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, None for anything else.

    A linear layer is what has a two-dimensional weight and no children: `nn.Linear`, PyG's `Linear` and the like.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)):
        return None
    return None if any(module.children()) else (weight.shape[0], weight.shape[1])


def weight_to_adapt(module: nn.Module) -> tuple[str, tuple[int, int]] | None:
    """Name and shape (out, in) of the weight of a linear layer, or of the fused projection in an nn.MultiheadAttention.

    None for anything else, and where query, key and value are of different widths and so are not fused.
    """
    shape = linear_shape(module)
    if shape is not None:
        return "weight", shape
    fused = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else None
    return None if fused is None else ("in_proj_weight", (fused.shape[0], fused.shape[1]))


def sparse_convolution(module: nn.Module) -> type[nn.Module] | None:
    """The class in spconv of a convolution that keeps the cells of its input, SubMConv3d and the like; None: no such.

    It is known by its name, since spconv is optional and never imported here.
    """
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "spconv")
    return next((kind for kind in kinds if kind.__name__.startswith("SubMConv")), None)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises: it says so by its class name and has no children."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def has_parameters(module: nn.Module, *, recurse: bool = True) -> bool:
    """Tell whether a module has parameters; without `recurse`, of its own."""
    return next(module.parameters(recurse), None) is not None


def unclaimed(module: nn.Module, known: Set[nn.Module], path: str = "") -> Iterator[str]:
    """The outermost modules with parameters that neither are, nor hold, nor lie in one of the known ones.

    Of a list of modules, which is never called, it is its items.
    """
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if child in known or isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or not known.isdisjoint(child.modules()):
            yield from unclaimed(child, known, inner)
        elif has_parameters(child):
            yield inner


def _attentions(modules: Modules) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Paths of the attention modules, each with the paths of its query, key and value projections."""
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            yield path, ()
            continue
        linears = {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}
        # An MLP that widens threefold is told from a fused projection by the layer that narrows again.
        widths = {width for _, width in linears.values()}
        fused = [name for name, (out, width) in linears.items() if out == 3 * width and out not in widths]
        split = [name for name, child in module.named_children() if role_of_name(name) and _linears(child)]
        if len(fused) == 1 and len(_linears(module)) >= 2:
            yield path, (f"{path}.{fused[0]}",)
        elif not fused and len(split) >= 2:
            values = [name for name in linears if name == VALUES_BESIDE_EDGES and {"lin_src", "lin_dst"} <= set(split)]
            projections = [child for name in (*split, *values) for child in _linears(module.get_submodule(name), name)]
            yield path, tuple(f"{path}.{name}" for name in projections)


def _linears(module: nn.Module, path: str = "") -> list[str]:
    """The paths of the linear layers of a module, itself among them, which has the path `path`."""
    return [name for name, child in module.named_modules(prefix=path) if linear_shape(child)]


def find_blocks(modules: Modules) -> dict[str, Block]:
    """The blocks among modules by path: the smallest ancestor of an attention with a norm and a linear layer."""
    every_norm = [path for path, module in modules.items() if is_norm(module)]
    every_linear = [path for path, module in modules.items() if linear_shape(module)]
    blocks: dict[str, Block] = {}
    attentions = dict(_attentions(modules))

    def outside(paths: Sequence[str], block: str, attention: str) -> tuple[str, ...]:
        within, without = block + "." if block else "", attention + "."
        return tuple(path for path in paths if path.startswith(within) and not (path + ".").startswith(without))

    for attention, qkv in attentions.items():
        flat = _flat_block(modules, attention, qkv)
        if flat is not None:
            blocks[attention] = flat
            continue
        path = attention
        while path:
            path = path.rpartition(".")[0]
            norms, linears = outside(every_norm, path, attention), outside(every_linear, path, attention)
            if norms and linears:
                break
        else:
            continue
        if not path or path in blocks:
            continue
        inside = [name for name in _linears(modules[attention], attention) if name not in qkv]
        direct = [name for name in inside if name.rpartition(".")[0] == attention]
        projection = direct if len(direct) == 1 else inside
        one = projection[0] if len(projection) == 1 else None
        block = Block(path=path, attention=attention, qkv=qkv, projection=one, norms=norms, mlp=None, linears=linears)
        blocks[path] = _with_mlp(modules, block, attentions)
    if not attentions:
        for path in (path for path, module in modules.items() if _is_item(modules, path) and any(module.children())):
            norms, linears = outside(every_norm, path, path + "."), outside(every_linear, path, path + ".")
            if norms and linears:
                blocks[path] = Block(
                    path=path, attention=None, qkv=(), projection=None, norms=norms, mlp=None, linears=linears
                )
    # A block inside another block's attention search is the container of several blocks, not a block.
    return {path: b for path, b in blocks.items() if not any(other.startswith(path + ".") for other in blocks)}


def _is_item(modules: Modules, path: str) -> bool:
    """Tell whether a module is an item of a list of modules."""
    return bool(path) and isinstance(modules.get(path.rpartition(".")[0]), (nn.ModuleList, nn.ModuleDict))


def _flat_block(modules: Modules, path: str, qkv: Sequence[str]) -> Block | None:
    """A block, one of a list, that has its query, key and value layers itself, beside norms and other layers."""
    if not qkv or not _is_item(modules, path):
        return None
    width = (linear_shape(modules[qkv[0]]) or (0, 0))[1]
    norms = tuple(name for name, child in modules[path].named_modules(prefix=path) if is_norm(child))
    weights = [modules[name]._parameters.get("weight") for name in norms]
    linears = tuple(name for name in _linears(modules[path], path) if name not in qkv)
    if not linears or not any(weight is not None and weight.shape[0] == width for weight in weights):
        return None
    block = Block(path=path, attention=path, qkv=tuple(qkv), projection=None, norms=norms, mlp=None, linears=linears)
    return _with_mlp(modules, block, {})


def _with_mlp(modules: Modules, block: Block, attentions: Mapping[str, Any]) -> Block:
    mlp = _mlp(modules, block.path, block.linears, attentions)
    return replace(block, mlp=mlp, mlp_norm=_mlp_norm(modules, block.path, block.norms, mlp))


def _mlp(modules: Modules, block: str, linears: Sequence[str], attentions: Mapping[str, Any]) -> str | None:
    """The first child of a block whose linear layers widen and narrow again; or the layer that ends such a pair."""
    for name, _ in modules[block].named_children():
        child = f"{block}.{name}"
        shapes = [linear_shape(modules[path]) for path in linears if path.startswith(child + ".")]
        first, last = (shapes[0], shapes[-1]) if shapes else (None, None)
        attends = any((path + ".").startswith(child + ".") for path in attentions)
        if len(shapes) >= 2 and first and last and first[1] == last[0] and not attends:
            return _innermost(modules, child)
    own = [path for path in linears if path.rpartition(".")[0] == block]
    for one, two in pairwise(own):
        (wide, width), (out, hidden) = linear_shape(modules[one]) or (0, 0), linear_shape(modules[two]) or (0, 0)
        if wide == hidden and width == out and wide > width:
            return two
    return None


def mlp_linears(block: Block) -> tuple[str, str] | None:
    """The first and the last linear layer of a block's MLP; None if it has none that was found."""
    if block.mlp is None:
        return None
    inside = [path for path in block.linears if path.startswith(block.mlp + ".")]
    if inside:
        return inside[0], inside[-1]
    # The MLP is then the second of two layers side by side.
    beside = [path for path in block.linears if path.rpartition(".")[0] == block.mlp.rpartition(".")[0]]
    at = beside.index(block.mlp) if block.mlp in beside else 0
    return (beside[at - 1], block.mlp) if at else None


def mlp_entrance(block: Block) -> str | None:
    """The module whose input is that of a block's MLP: the MLP itself, or its first layer where it is not a module."""
    ends = mlp_linears(block)
    return ends[0] if ends is not None and ends[1] == block.mlp else block.mlp


def _mlp_norm(modules: Modules, block: str, norms: Sequence[str], mlp: str | None) -> str | None:
    """The second of a block's own norms, as pre-norm blocks have it; a traced forward verifies it."""
    # What stands beside layers in a child of the block, as in a positional encoding, is not the block's own.
    own = [path for path in norms if not _linears(modules[f"{block}.{path[len(block) + 1 :].split('.')[0]}"])]
    return own[1] if mlp is not None and len(own) > 1 else None


def _innermost(modules: Modules, path: str) -> str:
    """Down from containers of one module: those of some models do not return tokens as a tensor."""
    inner = [name for name, child in modules[path].named_children() if _linears(child)]
    if len(inner) != 1 or isinstance(modules[f"{path}.{inner[0]}"], (nn.ModuleList, nn.ModuleDict)):
        return path
    return _innermost(modules, f"{path}.{inner[0]}")


def block_width(model: nn.Module, block: Block) -> int:
    """The number of channels c of a block's tokens, read from its norms, its own before those of its children."""
    for path in sorted(block.norms, key=lambda path: path.count(".")):
        weight = model.get_submodule(path)._parameters.get("weight")
        if weight is not None:
            return weight.shape[0]
    raise AnatomyError(f"cannot tell the token width of block '{block.path}': none of its norms has a weight")


def stage_groups(model: nn.Module, blocks: Sequence[Block]) -> list[tuple[Block, ...]]:
    """Blocks in order, grouped into stages: neighbours of one container, class and width.

    The blocks of two containers may run in turn.
    """

    def container(block: Block) -> str:
        return re.sub(r"\d+$", "", block.path)

    def kind(block: Block) -> tuple[str, type[nn.Module], int]:
        return container(block), type(model.get_submodule(block.path)), block_width(model, block)

    containers = list(dict.fromkeys(map(container, blocks)))
    in_order = sorted(blocks, key=lambda block: containers.index(container(block)))
    return [tuple(group) for _, group in groupby(in_order, kind)]


def prefix_rows(tensor: Tensor) -> int:
    """The number of token rows that a prefix tensor (1, rows, c), (rows, c) or (c,) stands for."""
    return tensor.numel() // tensor.shape[-1]
