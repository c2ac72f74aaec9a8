"""A trained model to use: embed images, texts and products, locate a product in a photo, match photos with texts.

    import eclip
    model = eclip.load("runs/demo_towers")

loading.py     `load`: a run's folder or an exported one to a TrainedModel
trained.py     `TrainedModel`: what one asks of it, in numpy and boxes
encoding.py    `Encoder`: one pass of the image tower, then as many prompts as are asked
pictures.py    an image of any kind (path, bytes, PIL, array) to the pixels of the square that the model reads
regions.py     a score map to the regions of an image
"""

from eclip.inference.encoding import EncodedImages, Encoder, Instances
from eclip.inference.loading import load
from eclip.inference.pictures import Picture, describe, read_picture
from eclip.inference.regions import Region
from eclip.inference.trained import TrainedModel

__all__ = [
    "EncodedImages",
    "Encoder",
    "Instances",
    "Picture",
    "Region",
    "TrainedModel",
    "describe",
    "load",
    "read_picture",
]
