"""The commands that make something new from a checkpoint: `reshard`, `import-megatron` and `export-hf`."""

import argparse
from pathlib import Path

from mbridge_ckpt.cli.output import ProgressBar, print_json, size_text
from mbridge_ckpt.manifest.manifest import read_manifest
from mbridge_ckpt.store.checkpoint import open_checkpoint


def run_reshard(options: argparse.Namespace) -> int:
    from mbridge_ckpt.reshard.reshard import reshard

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


def run_import_megatron(options: argparse.Namespace) -> int:
    from mbridge_ckpt.megatron_lm.importer import import_megatron
    from mbridge_ckpt.megatron_lm.tree import find_iteration

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


def run_export_hf(options: argparse.Namespace) -> int:
    from mbridge_ckpt.huggingface.export import export_hf

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
