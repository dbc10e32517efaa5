"""Decide which directories a run reads its model and tokenizer from."""

from pathlib import Path
from typing import Any

from mbridge_config.paths import user_path
from mbridge_config.problems import ConfigError, refusal
from mbridge_config.schema.keys import get

REASONING_KEY = "actor.megatron.ckpt_convertor.hf_model_path"
SFT_KEY = "actor.model.model_path"
HF_KEYS = (REASONING_KEY, SFT_KEY)
TOKENIZER_KEY = "actor.tokenizer.tokenizer_model"
# keys that a path is written to by mistake
_STRAYS = {REASONING_KEY: (SFT_KEY, "rollout.model.model_path"), SFT_KEY: (REASONING_KEY,)}


def hf_key(config: Any) -> str:
    """Return the key that names the HuggingFace directory of this kind of run."""
    return SFT_KEY if config.runner.task_type == "sft" else REASONING_KEY


def hf_directory(config: Any) -> Path:
    """Return the HuggingFace directory of the model. Raises `ConfigError` if its key is empty."""
    key = hf_key(config)
    if value := get(config, key):
        return user_path(value)
    for other in _STRAYS[key]:
        if stray := get(config, other):
            kind = "an SFT" if key == SFT_KEY else "a reasoning"
            reason = f"{key} is empty and {other} is set ({stray}), but {kind} run reads its model from {key}"
            raise _empty(config, "hf-path-empty", key, reason, f"set {key}={stray}")
    reason = f"{key} is empty, so there is no model to start from"
    raise _empty(config, "hf-path-empty", key, reason, f"set {key}=DIRECTORY")


def tokenizer_directory(config: Any) -> Path:
    """Return the directory of the tokenizer. Raises `ConfigError` if its key is empty."""
    if value := get(config, TOKENIZER_KEY):
        return user_path(value)
    key = hf_key(config)
    model = get(config, key)
    reason = f"{TOKENIZER_KEY} is empty" + (f" and {key} is set ({model})" if model else "")
    fix = f"set {TOKENIZER_KEY}={model or 'DIRECTORY'}, or write `tokenizer_model: ${{{key}}}`"
    raise _empty(config, "tokenizer-path-empty", TOKENIZER_KEY, reason, fix)


def _empty(config: Any, identity: str, key: str, reason: str, fix: str) -> ConfigError:
    return refusal(identity, reason, fix, key=key, value=get(config, key), where=config.provenance.places.get(key))
