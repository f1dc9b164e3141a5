"""Theorems 1 to 3, checked: how noisy a WGAN's generator is, and what a Lipschitz D must accept.

The claims (Sections 3.3 and 4.3, Appendices A to D): batches of m leave the generator a variance of
Theta(1/m), with constant steps (eq. 8) and with steps 1/t (eq. 10), and an L-Lipschitz D accepts
averages of close real images (eq. 11). Here are the exact laws, and simulations that must agree:

    python theory_sde.py

Expected: all |z| below 4.5 and no bound violated, exit code 1 otherwise; 400,000 paths take about
80 s on one CPU core. Each coordinate of the model is a copy of this game, k = 1, 2, ...:

    w     <- w + eta (xi - theta)       eq. (5), D's ascent    xi ~ N(0, 2/m): mean of m reals
    theta <- theta + mu w               eq. (6), G's descent           minus mean of m latents

Steps and times are per iteration; x = eta mu. DEVIATION: ||w|| <= 1 is enforced only by `clip`.
Without noise it holds by itself (eq. 31); with noise it does not, and eq. (25) drops it too.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import core
import geometry
import harness

PRESETS = {     # runs of a check; the table's steps eta = mu and iterations; Adam steps of a critic
    "paper": {"paths": 400_000, "eta": 0.05, "horizon": 10_000, "critic_steps": 400},
    "smoke": {"paths": 2_000, "eta": 0.2, "horizon": 400, "critic_steps": 20},
}
PRESETS["cpu"] = PRESETS["paper"]
Z_MAX = 4.5     # of about 1000 z; a correct program fails by chance in less than 1% of all seeds
CHUNK = 65_536  # paths at a time, so that their state stays in the processor's cache

# ------------------------------------------------------- laws: m Var theta, around theta's own mean


def flow_law(t, eta=1.0, mu=1.0):
    """Theorem 1, eq. (8) solved: the constant-step flow (32) at time t >= 0.

    2 t^3 / 3 at first and t later (unit steps): of order 1/m at each t > 0, but not for all t.
    """
    speed = np.sqrt(eta * mu)
    return eta * mu * (t - np.sin(speed * t) * np.cos(speed * t) / speed)


def inverse_t_law(t):
    """Theorem 2, eq. (57) solved: steps 1/t, t >= 1. Cycles in ln t for ever, 1 +- 1/sqrt(5)."""
    return 1 - 0.8 / t - (np.cos(2 * np.log(t)) + 2 * np.sin(2 * np.log(t))) / 5


def clock(angle, power):
    """When (t >= 1) a flow with both steps t^-power, 0 <= power <= 1, has turned by angle >= 0."""
    return np.exp(angle) if power == 1 else (1 + (1 - power) * angle) ** (1 / (1 - power))


def power_law(angle, power):
    """That flow: 2 int_1^t s^(-2 power) sin^2(angle(t) - angle(s)) ds, to 1e-9 up to angle 100.

    By Gauss-Legendre in the angle, where ds = s^power d angle.
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
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


SETTLED = {     # limits for k to infinity
    # R1, gamma w^2 / 2 on a linear D: 2 eta gamma + x < 4
    "r1": lambda eta, mu, gamma: (2 * mu / gamma * (2 - eta * gamma)
                                  / (4 - 2 * eta * gamma - eta * mu)),
    # optimistic, x < 1/3; extragradient, x < 1, with one batch for both half-steps or with two
    "omd": lambda x: (2 * (2 + 9 * x + 30 * x**2 + 27 * x**3)
                      / ((1 + x) * (1 - 3 * x) * (4 + 9 * x))),
    "eg": lambda x: 2 * (2 + x - 2 * x**2 + x**3) / ((1 - x) * (4 - 3 * x + x**2)),
    "eg, fresh": lambda x: (2 * (2 + x + 3 * x**2 - 3 * x**3 + x**4)
                            / ((1 - x**2) * (4 - 3 * x + x**2))),
    # momentum -b on both: both brackets positive
    "momentum": lambda x, b: (
        (4 * (1 - b**2)**3 + 4 * b * x * (3 * b**2 - b**3 - b - 1) + 2 * b**2 * x**2)
        / (b * (4 * (1 - b)**2 - x) * (2 * (1 - b) * (1 + b)**2 - b * x))),
}

# --------------------------------------------------- methods: one iteration, as one would code it
# Variables are rows of the unit matrix, so that the update itself yields the matrix (S, S + xi's)
# from the state (w, ..., theta) and the batch-mean differences xi to the next state. The last entry
# is what is reported. A method that changes with k is a function from k to such a matrix.


def sgd(eta, mu, gamma=0.0, n_dis=1, alternating=True):
    """Eqs. (5) and (6), with R1 of weight gamma and n_dis updates of D per update of G."""
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
    """Both move on the gradients found after a trial step (Korpelevich 1976)."""
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
    """The flow (32), or (47) with both steps t^-power, from t = 1 in steps of h radians.

    Euler-Maruyama for the noise between two exact half-turns: errors of order h^2. Plain Euler-
    Maruyama, errors of order h t, is sgd(h, h, alternating=False) with 1/h times the variance.
    """
    half = np.array([[np.cos(h / 2), -np.sin(h / 2)], [np.sin(h / 2), np.cos(h / 2)]])

    def matrix(k):
        begin, end = (clock(a * h, power) ** (1 - 2 * power) for a in (k - 1, k))
        return np.hstack([half @ half, half[:, :1] * np.sqrt((end - begin) / (1 - 2 * power))])
    return matrix


# ----------------------------------------------------------------------- two ways to a variance


def at(method, k):
    return method(k) if callable(method) else method


def recursion(method, ks, q=2.0):
    """Exact means (K, S) and m x covariances (K, S, S) after each k of `ks`, from a state of ones.

    q: m x the variance of xi, or m x their covariance. Every law above is tested against this.
    """
    size, kept = len(at(method, 1)), {}
    mean, cov = np.ones(size), np.zeros((size, size))
    for k in range(1, max(ks) + 1):
        turn, gain = np.split(at(method, k), [size], 1)
        noise = gain @ q @ gain.T if np.ndim(q) else q * gain @ gain.T
        mean, cov = turn @ mean, turn @ cov @ turn.T + noise
        kept[k] = mean, cov
    return np.stack([kept[k][0] for k in ks]), np.stack([kept[k][1] for k in ks])


def simulate(method, ks, paths, noise, clip=math.inf, device="cpu"):
    """What independent runs from a state of ones report after each k of `ks`: float32 (K, paths).

    noise(n) draws one iteration's xi for n paths, (xi's, n). |w| <= clip, for plain `sgd`.
    """
    chunks = []
    for first in range(0, paths, CHUNK):
        state, kept = torch.ones(len(at(method, 1)), min(CHUNK, paths - first), device=device), {}
        for k in range(1, max(ks) + 1):
            matrix = torch.from_numpy(at(method, k)).float().to(device)
            state = matrix @ torch.cat([state, noise(state.shape[1])])
            if clip < math.inf:     # undo what is too much of w, and what theta was moved by it
                state -= matrix[:, :1] * (state[0] - state[0].clamp(-clip, clip))
            if k in ks:
                kept[k] = state[-1]
        chunks.append(torch.stack([kept[k] for k in ks]))
    return torch.cat(chunks, 1)


def finite(images, m, scheme, gen):
    """Batch means from N fixed `images` of mean 0, variance 1: draw(n) (., n), and m x its cov.

    scheme: `iid`; `subset`, m different ones each time; `epoch`, all in random order, cut up.
    """
    size, cuts = len(images), len(images) // m if scheme == "epoch" else 1
    cov = np.eye(cuts) * (1 if scheme == "iid" else (size - m) / (size - 1))
    cov = (cov - cov.mean(0)) * cuts / (cuts - 1) if cuts > 1 else cov

    def draw(n):
        if scheme == "iid":
            pick = torch.randint(size, (n, m), generator=gen, device=images.device)
        else:
            pick = torch.rand(n, size, generator=gen, device=images.device).topk(m * cuts).indices
        return images[pick].unflatten(1, (cuts, m)).mean(2).T
    return draw, cov


class Suite:
    """What the checks share: flags, device and random stream. `rows` are their outcomes."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.rows = cfg, device, []
        self.gen = harness.generator(cfg.seeds[0], device)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.gen, device=self.device)

    def check(self, name, section, method, ks, law=(), *, eta=1, mu=None, m=64, q=2.0, noise=None,
              share=1, t=None, clip=math.inf):
        """A row after each k of `ks`: m Var theta of paths/share runs against the law.

        law: exact values for the last ks; the recursion has the others. t: times, if not ks. q and
        noise as in `recursion` and `simulate`, by default Gaussian. The bias is E theta.
        """
        paths = max(self.cfg.paths // share, 1000)
        noises = at(method, 1).shape[1] - len(at(method, 1))
        noise = noise or (lambda n: math.sqrt(q / m) * self.normal(noises, n))
        theta = simulate(method, ks, paths, noise, clip, self.device).double().cpu().numpy()
        mean, square = theta.mean(1), m * (theta - theta.mean(1, keepdims=True)) ** 2
        var, error = square.sum(1) / (paths - 1), square.std(1) / math.sqrt(paths)
        columns = {"k": ks, "t": ks if t is None else t, "measured": var, "halfwidth": 1.96 * error,
                   "bias_measured": mean}
        if clip == math.inf:
            bias, cov = recursion(method, ks, q)
            bias, exact = bias[:, -1], np.append(cov[:len(ks) - np.size(law), -1, -1], law)
            columns |= {"exact": exact, "z": (var - exact) / (error + 1e-9), "bias": bias,
                        "bias_z": (mean - bias) / (np.sqrt(var / m / paths) + 1e-6)}
            # + 1e-9, + 1e-6: float32's own errors, for FGD, whose variance is zero
        same = {"check": name, "section": section, "m": m, "eta": eta, "mu": mu or eta,
                "exact": None, "z": None, "batches": noises}
        self.rows += harness.plain([same | {key: values[i] for key, values in columns.items()}
                                 for i in range(len(ks))])
        return self.rows[-1]


# ------------------------------------------------------------------------------------- sections


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
    for power, name, h in ((1, "inverse_t_sde", 0.025), (0.75, "power_sde, t^-0.75", 0.05),
                           (0.6, "power_sde, t^-0.6", 0.05)):
        ks = np.arange(32, 257, 8) if power == 1 else np.arange(16, 257, 6)
        t = clock(h * ks, power)
        law = inverse_t_law(t) if power == 1 else power_law(h * ks, power)
        s.check(name, 2, flow(h, power), ks, law, t=t)
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

    UNSPECIFIED: how the paper samples reals and latents. FGD is noise-free only if both are all 64.
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
    """The least an L-Lipschitz f with f(images[i]) = values[i] can be at x, and itself such an f.

    x, images[i] (N, ...), values[i] (N,) -> (N,). For x between two images it is the right side of
    eq. (11), which is sharp, therefore; at every other point it bounds f just as well.
    """
    return torch.stack([v - lipschitz * (x - i).flatten(1).norm(dim=1)
                        for i, v in zip(images, values)]).amax(0)


def lipschitz_bound(D):
    """An upper bound for an MLP with 1-Lipschitz activations: the product of its spectral norms.

    From all eigenvalues of W W^T. Power iteration finds less than the norm, and so no bound.
    """
    weights = [layer.weight for layer in D if hasattr(layer, "weight")]
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
    n, seed, steps = 64, s.cfg.seeds[0], s.cfg.critic_steps
    gen = harness.generator(seed, "cpu")
    small, one, three, x, y = (core.to_float(i) for i in (
        geometry.draw(n, 2, 15, 4, seed=seed), geometry.draw(n, 1, 16, 4, seed=seed),
        geometry.draw(n, 3, 16, 4, seed=seed), *geometry.draw_pairs(n, 16, 4, seed=seed)[:2]))
    pairs = {"one square shared": (x.flatten(1), y.flatten(1)),
             "shifted by 1 px": [F.pad(small, side, value=-1.0).flatten(1)
                                 for side in ((0, 1, 0, 1), (1, 0, 0, 1))]}
    x_real = torch.cat([i for pair in pairs.values() for i in pair])
    x_comb = torch.cat([(x1 + x2) / 2 for x1, x2 in pairs.values()])
    x_neg = torch.cat([torch.rand(n, 256, generator=gen) * 2 - 1, one.flatten(1), three.flatten(1)])
    lam = torch.linspace(0, 1, 33).double()[:, None]
    for arm, comb_weight in (("vanilla", 0), ("pcr", 0.5)):
        D = train_critic(x_real, x_neg, x_comb, comb_weight, steps, seed)
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
            share = {key: value.double().mean(0) for key, value in true.items()}
            s.rows.append(harness.plain({
                "check": f"theorem3 {arm}, {kind}", "section": 5, "k": steps, "t": None, "m": n,
                "eta": None, "mu": None, "exact": 0, "measured": int((f < least - 1e-9).sum()),
                "halfwidth": 0, "z": None, "margin": margin, "delta": delta.mean(),
                "lipschitz": bound, "lipschitz_gradient": grad.norm(dim=2).max(),
                "lipschitz_segment": slope.max(), "lam": lam[:, 0], "f": f[:33, 0],
                "least": least[:33, 0], "least_if_slope": torch.maximum(
                    f1 - slope * delta * (1 - lam), f2 - slope * delta * lam)[:, 0],
                "shares": {k: [v.mean(), 1.96 * v.std() / n ** 0.5] for k, v in share.items()}}))


# ------------------------------------------------------------------------------------------ run

SECTIONS = [section_1, section_2, section_3, section_4, section_5]
PANELS = [  # title, x, y, scales of both, y's limits, the legend's place, checks and their legend
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
LINES = [("#000000", "-", "o"), ("#D55E00", "--", "s"), ("#0072B2", "-.", "^"),
         ("#009E73", ":", "D"), ("#CC79A7", (0, (5, 1)), "v"), ("#56B4E9", (0, (1, 1)), "x")]


def plot(folder):
    """figure.png from result.json: lines are exact, points are measured, with 95% intervals."""
    rows = harness.read_result(folder, Path(__file__).stem)["rows"]
    fig = harness.figure(8.4)
    *axes, last = fig.subplots(3, 2).flat
    axes[0].axhline(1, color="grey", lw=1, label="constant, as eq. (8) reads")
    axes[1].axhspan(1 - 5 ** -0.5, 1 + 5 ** -0.5, color="0.88", label="limits of 1/t")
    axes[3].axhline(0.25, color="grey", lw=1, label="1/4, for small steps")
    for ax, (title, xlabel, ylabel, xscale, yscale, ylim, place, names) in zip(axes, PANELS):
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale=yscale, ylim=ylim)
        for (name, label), (color, ls, marker) in zip(names.items(), LINES):
            here = [r for r in rows if r["check"] == name and (r["m"] == 16 or r["section"] != 4)]
            x = [r["m"] if xlabel == "batch size m" else math.log(r["t"]) if xlabel == "ln t" else
                 r["t"] for r in here]
            exact, y, error = ([(r[key] or math.nan) / (r["m"] if ylabel == "Var θ" else 1)
                                for r in here] for key in ("exact", "measured", "halfwidth"))
            ax.plot(x, exact, color=color, ls=ls, lw=1)
            ax.errorbar(x, y, error, color=color, ls="", marker=marker, ms=3, mfc="white", mew=0.8,
                        lw=0.8, label=label)
        ax.legend(loc=place, ncols=1 + (len(names) == 6))
    for arm, color in (("vanilla", "#000000"), ("pcr", "#D55E00")):
        for r in (r for r in rows if r["check"] == f"theorem3 {arm}, one square shared"):
            last.plot(r["lam"], r["f"], color=color, label=f"f, {arm}")
            last.plot(r["lam"], r["least_if_slope"], color=color, ls="--", lw=1,
                      label="(11), own slope")
            last.plot(r["lam"], r["least"], color=color, ls=":", lw=1, label="(11), bound on L")
            last.legend(loc="lower center", ncols=2)
    last.set(title="Theorem 3: between two reals", xlabel="λ", ylabel="f(λ x₁ + (1 - λ) x₂)",
             ylim=(-8, 1.5))
    harness.save_figure(fig, folder)


def report(rows):
    """The table on stdout: the last row of each check with its worst z, then Theorem 3."""
    print(f"\n{'m Var theta':54s}      k     exact  measured    95%           z worst  E theta"
          "    exact   m_eq/m  /sample")
    for i, r in enumerate(rows):
        r = {key: math.nan if value is None else value for key, value in r.items()}
        group = [g for g in rows if (g["check"], g["m"]) == (r["check"], r["m"])]
        if r["section"] == 5:
            print(f"{r['check']}: {r['measured']} violations, margin {r['margin']:.3g}, delta "
                  f"{r['delta']:.3g}, L <= {r['lipschitz']:.4g}, >= {r['lipschitz_gradient']:.3g} "
                  f"(gradient), {r['lipschitz_segment']:.3g} (segments); cases, %: " + ", ".join(
                      f"{k} {100 * a:.0f} +- {100 * b:.0f}" for k, (a, b) in r["shares"].items()))
        elif rows[i] is group[-1]:
            name, worst = f"{r['check']}, m = {r['m']}", max(abs(g["z"] or 0) for g in group)
            print(f"{name:54s} {r['k']:6d} {r['exact']:9.4g} {r['measured']:9.4g} +- "
                  f"{r['halfwidth']:<7.2g} {r['z']:6.2f} {worst:5.2f} {r['bias_measured']:8.4f} "
                  f"{r.get('bias', math.nan):8.4f}",
                  *(f"{r[key]:8.4g}" for key in ("m_eq", "m_eq_per_sample") if key in r))


def failures(rows):
    """The checks that refute the theory or the code: |z| not below Z_MAX, or a bound violated."""
    return sorted({r["check"] for r in rows
                   if not (abs(r["z"] or 0) < Z_MAX and abs(r.get("bias_z", 0)) < Z_MAX)
                   or r["section"] == 5 and r["measured"]})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    harness.run_flags(parser, PRESETS)
    parser.add_argument("--seed", type=int, nargs=1, dest="seeds", help="of all random numbers")
    parser.add_argument("--section", type=int, nargs="+", choices=range(1, 6), default=range(1, 6),
                        help="1 constant steps, 2 vanishing, 3 fixes, 4 the 64 images, 5 Theorem 3")
    parser.add_argument("--paths", type=int, help="simulated runs of a check")
    args, start = parser.parse_args(argv), time.time()
    if args.plot:
        return plot(args.plot)
    device = harness.pick_device(args.device)
    preset = args.preset or ("paper" if device.type == "cuda" else "cpu")
    given = {k: v for k, v in vars(args).items() if k not in ("plot", "dry_run") and v is not None}
    cfg = argparse.Namespace(**{"preset": preset, "seeds": [0], "name": preset, **PRESETS[preset],
                                **given, "section": sorted(set(args.section))})
    if len(cfg.seeds) > 1 or not 0 <= cfg.seeds[0] < 2 ** 63:
        raise harness.UserError(f"--seeds {cfg.seeds}: one in [0, 2^63); start another run for the "
                                "next")
    if not 1000 <= cfg.paths <= 10 ** 8:
        raise harness.UserError(f"--paths is {cfg.paths}: must be at least 1000, for the "
                                "intervals, and at most 10^8")
    if harness.announce([cfg], args.dry_run):
        return {}
    script = Path(__file__).stem
    folder = harness.open_run(cfg.outdir / script / cfg.name, cfg, cfg.resume)
    suite = Suite(cfg, device)
    for section in cfg.section:
        SECTIONS[section - 1](suite)
    report(suite.rows)
    result = harness.write_result(folder, script, cfg, device, start, suite.rows, {
        "eq_8": "Var = Theta(1/m)", "eq_10": "Var = Theta(1/m)", "eq_11": "no violation"})
    z = np.array([r["z"] for r in suite.rows if r["z"] is not None])
    print(f"\n{len(z)} z: largest {abs(z).max(initial=0):.2f}, mean square "
          f"{(z ** 2).sum() / max(len(z), 1):.2f}; {result['seconds']} s on {result['device']}")
    plot(folder)
    if failed := failures(suite.rows):
        sys.exit(f"theory_sde.py: not as the theory says: {'; '.join(failed)}")
    return result


if __name__ == "__main__":
    harness.cli(main)
