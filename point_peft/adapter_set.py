"""The adapters of a model: one door to adding, activating, training, merging, saving and removing them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from point_peft import routing, status
from point_peft.adapting import adding, mixed, second_pass
from point_peft.adapting.adapter import Adapter, get_adapter
from point_peft.adapting.adding import all_adapters, backbone_for, check_unmerged, meant_adapters, single_adapter
from point_peft.adapting.combining import combine
from point_peft.adapting.heads import Heads, HeadSource, warn_of_frozen_heads
from point_peft.adapting.mixed import choosing
from point_peft.adapting.planning import build_adapter
from point_peft.adapting.proving import warn_of_silent
from point_peft.adapting.site import backbone_modules
from point_peft.adapting.weights import folded, overwrite_weights
from point_peft.anatomy.description import Anatomy
from point_peft.bank import build_banks, fill_bank
from point_peft.config import Combination, CombinationType, MajoritySign, PeftConfig, TunerConfig
from point_peft.errors import AdapterError, AnatomyError
from point_peft.files.loading import Stated, read_stated, restore_adapter, swap_values
from point_peft.files.saving import Format, save_adapters
from point_peft.hub.card import card_of, for_repository
from point_peft.hub.pulling import Place, Token, check_names, folder_of
from point_peft.hub.pushing import Upload, files_below, push
from point_peft.parameter_groups import Rates, adapter_groups
from point_peft.running.activation import Key, active_adapters
from point_peft.running.forward import Forward, auxiliary_loss
from point_peft.running.nested import Args, call_arguments
from point_peft.status import LayerStatus, ModelStatus
from point_peft.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self


class AdapterSet(nn.Module):
    """The adapters of one backbone and everything that can be done with them.

    `PointPeftModel` is one that also owns its backbone. A model that keeps its own class (`inject_adapter`) holds one
    as its child `point_peft`. Examples in here go on with the `model` and the `clouds` of the one of `get_peft_model`.
    """

    base_model: nn.Module
    anatomy: Anatomy | None
    """None where no preset fits and nothing was traced; then no method that needs it can be added."""

    def __init__(self, model: nn.Module, anatomy: Anatomy | AnatomyError) -> None:
        super().__init__()
        self._hold(model)
        self.adapters = nn.ModuleDict()
        self.key = Key()
        self.default = ()
        self.traced: Forward | None = None
        self.losses: tuple[Tensor, ...] = ()
        self.anatomy = None if isinstance(anatomy, AnatomyError) else anatomy
        self.why_unknown = str(anatomy) if isinstance(anatomy, AnatomyError) else ""
        self.merged: dict[str, dict[str, Tensor]] = {}
        """Merged adapter -> the base's tensors as they were, by name."""
        self.frozen: adding.Frozen | None = None
        self.training = model.training
        self.register_load_state_dict_post_hook(adding.compare_with_base)  # type: ignore[no-untyped-call]

    @property
    def default(self) -> tuple[str, ...]:
        """The adapters that are active in every thread or task that has not chosen for itself."""
        return self._default

    @default.setter
    def default(self, names: tuple[str, ...]) -> None:
        self._default = names
        # What is compiled finds the active adapters by their place: by name, it would be compiled again for each.
        self.slots: dict[str, nn.Module] = {str(i): get_adapter(self, name) for i, name in enumerate(names)}

    def _hold(self, model: nn.Module) -> None:
        self.__dict__["base_model"] = model  # not as a child: the model holds this module

    def backbone_tokens(self, forward: Forward, source: str, adapter: str) -> Tensor:
        """Patch tokens (b, g, c) of the frozen backbone without adapters, see `second_pass.backbone_tokens`."""
        return second_pass.backbone_tokens(self, forward, source, adapter)

    def _replicate_for_data_parallel(self) -> Self:
        replicated: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replicated.default = self.active_adapters  # replicas run on threads of their own
        return replicated

    def get_base_model(self) -> nn.Module:
        """The backbone itself."""
        return self.base_model

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode of adapters and backbone; the backbone's running statistics never move."""
        super().train(mode)
        if self.frozen is not None:
            adding.hold_norms(self, self.frozen, mode)
        return self

    # ---- adding and removing ----

    def add_adapter(
        self,
        adapter_name: str,
        config: TunerConfig | PeftConfig,
        *,
        heads: Mapping[str, HeadSource] | None = None,
        memory_bank: Tensor | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter beside the others; it is trainable and, unless it is the first, not active.

        `heads` gives it heads of its own shape: module name -> module, or a function that makes one. What is trained is
        float32 where the base is in half precision, or with `autocast_adapter_dtype=False` in the base's type.
        On any error the model is as it was.

        >>> from point_peft import BitFitConfig
        >>> model.add_adapter("biases", BitFitConfig())
        >>> model.set_adapter("biases")
        """
        self._check_new(adapter_name)
        config = PeftConfig.of(config)
        backbone = backbone_for(self, config)
        adapter = build_adapter(backbone, config, heads, widen=autocast_adapter_dtype)
        fill_bank(adapter, adapter_name, memory_bank)
        warn_of_frozen_heads(backbone.anatomy, self.base_model, adapter)
        adding.attach_adapter(self, adapter_name, adapter)

    def _check_new(self, name: str) -> None:
        adding.check_new_name(self.adapters, name)
        check_unmerged(self.merged, "adapters cannot be added")

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: CombinationType = "svd",
        svd_rank: int | None = None,
        *,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add a LoRA adapter that combines others at the same layers, as `config.Combination` says for each type.

        Weights may be negative. Modules of their own (heads) must be equal, since these do not add up. The new adapter
        is frozen and not active. On any error the model is as it was.
        """
        self._check_new(adapter_name)
        chosen = meant_adapters(self.adapters, adapters)
        how = Combination(combination_type, svd_rank, density, majority_sign_method)
        adding.attach_adapter(self, adapter_name, combine(chosen, weights, how, partial(backbone_for, self)))

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, also from those that are active, and let go of what this thread or task used it for."""
        adding.named_adapter(self.adapters, adapter_name)
        check_unmerged(self.merged, "adapters cannot be deleted")
        adding.detach_adapter(self, adapter_name)

    def unload(self) -> nn.Module:
        """Take all adapters off and return the backbone as it was: hooks, requires_grad and train flags too."""
        check_unmerged(self.merged, "the model cannot be unloaded")
        return adding.detach_all(self)

    # ---- activation ----

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The adapters that a forward started here uses, in the order in which they act."""
        return tuple(name for name in active_adapters(self) if name in self.adapters._modules)

    @property
    def active_adapter(self) -> str | tuple[str, ...]:
        """The name of the active adapter, or all names if there are several or none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or several in this order, the active ones.

        It holds for this thread or task, and for every other that has not chosen for itself. What is trained does not
        change; see `train_adapter`.
        """
        adding.activate(self, self._to_activate(adapter_name))

    def _to_activate(self, adapter_name: str | Sequence[str]) -> tuple[str, ...]:
        names = tuple(meant_adapters(self.adapters, adapter_name))
        check_unmerged(self.merged, "the active adapters cannot be changed")
        return names

    @contextmanager
    def use_adapter(self, adapter_name: str | Sequence[str]) -> Iterator[None]:
        """Within the block, and only in this thread or task, these adapters are active.

        Code compiled with `torch.compile` follows `set_adapter` and does not see this.
        """
        with choosing(self, self._to_activate(adapter_name)):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block, and only in this thread or task, the model is the plain backbone."""
        with self.use_adapter(()):
            yield

    # ---- several adapters in one call ----

    def forward_tasks(self, inputs: Any, tasks: Sequence[str | None]) -> dict[str | None, Any]:
        """The outputs of several adapters for the same inputs, by name; None is the plain backbone.

        `inputs` is a tensor, a tuple of positional or a dict of named arguments of the model. What the frozen backbone
        computes for all of them alike, its stem and the second pass for priors, is computed once.

        >>> from point_peft import BitFitConfig
        >>> model.add_adapter("biases", BitFitConfig())
        >>> {task: tuple(logits.shape) for task, logits in model.forward_tasks(clouds, ["default", "biases"]).items()}
        {'default': (4, 15), 'biases': (4, 15)}
        """
        check_unmerged(self.merged, "adapters cannot take turns")
        return mixed.forward_tasks(self, *call_arguments(inputs), adding.task_names(self.adapters, tasks))

    def route(self, points: Any, adapters: Sequence[str] | None = None) -> tuple[tuple[str | None, ...], Tensor]:
        """For each sample the adapter, of those that have a bank, that it fits best, or None; scores (b, adapters).

        A typical row of an adapter's memory bank scores 1, and below 0 a sample fits none. See `point_peft.routing`.
        """
        check_unmerged(self.merged, "clouds cannot be routed")
        return routing.route(self, *call_arguments(points), adapters)

    def forward_mixed(self, args: Args, kwargs: Mapping[str, Any], adapter_names: Sequence[str | None] | str) -> Any:
        """The output for a batch, each sample with its own adapter; None is the plain backbone, "auto" asks `route`.

        Each output equals that of its adapter alone. A model that draws random numbers, as for the serial orders of
        points, draws the same for every adapter, those that come next: what it draws for each sample is not alike.
        Adapters run one after another, each on its samples; the stem runs once, for the whole batch, and the second
        pass for priors once, for the samples that have one. Outputs that do not fit together, as those of heads of
        different widths, are a list: for each sample what the model gives for it alone.
        """
        check_unmerged(self.merged, "adapters cannot take turns")
        return routing.forward_by_name(self, args, dict(kwargs), adapter_names)

    # ---- what is trained, and how things stand ----

    def train_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let the parameters of these adapters be trained."""
        for adapter in meant_adapters(self.adapters, adapter_name).values():
            adapter.requires_grad_(True)

    def freeze_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Keep the parameters of these adapters as they are."""
        for adapter in meant_adapters(self.adapters, adapter_name).values():
            adapter.requires_grad_(False)

    def parameter_groups(
        self, lr: float, *, head_lr: float | None = None, prompt_lr: float | None = None, weight_decay: float = 0.05
    ) -> list[dict[str, Any]]:
        """Groups of the trainable parameters for an optimizer of torch; rates that are None are `lr`.

        Heads, and other modules that are saved whole, learn at `head_lr`, prompts, their coordinates and prefix tokens
        at `prompt_lr`. These tokens, norms, biases and gates have no weight decay. A group's `name` says what is in it.

        >>> optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, head_lr=5e-4))
        """
        rates = Rates(lr=lr, head_lr=head_lr, prompt_lr=prompt_lr, weight_decay=weight_decay)
        return adapter_groups(self.base_model, all_adapters(self.adapters).values(), self.anatomy, rates)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters of the model, adapters included."""
        return status.count_parameters(self.base_model, all_adapters(self.adapters))

    def print_trainable_parameters(self) -> None:
        """Print the trainable parameters of each adapter by part, and their share of the model's."""
        print(self.trainable_parameters_report())

    def trainable_parameters_report(self) -> str:
        """The table of `print_trainable_parameters`; it ends with methods' choices and what is frozen and unfilled."""
        return status.trainable_parameters_report(self.base_model, all_adapters(self.adapters), self.anatomy)

    def get_layer_status(self) -> list[LayerStatus]:
        """One row for every module of the backbone that something is attached to."""
        return status.layer_status(*self._state())

    def get_model_status(self) -> ModelStatus:
        """The state of the model as a whole."""
        return status.model_status(*self._state())

    def _state(self) -> tuple[nn.Module, dict[str, Adapter], tuple[str, ...], tuple[str, ...]]:
        return self.base_model, all_adapters(self.adapters), self.active_adapters, self.merged_adapters

    def auxiliary_loss(self) -> Tensor:
        """The sum of what methods added to the training loss in this thread's or task's last forward, 0 if nothing.

        All active adapters count, by the weights of their configurations; threads of `DataParallel` are not seen here.
        """
        return auxiliary_loss(self)

    # ---- merging ----

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """The adapters that are folded into the backbone's weights."""
        return tuple(self.merged)

    def merge(self, adapter_name: str | None = None) -> None:
        """Fold an adapter (default: the active one) into the backbone's weights; `unmerge` restores them exactly.

        An error names what cannot be merged, and leaves everything as it was.
        """
        check_unmerged(self.merged, "no second adapter can be merged")
        name, adapter = single_adapter(self.adapters, self.active_adapters, adapter_name)
        self.merged = {name: overwrite_weights(self.base_model, folded(self.base_model, name, adapter))}
        adding.activate(self, ())

    def unmerge(self) -> None:
        """Take the merged adapter out of the backbone's weights, which are again what they were; it is active again."""
        if not self.merged:
            raise AdapterError("no adapter is merged")
        ((name, values),) = self.merged.items()
        overwrite_weights(self.base_model, values)
        self.merged = {}
        adding.activate(self, (name,))

    def merge_and_unload(self, adapter_name: str | None = None) -> nn.Module:
        """Return the backbone without hooks, an adapter in it for good: in its weights, its heads in their places."""
        check_unmerged(self.merged, "no second adapter can be merged")
        return adding.merge_for_good(self, *single_adapter(self.adapters, self.active_adapters, adapter_name))

    def build_memory_bank(
        self,
        batches: Iterable[Any],
        *,
        to_inputs: Callable[[Any], Any] | None = None,
        to_labels: Callable[[Any], Any] | None = None,
        size: int | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Fill the memory banks of an adapter (default: the active one) with features of training clouds.

        A batch is a tensor, or a tuple whose first item goes to the model; otherwise `to_inputs(batch)` gives the
        model's arguments: one argument, a tuple of positional or a dict of named ones. `size` reduces the bank to as
        many rows by k-means in each class; None: to as many as the configuration says.

        `to_labels(batch)` gives the classes, one integer a cloud: a tensor, an array or a list. Without it they are
        the only tensor in the batch, at whatever depth, that holds one integer a cloud and is no input of the model;
        the progress bar names it. Where none or several are such, rows are reduced without classes, with a warning.

        The features are those of the frozen backbone in eval mode, whatever is trained. Of more than 65,536 clouds only
        prototypes are held. Under accelerate or torch.distributed, each process goes through its own batches and all
        end with the same bank.

        >>> from point_peft import PointPEFTConfig
        >>> model.add_adapter("task", PointPEFTConfig(memory_bank=True))
        >>> model.build_memory_bank([clouds, torch.rand(4, 64, 3)], adapter_name="task")
        """
        name, adapter = single_adapter(self.adapters, self.active_adapters, adapter_name)
        check_unmerged(self.merged, "the active adapters cannot be changed")
        build_banks(self, adapter, name, batches, to_inputs, to_labels, size)

    # ---- files ----

    def save_pretrained(
        self,
        save_directory: str | Path,
        adapter_name: str | Sequence[str] | None = None,
        *,
        format: Format = "auto",
        base_license: str | None = None,
        half: bool = False,
    ) -> None:
        """Write an adapter into a folder: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.

        Without a name all adapters are written: a single one, or the one named "default", into the folder itself,
        the others into a subfolder of their name. Each is replaced as a whole or not at all. No network is touched.

        An adapter of LoRA alone is written so that the PEFT package reads it too, unless it has something that PEFT's
        `format` cannot say: "peft" makes that an error; "point_peft" never writes PEFT's format. `base_license` is that
        of the backbone's weights, by its identifier on the Hub, for the card. `half` writes float32 as float16, in half
        the size; it is read as float32 again.
        """
        chosen = adding.adapters_to_save(self.adapters, self.merged, adapter_name)
        self._save(Path(save_directory), chosen, format, {"base_license": base_license}, half)

    def _save(self, folder: Path, own: Mapping[str, Adapter], how: Format, said: Mapping[str, Any], half: bool) -> None:
        for name, adapter in own.items():
            warn_of_silent(name, adapter)
        save_adapters(folder, own, backbone_for(self), how, partial(card_of, self.base_model, said), half=half)

    def push_to_hub(
        self,
        repo_id: str,
        adapter_name: str | Sequence[str] | None = None,
        *,
        subfolder: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: Token = None,
        revision: str | None = None,
        create_pr: bool = False,
        format: Format = "auto",
        results: Mapping[str, Mapping[str, float]] | None = None,
        datasets: Sequence[str] = (),
        license: str | None = None,
        pipeline_tag: str | None = None,
        tags: Sequence[str] = (),
        base_license: str | None = None,
    ) -> str:
        """Push adapters to a repository of the Hub, in one commit, and return its address, or that of the pull request.

        They lie there as `save_pretrained` lays them out, or within `subfolder`, with one model card for all at the
        root. The repository is made if need be, `private` if so asked for, and so is the branch `revision`. Other files
        of the repository stay, and so does what its owner wrote into the card.

        The card says what is known, and what you add: `results` (dataset -> metric -> value), `datasets`, `license`,
        `pipeline_tag`, further `tags`, and `base_license`, that of the backbone's weights (default: what the card of
        `base_model_name_or_path` on the Hub states). If it forbids commercial use and no licence is stated, it is the
        adapter's too; one that is stated and allows it gets a warning.
        """
        chosen = adding.adapters_to_save(self.adapters, self.merged, adapter_name)
        check_names(repo_id, revision, subfolder)
        said = {"results": results or {}, "datasets": tuple(datasets), "license": license, "tags": tuple(tags)}
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), chosen, format, {**said, "pipeline_tag": pipeline_tag}, False)
            files = for_repository(files_below(Path(folder), subfolder), repo_id)
        message = commit_message or f"Upload {', '.join(chosen)} with point_peft {__version__}"
        how = (private, token, revision, create_pr, base_license)
        return push(Upload(files, repo_id, message, commit_description, *how))

    def load_adapter(
        self,
        source: str | Path,
        adapter_name: str = "default",
        *,
        is_trainable: bool = False,
        heads: Mapping[str, HeadSource] | None = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Add the adapter of a folder, or of a repository of the Hub; it is not made active unless it is the only one.

        A folder may be one that the PEFT package has written, of LoRA. Everything is checked first: names, shapes,
        types and values of all tensors, and that the backbone is the one that the adapter was trained on, which PEFT's
        files do not tell. On any error the model is as it was. `heads` gives modules of classes that a
        file cannot describe, `autocast_adapter_dtype` is that of `add_adapter`: True widens half precision, False takes
        the base's types, whatever those of the file. All that follows but `subfolder` is for the Hub.

        >>> model.save_pretrained("task")
        >>> model.load_adapter("task", "copy")
        >>> model.set_adapter("copy")
        """
        place = Place(subfolder, revision, token, cache_dir, local_files_only, force_download)
        self._load(source, adapter_name, is_trainable, heads, autocast_adapter_dtype, place)

    def _load(self, source: str | Path, name: str, is_trainable: bool, heads: Heads, widen: bool, place: Place) -> None:
        self._check_new(name)
        adapter = restore_adapter(self._read(source, place), heads, widen=widen).requires_grad_(is_trainable)
        adding.attach_adapter(self, name, adapter)

    def swap_adapter_(
        self,
        source: str | Path,
        adapter_name: str = "default",
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Give an adapter the values of another, of a folder or of a repository of the Hub, in the tensors that it has.

        No tensor is made or moved, so code compiled with `torch.compile` is not compiled again and an optimizer goes on
        with the new values. What is active, what is trained and in which mode stays. The result is that of
        `load_adapter`, which also says what is checked; what is not built alike (other methods, fields, heads, modules,
        shapes, types, rows of a bank) is refused. On any error model and adapter are as they were.

        All values are written in one step, but a forward that runs meanwhile in another thread reads them one by one,
        and may see some old and some new. Where an adapter is in use, load the other beside it and call `set_adapter`.
        """
        adapter = adding.named_adapter(self.adapters, adapter_name)
        check_unmerged(self.merged, "adapters cannot be swapped")
        stated = self._read(source, Place(subfolder, revision, token, cache_dir, local_files_only, force_download))
        swap_values(stated, adapter, adapter_name)

    def _read(self, source: str | Path, place: Place) -> Stated:
        return read_stated(folder_of(source, place), backbone_modules(self), partial(backbone_for, self))
