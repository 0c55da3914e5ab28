"""attention_backward: dqkv of ViT's heads, and of the class token alone."""

from harness import op_benchmark

test_attention_backward = op_benchmark("attention_backward")
test_attention_kv_backward = op_benchmark("attention_kv_backward")
