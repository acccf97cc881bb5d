"""The adapters of a library that are in one model: which stay there, which go, and which are in use.

One lock for all libraries guards what models hold: the files are read without it, so that a thread whose adapter is
there never waits for the disk. An adapter is wanted the more, the more often and the more lately it was used: each use
counts one and loses half of its weight after some further uses.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from point_peft.adapter_set import AdapterSet
from point_peft.adapting.adapter import Adapter
from point_peft.adapting.adding import attach_beside, check_unmerged, detach_adapter
from point_peft.errors import AdapterError
from point_peft.library.entry import LibraryEntry

LOCK = threading.RLock()
HALF_LIFE = 8
"""Uses of each adapter that is there, on average, after which a use counts half."""
_NAME = "library"
Load = Callable[[LibraryEntry], tuple[LibraryEntry, Adapter]]
"""An entry as it is now, and its adapter, not attached."""


@dataclass(frozen=True)
class Limits:
    """The adapters that may be in one model, and the bytes of all together; None: as many as there are."""

    most: int | None
    bytes: float | None

    def allow(self, count: int, size: int) -> bool:
        """True if so many adapters of so many bytes may be there."""
        return (self.most is None or count <= self.most) and (self.bytes is None or size <= self.bytes)


@dataclass
class Held:
    """An adapter of a library in a model."""

    name: str
    """Its name in the model."""
    adapter: weakref.ref[Adapter]
    users: list[int] = field(default_factory=list)
    """Threads in a block that uses it, each as often as it is in one."""


class Shelf:
    """The adapters of a library in one model; `changed` tells of every change."""

    def __init__(self, limits: Limits, is_listed: Callable[[LibraryEntry], bool], changed: threading.Condition) -> None:
        self.limits = limits
        self.is_listed = is_listed
        self.changed = changed
        self.held: dict[LibraryEntry, Held] = {}
        self.arriving: set[LibraryEntry] = set()
        """Those that a thread is reading."""
        self.scores: dict[str, tuple[float, int]] = {}
        """Name in the library -> uses, weighted, and at which use of any that was."""
        self.hits = self.loads = self.evictions = 0
        self.adopted = False
        """True if the library has put the set of adapters into a plain backbone."""
        self.callers = 0
        """Threads that are in a block of the library, or on their way into one."""

    def take(self, adapters: AdapterSet, entry: LibraryEntry, load: Load, me: int) -> Held:
        """The adapter in the model, loaded if need be, and kept there for the thread `me` until it is given back.

        Where others in use leave no room, wait until one is not, unless this thread uses one itself: that is an
        `AdapterError`, as two threads might wait for each other.
        """
        while True:
            with self.changed:
                self.sweep(adapters)
                if entry in self.held:
                    self.hits += 1
                    return self._used(entry, me)
                if entry in self.arriving:
                    self.changed.wait()
                    continue
                if self._leaving(adapters, entry) is None:
                    self._may_wait(entry, me)
                    self.changed.wait()
                    continue
                check_unmerged(adapters.merged, "adapters cannot be loaded")
                self.arriving.add(entry)
            try:
                present, adapter = load(entry)
                with self.changed:
                    if self._put(adapters, present, adapter):
                        return self._used(present, me)
            finally:
                with self.changed:
                    self.arriving.discard(entry)
                    self.changed.notify_all()
            entry = present

    def give_back(self, taken: Sequence[Held], me: int) -> None:
        """Say that a thread no longer uses these."""
        with self.changed:
            for held in taken:
                held.users.remove(me)
            self.changed.notify_all()

    @property
    def bytes(self) -> int:
        """Bytes of the adapters that are there."""
        return sum(entry.bytes for entry in self.held)

    def sweep(self, adapters: AdapterSet) -> None:
        """Forget what somebody else has taken out of the model."""
        there = adapters.adapters._modules
        for entry, held in list(self.held.items()):
            adapter = held.adapter()
            if adapter is None or there.get(held.name) is not adapter:
                del self.held[entry]

    def _used(self, entry: LibraryEntry, thread: int) -> Held:
        held = self.held[entry]
        held.users.append(thread)
        now = self.hits + self.loads
        self.scores[entry.name] = (1 + self._score(entry, now), now)
        return held

    def _score(self, entry: LibraryEntry, now: int) -> float:
        score, at = self.scores.get(entry.name, (0.0, now))
        return float(score * 0.5 ** ((now - at) / (HALF_LIFE * max(1, len(self.held)))))

    def _leaving(self, adapters: AdapterSet, entry: LibraryEntry) -> list[LibraryEntry] | None:
        """The adapters that must go so that another has room, as few as do; None: those in use leave none.

        First go those that the library no longer has, then those least wanted. What the model has from elsewhere stays,
        and so does what its owner has made the active one.
        """
        now = self.hits + self.loads
        free = [own for own, held in self.held.items() if not held.users and held.name not in adapters.default]
        free.sort(key=lambda own: (self.is_listed(own), self._score(own, now)))
        count, size, leaving = len(self.held) + 1, self.bytes + entry.bytes, []
        for own in free:
            if self.limits.allow(count, size):
                break
            leaving.append(own)
            count, size = count - 1, size - own.bytes
        return leaving if self.limits.allow(count, size) else None

    def _may_wait(self, entry: LibraryEntry, thread: int) -> None:
        """Refuse to wait where nobody else would make room."""
        used = [held for held in self.held.values() if held.users]
        if not used or any(thread in held.users for held in used):
            raise AdapterError(
                f"there is no room for the adapter '{entry.name}': the model holds {len(self.held)} adapters of this "
                f"library, {self.bytes:,} bytes, and those that would have to go are in use; raise most or bytes, or "
                "leave a block first"
            )

    def _put(self, adapters: AdapterSet, entry: LibraryEntry, adapter: Adapter) -> bool:
        """Attach an adapter, and detach what must go for it; False, and nothing done, if there is no room any more."""
        self.sweep(adapters)
        if entry in self.held:  # as it is now, another thread has brought it
            return True
        leaving = self._leaving(adapters, entry)
        if leaving is None:
            return False
        check_unmerged(adapters.merged, "adapters cannot be loaded")
        for own in leaving:
            detach_adapter(adapters, self.held.pop(own).name)
        self.evictions += len(leaving)
        name = free_name(adapters, entry.name)
        attach_beside(adapters, name, adapter)
        self.held[entry] = Held(name, weakref.ref(adapter))
        self.loads += 1
        return True


def free_name(adapters: AdapterSet, name: str) -> str:
    """A name in a model for an adapter of a library: what it is called there, as far as letters go."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "-" for c in name)[-80:]
    names = (f"{_NAME}-{plain}{number}" for number in ("", *(f"-{n}" for n in range(2, len(adapters.adapters) + 3))))
    return next(own for own in names if own not in adapters.adapters._modules)
