"""Generation of text from a trained checkpoint, at any tensor and pipeline parallel size.

questions.py   what is asked, rendered as training rendered it: token ids and pixels
sampling.py    the most likely token, or one drawn
generator.py   the passes through the model, over its pipeline stages
output.py      the text of an answer as it is made, or a file of answers
__main__.py    one rank of scripts/inference/generate.py
"""
