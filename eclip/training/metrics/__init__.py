"""The numbers of a run, from the step to the console and to files:

    sinks.py        where they go: a line, metrics.jsonl, TensorBoard, Weights & Biases
    throughput.py   pairs a second, waits for data, the share of a GPU's peak, time to the end
    peaks.py        the peaks of GPUs by their names, and of memory
"""
