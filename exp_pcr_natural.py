"""Table 1: does Pixel-wise Combination Regularization lower the FID on natural images?

The claim (Section 5.3): averages of two real images, given to D as extra negatives at half the
negative weight (eqs. 12 and 13), improve the FID of WGAN-GP, LSGAN and SAGAN on CIFAR-10, CelebA
and the ImageNet validation set, by up to 30% (WGAN-GP on CIFAR-10: 45.4 -> 31.6).

    python exp_pcr_natural.py --model wgangp --dataset cifar10

Arms: vanilla; pcr; and three controls that the paper lacks. `dup` gives D as many extra plain fakes
instead of combinations: the same loss weights without mixing. `mixup` gives D near-averages of two
reals, weights Beta(25, 25), mostly .36 to .64, as in NDA (Sinha et al. 2021). `matched` gives D
averages with the contrast of photographs: combinations without their greyness.
Presets: paper (one GPU), cpu (two arms and one seed in under ten minutes on two cores: a small
net, few steps, FD-192 on the way, the FID's features at the end), smoke (seconds). Ends in
result.json and figure.png.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread

import core
import data
import fid
import harness

# Table 1 of the paper, best FID of three runs: (vanilla, PCR).
PAPER = {
    ("celeba", "wgangp"): (20.9, 21.7), ("celeba", "lsgan"): (17.7, 16.0),
    ("celeba", "sagan"): (28.0, 24.3), ("cifar10", "wgangp"): (45.4, 31.6),
    ("cifar10", "lsgan"): (57.6, 51.0), ("cifar10", "sagan"): (39.6, 33.7),
    ("imagenet", "wgangp"): (61.8, 54.1), ("imagenet", "lsgan"): (61.0, 59.4),
    ("imagenet", "sagan"): (102.9, 73.4),
}

# UNSPECIFIED: everything in this table but the names. WGAN-GP as Gulrajani et al. (2017), LSGAN
# with batch norm in D as Mao et al. (2017) on a DCGAN, SAGAN with the hinge loss as Zhang et al.
# DCGAN's N(0, 0.02) leaves a critic without norm layers flat for hundreds of updates: hence `he`.
MODELS = {
    "wgangp": dict(loss="wgan", n_dis=5, gp_weight=10.0, norm_d="none", init_d="he"),
    "lsgan": dict(loss="lsgan", n_dis=1, gp_weight=0.0, norm_d="batch", init_d="dcgan"),
    "sagan": dict(loss="hinge", n_dis=1, gp_weight=0.0, norm_d="none", init_d="dcgan"),
}

# Section 5.3 gives Adam(2e-4, .5, .9) and 50,000 steps. UNSPECIFIED: the rest of `paper`, and
# what a step is. In the code of Lucic et al. (2018), whom the paper measures itself by, it is an
# update of D; taken as updates of G the published baselines would be far worse than their nets
# allow. Batch 64, z 128, no flips, no average of G, 10,000 fakes against the training set.
PRESETS = {
    "paper": dict(
        steps=None, d_steps=50_000, batch=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.9,
        z_dim=128, width=64, base=4, comb_weight=0.5, gp_comb=False, flip=False, lr_decay=False,
        ema_beta=0.0,
        n_fid=10_000, n_real=None, dims=2048, end_dims=2048, checks=10, log_every=100),
    # DEVIATION: sized for two cores: 32 px, a quarter of the width, half the batch, larger steps,
    # few of them (CPU_STEPS), and while training the distance of 192 early features, which few
    # images determine and which is three times as fast. The paper's 2048 at the end alone.
    "cpu": dict(size=32, batch=32, width=16, lr_g=5e-4, lr_d=5e-4, n_fid=256, n_real=1024,
                dims=192, checks=4, log_every=20),
    "smoke": dict(
        jobs=1, dims=64, end_dims=64, steps=4, d_steps=None, n_dis=1, batch=8, width=8, z_dim=16,
        n_fid=16, n_real=32, checks=2, log_every=2),
}
# What a core does in four minutes, and what moves in so few steps.
CPU_STEPS = {
    "wgangp": dict(steps=1500, n_dis=3), "lsgan": dict(steps=3000),
    "sagan": dict(steps=1000, n_dis=2, lr_d=2e-3, beta1=0.0),
}


def mixup(x, gen):
    """Convex mixes of neighbours in the batch, weights Beta(25, 25): (B, ...) -> the same."""
    # The median of 49 uniforms has exactly that law, and draws from our own random stream.
    weight = torch.rand(len(x), 49, generator=gen, device=x.device).median(1).values
    return torch.lerp(x, x.roll(1, 0), weight.view(-1, *[1] * (x.dim() - 1)))


def matched(x):
    """Averages of neighbours, stretched about their means to their parents' contrast, (B, ...).

    Then clipped to [-1, 1], which takes a little of it back.
    """
    std = x.flatten(1).std(1)
    comb = core.pixel_average(x)
    mean, own = comb.flatten(1).mean(1), comb.flatten(1).std(1)
    scale = (std + std.roll(1)) / 2 / own.clamp_min(1e-3)
    mean, scale = (v.view(-1, *[1] * (x.dim() - 1)) for v in (mean, scale))
    return (mean + (comb - mean) * scale).clamp(-1, 1)


# The extra negatives of each arm: (trainer, x_real) -> x_comb.
ARMS = {
    "vanilla": None,
    "pcr": lambda trainer, x_real: core.pixel_average(x_real),
    "dup": lambda trainer, x_real: trainer.fake(),
    "mixup": lambda trainer, x_real: mixup(x_real, trainer.gen),
    "matched": lambda trainer, x_real: matched(x_real),
}


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="wgangp", choices=[*MODELS, "all"], help="(%(default)s)")
    p.add_argument("--dataset", default="cifar10",
                   help="cifar10, celeba, imagenet, geometry, all (the first three), or a folder "
                        "or zip of images (%(default)s)")
    p.add_argument("--arms", nargs="+", default=["vanilla", "pcr"], choices=ARMS,
                   help="(%(default)s)")
    p.add_argument("--arch", default="dcgan", choices=["dcgan", "resnet"],
                   help="resnet: Gulrajani et al.'s, for wgangp, with --width 128 (%(default)s)")
    p.add_argument("--size", type=int, help="pixels (preset; paper: 32 for cifar10, else 64)")
    p.add_argument("--data-dir", type=Path, default=data.DATA_DIR,
                   help="data sets, weights and caches; or set GAN_DATA (%(default)s)")
    p.add_argument("--split", default="train", choices=["train", "test", "all"],
                   help="images to train on and to score against (%(default)s)")
    p.add_argument("--n-train", type=int, help="train on a seeded subset of this many images")
    p.add_argument("--n-real", type=int, help="training images in the reference (preset)")
    p.add_argument("--dims", type=int, choices=fid.DIMS, help="FID features (preset)")
    p.add_argument("--end-dims", type=int, choices=fid.DIMS,
                   help="features of a second score, at the end of training (preset); as --dims: "
                        "none")
    p.add_argument("--fid-weights", help="Inception weights; default: data-dir or a download")
    harness.run_flags(p, PRESETS)
    core.train_flags(p)
    return p


def configure(args, model, dataset, device):
    """Resolved configuration of one cell: paper, model, preset, then the user's flags."""
    name = args.preset or ("paper" if device.type == "cuda" else "cpu")
    cfg = core.resolve(
        args, PRESETS["paper"], {"size": data.SIZES.get(dataset, 64)}, MODELS[model],
        {"width": 128} if args.arch == "resnet" else {}, PRESETS[name],
        CPU_STEPS[model] if name == "cpu" else {}, preset=name, model=model, dataset=dataset,
        channels=1 if dataset == "geometry" else 3)
    if dataset == "geometry":   # scored by pixels: no layers to choose from
        cfg.end_dims = cfg.dims
    return cfg


def prepare(cfg, dims=None):
    """A cell's images, its score of a trainer (FID and KID of n_fid fakes), and what that is."""
    device = harness.pick_device(cfg.device)
    images = data.load(cfg.dataset, cfg.size, cfg.data_dir, cfg.split, cfg.n_train)
    core.check_batch(cfg, images)
    net = fid.Pixels() if cfg.dataset == "geometry" else fid.load_inception(
        dims=dims or cfg.dims, weights=cfg.fid_weights, data_dir=cfg.data_dir, device=device)
    return images, *fid.scorer(net, images, cfg.n_real, cfg.n_fid, cfg.data_dir / "cache")


def run_name(row):
    return f"{Path(row['dataset']).stem}-{row['model']}-{row['arm']}-s{row['seed']}"


def train(cfg, folder):
    """One arm and seed, from scratch or from its checkpoint -> trainer, images, their score."""
    images, score, protocol = prepare(cfg)
    trainer = core.Trainer(cfg, images, harness.pick_device(cfg.device), combine=ARMS[cfg.arm])
    harness.open_run(folder, {**vars(cfg), **protocol}, cfg.resume, cfg.data_parallel)
    harness.fit(trainer, folder, score)
    return trainer, images, protocol


def contrast(x):
    """Mean over images, uint8 (N, C, H, W), of the standard deviation of their pixels, of 255.

    An average has less of it than its parents, so that D can tell it by that alone.
    """
    return x.float().flatten(1).std(1).mean().item()


def evaluate(cfg, folder, trainer, images, protocol):
    """The row of a finished run: best checkpoint, whole curve, score and contrast at the end."""
    scored = [r for r in harness.read_rows(folder / "metrics.jsonl") if "fid" in r]
    best = min(scored, key=lambda r: r["fid"])
    row = {"dataset": str(cfg.dataset), "model": cfg.model, "arm": cfg.arm, "seed": cfg.seed,
           "best_fid": best["fid"], "best_step": best["step"], "best_d_steps": best["d_steps"],
           "fid_curve": [[r["step"], r["d_steps"], r["fid"]] for r in scored],
           "kid": best["kid"], "kid_std": best["kid_std"], "n_fid": cfg.n_fid,
           "split": cfg.split, **protocol}
    end = {**scored[-1], **protocol}
    if cfg.end_dims != cfg.dims:
        _, score, protocol = prepare(cfg, cfg.end_dims)
        end = {**score(trainer), **protocol}
    row |= {f"end_{k}": v for k, v in end.items() if k not in ("step", "d_steps", "n_fid")}
    real = images[torch.randperm(len(images), generator=harness.generator(0, "cpu"))[:1000]]
    average = core.to_uint8(core.pixel_average(core.to_float(real)))
    for name, x in (("", torch.cat(list(trainer.fakes(cfg.n_fid)[""]))), ("_real", real),
                    ("_average", average)):
        row[f"contrast{name}"] = contrast(x)
    if cfg.ema_beta:
        row["best_fid_ema"] = min(r["fid_ema"] for r in scored)
    harness.write_json(folder / "row.json", row)


def run(cfg, folder):
    evaluate(cfg, folder, *train(cfg, folder))


def summary(rows):
    """Per dataset, model and arm: best of the seeds as in Table 1, mean, boost, the paper cell."""
    cells = []
    for dataset, model in sorted({(r["dataset"], r["model"]) for r in rows}):
        here = [r for r in rows if (r["dataset"], r["model"]) == (dataset, model)]
        by_arm = {a: [r["best_fid"] for r in here if r["arm"] == a] for a in ARMS}
        base = min(by_arm["vanilla"], default=None)
        for arm, fids in by_arm.items():
            if fids:
                cells.append({
                    "dataset": dataset, "model": model, "arm": arm, "n_seeds": len(fids),
                    "score": here[0]["score"], "end_score": here[0]["end_score"],
                    "best": min(fids), "mean": sum(fids) / len(fids),
                    "end_mean": float(np.mean([r["end_fid"] for r in here if r["arm"] == arm])),
                    "boost_percent": 100 * (base - min(fids)) / base if base else None,
                    "paper": dict(zip(("vanilla", "pcr"), PAPER.get((dataset, model), ()))
                                  ).get(arm)})
    return cells


def plot(folder):
    """figure.png from the files: FID over D updates by arm, and each arm's last fixed-z grid."""
    result = harness.read_result(folder, Path(__file__).stem)
    rows, cells = result["rows"], sorted({(r["dataset"], r["model"]) for r in result["rows"]})
    arms = [a for a in ARMS if any(r["arm"] == a for r in rows)]
    lines = -(-len(arms) // 2)
    fig = harness.figure((1 + 1.5 * lines) * len(cells))
    for (dataset, model), part in zip(cells, np.atleast_1d(fig.subfigures(len(cells)))):
        left, right = part.subfigures(1, 2, width_ratios=[1.2, 1])
        ax, panels = left.subplots(), right.subplots(lines, 2, squeeze=False).ravel()
        here = [r for r in rows if (r["dataset"], r["model"]) == (dataset, model)]
        for arm in arms:
            curves = [([p[1] for p in r["fid_curve"]], [p[2] for p in r["fid_curve"]])
                      for r in here if r["arm"] == arm]
            if curves:
                harness.band(ax, curves, f"{arm} (n={len(curves)})", marker="o", ms=3,
                          **harness.STYLE[arm])
        paper = PAPER.get((dataset, model), ())
        same = here[0]["score"] == "FID"                # else its level is no line of this axis
        for arm, value in zip(("vanilla", "pcr"), paper if same else ()):
            ax.axhline(value, lw=0.8, color=harness.STYLE[arm]["color"], ls=(0, (1, 3)))
            ax.annotate(f"paper {arm} {value}", (1, value), xycoords=("axes fraction", "data"),
                        ha="right", va="bottom" if value == max(paper) else "top")
        ax.set(title=f"{Path(dataset).name}, {model}" + (
            f" (paper's FID: {paper[0]}, with pcr {paper[1]})" if paper and not same else ""),
               xlabel="updates of D", ylim=(0, None), xlim=(0, None),
               ylabel=f"{here[0]['score']}, {here[0]['n_fid']} fakes")
        ax.legend()
        for panel in panels:
            panel.axis("off")
        for arm, panel in zip([a for a in arms if any(r["arm"] == a for r in here)], panels):
            run = [run_name(r) for r in here if r["arm"] == arm][:1]
            grids = sorted((folder / run[0] / "samples").glob("*.png")) if run else []
            if grids:
                panel.imshow(imread(grids[-1]), interpolation="nearest")
            end, grey = (np.mean([r[k] for r in here if r["arm"] == arm])
                         for k in ("end_fid", "contrast"))
            panel.set_title(f"{arm}\n{here[0]['end_score']} {end:.3g}, contrast {grey:.0f}")
        right.suptitle(f"At the end; contrast of images {here[0]['contrast_real']:.0f}, of "
                       f"averages {here[0]['contrast_average']:.0f}")
    harness.save_figure(fig, folder)
    return result


def main(argv=None):
    args, start = flags().parse_args(argv), time.time()
    if args.plot:
        return plot(args.plot)
    device = harness.pick_device(args.device)
    if args.sample:
        return core.sample_checkpoint(args.sample, args.n, args.out, device)
    datasets = ["cifar10", "celeba", "imagenet"] if args.dataset == "all" else [args.dataset]
    models = list(MODELS) if args.model == "all" else [args.model]
    cells = [configure(args, m, d, device) for d in datasets for m in models]
    if harness.announce(cells, args.dry_run):
        return {}
    for cfg in cells:  # what is missing or wrong shows here, before anything is written
        for dims in dict.fromkeys([cfg.dims, cfg.end_dims]):
            protocol = prepare(cfg, dims)[2]
            note = fid.rank_note(min(cfg.n_fid, protocol["n_real"]), protocol["dims"])
            print(f"scored {'at the end ' * (dims != cfg.dims)}by {protocol['score']} of "
                  f"{cfg.n_fid} fakes against {protocol['n_real']} training images"
                  f"{'; ' + note if note else ''}")
    name = args.name or f"{Path(args.dataset).stem}-{args.model}-{cells[0].preset}"
    folder = harness.open_run(args.outdir / Path(__file__).stem / name, cells[0], args.resume,
                              sweep=True)
    ones = [argparse.Namespace(**vars(cfg), arm=arm, seed=seed)
            for cfg in cells for seed in cfg.seeds for arm in cfg.arms]
    rows = harness.run_all(run, [(one, folder / run_name(vars(one))) for one in ones],
                        cells[0].jobs, device)
    for cell in summary(rows):
        print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in cell.items()))
        for row in rows:
            if all(row[k] == cell[k] for k in ("dataset", "model", "arm")):
                row |= {k: cell[k] for k in ("boost_percent", "paper")}
    harness.write_result(folder, Path(__file__).stem, cells[0], device, start, rows, {
        f"{d}, {m}": {"vanilla": v, "pcr": p} for (d, m), (v, p) in PAPER.items()})
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
