import pytest

from jaxkd.distill import DataSpec, Specs, taps
from jaxkd.layers import NetworkSpec


def network(name, *names, **shapes):
    return NetworkSpec(
        name=name, logits=(5,), taps={**dict.fromkeys(names, (4, 4, 3)), **shapes}
    )


def specs(student, teacher):
    data = DataSpec(records=8, num_classes=5, batch_size=4, steps_per_epoch=2, epochs=1)
    return Specs(student=student, teachers=(teacher,), data=data)


CLASSIFIER = network(
    "small", "stem", "stage1", "stage1_pre", "stage2", "stage2_pre", pooled=(3,)
)
DEEP = network("deep", "stem", "stage1", "stage2", "stage3")
UNET = network("unet", "e1", "e2")


def test_stages_are_paired_in_depth_order():
    assert taps.stage_pairs(specs(CLASSIFIER, CLASSIFIER)) == [
        ("stage1", "stage1"),
        ("stage2", "stage2"),
    ]


def test_options_replace_the_stages_of_either_network():
    pairs = taps.stage_pairs(specs(CLASSIFIER, DEEP), None, ("stage2", "stage3"))
    assert pairs == [("stage1", "stage2"), ("stage2", "stage3")]
    pairs = taps.stage_pairs(specs(UNET, CLASSIFIER), ["e2"], ["stem"])
    assert pairs == [("e2", "stem")]


def test_different_numbers_of_stages_are_an_error_that_lists_both():
    message = (
        r"student 'small' has 2 taps \(stage1, stage2\) and teacher 'deep' has 3 "
        r"\(stage1, stage2, stage3\); set student_taps and teacher_taps"
    )
    with pytest.raises(ValueError, match=message):
        taps.stage_pairs(specs(CLASSIFIER, DEEP))


def test_a_network_without_stages_asks_for_the_option():
    with pytest.raises(ValueError, match="'unet' has no taps .* set student_taps"):
        taps.stage_pairs(specs(UNET, CLASSIFIER))
    with pytest.raises(ValueError, match="'unet' has no taps .* set teacher_taps"):
        taps.stage_pairs(specs(CLASSIFIER, UNET))
    with pytest.raises(ValueError, match="set teacher_tap, it has e1, e2"):
        taps.last_stage(UNET, option="teacher_tap")


@pytest.mark.parametrize("wrong", [(), "stage1"])
def test_taps_must_be_a_list_with_names(wrong):
    with pytest.raises(ValueError, match="student_taps must be a list of tap names"):
        taps.stage_pairs(specs(CLASSIFIER, CLASSIFIER), wrong)


def test_an_unknown_tap_is_named_with_those_there_are():
    with pytest.raises(KeyError, match="'deep' has no tap 'e1'; it has stem, stage1"):
        taps.stage_pairs(specs(CLASSIFIER, DEEP), None, ["stage1", "e1"])
    with pytest.raises(KeyError, match="'unet' has no tap 'stage1'"):
        taps.last_stage(UNET, "stage1")
    with pytest.raises(KeyError, match="'unet' has no tap 'vector'"):
        taps.pooled(UNET, "vector")


def test_last_stage_is_the_deepest_or_the_one_named():
    assert taps.last_stage(DEEP) == "stage3"
    assert taps.last_stage(DEEP, "stem") == "stem"


def test_pooled_is_a_vector():
    assert taps.pooled(CLASSIFIER) == "pooled"
    assert taps.pooled(network("vit", cls=(8,)), "cls") == "cls"
    with pytest.raises(ValueError, match="'unet' has no tap 'pooled'; set teacher_tap"):
        taps.pooled(UNET, option="teacher_tap")
    with pytest.raises(ValueError, match=r"'stem' of network 'deep' has .*4, 4, 3"):
        taps.pooled(DEEP, "stem")


def test_before_relu_names_the_tap_or_says_that_there_is_none():
    assert taps.before_relu(CLASSIFIER, "stage2") == "stage2_pre"
    with pytest.raises(ValueError, match="'deep' has no tap 'stage2_pre'"):
        taps.before_relu(DEEP, "stage2")


def test_networks_are_read_off_the_outputs(classification):
    networks = taps.networks(classification.inputs())
    assert networks.student == classification.specs.student
    assert networks.teacher == classification.specs.teacher
