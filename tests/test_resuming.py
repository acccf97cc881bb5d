"""What is kept beside an adapter's own files: state dicts of whole models, copies and running averages of them."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from point_peft import PeftConfig, PointPeftModel, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.errors import AdapterFileError
from point_peft.files.format import TENSOR_FILE
from tests.adapting import METHOD_NAMES, adapt, banks, build_bank, distance, in_groups, rescramble, run
from tests.methods import config
from tests.zoo import BACKBONES
from tests.zoo.operators import supply_torchvision_schemas

Update = Callable[[nn.Module], Any]
TINY = BACKBONES["point_mae"]
pytestmark = pytest.mark.filterwarnings("ignore:the memory bank is empty")


def composed(methods: Sequence[str], **changes: Any) -> PeftConfig:
    """All of them in one adapter."""
    return PeftConfig(tuners=tuple(config(method, **changes) for method in methods))


def fresh(methods: Sequence[str], seed: int = 1, **changes: Any) -> PointPeftModel:
    """A freshly adapted model: its bank, if it has any, holds no rows."""
    torch.manual_seed(seed)
    model = get_peft_model(TINY.build(), composed(methods, **changes)).eval()
    rescramble(model, seed=seed)
    return model


def rows(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter's banks."""
    assert isinstance(model, PointPeftModel)
    found = banks(get_adapter(model, "default"))
    return {name: tensor for bank in found for name, tensor in bank.named_buffers()}


def fill(model: PointPeftModel) -> None:
    if rows(model):
        build_bank(model, TINY, "default")


def assert_alike(model: nn.Module, other: nn.Module, what: str = "") -> None:
    """Equal bit for bit, in what they hold and in what they give."""
    found, wanted = model.state_dict(), other.state_dict()
    assert list(found) == list(wanted), what
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), what
    assert torch.equal(run(model, TINY), run(other, TINY)), what


# ---- state dicts -----------------------------------------------------------------------------------------------------


@in_groups(METHOD_NAMES)
def test_the_state_dict_of_a_run_is_loaded_into_a_freshly_adapted_model(methods: Sequence[str]) -> None:
    trained = adapt(TINY, composed(methods))
    for assign in (False, True):
        model = fresh(methods)
        types = {name: tensor.dtype for name, tensor in rows(model).items()}
        state = copy.deepcopy(trained.state_dict())
        assert model.load_state_dict(state, assign=assign) == ([], [])
        assert_alike(model, trained)
        assert all(len(tensor) > 0 and tensor.dtype == types[name] for name, tensor in rows(model).items())
    # The other way round: a state dict is taken as it is.
    before = fresh(methods, seed=2)
    trained.load_state_dict(before.state_dict())
    assert_alike(trained, before)


@in_groups(METHOD_NAMES)
def test_accelerate_resumes_a_run(methods: Sequence[str], tmp_path: Path) -> None:
    trained, model = adapt(TINY, composed(methods)), fresh(methods)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(trained)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    accelerator.prepare(model)
    accelerator.load_state(str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_alike(model, trained)


def test_rows_of_another_width_are_refused_and_the_bank_is_kept() -> None:
    model = fresh(["POINT_PEFT"])
    fill(model)
    (key,) = [name for name in model.state_dict() if name.endswith(".rows")]
    before = model.state_dict()[key].clone()
    for wrong in (torch.ones(30, 23), torch.ones(30), torch.ones(2, 30, 24), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"size mismatch for .*memory_bank\.rows"):
            model.load_state_dict({**model.state_dict(), key: wrong})
        assert torch.equal(model.state_dict()[key], before)
    with pytest.raises(RuntimeError, match=r"memory_bank\.rows.*expected torch.Tensor"):
        model.load_state_dict({**model.state_dict(), key: [1.0]})
    without = {name: tensor for name, tensor in model.state_dict().items() if name != key}
    with pytest.raises(RuntimeError, match=r"Missing key.*memory_bank\.rows"):
        model.load_state_dict(without)
    assert model.load_state_dict(without, strict=False).missing_keys == [key]
    assert torch.equal(model.state_dict()[key], before)


@in_groups(METHOD_NAMES)
def test_what_is_built_in_inference_mode_can_be_loaded_into(methods: Sequence[str]) -> None:
    trained, model, averaged = adapt(TINY, composed(methods)), fresh(methods), None
    with torch.inference_mode():
        averaged = AveragedModel(model)
        fill(model)
        model.load_state_dict(model.state_dict())
    assert not any(tensor.is_inference() for held in (model, averaged.module) for tensor in rows(held).values())
    model.load_state_dict(trained.state_dict())
    assert_alike(model, trained)
    other = fresh(methods)
    with torch.inference_mode():
        other.load_state_dict(trained.state_dict())
    other.load_state_dict(trained.state_dict())
    assert_alike(other, trained)


# ---- copies and averages ---------------------------------------------------------------------------------------------


def torch_average(**options: Any) -> Callable[[nn.Module], tuple[nn.Module, Update]]:
    def make(model: nn.Module) -> tuple[nn.Module, Update]:
        averaged = AveragedModel(model, **options)
        return averaged.module, averaged.update_parameters

    return make


def timm_average(name: str, **options: Any) -> Callable[[nn.Module], tuple[nn.Module, Update]]:
    def make(model: nn.Module) -> tuple[nn.Module, Update]:
        supply_torchvision_schemas()
        averaged = vars(importlib.import_module("timm.utils"))[name](model, decay=0.9, **options)
        return averaged.module, averaged.update

    return make


AVERAGES = {
    "parameters": torch_average(),
    "buffers too": torch_average(use_buffers=True),
    "exponential, rounded": torch_average(use_buffers=True, avg_fn=get_ema_avg_fn(0.9)),
}
if find_spec("timm") is not None and find_spec("torchvision") is not None:
    AVERAGES |= {
        "timm's ModelEmaV2, rounded": timm_average("ModelEmaV2"),
        "timm's ModelEmaV3": timm_average("ModelEmaV3"),
        "timm's ModelEmaV3, copying": timm_average("ModelEmaV3", exclude_buffers=True, device=torch.device("cpu")),
    }
"""Ways of averaging: each makes, of a model, the module that holds the average and what is called to go on."""


@in_groups(METHOD_NAMES)
def test_averages_that_were_begun_before_the_bank_go_on(methods: Sequence[str]) -> None:
    model = fresh(methods)
    begun = {kind: make(model) for kind, make in AVERAGES.items()}
    begun["parameters"][1](model)  # the first update is a copy, the others average
    fill(model)
    wanted, output = rows(model), run(model, TINY)
    for kind, (averaged, update) in begun.items():
        update(model)
        update(model)
        averaged.eval()
        # Rounded, the average of equal numbers is not quite these; that is so of all that a model holds.
        off = 1e-3 if "rounded" in kind else 0.0
        for name, tensor in rows(averaged).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=off)
            assert tensor is not wanted[name] and len(tensor) > 0
        assert distance(run(averaged, TINY), output) <= 10 * off, kind


def test_a_copy_without_rows_gets_those_of_its_original_and_nothing_else_is_shared() -> None:
    model = fresh(["POINT_PEFT"])
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    build_bank(first, TINY, "default", slice(2))
    own = copy.deepcopy(rows(first))
    assert len(own["rows"]) == 8
    # Neither the original nor another copy of it follows a copy.
    assert [len(rows(held)["rows"]) for held in (model, second)] == [0, 0]
    copied_again = copy.deepcopy(second)
    fill(model)
    for held in (second, copied_again):
        assert torch.equal(rows(held)["rows"], rows(model)["rows"])
        assert rows(held)["rows"].data_ptr() != rows(model)["rows"].data_ptr()
    assert torch.equal(rows(first)["rows"], own["rows"])
    # What has rows follows no more.
    later = copy.deepcopy(model)
    build_bank(model, TINY, "default", slice(2))
    assert [len(rows(held)["rows"]) for held in (model, second, later)] == [8, 16, 16]


def test_loading_rows_gives_them_to_waiting_copies_too() -> None:
    trained, model = adapt(TINY, composed(["POINT_PEFT"])), fresh(["POINT_PEFT"])
    averaged = AveragedModel(model)
    model.load_state_dict(trained.state_dict())
    averaged.update_parameters(model)
    assert_alike(averaged.module, trained)


def test_a_pickle_holds_no_copies_and_copies_are_not_kept_alive() -> None:
    model = fresh(["POINT_PEFT"])
    averaged = AveragedModel(model)
    alone = pickle.loads(pickle.dumps(model))
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(averaged.module))
    fill(model)
    assert len(rows(alone)["rows"]) == 0
    fill(alone)
    assert_alike(alone, model)
    other = fresh(["POINT_PEFT"])
    gone = weakref.ref(copy.deepcopy(other))
    gc.collect()
    assert gone() is None
    fill(other)


def test_a_copy_in_another_type_gets_the_rows_in_the_bank_s() -> None:
    model = fresh(["POINT_PEFT"], bank_dtype="float16")
    copied = copy.deepcopy(model).double()
    fill(model)
    assert rows(copied)["rows"].dtype == torch.float16
    assert torch.equal(rows(copied)["rows"], rows(model)["rows"])


# ---- files of version 0.1.0 ------------------------------------------------------------------------------------------


@in_groups(METHOD_NAMES)
def test_files_with_scalar_gates_are_read_as_before(methods: Sequence[str], tmp_path: Path) -> None:
    """Gates have one dimension since, as sharding (FSDP2) takes no scalar parameters."""
    model = adapt(TINY, composed(methods))
    assert all(parameter.ndim for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    file = tmp_path / TENSOR_FILE
    tensors = load_file(file)
    gates = [name for name in tensors if name.endswith(".gate")]
    if not gates:
        pytest.skip("none of these methods has a gate")
    save_file({name: t.reshape(()) if name in gates else t for name, t in tensors.items()}, file)
    loaded = PointPeftModel.from_pretrained(TINY.build(), tmp_path).eval()
    assert_alike(loaded, model)
    swapped = adapt(TINY, composed(methods), seed=3)
    swapped.swap_adapter_(tmp_path)
    assert_alike(swapped, model)
    save_file({**tensors, gates[0]: torch.zeros(2)}, file)
    with pytest.raises(AdapterFileError, match=r"gate' is \(2\), this model needs \(1\)"):
        PointPeftModel.from_pretrained(TINY.build(), tmp_path)
