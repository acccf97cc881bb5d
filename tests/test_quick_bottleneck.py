"""Tokens with what a bottleneck adapter makes of them added: x + scale A(x)."""

from __future__ import annotations

import pytest
import torch

from point_peft.parts.bottleneck import Bottleneck, add_adapted, quick_bottleneck


def adapter(rate: float = 0.0, *, identity: bool = False) -> Bottleneck:
    torch.manual_seed(0)
    made = quick_bottleneck(6, 3, rate, identity=identity)
    if not identity:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("shape", [(2, 5, 6), (7, 6), (0, 6)], ids=["dense", "packed", "none"])
def test_it_adds_the_equation(shape: tuple[int, ...]) -> None:
    made, x = adapter().double().eval(), torch.randn(shape, dtype=torch.float64)
    before = x @ made.down.weight.T + made.down.bias
    middle = before * torch.sigmoid(1.702 * before)
    expected = x + 0.7 * (middle @ made.up.weight.T + made.up.bias)
    torch.testing.assert_close(add_adapted(x, made, 0.7), expected)


def test_a_fresh_one_leaves_the_tokens_as_they_are() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(add_adapted(x, adapter(0.5, identity=True).train(), 0.7), x)


def test_in_autocast_tokens_keep_their_type() -> None:
    made, x = adapter().eval(), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = add_adapted(x, made, 0.7)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, add_adapted(x, made, 0.7), atol=0.05, rtol=0.05)
    assert not torch.equal(low, add_adapted(x, made, 0.7))
