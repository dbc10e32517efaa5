"""Read what a HuggingFace directory says about its model as plain JSON, without torch, transformers or its code."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbridge_config.facts.vision import VisionFacts, vision_facts
from mbridge_config.paths import is_directory, is_file, is_there, user_path
from mbridge_config.problems import ConfigError, Problem, Where, refusal, shown
from mbridge_config.schema.actor import MOST_LAYERS

# config.json omits this field if it has the family's default, which is true for these families only.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2")
# Families whose Megatron model always has these, regardless of config.json.
QKV_BIAS_FAMILIES = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
QK_LAYERNORM_FAMILIES = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text")

_NESTED = ("text_config", "llm_config", "language_config")  # where vision-language models keep the text model


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class HFFacts:
    """Geometry in `directory/config.json`: that of the text model, unless the name says vision.

    None means that config.json does not say.
    """

    directory: Path
    architectures: tuple[str, ...]
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_type: str | None = None
    rotary_fraction: float | None = None
    norm_epsilon: float | None = None
    tied_embeddings: bool = False
    qkv_bias: bool | None = None
    linear_bias: bool | None = None
    qk_layernorm: bool | None = None
    multi_latent_attention: bool = False
    activation: str | None = None
    num_experts: int | None = None
    experts_per_token: int | None = None
    expert_ffn_hidden_size: int | None = None
    dense_layers: tuple[int, ...] = ()
    """Layers of a mixture-of-experts model that have no experts."""
    has_vision: bool = False
    vision_heads: int | None = None
    vision_ffn_hidden_size: int | None = None
    deepstack_visual_indexes: tuple[int, ...] = ()
    """Layers of the vision tower whose features are added after the first language layers, one after each."""
    vision: VisionFacts | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "HFFacts":
        """Read `directory/config.json`. Raises `ConfigError` with all that is wrong with it."""
        directory = existing_directory(directory)
        file = directory / "config.json"
        if not is_file(file):
            reason = f"there is no config.json in {shown(directory)}"
            fix = "give the directory that holds config.json, tokenizer and weights"
            raise refusal("hf-config-missing", reason, fix, value=str(directory))
        config = read_json_object(file, "hf-config-json")
        text = next((config[name] for name in _NESTED if isinstance(config.get(name), dict)), config)
        return _Reader(file, config, text).facts()


class _Reader:
    """Read the fields of one config.json, and collect everything that is wrong."""

    def __init__(self, file: Path, config: Mapping[str, Any], text: Mapping[str, Any]):
        self.file, self.config, self.text = file, config, text
        vision = config.get("vision_config")
        self.vision: Mapping[str, Any] = vision if isinstance(vision, dict) else {}
        self.problems: list[Problem] = []

    def facts(self) -> HFFacts:
        named = self.config.get("architectures")
        architectures = named if isinstance(named, list) and all(isinstance(name, str) for name in named) else []
        if not architectures:
            reason = "config.json has no `architectures`, so the model's class is unknown"
            fix = 'add "architectures": ["Qwen2ForCausalLM"] or the like, or take the config.json that was published'
            self.report("hf-config-architectures", reason, fix)
        layers = self.count("num_hidden_layers", "n_layer", required=True)
        if layers is not None and layers > MOST_LAYERS:
            reason = f"num_hidden_layers is {layers}, more than the {MOST_LAYERS} that any model has"
            self.report("hf-config-field", reason, "correct config.json")
        self.check_layer_types(layers)
        hidden = self.count("hidden_size", "n_embd", required=True)
        heads = self.count("num_attention_heads", "n_head", required=True)
        groups = self.count("num_key_value_heads") or heads
        head_dim = self.count("head_dim")
        if head_dim is None and hidden and heads:
            if hidden % heads:
                reason = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
                self.report("hf-config-field", f"{reason}, and there is no head_dim", "add head_dim to config.json")
            head_dim = hidden // heads
        if heads and groups and heads % groups:
            reason = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
            self.report("hf-config-field", reason, "correct config.json")
        family = str(self.text.get("model_type") or self.config.get("model_type") or "")
        facts = {
            "ffn_hidden_size": self.count("intermediate_size", "n_inner"),
            "vocab_size": self.count("vocab_size"),
            "max_position_embeddings": self.count("max_position_embeddings", "n_positions"),
            "num_experts": self.count("num_experts", "num_local_experts", "n_routed_experts"),
            "experts_per_token": self.count("num_experts_per_tok"),
            "expert_ffn_hidden_size": self.count("moe_intermediate_size"),
        }
        deepstack = self.deepstack()
        if facts["vocab_size"] is not None:
            self.check_end_tokens(facts["vocab_size"])
        if self.problems:
            raise ConfigError(self.problems)
        assert layers and hidden and heads and groups and head_dim  # else there was a problem
        activation = self.text.get("hidden_act") or self.text.get("hidden_activation")
        return HFFacts(
            directory=self.file.parent,
            architectures=tuple(architectures),
            model_type=family,
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=head_dim,
            rope_theta=self.rotary("rope_theta"),
            rope_type=self.rope_type(),
            rotary_fraction=self.rotary("partial_rotary_factor"),
            norm_epsilon=_number(self.text.get("rms_norm_eps", self.text.get("layer_norm_eps"))),
            tied_embeddings=self.tied(family),
            qkv_bias=True if family in QKV_BIAS_FAMILIES else _flag(self.text.get("attention_bias")),
            linear_bias=_flag(self.text.get("mlp_bias")),
            qk_layernorm=True if family in QK_LAYERNORM_FAMILIES else _flag(self.text.get("use_qk_norm")),
            multi_latent_attention=self.text.get("kv_lora_rank") is not None,
            activation=activation if isinstance(activation, str) else None,
            has_vision="vision_config" in self.config,
            vision_heads=_whole(self.vision.get("num_heads")),
            vision_ffn_hidden_size=_whole(self.vision.get("intermediate_size")),
            deepstack_visual_indexes=deepstack,
            vision=vision_facts(family, self.vision),
            dense_layers=self.dense_layers(layers) if facts["num_experts"] else (),
            **facts,
        )

    def check_layer_types(self, layers: int | None) -> None:
        """Report a list of layer kinds whose length is not the number of layers: transformers refuses such a model."""
        kinds = self.text.get("layer_types")
        if kinds is None:
            return
        if not isinstance(kinds, list):
            reason = f"layer_types is {kinds!r:.60}, not a list of a name for each layer"
            self.report("hf-config-field", reason, "take layer_types out of config.json, or correct it")
        elif layers is not None and len(kinds) != layers:
            reason = f"num_hidden_layers is {layers}, and layer_types names {len(kinds)} layers"
            fix = f"give layer_types in config.json {layers} entries, or set num_hidden_layers to {len(kinds)}"
            self.report("hf-config-field", reason, fix)

    def check_end_tokens(self, vocab_size: int) -> None:
        """Report end tokens that the vocabulary lacks, so that no answer would end."""
        generation = self.file.with_name("generation_config.json")
        sources = {self.file.name: self.config}
        if is_file(generation):
            sources[generation.name] = read_json_object(generation, "hf-config-json")
        if not any("eos_token_id" in source for source in sources.values()):
            sources[self.file.name] = self.text
        for name, source in sources.items():
            value = source.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(_whole(token) is not None and token < vocab_size for token in ids):
                reason = f"{name} has eos_token_id {value!r:.60}, and the vocabulary has the ids 0 to {vocab_size - 1}"
                self.report("hf-config-field", reason, "correct the id")

    def deepstack(self) -> tuple[int, ...]:
        """Return `deepstack_visual_indexes` of the vision part; empty if it has none."""
        value = self.vision.get("deepstack_visual_indexes")
        if value is None:
            return ()
        if isinstance(value, list) and all(_whole(index) is not None for index in value):
            return tuple(value)
        reason = f"vision_config.deepstack_visual_indexes is {value!r}, not a list of layer numbers"
        self.report("hf-config-field", reason, "correct config.json")
        return ()

    def dense_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers without experts: those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
        named, step = self.text.get("mlp_only_layers"), _whole(self.text.get("decoder_sparse_step")) or 1
        names = named if isinstance(named, list) else []
        return tuple(number for number in range(layers) if number in names or (number + 1) % step)

    def count(self, *names: str, required: bool = False) -> int | None:
        """Return the first of the fields `names` that is present, a positive integer."""
        for name in names:
            value = self.text.get(name)
            if value is None:
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            self.report("hf-config-field", f"{name} is {value!r}, not a positive whole number", "correct config.json")
            return None
        if required:
            self.report("hf-config-field", f"config.json has no {names[0]}", f"add {names[0]} to config.json")
        return None

    def rotary(self, name: str) -> float | None:
        """Return a number of the rotary embeddings, which newer files keep in a separate section."""
        parameters = self.text.get("rope_parameters")
        nested = parameters.get(name) if isinstance(parameters, dict) else None
        return _number(self.text.get(name, nested))

    def rope_type(self) -> str | None:
        """Return the kind of rotary scaling, under its newer or its older names."""
        parameters = self.text.get("rope_parameters") or self.text.get("rope_scaling")
        kind = parameters.get("rope_type", parameters.get("type")) if isinstance(parameters, dict) else None
        return kind if isinstance(kind, str) else None

    def tied(self, family: str) -> bool:
        value = self.config.get("tie_word_embeddings", self.text.get("tie_word_embeddings"))
        return value if isinstance(value, bool) else family in _TIED_BY_DEFAULT

    def report(self, identity: str, reason: str, fix: str) -> None:
        value, where = str(self.file.parent), Where(file=shown(self.file))
        self.problems.append(Problem(id=identity, reason=reason, fix=fix, value=value, where=where))


def existing_directory(directory: str | Path) -> Path:
    """Return `directory` as a path; raise `ConfigError` if it is not one."""
    path = user_path(directory)
    if is_directory(path):
        return path
    reason = "it is a file, not a directory" if is_there(path) else "there is no such directory"
    fix = "give the local directory of the model; models are not downloaded"
    raise refusal("hf-directory-missing", reason, fix, value=str(directory))


def read_json_object(file: Path, identity: str) -> dict[str, Any]:
    """Return the JSON object in `file`; raise `ConfigError` with the problem id `identity` and the line."""
    line = None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason = f"{file.name} holds {type(value).__name__}, not an object"
    except json.JSONDecodeError as error:
        line = error.lineno
        reason = f"{file.name} is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of thousands of digits
        reason = f"{file.name} cannot be read: {error}"
    raise refusal(identity, reason, "copy the file again", value=str(file), where=Where(file=shown(file), line=line))


def _number(value: Any) -> float | None:
    with contextlib.suppress(OverflowError):
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
