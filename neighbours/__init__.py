"""What the neighbouring papers share: data, presets, networks and scores of the methods' runs.

Data: points of Gaussians in a plane (ring, grid, circle), images of two rectangles (geometry), sets
of images of squares whose topology is known (SETS), and CIFAR-10. A script beside this file is one
paper: its idea, its claims, its figure.
"""
import math
from argparse import Namespace

import torch
from torch import nn

import core
import data
import fid
import geometry
import harness

SETS = {"disc": 1, "torus": 1, "free": 2, "halves": 2, "apart": 1}  # squares of an image
PLANES = {"ring": 150, "grid": 50, "circle": 12}    # points of a mode, of each unit of its weight
# UNSPECIFIED: networks and step sizes of points. As in the code of BourGAN (Xiao et al. 2018).
POINTS = dict(loss="ns", gp_weight=0.0, n_dis=1, batch=128, lr_g=1e-3, lr_d=1e-3, beta1=0.5, base=2,
              beta2=0.999, lr_decay=False, steps=4000, size=16, width=128, z_dim=16, n_fid=2500,
              n_end=2500)
IMAGES = dict(loss="wgan", gp_weight=10.0, beta2=0.9, size=32, width=64, dims=2048, split="train")
FEW = dict(jobs=1, n_dis=1, batch=8, steps=4, width=8, z_dim=4, n_train=64, n_fid=32, n_end=64,
           n_real=32, dims=64, checks=2, log_every=2)
COMMON = dict(arch="dcgan", norm_d="none", init_d="he", gp_comb=False, comb_weight=0.5, flip=False,
              ema_beta=0.0, checks=20, log_every=50)
PRESETS = {
    **{kind: {      # the GAN of exp_sc.py, with base 2, on all images of a half of a set
        "paper": IMAGES | dict(n_dis=1, batch=32, lr_g=5e-4, lr_d=5e-4, beta1=0.0, lr_decay=True,
            steps=50_000, z_dim=8, base=2, size=16, n_fid=4096, n_end=256_000),
        "cpu": dict(batch=32, lr_g=1e-3, lr_d=1e-3, steps=2400, width=32, n_fid=1024, n_end=18_000),
        "smoke": FEW | dict(n_train=None)} for kind in SETS},
    **{kind: {"paper": POINTS | dict(n_train=n), "cpu": {}, "smoke": FEW}
       for kind, n in PLANES.items()},
    "geometry": {   # the same on exp_sc.py's images, on a CPU for as many updates as fit
        "paper": IMAGES | dict(n_dis=1, batch=64, lr_g=5e-4, lr_d=5e-4, beta1=0.0, lr_decay=True,
            steps=50_000, z_dim=8, base=2, n_train=25_600, n_fid=4096, n_end=256_000),
        "cpu": dict(batch=32, lr_g=1e-3, lr_d=1e-3, steps=2400, size=16, width=32, n_train=1800,
            n_fid=1024, n_end=18_000), "smoke": FEW | dict(size=16)},
    "cifar10": {    # the WGAN-GP of exp_pcr_natural.py
        "paper": IMAGES | dict(n_dis=5, batch=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, lr_decay=False,
            steps=10_000, z_dim=128, base=4, n_fid=10_000, n_end=10_000),
        "cpu": dict(n_dis=2, batch=32, lr_g=5e-4, lr_d=5e-4, steps=300, width=16, n_fid=256,
            n_end=256, n_real=1024, checks=1, log_every=20), "smoke": FEW}}
MEASURES = {    # {key: (words, unit)}, the main one first
    **dict.fromkeys(PLANES, {"within_3": ("points within 3 sigma", 100), "modes": ("modes", 1),
                             "reverse_kl": ("reverse KL of mode shares", 1)}),
    "geometry": {"correct_exact": ("exactly correct images", 100), "n_eff": (
        "effective number of images", 1), "distinct": ("different correct images", 1)},
    **dict.fromkeys(SETS, {"correct_exact": ("exactly correct images", 100), "tv": (
        "total variation from uniform", 1), "copies": ("copies among correct images", 100)}),
    "cifar10": {"distance": ("{metric}", 1), "kid": ("KID", 1)}}
LOWER = ("reverse_kl", "distance", "kid", "tv", "copies")           # less is better
DATA = (*PLANES, "geometry", "cifar10")
OWN = {
    "dataset": (DATA, "(%(default)s)"), "n_end": (int, 2, 10 ** 9, "samples at the end"),
    **data.FLAGS, **fid.FLAGS, "n_train": (int, 1, 10 ** 9, "training images, or points of a mode")}


def modes(kind):
    """Gaussians in a plane: means (M, 2), their standard deviation, integer weights (M,). `ring`: 8
    of radius 1; `grid`: 25, 2 apart; `circle`: 100 of radius 2 and a centre of weight 3."""
    if kind == "grid":
        return torch.cartesian_prod(*[torch.arange(-4., 5, 2)] * 2), 0.05, torch.ones(25).long()
    n, radius, sigma, heart = {"ring": (8, 1, 0.01, 0), "circle": (100, 2, 0.05, 1)}[kind]
    turn = torch.arange(n) * (2 * math.pi / n)
    means = radius * torch.stack([turn.cos(), turn.sin()], 1)
    return torch.cat([means, torch.zeros(heart, 2)]), sigma, torch.tensor([1] * n + [3] * heart)


def draw_points(n, kind, seed=0):
    """n points for each unit of weight of `modes`, float (N, 2), mode by mode."""
    x, sigma = modes(kind)[0].repeat_interleave(n * modes(kind)[2], 0), modes(kind)[1]
    return x + sigma * torch.randn(x.shape, generator=core.generator(seed))


def report_points(x, kind):
    """Of points (N, 2): how many `modes` have one within 3 standard deviations, the shares within 3
    and 10 of any, reverse_kl of the shares of nearest modes from the true ones, 0 at best;
    geometry.birthday of the squares that they lie in, a tenth of a standard deviation wide."""
    means, sigma, weights = (torch.as_tensor(v, device=x.device) for v in modes(kind))
    apart, nearest = torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    share, true = nearest.bincount(minlength=len(means)) / len(x), weights / weights.sum()
    squares = torch.unique((x * (10 / sigma)).floor(), dim=0, return_counts=True)[1]
    return {"modes": len(nearest[apart < 3 * sigma].unique()),
            **{f"within_{k}": (apart < k * sigma).float().mean().item() for k in (3, 10)},
            "reverse_kl": torch.special.xlogy(share, share / true).sum().item(),
            **geometry.birthday(squares)}


def squares(kind, size=16):
    """All images of a set, squares of a quarter of `size`: uint8 (N, 1, H, W), corners (N, k, 2).

    disc: one square, cut off at the border, 256 at 16 px, contractible; torus: one, wrapped, 256;
    apart: one, at the left or the right end, 104, two components; halves: one at each end, 2,704,
    contractible; free: two anywhere with a gap, 9,576, a circle up to homotopy. The images of
    geometry are some of these.
    """
    side, every = size // 4, range(size - size // 4 + 1)
    low, high = every[:side], every[-side:]

    def places(rows, columns):
        return torch.cartesian_prod(torch.tensor([*rows]), torch.tensor([*columns]))[:, None]
    if kind in ("free", "geometry"):
        both = places(every, every)[torch.combinations(torch.arange(len(every) ** 2)), 0]
        at = both[(both[:, 0] - both[:, 1]).abs().amax(1) > side]
    elif kind == "halves":
        left, right = places(every, low), places(every, high)
        at = torch.cat([left.repeat_interleave(len(right), 0), right.repeat(len(left), 1, 1)], 1)
    else:
        at = {"disc": lambda: places(*[range(-(side // 2), size - side // 2)] * 2),
              "torus": lambda: places(range(size), range(size)),
              "apart": lambda: places(every, [*low, *high])}[kind]()
    wrapped = [0, -size] if kind == "torus" else [0]
    return torch.stack([geometry.render(at + torch.tensor([down, right]), size, side)
                        for down in wrapped for right in wrapped]).amax(0), at


def half(kind, size=16, held=0.5):
    """All images of a set (N, 1, H, W), and which of them are trained on, bool (N,): all but a
    share `held`, drawn at random."""
    images, _ = squares(kind, size)
    n = len(images)
    return images, torch.randperm(n, generator=core.generator(0)) < n - int(n * held)


def nearest(x, images):
    """Pixels (n,) from each of x (n, 1, H, W) to the nearest of `images`, and its number (n,)."""
    known, found = geometry.lit(images).flatten(1).float().to(x.device), []
    for part in x.split(1024):
        lit = geometry.lit(part).flatten(1).float()
        found.append((lit.sum(1, keepdim=True) + known.sum(1) - 2 * lit @ known.T).min(1))
    return [torch.cat(v) for v in zip(*found)]


def report_squares(x, images, seen, k):
    """What images x (n, 1, H, W) are worth beside all `images` of a set of k squares, of which
    `seen` (N,) were trained on. correct_exact: the share that is one of them; correct: that lies
    within 2 k pixels of one. Of the exact ones: how many are distinct, geometry.birthday, copies,
    the share that was trained on. Of all correct ones: tv of the nearest images from uniform,
    tv_floor."""
    (apart, index), seen = nearest(x, images), seen.to(x.device)
    exact, near = (index[apart <= most].bincount(minlength=len(images)) for most in (0, 2 * k))
    tv, floor = geometry.total_variation(near, len(images))
    return {"n_samples": len(x), "correct": near.sum().item() / len(x),
            "correct_exact": exact.sum().item() / len(x), "distinct": (exact > 0).sum().item(),
            **geometry.birthday(exact), "copies": exact[seen].sum().item() / max(
                exact.sum().item(), 1), "tv": tv, "tv_floor": floor}


class Prior(nn.Module):
    """Normals z (B, 1 + K) -> latents (B, K): z_0 picks a row of e (m, K), each as often, to which
    sigma times the others are added; without rows, z (B, K) itself. First layer of a G: who draws
    from that G, to score or to look, draws from the law. `log_scale` is for who needs one."""

    def __init__(self, m, k, sigma):
        super().__init__()
        self.sigma = sigma
        self.register_buffer("e", torch.zeros(m, k))
        self.register_buffer("log_scale", torch.zeros(()))

    def forward(self, z):
        if not len(self.e):
            return z
        index = (len(self.e) * torch.special.ndtr(z[:, 0])).long().clamp(max=len(self.e) - 1)
        return self.e[index] + self.sigma * z[:, 1:]


def pair(cfg):
    """One G and one D: perceptrons with two hidden layers for points, else core's."""
    if cfg.dataset not in PLANES:
        return core.build(cfg)

    def net(n_in, n_out, width=cfg.width):
        return nn.Sequential(nn.Linear(n_in, width), nn.LeakyReLU(0.1), nn.Linear(width, width),
                             nn.LeakyReLU(0.1), nn.Linear(width, n_out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return net(cfg.z_dim, 2), net(2, 1).append(nn.Flatten(0))


def training(cfg):
    """The training data: points float (N, 2), or images uint8 (N, C, H, W)."""
    if cfg.dataset in PLANES:
        return draw_points(cfg.n_train, cfg.dataset)
    if cfg.dataset in SETS:
        if cfg.n_train:
            raise core.UserError(f"--n-train {cfg.n_train}: a set has all the images it has")
        images, seen = half(cfg.dataset, cfg.size, getattr(cfg, "held", 0.5))
        return images[seen]
    if cfg.dataset != "geometry":
        return data.load(cfg.dataset, cfg.size, cfg.data_dir, cfg.split, cfg.n_train)
    if cfg.size < 16 or cfg.n_train < 2:
        raise core.UserError(f"--size {cfg.size}, --n-train {cfg.n_train}: at least 16 and 2")
    return torch.cat(geometry.draw_pairs(cfg.n_train // 2, cfg.size, cfg.size // 4)[:2])


def prepare(cfg):
    """The training data; a score, samples -> {name: number or None}; what the score is."""
    x = training(cfg)
    if cfg.dataset in PLANES:
        return x, lambda fakes: report_points(fakes, cfg.dataset), {}
    if cfg.dataset in SETS:
        everything = half(cfg.dataset, cfg.size, getattr(cfg, "held", 0.5))
        return x, lambda fakes: report_squares(fakes, *everything, SETS[cfg.dataset]), {}
    if cfg.dataset == "geometry":
        return x, lambda fakes: geometry.report(fakes, x.to(fakes.device), cfg.size // 4), {}
    score, protocol = fid.scorer(cfg, x, cfg.dims)
    return x, lambda fakes: score(
        Namespace(fakes=lambda n: {"": fakes.split(fid.BATCH)})), protocol


def right(kind, size):
    """A function of images that says which are exactly right, bool (N,); None for other data."""
    if kind == "geometry":
        return lambda x: geometry.has_two(x, size // 4, geometry.count_exact)
    if kind in SETS:
        return lambda x: geometry.is_in(x, squares(kind, size)[0].to(x.device))


def fit(t, folder, score, protocol):
    """harness.fit, scored by what a number of fakes is worth -> its curve, [step, main measure];
    of images of squares also the first step at which 90% were correct, to_90, or None."""
    def evaluate(t):
        row = score(torch.cat(list(t.fakes(t.cfg.n_fid)[""])))
        return {k: v for k, v in row.items() if v is not None}
    harness.fit(t, folder, evaluate, protocol=protocol, good=right(t.cfg.dataset, t.cfg.size))
    main, *_ = MEASURES[t.cfg.dataset]
    rows = [r for r in harness.read_rows(folder / "metrics.jsonl") if main in r]
    ended = {"curve": [[r["step"], r[main]] for r in rows]}
    if "correct" in rows[0]:
        ended["to_90"] = next((r["step"] for r in rows if r["correct"] >= 0.9), None)
    return ended


def show(ax, x, kind, title, color):
    """What was drawn, on an axis: points (N, 2) upon the modes, or images."""
    if x.ndim == 2:
        means = modes(kind)[0]
        ax.scatter(*means.T, s=20, color="0.85", lw=0)
        ax.scatter(*x.T, s=0.7, c=color, lw=0)
        ax.axis(1.3 * means.max().item() * torch.tensor([-1, 1, -1, 1]).numpy())
    else:
        ax.imshow(harness.grid(x), interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[], frame_on=False, aspect=1)
