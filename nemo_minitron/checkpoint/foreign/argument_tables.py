"""Which argument of Megatron-LM or Megatron-Bridge is which key here, and why some have none.

Data only; names are those of Megatron-LM's parser. Fields of Megatron-Core's dataclasses that are
in no table here are keys of the section ``megatron:``, or have their reason in
``config/megatron_owned.py``.
"""

from collections.abc import Mapping


def _names(text: str) -> list[str]:
    return text.split()


KEYS: Mapping[str, tuple[str, ...]] = {
    **{
        name: (f"parallel.{name}",)
        for name in _names(
            "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
            "expert_model_parallel_size virtual_pipeline_model_parallel_size "
            "sequence_parallel pipeline_model_parallel_layout "
            "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage"
        )
    },
    "decoder_first_pipeline_num_layers": ("parallel.num_layers_in_first_pipeline_stage",),
    "decoder_last_pipeline_num_layers": ("parallel.num_layers_in_last_pipeline_stage",),
    "num_virtual_stages_per_pipeline_rank": ("parallel.virtual_pipeline_model_parallel_size",),
    "seq_length": ("data.seq_length",),
    "micro_batch_size": ("data.micro_batch_size",),
    "global_batch_size": ("data.global_batch_size",),
    "data_path": ("data.path",),
    "split": ("data.split",),
    "data_cache_path": ("data.cache_dir",),
    "seed": ("data.seed", "trainer.seed"),
    "train_iters": ("trainer.max_steps",),
    "eval_interval": ("trainer.val_check_interval",),
    "eval_iters": ("trainer.limit_val_batches",),
    "log_interval": ("trainer.log_every_n_steps",),
    "save_interval": ("trainer.save_every_n_steps",),
    "clip_grad": ("trainer.gradient_clip_val",),
    **{
        name: (f"trainer.{name}",)
        for name in _names(
            "recompute_granularity recompute_method recompute_num_layers recompute_modules"
        )
    },
    **{
        name: (f"optim.{name}",)
        for name in _names(
            "lr min_lr lr_decay_style weight_decay adam_beta1 adam_beta2 adam_eps "
            "use_distributed_optimizer"
        )
    },
    "lr_warmup_iters": ("optim.lr_warmup_steps",),
}
"""Argument -> keys that take its value."""

DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "lr": {
        "min_lr": 0.0,
        "lr_decay_style": "linear",
        "weight_decay": 0.01,
        "adam_beta2": 0.999,
        "use_distributed_optimizer": False,
    },
    "train_iters": {"eval_interval": 1000, "eval_iters": 100, "log_interval": 100},
    "data_path": {"split": "969,30,1"},
}
"""Argument -> what Megatron-LM does beside it where nothing else is said, and we do not."""

FIELDS: Mapping[str, tuple[str, object]] = {
    "fp8_format": ("transformer.fp8", None),
    "fp8_param_gather": ("transformer.fp8_param", None),
    "fp4_format": ("transformer.fp4", None),
    "no_persist_layer_norm": ("transformer.persist_layer_norm", False),
    "no_overlap_p2p_communication": ("transformer.overlap_p2p_comm", False),
    "no_rope_fusion": ("transformer.apply_rope_fusion", False),
    "no_bias_swiglu_fusion": ("transformer.bias_activation_fusion", False),
    "no_bias_gelu_fusion": ("transformer.bias_activation_fusion", False),
    "accumulate_allreduce_grads_in_fp32": ("ddp.grad_reduce_in_fp32", True),
    "grad_reduce_in_bf16": ("ddp.grad_reduce_in_fp32", False),
    "ddp_bucket_size": ("ddp.bucket_size", None),
    "no_check_for_nan_in_loss_and_grad": ("ddp.check_for_nan_in_grad", False),
    "use_flash_attn": ("transformer.attention_backend", "flash"),
}
"""Argument -> field of ``megatron:`` with another name, and its value where the flag has none."""

MODEL = frozenset(
    _names(
        "swiglu squared_relu quick_geglu untie_embeddings_and_output_weights "
        "disable_bias_linear group_query_attention num_query_groups "
        "max_position_embeddings norm_epsilon num_experts apply_layernorm_1p "
        "use_rope_scaling use_rotary_position_embeddings no_position_embedding "
        "rotary_seq_len_interpolation_factor spec vocab_size padded_vocab_size "
        "make_vocab_size_divisible_by tokenizer_type tokenizer_model"
    )
)
"""Arguments about the model that ``checkpoint/foreign`` reads in a checkpoint too."""

QUIET = frozenset(
    _names(
        "bf16 fp16 train_samples lr_warmup_fraction lr_warmup_samples lr_decay_iters "
        "lr_decay_samples num_layers_per_virtual_pipeline_stage recompute_activations "
        "nproc_per_node nnodes node_rank master_addr master_port rdzv_id rdzv_backend "
        "rdzv_endpoint"
    )
)
"""Arguments that are read together with others."""


def _all(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


REASONS: Mapping[str, str] = {
    **_all(
        "folders are the keys of a stage: output_dir, and checkpoint, student or teacher",
        "save load pretrained_checkpoint ckpt_step finetune exit_on_missing_checkpoint",
    ),
    **_all(
        "checkpoints are always torch_dist, whole and with the optimizer",
        "ckpt_format use_dist_ckpt dist_ckpt_format ckpt_fully_parallel_save "
        "ckpt_fully_parallel_load no_save_optim no_save_rng no_load_optim no_load_rng async_save "
        "use_checkpoint_args auto_detect_ckpt_format dist_ckpt_strictness ckpt_assume_constant_"
        "structure use_persistent_ckpt_worker",
    ),
    **_all(
        "loggers are keys of exp_manager.*",
        "tensorboard_dir wandb_project wandb_exp_name wandb_save_dir wandb_entity "
        "tensorboard_queue_size tensorboard_log_interval log_timers_to_tensorboard "
        "log_memory_to_tensorboard log_validation_ppl_to_tensorboard log_num_zeros_in_grad "
        "log_params_norm log_throughput log_progress timing_log_level timing_log_option "
        "log_world_size_to_tensorboard log_loss_scale_to_tensorboard log_learning_rate_to_"
        "tensorboard log_batch_size_to_tensorboard",
    ),
    **_all(
        "the launcher's business; ranks and their groups follow from parallel.*",
        "distributed_backend distributed_timeout_minutes local_rank lazy_mpu_init "
        "use_gloo_process_groups disable_gloo_process_groups",
    ),
    **_all(
        "a stop signal saves and ends; the same command goes on",
        "exit_duration_in_mins exit_interval exit_signal_handler",
    ),
    **_all(
        "text is needed: data.path",
        "mock_data train_data_path valid_data_path test_data_path data_args_path",
    ),
    **_all(
        "the tokenizer is that of the checkpoint",
        "tokenizer_hf_use_fast vocab_file merge_file tiktoken_pattern tiktoken_num_special_tokens "
        "legacy_tokenizer null_tokenizer_eod_id null_tokenizer_pad_id",
    ),
    **_all(
        "data is read by this package's own loader",
        "num_workers num_dataset_builder_threads no_create_attention_mask_in_dataloader "
        "no_mmap_bin_files dataloader_type reset_position_ids reset_attention_mask eod_mask_loss",
    ),
    **_all("the only way there is here", "use_mcore_models use_te optimizer"),
    **_all(
        "profiling and collecting garbage are left to Python and the profiler",
        "manual_gc manual_gc_interval manual_gc_eval profile profile_step_start profile_step_end "
        "profile_ranks use_pytorch_profiler empty_unused_memory_level",
    ),
    **_all(
        "no key: the rate falls from optim.lr to optim.min_lr over trainer.max_steps",
        "lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples "
        "start_weight_decay end_weight_decay weight_decay_incr_style "
        "override_opt_param_scheduler use_checkpoint_opt_param_scheduler",
    ),
    **_all("no key: the global batch has one size", "rampup_batch_size"),
    "init_method_xavier_uniform": "weights always come from a checkpoint",
    "init_method_std": "weights always come from a checkpoint",
}
"""Argument of Megatron-LM's own programs -> why no key takes it."""

OTHER_VERSIONS: Mapping[str, str] = {
    "no_async_tensor_model_parallel_allreduce": "gone from Megatron-LM since core 0.13",
    "checkpoint_activations": "--recompute-granularity full since Megatron-LM 3.0",
    "distribute_checkpointed_activations": "--distribute-saved-activations since Megatron-LM 3.0",
    "DDP_impl": "gone from Megatron-LM since 3.0",
    "use_legacy_models": "gone from Megatron-LM since core 0.16",
    "model_parallel_size": "--tensor-model-parallel-size since Megatron-LM 2.0",
    "moe_extended_tp": "--expert-tensor-parallel-size since core 0.10",
    "enable_cuda_graph": "--cuda-graph-impl local since core 0.15",
    "external_cuda_graph": "--cuda-graph-impl transformer_engine since core 0.15",
}
"""Argument that some version of Megatron-LM had -> what it is since."""
