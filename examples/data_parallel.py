"""Answer the prompts of a file, shared out among processes; goes on where a stopped run ended.

accelerate launch examples/data_parallel.py prompts.txt --out answers                # GPUs
torchrun --nproc-per-node 2 examples/data_parallel.py prompts.txt --out answers    # CPUs

Each process holds a whole model and answers every n-th prompt (one a line), over the GPU that
accelerate gives it, or the CPU. Answers lie in a JSON Lines file for each process; prompts answered
in any of them are not asked again, whatever the number of processes is then.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import PartialState

import focus_compile
from focus_compile import demo
from focus_compile.decode import generate


def answered(folder: Path, prompts: list[str]) -> set[int]:
    """Numbers of the prompts whose answers are in the folder. A line cut short, or of another
    prompt of that number, counts as none."""
    found = set()
    for file in folder.glob("answers_*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                answer = json.loads(line)
                if prompts[answer["number"]] == answer["prompt"]:
                    found.add(answer["number"])
            except (json.JSONDecodeError, KeyError, IndexError):
                continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    args = parser.parse_args()

    state = PartialState(cpu=not torch.cuda.is_available())
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = [p for p in args.prompts.read_text(encoding="utf-8").splitlines() if p.strip()]
    done = answered(args.out, prompts)
    state.wait_for_everyone()  # all have read what there is before any adds to it
    mine = [at for at in range(len(prompts)) if at not in done]
    mine = mine[state.process_index :: state.num_processes]
    state.print(f"{len(prompts)} prompts, {len(done)} answered, {state.num_processes} processes")

    model, tokenizer = demo.load()
    model = focus_compile.compile(model.to(state.device), block_length=32, lowering=args.lowering)
    file = args.out / f"answers_{state.process_index}.jsonl"
    with file.open("a", encoding="utf-8") as answers:
        if file.stat().st_size:
            answers.write("\n")  # ends a line that was cut short
        for at in mine:
            ids = torch.tensor([tokenizer.encode(prompts[at])], device=state.device)
            made = generate(
                model, ids, gen_length=args.gen_length, block_length=32, threshold=args.threshold
            ).ids
            text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            answer = {"number": at, "prompt": prompts[at], "answer": text}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    state.wait_for_everyone()
    state.print(f"{len(answered(args.out, prompts))} of {len(prompts)} answered")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
