"""What the quickstart makes before it trains: handwritten digits as parquet files, and a tiny random Qwen3-VL."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress

from mbridge_config import SFTConfig, hf_directory
from mbridge_train.data.errors import RowError
from mbridge_train.data.rows import read_examples
from torch import distributed

from mbridge_sft.quickstart.digits import write_digits
from mbridge_sft.quickstart.tiny import TinyGeometry, write_tiny_model
from mbridge_sft.start import data_paths, read_settings


def prepare_quickstart(config: SFTConfig, say: Callable[[str], None]) -> None:
    """Make data and model where they are not there yet. Collective over all ranks.

    The digits go to `train` and `eval` beside each other, above which the first missing path of `data` lies.
    """
    if distributed.get_rank() == 0:
        missing = [path for paths in data_paths(config) for path in paths if not path.exists()]
        if missing:
            say(f"writing handwritten digits to {missing[0].parent}")
            write_digits(missing[0].parent)
        target = hf_directory(config)
        if (target / "config.json").is_file():
            say(f"using the tiny model that an earlier run made in {target}")
        else:
            say(f"making a tiny random Qwen3-VL in {target}")
            made = config.quickstart
            values = {field.name: getattr(made, field.name) for field in dataclasses.fields(TinyGeometry)}
            values["deepstack_visual_indexes"] = tuple(made.deepstack_visual_indexes)
            write_tiny_model(target, _texts(config), seed=config.actor.seed, geometry=TinyGeometry(**values))
    distributed.barrier()


def _texts(config: SFTConfig) -> Iterator[str]:
    """What the tokenizer is made of: questions and answers, of the evaluation where nothing is trained."""
    training, evaluation = data_paths(config)
    examples = read_examples(training or evaluation, read_settings(config.data))
    for row in range(len(examples)):
        with suppress(RowError):  # the loader counts and names it
            example = examples[row]
            yield from (message.text for message in example.messages)
            yield example.answer
