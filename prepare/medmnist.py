"""MedMNIST's 2D sets (Yang et al., Scientific Data 10, 2023), of any size -> pictures and records of label or grade.

    python -m prepare.medmnist --source dermamnist_224.npz --out dermamnist
    python -m prepare.medmnist --source retinamnist_64.npz --out retinamnist --limit 200

A file holds {train,val,test}_images, (N, S, S) or (N, S, S, 3) uint8, and {train,val,test}_labels, (N, 1). The pictures
are written as PNG below --out, the splits are the owners'. --limit takes that many of each, which ones says --seed. The
set is known by the beginning of the file's name; of another set classes are numbers, until --names gives words: {"0":
"benign", ...}. RetinaMNIST, whose classes have an order, becomes grades 0 to 4.

Arrays are read picture by picture: pathmnist_224.npz unfolds to 16 GB. Pickled objects are never loaded.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

import errors
from errors import InputError, cause_of, named, one_line
from prepare import choices, common
from prepare.common import Entry

ORGANS = (
    "bladder, femur-left, femur-right, heart, kidney-left, kidney-right, liver, lung-left, lung-right, pancreas, spleen"
)
# Class names as in medmnist 3.0.2's INFO, but for three that have commas of their own, which a list of options has not.
SETS = {
    "pathmnist": "adipose, background, debris, lymphocytes, mucus, smooth muscle, normal colon mucosa, "
    "cancer-associated stroma, colorectal adenocarcinoma epithelium",
    "dermamnist": "actinic keratoses and intraepithelial carcinoma, basal cell carcinoma, "
    "benign keratosis-like lesions, dermatofibroma, melanoma, melanocytic nevi, vascular lesions",
    "octmnist": "choroidal neovascularization, diabetic macular edema, drusen, normal",
    "pneumoniamnist": "normal, pneumonia",
    "retinamnist": "0, 1, 2, 3, 4",
    "breastmnist": "malignant, normal or benign",  # "normal, benign"
    "bloodmnist": "basophil, eosinophil, erythroblast, immature granulocytes, lymphocyte, monocyte, neutrophil, "
    "platelet",  # "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)"
    "tissuemnist": "Collecting Duct or Connecting Tubule, Distal Convoluted Tubule, Glomerular endothelial cells, "
    "Interstitial endothelial cells, Leukocytes, Podocytes, Proximal Tubule Segments, Thick Ascending Limb",
    **dict.fromkeys(("organamnist", "organcmnist", "organsmnist"), ORGANS),
}
GRADED = {"retinamnist": "5"}
PARTS = ("train", "val", "test")
MAX_SIDE = 4096  # pixels; MedMNIST's largest has 224
REMEDY = "download the file anew"


@contextmanager
def opened(file: zipfile.ZipFile, key: str) -> Iterator[tuple[tuple[int, ...], np.dtype, BinaryIO]]:
    """The shape and the type of an array, and its bytes from the first value on."""
    with named(f"{one_line(file.filename)}: array {key!r}"):
        try:
            with file.open(f"{key}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                if version not in ((1, 0), (2, 0)):
                    raise InputError(f"is of format {version}, which is not read here; save it anew by numpy.savez")
                reader = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, columns_first, kind = reader(stream)
                if not all(0 <= side < 2**32 for side in shape):
                    raise InputError(f"is of shape {common.short(shape)}; {REMEDY}")
                if kind.hasobject:
                    raise InputError("holds Python objects, which would be run, not read; save numbers")
                if columns_first and len(shape) > 1:
                    raise InputError("stands column by column; save it by numpy.ascontiguousarray")
                yield shape, kind, stream
        except InputError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise all kinds on damaged files
            raise InputError(f"cannot be read ({cause_of(error)}); {REMEDY}") from error


def take(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise EOFError("it ends too early")
    return content


def read_labels(file: zipfile.ZipFile, part: str) -> list[int]:
    """The class of each picture."""
    with opened(file, f"{part}_labels") as (shape, kind, stream):
        if len(shape) == 2 and shape[1] > 1:
            raise InputError(
                f"is of shape {shape}: each picture may have several of {shape[1]} classes, which is no choice of one"
            )
        if kind.kind not in "iu" or len(shape) not in (1, 2):
            raise InputError(f"must be whole numbers of shape (N, 1), not {kind} of {shape}")
        count = math.prod(shape)
        if count > 10**8:
            raise InputError(f"has {count} labels, more than any set; {REMEDY}")
        return np.frombuffer(take(stream, count * kind.itemsize), kind).tolist()


def pictures(file: zipfile.ZipFile, part: str, wanted: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, (S, S) or (S, S, 3) uint8) of the pictures that are wanted, in order; those before are stepped over."""
    with opened(file, f"{part}_images") as (shape, _, stream):
        frame, at = shape[1:], 0
        for index in wanted:
            while at <= index:
                content = take(stream, math.prod(frame))
                at += 1
            yield index, np.frombuffer(content, np.uint8).reshape(frame)
        if at == shape[0] and stream.read(1):  # at its end, the archive's checksum is held against what was read
            raise InputError(f"holds more than its shape {shape} says; {REMEDY}")


def count_pictures(file: zipfile.ZipFile, part: str) -> int:
    """How many there are, by the array's header."""
    with opened(file, f"{part}_images") as (shape, kind, _):
        if len(shape) == 4 and shape[3] != 3:
            raise InputError(
                f"is of shape {shape}: volumes of the 3D sets are not read, only (N, S, S) or (N, S, S, 3)"
            )
        fits = len(shape) in (3, 4) and all(0 < side <= MAX_SIDE for side in shape[1:3])
        if kind != np.uint8 or not fits:
            raise InputError(f"must be uint8 of shape (N, S, S) or (N, S, S, 3), not {kind} of {shape}")
        return shape[0]


def chosen(count: int, limit: int | None, seed: int, part: str) -> list[int]:
    """Which of count pictures are taken, in order: all, or so many by luck."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng([seed, PARTS.index(part)]).choice(count, limit, replace=False).tolist())


def save(path: Path, pixels: np.ndarray, overwrite: bool, made: list[Path]) -> None:
    """Write a picture; made lists those that were not there before."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
    elif not overwrite:
        raise InputError(f"{path} is already there; name another --out, or give --overwrite")
    Image.fromarray(pixels).save(path)


def read(args, report, made: list[Path]) -> list[Entry]:
    name = args.source.stem.lower().partition("_")[0]
    known = SETS[name].split(", ") if name in SETS and not args.names else []
    keys = [f"{part}_{what}" for part in PARTS for what in ("images", "labels")]
    try:
        file = zipfile.ZipFile(args.source)
    except Exception as error:  # as above
        raise InputError(f"{args.source}: is no .npz file ({cause_of(error)}); {REMEDY}") from error
    with file:
        there = [member.removesuffix(".npy") for member in file.namelist()]
        if missing := [key for key in keys if key not in there]:
            raise InputError(f"{args.source}: array {missing[0]!r} is missing; it has {common.short(there)}")
        labels = {part: read_labels(file, part) for part in PARTS}
        for part in PARTS:
            if (count := count_pictures(file, part)) != len(labels[part]):
                told = f"has {len(labels[part])} labels, {part}_images has {count} pictures"
                raise InputError(f"{args.source}: array '{part}_labels' {told}; {REMEDY}")
        entries = []
        for part in PARTS:
            wanted = chosen(len(labels[part]), args.limit, args.seed, part)
            for i, pixels in tqdm(pictures(file, part, wanted), desc=f"{part} pictures", total=len(wanted), unit=""):
                where, label = f"{args.source} {part}_labels[{i}]", labels[part][i]
                if known and not 0 <= label < len(known):
                    raise InputError(f"{where}: is {label}, but {name} has classes 0 to {len(known) - 1}")
                path = args.out / args.source.stem / part / f"{i:06d}.png"
                save(path, pixels, args.overwrite, made)
                entries.append(Entry(path, where, known[label] if known else str(label), split=part))
    return choices.settle(entries, args, report, known)


def limit(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("medmnist", __doc__, query=None, boxes=False)
    choices.flags(parser)
    parser.add_argument("--limit", type=limit, help="pictures of each split; default: all")
    args: Any = parser.parse_args(argv)
    args.dataset = args.dataset or Path(args.source).stem
    if not args.options and not args.grades:
        args.grades = GRADED.get(Path(args.source).stem.lower().partition("_")[0])
    made: list[Path] = []
    try:
        common.convert(args, partial(read, made=made), choices.record_of, (choices.KIND,))
    except BaseException:  # what a run that ends early has written is of no use
        for path in made:
            path.unlink(missing_ok=True)
        for folder in sorted({folder for path in made for folder in path.parents[:2]}, reverse=True):
            with suppress(OSError):  # others have files in it
                folder.rmdir()
        raise


if __name__ == "__main__":
    errors.run(main)
