"""conv_bn_relu_max_pool: the stem of ResNet-50, of floating and of uint8 images."""

from harness import op_benchmark

test_conv_bn_relu_max_pool = op_benchmark("conv_bn_relu_max_pool")
