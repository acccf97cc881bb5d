"""The bottleneck adapter with its gradient by hand: the numbers of the plain one, and what its dropout keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from point_peft.parts.bottleneck import Bottleneck
from point_peft.parts.quick_bottleneck import add_adapted, dropout, quick_bottleneck


def adapter(rate: float = 0.0, *, identity: bool = False, channels: int = 6, width: int = 3) -> Bottleneck:
    torch.manual_seed(0)
    made = quick_bottleneck(channels, width, rate, identity=identity).double()
    if not identity:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 5, 6), (7, 6), (0, 6)], ids=["dense", "packed", "none"])
def test_by_hand_it_is_what_it_says_with_its_gradient(shape: tuple[int, ...]) -> None:
    made, x = adapter().eval(), tokens(*shape)
    expected, found = x + 0.7 * made(x), add_adapted(x, made, 0.7)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(add_adapted(x, made, 0.7), expected)
    out = torch.randn_like(expected)
    trained = (x, *made.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, trained, out), torch.autograd.grad(expected, trained, out))


def test_the_gradient_goes_through_what_dropout_kept() -> None:
    made, x = adapter(0.4).train(), tokens(5, 6)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(3)
        return add_adapted(x, made, 0.7)

    assert not torch.allclose(run(x), x + 0.7 * made.eval()(x))
    made.train()
    assert torch.autograd.gradcheck(run, (x, *made.parameters()))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_everywhere_and_the_mean(rate: float) -> None:
    made = adapter(rate, width=8).train()
    kept, gain = dropout(made, 50_001)
    if kept is None:
        assert (rate, gain) == (0.0, 1.0)
        return
    assert kept.shape == (50_001, 8)
    assert gain == pytest.approx(1 / (1 - rate))
    torch.testing.assert_close(kept.double().mean(dim=0), torch.full((8,), 1 - rate).double(), atol=0.01, rtol=0)
    both = (kept[1:] & kept[:-1]).double().mean()
    assert float(both) == pytest.approx((1 - rate) ** 2, abs=0.01), "what follows depends on what came before"
    again, _ = dropout(made, 50_001)
    assert again is not None and not torch.equal(again, kept)
    torch.manual_seed(7)
    first, _ = dropout(made, 11)
    torch.manual_seed(7)
    second, _ = dropout(made, 11)
    assert first is not None and second is not None and torch.equal(first, second)
    made.dropout.eval()
    assert dropout(made, 3) == (None, 1.0)
    made.eval().dropout.train()  # as for Monte Carlo dropout
    assert dropout(made, 3)[0] is not None
    assert dropout(made.eval(), 3) == (None, 1.0)


def test_a_rate_of_almost_one_keeps_almost_nothing() -> None:
    kept, _ = dropout(adapter(1 - 1e-6).train(), 1000)
    assert kept is not None and float(kept.double().mean()) < 0.01


def test_a_fresh_one_leaves_the_tokens_as_they_are() -> None:
    x = tokens(4, 6)
    assert torch.equal(add_adapted(x, adapter(0.5, identity=True).train(), 0.7), x)


def test_in_autocast_it_is_worked_out_as_any_other_layer() -> None:
    made, x = adapter().float().eval(), tokens(4, 6).detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = add_adapted(x, made, 0.7), x.add(made(x).to(x.dtype), alpha=0.7)
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, add_adapted(x, made, 0.7))


def test_who_listens_to_its_layers_hears_them() -> None:
    made, x, heard = adapter().eval(), tokens(4, 6), []
    expected = add_adapted(x, made, 0.7)
    handle = made.down.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    torch.testing.assert_close(add_adapted(x, made, 0.7), expected)
    assert heard == [(4, 3)]
    handle.remove()
    handle = made.up.register_full_backward_hook(lambda module, *gradients: heard.append(module.out_features))
    add_adapted(x, made, 0.7).sum().backward()
    assert heard == [(4, 3), 6]
    handle.remove()
    assert torch.equal(add_adapted(x, made, 0.7), expected)
    assert len(heard) == 2
