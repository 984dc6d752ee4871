"""Records of datasets, of any known shape, to conversations.

shapes.py   LLaVA, ShareGPT, OpenAI, Alpaca, question and answer, captions: to messages and images
fields.py   what else a record or a turn says of its loss, thoughts, options; ignored.py counts the rest
places.py   where images and frames stand, whatever their marker is called
values.py   what stands for nothing, for a list, for an image
"""
