"""The pages of the API reference: which names each has. mkdocstrings writes them from signatures and docstrings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import point_peft
from point_peft import METHODS, backbones, geometry

FOLDER = "api"


@dataclass(frozen=True)
class Page:
    """A page of the reference."""

    file: str
    title: str
    text: str
    names: Mapping[str, Sequence[str]]
    """Module -> names in it, in the order of the page."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of mkdocstrings for all of them."""

    @property
    def place(self) -> str:
        """The file's path below docs/, as that of a page that is there."""
        return f"{FOLDER}/{self.file}.md"

    def identifiers(self) -> Iterator[str]:
        """The full names."""
        return (f"{module}.{name}" for module, names in self.names.items() for name in names)

    def markdown(self) -> str:
        """The page before mkdocstrings has seen it."""
        options = [f"      {key}: {value}" for key, value in self.options.items()]
        lines = [f"# {self.title}", "", self.text]
        for module, names in self.names.items():
            lines += ["", f"## {module}"]
            for name in names:
                lines += ["", f"::: {module}.{name}", *(["    options:", *options] if options else [])]
        return "\n".join(lines) + "\n"


def _configurations() -> list[str]:
    ours = vars(point_peft)
    return sorted(config.__name__ for config in METHODS.values() if ours.get(config.__name__) is config)


PAGES = [
    Page(
        "model",
        "Adapting a model",
        "From a backbone to an adapted model, and everything that can be done with one.",
        {
            "point_peft": [
                "get_peft_model",
                "inject_adapter",
                "describe",
                "PointPeftModel",
                "initialise",
                "extract",
                "convert_to_lora",
            ],
            "point_peft.status": ["ModelStatus", "LayerStatus"],
        },
        {"inherited_members": "true"},
    ),
    Page(
        "configurations",
        "Configurations",
        "An adapter's configuration is a `PeftConfig`, which has one configuration of a method or several. What they "
        "have in common is in `TunerConfig`; each method's own fields are on [the page of the methods](methods.md).",
        {"point_peft": ["PeftConfig", "TunerConfig", "METHODS"], "point_peft.config": ["Combination"]},
    ),
    Page(
        "methods",
        "Configurations of the methods",
        "One class a method, each with the fields of [`TunerConfig`][point_peft.TunerConfig] besides its own. Figures, "
        "equations and deviations are on the [pages of the methods](../methods/README.md).",
        {"point_peft": _configurations()},
        {"filters": '["!^_", "!^(build|method|peft_type|adapts_columns|earlier|combines|combined)$"]'},
    ),
    Page(
        "training",
        "Training",
        "One function trains whatever of a model requires a gradient; [Your own data](../your_data.md) shows it.",
        {
            "point_peft.training": ["fit", "Recipe", "Run", "compare", "Comparison"],
            "point_peft.training.opening": ["open_run", "clouds_of"],
            "point_peft.profiles": [
                "per_point",
                "linear_probe",
                "decoder_probe",
                "adapter",
                "adapter_with_decoder",
                "full",
            ],
        },
    ),
    Page(
        "data",
        "Data",
        "From files to samples.",
        {
            "point_peft.data.opening": ["open_data"],
            "point_peft.data.options": ["DataOptions"],
            "point_peft.data.preparing": ["Preparation", "Prepared", "prepare"],
            "point_peft.data.reading": ["read_cloud"],
            "point_peft.data.cloud": ["Cloud", "Sample", "CloudBatch"],
            "point_peft.data.cloud_set": ["CloudSet", "collate"],
        },
    ),
    Page(
        "backbones",
        "Backbones and heads",
        "Reference backbones, with the tensor names of official checkpoints, the anatomy of any backbone, and heads.",
        {
            "point_peft.backbones": backbones.__all__,
            "point_peft": ["Anatomy"],
            "point_peft.anatomy": ["Block", "Stage", "PrefixParameter", "Read", "Tap"],
            "point_peft.heads": ["mlp_head", "PooledHead", "POOLS"],
        },
    ),
    Page(
        "library",
        "Libraries and the Hub",
        "Many adapters as if they were in the model, what the Hub has, and the bridge to the PEFT package.",
        {
            "point_peft": ["AdapterLibrary", "LibraryEntry", "LibraryStatus", "list_adapters"],
            "point_peft.integrations.peft": ["wrap"],
        },
    ),
    Page(
        "geometry",
        "Geometry",
        "Batched functions on point clouds; each cloud of a batch is treated on its own.",
        {"point_peft.geometry": geometry.__all__},
    ),
    Page(
        "parts",
        "For authors of methods",
        "A method is a [`TunerConfig`][point_peft.TunerConfig] that builds parts for the sites of a backbone. "
        "[Contributing](../contributing.md#a-new-method) says where each piece goes.",
        {
            "point_peft.parts.base": ["Part", "Call", "Blueprint", "SharedState", "Narrow"],
            "point_peft.parts.backbone": ["Backbone"],
            "point_peft.parts.sequence": ["SequencePart", "BlockTokens", "EntrancePart", "LastingPrompts"],
        },
    ),
    Page(
        "errors",
        "Errors",
        "Every error that is raised on purpose is a `ValueError`, so that a caller may catch that alone.",
        {
            "point_peft": [
                "PointPeftError",
                "MatchError",
                "AnatomyError",
                "AdapterError",
                "AdapterFileError",
                "DataError",
                "HubError",
            ]
        },
    ),
]


def identifiers() -> list[str]:
    """The full names of everything in the reference."""
    return [name for page in PAGES for name in page.identifiers()]
