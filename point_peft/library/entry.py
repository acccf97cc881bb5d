"""An adapter of a library as its files describe it: read from their headers, no tensor among them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, get_args

from point_peft.data.cloud import Task
from point_peft.errors import AdapterFileError, quoted
from point_peft.files.format import (
    CONFIG_FILE,
    DIGEST,
    PEFT_TYPE,
    RECORD,
    TENSOR_FILE,
    Headers,
    metadata_of,
    methods_of_peft,
    parse_config,
    sha256,
)

_WHOLE = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_HALF = {"F16": 2, "BF16": 2}
_SIZES = _WHOLE | _HALF
"""Bytes of a value, by its type in a file."""
MAX_WORD = 300
"""Characters of a name; what a file has instead of one that is longer does not count."""
MAX_CLASSES = 10_000
MAX_DIMENSIONS = 16
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True, slots=True)
class Origin:
    """The place that an adapter is loaded from, and the marks by which one sees that it has changed there."""

    source: str
    """A folder, or a repository of the Hub."""
    subfolder: str | None = None
    commit: str | None = None
    """Of a repository; None: a folder."""
    marks: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryEntry:
    """An adapter of a library; what its files do not tell is None."""

    name: str
    """Its path in the folder, or its repository and the path in that."""
    methods: tuple[str, ...] = ()
    base: str | None = None
    """`base_model_name_or_path` as whoever made the adapter gave it."""
    base_revision: str | None = None
    task: str | None = None
    """Of the run beside it, else of its card."""
    classes: tuple[str, ...] | None = None
    """Names, of the run beside it."""
    num_classes: int | None = None
    """The classes of the run, else the outputs of the adapter's only head."""
    parameters: int = 0
    bytes: int = 0
    """Bytes that its tensors take in memory, where half precision is widened to float32."""
    broken: str | None = None
    """A reason why it cannot be loaded; None if nothing is seen in the headers."""
    origin: Origin

    @property
    def where(self) -> str:
        """The folder that it lies in, or the repository, the path in it and the commit."""
        inside = f"/{self.origin.subfolder}" if self.origin.subfolder else ""
        return self.origin.source + inside + (f" at {self.origin.commit}" if self.origin.commit else "")


@dataclass(frozen=True)
class Beside:
    """The knowledge of an adapter that lies beside its files: in the record of a run, in a card."""

    task: str | None = None
    classes: tuple[str, ...] | None = None


def entry_of(name: str, origin: Origin, headers: Headers, beside: Beside) -> LibraryEntry:
    """The entry that the headers of an adapter describe; raises `AdapterFileError` where they are not in order."""
    metadata = metadata_of(headers.header)
    about = config = parse_config(headers.text, Path(origin.source, origin.subfolder or "", CONFIG_FILE))
    if config["peft_type"] == PEFT_TYPE:
        methods = _methods(config)
    else:
        methods = (methods_of_peft()[config["peft_type"]].method,)
        if RECORD in metadata and metadata.get(DIGEST) == sha256(headers.text):
            about = parse_config(metadata[RECORD].encode(), Path(origin.source, origin.subfolder or "", TENSOR_FILE))
    parameters, size = _sizes(headers)
    classes = beside.classes
    return LibraryEntry(
        name=name,
        methods=methods,
        base=word(about.get("base_model_name_or_path")),
        base_revision=word(about.get("revision")),
        task=beside.task,
        classes=classes,
        num_classes=_outputs(about.get("heads")) if classes is None else len(classes),
        parameters=parameters,
        bytes=size,
        origin=origin,
    )


def word(value: object) -> str | None:
    """A name of a stranger's file; None where it is none, or no name."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_WORD else None


def _methods(config: Mapping[str, Any]) -> tuple[str, ...]:
    tuners = config.get("tuners")
    named = [tuner.get("method") for tuner in tuners if isinstance(tuner, dict)] if isinstance(tuners, list) else []
    methods = tuple(filter(None, map(word, named)))
    if not methods or not isinstance(tuners, list) or len(methods) != len(tuners):
        raise AdapterFileError(f"its {CONFIG_FILE} names no methods")
    return methods


def _sizes(headers: Headers) -> tuple[int, int]:
    """The values of all tensors and the bytes that they take in memory; the file must have just so many."""
    if not isinstance(headers.header, dict):
        raise AdapterFileError(f"its {TENSOR_FILE} is not a safetensors file: its header is no object")
    values = in_memory = in_file = 0
    for name, stated in headers.header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (begin, end) = stated["dtype"], stated["shape"], stated["data_offsets"]
            count = prod(shape) if len(shape) <= MAX_DIMENSIONS else -1
            size = count * _SIZES[kind]
        except (TypeError, LookupError, ValueError) as error:
            raise AdapterFileError(f"its {TENSOR_FILE} describes a tensor {quoted(name)} as none is written") from error
        if type(size) is not int or size < 0 or end - begin != size:
            raise AdapterFileError(f"its {TENSOR_FILE} gives the tensor {quoted(name)} other bytes than its shape has")
        values += count
        in_file += size
        in_memory += 2 * size if kind in _HALF else size
    if in_file != headers.size - headers.length:
        raise AdapterFileError(
            f"its {TENSOR_FILE} has {headers.size} bytes, where its header describes {headers.length + in_file}: it "
            "is cut off, or something follows"
        )
    return values, in_memory


def _outputs(heads: Any) -> int | None:
    """The outputs of a head that a file describes, if it describes one alone and that ends with a layer that tells."""
    if not isinstance(heads, dict) or len(heads) != 1:
        return None
    return _width(next(iter(heads.values())))


def _width(layer: Any) -> int | None:
    if not isinstance(layer, dict):
        return None
    if isinstance(layer.get("layers"), list):
        inner = [entry[1] for entry in reversed(layer["layers"]) if isinstance(entry, list) and len(entry) == 2]
        return next((width for width in map(_width, inner) if width is not None), None)
    arguments = layer.get("arguments")
    stated = arguments if isinstance(arguments, dict) else {}
    width = stated.get("out_features", stated.get("out_channels"))
    return width if type(width) is int and width > 0 else None


def of_run(text: bytes) -> Beside:
    """The facts that the record of a run states; those that it does not state as runs do are not known."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return Beside()
    if not isinstance(record, dict):
        return Beside()
    task, classes = record.get("task"), record.get("classes")
    known = isinstance(classes, list) and 0 < len(classes) <= MAX_CLASSES and all(map(word, classes))
    return Beside(task if task in TASKS else None, tuple(classes) if known and isinstance(classes, list) else None)


def of_tags(tags: Iterable[object]) -> Beside:
    """The task that the tags of a card name, if they name one."""
    tasks = {tag for tag in tags if isinstance(tag, str) and tag in TASKS}
    return Beside(tasks.pop()) if len(tasks) == 1 else Beside()
