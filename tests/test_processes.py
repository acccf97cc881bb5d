"""Guarantees of every method when it is trained by several processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.optim.swa_utils import AveragedModel

from point_peft import AdapterError, PeftConfig, PointPeftModel, TunerConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from tests.adapting import (
    METHOD_NAMES,
    PAIRS,
    adapt,
    assert_same_values,
    banks,
    build_bank,
    complete,
    distance,
    few_groups,
    gradients,
    loss_of,
    rescramble,
    run,
    stated,
    values,
)
from tests.hanging import until
from tests.methods import config
from tests.training_processes import check_trained, interrupt_one, train_all
from tests.zoo import BACKBONES, TinyBackbone

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available")
SPREAD = list(
    {method: (method, backbone) for method, backbone in PAIRS if backbone.name in ("point_mae", "compact")}.values()
)
"""Every method in every form, each on one backbone, as starting and two training steps are alike on all."""
TOGETHER = few_groups(SPREAD, most=9)
"""The same in few adapters, for what is compared tensor by tensor."""
GROUPS = [METHOD_NAMES[first::2] for first in range(2)]
"""All methods, in two adapters."""


def _two_processes(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Methods on a backbone -> what each of two processes found, see `_on_rank`."""
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
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, dict[str, Any]] = {}
    for method, backbone in SPREAD:
        model = _begun(config(method), backbone)
        if bank := banks(get_adapter(model, "default")):
            build_bank(model, backbone, "default", slice(rank, None, 2))
            found[_what(method, backbone)] = {
                "bank": {key: tensor for state in bank for key, tensor in state.named_buffers()},
                "around a bank": _built_within(method, backbone, rank, mesh),
            }
    for methods, backbone in TOGETHER:
        model = _begun(stated(methods, backbone), backbone)
        adapter = get_adapter(model, "default")
        if banks(adapter):
            build_bank(model, backbone, "default", slice(rank, None, 2))
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
        found[_what(methods, backbone)] = {
            "gradients": averaged,
            "trained": {key: parameter.detach() for key, parameter in adapter.named_parameters()},
            "base": values(model.base_model),
        }
    for group in GROUPS:
        assert _sharded(group, rank, mesh) < 1e-5
        assert _synchronised(group, rank) < 1e-4, group
    train_all(Path(folder), _sharded_to_train)
    torch.save(found, Path(folder) / f"{rank}.pt")
    process.destroy_process_group()


def _what(methods: str | tuple[str, ...], backbone: TinyBackbone) -> str:
    return f"{methods} on {backbone.name}"


def _begun(how: TunerConfig | PeftConfig, backbone: TinyBackbone) -> PointPeftModel:
    torch.manual_seed(0)
    return get_peft_model(backbone.build(), how).eval()


def _shard(model: PointPeftModel, mesh: DeviceMesh) -> None:
    """Shard each block and the rest, as one does; the second pass calls a block while it is being called."""
    assert model.anatomy is not None
    for block in model.anatomy.blocks:
        fully_shard(model.base_model.get_submodule(block.path), mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def _sharded(methods: Sequence[str], rank: int, mesh: DeviceMesh) -> float:
    """How far the gradients of a sharded model are from those of one that was given all clouds."""
    backbone, how = BACKBONES["point_mae"], PeftConfig(tuners=tuple(map(config, methods)))
    found: list[dict[str, Tensor]] = []
    for shard in (False, True):
        model = _begun(how, backbone)
        adapter = get_adapter(model, "default")
        if banks(adapter):
            build_bank(model, backbone, "default", slice(rank, None, 2))
        rescramble(model)
        if shard:
            _shard(model, mesh)
        losses = [loss_of(backbone.select(model(*backbone.inputs(3, 40 + i)))) for i in ([rank] if shard else [0, 1])]
        torch.stack(losses).mean().backward()
        found.append(gradients(adapter))
    alone, shared = found
    assert list(alone) == list(shared)
    whole = {name: share.full_tensor() for name, share in shared.items() if isinstance(share, DTensor)}
    return max(distance(whole[name], gradient) for name, gradient in alone.items())


def _sharded_to_train(model: PointPeftModel) -> None:
    """Shard a model over both processes and let methods that are called directly gather it as well."""
    _shard(model, init_device_mesh("cpu", (2,)))
    register_fsdp_forward_method(model, "build_memory_bank")


def _synchronised(methods: Sequence[str], rank: int) -> float:
    """How far converted norms, in training, are from those of one process that was given all clouds."""
    backbone, how = BACKBONES["point_mae"], PeftConfig(tuners=tuple(map(config, methods)))
    whole, shared = (_begun(how, backbone) for _ in range(2))
    for model in (whole, shared):
        complete(model, backbone, "default", 0, fresh=False)
        adapter = get_adapter(model, "default")
        own = [part for _, part in adapter.all_parts() if part.own_module is None]
        # Modules of the base, such as heads, that have norms are trained on GPUs alone once torch has converted them.
        for part in (*own, *adapter.shared_states()):
            for module in part.modules():
                module.training = isinstance(module, nn.BatchNorm1d)  # and nothing that is random
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(shared)
    (points,), before, mine = backbone.inputs(4, 40), values(whole.base_model), slice(2 * rank, 2 * rank + 2)
    far = distance(shared(points[mine]).detach(), whole(points).detach()[mine])
    assert_same_values(values(shared.base_model), before, "frozen statistics")
    statistics = dict(get_adapter(shared, "default").named_buffers())
    pairs = [(statistics[name], tensor) for name, tensor in get_adapter(whole, "default").named_buffers()]
    return max([far, *(distance(one.float(), other.float()) for one, other in pairs if len(one.shape))])


def _built_within(method: str, backbone: TinyBackbone, rank: int, mesh: DeviceMesh) -> list[Tensor]:
    """The banks of a model wrapped before, of its average, and of a sharded model; and the outputs of the three."""
    model, sharded = (_begun(config(method), backbone) for _ in range(2))
    for held in (model, sharded):
        rescramble(held)
    averaged, spread = AveragedModel(model), nn.parallel.DistributedDataParallel(model)
    found: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the memory bank is empty")
        spread(*backbone.inputs(2, 5))  # with gradients: without them, no buffers are sent
    _shard(sharded, mesh)
    register_fsdp_forward_method(sharded, "build_memory_bank")
    for held in (model, sharded):
        # Of one class more in one process than in the other, and fewer rows than clouds.
        batches = [(backbone.inputs(4, seed), [0, 1, 2 + rank, 0]) for seed in (21, 22, 23, 24)[rank::2]]
        held.build_memory_bank(batches, to_inputs=lambda b: b[0], to_labels=lambda b: b[1], size=12)
    if rank == 1:  # which the buffers of the first process put right
        for state in banks(get_adapter(model, "default")):
            for tensor in state.buffers():
                tensor.zero_()
    found.append(backbone.select(spread(*backbone.inputs(2, 5))).detach())
    averaged.update_parameters(model)
    found += [run(averaged, backbone), run(sharded, backbone)]
    for whole in (model, averaged.module, sharded):
        assert isinstance(whole, PointPeftModel)
        tensors = [tensor for state in banks(get_adapter(whole, "default")) for tensor in state.buffers()]
        found.append(torch.cat([tensor.float().reshape(-1, tensor.shape[-1]) for tensor in tensors]))
    return found


@needs_processes
def test_two_processes_train_and_build_banks_as_one(tmp_path: Path) -> None:
    """One test for all methods, because starting the processes takes most of its time."""
    interrupt_one(tmp_path)
    ranks = _two_processes(tmp_path)
    check_trained(tmp_path)
    for methods, backbone in TOGETHER:
        _check_training(methods, backbone, *(rank[_what(methods, backbone)] for rank in ranks))
    for method, backbone in SPREAD:
        _check_bank(method, backbone, *(rank.get(_what(method, backbone)) for rank in ranks))


def _check_around(*ranks: Sequence[Tensor]) -> None:
    for found in ranks:
        for outputs_or_bank, rows in ((found[:3], 2), (found[3:], 12)):
            for tensor in outputs_or_bank:
                assert torch.equal(tensor, ranks[0][0 if rows == 2 else 3]) and len(tensor) >= rows


def _check_training(
    methods: tuple[str, ...], backbone: TinyBackbone, first: Mapping[str, Any], second: Mapping[str, Any]
) -> None:
    what = _what(methods, backbone)
    assert_same_values(first["gradients"], second["gradients"], what)
    assert_same_values(first["trained"], second["trained"], what)
    for found in (first, second):
        assert_same_values(found["base"], backbone.build().state_dict(), what)
    model = adapt(backbone, methods, fresh=True)
    rescramble(model)
    losses = [loss_of(backbone.select(model(*backbone.inputs(3, 40 + rank)))) for rank in range(2)]
    torch.stack(losses).mean().backward()
    wanted = gradients(get_adapter(model, "default"))
    assert list(first["gradients"]) == list(wanted), what
    for key, gradient in wanted.items():
        assert distance(first["gradients"][key], gradient) < 1e-5, f"{what}: {key}"


def _check_bank(method: str, backbone: TinyBackbone, *ranks: Mapping[str, Any] | None) -> None:
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
            assert found is not None
            assert_same_values(found["bank"], alone, _what(method, backbone))
    _check_around(*(found["around a bank"] for found in ranks if found is not None))
