"""What a run starts from: HuggingFace weights, a Megatron checkpoint, or an earlier run."""

from collections.abc import Iterable
from importlib.util import find_spec

from mbridge_config.facts.architectures import ALL_LAYERS_HAVE_EXPERTS, TORCH, TRANSFORMER_ENGINE
from mbridge_config.facts.directories import HF_KEYS, TOKENIZER_KEY, hf_key
from mbridge_config.facts.model import QKV_BIAS_FAMILIES, read_json_object
from mbridge_config.facts.safetensors import fault
from mbridge_config.facts.tokenizer import token_ids
from mbridge_config.paths import is_directory, is_file, same_place, user_path
from mbridge_config.problems import ConfigError, shown
from mbridge_config.rules.base import Context, Finding, rule

CHECKPOINT = "actor.model.megatron_checkpoint"
USE_HF = "actor.megatron.use_hf_ckpt"
MBRIDGE = "actor.megatron.mbridge"
RESUME = "runner.resume_dir"
BACKEND = "actor.model.backend"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_INDEX = "model.safetensors.index.json"


@rule("megatron-checkpoint-required", CHECKPOINT, USE_HF, RESUME)
def required(context: Context) -> Iterable[Finding]:
    """use_hf_ckpt is false, so weights come from a Megatron checkpoint, and neither it nor a run to resume is named.

    Fix: name a `global_step_<n>` directory, or start from HuggingFace weights.
    """
    actor = context.config.actor
    if not actor.megatron.use_hf_ckpt and not actor.model.megatron_checkpoint and not context.config.runner.resume_dir:
        yield Finding(
            CHECKPOINT,
            "model.megatron_checkpoint is required if use_hf_ckpt is False",
            f"set {CHECKPOINT} or {RESUME} to a global_step_<n> directory, or {USE_HF}=true",
        )


@rule("megatron-checkpoint-forbidden", CHECKPOINT, USE_HF)
def forbidden(context: Context) -> Iterable[Finding]:
    """use_hf_ckpt is true, so weights come from the HuggingFace directory, and a Megatron checkpoint is named as well.

    Fix: keep one of the two places that weights come from.
    """
    actor = context.config.actor
    if actor.megatron.use_hf_ckpt and actor.model.megatron_checkpoint:
        yield Finding(
            CHECKPOINT,
            "model.megatron_checkpoint should be None if use_hf_ckpt is True",
            f"remove {CHECKPOINT}, or set {USE_HF}=false to start from it",
        )


@rule("mbridge-off", MBRIDGE, USE_HF)
def mbridge_off(context: Context) -> Iterable[Finding]:
    """HuggingFace weights are to be loaded with mbridge switched off, but there is no other way to load them.

    Fix: set `actor.megatron.mbridge=true`, or start from a Megatron checkpoint made by mbridge.
    """
    megatron = context.config.actor.megatron
    if not megatron.mbridge and megatron.use_hf_ckpt:
        yield Finding(
            MBRIDGE,
            "HuggingFace weights are loaded through Megatron-Bridge alone; there is no conversion step beside it",
            f"set {MBRIDGE}=true, or {USE_HF}=false to start from a Megatron checkpoint made by mbridge",
        )


@rule("megatron-checkpoint-missing", CHECKPOINT)
def checkpoint_missing(context: Context) -> Iterable[Finding]:
    """The Megatron checkpoint to start from does not exist.

    Fix: correct the path; it is relative to where you run.
    """
    value = context.config.actor.model.megatron_checkpoint
    if value and not context.config.actor.megatron.use_hf_ckpt and not is_directory(user_path(value)):
        yield Finding(CHECKPOINT, "there is no such directory", "give a directory of a Megatron checkpoint")


@rule("resume-directory", RESUME)
def resume(context: Context) -> Iterable[Finding]:
    """The run to resume does not exist, or is not a `global_step_<n>` directory with a Megatron checkpoint.

    Fix: give `auto`, or a `global_step_<n>` directory of an earlier run.
    """
    value = context.config.runner.resume_dir
    if not value or value == "auto":
        return
    directory = user_path(value)
    if not is_directory(directory):
        yield Finding(
            RESUME, "there is no such directory", "give auto, or a global_step_<n> directory of an earlier run"
        )
    elif not is_directory(directory / "actor"):
        steps = [path for path in directory.rglob("global_step_*") if path.is_dir()]
        newest = max(steps, key=lambda path: _step(path.name), default=None)
        fix = "give a global_step_<n> directory" if newest is None else f"set {RESUME}={shown(newest)}"
        yield Finding(RESUME, "it holds no `actor` directory, so it is not a checkpoint", fix)


def _step(name: str) -> int:
    number = name.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


@rule("architecture", BACKEND, *HF_KEYS)
def architecture(context: Context) -> Iterable[Finding]:
    """The model's architecture cannot be built: Megatron-Bridge does not know it, it has no plain torch layers, or some
    of its layers have biases or lack experts where Megatron-Bridge builds the opposite.

    Fix: use a model of an architecture that the message names, or `actor.model.backend=te` on a GPU with Transformer
    Engine.
    """
    config, facts = context.config, context.facts
    if facts is None:
        return
    name, backend, key = facts.architectures[0], config.actor.model.backend, hf_key(config)
    if name not in TORCH | TRANSFORMER_ENGINE:
        reason = f"config.json names {name}, which Megatron-Bridge does not know"
        yield Finding(key, reason, f"use a model of {', '.join(sorted(TORCH))}")
    elif name not in TORCH and (backend == "torch" or (backend == "auto" and find_spec("transformer_engine") is None)):
        reason = f"config.json names {name}, which is not built with plain torch layers, and {BACKEND} is {backend}"
        reason += ", where Transformer Engine is not installed" if backend == "auto" else ""
        yield Finding(key, reason, f"set {BACKEND}=te, on a GPU with Transformer Engine, or use another model")
    elif name in ALL_LAYERS_HAVE_EXPERTS and facts.dense_layers:
        layers = ", ".join(map(str, facts.dense_layers[:3])) + (" and more" if len(facts.dense_layers) > 3 else "")
        reason = f"layers {layers} have no experts (mlp_only_layers and decoder_sparse_step in config.json)"
        yield Finding(key, reason, f"use a model of {name} with experts in every layer")
    elif name in TORCH and (facts.linear_bias or (facts.qkv_bias and facts.model_type not in QKV_BIAS_FAMILIES)):
        field = "mlp_bias" if facts.linear_bias else "attention_bias"
        reason = f"config.json has {field} true, and Megatron-Bridge builds {name} without these biases"
        yield Finding(key, reason, f"use a model without {field}")


@rule("weights-missing", USE_HF, CHECKPOINT, RESUME)
def weights(context: Context) -> Iterable[Finding]:
    """The HuggingFace directory has no weights, or lacks files that its index names.

    Fix: copy `model.safetensors`, or its shards and their index, into the directory.
    """
    config, facts = context.config, context.facts
    if facts is None or not config.actor.megatron.use_hf_ckpt or not is_directory(facts.directory):
        return
    directory = facts.directory
    if not any(path for pattern in _WEIGHTS for path in directory.glob(pattern)):
        fix = "copy model.safetensors, or its shards and index, into the directory"
        yield Finding(hf_key(config), "there are no weights in the directory", fix)
        return
    if not is_file(directory / _INDEX):
        return
    try:
        shards = read_json_object(directory / _INDEX, "weights-missing").get("weight_map")
    except ConfigError as error:
        for problem in error.problems:
            yield Finding(hf_key(config), problem.reason, problem.fix)
        return
    names = {name for name in shards.values() if isinstance(name, str)} if isinstance(shards, dict) else set()
    if missing := sorted(name for name in names if not is_file(directory / name)):
        listing = ", ".join(missing[:3]) + (" and more" if len(missing) > 3 else "")
        reason = f"{len(missing)} of {len(names)} weight files that {_INDEX} names are missing: {listing}"
        yield Finding(hf_key(config), reason, "copy the missing files")


@rule("weights-damaged", USE_HF, CHECKPOINT, RESUME)
def damaged(context: Context) -> Iterable[Finding]:
    """A safetensors file of the HuggingFace directory is truncated, too long, or not a safetensors file.

    Fix: copy or download the file again.
    """
    config, facts = context.config, context.facts
    if facts is None or not config.actor.megatron.use_hf_ckpt or not is_directory(facts.directory):
        return
    faults = [found for file in sorted(facts.directory.glob("*.safetensors")) if (found := fault(file)) is not None]
    for found in faults[:3]:
        yield Finding(hf_key(config), found, "copy or download the file again")


@rule("tokenizer-vocabulary", TOKENIZER_KEY, *HF_KEYS)
def vocabulary(context: Context) -> Iterable[Finding]:
    """The tokenizer produces token ids for which the model has no embedding.

    Fix: use the tokenizer that belongs to the model.
    """
    facts, size = context.facts, context.tokenizer_size
    if facts is not None and facts.vocab_size is not None and size is not None and size > facts.vocab_size:
        yield Finding(
            TOKENIZER_KEY,
            f"the tokenizer has {size} tokens and the model embeddings for {facts.vocab_size} "
            f"(vocab_size in {shown(facts.directory / 'config.json')})",
            "use the tokenizer that belongs to the model",
        )


@rule("tokenizer-directory", TOKENIZER_KEY, *HF_KEYS)
def tokenizer(context: Context) -> Iterable[Finding]:
    """The tokenizer is in another directory than the model, and assigns another id to a token than the model's own.

    Fix: name the model's own directory as that of the tokenizer.
    """
    config, facts = context.config, context.facts
    place = config.actor.tokenizer.tokenizer_model
    if facts is None or not place:
        return
    directory, own = user_path(place), facts.directory
    if not (is_directory(directory) and is_directory(own)) or same_place(directory, own):
        return
    try:
        given, expected = token_ids(directory), token_ids(own)
    except ConfigError:
        return  # the tokenizer's own rules say so; the model's own is not used
    differing = (token for token, number in expected.items() if given.get(token, number) != number)
    if (token := next(differing, None)) is not None:
        reason = (
            f"not the tokenizer of the model in {hf_key(config)} {shown(own)}: "
            f"token {token!r} is {given[token]} here and {expected[token]} there"
        )
        yield Finding(TOKENIZER_KEY, reason, f"write `tokenizer_model: ${{{hf_key(config)}}}`")
