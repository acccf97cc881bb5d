"""Push and pull through the real client: what arrives, what is committed, and what is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download, scan_cache_dir
from torch import Tensor

from point_peft import BitFitConfig, HubError, PeftConfig, PointPeftError, PointPeftModel, list_adapters
from point_peft.cli import main
from point_peft.files.format import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from point_peft.hub import asking, pulling, pushing
from tests.adapting import ONE_BLOCK, PAIRS, adapt, add, rescramble, run, without_search
from tests.hub_server import HubServer
from tests.peft_package import peft
from tests.zoo import BACKBONES, TinyBackbone

pytest_plugins = ["tests.hub_fixture"]

ON_POINT_MAE = [method for method, backbone in PAIRS if backbone.name == "point_mae"]
MAE = BACKBONES["point_mae"]
SIMPLE = without_search(ONE_BLOCK)
"""Enough of a backbone for what does not depend on the method."""
REPO = "alice/adapter"
FILES = {CARD_FILE, CONFIG_FILE, TENSOR_FILE}

in_one_mode = pytest.mark.parametrize("hub", ["lfs"], indirect=True)
"""For what does not depend on how large files travel."""


@pytest.fixture(scope="module")
def model() -> PointPeftModel:
    """An adapted model that no test changes."""
    return adapt(SIMPLE, "BITFIT")


def pulled(
    source: str = REPO, name: str = "default", backbone: TinyBackbone = SIMPLE, **options: Any
) -> PointPeftModel:
    return PointPeftModel.from_pretrained(backbone.build(), source, name, **options).eval()


def logits(source: str = REPO, **options: Any) -> Tensor:
    return run(pulled(source, **options), SIMPLE)


def committed(hub: HubServer, repo: str = REPO, revision: str = "main") -> set[str]:
    """The files of a repository, but for the one that the Hub puts there itself."""
    return set(hub.files(repo, revision)) - {".gitattributes"}


def other(seed: int = 9) -> PointPeftModel:
    changed = adapt(SIMPLE, "BITFIT")
    rescramble(changed, seed=seed)
    return changed


# ---- push and pull ---------------------------------------------------------------------------------------------------


@in_one_mode
@pytest.mark.parametrize("method", ON_POINT_MAE)
def test_push_and_pull_give_equal_logits(hub: HubServer, method: str) -> None:
    model = adapt(MAE, method)
    expected = run(model, MAE)
    url = model.push_to_hub(REPO)
    assert len(hub.commits(REPO)) == 2, "one commit beside the first"
    assert url == f"{hub.url}/{REPO}/commit/{hub.commits(REPO)[0].oid}"
    assert committed(hub) == FILES
    assert torch.equal(run(pulled(backbone=MAE), MAE), expected)


def test_only_who_may_see_a_private_repository_can_pull_from_it(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO, private=True)
    assert hub.repo(REPO).private
    assert torch.equal(logits(), run(model, SIMPLE))
    assert torch.equal(logits(token="hf_alice"), run(model, SIMPLE))
    for token in ("hf_bob", False):
        with pytest.raises(HubError, match="no repository 'alice/adapter' that can be seen.*private.*token"):
            pulled(token=token)


@in_one_mode
def test_private_is_refused_where_the_repository_is_public(hub: HubServer, model: PointPeftModel) -> None:
    hub.put(REPO, {"notes.txt": b"mine"})
    with pytest.raises(HubError, match="private is asked for, and 'alice/adapter' exists and is public"):
        model.push_to_hub(REPO, private=True)
    assert committed(hub) == {"notes.txt"}


def test_a_branch_is_made_and_main_stays(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO, revision="experiments/a")
    assert committed(hub) == set()
    assert committed(hub, revision="experiments/a") == FILES
    other().push_to_hub(REPO, revision="experiments/a")
    assert len(hub.commits(REPO, "experiments/a")) == 3
    assert torch.equal(logits(revision="experiments/a"), run(other(), SIMPLE))
    with pytest.raises(HubError, match=f"'alice/adapter' has no file '{CONFIG_FILE}' at commit"):
        pulled()


@in_one_mode
def test_pull_by_tag_and_by_commit(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    HfApi().create_tag(REPO, tag="v1.0")
    first = hub.commits(REPO)[0].oid
    other().push_to_hub(REPO)
    for revision in ("v1.0", first, first[:8]):
        assert torch.equal(logits(revision=revision), run(model, SIMPLE)), revision
    for more in ({}, {"revision": "main"}, {"revision": hub.commits(REPO)[0].oid}):
        assert torch.equal(logits(**more), run(other(), SIMPLE)), more


def test_a_pull_request_can_be_opened_pulled_and_pushed_to(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    url = other().push_to_hub(REPO, create_pr=True, token="hf_bob", commit_message="Better")
    assert url == f"{hub.url}/{REPO}/discussions/1"
    assert (hub.repo(REPO).pulls[1].author, hub.repo(REPO).pulls[1].title) == ("bob", "Better")
    assert torch.equal(logits(revision="refs/pr/1"), run(other(), SIMPLE))
    assert torch.equal(logits(), run(model, SIMPLE))
    other(10).push_to_hub(REPO, revision="refs/pr/1", token="hf_bob")
    assert torch.equal(logits(revision="refs/pr/1"), run(other(10), SIMPLE))
    HfApi().merge_pull_request(REPO, 1)
    assert torch.equal(logits(), run(other(10), SIMPLE))


@in_one_mode
def test_bob_cannot_push_to_what_is_alices(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    with pytest.raises(HubError, match="refuses 'alice/adapter' .403.: the token is wrong or may not do this"):
        other().push_to_hub(REPO, token="hf_bob")
    assert len(hub.commits(REPO)) == 2


# ---- where the files lie ---------------------------------------------------------------------------------------------


def test_two_adapters_in_one_repository(hub: HubServer) -> None:
    model = adapt(SIMPLE, "BITFIT")
    add(model, SIMPLE, "LORA", "scans")
    expected = {}
    for name in ("default", "scans"):
        with model.use_adapter(name):
            expected[name] = run(model, SIMPLE)
    model.push_to_hub(REPO, ["default", "scans"])
    assert len(hub.commits(REPO)) == 2
    assert committed(hub) == FILES | {f"scans/{name}" for name in (CONFIG_FILE, TENSOR_FILE)}, "one card for both"
    assert torch.equal(logits(), expected["default"])
    hub.put(REPO, {CARD_FILE: hub.files(REPO)[CARD_FILE] + b"\nMine.\n"})
    before = hub.files(REPO)
    model.push_to_hub(REPO, ["default", "scans"])
    assert hub.files(REPO) == before and b"\nMine.\n" in before[CARD_FILE]
    again = pulled()
    again.load_adapter(REPO, "scans", subfolder="scans")
    again.set_adapter("scans")
    assert torch.equal(run(again, SIMPLE), expected["scans"])


@in_one_mode
def test_subfolder(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO, subfolder="runs/1")
    other().push_to_hub(REPO, subfolder="runs/2")
    assert committed(hub) == {CARD_FILE, *(f"runs/{run}/{name}" for run in (1, 2) for name in FILES - {CARD_FILE})}
    assert torch.equal(logits(subfolder="runs/1"), run(model, SIMPLE))
    assert torch.equal(logits(subfolder="runs/2"), run(other(), SIMPLE))
    with pytest.raises(HubError, match=f"no file '{CONFIG_FILE}'.* adapters in the subfolders 'runs/1', 'runs/2'"):
        pulled()


@in_one_mode
def test_other_files_of_the_repository_stay(hub: HubServer, model: PointPeftModel) -> None:
    mine = {"notes.txt": b"mine", "figure.png": b"\0" * 100, "pytorch_model.bin": b"a backbone's"}
    hub.put(REPO, mine)
    model.push_to_hub(REPO)
    assert committed(hub) == FILES | set(mine)
    assert {name: hub.files(REPO)[name] for name in mine} == mine


@in_one_mode
def test_only_the_adapters_own_files_are_pushed(hub: HubServer, model: PointPeftModel, tmp_path: Path) -> None:
    """Files beside an adapter that was saved, and those that a link there leads to, stay at home."""
    secret = tmp_path / "secret"
    secret.write_text("a password")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    (folder / "training.log").write_text("long")
    (folder / CARD_FILE).unlink()
    (folder / CARD_FILE).symlink_to(secret)
    PointPeftModel.from_pretrained(SIMPLE.build(), folder).push_to_hub(REPO)
    assert committed(hub) == FILES
    assert not any(b"password" in content for content in hub.files(REPO).values())


# ---- what is committed -----------------------------------------------------------------------------------------------


@in_one_mode
def test_commit_message_and_description(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO, commit_message="Best of five", commit_description="ScanObjectNN, 88.1 %")
    assert (hub.commits(REPO)[0].title, hub.commits(REPO)[0].message) == ("Best of five", "ScanObjectNN, 88.1 %")
    other().push_to_hub(REPO)
    assert re.fullmatch(r"Upload default with point_peft [\d.]+\S*", hub.commits(REPO)[0].title)


def test_what_has_not_changed_is_not_committed_again(hub: HubServer, model: PointPeftModel) -> None:
    url = model.push_to_hub(REPO)
    assert model.push_to_hub(REPO) == url
    assert len(hub.commits(REPO)) == 2


@in_one_mode
def test_what_the_owner_wrote_into_the_card_stays(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    card = hub.files(REPO)[CARD_FILE].decode()
    ModelCard(card).validate()
    mine = "\n## How I trained it\n\nWith patience.\n"
    edited = card.replace("---\n", "---\nlicense: cc-by-4.0\n", 1) + mine
    hub.put(REPO, {CARD_FILE: edited.encode()})
    other().push_to_hub(REPO)
    now = hub.files(REPO)[CARD_FILE].decode()
    ModelCard(now).validate()
    assert now.endswith(mine)
    assert ModelCard(now).data.to_dict()["license"] == "cc-by-4.0"
    assert len(hub.commits(REPO)) == 4


@in_one_mode
def test_a_commit_that_came_in_between_is_kept(
    hub: HubServer, model: PointPeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.push_to_hub(REPO)
    asked = pulling.model_info

    def moved(*args: Any) -> Any:
        info = asked(*args)
        if "theirs.txt" not in hub.files(REPO):
            hub.put(REPO, {"theirs.txt": b"theirs", CARD_FILE: hub.files(REPO)[CARD_FILE] + b"\nTheirs.\n"})
        return info

    monkeypatch.setattr(pushing, "model_info", moved)
    other().push_to_hub(REPO)
    assert committed(hub) == FILES | {"theirs.txt"}
    assert hub.files(REPO)[CARD_FILE].endswith(b"\nTheirs.\n")
    assert len(hub.seen("POST", "/commit/")) == 3, "one of them was refused"
    assert torch.equal(logits(), run(other(), SIMPLE))


# ---- the licence of the base -----------------------------------------------------------------------------------------

SONATA = "facebook/sonata"


def based(name: str, revision: str | None = None) -> PointPeftModel:
    config = PeftConfig(tuners=[BitFitConfig()], base_model_name_or_path=name, revision=revision)
    return adapt(SIMPLE, config)


def card_of(hub: HubServer, repo: str = REPO) -> tuple[str, dict[str, Any]]:
    """The card's text and the fields of its YAML."""
    text = hub.files(repo)[CARD_FILE].decode()
    fields: dict[str, Any] = ModelCard(text).data.to_dict()
    return text, fields


def licensed(**fields: Any) -> dict[str, bytes]:
    """The files of a base."""
    return {CARD_FILE: f"---\n{json.dumps(fields)}\n---\n".encode()}


@in_one_mode
def test_the_licence_of_the_base_is_read_from_its_card_on_the_hub(hub: HubServer) -> None:
    hub.put(SONATA, licensed(license="cc-by-nc-4.0"))
    model = based(SONATA)
    model.push_to_hub(REPO)
    text, fields = card_of(hub)
    assert fields["license"] == "cc-by-nc-4.0" and fields["base_model"] == SONATA and hub.seen("GET", SONATA)
    assert f"the weights of [{SONATA}](https://huggingface.co/{SONATA}), and these are licensed `cc-by-nc-4.0`" in text
    before = hub.files(REPO)
    model.push_to_hub(REPO)
    assert hub.files(REPO) == before
    # The owner's word stays, whether it comes with the push or stands on the Hub.
    with pytest.warns(UserWarning, match="license 'mit', but the weights .* licensed 'cc-by-nc-4.0', which forbids"):
        model.push_to_hub("alice/b", license="mit")
    hub.put(REPO, {CARD_FILE: text.replace("license: cc-by-nc-4.0", "license: apache-2.0").encode()})
    with pytest.warns(UserWarning, match="license 'apache-2.0', but"):
        model.push_to_hub(REPO)
    assert (card_of(hub, "alice/b")[1]["license"], card_of(hub)[1]["license"]) == ("mit", "apache-2.0")
    model.push_to_hub("alice/c", license="cc-by-nc-sa-4.0")
    assert card_of(hub, "alice/c")[1]["license"] == "cc-by-nc-sa-4.0"


@in_one_mode
def test_a_licence_that_allows_it_is_said_and_not_taken_for_the_adapter_s(hub: HubServer) -> None:
    hub.put(SONATA, licensed(license="apache-2.0"))
    based(SONATA).push_to_hub(REPO)
    text, fields = card_of(hub)
    assert "these are licensed `apache-2.0`.\n" in text and "license" not in fields
    first = hub.commits(SONATA)[0].oid
    hub.put(SONATA, licensed(license="other", license_name="acme-nc", license_link="LICENSE"))
    based(SONATA, first).push_to_hub(REPO)
    assert card_of(hub)[0] == text.replace(" (PointTransformer)", f", revision {first} (PointTransformer)")
    based(SONATA).push_to_hub(REPO)
    text, fields = card_of(hub)
    assert "licensed `acme-nc`, which forbids" in text and fields["license_name"] == "acme-nc"


@in_one_mode
def test_base_license_goes_before_the_hub_s_word(hub: HubServer, model: PointPeftModel, tmp_path: Path) -> None:
    hub.put(SONATA, licensed(license="apache-2.0"))
    based(SONATA).push_to_hub(REPO, base_license="cc-by-nc-4.0")
    assert card_of(hub)[1]["license"] == "cc-by-nc-4.0" and not hub.seen("GET", SONATA)
    model.push_to_hub("alice/b", base_license="cc-by-nc-4.0")
    text, fields = card_of(hub, "alice/b")
    assert fields["license"] == "cc-by-nc-4.0" and "only with the weights of its base, and these are licensed" in text
    with pytest.raises(PointPeftError, match="base_license is 'CC-BY-NC-4.0'; allowed: an identifier as the Hub has"):
        model.push_to_hub("alice/c", base_license="CC-BY-NC-4.0")
    # A folder that was saved with it, and one that was not, by the command.
    based(SONATA).save_pretrained(tmp_path / "a", base_license="cc-by-nc-4.0")
    based(SONATA).save_pretrained(tmp_path / "b")
    assert main(["push", str(tmp_path / "a"), "alice/d"]) == 0 and not hub.seen("GET", SONATA)
    assert main(["push", str(tmp_path / "b"), "alice/e", "--base-license", "cc-by-nc-4.0"]) == 0
    assert card_of(hub, "alice/d")[1] == card_of(hub, "alice/e")[1] == card_of(hub)[1]


@in_one_mode
def test_each_adapter_of_a_repository_names_its_own_base(hub: HubServer) -> None:
    hub.put(SONATA, licensed(license=["cc-by-4.0", "cc-by-nc-4.0"]))
    hub.put("someone/free", licensed(license="mit"))
    based("someone/free").push_to_hub(REPO)
    based(SONATA).push_to_hub(REPO, subfolder="scenes")
    text, fields = card_of(hub)
    assert "`mit`." in text and "`cc-by-nc-4.0`, which" in text and fields["license"] == "cc-by-nc-4.0"
    assert fields["base_model"] == ["someone/free", SONATA]


@in_one_mode
def test_a_base_whose_licence_is_not_known_does_not_cost_the_push(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.put("alice/without-a-card", {})
    hub.put("alice/odd", {CARD_FILE: b"---\nlicense: {a: 1}\n---\n"})
    for name in ("alice/without-a-card", "alice/odd", "point_mae.pth", "/weights/point_mae.pth"):
        based(name).push_to_hub(REPO)
        assert "Licence" not in card_of(hub)[0] and "license" not in card_of(hub)[1]
    with pytest.warns(UserWarning, match="weights of 'alice/none' is not known, state base_license: there is"):
        based("alice/none").push_to_hub(REPO)
    hub.fault("GET", "alice/odd", times=9, status=503)
    with pytest.warns(UserWarning, match="weights of 'alice/odd' is not known, .*: the Hub answers 503"):
        based("alice/odd").push_to_hub(REPO)
    assert card_of(hub)[1]["base_model"] == "alice/odd"


# ---- what is asked for -----------------------------------------------------------------------------------------------


def paths(hub: HubServer, methods: str = ".*") -> list[str]:
    return [request.path.partition("?")[0] for request in hub.seen(methods, "")]


def test_a_load_asks_for_two_files_of_one_commit(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    hub.put(REPO, {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "more.safetensors": b"more"})
    before = hub.files(REPO)
    sha = hub.commits(REPO)[0].oid
    hub.log.clear()
    pulled()
    assert {request.method for request in hub.log} <= {"GET", "HEAD"}
    resolved = {path for path in paths(hub) if "/resolve/" in path}
    assert resolved == {f"/{REPO}/resolve/{sha}/{name}" for name in (CONFIG_FILE, TENSOR_FILE)}
    assert not any(re.search("README|modeling|bin|more", path) for path in paths(hub))
    assert hub.files(REPO) == before


@in_one_mode
def test_configuration_and_weights_are_of_the_same_commit(
    hub: HubServer, model: PointPeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves to another method's adapter after the configuration has been read."""
    model.push_to_hub(REPO)
    next_one = adapt(SIMPLE, "IA3")
    moved: list[str] = []

    def then_push(client: HfApi, repo_id: str, name: str, **options: Any) -> str:
        path = str(hf_hub_download(repo_id, name, **options))
        if not moved:
            moved.append(name)
            next_one.push_to_hub(REPO)
        return path

    monkeypatch.setattr(HfApi, "hf_hub_download", then_push)
    assert torch.equal(logits(), run(model, SIMPLE))
    assert moved == [CONFIG_FILE] and len(hub.commits(REPO)) == 3
    assert torch.equal(logits(), run(next_one, SIMPLE))


def test_what_is_cached_is_not_downloaded_again(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    pulled()
    hub.log.clear()
    assert torch.equal(logits(), run(model, SIMPLE))
    assert paths(hub) == [f"/api/models/{REPO}"]
    hub.log.clear()
    assert torch.equal(logits(force_download=True), run(model, SIMPLE))
    assert len({path for path in paths(hub, "GET|HEAD") if "/resolve/" in path}) == 2


@in_one_mode
def test_save_touches_no_network(hub: HubServer, model: PointPeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    PointPeftModel.from_pretrained(SIMPLE.build(), tmp_path / "saved")
    assert hub.log == []


@in_one_mode
def test_a_folder_goes_before_a_repository_of_its_name(
    hub: HubServer, model: PointPeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(REPO)
    assert torch.equal(logits(), run(model, SIMPLE))
    assert hub.log == []


@in_one_mode
@pytest.mark.parametrize("token", ["hf_bob", "hf_alice"])
def test_the_given_token_is_sent_everywhere_on_the_hub_and_nowhere_else(
    hub: HubServer, model: PointPeftModel, token: str
) -> None:
    who = token.removeprefix("hf_")
    model.push_to_hub(f"{who}/own", token=token, private=True)
    pulled(f"{who}/own", token=token)
    assert {request.token for request in hub.log if request.origin == "hub"} == {token}
    assert {request.token for request in hub.log if request.origin == "cdn"} == {None}


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_offline_the_cache_serves(hub: HubServer, model: PointPeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.push_to_hub(REPO)
    model.push_to_hub(REPO, revision="experiments/a", subfolder="runs/1")
    sha = hub.commits(REPO)[0].oid
    with pytest.raises(HubError, match="not in the cache.*local_files_only"):
        pulled(local_files_only=True)
    pulled()
    pulled(revision="experiments/a", subfolder="runs/1")
    hub.log.clear()
    where: Iterable[dict[str, Any]] = (
        {},
        {"revision": "main"},
        {"revision": sha},
        {"revision": "experiments/a", "subfolder": "runs/1"},
    )
    for options in where:
        assert torch.equal(logits(local_files_only=True, **options), run(model, SIMPLE)), options
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for options in where:
        assert torch.equal(logits(**options), run(model, SIMPLE)), options
    with pytest.raises(HubError, match="'alice/adapter' at revision 'v2' is not in the cache.*HF_HUB_OFFLINE"):
        pulled(revision="v2")
    with pytest.raises(HubError, match="nothing was pushed to 'alice/adapter': HF_HUB_OFFLINE is set"):
        model.push_to_hub(REPO)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        list_adapters("alice/point-mae")
    assert hub.log == []


def test_cache_dir(hub: HubServer, model: PointPeftModel, tmp_path: Path) -> None:
    model.push_to_hub(REPO)
    assert torch.equal(logits(cache_dir=tmp_path / "elsewhere"), run(model, SIMPLE))
    assert (tmp_path / "elsewhere" / "models--alice--adapter" / "snapshots").is_dir()
    assert not (tmp_path / "home" / "hub").exists()
    assert torch.equal(logits(cache_dir=tmp_path / "elsewhere", local_files_only=True), run(model, SIMPLE))
    with pytest.raises(HubError, match="not in the cache"):
        pulled(local_files_only=True)


@in_one_mode
def test_the_cache_remembers_where_a_branch_was(hub: HubServer, model: PointPeftModel) -> None:
    model.push_to_hub(REPO)
    pulled()
    other().push_to_hub(REPO)
    assert torch.equal(logits(local_files_only=True), run(model, SIMPLE))
    pulled()
    assert torch.equal(logits(local_files_only=True), run(other(), SIMPLE))
    scanned = scan_cache_dir()
    (repo,) = scanned.repos
    assert not scanned.warnings and set(repo.refs) == {"main"} and len(repo.revisions) == 2


@in_one_mode
def test_a_cache_without_links(hub: HubServer, model: PointPeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    model.push_to_hub(REPO)
    assert torch.equal(logits(), run(model, SIMPLE))
    assert torch.equal(logits(local_files_only=True), run(model, SIMPLE))


@in_one_mode
def test_a_cache_that_cannot_be_written_to_serves(hub: HubServer, model: PointPeftModel, tmp_path: Path) -> None:
    model.push_to_hub(REPO)
    pulled()
    refs = tmp_path / "home" / "hub" / "models--alice--adapter" / "refs"
    (refs / "main").unlink()
    refs.rmdir()
    refs.write_text("not a folder")
    assert torch.equal(logits(), run(model, SIMPLE))


# ---- PEFT's format ---------------------------------------------------------------------------------------------------


@in_one_mode
def test_peft_reads_what_is_pushed_of_lora_alone(hub: HubServer) -> None:
    model = adapt(SIMPLE, "LORA")
    model.push_to_hub(REPO)
    assert json.loads(hub.files(REPO)[CONFIG_FILE])["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(SIMPLE.build(), REPO).eval()
    assert torch.allclose(run(theirs, SIMPLE), run(model, SIMPLE), atol=1e-6)
    assert torch.equal(logits(), run(model, SIMPLE))


@in_one_mode
def test_what_peft_pushes_is_read(hub: HubServer) -> None:
    torch.manual_seed(0)
    how = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    theirs = peft.get_peft_model(SIMPLE.build(), how).eval()
    theirs.push_to_hub(REPO)
    assert torch.allclose(logits(), run(theirs, SIMPLE), atol=1e-6)


# ---- finding ---------------------------------------------------------------------------------------------------------


@in_one_mode
def test_adapters_of_a_base_are_listed(hub: HubServer, model: PointPeftModel) -> None:
    def card(base: str, **more: Any) -> bytes:
        fields = {"base_model": base, "base_model_relation": "adapter", "library_name": "point-peft", **more}
        return f"---\n{json.dumps(fields)}\n---\n".encode()

    names = [f"alice/a{number}" for number in range(5)]
    for name in names:
        hub.put(name, {CARD_FILE: card("alice/point-mae")})
    hub.put("alice/of-another", {CARD_FILE: card("alice/point-bert")})
    hub.put("alice/by-another", {CARD_FILE: card("alice/point-mae", library_name="peft")})
    hub.put("alice/no-adapter", {CARD_FILE: card("alice/point-mae", base_model_relation="finetune")})
    hub.put("alice/without-a-card", {})
    hub.put("bob/hidden", {CARD_FILE: card("alice/point-mae")})
    hub.repo("bob/hidden").private = True
    assert sorted(info.id for info in list_adapters("alice/point-mae")) == names
    assert "bob/hidden" in {info.id for info in list_adapters("alice/point-mae", token="hf_bob")}
    assert list_adapters("alice/unknown") == []


@in_one_mode
def test_what_is_pushed_for_a_named_base_is_listed(hub: HubServer) -> None:
    hub.put("alice/point-mae", {})
    based("alice/point-mae").push_to_hub(REPO)
    assert [info.id for info in list_adapters("alice/point-mae")] == [REPO]
