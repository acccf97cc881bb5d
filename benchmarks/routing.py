"""Routing by memory bank: four sets and two that no adapter knows in one stream, and the speed with 1,000 adapters.

    python -m benchmarks.routing                  all of it, and then the page; what is done is not done again
    python -m benchmarks.routing --only speed     one part: seed 0, 1 or 2, or speed

Four adapters of LoRA with a routing bank, on the embedded backbone: radhar, mars and digits as `benchmarks.accuracy`
has them, and crops of autzen_trim.laz, of which it is asked whether more of it is ground than of the whole scan. A crop
is the 1024 points nearest, in the plane, to a random one, turned about the vertical; training, validation and test
crops lie in strips of their own.
Unknown to all adapters are procedural shapes, of categories that `tools.shapes` draws with a seed of its own (the
backbone was pre-trained on others of that generator), and the test digits turned at random in space.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree  # type: ignore[import-untyped]
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.accuracy.protocol import Protocol
from benchmarks.accuracy.results import spread
from benchmarks.accuracy.sets import FILES, Parts, Sets, some
from benchmarks.accuracy.stem import Store
from benchmarks.clock import seconds
from benchmarks.marked import write_between
from point_peft import LoraConfig, PeftConfig, PointPeftModel, RoutingBankConfig, get_peft_model
from point_peft.adapting.adapter import get_adapter
from point_peft.backbones import default_backbone
from point_peft.data.cloud import Cloud, Entry, Split
from point_peft.data.cloud_set import CloudSet
from point_peft.data.reading import read_cloud
from point_peft.routing import scores
from point_peft.training import Recipe, fit
from point_peft.tuners.routing_bank.bank import RoutingBank
from tools.methods import table
from tools.shapes import Program, sample

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "many_adapters.md"
BEGIN, END = "<!-- routing: written by `python -m benchmarks.routing` -->", "<!-- routing: up to here -->"
OUT = Path("build/routing")
SEEDS = (0, 1, 2)
KNOWN = ("radhar", "mars", "digits", "autzen")
UNKNOWN = ("shapes", "turned digits")
PROTOCOL = Protocol(train_clouds=300, val_clouds=150, test_clouds=150)
RECIPE = Recipe(epochs=6, keep="last", augment=(), checkpoint_steps=10**6, lr=3e-3)
STRIPS: Sequence[Split] = ("train", "test", "train", "val", "train", "test", "train", "val", "train", "test")
"""The splits of the strips of the scan."""
GAP = 10.0
"""Feet between two strips."""
CROPS = 150
"""Crops of each strip."""
GROUND = 2
CROP = 1024
BATCH = 50
ADAPTERS, ROWS, CLOUDS = 1000, 1800, 100


# ---- clouds ----------------------------------------------------------------------------------------------------------


def crops(scan: Path) -> CloudSet:
    """Crops of a scan, which is cut across x into strips of as many points; a crop lies within one, and so a split."""
    whole = read_cloud(scan)
    assert whole.labels is not None
    ground, xyz = whole.labels == GROUND, whole.coordinates
    ends = np.quantile(xyz[:, 0], np.linspace(0, 1, len(STRIPS) + 1))
    entries: list[Entry] = []
    for number, split in enumerate(STRIPS):
        inside = (xyz[:, 0] > ends[number] + (GAP if number else -1)) & (xyz[:, 0] <= ends[number + 1])
        points, own, random = xyz[inside], ground[inside], np.random.default_rng(number)
        middles = random.choice(len(points), CROPS, replace=False)
        turns = Rotation.from_euler("z", random.uniform(0, 2 * np.pi, (CROPS, 1))).as_matrix()
        _, nearest = cKDTree(points[:, :2]).query(points[middles, :2], CROP)
        for place, rows in enumerate(nearest):
            label = int(own[rows].mean() > ground.mean())
            read = partial(Cloud, coordinates=(points[rows] - points[rows[0]]) @ turns[place])
            entries.append(Entry(read=read, source=f"strip {number}, crop {place}", label=label, split=split))
    return CloudSet(entries=tuple(entries), task="classification", classes=("less ground", "more ground"))


def parts_of(sets: Sets, scan: CloudSet, name: str, seed: int) -> Parts:
    """The clouds of a run of a set: the training is drawn by the seed."""
    if name != "autzen":
        return sets.parts(name, PROTOCOL, seed)
    sizes: Sequence[tuple[Split, int, int]] = (
        ("train", PROTOCOL.train_clouds, seed),
        ("val", PROTOCOL.val_clouds, 0),
        ("test", PROTOCOL.test_clouds, 0),
    )
    return Parts(*(some(scan.part(split), most, by) for split, most, by in sizes))


def stacked(clouds: CloudSet) -> tuple[Tensor, Tensor]:
    """All points (m, n, 3) and labels (m,)."""
    samples = [clouds[place] for place in range(len(clouds))]
    return torch.stack([sample.points for sample in samples]), torch.stack([sample.label for sample in samples])


def strange(name: str, digits: Tensor) -> Tensor:
    """Clouds (m, n, 3) that no adapter knows."""
    if name == "shapes":
        numbers = np.random.default_rng(0).integers(10**6, size=PROTOCOL.test_clouds)
        return torch.stack([torch.from_numpy(sample(Program(int(number), seed=97))) for number in numbers])
    turns = Rotation.random(len(digits), random_state=0).as_matrix()
    return digits @ torch.from_numpy(turns).float()


# ---- one seed --------------------------------------------------------------------------------------------------------


def trained(name: str, parts: Parts, seed: int, folder: Path, store: Store) -> None:
    """Train the adapter of a set, with its bank, and leave it in a folder."""
    torch.manual_seed(seed)
    config = PeftConfig(tuners=(LoraConfig(), RoutingBankConfig()))
    model = get_peft_model(default_backbone(cls_dim=len(parts.train.classes)), config, name)
    with store.serving(model):
        fit(model, parts.train, None, Recipe(**{**RECIPE.to_json(), "seed": seed}), out=folder / f"run {name}")
    model.save_pretrained(folder / name)


@torch.no_grad()
def measured(model: PointPeftModel, tests: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, Any]:
    """Figures of one shuffled stream of known and unknown clouds, as JSON."""
    kinds = [name for name, (points, _) in tests.items() for _ in points]
    points = torch.cat([points for points, _ in tests.values()])
    labels = torch.cat([labels for _, labels in tests.values()])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(points)))
    names: list[str | None] = [None] * len(points)
    best, auto, right = torch.zeros(len(points)), torch.zeros(len(points)), torch.zeros(len(points))
    nearest = torch.zeros(len(points), dtype=torch.int64)
    for rows in torch.split(order, BATCH):
        chosen, found = model.route(points[rows], KNOWN)
        best[rows], nearest[rows] = found.max(dim=1)
        answers = model(points[rows], adapter_names="auto")
        for place, row in enumerate(rows.tolist()):
            names[row] = chosen[place]
            auto[row] = float(chosen[place] == kinds[row] and int(answers[place].argmax()) == int(labels[row]))
    for name in KNOWN:
        own = torch.tensor([row for row, kind in enumerate(kinds) if kind == name])
        for rows in torch.split(own, BATCH):
            logits = model(points[rows], adapter_names=[name] * len(rows))
            right[rows] = (logits.argmax(dim=1) == labels[rows]).float()
    known = np.array([kind in KNOWN for kind in kinds])
    figures: dict[str, Any] = {}
    for kind in tests:
        its = np.array([other == kind for other in kinds])
        silent = 100 * mean(names[row] is None for row in np.flatnonzero(its))
        figures[kind] = {"abstains": silent}
        if kind in KNOWN:
            figures[kind] |= {
                "nearest": 100 * mean(KNOWN[int(nearest[row])] == kind for row in np.flatnonzero(its)),
                "wrong": 100 * mean(names[row] not in (kind, None) for row in np.flatnonzero(its)),
                "named": 100 * float(right[torch.from_numpy(its)].mean()),
                "auto": 100 * float(auto[torch.from_numpy(its)].mean()),
            }
        else:
            figures[kind]["auroc"] = 100 * float(roc_auc_score(known[known | its], best.numpy()[known | its]))
    return figures


def run_seed(seed: int, store: Store) -> dict[str, Any]:
    """Train four adapters, load them beside each other and measure."""
    sets, scan = Sets(radhar=FILES / "radhar.npz", mars=FILES / "mars.npz"), crops(FILES / "autzen_trim.laz")
    parts = {name: parts_of(sets, scan, name, seed) for name in KNOWN}
    tests = {name: stacked(part.test) for name, part in parts.items()}
    for name in UNKNOWN:
        clouds = strange(name, tests["digits"][0])
        tests[name] = clouds, torch.full((len(clouds),), -1)
    with tempfile.TemporaryDirectory() as folder:
        for name in KNOWN:
            trained(name, parts[name], seed, Path(folder), store)
        model = PointPeftModel.from_pretrained(default_backbone(cls_dim=2), Path(folder) / KNOWN[0], KNOWN[0])
        for name in KNOWN[1:]:
            model.load_adapter(Path(folder) / name, name)
        with store.serving(model.eval()):
            return measured(model, tests, seed)


# ---- speed -----------------------------------------------------------------------------------------------------------


def some_banks(count: int, width: int) -> list[RoutingBank]:
    """Banks of random rows around places of their own."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        bank = RoutingBank(width, None)
        bank.fill(torch.randn(width, generator=generator) + 0.1 * torch.randn(ROWS, width, generator=generator))
        found.append(bank)
    return found


def speed(rounds: int) -> dict[str, Any]:
    """Seconds of 100 clouds among 1,000 banks, by width, once the banks' spreads are there; and of these, once."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for width in (144, 384):
        banks = some_banks(ADAPTERS, width)
        query = nn.functional.normalize(torch.randn(CLOUDS, width, generator=torch.Generator().manual_seed(1)), dim=1)
        first = both_clocks(partial(scores, query, banks))
        found[f"scores {width}"] = {"first": first, **in_rounds({"it": partial(scores, query, banks)}, rounds)["it"]}
        del banks
    # And all that model.route does, on the embedded backbone.
    model = get_peft_model(default_backbone(cls_dim=2), RoutingBankConfig(), "0").eval()
    for number in range(1, ADAPTERS):
        model.add_adapter(str(number), RoutingBankConfig())
    for number, bank in enumerate(some_banks(ADAPTERS, 144)):
        bank_at(model, str(number)).rows = bank.rows
    points = torch.rand(CLOUDS, CROP, 3, generator=torch.Generator().manual_seed(2))
    runs = {"route": partial(model.route, points), "route to one": partial(model.route, points, ["0"])}
    return found | in_rounds(runs, rounds)


def bank_at(model: PointPeftModel, name: str) -> RoutingBank:
    """The routing bank of an adapter that has no other state."""
    (bank,) = get_adapter(model, name).shared_states()
    assert isinstance(bank, RoutingBank)
    return bank


def both_clocks(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a run, and the processor's seconds that this process took, of all threads."""
    start = time.process_time()
    took = seconds(run)
    return took, time.process_time() - start


def in_rounds(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Both clocks of each run, in turns; a first round does not count."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "processor": []} for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            values = both_clocks(run)
            for clock, value in zip(found[name], values, strict=True):
                if number:
                    found[name][clock].append(value)
    return found


# ---- the page --------------------------------------------------------------------------------------------------------


def lines(found: Sequence[dict[str, Any]], largest: Mapping[str, float], fast: dict[str, Any]) -> Iterator[str]:
    """What stands between the marks; `largest` is the share of each set's largest class, in percent."""

    def of(kind: str, figure: str) -> str:
        return spread([one[kind][figure] for one in found])

    yield (
        f"Test clouds: {PROTOCOL.test_clouds} of each set in one shuffled stream, training clouds "
        f"{PROTOCOL.train_clouds}, each with a row of its bank; LoRA, {RECIPE.epochs} epochs; {len(found)} seeds, mean "
        "± standard deviation in percent."
    )
    yield ""
    header = ["set", "its own is best", "another answers", "wrongly none", "right, named", 'right, "auto"', "largest"]
    shown = ("nearest", "wrong", "abstains", "named", "auto")
    cells = [[kind, *(of(kind, figure) for figure in shown), f"{largest[kind]:.1f}"] for kind in KNOWN]
    means = [spread([mean(one[kind][figure] for kind in KNOWN) for one in found]) for figure in shown]
    yield from table([*cells, ["mean", *means, ""]], header)
    yield from (
        "",
        '"Right" is the share of all test clouds, where one that no adapter answers counts as wrong; "largest" is that '
        "of the largest class.",
        "",
    )
    yield from table(
        [[kind, of(kind, "abstains"), of(kind, "auroc")] for kind in UNKNOWN], ["unknown set", "rightly none", "AUROC"]
    )
    yield from ("", "AUROC: by the best score, against all known test clouds.", "")
    cells = []
    for name, what in (
        ("scores 144", "the scores alone, width 144"),
        ("scores 384", "the scores alone, width 384"),
        ("route", "`model.route`, embedded backbone (144)"),
        ("route to one", "the same with one adapter: the query"),
    ):
        own = fast[name]
        told = []
        for clock in ("seconds", "processor"):
            low, _, high = quantiles(own[clock], n=4)
            told.append(f"{median(own[clock]):.2f} [{low:.2f}, {high:.2f}]")
        cells.append([what, *told, " / ".join(f"{value:.0f}" for value in own.get("first", ()))])
    yield (
        f"Seconds for {CLOUDS} clouds, {ADAPTERS:,} adapters of {ROWS:,} rows, {fast['threads']} threads: median and "
        f"quartiles of {len(fast['route']['seconds'])} rounds, by the clock, which counts whatever else runs, and "
        "of the processor, all threads together. The first call takes the spread of all banks."
    )
    yield ""
    yield from table(cells, ["what", "seconds", "of the processor", "first call, both"])


def largest_shares() -> dict[str, float]:
    """The share of the largest class among the test clouds of each known set, in percent."""
    sets, scan = Sets(radhar=FILES / "radhar.npz", mars=FILES / "mars.npz"), crops(FILES / "autzen_trim.laz")
    labels = {name: stacked(parts_of(sets, scan, name, 0).test)[1] for name in KNOWN}
    return {name: 100 * float(own.bincount().max()) / len(own) for name, own in labels.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is not done, then write the page if all is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*map(str, SEEDS), "speed"], help="one part, and not the page")
    parser.add_argument("--rounds", type=int, default=9, help="of the measurement of speed")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    store = Store(args.out / "stem.pt")
    parts = [*map(str, SEEDS), "speed"]
    for part in tqdm(parts if args.only is None else [args.only], desc="routing", disable=None):
        path = args.out / f"{part}.json"
        if not path.exists():
            figures = speed(args.rounds) if part == "speed" else run_seed(int(part), store)
            path.write_text(json.dumps(figures) + "\n", "utf-8")
    if args.only is None:
        read = {part: json.loads((args.out / f"{part}.json").read_text("utf-8")) for part in parts}
        fast = read.pop("speed")
        write_between(PAGE, BEGIN, END, lines(list(read.values()), largest_shares(), fast))


if __name__ == "__main__":
    main()
