"""Calibration text; importance, expert usage and recipes build on it."""
