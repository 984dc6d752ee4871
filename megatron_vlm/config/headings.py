"""Headings of ``--help``, which docs/flags.md has too."""

GPU = "GPU-related arguments"
LOGGING = "Logging arguments"
SAVE_LOAD = "Save/Load arguments"
PARALLEL = "Model parallel arguments"
DISTRIBUTED = "Distributed settings"
TOKENIZER = "Tokenizer-related arguments"
DATA = "Data arguments"
TRAINING = "Training settings"
FP8 = "FP8 arguments"
OPTIMIZER = "Optimizer arguments"
LORA = "LoRA arguments"
SLURM = "SLURM arguments"
OTHER = "Other arguments"
DEBUG = "Debug arguments"
# In the order of --help.
GROUPS = (
    GPU,
    LOGGING,
    SAVE_LOAD,
    PARALLEL,
    DISTRIBUTED,
    TOKENIZER,
    DATA,
    TRAINING,
    FP8,
    LORA,
    OPTIMIZER,
    SLURM,
    OTHER,
    DEBUG,
)
