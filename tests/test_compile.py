"""`torch.compile(fullgraph=True)` sees the adapters as eager code does, and follows `set_adapter`."""

from __future__ import annotations

import torch

from examples.backbones import BACKBONES, clouds
from point_peft import LoraConfig, PointPEFTConfig, get_peft_model


def test_point_peft_with_its_second_pass_and_a_swap():
    model, (points,) = get_peft_model(BACKBONES["point_bert"].build(), PointPEFTConfig()), clouds(3, 0)
    model.build_memory_bank([clouds(12, 1)[0]])
    model.add_adapter("other", LoraConfig(r=2))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = []
    with torch.no_grad():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            outputs.append(compiled(points))
            assert torch.allclose(outputs[-1], model(points), atol=1e-5)
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)
