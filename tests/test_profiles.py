"""Profiles for a label at every point: what each trains, and the head of an encoder that has none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from point_peft import AdapterError, LoraConfig, PeftConfig, PointPEFTConfig, PointPeftModel, profiles
from point_peft.profiles import Concatenated, Decoder, Level, PerPoint, per_point
from tests.adapting import rescramble
from tests.zoo import BACKBONES, CLASSES, operators, pointcept
from tests.zoo.inputs import voxel_clouds, voxel_dict
from tests.zoo.torch_pointcloud import model_class

WIDTHS = (16, 24)
CELLS: Mapping[str, Any] = voxel_dict(2, 0)[0]
LORA = LoraConfig(target_modules=["qkv"])


class Encoder(pointcept.PointTransformerV3):
    """Pointcept's PTv3 without decoder: it returns the coarsest points, which hold what they were pooled of."""

    def __init__(self) -> None:
        super().__init__(*WIDTHS)
        del self.dec, self.seg_head

    def forward(self, data: dict[str, Tensor]) -> Any:
        point = pointcept.Point(data)
        point.serialize()
        point.sparsify()
        return self.enc(self.embedding(point))


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Encoder().eval()


def model(seed: int = 0, decoder_width: int | None = None) -> PerPoint:
    return per_point(encoder(seed), CLASSES, example_inputs=(CELLS,), decoder_width=decoder_width)


def trained(adapted: nn.Module) -> set[str]:
    """The first names of what is trained, without "base_model"."""
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    return {name.removeprefix("base_model.").split(".")[0] for name in names}


def rows(adapted: PointPeftModel) -> set[str]:
    """The first names of the modules that have something of the adapter."""
    return {row.name.split(".")[0] for row in adapted.get_layer_status()}


def test_the_stages_are_unpooled_and_concatenated() -> None:
    own = model()
    point = own.encoder(CELLS)
    fine, coarse = point["pooling_parent"]["feat"], point["feat"]
    expected = own.head(torch.cat([fine, coarse[point["pooling_inverse"]]], dim=1))
    assert own.head.in_features == sum(WIDTHS)
    assert torch.equal(own(CELLS), expected)
    adapted = profiles.adapter(own, LORA).eval()
    assert torch.equal(adapted(CELLS), expected)
    rescramble(adapted)
    assert not torch.allclose(adapted(CELLS), expected)


def test_what_each_profile_trains() -> None:
    assert rows(profiles.linear_probe(model())) == {"head"}
    assert rows(profiles.adapter(model(), LORA)) == {"encoder", "head"}
    assert trained(profiles.full(model(decoder_width=8))) == {"encoder", "decoder", "head"}


def test_a_decoder_that_was_never_trained_is_noise_to_a_probe_and_a_warning_says_so() -> None:
    with pytest.warns(UserWarning, match="^frozen, and no pre-training fills: 'decoder'\\. If"):
        assert rows(profiles.linear_probe(model(decoder_width=8))) == {"head"}


def test_what_the_profiles_with_a_decoder_train() -> None:
    assert rows(profiles.decoder_probe(model(decoder_width=8))) == {"decoder", "head"}
    both = PeftConfig(tuners=[LORA, PointPEFTConfig(num_prompts=0)])
    assert rows(profiles.adapter_with_decoder(model(decoder_width=8), both)) == {"encoder", "decoder", "head"}


def test_blocks_of_a_decoder_that_is_trained_get_no_parts() -> None:
    torch.manual_seed(0)
    whole = pointcept.PointTransformerV3()
    adapted = profiles.adapter_with_decoder(whole, LORA, decoder="dec")
    status = adapted.get_layer_status()
    assert {row.name for row in status if not row.name.startswith("enc.")} == {"dec", "seg_head"}
    later = LoraConfig(target_modules=["qkv"], layers_to_transform=[1])
    adapted = profiles.adapter_with_decoder(pointcept.PointTransformerV3(), later, decoder="dec")
    assert {row.name for row in adapted.get_layer_status()} == {"enc.enc0.block1.attn.qkv", "dec", "seg_head"}


def test_decoder_and_head_travel_with_the_adapter(tmp_path: Path) -> None:
    adapted = profiles.adapter_with_decoder(model(decoder_width=8), LORA).eval()
    rescramble(adapted)
    expected = adapted(CELLS)
    adapted.save_pretrained(tmp_path)
    fresh = model(decoder_width=8)
    fresh.encoder.load_state_dict(encoder().state_dict())
    with torch.no_grad():
        for p in [*fresh.decoder.parameters(), *fresh.head.parameters()]:
            p.normal_()
    assert not torch.equal(fresh(CELLS), expected)
    again = PointPeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(again(CELLS), expected)


@pytest.mark.skipif("torch_pointcloud_sonata" not in BACKBONES, reason="torch-pointcloud or spconv is not installed")
def test_the_concatenation_is_that_of_published_models() -> None:
    """torch-pointcloud's SonataSegmentation, and its encoder alone with the same head."""
    operators.supply_spconv_on_cpu()
    torch.manual_seed(0)
    kind = model_class("sonata", "SonataSegmentation")
    small = {"encoder_channels": WIDTHS, "encoder_depths": (1, 1), "encoder_num_heads": (2, 4), "strides": (2,)}
    whole = kind(3, CLASSES, **small, encoder_patch_size=(16, 16), use_flash_attn=False).eval()
    features, cells, samples = voxel_clouds(2, 0)
    example = {"x": features, "pos_grid": cells, "batch": samples, "return_intermediates": True}
    ours = per_point(whole.encoder, CLASSES, example_inputs=example)
    ours.head.load_state_dict(whole.head.state_dict())
    assert torch.equal(ours(**example), whole(features, cells, samples))
    adapted = profiles.adapter(ours, LORA, example_inputs=example)
    assert rows(adapted) == {"encoder", "head"}


def test_the_decoder_gives_each_point_what_it_was_pooled_into() -> None:
    """A change of a coarse token reaches its own points and no others."""
    torch.manual_seed(0)
    inverse = torch.tensor([0, 1, 1, 0])
    decoder = Decoder((4, 6), 5)
    fine, coarse = torch.randn(4, 4), torch.randn(2, 6)
    changed = coarse + torch.tensor([[0.0], [1.0]]) * torch.randn(6)
    before = decoder([Level(fine, inverse), Level(coarse, None)])
    after = decoder([Level(fine, inverse), Level(changed, None)])
    assert (before != after).any(dim=1).tolist() == [False, True, True, False]


def test_an_encoder_that_was_training_goes_on_and_its_statistics_stay() -> None:
    torch.manual_seed(0)
    own = Encoder().train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    assert per_point(own, CLASSES, example_inputs=(CELLS,)).training
    assert own.training
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_an_encoder_without_stages_is_refused() -> None:
    with pytest.raises(AdapterError, match="returned a Tensor without its stages; needed: a mapping with 'feat'"):
        per_point(nn.Linear(3, 4), CLASSES, example_inputs=torch.rand(5, 3))
    with pytest.raises(AdapterError, match="returned a tuple without its stages.*return_intermediates=True"):
        profiles.levels_of((torch.rand(2, 3), torch.rand(2, 3)))


def test_a_decoder_that_is_not_there_is_refused() -> None:
    with pytest.raises(AdapterError, match="no module is called 'decoders'; nearest: 'decoder'"):
        profiles.decoder_probe(model(decoder_width=8), decoder="decoders")
    with pytest.raises(AdapterError, match="'decoder' has nothing to train: make one by .*decoder_width"):
        profiles.decoder_probe(model())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"no head was found in the Encoder: make one by .*per_point"):
        profiles.linear_probe(encoder())


def test_without_a_decoder_the_tokens_are_those_of_the_encoder() -> None:
    levels = [Level(torch.rand(3, 2), None)]
    assert torch.equal(Concatenated()(levels), levels[0].features)


@pytest.mark.skipif("torch_pointcloud_sonata" not in BACKBONES, reason="torch-pointcloud or spconv is not installed")
def test_a_long_scene_goes_through_a_sliding_window_chunk_by_chunk() -> None:
    """What torch-pointcloud's inferer stitches is what the adapted model says of every chunk alone."""
    operators.supply_ocnn()
    kind = importlib.import_module("torch_pointcloud.inferers").SlidingWindowInferer
    adapted = profiles.adapter(model(), PointPEFTConfig()).eval()
    rescramble(adapted)
    cells = voxel_dict(1, 1)[0]
    rows, said = torch.arange(len(cells["coord"])), []

    def predict(window: dict[str, Tensor]) -> Tensor:
        alone = {**window, "offset": torch.tensor([len(window["row"])])}
        logits: Tensor = adapted(alone)
        said.append((window["row"], logits))
        return logits

    window = {
        "pos": cells["coord"],
        "row": rows,
        **{name: cells[name] for name in ("coord", "grid_coord", "feat", "batch")},
    }
    with torch.no_grad():
        stitched = kind(block_size=1.0, dims=(0, 1))(window, predict)
        plain = adapted.base_model
        with adapted.disable_adapter():
            whole = plain(cells)
    assert len(said) > 1 and sorted(torch.cat([own for own, _ in said]).tolist()) == rows.tolist()
    for own, logits in said:
        torch.testing.assert_close(stitched[own], logits)
    assert (stitched - whole).abs().max() > 1e-3
