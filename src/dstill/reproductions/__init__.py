"""The paper's tables and figures: their files, their runs, and their pages.

Every row is an ordinary run of `api`.
"""
