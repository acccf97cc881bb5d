"""The matrix: what every method guarantees on every backbone that supports it.

Methods and backbones enter by registration; nothing is listed here. A test holds several guarantees, so that they share
an adapted model, and says which of them is broken. What takes longer is proved in `tests/test_representatives.py`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, Anatomy, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.site import SITE
from point_peft.anatomy.presets import known_anatomy
from point_peft.parts.base import Part
from point_peft.running.tokens import batch_first, output_tokens
from tests.adapting import (
    PAIRS,
    Grouped,
    Pair,
    adapt,
    assert_same_values,
    assert_unloaded,
    complete,
    distance,
    each,
    each_group,
    few,
    fingerprint,
    frozen,
    in_training,
    kinds,
    loss_of,
    one_adapter,
    plain,
    representatives,
    rescramble,
    run,
    stated,
    unchanged_when_fresh,
    unusual,
)
from tests.methods import config
from tests.zoo import BACKBONES, Args, TinyBackbone

ALONE = few(representatives(PAIRS), of=lambda backbone: backbone.name)
"""Every method once, and every backbone."""


def groups(pairs: Sequence[Pair]) -> list[Grouped]:
    """All pairs, with as few adapters as there are: of a backbone those methods that change nothing when fresh, and
    the others.

    What is compared bit by bit or for every tensor of an adapter is compared for each of its methods.
    """
    chosen: dict[tuple[str, bool], tuple[list[str], TinyBackbone]] = {}
    for method, backbone in pairs:
        key = backbone.name, unchanged_when_fresh(config(method), backbone)
        chosen.setdefault(key, ([], backbone))[0].append(method)
    return [(tuple(methods), backbone) for methods, backbone in chosen.values()]


def first_of_each_kind(groups: Sequence[Grouped]) -> list[tuple[tuple[str, ...], str]]:
    """The names of the first group of either sort on a backbone of each kind."""
    first: dict[tuple[bool, str], tuple[tuple[str, ...], str]] = {}
    for methods, backbone in groups:
        if len(methods) > 1:
            key = unchanged_when_fresh(one_adapter(methods), backbone), backbone.kind
            first.setdefault(key, (methods, backbone.name))
    return list(first.values())


TOGETHER = groups(PAIRS)
SEPARATE = [group for pair in ALONE if (group := ((pair[0],), pair[1])) not in TOGETHER]
ON_FILE = {*(((method,), backbone.name) for method, backbone in ALONE), *first_of_each_kind(TOGETHER)}


@each_group([*TOGETHER, *SEPARATE], smoke="point_mae")
def test_an_adapter_acts_where_it_is_active_and_nowhere_else(
    methods: tuple[str, ...], backbone: TinyBackbone, tmp_path: Path
) -> None:
    """Change by a fresh one, heads, effect and gradients, batch mates, the backbone without it and after it.

    And its files, for every method and every backbone: they know of a backbone the paths and shapes of its modules.
    """
    how = one_adapter(methods)
    base, args, without = unusual(backbone.build()), backbone.inputs(2, 6), plain(backbone, 2, 6)
    before, types = fingerprint(base), kinds(base)
    torch.manual_seed(0)
    model = get_peft_model(base, stated(methods, backbone))
    complete(model.eval(), backbone, "default", 0, fresh=True)
    adapter = get_adapter(model, "default")
    assert {path for path, _ in adapter.own_modules()} == set(backbone.heads), "other default heads than are known"
    changed = distance(run(model, backbone, args), without)
    if unchanged_when_fresh(how, backbone):
        assert changed < 1e-5, "a fresh adapter should change nothing"
    else:
        assert changed > 1e-4, "a fresh adapter should change the output: its configuration says so"

    # Not at the default seed: with these values a ReLU of one method is at zero for all tokens of one backbone.
    rescramble(model, seed=76)
    output = backbone.select(model(*args))
    loss_of(output).backward()
    together = output.detach()
    assert torch.isfinite(together).all(), "the output is not finite"
    assert distance(together, without) > 1e-3, "random values have no effect"
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == len(list(adapter.parameters())) > 0, "not the adapter's parameters are trainable"
    for name, parameter in trainable:
        assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"
    for name, parameter in model.base_model.named_parameters():
        assert parameter.grad is None, f"{name} of the backbone got a gradient"
    alone = run(model, backbone, backbone.slice(args, 1))
    assert distance(alone, together[1:2]) < 1e-5, "a sample depends on its batch mates"

    if (methods, backbone.name) in ON_FILE:
        _check_that_files_carry_it_bit_for_bit(model, backbone, alone, tmp_path)

    with model.disable_adapter():
        assert model.active_adapters == ()
        assert torch.equal(run(model, backbone, args), without), "disabled, it is not the backbone bit for bit"
    assert model.get_base_model() is base and kinds(base) == types, "a type or a name of the backbone is another"
    assert_unloaded(model, before)


def _check_that_files_carry_it_bit_for_bit(
    model: PointPeftModel, backbone: TinyBackbone, alone: Tensor, folder: Path
) -> None:
    model.save_pretrained(folder / "a")
    torch.manual_seed(12345)
    reloaded = PointPeftModel.from_pretrained(backbone.build(), folder / "a").eval()
    again = run(reloaded, backbone, backbone.slice(backbone.inputs(2, 6), 1))
    assert torch.equal(again, alone), "another output than before it was saved"
    assert_same_values(get_adapter(reloaded, "default").tensors(), get_adapter(model, "default").tensors(), "reloaded")
    parameters = [name for name, _ in model.named_parameters()]
    # An optimizer's state goes by their order.
    assert [name for name, _ in reloaded.named_parameters()] == parameters, "other parameters, or in another order"
    assert not any(parameter.requires_grad for parameter in reloaded.parameters()), "what was loaded is trainable"
    reloaded.save_pretrained(folder / "b")
    names = sorted(path.name for path in (folder / "a").iterdir())
    assert names == sorted(path.name for path in (folder / "b").iterdir()), "saved again, it has other files"
    for name in names:
        assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes(), f"{name} saved again"


def merging(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of the methods whose parts are changes of tensors, and one of every other method, which is refused.

    A head is never merged (`test_a_head_is_not_merged`), so a method that is a head and nothing else is left out.
    """
    chosen: list[Pair] = []
    refused: set[str] = set()
    for method, backbone in pairs:
        changes = _changes_tensors(method.partition("[")[0])
        if changes or (changes is False and method not in refused):
            chosen.append((method, backbone))
            refused.add(method)
    return chosen


@functools.cache
def _changes_tensors(method: str) -> bool | None:
    """Tell whether a method only changes tensors of the backbone; None if it has no parts."""
    adapter = get_adapter(get_peft_model(BACKBONES["compact"].build(), config(method)), "default")
    parts = [part for _, part in adapter.all_parts() if part.own_module is None]
    if not parts:
        return None
    return not list(adapter.shared_states()) and all(type(part).weights is not Part.weights for part in parts)


@each(representatives(merging(PAIRS)), smoke="point_mae")
def test_merging_is_exact_or_refused(method: str, backbone: TinyBackbone) -> None:
    model = adapt(backbone, config(method, modules_to_save=[]))
    adapter, output, before = get_adapter(model, "default"), run(model, backbone), fingerprint(model)
    able = all(part.mergeable for _, part in adapter.all_parts()) and not list(adapter.shared_states())
    if not able:
        with pytest.raises(AdapterError, match="cannot be merged"):
            model.merge()
        assert fingerprint(model) == before, "a refused merge changed the model"
        return
    model.merge()
    assert model.merged_adapters == ("default",)
    assert distance(run(model, backbone), output) < 1e-4, "merged, it gives another output"
    refused: list[Callable[[], Any]] = [
        model.unload,
        lambda: model.delete_adapter("default"),
        lambda: model.add_adapter("second", config(method)),
    ]
    for call in refused:
        with pytest.raises(AdapterError, match="merged into the backbone"):
            call()
    model.unmerge()
    assert fingerprint(model) == before, "unmerge() did not restore the model"
    assert torch.equal(run(model, backbone), output), "unmerged, it gives another output"
    merged: nn.Module = model.merge_and_unload()
    assert distance(run(merged, backbone), output) < 1e-4, "merged for good, it gives another output"
    assert not any(SITE in vars(module) or module._forward_hooks for module in merged.modules())


# ---- the prior belongs to the groups of its forward ------------------------------------------------------------------


def anatomy_of(backbone: TinyBackbone) -> Anatomy:
    anatomy = backbone.traced or known_anatomy(backbone.build())
    assert anatomy is not None
    return anatomy


# Packed tokens have no place for prompts, and without prompts there is no prior.
WITH_A_BANK = [pair for pair in PAIRS if pair[0] == "POINT_PEFT" and pair[1].kind != "packed"]
# Groups are random in train mode alone: what then is right on all backbones is so in eval mode, tried on each kind.
BY_MODE = {"train": WITH_A_BANK, "eval": few(WITH_A_BANK)}


@pytest.mark.parametrize(
    ("backbone", "training"),
    [pytest.param(b, mode == "train", id=f"{b.name}-{mode}") for mode, pairs in BY_MODE.items() for _, b in pairs],
)
def test_the_stem_runs_once_and_the_prior_is_that_of_its_groups(backbone: TinyBackbone, training: bool) -> None:
    """As often as in the backbone alone, random groups or not; and the second pass sees the same groups."""
    anatomy, args = anatomy_of(backbone), backbone.inputs(3, 5)
    assert anatomy.adaptable["prior from"] != "none", "there is no prior, and the kind of the backbone says otherwise"
    # Fresh, so that it is known to be made for the prefix tokens of this base.
    model, base = adapt(backbone, PointPEFTConfig.published(), fresh=True), frozen(backbone)
    model.train(training)
    if training:
        in_training(base)
    expected = {path: count_calls(base.get_submodule(path)) for path in anatomy.stem}
    torch.manual_seed(4)
    base(*args)
    counts = {path: count_calls(model.base_model.get_submodule(path)) for path in anatomy.stem}
    tokens: list[Tensor] = []
    ask = model.backbone_tokens

    def spy(*of: Any) -> Tensor:
        tokens.append(ask(*of))
        return tokens[-1]

    model.backbone_tokens = spy  # type: ignore[method-assign, assignment]
    torch.manual_seed(4)
    model(*args)
    assert counts == expected, "the stem runs more or less often than in the backbone"

    for block in anatomy.blocks:
        base.get_submodule(block.path).eval()
    torch.manual_seed(4)
    same = last_tokens(base, anatomy, args)[:, -tokens[0].shape[1] :]
    assert torch.allclose(tokens[0], same, atol=1e-5), "the prior is of other groups"


def count_calls(module: nn.Module) -> Counter[str]:
    """How often a module computes from now on; its hooks run also when it is answered for."""
    counts: Counter[str] = Counter()
    forward: Callable[..., Any] = type(module).forward

    class Counting(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            counts["calls"] += 1
            return forward(self, *args)

    module.__class__ = Counting
    return counts


def last_tokens(base: nn.Module, anatomy: Anatomy, args: Args) -> Tensor:
    """The patch tokens (b, g, c) of the last block that a prior is taken after, after the final norms."""
    stage, outputs = anatomy.stages[anatomy.queried], []
    last = base.get_submodule(stage.blocks[-1].path)
    last.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        base(*args)
    tokens = batch_first(output_tokens(stage, "last", outputs[-1]), stage.layout)
    for path in anatomy.final_norms if stage is anatomy.stages[-1] else ():
        tokens = base.get_submodule(path)(tokens)
    return tokens
