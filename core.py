"""The core: networks, losses, the two cures as pure functions of tensors, one update of a GAN.

Letters in shapes: B batch, C channels, H height, W width, Z latent size, N images, F features.
Images are uint8 in [0, 255] where they are stored and float32 in [-1, 1] where a network sees
them. `step` counts updates of G, `d_steps` updates of D. A function of the trainer takes it as
`t` and may use `t.G`, `t.D`, `t.cfg`, `t.gen` (its random stream), `t.latent(n)`, `t.fake()`.
"""
import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


class UserError(ValueError):
    """A user's mistake. The message is the one line shown before exit code 2."""


def generator(seed, device="cpu"):
    """A random stream of its own, so that evaluation never disturbs training."""
    return torch.Generator(device).manual_seed(seed)


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
    """LeakyReLU of slope 0.2, written as a constant factor.

    PyTorch's own layer makes the second derivative of a gradient penalty send zeros through all
    of D, a sixth of the arithmetic of D's update. Without a penalty PyTorch's is faster.
    """

    def forward(self, x):
        return x * (x > 0).to(x.dtype).clamp(0.2)


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


def dcgan_pair(size, channels, z_dim, width, base=4, norm_d="none", init_d="dcgan", sagan=False,
               penalty=False):
    """G and D of Radford et al. (2015): one 4x4, stride-2 level per doubling above `base` px.

    UNSPECIFIED: the architectures. At 32 px G is 256-128-64 and D 64-128-256 channels, at 64 px
    there is one level more: networks of that size fit the published baselines. SAGAN is
    unconditional here: the same pair under spectral norm, with attention at half the image size.
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


def build(cfg):
    """G: (B, Z) -> (B, C, H, W) in [-1, 1] and D: (B, C, H, W) -> (B,), as cfg describes them.

    Reads arch, size, channels, z_dim, width, base, norm_d, init_d, gp_weight, and seed for the
    first weights. Raises UserError for a size at which no pair is defined.
    """
    if not 8 <= cfg.size <= 4096 or cfg.size & (cfg.size - 1):
        raise UserError(f"--size {cfg.size}: the networks need a power of two from 8 to 4096")
    if cfg.base < 1 or cfg.base > cfg.size // 2 or cfg.base & (cfg.base - 1):
        raise UserError(f"--base {cfg.base}: must be a power of two from 1 to {cfg.size // 2}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(cfg, "seed", 0))
        return dcgan_pair(cfg.size, cfg.channels, cfg.z_dim, cfg.width, cfg.base, cfg.norm_d,
                          cfg.init_d, sagan=cfg.arch == "sagan", penalty=cfg.gp_weight > 0)


# ------------------------------------------------------------------- losses and the two cures
# Pure functions of tensors: copy them into any GAN.

# Per-sample terms to minimise: D's on reals and on negatives (-f1 and -f2 of eq. (1)), and G's.
LOSSES = {
    "wgan": (lambda d: -d, lambda d: d, lambda d: -d),
    "lsgan": (lambda d: (d - 1) ** 2, lambda d: d ** 2, lambda d: (d - 1) ** 2),
    "hinge": (lambda d: F.relu(1 - d), lambda d: F.relu(1 + d), lambda d: -d),
    "ns": (lambda d: F.softplus(-d), F.softplus, lambda d: F.softplus(-d)),  # non-saturating
}


def gradient_penalty(D, x_real, x_neg, eps):
    """Mean of (|grad D| - 1)^2 at points between pairs, Gulrajani et al. (2017), eq. 3.

    x_real, x_neg (B, ...) -> scalar with a graph, ready to be added to D's loss. eps (B, 1, ...),
    uniform in [0, 1], says where between the two.
    """
    return ((slopes(D, torch.lerp(x_real, x_neg, eps)).norm(dim=1) - 1) ** 2).mean()


def slopes(D, x):
    """Gradients of D at points x (B, ...) -> (B, F) with a graph."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(D(x).sum(), x, create_graph=True)[0].flatten(1)


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


# ------------------------------------------------------------------- what the trainer is given


def d_loss(t, x_real, x_fake, x_comb=None, weight=None):
    """D's loss: eq. (1), or eq. (13) where combinations are given, with the gradient penalty.

    x_real, x_fake, x_comb (B, ...); weight (B,) multiplies the fakes' terms, as
    `sample_correction` returns it. -> scalar with a graph, {name: 0-d tensor} to be logged.
    """
    cfg, (on_real, on_fake, _) = t.cfg, LOSSES[t.cfg.loss]
    # UNSPECIFIED: batch norm in D. Each kind of image is normalised by itself, as in DCGAN.
    d_real, d_fake = t.D(x_real), t.D(x_fake)
    logs = {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
    loss_fake = on_fake(d_fake)
    if weight is not None:
        loss_fake, logs["kept"] = weight * loss_fake, (weight > 0).float().mean()
    if x_comb is None:
        loss = on_real(d_real).mean() + loss_fake.mean()
    else:
        d_comb = t.D(x_comb)
        loss = pcr_loss(on_real(d_real), loss_fake, on_fake(d_comb), cfg.comb_weight)
        logs["d_comb"] = d_comb.mean()
    if cfg.gp_weight:
        # UNSPECIFIED: whether the penalty under SC spares the discarded fakes. It does not: it
        # holds between reals and whatever G draws.
        x_neg = x_fake
        if cfg.gp_comb and x_comb is not None:
            # UNSPECIFIED: whether the penalty reaches the combinations. By default it does not;
            # with --gp-comb half of its lines end in a combination.
            x_neg = torch.cat([x_comb[::2], x_fake[1::2]])
        eps = torch.rand(len(x_real), *[1] * (x_real.dim() - 1), generator=t.gen, device=t.device)
        logs["gp"] = gradient_penalty(t.D, x_real, x_neg, eps)
        loss = loss + cfg.gp_weight * logs["gp"]
    return loss, logs


def r1(t, x_real, x_fake):
    """`d_loss` with R1 (Mescheder, Geiger, Nowozin 2018, eq. 9): r1_weight / 2 times the mean of
    D's squared gradient at the reals (B, ...)."""
    loss, logs = d_loss(t, x_real, x_fake)
    logs["r1"] = t.cfg.r1_weight / 2 * slopes(t.D, x_real).square().sum(1).mean()
    return loss + logs["r1"], logs


def g_loss(t):
    """G's loss of eq. (1) on a fresh batch -> scalar with a graph, {} to be logged."""
    return LOSSES[t.cfg.loss][2](t.D(t.G(t.latent(t.cfg.batch)))).mean(), {}


def normal_prior(t, n):
    """z ~ N(0, I), (n, Z)."""
    return torch.randn(n, t.cfg.z_dim, generator=t.gen, device=t.device)


def adam(params, lr, betas):
    return torch.optim.Adam(params, lr, betas, fused=True)


# ------------------------------------------------------------------------------------ trainer


def to_float(x):
    """uint8 [0, 255] -> float32 [-1, 1], same shape."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], rounded; the inverse of to_float."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def generate(G, z, batch=256):
    """Yield what G makes of latents z (N, Z), at most `batch` at a time: images (B, C, H, W) as
    uint8, anything else as it comes. Raises UserError for numbers that are not finite.

    UNSPECIFIED: G's batch norm while scoring. Running statistics, so that an image depends on its
    own z alone.
    """
    for part in z.split(batch):
        training = G.training
        x = G.eval()(part)
        G.train(training)
        if not x.isfinite().all():  # as uint8 it would look like an image
            raise UserError("G draws images that are not finite")
        yield to_uint8(x) if x.dim() == 4 else x


def draw_index(n, batch, gen, device):
    """`batch` different whole numbers below n, in random order: int64 (batch,).

    Twice as many and 32 more are drawn, and repeats left out: no work that grows with n, no number
    read back. From n = 8 batches on, too few are left less than once in 1e30 times.
    """
    if n < 8 * batch:
        return torch.rand(n, generator=gen, device=device).topk(batch).indices
    index = torch.randint(n, (2 * batch + 32,), generator=gen, device=device)
    value, order = index.sort(stable=True)
    again = torch.zeros_like(index).scatter(0, order[1:], (value[1:] == value[:-1]).long())
    return index[again.argsort(stable=True)[:batch]]


def in_bf16(net):
    """Let the passes of `net` in training mode run in bfloat16 and return float32. In evaluation
    mode, in which images are drawn and scored, nothing changes. Its weights stay float32."""
    forward = net.forward

    def cast(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=net.training):
            return forward(x).float()
    net.forward = cast


def check_batch(cfg, n):
    """UserError if a batch needs more than the n training images there are."""
    if cfg.batch > n:
        raise UserError(f"--batch {cfg.batch}: only {n} training images")


def grad_norm(net):
    return torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


class Trainer:
    """G, D, their optimizers, and one update of each: the step that every script runs.

    data: training images uint8 (N, C, H, W), or points float (N, ...), on the device to train on;
    G and D: networks of any kind, moved there. What may differ between two methods is given as
    functions of the trainer:
      d_loss(t, x_real, x_fake) -> (loss, {name: 0-d tensor}), an arm; x_fake has no graph
      g_loss(t) -> (loss, {name: 0-d tensor}), G's loss, on latents that it draws itself
      prior(t, n) -> z, the latents' law
    optimizer(params, lr, betas) makes those of G and D. extra, {name: (network, optimizer)}, are
    further networks in `t.extra`, which g_loss trains together with G, and which are saved with
    the rest. Raises UserError if the batch is larger than the data.
    """

    def __init__(self, cfg, data, G, D, d_loss=d_loss, g_loss=g_loss, prior=normal_prior,
                 optimizer=adam, extra=None):
        check_batch(cfg, len(data))
        self.cfg, self.data, self.device = cfg, data, data.device
        self.d_loss, self.g_loss, self.prior = d_loss, g_loss, prior
        self.G, self.D = (net.to(self.device, memory_format=torch.channels_last) for net in (G, D))
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False) if cfg.ema_beta else None
        if getattr(cfg, "precision", "fp32") == "bf16":     # the copy first: it has its own passes
            for net in filter(None, (self.G, self.D, self.G_ema)):
                in_bf16(net)
        self.spectral = [m for net in (self.G, self.D) for m in net.modules()
                         if parametrize.is_parametrized(m)]
        self.opt_g, self.opt_d = (optimizer(net.parameters(), lr, (cfg.beta1, cfg.beta2))
                                  for net, lr in ((self.G, cfg.lr_g), (self.D, cfg.lr_d)))
        self.extra = {name: net for name, (net, _) in (extra or {}).items()}
        self.opts = [self.opt_g, self.opt_d, *(opt for _, opt in (extra or {}).values())]
        self.lrs = [[group["lr"] for group in opt.param_groups] for opt in self.opts]
        self.gen = generator(cfg.seed, self.device)
        self.step = self.d_steps = 0

    def images(self, index, data=None):
        """Rows `index` (B,) of the training data, or of `data`; images as floats in [-1, 1]."""
        x = (self.data if data is None else data)[index]
        if x.dtype != torch.uint8:
            return x
        x = to_float(x)
        if self.cfg.flip:
            mirror = torch.rand(len(x), 1, 1, 1, generator=self.gen, device=self.device) < 0.5
            x = torch.where(mirror, x.flip(3), x)
        return x.contiguous(memory_format=torch.channels_last)

    def real(self):
        """A batch of training images."""
        # UNSPECIFIED: how batches are drawn. Without replacement within a batch (so that PCR never
        # pairs an image with itself), afresh for each batch.
        return self.images(draw_index(
            len(self.data), self.cfg.batch, self.gen, self.device))

    def latent(self, n):
        """n latents of the prior, from the trainer's own random stream."""
        return self.prior(self, n)

    @torch.no_grad()
    def fake(self):
        """A batch of G's images for fresh latents, without a graph."""
        return self.G(self.latent(self.cfg.batch))

    def latents(self, n, seed=0):
        """n latents of the prior from a stream of their own: the same ones every time."""
        own, self.gen = self.gen, generator(seed, self.device)
        try:
            return self.prior(self, n)
        finally:
            self.gen = own

    def fakes(self, n):
        """n images of each generator from the same latents, in batches: {"": of G, "_ema": of its
        average, if there is one}."""
        nets, z = {"": self.G, "_ema": self.G_ema}, self.latents(n)
        return {name: generate(G, z) for name, G in nets.items() if G is not None}

    def preview(self, n=64):
        """n images to look at, for the same latents every time."""
        return torch.cat(list(generate(self.G, self.latents(n, seed=1))))

    @contextlib.contextmanager
    def normalised(self):
        """Within it, spectral norm normalises every weight once, in float32, for all calls.

        UNSPECIFIED: how often the power iteration runs. Once an update, as in Miyato et al.
        (2018), algorithm 1, so that D judges reals, fakes and combinations by the same weights.
        """
        with parametrize.cached() if self.spectral else contextlib.nullcontext():
            for layer in self.spectral:
                _ = layer.weight    # now, with a graph: a first call may be without one
            yield

    def d_update(self):
        """One update of D -> what is logged, {name: 0-d tensor}."""
        with self.normalised():
            loss, logs = self.d_loss(self, self.real(), self.fake())
        self.opt_d.zero_grad()
        loss.backward()
        self.opt_d.step()
        return {"d_loss": loss, **logs, "d_grad": grad_norm(self.D)}

    def g_update(self):
        """One update of G, its average and the extra networks -> what is logged."""
        with self.normalised():
            loss, logs = self.g_loss(self)
        opts = [self.opt_g, *self.opts[2:]]
        for opt in opts:
            opt.zero_grad()
        loss.backward(inputs=[p for net in (self.G, *self.extra.values())
                              for p in net.parameters() if p.requires_grad])
        for opt in opts:
            opt.step()
        if self.G_ema is not None:
            with torch.no_grad():  # weights are averaged, batch-norm statistics copied
                torch._foreach_lerp_(list(self.G_ema.parameters()), list(self.G.parameters()),
                                     1 - self.cfg.ema_beta)
                for mean, now in zip(self.G_ema.buffers(), self.G.buffers()):
                    mean.copy_(now)
        return {"g_loss": loss, **logs, "g_grad": grad_norm(self.G)}

    def update(self):
        """n_dis updates of D and one of G -> {name: 0-d tensor}, left on the device."""
        # Step sizes are constant, or fall to 0 over the second half of the run.
        left = min(1, 2 - 2 * self.step / self.cfg.steps) if self.cfg.lr_decay else 1
        for opt, lrs in zip(self.opts, self.lrs):
            for group, lr in zip(opt.param_groups, lrs):
                group["lr"] = lr * left
        for _ in range(self.cfg.n_dis):
            logs = self.d_update()
        logs |= self.g_update()
        self.step += 1
        self.d_steps += self.cfg.n_dis
        return {name: value.detach() for name, value in logs.items()}

    def state(self):
        """Everything a resumed run needs, as tensors, numbers and strings."""
        return {**{k: getattr(self, k).state_dict() for k in ("G", "D", "opt_g", "opt_d")},
                "G_ema": self.G_ema.state_dict() if self.G_ema is not None else None,
                "extra": {k: net.state_dict() for k, net in self.extra.items()},
                "extra_opts": [opt.state_dict() for opt in self.opts[2:]],
                "step": self.step, "d_steps": self.d_steps, "rng": self.gen.get_state()}

    def load(self, state):
        """Go on from a `state`. Raises UserError for one of another kind of device."""
        if len(state["rng"]) != len(self.gen.get_state()):
            raise UserError("the checkpoint was made on another kind of --device")
        for k in ("G", "D", "opt_g", "opt_d"):
            getattr(self, k).load_state_dict(state[k])
        if self.G_ema is not None:
            self.G_ema.load_state_dict(state["G_ema"])
        for k, net in self.extra.items():
            net.load_state_dict(state["extra"][k])
        for opt, saved in zip(self.opts[2:], state.get("extra_opts", [])):
            opt.load_state_dict(saved)
        self.step, self.d_steps = state["step"], state["d_steps"]
        self.gen.set_state(state["rng"].cpu())
