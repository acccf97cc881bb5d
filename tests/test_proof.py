"""What only a forward can show: that parts run, that their tensors learn, that nobody has replaced their modules."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from point_peft import AdapterError, LoraConfig, PointPeftModel, get_peft_model, inject_adapter
from point_peft.adapting.adapter import get_adapter
from tests.adapting import adapt, complete, distance, every_method, loss_of, plain, run
from tests.methods import config
from tests.zoo import BACKBONES, CLASSES
from tests.zoo.compact import compact_like

COMPACT = BACKBONES["compact"]


class Wrapper(nn.Module):
    """An encoder and a head behind it, called as `how` says."""

    def __init__(self, encoder: nn.Module, how: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(CLASSES, CLASSES)
        self.how = how

    def forward(self, points: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "no_grad"):
            features = self.encoder(points)
        logits: Tensor = self.head(features.detach() if self.how == "detached" else features)
        return logits


def wrapped(method: str, how: str) -> PointPeftModel:
    base = COMPACT.build()
    model = get_peft_model(Wrapper(base, how), config(method, modules_to_save=["head", "cls_head_finetune"]))
    complete(model, COMPACT, "default", 0, fresh=False)
    return model.train()


# ---- learning --------------------------------------------------------------------------------------------------------


def trained_in_encoder(model: PointPeftModel) -> int:
    adapter = get_adapter(model, "default")
    return sum(p.requires_grad for p in adapter.parameters()) - 2  # of the head


@pytest.mark.parametrize("how", ["no_grad", "detached"])
@every_method
def test_what_gets_no_gradient_is_told_in_the_first_training_forward(method: str, how: str) -> None:
    model, (points,) = wrapped(method, how), COMPACT.inputs(2, 5)
    count = trained_in_encoder(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            output = model(points)
        except AdapterError as error:
            assert how == "no_grad"
            assert "at 'encoder." in str(error) and "no torch.no_grad() inside the model" in str(error)
            return
    (warning,) = caught
    text = str(warning.message)
    (loss_of(output) + model.auxiliary_loss()).backward()
    learns = sum(p.grad is not None for p in get_adapter(model, "default").parameters())
    assert learns == 2 or method == "POINT_LORA"  # whose loss has a gradient of its own
    assert f"{count + 2 - learns} of {count + 2} trained tensors get no gradient" in text and "'encoder." in text
    assert ("ran under torch.no_grad()" if how == "no_grad" else "detached on its way") in text
    model(points)  # once is enough, and a warning would be an error here


@every_method
def test_what_learns_is_not_warned_of(method: str) -> None:
    model, (points,) = wrapped(method, "called"), COMPACT.inputs(2, 5)
    with torch.no_grad():
        model(points)
    loss_of(model(points)).backward()
    adapter = get_adapter(model, "default")
    assert adapter.unproven is None and all(p.grad is not None for p in adapter.parameters() if p.requires_grad)


def test_the_inputs_of_a_block_that_were_detached() -> None:
    base = COMPACT.build()
    base.get_submodule("blocks.blocks.1").register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
    model = get_peft_model(base, LoraConfig(r=2, modules_to_save=["cls_head_finetune"])).train()
    with pytest.warns(
        UserWarning, match=r"6 of 16 .* at 'blocks\.blocks\.0\.attention\.q' to .* \(3 modules\) ran, but"
    ):
        model(*COMPACT.inputs(2, 5))


def test_inference_and_frozen_adapters_are_not_asked_to_learn() -> None:
    model, (points,) = wrapped("LORA", "no_grad"), COMPACT.inputs(2, 5)
    model.eval()(points)
    model.freeze_adapter("default")
    model.train()(points)
    model(points)
    with torch.no_grad():
        model.train_adapter("default")
        model(points)
    with pytest.warns(UserWarning, match="get no gradient"):
        model(points)


@every_method
def test_training_in_eval_mode_is_seen_in_the_backward_pass(method: str) -> None:
    """As of those who keep all norms and dropouts still; and inference in that mode, with gradients, says nothing."""
    model, (points,) = wrapped(method, "no_grad").eval(), COMPACT.inputs(2, 5)
    learning = wrapped(method, "called").eval()
    try:
        model(points)
    except AdapterError as error:
        assert "at 'encoder." in str(error) and "no torch.no_grad() inside the model" in str(error)
    else:
        with pytest.warns(UserWarning, match=r"get no gradient.*'encoder\..*ran under torch.no_grad\(\)"):
            loss_of(model(points)).backward()
        loss_of(model(points)).backward()
    loss_of(learning(points)).backward()
    assert get_adapter(learning, "default").unproven is None


def test_what_is_to_be_proved_holds_no_graph() -> None:
    model, (points,) = wrapped("LORA", "called").eval(), COMPACT.inputs(2, 5)
    enabled = gc.isenabled()
    gc.disable()
    try:
        leaf = points.clone().requires_grad_()
        output, held = model(leaf), weakref.ref(leaf)
        del leaf
        assert held() is not None and output.requires_grad
        del output
        assert held() is None
    finally:
        if enabled:
            gc.enable()


# ---- running ---------------------------------------------------------------------------------------------------------


def skipping(method: str, skip: Callable[[], bool]) -> PointPeftModel:
    """An adapted model whose second block is skipped where `skip` says so."""
    base = COMPACT.build()
    block: Any = base.get_submodule("blocks.blocks.1")

    class Skipping(type(block)):  # type: ignore[misc]
        def __call__(self, tokens: Tensor, mask: Tensor) -> Any:
            return tokens if self.training and skip() else super().__call__(tokens, mask)

    model = get_peft_model(base, config(method))
    complete(model, COMPACT, "default", 0, fresh=False)
    block.__class__ = Skipping
    return model.train()


@every_method
def test_a_block_that_is_skipped_at_random(method: str, tmp_path: Path) -> None:
    drawn = iter([True, True, False])
    model = skipping(method, lambda: next(drawn))
    adapter = get_adapter(model, "default")
    missed = {path for path, _ in adapter.sites() if path.startswith("blocks.blocks.1")}
    for _ in range(2):
        loss_of(model(*COMPACT.inputs(2, 5))).backward()
        assert adapter.silent == missed
    assert {row.name for row in model.get_layer_status() if row.unproven_adapters} == missed
    if missed:
        with pytest.warns(UserWarning, match=r"parts at \d+ of its modules have not run .* 'blocks\.blocks\.1"):
            model.save_pretrained(tmp_path / "early")
    model(*COMPACT.inputs(2, 5))
    assert not adapter.silent and not any(row.unproven_adapters for row in model.get_layer_status())
    model.save_pretrained(tmp_path / "late")


class TwoHeads(nn.Module):
    """The head is chosen by the batch; `reads` makes it read the weights of the other."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.layer, self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        logits: Tensor = self.one(x) if len(x) > 2 or self.reads else self.two(x)
        if self.reads:
            logits = logits + nn.functional.linear(x, self.two.weight)
        return logits


@pytest.mark.parametrize("inject", [False, True], ids=["get_peft_model", "inject_adapter"])
def test_a_head_that_the_batch_chooses(inject: bool) -> None:
    how = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["one", "two"])
    model: Any = inject_adapter(TwoHeads(), how) if inject else get_peft_model(TwoHeads(), how)
    adapters = model.point_peft if inject else model
    for rows, silent in ((3, {"two"}), (3, {"two"}), (2, set())):
        model.train()(torch.rand(rows, 3)).sum().backward()
        assert get_adapter(adapters, "default").silent == silent
    both = [own for _, own in get_adapter(adapters, "default").own_modules()]
    assert all(p.grad is not None for own in both for p in own.parameters())


def test_what_another_module_reads_is_an_error_each_time() -> None:
    model = get_peft_model(TwoHeads(reads=True), LoraConfig(target_modules=["two"], modules_to_save=["one"]))
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"the LoraPart at 'two' had no effect.*read by another module"):
            model(torch.rand(2, 3))


def test_what_a_module_reads_in_training_only_is_found_then() -> None:
    class Fused(TwoHeads):
        def forward(self, x: Tensor) -> Tensor:
            self.reads = self.training
            return super().forward(x)

    model = get_peft_model(Fused(), LoraConfig(target_modules=["two"], modules_to_save=["one"])).eval()
    with torch.no_grad():
        model(torch.rand(3, 3))
    with pytest.raises(AdapterError, match=r"at 'two' had no effect"):
        model.train()(torch.rand(3, 3))


def test_the_children_of_a_head_that_are_called_one_by_one() -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.head:
                x = layer(x)
            return x

    model = get_peft_model(Pieces(), LoraConfig(target_modules=[r"head.0"], modules_to_save=[]))
    model(torch.rand(2, 3))
    model = get_peft_model(Pieces(), config("LINEAR_PROBE", modules_to_save=["head"]))
    with pytest.raises(AdapterError, match=r"the OwnModule at 'head' had no effect"):
        model(torch.rand(2, 3))


@every_method
def test_a_module_that_is_never_called_is_told_when_the_adapter_is_saved(method: str, tmp_path: Path) -> None:
    base = compact_like(COMPACT.build(), spare=True)
    with pytest.warns(UserWarning, match=r"fills: 'spares.0'\. If"):
        model = get_peft_model(base, config(method, modules_to_save=["spare", "cls_head_finetune"]))
    complete(model, COMPACT, "default", 0, fresh=False)
    model.save_pretrained(tmp_path / "unrun")  # nothing is known of it yet
    for _ in range(2):
        run(model, COMPACT)
    with model.disable_adapter():
        assert torch.equal(run(model, COMPACT), plain(COMPACT))
    with pytest.warns(UserWarning, match=r"'default': the parts at 1 of its modules have not run .*: 'spare'"):
        model.save_pretrained(tmp_path / "run")
    assert [row.name for row in model.get_layer_status() if row.unproven_adapters] == ["spare"]
    with pytest.raises(AdapterError, match="'spares' is a ModuleList, which is never called: name what it holds"):
        model.add_adapter("second", config(method, modules_to_save=["spares"]))


# ---- replaced --------------------------------------------------------------------------------------------------------


def pruned(module: nn.Module) -> nn.Module:
    kept = nn.Linear(24, 24)
    with torch.no_grad():
        kept.weight.copy_(module.get_parameter("weight"))
    return kept


@pytest.mark.parametrize("ran", [False, True], ids=["at once", "after a forward"])
@every_method
def test_a_block_that_was_replaced_since_is_refused(method: str, ran: bool) -> None:
    model = adapt(COMPACT, method)
    if ran:
        run(model, COMPACT)
    blocks: Any = model.get_submodule("base_model.blocks.blocks")
    block = blocks[1]
    blocks[1] = COMPACT.build().get_submodule("blocks.blocks.1")
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"'blocks\.blocks\.1' \(CompactBlock\) was replaced by a CompactBlock"):
            run(model, COMPACT)
    blocks[1] = block
    run(model, COMPACT)


@every_method
def test_a_block_that_was_compiled_since_is_refused(method: str) -> None:
    model = adapt(COMPACT, method)
    blocks: Any = model.get_submodule("base_model.blocks.blocks")
    block = blocks[0]
    blocks[0] = torch.compile(block, backend="eager")
    said = r"'blocks\.blocks\.0' \(CompactBlock\) was compiled since .* torch\.compile\(model\)"
    with pytest.raises(AdapterError, match=said):
        run(model, COMPACT)
    blocks[0] = block
    before = run(model, COMPACT)
    block.compile(backend="eager")
    with pytest.raises(AdapterError, match=said):
        run(model, COMPACT)
    block._compiled_call_impl = None
    assert torch.equal(run(model, COMPACT), before)


def test_a_layer_that_was_pruned_or_quantised_since_is_refused() -> None:
    model = get_peft_model(COMPACT.build(), LoraConfig(r=2, target_modules=["blocks.blocks.1.attention.q"]))
    attention: Any = model.get_submodule("base_model.blocks.blocks.1.attention")
    layer = attention.q
    attention.q = pruned(layer)
    with pytest.raises(AdapterError, match=r"'blocks\.blocks\.1\.attention\.q' \(Linear\) was replaced by a Linear"):
        run(model, COMPACT)
    attention.q = None
    with pytest.raises(AdapterError, match=r"attention\.q' \(Linear\) was taken out since"):
        run(model, COMPACT)
    attention.q = layer
    run(model, COMPACT)


@pytest.mark.parametrize("method", ["BITFIT", "LORA"])
def test_a_layer_whose_weight_was_parametrised_by_pruning(method: str) -> None:
    model = adapt(COMPACT, config(method, target_modules=["blocks.blocks.1.mlp.0"], modules_to_save=[]))
    layer = model.get_submodule("base_model.blocks.blocks.1.mlp.0")
    for name in ("weight", "bias"):
        prune.l1_unstructured(layer, name, amount=0.5)
    if method == "LORA":  # which adds to what the layer gives, whatever its weight
        run(model, COMPACT)
    else:
        with pytest.raises(AdapterError, match=r"'blocks\.blocks\.1\.mlp\.0' \(Linear\) did not use its own bias"):
            run(model, COMPACT)
    with pytest.raises(AdapterError, match=r"'blocks\.blocks\.1\.mlp\.0\.(weight|bias)' is no parameter"):
        model.merge()


def test_a_block_that_was_only_wrapped_acts_on() -> None:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Any:
            return self.inner(*args)

    model = adapt(COMPACT, "LORA")
    before = run(model, COMPACT)
    blocks: Any = model.get_submodule("base_model.blocks.blocks")
    blocks[0] = Around(blocks[0])
    assert torch.equal(run(model, COMPACT), before)


# ---- compiled before adapting ----------------------------------------------------------------------------------------


def test_what_is_compiled_already_is_refused_untouched() -> None:
    base = COMPACT.build()
    output = COMPACT.select(base(*COMPACT.inputs(2, 5)))
    compiled: Any = torch.compile(base, backend="eager")
    for adapt_it in (get_peft_model, inject_adapter):
        with pytest.raises(AdapterError, match="'OptimizedModule' is compiled already.*: adapt first, then compile"):
            adapt_it(compiled, LoraConfig())
    blocks: Any = base.get_submodule("blocks.blocks")
    block = blocks[0]
    blocks[0] = torch.compile(block, backend="eager")
    with pytest.raises(AdapterError, match=r"'blocks\.blocks\.0' is compiled already"):
        get_peft_model(base, LoraConfig())
    blocks[0] = block
    block.compile(backend="eager")
    with pytest.raises(AdapterError, match=r"'blocks\.blocks\.0' is compiled already"):
        get_peft_model(base, LoraConfig())
    block._compiled_call_impl = None
    assert torch.equal(COMPACT.select(base(*COMPACT.inputs(2, 5))), output)
    assert torch.equal(run(get_peft_model(base, LoraConfig()), COMPACT), output)


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        scripted: Any = torch.jit.trace(nn.Sequential(nn.Linear(3, 3)), torch.rand(2, 3))
    with pytest.raises(AdapterError, match="TorchScript.*: adapt first, then compile or export"):
        get_peft_model(scripted, LoraConfig(target_modules=["0"]))


# ---- norms that are converted ----------------------------------------------------------------------------------------


@every_method
def test_norms_that_are_converted_for_several_processes(method: str, tmp_path: Path) -> None:
    backbone = BACKBONES["point_mae"]
    model = adapt(backbone, method)
    before, held = run(model, backbone), {k: v.clone() for k, v in model.base_model.named_buffers()}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.base_model.modules())
    assert distance(run(model, backbone), before) < 1e-6
    loss_of(backbone.select(model.train()(*backbone.inputs(2, 5)))).backward()
    assert all(torch.equal(v, held[k]) for k, v in model.base_model.named_buffers())
    assert all(p.grad is not None for p in get_adapter(model, "default").parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    again = PointPeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    assert distance(run(again, backbone), run(model, backbone)) < 1e-6
    with torch.no_grad():
        unloaded = backbone.select(model.unload().eval()(*backbone.inputs(2, 5)))
    assert distance(unloaded, plain(backbone)) < 1e-6


def test_random_is_not_needed_for_a_skip() -> None:
    """Numbers of Python's generator, as stochastic depth may draw them, decide which blocks run."""
    drawn = random.Random(0)
    model = skipping("POINT_PEFT", lambda: drawn.random() < 0.5)
    for _ in range(6):
        loss_of(model(*COMPACT.inputs(2, 5))).backward()
    assert not get_adapter(model, "default").silent
