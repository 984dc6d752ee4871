"""A new LLaVA is built of a text model and a vision tower, trained or with random weights."""
