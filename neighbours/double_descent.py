"""Double descent in the size of the latents, in the linear case (Luzi, Dar, Baraniuk 2021).

A linear generator G (d, k) draws N(0, G G') for data N(0, S), n of which are known, X (d, n).
Without pairs the best G is PCA, and a k beyond the rank changes nothing. Told pairs of X and fixed
noise Z (k, n), G = X pinv(Z): its error shall rise to a peak at k = n and fall again. Is that
second descent learning, or only that G G' shrinks as k grows?

    python -m neighbours.double_descent --seeds 0 1 2

Methods: pca; pairs; shrunk, what pairs are on average, a X X' / n, with no pairs in it; rescaled,
pairs over a, so that nothing shrinks; semi, n / 2 pairs and the sample covariance together. Two
errors, as shares of that of G = 0: squared W2 (Bures) and squared Frobenius distance of G G' and S.
The latter has an exact law, and so has the trace of G G'; simulations must agree, |z| under 4.5.
"""
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import core
import harness
import sweep

# UNSPECIFIED: all sizes, the error and the linear form itself, of which only the abstract was at
# hand. Eigenvalues of S fall evenly from 1 to 0.05.
CPU = dict(jobs=1, d=64, n_known=20, draws=1000, semi_draws=10, semi_steps=800, ks=[
    1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19, 20, 21, 22, 24, 26, 28, 31, 35, 41, 50, 60, 80, 100, 200,
    500, 1000])
PRESETS = {"paper": CPU | dict(draws=10_000, semi_draws=100), "cpu": CPU,
           "smoke": CPU | dict(draws=50, semi_draws=2, semi_steps=5, ks=[2, 10, 20, 40, 100])}
OWN = {"d": (int, 2, 1000, "size of the data"),
       "n_known": (int, 8, 1000, "n, how many data are known, fewer than d"),
       "draws": (int, 10, 10 ** 7, "data sets of a simulation")}
METHODS = ("pca", "pairs", "shrunk", "rescaled", "semi")
Z_MAX = 4.5


def shrinkage(k, n):
    """a of E[G G' | X] = a X X' / n for pairs; infinite within one of k = n."""
    return k / (n - k - 1) if k < n - 1 else n / (k - n - 1) if k > n + 1 else math.inf


def moments(k, n):
    """For M (n, n) with G G' = X M X': E tr M, E (tr M)^2 and E tr M^2, exact for |k - n| > 3.

    The eigenvalues of M that are not 0 are those of an inverse Wishart matrix of size p = min(k, n)
    and max(k, n) degrees of freedom, whose moments are in von Rosen (1988).
    """
    p, q = min(k, n), abs(k - n)
    below = q * (q - 1) * (q - 3)
    return p / (q - 1), p * (p * (q - 2) + 2) / below, p * (p + q - 1) / below


def law(method, k, n, s):
    """Exact means of tr G G' / tr S and |G G' - S|^2 / |S|^2 for eigenvalues s (d,) of S; None
    where there is none: pca below k = n, pairs within 3 of it, and semi."""
    a, tr, tr2 = shrinkage(k, n), s.sum().item(), s.square().sum().item()
    if method == "semi" or method == "pca" and k < n or method != "pca" and abs(k - n) <= 3:
        return None
    mean, square, of_square = (1, 1, 1 / n) if method in ("pca", "shrunk") else moments(k, n)
    c = {"pca": 1, "pairs": 1, "shrunk": a, "rescaled": 1 / a}[method]
    quartic = c ** 2 * (tr2 * square + (tr ** 2 + tr2) * of_square)     # E tr (X M X')^2
    return c * mean, (quartic - 2 * c * mean * tr2 + tr2) / tr2


def errors(root, s):
    """tr G G' / tr S, squared Frobenius and squared W2 error, each (B,), of G G' = root root'."""
    cov, tr, std = root @ root.mT, s.sum(), s.sqrt()[:, None]
    trace = cov.diagonal(dim1=1, dim2=2).sum(1)
    w2 = trace + tr - 2 * torch.linalg.svdvals(std * root).sum(1)
    return trace / tr, (cov - torch.diag(s)).square().sum((1, 2)) / s.square().sum(), w2 / tr


def roots(method, x, k, gen):
    """Matrices (B, d, <= n) with G G' = root root', for data x (B, d, n) and fresh noise."""
    n = x.shape[2]
    if method in ("pca", "shrunk"):
        u, size, _ = torch.linalg.svd(x / n ** 0.5, full_matrices=False)
        return u[..., :k] * size[:, None, :k] if method == "pca" else shrinkage(k, n) ** 0.5 * u * (
            size[:, None])
    z = torch.randn(len(x), k, n, generator=gen, dtype=x.dtype)
    # G = X pinv(Z), and pinv(Z) has the singular values of Z, inverted: k or n of them.
    _, size, v = torch.linalg.svd(z, full_matrices=False)
    root = x @ v.mT / size[:, None]
    return root if method == "pairs" else root / shrinkage(k, n) ** 0.5


def semi(x, k, steps, gen):
    """G (B, d, k) by Adam on |X - G Z|^2 / (n / 2) of n / 2 pairs, and |G G' - X X' / n|^2."""
    # UNSPECIFIED: how both are joined; two equal weights, a small random G at first.
    few = x.shape[2] // 2
    z = torch.randn(len(x), k, few, generator=gen, dtype=x.dtype)
    g = (0.1 * torch.randn(len(x), x.shape[1], k, generator=gen, dtype=x.dtype)).requires_grad_()
    opt, cov = torch.optim.Adam([g], 0.02), x @ x.mT / x.shape[2]
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.02 * min(1, 2 - 2 * step / steps)
        opt.zero_grad()
        ((x[..., :few] - g @ z).square().sum() / few + (g @ g.mT - cov).square().sum()).backward()
        opt.step()
    return g.detach()


def run(cfg, folder):
    """All methods at all k -> a row each: means over the draws, their standard errors, laws, z."""
    now, gen, rows = harness.versions(), core.generator(cfg.seed), []
    harness.write_json(folder / "config.json", {"flags": cfg, **now, "git": [now["git"] or ""]})
    n, s = cfg.n_known, torch.linspace(1, 0.05, cfg.d, dtype=torch.float64)
    for k in cfg.ks:
        for method in METHODS:
            # More latents than 100 of `semi` take minutes each.
            if method == "semi" and k > 100 or method in ("shrunk", "rescaled") and math.isinf(
                    shrinkage(k, n)):
                continue
            draws = cfg.semi_draws if method == "semi" else cfg.draws
            x = s.sqrt()[:, None] * torch.randn(draws, cfg.d, n, generator=gen, dtype=s.dtype)
            found = errors(semi(x, k, cfg.semi_steps, gen) if method == "semi" else
                           roots(method, x, k, gen), s)
            exact, row = law(method, k, n, s), {"seed": cfg.seed, "method": method, "k": k}
            for i, name in enumerate(("trace", "frobenius", "w2")):
                mean, error = found[i].mean().item(), found[i].std().item() / draws ** 0.5
                row |= {name: mean, f"{name}_error": error, f"{name}_median":
                        found[i].median().item()}
                # A mean of fourth powers varies by eighth ones: near k = n there are none.
                if exact and i < 2 and (abs(k - n) > 7 or method in ("pca", "shrunk")):
                    row |= {f"{name}_exact": exact[i], f"{name}_z": (mean - exact[i]) / error}
            rows.append(row | {"n": n})
    return rows


def claims(rows):
    """By medians of W2 over the draws, one a seed: the peak, the second descent, what it is."""
    n, seeds = rows[0]["n"], list(dict.fromkeys(r["seed"] for r in rows))

    def lowest(method, side):
        return [min(r["w2_median"] for r in rows if r["method"] == method and r["seed"] == seed
                    and (r["k"] < n) == (side == "<") and r["k"] != n) for seed in seeds]

    def at(method, k):
        return [r["w2_median"] for r in rows if (r["method"], r["k"]) == (method, k)]
    half, found = n // 2, []
    for method, theirs in (("pca", "no peak"), ("pairs", "a peak"), ("semi", "a peak, or two")):
        found.append((f"squared W2 error of {method} at k = n/2, n, 5 n", theirs, ", ".join(
            sweep.spread(at(method, k)) for k in (half, n, 5 * n)), sweep.verdict(
                at(method, n), [max(v) for v in zip(at(method, half), at(method, 5 * n))],
                method != "pca") if method != "pca" else ""))
    for method, what in (("pairs", "pairs descend below their best for k < n"), (
            "rescaled", "so do pairs out of which shrinkage is taken"), (
            "shrunk", "so does shrinkage without pairs")):
        ours, before = lowest(method, ">"), lowest(method, "<")
        found.append((f"least squared W2 error of {method} for k > n, k < n", what,
                      f"{sweep.spread(ours)}, {sweep.spread(before)}",
                      sweep.verdict(ours, before, higher=False)))
    for better, worse, what in (("shrunk", "pairs", "PCA shrunk alike is better"), (
            "rescaled", "pca", "without shrinkage pairs still beat PCA")):
        one, other = lowest(better, ">"), lowest(worse, ">")
        found.append((f"linear G, more latents than data: least squared W2 error of {better}, "
                      f"{worse}", what,
                      f"{sweep.spread(one)}, {sweep.spread(other)}",
                      sweep.verdict(one, other, higher=False)))
    z = np.abs([r[f"{k}_z"] for r in rows for k in ("trace", "frobenius") if f"{k}_z" in r])
    found.append(("laws of the trace and of the Frobenius error", "", f"{len(z)} checks, largest "
                  f"|z| {z.max():.1f}, mean z^2 {(z ** 2).mean():.2f}",
                  "holds" if z.max() < Z_MAX else "no"))
    return [{"paper": "Pseudo-supervision, linear", "what": what, "theirs": theirs, "ours": text,
             "verdict": verdict, "front": False}
            for what, theirs, text, verdict in found]


def plot(folder):
    """figure.png from the files: both errors over k; of the right one lines are the exact means."""
    result = sweep.read_result(folder, Path(__file__).stem)
    rows, n, fig = result["rows"], result["rows"][0]["n"], harness.figure(3)
    left, right = fig.subplots(1, 2)
    for method, style in zip(METHODS, harness.STYLE.values()):
        mine = [r for r in rows if r["method"] == method]
        ks = sorted({r["k"] for r in mine})
        w2, frobenius = ([np.mean([r[key] for r in mine if r["k"] == k]) for k in ks]
                         for key in ("w2_median", "frobenius"))
        left.plot(ks, w2, marker=".", label=method, **style)
        right.plot(ks, frobenius, ".", color=style["color"])
        exact = {r["k"]: r["frobenius_exact"] for r in mine if "frobenius_exact" in r}
        right.plot(*zip(*sorted((exact | {n: math.nan}).items())), **style)
    left.set(title="squared W2 error, median")
    right.set(title="squared Frobenius error, mean; lines: exact")
    for ax, top in ((left, 20), (right, 100)):
        ax.set(xlabel="size k of the latents", xscale="log", yscale="log")
        ax.set_ylim(top=top)
        ax.axvline(n, color="grey", ls=":", label="k = n")
    left.legend()
    harness.save_figure(fig, folder)
    return result


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS, OWN, training=None)
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    args.seeds = args.seeds or [0]
    given = {k: v for k, v in vars(args).items() if k not in sweep.NOT_CONFIG and v is not None}
    cfg = Namespace(**PRESETS[args.preset] | given)
    for key, (_, least, most, _) in OWN.items():
        if not least <= getattr(cfg, key) <= most or cfg.n_known >= cfg.d:
            raise core.UserError(f"--{key.replace('_', '-')} {getattr(cfg, key)}: must be from "
                                 f"{least} to {most}, and --n-known below --d")
    runs = [Namespace(**vars(cfg), seed=seed, run=f"s{seed}") for seed in args.seeds]
    if sweep.announce(runs, args.dry_run):
        return {}
    folder, rows = sweep.train_all(args, args.preset, runs, run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
