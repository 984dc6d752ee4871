"""The tables: which Megatron tensor holds which Hugging Face tensors."""
