"""batch_norm_act: the maps of ResNet-50 in training, forward and backward."""

from harness import op_benchmark

test_batch_norm_act = op_benchmark("batch_norm_act")
test_batch_norm_act_backward = op_benchmark("batch_norm_act_backward")
