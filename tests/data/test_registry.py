"""Sources by name, and what importing them costs."""

import subprocess
import sys

import numpy as np
import pytest

from jaxkd import data

SOURCES = """arrays cifar10 cifar100 decathlon digits idx image_folder image_mask_folder
kits19 lits liver_ct_sample nifti npz tfds""".split()


def test_every_source_is_found_by_name():
    assert data.names() == SOURCES


def test_mistakes_in_names_and_options_say_what_is_near(tmp_path):
    with pytest.raises(KeyError, match="no data source 'cifar_10'.*'cifar10'"):
        data.load("cifar_10", split="train")
    with pytest.raises(TypeError, match="no option 'image_sise'.*'image_size'"):
        data.load("liver_ct_sample", split="train", image_sise=64)
    with pytest.raises(TypeError, match="'idx' needs the option 'path'"):
        data.load("idx", split="train")
    with pytest.raises(TypeError, match="'digits' has no option 'path'"):
        data.load("digits", split="train", path=tmp_path)
    with pytest.raises(TypeError, match="'window' must be"):
        data.load("lits", split="train", path=tmp_path, window=(1.0, 2.0, 3.0))
    with pytest.raises(FileNotFoundError, match="lits: there is nothing at"):
        data.load("lits", split="train", path=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["digits", "liver_ct_sample", "arrays"])
def test_the_two_splits_share_no_group(name):
    options = {}
    if name == "arrays":
        options = dict(images=np.zeros((2, 3, 3)), labels=np.arange(2))
    train = data.load(name, split="train", **options)
    test = data.load(name, split="test", **options)
    assert not set(train.groups) & set(test.groups)
    assert len(train.groups) == len(train)


def test_importing_and_listing_loads_no_optional_package():
    code = (
        "import sys; from jaxkd import data; data.names();"
        "data.load('liver_ct_sample', split='test');"
        "heavy = ['nibabel', 'sklearn', 'tensorflow_datasets', 'tensorflow', 'grain'];"
        "sys.exit(', '.join(m for m in heavy if m in sys.modules) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
