"""docs/several_gpus.md: its two scripts in two processes, without a GPU, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from point_peft import AdapterError, LoraConfig, PointPEFTConfig, PointPeftError, PointPeftModel, get_peft_model
from point_peft.backbones import default_backbone
from point_peft.training import Recipe, fit
from point_peft.training.plan import check_shares
from tests.forks import Server

TEXT = (Path(__file__).parents[1] / "docs" / "several_gpus.md").read_text("utf-8")
SCRIPTS = {block.split()[1]: block for block in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)}


def scripts(rank: str, port: str, folder: str) -> Callable[[], None]:
    """Run both as torchrun does, in one of two processes, and leave what is printed."""

    def work() -> None:
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for script in SCRIPTS:
                runpy.run_path(script, run_name="__main__")
        Path(f"printed by {rank}").write_text(printed.getvalue())

    return work


class Idle(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 5), nn.Linear(3, 5)

    def forward(self, clouds: Tensor) -> Tensor:
        scores: Tensor = self.used(clouds).amax(dim=1)
        return scores


def wrapping(folder: str) -> Callable[[], None]:
    """Leave what is said where a model is wrapped too early, is saved in shards, and where DDP waits."""

    def work() -> None:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=0, world_size=1)
        wrapped = nn.parallel.DistributedDataParallel(default_backbone(cls_dim=3))
        with pytest.raises(AdapterError) as early:
            get_peft_model(wrapped, LoraConfig())
        config = LoraConfig(target_modules=["used"], modules_to_save=["idle"])
        waiting = nn.parallel.DistributedDataParallel(get_peft_model(Idle(), config))
        with pytest.raises(RuntimeError) as late:
            for _ in range(2):
                waiting(torch.rand(2, 8, 3)).sum().backward()
        sharded = get_peft_model(default_backbone(cls_dim=3), LoraConfig())
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(AdapterError) as spread:
            sharded.save_pretrained(Path(folder, "sharded"))
        assert not Path(folder, "sharded").exists()
        Path(folder, "said").write_text(json.dumps([str(error.value) for error in (early, spread, late)]))

    return work


def test_the_scripts_run_in_two_processes(tmp_path: Path, server: Server) -> None:
    for name, script in SCRIPTS.items():
        (tmp_path / name).write_text(script, "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [server.start(scripts, rank, port, tmp_path) for rank in range(2)]
    assert [server.wait(child) for child in children] == [0, 0]

    shown = TEXT.split("torchrun --nproc_per_node 2 train.py\n")[1].split("\n```")[0]
    assert (tmp_path / "printed by 0").read_text() == f"{shown}\n" and not (tmp_path / "printed by 1").read_text()
    for folder in ("adapter", "sharded"):
        torch.manual_seed(0)
        model = PointPeftModel.from_pretrained(default_backbone(cls_dim=3), tmp_path / folder)
        trained = [p for name, p in model.adapters.named_parameters() if "lora_B" in name]
        assert trained and all(bool(p.any()) for p in trained)


def test_the_table_says_what_is_said(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.wait(server.start(wrapping, tmp_path)) == 0
    early, spread, late = json.loads((tmp_path / "said").read_text())
    model = get_peft_model(default_backbone(cls_dim=3), PointPEFTConfig(memory_bank=True))
    clouds = torch.utils.data.TensorDataset(torch.rand(4, 256, 3), torch.arange(4) % 3)
    with pytest.raises(PointPeftError) as few:
        check_shares(3, batch_size=1, accumulate=1, ranks=2)
    with pytest.raises(PointPeftError) as half:
        fit(model, clouds, recipe=Recipe(mixed_precision="fp16"), out=tmp_path / "run", classes="abc")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AdapterError) as alone:
        model.build_memory_bank([torch.rand(4, 256, 3)])
    said = [early, *(str(error.value) for error in (alone, few, half)), spread, late]
    words = re.findall(r"^\| `(.+?)` \| ", TEXT.split("## What can go wrong")[1], flags=re.MULTILINE)
    for shown, message in zip(words, said, strict=True):
        assert shown in message
