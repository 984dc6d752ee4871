"""From prepared shards to microbatches: templates, images, loaders with exact resume."""
