"""The keys and values of a long prompt over several processes or GPUs, compared with one.

torchrun --nproc-per-node 2 examples/context_parallel.py

Every rank has the whole model, computes its share of a refresh and holds its share of the keys and
values. Over NCCL on a machine with a GPU for each rank, else over gloo on the CPU.
"""

import sys

from tensor_parallel import compare
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> int:
    return compare(__doc__, context_parallel="world")


if __name__ == "__main__":
    sys.exit(main())
