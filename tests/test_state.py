"""An adapter as files: what is refused, what survives a crash, and that all is checked before a model is touched."""

from __future__ import annotations

import functools
import json
import os
import pickle
import resource
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from point_peft import LoraConfig, PeftConfig, PointPEFTConfig, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import PointTransformer
from point_peft.errors import AdapterError, AdapterFileError
from point_peft.files import format as file_format
from point_peft.files import format as writing
from point_peft.files.fingerprint import fingerprint
from point_peft.files.format import (
    CARD_FILE,
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_HEADER_BYTES,
    TENSOR_FILE,
    _sealed,
    parse_config,
    read_folder,
)
from point_peft.tuners.linear_probe import LinearProbeConfig
from tests.adapting import every_method
from tests.forks import Server
from tests.hanging import must_end
from tests.methods import config
from tests.zoo import Mould

SIZES: dict[str, Any] = {
    "trans_dim": 48, "depth": 2, "num_heads": 4, "num_group": 16, "group_size": 8, "encoder_dims": 48, "cls_dim": 5,
}  # fmt: skip
CONFIG = PointPEFTConfig(memory_bank=False)
HEAD = "cls_head_finetune"


@functools.cache
def mould(seed: int, **options: Any) -> Mould[PointTransformer]:
    torch.manual_seed(seed)
    return Mould(PointTransformer(**{**SIZES, **options}).eval())


def backbone(seed: int = 0, **options: Any) -> PointTransformer:
    copy = mould(seed, **options).copy()
    torch.manual_seed(seed)  # of the adapter that it may get
    return copy


def adapted(seed: int = 1, base: nn.Module | None = None, config: Any = CONFIG, **options: Any) -> PointPeftModel:
    """A backbone with an adapter whose tensors are all different."""
    model = get_peft_model(backbone() if base is None else base, config, **options)
    randomise(model, "default", seed)
    return model


def randomise(model: PointPeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters[name].parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def clouds() -> Tensor:
    return torch.randn(2, 128, 3, generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(clouds())
    return found


def everything(model: nn.Module) -> Any:
    """All that a failed load might have changed."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        [
            (name, id(m), type(m), m.training, *(tuple(hooks.values()) for hooks in hooks_of(m)), set(m.__dict__))
            for name, m in model.named_modules()
        ],
        getattr(model, "active_adapters", None),
    )


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks, module._load_state_dict_post_hooks]


def assert_unchanged(before: Any, after: Any) -> None:
    tensors, found = before[0], after[0]
    assert list(tensors) == list(found)
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)
    assert before[1:] == after[1:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapted().save_pretrained(folder)
    return folder


def copy_of(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def set_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    result = change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config if result is None else result))


def set_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load((folder / TENSOR_FILE).read_bytes())
    change(tensors)
    (folder / TENSOR_FILE).write_bytes(safetensors.torch.save(tensors))


@functools.cache
def targets() -> tuple[PointTransformer, PointPeftModel]:
    """A plain and an adapted backbone that refuse folders, and stay as they were all the time."""
    base = backbone()
    for parameter in list(base.parameters())[:3]:
        parameter.requires_grad_(False)
    return base, adapted(3)


@functools.cache
def untouched() -> tuple[Any, Any]:
    base, model = targets()
    return everything(base), everything(model)


def refused(folder: Path, match: str, **options: Any) -> None:
    """The folder is refused with one sentence by a plain and by an adapted backbone, which stay as they were."""
    base, model = targets()
    for target, before, load in (
        (base, untouched()[0], lambda: PointPeftModel.from_pretrained(base, folder, **options)),
        (model, untouched()[1], lambda: model.load_adapter(folder, "other", **options)),
    ):
        with pytest.raises(AdapterFileError, match=match) as caught:
            load()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
        assert_unchanged(before, everything(target))
    assert list(model.adapters) == ["default"]


# ---- strict reading: tensors -----------------------------------------------------------------------------------------

FIRST = "base_model.model.norm.weight"


def _pop(tensors: dict[str, Tensor]) -> None:
    del tensors[FIRST]


def _set(name: str, value: Any) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_pop, r"lacks the tensor 'norm\.weight'$"),
        (_set("base_model.model.norm.wieght", torch.ones(48)), "'norm.wieght' that the adapter.*'norm.weight'"),
        (_set("base_model.model.blocks.blocks.0.attn.qkv.weight", torch.ones(144, 48)), "attn.qkv.weight' that the ad"),
        (_set("base_model.model.../../../etc/passwd", torch.ones(1)), "'../../../etc/passwd' that"),
        (_set("../../x", torch.ones(1)), r"'\.\./\.\./x' does not begin with 'base_model\.model\.'"),
        (_set("/etc/passwd", torch.ones(1)), r"'/etc/passwd' does not begin"),
        (_set("base_model.model.a\n" + "b" * 5000, torch.ones(1)), r"'a\\nb+\.\.\.' that the adapter has not"),
        (_set(FIRST, torch.ones(49)), r"'norm\.weight' is \(49\), this model needs \(48\)"),
        (_set(FIRST, torch.ones(48, 1)), r"'norm\.weight' is \(48, 1\), this model needs \(48\)"),
        (_set(FIRST, torch.ones(2**40, 0)), r"is \(1099511627776, 0\), this model needs \(48\)"),
        (_set(FIRST, torch.ones(48, dtype=torch.int64)), r"'norm\.weight' is int64, this model needs float32"),
        (_set(FIRST, torch.ones(48, dtype=torch.bool)), r"'norm\.weight' is bool, this model needs float32"),
        (_set(FIRST, torch.ones(48, dtype=torch.complex64)), r"is complex64, this model needs float32"),
        (_set(FIRST, torch.ones(48).to(torch.float8_e4m3fn)), r"is float8_e4m3fn, this model needs float32"),
        (_set(FIRST, torch.full((48,), float("nan"))), r"'norm\.weight' holds values that are not finite"),
        (_set(FIRST, torch.full((48,), float("-inf"))), r"'norm\.weight' holds values that are not finite"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(saved: Path, tmp_path: Path, change: Any, match: str) -> None:
    folder = copy_of(saved, tmp_path)
    set_tensors(folder, change)
    refused(folder, match)


def _header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not a safetensors file, or it is cut off"),
        (b"\x01\x02", "not a safetensors file, or it is cut off"),
        (b"garbage " * 100, "not a safetensors file, or it is cut off"),
        (pickle.dumps({"a": [1, 2, 3]}), "not a safetensors file, or it is cut off"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file, or it is cut off"),
        (_header(b" " * (MAX_HEADER_BYTES + 1)), "a header of 8388609 bytes"),
        (_header(b'{"a": 1, "a": 2}'), "header is not JSON"),
        (_header(b"[" * 100_000), "header is not JSON"),
        (_header(b"\xff\xfe"), "header is not JSON"),
        (_header([1, 2]), "not a safetensors file"),
        (_header({"__metadata__": {"config_sha256": 5}}), "not a safetensors file"),
        (_header({"a": FLOAT}), "not a safetensors file"),
        (_header({"a": FLOAT}, b"\0" * 5), "not a safetensors file"),
        (_header({"a": {**FLOAT, "data_offsets": [0, 2**60]}}, b"\0" * 4), "not a safetensors file"),
        (_header({"a": {**FLOAT, "shape": [2**62, 2**62]}}, b"\0" * 4), "not a safetensors file"),
        (_header({"a": {**FLOAT, "dtype": "X9"}}, b"\0" * 4), "not a safetensors file"),
        (_header({"a": {**FLOAT, "dtype": "F4", "shape": [8]}}, b"\0" * 4), "a tensor of an unknown type: 'F4'"),
    ],
)
def test_what_is_not_a_safetensors_file_is_refused(saved: Path, tmp_path: Path, data: bytes, match: str) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / TENSOR_FILE).write_bytes(data)
    with pytest.raises(AdapterFileError, match=match):
        read_folder(folder)


def test_a_truncated_file_is_refused_wherever_it_ends(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    data = (folder / TENSOR_FILE).read_bytes()
    for size in (1, 8, 9, 500, len(data) // 2, len(data) - 1):
        (folder / TENSOR_FILE).write_bytes(data[:size])
        with pytest.raises(AdapterFileError, match="not a safetensors file"):
            read_folder(folder)
    (folder / TENSOR_FILE).write_bytes(data + b"\0")
    refused(folder, "not a safetensors file")


def test_a_changed_value_is_seen(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    data = bytearray((folder / TENSOR_FILE).read_bytes())
    data[-100] ^= 1
    (folder / TENSOR_FILE).write_bytes(data)
    refused(folder, r"adapter_model\.safetensors' is damaged, or another program has changed it: its digest is not")
    # Without a digest, as PEFT writes files, it is an adapter like another.
    set_tensors(folder, lambda tensors: None)
    PointPeftModel.from_pretrained(backbone(), folder)


def test_a_torch_pickle_is_not_opened(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = copy_of(saved, tmp_path)
    torch.save(Evil(), folder / TENSOR_FILE)
    refused(folder, "not a safetensors file")
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    refused(folder, r"there is no file '.*adapter_model\.safetensors'")
    assert not (tmp_path / "owned").exists()


def test_files_over_the_limits_are_not_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / CONFIG_FILE).write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    refused(folder, r"adapter_config\.json' has 1048577 bytes, more than the 1048576 that are read")
    monkeypatch.setattr(file_format, "MAX_TENSOR_BYTES", 1000)
    refused(folder, r"adapter_model\.safetensors' has \d+ bytes, more than the 1000 that are read")


def test_missing_files_and_folders(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "nowhere", "there is no folder '.*nowhere'")
    refused(saved / CONFIG_FILE, "there is no folder")
    refused(tmp_path, r"there is no file '.*adapter_model\.safetensors'")
    refused(tmp_path / ("x" * 300), "cannot read '.*': File name too long|there is no folder")
    folder = copy_of(saved, tmp_path)
    (folder / CONFIG_FILE).unlink()
    refused(folder, r"there is no file '.*adapter_config\.json'")
    (folder / CONFIG_FILE).mkdir()
    refused(folder, r"there is no file '.*adapter_config\.json'")

    def deny(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(AdapterFileError, match="cannot read '.*': Permission denied"):
        patch.setattr(Path, "is_file", deny)
        read_folder(saved)


# ---- strict reading: configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "must hold a JSON object, not a list"),
        (b"null", "must hold a JSON object, not a NoneType"),
        (b'"POINT_PEFT"', "must hold a JSON object, not a str"),
        (b'{"peft_type": "LORA", "peft_type": "POINT_PEFT"}', "a key stands twice"),
        (b'{"peft_type": NaN}', "NaN is not a value of JSON"),
        (b'{"peft_type": -Infinity}', "-Infinity is not a value of JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b'{"a": "\\ud800"}', "is not JSON: .*surrogates not allowed"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "is nested deeper than the 64 levels that are read"),
        (b"{}", "peft_type is None; this version reads 'POINT_PEFT'"),
        (b'{"peft_type": "PREFIX"}', "peft_type is 'PREFIX'"),
        (b'{"peft_type": ["POINT_PEFT"]}', r"peft_type is \['POINT_PEFT'\]"),
        (b'{"peft_type": "POINT_PEFT"}', "has format version None"),
    ],
)
def test_what_is_not_a_configuration_is_refused(text: bytes, match: str) -> None:
    with pytest.raises(AdapterFileError, match=match):
        parse_config(text, Path("adapter_config.json"))


@pytest.mark.parametrize("version", [0, -1, 1.0, True, "1", [1], None])
def test_only_the_known_format_is_read(version: Any) -> None:
    text = json.dumps({"peft_type": "POINT_PEFT", "format_version": version}).encode()
    with pytest.raises(AdapterFileError, match=r"has format version .*; point_peft \S+ reads version 1$"):
        parse_config(text, Path("c"))
    with pytest.raises(AdapterFileError, match=r"has format version 2; .*: a newer point_peft is needed"):
        parse_config(text.replace(json.dumps(version).encode(), b"2"), Path("c"))


def _tuner(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["tuners"][0].update(values)


def _top(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_top(surprise=1), "PeftConfig has no field 'surprise'; a newer version"),
        (_tuner(surprise=1), "PointPEFTConfig has no field 'surprise'; a newer version"),
        (_tuner(method="TELEPATHY"), "method 'TELEPATHY' is unknown; known methods: .*POINT_PEFT"),
        (_tuner(method=["POINT_PEFT"]), r"method \['POINT_PEFT'\] is unknown"),
        (_top(tuners=[]), "tuners is .*allowed: a list of at least one"),
        (_top(tuners={}), "tuners must be a list of objects"),
        (_top(tuners=[3]), "tuners must be a list of objects"),
        (_top(modules_to_save=5), "PeftConfig.modules_to_save is 5; allowed: a string or a list of a string or None"),
        (_top(modules_to_save=[["a"]]), r"modules_to_save is \(\['a'\],\); allowed"),
        (_top(revision=3), "PeftConfig.revision is 3; allowed: a string or None"),
        (_tuner(adapter_width=-1), "adapter_width is -1; allowed: 1 or more"),
        (_tuner(adapter_width=0), "adapter_width is 0; allowed: 1 or more"),
        (_tuner(adapter_width=10**9), "adapter_width is 1000000000; allowed: an integer, at most 16777216"),
        (_tuner(adapter_width=10**400), "adapter_width is 1000.*allowed: an integer, at most 16777216"),
        (_tuner(num_prompts=-10**9), "num_prompts is -1000000000; allowed"),
        (_tuner(adapter_width=True), "adapter_width is True; allowed"),
        (_tuner(adapter_width=16.0), r"adapter_width is 16\.0; allowed"),
        (_tuner(adapter_width="16"), "adapter_width is '16'; allowed"),
        (_tuner(adapter_scale=10**400), "adapter_scale is 1000.*; allowed: a finite number"),
        (_tuner(adapter_scale="x" * 10_000), r"adapter_scale is 'x+\.\.\.'; allowed: a finite number"),
        (_tuner(init="magic"), "init is 'magic'; allowed: 'identity' or 'published'"),
        (_tuner(target_modules={"a": 1}), "target_modules is .*; allowed: a string or a list"),
        (_tuner(target_modules=["nonsense"]), "does not fit this model: no block matches 'nonsense'"),
        (_tuner(target_modules="("), "does not fit this model: .*is not a regular expression"),
        (_tuner(layers_to_transform=[99]), "does not fit this model: .*there is no block 99"),
        (_tuner(layers_to_transform=[0]), r"for other modules: this model lacks \d+ of its \d+ \('blocks"),
        (_top(adapted_modules=[]), r"for other modules: this model has \d+ more \('blocks.*, …\)$"),
        (_top(adapted_modules=[1, {}]), r"lacks 2 of its 2 \('1', '{}'\) and has \d+ more \("),
        (_top(adapted_modules={}), "lacks heads or adapted_modules"),
        (_top(heads=None), "lacks heads or adapted_modules"),
        (_top(heads={"cls_haed": None}), "has its own 'cls_haed', .*nearest: 'cls_head_finetune'"),
        (_top(heads={"": None}), "has its own ''"),
        (_top(heads={}), r"this model lacks 1 of its \d+ \('cls_head_finetune'\)$"),
        (_top(heads={HEAD: None}), "the description of the head .* is not one: None"),
        (_top(heads={HEAD: {"layer": "Bilinear", "arguments": {}}}), "asks for a layer 'Bilinear'; known layers"),
        (_top(heads={HEAD: {"layer": "Identity", "arguments": {}}}), "a tensor 'cls_head_fine.* that the ad"),
        (_top(heads={HEAD: {"class": "Mine", "tensors": {}}}), r"'Mine', .*pass heads=\{'cls_head_finetune': module\}"),
        (_top(base_fingerprint=None), "base_fingerprint is not one"),
        (_top(base_fingerprint={}), "base_fingerprint is not one"),
        (_top(base_fingerprint={"dtypes": 3}), "base_fingerprint is not one"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused(saved: Path, tmp_path: Path, change: Any, match: str) -> None:
    folder = copy_of(saved, tmp_path)
    set_config(folder, change)
    refused(folder, match)


@pytest.mark.parametrize(
    "change", [{"dtypes": [3]}, {"dtypes": "float32"}, {"tensors": "x"}, {"sums_sha256": None}, {"more": 1}]
)
def test_a_wrong_fingerprint_is_refused(saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = copy_of(saved, tmp_path)
    set_config(folder, lambda config: config["base_fingerprint"].update(change))
    refused(folder, "base_fingerprint is not one that this version of point_peft writes")


@pytest.mark.parametrize(
    "change",
    [
        _tuner(adapter_width=2**24),
        _tuner(local_attention_width=2**24, local_attention_heads=1),
        _tuner(num_prompts=2**24),
        _top(heads={HEAD: {"layer": "Linear", "arguments": {"in_features": 2**20, "out_features": 2**20}}}),
        _top(heads={HEAD: {"layer": "Conv1d", "arguments": {
            "in_channels": 2**20, "out_channels": 2**20, "kernel_size": 2**20}}}),
    ],
)  # fmt: skip
def test_an_absurd_size_takes_no_memory(saved: Path, tmp_path: Path, change: Any) -> None:
    folder = copy_of(saved, tmp_path)
    set_config(folder, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, "this model needs|lacks the tensor|cannot be made")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", "(([a-z.0-9]+)*)*!", "(?=(.*)*x)" * 20, "(" * 100_000])
def test_a_regular_expression_of_a_file_cannot_hang(saved: Path, tmp_path: Path, pattern: str) -> None:
    folder = copy_of(saved, tmp_path)
    set_config(folder, _tuner(target_modules=pattern, tuned_biases=pattern))
    with must_end():
        refused(folder, "does not fit this model")


# ---- the base's fingerprint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"depth": 3}, {"trans_dim": 24, "encoder_dims": 24}, {"num_group": 8}])
def test_another_backbone_is_refused(saved: Path, options: dict[str, Any]) -> None:
    if options == {"num_group": 8}:  # has the same tensors: cannot be told, and is none of the adapter's business
        PointPeftModel.from_pretrained(backbone(**options), saved)
        return
    with pytest.raises(AdapterFileError, match="another backbone|made for other|this model needs"):
        PointPeftModel.from_pretrained(backbone(**options), saved)


@pytest.mark.parametrize(
    "depth, words", [(3, r"has 1 more \('blocks.*.2.attn.qkv'\)"), (1, r"lacks 1 of its 3 \('blocks.*.1.attn.qkv'\)")]
)
def test_modules_that_are_lacking_or_more_are_counted(tmp_path: Path, depth: int, words: str) -> None:
    get_peft_model(backbone(), LoraConfig(r=2)).save_pretrained(tmp_path)
    # As the adapter lies at all blocks, of another depth there are others.
    with pytest.raises(AdapterFileError, match=f"made for other modules: this model {words}$"):
        PointPeftModel.from_pretrained(backbone(depth=depth), tmp_path)


def test_another_class_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFileError, match="which|this model has not"):
        PointPeftModel.from_pretrained(nn.Sequential(nn.Linear(3, 3)), saved)


def test_other_weights_of_the_same_backbone_are_refused(saved: Path) -> None:
    base = backbone(7)
    before = everything(base)
    with pytest.raises(AdapterFileError, match="other weights of the backbone: this PointTransformer has the"):
        PointPeftModel.from_pretrained(base, saved)
    assert_unchanged(before, everything(base))


def test_a_single_changed_value_is_seen(saved: Path) -> None:
    base = backbone()
    with torch.no_grad():
        base.blocks.blocks[1].attn.qkv.weight[3, 3] += 1e-6  # type: ignore[union-attr,operator,index]
    with pytest.raises(AdapterFileError, match="other weights"):
        PointPeftModel.from_pretrained(base, saved)


def test_what_is_the_adapters_own_may_differ_in_the_base(saved: Path) -> None:
    base = backbone()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.startswith((HEAD, "cls_token", "cls_pos", "norm.")):
                parameter.add_(1.0)
    torch.testing.assert_close(logits(PointPeftModel.from_pretrained(base, saved)), logits(adapted()))
    base = backbone(cls_dim=9)
    base.load_state_dict({name: t for name, t in backbone().state_dict().items() if HEAD not in name}, strict=False)
    assert torch.equal(logits(PointPeftModel.from_pretrained(base, saved)), logits(adapted()))


def test_a_base_of_which_the_adapter_has_everything_itself(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3))

    model = get_peft_model(base(), PeftConfig(tuners=[LinearProbeConfig()], modules_to_save=["0"]))
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3)
    torch.testing.assert_close(PointPeftModel.from_pretrained(base(), tmp_path)(x), model(x))


@every_method
def test_an_adapter_is_all_in_its_file(method: str) -> None:
    """A load makes it without memory and puts the tensors of the file there: nothing else may hold numbers."""
    model = get_peft_model(backbone(), config(method))
    adapter = get_adapter(model, "default")
    assert adapter.holds_only(adapter.tensors())
    for name, module in adapter.named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        assert not plain, f"{name} has {plain} beside its parameters and buffers"


class ScaledHead(nn.Linear):
    """It has a tensor that no state dict tells of."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__(96, 5)
        self.register_buffer("factor", torch.tensor([3.0]), persistent=False)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.factor * super().forward(pooled)


def test_what_is_not_in_the_file_is_made(tmp_path: Path) -> None:
    model = adapted(config=LinearProbeConfig(), heads={HEAD: ScaledHead})
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    again = PointPeftModel.from_pretrained(backbone(), tmp_path, heads={HEAD: ScaledHead})
    adapter = get_adapter(again, "default")
    assert not adapter.holds_only(adapter.tensors())
    assert torch.equal(logits(again), expected)


def test_a_base_in_another_type_gives_a_warning_and_runs(saved: Path) -> None:
    base = backbone().double()
    with pytest.warns(UserWarning, match="trained on a base in float32, int64, this one is in float64, int64: whether"):
        model = PointPeftModel.from_pretrained(base, saved)
    with torch.no_grad():
        torch.testing.assert_close(model(clouds().double()).float(), logits(adapted()), atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="this one is in bfloat16"):
        model = PointPeftModel.from_pretrained(backbone().bfloat16(), saved)
    assert {p.dtype for p in model.adapters.parameters()} == {torch.float32}


def test_another_checkpoint_loaded_after_adapting_is_noticed(saved: Path, tmp_path: Path) -> None:
    model = PointPeftModel.from_pretrained(backbone(), saved)
    model.save_pretrained(tmp_path / "a")
    model.base_model.load_state_dict(backbone(7).state_dict())
    with pytest.raises(AdapterFileError, match="other weights"):
        model.load_adapter(saved, "b")
    model.save_pretrained(tmp_path / "b")
    PointPeftModel.from_pretrained(backbone(7), tmp_path / "b")
    with pytest.raises(AdapterFileError, match="other weights"):
        PointPeftModel.from_pretrained(backbone(), tmp_path / "b")


def test_values_written_past_autograd_are_noticed(saved: Path) -> None:
    model = PointPeftModel.from_pretrained(backbone(), saved)
    model.base_model.get_parameter("blocks.blocks.0.attn.qkv.weight").data.add_(1)
    with pytest.raises(AdapterFileError, match="other weights"):
        model.load_adapter(saved, "b")


def test_a_fingerprint_tells_any_changed_value() -> None:
    tensors = {"a": torch.randn(3, 999), "b": torch.randn(512).half()}
    first = fingerprint(tensors)
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        for place in torch.randint(tensor.numel(), (50,), generator=generator):
            kept = tensor.view(-1)[place].clone()
            tensor.view(-1)[place] = -kept
            assert fingerprint(tensors) != first
            tensor.view(-1)[place] = kept
    assert fingerprint(tensors) == first


def test_fingerprints_of_all_kinds_of_tensors() -> None:
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "bool": torch.tensor([True, False, True]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "offset": torch.arange(9, dtype=torch.uint8)[1:],
    }
    with torch.inference_mode():
        tensors["inference"] = torch.ones(2)
    first = fingerprint(tensors)
    copies = {name: tensor.clone().contiguous() for name, tensor in reversed(tensors.items())}
    assert first == fingerprint(copies)
    assert first["tensors"] == 7
    copies["bool"][0] = False
    assert first["sums_sha256"] != fingerprint(copies)["sums_sha256"]


# ---- writing ---------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_round_trip_is_exact_and_its_bytes_too(saved: Path, tmp_path: Path) -> None:
    assert sorted(files(saved)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = PointPeftModel.from_pretrained(backbone(), saved)
    assert torch.equal(logits(model), logits(adapted()))
    model.save_pretrained(tmp_path / "again")
    adapted().save_pretrained(tmp_path / "other")
    assert files(tmp_path / "again") == files(tmp_path / "other") == files(saved)


def saving(folder: str) -> Callable[[], None]:
    model = adapted()
    return lambda: model.save_pretrained(folder)


def test_the_bytes_are_the_same_in_another_process(saved: Path, tmp_path: Path, server: Server) -> None:
    assert server.wait(server.start(saving, tmp_path / "x")) == 0
    assert files(tmp_path / "x") == files(saved)


def test_the_metadata_has_one_order() -> None:
    data = {safetensors.torch.save({"a": torch.ones(1)}, metadata={"x": "1", "y": "é", "z": "3"}) for _ in range(30)}
    assert len({_sealed(entry) for entry in data}) == 1
    assert torch.equal(safetensors.torch.load(_sealed(data.pop()))["a"], torch.ones(1))


def test_saving_and_loading_touch_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = PeftConfig(tuners=[CONFIG], base_model_name_or_path="someone/backbone", revision="main")
    adapted(config=base).save_pretrained(tmp_path / "x")
    model = PointPeftModel.from_pretrained(backbone(), tmp_path / "x")
    config = model.adapters["default"].config
    assert isinstance(config, PeftConfig)
    assert (config.base_model_name_or_path, config.revision) == ("someone/backbone", "main")


def test_an_adapter_that_is_not_finite_is_not_saved(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    model = adapted()
    with torch.no_grad():
        next(model.adapters["default"].parameters()).fill_(float("nan"))
    with pytest.raises(AdapterFileError, match="the adapter: '.*' holds values that are not finite"):
        model.save_pretrained(folder)
    assert files(folder) == files(saved)


def test_other_files_and_an_edited_card_stay(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text("x")
    adapted(2).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine" and (folder / "notes.txt").read_text() == "mine too"
    assert (folder / "sub" / "x").read_text() == "x"
    assert torch.equal(logits(PointPeftModel.from_pretrained(backbone(), folder)), logits(adapted(2)))


def test_a_link_is_replaced_and_not_followed(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    targets = {name: tmp_path / f"target_{name}" for name in (CONFIG_FILE, TENSOR_FILE)}
    for name, target in targets.items():
        target.write_bytes((saved / name).read_bytes())
        (folder / name).symlink_to(target)
    (folder / CARD_FILE).symlink_to(tmp_path / "dangling")
    adapted(2).save_pretrained(folder)
    for name, target in targets.items():
        assert target.read_bytes() == (saved / name).read_bytes() and not (folder / name).is_symlink()
    assert not (tmp_path / "dangling").exists()
    (tmp_path / "way").symlink_to(folder)
    adapted(3).save_pretrained(tmp_path / "way")
    assert torch.equal(logits(PointPeftModel.from_pretrained(backbone(), folder)), logits(adapted(3)))


def test_where_nothing_can_be_saved(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterFileError, match="cannot save to '.*file': it is not a folder"):
        adapted().save_pretrained(tmp_path / "file")
    with pytest.raises(AdapterFileError, match="cannot save to '.*': Not a directory"):
        adapted().save_pretrained(tmp_path / "file" / "below")
    (tmp_path / "odd" / TENSOR_FILE).mkdir(parents=True)
    with pytest.raises(AdapterFileError, match="cannot save to '.*': Is a directory"):
        adapted().save_pretrained(tmp_path / "odd")
    assert [path.name for path in (tmp_path / "odd").iterdir()] == [TENSOR_FILE]


@pytest.mark.parametrize("what", ["replace", "fsync", "write"])
def test_a_full_disk_leaves_the_old_adapter(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = copy_of(saved, tmp_path)
    model, calls = adapted(2), [0]

    def fail(*_: Any, **__: Any) -> Any:
        calls[0] += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if what == "write":
            patch.setattr(writing, "_write", fail)
        else:
            patch.setattr(os, what, fail)
        for target in (folder, tmp_path / "new"):
            with pytest.raises(AdapterFileError, match="cannot save to '.*': No space left on device"):
                model.save_pretrained(target)
    assert calls[0] and files(folder) == files(saved) and not (tmp_path / "new").exists()


def test_a_configuration_edited_by_hand_counts(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    set_config(folder, _top(base_model_name_or_path="me/mine"))
    model = PointPeftModel.from_pretrained(backbone(), folder)
    config = model.adapters["default"].config
    assert isinstance(config, PeftConfig) and config.base_model_name_or_path == "me/mine"


# ---- several adapters, and what loading leaves alone -----------------------------------------------------------------


def two() -> PointPeftModel:
    model = adapted()
    model.add_adapter("second", PointPEFTConfig(memory_bank=False, adapter_width=4), heads={HEAD: nn.Linear(96, 3)})
    randomise(model, "second", 8)
    return model


def test_where_several_adapters_are_saved(tmp_path: Path) -> None:
    model = two()
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "one", "second")
    model.save_pretrained(tmp_path / "listed", ["second", "default"])
    assert sorted(p.name for p in (tmp_path / "all").iterdir() if p.is_dir()) == ["second"]
    assert files(tmp_path / "all" / "second") == files(tmp_path / "one") == files(tmp_path / "listed" / "second")
    assert files(tmp_path / "all") == files(tmp_path / "listed")
    again = PointPeftModel.from_pretrained(backbone(), tmp_path / "all")
    again.load_adapter(tmp_path / "all" / "second", "second")
    for name, classes in (("default", 5), ("second", 3)):
        model.set_adapter(name)
        again.set_adapter(name)
        assert logits(again).shape == (2, classes) and torch.equal(logits(model), logits(again))
    model.delete_adapter("default")
    model.save_pretrained(tmp_path / "rest")
    assert files(tmp_path / "rest") == files(tmp_path / "one")


def test_adapters_that_cannot_be_saved(tmp_path: Path) -> None:
    model = two()
    with pytest.raises(AdapterError, match=r"there is no adapter 'third'; adapters: 'default', 'second'"):
        model.save_pretrained(tmp_path / "x", "third")
    with pytest.raises(AdapterError, match="named twice"):
        model.save_pretrained(tmp_path / "x", ["second", "second"])
    with pytest.raises(AdapterError, match="empty list of adapters"):
        model.save_pretrained(tmp_path / "x", [])
    for name in ("default", "second"):
        model.delete_adapter(name)
    with pytest.raises(AdapterError, match="there is no adapter to save"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("trainable", [False, True])
def test_loading_changes_nothing_else(saved: Path, trainable: bool) -> None:
    model = two()
    model.set_adapter("second")
    model.freeze_adapter("default")
    model.train()
    before = everything(model)
    model.load_adapter(saved, "third", is_trainable=trainable)
    after = everything(model)
    for name, flags in before[1].items():
        assert after[1][name] == flags
    modes = {row[0]: row[3] for row in after[2]}
    assert all(modes[row[0]] == row[3] for row in before[2])
    assert model.training and model.active_adapters == ("second",)
    third = list(model.adapters["third"].parameters())
    assert {p.requires_grad for p in third} == {trainable} and model.adapters["third"].training


@pytest.mark.parametrize("training", [False, True])
def test_the_first_adapter_of_a_model_is_active_and_keeps_its_mode(saved: Path, training: bool) -> None:
    base = backbone().train(training)
    model = PointPeftModel.from_pretrained(base, saved, "mine")
    assert model.active_adapters == ("mine",) and model.training is base.training is training
    assert not any(p.requires_grad for p in model.parameters())
    model = PointPeftModel.from_pretrained(backbone(), saved, is_trainable=True)
    assert all(p.requires_grad == name.startswith("adapters.") for name, p in model.named_parameters())


def test_a_saved_module_whose_name_ends_another(tmp_path: Path) -> None:
    """A saved "norm" must not come back as every module whose name ends in ".norm"."""

    def base() -> PointTransformer:
        made = backbone()
        made.extra = nn.Sequential()
        made.extra.add_module("norm", nn.LayerNorm(48))
        return made

    config = PointPEFTConfig(memory_bank=False, tuned_norms=[], modules_to_save="norm")
    with pytest.warns(UserWarning, match="fills: 'cls_head_finetune', 'extra'"):
        model = adapted(base=base(), config=config)
    model.save_pretrained(tmp_path / "x")
    again = PointPeftModel.from_pretrained(base(), tmp_path / "x")
    assert torch.equal(logits(again), logits(model))


def test_a_bank_is_saved_with_its_adapter(tmp_path: Path) -> None:
    rows = torch.randn(20, 48, generator=torch.Generator().manual_seed(3))
    model = adapted(config=PointPEFTConfig(memory_bank=True), memory_bank=rows)
    model.save_pretrained(tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PointPeftModel.from_pretrained(backbone(), tmp_path / "x")
        assert torch.equal(logits(again), logits(model))
    set_tensors(tmp_path / "x", _set("base_model.model.point_peft.memory_bank.rows", torch.ones(20, 47)))
    refused(tmp_path / "x", r"memory_bank\.rows' is \(20, 47\), this model needs \(any, 48\)")
    set_tensors(tmp_path / "x", _set("base_model.model.point_peft.memory_bank.rows", torch.ones(3, 48)))
    refused(tmp_path / "x", "the memory bank has 3 rows, retrieval of the top 8 needs at least 8")
