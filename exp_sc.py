"""Figures 1, 5 and 7: Sample Correction and PCR on the two-rectangle GAN, SC on photographs.

The claim (Section 5.2): trained on 25,600 images of exactly two rectangles, a GAN draws one,
two or three. Dropping the already correct fakes from D's batch (SC) makes 97% of its images
correct, giving D the AND and OR of training pairs as extra negatives (PCR) 70%, both together 99%,
and the GAN has not collapsed: nearly every training image is among 256,000 samples.

    python exp_sc.py

The second (Section 5.3): trained on 32 photographs in batches of 2, replacing fakes that lie close
to a training image (DIF below 0.1) by others improves FID and DIF "by a large margin".

    python exp_sc.py --dataset cifar10

Arms: vanilla, sc, pcr, sc+pcr of rectangles; vanilla, sc and the control random of photographs.
Presets: paper (one GPU), cpu (all arms of a data set, one seed, in some ten minutes on two cores;
rectangles at 16 px), smoke. Ends in result.json and figure.png.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

import core
import data
import fid
import geometry
import harness

# ------------------------------------------------------------------------------------ rectangles

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
        index = torch.randint(len(pool), (cfg.batch,), generator=trainer.gen,
                              device=trainer.device)
        return trainer.shard(trainer.images(index, pool))

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
    harness.open_run(folder, cfg, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, score, best="wrong")
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


def plot_rectangles(result, folder):
    """What each arm draws, share correct over training, counts, modes -> figure."""
    rows = result["rows"]
    arms = [a for a in ARMS if any(r["arm"] == a for r in rows)]
    steps = max(r["steps"] for r in rows)
    fig = harness.figure(5.8)
    top, middle, bottom = fig.subfigures(3, height_ratios=[1.15, 1.25, 0.6])
    for ax, arm in zip(np.atleast_1d(top.subplots(1, len(arms))), arms):
        row = next(r for r in rows if r["arm"] == arm)
        with np.load(folder / run_name(row) / "samples.npz") as saved:
            colours = [[128, 128, 128] if good else [230, 0, 0] for good in saved["good"]]
            picture = harness.grid(harness.frame(saved["samples"], colours))
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(f"{arm}: {100 * mean(rows, arm, 'correct'):.0f}% have two")
        ax.axis("off")
    top.suptitle(f"Samples after {steps} updates of G; red frame: not exactly two squares")
    left, right = middle.subplots(1, 2, width_ratios=[1.5, 1])
    for arm in arms:
        curves = [list(zip(*r["curve"])) for r in rows if r["arm"] == arm]
        harness.band(left, [c[:2] for c in curves], f"{arm} (n={len(curves)})", lw=1.6,
                     **harness.STYLE[arm])
        harness.band(left, [(c[0], c[2]) for c in curves], None, lw=0.7, alpha=0.7,
                     **harness.STYLE[arm])
        if PAPER[arm]:
            left.annotate(f"paper {arm}", (steps * 1.01, PAPER[arm]),
                          va="top" if arm == "sc" else "bottom", annotation_clip=False)
            left.axhline(PAPER[arm], lw=0.5, color=harness.STYLE[arm]["color"])
    left.set(xlabel="updates of G", ylabel="share of images with two rectangles", ylim=(0, 1.02),
             xlim=(0, steps), title="thick: tolerant counter, thin: pixel-exact counter")
    left.legend(loc=(0.01, 0.65), labelspacing=0.2)
    for i, arm in enumerate(arms):
        share = np.mean([r["hist"] for r in rows if r["arm"] == arm], 0)
        right.bar(np.arange(5) + (i - (len(arms) - 1) / 2) * 0.2, share, 0.2, label=arm,
                  color=harness.STYLE[arm]["color"], hatch=[None, "///", "...", "xx"][i % 4],
                  edgecolor="white", lw=0)
    right.set(xticks=range(5), xticklabels=["0", "1", "2", "3", "4+"], ylabel="share of images",
              xlabel="rectangles in an image", ylim=(0, 1.02))
    right.legend()
    ax, last = bottom.subplots(), rows[-1]
    with np.load(folder / run_name(last) / "samples.npz") as saved:
        ax.imshow(harness.grid(torch.from_numpy(saved["pairs"]).flatten(0, 1)[:, None], 20),
                  cmap="gray", interpolation="nearest")
    ax.axis("off")
    ax.set_title(f"{last['arm']}: training image | nearest of {last['n_cover']:,} samples: "
                 f"{last['coverage_exact']} of {last['coverage_n']} found exactly; "
                 f"{100 * last['unseen_share']:.0f}% of correct samples are no training image")
    return fig


# ----------------------------------------------------------------------------------- photographs

# Section 5.3: Adam(2e-4, .5, .9), "e.g." 32 images and batches of 2, threshold 0.1. UNSPECIFIED:
# all else. WGAN-GP on the DCGAN pair with one update of D per update of G; every seed has the same
# 32 images.
PHOTOS = {
    "paper": dict(
        n_train=32, n_heldout=2048, model="wgangp", arch="dcgan", loss="wgan", norm_d="none",
        init_d="he", gp_weight=10.0, gp_comb=False, n_dis=1, steps=50_000, batch=2, lr_g=2e-4,
        lr_d=2e-4, beta1=0.5, beta2=0.9, z_dim=128, width=64, base=4, comb_weight=0.5, flip=False,
        lr_decay=False, ema_beta=0.0, n_fid=2048, dims=2048, n_dif=1024, checks=25, over=4,
        sc_threshold=0.1, dif_norm="range", sc_replace="least", log_every=100, seeds=[0, 1, 2]),
    # DEVIATION: 8 images, because with 32 no fake was under the threshold in 3,500 updates; narrow
    # networks, CelebA at 32 px, a sixth of the updates at larger, falling step sizes; the distance
    # of early Inception features of few samples instead of the FID.
    "cpu": dict(size=32, n_train=8, width=24, steps=8000, lr_g=5e-4, lr_d=5e-4, lr_decay=True,
                n_fid=64, dims=64, n_heldout=512, n_dif=256, checks=8, seeds=[0]),
    "smoke": dict(jobs=1, size=32, n_train=8, n_heldout=32, width=8, z_dim=16, steps=4, n_fid=16,
                  n_dif=16, checks=2, log_every=2, seeds=[0]),
}
PHOTO_ARMS = ("vanilla", "sc", "random")
DUPLICATE, FLAT = 0.03, 0.02   # root mean square over pixels, in parts of the range 0 to 255


def distances(x, y):
    """L2 distances (M, N) of images (M, C, H, W) and (N, C, H, W), exact also where small."""
    return torch.cdist(x.flatten(1), y.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")


def dif_scale(x_train, norm):
    """The L2 distance whose DIF is 1, for training images (N, C, H, W) in [-1, 1]."""
    # UNSPECIFIED: the normalisation. In parts of the largest distance that two images can have,
    # 0.1 is an error of 26 grey levels: a blurred copy's, not an unseen photograph's. In parts of
    # the `mean` or `max` distance of training images hardly a blurred copy is under 0.1.
    if norm == "range":
        return 2 * x_train[0].numel() ** 0.5
    scale = getattr(torch.pdist(x_train.flatten(1)), norm)().item()
    if not scale > 0:
        raise harness.UserError(f"--dif-norm {norm}: all training images are the same; try range")
    return scale


def dif(x, x_train, scale):
    """DIF (M,) in [0, 1] of images x in [-1, 1], and which of x_train is nearest to each (M,)."""
    least, nearest = distances(x, x_train).min(1)
    return (least / scale).clamp(max=1), nearest


def negatives(d, n_keep, threshold, arm, gen):
    """Which of M fakes of DIF d (M,) make D's batch: the first n_keep, or spares for them.

    `sc`: a fake under the threshold makes way for the spare of largest DIF. `random`: as many make
    way, but which go and which spares come is drawn from gen. -> indices (n_keep,)
    """
    index = torch.arange(len(d), device=d.device)
    keep, _ = core.sample_correction(index, -d, -threshold, n_keep)
    if arm == "random":
        stay, come = (torch.rand(n, generator=gen, device=d.device).argsort()
                      for n in (n_keep, len(d) - n_keep))
        keep = torch.where(index[:n_keep] < (keep >= n_keep).sum(), n_keep + come[:n_keep], stay)
    return keep


def correction(cfg, images, device):
    """SC by DIF or its control as the trainer's `correct`; None for vanilla."""
    x_train = core.to_float(images).to(device)
    scale = dif_scale(x_train, cfg.dif_norm)

    # UNSPECIFIED: what "replaced with less realistic ones" means. By the least realistic of
    # over - 1 batches more (each drawn by itself, so that batch norm treats all alike), or by
    # nothing (`discard`: weight 0, as for the rectangles).
    def replace(trainer, x_fake):
        x = torch.cat([x_fake, *(trainer.fake() for _ in range(cfg.over - 1))])
        d, _ = dif(x, x_train, scale)
        return x[negatives(d, len(x_fake), cfg.sc_threshold, cfg.arm, trainer.gen)], None

    def discard(trainer, x_fake):
        d, _ = dif(x_fake, x_train, scale)
        _, weight = core.sample_correction(x_fake, -d, -cfg.sc_threshold)
        order = torch.rand(len(d), generator=trainer.gen, device=device).argsort()
        return x_fake, weight[order] if cfg.arm == "random" else weight

    return None if cfg.arm == "vanilla" else {"least": replace, "discard": discard}[cfg.sc_replace]


def measure(x, images, cfg):
    """What samples owe to the training images; both uint8 (., C, H, W).

    dif: mean DIF. copies: share of samples under the threshold. recall: share of training images
    that are nearest to a copy (32 are too few for balls in feature space). collapsed: samples
    nearly constant (FLAT) or nearly another sample (DUPLICATE), copies left out, lest memorising
    count as collapse. noisy: share of samples rougher than every training image.
    """
    x, images = core.to_float(x), core.to_float(images.to(x.device))
    d, nearest = dif(x, images, dif_scale(images, cfg.dif_norm))
    copy, unit = d < cfg.sc_threshold, 2 * x[0].numel() ** 0.5
    apart = distances(x, x) / unit + torch.eye(len(x), device=x.device)
    flat = (x - x.mean((2, 3), keepdim=True)).flatten(1).norm(dim=1) / unit < FLAT
    rough, known = (v.diff(dim=2).abs().mean((1, 2, 3)) + v.diff(dim=3).abs().mean((1, 2, 3))
                    for v in (x, images))
    return {"dif": d.mean().item(), "copies": copy.float().mean().item(),
            "recall": len(nearest[copy].unique()) / len(images),
            "collapsed": int(((flat | (apart.min(1).values < DUPLICATE)) & ~copy).sum()),
            "noisy": (rough > known.max()).float().mean().item(), "n": len(x)}


def prepare(cfg):
    """Training images, other photographs that pose as samples, the score of samples, its name."""
    images = data.load(cfg.dataset, cfg.size, cfg.data_dir, "train", cfg.n_train)
    core.check_batch(cfg, images)
    held = data.load(cfg.dataset, cfg.size, cfg.data_dir, "test")
    if len(images) < 2 or len(held) < 4:
        raise harness.UserError(f"--dataset {cfg.dataset}: needs 2 training images and 4 held out "
                                f"(every tenth is), found {len(images)} and {len(held)}")
    held = held[torch.randperm(len(held), generator=harness.generator(0, "cpu"))]
    net = fid.load_inception(dims=cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir,
                             device=harness.pick_device(cfg.device))
    ends = [fid.reference(net, v, cfg.data_dir / "cache")[0]
            for v in (images, held[:2 * cfg.n_heldout:2])]

    def score(x):
        stats, _ = fid.features(net, x[:cfg.n_fid].split(fid.BATCH))
        own, other = (fid.frechet_distance(v.mean, v.cov, stats.mean, stats.cov) for v in ends)
        return {"fid": own, "fid_heldout": other, "n_fid": stats.n,
                **measure(x[:cfg.n_dif], images, cfg)}

    return images, held[1::2], score, {"score": net.label, "features": net.id,
                                       "dims": len(ends[0].mean)}


def references(cfg):
    """Rows of what no GAN drew: unseen photographs, a perfect copyist, averages of two, grey."""
    images, unseen, score, protocol = prepare(cfg)
    gen, n = harness.generator(0, "cpu"), max(cfg.n_fid, cfg.n_dif)
    i = torch.randint(len(images), (n,), generator=gen)
    j = (i + torch.randint(1, len(images), (n,), generator=gen)) % len(images)
    average = core.to_uint8((core.to_float(images[i]) + core.to_float(images[j])) / 2)
    shown = {"unseen photographs": unseen[:n], "copyist": images[i], "averages of two": average,
             "plain grey": torch.full_like(images[i], 128)}
    return [{"part": "sc_reference", "arm": k, **score(v), **protocol} for k, v in shown.items()]


def run_photos(cfg, folder):
    """One arm and seed, from scratch or from its checkpoint, and its rows, one a score."""
    device, (images, _, score, protocol) = harness.pick_device(cfg.device), prepare(cfg)
    trainer = core.Trainer(cfg, images, device, correct=correction(cfg, images, device))
    harness.open_run(folder, {**vars(cfg), **protocol}, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, lambda trainer: score(torch.cat(list(
        core.generate(trainer.G, max(cfg.n_fid, cfg.n_dif), cfg.z_dim)))))
    x, x_train = trainer.shown(24), core.to_float(images).to(device)
    nearest = dif(core.to_float(x), x_train, dif_scale(x_train, cfg.dif_norm))[1].cpu()
    np.savez(folder / "samples.npz", samples=x.cpu(), nearest=images[nearest], train=images[:24])
    harness.write_json(folder / "row.json", [
        {"part": "sc_natural", "arm": cfg.arm, "seed": cfg.seed, **r, **protocol}
        for r in harness.read_rows(folder / "metrics.jsonl") if "fid" in r])


def plot_photos(result, folder):
    """Samples of each arm above their nearest training images, and the curves -> figure."""
    cfg, rows = result["config"], [r for r in result["rows"] if "seed" in r]
    fixed = {r["arm"]: r for r in result["rows"] if "seed" not in r}
    arms = [a for a in PHOTO_ARMS if any(r["arm"] == a for r in rows)]
    first, n_train = rows[0], cfg["n_train"]
    fig = harness.figure(7.6)
    top, bottom = fig.subfigures(2, height_ratios=[1, 2.2])
    axes = top.subplot_mosaic([["train"] * len(arms), arms], height_ratios=[1, 2.2])
    for arm, ax in axes.items():
        keys = ["train"] if arm == "train" else ["samples", "nearest"]
        with np.load(folder / run_name({**first, "arm": arm if arm in arms else first["arm"]})
                     / "samples.npz") as saved:
            lines = zip(*(torch.from_numpy(saved[k]).split(8) for k in keys))
        x = torch.cat([line for pair in lines for line in pair])[:48]
        ax.imshow(harness.grid(x, min(len(x), 24 if arm == "train" else 8)),
                  interpolation="nearest")
        ax.set_title(f"{len(x)} of the {n_train} training images; below: samples, and under each "
                     "the training image nearest to it" if arm == "train" else arm)
        ax.axis("off")
    for ax, (thick, thin, title, label, limits) in zip(bottom.subplots(2, 2).flat, [
            ("fid", "fid_heldout", f"thick: to the {n_train} training images\n"
             "thin: to held-out images", f"{first['score']}, {first['n_fid']} samples", None),
            ("dif", None, f"DIF (SC replaces fakes under {cfg['sc_threshold']:g})",
             f"mean DIF, {first['n']} samples", (-0.01, None)),
            ("copies", "recall", "thick: samples that copy a training image\n"
             "thin: training images that are copied", "share", (-0.02, 1.02)),
            ("collapsed", "noisy", "thick: collapsed samples\nthin: samples rougher than any "
             "training image", "share", (-0.02, 1.02))]):
        for arm in arms:
            here = [[r for r in rows if (r["arm"], r["seed"]) == (arm, s)] for s in cfg["seeds"]]
            for key, width in [(thick, 1.6), (thin, 0.7)][:1 + bool(thin)]:
                unit = first["n"] if key == "collapsed" else 1
                harness.band(ax, [([r["step"] for r in run], [r[key] / unit for r in run])
                                  for run in here], f"{arm} (n={len(here)})" if key == thick else
                             None, lw=width, **harness.STYLE[arm])
        for name, row in fixed.items() if thick in ("fid", "dif") else ():
            ax.axhline(row[thick], color="0.5", lw=0.7, ls=(0, (1, 2)))
            side = {"plain grey": "top", "unseen photographs": "bottom"}.get(name, "center")
            ax.annotate(f" {name}", (1, row[thick]), xycoords=("axes fraction", "data"), va=side)
        ax.set(xlabel="updates of G", ylabel=label, xlim=(0, None),
               **{"ylim": limits} if limits else {"yscale": "log"})
        ax.set_title(title)
        if thick == "copies":
            ax.legend()
    copyist, unseen, grey = (fixed[k] for k in ("copyist", "unseen photographs", "plain grey"))
    fig.suptitle(
        f"{Path(cfg['dataset']).name}, batches of {cfg['batch']}. Paper, Figure 5: with SC \"FID "
        "and DIF scores are both better during training\".\nBoth reward memorising: a perfect "
        f"copyist has {first['score']} {copyist['fid']:.2g} and DIF 0, unseen photographs "
        f"{unseen['fid']:.2g} and {unseen['dif']:.2f};\nplain grey has a DIF of "
        f"{grey['dif']:.2f}."
        + " Few images, so that distances are too large: compare arms only."
        * bool(fid.rank_note(min(n_train, first["n_fid"]), first["dims"])))
    return fig


# ----------------------------------------------------------------------------------- the command


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--dataset", default="geometry", help="geometry (rectangles), cifar10, celeba, imagenet, "
        "or a folder or zip of images (%(default)s)")
    add("--arms", nargs="+", choices=list(dict.fromkeys([*ARMS, *PHOTO_ARMS])),
        help="default: all that the data set has")
    add("--size", type=int, help="pixels, squares are a quarter (preset)")
    add("--n-train", type=int, help="training images (preset)")
    add = p.add_argument_group("rectangles").add_argument
    add("--n-cover", type=int, help="samples searched for training images (preset)")
    add("--sc-counter", choices=["exact", "tolerant"], help="what SC takes for realistic (preset)")
    add = p.add_argument_group("photographs").add_argument
    add("--sc-threshold", type=float, help="SC replaces fakes of a DIF below it (0.1)")
    add("--dif-norm", choices=["range", "mean", "max"], help="what distance has DIF 1: the largest "
        "of any two images, the mean or the largest of training images (range)")
    add("--sc-replace", choices=["least", "discard"],
        help="by the least realistic spare, or by nothing (least)")
    add("--over", type=int, help="batches of fakes drawn for one, with `least` (4)")
    add("--n-heldout", type=int, help="unseen images in the second FID (preset)")
    add("--n-dif", type=int, help="samples per DIF and share of copies (preset)")
    add("--dims", type=int, choices=[64, 192, 768, 2048], help="FID features (preset)")
    add("--data-dir", type=Path, default=data.DATA_DIR,
        help="data sets, weights and caches; or set GAN_DATA (%(default)s)")
    add("--fid-weights", help="Inception weights; default: data-dir or a download")
    harness.run_flags(p, PRESETS)
    core.train_flags(p)
    return p


def check(cfg):
    """UserError for what cannot be run, before anything is written."""
    if cfg.dataset == "geometry":
        if cfg.size < 16 or cfg.n_train < 2 or cfg.n_train % 2 or cfg.n_cover < 1:
            raise harness.UserError(f"--size {cfg.size} must be at least 16, --n-train "
                                    f"{cfg.n_train} even and at least 2, --n-cover {cfg.n_cover} "
                                    "at least 1")
        return core.check_batch(cfg, training_set(cfg)[0])
    if not 0 <= cfg.sc_threshold <= 1:
        raise harness.UserError(f"--sc-threshold {cfg.sc_threshold}: must be from 0 to 1")
    if min(cfg.over, cfg.n_heldout, cfg.n_dif) < 2:
        raise harness.UserError(f"--over {cfg.over}, --n-heldout {cfg.n_heldout}, --n-dif "
                                f"{cfg.n_dif}: must be at least 2")
    images, _, _, protocol = prepare(cfg)
    dif_scale(core.to_float(images), cfg.dif_norm)
    print(f"scored by {protocol['score']} of {cfg.n_fid} fakes; "
          f"{fid.rank_note(min(len(images), cfg.n_fid), protocol['dims']) or ''}")


def mean(rows, arm, key):
    return float(np.mean([r[key] for r in rows if r["arm"] == arm]))


def run_name(row):
    return f"{row['arm']}-s{row['seed']}"


def plot(folder):
    """figure.png from the files."""
    result = harness.read_result(folder, Path(__file__).stem)
    draw = plot_rectangles if result["config"]["dataset"] == "geometry" else plot_photos
    harness.save_figure(draw(result, folder), folder)
    return result


def main(argv=None):
    args, start = flags().parse_args(argv), time.time()
    if args.plot:
        return plot(args.plot)
    device = harness.pick_device(args.device)
    if args.sample:
        return core.sample_checkpoint(args.sample, args.n, args.out, device)
    name = args.preset or ("paper" if device.type == "cuda" else "cpu")
    squares = args.dataset == "geometry"
    presets, arms, one_run = (PRESETS, ARMS, run) if squares else (PHOTOS, PHOTO_ARMS, run_photos)
    args.arms = args.arms or list(arms)
    for key in {*PRESETS["paper"], *PHOTOS["paper"]} - {*presets["paper"], "seeds"}:
        if getattr(args, key) is not None and key != "size":
            raise harness.UserError(f"--{key.replace('_', '-')}: not with --dataset {args.dataset}")
    if wrong := [a for a in args.arms if a not in arms]:
        raise harness.UserError(f"--arms {wrong[0]}: with --dataset {args.dataset} choose from "
                                f"{', '.join(arms)}")
    cfg = core.resolve(args, {"size": data.SIZES.get(args.dataset, 64)}, presets["paper"],
                       presets[name], preset=name, channels=1 if squares else 3)
    if harness.announce([cfg], args.dry_run):
        return {}
    check(cfg)
    name = args.name or f"{Path(args.dataset).stem}-{name}"
    folder = harness.open_run(args.outdir / Path(__file__).stem / name, cfg, args.resume,
                              sweep=True)
    ones = [argparse.Namespace(**vars(cfg), arm=a, seed=s) for s in cfg.seeds for a in cfg.arms]
    rows = harness.run_all(one_run, [(one, folder / run_name(vars(one))) for one in ones],
                           cfg.jobs, device)
    last, keys = rows, ("correct", "correct_exact", "coverage_exact", "distinct", "unseen_share")
    paper = {"correct": PAPER, "coverage": "most of 30, Figure 7"}
    if not squares:
        last, rows = [r[-1] for r in rows], references(cfg) + sum(rows, [])
        keys = ("fid", "fid_heldout", "dif", "copies", "recall", "collapsed", "noisy")
        paper = {"figure_5": "SC lowers FID and DIF during training, by a large margin"}
    for arm in cfg.arms:
        print(f"{arm:8s}" + "".join(f"  {k} {mean(last, arm, k):.3f}" for k in keys))
    harness.write_result(folder, Path(__file__).stem, cfg, device, start, rows, paper)
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
