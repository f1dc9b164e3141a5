"""Fréchet distance between image sets (FID), KID, precision and recall, in plain PyTorch.

    python fid.py generated/ cifar10 --kid

compares a folder of images with a data set; either side may also be a .zip, a uint8 .npy, or a
.npz of statistics as `--save-stats` and pytorch-fid write them. Only the published weights at
2048 dimensions give a `FID`; other numbers carry other labels. Letters in shapes as in core.py.
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data
from harness import UserError, atomic, cli, generator, pick_device

LAST = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}   # layer per dims
DIMS = tuple(LAST)
RESIZES = ("pytorch-fid", "tf1")
BATCH = 50
# Address, sha256 (of torchvision's only the digits in its name are known), classes of fc.weight.
PUBLISHED = {
    "2015": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 1008),
    "torchvision": ("https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
                    "0cc3c7bd", 1000)}

# ---------------------------------------------------------------------------------- network


class ConvBN(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


# A block is parallel branches, each a chain of (width, kernel[, stride]), where a list is a fork:
# its outputs are concatenated. `branch_pool` pools first.
def block_a(pool):
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pool, 1)]}


def block_c(w, wide=(1, 7), tall=(7, 1)):
    return {"branch1x1": [(192, 1)], "branch7x7": [(w, 1), (w, wide), (192, tall)],
            "branch7x7dbl": [(w, 1), (w, tall), (w, wide), (w, tall), (192, wide)],
            "branch_pool": [(192, 1)]}


FORK = [(384, (1, 3)), (384, (3, 1))]
BLOCK_B = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
           "branch_pool": []}
BLOCK_D = {"branch3x3": [(192, 1), (320, 3, 2)], "branch7x7x3": [
    (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []}
BLOCK_E = {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), FORK],
           "branch3x3dbl": [(448, 1), (384, 3), FORK], "branch_pool": [(192, 1)]}
LAYERS = {   # a tuple is ConvBN's arguments, None a max pool
    "Conv2d_1a_3x3": (3, 32, 3, 2), "Conv2d_2a_3x3": (32, 32, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 1, 1), "maxpool1": None,
    "Conv2d_3b_1x1": (64, 80, 1), "Conv2d_4a_3x3": (80, 192, 3), "maxpool2": None,
    "Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64),
    "Mixed_6a": BLOCK_B, "Mixed_6b": block_c(128), "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),
    "Mixed_7a": BLOCK_D, "Mixed_7b": BLOCK_E, "Mixed_7c": BLOCK_E}
POOLS = {"reduce": nn.MaxPool2d(3, 2), "max": nn.MaxPool2d(3, 1, 1),
         "average": nn.AvgPool2d(3, 1, 1),
         "average_valid": nn.AvgPool2d(3, 1, 1, count_include_pad=False)}


class Mixed(nn.Module):
    """One Inception block; `pool` is a key of POOLS."""

    def __init__(self, c_in, branches, pool):
        super().__init__()
        self.pool, self.chains, self.width = pool, {}, 0
        for base, steps in branches.items():
            width, self.chains[base] = c_in, []
            for i, step in enumerate(steps, 1):
                fork = step if isinstance(step, list) else [step]
                names = [base + (f"_{i}" if steps[1:] else "") + (letter if fork[1:] else "")
                         for _, letter in zip(fork, "ab")]
                for name, (c_out, kernel, *stride) in zip(names, fork):
                    k = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = 0 if stride else (k[0] // 2, k[1] // 2)
                    self.add_module(name, ConvBN(width, c_out, k, *stride or [1], padding))
                self.chains[base].append(names)
                width = sum(c_out for c_out, *_ in fork)
            self.width += width

    def forward(self, x):
        outs = []
        for base, chain in self.chains.items():
            y = POOLS[self.pool](x) if base == "branch_pool" else x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outs.append(y)
        return torch.cat(outs, 1)


def resized(x, resize, size=299):
    """uint8 (B, C, H, W) -> float32 (B, C, size, size) in about [-1, 1], in the named way."""
    x = x.float()
    if resize == "pytorch-fid":
        return 2 * F.interpolate(x / 255, (size, size), mode="bilinear", align_corners=False) - 1
    # TensorFlow 1: output i reads at i * n / size, with no half-pixel offset. Longer side first.
    for dim in sorted((2, 3), key=lambda dim: -x.shape[dim]):
        at = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low, high = (x.index_select(dim, i.clamp(max=x.shape[dim] - 1))
                     for i in (at.long(), at.long() + 1))
        x = torch.lerp(low, high, at.frac().view(-1, *[1] * (3 - dim)))
    return (x - 128) / 128


class Inception(nn.Module):
    """Inception-v3 up to the output of width `dims`, averaged over positions.

    `2015` is the network of every published FID: its averages leave the padding out and its last
    block pools by maximum, where `torchvision` averages with padding throughout. uint8
    (B, 1 or 3, H, W) of any size -> float32 (B, dims). Parameter names are torchvision's.
    """

    def __init__(self, features="2015", dims=2048, resize="pytorch-fid"):
        super().__init__()
        if features not in PUBLISHED or dims not in DIMS or resize not in RESIZES:
            raise UserError(f"{features}, {dims}, {resize}: choose one each of features "
                            f"{tuple(PUBLISHED)}, dims {DIMS}, resize {RESIZES}")
        self.features, self.dims, self.resize = features, dims, resize
        width, average = 192, "average" if features == "torchvision" else "average_valid"
        for name, spec in LAYERS.items():
            if isinstance(spec, dict):
                pool = ("reduce" if not spec["branch_pool"] else
                        "max" if name == "Mixed_7c" and features == "2015" else average)
                spec = Mixed(width, spec, pool)
                width = spec.width
            self.add_module(name, ConvBN(*spec) if isinstance(spec, tuple)
                            else spec or nn.MaxPool2d(3, 2))
            if name == LAST[dims]:
                break

    def identify(self, sha256):
        """Set what depends on the weights; `id` tells apart any two nets whose features differ."""
        form, tv = self.features, "-tv" if self.features == "torchvision" else ""
        self.weights_sha256 = sha256
        self.standard = (form, self.dims, sha256) == ("2015", 2048, PUBLISHED["2015"][1])
        self.label = ("FID" + ("" if self.standard else tv or "*") if self.dims == 2048
                      else f"FD-{self.dims}{tv}")
        self.id = f"inception-{form}-{self.dims}-{self.resize}-{sha256[:16]}"

    device = property(lambda self: next(self.parameters()).device)

    @torch.no_grad()
    def forward(self, x):
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), not {x.dtype} {x.shape}")
        x = resized(x, self.resize).expand(-1, 3, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)   # 1.7 times faster on a CPU
        # Full float32 on a GPU too, so that a score does not depend on the device.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for layer in self.children():
                x = layer(x)
        return x.mean((2, 3))


class Pixels(nn.Module):
    """Features that need no download: the image in [0, 1], averaged to at most 16 px a side.

    uint8 (B, C, H, W) -> float32 (B, F), F at most 256 C. `dims` is None until the first batch.
    """

    features, resize, weights_sha256, standard, label = "pixels", "average", None, False, "FD-px"
    dims = device = None   # runs wherever the images are

    def __init__(self, size_max=16):
        super().__init__()
        self.size_max, self.id = size_max, f"pixels-{size_max}"

    def forward(self, x):
        small = [min(n, self.size_max) for n in x.shape[2:]]
        x = F.adaptive_avg_pool2d(x.float() / 255, small).flatten(1)
        self.dims = x.shape[1]
        return x


def find_weights(features, weights, data_dir):
    """`weights`, else $FID_WEIGHTS, else a file in data_dir/inception, the published one first,
    else that one, downloaded to there."""
    if weights := weights or os.environ.get("FID_WEIGHTS"):
        return Path(weights)
    url, sha256, _ = PUBLISHED[features]
    folder = Path(data_dir) / "inception"
    published = folder / url.rsplit("/", 1)[1]
    if not published.is_file():
        for path in sorted(folder.glob("*.pth")):   # both forms have the same keys: go by name
            if path.name.startswith("inception_v3_google") == (features == "torchvision"):
                return path
        data.download(url, published, sha256=sha256)
    return published


def load_inception(features="2015", dims=2048, weights=None, data_dir=data.DATA_DIR,
                   resize="pytorch-fid", device="cpu"):
    """The frozen network in eval mode, its batch norms folded into the convolutions.

    Attributes: dims, resize, features, weights_sha256, standard, label, id, device. Draws no
    random number. Raises UserError for a file that does not hold the weights.
    """
    with torch.device("meta"):
        net = Inception(features, dims, resize).eval()
    path = find_weights(features, weights, data_dir)
    if not path.is_file() or path.stat().st_size > 2 ** 30:
        raise UserError(f"{path}: no such file of at most 1 GiB (--weights or FID_WEIGHTS)")
    url, sha256, classes = PUBLISHED[features]
    if path.name == url.rpartition("/")[2]:
        data.check(path, "sha256", sha256, path)
    content, state = path.read_bytes(), None
    net.identify(hashlib.sha256(content).hexdigest())
    with contextlib.suppress(Exception):   # a damaged or foreign file can fail in any way
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{path}: not a state dict of tensors saved by torch.save")
    heads = state.get("fc.weight", torch.empty(0)).shape
    if tuple(heads[:1]) not in ((0,), (classes,)):
        raise UserError(f"{path}: fc.weight is {tuple(heads)}: choose the other --features")
    needed = {k: v.shape for k, v in net.state_dict().items() if "num_batches" not in k}
    for key, shape in needed.items():
        v = state.get(key, torch.empty(0))
        if v.shape != shape or not v.is_floating_point() or v.is_meta or v.layout != torch.strided:
            found = f"{tuple(v.shape)}, {v.dtype}, {v.layout}" if key in state else "missing"
            raise UserError(f"{path}: {key} is {found}, must be {tuple(shape)}, plain floats")
    net.load_state_dict({k: state[k].float() for k in needed}, strict=False, assign=True)
    for name, layer in net.named_modules():
        if isinstance(layer, ConvBN):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
            if not all(v.isfinite().all() for v in layer.parameters()):
                raise UserError(f"{path}: {name}, its batch norm folded in, is not finite")
    return net.requires_grad_(False).to(device, memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------- scores


class Statistics:
    """Mean and covariance (divided by n - 1) of features that come in batches, in float64.

    Memory is O(F^2). Sums are about the first batch's mean: equal features have covariance 0.
    """

    def __init__(self, dims):
        self.n, self.shift = 0, None
        self.sum = torch.zeros(dims, dtype=torch.float64)
        self.outer = torch.zeros(dims, dims, dtype=torch.float64)

    @classmethod
    def of(cls, mean, cov, n):
        """Statistics that were computed before."""
        self = cls(len(mean))
        self.n, self.shift = n, torch.as_tensor(mean)
        self.outer += torch.as_tensor(cov) * (n - 1)
        return self

    def add(self, features):
        """Count in features (B, F). Raises UserError if one of them is not finite."""
        x = features.detach().cpu().double()
        if not x.isfinite().all():
            raise UserError(f"features of images {self.n} to {self.n + len(x) - 1} are not finite")
        if self.shift is None:
            self.shift = x.mean(0)
        x = x - self.shift
        self.sum += x.sum(0)
        self.outer += x.T @ x
        self.n += len(x)

    @property
    def mean(self):
        return self.shift + self.sum / self.n

    @property
    def cov(self):
        if self.n < 2:
            raise UserError(f"{self.n} images: a covariance needs at least 2")
        return (self.outer - self.sum.outer(self.sum) / self.n) / (self.n - 1)


def check_finite(what, *values):
    """UserError unless all numbers are finite, and small enough for the products made of them."""
    if not all((torch.as_tensor(v).abs() < 1e15).all() for v in values):
        raise UserError(f"{what}: numbers that are not finite, or above 1e15")


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), Heusel et al. (2017), as a float >= 0.

    The trace of the root is the sum of the roots of the eigenvalues of S1^1/2 S2 S1^1/2: real by
    construction, also for singular covariances. Directions in which S1 is zero to rounding (by
    numpy's matrix_rank rule) are left out; their noise would add up.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(v).cpu().double() for v in (mu1, cov1, mu2, cov2))
    check_finite("means and covariances", mu1, cov1, mu2, cov2)
    values, vectors = torch.linalg.eigh(cov1)
    keep = values > values[-1].abs() * len(values) * torch.finfo(torch.float64).eps
    root = vectors[:, keep] * values[keep].sqrt()
    roots = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots
    return max(distance.item(), 0.0)


def kid(fa, fb, subsets=100, subset_size=1000, seed=0):
    """Kernel distance, Bińkowski et al. (2018): unbiased MMD^2 with k(x, y) = (x.y / F + 1)^3.

    Features (N, F) and (M, F) -> (mean, std) over random subsets of min(subset_size, N/2, M/2)
    images: at most half of a set, lest all subsets of a small one be the same and the std 0; the
    size moves the std only. As in the field, std is the subsets' spread, not the mean's error.
    """
    if min(len(fa), len(fb)) < 2:
        raise UserError("KID needs at least 2 images on either side")
    check_finite("features for KID", fa, fb)
    m, values = min(subset_size, max(min(len(fa), len(fb)) // 2, 2)), []
    gen = generator(seed, "cpu")
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=gen)[:m]].float() for f in (fa, fb))
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1).double() ** 3
                      for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append((within / (m * (m - 1)) - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(fa_real, fb_fake, k=3, block=1000):
    """Improved precision and recall, Kynkäänniemi et al. (2019), of features (N, F), (M, F).

    A set's manifold is all balls around an image that reach its k-th neighbour. Precision is the
    share of fakes in the real manifold, recall that of reals in the fakes'; by blocks of images.
    """
    if min(len(fa_real), len(fb_fake)) <= k:
        raise UserError(f"precision and recall need more than {k} images on either side")
    check_finite("features for precision and recall", fa_real, fb_fake)
    real, fake = fa_real.double(), fb_fake.double()

    def inside(x, centres):   # the nearest of all to a centre is itself
        radii = torch.cat([torch.cdist(b, centres).kthvalue(k + 1)[0]
                           for b in centres.split(block)])
        return torch.cat([(torch.cdist(b, centres) <= radii).any(1) for b in x.split(block)])

    return tuple(inside(*pair).double().mean().item() for pair in ((fake, real), (real, fake)))


def rank_note(n, dims):
    """A warning if n images cannot fill a covariance of `dims` dimensions, else None."""
    if n <= dims:
        return (f"{n} images leave a covariance of {dims} dimensions rank-deficient: the distance "
                "is biased upwards, compare it only with others at the same n")


def features(net, batches, device=None, keep=False):
    """Statistics of an iterable of uint8 batches (B, C, H, W), each moved to `device`, and, if
    `keep`, all their features as float32 (N, F) on the CPU, else None."""
    stats, kept = None, []
    for batch in tqdm(batches, desc="features", unit="batch", disable=None, delay=5, leave=False):
        device = device or net.device or batch.device
        out = net(batch.to(device))
        stats = stats or Statistics(out.shape[1])
        stats.add(out)
        if keep:
            kept.append(out.float().cpu())
    if stats is None:
        raise UserError("no images to take features of")
    return stats, torch.cat(kept) if keep else None


def reference(net, images, cache_dir):
    """Statistics and features (N, F) of images, uint8 (N, C, H, W), computed once.

    The file in `cache_dir` is named by a hash of the images and of the network's `id`, so that
    it cannot go stale; a damaged one is computed anew.
    """
    key = hashlib.sha256(f"{net.id} {tuple(images.shape)}".encode())
    for block in images.split(1000):
        key.update(block.cpu().contiguous().numpy())
    path = Path(cache_dir) / f"features-{key.hexdigest()[:32]}.npz"
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as f:
        return Statistics.of(f["mu"], f["sigma"], len(images)), torch.from_numpy(f["features"])
    stats, feats = features(net, images.split(BATCH), keep=True)
    with contextlib.suppress(OSError), atomic(path) as tmp:   # a read-only folder: no cache
        np.savez(tmp, features=feats, mu=stats.mean, sigma=stats.cov)
    return stats, feats


def score(net, ref_stats, ref_feats, batches, with_kid=True, prc=False):
    """Dict of fid, n_fid, kid, kid_std (and precision, recall) of uint8 batches against a
    reference, whose `ref_feats` may be None where only the distance is asked for."""
    stats, feats = features(net, batches, keep=with_kid or prc)
    row = {"fid": frechet_distance(ref_stats.mean, ref_stats.cov, stats.mean, stats.cov),
           "n_fid": stats.n}
    if with_kid:
        row["kid"], row["kid_std"] = kid(ref_feats, feats)
    if prc:
        row["precision"], row["recall"] = precision_recall(ref_feats, feats)
    return row


def scorer(net, images, n_real, n_fid, cache_dir):
    """How a script scores a trainer: -> (score, what it is).

    `score(trainer)` has the entries of `score` above for n_fid images of each of its generators
    (core.Trainer.fakes), those of an averaged one ending in _ema: beside the raw one's, never
    instead. The reference is n_real of `images`, uint8 (N, C, H, W), None for all, the same ones
    every time. UserError if there are not as many.
    """
    if n_real is not None and not 2 <= n_real <= len(images):
        raise UserError(f"--n-real {n_real}: must be from 2 to {len(images)}")
    order = torch.randperm(len(images), generator=generator(0, "cpu"))[:n_real]
    stats, feats = reference(net, images[order], cache_dir)

    def of_trainer(trainer):
        return {key + suffix: value for suffix, batches in trainer.fakes(n_fid).items()
                for key, value in score(net, stats, feats, batches).items()}

    return of_trainer, {"score": net.label, "features": net.id, "n_real": len(order),
                        "dims": len(stats.mean)}


# ---------------------------------------------------------------------------------- command


def load_stats(path):
    """(mean, cov, n or None, id of the features or None) of a statistics .npz; no pickles."""
    with data.readable(f"{path}: not a readable .npz of plain arrays"), \
            np.load(path, allow_pickle=False) as f:
        small = {i.filename.removesuffix(".npy") for i in f.zip.infolist() if i.file_size < 2 ** 30}
        mu, sigma, n, name = (np.asarray(f[key]) if key in small else np.array(None)
                              for key in ("mu", "sigma", "n", "id"))
    if not (mu.ndim == 1 and mu.size and sigma.shape == 2 * mu.shape
            and mu.dtype.kind + sigma.dtype.kind == "ff" and np.allclose(sigma, sigma.T)):
        raise UserError(f"{path}: mu is {mu.dtype} {mu.shape}, sigma {sigma.dtype} {sigma.shape}: "
                        "must hold mu (F,) and sigma (F, F), symmetric, finite floats below 1 GiB")
    check_finite(path, mu := mu.astype(float), sigma := sigma.astype(float))
    if (values := np.linalg.eigvalsh(sigma))[0] < -1e-3 * abs(values[-1]):
        raise UserError(f"{path}: sigma is no covariance, it has an eigenvalue {values[0]:.3g}")
    n = int(n) if n.ndim == 0 and n.dtype.kind in "iuf" and 2 <= n < 2 ** 53 else None
    return mu, sigma, n, name.item() if name.ndim == 0 and name.dtype.kind == "U" else None


def batches_of(side, args):
    """Yield the first `--n` images of a data set, .npy, folder or zip as uint8 (B, C, H, W)."""
    if side in data.NAMES:
        yield from data.load(side, args.size, args.data_dir, args.split)[:args.n].split(args.batch)
        return
    arrays = rows_of(side) if side.endswith(".npy") else (a for _, a in data.iter_images(side))
    for shape, run in itertools.groupby(itertools.islice(arrays, args.n), key=lambda a: a.shape):
        most = max(min(args.batch, 2 ** 24 // math.prod(shape[:2])), 1)   # 16 megapixels, or one
        while block := list(itertools.islice(run, most)):
            yield torch.from_numpy(np.stack(block)).permute(0, 3, 1, 2)


def rows_of(path):
    """Yield the images (H, W, C) of a uint8 .npy, whose channels may come first or last."""
    with data.readable(f"{path}: not a readable .npy of numbers"):
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        dtype, shape, size = images.dtype, images.shape, math.prod(images.shape[1:])
    axis = [i for i in (3, 1) if len(shape) == 4 and shape[i] in (1, 3)]
    if dtype != np.uint8 or not (axis and images.flags.c_contiguous and 0 < size <= data.LARGEST):
        raise UserError(f"{path}: {dtype} {shape}, must be uint8 (N, H, W, 3 or 1) or (N, 3 or 1, "
                        f"H, W), in C order, at most {data.LARGEST} bytes an image")
    with data.readable(f"{path}: changed while it was read"), open(path, "rb") as f:
        f.seek(images.offset)   # the mapping of a file cut short meanwhile kills the process
        for _ in range(len(images)):
            yield np.moveaxis(np.fromfile(f, np.uint8, size).reshape(shape[1:]), axis[0] - 1, 2)


def compare(args):
    """The dict that `--json` prints, and with it `label` and `note`."""
    start, deep = time.time(), args.kid or args.prc
    sides = [s for s in (args.a, args.b) if s is not None]
    saved = [s for s in sides if s.endswith(".npz")]
    absent = [s for s in sides if s not in data.NAMES and not (s and Path(s).exists())]
    for wrong, text in [
        (absent, f"{absent}: no such file or folder, nor one of {', '.join(data.NAMES)}"),
        (not args.b and (deep or not args.save_stats), "B is missing: give it, or --save-stats"),
        (saved and deep, f"{saved}: --kid and --prc need images, not statistics"),
        ((out := args.save_stats) and (out.suffix != ".npz" or out.is_dir() or args.a in saved),
         "--save-stats writes the statistics of images A to a file named *.npz"),
        (not 1 <= args.batch <= 1000 or args.n is not None and not 2 <= args.n <= 10 ** 12,
         f"--batch {args.batch} must be from 1 to 1000, --n {args.n} at least 2 (at most 10^12)"),
    ]:
        if wrong:
            raise UserError(text)
    net = None if len(saved) == len(sides) else load_inception(   # nothing to run on two files
        args.features, args.dims, args.weights, args.data_dir, args.resize,
        pick_device(args.device))
    loaded, feats = [], []
    for side in sides:
        if side in saved:
            loaded.append(load_stats(side))
        else:
            stats, kept = features(net, batches_of(side, args), keep=deep)
            loaded.append((stats.mean, stats.cov, stats.n, net.id))
            feats.append(kept)
    means, covs, counts, ids = zip(*loaded)
    dims, ids = {len(mean) for mean in means}, {i for i in ids if i}
    if len(ids) > 1 or len(dims) > 1:
        raise UserError(f"A and B hold different features, of {sorted(dims)} dimensions: {ids}")
    dims = dims.pop()
    if args.save_stats:
        with atomic(args.save_stats) as tmp:
            np.savez(tmp, mu=means[0], sigma=covs[0], n=counts[0], id=net.id)
    row = dict.fromkeys(("fid", "kid", "kid_std", "precision", "recall", "n_a", "n_b"))
    row |= dict(zip(("n_a", "n_b"), counts))
    if args.b:
        row["fid"] = frechet_distance(*loaded[0][:2], *loaded[1][:2])
    if args.kid:
        row["kid"], row["kid_std"] = kid(*feats)
    if args.prc:
        row["precision"], row["recall"] = precision_recall(*feats)
    row |= {"features": net and net.features, "dims": dims, "resize": net and net.resize,
            "standard": bool(net and net.standard), "weights_sha256": net and net.weights_sha256,
            "seconds": round(time.time() - start, 1)}
    return row | {"label": net.label if net else f"FD-{dims}",
                  "note": rank_note(min([n for n in counts if n], default=dims + 1), dims)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, switch = parser.add_argument, {"action": "store_true"}
    names = ", ".join(data.NAMES)
    add("a", metavar="A", help=f"folder, .zip, uint8 .npy, statistics .npz, or {names}")
    add("b", metavar="B", nargs="?", help="the same; in --prc A is the real side")
    add("--n", type=int, help="images per side, the first ones; default all")
    add("--kid", help="kernel distance too", **switch)
    add("--prc", help="precision and recall too", **switch)
    add("--json", help="print one JSON object", **switch)
    add("--weights", help="default: $FID_WEIGHTS, DATA_DIR/inception/*.pth, download")
    add("--features", choices=tuple(PUBLISHED), default="2015", help="default 2015")
    add("--dims", type=int, choices=DIMS, default=2048, help="default 2048")
    add("--resize", choices=RESIZES, default=RESIZES[0], help="default pytorch-fid")
    add("--data-dir", type=Path, default=data.DATA_DIR, help="or set GAN_DATA; default data")
    add("--split", choices=("train", "test", "all"), default="train", help="default train")
    add("--size", type=int, help="pixels of a data set's images; default the set's own")
    add("--batch", type=int, default=BATCH, help=f"images; default {BATCH}")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--save-stats", type=Path, metavar="F.npz", help="write mu, sigma and n of A")
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):   # the result alone goes to stdout
        row = compare(args)
    label, note = row.pop("label"), row.pop("note")
    if note:
        print(f"note: {note}", file=sys.stderr)
    shown = {label: row["fid"], **{k: v for k, v in row.items() if k not in ("fid", "standard")}}
    print(json.dumps(row) if args.json else "\n".join(
        f"{k:<16}{v:.6g}" if isinstance(v, float) else f"{k:<16}{v}"
        for k, v in shown.items() if v is not None))
    return row


if __name__ == "__main__":
    cli(main)
