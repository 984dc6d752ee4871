"""The data pipeline: from people's files to shards, and from shards to microbatches.

prepare/           files of many formats to shards, and a look through them
preview/           samples as the model will see them, on a terminal or a page
conversations.py   turns from JSON, and what is made of unusual ones
templates.py       conversations to token ids, trained tokens known by construction
chat_templates.py  the built-in templates, system prompts and questions for captions
images.py          image bytes to uint8 pixels, as the folder's own image processor makes them
processing.py      both together: one raw sample to ids, labels and pixels
dataset.py         folders that `energon prepare` has prepared, checked when opened
shards.py          samples of their shards, each in one read
mixture.py         one such folder, or several by weights or epochs
encoder.py         energon's task encoder: what happens to samples that can't be used, counts
batch.py           the microbatch, padding, a look at what the model sees
loader.py          data order over data-parallel ranks, exact resume
workers.py         loader workers: processes that are forked, and say where they are
state.py           energon's state as JSON
"""
