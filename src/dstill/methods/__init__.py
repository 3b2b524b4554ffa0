"""Distillation methods: one file a system, with its settings beside it.

`base` is the interface. The loop around a method is in `distillation`, its line in the table in `config.registry`.
"""
