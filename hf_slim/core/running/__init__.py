"""Helpers for a running model: calibration batches, several processes, logs."""
