"""Weights from elsewhere: safetensors of other programs into our towers.

The way of a tower, from a file to an encoder of `eclip.model`:
    weights_file.py    which file it is, which tower of it; every tensor taken once, none missing, none left over
    pretrained.py      the tables of names (timm, Hugging Face's ViT, DINOv2, BERT); `load_image_weights`,
                       `load_text_weights`: all checked before any is written
    towers.py          `python -m eclip.weights.towers`: the demo's two towers, read out of the packages that carry them
"""
