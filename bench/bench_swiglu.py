"""swiglu: the activation of a gated MLP, forward and backward."""

from harness import op_benchmark

test_swiglu = op_benchmark("swiglu")
test_swiglu_backward = op_benchmark("swiglu_backward")
