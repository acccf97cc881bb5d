"""Ways to tell from memory banks which adapter a cloud is for, beside each other on validation clouds.

    python -m benchmarks.routing_variants

The sets are those of `benchmarks.routing`, 300 rows a bank; test clouds are not touched. Each row says how often a
known cloud's own bank is best, how often known clouds abstain, wrongly, and unknown ones, rightly (procedural shapes,
digits turned in space); and how often the own bank is best where mars and digits are two tasks each, of five classes,
and where the four banks have 300, 30, 75 and 12 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.accuracy.sets import FILES, Sets
from benchmarks.routing import BATCH, KNOWN, UNKNOWN, crops, parts_of, stacked, strange
from point_peft.backbones import PointTransformer, default_backbone
from tools.methods import table

KEPT = 0.01
Told = tuple[Tensor, Tensor]
"""By which the best bank is chosen (m, banks), and how well each fits (m, banks): below 0 not at all."""
Way = Callable[[Sequence[Tensor], Tensor], Told]
"""From the rows (n, c) of banks and queries (m, c)."""


# ---- features --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(model: PointTransformer, points: Tensor) -> dict[str, Tensor]:
    """Pooled features (m, c) of unit length, by where and how they are taken."""
    seen: dict[str, Tensor] = {}

    def see(name: str, tokens: Tensor) -> None:
        seen[name] = tokens

    count = model.group_divider.num_group
    handles = [
        model.get_submodule("encoder").register_forward_hook(lambda _, args, out: see("patch embedding", out)),
        model.get_submodule("blocks.blocks.3").register_forward_pre_hook(
            lambda _, args: see("before the middle block", args[0][:, -count:])
        ),
        model.get_submodule("norm").register_forward_hook(lambda _, args, out: see("last tokens", out[:, -count:])),
    ]
    found: dict[str, list[Tensor]] = {}
    for part in torch.split(points, BATCH):
        model(part)
        for name, tokens in seen.items():
            for how, pooled in (("maximum", tokens.amax(dim=1)), ("mean", tokens.mean(dim=1))):
                found.setdefault(f"{name}, {how}", []).append(pooled)
    for handle in handles:
        handle.remove()
    return {name: nn.functional.normalize(torch.cat(parts).double(), dim=1) for name, parts in found.items()}


# ---- ways ------------------------------------------------------------------------------------------------------------


def estimated(covariance: Tensor, count: int) -> float:
    """The shrinkage of Y. Chen, A. Wiesel, Y. C. Eldar, A. O. Hero, IEEE Transactions on Signal Processing, 2010."""
    c, trace = len(covariance), float(covariance.trace())
    squares = float(covariance.square().sum())
    above = (1 - 2 / c) * squares + trace**2
    return min(1.0, above / ((count + 1 - 2 / c) * (squares - trace**2 / c)))


def shrunk(rows: Tensor, share: float | None) -> tuple[Tensor, float]:
    """The covariance of rows with a share of a sphere, None: the estimated share."""
    covariance = torch.cov(rows.T, correction=0)
    share = estimated(covariance, len(rows)) if share is None else share
    return (1 - share) * covariance + share * covariance.trace() / len(covariance) * torch.eye(len(covariance)), share


def normal(banks: Sequence[Tensor], query: Tensor, share: float | None = 0.2, by_density: bool = True) -> Told:
    """The normal distribution of each bank: chosen by density, or by how typical the distance is."""
    densities, fits = [], []
    for rows in banks:
        covariance, own = shrunk(rows, share)
        inverse, n = torch.linalg.inv(covariance), len(rows)
        inside, squared = (
            (away @ inverse * away).sum(dim=1) for away in (points - rows.mean(dim=0) for points in (rows, query))
        )
        left_out = (n / (n - 1) * inside / (1 - (1 - own) * inside / (n - 1))).sqrt()
        fits.append(fit(-squared.sqrt(), -left_out))
        densities.append(-(squared + torch.logdet(covariance)) / 2)
    return torch.stack(densities if by_density else fits, dim=1), torch.stack(fits, dim=1)


Space = Callable[[Sequence[Tensor], int], Callable[[Tensor], Tensor]]
"""From banks and the number of one: what turns features (m, c) into those that are compared with it."""


def nearest(banks: Sequence[Tensor], query: Tensor, space: Space, cosine: bool, rows: int, one_space: bool) -> Told:
    """The mean likeness of the nearest rows, in a space; chosen by likeness where all banks share it, else by fit."""
    likeness, fits = [], []
    alike = by_cosine if cosine else by_distance
    for number, own in enumerate(banks):
        place = space(banks, number)
        among = alike(place(own), place(own)).fill_diagonal_(-torch.inf)
        likeness.append(alike(place(query), place(own)).topk(rows, dim=1).values.mean(dim=1))
        fits.append(fit(likeness[-1], among.topk(rows, dim=1).values.mean(dim=1)))
    return torch.stack(likeness if one_space else fits, dim=1), torch.stack(fits, dim=1)


def by_cosine(points: Tensor, others: Tensor) -> Tensor:
    """Likeness (m, n) of points (m, c) and others (n, c)."""
    cosine: Tensor = nn.functional.normalize(points, dim=1) @ nn.functional.normalize(others, dim=1).T
    return cosine


def by_distance(points: Tensor, others: Tensor) -> Tensor:
    """Likeness (m, n) of points (m, c) and others (n, c)."""
    likeness: Tensor = -torch.cdist(points, others)
    return likeness


def fit(likeness: Tensor, left_out: Tensor) -> Tensor:
    """Likeness (m,) where 1 is that of a typical row left out, and 0 that of the least alike but one of a hundred."""
    limit, typical = left_out.quantile(torch.tensor([KEPT, 0.5], dtype=left_out.dtype)).unbind()
    return (likeness - limit) / (typical - limit)


def as_it_is(banks: Sequence[Tensor], number: int) -> Callable[[Tensor], Tensor]:
    return lambda points: points


def centred(banks: Sequence[Tensor], number: int) -> Callable[[Tensor], Tensor]:
    return lambda points: points - banks[number].mean(dim=0)


def standardised(banks: Sequence[Tensor], number: int) -> Callable[[Tensor], Tensor]:
    every = torch.cat(list(banks))
    return lambda points: (points - every.mean(dim=0)) / every.std(dim=0)


def whitened(banks: Sequence[Tensor], number: int) -> Callable[[Tensor], Tensor]:
    factor = torch.linalg.cholesky(torch.linalg.inv(shrunk(banks[number], 0.2)[0]))
    return lambda points: points @ factor


def whitened_together(banks: Sequence[Tensor], number: int) -> Callable[[Tensor], Tensor]:
    within = torch.cat([rows - rows.mean(dim=0) for rows in banks])
    factor = torch.linalg.cholesky(torch.linalg.inv(shrunk(within, 0.2)[0]))
    return lambda points: points @ factor


BEST = "last tokens, maximum"
WAYS: Mapping[str, tuple[str, Way]] = {
    "normal distribution, 0.2 of a sphere, by density": (BEST, normal),
    "the same, 0.1": (BEST, partial(normal, share=0.1)),
    "the same, 0.01": (BEST, partial(normal, share=0.01)),
    "the same, share estimated (OAS)": (BEST, partial(normal, share=None)),
    "the same, 0.2, chosen by fit": (BEST, partial(normal, by_density=False)),
    "the same, by density, mean of the tokens": ("last tokens, mean", normal),
    "the same, tokens before the middle block": ("before the middle block, maximum", normal),
    "the same, patch embedding": ("patch embedding, maximum", normal),
    "nearest row by cosine": (BEST, partial(nearest, space=as_it_is, cosine=True, rows=1, one_space=True)),
    "the same, each bank centred": (BEST, partial(nearest, space=centred, cosine=True, rows=1, one_space=False)),
    "the same, standardised with all banks": (
        BEST,
        partial(nearest, space=standardised, cosine=True, rows=1, one_space=True),
    ),
    "nearest row, each bank whitened": (BEST, partial(nearest, space=whitened, cosine=False, rows=1, one_space=False)),
    "three nearest rows, whitened by all banks": (
        BEST,
        partial(nearest, space=whitened_together, cosine=False, rows=3, one_space=True),
    ),
}


# ---- figures ---------------------------------------------------------------------------------------------------------


def own_best(way: Way, banks: Sequence[Tensor], held: Sequence[Tensor]) -> tuple[float, float]:
    """In percent, the mean over banks of how often its held clouds find it best, and abstain."""
    right, silent = [], []
    for number, query in enumerate(held):
        chosen, fits = way(banks, query)
        best = chosen.argmax(dim=1, keepdim=True)
        right.append(100 * float((best == number).double().mean()))
        silent.append(100 * float((fits.gather(1, best) < 0).double().mean()))
    return sum(right) / len(right), sum(silent) / len(silent)


def figures(way: Way, taken: Mapping[tuple[str, str], Tensor], labels: Mapping[tuple[str, str], Tensor]) -> list[float]:
    """The columns of the table."""
    banks, held = ([taken[name, split] for name in KNOWN] for split in ("train", "val"))
    halves: dict[str, list[Tensor]] = {"train": [], "val": []}
    for split, parts in halves.items():
        for name in KNOWN:
            low, own = labels[name, split] < 5, taken[name, split]
            parts += [own[low], own[~low]] if name in ("mars", "digits") else [own]
    unequal = [rows[::step] for rows, step in zip(banks, (1, 10, 4, 25), strict=True)]
    strangers = [own_best(way, banks, [taken[name, "val"]])[1] for name in UNKNOWN]
    return [
        *own_best(way, banks, held),
        *strangers,
        own_best(way, halves["train"], halves["val"])[0],
        own_best(way, unequal, held)[0],
    ]


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    model = default_backbone(cls_dim=2).requires_grad_(False).eval()
    sets, scan = Sets(radhar=FILES / "radhar.npz", mars=FILES / "mars.npz"), crops(FILES / "autzen_trim.laz")
    clouds: dict[tuple[str, str], Tensor] = {}
    labels: dict[tuple[str, str], Tensor] = {}
    for name in KNOWN:
        parts = parts_of(sets, scan, name, 0)
        for split, part in (("train", parts.train), ("val", parts.val)):
            clouds[name, split], labels[name, split] = stacked(part)
    for name in UNKNOWN:
        clouds[name, "val"] = strange(name, clouds["digits", "val"])
    taken = {key: features(model, points) for key, points in clouds.items()}
    cells = []
    for name, (source, way) in WAYS.items():
        own = figures(way, {key: found[source] for key, found in taken.items()}, labels)
        cells.append([name, *(f"{value:.1f}" for value in own)])
    header = ["way", "own best", "known abstain", *(f"{name} abstain" for name in UNKNOWN), "halves", "unequal banks"]
    print("\n".join(table(cells, header)))


if __name__ == "__main__":
    main()
