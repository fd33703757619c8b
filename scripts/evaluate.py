"""Evaluate weights: torchrun [--nproc-per-node N] scripts/evaluate.py RECIPE --weights FILE ..."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from rotpred.cli import evaluate_main


@record
def main() -> None:
    sys.exit(evaluate_main())


if __name__ == "__main__":
    main()
