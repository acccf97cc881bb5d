"""Tokens in what blocks get and return: finding them, putting prompts in, taking them out, masks that grow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from point_peft import AnatomyError
from point_peft.anatomy.description import Stage, Steps, spell_steps
from point_peft.running.nested import all_arguments, fetch, fetch_argument, leaves, put, put_argument
from point_peft.running.tokens import (
    as_layout,
    batch_first,
    block_tokens,
    insert,
    insert_prompts,
    output_tokens,
    put_output_tokens,
    remove,
    shift_rows,
)

WIDTH, LENGTH, BATCH, COUNT, AT = 4, 5, 3, 2, 1


@dataclass(frozen=True, eq=False)
class Sparse:
    """A sparse tensor that cannot be changed."""

    features: Tensor

    def replace_feature(self, feature: Tensor) -> Sparse:
        return replace(self, features=feature)


class Pair(NamedTuple):
    tokens: Tensor
    rest: Any


class Attributes(dict[str, Any]):
    """A mapping whose entries are attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stage(**fields: Any) -> Stage:
    return Stage(blocks=(), width=WIDTH, **fields)


# ---- leaves, fetch, put ----------------------------------------------------------------------------------------------


def nested() -> tuple[dict[Steps, Tensor], Any]:
    """Tensors by their steps, and what they lie in."""
    a, b, c, d, e, f = (tensor(2, seed=i) for i in range(6))
    value = (
        a,
        [Pair(b, {"x": c, 7: tensor(2), "none": None}), "text"],
        Attributes(feat=d, sparse=Sparse(e)),
        Sparse(f),
    )
    places: dict[Steps, Tensor] = {
        (0,): a,
        (1, 0, 0): b,
        (1, 0, 1, "x"): c,
        (2, "feat"): d,
        (2, "sparse", "features"): e,
        (3, "features"): f,
    }
    return places, value


def test_leaves_are_all_tensors_with_their_steps():
    places, value = nested()
    found = list(leaves(value))
    assert [steps for steps, _ in found] == list(places)
    assert all(tensor is places[steps] for steps, tensor in found)
    assert list(leaves(places[0,])) == [((), places[0,])]
    assert list(leaves(value[0], (9,))) == [((9,), value[0])]
    assert list(leaves({"a": 1, "b": "c"})) == []


def test_fetch_finds_what_leaves_names_and_nothing_else():
    places, value = nested()
    for steps, tensor in places.items():
        assert fetch(value, steps) is tensor
    assert fetch(value, ()) is value
    nowhere: list[Steps] = [(9,), (0, 0), ("feat",), (1, 0, "tokens"), (2, "gone"), (2, "gone", 1), (3, "other")]
    for steps in nowhere:
        assert fetch(value, steps) is None


@pytest.mark.parametrize("steps", nested()[0], ids=spell_steps)
def test_put_replaces_one_tensor(steps):
    places, value = nested()
    new = tensor(2, seed=99)
    changed = put(value, steps, new)
    for other, found in leaves(changed):
        assert found is (new if other == steps else places[other])
    assert type(changed) is tuple and type(changed[1][0]) is Pair and type(changed[2]) is Attributes
    assert changed[1] is value[1] and changed[2] is value[2]  # others may hold them too
    assert value[0] is places[0,] and value[3].features is places[3, "features"]


def test_put_without_steps_is_the_new_tensor():
    new = tensor(2)
    assert put({"x": 1}, (), new) is new


def test_a_mapping_gives_its_attributes_as_before():
    value = Attributes(feat=tensor(2))
    new = tensor(2, seed=1)
    assert put(value, ("feat",), new) is value and value.feat is new


@pytest.mark.parametrize("steps", [(0,), (1, "feat"), (2, 1), ("x",), ("y", "feat"), ("z", 0)], ids=spell_steps)
def test_arguments_are_put_into_copies(steps):
    args = (tensor(2), {"feat": tensor(2, seed=1)}, [tensor(2, seed=2), tensor(2, seed=3)])
    kwargs = {"x": tensor(2, seed=4), "y": Attributes(feat=tensor(2, seed=5)), "z": (tensor(2, seed=6),)}
    before = dict(all_arguments(args, kwargs))
    assert len(before) == 7
    new = tensor(2, seed=99)
    assert fetch_argument(args, kwargs, steps) is before[steps]
    args_2, kwargs_2 = put_argument(args, kwargs, steps, new)
    assert all(value is before[other] for other, value in all_arguments(args, kwargs))
    assert all(value is (new if o == steps else before[o]) for o, value in all_arguments(args_2, kwargs_2))
    assert type(kwargs_2["y"]) is Attributes and isinstance(args_2[1], dict)


def test_a_missing_argument_is_none():
    assert fetch_argument((), {}, (0,)) is None
    assert fetch_argument((), {}, ("x",)) is None
    assert fetch_argument((), {}, ("x", "feat")) is None


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_tokens_of_another_shape_are_refused():
    dense, packed = stage(), stage(layout="packed", tokens=(0, "feat"), outputs=(("feat",),))
    good = tensor(BATCH, LENGTH, WIDTH)
    assert block_tokens(dense, "b", (good,), {}) is good
    assert output_tokens(packed, "b", {"feat": good[0]}).shape == (LENGTH, WIDTH)
    cases: list[tuple[Any, str]] = [
        (good[0], r"block 'b' should get tokens \(b, g, c\), c = 4, at its input\[0\]; got \(5, 4\)"),
        (good[..., :3], r"got \(3, 5, 3\)"),
        ("text", r"got str"),
        (torch.nested.as_nested_tensor([good[0], good[1, :2]], layout=torch.jagged), r"enable_nested_tensor=False"),
    ]
    for value, expected in cases:
        with pytest.raises(AnatomyError, match=expected):
            block_tokens(dense, "b", (value,), {})
    with pytest.raises(AnatomyError, match=r"got NoneType"):
        block_tokens(dense, "b", (), {"x": good})
    with pytest.raises(AnatomyError, match=r"should return tokens \(n, c\), c = 4, at its output.feat; got \(3, 5"):
        output_tokens(packed, "b", {"feat": good})
    with pytest.raises(AnatomyError, match=r"should get tokens \(g, b, c\)"):
        block_tokens(stage(layout="gbc"), "b", (good[0],), {})


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bgc", "gbc"])
@pytest.mark.parametrize("at", [0, 2, LENGTH])
def test_inserting_and_removing_are_inverse(layout, at):
    tokens, prompts = tensor(BATCH, LENGTH, WIDTH), tensor(BATCH, COUNT, WIDTH, seed=1)
    laid = as_layout(tokens, layout)
    longer = insert(laid, prompts, at, layout)
    rows = batch_first(longer, layout)
    assert torch.equal(rows[:, at : at + COUNT], prompts)
    assert torch.equal(torch.cat([rows[:, :at], rows[:, at + COUNT :]], dim=1), tokens)
    assert torch.equal(remove(longer, COUNT, at, layout), laid)
    half = insert(laid.bfloat16(), prompts, at, layout)
    assert half.dtype == torch.bfloat16


def test_layouts_turn_and_return():
    for layout, shape in {"bgc": (3, 5, 4), "gbc": (5, 3, 4)}.items():
        tokens = tensor(*shape)
        assert batch_first(tokens, layout).shape == (3, 5, 4)  # type: ignore[arg-type]
        assert torch.equal(as_layout(batch_first(tokens, layout), layout), tokens)  # type: ignore[arg-type]
    assert batch_first(tensor(7, 4), "packed").shape == (1, 7, 4)
    assert torch.equal(as_layout(batch_first(tensor(7, 4), "packed"), "packed"), tensor(7, 4))


def test_rows_are_shifted():
    tokens, shift = tensor(BATCH, LENGTH, WIDTH), tensor(2, WIDTH, seed=1)
    expected = tokens.clone()
    expected[:, 1:3] += shift
    assert torch.equal(shift_rows(tokens, shift, 1, "bgc"), expected)
    assert torch.equal(shift_rows(tokens.transpose(0, 1), shift, 1, "gbc"), expected.transpose(0, 1))


def grown(value: Tensor, *, batch: int = BATCH, by: Stage | None = None) -> Tensor:
    """A second argument of a block, after prompts were put in."""
    chosen = stage() if by is None else by
    laid = as_layout(tensor(batch, LENGTH, WIDTH), chosen.layout)
    args, _ = insert_prompts(chosen, "b", (laid, value), {}, tensor(batch, COUNT, WIDTH, seed=1), AT)
    assert batch_first(args[0], chosen.layout).shape == (batch, LENGTH + COUNT, WIDTH)
    found: Tensor = args[1]
    assert found.dtype == value.dtype
    return found


def inner(value: Tensor, *dims: int) -> Tensor:
    """A mask without the entries of prompts."""
    for dim in dims:
        value = torch.cat([value.narrow(dim, 0, AT), value.narrow(dim, AT + COUNT, LENGTH - AT)], dim=dim)
    return value


def new(value: Tensor, dim: int) -> Tensor:
    return value.narrow(dim, AT, COUNT)


@pytest.mark.parametrize(
    "shape",
    [(LENGTH, LENGTH), (BATCH, LENGTH, LENGTH), (BATCH, 1, LENGTH, LENGTH), (2 * BATCH, LENGTH, LENGTH)],
    ids=["all", "each sample", "each sample, 4 dims", "each head"],
)
@pytest.mark.parametrize("kind", ["additive", "blocked", "visible"])
@pytest.mark.parametrize("layout", ["bgc", "gbc"])
def test_attention_masks_grow_by_rows_and_columns(shape, kind, layout):
    mask = tensor(*shape) if kind == "additive" else tensor(*shape) > 0
    longer = grown(mask, by=stage(mask_visible=kind == "visible", layout=layout))
    assert longer.shape == (*shape[:-2], LENGTH + COUNT, LENGTH + COUNT)
    assert torch.equal(inner(longer, -1, -2), mask)
    for dim in (-1, -2):
        # In the mask that is added zero is visible, in one that blocks False, in one that lets through True.
        assert bool((new(longer, dim) == (kind == "visible")).all())


@pytest.mark.parametrize("shape", [(BATCH, LENGTH), (BATCH, 1, 1, LENGTH), (BATCH, 1, LENGTH)], ids=str)
@pytest.mark.parametrize("visible", [False, True])
def test_padding_masks_grow_by_columns(shape, visible):
    mask = tensor(*shape) > 0
    longer = grown(mask, by=stage(mask_visible=visible))
    assert longer.shape == (*shape[:-1], LENGTH + COUNT)
    assert torch.equal(inner(longer, -1), mask) and bool((new(longer, -1) == visible).all())


def test_a_square_mask_in_a_batch_of_as_many_samples_as_tokens():
    """It is an attention mask, but for a place where a padding mask was seen."""
    mask = tensor(LENGTH, LENGTH) > 0
    assert grown(mask, batch=LENGTH).shape == (LENGTH + COUNT, LENGTH + COUNT)
    told = stage(padding_masks=((1,),))
    assert grown(mask, batch=LENGTH, by=told).shape == (LENGTH, LENGTH + COUNT)
    assert grown(mask[:, None, None], batch=LENGTH, by=told).shape == (LENGTH, 1, 1, LENGTH + COUNT)
    # In any other batch it is told by its shape.
    assert grown(mask[:BATCH], by=told).shape == (BATCH, LENGTH + COUNT)
    assert grown(mask, by=told).shape == (LENGTH + COUNT, LENGTH + COUNT)


@pytest.mark.parametrize("layout", ["bgc", "gbc"])
def test_positions_beside_the_tokens_are_zero_for_prompts(layout):
    positions = as_layout(tensor(BATCH, LENGTH, WIDTH, seed=2), layout)
    longer = batch_first(grown(positions, by=stage(layout=layout)), layout)
    assert torch.equal(inner(longer, 1), batch_first(positions, layout)) and not new(longer, 1).any()


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(0.5),
        tensor(LENGTH),
        tensor(BATCH, LENGTH + 1),
        tensor(LENGTH, BATCH),
        tensor(BATCH, WIDTH),
        tensor(LENGTH, 3),
    ],
    ids=lambda value: str(tuple(value.shape)),
)
def test_what_is_no_mask_stays(value):
    assert grown(value) is value


def test_other_arguments_stay():
    tokens, mask = tensor(BATCH, LENGTH, WIDTH), tensor(LENGTH, LENGTH)
    prompts = tensor(BATCH, COUNT, WIDTH, seed=1)
    args, kwargs = insert_prompts(stage(), "b", (tokens, None, "flash"), {"mask": mask, "drop": 0.1}, prompts, AT)
    assert args[1:] == (None, "flash") and kwargs["drop"] == 0.1 and list(kwargs) == ["mask", "drop"]
    assert kwargs["mask"].shape == (LENGTH + COUNT, LENGTH + COUNT) and mask.shape == (LENGTH, LENGTH)


def test_tokens_given_by_name():
    tokens, prompts = tensor(BATCH, LENGTH, WIDTH), tensor(BATCH, COUNT, WIDTH, seed=1)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    chosen = stage(tokens=("src",))
    args, kwargs = insert_prompts(chosen, "b", (padding,), {"src": tokens}, prompts, AT)
    assert args[0].shape == (BATCH, LENGTH + COUNT)
    assert torch.equal(kwargs["src"], insert(tokens, prompts, AT, "bgc"))
    assert block_tokens(chosen, "b", args, kwargs) is kwargs["src"]
    with pytest.raises(AnatomyError, match=r"at its input.src; got NoneType"):
        insert_prompts(chosen, "b", (tokens,), {}, prompts, AT)


def test_tokens_in_a_mapping():
    tokens, mask = tensor(BATCH, LENGTH, WIDTH), tensor(BATCH, LENGTH, LENGTH)
    prompts = tensor(BATCH, COUNT, WIDTH, seed=1)
    given = {"feat": tokens, "pos": tokens * 2, "size": LENGTH}
    args, kwargs = insert_prompts(stage(tokens=(0, "feat")), "b", (given, 1), {"mask": mask}, prompts, AT)
    assert torch.equal(args[0]["feat"], insert(tokens, prompts, AT, "bgc"))
    assert torch.equal(inner(args[0]["pos"], 1), tokens * 2) and not new(args[0]["pos"], 1).any()
    assert args[0]["size"] == LENGTH and args[1] == 1
    assert kwargs["mask"].shape == (BATCH, LENGTH + COUNT, LENGTH + COUNT)
    assert given["feat"] is tokens


def test_masked_attention_sees_prompts():
    """Meaning of the masks: with a causal mask of torch.nn a prompt at row `at` is seen by the tokens before it too."""
    attention = torch.nn.MultiheadAttention(WIDTH, 2)
    tokens, prompts = tensor(LENGTH, BATCH, WIDTH), tensor(BATCH, COUNT, WIDTH, seed=1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    (x, mask), _ = insert_prompts(stage(layout="gbc"), "b", (tokens, causal), {}, prompts, LENGTH)
    with torch.no_grad():
        _, weights = attention(x, x, x, attn_mask=mask)
    assert bool((weights[:, :, LENGTH:] > 0).all())
    assert torch.equal(weights[:, :LENGTH, :LENGTH] == 0, causal.expand(BATCH, -1, -1))


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_a_plain_output_is_replaced():
    tokens = tensor(BATCH, LENGTH, WIDTH)
    assert put_output_tokens(stage(), tensor(BATCH, LENGTH + COUNT, WIDTH), tokens, inserted=COUNT, at=AT) is tokens


@pytest.mark.parametrize("layout", ["bgc", "gbc"])
def test_what_a_block_returns_beside_its_tokens_loses_the_prompts(layout):
    length = LENGTH + COUNT
    chosen = stage(outputs=((0,),), layout=layout)
    tokens = as_layout(tensor(BATCH, length, WIDTH), layout)
    maps, mean = tensor(BATCH, 2, length, length, seed=1), tensor(BATCH, length, length, seed=2)
    score, other = tensor(BATCH, length, seed=3), tensor(BATCH, 9, seed=4)
    output = (tokens, {"maps": maps, "score": score}, [mean, other], tokens * 3, None)
    kept = remove(output_tokens(chosen, "b", output), COUNT, AT, layout)
    changed = put_output_tokens(chosen, output, kept, inserted=COUNT, at=AT)
    assert changed[0] is kept and changed[4] is None
    assert torch.equal(changed[1]["maps"], inner(maps, -1, -2))
    assert torch.equal(changed[1]["score"], inner(score, -1))
    assert torch.equal(changed[2][0], inner(mean, -1, -2)) and changed[2][1] is other
    assert torch.equal(changed[3], remove(tokens * 3, COUNT, AT, layout))


def test_without_prompts_the_rest_of_an_output_stays():
    tokens, maps = tensor(BATCH, LENGTH, WIDTH), tensor(BATCH, LENGTH, LENGTH)
    changed = put_output_tokens(stage(outputs=((0,),)), Pair(tokens, maps), tokens + 1)
    assert type(changed) is Pair and torch.equal(changed.tokens, tokens + 1) and changed.rest is maps


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_copies_of_tokens_change_by_as_much(kind):
    """Its features in a sparse tensor may be others than the tokens: they get the same difference."""
    tokens, features = tensor(LENGTH, WIDTH), tensor(LENGTH, WIDTH, seed=1)
    sparse = Sparse(features)
    output: Any = (tokens, sparse) if kind == "tuple" else Attributes(feat=tokens, sparse=sparse)
    places: tuple[Steps, ...] = ((0,), (1, "features")) if kind == "tuple" else (("feat",), ("sparse", "features"))
    chosen = stage(layout="packed", outputs=places)
    changed = put_output_tokens(chosen, output, tokens + 2)
    assert torch.equal(output_tokens(chosen, "b", changed), tokens + 2)
    assert torch.allclose(fetch(changed, places[1]), features + 2)
    assert sparse.features is features
    assert (changed is output) == (kind == "mapping")
