"""The tables of the page, one for a quantity, with the aims for their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tools.methods import FULL, PLAIN, VARIANTS, Row

LORA = Row(method="LORA", variant="qkv")
POINT_PEFT = Row(method="POINT_PEFT")
PAPER = Row(method="POINT_PEFT", variant="of the paper", fields=VARIANTS["POINT_PEFT"]["of the paper"])
ADAPTFORMER = Row(method="BOTTLENECK", variant="adaptformer", fields={"placement": "adaptformer"})
VPT = Row(method="VPT", variant="deep")
HEADLINE = (POINT_PEFT, PAPER, LORA, ADAPTFORMER, VPT)
"""What is measured on the published class, and most often on the reference encoder."""

OURS, THEIRS = "point_peft", "PEFT"
WITH_BANK = Row(method="POINT_PEFT", variant="with a bank of 11,392 clouds", fields={"memory_bank": True})


def loaded(count: int) -> str:
    """A row of the table of adapters."""
    return f"{count} loaded"


@dataclass(frozen=True, kw_only=True)
class Table:
    """One quantity of several subjects."""

    name: str
    """As measures have it."""
    caption: str
    reference: str = ""
    """What the ratios are of; empty: there are none."""
    unit: Literal["s", "bytes"] = "s"
    sizes: str = ""
    """What sizes are varied: then they are the columns."""
    aims: Mapping[str, float] = field(default_factory=dict)
    """Row -> the largest ratio that was aimed at."""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Tables that belong together."""

    title: str
    text: str
    tables: Sequence[Table]


STEP = "Training step: forward, backward and update by AdamW"
FORWARD = "Inference: a forward in eval mode, not merged"

CHAPTERS: Sequence[Chapter] = (
    Chapter(
        title="A published class, adapted, beside itself plain",
        text="What a user has: the class of torch-pointcloud as it is, with an adapter beside the very same class "
        "without one. pyg-lib, whose sampling and neighbours it calls, is not on PyPI: functions of torch stand in "
        "for both, on either side of each ratio.",
        tables=(
            Table(name="published training", caption=STEP, reference=FULL, aims={POINT_PEFT.label: 0.60}),
            Table(name="published inference", caption=FORWARD, reference=PLAIN, aims={POINT_PEFT.label: 1.20}),
            Table(name="published memory", caption="Peak memory of training", reference=FULL, unit="bytes"),
        ),
    ),
    Chapter(
        title="The reference encoder, all methods",
        text="point_peft's own form of Point-MAE computes the same from the same tensors in less time than the "
        "published class, so it is a stronger base to be compared with: these ratios are of it alone. Memory is the "
        "most that torch's allocator had handed out at once in two training steps of a model on its own, from its "
        "making on: weights, gradients, the optimizer's state, activations and what an operation needs for itself. It "
        "is counted, not sampled: on a CPU by `torch.profiler`, on a GPU by `torch.cuda.max_memory_allocated`.",
        tables=(
            Table(name="training", caption=STEP, reference=FULL, aims={POINT_PEFT.label: 0.60}),
            Table(name="inference", caption=FORWARD, reference=PLAIN, aims={POINT_PEFT.label: 1.20}),
            Table(
                name="memory",
                caption="Peak memory of training",
                reference=FULL,
                unit="bytes",
                aims={POINT_PEFT.label: 0.45},
            ),
            Table(
                name="file",
                caption="`adapter_model.safetensors`, with the adapter's head and without a bank unless it is named, "
                "beside a safetensors file of the whole backbone",
                reference="frozen backbone",
                unit="bytes",
                aims={POINT_PEFT.label: 0.025, WITH_BANK.label: 0.05},
            ),
        ),
    ),
    Chapter(
        title="Scenes",
        text="One scene, 100,000 points in a full run, on a packed encoder and decoder with the layout of Pointcept's "
        "PTv3 (tests/zoo/pointcept.py): each registered method that adapts it with the head trained, in its default "
        "configuration (POINT_PEFT without prompts, which have no place there), and full fine-tuning. Memory is that "
        "of one step, the making of the model included.",
        tables=(
            Table(name="scene training", caption=STEP, reference="LORA", aims={"POINT_GST": 1.30}),
            Table(name="scene memory", caption="Peak memory of training", reference="LORA", unit="bytes"),
        ),
    ),
    Chapter(
        title="Beside PEFT",
        text="LoRA of rank 8 on the `qkv` of every block of the reference encoder, without a head, in both libraries; "
        "they take turns. `get_peft_model` and `from_pretrained` get a fresh backbone each time, the others a model"
        " that has adapters. `disable_adapter` is entered and left.",
        tables=(
            Table(
                name="peft",
                caption="Handling of adapters",
                reference=THEIRS,
                aims={
                    "get_peft_model": 1.0,
                    "from_pretrained": 1.0,
                    "add_adapter": 1.0,
                    "load_adapter": 1.0,
                    "set_adapter": 0.2,
                    "disable_adapter": 0.2,
                },
            ),
        ),
    ),
    Chapter(
        title="Mixed batches and tasks",
        text="`model(x, adapter_names=[...])` gives the samples of a batch to several adapters in equal shares; alone, "
        "each share is a batch of its own. `model.forward_tasks(x, [...])` gives every sample to all of them; "
        "alone, that takes a forward of the whole batch each.",
        tables=(Table(name="tasks", caption="Inference for several adapters", reference="each alone"),),
    ),
    Chapter(
        title="Scale",
        text="Of the reference encoder. Of the adapters, one LoRA is active, the others, of all methods in turn, are "
        "only loaded. Retrieval is for a batch of queries.",
        tables=(
            Table(name="points", caption="Inference over points in a cloud", sizes="points"),
            Table(name="tokens", caption="Inference over tokens of the backbone", sizes="tokens"),
            Table(
                name="adapters", caption="Inference with adapters loaded", reference="with one", aims={loaded(20): 1.05}
            ),
            Table(name="swap", caption="`set_adapter` with adapters loaded", sizes="adapters"),
            Table(name="retrieval", caption="Retrieval from a memory bank", sizes="rows"),
            Table(
                name="retrieval memory", caption="Peak memory of retrieval, bank included", sizes="rows", unit="bytes"
            ),
        ),
    ),
)
