"""What networks of other people are like: each of their conventions gives the same estimate, or is refused in words."""

import functools
import subprocess
import sys

import pytest
import torch
from helpers import make_bank, noisy, save_random_diffusers_pipeline
from torch import nn

import pyels
from pyels.adapters import NetworkDenoiser, NoiseLevel, from_diffusers, from_edm, load
from pyels.networks.identity import checksum
from pyels.schedules import Discrete, make_schedule

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PREDICTIONS = ("eps", "x0", "score", "v", "velocity", "residual")


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_network_may_do_with_its_arguments_what_it_likes(predicts):
    def in_place(x, t, labels):
        t.zero_(), labels.zero_()
        return x.mul_(0.3)

    labels = torch.tensor([1, 2])
    ours, theirs = (
        NetworkDenoiser(f, predicts, num_classes=3).denoise(X, 0.6, 0.8, labels)
        for f in (lambda x, t, labels: 0.3 * x, in_place)
    )
    assert torch.equal(ours, theirs)
    assert labels.tolist() == [1, 2]


def test_a_network_may_answer_from_the_same_memory_at_every_call():
    memory = torch.empty(2, 1, 8, 8)
    network = NetworkDenoiser(lambda x, t, labels: memory.copy_(x), "x0")
    first = network.denoise(X, 0.6, 0.8)
    kept = first.clone()
    network.denoise(-X, 0.6, 0.8)
    assert torch.equal(first, kept)


def test_a_denoiser_or_a_callback_that_works_in_place_leaves_the_sampler_its_image():
    class InPlace(pyels.Denoiser):
        def estimate(self, query):
            return query.x.mul_(0.5)

    class Careful(pyels.Denoiser):
        def estimate(self, query):
            return query.x * 0.5

    def spoil(step):
        step.to.zero_()

    expected = pyels.sample(Careful(), X, 3, "flow")
    assert torch.equal(pyels.sample(InPlace(), X, 3, "flow"), expected)
    assert torch.equal(pyels.sample(Careful(), X, 3, "flow", callback=spoil), expected)


@pytest.mark.parametrize("steps", [10, 1000, 4000])
@pytest.mark.parametrize("convert", [lambda t: t.long(), lambda t: t.round().long(), lambda t: t.int()])
def test_every_step_arrives_however_it_is_converted(steps, convert):
    seen = []
    schedule = Discrete(torch.linspace(0.9999, 1e-4, steps).double().numpy())
    for timesteps, function in (
        (None, lambda x, t: (seen.append(int(convert(steps * t - 1)[0])), x)[1]),
        (steps, lambda x, t: (seen.append(int(t[0])), x)[1]),
    ):
        seen.clear()
        network = NetworkDenoiser(function, schedule=schedule, timesteps=timesteps)
        some = range(1, steps + 1, max(1, steps // 500))
        for j in some:
            alpha, sigma = schedule.alpha(j / steps), schedule.sigma(j / steps)
            rounded = (torch.tensor([level] * 2, dtype=torch.float32) for level in (alpha, sigma))
            network.denoise(X, *((alpha, sigma) if j % 2 else rounded))
        assert seen == [j - 1 for j in some]


def test_times_along_schedules_without_steps_are_never_below():
    seen = []
    schedule = make_schedule("cosine")
    network = NetworkDenoiser(lambda x, t: (seen.append(int(1000 * t[0])), x)[1], schedule="cosine")
    for j in range(1, 1000):
        network.denoise(X, schedule.alpha(j / 1000), schedule.sigma(j / 1000))
    assert seen == list(range(1, 1000))


def test_integer_steps_are_those_of_the_table():
    table = nn.Embedding(100, 1)
    network = NetworkDenoiser(lambda x, t, labels: x * table(t)[:, :, None, None], "eps", "linear", timesteps=100)
    network.denoise(X, 0.9999, 0.0141)
    network.denoise(X, 0.01, 0.99995)


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("pixels", [(0, 1), (-1, 2), (-1, 1)])
def test_networks_of_other_pixel_ranges(predicts, pixels):
    """They know the images in their own units, and their noise too."""
    low, high = pixels
    half = (high - low) / 2
    truth = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    schedule = make_schedule("linear")

    def perfect(x, t):
        a, s = (torch.tensor([f(v) for v in t.tolist()])[:, None, None, None] for f in (schedule.alpha, schedule.sigma))
        x0 = half * (truth + 1) + low
        eps = (x - a * x0) / s
        known = {"eps": eps, "x0": x0, "score": -eps / s, "v": a * eps - s * x0}
        return {**known, "velocity": eps - x0, "residual": x - x0}[predicts]

    found = NetworkDenoiser(perfect, predicts, "linear", pixel_range=pixels).denoise(0.6 * truth + 0.8 * X, 0.6, 0.8)
    torch.testing.assert_close(found, truth, atol=2e-4, rtol=0)


def test_time_that_runs_the_other_way():
    class Reversed:
        def alpha(self, t):
            return t

        def sigma(self, t):
            return 1 - t

    seen = []
    function = lambda x, t: (seen.append(float(t[0])), x)[1]  # noqa: E731
    NetworkDenoiser(function, "x0", Reversed()).denoise(X, 0.75, 0.25)
    NetworkDenoiser(lambda x, t: function(x, 1 - t), "x0", "flow").denoise(X, 0.75, 0.25)
    assert seen == pytest.approx([0.75, 0.75], abs=1e-6)
    with pytest.raises(ValueError, match="outside what the network's schedule reaches"):
        NetworkDenoiser(function, "x0", _Part()).denoise(X, 0.01, 0.99)


class _Part:
    def alpha(self, t):
        return 0.5 + t / 2

    def sigma(self, t):
        return 0.5 - t / 2


def test_networks_without_time_and_for_one_noise_level():
    blind = NetworkDenoiser(lambda x: 0.1 * x, "residual", "edm")
    torch.testing.assert_close(blind.denoise(X, 2.0, 1.0), 0.9 * X / 2)
    only = NetworkDenoiser(nn.Identity(), "residual", 25.0, pixel_range=(0, 255))
    sigma = 25 / 127.5
    torch.testing.assert_close(only.denoise(X, 1.0, sigma), torch.full_like(X, -1.0))
    with pytest.raises(ValueError, match=r"for sigma / alpha = 25 alone.*ask for denoise there"):
        only.denoise(X, 1.0, 0.5)
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="the only sigma of a network"):
            NetworkDenoiser(lambda x: x, "x0", wrong)


def test_noise_levels_as_times():
    seen = []
    network = NetworkDenoiser(lambda x, sigma: (seen.append(sigma.tolist()), -x)[1], "score", NoiseLevel())
    network.denoise(X, 0.5, torch.tensor([0.5, 2.0]))
    assert seen[0] == pytest.approx([1.0, 4.0])


def test_learned_variances_are_left_out():
    plain, twice = (
        NetworkDenoiser(f, "eps").denoise(X, 0.6, 0.8)
        for f in (lambda x, t: 0.2 * x, lambda x, t: torch.cat([0.2 * x, 99 + x], 1))
    )
    assert torch.equal(plain, twice)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision(dtype):
    torch.manual_seed(0)
    module = nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    expected = module.double()(X.double()).float().detach() if dtype == torch.float64 else None
    module = module.to(dtype)
    found = NetworkDenoiser(module, "x0").denoise(X, 0.6, 0.8)
    if expected is not None:
        assert found.shape == expected.shape
    assert module.weight.dtype == dtype  # nobody's weights are changed
    with pytest.raises(ValueError, match=r"given float32 images: convert it with network\.float\(\)"):
        NetworkDenoiser(lambda x, t, labels: module(x), "x0").denoise(X, 0.6, 0.8)


class Holder:
    def __init__(self, net):
        self.net = net

    def __call__(self, x, t, labels):
        return self.net(x)

    def method(self, x, t, labels):
        return self.net(x)


HOLDERS = {
    "closure": lambda net: lambda x, t, labels: net(x),
    "default": lambda net: lambda x, t, net=net: net(x),
    "partial": lambda net: functools.partial(lambda net, x, t, labels: net(x), net),
    "object": Holder,
    "method": lambda net: Holder(net).method,
    "nested": lambda net: (lambda inner: lambda x, t, labels: inner(x))(lambda x: net(x)),
    "attribute": lambda net: (lambda held: lambda x, t, labels: held.net(x))(Holder(net)),
    "list": lambda net: (lambda nets: lambda x, t, labels: nets[0](x))([net]),
}


@pytest.mark.parametrize("how", HOLDERS)
@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False)])
def test_layers_in_training_mode_are_refused_wherever_they_are(how, layer):
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), layer).train()
    network = NetworkDenoiser(HOLDERS[how](net), "x0")
    with pytest.raises(ValueError, match=rf"{type(layer).__name__} in training mode.*call network\.eval\(\)"):
        network.denoise(X, 0.6, 0.8)
    net.eval()
    if getattr(layer, "track_running_stats", True):
        assert torch.equal(network.denoise(X, 0.6, 0.8), network.denoise(X, 0.6, 0.8))


class Trainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5))
        self.averaged = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5)).eval()

    def step(self, x):
        return self.averaged(x)


def test_layers_that_are_not_used_may_be_in_training():
    trainer = Trainer()
    for function in (trainer.step, lambda x: trainer.averaged(x)):
        NetworkDenoiser(function, "x0").denoise(X, 0.6, 0.8)
    with pytest.raises(ValueError, match="Dropout in training mode"):
        NetworkDenoiser(lambda x: trainer.net(x), "x0").denoise(X, 0.6, 0.8)


def test_modules_are_put_into_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5))
    network = NetworkDenoiser(net, "x0")
    assert torch.equal(network.denoise(X, 0.6, 0.8), network.denoise(X, 0.6, 0.8))


def test_v_where_the_variance_is_not_preserved_is_said():
    for schedule in ("flow", "edm", NoiseLevel()):
        with pytest.warns(UserWarning, match="for the eps - x0 of flow matching, say predicts='velocity'"):
            NetworkDenoiser(lambda x, t: x, "v", schedule)
    for schedule in ("cosine", "cosine-offset", "linear"):
        NetworkDenoiser(lambda x, t: x, "v", schedule)


def test_functions_take_what_they_take():
    for function in (lambda x: x, lambda x, t: x, lambda x, t, labels=None: x, lambda *given: given[0], nn.Identity()):
        assert torch.equal(
            NetworkDenoiser(function, "x0").denoise(X, 1.0, 1.0),
            NetworkDenoiser(lambda x, t, labels: x, "x0").denoise(X, 1.0, 1.0),
        )
    seen = []
    NetworkDenoiser(lambda x, t, y=None: (seen.append(y), x)[1], "x0", num_classes=3).denoise(
        X, 1.0, 1.0, torch.tensor([0, 2])
    )
    assert seen[0].tolist() == [0, 2]
    with pytest.raises(TypeError, match="takes 2 arguments, but with num_classes or null_label it is given x, t and"):
        NetworkDenoiser(lambda x, t: x, num_classes=3)


def test_the_label_of_no_class():
    seen = []
    network = NetworkDenoiser(lambda x, t, y: (seen.append(y.tolist()), x)[1], num_classes=10, null_label=10)
    network.denoise(X, 0.6, 0.8)
    network.denoise(X, 0.6, 0.8, torch.tensor([3, 10]))
    assert seen == [[10, 10], [3, 10]]
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
        network.denoise(X, 0.6, 0.8, torch.tensor([3, 11]))
    NetworkDenoiser(lambda x, t, y: x, null_label=-1).denoise(X, 0.6, 0.8, torch.tensor([0, 500]))


def test_clipping(small):
    network = NetworkDenoiser(lambda x, t: 3 * x, "x0", clip=1.0)
    x0 = network.denoise(X, 0.6, 0.8)
    assert float(x0.abs().max()) == 1
    torch.testing.assert_close(network.eps(X, 0.6, 0.8), (X - 0.6 * x0) / 0.8)
    assert float(pyels.sample(network, X, 4).abs().max()) <= 1
    query = network.query(X, 0.6, 0.8)
    assert float(network.estimate(query).abs().max()) > 1  # where gradients and guidance begin
    machine = pyels.IS(small)
    machine.clip = 0.5
    assert float(machine.denoise(noisy(small, 0.6, 0.8), 0.6, 0.8).abs().max()) <= 0.5
    for clip in (0, -1, "1", float("nan")):
        with pytest.raises((TypeError, ValueError), match=r"clip must be (positive|a number)"):
            NetworkDenoiser(lambda x: x, clip=clip)


@pytest.mark.parametrize("pixels", [(1, 0), (0, float("inf")), 3, (0, 1, 2)])
def test_bad_pixel_ranges(pixels):
    with pytest.raises((TypeError, ValueError), match="pixel_range must be two"):
        NetworkDenoiser(lambda x: x, pixel_range=pixels)


def test_guidance_of_networks_and_machines(small):
    x, labels = noisy(small, 0.6, 0.8, batch=3), torch.tensor([0, 1, 2])
    machine = pyels.LS(small, 3)
    none, label = machine.eps(x, 0.6, 0.8), machine.eps(x, 0.6, 0.8, labels)
    for scale in (0, 1, 2.5):
        guided = pyels.Guided(machine, scale)
        torch.testing.assert_close(guided.eps(x, 0.6, 0.8, labels), none + scale * (label - none), atol=1e-5, rtol=0)
    assert pyels.sample(pyels.Guided(pyels.ELS(small), 2), x, 2, patch_sizes=[3, 5], labels=labels).shape == x.shape
    network = NetworkDenoiser(lambda x, t, y: y[:, None, None, None] * 0.1 + 0 * x, "x0", null_label=4, clip=0.5)
    found = pyels.Guided(network, 3).denoise(x, 0.6, 0.8, labels)
    expected = (0.4 + 3 * (0.1 * labels - 0.4)).clamp(-0.5, 0.5)  # clipped once, in the end
    torch.testing.assert_close(found, expected[:, None, None, None].expand_as(x))
    with pytest.raises(ValueError, match="guidance needs the class of every image"):
        pyels.Guided(machine, 2).denoise(x, 0.6, 0.8)
    with pytest.raises(ValueError, match="give NetworkDenoiser a null_label"):
        pyels.Guided(NetworkDenoiser(lambda x, t, y: x, num_classes=3), 2)
    with pytest.raises(TypeError, match="denoiser must be a machine"):
        pyels.Guided(small, 2)
    for scale in (float("nan"), "2"):
        with pytest.raises((TypeError, ValueError), match=r"scale must be (finite|a number)"):
            pyels.Guided(machine, scale)


def test_devices_are_checked_before_they_are_used():
    if not torch.cuda.is_available():
        for make in (
            lambda: NetworkDenoiser(lambda x: x, device="cuda"),
            lambda: NetworkDenoiser(nn.Conv2d(1, 1, 1)).to("cuda"),
        ):
            with pytest.raises(ValueError, match=r"device must be cpu or cuda .*got 'cuda'; torch (is built|sees)"):
                make()
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        NetworkDenoiser(lambda x: x, device="gpu")

    def asks_for_cuda(x):
        raise AssertionError("Torch not compiled with CUDA enabled")

    with pytest.raises(ValueError, match="torch is built without CUDA here: leave it on the CPU"):
        NetworkDenoiser(asks_for_cuda).denoise(X, 0.6, 0.8)


@pytest.mark.gpu
def test_queries_stay_where_the_network_is(monkeypatch):
    network = NetworkDenoiser(nn.Conv2d(1, 1, 3, padding=1).cuda(), "velocity", "flow", null_label=3)
    expected = network.denoise(X, 0.6, 0.8)
    assert expected.device.type == "cpu"
    monkeypatch.setattr(torch.Tensor, "cpu", None)  # nothing of the images is brought there
    found = network.denoise(X.cuda(), 0.6, 0.8)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.to("cpu"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("alphas", "message"), [([0.9, 0.95], "falling"), ([], "falling"), ([0.9, 0.0, 0.0], "falling"), ([1.1], "falling")]
)
def test_schedules_that_are_none(alphas, message):
    with pytest.raises(ValueError, match=message):
        Discrete(alphas)


def test_zero_terminal_snr():
    schedule = Discrete([0.9, 0.5, 0.1, 0.0])
    assert (schedule.alpha(1.0), schedule.sigma(1.0)) == (0.0, 1.0)
    assert schedule.alpha(0.75) == pytest.approx(0.1**0.5)
    for t in (0.8, 0.9, 0.999):
        assert 0 < schedule.alpha(t) < 0.1**0.5
        assert schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 == pytest.approx(1)
    found = NetworkDenoiser(lambda x, t: -x, "v", schedule).denoise(X, 0.0, 1.0)
    torch.testing.assert_close(found, X)


# ---- diffusers -----------------------------------------------------------------------------------------------------

needs_diffusers = pytest.mark.needs(package="diffusers")
quiet = pytest.mark.filterwarnings("ignore")  # what other packages warn of at import is theirs


def unet_of(**options):
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return diffusers.UNet2DModel(**{**small, **blocks, "layers_per_block": 1, **options}).eval()


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


@needs_diffusers
@quiet
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


@needs_diffusers
@quiet
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


@needs_diffusers
@quiet
def test_scores_of_diffusers():
    import diffusers

    unet, sigma = unet_of(), 0.6
    z = (X + 1) / 2  # its pixels lie in [0, 1]
    with torch.no_grad():
        score = unet(z, torch.tensor([sigma / 2] * 2)).sample
    found = from_diffusers(unet, diffusers.ScoreSdeVeScheduler()).denoise(X, 1.0, sigma)
    torch.testing.assert_close(found, 2 * (z + (sigma / 2) ** 2 * score) - 1, atol=1e-5, rtol=0)


@needs_diffusers
@quiet
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


@needs_diffusers
@quiet
def test_schedulers_that_cannot_be_kept_to_are_refused_in_words():
    import diffusers

    with pytest.raises(ValueError, match="takes embeddings for labels"):
        from_diffusers(unet_of(class_embed_type="identity"), diffusers.DDPMScheduler())
    continuous = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="needed is a scheduler with alphas_cumprod and discrete timesteps"):
        from_diffusers(unet_of(), continuous)
    with pytest.warns(UserWarning, match="dynamic thresholding is not applied"):
        from_diffusers(unet_of(), diffusers.DDPMScheduler(thresholding=True))


@needs_diffusers
@quiet
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


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.scale * x


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize(
    "wrap",
    [
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
        functools.partial,
        torch.jit.script,
        lambda net: torch.jit.trace(net, (X, torch.zeros(2))),
    ],
    ids=["average", "parallel", "partial", "script", "trace"],
)
def test_wrapped_networks_are_given_what_they_take(wrap):
    expected = NetworkDenoiser(OfTwo(), "x0", "flow").denoise(X, 0.4, 0.6)
    torch.testing.assert_close(NetworkDenoiser(wrap(OfTwo()), "x0", "flow").denoise(X, 0.4, 0.6), expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_networks_have_their_weights_in_their_checksum():
    networks = [torch.jit.script(OfTwo()) for _ in range(2)]
    with torch.no_grad():
        networks[1].scale.mul_(2)
    first, second = (checksum(NetworkDenoiser(network, "x0", "flow")) for network in networks)
    assert first != second


def test_an_estimate_of_ones_own_may_work_in_place_and_is_checked():
    class InPlace(pyels.Denoiser):
        def estimate(self, query):
            return query.x.mul_(0.5)

    class OneForAll(pyels.Denoiser):
        def estimate(self, query):
            return query.x[:1]

    x = X.clone()
    torch.testing.assert_close(InPlace().denoise(x, 0.6, 0.8), 0.5 * X)
    torch.testing.assert_close(x, X)
    with pytest.raises(ValueError, match=r"estimate of OneForAll gave shape \(1, .*, but the images are \(2, "):
        OneForAll().denoise(X, 0.6, 0.8)
    with pytest.raises(ValueError, match="a InPlace cannot be moved there"):
        InPlace().to("cuda")


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "pytorch_model.bin", "model.pkl"])
def test_pickles_are_refused_as_what_they_are(tmp_path, name):
    torch.save(nn.Conv2d(1, 1, 3).state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"are pickles, which run code when they are read.*FILE\.py:NAME"):
        load(tmp_path / name)


def test_bare_modules_are_told_how_to_be_wrapped(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Net(torch.nn.Conv2d):\n  def __init__(self): super().__init__(1, 1, 3)\n"
        "net = Net()\ndef build(): return net\n"
        "def cuda(): raise AssertionError('Torch not compiled with CUDA enabled')\n"
    )
    for name in ("net", "Net", "build"):
        with pytest.raises(ValueError, match=r"gave .*Net; .* pyels\.NetworkDenoiser\(network, predicts="):
            load(f"{tmp_path / 'mine.py'}:{name}")
    with pytest.raises(ValueError, match="torch is built without CUDA here"):
        load(f"{tmp_path / 'mine.py'}:cuda")


def test_edm_denoisers_keep_their_conventions():
    network = from_edm(lambda x, sigma: x / (1 + sigma[:, None, None, None]), pixel_range=(0, 1), clip=1.0)
    assert network.pixel_range == (0, 1)
    assert float(network.denoise(9 * X, 1.0, 0.1).abs().max()) == 1


def test_a_process_that_asks_for_a_device_that_is_not_there_ends_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    make_bank(4, (1, 8, 8)).save(tmp_path / "bank.npz")
    (tmp_path / "mine.py").write_text("import pyels\nnet = pyels.NetworkDenoiser(lambda x: x)\n")
    for command in ("check", "calibrate", "compare", "sample"):
        out = () if command == "check" else ("--out", tmp_path / "out")
        ended = subprocess.run(
            [
                sys.executable,
                "-m",
                "pyels",
                command,
                "--network",
                f"{tmp_path / 'mine.py'}:net",
                "--device",
                "cuda",
                "--dataset",
                tmp_path / "bank.npz",
                *out,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        (line,) = ended.stderr.strip().splitlines()
        assert line.startswith("pyels: error: device must be cpu or cuda")


@needs_diffusers
@quiet
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


@pytest.mark.parametrize("path", ["", "~nobody-of-this-name/network"])
def test_paths_that_are_none(path):
    with pytest.raises((ValueError, FileNotFoundError), match=r"must not be empty|no such file|no network"):
        load(path)
