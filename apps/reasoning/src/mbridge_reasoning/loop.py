"""A reasoning run on one rank, from start to end. `cli.main` starts it on every rank."""

import time
from pathlib import Path

import torch
from mbridge_ckpt import Checkpoint, find_resume, open_checkpoint
from mbridge_config import ReasoningConfig, hf_directory, tokenizer_directory
from mbridge_train.checkpoint import load_checkpoint, load_start
from mbridge_train.from_config import DTYPES, build_engine, save_settings
from mbridge_train.processes import broadcast, join, leave, seed_all
from mbridge_train.rank_state import current_layout
from mbridge_train.reference import Snapshot
from mbridge_train.saving import RunSaver
from transformers import AutoTokenizer

from mbridge_reasoning.data import Problem, tokenize_problems
from mbridge_reasoning.output import RunOutput
from mbridge_reasoning.quickstart import prepare_quickstart
from mbridge_reasoning.reward import RewardPool
from mbridge_reasoning.rollout import TransformersRollout, end_token_ids
from mbridge_reasoning.sampler import ProblemSampler
from mbridge_reasoning.start import read_data_files, run_directory
from mbridge_reasoning.tasks import make_problems
from mbridge_reasoning.trainer import GRPOTrainer


def run(config: ReasoningConfig, command: list[str]) -> None:
    """Train as `config` says.

    Args:
        config: checked. Rank 0's is used everywhere, since `${now:}` and the like differ between processes.
        command: the words of the command line that started the run, to show how to resume it.
    """
    device = join(config.actor.megatron.distributed_timeout_minutes)
    try:
        config = broadcast(_named(config))
        seed_all(config.actor.seed)
        gym = config.data.reasoning_gym
        uses_gym = config.reward.reward_type == "reasoning_gym"
        with RewardPool(
            timeout=config.reward.timeout,
            task=gym.task if uses_gym else None,
            parameters=gym.parameters if uses_gym else None,
        ) as rewards:
            _run(config, command, device, rewards)
    finally:
        leave()


def _run(config: ReasoningConfig, command: list[str], device: torch.device, rewards: RewardPool) -> None:
    train, validation = _read_data(config)
    output = RunOutput(config, run_directory(config), command)
    if config.quickstart.enabled:
        prepare_quickstart(config, train, output)
    model_directory = hf_directory(config)
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_directory(config),
        use_fast=config.actor.tokenizer.use_fast,
        trust_remote_code=config.actor.tokenizer.trust_remote_code,
    )
    train, validation = (
        tokenize_problems(
            problems,
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            apply_chat_template=config.data.apply_chat_template,
            filter_long=config.data.filter_prompt_by_length,
        )
        if problems
        else []
        for problems in (train, validation)
    )
    sampler = ProblemSampler(
        len(train), batch_size=config.data.rollout_batch_size, seed=config.data.seed, shuffle=config.data.shuffle
    )
    steps = config.runner.max_steps if config.runner.max_steps > 0 else sampler.steps(config.runner.max_epochs)

    resume = _find_resume(config, output)
    engine = build_engine(
        config.actor,
        config.runner,
        model_directory,
        optimizer_steps=steps * config.algorithm.n_minibatches,
    )
    if not config.actor.megatron.use_hf_ckpt and config.actor.model.megatron_checkpoint:
        load_start(engine, Path(config.actor.model.megatron_checkpoint).expanduser())
    # Before a resume: the reference is the policy that the run began with.
    reference = Snapshot(engine) if config.algorithm.kl_beta > 0 else None
    first = 0
    if resume is not None:
        if resume.layout != current_layout():
            output.message(f"{resume.path} was written with {resume.layout}; this run has {current_layout()}")
        state = load_checkpoint(engine, resume)
        first = state["step"]
        sampler.load_state_dict(state["sampler"])
    trainer = GRPOTrainer(
        config,
        engine=engine,
        rollout=TransformersRollout(
            model_directory,
            end_tokens=end_token_ids(model_directory, tokenizer),
            device=device,
            dtype=DTYPES[config.actor.model.precision],
            batch_size=config.rollout.max_running_requests,
            trust_remote_code=config.actor.tokenizer.trust_remote_code,
        ),
        rewards=rewards,
        tokenizer=tokenizer,
        reference=reference,
        show=output.message,
    )

    checkpoints = RunSaver(engine, output.checkpoints, save_settings(config.actor, config.runner), resumed_from=resume)

    with output.recording(total_steps=steps, first_step=first), checkpoints:
        if first == 0 and validation:
            output.step(0, trainer.validate(validation))
        for number in range(first + 1, steps + 1):
            problems = [train[index] for index in sampler.next_batch()]
            metrics = trainer.step(number, problems)
            checkpoints.check()
            last = number == steps
            if validation and (last or _is_due(number, config.runner.val_check_interval)):
                started = time.perf_counter()
                metrics |= trainer.validate(validation) | {"time/validation": time.perf_counter() - started}
            if checkpoints.is_due(number, last=last):
                started = time.perf_counter()
                state = {"step": number, "sampler": sampler.state_dict()}
                checkpoints.save(number, last=last, loop_state=state, metrics=metrics)
                metrics["time/save"] = time.perf_counter() - started
            output.step(number, metrics)


def _named(config: ReasoningConfig) -> ReasoningConfig:
    """A second quickstart gets a name of its own, so that the README's command works twice."""
    runner = config.runner
    if not config.quickstart.enabled or runner.resume_dir is not None:
        return config
    name, number = runner.experiment_name, 1
    while (run_directory(config) / "checkpoints").exists():
        number += 1
        runner.experiment_name = f"{name}-{number}"
    return config


def _read_data(config: ReasoningConfig) -> tuple[list[Problem], list[Problem]]:
    if config.data.type == "reasoning_gym":
        gym = config.data.reasoning_gym
        return make_problems(
            gym.task or "",
            train_size=gym.train_size,
            validation_size=gym.validation_size,
            seed=config.data.seed,
            parameters=gym.parameters,
        )
    return read_data_files(config)


def _find_resume(config: ReasoningConfig, output: RunOutput) -> Checkpoint | None:
    """The checkpoint to go on from; None starts at step 0."""
    wanted = config.runner.resume_dir
    if wanted is None:
        return None
    if wanted != "auto":
        return open_checkpoint(Path(wanted).expanduser())
    found = find_resume(output.checkpoints)
    for item in found.passed_over:
        output.message(f"not resuming from {item.path}: {item.reason}")
    if found.checkpoint is None:
        output.message(f"no checkpoint to resume from in {output.checkpoints}; starting at step 0")
    return found.checkpoint


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
