"""What a run is made of, for annotations."""

from typing import Any, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Objects: TypeAlias = np.ndarray[Any, np.dtype[np.object_]]

Names: TypeAlias = dict[str, tuple[str, ...]]  # Of leaves or groups, by the name of a state.
