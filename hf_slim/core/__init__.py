"""What every technique shares. Stdlib and torch only."""

import logging

# transformers imports bitsandbytes, which warns in every process that an optional kernel from the Hub is missing
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)
