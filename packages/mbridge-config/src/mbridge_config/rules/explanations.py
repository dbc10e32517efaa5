"""Explain every problem id: its cause and its fix. The docstrings of rules explain theirs; the others are here."""

import collections
import dataclasses
from collections.abc import Iterator

from mbridge_config.rules import REASONING, SFT


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class Explanation:
    """What a problem id means. `runs` is reasoning or sft where the id means something else in the other."""

    id: str
    cause: str
    fix: str
    runs: str | None = None


def explanations() -> dict[str, list[Explanation]]:
    """Return all explanations by id, in alphabetical order."""
    found: dict[str, list[Explanation]] = {}
    for explanation in (*_of_loading(), *_of_rules()):
        found.setdefault(explanation.id, []).append(explanation)
    return dict(sorted(found.items()))


def _of_rules() -> Iterator[Explanation]:
    rules = dict.fromkeys((*REASONING, *SFT))
    uses = collections.Counter(rule.id for rule in rules)
    for rule in rules:
        kind = "reasoning" if rule in REASONING else "sft"
        yield Explanation(id=rule.id, cause=rule.cause, fix=rule.fix, runs=kind if uses[rule.id] > 1 else None)


def _of_loading() -> Iterator[Explanation]:
    for identity, (cause, fix) in LOADING.items():
        yield Explanation(id=identity, cause=cause, fix=fix)


LOADING = {
    "usage": (
        "The command line is wrong: an unknown option, a missing name, a number out of range.",
        "See the `--help` of the command.",
    ),
    "no-such-config": (
        "No config, or more than one, has the name.",
        "Use one of the names that the message lists, or name a directory with `--config-path`.",
    ),
    "no-such-directory": (
        "`--config-path` names no directory.",
        "Give the directory that the YAML file is in.",
    ),
    "no-packaged-configs": (
        "The package of an app has no directory of configs.",
        "Install the app, or name a directory with `--config-path`.",
    ),
    "no-such-problem": (
        "`mbridge-config explain` was asked for an id that no problem has.",
        "`mbridge-config explain` lists all ids.",
    ),
    "yaml-syntax": (
        "A file is not YAML, cannot be read, or holds no keys.",
        "Correct the line that the message names.",
    ),
    "compose-failed": (
        "Hydra cannot compose the file with its defaults list.",
        "Correct the defaults list; its entries are looked up next to the file and in the config directory.",
    ),
    "override-syntax": (
        "An argument is not `key=value`, or its value is not YAML.",
        "Put quotes around a value with commas, brackets, blanks or nested `${…}`: `key='\"a, b\"'`.",
    ),
    "interpolation": (
        "The expression between `${` and `}` names no key, resolver or environment variable, has arguments of "
        "the wrong type, or refers to itself.",
        "Correct the expression, or set the environment variable.",
    ),
    "missing-value": (
        "The file leaves the key to you (`???`).",
        "Add `key=value` to the command line, or write the value into the file.",
    ),
    "unknown-key": (
        "There is no such key, so that it would silently have no effect.",
        "Use the name that the message suggests, or remove the key; [all keys](configuration.md).",
    ),
    "wrong-type": (
        "The value does not have the type of the key.",
        "Write a value of the type that the message names, numbers without quotes.",
    ),
    "wrong-value": (
        "The key does not take this value.",
        "Use one of the values that the message lists.",
    ),
    "out-of-range": (
        "The number is outside the range of the key, or not finite.",
        "Use a number within the range.",
    ),
    "refused-value": (
        "Other trainers accept the value and this version does not; the message says why.",
        "Use a value that the message lists.",
    ),
    "alias-conflict": (
        "Two spellings of the same key are set to different values.",
        "Remove the one that the message names.",
    ),
    "no-effect": (
        "Other trainers read the key. It is accepted and changes nothing here; the message says why.",
        "Nothing has to be done; the key can be removed.",
    ),
    "hf-path-empty": (
        "The key that names the model's HuggingFace directory is empty.",
        "Set `actor.megatron.ckpt_convertor.hf_model_path`, for SFT `actor.model.model_path`.",
    ),
    "hf-directory-missing": (
        "The directory of the model or the tokenizer does not exist; nothing is downloaded.",
        "Give a local directory.",
    ),
    "hf-config-missing": (
        "The model's directory has no config.json.",
        "Give the directory that holds config.json, tokenizer and weights.",
    ),
    "hf-config-json": (
        "config.json cannot be read, or is not a JSON object.",
        "Copy the file again.",
    ),
    "hf-config-architectures": (
        "config.json does not name the model's class in `architectures`.",
        "Use the config.json that was published with the model.",
    ),
    "hf-config-field": (
        "A field of config.json that gives the model's geometry is missing, of another type, or contradicts another: "
        "`layer_types` has an entry for each of `num_hidden_layers`.",
        "Correct config.json.",
    ),
    "tokenizer-path-empty": (
        "`actor.tokenizer.tokenizer_model` is empty.",
        "Set it to the model's directory, by an interpolation of the model's key.",
    ),
    "tokenizer-files": (
        "The tokenizer's directory has no file of a tokenizer.",
        "Give the directory that holds tokenizer.json.",
    ),
    "tokenizer-json": (
        "A JSON file of the tokenizer cannot be read, or is not a JSON object.",
        "Copy the file again.",
    ),
    "gpu-memory": (
        "`check --memory`: the estimate for a rank exceeds the share of a GPU's memory that may be planned.",
        "Make the change that the message names; it is the smallest that fits.",
    ),
    "no-estimate": (
        "`fit` cannot estimate memory: the model is unknown, or its parameters are not counted.",
        "Correct the errors above, or use a model of a family that the README names.",
    ),
    "init-refused": (
        "`init` cannot write a config for this model or to this file; the message says why.",
        "Do what the message says.",
    ),
    "run-exists": (
        "The run's directory holds the checkpoints of an earlier run, with which those of a new one would be mixed.",
        "Continue that run with `runner.resume_dir=auto`, or set another `runner.experiment_name`.",
    ),
    "incomplete-environment": (
        "The environment that `check` runs in lacks what a run needs; the run itself would refuse to start here.",
        "Type the line that the message shows, unless the run takes place elsewhere.",
    ),
    "one-host": (
        "`cluster.num_nodes` is above 1, and the command on its own starts ranks on one host only.",
        "Start the run on every host with torchrun, as the message spells out, or set `cluster.num_nodes=1`.",
    ),
}
"""Cause and fix of the problems that no rule finds."""
