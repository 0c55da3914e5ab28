"""What each op means, in plain PyTorch and einops: the truth in float64, eager in every other dtype."""
