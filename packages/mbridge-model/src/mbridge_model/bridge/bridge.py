"""The only module that imports megatron.bridge.

Upstream has announced that Megatron-Bridge moves into Megatron-LM, so its use is kept in one place. The import takes
seconds and happens when a model is built, not before.
"""

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from mbridge_model.bridge.conversion_tasks import has_vocabulary, hf_names, load_only, part_views, task_parts
from mbridge_model.bridge.installed import require_bridge
from mbridge_model.bridge.read_slices import SlicedReader
from mbridge_model.directory import HFDirectory
from mbridge_model.errors import ModelError
from mbridge_model.patches import Patch, PatchTable
from mbridge_model.patches.cpu import allow_missing_transformer_engine, enable_cpu
from mbridge_model.patches.quiet import quiet

MISTRAL_YARN = PatchTable(
    "read a Mistral with YaRN",
    Patch(
        target="megatron.bridge.models.mistral.mistral_bridge:MistralModelProvider",
        reason="it is given an argument that it lacks, scale_factor; YaRN's fields are set from config.json later",
        wrapper=lambda provider: lambda *, scale_factor=None, **fields: provider(**fields),
    ),
)


def import_bridge() -> Any:
    """Import megatron.bridge, with or without a GPU and Transformer Engine, and return its `AutoBridge` class.

    Raises:
        ModelError: megatron-bridge is not installed; the message has the line that installs it.
    """
    require_bridge()
    enable_cpu()
    allow_missing_transformer_engine()
    with quiet():
        from mbridge_model.patches.rotary import ROTARY

        ROTARY.apply()
        from megatron.bridge import AutoBridge
    return AutoBridge


@cache
def qwen_vl_parts() -> SimpleNamespace:
    """Import the parts of Megatron-Bridge's Qwen3-VL that `mbridge_model.vision` builds on, once.

    Its self-attention takes a rotary angle for each token, packed or not. `vision_config` makes the tower's
    configuration from transformers' configuration and the provider.
    """
    import_bridge()
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.attention import Qwen3VLSelfAttention
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope import Qwen3VLMultimodalRotaryEmbedding
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.transformer_config import get_vision_model_config
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.utils import PatchMergerSubmodules
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_model import Qwen3VLVisionModel

    return SimpleNamespace(
        attention=Qwen3VLSelfAttention,
        rotary=Qwen3VLMultimodalRotaryEmbedding,
        vision_model=Qwen3VLVisionModel,
        vision_config=get_vision_model_config,
        merger_submodules=PatchMergerSubmodules,
    )


class Bridge:
    """One HuggingFace directory as Megatron-Bridge sees it.

    Raises:
        ModelError: Megatron-Bridge has no conversion for the architecture, or cannot read the directory.
    """

    def __init__(self, directory: HFDirectory, *, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self.path = path = directory.path
        self._tasks: tuple[list[torch.nn.Module], list[Any]] = [], []
        self._views: dict[str, tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]] = {}
        auto_bridge = import_bridge()
        try:
            with quiet():
                self._bridge = auto_bridge.from_hf_pretrained(str(path), trust_remote_code=trust_remote_code)
        except ValueError as error:
            if code := directory.config.get("auto_map"):
                raise ModelError(
                    f"{path / 'config.json'} says in auto_map that {directory.architecture} is computed by Python code "
                    f"of the directory ({code}), for which Megatron-Bridge has no Megatron model; use a model whose "
                    "class is part of transformers"
                ) from error
            first_line = str(error).strip().splitlines()[0]
            raise ModelError(f"Megatron-Bridge cannot convert {path}: {first_line}") from error

    def provider(self) -> Any:
        """Return a fresh provider: a Megatron `TransformerConfig` that builds the model, without weights.

        Raises:
            ModelError: config.json has a setting that Megatron-Bridge does not know.
        """
        try:
            with quiet(), MISTRAL_YARN:
                return self._bridge.to_megatron_provider(load_weights=False)
        except (ValueError, NotImplementedError) as error:
            raise ModelError(f"Megatron-Bridge cannot convert {self.path}: {error}") from error

    def build(self, provider: Any) -> list[torch.nn.Module]:
        """Build the model chunks of this rank, wrapped for half precision but not for data parallelism.

        Raises:
            ModelError: Megatron-Core or the backend cannot build it.
        """
        try:
            with quiet():
                model: list[torch.nn.Module] = provider.provide_distributed_model(wrap_with_ddp=False)
        except (AssertionError, ValueError, NotImplementedError) as error:
            raise ModelError(f"the model of {self.path} cannot be built: {error}") from error
        return model

    @property
    def hf_config(self) -> Any:
        """The transformers configuration object of the directory."""
        return self._bridge.hf_pretrained.config

    def load_weights(self, model: list[torch.nn.Module]) -> None:
        """Copy the directory's weights into the model, in place. Collective over all ranks.

        Raises:
            ModelError: a tensor's shape differs from the model's, for example after an override of the geometry.
        """
        try:
            with quiet():
                model_bridge = self._bridge._model_bridge
                # Not the tasks that an export uses: loading marks tasks on the stages that own a tensor alone, after
                # which the stages would not agree on what to send.
                left = self._load_shares(self._bridge.get_conversion_tasks(model))
                with load_only(model_bridge, left):
                    model_bridge.load_weights_hf_to_megatron(self._bridge.hf_pretrained, model)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"the weights of {self.path} do not fit the model: {error}; leave out overrides of sizes, which come "
                "from config.json, and check that config.json belongs to these weights"
            ) from error

    def _load_shares(self, tasks: list[Any]) -> list[Any]:
        """Fill every parameter whose shard this rank can read by itself; return the remaining tasks."""
        if self._family_overrides("maybe_modify_loaded_hf_weight"):
            return tasks
        reader: SlicedReader | None = None
        left = []
        for task in tasks:
            is_filled = False
            if task is not None and task.megatron_module is not None:
                mapping, parts, config = task.mapping, task_parts(task), task.megatron_module.config
                if parts is not None and not mapping.is_expert:
                    reader = reader or SlicedReader(self.directory.files, mapping.tp_rank, mapping.tp_size)
                    is_filled = reader.fill(
                        task.param_weight.detach(),
                        parts,
                        queries=config.num_attention_heads // config.num_query_groups,
                        groups=config.num_query_groups,
                        pads_rows=has_vocabulary(task),
                    )
            if not is_filled:
                left.append(task)
        return left

    def check_finite(self, model: list[torch.nn.Module]) -> None:
        """Check that every parameter is finite. Collective over all ranks, so that all of them raise.

        It takes as long as a copy of this rank's parameters: 5 ms per GB on one H200, 1 s per GB on one CPU core.

        Raises:
            ModelError: naming the tensors and their files.
        """
        found: set[str] = set()
        for task in self._conversion_tasks(model):
            if task.megatron_module is None or not task.param_weight.numel():
                continue
            if not torch.isfinite(torch.stack(task.param_weight.detach().aminmax())).all():
                tensors = self._bridge.hf_pretrained.state.source.load_tensors(hf_names(task))
                broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
                found.update(broken or hf_names(task))
        if names := _union_of_ranks(found):
            raise ModelError(
                f"{len(names)} tensor(s) hold NaN, infinity or a number that the model's dtype cannot hold, first "
                f"{names[0]!r} in {self.directory.files[names[0]]}; every output would be NaN. Download the file "
                "again, or take an earlier checkpoint"
            )

    def export(self, model: list[torch.nn.Module], vocab_size: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (HuggingFace name, whole tensor) on every rank; see `mbridge_model.export`. Collective.

        Tensors with a row per token are cut to `vocab_size` rows, since Megatron-Bridge leaves them padded. Where this
        rank has the whole model, most tensors are views of parameters, and Megatron-Bridge converts the others.
        """
        from megatron.core import parallel_state

        tasks = self._conversion_tasks(model)
        for task in tasks:
            weight = task.param_weight
            if weight is not None and weight.numel() and not weight.untyped_storage().nbytes():
                raise ModelError(
                    f"the memory of {task.global_param_name} has been freed (offloaded): bring the weights back first"
                )
        left = tasks
        is_whole = parallel_state.get_model_parallel_group().size() == 1
        if is_whole and not self._family_overrides("maybe_modify_converted_hf_weight"):
            left = []
            for task in tasks:
                views = self._views_of(task, vocab_size)
                if views is None:
                    left.append(task)
                    continue
                for name, view in views:  # of a fused attention [groups, rows of a group, ...]
                    yield name, view.flatten(0, 1) if view.dim() > task.param_weight.dim() else view
        if not left:
            return
        vocabulary = {"lm_head.weight"}.union(*(hf_names(task) for task in tasks if has_vocabulary(task)))
        converted = self._bridge.export_hf_weights(model, cpu=False, show_progress=False, conversion_tasks=left)
        for name, tensor in converted:
            yield name, tensor[:vocab_size] if name in vocabulary else tensor

    def _views_of(self, task: Any, vocab_size: int) -> list[tuple[str, torch.Tensor]] | None:
        """Return (name, view) of a parameter that this rank holds whole; None if Megatron-Bridge must convert it.

        Views are cached, since creating one takes longer than copying a small tensor.
        """
        if task.megatron_module is None:
            return None
        weight, name = task.param_weight, task.global_param_name
        # Data parallelism, for one, moves parameters into a buffer.
        if name not in self._views or self._views[name][0].data_ptr() != weight.data_ptr():
            names, config = task_parts(task), task.megatron_module.config
            if names is None or task.mapping.is_expert:
                return None
            data, groups = weight.detach(), config.num_query_groups
            views = part_views(data, names, queries=config.num_attention_heads // groups, groups=groups)
            if has_vocabulary(task):
                views["whole"] = views["whole"][:vocab_size]
            self._views[name] = data, [(names[part], view) for part, view in views.items()]
        return self._views[name][1]

    def _conversion_tasks(self, model: list[torch.nn.Module]) -> list[Any]:
        """Return the task of each parameter, cached: finding them takes longer than copying a small model."""
        known, tasks = self._tasks
        if len(known) != len(model) or any(one is not other for one, other in zip(known, model, strict=True)):
            with quiet():
                # None stands for what the HuggingFace format lacks, such as the head of a critic.
                tasks = [task for task in self._bridge.get_conversion_tasks(model) if task is not None]
            self._tasks = list(model), tasks
            self._views = {}
        return tasks

    def _family_overrides(self, method: str) -> bool:
        """Return whether this family has its own version of a method that changes tensors as they are converted."""
        function = getattr(type(self._bridge._model_bridge), method)
        return not function.__qualname__.startswith("MegatronModelBridge.")

    def recipe(self, model: list[torch.nn.Module], provider: Any, vocab_size: int) -> list[dict[str, Any]] | None:
        """Return the recipe of `mbridge_model.export_recipe`. Collective over all ranks."""
        entries: list[dict[str, Any]] = []
        for task in self._conversion_tasks(model):
            if (parts := task_parts(task)) is None:
                return None
            for part, name in parts.items():
                entry = {"name": name, "parameter": task.global_param_name, "part": part}
                if part in ("query", "key", "value"):
                    entry |= {"heads": provider.num_attention_heads, "groups": provider.num_query_groups}
                    entry |= {"head_dim": provider.kv_channels}
                elif has_vocabulary(task):
                    entry["rows"] = vocab_size
                entries.append(entry)
        return entries

    def check_coverage(self, model: list[torch.nn.Module]) -> None:
        """Check that each weight of the directory has a place in the model, and each parameter a weight. Collective.

        Megatron-Bridge only warns of either, so a random or a missing tensor would be trained.

        Raises:
            ModelError: naming the first tensors that have no counterpart.
        """
        from megatron.core.utils import get_model_config

        tied = get_model_config(model[0]).share_embeddings_and_output_weights
        tasks = self._conversion_tasks(model)
        expected = {name for task in tasks for name in hf_names(task)}
        present = set(self._bridge.hf_pretrained.state.source.get_all_keys())
        ignored = {"lm_head.weight"} if tied else set()
        unused = sorted(name for name in present - expected - ignored if not name.endswith("rotary_emb.inv_freq"))
        if missing := sorted(expected - present):
            raise ModelError(
                f"the checkpoint lacks {len(missing)} tensor(s) that the model needs, first {missing[0]!r}; "
                "its files are complete, so config.json (or an override) does not belong to these weights, or "
                "Megatron-Bridge does not know this variant"
            )
        if unused:
            raise ModelError(
                f"{len(unused)} tensor(s) of the checkpoint have no place in the Megatron model, first {unused[0]!r}; "
                "training without them would change the model. Megatron-Bridge does not know this variant"
            )
        filled = {id(task.param_weight) for task in tasks}
        empty = {
            name
            for chunk in model
            for name, parameter in chunk.named_parameters()
            if id(parameter) not in filled and not (tied and "output_layer" in name)
        }
        if names := _union_of_ranks(empty):
            raise ModelError(
                f"{len(names)} parameter(s) of the Megatron model get no weight from the checkpoint, first "
                f"{names[0]!r}; an override, or a setting in config.json, asks for more than this architecture has"
            )


def _union_of_ranks(names: set[str]) -> list[str]:
    """Return the names of all ranks, sorted. Collective."""
    names_by_rank: list[set[str]] = [set() for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(names_by_rank, names)
    return sorted(set().union(*names_by_rank))
