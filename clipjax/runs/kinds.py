"""Types of the arrays in a run, for annotations."""

from typing import Any, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Objects: TypeAlias = np.ndarray[Any, np.dtype[np.object_]]

Names: TypeAlias = dict[str, tuple[str, ...]]  # The leaves or groups of each state, by its name.
