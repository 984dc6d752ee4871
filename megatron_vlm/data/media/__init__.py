"""Media of samples, of any kind: from the bytes of files to tensors and their tokens.

kinds.py     the kinds of media, as datasets write them
base.py      the media of a sample, and what a reader of a kind has to do
readers.py   the readers, by kind
images.py    images: bytes to uint8 pixels, as the model folder's own image processor makes them
decoding.py  an image file to three channels of 8 bits, upright
"""
