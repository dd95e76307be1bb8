"""Autoencoders: what they make is scaled alike, and decoded to what was given; others are refused in words."""

import sys

import pytest
import torch
from helpers import make_bank, save_toy_autoencoder

import pyels
from pyels.networks.latent import decoder_of, load_autoencoder, measure, write_latents


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def toy(tmp_path):
    return load_autoencoder(save_toy_autoencoder(tmp_path))


@pytest.mark.parametrize("half", [False, True])
def test_there_and_back(tmp_path, toy, half):
    bank = make_bank(40, (3, 8, 6), labels=list(range(40)))
    bank.class_names = ["a", "b"]
    trial = measure(bank, toy)
    assert trial.error < 1e-10
    write_latents(tmp_path / "latents.npz", bank, toy, trial.latents, half)
    made = pyels.PatchBank.load(tmp_path / "latents.npz")
    assert (made.shape, made.class_names, made.latents) == ((12, 4, 3), ["a", "b"], trial.latents)
    assert torch.equal(made.labels, bank.labels)
    assert made.images.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert abs(float(made.images.square().mean()) - 0.25) < 1e-3
    pictures = decoder_of(made)(made.images)
    torch.testing.assert_close(pictures, bank.read(slice(None)), atol=2e-3 if half else 1e-5, rtol=0)
    assert decoder_of(bank)(bank.images) is bank.images


def test_scales(tmp_path, toy):
    bank, other = make_bank(20, (1, 8, 8)), make_bank(20, (1, 8, 8), seed=1)
    as_is = measure(bank, toy, as_is=True).latents
    assert (as_is.shift, as_is.scale) == ((0.0,) * 4, 1.0)
    first, second = measure(bank, toy).latents, measure(other, toy).latents
    assert not first.is_space_of(second)
    assert measure(other, toy, like=first).latents.is_space_of(first)
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + "# changed\n")
    changed = load_autoencoder(toy.source)
    with pytest.raises(ValueError, match=rf"{changed.crc32}\) is another autoencoder than .*{toy.crc32}.* has changed"):
        measure(other, changed, like=first)
    latents = pyels.PatchBank(toy.encode(bank.read(slice(None))), latents=as_is)
    with pytest.raises(ValueError, match="is another autoencoder than that of the latents"):
        decoder_of(latents, toy.source)
    with pytest.raises(ValueError, match="these are latents already"):
        measure(latents, toy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(): return 3", "mine.py:build gave int; it must be or return an object with encode"),
        ("import torch\nbuild = torch.nn.ReLU()", "gave the torch module ReLU"),
        ("class build:\n def encode(self, x): return x[:, 0]\n def decode(self, z): return z", r"encode gave shape"),
        ("class build:\n def encode(self, x): return x / 0\n def decode(self, z): return z", r"encode gave NaN"),
        ("class build:\n def encode(self, x): return x\n def decode(self, z): return z[..., 1:]", "another size"),
        (
            "class build:\n def encode(self, x): 1 / 0\n def decode(self, z): return z",
            "cannot encode images of 1x8x8: Zero",
        ),
        (
            "import torch\nclass build(torch.nn.BatchNorm2d):\n def __init__(self): super().__init__(1, "
            "track_running_stats=False)\n def encode(self, x): return self(x)\n def decode(self, z): return z",
            "the autoencoder has build in training mode, or without running statistics",
        ),
    ],
)
def test_what_is_none(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        measure(make_bank(4, (1, 8, 8)), load_autoencoder(f"{tmp_path / 'mine.py'}:build"))


def test_where_there_is_none(tmp_path, toy):
    with pytest.raises(FileNotFoundError, match=r"no such folder; one of your own is given as FILE\.py:NAME"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_autoencoder(tmp_path)
    for given in ("toy.py", "toy.py:"):
        with pytest.raises(ValueError, match=r"say which name in it is the autoencoder, as .*toy\.py:NAME"):
            load_autoencoder(f"{tmp_path}/{given}")
    with pytest.raises(ValueError, match=r"\.pt files are pickles, .* of the object with encode and decode made of it"):
        load_autoencoder(tmp_path / "a.pt")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="needed is one of AutoencoderKL, AutoencoderTiny of diffusers, got VQModel"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="--autoencoder is for banks of latents"):
        decoder_of(make_bank(4, (1, 8, 8)), toy.source)


def save_of_diffusers(folder, kind, **options):
    import diffusers

    torch.manual_seed(0)
    if kind == "AutoencoderTiny":
        small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    else:
        small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
        blocks = {
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        }
    model = getattr(diffusers, kind)(in_channels=3, out_channels=3, latent_channels=4, **small, **blocks, **options)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.needs(package="diffusers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_autoencoders_of_diffusers(tmp_path, kind):
    shift = {"shift_factor": 0.1} if kind == "AutoencoderKL" else {}
    model = save_of_diffusers(tmp_path / "pipeline" / "vae", kind, scaling_factor=0.5, **shift)
    autoencoder = load_autoencoder(tmp_path / "pipeline")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        out = model.encode(x)
        z = out.latents if kind == "AutoencoderTiny" else out.latent_dist.mean
        scaled = (z - shift.get("shift_factor", 0.0)) * 0.5
        torch.testing.assert_close(autoencoder.encode(x), scaled)
        torch.testing.assert_close(autoencoder.decode(scaled), model.decode(z).sample, atol=1e-5, rtol=1e-4)
    assert torch.equal(autoencoder.encode(x), autoencoder.encode(x))  # the posterior's mean, not a draw
    (tmp_path / "pipeline").rename(tmp_path / "moved")
    moved = load_autoencoder(tmp_path / "moved" / "vae")
    assert moved.crc32 == autoencoder.crc32
    assert moved.source == str(tmp_path / "moved" / "vae")
    (tmp_path / "mine.py").write_text(
        f"import diffusers\ndef build(): return diffusers.{kind}.from_pretrained({str(tmp_path / 'moved' / 'vae')!r})\n"
    )
    torch.testing.assert_close(load_autoencoder(f"{tmp_path / 'mine.py'}:build").encode(x), scaled)
    with pytest.raises(ValueError, match="cannot encode images of 1x8x8"):
        measure(make_bank(4, (1, 8, 8)), moved)
