"""`python -m hf_slim.cli` is `hf-slim`, for launchers such as torchrun."""

import sys

from hf_slim.cli.main import main

sys.exit(main())
