"""Each rank decodes the images of its own samples alone, and training is bit for bit what it is with all of them."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mbridge_model import Parallel
from mbridge_train.data.encode import Encoded, Encoder
from mbridge_train.data.errors import DataError, RowError
from mbridge_train.data.examples import Example
from mbridge_train.data.images import RowImages
from mbridge_train.data.loader import EncodedBatches
from mbridge_train.data.order import RowOrder
from mbridge_train.data.rows import read_examples
from mbridge_train.engine.batch import Sample, aggregation_weights
from PIL import Image

from testing.gang import Gang
from testing.training_runs import SHARDED, build, leave

ROWS, BATCH, STEPS = 24, 6, 4
BROKEN = (5, 13)  # their headers are good
UNREADABLE = 9  # on the last rank alone
BATCHING: dict[str, Any] = {"token_budget": 300}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats with one or two images of several sizes, and without."""
    directory = tmp_path_factory.mktemp("images")
    lines = []
    for row in range(ROWS):
        parts: list[dict[str, str]] = []
        for image in range(row % 3):
            file = io.BytesIO()
            Image.effect_noise((32 + 16 * (row % 4), 32 + 8 * (row % 5)), 60).convert("RGB").save(file, format="PNG")
            content = file.getvalue()
            (directory / f"{row}-{image}.png").write_bytes(content[: len(content) // 2] if row in BROKEN else content)
            parts.append({"type": "image", "image": f"{row}-{image}.png"})
        parts.append({"type": "text", "text": "Which digit is this?" + " Look." * (row % 4)})
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": str(row % 10)}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (directory / "chats.jsonl").write_text("".join(lines))
    return directory / "chats.jsonl"


def make_batch(rows: list[Encoded], vision: Callable[[Encoded], Any]) -> list[Sample]:
    weights = aggregation_weights([row.trained for row in rows], "token-mean")
    return [
        Sample(tokens=row.tokens, weights=weight, vision=vision(row), position_ids=row.position_ids)
        for row, weight in zip(rows, weights, strict=True)
    ]


def eager(encoder: Encoder, data: Path) -> list[list[Encoded]]:
    """The good rows of each batch."""
    examples = read_examples([data])
    order = RowOrder(size=ROWS, batch_size=BATCH, seed=3)
    bad = {*BROKEN, UNREADABLE}
    return [[encoder.encode(examples[row]) for row in order.rows(step) if row not in bad] for step in range(STEPS)]


def train(model: Path, data: Path, parallel: Parallel, is_eager: bool) -> dict[str, Any]:
    from mbridge_train.losses.sft import sft_loss

    engine = build(model, parallel, SHARDED, batching=BATCHING)
    encoder = Encoder(model)
    decoded: list[str] = []
    messages: list[str] = []

    def encode(example: Example) -> Encoded:
        if example.source.endswith(f":{UNREADABLE + 1}") and torch.distributed.get_rank() == 1:
            raise RowError(f"{example.source}: cannot be read here")
        return encoder.encode(example)

    def decode(images: RowImages) -> Any:
        decoded.append(images.source)
        return encoder.decode(images)

    try:
        loader = EncodedBatches(
            read_examples([data]),
            encode,
            decode=decode,
            own=lambda rows: engine.reads_vision([len(row.tokens) for row in rows]),
            batch_size=BATCH,
            seed=3,
            max_bad_rows=3,
            report=messages.append,
        )
        if is_eager:
            batches = [
                make_batch(rows, lambda row: None if row.images is None else encoder.decode(row.images))
                for rows in eager(encoder, data)
            ]
        else:
            batches = (make_batch(rows, lambda row: row.images) for rows in loader)
        losses = []
        for _, batch in zip(range(STEPS), batches, strict=False):
            losses.append(engine.forward_backward(batch, sft_loss)["loss"])
            engine.step()
        digest = hashlib.sha256()
        for name, tensor in engine.export_weights():
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return {"losses": losses, "weights": digest.hexdigest(), "decoded": decoded, "bad": loader.bad_rows} | {
            "messages": messages
        }
    finally:
        leave()


@pytest.mark.parametrize(
    "parallel", [Parallel(), Parallel(tensor=2), Parallel(pipeline=2)], ids=["data", "tensor", "pipeline"]
)
def test_bit_for_bit_what_training_on_all_images_gives(
    gang2: Gang, tiny_vision_model: Path, data: Path, parallel: Parallel
) -> None:
    expected = gang2.run(train, tiny_vision_model, data, parallel, True, timeout=300)
    ranks = gang2.run(train, tiny_vision_model, data, parallel, False, timeout=300)
    with_images = {f"{data}:{row + 1}" for row in range(ROWS) if row % 3}
    for rank, wanted in zip(ranks, expected, strict=True):
        assert (rank["losses"], rank["weights"]) == (wanted["losses"], wanted["weights"])
        assert rank["bad"] == (*BROKEN[:1], UNREADABLE, *BROKEN[1:])
        assert len(rank["messages"]) == 3
    assert set().union(*(rank["decoded"] for rank in ranks)) | {f"{data}:{UNREADABLE + 1}"} >= with_images
    count = [len(rank["decoded"]) for rank in ranks]
    if parallel.tensor == 2:  # ranks that share the samples both need them
        assert count[0] == count[1]
    elif parallel.pipeline == 2:
        assert count[1] == 0
    else:  # a row is decoded twice only where a broken one changes the plan
        assert all(0.4 * len(with_images) <= one <= 0.75 * len(with_images) for one in count)


def too_many(model: Path, data: Path) -> str:
    encoder = Encoder(model)
    rank = torch.distributed.get_rank()
    loader = EncodedBatches(
        read_examples([data]),
        encoder.encode,
        decode=encoder.decode,
        own=lambda rows: range(rank, len(rows), 2),
        batch_size=ROWS,
        seed=None,
        max_bad_rows=1,
    )
    with pytest.raises(DataError) as raised:
        next(iter(loader))
    return str(raised.value)


def test_all_ranks_say_the_same_of_a_broken_image(gang2: Gang, tiny_vision_model: Path, data: Path) -> None:
    one, other = gang2.run(too_many, tiny_vision_model, data, timeout=120)
    assert one == other
    assert f"{data}:{BROKEN[1] + 1}: the image" in one and "More bad rows than data.max_bad_rows=1 (2 bad" in one
