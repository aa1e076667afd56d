"""What a notebook cannot hold well about images and data sets: damaged and missing files by the dozen, real archives,
and what an import pulls in."""
import os, pickle, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from ultra_nb.datasets import DATA, check_data, cityscapes, coco_stuff, folder, open_data, potsdam
from ultra_nb.datasets import read_labels, scenes, voc
from ultra_nb.images import read_image

KINDS = [("png", "RGB"), ("png", "P"), ("png", "I;16"), ("jpg", "RGB"), ("jpg", "CMYK"), ("gif", "P"), ("tif", "RGB"),
         ("tif", "CMYK"), ("webp", "RGBA"), ("bmp", "RGB"), ("ppm", "RGB")]

def damaged(raw, dice):
    "A few bytes changed, half of the time in the header; sometimes the end cut off"
    raw = bytearray(raw)
    end = min(len(raw), dice.choice([200, 1_000_000]))
    for at in dice.integers(0, end, dice.integers(1, 6)): raw[at] = dice.integers(0, 256)
    return bytes(raw[:dice.integers(1, len(raw))] if dice.random() < .2 else raw)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind,mode", KINDS)
def test_a_damaged_image_is_an_image_or_one_line(tmp_path, kind, mode):
    dice, path = np.random.default_rng(0), tmp_path/f"image.{kind}"
    if mode == "I;16": image = Image.fromarray(dice.integers(0, 65535, (24, 31), np.uint16))
    else: image = Image.fromarray(dice.integers(0, 255, (24, 31, 3), np.uint8)).convert(mode)
    image.save(path)
    whole = path.read_bytes()
    assert read_image(path).size == (31, 24)
    for _ in range(60):
        path.write_bytes(damaged(whole, dice))
        try: assert read_image(path).mode == "RGB"
        except ValueError as e: assert "\n" not in str(e) and str(path) in str(e)

def test_importing_data_is_light():
    heavy = "{'torch', 'timm', 'open_clip', 'transformers', 'matplotlib', 'scipy'}"
    code = f"import sys, ultra_nb.datasets, ultra_nb.posts; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

# Data sets: a complete little archive of each, from which one thing at a time is taken away.

NAMES = ["voc", "coco-stuff", "cityscapes", "potsdam", "tiles", "folder"]

def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

PAIRS = { # in the official layout: images, masks, class numbers from and below, height of the first (they grow by one)
    "voc": ("VOCdevkit/VOC2012/JPEGImages/{}.jpg", "VOCdevkit/VOC2012/SegmentationClass/{}.png", 0, 21, 30),
    "coco-stuff": ("images/val2017/{:012}.jpg", "annotations/val2017/{:012}.png", 91, 182, 370),
    "cityscapes": ("leftImg8bit/val/ulm/ulm_{}_leftImg8bit.png", "gtFine/val/ulm/ulm_{}_gtFine_labelIds.png",
                   0, 34, 30),
    "folder": ("images/{}.png", "masks/{}.png", 0, 7, 30),
}

def numbered(path, n): write(path, "".join(f"{i}\n" for i in range(n)))

def crops(root, n, dice):
    "Potsdam as STEGO's archive has it"
    numbered(root/"labelled_test.txt", n)
    for part in ("imgs", "gt"): (root/part).mkdir(parents=True)
    for i in range(n): savemat(root/f"imgs/{i}.mat", dict(img=dice.integers(0, 255, (200, 200, 4), np.uint8)))
    for i in range(n): savemat(root/f"gt/{i}.mat", dict(gt=dice.integers(0, 6, (200, 200), np.int32)))

def tiles(root, n, dice):
    "Potsdam as ISPRS gives it out"
    labels = np.full((800, 400, 3), [255, 255, 0], np.uint8)
    for i in range(n):
        image = dice.integers(0, 255, (800, 400, 3), np.uint8)
        save(root/f"2_Ortho_RGB/2_Ortho_RGB/top_potsdam_2_{i}_RGB.tif", image)
        save(root/f"5_Labels_for_participants/top_potsdam_2_{i}_label.tif", labels)

def archive(root, name, n=3):
    "A complete data set of `n` pictures in the official layout, of different sizes where the layout allows"
    dice = np.random.default_rng(0)
    if name == "potsdam": crops(root, n, dice)
    if name == "tiles": tiles(root, n, dice)
    if name == "voc": numbered(root/"VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", n)
    if name in PAIRS:
        image, mask, low, high, height = PAIRS[name]
        for i in range(n):
            save(root/image.format(i), dice.integers(0, 255, (height+i, 380, 3), np.uint8))
            save(root/mask.format(i), dice.integers(low, high, (height+i, 380), np.uint8))
    return root

def opened(root, name): return open_data("potsdam", root, "all") if name == "tiles" else open_data(name, root)

def one_line(function, *args):
    "The error's text"
    with pytest.raises((ValueError, FileNotFoundError)) as caught: function(*args)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)

@pytest.mark.parametrize("name", NAMES)
def test_a_complete_archive_opens(tmp_path, name):
    pictures = opened(archive(tmp_path, name), name)
    assert len(pictures) == (6 if name == "tiles" else 3)
    for sample in pickle.loads(pickle.dumps(pictures)): # as a loader's processes would
        assert sample.image.mode == "RGB" and sample.image.size == sample.mask.shape[::-1]
        assert sample.mask.dtype == np.uint8
        assert sample.image.size == (320, 320) or pictures.crop is None
        assert set(np.unique(sample.mask)) <= {*range(len(pictures.classes)), 255}
    report = check_data(pictures)
    assert not report.problems and report.number == len(pictures) and str(tmp_path) not in repr(pictures)

@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_is_one_line(tmp_path, name):
    assert "`ultra-nb data " in one_line(opened, tmp_path, name)
    assert "`ultra-nb data " in one_line(opened, tmp_path/"nowhere", name)

def folders(root): return sorted(p for p in root.rglob("*") if p.is_dir())

@pytest.mark.parametrize("name", NAMES)
def test_half_an_archive_is_one_line(tmp_path, name):
    "Each folder missing, each folder empty, each file missing"
    whole = archive(tmp_path/"whole", name)
    def without(path, empty=False):
        copy = tmp_path/"copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        target = copy/path.relative_to(whole)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        if empty: target.mkdir()
        return copy
    for path in folders(whole):
        for empty in (False, True): one_line(opened, without(path, empty), name)
    # what the list of pictures is made from cannot be missed
    listed_by = {"coco-stuff": "annotations", "cityscapes": "leftImg8bit", "tiles": "top_potsdam"}
    for path in whole.rglob("*.*"):
        if path.is_file() and listed_by.get(name, "nothing") not in str(path): one_line(opened, without(path), name)

def test_a_mask_that_goes_missing_is_found_by_its_picture_in_a_folder(tmp_path):
    root = archive(tmp_path, "folder")
    (root/"masks/1.png").unlink()
    assert "images have no file of the same name in masks: 1;" in one_line(folder, root)
    (root/"images/1.png").unlink(); (root/"images/2.png").unlink()
    assert "masks have no file of the same name in images: 2;" in one_line(folder, root)

BUILDERS = [("voc", voc, "JPEGImages/1.jpg", "SegmentationClass/1.png"),
            ("coco-stuff", coco_stuff, "images/val2017/000000000001.jpg", "annotations/val2017/000000000001.png"),
            ("cityscapes", cityscapes, "ulm/ulm_1_leftImg8bit.png", "ulm/ulm_1_gtFine_labelIds.png"),
            ("potsdam", potsdam, "imgs/1.mat", "gt/1.mat"),
            ("folder", folder, "images/1.png", "masks/1.png")]

@pytest.mark.parametrize("which", ["image", "mask"])
@pytest.mark.parametrize("name,builder,image,mask", BUILDERS, ids=[b[0] for b in BUILDERS])
def test_a_damaged_file_in_the_middle_names_itself(tmp_path, name, builder, image, mask, which):
    root = archive(tmp_path, name)
    if name == "folder": write(root/"classes.txt", "\n".join("abcdefg"))
    pictures = DATA[name].open(root, curated=False) if name == "coco-stuff" else builder(root)
    path, = [p for p in root.rglob("*.*") if str(p).endswith(image if which == "image" else mask)]
    path.write_bytes(path.read_bytes()[:300])
    assert pictures[0].name and pictures[2].name
    assert str(path) in one_line(pictures.__getitem__, 1)
    report = check_data(pictures)
    assert len(report.problems) == 1 and str(path) in report.problems[0]

@pytest.mark.parametrize("name,builder,image,mask", BUILDERS[:3], ids=[b[0] for b in BUILDERS[:3]])
def test_masks_that_do_not_fit(tmp_path, name, builder, image, mask):
    root = archive(tmp_path, name)
    pictures = builder(root)
    path, = [p for p in root.rglob("*.png") if str(p).endswith(mask)]
    right = read_labels(path)
    save(path, right.T)
    line = one_line(pictures.__getitem__, 1)
    found, wanted = ("x".join(map(str, shape)) for shape in (right.T.shape, right.shape))
    assert found in line.replace(" ", "") and wanted in line.replace(" ", "")
    save(path, np.where(right == right[0, 0], 200, right).astype(np.uint8))
    assert f"{path} holds 200, which" in one_line(pictures.__getitem__, 1)
    save(path, right.astype(np.uint16)) # 16 bits are fine as long as the numbers are
    assert (pictures.read(*pictures.files[1][1:])[1] == right).all() and pictures[1].mask.dtype == np.uint8
    save(path, (right + 256*(right == right[0, 0])).astype(np.uint16))
    assert str(path) in one_line(pictures.__getitem__, 1)
    palette = Image.fromarray(right).convert("P")
    palette.putpalette(list(np.random.default_rng(0).integers(0, 255, 768)))
    palette.save(path)
    assert (pictures.read(*pictures.files[1][1:])[1] == right).all()
    palette.convert("RGB").save(path)
    assert "holds colours" in one_line(pictures.__getitem__, 1)

def test_potsdam_labels_of_another_size(tmp_path):
    pictures = potsdam(archive(tmp_path, "potsdam"))
    savemat(tmp_path/"gt/1.mat", dict(gt=np.zeros((100, 200), np.int32)))
    assert "200 x 100" in one_line(pictures.__getitem__, 1)
    savemat(tmp_path/"gt/1.mat", dict(other=np.zeros((200, 200), np.int32)))
    assert "'gt'" in one_line(pictures.__getitem__, 1)
    tiles = potsdam(archive(tmp_path/"tiles", "tiles"), "all")
    save(next((tmp_path/"tiles/5_Labels_for_participants").glob("*_0_*.tif")), np.zeros((800, 800, 3), np.uint8))
    assert "400 x 400" in one_line(tiles.__getitem__, 0)
    assert tiles[2].mask.max() == 0

def test_folder_without_a_list_of_classes(tmp_path):
    root = archive(tmp_path, "folder")
    assert len(folder(root).classes) == 7
    save(root/"masks/2.png", np.full((32, 380), 300, np.uint16))
    assert "300: class numbers go from 0 to 254" in one_line(folder, root)
    write(root/"classes.txt", "sky\nsea\n\n")
    assert folder(root).classes == ["sky", "sea"]
    assert "which this data set does not use" in one_line(folder(root).__getitem__, 0)

def test_bad_requests():
    assert "choose from" in one_line(open_data, "imagenet", ".")
    assert "needs root" in one_line(open_data, "cityscapes")
    assert "split is 'train' or 'val'" in one_line(scenes, "test", 3)

# Real files, where a folder with them lies beside the project (or where ULTRA_NB_KIT names one)

KIT = Path(os.environ.get("ULTRA_NB_KIT", Path(__file__).parent.parent.parent/"shared"/"kit"))

REAL = [("voc", "", dict(split="val"), 200, 21),
        ("voc", "", dict(split="train"), 256, 21),
        ("coco-stuff", "", dict(curated=False), 8, 27),
        ("coco-stuff", "cocostuff", {}, 3, 27),
        ("coco-stuff", "", dict(split="train"), 5, 27),
        ("cityscapes", "", dict(split="train"), 3, 27),
        ("folder", "camvid", dict(images="val", masks="valannot", ignore=11), 101, 11)]

@pytest.mark.skipif(not KIT.exists(), reason="no folder with real pictures")
@pytest.mark.parametrize("name,where,options,number,classes", REAL)
def test_real_pictures(name, where, options, number, classes):
    pictures = open_data(name, KIT/where, **options)
    assert (len(pictures), len(pictures.classes)) == (number, classes)
    seen = np.unique(np.concatenate([np.unique(pictures[i].mask) for i in range(0, number, max(1, number//8))]))
    assert len(seen) > 4 and set(seen.tolist()) <= {*range(classes), 255}
    if number < 20: assert check_data(pictures).problems == []
