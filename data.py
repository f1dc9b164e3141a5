"""Natural-image data sets, and any folder or zip of images, as one uint8 tensor (N, C, H, W).

Everything is looked for in `data_dir`; only CIFAR-10 is downloaded. Images are decoded once and
cached in `data_dir/cache`, under a key made of everything that determines them.
"""
import contextlib
import hashlib
import io
import itertools
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
from core import UserError, generator
from harness import atomic
from sweep import lock

DATA_DIR = Path(os.environ.get("GAN_DATA", "data"))
NAMES = ("cifar10", "celeba", "imagenet", "geometry")
# UNSPECIFIED: pixels of CelebA and ImageNet. 64, as the published baselines of the paper's models.
SIZES = {"cifar10": 32, "celeba": 64, "imagenet": 64, "geometry": 32}
# UNSPECIFIED: which images of CelebA train. All but every tenth in name order, as of any folder;
# of ImageNet all, because the M-ImageNet of Section 5.3 is the whole validation set.
SPLITS = {"imagenet": "all"}
# UNSPECIFIED: the crop. The centred square, 160 of 178 px wide for CelebA as Lucic et al. (2018),
# whose baselines the paper compares with; elsewhere as wide as the shorter side.
CROP = {"celeba": 160 / 178}
FLAGS = {   # of the scripts that read images, as sweep.FLAGS
    "data_dir": (Path, "data sets, weights and caches; or set GAN_DATA (%(default)s)"),
    "split": (("train", "test", "all"), "images to train on (train; imagenet: all)"),
    "n_train": (int, 1, 10 ** 9, "train on a seeded subset of this many images"),
}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")   # whatever the name: no PostScript
LARGEST = 2 ** 28   # bytes of an image file, and of an image: all that Pillow decodes unwarned
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # the official page's, for the binary version
CIFAR_BYTES = 10000 * 3073
CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR_FILES["all"] = CIFAR_FILES["train"] + CIFAR_FILES["test"]
BY_HAND = {   # what must be downloaded by hand, and where in data_dir it may lie
    "celeba": ("aligned JPEGs (img_align_celeba.zip, mmlab.ie.cuhk.edu.hk)",
               "celeba/img_align_celeba", "img_align_celeba",
               "celeba/img_align_celeba.zip", "img_align_celeba.zip"),
    "imagenet": ("validation images (image-net.org)",
                 "imagenet/val", "imagenet", "ILSVRC2012_img_val"),
}


def download(url, path, **checksum):
    """Fetch `url` to `path`, which appears only when complete and of the right md5 or sha256."""
    print(f"downloading {url}")
    with readable(f"cannot download {url}: fetch it elsewhere and put it at {path}"), \
            urllib.request.urlopen(url, timeout=60) as source, atomic(path) as tmp:
        tmp.write_bytes(source.read(2 ** 30))
        verify_checksum(tmp, url, **checksum)


def verify_checksum(path, what, **checksum):
    """The file's md5=... or sha256=...; UserError unless it begins with the digits given."""
    (kind, wanted), = checksum.items()
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, kind).hexdigest()
    if not found.startswith(wanted):
        raise UserError(f"{what}: {kind} is {found}, should be {wanted}: delete it and fetch again")
    return found


@contextlib.contextmanager
def readable(what):
    """Turn any error inside into a UserError: on broken files decoders raise nearly anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({str(error) or type(error).__name__})") from None


def cifar10(data_dir, split):
    """The official *binary* archive (no pickle), unpacked or not -> uint8 (N, 3, 32, 32)."""
    folder, archive = data_dir / "cifar-10-batches-bin", data_dir / "cifar-10-binary.tar.gz"
    if packed := not folder.is_dir():
        if not archive.exists():
            download(CIFAR_URL, archive, md5=CIFAR_MD5)
        verify_checksum(archive, archive, md5=CIFAR_MD5)
    parts = []
    with tarfile.open(archive) if packed else contextlib.nullcontext() as tar:
        for name in CIFAR_FILES[split]:
            if not packed and not (folder / name).is_file():
                raise UserError(f"{folder} lacks {name}: unpack all of {CIFAR_URL} there")
            with readable(f"{archive} is damaged, delete it and run again"), (
                    tar.extractfile(f"{folder.name}/{name}") if packed else
                    open(folder / name, "rb")) as file:
                parts.append(file.read(CIFAR_BYTES + 1))
            if len(parts[-1]) != CIFAR_BYTES:
                raise UserError(f"{name} has {len(parts[-1])} bytes, should have {CIFAR_BYTES}: "
                                f"delete {folder} and unpack {CIFAR_URL} again")
    records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy()


def list_images(path):
    """Sorted (name, bytes, time) of every image in a folder (recursive) or zip, links and pipes
    left out. UserError for what is damaged, doubled, too large, or cannot be read."""
    def fail(error):   # else os.walk leaves out in silence what it cannot enter
        raise error

    with readable(f"{path}: not a readable folder or zip of images"):
        if path.is_dir():
            files = (Path(base, f) for base, _, names in os.walk(path, onerror=fail) for f in names)
            found = [(str(f.relative_to(path)), s.st_size, s.st_mtime_ns) for f in files
                     if stat.S_ISREG((s := f.lstat()).st_mode)]
        elif path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as z:
                found = [(i.filename, i.file_size, i.CRC) for i in z.infolist()
                         if not stat.S_ISLNK(i.external_attr >> 16)]
        else:
            raise UserError(f"{path} does not exist, or is no folder and no (whole) zip of images")
    found = sorted(f for f in found if f[0].lower().endswith(SUFFIXES)
                   and not f[0].rpartition("/")[2].startswith("._"))   # macOS's, no images
    if not found:
        raise UserError(f"{path}: no images in it (looked for {', '.join(SUFFIXES)})")
    for (name, size, _), (following, *_) in zip(found, [*found[1:], ("",)]):
        if size > LARGEST or name == following:
            raise UserError(f"{path}: {name} is there twice, or has more than {LARGEST} bytes")
    return found


def decode(file, name):
    """One image file as uint8 (H, W, 3), whatever its mode. Raises UserError that calls it `name`
    if it is broken, a decompression bomb, or deeper than 8 bits."""
    with readable(f"{name}: not a readable image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(file, formats=FORMATS)
        deep = image.mode if image.mode.startswith(("I", "F")) else next(
            (tile[3] for tile in image.tile if ";16" in str(tile[3])), None)
        if deep:
            raise UserError(f"{name}: {deep} pixels are not 8 bits: convert it first")
        return np.asarray(image.convert("RGB"))


def iter_images(path, names=None):
    """Yield (name, uint8 array (H, W, 3)) for every image (or `names`) of a folder or zip."""
    path = Path(path)
    names = names or [name for name, _, _ in list_images(path)]
    with readable(f"{path}: not a readable zip"), (
            contextlib.nullcontext() if path.is_dir() else zipfile.ZipFile(path)) as z:
        for name in names:
            place = f"{path}:{name}" if z else path / name
            with readable(f"{place}: not a readable image"):
                # Members are read, never extracted; whole, for their checksums.
                file = io.BytesIO(z.read(name)) if z else place
            yield name, decode(file, place)


def iter_npy(path):
    """Yield the images (H, W, C) of a uint8 .npy, whose channels may come first or last."""
    with readable(f"{path}: not a readable .npy of numbers"):
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        dtype, shape, size = images.dtype, images.shape, math.prod(images.shape[1:])
    axis = [i for i in (3, 1) if len(shape) == 4 and shape[i] in (1, 3)]
    if dtype != np.uint8 or not (axis and images.flags.c_contiguous and 0 < size <= LARGEST):
        raise UserError(f"{path}: {dtype} {shape}, must be uint8 (N, H, W, 3 or 1) or (N, 3 or 1, "
                        f"H, W), in C order, at most {LARGEST} bytes an image")
    with readable(f"{path}: changed while it was read"), open(path, "rb") as f:
        f.seek(images.offset)   # the mapping of a file cut short meanwhile kills the process
        for _ in range(len(images)):
            yield np.moveaxis(np.fromfile(f, np.uint8, size).reshape(shape[1:]), axis[0] - 1, 2)


def batches(source, batch, n=None, size=None, data_dir=DATA_DIR, split="train"):
    """Yield the first n images of a data set (see `load`), or of a .npy, folder or zip, of whatever
    sizes, as uint8 (B, C, H, W), B at most `batch`."""
    if source in NAMES:
        yield from load(source, size, data_dir, split)[:n].split(batch)
        return
    arrays = iter_npy(source) if source.endswith(".npy") else (a for _, a in iter_images(source))
    for shape, run in itertools.groupby(itertools.islice(arrays, n), key=np.shape):
        most = max(min(batch, 2 ** 24 // math.prod(shape[:2])), 1)   # 16 megapixels, or one
        while block := list(itertools.islice(run, most)):
            yield torch.from_numpy(np.stack(block)).permute(0, 3, 1, 2)


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
    if name not in BY_HAND:
        return Path(name)
    what, *places = BY_HAND[name]
    for place in places:
        if (data_dir / place).exists():
            return data_dir / place
    raise UserError(f"no {name} in {data_dir}: download the {what} and put them at "
                    f"{data_dir / places[0]}, or give --data-dir")


def load(name, size=None, data_dir=DATA_DIR, split="train", n_train=None, seed=0):
    """A data set, one of NAMES or the path of a folder or zip of images of any mode and size, as
    one uint8 tensor (N, C, size, size) in [0, 255]. split: `train`, `test` or `all`; except for
    CIFAR-10 every tenth image in name order is `test`. n_train takes a seeded subset. Raises
    UserError for missing, broken or too few images."""
    data_dir, size = Path(data_dir), SIZES.get(name, 64) if size is None else size
    if not 1 <= size <= 4096 or (name == "cifar10" and size != 32):
        raise UserError(f"--size {size}: must be from 1 to 4096 pixels, and for cifar10 32")
    if split not in CIFAR_FILES:
        raise UserError(f"split {split!r}: choose train, test or all")
    if name == "geometry":
        # UNSPECIFIED: which of the paper's geometry sets. Section 5.2's, of 25,600 images.
        n, first = (2560, 1) if split == "test" else (25600, 0)
        images = geometry.draw(n, 2, size=size, side=size // 4, seed=first)
    elif name == "cifar10":
        images = torch.from_numpy(cifar10(data_dir, split))
    else:
        images = from_files(find(name, data_dir), size, data_dir, split, CROP.get(name, 1.0))
    if n_train is not None:
        if not 0 < n_train <= len(images):
            raise UserError(f"--n-train {n_train}: {name} has {len(images)} images")
        images = images[torch.randperm(len(images), generator=generator(seed))[:n_train].sort()[0]]
    return images


def from_files(path, size, data_dir, split, crop):
    """The images of a folder or zip -> uint8 (N, 3, size, size), from the cache if unchanged."""
    files = [f for i, f in enumerate(list_images(path))
             if split == "all" or (i % 10 == 9) == (split == "test")]
    if not files:
        raise UserError(f"{path}: no image is left for the {split} split")
    recipe = repr(("v1", str(path.resolve()), size, crop, files))
    cache = data_dir / "cache" / f"{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.npy"
    shape = (len(files), 3, size, size)
    with lock(cache.with_suffix(".lock"), "wait"):  # of several processes one decodes
        with contextlib.suppress(Exception):   # without a cache, or with a damaged one: decode anew
            images = np.load(cache, allow_pickle=False)
            if images.shape == shape and images.dtype == np.uint8:
                return torch.from_numpy(images)
        if hasattr(os, "sysconf"):   # Linux grants more memory than there is, and kills later
            need = math.prod(shape)
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if need > memory:
                raise UserError(f"--size {size}: {len(files)} images need {need} of {memory} bytes")
        images = np.empty(shape, np.uint8)
        for i, (_, image) in enumerate(tqdm(
                iter_images(path, [name for name, *_ in files]), f"decoding {path.name}",
                len(files), disable=None, leave=False)):
            images[i] = square(image, size, crop)
        try:
            with atomic(cache) as tmp:
                np.save(tmp, images)
        except OSError as error:
            print(f"no cache kept: {error}")
    return torch.from_numpy(images)
