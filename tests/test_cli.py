"""The command line: what it prints, where to, and its exit codes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from torch import nn

from point_peft import BitFitConfig, LoraConfig, PeftConfig, PointPeftModel, __version__, cli, get_peft_model
from point_peft.files.format import (
    CONFIG_FILE,
    KEY_PREFIX,
    PENDING_CONFIG_FILE,
    TENSOR_FILE,
    copy_folder,
    read_folder,
    sha256,
)
from point_peft.hub.pulling import Place
from point_peft.hub.pushing import Upload
from tests.hub_server import HubServer
from tests.test_state import CONFIG, adapted, backbone, logits

pytest_plugins = ["tests.hub_fixture"]

HERE = "tests.test_cli"
LORA = LoraConfig(r=4, modules_to_save=[])

TUNER = replace(CONFIG, adapter_width=4)


def make() -> nn.Module:
    return backbone()


def make_other() -> nn.Module:
    return backbone(3)


def unknown() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3))


not_callable = 3
model = nn.Linear(2, 2)


def number() -> int:
    return 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = PeftConfig(
        tuners=[replace(CONFIG, adapter_width=4)], base_model_name_or_path="someone/base", revision="v1"
    )
    adapted(config=config).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    adapted(config=LORA).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def failed(capsys: pytest.CaptureFixture[str], said: str, *arguments: object) -> None:
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("point-peft: error: ") and said in err


# ---- the program ----


@pytest.mark.parametrize("command", [[], ["inspect"], ["list"], ["diff"], ["describe"], ["merge"], ["push"], ["pull"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(*command, "--help")
    out, err = capsys.readouterr()
    assert left.value.code == 0 and out.startswith(f"usage: point-peft {' '.join(command)}".strip()) and err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["inspect"], "the following arguments are required: PATH_OR_REPO"),
        (["diff", "a"], "the following arguments are required: B"),
        (["describe", "x:y", "--input", "3"], "'3' is not a shape such as 2,1024,3"),
        (["describe", "x:y", "--input", "2,-1,3"], "'2,-1,3' is not a shape"),
        (["push", "a", "b", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == "" and said in err and err.startswith("usage: point-peft")


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run("--version")
    assert left.value.code == 0 and capsys.readouterr() == (f"point-peft {__version__}\n", "")


def test_it_is_a_module(folder: Path) -> None:
    command = [sys.executable, "-m", "point_peft", "inspect", str(folder / "none")]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and "Traceback" not in wrong.stderr
    assert wrong.stderr.startswith("point-peft: error: there is no folder") and wrong.stderr.count("\n") == 1


# ---- inspect ----


def test_inspect_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected = PointPeftModel.from_pretrained(backbone(), folder).adapters["default"].tensors()  # type: ignore[operator]
    assert {name: tuple(entry["shape"]) for name, entry in report["tensors"].items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert report["parameters"] == sum(tensor.numel() for tensor in expected.values())
    assert report["bytes"] == (folder / TENSOR_FILE).stat().st_size
    assert report["methods"] == [{"method": "POINT_PEFT", "fields": {"adapter_width": 4}}]
    assert report["base"]["name"] == "someone/base" and report["base"]["revision"] == "v1"
    assert report["base"]["fingerprint"]["tensors"] > 0
    assert (
        list(report["heads"]) == ["cls_head_finetune"] and report["problems"] == [] and report["format"] == "point_peft"
    )


def test_inspect_in_words(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", lora) == 0
    out = capsys.readouterr().out
    for said in (
        "(PEFT format)\n", "method:      LORA\n  modules_to_save = []\n  r = 4\n", "base:        not named\n",
        "own modules: none\n", "tensors:     4, 0 of them zero\n", "float32 (4, 48)\n", "health:      in order\n",
    ):  # fmt: skip
        assert said in out


def test_inspect_an_adapter_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["qkv"], "bias": "none", "modules_to_save": ["head"]}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    safetensors.torch.save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 2)}, tmp_path / TENSOR_FILE)
    assert run("inspect", tmp_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["methods"] == [{"method": "LORA", "fields": {k: v for k, v in config.items() if k != "peft_type"}}]
    assert list(report["heads"]) == ["head"] and report["format"] == "PEFT"


def damaged(folder: Path, what: str) -> str:
    """Spoil an adapter, and say what `inspect` says of it."""
    files = read_folder(folder)
    tensors, config = dict(files.tensors), dict(files.config)
    name = next(iter(tensors))
    if what == "left":
        (folder / f".README.md.{'0' * 12}.tmp").write_text("x")
        return "an interrupted save has left .README.md.000000000000.tmp"
    if what == "edited":
        path = folder / CONFIG_FILE
        path.write_text(path.read_text().replace("v1", "v2"))
        return "adapter_config.json is another than the one that the tensors were saved with"
    if what == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif what == "zero":
        tensors = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    elif what == "method":
        config["tuners"] = [{"method": "NEW\x1b[2J", "x": 1}]
    elif what == "field":
        config["tuners"] = [{**config["tuners"][0], "new_field": 1}]
    else:
        config["tuners"] = 3
    text = json.dumps(config).encode()
    (folder / CONFIG_FILE).write_bytes(text)
    plain = {KEY_PREFIX + key: tensor for key, tensor in tensors.items()}
    metadata = {"format": "pt", "config_sha256": sha256(text)}
    (folder / TENSOR_FILE).write_bytes(safetensors.torch.save(plain, metadata=metadata))
    return {
        "nan": f"the tensor '{name}' holds values that are not finite",
        "zero": "all tensors are zero",
        "method": r"method 'NEW\x1b[2J' is unknown; known methods",
        "field": "PointPEFTConfig has no field 'new_field'",
        "tuners": "adapter_config.json names no methods",
    }[what]


@pytest.mark.parametrize("what", ["left", "edited", "nan", "zero", "method", "field", "tuners"])
def test_what_is_not_in_order(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = damaged(folder, what)
    assert run("inspect", folder) == 1
    out, err = capsys.readouterr()
    assert f"health:      NOT in order\n  {said}" in out and err == "" and "\x1b" not in out
    assert run("inspect", folder, "--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"]


def test_what_cannot_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed(capsys, "there is no folder", "inspect", tmp_path / "none")
    failed(capsys, "there is no file", "inspect", tmp_path)
    failed(capsys, "--revision is for repositories of the Hub", "inspect", folder, "--revision", "v1")
    (folder / CONFIG_FILE).write_text("{\n\n")
    failed(capsys, "is not JSON", "inspect", folder)


@pytest.mark.parametrize("value", [None, 3, True, "x", [], [None], {"a": [{"b": {}}]}])
def test_whatever_a_configuration_says(
    folder: Path, lora: Path, value: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_parser", functools.cache(cli._parser))  # to make it takes longer than all that follows
    for path in (folder / CONFIG_FILE, lora / CONFIG_FILE):
        before = json.loads(path.read_text())
        for name in sorted(before):
            path.write_text(json.dumps({**before, name: value}))
            codes = {run("inspect", path.parent), run("inspect", path.parent, "--json"), run("diff", folder, lora)}
            assert codes <= {1, 2}
    capsys.readouterr()


# ---- diff ----


def test_the_same(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "b"
    copy_folder(folder, other)
    text = (other / CONFIG_FILE).read_text().replace(__version__, "0.0.0")
    (other / CONFIG_FILE).write_text(text)
    assert run("diff", folder, folder) == run("diff", folder, other) == 0
    assert capsys.readouterr() == ("", "")


def test_the_same_in_two_formats(tmp_path: Path) -> None:
    for format in ("peft", "point_peft"):
        adapted(config=LORA).save_pretrained(tmp_path / format, format=format)
    assert run("diff", tmp_path / "peft", tmp_path / "point_peft") == 0


def test_two_adapters(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted(2, config=PeftConfig(tuners=[TUNER], base_model_name_or_path="someone/base")).save_pretrained(
        tmp_path / "b"
    )
    assert run("diff", folder, tmp_path / "b") == 1
    out = capsys.readouterr().out
    assert out.startswith(f'--- {folder}\n+++ {tmp_path / "b"}\nconfig revision: "v1" -> null\ntensor ')
    first, second = (read_folder(path).tensors for path in (folder, tmp_path / "b"))
    name = max(first, key=lambda name: first[name].numel())
    cosine = torch.cosine_similarity(first[name].double().flatten(), second[name].double().flatten(), dim=0)
    largest = (first[name] - second[name]).abs().max()
    assert f"tensor {name}: largest difference {largest:.3g}, cosine {cosine:.6f}\n" in out


def test_two_methods(folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", folder, lora) == 1
    out = capsys.readouterr().out
    assert (
        'config tuners[0].method: "POINT_PEFT" -> "LORA"\n' in out and ": only in A\n" in out and ": only in B\n" in out
    )
    adapted(config=LoraConfig(r=2, modules_to_save=[])).save_pretrained(tmp_path / "c")
    assert run("diff", lora, tmp_path / "c") == 1
    out = capsys.readouterr().out
    assert "config tuners[0].r: 4 -> 2\n" in out and ": float32 (4, 48) -> float32 (2, 48)\n" in out


def test_a_difference_that_cannot_be_seen(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed(capsys, "there is no folder", "diff", lora, tmp_path / "none")


# ---- describe, merge ----


def test_describe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("describe", f"{HERE}:make") == 0
    known = capsys.readouterr().out
    assert known.startswith("backbone known by: preset") and "2 blocks" in known
    for shape in ("2,128,3", "2x128x3"):
        assert run("describe", f"{HERE}:make", "--input", shape) == 0
        assert "2 blocks" in capsys.readouterr().out
    (tmp_path / "own.py").write_text("from tests.test_cli import make\nclass A:\n    b = staticmethod(make)\n")
    assert run("describe", f"{tmp_path / 'own.py'}:A.b") == 0
    assert capsys.readouterr().out == known
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run("describe", "own:make") == 0
    assert capsys.readouterr().out == known


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("make", "MODEL is 'make'; allowed: package.module:callable"),
        (":make", "MODEL is ':make'"),
        ("tests.test_cli:", "MODEL is 'tests.test_cli:'"),
        ("tests.nothing:make", "MODEL: cannot import 'tests.nothing': No module named"),
        ("none.py:make", "MODEL: there is no file 'none.py'"),
        (f"{HERE}:nothing", f"MODEL: '{HERE}' has no 'nothing'"),
        (f"{HERE}:not_callable", f"MODEL: '{HERE}:not_callable' gives a int, not an nn.Module"),
        (f"{HERE}:number", f"MODEL: '{HERE}:number' gives a int, not an nn.Module"),
        (f"{HERE}:unknown", "no preset describes Sequential"),
        (f"{HERE}:model", "no preset describes Linear"),
    ],
)
def test_what_makes_no_backbone(spec: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed(capsys, said, "describe", spec)


def test_merge(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "merged.safetensors"
    assert run("merge", f"{HERE}:make", lora, output) == 0
    assert capsys.readouterr().out.startswith(f"{output}: ")
    merged = backbone(9)
    merged.load_state_dict(safetensors.torch.load_file(output))
    adapted_model = PointPeftModel.from_pretrained(backbone(), lora)
    assert torch.allclose(logits(merged), logits(adapted_model), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(backbone()), atol=1e-3)
    assert [path.name for path in output.parent.iterdir()] == ["merged.safetensors"]
    adapted(config=LoraConfig(r=4)).save_pretrained(tmp_path / "with_head")
    adapted_model = PointPeftModel.from_pretrained(backbone(), tmp_path / "with_head")
    assert run("merge", f"{HERE}:make", tmp_path / "with_head", output) == 0
    merged.load_state_dict(safetensors.torch.load_file(output))
    assert torch.allclose(logits(merged), logits(adapted_model), atol=1e-5), "its head lies where the base's was"


def test_what_cannot_be_merged(
    folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.safetensors"
    failed(capsys, "cannot be merged: its ", "merge", f"{HERE}:make", folder, output)
    failed(capsys, "belongs to other weights of the backbone", "merge", f"{HERE}:make_other", lora, output)
    failed(capsys, "a name that ends with .safetensors", "merge", f"{HERE}:make", lora, tmp_path / "x.pt")
    (tmp_path / "file").write_text("x")
    failed(capsys, "File exists", "merge", f"{HERE}:make", lora, tmp_path / "file" / "x.safetensors")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "replace", full)
    failed(capsys, "No space left on device", "merge", f"{HERE}:make", lora, output)
    assert sorted(tmp_path.iterdir()) == before


def test_warnings_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(backbone().half(), BitFitConfig(modules_to_save=[])).save_pretrained(tmp_path / "half")
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of tests
        assert run("merge", f"{HERE}:make", tmp_path / "half", tmp_path / "x.safetensors") == 0
    err = capsys.readouterr().err
    assert err.startswith("point-peft: warning: the adapter was trained on a base in float16") and err.count("\n") == 1


# ---- the Hub ----


def test_push_and_pull(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(2).save_pretrained(folder / "task")
    (folder / "notes").mkdir()
    (folder / "notes" / "secret").write_text("x")
    pushed: dict[str, Any] = {}

    def push(upload: Upload) -> str:
        pushed.update(vars(upload))
        return "https://hub/alice/x/commit/1"

    def download(repo_id: str, place: Place) -> Path:
        pushed.update(repo_id=repo_id, download=place)
        return folder / (place.subfolder or "")

    monkeypatch.setattr(cli, "push", push)
    monkeypatch.setattr(cli, "download", download)
    assert run("push", folder, "alice/x") == 0
    assert capsys.readouterr().out == "https://hub/alice/x/commit/1\n"
    names = [CONFIG_FILE, TENSOR_FILE]
    assert set(pushed["files"]) == {*names, *(f"task/{name}" for name in names), "README.md"}
    assert all(pushed["files"][name] == (folder / name).read_bytes() for name in names)
    text = pushed["files"]["README.md"].decode()
    assert 'from_pretrained(backbone, "alice/x")' in text and 'subfolder="task")' in text and "path/to" not in text
    assert pushed["private"] is None and pushed["create_pr"] is False and pushed["revision"] is pushed["token"] is None
    options = ["--private", "--create-pr", "--message", "m", "--revision", "r", "--token", "t", "--subfolder", "s/t"]
    assert run("push", folder / "task", "alice/x", *options) == 0
    assert set(pushed["files"]) == {*(f"s/t/{name}" for name in names), "README.md"}
    assert 'subfolder="s/t")' in pushed["files"]["README.md"].decode()
    assert [pushed[name] for name in ("private", "create_pr", "message", "revision", "token")] == [
        *(True, True, "m", "r", "t")
    ]
    capsys.readouterr()

    assert run("pull", "alice/x", tmp_path / "got", "--subfolder", "task", "--revision", "r", "--token", "t") == 0
    assert pushed["download"] == Place(revision="r", subfolder="task", token="t")
    assert capsys.readouterr().out == f"{tmp_path / 'got'}\n"
    assert {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir()} == {
        name: (folder / "task" / name).read_bytes() for name in names
    }
    assert (
        run("inspect", "alice/x", "--subfolder", "task", "--json") == run("diff", "alice/x", folder / "task") - 1 == 0
    )
    assert json.loads(capsys.readouterr().out.split("\n---")[0])["folder"] == str(folder / "task")


def test_what_is_not_pushed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError

    monkeypatch.setattr(cli, "push", refuse)
    failed(capsys, "there is no folder", "push", tmp_path / "none", "alice/x")
    (tmp_path / "empty").mkdir()
    failed(capsys, "there is no adapter in", "push", tmp_path / "empty", "alice/x")
    (folder / PENDING_CONFIG_FILE).write_text("{}")
    failed(capsys, "was interrupted: load the adapter and save it again", "push", folder, "alice/x")
    (folder / PENDING_CONFIG_FILE).unlink()
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")
    failed(capsys, "README.md' is a link: only files are pushed", "push", folder, "alice/x")
    (folder / "README.md").unlink()
    (folder / "README.md").write_text("---\na: [\n---\n")
    failed(capsys, "the YAML at the beginning of the card cannot be read", "push", folder, "alice/x")
    damaged(folder, "nan")
    failed(capsys, "holds values that are not finite", "push", folder, "alice/x")
    (folder / TENSOR_FILE).write_bytes(b"x")
    failed(capsys, "is not a safetensors file", "push", folder, "alice/x")


def test_errors_of_the_hub_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Path:
        raise OSError("first line\nsecond line")

    monkeypatch.setattr(cli, "download", fail)
    failed(capsys, "first line second line", "pull", "alice/x", "somewhere")


def test_through_the_real_client(
    hub: HubServer, folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", folder, "alice/x", "--private", "--base-license", "mit") == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/alice/x/commit/")
    assert run("push", lora, "alice/x", "--subfolder", "tasks/lora", "--base-license", "mit") == 0
    assert run("pull", "alice/x", tmp_path / "one") == run("diff", folder, tmp_path / "one") == 0
    assert run("pull", "alice/x", tmp_path / "two", "--subfolder", "tasks/lora") == run("diff", lora, tmp_path / "two")
    text = Path(hf_hub_download("alice/x", "README.md")).read_text(encoding="utf-8")
    assert text.count("<!-- begin point-peft") == 2 and ModelCard(text).data.get("base_model") == "someone/base"
    assert run("inspect", "alice/x") == 0
    capsys.readouterr()

    HfApi().upload_file(
        path_or_fileobj=text.replace("<!--", "Mine.\n\n<!--", 1).encode(), path_in_repo="README.md", repo_id="alice/x"
    )
    adapted(7).save_pretrained(folder)
    assert run("push", folder, "alice/x", "--create-pr", "--base-license", "mit") == 0
    assert capsys.readouterr().out == f"{hub.url}/alice/x/discussions/1\n"
    assert run("diff", "alice/x", folder) == 1
    text = Path(hf_hub_download("alice/x", "README.md", revision="refs/pr/1")).read_text(encoding="utf-8")
    assert text.count("Mine.") == 1 and text.count("<!-- begin point-peft") == 2
    capsys.readouterr()
    failed(capsys, "there is no repository 'alice/none'", "inspect", "alice/none")
    failed(capsys, "has no revision 'none'", "pull", "alice/x", tmp_path / "no", "--revision", "none")
    failed(capsys, "there is no repository 'alice/x' that can be seen", "inspect", "alice/x", "--token", "hf_bob")
    failed(capsys, "the Hub refuses 'alice/y'", "push", folder, "alice/y", "--token", "hf_bob")
    assert not (tmp_path / "no").exists()
