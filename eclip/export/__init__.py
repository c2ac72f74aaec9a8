"""A trained model for others: one folder with weights, settings, tokenizer and card; towers for transformers; ONNX.

The way of an export:
    __main__.py     flags -> export_run; errors as one line
    run.py          checks, loads the run, orders the rest, prints what is there
    folder.py       OUT whole or absent; what in it is an export's own
    (weights/exported.py has the format of the folder, which `eclip.load` and --start-from read)
    int8.py         what int8 weights cost
    towers.py       folders that transformers loads
    graphs.py       the model as functions of padded tensors -> onnx_files.py: written, compared with PyTorch
    card.py         README.md
"""
