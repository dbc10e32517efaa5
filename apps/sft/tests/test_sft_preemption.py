"""A run on two ranks that one rank's SIGTERM stops goes on as if it had not been stopped."""

from pathlib import Path

from testing.preempted_runs import check_preemption


def test_sigterm_to_one_rank_saves_and_resumes(tmp_path: Path) -> None:
    check_preemption(
        "mbridge_sft.cli",
        tmp_path,
        "rank",
        "launcher.nproc_per_node=2",
        "runner.checkpoint.async_save=true",
        "runner.val_check_interval=-1",
        "actor.lr_sched.lr_warmup_iters=2",
        "actor.global_batch_size=4",
        "data.num_workers=0",
        "data.val_data_paths=[]",
        "quickstart.hidden_size=64",
        "quickstart.num_attention_heads=2",
        "quickstart.num_key_value_heads=2",
    )
