"""`trainer.push_to_hub()` with hf_slim's callbacks: the card and the report of the model that the Trainer uploads.

A Trainer writes README.md again in every push, between saving and uploading, and callbacks are not given the Trainer.
A Trainer writes README.md again in every push, after it has saved the model, and callbacks are not given the Trainer.
"""

import datetime
import inspect
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from hf_slim.core.errors import SlimError
from hf_slim.core.record import record_of, unwrapped
from hf_slim.core.report import SCHEMA_VERSION, ratios, write_atomically
from hf_slim.evaluation.footprint import parameter_count, ram_bytes
from hf_slim.hub.card import is_marked, is_untouched, render_card
from hf_slim.hub.folder import CARD, PICTURE, REPORT, describe_saved, read_folder
from hf_slim.hub.metadata import HUB_ID
from hf_slim.hub.source import describe_model_source
from hf_slim.integration.techniques import TECHNIQUES
from hf_slim.quantization.transform import quantized_layers
from hf_slim.version import __version__

logger = logging.getLogger(__name__)
SHOWN_ARGUMENTS = (
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "bf16", "fp16", "seed",
)  # fmt: skip


def keep_card_(callback: object) -> None:
    """Makes the Trainer whose event `callback` handles write hf_slim's card after its own; once for each Trainer."""
    trainer = trainer_behind(callback)
    if trainer is None:
        logger.warning("The Trainer was not found, so it uploads a card of its own. `hf_slim.push` uploads ours.")
        return
    if "create_model_card" in vars(trainer):
        return
    draft = trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        card = Path(trainer.args.output_dir) / CARD
        before = card.read_text("utf-8") if card.is_file() else ""
        draft(*args, **kwargs)
        if trainer.is_world_process_zero():
            _replace_draft(trainer, card, before)

    trainer.create_model_card = create_model_card


def trainer_behind(callback: object) -> Trainer | None:
    """The Trainer whose event `callback` handles now, from the call stack; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(one is callback for one in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back
    return None


def report_of(trainer: Trainer) -> dict[str, Any]:
    """What a Trainer's run can tell without measuring: settings, sizes before and after, and its last evaluation.

    Args:
        trainer: Whose model lies in its output folder.
    Raises: SlimLoadError: if no finished model lies there.
    """
    model, args = unwrapped(trainer.model), trainer.args
    folder = read_folder(args.output_dir, with_report=False)
    source = _source(model)
    sizes = {"parameters": parameter_count(model), "ram_bytes": ram_bytes(model)}
    report = {
        "title": f"{source['name']}: fine-tuned with hf_slim",
        "schema_version": SCHEMA_VERSION,
        "hf_slim_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "sources": {"model": source, "data": []},
        "saved": describe_saved(folder.path),
        "recipe": {"model": source["name"], "training": _arguments(trainer)} | _configs(trainer),
        "base": _measures(record_of(model).base_sizes),
        "result": _measures(sizes),
        "layers": [{"name": n, "scheme": str(s), "reason": ""} for n, s in quantized_layers(model).items()],
        "training_log": trainer.state.log_history,
    }
    report["result"]["memory"]["disk_bytes"] = sum(
        (folder.path / name).stat().st_size for name in folder.files if name not in (CARD, REPORT, PICTURE)
    )
    if (loss := _last_loss(trainer)) is not None:
        report["result"]["quality"] = {"loss": loss}
    return report | {"ratios": ratios(report)}


def _replace_draft(trainer: Trainer, card: Path, before: str) -> None:
    """Puts hf_slim's card where the Trainer has just written its own; one that somebody has edited comes back."""
    if is_marked(before) and not is_untouched(before):
        write_atomically(card, lambda path: path.write_text(before, "utf-8"))
        return
    extra = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    folder = card.parent
    try:
        report = _measured(folder) or report_of(trainer)
    except SlimError as error:
        logger.warning("The card is the Trainer's own, because it saved no finished model: %s", error)
        return
    write_atomically(folder / REPORT, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    plain = json.loads(json.dumps(report))
    text = render_card(plain, trainer.hub_model_id or folder.name, (folder / PICTURE).is_file(), extra=extra)
    write_atomically(card, lambda path: path.write_text(text, "utf-8"))


def _measured(folder: Path) -> dict[str, Any] | None:
    """The folder's report, if it was measured on the weights that lie there now; it may be of an older run."""
    if not (folder / REPORT).is_file():
        return None
    try:
        report = read_folder(folder).report
    except SlimError:
        return None
    speaks = report is not None and "inference" in report["result"] and report.get("saved", {}).get("weights")
    return report if speaks else None


def _source(model: Any) -> dict[str, Any]:
    """Where the model came from, as its config says."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", None) or "")
    if Path(name).is_dir() or HUB_ID.fullmatch(name):
        return describe_model_source(name)
    return {"name": name or type(model).__name__}


def _arguments(trainer: Trainer) -> dict[str, Any]:
    values = trainer.args.to_dict()
    found = {name: values[name] for name in SHOWN_ARGUMENTS if name in values}
    if found.get("max_steps", -1) <= 0:
        found.pop("max_steps", None)
    return found


def _configs(trainer: Trainer) -> dict[str, Any]:
    callbacks = trainer.callback_handler.callbacks
    return {row.name: one.config.to_dict() for row in TECHNIQUES for one in callbacks if type(one) is row.callback}


def _measures(sizes: dict[str, int]) -> dict[str, Any]:
    """Sizes as a report has them."""
    compute = {"parameters": sizes["parameters"]} if "parameters" in sizes else {}
    memory = {"ram_bytes": sizes["ram_bytes"]} if "ram_bytes" in sizes else {}
    return {"compute": compute, "memory": memory}


def _last_loss(trainer: Trainer) -> float | None:
    """Loss on the evaluation set after the last step; None if it is of an earlier step or another checkpoint."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_global_step not in (None, state.global_step):
        return None
    losses = [entry["eval_loss"] for entry in state.log_history
              if "eval_loss" in entry and entry.get("step") == state.global_step]  # fmt: skip
    return losses[-1] if losses else None
