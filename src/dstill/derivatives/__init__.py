"""Hand-written derivatives of the instance-norm ConvNet, and the kernels that they run on.

`tangent` holds the mathematics, `engine` chooses the kernels. The steps of optimisers are elsewhere.
"""
