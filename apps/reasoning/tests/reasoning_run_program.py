"""Runs of the app, one after the other in one process, since importing Megatron takes longer than any of them.

    python reasoning_run_program.py DIRECTORY

Everything lies in DIRECTORY afterwards; `test_reasoning_run.py` reads it. The runs are of the quickstart's kind, cut
short, with a reference policy, minibatches and shuffled answers.
"""

import shutil
import sys
from pathlib import Path

from mbridge_reasoning import cli

SHORT = (
    "runner.max_steps=4",
    "runner.save_interval=2",
    "runner.val_check_interval=2",
    "algorithm.group_size=4",
    "algorithm.n_minibatches=2",
    "algorithm.kl_beta=0.01",
    "algorithm.entropy_bonus=0.001",
    "algorithm.loss_agg_func=seq-mean-token-mean",
    "algorithm.sampling_params.max_new_tokens=16",
    "data.rollout_batch_size=6",
    "data.reasoning_gym.train_size=200",
    "data.reasoning_gym.validation_size=32",
    "actor.micro_batch_size=5",
    "runner.enable_dynamic_batch_size=true",
    "actor.optim.lr=1e-3",
    "actor.lr_sched.lr_warmup_iters=3",
    "quickstart.warmup_steps=20",
    "quickstart.warmup_short_steps=5",
    "quickstart.warmup_batch_size=8",
)


def run(name: str, directory: Path, *overrides: str) -> None:
    """One run named `name`; a mistake ends the program."""
    model = f"actor.megatron.ckpt_convertor.hf_model_path={directory / 'model'}"
    sys.argv = ["mbridge-reasoning", *SHORT, f"runner.output_dir={directory}", model]
    sys.argv += [f"runner.experiment_name={name}", *overrides]
    print(f"--- {name} {' '.join(overrides)}", flush=True)
    code = cli.main()
    if code != 0:
        sys.exit(f"run {name} ended with exit code {code}")


def main() -> None:
    directory = Path(sys.argv[1])
    run("unbroken", directory)

    run("stopped", directory, "runner.max_steps=2")
    run("stopped", directory, "runner.resume_dir=auto")

    # Exact resumption needs the Megatron part alone.
    half = directory / "stopped" / "checkpoints" / "global_step_2"
    shutil.rmtree(half / "actor" / "hf_model")
    run("elsewhere", directory, f"runner.resume_dir={half}")

    last = directory / "unbroken" / "checkpoints" / "global_step_4"
    one = ("runner.max_steps=1", "quickstart.enabled=false")
    run("from-hf", directory, *one, f"actor.megatron.ckpt_convertor.hf_model_path={last / 'actor' / 'hf_model'}")
    megatron = ("actor.megatron.mbridge=false", "actor.megatron.use_hf_ckpt=false")
    run("from-megatron", directory, *one, *megatron, f"actor.model.megatron_checkpoint={last}")

    run("unbroken", directory, "runner.max_steps=1")


if __name__ == "__main__":
    main()
