"""The image step: what a file becomes before the policy sees it. Oracle: transformers' PIL processor, bit by bit."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as qwen_smart_resize

import data
from data import ImageConfig, Sample, load, load_jsonl, pixels_to_patches
from errors import InputError
from images import displayed_size, open_image, resized, smart_resize

DATA = Path(__file__).parents[2] / "shared" / "data"  # real images stay outside the repository


def image_to_patches(image, config):
    return pixels_to_patches(resized(image, *config.limits), config)


def picture(width, height, seed=0):
    """Noise over a gradient: any wrong order, rounding or filter shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 56, (height, width, 3))).astype(np.uint8))


# Odd sizes; sides below 28 and below 14; more than max_pixels; slivers up to Qwen's limit of 200.
SIZES = [
    (140, 140), (141, 139), (56, 56), (28, 28), (27, 29), (13, 40), (1, 1), (1, 200), (200, 1), (5, 900), (13, 2600),
    (640, 480), (373, 454), (257, 193), (14, 400), (42, 70), (70, 42), (98, 1001), (800, 61), (33, 34), (512, 512),
    (300, 7), (611, 87), (199, 211),
]  # fmt: skip


@pytest.mark.parametrize("width, height", SIZES)
def test_patches_are_bit_equal_to_transformers(width, height):
    config = ImageConfig(max_pixels=200 * 28 * 28)
    processor = Qwen2VLImageProcessorPil(min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    image = picture(width, height, seed=width * 1000 + height)
    want = processor(images=[image], return_tensors="pt")
    patches, grid = image_to_patches(image, config)
    assert patches.dtype == torch.float32 and patches.is_contiguous()
    assert list(grid) == want["image_grid_thw"][0].tolist()
    assert torch.equal(patches, want["pixel_values"])


def test_patches_follow_the_configuration():
    config = ImageConfig(8, 3, 1, 24 * 24, 10_000, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=3, temporal_patch_size=1, min_pixels=24 * 24, max_pixels=10_000,
        image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7],
    )  # fmt: skip
    want = processor(images=[picture(100, 230)], return_tensors="pt")
    patches, grid = image_to_patches(picture(100, 230), config)
    assert list(grid) == want["image_grid_thw"][0].tolist() and torch.equal(patches, want["pixel_values"])


def test_patch_order_is_block_by_block():
    """Literal: 56x56 with one bright patch at row 1, column 2 of 4x4 is row 6: block (0, 1), inside it (1, 0)."""
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[14:28, 28:42] = 255
    patches, grid = image_to_patches(Image.fromarray(pixels), ImageConfig(mean=(0, 0, 0), std=(1, 1, 1)))
    assert grid == (1, 4, 4) and patches.sum(1).nonzero().flatten().tolist() == [6]
    assert patches[6].eq(1).all() and patches.shape == (16, 1176)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([14, 28, 32]),
    st.integers(1, 10_000),
    st.integers(10_000, 2_000_000),
)
def test_smart_resize_is_qwens(height, width, factor, low, high):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="200 times"):
            smart_resize(height, width, factor, low, high)
    else:
        h, w = smart_resize(height, width, factor, low, high)
        assert (h, w) == qwen_smart_resize(height, width, factor, low, high)
        assert h % factor == w % factor == 0 and h > 0 and w > 0


def test_extreme_aspect_is_refused_beyond_200():
    assert smart_resize(1, 200) == (28, 812)
    with pytest.raises(InputError, match="201x1 image is more than 200 times"):
        smart_resize(1, 201)


# ---------------------------------------------------------------- files


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_eight_bit_modes_become_rgb(tmp_path):
    rgb = picture(40, 30)
    for mode, name in [("L", "l.png"), ("1", "one.png"), ("P", "p.png"), ("CMYK", "c.tif"), ("YCbCr", "y.jpg")]:
        image = rgb.convert(mode)
        opened = open_image(saved(tmp_path, image, name))
        assert opened.mode == "RGB" and opened.size == (40, 30)
        if not name.endswith("jpg"):
            assert np.array_equal(opened, image.convert("RGB")), mode


def test_transparency_is_laid_over_white(tmp_path):
    alpha = Image.fromarray(np.array([[0, 255, 51]], np.uint8))
    rgba = Image.merge("RGBA", [Image.new("L", (3, 1), v) for v in (10, 20, 30)] + [alpha])
    want = [[255, 255, 255], [10, 20, 30], [206, 208, 210]]  # white; as it is; 0.2 of it and 0.8 of 255
    assert np.abs(np.asarray(open_image(saved(tmp_path, rgba, "a.png")), int)[0] - want).max() <= 1
    gray = Image.merge("LA", [Image.new("L", (3, 1), 10), alpha])
    assert np.asarray(open_image(saved(tmp_path, gray, "la.png")))[0, :, 0].tolist()[:2] == [255, 10]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    opened = open_image(saved(tmp_path, palette, "p.png", transparency=1))
    assert np.asarray(opened)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(
    "name, dtype", [("x.png", np.uint16), ("x.tif", np.uint16), ("i.tif", np.int32), ("f.tif", "f4")]
)
def test_deep_gray_is_stretched_not_clipped(tmp_path, name, dtype):
    """A 12-bit X-ray in 16 bits: PIL's own convert("RGB") makes it white (16 bits) or keeps the low end only."""
    pixels = np.array([[1000, 1000 + 2047, 1000 + 4095], [1000, 1000, 1000]], dtype)
    opened = np.asarray(open_image(saved(tmp_path, Image.fromarray(pixels), name)))
    assert opened[0, :, 0].tolist() == [0, 127, 255] and (opened[..., 0] == opened[..., 2]).all()


@pytest.mark.filterwarnings("error")  # black by a division by zero would only warn
def test_flat_deep_gray_is_black_and_not_a_number_is_refused(tmp_path):
    flat = saved(tmp_path, Image.fromarray(np.full((4, 4), 999, np.uint16)), "flat.png")
    assert not np.asarray(open_image(flat)).any()
    odd = saved(tmp_path, Image.fromarray(np.array([[1, np.nan]], np.float32)), "nan.tif")
    with pytest.raises(InputError, match="nan.tif has pixels that are not finite"):
        open_image(odd)


def test_damaged_files_are_one_sentence_with_the_name(tmp_path):
    whole = saved(tmp_path, picture(90, 70), "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("this is no picture")
    png = bytearray(saved(tmp_path, picture(90, 70), "whole.png").read_bytes())
    png[len(png) // 2] ^= 255
    (tmp_path / "flipped.png").write_bytes(png)
    for name in ("cut.jpg", "text.png", "flipped.png"):
        sample = Sample(tmp_path / name, "it", (0.0, 0.0, 1.0, 1.0), "d", source="train.jsonl:3")
        with pytest.raises(InputError, match=f"^train.jsonl:3: image .*{name} cannot be read") as caught:
            load(sample)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_comes_first(tmp_path, orientation):
    pixels = np.zeros((20, 30), np.uint8)
    pixels[:10, :15] = 255  # bright top left, as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(saved(tmp_path, Image.fromarray(pixels), "e.png", exif=exif))
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}  # EXIF 2.3
    row, column = corner[orientation]
    assert opened.size == ((30, 20) if orientation < 5 else (20, 30))
    quarter = np.asarray(opened.convert("L").resize((2, 2), Image.Resampling.BOX))
    assert quarter[row, column] == 255 and quarter.sum() == 255


def test_real_rotated_xray_is_in_the_displayed_frame(tmp_path):
    """Stored 373x454 with orientation 8; its annotation says 454x373 and lies in the picture as displayed."""
    folder = DATA / "fixtures" / "exif"
    if not folder.is_dir():
        pytest.skip(f"real images are not here: {folder}")
    coco = json.loads((folder / "coco.json").read_text())
    entry, (x, y, w, h) = coco["images"][0], coco["annotations"][0]["bbox"]
    (tmp_path / entry["file_name"]).write_bytes((folder / entry["file_name"]).read_bytes())
    record = {"image": entry["file_name"], "query": "the fracture", "bbox": [x, y, x + w, y + h]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record | {"width": entry["width"], "height": entry["height"]}))
    image, box = load(load_jsonl(tmp_path / "x.jsonl")[0])
    assert image.size == (454, 373) and box == (x, y, x + w, y + h)
    (tmp_path / "raw.jsonl").write_text(json.dumps(record | {"width": 373, "height": 454}))
    with pytest.raises(InputError, match=r"raw.jsonl:1: fields .* say 373x454, but .* is 454x373 as displayed"):
        load(load_jsonl(tmp_path / "raw.jsonl")[0])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["b.png", "b.jpg", "b.eps", "b"])
def test_a_picture_starts_no_program(tmp_path, monkeypatch, name):
    """Pillow goes by content, and decodes EPS by `gs` from PATH, with the file as its program."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked for once a process
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(InputError, match="no picture format that is read here: PNG, JPEG, TIFF, BMP, GIF, PPM, WEBP"):
        displayed_size(tmp_path / name)
    with pytest.raises(InputError, match="no picture format"):
        open_image(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_formats_that_are_read_and_some_that_are_not(tmp_path):
    rgb = picture(40, 30)
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp", "a.gif", "a.webp", "a.ppm", "a.pgm"):
        rgb.convert("L" if name == "a.pgm" else "RGB").save(tmp_path / name)
        assert open_image(tmp_path / name).size == displayed_size(tmp_path / name) == (40, 30)
    rgb.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[picture(40, 30, 1)])
    assert open_image(tmp_path / "phone.jpg").size == (40, 30)
    for name in ("a.ico", "a.tga", "a.pcx", "a.sgi", "a.icns", "a.jp2", "a.pdf", "a.dds"):
        picture(64, 64).save(tmp_path / name)
        with pytest.raises(InputError, match="no picture format that is read here"):
            open_image(tmp_path / name)


def test_a_picture_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("fifo.png", "zero.png", "loop.png", "none.png", ".", "a\0b.png", "x" * 5000):
        for function in (open_image, displayed_size):
            with pytest.raises(InputError, match="is not a file; name a picture"):
                function(tmp_path / name)


# ---------------------------------------------------------------- configuration


def test_config_from_folder_reads_the_published_keys_and_transformers_5(tmp_path):
    settings = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5, 0.4, 0.3]}
    settings |= {"image_std": [0.2, 0.3, 0.4], "min_pixels": 6272, "max_pixels": 12845056}
    want = ImageConfig(min_pixels=6272, max_pixels=12845056, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    assert ImageConfig.from_folder(tmp_path) == want
    assert ImageConfig.from_folder(tmp_path, min_pixels=28 * 28, max_pixels=19600).max_pixels == 19600
    path.unlink()
    Qwen2VLImageProcessorPil(**settings).save_pretrained(tmp_path)  # writes size: shortest_edge, longest_edge
    assert "max_pixels" not in json.loads(path.read_text())
    assert ImageConfig.from_folder(tmp_path) == want
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
    path.unlink()
    assert ImageConfig.from_folder(tmp_path) == want


def test_config_errors_name_the_file(tmp_path):
    with pytest.raises(InputError, match="processor_config.json: does not exist; restore"):
        ImageConfig.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="preprocessor_config.json: is not valid JSON"):
        ImageConfig.from_folder(tmp_path)
    for low, high in [(0, 10_000), (5000, 4000), (100, 783)]:
        with pytest.raises(InputError, match="leave no image"):
            ImageConfig(min_pixels=low, max_pixels=high)


NANO = Path(data.__file__).parent / "assets" / "nano"
PROCESSOR = json.loads((NANO / "preprocessor_config.json").read_text())
BOTH = "{} is {}, but .*config.json: vision_config.{} is {}; take both files from one"
ODD_SETTINGS = [
    ({"merge_size": 4}, BOTH.format("merge_size", 4, "spatial_merge_size", 2)),
    ({"merge_size": 1}, BOTH.format("merge_size", 1, "spatial_merge_size", 2)),
    ({"patch_size": 7}, BOTH.format("patch_size", 7, "patch_size", 14)),
    ({"temporal_patch_size": 3}, BOTH.format("temporal_patch_size", 3, "temporal_patch_size", 2)),
    ({"patch_size": True}, "must be whole numbers, not .*True"),
    ({"patch_size": 10**9}, "leave no image"),
    ({"patch_size": -14, "merge_size": -2}, "must be at least 1, not .-14, -2, 2."),
    ({"image_std": [0.2, 0.3]}, "image_std must be three numbers, 1e-06 to 1000, not .0.2, 0.3."),
    ({"image_std": [0.2] * 4}, "image_std must be three numbers"),
    ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
    ({"image_mean": 3}, "image_mean must be three numbers, -1000 to 1000, not 3"),
    ({"image_mean": "abc"}, "image_mean must be three numbers, .* not 'abc'"),
    ({"image_mean": [0.5, True, 0.5]}, "image_mean must be three numbers"),
    ({"image_mean": {"r": 1, "g": 1, "b": 1}}, "image_mean must be three numbers"),
    ({"image_mean": [1e300, 0, 0]}, "image_mean must be three numbers"),
    ({"image_std": [0.2, 0, 0.2]}, "image_std must be three numbers"),
    ({"image_std": [0.2, math.nan, 0.2]}, "image_std must be three numbers"),
    ({"image_std": [0.2, 1e-300, 0.2]}, "image_std must be three numbers"),
    ({"image_std": [0.2, -0.2, 0.2]}, "image_std must be three numbers"),
    ({"image_std": [0.2, 10**400, 0.2]}, "image_std must be three numbers"),
    ({"max_pixels": "63504"}, "must be whole numbers, not .*'63504'"),
    ({"max_pixels": [63504]}, "must be whole numbers"),
    ({"max_pixels": 63504.0}, "must be whole numbers"),
    ({"max_pixels": 10**400}, "max_pixels 1000.* leave no image"),
    ({"min_pixels": 0}, "min_pixels 0 and max_pixels 63504 leave no image"),
    ({"min_pixels": 10**9, "max_pixels": 10**10}, "leave no image"),
    ({"size": [3136, 63504]}, "holds no image processor settings"),
    ({"size": 3136}, "holds no image processor settings"),
    ({"do_resize": False}, "do_resize is False, only True is implemented"),
    ({"do_normalize": "no"}, "do_normalize is 'no', only True is implemented"),
    ({"resample": 0}, "resample is 0, only 3 is implemented"),
    ({"rescale_factor": 1.0}, "rescale_factor is 1.0, only 0.0039"),
]


@pytest.mark.parametrize("patch, words", ODD_SETTINGS, ids=range(len(ODD_SETTINGS)))
def test_settings_that_are_not_the_models_or_of_odd_kinds_are_one_sentence(tmp_path, patch, words):
    (tmp_path / "config.json").write_text((NANO / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | patch))
    with pytest.raises(InputError, match=f"preprocessor_config.json: .*{words}") as error:
        ImageConfig.from_folder(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 450
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"image_processor": PROCESSOR | patch}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    with pytest.raises(InputError, match=f"/processor_config.json: .*{words}"):
        ImageConfig.from_folder(tmp_path)


def test_the_models_own_settings_are_taken_and_flags_still_win(tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((NANO / name).read_text())
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
    images = ImageConfig.from_folder(tmp_path, max_pixels=19600)
    assert images.max_pixels == 19600 and images.factor == 28
    config = json.loads((NANO / "config.json").read_text())
    for name in ("patch_size", "spatial_merge_size", "temporal_patch_size"):  # as the published 32B leaves them out
        del config["vision_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ImageConfig.from_folder(tmp_path, max_pixels=19600) == images
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"merge_size": 4}))
    with pytest.raises(InputError, match="merge_size is 4, but .*spatial_merge_size is 2"):
        ImageConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["[]", '"x"', "[" * 2000, "{", '{"image_processor": 3}'])
def test_processor_files_of_another_kind_are_found_before_the_run(tmp_path, content):
    """Also the one that is not read, if the other is there: write_max_pixels, at the end of a run, would meet it."""
    (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(InputError, match="processor_config.json: .*restore it"):
        ImageConfig.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    if content == '{"image_processor": 3}':
        ImageConfig.from_folder(tmp_path).write_max_pixels(tmp_path)
    else:
        with pytest.raises(InputError, match="processor_config.json: "):
            ImageConfig.from_folder(tmp_path)
    os.remove(tmp_path / "preprocessor_config.json")
    os.mkfifo(tmp_path / "preprocessor_config.json")
    with pytest.raises(InputError, match="preprocessor_config.json: is not a file; restore it from its checkpoint"):
        ImageConfig.from_folder(tmp_path)
