"""Figures 1 and 7: Sample Correction and PCR cure the two-rectangle GAN.

The claim (Section 5.2): trained on 25,600 images of exactly two rectangles, a GAN draws one, two
or three. Dropping the already correct fakes from D's batch (SC) makes 97% of its images correct,
giving D the AND and OR of training pairs as extra negatives (PCR) 70%, both together 99%, and the
GAN has not collapsed: nearly every training image is among 256,000 samples.

    python exp_sc.py

Arms: vanilla, sc, pcr, sc+pcr. Presets: paper (32 px, one GPU), cpu (16 px at the same proportions,
four arms in under ten minutes on two cores), smoke. Ends in result.json and figure.png.
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

PAPER = {"vanilla": None, "pcr": 0.70, "sc": 0.97, "sc+pcr": 0.99}  # share correct, Figure 1

# Section 5.2 and Appendix F: 32 px, squares of 8, 25,600 images.
# UNSPECIFIED: all else. WGAN-GP, because it neither collapses nor saturates here; one level more
# than a DCGAN has (`base` 2), because a critic that reads only local features off linearly cannot
# count; a small z, because an image has four degrees of freedom; beta1 0 and falling step sizes,
# for crisp squares (Section 5.3 has beta1 0.5).
PRESETS = {
    "paper": dict(
        size=32, n_train=25_600, n_cover=256_000, model="wgangp", arch="dcgan", loss="wgan",
        norm_d="none", init_d="he", gp_weight=10.0, gp_comb=False, n_dis=1, steps=50_000,
        batch=64, lr_g=5e-4, lr_d=5e-4, beta1=0.0, beta2=0.9, z_dim=8, width=64, base=2,
        comb_weight=0.5, flip=False, lr_decay=True, ema_beta=0.0, n_fid=4096, checks=50,
        sc_counter="tolerant", log_every=100),
    # DEVIATION: a canvas half as wide with squares half as wide. It has 1/14 as many possible
    # images, and so have the training set and the coverage samples.
    "cpu": dict(size=16, n_train=1_800, n_cover=18_000, width=32, batch=32, lr_g=1e-3, lr_d=1e-3,
                steps=3600, n_fid=1024, checks=18),
    "smoke": dict(jobs=1, size=16, n_train=64, n_cover=64, width=8, z_dim=16, batch=16, steps=4,
                  n_fid=32, checks=2, log_every=2),
}
ARMS = {"vanilla": (False, False), "pcr": (False, True), "sc": (True, False),
        "sc+pcr": (True, True)}


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="geometry", choices=["geometry"], help="(%(default)s)")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="(%(default)s)")
    p.add_argument("--size", type=int, help="canvas in pixels, squares are a quarter (preset)")
    p.add_argument("--n-train", type=int, help="training images (preset)")
    p.add_argument("--n-cover", type=int, help="samples searched for training images (preset)")
    p.add_argument("--sc-counter", choices=["exact", "tolerant"],
                   help="what SC takes for realistic (preset)")
    harness.run_flags(p, PRESETS)
    core.train_flags(p)
    return p


def correct(x, side, counter):
    """Which images (B, 1, H, W) have exactly two rectangles and nothing else, bool (B,)."""
    n, clean = (geometry.count_exact if counter == "exact" else geometry.count)(x, side)
    return (n == 2) & clean


def training_set(cfg):
    """Appendix F: images of two rectangles, and the AND (one) and OR (three) of each pair.

    -> (n_train, 1, H, W) and as many combinations, both uint8.
    """
    x, y, x_and, x_or = geometry.draw_pairs(cfg.n_train // 2, cfg.size, cfg.size // 4)
    return torch.cat([x, y]), torch.cat([x_and, x_or])


def hooks(cfg, pool):
    """The two cures, as the trainer's `combine` (PCR) and `correct` (SC)."""
    use_sc, use_pcr = ARMS[cfg.arm]

    def combine(trainer, x_real):
        index = torch.randint(len(pool), (len(x_real),), generator=trainer.gen,
                              device=trainer.device)
        return trainer.images(index, pool)

    def discard(trainer, x_fake):
        # UNSPECIFIED: how strict the counting algorithm is. The tolerant one cures sooner; the
        # exact one leaves D the ragged images of two rectangles to learn from. UNSPECIFIED:
        # whether they are replaced (Section 5.1) or discarded (Section 5.2, Appendix F).
        realism = correct(x_fake, cfg.size // 4, cfg.sc_counter).float()
        return core.sample_correction(x_fake, realism, threshold=0.5)

    return dict(combine=combine if use_pcr else None, correct=discard if use_sc else None)


def score(trainer):
    """Shares of n_fid images: correct by both counters, and with 0, 1, 2, 3, 4 and more."""
    cfg, side = trainer.cfg, trainer.cfg.size // 4
    row = {}
    for name, G in (("", trainer.G), ("_ema", trainer.G_ema)):
        if G is not None:
            x = torch.cat(list(core.generate(G, cfg.n_fid, cfg.z_dim)))
            n = geometry.count(x, side)[0].clamp(max=4)
            row |= {f"correct{name}": correct(x, side, "tolerant").float().mean().item(),
                    f"correct_exact{name}": correct(x, side, "exact").float().mean().item(),
                    f"hist{name}": (n.bincount(minlength=5) / len(n)).tolist()}
    return row | {"wrong": 1 - row["correct"]}


def coverage(G, cfg, images, n_show=30):
    """Mode coverage, Figure 7, and what the paper lacks: memorised against new images.

    Streams n_cover samples. Returns a dict (coverage_exact: how many of n_show random training
    images are among them; distinct: different correct images; unseen_share: correct samples that
    are no training image) and (n_show, 2, H, W) uint8, each image beside its nearest sample.
    """
    side, pick = cfg.size // 4, torch.randperm(len(images), generator=harness.generator(0, "cpu"))
    shown = images[pick[:n_show]]
    wanted = geometry.lit(shown).flatten(1).float()
    least = torch.full((len(shown),), torch.inf)
    nearest, seen, correct_n, unseen = torch.zeros_like(shown), geometry.pack(shown[:0]), 0, 0
    for x in core.generate(G, cfg.n_cover, cfg.z_dim, seed=2):
        x = x.cpu()
        lit = geometry.lit(x).flatten(1).float()
        distance = wanted.sum(1, keepdim=True) + lit.sum(1) - 2 * wanted @ lit.T  # pixels apart
        value, index = distance.min(1)
        closer = value < least
        least, nearest[closer] = torch.where(closer, value, least), x[index[closer]]
        good = x[correct(x, side, "exact")]
        correct_n, unseen = correct_n + len(good), unseen + (~geometry.is_in(good, images)).sum()
        seen = torch.unique(torch.cat([seen, geometry.pack(good)]), dim=0)
    return {"coverage_exact": int((least == 0).sum()), "coverage_n": len(shown),
            "n_cover": cfg.n_cover, "distinct": len(seen),
            "distinct_train": geometry.count_distinct(images),
            "unseen_share": float(unseen) / max(correct_n, 1)}, torch.cat([shown, nearest], 1)


def train(cfg, folder):
    """One arm and seed, from scratch or from its checkpoint -> trainer and training images."""
    device, (images, pool) = harness.pick_device(cfg.device), training_set(cfg)
    trainer = core.Trainer(cfg, images, device, **hooks(cfg, pool.to(device)))
    harness.open_run(folder, cfg, cfg.resume)
    core.fit(trainer, folder, score, best="wrong")
    return trainer, images


def evaluate(cfg, folder, trainer, images):
    """The result row of a finished run: its last score, its curve, its mode coverage."""
    scored = [r for r in harness.read_rows(folder / "metrics.jsonl") if "correct" in r]
    covered, pairs = coverage(trainer.G, cfg, images)
    harness.save_grid(pairs.flatten(0, 1)[:, None], folder / "coverage.png", columns=10)
    x = torch.cat(list(core.generate(trainer.G, 36, cfg.z_dim, seed=1)))
    np.savez(folder / "samples.npz", samples=x.cpu(), pairs=pairs,
             good=correct(x, cfg.size // 4, "tolerant").cpu())
    row = {"arm": cfg.arm, "seed": cfg.seed, "steps": scored[-1]["step"],
           "d_steps": scored[-1]["d_steps"], "n": cfg.n_fid,
           **{k: v for k, v in scored[-1].items() if k.startswith(("correct", "hist"))},
           "curve": [[r["step"], r["correct"], r["correct_exact"]] for r in scored], **covered}
    harness.write_json(folder / "row.json", row)


def run(cfg, folder):
    evaluate(cfg, folder, *train(cfg, folder))


def plot(folder):
    """figure.png from the files: what each arm draws, share correct over training, counts, modes.
    """
    result = harness.read_result(folder, Path(__file__).stem)
    rows = result["rows"]
    arms = [a for a in ARMS if any(r["arm"] == a for r in rows)]
    steps = max(r["steps"] for r in rows)
    fig = Figure(figsize=(10, 7.4), layout="constrained")
    top, middle, bottom = fig.subfigures(3, height_ratios=[1.15, 1.25, 0.6])
    for ax, arm in zip(np.atleast_1d(top.subplots(1, len(arms))), arms):
        row = next(r for r in rows if r["arm"] == arm)
        with np.load(folder / run_name(row) / "samples.npz") as saved:
            colours = [[128, 128, 128] if good else [230, 0, 0] for good in saved["good"]]
            picture = harness.grid(harness.frame(saved["samples"], colours))
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(f"{arm}: {100 * mean(rows, arm, 'correct'):.0f}% have two", fontsize=10)
        ax.axis("off")
    top.suptitle(f"Samples after {steps} updates of G; red frame: not exactly two squares",
                 fontsize=10)
    left, right = middle.subplots(1, 2, width_ratios=[1.5, 1])
    for arm in arms:
        curves = [list(zip(*r["curve"])) for r in rows if r["arm"] == arm]
        harness.band(left, [c[:2] for c in curves], f"{arm} (n={len(curves)})", lw=1.8,
                  **harness.STYLE[arm])
        harness.band(left, [(c[0], c[2]) for c in curves], None, lw=0.8, alpha=0.6,
                  **harness.STYLE[arm])
        if PAPER[arm]:
            left.annotate(f"paper {arm}", (steps * 1.01, PAPER[arm]), fontsize=7,
                          va="top" if arm == "sc" else "bottom", annotation_clip=False)
            left.axhline(PAPER[arm], lw=0.5, color=harness.STYLE[arm]["color"])
    left.set(xlabel="updates of G", ylabel="share of images with two rectangles", ylim=(0, 1.02),
             xlim=(0, steps), title="thick: tolerant counter, thin: pixel-exact counter")
    left.title.set_fontsize(9)
    left.legend(frameon=False, fontsize=8, loc=(0.02, 0.6))
    for i, arm in enumerate(arms):
        share = np.mean([r["hist"] for r in rows if r["arm"] == arm], 0)
        right.bar(np.arange(5) + (i - (len(arms) - 1) / 2) * 0.2, share, 0.2, label=arm,
                  color=harness.STYLE[arm]["color"], hatch=[None, "///", "...", "xx"][i % 4],
                  edgecolor="white", lw=0)
    right.set(xticks=range(5), xticklabels=["0", "1", "2", "3", "4+"], ylabel="share of images",
              xlabel="rectangles in an image (tolerant counter)", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    ax, last = bottom.subplots(), rows[-1]
    with np.load(folder / run_name(last) / "samples.npz") as saved:
        ax.imshow(harness.grid(torch.from_numpy(saved["pairs"]).flatten(0, 1)[:, None], 20),
                  cmap="gray", interpolation="nearest")
    ax.axis("off")
    ax.set_title(f"{last['arm']}: training image | nearest of {last['n_cover']:,} samples: "
                 f"{last['coverage_exact']} of {last['coverage_n']} found exactly; "
                 f"{100 * last['unseen_share']:.0f}% of correct samples are no training image",
                 fontsize=9)
    harness.save_figure(fig, folder)
    return result


def mean(rows, arm, key):
    return float(np.mean([r[key] for r in rows if r["arm"] == arm]))


def run_name(row):
    return f"{row['arm']}-s{row['seed']}"


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
    if cfg.size < 16 or cfg.n_train < 2 or cfg.n_train % 2 or cfg.n_cover < 1:
        raise harness.UserError(f"--size {cfg.size} must be at least 16, --n-train {cfg.n_train} "
                             f"even and at least 2, --n-cover {cfg.n_cover} at least 1")
    core.check_batch(cfg, training_set(cfg)[0])  # before anything is written
    folder = harness.open_run(args.outdir / Path(__file__).stem / (args.name or f"geometry-{name}"),
                           cfg, args.resume)
    ones = [argparse.Namespace(**vars(cfg), arm=a, seed=s) for s in cfg.seeds for a in cfg.arms]
    rows = harness.run_all(run, [(one, folder / run_name(vars(one))) for one in ones], cfg.jobs,
                        device)
    for arm in cfg.arms:
        print(f"{arm:8s}" + "".join(f"  {k} {mean(rows, arm, k):.3f}" for k in (
            "correct", "correct_exact", "coverage_exact", "distinct", "unseen_share")))
    harness.write_result(folder, Path(__file__).stem, cfg, device, start, rows,
                               {"correct": PAPER, "coverage": "most of 30, Figure 7"})
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
