"""Roles of attention projections: query, key, value."""

from __future__ import annotations

from point_peft.anatomy.description import Block

_ROLES = {
    **dict.fromkeys(("q", "query", "queries", "dst"), "q"),
    **dict.fromkeys(("k", "key", "keys", "src"), "k"),
    **dict.fromkeys(("v", "value", "values"), "v"),
    "qk": "qk",
    "kv": "kv",
}


def projects(block: Block, path: str) -> str:
    """What one of a block's `qkv` layers makes, in the order of its rows: "qkv", "kv", "k"; "" if no name tells it."""
    if len(block.qkv) == 1:
        return "qkv"
    words = path.removeprefix(block.attention + ".").replace(".", "_").split("_")
    # In torch_geometric's convolutions the layer for the values has no name but `lin`.
    return "v" if words == ["lin"] else next((_ROLES[word] for word in words if word in _ROLES), "")
