"""Libraries of adapters: what headers tell, what stays in a model and what goes, several threads, the Hub."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from point_peft import (
    AdapterError,
    AdapterFileError,
    AdapterLibrary,
    BitFitConfig,
    HubError,
    LoraConfig,
    PeftConfig,
    PointPeftError,
    PointPeftModel,
    cli,
    get_peft_model,
    inject_adapter,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.files.format import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, RUN_FILE, TENSOR_FILE
from point_peft.hub import asking
from point_peft.library import adapter_library
from tests.adapting import ONE_BLOCK, adapt, fingerprint, in_threads, run, without_search
from tests.adapting import held as adapters_of
from tests.hub_server import HubServer

pytest_plugins = ["tests.hub_fixture"]

SIMPLE = without_search(ONE_BLOCK)
"""Enough of a backbone: a library does not look at what is adapted."""
METHODS = {"grasp": "LORA", "shape": "BITFIT", "kitchen/cups": "SSF", "kitchen/room": "IDPT"}
"""Name -> method of the adapters of the folder that the tests begin with."""
SLUG = f"alice/robots-{'0123456789abcdef01234567'}"
in_one_mode = pytest.mark.parametrize("hub", ["lfs"], indirect=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of each of `METHODS`. No test changes it."""
    root = tmp_path_factory.mktemp("saved")
    for seed, (name, method) in enumerate(METHODS.items()):
        adapt(SIMPLE, method, seed=seed).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, Tensor]:
    """Name -> the output with the adapter of that name, loaded alone."""
    return {name: run(PointPeftModel.from_pretrained(SIMPLE.build(), saved / name).eval(), SIMPLE) for name in METHODS}


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "adapters")
    return tmp_path / "adapters"


def plain() -> nn.Module:
    return SIMPLE.build().eval()


def adapted() -> PointPeftModel:
    """A model with an adapter of its owner's, which is active."""
    return adapt(SIMPLE, "IA3", adapter_name="mine")


def output(library: AdapterLibrary, model: nn.Module, name: str) -> Tensor:
    with library.activated(model, name):
        return run(model, SIMPLE)


def held(library: AdapterLibrary, model: nn.Module) -> set[str]:
    return set(library.status(model).adapters)


# ---- the list --------------------------------------------------------------------------------------------------------


def test_it_lists_what_headers_tell(folder: Path) -> None:
    (folder / "grasp" / RUN_FILE).write_text(json.dumps({"task": "classification", "classes": ["cup", "box"]}))
    library = AdapterLibrary(folder)
    assert list(library) == sorted(METHODS) and len(library) == 4 and "kitchen/cups" in library
    for name, method in METHODS.items():
        entry, tensors = library[name], safetensors.torch.load_file(folder / name / TENSOR_FILE)
        assert entry.methods == (method,) and entry.name == name and entry.broken is None
        assert entry.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert entry.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (library["grasp"].task, library["grasp"].classes, library["grasp"].num_classes) == (
        "classification", ("cup", "box"), 2,
    )  # fmt: skip
    assert (library["shape"].task, library["shape"].classes) == (None, None)
    assert library["shape"].num_classes == run(plain(), SIMPLE).shape[-1]
    assert library["cups"] is library["kitchen/cups"] and "cups" in library and library.get("none") is None
    assert library.broken == {} and library.skipped == {}


def test_base_and_task_of_config_and_card(tmp_path: Path) -> None:
    config = PeftConfig(tuners=[BitFitConfig()], base_model_name_or_path="alice/base", revision="v1")
    adapt(SIMPLE, config).save_pretrained(tmp_path / "a")
    card = tmp_path / "a" / CARD_FILE
    card.write_text(card.read_text().replace("tags:\n", "tags:\n- segmentation\n"))
    entry = AdapterLibrary(tmp_path / "a")["a"]
    assert (entry.base, entry.base_revision, entry.task) == ("alice/base", "v1", "segmentation")
    card.write_text("---\ntags: [classification, segmentation]\n---\n")
    assert AdapterLibrary(tmp_path)["a"].task is None
    card.write_text("---\ntags: [\n---\n")
    assert AdapterLibrary(tmp_path)["a"].task is None


def test_the_record_of_a_run_tells_of_its_further_adapters(folder: Path) -> None:
    (folder / "kitchen" / RUN_FILE).write_text(json.dumps({"task": "segmentation", "classes": ["a"] * 3}))
    tasks = {entry.name: entry.task for entry in AdapterLibrary(folder).values()}
    assert tasks == {"grasp": None, "shape": None, "kitchen/cups": "segmentation", "kitchen/room": "segmentation"}


@pytest.mark.parametrize("record", [b"[1]", b"{", b'{"task": 3, "classes": "abc"}', b'{"task": "x", "classes": [1]}'])
def test_a_record_that_is_none_tells_nothing(folder: Path, record: bytes) -> None:
    (folder / "grasp" / RUN_FILE).write_bytes(record)
    entry = AdapterLibrary(folder)["grasp"]
    assert (entry.task, entry.classes, entry.broken) == (None, None, None)


def test_half_precision_counts_as_what_it_takes_in_memory(tmp_path: Path) -> None:
    model = get_peft_model(SIMPLE.build().half(), LoraConfig(r=2), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    library = AdapterLibrary(tmp_path)
    (name,) = library
    with library.loaded(model, name) as (own,):
        tensors = get_adapter(model, own).tensors().values()
        assert library[name].bytes == sum(tensor.nbytes for tensor in tensors) > (tmp_path / TENSOR_FILE).stat().st_size


def test_find_and_the_table(folder: Path) -> None:
    library = AdapterLibrary(folder)
    assert [entry.name for entry in library.find(method="lora")] == ["grasp"]
    assert library.find(method="LORA", task="segmentation") == () == library.find(base="alice/base")
    assert len(library.find()) == 4
    lines = str(library).splitlines()
    assert lines[0].split() == ["name", "method", "base", "task", "classes", "parameters", "bytes"] and len(lines) == 5
    assert lines[1].split()[:2] == ["grasp", "LORA"] and repr(library).endswith("4 adapters)")


def test_links_lead_to_adapters_once_and_hidden_folders_are_left_out(folder: Path) -> None:
    (folder / "kitchen" / "up").symlink_to(folder)
    (folder / "other").symlink_to(folder / "grasp")
    (folder / "itself").symlink_to(folder / "itself")
    shutil.copytree(folder / "shape", folder / ".cache" / "shape")
    assert set(AdapterLibrary(folder)) - {"other", "grasp"} == set(METHODS) - {"grasp"}


# ---- what is not in order --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def in_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change what the header of a file says."""

    def changed(path: Path) -> None:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return changed


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(one for name, one in header.items() if name != "__metadata__")


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no tensors": (TENSOR_FILE, Path.unlink, "there is no file '.*adapter_model"),
    "no configuration": (CONFIG_FILE, Path.unlink, "there is no file '.*adapter_config"),
    "a large one": (CONFIG_FILE, lambda path: path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1)), "more than the 1048576"),
    "a list": (CONFIG_FILE, lambda path: path.write_text("[]"), "must hold a JSON object, not a list"),
    "no JSON": (CONFIG_FILE, lambda path: path.write_text("{"), "is not JSON"),
    "another's": (CONFIG_FILE, lambda path: path.write_text('{"peft_type": "VERA"}'), "peft_type is 'VERA'"),
    "no methods": (
        CONFIG_FILE,
        lambda path: path.write_text('{"peft_type": "POINT_PEFT", "format_version": 1, "tuners": [3]}'),
        "names no methods",
    ),
    "cut off": (TENSOR_FILE, cut, "is cut off, or something follows"),
    "no header": (TENSOR_FILE, lambda path: path.write_bytes(b"abc"), "not a safetensors file, or it is cut off"),
    "header no object": (TENSOR_FILE, lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0[]"), "its header is no object"),
    "a shape that is wrong": (
        TENSOR_FILE, in_header(lambda header: first(header).update(shape=[7])), "other bytes than its shape has",
    ),
    "a shape of words": (
        TENSOR_FILE, in_header(lambda header: first(header).update(shape=["a"])), "other bytes than its shape has",
    ),
    "a type that is none": (
        TENSOR_FILE, in_header(lambda header: first(header).update(dtype="F3")), "as none is written",
    ),
    "no description": (TENSOR_FILE, in_header(lambda header: header.update(x=3)), "'x' as none is written"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_an_entry_with_its_reason(folder: Path, what: str) -> None:
    file, damage, reason = BROKEN[what]
    damage(folder / "grasp" / file)
    library, model = AdapterLibrary(folder), adapted()
    assert len(library) == 4 and set(library.broken) == {"grasp"} == set(library) - {e.name for e in library.find()}
    assert "grasp  NOT in order: " in str(library)
    before = fingerprint(model)
    with pytest.raises(AdapterFileError, match=f"the adapter 'grasp' cannot be loaded: .*{reason}"):
        output(library, model, "grasp")
    assert fingerprint(model) == before
    output(library, model, "shape")


def test_an_unreadable_folder_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refusing(path: str) -> Any:
        if path.endswith("kitchen"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert "Permission denied" in AdapterLibrary(folder).broken["kitchen"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"most": 0}, "most is 0; allowed: a number of adapters from 1 on"),
        ({"most": -2}, "most is -2; allowed"),
        ({"most": True}, "most is True; allowed"),
        ({"most": 2.5}, "most is 2.5; allowed"),
        ({"bytes": 0}, "bytes is 0; allowed: a number of bytes above 0"),
        ({"bytes": -1.0}, "bytes is -1.0; allowed"),
        ({"bytes": True}, "bytes is True; allowed"),
        ({"bytes": float("nan")}, "bytes is nan; allowed"),
    ],
)
def test_wrong_limits(saved: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(PointPeftError, match=match):
        AdapterLibrary(saved, **options)


def test_wrong_sources_and_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(AdapterError, match="there is no adapter in '.*empty': one is a folder with adapter_config"):
        AdapterLibrary(tmp_path / "empty")
    with pytest.raises(AdapterFileError, match="there is no folder '.*none', and it names nothing on the Hub"):
        AdapterLibrary(tmp_path / "none")
    with pytest.raises(AdapterFileError, match="adapter_config.json' is a file, and a library is a folder"):
        AdapterLibrary(folder / "grasp" / CONFIG_FILE)
    shutil.copytree(folder / "grasp", folder / "kitchen" / "grasps")
    library = AdapterLibrary(folder)
    for name in ("grap", "kitchen/grasp", 3):
        with pytest.raises(AdapterError, match=f"has no adapter '?{name}'?; nearest: "):
            library[name]  # type: ignore[index]
    with pytest.raises(KeyError, match="nearest: 'kitchen/cups'"):
        library["kitchen/cup"]
    shutil.copytree(folder / "shape", folder / "kitchen" / "shape")
    library.refresh()
    assert library["shape"].name == "shape"  # the whole name goes before
    shutil.move(folder / "shape", folder / "more" / "shape")
    library.refresh()
    with pytest.raises(AdapterError, match="several adapters are named 'shape': 'kitchen/shape', 'more/shape'"):
        library["shape"]


def test_two_adapters_of_one_name(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "grasp", tmp_path / "a")
    shutil.copytree(saved / "shape", tmp_path / "a" / "a")
    with pytest.raises(AdapterError, match="two adapters have the name 'a': '.*/a' and '.*/a/a'; rename one of them"):
        AdapterLibrary(tmp_path / "a")


# ---- use -------------------------------------------------------------------------------------------------------------


def test_it_answers_as_each_adapter_alone(saved: Path, expected: dict[str, Tensor]) -> None:
    model, library = adapted(), AdapterLibrary(saved, most=2)
    mine = run(model, SIMPLE)
    for name in [*METHODS, *reversed(METHODS)]:
        assert torch.equal(output(library, model, name), expected[name]), name
        assert torch.equal(run(model, SIMPLE), mine) and model.active_adapters == ("mine",)
    status = library.status(model)
    assert len(status.adapters) == 2 and status.hits + status.loads == 8 and status.evictions == status.loads - 2
    assert status.bytes == sum(library[name].bytes for name in status.adapters)
    assert set(model.adapters) == {"mine", *status.adapters.values()}
    assert not any(p.requires_grad for name in status.adapters.values() for p in get_adapter(model, name).parameters())


@pytest.mark.parametrize("inject", [False, True])
def test_a_model_of_its_own_class(saved: Path, expected: dict[str, Tensor], inject: bool) -> None:
    model, library = plain(), AdapterLibrary(saved)
    if inject:
        inject_adapter(model, LoraConfig(r=1), "mine").eval()
    kind, before = type(model), run(model, SIMPLE)
    for name in METHODS:
        assert torch.equal(output(library, model, name), expected[name])
        assert torch.equal(run(model, SIMPLE), before) and type(model) is kind
    for name in library.status(model).adapters.values():
        adapters_of(model).delete_adapter(name)
    assert held(library, model) == set()
    assert torch.equal(output(library, model, "grasp"), expected["grasp"])


def test_several_at_once_and_for_each_sample(saved: Path, expected: dict[str, Tensor]) -> None:
    model, library = adapted(), AdapterLibrary(saved, most=2)
    with library.loaded(model, "grasp", "shape", "grasp") as names:
        mixed = model(*SIMPLE.inputs(2, 5), adapter_names=list(names[:2]))
    assert names[0] == names[2] != names[1] and held(library, model) == {"grasp", "shape"}
    assert torch.allclose(SIMPLE.select(mixed), torch.stack([expected["grasp"][0], expected["shape"][1]]), atol=1e-5)
    with library.activated(model, "grasp", "shape") as names:
        assert model.active_adapters == names and len(names) == 2
    with pytest.raises(AdapterError, match="3 adapters take .* the library may hold 2 adapters in a model: raise"):
        library.loaded(model, "grasp", "shape", "cups").__enter__()


def test_the_most_used_stay(saved: Path) -> None:
    model, library = adapted(), AdapterLibrary(saved, most=2)
    for name in ("grasp", "grasp", "grasp", "shape", "cups"):
        output(library, model, name)
    assert held(library, model) == {"grasp", "kitchen/cups"}
    output(library, model, "room")
    assert held(library, model) == {"grasp", "kitchen/room"}  # of two that were used once, the earlier went
    for name in ("room", "cups") * 20:
        output(library, model, name)
    assert held(library, model) == {"kitchen/cups", "kitchen/room"}  # what is no longer asked for goes in the end


def test_never_more_than_the_bytes(saved: Path) -> None:
    sizes = {entry.name: entry.bytes for entry in AdapterLibrary(saved).values()}
    small, *_, large = sorted(sizes, key=sizes.__getitem__)
    model, library = adapted(), AdapterLibrary(saved, most=None, bytes=sizes[large])
    for name in sizes:
        output(library, model, name)
        assert library.status(model).bytes <= sizes[large]
        adapters = [get_adapter(model, own) for own in library.status(model).adapters.values()]
        assert sum(t.nbytes for adapter in adapters for t in adapter.tensors().values()) == library.status(model).bytes
    tight = AdapterLibrary(saved, bytes=float(sizes[large] - 1))
    before = fingerprint(model)
    with pytest.raises(AdapterError, match=f"'{large}' takes {sizes[large]:,} bytes, and the library may hold .*raise"):
        output(tight, model, large)
    assert fingerprint(model) == before
    output(tight, model, small)


def test_what_is_not_the_librarys_is_never_taken_out(saved: Path, expected: dict[str, Tensor]) -> None:
    model, library, other = adapted(), AdapterLibrary(saved, most=1), AdapterLibrary(saved, most=1)
    model.load_adapter(saved / "shape", "library-grasp")  # the name that the library would have taken
    for name in METHODS:
        assert torch.equal(output(library, model, name), expected[name])
    assert torch.equal(output(other, model, "room"), expected["kitchen/room"])
    assert {"mine", "library-grasp"} < set(model.adapters) and len(model.adapters) == 4
    with model.use_adapter("library-grasp"):
        assert torch.equal(run(model, SIMPLE), expected["shape"])
    (own,) = library.status(model).adapters.values()
    model.set_adapter(own)  # what its owner has made the active one stays too
    with pytest.raises(AdapterError, match="there is no room for the adapter 'grasp': .* are in use; raise most"):
        output(library, model, "grasp")
    model.set_adapter("mine")
    assert torch.equal(output(library, model, "grasp"), expected["grasp"])


def test_what_somebody_else_has_taken_out_is_loaded_again(saved: Path, expected: dict[str, Tensor]) -> None:
    model, library = adapted(), AdapterLibrary(saved)
    output(library, model, "grasp")
    model.delete_adapter(library.status(model).adapters["grasp"])
    assert torch.equal(output(library, model, "grasp"), expected["grasp"])
    model.unload()
    assert torch.equal(output(library, model, "grasp"), expected["grasp"]) and library.status(model).loads == 3


def test_one_that_is_taken_out_while_another_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, library = adapted(), AdapterLibrary(saved, most=1)
    output(library, model, "grasp")
    restored = adapter_library._restored

    def meanwhile(*given: Any) -> Any:
        model.delete_adapter(library.status(model).adapters["grasp"])
        return restored(*given)

    monkeypatch.setattr(adapter_library, "_restored", meanwhile)
    output(library, model, "shape")
    assert held(library, model) == {"shape"} and library.status(model).evictions == 0


def test_an_error_leaves_everything_as_it_was(folder: Path, expected: dict[str, Tensor]) -> None:
    model, library = adapted(), AdapterLibrary(folder, most=1)
    output(library, model, "grasp")
    damaged = folder / "shape" / TENSOR_FILE
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    before, status = fingerprint(model), library.status(model)
    with pytest.raises(AdapterFileError, match="is damaged, or another program has changed it"):
        output(library, model, "shape")
    assert fingerprint(model) == before
    assert replace(library.status(model)) == status
    bare = plain()
    before = fingerprint(bare)
    with pytest.raises(AdapterFileError, match="is damaged"):
        output(library, bare, "shape")
    assert fingerprint(bare) == before
    assert torch.equal(output(library, bare, "grasp"), expected["grasp"])
    with pytest.raises(PointPeftError, match="model must be an nn.Module, not str"):
        output(library, "model", "grasp")  # type: ignore[arg-type]


def test_an_adapter_of_another_backbone_is_refused(saved: Path) -> None:
    torch.manual_seed(99)
    other, library = SIMPLE.make().eval(), AdapterLibrary(saved)
    before = fingerprint(other)
    with pytest.raises(AdapterFileError, match="this adapter belongs to other weights of the backbone"):
        output(library, other, "grasp")
    assert fingerprint(other) == before


def test_nothing_is_loaded_while_an_adapter_is_merged(saved: Path) -> None:
    model, library = adapt(SIMPLE, LoraConfig(modules_to_save=[])), AdapterLibrary(saved)
    model.merge()
    with pytest.raises(AdapterError, match="adapters cannot be loaded while 'default' is merged"):
        output(library, model, "grasp")
    assert list(model.adapters) == ["default"]


def test_a_model_that_is_gone_is_forgotten(saved: Path) -> None:
    model, library = adapted(), AdapterLibrary(saved)
    output(library, model, "grasp")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not library._shelves


def test_files_that_change_are_noticed(folder: Path, saved: Path, expected: dict[str, Tensor]) -> None:
    model, library = adapted(), AdapterLibrary(folder)
    listed = library["shape"]
    adapt(SIMPLE, "LORA", seed=7).save_pretrained(folder / "shape")  # listed, not loaded yet: what is there counts
    fresh = run(PointPeftModel.from_pretrained(SIMPLE.build(), folder / "shape").eval(), SIMPLE)
    assert (
        torch.equal(output(library, model, "shape"), fresh) and library["shape"].methods == ("LORA",) != listed.methods
    )
    output(library, model, "grasp")
    shutil.rmtree(folder / "grasp")
    shutil.copytree(saved / "kitchen" / "cups", folder / "grasp")
    assert torch.equal(output(library, model, "grasp"), expected["grasp"])  # what is in the model stays
    with library.loaded(model, "grasp"):
        library.refresh()
        assert torch.equal(output(library, model, "grasp"), expected["kitchen/cups"])  # until the list is made anew
    shutil.rmtree(folder / "shape")
    library.refresh()
    assert "shape" not in library
    with pytest.raises(AdapterError, match="has no adapter 'shape'"):
        output(library, model, "shape")


def test_files_that_change_all_the_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, library = adapted(), AdapterLibrary(folder)
    restored = adapter_library._restored

    def slow(*given: Any) -> Any:
        adapter = restored(*given)
        os.utime(folder / "grasp" / TENSOR_FILE, ns=(1, os.stat(folder / "grasp" / TENSOR_FILE).st_mtime_ns + 1))
        return adapter

    monkeypatch.setattr(adapter_library, "_restored", slow)
    with pytest.raises(AdapterFileError, match="it is being written to all the time"):
        output(library, model, "grasp")


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_two_threads_that_ask_for_one_adapter_load_it_once(
    saved: Path, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, library = adapted(), AdapterLibrary(saved)
    asked, waiting = threading.Event(), library._changed.wait
    calls = []
    restored = adapter_library._restored

    def load(*given: Any) -> Any:
        calls.append(given)
        assert asked.wait(600)  # until another thread waits for this one
        return restored(*given)

    def wait(*given: Any) -> bool:
        asked.set()
        return waiting(*given)

    monkeypatch.setattr(adapter_library, "_restored", load)
    monkeypatch.setattr(library._changed, "wait", wait)
    wrong: list[str] = []

    def serve() -> None:
        if (output(library, model, "grasp") - expected["grasp"]).abs().max() > 1e-5:
            wrong.append("grasp")

    in_threads([serve] * 3)
    assert len(calls) == 1 and not wrong and library.status(model).loads == 1 and library.status(model).hits == 2


def test_an_adapter_in_use_stays_and_others_wait_for_room(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, library = adapted(), AdapterLibrary(saved, most=1)
    inside, full = threading.Event(), threading.Event()
    waiting, order = library._changed.wait, []

    def wait(*given: Any) -> bool:
        full.set()
        return waiting(*given)

    monkeypatch.setattr(library._changed, "wait", wait)

    def use() -> None:
        with library.activated(model, "grasp"):
            inside.set()
            assert full.wait(600)  # until the other waits
            order.append(held(library, model))

    def want() -> None:
        assert inside.wait(600)
        with library.activated(model, "shape"):
            order.append(held(library, model))

    in_threads([use, want])
    assert order == [{"grasp"}, {"shape"}]


def test_a_thread_that_holds_one_does_not_wait_for_room(saved: Path) -> None:
    model, library = adapted(), AdapterLibrary(saved, most=1)
    with library.activated(model, "grasp"), library.activated(model, "grasp"):
        before = fingerprint(model)
        with pytest.raises(AdapterError, match="no room for the adapter 'shape': the model holds 1 adapters"):
            output(library, model, "shape")
        assert fingerprint(model) == before
    output(library, model, "shape")


def test_many_threads_no_output_is_another_adapters(saved: Path, expected: dict[str, Tensor]) -> None:
    model, library, wrong = plain(), AdapterLibrary(saved, most=2), []

    def serve(thread: int) -> None:
        for number in range(12):
            name = sorted(METHODS)[(thread + number * (thread + 1)) % 4]
            # Threads may round otherwise.
            if (output(library, model, name) - expected[name]).abs().max() > 1e-5:
                wrong.append((thread, name))
            assert len(held(library, model)) <= 2

    in_threads([lambda thread=thread: serve(thread) for thread in range(4)])  # type: ignore[misc]
    status = library.status(model)
    assert not wrong and status.hits + status.loads == 48 and len(status.adapters) == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{AdapterLibrary(folder)}\n" and err == ""
    assert cli.main(["list", str(folder), "--method", "ssf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["adapters"]
    assert row["name"] == "kitchen/cups" and row["methods"] == ["SSF"] and row["origin"] == str(folder / "kitchen/cups")
    assert cli.main(["list", str(folder / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("point-peft: error: there is no folder") and err.count("\n") == 1


def test_a_strangers_words_do_not_steer_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.loads((folder / "shape" / CONFIG_FILE).read_text())
    text["base_model_name_or_path"] = "\x1b[2J\nroot"
    (folder / "shape" / CONFIG_FILE).write_text(json.dumps(text))
    (folder / "grasp" / CONFIG_FILE).write_text('{"peft_type": "\\u001b[2J"}')
    assert cli.main(["list", str(folder)]) == 1  # one is not in order
    out, _ = capsys.readouterr()
    assert "\x1b" not in out and r"\x1b[2J\nroot" in out and out.count("\n") == 5


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(hub: HubServer, saved: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub with a collection: two repositories with adapters, one of another kind, one without."""
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=lambda seconds: None))
    files = {name: {p.name: p.read_bytes() for p in (saved / name).iterdir()} for name in METHODS}
    hub.put("alice/grasp", files["grasp"])
    tagged = {CARD_FILE: b"---\nlibrary_name: point-peft\ntags: [segmentation]\n---\n"}
    hub.put("bob/kitchen", {**tagged, **{f"cups/{name}": data for name, data in files["kitchen/cups"].items()}})
    hub.put("bob/full", {"model.safetensors": b"12345678"})
    items = [("model", "alice/grasp"), ("model", "bob/kitchen"), ("model", "bob/full"), ("dataset", "bob/scans")]
    hub.collections[SLUG] = items
    return hub


@in_one_mode
def test_a_collection_is_listed_by_headers_and_used(
    shown: HubServer, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    library = AdapterLibrary(SLUG)
    assert not list((tmp_path / "home").rglob(TENSOR_FILE)) and list((tmp_path / "home").rglob(CONFIG_FILE))
    assert list(library) == ["alice/grasp", "bob/kitchen/cups"]
    assert library.skipped == {"bob/full": library.skipped["bob/full"], "bob/scans": "a dataset"}
    assert library.skipped["bob/full"].startswith("a model without adapter_config.json") and "bob/scans" in str(library)
    assert (library["cups"].task, library["cups"].methods, library["grasp"].task) == ("segmentation", ("SSF",), None)
    local = safetensors.torch.load(shown.files("alice/grasp")[TENSOR_FILE])
    assert library["grasp"].bytes == sum(tensor.nbytes for tensor in local.values())
    assert library["grasp"].where == f"alice/grasp at {shown.commits('alice/grasp')[0].oid}"
    model = adapted()
    assert torch.equal(output(library, model, "grasp"), expected["grasp"])
    assert torch.equal(output(library, model, "bob/kitchen/cups"), expected["kitchen/cups"])


@in_one_mode
def test_one_repository_and_a_commit_that_comes_later(shown: HubServer, expected: dict[str, Tensor]) -> None:
    library, model = AdapterLibrary("bob/kitchen"), adapted()
    assert list(library) == ["bob/kitchen/cups"]
    shown.put("bob/kitchen", {f"cups/{name}": data for name, data in shown.files("alice/grasp").items()})
    assert torch.equal(output(library, model, "cups"), expected["kitchen/cups"])  # of the commit that was listed
    library.refresh()
    assert torch.equal(output(library, model, "cups"), expected["grasp"])
    with pytest.raises(AdapterError, match="there is no adapter in 'bob/full'"):
        AdapterLibrary("bob/full")


@in_one_mode
def test_what_is_wrong_on_the_hub_is_said(shown: HubServer) -> None:
    with pytest.raises(HubError, match=f"there is no collection 'alice/other-{SLUG[-24:]}' that can be seen: check"):
        AdapterLibrary(f"alice/other-{SLUG[-24:]}")
    with pytest.raises(HubError, match="there is no repository 'alice/none' that can be seen"):
        AdapterLibrary("alice/none")
    shown.repo("alice/grasp").private = True
    assert "that can be seen" in AdapterLibrary(SLUG, token="hf_bob").broken["alice/grasp"]
    shown.put("bob/kitchen", {f"cups/{TENSOR_FILE}": b"12345678"})
    assert "is not a safetensors file" in AdapterLibrary(SLUG).broken["bob/kitchen/cups"]
    shown.put("bob/kitchen", {f"cups/{TENSOR_FILE}": None})
    assert "it has no file 'adapter_model" in AdapterLibrary(SLUG).broken["bob/kitchen/cups"]
    shown.put("bob/kitchen", {f"cups/{TENSOR_FILE}": b"1", f"cups/{CONFIG_FILE}": b" " * (MAX_CONFIG_BYTES + 1)})
    assert "at most 1,048,576 are read" in AdapterLibrary(SLUG).broken["bob/kitchen/cups"]
    shown.fault("GET", "/api/models/alice/grasp", status=503, times=3)
    assert AdapterLibrary(SLUG).broken["alice/grasp"] == "the Hub answers 503"
    shown.fault("GET", "/api/collections/", status=503, times=3)
    with pytest.raises(HubError, match="is not in the cache, and was not asked for on the Hub: the Hub answers 503"):
        AdapterLibrary(f"bob/fresh-{SLUG[-24:]}")


@in_one_mode
def test_without_the_hub_the_cache_is_listed(
    shown: HubServer, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, model = AdapterLibrary(SLUG), adapted()
    output(library, model, "grasp")  # which downloads it
    shown.fault("(GET|HEAD)", ".*", status=503, times=10_000)
    with pytest.warns(UserWarning, match=f"the Hub answers 503: the list of '{SLUG}' is taken from the cache"):
        AdapterLibrary(SLUG)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = AdapterLibrary(SLUG)
    assert list(offline) == list(library) and offline.skipped == library.skipped
    assert replace(offline["grasp"], origin=library["grasp"].origin) == library["grasp"]
    assert "is not in the cache" in offline.broken["bob/kitchen/cups"]
    assert torch.equal(output(offline, adapted(), "grasp"), expected["grasp"])
    with pytest.raises(HubError, match="'bob/kitchen' is not in the cache, .*: HF_HUB_OFFLINE is set"):
        AdapterLibrary("bob/kitchen")
