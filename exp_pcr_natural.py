"""Table 1: does Pixel-wise Combination Regularization lower the FID on natural images?

The claim (Section 5.3): averages of two real images, given to D as extra negatives at half the
negative weight (eqs. 12 and 13), improve the FID of WGAN-GP, LSGAN and SAGAN on CIFAR-10, CelebA
and the ImageNet validation set, by up to 30% (WGAN-GP on CIFAR-10: 45.4 -> 31.6).

    python exp_pcr_natural.py --model wgangp --dataset cifar10

Arms: vanilla, pcr, and three controls that the paper lacks. `dup` gives D as many extra plain fakes
instead of combinations: the same weights in the loss, no mixing. `mixup` gives D near-averages of
two reals, weights Beta(25, 25), mostly .36 to .64, as in NDA (Sinha et al. 2021). `matched` gives D
averages with the contrast of photographs: combinations without their greyness.
Presets: paper (one GPU, three seeds), cpu (two arms and one seed in under ten minutes on two cores:
a small net, few steps, FD-192 on the way, the FID's features at the end), smoke (seconds).
"""
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import core
import data
import fid
import harness
import sweep

# Table 1 of the paper, best FID of three runs: (vanilla, PCR).
PAPER = {
    ("celeba", "wgangp"): (20.9, 21.7), ("celeba", "lsgan"): (17.7, 16.0),
    ("celeba", "sagan"): (28.0, 24.3), ("cifar10", "wgangp"): (45.4, 31.6),
    ("cifar10", "lsgan"): (57.6, 51.0), ("cifar10", "sagan"): (39.6, 33.7),
    ("imagenet", "wgangp"): (61.8, 54.1), ("imagenet", "lsgan"): (61.0, 59.4),
    ("imagenet", "sagan"): (102.9, 73.4),
}

# UNSPECIFIED: losses, norms, n_dis and first weights of the three models. WGAN-GP as Gulrajani et
# al. (2017), LSGAN with batch norm in D as Mao et al. (2017) on a DCGAN, SAGAN with the hinge loss
# as Zhang et al. (2018). DCGAN's N(0, 0.02) leaves a critic without norm layers flat for
# hundreds of updates: hence `he`.
MODELS = {
    "wgangp": dict(arch="dcgan", loss="wgan", n_dis=5, gp_weight=10.0, norm_d="none", init_d="he"),
    "lsgan": dict(arch="dcgan", loss="lsgan", n_dis=1, gp_weight=0.0, norm_d="batch",
                  init_d="dcgan"),
    "sagan": dict(arch="sagan", loss="hinge", n_dis=1, gp_weight=0.0, norm_d="none",
                  init_d="dcgan"),
}

PRESETS = {
    # Section 5.3 gives Adam(2e-4, .5, .9), 50,000 steps and the best of three runs. UNSPECIFIED:
    # what a step is, and all else. In the code of Lucic et al. (2018), whom the paper measures
    # itself by, it is an update of D; taken as updates of G the published baselines would be far
    # worse than their nets allow. Batch 64, z 128, no flips, no average of G, 10,000 fakes.
    "paper": dict(
        d_steps=50_000, batch=64, lr_g=2e-4, lr_d=2e-4, beta1=0.5, beta2=0.9, z_dim=128, width=64,
        base=4, comb_weight=0.5, gp_comb=False, flip=False, lr_decay=False, ema_beta=0.0,
        n_fid=10_000, dims=2048, end_dims=2048, checks=10, log_every=100, seeds=[0, 1, 2]),
    # DEVIATION: sized for two cores: 32 px, a quarter of the width, half the batch, larger steps,
    # few of them (CPU_STEPS), and while training the distance of 192 early features, which few
    # images determine and which is three times as fast. The paper's 2048 at the end alone.
    "cpu": dict(size=32, batch=32, width=16, lr_g=5e-4, lr_d=5e-4, n_fid=256, n_real=1024,
                dims=192, checks=4, log_every=20, seeds=[0]),
    "smoke": dict(
        jobs=1, dims=64, end_dims=64, steps=4, n_dis=1, batch=8, width=8, z_dim=16, n_fid=16,
        n_real=32, checks=2, log_every=2, seeds=[0]),
}
# What a core does in four minutes, and what moves in so few steps.
CPU_STEPS = {
    "wgangp": dict(steps=1500, n_dis=3), "lsgan": dict(steps=3000),
    "sagan": dict(steps=1000, n_dis=2, lr_d=2e-3, beta1=0.0),
}
OWN = {
    "model": (("wgangp", "lsgan", "sagan", "all"), "(%(default)s)"),
    "dataset": (str, "cifar10, celeba, imagenet, geometry, all (the first three), or a folder or "
                     "zip of images (%(default)s)"),
    **data.FLAGS, **fid.FLAGS,
    "end_dims": (fid.DIMS, "features of a second score, at the end of training; as --dims: none"),
}

# -------------------------------------------------------------------------------------- the idea


def pcr(t, x_real, x_fake):
    """Eq. (13): half of the negative weight goes to averages of two training images."""
    return core.d_loss(t, x_real, x_fake, x_comb=core.pixel_average(x_real))


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


ARMS = {  # each is d_loss(t, x_real, x_fake) -> (loss, {name: tensor})
    "vanilla": core.d_loss,
    "pcr": pcr,
    "dup": lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake, x_comb=t.fake()),
    "mixup": lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake, mixup(x_real, t.gen)),
    "matched": lambda t, x_real, x_fake: core.d_loss(t, x_real, x_fake, matched(x_real)),
}


def networks(cfg):
    """G and D of a run. Your own go here: any modules, G from (B, cfg.z_dim), D to (B,)."""
    return core.build(cfg)


# -------------------------------------------------------------------------------------- one run


def prepare(cfg, dims=None):
    """A run's images, the score of a trainer (FID and KID of n_fid fakes), and what it is."""
    images = data.load(cfg.dataset, cfg.size, cfg.data_dir, cfg.split, cfg.n_train)
    core.check_batch(cfg, len(images))
    # UNSPECIFIED: the images that the FID compares with. The training images; many baselines take
    # the test images (--ref-split test).
    real = images if cfg.ref_split in (None, cfg.split) else data.load(
        cfg.dataset, cfg.size, cfg.data_dir, cfg.ref_split)
    return images, *fid.scorer(cfg, real, dims or cfg.dims)


def run(cfg, folder):
    """Train one arm with one seed, from scratch or from its checkpoint, and score it -> its row."""
    images, score, protocol = prepare(cfg)
    trainer = core.Trainer(cfg, images.to(harness.pick_device(cfg.device)), *networks(cfg),
                           d_loss=ARMS[cfg.arm])
    harness.fit(trainer, folder, score, protocol=protocol)
    scored = [r for r in harness.read_rows(folder / "metrics.jsonl") if "distance" in r]
    end = {**scored[-1], **protocol}
    if cfg.end_dims != cfg.dims:
        _, score, end_protocol = prepare(cfg, cfg.end_dims)
        end = {**score(trainer), **end_protocol}
    best = min(scored, key=lambda r: r["distance"])
    row = {"dataset": str(cfg.dataset), "model": cfg.model, "arm": cfg.arm, "seed": cfg.seed,
           **protocol, "split": cfg.split, "n_fid": cfg.n_fid, "best": best["distance"],
           "best_step": best["step"], "best_d_steps": best["d_steps"],
           "best_kid": best["kid"], "best_kid_std": best["kid_std"],
           "curve": [[r["step"], r["d_steps"], r["distance"]] for r in scored],
           "last": scored[-1]["distance"],
           "end": end["distance"], **{f"end_{k}": end[k] for k in (
               "metric", "kid", "kid_std", "features", "dims", "n_real")}}
    paper = dict(zip(("vanilla", "pcr"), PAPER.get((row["dataset"], cfg.model), ())))
    if row["metric"] == "FID" and cfg.arm in paper:
        row["paper"] = paper[cfg.arm]
    if cfg.ema_beta:
        row["best_ema"] = min(r["distance_ema"] for r in scored)
    real = images[torch.randperm(len(images), generator=core.generator(0))[:1000]]
    average = core.to_uint8(core.pixel_average(core.to_float(real)))
    for name, x in (("contrast", torch.cat(list(trainer.fakes(cfg.n_fid)[""]))),
                    ("contrast_real", real), ("contrast_average", average)):
        row[name] = contrast(x)
    return row


def contrast(x):
    """Mean over images, uint8 (N, C, H, W), of the standard deviation of their pixels, of 255.

    An average has less of it than its parents, so that D can tell it by that alone.
    """
    return x.float().flatten(1).std(1).mean().item()


# ------------------------------------------------------------------------------ what comes of it


def claims(rows):
    """Table 1: the score at the end, its KID and the score on the way, beside every other arm's."""
    found = []
    for dataset, model in sorted({(r["dataset"], r["model"]) for r in rows}):
        here = [r for r in rows if (r["dataset"], r["model"]) == (dataset, model)]
        arms, first = list(dict.fromkeys(r["arm"] for r in here)), here[0]
        paper, name = PAPER.get((dataset, model)), f"{dataset}, {model}"
        end = first["end_metric"]
        kinds = {"end": end, "end_kid": end.replace("FID", "KID") if "FID" in end else "KID"}
        if first["metric"] != end:
            kinds["last"] = first["metric"]
        for key, kind in kinds.items():
            ends = {arm: sweep.values(here, key, arm=arm) for arm in arms}
            found.append({
                "paper": "Table 1", "what":
                f"{name}: {'pcr lowers the ' * ('pcr' in arms)}{kind} of {', '.join(arms)}",
                "theirs": f"FID {paper[0]}, with PCR {paper[1]}" if paper and key == "end" else "",
                "ours": ", ".join(map(sweep.spread, ends.values())) + f", n={len(ends[arms[0]])}",
                "verdict": sweep.beside(ends, "pcr"),
                "front": (key, model) == ("end", "wgangp")})
        found.append({
            "paper": "Table 1", "what": f"{name}: contrast of photographs, of averages, of the "
            f"fakes of {', '.join(arms)}", "theirs": "", "verdict": "", "ours": ", ".join(
                f"{v:.0f}" for v in (first["contrast_real"], first["contrast_average"], *(
                    np.mean(sweep.values(here, "contrast", arm=arm)) for arm in arms)))})
    gains = {}
    for dataset in ("cifar10", "imagenet", "celeba"):
        ends = [sweep.values(rows, "end", dataset=dataset, arm=a) for a in ("vanilla", "pcr")]
        if all(ends):
            gains[dataset] = float(100 * (1 - np.mean(ends[1]) / np.mean(ends[0])))
    if "celeba" in gains and len(gains) > 1:
        found.append({
            "paper": "Section 5.3", "what": "PCR helps more on CIFAR-10 and ImageNet than on "
            "CelebA: mean improvement", "theirs": "CelebA -3 to 13%, others 3 to 30%",
            "ours": ", ".join(f"{k} {v:.0f}%" for k, v in gains.items()), "verdict":
            "in part" if max(gains[d] for d in gains if d != "celeba") > gains["celeba"] else "no"})
    return found


def plot(folder):
    """figure.png from the files: the score over D's updates by arm, each arm's last samples."""
    result = sweep.read_result(folder, Path(__file__).stem)
    rows = result["rows"]
    cells = sorted({(r["dataset"], r["model"]) for r in rows})
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    lines = -(-len(arms) // 2)
    fig = harness.figure((1 + 1.5 * lines) * len(cells))
    for (dataset, model), part in zip(cells, np.atleast_1d(fig.subfigures(len(cells)))):
        left, right = part.subfigures(1, 2, width_ratios=[1.2, 1])
        ax, panels = left.subplots(), right.subplots(lines, 2, squeeze=False).ravel()
        here = [r for r in rows if (r["dataset"], r["model"]) == (dataset, model)]
        first, paper = here[0], PAPER.get((dataset, model), ())
        for panel in panels:
            panel.axis("off")
        for arm, panel in zip(arms, panels):
            mine = [r for r in here if r["arm"] == arm]
            harness.band(ax, [([p[1] for p in r["curve"]], [p[2] for p in r["curve"]])
                              for r in mine], f"{arm} (n={len(mine)})", marker="o", ms=3,
                         **harness.style(arm))
            grids = sorted((folder / run_name(mine[0]) / "samples").glob("*.png"))
            if grids:
                panel.imshow(np.asarray(Image.open(grids[-1])), interpolation="nearest")
            end, grey = (np.mean([r[k] for r in mine]) for k in ("end", "contrast"))
            panel.set_title(f"{arm}\n{first['end_metric']} {end:.3g}, contrast {grey:.0f}")
        same = first["metric"] == "FID"                 # else its level is no line of this axis
        for arm, value in zip(("vanilla", "pcr"), paper if same else ()):
            ax.axhline(value, lw=0.8, color=harness.style(arm)["color"], ls=(0, (1, 3)))
            ax.annotate(f"paper {arm} {value}", (1, value), xycoords=("axes fraction", "data"),
                        ha="right", va="bottom" if value == max(paper) else "top")
        ax.set(title=f"{Path(dataset).name}, {model}" + (
            f" (paper's FID: {paper[0]}, with pcr {paper[1]})" if paper and not same else ""),
               xlabel="updates of D", ylim=(0, None), xlim=(0, None),
               ylabel=f"{first['metric']}, {first['n_fid']} fakes")
        ax.legend()
        right.suptitle(f"At the end; contrast of images {first['contrast_real']:.0f}, of "
                       f"averages {first['contrast_average']:.0f}")
    harness.save_figure(fig, folder)
    return result


# ----------------------------------------------------------------------------------- the command


def run_name(row):
    return f"{Path(row['dataset']).stem}-{row['model']}-{row['arm']}-s{row['seed']}"


def flags():
    p = sweep.parser(__doc__, PRESETS, OWN, ARMS)
    p.set_defaults(model="wgangp", dataset="cifar10", arms=["vanilla", "pcr"],
                   data_dir=data.DATA_DIR)
    return p


def configure(args, model, dataset):
    """Resolved configuration of one cell of Table 1: paper, model, preset, then the flags."""
    cfg = sweep.resolve(
        args, OWN, PRESETS["paper"], {"size": data.SIZES.get(dataset, 64),
                                      "split": data.SPLITS.get(dataset, "train")},
        MODELS[model], PRESETS[args.preset], CPU_STEPS[model] if args.preset == "cpu" else {},
        model=model, dataset=dataset, channels=1 if dataset == "geometry" else 3)
    if dataset == "geometry":   # scored by pixels: no layers to choose from
        cfg.end_dims = cfg.dims
    return cfg


def check(cells):
    """Say how each cell is scored. What is missing or wrong shows here, before any file."""
    for cfg in cells:
        for dims in dict.fromkeys([cfg.dims, cfg.end_dims]):
            protocol = prepare(cfg, dims)[2]
            note = fid.rank_note(min(cfg.n_fid, protocol["n_real"]), protocol["dims"])
            print(f"scored {'at the end ' * (dims != cfg.dims)}by {protocol['metric']} of "
                  f"{cfg.n_fid} fakes against {protocol['n_real']} real images"
                  f"{'; ' + note if note else ''}")


def main(argv=None):
    args = sweep.parse(flags(), __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, networks)
    cells = [configure(args, m, d)
             for d in (["cifar10", "celeba", "imagenet"] if args.dataset == "all"
                       else [args.dataset])
             for m in (MODELS if args.model == "all" else [args.model])]
    runs = [Namespace(**vars(cfg), arm=arm, seed=seed, run=run_name(
        {"dataset": cfg.dataset, "model": cfg.model, "arm": arm, "seed": seed}))
            for cfg in cells for seed in cfg.seeds for arm in cfg.arms]
    if sweep.announce(runs, args.dry_run, run):
        return {}
    sweep.worker() or check(cells)
    name = f"{Path(args.dataset).stem}-{args.model}-{args.preset}"
    folder, rows = sweep.train_all(args, name, runs, run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
