"""Natural-image data sets, and any folder or zip of images, as one uint8 tensor (N, C, H, W).

`load("cifar10" | "celeba" | "imagenet" | "geometry" | PATH, ...)`. Everything is looked for in
`data_dir`; only CIFAR-10 is downloaded (the others' licences ask for a click). Images are decoded
once and cached in `data_dir/cache` under a key made of everything that determines them.
"""
import contextlib
import hashlib
import http.client
import io
import math
import os
import stat
import tarfile
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import geometry
from harness import UserError, atomic

DATA_DIR = Path(os.environ.get("GAN_DATA", "data"))  # where --data-dir points by default
NAMES = ("cifar10", "celeba", "imagenet", "geometry")
SIZES = {"cifar10": 32, "celeba": 64, "imagenet": 64, "geometry": 32}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")   # whatever the name: no PostScript
LARGEST = 2 ** 28   # bytes of an image file, and of an image: all that Pillow decodes unwarned

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # the official page's, for the binary version
CIFAR_BYTES = 10000 * 3073
CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}

# Part of the width that the centred square keeps. UNSPECIFIED: the crop. 160 of 178 px for CelebA
# is that of Lucic et al. (2018), whose baselines the paper compares with; elsewhere the shorter
# side.
CROP = {"celeba": 160 / 178}


def download(url, path, md5=None, sha256=None):
    """Fetch `url` to `path`, which appears only when complete and of the right checksum.

    `sha256` may be the first digits only. Raises UserError if it cannot, or on a mismatch.
    """
    kind, wanted = ("md5", md5) if md5 else ("sha256", sha256)
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as source, atomic(path) as tmp:
            with open(tmp, "wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
            check(tmp, kind, wanted, url)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}): fetch it elsewhere and put it at "
                        f"{path}") from None


def check(path, kind, wanted, what):
    """Raise UserError unless the file's md5 or sha256 begins with `wanted`."""
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, kind).hexdigest()
    if not found.startswith(wanted):
        raise UserError(f"{what}: {kind} is {found}, should be {wanted}: delete it and fetch again")


@contextlib.contextmanager
def readable(what):
    """Turn any error inside into a UserError: on broken files decoders raise nearly anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({str(error) or type(error).__name__})") from None


# ---------------------------------------------------------------------------------- CIFAR-10


def cifar10(data_dir, split):
    """The official *binary* archive (no pickle), unpacked or not -> uint8 (N, 3, 32, 32)."""
    folder, archive = data_dir / "cifar-10-batches-bin", data_dir / "cifar-10-binary.tar.gz"
    names = CIFAR_FILES["train"] + CIFAR_FILES["test"] if split == "all" else CIFAR_FILES[split]
    if folder.is_dir():
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}: unpack all of {CIFAR_URL} there")
        raw = []
        for n in names:
            with open(folder / n, "rb") as f:
                raw.append(f.read(CIFAR_BYTES + 1))
    else:
        if not archive.exists():
            download(CIFAR_URL, archive, md5=CIFAR_MD5)
        check(archive, "md5", CIFAR_MD5, archive)
        with readable(f"{archive} is damaged, delete it and run again"), \
                tarfile.open(archive) as tar:   # members are read, never extracted
            raw = [tar.extractfile(f"cifar-10-batches-bin/{n}").read(CIFAR_BYTES + 1)
                   for n in names]
    for name, content in zip(names, raw):
        if len(content) != CIFAR_BYTES:
            raise UserError(f"{name} has {len(content)} bytes, should have {CIFAR_BYTES}: "
                            f"truncated? delete {folder} and unpack {CIFAR_URL} again")
    records = np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy()


# ---------------------------------------------------------------------- folders, zips, images


def list_images(path):
    """Sorted (name, size, time) of every image in a folder (recursive) or zip: of plain files only,
    links and pipes left out. UserError for what is damaged, doubled, too large, or cannot be read.
    """
    def fail(error):   # else os.walk leaves out in silence what it cannot enter
        raise error

    with readable(f"{path}: not a readable folder or zip of images"):
        if path.is_dir():
            files = (Path(base, f) for base, _, names in os.walk(path, onerror=fail)
                     for f in names if is_image(f))
            found = [(str(f.relative_to(path)), s.st_size, s.st_mtime_ns) for f in files
                     if stat.S_ISREG((s := f.lstat()).st_mode)]
        elif path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                found = [(i.filename, i.file_size, i.CRC) for i in z.infolist()
                         if is_image(i.filename) and not stat.S_ISLNK(i.external_attr >> 16)]
        else:
            raise UserError(f"{path} " + ("is no folder and no (whole) zip of images"
                                          if path.exists() else "does not exist"))
    if not found:
        raise UserError(f"{path}: no images in it (looked for {', '.join(SUFFIXES)})")
    found.sort()
    for (name, size, _), (following, *_) in zip(found, [*found[1:], ("",)]):
        if size > LARGEST or name == following:
            raise UserError(f"{path}: {name} is there twice, or has more than {LARGEST} bytes")
    return found


def is_image(name):
    """Whether a file is called like an image; macOS's ._ files are not."""
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith("._")


def decode(file, name):
    """One image file as a uint8 array (H, W, 3); grey, palette, alpha and CMYK are converted.

    Raises UserError naming the file if it is broken, a decompression bomb, or deeper than 8 bits.
    """
    with readable(f"{name}: not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{name}: {image.mode} pixels are not 8 bits: convert it first")
        return np.asarray(image.convert("RGB"))


def iter_images(path, names=None):
    """Yield (name, uint8 array (H, W, 3)) for every image (or `names`) of a folder or zip."""
    path = Path(path)
    names = names or [name for name, _, _ in list_images(path)]
    if path.is_dir():
        for name in names:
            yield name, decode(path / name, path / name)
        return
    with readable(f"{path}: not a readable zip"), zipfile.ZipFile(path) as z:
        for name in names:   # members are read, never extracted; whole, for their checksums
            with readable(f"{path}:{name}: not a readable image"):
                content = z.read(name)
            yield name, decode(io.BytesIO(content), f"{path}:{name}")


def square(image, size, crop):
    """(H, W, 3) -> (3, size, size): centre crop of crop * W (or H, if that is less), resized."""
    height, width, _ = image.shape
    side = min(crop * width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # UNSPECIFIED: the filter. Lanczos is antialiased whatever the reduction.
    image = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS,
                                          box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def find(name, data_dir):
    """Folder or zip that holds a named data set, or the path itself; UserError says what to do."""
    if not name:
        raise UserError(f"the name of the data set is empty: give a path, or one of {NAMES}")
    if name not in NAMES:
        return Path(name)
    choices = {"celeba": ["celeba/img_align_celeba", "img_align_celeba",
                          "celeba/img_align_celeba.zip", "img_align_celeba.zip"],
               "imagenet": ["imagenet/val", "imagenet", "ILSVRC2012_img_val"]}[name]
    for choice in choices:
        if (data_dir / choice).exists():
            return data_dir / choice
    raise UserError(f"no {name} in {data_dir}: download the "
                    + ("aligned JPEGs (img_align_celeba.zip, mmlab.ie.cuhk.edu.hk)"
                       if name == "celeba" else "validation images (image-net.org)")
                    + f" and put them at {data_dir / choices[0]}, or give --data-dir")


# -------------------------------------------------------------------------------------- load


def load(name, size=None, data_dir="data", split="train", n_train=None, seed=0):
    """A data set as one uint8 tensor (N, C, size, size) in [0, 255].

    name: one of NAMES, or the path of a folder or zip of images (any mode and size: centre crop,
    Lanczos). split: `train`, `test` or `all`. CIFAR-10 has its official split; elsewhere every
    tenth image in name order is `test` (UNSPECIFIED: the paper names no split). n_train takes a
    seeded subset. Raises UserError for missing, broken or too few images.
    """
    data_dir, size = Path(data_dir), SIZES.get(name, 64) if size is None else size
    if not 1 <= size <= 4096:
        raise UserError(f"--size {size}: must be from 1 to 4096 pixels")
    if split not in ("train", "test", "all"):
        raise UserError(f"split {split!r}: choose train, test or all")
    if name == "geometry":
        # UNSPECIFIED: which of the paper's geometry sets; this is Section 5.2's, 25,600 images.
        n, first = (2560, 1) if split == "test" else (25600, 0)
        images = geometry.draw(n, 2, size=size, side=size // 4, seed=first)
    elif name == "cifar10":
        if size != 32:
            raise UserError(f"--size {size}: cifar10 has 32 px")
        images = torch.from_numpy(cifar10(data_dir, split))
    else:
        images = from_files(find(name, data_dir), size, data_dir, split, CROP.get(name, 1.0))
    if n_train is not None:
        if not 0 < n_train <= len(images):
            raise UserError(f"--n-train {n_train}: {name} has {len(images)} images")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images = images[order[:n_train].sort().values]
    return images


def from_files(path, size, data_dir, split, crop):
    """The images of a folder or zip -> uint8 (N, 3, size, size), from the cache if unchanged."""
    files = list_images(path)
    if split != "all":
        files = [f for i, f in enumerate(files) if (i % 10 == 9) == (split == "test")]
    if not files:
        raise UserError(f"{path}: no image is left for the {split} split")
    recipe = repr(("v1", str(path.resolve()), size, crop, files))
    cache = data_dir / "cache" / f"{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.npy"
    shape = (len(files), 3, size, size)
    with contextlib.suppress(Exception):   # without a cache, or with a damaged one: decode anew
        images = np.load(cache, allow_pickle=False)
        if images.shape == shape and images.dtype == np.uint8:
            return torch.from_numpy(images)
    if hasattr(os, "sysconf"):   # Linux grants more memory than there is, and kills later
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if math.prod(shape) > memory:
            raise UserError(f"--size {size}: {len(files)} images need {math.prod(shape) / 1e9:.0f} "
                            f"GB, this machine has {memory / 1e9:.0f}")
    images = np.empty(shape, np.uint8)
    source = iter_images(path, [name for name, _, _ in files])
    for i, (_, image) in enumerate(tqdm(source, f"decoding {path.name}", len(files),
                                        disable=None, leave=False)):
        images[i] = square(image, size, crop)
    try:
        with atomic(cache) as tmp, open(tmp, "wb") as f:
            np.save(f, images)
    except OSError as error:
        print(f"no cache kept: {error}")
    return torch.from_numpy(images)
