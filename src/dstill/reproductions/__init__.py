"""The paper's tables and figures: their files, how they are run, and their pages.

Every row is an ordinary run of `api`.
"""
