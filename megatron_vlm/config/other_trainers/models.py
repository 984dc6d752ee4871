"""Arguments of other trainers that say what is trained, and on what: the model, its adapters, the data."""

from __future__ import annotations

from typing import Dict, Tuple

from megatron_vlm.config.other_trainers.argument import (
    BUILD,
    DEFAULT,
    PREPARE,
    Argument,
    always,
    here,
    not_offered,
    switch,
)

_CONVERT = "scripts/convert/convert_hf_to_megatron.py"
_AUDIO = not_offered("no model here has audio")
_ARCHITECTURE = always("the architecture is that of the model, from its config.json")
_ALIGN = "the loss is that of the answers' tokens; of preferences and rewards there is none"
_CACHE = always("a run reads nothing from the hub; HF_HOME sets the cache of " + BUILD)
_DATA = here("--data-path", f"the folder that {PREPARE} --input {{value}} makes")

OF_MODELS: Dict[str, Tuple[Argument, ...]] = {
    "Model, and what is trained": (
        Argument(
            "model_name_or_path model_name model_path model model_id base_model model_id_or_path "
            "language_model llm text_model base_model_name_or_path pretrained "
            "pretrained_model_name_or_path hf_model",
            here(
                "--megatron-load-dir",
                f"what {_CONVERT} makes of a LLaVA; of a text model {BUILD} makes one first",
            ),
        ),
        Argument(
            "load pretrained_checkpoint checkpoint ckpt load_dir load_checkpoint load_path ckpt_path "
            "checkpoint_path load_from init_from",
            here("--megatron-load-dir {value}"),
        ),
        Argument(
            "model_type model_class model_arch model_family language_model_type vision_model_type arch "
            "model_config model_name_in_config",
            always("the model's config.json says what it is"),
        ),
        Argument(
            "tokenizer_name tokenizer_path tokenizer_model tokenizer_name_or_path processor_name tokenizer "
            "processor_path",
            here("--tokenizer-load-dir {value}", "a folder"),
        ),
        Argument(
            "processor_config processor_type processor_modality tokenizer_type use_fast use_fast_tokenizer "
            "trust_remote_code padding_side resize_vocab model_revision revision token hf_hub_token use_hf "
            "use_auth_token "
            "image_processor_type",
            always("tokenizer and image processor are those of --tokenizer-load-dir, or of the checkpoint"),
        ),
        Argument(
            "vision_tower vision_model vision_encoder image_encoder mm_vision_tower visual_encoder vit",
            here(f"{BUILD} --vision-model {{value}}"),
        ),
        Argument(
            "mm_projector_type projector_type vision_projection_type",
            here(f"{BUILD} --projector-type {{value}}"),
        ),
        Argument(
            "pretrain_mm_mlp_adapter mm_projector_path projector_path",
            here(f"{BUILD} --projector {{value}}", "or --megatron-load-dir with a run of --stage 1"),
        ),
        Argument(
            "mm_vision_select_layer mm_vision_select_feature select_layer vision_select_layer",
            always(
                "the model's config.json says it, in vision_feature_layer and vision_feature_select_strategy"
            ),
        ),
        Argument(
            "mm_use_im_start_end mm_use_im_patch_token use_im_start_end",
            not_offered(
                "an image is its <image> tokens alone",
                "--train-modules 'projector|language.embedding' to train added tokens",
            ),
        ),
        Argument(
            "disable_vision_class_token", here("--no-add-class-token", "only checked: the model says so")
        ),
        Argument(
            "tune_mm_mlp_adapter tune_mm_mlp only_train_projector freeze_llm_and_vit",
            here("--stage 1", "or --train-modules projector"),
            switch("--stage 1", "or --train-modules projector"),
        ),
        Argument(
            "freeze_backbone freeze_lm freeze_llm freeze_language_model freeze_lm_model",
            here("--freeze-lm"),
            {
                "true": here("--freeze-lm"),
                "false": here("--no-freeze-lm", "the default outside of --stage 1"),
            },
        ),
        Argument(
            "tune_llm tune_mm_llm train_llm unfreeze_language_model",
            here("--no-freeze-lm", "the default outside of --stage 1"),
            {
                "true": here("--no-freeze-lm", "the default outside of --stage 1"),
                "false": here("--freeze-lm"),
            },
        ),
        Argument(
            "freeze_mm_mlp_adapter freeze_aligner freeze_multi_modal_projector freeze_projector freeze_mlp",
            here("--train-modules language"),
            switch("--train-modules language"),
        ),
        Argument(
            "unfreeze_vision_tower unfreeze_mm_vision_tower tune_vision_tower tune_mm_vision "
            "train_vision_tower unfreeze_vit tune_vit",
            here("--train-vision"),
            switch("--train-vision"),
        ),
        Argument(
            "freeze_vit freeze_vision_tower freeze_vision_model freeze_vision",
            here("--no-train-vision", "the default"),
            {"true": DEFAULT, "false": here("--train-vision")},
        ),
        Argument(
            "mm_projector_lr aligner_lr merger_lr projector_lr",
            here(
                "--train-modules 'projector:{value}|language'",
                "which has --lr for the rest; with --lora-rank 'projector:{value}|lora'",
            ),
        ),
        Argument(
            "mm_vision_tower_lr vision_tower_lr vit_lr vision_lr",
            here("--train-modules 'projector|language|vision:{value}'", "which has --lr for the rest"),
        ),
        Argument(
            "mm_tunable_parts trainable_parts unfreeze_parts",
            here("--train-modules 'vision|projector|language'"),
        ),
        Argument(
            "use_s2 s2_scales s2",
            not_offered(
                "towers see one scale", f"{BUILD} --model-type llava_next, which cuts images into tiles"
            ),
        ),
        Argument(
            "image_grid_pinpoints max_num_tiles use_tiling use_thumbnail max_dynamic_patch "
            "dynamic_image_size",
            here(f"{BUILD} --model-type llava_next --image-grid-pinpoints HxW"),
        ),
        Argument(
            "mm_patch_merge_type mm_newline_position mm_spatial_pool_stride mm_spatial_pool_mode",
            always("LLaVA-NeXT's and LLaVA-OneVision's own, as transformers has them"),
        ),
        Argument(
            "audio_encoder audio_prompt_finetune audio_prompt_num audio_state_predictor_tuning "
            "tune_audio_mlp_adapter freeze_audio_encoder freeze_audio_encoder_adapter "
            "pretrain_audio_mlp_adapter audio_folder freeze_audio",
            _AUDIO,
        ),
        Argument(
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
            "group_query_attention max_position_embeddings kv_channels vocab_size normalization "
            "norm_epsilon swiglu position_embedding_type rotary_base rotary_percent rope_scaling "
            "rope_theta use_rotary_position_embeddings untie_embeddings_and_output_weights "
            "disable_bias_linear add_qkv_bias num_experts moe_router_topk encoder_num_layers img_h img_w "
            "patch_dim image_size num_classes use_mcore_models qk_layernorm image_token_index "
            "force_image_size down_sample_ratio pixel_shuffle",
            _ARCHITECTURE,
        ),
        Argument(
            "attention_dropout hidden_dropout dropout",
            not_offered("the models here have no dropout", "--lora-dropout for adapters"),
            dict.fromkeys(("0", "0.0"), always("without dropout")),
        ),
        Argument("rlhf_type pref_beta pref_loss ref_model reward_model dpo beta", not_offered(_ALIGN)),
        Argument(
            "stage",
            here("--stage 1 or --stage 2", "alignment or instruction tuning"),
            {
                "sft": here("--stage 2"),
                "pt": not_offered(
                    "conversations are trained, not plain text", "--stage 1 to align a projector"
                ),
                **dict.fromkeys(("rm", "ppo", "dpo", "kto"), not_offered(_ALIGN)),
            },
        ),
    ),
    "LoRA": (
        Argument(
            "lora_enable use_lora use_peft lora enable_lora peft",
            here("--lora-rank", "such as --lora-rank 64"),
            switch("--lora-rank", "such as --lora-rank 64"),
        ),
        Argument(
            "finetuning_type train_type tuner_type sft_type tuner peft_type",
            here("--lora-rank for LoRA", "and nothing for full training"),
            {
                "lora": here("--lora-rank", "such as --lora-rank 64"),
                "full": DEFAULT,
                "freeze": here("--freeze-lm"),
            },
        ),
        Argument("lora_r r peft_lora_r lora_dim use_llm_lora", here("--lora-rank {value}")),
        Argument(
            "use_backbone_lora",
            here("--lora-targets vision.all-linear", "or with all-linear; --lora-rank {value}"),
        ),
        Argument("peft_lora_alpha", here("--lora-alpha {value}")),
        Argument("peft_lora_dropout lora_dropout_p", here("--lora-dropout {value}")),
        Argument(
            "target_modules lora_target lora_target_modules lora_modules",
            here("--lora-targets {value}"),
            dict.fromkeys(("all", "all-linear"), DEFAULT),
        ),
        Argument(
            "lora_weight_path adapter_name_or_path adapters lora_path adapter_path lora_checkpoint "
            "resume_lora_training",
            here("--lora-load-dir {value}"),
        ),
        Argument(
            "lora_bias bias",
            not_offered("adapters train no biases"),
            {"none": always("adapters train no biases")},
        ),
        Argument("rslora use_rs_lora", here("--use-rslora"), switch("--use-rslora")),
        Argument(
            "use_dora use_qalora init_lora_weights init_weights loftq_config pissa_init use_bdlora "
            "lora_plus loraplus_lr_ratio lorap_lr_ratio rank_pattern alpha_pattern layers_to_transform "
            "layers_pattern layer_replication fan_in_fan_out exclude_modules target_parameters",
            not_offered("adapters are W + s B A, alike in all layers"),
        ),
        Argument(
            "modules_to_save additional_target",
            here("--train-modules 'lora|projector'", "which names what is trained beside the adapters"),
        ),
        Argument("task_type inference_mode", always("a causal language model is trained")),
        Argument(
            "merge_lora export_dir",
            here("scripts/convert/convert_megatron_to_hf.py", "which merges adapters"),
        ),
    ),
    "Data": (
        Argument(
            "dataset data dataset_path dataset_name dataset_use train_file train_data data_file data_dir "
            "dataset_dir dataset_id train_data_path dataset_config train_dataset custom_train_dataset_path "
            "data_paths training_data train_files meta_path",
            _DATA,
        ),
        Argument(
            "image_folder image_dir image_root images image_path video_folder video_dir media_dir data_root",
            here(f"{PREPARE} --image-root {{value}}", "once, before training"),
        ),
        Argument(
            "dataset_type dataset_format dataset_text_field columns data_format dataloader_type",
            here(f"{PREPARE} --format", "which by default tells the format from the fields"),
        ),
        Argument(
            "eval_data_path eval_dataset validation_file val_dataset val_data_path eval_file "
            "valid_data_path validation_data val_data eval_data test_file val_file "
            "valid_path",
            here(
                "--eval-interval",
                f"over the val split that {PREPARE} --split makes, or a mixture's dataset with train: false",
            ),
        ),
        Argument(
            "val_size split_dataset_ratio split validation_split_percentage eval_split test_size valid_size",
            here(f"{PREPARE} --split"),
        ),
        Argument(
            "data_seed dataset_shuffle_seed seed_everything",
            here("--seed {value}", "of weights and data order"),
        ),
        Argument(
            "lazy_preprocess lazy_tokenize streaming is_multimodal remove_unused_columns lazy",
            always("samples are read when they are due"),
        ),
        Argument(
            "overwrite_cache preprocessing_num_workers dataset_num_proc map_num_proc tokenized_path "
            "cache_path",
            not_offered("no cache of tokens is made", f"{PREPARE} --workers"),
        ),
        Argument("cache_dir hf_cache_dir", _CACHE),
        Argument(
            "image_aspect_ratio",
            here(
                "image_aspect_ratio in a mixture file",
                "by which --data-path says square, pad or anyres for a dataset",
            ),
        ),
        Argument(
            "single_image_max_pixels single_image_min_pixels multiple_image_max_pixels "
            "multiple_image_min_pixels max_pixels min_pixels image_max_pixels image_min_pixels "
            "image_resolution video_max_pixels video_min_pixels size_factor image_max_size",
            not_offered(
                "a tower sees squares of its own size",
                f"{BUILD} --model-type llava_next --image-grid-pinpoints HxW, which cuts images into tiles",
            ),
        ),
        Argument(
            "video_fps fps frames_upbound video_maxlen max_frames num_frames nframes video_max_frames",
            not_offered("videos come as frames", f"{PREPARE} --input with the frames as images"),
        ),
        Argument(
            "version conv_version conv_mode chat_template prompt_template conversation_template "
            "tokenizer_prompt_format chat_template_path conv_style",
            here(
                "--template",
                "one of plain, v1, llama_2, llama_3, chatml, qwen, mistral, gemma, llm_jp, or chat, the "
                "tokenizer's own",
            ),
            {
                **{
                    name: here(f"--template {name}")
                    for name in ("plain", "v1", "llama_2", "llama_3", "chatml", "mistral", "gemma")
                },
                **dict.fromkeys(("vicuna_v1", "vicuna", "llava_v1"), here("--template v1")),
                **dict.fromkeys(("llava_llama_2",), here("--template llama_2")),
                **dict.fromkeys(("llama3", "llava_llama_3", "llama_v3"), here("--template llama_3")),
                **dict.fromkeys(
                    ("qwen", "qwen2", "qwen_1_5", "qwen_2", "qwen_2_5", "qwen2p5_instruct"),
                    here("--template qwen"),
                ),
                "mistral_instruct": here("--template mistral"),
            },
        ),
        Argument(
            "system system_prompt default_system",
            not_offered(
                "a conversation brings its own system turn",
                f"a system turn in the records of {PREPARE} --input",
            ),
        ),
        Argument(
            "enable_thinking thinking",
            not_offered(
                "answers are trained as they are written",
                "--mask-thinking to leave their <think> out of the loss",
            ),
        ),
        Argument(
            "group_by_modality_length group_by_modality group_by_varlen group_by_modality_length_auto",
            here("--group-by-length", "which groups by modality too"),
            switch("--group-by-length", "which groups by modality too"),
        ),
        Argument(
            "train_sampling_strategy",
            always("samples are shuffled"),
            {
                "group_by_length": here("--group-by-length"),
                "sequential": not_offered("samples are always shuffled"),
            },
        ),
        Argument(
            "shuffle dataset_shuffle train_dataloader_shuffle shuffle_buffer",
            always("samples are shuffled, --shuffle-buffer-size among each other"),
        ),
        Argument(
            "dataloader_num_workers num_dataloader_workers workers n_workers",
            here("--data-workers", "of the whole run: this times the number of GPUs"),
        ),
        Argument(
            "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_drop_last dataloader_multiprocessing_context dataloader_in_order "
            "length_column_name label_names",
            always("batches are whole and are read ahead, in one order"),
        ),
        Argument(
            "mix_strategy interleave_probs interleave_prob data_blend train_data_weights",
            here("--data-path", "a .yaml file with a weight for each dataset"),
        ),
        Argument(
            "max_samples max_train_samples train_dataset_sample max_train_data",
            here("--data-path", "a .yaml file with subset: [0, {value}]"),
        ),
        Argument("ignore_data_skip no_data_skip", always("a run that goes on goes on in its data")),
    ),
}
