"""Real images: named data sets, folders and Parquet files, preprocessing, and siamese augmentation.

Nothing is trained here.
"""
