"""The roles of the layers of an attention: which of query, key and value they make, as their names tell."""

import re

from point_peft.anatomy.description import Block

# In torch_geometric's convolutions an edge goes from a key (`src`) to a query (`dst`).
_WORDS = {
    **dict.fromkeys(("q", "query", "queries", "dst"), "q"),
    **dict.fromkeys(("k", "key", "keys", "src"), "k"),
    **dict.fromkeys(("v", "value", "values"), "v"),
    "qk": "qk",
    "kv": "kv",
}
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
    name = path.removeprefix(block.attention + ".")
    return "v" if name == VALUES_BESIDE_EDGES else role_of_name(name)
