"""A folder or a collection of the Hub with many adapters: listed at once, loaded when they are used."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import Adapter
from point_peft.adapting.adding import backbone_for
from point_peft.adapting.site import CHILD, backbone_modules
from point_peft.errors import AdapterError, AdapterFileError, PointPeftError, nearest_names, quoted
from point_peft.files.format import RUN_FILE, stamps
from point_peft.files.loading import read_stated, restore_adapter
from point_peft.hub.pulling import Place, Token, download, is_repo_id
from point_peft.library.entry import LibraryEntry
from point_peft.library.folders import adapter_in, adapters_below
from point_peft.library.on_hub import adapters_on_hub, is_collection
from point_peft.library.shelf import LOCK, Held, Limits, Shelf
from point_peft.library.table import library_table
from point_peft.model import adapters_for

_ROUNDS = 10


class UnknownAdapter(AdapterError, KeyError):
    """A library has no adapter of that name, or several."""

    __str__ = Exception.__str__


@dataclass(frozen=True)
class LibraryStatus:
    """The adapters of a library that are in a model, and how often they were there when they were wanted."""

    adapters: Mapping[str, str]
    """Name in the library -> name in the model."""
    bytes: int
    hits: int
    """Uses of an adapter that was there."""
    loads: int
    evictions: int


@dataclass(frozen=True)
class Listing:
    """The adapters that a library knows, made anew as a whole, for other threads may be reading it."""

    entries: dict[str, LibraryEntry]
    full: Mapping[str, list[str]]
    """Last word of a name -> the names that end with it."""
    skipped: Mapping[str, str]


class AdapterLibrary(Mapping[str, LibraryEntry]):
    """The adapters in a folder and below it, in a collection of the Hub ("owner/title-…") or in one repository.

    They are listed by the headers of their files: name, methods, base, task, classes, size. A name is the path in the
    folder ("kitchen/grasp"), or repository and path; its last word will do where only one adapter has it. One that is
    not in order is an entry too, with the reason in `broken`; loading it raises that.

    An adapter goes into a model when it is first used there, and stays beside those most used: at most `most` of this
    library in one model, of at most `bytes` together (None: no limit). One that a block uses is never taken out,
    and neither is one that came into the model otherwise. Several threads may use one library.

    >>> from point_peft import AdapterLibrary
    >>> model.save_pretrained("adapters/grasp")
    >>> library = AdapterLibrary("adapters", most=16, bytes=200e6)
    >>> library["grasp"].methods
    ('LORA',)
    >>> with library.activated(model, "grasp"):
    ...     logits = model(clouds)
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        most: int | None = 16,
        bytes: float | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if most is not None and (type(most) is not int or most < 1):
            raise PointPeftError(f"most is {quoted(most)}; allowed: a number of adapters from 1 on, or None")
        if bytes is not None and (type(bytes) not in (int, float) or not 0 < bytes < math.inf):
            raise PointPeftError(f"bytes is {quoted(bytes)}; allowed: a number of bytes above 0, or None")
        self._source = source
        self._place = Place(token=token, cache_dir=cache_dir)
        self._limits = Limits(most, bytes)
        self._changed = threading.Condition(LOCK)
        self._listing = Listing({}, {}, {})
        self._shelves: weakref.WeakKeyDictionary[AdapterSet, Shelf] = weakref.WeakKeyDictionary()
        self.refresh()

    # ---- what there is ----

    def refresh(self) -> None:
        """Look again at the folder or the Hub: what has changed there is loaded anew when it is used next.

        Otherwise the list stays as it was, and what is in a model stays; an adapter that is not there yet is loaded
        as its files are then.
        """
        found, skipped = _listed(self._source, self._place)
        entries: dict[str, LibraryEntry] = {}
        for entry in sorted(found, key=lambda entry: entry.name):
            if entry.name in entries:
                raise AdapterError(
                    f"two adapters have the name {quoted(entry.name)}: {quoted(entries[entry.name].where)} and "
                    f"{quoted(entry.where)}; rename one of them"
                )
            entries[entry.name] = entry
        if not entries:
            raise AdapterError(
                f"there is no adapter in {quoted(os.fspath(self._source), 200)}: one is a folder with "
                "adapter_config.json and adapter_model.safetensors"
            )
        full: dict[str, list[str]] = {}
        for name in entries:
            full.setdefault(name.rpartition("/")[2], []).append(name)
        self._listing = Listing(entries, full, skipped)

    def __len__(self) -> int:
        return len(self._listing.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._listing.entries))

    def __getitem__(self, name: str) -> LibraryEntry:
        """The adapter of a name; raises `AdapterError` if there is none, or if several have it as their last word."""
        listing = self._listing
        entry = listing.entries.get(name) if isinstance(name, str) else None
        if entry is not None:
            return entry
        short = listing.full.get(name, []) if isinstance(name, str) else []
        if len(short) == 1:
            return listing.entries[short[0]]
        if short:
            raise UnknownAdapter(f"several adapters are named {quoted(name)}: {', '.join(map(quoted, short[:5]))}")
        near = nearest_names(str(name), list(listing.entries), what="adapter")
        raise UnknownAdapter(f"the library has no adapter {quoted(name)}; nearest: {near}")

    def _every(self) -> list[LibraryEntry]:
        return list(self._listing.entries.values())

    @property
    def skipped(self) -> Mapping[str, str]:
        """Of a collection: the items that hold no adapter, and what they are."""
        return self._listing.skipped

    @property
    def broken(self) -> dict[str, str]:
        """The adapters that cannot be loaded, each with the reason."""
        return {entry.name: entry.broken for entry in self._every() if entry.broken is not None}

    def find(
        self, *, method: str | None = None, base: str | None = None, task: str | None = None
    ) -> tuple[LibraryEntry, ...]:
        """The adapters in order with this method among theirs, this base, this task; None: any."""
        return tuple(
            entry
            for entry in self._every()
            if entry.broken is None
            and (method is None or method.casefold() in map(str.casefold, entry.methods))
            and (base is None or entry.base == base)
            and (task is None or entry.task == task)
        )

    def __repr__(self) -> str:
        return f"AdapterLibrary({quoted(os.fspath(self._source), 200)}, {len(self)} adapters)"

    def __str__(self) -> str:
        return "\n".join(library_table(self._every(), self.skipped))

    # ---- use ----

    @contextmanager
    def activated(self, model: nn.Module, *names: str) -> Iterator[tuple[str, ...]]:
        """Within the block, and only in this thread or task, these adapters are the active ones of a model.

        The model is one of `get_peft_model`, one of `inject_adapter`, or a plain backbone, which becomes one of the
        second kind. Gives the names of the adapters in the model. See `loaded`.
        """
        with self.loaded(model, *names) as own, _adapters_of(model).use_adapter(own):
            yield own

    @contextmanager
    def loaded(self, model: nn.Module, *names: str) -> Iterator[tuple[str, ...]]:
        """Within the block these adapters are in a model and stay there; gives their names in it.

        They are frozen, and not made active: name them for `model(clouds, adapter_names=...)` or `use_adapter`. If
        adapters that other threads use leave no room, it is waited for. On an error, as of an adapter of another
        backbone, model and library are as they were.
        """
        entries = [self[name] for name in names]
        self._check(entries)
        with self._shelf(model) as (adapters, shelf):
            taken: dict[LibraryEntry, Held] = {}
            me = threading.get_ident()
            try:
                for entry in dict.fromkeys(entries):
                    taken[entry] = shelf.take(adapters, entry, partial(self._load, adapters), me)
                yield tuple(taken[entry].name for entry in entries)
            finally:
                shelf.give_back(list(taken.values()), me)

    def status(self, model: nn.Module) -> LibraryStatus:
        """The adapters of the library that are in a model, and the counts of their uses."""
        with self._shelf(model) as (adapters, shelf), self._changed:
            shelf.sweep(adapters)
            there = {entry.name: held.name for entry, held in shelf.held.items()}
            return LibraryStatus(there, shelf.bytes, shelf.hits, shelf.loads, shelf.evictions)

    def _check(self, entries: Iterable[LibraryEntry]) -> None:
        """Refuse what cannot be loaded, or not together, whatever else is there."""
        wanted = list(dict.fromkeys(entries))
        for entry in wanted:
            if entry.broken is not None:
                raise AdapterFileError(f"the adapter {quoted(entry.name)} cannot be loaded: {entry.broken}")
        size = sum(entry.bytes for entry in wanted)
        if not self._limits.allow(len(wanted), size):
            what = f"the adapter {quoted(wanted[0].name)} takes" if len(wanted) == 1 else f"{len(wanted)} adapters take"
            raise AdapterError(
                f"{what} {size:,} bytes, and the library may hold {_in_words(self._limits)} in a model: raise the limit"
            )

    @contextmanager
    def _shelf(self, model: nn.Module) -> Iterator[tuple[AdapterSet, Shelf]]:
        """The adapters of a model and what the library has there; a plain backbone holds them while there are some."""
        with self._changed:
            adapters = _adapters_of(model)
            shelf = self._shelves.setdefault(adapters, Shelf(self._limits, self._is_listed, self._changed))
            if not isinstance(model, AdapterSet) and CHILD not in model._modules:
                model._modules[CHILD] = adapters
                shelf.adopted = True
            shelf.callers += 1
        try:
            yield adapters, shelf
        finally:
            with self._changed:
                shelf.callers -= 1
                if shelf.adopted and adapters.frozen is None and not shelf.callers:  # nothing has been attached
                    model._modules.pop(CHILD, None)

    def _load(self, adapters: AdapterSet, entry: LibraryEntry) -> tuple[LibraryEntry, Adapter]:
        """An entry as its files are now, and the adapter that they hold, frozen and not attached."""
        if entry.origin.commit is not None:
            place = replace(self._place, subfolder=entry.origin.subfolder, revision=entry.origin.commit)
            return entry, _restored(adapters, download(entry.origin.source, place))
        folder = Path(entry.origin.source)
        for _ in range(_ROUNDS):
            if stamps(folder) != entry.origin.marks:
                entry = self._looked_at_again(entry)
            adapter = _restored(adapters, folder)
            if stamps(folder) == entry.origin.marks:
                return entry, adapter
        raise AdapterFileError(f"cannot read '{folder}': it is being written to all the time")

    def _looked_at_again(self, entry: LibraryEntry) -> LibraryEntry:
        """An entry of which the files have changed, as they are now."""
        record = Path(entry.origin.source, RUN_FILE)
        fresh = adapter_in(entry.origin.source, entry.name, str(record), card=True)
        self._check([fresh])
        with self._changed:
            if self._is_listed(entry):
                self._listing.entries[entry.name] = fresh
        return fresh

    def _is_listed(self, entry: LibraryEntry) -> bool:
        return self._listing.entries.get(entry.name) == entry


def _listed(source: str | os.PathLike[str], place: Place) -> tuple[Iterable[LibraryEntry], Mapping[str, str]]:
    path = Path(source)
    if path.is_dir():
        return adapters_below(path), {}
    if path.exists():
        raise AdapterFileError(f"'{path}' is a file, and a library is a folder of adapters")
    if isinstance(source, str) and source.count("/") == 1 and (is_collection(source) or is_repo_id(source)):
        return adapters_on_hub(source, place)
    raise AdapterFileError(
        f"there is no folder '{path}', and it names nothing on the Hub: a collection is 'owner/title-' with 24 digits, "
        "a repository 'owner/name'"
    )


def _adapters_of(model: nn.Module) -> AdapterSet:
    if not isinstance(model, nn.Module):
        raise PointPeftError(f"model must be an nn.Module, not {type(model).__name__}")
    return model if isinstance(model, AdapterSet) else adapters_for(model)


def _restored(adapters: AdapterSet, folder: Path) -> Adapter:
    stated = read_stated(folder, backbone_modules(adapters), partial(backbone_for, adapters))
    return restore_adapter(stated, None, widen=True).requires_grad_(False)


def _in_words(limits: Limits) -> str:
    parts = [f"{limits.most} adapters" if limits.most else "", f"{limits.bytes:,.0f} bytes" if limits.bytes else ""]
    return " and ".join(filter(None, parts))
