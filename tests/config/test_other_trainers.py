"""What people of other trainers type is answered: by a flag that is there, or by the reason why none is."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import transformers

from megatron_vlm.config import other_trainers
from megatron_vlm.config.run import RunConfig
from megatron_vlm.config.sections import SECTIONS

ROOT = Path(__file__).parents[2]
# Arguments in the documents of trainers that people come from.
LISTED = {
    "LLaVA without DeepSpeed": """
        model_name_or_path version data_path image_folder vision_tower mm_projector_type bf16 output_dir
        num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate
        model_max_length gradient_checkpointing nproc_per_node master_port tune_mm_mlp_adapter freeze_backbone
        lazy_preprocess image_aspect_ratio fp16 mm_projector_lr bits lora_enable lora_r lora_alpha
        lora_dropout double_quant
        quant_type group_by_modality_length mm_vision_select_layer mm_use_im_start_end mm_use_im_patch_token
        weight_decay warmup_ratio lr_scheduler_type dataloader_num_workers pretrain_mm_mlp_adapter
        evaluation_strategy save_strategy save_steps save_total_limit logging_steps tf32
        """,
    "lmms-engine": """
        use_liger_kernel use_rmpad type trainer_type dataset_config dataset_type dataset_format dataset_path
        processor_config processor_name processor_modality processor_type model_config model_name_or_path
        model_class attn_implementation per_device_train_batch_size learning_rate weight_decay
        gradient_accumulation_steps num_train_epochs save_steps report_to output_dir warmup_ratio run_name
        logging_steps group_by_length dataloader_num_workers bf16 nproc_per_node nnodes node_rank master_addr
        master_port use_fsdp mixed_precision fsdp_sharding_strategy fsdp_auto_wrap_policy
        fsdp_backward_prefetch fsdp_forward_prefetch fsdp_cpu_ram_efficient_loading fsdp_offload_params
        fsdp_state_dict_type fsdp_sync_module_states fsdp_transformer_layer_cls_to_wrap fsdp_use_orig_params
        num_processes num_machines main_process_ip main_process_port machine_rank use_deepspeed
        deepspeed_config_file
        """,
    "Ovis": """
        model_path data_path eval_data_path output_dir deepspeed num_train_epochs per_device_train_batch_size
        gradient_accumulation_steps learning_rate train_modules multimodal_max_length single_image_max_pixels
        enable_thinking early_stopping
        """,
    "VITA": """
        model_name_or_path model_type version freeze_backbone tune_mm_mlp_adapter tune_audio_mlp_adapter
        audio_prompt_finetune audio_prompt_num audio_state_predictor_tuning vision_tower audio_encoder
        freeze_audio_encoder freeze_audio_encoder_adapter unfreeze_vision_tower use_s2
        pretrain_audio_mlp_adapter pretrain_mm_mlp_adapter mm_projector_type cache_dir optim
        remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type
        bits lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr
        group_by_modality_length use_im_start_end local_rank device_map load_in_4bit load_in_8bit
        quantization_config llm_int8_skip_modules llm_int8_threshold llm_int8_has_fp16_weight
        bnb_4bit_compute_dtype bnb_4bit_use_double_quant bnb_4bit_quant_type padding_side use_fast torch_dtype
        attn_implementation use_cache target_modules bias task_type r resume_from_checkpoint dataset_use
        image_aspect_ratio deepspeed include bf16 fp16 output_dir num_train_epochs per_device_train_batch_size
        gradient_accumulation_steps learning_rate gradient_checkpointing seed
        """,
    "others": """
        max_steps resume overwrite_output_dir eval_steps eval_strategy max_grad_norm adam_epsilon warmup_steps
        num_epochs epoch batch_size max_seq_length cutoff_len max_length packed neat_packing padding_free
        tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        use_distributed_optimizer expert_model_parallel_size recompute_granularity recompute_activations
        use_flash_attn load finetune num_layers_per_virtual_pipeline_stage pretrained_checkpoint
        tokenizer_model
        distributed_backend lr_warmup_samples tensorboard_dir wandb_exp_name num_layers hidden_size
        attention_dropout hidden_dropout ckpt_format fp8_format split freeze_vit freeze_llm freeze_aligner
        vit_lr aligner_lr train_type tuner_type finetuning_type lora_target dataset dataset_dir val_dataset
        val_size split_dataset_ratio max_pixels image_max_pixels flash_attn quantization_bit use_dora
        adapter_name_or_path adapters train_on_prompt mask_history preprocessing_num_workers plot_loss
        freeze_vision_tower freeze_multi_modal_projector freeze_language_model mm_tunable_parts
        mm_vision_tower_lr unfreeze_mm_vision_tower mm_patch_merge_type image_grid_pinpoints frames_upbound
        video_fps mm_vision_select_feature is_multimodal system dataset_num_proc dataset_text_field
        num_nodes num_gpus hostfile zero_stage cpu_offload precision chat_template trust_remote_code
        """,
}
HF_TRAINER = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
NAMES = sorted({name for text in LISTED.values() for name in text.split()} | set(HF_TRAINER))
ANSWERS = (
    "(?:here it is |always so here: |not offered, because |it is never on here; |that is the default here; )"
)
OWN = {field.name for section in SECTIONS.values() for field in dataclasses.fields(section)} | {
    "bf16",
    "fp32",
}


def refusal(argv: list[str]) -> str:
    with pytest.raises(ValueError) as caught:
        RunConfig.from_flags(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_every_argument_is_answered_however_it_is_spelled(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for typed in (f"--{name}", f"--{name.replace('_', '-')}"):
        for argv in ([typed, "True"], [f"{typed}=False"], [typed], [typed, "some/path"]):
            assert re.match(rf"{typed}(?: True| False)?: {ANSWERS}", refusal(argv))
        for value in (True, False, 2):
            file.write_text(json.dumps({typed[2:]: value}))
            message = refusal(["--config", str(file)])
            assert re.match(rf"{re.escape(str(file))}: {typed[2:]}(?: \w+)?: {ANSWERS}", message)


def test_own_flags_may_have_underscores(tmp_path: Path) -> None:
    own = [name for name in NAMES if name in OWN]
    assert {"bf16", "data_path", "weight_decay", "group_by_length", "train_modules"} <= set(own)
    flags = [
        *("--global_batch_size", "256", "--weight_decay=0.5", "--no_save_optim", "--group_by_length"),
        *("--lora_rank=4", "--data_path", "a_b", "--train_iters", "3"),
    ]
    assert RunConfig.from_flags(flags) == RunConfig.from_flags(
        [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags]
    )
    assert RunConfig.from_flags(flags).data.data_path == "a_b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rate", "2e-5"], "--learning-rate: here it is --lr 2e-5"),
        (["--learning_rate=2e-5"], "--learning_rate: here it is --lr 2e-5"),
        (["--learning-rate"], "--learning-rate: here it is --lr"),
        (["--output_dir", "./runs/a b/"], "--output_dir: here it is --save-dir ./runs --name 'a b'"),
        (["--output-dir", "llava"], "--output-dir: here it is --save-dir . --name llava"),
        (["--max-steps", "-1"], "--max-steps -1: without --train-iters a run is one pass"),
        (["--max-steps", "100"], "--max-steps: here it is --train-iters 100"),
        (["--bits", "4"], "--bits: not offered, because no quantised weights are trained"),
        (["--bits", "16"], "--bits 16: always so here"),
        (["--optim", "adamw_torch"], "--optim adamw_torch: always so here: AdamW"),
        (["--optim", "lion_8bit"], "--optim: not offered, because AdamW is the only optimizer"),
        (["--tf32", "True"], "--tf32: not offered, because"),
        (["--tf32", "False"], "--tf32 False: it is never on here; leave it out"),
        (["--gradient_checkpointing", "True"], "--gradient_checkpointing True: here it is --recompute full"),
        (["--gradient-checkpointing"], "--gradient-checkpointing: here it is --recompute full"),
        (["--gradient_checkpointing", "False"], "--gradient_checkpointing False: that is the default here"),
        (["--mm_projector_lr", "2e-5"], "here it is --train-modules 'projector:2e-5|language'"),
        (["--version", "v1"], "--version v1: here it is --template v1"),
        (["--report_to", "wandb"], "--report_to wandb: here it is --wandb"),
        (["--lr-warmup-samples", "2560"], "here it is --lr-warmup-iters, this over --global-batch-size"),
        (["--lr-decay-samples", "2560"], "here it is --lr-decay-iters, this over --global-batch-size"),
        (["--max_train_samples", "100"], "a .yaml file with subset: [0, 100]"),
        (["--early_stop_interval", "3"], "here it is --early-stopping-patience 3"),
        (["--mm_projector_lr", "2e-5", "--lora-rank", "8"], "with --lora-rank 'projector:2e-5|lora'"),
        (["--train_on_prompt", "True"], "--train_on_prompt: not offered, because the answers alone are"),
        (["--assistant_only_loss", "False"], "--assistant_only_loss False: not offered, because the answers"),
        (["--lora_target", "all"], "--lora_target all: that is the default here"),
        (["--report_to", "wandb", "tensorboard"], "--report_to: here it is --wandb or --tensorboard"),
        (["--evaluation_strategy", "no"], "--evaluation_strategy no: that is the default here; leave it out"),
        (["--save", "runs/x"], "--save: here it is --save-dir runs --name x"),
        (["--stage", "sft"], "--stage sft: here it is --stage 2"),
        (["--fp8", "hybrid"], "--fp8 hybrid: here it is --fp8, a switch"),
        (["--freeze-LM"], "--freeze-LM: here it is --freeze-lm"),
        # Switches with values.
        (["--bf16", "True"], "--bf16 True: a switch takes no value; give --bf16 alone"),
        (["--bf16=False"], "--bf16 False: a switch takes no value; leave it out, or give --fp32"),
        (["--packing", "False"], "--packing False: a switch takes no value; give --no-packing"),
        (["--no_save", "True"], "--no_save True: a switch takes no value; give --no-save alone"),
        (["--no-save-optim", "0"], "--no-save-optim 0: a switch takes no value; give --save-optim"),
        (["--save", "true"], "--save true: a switch takes no value; give --save alone"),
        # One line, of several.
        (["--tf32", "1", "--seed", "1", "--bits", "4", "--bf16", "True"], "(and 2 more arguments: see docs/"),
        (["--tf32", "True", "--bits", "4"], "(and 1 more argument: see docs/from-other-trainers.md)"),
        # What is nobody's is perhaps misspelt, and no further from a flag than that.
        (["--lr-wamup-fraction", "1"], "unknown flag --lr-wamup-fraction; did you mean --lr-warmup-frac"),
        (["--global_batchsize", "1"], "did you mean --global-batch-size?"),
        (["--frobnicate"], "unknown flag --frobnicate; see --help"),
        (["train.json"], "unexpected argument 'train.json'; give it behind --config"),
    ],
)  # fmt: skip
def test_what_is_said(argv: list[str], message: str) -> None:
    assert message in refusal(argv)


def test_one_of_several_values_is_not_said_alone() -> None:
    assert refusal(["--target_modules", "q_proj", "v_proj"]).endswith("--lora-targets")


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"learning_rate": 2e-5, "bf16": True, "deepspeed": {"zero": 3}, "tp": 2}))
    told = (
        f"{file}: learning_rate: here it is --lr 2e-05 (and 1 more argument: see docs/from-other-trainers.md)"
    )
    assert refusal(["--config", str(file)]) == told
    file.write_text(json.dumps({"optimizer": {"adam_epsilon": 1e-6}}))
    assert refusal(["--config", str(file)]) == f"{file}: optimizer.adam_epsilon: here it is --adam-eps 1e-06"
    file.write_text(json.dumps({"optimizer": "adamw_torch"}))
    assert "optimizer adamw_torch: always so here" in refusal(["--config", str(file)])


def test_following_the_answers_makes_a_command_that_is_taken() -> None:
    """LLaVA's own, of stage 2, each argument replaced by what its answer says."""
    argv = shlex.split(
        "--data_path data --bf16 True --output_dir ./checkpoints/llava --num_train_epochs 1 "
        "--per_device_train_batch_size 4 --evaluation_strategy no --save_strategy no --save_total_limit 1 "
        "--learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine "
        "--logging_steps 10 --tf32 True --model_max_length 2048 --gradient_checkpointing True "
        "--dataloader_num_workers 4 --lazy_preprocess True --report_to wandb --tune_mm_mlp_adapter False"
    )
    for _ in range(30):
        try:
            config = RunConfig.from_flags(argv)
            break
        except ValueError as error:
            message = re.sub(r" \(and .*", "", str(error))
        if "--keep-checkpoints has nothing" in message:
            argv.remove("--no-save")
            continue
        typed = re.match(r"--\w+", message)
        assert typed is not None, message
        at = argv.index(typed[0])
        here = re.search(r"here it is ((?:--[\w-]+(?: [^-,;\s]\S*)?\s?)+)", message.replace(", ", " , "))
        new = shlex.split(here[1]) if here else [typed[0]] if "alone" in message else []
        argv[at : at + 2] = ["--data-workers", "4"] if new == ["--data-workers"] else new
    assert (config.checkpoint.save_dir, config.checkpoint.name) == ("./checkpoints", "llava")
    assert (config.training.epochs, config.training.micro_batch_size, config.optimizer.lr) == (1, 4, 2e-5)
    assert (config.optimizer.weight_decay, config.optimizer.lr_warmup_fraction) == (0, 0.03)
    assert (config.data.seq_length, config.parallel.recompute) == (2048, "full")
    assert config.logging.wandb and config.training.precision == "bf16" and config.logging.log_interval == 10


def script_flags(script: str) -> set[str]:
    """The flags in the ``--help`` of a script."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", shown.getvalue()))


def test_every_flag_that_is_named_exists() -> None:
    flags = {"": set()}
    for group in other_trainers.ARGUMENTS.values():
        for argument in group:
            for said in (argument.here, *argument.values.values()):
                script = ""
                for word in re.findall(r"scripts/[\w/]+\.py|--[a-z][\w-]*|[,;]", said):
                    if word in ",;":
                        script = ""
                    elif not word.startswith("--"):
                        assert (ROOT / word).is_file()
                        script = word
                    else:
                        flags.setdefault(script, set()).add(word)
    for name in flags.pop(""):
        with contextlib.suppress(ValueError):  # a value is missing, or another flag
            RunConfig.from_flags([name])
            continue
        assert "unknown flag" not in refusal([name])
    assert len(flags) >= 2
    for script, named in flags.items():
        assert named <= script_flags(script), script


def test_a_name_stands_once_and_is_no_flag_here() -> None:
    names = [
        name for group in other_trainers.ARGUMENTS.values() for row in group for name in row.names.split()
    ]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    # Of these, only what other trainers alone give for them is answered.
    assert set(names) & OWN == {"save", "fp8", "stage", "freeze_lm", "precision"}


def test_the_page_is_the_table() -> None:
    page = (ROOT / other_trainers.PAGE).read_text()
    assert page == other_trainers.markdown(), "run: python -m megatron_vlm.config.other_trainers"
