"""Conversion between Hugging Face LLaVA folders and megatron-core checkpoints.

    tables/          which Megatron tensor is which Hugging Face tensors, a file for each part
      table.py         what a table is made of; vit.py: what towers share
      model.py         the table of a whole model
      ops.py           pure functions of tensors: merges, splits, padding, tensor-parallel cuts
    formats/         where tensors lie
      folder.py        reading and writing Hugging Face folders, tensor by tensor
      native.py        reading and writing megatron-core's torch_dist format without megatron-core
      classic.py       reading and writing Megatron-LM's mp_rank_* files
      writer.py        a Megatron checkpoint as it is written, in either format
      stored.py        tensors where they lie in files
      streaming.py     what is done with each tensor on its way: checks, hashes, writing in the background
    build/           a new model of others
      join.py          joins a text model and a vision tower into a new LLaVA
      hub.py           where a model is that is named by a folder or a tag
      parts.py         the tensors of what is joined
      tokenizer.py     its tokenizer and chat template; spm.py: from a sentencepiece model
      random_weights.py  weights of a model of which only config.json is there
    convert.py       both directions and resharding, from the parts above
    megatron.py      a Megatron checkpoint read as if it were a Hugging Face folder
    adapters.py      LoRA's adapters: merged, or as PEFT's, whose adapter_config.json peft_config.py reads
    mm_projector.py  LLaVA's mm_projector.bin, read and written
    verify.py        whether two checkpoints, of whatever format, hold the same
    hashes.py        hashes of what a checkpoint's files hold
    target.py        where a conversion may write
    cli.py           what the scripts share

No process groups, no CUDA, and, except in build/, no transformers.
"""


class Difference(ValueError):
    """The error of two checkpoints that should hold the same and don't."""
