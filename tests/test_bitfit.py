"""BitFit: which biases it takes, and that they act as the biases they stand for."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from point_peft import AnatomyError, BitFitConfig, PeftConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.running.reading import depth
from tests.adapting import full_point_mae
from tests.zoo import BACKBONES, clouds

pytestmark = pytest.mark.smoke


def randomise(model: PointPeftModel, scale: float = 1.0) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))


def test_parameters_on_point_mae():
    """37,248 with the final norm, as METHODS.md counts them: the base has no qkv bias."""
    model = get_peft_model(full_point_mae(), BitFitConfig(modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 37_248


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(3, 6, 1), (2, 3, 6)), (nn.Conv1d(3, 6, 2), (3, 9)), (nn.Conv2d(3, 6, 1), (2, 3, 6, 6))],
    ids=["conv1d", "one cloud", "conv2d"],
)
def test_a_bias_of_a_convolution_is_one_of_its_channels(layer, shape):
    model = nn.Sequential(layer, nn.ReLU())
    adapted = get_peft_model(model, BitFitConfig(target_modules=["0"], modules_to_save=[]))
    randomise(adapted)
    x = torch.randn(shape)
    output = adapted(x)
    ((_, part),) = get_adapter(adapted, "default").all_parts()
    plain: nn.Module = adapted.unload()
    plain.load_state_dict({"0.weight": layer.weight, "0.bias": part.get_parameter("bias")})
    assert torch.allclose(output, plain(x), atol=1e-6)


def test_a_tuned_bias_is_the_bias():
    backbone, (points,) = BACKBONES["point_mae"].build(), clouds(2, 0)
    model = get_peft_model(backbone, BitFitConfig(modules_to_save=[]))
    randomise(model)
    tuned = {name: tensor.clone() for name, tensor in get_adapter(model, "default").tensors().items()}
    output = model(points)
    plain: nn.Module = model.unload()
    plain.load_state_dict({**plain.state_dict(), **tuned})
    assert torch.allclose(plain(points), output, atol=1e-4)


def test_in_plain_layers_its_tensors_stand_in_the_place_of_the_bases():
    """So nothing is added afterwards, and the output is that of a backbone with these biases bit for bit."""
    backbone, (points,) = BACKBONES["point_mae"].build(), clouds(2, 0)
    model = get_peft_model(backbone, BitFitConfig(modules_to_save=[])).eval()
    base = model(points)
    randomise(model)
    tuned = {name: tensor.clone() for name, tensor in get_adapter(model, "default").tensors().items()}
    output = model(points)
    assert depth() == 0 and not torch.equal(output, base)
    with model.disable_adapter():
        assert torch.equal(model(points), base)
    plain: nn.Module = model.unload()
    plain.load_state_dict({**plain.state_dict(), **tuned})
    assert torch.equal(plain(points), output)


@pytest.mark.parametrize("kind", ["another class", "another forward"])
def test_elsewhere_they_act_as_differences(kind: str):
    """In a subclass, or where somebody has set a forward, as accelerate does, it is not known what reads the bias."""

    def forward(layer: nn.Linear, input: Tensor) -> Tensor:
        return nn.functional.linear(input, layer.weight, layer.bias.detach().clone())

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return forward(self, input)

    outputs, gradients = [], []
    for changed in (False, True):
        backbone, (points,) = BACKBONES["point_mae"].build(), clouds(2, 0)
        layers = [module for module in backbone.modules() if type(module) is nn.Linear and module.bias is not None]
        for layer in layers if changed else ():
            if kind == "another class":
                layer.__class__ = Own
            else:
                layer.forward = functools.partial(forward, layer)  # type: ignore[method-assign]
        model = get_peft_model(backbone, BitFitConfig(modules_to_save=[])).eval()
        randomise(model)
        output = model(points)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), list(model.adapters.parameters())))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_backbone_in_another_type_runs_with_them():
    backbone, (points,) = BACKBONES["point_mae"].build(), clouds(2, 0)
    model = get_peft_model(backbone, BitFitConfig(modules_to_save=[])).eval()
    randomise(model, 0.1)
    expected = model(points)
    model.base_model.double()
    assert {parameter.dtype for parameter in model.adapters.parameters()} == {torch.float32}
    torch.testing.assert_close(model(points.double()).float(), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_checkpointed_alone_runs_again_with_the_same_adapter():
    """It is called without the model, and the choice of the adapter is over when the backward pass comes."""
    model = get_peft_model(BACKBONES["point_mae"].build(), BitFitConfig(modules_to_save=[])).eval()
    model.add_adapter("second", BitFitConfig(modules_to_save=[]))
    randomise(model)
    model.train_adapter("second")
    mlp = model.get_submodule("base_model.blocks.blocks.0.mlp")
    x = torch.randn(2, 5, model.get_parameter("base_model.blocks.blocks.0.mlp.fc1.weight").shape[1])
    parameters = [p for path, p in get_adapter(model, "second").tensors().items() if "blocks.0.mlp" in path]
    gradients = []
    for run in (mlp, functools.partial(checkpoint, mlp, use_reentrant=False)):
        with model.use_adapter("second"):
            output = run(x)
        gradients.append(torch.autograd.grad(output.square().sum(), parameters))
    for one, other in zip(*gradients, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, other)


def test_an_error_in_a_layer_leaves_nothing_in_its_place():
    backbone, (points,) = BACKBONES["point_mae"].build(), clouds(2, 0)
    model = get_peft_model(backbone, BitFitConfig(modules_to_save=[])).eval()
    before = model(points)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model.get_submodule("base_model.blocks.blocks.0.mlp.fc1")(torch.zeros(2, 3))
    assert depth() == 0
    assert torch.equal(model(points), before)


def test_a_module_without_bias_is_refused():
    with pytest.raises(AnatomyError, match=r"'blocks.blocks.0.attn.qkv' \(Linear\) has no bias to tune"):
        get_peft_model(BACKBONES["point_mae"].build(), BitFitConfig(target_modules=["qkv"]))


def test_beside_point_peft_each_bias_is_tuned_once():
    tuners = (PointPEFTConfig(memory_bank=False, adapted_share=1.0), BitFitConfig())
    both = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners, modules_to_save=[]))
    alone = get_peft_model(BACKBONES["point_mae"].build(), PeftConfig(tuners=tuners[:1], modules_to_save=[]))
    assert both.get_nb_trainable_parameters() == alone.get_nb_trainable_parameters()
