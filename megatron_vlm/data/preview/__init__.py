"""What the model will see of samples; scripts/data/preview.py is its command."""
