"""layer_norm: ViT's rows."""

from harness import op_benchmark

test_layer_norm = op_benchmark("layer_norm")
