"""The configs that `mbridge-config init` writes. What is not in them has its default."""

REASONING = """\
# GRPO with {title}.

runner:
  task_type: reasoning
  experiment_name: {name}
  output_dir: results
  max_steps: 100                 # -1: runner.max_epochs decides
  save_interval: 50
  val_check_interval: 10
  seq_length: {longest}               # prompt and answer together
  enable_dynamic_batch_size: true
  max_tokens_per_mbs: {tokens}       # more is faster, until memory is full

algorithm:
  group_size: 8                  # answers to each prompt, compared with each other
  kl_beta: 0.0                   # above 0: stay near the model that the run begins with

{data}
  apply_chat_template: {template}
  max_prompt_length: {prompt}
  filter_prompt_by_length: true
  rollout_batch_size: 32         # prompts per step

actor:
  model:
    precision: bf16
    # The layout: `mbridge-config fit` on this file proposes one for your GPUs.
    tensor_model_parallel_size: 1
    pipeline_model_parallel_size: 1
  optim:
    lr: 1.0e-6
  tokenizer:
    tokenizer_model: ${{actor.megatron.ckpt_convertor.hf_model_path}}
  megatron:
    ckpt_convertor:
      hf_model_path: {model}

reward:
  reward_type: {reward}
"""

SFT = """\
# Supervised fine-tuning of {title}.

runner:
  task_type: sft
  experiment_name: {name}
  output_dir: results
  max_steps: 100                 # -1: runner.max_epochs decides
  save_interval: 50
  seq_length: {longest}               # prompt, image tokens and answer together
  enable_dynamic_batch_size: true
  max_tokens_per_mbs: {tokens}       # more is faster, until memory is full

{data}

actor:
  global_batch_size: 32          # examples per step
  model:
    model_path: {model}
    precision: bf16
    # The layout: `mbridge-config fit` on this file proposes one for your GPUs.
    tensor_model_parallel_size: 1
    pipeline_model_parallel_size: 1
  optim:
    lr: 1.0e-5
  lr_sched:
    lr_warmup_iters: 10
    lr_decay_style: cosine
{quickstart}"""

GYM = """\
data:
  type: reasoning_gym            # generated problems; for your own files: type: math and train_data_paths
  reasoning_gym:
    task: basic_arithmetic\
"""

FILES = """\
data:
  train_data_paths: {paths}
  # val_data_paths: [...]        # and runner.val_check_interval\
"""

PAIRS = """
  type: math
  prompt_key: prompt             # fields of a record
  answer_key: solutions\
"""

DIGITS = """\
data:                            # handwritten digits; for your own, name the files and remove quickstart below
  train_data_paths: ["${runner.output_dir}/${runner.experiment_name}/digits/train"]
  val_data_paths: ["${runner.output_dir}/${runner.experiment_name}/digits/eval"]\
"""
