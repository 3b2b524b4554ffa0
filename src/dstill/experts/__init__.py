"""Expert trajectories: training, smoothness, storage and import. Also networks trained once for selection methods.

The loop that trains a network is in `training`.
"""
