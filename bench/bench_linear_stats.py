"""linear_stats: ViT's proj and fc2, which leave the statistics of their rows for the next LayerNorm."""

from harness import op_benchmark

test_linear_stats = op_benchmark("linear_stats")
