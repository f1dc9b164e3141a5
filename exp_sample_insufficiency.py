"""Figures 2 and 6: small batches make training unstable.

The claim (Section 3.2): with 64 images of exactly two rectangles and a prior over 64 fixed codes,
full batches (FGD, 64) settle on the images; with batches of 16 (MGD) losses, gradients and the
images of fixed codes keep changing and have the wrong number of rectangles. On CelebA, after the
same amount of data, the FID is lower the larger the batch.

    python exp_sample_insufficiency.py
    python exp_sample_insufficiency.py --dataset celeba

Rectangles: arms are the laws by which images and codes are sampled, `fgd` and four kinds of MGD;
the first MGD arm runs at every size of `--batches`, the others at `--batch`. Photographs: batch
sizes, and three cures at the smallest one. All see equally many images, unless `--steps` sets
equally many updates. Presets: paper (one GPU), cpu (one seed in under ten minutes on two cores),
smoke. Ends in result.json and figure.png.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread
from scipy.optimize import linear_sum_assignment

import core
import data
import fid
import geometry
import harness

# Section 3.2 and Appendix E: 32 px, squares of 8, 64 images, as many codes, batches 16 and 64.
# UNSPECIFIED: all else. WGAN-GP, as Section 3.3 analyses a WGAN, one update of D for one of G, no
# momentum (theory_sde.py: it would change what small batches do), and the networks of exp_sc.py
# with a larger z, so that 64 codes are far apart.
PRESETS = {
    "paper": dict(
        size=32, n_train=64, batch=16, batches=[4, 8, 16, 32], images=640_000, model="wgangp",
        arch="dcgan", loss="wgan", norm_d="none", init_d="he", gp_weight=10.0, gp_comb=False,
        comb_weight=0.5, n_dis=1, lr_g=5e-4, lr_d=5e-4, beta1=0.0, beta2=0.9, z_dim=128, width=64,
        base=2, flip=False, lr_decay=False, ema_beta=0.0, n_fid=64, checks=48, sample_every=None,
        log_every=50),
    # DEVIATION: a canvas and squares half as wide, and half the channels.
    "cpu": dict(size=16, width=32, lr_g=1e-3, lr_d=1e-3, images=38_400, batches=[8, 16, 32],
                checks=24),
    "smoke": dict(jobs=1, size=16, n_train=8, batch=4, batches=[2, 4], images=32, width=8,
                  z_dim=8, checks=2, log_every=2),
}
# Figure 2, right. UNSPECIFIED: the model, the batch sizes, the amount of data.
PHOTOS = {
    "paper": dict(n_train=None, batches=[4, 16, 64, 256], images=2_560_000, base=4, beta1=0.5,
                  lr_g=2e-4, lr_d=2e-4, ema_beta=0.999, n_fid=10_000, n_real=None, dims=2048,
                  checks=10, log_every=100),
    # DEVIATION: 32 px, a small net, and a distance of 192 features, which few images determine.
    "cpu": dict(size=32, batches=[4, 16, 64], images=19_200, width=16, z_dim=64, lr_g=5e-4,
                lr_d=5e-4, ema_beta=0.99, n_fid=256, n_real=512, dims=192, checks=3),
    "smoke": dict(n_train=None, size=32, batches=[2, 4], images=32, width=8, z_dim=8, n_fid=16,
                  n_real=16, dims=64, checks=2, log_every=2),
}
LAWS = {  # how a batch of images and one of codes come about (`theory_sde.py --section 4`)
    "fgd": "all images and all codes in every step",
    "wor": "MGD: both without replacement, afresh in every step",
    "iid": "MGD: both independent, with replacement",
    "real-wor": "MGD: images without replacement, codes independent",
    "epoch": "MGD: both in epochs, shuffled anew",
}
CURES = ("ema", "r1", "optimistic")
LOOK = {  # colour, dash
    "fgd": ("#000000", "-"), "wor": ("#D55E00", "--"), "iid": ("#0072B2", "-."),
    "real-wor": ("#009E73", (0, (5, 1))), "epoch": ("#CC79A7", ":"), "ema": ("#D55E00", "--"),
    "r1": ("#0072B2", "-."), "optimistic": ("#009E73", (0, (5, 1))),
}


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="geometry",
                   help="geometry, celeba, cifar10, imagenet, or a folder or zip of images "
                        "(%(default)s)")
    p.add_argument("--arms", nargs="+", choices=[*LAWS, "vanilla", *CURES],
                   help=f"rectangles: {' '.join(LAWS)}; photographs: vanilla {' '.join(CURES)} "
                        "(all)")
    p.add_argument("--batches", type=int, nargs="+", help="batch sizes to compare (preset)")
    p.add_argument("--images", type=int, help="training images that D sees in a run (preset)")
    p.add_argument("--lr-rule", default="constant", choices=["constant", "sqrt", "linear"],
                   help="step sizes in batch / 64: constant, its root, itself (%(default)s)")
    p.add_argument("--r1-weight", type=float, default=10.0, help="gamma of arm r1 (%(default)s)")
    p.add_argument("--size", type=int, help="pixels (preset; squares are a quarter)")
    p.add_argument("--n-train", type=int, help="training images, and codes (preset)")
    p.add_argument("--data-dir", type=Path, default=data.DATA_DIR,
                   help="data sets, weights and caches; or set GAN_DATA (%(default)s)")
    p.add_argument("--n-real", type=int, help="training images in the reference (preset)")
    p.add_argument("--dims", type=int, choices=[64, 192, 768, 2048], help="FID features (preset)")
    p.add_argument("--fid-weights", help="Inception weights; default: data-dir or a download")
    harness.run_flags(p, PRESETS)
    core.train_flags(p)
    return p


# --------------------------------------------------------------------- rectangles, Figures 2 and 6


class Sampler(core.Trainer):
    """A Trainer whose prior is uniform over as many fixed codes as images, under a law of LAWS."""

    def __init__(self, cfg, images, device):
        super().__init__(cfg, images, device)
        self.codes = torch.randn(len(images), cfg.z_dim,
                                 generator=harness.generator(cfg.seed, "cpu")).to(device)
        self.order, self.drawn, self.player = {}, {}, "d"

    def pick(self, what):
        """Which images (`real`) or codes the next batch has: indices (B,)."""
        # UNSPECIFIED: the law of MGD. All four; they differ by the noise left in a step.
        n, batch, law = len(self.data), self.cfg.batch, self.cfg.arm
        if law == "fgd":
            return torch.arange(n, device=self.device)
        if law == "iid" or (law == "real-wor" and what != "real"):
            return torch.randint(n, (batch,), generator=self.gen, device=self.device)
        at = self.drawn.get(what, 0) % (n // batch) if law == "epoch" else 0
        if not at:
            self.order[what] = torch.rand(n, generator=self.gen, device=self.device).argsort()
        self.drawn[what] = self.drawn.get(what, 0) + 1
        return self.order[what][at * batch:(at + 1) * batch]

    def real(self):
        return self.images(self.pick("real"))

    def latent(self, n):
        return self.codes[self.pick(self.player)]

    def g_update(self):
        self.player = "g"               # an epoch of codes for each of the players
        metrics = super().g_update()
        self.player = "d"
        return metrics

    def shown(self):
        return core.draw(self.G, self.codes)

    def state(self):
        return {**super().state(), "codes": self.codes, "order": self.order, "drawn": self.drawn}

    def load(self, state):
        super().load(state)
        self.codes, self.drawn = state["codes"].to(self.device), dict(state["drawn"])
        self.order = {k: v.to(self.device) for k, v in state["order"].items()}


def correct(x, side, counter=geometry.count):
    """Which images (N, 1, H, W) have exactly two rectangles and nothing else, bool (N,)."""
    n, clean = counter(x, side)
    return (n == 2) & clean


def assignment(x, y):
    """Mean L2 distance between two sets of N uint8 images, in [-1, 1], under the best matching."""
    x, y = (core.to_float(i).flatten(1).double().cpu() for i in (x, y))
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return float(distance[linear_sum_assignment(distance)].mean())


def scorer(images, side, folder):
    """The score of a Sampler: what the images of its codes are; keeps them for `evaluate`."""
    def score(trainer):
        x = trainer.shown().cpu()
        with harness.atomic(folder / "images" / f"{trainer.step:07d}.npy") as tmp:
            np.save(tmp, x)
        return {"correct": correct(x, side).float().mean().item(),
                "correct_exact": correct(x, side, geometry.count_exact).float().mean().item(),
                "assignment_distance": assignment(x, images),
                "covered": int(geometry.is_in(images, x).sum())}
    return score


def changes(images):
    """Share of codes whose image (lit pixels) changed since the check before, for (K, N, 1, H, W).

    -> K - 1 numbers in [0, 1].
    """
    lit = torch.stack([geometry.lit(x) for x in images]).flatten(2)
    return (lit[1:] != lit[:-1]).any(2).float().mean(1).tolist()


def run_geometry(cfg, folder):
    """One law, batch and seed -> its row."""
    images = geometry.draw(cfg.n_train, 2, cfg.size, cfg.size // 4, seed=cfg.seed)
    trainer = Sampler(cfg, images, harness.pick_device(cfg.device))
    harness.open_run(folder, cfg, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, scorer(images, cfg.size // 4, folder), "assignment_distance",
             each_step=True)
    rows = harness.read_rows(folder / "metrics.jsonl")
    checks, steps = ([r for r in rows if k in r] for k in ("correct", "d_loss"))
    last = steps[-max(len(steps) // 3, 1):]                 # the last third
    changed = changes([torch.from_numpy(np.load(folder / "images" / f"{r['step']:07d}.npy"))
                       for r in checks])
    late = changed[-max(len(changed) // 3, 1):] or [math.nan]
    curve = [[r["step"], r["d_steps"] * cfg.batch, r["correct"], r["correct_exact"],
              r["assignment_distance"], c] for r, c in zip(checks, [None, *changed])]
    harness.write_json(folder / "row.json", [{
        "arm": cfg.arm, "batch": cfg.batch, "seed": cfg.seed, "steps": cfg.steps,
        "updates_per_check": cfg.eval_every,
        "images_seen": cfg.d_steps * cfg.batch, "n": len(images),
        **{f"{k}_var": float(np.var([r[k] for r in last]))
           for k in ("d_loss", "g_loss", "d_grad", "g_grad")},
        "gap_var": float(np.var([r["d_real"] - r["d_fake"] for r in last])),
        "changes_per_code": float(np.mean(late)),
        **{k: checks[-1][k] for k in ("correct", "correct_exact", "assignment_distance",
                                      "covered")}, "curve": curve}])


# ------------------------------------------------------------------- photographs, Figure 2, right


def r1(trainer, x_real):
    """R1 (Mescheder et al. 2018, eq. 9): r1_weight / 2 times the mean of |grad D|^2 at reals."""
    x = x_real.detach().requires_grad_()
    grad, = torch.autograd.grad(trainer.D(x).sum(), x, create_graph=True)
    return trainer.cfg.r1_weight / 2 * grad.square().flatten(1).sum(1).mean()


class OptimisticAdam(torch.optim.Adam):
    """Optimistic Adam (Daskalakis et al. 2018, algorithm 1): twice this step less the one before.
    """

    @torch.no_grad()
    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in params]
        super().step()
        for p, before in zip(params, old):
            step, slots = p - before, self.state[p]
            if "step_before" not in slots:
                slots["step_before"] = torch.zeros_like(p)
            p.add_(step - slots["step_before"])
            slots["step_before"].copy_(step)


def prepare(cfg):
    """A cell's images, its score of a trainer (FID and KID of n_fid fakes), and what that is."""
    device = harness.pick_device(cfg.device)
    images = data.load(cfg.dataset, cfg.size, cfg.data_dir, n_train=cfg.n_train)
    core.check_batch(cfg, images)
    net = fid.load_inception(dims=cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir,
                             device=device)
    return images, *fid.scorer(net, images, cfg.n_real, cfg.n_fid, cfg.data_dir / "cache")


def run_photos(cfg, folder):
    """One batch size or cure and seed -> its rows, one a score; an averaged G has its own."""
    images, score, protocol = prepare(cfg)
    # UNSPECIFIED: what R1 does to WGAN-GP. It takes the place of the gradient penalty.
    more = {"r1": {"penalise": r1}, "optimistic": {"optimizer": OptimisticAdam}}.get(cfg.arm, {})
    trainer = core.Trainer(cfg, images, harness.pick_device(cfg.device), **more)
    harness.open_run(folder, {**vars(cfg), **protocol}, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, score)
    rows = [{"arm": arm, "batch": cfg.batch, "seed": cfg.seed, "step": r["step"],
             "images_seen": r["d_steps"] * cfg.batch, "fid": r[key], "n_fid": cfg.n_fid, **protocol}
            for r in harness.read_rows(folder / "metrics.jsonl") if "fid" in r
            for arm, key in ((cfg.arm, "fid"), ("ema", "fid_ema")) if key in r]
    harness.write_json(folder / "row.json", rows)


def equivalent_batch(batches, fids, value):
    """The batch size at which plain training has the FID `value`, log-linear between `batches`.

    nan outside of the measured FIDs, or where they do not fall with the batch size.
    """
    if np.any(np.diff(fids) >= 0) or not fids[-1] <= value <= fids[0]:
        return math.nan
    return float(2 ** np.interp(-value, -np.array(fids), np.log2(batches)))


# ------------------------------------------------------------------------------------------ both


def configure(args, device):
    """The configuration of the whole, and one for each cell (arm and batch size)."""
    name = args.preset or ("paper" if device.type == "cuda" else "cpu")
    photos = args.dataset != "geometry"
    layers = [PRESETS["paper"], PRESETS[name]]
    if photos:
        layers = [PRESETS["paper"], {"size": data.SIZES.get(args.dataset, 64)}, PHOTOS["paper"],
                  *([PRESETS["smoke"]] if name == "smoke" else []), PHOTOS[name]]
    arms = args.arms or (["vanilla", *CURES] if photos else list(LAWS))
    wrong = [a for a in arms if (a in LAWS) == photos]
    if wrong:
        raise harness.UserError(f"--arms {wrong[0]}: not for --dataset {args.dataset}")
    asked = {}
    for layer in (*layers, {k: v for k, v in vars(args).items() if v is not None}):
        asked |= layer
    if args.engine == "graph" and "epoch" in arms:
        raise harness.UserError("--engine graph: arm epoch counts on the host; leave it out")
    if not 0 <= args.r1_weight <= 10 ** 6:
        raise harness.UserError(f"--r1-weight {args.r1_weight}: must be from 0 to 10^6")
    batches = sorted(set(asked["batches"]))
    if batches[0] < 2 or asked["images"] < batches[-1]:
        raise harness.UserError(f"--batches {batches}: must be from 2 to --images "
                                f"{asked['images']}")
    if photos:
        cells = [("vanilla", b) for b in batches if {"vanilla", "ema"} & set(arms)]
        cells += [(a, batches[0]) for a in arms if a in ("r1", "optimistic")]
    else:
        if asked["size"] not in range(16, 4097) or asked["n_train"] not in range(1, 10 ** 6):
            raise harness.UserError(f"--size {asked['size']} must be from 16 to 4096, --n-train "
                                    f"{asked['n_train']} from 1 to 10^6")
        kinds = [a for a in arms if a != "fgd"]
        cells = [("fgd", asked["n_train"])] * ("fgd" in arms)
        cells += [(kinds[0], b) for b in batches if kinds]
        cells += [(a, asked["batch"]) for a in kinds if (a, asked["batch"]) not in cells]

    def resolve(arm, batch):
        more = {"gp_weight": 0.0} if arm == "r1" else {}
        if photos and not (arm == "vanilla" and batch == batches[0] and "ema" in arms):
            more["ema_beta"] = 0.0
        cfg = core.resolve(args, *layers, {"steps": None, "d_steps": asked["images"] // batch},
                           preset=name, channels=3 if photos else 1, arms=arms, batches=batches,
                           batch=batch, **more)
        # UNSPECIFIED: how step sizes follow the batch. They do not; --lr-rule scales them.
        scale = (batch / 64) ** {"constant": 0, "sqrt": 0.5, "linear": 1}[cfg.lr_rule]
        cfg.lr_g, cfg.lr_d, cfg.arm = cfg.lr_g * scale, cfg.lr_d * scale, arm
        return cfg

    return resolve(None, asked["batch"]), [resolve(*cell) for cell in cells]


def run(cfg, folder):
    (run_geometry if cfg.dataset == "geometry" else run_photos)(cfg, folder)


def run_name(row):
    return f"{row['arm']}-b{row['batch']}-s{row['seed']}"


def lines(ax, rows, arms, x, y, title, label):
    """Mean and range over seeds of one entry of the curves against another, an arm a line."""
    for arm in arms:
        curves = [list(zip(*[(p[x] / (1, 1000)[x], p[y]) for p in r["curve"][y == 5:]]))
                  for r in rows if r["arm"] == arm]
        colour, dash = LOOK[arm]
        harness.band(ax, curves, arm, color=colour, ls=dash, lw=1.6)
    ax.set(xlabel=("updates of G", "images seen, thousands")[x], ylabel=title)
    ax.set_title(label)


def against_batch(ax, rows, key, label):
    """Every seed's number and their mean against the batch size, laws apart; log axes."""
    for arm in LAWS:
        here = [r for r in rows if r["arm"] == arm]
        sizes = sorted({r["batch"] for r in here})
        if sizes:
            means = [np.mean([r[key] for r in here if r["batch"] == b]) for b in sizes]
            ax.plot([r["batch"] for r in here], [r[key] for r in here], ".", ms=4, alpha=0.5,
                    color=LOOK[arm][0])
            ax.plot(sizes, means, marker="os^Dv"[list(LAWS).index(arm)], ms=6, mfc="none",
                    color=LOOK[arm][0], ls=LOOK[arm][1], label=arm)
    ax.set(xlabel="batch size", ylabel=label, xscale="log")
    sizes = sorted({r["batch"] for r in rows})
    ax.set_xticks(sizes, [str(b) for b in sizes])
    ax.minorticks_off()


def film(folder, row, n_codes=4, n_checks=16):
    """The images of some codes (rows) through training (columns), red frames if not two."""
    if not (folder / run_name(row) / "images").is_dir():
        raise harness.UserError(f"{folder}: the runs' own folders are not in it; draw from the "
                                "whole run folder")
    files = sorted((folder / run_name(row) / "images").glob("*.npy"))
    files = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(n_checks, len(files)))]
    x = torch.stack([torch.from_numpy(np.load(f)[:n_codes]) for f in files], 1).flatten(0, 1)
    good = correct(x, x.shape[-1] // 4)
    colours = [[150, 150, 150] if g else [230, 0, 0] for g in good]
    return harness.grid(harness.frame(x, colours), len(files))


def plot_geometry(folder, rows):
    """Codes through training, losses and gradients, how many are right, against the batch size."""
    one = min(r["seed"] for r in rows)
    full = [r for r in rows if r["arm"] == "fgd"]
    part = [r for r in rows if r["arm"] != "fgd"]
    middle = sorted({r["batch"] for r in part if r["arm"] != part[0]["arm"]}
                    or {part[0]["batch"]})[0] if part else None
    part = [r for r in part if r["batch"] == middle]        # the laws at one batch size
    arms = [a for a in LAWS if any(r["arm"] == a for r in full + part)]
    shown = [r for r in full if r["seed"] == one] + [r for r in part if r["seed"] == one][:1]
    n = len({r["seed"] for r in rows})
    fig = harness.figure(8.4)
    films, noise, curves, sizes = fig.subfigures(4, height_ratios=[0.72, 1, 1, 1])
    for ax, row in zip(np.atleast_1d(films.subplots(1, len(shown))), shown):
        ax.imshow(film(folder, row), interpolation="nearest")
        ax.set_title(f"{row['arm']}, batch {row['batch']}: four codes through training")
        ax.axis("off")
    films.suptitle(f"Each row is a fixed code; red frame: not exactly two squares (seed {one})")
    for ax, key, label in zip(noise.subplots(1, 3), ("d_loss", "g_grad", "gap"), (
            "loss of D", "gradient norm of G", "critic gap, real - fake")):
        limits = []
        for row in reversed(shown):
            steps = [r for r in harness.read_rows(folder / run_name(row) / "metrics.jsonl")
                     if "d_loss" in r]
            y = [r["d_real"] - r["d_fake"] if key == "gap" else r[key] for r in steps]
            ax.plot([r["d_steps"] * row["batch"] / 1000 for r in steps], y, lw=0.5,
                    color=LOOK[row["arm"]][0], label=f"{row['arm']}, batch {row['batch']}")
            limits += [*np.quantile(y, [0.002, 0.998])]
            ax.set_ylim(min(limits) - 0.1 * np.std(y), max(limits) + 0.1 * np.std(y))
        ax.set(xlabel="images seen, thousands", ylabel=label)
    noise.axes[0].legend()
    top = curves.subplots(1, 3)
    least = min(r["steps"] for r in full + part)
    lines(top[0], full + part, arms, 0, 2, "share of codes", "image has two squares, equal updates")
    top[0].set_xlim(0, least)
    lines(top[1], full + part, arms, 1, 2, "share of codes", "image has two squares, equal images")
    lines(top[2], full + part, arms, 1, 5, "share of codes", "image changed since the last check")
    top[2].legend()
    for ax in top:
        ax.set_ylim(0, 1.03)
    bottom = sizes.subplots(1, 4)
    for ax, (key, label) in zip(bottom, [
            ("d_loss_var", "variance of D's loss"), ("changes_per_code", "changes per code, check"),
            ("correct", "share correct"), ("assignment_distance", "distance to the images")]):
        against_batch(ax, rows, key, label)
    bottom[0].set_yscale("log")
    sizes.suptitle(f"The first two over the last third of training, the others at its end; {n} "
                   f"seed{'s' * (n > 1)}")
    return fig


def plot_photos(folder, rows):
    """FID over images seen, the last FID against the batch size with the cures, sample grids."""
    sizes = sorted({r["batch"] for r in rows if r["arm"] == "vanilla"})
    cures = [a for a in CURES if any(r["arm"] == a for r in rows)]
    small, n = min(r["batch"] for r in rows), len({r["seed"] for r in rows})
    last = max(r["images_seen"] for r in rows)
    curves = [("vanilla", b, f"batch {b}", dict(color=str(0.75 * i / max(len(sizes) - 1, 1)),
               lw=2.2 - 1.4 * i / len(sizes), ls="-")) for i, b in enumerate(reversed(sizes))]
    curves += [(a, small, f"{small}, {a}", dict(color=LOOK[a][0], ls=LOOK[a][1])) for a in cures]
    fig = harness.figure(4.6)
    top, bottom = fig.subfigures(2, height_ratios=[1.3, 1])
    left, right = top.subplots(1, 2, width_ratios=[1.3, 1])
    final = {}
    for arm, batch, label, style in curves:
        here = [r for r in rows if (r["arm"], r["batch"]) == (arm, batch)]
        seeds = {r["seed"] for r in here}
        xy = [tuple(zip(*[(r["images_seen"], r["fid"]) for r in here if r["seed"] == s]))
              for s in seeds]
        harness.band(left, xy, label, marker="o", ms=3, **style)
        final[arm, batch] = [y[-1] for _, y in xy]
    left.set(xlabel="images seen by D", ylabel=f"{rows[0]['score']}, {rows[0]['n_fid']} fakes",
             title=f"{n} seed{'s' * (n > 1)}")
    top.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    means = [np.mean(final["vanilla", b]) for b in sizes]
    if sizes:
        right.plot(sizes, means, "o-", color="black", label="plain")
        for b in sizes:
            right.plot([b] * len(final["vanilla", b]), final["vanilla", b], ".", color="0.5")
    for arm in cures:
        value = np.mean(final[arm, small])
        m_eq = equivalent_batch(sizes, means, value) if len(sizes) > 1 else math.nan
        right.axhline(value, lw=1, color=LOOK[arm][0], ls=LOOK[arm][1])
        right.plot(small, value, "s", color=LOOK[arm][0],
                   label=f"{arm}: like a batch of {m_eq:.0f}" if m_eq == m_eq else arm)
    right.set(xlabel="batch size", ylabel=f"{rows[0]['score']} after {last:,} images",
              xscale="log", title=f"cures at batch {small}: which batch they equal")
    right.set_xticks(sizes, [str(b) for b in sizes])
    right.minorticks_off()
    right.legend()
    shown = [c for c in curves if c[0] != "ema"]
    for ax, (arm, batch, label, _) in zip(np.atleast_1d(bottom.subplots(1, len(shown))), shown):
        seed = min(r["seed"] for r in rows)
        run = folder / run_name({"arm": arm, "batch": batch, "seed": seed})
        grids = sorted((run / "samples").glob("*.png"))
        if grids:
            ax.imshow(imread(grids[-1]), interpolation="nearest")
        ax.set_title(label)
        ax.axis("off")
    return fig


def plot(folder):
    """figure.png from the files, one of two kinds."""
    result = harness.read_result(folder, Path(__file__).stem)
    rows = result["rows"]
    draw = plot_geometry if "correct" in rows[0] else plot_photos
    harness.save_figure(draw(folder, rows), folder)
    return result


def main(argv=None):
    args, start = flags().parse_args(argv), time.time()
    if args.plot:
        return plot(args.plot)
    device = harness.pick_device(args.device)
    if args.sample:
        return core.sample_checkpoint(args.sample, args.n, args.out, device)
    base, cells = configure(args, device)
    if harness.announce(cells, args.dry_run):
        return {}
    for cfg in cells:  # what is missing or wrong shows here, before anything is written
        if cfg.dataset == "geometry":
            core.check_batch(cfg, range(cfg.n_train))
    if base.dataset != "geometry":
        largest = max(cells, key=lambda cfg: cfg.batch)
        note = fid.rank_note(min(base.n_fid, prepare(largest)[2]["n_real"]), base.dims)
        print(note or f"scored by {base.n_fid} fakes")
    name = args.name or f"{Path(base.dataset).stem}-{base.preset}"
    folder = harness.open_run(args.outdir / Path(__file__).stem / name, base, args.resume,
                              sweep=True)
    ones = [argparse.Namespace(**vars(cfg), seed=seed) for seed in base.seeds for cfg in cells]
    rows = sum(harness.run_all(run, [(one, folder / run_name(vars(one))) for one in ones],
                               base.jobs, device), [])
    harness.write_result(folder, Path(__file__).stem, base, device, start, rows, {
        "figure_2": "FGD settles, MGD does not; the larger the batch the lower the FID"})
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
