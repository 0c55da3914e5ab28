"""attention: softmax(q k / sqrt d) v of ViT's heads, packed, and of the class token; and the gradients."""

from harness import op_benchmark

test_attention = op_benchmark("attention")
test_attention_kv = op_benchmark("attention_kv")
test_attention_training = op_benchmark("attention_training")
test_attention_kv_training = op_benchmark("attention_kv_training")
test_attention_backward = op_benchmark("attention_backward")
test_attention_kv_backward = op_benchmark("attention_kv_backward")
