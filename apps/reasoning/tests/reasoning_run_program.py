"""Runs of the app, one after the other in one process, since importing Megatron takes longer than any of them.

    python reasoning_run_program.py DIRECTORY

Everything lies in DIRECTORY afterwards; `test_reasoning_run.py` reads it. The runs are of the quickstart's kind, cut
short, with a reference policy, minibatches and shuffled answers.
"""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from mbridge_ckpt import Layout, begin_save
from mbridge_config.cli.main import main as init
from mbridge_reasoning import cli

from testing.app_runs import files

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

OFFLOADED = ("weight", "grad", "optimizer")


def command(name: str, directory: Path, *overrides: str) -> list[str]:
    model = f"actor.megatron.ckpt_convertor.hf_model_path={directory / 'model'}"
    place = [f"runner.output_dir={directory}", f"runner.experiment_name={name}"]
    return ["mbridge-reasoning", *SHORT, *place, model, *overrides]


def run(name: str, directory: Path, *overrides: str) -> None:
    """One run named `name`; a mistake ends the program."""
    sys.argv = command(name, directory, *overrides)
    print(f"--- {name} {' '.join(overrides)}", flush=True)
    code = cli.main()
    if code != 0:
        sys.exit(f"run {name} ended with exit code {code}")


def mistake(name: str, directory: Path, *overrides: str) -> dict[str, object]:
    """One run that must fail: its exit code, what it says, and the files that it left or changed."""
    before = files(directory)
    sys.argv = command(name, directory, *overrides)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main()
    return {"code": code, "said": said.getvalue(), "changed": sorted(files(directory) ^ before)}


def files_of_mine(directory: Path) -> list[str]:
    """Settings of a run on problems of which the second is too long."""
    long = directory / "long.jsonl"
    long.write_text('{"prompt": "1+1", "solutions": ["2"]}\n{"prompt": "1 + 2 + 3 + 4 + 5", "solutions": ["15"]}\n')
    return [
        "quickstart.enabled=false",
        "data.type=math",
        "reward.reward_type=math",
        "data.max_prompt_length=8",
        f"data.train_data_paths=[{long}]",
    ]


def mistakes(directory: Path) -> None:
    """The mistakes that only a rank can find; `said.json` has what was said of them."""
    damaged = directory / "damaged" / "checkpoints" / "global_step_4"
    shutil.copytree(directory / "unbroken" / "checkpoints", damaged.parent, symlinks=True)
    file = damaged / "actor" / "iter_0000004" / "mp_rank_00" / "distrib_optim.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    other = directory / "other" / "checkpoints"
    with begin_save(other, step=1, layout=Layout(tensor=2)) as save:
        save.write_json("state/loop.json", {"step": 1})
        torch.save({}, save.file("actor/iter_0000001/mp_rank_00/model_optim_rng.pt"))
        save.commit({})

    said = {
        "prompt": mistake("p", directory, *files_of_mine(directory)),
        "damaged": mistake("damaged", directory, f"runner.resume_dir={damaged}"),
        "layout": mistake("l", directory, f"runner.resume_dir={other / 'global_step_1'}"),
        "task": mistake("t", directory, "data.reasoning_gym.task=basic_arithmetics"),
        "data": mistake(
            "d", directory, "data.reasoning_gym.train_size=201", f"runner.resume_dir={damaged.parent / 'global_step_2'}"
        ),
    }
    (directory / "said.json").write_text(json.dumps(said))
    # The damaged checkpoint is passed over; the run goes on from the one before.
    run("damaged", directory, "runner.resume_dir=auto", "runner.max_steps=3")


def own_reward(directory: Path, model: Path) -> None:
    """Two steps with the reward function and the data of the README, and one with a function that raises."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(# rewards\.py\n.*?)```", readme, re.DOTALL)
    (row,) = re.findall(r"```json\n(\{\"question\".*?\n)```", readme, re.DOTALL)
    file, data = directory / "rewards.py", directory / "questions.jsonl"
    file.write_text(code)
    data.write_text(row * 2)
    own = (
        "quickstart.enabled=false",
        f"actor.megatron.ckpt_convertor.hf_model_path={model}",
        "data.type=math",
        "data.prompt_key=question",
        f"data.train_data_paths=[{data}]",
        "data.rollout_batch_size=2",
        "runner.max_steps=2",
    )
    run("own-reward", directory, *own, f"reward.function={file}:brief")
    file.write_text("def broken(text, row, end):\n    return 1 / (len(row) - 3)\n")
    said = mistake("broken", directory, *own, f"reward.function={file}:broken")
    (directory / "broken.json").write_text(json.dumps(said))


def split(directory: Path) -> None:
    """The unbroken run's step 3 on two ranks, saved by all of them, and its step 4 on one again."""
    run(
        "split",
        directory,
        "launcher.nproc_per_node=2",
        "actor.model.tensor_model_parallel_size=2",
        "actor.model.sequence_parallel=true",
        "actor.megatron.use_dist_ckpt=true",
        "runner.max_steps=3",
        f"runner.resume_dir={directory / 'unbroken' / 'checkpoints' / 'global_step_2'}",
    )
    run("joined", directory, f"runner.resume_dir={directory / 'split' / 'checkpoints' / 'global_step_3'}")


def written(directory: Path, model: Path) -> None:
    """One step of the config that `mbridge-config init` writes for the model, with lengths that take no time."""
    file = directory / "init.yaml"
    if init(["init", "reasoning", "--model", str(model), "--output", str(file)]):
        sys.exit("the config that was written has errors")
    lengths = ("runner.seq_length=64", "data.max_prompt_length=32", "data.rollout_batch_size=2")
    short = ("runner.max_steps=1", "runner.val_check_interval=-1", f"runner.output_dir={directory}")
    sys.argv = ["mbridge-reasoning", "--config-name", str(file), *short, *lengths, "runner.experiment_name=init"]
    if code := cli.main():
        sys.exit(f"the config that was written ended with exit code {code}")


def main() -> None:
    directory = Path(sys.argv[1])
    run("unbroken", directory)

    run("stopped", directory, "runner.max_steps=2")
    # Half of it with everything off the device in turns, in validation and while saving too.
    run("stopped", directory, "runner.resume_dir=auto", *(f"actor.offload_{part}=true" for part in OFFLOADED))
    for steps in (4, 3):  # nothing is left to do
        run("stopped", directory, "runner.resume_dir=auto", f"runner.max_steps={steps}")

    # Exact resumption needs the Megatron part alone.
    half = directory / "stopped" / "checkpoints" / "global_step_2"
    shutil.rmtree(half / "actor" / "hf_model")
    run("elsewhere", directory, f"runner.resume_dir={half}")

    last = directory / "unbroken" / "checkpoints" / "global_step_4"
    one = ("runner.max_steps=1", "quickstart.enabled=false")
    profiled = ("actor.megatron.use_profiler=true", "actor.megatron.profiler={steps: [1], export_tensorboard: false}")
    weights = f"actor.megatron.ckpt_convertor.hf_model_path={last / 'actor' / 'hf_model'}"
    run("from-hf", directory, *one, *profiled, weights)
    megatron = ("actor.megatron.mbridge=false", "actor.megatron.use_hf_ckpt=false")
    run("from-megatron", directory, *one, *megatron, f"actor.model.megatron_checkpoint={last}")

    # One epoch of one batch ends it before max_steps do.
    run("unbroken", directory, "runner.max_epochs=1", "data.reasoning_gym.train_size=6")
    mine = files_of_mine(directory)
    left_out = ("data.filter_prompt_by_length=true", f"data.val_data_paths=[{directory / 'long.jsonl'}]")
    run("filtered", directory, *mine, *left_out, "data.rollout_batch_size=1", "runner.max_steps=1")
    written(directory, last / "actor" / "hf_model")

    own_reward(directory, last / "actor" / "hf_model")
    split(directory)
    mistakes(directory)


if __name__ == "__main__":
    main()
