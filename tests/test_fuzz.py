"""Files that chance has changed: an adapter is exactly what its file states, or a sentence says what is wrong with it.

And nothing crashes, hangs, fills the memory or changes the model that it was to be loaded into.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from point_peft import (
    DAPTConfig,
    LoraConfig,
    PeftConfig,
    PointPEFTConfig,
    PointPeftError,
    PointPeftModel,
    VPTConfig,
    describe,
)
from point_peft.adapting.adapter import get_adapter
from point_peft.files.format import (
    CONFIG_FILE,
    DIGEST,
    KEY_PREFIX,
    PEFT_TYPE,
    RECORD,
    SEAL,
    TENSOR_FILE,
    read_folder,
    seal_of,
)
from point_peft.files.saving import Format
from tests.adapting import adapt, assert_same_values, fingerprint
from tests.hanging import must_end
from tests.zoo import BACKBONES

BACKBONE = BACKBONES["compact"]
LORA = LoraConfig(r=2, target_modules=["q", "v"], rank_pattern={"blocks.0.attention.q": 3}, lora_dropout=0.25)
SOURCES: dict[str, tuple[Any, Format]] = {
    "LORA in PEFT's format": (PeftConfig(tuners=[LORA], base_model_name_or_path="me/base", revision="v1"), "peft"),
    "LORA": (PeftConfig(tuners=[LORA], base_model_name_or_path="me/base", revision="v1"), "point_peft"),
    "POINT_PEFT": (PointPEFTConfig(memory_bank=True, adapter_width=4), "auto"),
    "DAPT": (DAPTConfig(width=4), "auto"),
    "VPT": (VPTConfig(num_prompts=3, layers_to_transform=[1]), "auto"),
    "two methods": (PeftConfig(tuners=[LORA, DAPTConfig(width=4)], anatomy=describe(BACKBONE.build())), "auto"),
}
each_source = pytest.mark.parametrize("source", SOURCES)


@functools.cache
def target() -> PointPeftModel:
    """The model that everything is loaded into, with an adapter of its own."""
    return adapt(BACKBONE, VPTConfig(num_prompts=2), seed=9)


@functools.cache
def untouched() -> dict[str, Any]:
    return fingerprint(target())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("saved") for name in SOURCES}
    for name, (config, format) in SOURCES.items():
        adapt(BACKBONE, config, seed=1).save_pretrained(folders[name], format=format)
    return folders


@pytest.fixture(scope="module", autouse=True)
def memory() -> Iterator[None]:
    """No file makes the process grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def read(config: bytes, tensors: bytes, folder: Path) -> str | None:
    """Load the files: what is wrong with them, or None if they are an adapter, which then is exactly what they state.

    In both cases the model is afterwards as it was.
    """
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / TENSOR_FILE).write_bytes(tensors)
    untouched()
    sentence = None
    with must_end(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a base in another type
        try:
            target().load_adapter(folder, "fuzzed")
        except PointPeftError as error:
            sentence = str(error)
            assert 20 < len(sentence) < 1200 and sentence.isprintable()
        else:
            try:
                check_loaded(config, tensors, folder)
            finally:
                target().delete_adapter("fuzzed")
    assert fingerprint(target()) == untouched()
    return sentence


def check_loaded(text: bytes, data: bytes, folder: Path) -> None:
    """The loaded adapter has the tensors and the configuration of the files, and saves as such."""
    config, adapter = json.loads(text), get_adapter(target(), "fuzzed")
    stated = {f"{KEY_PREFIX}{name}": tensor for name, tensor in adapter.tensors().items()}
    assert_same_values(dict(sorted(stated.items())), values_of(data))
    found = adapter.config.to_json()
    metadata = parts(data)[0].get("__metadata__", {})
    if config["peft_type"] == PEFT_TYPE:
        assert_states(found, config)
    elif RECORD in metadata and metadata.get(DIGEST) == hashlib.sha256(text).hexdigest():
        assert_states(found, json.loads(metadata[RECORD]))
    else:
        shared = {**found, **found["tuners"][0]}
        names = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "base_model_name_or_path", "revision"}
        assert {name: shared[name] for name in names & set(config)} == {
            name: config[name] for name in names & set(config)
        }
    target().save_pretrained(
        folder / "again", "fuzzed", format="point_peft" if config["peft_type"] == PEFT_TYPE else "auto"
    )
    again = read_folder(folder / "again")
    assert_same_values(again.tensors, dict(sorted(adapter.tensors().items())))
    mine = again.record or again.config
    assert {name: mine[name] for name in found} == json.loads(json.dumps(found))


def values_of(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file, as safetensors itself reads it."""
    return dict(sorted(safetensors.torch.load(data).items()))


def assert_states(found: Any, stated: Any) -> None:
    """Every field of a configuration is as the file has it, to the type; what the file leaves out is not looked at."""
    if isinstance(stated, dict):
        for name in stated.keys() & found.keys():
            assert_states(found[name], stated[name])
    elif isinstance(stated, list):
        for entry, stated_entry in zip(found, stated, strict=True):
            assert_states(entry, stated_entry)
    else:
        assert json.dumps(found) == json.dumps(stated)


# ---- changes of what a file says, by hypothesis ----------------------------------------------------------------------

HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 2**24, 2**24 + 1, 2**31, 2**63, 2**64, 10**30, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, 1e308, 5e-324),
    *("", " ", "x", "\0", "\n", "\ud800", "é", "x" * 9999, "POINT_PEFT", "LORA", "VPT", "Linear", "Sequential"),
    *("q", ".*", "(", "(a+)+$", "(.*)*x", "blocks.0", "cls_head_finetune", "__class__", "../../etc/passwd"),
    *([], {}, [[]], [{}], {"": None}, [None], ["q", "k"], [["q", 3]], ["q", "q"], [0], [-1], [2**70], [0] * 3000),
]
RAW = ["1e400", "-1e400", "NaN", "9" * 5000, "[" * 70 + "]" * 70, "[" * 990 + "]" * 990, '{"a":' * 99 + "1" + "}" * 99]
"""Texts that json.dumps would not write."""
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
"""Of the characters that st.text() has by itself, which first encodes every one there is, for 3 s in a new checkout."""
CHANGES = ["replace", "number", "remove", "rename", "add", "wrap", "unwrap", "swap", "double"]


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree with every key of it, the root aside."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found = [(tree, key) for key in keys]
    return found + [place for key in keys for place in places(tree[key])]


def change(tree: dict[str, Any], data: st.DataObject) -> None:
    """Change something somewhere in a tree of JSON values."""
    everywhere = places(tree)
    container, key = data.draw(st.sampled_from(everywhere))
    value, what = container[key], data.draw(st.sampled_from(CHANGES))
    if what == "replace":
        container[key] = copied(data.draw(st.sampled_from(HOSTILE)))
    elif what == "number":
        container[key] = data.draw(st.integers(-2, 20) | st.floats(-2, 2))
    elif what == "remove":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        container[data.draw(TEXTS | st.just(f"{key}s"))] = container.pop(key)
    elif what == "add" and isinstance(container, dict):
        container[data.draw(TEXTS)] = copied(data.draw(st.sampled_from(HOSTILE)))
    elif what == "wrap":
        container[key] = data.draw(st.sampled_from([[value], {"x": value}, [[value]], str(value)]))
    elif what == "unwrap" and isinstance(value, (list, dict)) and value:
        container[key] = next(iter(value.values() if isinstance(value, dict) else value))
    elif what == "swap":
        other, name = data.draw(st.sampled_from(everywhere))
        container[key] = copied(other[name])
    elif isinstance(container, list):
        container.append(copied(value))


def changed(tree: dict[str, Any], data: st.DataObject) -> bytes:
    """The JSON text of a tree after some changes."""
    tree = copied(tree)
    for _ in range(data.draw(st.integers(1, 3))):
        change(tree, data)
    everywhere = places(tree)
    if everywhere and data.draw(st.integers(0, 9)) == 0:
        container, key = data.draw(st.sampled_from(everywhere))
        container[key] = "RAW"
        return json.dumps(tree).replace('"RAW"', data.draw(st.sampled_from(RAW))).encode()
    return json.dumps(tree).encode()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the values."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def joined(header: bytes, values: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + values


def often(examples: int) -> Callable[[Any], Any]:
    """The same examples each time. `must_end` watches the time of each, and not the clock of a busy machine."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=health)


@each_source
@often(75)
@given(data=st.data())
def test_a_changed_configuration(saved: dict[str, Path], tmp_path: Path, source: str, data: st.DataObject) -> None:
    config = json.loads((saved[source] / CONFIG_FILE).read_bytes())
    read(changed(config, data), (saved[source] / TENSOR_FILE).read_bytes(), tmp_path)


@each_source
@often(40)
@given(data=st.data())
def test_a_changed_header(saved: dict[str, Path], tmp_path: Path, source: str, data: st.DataObject) -> None:
    header, values = parts((saved[source] / TENSOR_FILE).read_bytes())
    if data.draw(st.booleans()):
        del header["__metadata__"][SEAL]
    read((saved[source] / CONFIG_FILE).read_bytes(), joined(changed(header, data), values), tmp_path)


@often(75)
@given(data=st.data())
def test_a_changed_record(saved: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    """Facts that PEFT's format cannot say lie in the header, and a stranger may write them there as well."""
    folder = saved["LORA in PEFT's format"]
    header, values = parts((folder / TENSOR_FILE).read_bytes())
    del header["__metadata__"][SEAL]
    header["__metadata__"][RECORD] = changed(json.loads(header["__metadata__"][RECORD]), data).decode()
    read((folder / CONFIG_FILE).read_bytes(), joined(json.dumps(header).encode(), values), tmp_path)


# ---- changed bytes ---------------------------------------------------------------------------------------------------


def spoilt(data: bytes, size: int, choice: random.Random) -> bytes:
    """Bytes of the first `size` flipped, inserted, deleted, or all from one on left out."""
    what = choice.choice(["flip", "flip", "insert", "delete", "copy", "truncate"])
    at, length = choice.randrange(size), choice.choice([1, 1, 2, 8, 100])
    if what == "flip":
        new = bytearray(data)
        for _ in range(choice.choice([1, 1, 2, 10])):
            new[choice.randrange(size)] ^= 1 << choice.randrange(8)
        return bytes(new)
    if what == "insert":
        return data[:at] + choice.randbytes(length) + data[at:]
    if what == "delete":
        return data[:at] + data[at + length :]
    if what == "copy":
        other = choice.randrange(size)
        return data[:at] + data[other : other + length] + data[at + length :]
    return data[:at]


def test_changed_bytes(saved: dict[str, Path], tmp_path: Path) -> None:
    """Five hundred files. What still loads has the very tensors that were saved."""
    choice, loaded, sentences = random.Random(0), 0, set()
    originals = {name: values_of((folder / TENSOR_FILE).read_bytes()) for name, folder in saved.items()}
    for number in range(500):
        source = list(SOURCES)[number % len(SOURCES)]
        config, tensors = ((saved[source] / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE))
        if number % 3 == 0:
            config = spoilt(config, len(config), choice)
        else:
            # The header is small, but all depends on it.
            header = 8 + int.from_bytes(tensors[:8], "little")
            tensors = spoilt(tensors, header if number % 3 == 1 else len(tensors), choice)
        sentence = read(config, tensors, tmp_path)
        if sentence is None:
            loaded += 1
            assert_same_values(values_of(tensors), originals[source])
        else:
            sentences.add(sentence)
    print(f"{loaded} files were read, {len(sentences)} sentences")
    assert 0 < loaded < 125 and len(sentences) > 50


def test_every_flipped_bit_of_the_values_is_seen(saved: dict[str, Path]) -> None:
    folder = saved["VPT"]
    data = (folder / TENSOR_FILE).read_bytes()
    header, values = parts(data)
    start = len(data) - len(values)
    for at in range(start, len(data), 7):
        found = memoryview(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])[start:]
        assert seal_of(header, found) != header["__metadata__"][SEAL]


def test_a_file_without_a_digest_is_read(saved: dict[str, Path], tmp_path: Path) -> None:
    """As the PEFT package writes them."""
    for folder in saved.values():
        header, values = parts((folder / TENSOR_FILE).read_bytes())
        del header["__metadata__"][SEAL]
        text = (folder / CONFIG_FILE).read_bytes()
        assert read(text, joined(json.dumps(header).encode(), values), tmp_path) is None
