"""Boxes of images, cut at the edge."""

import numpy as np

from eclip.dataloading.images import inside_image


def test_a_box_is_cut_at_the_images_edge() -> None:
    assert inside_image((-5, -5, 20, 100), (61, 37)) == (0, 0, 20, 37)
    assert inside_image((np.float32(1), 2, 3, 4), (61, 37)) == (1, 2, 3, 4)
