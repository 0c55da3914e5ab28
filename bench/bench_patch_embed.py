"""patch_embed: ViT's patches, position embedding and class token."""

from harness import op_benchmark

test_patch_embed = op_benchmark("patch_embed")
