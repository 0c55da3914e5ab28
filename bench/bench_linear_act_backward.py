"""linear_act_backward: a gradient back through fc2 and GELU."""

from harness import op_benchmark

test_linear_act_backward = op_benchmark("linear_act_backward")
