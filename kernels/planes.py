"""What each plane of the packed statistics (PLANES, B, H, T) holds, for writer and reader."""

from enum import IntEnum

REACH = 8       # the offset profile reaches so far to both sides of the induction target


class Plane(IntEnum):
    """Named as the fields of `HeadStatistics` in kernels/statistics.py, which defines them."""

    PREFIX_MATCHING = 0
    DUPLICATE_TOKEN = 1
    PREVIOUS_TOKEN = 2
    FIRST_TOKEN = 3
    ENTROPY = 4
    DISTANCE = 5
    OFFSET_PROFILE = 6  # the first of 2 · REACH + 1 planes: offsets −REACH … REACH


PLANES = Plane.OFFSET_PROFILE + 2 * REACH + 1
