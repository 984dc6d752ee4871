"""The tables: which Megatron tensor holds which Hugging Face tensors, a file for each kind of part."""
