"""The command line `point-peft`: adapters as files and on the Hub.

Exit codes: 0 all right; 1 a difference (diff) or an adapter that is not in order (inspect, list); 2 wrong usage or an
error, which is one line on stderr; 130 interrupted.
"""

import argparse
import json
import os
import secrets
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TextIO

import safetensors.torch
import torch
from torch import Tensor

from point_peft.config import TunerConfig
from point_peft.demo.command import add_demo
from point_peft.errors import AdapterFileError, PointPeftError, quoted
from point_peft.files import format
from point_peft.files.tensors import check_finite, dtype_name, unshared
from point_peft.hub.card import for_repository
from point_peft.hub.pulling import Place, download, is_repo_id
from point_peft.hub.pushing import Upload, push
from point_peft.library.adapter_library import AdapterLibrary
from point_peft.library.table import library_table
from point_peft.model import PointPeftModel, describe
from point_peft.training.commands import add_commands
from point_peft.training.folder import METRICS_FILE, MODEL_FILE, PICTURES, RECIPE_FILE, read_record
from point_peft.training.models import SPEC, made_by
from point_peft.version import __version__

PROGRAM = "point-peft"
DIFFERENT = 1
ERROR = 2
INTERRUPTED = 130
"""The exit code that shells have for a command that Ctrl-C ended."""
_SOURCE = "a folder, or a repository of the Hub"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code: int = options.run(options)
        except (PointPeftError, OSError) as error:
            _say(f"{PROGRAM}: error: {' '.join(str(error).split())}", sys.stderr)
            return ERROR
        except KeyboardInterrupt:
            return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Adapters of point-cloud models, as files and on the Hugging Face Hub.",
        epilog="Exit codes: 0 all right; 1 different, or not in order; 2 an error.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("inspect", help="say what is in an adapter, and whether it is in order")
    command.add_argument("source", metavar="PATH_OR_REPO", help=_SOURCE)
    command.add_argument("--json", action="store_true", help="as JSON")
    _add_place(command)
    command.set_defaults(run=_inspect)

    _add_list(commands)
    command = commands.add_parser("diff", help="compare two adapters; exit code 1 if they differ")
    command.add_argument("first", metavar="A", help=_SOURCE)
    command.add_argument("second", metavar="B", help=_SOURCE)
    command.add_argument("--token", help="token of the Hub (default: the one that is logged in)")
    command.set_defaults(run=_diff, revision=None, subfolder=None)

    command = commands.add_parser("describe", help="say what point_peft understands of a backbone")
    command.add_argument("model", metavar="MODEL", help=SPEC)
    command.add_argument("--input", metavar="SHAPE", type=_shape, help="run it on random clouds, such as 2,1024,3")
    command.set_defaults(run=_describe)

    command = commands.add_parser("merge", help="fold an adapter into the weights of its backbone")
    command.add_argument("model", metavar="MODEL", help=SPEC)
    command.add_argument("source", metavar="ADAPTER", help=_SOURCE)
    command.add_argument("output", metavar="OUTPUT.safetensors", type=Path, help="the file to write, a state dict")
    _add_place(command)
    command.set_defaults(run=_merge)

    command = commands.add_parser(
        "push",
        help="push a saved adapter to the Hub",
        description="Push the adapter in FOLDER and those in its subfolders in one commit; the card keeps your text.",
    )
    command.add_argument("folder", metavar="FOLDER", type=Path)
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument("--private", action="store_true", default=None, help="if the repository has to be made")
    command.add_argument("--message", help="of the commit")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    command.add_argument("--base-license", metavar="ID", help="of the weights of the base, such as cc-by-nc-4.0")
    _add_place(command)
    command.set_defaults(run=_push)

    command = commands.add_parser("pull", help="download an adapter into a folder")
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument("folder", metavar="FOLDER", type=Path)
    _add_place(command)
    command.set_defaults(run=_pull)
    add_commands(commands)
    add_demo(commands)
    return parser


def _add_list(commands: Any) -> None:
    command = commands.add_parser(
        "list",
        help="list the adapters of a folder, a collection or a repository by their headers",
        description="List adapters by the headers of their files; exit code 1 if one of them is not in order.",
    )
    command.add_argument("source", metavar="SOURCE", help="a folder, or a collection or a repository of the Hub")
    command.add_argument("--method", metavar="NAME", help="only adapters with this method, such as lora")
    command.add_argument("--base", metavar="NAME", help="only adapters of this base, as they name it")
    command.add_argument("--task", metavar="TASK", help="only adapters of this task, such as classification")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--token", help="token of the Hub (default: the one that is logged in)")
    command.set_defaults(run=_list)


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", help="branch, tag or commit of the repository")
    command.add_argument("--subfolder", help="folder within the repository")
    command.add_argument("--token", help="token of the Hub (default: the one that is logged in)")


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if len(parts) < 2 or not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**31 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 2,1024,3")
    return tuple(map(int, parts))


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print; what a stranger's file says cannot steer the terminal."""
    for line in text.split("\n"):
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        print(shown, file=stream)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"{PROGRAM}: warning: {' '.join(str(message).split())}", sys.stderr)


def _place(options: argparse.Namespace) -> Place:
    return Place(subfolder=options.subfolder, revision=options.revision, token=options.token)


def _folder(source: str, options: argparse.Namespace) -> Path:
    """Where the files of an adapter lie."""
    if not Path(source).exists() and is_repo_id(source):
        return download(source, _place(options))
    if options.revision is not None:
        raise PointPeftError(f"--revision is for repositories of the Hub; '{source}' is a path")
    return Path(source, options.subfolder or "")


def _inspect(options: argparse.Namespace) -> int:
    report = _report(_folder(options.source, options))
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _say("\n".join(_readable(report)))
    return DIFFERENT if report["problems"] else 0


def _list(options: argparse.Namespace) -> int:
    library = AdapterLibrary(options.source, token=options.token)
    found = library.find(method=options.method, base=options.base, task=options.task)
    broken = [library[name] for name in library.broken]
    if options.json:
        rows = [{**asdict(entry), "origin": entry.where} for entry in (*found, *broken)]
        print(json.dumps({"adapters": rows, "skipped": dict(library.skipped)}, indent=2))
    else:
        _say("\n".join(library_table([*found, *broken], library.skipped)))
    return DIFFERENT if broken else 0


def _report(folder: Path) -> dict[str, Any]:
    """The content of an adapter, as JSON."""
    files = format.read_folder(folder)
    about = files.about
    methods, problems = _methods(files, about)
    for name, tensor in files.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"the tensor {quoted(name)} holds values that are not finite")
    if not any(map(torch.count_nonzero, files.tensors.values())):
        problems.append("all tensors are zero" if files.tensors else "there are no tensors")
    if files.edited and not files.foreign:
        problems.append(f"{format.CONFIG_FILE} is another than the one that the tensors were saved with")
    if left := format.leftovers(folder):
        problems.append(f"an interrupted save has left {', '.join(left)}; the next save removes it")
    heads, saved = about.get("heads"), about.get("modules_to_save")
    named = saved if isinstance(saved, list) else ()  # all that PEFT's files say of them
    return {
        "folder": str(folder),
        "format": "point_peft" if files.config["peft_type"] == format.PEFT_TYPE else "PEFT",
        "point_peft_version": about.get("point_peft_version"),
        "methods": methods,
        "base": {
            "name": about.get("base_model_name_or_path"),
            "revision": about.get("revision"),
            "fingerprint": about.get("base_fingerprint"),
        },
        "adapted_modules": about.get("adapted_modules"),
        "heads": heads if isinstance(heads, dict) else dict.fromkeys(map(str, named)),
        "parameters": sum(tensor.numel() for tensor in files.tensors.values()),
        "bytes": (folder / format.TENSOR_FILE).stat().st_size,
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor), "zero": not bool(tensor.count_nonzero())}
            for name, tensor in files.tensors.items()
        },
        "problems": problems,
    }


def _methods(files: format.AdapterFiles, about: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """The methods with the fields that are not their defaults, and what is wrong with them."""
    if about["peft_type"] != format.PEFT_TYPE:
        own = {name: value for name, value in about.items() if name != "peft_type" and value not in (None, [], {})}
        return [{"method": about["peft_type"], "fields": own}], []
    tuners = about.get("tuners")
    if not isinstance(tuners, list) or not tuners or not all(isinstance(tuner, dict) for tuner in tuners):
        return [], [f"{format.CONFIG_FILE} names no methods"]
    methods, problems = [], []
    for tuner in tuners:
        own = {name: value for name, value in tuner.items() if name != "method"}
        try:
            own = _not_default(TunerConfig.from_json(tuner))
        except PointPeftError as error:
            problems.append(str(error))
        methods.append({"method": tuner.get("method"), "fields": own})
    return methods, problems


def _not_default(config: TunerConfig) -> dict[str, Any]:
    values, changed = config.to_json(), {}
    for item in fields(config):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        value = getattr(config, item.name)
        if value != (tuple(default) if isinstance(default, list) else default):
            changed[item.name] = values[item.name]
    return changed


def _readable(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['folder']} ({report['format']} format)"
    for entry in report["methods"]:
        yield f"method:      {entry['method']}"
        for name, value in entry["fields"].items():
            yield f"  {name} = {value!r}"
    base = report["base"]
    yield f"base:        {base['name'] or 'not named'}" + (f", revision {base['revision']}" if base["revision"] else "")
    if isinstance(base["fingerprint"], dict):
        for name, value in sorted(base["fingerprint"].items()):
            yield f"  {name} = {value!r}"
    yield f"own modules: {', '.join(report['heads']) or 'none'}"
    zero = sum(tensor["zero"] for tensor in report["tensors"].values())
    yield f"size:        {report['parameters']:,} parameters, {report['bytes']:,} bytes"
    yield f"tensors:     {len(report['tensors'])}, {zero} of them zero"
    width = max(map(len, report["tensors"]), default=0)
    for name, tensor in report["tensors"].items():
        shape = f"({', '.join(map(str, tensor['shape']))})"
        yield f"  {name:<{width}}  {tensor['dtype']} {shape}{' zero' if tensor['zero'] else ''}"
    yield "health:      " + ("in order" if not report["problems"] else "NOT in order")
    for problem in report["problems"]:
        yield f"  {problem}"


def _diff(options: argparse.Namespace) -> int:
    files = [format.read_folder(_folder(source, options)) for source in (options.first, options.second)]
    lines = list(_differences(*files))
    if lines:
        _say("\n".join([f"--- {options.first}", f"+++ {options.second}", *lines]))
    return DIFFERENT if lines else 0


def _differences(first: format.AdapterFiles, second: format.AdapterFiles) -> Iterator[str]:
    ours, theirs = dict(_leaves(first.about)), dict(_leaves(second.about))
    for name in sorted({*ours, *theirs} - {"point_peft_version"}):
        if name not in ours or name not in theirs or ours[name] != theirs[name]:
            yield f"config {name}: {ours.get(name, 'absent')} -> {theirs.get(name, 'absent')}"
    for name in sorted({*first.tensors, *second.tensors}):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            yield f"tensor {name}: only in {'A' if b is None else 'B'}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            yield f"tensor {name}: {dtype_name(a)} {tuple(a.shape)} -> {dtype_name(b)} {tuple(b.shape)}"
        elif not torch.equal(a, b):
            x, y = a.double().flatten(), b.double().flatten()
            lengths = float(x.norm() * y.norm())
            cosine = float(x @ y) / lengths if lengths else 0.0
            yield f"tensor {name}: largest difference {float((x - y).abs().max()):.3g}, cosine {cosine:.6f}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, JSON) of everything in a configuration that is not an object or a list of objects."""
    if isinstance(value, dict) and value:
        for name, entry in value.items():
            yield from _leaves(entry, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        for number, entry in enumerate(value):
            yield from _leaves(entry, f"{path}[{number}]")
    else:
        yield path, json.dumps(value, sort_keys=True)


def _describe(options: argparse.Namespace) -> int:
    shapes = [] if options.input is None else [options.input]
    clouds = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    _say(str(describe(made_by(options.model, {}), *clouds)))
    return 0


def _merge(options: argparse.Namespace) -> int:
    output: Path = options.output
    if output.suffix != ".safetensors":
        raise PointPeftError(f"OUTPUT is {str(output)!r}; allowed: a name that ends with .safetensors")
    model = PointPeftModel.from_pretrained(made_by(options.model, {}), _folder(options.source, options))
    tensors = model.merge_and_unload().state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise PointPeftError(f"{name!r} of the backbone is no tensor, and safetensors hold nothing else")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_bytes(safetensors.torch.save(unshared(tensors), metadata={"format": "pt"}))
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    _say(f"{output}: {len(tensors)} tensors, {output.stat().st_size:,} bytes")
    return 0


def _push(options: argparse.Namespace) -> int:
    files = for_repository(_files(options.folder, options.subfolder), options.repo_id)
    message = options.message or f"Upload with point_peft {__version__}"
    how = (options.private, options.token, options.revision, options.create_pr, options.base_license)
    _say(push(Upload(files, options.repo_id, message, None, *how)))
    return 0


def _files(folder: Path, subfolder: str | None) -> dict[str, bytes]:
    if not folder.is_dir():
        raise AdapterFileError(f"there is no folder '{folder}'")
    files: dict[str, bytes] = {}
    for own in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if not (own / format.CONFIG_FILE).exists() and not (own / format.TENSOR_FILE).exists():
            continue
        paths = [own / name for name in (format.CONFIG_FILE, format.TENSOR_FILE, format.CARD_FILE)]
        linked = [path for path in (own, *paths) if path.is_symlink() and path != folder]
        if linked:
            raise AdapterFileError(f"'{linked[0]}' is a link: only files are pushed, not what they link to")
        check_finite(format.read_folder(own).tensors, f"'{own / format.TENSOR_FILE}'")
        if format.PENDING_CONFIG_FILE in format.leftovers(own):
            raise AdapterFileError(f"a save into '{own}' was interrupted: load the adapter and save it again")
        for path in paths:
            if path.is_file():
                files["/".join(filter(None, [subfolder, *path.relative_to(folder).parts]))] = path.read_bytes()
    if not files and (folder / format.RUN_FILE).is_file():
        raise AdapterFileError(f"the run in '{folder}' {_why_no_adapter(folder)}")
    if not files:
        raise AdapterFileError(f"there is no adapter in '{folder}': '{format.CONFIG_FILE}' is missing")
    if (folder / format.RUN_FILE).is_file():  # the card shows the pictures, and the recipe says how it was trained
        for name in (RECIPE_FILE, METRICS_FILE, *PICTURES):
            if (folder / name).is_file():
                files["/".join(filter(None, [subfolder, name]))] = (folder / name).read_bytes()
    return files


def _why_no_adapter(folder: Path) -> str:
    if not read_record(folder)["finished"]:
        return "is not finished: go on with train --resume, and push it then"
    return (
        f"trained the model itself and has no adapter, only {MODEL_FILE}: adapters are pushed, as of train --method "
        f"lora or linear_probe; upload that folder with 'hf upload REPO_ID {folder}'"
    )


def _pull(options: argparse.Namespace) -> int:
    format.copy_folder(download(options.repo_id, _place(options)), options.folder)
    _say(str(options.folder))
    return 0
