"""The evaluation task: every worker loads the finished model as any user would, answers its share and reads its share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpa_ray.batch import IMAGE_TOKEN
from dpa_ray.data.encode import Encoder
from dpa_ray.data.images import decode
from dpa_ray.data.ingest import Loader
from dpa_ray.data.pixels import pixels
from dpa_ray.engine.held_out import HeldOut
from dpa_ray.engine.protocol import barrier, rank, world_size
from dpa_ray.eval.exact_match import Answering, ExactMatch, Question, matches, score, with_shuffled_images
from dpa_ray.eval.held_out import HeldOutNll
from dpa_ray.model import vlm
from dpa_ray.model.cmo import Weighting
from dpa_ray.model.export import load_exported
from dpa_ray.model.step import StepModule
from dpa_ray.stages import build
from dpa_ray.stages.spec import EvalTask
from dpa_ray.store.fs import Store

UNIFORM = Weighting("uniform", 1.0, 1.0, 1)
RESULT = "eval.json"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """Scores by held-out set, and every answer."""

    scores: dict[str, ExactMatch]
    nlls: dict[str, HeldOutNll]
    answers: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        scores = {name: asdict(score) | asdict(self.nlls[name]) for name, score in self.scores.items()}
        (folder / RESULT).write_text(json.dumps(scores, indent=1))
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in self.answers)
        (folder / ANSWERS).write_text("".join(lines), encoding="utf-8")


def evaluate(task: EvalTask, store: Store, device: torch.device) -> EvalResult | None:
    """Answer and read all held-out sets with the artifact `task.model`; the result on rank 0, None elsewhere."""
    section = task.recipe.eval
    model, processor = load_exported(task.model.fetched(store))
    model = model.to(device)
    encoder = Encoder(
        tokenizer=processor.tokenizer, template="chat", max_length=task.recipe.stages.instruct.max_length,
        num_image_tokens=model.config.image_seq_length, image_token_id=model.config.image_token_id, template_date=None,
    )  # fmt: skip
    row = build.vocabulary(task.base.weights.located(store), task.recipe).row
    softcap = vlm.softcap_of(model.config.text_config)
    module = StepModule(model, UNIFORM, softcap=softcap, num_softmax_rows=row.num_softmax_rows)
    scores: dict[str, ExactMatch] = {}
    nlls: dict[str, HeldOutNll] = {}
    answers: list[dict[str, Any]] = []
    for name, prepared in task.sets.items():
        loader = Loader(
            store=store, prepared=prepared, encoder=encoder, image_processor=processor.image_processor, pad_token_id=0,
            retry_s=task.recipe.data.retry_s, can_skip=False,
        )  # fmt: skip
        questions = collect(loader, encoder, min(prepared.num_rows, section.max_samples))[: section.max_samples]
        answer = Answering(
            model=model, tokenizer=processor.tokenizer, pixels=lambda data: pixels(decode(data), processor.image_processor),
            batch_size=section.batch_size, max_new_tokens=section.max_new_tokens, device=device,
        )  # fmt: skip
        seen = _shared(answer, questions)
        shuffled = _shared(answer, with_shuffled_images(questions))
        read = HeldOut(module, loader, section.max_samples, section.batch_size, device, keep=False)
        nlls[name] = read.nll()
        if rank() == 0:
            scores[name] = score(questions, seen, shuffled)
            answers += [
                {"set": name, "sample": q.sample, "question": q.text, "expected": q.answer, "answer": a, "shuffled": s,
                 "right": matches(a, q.answer)}
                for q, a, s in zip(questions, seen, shuffled, strict=True)
            ]  # fmt: skip
    return EvalResult(scores, nlls, answers) if rank() == 0 else None


def collect(loader: Loader, encoder: Encoder, num_samples: int) -> list[Question]:
    """Every assistant turn of the first `num_samples` samples as a question."""
    questions = []
    for row, sample in enumerate(loader.samples(np.arange(num_samples))):
        asked, number = "", 0
        for turn in sample.turns:
            if turn.role == "human":
                asked = turn.text.replace(IMAGE_TOKEN, "").strip()
            elif turn.role == "gpt":
                ids, images = encoder.prompt(sample, number)
                questions.append(Question(row, asked, turn.text, ids, tuple(image.data for image in images)))
                number += 1
    return questions


def _shared(answer: Answering, questions: list[Question]) -> list[str]:
    """Answers to all questions, each worker giving every world-size-th; complete on every rank."""
    mine = answer(questions[rank() :: world_size()])
    if world_size() == 1:
        return mine
    parts: list[Any] = [None] * world_size()
    barrier()  # answers may take one worker longer than a collective may
    torch.distributed.all_gather_object(parts, mine)
    whole = [""] * len(questions)
    for r, part in enumerate(parts):
        whole[r :: world_size()] = part
    return whole
