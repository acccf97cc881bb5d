"""Training the prefix tokens of a backbone (CLS and the like) and their positions."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from point_peft.anatomy.description import PrefixParameter, Stage
from point_peft.errors import AdapterError
from point_peft.matching import match_names
from point_peft.parts.backbone import Backbone, Names
from point_peft.parts.base import Blueprint, Call, Part, SharedState
from point_peft.running.nested import Args, Kwargs, put_argument
from point_peft.running.tokens import block_tokens, shift_rows


def tune_prefix(plan: Blueprint, backbone: Backbone, method: str, names: Names, *, keep_base: bool = False) -> None:
    """Add to a method's plan that the backbone's prefix tokens and positions are trained: all, or those of `names`.

    What an earlier method of the adapter trains is trained by that one. `keep_base` keeps the values of the base too.
    """
    anatomy = backbone.known_anatomy(method)
    parameters = anatomy.prefix_parameters
    if names is not None:
        known = [parameter.name for parameter in parameters]
        chosen = match_names(names, known, what="prefix parameter", field="tuned_tokens")
        parameters = tuple(parameter for parameter in parameters if parameter.name in chosen)
    values = {parameter.name: backbone.model.get_parameter(parameter.name) for parameter in parameters}
    tuned = {name: value for name, value in values.items() if name not in backbone.tuned_tokens}
    kept = values if keep_base else {}
    if not tuned and not kept:
        return
    plan.shared["tokens"] = TunedTokens(tuned, kept)
    # They act before the method's other parts do: prompts do not count among the prefix then.
    plan.parts[:0] = _shifts(parameters, anatomy.stages[0], restores=False)


def keep_prefix(plan: Blueprint, backbone: Backbone, method: str) -> None:
    """Add to a method's plan that the backbone's prefix tokens and positions stay those that it has now.

    For a method that leaves the first blocks as they are, and so trains none of them there.
    """
    anatomy = backbone.known_anatomy(method)
    parameters = anatomy.prefix_parameters
    if parameters:
        values = {parameter.name: backbone.model.get_parameter(parameter.name) for parameter in parameters}
        plan.shared["tokens"] = TunedTokens({}, values)
        plan.parts += _shifts(parameters, anatomy.stages[0], restores=True)


class TunedTokens(SharedState):
    """Trained copies of prefix tokens and positions (1, rows, c) of the base, by their names there.

    A checkpoint may lack them, and then they are other random numbers in every process. So the values that the base had
    may be kept as well: then what the frozen backbone makes of a cloud is the same everywhere.
    """

    prefix = "point_peft.base"

    def __init__(self, tuned: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        super().__init__()
        # A parameter's name may not hold a dot.
        for name, tensor in tuned.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor.detach().clone()))
        for name, tensor in kept.items():
            self.register_buffer("base:" + name.replace(".", "/"), tensor.detach().clone())
        self.tuned_tokens = frozenset(tuned)
        self.token_parameters = frozenset(name.replace(".", "/") for name in tuned)
        self.kept_tokens = frozenset(kept)
        self.compared: tuple[tuple[int, int], ...] = ()
        """Where the tensors lay, and how often each had been written to, when they were last compared."""
        self.differs = False

    def file_name(self, name: str) -> str:
        known = name.replace("/", ".").removeprefix("base:")
        return f"{self.prefix}.{known}" if name.startswith("base:") and known in self.trained_tokens else known

    def other_base(self, base_model: nn.Module) -> bool:
        """Tell whether the base had other values here, which are kept; without stopping a GPU each time."""
        if torch.compiler.is_compiling():
            return self.differs
        names = [name.removeprefix("base:").replace("/", ".") for name, _ in self.named_buffers()]
        pairs = list(zip(self.buffers(), [_tensor(base_model, name) for name in names], strict=True))
        places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for pair in pairs for t in pair)
        if places != self.compared:
            self.differs = any(bool((kept != base).any()) for kept, base in pairs)
            self.compared = places
        return self.differs

    def check(self, base_model: nn.Module) -> None:
        """Compare anew: the tensors have been read from a file, perhaps into the places of others."""
        self.compared = ()
        self.other_base(base_model)

    def difference(self, name: str, base_model: nn.Module, *, kept: bool) -> Tensor:
        """The change (rows, c) that training has made to the base's tensor of that name.

        Of a `kept` one, the value in the base that the adapter was made for less that in this one.
        """
        value: Tensor = getattr(self, ("base:" if kept else "") + name.replace(".", "/"))
        return (value - _tensor(base_model, name)).reshape(-1, value.shape[-1])


def less_positions(prefix: Tensor, positions: Sequence[PrefixParameter], call: Call) -> Tensor:
    """Prefix tokens (b, e, c), as the first block gets them, without the positions that were added to them.

    Of a position that another method trains, that of the base is taken away.
    """
    state = call.state("tokens", TunedTokens) if "tokens" in call.shared else None
    for parameter in positions:
        value = _tensor(call.forward.root.base_model, parameter.name)
        if state is not None and parameter.name in state.tuned_tokens:
            value = getattr(state, parameter.name.replace(".", "/"))
        prefix = shift_rows(prefix, -value.reshape(-1, value.shape[-1]), parameter.row, "bgc")
    return prefix


def _tensor(base_model: nn.Module, name: str) -> Tensor:
    """A tensor by its dotted name; those of DataParallel's replicas are no parameters."""
    path, _, own = name.rpartition(".")
    tensor: Tensor = getattr(base_model.get_submodule(path), own)
    return tensor


class PrefixPart(Part):
    """Adds what training has changed of prefix tokens and positions to the tokens that a block gets.

    In the second pass it adds what the base that the adapter was made for had there more than this one. Where it
    `restores`, it does so in the forward too, and nothing is trained.
    """

    in_second_pass = True

    def __init__(self, parameters: tuple[PrefixParameter, ...], stage: Stage, *, restores: bool) -> None:
        super().__init__()
        self.restores = restores
        self.parameters_of_prefix = parameters
        self.stage = stage

    def before(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.restores and not call.state("tokens", TunedTokens).other_base(call.forward.root.base_model):
            return args, kwargs
        return self._shifted(call, args, kwargs, kept=self.restores)

    def before_second(self, call: Call, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return self._shifted(call, args, kwargs, kept=True)

    def _shifted(self, call: Call, args: Args, kwargs: Kwargs, *, kept: bool) -> tuple[Args, Kwargs]:
        state = call.state("tokens", TunedTokens)
        names = state.kept_tokens if kept else state.tuned_tokens
        if kept and call.forward.second.owner is None:  # of the forward: what is trained has been put in its place
            names = names - state.trained_tokens
        tokens = block_tokens(self.stage, call.path, args, kwargs)
        later = self._called_before(call)
        for parameter in self.parameters_of_prefix:
            once = parameter.role == "token" or self.stage.position == "once"
            if parameter.name in names and not (later and once):
                shift = state.difference(parameter.name, call.forward.root.base_model, kept=kept)
                tokens = shift_rows(tokens, shift, parameter.row, self.stage.layout)
        return put_argument(args, kwargs, self.stage.tokens, tokens)

    def _called_before(self, call: Call) -> bool:
        """Count the calls of this block in the forward; true if it ran before, as one used for several layers does."""
        key = self.key(call, call.path)
        if call.forward.recomputing:
            if call.forward.calls[key] > 1:
                raise AdapterError(
                    f"block '{call.path}' runs several times in a forward, and checkpointing runs it again: which of "
                    "its runs that is cannot be told, so its prefix tokens cannot be tuned; set tuned_tokens=[]"
                )
            return False
        call.forward.calls[key] += 1
        return call.forward.calls[key] > 1


def _shifts(parameters: tuple[PrefixParameter, ...], stage: Stage, *, restores: bool) -> list[tuple[str, PrefixPart]]:
    """The parts that change prefix tokens and positions, with their sites.

    A token is added once, before the first block; a position before every block, where the backbone does so.
    """
    parts = []
    for number, block in enumerate(stage.blocks):
        added = parameters if number == 0 else tuple(p for p in parameters if p.role == "position")
        if added and (number == 0 or stage.position == "every_block"):
            parts.append((block.path, PrefixPart(added, stage, restores=restores)))
    return parts
