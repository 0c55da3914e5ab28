"""linear: ViT's projections and MLP layers, bias, activation, LayerScale and residual included."""

from harness import op_benchmark

test_linear = op_benchmark("linear")
