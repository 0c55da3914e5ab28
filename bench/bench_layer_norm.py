"""layer_norm: ViT's rows, forward and backward."""

from harness import op_benchmark

test_layer_norm = op_benchmark("layer_norm")
test_layer_norm_backward = op_benchmark("layer_norm_backward")
