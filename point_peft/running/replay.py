"""Gradient checkpointing runs a part of the model again in the backward pass, and this says which forward that is.

A forward of an adapted model has a record, `Forward`, which hooks find in a context variable. It is set when the
model's forward begins and taken away when that ends. Checkpointing (`torch.utils.checkpoint`) drops the activations
of a block and, when the backward pass comes to it, calls the block once more. By then

- the forward is over, and its record is not in the context variable any more, or there is another one in it, of a later
  forward of the same model;
- it may run on another thread: autograd works off a CUDA device's part of the graph on a thread of its own, where
  context variables hold nothing;
- several backward passes may run at once, on as many threads.

So the record has to be found in another way, and the hooks of the block must act as they did the first time: the same
adapters, prompts, coordinates and prior.

**Finding it.** The outputs of a forward carry a mark in the autograd graph, a pre-hook of their gradient function
(`mark`). The backward pass comes through it before it comes to any block, since outputs are last, and notes on its
own thread which forward it is in (`_Resume`). A hook that runs then asks `resumed`. A mark is the only thing that
keeps the record alive after the forward; when the graph is freed, so is the record. The note on the thread is a weak
reference.

**Telling a replay from a forward.** Autograd numbers backward passes, and a thread knows the number of the one that
it is in, -1 outside of any (`graph_task`). A forward notes the number under which it began. When a hook sees another,
what runs is a replay (`Forward.recomputing`). Numbers and not a flag, because a model may run a whole forward of its
own in somebody's backward pass: reentrant checkpointing of a larger model does.

**What a replay does not do twice** stands where it is done: `Handover.take`, `Forward.add_loss`, `Forward.once`, and
the random numbers of a second pass.

**Direct calls** of a submodule have no end of the model's forward; the outputs of adapted modules are marked instead
(`after_parts`). A forward that runs under `torch.compile` is traced with its backward pass and needs none of this.
"""

import threading
import weakref
from typing import Any

import torch

from point_peft.running.activation import Key
from point_peft.running.nested import leaves

_backward = threading.local()


class _Resume:
    """A mark in the autograd graph: whoever runs the backward pass through here is in this forward."""

    def __init__(self, key: Key, forward: object) -> None:
        self.key = key
        self.forward = forward

    def __call__(self, gradients: Any) -> None:
        if not isinstance(getattr(_backward, "forwards", None), weakref.WeakKeyDictionary):
            _backward.forwards = weakref.WeakKeyDictionary()
        _backward.forwards[self.key] = weakref.ref(self.forward)


def mark(key: Key, forward: object, outputs: Any) -> None:
    """Mark the tensors of an output, nested as they may be, as results of this forward of a model."""
    if torch.compiler.is_compiling():
        return
    for _, tensor in leaves(outputs):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(_Resume(key, forward))


def resumed(key: Key) -> Any:
    """The record of the forward of a model whose backward pass has come to this thread, None if there is none."""
    reference = getattr(_backward, "forwards", {}).get(key)
    return None if reference is None else reference()
