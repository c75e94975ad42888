"""Decode with the sampler that comes along, a live canvas, and what each model call did.

python examples/use_generate.py --threshold 0.9
"""

import argparse
from collections import Counter

import torch

import focus_compile
from focus_compile import demo
from focus_compile.decode import generate
from focus_compile.decode.canvas import Canvas
from focus_compile.demo import retrieval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--threshold", type=float, help="decode all positions at least this sure")
    args = parser.parse_args()

    model, tokenizer = demo.load()
    model = focus_compile.compile(model, block_length=32)
    example = retrieval.make(tokenizer, args.length, response=args.gen_length)
    prompt = torch.tensor([example.prompt_ids])

    with (
        focus_compile.record() as history,
        Canvas(
            tokenizer,
            title="focus",
            prompt_tokens=prompt.shape[1],
            response_tokens=args.gen_length,
            mask_token_id=model.config.mask_token_id,
            program=lambda: history[-1].program if history else "",
        ) as canvas,
    ):
        result = generate(
            model,
            prompt,
            gen_length=args.gen_length,
            block_length=32,
            threshold=args.threshold,
            progress=canvas,
        )

    text = tokenizer.decode(result.ids[0, prompt.shape[1] :], skip_special_tokens=True)
    print(f"{example.score(text)} of {len(example.pairs)} right:{text}")
    print(f"{result.model_calls} calls:", dict(Counter(record.program for record in history)))
    print("rows computed:", sum(record.rows for record in history))


if __name__ == "__main__":
    main()
