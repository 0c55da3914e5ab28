"""What a prepared model runs on a CPU in place of PyTorch's plain operators."""
