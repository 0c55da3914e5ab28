"""The parity rule, guard regions, the interpreter made honest, and compiling without a GPU.

``interpreter`` and ``offline`` need Triton and are imported by name.
"""

from fastvr.testing.check import check_op, truth_model
from fastvr.testing.guards import Guards, guarded, guarded_like
from fastvr.testing.parity import (
    GELU_TAIL,
    TOLERANCES,
    ParityReport,
    Tolerance,
    assert_parity,
    measure_parity,
)

__all__ = [
    "GELU_TAIL",
    "TOLERANCES",
    "Guards",
    "ParityReport",
    "Tolerance",
    "assert_parity",
    "check_op",
    "guarded",
    "guarded_like",
    "measure_parity",
    "truth_model",
]
