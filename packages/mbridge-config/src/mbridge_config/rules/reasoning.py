"""Rules of RL runs alone: sampling, groups and minibatches, reference, reward, prompts."""

from collections.abc import Iterable

from mbridge_config.facts.directories import hf_key
from mbridge_config.paths import is_directory, is_file, same_place, user_path
from mbridge_config.problems import Severity
from mbridge_config.rules.base import Context, Finding, rule
from mbridge_config.rules.batches import GLOBAL, SEQUENCE
from mbridge_config.rules.run import TRAIN, VALIDATION
from mbridge_config.rules.start import CHECKPOINT, RESUME, USE_HF
from mbridge_config.schema.keys import get

KL = "algorithm.kl_beta"
ROLLOUT_MODEL = "rollout.model.model_path"
GROUP = "algorithm.group_size"
MINIBATCHES = "algorithm.n_minibatches"
PROMPTS = "data.rollout_batch_size"
PROMPT = "data.max_prompt_length"
NEW = "algorithm.sampling_params.max_new_tokens"
LEAST = "algorithm.sampling_params.min_new_tokens"
CLIP, CLIP_LOW = "algorithm.ratio_clip_eps", "algorithm.clip_ratio_low"
TYPE = "data.type"
TASK = "data.reasoning_gym.task"
FUNCTION = "reward.function"
_SUFFIXES = (".json", ".jsonl")


@rule("reference-weights", CHECKPOINT, USE_HF, RESUME, KL)
def reference(context: Context) -> Iterable[Finding]:
    """A run with a KL penalty is resumed, but its initial weights, which are the reference, are not named.

    Fix: name the checkpoint that the run began with, or set `algorithm.kl_beta=0`.
    """
    config = context.config
    if config.actor.megatron.use_hf_ckpt or config.actor.model.megatron_checkpoint or not config.runner.resume_dir:
        return
    if config.algorithm.kl_beta > 0:
        reason = f"{KL} is above 0, and its reference policy is the one that the run began with, which is not named"
        yield Finding(CHECKPOINT, reason, f"set {CHECKPOINT} to where the run began, or {KL}=0")


@rule("rollout-model", ROLLOUT_MODEL, "actor.megatron.ckpt_convertor.hf_model_path")
def rollout_model(context: Context) -> Iterable[Finding]:
    """The model that generates is not the model that is trained.

    Fix: set one from the other by an interpolation, or remove one.
    """
    config = context.config
    generating, trained = config.rollout.model.model_path, get(config, hf_key(config))
    if generating and trained and not same_place(user_path(generating), user_path(trained)):
        reason = f"the trained model is another one: {hf_key(config)} is {trained}"
        yield Finding(ROLLOUT_MODEL, reason, f"set {hf_key(config)}=${{{ROLLOUT_MODEL}}}, or remove one")


@rule("minibatches", MINIBATCHES, GROUP, PROMPTS, GLOBAL)
def minibatches(context: Context) -> Iterable[Finding]:
    """The answers of one step (rollout_batch_size x group_size) cannot be cut into equal minibatches, or
    global_batch_size and n_minibatches say different things.

    Fix: set one of the two; the other follows.
    """
    config = context.config
    count, size = config.algorithm.n_minibatches, config.actor.global_batch_size
    prompts, group = config.data.rollout_batch_size, config.algorithm.group_size
    answers = prompts * group
    spelled = f"{PROMPTS} {prompts} x {GROUP} {group} = {answers} answers a step"
    if not config.provenance.was_set(GLOBAL) or config.provenance.was_set(MINIBATCHES):
        if answers % count:
            yield Finding(
                MINIBATCHES, f"{spelled} cannot be cut into {count} equal minibatches", f"use a divisor of {answers}"
            )
        elif size * count != answers:
            yield Finding(
                GLOBAL,
                f"{spelled} in {MINIBATCHES} {count} minibatches make {answers // count} each, not {size}",
                f"set {GLOBAL}={answers // count}, or remove it or {MINIBATCHES}",
            )
    elif answers % size:
        yield Finding(GLOBAL, f"{spelled} are not a multiple of it", f"use a divisor of {answers}")


@rule("group-of-one", GROUP)
def group_of_one(context: Context) -> Iterable[Finding]:
    """Rewards are compared within a group of answers to one prompt, but a group has only one answer.

    Fix: set `algorithm.group_size` to 2 or more.
    """
    if context.config.algorithm.group_size == 1:
        reason = "GRPO compares the answers of a group; with one answer every advantage is 0"
        yield Finding(GROUP, reason, f"set {GROUP} to 2 or more")


@rule("greedy-group", "algorithm.sampling_params.use_greedy", GROUP)
def greedy_group(context: Context) -> Iterable[Finding]:
    """Greedy decoding gives every answer of a group the same text.

    Fix: sample: `algorithm.sampling_params.use_greedy=false`.
    """
    algorithm = context.config.algorithm
    if algorithm.sampling_params.use_greedy and algorithm.group_size > 1:
        reason = "greedy answers to one prompt are all the same, so every advantage is 0"
        key = "algorithm.sampling_params.use_greedy"
        yield Finding(key, reason, f"set {key}=false", Severity.WARNING)


@rule("clip-range", CLIP, CLIP_LOW)
def clip_range(context: Context) -> Iterable[Finding]:
    """The clip range of both sides is above 1, and the lower side has none of its own.

    Fix: use 1 or less, or set `algorithm.clip_ratio_low`.
    """
    # A value of its own is in its range already; only what ratio_clip_eps put there is not.
    if context.config.algorithm.clip_ratio_low > 1:
        reason = f"{CLIP_LOW} is null, so this is the lower range, too, and a ratio cannot fall by more than 1"
        yield Finding(CLIP, reason, f"use 1 or less, or set {CLIP_LOW}")


@rule("prompt-length", SEQUENCE, PROMPT)
def prompt(context: Context) -> Iterable[Finding]:
    """A prompt of the allowed length leaves no room for an answer.

    Fix: lower `data.max_prompt_length`, or raise `runner.seq_length`.
    """
    longest, allowed = context.config.runner.seq_length, context.config.data.max_prompt_length
    if allowed >= longest:
        reason = f"a prompt of {allowed} tokens leaves no room for an answer in {SEQUENCE} {longest}"
        yield Finding(PROMPT, reason, f"set {PROMPT} below {longest}, or raise {SEQUENCE}")


@rule("answer-length", SEQUENCE, PROMPT, NEW)
def answer(context: Context) -> Iterable[Finding]:
    """The longest prompt and the longest answer together are longer than a sequence may be.

    Fix: lower `max_new_tokens`, or remove it; it is then what the prompt leaves.
    """
    longest, allowed = context.config.runner.seq_length, context.config.data.max_prompt_length
    new = context.config.algorithm.sampling_params.max_new_tokens
    if allowed < longest < allowed + new:
        reason = f"{PROMPT} {allowed} + {new} new tokens = {allowed + new}, more than {SEQUENCE} {longest}"
        fix = f"set {NEW} to {longest - allowed} or less, or write ${{subtract:${{{SEQUENCE}}},${{{PROMPT}}}}}"
        yield Finding(NEW, reason, fix)


@rule("least-answer-length", NEW, LEAST)
def least_answer(context: Context) -> Iterable[Finding]:
    """The shortest allowed answer is longer than the longest.

    Fix: lower `min_new_tokens`.
    """
    sampling = context.config.algorithm.sampling_params
    if sampling.min_new_tokens > sampling.max_new_tokens:
        yield Finding(LEAST, f"more than {NEW} {sampling.max_new_tokens}", f"use {sampling.max_new_tokens} or less")


@rule("critic-not-built", "critic")
def critic(context: Context) -> Iterable[Finding]:
    """A critic (PPO) was requested, which this version does not have.

    Fix: train without a critic: `algorithm.adv_type=grpo`.
    """
    if context.config.critic.get("use_critic_model"):
        fix = "set critic.use_critic_model=false and algorithm.adv_type=grpo"
        yield Finding("critic", "PPO with a critic is not built yet in this version of mbridge", fix)


@rule("rollout-backend", "rollout.rollout_backend")
def rollout_backend(context: Context) -> Iterable[Finding]:
    """A serving engine was requested; this version generates with transformers.

    Fix: nothing has to be done; `rollout.rollout_backend=transformers` silences it.
    """
    if context.config.rollout.rollout_backend != "transformers":
        reason = "this version generates with transformers, which gives the same answers more slowly"
        yield Finding("rollout.rollout_backend", reason, "set rollout.rollout_backend=transformers", Severity.WARNING)


@rule("train-data-missing", TYPE, TRAIN)
def train_data(context: Context) -> Iterable[Finding]:
    """The data come from files, but none is named.

    Fix: set `data.train_data_paths`, or `data.type=reasoning_gym`.
    """
    data = context.config.data
    if data.type == "math" and not data.train_data_paths:
        yield Finding(TRAIN, "there is nothing to train on", f"set {TRAIN}=[FILE.jsonl], or {TYPE}=reasoning_gym")


@rule("unused-data-files", TYPE, TRAIN, VALIDATION)
def unused_data_files(context: Context) -> Iterable[Finding]:
    """Data files are named, but the problems are made by reasoning-gym, so that the files are not read.

    Fix: set `data.type=math` to read the files, or remove the paths.
    """
    data = context.config.data
    for key, paths in ((TRAIN, data.train_data_paths), (VALIDATION, data.val_data_paths)):
        if data.type == "reasoning_gym" and paths:
            reason = f"{TYPE}=reasoning_gym makes the problems, so {paths[0]} is not read"
            yield Finding(key, reason, f"set {TYPE}=math, or {key}=[]", Severity.WARNING)


@rule("data-path", TYPE, TRAIN, VALIDATION)
def data_paths(context: Context) -> Iterable[Finding]:
    """A data file does not exist, or is neither json nor jsonl.

    Fix: correct the path; it is relative to where you run.
    """
    data = context.config.data
    if data.type != "math":
        return
    for key, paths in ((TRAIN, data.train_data_paths), (VALIDATION, data.val_data_paths)):
        for path in paths:
            file = user_path(path)
            if is_directory(file):
                yield Finding(key, f"{path} is a directory", "name the json or jsonl files in it")
            elif not is_file(file):
                yield Finding(key, f"there is no file {path}", "correct the path; it is relative to where you run")
            elif file.suffix not in _SUFFIXES:
                yield Finding(key, f"{path} is neither json nor jsonl", "write one JSON object a line into a .jsonl")


@rule("reasoning-gym-task", TYPE, TASK)
def task(context: Context) -> Iterable[Finding]:
    """The problems come from reasoning-gym, but no task is named.

    Fix: set `data.reasoning_gym.task`.
    """
    data = context.config.data
    if data.type == "reasoning_gym" and not data.reasoning_gym.task:
        yield Finding(TASK, f"{TYPE} is reasoning_gym, which needs a task", f"set {TASK}=basic_arithmetic or another")


@rule("reward-type", TYPE, "reward.reward_type")
def reward_type(context: Context) -> Iterable[Finding]:
    """The scorer of reasoning-gym was requested for data that it did not generate.

    Fix: score with `reward.reward_type=math`.
    """
    config = context.config
    if (
        config.reward.function is None
        and config.reward.reward_type == "reasoning_gym"
        and config.data.type != "reasoning_gym"
    ):
        reason = f"{TYPE} is {config.data.type}, whose answers reasoning-gym cannot score"
        yield Finding("reward.reward_type", reason, "set reward.reward_type=math")


@rule("reward-function", FUNCTION)
def reward_function(context: Context) -> Iterable[Finding]:
    """The user's own reward function is not named by a file or module and a name in it, or there is no such file.

    Fix: write `reward.function=path/to/file.py:name` or `module:name`; a path is relative to where you run.
    """
    spec = context.config.reward.function
    if spec is None:
        return
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        yield Finding(FUNCTION, "it does not name a function", f"write {FUNCTION}=path/to/file.py:name or module:name")
    elif place.endswith(".py") and not is_file(user_path(place)):
        yield Finding(FUNCTION, f"there is no file {place}", "correct the path; it is relative to where you run")


@rule("quickstart-width", "quickstart")
def quickstart_width(context: Context) -> Iterable[Finding]:
    """The model of the quickstart would have heads of another width than 32, the smallest that the kernels of serving
    engines support, or key-value heads that do not divide its query heads.

    Fix: set `quickstart.hidden_size` to 32 times the query heads, and a divisor of them as groups.
    """
    made = context.config.quickstart
    if not made.enabled:
        return
    if made.hidden_size != 32 * made.num_attention_heads:
        reason = f"{made.num_attention_heads} query heads of width 32 make {32 * made.num_attention_heads}"
        fix = f"set quickstart.hidden_size={32 * made.num_attention_heads}, or change quickstart.num_attention_heads"
        yield Finding("quickstart.hidden_size", reason, fix)
    if made.num_attention_heads % made.num_key_value_heads:
        reason = f"{made.num_attention_heads} query heads cannot be shared by {made.num_key_value_heads} groups"
        yield Finding("quickstart.num_key_value_heads", reason, f"use a divisor of {made.num_attention_heads}")
