"""conv_bn_relu: every distinct convolution of ResNet-50."""

from harness import op_benchmark

test_conv_bn_relu = op_benchmark("conv_bn_relu")
test_conv_bn_relu_backward = op_benchmark("conv_bn_relu_backward")
