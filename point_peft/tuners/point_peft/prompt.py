"""The point-prior prompt of one block."""

import torch
from torch import Tensor, nn

from point_peft.parts.bottleneck import Bottleneck


class Prompt(nn.Module):
    """p_l = dropout(E_l) + CPA_l(P), with CPA_l(P) = P + A_8(P); without a prior P, dropout(E_l) alone."""

    def __init__(self, count: int, channels: int, dropout: float, prior_adapter: Bottleneck | None) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(count, channels))
        nn.init.trunc_normal_(self.embeddings, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.prior_adapter = prior_adapter

    def forward(self, batch: int, P: Tensor | None) -> Tensor:
        """Prompts (b, p, c); the prior P (b, m, c) enhances the first m of them."""
        prompts: Tensor = self.dropout(self.embeddings).expand(batch, -1, -1)
        if P is None or self.prior_adapter is None:
            return prompts
        P = P.to(prompts.dtype)
        enhanced = P + self.prior_adapter(P)
        return prompts + nn.functional.pad(enhanced, (0, 0, 0, prompts.shape[1] - enhanced.shape[1]))
