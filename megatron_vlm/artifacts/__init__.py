"""Files that lie on disk: checkpoints, datasets, mixtures, templates. Standard library only (Python 3.9).

checkpoint.py     folders of checkpoints, and how one appears: whole or not at all
torch_dist.py     .metadata of a checkpoint's tensors, read without running anything that it names
dataset.py        folders of shards, and what prepare.py has noted of them
mixture.py        the YAML file of several datasets
templates.py      chat templates by name, and the tokens that each needs
chat_template.py  the chat template that a model folder carries
end_tokens.py     the token that ends an answer
image_rule.py     how image files are read
token_lengths.py  lengths of a dataset's samples, as prepare.py counted them
"""
