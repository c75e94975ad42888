"""One model over several processes or GPUs, compared with one: the same tokens by the same steps.

torchrun --nproc-per-node 2 examples/tensor_parallel.py

Over NCCL on a machine with a GPU for each rank, else over gloo on the CPU. The number of ranks must
divide the heads: the bundled model has two for keys and values.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import focus_compile
from focus_compile import demo
from focus_compile.decode import generate
from focus_compile.demo import retrieval

BY_FEATURE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUT = ("o_proj", "down_proj")


def split(model: nn.Module, device: str) -> nn.Module:
    """Attention heads, MLPs and the head's vocabulary, over all ranks."""
    plan = {}
    for name, _ in model.named_modules():
        last = name.rpartition(".")[2]
        if last in BY_FEATURE:
            plan[name] = ColwiseParallel()
        elif last in BY_INPUT:
            plan[name] = RowwiseParallel()
        elif last == "lm_head":
            plan[name] = ColwiseParallel(output_layouts=Replicate())
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh["tp"], plan)


Calls = list[tuple[str, int, dict[str, int]]]


def decode(
    model: nn.Module, prompt: Tensor, args: argparse.Namespace, **more: Any
) -> tuple[Tensor, Calls, float]:
    """Tokens; the program, rows and keys of every call; seconds."""
    model = focus_compile.compile(
        model, strict=True, policy=args.policy, lowering=args.lowering, block_length=32, **more
    )
    options = {"gen_length": args.gen_length, "block_length": 32}
    generate(model, prompt, **options)  # compiles
    begun = time.perf_counter()
    with focus_compile.record() as history:
        ids = generate(model, prompt, **options).ids
    seconds = time.perf_counter() - begun
    return ids, [(call.program, call.rows, call.keys) for call in history], seconds


def compare(
    description: str, spread: Callable[[nn.Module, str], nn.Module] | None = None, **more: Any
) -> int:
    """Decode over all ranks, of the model that `spread` makes or with `more` options, and on the
    first rank alone; 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--length", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--policy", default="focus-dllm")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start it with torchrun --nproc-per-node 2 {sys.argv[0]}")

    local = int(os.environ["LOCAL_RANK"])
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    whole, tokenizer = demo.load()
    question = retrieval.make(tokenizer, args.length, response=args.gen_length)
    prompt = torch.tensor([question.prompt_ids], device=device)
    model = demo.load()[0].to(device)
    model = model if spread is None else spread(model, device)
    ids, calls, seconds = decode(model, prompt, args, **more)

    torch.compiler.reset()
    same = True
    if rank == 0:
        print(f"{ranks} ranks on {device}: {len(calls)} calls in {seconds:.2f} s")
        expected, expected_calls, alone = decode(whole.to(device), prompt, args)
        print(f"1 rank: {len(expected_calls)} calls in {alone:.2f} s")
        text = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
        print(f"{question.score(text)} of {len(question.pairs)} answers right")
        different = int((ids != expected).sum())
        same = different == 0
        others = sum(a != b for a, b in zip(calls, expected_calls, strict=False))
        if others:
            print(f"{others} of {len(calls)} calls chose other rows: ranks round sums differently")
        print("the same tokens" if same else f"{different} tokens DIFFER")
    verdict = torch.tensor([same], device=device)
    dist.broadcast(verdict, 0)  # the others wait here for the first
    dist.destroy_process_group()
    return 0 if bool(verdict) else 1


@record
def main() -> int:
    return compare(__doc__, split)


if __name__ == "__main__":
    sys.exit(main())
