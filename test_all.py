"""All tests: `pytest test_all.py`. No network. Tests on real images and published weights run where
GAN_DATA names a folder that holds them, and are skipped elsewhere."""
import argparse
import contextlib
import errno
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import urllib.error
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from scipy.integrate import quad
from scipy.linalg import solve_discrete_lyapunov, sqrtm

import bench
import core
import data
import exp_pcr_natural
import exp_pixel_combination
import exp_sample_insufficiency
import exp_sc
import fid
import geometry
import harness
import theory_sde as th
from harness import UserError

HERE = Path(__file__).parent
torch.set_num_threads(1)        # networks this small only wait for a second one


@pytest.fixture
def real_data():
    folder = Path(os.environ.get("GAN_DATA", "data"))
    if not (folder / "inception" / "reference_features.npz").exists():
        pytest.skip("needs real images and Inception weights: set GAN_DATA to their folder")
    return folder


def config(**changes):
    """A tiny training configuration."""
    return argparse.Namespace(**{**dict(
        model="wgangp", arch="dcgan", size=8, channels=1, z_dim=4, width=4, norm_d="none",
        init_d="he", base=4, loss="wgan", batch=4, n_dis=2, steps=6, lr_g=1e-2, lr_d=1e-2,
        beta1=0.5, beta2=0.9,
        gp_weight=10.0, gp_comb=False, comb_weight=0.5, flip=True, lr_decay=True, ema_beta=0.9,
        seed=0, jobs=1, engine="eager", data_parallel=False,
        log_every=4, eval_every=3, sample_every=3, ckpt_every=3, n_fid=8), **changes})


def tiny_data(n=16, size=8):
    return torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


def run_script(name, *args, cwd=None):
    return subprocess.run([sys.executable, HERE / name, *map(str, args)], capture_output=True,
                          text=True, cwd=cwd, timeout=300)


# --------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("model, arch", [("wgangp", "dcgan"), ("wgangp", "resnet"),
                                         ("lsgan", "dcgan"), ("sagan", "dcgan")])
def test_networks_have_the_right_shapes(model, arch, size, channels):
    cfg = config(model=model, arch=arch, size=size, channels=channels, width=8,
                 norm_d="batch" if model == "lsgan" else "none")
    G, D = core.build(cfg)
    x = G(torch.randn(2, cfg.z_dim))
    assert x.shape == (2, channels, size, size) and x.abs().max() <= 1
    assert D(x).shape == (2,)
    spectral = sum("parametrizations" in k for k in {**G.state_dict(), **D.state_dict()})
    assert (spectral > 0) == (model == "sagan")


def test_published_channel_counts():
    G, D = core.build(config(size=64, channels=3, width=64, z_dim=128))
    g = [m.out_channels for m in G if isinstance(m, torch.nn.ConvTranspose2d)]
    d = [m.out_channels for m in D if isinstance(m, torch.nn.Conv2d)]
    assert G[0].out_features == 512 * 16 and g == [256, 128, 64, 3] and d == [64, 128, 256, 512]


def test_size_without_networks_is_refused():
    with pytest.raises(UserError, match="power of two"):
        core.build(config(size=48))


def test_attention_starts_as_identity_and_learns():
    layer = core.Attention(16)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.gain.fill_(1.0)
    assert layer(x).shape == x.shape and not torch.allclose(layer(x), x)


# ------------------------------------------------------------------- losses and regularizers


def test_losses_by_hand():
    d = torch.tensor([-2.0, 0.5])
    expected = {"wgan": ([2, -0.5], [-2, 0.5], [2, -0.5]),
                "lsgan": ([9, 0.25], [4, 0.25], [9, 0.25]),
                "hinge": ([3, 0.5], [0, 1.5], [2, -0.5]),
                "ns": (-torch.sigmoid(d).log(), -(1 - torch.sigmoid(d)).log(),
                       -torch.sigmoid(d).log())}
    for name, values in expected.items():
        for term, value in zip(core.LOSSES[name], values):
            torch.testing.assert_close(term(d), torch.as_tensor(value))


def test_gradient_penalty_of_a_linear_critic():
    w = torch.zeros(1, 4, 4)
    w[0, 0, :2] = torch.tensor([3.0, 4.0])                              # |w| = 5
    x, y = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    torch.testing.assert_close(core.gradient_penalty(lambda x: (x * w).sum((1, 2, 3)), x, y),
                               torch.tensor(16.0))


def test_pixel_combinations():
    x = torch.randn(5, 1, 2, 2)
    pairs = [(core.pixel_average(x)[i] - (x[i] + x[j]) / 2).abs().max() < 1e-6
             for i in range(5) for j in range(5)]
    assert sum(pairs) == 5 and not any(pairs[::6])                      # one partner, not itself
    with pytest.raises(ValueError, match="two images"):
        core.pixel_average(x[:1])
    a, b = torch.tensor([-1., -1, 1, 1]), torch.tensor([-1., 1, -1, 1])
    assert core.pixel_and(a, b).tolist() == [-1, -1, -1, 1]
    assert core.pixel_or(a, b).tolist() == [-1, 1, 1, 1]


def test_pcr_loss_is_eq_13():
    real, fake, comb = torch.tensor([1., 3]), torch.tensor([2., 4]), torch.tensor([10., 20])
    assert core.pcr_loss(real, fake, comb).item() == 2 + (3 + 15) / 2
    assert core.pcr_loss(real, fake, comb, comb_weight=0.25).item() == 2 + 0.75 * 3 + 0.25 * 15


def test_sample_correction_by_hand():
    x, realism = torch.arange(6.).view(6, 1), torch.tensor([0.0, 1.0, 0.2, 0.9, 0.8, 0.1])
    same, weight = core.sample_correction(x, realism, 0.5)
    assert torch.equal(same, x) and weight.tolist() == [2, 0, 2, 0, 0, 2]
    assert core.sample_correction(x, torch.ones(6), 0.5)[1].tolist() == [0] * 6
    replaced, weight = core.sample_correction(x, realism, 0.5, n_keep=4)
    assert sorted(replaced.flatten().tolist()) == [0, 2, 4, 5]          # 1 and 3 made way for 4, 5
    assert weight.tolist() == [1] * 4
    untouched, _ = core.sample_correction(x, -realism, 0.5, n_keep=4)
    assert sorted(untouched.flatten().tolist()) == [0, 1, 2, 3]


def test_readme_lines_added_to_a_strangers_gan():
    readme = (HERE / "README.md").read_text()
    code = re.search(r"<!-- tested -->\n```python\n(.*?)```", readme, re.S)[1]
    D = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
    x_real, x_fake = torch.randn(8, 1, 4, 4), torch.randn(8, 1, 4, 4)
    names = {"D": D, "x_real": x_real, "x_fake": x_fake, "F": F,
             "is_realistic": lambda x: x.mean((1, 2, 3)) > 0}
    exec(code, names)
    f = F.softplus
    keep = (x_fake.mean((1, 2, 3)) <= 0).float()
    expected = (f(-D(x_real)).mean() + 0.5 * (keep * f(D(x_fake)).flatten()).sum() / keep.sum()
                + 0.5 * f(D((x_real + x_real.roll(1, 0)) / 2)).mean())
    torch.testing.assert_close(names["d_loss"], expected)
    names["d_loss"].backward()


def test_readme_lists_every_open_choice():
    readme = (HERE / "README.md").read_text()
    for path in sorted(HERE.glob("*.py")):
        for tag in ("UNSPECIFIED", "DEVIATION"):
            in_code = path.read_text().count(f"{tag}:") if path.name != "test_all.py" else 0
            assert readme.count(f"- `{path.name}` {tag}:") == in_code, (path.name, tag)


# ------------------------------------------------------------------------------------ trainer


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


@pytest.mark.parametrize("model, loss", [("wgangp", "wgan"), ("lsgan", "lsgan"),
                                         ("sagan", "hinge")])
def test_each_update_moves_its_own_network(model, loss):
    trainer = core.Trainer(config(model=model, loss=loss, size=16), tiny_data(size=16),
                           torch.device("cpu"), combine=lambda t, x: core.pixel_average(x))
    g, d = flat(trainer.G), flat(trainer.D)
    trainer.d_update()
    assert torch.equal(flat(trainer.G), g) and not torch.equal(flat(trainer.D), d)
    d = flat(trainer.D)
    trainer.g_update()
    assert torch.equal(flat(trainer.D), d) and not torch.equal(flat(trainer.G), g)
    mean, now = flat(trainer.G_ema), flat(trainer.G)
    torch.testing.assert_close(mean, 0.9 * g + 0.1 * now)
    trainer.update()
    assert (trainer.step, trainer.d_steps) == (1, 2)


def test_leaky_relu_and_its_derivatives_are_those_of_pytorch():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).requires_grad_()
    convs = [torch.nn.Conv2d(3, 3, 3, dtype=torch.float64) for _ in range(2)]
    grads = []
    for act in (core.LeakyReLU(), torch.nn.LeakyReLU(0.2)):
        out = act(convs[1](act(convs[0](x)))).square().sum()
        first, = torch.autograd.grad(out, x, create_graph=True)
        second = torch.autograd.grad(first.norm(), [c.weight for c in convs])
        grads.append([out, first, *second])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_d_loss_is_the_formula():
    cfg = config(gp_weight=0.0, loss="ns", flip=False)
    hooks = dict(combine=lambda t, x: x * 0 + 0.5, correct=lambda t, x: core.sample_correction(
        x, torch.tensor([1., 0, 0, 1]), 0.5))
    trainer = core.Trainer(cfg, tiny_data(), torch.device("cpu"), **hooks)
    twin = core.Trainer(cfg, tiny_data(), torch.device("cpu"))
    d_loss, *_, kept, _ = trainer.d_update()
    x_real, x_fake = twin.real(), twin.fake().detach()
    f = F.softplus
    expected = (f(-twin.D(x_real)).mean() + 0.5 * f(twin.D(x_fake))[1:3].mean()
                + 0.5 * f(twin.D(x_real * 0 + 0.5)).mean())
    torch.testing.assert_close(d_loss, expected)
    assert kept == 0.5


def test_batches_are_drawn_without_replacement_and_cover_the_data():
    images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 1, 8, 8)
    trainer = core.Trainer(config(flip=False), images, torch.device("cpu"))
    batches = [((trainer.real()[:, 0, 0, 0] + 1) * 127.5).round().tolist() for _ in range(50)]
    assert all(len(set(b)) == 4 for b in batches) and len({v for b in batches for v in b}) == 16


def test_uint8_round_trip_and_generation_leaves_training_alone():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(core.to_uint8(core.to_float(x)), x)
    G, _ = core.build(config())
    G.train()
    before = {k: v.clone() for k, v in G.state_dict().items()}
    a, b = (torch.cat(list(core.generate(G, 5, 4, batch=2))) for _ in range(2))
    assert a.shape == (5, 1, 8, 8) and a.dtype == torch.uint8 and G.training
    assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="--batch 17"):
        core.Trainer(config(batch=17), tiny_data(16), torch.device("cpu"))


def fit(folder, evaluate=None, **changes):
    trainer = core.Trainer(config(**changes), tiny_data(), torch.device("cpu"),
                           combine=lambda t, x: core.pixel_average(x))
    harness.fit(trainer, harness.open_run(folder, trainer.cfg, resume=True), evaluate)
    return trainer


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stop_and_resume_is_bit_for_bit(tmp_path, number, code):
    def score(trainer):
        return {"fid": float(flat(trainer.G).abs().sum())}

    def stop(trainer):
        if trainer.step == 3:
            os.kill(os.getpid(), number)
        return score(trainer)

    whole = fit(tmp_path / "whole", score)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "cut", stop)
    assert stopped.value.code == code
    cut = harness.read_checkpoint(tmp_path / "cut" / "ckpt.pt")
    assert (cut["step"], cut["d_steps"]) == (3, 6)
    resumed = fit(tmp_path / "cut", score)
    for name in ("G", "D", "G_ema"):
        a, b = (getattr(t, name).state_dict() for t in (whole, resumed))
        assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert rows[0] == rows[1] and rows[0].count("fid") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("model, loss, gp_weight", [("wgangp", "wgan", 10.0),
                                                    ("sagan", "hinge", 0.0)])
def test_cuda_graph_agrees_with_eager(model, loss, gp_weight):
    logs, cfg = [], config(model=model, loss=loss, gp_weight=gp_weight, size=16, steps=100,
                           lr_g=1e-4, lr_d=1e-4)
    for captured in (False, True):
        trainer = core.Trainer(cfg, tiny_data(size=16), torch.device("cuda"),
                               combine=lambda t, x: core.pixel_average(x))
        if captured:
            trainer.capture()
        logs.append(torch.stack([trainer.update().clone() for _ in range(100)]))
    torch.testing.assert_close(logs[0], logs[1], rtol=1e-3, atol=1e-4)


def test_engines_are_refused_where_they_cannot_work(tmp_path):
    trainer = core.Trainer(config(engine="graph"), tiny_data(), torch.device("cpu"))
    with pytest.raises(UserError, match="--engine graph: needs a CUDA device"):
        harness.fit(trainer, tmp_path)
    with pytest.raises(UserError, match="--engine compile: .*differentiate twice"):
        core.Trainer(config(engine="compile"), tiny_data(), torch.device("cpu"))


def test_checkpoint_is_plain_and_can_be_sampled(tmp_path):
    fit(tmp_path)
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert {"G", "D", "G_ema", "opt_g", "opt_d", "step", "d_steps", "rng", "config"} <= set(state)
    core.sample_checkpoint(tmp_path / "ckpt.pt", 9, tmp_path / "grid.png", torch.device("cpu"))
    assert Image.open(tmp_path / "grid.png").width >= 256
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="no checkpoint"):
        harness.read_checkpoint(tmp_path / "bad.pt")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    trainer = core.Trainer(config(steps=6), tiny_data(), torch.device("cpu"))
    update = trainer.update
    trainer.update = lambda: update() * (torch.nan if trainer.step == 4 else 1)
    with pytest.raises(UserError, match=r"d_loss.* not finite at step 4 of .*ckpt.pt"):
        harness.fit(trainer, tmp_path)
    assert harness.read_checkpoint(tmp_path / "ckpt.pt")["step"] == 3


def test_another_configuration_is_not_resumed(tmp_path):
    fit(tmp_path, steps=3)
    with pytest.raises(UserError, match="lr_g was 0.01, is 0.5"):
        fit(tmp_path, lr_g=0.5)
    with pytest.raises(UserError, match="--resume"):
        harness.open_run(tmp_path, config(), resume=False)


def test_a_result_can_be_traced(tmp_path):
    args = ["--smoke", "--arms", "vanilla", "--seeds", "0", "--outdir", str(tmp_path)]
    result = exp_pixel_combination.main(args)
    digest = harness.digest(exp_pixel_combination.copies(exp_pixel_combination.images_of(
        argparse.Namespace(size=16, seed=0))))
    assert result["data"] == [digest] and len(digest) == 32
    assert {"git", "python", "torch", "numpy", "device", "config"} <= set(result)
    assert result["config"]["seeds"] == [0]
    state = harness.read_checkpoint(tmp_path / "exp_pixel_combination" / "geometry-smoke" /
                                    "vanilla-s0" / "ckpt.pt")
    assert state["config"]["data_hash"] == digest
    other = core.Trainer(argparse.Namespace(**{**state["config"], "seed": 0}), tiny_data(
        128, size=16), torch.device("cpu"))
    with pytest.raises(UserError, match="data_hash was"):              # other images, other run
        harness.fit(other, tmp_path / "exp_pixel_combination" / "geometry-smoke" / "vanilla-s0")


def test_failed_writes_leave_the_old_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), harness.atomic(tmp_path / "a.json") as tmp:
        tmp.write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_mixup_law():
    x = torch.eye(2000)[:, :1].clone()                                  # x_0 = 1, the rest 0
    weight = torch.stack([exp_pcr_natural.mixup(x, harness.generator(s, "cpu"))[1, 0]
                          for s in range(300)])                         # partner's Beta weight
    assert abs(weight.mean() - 0.5) < 0.015 and abs(weight.var() - 0.25 / 51) < 0.0015


# --------------------------------------------------------------------------------------- data


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, timeout=None):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)


def cifar_records(n):
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, 3073), dtype=np.uint8)


def make_cifar(folder):
    folder.mkdir(parents=True)
    parts = {}
    for i, name in enumerate(data.CIFAR_FILES["train"] + data.CIFAR_FILES["test"]):
        parts[name] = np.roll(cifar_records(10000), i, 0)
        parts[name].tofile(folder / name)
    return parts


def test_cifar10_binary_layout(tmp_path, monkeypatch, no_network):
    parts = make_cifar(tmp_path / "cifar-10-batches-bin")
    images = data.load("cifar10", data_dir=tmp_path)
    assert images.shape == (50000, 3, 32, 32) and images.dtype == torch.uint8
    row = parts["data_batch_3.bin"][7]
    assert np.array_equal(images[20007].numpy(), row[1:].reshape(3, 32, 32))
    assert len(data.load("cifar10", data_dir=tmp_path, split="test")) == 10000
    # the same from the archive, whose checksum is asked for
    archive = tmp_path / "b" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    with pytest.raises(UserError, match="md5 is .* should be c32a1d4a"):
        data.load("cifar10", data_dir=archive.parent)
    import hashlib
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert torch.equal(data.load("cifar10", data_dir=archive.parent), images)
    with open(tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(UserError, match="data_batch_2.bin has 1000 bytes, should have 30730000"):
        data.load("cifar10", data_dir=tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    with pytest.raises(UserError, match="lacks data_batch_2.bin"):
        data.load("cifar10", data_dir=tmp_path)


def test_missing_data_says_what_goes_where(tmp_path, no_network):
    with pytest.raises(UserError, match=r"put it at .*cifar-10-binary.tar.gz"):
        data.load("cifar10", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    for name, wanted in (("celeba", "img_align_celeba"), ("imagenet", "imagenet/val")):
        with pytest.raises(UserError, match=wanted):
            data.load(name, data_dir=tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        data.load(str(tmp_path / "nowhere"))


def test_download_checks_what_it_got(tmp_path, monkeypatch):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"hello"))
    good = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    data.download("http://x/hello", tmp_path / "a", sha256=good)
    assert (tmp_path / "a").read_bytes() == b"hello"
    with pytest.raises(UserError, match="sha256 is 2cf24dba"):
        data.download("http://x/hello", tmp_path / "b", sha256="00" * 32)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def picture_folder(folder):
    """Ten images of every mode and several shapes, all a plain mid-red."""
    folder.mkdir(parents=True, exist_ok=True)
    red = Image.new("RGB", (40, 30), (200, 100, 100))
    for i, (mode, suffix) in enumerate([("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"),
                                        ("CMYK", "jpg"), ("1", "png"), ("RGB", "jpg"),
                                        ("LA", "png"), ("RGB", "webp"), ("RGB", "bmp")]):
        red.convert(mode).save(folder / f"{i}.{suffix}")
    return folder


def test_any_folder_or_zip(tmp_path):
    folder = picture_folder(tmp_path / "pics" / "deep")
    (tmp_path / "pics" / "notes.txt").write_text("not an image")
    images = data.load(str(tmp_path / "pics"), 16, tmp_path, "all")
    assert images.shape == (10, 3, 16, 16)
    means = images.float().mean((2, 3))
    for i in (0, 2, 3, 4, 6, 8, 9):                                     # the coloured ones
        assert (means[i] - torch.tensor([200., 100, 100])).abs().max() < 12
    for i in (1, 5, 7):                                                 # grey: three equal channels
        assert (means[i] - means[i].mean()).abs().max() == 0
    with zipfile.ZipFile(tmp_path / "pics.zip", "w") as z:
        for f in folder.iterdir():
            z.write(f, f"deep/{f.name}")
    assert torch.equal(data.load(str(tmp_path / "pics.zip"), 16, tmp_path, "all"), images)
    assert len(data.load(str(tmp_path / "pics"), 16, tmp_path)) == 9
    test = data.load(str(tmp_path / "pics"), 16, tmp_path, "test")
    assert torch.equal(test, images[9:])
    some = data.load(str(tmp_path / "pics"), 16, tmp_path, "all", n_train=4, seed=1)
    assert torch.equal(some, data.load(str(tmp_path / "pics"), 16, tmp_path, "all", 4, 1))
    with pytest.raises(UserError, match="--n-train 11"):
        data.load(str(tmp_path / "pics"), 16, tmp_path, "all", n_train=11)


def test_centre_crop(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert data.square(wide, 20, 1.0).min() == 255                      # the middle 20 x 20
    half = data.square(wide, 20, 0.5)                                   # 30 wide, but only 20 high
    assert half.min() == 255
    tall = np.zeros((218, 178, 3), np.uint8)
    tall[29:189, 9:169] = 255                                           # CelebA's 160 x 160
    face = data.square(tall, 64, data.CROP["celeba"])                   # the filter sees the edge
    assert face.min() > 200 and face[:, 3:-3, 3:-3].min() >= 250
    assert data.square(tall, 64, 1.0).min() == 0
    small = np.asarray(Image.fromarray(tall).resize((89, 109), Image.Resampling.BOX))
    assert data.square(small, 64, data.CROP["celeba"])[:, 3:-3, 3:-3].min() >= 250


def test_cache_is_used_and_never_stale(tmp_path, monkeypatch):
    folder = picture_folder(tmp_path / "pics")
    first = data.load(str(folder), 16, tmp_path, "all")
    decoded = []
    original = data.decode
    monkeypatch.setattr(data, "decode", lambda *a: decoded.append(a) or original(*a))
    assert torch.equal(data.load(str(folder), 16, tmp_path, "all"), first) and not decoded
    Image.new("RGB", (40, 30), (0, 0, 255)).save(folder / "0.png")
    assert data.load(str(folder), 16, tmp_path, "all")[0, 2].min() == 255 and decoded
    for cached in (tmp_path / "cache").iterdir():
        cached.write_bytes(b"damaged")
    assert data.load(str(folder), 16, tmp_path, "all").shape == first.shape


def test_bad_images_are_named(tmp_path):
    folder = picture_folder(tmp_path / "pics")
    whole = (folder / "6.jpg").read_bytes()
    for content, reason in [(whole[:len(whole) // 2], "[Tt]runcated"), (b"", "cannot identify"),
                            (b"plain text", "cannot identify")]:
        (folder / "6.jpg").write_bytes(content)
        with pytest.raises(UserError, match=rf"6\.jpg: not a readable image \(.*{reason}"):
            data.load(str(folder), 16, tmp_path)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "6.png")
    (folder / "6.jpg").unlink()
    with pytest.raises(UserError, match="6.png: I;16 pixels are not 8 bits"):
        data.load(str(folder), 16, tmp_path)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        data.load(str(tmp_path / "empty"))


def test_real_sets_load(real_data):
    images = data.load("cifar10", data_dir=real_data)
    mean = images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), atol=1e-4)
    assert data.load("imagenet", 32, real_data, "all").shape == (1000, 3, 32, 32)


# ------------------------------------------------------------------------------------- fid


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uint8_images(n, channels=3, size=20, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=gen, dtype=torch.uint8)


def random_weights(path, dims=64, seed=0, **changed):
    """Save a random state dict of the network, with the given keys replaced (None: removed)."""
    gen = torch.Generator().manual_seed(seed)
    state = {k: (torch.randn(v.shape, generator=gen) * (2 / v[0].numel()) ** 0.5 if v.ndim > 1
                 else torch.rand(v.shape, generator=gen) + 0.5)
             for k, v in fid.Inception(dims=dims).state_dict().items() if v.ndim}
    state |= {k.replace("__", "."): v for k, v in changed.items()}
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments that make the command quick: random weights, 64 dimensions."""
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    return ["--weights", str(random_weights(tmp_path / "w.pth")), "--dims", "64",
            "--device", "cpu"]


def write_folder(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return str(folder)


@pytest.mark.parametrize("dims", fid.DIMS)
def test_features_agree_with_public_implementation(real_data, dims):
    with np.load(real_data / "inception" / "reference_features.npz") as f:
        images, want = torch.from_numpy(f["images"]).permute(0, 3, 1, 2), f[f"dims_{dims}"]
    net = fid.load_inception(dims=dims, data_dir=real_data)
    n = 24 if dims < 2048 else 6   # the deepest is slow, and contains the others
    stats, got = fid.features(net, [images[:n]], keep=True)
    assert np.abs(got.numpy() - want[:n]).max() < 1e-3
    assert np.abs(got.mean(0).numpy() - want[:n].mean(0)).mean() < 1e-4 * want[:n].mean()
    assert torch.allclose(stats.mean, got.double().mean(0))
    assert net.weights_sha256 and not net.standard   # these weights are not the published file
    assert net.label == ("FID*" if dims == 2048 else f"FD-{dims}")


def test_features_do_not_depend_on_batch_size(real_data):
    with np.load(real_data / "inception" / "reference_features.npz") as f:
        images, want = torch.from_numpy(f["images"]).permute(0, 3, 1, 2), f["dims_64"]
    net = fid.load_inception(dims=64, data_dir=real_data)
    for size in (1, 7, 24):
        got = fid.features(net, images.split(size), keep=True)[1]
        assert np.abs(got.numpy() - want).max() < 1e-5


def test_distance_closed_forms():
    va, vb = randn(9).exp(), randn(9, seed=1).exp()
    ma, mb = randn(9, seed=2), randn(9, seed=3)
    want = (ma - mb).square().sum() + (va.sqrt() - vb.sqrt()).square().sum()
    got = fid.frechet_distance(ma, va.diag(), mb, vb.diag())
    assert got == pytest.approx(want.item(), rel=1e-10)
    cov = randn(9, 9) @ randn(9, 9).T
    got = fid.frechet_distance(ma, cov, mb, cov)   # equal covariances: the means alone
    assert got == pytest.approx((ma - mb).square().sum().item(), rel=1e-6)
    zero = torch.zeros(9, 9, dtype=torch.float64)
    want = (ma - mb).square().sum() + cov.trace()
    for pair in ((ma, zero, mb, cov), (ma, cov, mb, zero)):
        assert fid.frechet_distance(*pair) == pytest.approx(want.item(), rel=1e-10)
    # Rank 1: (u u^T v v^T)^1/2 has trace |u.v|.
    u, v = randn(9, seed=4), randn(9, seed=5)
    want = u.dot(u) + v.dot(v) - 2 * u.dot(v).abs()
    got = fid.frechet_distance(ma, u.outer(u), ma, v.outer(v))
    assert got == pytest.approx(want.item(), rel=1e-6)


def test_distance_against_scipy():
    x, y = randn(200, 30) @ randn(30, 30, seed=1), randn(300, 30, seed=2) + 0.3
    s, t = (np.cov(v.numpy().T) for v in (x, y))
    want = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    moments = (x.mean(0), s), (y.mean(0), t)
    assert fid.frechet_distance(*moments[0], *moments[1]) == pytest.approx(want, rel=1e-9)
    assert fid.frechet_distance(*moments[1], *moments[0]) == pytest.approx(want, rel=1e-9)
    few = randn(20, 100)   # rank-deficient
    same = few.mean(0), np.cov(few.numpy().T)
    assert 0 <= fid.frechet_distance(*same, *same) < 1e-6 * np.trace(same[1])


def test_statistics_stream_like_numpy():
    x = randn(101, 7) * 3 + 1000   # a mean far from 0, which naive sums lose digits to
    stats = fid.Statistics(7)
    for chunk in x.split(13):
        stats.add(chunk)
    assert stats.n == 101
    assert np.allclose(stats.mean, x.mean(0), rtol=1e-12)
    assert np.allclose(stats.cov, np.cov(x.numpy().T), rtol=1e-9, atol=1e-10)
    again = fid.Statistics.of(stats.mean, stats.cov, stats.n)
    assert np.allclose(again.cov, stats.cov, rtol=1e-12)
    same = fid.Statistics(7)
    same.add(x[:1].repeat(5, 1))
    assert (same.cov == 0).all()


def test_statistics_refuse():
    stats = fid.Statistics(3)
    stats.add(torch.ones(1, 3))
    with pytest.raises(UserError, match="1 image"):
        stats.cov  # noqa: B018
    with pytest.raises(UserError, match="images 1 to 4 "):
        stats.add(torch.tensor([[0.0, 1, 2]] * 3 + [[0, torch.nan, 0]]))
    assert stats.n == 1


def test_resize():
    x = uint8_images(2, 3, 11)[..., :7]
    got, grid = fid.resized(x, "tf1"), x.double().numpy()
    for i, j in ((0, 0), (17, 100), (150, 299 - 1), (298, 3)):
        a, b = i * 11 / 299, j * 7 / 299
        i0, j0 = int(a), int(b)
        i1, j1, a, b = min(i0 + 1, 10), min(j0 + 1, 6), a - i0, b - j0
        want = ((1 - a) * ((1 - b) * grid[..., i0, j0] + b * grid[..., i0, j1])
                + a * ((1 - b) * grid[..., i1, j0] + b * grid[..., i1, j1]))
        assert np.allclose(got[..., i, j], (want - 128) / 128, atol=1e-5)
    want = torch.nn.functional.interpolate(x / 255, (299, 299), mode="bilinear") * 2 - 1
    assert torch.allclose(fid.resized(x, "pytorch-fid"), want, atol=1e-6)
    assert (got - want).abs().max() > 0.01   # the half pixel between the two


def test_kid():
    x, y = randn(6, 4).float(), randn(8, 4, seed=1).float() + 0.5

    def k(a, b):
        return (float(a.double() @ b.double()) / 4 + 1) ** 3

    def mmd(x, y):
        m = len(x)
        pairs = [(i, j) for i in range(m) for j in range(m)]
        within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j)
        return within / (m * (m - 1)) - 2 * sum(k(x[i], y[j]) for i, j in pairs) / m ** 2

    gen = torch.Generator().manual_seed(3)
    values = [mmd(*(f[torch.randperm(len(f), generator=gen)[:3]] for f in (x, y)))
              for _ in range(5)]
    mean, std = fid.kid(x, y, subsets=5, subset_size=1000, seed=3)   # min(1000, 6 / 2) = 3
    assert mean == pytest.approx(np.mean(values), rel=1e-5)
    assert std == pytest.approx(np.std(values), rel=1e-5)
    same = [fid.kid(randn(400, 4, seed=s).float(), randn(400, 4, seed=s + 50).float(), 20)[0]
            for s in range(8)]
    apart = fid.kid(randn(400, 4).float(), randn(400, 4, seed=1).float() + 0.5, 20)[0]
    assert min(same) < 0 < max(same)   # unbiased: around 0, not above it
    assert abs(np.mean(same)) < 0.05 < 0.5 < apart


def test_precision_recall():
    line = torch.tensor([[float(i), 0] for i in range(6)])   # the ball of each reaches a neighbour
    fake = torch.tensor([[0.5, 0], [2.0, 0.9], [9, 0], [9, 0.1]])
    precision, recall = fid.precision_recall(line, fake, k=1)
    assert precision == 0.5                        # the two at 9 are outside
    assert recall == pytest.approx(4 / 6)          # 0, 1, 2, 3: within sqrt(1.5^2 + .9^2) = 1.75
    assert fid.precision_recall(line, line, k=1) == (1, 1)
    assert fid.precision_recall(line, line + 100, k=1) == (0, 0)
    x, y = randn(30, 5), randn(40, 5, seed=1)
    assert fid.precision_recall(x, y) == fid.precision_recall(x, y, block=7)
    with pytest.raises(UserError, match="more than 3"):
        fid.precision_recall(x[:3], y)


def test_rank_note():
    assert fid.rank_note(65, 64) is None
    assert "rank" in fid.rank_note(64, 64)


def test_two_forms():
    with torch.device("meta"):
        one, two = fid.Inception("2015"), fid.Inception("torchvision")
    names = {k for k, _ in one.named_parameters()}
    assert names == {k for k, _ in two.named_parameters()} and len(names) == 94 * 3
    assert sum(p.numel() for p in one.parameters()) == 21_785_568   # torchvision's, without heads
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.bias",
            "Mixed_6a.branch3x3.conv.weight", "Mixed_6b.branch7x7dbl_5.conv.weight",
            "Mixed_7a.branch7x7x3_4.conv.weight", "Mixed_7c.branch3x3dbl_3b.conv.weight",
            "Mixed_7c.branch_pool.bn.weight"} <= names
    assert one.Mixed_6c.branch7x7_2.conv.kernel_size == (1, 7)
    assert one.Mixed_7b.branch3x3_2b.conv.kernel_size == (3, 1)
    x = torch.ones(1, 8, 5, 5)
    pools = {}
    for pool in ("average", "average_valid", "max"):
        block = fid.Mixed(8, {"branch_pool": []}, pool)
        pools[pool] = block(x)[0, 0, 0, 0].item()
    assert pools == {"average": pytest.approx(4 / 9), "average_valid": 1, "max": 1}
    assert [(m.pool) for m in (one.Mixed_5b, one.Mixed_7b, one.Mixed_7c, two.Mixed_7c)] == \
        ["average_valid", "average_valid", "max", "average"]
    labels = {}
    for form, dims in (("2015", 2048), ("torchvision", 2048), ("2015", 64), ("torchvision", 64)):
        with torch.device("meta"):
            net = fid.Inception(form, dims)
        for sha256 in (fid.PUBLISHED["2015"][1], "0" * 64):
            net.identify(sha256)
            labels[net.id] = net.label
            assert net.standard == (net.label == "FID")
    assert list(labels.values()) == ["FID", "FID*", *["FID-tv"] * 2, *["FD-64"] * 2,
                                     *["FD-64-tv"] * 2]   # eight ids, all different


def test_forms_give_different_features(tmp_path):
    path = random_weights(tmp_path / "w.pth", dims=768)
    x = uint8_images(1)
    one, two = (fid.load_inception(f, 768, path)(x) for f in ("2015", "torchvision"))
    assert one.isfinite().all() and one.shape == (1, 768)
    assert (one - two).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("change", [{"features": "2014"}, {"dims": 100}, {"resize": "area"}])
def test_inception_refuses_unknown_forms(change):
    with pytest.raises(UserError, match="choose one"):
        fid.Inception(**change)


def test_load_is_frozen_folded_and_draws_nothing(tmp_path):
    path = random_weights(tmp_path / "w.pth")
    state = torch.get_rng_state()
    net = fid.load_inception(dims=64, weights=path)
    assert torch.equal(state, torch.get_rng_state())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    plain = fid.Inception(dims=64).eval()
    plain.load_state_dict(torch.load(path, weights_only=True), strict=False)
    x = uint8_images(2, 1)
    assert torch.allclose(net(x), plain(x), rtol=1e-4)
    assert torch.allclose(net(x), net(x.expand(-1, 3, -1, -1)), rtol=1e-5)   # grey is repeated
    with pytest.raises(ValueError, match="uint8"):
        net(x.float())


@pytest.mark.parametrize("case", ["missing", "shape", "pickle", "text", "absent", "form"])
def test_bad_weights(tmp_path, case, capsys):
    path, key = tmp_path / "w.pth", "Conv2d_2b_3x3.bn.weight"
    if case == "missing":
        random_weights(path, Conv2d_2b_3x3__bn__weight=None)
    elif case == "shape":
        random_weights(path, Conv2d_2b_3x3__bn__weight=torch.ones(5))
    elif case == "pickle":
        torch.save({key: Path("x"), "f": print}, path)
    elif case == "text":
        path.write_text("<html>not found</html>")
    elif case == "form":
        random_weights(path, fc__weight=torch.zeros(1000, 8))
    match = {"missing": key, "shape": key, "absent": "no such", "form": "1000"}.get(case, "state")
    with pytest.raises(UserError, match=match) as caught:
        fid.load_inception(dims=64, weights=path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_search_order(tmp_path, monkeypatch):
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    fetched = []
    monkeypatch.setattr(data, "download", lambda url, path, sha256: fetched.append((url, path)))
    folder = tmp_path / "inception"
    assert fid.find_weights("2015", None, tmp_path) == fetched[0][1]
    folder.mkdir()
    for name in ("b.pth", "inception_v3_google-1.pth"):
        (folder / name).touch()
    assert fid.find_weights("2015", None, tmp_path).name == "b.pth"
    assert fid.find_weights("torchvision", None, tmp_path).name == "inception_v3_google-1.pth"
    published = folder / "pt_inception-2015-12-05-6726825d.pth"
    published.touch()
    (folder / "a.pth").touch()
    assert fid.find_weights("2015", None, tmp_path) == published
    monkeypatch.setenv("FID_WEIGHTS", str(folder / "a.pth"))
    assert fid.find_weights("2015", None, tmp_path).name == "a.pth"
    assert fid.find_weights("2015", folder / "b.pth", tmp_path).name == "b.pth"
    assert len(fetched) == 1


def test_reference_cache(tmp_path, monkeypatch):
    net, images = fid.Pixels(4), uint8_images(30, 1, 8)
    assert net.dims is None
    stats, feats = fid.reference(net, images, tmp_path)
    assert feats.shape == (30, 16) == (30, net.dims)
    assert torch.allclose(feats[0, 0], images[0, 0, :2, :2].float().mean() / 255)
    calls = []
    compute = fid.features
    monkeypatch.setattr(fid, "features", lambda *a, **k: calls.append(1) or compute(*a, **k))
    again, feats2 = fid.reference(net, images, tmp_path)
    assert not calls and torch.equal(feats, feats2)
    assert torch.allclose(again.cov, stats.cov)
    changed = images.clone()
    changed[29, 0, 7, 7] ^= 1
    for other in ((net, changed), (fid.Pixels(2), images), (net, images.reshape(30, 1, 4, 16))):
        calls.clear()
        fid.reference(*other, tmp_path)
        assert calls
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(file.read_bytes()[:200])
    calls.clear()
    assert torch.equal(fid.reference(net, images, tmp_path)[1], feats) and calls


def test_score():
    net, images = fid.Pixels(), uint8_images(40, 1, 8)
    ref = fid.features(net, [images], keep=True)
    row = fid.score(net, *ref, images.split(7), prc=True)
    assert list(row) == ["fid", "n_fid", "kid", "kid_std", "precision", "recall"]
    assert row["fid"] < 1e-6 and row["n_fid"] == 40 and row["precision"] == 1
    far = fid.score(net, ref[0], None, [images // 4], with_kid=False)
    assert set(far) == {"fid", "n_fid"} and far["fid"] > 1


def test_command_sources_agree(tmp_path, tiny, capsys):
    a, b = uint8_images(6), uint8_images(5, seed=1) // 2
    folder, other = write_folder(tmp_path / "a", a), write_folder(tmp_path / "b", b)
    np.save(tmp_path / "last.npy", a.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "first.npy", a.numpy())
    stats = str(tmp_path / "a.npz")
    fid.main([folder, "--save-stats", stats, *tiny])
    want = fid.main([folder, other, "--batch", "4", *tiny])["fid"]
    assert want > 0.01
    for source in (tmp_path / "last.npy", tmp_path / "first.npy", stats):
        assert fid.main([str(source), other, *tiny])["fid"] == pytest.approx(want, rel=1e-5)
    assert fid.main([folder, folder, *tiny])["fid"] < 1e-6
    assert fid.main([stats, stats])["fid"] < 1e-6   # no network is needed for two files
    capsys.readouterr()
    row = fid.main([folder, other, "--n", "5", "--kid", "--prc", "--json", *tiny])
    out, err = capsys.readouterr()
    assert json.loads(out) == row
    assert list(row) == ["fid", "kid", "kid_std", "precision", "recall", "n_a", "n_b", "features",
                         "dims", "resize", "standard", "weights_sha256", "seconds"]
    assert (row["n_a"], row["n_b"], row["dims"], row["standard"]) == (5, 5, 64, False)
    assert "rank" in err
    mixed = fid.main([write_folder(tmp_path / "c", [*a, *uint8_images(3, size=9)]), other, *tiny])
    assert mixed["n_a"] == 9


def test_command_with_data_set(real_data, tiny, capsys):
    row = fid.main(["cifar10", "cifar10", "--split", "test", "--n", "4", *tiny,
                    "--data-dir", str(real_data)])
    assert row["n_b"] == 4 and row["fid"] < 1e-6 and row["kid"] is None
    assert capsys.readouterr().out.startswith("FD-64 ")


def test_command_refuses(tmp_path, tiny):
    folder = write_folder(tmp_path / "a", uint8_images(2))
    eye, mu = np.eye(64), np.zeros(64)
    bad = {"keys": {"mean": mu}, "shape": {"mu": mu, "sigma": eye[:5]},
           "object": {"mu": np.array([None]), "sigma": eye},
           "nan": {"mu": mu * np.nan, "sigma": eye},
           "skew": {"mu": mu, "sigma": np.triu(np.ones((64, 64)))},
           "dims": {"mu": mu[:9], "sigma": eye[:9, :9]},
           "id": {"mu": mu, "sigma": eye, "id": "inception-2015-64-tf1-0"}}
    match = {"keys": "must hold mu", "shape": r"\(5, 64\)", "object": "plain arrays",
             "nan": "finite", "skew": "symmetric", "dims": "dimensions", "id": "different"}
    for case, arrays in bad.items():
        np.savez(tmp_path / f"{case}.npz", **arrays)
        with pytest.raises(UserError, match=match[case]):
            fid.main([folder, str(tmp_path / f"{case}.npz"), *tiny])
    np.savez(tmp_path / "fine.npz", mu=mu, sigma=eye, n=mu)   # an n of no use is left out
    assert fid.load_stats(tmp_path / "fine.npz")[2:] == (None, None)
    np.save(tmp_path / "float.npy", np.zeros((4, 8, 8, 3)))
    (tmp_path / "text.npy").write_text("no")
    for argv, text in [
        ([folder, str(tmp_path / "fine.npz"), "--kid"], "not statistics"),
        ([folder, str(tmp_path / "nowhere")], "no such file"),
        ([folder], "B is missing"), ([folder, folder, "--n", "1"], "at least 2"),
        ([folder, str(tmp_path / "float.npy")], "must be uint8"),
        ([folder, str(tmp_path / "text.npy")], "not a readable"),
        ([folder, "--save-stats", str(tmp_path / "x.txt")], r"\*\.npz"),
    ]:
        with pytest.raises(UserError, match=text):
            fid.main([*argv, *tiny])
    one = write_folder(tmp_path / "one", uint8_images(1))
    with pytest.raises(UserError, match="at least 2"):
        fid.main([folder, one, *tiny])


def test_command_exit_code(tmp_path):
    (tmp_path / "w.pth").write_text("no weights")
    folder = write_folder(tmp_path / "a", uint8_images(2))
    run = subprocess.run([sys.executable, fid.__file__, folder, folder, "--weights",
                          str(tmp_path / "w.pth")], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("fid.py: error: ") and run.stderr.count("\n") == 1


# --------------------------------------------------------------------------------- geometry


EIGHT = np.ones((3, 3), int)
SETTINGS = [(32, 8), (16, 4)]


def squares(size, side, *boxes):
    """One image (1, 1, H, W) in [-1, 1]; a box is (row, column) or (row, column, height, width)."""
    x = torch.full((1, 1, size, size), -1.0)
    for row, column, *shape in boxes:
        height, width = shape or (side, side)
        x[..., max(row, 0):row + height, max(column, 0):column + width] = 1
    return x


def scipy_exact(m, side):
    """(n, clean) of one bool image, component by component."""
    labels, found = ndimage.label(m, EIGHT)
    perfect = 0
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        full = (labels[rows, columns] == i).sum() == side ** 2
        perfect += full and rows.stop - rows.start == columns.stop - columns.start == side
    return perfect, perfect == found


def scipy_count(m, side):
    """(n, clean) of one bool image as geometry.count defines it, component by component."""
    thick = side // 4 + 1
    opened = ndimage.binary_opening(m, np.ones((thick, thick)))
    labels, found = ndimage.label(opened, EIGHT)
    padded, n = np.pad(opened, 1), 0
    for rows, columns in ndimage.find_objects(labels):
        held = opened[rows, columns]
        around = padded[rows.start:rows.stop + 2, columns.start:columns.stop + 2]
        n += (all(abs(length - side) <= 1 for length in held.shape)
              and around.sum() == held.sum() and held.any(0).all() and held.any(1).all()
              and held.mean() >= 0.8 and abs(held.sum() - side ** 2) <= 0.3 * side ** 2)
    stray = (m & ~ndimage.binary_dilation(opened, EIGHT)).sum()
    return n, n == found and stray <= side ** 2 / 4


def edge_pixels(x):
    """The lit pixels next to a dark one, and the dark ones next to a lit one."""
    m = (F.pad(x, (1,) * 4) > 127).float()
    return F.max_pool2d(m, 3, 1) != -F.max_pool2d(-m, 3, 1)


def flip(x, where, share, seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.where(where & (torch.rand(x.shape, generator=gen) < share), 255 - x, x)


def mixed_images(n, size, side):
    """About n images: valid, touching, overlapping, cut off, noisy, blobs; uint8."""
    gen, part = torch.Generator().manual_seed(5), n // 8
    anywhere = torch.randint(-side, size, (2 * part, 3, 2), generator=gen)
    near = torch.randint(0, size - 2 * side, (2 * part, 1, 2), generator=gen)
    near = near + torch.tensor([[0, 0], [side, 0]])
    near[:, 1] += torch.randint(-2, 3, (2 * part, 2), generator=gen)
    blobs = F.avg_pool2d(torch.randn(part, 1, size + 4, size + 4, generator=gen), 5, 1)
    valid = torch.cat([geometry.draw(part // 2, k, size, side, seed=k) for k in (1, 2, 3, 4)])
    all_of = torch.ones_like(valid, dtype=torch.bool)
    return torch.cat([
        valid, geometry.render(anywhere, size, side), geometry.render(near, size, side),
        flip(valid, edge_pixels(valid), 0.02, 1), flip(valid[::2], all_of[::2], 0.01, 2),
        (blobs > 0.15).to(torch.uint8) * 255])


@pytest.mark.parametrize("size, side", SETTINGS)
@pytest.mark.parametrize("k", range(5))
def test_draw_has_k_separate_squares(k, size, side):
    x = geometry.draw(200, k, size, side, seed=k)
    assert x.shape == (200, 1, size, size) and x.dtype == torch.uint8
    assert set(x.unique().tolist()) <= {0, 255}
    assert all(ndimage.label(m, EIGHT)[1] == k for m in x[:, 0].numpy())
    assert (x > 0).sum((1, 2, 3)).eq(k * side ** 2).all()
    for counter in (geometry.count, geometry.count_exact):
        for images in (x, x.float() / 127.5 - 1):
            n, clean = counter(images, side)
            assert n.dtype == torch.int64 and n.eq(k).all() and clean.all()


def test_draw_keeps_the_gap_and_repeats():
    gen = torch.Generator().manual_seed(0)
    at = geometry.place(3000, 2, 16, 4, 3, gen)
    distance = (at[:, 0] - at[:, 1]).abs().amax(1)
    assert distance.min() == 7 and at.min() == 0 and at.max() == 12      # 4 + 3, and all of it
    assert torch.equal(geometry.draw(9, 2, seed=3), geometry.draw(9, 2, seed=3))
    assert not torch.equal(geometry.draw(9, 2, seed=3), geometry.draw(9, 2, seed=4))


def test_draw_is_uniform():
    x = geometry.draw(40000, 2, size=6, side=2)
    at = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    apart = (at[:, None] - at).abs().amax(2) >= 3
    times = torch.unique(geometry.pack(x), dim=0, return_counts=True)[1].double()
    assert len(times) == apart.sum() / 2 == 132
    assert stats.chisquare(times.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("wrong, message", [
    ({"k": 10}, "at most 9"), ({"k": -1}, "k is -1"), ({"side": 33}, "at most 0"),
    ({"side": 0}, "side is 0"), ({"size": 0}, "size is 0"), ({"gap": 0}, "gap is 0"),
    ({"n": 0}, "n is 0"), ({"k": 1.5}, "integer"), ({"k": 9}, "dense")])
def test_draw_refuses_what_cannot_be(wrong, message):
    with pytest.raises(UserError, match=message):
        geometry.draw(**{"n": 500, "k": 2, **wrong})


def test_draw_reaches_the_limit_where_it_can():
    assert geometry.count_exact(geometry.draw(3, 4, size=18))[0].tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="at most 4"):
        geometry.draw(3, 5, size=18)
    with pytest.raises(UserError, match="at most 4"):
        geometry.draw_pairs(3, size=18, k=4)
    with pytest.raises(UserError):
        geometry.draw_pairs(3, k=0)


@pytest.mark.parametrize("k, size, side", [(2, 32, 8), (3, 32, 8), (1, 16, 4), (2, 16, 4)])
def test_pairs_combine_to_one_less_and_one_more(k, size, side):
    x, y, x_and, x_or = geometry.draw_pairs(300, size, side, k=k)
    assert torch.equal(x_and, torch.minimum(x, y)) and torch.equal(x_or, torch.maximum(x, y))
    assert (x != y).flatten(1).any(1).all()
    for images, number in ((x, k), (y, k), (x_and, k - 1), (x_or, k + 1)):
        assert all(scipy_exact(m > 0, side) == (number, True) for m in images[:, 0].numpy())


def test_pack_tells_images_apart():
    x = torch.cat([geometry.draw(300, 2, 10, 2), geometry.draw(300, 0, 10, 2)])
    assert geometry.pack(x).shape == (600, 13) and geometry.pack(x).dtype == torch.uint8
    assert np.array_equal(geometry.pack(x).numpy(),
                          np.packbits(x.flatten(1).numpy() > 127, axis=1))
    rows = [m.numpy().tobytes() for m in x]
    assert geometry.count_distinct(x) == len(set(rows)) < 600
    known = x[:100].float() / 127.5 - 1
    assert geometry.is_in(x, known).tolist() == [row in set(rows[:100]) for row in rows]


@pytest.mark.parametrize("size, side", SETTINGS)
def test_count_exact_equals_scipy(size, side):
    x = mixed_images(5000, size, side)
    n, clean = geometry.count_exact(x, side)
    expected = [scipy_exact(m > 127, side) for m in x[:, 0].numpy()]
    assert torch.stack([n, clean], 1).tolist() == np.array(expected, int).tolist()
    assert {0, 1, 2, 3, 4} <= set(n.tolist()) and 0.2 < clean.float().mean() < 0.8


@pytest.mark.parametrize("size, side", SETTINGS)
def test_count_equals_scipy(size, side):
    x = mixed_images(2000, size, side)
    n, clean = geometry.count(x, side)
    expected = [scipy_count(m > 127, side) for m in x[:, 0].numpy()]
    assert torch.stack([n, clean], 1).tolist() == np.array(expected, int).tolist()
    assert {0, 1, 2, 3, 4} <= set(n.tolist()) and 0.2 < clean.float().mean() < 0.9
    one_by_one = [geometry.count(image[None], side) for image in x[::50]]
    assert torch.equal(torch.cat([n for n, _ in one_by_one]), n[::50])
    assert torch.equal(torch.cat([c for _, c in one_by_one]), clean[::50])


A, B = (2, 2), (20, 18)                                              # two good squares, 32 px


@pytest.mark.parametrize("boxes, tolerant, exact", [
    ([], (0, True), (0, True)),
    ([(0, 0), (24, 24)], (2, True), (2, True)),                      # in the corners
    ([A, (2, 11)], (2, True), (2, True)),                            # a gap of one
    ([A, (2, 10)], (0, False), (0, False)),                          # touching
    ([A, (10, 10)], (0, False), (0, False)),                         # at a corner
    ([A, (11, 11)], (2, True), (2, True)),                           # not quite
    ([A, (6, 6)], (0, False), (0, False)),                           # overlapping
    ([A, (3, 2)], (1, True), (0, False)),                            # coinciding up to a pixel
    ([A, (*B, 7, 9)], (2, True), (1, False)),
    ([(*A, 7, 7), (*B, 9, 9)], (2, True), (0, False)),
    ([A, (*B, 8, 10)], (1, False), (1, False)),                      # two pixels too long
    ([A, (*B, 8, 6)], (1, False), (1, False)),
    ([A, (20, -1)], (2, True), (1, False)),                          # cut off by the border
    ([A, (20, -2)], (1, False), (1, False)),
    ([A, B, (26, 3, 1, 2)], (2, True), (2, False)),                  # a speck
    ([A, B, (26, 3, 3, 3)], (2, False), (2, False)),                 # a blob
    ([A, B, (20, 3, 4, 8)], (2, False), (2, False)),                 # half a square
    ([A, B, (30, 0, 2, 8)], (2, True), (2, False)),                  # a line of a quarter square
    ([A, B, (30, 0, 2, 9)], (2, False), (2, False)),                 # of more than that
    ([A, (2, 11), (5, 10, 1, 1)], (2, True), (0, False)),            # a bridged gap
    ([A, (2, 11), (5, 10, 3, 1)], (0, False), (0, False)),
    ([A, B, (4, 20)], (3, True), (3, True)),
    ([(0, 0, 32, 32)], (0, False), (0, False)),
])
def test_counters_by_definition(boxes, tolerant, exact):
    x = squares(32, 8, *boxes)
    for counter, expected in ((geometry.count, tolerant), (geometry.count_exact, exact)):
        n, clean = counter(x)
        assert (n.item(), clean.item()) == expected


def test_count_wants_a_square_not_a_ring_or_two_bars():
    for hole, expected in [((4, 4, 1, 1), 1), ((4, 4, 4, 4), 0), ((2, 5, 8, 1), 0)]:
        x = squares(32, 8, A)
        row, column, height, width = hole
        x[..., row:row + height, column:column + width] = -1
        assert geometry.count(x)[0].item() == expected, hole


@pytest.mark.parametrize("size, side, share, least", [(32, 8, 0.01, 0.99), (32, 8, 0.05, 0.99),
                                                      (16, 4, 0.01, 0.99)])
def test_count_sees_two_squares_with_ragged_edges(size, side, share, least):
    x = geometry.draw(2000, 2, size, side, seed=1)
    n, clean = geometry.count(flip(x, edge_pixels(x), share, 0), side)
    assert ((n == 2) & clean).float().mean() >= least
    half = side // 2                             # a pixel less cannot part what half a side joins
    at = torch.tensor([[[side, side], [2 * side, side + i]] for i in range(-half, half + 1)])
    touching = geometry.render(at, size, side).repeat(50, 1, 1, 1)
    n, clean = geometry.count(flip(touching, edge_pixels(touching), share, 0), side)
    assert not ((n == 2) & clean).any()


def test_counters_refuse_what_they_cannot_count():
    for counter in (geometry.count, geometry.count_exact):
        for wrong in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32)):
            with pytest.raises(ValueError, match="must be"):
                counter(wrong)
        with pytest.raises(ValueError, match="side"):
            counter(torch.zeros(2, 1, 16, 16), side=17)
    with pytest.raises(ValueError, match="count_exact"):
        geometry.count(torch.zeros(2, 1, 16, 16), side=3)
    with pytest.raises(ValueError, match="corners"):
        geometry.render(torch.zeros(2, 2), 16, 4)


# -------------------------------------------------------------------------------- exp_pcr_natural


def test_pcr_natural_smoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = list(exp_pcr_natural.ARMS)
    args = ["--dataset", "geometry", "--smoke", "--data-dir", str(tmp_path / "d"), "--arms", *arms]
    result = exp_pcr_natural.main(args)
    assert [r["arm"] for r in result["rows"]] == arms
    for row in result["rows"]:
        assert {"dataset", "model", "arm", "seed", "best_fid", "best_step", "fid_curve", "kid",
                "n_fid", "split"} <= set(row) and len(row["fid_curve"]) == 2
        assert row["best_fid"] == min(p[2] for p in row["fid_curve"])
        assert row["end_fid"] == row["fid_curve"][-1][2] and row["end_score"] == row["score"]
        assert row["contrast_real"] > row["contrast_average"] > 0 < row["contrast"] < 128
    folder = tmp_path / "runs" / "exp_pcr_natural" / "geometry-wgangp-smoke"
    assert json.loads((folder / "result.json").read_text())["rows"] == result["rows"]
    for name in ("config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "samples/0000004.png"):
        assert (folder / "geometry-wgangp-pcr-s0" / name).exists()
    (folder / "figure.png").unlink()
    exp_pcr_natural.main(["--plot", str(folder)])
    assert Image.open(folder / "figure.png").width > 500
    with pytest.raises(UserError, match="--resume"):
        exp_pcr_natural.main(args)
    assert exp_pcr_natural.main([*args, "--resume"])["rows"] == result["rows"]
    out = tmp_path / "grid.png"
    exp_pcr_natural.main(["--sample", str(folder / "geometry-wgangp-pcr-s0" / "best.pt"), "--n",
                          "4", "--out", str(out)])
    assert out.exists()


def test_contrast_is_the_standard_deviation_of_pixels():
    x = torch.tensor([[0, 200], [100, 100]], dtype=torch.uint8).view(2, 1, 1, 2)
    assert exp_pcr_natural.contrast(x) == pytest.approx((20000 ** 0.5 + 0) / 2)


def test_matched_averages_have_the_contrast_of_their_parents():
    x = 0.5 * torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.25
    comb, average = exp_pcr_natural.matched(x), (x + x.roll(1, 0)) / 2
    std = x.flatten(1).std(1)
    assert torch.allclose(comb.flatten(1).std(1), (std + std.roll(1)) / 2, rtol=1e-4)
    assert torch.allclose(comb.flatten(1).mean(1), average.flatten(1).mean(1), atol=1e-5)
    assert exp_pcr_natural.matched(torch.ones(2, 1, 4, 4)).eq(1).all()     # nothing to stretch
    assert exp_pcr_natural.matched(4 * x).abs().max() <= 1


def test_figure_has_a_grid_for_each_arm(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(harness, "save_figure", lambda fig, folder: kept.append(fig))
    exp_pcr_natural.main(["--dataset", "geometry", "--smoke", "--data-dir", str(tmp_path / "d"),
                          "--arms", *exp_pcr_natural.ARMS, "--outdir", str(tmp_path)])
    assert sum(len(ax.images) for ax in kept[0].get_axes()) == len(exp_pcr_natural.ARMS)


def test_a_resumed_run_names_all_its_commits(tmp_path, monkeypatch):
    for commit in ("one", "two", "two"):
        monkeypatch.setattr(harness, "git_hash", lambda commit=commit: commit)
        harness.open_run(tmp_path / "run", {"steps": 1}, resume=True)
    result = harness.write_result(tmp_path / "run", "s", argparse.Namespace(preset="cpu"),
                                  torch.device("cpu"), 0, [], {})
    assert result["git"] == ["one", "two"]


@pytest.mark.parametrize("model", ["lsgan", "sagan"])
def test_pcr_natural_smoke_on_pictures(tmp_path, monkeypatch, model):
    monkeypatch.setattr(exp_pcr_natural.fid, "load_inception",
                        lambda **kw: exp_pcr_natural.fid.Pixels())
    result = exp_pcr_natural.main(
        ["--dataset", str(picture_folder(tmp_path / "pics")), "--model", model, "--smoke",
         "--outdir", str(tmp_path), "--split", "all", "--n-real", "8", "--ema-beta", "0.5",
         "--data-dir", str(tmp_path / "d"), "--end-dims", "192"])
    assert len(result["rows"]) == 2 and all("best_fid_ema" in r for r in result["rows"])
    # the same features here, so that the second score, of the last G, equals the curve's end
    assert all(r["end_fid"] == pytest.approx(r["fid_curve"][-1][2]) for r in result["rows"])


@pytest.mark.parametrize("script", [exp_sc, exp_pixel_combination])
@pytest.mark.parametrize("args, message", [
    (["--batch", "1000000"], "--batch 1000000"), (["--size", "48"], "power of two"),
    (["--size", "8"], "at least 16"),
    (["--lr-g", "-1"], "--lr-g is -1"), (["--arms", "none"], "invalid choice: 'none'"),
])
def test_mistakes_in_the_geometry_scripts(tmp_path, monkeypatch, capsys, script, args, message):
    assert message in mistake(script, args, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("args, message", [
    (["--dataset", "cifar10", "--data-dir", "none"], "cifar-10-binary.tar.gz"),
    (["--dataset", "nowhere"], "nowhere does not exist"),
    (["--dataset", "geometry", "--batch", "100000"], "--batch 100000"),
    (["--dataset", "geometry", "--steps", "0"], "--steps is 0"),
    (["--dataset", "geometry", "--beta1", "1.5"], "--beta1 is 1.5"),
    (["--dataset", "geometry", "--base", "3"], "--base 3"),
    (["--dataset", "geometry", "--size", "48"], "power of two"),
    (["--dataset", "geometry", "--checks", "0"], "--checks is 0"),
    (["--dataset", "geometry", "--batch", "1"], "--batch is 1"),
    (["--dataset", "geometry", "--n-real", "1"], "--n-real 1"),
    (["--dataset", "geometry", "--steps", "4", "--d-steps", "4"], "give one of them"),
    (["--plot", "."], "no finished run of exp_pcr_natural.py"),
    (["--model", "gan"], "invalid choice: 'gan'"),
    (["--stepz", "3"], "unrecognized arguments: --stepz"),
    (["--dataset", "geometry", "--device", "cuda:99"], "not on this machine"),
    (["--arch", "resnet", "--model", "sagan"], "goes with --model wgangp"),
    (["--sample", "none.pt"], "none.pt does not exist"),
])
def test_mistakes_of_the_user(tmp_path, monkeypatch, capsys, no_network, args, message):
    assert message in mistake(exp_pcr_natural, args, tmp_path, monkeypatch, capsys)


def mistake(script, args, tmp_path, monkeypatch, capsys):
    """The last line on stderr of a command that ends in exit code 2 and writes nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        harness.cli(lambda: script.main(["--smoke", *args]))
    assert stopped.value.code == 2 and list(tmp_path.iterdir()) == []
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    result = run_script("exp_pcr_natural.py", "--smoke", "--dataset", "nowhere", cwd=tmp_path)
    assert result.stderr == "exp_pcr_natural.py: error: nowhere does not exist\n"
    assert result.returncode == 2 and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------ exp_sc and exp_pixel_combination


def sc_config(**changes):
    return config(size=16, n_train=64, n_cover=300, batch=8, sc_counter="exact", arm="sc+pcr",
                  **changes)


def test_sc_discards_exactly_the_correct_fakes():
    cfg = sc_config()
    batch = core.to_float(torch.cat([geometry.draw(2, k, 16, 4, seed=k) for k in (0, 1, 2, 3)]))
    hooks = exp_sc.hooks(cfg, None)
    same, weight = hooks["correct"](None, batch)
    assert torch.equal(same, batch)
    torch.testing.assert_close(weight, torch.tensor([1, 1, 1, 1, 0, 0, 1, 1]) * 8 / 6)


def test_counting_is_a_small_part_of_a_step():
    cfg = argparse.Namespace(**{**vars(sc_config()), "size": 32, "width": 32, "batch": 64})
    trainer = core.Trainer(cfg, geometry.draw(64, 2), torch.device("cpu"))
    x = core.to_float(geometry.draw(64, 2, seed=1))

    def best(f):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)

    step = best(trainer.update)
    assert best(lambda: geometry.count(x)) < 0.2 * step
    assert best(lambda: geometry.count_exact(x)) < 0.05 * step


def test_pcr_draws_the_exact_and_and_or():
    cfg = sc_config()
    images, pool = exp_sc.training_set(cfg)
    assert (geometry.count_exact(images, 4)[0] == 2).all() and len(images) == len(pool) == 64
    trainer = core.Trainer(cfg, images, torch.device("cpu"), **exp_sc.hooks(cfg, pool))
    n, clean = geometry.count_exact(trainer.combine(trainer, trainer.real()), 4)
    assert clean.all() and set(n.tolist()) <= {1, 3} and len(n) == 8
    assert [exp_sc.hooks(sc_config() if a == "sc+pcr" else argparse.Namespace(
        **{**vars(cfg), "arm": a}), pool)["combine"] is not None for a in exp_sc.ARMS] == [
        False, True, False, True]


def test_coverage_against_brute_force(monkeypatch):
    cfg = sc_config()
    images, _ = exp_sc.training_set(cfg)
    fresh = geometry.draw(250, 2, 16, 4, seed=9)
    wrong = geometry.draw(30, 3, 16, 4, seed=3)
    samples = torch.cat([fresh, images[:20], wrong])
    monkeypatch.setattr(core, "generate", lambda *a, **k: samples.split(64))
    row, pairs = exp_sc.coverage(None, cfg, images, n_show=20)
    shown = {p.tobytes() for p in pairs[:, 0].numpy()}
    flat_s, distances = samples.flatten(1).int(), []
    for image, nearest in pairs:
        apart = ((flat_s - image.flatten().int()) != 0).sum(1)
        distances.append(apart.min().item())
        assert (nearest != image).sum() == apart.min()
    known = {x.numpy().tobytes() for x in images}
    right = [x.numpy().tobytes() for x in samples[:270]]
    assert row["coverage_exact"] == distances.count(0) and row["coverage_n"] == len(shown) == 20
    assert row["distinct"] == len(set(right)) and row["distinct_train"] == len(known)
    assert row["unseen_share"] == pytest.approx(sum(x not in known for x in right) / 270)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sc_smoke(tmp_path, jobs):
    result = exp_sc.main(["--smoke", "--outdir", str(tmp_path), "--jobs", jobs,
                          "--arms", "vanilla", "sc+pcr"])
    folder = tmp_path / "exp_sc" / "geometry-smoke"
    for row in result["rows"]:
        assert {"arm", "seed", "steps", "correct", "correct_exact", "hist", "coverage_exact",
                "coverage_n", "distinct", "unseen_share"} <= set(row)
        assert sum(row["hist"]) == pytest.approx(1) and row["steps"] == 4
    assert [r["arm"] for r in result["rows"]] == ["vanilla", "sc+pcr"]
    (folder / "figure.png").unlink()
    exp_sc.main(["--plot", str(folder)])
    assert Image.open(folder / "figure.png").width > 1000


def test_toy_scores_by_hand():
    cfg = argparse.Namespace(size=16, seed=3, n_fid=8, z_dim=2)
    known = exp_pixel_combination.images_of(cfg)
    assert geometry.count_exact(known, 4)[0].tolist() == [3, 3, 2, 4]

    class Net(torch.nn.Linear):
        def forward(self, x):
            pick = known[[0, 0, 0, 1, 2, 3, 3, 3]]
            return core.to_float(torch.cat([pick, pick * 0])[:len(x)])

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))

    trainer = argparse.Namespace(G=Net(2, 2), D=Mean())
    row = exp_pixel_combination.scorer(cfg, known, torch.device("cpu"))(trainer)
    expected = {"share_a": 3, "share_b": 1, "share_and": 1, "share_or": 3, "share_2": 1,
                "share_3": 4, "share_4": 3}
    assert {k: row[k] * 8 for k in expected} == expected
    assert row["d_a"] == pytest.approx(2 * 3 / 16 - 1, abs=1e-3)        # three squares of 16 px
    assert row["d_or"] == pytest.approx(2 * 4 / 16 - 1, abs=1e-3)
    assert row["d_three"] == pytest.approx(2 * 3 / 16 - 1, abs=1e-3)


def test_pixel_combination_smoke(tmp_path):
    result = exp_pixel_combination.main(["--smoke", "--outdir", str(tmp_path), "--seeds", "0"])
    for row in result["rows"]:
        assert {"arm", "seed", "step", "share_2", "share_3", "share_4", "share_a", "share_b",
                "share_and", "share_or", "d_real", "d_and", "d_or", "d_random"} <= set(row)
    assert [(r["arm"], r["step"]) for r in result["rows"]] == [
        ("vanilla", 2), ("vanilla", 4), ("pcr", 2), ("pcr", 4)]
    assert (tmp_path / "exp_pixel_combination" / "geometry-smoke" / "figure.png").exists()


def one_run(cfg, folder):
    """A run of run_all, in a process of its own."""
    if cfg.fails:
        raise UserError("broken on purpose")
    row = {"threads": torch.get_num_threads(), "name": folder.name}
    harness.write_json(folder / "row.json", row)


def test_runs_side_by_side(tmp_path):
    cells = [(argparse.Namespace(fails=False), tmp_path / name) for name in "abc"]
    rows = harness.run_all(one_run, cells, 2, torch.device("cpu"))
    assert [r["name"] for r in rows] == ["a", "b", "c"]
    assert {r["threads"] for r in rows} == {max(1, os.cpu_count() // 2)}
    bad = [(argparse.Namespace(fails=f), tmp_path / n) for f, n in ((True, "d"), (False, "e"))]
    with pytest.raises(UserError, match="failed.*: d; --resume"):
        harness.run_all(one_run, bad, 2, torch.device("cpu"))
    assert (tmp_path / "e" / "row.json").exists()
    bad = [(argparse.Namespace(fails=f), tmp_path / n) for f, n in ((True, "f"), (False, "g"))]
    with pytest.raises(UserError, match="failed.*: f; --resume"):       # one after the other too
        harness.run_all(one_run, bad, 1, torch.device("cpu"))
    assert (tmp_path / "g" / "row.json").exists()


# ------------------------------------------------------- exp_pixel_combination.py, photographs


def brute_pairs(queries, images, own=None):
    """Distances of each query to the nearest average and the nearest image, by all of them."""
    q, a = (x.double().flatten(1) for x in (queries, images))
    out = []
    for i, x in enumerate(q):
        left = [j for j in range(len(a)) if own is None or j != own[i]]
        pairs = {(j, k): (x - (a[j] + a[k]) / 2).norm().item()
                 for j, k in itertools.combinations(left, 2)}
        out.append((min(pairs.values()), min((x - a[j]).norm().item() for j in left), pairs))
    return out


@pytest.mark.parametrize("n, shape, block, limit", [
    (5, (1, 2, 2), 512, None), (17, (3, 4, 4), 5, 7), (30, (1, 8, 8), 7, None), (24, (10,), 8, 64),
    (41, (3, 5, 5), 40, 10 ** 9), (12, (2, 3, 3), 1, 1),
])
@pytest.mark.parametrize("leave_out", [False, True])
def test_pair_search_equals_brute_force(n, shape, block, limit, leave_out):
    gen = torch.Generator().manual_seed(n)
    images = 0.3 * torch.randn(n, *shape, generator=gen) + 5     # far from the origin
    images[-1] = images[0]                                       # a duplicate
    queries = torch.cat([images[:3], (images[1:2] + images[2:3]) / 2,
                         5 + torch.randn(6, *shape, generator=gen)])
    own = torch.tensor([0, 1, 2, 1, *[n - 1] * 6]) if leave_out else None
    pairs, d_pair = exp_pixel_combination.nearest_pair(queries, images, own, block, limit)
    image, d_image = exp_pixel_combination.nearest_image(queries, images, own, block)
    for i, (best, nearest, each) in enumerate(brute_pairs(queries, images, own)):
        assert d_pair[i].item() == pytest.approx(best, rel=1e-5, abs=2e-3)
        assert d_pair[i].item() == pytest.approx(each[tuple(pairs[i].tolist())], rel=1e-9, abs=1e-9)
        assert d_image[i].item() == pytest.approx(nearest, rel=1e-5, abs=2e-3)
        if leave_out:
            assert own[i] not in (*pairs[i], image[i])
    if not leave_out:
        assert pairs[3].tolist() == [1, 2] and d_pair[3] < 1e-5   # the average itself
        assert pairs[0].tolist() == [0, n - 1] and d_pair[0] == d_image[0] == 0


def test_pair_search_of_pictures_and_its_blocks():
    images, queries = uint8_images(60, 3, 8), uint8_images(9, 3, 8, seed=1)
    queries[0] = exp_pixel_combination.average(images[3], images[50])
    whole = exp_pixel_combination.nearest_pair(queries, images)
    assert whole[0][0].tolist() == [3, 50] and whole[1][0] < 0.5 / 127.5 * 192 ** 0.5
    for block, limit in ((1, 1), (7, 100), (32, 5000), (60, None)):
        pairs, d = exp_pixel_combination.nearest_pair(queries, images, None, block, limit)
        assert torch.equal(pairs, whole[0]) and torch.equal(d, whole[1])
    best = [b for b, *_ in brute_pairs(core.to_float(queries), core.to_float(images))]
    assert whole[1].tolist() == pytest.approx(best, rel=1e-6)


def test_pair_search_holds_no_matrix_of_pairs():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            out = call(*args, **kwargs or {})
            if torch.is_tensor(out):
                self.largest = max(self.largest, out.numel())
            return out

    with Watch() as watch:
        pairs, _ = exp_pixel_combination.nearest_pair(
            torch.randn(40, 5), torch.randn(300, 5), None, 16, 2048)
    assert watch.largest == 40 * 300 and len(pairs) == 40          # and not 300 * 299 / 2


def test_search_counts_by_hand():
    images = torch.tensor([0, 100, 200, 240], dtype=torch.uint8).view(4, 1, 1, 1).expand(
        4, 1, 2, 2).contiguous()
    queries = torch.tensor([150, 201, 50, 221], dtype=torch.uint8).view(4, 1, 1, 1).expand(
        4, 1, 2, 2).contiguous()
    row, kept = exp_pixel_combination.search(queries, images, torch.device("cpu"))
    assert row["nearer_average"] == 0.75                          # 201 is next to the image 200
    unit = 2 / 127.5                                              # L2 of one grey level, 4 px
    assert (kept["d_pair"] / unit).tolist() == pytest.approx([0, 19, 0, 1], abs=1e-4)
    assert (kept["d_image"] / unit).tolist() == pytest.approx([50, 1, 50, 19], abs=1e-4)
    assert row["ratio"] == pytest.approx(20 / 120, abs=1e-6)
    shown = kept["shown"][:, :4, 0, 0, 0].tolist()                 # image, average, its parents
    assert sorted(shown[:2]) == [[50, 50, 0, 100], [150, 150, 100, 200]]
    near, _ = exp_pixel_combination.nearest_image(images, images, torch.arange(4))
    assert near.tolist()[::3] == [1, 2]


def test_gam_by_hand():
    grey = torch.tensor([0, 10, 100, 104, 255], dtype=torch.uint8).view(5, 1, 1, 1)
    images = grey.expand(5, 3, 2, 2).contiguous()
    pairs = exp_pixel_combination.similar_pairs(images, 5)
    assert pairs.tolist() == [[0, 1], [2, 3], [3, 4]]              # each once, nearest neighbours
    assert exp_pixel_combination.similar_pairs(images, 2).tolist() == [[0, 1], [2, 3]]
    made = exp_pixel_combination.average(*images[pairs.T])
    assert made.dtype == torch.uint8 and made.shape == (3, 3, 2, 2)
    assert made[:, 0, 0, 0].tolist() == [5, 102, 180]              # 179.5 to the even one


@pytest.mark.parametrize("n, channels, size", [(2, 1, 8), (9, 3, 16)])
def test_views_have_the_same_distance(n, channels, size):
    x = core.to_float(uint8_images(n, channels, size))
    made = exp_pixel_combination.same_distance(x, torch.Generator().manual_seed(0))
    wanted = ((x.roll(1, 0) - x) / 2).flatten(1).norm(dim=1)
    for y in made:
        assert y.shape == x.shape
        assert torch.allclose((y - x).flatten(1).norm(dim=1), wanted, rtol=1e-5)
    average, away, moved = (y - x for y in made)
    assert torch.allclose(made[0], (x + x.roll(1, 0)) / 2)
    assert (average - moved).abs().max() > 0.1                     # elsewhere, but the same colours
    colours = [d.flatten(2).transpose(1, 2).mul(255).round().int() for d in (average, moved)]
    for a, b in zip(*colours):
        assert sorted(a.tolist()) == sorted(b.tolist())
    cosine = F.cosine_similarity(average.flatten(1), away.flatten(1))
    assert cosine.abs().max() < 0.5
    assert away.std(0).min() > 0 or n == 2


def test_premise_of_a_linear_critic():
    """D(x) = 3 v.x + 1 with |v| = 1 has L = 3 exactly, so that the share is known."""
    v = torch.randn(12, generator=torch.Generator().manual_seed(0))
    v /= v.norm()

    def D(x):
        return 3 * x.flatten(1) @ v + 1

    x = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    for threshold in (-20.0, -4.0, 0.0):
        row = exp_pixel_combination.premise(D, x, threshold, block=3)
        f, delta = D(x) - threshold, (x - x.roll(1, 0)).flatten(1).norm(dim=1)
        lam = torch.linspace(0, 1, 20_001)[1:-1, None]
        near = 3 * delta * torch.minimum(lam, 1 - lam)
        assert row["lipschitz"] == pytest.approx(3, rel=1e-4)
        assert row["margin"] == pytest.approx(f.min().item(), abs=1e-5)
        assert row["delta"] == pytest.approx(delta.mean().item(), rel=1e-5)
        assert row["premise_share"] == pytest.approx(
            (f.min() > near).float().mean().item(), abs=1e-3)
        pair = torch.minimum(f, f.roll(1, 0))
        assert row["premise_share_pair"] == pytest.approx(
            (pair > near).float().mean().item(), abs=1e-3)
        assert row["segment_share"] >= row["premise_share_pair"] - 0.05   # the theorem itself
    assert exp_pixel_combination.premise(D, x[:1].repeat(3, 1, 1, 1), -20.0)["premise_share"] == 1


def noise_folder(folder, n=120, size=16):
    """n images of smooth noise, 12 of them held out."""
    folder.mkdir(parents=True)
    for i, image in enumerate(uint8_images(n, 3, 4).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f"{i:03d}.png")
    return folder


def photo_flags(tmp_path, *args):
    return ["--dataset", str(tmp_path / "pics"), "--smoke", "--size", "16", "--data-dir",
            str(tmp_path / "d"), "--outdir", str(tmp_path / "runs"), *args]


def test_photographs_smoke(tmp_path, monkeypatch, capsys):
    noise_folder(tmp_path / "pics")
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    args = photo_flags(tmp_path, "--seeds", "0", "3")
    result = exp_pixel_combination.main(args)
    combination, gam = ([r for r in result["rows"] if r["part"] == part]
                        for part in ("combination", "gam"))
    assert [(r["arm"], r["seed"]) for r in combination] == [
        ("vanilla", 0), ("vanilla", 3), ("pcr", 0), ("pcr", 3)]
    for row in combination:
        assert {"nearer_average_fake", "nearer_average_heldout", "nearer_average_train",
                "pairs_searched", "d_real", "d_heldout", "d_average", "d_fake", "d_random",
                "d_permuted", "premise_share"} <= set(row)
        assert row["pairs_searched"] == 108 * 107 // 2
        assert [p["step"] for p in row["curve"]] == [2, 4]
        assert row["curve"][-1]["d_average"] == pytest.approx(row["d_average"], abs=1e-5)
        assert row["premise_share"] <= row["premise_share_pair"] <= 1
    assert {r["method"] for r in gam} == {"held-out", "gam", "random pairs", "vanilla", "pcr"}
    assert all(r["n"] == 8 and r["score"] == "FD-px" and r["fid"] > 0 for r in gam)
    folder = tmp_path / "runs" / "exp_pixel_combination" / "pics-smoke"
    with np.load(folder / "pcr-s3" / "samples.npz") as kept:
        for name in ("d_real", "d_heldout", "d_average", "d_random", "d_permuted", "d_fake"):
            assert kept[name].shape == (8,)
        assert kept["shown"].shape == (3, 5, 3, 16, 16) and kept["d_pair"].shape == (4,)
    (folder / "figure.png").unlink()
    assert exp_pixel_combination.main(["--plot", str(folder)])["rows"] == result["rows"]
    assert Image.open(folder / "figure.png").width > 1000
    with pytest.raises(UserError, match="--resume"):
        exp_pixel_combination.main(args)
    (folder / "pcr-s3" / "row.json").unlink()                       # as if stopped before the end
    assert exp_pixel_combination.main([*args, "--resume"])["rows"] == result["rows"]
    out = tmp_path / "grid.png"
    exp_pixel_combination.main(["--sample", str(folder / "pcr-s0" / "ckpt.pt"), "--n", "4",
                                "--out", str(out)])
    assert out.exists()


def test_photographs_one_arm_and_part_of_the_images(tmp_path, monkeypatch):
    noise_folder(tmp_path / "pics")
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    result = exp_pixel_combination.main(photo_flags(
        tmp_path, "--arms", "vanilla", "--n-search", "50", "--n-train", "100", "--name", "one"))
    rows = [r for r in result["rows"] if r["part"] == "combination"]
    assert [r["pairs_searched"] for r in rows] == [50 * 49 // 2]
    assert {r["method"] for r in result["rows"] if r["part"] == "gam"} == {
        "held-out", "gam", "random pairs", "vanilla"}


@pytest.mark.parametrize("args, message", [
    (["--n-search", "500"], "--n-search 500 must be from 3 to 108"),
    (["--n-query", "13"], "--n-query 13 must be from 2 to 12"),
    (["--n-view", "13"], "--n-view 13 must be from 2 to 12"),
    (["--n-fid", "13"], "--n-fid 13 must be from 2 to 12"),
    (["--n-real", "109"], "--n-real 109 must be from 2 to 108"),
    (["--n-train", "1"], "--batch 8: only 1 training images"), (["--batch", "109"], "--batch 109"),
    (["--n-fid", "13", "--n-view", "13"], "12; --n-fid 13 must be from 2 to 12: "),
    (["--size", "12"], "power of two"),
])
def test_mistakes_with_photographs(tmp_path, monkeypatch, capsys, args, message):
    noise_folder(tmp_path / "pics")
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    with pytest.raises(SystemExit) as stopped:
        harness.cli(lambda: exp_pixel_combination.main(photo_flags(tmp_path, *args)))
    assert stopped.value.code == 2 and not (tmp_path / "runs").exists()
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_result_of_rectangles_redraws_alone(tmp_path):
    source = HERE / "results" / "exp_pixel_combination" / "geometry" / "result.json"
    (tmp_path / "result.json").write_text(source.read_text())
    exp_pixel_combination.main(["--plot", str(tmp_path)])
    assert Image.open(tmp_path / "figure.png").width > 1000


@pytest.mark.parametrize("dataset", ["cifar10", "celeba"])
def test_pair_search_on_photographs(real_data, dataset):
    images = data.load(dataset, 32, real_data, "train", 60)
    heldout = data.load(dataset, 32, real_data, "test", 8)
    fake = exp_pixel_combination.average(images[:8], images[20:28])
    queries = torch.cat([heldout, fake, images[:8]])
    pairs, d = exp_pixel_combination.nearest_pair(queries, images, block=64)
    best = [b for b, *_ in brute_pairs(core.to_float(queries), core.to_float(images))]
    assert d.tolist() == pytest.approx(best, rel=1e-6, abs=1e-3)
    assert pairs[8:16].tolist() == [[i, i + 20] for i in range(8)]
    _, alone = exp_pixel_combination.nearest_pair(images[:4], images, torch.arange(4))
    best = [b for b, *_ in brute_pairs(*[core.to_float(images[:4]), core.to_float(images)],
                                       own=torch.arange(4))]
    assert alone.tolist() == pytest.approx(best, rel=1e-6)


# ---------------------------------------------------------------------- exp_sc.py, photographs


def photo_config(**changes):
    return config(**{**dict(size=32, channels=3, batch=2, n_train=4, over=3, sc_threshold=0.1,
                            dif_norm="range", sc_replace="least", arm="sc", n_dif=8,
                            engine="eager"), **changes})


def plain_images(*levels, size=4):
    """uint8 (N, 3, size, size), each of one grey level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, size, size)


def test_dif_by_hand():
    train = core.to_float(plain_images(0, 255))
    scale = exp_sc.dif_scale(train, "range")
    assert scale == pytest.approx(2 * 48 ** 0.5)
    x = core.to_float(plain_images(0, 51, 128, 255, 204))
    d, nearest = exp_sc.dif(x, train, scale)
    torch.testing.assert_close(d, torch.tensor([0, 0.2, 127 / 255, 0, 0.2]), atol=1e-6, rtol=0)
    assert nearest.tolist() == [0, 0, 1, 1, 1]
    half = x[:1].clone()
    half[:, :, :2] = 1                                                  # half of the pixels wrong
    assert exp_sc.dif(half, train[:1], scale)[0].item() == pytest.approx(0.5 ** 0.5)


def test_dif_normalisations_and_range():
    train = core.to_float(plain_images(0, 51, 204))
    unit = exp_sc.dif_scale(train, "range")
    assert exp_sc.dif_scale(train, "max") == pytest.approx(0.8 * unit)
    assert exp_sc.dif_scale(train, "mean") == pytest.approx((0.2 + 0.8 + 0.6) / 3 * unit)
    x = torch.rand(50, 3, 4, 4) * 2 - 1
    for norm in ("range", "max", "mean"):
        d, _ = exp_sc.dif(x, train[:2], exp_sc.dif_scale(train[:2], norm))
        assert (d >= 0).all() and (d <= 1).all()
    same = core.to_float(plain_images(7, 7))
    for norm in ("max", "mean"):
        with pytest.raises(UserError, match="--dif-norm"):
            exp_sc.dif_scale(same, norm)
    tiny = train[:1] + 1e-5                                  # a product would round this to 0
    d = exp_sc.distances(tiny.repeat(40, 1, 1, 1), train[:1].repeat(40, 1, 1, 1))
    torch.testing.assert_close(d, torch.full((40, 40), 48 ** 0.5 * 1e-5), rtol=1e-2, atol=0)


def test_replacement_rule_by_hand():
    def rule(d, n_keep=2):
        return sorted(exp_sc.negatives(torch.tensor(d), n_keep, 0.1, "sc", None).tolist())

    assert rule([0.3, 0.2, 0.5, 0.4]) == [0, 1]               # nobody under the threshold: all stay
    assert rule([0.05, 0.2, 0.3, 0.4]) == [1, 3]              # 0 makes way for the largest DIF
    assert rule([0.05, 0.01, 0.3, 0.4, 0.2]) == [2, 3]        # both make way for the two largest
    assert rule([0.05, 0.01, 0.02, 0.09]) == [0, 3]           # no worse spare than 0 but 3
    assert rule([0.1, 0.3, 0.9, 0.9]) == [0, 1]               # at the threshold is not under it
    assert len(set(rule([0.05, 0.05, 0.3, 0.3, 0.3]))) == 2   # ties: two of them, no one twice


def test_random_control_replaces_as_many():
    gen, drawn = torch.Generator().manual_seed(0), torch.rand(200, 8, generator=torch.Generator(
        ).manual_seed(1)) * 0.2
    gone, came = torch.zeros(4), torch.zeros(4)
    for d in drawn:
        sc = exp_sc.negatives(d, 4, 0.1, "sc", None)
        random = exp_sc.negatives(d, 4, 0.1, "random", gen)
        assert len(random.unique()) == 4 and (random >= 4).sum() == (sc >= 4).sum()
        gone += torch.tensor([i not in random for i in range(4)])
        came += torch.tensor([i in random for i in range(4, 8)])
    for counts in (gone, came):     # whoever: each about as often, whatever its DIF
        assert counts.sum() > 100 and (counts / counts.sum() - 0.25).abs().max() < 0.1


@pytest.mark.parametrize("rule", ["least", "discard"])
@pytest.mark.parametrize("arm", ["sc", "random"])
def test_correction_of_a_batch(rule, arm):
    cfg = photo_config(arm=arm, sc_replace=rule, size=8)
    images = plain_images(0, 85, 170, 255, size=8)
    correct = exp_sc.correction(cfg, images, torch.device("cpu"))

    class Fake:   # two spares of DIF 1/6 (a level between two images) in each batch more
        gen, device = torch.Generator().manual_seed(0), torch.device("cpu")

        def fake(self):
            return core.to_float(plain_images(42, 212, size=8))

    x = core.to_float(plain_images(0, 42, size=8))             # a copy and no copy
    out, weight = correct(Fake(), x)
    assert out.shape == x.shape
    if rule == "discard":
        assert torch.equal(out, x) and sorted(weight.tolist()) == [0, 2]
        if arm == "sc":
            assert weight.tolist() == [0, 2]
    else:
        levels = sorted(core.to_uint8(out)[:, 0, 0, 0].tolist())
        assert weight is None
        if arm == "sc":
            assert levels in ([42, 42], [42, 212])
        else:
            assert levels[0] in (0, 42) and len(levels) == 2
    assert exp_sc.correction(photo_config(arm="vanilla"), images, "cpu") is None


def test_measure_by_hand():
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(60, 190, (4, 3, 8, 8), dtype=torch.uint8, generator=gen)
    smooth = torch.linspace(0, 255, 8).to(torch.uint8).expand(1, 3, 8, 8)
    noise = (torch.rand(2, 3, 8, 8, generator=gen) < 0.5).to(torch.uint8) * 255
    x = torch.cat([images[:1], images[:1], images[2:3] + 3,       # three copies of two images
                   smooth, smooth + (smooth < 250),               # a pair of near-duplicates
                   plain_images(255, size=8),                     # constant
                   noise])                                        # rough, and no duplicates
    row = exp_sc.measure(x, images, photo_config())
    assert row["copies"] == 3 / 8 and row["recall"] == 2 / 4 and row["n"] == 8
    assert row["collapsed"] == 3 and row["noisy"] == 2 / 8
    unit = ((x.double() - images[:, None].double()) ** 2).mean((2, 3, 4)).sqrt().min(0).values
    assert row["dif"] == pytest.approx((unit / 255).mean().item(), rel=1e-5)
    perfect = exp_sc.measure(images.repeat(2, 1, 1, 1), images, photo_config())
    assert perfect == {"dif": 0, "copies": 1, "recall": 1, "collapsed": 0, "noisy": 0, "n": 8}


PHOTO_ROW = {"part", "arm", "seed", "step", "d_steps", "fid", "fid_heldout", "n_fid", "dif",
             "copies", "recall", "collapsed", "noisy", "n", "score", "dims"}


def test_sc_smoke_on_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    pictures = write_folder(tmp_path / "pics", uint8_images(60, size=32))
    args = ["--dataset", pictures, "--smoke", "--outdir", str(tmp_path), "--data-dir",
            str(tmp_path / "d")]
    result = exp_sc.main(args)
    rows = [r for r in result["rows"] if r["part"] == "sc_natural"]
    assert [(r["arm"], r["step"]) for r in rows] == [(a, s) for a in exp_sc.PHOTO_ARMS
                                                    for s in (2, 4)]
    assert all(PHOTO_ROW <= set(r) for r in rows)
    fixed = {r["arm"]: r for r in result["rows"] if r["part"] == "sc_reference"}
    assert fixed["copyist"]["dif"] == 0 and fixed["copyist"]["copies"] == 1
    assert fixed["copyist"]["fid"] < fixed["unseen photographs"]["fid"]
    assert fixed["plain grey"]["collapsed"] == fixed["plain grey"]["n"] == 16
    folder = tmp_path / "exp_sc" / "pics-smoke"
    (folder / "figure.png").unlink()
    exp_sc.main(["--plot", str(folder)])
    assert Image.open(folder / "figure.png").width > 1000
    with pytest.raises(UserError, match="--resume"):
        exp_sc.main(args)
    assert exp_sc.main([*args, "--resume"])["rows"] == result["rows"]
    exp_sc.main(["--sample", str(folder / "sc-s0" / "best.pt"), "--n", "4", "--out",
                 str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").exists()


def test_sc_and_its_control_agree_where_they_must(tmp_path, monkeypatch):
    """At 0 nobody is discarded and at 1 everybody, so that it does not matter who."""
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    pictures = write_folder(tmp_path / "pics", uint8_images(60, size=32))

    def states(threshold):
        exp_sc.main(["--dataset", pictures, "--smoke", "--outdir", str(tmp_path), "--data-dir",
                     str(tmp_path / "d"), "--sc-threshold", str(threshold), "--name",
                     f"t{threshold}", "--sc-replace", "discard"])
        return {a: harness.read_checkpoint(tmp_path / "exp_sc" / f"t{threshold}" / f"{a}-s0"
                                        / "ckpt.pt")["D"]["0.weight"] for a in exp_sc.PHOTO_ARMS}

    none, all_ = states(0.0), states(1.0)
    assert torch.equal(none["sc"], none["random"]) and torch.equal(all_["sc"], all_["random"])
    assert not torch.equal(none["sc"], all_["sc"])


@pytest.mark.parametrize("args, message", [
    (["--sc-threshold", "1.5"], "--sc-threshold 1.5: must be from 0 to 1"),
    (["--sc-threshold", "-0.1"], "--sc-threshold -0.1: must be from 0 to 1"),
    (["--over", "1"], "--over 1"), (["--n-dif", "1"], "--n-dif 1"),
    (["--batch", "9"], "--batch 9: only 8 training images"),
    (["--n-train", "1000"], "--n-train 1000"),
    (["--arms", "pcr"], "--arms pcr: with --dataset"),
    (["--n-cover", "5"], "--n-cover: not with --dataset"),
    (["--sc-counter", "exact"], "--sc-counter: not with --dataset"),
    (["--size", "48"], "power of two"), (["--dataset", "nowhere"], "nowhere does not exist"),
    (["--dataset", "geometry", "--over", "2"], "--over: not with --dataset geometry"),
    (["--dataset", "geometry", "--arms", "random"], "--arms random: with --dataset geometry"),
    (["--dataset", "cifar10", "--data-dir", "none"], "cifar-10-binary.tar.gz"),
])
def test_mistakes_in_sample_correction(tmp_path_factory, tmp_path, monkeypatch, capsys, no_network,
                                   args, message):
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    elsewhere = tmp_path_factory.mktemp("data")
    pictures = write_folder(elsewhere / "pics", uint8_images(60, size=32))
    where = [] if "--data-dir" in args else ["--data-dir", str(elsewhere / "d")]
    assert message in mistake(exp_sc, ["--dataset", pictures, *where, *args], tmp_path, monkeypatch,
                              capsys)


def test_too_few_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    pictures = write_folder(tmp_path / "pics", uint8_images(20, size=32))
    with pytest.raises(UserError, match="4 held out"):
        exp_sc.main(["--dataset", pictures, "--smoke", "--outdir", str(tmp_path / "o"),
                     "--data-dir", str(tmp_path / "d")])
    assert not (tmp_path / "o").exists()


def test_sc_on_real_photographs(real_data, tmp_path):
    cfg = argparse.Namespace(**{**vars(photo_config(n_train=32)), "dataset": "cifar10", "dims": 64,
                                "data_dir": real_data, "fid_weights": None, "device": "cpu",
                                "n_heldout": 64, "n_fid": 32, "n_dif": 32})
    fixed = {r["arm"]: r for r in exp_sc.references(cfg)}
    assert fixed["copyist"]["fid"] < min(fixed[k]["fid"] for k in fixed if k != "copyist")
    assert fixed["unseen photographs"]["copies"] == 0 < fixed["copyist"]["recall"]
    assert fixed["plain grey"]["dif"] < fixed["averages of two"]["dif"] \
        < fixed["unseen photographs"]["dif"]


# ----------------------------------------------------------------------- exp_sample_insufficiency


def sampler(arm, **changes):
    cfg = config(arm=arm, size=8, flip=False, lr_decay=False, ema_beta=0.0, n_dis=1, **changes)
    return exp_sample_insufficiency.Sampler(cfg, tiny_data(), torch.device("cpu"))


def fit_sampler(folder, arm, **changes):
    trainer = sampler(arm, **changes)
    harness.fit(trainer, harness.open_run(folder, trainer.cfg, resume=True), each_step=True)
    return trainer


def test_sampling_laws():
    n = len(tiny_data())
    full = sampler("fgd", batch=n)
    assert all(full.pick(k).tolist() == list(range(n)) for k in ("real", "d", "g", "real"))
    epoch = sampler("epoch")
    for stream in ("real", "d", "g"):                                   # whole epochs, shuffled
        drawn = [sum((epoch.pick(stream).tolist() for _ in range(n // 4)), []) for _ in range(3)]
        assert all(sorted(d) == list(range(n)) for d in drawn) and drawn[0] != drawn[1]
    for arm, repeats in (("wor", (False, False)), ("real-wor", (False, True)),
                         ("iid", (True, True))):
        trainer = sampler(arm)
        for stream, wanted in zip(("real", "d"), repeats):
            drawn = [trainer.pick(stream).tolist() for _ in range(300)]
            assert any(len(set(d)) < 4 for d in drawn) == wanted
            counts = np.bincount(sum(drawn, []), minlength=n)           # all equally often
            assert stats.chisquare(counts).pvalue > 1e-4
    codes = {tuple(z) for z in trainer.codes.tolist()}
    assert len(codes) == n and all(tuple(z) in codes for z in trainer.latent(4).tolist())


def test_an_epoch_of_codes_for_each_player():
    trainer = sampler("epoch")
    for _ in range(3):
        trainer.update()
    assert trainer.drawn == {"real": 3, "d": 3, "g": 3}


@pytest.mark.parametrize("arm", ["epoch", "iid"])
def test_sampler_resumes_bit_for_bit_and_logs_each_update_once(tmp_path, arm):
    whole, cut = fit_sampler(tmp_path / "whole", arm, steps=11), sampler(arm, steps=11)
    update = cut.update
    cut.update = lambda: update() if cut.step < 7 else 1 / 0            # dies without a word
    with pytest.raises(ZeroDivisionError):
        harness.fit(cut, harness.open_run(tmp_path / "cut", cut.cfg, resume=True), each_step=True)
    state = torch.load(tmp_path / "cut" / "ckpt.pt", weights_only=True)
    assert state["step"] == 6 and torch.equal(state["codes"], whole.codes)
    resumed = fit_sampler(tmp_path / "cut", arm, steps=11)
    assert torch.equal(flat(whole.G), flat(resumed.G))
    rows = harness.read_rows(tmp_path / "cut" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [r["d_steps"] for r in rows] == list(range(1, 12))
    assert rows == harness.read_rows(tmp_path / "whole" / "metrics.jsonl")
    core.sample_checkpoint(tmp_path / "cut" / "ckpt.pt", 5, tmp_path / "g.png",
                           torch.device("cpu"))


def test_changes_and_assignment_by_hand():
    x = geometry.draw(4, 2, 16, 4)
    moved = torch.stack([x, x, torch.cat([x[1:2], x[1:]])])
    assert exp_sample_insufficiency.changes(list(moved)) == [0.0, 0.25]
    assert exp_sample_insufficiency.assignment(x, x[[2, 0, 3, 1]]) == 0
    y = geometry.draw(4, 2, 16, 4, seed=1)
    pairs = ((core.to_float(x)[:, None] - core.to_float(y)[None]) ** 2).sum((2, 3, 4)).sqrt()
    best = min(sum(pairs[i, j].item() for i, j in enumerate(order)) / 4
               for order in itertools.permutations(range(4)))
    assert abs(exp_sample_insufficiency.assignment(x, y) - best) < 1e-5


def test_r1_of_a_linear_critic():
    w = torch.tensor([[3., 4., 0., 0.]])
    trainer = argparse.Namespace(D=lambda x: x.flatten(1) @ w.T, cfg=argparse.Namespace(
        r1_weight=10.0))
    penalty = exp_sample_insufficiency.r1(trainer, torch.randn(5, 1, 2, 2))
    torch.testing.assert_close(penalty, torch.tensor(5 * 25.0))


def test_optimistic_adam_is_its_recursion_and_settles_where_adam_does_not(tmp_path):
    twin, p = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    adam = torch.optim.Adam([twin], 0.1, (0.5, 0.9))
    opt = exp_sample_insufficiency.OptimisticAdam([p], 0.1, (0.5, 0.9), fused=True)
    before, expected = torch.zeros(2), p.detach().clone()
    for k in range(6):
        if k == 3:                                                      # a resumed run goes on
            state = opt.state_dict()
            opt = exp_sample_insufficiency.OptimisticAdam([p], 0.1, (0.5, 0.9), fused=True)
            opt.load_state_dict(state)
        grad = torch.tensor([1.0 + k, (-1.0) ** k])
        twin.grad, p.grad, old = grad.clone(), grad.clone(), twin.detach().clone()
        adam.step()
        opt.step()
        move = twin.detach() - old
        expected, before = expected + 2 * move - before, move
        torch.testing.assert_close(p.detach(), expected)

    def settles_at(optimizer):
        """Largest |(w, theta)| late in the game of min over theta, max over w of w theta."""
        w, theta = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
        opts, norms = [optimizer([v], 0.02, (0.0, 0.9)) for v in (w, theta)], []
        for _ in range(600):
            w.grad, theta.grad = -theta.detach().clone(), w.detach().clone()
            [o.step() for o in opts]
            norms.append(torch.stack([w, theta]).norm().item())
        return max(norms[-200:])

    plain = settles_at(torch.optim.Adam)                                # circles; by step size
    assert settles_at(exp_sample_insufficiency.OptimisticAdam) < plain / 3


def test_equivalent_batch_by_hand():
    equal = exp_sample_insufficiency.equivalent_batch
    assert equal([4, 16, 64], [30, 20, 10], 15) == pytest.approx(32)
    assert equal([4, 16, 64], [30, 20, 10], 30) == pytest.approx(4)
    assert math.isnan(equal([4, 16, 64], [30, 20, 10], 9))
    assert math.isnan(equal([4, 16, 64], [20, 30, 10], 15))


def test_sample_insufficiency_smoke(tmp_path, capsys):
    args = ["--smoke", "--outdir", str(tmp_path), "--device", "cpu", "--seeds", "0", "1"]
    rows = exp_sample_insufficiency.main(args)["rows"]
    cells = [("fgd", 8), ("wor", 2), ("wor", 4), ("iid", 4), ("real-wor", 4), ("epoch", 4)]
    assert [(r["seed"], r["arm"], r["batch"]) for r in rows] == [(s, *c) for s in (0, 1)
                                                                 for c in cells]
    for row in rows:
        assert {"d_loss_var", "g_grad_var", "changes_per_code", "correct", "correct_exact",
                "assignment_distance"} <= set(row)
        assert row["images_seen"] == 32 and row["steps"] == 32 // row["batch"]
    folder = tmp_path / "exp_sample_insufficiency" / "geometry-smoke"
    steps = [r for r in harness.read_rows(folder / "wor-b2-s1" / "metrics.jsonl")
             if "d_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 17))
    row = next(r for r in rows if (r["arm"], r["batch"], r["seed"]) == ("wor", 2, 1))
    assert row["d_loss_var"] == pytest.approx(np.var([r["d_loss"] for r in steps[-5:]]))
    assert Image.open(folder / "figure.png").width > 500
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "figure.png")


def test_sample_insufficiency_smoke_on_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda **kw: fid.Pixels())
    args = ["--smoke", "--dataset", str(picture_folder(tmp_path / "pics")), "--n-real", "8",
            "--data-dir", str(tmp_path / "d"), "--outdir", str(tmp_path), "--lr-rule", "sqrt"]
    rows = exp_sample_insufficiency.main(args)["rows"]
    assert {(r["arm"], r["batch"]) for r in rows} == {
        ("vanilla", 2), ("vanilla", 4), ("ema", 2), ("r1", 2), ("optimistic", 2)}
    assert sorted(r["images_seen"] for r in rows) == [16] * 5 + [32] * 5
    flags = {b: json.loads((tmp_path / "exp_sample_insufficiency" / "pics-smoke" /
                            f"vanilla-b{b}-s0" / "config.json").read_text())["flags"]
             for b in (2, 4)}
    assert flags[4]["lr_d"] / flags[2]["lr_d"] == pytest.approx(2 ** 0.5)


@pytest.mark.parametrize("args, message", [
    (["--batches", "1", "4"], "--batches [1, 4]"), (["--batches", "64"], "--images 32"),
    (["--arms", "vanilla"], "--arms vanilla: not for --dataset geometry"),
    (["--batch", "16"], "--batch 16: only 8"), (["--n-train", "0"], "--n-train 0 from 1"),
    (["--images", "0"], "--images 0"), (["--lr-rule", "cubic"], "invalid choice: 'cubic'"),
    (["--r1-weight", "nan"], "--r1-weight nan: must be from 0"),
])
def test_mistakes_in_sample_insufficiency(tmp_path, monkeypatch, capsys, args, message):
    assert message in mistake(exp_sample_insufficiency, args, tmp_path, monkeypatch, capsys)


# -------------------------------------------------------------- kills, full disks, other processes

# One process that has imported everything forks a run for each line it reads, and prints how it
# ended: a run costs no second of imports, so that twenty can be killed.
ZYGOTE = '''
import argparse, json, os, signal, sys, time
import torch
import core, harness, test_all
torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        def work():
            trainer = core.Trainer(test_all.config(**order["config"]), test_all.tiny_data(64),
                                   torch.device("cpu"))
            folder = harness.open_run(order["folder"], trainer.cfg, True)
            harness.fit(trainer, folder, lambda t: {"fid": float(t.step)})
        sys.stdout = open(os.devnull, "w")
        try:
            harness.cli(work)
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    if order.get("kill_after") is not None:
        log = os.path.join(order["folder"], "metrics.jsonl")
        while order.get("signal") and not (os.path.exists(log) and os.path.getsize(log)):
            time.sleep(0.01)
        time.sleep(order["kill_after"])
        for _ in range(order.get("times", 1)):
            os.kill(child, order.get("signal", signal.SIGKILL))
            time.sleep(0.02)
    if order.get("kill_in_write") is not None:                  # while a checkpoint is half written
        seen, end = 0, time.time() + 60
        while seen < order["kill_in_write"] and time.time() < end:
            seen += any(f.name.startswith(".ckpt.pt") for f in os.scandir(order["folder"]))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


@pytest.fixture(scope="module")
def zygote():
    """run(folder, **order) -> exit code of a training in a process of its own, killed or not."""
    process = subprocess.Popen([sys.executable, "-c", ZYGOTE], cwd=HERE, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)

    def run(folder, config, **order):
        folder.mkdir(exist_ok=True)
        process.stdin.write(json.dumps({"folder": str(folder), "config": config, **order}) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()


LONG = dict(steps=60, width=32, log_every=4, eval_every=6, ckpt_every=1, sample_every=60)


def finished(folder):
    """Weights and metrics that a run left."""
    state = harness.read_checkpoint(folder / "ckpt.pt")
    return ({f"{n}.{k}": v for n in ("G", "D", "G_ema") for k, v in state[n].items()},
            (folder / "metrics.jsonl").read_text(), state["step"])


@pytest.mark.skipif(sys.platform != "linux", reason="forks after importing torch")
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path, zygote):
    assert zygote(tmp_path / "whole", LONG) == 0
    weights, metrics, _ = finished(tmp_path / "whole")
    rng, kills, inside, cut = np.random.default_rng(0), 0, 0, tmp_path / "cut"
    for i in range(100):                                        # a fast machine takes more tries
        code = zygote(cut, LONG, **({"kill_after": rng.uniform(0.02, 0.35)} if i % 2 else
                                    {"kill_in_write": int(rng.integers(1, 6))}))
        assert code in (-signal.SIGKILL, 0)
        kills += code != 0
        inside += code != 0 and any(f.name.startswith(".ckpt.pt") for f in cut.iterdir())
        if kills >= 22 and inside >= 3:
            break
        if (cut / "ckpt.pt").exists():
            assert 1 <= harness.read_checkpoint(cut / "ckpt.pt")["step"] <= 60     # always whole
        if code == 0:                                                           # again from nothing
            cut = tmp_path / f"cut{kills}"
    assert zygote(cut, LONG) == 0
    again, rows, step = finished(cut)
    assert step == 60 and rows == metrics
    assert all(torch.equal(again[k], weights[k]) for k in weights)
    assert kills >= 20 and inside >= 3
    assert not list(cut.glob(".*.tmp*"))                        # nor does a kill leave anything


@pytest.mark.skipif(sys.platform != "linux", reason="forks after importing torch")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_first(tmp_path, zygote, number, code):
    long = {**LONG, "steps": 5000, "ckpt_every": 5000}
    # Twice, as a process of a group gets it from the group's sender and from its parent.
    assert zygote(tmp_path / "run", long, kill_after=0.1, signal=number, times=2) == code
    assert 0 < harness.read_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] < 5000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk],
                      capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(small_disk, capsys):
    with pytest.raises(ZeroDivisionError):
        fit(small_disk / "run", lambda trainer: {"fid": 1 / (6 - trainer.step)}, steps=9, width=8)
    before = (small_disk / "run" / "ckpt.pt").read_bytes()
    rest = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(rest.f_bavail * rest.f_frsize - 8192))
    trainer = core.Trainer(config(steps=9, width=8), tiny_data(), torch.device("cpu"))
    with pytest.raises(SystemExit) as stopped:
        harness.cli(lambda: harness.fit(trainer, small_disk / "run"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "No space left" in error and error.count("\n") == 1
    assert (small_disk / "run" / "ckpt.pt").read_bytes() == before
    assert not list((small_disk / "run").glob(".*.tmp*"))


def test_a_full_disk_without_a_disk(tmp_path, monkeypatch, capsys):
    trainer = core.Trainer(config(steps=9), tiny_data(), torch.device("cpu"))
    folder, write = harness.open_run(tmp_path / "run", trainer.cfg, False), Path.write_bytes

    def full(path, content):
        if path.name.startswith(".ckpt") and trainer.step > 3:
            write(path, bytes(content)[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stopped:
        harness.cli(lambda: harness.fit(trainer, folder))
    assert stopped.value.code == 2 and "No space left" in capsys.readouterr().err
    assert harness.read_checkpoint(folder / "ckpt.pt")["step"] == 3
    assert not list(folder.glob(".*.tmp*"))


def test_a_read_only_folder_is_one_line(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SystemExit) as stopped:
        harness.cli(lambda: exp_sc.main(["--smoke", "--outdir", str(small_disk / "out")]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Read-only file system" in error and error.count("\n") == 1


def test_a_vanished_folder_is_one_line(tmp_path, capsys):
    trainer = core.Trainer(config(steps=9), tiny_data(), torch.device("cpu"))
    folder, update = harness.open_run(tmp_path / "run", trainer.cfg, resume=False), trainer.update

    def vanish():
        if trainer.step == 4 and folder.exists():
            shutil.rmtree(folder)
        return update()

    trainer.update = vanish
    with pytest.raises(SystemExit) as stopped:
        harness.cli(lambda: harness.fit(trainer, folder))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and str(folder) in error and error.count("\n") == 1
    assert not folder.exists()


def test_two_processes_in_a_run_folder(tmp_path):
    harness.open_run(tmp_path / "run", config(), resume=True)
    harness.open_run(tmp_path / "run", config(), resume=True)           # the same one may
    other = ("import harness, sys; harness.cli(lambda: harness.hold(harness.Path(sys.argv[1])))")
    for folder, code in ((tmp_path / "run", 2), (tmp_path / "free", 0)):
        result = subprocess.run([sys.executable, "-c", other, str(folder)], cwd=HERE, text=True,
                                capture_output=True)
        assert result.returncode == code
        assert ("in use by another process" in result.stderr) == bool(code)


def test_a_foreign_or_damaged_checkpoint_is_refused(tmp_path):
    fit(tmp_path / "a", steps=3)
    other = core.Trainer(config(steps=6, lr_g=0.5), tiny_data(), torch.device("cpu"))
    with pytest.raises(UserError, match="another configuration: lr_g was 0.01, is 0.5; steps was"):
        harness.fit(other, tmp_path / "a")
    path = tmp_path / "a" / "ckpt.pt"
    content, weights = bytearray(path.read_bytes()), harness.read_checkpoint(path)["G"]["0.weight"]
    content[content.find(weights.numpy().tobytes()) + 5] ^= 1           # a single flipped bit
    path.write_bytes(content)
    with pytest.raises(UserError, match="ckpt.pt is no checkpoint|damaged"):
        fit(tmp_path / "a", steps=3)


@pytest.mark.skipif(sys.platform != "linux", reason="locks and process groups of Linux")
def test_runs_whose_parent_was_killed_save_and_let_go(tmp_path):
    sweep = tmp_path / "exp_pixel_combination" / "geometry-smoke"
    runs = [sweep / "vanilla-s0", sweep / "pcr-s0"]
    parent = subprocess.Popen(
        [sys.executable, "exp_pixel_combination.py", "--smoke", "--seeds", "0", "--jobs", "2",
         "--steps", "100000", "--log-every", "1", "--eval-every", "100000", "--ckpt-every",
         "100000", "--sample-every", "100000", "--outdir", str(tmp_path)], cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    end = time.time() + 120
    while not all((r / "metrics.jsonl").exists() and (r / "metrics.jsonl").stat().st_size
                  for r in runs):
        assert time.time() < end and parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    while not all((r / "ckpt.pt").exists() for r in runs):
        assert time.time() < end
        time.sleep(0.1)
    for run in runs:
        while True:
            try:
                harness.hold(run)
                break
            except UserError:
                assert time.time() < end
                time.sleep(0.1)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_torchrun_shares_out_the_grid_and_takes_up_what_a_dead_process_left(tmp_path):
    args = ["exp_pixel_combination.py", "--smoke", "--seeds", "0", "1", "--outdir", str(tmp_path)]
    run = [*TORCHRUN, *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # The second process dies in its first run, without a word.
    killer = tmp_path / "sitecustomize.py"
    killer.write_text("import os\n"
                      "if os.environ.get('RANK') == '1':\n"
                      "    import threading, time\n"
                      "    def die():\n"
                      "        import glob\n"
                      f"        while not glob.glob({str(tmp_path)!r} + '/*/*/vanilla-s1/"
                      "metrics.jsonl'):\n"
                      "            time.sleep(0.001)\n"
                      "        os.kill(os.getpid(), 9)\n"
                      "    threading.Thread(target=die, daemon=True).start()\n")
    dead = subprocess.run(run, cwd=HERE, env={**env, "PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True, timeout=300)
    folder = tmp_path / "exp_pixel_combination" / "geometry-smoke"
    assert dead.returncode and not (folder / "result.json").exists()
    assert not (folder / "vanilla-s1" / "row.json").exists()
    done = subprocess.run([*run, "--resume"], cwd=HERE, env=env, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert {(r["arm"], r["seed"]) for r in rows} == {(a, s) for a in ("vanilla", "pcr")
                                                     for s in (0, 1)}
    alone = exp_pixel_combination.main([*args[1:], "--outdir", str(tmp_path / "alone")])
    assert rows == alone["rows"]
    assert done.stdout.count("figure.png") == 1                         # one process reports


def test_data_parallel_is_one_process_up_to_rounding(tmp_path):
    args = ["exp_pcr_natural.py", "--smoke", "--dataset", "geometry", "--n-train", "64",
            "--batch", "8", "--flip", "--arms", "vanilla", "--data-dir", str(tmp_path / "d")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [*args, "--model", "all", "--outdir"]                       # penalty, batch norm, SN
    exp_pcr_natural.main([*flags[1:], str(tmp_path / "one")])
    done = subprocess.run([*TORCHRUN, *flags, str(tmp_path / "two"), "--data-parallel"],
                          cwd=HERE, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for model in ("wgangp", "lsgan", "sagan"):
        runs = [tmp_path / n / f"exp_pcr_natural/geometry-all-smoke/geometry-{model}-vanilla-s0"
                for n in ("one", "two")]
        one, two = (harness.read_rows(run / "metrics.jsonl") for run in runs)
        assert len(one) == len(two) == 4
        for a, b in zip(one, two):
            assert a.keys() == b.keys() and a == pytest.approx(b, rel=2e-3, abs=1e-4)
        images, scores = [], []
        for run in runs:
            state = harness.read_checkpoint(run / "ckpt.pt")
            G, D = core.build(argparse.Namespace(**state["config"]))
            G.load_state_dict(state["G"])
            D.load_state_dict(state["D"])
            with torch.no_grad():
                images.append(G.eval()(torch.ones(4, 16).cumsum(0) / 4))
                scores.append(D.eval()(images[0]))
        torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_data_parallel_refusals(tmp_path, monkeypatch, capsys):
    message = mistake(exp_pcr_natural, ["--dataset", "geometry", "--data-parallel"], tmp_path,
                      monkeypatch, capsys)
    assert "--data-parallel: start it with torchrun" in message


# ------------------------------------------------------------------------- input not to be trusted

FUZZ = dict(derandomize=True, deadline=None, database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(call, *match):
    """The message of the UserError that `call` raises; it contains all of `match`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert all(m in message for m in match), message
    return message


def encoded(suffix, mode="RGB", size=(9, 7), **options):
    """The bytes of an image file, noise."""
    out, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8)
    Image.fromarray(noise).convert(mode).save(out, Image.registered_extensions()[suffix], **options)
    return out.getvalue()


def chunk(kind, content):
    return (struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content)))


def png_bomb(side=50_000, blocks=100):
    """A whole, valid black PNG of 1 bit a pixel: 310 MB of rows in a file of 1 MB."""
    pack, rows = zlib.compressobj(1, wbits=-15), bytes((1 + side // 8) * (side // blocks))
    block, check = pack.compress(rows) + pack.flush(zlib.Z_FULL_FLUSH), 1
    for _ in range(blocks):
        check = zlib.adler32(rows, check)
    deflated = b"\x78\x01" + block * blocks + b"\x03\x00" + struct.pack(">I", check)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, *[0] * 4))
            + chunk(b"IDAT", deflated) + chunk(b"IEND", b""))


def zip_of(path, members, method=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as z:
        warnings.simplefilter("ignore")   # of names that are there twice
        for name, content in members:
            z.writestr(name, content)
    return path


def read_all(path):
    return [image.shape for _, image in data.iter_images(path)]


@st.composite
def damaged(draw, contents):
    """One of `contents` (bytes), cut short, some bytes changed, put in or taken out."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        content[at:at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    cut = draw(st.sampled_from([False, False, True]))
    return bytes(content[:draw(st.integers(0, len(content)))] if cut else content)


def test_fuzzed_images_are_read_or_refused(tmp_path):
    whole = [encoded(s, m) for s in (".png", ".jpg", ".bmp", ".webp", ".tif", ".ppm", ".gif")
             for m in ("L", "RGB", "1") if (s, m) not in ((".webp", "1"), (".jpg", "1"))]
    ended = []

    @settings(max_examples=300, **FUZZ)
    @given(damaged(whole))
    def try_one(content):
        (tmp_path / "x.jpg").write_bytes(content)
        try:
            image = data.decode(tmp_path / "x.jpg", "x.jpg")
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            ended.append(True)
        except UserError as error:
            assert str(error).startswith("x.jpg: ")
            ended.append(False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # Pillow's, of odd metadata
        try_one()
    assert 20 < sum(ended) < len(ended) - 20   # some of both, or the fuzz is of no use


def test_fuzzed_zips_are_read_or_refused(tmp_path):
    image, ended = encoded(".png"), []
    whole = [zip_of(tmp_path / "a.zip", [("a.png", image), ("b/c.png", image)], method).read_bytes()
             for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]

    @settings(max_examples=300, **FUZZ)
    @given(damaged(whole))
    def try_one(content):
        (tmp_path / "a.zip").write_bytes(content)
        try:
            assert set(read_all(tmp_path / "a.zip")) == {(7, 9, 3)}
            ended.append(True)
        except UserError as error:
            assert str(tmp_path / "a.zip") in str(error)
            ended.append(False)

    try_one()
    assert 10 < sum(ended) < len(ended) - 10


def test_fuzzed_statistics_and_arrays_are_read_or_refused(tmp_path):
    arrays = dict(mu=np.arange(3.0), sigma=np.eye(3), n=np.array(9), id=np.array("x"))
    contents = []
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        contents.append((tmp_path / "a.npz").read_bytes())
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 6, 3), np.uint8))
    contents.append((tmp_path / "a.npy").read_bytes())
    readers = {"a.npz": fid.load_stats, "a.npy": lambda path: list(fid.rows_of(path))}
    ended = []

    @settings(max_examples=400, **FUZZ)
    @given(damaged(contents), st.sampled_from([*readers]))
    def try_one(content, name):
        (tmp_path / name).write_bytes(content)
        try:
            readers[name](str(tmp_path / name))
            ended.append(True)
        except UserError as error:
            assert name in str(error)
            ended.append(False)

    try_one()
    assert 10 < sum(ended) < len(ended) - 10


def test_fuzzed_weights_are_read_or_refused(tmp_path):
    state = torch.load(random_weights(tmp_path / "w.pth"), weights_only=True)
    contents = [(tmp_path / "w.pth").read_bytes()]
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    contents.append((tmp_path / "w.pth").read_bytes())
    spots = [(content, at) for content in contents for at in (0, len(content) - 30_000)]
    ended = []

    @settings(max_examples=40, **FUZZ)   # both ends of the file, where its structure is
    @given(st.sampled_from(spots).flatmap(
        lambda spot: damaged([spot[0][spot[1]:spot[1] + 30_000]]).map(
            lambda part: spot[0][:spot[1]] + part + spot[0][spot[1] + 30_000:])))
    def try_one(content):
        (tmp_path / "w.pth").write_bytes(content)
        try:
            net = fid.load_inception(dims=64, weights=tmp_path / "w.pth")
            assert all(p.isfinite().all() for p in net.parameters())
            ended.append(True)
        except UserError as error:
            assert "w.pth" in str(error)
            ended.append(False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # torch's, of the older format
        try_one()
    assert any(ended) and not all(ended)


def test_code_in_pickles_does_not_run(tmp_path):
    def never():
        assert not (tmp_path / "ran").exists()

    evil, folder = Evil(tmp_path / "ran"), picture_folder(tmp_path / "pics")
    for save in (lambda path: torch.save({"Conv2d_1a_3x3.conv.weight": evil}, path),
                 lambda path: torch.save(evil, path, _use_new_zipfile_serialization=False),
                 lambda path: path.write_bytes(pickle.dumps(evil))):
        save(tmp_path / "w.pth")
        refused(lambda: fid.load_inception(dims=64, weights=tmp_path / "w.pth"), "not a state dict")
        refused(lambda: harness.read_checkpoint(tmp_path / "w.pth"), "no checkpoint")
        never()
    code = np.array([evil, None], object)
    np.savez(tmp_path / "s.npz", mu=code, sigma=code)
    np.savez(tmp_path / "n.npz", mu=np.zeros(2), sigma=np.eye(2), n=code)
    np.save(tmp_path / "a.npy", code)
    (tmp_path / "p.npz").write_bytes(pickle.dumps(evil))
    for name in ("s.npz", "n.npz", "p.npz"):
        refused(lambda name=name: fid.load_stats(tmp_path / name), name, "plain arrays")
    refused(lambda: list(fid.rows_of(str(tmp_path / "a.npy"))), "a.npy")
    images = data.load(str(folder), 8, tmp_path, "all")   # and in our own caches
    stats, feats = fid.reference(fid.Pixels(), images, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        np.savez(path, mu=code, sigma=code, features=code) if path.suffix == ".npz" else np.save(
            path, code)
    assert torch.equal(data.load(str(folder), 8, tmp_path, "all"), images)
    assert torch.equal(fid.reference(fid.Pixels(), images, tmp_path / "cache")[1], feats)
    never()
    with pytest.raises(FileNotFoundError):   # the pickle does work, where it is let
        pickle.loads(pickle.dumps(Evil(tmp_path / "none" / "ran")))


def test_zips_are_read_never_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    image, outside = encoded(".png"), tmp_path.parent / "x.png"
    zip_of(tmp_path / "a.zip", [
        (str(outside), image), ("../x.png", image), ("C:\\x.png", image), ("d.png/", b""),
        ("__MACOSX/._x.png", b"no image"), ("\xff\n.png", image), (link, b"/etc/hostname")])
    assert read_all(tmp_path / "a.zip") == [(7, 9, 3)] * 4   # the folder and the link left out
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"] and not outside.exists()


def test_folders_hold_plain_files_only(tmp_path):
    folder = tmp_path / "pics"
    (folder / "deep.png").mkdir(parents=True)
    (folder / "deep.png" / "a.PNG").write_bytes(encoded(".png"))
    names = [b"\xff\xfe.png", b"a\nb.png", b"\xf0\x9f\x98\x80.png", b"l" * 250 + b".png", b"-n.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(encoded(".png"))
    os.mkfifo(folder / "pipe.png")   # opening it would wait for ever
    (folder / "out.png").symlink_to("/etc/hostname")
    (folder / "loop").symlink_to(folder)
    assert len(data.list_images(folder)) == len(names) + 1
    assert data.load(str(folder), 8, tmp_path, "all").shape == (6, 3, 8, 8)
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: data.load(str(tmp_path / "pipe")), "no folder")
    refused(lambda: data.load("/dev/zero"), "no folder")
    refused(lambda: data.load("a\0b.png"), "does not exist")
    refused(lambda: data.load("x" * 5000), "File name too long")
    refused(lambda: data.load(""), "empty")


def test_a_folder_that_cannot_be_read_to_its_end_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded(".png"))
    monkeypatch.chdir(tmp_path)
    for _ in range(25):   # deeper than a path may be long
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    refused(lambda: data.list_images(tmp_path), "not a readable folder", "File name too long")

    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", locked)
    refused(lambda: data.list_images(tmp_path), "not a readable folder", "Permission denied")


def broken_zips(folder):
    """(bytes, what the refusal says) of zips that are damaged by hand."""
    image = encoded(".png")
    whole = zip_of(folder / "w.zip", [("a.png", image)]).read_bytes()
    listed = whole.index(b"PK\1\2")

    def edit(at, value):
        assert whole[at] != value
        return whole[:at] + bytes([value]) + whole[at + 1:]

    yield edit(listed, 0), "Bad magic number for central directory"
    yield edit(listed + 6, 99), "version"
    yield edit(listed + 8, 1), "encrypted"
    yield edit(listed + 10, 77), "compression method"
    yield edit(0, 0), "Bad magic number for file header"
    yield edit(listed + 21, 0), "a.png: not a readable image (Bad CRC-32"   # 256 bytes too short
    pixels = whole.index(b"IDAT") + 40   # Pillow alone reads wrong pixels in silence here
    yield edit(pixels, whole[pixels] ^ 1), "a.png: not a readable image (Bad CRC-32"
    yield whole[:-30], "no (whole) zip"
    yield b"", "no (whole) zip"
    yield zip_of(folder / "t.zip", [("a.png", image)] * 2).read_bytes(), "a.png is there twice"
    yield zip_of(folder / "b.zip", [("a.png", b"\0" * 10 ** 7)], 8).read_bytes(), "cannot identify"


def test_broken_zips_say_what_is_wrong(tmp_path):
    for content, text in broken_zips(tmp_path):
        (tmp_path / "x.zip").write_bytes(content)
        refused(lambda: read_all(tmp_path / "x.zip"), "x.zip", text)


def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    white = "524946461a000000574542505650384c0e0000002ffebfff0f071011fd0f4444ff03"   # 16383 x 16383
    bombs = {"a.png": png_bomb(), "b.webp": bytes.fromhex(white),
             "c.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"}
    assert len(bombs["a.png"]) < 2 ** 21
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    for name, content in bombs.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(content)
        text = "cannot identify" if name == "c.jpg" else "exceeds limit"   # no PostScript is run
        refused(lambda folder=folder: data.load(str(folder), 8, tmp_path), name, text)
        zip_of(tmp_path / "z.zip", [(name, content)], 8)
        refused(lambda: read_all(tmp_path / "z.zip"), name, text)
    sparse = tmp_path / "a-png" / "big.bmp"
    with open(sparse, "wb") as f:
        f.truncate(2 ** 34)
    refused(lambda: data.list_images(tmp_path / "a-png"), "big.bmp", "268435456 bytes")


def test_many_files_need_little_memory(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(".png"))
    for i in range(1, 5000):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    tracemalloc.start()
    start = time.perf_counter()
    found = data.list_images(tmp_path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    images = data.iter_images(tmp_path, [name for name, _, _ in found])
    for _ in itertools.islice(images, 300):   # one at a time, none kept
        pass
    more = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 5000 and peak < 5000 * 1000 and more - peak < 2 ** 20
    assert seconds < 10   # 100,000 files: 20 times that at most; 2 s where this was written


def test_files_that_vanish_or_change(tmp_path):
    folder = picture_folder(tmp_path / "pics")
    images = data.iter_images(folder)
    next(images)
    for path in folder.iterdir():
        path.unlink()
    refused(lambda: list(images), "not a readable image", "No such file")
    path = zip_of(tmp_path / "a.zip", [(f"{i}.png", encoded(".png", size=(200, 200)))
                                       for i in range(9)])
    images = data.iter_images(path)
    next(images)
    os.truncate(path, 200)
    refused(lambda: list(images), "a.zip:1.png: not a readable image")
    np.save(tmp_path / "a.npy", np.zeros((99, 40, 40, 3), np.uint8))
    images = fid.rows_of(str(tmp_path / "a.npy"))
    next(images)
    os.truncate(tmp_path / "a.npy", 9999)   # a memory map would end the process here
    refused(lambda: list(images), "a.npy: changed while it was read")
    gone = data.iter_images(tmp_path / "gone.zip", ["0.png"])
    refused(lambda: next(gone), "gone.zip: not a readable zip", "No such file")


def test_unpacked_cifar_of_any_length_is_not_read_whole(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in data.CIFAR_FILES["test"]:
        with open(folder / name, "wb") as f:
            f.truncate(2 ** 36)
    refused(lambda: data.load("cifar10", data_dir=tmp_path, split="test"), "should have 30730000")
    (tmp_path / "b" / "cifar-10-binary.tar.gz").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):   # one line too
        data.load("cifar10", data_dir=tmp_path / "b")


def test_only_listed_addresses_and_checksums_always(tmp_path, monkeypatch, tiny):
    asked, failure = [], []

    class Answer(io.BytesIO):
        def read(self, n):
            if failure:
                raise failure.pop()
            return super().read(n)

    def urlopen(url, timeout):
        asked.append(url)
        return Answer(b"not what was asked for")

    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)
    folder = str(picture_folder(tmp_path / "pics"))
    empty = tmp_path / "empty"
    data.load(folder, 8, empty, "all")
    data.load("geometry", 16, empty, n_train=4)
    for name in ("celeba", "imagenet", str(tmp_path / "nowhere")):
        refused(lambda name=name: data.load(name, data_dir=empty))
    fid.main([folder, folder, *tiny])
    assert asked == []   # nothing was needed
    wanted = [data.CIFAR_URL, *(url for url, _, _ in fid.PUBLISHED.values())]
    calls = [lambda: data.load("cifar10", data_dir=empty), *(
        lambda f=f: fid.load_inception(f, data_dir=empty) for f in fid.PUBLISHED)]
    for call, checksum in zip(calls, ("md5", "sha256", "sha256")):
        refused(call, f"{checksum} is ")
    for error in (http.client.IncompleteRead(b"x", 9), OSError(28, "No space left on device"),
                  TimeoutError("slow")):
        failure.append(error)
        refused(calls[0], "cannot download", "put it at")
    assert asked == wanted + [data.CIFAR_URL] * 3 and all(url.startswith("https") for url in asked)
    assert not [p for p in empty.rglob("*") if p.is_file() and p.parent.name != "cache"]


# ------------------------------------------------------------------------ statistics and weights


@pytest.mark.parametrize("arrays, text", [
    (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), "must hold mu"),
    (dict(mu=np.zeros((4, 1))), "must hold mu"), (dict(mu=np.zeros(4, int)), "must hold mu"),
    (dict(mu=np.zeros(4, complex)), "must hold mu"), (dict(sigma=np.eye(5)), "must hold mu"),
    (dict(mu=np.array("text")), "must hold mu"), (dict(sigma=-np.eye(4)), "eigenvalue -1"),
    (dict(sigma=np.ones((4, 4)) - np.eye(4)), "eigenvalue -1"),
    (dict(mu=np.full(4, np.inf)), "not finite"), (dict(mu=np.full(4, 1e200)), "above 1e15"),
    (dict(sigma=np.eye(4) * np.nan), "finite"), (dict(sigma=np.diag([1, 1, 1, np.inf])), "finite"),
    (dict(sigma=np.eye(4) + np.eye(4, k=1)), "symmetric"),
])
def test_statistics_that_are_none(tmp_path, arrays, text):
    np.savez(tmp_path / "s.npz", **{"mu": np.zeros(4), "sigma": np.eye(4), **arrays})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: fid.main([str(tmp_path / "s.npz")] * 2), "s.npz", text)


@pytest.mark.parametrize("arrays", [
    dict(mu=np.arange(4.0).astype(">f8")), dict(mu=np.arange(4.0).astype(np.longdouble)),
    dict(sigma=np.eye(4).astype("f2")), dict(n=np.nan), dict(n=np.inf), dict(n=-5), dict(n="many"),
    dict(n=1j), dict(n=[9]), dict(id=5), dict(id=["x"]), dict(features=np.zeros((9, 4))),
])
def test_statistics_in_any_form(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", **{"mu": np.arange(4.0), "sigma": np.eye(4), **arrays})
    assert fid.load_stats(tmp_path / "s.npz")[2:] == (None, None)
    row = fid.main([str(tmp_path / "s.npz")] * 2)
    assert row["fid"] < 1e-12 and row["n_a"] is None


def test_statistics_bombs(tmp_path):
    def header(shape):
        out = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            out, {"descr": "<f8", "fortran_order": False, "shape": shape})
        return out.getvalue()

    path = tmp_path / "s.npz"
    claims = {"mu.npy": header((10 ** 6,)), "sigma.npy": header((10 ** 6, 10 ** 6))}
    zip_of(path, claims.items())
    refused(lambda: fid.load_stats(path), "not a readable .npz")
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), zzz=np.array([Evil(tmp_path / "ran")]))
    assert len(fid.load_stats(path)[0]) == 4 and not (tmp_path / "ran").exists()   # not looked at
    content = bytearray(path.read_bytes())
    listed = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4)   # the second, sigma's
    content[listed + 24:listed + 28] = struct.pack("<I", 2 ** 30)
    path.write_bytes(content)
    refused(lambda: fid.load_stats(path), "sigma object ()", "below 1 GiB")
    os.rename(path, tmp_path / "a.npy")   # a zip is no .npy, nor the other way round
    refused(lambda: list(fid.rows_of(str(tmp_path / "a.npy"))), "not a readable .npy")
    np.save(tmp_path / "b.npy", np.eye(4))
    os.rename(tmp_path / "b.npy", path)
    refused(lambda: fid.load_stats(path), "not a readable .npz")


@pytest.mark.parametrize("value, text", [
    (torch.full((32, 3, 3, 3), math.nan), "Conv2d_1a_3x3, its batch norm folded in, is not finite"),
    (torch.full((32, 3, 3, 3), 1e300, dtype=torch.float64), "Conv2d_1a_3x3, its batch norm"),
    (torch.zeros(32, 3, 3, 3, dtype=torch.complex64), "complex64"),
    (torch.zeros(32, 3, 3, 3, dtype=torch.int64), "int64"),
    (torch.zeros(32, 3, 3, 3).to_sparse(), "sparse"), (torch.zeros(32, 3, 3, 3, device="meta"), ""),
    (torch.zeros(1).expand(10 ** 6, 10 ** 6), "(1000000, 1000000)"), (torch.tensor(1.0), "is ()"),
])
def test_weights_that_are_none(tmp_path, value, text):
    path = random_weights(tmp_path / "w.pth", Conv2d_1a_3x3__conv__weight=value)
    refused(lambda: fid.load_inception(dims=64, weights=path), "w.pth: Conv2d_1a_3x3", text)


def test_weights_of_a_wrong_variance_head_checksum_or_size(tmp_path):
    path = random_weights(tmp_path / "w.pth", Conv2d_2b_3x3__bn__running_var=-torch.ones(64))
    refused(lambda: fid.load_inception(dims=64, weights=path), "Conv2d_2b_3x3, its batch norm")
    random_weights(path, fc__weight=torch.tensor(1.0))
    refused(lambda: fid.load_inception(dims=64, weights=path), "fc.weight is ()")
    published = path.rename(tmp_path / fid.PUBLISHED["2015"][0].rpartition("/")[2])
    refused(lambda: fid.load_inception(dims=64, weights=published), "sha256 is", "delete it")
    with open(path, "wb") as f:
        f.truncate(2 ** 40)
    refused(lambda: fid.load_inception(dims=64, weights=path), "at most 1 GiB")


# --------------------------------------------------------------------------------------- numbers


def test_distance_of_constant_identical_and_very_unequal_sets(tmp_path, tiny):
    grey, noise = torch.full((4, 3, 20, 20), 99, dtype=torch.uint8), uint8_images(9)
    one, other = write_folder(tmp_path / "a", grey), write_folder(tmp_path / "b", noise)
    assert fid.main([one, one, *tiny])["fid"] == 0
    assert fid.main([other, other, *tiny])["fid"] < 1e-6
    net = fid.load_inception(dims=64, weights=tiny[1])
    (a, _), (b, _) = (fid.features(net, [x]) for x in (grey, noise))
    assert (a.cov == 0).all()
    want = ((a.mean - b.mean).square().sum() + b.cov.trace()).item()   # no covariance on one side
    row = fid.main([one, other, "--kid", *tiny])
    assert row["fid"] == pytest.approx(want, rel=1e-6) and row["kid"] > 0
    few, many = noise[:2], uint8_images(3000, size=4, seed=1)
    sets = [fid.features(fid.Pixels(4), x.split(700), keep=True) for x in (few, many)]
    there, back = (fid.frechet_distance(x.mean, x.cov, y.mean, y.cov)
                   for (x, _), (y, _) in (sets, sets[::-1]))
    assert 0 < there == pytest.approx(back, rel=1e-6)
    assert math.isfinite(fid.kid(sets[0][1], sets[1][1])[0])


def test_kid_and_precision_of_too_few_images(tmp_path, tiny):
    two = write_folder(tmp_path / "two", uint8_images(2))
    one = write_folder(tmp_path / "one", uint8_images(1))
    assert math.isfinite(fid.main([two, two, "--kid", *tiny])["kid"])
    refused(lambda: fid.main([two, one, "--kid", *tiny]), "at least 2")
    refused(lambda: fid.main([two, two, "--prc", *tiny]), "more than 3")
    refused(lambda: fid.kid(torch.zeros(1, 4), torch.zeros(9, 4)), "at least 2")


@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 1e30])
def test_numbers_that_are_none_are_refused(wild):
    x, y = randn(9, 4), randn(9, 4, seed=1)
    x[7, 2] = wild
    refused(lambda: fid.kid(x, y), "features for KID", "not finite")
    refused(lambda: fid.precision_recall(y, x), "precision and recall", "not finite")
    mu, cov = torch.zeros(4), torch.eye(4)
    bad = cov.clone()
    bad[1, 1] = wild
    for moments in ((x[7], cov, mu, cov), (mu, cov, x[7], cov), (mu, bad, mu, cov),
                    (mu, cov, mu, bad)):
        refused(lambda moments=moments: fid.frechet_distance(*moments), "not finite")
    if not math.isfinite(wild):
        refused(lambda: fid.Statistics(4).add(x), "features of images 0 to 8 are not finite")


def test_activations_that_overflow_are_refused(tmp_path, tiny):
    images = write_folder(tmp_path / "a", uint8_images(3))
    path = random_weights(tmp_path / "w.pth", Conv2d_1a_3x3__conv__weight=torch.full(
        (32, 3, 3, 3), 1e38), Conv2d_2a_3x3__conv__weight=torch.full((32, 32, 3, 3), 1e38))
    refused(lambda: fid.main([images, images, *tiny, "--weights", str(path)]),
            "features of images 0 to 2 are not finite")


def test_mixed_sizes_and_modes_one_by_one(tmp_path, tiny):
    folder = tmp_path / "a"
    folder.mkdir()
    order = [(20, 20), (9, 31), (20, 20), (1, 1), (300, 5), (9, 31)]
    for i, (width, height) in enumerate(order):
        (folder / f"{i}.png").write_bytes(encoded(".png", "RGB" if i % 2 else "L", (width, height)))
    net = fid.load_inception(dims=64, weights=tiny[1])
    args = argparse.Namespace(batch=50, n=None)
    got = fid.features(net, fid.batches_of(str(folder), args), keep=True)[1]
    want = torch.cat([net(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
                      for _, image in data.iter_images(folder)])
    assert torch.allclose(got, want, rtol=1e-4) and len(got) == 6


@pytest.mark.parametrize("size", [(3, 2_000_000), (2_000_000, 3), (1, 1)])
@pytest.mark.parametrize("resize", fid.RESIZES)
def test_very_long_images_need_little(resize, size):
    x = torch.full((1, 1, *size), 200, dtype=torch.uint8)   # 24 GB, were it all resized one way
    want = {"tf1": (200 - 128) / 128, "pytorch-fid": 2 * 200 / 255 - 1}[resize]
    assert torch.allclose(fid.resized(x, resize), torch.tensor(want))


@pytest.mark.parametrize("shape, batches", [
    ((4, 3000, 3000, 3), [1] * 4), ((5, 4, 9, 1), [3, 2]), ((1, 3, 5000, 5000), [1]),
    ((5, 2000, 2000, 1), [3, 2])])
def test_batches_of_large_images_are_small(tmp_path, shape, batches):
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, shape)   # sparse
    args = argparse.Namespace(batch=3, n=None)
    assert [len(b) for b in fid.batches_of(str(tmp_path / "a.npy"), args)] == batches


@settings(max_examples=30, **FUZZ)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99),
       st.sampled_from([1e-6, 1.0, 1e6]))
def test_statistics_in_any_batches(sizes, seed, scale):
    x = (randn(sum(sizes) + 1, 5, seed=seed) + 3) * scale
    whole, parts = fid.Statistics(5), fid.Statistics(5)
    whole.add(x)
    for part in x.split([*sizes, 1]):
        parts.add(part)
    assert torch.allclose(whole.mean, parts.mean, rtol=1e-12)
    assert torch.allclose(whole.cov, parts.cov, rtol=1e-9, atol=1e-12 * scale ** 2)


# ----------------------------------------------------------------------------------------- flags

ABSURD = ["-1", "0", "1", "2", "3", "7", "1e400", "nan", "inf", "-inf", "", " ", "x", "1e-9", "0.5",
          "٣", "1_0", "9" * 40, str(10 ** 9), str(10 ** 6), str(2 ** 63), "--", "\ud800", "a\nb"]
SCRIPTS = {exp_pcr_natural: ["--dataset", "geometry"], exp_sc: [], exp_pixel_combination: [],
           exp_sample_insufficiency: [], th: []}
NUMBERS = ["--seeds", "--jobs", "--steps", "--d-steps", "--batch", "--n-dis", "--lr-g", "--lr-d",
           "--beta1", "--beta2", "--z-dim", "--width", "--base", "--gp-weight", "--comb-weight",
           "--ema-beta", "--log-every", "--eval-every", "--sample-every", "--ckpt-every",
           "--checks", "--n-fid", "--size", "--n-train", "--n-real", "--dims", "--n-cover",
           "--arms", "--paths", "--section", "--seed", "--arch", "--norm-d", "--init-d", "--name",
           "--device", "--preset", "--split"]


def dry_run(script, flags):
    """What becomes of a dry run: {} or exit code 2 after one line; anything else is raised."""
    args = [*SCRIPTS[script], "--smoke", *flags, "--dry-run"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return script.main(args)
        except UserError as error:
            return str(error)
        except SystemExit as stopped:
            assert stopped.code == 2
            return 2


def test_fuzzed_flags_are_taken_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = []

    @settings(max_examples=120, **FUZZ)
    @given(st.sampled_from([*SCRIPTS]), st.lists(st.tuples(
        st.sampled_from(NUMBERS), st.lists(st.sampled_from(ABSURD), max_size=2)), max_size=3))
    def try_one(script, flags):
        ended.append(dry_run(script, [part for flag, values in flags for part in (flag, *values)]))

    try_one()
    assert list(tmp_path.iterdir()) == []
    assert {} in ended and 2 in ended and any(isinstance(e, str) for e in ended)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [
    ["--seeds", "-1"], ["--seeds", str(2 ** 70)], ["--jobs", "0"], ["--device", "meta"],
    ["--device", "cpu:x"], ["--device", ""], ["--paths", str(10 ** 13)], ["--paths", "nan"],
    ["--width", str(10 ** 9)], ["--z-dim", str(10 ** 12)], ["--size", str(2 ** 40)],
    ["--size", "0"], ["--size", "8192"], ["--lr-g", "nan"], ["--lr-g", "inf"],
    ["--gp-weight", "1e400"], ["--n-fid", str(10 ** 9)], ["--steps", str(10 ** 30)],
    ["--log-every", "-5"], ["--comb-weight", "-inf"], ["--base", str(10 ** 20)],
], ids=" ".join)
def test_absurd_flags_are_refused(tmp_path, monkeypatch, script, flags):
    monkeypatch.chdir(tmp_path)
    answer = dry_run(script, flags)
    unused = script is th and flags[0] == "--jobs" and answer == {}
    assert unused or answer == 2 or flags[0] in answer and "\n" not in answer   # 2: no such flag
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, text", [
    (["--n", str(10 ** 30)], "--n 1"), (["--n", "-1"], "--n -1"), (["--batch", "0"], "--batch 0"),
    (["--batch", str(10 ** 30)], "--batch 1"), (["--batch", "1000000"], "from 1 to 1000"),
    (["--save-stats", "x.txt"], "*.npz"), (["--save-stats", "d.npz"], "*.npz"),
    (["--weights", "/dev/zero"], "no such file"), (["--weights", "d.npz"], "no such file"),
])
def test_absurd_flags_of_the_command(tmp_path, monkeypatch, tiny, flags, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.npz").mkdir()
    folder = write_folder(tmp_path / "a", uint8_images(3))
    before = sorted(tmp_path.rglob("*"))
    refused(lambda: fid.main([folder, folder, *tiny, *flags]), text)
    assert sorted(tmp_path.rglob("*")) == before


def test_absurd_sources_of_the_command(tmp_path, tiny):
    folder, other = write_folder(tmp_path / "a", uint8_images(3)), tmp_path / "x.npy"
    for pair in ((folder, ""), ("", folder), (folder, "x" * 300), (folder, "a\0b")):
        with pytest.raises((UserError, OSError)) as caught:
            fid.main([*pair, *tiny])
        assert "\n" not in str(caught.value)
    for size in ("0", "-8", "4097", str(10 ** 30)):
        refused(lambda size=size: fid.main(["geometry", folder, "--size", size, *tiny]), "--size")
    refused(lambda: fid.main(["geometry", folder, "--size", "4096", *tiny]), "4 GiB")
    for shape in ((0, 8, 8, 3), (5, 0, 8, 3), (5, 8, 8), (5, 8, 8, 4), (5,), ()):
        np.save(other, np.zeros(shape, np.uint8))
        refused(lambda: fid.main([folder, str(other), *tiny]))
    np.lib.format.open_memmap(other, "w+", np.uint8, (1, 20_000, 20_000, 3))   # sparse
    refused(lambda: fid.main([folder, str(other), *tiny]), "268435456 bytes an image")
    np.save(other, np.asfortranarray(np.zeros((5, 8, 8, 3), np.uint8)))
    refused(lambda: fid.main([folder, str(other), *tiny]), "C order")


def test_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    folder = str(picture_folder(tmp_path / "pics"))
    for size in (-3, 0, 4097, 10 ** 30, math.nan):
        refused(lambda size=size: data.load(folder, size, tmp_path, "all"), "--size")
    pages = 3 * 10 * 64 * 64 - 1   # a byte less than is needed
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else 1)
    refused(lambda: data.load(folder, 64, tmp_path, "all"), "--size 64: 10 images need")
    pages += 1
    assert len(data.load(folder, 64, tmp_path, "all")) == 10
    refused(lambda: geometry.draw(10 ** 9, 2), "4 GiB")
    refused(lambda: geometry.draw(2, 2, size=10 ** 6), "4 GiB")


def test_one_line_whatever_the_name_or_the_memory(capsys, monkeypatch):
    def fail(error):
        with pytest.raises(SystemExit) as stopped:
            harness.cli(lambda: (_ for _ in ()).throw(error))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert fail(UserError("a\nb.png: broken")).endswith("error: a\\nb.png: broken\n")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out\nof memory")):
        assert fail(error).count("\n") == 1
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", out)   # strict, as in a pipe
    harness.cli(lambda: exp_pcr_natural.main(["--dataset", "\udcff", "--smoke", "--dry-run"]))
    out.flush()
    assert b"dataset=\\udcff" in out.buffer.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("content", [b"[1]", b'{"script": "%s"}', b'{"script": "%s", "rows": []}',
                                     b"3", b"text", b"\xff\xfe", b""])
def test_results_that_are_none_are_not_drawn(tmp_path, script, content):
    name = script.__name__.encode()
    (tmp_path / "result.json").write_bytes(content.replace(b"%s", name))
    refused(lambda: script.main(["--plot", str(tmp_path)]), f"no finished run of {script.__name__}")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_generator_of_nan_draws_no_images(tmp_path):
    G, _ = core.build(config())
    assert core.draw(G, torch.zeros(2, 4)).shape == (2, 1, 8, 8)
    with torch.no_grad():
        next(G.parameters()).fill_(math.nan)
    refused(lambda: core.draw(G, torch.zeros(2, 4)), "not finite")
    for n in ("0", "-1", "1" + "0" * 30):
        refused(lambda n=n: exp_sc.main(["--sample", "none.pt", "--n", n]), "--n")


# ------------------------------------------------------------------------------------- bench


def test_bench_measures_every_part(tmp_path, capsys):
    result = bench.main(["--smoke", "--json", "--data-dir", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    assert {"device", "processor", "cores", "threads", "repeats", "clock", "seconds", "versions",
            "load", "rows", "left_out"} <= result.keys()
    assert {"git", "python", "torch", "numpy", "scipy"} <= result["versions"].keys()
    assert {r["part"] for r in result["rows"]} == set(bench.PARTS) and not result["left_out"]
    for row in result["rows"]:
        numbers = [v for k, v in row.items() if not isinstance(v, str)]
        assert all(math.isfinite(v) and v > 0 for v in numbers), row
        assert row["low"] <= row["value"] <= row["high"] and row["unit"]
    rows = {f"{r['part']} {r['name']}": r for r in result["rows"]}
    step = rows["train wgangp smoke, 32 px, eager"]
    assert {"d_steps_per_s", "peak_percent", "time_ratio"} <= step.keys() and step["repeats"] == 2
    assert rows["train wgangp smoke, 32 px, eager pcr, 2 together"]["unit"] == "runs/hour"
    ours, scipys = (rows[f"fid distance of 64 features, one thread, {name}"]
                    for name in ("fid.py", "scipy sqrtm"))
    assert ours["distance"] == pytest.approx(scipys["distance"], rel=1e-8)
    assert all(row["mib"] >= row["mib_before"] for name, row in rows.items() if "growth" in name)


def test_bench_imports_other_tools_only_when_asked(tmp_path):
    tools = ["torchgan", "torch_mimicry", "pytorch_fid", "torch_fidelity", "cleanfid",
             "torchmetrics"]
    for tool in tools:
        (tmp_path / f"{tool}.py").write_text("")            # an import of it would not fail
    code = ("import bench, sys; result = bench.main(sys.argv[1:] + ['--smoke']);"
            f"print(sorted({{*{tools}, 'bench_peers'}} & {{*sys.modules}}), result['left_out'])")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(tmp_path)])}

    def last_line(*args):
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, env=env, text=True,
                              capture_output=True, timeout=300)
        assert not done.returncode, done.stderr
        return done.stdout.splitlines()[-1]

    for part in ("train", "distance"):
        assert last_line(part) == "[] {}"
    asked = last_line("distance", "--peers")
    assert "pytorch_fid" in asked and "pytorch-fid, DISTANCE" in asked  # and why it was left out


def test_bench_counts_flops_as_by_hand():
    conv, x = torch.nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 10)
    forward = 2 * 2 * 8 * 3 * 9 * 100                       # B, C out, C in, kernel, pixels
    with bench.Flops() as flops:
        y = conv(x)
    assert flops.total == forward
    with bench.Flops() as flops:
        y.sum().backward()                                  # of the weight alone
    assert flops.total == forward
    with bench.Flops() as flops:
        conv(x.requires_grad_()).sum().backward()
    assert flops.total == 3 * forward
    linear, x = torch.nn.Linear(7, 5, bias=False), torch.randn(4, 7, requires_grad=True)
    with bench.Flops() as flops:                            # forward, input, and penalty of weight
        torch.autograd.grad(linear(x).sum(), x, create_graph=True)[0].norm().backward()
    assert flops.total == 3 * (2 * 4 * 7 * 5)


def test_bench_takes_turns_and_leaves_out_what_fails(capsys):
    args = argparse.Namespace(smoke=True, repeats=3, clock="wall", peers=False)
    b, calls = bench.Bench(args, torch.device("cpu")), []
    times = b.race({"a": lambda: calls.append("a"), "broken": lambda: 1 / 0,
                    "b": lambda: calls.append("b")})
    assert "".join(calls).endswith("ababab") and {k: len(v) for k, v in times.items()} == {
        "a": 3, "b": 3}
    assert b.left_out == {"broken": "ZeroDivisionError: division by zero"}
    b.row("part", "name", "unit", np.array([1.0, 2.0, 9.0]))
    assert [b.rows[0][k] for k in ("low", "value", "high", "repeats")] == [1.5, 2.0, 5.5, 3]


def test_bench_refuses_what_it_cannot_measure():
    for wrong in (["--repeats", "-1"], ["--threads", "-1"]):
        with pytest.raises(UserError, match="at least 1"):
            bench.main(["geometry", *wrong])


# ---------------------------------------------------------------------------------------- results


def test_readme_says_what_the_results_say():
    spec = importlib.util.spec_from_file_location("table", HERE / "results" / "table.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = (HERE / "README.md").read_text()
    shown = text[text.index(made.FIRST) + len(made.FIRST):text.index(made.LAST)]
    again = "run `python results/table.py --write`"
    assert shown.strip() == made.table(), again
    assert (HERE / "results" / "README.md").read_text() == made.provenance(), again
    committed = {str(p.parent.relative_to(HERE / "results"))
                 for p in (HERE / "results").rglob("result.json")}
    assert committed <= set(made.COMMANDS), "a folder without a command"
    assert all((HERE / "results" / name / "figure.png").exists() for name in committed)
    assert made.verdict([3, 4], [1, 2]) == "holds" and made.verdict([1, 4], [2, 2]) == "in part"
    assert made.verdict([1, 2], [3, 4]) == "**no**"
    assert made.verdict([1], [3], False).startswith("not")


# --------------------------------------------------------------------------------- theory_sde.py

STEPS = [(1.0, 1.0), (0.2, 0.2), (0.4, 0.05), (0.05, 1.3)]


def th_variance(turn, gain, k, q=2.0):
    """Covariance after k steps, as the sum over all past noises instead of a recursion."""
    turn, gain = np.array(turn, float), np.array(gain, float)
    past = [np.linalg.matrix_power(turn, i) @ gain for i in range(k)]
    return q * sum(p @ p.T for p in past)


@pytest.mark.parametrize("t", [0.3, 2.0, 17.0])
def test_theory_flow_laws_against_quadrature(t):
    for eta, mu in STEPS:
        o = math.sqrt(eta * mu)
        exact = 2 * eta * mu * quad(lambda s, o=o: math.sin(o * s) ** 2, 0, t, epsabs=1e-13)[0]
        assert th.flow_law(t, eta, mu) == pytest.approx(exact, rel=1e-9)
    t += 1
    for power in (0.0, 0.3, 0.6, 0.75, 1.0):
        def angle(s, power=power):
            return math.log(s) if power == 1 else (s ** (1 - power) - 1) / (1 - power)
        assert th.clock(angle(t), power) == pytest.approx(t, rel=1e-12)
        exact = 2 * quad(lambda s, p=power, a=angle: s ** (-2 * p) * math.sin(a(t) - a(s)) ** 2,
                         1, t, epsabs=1e-13, epsrel=1e-12, limit=400)[0]
        assert th.power_law(angle(t), power) == pytest.approx(exact, rel=1e-9)
        if power == 1:
            assert th.inverse_t_law(t) == pytest.approx(exact, rel=1e-9)


def test_theory_inverse_t_settles_into_one_plus_minus_one_over_root_five():
    late = th.inverse_t_law(np.exp(np.linspace(20, 20 + math.pi, 100_001)))
    assert late.min() == pytest.approx(1 - 5 ** -0.5, abs=1e-8)
    assert late.max() == pytest.approx(1 + 5 ** -0.5, abs=1e-8)


@pytest.mark.parametrize("eta, mu", STEPS)
@pytest.mark.parametrize("k", [1, 2, 7, 60])
def test_theory_discrete_laws_against_sums(eta, mu, k):
    x = eta * mu
    alternating = th_variance([[1, -eta], [mu, 1 - x]], [[eta], [x]], k)[1, 1]
    simultaneous = th_variance([[1, -eta], [mu, 1]], [[eta], [0]], k)[1, 1]
    assert th.alternating_law(k, eta, mu) == pytest.approx(alternating, rel=1e-9)
    assert th.simultaneous_law(k, eta, mu) == pytest.approx(simultaneous, rel=1e-9, abs=1e-12)
    for n in (2, 3):
        assert th.recursion(th.sgd(eta, mu, n_dis=n), [k])[1][0, 1, 1] == pytest.approx(
            float(th.alternating_law(k, n * eta, mu)) / n, rel=1e-9)
    if eta == mu:       # the mean of theta_1..theta_k, as a third state that adds them up
        total = th_variance([[1, -eta, 0], [mu, 1 - x, 0], [mu, 1 - x, 1]], [[eta], [x], [x]], k)
        assert th.polyak_law(k, x) == pytest.approx(total[2, 2] / k ** 2, rel=1e-9)
        polyak = th.recursion(lambda j: th.averaged(th.sgd(eta, mu), 1 / j), [k])[1][0, -1, -1]
        assert polyak == pytest.approx(total[2, 2] / k ** 2, rel=1e-9)


def test_theory_settled_laws_against_lyapunov():
    def settled(matrix):
        size = len(matrix)
        turn, gain = matrix[:, :size], matrix[:, size:]
        return solve_discrete_lyapunov(turn, 2 * gain @ gain.T)[-1, -1]
    for eta, mu in ((0.3, 0.3), (0.4, 0.1), (0.05, 0.05), (0.2, 0.02)):
        x = eta * mu
        for law, matrix in (
                [(th.SETTLED["r1"](eta, mu, g), th.sgd(eta, mu, g)) for g in (0.1, 0.5, 2.0)]
                + [(th.SETTLED["momentum"](x, b), th.momentum(eta, mu, -b)) for b in (0.2, 0.5)]
                + [(th.SETTLED["omd"](x), th.optimistic(eta, mu)),
                   (th.SETTLED["eg"](x), th.extragradient(eta, mu)),
                   (th.SETTLED["eg, fresh"](x), th.extragradient(eta, mu, True))]):
            assert law == pytest.approx(settled(matrix), rel=1e-9)


def test_theory_methods_are_their_updates():
    """The matrices against the updates written out for numbers."""
    rng = np.random.default_rng(0)
    eta, mu, gamma, beta = 0.3, 0.2, 0.7, -0.4
    w, theta, a, b, xi, xi2, mean = rng.normal(size=7)
    near = pytest.approx
    w1 = w + eta * (xi - theta - gamma * w)
    w2 = w1 + eta * (xi2 - theta - gamma * w1)
    assert th.sgd(eta, mu, gamma) @ [w, theta, xi] == near([w1, theta + mu * w1])
    assert th.sgd(eta, mu, gamma, 2) @ [w, theta, xi, xi2] == near([w2, theta + mu * w2])
    assert th.sgd(eta, mu, gamma, 1, False) @ [w, theta, xi] == near([w1, theta + mu * w])
    assert th.optimistic(eta, mu) @ [w, a, b, theta, xi] == near(
        [w + 2 * eta * (xi - theta) - eta * a, xi - theta, w, theta + 2 * mu * w - mu * b])
    assert th.extragradient(eta, mu, True) @ [w, theta, xi, xi2] == near(
        [w + eta * (xi2 - (theta + mu * w)), theta + mu * (w + eta * (xi - theta))])
    assert th.extragradient(eta, mu) @ [w, theta, xi] == near(
        [w + eta * (xi - (theta + mu * w)), theta + mu * (w + eta * (xi - theta))])
    move_w = beta * a + xi - theta
    move_theta = beta * b + w + eta * move_w
    assert th.momentum(eta, mu, beta) @ [w, a, b, theta, xi] == near(
        [w + eta * move_w, move_w, move_theta, theta + mu * move_theta])
    assert (th.averaged(th.sgd(eta, mu, gamma), 0.1) @ [w, theta, mean, xi])[-1] == near(
        0.9 * mean + 0.1 * (theta + mu * w1))
    twice = th.sgd(eta, mu) @ [*(th.sgd(eta, mu) @ [w, theta, xi]), xi2]
    assert th.epoch(th.sgd(eta, mu), 2) @ [w, theta, xi, xi2] == near(twice)


def test_theory_alternating_energy_grows_linearly():
    for eta, mu in STEPS:
        mean, cov = th.recursion(th.sgd(eta, mu), range(1, 200))
        second = cov + mean[:, :, None] * mean[:, None, :]      # m = 1
        energy = mu * second[:, 0, 0] - eta * mu * second[:, 0, 1] + eta * second[:, 1, 1]
        start = mu - eta * mu + eta
        exact = start + 2 * eta ** 2 * mu * np.arange(1, 200)
        assert energy == pytest.approx(exact, rel=1e-9)


def test_theory_flow_steps_converge_to_the_law():
    for power, angle in ((0.0, 2.0), (0.75, 3.0), (1.0, 3.0)):
        exact = th.power_law(angle, power)
        errors = [abs(th.recursion(th.flow(angle / n, power), [n])[1][0, 1, 1] - exact)
                  for n in (50, 100)]
        assert errors[1] < 2e-4 * exact
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)     # of order h^2


def test_theory_finite_covariances_by_enumeration():
    images = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    images = images / images.std(correction=0)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    batches = images[orders].unflatten(1, (2, 2)).mean(2)              # (24, 2)
    gen = harness.generator(0, "cpu")
    exact = 2 * (batches.T @ batches / len(batches)).numpy()
    assert th.finite(images, 2, "epoch", gen)[1] == pytest.approx(exact, rel=1e-12)
    assert th.finite(images, 2, "subset", gen)[1] == pytest.approx(exact[:1, :1], rel=1e-12)
    assert th.finite(images, 4, "epoch", gen)[1] == pytest.approx(np.zeros((1, 1)))
    for scheme in ("iid", "subset", "epoch"):
        draw, cov = th.finite(images, 2, scheme, gen)
        xi = draw(40_000)
        assert xi.shape == (2 if scheme == "epoch" else 1, 40_000)
        measured = 2 * (xi @ xi.T / 40_000).numpy()
        assert measured == pytest.approx(cov, abs=0.03)
    draw, _ = th.finite(images, 4, "subset", gen)
    assert draw(10).abs().max() < 1e-12                                # all four: no noise


def test_theory_mcshane_attains_equation_11():
    gen = harness.generator(0, "cpu")
    x1, x2 = torch.randn(2, 5, 9, generator=gen, dtype=torch.float64)
    delta = (x1 - x2).norm(dim=1)
    lipschitz, f1, f2 = 1.7, torch.full((5,), 0.8).double(), torch.full((5,), 1.1).double()

    def f(x):
        return th.mcshane(x, (x1, x2), (f1, f2), lipschitz)
    assert torch.allclose(f(x1), f1) and torch.allclose(f(x2), f2)
    for lam in (0.1, 0.5, 0.8):
        right_side = torch.maximum(f1 - lipschitz * (1 - lam) * delta, f2 - lipschitz * lam * delta)
        assert torch.allclose(f(lam * x1 + (1 - lam) * x2), right_side, atol=1e-12)
    a, b = torch.randn(2, 5, 9, generator=gen, dtype=torch.float64)
    assert ((f(a) - f(b)).abs() <= lipschitz * (a - b).norm(dim=1) + 1e-12).all()


def test_theory_lipschitz_bound_holds():
    gen = harness.generator(0, "cpu")
    x = torch.randn(64, 256, generator=gen)
    D = th.train_critic(x, -x, x / 2, 0.5, 3, 0)
    product = math.prod(torch.linalg.svdvals(m.weight)[0].item() for m in D if hasattr(m, "weight"))
    bound = th.lipschitz_bound(D)
    assert bound == pytest.approx(product, rel=1e-9)
    a, b = torch.randn(2, 500, 256, generator=gen, dtype=torch.float64)
    assert ((D(a) - D(b)).abs() / (a - b).norm(dim=1)).max() <= bound


def test_theory_smoke(tmp_path, capsys):
    flags = ["--smoke", "--device", "cpu", "--outdir", str(tmp_path)]
    result = th.main(flags)
    folder = tmp_path / "theory_sde" / "smoke"
    assert capsys.readouterr().out.splitlines()[-2:] == [str(folder / "result.json"),
                                                         str(folder / "figure.png")]
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    names = "const_sde inverse_t_sde power_sde alternating simultaneous r1 n_critic omd eg momentum"
    for name in [*names.split(), "ema", "polyak", "finite", "theorem3"]:
        assert any(row["check"].startswith(name) for row in result["rows"]), name
    for row in result["rows"]:
        assert {"check", "section", "k", "t", "m", "eta", "mu", "exact", "measured", "halfwidth",
                "z"} <= set(row)
        if row["section"] == 5:
            assert row["measured"] == 0                                 # violations of the bound
    z = np.array([row["z"] for row in result["rows"] if row["z"] is not None])
    assert abs(z).max() < th.Z_MAX and (z ** 2).mean() == pytest.approx(1, abs=0.4)
    with pytest.raises(harness.UserError, match="--resume"):
        th.main(flags)
    (folder / "figure.png").unlink()
    th.main(["--plot", str(folder)])
    assert (folder / "figure.png").stat().st_size > 50_000


@pytest.mark.parametrize("name", ["alternating_law", "flow_law"])
def test_theory_wrong_law_is_found(tmp_path, monkeypatch, name):
    law = getattr(th, name)
    monkeypatch.setattr(th, name, lambda *args: 1.3 * law(*args))
    monkeypatch.setattr(th, "plot", lambda folder: None)
    with pytest.raises(SystemExit) as stop:
        th.main(["--smoke", "--device", "cpu", "--section", "1", "--outdir", str(tmp_path)])
    assert stop.value.code not in (0, None)
    assert (tmp_path / "theory_sde" / "smoke" / "result.json").exists()


def test_theory_violated_bound_is_found():
    row = {"check": "theorem3", "section": 5, "z": None, "measured": 0}
    assert not th.failures([row]) and th.failures([{**row, "measured": 1}]) == ["theorem3"]
    assert th.failures([{"check": "omd", "section": 3, "z": math.nan, "measured": 1.0}]) == ["omd"]
