"""The arguments of the model as its adapters take them, and as the backbone takes them."""

from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.errors import AdapterError
from point_peft.parts.base import SharedState
from point_peft.running.forward import Forward
from point_peft.running.nested import Args, Kwargs
from point_peft.running.second import Start


def fit_inputs(forward: Forward) -> tuple[Args, Kwargs]:
    """The arguments that the backbone gets in a forward of the model that has just been opened."""
    assert forward.inputs is not None
    states = [state for name in forward.active for state in fitting_states(get_adapter(forward.root, name))]
    if not states:
        return forward.inputs
    if any(state.takes != states[0].takes for state in states):
        raise AdapterError(
            f"the active adapters {', '.join(map(repr, forward.active))} take clouds of other columns than each other: "
            "activate one, or call the model for each"
        )
    around = None if forward.parent is None else forward.parent.given
    forward.given = forward.inputs if around is None else around  # a method of the model that calls it has fitted them
    if around is None:
        forward.inputs = states[0].fit(*forward.inputs)
        forward.second.start = Start.of("", *forward.inputs)
    return forward.inputs


def fitting_states(adapter: Adapter) -> list[SharedState]:
    """The states of an adapter that change the arguments of the model."""
    return [state for state in adapter.shared_states() if state.takes is not None]


def fitted(adapter: Adapter, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments that the backbone gets of those that an adapter takes."""
    for state in fitting_states(adapter)[:1]:
        args, kwargs = state.fit(args, kwargs)
    return args, kwargs
