"""`swap_adapter_`: the values of a file in the tensors of a loaded adapter, of every method, or an error.

And what activating, loading and deleting an adapter costs: nothing that grows with the number of loaded ones.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import tracemalloc
import weakref
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AdapterFileError,
    BitFitConfig,
    LoraConfig,
    PeftConfig,
    PointPeftModel,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.site import backbone_modules
from point_peft.files.format import CONFIG_FILE, KEY_PREFIX, TENSOR_FILE
from point_peft.files.peft_format import to_peft
from point_peft.running.activation import _active
from point_peft.running.forward import _forward, _losses
from point_peft.schema import to_json
from tests.adapting import (
    ONE_BLOCK,
    adapt,
    add,
    assert_same_values,
    banks,
    distance,
    fingerprint,
    frozen,
    gradients,
    held,
    loss_of,
    one_graph,
    rescramble,
    run,
    values,
    without_search,
)
from tests.methods import config
from tests.test_representatives import a_few
from tests.zoo import BACKBONES, TinyBackbone

REFERENCE = BACKBONES["point_mae"]
HEAD = REFERENCE.heads[-1]


def places(model: AdapterSet, name: str = "default") -> dict[str, tuple[Any, ...]]:
    """Where the tensors of an adapter are and what they are, but for their values."""
    found = get_adapter(model, name).tensors()
    return {key: (id(t), t.data_ptr(), t.shape, t.dtype, t.requires_grad) for key, t in found.items()}


def saved(model: PointPeftModel, folder: Path, name: str = "default") -> Path:
    model.save_pretrained(folder, name)
    return folder


def other(folder: Path, how: Any = "LORA", backbone: TinyBackbone = REFERENCE, **options: Any) -> Path:
    """The files of another adapter than `adapt` makes."""
    return saved(adapt(backbone, how, seed=7, **options), folder)


# ---- what a swap gives -----------------------------------------------------------------------------------------------


@a_few
def test_a_swap_is_what_loading_gives_in_the_tensors_that_are_there(
    method: str, backbone: TinyBackbone, tmp_path: Path
) -> None:
    folder = other(tmp_path / "other", method, backbone)
    model, untouched = adapt(backbone, method), adapt(backbone, method, seed=3)
    add(model, backbone, method, "beside")
    first, base, beside = run(model, backbone), values(model.base_model), values(get_adapter(model, "beside"))
    model.freeze_adapter("beside")
    before, modes = places(model), [module.training for module in model.modules()]
    model.swap_adapter_(folder)
    model.load_adapter(folder, "loaded")
    with model.use_adapter("loaded"):
        expected = run(model, backbone)
    model.delete_adapter("loaded")
    assert torch.equal(run(model, backbone), expected)
    assert distance(expected, first) > 1e-5
    assert places(model) == before and [module.training for module in model.modules()] == modes
    assert_same_values(values(get_adapter(model, "beside")), beside)
    assert_same_values(values(model.base_model), base)
    # And it is the file's adapter in every other respect.
    saved(model, tmp_path / "again")
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    untouched.swap_adapter_(tmp_path / "again")
    assert torch.equal(run(untouched, backbone), expected)


@pytest.mark.parametrize("method", ["LORA", "POINT_PEFT"])
def test_an_optimizer_goes_on_with_the_new_values(method: str, tmp_path: Path) -> None:
    """The step after a swap is the one that the optimizer, with its state, would take from the values of the file."""
    folder, model = other(tmp_path, method), adapt(REFERENCE, method)
    twin = adapt(REFERENCE, method)
    loaded = adapt(REFERENCE, method, seed=7)
    stepped = []
    for swapped in (model, twin):
        parameters = list(get_adapter(swapped, "default").parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        _step(swapped, optimizer)
        if swapped is model:
            swapped.swap_adapter_(folder)
        else:
            with torch.no_grad():
                for name, tensor in get_adapter(loaded, "default").tensors().items():
                    get_adapter(swapped, "default").tensors()[name].copy_(tensor)
        _step(swapped, optimizer)
        stepped.append(values(get_adapter(swapped, "default")))
    assert_same_values(stepped[0], stepped[1])
    assert any(not torch.equal(stepped[0][name], v) for name, v in values(get_adapter(loaded, "default")).items())


def _step(model: PointPeftModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(REFERENCE.select(model(*REFERENCE.inputs(2, 5)))).backward()
    assert gradients(model)
    optimizer.step()


def test_compiled_code_is_not_compiled_again(tmp_path: Path) -> None:
    method, backbone = "LORA", without_search(ONE_BLOCK)
    folder, model = other(tmp_path / "other", method, backbone), adapt(backbone, method)
    run(model, backbone)  # the proof that every part runs
    compiled = one_graph(model)
    first = run(compiled, backbone)
    with torch._dynamo.config.patch(error_on_recompile=True):  # type: ignore[attr-defined, unused-ignore]
        for source in (folder, saved(adapt(backbone, method), tmp_path / "first"), folder):
            model.swap_adapter_(source)
            assert distance(run(compiled, backbone), run(model, backbone)) < 1e-5
    assert distance(run(compiled, backbone), first) > 1e-4


def test_a_model_that_keeps_its_class(tmp_path: Path) -> None:
    folder = other(tmp_path, "IDPT")
    injected = inject_adapter(REFERENCE.build(), config("IDPT")).eval()
    before = run(injected, REFERENCE)
    held(injected).swap_adapter_(folder)
    expected = run(PointPeftModel.from_pretrained(frozen(REFERENCE), folder).eval(), REFERENCE)
    assert torch.equal(run(injected, REFERENCE), expected) and distance(expected, before) > 1e-4


def test_tensors_that_were_made_in_inference_mode(tmp_path: Path) -> None:
    """Autograd counts no changes of these."""
    first, folder = saved(adapt(REFERENCE, "POINT_PEFT"), tmp_path / "first"), other(tmp_path / "other", "POINT_PEFT")
    with torch.inference_mode():
        model = PointPeftModel.from_pretrained(frozen(REFERENCE), first).eval()
        before = run(model, REFERENCE)
    model.swap_adapter_(folder)
    expected = run(PointPeftModel.from_pretrained(frozen(REFERENCE), folder).eval(), REFERENCE)
    with torch.inference_mode():
        assert torch.equal(run(model, REFERENCE), expected)
    assert distance(expected, before) > 1e-5


def test_where_the_base_came_from_is_taken_over(tmp_path: Path) -> None:
    named = PeftConfig.of(config("LORA")).with_base("point/mae", "v2")
    model = adapt(REFERENCE, "LORA")
    model.swap_adapter_(other(tmp_path, named))
    assert get_adapter(model, "default").config == named


def test_files_of_the_peft_package(tmp_path: Path) -> None:
    how = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=[HEAD])
    source = adapt(REFERENCE, how, seed=7)
    adapter = get_adapter(source, "default")
    about = to_peft(adapter, backbone_modules(source))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(about))
    tensors = {KEY_PREFIX + name: tensor.detach() for name, tensor in adapter.tensors().items()}
    safetensors.torch.save_file(tensors, tmp_path / TENSOR_FILE)
    model = adapt(REFERENCE, how)
    model.swap_adapter_(tmp_path)
    assert torch.equal(run(model, REFERENCE), run(source, REFERENCE))
    for unlike in (
        LoraConfig(r=3, target_modules=["qkv"], modules_to_save=[HEAD]),
        LoraConfig(r=2, target_modules=["proj"], modules_to_save=[HEAD]),
        LoraConfig(r=2, target_modules=["qkv"], modules_to_save=[]),
        config("IDPT"),
    ):
        refused(adapt(REFERENCE, unlike), tmp_path, "cannot be swapped into 'default': .*; load_adapter adds it")


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(model: PointPeftModel, source: Path, match: str, error: type[Exception] = AdapterFileError) -> None:
    """The swap raises, and model and adapter stay bit for bit."""
    output, before, what = run(model, REFERENCE), fingerprint(model), get_adapter(model, "default").config
    with pytest.raises(error, match=match):
        model.swap_adapter_(source)
    assert fingerprint(model) == before and torch.equal(run(model, REFERENCE), output)
    assert get_adapter(model, "default").config is what


LORA = LoraConfig(r=4, target_modules=["qkv"])


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (BitFitConfig(), r"it is BITFIT, what is there is LORA; load_adapter"),
        (PeftConfig(tuners=(LORA, BitFitConfig())), "it is LORA and BITFIT, what is there is LORA;"),
        (LoraConfig(r=3, target_modules=["qkv"]), r"its LoraConfig.r is 3, what is there has 4; load_adapter"),
        (LoraConfig(r=4, target_modules=["qkv"], lora_alpha=9), "its LoraConfig.lora_alpha is 9, what is there has 8"),
        (LoraConfig(r=4, target_modules=["proj"]), r"its LoraConfig.target_modules is \['proj'\]"),
        (LoraConfig(r=4, target_modules=["qkv"], lora_dropout=0.1), "its LoraConfig.lora_dropout is 0.1"),
        (PeftConfig(tuners=(LORA,), modules_to_save=[]), r"its PeftConfig.modules_to_save is \[\], what is there has"),
    ],
)
def test_another_configuration(how: Any, match: str, tmp_path: Path) -> None:
    refused(adapt(REFERENCE, LORA), other(tmp_path, how), match)


@pytest.mark.parametrize(
    "head", [nn.Linear(48, 3), "cls+mean", nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 5))], ids=repr
)
def test_another_head(head: Any, tmp_path: Path) -> None:
    match = f"its own '{HEAD}' is .*, there it is .*; load_adapter adds it as another adapter"
    pooled = adapt(REFERENCE, LORA, heads={HEAD: "cls+max"})
    refused(pooled, _with_head(head, tmp_path), match)
    same = _with_head("cls+max", tmp_path / "same")
    before = run(pooled, REFERENCE)
    pooled.swap_adapter_(same)
    assert not torch.equal(run(pooled, REFERENCE), before)


def _with_head(head: Any, folder: Path) -> Path:
    torch.manual_seed(9)
    model = get_peft_model(REFERENCE.build(), LORA, heads={HEAD: head})
    rescramble(model)
    return saved(model, folder)


def test_a_head_that_a_file_cannot_describe(tmp_path: Path) -> None:
    """Loading needs it handed in; a swap has it."""

    class Own(nn.Linear):
        pass

    folder = _with_head(Own(48, 5), tmp_path)
    model = adapt(REFERENCE, LORA, heads={HEAD: Own(48, 5)})
    model.swap_adapter_(folder)
    expected = adapt(REFERENCE, LORA, adapter_name="first")
    expected.load_adapter(folder, heads={HEAD: Own(48, 5)})
    expected.set_adapter("default")
    assert torch.equal(run(model, REFERENCE), run(expected, REFERENCE))


def test_a_bank_of_another_number_of_rows(tmp_path: Path) -> None:
    model, source = adapt(REFERENCE, "POINT_PEFT"), adapt(REFERENCE, "POINT_PEFT", seed=7)
    (bank,), (longer,) = banks(get_adapter(model, "default")), banks(get_adapter(source, "default"))
    rows = bank.get_buffer("rows")
    longer.fill(torch.randn(len(rows) + 1, rows.shape[1]))
    refused(
        model, saved(source, tmp_path), f"rows' has {len(rows) + 1} rows, and the memory .* is for {len(rows)}; load_"
    )
    longer.fill(torch.randn(*rows.shape))
    before = run(model, REFERENCE)
    model.swap_adapter_(saved(source, tmp_path))
    assert torch.equal(run(model, REFERENCE), run(source, REFERENCE))
    assert not torch.equal(run(model, REFERENCE), before)


def test_tensors_of_another_type(tmp_path: Path) -> None:
    source = adapt(REFERENCE, LORA, seed=7)
    get_adapter(source, "default").half()
    refused(adapt(REFERENCE, LORA), saved(source, tmp_path), "is float16, what is there float32; load_adapter adds it")


def test_another_base(tmp_path: Path) -> None:
    folder, model = other(tmp_path, LORA), adapt(REFERENCE, LORA)
    with torch.no_grad():
        model.base_model.get_parameter("blocks.blocks.0.attn.qkv.weight").add_(0.01)
    refused(model, folder, "belongs to other weights of the backbone")
    model = adapt(REFERENCE, LORA).bfloat16()
    with pytest.warns(UserWarning, match="trained on a base in float32, int64, this one is in bfloat16, int64"):
        model.swap_adapter_(folder)
    expected = get_adapter(adapt(REFERENCE, LORA, seed=7), "default").bfloat16()
    assert_same_values(values(get_adapter(model, "default")), values(expected))


def test_another_anatomy_and_other_modules(tmp_path: Path) -> None:
    folder, model = other(tmp_path, BitFitConfig()), adapt(REFERENCE, BitFitConfig())
    about = json.loads((folder / CONFIG_FILE).read_text())
    assert model.anatomy is not None
    unlike = to_json(dataclasses.replace(model.anatomy, heads=()))
    for change, match in (
        ({"adapted_modules": about["adapted_modules"][1:]}, rf"has 1 more \('{about['adapted_modules'][0]}'\);"),
        ({"anatomy": unlike}, "states another anatomy"),
    ):
        (folder / CONFIG_FILE).write_text(json.dumps({**about, **change}))
        refused(model, folder, match)


def test_a_value_that_is_not_finite_in_the_last_tensor(tmp_path: Path) -> None:
    folder, model = other(tmp_path, LORA), adapt(REFERENCE, LORA)
    data = safetensors.torch.load((folder / TENSOR_FILE).read_bytes())
    data[max(data)].view(-1)[-1] = float("nan")
    safetensors.torch.save_file(data, folder / TENSOR_FILE)
    refused(model, folder, "holds values that are not finite")


def test_what_is_merged_or_not_there(tmp_path: Path) -> None:
    how = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=[])
    folder, model = other(tmp_path, how), adapt(REFERENCE, how)
    with pytest.raises(AdapterError, match="there is no adapter 'none'; adapters: 'default'"):
        model.swap_adapter_(folder, "none")
    model.merge()
    refused(model, folder, "adapters cannot be swapped while 'default' is merged", AdapterError)
    model.unmerge()
    model.swap_adapter_(folder)
    refused(model, tmp_path / "nowhere", "there is no folder")


# ---- what activating costs -------------------------------------------------------------------------------------------


def calls(task: Callable[[], object]) -> int:
    """Number of Python and C functions that a task calls."""
    count = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        task()
    finally:
        sys.setprofile(None)
    return count


def _activations(model: PointPeftModel, backbone: TinyBackbone) -> dict[str, int]:
    def use() -> None:
        with model.use_adapter("default"):
            pass

    def disable() -> None:
        with model.disable_adapter():
            pass

    tasks: dict[str, Callable[[], object]] = {
        "set": lambda: model.set_adapter("default"),
        "use": use,
        "disable": disable,
        "active": lambda: model.active_adapters,
        "forward": lambda: run(model, backbone, ARGS),
    }
    for task in tasks.values():
        task()
    return {name: Context().run(calls, task) for name, task in tasks.items()}


ARGS = REFERENCE.inputs(2, 5)


def test_activating_and_running_do_not_depend_on_the_number_of_adapters() -> None:
    model = adapt(REFERENCE, LORA)
    gc.disable()  # a collection calls functions too
    try:
        alone = _activations(model, REFERENCE)
        for number in range(49):
            model.add_adapter(f"more{number}", LORA)
        assert _activations(model, REFERENCE) == alone
    finally:
        gc.enable()
    assert all(alone[name] < 100 for name in ("set", "use", "disable")), alone
    # Nor on the size of the model.
    deeper = _activations(adapt(BACKBONES["point_m2ae"], LORA), BACKBONES["point_m2ae"])
    assert deeper == {**alone, "forward": deeper["forward"]}


# ---- what is left of an adapter --------------------------------------------------------------------------------------


@a_few
def test_a_deleted_adapter_is_gone_at_once(method: str, backbone: TinyBackbone) -> None:
    """Not when the garbage collector comes: after forwards, direct calls and losses of it in this thread."""
    model = adapt(backbone, method, adapter_name="a")
    add(model, backbone, method, "b")
    model.train_adapter("b")
    with model.use_adapter("b"):
        run(model, backbone)
        loss = loss_of(backbone.select(model(*backbone.inputs(2, 5)))) + model.auxiliary_loss()
        loss.backward()
        del loss
    adapter = get_adapter(model, "b")
    watched = [weakref.ref(each) for each in (adapter, *adapter.modules(), *adapter.tensors().values())]
    gc.disable()
    try:
        del adapter
        model.delete_adapter("b")
        assert not [found for found in (each() for each in watched) if found is not None]
    finally:
        gc.enable()


def _traces(model: PointPeftModel) -> dict[str, Any]:
    """The sizes of all that an adapter could leave something in."""
    gc.collect()
    # isinstance would ask a weak proxy for the class of what it stands for, which may be gone.
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    hooks = [len(getattr(m, name)) for m in model.modules() for name in vars(nn.Module()) if "hooks" in name]
    return {
        "tensors": len(found),
        "hooks": hooks,
        "fields": {name: len(value) for name, value in vars(model).items() if isinstance(value, (dict, set, tuple))},
        "contexts": [len(each._values.get() or {}) for each in (_active, _forward, _losses)],
    }


def test_a_hundred_cycles_return_memory_to_where_it_was(tmp_path: Path) -> None:
    backbone = BACKBONES["compact"]
    args, folder, model = backbone.inputs(2, 5), other(tmp_path, "LORA", backbone), adapt(backbone, "LORA")

    def cycles(number: int) -> None:
        for _ in range(number):
            model.load_adapter(folder, "next")
            with model.use_adapter("next"):
                run(model, backbone, args)
            model.delete_adapter("next")

    cycles(1)
    gc.collect()  # other tests' models
    before = _traces(model)
    cycles(50)  # Python fills caches of its own meanwhile
    tracemalloc.start()
    try:
        cycles(4)
        gc.collect()
        start, _ = tracemalloc.get_traced_memory()
        model.load_adapter(folder, "one")
        one = tracemalloc.get_traced_memory()[0] - start
        model.delete_adapter("one")
        cycles(20)
        assert _traces(model) == before
        assert tracemalloc.get_traced_memory()[0] - start < one, "twenty cycles leave as much as one adapter takes"
    finally:
        tracemalloc.stop()
