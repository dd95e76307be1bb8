"""A small convolutional autoencoder for Fashion-MNIST: 1 x 28 x 28 pixels to latents 4 x 7 x 7, and back.

pyels encode --autoencoder results/fashion-autoencoder/autoencoder.py:build --dataset fashion-mnist --out latents.npz
python results/fashion-autoencoder/autoencoder.py         trains it again, and writes the weights beside this file
"""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Conv2d, ConvTranspose2d, SiLU

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "autoencoder.safetensors"
STEPS, BATCH, RATE = 4000, 64, 2e-3
NOISE, PULL = 0.1, 1e-3  # what latents bear while it learns, so that near ones look alike, and what keeps them small


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            *(Conv2d(1, 32, 4, 2, 1), SiLU(), Conv2d(32, 32, 3, 1, 1), SiLU()),
            *(Conv2d(32, 64, 4, 2, 1), SiLU(), Conv2d(64, 64, 3, 1, 1), SiLU()),
            Conv2d(64, 4, 3, 1, 1),
        )
        self.up = nn.Sequential(
            *(Conv2d(4, 64, 3, 1, 1), SiLU(), Conv2d(64, 64, 3, 1, 1), SiLU()),
            *(ConvTranspose2d(64, 32, 4, 2, 1), SiLU(), Conv2d(32, 32, 3, 1, 1), SiLU()),
            ConvTranspose2d(32, 1, 4, 2, 1),
        )

    def encode(self, x: Tensor) -> Tensor:
        latents: Tensor = self.down(x)
        return latents

    def decode(self, z: Tensor) -> Tensor:
        return torch.tanh(self.up(z))


def build() -> Autoencoder:
    network = Autoencoder()
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return network.eval()


def train() -> None:
    import pyels

    torch.manual_seed(0)
    bank, test = (pyels.datasets.load("fashion-mnist", split=split) for split in ("train", "test"))
    network, started = Autoencoder(), time.process_time()
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
    losses = []
    for step in range(STEPS):
        x = bank.read(torch.randint(len(bank), (BATCH,)))
        z = network.encode(x)
        error = nn.functional.mse_loss(network.decode(z + NOISE * torch.randn_like(z)), x)
        optimizer.zero_grad()
        (error + PULL * z.square().mean()).backward()
        optimizer.step()
        schedule.step()
        losses.append(error.item())
        if step % 100 == 99:
            recent = sum(losses[-100:]) / 100
            print(f"step {step + 1}, error {recent:.5f}, {time.process_time() - started:.0f} s", flush=True)
    save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, WEIGHTS)
    with torch.no_grad():
        network, x = build(), test.read(slice(None))
        z = torch.cat([network.encode(part) for part in x.split(500)])
        y = torch.cat([network.decode(part) for part in z.split(500)])
    record = {
        "steps": STEPS,
        "batch_size": BATCH,
        "cpu_seconds": round(time.process_time() - started),
        "training_error": round(sum(losses[-100:]) / 100, 5),
        "test_error": round(nn.functional.mse_loss(y, x).item(), 5),
        "test_variance": round(x.var().item(), 5),
        "latent_mean": round(z.mean().item(), 4),
        "latent_deviation": round(z.std().item(), 4),
    }
    (FOLDER / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(record)


if __name__ == "__main__":
    train()
