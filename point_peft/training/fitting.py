"""One function that trains: an adapter, a head, or all of a plain model, on one process or on several."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from point_peft.adapting.adapter import get_adapter
from point_peft.adapting.adding import all_adapters
from point_peft.anatomy.presets import known_anatomy
from point_peft.data.cloud import UNKNOWN
from point_peft.data.cloud_set import CloudSet
from point_peft.errors import PointPeftError, quoted
from point_peft.files.tensors import is_sharded
from point_peft.parameter_groups import Rates, adapter_groups, parameter_groups_of
from point_peft.training.cost import Cost, try_once
from point_peft.training.feeding import Feed, labels_of, on_device, set_mode, size_of
from point_peft.training.folder import RunFolder
from point_peft.training.global_batch import GlobalBatch
from point_peft.training.inference import Inference
from point_peft.training.loop import Loop
from point_peft.training.objective import Loss, balanced_weights, scores_of
from point_peft.training.pictures import check_matplotlib
from point_peft.training.plan import STEP, Drawn, check_shares, epoch_batches, in_order, seed_of, shares
from point_peft.training.progress import Progress
from point_peft.training.recipe import Recipe
from point_peft.training.report import finish, load_values
from point_peft.training.state import Average, Position, adapters_of, trained, write_values


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training that has come to its end."""

    folder: Path
    model: nn.Module
    """With the values of the best epoch on validation, else of the last."""
    classes: tuple[str, ...]
    best_epoch: int
    """Counted from 1; the last one where there is no validation."""
    results: Mapping[str, Mapping[str, float]]
    """Split -> measure -> value, of that epoch: the loss, and shares in percent."""
    history: Sequence[Mapping[str, float]]
    """A line for each epoch."""


def fit(
    model: nn.Module,
    train: Dataset[Any],
    val: Dataset[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    test: Dataset[Any] | None = None,
    classes: Sequence[str] | None = None,
    to_inputs: Callable[[Any], Any] | None = None,
    to_labels: Callable[[Any], Tensor] | None = None,
    to_logits: Callable[[Any], Tensor] | None = None,
    collate: Callable[[Sequence[Any]], Any] | None = None,
    resume: bool = False,
    log_with: str | Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Run:
    """Train whatever of a model requires a gradient, and leave the values that `recipe.keep` names in the folder `out`.

    Of an adapted model that is its adapters; of a plain one everything (full fine-tuning), or what is not frozen
    (linear probing). A data set has a length and gives (clouds, label, …) by place; other forms are told by `to_inputs`
    (a batch -> the model's arguments), `to_labels` (a batch -> labels), `collate` (samples -> a batch) and `to_logits`
    (the model's output -> scores). `classes` are their names; None: those of a `CloudSet`, else their numbers.

    `test` is measured once, at the end. `resume=True` goes on where a run in `out` was interrupted, or begins one.
    `log_with` names trackers of accelerate's, such as "tensorboard". `about` goes into the folder's `run.json`.

    Several processes (`torchrun`, `accelerate launch`) share each batch and get the same curve as one. Raises
    `PointPeftError` before anything is written if data, labels, model and recipe do not fit together.

    >>> import tempfile, torch
    >>> from torch.utils.data import TensorDataset
    >>> from point_peft import LoraConfig, get_peft_model
    >>> from point_peft.backbones import PointTransformer
    >>> from point_peft.training import Recipe, fit
    >>> backbone = PointTransformer(trans_dim=24, depth=2, num_heads=2, encoder_dims=24, num_group=8, group_size=8)
    >>> clouds = TensorDataset(torch.rand(8, 64, 3), torch.arange(8) % 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = fit(get_peft_model(backbone, LoraConfig(r=4)), clouds, clouds, Recipe(epochs=1), out=folder)
    ...     sorted(run.results["val"])
    ['accuracy', 'class_accuracy', 'loss']
    """
    recipe = Recipe() if recipe is None else recipe
    check_matplotlib()
    accelerator = _accelerator(recipe, Path(out), log_with)
    folder = RunFolder(Path(out), accelerator.is_main_process)
    phase = folder.check(resume)
    accelerator.wait_for_everyone()
    feed = Feed(to_inputs=to_inputs, to_labels=to_labels, to_logits=to_logits, collate=collate)
    if phase == "end":
        return _finished(folder, model)
    sets = {"train": train, "val": val, "test": test}
    names = _class_names(model, train, classes, feed)
    counts = {
        split: _label_counts(own, split, names, feed, accelerator) for split, own in sets.items() if own is not None
    }
    _check(recipe, model, counts, val)
    folder.identity = _identity(recipe, model, names, counts)
    place, parts = folder.resume() if phase == "resume" else (Position(), {})
    if parts:
        write_values(model, parts["values"])  # with a bank, as the trial of the first step is to meet it
    loop, cost = _prepared(model, train, val, recipe, accelerator, folder, feed, counts["train"])
    if parts:
        loop.resume(place, parts)
    else:
        folder.begin(recipe, {"task": recipe.task, "classes": list(names), **(about or {})})
    _train(loop, cost, log_with)
    evaluated = {split: own for split, own in (("val", val), ("test", test)) if own is not None}
    record, results = finish(loop, names, evaluated, {**(about or {})})
    folder.finish(record)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    history = folder.epochs() if folder.writes else []
    return Run(
        folder=folder.path,
        model=model,
        classes=names,
        best_epoch=record["best_epoch"],
        results=results,
        history=history,
    )


def _train(loop: Loop, cost: Cost, log_with: str | Sequence[str] | None) -> None:
    loop.progress.say(str(cost))
    if _launched_alone():
        loop.progress.say(
            "accelerate launch has started one process, as it starts several on CPUs by MPI alone: for N of them say "
            "torchrun --nproc_per_node N, or train with --processes N"
        )
    if log_with is not None:
        plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in loop.recipe.to_json().items()}
        loop.accelerator.init_trackers("point_peft", config=plain)
    try:
        loop.run()
    except KeyboardInterrupt:
        loop.progress.close()
        loop.progress.say(
            f"interrupted after step {loop.place.step} of {loop.steps}; to go on from the last checkpoint, say the "
            "same again with --resume (resume=True)"
        )
        raise


def _accelerator(recipe: Recipe, out: Path, log_with: str | Sequence[str] | None) -> Accelerator:
    trackers = [log_with] if isinstance(log_with, str) else list(log_with or [])
    there = [tracker.value for tracker in get_available_trackers()]
    for name in trackers:
        if name not in there:
            known = [tracker.value for tracker in LoggerType if tracker.value != "all"]
            what = "not installed" if name in known else "unknown"
            raise PointPeftError(
                f"accelerate refuses the tracker {quoted(name)}: it is {what}; installed: {', '.join(there)}; known: "
                f"{', '.join(known)}"
            )
    # A training before this one, in the same process, may have had another precision.
    AcceleratorState._reset_state()

    def make(cpu: bool) -> Accelerator:
        try:
            return Accelerator(
                mixed_precision=recipe.mixed_precision, cpu=cpu, log_with=trackers or None, project_dir=str(out)
            )
        except (ValueError, ImportError) as error:
            raise PointPeftError(f"accelerate refuses: {' '.join(str(error).split())}") from error

    made = make(False)
    if made.num_processes < int(os.environ.get("WORLD_SIZE", "1")):
        # Started by torchrun on a machine without accelerators, which accelerate takes for processes of their own.
        AcceleratorState._reset_state(reset_partial_state=True)
        made = make(True)
    if made.mixed_precision == "fp16" and made.device.type == "cpu":
        raise PointPeftError("Recipe.mixed_precision is 'fp16', which needs a GPU; allowed on CPUs: 'no', 'bf16'")
    return made


def _launched_alone() -> bool:
    """Tell whether `accelerate launch --cpu` was asked for several processes and gave one."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    return asked and "WORLD_SIZE" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ


def _finished(folder: RunFolder, model: nn.Module) -> Run:
    """The run that a folder holds; the model gets its values."""
    record = folder.record
    assert record is not None
    load_values(model, folder.path)
    return Run(
        folder=folder.path,
        model=model,
        classes=tuple(record["classes"]),
        best_epoch=record["best_epoch"],
        results=record["results"],
        history=folder.epochs(),
    )


def _class_names(model: nn.Module, train: Dataset[Any], classes: Sequence[str] | None, feed: Feed) -> tuple[str, ...]:
    if classes is not None:
        return tuple(classes)
    if isinstance(train, CloudSet):
        return train.classes
    set_mode(model, False)
    size_of(train, "train")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the memory bank is empty")  # it is filled later
        device = next(model.parameters()).device
        args, kwargs = feed.inputs(on_device(feed.batch([train[0]]), device))
        scores = scores_of(model(*args, **kwargs), feed.to_logits)
    return tuple(str(number) for number in range(scores.shape[-1]))


def _label_counts(
    clouds: Dataset[Any], split: str, classes: Sequence[str], feed: Feed, accelerator: Accelerator
) -> Tensor:
    """The numbers of labels of each class, (classes + 1,) with the unknown ones last; each process reads a share.

    Raises `PointPeftError` for a label that is of no class, before hours are spent.
    """
    found = torch.zeros(len(classes) + 1, dtype=torch.int64)
    count = size_of(clouds, split)
    if count == 0:
        raise PointPeftError(f"the data set '{split}' has no clouds")
    own = shares(range(count), 1, accelerator.process_index, accelerator.num_processes)[0].clouds
    hidden = not accelerator.is_main_process
    for place in tqdm(own, desc=f"labels ({split})", unit="cloud", disable=hidden or None, leave=False):
        labels = labels_of(clouds, feed, place)
        wrong = labels[(labels < UNKNOWN) | (labels >= len(classes))]
        if wrong.numel():
            raise PointPeftError(
                f"cloud {place} of '{split}' has the label {int(wrong.reshape(-1)[0])}, but there are {len(classes)} "
                f"classes, 0 to {len(classes) - 1}; {UNKNOWN} means unknown"
            )
        # The unknown, -1, fall on the last place.
        found += torch.bincount(labels.reshape(-1) % (len(classes) + 1), minlength=len(classes) + 1)
    if accelerator.num_processes > 1:
        found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
    return found


def _check(recipe: Recipe, model: nn.Module, counts: Mapping[str, Tensor], val: Dataset[Any] | None) -> None:
    for split, own in counts.items():
        if not own[:-1].any():
            raise PointPeftError(f"no cloud of '{split}' has a label that is known")
    if recipe.patience is not None and val is None:
        raise PointPeftError("Recipe.patience needs validation, and there is no val")
    weights = recipe.class_weights
    if not isinstance(weights, str) and len(weights) != len(counts["train"]) - 1:
        raise PointPeftError(
            f"Recipe.class_weights has {len(weights)} numbers for {len(counts['train']) - 1} classes: one for each"
        )
    if not trained(model):
        raise PointPeftError("nothing is trained: no parameter of the model requires a gradient")


def _prepared(
    model: nn.Module,
    train: Dataset[Any],
    val: Dataset[Any] | None,
    recipe: Recipe,
    accelerator: Accelerator,
    folder: RunFolder,
    feed: Feed,
    counts: Tensor,
) -> tuple[Loop, Cost]:
    """The loop before its first step, and what its steps will cost."""
    count, ranks = size_of(train, "train"), accelerator.num_processes
    check_shares(count, recipe.batch_size, recipe.accumulate, ranks)
    model.to(accelerator.device)
    if recipe.gradient_checkpointing:
        _checkpoint_gradients(model)
    if recipe.memory_bank:
        _build_banks(model, train, recipe, accelerator, feed)
    inference = Inference(
        model=model,
        wrapped=model,
        accelerator=accelerator,
        feed=feed,
        loss=_loss(recipe, counts[:-1]),
        batch_size=recipe.batch_size,
        segmentation=recipe.task == "segmentation",
    )
    normals = train.preparation.normals if isinstance(train, CloudSet) else None
    drawn = Drawn(train, tuple(recipe.augment), recipe.seed, normals)
    cost = _trial(inference, drawn, count, recipe)
    groups = _groups(model, recipe)
    for group in groups:
        group["peak_lr"] = group["lr"]
    wrapped, optimizer = _spread(model, torch.optim.AdamW(groups), cost, accelerator)
    loop = Loop(
        inference=Inference(**{**vars(inference), "wrapped": wrapped}),
        optimizer=optimizer,
        recipe=recipe,
        train=drawn,
        count=count,
        val=val,
        folder=folder,
        progress=Progress(
            -(-count // recipe.batch_size) * recipe.epochs, -(-count // recipe.batch_size), accelerator.is_main_process
        ),
        place=Position(),
        average=None if recipe.ema is None else Average(model, recipe.ema),
    )
    return loop, cost


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    rates = Rates(lr=recipe.lr, head_lr=recipe.head_lr, prompt_lr=recipe.prompt_lr, weight_decay=recipe.weight_decay)
    held = adapters_of(model)
    if held is not None:
        return adapter_groups(held.base_model, all_adapters(held.adapters).values(), held.anatomy, rates)
    anatomy = known_anatomy(model)
    return parameter_groups_of(model, () if anatomy is None else anatomy.heads, rates, anatomy)


def _spread(model: nn.Module, optimizer: torch.optim.Optimizer, cost: Cost, accelerator: Accelerator) -> Any:
    """The model and the optimizer as those of all processes."""
    unused = bool(accelerator.reduce(torch.tensor(float(cost.unused), device=accelerator.device), "sum") > 0)
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
    if any(map(is_sharded, model.parameters())):  # sharded by the caller
        return accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
    return accelerator.prepare(model, optimizer)


def _trial(inference: Inference, drawn: Drawn, count: int, recipe: Recipe) -> Cost:
    rank, ranks = inference.accelerator.process_index, inference.accelerator.num_processes
    first = epoch_batches(count, recipe.batch_size, recipe.seed, 0)[0]
    share = shares(first, recipe.accumulate, rank, ranks)[0]
    batch = on_device(inference.feed.batch([drawn[0, place] for place in share.clouds]), inference.accelerator.device)
    labels = inference.feed.labels(batch)
    set_mode(inference.model, True)

    def backward() -> None:
        set_seed(seed_of(recipe.seed, STEP, 0))
        with nullcontext() if ranks == 1 else GlobalBatch(share.sizes, rank):
            with inference.accelerator.autocast():
                weight = inference.loss.weight_of(labels).clamp(min=1e-12)
                mean, auxiliary = inference.losses(batch, labels, weight, 1.0)
            (mean + auxiliary).backward()  # type: ignore[no-untyped-call]

    try:
        return try_once(inference.model, backward)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        first_one = f" of clouds {tuple(drawn[0, share.clouds[0]][0].shape)}" if share.clouds else ""
        raise PointPeftError(
            f"the first training step{first_one} fails: {' '.join(str(error).split())}; the model gets clouds as "
            "num_points, channels and batch_size say"
        ) from error


def _loss(recipe: Recipe, counts: Tensor) -> Loss:
    weights = recipe.class_weights
    if isinstance(weights, str):
        given = None if weights == "none" else balanced_weights(counts)
    else:
        given = torch.tensor(weights, dtype=torch.float32)
    return Loss(classes=len(counts), label_smoothing=recipe.label_smoothing, weights=given)


def _checkpoint_gradients(model: nn.Module) -> None:
    held = adapters_of(model)
    base: Any = model if held is None else held.base_model
    if "set_grad_checkpointing" not in dir(base):
        raise PointPeftError(
            f"Recipe.gradient_checkpointing: a {type(base).__name__} has no method set_grad_checkpointing; let the "
            "backbone checkpoint its blocks itself (use_reentrant=False) and leave the field out"
        )
    base.set_grad_checkpointing(True)


def _build_banks(model: nn.Module, train: Dataset[Any], recipe: Recipe, accelerator: Accelerator, feed: Feed) -> None:
    """Fill the empty banks of the active adapters with the training clouds as they are, each process with a share."""
    held = adapters_of(model)
    if held is None:
        return
    batches = in_order(size_of(train, "train"), recipe.batch_size)[
        accelerator.process_index :: accelerator.num_processes
    ]
    for name in held.active_adapters:
        empty = [state.bank for state in get_adapter(held, name).shared_states() if state.bank is not None]
        if any(bank.lacks_rows() for bank in empty):
            held.build_memory_bank(
                _Loaded(train, batches, feed, accelerator.device),
                to_inputs=feed.to_inputs,
                to_labels=feed.classes,
                adapter_name=name,
            )


@dataclass(frozen=True)
class _Loaded:
    """Batches of clouds that are read when they are asked for."""

    clouds: Dataset[Any]
    batches: Sequence[Sequence[int]]
    feed: Feed
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for places in self.batches:
            yield on_device(self.feed.batch([self.clouds[place] for place in places]), self.device)


def _identity(recipe: Recipe, model: nn.Module, classes: Sequence[str], counts: Mapping[str, Tensor]) -> dict[str, Any]:
    shapes = {name: list(p.shape) for name, p in trained(model).items()}
    return {
        **{f"Recipe.{name}": value for name, value in recipe.to_json().items() if name != "num_workers"},
        "list of classes": list(classes),
        "number of labels of each class": {split: own.tolist() for split, own in counts.items()},
        "set of trained tensors": shapes,
    }
