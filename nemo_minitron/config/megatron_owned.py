"""Megatron's settings that this package decides itself: which field, and what decides it instead.

Data only, one table per dataclass of Megatron. A table holds fields of every supported version of
Megatron-Core; whatever is in none of them passes through (``config/megatron.py``).
"""

from collections.abc import Mapping

from nemo_minitron.config.axes import AXES, SETTINGS

Owned = Mapping[str, str]
"""Field -> end of the sentence "... is set by", with the key to use where there is one."""

_MODEL = "the checkpoint (its model.yaml) and the family of the model; there is no key for it"
_CODE = "code: it takes an object of Python"
_WEIGHTS = "what is loaded: weights always come from a checkpoint"
_ROUTER = "the family of the model: tokens are routed as the teacher's are, with no other loss"
_GRAPHS = "Megatron-LM's own training loop, which captures CUDA graphs and is not used here"
_INFERENCE = "Megatron's inference engine; use the keys of minitron generate and benchmark"
_NO_DROPOUT = "this package: teacher and student are compared without dropout"
_SCHEDULE = (
    "Megatron's training loop, of which this package uses the schedule alone: it would be ignored "
    "or break the losses"
)
_FSDP = "Megatron-FSDP, which this package does not run: it wraps models in Megatron's DDP"
_HOOKS = "the hooks of scores and losses: they read what a norm returns, which would be a pair"
_FP16 = "fp16's loss scaling, which trainer.precision (32 or bf16-mixed) does not use"
_ADAM = "this package: Adam with the keys of optim.*, whose state its training checkpoints hold"


def _names(text: str) -> list[str]:
    return text.split()


def _all(reason: str, names: str) -> dict[str, str]:
    """Give every name of a list the same reason."""
    return dict.fromkeys(_names(names), reason)


_LAYOUT = (
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
    "virtual_pipeline_model_parallel_size expert_model_parallel_size sequence_parallel "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "pipeline_model_parallel_layout"
)

TRANSFORMER: Owned = {
    **{
        size: f"the checkpoint (its model.yaml); use pruning.target.{size} of minitron prune"
        for size in (*(axis.size for axis in AXES.values()), *SETTINGS)
    },
    **{name: f"the layout; use parallel.{name}" for name in _LAYOUT.split()},
    **_all(
        "the layout; it has parallel.* keys, and none for this",
        "expert_tensor_parallel_size hierarchical_context_parallel_sizes hybrid_context_parallel "
        "max_seqlen_per_dp_cp_rank account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split moe_extended_tp tensor_parallel_num_weight_shards "
        "gtp_weight_remat_size expert_tensor_parallel_num_weight_shards "
        "expert_gtp_weight_remat_size pipeline_model_parallel_comm_backend mtp_standalone",
    ),
    **_all(
        _MODEL,
        "kv_channels normalization layernorm_epsilon layernorm_zero_centered_gamma "
        "gated_linear_unit activation_func activation_func_clamp_value glu_linear_offset "
        "add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm rotary_interleaved "
        "window_size window_attn_skip_freq no_rope_freq softmax_scale softmax_type "
        "attention_output_gate apply_residual_connection_post_layernorm mrope_section "
        "multi_latent_attention experimental_attention_variant dsa_indexer_n_heads "
        "dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff "
        "dsa_indexer_use_sparse_loss dsa_indexer_topk_freq dsa_indexer_skip_topk_offset "
        "dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation "
        "dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 "
        "linear_attention_freq linear_conv_kernel_dim linear_key_head_dim "
        "linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads "
        "mtp_hybrid_override_pattern moe_router_pre_softmax "
        "moe_shared_expert_gate moe_layer_freq moe_latent_size moe_router_score_function "
        "moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk "
        "moe_router_topk_limited_devices moe_router_enable_expert_bias moe_apply_probs_on_input "
        "moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size "
        "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
        "use_mamba_mem_eff_path mamba_training_ssm_states_dtype mlp_chunks_for_training "
        "heterogeneous_block_specs hetereogenous_dist_checkpoint transformer_impl quant_recipe "
        "use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult "
        "mup_base_head_dim mup_attn_scale_power qk_clip qk_clip_alpha qk_clip_threshold "
        "log_max_attention_logit",
    ),
    **_all(
        "the precision; use trainer.precision (precision in generate and benchmark)",
        "bf16 fp16 params_dtype pipeline_dtype enable_autocast autocast_dtype "
        "fp32_residual_connection",
    ),
    **_all(
        "the attention of this package and of Transformer Engine, neither of which reads it",
        "masked_softmax_fusion attention_softmax_in_fp32",
    ),
    **_all(_NO_DROPOUT, "hidden_dropout attention_dropout"),
    "calculate_per_token_loss": "the losses, which are sums over the tokens of the global batch",
    **_all(
        _ROUTER,
        "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_input_jitter_eps "
        "moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity "
        "moe_token_drop_policy moe_router_bias_update_rate moe_router_force_load_balancing "
        "moe_router_force_biased moe_router_quantile_balancing_ema moe_enable_routing_replay "
        "moe_expert_rank_capacity_factor moe_per_layer_logging",
    ),
    **_all(
        _WEIGHTS,
        "perform_initialization use_cpu_initialization init_model_with_meta_device init_method "
        "output_layer_init_method embedding_init_method init_method_std embedding_init_method_std",
    ),
    **_all(
        _CODE,
        "timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func "
        "param_sync_func moe_grad_scale_func mtp_grad_scale_func "
        "experimental_attention_variant_loss_scale_func fp8_quantizer_factory "
        "fp4_quantizer_factory _cpu_offloading_context",
    ),
    **_all(_HOOKS, "fused_residual_rmsnorm"),
    **_all(
        _SCHEDULE,
        "num_microbatches_with_partial_activation_checkpoints variable_seq_lengths "
        "deallocate_pipeline_outputs defer_embedding_wgrad_compute wgrad_deferral_limit "
        "overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release "
        "overlap_dispatch_backward_with_experts_wgrad use_ring_exchange_p2p barrier_with_L1_time "
        "tp_comm_bootstrap_backend test_mode moe_layer_recompute moe_paged_stash "
        "moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda "
        "moe_paged_stash_buffer_size_factor_cpu",
    ),
    **_all(
        "the losses of this package (distillation.*, chunk_size), which have their own kernels",
        "cross_entropy_loss_fusion cross_entropy_fusion_impl",
    ),
    **_all(
        _GRAPHS,
        "enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_scope cuda_graph_modules "
        "cuda_graph_use_single_mempool cuda_graph_retain_backward_graph cuda_graph_warmup_steps "
        "moe_pad_experts_for_cuda_graph_inference delay_offload_until_cuda_graph",
    ),
    **_all(
        _INFERENCE,
        "flash_decode inference_rng_tracker inference_sampling_seed symmetric_ar_type "
        "use_inference_optimized_layers inference_fuse_tp_communication mlp_chunks_for_prefill "
        "inference_cuda_graph_scope nccl_all_reduce_for_prefill "
        "inference_disable_triton_nvls_kernels inference_grouped_gemm_backend "
        "inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type "
        "batch_invariant_mode",
    ),
}

DDP: Owned = {
    "use_distributed_optimizer": "the optimizer; use optim.use_distributed_optimizer",
    "average_in_collective": "the losses, which are sums: gradients are summed, not averaged",
    "num_distributed_optimizer_instances": "the layout; it has parallel.* keys, and none for this",
    "fp8_param_gather": "the weights; use megatron.transformer.fp8_param",
    "fp4_param_gather": "the weights; use megatron.transformer.fp4_param",
    **_all(
        _SCHEDULE,
        "reuse_grad_buf_for_mxfp8_param_ag delay_wgrad_compute",
    ),
    **_all(
        _FSDP,
        "use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy preserve_fp32_weights "
        "suggested_communication_unit_size keep_fp8_transpose_cache fsdp_double_buffer "
        "outer_dp_sharding_strategy fsdp_manual_registration gradient_reduce_div_fusion "
        "fsdp_db_use_persist_buf_on_alloc_fail fsdp_all_gather_in_start_param_sync "
        "megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype "
        "megatron_fsdp_grad_comm_dtype megatron_fsdp_use_decoupled_grad "
        "megatron_fsdp_cuda_graph_mode megatron_fsdp_enable_fine_grained_param_gather "
        "megatron_fsdp_max_pool_double_buffer",
    ),
}

_OPTIM = "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps use_distributed_optimizer"

OPTIMIZER: Owned = {
    **{name: f"the optimizer; use optim.{name}" for name in _OPTIM.split()},
    "clip_grad": "the trainer; use trainer.gradient_clip_val",
    **_all("the precision; use trainer.precision", "bf16 fp16 params_dtype"),
    "overlap_param_gather": "the gradient buffers; use megatron.ddp.overlap_param_gather",
    "fp8_recipe": "the layers; use megatron.transformer.fp8_recipe",
    **_all(_FP16, "loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis"),
    **_all(
        _ADAM,
        "optimizer decoupled_weight_decay sgd_momentum muon_momentum muon_split_qkv "
        "muon_use_nesterov muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_num_ns_steps "
        "muon_tp_mode muon_extra_scale_factor muon_coefficient_type muon_scalar_optimizer "
        "lion_beta1 lion_beta2 soap_shampoo_beta soap_precondition_frequency soap_use_kl_shampoo "
        "adaptive_muon_moment2_method adaptive_muon_beta2 adaptive_muon_eps "
        "use_layer_wise_distributed_optimizer optimizer_cpu_offload optimizer_offload_fraction "
        "use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads "
        "pin_cpu_params overlap_param_gather_with_optimizer_step",
    ),
    **_all(_GRAPHS, "optimizer_cuda_graph"),
    "timers": _CODE,
    **_all(
        _SCHEDULE,
        "reuse_grad_buf_for_mxfp8_param_ag log_num_zeros_in_grad barrier_with_L1_time "
        "grad_norm_skip_threshold",
    ),
}

NEEDS_TE = frozenset(
    _names(
        "activation_func_fp8_input_store apply_query_key_layer_scaling apply_rope_fusion "
        "attention_backend cp_comm_type cpu_offloading cpu_offloading_activations "
        "cpu_offloading_double_buffering cpu_offloading_num_layers cpu_offloading_weights "
        "cpu_offloading_retain_pinned_cpu_buffers disable_parameter_transpose_cache "
        "fine_grained_activation_offloading first_last_layers_bf16 flash_attention_version "
        "fused_single_qkv_rope kitchen_attention_backend "
        "memory_efficient_layer_norm min_offloaded_tensor_size moe_grouped_gemm moe_permute_fusion "
        "moe_router_fusion moe_router_padding_for_fp8 moe_router_padding_for_quantization "
        "moe_single_grouped_bias moe_single_grouped_weight num_layers_at_end_in_bf16 "
        "num_layers_at_start_in_bf16 offload_modules persist_layer_norm tp_only_amax_red "
        "use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert use_kitchen "
        "use_kitchen_attention use_te_activation_func use_te_rng_tracker "
        "use_transformer_engine_op_fuser"
    )
)
"""Fields of ``TransformerConfig`` that Transformer Engine's layers alone read."""
NEEDS_TE_PREFIXES = ("fp8", "fp4", "tp_comm_")
"""Beginnings of more such names."""
TRAINING_ONLY = frozenset(
    _names(
        "recompute_granularity recompute_method recompute_num_layers recompute_modules "
        "distribute_saved_activations gradient_accumulation_fusion cpu_offloading "
        "cpu_offloading_num_layers cpu_offloading_activations cpu_offloading_weights "
        "cpu_offloading_double_buffering cpu_offloading_retain_pinned_cpu_buffers "
        "fine_grained_activation_offloading offload_modules min_offloaded_tensor_size "
        "delta_offload_bytes_across_pp_ranks activation_offload_fraction "
        "fine_grained_offloading_max_inflight_offloads"
    )
)
"""Fields of ``TransformerConfig`` about the backward pass, which a frozen model does not have."""
