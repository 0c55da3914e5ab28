"""bottleneck: the blocks of ResNet-50's stages 1 and 2 behind their first convolution."""

from harness import op_benchmark

test_bottleneck = op_benchmark("bottleneck")
