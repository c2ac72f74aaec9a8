"""Weights from elsewhere: safetensors of other programs into our towers.

The way of a tower, from a file to an encoder of `eclip.model`:
    names.py           what its tensors are called: timm, Hugging Face, OpenAI and open_clip
    weights_file.py    which file it is, which tower of it; every tensor taken once, none missing, none left over
    told.py            what the file of a CLIP or SigLIP, and the configuration beside it, tell of the model's settings
    pretrained.py      `load_image_weights`, `load_text_weights`: all checked before any is written
    projections.py     where g_I, g_T and the logit scale start: at the file's own, where it has them
    flags.py           the settings that flags are read over when they name such a file
    exported.py        a whole model as a folder, which `eclip export` writes and `eclip.load` and --start-from read
    towers.py          `python -m eclip.weights.towers`: the demo's two towers, read out of the packages that carry them
"""
