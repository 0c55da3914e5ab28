"""attention: softmax(q k / sqrt d) v of ViT's heads on packed qkv."""

from harness import op_benchmark

test_attention = op_benchmark("attention")
