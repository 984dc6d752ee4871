"""Records of datasets, of any known shape, to conversations."""
