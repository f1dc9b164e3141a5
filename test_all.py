"""All tests: `pytest test_all.py`; `pytest test_all.py -m "not slow"` in a minute. No network.

Tests on real images and published weights run where GAN_DATA names a folder that holds them, and
are skipped elsewhere.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
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
from scipy.linalg import sqrtm
from scipy.optimize import linprog, minimize_scalar
from scipy.sparse import csr_array
from scipy.sparse import vstack as sparse_stack
from scipy.sparse.csgraph import dijkstra
from scipy.special import gammaln
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bench
import core
import data
import exp_pcr_natural as pcr_natural
import exp_pixel_combination as pixels
import exp_sample_insufficiency as insufficiency
import exp_sc
import fid
import geometry
import harness
import neighbours
import sweep
import theory_sde as th
from core import UserError
from neighbours import bourgan, double_descent, infogan_cr, latent, mix_gan, topology

HERE = Path(core.__file__).parent
README = (HERE / "README.md").read_text()
torch.set_num_threads(1)        # networks this small only wait for a second one
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(
    [str(HERE), str(Path(__file__).parent)])}       # for scripts, and copies of them elsewhere


def config(**changes):
    """A tiny training configuration."""
    return argparse.Namespace(**{**dict(
        arch="dcgan", size=8, channels=1, z_dim=4, width=4, base=4, norm_d="none", init_d="he",
        loss="wgan", gp_weight=10.0, gp_comb=False, comb_weight=0.5, batch=4, n_dis=2, steps=6,
        lr_g=1e-2, lr_d=2e-2, beta1=0.5, beta2=0.9, lr_decay=True, ema_beta=0.9, flip=True, seed=0,
        log_every=4, eval_every=3, n_fid=8), **changes})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=core.generator(seed), dtype=torch.float64)


def uint8_images(n, channels=3, size=20, seed=0):
    return torch.randint(0, 256, (n, channels, size, size), generator=core.generator(seed),
                         dtype=torch.uint8)


def make_trainer(d_loss=core.d_loss, data=None, **changes):
    cfg = config(**changes)
    return core.Trainer(cfg, uint8_images(16, 1, cfg.size) if data is None else data,
                        *core.build(cfg), d_loss=d_loss)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def check_same(*paths):
    """Check that two checkpoints are equal bit for bit: networks, optimizers, random stream."""
    a, b = ({**harness.read_checkpoint(path), "config": {}} for path in paths)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def refused(call, *texts):
    """Check that `call` raises a UserError of one line that holds all of `texts`."""
    wanted = "".join(f"(?=.*{re.escape(text)})" for text in texts)
    with pytest.raises(UserError, match=rf"\A{wanted}.*\Z"):       # keeps no frame, and no lock
        call()


def python(*args, **kwargs):
    """A Python process that has ended."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True,
                          timeout=300, **kwargs)


# --------------------------------------------------------------------------- mathematics of core


@pytest.mark.parametrize("arch, norm_d, gp_weight", [
    ("dcgan", "none", 10.0), ("dcgan", "batch", 0.0), ("dcgan", "layer", 10.0),
    ("sagan", "none", 0.0)])
def test_networks(arch, norm_d, gp_weight):
    """Shapes and range, the published channel counts, first weights from a stream of their own."""
    before = torch.get_rng_state()
    for size, base, z_dim, width in ((8, 4, 4, 4), (32, 2, 4, 4), (64, 4, 128, 64)):
        cfg = config(arch=arch, norm_d=norm_d, gp_weight=gp_weight, size=size, base=base,
                     channels=3, z_dim=z_dim, width=width, init_d="dcgan")
        G, D = core.build(cfg)
        assert torch.equal(before, torch.get_rng_state())   # a caller's random numbers stay
        x = G(torch.randn(2, z_dim, generator=core.generator(0)))
        assert x.shape == (2, 3, size, size) and x.abs().max() <= 1 and D(x).shape == (2,)
        assert (core.LeakyReLU if gp_weight else nn.LeakyReLU) in map(type, D)
    cfg.seed = 1
    assert not torch.equal(flat(G), flat(core.build(cfg)[0]))
    g = [m.out_channels for m in G if isinstance(m, nn.ConvTranspose2d)]
    d = [m.out_channels for m in D if isinstance(m, nn.Conv2d)]
    assert G[0].out_features == 512 * 16 and g == [256, 128, 64, 3] and d == [64, 128, 256, 512]
    layers = [m for m in [*G.modules(), *D.modules()]
              if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == (18 if arch == "sagan" else 10)
    assert {hasattr(m, "parametrizations") for m in layers} == {arch == "sagan"}    # spectral norm
    if arch == "dcgan":
        assert D[2].weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_attention_and_leaky_relu_with_its_derivatives_are_those_of_pytorch():
    layer, x = core.Attention(16).eval(), torch.randn(2, 16, 8, 8)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gain, 0.7)
    q, k, v = (f(x) for f in (layer.query, layer.key, layer.value))
    q, k, v = (m.flatten(2).mT for m in (q, F.max_pool2d(k, 2), F.max_pool2d(v, 2)))
    assert q.shape == (2, 64, 2) and k.shape == (2, 16, 2) and v.shape == (2, 16, 8)
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0).mT.unflatten(2, (8, 8))
    torch.testing.assert_close(layer(x), x + 0.7 * layer.out(out))
    x, convs, grads = torch.randn(4, 3, 8, 8).requires_grad_(), [nn.Conv2d(3, 3, 3)] * 2, []
    for act in (core.LeakyReLU(), nn.LeakyReLU(0.2)):
        out = act(convs[1](act(convs[0](x)))).square().sum()
        first, = torch.autograd.grad(out, x, create_graph=True)
        grads.append([out, first, *torch.autograd.grad(first.norm(), convs[0].weight)])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_pixel_combinations_and_eq_13_by_hand():
    x = torch.randn(5, 1, 2, 2)
    pairs = [(core.pixel_average(x)[i] - (x[i] + x[j]) / 2).abs().max() < 1e-6
             for i in range(5) for j in range(5)]
    assert sum(pairs) == 5 and not any(pairs[::6])                      # one partner, not itself
    with pytest.raises(ValueError, match="two images"):
        core.pixel_average(x[:1])
    a, b = torch.tensor([-1., -1, 1, 1]), torch.tensor([-1., 1, -1, 1])
    assert core.pixel_and(a, b).tolist() == [-1, -1, -1, 1]
    assert core.pixel_or(a, b).tolist() == [-1, 1, 1, 1]
    real, fake, comb = torch.tensor([1., 3]), torch.tensor([2., 4]), torch.tensor([10., 20])
    assert core.pcr_loss(real, fake, comb).item() == 2 + (3 + 15) / 2
    assert core.pcr_loss(real, fake, comb, comb_weight=0.25).item() == 2 + 0.75 * 3 + 0.25 * 15


def test_sample_correction_by_hand():
    x, realism = torch.arange(6.).view(6, 1), torch.tensor([0.0, 1.0, 0.2, 0.9, 0.8, 0.1])
    for threshold, wanted in ((0.5, [2, 0, 2, 0, 0, 2]), (0.8, [1.5, 0, 1.5, 0, 1.5, 1.5]),
                              (-1, [0] * 6)):
        kept, weight = core.sample_correction(x, realism, threshold)
        assert torch.equal(kept, x) and weight.tolist() == wanted
    for sign, wanted in ((1, [0, 2, 4, 5]), (-1, [0, 1, 2, 3])):
        kept, weight = core.sample_correction(x, sign * realism, 0.5, n_keep=4)
        assert sorted(kept.flatten().tolist()) == wanted    # 1 and 3 made way for 4, 5; or nobody
        assert weight.tolist() == [1] * 4


def test_readme_lines_in_a_strangers_gan():
    code = re.search(r"<!-- tested -->\n```python\n(.*?)```", README, re.S)[1]
    D, (x_real, x_fake) = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), torch.randn(2, 8, 1, 4, 4)
    names = {"D": D, "x_real": x_real, "x_fake": x_fake, "F": F,
             "is_realistic": lambda x: x.mean((1, 2, 3)) > 0}
    exec(code, names)
    f, keep = F.softplus, (x_fake.mean((1, 2, 3)) <= 0).float()
    expected = (f(-D(x_real)).mean() + 0.5 * (keep * f(D(x_fake)).flatten()).sum() / keep.sum()
                + 0.5 * f(D((x_real + x_real.roll(1, 0)) / 2)).mean())
    torch.testing.assert_close(names["d_loss"], expected)
    names["d_loss"].backward()


# ------------------------------------------------------------------------------------ trainer


@pytest.mark.parametrize("loss, on_real, on_fake, on_g", [
    ("wgan", lambda d: -d, lambda d: d, lambda d: -d),
    ("lsgan", lambda d: (1 - d).square(), lambda d: d.square(), lambda d: (1 - d).square()),
    ("hinge", lambda d: (1 - d).clamp(0), lambda d: (1 + d).clamp(0), lambda d: -d),
    ("ns", lambda d: -d.sigmoid().log(), lambda d: -(1 - d.sigmoid()).log(),
     lambda d: -d.sigmoid().log())], ids=["wgan", "lsgan", "hinge", "ns"])
@pytest.mark.parametrize("changes", [
    dict(gp_weight=0.0, norm_d="batch"), dict(gp_weight=10.0), dict(gp_weight=3.0, gp_comb=True)],
    ids=["", "gp", "gp-comb"])
def test_both_losses_are_the_formulas(loss, on_real, on_fake, on_g, changes):
    """Value and gradient of D's update: eq. (13), weighted fakes, penalty, its random numbers."""
    weight, changes = torch.tensor([0., 2, 2, 0]), dict(loss=loss, comb_weight=0.3, **changes)

    def arm(t, x_real, x_fake):
        assert not x_fake.requires_grad
        return core.d_loss(t, x_real, x_fake, (x_real + x_real.roll(1, 0)) / 2, weight)

    t, twin = make_trainer(arm, **changes), make_trainer(**changes)
    for p in t.D.parameters():
        p.grad = torch.ones_like(p)                             # of another update: to be cleared
    logs, D, x_real, x_fake = t.d_update(), twin.D, twin.real(), twin.fake()
    x_comb = (x_real + x_real.roll(1, 0)) / 2
    expected = (on_real(D(x_real)).mean() + 0.7 * (weight * on_fake(D(x_fake))).mean()
                + 0.3 * on_fake(D(x_comb)).mean())
    if twin.cfg.gp_weight:
        ends = torch.stack([x_comb[0], x_comb[2], x_fake[1], x_fake[3]])
        eps = torch.rand(4, 1, 1, 1, generator=twin.gen)
        between = (1 - eps) * x_real + eps * (ends if twin.cfg.gp_comb else x_fake)
        grad, = torch.autograd.grad(D(between.requires_grad_()).sum(), between, create_graph=True)
        expected = expected + twin.cfg.gp_weight * (
            (grad.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
    expected.backward()
    torch.testing.assert_close(logs["d_loss"], expected)
    for p, q in zip(t.D.parameters(), D.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert logs["kept"] == 0.5 and {"d_real", "d_fake", "d_comb", "d_grad"} <= logs.keys()
    twin = make_trainer(**changes)
    torch.testing.assert_close(make_trainer(**changes).g_update()["g_loss"],
                               on_g(twin.D(twin.G(twin.latent(4)))).mean())


@pytest.mark.parametrize("arch, loss", [("dcgan", "wgan"), ("dcgan", "lsgan"), ("sagan", "hinge")])
def test_each_update_moves_its_own_network(arch, loss):
    t = make_trainer(pcr_natural.pcr, arch=arch, loss=loss, size=16)
    g, d = flat(t.G), flat(t.D)
    t.d_update()
    assert torch.equal(flat(t.G), g) and not torch.equal(flat(t.D), d)
    d = flat(t.D)
    t.g_update()
    assert torch.equal(flat(t.D), d) and not torch.equal(flat(t.G), g)
    torch.testing.assert_close(flat(t.G_ema), 0.9 * g + 0.1 * flat(t.G))
    assert all(map(torch.equal, t.G_ema.buffers(), t.G.buffers()))
    t.update()
    assert (t.step, t.d_steps) == (1, 2)


@pytest.mark.parametrize("decay, left", [(True, [1, 1, 1, 1, 2 / 3, 1 / 3]), (False, [1] * 6)])
def test_step_sizes_are_constant_until_half_of_the_run(decay, left):
    cfg, net = config(lr_decay=decay), nn.Linear(1, 1)
    t = core.Trainer(cfg, uint8_images(16, 1, 8), *core.build(cfg),
                     extra={"net": (net, torch.optim.SGD(net.parameters(), 0.3))})
    for share in left:
        t.update()
        assert [opt.param_groups[0]["lr"] for opt in t.opts] == pytest.approx(
            [share * lr for lr in (0.01, 0.02, 0.3)])
    assert t.opt_g.param_groups[0]["betas"] == t.opt_d.param_groups[0]["betas"] == (0.5, 0.9)


def test_batches_have_no_image_twice_and_half_of_the_images_mirrored():
    images = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 1, 8, 8)
    t, plain, index = make_trainer(data=images), make_trainer(flip=False), torch.arange(320) % 16
    batches = [core.to_uint8(t.real()[:, 0, 0, 0]).tolist() for _ in range(50)]
    assert all(len(set(b)) == 4 for b in batches) and len({v for b in batches for v in b}) == 16
    drawn = [core.draw_index(99, 8, t.gen, "cpu").tolist() for _ in range(500)]     # of many
    assert {len({*index}) for index in drawn} == {8}
    assert stats.chisquare(np.bincount(sum(drawn, []), minlength=99)).pvalue > 1e-4
    x, y = make_trainer().images(index), plain.images(index)
    as_is, mirrored = ((x == z).flatten(1).all(1) for z in (y, y.flip(3)))
    assert (as_is ^ mirrored).all() and 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(core.to_uint8(y), plain.data[index])


def test_looking_at_a_trainer_leaves_its_training_alone():
    """Latents, fakes and previews are the same every time, and training does not notice them."""
    t, twin = make_trainer(), make_trainer()
    for _ in range(3):
        z, fakes, preview = t.latents(5), t.fakes(5), t.preview(9)
        assert torch.equal(z, t.latents(5)) and not torch.equal(z, t.latents(5, seed=1))
        x = torch.cat(list(fakes[""]))
        assert torch.equal(x, torch.cat(list(core.generate(t.G, z, batch=2)))) and "_ema" in fakes
        assert x.shape == (5, 1, 8, 8) and x.dtype == torch.uint8 and len(preview) == 9
        assert t.G.training and t.D.training
        t.update(), twin.update()
        torch.testing.assert_close(t.state(), twin.state(), rtol=0, atol=0)
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(core.to_uint8(core.to_float(x)), x)
    assert core.to_float(x[[0, 255]]).tolist() == [-1, 1]
    assert core.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    nn.init.constant_(next(t.G.parameters()), torch.nan)
    refused(lambda: t.preview(2), "not finite")             # as uint8 it would look like an image


# ----------------------------------------------------------------------- one run and its files


class Evil:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


EVIL = Evil()


def fit(folder, evaluate=lambda t: {"distance": float(flat(t.G).abs().sum())},
        d_loss=pcr_natural.pcr, n=16, **changes):
    harness.fit(make_trainer(d_loss, uint8_images(n, 1, 8), **changes), folder, evaluate)


def at(step, do=lambda: None, factor=1):
    """PCR that does something in update `step` of D, None for all, and multiplies its loss."""
    def arm(t, x_real, x_fake):
        now = step in (None, t.step + 1)
        now and do()
        loss, logs = pcr_natural.pcr(t, x_real, x_fake)
        return loss * (factor if now else 1), logs
    return arm


def points():
    """Points in a plane, with networks, latents, G's loss and optimizers of the caller's own."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 1, 2)]

    def g_loss(t):
        z = t.latent(t.cfg.batch)
        code = (t.extra["encoder"](t.G(z)) - z).square().mean()
        return code - t.D(t.G(z)).mean(), {"code": code}

    return core.Trainer(
        config(batch=8), torch.randn(64, 2), nets[0], nn.Sequential(nets[1], nn.Flatten(0)),
        g_loss=g_loss, optimizer=lambda params, lr, betas: torch.optim.RMSprop(params, lr),
        prior=lambda t, n: torch.rand(n, 2, generator=t.gen) * 2 - 1,
        extra={"encoder": (nets[2], torch.optim.Adam(nets[2].parameters(), 0.05))})


def codes(arm="epoch", **changes):
    """A trainer whose images and latents are sampled by a law."""
    cfg = config(**{"arm": arm, "flip": False, "n_dis": 1, "dataset": "geometry", "n_train": 16,
                    **changes})
    return insufficiency.Sampler(cfg, uint8_images(16, 1, 8), *insufficiency.networks(cfg))


@pytest.mark.parametrize("make", [lambda: make_trainer(pcr_natural.pcr), points, codes],
                         ids=["images", "points", "codes"])
@pytest.mark.parametrize("each_step", [False, True])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (0, None)])
def test_stop_or_crash_and_resume_is_bit_for_bit(tmp_path, capsys, make, each_step, number, code):
    """A signal may come twice, from a group's sender and from the parent; the third kills."""
    def interrupted():
        for _ in range(2 * (cut.step == 4)):        # after a log, before a checkpoint
            os.kill(os.getpid(), number) if number else 1 / 0
        return update()

    def fit(trainer, run):
        harness.fit(trainer, tmp_path / run, lambda t: {"distance": t.d_steps}, each_step=each_step)
        return (tmp_path / run / "metrics.jsonl").read_text()

    rows, cut = fit(make(), "whole"), make()
    update, cut.update = cut.update, interrupted
    with pytest.raises((SystemExit, ZeroDivisionError)) as stopped:
        fit(cut, "cut")
    assert getattr(stopped.value, "code", None) == code
    assert ("cut: saved at step 5, --resume goes on" in capsys.readouterr().err) == bool(number)
    assert harness.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"] == (5 if number else 3)
    assert fit(make(), "cut") == rows and rows.count("distance") == 2
    assert rows.count("d_loss") == (6 if each_step else 2)
    for name in ("ckpt.pt", "best.pt"):
        check_same(tmp_path / "whole" / name, tmp_path / "cut" / name)


def test_points_have_a_trained_encoder_and_the_third_signal_kills():
    t = points()
    before = flat(t.extra["encoder"])
    assert t.update()["code"] > 0 and not torch.equal(flat(t.extra["encoder"]), before)
    assert t.latents(99).abs().max() <= 1 and t.preview(5).shape == (5, 2)
    with harness.stop_signals() as caught, pytest.raises(SystemExit) as stopped:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
    assert len(caught) == 2 and stopped.value.code == 143


@pytest.mark.parametrize("tick, seen", [(301, [0, 1, 2, 3, 4, 5]), (1, [0] * 6)])
def test_a_checkpoint_every_five_minutes(tmp_path, monkeypatch, tick, seen):
    path, saved = tmp_path / "ckpt.pt", []
    monkeypatch.setattr(harness.time, "time", iter(range(0, 10 ** 6, tick)).__next__)
    fit(tmp_path, n_dis=1, log_every=100, eval_every=100, d_loss=at(None, lambda: saved.append(
        harness.read_checkpoint(path)["step"] if path.exists() else 0)))
    assert saved == seen


def test_what_is_logged_is_the_mean_and_the_best_is_the_lowest(tmp_path):
    for run, log_every in (("each", 1), ("mean", 3)):
        fit(tmp_path / run, lambda t: {"distance": (7 - t.step) ** 2 % 4}, steps=9, eval_every=2,
            log_every=log_every)
    each, mean = ([r["g_loss"] for r in harness.read_rows(tmp_path / run / "metrics.jsonl")
                   if "g_loss" in r] for run in ("each", "mean"))
    assert mean == pytest.approx(np.reshape(each, (3, 3)).mean(1), rel=1e-5)
    assert harness.read_checkpoint(tmp_path / "mean" / "best.pt")["step"] == 9


def test_numbers_that_are_not_finite_and_a_vanished_folder_stop_a_run(tmp_path):
    run = tmp_path / "run"
    refused(lambda: fit(run, lambda t: {"distance": math.nan, "hist": [0.5, 0.5]}),
            "distance not finite at step 3")
    assert not any("distance" in r for r in harness.read_rows(run / "metrics.jsonl"))
    refused(lambda: fit(run, d_loss=at(5, factor=torch.nan)),
            "d_loss, ", f"not finite at step 5 of {run}", "ckpt.pt")
    assert harness.read_checkpoint(run / "ckpt.pt")["step"] == 3
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    gone = at(5, lambda: shutil.rmtree(run, ignore_errors=True))
    refused(lambda: fit(run, d_loss=gone), "run has vanished at step")
    assert not run.exists()


def test_another_configuration_or_checkpoint_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for commit in ("one", "two", "two"):                                # the same one names all
        monkeypatch.setattr(harness, "versions", lambda commit=commit: {"git": commit})
        fit(tmp_path, steps=3)
    assert json.loads((tmp_path / "config.json").read_text())["git"] == ["one", "two"]
    for text, changes in (("lr_g was 0.01, is 0.5; steps was 3, is 6", dict(lr_g=0.5)),
                          ("data_hash was", dict(steps=3, n=17)), ("--batch 17", dict(batch=17))):
        refused(lambda changes=changes: fit(tmp_path, **changes), text)
    path = tmp_path / "ckpt.pt"
    good, weights = path.read_bytes(), harness.read_checkpoint(path)["G"]["0.weight"]
    i = good.find(weights.numpy().tobytes())
    flipped = good[:i] + bytes([good[i] ^ 1]) + good[i + 1:]            # a single bit
    for content in (flipped, good[:len(good) // 2], b"", b"text", [1], {"G": 1}, EVIL):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(lambda: fit(tmp_path, steps=3), "ckpt.pt is no checkpoint")
    assert not Path("ran").exists()                                     # opened, but never run
    (tmp_path / "config.json").write_text("[1]")
    refused(lambda: fit(tmp_path, steps=3), "config.json is damaged")


def test_a_file_is_renamed_into_place(tmp_path, monkeypatch):
    """A reader sees the old file or the new one: a copy into place would show it half of one."""
    path, order, fsync, replace = tmp_path / "a" / "b.json", [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    harness.write_json(path, {"old": 1})
    reader = open(path)
    with harness.atomic(path) as tmp:
        tmp.write_text("new")
        written = tmp.stat().st_ino
        assert json.loads(path.read_text()) == {"old": 1} and tmp.parent == path.parent
    assert path.read_text() == "new" and path.stat().st_ino == written
    assert json.load(reader) == {"old": 1}                              # open before, and whole
    assert order == ["fsync", "b.json"] * 2
    with pytest.raises(ZeroDivisionError), harness.atomic(path) as tmp:
        tmp.touch()
        tmp.write_text(f"half {1 / 0}")
    assert path.read_text() == "new" and [*path.parent.iterdir()] == [path]
    fit(tmp_path)
    assert {"config.json", "metrics.jsonl", "ckpt.pt", "best.pt", "0000006.png"} <= {*order}


def ends_in_one_line(capsys, function):
    """The only line on stderr of a command that ends in exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        harness.cli(function)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


def test_a_disk_that_takes_half_of_a_file_is_one_line_and_the_last_checkpoint_stays(
        tmp_path, capsys):
    """A file may not grow further than the last good checkpoint: as on a full disk, at no risk."""
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 999, limits[1]))

    path, limits = tmp_path / "ckpt.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        error = ends_in_one_line(capsys, lambda: fit(tmp_path, d_loss=at(5, fill)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error and harness.read_checkpoint(path)["step"] == 3
    assert not list(tmp_path.glob(".*.tmp*"))


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_bit_for_bit(tmp_path):
    def child(folder):          # forked from a process that has imported everything
        run = context.Process(target=fit, args=[folder], kwargs=dict(steps=100, eval_every=2))
        run.start()
        return run

    rng, cut, kills, inside = np.random.default_rng(0), tmp_path / "cut", 0, 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child(tmp_path / "whole").join()
    for i in range(14):
        run = child(cut)
        if i % 2:
            run.join(rng.uniform(0.02, 0.4))
        while not i % 2 and run.is_alive() and not any(cut.glob(".ckpt.pt*")):
            pass                                            # until a checkpoint is half written
        run.kill()
        run.join()
        kills, inside = kills + (run.exitcode == -9), inside + any(cut.glob(".ckpt.pt*"))
        if (cut / "ckpt.pt").exists():
            assert 1 <= harness.read_checkpoint(cut / "ckpt.pt")["step"] <= 100     # always whole
        for left in cut.glob(".*.tmp*"):
            left.unlink()
    child(cut).join()
    assert kills >= 10 and inside >= 3
    check_same(tmp_path / "whole" / "ckpt.pt", cut / "ckpt.pt")
    assert (cut / "metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_a_run_leaves_a_film_with_wrong_images_in_red(tmp_path):
    harness.fit(make_trainer(), tmp_path / "run", lambda t: {"distance": 1.0},
                good=lambda x: torch.arange(len(x)) != 1)
    with Image.open(tmp_path / "run" / "samples" / "0000006.png") as grid:
        seen = np.asarray(grid.convert("RGB"))
    side = len(seen) // 8                                       # of an image, its frame and its gap
    assert seen[1, 1].tolist() == [128] * 3 and seen[1, side + 1].tolist() == [230, 0, 0]
    assert (seen == (230, 0, 0)).all(2)[:, side:2 * side].any(0).sum() <= side
    with Image.open(tmp_path / "run" / "film.gif") as film:
        assert film.n_frames == 2 and film.size == (seen.shape[1] + 8, seen.shape[0] + 14)
        film.seek(1)
        last = np.asarray(film.convert("RGB"))[14:, :-8]
    assert np.abs(last.astype(int) - seen).mean() < 12          # a GIF has 256 colours


def test_images_of_other_networks_are_refused(tmp_path):
    fit(tmp_path)
    args = argparse.Namespace(sample=tmp_path / "ckpt.pt", n=4, out=tmp_path / "a.png",
                              device="cpu")
    refused(lambda: harness.sample(args, lambda cfg: (nn.Linear(4, 4), None)), "other networks")
    assert not args.out.exists() and harness.sample(args)["n"] == 4 and args.out.exists()


def test_films_lie_side_by_side_and_stay_small(tmp_path):
    """Of too many frames every other one goes, but never the last; few are halved instead."""
    for run, n in (("a", 25), ("b", 24), ("one", 1)):           # b has not come as far
        (tmp_path / run / "samples").mkdir(parents=True)
        for i in range(n):
            harness.save_grid(uint8_images(4, 3, 32, seed=i), tmp_path / run / "samples" /
                              f"{i:07d}.png")
    wide = 2 * (260 + 8)                                        # a grid of 65 px, enlarged
    for most, frames, width in ((2 ** 23, 24, wide), (10 ** 6, 12, wide), (2 ** 18, 6, wide // 2)):
        runs = {name: tmp_path / name for name in "ab"}
        harness.save_film(tmp_path / "film.gif", runs, most)
        with Image.open(tmp_path / "film.gif") as film:
            assert (film.n_frames, film.width) == (frames, width), most
            film.seek(frames - 1)
            seen = np.asarray(film.convert("RGB").resize((wide, 274))).astype(int)[14:, :260]
        apart = [np.abs(seen - np.asarray(Image.open(f"{tmp_path}/a/samples/{i:07d}.png"))).mean()
                 for i in range(24)]
        assert np.argmin(apart) == 23
        assert (tmp_path / "film.gif").stat().st_size <= most
    harness.save_film(tmp_path / "none.gif", {"one": tmp_path / "one"})
    assert not (tmp_path / "none.gif").exists()


def test_seconds_of_an_update_are_the_fastest_of_some():
    waits = iter([0.3, 0.01, 0.3])
    t = argparse.Namespace(cfg=config(steps=6), step=6, update=lambda: (
        time.sleep(next(waits)), {"g_loss": torch.zeros(())})[1])
    assert 0.01 <= harness.update_seconds(t, 3) < 0.3 and t.step == 3


# ------------------------------------------------------------------------------------- many runs

CELL = "exp_pcr_natural/geometry-wgangp-smoke"


def flags(out, *more):
    return ["--preset", "smoke", "--dataset", "geometry", "--size", "16", "--device", "cpu",
            "--data-dir", str(out / "data"), "--outdir", str(out), *map(str, more)]


def rows_of(folder):
    return json.loads((folder / "result.json").read_text())["rows"]


def wait_for(condition):
    end = time.time() + 120
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def shell(log, *args):
    """Start exp_pcr_natural.py as a shell does, at the head of a group -> process, its output."""
    return subprocess.Popen(
        [sys.executable, HERE / "exp_pcr_natural.py", *args], stdout=open(log, "w"),
        stderr=subprocess.STDOUT, start_new_session=True), log.read_text


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_four_shells_share_one_sweep(tmp_path, killed):
    """Each run is trained once, also if one of the four is killed with -9 in the middle of it."""
    more = "--seeds", 0, 1, "--steps", 60, "--log-every", 5, "--checks", 6
    alone = pcr_natural.main(flags(tmp_path / "alone", *more))["rows"]
    runs = [tmp_path / CELL / f"geometry-wgangp-{arm}-s{s}" for arm in ("vanilla", "pcr")
            for s in (0, 1)]
    held = [sweep.lock(run / ".lock", "try") for run in runs]   # none may start before all four
    shells = [shell(tmp_path / str(i), *flags(tmp_path, *more)) for i in range(4)]
    wait_for(lambda: all("scored" in text() for _, text in shells))
    time.sleep(2)
    for lock in held:
        lock.close()
    if killed:
        wait_for(lambda: any(" step " in text() for _, text in shells))
        next(process for process, text in shells if " step " in text()).kill()
    codes = [process.wait(300) for process, _ in shells]
    assert sorted(codes) == [-9 if killed else 0, 0, 0, 0], [text() for _, text in shells]
    assert rows_of(tmp_path / CELL) == alone
    logged = re.findall(r"^(\S+)  step +(\d+) ", "".join(t() for _, t in shells), re.M)
    assert len({*logged}) == 4 * 12 and (killed or len(logged) == 4 * 12)
    for run in runs:
        steps = [r["step"] for r in harness.read_rows(run / "metrics.jsonl") if "d_loss" in r]
        assert steps == [*range(5, 61, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("number, code, early", [
    (signal.SIGTERM, 143, False), (signal.SIGKILL, -9, False), (signal.SIGKILL, -9, True)])
def test_runs_whose_parent_is_gone_save_and_let_go(tmp_path, number, code, early):
    runs = [tmp_path / CELL / f"geometry-wgangp-{arm}-s0" for arm in ("vanilla", "pcr")]
    parent, _ = shell(tmp_path / "log", *flags(
        tmp_path, "--jobs", 2, "--resume", "--steps", 10 ** 6, "--log-every", 1, "--checks", 1))
    logs = [tmp_path / CELL / "config.json"] if early else [r / "metrics.jsonl" for r in runs]
    try:
        wait_for(lambda: all(log.exists() and log.stat().st_size for log in logs))
        time.sleep(0.3 * early)                                 # workers are still importing
        parent.send_signal(number)
        assert parent.wait(60) == code
        with pytest.raises(ProcessLookupError):                 # once its whole group has left
            wait_for(lambda: os.killpg(parent.pid, 0))
        assert early or all((run / "ckpt.pt").exists() for run in runs)
    finally:
        with contextlib.suppress(ProcessLookupError):       # no kill(1): procps 4.0.2 kills all
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.slow
def test_jobs_and_torchrun_give_the_rows_of_one_process(tmp_path):
    alone = pcr_natural.main(flags(tmp_path / "alone"))["rows"]
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                  HERE / "exp_pcr_natural.py", *flags(tmp_path / "torchrun"))
    assert done.returncode == 0 and rows_of(tmp_path / "torchrun" / CELL) == alone, done.stderr
    jobs = pcr_natural.main(flags(tmp_path / "jobs", "--jobs", 2))["rows"]
    for row, other in zip(alone, jobs, strict=True):            # more threads, other rounding
        assert row["arm"] == other["arm"] and row["end"] == pytest.approx(other["end"], rel=1e-3)
    for path in (tmp_path / "jobs" / CELL).glob("*/config.json"):       # trained by a worker
        assert Path(json.loads(path.read_text())["command"][0]).name == "exp_pcr_natural.py"


def test_a_process_that_torchrun_started_may_come_when_the_others_are_through(
        tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    rows = pcr_natural.main(flags(tmp_path))["rows"]
    assert pcr_natural.main(flags(tmp_path))["rows"] == rows    # from the files: it trains nothing
    monkeypatch.setattr(os, "getppid", lambda: 1)               # another torchrun
    refused(lambda: pcr_natural.main(flags(tmp_path)), "exists: go on with --resume")


def test_a_run_that_fails_leaves_the_others_going_and_is_tried_again(tmp_path, monkeypatch):
    def main(*more):
        return pcr_natural.main(flags(tmp_path, "--arms", "pcr", "vanilla", *more))

    monkeypatch.setitem(pcr_natural.ARMS, "pcr", at(1, factor=torch.nan))
    refused(main, "failed", "wgangp-pcr-s0; --resume")
    assert (tmp_path / CELL / "geometry-wgangp-vanilla-s0" / "row.json").exists()
    refused(main, "exists: go on with --resume")
    refused(lambda: main("--resume", "--lr-g", 0.5), "another configuration", "lr_g was 0.0002, is")
    (tmp_path / CELL / "geometry-wgangp-pcr-s0" / ".ckpt.pt.1.tmp.pt").touch()  # half written
    monkeypatch.setitem(pcr_natural.ARMS, "pcr", pcr_natural.pcr)
    assert [r["arm"] for r in main("--resume")["rows"]] == ["pcr", "vanilla"]
    assert not [*(tmp_path / CELL).rglob(".*.tmp*")]


def test_a_disk_without_locks_takes_one_process(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(sweep.fcntl, "flock", refuse)
    with sweep.entered(tmp_path, [], False):
        for _ in range(2):                                      # a refusal does not open the door
            with pytest.raises(UserError, match="no file locks"), sweep.entered(tmp_path, [], True):
                pass
    monkeypatch.setattr(sweep, "start_workers", None)           # and it starts none
    assert len(pcr_natural.main(flags(tmp_path, "--jobs", 2))["rows"]) == 2


# ------------------------------------------------------------- every script on every kind of data

PICS = ["--dataset", "pics", "--size", "16"]
SMOKES = {      # {name: (script, flags)}
    "pcr_natural": (pcr_natural, [
        "--dataset", "geometry", "--size", "16", "--arms", *pcr_natural.ARMS]),
    "pixels": (pixels, ["--seeds", "0", "3"]), "pixels, pics": (pixels, PICS),
    "sc": (exp_sc, []), "sc, pics": (exp_sc, PICS),
    "insufficiency": (insufficiency, ["--seeds", "0", "1"]),
    "insufficiency, pics": (insufficiency, [*PICS, "--n-real", "8"]), "theory": (th, [])}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of two: 120 images of smooth noise, of which 12 are held out, and 20."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, n in (("pics", 120), ("few", 20)):
        (folder / name).mkdir()
        for i, image in enumerate(uint8_images(n, 3, 4).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC).save(
                folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, pictures):
    """A function from the name of a smoke run, trained once, to its result, its folder, and a
    function that runs its command again with more flags."""
    @functools.cache
    def finished(name):
        (script, args), out = SMOKES[name], tmp_path_factory.mktemp("smoke")
        args = ["--smoke", "--device", "cpu", "--outdir", str(out), *args]

        def main(*more):
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(pictures)
                patch.setattr(fid, "load_inception", lambda *args, **kwargs: fid.Pixels())
                return script.main(args + ["--data-dir", str(out)] * (script != th) + [*more])

        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = main()
        folder = next(out.rglob("result.json")).parent
        assert printed.getvalue().split()[-2:] == [f"{folder}/result.json", f"{folder}/figure.png"]
        return result, folder, main
    return finished


@pytest.mark.parametrize("name", ["pcr_natural", *(pytest.param(
    name, marks=pytest.mark.slow) for name in [*SMOKES][1:])])
def test_smoke(smoke, name):
    """From the flags to the figure; drawn again; not overwritten; resumed; and images of its G."""
    (result, folder, main), (script, _) = smoke(name), SMOKES[name]
    assert {"git", "torch", "config", "command"} <= {*result} and result["claims"]
    assert all({*c} >= {"paper", "what", "theirs", "ours", "verdict"} for c in result["claims"])
    assert str(folder.parents[1]) not in json.dumps(result)
    (folder / "figure.png").unlink()
    assert script.main(["--plot", str(folder)]) == result
    assert Image.open(folder / "figure.png").width > 1000
    for content in ("[1]", '{"script": "x", "rows": [1]}', "\xff", ""):
        (folder.parent / "result.json").write_text(content, "latin-1")
        refused(lambda: script.main(["--plot", str(folder.parent)]), "no finished run of")
    refused(main, "--resume")
    for ckpt in [*folder.glob("*/ckpt.pt")][-1:]:
        (ckpt.parent / "row.json").unlink()                     # as if stopped before the end
        again, once = ([{k: v for k, v in row.items() if k != "update_seconds"} for row in rows]
                       for rows in (main("--resume")["rows"], result["rows"]))
        assert again == once
        script.main(["--sample", str(ckpt), "--n", "4", "--out", f"{folder}/grid.png"])
        assert (folder / "grid.png").exists()


# ------------------------------------------------------------------------------- exp_pcr_natural


def test_pcr_natural_end_to_end(smoke):
    result, folder, _ = smoke("pcr_natural")
    assert [r["arm"] for r in result["rows"]] == [*pcr_natural.ARMS]
    for row in result["rows"]:
        assert row["best"] == min(p[2] for p in row["curve"]) and len(row["curve"]) == 2
        assert row["end"] == row["curve"][-1][2] and row["end_metric"] == row["metric"] == "FD-px"
        assert row["contrast_real"] > row["contrast_average"] > 0 < row["contrast"] < 128
        assert "paper" not in row and not any("fid" in k for k in row if k != "n_fid")
    assert len(result["data"][0]) == 32 and len({row["end"] for row in result["rows"]}) == 5
    run = folder / "geometry-wgangp-pcr-s0"
    assert {f.name for f in (run / "samples").iterdir()} == {"0000002.png", "0000004.png"}


@pytest.mark.slow
@pytest.mark.parametrize("model, label", [("lsgan", "FID"), ("sagan", "FID*")])
def test_pcr_natural_on_photographs(tmp_path, monkeypatch, model, label):
    """The paper's number stands in a row only beside an FID; the average of G has a score too."""
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: uint8_images(64, 3, 32))
    monkeypatch.setattr(fid.Pixels, "label", label)
    monkeypatch.setattr(fid, "load_inception", lambda *args, **kwargs: fid.Pixels())
    rows = pcr_natural.main([
        "--smoke", "--dataset", "cifar10", "--model", model, "--device", "cpu", "--ema-beta", "0.5",
        "--outdir", str(tmp_path), "--data-dir", str(tmp_path), "--end-dims", "192"])["rows"]
    paper = pcr_natural.PAPER["cifar10", model] if label == "FID" else (None, None)
    assert tuple(r.get("paper") for r in rows) == paper
    for row in rows:                                        # the second score has the same features
        assert row["best_ema"] > 0 and row["end"] == pytest.approx(row["curve"][-1][2])


def test_contrast_mixup_and_matched():
    x = torch.tensor([[0, 200], [100, 100]], dtype=torch.uint8).view(2, 1, 1, 2)
    assert pcr_natural.contrast(x) == pytest.approx((20000 ** 0.5 + 0) / 2)
    x = torch.arange(4e5).remainder(2).view(-1, 1)                    # 0 beside 1
    weight = pcr_natural.mixup(x, core.generator(0))[::2, 0]            # the neighbour's
    assert stats.kstest(weight.numpy(), stats.beta(25, 25).cdf).pvalue > 0.01
    x = 0.5 * torch.rand(8, 3, 16, 16, generator=core.generator(0)) - 0.25
    comb, average, std = pcr_natural.matched(x), (x + x.roll(1, 0)) / 2, x.flatten(1).std(1)
    assert torch.allclose(comb.flatten(1).std(1), (std + std.roll(1)) / 2, rtol=1e-4)
    assert torch.allclose(comb.flatten(1).mean(1), average.flatten(1).mean(1), atol=1e-5)
    assert pcr_natural.matched(torch.ones(2, 1, 4, 4)).eq(1).all()      # nothing to stretch
    assert pcr_natural.matched(4 * x).abs().max() <= 1


@pytest.mark.parametrize("flags, said", [
    ("--arms nobody", "invalid choice: 'nobody'"), ("--batch x", "invalid int value"),
    ("--no-such-flag", "unrecognized arguments")])
def test_a_wrong_flag_is_one_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        exp_sc.main(flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_verdicts_by_hand():
    for better, worse, higher, word in [
            ([3, 4], [1, 2], True, "holds"), ([1, 4], [2, 2.1], True, "in part"),
            ([1, 2], [3, 4], True, "no"), ([2, 2], [2, 2], True, "no"),
            ([1, 2], [3, 4], False, "holds"), ([9], [1, 2], True, "not decided (one seed)"),
            ([9, 8], [], True, "not decided (rival not run)")]:
        assert sweep.verdict(better, worse, higher) == word


def test_gains_of_two_data_sets_are_compared(smoke):
    template, ends = smoke("pcr_natural")[0]["rows"][0], {"celeba": (20, 19), "cifar10": (40, 30)}
    *_, claim = pcr_natural.claims([
        {**template, "dataset": dataset, "arm": arm, "end": end} for dataset in ends
        for arm, end in zip(("vanilla", "pcr"), ends[dataset])])
    assert claim["ours"] == "cifar10 25%, celeba 5%" and claim["verdict"] == "in part"


# ----------------------------------------------------------------------------------------- forks

FORKS = re.findall(r"<!-- fork: (.*?) -->\n```python\n(.*?)```", README, re.S)


def fork(path, line, block):
    """A copy of exp_pcr_natural.py with another text in place of one line."""
    source = (HERE / "exp_pcr_natural.py").read_text().splitlines(keepends=True)
    assert source.count(line + "\n") == 1
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(block if text == line + "\n" else text for text in source))


@pytest.mark.slow
def test_a_fork_of_a_package_goes_through_to_its_figure_with_jobs(tmp_path):
    fork(tmp_path / "package" / "mine.py", *FORKS[0])
    done = python("-m", "package.mine", *flags(
        tmp_path, "--arms", "vanilla", "mirror", "--jobs", 2), cwd=tmp_path)
    cell = tmp_path / "mine" / "geometry-wgangp-smoke"
    assert done.returncode == 0 and (cell / "figure.png").exists(), done.stderr
    assert [r["arm"] for r in rows_of(cell)] == ["vanilla", "mirror"]


@pytest.mark.parametrize("i", range(3))
def test_the_three_forks_of_the_readme(tmp_path, smoke, i):
    assert len(FORKS) == 3 and FORKS[i][1].count("\n") <= 8
    fork(tmp_path / "mine.py", *FORKS[i])
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    spec.loader.exec_module(mine := importlib.util.module_from_spec(spec))
    own = [arm for arm in mine.ARMS if arm not in pcr_natural.ARMS]
    rows = mine.main(flags(tmp_path, "--arms", "vanilla", "pcr", *own))["rows"]
    assert [r["arm"] for r in rows] == ["vanilla", "pcr", *own]
    assert (tmp_path / "mine" / "geometry-wgangp-smoke" / "figure.png").exists()
    assert own or rows != smoke("pcr_natural")[0]["rows"][:2]   # it makes a difference


# ------------------------------------------------------------------------ flags, devices, imports

SCRIPTS = {"exp_pcr_natural": ["--dataset", "geometry"], "exp_sc": [], "exp_pixel_combination": [],
           "exp_sample_insufficiency": [], "theory_sde": []}
MISTAKES = [    # (script, flags, message)
    (pixels, "--dataset pics --n-fid 13", "--n-fid 13: at most 12"),
    (pixels, "--dataset pics --n-real 109", "--n-real 109: at most"),
    (pixels, "--dataset pics --n-train 2", "--batch 8: only 2 training images"),
    (exp_sc, "--dataset pics --batch 9", "--batch 9: only 8 training images"),
    (exp_sc, "--dataset pics --n-train 1000", "--n-train 1000"),
    (exp_sc, "--dataset pics --arms pcr", "--arms pcr: not with"),
    (exp_sc, "--dataset pics --n-cover 5", "--n-cover: not with"),
    (exp_sc, "--dataset few", "2, but 4 are needed"),
    (exp_sc, "--spares 2", "--spares: not with --dataset geometry"),
    (exp_sc, "--n-train 7", "--n-train 7 even"),
    (insufficiency, "--batches 1 4", "--batches"), (insufficiency, "--batches 64", "--images-seen"),
    (insufficiency, "--arms vanilla", "--arms vanilla: not")]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("args", [
    "--seeds -1", f"--seeds {2 ** 70}", "--jobs 0", "--device meta", f"--paths {10 ** 13}",
    f"--width {10 ** 9}", f"--z-dim {10 ** 12}", f"--size {2 ** 40}", "--size 8192", "--size 48",
    "--lr-g nan", "--lr-g inf", f"--n-fid {10 ** 9}", f"--steps {10 ** 30}", "--steps 0",
    "--log-every -5", "--comb-weight=-inf", f"--base {10 ** 20}", "--base 3", "--batch 1",
    "--arms none", "--steps 4 --d-steps 4"])
def test_absurd_flags_are_refused(tmp_path, monkeypatch, script, args):
    """By one line that names the flag, before anything is written; 2: argparse refused it."""
    monkeypatch.chdir(tmp_path)
    try:
        main = importlib.import_module(script).main
        answer = main([*SCRIPTS[script], "--smoke", *args.split(), "--dry-run"])
    except UserError as error:
        answer = str(error)
    except SystemExit as stopped:
        answer = stopped.code
    unused = script == "theory_sde" and args.startswith("--jobs") and answer == {}
    assert unused or answer == 2 or re.split("[ =]", args)[0] in answer and "\n" not in answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script, args, message", MISTAKES)
def test_mistakes_are_refused(tmp_path, monkeypatch, pictures, script, args, message):
    """Before anything is written, though not by the flags alone."""
    monkeypatch.chdir(pictures)
    monkeypatch.setattr(fid, "load_inception", lambda *args, **kwargs: fid.Pixels())
    refused(lambda: script.main(["--smoke", "--device", "cpu", *args.split(), "--data-dir", str(
        tmp_path), "--outdir", str(tmp_path / "runs")]), message)
    assert not (tmp_path / "runs").exists()


def test_presets_and_what_follows_from_them(monkeypatch):
    def resolved(*args):
        args = sweep.parse(pcr_natural.flags(), "x.py", ["--device", "cpu", *args])
        return pcr_natural.configure(args, args.model, args.dataset)

    for args, wanted in ((["--n-dis", "3"], (16666, 49998, 1666, 100)),
                         (["--steps", "7", "--model", "lsgan"], (7, 7, 1, 7))):
        cfg = resolved("--preset", "paper", *args)
        assert (cfg.steps, cfg.d_steps, cfg.eval_every, cfg.log_every) == wanted
    assert resolved().preset == "cpu"
    monkeypatch.setitem(pcr_natural.PRESETS["smoke"], "lr", 1)
    refused(lambda: resolved("--smoke"), "a preset sets lr: no flag of that name")


def test_devices(monkeypatch):
    """A GPU without an index is the one that torchrun or Slurm names, and must work at all."""
    for name in ("meta", "", "x", "cpu:x"):
        refused(lambda name=name: harness.pick_device(name), f"--device {name} cannot be used",
                "; try --device cpu")
    zeros, used = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda n, device: (used.append(device), zeros(n))[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, rank, index in (("cuda", 0, 0), ("auto", 3, 1), ("cuda", 1, 1), ("cuda:0", 1, 0)):
        monkeypatch.setenv("SLURM_LOCALID", str(rank))
        assert harness.pick_device(name) == torch.device("cuda", index) == used[-1]
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(-1))   # no such size
    refused(lambda: harness.pick_device("cuda"), "--device cuda cannot be used", "-1")


@pytest.mark.slow
def test_imports_and_exit_code_of_a_command(tmp_path, capsys):
    """core is torch alone, and a command that draws nothing loads nothing to draw with."""
    lines = python("-c", "import sys, core; print(*sys.modules); import fid; print(*sys.modules)",
                   cwd=HERE).stdout.splitlines()
    assert not {"harness", "matplotlib", "PIL", "scipy"} & {*lines[0].split()}
    assert "matplotlib" not in lines[1].split()
    for script, *args in (("exp_pcr_natural.py", "--dataset", "no.npz"), ("fid.py", "no.npz")):
        done = python(HERE / script, *args, cwd=tmp_path)
        assert done.stderr.startswith(f"{script}: error: ") and "no.npz" in done.stderr
        assert done.stderr.count("\n") == 1 and done.returncode == 2 and not [*tmp_path.iterdir()]
    for error in (UserError("a\nb"), MemoryError(), torch.OutOfMemoryError("CUDA out\nof memory")):
        ends_in_one_line(capsys, lambda error=error: (_ for _ in ()).throw(error))


# ------------------------------------------------------------------------ other devices than a CPU


class NothingFromTheCPU(TorchDispatchMode):
    """Refuses operations that mix tensors of two devices, and copies from one to the other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs or {}))
        devices = {x.device.type for x in given if isinstance(x, torch.Tensor)} | {
            x.type for x in given if isinstance(x, torch.device) and func is not SCALAR}
        assert len(devices) < 2, f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


SCALAR = torch.ops.aten.scalar_tensor.default


def on_meta(monkeypatch):
    """Let scripts build their trainers on `meta`, whose tensors have shapes and no numbers."""
    meta, adam = torch.device("meta"), torch.optim.Adam
    monkeypatch.setattr(harness, "pick_device", lambda name: meta)
    monkeypatch.setattr(core, "generator", lambda seed, device="cpu": torch.Generator())
    monkeypatch.setattr(torch.optim, "Adam", lambda params, lr, betas, fused: adam(
        params, lr, betas))     # the fused one knows no such device
    monkeypatch.setattr(fid, "scorer", lambda cfg, images, dims: (None, {}))
    monkeypatch.setattr(fid, "load_inception", lambda *args, **kwargs: fid.Pixels())
    monkeypatch.setattr(fid, "reference", lambda *args: (None, None))
    monkeypatch.setattr(data, "load", lambda name, size, *args, **kwargs: torch.randint(
        256, (64, 1 if name == "geometry" else 3, size, size), dtype=torch.uint8))


def trainers(script, *argv):
    """The trainers of all runs of a command, with their configurations."""
    with pytest.MonkeyPatch.context() as patch:
        found = []
        patch.setattr(sweep, "print_cost", lambda runs, run: found.extend((c, run) for c in runs))
        script.main([*argv, "--preset", "smoke", "--dry-run"])
    for cfg, run in found:
        if cfg.arm in cfg.arms:
            with pytest.raises(harness.DryRun) as stopped:
                run(argparse.Namespace(**vars(cfg), dry=True), Path())
            yield cfg, stopped.value.args[0]


@pytest.mark.parametrize("script, argv", [
    (pcr_natural, ["--model", "all", "--dataset", "geometry", "--arms", *pcr_natural.ARMS]),
    *((script, ["--dataset", kind]) for script in (
        insufficiency, exp_sc, pixels, mix_gan, bourgan) for kind in ("geometry", "cifar10")),
    *((script, ["--dataset", "ring"]) for script in (mix_gan, bourgan)),
    *((latent, ["--dataset", kind, "--arms", *latent.MAIN, "uniform-rematched"])
      for kind in ("apart", "cifar10")), (infogan_cr, ["--dataset", "halves"]),
    *((topology, ["--dataset", kind]) for kind in ("torus", "apart"))])
def test_updates_need_no_cpu(script, argv, monkeypatch):
    """No tensor of another device, no number read back, no shape that depends on numbers."""
    on_meta(monkeypatch)
    seen = set()
    for cfg, t in trainers(script, *argv):
        with NothingFromTheCPU():
            for value in t.update().values():
                assert value.device.type == "meta" and value.dtype == torch.float32
        seen.add(cfg.arm)
    assert seen >= set(cfg.arms) - {"ema"}             # a side product of vanilla


@pytest.mark.parametrize("fault", [
    lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake + torch.zeros(len(x_fake), 1, 1, 1)),
    lambda t, x_real, x_fake: core.d_loss(t, x_real[torch.arange(len(x_real))], x_fake),
    lambda t, x_real, x_fake: core.d_loss(t, x_real, torch.ones(3).mean().to(t.device) * x_fake),
    lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake * x_fake.mean().item()),
    lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake[x_fake.mean((1, 2, 3)) > 0])],
    ids=["device", "index", "copy", "item", "shape"])
def test_what_is_wrong_on_a_gpu_is_found(fault, monkeypatch):
    on_meta(monkeypatch)
    t = make_trainer(fault, data=uint8_images(16, 1, 8).to("meta"))
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)), NothingFromTheCPU():
        t.update()


@pytest.mark.parametrize("said, meant", [
    ("Torch not compiled with CUDA enabled", "built without CUDA"),
    ("Found no NVIDIA driver on your system. Please check", "no NVIDIA driver"),
    ("The NVIDIA driver on your system is too old (found version 1)", "too old"),
    ("CUDA error: invalid device ordinal", "no GPU of that number"),
    ("CUDA out of memory. Tried to allocate 2.00 MiB", "memory is full"),
    ("CUDA error: all CUDA-capable devices are busy or unavailable", "exclusive mode"),
    ("something new\nand more", "something new")])
def test_why_a_gpu_cannot_be_used(said, meant, monkeypatch):
    def zeros(*args, device):
        raise RuntimeError(said)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match=rf"--device cuda:1 .*{meant}.*--device cpu$"):
        harness.pick_device("cuda:1")


@pytest.mark.parametrize("cores, gib, environ, most", [
    (16, 70, {}, 4), (2, 70, {}, 2), (16, 9, {}, 2), (16, 1, {}, 1),
    (16, 70, {"LOCAL_RANK": "0"}, 1)])
def test_runs_side_by_side_on_a_gpu(cores, gib, environ, most, monkeypatch):
    monkeypatch.setattr(harness, "cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * 2 ** 30, 2 ** 37))
    monkeypatch.setattr(os, "environ", environ)
    assert sweep.side_by_side(torch.device("cuda", 0)) == most
    assert sweep.side_by_side(torch.device("cpu")) == (1 if environ else cores)


@pytest.mark.parametrize("environ, threads", [
    ({"GAN_WORKERS": "4", "GAN_PARENT": str(os.getppid())}, 4), ({"LOCAL_WORLD_SIZE": "8"}, 2), (
        {}, 1)])
def test_processes_of_a_sweep_share_the_cores(environ, threads, monkeypatch, tmp_path):
    """torchrun sets one thread a process; a worker takes all cores unless it is told not to."""
    monkeypatch.setattr(harness, "cores", lambda: 16)
    monkeypatch.setattr(sweep, "follow", lambda: None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    found, cfg = [], config(run="a", jobs=1)
    args = argparse.Namespace(outdir=tmp_path, script="x", name=None, resume=False)
    try:
        with contextlib.suppress(SystemExit):           # as workers end
            sweep.train_all(args, "sweep", [cfg], lambda cfg, folder: found.append(
                torch.get_num_threads()) or {})
    finally:
        torch.set_num_threads(1)
    assert found == [threads] and (tmp_path / "x" / "sweep" / "a" / "row.json").exists()


def test_a_note_where_bfloat16_is_slow(capsys, monkeypatch):
    for text, told in (("flags : avx2", True), ("flags : avx512_bf16", False)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        sweep.note_bf16("fp32", torch.device("cpu"))
        sweep.note_bf16("bf16", torch.device("cpu"))
        assert ("slower here than fp32" in capsys.readouterr().err) == told


@pytest.mark.parametrize("n, batch", [(16, 4), (40, 4), (41, 40), (64, 2), (100_000, 64)])
def test_batches_are_drawn_without_repeats(n, batch):
    """A repeat, an image that is never drawn, or an order that says which images come."""
    gen = core.generator(0)
    draws = torch.stack([core.draw_index(n, batch, gen, "cpu") for _ in range(2000)])
    assert all(len(set(d.tolist())) == batch for d in draws[:200])
    assert draws.min() >= 0 and draws.max() < n
    for column in (draws[:, 0], draws[:, -1]):          # every place is uniform by itself
        assert stats.kstest((column + torch.rand(2000)) / n, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("model", ["wgangp", "sagan"])
def test_bf16_passes_and_float32_everything_else(model):
    """A weight, a penalty or a loss in bfloat16, a scored image that is not float32's."""
    changes = dict(arch="sagan" if model == "sagan" else "dcgan", size=16, width=16, batch=16,
                   gp_weight=0.0 if model == "sagan" else 10.0, flip=False)
    t, twin = make_trainer(precision="bf16", **changes), make_trainer(**changes)
    x = twin.real()
    assert torch.equal(x, t.real())
    with twin.normalised(), t.normalised():
        d, expected = t.D(x), twin.D(x)
    assert d.dtype == torch.float32
    assert 0 < (d - expected).abs().max() < 0.05 * expected.abs().max()
    for net, other in ((t.G, twin.G), (t.G_ema, twin.G_ema)):
        z = t.latents(8)
        assert torch.equal(net.eval()(z), other.eval()(z))
        assert not torch.equal(net.train()(z), other.train()(z))
    logs, expected = t.d_update(), twin.d_update()
    for name, value in logs.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.05, abs=0.01)
    t.update()
    assert {p.dtype for net in (t.G, t.D) for p in net.parameters()} == {torch.float32}
    assert t.state().keys() == twin.state().keys() and t.G_ema(z).shape == t.G(z).shape
    nn.init.constant_(t.G_ema[-2].bias, 9.0)            # its passes are its own
    assert t.G_ema(z).min() > 0.9 > t.G(z).min()


def test_another_precision_is_another_configuration(tmp_path):
    harness.fit(make_trainer(precision="bf16"), tmp_path / "bf16")
    for old in ({}, {"precision": "fp32"}):     # a run of an earlier version, of this one
        harness.fit(make_trainer(**old), tmp_path / f"fp32{len(old)}")
        with pytest.raises(UserError, match="precision was fp32, is bf16"):
            harness.fit(make_trainer(precision="bf16", steps=9), tmp_path / f"fp32{len(old)}")


def test_spectral_norm_normalises_once_an_update():
    """Two iterations of the power method, or a D that learns nothing where it is first called
    without a graph."""
    def arm(t, x_real, x_fake):
        with torch.no_grad():
            t.D(x_fake)
        weights.extend(layer.weight for layer in 3 * [t.D[0]])
        return core.d_loss(t, x_real, x_fake)

    weights, t = [], make_trainer(arm, arch="sagan", loss="hinge", gp_weight=0.0, size=16)
    layer = t.D[0].parametrizations.weight
    w, v = layer.original.detach().flatten(1).clone(), layer[0]._v.clone()
    before, logs = flat(t.D), t.d_update()
    u = F.normalize(w @ v, dim=0)
    torch.testing.assert_close(layer[0]._u, u)          # one step, from v
    assert weights[0] is weights[2] and not torch.equal(flat(t.D), before) and logs["d_grad"] > 0
    torch.testing.assert_close(weights[0].flatten(1), w / (u @ w @ layer[0]._v))


def test_a_reference_is_computed_once(tmp_path, monkeypatch):
    """Two processes at once: the second one waits, and reads what the first one wrote."""
    images, calls = uint8_images(32, 1), []

    def slow(*args, real=fid.features, **kwargs):
        calls.append(1)
        time.sleep(0.5)
        return real(*args, **kwargs)

    monkeypatch.setattr(fid, "features", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(
        fid.reference(fid.Pixels(), images, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(found) == 3
    assert all(torch.equal(feats, found[0][1]) for _, feats in found)


def test_dry_run_says_what_a_sweep_costs(capsys, tmp_path):
    pcr_natural.main(["--preset", "smoke", "--dataset", "geometry", "--dry-run", "--seeds", "0",
                      "1", "--steps", "400000", "--jobs", "2", "--outdir", str(tmp_path)])
    out = capsys.readouterr().out
    hours = float(re.search(r"4 runs, 2 at a time: about ([\d.e+]+) hours here", out)[1])
    update = [float(s) for s in re.findall(r"s0: ([\d.e-]+) s an update of G", out)]
    assert len(update) == 2 and hours == pytest.approx(400_000 * sum(update) / 3600, rel=0.3)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- geometry

EIGHT = np.ones((3, 3), int)
SETTINGS = [(32, 8), (16, 4)]


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


def ragged(x, share, seed, edges=True):
    """Images of which that share of pixels is turned over: of those at an edge, or of all."""
    m = (F.pad(x, (1,) * 4) > 127).float()
    where = (F.max_pool2d(m, 3, 1) != -F.max_pool2d(-m, 3, 1)) | (not edges)
    return torch.where(where & (torch.rand(x.shape, generator=core.generator(seed)) < share),
                       255 - x, x)


def mixed_images(n, size, side):
    """About n images: valid, touching, overlapping, cut off, noisy, blobs; uint8."""
    gen, part = core.generator(5), n // 8
    anywhere = torch.randint(-side, size, (2 * part, 3, 2), generator=gen)
    near = torch.randint(0, size - 2 * side, (2 * part, 1, 2), generator=gen)
    near = near + torch.tensor([[0, 0], [side, 0]])
    near[:, 1] += torch.randint(-2, 3, (2 * part, 2), generator=gen)
    blobs = F.avg_pool2d(torch.randn(part, 1, size + 4, size + 4, generator=gen), 5, 1)
    valid = torch.cat([geometry.draw(part // 2, k, size, side, seed=k) for k in (1, 2, 3, 4)])
    return torch.cat([
        valid, geometry.render(anywhere, size, side), geometry.render(near, size, side),
        ragged(valid, 0.02, 1), ragged(valid[::2], 0.01, 2, edges=False),
        (blobs > 0.15).to(torch.uint8) * 255])


def test_draw_keeps_the_gap_repeats_and_is_uniform():
    at = geometry.place(3000, 2, 16, 4, 3, core.generator(0))
    distance = (at[:, 0] - at[:, 1]).abs().amax(1)
    assert distance.min() == 7 and at.min() == 0 and at.max() == 12      # 4 + 3, and all of it
    assert torch.equal(geometry.draw(9, 2, seed=3), geometry.draw(9, 2, seed=3))
    assert not torch.equal(geometry.draw(9, 2, seed=3), geometry.draw(9, 2, seed=4))
    x = geometry.draw(40000, 2, size=6, side=2)
    at = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    apart = (at[:, None] - at).abs().amax(2) >= 3
    times = torch.unique(geometry.pack(x), dim=0, return_counts=True)[1].double()
    assert len(times) == apart.sum() / 2 == 132
    assert stats.chisquare(times.numpy()).pvalue > 1e-3


def test_draw_reaches_its_limits_and_refuses_what_cannot_be():
    assert geometry.count_exact(geometry.draw(3, 4, size=18))[0].tolist() == [4, 4, 4]
    for text, wrong in (("at most 4", dict(k=5, size=18)), ("at most 9", dict(k=10)),
                        ("k is -1", dict(k=-1)), ("at most 0", dict(side=33)),
                        ("gap is 0", dict(gap=0)), ("n is 0", dict(n=0)), ("dense", dict(k=9)),
                        ("integer", dict(k=1.5)), ("4 GiB", dict(n=2 ** 31))):
        refused(lambda wrong=wrong: geometry.draw(**{"n": 500, "k": 2, **wrong}), text)
    refused(lambda: geometry.draw_pairs(3, size=18, k=4), "at most 4")
    refused(lambda: geometry.draw_pairs(3, k=0), "k is 0")


@pytest.mark.parametrize("k, size, side", [(2, 32, 8), (3, 32, 8), (1, 16, 4)])
def test_pairs_combine_to_one_less_and_one_more(k, size, side):
    x, y, x_and, x_or = geometry.draw_pairs(300, size, side, k=k)
    assert torch.equal(x_and, torch.minimum(x, y)) and torch.equal(x_or, torch.maximum(x, y))
    assert (x != y).flatten(1).any(1).all()
    drawn = geometry.draw(200, k, size, side)
    for images, number in ((x, k), (y, k), (x_and, k - 1), (x_or, k + 1), (drawn, k)):
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, size, size)
        assert all(scipy_exact(m > 0, side) == (number, True) for m in images[:, 0].numpy())


def test_pack_tells_images_apart():
    x = torch.cat([geometry.draw(300, 2, 10, 2), geometry.draw(300, 0, 10, 2)])
    assert np.array_equal(geometry.pack(x).numpy(),
                          np.packbits(x.flatten(1).numpy() > 127, axis=1))
    rows = [m.numpy().tobytes() for m in x]
    assert geometry.count_distinct(x) == len(set(rows)) < 600
    known = x[:100].float() / 127.5 - 1
    assert geometry.is_in(x, known).tolist() == [row in set(rows[:100]) for row in rows]


@pytest.mark.parametrize("size, side", SETTINGS)
@pytest.mark.parametrize("counter, reference", [
    (geometry.count_exact, scipy_exact), (geometry.count, scipy_count)])
def test_counters_equal_scipy(size, side, counter, reference):
    x = mixed_images(3000, size, side)
    n, clean = counter(x, side)
    expected = [reference(m > 127, side) for m in x[:, 0].numpy()]
    assert torch.stack([n, clean], 1).tolist() == np.array(expected, int).tolist()
    assert {0, 1, 2, 3, 4} <= set(n.tolist()) and 0.2 < clean.float().mean() < 0.9
    assert torch.equal(geometry.has_two(x, side, counter), (n == 2) & clean)
    assert torch.equal(torch.cat([counter(i[None], side)[0] for i in x[::50]]), n[::50])


# ------------------------------------------------- the bench: what generated images are worth


@pytest.mark.parametrize("size, side, gap", [(16, 4, 1), (32, 8, 1), (9, 3, 2), (8, 4, 1)])
def test_number_of_possible_images(size, side, gap):
    at = list(itertools.product(range(size - side + 1), repeat=2))
    apart = (max(abs(a - c), abs(b - d)) >= side + gap
             for (a, b), (c, d) in itertools.combinations(at, 2))
    assert geometry.possible(size, side, gap) == sum(apart)
    assert geometry.possible(16, 4) == 9_576 and geometry.possible(32, 8) == 133_008


@pytest.mark.parametrize("size, side, n, s", [(16, 4, 9_576, 1_500), (32, 8, 133_008, 5_000)])
def test_birthday_of_real_draws_is_the_number_of_possible_images(size, side, n, s):
    row = geometry.report(geometry.draw(s, 2, size, side, seed=3), geometry.draw(64, 2, size, side),
                          side)
    assert row["n_eff_low"] < n < row["n_eff_high"] and row["correct"] == row["correct_exact"] == 1
    assert row["n_eff_high"] < 2 * row["n_eff_low"]
    assert row["tv"] == pytest.approx(row["tv_floor"], abs=0.01)
    assert row["unseen_share"] > 0.9


def test_birthday_by_hand_and_its_interval():
    """n_eff is 1 / sum p^2, of equal and of unequal p, and the interval holds it 19 times of 20."""
    row = geometry.birthday(torch.tensor([3, 2, 1]))            # 3 + 1 of 15 pairs
    assert row["n_eff"] == 15 / 4
    none = geometry.birthday(torch.ones(100))
    assert none["n_eff"] is None and none["n_eff_high"] is None
    assert none["n_eff_low"] == pytest.approx(4950 / -math.log(0.05))
    assert geometry.birthday(torch.ones(0))["n_eff_low"] == 0
    gen = core.generator(0)
    for p in (torch.ones(500), 1 / torch.arange(1., 201)):
        p, inside, found = p / p.sum(), 0, []
        for _ in range(300):
            row = geometry.birthday(torch.multinomial(p, 300, True, generator=gen).bincount())
            inside += row["n_eff_low"] <= 1 / p.square().sum() <= row["n_eff_high"]
            found.append(1 / row["n_eff"])
        assert np.mean(found) == pytest.approx(p.square().sum().item(), rel=0.02)
        assert 0.92 < inside / 300


@pytest.mark.parametrize("s", [1, 50, 5_000, 30_000])
def test_floor_of_total_variation_is_the_mean_of_uniform_draws(s):
    n, train = 9_576, geometry.draw(64, 2, 16, 4)
    floor = geometry.report(geometry.draw(s, 2, 16, 4, seed=1), train, 4)["tv_floor"]
    k = np.arange(s + 1)
    law = np.exp(gammaln(s + 1) - gammaln(k + 1) - gammaln(s - k + 1) - k * math.log(n)
                 + (s - k) * math.log1p(-1 / n))
    assert floor == pytest.approx(n / 2 * (law * abs(k / s - 1 / n)).sum(), rel=1e-6)
    gen = core.generator(0)
    drawn = [torch.randint(n, (s,), generator=gen).bincount(minlength=n) for _ in range(5)]
    assert floor == pytest.approx(np.mean([(c / s - 1 / n).abs().sum() / 2 for c in drawn]),
                                  abs=0.02)


def test_report_against_brute_force():
    train, fresh = geometry.draw(60, 2, 16, 4), geometry.draw(100, 2, 16, 4, seed=9)
    ragged = fresh[:5].clone()
    ragged[:, :, 0, 0] ^= 255                                   # tolerated, but not exact
    x = torch.cat([train[:20], train[:7], fresh, ragged, geometry.draw(30, 3, 16, 4)])
    row = geometry.report(x, train, 4)
    good = [image.numpy().tobytes() for image in x[:127]]
    known, counts = {i.numpy().tobytes() for i in train}, [good.count(k) for k in {*good}]
    assert row["n_samples"] == 162 and row["correct_exact"] == 127 / 162
    assert row["correct"] * 162 == geometry.has_two(x, 4).sum() > 127
    assert row["distinct"] == len(counts)
    assert row["n_eff"] == 127 * 126 / sum(c * (c - 1) for c in counts)
    assert row["unseen_share"] == pytest.approx(sum(g not in known for g in good) / 127)
    assert row["tv"] == pytest.approx((sum(abs(c / 127 - 1 / 9_576) for c in counts)
                                       + 1 - len(counts) / 9_576) / 2, rel=1e-5)
    order = torch.randperm(60, generator=core.generator(0))[:30]
    assert row["coverage_exact"] == sum(t.numpy().tobytes() in {*good} for t in train[order])
    assert row["coverage_n"] == 30
    for same in (core.to_float(x), x.split(13)):                # floats, and batches
        assert geometry.report(same, train, 4) == row
    empty = geometry.report(torch.zeros(3, 1, 16, 16, dtype=torch.uint8), train, 4)
    assert empty["tv"] is empty["tv_floor"] is empty["n_eff"] is None
    assert empty["correct"] == empty["distinct"] == empty["unseen_share"] == 0


@pytest.mark.parametrize("kind, n, radius", [("ring", 8, 1), ("grid", 25, 4), ("circle", 101, 2)])
def test_points_of_the_true_law(kind, n, radius):
    means, sigma, weights = neighbours.modes(kind)
    assert len(means) == len(weights) == n and means.abs().max() == pytest.approx(radius)
    x = neighbours.draw_points(400, kind)
    assert len(x) == 400 * weights.sum() and weights.sum() == (103 if kind == "circle" else n)
    row = neighbours.report_points(x, kind)
    assert row["modes"] == n and row["within_10"] == 1 and row["reverse_kl"] < 1e-3
    if kind != "circle":                                        # whose modes overlap
        assert row["within_3"] == pytest.approx(1 - math.exp(-4.5), abs=3e-3)
        spread = (x - means.repeat_interleave(400, 0)).std()
        assert spread == pytest.approx(sigma, rel=0.02)


def test_points_by_hand():
    """Two of eight modes of the ring, 3 to 1, one point 5 sigma off and one lost."""
    x = torch.tensor([[1, 0], [1.02, 0], [1.05, 0], [0, 1.0]])
    row = neighbours.report_points(torch.cat([x, x + 1e-4]), "ring")
    assert row["modes"] == 2 and row["within_3"] == 0.75 and row["within_10"] == 1
    assert row["reverse_kl"] == pytest.approx(0.75 * math.log(6) + 0.25 * math.log(2), rel=1e-5)
    assert neighbours.report_points(torch.zeros(4, 2), "ring")["within_10"] == 0
    assert neighbours.report_points(torch.zeros(4, 2), "circle")["reverse_kl"] == pytest.approx(
        math.log(103 / 3), rel=1e-5)


# ---------------------------------------------------------------------------------------- data

FUZZ = dict(derandomize=True, deadline=None, database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TINY = ["--dims", "64", "--device", "cpu"]      # with the fixture `tiny`: a quick command


@pytest.fixture
def real_data():
    folder = Path(os.environ.get("GAN_DATA", "data"))
    if not (folder / "inception" / "reference_features.npz").exists():
        pytest.skip("needs real images and Inception weights: set GAN_DATA to their folder")
    return folder


@pytest.fixture
def bounded():
    """A test that waits for ever, or needs more than 1 GiB, fails."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss     # in KiB
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this waits for ever"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 20


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("weights") / "w.pth")


@pytest.fixture
def tiny(weights, monkeypatch, tmp_path):
    """With TINY: a quick command, in the folder tmp_path, which fails to download."""
    def refuse(url, timeout):
        raise OSError("no network")
    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    monkeypatch.setenv("FID_WEIGHTS", str(weights))
    monkeypatch.chdir(tmp_path)


def load(source, size=8, **options):
    return lambda: data.load(source, size, **{"data_dir": ".", **options})


def encoded(suffix, mode="RGB", size=(9, 7)):
    """The bytes of an image file, noise."""
    out, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8)
    Image.fromarray(noise).convert(mode).save(out, Image.registered_extensions()[suffix])
    return out.getvalue()


def zip_of(members, method=zipfile.ZIP_STORED):
    """The bytes of a zip of (name, content)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        for name, content in members:
            z.writestr(name, content)
    return out.getvalue()


def write(path, content):
    """Make a file of bytes, of an array, of a dict of arrays, or by a function of its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif callable(content):
        content(Path(path))
    else:
        np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    return Path(path)


def picture_folder(folder):
    """Ten images of every mode and several formats, all a plain mid-red."""
    red = Image.new("RGB", (40, 30), (200, 100, 100))
    for i, (mode, suffix) in enumerate([("RGB", "png"), ("L", "png"), ("P", "png"), ("RGBA", "png"),
                                        ("CMYK", "jpg"), ("1", "png"), ("RGB", "jpg"),
                                        ("LA", "png"), ("RGB", "webp"), ("RGB", "bmp")]):
        write(folder / f"{i}.{suffix}", red.convert(mode).save)
    return folder


def random_weights(path, dims=64, **changed):
    """Save a random state dict of the network, with the given keys replaced (None: removed)."""
    gen = core.generator(0)
    state = {k: (torch.randn(v.shape, generator=gen) * (2 / v[0].numel()) ** 0.5 if v.ndim > 1
                 else torch.rand(v.shape, generator=gen) + 0.5)
             for k, v in fid.Inception(dims=dims).state_dict().items() if v.ndim}
    state |= {k.replace("__", "."): v for k, v in changed.items()}
    torch.save({k: v for k, v in state.items() if v is not None}, path)
    return path


def test_cifar10_binary_layout(tmp_path, monkeypatch):
    """A wrong order of channels, files or splits, or an archive that is unpacked."""
    assert data.load.__defaults__[1] == data.DATA_DIR == Path(os.environ.get("GAN_DATA", "data"))
    assert data.CIFAR_BYTES == 10000 * 3073
    monkeypatch.setattr(data, "CIFAR_BYTES", 20 * 3073)
    folder, archive = tmp_path / "cifar-10-batches-bin", tmp_path / "b" / "cifar-10-binary.tar.gz"
    records = np.random.default_rng(0).integers(0, 256, (6, 20, 3073), np.uint8)
    for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], records):
        write(folder / f"{name}.bin", part.tobytes())
    images, test, whole = (load("cifar10", 32, data_dir=tmp_path, split=split)()
                           for split in ("train", "test", "all"))
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8 and len(test) == 20
    planes = records[2, 7, 1:].reshape(3, 1024)     # red, green, blue after the label, row by row
    assert np.array_equal(images[47].flatten(1), planes)
    assert torch.equal(whole, torch.cat([images, test]))
    with tarfile.open(write(archive, b""), "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert torch.equal(data.load("cifar10", data_dir=archive.parent), images)
    assert [*archive.parent.iterdir()] == [archive]


def test_any_folder_or_zip(tiny):
    folder = picture_folder(Path("pics/deep"))
    write("pics/notes.txt", b"not an image")
    write("pics/deep/._0.png", b"nor this")
    write("a.zip", zip_of((f"deep/{f.name}", f.read_bytes()) for f in folder.iterdir()))
    for source in ("pics", "a.zip"):
        images = load(source, 16, split="all", n_train=10)()            # in order
        assert images.shape == (10, 3, 16, 16)
        means = images.float().mean((2, 3))
        coloured, grey = means[[0, 2, 3, 4, 6, 8, 9]], means[[1, 5, 7]]
        assert (coloured - torch.tensor([200., 100, 100])).abs().max() < 12
        assert (grey == grey[:, :1]).all()                              # three equal channels
        assert torch.equal(load(source, 16)(), images[:9])
        assert torch.equal(load(source, 16, split="test")(), images[9:])
    some = [load("pics", 16, n_train=4, seed=seed)() for seed in (1, 1, 2)]
    assert torch.equal(*some[:2]) and not torch.equal(*some[1:]) and len(some[0]) == 4


def test_centre_crop():
    wide, tall = np.zeros((20, 60, 3), np.uint8), np.zeros((218, 178, 3), np.uint8)
    wide[:, 20:40] = tall[29:189, 9:169] = 255      # CelebA's 160 x 160
    for crop in (1.0, 0.5):     # the middle 20 x 20; 30 wide, but only 20 high
        assert data.square(wide, 20, crop).min() == 255
    face = data.square(tall, 64, data.CROP["celeba"])                   # the filter sees the edge
    assert face.min() > 200 and face[:, 3:-3, 3:-3].min() >= 250
    assert data.square(tall, 64, 1.0).min() == 0


def test_cache_of_images_is_used_and_never_stale(tiny, monkeypatch):
    """A cache that is not used; or is, after a change, for another size or split, or damaged; or
    runs code; or is written over, not renamed into place, while somebody reads it."""
    folder, decode, decoded = picture_folder(Path("in")), data.decode, []
    monkeypatch.setattr(data, "decode", lambda *a: decoded.append(a) or decode(*a))

    def read(source="in", size=16, split="all"):
        decoded.clear()
        return load(source, size, split=split)()

    first = read()
    assert decoded and torch.equal(read(), first) and not decoded
    assert read(size=8).shape == (10, 3, 8, 8) and len(read(split="train")) == 9
    bmp = folder / "9.bmp"
    for value, later in ((0, 1), (255, 10 ** 7)):   # as many bytes, 10 ms later
        old = bmp.stat()
        Image.new("RGB", (40, 30), (0, 0, value)).save(bmp)
        os.utime(bmp, ns=(old.st_atime_ns, old.st_mtime_ns + later))
        write("a.zip", zip_of([("9.bmp", bmp.read_bytes())]))
        assert (read()[9, 2] == value).all() and decoded and bmp.stat().st_size == old.st_size
        assert (read("a.zip")[0, 2] == value).all() and decoded
    want = read()
    for cached in Path("cache").iterdir():
        os.link(write(cached, CODE), cached.name)       # as a reader that has it open
    assert torch.equal(read(), want) and decoded and torch.equal(read(), want) and not decoded
    assert all(b"mkdir" in file.read_bytes() for file in Path().glob("*.npy"))
    assert not Path("ran").exists() and pickle.loads(pickle.dumps(EVIL)) is None
    assert Path("ran").exists()     # where it is let, it runs
    monkeypatch.setattr(os, "sysconf", lambda name: 87)     # 7569 bytes of memory
    assert load("in", 15, split="all")().shape[0] == 10
    refused(load("in", 17, split="all"), "--size 17: 10 images need 8670")


# ---------------------------------------------------------------------------------------- fid


@pytest.mark.parametrize("dims", [64, *(pytest.param(d, marks=pytest.mark.slow)
                                        for d in (192, 768, 2048))])
def test_features_agree_with_public_implementation(real_data, dims):
    with np.load(real_data / "inception" / "reference_features.npz") as f:
        images, want = torch.from_numpy(f["images"]).permute(0, 3, 1, 2), f[f"dims_{dims}"]
    net = fid.load_inception(dims=dims, data_dir=real_data)
    n = 24 if dims < 2048 else 6   # the deepest is slow, and contains the others
    stats, got = fid.features(net, images[:n].split(7), keep=True)
    assert np.abs(got.numpy() - want[:n]).max() < 1e-3
    assert np.abs(got.mean(0).numpy() - want[:n].mean(0)).mean() < 1e-4 * want[:n].mean()
    assert torch.allclose(stats.mean, got.double().mean(0))
    assert (net(images[:1]) - got[:1]).abs().max() < 1e-5   # whatever else is in the batch


def test_distance_against_closed_forms_and_scipy():
    """A flipped sign, a lost term, or digits that are lost where a covariance is singular."""
    (ma, mb, u, v), (va, vb) = randn(4, 9), randn(2, 9, seed=1).exp()
    between, cov = (ma - mb).square().sum(), randn(9, 9) @ randn(9, 9).T
    cases = [((ma, va.diag(), mb, vb.diag()), between + (va.sqrt() - vb.sqrt()).square().sum()),
             ((ma, cov, mb, cov), between), ((ma, 0 * cov, mb, cov), between + cov.trace()),
             # Rank 1: (u u^T v v^T)^1/2 has trace |u.v|.
             ((ma, u.outer(u), ma, v.outer(v)), u.dot(u) + v.dot(v) - 2 * u.dot(v).abs())]
    x, y = randn(200, 30) @ randn(30, 30, seed=1), randn(300, 30, seed=2) + 0.3
    s, t = (np.cov(v.numpy().T) for v in (x, y))
    cases.append(((x.mean(0), s, y.mean(0), t), (x.mean(0) - y.mean(0)).square().sum()
                  + np.trace(s + t - 2 * sqrtm(s @ t).real)))
    for sides, want in cases:
        for order in (sides, sides[2:] + sides[:2]):
            assert fid.frechet_distance(*order) == pytest.approx(want.item(), rel=1e-6)
    same = x[:20].mean(0), np.cov(x[:20].numpy().T)     # rank-deficient
    assert 0 <= fid.frechet_distance(*same, *same) < 1e-6 * np.trace(same[1])


@settings(max_examples=30, **FUZZ)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99),
       st.sampled_from([1e-6, 1.0, 1e6]))
def test_statistics_are_those_of_numpy_in_any_batches(sizes, seed, scale):
    """A covariance divided by N, or digits lost to a mean far from 0."""
    x = (randn(sum(sizes) + 1, 5, seed=seed) + 1000) * scale
    stats, same = fid.Statistics(), fid.Statistics()
    for part in x.split([*sizes, 1]):
        stats.add(part)
    for s in (stats, fid.Statistics.of(stats.mean, stats.cov, stats.n)):
        assert s.n == len(x) and np.allclose(s.mean, x.mean(0), rtol=1e-12)
        assert np.allclose(s.cov, np.cov(x.numpy().T), rtol=1e-6, atol=1e-9 * scale ** 2)
    same.add(x[:1].repeat(5, 1))
    assert (same.cov == 0).all()


def test_resize_is_bilinear_between_centres_of_pixels():
    def rows(n):
        """The weights (299, n) of n pixels in each new one."""
        at = np.maximum((np.arange(299) + 0.5) * n / 299 - 0.5, 0)
        low, share = np.eye(n)[at.astype(int)], (at % 1)[:, None]
        return (1 - share) * low + share * np.eye(n)[np.minimum(at.astype(int) + 1, n - 1)]

    x = uint8_images(2, 3, 11)[..., :7]
    want = rows(11) @ x.double().numpy() @ rows(7).T / 127.5 - 1
    assert np.allclose(fid.resized(x), want, atol=1e-5)


def test_kid_against_its_formula():
    """Pairs of an image with itself counted, m for m - 1, or another kernel."""
    x, y = randn(6, 4).float(), randn(8, 4, seed=1).float() + 0.5
    gen, other, values = core.generator(3), ~torch.eye(3, dtype=torch.bool), []
    for _ in range(5):      # subsets of min(1000, 6 / 2) = 3 images
        a, b = (f[torch.randperm(len(f), generator=gen)[:3]].double() for f in (x, y))
        aa, bb, ab = ((u @ v.T / 4 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        values.append((aa[other].mean() + bb[other].mean() - 2 * ab.mean()).item())
    got = fid.kid(x, y, subsets=5, subset_size=1000, seed=3)
    assert got == pytest.approx((np.mean(values), np.std(values)), rel=1e-5)
    assert math.isfinite(fid.kid(x[:2], y)[0])


def test_precision_and_recall():
    """The two swapped, a neighbour too many or too few, an image that is its own neighbour."""
    x, y = randn(30, 5), randn(40, 5, seed=1) * 1.3

    def covered(points, centres):
        radii = torch.cdist(centres, centres).sort(1)[0][:, 3]   # the third, after itself
        return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()

    want = covered(y, x), covered(x, y)
    assert want == fid.precision_recall(x, y) == fid.precision_recall(x, y, block=7) != (1, 1)
    assert fid.rank_note(65, 64) is None and "rank" in fid.rank_note(64, 64)


def test_network_has_the_published_layers_and_labels():
    with torch.device("meta"):
        nets = {dims: fid.Inception(dims) for dims in fid.DIMS}
    net, spike, ids = nets[2048], torch.zeros(2048, 5, 5), set()
    names = {k for k, _ in net.named_parameters()}
    assert len(names) == 94 * 3 and sum(p.numel() for p in net.parameters()) == 21_785_568
    assert {"Mixed_5b.branch5x5_2.bn.bias", "Mixed_6b.branch7x7dbl_5.conv.weight",
            "Mixed_7c.branch3x3dbl_3b.conv.weight", "Mixed_7c.branch_pool.bn.weight"} <= names
    for dims, one in nets.items():
        for sha256, label in ((fid.PUBLISHED[1], "FID"), ("0" * 64, "FID*")):
            one.identify(sha256)
            assert one.label == (label if dims == 2048 else f"FD-{dims}")
            assert one.standard == (one.label == "FID")
            ids.add(one.id)
    assert len(ids) == 8 and fid.Pixels().label == "FD-px"
    for p in net.to_empty(device="cpu").eval().state_dict().values():
        p.fill_(1e-3)
    spike[:, 1, 1] = 1
    for block, c_in, width, largest in ((net.Mixed_5b, 192, 32, False), (
            net.Mixed_7b, 1280, 192, False), (net.Mixed_7c, 2048, 192, True)):   # not the average
        flat, peak = block(torch.stack([torch.ones(c_in, 5, 5), spike[:c_in]]))[:, -width:]
        assert torch.allclose(flat, flat[:1, :1, :1])       # no padding is averaged
        assert torch.allclose(peak[:, 0, 0], peak[:, 1, 1]) == largest


def test_weights_are_found_frozen_and_folded(tiny, monkeypatch):
    """Weights that are not those asked for, or of the published name but another sha256."""
    for i, name in enumerate("abc"):
        write(f"inception/{name}.pth", layer(Conv2d_2b_3x3__bn__bias=torch.full((64,), 1.0 * i)))
    monkeypatch.setenv("FID_WEIGHTS", "inception/b.pth")
    nets = [fid.load_inception(dims=64, data_dir=".", weights=w) for w in ("inception/c.pth", None)]
    monkeypatch.delenv("FID_WEIGHTS")
    for name, net in zip("cba", [*nets, fid.load_inception(dims=64, data_dir=".")]):
        file, x, plain = Path(f"inception/{name}.pth"), uint8_images(2, 1), fid.Inception(dims=64)
        assert net.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        plain.eval().load_state_dict(torch.load(file, weights_only=True), strict=False)
        assert torch.allclose(net(x), plain(x.expand(-1, 3, -1, -1)), rtol=1e-4)  # grey is repeated
    write("inception/" + fid.PUBLISHED[0].rpartition("/")[2], b"first, but not as published")
    refused(lambda: fid.load_inception(data_dir="."), "sha256 is", "delete it")


def test_score_and_its_reference(tiny, monkeypatch):
    """A score of other images, or under another name, or by a stale cache of the reference."""
    net, images, calls, compute = fid.Pixels(), uint8_images(40, 1, 8), [], fid.features
    monkeypatch.setattr(fid, "features", lambda *a, **k: calls.append(1) or compute(*a, **k))
    stats, feats = fid.reference(net, images, "cache")
    path, = Path("cache").glob("*.npz")
    assert torch.equal(feats, images.flatten(1) / 255) and stats.n == 40
    assert np.allclose(fid.reference(net, images, "cache")[0].cov, np.cov(feats.T))
    changed = images.clone()
    changed[39, 0, 7, 7] ^= 1
    for n, other in enumerate(((net, images), (net, changed), (fid.Pixels(2), images),
                               (net, images.reshape(40, 1, 4, 16))), 1):
        assert fid.reference(*other, "cache")[0].n == 40 and len(calls) == n
    for damage in (path.read_bytes()[:200], dict(mu=CODE, sigma=CODE, features=CODE)):
        os.link(write(path, damage), f"{len(calls)}.npz")       # as a reader that has it open
        assert torch.equal(fid.reference(net, images, "cache")[1], feats)
    assert len(calls) == 6 and not Path("ran").exists() and not path.samefile("5.npz")
    row = fid.score(net, stats, feats, images.split(7), prc=True)
    assert row["distance"] < 1e-6 and row["n_fid"] == 40 and row["precision"] == 1
    score, protocol = fid.scorer(argparse.Namespace(
        n_real=20, n_fid=30, dataset="geometry", device="cpu", data_dir=Path()), images, 64)
    assert protocol == dict(metric="FD-px", features=net.id, n_real=20, dims=64)
    reals = images[torch.randperm(40, generator=core.generator(0))[:20]]
    made = {"": images[:30], "_ema": images[:30] // 2}
    got = score(argparse.Namespace(fakes=lambda n: {k: x[:n].split(9) for k, x in made.items()}))
    for ema, x in made.items():
        a, b = (compute(net, [images])[0] for images in (reals, x))
        want = fid.frechet_distance(a.mean, a.cov, b.mean, b.cov)
        assert got["distance" + ema] == pytest.approx(want, rel=1e-6) and got["n_fid" + ema] == 30


def test_command_sources_agree(tiny, capsys):
    """Channels first and last, files and statistics, --json and text: one distance."""
    a, b = uint8_images(6), uint8_images(5, seed=1) // 2
    for folder, images in (("a", a), ("b", b)):
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            write(f"{folder}/{i}.png", Image.fromarray(image).save)
    write("first.npy", a.numpy())
    write("last.npy", a.permute(0, 2, 3, 1).numpy())
    fid.main(["a", "--save-stats", "a.npz", *TINY])
    want = fid.main(["a", "b", "--batch", "4", *TINY])["distance"]
    assert want > 0.01 > 1e4 * fid.main(["a", "a", *TINY])["distance"]
    for source in ("last.npy", "first.npy", "a.npz"):
        assert fid.main([source, "b", *TINY])["distance"] == pytest.approx(want, rel=1e-5)
    capsys.readouterr()
    assert fid.main(["a.npz", "a.npz"])["distance"] < 1e-6   # two files need no network
    assert capsys.readouterr().out.startswith("FD-64 ")
    row = fid.main(["a", "b", "--n", "5", "--kid", "--prc", "--json", *TINY])
    out, err = capsys.readouterr()
    assert json.loads(out) == row and "rank" in err and "fid" not in row and row["kid"]
    assert (row["metric"], row["n_a"], row["dims"], row["standard"]) == ("FD-64", 5, 64, False)
    for changed in (*({"mu": STATS["mu"].astype(kind)} for kind in (">f8", "f2", np.longdouble)),
                    *({"n": n} for n in (np.nan, np.inf, -5, "many", 1j, [9])),
                    {"id": 5}, {"id": ["x"]}, {"zzz": CODE}):       # which is not read
        row = fid.main([str(write("s.npz", STATS | changed))] * 2)
        assert row["distance"] < 1e-12 and row["n_a"] is None


def test_images_of_mixed_sizes_and_modes(tiny):
    """An image in the wrong order, or a batch of more than 16 megapixels."""
    for i, size in enumerate([(20, 20), (9, 31), (20, 20), (1, 1), (300, 5), (9, 31)]):
        write(f"a/{i}.png", encoded(".png", "RGB" if i % 2 else "L", size))
    net = fid.load_inception(dims=64)
    got = fid.features(net, data.batches("a", 3), keep=True)[1]
    want = [net(torch.tensor(x).permute(2, 0, 1)[None]) for _, x in data.iter_images("a")]
    assert torch.allclose(got, torch.cat(want), rtol=1e-4) and len(got) == 6
    for shape, sizes in (((3, 3000, 3000, 3), [1] * 3), ((5, 4, 9, 1), [3, 2]),
                         ((1, 3, 5000, 5000), [1]), ((5, 2000, 2000, 1), [3, 2])):
        np.lib.format.open_memmap("a.npy", "w+", np.uint8, shape)   # sparse
        assert [len(batch) for batch in data.batches("a.npy", 3)] == sizes


# --------------------------------------------------------------- input that is not to be trusted


def sparse(size):
    return lambda path: path.touch() or os.truncate(path, size)


def header(*shape):
    """That of an .npy of numbers which it has not."""
    out, kind = io.BytesIO(), {"descr": "<f8", "fortran_order": False}
    np.lib.format.write_array_header_1_0(out, kind | {"shape": shape})
    return out.getvalue()


def layer(**changed):
    """Weights, some of them replaced."""
    return lambda path: random_weights(path, **changed)


CODE = np.array([EVIL, None], object)
STATS, STATS_64 = ({"mu": np.arange(1.0 * n), "sigma": np.eye(n)} for n in (4, 64))
PNG, JPG, BMP = (encoded(suffix) for suffix in (".png", ".jpg", ".bmp"))
ZIP, ZIPS = zip_of([("a.png", PNG)]), [zip_of([("a.png", PNG), ("b.png", PNG)], i) for i in (0, 8)]
LISTED, PIXELS = ZIP.index(b"PK\1\2"), ZIP.index(b"IDAT") + 40
TWO = zip_of([("mu.npy", PNG), ("sigma.npy", PNG)])
SIZE = TWO.rindex(b"PK\1\2") + 24     # where the directory has that of sigma
WHITE = bytes.fromhex("524946461a000000574542505650384c0e0000002ffebfff0f071011fd0f4444ff03")
RGB16 = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000011002000000c0e78f9d0000000c49444154789c631032"
    "01410002b300d3fab702450000000049454e44ae426082")  # Pillow opens it, and keeps the upper bytes
CONV, CIFAR = (32, 3, 3, 3), "cifar-10-batches-bin/test_batch.bin"
VALID = {   # whole files, which are broken at random; by hand in REFUSALS
    "in/a.jpg": [encoded(suffix, mode) for suffix, modes in {
        ".png": "L RGB 1 P LA RGBA", ".jpg": "L RGB CMYK", ".bmp": "L RGB 1 P", ".ppm": "L RGB 1",
        ".webp": "RGB RGBA", ".gif": "L P RGB", ".tif": "L RGB 1 CMYK"}.items()
        for mode in modes.split()],
    "in.zip": ZIPS,
    "s.npz": [STATS | {"n": 9, "id": "x"}, lambda path: np.savez_compressed(path, **STATS)],
    "a.npy": [np.zeros((4, 5, 6, 3), np.uint8)],
    "w.pth": [random_weights, lambda path: torch.save(torch.load(
        random_weights(path), weights_only=True), path, _use_new_zipfile_serialization=False)]}
READERS = {     # of any other file: `fid.py pics FILE`
    "in/a.jpg": lambda: [*data.iter_images("in")], "in.zip": lambda: [*data.iter_images("in.zip")],
    CIFAR: load("cifar10", 32, split="test"), "cifar-10-binary.tar.gz": load("cifar10", 32),
    "s.npz": lambda: fid.main(["s.npz", "s.npz"]), "a.npy": lambda: list(data.iter_npy("a.npy")),
    "w.pth": lambda: fid.load_inception(dims=64, weights=Path("w.pth")), "pipe": load("pipe")}
# (file, what is in it: see `write`, *what its reader says). Without a file, a call beside the
# folders pics, one and d.npz and the statistics 64.npz.
REFUSALS = [
    ("in/a.jpg", JPG[:len(JPG) // 2], "not a readable image (", "runcated"),
    *(("in/a.jpg", text, "cannot identify") for text in (
        b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")),
    ("in/a.jpg", sparse(2 ** 34), "268435456 bytes"), ("in/a.jpg", RGB16, "RGB;16B pixels are not"),
    ("in/a.jpg", lambda path: Image.fromarray(np.zeros((4, 4), np.uint16)).save(path, "PNG"),
     "I;16 pixels are not 8 bits"), ("in/a.jpg", WHITE, "exceeds limit"),
    ("in/a.jpg", BMP[:18] + struct.pack("<ii", 10_000, 9_000) + BMP[26:], "exceeds limit"),
    ("in.zip", ZIP[:PIXELS] + bytes([ZIP[PIXELS] ^ 1]) + ZIP[PIXELS + 1:],
     "a.png: not a readable image (Bad CRC-32"),
    ("in.zip", ZIP[:LISTED + 8] + b"\1" + ZIP[LISTED + 9:], "encrypted"),
    ("in.zip", ZIP[:-30], "no (whole) zip"),
    ("in.zip", ZIPS[0].replace(b"b.png", b"a.png"), "a.png is there twice"),
    ("in.zip", zip_of([("b.png", bytes(10 ** 7))], 8), "b.png", "cannot identify"),
    ("pipe", os.mkfifo, "no folder"), (CIFAR, os.mkfifo, "lacks"),
    (CIFAR, bytes(1000), "has 1000 bytes, should have 30730000"),
    (CIFAR, sparse(2 ** 36), "should have 30730000"),
    ("cifar-10-binary.tar.gz", b"no archive", "md5 is", "should be c32a1d4ab5d03f128"),
    ("s.npz", {"mean": np.zeros(4)}, "must hold mu"), ("s.npz", b"mu", "not a readable .npz"),
    *(("s.npz", STATS | {key: CODE}, "plain arrays") for key in ("mu", "sigma", "n")),
    ("s.npz", pickle.dumps(EVIL), "plain arrays"),
    *(("s.npz", STATS | {"mu": mu}, "must hold mu") for mu in (
        np.zeros((4, 1)), np.zeros(4, int), np.zeros(4, complex))),
    *(("s.npz", STATS | {"mu": np.full(4, x)}, "finite") for x in (np.nan, np.inf, 1e200)),
    *(("s.npz", STATS | {"sigma": sigma}, text) for text, sigma in {
        "eigenvalue -1": np.ones((4, 4)) - np.eye(4), "finite": np.diag([1, 1, 1, np.inf]),
        "symmetric": np.eye(4) + np.eye(4, k=1), "(5, 5)": np.eye(5)}.items()),
    ("s.npz", zip_of([("mu.npy", header(10 ** 6)), ("sigma.npy", header(10 ** 6, 10 ** 6))]),
     "not a readable .npz"),
    ("s.npz", TWO[:SIZE] + struct.pack("<I", 2 ** 30) + TWO[SIZE + 4:], "below 1 GiB"),
    ("64.npz", {"mu": np.zeros(9), "sigma": np.eye(9)}, "different features"),
    ("64.npz", STATS_64 | {"id": "x"}, "different features"),
    ("a.npy", np.zeros((4, 8, 8, 3)), "must be uint8"),
    ("a.npy", np.asfortranarray(np.zeros((5, 8, 8, 3), np.uint8)), "C order"),
    *(("a.npy", x, "not a readable .npy") for x in (CODE, ZIP, pickle.dumps(EVIL))),
    *(("a.npy", np.zeros(shape, np.uint8), "must be uint8") for shape in (
        (5, 0, 8, 3), (5, 8, 8), (5, 8, 8, 4), ())),
    ("a.npy", lambda path: np.lib.format.open_memmap(
        path, "w+", np.uint8, (1, 20_000, 20_000, 3)), "268435456 bytes an image"),
    ("w.pth", b"<html>not found</html>", "not a state dict"), ("w.pth", sparse(2 ** 40), "1 GiB"),
    ("w.pth", lambda path: torch.save({"Conv2d_1a_3x3.conv.weight": EVIL}, path), "not a state"),
    ("w.pth", pickle.dumps(EVIL, 2), "not a state"),
    *(("w.pth", layer(Conv2d_2b_3x3__bn__weight=x), text) for text, x in {
        "Conv2d_2b_3x3.bn.weight is missing": None, "is (8, 8)": torch.ones(8, 8)}.items()),
    ("w.pth", layer(fc__weight=torch.zeros(1000, 8)), "fc.weight is (1000, 8)"),    # torchvision's
    ("w.pth", layer(Conv2d_2b_3x3__bn__running_var=-torch.ones(64)), "3x3, its batch"),
    *(("w.pth", layer(Conv2d_1a_3x3__conv__weight=x), "Conv2d_1a_3x3", text) for text, x in {
        "is not finite": torch.full(CONV, math.nan), "complex64": torch.zeros(CONV) * 1j,
        "folded in, is not finite": torch.full(CONV, 1e300, dtype=torch.double),
        "sparse": torch.zeros(CONV).to_sparse(), "plain floats": torch.zeros(CONV, device="meta"),
        "(1000000, 1000000)": torch.zeros(1).expand(10 ** 6, 10 ** 6)}.items()),
    *(("", load(*source), *texts) for source, *texts in (
        (["d.npz"], "no images in it"), ([""], "empty"), (["nowhere"], "does not exist"),
        (["/dev/zero"], "no folder"), (["a\0b.png"], "does not exist"),
        (["x" * 5000], "name too long"), (["cifar10", 64], "--size 64", "cifar10", "32"),
        (["cifar10", 32], "cannot download", "put it at cifar-10-binary.tar.gz"),
        (["celeba"], "img_align_celeba", "--data-dir"), (["pics", 4097], "--size"))),
    ("", load("geometry", 16, n_train=10 ** 6), "--n-train 1000000: geometry has 25600"),
    ("", load("one", split="test"), "no image is left"),
    ("", load("pics", split="valid"), "choose train, test or all"),
    ("", lambda: fid.Inception(dims=100), "choose one"),
    ("", lambda: fid.scorer(argparse.Namespace(n_real=9), range(8), 64), "2 to 8"),
    ("", lambda: fid.features(fid.Pixels(), [uint8_images(1)])[0].cov, "1 image"),
    *(("", lambda call=call, x=x: call(torch.full((4, 4), x)), "not finite")
      for x in (math.nan, -math.inf, 1e30) for call in (
          lambda x: fid.kid(randn(9, 4), x), lambda x: fid.precision_recall(x, randn(9, 4), k=1),
          lambda x: fid.frechet_distance(x[0] * 0, x, x[0] * 0, torch.eye(4)),
          lambda x: fid.Statistics().add(x * 1e30))),
    *(("", lambda args=args: fid.main([*args.split(), *TINY]), text) for args, text in {
        "pics": "B is missing", "pics nowhere": "no such file", "pics one": "at least 2",
        "pics 64.npz --kid": "not statistics", "pics one --kid": "at least 2",
        "pics pics --n 1": "at least 2", "pics pics --n 3 --prc": "more than 3",
        "pics pics --batch 1001": "from 1 to 1000", "pics --save-stats d.npz": "*.npz",
        "pics pics --weights /dev/zero": "no such file", "geometry pics --size 4096": "4 GiB",
        }.items())]


@pytest.mark.parametrize("file, what, texts", [
    pytest.param(file, what, texts, id=f"{file or 'call'}-{texts[0]}")
    for file, what, *texts in REFUSALS])
def test_refusals(tmp_path, tiny, bounded, file, what, texts):
    """One line says what is wrong; nothing is written, run, decoded at length, or waited for."""
    picture_folder(Path("pics"))
    write("one/a.png", PNG)
    write("d.npz/notes.txt", b"not an image")
    write("64.npz", STATS_64)
    if file:
        write(file, what)
    before = sorted(tmp_path.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if file == "s.npz" else "ignore")
        call = READERS.get(file, lambda: fid.main(["pics", file, *TINY])) if file else what
        refused(call, *texts, *[Path(file).name] * (file in VALID))
    assert sorted(tmp_path.rglob("*")) == before


@st.composite
def damaged(draw, contents):
    """One of `contents` (bytes): some bytes near either end changed, added or removed, or cut."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 3))):
        ends = min(len(content), 30_000)
        at = draw(st.integers(-ends, ends))
        content[at:at + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=4) | st.sampled_from([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff"]))
    whole = draw(st.sampled_from([True, True, False]))
    return bytes(content if whole else content[:draw(st.integers(0, len(content)))])


@pytest.mark.parametrize("file, examples", [*zip(VALID, (300, 200, 150, 100, 40))])
def test_broken_files_are_read_or_refused(tiny, bounded, file, examples):
    """Any other exception than UserError, a wait for ever, or gigabytes for a few bytes."""
    contents, ended = [write(file, content).read_bytes() for content in VALID[file]], []

    @settings(max_examples=examples, **FUZZ)
    @given(damaged(contents))
    def try_one(content):
        write(file, content)
        try:
            got = READERS[file]()
            assert file != "w.pth" or all(p.isfinite().all() for p in got.parameters())
            assert file[-3:] not in ("jpg", "zip") or all(x.shape[2:] == (3,) for _, x in got)
            ended.append(True)
        except UserError as error:
            assert Path(file).name in str(error)
            ended.append(False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # Pillow's of odd metadata, torch's of the older format
        try_one()
    assert examples / 30 < sum(ended) < examples * 29 / 30   # both, or this is of no use


def test_folders_and_zips_hold_plain_files_and_are_never_extracted(tmp_path, tiny, bounded):
    """A link that is followed, a pipe that is waited for, a file outside of the folder."""
    names = [b"\xff\xfe.png", b"a\nb.png", b"\xf0\x9f\x98\x80.png", b"l" * 250 + b".png", b"-n.png"]
    for name in [*names, b"deep.png/a.PNG"]:
        write(os.fsdecode(b"in/" + name), PNG)
    os.mkfifo("in/pipe.png")
    Path("in/out.png").symlink_to("/etc/hostname")
    Path("in/loop").symlink_to(tmp_path / "in")
    assert [image.shape for _, image in data.iter_images("in")] == [(7, 9, 3)] * 6
    link, outside = zipfile.ZipInfo("link.png"), tmp_path.parent / "x.png"
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    write("a.zip", zip_of([
        (str(outside), PNG), ("../x.png", PNG), ("C:\\x.png", PNG), ("d.png/", b""),
        ("__MACOSX/._x.png", b"no image"), ("\xff\n.png", PNG), (link, b"/etc/hostname")]))
    assert [image.shape for _, image in data.iter_images("a.zip")] == [(7, 9, 3)] * 4
    assert {p.name for p in tmp_path.iterdir()} == {"in", "a.zip"} and not outside.exists()


def test_only_listed_addresses_and_checksums_always(tiny, monkeypatch):
    """Another server asked, a file kept whose checksum is wrong."""
    asked = []
    monkeypatch.setattr(data.urllib.request, "urlopen",
                        lambda url, timeout: asked.append(url) or io.BytesIO(b"hello"))
    monkeypatch.delenv("FID_WEIGHTS")
    refused(load("cifar10", 32), "md5 is ")
    refused(lambda: fid.load_inception(data_dir="."), "sha256 is ")
    assert asked == [data.CIFAR_URL, fid.PUBLISHED[0]] and all(u[:8] == "https://" for u in asked)
    assert not [path for path in Path().rglob("*") if path.is_file()]
    data.download("x", Path("a"), sha256=hashlib.sha256(b"hello").hexdigest())
    assert Path("a").read_bytes() == b"hello"


# ------------------------------------------------------------------------- exp_pixel_combination


def test_toy_scores_by_hand():
    cfg = argparse.Namespace(size=16, seed=3, n_fid=8, device="cpu")
    known = pixels.images_of(cfg)
    assert geometry.count_exact(known, 4)[0].tolist() == [3, 3, 2, 4]
    fakes = torch.cat([known[[0, 0, 0, 1, 2, 3, 3, 3]]])
    t = argparse.Namespace(cfg=cfg, shown=pixels.shown_of(cfg, known), D=nn.Sequential(
        nn.AvgPool2d(16), nn.Flatten(0)), fakes=lambda n: {"": fakes[:n].split(3)})
    row = pixels.score(t)
    expected = {"share_a": 3, "share_b": 1, "share_and": 1, "share_or": 3, "share_2": 1,
                "share_3": 4, "share_4": 3}
    assert {k: row[k] * 8 for k in expected} == expected
    for kind, n in (("a", 3), ("or", 4), ("three", 3)):                 # n squares of 16 px
        assert row[f"d_{kind}"] == pytest.approx(2 * n / 16 - 1, abs=1e-3)


def brute_pairs(queries, images, own=None):
    """Distances of each query to the nearest average and the nearest image, by all of them."""
    q, a = (x.double().flatten(1) for x in (queries, images))
    for i, x in enumerate(q):
        left = [j for j in range(len(a)) if own is None or j != own[i]]
        pairs = {(j, k): (x - (a[j] + a[k]) / 2).norm().item()
                 for j, k in itertools.combinations(left, 2)}
        yield min(pairs.values()), min((x - a[j]).norm().item() for j in left), pairs


@pytest.mark.parametrize("n, shape, block, limit", [
    (5, (1, 2, 2), 512, None), (17, (3, 4, 4), 5, 7), (30, (1, 8, 8), 7, None), (24, (10,), 8, 64),
    (12, (2, 3, 3), 1, 1)])
@pytest.mark.parametrize("leave_out", [False, True])
def test_pair_search_equals_brute_force(n, shape, block, limit, leave_out):
    gen = core.generator(n)
    images = 0.3 * torch.randn(n, *shape, generator=gen) + 5     # far from the origin
    images[-1] = images[0]                                       # a duplicate
    queries = torch.cat([images[:3], (images[1:2] + images[2:3]) / 2,
                         5 + torch.randn(6, *shape, generator=gen)])
    own = torch.tensor([0, 1, 2, 1, *[n - 1] * 6]) if leave_out else None
    pairs, d_pair = pixels.nearest_pair(queries, images, own, block, limit)
    image, d_image = pixels.nearest_image(queries, images, own, block)
    for i, (best, nearest, each) in enumerate(brute_pairs(queries, images, own)):
        assert d_pair[i].item() == pytest.approx(best, rel=1e-5, abs=2e-3)
        assert d_pair[i].item() == pytest.approx(each[tuple(pairs[i].tolist())], rel=1e-9, abs=1e-9)
        assert d_image[i].item() == pytest.approx(nearest, rel=1e-5, abs=2e-3)
    if not leave_out:
        assert pairs[3].tolist() == [1, 2] and d_pair[3] < 1e-5   # the average itself
        assert pairs[0].tolist() == [0, n - 1] and d_pair[0] == d_image[0] == 0
    # 0 with itself would be as near to 0.1 as -10 with 10, and no other partner of 0 is.
    pairs, d = pixels.nearest_pair(torch.tensor([[0.1]]), torch.tensor([[0.0], [-10.0], [10.0]]))
    assert pairs.tolist() == [[1, 2]] and d.item() == pytest.approx(0.1)


def plain_images(*levels, channels=3, size=4):
    """uint8 (N, channels, size, size), each of one grey level."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, channels, size, size)


def test_search_counts_and_gam_by_hand():
    images = plain_images(0, 100, 200, 240, channels=1, size=2)
    row, kept = pixels.search(plain_images(150, 201, 50, 221, channels=1, size=2), images,
                              torch.device("cpu"))
    assert row["nearer_average"] == 0.75                          # 201 is next to the image 200
    unit = 2 / 127.5                                              # L2 of one grey level, 4 px
    assert (kept["d_pair"] / unit).tolist() == pytest.approx([0, 19, 0, 1], abs=1e-4)
    assert (kept["d_image"] / unit).tolist() == pytest.approx([50, 1, 50, 19], abs=1e-4)
    assert row["ratio"] == pytest.approx(20 / 120, abs=1e-6)
    shown = kept["shown"][:, :4, 0, 0, 0].tolist()                 # image, average, its parents
    assert sorted(shown[:2]) == [[50, 50, 0, 100], [150, 150, 100, 200]]
    images = plain_images(0, 10, 100, 104, 255)
    pairs = pixels.similar_pairs(images, 5)
    assert pairs.tolist() == [[0, 1], [2, 3], [3, 4]]              # each once, nearest neighbours
    assert pixels.similar_pairs(plain_images(0, 10, 19, 27), 2).tolist() == [[0, 1], [1, 2]]
    assert pixels.average(*images[pairs.T])[:, 0, 0, 0].tolist() == [5, 102, 180]  # 179.5: even


def test_views_have_the_same_distance():
    x = core.to_float(uint8_images(9, 3, 16))
    average, away = ((y - x).flatten(1) for y in pixels.same_distance(x, core.generator(0)))
    assert torch.allclose(average, (x.roll(1, 0) - x).flatten(1) / 2, atol=1e-6)
    assert torch.allclose(away.norm(dim=1), average.norm(dim=1))
    assert F.cosine_similarity(average, away).abs().max() < 0.5


# ---------------------------------------------------------------------------------------- exp_sc


def sc_config(**changes):
    return config(size=16, n_train=64, n_cover=300, batch=8, sc_counter="exact", **changes)


def test_each_arm_of_rectangles_is_its_cures(monkeypatch):
    """PCR's negatives are exact ANDs and ORs, half each; an arm has what its name says; SC weighs
    the correct fakes with 0."""
    cfg, calls = sc_config(), []
    images, pool = exp_sc.training_set(cfg)
    assert (geometry.count_exact(images, 4)[0] == 2).all() and len(images) == len(pool) == 64
    t = core.Trainer(cfg, images, *core.build(cfg))
    t.pool = pool
    n, clean = geometry.count_exact(torch.cat([exp_sc.combinations(t) for _ in range(50)]), 4)
    assert clean.all() and set(n.tolist()) == {1, 3} and abs((n == 1).float().mean() - 0.5) < 0.1
    batch = core.to_float(torch.cat([geometry.draw(2, k, 16, 4, seed=k) for k in (0, 1, 2, 3)]))
    weight = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1]) * 8 / 6
    monkeypatch.setattr(core, "d_loss", lambda t, x_real, x_fake, x_comb=None, weight=None: (
        calls.append((x_comb is not None, weight is not None and weight.tolist()))))
    for arm in ("pcr", "sc", "sc+pcr"):
        exp_sc.ARMS[arm](t, t.real(), batch)
    assert calls == [(True, False), (False, weight.tolist()), (True, weight.tolist())]


def test_arms_of_rectangles_that_are_not_the_papers(tmp_path, monkeypatch, capsys):
    """`ema` is judged by the average of G; `r1` has its own loss and no WGAN-GP penalty."""
    monkeypatch.setattr(exp_sc, "score", lambda t: {
        "correct": 0.1, "correct_exact": 0.2, "hist": [1] * 5, "wrong": 0.9,
        "correct_ema": 0.3, "correct_exact_ema": 0.4, "hist_ema": [2] * 5})
    rows = exp_sc.main(["--smoke", "--outdir", str(tmp_path), "--arms", "ema", "r1"])["rows"]
    assert [r["curve"] for r in rows] == [[[2, 0.3, 0.4], [4, 0.3, 0.4]], [[2, 0.1, 0.2],
                                                                           [4, 0.1, 0.2]]]
    assert [r["hist"][0] for r in rows] == [2, 1] and all(r["update_seconds"] > 0 for r in rows)
    logs = [harness.read_rows(*tmp_path.glob(f"*/*/{arm}-s0/metrics.jsonl"))[0]
            for arm in ("ema", "r1")]
    assert [("gp" in row, "r1" in row) for row in logs] == [(True, False), (False, True)]
    assert "gp_weight=0.0  loss=ns  run=r1-s0" in capsys.readouterr().out


def test_score_of_rectangles_by_hand():
    """Two perfect squares, two of which one lacks a pixel, one, and three: counters differ."""
    x = torch.cat([geometry.draw(1, k, 16, 4, seed=k) for k in (2, 2, 1, 3)])
    x[1, 0][tuple((x[1, 0] > 0).nonzero()[0])] = 0
    t = argparse.Namespace(cfg=sc_config(n_fid=4), fakes=lambda n: {"": [x], "_ema": [x[:1]]})
    row = exp_sc.score(t)
    assert (row["correct"], row["correct_exact"]) == (0.5, 0.25)
    assert row["wrong"] == 1 - row["correct_ema"] == 0          # of the average
    assert row["hist"] == [0, 0.25, 0.5, 0.25, 0] and row["correct_exact_ema"] == 1


def test_coverage_against_brute_force(monkeypatch):
    cfg = sc_config()
    images, _ = exp_sc.training_set(cfg)
    samples = torch.cat([geometry.draw(250, 2, 16, 4, seed=9), images[:20],
                         geometry.draw(30, 3, 16, 4, seed=3)])
    monkeypatch.setattr(core, "generate", lambda G, z: samples.split(64))
    t = argparse.Namespace(cfg=cfg, G=None, latents=lambda n, seed: None)
    row, pairs = exp_sc.coverage(t, images, n_show=20)
    distances = []
    for image, nearest in pairs:
        apart = (samples[:, 0] != image).sum((1, 2))
        distances.append(apart.min().item())
        assert (nearest != image).sum() == apart.min()
    known, right = ([x.numpy().tobytes() for x in part] for part in (images, samples[:270]))
    assert row["coverage_exact"] == distances.count(0)
    assert row["coverage_n"] == len({p.tobytes() for p in pairs[:, 0].numpy()}) == 20
    assert row["distinct"] == len(set(right)) and row["distinct_train"] == len(set(known))
    assert row["unseen_share"] == pytest.approx(sum(x not in known for x in right) / 270)


def replaced(d, n_keep=2, gen=None):
    """Which of fakes of DIF d make the batch of n_keep, when the others are the spares."""
    x = torch.tensor(d).view(-1, 1, 1, 1) * 2 - 1                       # one pixel, trained on -1
    t = argparse.Namespace(x_train=-torch.ones(1, 1, 1, 1), fake=lambda: x[n_keep:], cfg=(
        argparse.Namespace(spares=1, sc_threshold=0.1)))
    return exp_sc.corrected(t, x[:n_keep], gen).flatten().add(1).div(2)


def test_replacement_rule_by_hand_and_its_random_control():
    for d, kept in (
            ([0.3, 0.2, 0.5, 0.4], [0.2, 0.3]),         # nobody under the threshold: all stay
            ([0.05, 0.2, 0.3, 0.4], [0.2, 0.4]),        # 0 makes way for the largest DIF
            ([0.05, 0.01, 0.3, 0.4, 0.2], [0.3, 0.4]),  # both make way for the two largest
            ([0.05, 0.01, 0.02, 0.09], [0.05, 0.09]),   # no worse spare than 0 but 3
            ([0.101, 0.3, 0.9, 0.9], [0.101, 0.3])):    # just above the threshold
        assert sorted(round(v, 3) for v in replaced(d).tolist()) == kept
    gen, gone, came = core.generator(0), torch.zeros(4), torch.zeros(4)
    for d in (torch.rand(200, 8, generator=core.generator(1)) * 0.2):
        sc, random = ((d[:, None] - replaced(d.tolist(), 4, g)).abs().amin(1) < 1e-6
                      for g in (None, gen))
        assert random.sum() == 4 and random[4:].sum() == sc[4:].sum()   # the control: as many
        gone += ~random[:4]
        came += random[4:]
    for counts in (gone, came):     # whoever: each about as often, whatever its DIF
        assert counts.sum() > 100 and (counts / counts.sum() - 0.25).abs().max() < 0.1


def test_measure_by_hand():
    gen = core.generator(0)
    images = torch.randint(60, 190, (4, 3, 8, 8), dtype=torch.uint8, generator=gen)
    smooth = torch.linspace(0, 255, 8).to(torch.uint8).expand(1, 3, 8, 8)
    noise = (torch.rand(2, 3, 8, 8, generator=gen) < 0.5).to(torch.uint8) * 255
    x = torch.cat([images[:1], images[:1], images[2:3] + 3,       # three copies of two images
                   smooth, smooth + (smooth < 250),               # a pair of near-duplicates
                   plain_images(255, size=8),                     # constant
                   noise])                                        # rough, and no duplicates
    row = exp_sc.measure(x, images, 0.1)
    unit = ((x.double() - images[:, None].double()) ** 2).mean((2, 3, 4)).sqrt().min(0).values
    assert row == {"dif": pytest.approx((unit / 255).mean().item(), rel=1e-5), "copies": 3 / 8,
                   "recall": 2 / 4, "collapsed": 3, "noisy": 2 / 8, "n": 8}
    x = core.to_float(x).repeat(5, 1, 1, 1)                       # a product would round this to 0
    torch.testing.assert_close(exp_sc.distances(x + 1e-5, x).diagonal(), torch.full((40,), 5e-6),
                               rtol=1e-2, atol=0)


@pytest.mark.slow
def test_rows_of_photographs(smoke):
    rows = smoke("sc, pics")[0]["rows"]
    fixed = {r["arm"]: r for r in rows if r["part"] == "sc_reference"}
    assert [(r["arm"], r["step"]) for r in rows if r["part"] == "sc_natural"] == [
        (arm, step) for arm in exp_sc.PHOTO_ARMS for step in (2, 4)]
    assert fixed["copyist"]["dif"] == 0 and fixed["copyist"]["copies"] == 1
    assert fixed["copyist"]["distance"] < fixed["unseen photographs"]["distance"]
    assert fixed["unseen photographs"]["dif"] > 0 and fixed["averages of two"]["dif"] > 0
    assert fixed["plain grey"]["collapsed"] == fixed["plain grey"]["n"] == 16
    rows = smoke("pixels, pics")[0]["rows"]
    found = {r["arm"]: r for r in rows if r["part"] == "combination"}
    assert [*found] == ["vanilla", "pcr"] and found["pcr"]["pairs_searched"] == 108 * 107 // 2
    assert found["pcr"]["curve"][-1]["d_average"] == pytest.approx(found["pcr"]["d_average"])
    gam = {r["method"]: r for r in rows if r["part"] == "gam"}
    assert {*gam} == {"held-out", "gam", "random pairs", *found} and gam["gam"]["n"] == 8


# ---------------------------------------------------------------------- exp_sample_insufficiency


def test_sampling_laws():
    full, epoch = codes("fgd", batch=16), codes("epoch")
    assert all(full.pick(k).tolist() == [*range(16)] for k in ("real", "d", "g", "real"))
    for stream in ("real", "d", "g"):                                   # whole epochs, shuffled
        drawn = [sum((epoch.pick(stream).tolist() for _ in range(4)), []) for _ in range(3)]
        assert all(sorted(d) == [*range(16)] for d in drawn) and drawn[0] != drawn[1]
    for _ in range(3):
        epoch.update()
    assert {who: len(left) for who, left in epoch.left.items()} == {"real": 4, "d": 4, "g": 4}
    for arm, repeats in (("wor", (False, False)), ("real-wor", (False, True)),
                         ("iid", (True, True))):
        trainer = codes(arm)
        for stream, wanted in zip(("real", "d"), repeats):
            drawn = [trainer.pick(stream).tolist() for _ in range(300)]
            assert any(len(set(d)) < 4 for d in drawn) == wanted
            assert stats.chisquare(np.bincount(sum(drawn, []), minlength=16)).pvalue > 1e-4
    known = {tuple(z) for z in trainer.G.codes.tolist()}
    assert len(known) == 16 and all(tuple(z) in known for z in trainer.latent(4).tolist())


def test_changes_and_assignment_by_hand(tmp_path):
    x = geometry.draw(4, 2, 16, 4)
    frames = iter([x, x, torch.cat([x[1:2], x[1:]])])
    t = argparse.Namespace(cfg=config(size=16), data=x, d_steps=3, preview=lambda: next(frames))
    changed = []
    for t.step in (1, 2, 3):
        changed.append(insufficiency.score(t, tmp_path).get("changed"))
    assert changed == [None, 0.0, 0.25]
    assert insufficiency.assignment(x, x[[2, 0, 3, 1]]) == 0
    y = geometry.draw(4, 2, 16, 4, seed=1)
    pairs = ((core.to_float(x)[:, None] - core.to_float(y)[None]) ** 2).sum((2, 3, 4)).sqrt()
    best = min(sum(pairs[i, j].item() for i, j in enumerate(order)) / 4
               for order in itertools.permutations(range(4)))
    assert abs(insufficiency.assignment(x, y) - best) < 1e-5


def test_r1_of_a_linear_critic():
    w = torch.tensor([[3., 4., 0., 0.]])
    cfg = argparse.Namespace(r1_weight=10.0, loss="wgan", gp_weight=0.0)
    t, x = argparse.Namespace(D=lambda x: x.flatten(1) @ w.T, cfg=cfg), torch.randn(5, 1, 2, 2)
    loss, logs = core.r1(t, x, x)
    torch.testing.assert_close(logs["r1"], torch.tensor(5 * 25.0))
    torch.testing.assert_close(loss, core.d_loss(t, x, x)[0] + 125)


@pytest.mark.slow
def test_cells_of_sample_insufficiency(smoke):
    result, folder, _ = smoke("insufficiency")
    cells = [("fgd", 8), ("wor", 2), ("wor", 4), ("iid", 4), ("real-wor", 4), ("epoch", 4)]
    assert [(r["seed"], r["arm"], r["batch"]) for r in result["rows"]] == [
        (s, *cell) for s in (0, 1) for cell in cells]
    for row in result["rows"]:
        run = folder / f"{row['arm']}-b{row['batch']}-s{row['seed']}"
        steps = [r for r in harness.read_rows(run / "metrics.jsonl") if "d_loss" in r]
        assert row["images_seen"] == 32 and len(steps) == row["steps"] == 32 // row["batch"]
        late = [r["d_loss"] for r in steps[-max(len(steps) // 3, 1):]]
        assert row["d_loss_var"] == pytest.approx(np.var(late))
    rows = smoke("insufficiency, pics")[0]["rows"]
    assert {(r["arm"], r["batch"]) for r in rows} >= {("vanilla", 2), ("vanilla", 4), ("ema", 2)}


# ------------------------------------------------------------------------------------- bench


def test_bench_counts_flops_as_by_hand():
    conv, x = torch.nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 10)
    forward = 2 * 2 * 8 * 3 * 9 * 100                       # B, C out, C in, kernel, pixels
    with bench.Flops() as flops:
        y = conv(x)
    assert flops.total == forward
    with bench.Flops() as flops:
        y.sum().backward()                                  # of the weight alone
    assert flops.total == forward
    linear, x = torch.nn.Linear(7, 5, bias=False), torch.randn(4, 7, requires_grad=True)
    with bench.Flops() as flops:                            # forward, input, and penalty of weight
        torch.autograd.grad(linear(x).sum(), x, create_graph=True)[0].norm().backward()
    assert flops.total == 3 * (2 * 4 * 7 * 5)


def test_bench_takes_turns_and_leaves_out_what_fails():
    args = argparse.Namespace(smoke=True, repeats=3, clock="wall", peers=False, precision="fp32")
    b, calls = bench.Bench(args, torch.device("cpu")), []
    times = b.time_in_turns({"a": lambda: calls.append("a"), "broken": lambda: 1 / 0,
                             "b": lambda: calls.append("b")})
    assert "".join(calls)[-6:] == "ababab" and [*b.left_out] == ["broken"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    b.row("part", "name", "unit", np.array([1.0, 2.0, 9.0]))
    assert [b.rows[0][k] for k in ("low", "value", "high", "repeats")] == [1.5, 2.0, 5.5, 3]


@pytest.mark.slow
@pytest.mark.parametrize("precision, other", [("fp32", "bf16"), ("bf16", "fp32")])
def test_bench_measures_every_part_in_both_precisions(tmp_path, monkeypatch, precision, other):
    made, make = [], bench.make
    monkeypatch.setattr(bench, "make", lambda cfg, arm: (made.append((cfg.precision, arm)),
                                                         make(cfg, arm))[1])
    result = bench.main(["--smoke", "--data-dir", str(tmp_path), "--precision", precision])
    assert len({r["part"] for r in result["rows"]}) > 1 and not result["left_out"]
    assert made == [(precision, "vanilla"), (precision, "pcr"), (other, "vanilla"),
                    (precision, "vanilla")]
    assert {f"64 features, {name}" for name in ("fid.py", other)} < {
        r["name"] for r in result["rows"]}
    ours, scipys = (r["distance"] for r in result["rows"] if "distance" in r)
    assert ours == pytest.approx(scipys, rel=1e-8)


# ------------------------------------------------------------------------------------ theory_sde

STEPS = [(1.0, 1.0), (0.2, 0.2), (0.4, 0.05), (0.05, 1.3)]


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


@pytest.mark.parametrize("eta, mu", STEPS)
@pytest.mark.parametrize("k", [1, 2, 7, 60])
def test_theory_discrete_laws_against_sums(eta, mu, k):
    """Sums over all past noises instead of a recursion."""
    def variance(turn, gain):
        past = [np.linalg.matrix_power(np.array(turn), i) @ gain for i in range(k)]
        return 2 * sum(p @ p.T for p in past)[-1, -1]

    x = eta * mu
    assert th.alternating_law(k, eta, mu) == pytest.approx(
        variance([[1, -eta], [mu, 1 - x]], [[eta], [x]]), rel=1e-9)
    assert th.simultaneous_law(k, eta, mu) == pytest.approx(
        variance([[1, -eta], [mu, 1]], [[eta], [0]]), rel=1e-9, abs=1e-12)
    assert th.recursion(th.sgd(eta, mu, n_dis=3), [k])[1][0, 1, 1] == pytest.approx(
        float(th.alternating_law(k, 3 * eta, mu)) / 3, rel=1e-9)
    # The mean of theta_1 to theta_k, as a third state that adds them up.
    total = variance([[1, -eta, 0], [mu, 1 - x, 0], [mu, 1 - x, 1]], [[eta], [x], [x]])
    polyak = th.recursion(lambda j: th.averaged(th.sgd(eta, mu), 1 / j), [k])[1][0, -1, -1]
    assert polyak == pytest.approx(total / k ** 2, rel=1e-9)


def test_theory_methods_are_their_updates():
    """The matrices against the updates written out for numbers."""
    eta, mu, gamma, near = 0.3, 0.2, 0.7, pytest.approx
    w, theta, a, b, xi, xi2, mean = np.random.default_rng(0).normal(size=7)
    w1 = w + eta * (xi - theta - gamma * w)
    w2 = w1 + eta * (xi2 - theta - gamma * w1)
    assert th.sgd(eta, mu, gamma) @ [w, theta, xi] == near([w1, theta + mu * w1])
    assert th.sgd(eta, mu, gamma, 2) @ [w, theta, xi, xi2] == near([w2, theta + mu * w2])
    assert th.sgd(eta, mu, gamma, 1, False) @ [w, theta, xi] == near([w1, theta + mu * w])
    assert th.optimistic(eta, mu) @ [w, a, b, theta, xi] == near(
        [w + 2 * eta * (xi - theta) - eta * a, xi - theta, w, theta + 2 * mu * w - mu * b])
    assert (th.averaged(th.sgd(eta, mu, gamma), 0.1) @ [w, theta, mean, xi])[-1] == near(
        0.9 * mean + 0.1 * (theta + mu * w1))


def test_theory_variances_of_finite_batches_by_enumeration():
    images = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)
    images = images / images.std(correction=0)
    for scheme, all_of in (("iid", itertools.product(range(4), repeat=2)),
                           ("subset", itertools.permutations(range(4), 2))):
        draw, variance = th.finite(images, 2, scheme, core.generator(0))
        exact = images[torch.tensor(list(all_of))].mean(1).square().mean().item()
        assert float(variance) == pytest.approx(2 * exact, rel=1e-12)
        assert draw(40_000).square().mean().item() == pytest.approx(exact, rel=0.03)
    assert th.finite(images, 4, "subset", core.generator(0))[0](10).abs().max() < 1e-12  # all four


def test_theory_mcshane_attains_equation_11_and_the_lipschitz_bound_holds():
    (x1, x2), (a, b) = randn(2, 5, 9), randn(2, 5, 9, seed=1)
    delta = (x1 - x2).norm(dim=1)
    lipschitz, f1, f2 = 1.7, torch.full((5,), 0.8).double(), torch.full((5,), 1.1).double()

    def f(x):
        return th.mcshane(x, (x1, x2), (f1, f2), lipschitz)
    assert torch.allclose(f(x1), f1) and torch.allclose(f(x2), f2)
    for lam in (0.1, 0.5, 0.8):
        right_side = torch.maximum(f1 - lipschitz * (1 - lam) * delta, f2 - lipschitz * lam * delta)
        assert torch.allclose(f(lam * x1 + (1 - lam) * x2), right_side, atol=1e-12)
    assert ((f(a) - f(b)).abs() <= lipschitz * (a - b).norm(dim=1) + 1e-12).all()
    x = randn(64, 256).float()
    D = th.train_critic(x, -x, x / 2, 0.5, 3, 0)
    assert th.lipschitz_bound(D) == pytest.approx(math.prod(
        torch.linalg.svdvals(m.weight)[0].item() for m in D if hasattr(m, "weight")), rel=1e-9)
    a, b = randn(2, 500, 256, seed=1)
    assert ((D(a) - D(b)).abs() / (a - b).norm(dim=1)).max() <= th.lipschitz_bound(D)


@pytest.mark.slow
def test_theory_checks_agree_and_a_wrong_law_is_found(smoke, tmp_path, monkeypatch):
    rows = smoke("theory")[0]["rows"]
    z = np.array([row["z"] for row in rows if row["z"] is not None])
    assert abs(z).max() < th.Z_MAX and (z ** 2).mean() == pytest.approx(1, abs=0.4)
    clipped = [row["measured"] for row in rows if row["check"] == "alternating, |w| <= 1"]
    assert len(clipped) == 4 and max(clipped) < 64                      # without it they grow
    assert not any(row["measured"] for row in rows if row["section"] == 5)      # violations
    row = {"check": "theorem3", "section": 5, "z": None, "measured": 0}
    assert not th.failures([row]) and th.failures([{**row, "measured": 1}]) == ["theorem3"]
    assert th.failures([{"check": "omd", "section": 3, "z": math.nan, "measured": 1.0}]) == ["omd"]
    law = th.alternating_law
    monkeypatch.setattr(th, "alternating_law", lambda *args: 1.3 * law(*args))
    monkeypatch.setattr(th, "plot", lambda folder: None)
    with pytest.raises(SystemExit) as stop:
        th.main(["--smoke", "--device", "cpu", "--outdir", str(tmp_path)])
    assert stop.value.code not in (0, None) and [*tmp_path.rglob("result.json")]


# --------------------------------------------------------------------------- sets of squares


@pytest.mark.parametrize("kind, n, euler", [
    ("disc", 256, 1), ("torus", 256, 0), ("free", 9_576, 0), ("halves", 2_704, 1),
    ("apart", 104, 2)])
def test_sets_have_their_number_of_images_and_their_topology(kind, n, euler):
    """All images are different; the cells that steps of a pixel span have the Euler characteristic
    of a point, of a torus, of a circle or of two points."""
    images, at = neighbours.squares(kind)
    assert len(images) == n == geometry.count_distinct(images) and images.dtype == torch.uint8
    lit = geometry.lit(images).sum((1, 2, 3))
    assert (lit == 16 * neighbours.SETS[kind]).all() or kind == "disc" and lit.min() == 4
    cells, size = {tuple(p.flatten().tolist()) for p in at}, images.shape[-1]
    if kind == "free":      # squares have no names
        cells |= {p[2:] + p[:2] for p in cells}
    found = 0
    for moved in itertools.product([0, 1], repeat=2 * at.shape[1]):     # cells of all dimensions
        ends = list(itertools.product(*[(0, m) if m else (0,) for m in moved]))
        found += (-1) ** sum(moved) * sum(all(tuple(
            (a + b) % size if kind == "torus" else a + b for a, b in zip(p, end)) in cells
            for end in ends) for p in cells)
    assert found == euler
    seen = neighbours.half(kind)[1]
    assert seen.sum() == n // 2 and torch.equal(neighbours.half(kind)[1], seen)
    assert neighbours.half(kind, held=0)[1].all()


def test_report_of_squares_by_hand():
    """Two equal copies, one image that was held out, one with a pixel lost, one dark: of five."""
    images, seen = neighbours.half("halves")
    copy, held = (images[v].clone() for v in (seen, ~seen))
    blurred = copy[:1].clone()
    blurred[0, 0][tuple((blurred[0, 0] > 0).nonzero()[0])] = 0
    x = torch.cat([copy[3:4], copy[3:4], held[:1], blurred, torch.zeros_like(blurred)])
    row = neighbours.report_squares(x, images, seen, 2)
    assert (row["n_samples"], row["correct"], row["correct_exact"]) == (5, 0.8, 0.6)
    assert row["distinct"] == 2 and row["copies"] == pytest.approx(2 / 3) and row["n_eff"] == 3
    assert row["tv"] == pytest.approx(1 - 3 / 2_704) and row["tv_floor"] > 0.99
    dark = neighbours.report_squares(torch.zeros_like(x), images, seen, 2)
    assert dark["tv"] is None and dark["copies"] == dark["correct"] == 0


# ----------------------------------------------------------------------------- MIX+GAN


def mix_config(arm, dataset="geometry", *more):
    """The configuration that the command gives a run."""
    p = mix_gan.sweep.parser("", neighbours.PRESETS["ring"], mix_gan.OWN, mix_gan.ARMS)
    p.set_defaults(part="gan", dataset=dataset, data_dir=Path("."))
    cfg, = mix_gan.configure(mix_gan.sweep.parse(p, "mix_gan.py", [
        "--smoke", "--arms", arm, *map(str, more)]))
    return cfg


def mix_trainer(*args):
    cfg = mix_config(*args)
    return mix_gan.make_trainer(cfg, neighbours.prepare(cfg)[0])


@pytest.mark.parametrize("dataset", ["ring", "geometry"])
@pytest.mark.parametrize("arm", ["mix", "pooled", "frozen"])
def test_a_mixture_of_one_is_vanilla(dataset, arm):
    """The same first weights, batches and latents give the same networks after some updates."""
    t, plain = (mix_trainer(a, dataset, "--components", 1) for a in (arm, "vanilla"))
    for one in (t, plain):
        one.prior = lambda t, n: torch.cat([torch.zeros(n, 1), torch.randn(
            n, 4, generator=t.gen)], 1)[:, -t.cfg.z_dim:]
    for _ in range(4):
        t.update(), plain.update()
    for several, one in ((t.G, plain.G), (t.D, plain.D)):
        torch.testing.assert_close(flat(several.nets[0]), flat(one), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(t.preview(9), plain.preview(9), rtol=1e-4, atol=1)
    assert t.G.weights().tolist() == [1]


def softmax_gradient(q, losses, entropy):
    """By hand: of sum q l and of the mean of -ln q, scaled by the spread, in the logits of q."""
    return q * (losses - q @ losses) + entropy * (losses.max() - losses.min()) * (q - 1 / len(q))


@pytest.mark.parametrize("entropy", [0, 0.7])
def test_gradient_of_the_weights_is_the_payoffs(entropy):
    t = mix_trainer("mix", "ring", "--mix-entropy", entropy)
    with torch.no_grad():
        t.G.logits.copy_(torch.tensor([0.3, -0.5, 0.1]))
        t.D.logits.copy_(torch.tensor([-0.2, 0.4, 0.6]))
    w, v, z = t.G.weights().detach(), t.D.weights().detach(), t.latent(9)
    t.cfg.batch, t.prior = 9, lambda t, n: z
    fakes = [net(part) for net, part in zip(t.G.nets, z[:, 1:].split(3))]
    matrix = torch.stack([torch.stack([F.softplus(-D(x)).mean() for D in t.D.nets])
                          for x in fakes]).detach()
    loss, logs = mix_gan.g_loss(t)
    grad, = torch.autograd.grad(loss, t.G.logits)
    torch.testing.assert_close(grad, softmax_gradient(w, matrix @ v, entropy), rtol=1e-4, atol=1e-7)
    assert logs["entropy_w"].item() == pytest.approx(-(w * w.log()).sum().item(), rel=1e-5)
    payoff = w @ matrix @ v
    spread = (matrix @ v).max() - (matrix @ v).min()
    assert loss.item() == pytest.approx(
        (payoff - entropy * spread * (w + 1e-6).log().mean()).item(), rel=1e-5)

    x_real, x_fake = t.data[:9], torch.cat(fakes).detach()
    losses = torch.stack([F.softplus(-D(x_real)).mean() + w @ torch.stack([
        F.softplus(D(x)).mean() for x in x_fake.split(3)]) for D in t.D.nets]).detach()
    loss, logs = mix_gan.mix(t, x_real, x_fake)
    grad, no_grad = torch.autograd.grad(loss, [t.D.logits, t.G.logits], allow_unused=True)
    torch.testing.assert_close(grad, softmax_gradient(v, losses, entropy), rtol=1e-4, atol=1e-7)
    assert no_grad is None                                      # w is constant to D


def test_each_critic_has_a_penalty_of_its_own(monkeypatch):
    """Never one penalty of the sum of all critics' outputs."""
    t, seen = mix_trainer("mix"), []
    own = core.gradient_penalty
    monkeypatch.setattr(core, "gradient_penalty", lambda D, *args: (
        seen.append(D), own(D, *args))[1])
    t.d_update()
    assert all(a is b for a, b in zip(seen, t.D.nets)) and len(seen) == 3


def test_pooled_networks_never_meet():
    """Each of T pooled GANs has a full batch of its own, and no gradient from another."""
    t = mix_trainer("pooled", "ring")
    assert t.cfg.batch == 24 and not t.G.logits.requires_grad
    loss, _ = mix_gan.g_loss(t)
    D = t.D.nets[0]
    grads = torch.autograd.grad(loss, [*t.G.nets[0].parameters()], retain_graph=True)
    nn.init.zeros_(t.D.nets[1][0].weight), nn.init.zeros_(t.D.nets[2][0].weight)
    z = t.latents(24)
    t.prior = lambda t, n: z
    alone = torch.autograd.grad(F.softplus(-D(t.G.nets[0](z[:8, 1:]))).mean(), [
        *t.G.nets[0].parameters()])
    again = torch.autograd.grad(mix_gan.g_loss(t)[0], [*t.G.nets[0].parameters()])
    torch.testing.assert_close(alone, again)
    assert len(grads) == len(alone)


@pytest.mark.parametrize("dataset", neighbours.DATA)
@pytest.mark.parametrize("preset", ["cpu", "paper"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_wide_has_as_many_weights_as_the_mixture(dataset, preset, n):
    mixed, wide = (mix_config(arm, dataset, "--preset", preset, "--components", n)
                   for arm in ("mix", "wide"))
    with torch.device("meta"):
        sizes = [sum(p.numel() for net in mix_gan.networks(cfg) for p in net.parameters())
                 for cfg in (mixed, wide)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("arm, shape", [("mix", (3, 3)), ("pooled", (3, 3)), ("many-g", (3, 1)),
                                        ("many-d", (1, 3)), ("frozen", (3, 3))])
def test_weights_learn_at_their_own_rate_or_not_at_all(arm, shape):
    t = mix_trainer(arm, "ring", "--lr-w", 0.125)
    assert (len(t.G.nets), len(t.D.nets)) == shape
    before = flat(t.G), flat(t.D)
    t.update()
    moved = [(flat(net) - b).abs() for net, b in zip((t.G, t.D), before)]
    for net, far, n in zip((t.G, t.D), moved, shape):
        assert all(p.max() > 0 for p in far[len(net.logits):].split(200))
        expected = 0.125 if n > 1 and arm not in ("frozen", "pooled") else 0
        assert far[:n].max().item() == pytest.approx(expected, rel=1e-2, abs=1e-8)


def test_whatever_is_drawn_comes_from_the_mixture():
    """z's first entry picks a component by its weight, and the picked one alone makes the point."""
    t = mix_trainer("mix", "ring")
    with torch.no_grad():
        t.G.logits.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    z = t.latents(20_000)
    which = t.G.pick(z)
    torch.testing.assert_close(which.bincount() / len(z), t.G.weights(), rtol=0, atol=0.01)
    x = torch.cat(list(t.fakes(20_000)[""]))
    for i, net in enumerate(t.G.nets):
        torch.testing.assert_close(x[which == i], net(z[which == i, 1:]))
    assert abs(np.corrcoef(which, z[:, 1])[0, 1]) < 0.03        # what a component sees is no clue
    batch = t.fake()                                            # in training all have equal parts
    assert len(batch) == t.cfg.batch and t.G.training


def test_overlap_against_closed_forms():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    q = torch.tensor([0.0, 0.2, 0.2, 0.6])
    gen = core.generator(0)
    a, b, c = (torch.multinomial(law, 20_000, True, generator=gen) for law in (p, q, p))
    cosine = (p @ q / (p.norm() * q.norm())).item()
    assert mix_gan.overlap([a, b]) == pytest.approx(cosine, abs=0.02)
    assert mix_gan.overlap([a, c]) == pytest.approx(1, abs=0.02)
    assert mix_gan.overlap([a, b, c]) == pytest.approx((1 + 2 * cosine) / 3, abs=0.02)
    assert mix_gan.overlap([a, b + 9]) == 0 and mix_gan.overlap([a]) is None
    assert mix_gan.overlap([torch.arange(5), torch.arange(5)]) is None      # no pair coincides
    wide = [torch.randint(9_576, (3_000,), generator=gen) for _ in range(2)]
    assert mix_gan.overlap(wide) == pytest.approx(1, abs=0.15)  # though most kinds are seen once
    rows = [geometry.pack(geometry.draw(5, 2, 16, 4)).repeat(2, 1), torch.empty(0, 32).byte()]
    assert mix_gan.overlap(rows) is None                        # one has no correct image


@pytest.mark.parametrize("arm, calls", [("vanilla", 24), ("mix", 72), ("many-d", 72),
                                        ("pooled", 72), ("many-g", 24)])
def test_calls_of_d_are_counted(arm, calls):
    """Of points, batch 8: 8 reals and 8 fakes in D's update, 8 fakes in G's, by each D."""
    row = mix_gan.cost(mix_trainer(arm, "ring"), 2)
    assert row["d_calls"] == 4 * calls and row["seconds"] > 0


@pytest.mark.parametrize("dataset, arm", [("ring", "mix"), ("geometry", "mix"),
                                          ("geometry", "pooled")])
def test_mixture_stops_and_resumes_bit_for_bit(tmp_path, dataset, arm):
    def fit_mixture(folder, stop=None):
        t = mix_trainer(arm, dataset, "--steps", 6)
        of_d = t.d_loss

        def d_loss(t, x_real, x_fake):
            t.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM)
            return of_d(t, x_real, x_fake)

        t.d_loss = d_loss
        harness.fit(t, folder)
        return t

    whole = fit_mixture(tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit_mixture(tmp_path / "cut", stop=3)
    fit_mixture(tmp_path / "cut")
    check_same(tmp_path / "whole" / "ckpt.pt", tmp_path / "cut" / "ckpt.pt")
    assert (whole.G.logits.abs().max() > 0) == (arm == "mix")


def test_mix_smoke_and_samples(tmp_path, capsys):
    """All arms of rectangles to the figure; a picture of the mixture from a checkpoint."""
    arms = list(mix_gan.ARMS)
    result = mix_gan.main(["--dataset", "geometry", "--smoke", "--outdir", str(tmp_path)])
    folder = tmp_path / "mix_gan" / "geometry-smoke"
    assert [r["arm"] for r in result["rows"]] == arms
    for r in result["rows"]:
        assert {"correct", "correct_exact", "distinct", "unseen_share", "coverage_exact", "parts",
                "overlap", "n_weights", "seconds", "d_calls", "curve"} <= r.keys()
        assert len(r["parts"]) == (3 if r["arm"] in ("mix", "pooled", "many-g", "frozen") else 1)
        assert all(sum(r[k]) == pytest.approx(1) for k in "wv" if k in r)
        assert len(r["curve"]) == 2 and bool(r["entropy"]) == (r["arm"] in (
            "mix", "many-g", "many-d", "frozen"))
    assert all("against vanilla, wide, pooled" in c["verdict"] for c in result["claims"])
    (folder / "figure.png").unlink()
    mix_gan.main(["--plot", str(folder)])
    assert Image.open(folder / "figure.png").width > 1000
    out, ckpt = tmp_path / "grid.png", folder / "mix-s0" / "ckpt.pt"
    mix_gan.main(["--sample", str(ckpt), "--n", "9", "--out", str(out)])
    state = harness.read_checkpoint(ckpt)
    cfg = argparse.Namespace(**state["config"])
    t = mix_gan.make_trainer(cfg, neighbours.prepare(cfg)[0])
    t.load(state)
    harness.save_grid(torch.cat(list(t.fakes(9)[""])), tmp_path / "same.png")
    assert out.read_bytes() == (tmp_path / "same.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["ring", "grid", "cifar10"])
def test_mix_smoke_on_other_data(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr(data, "load", lambda *args, **kw: uint8_images(64, size=32))
    monkeypatch.setattr(fid, "load_inception", lambda *args, **kw: fid.Pixels())
    result = mix_gan.main(["--dataset", dataset, "--smoke", "--seeds", "0", "1", "--outdir",
                           str(tmp_path), "--arms", *mix_gan.ARMS, "--data-dir", str(tmp_path)])
    assert len(result["rows"]) == 14 and all(c["verdict"] for c in result["claims"])
    assert (tmp_path / "mix_gan" / f"{dataset}-smoke" / "figure.png").exists()


def test_distances_between_two_samples(tmp_path):
    """W1 by another route in one dimension; the command to its figure."""
    result = mix_gan.main(["--part", "distance", "--smoke", "--seeds", "0", "1", "--outdir",
                           str(tmp_path)])
    assert {r["what"] for r in result["rows"]} == {mix_gan.W1, *mix_gan.GAPS}
    assert all(len(r["m"]) == len(r["y"]) for r in result["rows"])
    assert {r["line"] for r in result["rows"]} == {"d = 64", "p = 133", "p = 265"}
    assert result["claims"][0]["verdict"] == "holds"
    assert (tmp_path / "mix_gan" / "distance-smoke" / "figure.png").exists()
    cfg = argparse.Namespace(seed=0, w1_d=[1], w1_m=[200], hidden=[], gap_m=[])
    row, = mix_gan.distances(cfg, tmp_path / "line")
    torch.manual_seed(0)
    x, y = torch.randn(200), torch.randn(200)
    assert row["y"][0] == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-4)


@pytest.mark.slow
def test_a_sample_of_a_gaussian_is_far_and_a_trained_critic_does_not_see_it(tmp_path):
    """d = 64, m = 1,000: W1 is 1.115; a D with few weights hardly tells large samples apart."""
    cfg = argparse.Namespace(seed=1, w1_d=[64], w1_m=[1000], hidden=[2, 16], updates=300,
                             gap_m=[64, 4096])
    rows = {(r["what"], r["line"]): r["y"] for r in mix_gan.distances(cfg, tmp_path)}
    assert rows[mix_gan.W1, "d = 64"][0] == pytest.approx(1.115, abs=0.01)
    few, many = (rows[mix_gan.GAPS[0], f"p = {p}"] for p in (133, 1_057))
    assert many[0] > few[0] > 0.4 > 0.2 > few[1]
    assert all(abs(v) < 0.03 for (what, _), y in rows.items() if what == mix_gan.GAPS[1] for v in y)


def test_claims_of_distances_by_hand():
    def row(what, line, y, seed):
        return {"what": what, "line": line, "seed": seed, "m": [10, 100, 1000, 10_000], "y": y}

    rows = [row(what, line, y, seed) for seed in (0, 1) for what, line, y in (
        (mix_gan.W1, "d = 64", [2, 1.5, 1.3, 1.2 + seed / 50]),
        (mix_gan.W1, "d = 9", [2, 1.5, 1.3, 1]),
        (mix_gan.GAPS[0], "p = 99", [1, 0.1, 0.1 / 10 ** 0.5, 0.01]),
        (mix_gan.GAPS[0], "p = 999", [1, 1, 0.1, 0.01]),
        (mix_gan.GAPS[0], "p = 9999", [1, 0.9, 0.9, 0.9]))]
    far, near, falls, steep = mix_gan.claims(rows)                  # p = 9999: m never exceeds it
    assert far["verdict"] == "holds" and far["ours"] == "1.21 (1.2 to 1.22)"
    assert near["verdict"] == "no"
    assert falls["ours"] == "-0.5" and falls["verdict"] == steep["verdict"] == ""


@pytest.mark.parametrize("args, message", [
    (["--dataset", "geometry", "--size", "8", "--base", "2"], "at least 16"),
    (["--dataset", "ring", "--components", "0"], "--components is 0"),
    (["--dataset", "ring", "--n-train", "1", "--batch", "9"], "only 8 training images")])
def test_mistakes_in_mix_gan(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        mix_gan.main(["--smoke", "--outdir", str(tmp_path), *args])


# ----------------------------------------------------------------------------- BourGAN


def bourgan_config(arm, dataset="ring", *more):
    """The configuration that the command gives a run."""
    p = sweep.parser("", neighbours.PRESETS["ring"], bourgan.OWN, bourgan.ARMS)
    p.set_defaults(part="gan", dataset=dataset, data_dir=Path("."))
    return bourgan.configure(sweep.parse(p, "", ["--smoke", "--arms", arm, *map(str, more)]))[0]


def bourgan_trainer(*args):
    cfg = bourgan_config(*args)
    return bourgan.make_trainer(cfg, neighbours.training(cfg))


def metric_space(kind, n):
    """Distances (n, n) of points of some metrics, also of such as no Euclidean space has."""
    at, r = torch.arange(n)[:, None], torch.logspace(-3, 3, n, dtype=torch.float64)
    gap = (at - at.T).abs()
    return {"equal": (gap > 0).double(), "cycle": torch.minimum(gap, n - gap).double(),
            "star": (r[:, None] + r).fill_diagonal_(0), "l1": torch.cdist(
                randn(n, 3), randn(n, 3), p=1).fill_diagonal_(0)}[kind]


@pytest.mark.parametrize("kind", ["equal", "cycle", "star", "l1"])
@pytest.mark.parametrize("n", [2, 17, 200])
def test_distortion_is_below_the_bound(kind, n):
    """No coordinate stretches a distance; over all pairs the distortion is below log2 n + 1, where
    the proof (Matousek 2002, theorem 15.7.1) allows 20 times that."""
    d, repeats = metric_space(kind, n), 8 * math.ceil(math.log(n))
    e = bourgan.bourgain(d, repeats, core.generator(0))
    assert e.shape == (n, repeats * math.ceil(math.log2(n)))
    assert ((e[:, None] - e).abs().amax(2) <= d + 1e-9).all()
    ratio = (bourgan.log_pairs(bourgan.apart(e)) - bourgan.log_pairs(d)).exp()
    assert ratio.max() / ratio.min() < math.log2(n) + 1


def test_embedding_by_hand():
    """A coordinate is the distance to a set, never to none nor to all, of binomial size."""
    d, k = metric_space("star", 9), np.arange(1, 9)
    columns = bourgan.bourgain(d, 200, core.generator(1)).T
    assert all(torch.equal(column, d[:, column == 0].amin(1)) for column in columns)
    sizes = (columns == 0).sum(1).view(4, 200).double()
    means = [np.average(k, weights=stats.binom(9, 0.5 ** j).pmf(k)) for j in range(1, 5)]
    assert sizes.max() < 9 and sizes.mean(1).tolist() == pytest.approx(means, abs=0.25)


@pytest.mark.parametrize("law", ["gaussian", "centres", "bourgain", "permuted", "points"])
def test_laws_have_the_same_scale_and_no_duplicates(law):
    cfg, points = bourgan_config("bourgain", "ring", "--n-points", 30), randn(31, 2)
    x, d, e, _ = bourgan.embed(cfg, points.repeat(3, 1), law)
    assert len(torch.unique(x, dim=0)) == 30 and d.shape == (30, 30)
    assert d[*torch.triu_indices(30, 30, 1)].min() > 0 and e.isfinite().all()
    assert e.shape == (30, 2 if law == "points" else 25)
    if law != "gaussian":
        assert e.mean(0).abs().max() < 1e-9 and e.square().mean().item() == pytest.approx(1)
    if law == "permuted":
        plain = bourgan.embed(cfg, points, "bourgain")[2]
        torch.testing.assert_close(e.sort(0)[0], plain.sort(0)[0])
        assert not torch.equal(e, plain)
    with pytest.raises(UserError, match="only 29 different"):
        bourgan.embed(cfg, points[:29].repeat(2, 1), law)


def test_scale_is_the_minimiser():
    d, e = metric_space("star", 40), bourgan.apart(randn(40, 5))
    logs, pairs = (bourgan.log_pairs(d), bourgan.log_pairs(e)), np.triu_indices(40, 1)
    best = minimize_scalar(lambda s: (logs[0] - logs[1] - s).square().mean().item())
    assert bourgan.log_scale(*logs, "ours").item() == pytest.approx(best.x, abs=1e-6)
    assert bourgan.log_scale(*logs, "code").exp().item() == pytest.approx(
        (d[pairs] / e[pairs]).sqrt().max().item())


def test_corners_and_what_the_term_takes():
    """Against all pairs by hand; what the term takes moves with the squares."""
    at = geometry.place(40, 2, 16, 4, 1, core.generator(0)).double()
    by_hand = [[min((a - b).norm(), (a - b.flip(0)).norm()) for b in at] for a in at]
    assert bourgan.corners(geometry.render(at, 16, 4)).tolist() == pytest.approx(np.array(by_hand))
    moved = geometry.render(torch.tensor([[[1, 1], [9, 9 + i]] for i in range(4)]), 16, 4)
    far = bourgan.apart(bourgan.marginals(core.to_float(moved)))[0]
    assert (far.diff() > 0.5 * far[1]).all()


def test_gradient_of_the_distance_term_and_collapsed_pairs():
    """By finite differences, in both batches; a pair of equal images or latents is no NaN."""
    y, y2, z, z2 = (randn(4, 3, seed=i).requires_grad_() for i in range(4))
    assert torch.autograd.gradcheck(lambda *a: bourgan.distance_term(*a, 0.3), (y, y2, z, z2))
    u, v = (v.detach().norm(dim=1).log() for v in (y - y2, z - z2))
    term = bourgan.distance_term(y, y2, z, z2, 0.3).item()
    assert term == pytest.approx((u - v - 0.3).square().mean().item())
    for a, b in ((y, z2), (y2, z), (y, z)):
        loss = bourgan.distance_term(y, a, z, b, 0.3)
        grads = torch.autograd.grad(loss, (y, y2, z, z2), allow_unused=True)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads if g is not None)


@pytest.mark.parametrize("dataset", ["ring", "geometry"])
def test_term_reaches_g_through_both_batches_and_d_sees_one(dataset):
    t = bourgan_trainer("bourgain+d", dataset, "--beta", 0.5)
    z, seen = [t.latent(8), t.latent(8)], []
    left, (y, y2) = iter(z), map(t.G, z)
    t.prior = lambda t, n: next(left)
    t.D.register_forward_hook(lambda net, args, out: seen.append(args[0]))
    loss, _ = bourgan.g_loss(t)
    assert len(seen) == 1 and torch.equal(seen[0], y)
    of, prior = bourgan.METRICS[t.cfg.metric][1], t.G[0]
    term = bourgan.distance_term(of(y), of(y2), *map(prior, z), prior.log_scale)
    torch.testing.assert_close(loss, core.LOSSES[t.cfg.loss][2](t.D(y)).mean() + 0.5 * term)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(term, (y, y2)))


def test_a_draw_from_a_checkpoint_is_the_mixture(tmp_path):
    """Never N(0, I): latents of a loaded G are the embedded points, each as often, and noise."""
    harness.fit(bourgan_trainer("bourgain", "ring", "--sigma", 0.02), tmp_path)
    state = harness.read_checkpoint(tmp_path / "ckpt.pt")
    cfg = argparse.Namespace(**state["config"])
    (G := bourgan.networks(cfg)[0]).load_state_dict(state["G"])
    e = bourgan.embed(cfg, neighbours.draw_points(64, "ring"), "bourgain")[2].float()
    u = G[0](randn(9_999, cfg.z_dim).float())
    index = torch.cdist(u, e).argmin(1)
    assert stats.chisquare(index.bincount(minlength=32)).pvalue > 1e-3
    assert (u - e[index]).std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(G[0](torch.tensor([[-40.0], [40]]) * torch.eye(26)[:1]), e[[0, -1]])


@pytest.mark.parametrize("dataset", ["ring", "geometry"])
def test_bourgan_stops_and_resumes_bit_for_bit(tmp_path, dataset):
    def fit_bourgan(folder, stop=None):
        t = bourgan_trainer("bourgain+d", dataset, "--steps", 6)
        of_d = t.d_loss
        t.d_loss = lambda t, *x: (t.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM),
                                  of_d(t, *x))[1]
        harness.fit(t, folder)
    fit_bourgan(tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit_bourgan(tmp_path / "cut", 3)
    fit_bourgan(tmp_path / "cut")
    check_same(tmp_path / "whole" / "ckpt.pt", tmp_path / "cut" / "ckpt.pt")
    assert harness.read_checkpoint(tmp_path / "cut" / "ckpt.pt")["G"]["0.e"].std() > 0.5


def test_learned_by_heart_against_known_samples():
    """Training points are, fresh ones are not; the W1 of fresh ones is about the floor."""
    train, held, fresh = (neighbours.draw_points(40, "grid", seed) for seed in (0, 1, 2))
    known, new, shrunk = (bourgan.beside_held(x, train, held) for x in (train, fresh, fresh / 2))
    assert known["near"] == 0 and new["near"] == pytest.approx(1, abs=0.15)
    assert new["w1"] < 3 * new["w1_floor"] < 0.05 < shrunk["w1"]


@pytest.mark.slow
def test_metrics_that_survive_and_that_do_not(tmp_path):
    """Log distances of the grid and of corners survive the embedding; those of pixels do not."""
    rows, common = {}, ["--part", "metric", "--preset", "cpu", "--n-points", "300"]
    for name in ("grid l2", "geometry corners", "geometry l2"):
        dataset, metric = name.split()
        result = bourgan.main([*common, "--dataset", dataset, "--metric", metric, "--outdir",
                               str(tmp_path), "--name", name])
        rows |= {(name, r["arm"] == "centres"): r for r in result["rows"]}
    grid, corners, pixels = (rows[k, False] for k in ("grid l2", "geometry corners", "geometry l2"))
    assert grid["correlation"] > 0.93 and corners["correlation"] > 0.75
    assert pixels["correlation"] < 0.3
    assert pixels["variance"] > rows["geometry l2", True]["variance"]
    assert grid["w1_floor"] < grid["w1"] < 0.6 * rows["grid l2", True]["w1"]
    assert 0.7 < corners["of_term"] < 1 and pixels["of_term"] == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", neighbours.DATA)
def test_bourgan_smoke_and_samples(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr(data, "load", lambda *args, **kw: uint8_images(64, size=32))
    monkeypatch.setattr(fid, "load_inception", lambda *args, **kw: fid.Pixels())
    seeds = "01"[:1 + (dataset != "cifar10")]
    common = ["--dataset", dataset, "--smoke", "--outdir", str(tmp_path), "--seeds", *seeds]
    result, folder = bourgan.main(common), tmp_path / "bourgan" / f"{dataset}-smoke"
    assert len(result["rows"]) == 8 * len(seeds) and all(c["verdict"] for c in result["claims"])
    assert all(np.isfinite([r[k] for k in ("near", "w1", "w1_floor")]).all() and r["scale"] > 0
               for r in result["rows"])
    assert Image.open(folder / "figure.png").width > 1000
    assert bourgan.main([*common, "--part", "metric"])["claims"]


def test_claims_of_bourgan_by_hand():
    ends = {"gaussian": (17, 16), "centres": (25, 25), "bourgain": (18, 25), "bourgain+d": (9, 9)}
    rows = [{"dataset": "grid", "embedded": "l2", "sigma": 0.01, "m": 100, "arm": arm, "seed": seed,
             "modes": v, "within_3": v / 25, "near": 1 - 0.7 * (arm == "bourgain"), "w1": 0.1,
             "n_eff": 150 if arm == "bourgain" else None, "w1_floor": 0.01}
            for arm, both in ends.items() for seed, v in enumerate(both)]
    found = {c["what"].split(": ")[1]: c["verdict"] for c in bourgan.claims(rows)}
    assert found["modes of bourgain, centres"] == "no"
    assert found["points within 3 sigma of bourgain, gaussian"] == "holds"
    assert found["effective number of samples, of bourgain"] == "holds for bourgain"
    assert "no for gaussian, centres, bourgain+d; holds for bourgain" in found.values()


@pytest.mark.parametrize("args, message", [
    ("--z-dim 9", "follows from"), ("--metric corners", "--metric of grid"),
    ("--n-points 1", "at least 2"), ("--dataset cifar10 --split all", "held out"),
    ("--dataset geometry --n-points 9000", "failed")])
def test_mistakes_in_bourgan(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        bourgan.main(["--smoke", "--arms", "bourgain", "--outdir", str(tmp_path), *args.split()])


# ------------------------------------------------------------------- laws of latents and pairs


def latent_config(arm, dataset="halves", *more):
    """The configuration that the command gives a run."""
    p = sweep.parser("", latent.PRESETS["free"], latent.OWN, latent.ARMS)
    p.set_defaults(dataset=dataset, data_dir=Path("."))
    return latent.configure(sweep.parse(p, "", ["--smoke", "--arms", arm, *map(str, more)]))[0]


def latent_trainer(folder, *args):
    cfg = latent_config(*args)
    return latent.make_trainer(cfg, neighbours.training(cfg), folder)[0]


@pytest.mark.parametrize("n, size, seed", [(2, 1, 0), (5, 2, 1), (12, 3, 2)])
def test_transport_against_an_exact_linear_programme(n, size, seed):
    """Cells have the masses that they shall have, and nearly every point lies in the cell that the
    best plan of all sends it to, whose cost is no better than that of the cells."""
    y, s = 0.3 * randn(n, size, seed=seed).float(), 1_500
    mass = torch.rand(n, generator=core.generator(seed)) + 0.2
    mass /= mass.sum()
    h, _ = latent.transport(y, mass, 400, core.generator(seed))
    u = torch.rand(s, size, generator=core.generator(9)) - 0.5
    cell, gain = latent.cells(u, y, h)[:, 0], (u @ y.T).double().numpy()
    rows, columns = (csr_array(np.kron(*pair)) for pair in (
        (np.eye(s), np.ones(n)), (np.ones(s), np.eye(n))))
    plan = linprog(-gain.ravel(), A_eq=sparse_stack([rows, columns]), b_eq=np.r_[
        np.full(s, 1 / s), mass.double() / mass.double().sum()]).x.reshape(s, n)
    assert plan.sum(0) == pytest.approx(mass.numpy(), abs=1e-6)
    shares = cell.bincount(minlength=n) / s
    assert shares.tolist() == pytest.approx(mass.tolist(), abs=4 * (0.25 / s) ** 0.5)
    assert (plan.argmax(1) == cell.numpy()).mean() > 0.93
    ours = gain[np.arange(s), cell].mean()
    assert ours == pytest.approx((plan * gain).sum(), abs=0.03 * gain.std() + 1e-3)


@pytest.mark.slow
def test_transport_to_as_many_codes_as_the_rectangles_have():
    """1,645 codes of 1,800 images: no cell is empty, total variation within twice the floor, under
    a minute; each code is drawn as often as its multiplicity says."""
    mass = torch.ones(1_645)
    mass[:155] = 2
    mass, start = mass / mass.sum(), time.process_time()
    h, took = latent.transport(randn(1_645, 8).float() / 8, mass, 200, core.generator(0))
    assert time.process_time() - start < 60 and took["empty"] == 0
    assert 0.5 * took["tv_floor"] < took["tv"] < 2 * took["tv_floor"]
    u = torch.rand(200_000, 8, generator=core.generator(1)) - 0.5
    share = (latent.cells(u, randn(1_645, 8).float() / 8, h) < 155).float().mean().item()
    assert share == pytest.approx(310 / 1_800, rel=0.05)


def test_mixtures_and_laws_of_codes_by_hand():
    y = torch.tensor([[0.0, 0], [1, 0], [0, 1], [-3, 0]])
    i, j = torch.tensor([[0, 1], [0, 2], [1, 3], [3, 1]]).T
    every = latent.mixtures(i, j, y, 1.0)
    assert every.tolist() == [[0.25, 0], [0, 0.25], [0, 0], [-2, 0]]
    assert latent.mixtures(i, j, y, 0.5).tolist() == every[:2].tolist()    # of 45 degrees
    y = randn(30, 3).float()
    cfg, mass = argparse.Namespace(seed=0, quantile=1.0, ot_steps=50), torch.arange(30.0) / 435
    z, _ = latent.draw_law(cfg, "encoded", y, mass, 20_000)
    counts = torch.cdist(z, y).argmin(1).bincount(minlength=30)
    assert stats.chisquare(counts[1:], 20_000 * mass[1:].double()).pvalue > 1e-3
    assert counts[0] == 0 and (torch.cdist(z, y).amin(1) < 2e-3).all()
    near = torch.cdist(y, y).argsort(1)[:, 1:11]
    allowed = (0.75 * y[:, None] + 0.25 * y[near]).flatten(0, 1)
    for law, inside in (("knn", True), ("ot", False)):      # a cell may touch one further away
        z, took = latent.draw_law(cfg, law, y, mass, 2_000)
        assert z.shape == (2_000, 3) and (torch.cdist(z, allowed).amin(1).max() < 2e-3) == inside
        assert ("tv" in took) != inside
    z, _ = latent.draw_law(cfg, "gmm", y, torch.ones(30) / 30, 20_000)
    torch.testing.assert_close(torch.cov(z.T), torch.cov(y.T, correction=0), atol=0.06, rtol=0.06)
    z = latent.Uniform()(randn(20_000, 2).float())
    assert stats.kstest(z.flatten(), stats.uniform(-3 ** 0.5, 2 * 3 ** 0.5).cdf).pvalue > 1e-3


def test_an_autoencoder_learns_and_its_codes_are_scaled():
    cfg = latent_config("ot-encoded", "apart", "--ae-steps", 150, "--width", 16)
    x = neighbours.training(cfg)
    y, error = latent.autoencode(cfg, x, 4, torch.device("cpu"))
    assert y.shape == (52, 4) and y.mean(0).abs().max() < 1e-5
    assert y.std(0, correction=0).tolist() == pytest.approx([1] * 4, abs=1e-4)
    assert error < 0.6 * core.to_float(x).var()     # of a constant image: 0.9 and more


def test_pairs_by_hand(tmp_path, monkeypatch):
    """A batch of codes and of their own images, weighed less and less; rematched: of others."""
    none, paired, mixed = (latent_trainer(tmp_path / pairs, f"gaussian-{pairs}", "apart", "--batch",
                                          32, "--n-codes", 32, "--pair-weight", 5)
                           for pairs in ("none", "random", "rematched"))
    monkeypatch.setattr(core, "g_loss", lambda t: (torch.zeros(()), {}))
    assert latent.g_loss(none) == (torch.zeros(()), {})
    wanted = (paired.G[1](paired.codes) - core.to_float(paired.paired)).square().mean().item()
    for step, left in ((0, 5), (1, 2.5), (2, 0), (3, 0)):
        paired.step = step
        loss, logs = latent.g_loss(paired)
        assert logs["pairs"].item() == pytest.approx(wanted, rel=1e-4)
        assert loss.item() == pytest.approx(left * wanted, rel=1e-4)
    grads = torch.autograd.grad(logs["pairs"], [*paired.G.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[-2:])
    drawn = []
    monkeypatch.setattr(core, "draw_index", lambda n, batch, *more: drawn.append(
        torch.randperm(n)[:batch]) or drawn[-1])
    loss = latent.g_loss(mixed)[1]["pairs"].item()
    i, j = drawn
    assert loss == pytest.approx((mixed.G[1](mixed.codes[j]) - mixed.images(
        i, mixed.paired)).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("arm", ["gaussian-random", "ot-encoded"])
def test_latent_resumes_bit_for_bit_and_prepares_once(tmp_path, monkeypatch, arm):
    def fit_latent(folder, stop=None):
        t = latent_trainer(folder, arm, "halves", "--steps", 6)
        of_d = t.d_loss
        t.d_loss = lambda t, *x: (t.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM),
                                  of_d(t, *x))[1]
        harness.fit(t, folder)
        return t
    fit_latent(tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit_latent(tmp_path / "cut", 3)
    monkeypatch.setattr(latent, "autoencode", None)
    t = fit_latent(tmp_path / "cut")
    check_same(tmp_path / "whole" / "ckpt.pt", tmp_path / "cut" / "ckpt.pt")
    if arm == "ot-encoded":     # whoever loads G draws from the law
        state = harness.read_checkpoint(tmp_path / "cut" / "ckpt.pt")
        (G := latent.networks(argparse.Namespace(**state["config"]))[0]).load_state_dict(state["G"])
        z = G[0](randn(500, t.cfg.z_dim).float())
        assert (torch.cdist(z, t.G[0].e).amin(1) < 1e-3).all() and z.std() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("dataset, arms", [
    ("apart", list(latent.MAIN)), ("free", ["uniform-none", "gmm-rematched"]),
    ("cifar10", ["ot-encoded", "knn-none"])])
def test_latent_smoke_and_samples(tmp_path, monkeypatch, dataset, arms):
    monkeypatch.setattr(data, "load", lambda *args, **kw: uint8_images(64, size=32))
    monkeypatch.setattr(fid, "load_inception", lambda *args, **kw: fid.Pixels())
    common = ["--dataset", dataset, "--smoke", "--outdir", str(tmp_path)]
    result = latent.main([*common, "--seeds", "0", "1", "--arms", *arms])
    folder = tmp_path / "latent" / f"{dataset}-smoke"
    assert len(result["rows"]) == 2 * len(arms) and result["claims"]
    assert all(("mse" in r) == (r["arm"].split("-")[0] in latent.OF_CODES or "gmm" in r["arm"]
                                ) for r in result["rows"])
    assert Image.open(folder / "figure.png").width > 1000
    latent.main(["--sample", str(folder / f"{arms[-1]}-s0" / "ckpt.pt"), "--n", "4", "--out",
                 str(tmp_path / "grid.png")])
    assert len(latent.main([*common, "--law", "gaussian", "--name", "law"])["rows"]) == 4


def test_claims_of_laws_by_hand():
    ends = {"gaussian-none": (0.2, 0.3), "gaussian-random": (0.1, 0.25), "encoded-none": (0.7, 0.8)}
    rows = [{"dataset": "free", "arm": arm, "seed": seed, "correct_exact": v, "tv": 0.1,
             "copies": v / 2, "curve": [[100, 0], [200, v / 2 + 0.2 * ("random" in arm)], [300, v]]}
            for arm, both in ends.items() for seed, v in enumerate(both)]
    found = {c["theirs"]: c["verdict"] for c in latent.claims(rows) if c["theirs"]}
    assert found == {"the law cures": "holds", "the pairs cure": "no",
                     "the law does more than pairs": "holds", "the pairs help speed": "holds",
                     "the pairs cost copies": "no"}
    assert latent.claims(rows)[-1]["ours"] == "never, never; never, never; 300, 300"
    rows[-1]["curve"][2][1] = 0.59
    assert latent.claims(rows)[-1]["ours"] == "never, never; never, never; 300, never"


@pytest.mark.parametrize("args, message", [
    ("--n-codes 1", "at least 2"), ("--quantile 1.5", "at most 1"),
    ("--dataset apart --batch 64", "only 52 training images"), ("--size 12", "power of two")])
def test_mistakes_in_latent(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        latent.main(["--smoke", "--outdir", str(tmp_path), *args.split()])


@pytest.mark.parametrize("k, n", [(3, 12), (12, 3), (4, 20), (60, 20)])
def test_moments_of_paired_least_squares(k, n):
    """Against pinv itself, and the mean shrinkage against their ratio at infinity."""
    z = torch.randn(4_000, k, n, generator=core.generator(0), dtype=torch.float64)
    m = torch.linalg.pinv(z) @ torch.linalg.pinv(z).mT
    trace, square = m.diagonal(dim1=1, dim2=2).sum(1), m.square().sum((1, 2))
    for draws, exact in zip((trace, trace ** 2, square), double_descent.moments(k, n)):
        error = draws.std().item() / len(draws) ** 0.5
        assert abs(draws.mean().item() - exact) < 4 * error and error < 0.2 * exact
    assert double_descent.moments(k, n)[0] == pytest.approx(double_descent.shrinkage(k, n))


def test_errors_and_roots_by_hand():
    """W2 of diagonal Gaussians in closed form; G of pairs is X pinv(Z); PCA is X X' / n cut off."""
    s, root = torch.tensor([4.0, 1, 0.25]).double(), torch.diag(torch.tensor([1.0, 3, 0]).double())
    trace, frobenius, w2 = (v.item() for v in double_descent.errors(root[None], s))
    assert trace == pytest.approx(10 / 5.25) and w2 == pytest.approx((1 + 4 + 0.25) / 5.25)
    assert frobenius == pytest.approx((3 ** 2 + 8 ** 2 + 0.25 ** 2) / (16 + 1 + 1 / 16))
    x, gen = randn(2, 9, 5), core.generator(3)
    for k in (3, 5, 8):
        root = double_descent.roots("pairs", x, k, gen.manual_seed(3))
        z = torch.randn(2, k, 5, generator=gen.manual_seed(3), dtype=x.dtype)
        g = x @ torch.linalg.pinv(z)
        torch.testing.assert_close(root @ root.mT, g @ g.mT)
        root = double_descent.roots("pca", x, k, gen)
        values = torch.linalg.eigvalsh(x @ x.mT / 5).flip(1)[:, :min(k, 5)]
        torch.testing.assert_close((root @ root.mT).diagonal(dim1=1, dim2=2).sum(1), values.sum(1))
    shrunk, rescaled = (double_descent.roots(method, x, 8, gen.manual_seed(3))
                        for method in ("shrunk", "rescaled"))
    torch.testing.assert_close(shrunk @ shrunk.mT, 2.5 * x @ x.mT / 5)
    pairs = double_descent.roots("pairs", x, 8, gen.manual_seed(3))
    torch.testing.assert_close(rescaled @ rescaled.mT * 2.5, pairs @ pairs.mT)


def test_semi_is_the_minimiser_of_both_terms():
    x = randn(2, 6, 4)
    g = double_descent.semi(x, 6, 2_000, core.generator(0))
    z = torch.randn(2, 6, 2, generator=core.generator(0), dtype=x.dtype)
    left = (x[..., :2] - g @ z).square().sum() / 2 + (g @ g.mT - x @ x.mT / 4).square().sum()
    assert left < 1e-3 * x.square().sum()       # six latents suffice for both


@pytest.mark.slow
def test_double_descent_finds_a_wrong_law(tmp_path, monkeypatch):
    args = ["--smoke", "--seeds", "0", "1", "--draws", "300", "--outdir", str(tmp_path)]
    result = double_descent.main(args)
    claims = {c["what"]: c["verdict"] for c in result["claims"]}
    assert claims["laws of the trace and of the Frobenius error"] == "holds"
    assert claims["squared W2 error of pairs at k = n/2, n, 5 n"] == "holds"
    assert claims["least squared W2 error of pairs for k > n, k < n"] == "holds"
    assert claims["linear G, more latents than data: least squared W2 error of rescaled, pca"
                  ] == "no"
    assert Image.open(tmp_path / "double_descent" / "smoke" / "figure.png").width > 1000
    law = double_descent.law
    monkeypatch.setattr(double_descent, "law", lambda *args: law(*args) and [
        1.2 * v for v in law(*args)])
    result = double_descent.main([*args, "--name", "wrong"])
    assert result["claims"][-1]["verdict"] == "no"
    with pytest.raises(UserError, match="below --d"):
        double_descent.main(["--smoke", "--n-known", "64", "--outdir", str(tmp_path)])


# ----------------------------------------------------------------------------- InfoGAN-CR


def info_trainer(arm, *more):
    """The trainer of a run of the command, with four codes, and noise of two."""
    p = sweep.parser("", neighbours.PRESETS["ring"], infogan_cr.OWN, infogan_cr.ARMS)
    p.set_defaults(dataset="halves", data_dir=Path("."))
    cfg, = infogan_cr.configure(sweep.parse(p, "", [
        "--smoke", "--z-dim", "6", "--arms", arm, *map(str, more)]))
    return infogan_cr.make_trainer(cfg, neighbours.training(cfg))


HALVES = neighbours.squares("halves")[1].flatten(1)     # of 13, 4, 13 and 4 values, all products


@pytest.mark.parametrize("name, score, luck, gap", [
    ("perfect", 1, 0, 1), ("permuted", 1, 0, 1), ("turned", 0.75, 0.04, 0.5),
    ("halved", 0.75, 0.05, 0.75), ("random", 0.25, 0.08, 0), ("dead", 0.25, 0.05, 0)])
def test_scores_of_synthetic_encoders(name, score, luck, gap):
    """By hand. Rows turned by 45 degrees: two codes say either row equally well. Halved: no code
    for a factor. Where a code votes for several factors alike, the largest number is lucky."""
    f, noise = HALVES.double(), randn(len(HALVES), 4)
    z = {"perfect": f, "permuted": 7 - 1e-3 * f[:, [2, 3, 1, 0]], "random": noise, "dead": 0 * f,
         "turned": torch.stack([f[:, 0] + f[:, 2], f[:, 1], f[:, 0] - f[:, 2], f[:, 3]], 1),
         "halved": torch.cat([f[:, :3], noise[:, 3:]], 1)}[name]
    row = infogan_cr.disentanglement(z, HALVES)
    assert score <= row["factor_vae"] <= score + luck
    assert row["mig"] == pytest.approx(gap, abs=0.01 if name in ("random", "halved") else 1e-9)


def test_votes_by_hand():
    """Groups (4, 2) of codes, two that move and one that never does: it has no vote."""
    z = torch.tensor([[[0, 0, 5], [0, 1, 5]], [[0, 0, 5], [10, 1, 5]], [[0, 2, 5], [300, 2, 5]],
                      [[9, 1, 5], [9, 3, 5]]]).float()
    fixed = torch.tensor([1, 0, 0, 1])      # the votes are for 0 0 1 0, in other units for 0 1 1 0
    assert infogan_cr.factor_vae(z, fixed, torch.tensor([100, 1, 0])) == 0.75
    assert infogan_cr.factor_vae(z, fixed, torch.tensor([1, 1, 0])) == 1


def test_mig_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    z, gaps = HALVES.double() @ randn(4, 5) + randn(len(HALVES), 5, seed=1), []
    binned = [np.digitize(c, np.histogram(c, 20)[1][1:-1]) for c in z.T.numpy()]
    for f in HALVES.T.numpy():
        *_, second, first = sorted(metrics.mutual_info_score(f, c) for c in binned)
        gaps.append((first - second) / metrics.mutual_info_score(f, f))
    assert infogan_cr.mig(z, HALVES) == pytest.approx(np.mean(gaps)) and 0.02 < np.mean(gaps) < 0.9


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.9])
def test_contrastive_pairs_by_hand(gap):
    """One code and the noise are shared, all other codes are the gap apart, all in the range."""
    z, shared = infogan_cr.pairs(info_trainer("infogan-cr"), 4000, gap)
    a, b = z.chunk(2)
    same, apart = a == b, (a - b).abs()[:, :4]
    assert same[:, 4:].all() and (same[:, :4].sum(1) == 1).all() and z.abs().max() <= 1
    assert torch.equal(same[:, :4].int().argmax(1), shared)
    assert stats.chisquare(shared.bincount()).pvalue > 1e-3
    moved = apart[~same[:, :4]]     # two uniform numbers are a third of the width apart
    assert moved.min() >= gap - 1e-6
    assert moved.mean().item() == pytest.approx(gap + (2 - gap) / 3, abs=0.02)
    assert a[same].std().item() == pytest.approx(3 ** -0.5, abs=0.02)


@pytest.mark.parametrize("of, net, flag", [
    ("info", "Q", "--info-weight"), ("contrast", "CR", "--cr-weight")])
def test_g_learns_by_the_weight_and_the_network_in_full(of, net, flag):
    def gradients(weight):
        t = info_trainer("infogan-cr", flag, weight, "--cr-from", 0)
        infogan_cr.g_loss(t)[1][of].backward()
        return [torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
                for part in ([t.G, t.extra[net]] if weight else [t.extra[net]] * 2)]
    (none, alone), (one, full), (three, same) = map(gradients, (0, 1, 3))
    assert min(one.abs().max(), full.abs().max()) > 0 and len(one) > len(full)
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(torch.stack([alone, same]), full.expand(2, -1))


def test_gan_is_cores_and_shuffled_labels_are_the_same_ones(monkeypatch):
    t, seen, labels = info_trainer("gan"), [], torch.arange(4).repeat(2)
    plain = core.Trainer(t.cfg, t.data, *core.build(t.cfg), prior=infogan_cr.uniform)
    for _ in range(3):
        t.update(), plain.update()
    torch.testing.assert_close(flat(t.G), flat(plain.G), rtol=0, atol=0)
    assert t.latent(2000).abs().max() <= 1
    t.extra["Q"][-1].requires_grad_(False).weight.zero_(), t.extra["Q"][-1].bias.zero_()
    info = [infogan_cr.g_loss(t)[1]["info"].item() for _ in range(100)]
    assert np.mean(info) == pytest.approx(4 / 3 / 2, abs=0.05)  # four codes of mean square 1/3
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda x, y: seen.append(y))
    monkeypatch.setattr(infogan_cr, "pairs", lambda t, n, gap: (torch.zeros(2 * n, 6), labels))
    infogan_cr.contrast(info_trainer("infogan-cr")), infogan_cr.contrast(info_trainer("shuffled"))
    assert torch.equal(seen[0], labels) and not torch.equal(seen[1], labels)
    assert torch.equal(seen[1].sort()[0], labels.sort()[0])


@pytest.mark.parametrize("arm, n", [("gan", 1), ("infogan", 1), ("infogan-cr", 2), ("twice", 2)])
def test_doubled_step_and_new_beginnings(arm, n):
    """Each Adam counts its updates; CR's begins anew when alpha changes and when the gap does."""
    more = ["--steps", 9, "--gap", 1.9, "--cr-from", 1 / 3, "--gap-until", 0.57]
    t, ages = info_trainer(arm, *more), []
    for _ in range(9):
        t.update()
        ages.append([next(iter(opt.state.values()))["step"].item() for opt in t.opts])
    assert [row[:3] for row in ages] == [[n * i, i, n * i] for i in range(1, 10)]
    assert [row[3:] for row in ages] == [[2], [4], [6]] * 3 or arm != "infogan-cr"
    early = info_trainer("early", *more).cfg
    assert [infogan_cr.schedule(early, i) for i in (0, 5, 6)] == [(2, 1.9), (2, 1.9), (2, 0)]
    assert [infogan_cr.schedule(t.cfg, i)[0] for i in (2, 3)] == [0, 2]


@pytest.mark.parametrize("cut", [4, 5])     # right before, and right after, CR begins anew
def test_infogan_stops_and_resumes_bit_for_bit(tmp_path, cut):
    def fit_info(folder, stop=None):
        t = info_trainer("infogan-cr", "--steps", 9, "--cr-from", 0.45)
        of_d = t.d_loss
        t.d_loss = lambda t, *x: (t.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM),
                                  of_d(t, *x))[1]
        harness.fit(t, folder)
    fit_info(tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit_info(tmp_path / "cut", cut + 1)
    fit_info(tmp_path / "cut")
    check_same(tmp_path / "whole" / "ckpt.pt", tmp_path / "cut" / "ckpt.pt")


def test_model_centrality_by_hand(monkeypatch):
    """Generators whose images are their latents; encoders that read them in two orders, that turn
    them, and that do not look."""
    s = torch.tensor([[9, 0.5, 0.7], [0.3, 9, 0.2], [0.9, 0.4, 9]])
    torch.testing.assert_close(infogan_cr.centrality(s), torch.tensor([0.6, 0.35, 0.55]))
    reads = [torch.eye(4), torch.eye(4)[[1, 0, 3, 2]], torch.linalg.qr(randn(4, 4))[0].float(),
             torch.zeros(4, 4)]
    monkeypatch.setattr(infogan_cr, "encode", lambda read, x: x[:, :4] @ read)
    monkeypatch.setattr(core, "generate", lambda scale, z, batch: [scale * z])
    cfg = info_trainer("infogan", "--groups", 200).cfg
    s = infogan_cr.agreement(list(zip([1, 2, 3, 0], reads)), cfg, "cpu")
    assert (s[:2, :3] == 1).all() and (s[2] < 0.9).all() and (s[3] < 0.4).all()
    assert (s[:, 3] < 0.4).all()


def test_misplaced_by_hand():
    """A valid pair, one that overlaps, one that touches, a lone square, a dark image."""
    at = torch.tensor([[[0, 0], [8, 8]], [[0, 0], [2, 2]], [[8, 12], [12, 12]], [[3, 3], [3, 3]]])
    x = torch.cat([geometry.render(at, 16, 4), torch.zeros(1, 1, 16, 16, dtype=torch.uint8)])
    images = neighbours.squares("free")[0]
    assert infogan_cr.misplaced(x, images, 4) == pytest.approx(2 / 3)
    assert infogan_cr.misplaced(x[3:], images, 4) is None


@pytest.mark.slow
@pytest.mark.parametrize("dataset, seeds", [("halves", 2), ("free", 1)])
def test_infogan_smoke_and_samples(tmp_path, monkeypatch, dataset, seeds):
    seen, result = [], infogan_cr.main(["--dataset", dataset, "--smoke", "--outdir", str(tmp_path),
                                        "--seeds", *"01"[:seeds]])
    folder = tmp_path / "infogan_cr" / f"{dataset}-smoke"
    assert len(result["rows"]) == 7 * seeds and all(c["verdict"] for c in result["claims"])
    for r in result["rows"]:
        assert 0.25 <= min(r["factor_vae"], r["centrality"], r["untrained"]["factor_vae"]) < 0.7
        assert r["wrong"] == 1 - r["correct_exact"] and 0 <= r["mig"] < 0.3
    assert Image.open(folder / "figure.png").width > 1000
    assert np.load(folder / "gan-s0" / "samples.npz")["samples"].shape == (24, 1, 16, 16)
    monkeypatch.setattr(core, "generate", lambda G, z: seen.append(z) or torch.zeros(1, 9, 1, 8, 8))
    infogan_cr.main(["--sample", str(folder / "infogan-cr-s0" / "ckpt.pt"), "--n", "999", "--out",
                     str(tmp_path / "grid.png")])
    assert 0.99 < seen[0].abs().max() <= 1              # latents of a checkpoint, too, are uniform


def test_claims_of_infogan_by_hand():
    ends = {"gan": (0.3, 0.4, 0.05), "infogan": (0.5, 0.6, 0.2), "infogan-cr": (0.9, 1, 0.31)}
    rows = [{"dataset": "free", "size": 16, "arm": arm, "seed": seed, "factor_vae": v, "mig": v / 2,
             "untrained": {"factor_vae": 0.35, "mig": 0}, "correct_exact": 1 - wrong - 0.04 * seed,
             "wrong": wrong + 0.04 * seed, "misplaced": wrong, "centrality": v + seed / 100}
            for arm, (*both, wrong) in ends.items() for seed, v in enumerate([*both, both[1]])]
    for words, verdict in (
            ("FactorVAE score of gan, infogan, infogan-cr", "holds against gan, infogan, untrained"
             ), ("MIG of infogan, gan", "holds"), ("exactly correct", "no against gan, infogan"),
            ("rank correlation of ModelC", "holds"), ("FactorVAE score of the model", "holds"),
            ("wrong images, gan,", "no"), ("wrong images, infogan-cr,", "in part"),
            ("too near, of images of two squares, infogan-cr", "holds")):
        found, = [c for c in infogan_cr.claims(rows) if c["what"].startswith(f"free: {words}")]
        assert found["verdict"] == verdict, words
    assert "32.5%" in found["theirs"] and "1.0" not in found["ours"]
    # Of ranks 1 to 9 with three neighbours swapped r is 1 - 6 * 6 / 720; z = 1.832, +- 0.964.
    swapped = [*zip(range(9), (1, 0, 3, 2, 5, 4, 6, 7, 8))]
    assert infogan_cr.rank(swapped) == ("0.95 (95% interval 0.70 to 0.99); n=9", "holds")
    assert infogan_cr.rank(swapped[:7])[1].startswith("not decided")
    assert infogan_cr.rank([(i, i * 4 % 9) for i in range(9)])[1] == "in part"


@pytest.mark.parametrize("args, message", [
    ("--codes 5", "more than --z-dim 4"), ("--codes 1", "at least 2"), ("--gap 2", "at most 1.99"),
    ("--n-train 9", "a set has all"), ("--batch 2000", "only 1352 training images")])
def test_mistakes_in_infogan(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        infogan_cr.main(["--smoke", "--outdir", str(tmp_path), *args.split()])


# ----------------------------------------------------------------------------- topology


def topology_trainer(arm, dataset="torus", *more):
    p = sweep.parser("", topology.PRESETS, topology.OWN, topology.ARMS)
    p.set_defaults(dataset=dataset)
    cfg, = topology.configure(sweep.parse(p, "", ["--smoke", "--arms", arm, *map(str, more)]))
    return topology.make_trainer(cfg, neighbours.training(cfg))


def perfect(kind):
    """The law of a set and a decoder of its latents that draws images of the set alone."""
    def at(c):
        if kind == "torus":
            return torch.atan2(c[:, 2:], c[:, :2]).mul(8 / math.pi).round() % 16
        if kind == "apart":     # piece, row, column within the piece
            columns = ((c[:, 3] + 1) * 1.9999).floor() + 9 * c[:, 1]
            return torch.stack([((c[:, 2] + 1) * 6.4999).floor(), columns], 1)
        return ((c + 1) * 7.9999).floor() - 2
    images, places = neighbours.squares(kind)
    return topology.Law(*topology.LAWS[kind]), lambda c: images[
        (at(c)[:, None] == places[None, :, 0]).all(2).int().argmax(1)]


def test_latents_by_hand():
    """A piece, angles, uniforms and normals of quantiles; the nearest latent of any point."""
    law, z = topology.Law(2, 2, 1, 1), torch.tensor([[-0.1, 0, 0.6744898, 0.6744898, 7],
                                                     [0.1, -50, 50, -50, -7]])
    expected = torch.tensor([[1, 0, -1, 0, 0, -1, 0.5, 7], [0, 1, 1, 1, 0, 0, -1, -7]]).float()
    assert law.z_dim == 5 and law.n_out == 8
    torch.testing.assert_close(law(z), expected, atol=2e-6, rtol=0)
    off = torch.tensor([[0.6, 0.4, -3, 0, 0, -4, 0.5, 7], [-1, 0.2, 2, 9, 0, 0, -1.5, -7]])
    torch.testing.assert_close(law.project(off), expected, atol=2e-6, rtol=0)
    sphere = topology.Law(normals=4, radius=3)
    assert sphere.project(torch.tensor([[0.0, 2, 0, 0]])).tolist() == [[0, 3, 0, 0]]
    law.share.copy_(torch.tensor([0.25, 0.75]))
    assert law(randn(4000, 5).float())[:, 0].mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("kind", ["disc", "torus", "apart"])
def test_a_set_s_own_law_draws_all_of_it_and_nothing_else(kind):
    """Uniformly: a decoder exists that is nowhere torn, so the law is right, and 0 is possible."""
    law, decode = perfect(kind)
    images, seen = neighbours.half(kind)
    row = neighbours.report_squares(decode(law(randn(20_000, law.z_dim).float())), images, seen, 1)
    assert row["correct_exact"] == 1 and row["distinct"] == len(images)
    assert row["tv"] < 1.3 * row["tv_floor"]


def walked(kind, path, ends, decode, law):
    known = neighbours.squares(kind)[0].flatten(1)

    def judge(x):
        apart, index = torch.cdist(x.flatten(1) / 255.0, known / 255.0, p=1).min(1)
        return index, apart <= 2
    return topology.loop_test(ends, lambda c: decode(law.project(c)), judge, path)


def test_loop_test_on_decoders_that_are_whole_cut_or_torn():
    """0 wrong if whole; a cut is found on its edge; a tear shows although all images are right."""
    law, decode = perfect("torus")
    angle = torch.arange(16) * (math.pi / 8)
    c = torch.stack([torch.full((16,), math.cos(math.pi)), angle.cos(), torch.zeros(16),
                     angle.sin()], 1)
    ends, path = torch.stack([c, c.roll(-1, 0)], 1), 8 * 16 + torch.arange(16)
    row, edge = walked("torus", path, ends, decode, law)
    assert row == {"worst": 0, "wrong": 0, "found": 1, "tear": pytest.approx(1, abs=1e-4)}
    assert edge.shape == (8, 1, 16, 16)
    row, edge = walked("torus", path, ends, lambda c: decode(c) * ~(        # dark near a seam
        (c[:, 1] > 0.98) & (c[:, 3] < -0.02))[:, None, None, None], law)
    assert row["worst"] > 0.3 and row["wrong"] == pytest.approx(row["worst"] / 16)
    assert row["found"] == 1 and (edge.amax((1, 2, 3)) == 0).float().mean() == row["worst"]
    flat, (images, _) = torch.linspace(-1, 1, 16)[:, None], neighbours.squares("torus")
    row, _ = walked("torus", path, torch.stack([flat, flat.roll(-1, 0)], 1), lambda c: images[
        8 * 16 + ((c[:, 0] + 1) * 7.5).round().long()], topology.Law(uniforms=1))
    assert row["worst"] == 0 and row["tear"] == pytest.approx(15, rel=1e-3)
    row, _ = walked("torus", path.roll(1), ends, decode, law)
    assert row["found"] == row["worst"] == 0        # right images, but not those of the loop


@pytest.mark.parametrize("kind, size", [*((kind, 16) for kind in neighbours.SETS), ("torus", 32)])
def test_loops_are_in_their_set_and_go_around(kind, size):
    at, found = neighbours.squares(kind, size)[1], topology.loops(kind, size)
    assert ("loop" in found) == (topology.HOLES[kind] > 0)
    for name, path in found.items():
        assert (topology.moved(kind, path[:, None], at, size) == 0).sum(1).tolist() == [1] * len(
            path)
        steps = path.roll(-1, 0) - path
        if name == "control":
            assert len(path) == len(found.get("loop", range(size)))
            assert (steps.abs().sum((1, 2)) == 1).all()
        elif kind == "torus":   # once around
            assert (steps % size).sum((0, 1)).tolist() == [0, size]
        elif kind == "free":    # half a turn, in steps of a pixel; then squares change names
            d = torch.cat([path[:, 0] - path[:, 1], (path[:, 1] - path[:, 0])[:1]]).double()
            turn = np.unwrap(torch.atan2(d[:, 1], d[:, 0]).numpy())
            assert abs(turn[-1] - turn[0]) == pytest.approx(math.pi)
            assert (steps[:-1].abs().sum(2) == 1).all()


def test_pixels_that_squares_moved_by_hand():
    a, b = torch.tensor([[0, 1], [5, 5]]), torch.tensor([[5, 4], [0, 14]])
    assert topology.moved("free", a, b).item() == 1 + 13
    assert topology.moved("free", b, a).item() == 14
    assert topology.moved("torus", a[:1], b[1:]).item() == 3


def test_seam_test_by_hand():
    """Wrong within 0.3 of 0; image 0 lies to the left, 1 to the right, none beyond 1.5."""
    def judge(x):
        return (x[:, 0] > 0).long(), (x[:, 0].abs() > 0.3) & (x[:, 0].abs() < 1.5)
    seams = topology.seam_test(lambda z: z, torch.linspace(-0.2, 0.2, 20)[:, None], judge,
                               core.generator(0))
    met = (seams >= 0).all(1)
    assert met.sum() > 12 and set(map(tuple, seams[met].tolist())) == {(0, 1), (1, 0)}
    none = topology.seam_test(lambda z: z, torch.full((3, 1), 50.0), judge, core.generator(0))
    assert (none == -1).all()


def test_diffusion_draws_what_its_network_knows_and_walks_back():
    body, image = topology.Denoiser(8), randn(1, 1, 16, 16).float().tanh()
    body.net.forward = lambda x: image.expand(len(x), -1, -1, -1)
    z, (keep, *_) = randn(3, 256).float(), body.keep
    x = body(z)                 # with a little of the noise it began with, at the lowest level
    torch.testing.assert_close(x, keep.sqrt() * image + (1 - keep).sqrt() * z.view_as(x),
                               atol=1e-3, rtol=0)
    torch.testing.assert_close(body.walk(x, back=True).flatten(1), z, atol=0.02, rtol=0)
    body.net.forward, x = (lambda x: x[:, :1].tanh()), image.sign() * 0.9
    back = body.walk(x, back=True)
    assert back.std() > 0.7 and (body.walk(back) - x).abs().mean() < 0.3


def test_charts_share_latents_of_an_edge_and_are_all_used():
    t = topology_trainer("charts", "apart", "--lr-g", 0.002, "--width", 16)
    for _ in range(60):
        t.update()
    share, x = t.G[0].share, t.images(torch.arange(12))
    assert share.sum().item() == pytest.approx(1) and share.min() > 0.05 and share.std() > 0
    ends = topology.find_ends(t, x)
    assert torch.equal(ends[:, 0, :4], ends[:, 1, :4]) and (ends[:, 0, :4].sum(1) == 1).all()
    log_p, codes = topology.read_charts(t, x)
    for i in range(12):         # of each image the latents in the chart likeliest for both
        best = (log_p[i] + log_p[(i + 1) % 12]).argmax()
        torch.testing.assert_close(ends[i], torch.stack([codes[i, best], codes[
            (i + 1) % 12, best]]))


def test_e_learns_latents_and_g_does_not_feel_it():
    t = topology_trainer("manifold", "disc", "--lr-g", 0.003)
    z = t.latent(8)
    t.prior = lambda t, n: z
    ours = torch.autograd.grad(topology.gan_loss(t)[0], [*t.G.parameters()])
    plain = torch.autograd.grad(core.g_loss(t)[0], [*t.G.parameters()])
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)
    t.prior, t.opt_g.param_groups[0]["lr"] = core.normal_prior, 0
    t.G[1].forward = lambda c: torch.where(torch.arange(16) < 8, c[:, :1], c[:, 1:])[
        :, None, None].expand(-1, 1, 16, 16) + 0 * next(t.G[1].parameters()).sum()
    missed = [t.g_update()["missed"].item() for _ in range(150)]
    assert missed[0] > 0.2 > 0.03 > missed[-1]


@pytest.mark.parametrize("arm", topology.ARMS)
def test_topology_stops_and_resumes_bit_for_bit(tmp_path, arm):
    def fit(folder, stop=None):
        t = topology_trainer(arm, "torus", "--steps", 6)
        of_g = t.g_loss
        t.g_loss = lambda t: (t.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM),
                              of_g(t))[1]
        harness.fit(t, folder)
    fit(tmp_path / "whole")
    with pytest.raises(SystemExit):
        fit(tmp_path / "cut", 3)
    fit(tmp_path / "cut")
    check_same(tmp_path / "whole" / "ckpt.pt", tmp_path / "cut" / "ckpt.pt")


@pytest.mark.slow
def test_topology_smoke_and_samples(tmp_path):
    common, arms = ["--smoke", "--outdir", str(tmp_path)], list(topology.ARMS)
    result = topology.main([*common, "--dataset", "pair"])
    folder = tmp_path / "topology" / "pair-smoke"
    assert [(r["dataset"], r["arm"]) for r in result["rows"]] == [
        (kind, arm) for kind in ("disc", "torus") for arm in arms]
    for r in result["rows"]:
        assert {"wrong", "correct_exact", "tv", "copies", "control_worst", "control_found",
                "seams", "curve"} <= r.keys() and ("loop_tear" in r) == (r["dataset"] == "torus")
    assert len({r["n_weights"] for r in result["rows"][:4]}) > 1    # only the first layers differ
    (folder / "figure.png").unlink()
    topology.main(["--plot", str(folder)])
    assert Image.open(folder / "figure.png").width > 1000
    for arm in ("wrong-manifold", "diffusion"):     # never N(0, I) into what expects another law
        out, ckpt = tmp_path / f"{arm}.png", folder / f"disc-{arm}-s0" / "ckpt.pt"
        topology.main(["--sample", str(ckpt), "--n", "9", "--out", str(out)])
        state = harness.read_checkpoint(ckpt)
        cfg = argparse.Namespace(**state["config"])
        t = topology.make_trainer(cfg, neighbours.training(cfg))
        t.load(state)
        harness.save_grid(torch.cat(list(t.fakes(9)[""])), tmp_path / "same.png")
        assert out.read_bytes() == (tmp_path / "same.png").read_bytes()


def test_claims_of_topology_by_hand():
    ends = {("disc", "gaussian-2"): 0.1, ("torus", "gaussian-2"): 0.2, ("apart", "gaussian-2"): 0.3,
            ("torus", "manifold"): 0.25, ("apart", "manifold"): 0.1, ("disc", "manifold"): 0.1,
            ("disc", "wrong-manifold"): 0.3, ("torus", "charts"): 0.1, ("disc", "gaussian-8"): 0.3,
            ("torus", "gaussian-8"): 0.2}
    rows = [{"dataset": kind, "arm": arm, "seed": seed, "wrong": v + seed / 100, "correct_exact":
             0.9 - v - seed / 100, "control_worst": 0.2} | (
             {"loop_worst": 0.1 if arm == "gaussian-8" else 0.5} if kind != "disc" else {})
            for (kind, arm), v in ends.items() for seed in (0, 1)]
    found = {c["what"]: c for c in topology.claims(rows)}
    verdicts = {what: c["verdict"] for what, c in found.items()}
    assert verdicts["wrong images of gaussian-2"] == "holds"
    assert verdicts["wrong images of gaussian-8"] == "no"
    assert found["wrong images of gaussian-2"]["ours"].startswith("apart 30.5% (30 to 31)")
    assert verdicts["torus: wrong images"] == "no" and verdicts["apart: wrong images"] == "holds"
    assert verdicts["disc: wrong images"] == "holds"
    assert verdicts["torus: exactly correct images"] == "holds"
    assert verdicts["apart: exactly correct images"] == ""      # no chart, no diffusion
    assert [verdicts[f"{kind}: wrong images on the worst edge around the hole"] for kind in (
        "torus", "apart")] == ["no", "holds"]
    assert "disc: wrong images on the worst edge around the hole" not in found


@pytest.mark.parametrize("args, message", [
    ("--z-dim 9", "--z-dim follows"), ("--n-train 9", "--n-train 9: a set"),
    ("--dataset all --batch 64", "only 52"), ("--charts 1", "at least 2"),
    ("--size 12", "power of two")])
def test_mistakes_in_topology(tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        topology.main(["--smoke", "--outdir", str(tmp_path), *args.split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, betti", [("disc", (1, 0)), ("torus", (1, 2)), ("free", (1, 1)),
                                         ("halves", (1, 0)), ("apart", (2, 0))])
def test_betti_numbers_of_sets(kind, betti):
    """Of exact geodesic distances: what lives long. Of two squares, those around the middle."""
    ripser = pytest.importorskip("ripser").ripser
    at, wrap = neighbours.squares(kind)[1], 16 if kind == "torus" else 1000
    at = at - at.min()
    number = {frozenset(map(tuple, p)): i for i, p in enumerate(at.tolist())}
    edges = [(i, number[new]) for p, i in number.items() for row, column in p
             for down, right in ((0, 1), (1, 0)) if (new := p - {(row, column)} | {
                 ((row + down) % wrap, (column + right) % wrap)}) in number]
    graph = csr_array((np.ones(len(edges)), np.transpose(edges)), shape=(len(at),) * 2)
    some = np.arange(len(at)) if at.shape[1] == 1 else np.flatnonzero(
        (at.sum(1) == 12).all(1))
    d = dijkstra(graph, directed=False, unweighted=True, indices=some)[:, some]
    pieces, holes = ripser(d, distance_matrix=True, thresh=30)["dgms"]
    assert (np.isinf(pieces).any(1).sum(), (holes[:, 1] > 2.5 * holes[:, 0]).sum()) == betti


# ------------------------------------------------------------------------------ results and docs


def load_table():
    spec = importlib.util.spec_from_file_location("table", HERE / "results" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_and_docs_say_what_results_and_tags_say(monkeypatch):
    """`python results/table.py` would change nothing, and every tag of the code is listed."""
    table, written = load_table(), {}
    monkeypatch.setattr(table, "put", lambda path, text: written.update({path: text}))
    table.main()
    for path, text in written.items():
        assert f"{table.FIRST}\n{text}\n{table.LAST}" in (HERE / path).read_text(), path
    for name in table.tracked():
        tags = len(re.findall("(?:UNSPECIFIED|DEVIATION):", (HERE / name).read_text()))
        assert written["docs/choices.md"].count(f"- `{name}` ") == tags, name


def test_choices_are_not_those_of_a_forks_copies(tmp_path, monkeypatch):
    table = load_table()
    for name in ("b.py", "mine.py", "neighbours/a.py", "test_all.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# UNSPECIFIED: x. y.\n")
    monkeypatch.setattr(table, "TOP", tmp_path)
    assert table.tracked() == ["b.py", "mine.py", "neighbours/a.py"]    # no checkout
    for command in ("init -q", "add b.py neighbours test_all.py"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    assert table.tracked() == ["b.py", "neighbours/a.py"]
    assert table.choices() == "- `b.py` UNSPECIFIED: x. y.\n- `neighbours/a.py` UNSPECIFIED: x. y."


def test_claims_are_what_the_code_makes_of_the_committed_rows():
    """A verdict, a gain or a mean that comes out otherwise than it stands in README and docs."""
    for name, result in load_table().results().items():
        place = "" if (HERE / f"{result['script']}.py").exists() else "neighbours."
        script, rows = importlib.import_module(place + result["script"]), result["rows"]
        claims = script.claims_photos([r for r in rows if "seed" in r]) if (
            rows[-1].get("part") == "sc_natural") else script.claims(rows)
        assert harness.to_jsonable(claims) == result["claims"], name


def test_the_text_of_cures_follows_from_their_rows(monkeypatch, tmp_path):
    """Equal data, updates and seeds for all; what docs/cures.md says; and the figure."""
    table = load_table()
    found, text = table.results(), (HERE / "docs" / "cures.md").read_text()
    rows = {name: [r for r in found[result]["rows"] if r["arm"] == arm]
            for name, (result, arm, _) in table.CURES.items()}
    for name, mine in rows.items():
        cfg = found[table.CURES[name][0]]["config"]
        assert [r["seed"] for r in mine] == [0, 1, 2] and cfg["preset"] == "cpu", name
        same = (cfg["n_train"], cfg["size"], cfg["batch"], cfg["width"], cfg["steps"],
                mine[0].get("n_cover", mine[0].get("n_samples")))
        assert same == (1800, 16, 32, 32, 3600, 18_000), name
        assert all(f"{number:,}" in text for number in same)
    mean = {key: {name: np.mean([r[key] for r in mine]) for name, mine in rows.items()}
            for key in ("correct", "correct_exact", "n_eff")}
    assert f"{rows['vanilla'][0]['distinct_train']:,} different ones" in text
    points = {"random centres", "BourGAN", "AE-OT-GAN"}
    assert {name for name, v in mean["correct_exact"].items() if v > 0.5} == points
    assert all(mean["n_eff"][name] < mean["n_eff"]["vanilla"] / 2
               for name in (*points, "SC", "SC+PCR"))
    assert all(mean["correct"][a] > 0.9 for a in ("SC", "PCR", "SC+PCR"))
    assert mean["correct_exact"]["random centres"] > mean["correct_exact"]["BourGAN"]
    pairs, plain = (sweep.values(rows[a], "correct_exact") for a in (
        "pseudo-supervised pairs", "vanilla"))
    assert min(pairs) < max(plain) and min(plain) < max(pairs)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(table, "TOP", tmp_path)
    once = table.cures(found)
    picture = (tmp_path / "results" / "cures.png").read_bytes()
    shifted = [r | {"n_eff": r["n_eff"] + 500} for r in found["topology/geometry"]["rows"]]
    assert table.cures(found | {"topology/geometry": found["topology/geometry"] | {
        "rows": shifted}}) != once
    assert (tmp_path / "results" / "cures.png").read_bytes() != picture
    copyist = re.search(r"n_eff is ([\d,]+)", text)[1]
    images, _ = exp_sc.training_set(argparse.Namespace(size=16, n_train=1800))
    times = collections.Counter(x.numpy().tobytes() for x in images).values()
    assert copyist == f"{1800 ** 2 / sum(n * n for n in times):,.0f}"


def test_numbers_of_the_findings_stand_in_the_claims():
    """No number in README's findings, or of results in docs/speed.md, has no result behind it."""
    speed = (HERE / "docs" / "speed.md").read_text()
    prose = README[README.index("Three findings"):README.index("In the table a claim")] + speed[
        speed.index("and three seeds, WGAN-GP"):speed.index("What was kept")]
    found = " ".join(f"{c['what']} {c['ours']}" for result in load_table().results().values()
                     for c in result["claims"])
    cures = (HERE / "docs" / "cures.md").read_text()
    known = set(re.findall(r"\d[\d.,]*\d|\d", found + cures[cures.index("made by"):]))
    for number in re.findall(r"(?<![\w-])\d[\d.,]*\d|(?<![\w-])\d", re.sub(
            r"^\d\. |\(of 255\)|CIFAR-10|\b192\b|to 90%", "", prose, flags=re.M)):
        assert number in known, number
