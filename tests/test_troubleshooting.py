"""docs/troubleshooting.md: whoever makes the mistake gets the words of the heading; every class of errors is there."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from point_peft import (
    LinearProbeConfig,
    LoraConfig,
    PointPEFTConfig,
    PointPeftModel,
    TunerConfig,
    VPTConfig,
    cli,
    describe,
    errors,
    get_peft_model,
)
from point_peft.backbones import PointTransformer, load_checkpoint
from point_peft.data.opening import open_data
from point_peft.data.options import DataOptions
from point_peft.data.preparing import Preparation, prepare
from point_peft.data.reading import read_cloud
from point_peft.hub import asking
from point_peft.training import Recipe, fit
from tests.hub_server import HubServer
from tests.test_train_command import TINY, cloud, ply, write_rocks
from tests.zoo import BACKBONES

pytest_plugins = ["tests.hub_fixture"]

TEXT = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text("utf-8")
KINDS = dict(re.findall(r"^### `(.+)`\n(`\w+`|A warning)", TEXT, flags=re.MULTILINE))
"""Heading -> the class of the error, or that it is a warning."""
Mistake = TypeVar("Mistake", bound=Callable[..., object])
MISTAKES: dict[str, Callable[[], object]] = {}
ON_THE_HUB: dict[str, Callable[[HubServer], object]] = {}
CLOUDS = torch.rand(4, 64, 3)
SIZES = {"trans_dim": 24, "depth": 2, "num_heads": 2, "encoder_dims": 24, "num_group": 8, "group_size": 8}
BLOCKS_ONLY = LoraConfig(modules_to_save=[])


def says(heading: str) -> Callable[[Mistake], Mistake]:
    """The decorated function makes the mistake of that heading; one with an argument makes it on a Hub."""

    def note(mistake: Mistake) -> Mistake:
        (ON_THE_HUB if inspect.signature(mistake).parameters else MISTAKES)[heading] = mistake
        return mistake

    return note


def said(mistake: Callable[[], object]) -> tuple[str, str]:
    """The words of the error or the warnings that a mistake leads to, and which kind that is, as the page says it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake()
        except ValueError as error:
            return f"`{type(error).__name__}`", str(error)
    return "A warning", "\n".join(str(warning.message) for warning in caught)


def check(heading: str, mistake: Callable[[], object]) -> None:
    kind, words = said(mistake)
    pattern = ".*".join(re.escape(part.strip()) for part in heading.split("…"))
    assert re.search(pattern, words, re.DOTALL), words
    assert kind == KINDS[heading]


def test_every_heading_has_its_mistake_and_every_class_its_row() -> None:
    assert list(KINDS) == re.findall(r"^### `(.+)`$", TEXT, flags=re.MULTILINE)
    assert set(KINDS) == {*MISTAKES, *ON_THE_HUB}
    classes = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, ValueError)}
    assert classes == set(re.findall(r"^\| `(\w+)` \|", TEXT, flags=re.MULTILINE))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def backbone(cls_dim: int = 5, **sizes: int) -> PointTransformer:
    torch.manual_seed(0)
    return PointTransformer(**(SIZES | sizes), cls_dim=cls_dim)  # type: ignore[arg-type]


def adapted(config: TunerConfig | None = None) -> PointPeftModel:
    return get_peft_model(backbone(), config or LoraConfig())


def saved(config: TunerConfig | None = None) -> Path:
    path = Path("adapter")
    model = adapted(config)
    model(CLOUDS)
    model.save_pretrained(path, format="point_peft")
    return path


def saved_with(path: Path, **fields: object) -> Path:
    """The saved adapter with other fields in its configuration."""
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


class Own(nn.Module):
    """Blocks that no preset knows; how they are called is left to subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 24)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True) for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, points: Tensor) -> Tensor:
        tokens = self.tokens(points)
        for block in self.blocks:
            tokens = self.advance(block, tokens)
        return self.logits(tokens.amax(1))

    def tokens(self, points: Tensor) -> Tensor:
        tokens: Tensor = self.embed(points)
        return tokens

    def advance(self, block: nn.Module, tokens: Tensor) -> Tensor:
        advanced: Tensor = block(tokens)
        return advanced

    def logits(self, feature: Tensor) -> Tensor:
        logits: Tensor = self.head(feature)
        return logits


def named_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5))


# ---- adapting a backbone ---------------------------------------------------------------------------------------------


@says("no module matches")
def _() -> None:
    adapted(LoraConfig(target_modules=["qvk"]))


@says("no preset describes … pass example_inputs")
def _() -> None:
    get_peft_model(Own(), LoraConfig())


@says("no transformer block was found in")
def _() -> None:
    model = get_peft_model(named_layers(), LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert model(CLOUDS).shape == (4, 64, 5), "as the page says"
    describe(named_layers(), CLOUDS)


class Queries(Own):
    """Tokens that lie nowhere."""

    def tokens(self, points: Tensor) -> Tensor:
        tokens: Tensor = super().tokens(points).unflatten(1, (8, 8)).mean(1)
        return tokens


@says("needs to know where the tokens of … lie in space")
def _() -> None:
    get_peft_model(Queries(), PointPEFTConfig(), example_inputs=(CLOUDS,))


@says("puts prompts among the tokens of … which has no place for")
def _() -> None:
    get_peft_model(BACKBONES["official_ptv1"].build(), PointPEFTConfig(num_prompts=4))


@says("the adapter would have nothing to train")
def _() -> None:
    adapted(LinearProbeConfig(modules_to_save=[]))


@says("frozen, and no pre-training fills")
def _() -> None:
    adapted(LoraConfig(modules_to_save=["norm"]))


@says("is part of an adapted model already")
def _() -> None:
    get_peft_model(adapted().get_base_model(), LoraConfig())


@says("is compiled already, and what is compiled sees no adapter")
def _() -> None:
    get_peft_model(torch.compile(backbone()), LoraConfig())  # type: ignore[arg-type]


@says("there is an adapter … already")
def _() -> None:
    adapted().add_adapter("default", LoraConfig())


@says("there is no adapter … adapters:")
def _() -> None:
    adapted().set_adapter("grasp")


@says("; allowed:")
def _() -> None:
    LoraConfig(r=0)


# ---- in a forward ----------------------------------------------------------------------------------------------------


@says("points must be (b, n, … in_channels")
def _() -> None:
    adapted()(CLOUDS[0])


@says("each of at least … because this backbone makes")
def _() -> None:
    adapted()(CLOUDS[:, :4])


class Fused(Own):
    def logits(self, feature: Tensor) -> Tensor:
        logits: Tensor = nn.functional.linear(feature, self.head.weight, self.head.bias)
        return logits


@says("had no effect, because that module")
def _() -> None:
    get_peft_model(Fused(), LoraConfig(target_modules=["head"], modules_to_save=[]))(CLOUDS)


class Frozen(Own):
    def tokens(self, points: Tensor) -> Tensor:
        with torch.no_grad():
            return super().tokens(points)

    def advance(self, block: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return super().advance(block, tokens)


@says("trained tensors get no gradient")
def _() -> None:
    get_peft_model(Frozen(), LoraConfig(target_modules=["linear1"], modules_to_save=["head"])).train()(CLOUDS)


class Reentrant(Own):
    def advance(self, block: nn.Module, tokens: Tensor) -> Tensor:
        advanced: Tensor = checkpoint(block, tokens, use_reentrant=True) if self.training else block(tokens)
        return advanced


@says("needs their gradient … use_reentrant=False")
def _() -> None:
    get_peft_model(Reentrant().eval(), VPTConfig(mode="shallow"), example_inputs=(CLOUDS,)).train()(CLOUDS)


@says("the memory bank is empty")
def _() -> None:
    adapted(PointPEFTConfig(memory_bank=True))(CLOUDS)


@says("adapter_names is for inference")
def _() -> None:
    adapted().train()(CLOUDS, adapter_names=["default"] * 4)


@says("was compiled since something was attached")
def _() -> None:
    model = adapted()
    blocks = model.blocks.blocks
    blocks[0] = torch.compile(blocks[0])
    model(CLOUDS)


@says("no parameter is trainable")
def _() -> None:
    PointPeftModel.from_pretrained(backbone(), saved()).parameter_groups(3e-3)


@says("cannot be merged: its … is not a change of the backbone's weights")
def _() -> None:
    adapted(PointPEFTConfig()).merge_and_unload()


@says("is merged into the backbone: call unmerge() first")
def _() -> None:
    model = adapted(BLOCKS_ONLY)
    model.merge()
    model.add_adapter("grasp", LoraConfig())


# ---- saving and loading ----------------------------------------------------------------------------------------------


@says("this adapter belongs to other weights of the backbone")
def _() -> None:
    other = backbone()
    nn.init.normal_(other.norm.weight)
    PointPeftModel.from_pretrained(other, saved())


@says("this adapter belongs to another backbone")
def _() -> None:
    PointPeftModel.from_pretrained(backbone(encoder_dims=32), saved())


@says("the adapter was made for other modules: this model")
def _() -> None:
    PointPeftModel.from_pretrained(backbone(depth=3), saved())


@says("the adapter has its own … this model has not")
def _() -> None:
    headless = backbone()
    del headless.cls_head_finetune
    PointPeftModel.from_pretrained(headless, saved())


@says("which a file cannot describe … pass heads=")
def _() -> None:
    model = get_peft_model(backbone(), LoraConfig(), heads={"cls_head_finetune": Maximum})
    model.save_pretrained("adapter")
    PointPeftModel.from_pretrained(backbone(), "adapter")


class Maximum(nn.Linear):
    """A head of a class of the user's own."""

    def __init__(self) -> None:
        super().__init__(48, 5)


@says("there is no folder")
def _() -> None:
    PointPeftModel.from_pretrained(backbone(), "./adapters/digits")


@says("is damaged, or another program has changed it")
def _() -> None:
    file = saved() / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    PointPeftModel.from_pretrained(backbone(), "adapter")


@says("method … is unknown; known methods")
def _() -> None:
    PointPeftModel.from_pretrained(backbone(), saved_with(saved(PointPEFTConfig()), tuners=[{"method": "GATE"}]))


@says("has no field … a newer version of point_peft may have written it")
def _() -> None:
    tuners = [{"method": "POINT_PEFT", "curvature": 2}]
    PointPeftModel.from_pretrained(backbone(), saved_with(saved(PointPEFTConfig()), tuners=tuners))


@says("have not run in any forward so far")
def _() -> None:
    model = Own()
    model.auxiliary = nn.Linear(24, 5)
    names = ["head", "auxiliary"]
    peft_model = get_peft_model(model, LoraConfig(target_modules=["linear1"], modules_to_save=names))
    peft_model(CLOUDS)
    peft_model.save_pretrained("adapter")


@says("cannot be saved in PEFT's format")
def _() -> None:
    adapted(PointPEFTConfig()).save_pretrained("adapter", format="peft")


@says("of PEFT's LoraConfig is not implemented here")
def _() -> None:
    adapted(BLOCKS_ONLY).save_pretrained("adapter", format="peft")
    PointPeftModel.from_pretrained(backbone(), saved_with(Path("adapter"), layer_replication=[[0, 1]]))


def load(content: object) -> None:
    torch.save(content, "pretrain.pth")
    load_checkpoint(backbone(), "pretrain.pth")


@says("no tensor fits the model")
def _() -> None:
    load({"stem.weight": torch.rand(3)})


@says("fills less than half of the encoder")
def _() -> None:
    load({name: value for name, value in backbone().state_dict().items() if name.startswith("encoder.first")})


@says("in the file and … in the model")
def _() -> None:
    load(backbone(trans_dim=32).state_dict())


@says("cannot be read as tensors only")
def _() -> None:
    load({"base_model": backbone().state_dict(), "options": Recipe()})


# ---- data ------------------------------------------------------------------------------------------------------------


def command(*words: str) -> None:
    """What `point-peft` does, but that the error is not told in a line."""
    options = cli._parser().parse_args(list(words))
    options.arguments = list(words)
    options.run(options)


def train(*words: str) -> None:
    command("train", str(write_rocks(Path("rocks"), each=4)), "--out", "run", *words)


@says("no reader knows the suffix")
def _() -> None:
    Path("scan.blend").touch()
    read_cloud(Path("scan.blend"))


@says("which cannot be imported … pip install")
def _() -> None:
    Path("scan.laz").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "laspy", None)
        read_cloud(Path("scan.laz"))


@says("points hold NaN or infinity and are dropped")
def _() -> None:
    points = cloud("ball", 0)
    points[0] = np.nan
    ply(Path("ball.ply"), points)
    prepare(read_cloud(Path("ball.ply")), Preparation(num_points=64), np.random.default_rng(0))


@says("clouds of train have … give --num-points")
def _() -> None:
    train(*TINY, "--num-points", "none")


@says("points and channels: set num_points")
def _() -> None:
    clouds = open_data(write_rocks(Path("rocks")), DataOptions(preparation=Preparation(num_points=None)))
    fit(get_peft_model(backbone(3), LoraConfig()), clouds.part("train"), recipe=ONE_EPOCH, out="run")


@says("has no folders of classes")
def _() -> None:
    ply(Path("scans/ball_0.ply"), cloud("ball", 0))
    open_data("scans", DataOptions())


@says("the split … has no cloud of")
def _() -> None:
    open_data(write_rocks(Path("rocks"), each=4), DataOptions())


@says("clouds to train on and … to test with, but ways is")
def _() -> None:
    train(*TINY, "--few-shot", "5x10")


@says("so that one would test what has been trained on")
def _() -> None:
    write_rocks(Path("rocks"))
    rows = [f"rocks/ball/ball_{n}.ply,ball,{split},{n % 2}" for n, split in enumerate(("train", "train", "test"))]
    Path("scans.csv").write_text("\n".join(["file,label,split,group", *rows]))
    open_data("scans.csv", DataOptions())


@says("no cloud and no point has a label")
def _() -> None:
    write_rocks(Path("rocks"))
    Path("scans.csv").write_text("\n".join(["file", *(f"rocks/ball/ball_{number}.ply" for number in range(6))]))
    command("train", "scans.csv", "--out", "run", *TINY)


# ---- training --------------------------------------------------------------------------------------------------------

ONE_EPOCH = Recipe(epochs=1, batch_size=2, augment=())


class Labelled(Dataset[tuple[Tensor, int]]):
    def __init__(self, labels: tuple[int, ...] = (0, 1, 2, 0), fill: float | None = None) -> None:
        self.labels = labels
        self.fill = fill

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        points = torch.rand(64, 3) if self.fill is None else torch.full((64, 3), self.fill)
        return points, self.labels[index]


def fitted(clouds: Labelled | None = None, outputs: int = 3, recipe: Recipe = ONE_EPOCH, resume: bool = False) -> None:
    model = get_peft_model(backbone(outputs), LoraConfig())
    fit(model, clouds or Labelled(), recipe=recipe, out="run", classes=("ball", "box", "sheet"), resume=resume)


@says("is not empty and holds no run")
def _() -> None:
    Path("run").mkdir()
    Path("run/notes.txt").touch()
    train(*TINY)


@says("holds an unfinished run: go on with --resume")
def _() -> None:
    fitted()
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps(record | {"finished": False}))
    fitted()


@says("holds a finished run")
def _() -> None:
    fitted()
    fitted()


@says("holds a run with another … say the same again")
def _() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(*TINY)
    train(*TINY, "--method", "lora", "--resume")


@says("its last layer must have")
def _() -> None:
    fitted(outputs=5)


@says("has the label … but there are")
def _() -> None:
    fitted(Labelled((1, 2, 3, 1)))


@says("the loss of step … is")
def _() -> None:
    fitted(Labelled(fill=float("nan")))


@says("Expected more than 1 value per channel when training")
def _() -> None:
    fitted(recipe=Recipe(epochs=1, batch_size=1))


@says("has no weights here, and an adapter on noise learns little")
def _() -> None:
    train("--backbone", "point-mae")


# ---- the Hub ---------------------------------------------------------------------------------------------------------

REPO = "alice/adapter"


def pushed(*, license: str | None = None, private: bool | None = None) -> None:
    model = adapted()
    model(CLOUDS)
    model.push_to_hub(REPO, license=license, private=private)


def pulled(**where: object) -> None:
    PointPeftModel.from_pretrained(backbone(), REPO, **where)  # type: ignore[arg-type]


@says("there is no repository … that can be seen")
def _(hub: HubServer) -> None:
    pulled()


@says("is gated: accept its conditions")
def _(hub: HubServer) -> None:
    pushed()
    hub.repo(REPO).gated = "manual"
    pulled(token="hf_bob")


@says("has no revision")
def _(hub: HubServer) -> None:
    pushed()
    pulled(revision="v2")


@says("the token is wrong or may not do this")
def _(hub: HubServer) -> None:
    pushed()
    adapted().push_to_hub(REPO, token="hf_bob")


@says("is not in the cache, and was not asked for on the Hub")
def _(hub: HubServer) -> None:
    pulled(local_files_only=True)


@says("is taken from the cache, commit")
def _(hub: HubServer) -> None:
    pushed()
    pulled()
    hub.fault("GET", "/api/models", status=503, times=9)
    pulled()


@says("private is asked for, and … exists and is public")
def _(hub: HubServer) -> None:
    pushed()
    pushed(private=True)


@says("has no file 'adapter_config.json'")
def _(hub: HubServer) -> None:
    hub.put(REPO, {"config.json": b"{}"})
    pulled()


@says("which forbids commercial use")
def _(hub: HubServer) -> None:
    model = adapted()
    model(CLOUDS)
    model.push_to_hub(REPO, base_license="cc-by-nc-4.0", license="mit")


@pytest.mark.parametrize("heading", MISTAKES)
def test_a_mistake_is_told_by_the_words_of_its_heading(heading: str, folder: Path) -> None:
    check(heading, MISTAKES[heading])


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
@pytest.mark.parametrize("heading", ON_THE_HUB)
def test_a_mistake_on_the_hub_is_told_by_the_words_of_its_heading(
    heading: str, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=lambda seconds: None))
    check(heading, lambda: ON_THE_HUB[heading](hub))


class Checkpointed(Own):
    """Without a part at the blocks, nothing that goes into them takes a gradient."""

    def advance(self, block: nn.Module, tokens: Tensor) -> Tensor:
        advanced: Tensor = checkpoint(block, tokens, use_reentrant=True)
        return advanced


@pytest.mark.parametrize(
    ("words", "clouds"),
    [("None of the inputs have requires_grad=True", CLOUDS), ("mat1 and mat2 must have the same dtype", CLOUDS.half())],
)
def test_what_torch_says_is_on_the_page(words: str, clouds: Tensor) -> None:
    assert f"`{words}`" in TEXT
    model = get_peft_model(Checkpointed(), LinearProbeConfig(modules_to_save=["head"]))
    with pytest.raises((RuntimeError, UserWarning), match=words):
        model(clouds)
