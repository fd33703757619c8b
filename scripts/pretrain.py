"""Pretrain by rotation prediction: torchrun [--nproc-per-node N] scripts/pretrain.py RECIPE ..."""

import sys

from rotpred.cli import pretrain_main

if __name__ == "__main__":
    sys.exit(pretrain_main())
