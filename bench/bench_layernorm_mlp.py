"""layernorm_mlp: a ViT block's second half; and as training runs it."""

from harness import op_benchmark

test_layernorm_mlp = op_benchmark("layernorm_mlp")
test_layernorm_mlp_training = op_benchmark("layernorm_mlp_training")
