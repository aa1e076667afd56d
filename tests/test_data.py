"What a notebook cannot hold well about images: damaged files by the hundred, and what an import pulls in."
import subprocess, sys
import numpy as np
import pytest
from PIL import Image
from ultra_nb.data import read_image

KINDS = [("png", "RGB"), ("png", "P"), ("png", "I;16"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"), ("tif", "RGB"), ("tif", "CMYK"), ("webp", "RGBA"), ("bmp", "RGB"), ("ppm", "RGB")]

def damaged(raw, dice):
    "A few bytes changed, half of the time in the header; sometimes the end cut off"
    raw = bytearray(raw)
    for at in dice.integers(0, min(len(raw), dice.choice([200, 1_000_000])), dice.integers(1, 6)): raw[at] = dice.integers(0, 256)
    return bytes(raw[:dice.integers(1, len(raw))] if dice.random() < .2 else raw)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind,mode", KINDS)
def test_a_damaged_image_is_an_image_or_one_line(tmp_path, kind, mode):
    dice, path = np.random.default_rng(0), tmp_path/f"image.{kind}"
    pixels = dice.integers(0, 65535, (24, 31), np.uint16) if mode == "I;16" else dice.integers(0, 255, (24, 31, 3), np.uint8)
    image = Image.fromarray(pixels)
    (image if mode == "I;16" else image.convert(mode)).save(path)
    whole = path.read_bytes()
    assert read_image(path).size == (31, 24)
    for _ in range(60):
        path.write_bytes(damaged(whole, dice))
        try: assert read_image(path).mode == "RGB"
        except ValueError as e: assert "\n" not in str(e) and str(path) in str(e)

def test_importing_data_is_light():
    heavy = "{'torch', 'timm', 'open_clip', 'transformers', 'matplotlib', 'scipy'}"
    code = f"import sys, ultra_nb.data; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
