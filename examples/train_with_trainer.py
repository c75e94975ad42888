"""Train a masked-diffusion model with transformers' Trainer, through the compiled model.

    python examples/train_with_trainer.py

The task: a prompt of random tokens, and a response that repeats it. The model is compiled once,
before training: with gradients its calls are the model itself, and the same compiled model then
decodes, incrementally and with sparse keys.
"""

import argparse
import time
import warnings

import torch
from transformers import EuroBertConfig, EuroBertForMaskedLM, Trainer, TrainingArguments

import focus_compile
from focus_compile.decode import generate

MASK, FIRST, VOCABULARY = 1, 2, 34  # ids: padding, mask, and 32 tokens
PROMPT, RESPONSE, BLOCK, BATCH = 32, 16, 8, 32


class Repeats(torch.utils.data.Dataset):
    """Prompts whose last `RESPONSE` tokens are to be repeated."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.prompts = torch.randint(FIRST, VOCABULARY, (size, PROMPT), generator=generator)

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return torch.cat([self.prompts[index], self.prompts[index][-RESPONSE:]])


def mask_responses(examples):
    """A batch with a random share of each response masked; the loss is on the masked tokens."""
    ids = torch.stack(examples)
    share = torch.rand(len(ids), 1) * 0.9 + 0.1
    masked = torch.rand(ids.shape) < share
    masked[:, :PROMPT] = False
    return {"input_ids": ids.masked_fill(masked, MASK), "labels": ids.masked_fill(~masked, -100)}


def accuracy(model, examples):
    """(share of response tokens that are right, rows that the model computed)."""
    ids = torch.stack([examples[index] for index in range(len(examples))])
    with focus_compile.record() as history:
        result = generate(
            model, ids[:, :PROMPT], gen_length=RESPONSE, block_length=BLOCK, mask_token_id=MASK
        )
    rows = sum(call.rows for call in history) or result.model_calls * ids.numel()
    return (result.ids[:, PROMPT:] == ids[:, PROMPT:]).float().mean().item(), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--lowering", default="inductor", help="eager: without compilation")
    parser.add_argument("--out", default="build/train_with_trainer")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*gradients are enabled")

    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=PROMPT + RESPONSE,
        mask_token_id=MASK,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = EuroBertForMaskedLM(config)

    # The one line:
    compiled = focus_compile.compile(
        model,
        block_length=BLOCK,
        key_block=8,
        sink_tokens=4,
        keep_ratio=args.keep_ratio,
        lowering=args.lowering,
    )

    trainer = Trainer(
        model=compiled,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Repeats(args.steps * BATCH, seed=0),
        data_collator=mask_responses,
    )
    begun = time.perf_counter()
    trainer.train()
    print(f"trained {args.steps} steps in {time.perf_counter() - begun:.0f} s")

    model.eval()
    unseen = Repeats(32, seed=1)
    dense, dense_rows = accuracy(model, unseen)
    sparse, sparse_rows = accuracy(compiled, unseen)
    print(f"dense: {dense:.1%} of the tokens right, {dense_rows:,} rows")
    print(f"focus, keep_ratio={args.keep_ratio}: {sparse:.1%}, {sparse_rows:,} rows")


if __name__ == "__main__":
    main()
