"""Configurations: validated, frozen, the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from point_peft import METHODS, PeftConfig, PointPEFTConfig, TunerConfig
from point_peft.errors import PointPeftError
from point_peft.parts.base import Blueprint
from point_peft.schema import MAX_INTEGER

pytestmark = pytest.mark.smoke


def again(config: PeftConfig) -> PeftConfig:
    return PeftConfig.from_json(json.loads(json.dumps(config.to_json())))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_json_and_back(method: str) -> None:
    config = PeftConfig.of(METHODS[method]())
    assert again(config) == config and hash(again(config)) == hash(config)


def test_json_and_back_of_every_kind_of_value() -> None:
    tuner = PointPEFTConfig(
        target_modules=["blocks.0", "blocks.1"], exclude_modules=r"blocks\.1", layers_to_transform=[0, 1],
        modules_to_save=[], adapter_scale=1, centre_ratio=0.25, pooling_norm="layer", top_k=3, memory_bank=True,
    )  # fmt: skip
    tuners = [tuner, PointPEFTConfig()]
    config = PeftConfig(tuners=tuners, modules_to_save="a|b", base_model_name_or_path="x", revision="y")
    assert again(config) == config
    assert again(config).tuners[0].layers_to_transform == (0, 1)
    assert config.with_base("z") == dataclasses.replace(config, base_model_name_or_path="z", revision=None)


def test_frozen_keyword_only_and_hashable() -> None:
    names = ["a"]
    config = PointPEFTConfig(target_modules=names)
    names.append("b")
    assert config.target_modules == ("a",) and config == PointPEFTConfig(target_modules=("a",))
    assert PointPEFTConfig(target_modules={"b", "a"}) == PointPEFTConfig(target_modules=["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'adapter_width'"):
        config.adapter_width = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        PointPEFTConfig(["a"])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        PeftConfig([config])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'adapter_widht'"):
        PointPEFTConfig(adapter_widht=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter_width": 0}, "PointPEFTConfig.adapter_width is 0; allowed: 1 or more"),
        ({"adapter_width": 2.0}, f"PointPEFTConfig.adapter_width is 2.0; allowed: an integer, at most {MAX_INTEGER}"),
        ({"adapter_width": True}, f"PointPEFTConfig.adapter_width is True; allowed: an integer, at most {MAX_INTEGER}"),
        ({"adapter_width": MAX_INTEGER + 1}, "PointPEFTConfig.adapter_width is 16777217; allowed: an integer, at most"),
        ({"memory_bank": 1}, "PointPEFTConfig.memory_bank is 1; allowed: True or False"),
        ({"prompt_dropout": 1.0}, "PointPEFTConfig.prompt_dropout is 1.0; allowed: 0 or more and less than 1"),
        ({"prompt_dropout": float("nan")}, "PointPEFTConfig.prompt_dropout is nan; allowed: a finite number"),
        ({"adapter_scale": float("inf")}, "PointPEFTConfig.adapter_scale is inf; allowed: a finite number"),
        ({"adapter_scale": 10**400}, "PointPEFTConfig.adapter_scale is 1000"),
        ({"adapter_scale": "0.7"}, "PointPEFTConfig.adapter_scale is '0.7'; allowed: a finite number"),
        ({"init": "Identity"}, "PointPEFTConfig.init is 'Identity'; allowed: 'identity' or 'published'"),
        ({"target_modules": 3}, "PointPEFTConfig.target_modules is 3; allowed: a string or a list of a string or None"),
        ({"target_modules": {1, "a"}}, "PointPEFTConfig.target_modules is (1, 'a'); allowed: a string or a list"),
        ({"target_modules": ["a", None]}, "PointPEFTConfig.target_modules is ('a', None); allowed"),
        ({"target_modules": b"a"}, "PointPEFTConfig.target_modules is b'a'; allowed"),
        ({"target_modules": [*["a" * 10**6], 3]}, "PointPEFTConfig.target_modules is ('aaa"),
        ({"layers_to_transform": [-1]}, "PointPEFTConfig.layers_to_transform is (-1,); allowed: block numbers from 0"),
        ({"layers_to_transform": 0}, "PointPEFTConfig.layers_to_transform is 0; allowed: a list of an integer"),
        ({"layers_to_transform": [True]}, "PointPEFTConfig.layers_to_transform is (True,); allowed"),
        ({"top_k": 9}, "PointPEFTConfig.top_k is 9; allowed: 1 to num_prompts - 2 = 8, or None"),
        ({"modules_to_save": 5}, "PointPEFTConfig.modules_to_save is 5; allowed"),
    ],
)
def test_a_message_names_field_value_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PointPeftError, match="; allowed: ") as caught:
        PointPEFTConfig(**values)
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"tuners": []}, r"PeftConfig\.tuners is \(\); allowed: a list of at least one method's configuration"),
        ({"tuners": None}, r"PeftConfig\.tuners is None; allowed"),
        ({"tuners": PointPEFTConfig()}, r"PeftConfig\.tuners is PointPEFTConfig.*; allowed"),
        ({"tuners": ["POINT_PEFT"]}, r"PeftConfig\.tuners is \('POINT_PEFT',\); allowed: a list of TunerConfig"),
        ({"modules_to_save": 5}, r"PeftConfig\.modules_to_save is 5; allowed: a string or a list of a string or None"),
        ({"modules_to_save": [3]}, r"PeftConfig\.modules_to_save is \(3,\); allowed"),
        ({"base_model_name_or_path": 3}, r"base_model_name_or_path is 3; allowed: a string or None"),
        ({"revision": ["main"]}, r"revision is \('main',\); allowed: a string or None"),
    ],
)
def test_a_wrong_adapter_configuration(values: dict[str, Any], match: str) -> None:
    with pytest.raises(PointPeftError, match=match):
        PeftConfig(**{"tuners": [PointPEFTConfig()], **values})


def test_composition() -> None:
    one, two = PointPEFTConfig(modules_to_save=["a", "b"]), PointPEFTConfig(modules_to_save=["b", "c"])
    assert PeftConfig(tuners=[one, two]).saved_modules == ("a", "b", "c")
    assert PeftConfig(tuners=[one, two], modules_to_save=["z"]).saved_modules == ("z",)
    assert PeftConfig(tuners=[one, two], modules_to_save=[]).saved_modules == ()
    assert PeftConfig(tuners=[PointPEFTConfig()]).saved_modules is None
    assert PeftConfig(tuners=[PointPEFTConfig(modules_to_save="a|b"), PointPEFTConfig()]).saved_modules == "a|b"
    with pytest.raises(PointPeftError, match="modules_to_save: state a regular expression in PeftConfig"):
        PeftConfig(tuners=[one, PointPEFTConfig(modules_to_save="a|b")]).saved_modules  # noqa: B018 - it raises
    config = PeftConfig(tuners=[one])
    assert PeftConfig.of(config) is config and PeftConfig.of(one) == config
    with pytest.raises(PointPeftError, match="config must be a method's configuration or a PeftConfig, not dict"):
        PeftConfig.of({"method": "POINT_PEFT"})  # type: ignore[arg-type]
    fresh = PointPEFTConfig(num_prompts=0)
    assert PeftConfig(tuners=[fresh]).identity_at_init and not PeftConfig(tuners=[fresh, one]).identity_at_init


def test_unknown_methods_and_fields() -> None:
    data = PeftConfig.of(PointPEFTConfig()).to_json()
    with pytest.raises(PointPeftError, match="PeftConfig has no field 'new'; a newer version of point_peft may"):
        PeftConfig.from_json({**data, "new": 1})
    with pytest.raises(PointPeftError, match="PointPEFTConfig has no field 'new'"):
        PeftConfig.from_json({**data, "tuners": [{**data["tuners"][0], "new": 1}]})
    with pytest.raises(PointPeftError, match="method None is unknown; known methods: "):
        PeftConfig.from_json({**data, "tuners": [{}]})
    with pytest.raises(PointPeftError, match="tuners must be a list of objects"):
        PeftConfig.from_json({key: value for key, value in data.items() if key != "tuners"})


def test_a_class_registers_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(METHODS):
        monkeypatch.setitem(METHODS, name, METHODS[name])  # restored afterwards

    def define(method_name: str | None) -> Any:
        body: dict[str, Any] = {"__annotations__": {"width": "int"}, "width": 3}
        body["build"] = lambda self, backbone: Blueprint()
        if method_name is not None:
            body["method"] = method_name
        return dataclass(frozen=True, kw_only=True)(type("Mine", (TunerConfig,), body))

    try:
        made = define("MINE")
        assert METHODS["MINE"].__name__ == "Mine"
        assert TunerConfig.from_json({"method": "MINE", "width": 4}) == made(width=4)
        with pytest.raises(PointPeftError, match=r"Mine\.width is 'x'; allowed: an integer"):
            made(width="x")
        define("MINE")  # the same class again, as when a module is reloaded
        with pytest.raises(TypeError, match="Mine must state its method name"):
            define(None)
        with pytest.raises(TypeError, match=r"'POINT_PEFT' is already registered by point_peft\..*PointPEFTConfig"):
            define("POINT_PEFT")
        assert METHODS["POINT_PEFT"] is PointPEFTConfig
    finally:
        METHODS.pop("MINE", None)


def test_a_method_must_build() -> None:
    class Lazy(TunerConfig):
        method: ClassVar[str] = "LAZY"

    try:
        with pytest.raises(TypeError, match="abstract"):
            Lazy()  # type: ignore[abstract]
    finally:
        del METHODS["LAZY"]
