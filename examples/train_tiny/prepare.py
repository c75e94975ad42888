"""Turn permissive texts into what training reads: a tokenizer, token ids, a list of words.

    python -m examples.train_tiny.prepare --wordnet DIR --shakespeare FILE --kjv FILE

`--wordnet` is a folder with WordNet's data.noun, data.verb, data.adj and data.adv, `--kjv` has one
verse a line. Writes into `--out`: tokens.bin (uint16 ids of all texts, one after the other),
tokenizer.json with its tokenizer_config.json, words.txt (keys and values of the retrieval task),
filler.txt (the text that facts are hidden in) and meta.json (where each source starts).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 4096
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>", "<|prompt|>", "<|response|>")
PAD, BOS, EOS, MASK, PROMPT, RESPONSE = range(6)
CHAT_TEMPLATE = (
    f"{{{{ bos_token }}}}{SPECIAL_TOKENS[PROMPT]}{{{{ messages[-1].content }}}}"
    f"{{% if add_generation_prompt %}}{SPECIAL_TOKENS[RESPONSE]}{{% endif %}}"
)

WORDS = 800
FILLER_CHARACTERS = 600_000
_LEAST_USES = 30  # of a word in the texts, for it to be a key or a value
_PLAIN = str.maketrans({"\u2014": "--", "\u2013": "-", "\u2018": "'", "\u2019": "'"})
_TEMPLATE_WORDS = frozenset(
    "the secret word words question what are is one special magic for of and in text".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun, ...")
    parser.add_argument("--shakespeare", type=Path, required=True)
    parser.add_argument("--kjv", type=Path, required=True, help="one verse a line")
    parser.add_argument("--out", type=Path, default=Path("build/train_tiny"))
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="tokens")
    args = parser.parse_args()

    glosses, lemmas = read_wordnet(args.wordnet)
    texts = {
        "wordnet": "\n".join(glosses),
        "shakespeare": _tidy(args.shakespeare),
        "kjv": _tidy(args.kjv),
    }
    tokenizer = train_tokenizer(list(texts.values()), args.vocabulary)
    words = choose_words(tokenizer, texts, lemmas)
    write(args.out, tokenizer, texts, words)


def read_wordnet(folder: Path) -> tuple[list[str], set[str]]:
    """The glosses as lines "word: gloss" in a fixed shuffled order, and all one-word lemmas."""
    glosses: list[str] = []
    lemmas: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence text, at the head of each file
                continue
            synset, _, gloss = line.partition(" | ")
            fields = synset.split(" ")
            names = [
                re.sub(r"\(.*\)$", "", name) for name in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            lemmas.update(name for name in names if name.isalpha() and name.islower())
            glosses.append(f"{', '.join(names).replace('_', ' ')}: {gloss.strip()}")
    random.Random(0).shuffle(glosses)
    return glosses, lemmas


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE with single digits, whose first ids are `SPECIAL_TOKENS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def choose_words(tokenizer: Tokenizer, texts: dict[str, str], lemmas: set[str]) -> list[str]:
    """The most used dictionary words that are one token after a space, most used first."""
    uses = Counter(word for text in texts.values() for word in re.findall(r"[a-z]+", text))
    vocabulary = tokenizer.get_vocab()
    words = [
        word
        for word, count in uses.most_common()
        if count >= _LEAST_USES
        and len(word) >= 4
        and word in lemmas
        and word not in _TEMPLATE_WORDS
        and f"Ġ{word}" in vocabulary
    ]
    return words[:WORDS]


def write(out: Path, tokenizer: Tokenizer, texts: dict[str, str], words: list[str]) -> None:
    """Write all files of the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    starts: dict[str, int] = {}
    ids: list[int] = []
    for name, text in texts.items():
        starts[name] = len(ids)
        for encoding in tokenizer.encode_batch(text.splitlines(keepends=True)):
            ids += encoding.ids
    np.array(ids, dtype=np.uint16).tofile(out / "tokens.bin")
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[BOS],
                "eos_token": SPECIAL_TOKENS[EOS],
                "pad_token": SPECIAL_TOKENS[PAD],
                "mask_token": SPECIAL_TOKENS[MASK],
                "model_max_length": 32768,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )
    (out / "words.txt").write_text("\n".join(words) + "\n")
    filler = texts["kjv"]
    (out / "filler.txt").write_text(filler[: filler.rfind("\n", 0, FILLER_CHARACTERS) + 1])
    meta = {"starts": starts, "tokens": len(ids), "vocabulary": tokenizer.get_vocab_size()}
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    print(json.dumps(meta), f"{len(words)} words")


def _tidy(file: Path) -> str:
    """The text of a file with plain line ends, dashes and quotes, and without blank lines."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    text = text.translate(_PLAIN).replace("\r\n", "\n")
    return re.sub(r"\n{2,}", "\n", text).strip() + "\n"


if __name__ == "__main__":
    main()
