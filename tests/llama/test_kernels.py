"""What any CPU can say of the kernels of this package: shapes that do not fit are refused before one is needed."""

from __future__ import annotations

import numpy as np
import pytest

from swarmcpp._native import attend, q8_product


@pytest.mark.parametrize(
    ("width", "columns", "out"), [(33, 32, (1, 2)), (34, 64, (1, 2)), (34, 32, (2, 2)), (34, 32, (1, 3))]
)
def test_a_product_of_shapes_that_do_not_fit(width: int, columns: int, out: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shapes"):
        q8_product(np.zeros((2, width), np.uint8), np.zeros((1, columns), np.float32), np.zeros(out, np.float32))


@pytest.mark.parametrize(
    ("keys", "values", "mask", "lanes"),
    [
        ((1, 1, 19, 16), (1, 1, 20, 16), (1, 3, 20), 8),
        ((1, 1, 20, 24), (1, 1, 20, 16), (1, 3, 20), 8),
        ((1, 1, 20, 16), (1, 1, 19, 16), (1, 3, 20), 8),
        ((1, 1, 20, 16), (1, 1, 20, 24), (1, 3, 20), 8),
        ((1, 1, 20, 16), (1, 1, 20, 16), (1, 3, 19), 8),
        ((1, 1, 20, 16), (1, 1, 20, 16), (1, 2, 20), 8),
        ((1, 3, 20, 16), (1, 3, 20, 16), (1, 3, 20), 8),
        ((1, 0, 20, 16), (1, 0, 20, 16), (1, 3, 20), 8),
        ((1, 1, 20, 16), (1, 1, 20, 16), (1, 3, 20), 9),
        ((1, 1, 20, 16), (1, 1, 20, 16), (1, 3, 20), 24),
        ((1, 1, 20, 16), (1, 1, 20, 16), (1, 3, 20), 0),
    ],
)
def test_attention_of_shapes_that_do_not_fit(
    keys: tuple[int, ...], values: tuple[int, ...], mask: tuple[int, ...], lanes: int
) -> None:
    """Two heads, three rows, twenty positions, 16 values of each."""
    halves = (np.zeros(shape, np.uint16) for shape in (keys, values, mask))
    with pytest.raises(ValueError, match="shapes"):
        attend(np.zeros((1, 2, 3, 16), np.float32), *halves, 1.0, lanes, False, np.zeros((1, 3, 2, 16), np.float32))
