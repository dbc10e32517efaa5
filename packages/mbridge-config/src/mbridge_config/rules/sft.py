"""Rules of SFT runs alone: data, evaluation, vision."""

from collections.abc import Iterable

from mbridge_config.facts.directories import SFT_KEY, hf_key
from mbridge_config.paths import files_in, is_directory, is_there, user_path
from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.rules.parallel import QWEN3_VL, TP, tensor_sizes, tower_sizes
from mbridge_config.rules.run import TRAIN, VALIDATION

ROPE_FUSION = "actor.model.apply_rope_fusion"
FREEZE = tuple(f"actor.model.freeze_{part}" for part in ("language_model", "vision_model", "vision_projection"))
ONLY_EVAL = "runner.only_eval"
SMALLEST, LARGEST = "data.min_pixels", "data.max_pixels"
FORMAT = "data.dataset_name"
OFFLOAD = tuple(f"actor.offload_{part}" for part in ("weight", "grad", "optimizer"))
SUFFIXES = {"auto": (".parquet", ".jsonl"), "robo2vlm": (".parquet",), "messages": (".jsonl",)}


@rule("rope-fusion", ROPE_FUSION)
def rope_fusion(context: Context) -> Iterable[Finding]:
    """The fused rotary kernel was requested for a Qwen3-VL model, whose angles it does not support.

    Fix: remove the key.
    """
    facts = context.facts
    if facts is not None and facts.model_type in QWEN3_VL and context.value(ROPE_FUSION):
        reason = "the fused kernel cannot take the angles of Qwen3-VL, which interleave time, height and width"
        yield Finding(ROPE_FUSION, reason, f"set {ROPE_FUSION}=false, or remove it")


@rule("tensor-parallel-vision", TP)
def vision_heads(context: Context) -> Iterable[Finding]:
    """The heads or the MLP of the vision tower cannot be shared evenly by the tensor-parallel ranks.

    Fix: use a divisor of the tower's heads and of its MLP's width.
    """
    facts, tensor = context.facts, context.config.actor.model.tensor_model_parallel_size
    if facts is None:
        return
    for number, what in tower_sizes(facts):
        if number % tensor:
            reason = f"the vision tower's {number} {what} cannot be shared by {tensor} ranks"
            yield Finding(TP, reason, f"use one of {tensor_sizes(facts)}")


@rule("deepstack-layers", SFT_KEY)
def deepstack(context: Context) -> Iterable[Finding]:
    """The model has fewer language layers than deepstack features to add after them.

    Fix: correct the model's config.json.
    """
    facts = context.facts
    if facts is not None and facts.num_layers < len(facts.deepstack_visual_indexes):
        reason = (
            f"config.json has {len(facts.deepstack_visual_indexes)} deepstack_visual_indexes in vision_config, but "
            f"only {facts.num_layers} language layers (num_hidden_layers) to add their features after"
        )
        yield Finding(hf_key(context.config), reason, "correct one of the two in config.json")


@rule("freeze-without-vision", *FREEZE)
def freeze(context: Context) -> Iterable[Finding]:
    """Parts of a vision-language model are frozen, but the model has no vision tower; or nothing is left to train.

    Fix: remove the keys, or train one of the parts.
    """
    facts, model = context.facts, context.config.actor.model
    chosen = [key for key in FREEZE if getattr(model, key.rpartition(".")[2])]
    if facts is not None and not facts.has_vision:
        for key in chosen:
            yield Finding(key, f"the model has no vision tower ({facts.architectures[0]})", "remove the key")
    elif len(chosen) == len(FREEZE):
        yield Finding(FREEZE[0], "all parts of the model are frozen, so nothing is trained", "train one of them")


@rule("train-data-missing", TRAIN, ONLY_EVAL)
def train_data(context: Context) -> Iterable[Finding]:
    """Nothing to train on is named.

    Fix: set `data.train_data_paths`, or `runner.only_eval=true`.
    """
    config = context.config
    if not config.runner.only_eval and not config.data.train_data_paths:
        yield Finding(TRAIN, "there is nothing to train on", f"set {TRAIN}=[DIRECTORY], or {ONLY_EVAL}=true")


@rule("evaluation-data-missing", VALIDATION, ONLY_EVAL, "runner.val_check_interval")
def evaluation_data(context: Context) -> Iterable[Finding]:
    """An evaluation was requested, but no data is named for it.

    Fix: set `data.val_data_paths`, or evaluate nothing.
    """
    config = context.config
    if config.data.val_data_paths:
        return
    if config.runner.only_eval:
        yield Finding(VALIDATION, "there is nothing to evaluate on", f"set {VALIDATION}=[DIRECTORY]")
    elif config.runner.val_check_interval > 0:
        reason = f"runner.val_check_interval is {config.runner.val_check_interval}, and there is nothing to evaluate on"
        yield Finding(VALIDATION, reason, f"set {VALIDATION}=[DIRECTORY], or runner.val_check_interval=-1")


@rule("data-path", TRAIN, VALIDATION, FORMAT)
def data_paths(context: Context) -> Iterable[Finding]:
    """A data file or directory does not exist, or has no file of the kind that is read.

    Fix: correct the path; it is relative to where you run. `data.dataset_name` says which files are read.
    """
    config = context.config
    suffixes = SUFFIXES[config.data.dataset_name]
    kinds = " and no ".join(f"{suffix} file" for suffix in suffixes)
    for key, paths in ((TRAIN, config.data.train_data_paths), (VALIDATION, config.data.val_data_paths)):
        if key == TRAIN and config.runner.only_eval:
            continue
        for path in paths:
            place = user_path(path)
            if config.quickstart.enabled and not is_there(place):
                continue  # the quickstart makes it
            if is_directory(place):
                if not any(file.suffix in suffixes for file in files_in(place)):
                    yield Finding(key, f"{path} holds no {kinds}", "name the directory that has them itself")
            elif not is_there(place):
                reason = f"there is no file or directory {path}"
                yield Finding(key, reason, "correct the path; it is relative to where you run")
            elif place.suffix not in suffixes:
                yield Finding(key, f"{path} is no {kinds}", f"give files of these kinds, or set {FORMAT}=auto")


@rule("pixel-range", SMALLEST, LARGEST)
def pixels(context: Context) -> Iterable[Finding]:
    """The smallest allowed image is larger than the largest.

    Fix: lower `data.min_pixels`, or raise `data.max_pixels`.
    """
    data = context.config.data
    if data.min_pixels is not None and data.max_pixels is not None and data.min_pixels > data.max_pixels:
        yield Finding(SMALLEST, f"more than {LARGEST} {data.max_pixels}", f"use {data.max_pixels} or less")


@rule("offload-without-turns", *OFFLOAD)
def offload(context: Context) -> Iterable[Finding]:
    """Offloading was requested, but SFT only trains, so that nothing else needs the GPU's memory.

    Fix: set `actor.offload_weight`, `offload_grad` and `offload_optimizer` to false.
    """
    actor = context.config.actor
    for key, value in zip(OFFLOAD, (actor.offload_weight, actor.offload_grad, actor.offload_optimizer), strict=True):
        if value:
            reason = "SFT has no other phase that would need the memory, so everything stays where it is"
            yield Finding(key, reason, "remove it", Severity.WARNING)


@rule("quickstart-model", "quickstart")
def quickstart_model(context: Context) -> Iterable[Finding]:
    """The vision-language model of the quickstart has head counts that do not fit together, or deepstack
    features of layers that its vision tower does not have.

    Fix: choose heads and deepstack layers that the message names.
    """
    made = context.config.quickstart
    if not made.enabled:
        return
    if made.num_attention_heads % made.num_key_value_heads:
        reason = f"{made.num_attention_heads} query heads cannot be shared by {made.num_key_value_heads} groups"
        yield Finding("quickstart.num_key_value_heads", reason, f"use a divisor of {made.num_attention_heads}")
    if made.vision_hidden_size != 32 * made.vision_num_heads:
        width = 32 * made.vision_num_heads
        reason = f"{made.vision_num_heads} heads of width 32 make {width}"
        fix = f"set quickstart.vision_hidden_size={width}, or change quickstart.vision_num_heads"
        yield Finding("quickstart.vision_hidden_size", reason, fix)
    if any(index >= made.vision_depth for index in made.deepstack_visual_indexes):
        reason = f"the vision tower has {made.vision_depth} layers, the first of which is 0"
        fix = f"use numbers below {made.vision_depth}, or raise quickstart.vision_depth"
        yield Finding("quickstart.deepstack_visual_indexes", reason, fix)
