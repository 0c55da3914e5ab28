"""residual_block: the blocks of ResNet-50 in training, forward and backward."""

from harness import op_benchmark

test_residual_block = op_benchmark("residual_block")
test_residual_block_backward = op_benchmark("residual_block_backward")
