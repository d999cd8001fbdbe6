"""Predictions of a teacher on disk: the file format, reading and writing."""
