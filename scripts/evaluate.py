"""Evaluate weights: torchrun [--nproc-per-node N] scripts/evaluate.py RECIPE --weights FILE ..."""

import sys

from rotpred.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
