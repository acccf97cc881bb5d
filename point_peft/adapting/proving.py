"""Proof, by the first forwards of an adapter, that it acts and learns.

A part acts if its module is called. Where another module reads that one's weights instead, the part has no effect, and
that is an error at once. A module that is not called in one forward may be called in another: a block that is skipped
at random, a head that the batch chooses. Its parts stay unproven, which `get_layer_status` and a warning tell when the
adapter is saved.

A part learns if a gradient comes to it. A model that calls its encoder under `torch.no_grad()`, or detaches what a
block gives, trains what comes after only; the first forward in train mode warns of it, or the first backward pass.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.errors import AdapterError
from point_peft.parts.base import Call, Part
from point_peft.running.forward import Forward, current_forward
from point_peft.running.nested import leaves
from point_peft.running.proof import Graph, Ran, Unproven, sources
from point_peft.running.reading import leave, watch
from point_peft.torch_private import made_when

_READ = "; its weights, or modules in it, are read by another module"
_TRACED = " that was traced. If others call it, run one without torch.compile or torch.export first"


def to_prove(adapter: Adapter) -> Unproven:
    """Everything that an adapter which has just been attached is to show."""
    paths = [path for path, _ in adapter.sites()]
    return Unproven(silent=set(paths), unlearned=set(paths))


def warn_of_silent(name: str, adapter: Adapter) -> None:
    """Warn of parts that have not run in any of an adapter's forwards, if there were some."""
    silent = [path for path, _ in adapter.sites() if path in adapter.silent]
    if silent and adapter.ran_eagerly:
        shown = ", ".join(map(repr, silent[:3])) + (", …" if len(silent) > 3 else "")
        warnings.warn(
            f"adapter '{name}': the parts at {len(silent)} of its modules have not run in any forward so far, and have "
            f"learned nothing: {shown}; get_layer_status() lists them. Leave out what is never called with "
            "exclude_modules or modules_to_save",
            stacklevel=4,
        )


def begin_proof(forward: Forward, model: nn.Module) -> None:
    """At the beginning of a forward: look for what is still to be proved of the active adapters."""
    adapters = [get_adapter(forward.root, name) for name in forward.active]
    if torch.compiler.is_compiling():
        forward.ran = None if all(adapter.ran_eagerly for adapter in adapters) else {}
        return
    open_ends = [adapter.unproven for adapter in adapters if adapter.unproven is not None]
    if open_ends and (torch.is_grad_enabled() or any(unproven.silent for unproven in open_ends)):
        forward.ran = {}
    silent = [path for unproven in open_ends if model.training not in unproven.watched for path in unproven.silent]
    if silent:
        forward.watches = True
        # In a second pass the plain modules run, and read their own.
        watch(model, _readable(forward.root.base_model, silent), lambda: current_forward(forward.root) is forward)


def _readable(base: nn.Module, silent: list[str]) -> dict[int, str]:
    """The tensors of silent sites by identity, with the path of each; not those that others than the site have too."""
    holders: dict[int, set[int]] = {}
    owners: dict[int, str] = {}
    for module in base.modules():
        for tensor in module._parameters.values():
            holders.setdefault(id(tensor), set()).add(id(module))
    for path in silent:
        for module in base.get_submodule(path).modules():
            owners |= {id(tensor): path for tensor in module._parameters.values() if tensor is not None}
    return {number: path for number, path in owners.items() if len(holders.get(number, ())) == 1}


def note_run(forward: Forward, part: Part, call: Call) -> None:
    """Note that a part ran."""
    if forward.ran is None:
        return
    ran = forward.ran.setdefault((call.adapter, call.path), Ran())
    if torch.compiler.is_compiling():
        return
    unproven = get_adapter(forward.root, call.adapter).unproven
    if unproven is None or call.path not in unproven.unlearned:
        return
    ran.with_gradient = ran.with_gradient or torch.is_grad_enabled()
    unused = {id(tensor) for tensor in part.unused(call)}
    ran.tensors += [tensor for tensor in part.parameters() if id(tensor) not in unused]
    if part.own_module is None:
        ran.tensors += call.shared.parameters()


def end_proof(forward: Forward, model: nn.Module, output: object) -> None:
    """At the end of a forward: draw the conclusions. An exception on its way is an output of None."""
    read = (leave(model) or set()) if forward.watches else set()
    if forward.ran is None or output is None:
        return
    for name in forward.active:
        adapter = get_adapter(forward.root, name)
        ran = {path: ran for (other, path), ran in forward.ran.items() if other == name}
        if torch.compiler.is_compiling():
            if not adapter.ran_eagerly:
                _check_effect(forward, name, {path for path, _ in adapter.sites()}.difference(ran), _TRACED)
            continue
        adapter.ran_eagerly = True
        unproven = adapter.unproven
        if unproven is None:
            continue
        _check_effect(forward, name, unproven.silent.difference(ran) & read, _READ)
        unproven.silent = unproven.silent.difference(ran)
        unproven.watched.add(model.training)
        if torch.is_grad_enabled() and unproven.unlearned:
            _prove_learning(forward, adapter, name, ran, output)
        _settle(adapter)


def _settle(adapter: Adapter) -> None:
    if adapter.unproven is not None and not adapter.unproven.silent and not adapter.unproven.unlearned:
        adapter.unproven = None


def _check_effect(forward: Forward, name: str, paths: set[str], why: str) -> None:
    """Refuse parts of an adapter that have no effect."""
    silent = [(path, parts) for path, parts in get_adapter(forward.root, name).sites() if path in paths]
    if silent:
        path, parts = silent[0]
        kind = type(forward.root.base_model.get_submodule(path)).__name__
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        raise AdapterError(
            f"adapter '{name}': the {type(parts[0]).__name__} at '{path}'{more} had no effect, because that module "
            f"({kind}) was not called in the forward{why}. Leave it out with exclude_modules or modules_to_save, or "
            "adapt the module that is called"
        )


def _prove_learning(forward: Forward, adapter: Adapter, name: str, ran: Mapping[str, Ran], output: object) -> None:
    """Look if a gradient comes to what ran: now if this is train mode, else when a backward pass comes by."""
    results = [*(tensor for _, tensor in leaves(output)), *forward.losses]
    ends = {result.grad_fn for result in results if result.grad_fn is not None}
    if forward.root.base_model.training:
        if results:
            _warn_of_gradientless(adapter, name, ran, Graph(ends))
    elif ends:
        # The last end holds the hook, and nothing that the hook holds leads to it: nobody would free such a circle.
        last = max(ends, key=made_when)
        ahead = (ends - {last}) | sources(last)

        def begun(gradients: object) -> None:
            _warn_of_gradientless(adapter, name, ran, Graph(ahead))
            _settle(adapter)

        last.register_prehook(begun)


def _warn_of_gradientless(adapter: Adapter, name: str, ran: Mapping[str, Ran], graph: Graph) -> None:
    """Warn, once for each site, of trained tensors that ran in a forward and get no gradient from what it returned."""
    unproven = adapter.unproven
    open_sites = set() if unproven is None else unproven.unlearned.intersection(ran)
    trained = {path: [t for t in ran[path].tensors if t.requires_grad] for path in open_sites}
    trained = {path: tensors for path, tensors in trained.items() if tensors or not ran[path].tensors}
    if unproven is None or not any(trained.values()):
        return
    # What the reentrant kind of checkpointing runs is not in the graph until the backward pass.
    hidden = {id(t) for path, own in trained.items() if graph.replays and not ran[path].with_gradient for t in own}
    missed = {path: [t for t in own if id(t) not in hidden and not graph.reaches(t)] for path, own in trained.items()}
    cut = {path for path, own in missed.items() if own and not ran[path].with_gradient}
    lost = {path for path, own in missed.items() if own} - cut
    unproven.patience -= 1
    if unproven.patience > 0 and len(ran) < len(adapter.parts):
        trained, lost = {path: own for path, own in trained.items() if path not in lost}, set()
    unproven.unlearned = unproven.unlearned.difference(trained)
    for paths, why in (
        (cut, "ran under torch.no_grad() or in inference mode: call the module that holds them with gradients enabled"),
        (
            lost,
            "ran, but what they gave was detached on its way to what the model returns, as by .detach(), .data or "
            "torch.no_grad(), or did not go there",
        ),
    ):
        if paths:
            tensors = {id(tensor) for path in paths for tensor in missed[path]}
            warnings.warn(_no_gradient(adapter, name, paths, tensors, why), stacklevel=2)


def _no_gradient(adapter: Adapter, name: str, paths: set[str], tensors: set[int], why: str) -> str:
    sites = [path for path, _ in adapter.sites() if path in paths]
    trained: list[Tensor] = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    where = f"'{sites[0]}'" if len(sites) == 1 else f"'{sites[0]}' to '{sites[-1]}' ({len(sites)} modules)"
    return (
        f"adapter '{name}': {len(tensors)} of {len(trained)} trained tensors get no gradient, so they do not learn: "
        f"the parts at {where} {why}"
    )
