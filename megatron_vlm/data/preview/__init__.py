"""Samples as the model will see them; scripts/data/preview.py is the command.

views.py   a sample as the training encoder makes it: which of its tokens are trained, images as they are fed
text.py    views for a terminal, and the first sample of a run for its log
page.py    views as one page of HTML
show.py    the command: which samples, and in which of these forms
"""
