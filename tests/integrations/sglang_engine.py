"""Prompts through SGLang's engine on the CPU, with `FocusEvict`: FOLDER WORK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path, work: Path) -> None:
    import sglang

    asked = json.loads(work.read_text())
    (folder / "answers.json").unlink(missing_ok=True)
    settings = folder / "focus.yaml"
    settings.write_text("mask_token_id: 3\nblock_size: 32\n")
    engine = sglang.Engine(
        model_path=str(folder),
        trust_remote_code=True,  # its configuration: SGLang knows SDAR by its own
        device="cpu",
        attention_backend="torch_native",
        dtype="float32",
        dllm_algorithm="FocusEvict",
        dllm_algorithm_config=str(settings),
        max_total_tokens=4096,
        mem_fraction_static=0.1,
        max_running_requests=4,
        **asked["arguments"],
    )
    sampling = {"max_new_tokens": 64, "temperature": 0}
    answers = engine.generate(input_ids=asked["prompts"], sampling_params=sampling)
    (folder / "answers.json").write_text(json.dumps([found["output_ids"] for found in answers]))
    engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
