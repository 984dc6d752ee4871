"""The builder of a new LLaVA, of a text model and a vision tower, trained or with random weights."""
