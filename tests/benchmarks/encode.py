"""How many samples does the encoder encode in a second of CPU? Prints a table, by tokenizer and kind of sample.

    python -m tests.benchmarks.encode [FOLDER_WITH_ANOTHER_dpa_ray]

Each measurement is a process of its own; the numbers are medians of ROUNDS. With another checkout, processes of the two
take turns, and what they encode is compared.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROUNDS = 7
WORDS = [
    "a",
    "red",
    "square",
    "stands",
    "to",
    "the",
    "left",
    "of",
    "the",
    "small",
    "blue",
    "circle",
    "and",
    "below",
    "it",
    "there",
    "is",
    "one",
    "green",
    "triangle",
]
KINDS: dict[str, tuple[str, int, int, int]] = {  # template, turns, words of a question and of an answer
    "caption, stage 1": ("text", 1, 0, 10),
    "caption, stage 2": ("plain", 1, 0, 10),
    "caption, chat": ("chat", 1, 5, 10),
    "two turns": ("chat", 2, 10, 25),
    "ten long turns": ("chat", 10, 20, 100),
}
NUM_SAMPLES = {1: 1500, 2: 1000, 10: 150}


def tokenizers() -> dict[str, Any]:
    """The embedded default's, one as large as Llama-3's in control tokens, and SmolLM2's where the ci tests left it."""
    from transformers import AddedToken, AutoTokenizer

    from dpa_ray.model.tiny import make_tokenizer
    from tests.encoders import style
    from tests.real_assets import FOLDER_VARIABLE

    found = {"tiny": make_tokenizer([" ".join(WORDS), " " + " ".join(WORDS)])}
    llama = style("llama-3.1")[0]
    llama.add_tokens([AddedToken(f"<|reserved_special_token_{i}|>", special=True) for i in range(250)])
    found["like llama-3"] = llama
    smollm2 = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "dpa_ray_tests") / "smollm2"
    if smollm2.exists():
        found["smollm2"] = AutoTokenizer.from_pretrained(smollm2)
    for tokenizer in found.values():
        tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return found


def samples(kind: str) -> list[Any]:
    from dpa_ray.data.sample import ImageFile, Sample, Turn

    _, num_turns, asked, answered = KINDS[kind]
    generator = random.Random(0)

    def said(num: int) -> str:
        return " ".join(generator.choices(WORDS, k=num)).capitalize() + "." if num else ""

    made = []
    for i in range(NUM_SAMPLES[num_turns]):
        turns = [Turn(*t) for _ in range(num_turns) for t in (("human", said(asked)), ("gpt", said(answered)))]
        turns[0] = Turn("human", f"<image>\n{turns[0].text}")
        made.append(Sample(str(i), f"set#{i}", turns, [ImageFile("x.png", b"x")], []))
    return made


def _one() -> None:
    """Samples a CPU second, and a digest of all that was encoded."""
    from dpa_ray.data.encode import Encoder

    rates, digest = {}, hashlib.sha256()
    for name, tokenizer in tokenizers().items():
        for kind, (template, *_) in KINDS.items():
            image = tokenizer.convert_tokens_to_ids("<image>")
            encoder = Encoder(tokenizer, template, 2048, 576, image, "26 Jul 2024")
            given = samples(kind)
            for sample in given[:100]:
                encoder(sample)
            gc.collect()  # of what loading the tokenizers left
            start = time.process_time()
            made = [encoder(sample) for sample in given]
            rates[f"{name}/{kind}"] = len(given) / (time.process_time() - start)
            for encoded in made:
                for array in (encoded.input_ids, encoded.target, encoded.turn, encoded.grounded):
                    digest.update(f"{array.dtype}".encode() + array.tobytes())
    print(json.dumps({"rates": rates, "digest": digest.hexdigest()}))


def main(folders: list[str]) -> None:
    found: list[list[dict[str, Any]]] = [[] for _ in folders]
    for _ in range(ROUNDS):
        for folder, results in zip(folders, found, strict=True):
            command = [sys.executable, "-m", "tests.benchmarks.encode", "--one"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.getcwd()]), "PYTHONSAFEPATH": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    digests = {result["digest"] for results in found for result in results}
    print(f"{'tokenizer':<13} {'samples':<17} {'samples/CPU s':>14}" + "  the other's  ratio" * (len(folders) > 1))
    for name in found[0][0]["rates"]:
        rates = [statistics.median(result["rates"][name] for result in results) for results in found]
        more = f" {rates[1]:>12,.0f} {rates[0] / rates[1]:>6.2f}" if len(rates) > 1 else ""
        print(f"{name.split('/')[0]:<13} {name.split('/')[1]:<17} {rates[0]:>14,.0f}" + more)
    print("all encoded the same" if len(digests) == 1 else f"encoded differently: {digests}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--one"]:
        _one()
    else:
        main([os.getcwd(), *sys.argv[1:]])
