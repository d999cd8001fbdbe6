from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_slim import PruningConfig, QuantizationConfig, prepare, prune
from hf_slim.core.running.distributed import is_distributed, made_by_first_rank, range_over_ranks_, sum_over_ranks_
from hf_slim.quantization.calibration import round_by_gptq_
from hf_slim.quantization.layers.scale_holders import InputQuantizer
from tests import tiny
from tests.distillation.processes import in_processes, place


def join(folder: str) -> tuple[int, int]:
    processes, rank = place()
    if processes > 1:
        dist.init_process_group("gloo")
    return processes, rank


def save(found: dict, folder: str, rank: int) -> None:
    torch.save(found, Path(folder) / ("found.pt" if rank == 0 else f"found-{rank}.pt"))


def test_one_process_decides_alone():
    assert not is_distributed()
    sums, ends = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 4.0])
    sum_over_ranks_([sums])
    range_over_ranks_(ends)
    assert sums.tolist() == [1.0, 2.0]
    assert ends.tolist() == [-3.0, 4.0]
    assert made_by_first_rank(lambda: "made") == "made"


def exchange(folder: str) -> None:
    _, rank = join(folder)
    sums, ends = torch.tensor([1.0 + rank, 2.0]), torch.tensor([-3.0 - rank, 4.0 - rank])
    sum_over_ranks_([sums])
    range_over_ranks_(ends)
    made = made_by_first_rank(lambda: {"by": rank})
    save({"is_distributed": is_distributed(), "sums": sums, "ends": ends, "made": made}, folder, rank)


@pytest.mark.slow
def test_processes_tell_each_other_sums_ranges_and_objects(tmp_path):
    first = in_processes(exchange, tmp_path / "two", 2)
    second = torch.load(tmp_path / "two" / "found-1.pt")
    for found in (first, second):
        assert found["is_distributed"]
        assert found["sums"].tolist() == [3.0, 4.0]
        assert found["ends"].tolist() == [-4.0, 4.0]
        assert found["made"] == {"by": 0}


def pruned(batches: list[dict], criterion: str) -> dict[str, torch.Tensor]:
    config = PruningConfig({"ffn": 0.25, "kv_heads": 0.34}, criterion=criterion, calibration_batches=4, repair=True)
    return prune(tiny.llama(), config, batches).state_dict()


def rounded(batches: list[dict]) -> dict[str, torch.Tensor]:
    model = prepare(tiny.llama(), QuantizationConfig("w4a16-g16"))
    round_by_gptq_(model, lambda: (model(**batch) for batch in batches), "minmax")
    return model.state_dict()


def static_scales(batches: list[dict]) -> dict[str, torch.Tensor]:
    config = QuantizationConfig("w8a8-static", calibration_batches=len(batches))
    model = prepare(tiny.llama(), config).train()
    for batch in batches:
        model(**batch)
    return {name: part.state().scale for name, part in model.named_modules() if isinstance(part, InputQuantizer)}


def calibrate(folder: str) -> None:
    """Everything that runs batches before training, each process with batches of its own."""
    processes, rank = join(folder)
    mine = [tiny.tokens(seed=seed) for seed in range(rank, 4, processes)]
    batches = [{"input_ids": ids, "labels": ids} for ids in mine]
    found = {
        "graded": pruned(batches, "taylor"), "observed": pruned(batches, "wanda"), "gptq": rounded(batches),
        "static": static_scales(batches),
    }  # fmt: skip
    save({f"{kind} {name}": tensor for kind in found for name, tensor in found[kind].items()}, folder, rank)


@pytest.mark.slow
def test_two_processes_calibrate_as_one(tmp_path):
    one = in_processes(calibrate, tmp_path / "one", 1)
    two = in_processes(calibrate, tmp_path / "two", 2)
    other = torch.load(tmp_path / "two" / "found-1.pt")
    assert one.keys() == two.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(two[name], other[name], rtol=0, atol=0, msg=name)
        # behind the first layer, ranges depend on how well the layers before were calibrated at each batch
        if not name.startswith("static") or "layers.0.self_attn.q_proj" in name:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
