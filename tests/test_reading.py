"""Adapting weights that are read where their module is not called: the result, gradients, threads, errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from point_peft import AnatomyError, BitFitConfig, LoraConfig, PointPeftModel, TunerConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.running import reading
from point_peft.running.reading import depth, enter, unwind
from tests.hanging import LONG
from tests.zoo import BACKBONES, WIDTH, clouds, enliven
from tests.zoo.parts import HEADS
from tests.zoo.variants import Classifier


class EvaAttention(nn.Module):
    """It reads the weight of `qkv`, whose bias it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(WIDTH))
        self.v_bias = nn.Parameter(torch.zeros(WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros(WIDTH), self.v_bias])
        fused = functional.linear(tokens, weight=self.qkv.weight, bias=bias)
        q, k, v = fused.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out


class TorchAttention(nn.MultiheadAttention):
    """Self-attention that gives a tensor."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, batch_first=True)


class JoinedAttention(EvaAttention):
    """It reads three weights at once."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        del self.qkv

    def forward(self, tokens: Tensor) -> Tensor:
        fused = functional.linear(tokens, torch.cat([self.q.weight, self.k.weight, self.v.weight]))
        q, k, v = fused.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out


class ReadLayer(nn.Module):
    """A pre-norm block whose attention reads weights."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm_a = nn.LayerNorm(WIDTH)
        self.attention = attention
        self.norm_b = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm_a(tokens)
        if isinstance(self.attention, nn.MultiheadAttention):
            mixed = self.attention(normed, normed, normed, need_weights=False)[0]
        else:
            mixed = self.attention(normed)
        tokens = tokens + mixed
        out: Tensor = tokens + self.feed(self.norm_b(tokens))
        return out


class Reading(Classifier):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__([ReadLayer(attention()) for _ in range(2)])
        self.again: bool | None = None
        """Modes in which blocks are run again in the backward pass, and by the re-entrant kind of checkpointing."""

    def encode(self, tokens: Tensor, positions: Tensor, centres: Tensor) -> Tensor:
        if self.again and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # this kind needs an input with a gradient
        for block in self.blocks:
            if self.again is None:
                tokens = block(tokens + positions)
            else:
                tokens = checkpoint(block, tokens + positions, use_reentrant=self.again)
        return tokens


KINDS: dict[str, Callable[[], nn.Module]] = {"torch": TorchAttention, "eva": EvaAttention, "joined": JoinedAttention}
POINTS = clouds(3, 0)[0]
TARGETS: dict[str, tuple[str, list[str]]] = {
    "in_proj": ("torch", ["attention"]),
    "out_proj": ("torch", ["out_proj"]),
    "both": ("torch", ["attention", "out_proj"]),
    "eva": ("eva", ["qkv"]),
    "joined": ("joined", ["q", "k", "v"]),
}
every_target = pytest.mark.parametrize(("kind", "names"), TARGETS.values(), ids=TARGETS)


def build(kind: str) -> Reading:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Reading(KINDS[kind])
        enliven(model)
    model.requires_grad_(False)
    return model.eval()


def adapted(kind: str, names: list[str], seed: int = 2, **fields: Any) -> PointPeftModel:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=names, modules_to_save=[], **fields)
    return randomised(get_peft_model(build(kind), config, example_inputs=POINTS), seed)


def randomised(model: PointPeftModel, seed: int = 2, name: str = "default") -> PointPeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in get_adapter(model, name).parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def by_hand(kind: str, model: PointPeftModel, *adapters: str) -> Reading:
    """The backbone with the updates of adapters added to its weights."""
    plain = build(kind)
    with torch.no_grad():
        for name in adapters or ("default",):
            for path, part in get_adapter(model, name).all_parts():
                module = plain.get_submodule(path)
                fused = isinstance(module, nn.MultiheadAttention)
                weight = module.get_parameter("in_proj_weight" if fused else "weight")
                assert isinstance(part.lora_A, nn.Linear) and isinstance(part.lora_B, nn.Linear)
                weight.add_(part.lora_B.weight @ part.lora_A.weight, alpha=2.0)
    return plain


# ---- LoRA ------------------------------------------------------------------------------------------------------------


@every_target
def test_the_output_is_that_of_changed_weights(kind, names):
    model = adapted(kind, names)
    assert len(model.get_layer_status()) == 2 * len(names)
    with torch.no_grad():
        output, plain = model(POINTS), build(kind)(POINTS)
        assert torch.allclose(output, by_hand(kind, model)(POINTS), atol=1e-5)
        assert (output - plain).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(model(POINTS), plain)
    assert depth() == 0


@every_target
def test_gradients_reach_the_update_and_not_the_base(kind, names):
    model = adapted(kind, names)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    model(POINTS).square().sum().backward()
    for name, parameter in model.adapters.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None and not p.requires_grad for p in model.base_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())

    # The same as by differentiating with respect to the changed weights.
    hand = by_hand(kind, model).requires_grad_(True)
    hand(POINTS).square().sum().backward()
    path, part = next(get_adapter(model, "default").all_parts())
    module = hand.get_submodule(path)
    weight = module.get_parameter("in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight")
    assert isinstance(part.lora_A, nn.Linear) and isinstance(part.lora_B, nn.Linear)
    assert weight.grad is not None and part.lora_B.weight.grad is not None
    expected = 2.0 * weight.grad @ part.lora_A.weight.T
    assert torch.allclose(part.lora_B.weight.grad, expected, rtol=1e-3, atol=1e-4)


def test_a_fresh_update_changes_nothing():
    model = get_peft_model(build("eva"), LoraConfig(modules_to_save=[]), example_inputs=POINTS).eval()
    assert [row.name for row in model.get_layer_status()] == [f"blocks.{i}.attention.qkv" for i in range(2)]
    with torch.no_grad():
        assert torch.equal(model(POINTS), build("eva")(POINTS))


@every_target
def test_two_adapters_add_up(kind, names):
    model = adapted(kind, names)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=names[:1], modules_to_save=[])
    model.add_adapter("second", config)
    randomised(model, 3, "second")
    with torch.no_grad():
        assert torch.allclose(model(POINTS), by_hand(kind, model)(POINTS), atol=1e-5)
        model.set_adapter("second")
        assert torch.allclose(model(POINTS), by_hand(kind, model, "second")(POINTS), atol=1e-5)
        model.set_adapter(["default", "second"])
        assert torch.allclose(model(POINTS), by_hand(kind, model, "default", "second")(POINTS), atol=1e-5)


@every_target
def test_merging_is_the_same_and_is_undone(kind, names):
    model = adapted(kind, names)
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    with torch.no_grad():
        output = model(POINTS)
        model.merge()
        assert torch.allclose(model(POINTS), output, atol=1e-5)
        assert torch.equal(model(POINTS), model.base_model(POINTS))
        model.unmerge()
        assert torch.equal(model(POINTS), output)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_model.state_dict().items())
        assert torch.allclose(model.merge_and_unload()(POINTS), output, atol=1e-5)


@every_target
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, names, reentrant):
    """Blocks that are run again read the adapted weights again."""
    gradients = []
    for again in (None, reentrant):
        model = adapted(kind, names)
        assert isinstance(model.base_model, Reading)
        model.base_model.again = again
        model(POINTS).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.adapters.parameters()])
    for plain, again_ in zip(*gradients, strict=True):
        assert plain is not None and again_ is not None and torch.allclose(plain, again_, rtol=1e-4, atol=1e-5)
    assert depth() == 0


@every_target
def test_a_copy_reads_its_own_update(kind, names):
    model = adapted(kind, names)
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(other(POINTS), model(POINTS))
        randomised(other, 5)
        assert torch.allclose(model(POINTS), by_hand(kind, model)(POINTS), atol=1e-5)
        assert torch.allclose(other(POINTS), by_hand(kind, other)(POINTS), atol=1e-5)


def test_the_fused_path_of_torch_is_not_taken():
    """In eval mode without gradients a layer of torch.nn would read its weights past every hook."""
    backbone = BACKBONES["transformer_sequence_first"]
    args = backbone.inputs(2, 0)
    config = LoraConfig(target_modules=["self_attn", "out_proj"], modules_to_save=[])
    model = randomised(get_peft_model(backbone.build(), config, example_inputs=backbone.example))
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        with torch.no_grad():
            output = model(*args)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        assert torch.allclose(output, model.merge_and_unload()(*args), atol=1e-5)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("torch", "attention"), ("torch", "out_proj"), ("eva", "qkv")])
def test_dropout_is_refused(kind, name):
    model = build(kind)
    config = LoraConfig(lora_dropout=0.1, target_modules=[name])
    with pytest.raises(AnatomyError, match=r"is not called, its weight is read by .* lora_dropout=0.1 cannot act on"):
        get_peft_model(model, config, example_inputs=POINTS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    get_peft_model(model, LoraConfig(lora_dropout=0.1, target_modules=["feed.0"]), example_inputs=POINTS)


def test_an_own_copy_is_refused_where_weights_are_read():
    config = LoraConfig(target_modules=["feed.0"], modules_to_save=["blocks.0.attention.qkv"])
    with pytest.raises(AnatomyError, match=r"'blocks.0.attention.qkv' is not called, another module reads its weights"):
        get_peft_model(build("eva"), config, example_inputs=POINTS)


def test_projections_of_three_widths_are_refused():
    """nn.MultiheadAttention then has no fused weight."""
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    with pytest.raises(AnatomyError, match=r"'0' is a MultiheadAttention; LORA adapts linear layers"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


# ---- BitFit ----------------------------------------------------------------------------------------------------------


def test_the_bias_of_an_out_proj_is_tuned():
    config: TunerConfig = BitFitConfig(target_modules=["out_proj"], modules_to_save=[])
    model = randomised(get_peft_model(build("torch"), config, example_inputs=POINTS))
    hand = build("torch")
    tuned = get_adapter(model, "default").tensors()
    assert set(tuned) == {f"blocks.{i}.attention.out_proj.bias" for i in range(2)}
    hand.load_state_dict({**hand.state_dict(), **tuned})
    output = model(POINTS)
    with torch.no_grad():
        assert torch.allclose(output, hand(POINTS), atol=1e-5)
        assert not torch.allclose(output, build("torch")(POINTS), atol=1e-3)
    output.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.adapters.parameters())
    model.merge()
    with torch.no_grad():
        assert torch.allclose(model(POINTS), output, atol=1e-5)


def test_bias_and_weight_of_one_module():
    model = adapted("torch", ["out_proj"])
    model.add_adapter("bias", BitFitConfig(target_modules=["out_proj"], modules_to_save=[]))
    randomised(model, 4, "bias")
    hand = by_hand("torch", model)
    hand.load_state_dict({**hand.state_dict(), **get_adapter(model, "bias").tensors()})
    with torch.no_grad():
        model.set_adapter(["default", "bias"])
        assert torch.allclose(model(POINTS), hand(POINTS), atol=1e-5)


# ---- threads and errors ----------------------------------------------------------------------------------------------


def test_another_thread_sees_the_base_while_one_is_inside():
    model = adapted("eva", ["qkv"])
    with torch.no_grad():
        expected, plain = model(POINTS), build("eva")(POINTS)
    inside, leave = threading.Event(), threading.Event()
    attention = model.base_model.get_submodule("blocks.0.attention")
    qkv = attention.get_parameter("qkv.weight")
    first, found = [], []

    def wait(module: nn.Module, args: Any) -> None:
        if threading.current_thread() is worker:
            inside.set()
            assert leave.wait(LONG)

    def work() -> None:
        with torch.no_grad():
            found.append(model(POINTS))

    worker = threading.Thread(target=work)
    attention.get_submodule("proj").register_forward_pre_hook(wait)
    worker.start()
    try:
        assert inside.wait(LONG)
        tokens = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            first.append(functional.linear(tokens, qkv))
            first.append(tokens @ build("eva").get_parameter("blocks.0.attention.qkv.weight").T)
            with model.disable_adapter():
                off = model(POINTS)
            on = model(POINTS)
        assert depth() == 0
    finally:
        leave.set()
        worker.join(LONG)
    assert torch.allclose(first[0], first[1], atol=1e-6)
    assert torch.equal(off, plain) and torch.equal(on, expected)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_leaves_nothing_behind(error):
    model = adapted("eva", ["qkv"])
    with torch.no_grad():
        expected = model(POINTS)
    attention = model.base_model.get_submodule("blocks.1.attention")

    def fail(module: nn.Module, args: Any) -> None:
        assert depth() == 1
        raise error("on purpose")

    with attention.get_submodule("proj").register_forward_pre_hook(fail), pytest.raises(error, match=r"on purpose"):
        model(POINTS)
    assert depth() == 0
    weight = attention.get_parameter("qkv.weight")
    assert torch.equal(functional.linear(torch.eye(WIDTH), weight), weight.T)
    with torch.no_grad():
        assert torch.equal(model(POINTS), expected)
        with model.disable_adapter():
            assert torch.equal(model(POINTS), build("eva")(POINTS))


def test_an_error_of_a_module_that_is_called_alone():
    """The attention is run by itself, without the model around it."""
    model = adapted("eva", ["qkv"])
    attention = model.base_model.get_submodule("blocks.0.attention")
    tokens = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = by_hand("eva", model).get_submodule("blocks.0.attention")(tokens)
        assert torch.allclose(attention(tokens), expected, atol=1e-5)
        with pytest.raises(RuntimeError):
            attention(tokens[..., :3])
        assert depth() == 0


# ---- substitutions themselves ----------------------------------------------------------------------------------------


def always() -> bool:
    return True


def test_substitutions_nest_and_end():
    outer, inner = nn.Linear(2, 2), nn.Linear(2, 2)
    base, one, two = (nn.Parameter(torch.full((2, 2), value)) for value in (0.0, 1.0, 2.0))
    x = torch.eye(2)
    assert reading.leave(outer) is None
    enter(outer, {id(base): ("a", one)}, always)
    try:
        assert torch.equal(functional.linear(x, weight=base), one)
        enter(inner, {id(two): ("b", one)}, always)
        assert depth() == 2
        assert reading.leave(outer) is None  # it is not the last that was entered
        assert reading.leave(inner) == set()  # whose tensor nobody asked for
        assert torch.equal(x @ base, one)
        assert reading.leave(outer) == {"a"}
    finally:
        unwind(0)
    assert torch.equal(x @ base, base) and depth() == 0


def test_tensors_in_lists_are_given_too():
    reader, base, other = nn.Linear(2, 2), nn.Parameter(torch.zeros(1, 2)), nn.Parameter(torch.full((1, 2), 3.0))
    enter(reader, {id(base): ("a", torch.ones(1, 2))}, always)
    try:
        assert torch.equal(torch.cat([base, other]), torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
        assert torch.equal(torch.stack((other, base), dim=1)[0], torch.tensor([[3.0, 3.0], [1.0, 1.0]]))
        assert torch.equal(base.T, torch.ones(2, 1)) and torch.equal(base[0], torch.ones(2))
    finally:
        assert reading.leave(reader) == {"a"}


def test_what_was_left_open_is_ended():
    reader, base = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
    for _ in range(3):
        enter(reader, {id(base): ("a", torch.ones(2, 2))}, always)
    unwind(1)
    assert depth() == 1
    unwind(0)
    assert not (base + 0.0).any()


def test_what_was_left_open_has_no_effect_once_it_is_over():
    reader, base = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
    running = [True]
    enter(reader, {id(base): ("a", torch.ones(2, 2))}, lambda: running[0])
    try:
        assert (base + 0.0).all()
        running[0] = False
        assert not (base + 0.0).any()
    finally:
        unwind(0)
