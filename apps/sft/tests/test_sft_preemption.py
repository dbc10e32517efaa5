"""A run on two ranks that SIGTERM stops goes on as if it had not been stopped."""

from pathlib import Path

import pytest

from testing.preempted_runs import check_preemption


@pytest.mark.parametrize(("to", "workers"), [("rank", 0), pytest.param("all", 1, marks=pytest.mark.slow)])
def test_sigterm_to_ranks_saves_and_resumes(tmp_path: Path, to: str, workers: int) -> None:
    check_preemption(
        "mbridge_sft.cli",
        tmp_path,
        to,
        "launcher.nproc_per_node=2",
        "runner.checkpoint.async_save=true",
        "runner.val_check_interval=-1",
        "actor.lr_sched.lr_warmup_iters=2",
        "actor.global_batch_size=4",
        f"data.num_workers={workers}",
        "data.val_data_paths=[]",
        "quickstart.hidden_size=64",
        "quickstart.num_attention_heads=2",
        "quickstart.num_key_value_heads=2",
    )
