"""The shared core: networks, losses, the two regularizers, the trainer.

Letters in shapes: B batch, C channels, H height, W width, Z latent size, N images, F features.
Images are uint8 in [0, 255] where they are stored and float32 in [-1, 1] where a network sees
them. `step` counts updates of G, `d_steps` updates of D.
"""
import argparse
import copy
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils.parametrizations import spectral_norm

from harness import UserError, digest, generator, join, plain, read_checkpoint, save_grid

# ---------------------------------------------------------------------------- configuration


def train_flags(parser):
    """Flags of the training scripts. No default here: a script's PRESETS give the values."""
    g = parser.add_argument_group("training (default: the preset's value)")
    for flag, kind, text in [
        ("--steps", int, "updates of G"), ("--d-steps", int, "updates of D, instead of --steps"),
        ("--batch", int, "images per batch"), ("--n-dis", int, "updates of D per update of G"),
        ("--lr-g", float, "Adam step size of G"), ("--lr-d", float, "Adam step size of D"),
        ("--beta1", float, "Adam"), ("--beta2", float, "Adam"),
        ("--z-dim", int, "latent size"), ("--width", int, "channels of the widest resolution"),
        ("--base", int, "pixels of the coarsest level of the networks"),
        ("--gp-weight", float, "weight of the gradient penalty, 0 for none"),
        ("--comb-weight", float, "share of the extra negatives, eq. (13); the paper's is 0.5"),
        ("--ema-beta", float, "decay of the averaged G, 0 for none"),
        ("--log-every", int, "updates of G"), ("--eval-every", int, "updates of G"),
        ("--sample-every", int, "updates of G"), ("--ckpt-every", int, "updates of G"),
        ("--checks", int, "how many scores, grids and checkpoints, unless set one by one"),
        ("--n-fid", int, "generated images per score"),
    ]:
        g.add_argument(flag, type=kind, help=text)
    g.add_argument("--engine", default="eager", choices=["eager", "graph", "compile"],
                   help="graph: an update as one CUDA graph, untested; compile: both networks by "
                        "torch.compile, without a penalty (%(default)s)")
    g.add_argument("--data-parallel", action="store_true",
                   help="under torchrun: all processes share each batch, not the list of runs")
    g.add_argument("--norm-d", choices=["none", "batch", "layer"], help="normalisation in D")
    g.add_argument("--init-d", choices=["dcgan", "he"], help="first weights of D")
    g.add_argument("--lr-decay", action=argparse.BooleanOptionalAction,
                   help="step sizes fall to 0 over the second half of the run")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, help="random mirror images")
    g.add_argument("--gp-comb", action=argparse.BooleanOptionalAction,
                   help="let the penalty reach the extra negatives too")
    g = parser.add_argument_group("images from a checkpoint, no training")
    g.add_argument("--sample", type=Path, metavar="CKPT", help="draw from CKPT's G and stop")
    g.add_argument("--n", type=int, default=64, help="how many images")
    g.add_argument("--out", type=Path, default=Path("grid.png"), help="where to write them")


BOUNDS = {  # smallest and largest value that a training can have
    **dict.fromkeys(("steps", "d_steps", "n_dis", "checks", "jobs", "eval_every", "sample_every",
                     "ckpt_every"), (1, 10 ** 12)),
    **dict.fromkeys(("z_dim", "log_every"), (1, 10 ** 6)), "width": (1, 4096),
    **dict.fromkeys(("batch", "n_fid"), (2, 10 ** 6)),
    **dict.fromkeys(("lr_g", "lr_d", "gp_weight"), (0, 10 ** 6)),
    **dict.fromkeys(("beta1", "beta2", "ema_beta", "comb_weight"), (0, 0.999999)),
}


def resolve(args, *presets, **fixed):
    """Presets (dicts, later ones win), then the flags the user gave, then `fixed` -> Namespace.

    steps and d_steps follow from each other by n_dis; eval, sample and ckpt_every are `checks` to
    a run where they are not given. Raises UserError for values that no training can have.
    """
    if args.data_parallel and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise UserError("--data-parallel: start it with torchrun, on two processes at least")
    if args.data_parallel and args.engine == "graph":
        raise UserError("--engine graph: not with --data-parallel, whose sums leave the device")
    cfg = {k: v for k, v in vars(args).items()
           if k not in ("sample", "n", "out", "plot", "dry_run")}
    given = {k: v for k, v in cfg.items() if v is not None}
    if {"steps", "d_steps"} <= given.keys():
        raise UserError("--steps and --d-steps: give one of them, n_dis gives the other")
    for layer in (*presets, given, fixed):
        if {"steps", "d_steps"} & layer.keys():  # the later word on the length counts
            cfg |= {"steps": None, "d_steps": None}
        cfg |= layer
    for key, (low, high) in BOUNDS.items():
        if cfg[key] is not None and not low <= cfg[key] <= high:
            raise UserError(f"--{key.replace('_', '-')} is {cfg[key]}: "
                            f"must be at least {low} and at most {high}")
    cfg["seeds"], cfg["arms"] = (list(dict.fromkeys(cfg[k] or [0])) for k in ("seeds", "arms"))
    if not all(0 <= seed < 2 ** 63 for seed in cfg["seeds"]):
        raise UserError(f"--seeds {cfg['seeds']}: must be in [0, 2^63)")
    if cfg["steps"] is None and cfg["d_steps"] < cfg["n_dis"]:
        raise UserError(f"--d-steps {cfg['d_steps']}: less than one round of {cfg['n_dis']} n_dis")
    cfg["steps"] = cfg["steps"] or cfg["d_steps"] // cfg["n_dis"]
    cfg["d_steps"] = cfg["steps"] * cfg["n_dis"]
    cfg["log_every"] = min(cfg["log_every"], cfg["steps"])
    for key in ("eval_every", "sample_every", "ckpt_every"):
        cfg[key] = cfg[key] or max(cfg["steps"] // cfg["checks"], 1)
    cfg = argparse.Namespace(**cfg)
    with torch.device("meta"):  # refuses sizes no network is defined at, and takes no memory
        n = sum(p.numel() for net in build(cfg) for p in net.parameters())
    if n > 2 ** 30:
        raise UserError(f"--size {cfg.size} --base {cfg.base} --width {cfg.width} --z-dim "
                        f"{cfg.z_dim}: networks of {n} weights, at most 2^30 are allowed")
    return cfg


# --------------------------------------------------------------------------------- networks


def init(layer, kind="dcgan"):
    """First weights, no bias: N(0, 0.02) as Radford et al. (2015), or `he` et al. (2015)."""
    if kind == "dcgan":
        nn.init.normal_(layer.weight, 0, 0.02)
    else:
        nn.init.kaiming_normal_(layer.weight, a=0.2)
    nn.init.zeros_(layer.bias)
    return layer


def norm_layer(kind, channels):
    return {"none": lambda: nn.Identity(), "batch": lambda: nn.BatchNorm2d(channels),
            "layer": lambda: nn.GroupNorm(1, channels)}[kind]()


class LeakyReLU(nn.Module):
    """Slope 0.2 below 0, as a constant factor. PyTorch's own layer makes the second derivative of a
    gradient penalty send zeros through all of D, a sixth of the arithmetic of D's update; without a
    penalty PyTorch's is the faster one."""

    def forward(self, x):
        return x * torch.where(x > 0, 1.0, 0.2)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the shards of all processes: what one process does with the whole batch."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        world = dist.get_world_size()
        sums = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = all_reduce(sums) / world         # differentiable
        var, n = (square - mean ** 2).clamp(min=0), x.numel() // x.shape[1] * world
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        x = (x - mean[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Attention(nn.Module):
    """Self-attention of SAGAN (Zhang et al. 2018): keys C/8, values C/2, both pooled, gain 0."""

    def __init__(self, channels):
        super().__init__()
        widths = [max(channels // 8, 1), max(channels // 8, 1), max(channels // 2, 1)]
        self.query, self.key, self.value = (
            spectral_norm(nn.Conv2d(channels, w, 1, bias=False)) for w in widths)
        self.out = spectral_norm(nn.Conv2d(widths[2], channels, 1, bias=False))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        q = self.query(x).flatten(2)                                    # (B, C/8, HW)
        k = F.max_pool2d(self.key(x), 2).flatten(2)                     # (B, C/8, HW/4)
        v = F.max_pool2d(self.value(x), 2).flatten(2)                   # (B, C/2, HW/4)
        weights = (q.transpose(1, 2) @ k).softmax(-1)                   # (B, HW, HW/4)
        out = (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])   # (B, C/2, H, W)
        return x + self.gain * self.out(out)


def dcgan_pair(size, channels, z_dim, width, norm_d, init_d, base=4, sagan=False,
               penalty=False):
    """G and D of Radford et al. (2015): one 4x4, stride-2 level per doubling above `base` px.

    UNSPECIFIED: the paper's architectures. At 32 px G is 256-128-64 and D 64-128-256 channels,
    at 64 px one level more; the published baselines fit nets of that size. SAGAN is unconditional
    here: the same pair under spectral norm, with attention at half the image size in both.
    """
    wrap = spectral_norm if sagan else lambda layer: layer
    leaky = LeakyReLU if penalty else lambda: nn.LeakyReLU(0.2)
    levels = int(math.log2(size // base))
    widths = [width * 2 ** i for i in range(levels)]                    # from the image inwards
    g = [wrap(init(nn.Linear(z_dim, widths[-1] * base ** 2))),
         nn.Unflatten(1, (widths[-1], base, base)),
         nn.BatchNorm2d(widths[-1]), nn.ReLU()]
    for wide, narrow in zip(widths[:0:-1], widths[-2::-1]):
        g += [wrap(init(nn.ConvTranspose2d(wide, narrow, 4, 2, 1))),
              nn.BatchNorm2d(narrow), nn.ReLU()]
    g += [Attention(width)] if sagan else []
    g += [wrap(init(nn.ConvTranspose2d(width, channels, 4, 2, 1))), nn.Tanh()]
    d = [wrap(init(nn.Conv2d(channels, width, 4, 2, 1), init_d)), leaky()]
    d += [Attention(width)] if sagan else []
    for narrow, wide in zip(widths[:-1], widths[1:]):
        d += [wrap(init(nn.Conv2d(narrow, wide, 4, 2, 1), init_d)), norm_layer(norm_d, wide),
              leaky()]
    d += [nn.Flatten(), wrap(init(nn.Linear(widths[-1] * base ** 2, 1), init_d)), nn.Flatten(0)]
    return nn.Sequential(*g), nn.Sequential(*d)


class ResBlock(nn.Module):
    """Pre-activation residual block of Gulrajani et al. (2017), up- or downsampling by two."""

    def __init__(self, c_in, c_out, resample=None, norm="none", first=False):
        super().__init__()
        self.pre = nn.Identity() if first else nn.Sequential(norm_layer(norm, c_in), nn.ReLU())
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.mid = nn.Sequential(norm_layer(norm, c_out), nn.ReLU())
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out or resample else nn.Identity()
        self.up = nn.Upsample(scale_factor=2) if resample == "up" else nn.Identity()
        self.down = nn.AvgPool2d(2) if resample == "down" else nn.Identity()
        for conv in (self.conv1, self.conv2):
            init(conv, "he")

    def forward(self, x):
        out = self.conv2(self.mid(self.conv1(self.up(self.pre(x)))))
        return self.down(out) + self.skip(self.down(self.up(x)))


def resnet_pair(size, channels, z_dim, width, norm_d):
    """G and D of Gulrajani et al. (2017), section 5.3: ResNets of `width` (128) channels."""
    levels = int(math.log2(size // 4))
    g = [nn.Linear(z_dim, width * 16), nn.Unflatten(1, (width, 4, 4))]
    g += [ResBlock(width, width, "up", "batch") for _ in range(levels)]
    g += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
    d = [ResBlock(channels, width, "down", first=True)]
    d += [ResBlock(width, width, "down", norm_d) for _ in range(levels - 2)]
    d += [ResBlock(width, width, None, norm_d) for _ in range(2)]
    d += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1), nn.Flatten(0)]
    return nn.Sequential(*g), nn.Sequential(*d)


def build(cfg):
    """G: (B, Z) -> (B, C, H, W) in [-1, 1] and D: (B, C, H, W) -> (B,), as cfg describes them.

    Reads model, arch, size, channels, z_dim, width, norm_d, init_d, base, gp_weight. UserError for
    a size that no pair is defined at.
    """
    if not 8 <= cfg.size <= 4096 or cfg.size & (cfg.size - 1):
        raise UserError(f"--size {cfg.size}: the networks need a power of two from 8 to 4096")
    if cfg.base < 1 or cfg.base > cfg.size // 2 or cfg.base & (cfg.base - 1):
        raise UserError(f"--base {cfg.base}: must be a power of two from 1 to {cfg.size // 2}")
    shape = (cfg.size, cfg.channels, cfg.z_dim, cfg.width, cfg.norm_d)
    if cfg.arch == "resnet":
        if cfg.model != "wgangp":
            raise UserError("--arch resnet goes with --model wgangp")
        return resnet_pair(*shape)
    return dcgan_pair(*shape, cfg.init_d, cfg.base, sagan=cfg.model == "sagan",
                      penalty=cfg.gp_weight > 0)


# ----------------------------------------------------------------------------------- losses

# Per-sample terms to minimise: D's on reals and on negatives (-f1 and -f2 of eq. (1)), and G's.
LOSSES = {
    "wgan": (lambda d: -d, lambda d: d, lambda d: -d),
    "lsgan": (lambda d: (d - 1) ** 2, lambda d: d ** 2, lambda d: (d - 1) ** 2),
    "hinge": (lambda d: F.relu(1 - d), lambda d: F.relu(1 + d), lambda d: -d),
    "ns": (lambda d: F.softplus(-d), F.softplus, lambda d: F.softplus(-d)),  # non-saturating
}


def gradient_penalty(D, x_real, x_neg, eps=None):
    """Mean of (|grad D| - 1)^2 at random points between pairs, Gulrajani et al. (2017), eq. 3.

    x_real, x_neg (B, C, H, W) -> scalar with a graph, ready to be added to D's loss. `eps`
    (B, 1, 1, 1) in [0, 1] says where between the two; uniform by default.
    """
    if eps is None:
        eps = torch.rand(len(x_real), 1, 1, 1, device=x_real.device)
    x_hat = torch.lerp(x_real, x_neg, eps).requires_grad_()
    grad, = torch.autograd.grad(D(x_hat).sum(), x_hat, create_graph=True)
    return ((grad.flatten(1).norm(dim=1) - 1) ** 2).mean()


# ------------------------------------------------------------------------------- regularizers
# Pure functions of tensors: copy them into any GAN.


def pixel_average(x):
    """Average of every image with a different one of the batch, eq. (12).

    x (B, ...), B >= 2, in random order -> same shape: row i is (x_i + x_{i-1}) / 2.
    """
    if len(x) < 2:
        raise ValueError("pixel_average needs at least two images: each is paired with another")
    return (x + x.roll(1, 0)) / 2


def pixel_and(x, y):
    """Pixel-wise AND of two batches, lit where both are: the minimum, also for grey values."""
    return torch.minimum(x, y)


def pixel_or(x, y):
    """Pixel-wise OR of two batches, lit where either is: the maximum, also for grey values."""
    return torch.maximum(x, y)


def pcr_loss(loss_real, loss_fake, loss_comb, comb_weight=0.5):
    """D's loss under Pixel-wise Combination Regularization, eq. (13).

    Takes D's per-sample losses on reals, fakes and combinations, each (B,), whatever the GAN's
    loss is; half of the negative weight (`comb_weight`) goes to the combinations. -> scalar
    """
    negative = (1 - comb_weight) * loss_fake.mean() + comb_weight * loss_comb.mean()
    return loss_real.mean() + negative


def sample_correction(x_fake, realism, threshold, n_keep=None):
    """Sample Correction (Section 5.1): take realistic fakes out of D's negative batch.

    x_fake (M, ...); realism (M,), higher is more realistic; a fake is realistic above `threshold`.
    n_keep None discards: returns x_fake and weights (M,) that are 0 on realistic fakes and of
    mean 1 over the batch, so that (weight * loss).mean() is the mean over the kept ones (0 if
    none is left). n_keep B <= M replaces: the first B are the batch, the rest are spares; a
    realistic fake makes way for the least realistic spare; returns (B, ...) and weights of 1.
    Shapes are fixed and nothing is read back to the host.
    """
    realistic = realism > threshold
    if n_keep is None:
        keep = (~realistic).float()
        return x_fake, keep * (len(keep) / keep.sum().clamp(min=1))
    spare = torch.arange(len(x_fake), device=x_fake.device) >= n_keep
    key = torch.where(realistic | spare, realism.float(), -torch.inf)   # -inf: stays in any case
    chosen = key.topk(n_keep, largest=False).indices
    return x_fake[chosen], torch.ones_like(key[:n_keep])


# ------------------------------------------------------------------------------------ trainer


def to_float(x):
    """uint8 [0, 255] -> float32 [-1, 1], same shape."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], rounded; the inverse of to_float."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def draw(G, z):
    """Images of G for latents z (N, Z): uint8 (N, C, H, W).

    UNSPECIFIED: G's batch norm while scoring. Running statistics, so that an image depends on its
    own z alone.
    """
    training = G.training
    x = G.eval()(z)
    G.train(training)
    if not x.isfinite().all():  # as uint8 it would look like an image
        raise UserError("G draws images that are not finite")
    return to_uint8(x)


def generate(G, n, z_dim, seed=0, batch=256):
    """Yield n images of G as uint8 batches (<= batch, C, H, W) on G's device, from fixed z."""
    device = next(G.parameters()).device
    gen = generator(seed, device)
    for i in range(0, n, batch):
        yield draw(G, torch.randn(min(batch, n - i), z_dim, generator=gen, device=device))


def check_batch(cfg, images):
    """UserError if a batch needs more images than there are."""
    if cfg.batch > len(images):
        raise UserError(f"--batch {cfg.batch}: only {len(images)} training images")


class Trainer:
    """G, D, their Adams, and one update of each: the step that every script runs.

    data: uint8 (N, C, H, W). `combine(trainer, x_real) -> x_comb (B, C, H, W)` gives the extra
    negatives of eq. (13), None for none. `correct(trainer, x_fake) -> (x_fake, weight (B,))` is
    Sample Correction, None for none. `penalise(trainer, x_real) -> scalar` is added to D's loss.
    `optimizer` has the arguments of Adam. Raises UserError if the batch is larger than the data.

    Under --data-parallel every process holds the same networks and random stream and works on its
    shard of each batch; gradients and batch norm are those of the whole batch, so that the numbers
    are one process's up to rounding; the hooks see a shard (PCR pairs and SC counts within it).
    """

    METRICS = ("d_loss", "g_loss", "d_real", "d_fake", "d_comb", "gp", "kept", "d_grad", "g_grad")

    def __init__(self, cfg, data, device, combine=None, correct=None, penalise=None,
                 optimizer=torch.optim.Adam):
        check_batch(cfg, data)
        self.cfg, self.device = cfg, device
        self.combine, self.correct, self.penalise = combine, correct, penalise
        cfg.data_hash = digest(data)    # in every config.json and checkpoint from here on
        self.data = data.to(device)
        self.rank, self.world = 0, 1
        if cfg.data_parallel:
            self.rank, self.world = join(), dist.get_world_size()
            if cfg.batch % self.world or cfg.batch < 2 * self.world:
                raise UserError(f"--batch {cfg.batch}: {self.world} processes need a multiple of "
                                f"{self.world} and two images each")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.G, self.D = (net.to(device, memory_format=torch.channels_last)
                              for net in build(cfg))
        for layer in (*self.G.modules(), *self.D.modules()):
            if self.world > 1 and type(layer) is nn.BatchNorm2d:
                layer.__class__ = SharedBatchNorm
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False) if cfg.ema_beta else None
        self.opt_g, self.opt_d = (
            optimizer(net.parameters(), lr, (cfg.beta1, cfg.beta2), fused=True)
            for net, lr in ((self.G, cfg.lr_g), (self.D, cfg.lr_d)))
        if cfg.engine == "compile":
            if cfg.gp_weight or penalise:
                raise UserError("--engine compile: torch.compile cannot differentiate twice, as a "
                                "gradient penalty must; take --engine eager")
            self.G.compile()
            self.D.compile()
        self.gen = generator(cfg.seed, device)
        self.on_real, self.on_fake, self.for_g = LOSSES[cfg.loss]
        self.step = self.d_steps = 0

    def images(self, index, data=None):
        """Rows `index` (B,) of the training data, or of `data`, -> (B, C, H, W) in [-1, 1]."""
        x = to_float((self.data if data is None else data)[index])
        if self.cfg.flip:
            mirror = torch.rand(len(x), 1, 1, 1, generator=self.gen, device=self.device) < 0.5
            x = torch.where(mirror, x.flip(3), x)
        return x.contiguous(memory_format=torch.channels_last)

    def real(self):
        """A batch of training images."""
        # UNSPECIFIED: how batches are drawn. Without replacement within a batch (so that PCR never
        # pairs an image with itself), afresh for each batch.
        keys = torch.rand(len(self.data), generator=self.gen, device=self.device)
        return self.images(keys.topk(self.cfg.batch).indices)

    def latent(self, n):
        """z ~ N(0, I), (n, Z)."""
        return torch.randn(n, self.cfg.z_dim, generator=self.gen, device=self.device)

    def fake(self, n=None):
        """Images of G for fresh latents, (n or B, C, H, W)."""
        return self.G(self.shard(self.latent(n or self.cfg.batch)))

    def shard(self, x):
        """The part of a whole batch (B, ...) that this process works on."""
        size = len(x) // self.world
        return x[self.rank * size:(self.rank + 1) * size]

    def agree(self, caught):
        """The first signal that any of the processes caught, 0 for none: all stop together."""
        if self.world == 1:
            return caught[0] if caught else 0
        first = torch.tensor(caught[:1] or [0])
        dist.all_reduce(first, dist.ReduceOp.MAX)
        return int(first)

    def average(self, tensors):
        """Replace each tensor by its mean over the processes."""
        if self.world > 1:
            whole = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(whole)
            for t, mean in zip(tensors, (whole / self.world).split([t.numel() for t in tensors])):
                t.copy_(mean.view_as(t))

    def shown(self, n=64):
        """Images to look at, the same latents every time: uint8 (<= n, C, H, W)."""
        return torch.cat(list(generate(self.G, n, self.cfg.z_dim, seed=1)))

    def fakes(self, n):
        """n images of each generator, from the same latents, as `generate` yields them:
        {"": of G, "_ema": of its average, if there is one}."""
        nets = {"": self.G} | ({"_ema": self.G_ema} if self.G_ema is not None else {})
        return {suffix: generate(G, n, self.cfg.z_dim) for suffix, G in nets.items()}

    def d_update(self):
        """One update of D -> (d_loss, d_real, d_fake, d_comb, gp, kept, d_grad), 0-d tensors."""
        cfg, D = self.cfg, self.D
        x_real = self.shard(self.real())
        with torch.no_grad():
            x_fake, weight, x_comb = self.fake(), None, None
            if self.correct:
                x_fake, weight = self.correct(self, x_fake)
            if self.combine:
                x_comb = self.combine(self, x_real)
        # UNSPECIFIED: batch norm in D. Each kind of image is normalised by itself, as in DCGAN.
        d_real, d_fake = D(x_real), D(x_fake)
        loss_fake = self.on_fake(d_fake) if weight is None else weight * self.on_fake(d_fake)
        gp = d_comb = d_real.new_zeros(1)
        if x_comb is None:
            d_loss = self.on_real(d_real).mean() + loss_fake.mean()
        else:
            d_comb = D(x_comb)
            d_loss = pcr_loss(self.on_real(d_real), loss_fake, self.on_fake(d_comb),
                              cfg.comb_weight)
        if cfg.gp_weight:
            # UNSPECIFIED: whether the penalty under SC spares the discarded fakes. It does not: it
            # holds between reals and whatever G draws.
            x_neg = x_fake
            if cfg.gp_comb and x_comb is not None:
                # UNSPECIFIED: whether the penalty reaches the combinations. By default it does
                # not; with --gp-comb half of its lines end in a combination.
                x_neg = torch.cat([x_comb[::2], x_fake[1::2]])
            eps = torch.rand(cfg.batch, 1, 1, 1, generator=self.gen, device=self.device)
            gp = gradient_penalty(D, x_real, x_neg, self.shard(eps))
            d_loss = d_loss + cfg.gp_weight * gp
        if self.penalise:
            d_loss = d_loss + self.penalise(self, x_real)
        self.opt_d.zero_grad()
        d_loss.backward()
        self.average([p.grad for p in D.parameters()])
        self.opt_d.step()
        kept = d_loss.new_ones(()) if weight is None else (weight > 0).float().mean()
        return (d_loss, d_real.mean(), d_fake.mean(), d_comb.mean(), gp.mean(), kept,
                grad_norm(D))

    def g_update(self):
        """One update of G (and of its average) -> (g_loss, g_grad), 0-d tensors."""
        g_loss = self.for_g(self.D(self.fake())).mean()
        self.opt_g.zero_grad()
        g_loss.backward(inputs=list(self.G.parameters()))
        self.average([p.grad for p in self.G.parameters()])
        self.opt_g.step()
        if self.G_ema is not None:
            with torch.no_grad():  # weights are averaged, batch-norm statistics copied
                torch._foreach_lerp_(list(self.G_ema.parameters()), list(self.G.parameters()),
                                     1 - self.cfg.ema_beta)
                for mean, now in zip(self.G_ema.buffers(), self.G.buffers()):
                    mean.copy_(now)
        return g_loss, grad_norm(self.G)

    def set_lr(self):
        """Step sizes of this update: constant, or falling to 0 over the second half of the run."""
        left = min(1, 2 - 2 * self.step / self.cfg.steps) if self.cfg.lr_decay else 1
        for opt, lr in ((self.opt_g, self.cfg.lr_g), (self.opt_d, self.cfg.lr_d)):
            for group in opt.param_groups:
                if isinstance(group["lr"], torch.Tensor):               # read by a CUDA graph
                    group["lr"].fill_(lr * left)
                else:
                    group["lr"] = lr * left

    def iterate(self):
        """n_dis updates of D and one of G -> the METRICS, a (9,) tensor left on the device."""
        for _ in range(self.cfg.n_dis):
            d_loss, *d_rest = self.d_update()
        g_loss, g_grad = self.g_update()
        metrics = torch.stack([d_loss, g_loss, *d_rest, g_grad]).detach()
        self.average([metrics])
        return metrics

    def update(self):
        """`iterate` at this update's step sizes, counted."""
        self.set_lr()
        metrics = self.iterate()
        self.step += 1
        self.d_steps += self.cfg.n_dis
        return metrics

    def capture(self):
        """Record `iterate` as one CUDA graph, to be replayed by `update` from here on.

        The same Python code and the same random stream as without; not run on a GPU yet. Hooks must
        read nothing back to the host and keep no count of their own.
        """
        if self.device.type != "cuda":
            raise UserError(f"--engine graph: needs a CUDA device, --device is {self.device}")
        opts = (self.opt_g, self.opt_d)
        for opt in opts:
            for group in opt.param_groups:
                group |= {"capturable": True, "lr": torch.tensor(float(group["lr"]),
                                                                 device=self.device)}
        nets = [net for net in (self.G, self.D, self.G_ema) if net is not None]

        def tensors():
            return [*(t for net in nets for t in net.state_dict().values()),
                    *(t for opt in opts for slots in opt.state.values() for t in slots.values())]

        before, random_state = [t.clone() for t in tensors()], self.gen.get_state()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):                   # a warm-up off the main stream, undone
            for _ in range(3):
                self.iterate()
        torch.cuda.current_stream(self.device).wait_stream(side)
        with torch.no_grad():                           # Adam's slots, new in the warm-up, are 0
            for i, t in enumerate(tensors()):
                t.copy_(before[i]) if i < len(before) else t.zero_()
        self.gen.set_state(random_state)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.gen)
        with torch.cuda.graph(graph):
            metrics = self.iterate()

        def replay():
            graph.replay()
            return metrics

        self.iterate = replay

    def state(self):
        """Everything a resumed run needs, as plain tensors, numbers and strings."""
        nets = {k: getattr(self, k).state_dict() for k in ("G", "D", "opt_g", "opt_d")}
        return {**nets, "G_ema": self.G_ema.state_dict() if self.G_ema is not None else None,
                "step": self.step, "d_steps": self.d_steps, "rng": self.gen.get_state(),
                "config": plain(self.cfg)}

    def load(self, state):
        if len(state["rng"]) != len(self.gen.get_state()):
            raise UserError("the checkpoint was made on another kind of --device")
        for k in ("G", "D", "opt_g", "opt_d"):
            getattr(self, k).load_state_dict(state[k])
        for group in (*self.opt_g.param_groups, *self.opt_d.param_groups):
            group |= {"lr": float(group["lr"]), "capturable": False}    # as before `capture`
        if self.G_ema is not None:
            self.G_ema.load_state_dict(state["G_ema"])
        self.step, self.d_steps = state["step"], state["d_steps"]
        self.gen.set_state(state["rng"].cpu())


def grad_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


def sample_checkpoint(path, n, out, device):
    """Draw n images from a checkpoint's G into the picture `out`; of its codes, if it has some."""
    if not 1 <= n <= 10 ** 5 or out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--n {n} --out {out}: need an image at least, and a name like grid.png")
    state = read_checkpoint(path)
    cfg = argparse.Namespace(**state["config"])
    G = build(cfg)[0].to(device)
    G.load_state_dict(state["G"])
    images = (draw(G, state["codes"][:n].to(device)) if "codes" in state
              else torch.cat(list(generate(G, n, cfg.z_dim))))
    save_grid(images, out)
    print(out)
    return {"out": str(out), "n": n, "step": state["step"]}
