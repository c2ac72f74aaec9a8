"""The numbers of a run, from the step to the console and to files:

sinks.py        where they go: a line, metrics.jsonl, TensorBoard, Weights & Biases
throughput.py   pairs a second, waits for data, the share of a GPU's peak, time to the end
flops.py        FLOPs of a step, each product of the model counted once
gradients.py    gradient norms by part of the model, with a step's one all-reduce
peaks.py        the peaks of GPUs by their names, and of memory
spans.py        names of a step's parts, for the traces of
profiler.py     five steps in detail, when asked for
"""
