"""The table of RLinf's keys: data alone; `keys` makes `KeyInfo` of it.

Names of one section, reason and type stand in one line of text, separated by blanks. Every type also takes null.
"""

import dataclasses
from typing import Any, Literal

NoEffect = dict[str, dict[str, dict[Any, str]]]
"""Section -> why its keys change nothing -> type -> names."""

NO_EFFECT: NoEffect = {
    "runner": {
        "generation and training take turns on the same ranks": {bool: "enable_decoupled_mode"},
        "all ranks write to the terminal of the command": {bool: "per_worker_log"},
    },
    "actor.model": {
        "there is no encoder": {int: "pipeline_model_parallel_split_rank encoder_seq_length"},
        "sequences always have their own lengths": {bool: "variable_seq_lengths"},
        "fusions are chosen by the layer backend": {
            bool: (
                "apply_rope_fusion gradient_accumulation_fusion bias_activation_fusion bias_dropout_fusion "
                "masked_softmax_fusion persist_layer_norm moe_permute_fusion"
            )
        },
        "the attention kernels keep the softmax in fp32": {bool: "attention_softmax_in_fp32"},
        "pipeline communication is set by the schedule": {bool: "batch_p2p_comm"},
        "weights come from a checkpoint": {bool: "use_cpu_initialization", float: "init_method_std"},
        "the vocabulary is padded where tensor parallelism needs it, and HuggingFace copies have no padding": {
            int: "make_vocab_size_divisible_by padded_vocab_size"
        },
        "the architecture is read from the model's config.json": {str: "model_type"},
        "position embeddings follow the model's config.json": {
            float: "seq_len_interpolation_factor",
            bool: "add_position_embedding",
        },
        "mixture-of-experts layers use the backend's dispatcher": {str: "moe_token_dispatcher_type"},
        "mixture-of-experts layers use the backend's kernels": {str | bool: "moe_grouped_gemm"},
        "routers follow the model's config.json": {
            str: "moe_router_load_balancing_type",
            bool: "moe_router_pre_softmax",
            float: "moe_router_bias_update_rate",
            int: "moe_router_topk",
        },
        "no auxiliary loss is added": {float: "moe_aux_loss_coeff"},
    },
    "actor.optim": {
        "optimizer state is not offloaded during updates in this version": {
            bool: "optimizer_enable_pin optimizer_cpu_offload",
            float: "optimizer_offload_fraction",
        },
        "master weights and moments are kept in fp32": {bool: "use_precision_aware_optimizer"},
    },
    "actor.lr_sched": {
        "a resumed run follows the schedule of its config": {
            bool: "use_checkpoint_opt_param_scheduler override_opt_param_scheduler"
        },
    },
    "actor.tokenizer": {
        "training pads right and generation left": {Literal["left", "right"]: "padding_side"},
    },
    "actor.megatron": {
        "ranks communicate with nccl where there is a GPU, else with gloo": {
            Literal["nccl", "gloo"]: "distributed_backend"
        },
        "tensor-parallel overlap is chosen by the layer backend": {
            str: "tp_comm_bootstrap_backend tp_comm_overlap_cfg",
            bool: "decoder_tp_comm_overlap",
        },
        "gradients are summed in fp32 buckets; only ddp_bucket_size can be set": {
            bool: "accumulate_allreduce_grads_in_fp32 ddp_pad_buckets_for_high_nccl_busbw ddp_average_in_collective",
            int: "ddp_num_buckets",
        },
        "ranks are numbered and grouped as Megatron-Core does by default": {
            bool: "use_tp_pp_dp_mapping enable_gloo_process_groups",
            int: "num_distributed_optimizer_instances",
            str: "nccl_communicator_config_path",
        },
        "there is no encoder": {int: "encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size"},
        "weights come from a checkpoint": {bool: "init_model_with_meta_device data_parallel_random_init"},
        "belongs to Megatron-LM's own training loop, which is not used": {
            int: "timing_log_level",
            str: "timing_log_option rerun_mode error_injection_type",
            bool: "log_progress check_for_large_grads check_for_nan_in_loss_and_grad",
            float: "error_injection_rate",
        },
        "a checkpoint always holds the whole state; runner.checkpoint says how it is written": {
            bool: (
                "ckpt_fully_parallel_save ckpt_convert_update_legacy_dist_opt_format "
                "ckpt_assume_constant_structure auto_detect_ckpt_format exit_on_missing_checkpoint "
                "use_tokenizer_model_from_checkpoint_args"
            ),
            str: (
                "ckpt_convert_format non_persistent_ckpt_type non_persistent_local_ckpt_dir "
                "non_persistent_global_ckpt_dir non_persistent_local_ckpt_algo"
            ),
            int: "non_persistent_save_interval",
        },
    },
    "actor.megatron.ckpt_convertor": {
        "nothing is converted beforehand; the HuggingFace weights are loaded straight into the model": {
            str: "model model_type save_path te_ln_add_extra_state",
            int: (
                "use_gpu_num process_num tensor_model_parallel_size pipeline_model_parallel_size "
                "expert_model_parallel_size expert_tensor_parallel_size"
            ),
            int | list[int]: "use_gpu_index",
            str | bool: "grouped_gemm",
            bool: "te_ln_linear_qkv te_ln_linear_mlp_fc1",
        },
    },
    "actor": {
        "ranks are not split into named groups": {str: "group_name"},
        "the model is built from its config.json": {bool: "mcore_gpt", str: "spec_name"},
        "sequences are always balanced over ranks by tokens": {bool: "enable_dp_load_balance"},
        "operations are always counted": {bool: "calculate_flops"},
        "the app decides how the reference policy is kept": {bool: "combine_reference_model"},
    },
    "cluster": {
        "every rank trains, generates and scores; components are not placed on GPUs of their own": {
            dict[str, Any]: "component_placement",
            list[Any]: "node_groups",
            bool: (
                "auto_scheduler use_pre_process_policy rollout_use_all_gpus use_wait_before_last_iter_policy "
                "fuse_rollout_inference_only recreate_nccl_groups"
            ),
            str: "assign_policy",
            float: "monitor_interval preprocess_threshold",
            int: "migrate_out_max_bs",
        },
        "actor.megatron.use_profiler records what a run does": {dict[str, Any]: "tracer profiling"},
    },
}
"""Keys without effect in all kinds of runs."""

NO_EFFECT_IN_REASONING: NoEffect = {
    "algorithm": {
        "loss_agg_func alone says how much a trained token counts": {bool: "use_valid_token_scale"},
        "generation batches are set by rollout.max_running_requests": {
            int: "rollout_batch_size_per_gpu val_rollout_batch_size_per_gpu"
        },
        "log-probabilities use the micro-batches of training": {int: "logprob_forward_micro_batch_size"},
        "the policy loss is the only one": {str: "loss_type"},
        "each step generates once": {int: "max_num_gen_batches"},
        "there is no critic in this version": {
            float: "gamma gae_lambda value_cliprange value_clip",
            int: "critic_warmup_steps",
        },
        "belongs to REINFORCE++, which this version does not have": {
            float: "reinpp_kl_beta",
            bool: "use_reinpp_baseline",
        },
        "importance_sampling_fix is not in this version": {float: "importance_sampling_clip"},
    },
    "rollout.model": {
        "the architecture is read from the model's config.json": {str: "model_type"},
        "generation uses actor.model.precision": {str: "precision"},
    },
    "rollout": {
        "log-probabilities of generation are always kept, to measure the mismatch": {bool: "return_logprobs"},
        "the architecture is read from the model's config.json": {str: "model_arch"},
        "generation uses actor.model.precision": {str: "precision"},
        "ranks are not split into named groups": {str: "group_name"},
        "belongs to a serving engine; answers are generated with transformers": {
            float: "gpu_memory_utilization",
            bool: "enforce_eager disable_log_stats detokenize use_torch_compile",
            str: "distributed_executor_backend",
            dict[str, Any]: "sglang vllm",
            int: (
                "sglang_decode_log_interval torch_compile_max_bs tensor_parallel_size pipeline_parallel_size "
                "cuda_graph_max_bs"
            ),
        },
        "the tokenizer's padding token is used": {int: "padding"},
        "the tokenizer's end token is used": {int: "eos"},
        "weights are streamed tensor by tensor and compared in tests": {
            str: "weight_reload validate_save_dir",
            bool: "validate_weight validate_weight_first_sync",
        },
    },
    "data": {
        "all data is read before the first step, by the training process": {int: "num_workers"},
        "every validation uses all problems, so their order does not matter": {bool: "validation_shuffle"},
        "data.type and the data paths say what is read": {str: "dataset_name"},
    },
    "actor": {
        "validation uses micro_batch_size": {int: "eval_batch_size"},
    },
    "reward": {
        "an answer is right or wrong; its reward has no parts": {dict[str, Any]: "reward_weights"},
        "rewards are computed from text": {dict[str, Any]: "tokenizer"},
        "ranks are not split into named groups": {str: "group_name"},
    },
    "": {
        "log-probabilities are computed by the training ranks": {dict[str, Any]: "inference"},
    },
}

NO_EFFECT_IN_SFT: NoEffect = {
    "data": {
        "dataset_name says how files are read": {str: "type"},
        "images are always decoded when they are needed": {bool: "lazy_loading"},
        "prompts always go through the model's own chat template": {
            bool: "apply_chat_template use_chat_template",
            str: "answer_separator",
        },
        "runner.seq_length bounds prompt and answer together": {int: "max_prompt_length"},
        "every evaluation uses all examples, so their order does not matter": {bool: "validation_shuffle"},
        "evaluation uses actor.eval_batch_size": {int: "val_rollout_batch_size"},
    },
    "actor.tokenizer": {
        "processors have their tokenizer's Rust implementation": {bool: "use_fast"},
    },
    "": {
        "nothing is generated or rewarded in SFT": {dict[str, Any]: "algorithm rollout reward critic"},
    },
}


@dataclasses.dataclass(slots=True, frozen=True)
class Alias:
    """Another spelling of the key `of`; its opposite, if `inverted`."""

    type: Any
    of: str
    inverted: bool = False


ALIASES = {
    "actor.checkpoint_load_path": Alias(str, "actor.model.megatron_checkpoint"),
    "actor.megatron.transformer_impl": Alias(str, "actor.model.backend"),
    "actor.megatron.async_save": Alias(bool, "runner.checkpoint.async_save"),
    "actor.model.decoder_first_pipeline_num_layers": Alias(int, "actor.model.num_layers_in_first_pipeline_stage"),
    "actor.model.decoder_last_pipeline_num_layers": Alias(int, "actor.model.num_layers_in_last_pipeline_stage"),
    "actor.model.untie_embeddings_and_output_weights": Alias(
        bool, "actor.model.share_embeddings_and_output_weights", inverted=True
    ),
}

ALIASES_IN_REASONING = {
    "algorithm.training_batch_size_per_gpu": Alias(int, "actor.micro_batch_size"),
    "algorithm.sampling_params.do_sample": Alias(bool, "algorithm.sampling_params.use_greedy", inverted=True),
    "rollout.model_dir": Alias(str, "rollout.model.model_path"),
}

ALIASES_IN_SFT = {"data.eval_data_paths": Alias(list[str], "data.val_data_paths")}


@dataclasses.dataclass(slots=True, frozen=True)
class Repeated:
    """A fact of the model that config.json holds in `field`, and `HFFacts` under the name `fact`.

    Both are None for the three names of kinds (activation, norm, positions), which a rule of their own compares.
    """

    type: Any
    doc: str
    fact: str | None = None
    field: str | None = None


CHECKED = {
    "num_layers": Repeated(int, "Transformer layers.", "num_layers", "num_hidden_layers"),
    "hidden_size": Repeated(int, "Width of the residual stream.", "hidden_size", "hidden_size"),
    "ffn_hidden_size": Repeated(int, "Width of the MLP.", "ffn_hidden_size", "intermediate_size"),
    "num_attention_heads": Repeated(int, "Query heads.", "num_attention_heads", "num_attention_heads"),
    "num_query_groups": Repeated(int, "Key and value heads.", "num_query_groups", "num_key_value_heads"),
    "kv_channels": Repeated(int, "Width of one head.", "head_dim", "head_dim"),
    "vocab_size": Repeated(int, "Rows of the embedding.", "vocab_size", "vocab_size"),
    "max_position_embeddings": Repeated(
        int, "Longest sequence the model was made for.", "max_position_embeddings", "max_position_embeddings"
    ),
    "rotary_base": Repeated(float, "Base of the rotary frequencies.", "rope_theta", "rope_theta"),
    "rotary_percentage": Repeated(
        float, "Share of each head's width that is rotated.", "rotary_fraction", "partial_rotary_factor"
    ),
    "layernorm_epsilon": Repeated(float, "Epsilon of the norms.", "norm_epsilon", "rms_norm_eps"),
    "add_qkv_bias": Repeated(bool, "Bias in the query, key and value projections.", "qkv_bias", "attention_bias"),
    "add_bias_linear": Repeated(bool, "Bias in the other linear layers.", "linear_bias", "mlp_bias"),
    "qk_layernorm": Repeated(bool, "Norms on queries and keys.", "qk_layernorm", "use_qk_norm"),
    "multi_latent_attention": Repeated(
        bool, "Keys and values from a compressed latent (DeepSeek-V2).", "multi_latent_attention", "kv_lora_rank"
    ),
    "share_embeddings_and_output_weights": Repeated(
        bool, "Input and output embeddings are one tensor.", "tied_embeddings", "tie_word_embeddings"
    ),
    "num_moe_experts": Repeated(int, "Experts of each MoE layer.", "num_experts", "num_experts"),
    "activation": Repeated(str, "swiglu, geglu or gelu."),
    "normalization": Repeated(str, "rmsnorm or layernorm."),
    "position_embedding_type": Repeated(str, "rope."),
}
"""Keys of `actor.model` that repeat a fact of config.json, which is the only source of it."""

_WHOLE = "a checkpoint holds the whole state, and a resumed run goes on with all of it"
_DISTRIBUTED = "mbridge trains with Megatron-Core's distributed optimizer"

REFUSED = {
    "actor.megatron.use_torch_fsdp2": ("Split weights with PyTorch's FSDP2.", _DISTRIBUTED),
    "actor.megatron.use_custom_fsdp": ("Split weights with Megatron's FSDP.", _DISTRIBUTED),
    "actor.megatron.skip_train": (
        "Train nothing.",
        "a run trains; only SFT can evaluate alone, with runner.only_eval",
    ),
    "actor.megatron.moe_use_upcycling": ("Turn a dense model into experts.", "upcycling is not in this version"),
    "actor.megatron.finetune": ("Load only the weights of a checkpoint.", _WHOLE),
    "actor.megatron.no_load_optim": ("Resume without optimizer state.", _WHOLE),
    "actor.megatron.no_load_rng": ("Resume without the random number generators' state.", _WHOLE),
    "actor.megatron.no_save_optim": ("Save no optimizer state.", _WHOLE),
    "actor.megatron.no_save_rng": ("Save no state of the random number generators.", _WHOLE),
    "actor.model.is_lora": ("Train low-rank adapters.", "LoRA is not in this version"),
    "actor.optim.overlap_param_gather_with_optimizer_step": (
        "Gather weights during the optimizer step.",
        "it needs a virtual pipeline",
    ),
}
"""Switches that must stay off: what they would do, and why they are refused."""

REFUSED_IN_REASONING = {
    "algorithm.importance_sampling_fix": (
        "Weight tokens by the ratio of training to rollout probability.",
        "not in this version",
    ),
    "reward.use_reward_model": ("Score with a trained model.", "reward models are not in this version"),
}
