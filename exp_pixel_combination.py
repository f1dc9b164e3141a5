"""Figure 3, top: D takes the pixel-wise AND and OR of two training images for real.

The claim (Section 4.2): trained on two images of three rectangles each, which share two, a GAN
also draws their AND (two rectangles) and OR (four), and during training D scores them like the
real ones. The cure: PCR, with AND and OR as extra negatives (eq. 13).

    python exp_pixel_combination.py

Arms: vanilla, pcr. Controls: D's score of images of three rectangles elsewhere and of random
pixels. Presets: paper (32 px), cpu (16 px at the same proportions, under five minutes on two
cores), smoke. Ends in result.json and figure.png.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import core
import geometry
import harness

# Section 4.2 gives the images and about 600 steps (Figure 3). UNSPECIFIED: everything else; the
# loss here is the non-saturating one of eq. (1)'s example, f1 = log x, f2 = log(1 - x).
PRESETS = {
    "paper": dict(
        size=32, model="gan", arch="dcgan", loss="ns", norm_d="none", init_d="dcgan",
        gp_weight=0.0, gp_comb=False, n_dis=1, steps=600, batch=64, lr_g=2e-4, lr_d=2e-4,
        beta1=0.5, beta2=0.9, z_dim=128, width=64, base=4, comb_weight=0.5, flip=False,
        lr_decay=False, ema_beta=0.0,
        n_fid=1024, checks=60, sample_every=100, ckpt_every=100, log_every=10,
        seeds=[0, 1, 2, 3, 4]),
    # DEVIATION: a canvas and squares half as wide, and half the channels.
    "cpu": dict(size=16, width=32, n_fid=512, checks=60, seeds=[0, 1, 2]),
    "smoke": dict(jobs=1, size=16, width=8, z_dim=16, batch=16, steps=4, n_fid=32, checks=2,
                  log_every=2, sample_every=2, ckpt_every=2),
}
ARMS = {"vanilla": False, "pcr": True}
NAMES = ("a", "b", "and", "or")
CURVES = {  # label, colour, dash; told apart in greyscale too
    "real": ("A or B (three)", "#009E73", "-"), "and": ("A AND B (two)", "#D55E00", "--"),
    "or": ("A OR B (four)", "#0072B2", "-."), "three": ("three elsewhere", "#000000", ":"),
    "random": ("random pixels", "#CC79A7", (0, (1, 3))),
}


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="geometry", choices=["geometry"], help="(%(default)s)")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="(%(default)s)")
    p.add_argument("--size", type=int, help="canvas in pixels, squares are a quarter (preset)")
    harness.run_flags(p, PRESETS)
    core.train_flags(p)
    return p


def images_of(cfg):
    """A, B, their AND and their OR: uint8 (4, 1, H, W), of three, three, two and four squares."""
    return torch.cat(geometry.draw_pairs(1, cfg.size, cfg.size // 4, k=3, seed=cfg.seed))


def copies(known):
    """The training set, uint8 (128, 1, H, W)."""
    # UNSPECIFIED: how batches come from two images. Drawn from 64 copies of each, so that a batch
    # of 64 holds both in changing numbers.
    return known[:2].repeat(64, 1, 1, 1)


def scorer(cfg, known, device):
    """The score of a trainer: what its samples are, and how D scores reals, AND, OR, controls."""
    side, gen = cfg.size // 4, harness.generator(cfg.seed, "cpu")
    density = (known[:2] > 127).float().mean()
    noise = (torch.rand(64, 1, cfg.size, cfg.size, generator=gen) < density).to(torch.uint8) * 255
    shown = dict(zip(NAMES, known.split(1)), random=noise,
                 three=geometry.draw(64, 3, cfg.size, side, seed=cfg.seed + 1))
    shown = {k: core.to_float(v).to(device) for k, v in shown.items()}

    @torch.no_grad()
    def score(trainer):
        x = torch.cat(list(core.generate(trainer.G, cfg.n_fid, cfg.z_dim)))
        n, _ = geometry.count(x, side)
        row = {f"share_{k}": (n == k).float().mean().item() for k in (2, 3, 4)}
        for name in NAMES:  # the same lit pixels, every one
            same = geometry.lit(x) == geometry.lit(shown[name])
            row[f"share_{name}"] = same.flatten(1).all(1).float().mean().item()
        trainer.D.eval()
        row |= {f"d_{k}": trainer.D(v).mean().item() for k, v in shown.items()}
        trainer.D.train()
        return row

    return score


def train(cfg, folder):
    """One arm and seed, from scratch or from its checkpoint -> trainer and the four images."""
    device, known = harness.pick_device(cfg.device), images_of(cfg)
    images, negatives = copies(known), known[2:].to(device)

    def combine(trainer, x_real):
        index = torch.randint(2, (len(x_real),), generator=trainer.gen, device=device)
        return trainer.images(index, negatives)

    trainer = core.Trainer(cfg, images, device, combine=combine if ARMS[cfg.arm] else None)
    harness.open_run(folder, cfg, cfg.resume)
    core.fit(trainer, folder, scorer(cfg, known, device))
    return trainer, known


def evaluate(cfg, folder, trainer, known):
    """The result rows of a finished run, one a score; keeps some samples for the figure."""
    x = torch.cat(list(core.generate(trainer.G, 48, cfg.z_dim, seed=1))).cpu()
    np.savez(folder / "samples.npz", samples=x, known=known)
    keys = ("step", *(f"share_{k}" for k in (2, 3, 4, *NAMES)), "d_and", "d_or", "d_random",
            "d_three")
    rows = [{"arm": cfg.arm, "seed": cfg.seed, **{k: r[k] for k in keys},
             "share_real": r["share_a"] + r["share_b"], "d_real": (r["d_a"] + r["d_b"]) / 2,
             "n": cfg.n_fid}
            for r in harness.read_rows(folder / "metrics.jsonl") if "share_a" in r]
    harness.write_json(folder / "row.json", rows)


def run(cfg, folder):
    evaluate(cfg, folder, *train(cfg, folder))


def run_name(row):
    return f"{row['arm']}-s{row['seed']}"


def plot(folder):
    """figure.png from the files: shares of samples, D's scores, the four images and samples."""
    result = harness.read_result(folder, Path(__file__).stem)
    rows = result["rows"]
    arms = [a for a in ARMS if any(r["arm"] == a for r in rows)]
    fig = Figure(figsize=(11, 3.3 * len(arms)), layout="constrained")
    axes = fig.subplots(len(arms), 3, squeeze=False, width_ratios=[1.25, 1.25, 1])
    for arm, (left, middle, right) in zip(arms, axes):
        here = [r for r in rows if r["arm"] == arm]
        seeds = sorted({r["seed"] for r in here})

        for name, (label, colour, dash) in CURVES.items():
            for ax, prefix in ((left, "share_"), (middle, "d_")):
                if prefix + name in here[0]:
                    curves = [([r["step"] for r in here if r["seed"] == s],
                               [r[prefix + name] for r in here if r["seed"] == s]) for s in seeds]
                    harness.band(ax, curves, label, color=colour, ls=dash, lw=1.6)
        left.set(title=f"{arm}: what the samples are (n={len(seeds)} seeds)", ylim=(0, 1),
                 xlabel="updates of G", ylabel="share of samples, exact to the pixel")
        middle.set(title=f"{arm}: how D scores them", xlabel="updates of G", ylabel="logit of D")
        for ax in (left, middle):
            ax.legend(frameon=False, fontsize=7)
        with np.load(folder / run_name(here[0]) / "samples.npz") as saved:
            known, x = (torch.from_numpy(saved[k]) for k in ("known", "samples"))
        picture = [framed(known, known), torch.full((4, 3, *[s + 4 for s in x.shape[2:]]), 255),
                   framed(x, known)]
        right.imshow(harness.grid(torch.cat(picture).to(torch.uint8), 8), interpolation="nearest")
        right.set_title("A, B, AND, OR; below, samples\nframed if equal to one", fontsize=9)
        right.axis("off")
    harness.save_figure(fig, folder)
    return result


def framed(x, known):
    """Images x (N, 1, H, W), each framed in the colour of the known image it equals, else grey."""
    same = (geometry.lit(x)[:, None] == geometry.lit(known)[None]).flatten(2).all(2)  # (N, 4)
    table = [[int(CURVES[name][1][i:i + 2], 16) for i in (1, 3, 5)]
             for name in ("real", "real", "and", "or")]
    return harness.frame(x, [table[row.int().argmax()] if row.any() else [200, 200, 200]
                          for row in same])


def main(argv=None):
    args, start = flags().parse_args(argv), time.time()
    if args.plot:
        return plot(args.plot)
    device = harness.pick_device(args.device)
    if args.sample:
        return core.sample_checkpoint(args.sample, args.n, args.out, device)
    name = args.preset or ("paper" if device.type == "cuda" else "cpu")
    cfg = core.resolve(args, PRESETS["paper"], PRESETS[name], preset=name, channels=1)
    if harness.announce([cfg], args.dry_run):
        return {}
    if cfg.size < 16:
        raise harness.UserError(f"--size {cfg.size}: must be at least 16")
    core.check_batch(cfg, copies(images_of(argparse.Namespace(size=cfg.size, seed=0))))
    folder = harness.open_run(args.outdir / Path(__file__).stem / (args.name or f"geometry-{name}"),
                           cfg, args.resume)
    ones = [argparse.Namespace(**vars(cfg) | {"arm": a, "seed": s})
            for a in cfg.arms for s in cfg.seeds]
    rows = sum(harness.run_all(run, [(one, folder / run_name(vars(one))) for one in ones], cfg.jobs,
                            device), [])
    harness.write_result(folder, Path(__file__).stem, cfg, device, start, rows, {
        "figure_3": "AND and OR are drawn, and scored like the reals in the earlier stage"})
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
