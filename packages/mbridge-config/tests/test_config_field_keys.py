"""A YAML with the keys that RLinf's reasoning configs have is taken as it is; what has no effect is noted once."""

from pathlib import Path

from mbridge_config import Severity, check, compose

FIELD = """\
defaults:
  - override hydra/job_logging: stdout
hydra:
  run: {{dir: .}}
  output_subdir: null
cluster:
  num_nodes: 2
  component_placement: {{"actor,rollout,reward": all}}
runner:
  task_type: reasoning
  logger:
    log_path: ${{runner.output_dir}}/${{runner.experiment_name}}
    project_name: trial
    experiment_name: ${{runner.experiment_name}}
    logger_backends: ["tensorboard"]
  max_epochs: 2
  max_steps: -1
  val_check_interval: 5
  save_interval: 10
  seq_length: 512
  enable_dynamic_batch_size: False
  max_tokens_per_mbs: 1024
  resume_dir: null
  experiment_name: ${{cluster.num_nodes}}node-${{algorithm.group_size}}*16-${{rollout.gpu_memory_utilization}}
  output_dir: ./trial
algorithm:
  group_size: 4
  n_minibatches: 2
  training_batch_size_per_gpu: 2
  rollout_batch_size_per_gpu: null
  logprob_forward_micro_batch_size: ${{algorithm.training_batch_size_per_gpu}}
  val_rollout_batch_size_per_gpu: 3
  recompute_logprobs: True
  shuffle_rollout: False
  loss_type: actor
  loss_agg_func: "token-mean"
  kl_beta: 0.001
  kl_penalty_type: low_var_kl
  ratio_clip_eps: 0.2
  entropy_bonus: 0.0
  calculate_entropy: True
  clip_ratio_c: null
  clip_ratio_low: null
  clip_ratio_high: 0.25
  adv_type: math_grpo
  normalize_advantages: True
  early_stop_imp_ratio: 4.0
  use_valid_token_scale: False
  sampling_params:
    do_sample: True
    temperature: 0.9
    top_k: 1000000
    top_p: 1.0
    repetition_penalty: 1.0
    max_new_tokens: ${{subtract:${{runner.seq_length}}, ${{data.max_prompt_length}}}}
    min_new_tokens: 1
rollout:
  group_name: "Generating"
  gpu_memory_utilization: 0.5
  model:
    model_path: {model}
    model_type: qwen2.5
    precision: ${{actor.model.precision}}
  enforce_eager: False
  distributed_executor_backend: mp
  disable_log_stats: False
  detokenize: False
  padding: null
  eos: null
  rollout_backend: sglang
  sglang: {{attention_backend: triton, decode_log_interval: 1000}}
  vllm: {{attention_backend: FLASH_ATTN, enable_prefix_caching: True}}
  return_logprobs: ${{not:${{algorithm.recompute_logprobs}}}}
  tensor_parallel_size: 1
  pipeline_parallel_size: 1
  validate_weight: False
  validate_save_dir: null
  print_outputs: False
  max_running_requests: 32
  cuda_graph_max_bs: 32
data:
  type: math
  dataset_name: made_up
  max_prompt_length: 128
  filter_prompt_by_length: True
  rollout_batch_size: 16
  val_rollout_batch_size: null
  num_workers: 1
  prompt_key: prompt
  answer_key: solutions
  apply_chat_template: False
  shuffle: True
  validation_shuffle: True
  seed: 7
  train_data_paths: ["{data}"]
  val_data_paths: ["{data}"]
actor:
  group_name: "Training"
  training_backend: megatron
  mcore_gpt: True
  spec_name: decoder_gpt
  checkpoint_load_path: null
  offload_optimizer: True
  offload_weight: True
  offload_grad: True
  enable_dp_load_balance: False
  calculate_flops: False
  seed: 7
  model:
    precision: bf16
    add_bias_linear: False
    tensor_model_parallel_size: 2
    pipeline_model_parallel_size: 1
    activation: swiglu
    sequence_parallel: True
    recompute_method: block
    recompute_granularity: full
    recompute_num_layers: 3
    seq_length: ${{runner.seq_length}}
    encoder_seq_length: ${{runner.seq_length}}
    normalization: rmsnorm
    position_embedding_type: rope
    apply_rope_fusion: True
    bias_dropout_fusion: False
    persist_layer_norm: False
    bias_activation_fusion: False
    attention_softmax_in_fp32: True
    batch_p2p_comm: False
    variable_seq_lengths: True
    gradient_accumulation_fusion: False
    moe_token_dispatcher_type: alltoall
    use_cpu_initialization: False
  optim:
    optimizer: adam
    bf16: True
    fp16: False
    lr: 1e-6
    adam_beta1: 0.9
    adam_beta2: 0.95
    adam_eps: 1.0e-05
    min_lr: 1.0e-7
    weight_decay: 0.05
    use_distributed_optimizer: True
    overlap_grad_reduce: True
    overlap_param_gather: True
    optimizer_enable_pin: false
    overlap_param_gather_with_optimizer_step: False
    clip_grad: 0.8
    loss_scale_window: 5
  lr_sched:
    lr_warmup_fraction: 0.01
    lr_warmup_init: 0.0
    lr_warmup_iters: 0
    max_lr: 1e-6
    min_lr: 0.0
    lr_decay_style: constant
    lr_decay_iters: 10
  tokenizer:
    tokenizer_model: ${{rollout.model.model_path}}
    use_fast: False
    trust_remote_code: False
    padding_side: 'right'
  megatron:
    ddp_bucket_size: null
    distributed_backend: nccl
    distributed_timeout_minutes: 30
    ckpt_format: torch
    use_dist_ckpt: False
    tp_comm_bootstrap_backend: nccl
    tp_comm_overlap_cfg: null
    use_hf_ckpt: True
    use_profiler: False
    ckpt_convertor:
      model: made-up
      model_type: null
      hf_model_path: ${{rollout.model.model_path}}
      save_path: ${{runner.output_dir}}/converted
      use_gpu_num: 0
      use_gpu_index: null
      process_num: 16
      tensor_model_parallel_size: ${{actor.model.tensor_model_parallel_size}}
      pipeline_model_parallel_size: ${{actor.model.pipeline_model_parallel_size}}
    profiler:
      output_dir: ${{runner.output_dir}}/${{runner.experiment_name}}/profiler
      activities: ["cpu", "cuda"]
      record_shapes: False
      profile_memory: False
      with_stack: False
      with_flops: False
      with_modules: True
      export_tensorboard: True
      export_chrome_trace: False
      chrome_filename_prefix: "chrome_trace"
      schedule_wait: 1
      schedule_warmup: 1
      schedule_active: 3
      schedule_repeat: 0
reward:
  group_name: "Scoring"
  use_reward_model: false
  reward_type: 'math'
  reward_scale: 5.0
  tokenizer:
    tokenizer_model: ${{actor.tokenizer.tokenizer_model}}
critic:
  use_critic_model: false
"""


def test_keys_of_the_field(yaml: Path, model: Path) -> None:
    data = model.parent / "data.jsonl"
    (yaml / "field.yaml").write_text(FIELD.format(model=model, data=data))
    config = compose("field", yaml, ["+actor.megatron.mbridge=True"])
    report = check(config, world_size=16)

    assert report.errors == []
    assert [problem.id for problem in report.problems if problem.severity is Severity.WARNING] == ["rollout-backend"]
    notes = [problem.key for problem in report.problems if problem.severity is Severity.NOTE]
    assert {"rollout.sglang", "actor.calculate_flops", "actor.mcore_gpt", "algorithm.loss_type"} <= set(notes)
    assert len(notes) == len(set(notes))

    assert config.runner.experiment_name == "2node-4*16-0.5"
    assert config.algorithm.sampling_params.max_new_tokens == 384
    assert config.algorithm.sampling_params.use_greedy is False
    assert (config.algorithm.clip_ratio_low, config.algorithm.clip_ratio_high) == (0.2, 0.25)
    assert (config.algorithm.kl_penalty_type, config.actor.micro_batch_size) == ("k3", 2)
    assert config.rollout.return_logprobs is False
    assert report.plan is not None
    assert (report.plan.tensor_parallel, report.plan.data_parallel, report.plan.micro_batches) == (2, 8, 2)
