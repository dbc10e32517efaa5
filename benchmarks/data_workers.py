"""What the data workers of each rank do for a global batch of images, at one and at two data-parallel ranks.

    ./uvw run python benchmarks/data_workers.py                                       # on any machine, without a GPU
    ./uvw run python benchmarks/data_workers.py --rows 4 --batch 4 --side 64          # as a test does it

The rows are chats with one JPEG image each, of which every rank encodes the text and decodes the images of its own
samples alone. The processor is that of a Qwen3-VL with patches of 16 x 16 pixels; no model is loaded, and the plan is
made as the engine makes it. CPU seconds are those of the worker processes, in which loading the processor counts, too.
"""

import argparse
import json
import tempfile
from multiprocessing import active_children
from pathlib import Path

import numpy
import psutil
import torch
from mbridge_sft.quickstart.model import write_tiny_vision_model
from mbridge_train.data.encode import Encoder
from mbridge_train.data.loader import EncodedBatches
from mbridge_train.data.rows import read_examples
from mbridge_train.engine.micro_batches import plan_micro_batches
from PIL import Image
from torch import distributed, multiprocessing

QUESTION = "Which of the objects on the table is nearest to the gripper, and how should the arm move to take it? " * 4


def write_rows(directory: Path, rows: int, side: int) -> None:
    """Write `chats.jsonl` and its images, of 3/4 to 5/4 of `side` along each edge."""
    random = numpy.random.default_rng(0)
    with (directory / "chats.jsonl").open("w") as file:
        for row in range(rows):
            width, height = (int(side * random.uniform(0.75, 1.25)) for _ in range(2))
            coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=numpy.uint8)
            Image.fromarray(coarse).resize((width, height)).save(directory / f"{row}.jpg", quality=90)
            content = [{"type": "image", "image": f"{row}.jpg"}, {"type": "text", "text": QUESTION}]
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "The cup. Move left."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_processor(directory: Path) -> None:
    """Write a tiny model's directory whose processor cuts patches as the one of Qwen3-VL does."""
    write_tiny_vision_model(directory, [QUESTION], seed=1)
    (file,) = (path for path in directory.glob("*processor*.json") if "patch_size" in path.read_text())
    settings = json.loads(file.read_text())
    images = settings.get("image_processor", settings)
    images |= {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}
    file.write_text(json.dumps(settings))


def run_rank(rank: int, ranks: int, directory: Path, results: Path, batch: int, workers: int) -> None:
    """Iterate over all batches as rank `rank`, and write what its workers did to `rank.json` in `results`."""
    distributed.init_process_group("gloo", init_method=f"file://{results}/store", rank=rank, world_size=ranks)
    encoder = Encoder(directory / "model")

    def own(rows: list) -> set[int]:
        plan = plan_micro_batches([len(row.tokens) for row in rows], ranks, micro_batch_size=2)
        return {index for micro_batch in plan[rank] for index in micro_batch}

    examples = read_examples([directory / "chats.jsonl"])
    batches = EncodedBatches(
        examples,
        encoder.encode,
        decode=encoder.decode,
        own=own,
        batch_size=batch,
        seed=1,
        epochs=1,
        workers=workers,
    )
    decoded = patches = 0
    for rows in batches:
        own_images = [row.images.vision for row in rows if row.images is not None and row.images.vision is not None]
        decoded += sum(len(images.grid_thw) for images in own_images)
        patches += sum(len(images.pixel_values) for images in own_images)
        times = [psutil.Process(worker.pid).cpu_times() for worker in active_children()]
        seconds = sum(time.user + time.system for time in times)
    figures = {"rank": rank, "images": decoded, "patches": patches, "cpu_seconds": seconds}
    (results / f"{rank}.json").write_text(json.dumps(figures))
    distributed.destroy_process_group()


def measure(directory: Path, ranks: int, batch: int, workers: int) -> list[dict[str, float]]:
    """Return the figures of each rank."""
    with tempfile.TemporaryDirectory() as store:
        # Forked, as importing transformers in each rank would take longer than all else.
        arguments = (ranks, directory, Path(store), batch, workers)
        multiprocessing.start_processes(run_rank, arguments, nprocs=ranks, start_method="fork")
        return [json.loads((Path(store) / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--batch", type=int, default=24, help="rows of a global batch")
    parser.add_argument("--side", type=int, default=768, help="pixels along an edge of an image, on average")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each rank")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that has threads may not be forked
    report = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_rows(directory, options.rows, options.side)
        write_processor(directory / "model")
        for ranks in (1, 2):
            report[f"DP {ranks}"] = measure(directory, ranks, options.batch, options.workers)
            for figures in report[f"DP {ranks}"]:
                print(
                    f"DP {ranks}, rank {figures['rank']}: {figures['images']} of {options.rows} images decoded, "
                    f"{figures['patches']} patches, {figures['cpu_seconds']:.2f} CPU seconds of the workers"
                )
    if options.output is not None:
        options.output.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
