"""What happens while a model runs: calibration batches, several processes, logs."""
