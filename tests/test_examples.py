"""The examples: the data sets, the quickstart from end to end and beside other methods."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from examples import quickstart
from point_peft.quickstart import __main__ as program
from point_peft.quickstart import compare, data

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
