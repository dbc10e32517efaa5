"""The config of an SFT run, all sections together; what it shares with a reasoning run it takes from there."""

import dataclasses
from typing import Literal

from mbridge_config.schema.actor import MOST_LAYERS, ActorConfig, ModelConfig, TokenizerConfig
from mbridge_config.schema.keys import key, section
from mbridge_config.schema.provenance import Provenance
from mbridge_config.schema.runner import OTHER_TASKS, ClusterConfig, LauncherConfig, RunnerConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTRunnerConfig(RunnerConfig):
    """`runner` of an SFT run."""

    task_type: Literal["reasoning", "sft"] = key(
        "sft", "What is trained: RL on verifiable answers, or SFT.", refused=OTHER_TASKS
    )
    only_eval: bool = key(False, "Evaluate the model on val_data_paths once, and train nothing.")


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTModelConfig(ModelConfig):
    """`actor.model` of an SFT run."""

    freeze_language_model: bool = key(False, "Vision-language models: do not train embeddings, layers, output layer.")
    freeze_vision_model: bool = key(False, "Vision-language models: do not train the vision tower.")
    freeze_vision_projection: bool = key(
        False, "Vision-language models: do not train the projection of the tower's features into the language model."
    )


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTTokenizerConfig(TokenizerConfig):
    """`actor.tokenizer` of an SFT run."""

    tokenizer_model: str | None = key(None, "Directory of tokenizer, processor and chat template. null: model_path.")


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTActorConfig(ActorConfig):
    """`actor` of an SFT run."""

    global_batch_size: int = key(
        32,
        "Examples of one optimizer step over all ranks; the loss is the mean over their trained tokens.",
        unit="examples",
        minimum=1,
    )
    eval_batch_size: int | None = key(
        None, "Examples evaluated at once over all ranks. null: global_batch_size.", unit="examples", minimum=1
    )
    model: SFTModelConfig = section(SFTModelConfig, "The model.")
    tokenizer: SFTTokenizerConfig = section(SFTTokenizerConfig, "The tokenizer.")


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
        "text", "robo2vlm: answer with the text of the right choice, or with its letter."
    )
    image_root: str | None = key(None, "messages: directory that image paths are relative to. null: that of the file.")
    allow_urls: bool = key(False, "messages: fetch images given as URLs; if false, such rows are bad.")
    private_networks: list[str] = key(
        [], "messages: loopback and private addresses that URLs may lead to, such as 10.0.0.0/8; by default none."
    )
    min_pixels: int | None = key(
        None, "Smallest image; smaller ones are enlarged. null: the processor's setting.", unit="pixels", minimum=1
    )
    max_pixels: int | None = key(None, "Largest image. null: the processor's setting.", unit="pixels", minimum=1)
    oversized: Literal["resize", "refuse"] = key(
        "resize", "Images over max_pixels: shrink them, or count their rows as bad."
    )
    max_bad_rows: int = key(0, "Unusable rows to skip before the run ends with an error.", unit="rows", minimum=0)
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


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTQuickstartConfig:
    """`quickstart`: the data and the tiny vision-language model that are created if none are given."""

    enabled: bool = key(
        False,
        "Create handwritten digits at the paths of data, and the model at model.model_path, if they do not exist.",
    )
    hidden_size: int = key(128, "Width of the created language model.", minimum=1)
    intermediate_size: int = key(256, "Width of its MLP.", minimum=1)
    num_hidden_layers: int = key(4, "Its layers.", minimum=1, maximum=MOST_LAYERS)
    num_attention_heads: int = key(4, "Its query heads, of width 32.", minimum=1)
    num_key_value_heads: int = key(2, "Its key and value heads.", minimum=1)
    vision_depth: int = key(3, "Layers of the created vision tower.", minimum=1)
    vision_hidden_size: int = key(64, "Width of the tower; 32 for each of its heads.", minimum=1)
    vision_intermediate_size: int = key(128, "Width of the tower's MLP.", minimum=1)
    vision_num_heads: int = key(2, "Heads of the tower.", minimum=1)
    deepstack_visual_indexes: list[int] = key(
        [0, 1], "Layers of the tower whose features are added after the first language layers.", minimum=0
    )
    tie_word_embeddings: bool = key(False, "Input and output embeddings are one tensor.")
    max_position_embeddings: int = key(2048, "Longest sequence of the created model.", unit="tokens", minimum=2)
    vocab_size: int = key(384, "Largest vocabulary of the created tokenizer.", minimum=300)
    initializer_range: float = key(0.02, "Standard deviation of the created weights.", above=0.0)


@dataclasses.dataclass(kw_only=True, slots=True)
class SFTConfig:
    """Supervised fine-tuning of vision-language and text models. `provenance` records where each key was set."""

    runner: SFTRunnerConfig = section(SFTRunnerConfig, "The run.")
    data: SFTDataConfig = section(SFTDataConfig, "Data.")
    actor: SFTActorConfig = section(SFTActorConfig, "The trained model.")
    cluster: ClusterConfig = section(ClusterConfig, "Hosts.")
    launcher: LauncherConfig = section(LauncherConfig, "Processes.")
    quickstart: SFTQuickstartConfig = section(SFTQuickstartConfig, "The created model.")
    provenance: Provenance = dataclasses.field(default_factory=Provenance, repr=False, compare=False)
