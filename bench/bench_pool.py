"""pool: ResNet's max pool, and its global average pool with the classifier."""

from harness import op_benchmark

test_max_pool = op_benchmark("max_pool")
test_avg_pool_linear = op_benchmark("avg_pool_linear")
