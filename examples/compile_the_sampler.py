"""The model and its sampler in one compiled function, which never forms the logits of all rows.

    python examples/compile_the_sampler.py

One call of `denoise_step` is one step of decoding. The softmax and the choice of a token run for
the rows that are computed; what compares positions with one another runs on a token and a
probability for each.
"""

import argparse
import time

import torch

import focus_compile
from focus_compile import demo
from focus_compile.demo import retrieval

BLOCK_LENGTH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gen-length", type=int, default=64)
    args = parser.parse_args()

    model, tokenizer = demo.load()
    mask_id = tokenizer.mask_token_id

    def denoise_step(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The ids with one more token of the block that begins at `start`."""
        probability, token = model(x).logits.float().softmax(-1).max(-1)
        position = torch.arange(x.shape[1])
        candidate = (x == mask_id) & (position >= start) & (position < start + BLOCK_LENGTH)
        best = torch.where(candidate, probability, -1.0).argmax(-1, keepdim=True)
        return torch.where(candidate & (position == best), token, x)

    # The one line:
    denoise_step = torch.compile(
        denoise_step, backend="focus", options={"mask_token_id": mask_id, "block_length": 32}
    )

    example = retrieval.make(tokenizer, args.length, response=args.gen_length)
    prompt = torch.tensor([example.prompt_ids])
    response = torch.full((1, args.gen_length), mask_id)
    for attempt in ("with compilation", "compiled"):
        begun = time.perf_counter()
        x = torch.cat([prompt, response], 1)
        with focus_compile.record() as history, torch.no_grad():
            for step in range(args.gen_length):
                block = prompt.shape[1] + step // BLOCK_LENGTH * BLOCK_LENGTH
                x = denoise_step(x, torch.tensor(block))
        text = tokenizer.decode(x[0, prompt.shape[1] :], skip_special_tokens=True)
        right = f"{example.score(text)} of {len(example.pairs)} right"
        rows = sum(record.rows for record in history)
        print(f"{attempt}: {time.perf_counter() - begun:.1f} s, {rows} rows, {right}:{text}")


if __name__ == "__main__":
    main()
