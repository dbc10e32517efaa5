"""Examples to fine-tune on: questions with images and answers, or chats."""

import dataclasses
from typing import Literal

from mbridge_config.schema.keys import alias, key, no_effect

_TEMPLATE = "prompts always go through the model's own chat template"


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTDataConfig:
    """`data`: what is trained and evaluated on."""

    dataset_name: Literal["auto", "robo2vlm", "messages"] = key(
        "auto",
        "robo2vlm: all files are parquet, with a question, choices, the right one, and images. "
        "messages: all files are jsonl, with chats. auto: each as its suffix says.",
        spellings={"robo2vlmsft": "robo2vlm"},
    )
    train_data_paths: list[str] = key([], "Files or directories of files to train on.")
    val_data_paths: list[str] = key([], "Files or directories of files to evaluate on.")
    prompt_key: str = key("question", "robo2vlm: column of the question.")
    choice_key: str = key("choices", "robo2vlm: column of the choices.")
    answer_key: str = key("correct_answer", "robo2vlm: column of the right choice.")
    image_keys: list[str] | None = key(
        None, "robo2vlm: columns of the images. null: those named image, or image and a number."
    )
    answer_format: Literal["text", "letter"] = key(
        "text", "robo2vlm: the model answers the right choice's text, or its letter."
    )
    image_root: str | None = key(None, "messages: directory that image paths start at. null: that of the file.")
    allow_urls: bool = key(False, "messages: fetch images given as URLs; if false they are bad rows.")
    min_pixels: int | None = key(
        None, "Smaller images are enlarged. null: as the model's processor says.", unit="pixels", minimum=1
    )
    max_pixels: int | None = key(
        None, "Most pixels of an image. null: as the model's processor says.", unit="pixels", minimum=1
    )
    oversized: Literal["resize", "refuse"] = key(
        "resize", "Images over max_pixels: made smaller, or refused as bad rows."
    )
    max_bad_rows: int = key(
        0, "Rows that cannot be read or used and are skipped before the run ends.", unit="rows", minimum=0
    )
    skip_long_rows: bool = key(
        False, "Leave out rows that are longer than runner.seq_length, without counting them as bad."
    )
    num_workers: int = key(
        2, "Processes that decode images and tokenize; 0: the training process itself.", unit="processes", minimum=0
    )
    shuffle: bool = key(True, "Shuffle the training data at each epoch.")
    seed: int = key(1234, "Seed of the data order.", minimum=0)
    train_on: Literal["last", "all"] = key(
        "last", "messages: train on the last answer, or on all answers of the assistant."
    )

    eval_data_paths: list[str] | None = alias("data.val_data_paths")
    type: str | None = no_effect(None, "dataset_name says how files are read")
    lazy_loading: bool | None = no_effect(None, "images are always decoded when they are needed")
    apply_chat_template: bool | None = no_effect(None, _TEMPLATE)
    use_chat_template: bool | None = no_effect(None, _TEMPLATE)
    max_prompt_length: int | None = no_effect(None, "runner.seq_length bounds prompt and answer together")
    answer_separator: str | None = no_effect(None, _TEMPLATE)
    validation_shuffle: bool | None = no_effect(
        None, "every evaluation uses all examples, so their order is of no matter"
    )
    val_rollout_batch_size: int | None = no_effect(None, "evaluation uses actor.eval_batch_size")
