"""The image step: what a file becomes before the policy sees it. Oracle: transformers' PIL processor, bit by bit."""

import json
import math
import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from test_data import refused
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as qwen_smart_resize

from images import ImageConfig, displayed_size, open_image, pixels_to_patches, resized, smart_resize
from weights import NANO


def image_to_patches(image, config):
    return pixels_to_patches(resized(image, *config.limits), config)


def picture(width, height, seed=0):
    """Noise over a gradient: any wrong order, rounding or filter shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 56, (height, width, 3))).astype(np.uint8))


# Odd sizes; sides below 28 and below 14; more than max_pixels; slivers up to Qwen's limit of 200.
SIZES = [(140, 140), (141, 139), (27, 29), (13, 40), (1, 1), (1, 200), (200, 1), (13, 2600), (640, 480), (373, 454)]
SIZES += [(98, 1001), (611, 87)]


def equal_to_transformers(image, config):
    peer = Qwen2VLImageProcessorPil(
        patch_size=config.patch_size, merge_size=config.merge_size, temporal_patch_size=config.temporal_patch_size,
        min_pixels=config.min_pixels, max_pixels=config.max_pixels, image_mean=config.mean, image_std=config.std,
    )  # fmt: skip
    want = peer(images=[image], return_tensors="pt")
    patches, grid = image_to_patches(image, config)
    assert patches.dtype == np.float32 and patches.flags.c_contiguous
    assert list(grid) == want["image_grid_thw"][0].tolist() and np.array_equal(patches, want["pixel_values"].numpy())


@pytest.mark.parametrize("width, height", SIZES)
def test_patches_are_bit_equal_to_transformers(width, height):
    equal_to_transformers(picture(width, height, seed=width * 1000 + height), ImageConfig(max_pixels=200 * 28 * 28))


def test_patches_follow_the_configuration():
    equal_to_transformers(picture(100, 230), ImageConfig(8, 3, 1, 24 * 24, 10_000, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)))


def test_patch_order_is_block_by_block():
    """Literal: 56x56 with one bright patch at row 1, column 2 of 4x4 is row 6: block (0, 1), inside it (1, 0)."""
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[14:28, 28:42] = 255
    patches, grid = image_to_patches(Image.fromarray(pixels), ImageConfig(mean=(0, 0, 0), std=(1, 1, 1)))
    assert grid == (1, 4, 4) and np.flatnonzero(patches.sum(1)).tolist() == [6]
    assert (patches[6] == 1).all() and patches.shape == (16, 1176)


@settings(max_examples=300, deadline=None)
@example(1, 200, 28, 3136, 10**6)
@example(1, 201, 28, 3136, 10**6)
@given(*[st.integers(1, 3000)] * 2, st.sampled_from([14, 28, 32]), st.integers(1, 10**4), st.integers(10**4, 2 * 10**6))
def test_smart_resize_is_qwens(height, width, factor, low, high):
    if max(height, width) > 200 * min(height, width):
        refused("image is more than 200 times", smart_resize, height, width, factor, low, high)
    else:
        h, w = smart_resize(height, width, factor, low, high)
        assert (h, w) == qwen_smart_resize(height, width, factor, low, high)
        assert h % factor == w % factor == 0 and h > 0 and w > 0


# ---------------------------------------------------------------- files


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_formats_and_eight_bit_modes_that_are_read_and_some_formats_that_are_not(tmp_path):
    rgb = picture(40, 30)
    for mode, name in [("L", "l.png"), ("1", "one.png"), ("P", "p.png"), ("CMYK", "c.tif"), ("L", "a.pgm")]:
        opened = open_image(saved(tmp_path, rgb.convert(mode), name))
        assert opened.mode == "RGB" and np.array_equal(opened, rgb.convert(mode).convert("RGB")), mode
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp", "a.gif", "a.webp", "a.ppm"):
        rgb.save(tmp_path / name)
        assert open_image(tmp_path / name).size == displayed_size(tmp_path / name) == (40, 30)
    rgb.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[picture(40, 30, 1)])
    assert open_image(tmp_path / "phone.jpg").size == (40, 30)
    for name in ("a.ico", "a.tga", "a.pcx", "a.sgi", "a.icns", "a.jp2", "a.pdf", "a.dds"):
        path = saved(tmp_path, picture(64, 64), name)
        refused("no picture format that is read here", open_image, path)


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


@pytest.mark.filterwarnings("error")  # black by a division by zero would only warn
def test_deep_gray_is_stretched_not_clipped(tmp_path):
    """A 12-bit X-ray in 16 bits: PIL's own convert("RGB") makes it white (16 bits) or keeps the low end only."""
    for name, dtype in [("x.png", np.uint16), ("x.tif", np.uint16), ("i.tif", np.int32), ("f.tif", "f4")]:
        pixels = np.array([[1000, 1000 + 2047, 1000 + 4095], [1000, 1000, 1000]], dtype)
        opened = np.asarray(open_image(saved(tmp_path, Image.fromarray(pixels), name)))
        assert opened[0, :, 0].tolist() == [0, 127, 255] and (opened[..., 0] == opened[..., 2]).all()
    flat = saved(tmp_path, Image.fromarray(np.full((4, 4), 999, np.uint16)), "flat.png")
    assert not np.asarray(open_image(flat)).any()
    odd = saved(tmp_path, Image.fromarray(np.array([[1, np.nan]], np.float32)), "nan.tif")
    refused("nan.tif has pixels that are not finite", open_image, odd)


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    """Pillow goes by content, and decodes EPS by `gs` from PATH, with the file as its program."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked for once a process
    for name in ("b.png", "b.jpg", "b.eps", "b"):
        (tmp_path / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) print\nshowpage\n%%EOF\n"
        )
        for function in (displayed_size, open_image):
            refused("format that is read here: PNG, JPEG, TIFF, BMP, GIF, PPM, WEBP", function, tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_picture_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("fifo.png", "zero.png", "loop.png", "none.png", ".", "a\0b.png", "x" * 5000):
        for function in (open_image, displayed_size):
            refused("is not a file; name a picture", function, tmp_path / name)


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
    for low, high in [(0, 10_000), (5000, 4000), (100, 783)]:
        refused("leave no image", ImageConfig, min_pixels=low, max_pixels=high)


PROCESSOR = json.loads((NANO / "preprocessor_config.json").read_text())
BOTH = "{} is {}, but .*config.json: vision_config.{} is {}; take both files from one"
ODD_SETTINGS = [  # words of the sentence, and settings that it is about
    (BOTH.format("merge_size", 4, "spatial_merge_size", 2), {"merge_size": 4}),
    (BOTH.format("patch_size", 7, "patch_size", 14), {"patch_size": 7}),
    (BOTH.format("temporal_patch_size", 3, "temporal_patch_size", 2), {"temporal_patch_size": 3}),
    ("must be whole numbers, not .*True", {"patch_size": True}),
    ("must be whole numbers, not .*'63504'", {"max_pixels": "63504"}),
    ("must be whole numbers", {"max_pixels": 63504.0}),
    ("must be at least 1, not .-14, -2, 2.", {"patch_size": -14, "merge_size": -2}),
    ("image_std must be three numbers, 1e-06 to 1000, not .0.2, 0.3.", {"image_std": [0.2, 0.3]}),
    *[("image_std must be three numbers", {"image_std": [0.2, value, 0.2]}) for value in (0, math.nan, 10**400)],
    ("image_mean must be three numbers, -1000 to 1000, not 3", {"image_mean": 3}),
    *[("image_mean must be three numbers", {"image_mean": value}) for value in ("abc", [0, True, 0], {"r": 1})],
    ("leave no image", {"patch_size": 10**9}),
    ("max_pixels 1000.* leave no image", {"max_pixels": 10**400}),
    ("min_pixels 0 and max_pixels 63504 leave no image", {"min_pixels": 0}),
    ("holds no image processor settings", {"size": 3136}),
    ("do_resize is False, only True is implemented", {"do_resize": False}),
    ("resample is 0, only 3 is implemented", {"resample": 0}),
    ("rescale_factor is 1.0, only 0.0039", {"rescale_factor": 1.0}),
]


def test_settings_that_are_not_the_models_or_of_odd_kinds_are_one_sentence(tmp_path):
    flat, nested = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    (tmp_path / "config.json").write_text((NANO / "config.json").read_text())
    for words, patch in ODD_SETTINGS:
        flat.write_text(json.dumps(PROCESSOR | patch))
        assert len(refused(f"preprocessor_config.json: .*{words}", ImageConfig.from_folder, tmp_path)) < 450
        flat.unlink()
        nested.write_text(json.dumps({"image_processor": PROCESSOR | patch}))
        refused(f"/processor_config.json: .*{words}", ImageConfig.from_folder, tmp_path)
        nested.unlink()


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
    refused("merge_size is 4, but .*spatial_merge_size is 2", ImageConfig.from_folder, tmp_path)


def test_processor_files_of_another_kind_are_found_before_the_run(tmp_path):
    """Also the one that is not read, if the other is there: write_max_pixels, at the end of a run, would meet it."""
    flat, nested = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    refused("processor_config.json: does not exist; restore", ImageConfig.from_folder, tmp_path)
    for content in ("[]", '"x"', "[" * 2000, "{", '{"image_processor": 3}'):
        nested.write_text(content)
        refused("/processor_config.json: .*restore it", ImageConfig.from_folder, tmp_path)
        flat.write_text(json.dumps(PROCESSOR))
        if content == '{"image_processor": 3}':
            ImageConfig.from_folder(tmp_path).write_max_pixels(tmp_path)
        else:
            refused("/processor_config.json: ", ImageConfig.from_folder, tmp_path)
        flat.unlink()
    os.mkfifo(tmp_path / "preprocessor_config.json")
    words = "preprocessor_config.json: is not a file; restore it from its checkpoint"
    refused(words, ImageConfig.from_folder, tmp_path)
