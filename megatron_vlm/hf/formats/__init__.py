"""The formats in which tensors lie: Hugging Face folders, torch_dist checkpoints, Megatron-LM's classic
files."""
