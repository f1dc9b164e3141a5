"""Theorems 1 to 3, checked: how noisy a WGAN's generator is, and what a Lipschitz D must accept.

The claims (Sections 3.3 and 4.3, Appendices A to D): batches of m leave the generator a variance of
Theta(1/m), with constant steps (eq. 8) and with steps 1/t (eq. 10), and an L-Lipschitz D accepts
averages of close real images (eq. 11). Here are the exact laws and simulations that must agree:

    python theory_sde.py

Expected: all |z| below 4.5 and no bound violated, exit code 1 otherwise, in two minutes on one CPU
core. Each coordinate of the model is a copy of this game, k = 1, 2, ...; x = eta mu:

    w     <- w + eta (xi - theta)       eq. (5), D's ascent    xi ~ N(0, 2/m): mean of m reals
    theta <- theta + mu w               eq. (6), G's descent           minus mean of m latents

DEVIATION: the constraint ||w|| <= 1 is enforced only by `clip`. Without noise it holds by itself
(eq. 31); with noise it does not, and eq. (25) drops it too.
"""
import math
from argparse import Namespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import core
import geometry
import harness
import sweep

PRESETS = {     # runs of a check; the fixes' steps eta = mu and iterations; Adam steps of a critic
    "paper": dict(paths=400_000, eta=0.05, horizon=10_000, critic_steps=400),
    "smoke": dict(paths=2_000, eta=0.2, horizon=400, critic_steps=20),
}
PRESETS["cpu"] = PRESETS["paper"]
OWN = {"paths": (int, 1000, 10 ** 8, "simulated runs of a check, at least 1000")}
Z_MAX = 4.5     # of about 1000 z; a correct program fails by chance in less than 1% of all seeds
CHUNK = 65_536  # paths at a time, so that their state stays in the processor's cache

# ----------------------------------------------------- laws: m Var theta, around the mean of theta


def flow_law(t, eta=1.0, mu=1.0):
    """Theorem 1, eq. (8) solved: the flow (32). For unit steps 2 t^3 / 3 at first and t later."""
    speed = np.sqrt(eta * mu)
    return eta * mu * (t - np.sin(speed * t) * np.cos(speed * t) / speed)


def inverse_t_law(t):
    """Theorem 2, eq. (57) solved: steps 1/t, t >= 1. Cycles in ln t for ever, 1 +- 1/sqrt(5)."""
    return 1 - 0.8 / t - (np.cos(2 * np.log(t)) + 2 * np.sin(2 * np.log(t))) / 5


def clock(angle, power):
    """When (t >= 1) a flow with both steps t^-power, 0 <= power <= 1, has turned by angle >= 0."""
    return np.exp(angle) if power == 1 else (1 + (1 - power) * angle) ** (1 / (1 - power))


def power_law(angle, power):
    """That flow: 2 int_1^t s^(-2 power) sin^2(angle(t) - angle(s)) ds, to 1e-9 up to angle 100."""
    nodes, weights = np.polynomial.legendre.leggauss(400)   # in the angle: ds = s^power d angle
    half = np.asarray(angle, float)[..., None] / 2
    density = clock(half * (1 + nodes), power) ** -power * np.sin(half * (1 - nodes)) ** 2
    return (2 * half * density * weights).sum(-1)


def alternating_law(k, eta, mu):
    """Eqs. (5) and (6) as they stand, x < 4; each iteration turns by p. Grows like k for ever."""
    x, p = eta * mu, 2 * np.arcsin(np.sqrt(eta * mu) / 2)
    return x / (1 - x / 4) * (k - np.sin(k * p) * np.cos((k + 1) * p) / np.sin(p))


def simultaneous_law(k, eta, mu):
    """The same with G moving on the old w: plain Euler-Maruyama. Grows like (1 + x)^k."""
    x, turn = eta * mu, (1 + 1j * np.sqrt(eta * mu)) ** 2
    return (1 + x) ** k - 1 - x * ((turn ** k - 1) / (turn - 1)).real


def polyak_law(k, x):
    """The mean of theta_1 to theta_k of eqs. (5) and (6) with eta = mu, x < 4: about 3/k."""
    p = 2 * np.arcsin(np.sqrt(x) / 2)
    c, once = np.cos(p / 2), np.sin(k * p / 2) * np.cos((k + 2) * p / 2) / np.sin(p / 2)
    twice = k / 2 + np.sin(k * p) * np.cos((k + 2) * p) / (2 * np.sin(p))
    return 2 * (k * c**2 - 2 * c * once + twice) / (k * c) ** 2


SETTLED = {     # limits of the fixes below for k to infinity, where momentum is -b
    "r1": lambda eta, mu, gamma: (      # 2 eta gamma + x < 4
        2 * mu / gamma * (2 - eta * gamma) / (4 - 2 * eta * gamma - eta * mu)),
    "omd": lambda x: (                  # x < 1/3
        2 * (2 + 9 * x + 30 * x**2 + 27 * x**3) / ((1 + x) * (1 - 3 * x) * (4 + 9 * x))),
    "eg": lambda x: 2 * (2 + x - 2 * x**2 + x**3) / ((1 - x) * (4 - 3 * x + x**2)),     # x < 1
    "eg, fresh": lambda x: (            # x < 1
        2 * (2 + x + 3 * x**2 - 3 * x**3 + x**4) / ((1 - x**2) * (4 - 3 * x + x**2))),
    "momentum": lambda x, b: (          # both brackets of the divisor positive
        (4 * (1 - b**2)**3 + 4 * b * x * (3 * b**2 - b**3 - b - 1) + 2 * b**2 * x**2)
        / (b * (4 * (1 - b)**2 - x) * (2 * (1 - b) * (1 + b)**2 - b * x))),
}

# --------------------------------------------------- methods: one iteration, as one would code it
# Variables are rows of the unit matrix, so that the update itself yields the matrix (S, S + xi's)
# from the state (w, ..., theta) and the batch-mean differences xi to the next state. The last entry
# is what is reported. A method that changes with k is a function from k to such a matrix.


def sgd(eta, mu, gamma=0.0, n_dis=1, alternating=True):
    """Eqs. (5) and (6), with R1, gamma w^2 / 2, and n_dis updates of D per update of G."""
    w, theta, *xi = np.eye(2 + n_dis)
    w_new = w
    for noise in xi:
        w_new = w_new + eta * (noise - theta - gamma * w_new)
    return np.stack([w_new, theta + mu * (w_new if alternating else w)])


def optimistic(eta, mu):
    """Both move on twice the new gradient less the last one (Daskalakis et al. 2018)."""
    w, last_w, last_theta, theta, xi = np.eye(5)
    grad = xi - theta
    return np.stack([w + eta * (2 * grad - last_w), grad, w, theta + mu * (2 * w - last_theta)])


def extragradient(eta, mu, fresh=False):
    """Both move on the gradients after a trial step (Korpelevich 1976), on a fresh batch or not."""
    w, theta, *xi = np.eye(3 + fresh)
    w_trial, theta_trial = w + eta * (xi[0] - theta), theta + mu * w
    return np.stack([w + eta * (xi[-1] - theta_trial), theta + mu * w_trial])


def momentum(eta, mu, beta):
    """Heavy ball on both, alternating; beta < 0 as in Gidel et al. (2019)."""
    w, move_w, move_theta, theta, xi = np.eye(5)
    move_w = beta * move_w + xi - theta
    move_theta = beta * move_theta + w + eta * move_w
    return np.stack([w + eta * move_w, move_w, move_theta, theta + mu * move_theta])


def averaged(matrix, weight):
    """A method with theta averaged: weight 1 - beta exponentially, 1/k over all k (Polyak)."""
    inner = np.insert(matrix, len(matrix), 0, axis=1)
    mean = np.eye(inner.shape[1])[len(matrix)]
    return np.vstack([inner, mean + weight * (inner[-1] - mean)])


def epoch(matrix, cuts):
    """`cuts` iterations as one, for batches that depend on each other."""
    powers = [np.linalg.matrix_power(matrix[:, :-1], i) for i in range(cuts + 1)]
    return np.hstack([powers[-1], *(p @ matrix[:, -1:] for p in powers[-2::-1])])


def flow(h, power=0.0):
    """The flow (32), or (47) with both steps t^-power, from t = 1 in steps of h radians: noise by
    Euler-Maruyama between two exact half-turns, with errors of order h^2."""
    half = np.array([[np.cos(h / 2), -np.sin(h / 2)], [np.sin(h / 2), np.cos(h / 2)]])

    def matrix(k):
        begin, end = (clock(a * h, power) ** (1 - 2 * power) for a in (k - 1, k))
        return np.hstack([half @ half, half[:, :1] * np.sqrt((end - begin) / (1 - 2 * power))])
    return matrix


# -------------------------------------------------------------------------- two ways to a variance


def at(method, k):
    return method(k) if callable(method) else method


def recursion(method, ks, q=2.0):
    """Exact means (K, S) and m x covariances (K, S, S) after each k of `ks`, from a state of ones.
    q: m x the variance of xi, or m x their covariance."""
    size, kept = len(at(method, 1)), {}
    mean, cov = np.ones(size), np.zeros((size, size))
    for k in range(1, max(ks) + 1):
        turn, gain = np.split(at(method, k), [size], 1)
        mean, cov = turn @ mean, turn @ cov @ turn.T + np.dot(gain, q) @ gain.T
        kept[k] = mean, cov
    return tuple(map(np.stack, zip(*(kept[k] for k in ks))))


def simulate(method, ks, paths, noise, clip=math.inf, device="cpu"):
    """What independent runs from a state of ones report after each k of `ks`: float32 (K, paths).
    noise(n) draws one iteration's xi for n paths, (xi's, n). |w| <= clip, for plain `sgd`."""
    chunks = []
    for first in range(0, paths, CHUNK):
        state, kept = torch.ones(len(at(method, 1)), min(CHUNK, paths - first), device=device), {}
        for k in range(1, max(ks) + 1):
            matrix = torch.from_numpy(at(method, k)).float().to(device)
            state = matrix @ torch.cat([state, noise(state.shape[1])])
            if clip < math.inf:     # undo what is too much of w, and what theta was moved by it
                state -= matrix[:, :1] * (state[0] - state[0].clamp(-clip, clip))
            kept[k] = state[-1] if k in ks else None
        chunks.append(torch.stack([kept[k] for k in ks]))
    return torch.cat(chunks, 1)


def finite(images, m, scheme, gen):
    """Batch means from N fixed `images` of mean 0, variance 1: draw(n) (., n), and m x its cov.
    scheme: `iid`; `subset`, m different ones each time; `epoch`, all in random order, cut up."""
    size, cuts = len(images), len(images) // m if scheme == "epoch" else 1
    cov = np.eye(cuts) * (1 if scheme == "iid" else (size - m) / (size - 1))
    cov = (cov - cov.mean(0)) * cuts / (cuts - 1) if cuts > 1 else cov

    def draw(n):
        how = {"generator": gen, "device": gen.device}
        pick = (torch.randint(size, (n, m), **how) if scheme == "iid" else
                torch.rand(n, size, **how).topk(m * cuts).indices)
        return images[pick].unflatten(1, (cuts, m)).mean(2).T
    return draw, cov


class Suite:
    """What the sections share: configuration, device, random stream, and the `rows` they add."""

    def __init__(self, cfg):
        self.cfg, self.device, self.rows = cfg, harness.pick_device(cfg.device), []
        self.gen = core.generator(cfg.seed, self.device)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.gen, device=self.device)

    def check(self, name, section, method, ks, law=(), *, eta=1, mu=None, m=64, q=2.0, noise=None,
              share=1, t=None, clip=math.inf):
        """Add a row after each k of `ks`, at the time t: m Var theta of paths/share runs against
        the law, exact values for the last ks; the recursion has the others. q and noise as in
        `recursion` and `simulate`, by default Gaussian. The bias is E theta."""
        paths = max(self.cfg.paths // share, 1000)
        noises = at(method, 1).shape[1] - len(at(method, 1))
        noise = noise or (lambda n: math.sqrt(q / m) * self.normal(noises, n))
        theta = simulate(method, ks, paths, noise, clip, self.device).double().cpu().numpy()
        mean, square = theta.mean(1), m * (theta - theta.mean(1, keepdims=True)) ** 2
        var, error = square.sum(1) / (paths - 1), square.std(1) / math.sqrt(paths)
        columns = {"k": ks, "t": ks if t is None else t, "measured": var,
                   "halfwidth": 1.96 * error, "bias_measured": mean}
        if clip == math.inf:
            bias, cov = recursion(method, ks, q)
            bias, exact = bias[:, -1], np.append(cov[:len(ks) - np.size(law), -1, -1], law)
            columns |= {"exact": exact, "z": (var - exact) / (error + 1e-9), "bias": bias,
                        "bias_z": (mean - bias) / (np.sqrt(var / m / paths) + 1e-6)}
            # + 1e-9, + 1e-6: float32's own errors, for FGD, whose variance is zero
        same = {"check": name, "section": section, "m": m, "eta": eta, "mu": mu or eta,
                "exact": None, "z": None, "batches": noises}
        self.rows += [{**same, **dict(zip(columns, row))} for row in zip(*columns.values())]
        return self.rows[-1]


# ---------------------------------------------------------------------------------------- sections


def section_1(s):
    """Theorem 1: the flow, the two discrete games, and the law of the batch size."""
    ks, k, e, h = np.arange(20, 401, 20), np.arange(1, 21), 0.2, 0.05
    s.check("const_sde", 1, flow(h), ks, flow_law(h * ks), t=h * ks)
    s.check("const_sde, plain Euler-Maruyama", 1, sgd(h, h, alternating=False), ks[:5],
            simultaneous_law(ks[:5], h, h) / h, q=2 / h, t=h * ks[:5])
    s.check("alternating", 1, sgd(1, 1), k, alternating_law(k, 1, 1))
    s.check("alternating, unequal steps", 1, sgd(0.4, 0.05), ks[:10],
            alternating_law(ks[:10], 0.4, 0.05), eta=0.4, mu=0.05)
    s.check("simultaneous", 1, sgd(1, 1, alternating=False), k[:8], simultaneous_law(k[:8], 1, 1))
    for m in (1, 4, 16, 64):    # whole batches; reals not even Gaussian: only their variance counts
        def batch(n, m=m):
            x_real = torch.empty(m, n, device=s.device).exponential_(generator=s.gen) - 1
            return (x_real - s.normal(m, n)).mean(0, keepdim=True)
        s.check("alternating, exponential data", 1, sgd(e, e), [40], alternating_law(40, e, e),
                eta=e, m=m, noise=batch, share=m)
        s.check("alternating, |w| <= 1", 1, sgd(e, e), [min(s.cfg.horizon, 150 * m)], eta=e, m=m,
                share=100, clip=1)


def section_2(s):
    """Theorem 2: the flow with steps 1/t and t^-power, the discrete game from k0 = 1 and 10."""
    h, ks = 0.025, np.arange(32, 257, 8)
    t = clock(h * ks, 1)
    s.check("inverse_t_sde", 2, flow(h, 1), ks, inverse_t_law(t), t=t)
    h, ks = 0.05, np.arange(16, 257, 6)
    for power in (0.75, 0.6):
        s.check(f"power_sde, t^-{power}", 2, flow(h, power), ks, power_law(h * ks, power),
                t=clock(h * ks, power))
    for k0, ks in ((1, [1, 2, 3, 4, 6, 8, 11, 16, 23, 33, 50, 75, 110, 160, 240, 350]),
                   (10, [2, 5, 8, 12, 17, 23, 32, 45, 64, 90, 130, 190, 270, 390])):
        s.check(f"alternating, steps 1/k from k0 = {k0}", 2,
                lambda k, k0=k0: sgd(1 / (k0 + k - 1), 1 / (k0 + k - 1)), ks, t=np.array(ks) + k0)


def section_3(s):
    """The fixes on one long run, and the batch size that each is worth. Averaging leaves a bias."""
    e, x, last = s.cfg.eta, s.cfg.eta ** 2, s.cfg.horizon
    plain, r1, ks = sgd(e, e), sgd(e, e, 1.0), np.geomspace(last // 50, last, 5).astype(int)
    for name, method, law, *steps in (      # steps: where they are not (e, e)
            ("alternating, no fix", plain, alternating_law(ks, e, e)),
            ("alternating, |w| <= 1, no fix", plain, ()),
            ("alternating, 4 eta, mu/4", sgd(4 * e, e / 4), alternating_law(ks, 4 * e, e / 4),
             4 * e, e / 4),
            ("alternating, steps 1/k", lambda k: sgd(1 / k, 1 / k), (), 1, 1),
            ("n_critic 5", sgd(e, e, n_dis=5), alternating_law(ks, 5 * e, e) / 5),
            ("r1 0.1", sgd(e, e, 0.1), SETTLED["r1"](e, e, 0.1)),
            ("r1 1", r1, SETTLED["r1"](e, e, 1)),
            ("r1 1, mu/10", sgd(e, e / 10, 1.0), SETTLED["r1"](e, e / 10, 1), e, e / 10),
            ("r1 1, n_critic 5", sgd(e, e, 1.0, 5), ()),
            ("r1 1.75, steps 1/k", lambda k: sgd(1 / k, 1 / k, 1.75), (), 1, 1),
            ("omd", optimistic(e, e), SETTLED["omd"](x)),
            ("eg, one batch", extragradient(e, e), SETTLED["eg"](x)),
            ("eg, fresh batch", extragradient(e, e, True), SETTLED["eg, fresh"](x)),
            ("momentum -0.5", momentum(e, e, -0.5), SETTLED["momentum"](x, 0.5)),
            ("ema 0.999", averaged(plain, 1e-3), ()), ("ema 0.999, r1 1", averaged(r1, 1e-3), ()),
            ("polyak", lambda k: averaged(plain, 1 / k), polyak_law(ks, x)),
            ("polyak, r1 1", lambda k: averaged(r1, 1 / k), ())):
        eta, mu = steps or (e, e)
        row = s.check(name, 3, method, ks, law, eta=eta, mu=mu, share=50,
                      clip=1 if "|w|" in name else math.inf)
        row["m_eq"] = float(alternating_law(last, e, e)) / (row["exact"] or row["measured"])
        row["m_eq_per_sample"] = row["m_eq"] / row["batches"]


def section_4(s):
    """The 64 images of Section 3.2 as 64 numbers a side; MGD has m = 16, FGD 64.

    UNSPECIFIED: how Section 3.2 samples reals and latents. All four ways are shown; FGD is free of
    noise only if both are all 64.
    """
    images = s.normal(2, 64)
    images = (images - images.mean(1, keepdim=True)) / images.std(1, correction=0, keepdim=True)
    for real, latent in (("iid", "iid"), ("subset", "iid"), ("subset", "subset"), ("epoch",) * 2):
        for m, gamma in ((16, 0.0), (16, 0.5), (64, 0.0)):
            x, q_x = finite(images[0], m, real, s.gen)
            z, q_z = finite(images[1], m, latent, s.gen)
            ks = np.arange(8, 81, 8) // len(q_x)
            s.check(f"finite, {real} reals, {latent} latents, r1 {gamma}", 4,
                    epoch(sgd(0.2, 0.2, gamma), len(q_x)), ks, eta=0.2, m=m, q=q_x + q_z, share=100,
                    noise=lambda n, x=x, z=z: x(n) - z(n), t=ks * len(q_x))


def mcshane(x, images, values, lipschitz):
    """The least an L-Lipschitz f with f(images[i]) = values[i] can be at x, and itself such an f:
    x, images[i] (N, ...), values[i] (N,) -> (N,). Eq. (11) is this between two images, so sharp."""
    return torch.stack([v - lipschitz * (x - i).flatten(1).norm(dim=1)
                        for i, v in zip(images, values)]).amax(0)


def lipschitz_bound(D):
    """An upper bound for an MLP with 1-Lipschitz activations: the product of its spectral norms."""
    weights = [layer.weight for layer in D if hasattr(layer, "weight")]
    # From all eigenvalues: power iteration finds less than the norm, and so no bound.
    return math.prod(torch.linalg.eigvalsh(w @ w.T)[-1].item() ** 0.5 for w in weights)


class MaxMin(nn.Module):
    """Sorts pairs of units: 1-Lipschitz, and keeps gradients' norms (Anil et al. 2019)."""

    def forward(self, x):
        return x.unflatten(1, (-1, 2)).sort(2).values.flatten(1)


def train_critic(x_real, x_neg, x_comb, comb_weight, steps, seed):
    """An MLP D (N, 256) -> (N,), in float64, trained by eq. (13) against fixed negatives.

    UNSPECIFIED: the D of Theorem 3. One with spectral norms of about one, under the logistic loss
    of 10 D: D's own scores are too small to leave the linear part of the loss.
    """
    torch.manual_seed(seed)
    D = nn.Sequential(spectral_norm(nn.Linear(256, 128)), MaxMin(), spectral_norm(
        nn.Linear(128, 128)), MaxMin(), spectral_norm(nn.Linear(128, 1)), nn.Flatten(0))
    opt, (on_real, on_fake, _) = torch.optim.Adam(D.parameters(), 5e-3), core.LOSSES["ns"]
    for _ in range(steps):
        opt.zero_grad()
        core.pcr_loss(on_real(10 * D(x_real)), on_fake(10 * D(x_neg)), on_fake(10 * D(x_comb)),
                      comb_weight).backward()
        opt.step()
    return D.eval().double().requires_grad_(False)


def section_5(s):
    """Theorem 3 on critics trained with and without PCR: the bound, its premise, and controls.

    DEVIATION: PCR's negatives are the averages of the very pairs that are tested, not of all pairs.
    """
    n, seed, gen = 64, s.cfg.seed, core.generator(s.cfg.seed)
    small, one, three, x, y = (core.to_float(i) for i in (
        geometry.draw(n, 2, 15, 4, seed=seed), geometry.draw(n, 1, 16, 4, seed=seed),
        geometry.draw(n, 3, 16, 4, seed=seed), *geometry.draw_pairs(n, 16, 4, seed=seed)[:2]))
    pairs = {"one square shared": (x.flatten(1), y.flatten(1)), "shifted by 1 px": [
        nn.functional.pad(small, side, value=-1.0).flatten(1)
        for side in ((0, 1, 0, 1), (1, 0, 0, 1))]}
    x_real = torch.cat([i for pair in pairs.values() for i in pair])
    x_comb = torch.cat([(x1 + x2) / 2 for x1, x2 in pairs.values()])
    x_neg = torch.cat([torch.rand(n, 256, generator=gen) * 2 - 1, one.flatten(1), three.flatten(1)])
    lam = torch.linspace(0, 1, 33).double()[:, None]
    for arm, comb_weight in (("vanilla", 0), ("pcr", 0.5)):
        D = train_critic(x_real, x_neg, x_comb, comb_weight, s.cfg.critic_steps, seed)
        bound, margin = lipschitz_bound(D), D(x_real.double()).min()
        for kind, pair in pairs.items():
            x1, x2 = (i.double() for i in pair)
            f1, f2, delta = D(x1), D(x2), (x1 - x2).norm(dim=1)
            away = torch.randn(n, 256, generator=gen).double()
            away *= (delta / away.norm(dim=1) / 2)[:, None]
            moved = (x2 - x1).gather(1, torch.rand(n, 256, generator=gen).argsort(1)) / 2
            points = torch.stack([*(a * x1 + (1 - a) * x2 for a in lam), core.pixel_and(x1, x2),
                                  core.pixel_or(x1, x2), x1 + away, x1 + moved]).requires_grad_()
            f = D(points.flatten(0, 1)).view(-1, n)
            grad, = torch.autograd.grad(f.sum(), points)
            f, points = f.detach(), points.detach()
            least = torch.stack([mcshane(p, (x1, x2), (f1, f2), bound) for p in points])
            slope = f[:33].diff(dim=0).abs().amax(0) * 32 / delta
            near = (torch.minimum(lam, 1 - lam) * delta)[1:32]
            true = {"premise": margin > bound * near, "premise_if_slope": margin > slope * near,
                    "segment": f[1:32] > 0, "average": f[16:17] > 0, "and": f[33:34] > 0,
                    "or": f[34:35] > 0, "random": f[35:36] > 0, "permuted": f[36:] > 0}
            shares = {key: value.double().mean(0) for key, value in true.items()}   # by pair
            s.rows.append({
                "check": f"theorem3 {arm}, {kind}", "section": 5, "k": s.cfg.critic_steps,
                "t": None, "m": n, "eta": None, "mu": None, "z": None, "exact": 0, "halfwidth": 0,
                "measured": (f < least - 1e-9).sum(), "margin": margin, "delta": delta.mean(),
                "lipschitz": bound, "lipschitz_gradient": grad.norm(dim=2).max(),
                "lipschitz_segment": slope.max(), "lam": lam[:, 0], "f": f[:33, 0],
                "least": least[:33, 0], "least_if_slope": torch.maximum(
                    f1 - slope * delta * (1 - lam), f2 - slope * delta * lam)[:, 0],
                "shares": {k: [v.mean(), 1.96 * v.std() / n ** 0.5] for k, v in shares.items()}})


SECTIONS = {1: section_1, 2: section_2, 3: section_3, 4: section_4, 5: section_5}

# ------------------------------------------------------------------------------ what comes of it


def failures(rows):
    """The checks that refute the theory or the code: |z| not below Z_MAX, or a bound violated."""
    return sorted({r["check"] for r in rows
                   if not (abs(r["z"] or 0) < Z_MAX and abs(r.get("bias_z", 0)) < Z_MAX)
                   or r["section"] == 5 and r["measured"]})


def report(rows):
    """Print the last row of each check of a variance, with the largest |z| of all its rows."""
    columns = {"k": "k", "exact": "exact", "measured": "measured", "95%": "halfwidth",
               "worst z": "worst", "E theta": "bias_measured", "exact ": "bias", "m_eq/m": "m_eq",
               "/sample": "m_eq_per_sample"}
    print(f"\n{'m Var theta':52s}", *(f"{name:>9s}" for name in columns))
    for (name, m), r in {(r["check"], r["m"]): r for r in rows if r["section"] < 5}.items():
        worst = max(abs(g["z"] or 0) for g in rows if (g["check"], g["m"]) == (name, m))
        values = map((r | {"worst": worst}).get, columns.values())
        print(f"{f'{name}, m = {m}':52s}", *(
            " " * 9 if v is None else f"{v:9.4g}" for v in values))


def claims(rows):
    """Theorems 1 and 2 by all variances that have a law, Theorem 3 by eq. (11), each critic's."""
    z, found = np.array([r["z"] for r in rows if r["z"] is not None]), []
    critics = [r for r in rows if r["section"] == 5]
    if len(z):
        found.append({
            "paper": "Theorems 1, 2", "what": "the variance of theta is Theta(1/m)",
            "theirs": "proved", "ours": f"exact laws, {len(z)} checks, largest |z| "
            f"{abs(z).max():.1f}, mean z^2 {(z ** 2).mean():.2f}: t/m (Theorem 1), a cycle around "
            "1/m (Theorem 2)", "verdict": "in part" if abs(z).max() < Z_MAX else "no"})
    if critics:
        broken = sum(r["measured"] for r in critics)
        met = [100 * r["shares"]["premise"][0] for r in critics]
        found.append({
            "paper": "Theorem 3", "what": "an L-Lipschitz D accepts averages of close reals",
            "theirs": "proved", "ours": f"{broken} violations; its premise holds for "
            f"{min(met):.0f} to {max(met):.0f}% of the points",
            "verdict": "no" if broken else "holds"})
    return [claim | {"front": True} for claim in found] + [{
        "paper": "Theorem 3", "what": r["check"].removeprefix("theorem3 "), "theirs": "",
        "ours": f"margin {r['margin']:.3g}, delta {r['delta']:.3g}, L from "
        f"{r['lipschitz_gradient']:.3g} (gradient; segments: {r['lipschitz_segment']:.3g}) to "
        f"{r['lipschitz']:.4g}; cases, %: " + ", ".join(
            f"{k} {100 * a:.0f} +- {100 * b:.0f}" for k, (a, b) in r["shares"].items()),
        "verdict": ""} for r in critics]


PANELS = [  # title, x, y, scales of both, y's limits, the legend's place, {check: its label}
    ("Theorem 1: steps 1", "iterations t", "m Var θ", "linear", "linear", (-0.5, 45), "upper right",
     {"const_sde": "flow", "alternating": "eqs. (5), (6)", "simultaneous": "simultaneous"}),
    ("Theorem 2: vanishing steps", "ln t", "m Var θ", "linear", "log", (2e-4, 6), "lower right",
     {"inverse_t_sde": "flow, 1/t", "power_sde, t^-0.75": "flow, $t^{-0.75}$",
      "power_sde, t^-0.6": "flow, $t^{-0.6}$", "alternating, steps 1/k from k0 = 1": "steps 1/k",
      "alternating, steps 1/k from k0 = 10": "steps 1/k from k = 10"}),
    ("The fixes", "iterations k", "m Var θ", "log", "log", (1e-4, 1e4), "upper left",
     {"alternating, no fix": "none", "omd": "optimistic", "r1 1": "R1", "ema 0.999": "EMA 0.999",
      "polyak": "Polyak", "ema 0.999, r1 1": "R1 and EMA"}),
    ("The batch size", "batch size m", "Var θ", "log", "log", (0.02, 3), "upper right",
     {"alternating, exponential data": "k = 40", "alternating, |w| <= 1": "|w| ≤ 1, settled"}),
    ("64 images, batches of 16", "iterations k", "Var θ", "linear", "log", (2e-4, 0.4),
     "lower right", {"finite, iid reals, iid latents, r1 0.0": "iid",
                     "finite, subset reals, subset latents, r1 0.0": "no repeats",
                     "finite, subset reals, subset latents, r1 0.5": "no repeats, R1 0.5",
                     "finite, epoch reals, epoch latents, r1 0.0": "epochs"})]


def plot(folder):
    """figure.png from result.json: lines are exact, points are measured, with 95% intervals."""
    result = sweep.read_result(folder, "theory_sde")
    fig = harness.figure(8.4)
    *axes, last = fig.subplots(3, 2).flat
    axes[0].axhline(1, color="grey", lw=1, label="constant, as eq. (8) reads")
    axes[1].axhspan(1 - 5 ** -0.5, 1 + 5 ** -0.5, color="0.88", label="limits of 1/t")
    axes[3].axhline(0.25, color="grey", lw=1, label="1/4, for small steps")
    for ax, (title, xlabel, ylabel, xscale, yscale, ylim, place, names) in zip(axes, PANELS):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale, ylim=ylim)
        for (name, label), style, marker in zip(names.items(), harness.STYLE.values(), "os^Dvx"):
            here = [r for r in result["rows"]
                    if r["check"] == name and (r["m"] == 16 or r["section"] != 4)]
            x = [{"ln t": math.log(r["t"]), "batch size m": r["m"]}.get(xlabel, r["t"])
                 for r in here]
            exact, y, error = ([(r[key] or math.nan) / (r["m"] if ylabel == "Var θ" else 1)
                                for r in here] for key in ("exact", "measured", "halfwidth"))
            ax.plot(x, exact, lw=1, **style)
            ax.errorbar(x, y, error, color=style["color"], ls="", marker=marker, mfc="white",
                        mew=0.8, lw=0.8, label=label)
        ax.legend(loc=place, ncols=1 + (len(names) == 6))
    for r in result["rows"]:
        if r["check"].endswith("one square shared"):
            arm = r["check"].split()[1].rstrip(",")
            for key, ls, label in (("f", "-", f"f, {arm}"), ("least", ":", "(11), bound on L"),
                                   ("least_if_slope", "--", "(11), own slope")):
                last.plot(r["lam"], r[key], color=harness.style(arm)["color"], ls=ls, label=label)
            last.legend(loc="lower center", ncols=2)
    last.set(title="Theorem 3: between two reals", xlabel="λ", ylabel="f(λ x₁ + (1 - λ) x₂)",
             ylim=(-8, 1.5))
    harness.save_figure(fig, folder)
    return result


# ------------------------------------------------------------------------------------ the command


def run(cfg, folder):
    """All checks of the sections asked for -> their rows."""
    now = harness.versions()
    harness.write_json(folder / "config.json", {"flags": cfg, **now, "git": [now["git"] or ""]})
    suite = Suite(cfg)
    for section in cfg.section:
        SECTIONS[section](suite)
    return suite.rows


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS, OWN, training=None)
    p.add_argument("--seed", type=int, nargs=1, dest="seeds", help="of all random numbers")
    p.add_argument("--section", type=int, nargs="+", choices=range(1, 6), default=range(1, 6),
                   help="1 constant steps, 2 vanishing, 3 fixes, 4 the 64 images, 5 Theorem 3")
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    args.seeds, args.section = args.seeds or [0], sorted(set(args.section))
    given = {k: v for k, v in vars(args).items() if k not in sweep.NOT_CONFIG and v is not None}
    cfg = Namespace(**PRESETS[args.preset] | given, seed=args.seeds[0], run="theory")
    if len(args.seeds) > 1 or not 0 <= cfg.seed < 2 ** 63 or not 1000 <= cfg.paths <= 10 ** 8:
        raise core.UserError(f"--seeds {args.seeds} --paths {cfg.paths}: must be one seed in "
                             "[0, 2^63), and from 1000 to 10^8 paths")
    if sweep.announce([cfg], args.dry_run):
        return {}
    folder, rows = sweep.train_all(args, args.preset, [cfg], run)
    report(rows)
    sweep.write_result(args, folder, [cfg], rows, claims(rows))
    result = plot(folder)
    if wrong := failures(rows):
        raise SystemExit(f"theory_sde.py: not as the theory says: {'; '.join(wrong)}")
    return result


if __name__ == "__main__":
    harness.cli(main)
