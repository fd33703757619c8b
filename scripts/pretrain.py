"""Pretrain by rotation prediction: torchrun [--nproc-per-node N] scripts/pretrain.py RECIPE ..."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from rotpred.cli import pretrain_main


@record
def main() -> None:
    sys.exit(pretrain_main())


if __name__ == "__main__":
    main()
