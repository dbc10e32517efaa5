"""Move aliases to their key, and fill in what null stands for. Nothing else in the project resolves defaults."""

from typing import Any

from mbridge_config.compat.keys import known_keys, set_value, value_of
from mbridge_config.load.validate import Unfit, check_range, fit
from mbridge_config.problems import Where
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.reasoning import ReasoningConfig
from mbridge_config.schema.run_kinds import RunConfig
from mbridge_config.schema.sft import SFTConfig


def fill_defaults(config: Any) -> None:
    """Move aliases and fill null keys of `config` in place; conflicts go to `config.provenance.problems`."""
    _move_aliases(config, config.provenance)
    if isinstance(config, SFTConfig):
        _fill_sft(config)
    _fill_common(config)
    if isinstance(config, ReasoningConfig):
        _fill_reasoning(config)


def _move_aliases(config: Any, provenance: Provenance) -> None:
    """Give each key the value of its alias if only the alias was set, or only it on the command line."""
    schema: type = type(config)
    keys = known_keys(schema)
    for path, info in keys.items():
        target = info.spec.alias_of
        if target is None or (raw := value_of(config, path)) is None:
            continue
        where, place = provenance.places.get(path), provenance.places.get(target)
        if _is_argument(place) and not _is_argument(where):  # the command line wins over files
            set_value(config, path, None)
            continue
        try:
            value = fit(not raw if info.spec.inverted else raw, keys[target].type, keys[target].spec)
            check_range(value, keys[target].spec)
        except Unfit as unfit:
            provenance.failed.add(target)
            provenance.report(unfit.identity, path, raw, unfit.reason, unfit.fix)
            continue
        wins = place is None or (_is_argument(where) and not _is_argument(place))
        if not wins and value_of(config, target) not in (None, value):
            reason = f"another spelling of {target}, which is {value_of(config, target)} at {place}"
            provenance.report("alias-conflict", path, raw, reason, f"remove {path}")
            continue
        set_value(config, target, value)
        if where is not None:
            provenance.places[target] = where


def _is_argument(place: Where | None) -> bool:
    return place is not None and place.argument is not None


def _fill_sft(config: SFTConfig) -> None:
    """Fill in the longest sequence (it has two names), the evaluation batch and the directory of the tokenizer."""
    actor, runner = config.actor, config.runner
    if actor.model.seq_length is not None and not config.provenance.was_set("runner.seq_length"):
        runner.seq_length = actor.model.seq_length
    actor.eval_batch_size = actor.eval_batch_size or actor.global_batch_size
    actor.tokenizer.tokenizer_model = actor.tokenizer.tokenizer_model or actor.model.model_path


def _fill_common(config: RunConfig) -> None:
    """Fill in token budget, directory and name of the logs, lengths, number formats, learning rates, weight decay."""
    runner, model, optim, schedule = config.runner, config.actor.model, config.actor.optim, config.actor.lr_sched
    runner.max_tokens_per_mbs = runner.max_tokens_per_mbs or runner.seq_length
    runner.logger.experiment_name = runner.logger.experiment_name or runner.experiment_name
    runner.logger.log_path = runner.logger.log_path or f"{runner.output_dir}/{runner.experiment_name}"
    model.seq_length = model.seq_length or runner.seq_length
    optim.bf16 = model.precision == "bf16" if optim.bf16 is None else optim.bf16
    optim.fp16 = model.precision == "fp16" if optim.fp16 is None else optim.fp16
    schedule.max_lr = optim.lr if schedule.max_lr is None else schedule.max_lr
    schedule.min_lr = optim.min_lr if schedule.min_lr is None else schedule.min_lr
    if schedule.start_weight_decay is None:
        schedule.start_weight_decay = optim.weight_decay
    if schedule.end_weight_decay is None:
        schedule.end_weight_decay = schedule.start_weight_decay


def _fill_reasoning(config: ReasoningConfig) -> None:
    """Fill in clip ranges, the longest answer, and of global batch and number of minibatches the one that is not set.

    Minibatches are equal shares of the step's answers.
    """
    actor, algorithm, data = config.actor, config.algorithm, config.data
    if algorithm.clip_ratio_low is None:
        algorithm.clip_ratio_low = algorithm.ratio_clip_eps
    if algorithm.clip_ratio_high is None:
        algorithm.clip_ratio_high = algorithm.ratio_clip_eps
    if algorithm.sampling_params.max_new_tokens is None:
        algorithm.sampling_params.max_new_tokens = max(1, config.runner.seq_length - data.max_prompt_length)
    answers = data.rollout_batch_size * algorithm.group_size
    if actor.global_batch_size is None:
        actor.global_batch_size = max(1, answers // algorithm.n_minibatches)
    elif not config.provenance.was_set("algorithm.n_minibatches"):
        algorithm.n_minibatches = max(1, answers // actor.global_batch_size)
