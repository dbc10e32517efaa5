"""The command line: its output and exit codes, and that looking at a checkpoint needs no torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mbridge_ckpt import Layout, begin_save
from mbridge_ckpt.cli.main import main
from mbridge_ckpt.store.publish import temporary_directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, reward in ((5, 0.1), (10, 0.7), (15, 0.3)):
        with begin_save(tmp_path / "run", step=step, layout=Layout(tensor=2, data=4)) as save:
            for rank in range(2):
                path = f"actor/iter_{step:07d}/mp_rank_{rank:02d}/model_optim_rng.pt"
                save.write_torch(path, {"model": {f"layer.{n}": torch.ones(3, n) for n in range(40)}})
            save.commit({"metrics": {"reward": reward}})
    return tmp_path / "run"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_ls(run, capsys):
    (run / "global_step_10/manifest.json").unlink()
    temporary_directory(run, 20).mkdir()
    assert main(["ls", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["NAME", "global_step_15", "global_step_10", "global_step_5"]
    assert "TP 2, PP 1, DP 4" in lines[1] and lines[1].endswith("latest") and "not committed" in lines[2]
    assert lines[4].startswith(".global_step_20.saving-")
    assert main(["ls", str(run), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [entry.get("step") for entry in value["checkpoints"]] == [15, None, 5]
    assert value["checkpoints"][0]["metrics"] == {"reward": 0.3} and value["leftovers"][0]["step"] == 20


def test_ls_of_a_run_says_where_its_checkpoints_are(tmp_path, capsys):
    with begin_save(tmp_path / "run" / "checkpoints", step=5, layout=Layout()) as save:
        save.commit({})
    assert main(["ls", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"no checkpoints in {tmp_path}/run, but in {tmp_path}/run/checkpoints\n"
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no checkpoints in {tmp_path}\n"


def test_show(run, capsys):
    assert main(["show", str(run / "global_step_5"), "--tensors", "--file", "mp_rank_01"]) == 0
    text = capsys.readouterr().out
    assert "step 5" in text and "TP 2, PP 1, DP 4" in text and "reward" in text and "mp_rank_00" not in text
    assert "float32  [3, 39]  model/layer.39" in text
    assert main(["show", str(run), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["step"] == 15 and value["layout"]["data"] == 4 and value["writer"]["torch"]


def test_verify_and_its_exit_codes(run, capsys):
    path = run / "global_step_15"
    assert main(["verify", str(path)]) == main(["verify", str(path), "--full"]) == 0
    assert "fine" in capsys.readouterr().out
    file = path / "actor/iter_0000015/mp_rank_01/model_optim_rng.pt"
    data = bytearray(file.read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(path)]) == 0  # a flipped bit in a tensor shows only to who reads tensors
    assert "`--full` reads every byte" in capsys.readouterr().out
    assert main(["verify", str(path), "--full"]) == 1
    text = capsys.readouterr().out
    assert f"FAULT {file}" in text and "do not resume from it" in text
    assert main(["verify", str(path), "--full", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert (
        not value["ok"]
        and not value["resumable"]
        and value["faults"][0]["path"].endswith("mp_rank_01/model_optim_rng.pt")
    )
    file.write_bytes(data[:-1])
    assert main(["verify", str(path)]) == 1
    (path / "manifest.json").unlink()
    assert main(["verify", str(path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_prune_keeps_what_the_rules_want(run, capsys):
    rules = [str(run), "--keep-last", "1", "--keep-best", "1", "--metric", "reward"]
    assert main(["prune", *rules, "--dry-run"]) == 0 and len(names(run)) == 4
    assert "remove  global_step_5" in capsys.readouterr().out
    assert main(["prune", *rules, "--json"]) == 0
    assert names(run) == ["global_step_10", "global_step_15", "latest"]
    value = json.loads(capsys.readouterr().out)
    assert value["freed_bytes"] > 0 and [v["action"] for v in value["verdicts"]] == ["keep", "keep", "remove"]
    assert "best by reward (0.7)" in value["verdicts"][1]["reason"]


def test_prune_by_a_metric_that_nothing_has_removes_nothing(run, capsys):
    before = names(run)
    assert main(["prune", str(run), "--keep-best", "1", "--metric", "rewrad"]) == 0
    assert names(run) == before
    assert "no checkpoint has the metric 'rewrad'" in capsys.readouterr().out


def test_prune_by_multiples_and_smallest(run):
    assert main(["prune", str(run), "--keep-every", "10", "--keep-best", "1", "--metric", "reward", "--smallest"]) == 0
    assert names(run) == ["global_step_10", "global_step_15", "global_step_5", "latest"]  # 15 is the newest
    assert main(["prune", str(run), "--keep-every", "10"]) == 0
    assert names(run) == ["global_step_10", "global_step_15", "latest"]


def test_prune_leaves_what_is_protected_linked_or_not_ours(run, capsys):
    (run / "global_step_7").mkdir()
    (run / "global_step_7/thesis.txt").write_text("mine")
    (run / "global_step_10/notes.txt").write_text("mine")
    (run / "latest").unlink()
    (run / "latest").symlink_to("global_step_5")
    with begin_save(run, step=3, layout=Layout()) as save:
        save.write_json("a.json", 1)
        save.commit()
    with begin_save(run, step=4, layout=Layout()) as save:
        save.write_json("a.json", 1)
        save.commit()
    (run / "latest").unlink()
    (run / "latest").symlink_to("global_step_5")
    assert main(["prune", str(run), "--keep-last", "1", "--protect", str(run / "global_step_15")]) == 0
    expected = [f"global_step_{step}" for step in (10, 15, 4, 5, 7)]
    assert names(run) == [*expected, "latest"]
    assert (run / "global_step_7/thesis.txt").read_text() == "mine"
    text = capsys.readouterr().out
    for reason in ("notes.txt", "protected", "has no manifest.json"):
        assert reason in text


def test_prune_leaves_a_checkpoint_with_a_linked_directory(run, tmp_path):
    (run / "global_step_5/data").symlink_to(tmp_path)
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert names(run) == ["global_step_15", "global_step_5", "latest"]


def test_a_link_of_a_dead_save_is_listed_and_removed(run, capsys):
    link = run / ".latest.0123abcd"
    link.symlink_to("global_step_15")
    assert main(["prune", str(run)]) == 0 and link.is_symlink()  # it may be of a save that is alive
    os.utime(link, (0, 0), follow_symlinks=False)
    assert main(["ls", str(run)]) == 0 and "\n.latest.0123abcd  left by" in capsys.readouterr().out
    assert main(["prune", str(run)]) == 0 and not link.is_symlink()


def test_prune_tells_a_running_save_from_a_dead_one(run):
    dead = temporary_directory(run, 20)
    dead.mkdir()
    (dead / ".writer").write_text("{}")
    half_removed = temporary_directory(run, 30, "deleting")
    half_removed.mkdir()
    (run / "global_step_5").rename(temporary_directory(run, 5, "replaced"))  # a replacing save died between renames
    save = begin_save(run, step=40, layout=Layout())
    assert main(["prune", str(run)]) == 0
    assert names(run) == sorted([save.path.name, "global_step_10", "global_step_15", "global_step_5", "latest"])
    with save:
        save.write_json("a.json", 1)
        save.commit()
    assert main(["verify", str(run / "global_step_40"), "--full"]) == 0


@pytest.mark.parametrize(
    "arguments", [["ls"], ["show"], ["verify"], ["prune", "--keep-last", "0"], ["prune", "--keep-best", "1"]]
)
def test_what_cannot_be_done_is_one_line_and_2(tmp_path, capsys, arguments):
    assert main([*arguments, str(tmp_path / ("" if arguments[0] == "prune" else "none"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mbridge-ckpt: ") and error.count("\n") == 1


def test_looking_needs_no_torch_and_less_than_a_second(run):
    code = (
        "import sys\nfrom mbridge_ckpt.cli.main import main\nsys.exit(main(sys.argv[1:]) or 3*('torch' in sys.modules))"
    )
    for command in ("ls", "show", "verify"):
        target = run if command == "ls" else run / "global_step_15"
        before = os.times()
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", code, command, str(target)], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        # Time of the processor, for the clock on the wall also counts what else runs on a busy machine.
        used = after.children_user + after.children_system - before.children_user - before.children_system
        assert used < 1.0, f"{command}: {used:.2f} s of processor time, {time.monotonic() - begin:.2f} s"


@pytest.mark.parametrize(
    ("out", "code", "error"),
    [("> /dev/full", 2, "mbridge-ckpt: No space left on device\n"), (">&-", 0, ""), ("| true", 0, "")],
)
def test_output_that_nobody_takes(run, out, code, error):
    command = f'set -o pipefail; "$0" -m mbridge_ckpt.cli.main show "$1" --tensors {out}'
    done = subprocess.run(["bash", "-c", command, sys.executable, run], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)


def test_names_that_the_terminal_cannot_show(run):
    odd = run.rename(os.fsdecode(os.fsencode(run.parent / "l\u00e4ufe ") + b"\xff"))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mbridge_ckpt.cli.main", "show", str(odd)]
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert b"/l\\xe4ufe \\udcff/global_step_15" in done.stdout
