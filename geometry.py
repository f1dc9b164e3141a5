"""Rectangle images: draw them, combine them in pairs, count them. Everything is vectorised.

An image is uint8 (N, 1, H, W) of 0 and 255 as drawn; counters also take float in [-1, 1], lit where
positive. The paper's images have size 32 and `k` = 2 squares of side 8, with at least `gap` dark
pixels between them. Images are drawn on the CPU: one seed, the same ones everywhere. Counters stay
on the device of their images and have fixed shapes; all outside of an image is dark to them.
"""
import math

import torch
import torch.nn.functional as F
from scipy.special import gammaincinv

from core import UserError, generator, pixel_and, pixel_or


def place(n, k, size, side, gap, gen):
    """Top-left corners (row, column) of `k` squares in each of `n` images: int64 (N, k, 2).

    Exactly uniform over all valid ordered placements, by rejection, on the device of `gen`. Raises
    UserError if they cannot fit, or are so dense that 2**24 tries (seconds) do not find them.
    """
    most = ((size + gap) // (side + gap)) ** 2 if min(size, side, gap) > 0 else 0   # exact
    if not most or k not in range(most + 1) or n not in range(1, 2 ** 32 // size ** 2 + 1):
        raise UserError(f"n is {n}, k is {k}, size is {size}, side is {side}, gap is {gap}: must "
                        f"be integers, at most {most} squares, at most 4 GiB of images")
    found, missing = [], n
    for _ in range(2 ** 8):
        tries = min(max(4 * missing, 2 ** 10), 2 ** 16)
        corners = torch.randint(size - side + 1, (tries, k, 2), generator=gen, device=gen.device)
        # UNSPECIFIED: whether squares may touch. They never do, not even at a corner, so that
        # their number is beyond doubt.
        near = (corners[:, :, None] - corners[:, None]).abs().amax(3) < side + gap
        found.append(corners[near.sum((1, 2)) == k][:missing])      # each is near itself alone
        missing -= len(found[-1])
        if not missing:
            return torch.cat(found)
    raise UserError(f"k is {k}: so dense that only {n - missing} of {n} images were found")


def render(corners, size, side):
    """Images uint8 (N, 1, H, W) of the squares at `corners` (N, k, 2), cut off at the border."""
    at = torch.arange(size, device=corners.device)
    inside = (at >= corners[..., None]) & (at < corners[..., None] + side)   # (N, k, 2, size)
    image = inside.new_zeros(len(corners), 1, size, size)
    for row, column in inside.permute(1, 2, 0, 3):
        image |= row[:, None, :, None] & column[:, None, None, :]
    return image.to(torch.uint8) * 255


def draw(n, k, size=32, side=8, gap=1, seed=0):
    """`n` images with exactly `k` separate side x side squares, see `place`: uint8 (N, 1, H, W)."""
    return render(place(n, k, size, side, gap, generator(seed)), size, side)


def draw_pairs(n, size=32, side=8, gap=1, k=2, seed=0):
    """`n` pairs with their combinations, Appendix F: x, y, x_and, x_or, each uint8 (N, 1, H, W).

    Of k + 1 squares x lacks one and y another: their pixel-wise AND has k - 1, the OR k + 1. With
    k = 2, cat([x, y]) is a training set (the paper's has 25,600 images), the others its negatives.
    """
    if k < 1:
        raise UserError(f"k is {k}: a pair needs at least one square in an image")
    corners = place(n, k + 1, size, side, gap, generator(seed))     # exchangeable: any will do
    x, y = (render(corners[:, torch.arange(k + 1) != i], size, side) for i in (0, 1))
    return x, y, pixel_and(x, y), pixel_or(x, y)


def lit(x, side=1):
    """Lit pixels of images (N, 1, H, W), as bool: uint8 above 127, float above 0."""
    if x.dim() != 4 or x.shape[1] != 1 or not 1 <= side <= min(x.shape[2:]):
        raise ValueError(f"shape {tuple(x.shape)} must be (N, 1, H, W), side {side} fit in")
    return x if x.dtype == torch.bool else x > (0 if x.is_floating_point() else 127)


def pack(x):
    """Lit pixels of images (N, 1, H, W), eight to a byte, the first in the highest bit: uint8
    (N, ceil(HW / 8)). What is packed already stays as it is."""
    if x.dim() == 2:
        return x
    bits = F.pad(lit(x).flatten(1), (0, -math.prod(x.shape[1:]) % 8)).unflatten(1, (-1, 8)).byte()
    return (bits << torch.arange(7, -1, -1, device=x.device).to(bits)).sum(2, dtype=torch.uint8)


def count_distinct(x):
    """How many different images (N, 1, H, W) x holds, lit pixels compared, as an int."""
    return len(torch.unique(pack(x), dim=0))


def is_in(x, known):
    """Which of the images x (N, 1, H, W) are, lit pixel for lit pixel, among `known`: bool (N,)."""
    index = torch.unique(torch.cat([pack(known), pack(x)]), dim=0, return_inverse=True)[1]
    return torch.isin(index[len(known):], index[:len(known)])


def integral_image(m):
    """Sums over all above and left of each pixel of m, with one dark pixel around m."""
    return F.pad(m, (2, 1, 2, 1)).cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)


def window_sums(t, h, w):
    """Sums over all h x w windows, from an integral image."""
    down = t[..., h:, :] - t[..., :-h, :]
    return down[..., w:] - down[..., :-w]


def min_pool(m, h, w):
    """Which h x w windows of the bool tensor m are all true: two overlapping halves are."""
    for dim, length in ((2, h), (3, w)):
        while (half := length // 2):
            m = m.narrow(dim, 0, m.shape[dim] - half) & m.narrow(dim, half, m.shape[dim] - half)
            length -= half
    return m


def dilate(m, size):
    """Dilation of m by a size x size window; H and W grow by size - 1."""
    return ~min_pool(~F.pad(m, (size - 1,) * 4), size, size)


def count_exact(x, side=8):
    """Perfect rectangles in each image (N, 1, H, W), full squares with only dark pixels around:
    n int64 (N,), and clean bool (N,), whether nothing else is lit."""
    m, area = lit(x, side), side ** 2
    t = integral_image(m)
    full, ringed = window_sums(t[..., 1:-1, 1:-1], side, side), window_sums(t, side + 2, side + 2)
    n = ((full == area) & (ringed == area)).sum((1, 2, 3))
    return n, m.sum((1, 2, 3)) == n * area


def count(x, side=8, slack=1, fill=0.8, area=0.3):
    """Rectangles a person would see in each image (N, 1, H, W): n int64 (N,), clean bool (N,).

    First a morphological opening takes away what is at most a quarter of a side thick. A rectangle
    is what is then lit in a box of side +- `slack` pixels each way with a dark ring around it, no
    dark row or column in it, at least `fill` of it lit, and side^2 pixels up to a share `area`.
    clean: all that is left is rectangles, and at most side^2 / 4 of the pixels taken away lie
    further than one pixel from one. So ragged edges, a side a pixel off, a row cut off by the
    border and a speck are forgiven, a larger blob is not, and squares that touch count as none.
    """
    m, thick = lit(x, side), side // 4 + 1
    if side < 4:
        raise ValueError(f"rectangle side is {side}: below 4 only count_exact makes sense")
    opened = dilate(min_pool(m, thick, thick), thick)
    near = dilate(opened, 3)[..., 1:-1, 1:-1]                   # and one pixel around it
    t = integral_image(opened)
    inside = t[..., 1:-1, 1:-1]                                 # the same without the ring
    tall, wide = (range(side - slack, min(side + slack, most) + 1) for most in m.shape[2:])
    rows = {w: window_sums(inside, 1, w) > 0 for w in wide}
    columns = {h: window_sums(inside, h, 1) > 0 for h in tall}
    n, held, most = 0, 0, math.floor((1 + area) * side ** 2 + 1e-6)
    for h in tall:
        for w in wide:
            least = math.ceil(max(fill * h * w, (1 - area) * side ** 2) - 1e-6)
            box = window_sums(inside, h, w)
            good = min_pool(rows[w], h, 1) & min_pool(columns[h], 1, w)
            good &= (box == window_sums(t, h + 2, w + 2)) & (box >= least) & (box <= most)
            n = n + good.sum((1, 2, 3))
            held = held + (box * good).sum((1, 2, 3), dtype=torch.int32)    # int64 copies first
    return n, (opened.sum((1, 2, 3)) == held) & ((m & ~near).sum((1, 2, 3)) <= side ** 2 // 4)


def has_two(x, side, counter=count):
    """Which images (N, 1, H, W) are correct, exactly two rectangles and nothing else: bool (N,)."""
    n, clean = counter(x, side)
    return (n == 2) & clean


def possible(size, side, gap=1):
    """How many images of exactly two squares there are: 9,576 at 16 px, 133,008 at 32 px."""
    n, reach = size - side + 1, side + gap
    near = sum(max(n - abs(shift), 0) for shift in range(1 - reach, reach))     # on one axis
    return (n ** 4 - near ** 2) // 2


def birthday(counts):
    """n_eff = s(s-1) / 2C, if of s draws, `counts` (K,) of each image, C pairs are equal: as many
    equally likely images would coincide as often; it estimates 1 / sum p^2. n_eff_low, n_eff_high:
    95% interval, C Poisson, wider by what triples say of its variance. C = 0: only a lower end."""
    c = counts.double()
    s, pairs, triples = (v.sum().item() for v in (c, c * (c - 1) / 2, c * (c - 1) * (c - 2) / 6))
    tries = math.comb(int(s), 2)
    if not pairs:
        return {"n_eff": None, "n_eff_low": tries / -math.log(0.05), "n_eff_high": None}
    ratio = max(1, 1 + 6 * triples / pairs - 2 * (s - 2) * pairs / tries)   # of variance and mean
    low, high = (ratio * float(gammaincinv(pairs / ratio + more, share))
                 for more, share in ((0, 0.025), (1, 0.975)))
    return {"n_eff": tries / pairs, "n_eff_low": tries / high, "n_eff_high": tries / low}


def total_variation(counts, n):
    """Total variation of `counts` (K,) draws of K of n images from uniform over all n, and its mean
    for as many uniform draws, de Moivre's mean deviation of a binomial number. None without any."""
    s, p = counts.sum().item(), 1 / n
    if not s:
        return None, None
    k = int(s * p)
    floor = math.exp(math.log(math.comb(s - 1, k)) + k * math.log(p) + (s - k) * math.log1p(-p))
    return ((counts / s - p).abs().sum().item() + 1 - len(counts) * p) / 2, floor


def report(x, train, side, n_show=30):
    """What images x (N, 1, H, W), or batches of them, are worth beside the training images: a dict.

    Shares of n_samples correct by the tolerant counter, and exactly. Of the latter: how many are
    distinct, `birthday`, unseen_share (no training image), tv, total variation from uniform over
    all possible images, tv_floor, its mean for as many uniform draws (None without any).
    coverage_exact: how many of coverage_n training images are among x.
    """
    n, correct, keys = 0, 0, []
    for part in x.split(4096) if isinstance(x, torch.Tensor) else x:
        n, correct = n + len(part), correct + has_two(part, side).sum().item()
        keys.append(pack(part[has_two(part, side, count_exact)]))
    keys, counts = torch.unique(torch.cat(keys), dim=0, return_counts=True)
    shown = train[torch.randperm(len(train), generator=generator(0))[:n_show]]
    s, (tv, floor) = counts.sum().item(), total_variation(counts, possible(train.shape[-1], side))
    return {"n_samples": n, "correct": correct / n, "correct_exact": s / n, "distinct": len(keys),
            **birthday(counts), "tv": tv, "tv_floor": floor,
            "unseen_share": counts[~is_in(keys, train)].sum().item() / max(s, 1),
            "coverage_exact": is_in(shown, keys).sum().item(), "coverage_n": len(shown)}
