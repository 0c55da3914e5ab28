"""batch_norm_act_max_pool: the stem of ResNet-50 in training behind its convolution, forward and backward."""

from harness import op_benchmark

test_batch_norm_act_max_pool = op_benchmark("batch_norm_act_max_pool")
test_batch_norm_act_max_pool_backward = op_benchmark("batch_norm_act_max_pool_backward")
