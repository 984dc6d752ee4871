"""Conversion between Hugging Face LLaVA folders and megatron-core checkpoints.

    ops.py       pure functions of tensors: merges, splits, padding, tensor-parallel cuts
    mapping.py   the tables: which Megatron tensor is which Hugging Face tensors, per family
    folder.py    reading and writing Hugging Face folders, tensor by tensor
    native.py    reading and writing megatron-core's torch_dist format without megatron-core
    classic.py   reading and writing Megatron-LM's mp_rank_* files
    stored.py    tensors where they lie in files
    streaming.py what is done with each tensor on its way: checks, hashes, writing in the background
    megatron.py  a Megatron checkpoint read as if it were a Hugging Face folder
    writer.py    a Megatron checkpoint as it is written, in either format
    target.py    where a conversion may write
    convert.py   both directions and resharding, from the parts above
    verify.py    whether two checkpoints, of whatever format, hold the same
    lora.py      adapters: merged, or as PEFT's
    projector.py LLaVA's mm_projector.bin, read and written
    random_weights.py  weights of a model of which only config.json is there
    build.py     joins a text model and a vision tower into a new LLaVA, from:
    hub.py       where a model is that is named by a folder or a tag
    parts.py     the tensors of what is joined
    tokenizer.py its tokenizer and chat template; spm.py: from a sentencepiece model
    cli.py       what the scripts share

No process groups, no CUDA, and, except in build.py and tokenizer.py, no transformers.
"""


class Difference(ValueError):
    """Two checkpoints that should hold the same don't."""
