"""Hand-written derivatives of the instance-norm ConvNet, and the kernels that they run on.

The mathematics is in `tangent`, the choice of kernels in `engine`. The step of an optimiser is not here.
"""
