"""Figures 2 and 6: small batches make training unstable.

The claim (Section 3.2): with 64 images of two rectangles and a prior over 64 fixed codes, full
batches (FGD, 64) settle on the images; with batches of 16 (MGD) losses, gradients and the images of
fixed codes keep changing. On CelebA, after as many images, the FID is lower the larger the batch.

    python exp_sample_insufficiency.py
    python exp_sample_insufficiency.py --dataset celeba

On rectangles the arms are laws of sampling, on photographs `vanilla` and two cures. All but `fgd`
run at `--batch`, the first of these at every size of `--batches`; they see equally many images, or
with `--steps` have equally many updates. Presets: paper (one GPU), cpu (ten minutes), smoke.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

import core
import data
import fid
import geometry
import harness
import sweep

PRESETS = {
    # Section 3.2 and Appendix E: 32 px, squares of 8, 64 images, as many codes, batches 16 and 64.
    # UNSPECIFIED: loss, networks and step sizes of Figures 2 (left) and 6. WGAN-GP, as Section 3.3
    # analyses a WGAN; one update of D for one of G; no momentum, which would change what small
    # batches do (theory_sde.py); exp_sc.py's networks with a larger z, so that codes are far apart.
    "paper": dict(
        size=32, n_train=64, batch=16, batches=[4, 8, 16, 32], images_seen=640_000, arch="dcgan",
        loss="wgan", norm_d="none", init_d="he", gp_weight=10.0, gp_comb=False, comb_weight=0.5,
        r1_weight=10.0, n_dis=1, lr_g=5e-4, lr_d=5e-4, beta1=0.0, beta2=0.9, z_dim=128, width=64,
        base=2, flip=False, lr_decay=False, ema_beta=0.0, checks=48, log_every=50),
    # DEVIATION: the `cpu` preset on rectangles. Canvas and squares half as wide, half the channels.
    "cpu": dict(size=16, width=32, lr_g=1e-3, lr_d=1e-3, images_seen=38_400, batches=[8, 16, 32],
                checks=24),
    "smoke": dict(jobs=1, size=16, n_train=8, batch=4, batches=[2, 4], images_seen=32, width=8,
                  z_dim=8, checks=2, log_every=2),
}
PHOTOS = {  # over PRESETS["paper"]
    # UNSPECIFIED: model, batch sizes and amount of data of Figure 2 (right). WGAN-GP on a DCGAN
    # with the step sizes of Table 1, and batches four times apart.
    "paper": dict(
        n_train=None, batch=4, batches=[4, 16, 64, 256], images_seen=2_560_000, base=4, beta1=0.5,
        lr_g=2e-4, lr_d=2e-4, ema_beta=0.999, n_fid=10_000, dims=2048, checks=10, log_every=100),
    # DEVIATION: the `cpu` preset on photographs. 32 px, a small net, and the distance of 192 early
    # features, which few images determine.
    "cpu": dict(size=32, batches=[4, 16, 64], images_seen=19_200, width=16, z_dim=64, lr_g=5e-4,
                lr_d=5e-4, ema_beta=0.99, n_fid=256, n_real=512, dims=192, checks=3),
    "smoke": PRESETS["smoke"] | dict(n_train=None, size=32, batch=2, n_fid=16, n_real=16, dims=64),
}
OWN = {
    "dataset": (str, "geometry, celeba, cifar10, imagenet, or a folder or zip (%(default)s)"),
    "images_seen": (int, 2, 10 ** 12, "training images that D sees in a run"),
    "r1_weight": (float, 0, 10 ** 6, "gamma of arm r1"), **data.FLAGS, **fid.FLAGS,
}

# -------------------------------------------------------------------------------------- the idea

LAWS = ("fgd", "wor", "iid", "real-wor", "epoch")


class Sampler(core.Trainer):
    """A Trainer that samples its images, and the codes that G holds, by the law cfg.arm.

    fgd takes all. wor draws without replacement, afresh in every step; iid with replacement;
    real-wor images without, codes with. epoch goes through images, D's codes and G's in epochs.
    """

    def __init__(self, cfg, images, G, D):
        super().__init__(cfg, images, G, D, prior=lambda t, n: t.G.codes[t.pick("g")])
        self.left = {}                                  # what is left of each epoch

    def pick(self, what):
        """Indices (B,) of the next batch of images (`real`), or of codes for player `d` or `g`."""
        # UNSPECIFIED: the law of MGD. All four are arms; they differ by the noise left in a step.
        n, batch, law = len(self.data), self.cfg.batch, self.cfg.arm
        if law == "fgd":
            return torch.arange(n, device=self.device)
        if law == "iid" or (law == "real-wor" and what != "real"):
            return torch.randint(n, (batch,), generator=self.gen, device=self.device)
        left = self.left.get(what, ())
        if law != "epoch" or len(left) < batch:
            left = torch.rand(n, generator=self.gen, device=self.device).argsort()
        self.left[what] = left[batch:]
        return left[:batch]

    def real(self):
        return self.images(self.pick("real"))

    @torch.no_grad()
    def fake(self):
        return self.G(self.G.codes[self.pick("d")])

    def preview(self, n=None):
        """The images of all codes, uint8 (N, 1, H, W)."""
        return torch.cat(list(core.generate(self.G, self.G.codes)))

    def state(self):
        return {**super().state(), "left": self.left}

    def load(self, state):
        super().load(state)
        self.left = {what: left.to(self.device) for what, left in state["left"].items()}


# On photographs an arm is d_loss(t, x_real, x_fake) -> (loss, {name: tensor}). `ema`, the average
# of vanilla's G, comes from vanilla's run at --batch.
ARMS = {"vanilla": core.d_loss, "ema": core.d_loss, "r1": core.r1}


def networks(cfg):
    """G and D of a run; on rectangles G holds the fixed codes, as many as images."""
    G, D = core.build(cfg)
    if cfg.dataset == "geometry":
        G.register_buffer("codes", torch.randn(cfg.n_train, cfg.z_dim,
                                               generator=core.generator(cfg.seed, "cpu")))
    return G, D


# -------------------------------------------------------------------------------------- one run


def prepare(cfg):
    """A run's images; on photographs also the score of a trainer, and what it is."""
    if cfg.dataset == "geometry":
        images, scored = geometry.draw(cfg.n_train, 2, cfg.size, cfg.size // 4, seed=cfg.seed), ()
    else:
        images = data.load(cfg.dataset, cfg.size, cfg.data_dir, cfg.split, cfg.n_train)
        scored = fid.scorer(cfg, images if cfg.ref_split in (None, cfg.split) else data.load(
            cfg.dataset, cfg.size, cfg.data_dir, cfg.ref_split), cfg.dims)
    core.check_batch(cfg, len(images))
    return images, *scored


def assignment(x, y):
    """Mean L2 distance between two sets of N uint8 images, in [-1, 1], under the best matching."""
    x, y = (core.to_float(i).flatten(1).double().cpu() for i in (x, y))
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return float(distance[linear_sum_assignment(distance)].mean())


def score(t, folder):
    """What the images of all codes are, and the share changed since those in folder/images."""
    x, images, side = t.preview().cpu(), t.data.cpu(), t.cfg.size // 4
    before = sorted(f for f in folder.glob("images/*.npy") if int(f.stem) < t.step)
    with harness.atomic(folder / "images" / f"{t.step:07d}.npy") as tmp:
        np.save(tmp, x)
    shares = {"correct": geometry.has_two(x, side),
              "correct_exact": geometry.has_two(x, side, geometry.count_exact)}
    if before:
        last = torch.from_numpy(np.load(before[-1]))
        shares["changed"] = (geometry.lit(x) != geometry.lit(last)).flatten(1).any(1)
    return {**{k: v.float().mean().item() for k, v in shares.items()},
            "images_seen": t.d_steps * t.cfg.batch, "assignment_distance": assignment(x, images),
            "covered": int(geometry.is_in(images, x).sum())}


CURVE = ("step", "images_seen", "correct", "correct_exact", "assignment_distance", "changed")


def run_rectangles(cfg, folder):
    """Train with one law, batch size and seed -> its row, whose curve has the columns CURVE."""
    images = prepare(cfg)[0].to(harness.pick_device(cfg.device))
    harness.fit(Sampler(cfg, images, *networks(cfg)), folder, lambda t: score(t, folder),
                best="assignment_distance", each_step=True)
    rows = harness.read_rows(folder / "metrics.jsonl")
    checks, steps = ([r for r in rows if k in r] for k in ("correct", "d_loss"))
    changes = [r["changed"] for r in checks if "changed" in r]
    late, late_changes = (x[-max(len(x) // 3, 1):] for x in (steps, changes))   # the last third
    logs = {k: [r[k] for r in late] for k in ("d_loss", "g_loss", "d_grad", "g_grad")}
    logs["gap"] = [r["d_real"] - r["d_fake"] for r in late]
    return {"arm": cfg.arm, "batch": cfg.batch, "seed": cfg.seed, "steps": cfg.steps,
            "updates_per_check": cfg.eval_every, "n": len(images),
            **{f"{k}_var": float(np.var(v)) for k, v in logs.items()},
            "changes_per_code": float(np.mean(late_changes or [np.nan])),
            **{k: checks[-1][k] for k in (*CURVE[1:5], "covered")},
            "curve": [[r.get(k) for k in CURVE] for r in checks]}


def run_photos(cfg, folder):
    """Train one arm, batch size and seed -> a row for each score; an averaged G is arm `ema`."""
    images, photo_score, protocol = prepare(cfg)
    trainer = core.Trainer(cfg, images.to(harness.pick_device(cfg.device)), *networks(cfg),
                           d_loss=ARMS[cfg.arm])
    harness.fit(trainer, folder, photo_score, protocol=protocol)
    return [{"dataset": Path(cfg.dataset).stem, "arm": arm, "batch": cfg.batch, "seed": cfg.seed,
             "step": r["step"], "images_seen": r["d_steps"] * cfg.batch, "distance": r[key],
             "n_fid": cfg.n_fid, **protocol}
            for r in harness.read_rows(folder / "metrics.jsonl")
            for arm, key in ((cfg.arm, "distance"), ("ema", "distance_ema")) if key in r]


# ------------------------------------------------------------------------------ what comes of it


def compared(rows):
    """Rows of FGD, and rows of MGD at the batch size that most have: all laws ran at it."""
    part = [r for r in rows if r["arm"] != "fgd"]
    sizes = [r["batch"] for r in part]
    size = max(sizes, key=sizes.count, default=None)
    return [r for r in rows if r["arm"] == "fgd"], [r for r in part if r["batch"] == size]


def claims(rows):
    """Figures 2 (left), 6: FGD against the first MGD; 2 (right): batch sizes, and also cures."""
    if "correct" in rows[0]:
        full, part = compared(rows)
        both = full + [r for r in part if r["arm"] == part[0]["arm"]]
        paper, tests = "Figures 2, 6", [
            (what, "FGD settles, MGD does not", both, key, unit) for key, what, unit in (
                ("correct", "codes with two rectangles", 100),
                ("changes_per_code", "codes whose image changes between checks, late", 100),
                ("d_loss_var", "variance of D's loss, late", 1))]
    else:
        what = f"{rows[0]['dataset']}: {rows[0]['metric']} after {rows[-1]['images_seen']:,} images"
        plain = sorted((r for r in rows if r["arm"] == "vanilla"), key=lambda r: -r["batch"])
        cures = [r for r in rows if r["arm"] != "vanilla"]
        paper, tests = "Figure 2, right", [(what, "the larger the better", plain, "distance", 1),
                                           (what, "", cures, "distance", 1)]
    found = []
    for what, theirs, part, key, unit in tests:
        cells = {}                                  # of several rows of a run the last one counts
        for r in part:
            cells.setdefault(f"{r['arm']} ({r['batch']})", {})[r["seed"]] = r[key]
        numbers = [list(seeds.values()) for seeds in cells.values()]
        if len(cells) > bool(theirs):               # a verdict is about the first and the last
            found.append({
                "paper": paper, "what": f"{what}: {', '.join(cells)}", "theirs": theirs,
                "ours": f"{', '.join(sweep.spread(v, unit) for v in numbers)}, n={len(numbers[0])}",
                "verdict": theirs and sweep.verdict(numbers[0], numbers[-1], key == "correct"),
                "front": bool(theirs) and "two rectangles" in what})
    return found


def lines(ax, points, x, y, title):
    """Mean and range over seeds of points' entry y against x, a line for each `line` or arm."""
    groups, by_update = {}, "d_loss" in points[0]
    for p in points:
        if p[y] is not None:
            groups.setdefault(p.get("line", p["arm"]), {}).setdefault(p["seed"], {})[p[x]] = p[y]
    for name, seeds in groups.items():
        harness.band(ax, [(list(xy), list(xy.values())) for xy in seeds.values()], name,
                     **{"lw": 0.5} if by_update else {"marker": "o", "ms": 2},
                     **harness.style(name))
    ax.set(title=title, xlabel=x.replace("_", " "))
    if by_update:
        ax.set_ylim(*np.quantile([p[y] for p in points], [0.002, 0.998]))
    if x == "batch":
        ax.set(xscale="log", yscale="log" if y == "d_loss_var" else "linear")
        ax.set_xticks(sizes := sorted({p[x] for p in points}), sizes)
        ax.xaxis.minorticks_off()


def film(folder, n_codes=4, n_checks=16):
    """Images of some codes (rows) through training (columns), in red frames if not two squares."""
    files = sorted(folder.glob("images/*.npy"))
    if not files:
        raise core.UserError(f"no images in {folder}: --plot needs the whole run folder")
    files = [files[round(i)] for i in np.linspace(0, len(files) - 1, min(n_checks, len(files)))]
    x = torch.stack([torch.from_numpy(np.load(f)[:n_codes]) for f in files], 1).flatten(0, 1)
    colours = [[150] * 3 if good else [230, 0, 0] for good in geometry.has_two(x, x.shape[-1] // 4)]
    return harness.grid(harness.frame(x, colours), len(files))


def rectangles(folder, rows):
    """Films of FGD's and MGD's first seed, {title: image}, and what `lines` draws, a panel each."""
    full, part = compared(rows)
    shown = full[:1] + part[:1]
    films = {f"{r['arm']}, batch {r['batch']}: four codes, red if not two squares":
             film(folder / run_name(r)) for r in shown}
    logs = [{**row, **r, "images_seen": r["d_steps"] * row["batch"]} for row in reversed(shown)
            for r in harness.read_rows(folder / run_name(row) / "metrics.jsonl") if "d_loss" in r]
    checks = [{**row, **dict(zip(CURVE, p))} for row in full + part for p in row["curve"]]
    return films, [(logs, "images_seen", "d_loss", "loss of D"),
                   (logs, "images_seen", "g_grad", "gradient norm of G"),
                   (checks, "images_seen", "correct", "codes with two squares"),
                   (checks, "images_seen", "changed", "changed since last check"),
                   (rows, "batch", "d_loss_var", "variance of D's loss"),
                   (rows, "batch", "changes_per_code", "codes changed"),
                   (rows, "batch", "correct", "codes with two squares"),
                   (rows, "batch", "assignment_distance", "distance to images")]


def photos(folder, rows):
    """The first seed's last samples, {title: image}, and what `lines` draws, a panel each."""
    points = [{**r, "line": f"batch {r['batch']}" if r["arm"] == "vanilla" else r["arm"]}
              for r in rows]
    what = f"{rows[0]['metric']}, {rows[0]['n_fid']} fakes"
    grids = {p["line"]: sorted((folder / run_name(p)).glob("samples/*.png")) for p in points
             if p["arm"] != "ema" and p["seed"] == rows[0]["seed"]}
    return {line: np.asarray(Image.open(files[-1])) for line, files in grids.items() if files}, [
        (points, "images_seen", "distance", what),
        (rows, "batch", "distance", f"{what}, at the end")]


def plot(folder):
    """figure.png from the files, one of two kinds: pictures above, panels below."""
    result = sweep.read_result(folder, Path(__file__).stem)
    draw, height, ratio, shape = (photos, 4.6, 1.3, (1, 2)) if "distance" in result["rows"][0] \
        else (rectangles, 5.8, 4, (2, 4))
    fig = harness.figure(height)
    top, bottom = fig.subfigures(2, height_ratios=[1, ratio])
    pictures, panels = draw(folder, result["rows"])
    for i, title in enumerate(pictures):
        ax = top.add_subplot(1, len(pictures), i + 1, title=title)
        ax.imshow(pictures[title], interpolation="nearest")
        ax.axis("off")
    for ax, panel in zip(bottom.subplots(*shape).flat, panels):
        lines(ax, *panel)
        if panel[2] == "distance" or panel[1:3] in (("images_seen", "d_loss"),
                                                    ("images_seen", "correct")):
            ax.legend()
    harness.save_figure(fig, folder)
    return result


# ----------------------------------------------------------------------------------- the command


def run_name(row):
    return f"{row['arm']}-b{row['batch']}-s{row['seed']}"


def configure(args):
    """A configuration for each run: the arms at their batch sizes, seed by seed."""
    natural, layers = args.dataset != "geometry", [PRESETS["paper"], PRESETS[args.preset]]
    if natural:
        layers[1:] = [{"size": data.SIZES.get(args.dataset, 64),
                       "split": data.SPLITS.get(args.dataset, "train")},
                      PHOTOS["paper"], PHOTOS[args.preset]]
    arms = list(ARMS if natural else LAWS) if args.arms == "all" else args.arms
    if wrong := [a for a in arms if (a in LAWS) == natural]:
        raise core.UserError(f"--arms {wrong[0]}: not for --dataset {args.dataset}")
    fixed = {"channels": 3 if natural else 1, "arms": arms}
    base = sweep.resolve(args, OWN, {"steps": 1}, *layers, **fixed)
    if not natural and base.size < 16:
        raise core.UserError(f"--size {base.size}: must be at least 16 for squares of a quarter")
    part = ["vanilla" if a == "ema" else a for a in arms if a != "fgd"]
    cells = [("fgd", base.n_train)] * ("fgd" in arms)
    cells += [(a, b) for a in part[:1] for b in sorted(base.batches)]
    runs = []
    for seed in base.seeds:
        for arm, batch in dict.fromkeys(cells + [(a, base.batch) for a in part]):
            if not 2 <= batch <= base.images_seen:
                raise core.UserError(f"batch size {batch} of --batches, --batch or --n-train: must "
                                     f"be from 2 to --images-seen {base.images_seen}")
            own = {"arm": arm, "batch": batch, "seed": seed}
            if arm == "r1":
                # UNSPECIFIED: what R1 does to WGAN-GP. It takes the place of its penalty.
                own["gp_weight"] = 0.0
            if natural and not ("ema" in arms and (arm, batch) == ("vanilla", base.batch)):
                own["ema_beta"] = 0.0
            # UNSPECIFIED: how step sizes follow the batch. They do not.
            runs.append(sweep.resolve(args, OWN, *layers, {"d_steps": base.images_seen // batch},
                                      **fixed, **own, run=run_name(own)))
    return runs


def main(argv=None):
    p = sweep.parser(__doc__, PRESETS, OWN, [*LAWS, *ARMS])
    p.add_argument("--batches", type=int, nargs="+", help="batch sizes to compare (preset)")
    p.set_defaults(dataset="geometry", data_dir=data.DATA_DIR, arms="all")
    args = sweep.parse(p, __file__, argv)
    if args.plot:
        return plot(args.plot)
    if args.sample:
        return harness.sample(args, networks, lambda t, n: t.G.codes[:n] if hasattr(t.G, "codes")
                              else core.normal_prior(t, n))
    runs, run = configure(args), run_rectangles if args.dataset == "geometry" else run_photos
    if sweep.announce(runs, args.dry_run, run):
        return {}
    if not sweep.worker():      # what is missing or wrong shows here, before any file
        prepare(max(runs, key=lambda cfg: cfg.batch))
    folder, rows = sweep.train_all(args, f"{Path(args.dataset).stem}-{args.preset}", runs, run)
    sweep.write_result(args, folder, runs, rows, claims(rows))
    return plot(folder)


if __name__ == "__main__":
    harness.cli(main)
