"""The token selection of PointLoRA: which tokens of further groupings join the sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from point_peft import geometry
from point_peft.anatomy.description import Stage
from point_peft.parts.base import Call
from point_peft.parts.second_grouping import GroupingPart, farthest_points


@dataclass(frozen=True)
class Selection:
    """One grouping, of whose tokens the best `num_selected` are taken."""

    num_groups: int
    group_size: int
    num_selected: int
    loss_weight: float


class MaskPredictor(nn.Module):
    """Scores (b, g) of the tokens (b, g, c), whose sigmoid is a mask."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 2)
        self.fc2 = nn.Linear(channels // 2, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.fc2(nn.functional.relu(self.fc1(tokens)))
        return scores[:, :, 0]


class SelectedTokens(GroupingPart):
    """The tokens of highest score of every grouping, best first."""

    prefix = "point_lora"

    def __init__(self, stage: Stage, number: int, selections: Sequence[Selection]) -> None:
        super().__init__(stage, number)
        self.selections = tuple(selections)
        self.mask_predictor = MaskPredictor(stage.width)

    def make(self, call: Call, points: Tensor) -> tuple[Tensor, Tensor]:
        # The first of many farthest points are the farthest of fewer.
        farthest = farthest_points(points, max(one.num_groups for one in self.selections))
        tokens, centres, losses = [], [], []
        for one in self.selections:
            middles = farthest[:, : one.num_groups]
            grouped = self.tokens(call.forward, points, middles, one.group_size)
            scores = self.mask_predictor(grouped)
            chosen = scores.topk(min(one.num_selected, scores.shape[1]), dim=1).indices
            kept = geometry.gather(grouped, chosen)
            tokens.append(kept * straight_through(scores.gather(1, chosen))[:, :, None].to(kept.dtype))
            centres.append(geometry.gather(middles, chosen))
            losses.append(one.loss_weight * negative_entropy(scores))
        if self.training:
            call.forward.add_loss(torch.stack(losses).sum())
        return torch.cat(tokens, dim=1), torch.cat(centres, dim=1)


def straight_through(scores: Tensor) -> Tensor:
    """p / p.detach() for p = sigmoid(scores): one, with the gradient of log p, however small p is."""
    log_p = nn.functional.logsigmoid(scores)
    return (log_p - log_p.detach()).exp()


def negative_entropy(scores: Tensor) -> Tensor:
    """The mean of p log p + (1 - p) log(1 - p) over all scores, p = sigmoid(score)."""
    p = scores.sigmoid()
    return (p * nn.functional.logsigmoid(scores) + (1 - p) * nn.functional.logsigmoid(-scores)).mean()
