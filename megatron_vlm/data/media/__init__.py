"""Media of samples, of any kind: from the bytes of files to tensors and their tokens."""
