"""``python -m vllm_dspark.cli``, for environments whose scripts are not on PATH."""

import sys

from vllm_dspark.cli import main

sys.exit(main())
