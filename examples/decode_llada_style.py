"""A decoding loop as LLaDA's users write it, made incremental by one line.

    python examples/decode_llada_style.py

The loop knows nothing of focus_compile: it calls the model on the whole sequence, picks the
masked positions of the current block that the model is surest of, writes their tokens, and calls
again.
"""

import argparse
import time

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from focus_compile.demo import MODEL_PATH, retrieval


@torch.no_grad()
def decode(model, prompt, gen_length, block_length, mask_id):
    x = torch.full((1, prompt.shape[1] + gen_length), mask_id)
    x[:, : prompt.shape[1]] = prompt
    for start in range(prompt.shape[1], x.shape[1], block_length):
        for _ in range(block_length):
            logits = model(x).logits[:, start : start + block_length].float()
            probability, token = logits.softmax(-1).max(-1)
            probability[x[:, start : start + block_length] != mask_id] = -1
            best = probability.argmax(-1)
            x[0, start + best] = token[0, best]
    return x[:, prompt.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--model", default=str(MODEL_PATH))
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForMaskedLM.from_pretrained(args.model, dtype=torch.float32).eval()
    mask_id = tokenizer.mask_token_id

    # The one line:
    model = torch.compile(
        model, backend="focus", options={"mask_token_id": mask_id, "block_length": 32}
    )

    example = retrieval.make(tokenizer, args.length, response=args.gen_length)
    prompt = torch.tensor([example.prompt_ids])
    for attempt in ("with compilation", "compiled"):
        begun = time.perf_counter()
        response = decode(model, prompt, args.gen_length, 32, mask_id)
        text = tokenizer.decode(response[0], skip_special_tokens=True)
        right = f"{example.score(text)} of {len(example.pairs)} right"
        print(f"{attempt}: {time.perf_counter() - begun:.1f} s, {right}:{text}")


if __name__ == "__main__":
    main()
