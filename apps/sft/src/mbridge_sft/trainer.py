"""One SFT step and one evaluation."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from mbridge_config import SFTConfig
from mbridge_config.schema.keys import filled
from mbridge_train.data.encode import Encoded, Encoder
from mbridge_train.data.examples import Examples
from mbridge_train.data.loader import EncodedBatches
from mbridge_train.engine.batch import Sample, aggregation_weights
from mbridge_train.engine.engine import Engine
from mbridge_train.engine.throughput import Throughput
from mbridge_train.losses.sft import sft_loss

from mbridge_sft.evaluation import Evaluation, Question, as_sample, encode_question, evaluate


@dataclass(kw_only=True)
class SFTTrainer:
    """Trains and evaluates the model. Every method is collective over all ranks.

    Attributes:
        throughput: counts the operations of a step.
        say: called with a line for the terminal for each row that is left out.
    """

    config: SFTConfig
    engine: Engine
    encoder: Encoder
    throughput: Throughput
    say: Callable[[str], None]

    def batches(self, examples: Examples, *, first_step: int, bad_rows: Iterable[int]) -> EncodedBatches[Encoded]:
        """Return the endless training batches from step `first_step` (from 0) on."""
        data = self.config.data
        return EncodedBatches(
            examples,
            self.encoder.encode,
            batch_size=self.config.actor.global_batch_size,
            seed=data.seed if data.shuffle else None,
            decode=self.encoder.decode,
            own=lambda batch: self.engine.reads_vision([len(encoded.tokens) for encoded in batch]),
            workers=data.num_workers,
            first_step=first_step,
            max_bad_rows=data.max_bad_rows,
            bad_rows=bad_rows,
            skip_long=data.skip_long_rows,
            report=self.say,
        )

    def step(self, batch: Sequence[Encoded]) -> dict[str, float]:
        """Train on one global batch and return its metrics, which are those of the whole batch."""
        started = time.perf_counter()
        samples = training_samples(batch)
        padding = self.engine.padding_share(samples)
        metrics = self.engine.forward_backward(samples, sft_loss)
        result = self.engine.step()
        seconds = time.perf_counter() - started
        tokens = sum(sample.length for sample in samples)
        images = sum(0 if encoded.images is None else len(encoded.images.grid_thw) for encoded in batch)
        return {
            "train/loss": metrics["loss"],
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped": float(not result.applied),
            "tokens": float(tokens),
            "trained_tokens": float(sum(int(encoded.trained.sum()) for encoded in batch)),
            "images": float(images),
            "padding_waste": padding,
            "tokens_per_second": tokens / seconds,
            "images_per_second": images / seconds,
            "time/train": seconds,
        } | self.throughput.metrics(samples, seconds)

    def evaluate(self, examples: Examples) -> Evaluation:
        """Evaluate all examples once, in their order."""
        data, actor = self.config.data, self.config.actor
        questions = EncodedBatches(
            examples,
            partial(encode_question, self.encoder),
            batch_size=filled(actor.eval_batch_size),
            seed=None,
            epochs=1,
            decode=self.encoder.decode,
            own=self._own_questions,
            workers=data.num_workers,
            max_bad_rows=data.max_bad_rows,
            skip_long=data.skip_long_rows,
            report=self.say,
        )
        return evaluate(self.engine.logprobs, questions)

    def _own_questions(self, questions: list[Question]) -> set[int]:
        """Return the positions of the questions of which this rank scores a choice."""
        lengths = [len(candidate.tokens) for question in questions for candidate in question.candidates]
        question_of = [number for number, question in enumerate(questions) for _ in question.candidates]
        return {question_of[index] for index in self.engine.reads_vision(lengths)}


def training_samples(batch: Sequence[Encoded]) -> list[Sample]:
    """Return the global batch of one optimizer step, whose loss is the mean over all its trained tokens."""
    weights = aggregation_weights([encoded.trained for encoded in batch], "token-mean")
    return [as_sample(encoded, weight) for encoded, weight in zip(batch, weights, strict=True)]
