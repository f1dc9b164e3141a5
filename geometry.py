"""Rectangle images: draw them, combine them in pairs, count them. Everything is vectorised.

An image is uint8 (N, 1, H, W) of 0 and 255 as drawn; the counters also take float in [-1, 1], as
a G makes them, lit where positive. The paper's setting is size 32, side 8. `k` is the number of
rectangles, `gap` the dark pixels there are at least between two of them, diagonally too, so that
they never touch. Drawing is done on the CPU: one seed, the same images everywhere. The counters
have fixed shapes and read nothing back to the host; to them, all outside of an image is dark.
"""
import math

import torch
import torch.nn.functional as F

from core import pixel_and, pixel_or
from harness import UserError, generator


def check(n, k, size, side, gap):
    """UserError unless `n` images with `k` squares exist."""
    for name, value, least in [("n", n, 1), ("k", k, 0), ("size", size, 1), ("side", side, 1),
                               ("gap", gap, 1)]:
        if not isinstance(value, int) or value < least:
            raise UserError(f"{name} is {value}: must be an integer of at least {least}")
    if n * size ** 2 > 2 ** 32:
        raise UserError(f"{n} images of {size} x {size} pixels: at most {2 ** 32 // size ** 2} of "
                        "that size fit into 4 GiB")
    most = ((size + gap) // (side + gap)) ** 2      # exact for axis-aligned equal squares
    if k > most or not most:
        raise UserError(f"number of rectangles is {k}: at most {most} of side {side} and gap "
                        f"{gap} fit into {size} x {size} pixels")


def place(n, k, size, side, gap, gen):
    """Top-left corners (row, column) of `k` squares in each of `n` images: int64 (N, k, 2).

    Exactly uniform over all valid ordered placements: independent uniform corners, those with two
    squares nearer than `gap` rejected. Lives on the device of `gen`. Raises UserError for what
    `check` refuses, and where 2**24 tries (seconds) are not enough, when squares are very dense.
    """
    check(n, k, size, side, gap)
    found, missing = [], n
    for _ in range(2 ** 8):
        tries = min(max(4 * missing, 2 ** 10), 2 ** 16)
        corners = torch.randint(size - side + 1, (tries, k, 2), generator=gen, device=gen.device)
        valid = torch.ones(tries, dtype=torch.bool, device=gen.device)
        for j in range(1, k):
            apart = (corners[:, j:j + 1] - corners[:, :j]).abs().amax(2)
            valid &= (apart >= side + gap).all(1)
        found.append(corners[valid][:missing])
        missing -= len(found[-1])
        if not missing:
            return torch.cat(found)
    raise UserError(f"number of rectangles is {k}: that dense, random placement found only "
                    f"{n - missing} of {n} images; ask for fewer or smaller rectangles")


def render(corners, size, side):
    """Images uint8 (N, 1, H, W) of the squares at `corners` (N, k, 2), cut off at the border."""
    if corners.dim() != 3 or corners.shape[2] != 2:
        raise ValueError(f"corners have shape {tuple(corners.shape)}: must be (N, k, 2)")
    at = torch.arange(size, device=corners.device)
    inside = (at >= corners[..., None]) & (at < corners[..., None] + side)   # (N, k, 2, size)
    image = inside.new_zeros(len(corners), 1, size, size)
    for row, column in inside.permute(1, 2, 0, 3):
        image |= row[:, None, :, None] & column[:, None, None, :]
    return image.to(torch.uint8) * 255


def draw(n, k, size=32, side=8, gap=1, seed=0):
    """`n` images with exactly `k` separate side x side squares, see `place`: uint8 (N, 1, H, W)."""
    return render(place(n, k, size, side, gap, generator(seed, "cpu")), size, side)


def draw_pairs(n, size=32, side=8, gap=1, k=2, seed=0):
    """`n` pairs with their combinations, Appendix F: x, y, x_and, x_or, each uint8 (N, 1, H, W).

    Draw k + 1 squares, drop one for x and another one for y. The pixel-wise AND of x and y then
    has exactly k - 1 squares and the OR exactly k + 1: with k = 2, cat([x, y]) is a training set
    of 2 n two-rectangle images (the paper's 25600 are n = 12800), x_and and x_or its negatives.
    """
    if k < 1:
        raise UserError(f"number of rectangles is {k}: a pair needs at least 1")
    corners = place(n, k + 1, size, side, gap, generator(seed, "cpu"))
    x = render(corners[:, 1:], size, side)                      # exchangeable: any two will do
    y = render(torch.cat([corners[:, :1], corners[:, 2:]], 1), size, side)
    return x, y, pixel_and(x, y), pixel_or(x, y)


def lit(x, side=1):
    """Lit pixels of images (N, 1, H, W), as bool: uint8 above 127, float above 0. ValueError for
    any other shape, and if a square of that side does not fit in."""
    if x.dim() != 4 or x.shape[1] != 1:
        raise ValueError(f"images have shape {tuple(x.shape)}: must be (N, 1, H, W)")
    if not 1 <= side <= min(x.shape[2:]):
        raise ValueError(f"rectangle side is {side}: must be in [1, {min(x.shape[2:])}]")
    return x if x.dtype == torch.bool else x > (0 if x.is_floating_point() else 127)


def pack(x):
    """Lit pixels of images (N, 1, H, W), eight to a byte: uint8 (N, ceil(HW / 8)).

    Two images have equal rows exactly if they have the same lit pixels. First pixel, highest bit.
    """
    bits = lit(x).flatten(1)
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(7, -1, -1, device=x.device, dtype=torch.uint8)).sum(
        2, dtype=torch.uint8)


def count_distinct(x):
    """How many different images (N, 1, H, W) holds, lit pixels compared, as an int."""
    return len(torch.unique(pack(x), dim=0))


def is_in(x, known):
    """Which of the images x (N, 1, H, W) are, lit pixel for lit pixel, among `known`: bool (N,)."""
    index = torch.unique(torch.cat([pack(known), pack(x)]), dim=0, return_inverse=True)[1]
    return torch.isin(index[len(known):], index[:len(known)])


def table(m):
    """Integral image of m (N, 1, H, W) with one dark pixel around it, for `sums`."""
    return F.pad(m, (2, 1, 2, 1)).cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32)


def sums(t, h, w):
    """Sums over all h x w windows, from an integral image."""
    down = t[..., h:, :] - t[..., :-h, :]
    return down[..., w:] - down[..., :-w]


def every(m, h, w):
    """Which h x w windows of the bool tensor m are all true; the run doubles at each step."""
    for dim, length in ((2, h), (3, w)):
        done = 1
        while done < length:
            step = min(done, length - done)
            most = m.shape[dim] - step
            m, done = m.narrow(dim, 0, most) & m.narrow(dim, step, most), done + step
    return m


def grow(m, size):
    """Dilation of m by a size x size window; H and W grow by size - 1."""
    return ~every(~F.pad(m, (size - 1,) * 4), size, size)


def count_exact(x, side=8):
    """Perfect rectangles in each image (N, 1, H, W): n int64 (N,) and clean bool (N,).

    A perfect rectangle is an 8-connected component of lit pixels that is one full side x side
    square: every pixel in it is lit, every pixel around it dark. clean: nothing else is lit.
    """
    m = lit(x, side)
    t = table(m)
    around = sums(t, side + 2, side + 2)                        # the square and its ring
    n = ((sums(t[..., 1:-1, 1:-1], side, side) == side ** 2) & (around == side ** 2)).sum((1, 2, 3))
    return n, m.sum((1, 2, 3)) == n * side ** 2


def count(x, side=8, slack=1, fill=0.8, area=0.3):
    """Rectangles a person would see in each image (N, 1, H, W): n int64 (N,), clean bool (N,).

    First a morphological opening takes away lit pixels that belong to no fully lit block thicker
    than a quarter of a side (3 x 3 for side 8, 2 x 2 for side 4). A rectangle then is what is lit
    in a box of side +- `slack` pixels each way that has a dark ring around it, no dark row or
    column in it, at least `fill` of its pixels lit, and side^2 of them up to a share `area`.
    clean: the opening left nothing but rectangles, and of what it took away at most side^2 / 4
    pixels lie further than one pixel from a rectangle. Correct is (n == k) & clean.

    Two good squares, and ...                                                         n  clean
    ragged edges, sides a pixel longer or shorter (but 3 x 3, 5 x 5 at side 4: no)    2  yes
    a row or column of pixels cut off by the image border                             2  yes
    a lit speck of a pixel or two, wherever it is, as in a gap of one pixel           2  yes
    a half square, or any other blob that holds a 3 x 3 (side 4: 2 x 2) block         2  no
    specks or thin lines of more than a quarter of a square in all                    2  no
    a third one, however near without touching                                        3  yes
    but they touch, at a corner is enough, or overlap                                 0  no
    but they coincide up to a pixel                                                   1  yes
    """
    m = lit(x, side)
    if side < 4:
        raise ValueError(f"rectangle side is {side}: below 4 only count_exact makes sense")
    thick = side // 4 + 1
    opened = grow(every(m, thick, thick), thick)
    near = grow(opened, 3)[..., 1:-1, 1:-1]                     # and one pixel around it
    t = table(opened)
    inside = t[..., 1:-1, 1:-1]                                 # the same without the ring
    tall, wide = (range(side - slack, min(side + slack, most) + 1) for most in m.shape[2:])
    rows = {w: sums(inside, 1, w) > 0 for w in wide}
    columns = {h: sums(inside, h, 1) > 0 for h in tall}
    n, held, most = 0, 0, math.floor((1 + area) * side ** 2 + 1e-6)
    for h in tall:
        for w in wide:
            least = math.ceil(max(fill * h * w, (1 - area) * side ** 2) - 1e-6)
            box = sums(inside, h, w)
            good = every(rows[w], h, 1) & every(columns[h], 1, w)
            good &= box == sums(t, h + 2, w + 2)
            good &= (box >= least) & (box <= most)
            n = n + good.sum((1, 2, 3))
            held = held + (box * good).sum((1, 2, 3), dtype=torch.int32)    # int64 copies first
    alone, stray = opened.sum((1, 2, 3)) == held, (m & ~near).sum((1, 2, 3))
    return n, alone & (stray <= side ** 2 // 4)
