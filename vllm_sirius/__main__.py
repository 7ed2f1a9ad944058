"""`python -m vllm_sirius` is the command ``vllm-sirius``."""

import sys

from vllm_sirius.cli import main

if __name__ == "__main__":
    sys.exit(main())
