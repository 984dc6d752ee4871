"""The data pipeline: from people's files to shards, and from shards to microbatches.

prepare/           files of many formats to shards, and a look through them
preview/           samples as the model will see them, on a terminal or a page
media/             images, and any other kind: from bytes to tensors and their tokens
loading/           loader workers, data order, exact resume
conversations.py   turns from JSON, and the rules for unusual ones
field_maps.py      question, answer and image of samples that energon's field maps describe
templates.py       conversations to token ids, trained tokens known by construction
chat_templates.py  the built-in templates, system prompts and questions for captions
processing.py      all of that: one raw sample to ids, labels and media
dataset.py         folders that `energon prepare` has prepared, checked when opened
shards.py          samples of their shards, each in one read
mixture.py         one such folder, or several by weights or epochs
batch.py           samples and microbatches, padded or packed
"""
