"""Re-tokenizing text for a teacher with another tokenizer, and aligning the positions of both token sequences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.distillation.losses.predictions import Predictions

NOT_ALIGNED = -1  # a position of the student whose token ends where no token of the teacher ends


@dataclass(frozen=True)
class AlignedPredictions:
    """Predictions of a teacher with its own tokens, indexed by the positions of the student.

    Attributes:
        predictions: By the positions of the teacher.
        positions: `(student_positions,)`, for each the position of the teacher, or `NOT_ALIGNED`.
    """

    predictions: Predictions
    positions: Tensor

    @property
    def n_classes(self) -> int | None:
        """Size of the teacher's vocabulary."""
        return self.predictions.n_classes

    def at(self, rows: Tensor) -> Predictions:
        """Predictions at some positions of the student.

        Positions that are not aligned get those of the teacher's first position, so their rows must have weight 0.
        """
        return self.predictions.at(self.positions[rows].clamp_min(0))


class Retokenizer:
    """Re-tokenizes the student's text for a teacher with another vocabulary.

    A position of the student is aligned with a position of the teacher if their tokens end at the same character. Only
    there do both predict the continuation of the same text.

    Args:
        student: The student's tokenizer. It must be a fast one, which knows the offsets of tokens in the text.
        teacher: The teacher's tokenizer, also a fast one.
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

    def retokenize(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Re-tokenize a batch for the teacher and align the positions.

        Args:
            inputs: Of the student: `input_ids` `(batch, length)` and optionally `attention_mask`.
        Returns: `input_ids` and `attention_mask` `(batch, teacher_length)`; and `(batch * length,)`, for each position
            of the student that of the teacher in `[0, batch * teacher_length)`, or `NOT_ALIGNED`.
        Raises: SlimError: if no position of the batch is aligned.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [self._row(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        length = max(len(tokens) for tokens, _ in rows)
        made = torch.full((len(rows), length), self.teacher.pad_token_id or 0)
        real, positions = torch.zeros_like(made), torch.full(ids.shape, NOT_ALIGNED)
        for number, (tokens, pairs) in enumerate(rows):
            made[number, : len(tokens)], real[number, : len(tokens)] = torch.tensor(tokens), 1
            unpadded = mask[number].nonzero().squeeze(1).cpu()
            for ours, theirs in pairs:
                positions[number, unpadded[ours]] = number * length + theirs
        if (positions == NOT_ALIGNED).all():
            raise SlimError(
                "Decoding the student's tokens and tokenizing the text again gives other tokens, so no position of "
                "this batch can be compared. Pass the tokenizer of the data as the Trainer's `processing_class`."
            )
        retokenized = {"input_ids": made.to(ids.device), "attention_mask": real.to(ids.device)}
        return retokenized, positions.flatten().to(ids.device)

    def _row(self, tokens: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of one text for the teacher, and pairs of aligned positions (student, teacher)."""
        text = self.student.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ours, theirs = (
            tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            for tokenizer in (self.student, self.teacher)
        )
        if ours["input_ids"] != tokens:
            return theirs["input_ids"] or [0], []
        # several tokens, such as the bytes of one character, can end at the same character: the last one is aligned
        ends = {end: index for index, (_, end) in enumerate(theirs["offset_mapping"])}
        last = {end: index for index, (_, end) in enumerate(ours["offset_mapping"])}
        return theirs["input_ids"] or [0], [(index, ends[end]) for end, index in last.items() if end in ends]
