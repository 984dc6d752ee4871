"""Arguments of other trainers that say how a run goes: its length, optimizer, memory, checkpoints, GPUs."""

from __future__ import annotations

from typing import Dict, Tuple

from megatron_vlm.config.other_trainers.argument import DEFAULT, Argument, always, here, not_offered, switch

_SHARDING = here(
    "--dist-optim",
    "which shards the optimizer as ZeRO-1 does; --tp and --pp cut weights and gradients, in place of "
    "ZeRO-2, ZeRO-3 and FSDP",
)
_QUANTISED = not_offered("no quantised weights are trained", "--lora-rank with --bf16")
_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), here("--bf16")),
    **dict.fromkeys(("fp32", "float32", "float", "no"), here("--fp32")),
    "fp8": here("--fp8"),
    "auto": DEFAULT,
}
_FP16 = not_offered("fp16 needs a loss scale", "--bf16")
_ANSWERS_ALONE = not_offered("the answers alone are trained")
_COMPILER = not_offered("megatron-core's layers aren't compiled", "--transformer-impl transformer_engine")
_GENERATION = not_offered(
    "a run evaluates by its loss alone", "scripts/inference/generate.py on a checkpoint"
)
_HUB = not_offered(
    "a run uploads nothing", "scripts/convert/convert_megatron_to_hf.py, which makes a folder to upload"
)
_LAUNCHER = always("run.py starts torchrun by itself, on every node")

OF_RUNS: Dict[str, Tuple[Argument, ...]] = {
    "Length and batches": (
        Argument("num_train_epochs num_epochs max_epochs n_epochs epoch", here("--epochs {value}")),
        Argument(
            "max_steps max_iters max_train_steps num_train_steps num_steps total_steps train_steps "
            "max_iterations num_iterations iterations iters steps",
            here("--train-iters {value}"),
            {"-1": "without --train-iters a run is one pass, or --epochs; leave it out"},
        ),
        Argument("num_samples", here("--train-samples {value}")),
        Argument("exit_interval", here("--train-iters", "and --lr-decay-iters keeps the schedule's length")),
        Argument(
            "exit_duration_in_mins",
            here("--time", "with --submit: a job saves before its limit, and goes on in the next"),
        ),
        Argument(
            "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu "
            "batch_size train_batch_size_per_gpu per_device_batch_size batch_size_per_gpu micro_batch",
            here("--micro-batch-size {value}"),
        ),
        Argument(
            "gradient_accumulation_steps grad_accumulation_steps accumulate_grad_batches grad_accum "
            "accumulation_steps gradient_accumulation",
            here(
                "--global-batch-size",
                "the samples of an update: this times --micro-batch-size and the number of model copies",
            ),
        ),
        Argument("train_batch_size total_batch_size", here("--global-batch-size {value}")),
        Argument(
            "auto_find_batch_size",
            not_offered("batches never change", "--dry-run, which estimates the memory"),
        ),
        Argument("rampup_batch_size", not_offered("all batches have one size", "--global-batch-size")),
        Argument(
            "model_max_length max_length max_seq_length max_seq_len cutoff_len multimodal_max_length "
            "decoder_seq_length text_max_length context_length block_size",
            here("--seq-length {value}", "image tokens included"),
        ),
        Argument(
            "truncation_strategy",
            here("--overlong"),
            {"delete": here("--overlong drop"), "right": here("--overlong truncate")},
        ),
    ),
    "Optimizer": (
        Argument("learning_rate base_lr peak_lr max_lr", here("--lr {value}")),
        Argument("warmup_ratio lr_warmup_ratio warmup_fraction", here("--lr-warmup-fraction {value}")),
        Argument(
            "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps",
            here("--lr-warmup-iters {value}", "in iterations"),
        ),
        Argument("lr_warmup_samples", here("--lr-warmup-iters", "this over --global-batch-size")),
        Argument("lr_decay_steps", here("--lr-decay-iters {value}", "in iterations")),
        Argument("lr_decay_samples", here("--lr-decay-iters", "this over --global-batch-size")),
        Argument("min_learning_rate lr_min", here("--min-lr {value}")),
        Argument(
            "lr_scheduler_type lr_scheduler lr_schedule scheduler",
            here("--lr-decay-style", "one of constant, linear and cosine, all with warmup"),
            {
                **{name: here(f"--lr-decay-style {name}") for name in ("linear", "constant")},
                "cosine": here("--lr-decay-style cosine", "the default"),
                "constant_with_warmup": here("--lr-decay-style constant", "which warms up too"),
                "cosine_with_min_lr": here("--lr-decay-style cosine", "with --min-lr"),
            },
        ),
        Argument(
            "lr_scheduler_kwargs",
            not_offered("curves have no more parameters", "--min-lr and --lr-decay-iters"),
        ),
        Argument(
            "optim optimizer optimizer_type",
            not_offered("AdamW is the only optimizer", "--dist-optim to shard its state"),
            dict.fromkeys(
                ("adamw", "adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adam"),
                always("AdamW is the optimizer"),
            ),
        ),
        Argument(
            "optim_args optim_target_modules galore_rank use_galore use_badam use_muon",
            not_offered("AdamW is the only optimizer", "--dist-optim to shard its state"),
        ),
        Argument("adam_epsilon adamw_eps eps", here("--adam-eps {value}")),
        Argument("beta1", here("--adam-beta1 {value}")),
        Argument("beta2", here("--adam-beta2 {value}")),
        Argument("wd", here("--weight-decay {value}")),
        Argument(
            "max_grad_norm gradient_clipping grad_clip clip_grad_norm max_norm gradient_clip_val",
            here("--clip-grad {value}"),
        ),
        Argument(
            "label_smoothing_factor label_smoothing",
            not_offered("the loss is the plain cross-entropy"),
            dict.fromkeys(("0", "0.0"), always("labels aren't smoothed")),
        ),
        Argument(
            "neftune_noise_alpha neftune_alpha",
            not_offered("embeddings get no noise"),
        ),
        Argument(
            "average_tokens_across_devices calculate_per_token_loss",
            always(
                "the loss is summed over all trained tokens of the global batch and divided by their number"
            ),
        ),
        Argument(
            "loss_type loss_scale_strategy completion_only_loss assistant_only_loss train_on_responses_only",
            always("the answers alone are trained, every token alike"),
            {"false": _ANSWERS_ALONE},
        ),
        Argument("train_on_prompt train_on_inputs", _ANSWERS_ALONE),
        Argument(
            "mask_history",
            not_offered("all answers of a conversation are trained"),
        ),
    ),
    "Precision and memory": (
        Argument(
            "torch_dtype dtype precision mixed_precision params_dtype compute_dtype",
            here("--bf16 or --fp32"),
            _DTYPES,
        ),
        Argument(
            "fp16 half fp16_full_eval initial_loss_scale min_loss_scale loss_scale loss_scale_window amp "
            "fp16_opt_level",
            _FP16,
        ),
        Argument("bf16_full_eval", always("evaluations compute as training does")),
        Argument("no_bf16", here("--fp32")),
        Argument(
            "tf32 allow_tf32",
            not_offered("--fp32 multiplies in full float32", "--bf16, which is faster still"),
        ),
        Argument("fp8_format", here("--fp8", "with --fp8-recipe")),
        Argument(
            "fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_interval",
            not_offered("recipes have fixed parameters", "--fp8-recipe"),
        ),
        Argument(
            "fp8",
            here("--fp8"),
            dict.fromkeys(("hybrid", "e4m3"), here("--fp8", "a switch, with --fp8-recipe")),
        ),
        Argument(
            "gradient_checkpointing activation_checkpointing use_gradient_checkpointing "
            "recompute_activations vit_gradient_checkpointing grad_checkpoint",
            here("--recompute full", "or --recompute selective, which is faster"),
            switch("--recompute full", "or --recompute selective, which is faster"),
        ),
        Argument("disable_gradient_checkpointing", here("--recompute none", "the default")),
        Argument(
            "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant recompute_method "
            "recompute_modules",
            always("--recompute says it all, with --recompute-num-layers"),
        ),
        Argument(
            "recompute_granularity",
            here("--recompute {value}"),
            {"none": here("--recompute none", "the default")},
        ),
        Argument(
            "bits double_quant quant_type quantization quantization_bit quantization_method "
            "quantization_config quant_method quant_bits load_in_4bit load_in_8bit bnb_4bit_compute_dtype "
            "bnb_4bit_use_double_quant bnb_4bit_quant_type bnb_4bit_quant_storage double_quantization "
            "llm_int8_skip_modules llm_int8_threshold llm_int8_has_fp16_weight "
            "llm_int8_enable_fp32_cpu_offload q_lora qlora use_qlora",
            _QUANTISED,
            {"16": always("weights are in 16 bits, --bf16"), "32": here("--fp32")},
        ),
        Argument(
            "deepspeed use_deepspeed deepspeed_config deepspeed_config_file zero_stage zero "
            "zero_optimization use_zero3 zero3 fsdp use_fsdp fsdp_config fsdp_num fsdp_sharding_strategy "
            "fsdp_auto_wrap_policy fsdp_backward_prefetch fsdp_backward_prefetch_policy "
            "fsdp_forward_prefetch fsdp_cpu_ram_efficient_loading fsdp_offload_params fsdp_state_dict_type "
            "fsdp_sync_module_states fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params "
            "fsdp_use_orig_params fsdp_version fsdp_reshard_after_forward fsdp_activation_checkpointing "
            "use_megatron_fsdp data_parallel_sharding_strategy",
            _SHARDING,
            {"false": DEFAULT},
        ),
        Argument(
            "optimizer_cpu_offload offload_optimizer offload_param cpu_offload offload",
            not_offered(
                "nothing is moved to the CPU's memory",
                "--dist-optim, --recompute full or --tp",
            ),
        ),
        Argument(
            "use_liger_kernel enable_liger_kernel use_liger liger_kernel_config",
            always("output layer and loss never hold all logits"),
        ),
        Argument(
            "use_rmpad padding_free neat_packing sample_packing pack_dataset packed use_packing data_packing "
            "data_flatten use_packed_ds",
            here("--packing", "where no sample sees another"),
            switch("--packing", "where no sample sees another"),
        ),
        Argument(
            "attn_implementation attn_impl flash_attn use_flash_attn use_flash_attention use_flash_attn_2 "
            "flash_attention attention_backend mpt_attn_impl use_sdpa",
            always(
                "attention is fused, torch's or, with --transformer-impl transformer_engine, the engine's"
            ),
        ),
        Argument(
            "reset_position_ids reset_attention_mask eod_mask_loss",
            always("with --packing no sample sees another"),
        ),
        Argument("use_te", here("--transformer-impl transformer_engine")),
        Argument("torch_compile torch_compile_backend torch_compile_mode compile", _COMPILER),
        Argument(
            "torch_empty_cache_steps empty_unused_memory_level", not_offered("the allocator keeps its memory")
        ),
        Argument("use_cache", always("training keeps no keys and values")),
        Argument(
            "low_cpu_mem_usage device_map max_memory low_memory",
            always("each rank loads its own part of the weights"),
        ),
        Argument("no_cuda use_cpu cpu", here("--device cpu"), switch("--device cpu")),
    ),
    "Checkpoints": (
        Argument(
            "output_dir out_dir output work_dir workdir save_path checkpoint_dir ckpt_dir output_path save",
            here("--save-dir {folder} --name {name}"),
        ),
        Argument(
            "save_steps save_freq save_every checkpoint_interval ckpt_interval save_every_n_steps",
            here("--save-interval {value}"),
        ),
        Argument(
            "save_strategy",
            here("--save-interval", "in iterations"),
            {
                "no": here("--no-save"),
                "steps": here("--save-interval"),
                "best": here("--eval-interval", "which keeps the best one"),
            },
        ),
        Argument(
            "save_total_limit max_checkpoints keep_last_n_checkpoints max_to_keep",
            here("--keep-checkpoints {value}"),
        ),
        Argument(
            "save_only_model save_model_only",
            here("--no-save-optim", "the default"),
            {"true": DEFAULT, "false": here("--save-optim")},
        ),
        Argument("save_optimizer save_optimizer_states", here("--save-optim"), switch("--save-optim")),
        Argument(
            "no_load_rng finetune",
            here("--no-load-optim", "the default: a run starts from weights alone"),
        ),
        Argument("no_save_rng", not_offered("a checkpoint that can be resumed is whole", "--no-save-optim")),
        Argument(
            "resume_from_checkpoint resume resume_from auto_resume resume_path "
            "restore_callback_states_from_checkpoint",
            always("the same command goes on from the run's last checkpoint, if it has --save-optim"),
            {"false": here("--restart", "to start over; a new run needs nothing")},
        ),
        Argument("overwrite_output_dir", here("--restart"), switch("--restart")),
        Argument(
            "load_best_model_at_end",
            always("with --eval-interval the best checkpoint is in <run>/best"),
            {"false": DEFAULT},
        ),
        Argument(
            "metric_for_best_model greater_is_better best_metric",
            always("the best checkpoint has the lowest loss on the val split"),
        ),
        Argument(
            "save_safetensors save_on_each_node async_save ckpt_format dist_ckpt_format use_dist_ckpt "
            "auto_detect_ckpt_format enable_jit_checkpoint create_checkpoint_symlink use_checkpoint_args",
            always("checkpoints are of one format, which loads at every layout"),
        ),
        Argument(
            "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision "
            "push_to_hub_token push_to_hub_model_id push_to_hub_organization",
            _HUB,
        ),
    ),
    "Evaluation and logging": (
        Argument(
            "eval_steps eval_every eval_freq evaluation_steps val_interval validation_steps",
            here("--eval-interval {value}"),
        ),
        Argument(
            "evaluation_strategy eval_strategy do_eval do_predict",
            here("--eval-interval", "in iterations"),
            {
                "no": DEFAULT,
                "false": DEFAULT,
                "steps": here("--eval-interval"),
                "true": here("--eval-interval"),
            },
        ),
        Argument("do_train", always("run.py trains")),
        Argument(
            "per_device_eval_batch_size eval_accumulation_steps eval_batch_size per_gpu_eval_batch_size "
            "eval_do_concat_batches eval_use_gather_object batch_eval_metrics prediction_loss_only "
            "include_for_metrics include_inputs_for_metrics",
            always("an evaluation has the batches of training and takes the loss"),
        ),
        Argument(
            "eval_delay eval_on_start",
            not_offered("evaluations come every --eval-interval iterations and at the end"),
        ),
        Argument("max_eval_samples eval_limit eval_num_batches", here("--eval-iters", "in global batches")),
        Argument(
            "predict_with_generate generation_max_length generation_num_beams generation_config "
            "compute_accuracy acc_strategy",
            _GENERATION,
        ),
        Argument("early_stopping", here("--early-stopping-patience", "with --eval-interval")),
        Argument("early_stop_interval", here("--early-stopping-patience {value}", "with --eval-interval")),
        Argument("early_stopping_threshold", here("--early-stopping-min-delta {value}")),
        Argument(
            "logging_steps log_every log_freq print_freq log_every_n_steps logging_interval",
            here("--log-interval {value}"),
        ),
        Argument(
            "logging_strategy logging_first_step logging_nan_inf_filter log_throughput "
            "include_num_input_tokens_seen include_tokens_per_second log_on_each_node plot_loss "
            "log_params_norm log_level log_level_replica disable_tqdm verbose_logging skip_memory_metrics "
            "timing_log_level log_timers_to_tensorboard use_tqdm verbose",
            always("metrics.jsonl has loss, speed and memory of every --log-interval iterations"),
        ),
        Argument(
            "logging_dir log_dir tensorboard_dir",
            here("--tensorboard", "which writes to <run>/tensorboard; logs are in <run>/logs"),
        ),
        Argument(
            "report_to log_with logger",
            here("--wandb or --tensorboard"),
            {
                "wandb": here("--wandb"),
                "tensorboard": here("--tensorboard"),
                "all": here("--wandb --tensorboard"),
                "none": DEFAULT,
                "false": DEFAULT,
            },
        ),
        Argument(
            "run_name exp_name experiment_name job exp wandb_run_name wandb_exp_name",
            here("--name {value}", "and --wandb-name"),
        ),
        Argument("project wandb_project_name", here("--wandb-project {value}", "with --wandb")),
        Argument(
            "wandb_save_dir wandb_log_model trackio_space_id trackio_bucket_id trackio_static_space_id "
            "swanlab_project use_swanlab mlflow_tracking_uri",
            not_offered("metrics go to Weights & Biases, TensorBoard or files", "--wandb"),
        ),
        Argument("full_determinism deterministic_mode", here("--deterministic"), switch("--deterministic")),
    ),
    "GPUs, nodes and layout": (
        Argument(
            "nproc_per_node num_processes num_gpus n_gpus ngpus gpus_per_node n_gpu nproc num_gpus_per_node",
            here("--gpus {value}", "on each node"),
        ),
        Argument("nnodes num_nodes num_machines n_nodes", here("--node {value}")),
        Argument("node_rank machine_rank", here("--rank {value}")),
        Argument("main_process_ip master_address", here("--master-addr {value}")),
        Argument("main_process_port", here("--master-port {value}")),
        Argument("include gpu_list cuda_visible_devices", here("--gpu-ids", "such as --gpu-ids 0,1")),
        Argument(
            "hostfile rdzv_backend rdzv_endpoint rdzv_id standalone max_restarts module launcher", _LAUNCHER
        ),
        Argument(
            "local_rank local_process_index accelerator_config parallelism_config trainer_type trainer type "
            "accelerator strategy world_size",
            _LAUNCHER,
        ),
        Argument("distributed_backend ddp_backend dist_backend", here("--backend {value}")),
        Argument("ddp_timeout", here("--distributed-timeout-minutes", "in minutes")),
        Argument(
            "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph "
            "ddp_num_buckets",
            always("gradients are reduced by megatron-core, --overlap-grad-reduce"),
        ),
        Argument("tensor_model_parallel_size tensor_parallel_size tp_size", here("--tp {value}")),
        Argument("pipeline_model_parallel_size pipeline_parallel_size pp_size", here("--pp {value}")),
        Argument(
            "num_layers_per_virtual_pipeline_stage virtual_pipeline_model_parallel_size "
            "num_virtual_stages_per_pipeline_rank vpp_size",
            here("--vpp", "the number of model chunks on each pipeline rank"),
        ),
        Argument(
            "context_parallel_size cp_size sequence_parallel_size cp sp_size ulysses_size ring_attn_size "
            "context_parallel",
            not_offered("sequences aren't split over GPUs by attention", "--tp with --sequence-parallel"),
            {"1": DEFAULT},
        ),
        Argument(
            "expert_model_parallel_size expert_parallel_size ep_size ep expert_tensor_parallel_size",
            not_offered("there is no expert parallelism", "--tp and --pp"),
            {"1": DEFAULT},
        ),
        Argument(
            "use_distributed_optimizer distributed_optimizer", here("--dist-optim"), switch("--dist-optim")
        ),
        Argument(
            "data_parallel_size dp_size dp", always("what --tp and --pp leave of the GPUs are model copies")
        ),
    ),
}
