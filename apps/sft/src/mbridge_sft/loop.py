"""An SFT run on one rank, from start to end. `cli.main` runs it on every rank."""

import time
from typing import Any

from mbridge_config import (
    HFFacts,
    SFTConfig,
    checkpoint_directory,
    hf_directory,
    refuse_short_run,
    run_directory,
    run_length,
    take_free_name,
    tokenizer_directory,
)
from mbridge_model import Freeze
from mbridge_train.build import build_engine, save_settings
from mbridge_train.checkpoint.load import load_model
from mbridge_train.checkpoint.resume import find_checkpoint, restore, say_if_finished
from mbridge_train.checkpoint.run_saver import RunSaver, is_due
from mbridge_train.data.encode import Encoder
from mbridge_train.data.errors import DataError
from mbridge_train.data.examples import Examples
from mbridge_train.data.images import PixelLimits
from mbridge_train.data.order import require_same_data
from mbridge_train.engine.engine import Engine
from mbridge_train.engine.throughput import Throughput
from mbridge_train.run.output import RunOutput
from mbridge_train.run.preemption import Preemption
from mbridge_train.run.process_group import broadcast, join, leave, seed_all

from mbridge_sft.display import DISPLAY, example_grid
from mbridge_sft.quickstart.prepare import prepare_quickstart
from mbridge_sft.start import read_data
from mbridge_sft.trainer import SFTTrainer


def run(config: SFTConfig, command: list[str]) -> None:
    """Train, or only evaluate, as the checked `config` says.

    All ranks use that of rank 0, since `${now:}` and the like differ between processes. `command` holds the words of
    the command line, to show how to resume the run.
    """
    join(config.actor.megatron.distributed_timeout_minutes)
    try:
        if not config.runner.only_eval:
            take_free_name(config)
        config = broadcast(config)
        seed_all(config.actor.seed)
        (_evaluate if config.runner.only_eval else _train)(config, command)
    finally:
        leave()


def _train(config: SFTConfig, command: list[str]) -> None:
    output = RunOutput(config, run_directory(config), command, DISPLAY)
    if config.quickstart.enabled:
        prepare_quickstart(config, output.message)
    training, evaluation = read_data(config)
    assert training is not None  # a rule
    runner = config.runner
    refuse_short_run(config, rows=len(training))  # only now, since the quickstart has just made them
    length = run_length(config, rows=len(training))
    steps = length.steps

    resume = find_checkpoint(runner.resume_dir, output.checkpoints, output.message)
    engine = _engine(config, optimizer_steps=length.optimizer_steps)
    data_state = _data_state(config, training)
    first, bad_rows = 0, ()
    if resume is not None:
        state = restore(engine, resume, ("step", "data", "bad_rows"), output.message)
        require_same_data(state["data"], data_state)
        first, bad_rows = state["step"], state["bad_rows"]
        say_if_finished(length, step=first, say=output.message)
    trainer = _trainer(config, engine, output)
    checkpoints = RunSaver(engine, output.checkpoints, save_settings(config.actor, runner), resumed_from=resume)

    with (
        Preemption(runner.preemption_seconds) as preemption,
        output.recording(total_steps=steps, first_step=first, resumed_from=resume),
        checkpoints,
    ):
        if first == 0 and evaluation is not None:
            output.step(0, _evaluated(trainer, evaluation, output))
        batches = trainer.batches(training, first_step=first, bad_rows=bad_rows)
        started = time.perf_counter()
        for number, batch in zip(range(first + 1, steps + 1), batches, strict=False):
            waited = time.perf_counter() - started
            with output.profiler.step(number):
                metrics = trainer.step(batch)
            metrics |= {"time/data": waited, "bad_rows": float(len(batches.bad_rows))}
            checkpoints.check()
            seconds = time.perf_counter() - started
            metrics |= {"time/other": seconds - waited - metrics["time/train"], "time/step": seconds}
            last = number == steps
            is_validated = last or (is_due(number, runner.val_check_interval) and not preemption.agreed())
            if evaluation is not None and is_validated:
                metrics |= _evaluated(trainer, evaluation, output)
            output.is_preempted = preempted = preemption.agreed() and not last
            if checkpoints.is_due(number, last=last or preempted):
                started = time.perf_counter()
                state = {"step": number, "data": data_state, "bad_rows": list(batches.bad_rows)}
                checkpoints.save(number, last=last, loop_state=state, metrics=metrics, preempted=preempted)
                metrics["time/save"] = time.perf_counter() - started
            output.step(number, metrics)
            if preempted:
                break
            started = time.perf_counter()


def _evaluate(config: SFTConfig, command: list[str]) -> None:
    """Evaluate. The output goes beside that of a training run of the same name, which stays unchanged."""
    output = RunOutput(config, run_directory(config) / "evaluation", command, DISPLAY)
    if config.quickstart.enabled:
        prepare_quickstart(config, output.message)
    _, evaluation = read_data(config)
    assert evaluation is not None  # a rule
    checkpoint = find_checkpoint(config.runner.resume_dir, checkpoint_directory(config), output.message)
    if checkpoint is None and config.runner.resume_dir is not None:  # or the figures would be those of other weights
        raise DataError(
            f"there is no checkpoint to evaluate in {checkpoint_directory(config)}; correct runner.experiment_name or "
            "runner.output_dir, or set runner.resume_dir=null to evaluate the model of actor.model.model_path"
        )
    engine = _engine(config, optimizer_steps=None)
    step = 0
    if checkpoint is not None:
        load_model(engine, checkpoint)
        step = checkpoint.step
    trainer = _trainer(config, engine, output)
    with output.recording(total_steps=step, first_step=0):
        output.step(step, _evaluated(trainer, evaluation, output))


def _evaluated(trainer: SFTTrainer, examples: Examples, output: RunOutput) -> dict[str, float]:
    """Evaluate, have the report show examples, and return the metrics."""
    started = time.perf_counter()
    result = trainer.evaluate(examples)
    if output.is_writer:
        output.report_section = example_grid(result.shown)
    return result.metrics | {"time/validation": time.perf_counter() - started}


def _trainer(config: SFTConfig, engine: Engine, output: RunOutput) -> SFTTrainer:
    data = config.data
    encoder = Encoder(
        tokenizer_directory(config),
        max_length=config.runner.seq_length,
        train_on=data.train_on,
        limits=PixelLimits(min_pixels=data.min_pixels, max_pixels=data.max_pixels, oversized=data.oversized),
        trust_remote_code=config.actor.tokenizer.trust_remote_code,
    )
    throughput = Throughput(HFFacts.load(hf_directory(config)), config.actor.model)
    return SFTTrainer(config=config, engine=engine, encoder=encoder, throughput=throughput, say=output.message)


def _engine(config: SFTConfig, *, optimizer_steps: int | None) -> Engine:
    actor, model = config.actor, config.actor.model
    freeze = Freeze(
        language_model=model.freeze_language_model,
        vision_model=model.freeze_vision_model,
        vision_projection=model.freeze_vision_projection,
    )
    return build_engine(actor, config.runner, hf_directory(config), optimizer_steps=optimizer_steps, freeze=freeze)


def _data_state(config: SFTConfig, training: Examples) -> dict[str, Any]:
    """Return the values that decide which rows a step has."""
    data = config.data
    return {
        "rows": len(training),
        "data.seed": data.seed,
        "data.shuffle": data.shuffle,
        "actor.global_batch_size": config.actor.global_batch_size,
        "the fingerprint of the rows and their order": training.fingerprint(),
    }
