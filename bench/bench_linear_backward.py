"""linear_backward: the gradients of a linear layer's parameters."""

from harness import op_benchmark

test_linear_weight_backward = op_benchmark("linear_weight_backward")
