"""`torch.compile(fullgraph=True)` computes what eager code does, in one graph for all adapters of a configuration.

That every method takes any number of clouds, without its shapes being known, `tests/test_export.py` shows; here, where
the compiler would need up to twice as long for it, one method does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from point_peft import PeftConfig, PointPeftModel
from tests.adapting import (
    METHOD_NAMES,
    ONE_BLOCK,
    Config,
    adapt,
    add,
    assert_same_gradients,
    distance,
    gradients,
    in_groups,
    loss_of,
    one_graph,
    plain,
    run,
    without_search,
)
from tests.methods import config
from tests.zoo import TinyBackbone, clouds

SIMPLE = without_search(ONE_BLOCK)
NAMES = ("default", "other")


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


def of_batch(size: int, seed: int = 5) -> Tensor:
    """Clouds of which the compiler is told that there may be any number."""
    points: Tensor = clouds(size, seed)[0].clone()
    torch._dynamo.mark_dynamic(points, 0)
    return points


def adapted(how: str | Config, other: str | Config, backbone: TinyBackbone = SIMPLE) -> PointPeftModel:
    """Two adapters with other values, both seen in eager mode."""
    model = adapt(backbone, how)
    add(model, backbone, other, "other")
    outputs = [plain(backbone)]
    for name in NAMES:
        model.set_adapter(name)
        outputs.append(run(model, backbone))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert distance(outputs[first], outputs[second]) > 1e-3
    return model


@in_groups(METHOD_NAMES)
def test_one_graph_for_all_adapters_of_a_configuration(methods):
    """With every tensor of every method: its gradient is that of eager code, and not zero."""
    how = PeftConfig(tuners=[config(method) for method in methods])
    model, graphs = adapted(how, how), CompileCounterWithBackend("eager")
    compiled = one_graph(model, graphs, dynamic=False)
    for name in (*NAMES, NAMES[0]):
        model.set_adapter(name)
        expected, output = (step(forward, model, *clouds(3, 5)) for forward in (model, compiled))
        assert distance(output[0], expected[0]) < 1e-5
        trained = [f"adapters.{name}.{key}" for key, _ in model.adapters.get_submodule(name).named_parameters()]
        assert sorted(expected[1]) == sorted(trained)
        assert_same_gradients(output[1], expected[1])
    assert graphs.frame_count == 1


def step(forward: Callable[[Tensor], Tensor], model: nn.Module, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients."""
    model.zero_grad()
    output = forward(points)
    loss_of(output).backward()
    return output.detach(), gradients(model)


def test_a_swap_to_another_method_and_back():
    """With the search for farthest points and the encoder; the graphs differ already in the number of tokens."""
    model, graphs = adapted("VPT", "LORA", ONE_BLOCK), CompileCounterWithBackend("eager")
    compiled = one_graph(model, graphs)
    outputs = []
    for name in (*NAMES, NAMES[0]):
        model.set_adapter(name)
        outputs.append(run(compiled, ONE_BLOCK))
        assert torch.allclose(outputs[-1], run(model, ONE_BLOCK), atol=1e-5)
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert graphs.frame_count == 2


# Of torch's own compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_generated_code_gives_the_same():
    model, graphs = adapted("LORA", "LORA"), CompileCounterWithBackend("inductor")
    compiled = one_graph(model, graphs)
    with torch.no_grad():
        for name, batch in (("default", 3), ("other", 5), ("default", 7)):
            model.set_adapter(name)
            assert distance(compiled(of_batch(batch)), model(of_batch(batch))) < 1e-5
    assert graphs.frame_count == 1


def test_values_that_are_loaded_into_a_compiled_model() -> None:
    """Those of an adapter for another base too, whose prefix tokens the second pass then has to use."""
    model, other = adapt(SIMPLE, "POINT_PEFT"), adapt(SIMPLE, "POINT_PEFT", seed=5)
    with torch.no_grad():
        for parameter in other.base_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    wanted, compiled = run(other, SIMPLE), torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(*SIMPLE.inputs(2, 5))
        model.load_state_dict(other.state_dict())
        assert distance(SIMPLE.select(compiled(*SIMPLE.inputs(2, 5))), wanted) < 1e-5
