"""`mbridge-ckpt`: inspect, verify, compare and tidy checkpoints. See `mbridge-ckpt --help`.

Exit codes: 0 success; 1 the answer is no (verify found a fault, diff a difference); 2 the command could not be carried
out, with one line on stderr that says why; 130 interrupted by Ctrl-C, with nothing made.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mbridge_ckpt.cli.diff import diff
from mbridge_ckpt.cli.output import ProgressBar, print_columns, print_json, size_text
from mbridge_ckpt.errors import CheckpointError
from mbridge_ckpt.huggingface.export import export_hf
from mbridge_ckpt.manifest.manifest import read_manifest
from mbridge_ckpt.megatron_lm.importer import import_megatron
from mbridge_ckpt.megatron_lm.tree import find_iteration
from mbridge_ckpt.reshard.reshard import reshard
from mbridge_ckpt.store.checkpoint import list_checkpoints, open_checkpoint
from mbridge_ckpt.store.publish import find_leftovers
from mbridge_ckpt.store.retention import Retention, prune
from mbridge_ckpt.store.verify import verify

FINE, NO, FAILED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be text, and a terminal may know only ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = options.run(options)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except CheckpointError as error:
        print(f"mbridge-ckpt: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"mbridge-ckpt: {where}{error.strerror or error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("mbridge-ckpt: interrupted", file=sys.stderr)
        return INTERRUPTED


def _ls(options: argparse.Namespace) -> int:
    directory: Path = options.path
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give the directory that holds the global_step_N")
    latest = os.path.basename(os.path.realpath(directory / "latest"))
    found: list[dict[str, Any]] = []
    for path in list_checkpoints(directory):
        entry: dict[str, Any] = {"name": path.name, "path": path, "latest": path.name == latest, "error": None}
        try:
            manifest = read_manifest(path)
            entry |= {
                "step": manifest.step,
                "created": manifest.created,
                "bytes": manifest.total_bytes,
                "layout": manifest.layout,
                "metrics": manifest.metadata.get("metrics", {}),
            }
        except CheckpointError as error:
            entry["error"] = str(error)
        found.append(entry)
    leftovers = find_leftovers(directory)
    if options.json:
        print_json({"checkpoints": found, "leftovers": leftovers})
        return FINE
    rows = [["NAME", "CREATED", "SIZE", "LAYOUT", ""]] if found else []
    for entry in found:
        if entry["error"]:
            rows.append([entry["name"], "-", "-", "-", "not committed or damaged, see `verify`"])
        else:
            mark = "latest" if entry["latest"] else ""
            rows.append([entry["name"], entry["created"], size_text(entry["bytes"]), str(entry["layout"]), mark])
    print_columns(rows)
    for leftover in leftovers:
        print(f"{leftover.path.name}  left by an interrupted save; `mbridge-ckpt prune {directory}` cleans it up")
    if not found and not leftovers:
        inside = directory / "checkpoints"  # of a run's directory
        print(f"no checkpoints in {directory}" + f", but in {inside}" * bool(list_checkpoints(inside)))
    return FINE


def _show(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.path)
    manifest = checkpoint.manifest
    files = [record for record in manifest.files if options.file is None or options.file in record.path]
    if options.json:
        header = {key: getattr(manifest, key) for key in ("step", "created", "layout", "writer", "metadata")}
        print_json({"path": checkpoint.path, **header, "bytes": manifest.total_bytes, "files": files})
        return FINE
    print(f"{checkpoint.path}\nstep {manifest.step}, {manifest.created}, {size_text(manifest.total_bytes)} in"
          f" {len(manifest.files)} files, {manifest.layout}")  # fmt: skip
    print("written by " + ", ".join(f"{name} {version}" for name, version in manifest.writer.items()))
    for key, value in manifest.metadata.items():
        print(f"{key}: {value}")
    print()
    rows = [
        [size_text(record.bytes), record.path, f"{len(record.tensors)} tensors" * bool(record.tensors)]
        for record in files
    ]
    print_columns(rows)
    if options.tensors:
        for record in files:
            print(f"\n{record.path}" * bool(record.tensors))
            print_columns([[tensor.dtype, list(tensor.shape), tensor.name] for tensor in record.tensors])
    return FINE


def _verify(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.path)
    with ProgressBar("reading", checkpoint.manifest.total_bytes) as progress:
        report = verify(checkpoint.path, contents=options.full, progress=progress)
    if options.json:
        print_json({"ok": report.ok, "resumable": report.resumable, **asdict(report)})
        return FINE if report.ok else NO
    for fault in report.faults:
        print(f"FAULT {fault.message}")
    for note in report.notes:
        print(f"note: {note}")
    looked_at = "every byte compared with its checksum" if report.contents else (
        "sizes, headers and tensor lists compared; `--full` reads every byte too"
    )  # fmt: skip
    print(f"{report.path.name}: {report.files} files, {size_text(report.bytes)}: {looked_at}")
    advice = "resuming is not affected" if report.resumable else "do not resume from it"
    print("fine" if report.ok else f"{len(report.faults)} faults; {advice}")
    return FINE if report.ok else NO


def _prune(options: argparse.Namespace) -> int:
    retention = Retention(
        last=options.keep_last,
        every=options.keep_every,
        best=options.keep_best,
        metric=options.metric,
        best_is="min" if options.smallest else "max",
    )
    if not options.path.is_dir():
        raise CheckpointError(f"{options.path} is not a directory; give the directory that holds the global_step_N")
    report = prune(options.path, retention, protect=options.protect, dry_run=options.dry_run)
    if options.json:
        print_json({"dry_run": options.dry_run, "freed_bytes": report.freed_bytes, "verdicts": report.verdicts})
        return FINE
    print_columns([[verdict.action, verdict.path.name, verdict.reason] for verdict in report.verdicts])
    print(f"{size_text(report.freed_bytes)} {'would be ' if options.dry_run else ''}freed")
    return FINE


def _diff(options: argparse.Namespace) -> int:
    total = sum(open_checkpoint(path).manifest.total_bytes for path in (options.path, options.other))
    with ProgressBar("reading", 2 * total) as progress:  # verified, then compared
        differences = diff(options.path, options.other, progress=progress)
    if options.json:
        print_json({"equal": not differences, "differences": differences})
        return NO if differences else FINE
    rows = [["KIND", "PARAMETER", "LARGEST", "RELATIVE", ""]] if differences else []
    for item in differences:
        numbers = ["-" if value is None else f"{value:.3g}" for value in (item.largest, item.relative)]
        rows.append([item.kind, item.name, *numbers, item.reason])
    print_columns(rows)
    print(f"{len(differences)} differences" if differences else "equal")
    return NO if differences else FINE


def _reshard(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.path)
    with ProgressBar("reading and writing", 2 * checkpoint.manifest.total_bytes) as progress:
        path = reshard(
            checkpoint.path,
            options.destination,
            tensor=options.tp,
            pipeline=options.pp,
            vocabulary_multiple=options.vocabulary_multiple,
            progress=progress,
        )
    return _print_made(options, path)


def _import_megatron(options: argparse.Namespace) -> int:
    total = sum(file.stat().st_size for file in find_iteration(options.path).glob("mp_rank_*/*.pt"))
    with ProgressBar("writing", total) as progress:
        path = import_megatron(
            options.path,
            options.destination,
            optimizer=not options.no_optimizer,
            vocabulary_rows=options.vocab_size,
            progress=progress,
        )
    return _print_made(options, path)


def _export_hf(options: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(options.path)
    with ProgressBar("writing", checkpoint.manifest.total_bytes) as progress:
        report = export_hf(
            checkpoint.path,
            options.destination,
            max_shard_size=options.max_shard_size,
            hf_files=options.hf_files,
            progress=progress,
        )
    if options.json:
        print_json(report)
    else:
        print(f"{report.path}: {report.tensors} tensors, {size_text(report.bytes)}, from {report.weights_from}")
    return 0


def _print_made(options: argparse.Namespace, path: Path) -> int:
    manifest = read_manifest(path)
    if options.json:
        print_json({"path": path, "layout": manifest.layout, "bytes": manifest.total_bytes})
    else:
        print(f"{path}: {manifest.layout}, {size_text(manifest.total_bytes)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mbridge-ckpt",
        description="Inspect, verify, compare and tidy training checkpoints.",
        epilog="Exit codes: 0 success; 1 the answer is no (a fault, a difference); 2 the command could not be carried"
        " out, with the reason on stderr; 130 interrupted.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str, path: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("path", type=Path, metavar=path)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        sub.set_defaults(run=run)
        return sub

    command("ls", _ls, "List the checkpoints in a directory.", "DIRECTORY")
    show = command("show", _show, "Show what a checkpoint holds, from its manifest.", "CHECKPOINT")
    show.add_argument("--tensors", action="store_true", help="list tensors too")
    show.add_argument("--file", metavar="TEXT", help="only files with TEXT in their path")
    check = command("verify", _verify, "Compare the files with the manifest.", "CHECKPOINT")
    check.add_argument("--full", action="store_true", help="read every byte and compare checksums")
    compare = command("diff", _diff, "Show which parameters of two checkpoints differ, and by how much.", "FIRST")
    compare.add_argument("other", type=Path, metavar="SECOND")
    cut = command("reshard", _reshard, "Reshard a checkpoint for another parallel layout.", "CHECKPOINT")
    cut.add_argument("destination", type=Path, metavar="DIRECTORY", help="checkpoints directory to write into")
    cut.add_argument("--tp", type=int, default=1, help="tensor-parallel size (1)")
    cut.add_argument("--pp", type=int, default=1, help="pipeline stages (1)")
    cut.add_argument("--vocabulary-multiple", type=int, metavar="M", help="pad the vocabulary to M times --tp rows")
    export = command("export-hf", _export_hf, "Write a checkpoint's weights as a HuggingFace directory.", "CHECKPOINT")
    export.add_argument("destination", type=Path, metavar="DIRECTORY", help="directory to make; it must not exist")
    export.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB; by default as exported, or 5GB")
    export.add_argument("--hf-files", type=Path, metavar="DIR", help="where config.json, tokenizer and so on come from")
    bring = command(
        "import-megatron", _import_megatron, "Make a checkpoint from a tree of Megatron-LM's torch format.", "SOURCE"
    )
    bring.add_argument("destination", type=Path, metavar="DIRECTORY", help="checkpoints directory to write into")
    bring.add_argument("--no-optimizer", action="store_true", help="import the weights alone")
    bring.add_argument("--vocab-size", type=int, metavar="N", help="real tokens, without padding (all stored rows)")
    tidy = command("prune", _prune, "Remove leftovers of dead saves, and checkpoints that no rule keeps.", "DIRECTORY")
    tidy.add_argument("--keep-last", type=int, metavar="N", help="keep the N newest")
    tidy.add_argument("--keep-every", type=int, metavar="K", help="keep steps that are multiples of K")
    tidy.add_argument("--keep-best", type=int, metavar="N", help="keep the N best by --metric")
    tidy.add_argument("--metric", metavar="NAME", help="metric for --keep-best")
    tidy.add_argument("--smallest", action="store_true", help="the smallest metric is best, not the largest")
    tidy.add_argument("--protect", type=Path, action="append", default=[], metavar="CHECKPOINT", help="never remove it")
    tidy.add_argument("--dry-run", action="store_true", help="say what would be removed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
