"""Making the data and the model of the quickstart unless they exist."""

from collections.abc import Callable, Iterator

from mbridge_config import SFTConfig, hf_directory
from mbridge_train.data.examples import readable
from mbridge_train.data.rows import read_examples
from torch import distributed

from mbridge_sft.quickstart.digits import write_digits
from mbridge_sft.quickstart.model import write_tiny_vision_model
from mbridge_sft.start import data_paths, read_settings


def prepare_quickstart(config: SFTConfig, say: Callable[[str], None]) -> None:
    """Make handwritten digits and a tiny random Qwen3-VL unless they exist. Collective over all ranks.

    The digits go to `train` and `eval` in the parent directory of the first missing path in `data`.
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
            write_tiny_vision_model(target, _texts(config), seed=config.actor.seed, geometry=config.quickstart)
    distributed.barrier()


def _texts(config: SFTConfig) -> Iterator[str]:
    """Yield the questions and answers that the tokenizer is made of: the training data's, or the evaluation data's."""
    training, evaluation = data_paths(config)
    for example in readable(read_examples(training or evaluation, read_settings(config.data))):
        yield from (message.text for message in example.messages)
        yield example.answer
