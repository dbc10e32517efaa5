"""Runs of the app, one after the other in one process, since importing Megatron takes longer than any of them.

    python sft_run_program.py DIRECTORY

Everything lies in DIRECTORY afterwards; `test_sft_run.py` reads it. The runs are of the quickstart's kind, cut short,
with packed batches of uneven length, a bad row, and shuffled data; the first decodes in another process.
"""

import contextlib
import io
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from mbridge_config.cli.main import main as init
from mbridge_sft import cli
from mbridge_sft.quickstart.digits import write_digits

from testing.app_runs import files
from testing.tiny_chat_model import write_chat_model

SHORT = (
    "runner.max_steps=4",
    "runner.save_interval=2",
    "runner.val_check_interval=2",
    "runner.enable_dynamic_batch_size=true",
    "runner.max_tokens_per_mbs=300",
    "data.max_bad_rows=1",
    "data.num_workers=0",
    "actor.global_batch_size=6",
    "actor.eval_batch_size=5",
    "actor.lr_sched.lr_warmup_iters=2",
    "actor.lr_sched.lr_decay_iters=4",
    "quickstart.hidden_size=64",
    "quickstart.num_attention_heads=2",
    "quickstart.num_key_value_heads=2",
)
BAD_ROW = 7


def write_data(directory: Path) -> None:
    """20 digits to train on, one of whose images is broken, and 7 to evaluate on; `whole` is without the broken one,
    `turned` has them in the opposite order.
    """
    train, evaluation = write_digits(directory / "digits")
    rows = pq.read_table(train / "digits.parquet").slice(0, 20).to_pylist()
    for name, changed in {"whole": {}, "train": {BAD_ROW: {"bytes": b"not an image", "path": None}}}.items():
        (directory / name).mkdir()
        table = [row | {"image": changed.get(number, row["image"])} for number, row in enumerate(rows)]
        # Questions of several lengths.
        table = [row | {"question": row["question"] + " Look." * (number % 4)} for number, row in enumerate(table)]
        pq.write_table(pa.Table.from_pylist(table), directory / name / "a.parquet", row_group_size=3)
    (directory / "turned").mkdir()
    table = pq.read_table(directory / "train" / "a.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(table[::-1]), directory / "turned" / "a.parquet", row_group_size=3)
    (directory / "eval").mkdir()
    pq.write_table(pq.read_table(evaluation / "digits.parquet").slice(0, 7), directory / "eval" / "a.parquet")
    random.seed(1)
    chats = []
    for _ in range(15):
        one, other = random.randrange(10), random.randrange(10)
        question = {"role": "user", "content": f"{one} + {other} ="}
        chats.append({"messages": [question, {"role": "assistant", "content": str(one + other)}]})
    (directory / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def command(name: str, directory: Path, *overrides: str) -> list[str]:
    place = [
        f"runner.output_dir={directory}",
        f"runner.experiment_name={name}",
        f"actor.model.model_path={directory / 'model'}",
        f"data.train_data_paths=[{directory / 'train'}]",
        f"data.val_data_paths=[{directory / 'eval'}]",
    ]
    return ["mbridge-sft", *SHORT, *place, *overrides]


def run(name: str, directory: Path, *overrides: str) -> None:
    """One run named `name`; a mistake ends the program."""
    sys.argv = command(name, directory, *overrides)
    print(f"--- {name} {' '.join(overrides)}", flush=True)
    code = cli.main()
    if code != 0:
        sys.exit(f"run {name} ended with exit code {code}")


def mistake(name: str, directory: Path, *overrides: str) -> dict[str, object]:
    """One run that must fail: its exit code, what it says, and what it changed of another run."""
    before = files(directory / "unbroken")
    sys.argv = command(name, directory, "data.val_data_paths=[]", "runner.val_check_interval=-1", *overrides)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main()
    return {"code": code, "said": said.getvalue(), "changed": sorted(files(directory / "unbroken") ^ before)}


def mistakes(directory: Path) -> None:
    """The mistakes that only a rank can find; `said.json` has what was said of them."""
    half = directory / "unbroken" / "checkpoints" / "global_step_2"
    said = {
        "bad": mistake("m-bad", directory, "data.max_bad_rows=0"),
        "large": mistake(
            "m-large",
            directory,
            f"data.train_data_paths=[{directory / 'whole'}]",
            "data.max_pixels=1000",
            "data.oversized=refuse",
        ),
        "long": mistake("m-long", directory, "runner.seq_length=40"),
        "evaluation": mistake(
            "m-evaluation",
            directory,
            "runner.only_eval=true",
            "runner.resume_dir=auto",
            f"data.val_data_paths=[{directory / 'eval'}]",
        ),
        "data": mistake("m-data", directory, "data.seed=5", f"runner.resume_dir={half}"),
        "order": mistake(
            "m-order", directory, f"data.train_data_paths=[{directory / 'turned'}]", f"runner.resume_dir={half}"
        ),
    }
    (directory / "said.json").write_text(json.dumps(said))


def split(directory: Path) -> None:
    """The unbroken run's last two steps on two pipeline stages, the second of them profiled."""
    half = directory / "unbroken" / "checkpoints" / "global_step_2"
    stages = ("launcher.nproc_per_node=2", "actor.model.pipeline_model_parallel_size=2")
    profiled = ("actor.megatron.use_profiler=true", "actor.megatron.profiler.steps=[4]")
    run("stages", directory, *stages, *profiled, f"runner.resume_dir={half}")


def written(directory: Path, model: Path) -> None:
    """Two steps of the config that `mbridge-config init` writes for the model and chats."""
    file = directory / "init.yaml"
    if init(["init", "sft", "--model", str(model), "--data", str(directory / "chats.jsonl"), "--output", str(file)]):
        sys.exit("the config that was written has errors")
    short = ("runner.max_steps=2", "actor.lr_sched.lr_warmup_iters=1", f"runner.output_dir={directory}")
    sys.argv = ["mbridge-sft", "--config-name", str(file), *short, "runner.experiment_name=init"]
    if code := cli.main():
        sys.exit(f"the config that was written ended with exit code {code}")


def main() -> None:
    directory = Path(sys.argv[1])
    write_data(directory)
    run("unbroken", directory, "data.num_workers=1")
    run("stopped", directory, "runner.max_steps=2")
    run("stopped", directory, "runner.resume_dir=auto")
    # Nothing is left to do.
    run("stopped", directory, "runner.resume_dir=auto")

    alone = ("runner.only_eval=true", "data.train_data_paths=[]")
    run("unbroken", directory, *alone, "runner.resume_dir=auto")
    last = directory / "unbroken" / "checkpoints" / "global_step_4" / "actor" / "hf_model"
    run("from-hf", directory, *alone, "quickstart.enabled=false", f"actor.model.model_path={last}")

    frozen = [f"actor.model.freeze_{part}=true" for part in ("language_model", "vision_projection")]
    # One epoch, 2 batches of 20 rows, ends it before max_steps do.
    short = ("runner.max_epochs=1", "actor.global_batch_size=10")
    run("frozen", directory, *short, "data.val_data_paths=[]", "runner.val_check_interval=-1", *frozen)

    write_chat_model(directory / "text-model")
    run(
        "text",
        directory,
        "quickstart.enabled=false",
        f"actor.model.model_path={directory / 'text-model'}",
        f"data.train_data_paths=[{directory / 'chats.jsonl'}]",
        f"data.val_data_paths=[{directory / 'chats.jsonl'}]",
    )
    written(directory, directory / "text-model")
    split(directory)
    mistakes(directory)


if __name__ == "__main__":
    main()
