"""Guarantees of every method when it is trained by several processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.multiprocessing.spawn import start_processes

from point_peft import AdapterError, get_peft_model
from point_peft.adapting.adapter import get_adapter
from tests.adapting import (
    PAIRS,
    adapt,
    assert_same_values,
    banks,
    build_bank,
    distance,
    gradients,
    loss_of,
    rescramble,
    values,
)
from tests.hanging import until
from tests.methods import config
from tests.zoo import TinyBackbone

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
SPREAD = list(
    {method: (method, backbone) for method, backbone in PAIRS if backbone.name in ("point_mae", "compact")}.values()
)
"""Every method in every form, each on one backbone, as starting and two training steps are alike on all."""


def _two_processes(folder: Path) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """(method, backbone) -> what each of two processes found, see `_on_rank`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What both of them would import, the second for DistributedDataParallel: 6 s of processor time.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    context = start_processes(_on_rank, args=(port, str(folder)), nprocs=2, join=False, start_method="forkserver")
    assert context is not None
    try:
        until(lambda: context.join(timeout=5))
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _on_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    process = PartialState(cpu=True)
    torch.set_num_threads(1)  # which accelerate has set otherwise; sums in one order, as in tests/conftest.py
    assert process.num_processes == 2 and process.process_index == rank
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for method, backbone in SPREAD:
        torch.manual_seed(0)
        model = get_peft_model(backbone.build(), config(method))
        adapter = get_adapter(model, "default")
        if banks(adapter):
            build_bank(model, backbone, "default", slice(rank, None, 2))
        bank = {key: tensor.clone() for state in banks(adapter) for key, tensor in state.named_buffers()}
        rescramble(model)
        spread = nn.parallel.DistributedDataParallel(model.eval())
        loss_of(backbone.select(spread(*backbone.inputs(3, 40 + rank)))).backward()
        averaged = gradients(adapter)
        optimizer = torch.optim.AdamW(spread.parameters(), lr=0.01)
        spread.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(backbone.select(spread(*backbone.inputs(3, 50 + rank)))).backward()
            optimizer.step()
        found[method, backbone.name] = {
            "bank": bank,
            "gradients": averaged,
            "trained": {key: parameter.detach() for key, parameter in adapter.named_parameters()},
            "base": values(model.base_model),
        }
    torch.save(found, Path(folder) / f"{rank}.pt")
    process.destroy_process_group()


@needs_processes
def test_two_processes_train_and_build_banks_as_one(tmp_path: Path) -> None:
    """One test for all methods, because starting the processes takes most of its time."""
    ranks = _two_processes(tmp_path)
    for method, backbone in SPREAD:
        found = [rank[method, backbone.name] for rank in ranks]
        _check_training(method, backbone, *found)
        _check_bank(method, backbone, *found)


def _check_training(method: str, backbone: TinyBackbone, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    what = f"{method} on {backbone.name}"
    assert_same_values(first["gradients"], second["gradients"], what)
    assert_same_values(first["trained"], second["trained"], what)
    for found in (first, second):
        assert_same_values(found["base"], backbone.build().state_dict(), what)
    model = adapt(backbone, method, fresh=True)
    rescramble(model)
    losses = [loss_of(backbone.select(model(*backbone.inputs(3, 40 + rank)))) for rank in range(2)]
    torch.stack(losses).mean().backward()
    wanted = gradients(get_adapter(model, "default"))
    assert list(first["gradients"]) == list(wanted), what
    for key, gradient in wanted.items():
        assert distance(first["gradients"][key], gradient) < 1e-5, f"{what}: {key}"


def _check_bank(method: str, backbone: TinyBackbone, *ranks: Mapping[str, Any]) -> None:
    model = adapt(backbone, method, fresh=True)
    adapter = get_adapter(model, "default")
    if not banks(adapter):
        with pytest.raises(AdapterError, match="has no memory bank"):
            build_bank(model, backbone, "default")
        return
    for flag in (False, True):
        model.train(flag)
        with nullcontext() if flag else torch.no_grad():
            build_bank(model, backbone, "default")
        alone = {key: tensor for state in banks(adapter) for key, tensor in state.named_buffers()}
        assert len(next(iter(alone.values()))) == 16
        for found in ranks:
            assert_same_values(found["bank"], alone, f"{method} on {backbone.name}")
