"""patch_embed_stats: ViT's patch embedding, with its rows' statistics for the first LayerNorm."""

from harness import op_benchmark

test_patch_embed_stats = op_benchmark("patch_embed_stats")
