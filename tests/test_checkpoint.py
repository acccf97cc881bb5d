"""Reading public checkpoints: containers, prefixes, reports, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from point_peft.backbones import (
    HierarchicalPointTransformer,
    PointTransformer,
    PointTransformerPartSeg,
    checkpoint,
    default_backbone,
    load_checkpoint,
)
from point_peft.errors import PointPeftError

SIZES: dict[str, Any] = {
    "trans_dim": 24, "depth": 1, "num_heads": 2, "num_group": 8, "group_size": 4, "encoder_dims": 24,
}  # fmt: skip
PRETRAINED_NOT = ("cls_token", "cls_pos", "cls_head_finetune.")


def model(seed: int, cls_dim: int = 5, **options: Any) -> PointTransformer:
    torch.manual_seed(seed)
    return PointTransformer(**{**SIZES, "cls_dim": cls_dim, **options})


def without(tensors: dict[str, Tensor], start: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def snapshot(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], names: Any) -> None:
    assert [name for name in names if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("container", [None, "base_model", "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.", "module.base_model."])
def test_a_whole_model_comes_back(tmp_path: Path, container: str | None, wrapper: str) -> None:
    source, target = snapshot(model(1)), model(2)
    content = prefixed(source, wrapper)
    torch.save({container: content, "epoch": 3, "metrics": {"acc": 0.9}} if container else content, tmp_path / "a.pth")
    report = load_checkpoint(target, tmp_path / "a.pth")
    assert_equal(target.state_dict(), source, source)
    assert report.loaded == tuple(sorted(source)) and report.missing == () and report.unexpected == ()
    assert str(report) == f"loaded {len(source)} of {len(source)} tensors"


def test_a_safetensors_file_in_half_precision_is_widened(tmp_path: Path) -> None:
    source, target = snapshot(model(1)), model(2)
    save_file({name: tensor.half() for name, tensor in source.items()}, tmp_path / "a.safetensors")
    load_checkpoint(target, str(tmp_path / "a.safetensors"))
    assert target.norm.weight.dtype == torch.float32
    assert_equal(target.state_dict(), {name: tensor.half().to(tensor) for name, tensor in source.items()}, source)


@pytest.mark.parametrize("prefix", ["MAE_encoder.", "ACT_encoder.", "module.MAE_encoder."])
def test_a_pre_training_checkpoint_fills_the_backbone_only(tmp_path: Path, prefix: str) -> None:
    pretrained, target = without(snapshot(model(1)), PRETRAINED_NOT), model(2)
    before = snapshot(target)
    # Names outside of the encoder that would fit the model must not reach it.
    others = {"MAE_decoder.norm.weight": torch.zeros(24), "mask_token": torch.zeros(1), "norm.weight": torch.zeros(24)}
    torch.save({"base_model": {**prefixed(pretrained, prefix), **others}}, tmp_path / "a.pth")
    report = load_checkpoint(target, tmp_path / "a.pth")
    assert_equal(target.state_dict(), pretrained, pretrained)
    assert report.missing == tuple(sorted(name for name in before if name.startswith(PRETRAINED_NOT)))
    assert_equal(target.state_dict(), before, report.missing)
    assert report.unexpected == ("MAE_decoder.norm.weight", "mask_token", "norm.weight")
    assert "in the file but not in the model: MAE_decoder (1), mask_token (1), norm (1)" in str(report)
    assert "not in the file: cls_head_finetune.0.bias, " in str(report)


def test_what_is_unexpected_is_counted_by_its_names_within_wrappers(tmp_path: Path) -> None:
    others = {"MAE_decoder.norm.weight": torch.zeros(24), "mask_token": torch.zeros(1)}
    content = prefixed({**prefixed(snapshot(model(1)), "MAE_encoder."), **others}, "module.")
    torch.save({"base_model": content}, tmp_path / "a.pth")
    report = load_checkpoint(model(2), tmp_path / "a.pth")
    assert report.unexpected == ("module.MAE_decoder.norm.weight", "module.mask_token"), "as the file has them"
    assert "in the file but not in the model: MAE_decoder (1), mask_token (1)" in str(report)


def test_point_bert_reads_the_student_and_not_its_head(tmp_path: Path) -> None:
    source = snapshot(model(1, encoder_dims=16, head_norm=False))
    target = model(2, encoder_dims=16, head_norm=False)
    before = snapshot(target)
    content = {**prefixed(source, "transformer_q."), **prefixed(snapshot(model(3)), "transformer_k.")}
    torch.save({"base_model": content}, tmp_path / "a.pth")
    report = load_checkpoint(target, tmp_path / "a.pth")
    head = {name for name in source if name.startswith("cls_head_finetune")}
    assert set(report.missing) == head
    assert {f"transformer_q.{name}" for name in head} < set(report.unexpected)
    assert_equal(target.state_dict(), source, source.keys() - head)
    assert_equal(target.state_dict(), before, head)


def test_recon_s_contrast_branch_is_unexpected(tmp_path: Path) -> None:
    names = ("cls", "img", "text")
    source, target = without(snapshot(model(1, prefix_tokens=names)), ("cls_head",)), model(2, prefix_tokens=names)
    branch = {"blocks.blocks.0.attn_contrast.q.weight": torch.zeros(24, 24)}
    torch.save({"base_model": prefixed({**source, **branch}, "MAE_encoder.")}, tmp_path / "a.pth")
    report = load_checkpoint(target, tmp_path / "a.pth")
    assert report.loaded == tuple(sorted(source))
    assert report.unexpected == ("MAE_encoder.blocks.blocks.0.attn_contrast.q.weight",)


def test_a_head_for_other_classes_is_missing(tmp_path: Path) -> None:
    source, target = snapshot(model(1, cls_dim=7)), model(2, cls_dim=5)
    torch.save(source, tmp_path / "a.pth")
    report = load_checkpoint(target, tmp_path / "a.pth")
    assert report.missing == report.unexpected == ("cls_head_finetune.8.bias", "cls_head_finetune.8.weight")
    assert_equal(target.state_dict(), source, report.loaded)


def test_a_part_segmentation_model_reads_a_classification_backbone(tmp_path: Path) -> None:
    torch.save(prefixed(without(snapshot(model(1)), PRETRAINED_NOT), "MAE_encoder."), tmp_path / "a.pth")
    target = PointTransformerPartSeg(**SIZES, taps=(0,))
    report = load_checkpoint(target, tmp_path / "a.pth")
    assert {name.split(".")[0] for name in report.missing} == {
        "label_conv", "propagation_0", "convs1", "bns1", "convs2", "bns2", "convs3",
    }  # fmt: skip
    assert report.unexpected == ()


@pytest.mark.parametrize("trans_dim", [24, 96])
def test_a_checkpoint_of_pcp_mae_in_its_official_shapes(tmp_path: Path, trans_dim: int) -> None:
    """Both layers of its positional embedding are square."""
    sizes: dict[str, Any] = {"trans_dim": trans_dim, "encoder_dims": trans_dim, "pos_features": "sine"}
    source = without(snapshot(model(1, **sizes)), PRETRAINED_NOT)
    square = torch.randn(trans_dim, trans_dim)
    source |= {"pos_embed.0.weight": square, "pos_embed.2.weight": 2 * square, "pos_embed.0.bias": square[0]}
    content = {**prefixed(source, "MAE_encoder."), "MAE_encoder.mask_pos_token": torch.zeros(1, 1, trans_dim)}
    torch.save({"base_model": content}, tmp_path / "a.pth")
    target = model(2, **sizes)
    report = load_checkpoint(target, tmp_path / "a.pth")
    assert report.encoder_share == 1 and report.unexpected == ("MAE_encoder.mask_pos_token",)
    assert_equal(target.state_dict(), source, source)
    segmenting = PointTransformerPartSeg(**{**SIZES, **sizes}, taps=(0,)).eval()
    assert load_checkpoint(segmenting, tmp_path / "a.pth").encoder_share == 1
    assert segmenting(torch.rand(1, 32, 3), torch.eye(16)[:1]).isfinite().all()


@pytest.mark.parametrize(
    "make", [lambda: model(2), lambda: PointTransformerPartSeg(**SIZES, taps=(0,)), lambda: hierarchical()]
)
def test_an_encoder_filled_by_less_than_half_is_refused(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    """A head that is filled does not count; what is refused leaves the model as it was, `strict=False` takes it."""
    target = make()
    before = snapshot(target)
    full = {name: torch.randn(tensor.shape) for name, tensor in before.items()}
    encoder = sorted(name for name in full if name.startswith(("encoder.", "pos_embed.", "blocks.", "norm.", "h_enc")))
    count = len(encoder)
    few = {name: full[name] for name in full if name not in encoder[(count - 1) // 2 :]}
    torch.save({"model_state_dict": few}, tmp_path / "few.pth")
    share = rf"of the encoder {(count - 1) // 2} of {count}, 4\d%"
    with pytest.raises(PointPeftError, match=rf"fills less than half of the encoder, .* strict=False .*(?s:.*){share}"):
        load_checkpoint(target, tmp_path / "few.pth")
    assert_equal(target.state_dict(), before, before)
    report = load_checkpoint(target, tmp_path / "few.pth", strict=False)
    assert report.loaded == tuple(sorted(few)) and f"of the encoder {(count - 1) // 2} of {count}" in str(report)
    half = {name: full[name] for name in encoder[: (count + 1) // 2]}
    torch.save({"model_state_dict": half}, tmp_path / "half.pth")
    assert load_checkpoint(target, tmp_path / "half.pth").encoder_share >= 0.5


def hierarchical() -> HierarchicalPointTransformer:
    sizes: dict[str, Any] = {"num_groups": (8, 4), "group_sizes": (4, 4), "encoder_depths": (1, 1), "num_heads": 2}
    return HierarchicalPointTransformer(**sizes, encoder_dims=(12, 24), local_radius=(1.0, 2.0))


def test_of_a_model_of_others_all_tensors_count(tmp_path: Path) -> None:
    target = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2), "three": nn.Linear(2, 2)})
    torch.save({f"one.{name}": tensor for name, tensor in target["one"].state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(PointPeftError, match=r"of the encoder 2 of 6, 33%"):
        load_checkpoint(target, tmp_path / "a.pth")


def test_any_other_shape_is_refused_and_the_model_is_as_before(tmp_path: Path) -> None:
    target = model(2)
    before = snapshot(target)
    torch.save({**snapshot(model(1)), "pos_embed.2.weight": torch.zeros(24, 64)}, tmp_path / "a.pth")
    message = r"pos_embed.2.weight has shape \(24, 64\) in the file and \(24, 128\) in the model"
    with pytest.raises(PointPeftError, match=message):
        load_checkpoint(target, tmp_path / "a.pth")
    assert_equal(target.state_dict(), before, before)


def test_a_file_of_another_model_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    torch.save({"encoder.first_conv.0.weights": torch.zeros(1)}, tmp_path / "near.pth")
    with pytest.raises(PointPeftError, match=r"weights \(model: encoder.first_conv.0.weight\)"):
        load_checkpoint(model(1), tmp_path / "near.pth")
    torch.save({"zzz": torch.zeros(1)}, tmp_path / "far.pth")
    with pytest.raises(PointPeftError, match=r"It holds zzz \(1\); the model has blocks.blocks.0.attn.proj.bias"):
        load_checkpoint(model(1), tmp_path / "far.pth")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    with pytest.raises(PointPeftError, match=r"It holds no tensors itself\.$"):
        load_checkpoint(model(1), tmp_path / "empty.pth")


@pytest.mark.parametrize("beside", [{"epoch": 3, "optimizer": {"lr": 1.0}}, {"step": torch.tensor(3)}])
def test_a_container_of_an_unknown_name_is_named(tmp_path: Path, beside: dict[str, Any]) -> None:
    source = snapshot(model(1))
    torch.save({"net": source, **beside}, tmp_path / "a.pth")
    with pytest.raises(PointPeftError, match="no tensor fits the model") as caught:
        load_checkpoint(model(2), tmp_path / "a.pth")
    assert f"'net' holds {len(source)} tensors" in str(caught.value) and "optimizer" not in str(caught.value)
    torch.save(torch.load(tmp_path / "a.pth", weights_only=True)["net"], tmp_path / "b.pth")
    assert "torch.save(torch.load(path)['net'], …)" in str(caught.value), "as is done here"
    assert load_checkpoint(model(2), tmp_path / "b.pth").missing == ()


def test_names_that_become_equal_are_refused(tmp_path: Path) -> None:
    torch.save({"norm.bias": torch.zeros(24), "module.norm.bias": torch.ones(24)}, tmp_path / "a.pth")
    with pytest.raises(PointPeftError, match="norm.bias and module.norm.bias are both called norm.bias"):
        load_checkpoint(model(1), tmp_path / "a.pth")


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PointPeftError, match="there is no checkpoint file .*absent.pth"):
        load_checkpoint(model(1), tmp_path / "absent.pth")
    for name, message in (("a.safetensors", "is not a safetensors file"), ("a.pth", "cannot be read as tensors only")):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(PointPeftError, match=message):
            load_checkpoint(model(1), tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(PointPeftError, match="holds a list, not tensors by name"):
        load_checkpoint(model(1), tmp_path / "list.pth")


class Payload:
    """Content of a hostile pickle."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("payload"),)  # type: ignore[return-value]


class Options:
    """What a training script saves beside its tensors."""


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"base_model": snapshot(model(1)), "metrics": Payload()}, tmp_path / "a.pth")
    with pytest.raises(PointPeftError, match="cannot be read as tensors only"):
        load_checkpoint(model(1), tmp_path / "a.pth")
    assert not (tmp_path / "payload").exists()


def test_why_a_file_is_no_tensors_is_said_in_one_line(tmp_path: Path) -> None:
    """Torch goes on for many, in bold print, and advises to run whatever is in the file."""
    whole = tmp_path / "whole.pth"
    torch.save(snapshot(model(1)), whole)
    for name, content, reason in (
        ("objects.pth", None, rf"it holds '{Payload.__module__}.Options' too; save the state dict alone$"),
        ("torn.pth", whole.read_bytes()[:1000], "['\"]PytorchStreamReader failed reading zip archive.*['\"]$"),
        ("empty.pth", b"", "(\\w+|['\"].+['\"])$"),
        ("text.pth", b"no checkpoint", "(\\w+|['\"].+['\"])$"),
    ):
        if content is None:
            torch.save({"base_model": snapshot(model(1)), "options": Options()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PointPeftError, match=rf"{name} cannot be read as tensors only: {reason}") as caught:
            load_checkpoint(model(1), tmp_path / name)
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_numpy_numbers_among_the_metrics_do_not_hinder(tmp_path: Path) -> None:
    source, target = snapshot(model(1)), model(2)
    torch.save({"base_model": source, "metrics": {"acc": np.float64(0.9), "count": np.int32(3)}}, tmp_path / "a.pth")
    assert load_checkpoint(target, tmp_path / "a.pth").missing == ()


def test_the_embedded_backbone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED", tmp_path / "tiny")
    with pytest.raises(PointPeftError, match="not part of this installation: .*tiny.safetensors does not exist"):
        default_backbone(3)
    source = without(snapshot(model(1)), ("cls_head_finetune.",))
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in source.items()}
    save_file(half, tmp_path / "tiny.safetensors")
    (tmp_path / "tiny.json").write_text(json.dumps(SIZES))
    net = default_backbone(3)
    assert net.cls_head_finetune[-1].out_features == 3
    assert torch.equal(net.norm.weight, source["norm.weight"]) and net.norm.weight.dtype == torch.float32
    assert net(torch.rand(2, 32, 3)).shape == (2, 3)
    (tmp_path / "tiny.json").write_text(json.dumps({**SIZES, "depth": 2}))
    with pytest.raises(PointPeftError, match=r"do not belong together: loaded [^\n]*\n.*blocks.blocks.1"):
        default_backbone(3)
