"""pool: ResNet's max pool, and its global average pool with the classifier; with their gradients."""

from harness import op_benchmark

test_max_pool = op_benchmark("max_pool")
test_max_pool_training = op_benchmark("max_pool_training")
test_max_pool_backward = op_benchmark("max_pool_backward")
test_avg_pool_linear = op_benchmark("avg_pool_linear")
test_avg_pool_linear_training = op_benchmark("avg_pool_linear_training")
test_avg_pool_linear_backward = op_benchmark("avg_pool_linear_backward")
