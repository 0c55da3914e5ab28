"""layernorm_attention: a ViT block's first half as training runs it."""

from harness import op_benchmark

test_layernorm_attention_training = op_benchmark("layernorm_attention_training")
