"""Fréchet distance between image sets (FID), KID, precision and recall, in plain PyTorch.

`python fid.py generated/ cifar10 --kid` compares a folder of images with a data set; also a .zip, a
uint8 .npy, a .npz of statistics as `--save-stats` and pytorch-fid write them. Only the published
weights at 2048 dimensions in float32 give a `FID`; other scores carry other names.
"""
import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
from core import UserError, generator
from harness import atomic, cli, pick_device
from sweep import lock, note_bf16

DEPTH = {64: 4, 192: 7, 768: 15, 2048: 18}   # how many layers have so many features
DIMS, BATCH = tuple(DEPTH), 50
FLAGS = {   # of the scripts that score images, as sweep.FLAGS
    "n_real": (int, 2, 10 ** 9, "real images in the reference; default all"),
    "ref_split": (("train", "test", "all"), "real images to score against; default: --split"),
    "dims": (DIMS, "features of the distance"),
    "fid_weights": (str, "Inception weights; default: data-dir or a download")}
PUBLISHED = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",    # address and sha256
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")

# A tuple is a convolution: width, kernel, stride, padding (else what keeps the size). A dict is a
# block of parallel branches, each a chain of convolutions, that of `branch_pool` after `pool`.
WIDE, TALL, FORK = (1, 7), (7, 1), [(384, (1, 3)), (384, (3, 1))]   # a fork: both see the same
POOL, AVERAGE = nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 1, 1, count_include_pad=False)
LAYERS = {
    "Conv2d_1a_3x3": (32, 3, 2, 0), "Conv2d_2a_3x3": (32, 3, 1, 0), "Conv2d_2b_3x3": (64, 3),
    "maxpool1": POOL, "Conv2d_3b_1x1": (80, 1), "Conv2d_4a_3x3": (192, 3, 1, 0), "maxpool2": POOL,
    **{f"Mixed_5{i}": {"branch1x1": [(64, 1)], "branch5x5_{}": [(48, 1), (64, 5)],
                       "branch3x3dbl_{}": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(w, 1)]}
       for i, w in zip("bcd", (32, 64, 64))},
    "Mixed_6a": {"branch3x3": [(384, 3, 2, 0)], "branch3x3dbl_{}": [
        (64, 1), (96, 3), (96, 3, 2, 0)], "branch_pool": [], "pool": POOL},
    **{f"Mixed_6{i}": {"branch1x1": [(192, 1)], "branch7x7_{}": [(w, 1), (w, WIDE), (192, TALL)],
                       "branch7x7dbl_{}": [(w, 1), (w, TALL), (w, WIDE), (w, TALL), (192, WIDE)],
                       "branch_pool": [(192, 1)]} for i, w in zip("bcde", (128, 160, 160, 192))},
    "Mixed_7a": {"branch3x3_{}": [(192, 1), (320, 3, 2, 0)], "branch7x7x3_{}": [
        (192, 1), (192, WIDE), (192, TALL), (192, 3, 2, 0)], "branch_pool": [], "pool": POOL},
    **{f"Mixed_7{i}": {"branch1x1": [(320, 1)], "branch3x3_{}": [(384, 1), FORK], "branch3x3dbl_{}":
                       [(448, 1), (384, 3), FORK], "branch_pool": [(192, 1)], "pool": pool}
       for i, pool in zip("bc", (AVERAGE, nn.MaxPool2d(3, 1, 1)))}}


class ConvBN(nn.Sequential):
    def __init__(self, c_in, width, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, width, kernel, stride, padding, bias=False)
        self.bn, self.relu, self.width = nn.BatchNorm2d(width, 0.001), nn.ReLU(inplace=True), width


class Mixed(nn.Module):
    def __init__(self, c_in, pool=AVERAGE, **branches):
        super().__init__()
        self.width, self.chains = 0, []     # of lists of layers, whose outputs are side by side
        for name, steps in branches.items():
            width, chain = c_in, [[pool]] if name == "branch_pool" else []
            for i, step in enumerate(steps, 1):
                fork = dict(zip("ab", step)) if step is FORK else {"": step}
                chain.append([ConvBN(width, *spec) for spec in fork.values()])
                for letter, conv in zip(fork, chain[-1]):
                    self.add_module(name.format(i) + letter, conv)
                width = sum(conv.width for conv in chain[-1])
            self.chains.append(chain)
            self.width += width

    def forward(self, x):
        def step(x, layers):
            return torch.cat([layer(x) for layer in layers], 1)
        return torch.cat([reduce(step, chain, x) for chain in self.chains], 1)


def resized(x):
    """uint8 (B, C, H, W) -> float32 (B, C, 299, 299) in [-1, 1], bilinear as in pytorch-fid."""
    return 2 * nn.functional.interpolate(x.float() / 255, (299, 299), mode="bilinear") - 1


class Inception(nn.Sequential):
    """Inception-v3 up to the output of width `dims`, averaged over positions, as in every published
    FID: unlike torchvision's, whose parameter names it has, its averages leave the padding out and
    its last block pools by maximum. uint8 (B, 1 or 3, H, W) of any size -> float32 (B, dims)."""

    def __init__(self, dims=2048):
        super().__init__()
        if dims not in DIMS:
            raise UserError(f"{dims} features: choose one of {DIMS}")
        self.dims, width = dims, 3
        for name, spec in list(LAYERS.items())[:DEPTH[dims]]:
            layer = (Mixed(width, **spec) if isinstance(spec, dict) else
                     ConvBN(width, *spec) if isinstance(spec, tuple) else spec)
            width = getattr(layer, "width", width)
            self.add_module(name, layer)

    def identify(self, sha256, precision="fp32"):
        """Set what depends on the weights; `id` tells apart any two nets whose features differ."""
        self.weights_sha256, fp32 = sha256, precision == "fp32"
        self.standard = fp32 and (self.dims, sha256) == (2048, PUBLISHED[1])
        self.label = f"FD-{self.dims}" if self.dims < 2048 else "FID" if self.standard else "FID*"
        self.id = f"inception-2015-{self.dims}-pytorch-fid-{sha256[:16]}" + "-bf16" * (not fp32)

    @torch.no_grad()
    def forward(self, x):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), not {x.dtype} {x.shape}")
        like = next(self.parameters())
        x = resized(x.to(like.device)).expand(-1, 3, -1, -1)
        x = x.to(like.dtype, memory_format=torch.channels_last)     # 1.7 times faster on a CPU
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):    # on any device the same
            return super().forward(x).float().mean((2, 3))


class Pixels:
    """Pixels in [0, 1], averaged to at most 16 a side: uint8 (B, C, H, W) -> float32 (B, F)."""
    label = "FD-px"

    def __init__(self, size_max=16):
        self.size_max, self.id = size_max, f"pixels-{size_max}"

    def __call__(self, x):
        size = [min(n, self.size_max) for n in x.shape[2:]]
        return nn.functional.adaptive_avg_pool2d(x.float() / 255, size).flatten(1)


def load_inception(dims=2048, weights=None, data_dir=data.DATA_DIR, device="cpu", precision="fp32"):
    """The frozen network in eval mode, batch norms folded into convolutions. Weights: a file, else
    $FID_WEIGHTS, else a .pth in data_dir/inception, first the published one, which is downloaded
    if there is none; UserError for a file without them. Draws no random number."""
    with torch.device("meta"):
        net = Inception(dims).eval()
    published = Path(data_dir, "inception", PUBLISHED[0].rpartition("/")[2])
    kept = [p for p in [published, *sorted(published.parent.glob("*.pth"))]
            if p.is_file() and not p.name.startswith("inception_v3_google")]   # torchvision's
    path = Path(weights or os.environ.get("FID_WEIGHTS") or [*kept, published][0])
    if path == published and not kept:
        data.download(PUBLISHED[0], published, sha256=PUBLISHED[1])
    if not path.is_file() or path.stat().st_size > 2 ** 30:
        raise UserError(f"{path}: no such file of at most 1 GiB (--weights or FID_WEIGHTS)")
    net.identify(data.verify_checksum(
        path, path, sha256=PUBLISHED[1] if path.name == published.name else ""), precision)
    state = None
    with contextlib.suppress(Exception):   # a damaged or foreign file can fail in any way
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{path}: not a state dict of tensors saved by torch.save")
    needed = {k: v.shape for k, v in net.state_dict().items() if "num_batches" not in k}
    if "fc.weight" in state:    # torchvision's has 1000 classes
        needed["fc.weight"] = (1008, 2048)
    for key, shape in needed.items():
        v = state.get(key, torch.empty(0))
        if v.shape != shape or not v.is_floating_point() or v.is_meta or v.layout != torch.strided:
            found = f"{tuple(v.shape)}, {v.dtype}, {v.layout}" if key in state else "missing"
            raise UserError(f"{path}: {key} is {found}, must be {tuple(shape)}, plain floats")
    net.load_state_dict({k: state[k].float() for k in needed}, strict=False, assign=True)
    for name, layer in net.named_modules():
        if isinstance(layer, ConvBN):
            layer.conv, layer.bn = nn.utils.fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
            if not all(v.isfinite().all() for v in layer.parameters()):
                raise UserError(f"{path}: {name}, its batch norm folded in, is not finite")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return net.requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)


class Statistics:
    """Mean and covariance (divided by n - 1) of features that come in batches, in float64, O(F^2),
    on their device. Sums are about the first batch's mean: equal features have covariance 0."""

    def __init__(self, n=0, shift=0, total=0, outer=0):
        self.n, self.shift, self.sum, self.outer = n, shift, total, outer

    @classmethod
    def of(cls, mean, cov, n):
        return cls(n, mean, torch.zeros_like(mean), cov * (n - 1))

    def add(self, features):
        """Count in features (B, F). Raises UserError if one of them is not finite."""
        x = features.detach().double()
        check(f"features of images {self.n} to {self.n + len(x) - 1}", x)
        self.shift = self.shift if self.n else x.mean(0)
        x = x - self.shift
        self.sum += x.sum(0)
        self.outer += x.T @ x
        self.n += len(x)

    mean = property(lambda self: self.shift + self.sum / self.n)

    @property
    def cov(self):
        if self.n < 2:
            raise UserError(f"{self.n} images: a covariance needs at least 2")
        return (self.outer - self.sum.outer(self.sum) / self.n) / (self.n - 1)


def check(what, *values, few=0):
    """UserError unless all have more than `few` rows, and finite numbers of which products fit."""
    if min(map(len, values)) <= few:
        raise UserError(f"{what}: more than {few} images are needed on either side")
    if not all((torch.as_tensor(v).abs() < 1e15).all() for v in values):
        raise UserError(f"{what}: numbers that are not finite, or above 1e15")


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), Heusel et al. (2017), as a float >= 0. The trace
    of the root is the sum of the roots of the eigenvalues of S1^1/2 S2 S1^1/2, which are real.
    Directions where S1 is zero (by numpy's matrix_rank rule) are left out: noise adds up."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(v).double() for v in (mu1, cov1, mu2, cov2))
    check("means and covariances", mu1, cov1, mu2, cov2)
    values, vectors = torch.linalg.eigh(cov1)
    keep = values > values[-1].abs() * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, keep] * values[keep].sqrt()
    roots = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots
    return max(distance.item(), 0.0)


def kid(fa, fb, subsets=100, subset_size=1000, seed=0):
    """Kernel distance, Bińkowski et al. (2018): unbiased MMD^2 with k(x, y) = (x.y / F + 1)^3.
    Features (N, F), (M, F) -> (mean, std) over random subsets of min(subset_size, N/2, M/2) images,
    so that those of a small set differ. std is their spread, not the mean's error."""
    check("features for KID", fa, fb, few=1)
    m, values, gen = min(subset_size, max(min(len(fa), len(fb)) // 2, 2)), [], generator(seed)
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=gen)[:m].to(f.device)].float() for f in (fa, fb))
        xx, yy, xy = ((a @ b.T / len(b.T) + 1).double() ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(within / (m * (m - 1)) - 2 * xy.mean())
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def precision_recall(fa_real, fb_fake, k=3, block=1000):
    """Improved precision and recall, Kynkäänniemi et al. (2019), of features (N, F), (M, F).
    A set's manifold is all balls around an image that reach its k-th neighbour. Precision is the
    share of fakes in the real manifold, recall that of reals in the fakes'; by blocks of images."""
    check("features for precision and recall", fa_real, fb_fake, few=k)

    def share_inside(x, y):     # the nearest of all to an image is itself
        radii = torch.cat([torch.cdist(b, y).kthvalue(k + 1)[0] for b in y.split(block)])
        inside = [(torch.cdist(b, y) <= radii).any(1) for b in x.split(block)]
        return torch.cat(inside).double().mean().item()
    real, fake = fa_real.double(), fb_fake.double()
    return share_inside(fake, real), share_inside(real, fake)


def rank_note(n, dims):
    """A warning if n images cannot fill a covariance of `dims` dimensions, else None."""
    if n <= dims:
        return (f"{n} images for {dims} dimensions: the covariance is rank-deficient, the distance "
                "biased upwards, to be compared only at the same n")


def features(net, batches, device=None, keep=False):
    """Statistics of uint8 batches, moved to `device`, and, if `keep`, their features (N, F)."""
    stats, kept = Statistics(), []
    for batch in tqdm(batches, desc="features", unit="batch", disable=None, delay=5, leave=False):
        out = net(batch.to(device or batch.device))
        stats.add(out)
        kept += [out] if keep else []
    if not stats.n:
        raise UserError("no images to take features of")
    return stats, torch.cat(kept) if keep else None


def reference(net, images, cache_dir, device="cpu"):
    """Statistics and features (N, F) of images, uint8 (N, C, H, W), kept in `cache_dir` by a hash
    of images and network. Of several processes one computes them, and the others wait."""
    key = hashlib.sha256(f"{net.id} {tuple(images.shape)}".encode())
    key.update(images.cpu().contiguous().numpy())
    path = Path(cache_dir) / f"features-{key.hexdigest()[:32]}.npz"
    with lock(path.with_suffix(".lock"), "wait"):
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as f:
            saved = [torch.from_numpy(f[k]).to(device) for k in ("mu", "sigma", "features")]
            return Statistics.of(*saved[:2], len(images)), saved[2]
        stats, feats = features(net, images.split(BATCH), device, keep=True)
        with contextlib.suppress(OSError), atomic(path) as tmp:   # a read-only folder: no cache
            np.savez(tmp, features=feats.cpu(), mu=stats.mean.cpu(), sigma=stats.cov.cpu())
    return stats, feats


def score(net, ref, ref_feats, batches, prc=False):
    """{distance, n_fid, kid, kid_std (and precision, recall)} of batches against a reference."""
    stats, feats = features(net, batches, keep=True)
    row = {"distance": frechet_distance(ref.mean, ref.cov, stats.mean, stats.cov), "n_fid": stats.n}
    row["kid"], row["kid_std"] = kid(ref_feats, feats)
    if prc:
        row["precision"], row["recall"] = precision_recall(ref_feats, feats)
    return row


def scorer(cfg, images, dims):
    """A function trainer -> entries of `score` (an averaged generator's end in _ema) of cfg.n_fid
    images against cfg.n_real (None: all) of `images`, (N, C, H, W); a dict of what they measure."""
    if cfg.n_real is not None and not 2 <= cfg.n_real <= len(images):
        raise UserError(f"--n-real {cfg.n_real}: must be from 2 to {len(images)}")
    device = pick_device(cfg.device)
    net = Pixels() if cfg.dataset == "geometry" else load_inception(
        dims, cfg.fid_weights, cfg.data_dir, device, cfg.precision)
    order = torch.randperm(len(images), generator=generator(0))[:cfg.n_real]
    stats, feats = reference(net, images[order], cfg.data_dir / "cache", device)

    def score_trainer(trainer):
        return {key + suffix: value for suffix, batches in trainer.fakes(cfg.n_fid).items()
                for key, value in score(net, stats, feats, batches).items()}
    return score_trainer, {
        "metric": net.label, "features": net.id, "n_real": len(order), "dims": len(stats.mean)}


def load_stats(path):
    """(mean, cov, n or None, id of the features or None) of a statistics .npz; no pickles."""
    with data.readable(f"{path}: not a readable .npz of plain arrays"), \
            np.load(path, allow_pickle=False) as f:
        small = {i.filename for i in f.zip.infolist() if i.file_size < 2 ** 30}
        mu, sigma, n, name = (np.asarray(f[key]) if f"{key}.npy" in small else np.array(None)
                              for key in ("mu", "sigma", "n", "id"))
    if not (mu.ndim == 1 and mu.size and sigma.shape == 2 * mu.shape
            and mu.dtype.kind + sigma.dtype.kind == "ff" and np.allclose(sigma, sigma.T)):
        raise UserError(f"{path}: mu is {mu.dtype} {mu.shape}, sigma {sigma.dtype} {sigma.shape}: "
                        "must hold mu (F,) and sigma (F, F), symmetric, finite floats below 1 GiB")
    check(path, mu := mu.astype(float), sigma := sigma.astype(float))
    if (values := np.linalg.eigvalsh(sigma))[0] < -1e-3 * abs(values[-1]):
        raise UserError(f"{path}: sigma is no covariance, it has an eigenvalue {values[0]:.3g}")
    n = int(n) if n.ndim == 0 and n.dtype.kind in "iuf" and 2 <= n < 2 ** 53 else None
    return mu, sigma, n, name.item() if name.ndim == 0 and name.dtype.kind == "U" else None


def compare(args):
    """Measure A against B -> the dict that `--json` prints."""
    start, deep, out = time.time(), args.kid or args.prc, args.save_stats
    sides = [s for s in (args.a, args.b) if s is not None]
    saved = [s for s in sides if s.endswith(".npz")]
    if absent := [s for s in sides if s not in data.NAMES and not (s and Path(s).exists())]:
        raise UserError(f"{absent}: no such file or folder, nor one of {', '.join(data.NAMES)}")
    if not args.b and (deep or not out):
        raise UserError("B is missing: give it, or --save-stats")
    if saved and deep:
        raise UserError(f"{saved}: --kid and --prc need images, not statistics")
    if out and (out.suffix != ".npz" or out.is_dir() or args.a in saved):
        raise UserError("--save-stats writes the statistics of images A to a file named *.npz")
    if not (1 <= args.batch <= 1000 and 2 <= args.n <= 10 ** 12):
        raise UserError(f"--batch {args.batch}: must be from 1 to 1000; --n {args.n}: at least 2")
    device, net = pick_device(args.device), None
    if len(saved) < len(sides):     # nothing to run on two files
        note_bf16(args.precision, device)
        net = load_inception(args.dims, args.weights, args.data_dir, device, args.precision)

    def measure(side):
        if side in saved:
            mean, cov, *known = load_stats(side)
            return *(torch.from_numpy(v).to(device) for v in (mean, cov)), *known, None
        stats, feats = features(net, data.batches(
            side, args.batch, args.n, args.size, args.data_dir, args.split), keep=deep)
        return stats.mean, stats.cov, stats.n, net.id, feats
    means, covs, counts, ids, feats = zip(*map(measure, sides))
    dims, ids = len(means[0]), {*ids} - {None}
    if len(ids) > 1 or dims != len(means[-1]):
        raise UserError(f"A and B hold different features: {dims} and {len(means[-1])}, ids {ids}")
    if note := rank_note(min([n for n in counts if n], default=dims + 1), dims):
        print(f"note: {note}", file=sys.stderr)
    kid_mean, kid_std = kid(*feats) if args.kid else (None, None)
    precision, recall = precision_recall(*feats) if args.prc else (None, None)
    if out:
        with atomic(out) as tmp:
            np.savez(tmp, mu=means[0].cpu(), sigma=covs[0].cpu(), n=counts[0], id=net.id)
    return {"metric": net.label if net else f"FD-{dims}",
            "distance": frechet_distance(means[0], covs[0], means[1], covs[1]) if args.b else None,
            "kid": kid_mean, "kid_std": kid_std, "precision": precision, "recall": recall,
            "n_a": counts[0], "n_b": counts[1] if args.b else None,
            "features": net and net.id, "dims": dims, "standard": bool(net and net.standard),
            "weights_sha256": net and net.weights_sha256, "seconds": round(time.time() - start, 1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, names = parser.add_argument, ", ".join(data.NAMES)
    add("a", metavar="A", help=f"folder, .zip, uint8 .npy, statistics .npz, or {names}")
    add("b", metavar="B", nargs="?", help="the same; in --prc A is the real side")
    add("--n", type=int, default=10 ** 12, help="images per side, the first ones; default all")
    add("--kid", action="store_true", help="kernel distance too")
    add("--prc", action="store_true", help="precision and recall too")
    add("--json", action="store_true", help="print one JSON object")
    add("--weights", help="default: $FID_WEIGHTS, DATA_DIR/inception/*.pth, download")
    add("--dims", type=int, choices=DIMS, default=2048, help="default 2048")
    add("--data-dir", type=Path, default=data.DATA_DIR, help="or set GAN_DATA; default data")
    add("--split", choices=("train", "test", "all"), default="train", help="default train")
    add("--size", type=int, help="pixels of a data set's images; default the set's own")
    add("--batch", type=int, default=BATCH, help=f"images; default {BATCH}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    add("--save-stats", type=Path, metavar="F.npz", help="write mu, sigma and n of A")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):   # the result alone goes to stdout
        row = compare(args)
    shown = {row["metric"]: row["distance"], **row, "metric": None, "distance": None}
    print(json.dumps(row) if args.json else "\n".join(
        f"{k:<16}{v:.6g}" if isinstance(v, float) else f"{k:<16}{v}"
        for k, v in shown.items() if v is not None))
    return row


if __name__ == "__main__":
    cli(main)
