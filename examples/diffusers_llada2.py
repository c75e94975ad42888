"""diffusers' LLaDA2Pipeline, as it is, over a compiled model.

    python examples/diffusers_llada2.py

The pipeline and its scheduler know nothing of focus_compile. It runs with the bundled
block-diffusion model, which has weights that know a task, behind the call that LLaDA2's own class
has. With a model from the hub:

    model = AutoModelForCausalLM.from_pretrained("inclusionAI/LLaDA2.0-mini", ...)
"""

import argparse
import time

import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from torch import nn

import focus_compile
from focus_compile import demo
from focus_compile.demo import retrieval

BLOCK_LENGTH = 32


class AttendsInBlocks(nn.Module):
    """The bundled model, called as LLaDA2 is: it makes its block-causal mask itself."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config

    @property
    def device(self):
        return self.decoder.device

    @property
    def dtype(self):
        return self.decoder.dtype

    def forward(self, input_ids, attention_mask, position_ids):
        block = torch.arange(input_ids.shape[1], device=input_ids.device) // BLOCK_LENGTH
        sees = (block[:, None] >= block)[None, None] & attention_mask[:, None, None, :].bool()
        return self.decoder(
            input_ids, attention_mask=sees, position_ids=position_ids, use_cache=False
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32, help="model calls a block")
    parser.add_argument("--lowering", default="inductor", help="eager: without compilation")
    args = parser.parse_args()

    decoder, tokenizer = demo.load("block")
    model = AttendsInBlocks(decoder)
    example = retrieval.make(tokenizer, args.length, response=args.gen_length, model="block")

    # The one line:
    compiled = focus_compile.compile(
        model, policy="focus-evict", block_length=BLOCK_LENGTH, lowering=args.lowering
    )

    for name, run in (("dense", model), ("focus, with compilation", compiled)):
        pipeline = LLaDA2Pipeline(run, BlockRefinementScheduler(block_length=BLOCK_LENGTH))
        pipeline.set_progress_bar_config(disable=True)
        begun = time.perf_counter()
        with focus_compile.record() as history:
            response = pipeline(
                input_ids=torch.tensor([example.prompt_ids]),
                gen_length=args.gen_length,
                block_length=BLOCK_LENGTH,
                num_inference_steps=args.steps,
                threshold=1.0,
                temperature=0.0,
                editing_threshold=None,
                mask_token_id=tokenizer.mask_token_id,
                eos_token_id=tokenizer.eos_token_id,
                eos_early_stop=False,
                output_type="seq",
            ).sequences
        text = tokenizer.decode(response[0], skip_special_tokens=True)
        right = f"{example.score(text)} of {len(example.pairs)} right"
        rows = sum(call.rows for call in history)
        spent = f"{rows:,} rows, " if rows else ""
        print(f"{name}: {time.perf_counter() - begun:.1f} s, {spent}{right}:{text}")


if __name__ == "__main__":
    main()
