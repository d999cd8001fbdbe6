"""A teacher with another tokenizer: the same text in its tokens, and the places where both have read equally far."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.distillation.losses.answers import Answers

UNHEARD = -1  # a position of the student at which the teacher has read another text


@dataclass(frozen=True)
class AlignedAnswers:
    """Answers of a teacher that read the text in tokens of its own, by the positions of the student.

    Attributes:
        places: `(positions,)` of the student -> position of the teacher, or `UNHEARD`.
    """

    answers: Answers
    places: Tensor

    @property
    def n_classes(self) -> int | None:
        """Of the teacher."""
        return self.answers.n_classes

    def at(self, rows: Tensor) -> Answers:
        """Where the teacher has read another text its first answer stands in; such rows must weigh nothing."""
        return self.answers.at(self.places[rows].clamp_min(0))


class Retokenizer:
    """Reads the student's tokens aloud to a teacher with another vocabulary.

    Both have read equally far where a token of each ends at the same character; there, and only there, their
    predictions are about the same continuation.

    Args:
        student: The student's tokenizer; a fast one, because only those know where tokens lie in a text.
        teacher: The teacher's.
    Raises: SlimError: for a slow tokenizer.
    """

    def __init__(self, student: Any, teacher: Any):
        for side, tokenizer in (("student", student), ("teacher", teacher)):
            if not getattr(tokenizer, "is_fast", False):
                raise SlimError(
                    f"A teacher with another vocabulary needs fast tokenizers, and the {side}'s is "
                    f"{type(tokenizer).__name__}. Pass the student's as the Trainer's `processing_class`, and the "
                    "teacher's as `DistillationCallback(teacher_tokenizer=...)`."
                )
        self.student, self.teacher = student, teacher

    def translate(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """What the teacher reads, and where it has read as far as the student.

        Args:
            inputs: The student's: `input_ids` `(batch, length)` and perhaps `attention_mask`.
        Returns: `input_ids` and `attention_mask` `(batch, teacher_length)`; and for each of the student's
            `batch * length` positions the teacher's, `UNHEARD` where there is none.
        Raises: SlimError: if no position of the batch can be compared.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [self._row(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        length = max(len(tokens) for tokens, _ in rows)
        made = torch.full((len(rows), length), self.teacher.pad_token_id or 0)
        real, places = torch.zeros_like(made), torch.full(ids.shape, UNHEARD)
        for number, (tokens, pairs) in enumerate(rows):
            made[number, : len(tokens)], real[number, : len(tokens)] = torch.tensor(tokens), 1
            positions = mask[number].nonzero().squeeze(1).cpu()
            for ours, theirs in pairs:
                places[number, positions[ours]] = number * length + theirs
        if (places == UNHEARD).all():
            raise SlimError(
                "The student's tokens, read as text and tokenized again, are others, so no position of this batch can "
                "be compared. Is the Trainer's `processing_class` the tokenizer of the data?"
            )
        translated = {"input_ids": made.to(ids.device), "attention_mask": real.to(ids.device)}
        return translated, places.flatten().to(ids.device)

    def _row(self, tokens: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The teacher's tokens of a text, and pairs of positions after which both have read the same."""
        text = self.student.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ours, theirs = (
            tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for tokenizer in (self.student, self.teacher)
        )
        if ours["input_ids"] != tokens:
            return theirs["input_ids"] or [0], []
        # of several tokens that end at one character, as bytes of it do, the last one has read it all
        ends = {end: index for index, (_, end) in enumerate(theirs["offset_mapping"])}
        last = {end: index for index, (_, end) in enumerate(ours["offset_mapping"])}
        return theirs["input_ids"] or [0], [(index, ends[end]) for end, index in last.items() if end in ends]
