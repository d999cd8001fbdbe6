"""Export of finished models to the formats of other runtimes: one target a file, each registered in `EXPORTERS`."""
