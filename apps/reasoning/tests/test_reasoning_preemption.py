"""A run that SIGTERM stops goes on as if it had not been stopped."""

from pathlib import Path

from testing.preempted_runs import check_preemption


def test_sigterm_to_the_launcher_saves_and_resumes(tmp_path: Path) -> None:
    check_preemption(
        "mbridge_reasoning.cli",
        tmp_path,
        "launcher",
        "runner.val_check_interval=-1",
        "actor.micro_batch_size=4",
        "algorithm.group_size=4",
        "algorithm.sampling_params.max_new_tokens=16",
        "data.rollout_batch_size=4",
        "data.reasoning_gym.train_size=40",
        "data.reasoning_gym.validation_size=4",
        "actor.lr_sched.lr_warmup_iters=2",
        "quickstart.warmup_steps=5",
        "quickstart.warmup_short_steps=2",
        "quickstart.warmup_batch_size=8",
        f"actor.megatron.ckpt_convertor.hf_model_path={tmp_path / 'model'}",
    )
