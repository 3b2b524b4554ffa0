"""Real images: named data sets, folders and Parquet files, preprocessing, and siamese augmentation.

What is trained on them is not here.
"""
