"""Which parts, tokens and templates make a published model; and what is refused, with reasons."""
