"""The adapter beside the MLP, and its projections: one for all tokens, or one for each group of them."""

import torch
from einops import rearrange
from torch import Tensor, nn

from point_peft.tuners.point_tpa.groups import Groups

# The softmax over banks is of values over this, as published.
TEMPERATURE = 4.0


class Projection(nn.Linear):
    """W u + b, of whatever group a token is."""

    def __init__(self, channels: int, out: int, *, zero: bool) -> None:
        super().__init__(channels, out)
        nn.init.zeros_(self.bias)
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.trunc_normal_(self.weight, std=0.02)

    def project(self, u: Tensor, groups: Groups | None) -> Tensor:
        """Tokens (n, c) -> (n, m)."""
        projected: Tensor = self(u)
        return projected


class DynamicProjection(nn.Module):
    """(sum_k a_jk W_k) u + sum_k a_jk b_k, a_j = softmax((V2 relu(V1 z_j) + c2) / 4), z_j the mean u of group j."""

    def __init__(self, channels: int, out: int, banks: int, *, zero: bool) -> None:
        super().__init__()
        hidden = max(channels // 4 + 1, 16)
        self.hidden = nn.Linear(channels, hidden, bias=False)
        self.mixing = nn.Linear(hidden, banks)
        self.weight = nn.Parameter(torch.zeros(banks, out, channels))
        self.bias = nn.Parameter(torch.zeros(banks, out))
        for layer in (self.hidden, self.mixing):
            nn.init.normal_(layer.weight, std=(2 / len(layer.weight)) ** 0.5)
        nn.init.zeros_(self.mixing.bias)
        if not zero:
            bound = (6 / channels) ** 0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def project(self, u: Tensor, groups: Groups | None) -> Tensor:
        """Tokens (n, c) -> (n, m)."""
        assert groups is not None
        # All banks in one product, so that no group is filled up to the length of another.
        all_banks = nn.functional.linear(u, rearrange(self.weight, "k m c -> (k m) c"), self.bias.flatten())
        mixture = self.coefficients(u, groups).to(all_banks.dtype)
        each = rearrange(all_banks, "n (k m) -> n k m", k=len(self.weight))
        return torch.einsum("n k, n k m -> n m", mixture[groups.of], each)

    def coefficients(self, u: Tensor, groups: Groups) -> Tensor:
        """The shares a (j, k) of the banks in each group of tokens u (n, c); at least in single precision."""
        single = torch.promote_types(u.dtype, torch.float32)
        z = groups.mean(u.to(single)).to(self.hidden.weight.dtype)
        scores: Tensor = self.mixing(nn.functional.relu(self.hidden(z)))
        return (scores.to(single) / TEMPERATURE).softmax(dim=1)


class ParameterAdapter(nn.Module):
    """W_up relu(D(LN x)) + b_up, where D and, if asked for, W_up are dynamic."""

    def __init__(self, channels: int, width: int, banks: int | None, *, dynamic_up: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.down = _projection(channels, width, banks, zero=False)
        self.up = _projection(width, channels, banks if dynamic_up else None, zero=True)

    def forward(self, tokens: Tensor, groups: Groups | None) -> Tensor:
        """The change (n, c) of tokens (n, c); None where all projections are the same for all groups."""
        narrow = nn.functional.relu(self.down.project(self.norm(tokens), groups))
        return self.up.project(narrow, groups)


def _projection(channels: int, out: int, banks: int | None, *, zero: bool) -> Projection | DynamicProjection:
    """A dynamic projection of that many banks, or one for all groups."""
    if banks is None:
        return Projection(channels, out, zero=zero)
    return DynamicProjection(channels, out, banks, zero=zero)
