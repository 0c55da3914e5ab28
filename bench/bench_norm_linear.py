"""norm_linear: ViT's qkv and fc1 with the LayerNorm before them folded in."""

from harness import op_benchmark

test_norm_linear = op_benchmark("norm_linear")
