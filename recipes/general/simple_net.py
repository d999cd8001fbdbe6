"""A small convolutional network, trained and quantized: every nn.Module can be made small, not only Transformers'.

Scikit-learn's digits, scaled to 3 x 30 x 30 pixels in [-1, 1]. Weights on the affine grid y = floor(x * Q + B) with
Q = 127.5 and B = 127 for the whole tensor, trained through the rounding, then packed, saved and loaded back.

    python recipes/general/simple_net.py            # half a minute; needs scikit-learn
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from hf_slim import Grid, QuantizationCallback, QuantizationConfig, Scheme, SlimError, convert, prepare

GRID = Grid(granularity="tensor", symmetric=False, signed=False, rounding="floor", scale=1 / 127.5, zero_point=127)
CONFIG = QuantizationConfig(scheme=Scheme(GRID))


class SimpleNet(nn.Module):
    """conv 3 -> 64, conv 64 -> 128, fc 128 * 6 * 6 -> 1024 -> 10."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3)
        self.conv2 = nn.Conv2d(64, 128, 3)
        self.fc1 = nn.Linear(128 * 6 * 6, 1024)
        self.fc2 = nn.Linear(1024, 10)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = F.max_pool2d(F.relu(self.conv1(pixels)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        logits = self.fc2(F.relu(self.fc1(hidden.flatten(1))))
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out images `(3, 30, 30)` with their labels; one image in five is held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SlimError("This recipe needs scikit-learn for its data: `pip install scikit-learn`.") from error
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    pixels = F.interpolate(pixels, size=(30, 30), mode="bilinear").expand(-1, 3, -1, -1)
    labels, held_out = torch.tensor(found.target), torch.arange(len(pixels)) % 5 == 0
    return TensorDataset(pixels[~held_out], labels[~held_out]), TensorDataset(pixels[held_out], labels[held_out])


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as the network takes it."""
    pixels, labels = zip(*examples, strict=True)
    return {"pixels": torch.stack(pixels), "labels": torch.stack(labels)}


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of images whose digit is recognised."""
    pixels, labels = data.tensors
    return (model.eval()(pixels)["logits"].argmax(-1) == labels).float().mean().item()


def train(model: nn.Module, data: TensorDataset, epochs: float, callbacks: list | None = None) -> nn.Module:
    """An ordinary Trainer run."""
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            scratch, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-3, save_strategy="no",
            logging_strategy="no", seed=0, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=callbacks).train()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=3, help="of each of the two runs (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/simple_net"), help="folder for the packed weights")
    options = parser.parse_args()
    torch.manual_seed(0)
    data, held_out = digits()
    model = train(SimpleNet(), data, options.epochs)
    before = accuracy(model, held_out)

    rounded = SimpleNet()
    rounded.load_state_dict(model.state_dict())
    untrained = accuracy(prepare(rounded, CONFIG), held_out)

    model = train(model, data, options.epochs, [QuantizationCallback(CONFIG)])  # packs when training ends
    after = accuracy(model, held_out)
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.output / "model.safetensors")

    loaded = convert(prepare(SimpleNet(), CONFIG))  # the same layers, to be filled from the file
    loaded.load_state_dict(load_file(options.output / "model.safetensors"))
    pixels = held_out.tensors[0]
    same = torch.equal(loaded.eval()(pixels)["logits"], model(pixels)["logits"])
    n_bytes = sum(parameter.numel() * 4 for parameter in SimpleNet().parameters())
    print(f"\naccuracy before        {before:.1%}   {n_bytes / 1e6:.1f} MB in float32")
    print(f"rounded, not trained   {untrained:.1%}")
    print(f"trained on the grid    {after:.1%}   {(options.output / 'model.safetensors').stat().st_size / 1e6:.1f} MB")
    print(
        f"loaded back            {accuracy(loaded, held_out):.1%}   {'bit for bit the same' if same else 'DIFFERENT'}"
    )


if __name__ == "__main__":
    main()
