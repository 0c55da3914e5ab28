"""layernorm_mlp: a ViT block's second half."""

from harness import op_benchmark

test_layernorm_mlp = op_benchmark("layernorm_mlp")
