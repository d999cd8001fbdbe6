"""Which criterion to trust for which structure: one shot, no training and no repair, groups ranked across all layers.

SmolLM2-135M loses a quarter of its feed-forward neurons, or an eighth of its key-value heads, of its layers, or of
their attention or feed-forward parts: held-out perplexity as a multiple of the dense one. MiniLM-L6, fine-tuned on
SST-2 by `pruning_encoder.py`, loses a quarter of its neurons or heads: accuracy.

    python recipes/benchmarks/pruning_criteria.py                     # 15 minutes on one core
    python recipes/benchmarks/pruning_criteria.py --models SmolLM2 --criteria l1 l2 random

All criteria see the same calibration batches, in one pass. Finished rows are kept, so that an interrupted run goes on.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from harness.command import Run, parser_of, run_script
from harness.inputs import Inputs
from harness.results import Results, Values
from harness.sst2 import accuracy, batches, default_data, load_classifier, sst2
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_slim import PruningConfig
from hf_slim.core.errors import SlimError
from hf_slim.data import load_texts, text_blocks
from hf_slim.evaluation.quality import perplexity
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.pruning.budget.plan import Plan
from hf_slim.pruning.budget.selection import choose_removed
from hf_slim.pruning.importance.criteria import CRITERIA
from hf_slim.pruning.importance.scores import Seen, observed, score_groups
from hf_slim.pruning.removal.mask import zero_groups_
from hf_slim.pruning.transform import plan_pruning

CALIBRATION_BLOCKS, HELD_OUT_BLOCKS = 16, 4
CALIBRATION_SENTENCES = 1024
SHARES = {
    "SmolLM2": {"ffn": 0.25, "kv_heads": 0.125, "layers": 0.125, "attention_blocks": 0.125, "ffn_blocks": 0.125},
    "MiniLM": {"ffn": 0.25, "kv_heads": 0.25},
}


@dataclass
class Subject:
    """A model, what it is scored on, and how it is judged.

    Attributes:
        batches: Calibration batches, with labels.
        judge: Model -> the measure.
        plans: Kind -> what may be removed.
        scores: Kind -> criterion -> group set -> importance, where the criterion applies to the kind.
    """

    model: PreTrainedModel
    batches: list[dict[str, Tensor]]
    judge: Callable[[PreTrainedModel], Values]
    plans: dict[str, Plan] = field(default_factory=dict)
    scores: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)


def smollm2(inputs: Inputs) -> Subject:
    """SmolLM2 on Python's own sources, judged by perplexity."""
    data, tokenizer = inputs.texts, load_tokenizer(inputs.causal)
    train, held_out = load_texts(data)
    blocks = text_blocks(train, tokenizer, data, CALIBRATION_BLOCKS, 42, "reading training text")
    judged = text_blocks(held_out, tokenizer, data, HELD_OUT_BLOCKS, 0, "reading held-out text")
    ids = [torch.tensor([row["input_ids"]]) for row in blocks]
    calibration = [{"input_ids": row, "labels": row, "use_cache": False} for row in ids]
    model = load_model(inputs.causal)
    return Subject(model, calibration, lambda model: {"perplexity": perplexity(model, judged)})


def minilm(folder: Path, data: str) -> Subject:
    """The fine-tuned MiniLM, judged by accuracy on all validation sentences."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: run `pruning_encoder.py` first, or give --dense or --models.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = sst2(data, tokenizer)
    n_sentences = min(CALIBRATION_SENTENCES, len(train))
    calibration = list(batches(train.shuffle(seed=0).select(range(n_sentences)), tokenizer))
    model = load_classifier(folder)
    return Subject(model, calibration, lambda model: {"accuracy": accuracy(model, held_out, tokenizer)})


def score_(subject: Subject, shares: dict[str, float], criteria: list[str]) -> None:
    """Fills `subject.scores` in one pass over the batches."""
    model, seen = subject.model, {}
    with ExitStack() as watching:
        for kind, share in shares.items():
            plan, subject.scores[kind] = subject.plans[kind], {}
            for name in criteria:
                try:
                    found = watching.enter_context(
                        observed(model, plan.group_sets, config_of(kind, share, name).criterion_by_kind)
                    )
                except SlimError:  # the criterion does not fit the kind
                    continue
                seen[kind, name] = found[name]
        for batch in subject.batches:
            model(**batch).loss.backward()
            _add_scores(subject, {each: found for each, found in seen.items() if CRITERIA[each[1]].needs_gradient})
            model.zero_grad()
    _add_scores(subject, {each: found for each, found in seen.items() if not CRITERIA[each[1]].needs_gradient})


def _add_scores(subject: Subject, seen: dict[tuple[str, str], Seen]) -> None:
    """Adds the scores of now; `seen` is what was observed, by kind and criterion."""
    for (kind, name), found in seen.items():
        total = subject.scores[kind].setdefault(name, {})
        for path, score in score_groups(subject.model, subject.plans[kind].group_sets, name, found).items():
            total[path] = total.get(path, 0) + score


def config_of(kind: str, share: float, criterion: str | None = None) -> PruningConfig:
    """That share of the groups of a kind, the least important ones wherever they are."""
    return PruningConfig(sparsity={kind: share}, uniform=False, criterion=criterion)


def pruned_measure(subject: Subject, kind: str, criterion: str, share: float) -> Values:
    """The judgement on the model without the least important groups; the model itself stays as it was."""
    plan, scores = subject.plans[kind], subject.scores[kind][criterion]
    removed = choose_removed(plan, scores, {}, config_of(kind, share), progress=1.0)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    zero_groups_(subject.model, plan.group_sets, removed)
    found = subject.judge(subject.model)
    subject.model.load_state_dict(before)
    return found


def fill(results: Results, name: str, make: Callable[[], Subject], criteria: list[str]) -> None:
    """The rows "SmolLM2 dense", "SmolLM2 ffn taylor", ..., of one model; no values where a criterion does not fit."""
    wanted = [f"{name} {kind} {criterion}" for kind in SHARES[name] for criterion in criteria]
    if not results.misses([f"{name} dense", *wanted]):
        return
    subject = make()
    subject.plans = {kind: plan_pruning(subject.model, config_of(kind, share)) for kind, share in SHARES[name].items()}
    # without its cache: that one would hold the weights of the model that was judged before
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        results(f"{name} dense", lambda: subject.judge(subject.model))
        score_(subject, SHARES[name], criteria)
        for kind, share in SHARES[name].items():
            for criterion in criteria:
                fits = criterion in subject.scores[kind]
                measure = partial(pruned_measure, subject, kind, criterion, share) if fits else dict
                results(f"{name} {kind} {criterion}", measure)


def main(run: Run) -> None:
    """Measures what the command line selects."""
    options = run.options
    torch.set_num_threads(1)
    dense = run.inputs.encoder if options.smoke else options.dense or run.scratch / "pruning_encoder" / "dense"
    settings = {"models": ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2 on SST-2"], "shares": SHARES}
    settings |= {"calibration_blocks": CALIBRATION_BLOCKS, "calibration_sentences": CALIBRATION_SENTENCES}
    results = run.results("pruning_criteria", settings | {"held_out_blocks": HELD_OUT_BLOCKS}, [42])
    makers = {"SmolLM2": lambda: smollm2(run.inputs), "MiniLM": lambda: minilm(Path(dense), default_data())}
    for name in options.models:
        fill(results, name, makers[name], options.criteria)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--dense", type=Path, help="MiniLM as `pruning_encoder.py` fine-tuned it")
    run_script(parser, main)
