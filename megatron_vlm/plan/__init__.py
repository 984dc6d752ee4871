"""The plan that follows from a run and its model. Standard library only (Python 3.9).

rules.py, fp8_rules.py  flags that contradict each other or the model
start.py                where a run begins, and whether flags and files fit that
pipeline.py             layers dealt to pipeline stages
flops.py                operations of an iteration
memory.py               memory of each rank; activations.py: what a pass through a part holds
data_order.py           what has to stay the same for an exact resume
grouping.py             which samples share a sequence or a micro batch; packing_estimate.py: how many will
"""
