"""bottleneck: the blocks of ResNet-50's stages 1 and 2, alone and with the next one's first convolution."""

from harness import op_benchmark

test_bottleneck = op_benchmark("bottleneck")
test_bottleneck_chain = op_benchmark("bottleneck_chain")
