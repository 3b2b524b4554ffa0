"""Expert trajectories: training, smoothness, storage, and import; and single trained networks.

The loop that trains a network is in `training`.
"""
