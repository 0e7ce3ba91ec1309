"""Small antialiased pictures of forms that are turned, sheared, enlarged and moved: of glyphs and of shapes.

A form is drawn once, large, and kept as its signed distance to the outline. A picture reads the distance
where its pixels come to lie; from half a pixel outside to half a pixel inside it goes from 0 to 1. Unlike a
resized drawing it is sharp at each size, and a number added to the distance makes the stroke bolder.
"""

from __future__ import annotations

import numpy as np

SIDE = 128  # pixels a side of the large drawing, which spans −1 … 1


def distance(drawing: np.ndarray) -> np.ndarray:
    """The signed distance to the outline of a drawing bool [SIDE, SIDE], float32, positive inside, in units
    of half the drawing's side."""
    from scipy.ndimage import distance_transform_edt as edt

    return ((edt(drawing) - edt(~drawing)) * (2 / SIDE)).astype(np.float32)


def matrices(angle: np.ndarray, shear: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Maps [N, 2, 2] of the form's plane (x to the right, y down): sheared, then turned, then enlarged.

    angle: by which it is turned clockwise, in radians, [N].
    shear: pixels to the right for each pixel up, [N].
    size: factor for x and y, [N, 2].
    """
    zero, one = np.zeros_like(angle), np.ones_like(angle)
    sheared = np.stack([one, -shear, zero, one], -1).reshape(-1, 2, 2)
    turned = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    return turned @ (size[:, :, None] * sheared)


def pictures(
    form: np.ndarray, maps: np.ndarray, center: np.ndarray, bolder: np.ndarray | float, side: int
) -> np.ndarray:
    """Pictures [N, side, side] of one form, float32: the share of each pixel that the form covers.

    form: its signed distance, as `distance` returns it.
    maps: from the plane of the form, in units of half the drawing's side, to pixels of the picture [N, 2, 2].
    center: where the middle of the form lies, in pixels from the middle of the picture, [N, 2] (x, y).
    bolder: pixels by which the outline moves outwards, [N] or a number.
    side: pixels a side of the pictures.
    """
    from scipy.ndimage import map_coordinates

    back = np.linalg.inv(maps) * (SIDE / 2)  # from pixels of the picture to those of the drawing, (x, y)
    first = (SIDE - 1) / 2 - np.einsum("nij,nj->ni", back, center)
    across = np.arange(side) - (side - 1) / 2
    column, row = (  # in the drawing, of each pixel of each picture: [N, side, side]
        first[:, i, None, None]
        + back[:, i, 0, None, None] * across
        + back[:, i, 1, None, None] * across[:, None]
        for i in (0, 1)
    )
    depth = map_coordinates(form, [row, column], order=1, mode="nearest", output=np.float32)
    scale = np.sqrt(np.abs(np.linalg.det(maps))).astype(np.float32)  # pixels of a unit of the form's plane
    return (depth * scale[:, None, None] + np.reshape(bolder, (-1, 1, 1)) + 0.5).clip(0, 1)
