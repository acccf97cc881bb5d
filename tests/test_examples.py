"""The examples, on little data: what they say and leave behind. The server and the trainers have tests of their own."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from examples import export, many_tasks, own_backbone, own_data, push_and_pull, quickstart, segmentation, shapes
from point_peft.quickstart import __main__ as program
from point_peft.quickstart import compare, data

pytest_plugins = ["tests.hub_fixture"]

# --- data ---


@pytest.fixture(scope="module")
def digits() -> data.Clouds:
    return data.load_digits_clouds(n=64)


def test_digits_splits_are_disjoint_and_even(digits):
    parts = [digits.train, digits.val, digits.test]
    clouds = [cloud.numpy().tobytes() for points, _ in parts for cloud in points]
    assert len(set(clouds)) == len(clouds) == 1797
    assert [round(10 * len(labels) / 1797) for _, labels in parts] == [6, 2, 2]
    for _, labels in parts:
        counts = torch.bincount(labels, minlength=10)
        assert counts.min() >= 0.9 * counts.max() - 2
    again = data.load_digits_clouds(n=64)
    assert torch.equal(again.train[0], digits.train[0]) and torch.equal(again.test[1], digits.test[1])


def test_lift_follows_the_image():
    image = np.zeros((8, 8))
    image[1, 2], image[6, 5] = 4, 12  # row, column
    cloud = data.lift(image, 4000, np.random.default_rng(0))
    assert np.linalg.norm(cloud, axis=1).max() == pytest.approx(1, abs=1e-5)
    bright = cloud[:, 1] < 0.2  # the lower right pixel is the bright one, and low rows lie below
    assert bright.mean() == pytest.approx(0.75, abs=0.03)
    assert cloud[bright, 0].mean() > cloud[~bright, 0].mean()
    extent = np.ptp(cloud[bright], axis=0) / np.ptp(cloud[~bright], axis=0)
    assert extent == pytest.approx([1, 1, 3], rel=0.05)
    assert np.ptp(cloud[bright], axis=0)[2] == pytest.approx(2 * np.ptp(cloud[bright], axis=0)[0], rel=0.05)


def test_tasks_and_subsets(digits):
    small = digits.subset(train=30, val=20, test=10)
    assert [len(labels) for _, labels in (small.train, small.val, small.test)] == [30, 20, 10]
    other = data.parity(small)
    assert torch.equal(other.test[1], small.test[1] % 2) and torch.equal(other.test[0], small.test[0])
    assert len(other.class_names) == 2


def test_radhar_reader(tmp_path):
    """A small file of the same layout: official test split, validation by recording, far clutter gone."""
    rng = np.random.default_rng(0)
    recording = np.repeat(np.arange(30), 3)
    labels = recording % 5
    points = rng.normal(scale=0.3, size=(90, 50, 3)) + np.array([2, 0, 1])
    points[:, :5] += 30
    file = tmp_path / "radhar.npz"
    names = np.array(["boxing", "jack", "jump", "squats", "walk"])
    np.savez(
        file,
        points=points.astype(np.float16),
        labels=labels.astype(np.int16),
        split=(recording >= 25).astype(np.int8),
        recording=recording.astype(np.int16),
        class_names=names,
    )
    clouds = data.load_radhar(file)
    assert [len(split[1]) for split in (clouds.train, clouds.val, clouds.test)] == [60, 15, 15]
    assert clouds.class_names == tuple(names)
    for split, _ in (clouds.train, clouds.val, clouds.test):
        assert split.dtype == torch.float32 and split.square().sum(dim=2).max() <= 1.0001
    assert data.activity_groups(clouds).test[1].max() == 2


# --- quickstart ---


def tiny(*options: str) -> list[str]:
    """The options of a quickstart of seconds, and further ones."""
    return ["--epochs", "1", "--train", "20", "--val", "10", "--test", "20", *options]


def test_quickstart_from_end_to_end(tmp_path, capfd):
    """It saves, reloads and swaps (and compares logits itself), and leaves two adapters and a picture."""
    quickstart.main(tiny("--out", str(tmp_path)))
    printed, bars = capfd.readouterr()
    for words in ("train: 20 of ", "epoch 1/1", "bit for bit", "second task", "microseconds", "MB"):
        assert words in printed
    assert bars == ""  # nobody watches
    for task in ("first", "second"):
        assert (tmp_path / task / "adapter_model.safetensors").is_file()
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_beside_other_methods(tmp_path, capsys):
    quickstart.main(tiny("--out", str(tmp_path / "out"), "--compare", "--seeds", "1"))
    table = capsys.readouterr().out.splitlines()[-len(compare.METHODS) :]
    for method, line in zip(compare.METHODS, table, strict=True):
        assert line.strip().startswith(method) and "%" in line
    trainable = [int(line.split()[-5].replace(",", "")) for line in table]
    assert trainable[0] < trainable[2] < trainable[1] / 5
    assert not (tmp_path / "out").exists()


def test_quickstart_says_what_an_option_needs(tmp_path, capsys):
    with pytest.raises(SystemExit, match="--data radhar needs --file"):
        quickstart.main(["--data", "radhar", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--seeds", "2", "--out", str(tmp_path)])
    assert "--seeds is for --compare" in capsys.readouterr().err


@pytest.mark.parametrize("package", program.NEEDED)
def test_quickstart_says_before_it_begins_which_extra_it_needs(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"quickstart: error: the parts of the quickstart need {package}, .*: pip install 'point-peft\[examples\]'$"
    with pytest.raises(SystemExit, match=words) as raised:
        program.main()
    assert "\n" not in str(raised.value) and capsys.readouterr().out == ""


# --- the others ---


def test_own_backbone(tmp_path, capsys):
    """The script itself ends with an error where the backbone has changed or the reloaded adapter answers otherwise."""
    own_backbone.main(["--steps", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in (
        "known by: traced",
        "heads:         'answer'",
        "test clouds",
        "answers as before",
        "equal bit for bit",
    ):
        assert words in printed
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_own_data(tmp_path, capsys):
    small = ["--each", "10", "--epochs", "1", "--out", str(tmp_path / "made")]
    own_data.main(small)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'made' / 'shapes'}: 28 clouds to train on, 4 to validate, 8 to test" in printed
    assert "classes: ball, box, cone, cylinder\n" in printed
    shares = re.search(r"^\w+_\d\d\.ply: ball (\d+) %, box (\d+) %, cone (\d+) %, cylinder (\d+) %$", printed, re.M)
    assert shares and 97 <= sum(map(int, shares.groups())) <= 103
    assert (tmp_path / "made" / "run" / "confusion.png").is_file()

    own_data.main([str(tmp_path / "made" / "shapes"), *small])
    again = capsys.readouterr().out
    assert shares[0] in again and "epoch" not in again, "a folder that is there, and a run that is finished"


def test_shapes_are_what_their_names_say():
    rng = np.random.default_rng(0)
    clouds = {kind: data.unit_sphere(shapes.shape(kind, 4000, rng)) for kind in shapes.KINDS}
    assert all(cloud.shape == (4000, 3) for cloud in clouds.values())
    cone = clouds["cone"]
    low, high = cone[cone[:, 2] < 0], cone[cone[:, 2] > 0]
    assert np.ptp(low[:, 0]) > 1.5 * np.ptp(high[:, 0]), "a cone stands on its wide end"


def test_many_tasks(capsys):
    many_tasks.main(["--steps", "2", "--train", "40", "--test", "12", "--points", "128"])
    printed = capsys.readouterr().out
    for words in ("digit: ", "parity: ", "% of 12 clouds", "ms a cloud", "digits and shapes in one batch: ", "% right"):
        assert words in printed
    assert re.search(r"routed: \d+ of 24 to their own adapter, \d+ to none", printed)


@pytest.mark.parametrize("hub", ["lfs"], indirect=True)
def test_push_and_pull(hub, capsys):
    """The script itself ends with an error where what came back answers otherwise than what went."""
    push_and_pull.main(["alice/digits", "--private", "--steps", "2", "--test", "8"])
    printed = capsys.readouterr().out
    assert f"pushed: {hub.url}/alice/digits/commit/{hub.commits('alice/digits')[0].oid}" in printed
    assert "of 8 test clouds" in printed and "equal bit for bit" in printed
    card = hub.files("alice/digits")["README.md"].decode()
    assert "lifted digits" in card and "license: apache-2.0" in card


def test_segmentation(tmp_path, capsys):
    segmentation.main(["--points", "4000", "--epochs", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"village.npz: 4000 points, \d+ \+ \d+ \+ \d+ pieces to train, validate, test", printed)
    assert re.search(r"run: mIoU \d+\.\d % in the east", printed)
    assert (tmp_path / "scene.png").read_bytes().startswith(b"\x89PNG")


def test_export(capfd):
    export.main(["--method", "lora", "--points", "64"])
    printed, errors = capfd.readouterr()
    assert re.search(r"^lora.onnx: \d+\.\d MB$", printed, re.M) and errors == ""
    differences = re.findall(r"^\d at once: outputs \(\d, 10\), at most (\S+) from the model's$", printed, re.M)
    assert len(differences) == 2 and all(float(difference) < 1e-4 for difference in differences)


def test_export_of_point_peft_has_a_bank():
    """Its export takes half a minute; tests/test_export.py exports every method on a small backbone."""
    model = export.adapted("point_peft", torch.rand(32, 64, 3))
    assert not model.training and any("bank" in name for name in model.state_dict())
