"""What stands between an encoder and the language model, a file for each kind."""
