"""A reasoning run on one rank, from start to end. `cli.main` starts it on every rank."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from mbridge_config import (
    HFFacts,
    ReasoningConfig,
    hf_directory,
    refuse_short_run,
    run_directory,
    run_length,
    take_free_name,
    tokenizer_directory,
)
from mbridge_train.build import DTYPES, build_engine, save_settings
from mbridge_train.checkpoint.resume import find_checkpoint, restore, say_if_finished
from mbridge_train.checkpoint.run_saver import RunSaver, is_due
from mbridge_train.data.errors import DataError
from mbridge_train.data.hf_files import from_directory
from mbridge_train.data.order import RowOrder, require_same_data
from mbridge_train.engine.throughput import Throughput
from mbridge_train.engine.weight_snapshot import Snapshot
from mbridge_train.run.output import RunOutput
from mbridge_train.run.preemption import Preemption
from mbridge_train.run.process_group import broadcast, join, leave, seed_all
from transformers import AutoTokenizer

from mbridge_reasoning.data.gym import make_prompts
from mbridge_reasoning.data.prompts import Prompt, read_data_files, tokenize_prompts
from mbridge_reasoning.metrics import DISPLAY
from mbridge_reasoning.quickstart.prepare import prepare_quickstart
from mbridge_reasoning.rewards.pool import RewardPool
from mbridge_reasoning.rollout.transformers import TransformersRollout, end_token_ids
from mbridge_reasoning.trainer import GRPOTrainer


def run(config: ReasoningConfig, command: list[str]) -> None:
    """Train as `config` says.

    Args:
        config: checked. Rank 0's is used everywhere, since `${now:}` and similar values differ between processes.
        command: the words of the command line that started the run, to show how to resume it.
    """
    device = join(config.actor.megatron.distributed_timeout_minutes)
    try:
        take_free_name(config)
        config = broadcast(config)
        seed_all(config.actor.seed)
        with RewardPool.of(config) as rewards:
            _run(config, command, device, rewards)
    finally:
        leave()


def _run(config: ReasoningConfig, command: list[str], device: torch.device, rewards: RewardPool) -> None:
    train, validation = _read_data(config)
    output = RunOutput(config, run_directory(config), command, DISPLAY)
    if config.quickstart.enabled:
        prepare_quickstart(config, train, output)
    model_directory = hf_directory(config)
    tokenizer = from_directory(
        AutoTokenizer,
        tokenizer_directory(config),
        "tokenizer",
        use_fast=config.actor.tokenizer.use_fast,
        trust_remote_code=config.actor.tokenizer.trust_remote_code,
    )
    sets = {"training": train, "validation": validation}
    for name, prompts in sets.items():
        if prompts:
            sets[name] = tokenize_prompts(
                prompts,
                tokenizer,
                max_prompt_length=config.data.max_prompt_length,
                apply_chat_template=config.data.apply_chat_template,
                filter_long=config.data.filter_prompt_by_length,
            )
        if missing := len(prompts) - len(sets[name]):
            output.message(
                f"left out {missing} of {len(prompts)} {name} prompts that are longer than "
                f"data.max_prompt_length={config.data.max_prompt_length} tokens"
            )
    train, validation = sets.values()
    order = RowOrder(
        size=len(train),
        batch_size=config.data.rollout_batch_size,
        seed=config.data.seed if config.data.shuffle else None,
    )
    refuse_short_run(config, rows=len(train))  # again, since long prompts may have been left out
    length = run_length(config, rows=len(train))
    steps = length.steps

    resume = find_checkpoint(config.runner.resume_dir, output.checkpoints, output.message)
    engine = build_engine(config.actor, config.runner, model_directory, optimizer_steps=length.optimizer_steps)
    # Taken before resuming, because the reference is the policy that the run began with.
    reference = Snapshot(engine) if config.algorithm.kl_beta > 0 else None
    data_state = _data_state(config, train)
    first = 0
    if resume is not None:
        state = restore(engine, resume, ("step", "data"), output.message)
        require_same_data(state["data"], data_state)
        first = state["step"]
        say_if_finished(length, step=first, say=output.message)
    trainer = GRPOTrainer(
        config=config,
        engine=engine,
        rollout=TransformersRollout(
            model_directory,
            end_tokens=end_token_ids(model_directory, tokenizer),
            device=device,
            dtype=DTYPES[config.actor.model.precision],
            batch_size=config.rollout.max_running_requests,
            rank=torch.distributed.get_rank(),
            world_size=torch.distributed.get_world_size(),
            trust_remote_code=config.actor.tokenizer.trust_remote_code,
        ),
        rewards=rewards,
        tokenizer=tokenizer,
        reference=reference,
        throughput=Throughput(HFFacts.load(model_directory), config.actor.model),
        show=output.message,
    )

    checkpoints = RunSaver(engine, output.checkpoints, save_settings(config.actor, config.runner), resumed_from=resume)

    with (
        Preemption(config.runner.preemption_seconds) as preemption,
        output.recording(total_steps=steps, first_step=first, resumed_from=resume),
        checkpoints,
    ):
        if first == 0 and validation:
            output.step(0, trainer.validate(validation))
        for number in range(first + 1, steps + 1):
            prompts = [train[index] for index in order.rows(number - 1)]
            with output.profiler.step(number):
                metrics = trainer.step(number, prompts)
            checkpoints.check()
            last = number == steps
            is_validated = last or (is_due(number, config.runner.val_check_interval) and not preemption.agreed())
            if validation and is_validated:
                started = time.perf_counter()
                metrics |= trainer.validate(validation) | {"time/validation": time.perf_counter() - started}
            output.is_preempted = preempted = preemption.agreed() and not last
            if checkpoints.is_due(number, last=last or preempted):
                started = time.perf_counter()
                state = {"step": number, "data": data_state}
                checkpoints.save(number, last=last, loop_state=state, metrics=metrics, preempted=preempted)
                metrics["time/save"] = time.perf_counter() - started
            output.step(number, metrics)
            if preempted:
                break


def _data_state(config: ReasoningConfig, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the facts that determine the prompts of each step."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.tokens, prompt.solutions)).encode())
    return {
        "rows": len(prompts),
        "data.seed": config.data.seed,
        "data.shuffle": config.data.shuffle,
        "data.rollout_batch_size": config.data.rollout_batch_size,
        "the SHA-256 of prompts and solutions": digest.hexdigest(),
    }


def _read_data(config: ReasoningConfig) -> tuple[list[Prompt], list[Prompt]]:
    if config.data.type != "reasoning_gym":
        return read_data_files(config)
    gym = config.data.reasoning_gym
    # Rank 0 makes them for all ranks, since a task's draws may depend on more than its seed.
    made: tuple[list[Prompt], list[Prompt]] | DataError | None = None
    if torch.distributed.get_rank() == 0:
        try:
            made = make_prompts(
                gym.task or "",
                train_size=gym.train_size,
                validation_size=gym.validation_size,
                seed=config.data.seed,
                parameters=gym.parameters,
            )
        except DataError as error:
            made = error
    made = broadcast(made)
    assert made is not None
    if isinstance(made, DataError):
        raise made
    return made
