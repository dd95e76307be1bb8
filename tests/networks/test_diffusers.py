"""What diffusers saved and runs is the same estimate, from whatever folder it is in, or is refused in words."""

import json

import pytest
import torch
from helpers import save_random_diffusers_pipeline

from pyels.adapters import from_diffusers, load

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
# What other packages warn of at import is theirs.
pytestmark = [pytest.mark.needs(package="diffusers"), pytest.mark.filterwarnings("ignore")]


def unet_of(**options):
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return diffusers.UNet2DModel(**{**small, **blocks, "layers_per_block": 1, **options}).eval()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_diffusers_pipeline(tmp_path, prediction):
    unet, scheduler = save_random_diffusers_pipeline(
        tmp_path / "model", size=16, num_class_embeds=4, prediction_type=prediction
    )
    denoiser, _ = load(tmp_path / "model")
    assert denoiser.num_classes == 4

    # At a timestep of its own, the estimate is diffusers' own.
    x, labels, timestep = torch.randn(2, 1, 16, 16), torch.tensor([0, 3]), 420
    alpha_bar = float(scheduler.alphas_cumprod[timestep].double())
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    with torch.no_grad():
        out = unet(x, timestep, class_labels=labels).sample
        expected = scheduler.step(out, timestep, x, generator=torch.Generator().manual_seed(0))
        clipped = denoiser.denoise(x, alpha, sigma, labels).clamp(-1, 1)  # as the scheduler does
    torch.testing.assert_close(clipped, expected.pred_original_sample, atol=2e-4, rtol=0)

    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="needed is a pipeline of a UNet2DModel"):
        load(tmp_path / "model")


DDPM = {
    "learned variance": ({"out_channels": 2}, {"variance_type": "learned_range"}),
    "zero terminal SNR": ({}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    "classes as sinusoids": ({"class_embed_type": "timestep"}, {}),
    "learned times": ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, {}),
    "Fourier times": ({"time_embedding_type": "fourier"}, {}),
    "half": ({"half": torch.bfloat16}, {}),
    "wide clipping": ({}, {"clip_sample_range": 2.0}),
    "no clipping": ({}, {"clip_sample": False}),
    "squared cosine": ({}, {"beta_schedule": "squaredcos_cap_v2"}),
}


@pytest.mark.parametrize("kind", DDPM)
def test_what_diffusers_runs_is_the_same_estimate(kind):
    import diffusers

    network, scheduler = DDPM[kind]
    network = dict(network)
    half = network.pop("half", None)
    unet, scheduler = unet_of(**network), diffusers.DDPMScheduler(**scheduler)
    labels = torch.tensor([0, 1]) if network.get("class_embed_type") else None
    for timestep in (1, 250, 420, 998):
        with torch.no_grad():
            out = unet(X, timestep, class_labels=labels).sample
        step = scheduler.step(out, timestep, X, generator=torch.Generator().manual_seed(0))
        a = float(scheduler.alphas_cumprod[timestep].double())
        found = from_diffusers(unet.to(half) if half else unet, scheduler).denoise(X, a**0.5, (1 - a) ** 0.5, labels)
        bound = 0.3 if half else 2e-3  # of weights that were rounded
        torch.testing.assert_close(found, step.pred_original_sample, atol=bound, rtol=0)
        unet = unet.float()


@pytest.mark.parametrize("inverted", [False, True])
def test_flow_matching_of_diffusers(inverted):
    import diffusers

    unet, scheduler = unet_of(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=inverted)
    sigma = 0.6
    told = 1 - sigma if inverted else sigma
    with torch.no_grad():
        out = unet(X, torch.tensor([1000 * told] * 2)).sample
    x0 = X - sigma * (-out if inverted else out)  # dx / dsigma = noise - image
    found = from_diffusers(unet, scheduler).denoise(X, 1 - sigma, sigma)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)


def test_scores_of_diffusers():
    import diffusers

    unet, sigma = unet_of(), 0.6
    z = (X + 1) / 2  # its pixels lie in [0, 1]
    with torch.no_grad():
        score = unet(z, torch.tensor([sigma / 2] * 2)).sample
    found = from_diffusers(unet, diffusers.ScoreSdeVeScheduler()).denoise(X, 1.0, sigma)
    torch.testing.assert_close(found, 2 * (z + (sigma / 2) ** 2 * score) - 1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_of_diffusers(prediction):
    import diffusers

    unet, sigma = unet_of(), 0.7
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction)
    x = X * 1.3
    with torch.no_grad():
        out = unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(torch.tensor([sigma] * 2)))
    expected = scheduler.precondition_outputs(x, out.sample, sigma)
    torch.testing.assert_close(from_diffusers(unet, scheduler).denoise(x, 1.0, sigma), expected, atol=1e-4, rtol=0)


def test_schedulers_that_cannot_be_kept_to_are_refused_in_words():
    import diffusers

    with pytest.raises(ValueError, match="takes embeddings for labels"):
        from_diffusers(unet_of(class_embed_type="identity"), diffusers.DDPMScheduler())
    continuous = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="needed is a scheduler with alphas_cumprod and discrete timesteps"):
        from_diffusers(unet_of(), continuous)
    with pytest.warns(UserWarning, match="dynamic thresholding is not applied"):
        from_diffusers(unet_of(), diffusers.DDPMScheduler(thresholding=True))


def test_every_folder_that_holds_a_model(tmp_path):
    unet, scheduler = save_random_diffusers_pipeline(tmp_path / "pipeline", size=8, prediction_type="sample")
    unet.save_pretrained(tmp_path / "flat")
    scheduler.save_pretrained(tmp_path / "flat")
    unet.save_pretrained(tmp_path / "alone")
    expected = load(tmp_path / "pipeline")[0].denoise(X, 0.6, 0.8)
    for folder in ("pipeline/unet", "flat"):
        denoiser, record = load(tmp_path / folder)
        assert torch.equal(denoiser.denoise(X, 0.6, 0.8), expected)
        assert len(record["crc32"]) == 8
        assert denoiser.clip == 1
        assert denoiser.size == (8, 8)
    with pytest.warns(UserWarning, match=r"does not say with which scheduler.*DDPMScheduler\(\) is assumed"):
        assert load(tmp_path / "alone")[0].predicts == "eps"
    before = load(tmp_path / "flat")[1]["crc32"]
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    unet.save_pretrained(tmp_path / "flat")
    assert load(tmp_path / "flat")[1]["crc32"] != before


def test_folders_of_diffusers_in_every_layout(tmp_path):
    import diffusers

    unet, scheduler = unet_of(), diffusers.DDPMScheduler(prediction_type="v_prediction")
    unet.half().save_pretrained(tmp_path / "parts" / "unet", variant="fp16")
    scheduler.save_pretrained(tmp_path / "parts" / "scheduler")
    for folder in (tmp_path / "parts", tmp_path / "parts" / "unet"):
        assert load(folder)[0].predicts == "v"
    config = tmp_path / "parts" / "unet" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(ValueError, match=r"config\.json and the weights do not belong together"):
        load(tmp_path / "parts")
    for damaged in ("[]", "{}", '{"_class_name": null}'):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json: not a configuration of diffusers"):
            load(tmp_path / "parts")
