"""Graphs of tokens in the space of their features, beside a loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from point_peft.parts.feature_graph import EdgeConv, EdgeNetwork


def test_the_graph_against_a_loop_over_tokens():
    network, tokens = with_random_norms(EdgeNetwork(6, (5, 7), 8, 4)), torch.randn(2, 9, 6)
    with torch.no_grad():
        found = network(tokens, recomputing=False)
        for cloud, graph in zip(tokens, found, strict=True):
            assert torch.allclose(naive_graph(network, cloud), graph, atol=1e-5)


def naive_graph(network: EdgeNetwork, cloud: Tensor) -> Tensor:
    levels, given = [], cloud
    for convolution in network.convolutions:
        assert isinstance(convolution, EdgeConv)
        rows = []
        for own in given:
            near = (given - own).norm(dim=1).topk(network.neighbours, largest=False).indices
            edges = [convolution.edge(torch.cat([given[b] - own, own])) for b in near]
            rows.append(nn.functional.leaky_relu(convolution.norm(torch.stack(edges)), 0.2).amax(dim=0))
        given = torch.stack(rows)
        levels.append(given)
    return nn.functional.leaky_relu(network.norm(network.joined(torch.cat(levels, dim=1))), 0.2)


def with_random_norms(network: EdgeNetwork) -> EdgeNetwork:
    """In eval mode; a negative weight of a norm turns the order of the neighbours round."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d):
                for tensor in (module.weight, module.bias, module.get_buffer("running_mean")):
                    tensor.normal_()
    return network.eval()
