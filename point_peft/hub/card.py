"""The model card of an adapter: a `README.md` that the Hub reads and that its owner may edit.

What is written here stands between two lines that are comments in Markdown, the marks. A later save or push writes that
section anew, and the fields of the YAML above it that it states. All else in the file is its owner's and stays.
"""

import inspect
import json
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import huggingface_hub
import yaml  # type: ignore[import-untyped]
from torch import nn

from point_peft.adapting.adapter import Adapter
from point_peft.adapting.adding import own_parameters
from point_peft.config import METHODS, TunerConfig, require
from point_peft.errors import PointPeftError, quoted
from point_peft.files.format import CARD_FILE, Card
from point_peft.hub.licences import LICENCE, card_fields, check_licence, forbids_commerce, stated_licences
from point_peft.hub.pulling import LIBRARY, is_repo_id

TAGS = ("point-cloud", LIBRARY)
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_./\-]*"
_MARK = re.compile(rf"^<!-- (begin|end) {LIBRARY}(?: ({_NAME}))? -->(?=[ \t]*\r?$)", re.MULTILINE)
_LOADING = re.compile(r"^model = PointPeftModel\.from_pretrained\(backbone, .*\)(?=\r?$)", re.MULTILINE)
_LICENCE = re.compile(rf"^## Licence\r?\n\r?\n.* licensed `({LICENCE})`.*\r?\n\r?\n(?=<!-- end)", re.MULTILINE)
_LINE_END = r"(?:\r\n|\r|\n)"
_FRONT = re.compile(rf"\s*---{_LINE_END}(.*?){_LINE_END}---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
"""The block of YAML that a card begins with, by the Hub's rule."""
_QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same in C, where PyYAML was built with it."""
# Beside YAMLError: a tag such as !!int on what is none, a date that is none, lists in lists in lists.
_NOT_READ = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
_LISTS = ("tags", "datasets", "metrics")


@dataclass(frozen=True, kw_only=True)
class About:
    """The facts that a card states of an adapter."""

    methods: Mapping[str, Sequence[str]]
    """Method -> its citation, in paragraphs."""
    base_kind: str
    """The class of the backbone."""
    base_model: str | None = None
    revision: str | None = None
    parameters: int
    all_parameters: int
    """Of the backbone and the adapter."""
    size: int
    """Bytes of the tensors' file."""
    modules: Mapping[str, int]
    """Kind of module -> how many of it are adapted."""
    heads: Sequence[str] = ()
    """The modules that the adapter has to itself."""
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Dataset -> metric -> value."""
    datasets: Sequence[str] = ()
    """Ids of the datasets on the Hub that it was trained on."""
    license: str | None = None
    base_license: str | None = None
    """Of the weights of the backbone."""
    pipeline_tag: str | None = None
    tags: Sequence[str] = ()
    repo_id: str | None = None
    adapter: str | None = None
    """The subfolder of the repository that it lies in, which also names its section of the card."""

    def __post_init__(self) -> None:
        values = [value for metrics in self.results.values() for value in metrics.values()]
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in values)
        require(numbers, self, "results", "dataset -> metric -> a finite number (int or float)")
        named = self.adapter is None or re.fullmatch(_NAME, self.adapter) is not None
        require(named, self, "adapter", "letters, digits, '_', '.', '/' and '-', the first a letter or digit")


def about_adapter(adapter: Adapter, base: nn.Module, size: int) -> About:
    """The facts that the card of an adapter states, its file having `size` bytes."""
    parameters = sum(parameter.numel() for parameter in adapter.parameters())
    sites = [base.get_submodule(path) for path, _ in adapter.sites() if path not in adapter.saved]
    return About(
        methods={tuner.method: citation(tuner.method) for tuner in adapter.config.tuners},
        base_kind=type(base).__name__,
        base_model=adapter.config.base_model_name_or_path,
        revision=adapter.config.revision,
        parameters=parameters,
        all_parameters=sum(parameter.numel() for parameter in own_parameters(base).values()) + parameters,
        size=size,
        modules=Counter(type(module).__name__ for module in sites),
        heads=adapter.saved,
    )


def card_of(base: nn.Module, said: Mapping[str, Any], adapter: Adapter) -> Card:
    """The card of an adapter, with the fields of `About` that its owner states; one that cannot be read stays."""
    check_licence(said.get("base_license"))

    def over(existing: str | None, size: int) -> str:
        about = replace(about_adapter(adapter, base, size), **said)
        new = render(about)
        try:
            text = kept(existing, new)
            return text if text == existing else carried(text, [about.base_license])
        except PointPeftError as error:
            warnings.warn(f"{CARD_FILE} is left as it is: {error}", stacklevel=2)
            return existing or new

    return over


def home(config: type[TunerConfig]) -> ModuleType:
    """The package that offers a configuration, or else the module that defines it."""
    module = sys.modules[config.__module__]
    package = sys.modules.get(module.__package__ or "")
    return package if package is not None and vars(package).get(config.__name__) is config else module


def paragraphs(method: str) -> list[str]:
    """The docstring of a method's package, by its empty lines; the first paragraph is "NAME: what it is."."""
    text = home(METHODS[method]).__doc__ or METHODS[method].__doc__ or method
    return re.split(r"\n\s*\n", inspect.cleandoc(text))


def citation(method: str) -> list[str]:
    """The paragraphs with a URL that follow the first: authors, title, venue, address."""
    cited: list[str] = []
    for block in paragraphs(method)[1:]:
        if "https://" not in block or block.startswith(("    ", "When to use it:", "Deviations")):
            break
        cited.append(block)
    return cited


def markdown(text: str) -> str:
    """Plain text as Markdown that shows the same; what stands in `...` and URLs are left as they are."""
    pieces = re.split(r"(`[^`]*`|https?://\S+)", text)
    return "".join(piece if i % 2 else re.sub(r"([\\*_<\[\]|~#])", r"\\\1", piece) for i, piece in enumerate(pieces))


def render(about: About) -> str:
    return _front(_fields(about)) + "\n" + "\n".join(_section(about)) + "\n"


def _front(fields: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---\n"


def _fields(about: About) -> dict[str, Any]:
    # The Hub refuses cards that state what cannot be a name on it.
    base, task = about.base_model if is_repo_id(about.base_model) else None, about.pipeline_tag or "other"
    results = [
        huggingface_hub.EvalResult(task, dataset, dataset, metric, value, metric_name=metric)
        for dataset, metrics in about.results.items()
        for metric, value in metrics.items()
    ]
    methods = [method.lower().replace("_", "-") for method in about.methods]
    data = huggingface_hub.ModelCardData(
        library_name=LIBRARY,
        base_model=base,
        base_model_relation="adapter" if base else None,
        license=about.license,
        pipeline_tag=about.pipeline_tag,
        tags=list(dict.fromkeys([*TAGS, *methods, *about.tags])),
        datasets=list(about.datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        eval_results=results or None,
        model_name=_model_name(about) if results else None,
    )
    fields: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call]
    return fields


def _model_name(about: About) -> str:
    """Under which name the results stand, which tells the adapters of one repository apart."""
    repo = about.repo_id.rpartition("/")[2] if about.repo_id else ""
    return "/".join(filter(None, [repo, about.adapter])) or f"{'+'.join(about.methods)} for {about.base_kind}"


def _section(about: About) -> Iterator[str]:
    begin, end = _marks(about.adapter or "")
    methods = " + ".join(_plain(method) for method in about.methods)
    share = 100 * about.parameters / about.all_parameters if about.all_parameters else 0.0
    rows = {
        "Method": methods,
        "Base": _base(about),
        "Parameters": f"{about.parameters:,}, {share:.2f} % of {about.all_parameters:,}",
        "File": _size(about.size),
        "Adapted modules": ", ".join(f"{count} {_plain(kind)}" for kind, count in about.modules.items()),
        "Own modules": ", ".join(map(_plain, about.heads)),
    }
    yield begin
    yield "<!-- point_peft writes what stands between these marks anew; write above or below them. -->"
    yield ""
    yield f"# {methods} adapter{f' {_plain(about.adapter)}' if about.adapter else ''} for {_plain(about.base_kind)}"
    yield from ("", "The base stays as it is; these files hold only what was trained beside it, with point_peft.", "")
    yield from ("| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items() if text))
    if about.results:
        yield from ("", "## Results", "", "| dataset | metric | value |", "|---|---|---|")
        for dataset, metrics in about.results.items():
            for metric, value in metrics.items():
                yield f"| {_plain(dataset)} | {_plain(metric)} | {value} |"
    yield from ("", "## Use", "", "```python", "from point_peft import PointPeftModel", "")
    yield f"backbone = ...  # the {' '.join(about.base_kind.split())} that it was trained on, with its weights"
    yield from (_loading(about.repo_id, about.adapter), "```")
    if any(about.methods.values()):
        yield from ("", "## Citation")
    for method, blocks in about.methods.items():
        if blocks:
            yield from ("", f"{_plain(method)}: {markdown(' '.join(' '.join(blocks).split()))}")
    if about.base_license:
        yield from ("", *_licence(about.base_model, about.base_license))
    yield from ("", end)


def _base(about: About) -> str:
    kind, revision = _plain(about.base_kind), f", revision {_plain(about.revision)}" if about.revision else ""
    return kind + revision if about.base_model is None else f"{_linked(about.base_model)}{revision} ({kind})"


def _linked(base: str) -> str:
    return f"[{_plain(base)}](https://huggingface.co/{base})" if is_repo_id(base) else _plain(base)


def _licence(base: str | None, licence: str) -> tuple[str, str, str]:
    """The lines that say which weights an adapter needs and what is allowed with them; `base_licence` reads them."""
    bound = ", which forbids commercial use, also of this adapter with them" if forbids_commerce(licence) else ""
    weights = f"the weights of {_linked(base) if base else 'its base'}"
    return "## Licence", "", f"The adapter works only with {weights}, and these are licensed `{licence}`{bound}."


def _loading(repo_id: str | None, adapter: str | None) -> str:
    """The line that loads the adapter; one line whatever the names are."""
    folder = f", subfolder={json.dumps(adapter)}" if repo_id and adapter else ""
    return f"model = PointPeftModel.from_pretrained(backbone, {json.dumps(repo_id or 'path/to/this/folder')}{folder})"


def _marks(name: str) -> tuple[str, str]:
    named = f"{LIBRARY} {name}".strip()
    return f"<!-- begin {named} -->", f"<!-- end {named} -->"


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _plain(text: str) -> str:
    """A stranger's text on one line, without meaning in Markdown, HTML or a table."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", " ".join(text.split()))


def merged(existing: str | None, new: str) -> str:
    """The text that goes over an existing card: it, with the sections and the YAML fields of the new one.

    The sections of other adapters stay; one that was not there comes last. Of the texts around the sections the new one
    counts only where there is none. Lists are united. YAML in which nothing changes stays to the letter. Broken YAML or
    marks raise `PointPeftError`.
    """
    if existing is None:
        return new
    existing = existing.removeprefix("\ufeff")
    line_end = "\r\n" if 0 < existing.count("\n") == existing.count("\r\n") else "\n"
    _, ours, fresh = _taken_apart(new)
    fresh = fresh.replace("\r\n", "\n").replace("\n", line_end)
    front, theirs, body = _taken_apart(existing)
    sections, present = _sections(fresh), _sections(body)
    texts = {name: fresh[slice(*where)] for name, where in sections.items()}
    others = {name: body[slice(*where)] for name, where in present.items() if name not in sections}
    if _outside(fresh, sections).strip() and not _outside(body, present).strip():
        body, texts = fresh, others
    for name, section in texts.items():
        body = _placed(body, name, section, line_end)
    fields = _united(theirs, ours, alone=not others)
    if fields != theirs:
        front = _front(fields).replace("\n", line_end)
    return front + body


def _outside(body: str, sections: Mapping[str, tuple[int, int]]) -> str:
    for start, stop in sorted(sections.values(), reverse=True):
        body = body[:start] + body[stop:]
    return body


def _placed(body: str, name: str, section: str, line_end: str) -> str:
    present = _sections(body)
    if name in present:
        start, stop = present[name]
        return body[:start] + section + body[stop:]
    return body + (line_end if body.endswith("\n") or not body else line_end * 2) + section + line_end


def kept(existing: str | None, new: str) -> str:
    """The text that a save leaves in a folder: a card without a section of ours is its owner's alone."""
    return existing if existing is not None and not _MARK.search(existing) else merged(existing, new)


def for_repository(files: Mapping[str, bytes], repo_id: str) -> dict[str, bytes]:
    """The files of a push, by their paths: the cards of all adapters in one at the root, the only one the Hub shows."""
    others = {path: data for path, data in files.items() if path.rpartition("/")[2] != CARD_FILE}
    whole: str | None = None
    for path in sorted(set(files) - set(others)):
        try:
            text = files[path].decode("utf-8")
        except UnicodeDecodeError as error:
            raise PointPeftError(f"'{path}' is not a text in UTF-8: {error.reason}") from error
        whole = merged(whole, _addressed(text, repo_id, path.rpartition("/")[0]))
    return others if whole is None else {**others, CARD_FILE: whole.encode("utf-8")}


def _addressed(text: str, repo_id: str, folder: str) -> str:
    """A saved card as it goes to a repository: it says how to load the adapter from there."""
    front, _, body = _taken_apart(text)
    for name, (start, stop) in _sections(body).items():
        if name in ("", folder):
            section = _LOADING.sub(lambda _: _loading(repo_id, folder), body[start:stop])
            for old, new in zip(_marks(name), _marks(folder), strict=True):
                section = section.replace(old, new)
            return front + body[:start] + section + body[stop:]
    return text


def base_licence(text: str, adapter: str) -> str | None:
    """The licence of the base that an adapter's section of a card states, if any."""
    found = [_LICENCE.search(text, *where) for name, where in _sections(text).items() if name == adapter]
    return found[0][1] if found and found[0] else None


def with_base_licence(text: str, adapter: str, base: str | None, licence: str) -> str:
    """A card in which an adapter's section says so of the weights that it needs."""
    where = _sections(text).get(adapter)
    if where is None:
        return text
    section, end = _LICENCE.sub("", text[slice(*where)]), _marks(adapter)[1]
    line_end = "\r\n" if "\r\n" in section else "\n"
    lines = line_end.join([*_licence(base, licence), "", end])
    return text[: where[0]] + section.removesuffix(end) + lines + text[where[1] :]


def carried(text: str, licences: Iterable[str | None]) -> str:
    """A card that also states the licence of a base, if it forbids commercial use and the card states none.

    One that states another stays, with a warning: it is its owner's word.
    """
    binding = [licence for licence in licences if licence and forbids_commerce(licence)]
    if not binding:
        return text
    _, fields, body = _taken_apart(text)
    stated = stated_licences(fields)
    if not stated:
        line_end = "\r\n" if 0 < text.count("\n") == text.count("\r\n") else "\n"
        return _front({**fields, **card_fields(binding[0])}).replace("\n", line_end) + body
    if not any(forbids_commerce(licence) or licence in ("other", "unknown") for licence in stated):
        warnings.warn(
            f"the card says license {quoted(', '.join(stated))}, but the weights that the adapter needs are licensed "
            f"{quoted(binding[0])}, which forbids commercial use: state license={quoted(binding[0])} if that is meant",
            stacklevel=2,
        )
    return text


def tags_of(text: str) -> list[Any]:
    """The tags that the YAML of a card states; none where it cannot be read."""
    block = _FRONT.match(text)
    try:
        fields = yaml.load(block[1], _QUICK) if block else None
    except _NOT_READ:
        return []
    return _listed(fields.get("tags")) if isinstance(fields, dict) else []


def _taken_apart(text: str) -> tuple[str, dict[str, Any], str]:
    """The block of YAML as it stands, what it says, and the text after it."""
    block = _FRONT.match(text)
    if block is None:
        if re.match(r"\s*---[ \t]*\r?\n", text):
            raise PointPeftError("the card begins with '---', but no block of YAML: end it with a line '---'")
        return "", {}, text
    try:
        fields = yaml.safe_load(block[1])
    except _NOT_READ as error:
        reason = " ".join(str(error).split())[:200]
        raise PointPeftError(f"the YAML at the beginning of the card cannot be read: {reason}") from error
    if fields is not None and not isinstance(fields, dict):
        raise PointPeftError(f"the YAML at the beginning of the card is {quoted(fields)}, not fields with values")
    odd = [name for name in fields or () if not isinstance(name, str)]
    if odd:
        raise PointPeftError(f"the YAML at the beginning of the card names a field {quoted(odd[0])}: put it in quotes")
    return block[0], fields or {}, text[block.end() :]


def _sections(body: str) -> dict[str, tuple[int, int]]:
    """Adapter -> where its section begins and ends."""
    sections: dict[str, tuple[int, int]] = {}
    marks = list(_MARK.finditer(body))
    names = [(mark[1], mark[2] or "") for mark in marks]
    for number in range(0, len(marks), 2):
        (kind, name), *after = names[number : number + 2]
        if kind != "begin" or after != [("end", name)] or name in sections:
            begin, end = _marks(name)
            raise PointPeftError(f"the card needs one line '{begin}' and after it one '{end}', or neither")
        sections[name] = (marks[number].start(), marks[number + 1].end())
    return sections


def _united(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, alone: bool) -> dict[str, Any]:
    """The fields of a card and ours; `alone`: no other adapter has a section in it."""
    fields = {**theirs, **ours}
    for name in (*_LISTS, *([] if alone else ["base_model"])):
        both = [*_listed(theirs.get(name)), *_listed(ours.get(name))]
        if name in theirs and name in ours:
            fields[name] = [entry for i, entry in enumerate(both) if entry not in both[:i]]
            if fields[name] == _listed(theirs[name]):
                fields[name] = theirs[name]
    if "model-index" in theirs and "model-index" in ours:
        names = [entry["name"] for entry in ours["model-index"]]
        others = [e for e in _listed(theirs["model-index"]) if not isinstance(e, dict) or e.get("name") not in names]
        fields["model-index"] = [*others, *ours["model-index"]]
    return fields


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
