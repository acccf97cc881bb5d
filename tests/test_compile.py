"""`torch.compile(fullgraph=True)` computes what eager code does, in one graph for all adapters of a configuration.

That every method takes any number of clouds, without its shapes being known, `tests/test_export.py` shows; here, where
the compiler would need up to twice as long for it, one method does.
"""

from __future__ import annotations

from collections.abc import Callable

import einops
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from point_peft import LoraConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from tests.adapting import ONE_BLOCK, adapt, add, distance, every_method, gradients, loss_of, plain, run, without_search
from tests.zoo import BACKBONES, TinyBackbone, clouds

# As whole calls in the graph: to follow what is inside them takes half of a compilation.
for function in (einops.rearrange, einops.reduce, einops.repeat):
    torch.compiler.allow_in_graph(function)

TWO_BLOCKS = without_search(BACKBONES["point_bert"])
SIMPLE = without_search(ONE_BLOCK)
NAMES = ("default", "other")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def of_batch(size: int, seed: int = 5) -> Tensor:
    """Clouds of which the compiler is told that there may be any number."""
    points: Tensor = clouds(size, seed)[0].clone()
    torch._dynamo.mark_dynamic(points, 0)
    return points


def adapted(method: str, backbone: TinyBackbone) -> PointPeftModel:
    """Two adapters of one configuration with other values, both seen in eager mode."""
    model = adapt(backbone, method)
    add(model, backbone, method, "other")
    outputs = [plain(backbone)]
    for name in NAMES:
        model.set_adapter(name)
        outputs.append(run(model, backbone))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert distance(outputs[one], outputs[other]) > 1e-3
    return model


@every_method
def test_one_graph_for_all_adapters_of_a_configuration(method):
    model, graphs = adapted(method, SIMPLE), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
    for name in (*NAMES, NAMES[0]):
        model.set_adapter(name)
        expected, output = (step(forward, model, *clouds(3, 5)) for forward in (model, compiled))
        assert distance(output[0], expected[0]) < 1e-5
        assert output[1].keys() == expected[1].keys() and any(key.startswith(f"adapters.{name}.") for key in output[1])
        for key, gradient in expected[1].items():
            assert torch.allclose(output[1][key], gradient, rtol=1e-4, atol=1e-6), key
    assert graphs.frame_count == 1


def step(forward: Callable[[Tensor], Tensor], model: nn.Module, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients."""
    model.zero_grad()
    output = forward(points)
    loss_of(output).backward()
    return output.detach(), gradients(model)


def test_a_swap_to_another_method_and_back():
    model, (points,) = get_peft_model(TWO_BLOCKS.build(), PointPEFTConfig()), clouds(3, 0)
    model.build_memory_bank([clouds(12, 1)[0]])
    model.add_adapter("other", LoraConfig(r=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.eval(), fullgraph=True, backend=graphs)
    outputs = []
    with torch.no_grad():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            outputs.append(compiled(points))
            assert torch.allclose(outputs[-1], model(points), atol=1e-5)
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert graphs.frame_count == 2


# Of torch's own compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_generated_code_gives_the_same():
    model, graphs = adapted("LORA", ONE_BLOCK), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for name, batch in (("default", 3), ("other", 5), ("default", 7)):
            model.set_adapter(name)
            assert distance(compiled(of_batch(batch)), model(of_batch(batch))) < 1e-5
    assert graphs.frame_count == 1
