"""Estimates what a run takes: time, memory and disk, from a short calibration on this machine.

Nothing here runs a method.
"""
