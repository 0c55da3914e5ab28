"""transformer_block: a whole ViT block as training under autocast runs it."""

from harness import op_benchmark

test_transformer_block_training = op_benchmark("transformer_block_training")
