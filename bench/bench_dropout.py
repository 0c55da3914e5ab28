"""dropout: what a gradient passes through where a product's epilogue dropped."""

from harness import op_benchmark

test_dropout = op_benchmark("dropout")
