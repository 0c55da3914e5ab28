"""What each op means, in plain PyTorch: the truth in float64, eager in every other dtype."""
