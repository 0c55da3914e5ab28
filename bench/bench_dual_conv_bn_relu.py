"""dual_conv_bn_relu: the last convolution of each of ResNet-50's stages' first blocks, with its shortcut."""

from harness import op_benchmark

test_dual_conv_bn_relu = op_benchmark("dual_conv_bn_relu")
